//! Handlers that panic under load: each costs its own connection and nobody else anything. First without escalation, then
//! with it ([`crate::escalation`]).

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::task::spawn_local;
use tokio::time::sleep;

use crate::client::{self, Client, wrong};
use crate::escalation;
use crate::load::{self, Over, in_time};
use crate::random::Random;
use crate::report::{Faults, Progress, Verdicts};
use crate::server::Common;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Runs, one after another on one server
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Requests of the innocent in each run
    #[arg(long, default_value_t = 100_000)]
    requests: u64,
    /// Clients that keep their connections
    #[arg(long, default_value_t = 32)]
    pub keep_alive: usize,
    /// Clients that make one connection after another
    #[arg(long, default_value_t = 8)]
    pub fresh: usize,
    /// Clients that make a handler panic each 5 to 20 ms
    #[arg(long, default_value_t = 4)]
    pub panicking: usize,
    /// After that: runs in which the panics are all one executor's and escalation is on, each with a server of its own
    #[arg(long, default_value_t = 20)]
    pub escalations: usize,
}

#[derive(Default)]
struct Seen {
    kept: Cell<u64>,
    fresh: Cell<u64>,
    panics: Cell<u64>,
    innocents: RefCell<Faults>,
    victims: RefCell<Faults>,
}

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let mut verdicts = Verdicts::default();
    if arguments.runs > 0 {
        contained(arguments, &mut verdicts).await?;
    }
    escalation::run(arguments, &mut verdicts).await?;
    Ok(verdicts)
}

async fn contained(arguments: &Arguments, verdicts: &mut Verdicts) -> Result<(), String> {
    let common = &arguments.common;
    let cpus = common.cpus_or("0,1");
    // More than a hundred panics of an executor within ten seconds would have it restarted.
    let escalation = ["--escalate-after", "0"];
    let arguments_of_server = ["--executors", "4", "--cpus", &cpus, "--chaos", "--log", "off"];
    let server = common.start(common.port, &[&arguments_of_server[..], &escalation].concat())?;
    println!("server: {}, process {}", server.command, server.pid());
    let seen = Rc::new(Seen::default());
    let mut progress = Progress::new();
    for number in 1..=arguments.runs {
        let goal = number as u64 * arguments.requests;
        let over = Over::default();
        let mut tasks = Vec::new();
        for client in 0..arguments.keep_alive {
            tasks.push(spawn_local(innocent(server.address(), client, true, Rc::clone(&seen), over.clone())));
        }
        for client in 0..arguments.fresh {
            tasks.push(spawn_local(innocent(server.address(), client, false, Rc::clone(&seen), over.clone())));
        }
        for client in 0..arguments.panicking {
            tasks.push(spawn_local(panicking(server.address(), client, Rc::clone(&seen), over.clone())));
        }
        while seen.kept.get() + seen.fresh.get() < goal && seen.innocents.borrow().count() < 100 {
            sleep(Duration::from_millis(10)).await;
            progress.say(|| format!("run {number}: {} panics", seen.panics.get()));
        }
        over.set();
        load::all(tasks).await?;
    }
    let innocents = seen.innocents.borrow();
    verdicts.check(
        innocents.count() == 0,
        "nobody else notices a panic",
        format!(
            "{} in {} requests on kept and {} on new connections, with {} panics, in {} runs",
            innocents.show("failures"),
            seen.kept.get(),
            seen.fresh.get(),
            seen.panics.get(),
            arguments.runs
        ),
    );
    let victims = seen.victims.borrow();
    verdicts.check(
        victims.count() == 0 && seen.panics.get() > 0,
        "whose handler panics gets 500, and its connection is closed",
        victims.show("that did not"),
    );
    let (status, time) = server.stop()?;
    verdicts.check(status.success(), "the server stops in order", format!("{status} after {time:.2?}"));
    Ok(())
}

/// Asks /whoami without a pause. No panic may escape, so every executor stays in its first generation.
async fn innocent(server: SocketAddr, number: usize, keeps: bool, seen: Rc<Seen>, over: Over) {
    let mut connection = None;
    while !over.is_set() {
        let asked = in_time(async {
            let mut client = match connection.take() {
                Some(client) => client,
                None => Client::connect_from(server, number, 0).await?,
            };
            client.send(client::get("/whoami", !keeps).as_bytes()).await?;
            let who = client::whoami(&client.answer().await?)?;
            if who.generation != 1 {
                return Err(wrong(format!("a panic escaped: {who:?}")));
            }
            if !keeps {
                client.closed().await?;
            }
            Ok(client)
        });
        match asked.await {
            Ok(client) if keeps => {
                connection = Some(client);
                seen.kept.set(seen.kept.get() + 1);
            }
            Ok(_) => seen.fresh.set(seen.fresh.get() + 1),
            Err(error) => {
                let what = if keeps { "kept" } else { "new" };
                seen.innocents.borrow_mut().note(|| format!("a {what} connection: {error}"));
            }
        }
    }
}

async fn panicking(server: SocketAddr, number: usize, seen: Rc<Seen>, over: Over) {
    let mut random = Random::of(5, number);
    while !over.is_set() {
        match in_time(panic_once(server, number)).await {
            Ok(()) => seen.panics.set(seen.panics.get() + 1),
            Err(error) => seen.victims.borrow_mut().note(|| error.to_string()),
        }
        sleep(random.milliseconds(5, 20)).await;
    }
}

async fn panic_once(server: SocketAddr, number: usize) -> io::Result<()> {
    let mut client = Client::connect_from(server, number, 0).await?;
    order_panic(&mut client).await
}

/// Has a handler panic, and sees the answer and the end.
pub async fn order_panic(client: &mut Client) -> io::Result<()> {
    let answer = client.get("/chaos/panic").await?;
    if answer.status != 500 || !answer.close {
        return Err(wrong(format!("/chaos/panic answered {}, closing: {}", answer.status, answer.close)));
    }
    client.closed().await
}
