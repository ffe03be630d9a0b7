//! What goes into the policy and what comes out: events, actions, and the words they use.

use std::time::{Duration, Instant};

#[cfg(doc)]
use super::Config;

/// What the supervisor's loop has heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Begin: start the first generation of every slot. Only the first counts.
    Start,
    /// A generation accepts connections.
    Ready { slot: u16, generation: u32 },
    /// A generation is over, its connections are closed; its thread lives and waits for the next.
    Ended { slot: u16, generation: u32, how: End },
    /// An executor's thread has ended, with whatever generation it had. `thread` is the number from
    /// [`Action::StartGeneration`].
    ThreadDied { slot: u16, thread: u32 },
    /// The operator or the embedder wants an end. `Now` cuts a drain short; a second `Drain` is ignored.
    Stop(StopMode),
    /// A deadline may have passed. Harmless at any time.
    Tick,
    // Stalled, Recovered, Load and Upgrade belong here.
}

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Close every connection.
    Now,
    /// Finish what is running, at most for so long; `None` is [`Config::drain_deadline`].
    Drain { deadline: Option<Duration> },
}

/// How a generation ended, in its own words. Messages and panic payloads stay with the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As asked: every connection was finished.
    Drained,
    /// As asked: connections that were left have been closed.
    Stopped,
    /// The start-up code answered with an error.
    StartFailed,
    /// A panic escaped.
    Panicked,
    /// A background task answered with an error.
    Failed,
}

/// Why a generation is held to have failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The start-up code answered with an error.
    StartFailed,
    /// It was not ready within [`Config::start_timeout`].
    StartTimedOut,
    /// A panic escaped.
    Panicked,
    /// A background task answered with an error.
    Failed,
    /// It ended in good order, but nobody had asked it to.
    EndedUnasked,
    /// Its thread ended.
    ThreadDied,
}

impl Failure {
    /// What an end is called that came too early; without an end, the thread is gone.
    pub(super) fn from_end(how: Option<End>) -> Self {
        match how {
            None => Self::ThreadDied,
            Some(End::StartFailed) => Self::StartFailed,
            Some(End::Panicked) => Self::Panicked,
            Some(End::Failed) => Self::Failed,
            Some(End::Drained | End::Stopped) => Self::EndedUnasked,
        }
    }
}

/// What the supervisor's loop is to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start this generation, on a new thread or on the one the slot has. Threads are numbered within
    /// their slot, from 1, as generations are.
    StartGeneration { slot: u16, generation: u32, thread: u32, fresh_thread: bool },
    /// Tell the generation to finish what is running. The policy keeps the deadline; the executor may
    /// use it to pace itself.
    Drain { slot: u16, deadline: Instant },
    /// Tell the generation to close its connections and end.
    StopNow { slot: u16 },
    /// This thread has nothing left to run, or has ended: tell it to return, and join it.
    Join { slot: u16, thread: u32 },
    /// This thread did not answer a stop: leave it behind. Should it come back before the exit, a `Join`
    /// follows.
    Abandon { slot: u16, thread: u32 },
    /// The steering table: the slots that new connections may go to, ascending, never empty. When no
    /// slot is ready the last table stands, and connections wait in the listeners' queues.
    SetActive(Vec<u16>),
    /// Readiness has changed. At first it is `NotReady(Starting)`.
    Readiness(Readiness),
    /// Every first generation is ready: `start()` resolves.
    Started,
    /// A first generation failed: `start()` will fail and name this slot. The rest is being stopped;
    /// `Exit` follows.
    StartFailed { slot: u16, failure: Failure },
    /// The slot gets no further generation.
    Quarantined { slot: u16, reason: Quarantine },
    /// It is over; the last action ever. A `start()` still waiting fails with this outcome.
    Exit(Outcome),
}

/// Why a slot gets no further generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quarantine {
    /// Too many failures within the window.
    CrashLoop,
    /// Its generation answers neither start nor stop, and holds the slot's thread.
    Stuck,
}

/// What a load balancer is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    NotReady(NotReady),
}

/// Why no new traffic should come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotReady {
    /// Not every first generation is ready yet.
    Starting,
    /// More than half of the slots are quarantined.
    MostQuarantined,
    /// No slot is ready at the moment.
    NoActiveSlot,
    /// A stop was asked for, or the start has failed.
    Stopping,
}

/// How it all ended. `abandoned` counts threads that did not answer and were left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was asked to stop, and did. `failed` counts generations that crashed instead of draining.
    Stopped { how: Stopped, failed: u16, abandoned: u16 },
    /// The first generation of this slot failed.
    StartFailed { slot: u16, failure: Failure, abandoned: u16 },
    /// No slot is left that may be started: an error, so that systemd acts.
    AllQuarantined { abandoned: u16 },
}

/// What became of the connections when it was asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Closed at once, as asked.
    AtOnce,
    /// Every generation had finished before the deadline.
    Drained,
    /// The drain reached its deadline; what was left has been closed.
    DeadlinePassed,
    /// A second stop cut the drain short.
    Interrupted,
}
