//! Servers that are started and stopped, one after the other, in one process: descriptors, threads and memory stay level.
//!
//! The host is this process, a tokio program of one thread; nothing is driven from outside. Each server answers on a
//! connection of its own before it is stopped.

use std::time::{Duration, Instant};

use ringleader::{Body, Request, Response, Server, Stop, service_fn};
use tokio::time::{sleep, timeout};

use crate::client::Client;
use crate::proc::{self, Sample};
use crate::report::{Verdicts, bytes};
use crate::server::Common;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Servers, one after the other
    #[arg(long, default_value_t = 1000)]
    cycles: u64,
    /// Executors of each
    #[arg(long, default_value_t = 2)]
    executors: usize,
    /// Requests to each, on one connection
    #[arg(long, default_value_t = 20)]
    requests: usize,
}

/// By then the process has what it keeps: threads, the allocator's arenas, code that is paged in.
const WARM_UP: u64 = 100;
/// Growth after the warm-up. A leak of a page per server would be 3.5 MiB.
const GROWTH_MAX: u64 = 512 * 1024;
const LIMIT: Duration = Duration::from_secs(30);

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    println!(
        "held equal: {} executors each, in this process and on its CPU; {} requests on one connection to each",
        arguments.executors, arguments.requests
    );
    println!("  {:>7}  {:>11}  {:>7}  {:>9}", "cycles", "descriptors", "threads", "RSS");
    let alone = look()?;
    show(0, &alone);
    // Each executor's, and glommio's beside it.
    let expected = alone.threads + 2 * arguments.executors as u64;
    let (begin, mut warm, mut most) = (Instant::now(), None, (0, 0));
    for number in 1..=arguments.cycles {
        let served = timeout(LIMIT, cycle(arguments)).await;
        served
            .map_err(|_| format!("cycle {number} has not ended in {LIMIT:?}"))?
            .map_err(|e| format!("cycle {number}: {e}"))?;
        let now = settled(expected).await?;
        if number == WARM_UP.min(arguments.cycles) {
            warm = Some(now);
        }
        if warm.is_some() {
            most = (most.0.max(now.fds), most.1.max(now.threads));
        }
        if [1, 10, 100, 300, 1000, arguments.cycles].contains(&number) {
            show(number, &now);
        }
    }
    let warm = warm.ok_or("there was no cycle")?;
    let (last, each) = (look()?, begin.elapsed() / u32::try_from(arguments.cycles).unwrap_or(u32::MAX));
    let mut verdicts = Verdicts::default();
    let cycles = arguments.cycles;
    verdicts.check(true, "every server starts, answers and stops", format!("{cycles} servers, {each:.1?} each"));
    verdicts.check(
        most.0 == warm.fds,
        "descriptors level",
        format!("{} after {WARM_UP}, never more than {}", warm.fds, most.0),
    );
    let threads = format!("{} after {WARM_UP}, never more than {}", warm.threads, most.1);
    verdicts.check(most.1 == warm.threads, "threads level", threads);
    let (from, to) = (bytes(warm.rss as f64), bytes(last.rss as f64));
    verdicts.check(
        last.rss < warm.rss + GROWTH_MAX,
        "memory level",
        format!("{from} after {WARM_UP}, {to} at the end"),
    );
    Ok(verdicts)
}

async fn cycle(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let server = Server::builder().name("cycle").listen("127.0.0.1:0").executors(arguments.executors);
    let server =
        server.serve(async |_| Ok(service_fn(async |_: Request| Ok(Response::new(Body::from("Hello, World!"))))));
    let running = server.start().await?;
    let mut client = Client::connect(running.local_addrs()[0]).await?;
    for _ in 0..arguments.requests {
        let answer = client.get("/").await?;
        if answer.status != 200 {
            return Err(format!("status {}", answer.status).into());
        }
    }
    drop(client);
    let exit = running.stop(Stop::Drain(LIMIT)).await?;
    if exit.drained && exit.abandoned == 0 { Ok(()) } else { Err(format!("{exit:?}").into()) }
}

/// A look when the last supervisor has gone, which may have told of its server's end a moment before its own.
async fn settled(threads: u64) -> Result<Sample, String> {
    for _ in 0..1000 {
        if look()?.threads == threads {
            break;
        }
        sleep(Duration::from_millis(1)).await;
    }
    look()
}

fn look() -> Result<Sample, String> {
    proc::sample(std::process::id()).map_err(|error| format!("looking at this process: {error}"))
}

fn show(cycles: u64, sample: &Sample) {
    println!("  {cycles:>7}  {:>11}  {:>7}  {:>9}", sample.fds, sample.threads, bytes(sample.rss as f64));
}
