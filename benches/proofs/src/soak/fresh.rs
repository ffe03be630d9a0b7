//! Phase A: fresh connections, one GET each. They close in three ways, and come from 31 addresses, so that ports in
//! TIME_WAIT do not run out.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::spawn_local;
use tokio::time::timeout;

use super::Seen;
use super::watch::{self, Watched};
use crate::client::{self, Client};
use crate::proc::Sample;
use crate::report::Progress;
use crate::server::Server;

/// After this a request counts as unanswered.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// The least that bounds a run: slower than this, and it is ended.
const CONNECTIONS_PER_SECOND_MIN: u64 = 500;
/// Connections before the first sample, so that what is allocated once is allocated.
const WARM_UP_CONNECTIONS: u64 = 2000;

struct Work {
    server: SocketAddr,
    next: Cell<u64>,
    count: u64,
    deadline: Instant,
    seen: RefCell<Seen>,
}

/// Some traffic, then the server at rest.
pub async fn warm_up(server: &Server) -> Result<Sample, String> {
    load(server, WARM_UP_CONNECTIONS, 64, false).await?;
    server.settled(Duration::from_secs(5)).await
}

/// Runs the phase; what was seen, the server's samples, and the time it took.
pub async fn run(server: &Server, count: u64, concurrency: usize) -> Result<(Seen, Watched, Duration), String> {
    let over = Rc::new(Cell::new(false));
    let watcher = spawn_local(watch::watch(server.pid(), Rc::clone(&over)));
    let lag = spawn_local(watch::lag(Rc::clone(&over)));
    let began = Instant::now();
    let mut seen = load(server, count, concurrency, true).await?;
    let time = began.elapsed();
    over.set(true);
    let watched = watcher.await.map_err(|error| format!("the sampling task: {error}"))?;
    seen.lag = lag.await.map_err(|error| format!("the lag task: {error}"))?;
    Ok((seen, watched, time))
}

async fn load(server: &Server, count: u64, concurrency: usize, talk: bool) -> Result<Seen, String> {
    let work = Rc::new(Work {
        server: server.address(),
        next: Cell::new(0),
        count,
        deadline: Instant::now() + Duration::from_secs(60 + count / CONNECTIONS_PER_SECOND_MIN),
        seen: RefCell::default(),
    });
    let clients: Vec<_> = (0..concurrency).map(|_| spawn_local(connections(Rc::clone(&work)))).collect();
    let mut progress = Progress::new();
    for mut client in clients {
        while timeout(Duration::from_secs(1), &mut client).await.is_err() {
            if talk {
                progress.say(|| {
                    let seen = work.seen.borrow();
                    format!(
                        "{} answered, worst {:.2?}; {}",
                        seen.waits.count(),
                        seen.waits.longest(),
                        Watched::now(server)
                    )
                });
            }
        }
    }
    Ok(work.seen.take())
}

async fn connections(work: Rc<Work>) {
    while work.next.get() < work.count && Instant::now() < work.deadline {
        let number = work.next.get();
        work.next.set(number + 1);
        match timeout(ANSWER_MAX, connection(&work, number)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                work.seen.borrow_mut().wrong.note(|| format!("connection {number}: {error}"));
            }
            Ok(Err(error)) => work.seen.borrow_mut().unanswered.note(|| format!("connection {number}: {error}")),
            Err(_) => {
                work.seen.borrow_mut().unanswered.note(|| format!("connection {number}: nothing after {ANSWER_MAX:?}"))
            }
        }
    }
}

/// One connection, one request. By its number: a third asks the server to close, a third closes, a third resets; every
/// fourth asks /whoami.
async fn connection(work: &Work, number: u64) -> io::Result<()> {
    let began = Instant::now();
    let mut client = Client::connect_from(work.server, number as usize, 0).await?;
    let connected = Instant::now();
    let (asks_close, resets, whoami) = (number.is_multiple_of(3), number % 3 == 1, number % 4 == 1);
    client.send(client::get(if whoami { "/whoami" } else { "/" }, asks_close).as_bytes()).await?;
    let answer = client.answer().await?;
    let waited = connected.elapsed();
    if whoami {
        client::whoami(&answer).map(|_| ())?
    } else {
        client::hello(&answer)?
    }
    if asks_close {
        client.closed().await?;
    } else if resets {
        client.reset();
    }
    let mut seen = work.seen.borrow_mut();
    seen.connects.record(connected - began);
    seen.waits.record(waited);
    Ok(())
}
