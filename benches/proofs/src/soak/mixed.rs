//! Phase B: clients that each do one act after another, by chance from a seed. The load breathes in a cycle of 20 s: all
//! clients, then a few, then one that asks now and then, so that executors nap, park, and have to be woken.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

use super::acts::{ACTS, Act};
use super::watch::{self, Watched};
use super::{SUSPICIOUS, Seen, WORKLOAD_BODY};
use crate::random::{self, Random};
use crate::report::Progress;
use crate::server::Server;

/// An act that takes longer counts as unanswered. The longest in order is a slow reader's, about 12 s.
const ACT_MAX: Duration = Duration::from_secs(40);
const CYCLE: Duration = Duration::from_secs(20);
const ALL_UNTIL: Duration = Duration::from_secs(12);
const FEW_UNTIL: Duration = Duration::from_secs(16);
const FEW: usize = 6;

/// What all clients share.
pub struct Stage {
    pub server: SocketAddr,
    /// Bodies are cut from here.
    pub block: Vec<u8>,
    pub seen: RefCell<Seen>,
    began: Instant,
}

/// One client.
pub struct Actor {
    pub stage: Rc<Stage>,
    pub number: usize,
    pub random: Random,
}

impl Stage {
    /// How long a client has to wait until it may act, and whether almost nobody else does.
    fn admit(&self, number: usize) -> Duration {
        let at = Duration::from_nanos((self.began.elapsed().as_nanos() % CYCLE.as_nanos()) as u64);
        let admitted = if at < ALL_UNTIL {
            usize::MAX
        } else if at < FEW_UNTIL {
            FEW
        } else {
            1
        };
        if number < admitted { Duration::ZERO } else { CYCLE - at }
    }

    fn is_quiet(&self) -> bool {
        self.began.elapsed().as_nanos() % CYCLE.as_nanos() > FEW_UNTIL.as_nanos()
    }

    /// A body went to the server and came back.
    pub fn echoed(&self, time: Duration) {
        self.seen.borrow_mut().echoes.record(time);
    }

    pub fn waited(&self, what: &str, time: Duration) {
        let mut seen = self.seen.borrow_mut();
        if time > SUSPICIOUS {
            let at = self.began.elapsed().as_secs_f64();
            seen.suspicious.note(|| format!("{what} took {time:.2?}, until {at:.3} s"));
        }
        if self.is_quiet() { seen.waits_quiet.record(time) } else { seen.waits.record(time) }
    }
}

/// Runs the phase; what was seen, and the server's samples.
pub async fn run(server: &Server, clients: usize, time: Duration, seed: u64) -> Result<(Seen, Watched), String> {
    let stage = Rc::new(Stage {
        server: server.address(),
        block: random::block(seed, 2 * WORKLOAD_BODY),
        seen: RefCell::default(),
        began: Instant::now(),
    });
    stage.seen.borrow_mut().acts = ACTS.iter().map(|act| (act.name, 0)).collect();
    let over = Rc::new(Cell::new(false));
    let watcher = spawn_local(watch::watch(server.pid(), Rc::clone(&over)));
    let deadline = Instant::now() + time;
    let clients: Vec<_> = (0..clients)
        .map(|number| Actor { stage: Rc::clone(&stage), number, random: Random::of(seed, number) })
        .map(|actor| spawn_local(actor.act_until(deadline)))
        .collect();
    let lag = spawn_local(watch::lag(Rc::clone(&over)));
    let mut progress = Progress::new();
    for mut client in clients {
        while timeout(Duration::from_secs(1), &mut client).await.is_err() {
            progress.say(|| {
                let seen = stage.seen.borrow();
                let worst = seen.waits.longest().max(seen.waits_quiet.longest());
                let (wrong, unanswered) = (seen.wrong.count(), seen.unanswered.count());
                format!(
                    "{} waits, worst {worst:.2?}, {wrong} wrong, {unanswered} unanswered; {}",
                    seen.waits.count(),
                    Watched::now(server)
                )
            });
        }
    }
    over.set(true);
    let watched = watcher.await.map_err(|error| format!("the sampling task: {error}"))?;
    let mut seen = stage.seen.take();
    seen.lag = lag.await.map_err(|error| format!("the lag task: {error}"))?;
    Ok((seen, watched))
}

impl Actor {
    async fn act_until(mut self, deadline: Instant) {
        // Not all at once at the start.
        sleep(self.random.milliseconds(0, 500)).await;
        while Instant::now() < deadline {
            let wait = self.stage.admit(self.number);
            if !wait.is_zero() {
                sleep(wait.min(deadline.saturating_duration_since(Instant::now()))).await;
                continue;
            }
            if self.stage.is_quiet() {
                sleep(self.random.milliseconds(1, 700)).await;
            }
            let index = self.choose();
            let (act, began) = (&ACTS[index], Instant::now());
            let outcome = timeout(ACT_MAX, (act.perform)(&mut self)).await;
            self.note(act, index, began, outcome.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())));
        }
    }

    fn choose(&mut self) -> usize {
        let all: usize = ACTS.iter().map(|act| act.weight).sum();
        let mut left = self.random.below(all);
        ACTS.iter()
            .position(|act| {
                let here = left < act.weight;
                left = left.saturating_sub(act.weight);
                here
            })
            .unwrap_or(0)
    }

    fn note(&self, act: &Act, index: usize, began: Instant, outcome: io::Result<()>) {
        let mut seen = self.stage.seen.borrow_mut();
        seen.acts[index].1 += 1;
        let Err(error) = outcome else { return };
        let text = || {
            let (at, time) = ((began - self.stage.began).as_secs_f64(), began.elapsed());
            format!("{} by client {} at {at:.3} s, after {time:.2?}: {error}", act.name, self.number)
        };
        match error.kind() {
            io::ErrorKind::InvalidData => seen.wrong.note(text),
            _ => seen.unanswered.note(text),
        }
    }
}
