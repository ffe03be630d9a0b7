//! What the supervisor decides, and nothing of how it is done.
//!
//! [`Policy::step`] is a function `(state, event, now) -> actions`. There is no executor in here, no
//! socket, no thread and no clock: the supervisor's loop turns what it hears into an [`Event`], says
//! what time it is, and carries out the [`Action`]s in the order given. Jitter comes from a seed. So the
//! whole of it is tested by a seeded simulation (`policy/sim.rs`), which replays any history it fails on.
//!
//! The loop's side of the bargain:
//! - Events that are waiting go in first, then one [`Event::Tick`] if [`Policy::next_deadline`] has
//!   passed. Only `Tick` lets a deadline strike: a `Ready` that sat in the mailbox while the process was
//!   stopped is believed, not overtaken by its own timeout.
//! - Reports may come twice, late or never. Those of an earlier generation or thread are ignored.
//! - After [`Action::Exit`] every event is ignored.
//!
//! Not here yet: stalls, scaling by load, upgrade, a pause between "not ready" and the drain. Each is an
//! event with an arm in `step`, and where it lasts, a state of the slot.

mod config;
#[cfg(test)]
mod defects;
mod message;
#[cfg(test)]
mod sim;
mod slot;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

#[expect(unused_imports, reason = "the loop does not make use of them yet")]
pub use config::{Config, HangPolicy, RestartPolicy, Scaling};
#[expect(unused_imports, reason = "the loop does not make use of them yet")]
pub use message::{
    Action, DrainReason, End, Event, Failure, NotReady, Outcome, Quarantine, Readiness, ScaleRefusal, SlotLoad,
    StopMode, Stopped, TargetReason, UpgradeRefusal,
};
use slot::{Limit, Random, Slot, State, Thread, Verdict, later};
#[cfg_attr(not(test), expect(unused_imports, reason = "for the handle's view of the slots"))]
pub use slot::{SlotState, SlotStatus};

/// How long a generation told to stop at once may take before its thread is given up.
///
/// A generation drops its connections in well under a millisecond; five seconds is for one that sits in
/// a system call or a computation and may yet return.
pub const STOP_GRACE: Duration = Duration::from_secs(5);

/// A tick this much later than its deadline means that the whole process stood still (SIGSTOP, a paused
/// virtual machine): the executors did not run either, so their time to start or stop begins anew, once.
pub const LATE_TICK: Duration = Duration::from_secs(1);

/// The supervisor's state of mind.
#[derive(Debug)]
pub struct Policy {
    config: Config,
    slots: Vec<Slot>,
    phase: Phase,
    /// The latest `now`. Time does not run backwards in here, whatever the caller says.
    latest: Option<Instant>,
    random: Random,
    table: Vec<u16>,
    readiness: Readiness,
    /// Filled during one step, empty between steps.
    actions: Vec<Action>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    New,
    Starting,
    Running,
    /// The eager start has failed, the others are being stopped.
    Failing {
        slot: u16,
        failure: Failure,
    },
    Stopping {
        how: Stopped,
        drain_until: Option<Instant>,
        failed: u16,
    },
    Exited,
}

impl Policy {
    /// A policy for `slots` slots, numbered from 0. `seed` decides the jitter and nothing else.
    ///
    /// # Panics
    /// If there is no slot.
    pub fn new(config: Config, slots: u16, seed: u64) -> Self {
        assert!(slots > 0, "a supervisor needs at least one slot");
        Self {
            config,
            slots: (0..slots).map(Slot::new).collect(),
            phase: Phase::New,
            latest: None,
            random: Random::new(seed),
            table: Vec::new(),
            readiness: Readiness::NotReady(NotReady::Starting),
            actions: Vec::new(),
        }
    }

    /// Takes in one event and says what is to be done about it, in order.
    pub fn step(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let now = self.latest.map_or(now, |latest| latest.max(now));
        self.latest = Some(now);
        if self.phase == Phase::Exited {
            return Vec::new();
        }
        match event {
            Event::Start => self.start(now),
            Event::Ready { slot, generation } => self.ready(slot, generation, now),
            Event::Ended { slot, generation, how } => self.ended(slot, generation, how, now),
            Event::ThreadDied { slot, thread } => self.thread_died(slot, thread, now),
            Event::Stalled { .. }
            | Event::Starved { .. }
            | Event::Recovered { .. }
            | Event::Load { .. }
            | Event::Scale { .. }
            | Event::Upgrade
            | Event::SuccessorReady { .. }
            | Event::SuccessorFailed { .. } => {}
            Event::Stop(mode) => self.stop(mode, now),
            Event::Tick => self.tick(now),
        }
        self.settle();
        std::mem::take(&mut self.actions)
    }

    /// When to send the next [`Event::Tick`] if nothing else happens. `None`: nothing is pending.
    pub fn next_deadline(&self) -> Option<Instant> {
        let drain = match self.phase {
            Phase::Exited => return None,
            Phase::Stopping { drain_until, .. } => drain_until,
            _ => None,
        };
        self.slots.iter().filter_map(|slot| slot.state.deadline()).chain(drain).min()
    }

    /// How often to take a sample for [`Event::Load`]. `None`: automatic scaling is off.
    #[cfg_attr(not(test), expect(dead_code, reason = "the loop takes no samples yet"))]
    pub fn sample_period(&self) -> Option<Duration> {
        let max = self.slots.len();
        (usize::from(self.config.slots_min) < max).then_some(self.config.scaling.period)
    }

    /// How many executors are to run.
    #[cfg_attr(not(test), expect(dead_code, reason = "for the handle's view of the slots"))]
    pub fn target(&self) -> u16 {
        self.slots.len() as u16
    }

    /// What a load balancer is told at present.
    #[cfg_attr(not(test), expect(dead_code, reason = "for the handle's view of the slots, and readiness checks"))]
    pub fn readiness(&self) -> Readiness {
        self.readiness
    }

    /// Every slot as it stands, in order.
    #[cfg_attr(not(test), expect(dead_code, reason = "for the handle's view of the slots, and readiness checks"))]
    pub fn slots(&self) -> impl Iterator<Item = SlotStatus> + '_ {
        self.slots.iter().map(Slot::status)
    }
}

/// The events.
impl Policy {
    fn start(&mut self, now: Instant) {
        if self.phase != Phase::New {
            return;
        }
        self.phase = Phase::Starting;
        for index in 0..self.slots.len() {
            self.begin(index, now);
        }
    }

    fn ready(&mut self, slot: u16, generation: u32, now: Instant) {
        let Some(slot) = self.slots.get_mut(usize::from(slot)) else {
            return;
        };
        if slot.generation == generation && matches!(slot.state, State::Starting(_)) {
            slot.state = State::Ready { since: now };
        }
    }

    fn ended(&mut self, slot: u16, generation: u32, how: End, now: Instant) {
        let index = usize::from(slot);
        match self.slots.get(index) {
            Some(slot) if slot.generation == generation && slot.state.is_live() => {
                self.generation_over(index, Some(how), now);
            }
            // Given up, and back after all: at least its thread can be had.
            Some(slot) if slot.generation == generation && slot.holds == Thread::Abandoned => {
                self.retire_thread(index);
            }
            _ => {}
        }
    }

    fn thread_died(&mut self, slot: u16, thread: u32, now: Instant) {
        let index = usize::from(slot);
        match self.slots.get(index) {
            Some(slot) if slot.thread == thread && slot.holds != Thread::None => {
                let live = slot.state.is_live();
                self.retire_thread(index);
                if live {
                    self.generation_over(index, None, now);
                }
            }
            _ => {}
        }
    }

    fn stop(&mut self, mode: StopMode, now: Instant) {
        match self.phase {
            Phase::New | Phase::Starting | Phase::Running => self.begin_stop(mode, now),
            Phase::Stopping { .. } if mode == StopMode::Now => {
                self.cut_drain(Stopped::Interrupted, now);
            }
            Phase::Stopping { .. } | Phase::Failing { .. } | Phase::Exited => {}
        }
    }

    fn tick(&mut self, now: Instant) {
        if let Phase::Stopping { drain_until: Some(until), .. } = self.phase
            && until <= now
        {
            self.cut_drain(Stopped::DeadlinePassed, now);
        }
        for index in 0..self.slots.len() {
            let state = &mut self.slots[index].state;
            if !state.strikes(now, self.config.start_timeout) {
                continue;
            }
            match state {
                State::Backoff { .. } => self.begin(index, now),
                State::Starting(_) => self.start_timed_out(index, now),
                State::Stopping(_) => self.abandon(index),
                State::Idle | State::Ready { .. } | State::Draining | State::Quarantined | State::Ended => {}
            }
        }
    }
}

/// What the events lead to.
impl Policy {
    fn begin(&mut self, index: usize, now: Instant) {
        let slot = &mut self.slots[index];
        let fresh_thread = slot.holds != Thread::Held;
        slot.generation += 1;
        slot.thread += u32::from(fresh_thread);
        slot.holds = Thread::Held;
        slot.state = State::Starting(Limit::new(now, self.config.start_timeout));
        self.actions.push(Action::StartGeneration {
            slot: slot.index,
            generation: slot.generation,
            thread: slot.thread,
            fresh_thread,
        });
    }

    /// A live generation is no more. `how` is `None` if its thread went with it.
    fn generation_over(&mut self, index: usize, how: Option<End>, now: Instant) {
        let draining = self.slots[index].state == State::Draining;
        match &mut self.phase {
            Phase::Running => return self.restart(index, now),
            Phase::Starting => {
                self.lay_down(index);
                return self.fail_start(index, Failure::from_end(how), now);
            }
            Phase::Stopping { how: outcome, failed, .. } if draining => match how {
                Some(End::Drained) => {}
                Some(End::Stopped) => *outcome = Stopped::DeadlinePassed,
                _ => *failed += 1,
            },
            _ => {}
        }
        self.lay_down(index);
    }

    fn restart(&mut self, index: usize, now: Instant) {
        let verdict = self.slots[index].fail(&self.config.restart, &mut self.random, now);
        match verdict {
            Verdict::RestartAt(until) if until <= now => self.begin(index, now),
            Verdict::RestartAt(until) => self.slots[index].state = State::Backoff { until },
            Verdict::Quarantine => {
                self.retire_thread(index);
                self.quarantine(index, Quarantine::CrashLoop);
            }
        }
    }

    fn start_timed_out(&mut self, index: usize, now: Instant) {
        if self.phase == Phase::Starting {
            self.fail_start(index, Failure::StartTimedOut, now);
        } else {
            self.stop_now(index, now);
        }
    }

    fn fail_start(&mut self, index: usize, failure: Failure, now: Instant) {
        let slot = self.slots[index].index;
        self.phase = Phase::Failing { slot, failure };
        self.actions.push(Action::StartFailed { slot, failure });
        for other in 0..self.slots.len() {
            self.stop_now(other, now);
        }
    }

    fn begin_stop(&mut self, mode: StopMode, now: Instant) {
        let drain_until = match mode {
            StopMode::Now => None,
            StopMode::Drain { deadline } => Some(later(now, deadline.unwrap_or(self.config.drain_deadline))),
        };
        self.phase =
            Phase::Stopping { how: drain_until.map_or(Stopped::AtOnce, |_| Stopped::Drained), drain_until, failed: 0 };
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            match (slot.state, drain_until) {
                (State::Ready { .. }, Some(deadline)) => {
                    slot.state = State::Draining;
                    let slot = slot.index;
                    self.actions.push(Action::Drain { slot, deadline, why: DrainReason::Stop });
                }
                (State::Idle | State::Backoff { .. }, _) => self.lay_down(index),
                // A generation that is still starting has no connection to finish.
                _ => self.stop_now(index, now),
            }
        }
    }

    /// Ends the drain for the generations that are not done with it.
    fn cut_drain(&mut self, why: Stopped, now: Instant) {
        let draining = self.slots.iter().any(|s| s.state == State::Draining);
        if let Phase::Stopping { how, drain_until, .. } = &mut self.phase {
            *drain_until = None;
            if draining {
                *how = why;
            }
        }
        for index in 0..self.slots.len() {
            self.stop_now(index, now);
        }
    }

    /// Tells the slot's generation to stop, unless there is none or it has been told already.
    fn stop_now(&mut self, index: usize, now: Instant) {
        let slot = &mut self.slots[index];
        if slot.state.is_live() && !matches!(slot.state, State::Stopping(_)) {
            slot.state = State::Stopping(Limit::new(now, STOP_GRACE));
            self.actions.push(Action::StopNow { slot: slot.index });
        }
    }

    /// The generation has not answered a stop: nobody can say what its thread still holds, so the slot
    /// gets no other.
    fn abandon(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.holds = Thread::Abandoned;
        let (slot, thread) = (slot.index, slot.thread);
        self.actions.push(Action::Abandon { slot, thread });
        if self.phase == Phase::Running {
            self.quarantine(index, Quarantine::Stuck);
        } else {
            self.slots[index].state = State::Ended;
        }
    }

    fn quarantine(&mut self, index: usize, reason: Quarantine) {
        let slot = &mut self.slots[index];
        slot.state = State::Quarantined;
        let slot = slot.index;
        self.actions.push(Action::Quarantined { slot, reason });
    }

    /// The slot is done for good.
    fn lay_down(&mut self, index: usize) {
        self.slots[index].state = State::Ended;
        self.retire_thread(index);
    }

    fn retire_thread(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        if slot.holds != Thread::None {
            slot.holds = Thread::None;
            let (slot, thread) = (slot.index, slot.thread);
            self.actions.push(Action::Join { slot, thread });
        }
    }
}

/// What follows from the slots' states, whichever event led to them.
impl Policy {
    fn settle(&mut self) {
        let all = |test: fn(&State) -> bool| self.slots.iter().all(|s| test(&s.state));
        let started = self.phase == Phase::Starting && all(|s| matches!(s, State::Ready { .. }));
        if started {
            self.phase = Phase::Running;
        }
        self.settle_table();
        self.settle_readiness();
        if started {
            self.actions.push(Action::Started);
        }
        if let Some(outcome) = self.outcome() {
            self.phase = Phase::Exited;
            self.actions.push(Action::Exit(outcome));
        }
    }

    /// Before everything has started there is no table, and the kernel spreads over all slots; during a
    /// stop it no longer matters.
    fn settle_table(&mut self) {
        let active = self.active();
        if !active.is_empty() && active != self.table {
            self.table.clone_from(&active);
            self.actions.push(Action::SetActive(active));
        }
    }

    fn settle_readiness(&mut self) {
        let quarantined = self.slots.iter().filter(|s| s.state == State::Quarantined);
        let readiness = match self.phase {
            Phase::New | Phase::Starting => Readiness::NotReady(NotReady::Starting),
            Phase::Running if quarantined.count() * 2 > self.slots.len() => {
                Readiness::NotReady(NotReady::MostQuarantined)
            }
            Phase::Running if self.active().is_empty() => Readiness::NotReady(NotReady::NoActiveSlot),
            Phase::Running => Readiness::Ready,
            _ => Readiness::NotReady(NotReady::Stopping),
        };
        if readiness != self.readiness {
            self.readiness = readiness;
            self.actions.push(Action::Readiness(readiness));
        }
    }

    fn active(&self) -> Vec<u16> {
        let ready = |slot: &&Slot| matches!(slot.state, State::Ready { .. });
        match self.phase {
            Phase::Running => self.slots.iter().filter(ready).map(|s| s.index).collect(),
            _ => Vec::new(),
        }
    }

    fn outcome(&self) -> Option<Outcome> {
        let mut states = self.slots.iter().map(|slot| slot.state);
        let abandoned = || {
            let left = self.slots.iter().filter(|s| s.holds == Thread::Abandoned);
            // At most one for each slot, and slots are counted in u16.
            left.count() as u16
        };
        match self.phase {
            Phase::Running if states.all(|s| s == State::Quarantined) => {
                Some(Outcome::AllQuarantined { abandoned: abandoned() })
            }
            Phase::Failing { slot, failure } if !states.any(|s| s.is_live()) => {
                let abandoned = abandoned();
                Some(Outcome::StartFailed { slot, failure, abandoned })
            }
            Phase::Stopping { how, failed, .. } if !states.any(|s| s.is_live()) => {
                let abandoned = abandoned();
                Some(Outcome::Stopped { how, handed_over: false, failed, abandoned })
            }
            _ => None,
        }
    }
}
