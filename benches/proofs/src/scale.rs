//! 64 executors on two cores: correct answers from all of them, and what a request costs the server's process at 1 and
//! at 64 executors.
//!
//! The cost is CPU time by the scheduler's account: hardware counters are not supported in the machines this is meant
//! for (`perf stat` says so there), and CPU time swings. Both servers run all the time and are loaded in turns, A B B A.
//! Two loads: all connections on *one* executor, so that only the number of other executors differs (this is judged);
//! and spread over all, in which an executor of 64 has a few connections and batches less (this is reported).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::{JoinSet, spawn_local};
use tokio::time::timeout;

use crate::client::{self, Client};
use crate::proc;
use crate::report::{Faults, Progress, Verdicts};
use crate::server::{Common, Server};

/// A request may cost this much more with 64 executors.
const RATIO_MOST: f64 = 1.10;
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Connections on one executor: its limit is a share of the open files, 294 for one of 64 where those are 20,000.
const GATHERED_MOST: usize = 200;
/// Attempts to land on the one executor, per connection and executor.
const ATTEMPTS: usize = 20;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Executors of the large server
    #[arg(long, default_value_t = 64)]
    executors: usize,
    /// Connections of each load
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Seconds of the load on all executors
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Pairs of rounds; 5 at least for a verdict
    #[arg(long, default_value_t = 6)]
    pairs: usize,
    /// Seconds of one round
    #[arg(long, default_value_t = 2.0)]
    round: f64,
}

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let mut verdicts = Verdicts::default();
    all_answer(arguments, &mut verdicts).await?;
    cost(arguments, &mut verdicts).await?;
    Ok(verdicts)
}

fn start(arguments: &Arguments, port: u16, executors: usize, cpus: &str) -> Result<Server, String> {
    let server = arguments.common.start(port, &["--executors", &executors.to_string(), "--cpus", cpus])?;
    println!("server: {}, process {}", server.command, server.pid());
    Ok(server)
}

#[derive(Default)]
struct Answers {
    by_executor: RefCell<HashMap<usize, u64>>,
    faults: RefCell<Faults>,
}

/// Fresh and kept connections over all executors of a server with two cores.
async fn all_answer(arguments: &Arguments, verdicts: &mut Verdicts) -> Result<(), String> {
    let cpus = arguments.common.cpus_or("0,1");
    let server = start(arguments, arguments.common.port, arguments.executors, &cpus)?;
    let (answers, address) = (Rc::new(Answers::default()), server.address());
    let until = Instant::now() + Duration::from_secs(arguments.seconds);
    let mut clients = JoinSet::new();
    for _ in 0..arguments.connections {
        let answers = Rc::clone(&answers);
        clients.spawn_local(async move {
            while Instant::now() < until {
                if let Err(error) = ten_requests(address, &answers).await {
                    answers.faults.borrow_mut().note(|| error.to_string());
                }
            }
        });
    }
    let mut progress = Progress::new();
    while let Ok(Some(_)) | Err(_) = timeout(Duration::from_secs(1), clients.join_next()).await {
        progress.say(|| format!("{} executors have answered", answers.by_executor.borrow().len()));
    }
    server.stop()?;
    let (counts, faults) = (answers.by_executor.borrow(), answers.faults.borrow());
    let total: u64 = counts.values().sum();
    verdicts.check(
        faults.count() == 0,
        "every answer under load is right",
        format!("{total} answers, {}", faults.show("faults")),
    );
    let (least, most) = (counts.values().min().copied().unwrap_or(0), counts.values().max().copied().unwrap_or(0));
    verdicts.check(
        counts.len() == arguments.executors,
        "every executor answers",
        format!("{} of {}, {least} to {most} answers each", counts.len(), arguments.executors),
    );
    Ok(())
}

async fn ten_requests(address: std::net::SocketAddr, answers: &Answers) -> io::Result<()> {
    let mut client = Client::connect(address).await?;
    for _ in 0..10 {
        let answer = timeout(ANSWER_MAX, client.get("/whoami")).await??;
        *answers.by_executor.borrow_mut().entry(client::whoami(&answer)?.executor).or_default() += 1;
    }
    client.reset();
    Ok(())
}

/// CPU time per request of both servers, interleaved.
async fn cost(arguments: &Arguments, verdicts: &mut Verdicts) -> Result<(), String> {
    // One core: with two, the client would have to share one of them, and not by the same parts.
    let cpus = "0";
    let one = start(arguments, arguments.common.port, 1, cpus)?;
    let many = start(arguments, arguments.common.port + 1, arguments.executors, cpus)?;
    println!(
        "held equal: executors on CPU {cpus}, {} kept connections in a closed loop, rounds of {} s, order A B B A; user + system time of the process",
        arguments.connections, arguments.round
    );
    for (load, gathered, judged) in [("all connections on one executor", true, true), ("spread over all", false, false)]
    {
        let mut ratios = Vec::new();
        let mut sums = [0.0; 2];
        for pair in 0..arguments.pairs {
            let mut costs = [0.0; 2];
            let order = if pair % 2 == 0 { [0, 1] } else { [1, 0] };
            for which in order {
                costs[which] = round(arguments, [&one, &many][which], gathered).await?;
                sums[which] += costs[which];
            }
            ratios.push(costs[1] / costs[0]);
        }
        conclude(load, judged, &mut ratios, sums, verdicts);
    }
    one.stop()?;
    many.stop()?;
    Ok(())
}

fn conclude(load: &str, judged: bool, ratios: &mut [f64], sums: [f64; 2], verdicts: &mut Verdicts) {
    ratios.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (ratios.first(), ratios.last()) else { return };
    let middle = ratios[ratios.len() / 2].midpoint(ratios[(ratios.len() - 1) / 2]);
    let count = ratios.len() as f64;
    let figures = format!(
        "{middle:.3} times ({least:.3} to {most:.3}, {} pairs), {:.2} and {:.2} µs a request",
        ratios.len(),
        sums[0] / count / 1000.0,
        sums[1] / count / 1000.0
    );
    if judged && ratios.len() >= 5 {
        let criterion = format!("a request costs no more than {RATIO_MOST} times, {load}");
        verdicts.check(middle <= RATIO_MOST, &criterion, figures);
    } else {
        println!("  not judged, {load}: {figures}");
    }
}

/// One round of load; nanoseconds of CPU time per request.
async fn round(arguments: &Arguments, server: &Server, gathered: bool) -> Result<f64, String> {
    let count = if gathered { arguments.connections.min(GATHERED_MOST) } else { arguments.connections };
    let connecting = connections(server, count, gathered, arguments.executors);
    let clients = connecting.await.map_err(|error| format!("connecting to {}: {error}", server.command))?;
    let (count, over) = (Rc::new(Cell::new(0u64)), Rc::new(Cell::new(false)));
    let tasks: Vec<_> =
        clients.into_iter().map(|client| spawn_local(ask_until(client, Rc::clone(&count), Rc::clone(&over)))).collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let cpu = || proc::cpu_ns(server.pid()).map_err(|error| format!("reading the server's CPU time: {error}"));
    let (cpu_before, count_before) = (cpu()?, count.get());
    tokio::time::sleep(Duration::from_secs_f64(arguments.round)).await;
    let (spent, answered) = (cpu()? - cpu_before, count.get() - count_before);
    over.set(true);
    for task in tasks {
        task.await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("under load, {}: {error}", server.command))?;
    }
    if answered == 0 {
        Err(format!("no answer in a round of {}", server.command))
    } else {
        Ok(spent as f64 / answered as f64)
    }
}

async fn ask_until(mut client: Client, count: Rc<Cell<u64>>, over: Rc<Cell<bool>>) -> io::Result<()> {
    while !over.get() {
        let answer = timeout(ANSWER_MAX, client.get("/")).await??;
        client::hello(&answer)?;
        count.set(count.get() + 1);
    }
    client.reset();
    Ok(())
}

/// Kept connections; gathered: all on the executor that the first of them met.
async fn connections(server: &Server, count: usize, gathered: bool, executors: usize) -> io::Result<Vec<Client>> {
    let mut home = None;
    let mut clients = Vec::new();
    for _ in 0..count * executors * ATTEMPTS {
        if clients.len() == count {
            break;
        }
        let mut client = Client::connect(server.address()).await?;
        let Ok(answer) = timeout(ANSWER_MAX, client.get("/whoami")).await else {
            return Err(client::wrong(format!("no answer in {ANSWER_MAX:?}, with {} connections held", clients.len())));
        };
        let executor = client::whoami(&answer?)?.executor;
        if !gathered || *home.get_or_insert(executor) == executor {
            clients.push(client);
        } else {
            client.reset();
        }
    }
    if clients.len() == count { Ok(clients) } else { Err(client::wrong("too few connections met one executor")) }
}
