//! The soak: a million fresh connections (phase A), then minutes of mixed load with quiet times in between, in which
//! executors nap and park (phase B). A lost wake shows as a wait that no load explains.

mod acts;
mod fresh;
mod mixed;
mod watch;

use std::time::Duration;

use crate::histogram::Histogram;
use crate::random;
use crate::report::{Faults, Verdicts, bytes};
use crate::server::{Common, Server};

/// A wait this long is a lost wake, whatever the load.
const LOST_WAKE: Duration = Duration::from_secs(5);
/// A server guards itself against lost wakes with timers of some hundred milliseconds: waits in that order, while the
/// machine has time, are wakes that were lost and found again. Counted, not judged.
const SUSPICIOUS: Duration = Duration::from_millis(200);
const WORKLOAD_BODY: usize = 512 * 1024;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Fresh connections of phase A; 0 leaves it out
    #[arg(long, default_value_t = 1_000_000)]
    connections: u64,
    /// Minutes of phase B; 0 leaves it out
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Connections at once in phase A
    #[arg(long, default_value_t = 64)]
    concurrency: usize,
    /// Clients of phase B
    #[arg(long, default_value_t = 200)]
    clients: usize,
    /// Executors of the server
    #[arg(long, default_value_t = 2)]
    executors: usize,
    /// Seed of phase B; printed when not given
    #[arg(long)]
    seed: Option<u64>,
    /// MiB that memory may grow by between the first and the last tenth
    #[arg(long, default_value_t = 8.0)]
    rss_tolerance: f64,
}

/// What the clients of a phase saw.
#[derive(Default)]
struct Seen {
    connects: Histogram,
    waits: Histogram,
    /// Waits in times when almost nobody else asked.
    waits_quiet: Histogram,
    /// Bodies of up to 512 KiB, there and back.
    echoes: Histogram,
    /// How late the client itself was, looking every 10 ms.
    lag: Histogram,
    /// Waits that are long and not lost.
    suspicious: Faults,
    wrong: Faults,
    unanswered: Faults,
    acts: Vec<(&'static str, u64)>,
}

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let seed = arguments.seed.unwrap_or_else(random::seed);
    let executors = arguments.executors.to_string();
    let cpus = arguments.common.cpus_or("0");
    let server =
        arguments.common.start(arguments.common.port, &["--executors", &executors, "--cpus", &cpus, "--chaos"])?;
    println!("server: {}, process {}, log {}", server.command, server.pid(), server.log_path());
    let mut verdicts = Verdicts::default();
    if arguments.connections > 0 {
        phase_a(arguments, &server, &mut verdicts).await?;
    }
    if arguments.minutes > 0.0 {
        phase_b(arguments, &server, seed, &mut verdicts).await?;
    }
    verdicts.check(server.log_errors() == 0, "no error in the server's log", format!("{} lines", server.log_errors()));
    let (status, time) = server.stop()?;
    verdicts.check(status.success(), "the server stops in order", format!("{status} after {time:.2?}"));
    Ok(verdicts)
}

async fn phase_a(arguments: &Arguments, server: &Server, verdicts: &mut Verdicts) -> Result<(), String> {
    let before = fresh::warm_up(server).await?;
    println!("phase A: {} fresh connections, {} at once", arguments.connections, arguments.concurrency);
    let (seen, series, time) = fresh::run(server, arguments.connections, arguments.concurrency).await?;
    let rate = seen.waits.count() as f64 / time.as_secs_f64();
    println!("phase A: {:.0} s, {rate:.0} connections/s", time.as_secs_f64());
    println!("  connect: {}", seen.connects);
    println!("  answer:  {}; {} over {SUSPICIOUS:?}", seen.waits, seen.waits.over(SUSPICIOUS));
    let answered = seen.waits.count() == arguments.connections;
    verdicts.check(
        answered && seen.unanswered.count() == 0,
        "A: every connection is answered",
        format!("{} of {}, {}", seen.waits.count(), arguments.connections, seen.unanswered.show("unanswered")),
    );
    judge_answers(&seen, "A", verdicts);
    let after = server.settled(Duration::from_secs(10)).await?;
    watch::judge_rest(&before, &after, "A", verdicts);
    watch::judge_series(&series, arguments.rss_tolerance, "A", verdicts);
    Ok(())
}

async fn phase_b(arguments: &Arguments, server: &Server, seed: u64, verdicts: &mut Verdicts) -> Result<(), String> {
    let before = fresh::warm_up(server).await?;
    println!(
        "phase B: {} minutes, {} clients, bodies up to {}; --seed {seed}",
        arguments.minutes,
        arguments.clients,
        bytes(WORKLOAD_BODY as f64)
    );
    let time = Duration::from_secs_f64(arguments.minutes * 60.0);
    let (seen, series) = mixed::run(server, arguments.clients, time, seed).await?;
    for (act, count) in &seen.acts {
        println!("  {count:>9} {act}");
    }
    println!("  connect: {}", seen.connects);
    println!("  answer:  {}; {} over {SUSPICIOUS:?}", seen.waits, seen.waits.over(SUSPICIOUS));
    println!("  in quiet times: {}; {} over {SUSPICIOUS:?}", seen.waits_quiet, seen.waits_quiet.over(SUSPICIOUS));
    println!("  echoes:  {}", seen.echoes);
    println!("  {}", seen.suspicious.show("long waits"));
    verdicts.check(seen.unanswered.count() == 0, "B: every request is answered", seen.unanswered.show("unanswered"));
    judge_answers(&seen, "B", verdicts);
    let after = server.settled(Duration::from_secs(15)).await?;
    watch::judge_rest(&before, &after, "B", verdicts);
    watch::judge_series(&series, arguments.rss_tolerance, "B", verdicts);
    Ok(())
}

fn judge_answers(seen: &Seen, phase: &str, verdicts: &mut Verdicts) {
    println!("  the client's own lag: {}", seen.lag);
    verdicts.check(seen.wrong.count() == 0, &format!("{phase}: every answer is right"), seen.wrong.show("wrong"));
    let worst = [&seen.connects, &seen.waits, &seen.waits_quiet, &seen.echoes]
        .map(Histogram::longest)
        .into_iter()
        .max()
        .unwrap_or_default();
    verdicts.check(
        worst < LOST_WAKE,
        &format!("{phase}: no wake is lost"),
        format!("worst wait {worst:.2?}, the limit is {LOST_WAKE:?}"),
    );
}
