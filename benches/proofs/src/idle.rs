//! What idle connections cost: memory per connection, CPU time, wake-ups; side by side with a rival, one executor each,
//! one server after the other.

use std::io;
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::client::Client;
use crate::proc::{self, Thread};
use crate::report::{Verdicts, bytes};
use crate::server::{Common, Server};

/// A connection that never spoke: the aim, in bytes.
const NEVER_SPOKE_AIM: f64 = 2048.0;
/// Percent of a core of an idle server.
const CPU_MOST: f64 = 0.1;
/// Wake-ups per second of an idle thread.
const WAKES_MOST: f64 = 5.0;
const CONCURRENCY: usize = 64;
/// Few: what they leave behind is reused, and would make the rest look cheaper.
const WARM_UP: usize = 8;
/// How long connections are left idle before their memory is looked at again: longer than Ringleader keeps the protocol's
/// part of an idle connection (5 s).
const REST: Duration = Duration::from_secs(9);
const SETTLE: Duration = Duration::from_secs(3);

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Idle connections
    #[arg(long, default_value_t = 9000)]
    connections: usize,
    /// A server to compare with: a command, split at spaces, in which {port} is replaced
    #[arg(long, value_name = "COMMAND")]
    rival: Option<String>,
    /// Seconds over which the idle cost is measured, without and with connections
    #[arg(long, default_value_t = 20)]
    seconds: u64,
}

/// What one server costs. Memory in bytes per connection.
struct Cost {
    name: &'static str,
    silent: Memory,
    spoken: Memory,
    /// The same after [`REST`].
    rested: Memory,
    alone: Idle,
    crowded: Idle,
}

#[derive(Clone, Copy)]
struct Memory {
    rss: f64,
    pss: f64,
}

struct Idle {
    /// Of a core.
    cpu_percent: f64,
    /// Each thread's name and wake-ups per second, the busiest first.
    wakes: Vec<(String, f64)>,
}

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let cpus = arguments.common.cpus_or("0");
    let count = arguments.connections.to_string();
    println!(
        "held equal: 1 executor on CPU {cpus}, {count} connections, one GET / each, the allocator each was built with"
    );
    let server = arguments.common.start(
        arguments.common.port,
        &[
            "--executors",
            "1",
            "--cpus",
            &cpus,
            "--idle-timeout",
            "3600",
            "--connections",
            &(arguments.connections + 100).to_string(),
        ],
    )?;
    let ours = measure("ringleader", server, arguments).await?;
    let rival = match &arguments.rival {
        Some(line) => Some(measure("rival", start_rival(line, &arguments.common)?, arguments).await?),
        None => None,
    };
    for cost in std::iter::once(&ours).chain(&rival) {
        println!(
            "  {:<11} never spoke: {} RSS, {} PSS per connection",
            cost.name,
            bytes(cost.silent.rss),
            bytes(cost.silent.pss)
        );
        println!(
            "  {:<11} one request: {} RSS, {} PSS per connection",
            cost.name,
            bytes(cost.spoken.rss),
            bytes(cost.spoken.pss)
        );
        println!(
            "  {:<11} {} s later: {} RSS, {} PSS per connection",
            cost.name,
            REST.as_secs(),
            bytes(cost.rested.rss),
            bytes(cost.rested.pss)
        );
        println!("  {:<11} idle: {}", cost.name, cost.alone.describe());
        println!("  {:<11} with {count}: {}", cost.name, cost.crowded.describe());
    }
    let mut verdicts = Verdicts::default();
    judge(&ours, rival.as_ref(), &mut verdicts);
    Ok(verdicts)
}

fn start_rival(line: &str, common: &Common) -> Result<Server, String> {
    let line = line.replace("{port}", &common.port.to_string());
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().ok_or("--rival is empty")?);
    command.args(words);
    Server::start(command, common.port, &common.scratch.join("ringleader-proofs-rival.log"))
}

fn judge(ours: &Cost, rival: Option<&Cost>, verdicts: &mut Verdicts) {
    let silent = format!("{} RSS, {} PSS; aim 2 KiB", bytes(ours.silent.rss), bytes(ours.silent.pss));
    verdicts.check(ours.silent.rss < NEVER_SPOKE_AIM, "memory of a connection that never spoke (aim)", silent);
    let at_once = "memory straight after one request is no more than the rival's";
    let later = "memory of a connection that is idle after one request is no more than the rival's";
    match rival {
        None => verdicts.skip(later, "no --rival"),
        Some(rival) => {
            compare(verdicts, at_once, ours.spoken.rss, rival.spoken.rss);
            compare(verdicts, later, ours.rested.rss, rival.rested.rss);
        }
    }
    for (when, idle) in [("without connections", &ours.alone), ("with idle connections", &ours.crowded)] {
        let criterion = format!("an idle server {when} takes less than {CPU_MOST} % of a core");
        verdicts.check(idle.cpu_percent < CPU_MOST, &criterion, format!("{:.4} %", idle.cpu_percent));
        let most = idle.wakes.first().map_or(0.0, |(_, rate)| *rate);
        let criterion = format!("fewer than {WAKES_MOST} wake-ups a second of each thread {when}");
        verdicts.check(most < WAKES_MOST, &criterion, idle.describe_wakes());
    }
}

fn compare(verdicts: &mut Verdicts, criterion: &str, ours: f64, rival: f64) {
    let figures = format!("{} to {}, {:.3} times", bytes(ours), bytes(rival), ours / rival);
    verdicts.check(ours <= rival, criterion, figures);
}

async fn measure(name: &'static str, server: Server, arguments: &Arguments) -> Result<Cost, String> {
    println!("  {name}: {}, process {}", server.command, server.pid());
    let failed = |what: &str, error: io::Error| format!("{name}, {what}: {error}");
    ask_all(connect(&server, WARM_UP).await?).await.map_err(|error| failed("warming up", error))?;
    let fds = server.settled(SETTLE).await?.fds;
    let alone = idle(&server, arguments.seconds).await?;
    let before = memory(&server)?;
    let connections = connect(&server, arguments.connections).await?;
    accepted(&server, fds + arguments.connections as u64).await?;
    let silent = memory(&server)?;
    let connections = ask_all(connections).await.map_err(|error| failed("one request each", error))?;
    sleep(SETTLE).await;
    let spoken = memory(&server)?;
    sleep(REST).await;
    let rested = memory(&server)?;
    let crowded = idle(&server, arguments.seconds).await?;
    let held = server.sample()?.fds;
    if held < fds + arguments.connections as u64 {
        return Err(format!("{name} holds {held} descriptors in the end: it closed idle connections"));
    }
    drop(connections);
    server.stop()?;
    let count = arguments.connections.max(1) as f64;
    let per = |now: Memory| Memory { rss: (now.rss - before.rss) / count, pss: (now.pss - before.pss) / count };
    Ok(Cost { name, silent: per(silent), spoken: per(spoken), rested: per(rested), alone, crowded })
}

fn memory(server: &Server) -> Result<Memory, String> {
    let pss = proc::pss(server.pid()).map_err(|error| format!("reading smaps_rollup: {error}"))?;
    Ok(Memory { rss: server.sample()?.rss as f64, pss: pss as f64 })
}

/// Waits until the server has accepted them all.
async fn accepted(server: &Server, fds: u64) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while server.sample()?.fds < fds {
        if Instant::now() > deadline {
            return Err(format!(
                "{} of {fds} descriptors after 20 s: not all connections are accepted",
                server.sample()?.fds
            ));
        }
        sleep(Duration::from_millis(50)).await;
    }
    sleep(SETTLE).await;
    Ok(())
}

async fn connect(server: &Server, count: usize) -> Result<Vec<Client>, String> {
    let mut clients = Vec::with_capacity(count);
    for number in 0..count {
        let client = timeout(Duration::from_secs(10), Client::connect(server.address())).await;
        let client = client.map_err(|_| format!("connection {number}: no connect within 10 s"))?;
        clients.push(client.map_err(|error| format!("connection {number}: {error}"))?);
    }
    Ok(clients)
}

/// One request on each connection, 64 at once. The rival's answer may differ in text, not in status.
async fn ask_all(clients: Vec<Client>) -> io::Result<Vec<Client>> {
    let turn = Rc::new(tokio::sync::Semaphore::new(CONCURRENCY));
    let mut asking = JoinSet::new();
    for mut client in clients {
        let turn = Rc::clone(&turn);
        asking.spawn_local(async move {
            let _turn = turn.acquire().await.map_err(io::Error::other)?;
            let answer = timeout(Duration::from_secs(10), client.get("/")).await??;
            if answer.status == 200 {
                Ok(client)
            } else {
                Err(crate::client::wrong(format!("status {}", answer.status)))
            }
        });
    }
    let mut clients = Vec::with_capacity(asking.len());
    while let Some(asked) = asking.join_next().await {
        clients.push(asked.map_err(io::Error::other)??);
    }
    Ok(clients)
}

/// The cost over some seconds in which nobody asks anything.
async fn idle(server: &Server, seconds: u64) -> Result<Idle, String> {
    let look = || proc::threads(server.pid()).map_err(|error| format!("reading the server's threads: {error}"));
    let (began, before) = (Instant::now(), look()?);
    sleep(Duration::from_secs(seconds)).await;
    let (wall, after) = (began.elapsed(), look()?);
    let earlier =
        |thread: &Thread| before.iter().find(|other| other.id == thread.id).map_or((0, 0), |t| (t.cpu_ns, t.sleeps));
    let cpu: u64 = after.iter().map(|thread| thread.cpu_ns - earlier(thread).0).sum();
    let rate = |thread: &Thread| (thread.name.clone(), (thread.sleeps - earlier(thread).1) as f64 / wall.as_secs_f64());
    let mut wakes: Vec<_> = after.iter().map(rate).collect();
    wakes.sort_by(|one, other| other.1.total_cmp(&one.1));
    Ok(Idle { cpu_percent: cpu as f64 / wall.as_nanos() as f64 * 100.0, wakes })
}

impl Idle {
    fn describe(&self) -> String {
        format!("{:.4} % of a core; wake-ups/s: {}", self.cpu_percent, self.describe_wakes())
    }

    fn describe_wakes(&self) -> String {
        let busy = self.wakes.iter().filter(|(_, rate)| *rate > 0.0).map(|(name, rate)| format!("{name} {rate:.2}"));
        let busy: Vec<_> = busy.take(6).collect();
        if busy.is_empty() { "none".to_owned() } else { busy.join(", ") }
    }
}
