//! One executor computes for seconds: who notices, and for how long. Beside it tokio with `SO_REUSEPORT`, which is the
//! same architecture without a supervisor.
//!
//! Which connections went to the stalled executor is judged from outside: those that it answered when it was done, and
//! those that waited for longer than any in the second half of the stall: somebody had to fetch them from its queue first.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use crate::client::{self, Client};
use crate::histogram::Histogram;
use crate::load::{self, Answered, Fresh, Kept, Over, Plan, middle_and_worst};
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
    /// Milliseconds after which no new connection goes to the stalled executor
    #[arg(long, value_name = "MS", default_value_t = 150)]
    detection_limit: u64,
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
    /// Seconds of each of them
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    tail_seconds: u64,
    /// Pairs of them, a calm one and one with a stall
    #[arg(long, default_value_t = 3)]
    tail_pairs: usize,
    /// The rival; not run when it is not there
    #[arg(long, value_name = "PATH", default_value = "target/release/peer-tokio")]
    rival: PathBuf,
}

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

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let mut verdicts = Verdicts::default();
    if arguments.runs > 0 {
        stalls(arguments, &mut verdicts).await?;
    }
    tails(arguments, &mut verdicts).await?;
    Ok(verdicts)
}

async fn stalls(arguments: &Arguments, verdicts: &mut Verdicts) -> Result<(), String> {
    let cpus = arguments.common.cpus_or("0,1");
    let server = arguments.common.start(arguments.common.port, &["--executors", "4", "--cpus", &cpus, "--chaos"])?;
    println!("server: {}, process {}, log {}", server.command, server.pid(), server.log_path());
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
            stall.gone, stall.opened, stall.last_gone, stall.waits
        );
        seen.push(stall);
    }
    over.set();
    load::all(clients).await?;
    judge(arguments, seen, &kept.borrow(), verdicts);
    server.log_lines(&["stall", "recover"], 4).iter().for_each(|line| println!("  log: {line}"));
    let (status, time) = server.stop()?;
    verdicts.check(status.success(), "the server stops in order", format!("{status} after {time:.2?}"));
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
    let opened: Vec<&Answered> =
        fresh.answered.iter().filter(|answered| (began..ended).contains(&answered.meant)).collect();
    // Once a stall is known, nobody should wait for it any more: how long others wait then is the machine's doing.
    let late = opened.iter().filter(|answered| answered.meant > began + (ended - began) / 2);
    let usual = late.map(|answered| answered.wait()).max().unwrap_or_default();
    let held = usual.max(Duration::from_millis(arguments.held));
    let at_victim = |answered: &Answered| answered.who.is_some_and(|who| who.executor == VICTIM);
    let went = |answered: &&&Answered| at_victim(answered) || answered.wait() > held;
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

fn judge(arguments: &Arguments, stalls: Vec<Stall>, kept: &Kept, verdicts: &mut Verdicts) {
    let mut failed = Faults::default();
    let (mut waits, mut lag, mut opened) = (Histogram::default(), Histogram::default(), 0);
    let (mut fetches, mut lasts, mut backs, mut never_back) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for stall in stalls {
        lasts.push(stall.last_gone);
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
    println!("  generator's lag: {lag}");
    println!("  kept connections: {}", kept.describe());
    let (middle, worst) = middle_and_worst(fetches);
    println!("  what waited was answered elsewhere {middle:.1?} after the begin (median), {worst:.1?} (worst)");
    let (middle, worst) = middle_and_worst(lasts);
    verdicts.check(
        worst <= Duration::from_millis(arguments.detection_limit),
        &format!("no connection goes to a stalled executor after {} ms", arguments.detection_limit),
        format!("the last one went there after {middle:.1?} (median), {worst:.1?} (worst)"),
    );
    let limit = Duration::from_millis(arguments.answer_limit);
    verdicts.check(
        waits.over(limit) == 0 && opened > 0,
        &format!("each connection opened during a stall is answered in {limit:?}"),
        format!("{} of {opened} were not; {waits}", waits.over(limit)),
    );
    verdicts.check(failed.count() == 0, "no new connection fails", failed.show("failures"));
    verdicts.check(kept.failed.count() == 0, "no kept connection fails", kept.failed.show("failures"));
    let (middle, worst) = middle_and_worst(backs);
    verdicts.check(
        never_back == 0,
        &format!("an executor that has recovered gets new connections again within {BACK_MAX:?}"),
        format!("after {middle:.1?} (median), {worst:.1?} (worst); {never_back} times not at all"),
    );
}

/// Two executors, calm and with a stall, and the rival in the same way.
async fn tails(arguments: &Arguments, verdicts: &mut Verdicts) -> Result<(), String> {
    if arguments.tail_pairs == 0 {
        return Ok(());
    }
    // Not the client's: whose CPU is computed on cannot keep a schedule.
    let cpus = arguments.common.cpus_or("0");
    let port = arguments.common.port + 1;
    let server = arguments.common.start(port, &["--executors", "2", "--cpus", &cpus, "--chaos"])?;
    println!("server: {}; {} requests a second, on new connections", server.command, arguments.tail_rate);
    let (calm, stalled, whole) = pairs(arguments, &server).await?;
    server.stop()?;
    let (calm_p99, p99) = (calm.percentile(0.99), stalled.percentile(0.99));
    verdicts.check(
        p99 <= calm_p99 + TAIL_MORE,
        &format!("with one of two executors stalled, p99 is below the calm run's + {TAIL_MORE:?}"),
        format!("{p99:.2?} against {calm_p99:.2?}; calm {calm}; stalled {stalled}"),
    );
    verdicts.check(whole, "every request of these runs is answered", if whole { "all" } else { "not all" });
    if !arguments.rival.exists() {
        verdicts.skip("the rival in the same scenario", &format!("{} is not there", arguments.rival.display()));
        return Ok(());
    }
    let mut command = Command::new(&arguments.rival);
    command.args(["--listen", &format!("127.0.0.1:{}", port + 1), "--executors", "2", "--cpus", &cpus, "--chaos"]);
    let rival = Server::start(command, port + 1, &arguments.common.scratch.join("ringleader-proofs-rival.log"))?;
    let (calm, stalled, _) = pairs(arguments, &rival).await?;
    println!("  beside it, {}: calm {calm}; stalled {stalled}", rival.command);
    println!("  p99 with a stall: {p99:.2?} here, {:.2?} there", stalled.percentile(0.99));
    Ok(())
}

/// The waits of all calm runs, of all with a stall, and whether everything was answered by a generator in time.
async fn pairs(arguments: &Arguments, server: &Server) -> Result<(Histogram, Histogram, bool), String> {
    let mut waits = [Histogram::default(), Histogram::default()];
    let mut whole = true;
    for number in 0..arguments.tail_pairs {
        // A B B A, so that a drift of the machine meets both alike.
        let order = if number % 2 == 0 { [false, true] } else { [true, false] };
        for stalls in order {
            let fresh = tail(arguments, server, stalls).await?;
            println!("  {}: {}; {}", if stalls { "stalled" } else { "calm" }, fresh.waits(), fresh.describe());
            whole &= fresh.is_whole() && fresh.is_honest();
            fresh.failed.show("failures");
            waits[usize::from(stalls)].add(&fresh.waits());
        }
    }
    let [calm, stalled] = waits;
    Ok((calm, stalled, whole))
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
