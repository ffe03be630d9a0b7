//! One executor computes for seconds: who notices, and for how long. Beside it tokio with `SO_REUSEPORT`, which is the
//! same architecture without a supervisor.
//!
//! Which connections went to the stalled executor is judged from outside: those that it answered when it was done, and
//! those that waited for longer than any in the second half of the stall: somebody had to fetch them from its queue first.
//!
//! Both kinds of steering are run: eBPF looks at the heartbeats for each new connection, classic BPF sends them on until the
//! watchdog has taken the executor out, which is after the limit of a stall, 100 ms. A server steers by classic BPF where it
//! may not load eBPF, so for that run it is started without the capabilities that this takes.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use crate::client::{self, Client};
use crate::histogram::Histogram;
use crate::load::{self, Answered, Fresh, Kept, LAG_MAX, Over, Plan, middle_and_worst};
use crate::proc;
use crate::report::{Faults, Verdicts};
use crate::server::{Common, Server};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Stalls, one after another
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Milliseconds of a stall
    #[arg(long, value_name = "MS", default_value_t = 5000)]
    stall: u64,
    /// New connections a second meanwhile
    #[arg(long, default_value_t = 200.0)]
    rate: f64,
    /// Clients that keep their connections
    #[arg(long, default_value_t = 16)]
    keep_alive: usize,
    /// What steers: eBPF, classic BPF, or both, one after the other
    #[arg(long, value_enum, default_value = "both")]
    steering_program: Programs,
    /// Milliseconds after which no new connection goes to the stalled executor [default: 50 with eBPF, whose limit is 20; 150
    /// with classic BPF, since the watchdog's is 100]
    #[arg(long, value_name = "MS")]
    detection_limit: Option<u64>,
    /// Milliseconds in which a connection opened during the stall is answered
    #[arg(long, value_name = "MS", default_value_t = 250)]
    answer_limit: u64,
    /// Milliseconds of waiting from which a connection may be taken to have been in the stalled executor's queue. One that
    /// came in the first 20 ms waits for the rest of the limit of a stall; 20 to 30 ms are met without any stall
    #[arg(long, value_name = "MS", default_value_t = 50)]
    held: u64,
    /// Requests a second, on new connections, of the runs with two executors
    #[arg(long, default_value_t = 300.0)]
    tail_rate: f64,
    /// Seconds of each of them. The stall has five of them: in a longer run it would be thinned out
    #[arg(long, value_name = "SECONDS", default_value_t = 8)]
    tail_seconds: u64,
    /// Pairs of them, a calm one and one with a stall. What spoils a p99 is a hiccup of the machine, which meets many
    /// requests of one run, so runs count, not requests: the differences of six pairs have the true one between their least
    /// and most with 97 %, of three with 75 %
    #[arg(long, default_value_t = 6)]
    tail_pairs: usize,
    /// The rival; not run when it is not there
    #[arg(long, value_name = "PATH", default_value = "target/release/peer-tokio")]
    rival: PathBuf,
}

/// What steers a server's new connections.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Programs {
    Both,
    Extended,
    Classic,
}

/// One of them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Program {
    Extended,
    Classic,
}

/// Takes from the server what loading eBPF takes.
const WITHOUT_EBPF: &[&str] = &["setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin"];

/// Pairs of the rival, which nothing is judged by: it waits for seconds.
const RIVAL_PAIRS: usize = 2;
/// The p99 with a stall may be above the calm one by this.
const TAIL_MORE: Duration = Duration::from_millis(20);
/// A stalled executor is back in this time after its stall.
const BACK_MAX: Duration = Duration::from_secs(2);
const VICTIM: usize = 0;

/// One stall, as its clients saw it.
struct Stall {
    /// From the begin of the stall to the intended begin of the last connection that went to the stalled executor.
    last_gone: Duration,
    /// From the begin of the stall to the answer, by others, of one in the middle of those that waited long.
    fetched: Option<Duration>,
    /// Connections that went there.
    gone: usize,
    waits: Histogram,
    opened: usize,
    failed: Faults,
    /// From the end of the stall to the first new connection that the executor answered again.
    back: Option<Duration>,
    lag: Histogram,
}

impl Stall {
    /// When the last connection went there, at the latest. With classic BPF that goes on until the watchdog takes the
    /// executor out; those that came just before have waited too little to be told by that from others.
    fn last(&self, program: Program) -> Duration {
        match program {
            Program::Extended => self.last_gone,
            Program::Classic => self.last_gone.max(self.fetched.unwrap_or_default()),
        }
    }
}

impl Programs {
    fn each(self) -> &'static [Program] {
        match self {
            Self::Both => &[Program::Extended, Program::Classic],
            Self::Extended => &[Program::Extended],
            Self::Classic => &[Program::Classic],
        }
    }
}

impl Program {
    /// As the server calls it.
    fn name(self) -> &'static str {
        match self {
            Self::Extended => "eBPF",
            Self::Classic => "classic BPF",
        }
    }

    /// Whether it is what steers. A reason why not may follow, which names the other kind.
    fn is_in(self, steering: &str) -> bool {
        steering.contains(&format!(", by {}", self.name()))
    }

    /// Milliseconds from the begin of a stall to the last connection that goes there.
    fn detection_limit(self) -> u64 {
        match self {
            Self::Extended => 50,
            Self::Classic => 150,
        }
    }

    /// A server that is steered so, or the reason why there is none.
    fn start(self, common: &Common, port: u16, arguments: &[&str]) -> Result<Result<Server, String>, String> {
        // Who cannot give capabilities up has none of these in the first place, as a rule.
        let drops = self == Self::Classic && proc::may_drop_capabilities();
        let server = common.start_by(if drops { WITHOUT_EBPF } else { &[] }, port, arguments)?;
        println!("server: {}, process {}, log {}", server.command, server.pid(), server.log_path());
        let steering = server.steering();
        println!("  steering: {steering}");
        Ok(if self.is_in(&steering) { Ok(server) } else { Err(steering) })
    }
}

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let mut verdicts = Verdicts::default();
    for program in arguments.steering_program.each() {
        if arguments.runs > 0 {
            stalls(arguments, *program, &mut verdicts).await?;
        }
    }
    if arguments.tail_pairs > 0 {
        for program in arguments.steering_program.each() {
            tails(arguments, *program, &mut verdicts).await?;
        }
        beside(arguments, &mut verdicts).await?;
    }
    Ok(verdicts)
}

async fn stalls(arguments: &Arguments, program: Program, verdicts: &mut Verdicts) -> Result<(), String> {
    let cpus = arguments.common.cpus_or("0,1");
    let server =
        program.start(&arguments.common, arguments.common.port, &["--executors", "4", "--cpus", &cpus, "--chaos"])?;
    let server = match server {
        Ok(server) => server,
        Err(reason) => {
            verdicts.skip(&format!("{}: stalls", program.name()), &reason);
            return Ok(());
        }
    };
    println!(
        "{} stalls of {} ms; {} new connections a second and {} kept ones meanwhile",
        arguments.runs, arguments.stall, arguments.rate, arguments.keep_alive
    );
    let over = Over::default();
    let (kept, clients) = load::keep(server.address(), arguments.keep_alive, &over);
    let mut seen = Vec::new();
    for number in 1..=arguments.runs {
        let stall = stall(arguments, &server).await?;
        println!(
            "  stall {number}: {} of {} connections went there, the last after {:.1?}; answers {}",
            stall.gone,
            stall.opened,
            stall.last(program),
            stall.waits
        );
        seen.push(stall);
    }
    over.set();
    load::all(clients).await?;
    judge(arguments, program, seen, &kept.borrow(), verdicts);
    server.log_lines(&["stall", "recover"], 4).iter().for_each(|line| println!("  log: {line}"));
    let (status, time) = server.stop()?;
    let criterion = format!("{}: the server stops in order", program.name());
    verdicts.check(status.success(), &criterion, format!("{status} after {time:.2?}"));
    Ok(())
}

async fn stall(arguments: &Arguments, server: &Server) -> Result<Stall, String> {
    let (mut trigger, _) = load::reach(server.address(), VICTIM).await?;
    let length = Duration::from_millis(arguments.stall);
    let over = Over::default();
    let rate = arguments.rate;
    let fresh = Plan::whoami(server.address()).run(move |_| rate, &over);
    sleep(Duration::from_millis(500)).await;
    let began = spin(&mut trigger, arguments.stall).await?;
    let done = timeout(length + load::ANSWER_MAX, trigger.answer()).await;
    let ended = Instant::now();
    done.map_err(|_| "the stalled request is not answered".to_owned())?
        .map_err(|error| format!("the stalled request: {error}"))?;
    sleep(BACK_MAX).await;
    over.set();
    let fresh = fresh.await.map_err(|error| error.to_string())?;
    Ok(sort_out(arguments, fresh, began, ended))
}

/// Orders a stall, and says when.
async fn spin(client: &mut Client, milliseconds: u64) -> Result<Instant, String> {
    let order = client::get(&format!("/chaos/spin?ms={milliseconds}"), false);
    client.send(order.as_bytes()).await.map_err(|error| format!("ordering a stall: {error}"))?;
    Ok(Instant::now())
}

fn sort_out(arguments: &Arguments, fresh: Fresh, began: Instant, ended: Instant) -> Stall {
    // It has ended for the executor before the client hears of it, but not before this.
    let end = began + Duration::from_millis(arguments.stall);
    let opened: Vec<&Answered> =
        fresh.answered.iter().filter(|answered| (began..end).contains(&answered.meant)).collect();
    // Once a stall is known, nobody should wait for it any more: how long others wait then is the machine's doing.
    let late = opened.iter().filter(|answered| answered.meant > began + (end - began) / 2);
    let usual = late.map(|answered| answered.wait()).max().unwrap_or_default();
    let held = usual.max(Duration::from_millis(arguments.held));
    let at_victim = |answered: &Answered| answered.who.is_some_and(|who| who.executor == VICTIM);
    // Who began late, after the end, may well be there.
    let stuck = |answered: &Answered| at_victim(answered) && answered.begun < end;
    let went = |answered: &&&Answered| stuck(answered) || answered.wait() > held;
    let gone: Vec<_> = opened.iter().filter(went).collect();
    let mut waits = Histogram::default();
    opened.iter().for_each(|answered| waits.record(answered.wait()));
    let after = fresh.answered.iter().filter(|answered| answered.meant > ended && at_victim(answered));
    let elsewhere = gone.iter().filter(|answered| !at_victim(answered)).map(|answered| answered.at - began);
    let mut fetched: Vec<Duration> = elsewhere.collect();
    fetched.sort_unstable();
    Stall {
        fetched: fetched.get(fetched.len() / 2).copied(),
        last_gone: gone.iter().map(|answered| answered.meant - began).max().unwrap_or_default(),
        gone: gone.len(),
        waits,
        opened: opened.len(),
        back: after.map(|answered| answered.at - ended).min(),
        failed: fresh.failed,
        lag: fresh.lag,
    }
}

fn judge(arguments: &Arguments, program: Program, stalls: Vec<Stall>, kept: &Kept, verdicts: &mut Verdicts) {
    let name = program.name();
    let mut failed = Faults::default();
    let (mut waits, mut lag, mut opened) = (Histogram::default(), Histogram::default(), 0);
    let (mut fetches, mut lasts, mut backs, mut never_back) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for stall in stalls {
        lasts.push(stall.last(program));
        fetches.extend(stall.fetched);
        waits.add(&stall.waits);
        lag.add(&stall.lag);
        opened += stall.opened;
        failed.add(stall.failed);
        match stall.back {
            Some(back) => backs.push(back),
            None => never_back += 1,
        }
    }
    println!("  kept connections: {}", kept.describe());
    let (middle, worst) = middle_and_worst(fetches);
    println!("  what waited was answered elsewhere {middle:.1?} after the begin (median), {worst:.1?} (worst)");
    let (middle, worst) = middle_and_worst(lasts);
    let limit = arguments.detection_limit.unwrap_or(program.detection_limit());
    verdicts.check(
        worst <= Duration::from_millis(limit),
        &format!("{name}: no connection goes to a stalled executor after {limit} ms"),
        format!("the last one went there after {middle:.1?} (median), {worst:.1?} (worst)"),
    );
    let limit = Duration::from_millis(arguments.answer_limit);
    verdicts.check(
        waits.over(limit) == 0 && opened > 0,
        &format!("{name}: each connection opened during a stall is answered in {limit:?}"),
        format!("{} of {opened} were not; {waits}", waits.over(limit)),
    );
    let criterion = format!("{name}: no new connection fails");
    verdicts.check(failed.count() == 0, &criterion, failed.show("failures"));
    let criterion = format!("{name}: no kept connection fails");
    verdicts.check(kept.failed.count() == 0, &criterion, kept.failed.show("failures"));
    let (middle, worst) = middle_and_worst(backs);
    verdicts.check(
        never_back == 0,
        &format!("{name}: an executor that has recovered gets new connections again within {BACK_MAX:?}"),
        format!("after {middle:.1?} (median), {worst:.1?} (worst); {never_back} times not at all"),
    );
    let kept_up = lag.percentile(0.99) <= LAG_MAX;
    verdicts.check(kept_up, &format!("{name}: the load kept its schedule"), format!("lag {lag}"));
}

/// Two executors, calm and with a stall.
async fn tails(arguments: &Arguments, program: Program, verdicts: &mut Verdicts) -> Result<(), String> {
    let (port, cpus) = (arguments.common.port + 1, arguments.tail_cpus());
    let server = match program.start(&arguments.common, port, &["--executors", "2", "--cpus", &cpus, "--chaos"])? {
        Ok(server) => server,
        Err(reason) => {
            verdicts.skip(&format!("{}: the tail with two executors", program.name()), &reason);
            return Ok(());
        }
    };
    println!("{} requests a second, on new connections", arguments.tail_rate);
    let tails = Tails::measure(arguments, &server, arguments.tail_pairs).await?;
    server.stop()?;
    tails.judge(program, verdicts);
    Ok(())
}

/// The rival in the same way.
async fn beside(arguments: &Arguments, verdicts: &mut Verdicts) -> Result<(), String> {
    if !arguments.rival.exists() {
        verdicts.skip("the rival in the same scenario", &format!("{} is not there", arguments.rival.display()));
        return Ok(());
    }
    let (port, cpus) = (arguments.common.port + 2, arguments.tail_cpus());
    let mut command = Command::new(&arguments.rival);
    command.args(["--listen", &format!("127.0.0.1:{port}"), "--executors", "2", "--cpus", &cpus, "--chaos"]);
    let rival = Server::start(command, port, &arguments.common.scratch.join("ringleader-proofs-rival.log"))?;
    println!("beside it: {}", rival.command);
    let tails = Tails::measure(arguments, &rival, arguments.tail_pairs.min(RIVAL_PAIRS)).await?;
    println!("  p99 of the rival: {}", tails.describe());
    Ok(())
}

impl Arguments {
    /// Not the client's: whose CPU is computed on cannot keep a schedule.
    fn tail_cpus(&self) -> String {
        self.common.cpus_or("0")
    }
}

/// Runs in pairs, a calm one and one with a stall.
struct Tails {
    calm: Histogram,
    stalled: Histogram,
    /// Each pair's p99: calm, and with a stall.
    pairs: Vec<[Duration; 2]>,
    /// Everything was answered, and asked in time.
    whole: bool,
}

impl Tails {
    async fn measure(arguments: &Arguments, server: &Server, count: usize) -> Result<Self, String> {
        let mut tails =
            Self { calm: Histogram::default(), stalled: Histogram::default(), pairs: Vec::new(), whole: true };
        for number in 0..count {
            let mut pair = [Duration::ZERO; 2];
            // A B B A, so that a drift of the machine meets both alike.
            let order = if number % 2 == 0 { [false, true] } else { [true, false] };
            for stalls in order {
                let fresh = tail(arguments, server, stalls).await?;
                println!("  {}: {}; {}", if stalls { "stalled" } else { "calm" }, fresh.waits(), fresh.describe());
                tails.whole &= fresh.is_whole() && fresh.is_honest();
                fresh.failed.show("failures");
                pair[usize::from(stalls)] = fresh.waits().percentile(0.99);
                (if stalls { &mut tails.stalled } else { &mut tails.calm }).add(&fresh.waits());
            }
            tails.pairs.push(pair);
        }
        Ok(tails)
    }

    /// By how many milliseconds each pair's p99 is higher with a stall, the least first.
    fn differences(&self) -> Vec<f64> {
        let difference = |[calm, stalled]: &[Duration; 2]| (stalled.as_secs_f64() - calm.as_secs_f64()) * 1e3;
        let mut differences: Vec<f64> = self.pairs.iter().map(difference).collect();
        differences.sort_unstable_by(f64::total_cmp);
        differences
    }

    fn describe(&self) -> String {
        let (calm, stalled, differences) = (&self.calm, &self.stalled, self.differences());
        let [least, middle, most] = [0, differences.len() / 2, differences.len().saturating_sub(1)]
            .map(|index| differences.get(index).copied().unwrap_or_default());
        format!(
            "{middle:+.1} ms (median of {} pairs, {least:+.1} to {most:+.1}); all calm runs {calm}; all with a stall {stalled}",
            differences.len()
        )
    }

    fn judge(&self, program: Program, verdicts: &mut Verdicts) {
        let differences = self.differences();
        let middle = differences.get(differences.len() / 2).copied().unwrap_or(f64::MAX);
        verdicts.check(
            middle <= TAIL_MORE.as_secs_f64() * 1e3,
            &format!(
                "{}: with one of two executors stalled, p99 is below the calm run's + {TAIL_MORE:?}",
                program.name()
            ),
            self.describe(),
        );
        let criterion = format!("{}: every request of these runs is asked in time and answered", program.name());
        verdicts.check(self.whole, &criterion, if self.whole { "all" } else { "not all" });
    }
}

async fn tail(arguments: &Arguments, server: &Server, stalls: bool) -> Result<Fresh, String> {
    let over = Over::default();
    let rate = arguments.tail_rate;
    let plan = Plan { server: server.address(), path: "/".to_owned() };
    let fresh = plan.run(move |_| rate, &over);
    let end = Instant::now() + Duration::from_secs(arguments.tail_seconds);
    sleep(Duration::from_secs(1)).await;
    if stalls {
        let mut trigger =
            Client::connect(server.address()).await.map_err(|error| format!("connecting the trigger: {error}"))?;
        spin(&mut trigger, arguments.stall).await?;
        let answered = timeout(Duration::from_millis(arguments.stall) + load::ANSWER_MAX, trigger.answer()).await;
        let answer = answered.map_err(|_| "the stalled request is not answered".to_owned())?;
        let status = answer.map_err(|error| format!("the stalled request: {error}"))?.status;
        if status != 200 {
            return Err(format!("{} answers /chaos/spin with {status}", server.command));
        }
    }
    sleep(end.saturating_duration_since(Instant::now())).await;
    over.set();
    fresh.await.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::client::Whoami;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    /// By milliseconds since the begin of a stall of five seconds: meant to begin, begun, answered; by whom.
    fn connection(began: Instant, [meant, begun, at]: [u64; 3], executor: usize) -> Answered {
        let after = |milliseconds| began + Duration::from_millis(milliseconds);
        let who = Some(Whoami { executor, generation: 1, pid: 1 });
        Answered { meant: after(meant), begun: after(begun), at: after(at), who }
    }

    fn sorted(connections: &[([u64; 3], usize)]) -> Stall {
        let (arguments, began) = (Line::parse_from(["proof"]).arguments, Instant::now());
        let answered = connections.iter().map(|(times, executor)| connection(began, *times, *executor)).collect();
        let fresh = Fresh { answered, ..Fresh::default() };
        sort_out(&arguments, fresh, began, began + Duration::from_millis(5040))
    }

    #[test]
    fn who_waited_for_the_stalled_executor_or_for_others_to_fetch_it_went_there() {
        let stall =
            sorted(&[([10, 10, 5001], VICTIM), ([30, 30, 120], 1), ([300, 300, 305], 2), ([4000, 4000, 4020], 3)]);
        assert_eq!((stall.gone, stall.opened), (2, 4));
        assert_eq!(stall.last_gone, Duration::from_millis(30));
        assert_eq!(stall.last(Program::Extended), Duration::from_millis(30));
        assert_eq!(stall.last(Program::Classic), Duration::from_millis(120));
    }

    #[test]
    fn who_began_after_the_end_of_a_stall_did_not_go_to_a_stalled_executor() {
        // Meant before the end and begun after it; meant after the end, and before the client heard of it.
        let stall = sorted(&[([4000, 4000, 4010], 1), ([4990, 5005, 5006], VICTIM), ([5020, 5020, 5021], VICTIM)]);
        assert_eq!((stall.gone, stall.opened), (0, 2));
    }

    #[test]
    fn what_steers_is_told_from_the_reason_why_something_else_does_not() {
        let without = "random, by classic BPF, because the kernel lets this process load no eBPF program";
        assert!(Program::Classic.is_in(without) && !Program::Extended.is_in(without));
        assert!(Program::Extended.is_in("random, by eBPF") && !Program::Classic.is_in("random, by eBPF"));
    }

    #[test]
    fn one_spoilt_pair_in_six_spoils_no_verdict() {
        let milliseconds = Duration::from_millis;
        let mut pairs = vec![[milliseconds(5), milliseconds(6)]; 5];
        pairs.push([milliseconds(5), milliseconds(900)]);
        let mut tails = Tails { calm: Histogram::default(), stalled: Histogram::default(), pairs, whole: true };
        let is_met = |tails: &Tails| {
            let mut verdicts = Verdicts::default();
            tails.judge(Program::Extended, &mut verdicts);
            verdicts.conclude()
        };
        assert!(is_met(&tails));
        tails.pairs.iter_mut().for_each(|[calm, stalled]| *stalled = *calm + milliseconds(30));
        assert!(!is_met(&tails));
    }
}
