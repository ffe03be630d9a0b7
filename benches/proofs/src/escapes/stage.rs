//! What the proof knows of executors and connections at each moment, and how it judges an end.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::client::Whoami;
use crate::histogram::Histogram;
use crate::report::Faults;

/// The client sees a batch of events a little after they happened and in any order: that much later a connect may be
/// seen to be over than the end of a sibling, although it came first.
const BATCH: Duration = Duration::from_millis(3);

/// One escape, as seen from outside.
struct Escape {
    victim: Whoami,
    ordered: Instant,
    /// The first connection of the victim was seen to end.
    first_end: Option<Instant>,
    over: Option<Instant>,
    served_again: bool,
}

#[derive(Default)]
pub struct Seen {
    /// From the order to the end of a victim's connection.
    pub ends: Histogram,
    pub ends_in_body: u64,
    /// From the order to the first answer of the next generation.
    pub restarts: Histogram,
    /// From the first end that a victim's client saw to that answer.
    pub gaps: Histogram,
    pub asked: u64,
    pub pieces: u64,
    pub fresh: u64,
    pub in_flight: u64,
    pub late: u64,
    pub hung: u64,
    pub innocents: Faults,
    pub queued: Faults,
    pub unanswered: Faults,
    pub wrong: Faults,
}

pub struct Stage {
    pub server: SocketAddr,
    pub end_limit: Duration,
    pub changed: Notify,
    pub seen: RefCell<Seen>,
    /// The last few, the newest at the end.
    escapes: RefCell<Vec<Escape>>,
    latest: RefCell<HashMap<usize, u64>>,
    live: RefCell<HashMap<(usize, u64), usize>>,
    stopped: Cell<bool>,
}

/// A connection whose executor is known.
pub struct Known {
    pub who: Whoami,
    since: Instant,
}

impl Stage {
    pub fn new(server: SocketAddr, end_limit: Duration) -> Self {
        Self {
            server,
            end_limit,
            changed: Notify::new(),
            seen: RefCell::default(),
            escapes: RefCell::default(),
            latest: RefCell::default(),
            live: RefCell::default(),
            stopped: Cell::new(false),
        }
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.get()
    }

    pub fn stop(&self) {
        self.stopped.set(true);
    }

    /// The next load may start.
    pub fn restarted(&self) {
        self.stopped.set(false);
    }

    /// An executor has answered.
    pub fn note(&self, who: Whoami) {
        let mut latest = self.latest.borrow_mut();
        let generation = latest.entry(who.executor).or_default();
        *generation = who.generation.max(*generation);
        if let Some(escape) = self.escapes.borrow_mut().last_mut() {
            let next = escape.victim.executor == who.executor && escape.victim.generation < who.generation;
            if next && !escape.served_again {
                escape.served_again = true;
                // When it answers before an end was seen, the end was after the order.
                let gap = escape.first_end.unwrap_or(escape.ordered).elapsed();
                let mut seen = self.seen.borrow_mut();
                seen.restarts.record(escape.ordered.elapsed());
                seen.gaps.record(gap);
                self.changed.notify_one();
            }
        }
    }

    /// Whether the victim's next generation has answered.
    pub fn serves_again(&self) -> bool {
        self.escapes.borrow().last().is_some_and(|escape| escape.served_again)
    }

    pub fn latest(&self, executor: usize) -> u64 {
        self.latest.borrow().get(&executor).copied().unwrap_or(0)
    }

    pub fn register(&self, who: Whoami) -> Known {
        self.note(who);
        *self.live.borrow_mut().entry((who.executor, who.generation)).or_default() += 1;
        Known { who, since: Instant::now() }
    }

    /// Connections that are known to live on this generation.
    pub fn live(&self, who: Whoami) -> usize {
        self.live.borrow().get(&(who.executor, who.generation)).copied().unwrap_or(0)
    }

    pub fn known(&self) -> usize {
        self.live.borrow().values().sum()
    }

    pub fn order(&self, victim: Whoami) {
        let mut escapes = self.escapes.borrow_mut();
        if escapes.len() == 4 {
            escapes.remove(0);
        }
        escapes.push(Escape { victim, ordered: Instant::now(), first_end: None, over: None, served_again: false });
    }

    /// All ends of the escape have been seen, or will not be.
    pub fn over(&self, victim: Whoami, trigger_ended: bool) {
        if let Some(escape) = self.escapes.borrow_mut().last_mut() {
            escape.over = Some(Instant::now());
        }
        let hung = self.live.borrow_mut().remove(&(victim.executor, victim.generation)).unwrap_or(0);
        self.seen.borrow_mut().hung += hung as u64 + u64::from(!trigger_ended);
    }

    fn forget(&self, who: Whoami) {
        if let Some(count) = self.live.borrow_mut().get_mut(&(who.executor, who.generation)) {
            *count = count.saturating_sub(1);
        }
    }

    /// The client itself ends this connection.
    pub fn leave(&self, known: &Known) {
        self.forget(known.who);
    }

    /// A connection whose executor is known has ended, and not by the client.
    pub fn ended(&self, known: &Known, in_body: bool, error: &io::Error) {
        self.forget(known.who);
        let now = Instant::now();
        let mut seen = self.seen.borrow_mut();
        let mut escapes = self.escapes.borrow_mut();
        let Some(escape) = escapes.iter_mut().rev().find(|escape| escape.victim == known.who) else {
            let what = if in_body { "in a body" } else { "kept alive" };
            seen.innocents.note(|| format!("{:?}, {what}, after {:.2?}: {error}", known.who, known.since.elapsed()));
            return;
        };
        escape.first_end.get_or_insert(now);
        let wait = now - escape.ordered.max(known.since);
        seen.ends.record(wait);
        seen.ends_in_body += u64::from(in_body);
        seen.late += u64::from(wait > self.end_limit);
        drop((seen, escapes));
        self.changed.notify_one();
    }

    /// A connection has ended without an answer, so its executor is not known.
    pub fn fresh_failed(&self, began: Instant, connected: Option<Instant>, error: &io::Error) {
        let mut seen = self.seen.borrow_mut();
        let Some(connected) = connected else {
            seen.unanswered.note(|| format!("connect, after {:.2?}: {error}", began.elapsed()));
            return;
        };
        let escapes = self.escapes.borrow();
        let overlapping: Vec<_> =
            escapes.iter().filter(|escape| escape.over.is_none_or(|over| began <= over)).collect();
        let wait = connected.elapsed();
        if overlapping.is_empty() || error.kind() == io::ErrorKind::TimedOut {
            seen.unanswered.note(|| format!("fresh, outside any escape or too late, after {wait:.2?}: {error}"));
        } else if overlapping.iter().any(|escape| escape.first_end.is_none_or(|end| connected <= end + BATCH)) {
            seen.in_flight += 1;
        } else {
            let late = overlapping.iter().filter_map(|escape| Some(connected - escape.first_end?)).max();
            seen.queued
                .note(|| format!("connected {late:.2?} after the victim's first end, reset after {wait:.2?}: {error}"));
        }
    }

    pub fn summary(&self) -> String {
        let seen = self.seen.borrow();
        format!(
            "ends p99 {:.2?}, worst {:.2?}; restarts p50 {:.2?}, p99 {:.2?}; {} innocents, {} in flight, {} queued, {} unanswered",
            seen.ends.percentile(0.99),
            seen.ends.longest(),
            seen.restarts.percentile(0.5),
            seen.restarts.percentile(0.99),
            seen.innocents.count(),
            seen.in_flight,
            seen.queued.count(),
            seen.unanswered.count(),
        )
    }
}
