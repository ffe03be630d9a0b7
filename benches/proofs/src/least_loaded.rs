//! Connections that stay, with `--steering least-loaded`: they end evenly spread over four executors; also after many of two
//! executors have gone again, and after one executor was restarted half-way.
//!
//! What was thinned out unevenly is first filled up, and then half of all connections are replaced, one after the other and
//! by chance, as clients come and go. To fill it up alone is not enough, and is not judged: an executor gets half to twice as
//! much as the mean, so the full ones get some of the new ones, too. A restart half-way leaves more room to catch up.
//!
//! They come at a pace. The server weighs its executors anew ten times a second, and what comes between two weighings is
//! spread by chance; a burst has nothing to go by. Each is asked who has it when it has come, and again when all are there,
//! so what is counted is open.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use tokio::time::{sleep, sleep_until};

use crate::client::{self, Client, Whoami};
use crate::histogram::Histogram;
use crate::load::{self, LAG_MAX, in_time};
use crate::random::Random;
use crate::report::{Faults, Verdicts};
use crate::server::{Common, Server};

const EXECUTORS: usize = 4;
/// A restarted executor answers within this time.
const RESTART_MAX: Duration = Duration::from_secs(20);
/// The server has seen the end of a thousand connections by then.
const SETTLE: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Runs, one after another on one server
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Connections that are open in the end
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// New ones a second
    #[arg(long, default_value_t = 250.0)]
    rate: f64,
    /// Connections on the executor with the most, divided by those on the one with the fewest
    #[arg(long, default_value_t = 1.25)]
    ratio: f64,
}

type Counts = [usize; EXECUTORS];

/// An open connection, and who has it.
struct Open {
    client: Client,
    who: Whoami,
}

/// The connections of a run, and what went wrong with those of all runs.
struct Crowd<'a> {
    arguments: &'a Arguments,
    server: &'a Server,
    open: Vec<Open>,
    begun: usize,
    failed: Faults,
    hung: Faults,
    lag: Histogram,
}

/// What the runs came to, each in the same scenes.
#[derive(Default)]
struct Ratios {
    opened: Vec<f64>,
    filled_up: Vec<f64>,
    evened_out: Vec<f64>,
    restarted: Vec<f64>,
}

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let common = &arguments.common;
    let (executors, cpus) = (EXECUTORS.to_string(), common.cpus_or("0,1"));
    let steered = ["--chaos", "--steering", "least-loaded"];
    let server = common
        .start(common.port, &[&["--executors", executors.as_str(), "--cpus", cpus.as_str()][..], &steered].concat())?;
    println!("server: {}, process {}, log {}", server.command, server.pid(), server.log_path());
    println!("  steering: {}", server.steering());
    println!(
        "{} runs; connections that ask once and stay, {} of them, {} a second",
        arguments.runs, arguments.connections, arguments.rate
    );
    let mut ratios = Ratios::default();
    let mut crowd = Crowd {
        arguments,
        server: &server,
        open: Vec::new(),
        begun: 0,
        failed: Faults::default(),
        hung: Faults::default(),
        lag: Histogram::default(),
    };
    for number in 1..=arguments.runs {
        crowd.run(number, &mut ratios).await?;
    }
    let mut verdicts = Verdicts::default();
    judge(&crowd, &ratios, &mut verdicts);
    let (status, time) = server.stop()?;
    verdicts.check(status.success(), "the server stops in order", format!("{status} after {time:.2?}"));
    Ok(verdicts)
}

impl Crowd<'_> {
    async fn run(&mut self, number: usize, ratios: &mut Ratios) -> Result<(), String> {
        let (all, victim) = (self.arguments.connections, number % EXECUTORS);
        self.grow(all).await;
        let opened = self.count().await;
        let left = self.thin_out(victim);
        self.grow(all).await;
        let filled_up = self.count().await;
        self.replace(all / 2, &mut Random::of(6, number)).await;
        let evened_out = self.count().await;
        self.leave().await?;
        self.grow(all / 2).await;
        self.restart(victim).await?;
        self.grow(all).await;
        let restarted = self.count().await;
        self.leave().await?;
        println!("  run {number}: opened {}", show(opened));
        println!(
            "  run {number}: thinned out to {left:?}, filled up to {}, half replaced {}",
            show(filled_up),
            show(evened_out)
        );
        println!("  run {number}: executor {victim} restarted half-way, filled up to {}", show(restarted));
        ratios.opened.push(ratio(opened));
        ratios.filled_up.push(ratio(filled_up));
        ratios.evened_out.push(ratio(evened_out));
        ratios.restarted.push(ratio(restarted));
        Ok(())
    }

    /// Opens connections until there are `goal`.
    async fn grow(&mut self, goal: usize) {
        let began = Instant::now();
        for number in 0..goal.saturating_sub(self.open.len()) {
            self.open_one(began, number).await;
        }
    }

    /// Closes one by chance and opens another, `count` times.
    async fn replace(&mut self, count: usize, random: &mut Random) {
        let began = Instant::now();
        for number in 0..count {
            if !self.open.is_empty() {
                self.open.swap_remove(random.below(self.open.len()));
            }
            self.open_one(began, number).await;
        }
    }

    /// Opens the next, at the pace. One is opened after the other: a server that is slow to answer is asked later, and that
    /// is counted as lag.
    async fn open_one(&mut self, began: Instant, number: usize) {
        let meant = began + Duration::from_secs_f64(number as f64 / self.arguments.rate);
        sleep_until(meant.into()).await;
        self.lag.record(meant.elapsed());
        self.begun += 1;
        let opened = in_time(async {
            let mut client = Client::connect_from(self.server.address(), self.begun, 0).await?;
            let who = client::whoami(&client.get("/whoami").await?)?;
            Ok(Open { client, who })
        });
        match opened.await {
            Ok(open) => self.open.push(open),
            Err(error) => self.failed.note(|| format!("a new connection: {error}")),
        }
    }

    /// Asks each connection who has it. Those that do not answer are lost.
    async fn count(&mut self) -> Counts {
        let mut counts = Counts::default();
        let mut answering = Vec::with_capacity(self.open.len());
        for mut open in self.open.drain(..) {
            let asked = in_time(async { client::whoami(&open.client.get("/whoami").await?) }).await;
            match asked {
                Ok(who) if who == open.who => {
                    counts[who.executor % EXECUTORS] += 1;
                    answering.push(open);
                }
                Ok(who) => self.failed.note(|| format!("{:?} has become {who:?}", open.who)),
                Err(error) => self.failed.note(|| format!("an idle connection of {:?}: {error}", open.who)),
            }
        }
        self.open = answering;
        counts
    }

    /// Closes two of three connections of one executor and one of three of the next, so that as many as fit there again
    /// are missing; how many are left on each.
    fn thin_out(&mut self, first: usize) -> Counts {
        let (mut seen, mut left) = (Counts::default(), Counts::default());
        self.open.retain(|open| {
            let executor = open.who.executor % EXECUTORS;
            seen[executor] += 1;
            let last_of_three = seen[executor] % 3 == 0;
            let stays = match (executor + EXECUTORS - first) % EXECUTORS {
                0 => last_of_three,
                1 => !last_of_three,
                _ => true,
            };
            left[executor] += usize::from(stays);
            stays
        });
        left
    }

    /// Has a panic escape on one executor, waits for its next generation and for the ends of all connections it had.
    async fn restart(&mut self, victim: usize) -> Result<(), String> {
        let (mut victims, others): (Vec<_>, Vec<_>) = self.open.drain(..).partition(|open| open.who.executor == victim);
        self.open = others;
        let trigger = victims.first_mut().ok_or_else(|| format!("executor {victim} has no connection"))?;
        let before = trigger.who.generation;
        let sent = trigger.client.send(client::get("/chaos/escape", false).as_bytes()).await;
        sent.map_err(|error| format!("ordering an escape: {error}"))?;
        // It may be answered before it ends.
        let _ = in_time(trigger.client.answer()).await;
        for mut open in victims {
            let ended = in_time(open.client.closed()).await;
            // A reset is an end, too.
            if let Err(error) = ended
                && matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::InvalidData)
            {
                self.hung.note(|| format!("{:?} after the escape: {error}", open.who));
            }
        }
        let deadline = Instant::now() + RESTART_MAX;
        while Instant::now() < deadline {
            let who = in_time(load::ask_whoami(self.server.address())).await;
            if who.is_ok_and(|who| who.executor == victim && who.generation > before) {
                return Ok(());
            }
            sleep(Duration::from_millis(5)).await;
        }
        Err(format!(
            "executor {victim} does not answer {RESTART_MAX:?} after an escape; log {}",
            self.server.log_path()
        ))
    }

    /// Closes all, and waits until the server has noticed.
    async fn leave(&mut self) -> Result<(), String> {
        self.open.clear();
        self.server.settled(SETTLE).await.map(drop)
    }
}

fn judge(crowd: &Crowd, ratios: &Ratios, verdicts: &mut Verdicts) {
    let (most, count) = (crowd.arguments.ratio, crowd.arguments.connections);
    let scenes = [
        (&ratios.opened, "opened at a pace"),
        (&ratios.evened_out, "after many of two executors were closed and half of all replaced"),
        (&ratios.restarted, "after an executor was restarted half-way"),
    ];
    let (middle, worst) = middle_and_worst(&ratios.filled_up);
    println!("  thinned out and filled up, not judged: {middle:.3} (median), {worst:.3} (worst)");
    for (ratios, scene) in scenes {
        let (middle, worst) = middle_and_worst(ratios);
        verdicts.check(
            worst <= most && !ratios.is_empty(),
            &format!("{count} idle connections, {scene}: most to fewest at most {most}"),
            format!("{middle:.3} (median), {worst:.3} (worst) of {}", ratios.len()),
        );
    }
    let failures = crowd.failed.show("failures");
    verdicts.check(crowd.failed.count() == 0, "no other connection is lost", format!("{failures} of {}", crowd.begun));
    verdicts.check(crowd.hung.count() == 0, "those of a restarted executor end", crowd.hung.show("that did not"));
    let late = crowd.lag.percentile(0.99);
    verdicts.check(late <= LAG_MAX, "the connections came at their pace", format!("lag {}", crowd.lag));
}

fn show(counts: Counts) -> String {
    format!("{counts:?}, {:.3}", ratio(counts))
}

fn ratio(counts: Counts) -> f64 {
    let [most, fewest] = [counts.iter().max(), counts.iter().min()].map(|count| count.copied().unwrap_or(0));
    most as f64 / fewest.max(1) as f64
}

fn middle_and_worst(figures: &[f64]) -> (f64, f64) {
    let mut sorted = figures.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    (sorted.get(sorted.len() / 2).copied().unwrap_or(0.0), sorted.last().copied().unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_executor_without_connections_is_no_division_by_zero() {
        assert!((ratio([250, 250, 200, 300]) - 1.5).abs() < 1e-9);
        assert!((ratio([500, 0, 250, 250]) - 500.0).abs() < 1e-9);
        assert!(ratio([0; EXECUTORS]).abs() < 1e-9);
    }
}
