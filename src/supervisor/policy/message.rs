//! What goes into the policy and what comes out: events, actions, and the words they use.

use std::time::{Duration, Instant};

#[cfg(doc)]
use super::{Config, HangPolicy, Scaling};

/// What the supervisor's loop has heard.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Begin: start the first generation of every slot that is wanted ([`Config::slots_start`]). Only the first counts.
    Start,
    /// A generation accepts connections.
    Ready { slot: u16, generation: u32 },
    /// A generation is over, its connections are closed; its thread lives and waits for the next.
    Ended { slot: u16, generation: u32, how: End },
    /// An executor's thread has ended, with whatever generation it had. `thread` is the number from
    /// [`Action::StartGeneration`].
    ThreadDied { slot: u16, thread: u32 },
    /// No thread could be made for the generation, or its thread ended before it could run one, because the system has no
    /// descriptors, memory or threads to give.
    ThreadRefused { slot: u16, thread: u32 },
    /// The executor has been busy with one turn for longer than [`Config::stall_limit`], and its thread has used that
    /// much CPU. Counts for a generation that serves; a start that takes long has a limit of its own, and so have a drain
    /// and a stop: nobody waits for what would come after.
    Stalled { slot: u16, generation: u32 },
    /// It has been busy for as long, or asleep for longer than it means to be, but its thread got no CPU: stopped by a
    /// signal, throttled, or crowded out. It gets no new connections either, but is never replaced, and does not make the
    /// server not ready: what throttles one executor throttles those of other machines as well, and sending the traffic
    /// there only moves it about. May turn into `Stalled`, and back; the time that counts as a hang is that of `Stalled`
    /// alone.
    Starved { slot: u16, generation: u32 },
    /// The turn or the sleep has ended: it is as before.
    Recovered { slot: u16, generation: u32 },
    /// How busy the slots were, once each [`Scaling::period`]. Slots without an executor may be left out.
    Load { samples: Vec<SlotLoad> },
    /// The operator or the embedder wants so many executors. Answered by [`Action::ScaleAnswer`] in the same step.
    ///
    /// The order sets the target. Where automatic scaling is on, it goes on from there, after [`Scaling::order_hold`]: an
    /// order below [`Config::slots_min`] is in force for so long. That is what Kubernetes does when a deployment is
    /// scaled that has an autoscaler; PM2 and uWSGI have either orders or an algorithm.
    Scale { count: u16 },
    /// The operator or the embedder wants a new process to take over. Answered by exactly one
    /// [`Action::UpgradeAnswer`], at the end of it.
    Upgrade,
    /// The successor serves: this process hands over. `successor` is the number from [`Action::SpawnSuccessor`].
    SuccessorReady { successor: u32 },
    /// The successor could not be spawned, refused, or has exited.
    SuccessorFailed { successor: u32 },
    /// The operator or the embedder wants an end. `Now` cuts a drain short, and the delay before it
    /// ([`Config::drain_delay`]); a second `Drain` is ignored, so that an end may be asked for from two sides.
    Stop(StopMode),
    /// A deadline may have passed. Harmless at any time.
    Tick,
    /// What was found in one look: taken in in this order, and what follows from the slots' states is decided once, after the
    /// last. Where all executors are late together, deciding after each would shrink the table to the one that is looked at
    /// last, and hand it the queues of the others.
    Together(Vec<Event>),
}

/// How busy a slot was since the last sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotLoad {
    pub slot: u16,
    /// Busy time over wall time, 0 to 1.
    pub utilisation: f32,
    /// Connections that wait in its listen queues.
    pub queue: u32,
}

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Close every connection.
    Now,
    /// Finish what is running, at most for so long from when the drain begins; `None` is [`Config::drain_deadline`].
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
    /// It did not begin: the system has no descriptors, memory or threads to give. That is not the slot's fault, nor
    /// anything that another try makes worse, so it is tried again for as long as it takes, and is no step towards
    /// quarantine.
    NoResources,
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
    /// The system has no descriptors, memory or threads to give.
    NoResources,
}

impl Failure {
    /// What an end is called that came too early; without an end, the thread is gone.
    pub(super) fn from_end(how: Option<End>) -> Self {
        match how {
            None => Self::ThreadDied,
            Some(End::StartFailed) => Self::StartFailed,
            Some(End::Panicked) => Self::Panicked,
            Some(End::Failed) => Self::Failed,
            Some(End::NoResources) => Self::NoResources,
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
    /// Tell the generation to finish what is running and accept nothing more. The policy keeps the deadline; the executor
    /// may use it to pace itself. For [`DrainReason::ScaleDown`] the slot has left the table already, and its listeners
    /// stay open.
    Drain { slot: u16, deadline: Instant, why: DrainReason },
    /// Tell the generation to close its connections and end.
    StopNow { slot: u16 },
    /// This thread has nothing left to run, or has ended: tell it to return, and join it. May name a condemned or
    /// abandoned thread that came back after all.
    Join { slot: u16, thread: u32 },
    /// This thread did not answer a stop: leave it behind, and shut its sockets down from outside if that can be done, so
    /// that no client waits for it. Should it come back before the exit, a `Join` follows.
    Abandon { slot: u16, thread: u32 },
    /// The executor hangs and is given up: shut its sockets down from outside (never close them), leave its thread behind
    /// and put a fresh seat into the slot. A `StartGeneration` with a fresh thread follows, now or after the backoff, or
    /// the slot is quarantined. Should the thread come back, a `Join` follows.
    Condemn { slot: u16, thread: u32, generation: u32 },
    /// The executor hangs, and [`HangPolicy::Abort`] was chosen: end the process as by a crash, so that its core can be
    /// looked at.
    Abort { slot: u16 },
    /// The steering table: the slots that new connections may go to, ascending, never empty. When no
    /// slot is ready the last table stands, and connections wait in the listeners' queues.
    SetActive(Vec<u16>),
    /// The slots whose listen queues the supervisor is to empty into active executors, ascending; the whole set each time
    /// it changes, at first empty. They are those that have nobody able to accept, as long as somebody else is.
    Rescue(Vec<u16>),
    /// Put the steering table in force again as it was last set: a successor that came to nothing may have replaced it.
    Reattach,
    /// Nothing starts any more: empty the queues of the last [`Action::Rescue`] once more and let go of the listeners, before
    /// the orders that follow. No other `Rescue` comes, and that one is over. A generation that drains still holds its own.
    CloseListeners,
    /// Readiness has changed. At first it is `NotReady(Starting)`.
    Readiness(Readiness),
    /// Every first generation that was wanted is ready: `start()` resolves.
    Started,
    /// A first generation failed: `start()` will fail and name this slot. The rest is being stopped;
    /// `Exit` follows.
    StartFailed { slot: u16, failure: Failure },
    /// A later generation was not ready within [`Config::start_timeout`]; `StopNow` follows. For the log.
    StartTimedOut { slot: u16 },
    /// The slot gets no further generation.
    Quarantined { slot: u16, reason: Quarantine },
    /// So many executors are to run from now on, by order or by load: for the log.
    Target { count: u16, why: TargetReason },
    /// The answer to [`Event::Scale`]: the new target, or why not.
    ScaleAnswer(Result<u16, ScaleRefusal>),
    /// Start the process that is to take over. It has until `deadline` to be ready. Successors are numbered from 1.
    SpawnSuccessor { successor: u32, deadline: Instant },
    /// End that process, ready or not; it is too late.
    KillSuccessor { successor: u32 },
    /// The answer to [`Event::Upgrade`]: `Ok` once the successor serves and the drain begins.
    UpgradeAnswer(Result<(), UpgradeRefusal>),
    /// It is over; the last action ever. A `start()` still waiting fails with this outcome.
    Exit(Outcome),
}

/// Why a generation is told to drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainReason {
    /// Everything ends.
    Stop,
    /// Fewer executors are wanted: this one goes, the rest serves on.
    ScaleDown,
    /// Another process has taken over the listeners.
    Upgrade,
}

/// Why the number of executors that are wanted has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetReason {
    /// Somebody said so.
    Ordered,
    /// The running ones are too busy.
    Busy,
    /// Connections pile up in the listen queues.
    Queue,
    /// One fewer would not be too busy.
    Idle,
    /// An order had left the bounds of automatic scaling, and its time is over.
    Bounds,
}

/// Why an order to scale was not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleRefusal {
    /// There are slots for 1 to `max` executors.
    OutOfRange { max: u16 },
    /// The first generations are not ready yet.
    Starting,
    /// A stop is under way, or another process has taken over.
    Stopping,
    /// An upgrade is under way: the order would not reach the successor, which has a configuration of its own.
    Upgrading,
}

/// Why an upgrade did not take place. There is none for a crash loop: a new binary is what ends one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpgradeRefusal {
    /// The first generations are not ready yet.
    Starting,
    /// A stop is under way, or another process has taken over.
    Stopping,
    /// Another upgrade is under way, and goes on; or its successor has not ended yet.
    AlreadyUpgrading,
    /// The successor was not ready within [`Config::upgrade_timeout`].
    TimedOut,
    /// The successor could not be spawned, refused, or exited.
    Failed,
    /// A stop was ordered before the successor was ready.
    Interrupted,
}

/// Why a slot gets no further generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quarantine {
    /// Too many failures within the window.
    CrashLoop,
    /// Its generation answers neither start nor stop, and holds the slot's thread.
    Stuck,
    /// [`RestartPolicy::leaked_max`](super::RestartPolicy::leaked_max) of its executors hung and were left behind.
    Hangs,
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
    /// More of the slots that are wanted are quarantined than
    /// [`ReadinessPolicy::unfit_max`](super::ReadinessPolicy::unfit_max) allows.
    MostQuarantined,
    /// More of them than that are quarantined, or stalled for longer than
    /// [`ReadinessPolicy::stalled_after`](super::ReadinessPolicy::stalled_after).
    Stalled,
    /// No generation serves at the moment, stalled or not.
    NoActiveSlot,
    /// A stop was asked for, or the start has failed.
    Stopping,
}

/// How it all ended. `abandoned` counts threads that did not answer, or hung, and were left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was asked to stop, and did. `failed` counts generations that crashed instead of draining. `handed_over`: another
    /// process serves on.
    Stopped { how: Stopped, handed_over: bool, failed: u16, abandoned: u16 },
    /// The first generation of this slot failed.
    StartFailed { slot: u16, failure: Failure, abandoned: u16 },
    /// Every slot that is wanted is quarantined: an error, so that systemd acts.
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
