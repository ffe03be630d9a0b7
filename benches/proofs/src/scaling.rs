//! More and fewer executors while clients come and go: by order, through the handle of a small server of ours
//! ([`crate::serve`]), and by load, with `ringleader serve --executors 2..8`.
//!
//! The load of the ramp is made of requests that block their executor without using a CPU (`/chaos/block`): that is busy
//! time by the clock, so eight executors can be busy on two CPUs.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::load::{self, Answered, Over, Plan, middle_and_worst};
use crate::network::{self, Counters};
use crate::random::Random;
use crate::report::{Progress, Verdicts};
use crate::server::{Common, Server};

/// Executors that orders go up to.
pub const MOST: usize = 8;
/// After this an order has been carried out.
const SETTLE: Duration = Duration::from_secs(2);
const ORDER_MAX: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub struct Orders {
    #[command(flatten)]
    pub common: Common,
    /// Orders, each accepted before the next
    #[arg(long, default_value_t = 1000)]
    runs: usize,
    /// New connections a second meanwhile
    #[arg(long, default_value_t = 1000.0)]
    rate: f64,
    /// Clients that keep their connections
    #[arg(long, default_value_t = 32)]
    keep_alive: usize,
    /// Milliseconds between two orders; executors start and drain meanwhile
    #[arg(long, value_name = "MS", default_value_t = 50)]
    pace: u64,
    /// Of the random counts
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

pub async fn orders(arguments: &Orders) -> Result<Verdicts, String> {
    let mut verdicts = Verdicts::default();
    let alone = network::enter();
    let common = &arguments.common;
    let control = common.port + 1;
    let itself = std::env::current_exe().map_err(|error| format!("finding this program: {error}"))?;
    let mut command = Command::new(itself);
    command.args(["serve", "--listen", &format!("127.0.0.1:{}", common.port), "--executors", &MOST.to_string()]);
    command.args(["--cpus", &common.cpus_or("0,1"), "--control", &control.to_string()]);
    let server = Server::start(command, common.port, &common.scratch.join("ringleader-proofs-orders.log"))?;
    println!("server: {}, process {}, log {}", server.command, server.pid(), server.log_path());
    println!("{} orders of 1 to {MOST} executors, seed {}", arguments.runs, arguments.seed);
    let before = Counters::read();
    let over = Over::default();
    let rate = arguments.rate;
    let fresh = Plan::whoami(server.address()).run(move |_| rate, &over);
    let (kept, clients) = load::keep(server.address(), arguments.keep_alive, &over);
    sleep(Duration::from_millis(500)).await;
    let given = give_orders(arguments, control).await;
    over.set();
    let fresh = fresh.await.map_err(|error| error.to_string())?;
    load::all(clients).await?;
    let counters = Counters::read().since(&before);
    let kept = kept.take();
    println!("  new connections: {}; {}", fresh.waits(), fresh.describe());
    println!("  kept connections: {}", kept.describe());
    println!("  {counters:?}");
    let (times, refused) = given?;
    let (done, (middle, worst)) = (times.len(), middle_and_worst(times));
    verdicts.check(
        done == arguments.runs,
        "every order is accepted",
        format!("{done} of {} {refused}; {middle:.1?} (median), {worst:.1?} (worst)", arguments.runs),
    );
    let failures = fresh.failed.show("failures");
    verdicts.check(fresh.is_whole(), "no new connection fails", format!("{failures} of {}", fresh.begun));
    let failures = kept.failed.show("failures");
    verdicts.check(kept.failed.count() == 0, "no kept request fails", format!("{failures} of {}", kept.asked));
    match alone {
        Ok(()) => {
            verdicts.check(counters.resets == 0, "nothing is reset", format!("{} RST", counters.resets));
            let syns = counters.syn_retransmits;
            verdicts.check(syns == 0, "no SYN is sent again", format!("{syns}, {} dropped", counters.listen_drops));
        }
        Err(reason) => verdicts.skip("no reset, no SYN sent again", &reason),
    }
    let lag = fresh.lag.percentile(0.99);
    verdicts.check(fresh.is_honest(), "the load kept its schedule", format!("lag p99 {lag:.2?}"));
    for count in [1, MOST] {
        let there = settles(&server, control, count).await?;
        verdicts.check(there == count, &format!("{count} ordered, {count} there"), format!("{there}"));
    }
    let (status, time) = server.stop()?;
    verdicts.check(status.success(), "the server stops in order", format!("{status} after {time:.2?}"));
    Ok(verdicts)
}

/// How long each order took, and the first that was refused.
async fn give_orders(arguments: &Orders, control: u16) -> Result<(Vec<Duration>, String), String> {
    let explain = |error: std::io::Error| format!("giving orders on port {control}: {error}");
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, control));
    let (answers, mut orders) = TcpStream::connect(address).await.map_err(explain)?.into_split();
    let mut answers = BufReader::new(answers).lines();
    let mut random = Random::new(arguments.seed);
    let mut progress = Progress::new();
    let (mut times, mut refused, mut last) = (Vec::new(), String::new(), MOST);
    for number in 1..=arguments.runs {
        let count = (last - 1 + random.between(1, MOST - 1)) % MOST + 1;
        last = count;
        let began = Instant::now();
        orders.write_all(format!("scale {count}\n").as_bytes()).await.map_err(explain)?;
        let answer = timeout(ORDER_MAX, answers.next_line()).await;
        let answer = answer.map_err(|_| format!("order {number}, to {count}: nothing after {ORDER_MAX:?}"))?;
        match answer.map_err(explain)?.as_deref() {
            Some("ok") => times.push(began.elapsed()),
            other if refused.is_empty() => refused = format!("(order {number}, to {count}: {other:?})"),
            _ => {}
        }
        sleep(Duration::from_millis(arguments.pace)).await;
        if !refused.is_empty() && times.is_empty() {
            break;
        }
        progress.say(|| format!("{number} orders"));
    }
    Ok((times, refused))
}

/// Whether the last orders were not only accepted: how many executors answer some time after one.
async fn settles(server: &Server, control: u16, count: usize) -> Result<usize, String> {
    let explain = |error: std::io::Error| format!("ordering {count} executors on port {control}: {error}");
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, control)).await.map_err(explain)?;
    stream.write_all(format!("scale {count}\n").as_bytes()).await.map_err(explain)?;
    sleep(SETTLE).await;
    let mut seen = HashSet::new();
    for _ in 0..PROBES as usize {
        let who = load::in_time(load::ask_whoami(server.address())).await;
        seen.insert(who.map_err(|error| format!("asking who is there: {error}"))?.executor);
    }
    Ok(seen.len())
}

#[derive(clap::Args)]
pub struct Ramp {
    #[command(flatten)]
    pub common: Common,
    /// Fewest executors
    #[arg(long, default_value_t = 2)]
    least: usize,
    /// Most executors
    #[arg(long, default_value_t = 8)]
    most: usize,
    /// Milliseconds that each request blocks its executor; a turn with many must stay below the limit of a stall
    #[arg(long, value_name = "MS", default_value_t = 5)]
    block: u64,
    /// Seconds from 10 to 90 % of the capacity of the most executors, and back
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    ramp: f64,
    /// Seconds before and between
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    hold: f64,
    /// Seconds after: by default one executor goes each 30 s at the most
    #[arg(long, value_name = "SECONDS", default_value_t = 210.0)]
    rest: f64,
    /// Clients that keep their connections; half of them come when the most executors are there, and most of those are
    /// taken away again
    #[arg(long, default_value_t = 32)]
    keep_alive: usize,
    /// Ramps up and down
    #[arg(long, default_value_t = 20)]
    runs: usize,
}

const LOW: f64 = 0.1;
/// When the second half of the kept connections comes.
const LATE: &str = "at the top";
const HIGH: f64 = 0.9;
/// New connections a second that look who is there.
const PROBES: f64 = 100.0;
/// Who has answered a probe in such a time counts as there.
const WINDOW: Duration = Duration::from_secs(1);

impl Ramp {
    /// The share of the capacity that is asked for at a time of one run.
    fn share(&self, at: Duration) -> f64 {
        let at = at.as_secs_f64() % self.run_time().as_secs_f64();
        let up = ((at - self.hold) / self.ramp).clamp(0.0, 1.0);
        let down = ((at - 2.0 * self.hold - self.ramp) / self.ramp).clamp(0.0, 1.0);
        LOW + (HIGH - LOW) * (up - down)
    }

    /// When the load has been at its highest for some time.
    fn top(&self) -> Duration {
        Duration::from_secs_f64(self.ramp + 1.5 * self.hold)
    }

    fn run_time(&self) -> Duration {
        Duration::from_secs_f64(2.0 * self.ramp + 2.0 * self.hold + self.rest)
    }
}

pub async fn ramp(arguments: &Ramp) -> Result<Verdicts, String> {
    let mut verdicts = Verdicts::default();
    let common = &arguments.common;
    let executors = format!("{}..{}", arguments.least, arguments.most);
    let server =
        common.start(common.port, &["--executors", &executors, "--cpus", &common.cpus_or("0,1"), "--chaos"])?;
    println!("server: {}, process {}, log {}", server.command, server.pid(), server.log_path());
    for number in 1..=arguments.runs {
        let shape = Ramp { common: common.clone(), ..*arguments };
        let over = Over::default();
        let path = format!("/chaos/block?ms={}", arguments.block);
        let capacity = arguments.most as f64 * 1000.0 / arguments.block as f64;
        let began = Instant::now();
        let load = Plan { server: server.address(), path }.run(move |at| shape.share(at) * capacity, &over);
        let probes = Plan::whoami(server.address()).run(|_| PROBES, &over);
        let early = load::keep(server.address(), arguments.keep_alive / 2, &over);
        sleep(arguments.top()).await;
        let late = load::keep(server.address(), arguments.keep_alive - arguments.keep_alive / 2, &over);
        sleep(arguments.run_time() - arguments.top()).await;
        over.set();
        let (load, probes) = (load.await, probes.await);
        let (load, probes) = (load.map_err(|error| error.to_string())?, probes.map_err(|error| error.to_string())?);
        let counts = counts(began, arguments.run_time(), &probes.answered);
        println!("  run {number}: executors in each second: {counts:?}");
        println!("  run {number}: load {}; {}", load.waits(), load.describe());
        judge(arguments, number, &counts, &mut verdicts);
        let failed = load.failed.count() + probes.failed.count();
        load.failed.show("failures");
        let figures = format!("{failed} of {}", load.begun + probes.begun);
        verdicts.check(failed == 0, &format!("run {number}: no new connection fails"), figures);
        for (whose, (kept, clients)) in [("before", early), (LATE, late)] {
            load::all(clients).await?;
            let kept = kept.take();
            println!("  run {number}: kept connections that came {whose}: {}", kept.describe());
            if whose == LATE {
                // Without that they show nothing: most of the executors they met have gone.
                let met = kept.announced + kept.closed_idle;
                let criterion = format!("run {number}: some kept connections lose their executor");
                verdicts.check(met > 0, &criterion, format!("{met} of {}", kept.connections));
            }
            let failures = kept.failed.show("failures");
            let criterion = format!("run {number}: no request of kept connections that came {whose} fails");
            verdicts.check(kept.failed.count() == 0, &criterion, format!("{failures} of {}", kept.asked));
        }
    }
    let (status, time) = server.stop()?;
    verdicts.check(status.success(), "the server stops in order", format!("{status} after {time:.2?}"));
    Ok(verdicts)
}

/// How many executors answered in each second.
fn counts(began: Instant, length: Duration, answered: &[Answered]) -> Vec<usize> {
    let seconds = length.as_secs() as usize;
    let mut seen = vec![HashSet::new(); seconds];
    for answer in answered {
        let second = (answer.at - began).as_nanos() / WINDOW.as_nanos();
        if let (Some(seen), Some(who)) = (seen.get_mut(second as usize), answer.who) {
            seen.insert(who.executor);
        }
    }
    seen.iter().map(HashSet::len).collect()
}

fn judge(arguments: &Ramp, number: usize, counts: &[usize], verdicts: &mut Verdicts) {
    let (ramp, hold) = (arguments.ramp as usize, arguments.hold as usize);
    let top = (ramp + 2 * hold).min(counts.len());
    let (up, down) = counts.split_at(top);
    let before = up.get(hold.saturating_sub(2)).copied().unwrap_or(0);
    let (most, last) = (up.last().copied().unwrap_or(0), down.last().copied().unwrap_or(0));
    verdicts.check(
        (before, most, last) == (arguments.least, arguments.most, arguments.least),
        &format!("run {number}: {} to {} to {} executors", arguments.least, arguments.most, arguments.least),
        format!("{before} to {most} to {last}"),
    );
    let changes = changes_of_direction(counts);
    let criterion = format!("run {number}: at most one change of direction in the whole");
    verdicts.check(changes <= 1, &criterion, format!("{changes}"));
}

fn changes_of_direction(counts: &[usize]) -> usize {
    let mut steps = counts.to_vec();
    steps.dedup();
    let rises: Vec<bool> = steps.windows(2).map(|pair| pair[1] > pair[0]).collect();
    rises.windows(2).filter(|pair| pair[0] != pair[1]).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_are_counted() {
        for (counts, changes) in
            [(&[2, 2, 3, 5, 8][..], 0), (&[2, 3, 2, 3], 2), (&[2, 8, 7, 7], 1), (&[], 0), (&[4], 0), (&[8, 8, 2], 0)]
        {
            assert_eq!(changes_of_direction(counts), changes, "{counts:?}");
        }
    }
}
