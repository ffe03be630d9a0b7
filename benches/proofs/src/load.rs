//! Load by schedule: connections begin when they are meant to, whatever the server does, and are counted from the moment
//! they were meant to begin. Nothing is dropped from the account. And clients that keep their connection.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{sleep, sleep_until, timeout};

use crate::client::{self, Client, Whoami};
use crate::histogram::Histogram;
use crate::random::Random;
use crate::report::Faults;

/// After this a request counts as unanswered.
pub const ANSWER_MAX: Duration = Duration::from_secs(10);
/// A run whose own generator was later than this with one connection in a hundred says nothing about the server.
pub const LAG_MAX: Duration = Duration::from_millis(50);

/// A shared "it is over".
#[derive(Clone, Default)]
pub struct Over(Rc<Cell<bool>>);

impl Over {
    pub fn set(&self) {
        self.0.set(true);
    }

    pub fn is_set(&self) -> bool {
        self.0.get()
    }
}

/// A connection that was answered.
#[derive(Clone, Copy)]
pub struct Answered {
    /// When it was meant to begin.
    pub meant: Instant,
    /// When it did.
    pub begun: Instant,
    pub at: Instant,
    /// Who answered, where that was asked.
    pub who: Option<Whoami>,
}

impl Answered {
    /// From the intended begin to the answer.
    pub fn wait(&self) -> Duration {
        self.at - self.meant
    }
}

/// What became of a schedule.
#[derive(Default)]
pub struct Fresh {
    pub begun: u64,
    pub answered: Vec<Answered>,
    pub failed: Faults,
    /// When those were meant to begin, and what happened to them.
    pub failed_at: Vec<(Instant, String)>,
    /// How late the generator itself began.
    pub lag: Histogram,
}

impl Fresh {
    pub fn waits(&self) -> Histogram {
        let mut waits = Histogram::default();
        self.answered.iter().for_each(|answered| waits.record(answered.wait()));
        waits
    }

    /// Whether the generator kept its schedule.
    pub fn is_honest(&self) -> bool {
        self.lag.percentile(0.99) <= LAG_MAX
    }

    /// The figures of a verdict: all that were begun have been answered.
    pub fn is_whole(&self) -> bool {
        self.failed.count() == 0 && self.begun == self.answered.len() as u64
    }

    pub fn describe(&self) -> String {
        format!("{} begun, {} answered; generator's lag {}", self.begun, self.answered.len(), self.lag)
    }
}

/// What scheduled connections ask.
#[derive(Clone)]
pub struct Plan {
    pub server: SocketAddr,
    pub path: String,
}

impl Plan {
    pub fn whoami(server: SocketAddr) -> Self {
        Self { server, path: "/whoami".to_owned() }
    }

    /// Connections at `rate` per second, which may depend on the time since the begin, until `over`; each asks once,
    /// with `Connection: close`, and sees the server close.
    pub fn run(self, rate: impl Fn(Duration) -> f64 + 'static, over: &Over) -> JoinHandle<Fresh> {
        let over = over.clone();
        spawn_local(async move {
            let account = Rc::new(RefCell::new(Fresh::default()));
            let mut live = Vec::new();
            let began = Instant::now();
            let mut meant = began;
            while !over.is_set() {
                while meant <= Instant::now() {
                    live.push(spawn_local(once(self.clone(), account.borrow().begun, meant, Rc::clone(&account))));
                    account.borrow_mut().begun += 1;
                    meant += Duration::from_secs_f64(1.0 / rate(meant - began).max(0.1));
                }
                live.retain(|task| !task.is_finished());
                sleep_until(meant.min(Instant::now() + Duration::from_millis(50)).into()).await;
            }
            for task in live {
                // It has a time limit of its own.
                let _ = task.await;
            }
            account.take()
        })
    }
}

async fn once(plan: Plan, number: u64, meant: Instant, account: Rc<RefCell<Fresh>>) {
    account.borrow_mut().lag.record(meant.elapsed());
    match in_time(ask_once(&plan, number, meant)).await {
        Ok(answered) => account.borrow_mut().answered.push(answered),
        Err(error) => {
            let mut account = account.borrow_mut();
            let after = meant.elapsed();
            account.failed.note(|| format!("connection {number}, {after:.2?} after it was meant to begin: {error}"));
            account.failed_at.push((meant, error.to_string()));
        }
    }
}

async fn ask_once(plan: &Plan, number: u64, meant: Instant) -> io::Result<Answered> {
    let begun = Instant::now();
    let mut client = Client::connect_from(plan.server, number as usize, 0).await?;
    client.send(client::get(&plan.path, true).as_bytes()).await?;
    let answer = client.answer().await?;
    let at = Instant::now();
    let who = if plan.path == "/whoami" { Some(client::whoami(&answer)?) } else { None };
    if answer.status != 200 {
        return Err(client::wrong(format!("{} answered {}", plan.path, answer.status)));
    }
    client.closed().await?;
    Ok(Answered { meant, begun, at, who })
}

/// A request's outcome, within [`ANSWER_MAX`].
pub async fn in_time<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match timeout(ANSWER_MAX, work).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer")),
    }
}

/// What clients saw that keep their connections.
#[derive(Default)]
pub struct Kept {
    pub asked: u64,
    pub waits: Histogram,
    pub connections: u64,
    /// The server announced the end with an answer.
    pub announced: u64,
    /// The server closed while nothing was under way.
    pub closed_idle: u64,
    /// A request was under way and got no complete answer, or a connection could not be made.
    pub failed: Faults,
}

impl Kept {
    pub fn describe(&self) -> String {
        format!(
            "{} requests on {} connections, {}; {} ends announced, {} while idle",
            self.asked, self.connections, self.waits, self.announced, self.closed_idle
        )
    }
}

/// `count` clients that ask /whoami again and again, with pauses of 5 to 20 ms, and connect anew when the server closes.
pub fn keep(server: SocketAddr, count: usize, over: &Over) -> (Rc<RefCell<Kept>>, Vec<JoinHandle<()>>) {
    let account = Rc::new(RefCell::new(Kept::default()));
    let one = |number| spawn_local(stay(server, Random::of(4, number), Rc::clone(&account), over.clone()));
    let tasks = (0..count).map(one).collect();
    (account, tasks)
}

async fn stay(server: SocketAddr, mut random: Random, account: Rc<RefCell<Kept>>, over: Over) {
    while !over.is_set() {
        let mut client = match in_time(Client::connect(server)).await {
            Ok(client) => client,
            Err(error) => {
                account.borrow_mut().failed.note(|| format!("connecting a kept connection: {error}"));
                sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        account.borrow_mut().connections += 1;
        if let Err(error) = keep_asking(&mut client, &mut random, &account, &over).await {
            account.borrow_mut().failed.note(|| format!("a kept connection: {error}"));
        }
    }
}

async fn keep_asking(client: &mut Client, random: &mut Random, account: &RefCell<Kept>, over: &Over) -> io::Result<()> {
    while !over.is_set() {
        let began = Instant::now();
        let answer = in_time(client.get("/whoami")).await?;
        client::whoami(&answer)?;
        {
            let mut account = account.borrow_mut();
            account.asked += 1;
            account.waits.record(began.elapsed());
            if answer.close {
                account.announced += 1;
                return Ok(());
            }
        }
        tokio::select! {
            () = sleep(random.milliseconds(5, 20)) => {}
            closed = client.closed() => {
                account.borrow_mut().closed_idle += 1;
                return closed;
            }
        }
    }
    Ok(())
}

/// Waits for clients that have been told to end.
pub async fn all(tasks: Vec<JoinHandle<()>>) -> Result<(), String> {
    for task in tasks {
        timeout(ANSWER_MAX * 2, task)
            .await
            .map_err(|_| "a client of the proof does not stop".to_owned())?
            .map_err(|error| format!("a client of the proof: {error}"))?;
    }
    Ok(())
}

/// One connection, one question.
pub async fn ask_whoami(server: SocketAddr) -> io::Result<Whoami> {
    let mut client = Client::connect(server).await?;
    client.send(client::get("/whoami", true).as_bytes()).await?;
    client::whoami(&client.answer().await?)
}

/// Connects until `executor` is met; the connection has been answered once.
pub async fn reach(server: SocketAddr, executor: usize) -> Result<(Client, Whoami), String> {
    let tries = async {
        for _ in 0..1000 {
            let mut client = Client::connect(server).await?;
            let who = client::whoami(&in_time(client.get("/whoami")).await?)?;
            if who.executor == executor {
                return Ok((client, who));
            }
            client.reset();
        }
        Err(client::wrong("1,000 connections and none reached it"))
    };
    tries.await.map_err(|error: io::Error| format!("reaching executor {executor}: {error}"))
}

/// The middle of some figures, and the worst: the last in order.
pub fn middle_and_worst(mut figures: Vec<Duration>) -> (Duration, Duration) {
    figures.sort_unstable();
    let middle = figures.get(figures.len() / 2).copied().unwrap_or_default();
    (middle, figures.last().copied().unwrap_or_default())
}
