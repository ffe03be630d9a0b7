//! Handlers of one executor that panic again and again, with escalation as it is by default: more than a hundred contained
//! panics within ten seconds restart the executor; once, since for half a minute what a restart has not helped against is
//! only contained. The restart costs that executor's connections. What nobody else may notice is judged as it is for
//! escapes ([`crate::escapes`]).

use std::cell::Cell;
use std::io::ErrorKind;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

use crate::client::Whoami;
use crate::escapes::clients;
use crate::escapes::stage::Stage;
use crate::histogram::Histogram;
use crate::load;
use crate::panics::{Arguments, order_panic};
use crate::random::Random;
use crate::report::{Faults, Progress, Verdicts};
use crate::server::Server;

const EXECUTORS: usize = 4;
/// The default of `--escalate-after`.
const ESCALATE_AFTER: u64 = 100;
/// A restart has come by then.
const RESTART_MAX: Duration = Duration::from_secs(20);
/// After the restart a victim's connection that has not ended by now is taken to hang.
const HANG: Duration = Duration::from_secs(5);
/// The load without panics.
const BEFORE: Duration = Duration::from_millis(300);
/// After the restart there are more than a hundred panics again within this time, which is shorter than the window.
const AFTER_MAX: Duration = Duration::from_secs(8);
const SAID: &str = "too many of its panics";

/// What the runs came to.
#[derive(Default)]
struct Sum {
    runs: usize,
    /// Runs in which the panics led to no restart.
    without: usize,
    restarts: u64,
    contained_before: u64,
    contained_after: u64,
    silent: usize,
    unstopped: usize,
    innocents: Faults,
    queued: Faults,
    unanswered: Faults,
    wrong: Faults,
    hung: u64,
    in_flight: u64,
    answers: u64,
    ends: u64,
    gaps: Histogram,
}

/// Contained panics of the victim: before its restart, and after it.
type Contained = Rc<[Cell<u64>; 2]>;

/// Each run has a server of its own, as an executor rests for half a minute between two escalations.
pub async fn run(arguments: &Arguments, verdicts: &mut Verdicts) -> Result<(), String> {
    if arguments.escalations == 0 {
        return Ok(());
    }
    let mut sum = Sum::default();
    let mut progress = Progress::new();
    for number in 0..arguments.escalations {
        one(arguments, number, &mut sum).await?;
        progress.say(|| format!("{} escalations", sum.runs));
    }
    sum.judge(verdicts);
    Ok(())
}

async fn one(arguments: &Arguments, number: usize, sum: &mut Sum) -> Result<(), String> {
    let (common, victim) = (&arguments.common, number % EXECUTORS);
    let (executors, cpus) = (EXECUTORS.to_string(), common.cpus_or("0,1"));
    let server = common.start(common.port, &["--executors", &executors, "--cpus", &cpus, "--chaos"])?;
    if number == 0 {
        println!("server: {}, log {}; one for each escalation", server.command, server.log_path());
    }
    let stage = Rc::new(Stage::new(server.address(), HANG));
    let mut tasks = clients::start(&stage, arguments.keep_alive, 0, arguments.fresh);
    sleep(BEFORE).await;
    let (client, who) = load::reach(server.address(), victim).await?;
    client.reset();
    let contained = Contained::default();
    for client in 0..arguments.panicking {
        tasks.push(spawn_local(panicking(Rc::clone(&stage), who, client, Rc::clone(&contained))));
    }
    let restarted = timeout(RESTART_MAX, restart(arguments, &stage, who, &contained)).await.is_ok();
    let hang = Instant::now() + HANG;
    while restarted && stage.live(who) > 0 && Instant::now() < hang {
        sleep(Duration::from_millis(1)).await;
    }
    if restarted {
        stage.over(who, true);
    }
    let after = Instant::now() + AFTER_MAX;
    while contained[1].get() <= ESCALATE_AFTER && Instant::now() < after {
        sleep(Duration::from_millis(10)).await;
    }
    stage.stop();
    load::all(tasks).await?;
    sum.without += usize::from(!restarted);
    sum.contained_before += contained[0].get();
    sum.contained_after += contained[1].get();
    sum.take(&stage, server)
}

/// Ready when the next generation of the executor has answered. From when the panic that is one too many may be under way,
/// and no earlier, its connections may end.
async fn restart(arguments: &Arguments, stage: &Stage, who: Whoami, contained: &Contained) {
    while contained[0].get() + (arguments.panicking as u64) < ESCALATE_AFTER {
        sleep(Duration::from_millis(1)).await;
    }
    stage.order(who);
    while stage.latest(who.executor) <= who.generation {
        stage.changed.notified().await;
    }
}

/// Makes handlers of one executor panic, whatever its generation.
async fn panicking(stage: Rc<Stage>, victim: Whoami, number: usize, contained: Contained) {
    let mut random = Random::of(7, number);
    while !stage.is_stopped() {
        let Some((mut client, known)) = clients::introduced(&stage).await else {
            sleep(random.milliseconds(5, 20)).await;
            continue;
        };
        if known.who.executor != victim.executor {
            stage.leave(&known);
            client.reset();
            continue;
        }
        match load::in_time(order_panic(&mut client)).await {
            Ok(()) => {
                stage.leave(&known);
                let count = &contained[usize::from(known.who.generation > victim.generation)];
                count.set(count.get() + 1);
            }
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                stage.seen.borrow_mut().wrong.note(|| error.to_string());
                stage.leave(&known);
            }
            Err(error) => stage.ended(&known, false, &error),
        }
        sleep(random.milliseconds(5, 20)).await;
    }
}

impl Sum {
    fn take(&mut self, stage: &Stage, server: Server) -> Result<(), String> {
        let seen = stage.seen.take();
        self.runs += 1;
        self.restarts += (0..EXECUTORS).map(|executor| stage.latest(executor).saturating_sub(1)).sum::<u64>();
        self.innocents.add(seen.innocents);
        self.queued.add(seen.queued);
        self.unanswered.add(seen.unanswered);
        self.wrong.add(seen.wrong);
        self.hung += seen.hung;
        self.in_flight += seen.in_flight;
        self.answers += seen.asked + seen.fresh;
        self.ends += seen.ends.count();
        self.gaps.add(&seen.gaps);
        let lines = server.log_lines(&[SAID], 1);
        lines.iter().filter(|_| self.runs == 1).for_each(|line| println!("  log: {line}"));
        self.silent += usize::from(lines.is_empty());
        let (status, _) = server.stop()?;
        self.unstopped += usize::from(!status.success());
        Ok(())
    }

    fn judge(&self, verdicts: &mut Verdicts) {
        println!("  each escalation: {} contained panics before it", self.contained_before / self.runs.max(1) as u64);
        println!(
            "  what they cost: {} connections of those executors, {} not answered yet; served again after {}",
            self.ends, self.in_flight, self.gaps
        );
        let figures = format!("{} restarts in {} runs, {} runs without one", self.restarts, self.runs, self.without);
        verdicts.check(
            self.without == 0 && self.restarts == self.runs as u64,
            "too many panics restart their executor once, and no other",
            figures,
        );
        verdicts.check(
            self.contained_after > ESCALATE_AFTER * self.runs as u64,
            "those after the restart are contained",
            format!("{} in {} runs", self.contained_after, self.runs),
        );
        let figures = format!("{} in {} answers", self.innocents.show("errors at innocents"), self.answers);
        verdicts.check(self.innocents.count() == 0, "with escalation no client of another executor notices", figures);
        verdicts.check(
            self.queued.count() == 0 && self.unanswered.count() == 0,
            "with escalation no queued connection is reset, every other new one is answered",
            format!("{}, {}", self.queued.show("queued and reset"), self.unanswered.show("unanswered")),
        );
        let figures = format!("{} hung, {}", self.hung, self.wrong.show("wrong answers"));
        let met = self.hung == 0 && self.wrong.count() == 0;
        verdicts.check(met, "with escalation every answer is right, and who gets none sees the end", figures);
        verdicts.check(self.silent == 0, "the log says why it restarts", format!("{} runs without", self.silent));
        let figures = format!("{} of {} did not", self.unstopped, self.runs);
        verdicts.check(self.unstopped == 0, "servers that have escalated stop in order", figures);
    }
}
