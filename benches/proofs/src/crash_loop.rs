//! An executor whose start-up panics each time: it is tried a few times and then left alone, the others notice nothing;
//! past half of them the server is not ready, and when none is left it ends with an error.
//!
//! The server is ours ([`crate::serve`]): each slot's first generation starts, every other panics.

use std::cell::RefCell;
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, spawn_local};
use tokio::time::sleep;

use crate::client::{self, Client};
use crate::load::{self, Over, Plan, in_time, middle_and_worst};
use crate::report::{Faults, Verdicts};
use crate::server::{Common, Server};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Servers that are brought down, executor by executor
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// New connections a second meanwhile
    #[arg(long, default_value_t = 100.0)]
    rate: f64,
    /// Clients that keep a connection to each executor
    #[arg(long, default_value_t = 4)]
    keep_alive: usize,
    /// Seconds within which a slot has to be quarantined
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    limit: u64,
}

const EXECUTORS: usize = 4;
/// Generations of a slot: the first, and as many as may fail within 30 s by default.
const GENERATIONS_MAX: u64 = 6;
/// A new connection that was meant to begin in such a time around an escape may have met the victim.
const AROUND: Duration = Duration::from_millis(250);
/// And one of them in so many escapes: at 100 a second an executor is without one most of the time.
const ESCAPES_FOR_ONE: u64 = 2;
/// What a new connection never meets while the server lives.
const REFUSED: &str = "refused";
const END_MAX: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Account {
    /// From the escape to the quarantine.
    quarantines: Vec<Duration>,
    generations: Vec<u64>,
    innocents: Faults,
    asked: u64,
    readiness: Faults,
    ends: Faults,
    in_flight: u64,
}

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let account = Rc::new(RefCell::new(Account::default()));
    for number in 1..=arguments.runs {
        bring_down(arguments, &account).await.map_err(|error| format!("run {number}: {error}"))?;
        let seen = account.borrow();
        let last = seen.quarantines.last().copied().unwrap_or_default();
        println!("  run {number}: {:?} generations, the last slot given up after {last:.1?}", seen.generations);
    }
    let mut verdicts = Verdicts::default();
    judge(arguments, &account.borrow(), &mut verdicts);
    Ok(verdicts)
}

fn judge(arguments: &Arguments, seen: &Account, verdicts: &mut Verdicts) {
    let slots = arguments.runs * EXECUTORS;
    let most = seen.generations.iter().copied().max().unwrap_or(0);
    verdicts.check(
        most <= GENERATIONS_MAX && most > 1,
        &format!("no slot has more than {GENERATIONS_MAX} generations"),
        format!("{most} at most, of {} slots", seen.generations.len()),
    );
    let (middle, worst) = middle_and_worst(seen.quarantines.clone());
    verdicts.check(
        seen.quarantines.len() == slots - arguments.runs,
        "a slot is quarantined while others serve",
        format!(
            "{} of {}; after {middle:.1?} (median), {worst:.1?} (worst)",
            seen.quarantines.len(),
            slots - arguments.runs
        ),
    );
    verdicts.check(
        seen.innocents.count() == 0,
        "the other executors are unharmed",
        format!(
            "{} of {} requests; {} new connections were in flight at a victim",
            seen.innocents.show("failures"),
            seen.asked,
            seen.in_flight
        ),
    );
    let most = slots as u64 / ESCAPES_FOR_ONE;
    verdicts.check(
        seen.in_flight <= most,
        "an escape costs no more new connections than an executor has at a time",
        format!("{} around {slots} escapes, {most} allowed", seen.in_flight),
    );
    verdicts.check(
        seen.readiness.count() == 0,
        "ready with half of the slots and more, not ready with fewer",
        seen.readiness.show("times not so"),
    );
    verdicts.check(
        seen.ends.count() == 0,
        "with no executor left the server ends with an error",
        seen.ends.show("times not so"),
    );
}

async fn bring_down(arguments: &Arguments, account: &Rc<RefCell<Account>>) -> Result<(), String> {
    let common = &arguments.common;
    let itself = std::env::current_exe().map_err(|error| format!("finding this program: {error}"))?;
    let mut command = Command::new(itself);
    command.args(["serve", "--listen", &format!("127.0.0.1:{}", common.port), "--executors", &EXECUTORS.to_string()]);
    command.args(["--cpus", &common.cpus_or("0,1"), "--crash-slots", "0,1,2,3"]);
    let mut server = Server::start(command, common.port, &common.scratch.join("ringleader-proofs-crash-loop.log"))?;
    let over = Over::default();
    let rate = arguments.rate;
    let fresh = Plan::whoami(server.address()).run(move |_| rate, &over);
    let mut kept: Vec<Vec<JoinHandle<()>>> = Vec::new();
    let ends: Vec<Over> = (0..EXECUTORS).map(|_| Over::default()).collect();
    for (executor, end) in ends.iter().enumerate() {
        let mut clients = Vec::new();
        for _ in 0..arguments.keep_alive {
            let (client, _) = load::reach(server.address(), executor).await?;
            clients.push(spawn_local(ask(client, Rc::clone(account), end.clone())));
        }
        kept.push(clients);
    }
    let mut escapes = Vec::new();
    for (victim, clients) in kept.into_iter().enumerate() {
        let (mut trigger, _) = load::reach(server.address(), victim).await?;
        // They are the victim's: they leave before, and count no more.
        ends[victim].set();
        load::all(clients).await?;
        if victim == EXECUTORS - 1 {
            over.set();
        }
        escapes.push(Instant::now());
        let order = trigger.send(client::get("/escape", false).as_bytes()).await;
        order.map_err(|error| format!("ordering the escape of {victim}: {error}"))?;
        if victim < EXECUTORS - 1 {
            watch(arguments, &server, victim, account).await?;
        }
    }
    let fresh = fresh.await.map_err(|error| error.to_string())?;
    note_end(&mut server, account).await;
    let around = |meant: Instant| escapes.iter().any(|at| meant + AROUND > *at && meant < *at + AROUND);
    let mut account = account.borrow_mut();
    account.asked += fresh.begun;
    for (meant, error) in fresh.failed_at {
        // One that met the victim sees the end of its connection; nobody may refuse it.
        if around(meant) && !error.contains(REFUSED) {
            account.in_flight += 1;
        } else {
            let after = escapes.iter().filter(|at| **at < meant).map(|at| meant - *at).min();
            account.innocents.note(|| format!("a new connection, begun {after:.1?} after an escape: {error}"));
        }
    }
    Ok(())
}

/// Asks on one connection until it is told to leave.
async fn ask(mut client: Client, account: Rc<RefCell<Account>>, end: Over) {
    while !end.is_set() {
        let asked = in_time(client.get("/whoami")).await.and_then(|answer| client::whoami(&answer));
        account.borrow_mut().asked += 1;
        if let Err(error) = asked {
            account.borrow_mut().innocents.note(|| format!("a kept connection: {error}"));
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until the slot is given up, and looks at generations and readiness.
async fn watch(
    arguments: &Arguments,
    server: &Server,
    victim: usize,
    account: &RefCell<Account>,
) -> Result<(), String> {
    let began = Instant::now();
    while server.log_since(0, &["quarantined"]).len() <= victim {
        if began.elapsed() > Duration::from_secs(arguments.limit) {
            return Err(format!(
                "slot {victim} is not quarantined after {} s, says {}",
                arguments.limit,
                server.log_path()
            ));
        }
        sleep(Duration::from_millis(10)).await;
    }
    let took = began.elapsed();
    // Whether it is left alone from here on.
    sleep(Duration::from_millis(500)).await;
    let stats = in_time(async { Client::connect(server.address()).await?.get("/stats").await });
    let stats = stats.await.map_err(|error| format!("asking for /stats: {error}"))?;
    let stats = String::from_utf8_lossy(&stats.body).into_owned();
    let words: Vec<&str> = stats.split_whitespace().collect();
    let generation = words.get(3 + victim).and_then(|number| number.parse().ok());
    let mut account = account.borrow_mut();
    account.quarantines.push(took);
    account.generations.push(generation.ok_or_else(|| format!("/stats says {stats:?}"))?);
    let expected = if (victim + 1) * 2 > EXECUTORS { "false" } else { "true" };
    if words.get(1) != Some(&expected) {
        account.readiness.note(|| format!("with {} of {EXECUTORS} in quarantine: {stats}", victim + 1));
    }
    Ok(())
}

async fn note_end(server: &mut Server, account: &RefCell<Account>) {
    let began = Instant::now();
    while began.elapsed() < END_MAX {
        if let Some(status) = server.ended() {
            if status.code().is_none_or(|code| code == 0) {
                account.borrow_mut().ends.note(|| format!("it ended with {status}"));
            }
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    account.borrow_mut().ends.note(|| format!("it runs on, {END_MAX:?} after the last escape"));
}
