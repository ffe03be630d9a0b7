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
//! Each matter has a file: [`stall`], [`target`] with [`scaling`], [`upgrade`], [`stopping`]. Here are the lives of
//! generations, and what follows from the slots' states whichever event led to them: table, rescue, readiness, the end.

mod config;
#[cfg(test)]
mod defects;
mod message;
mod scaling;
#[cfg(test)]
mod sim;
mod slot;
mod stall;
mod stopping;
mod target;
#[cfg(test)]
mod tests;
mod upgrade;

use std::time::{Duration, Instant};

pub use config::{Config, HangPolicy, ReadinessPolicy, RestartPolicy, Scaling};
pub use message::{
    Action, DrainReason, End, Event, Failure, NotReady, Outcome, Quarantine, Readiness, ScaleRefusal, SlotLoad,
    StopMode, Stopped, TargetReason, UpgradeRefusal,
};
use scaling::Scaler;
pub use slot::{FAR, SlotState, SlotStatus, later};
use slot::{Health, Limit, Random, Slot, State, Thread, Verdict};
use upgrade::Upgrade;

/// How long a start that the system had no descriptors, memory or threads for waits at least, where the operator has set
/// the backoff to less: without a pause it would be tried all the time.
pub const SHORTAGE_PAUSE_MIN: Duration = Duration::from_millis(10);

/// Samples of the load are not taken more often than this: without a pause between them the supervisor would do nothing else.
pub const SAMPLE_PERIOD_MIN: Duration = Duration::from_millis(10);

/// The supervisor's state of mind.
#[derive(Debug)]
pub struct Policy {
    config: Config,
    slots: Vec<Slot>,
    phase: Phase,
    /// The latest `now`. Time does not run backwards in here, whatever the caller says.
    latest: Option<Instant>,
    random: Random,
    /// How many slots are wanted.
    target: u16,
    scaler: Scaler,
    upgrade: Upgrade,
    /// How many there have been.
    successors: u32,
    table: Vec<u16>,
    rescue: Vec<u16>,
    readiness: Readiness,
    /// Filled during one step, empty between steps.
    actions: Vec<Action>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    New,
    Starting,
    Running,
    /// A stop has been ordered, readiness says so, and executors go on accepting until all who ask have heard of it.
    LameDuck {
        until: Instant,
        /// For the drain that follows.
        limit: Duration,
    },
    /// The eager start has failed, the others are being stopped.
    Failing {
        slot: u16,
        failure: Failure,
    },
    Stopping {
        how: Stopped,
        drain_until: Option<Instant>,
        handed_over: bool,
        failed: u16,
    },
    Exited,
}

impl Phase {
    /// Whether connections are accepted, and slots that fail come back.
    fn serves(self) -> bool {
        matches!(self, Self::Running | Self::LameDuck { .. })
    }
}

impl Policy {
    /// A policy for `slots` slots, numbered from 0. `seed` decides the jitter and nothing else.
    ///
    /// # Panics
    /// If there is no slot.
    pub fn new(config: Config, slots: u16, seed: u64) -> Self {
        assert!(slots > 0, "a supervisor needs at least one slot");
        Self {
            target: 0,
            scaler: Scaler::new(&config.scaling),
            upgrade: Upgrade::None,
            successors: 0,
            config,
            slots: (0..slots).map(Slot::new).collect(),
            phase: Phase::New,
            latest: None,
            random: Random::new(seed),
            table: Vec::new(),
            rescue: Vec::new(),
            readiness: Readiness::NotReady(NotReady::Starting),
            actions: Vec::new(),
        }
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Takes in one event and says what is to be done about it, in order.
    pub fn step(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let now = self.latest.map_or(now, |latest| latest.max(now));
        self.latest = Some(now);
        if self.phase == Phase::Exited {
            return Vec::new();
        }
        self.take_in(event, now);
        self.settle();
        std::mem::take(&mut self.actions)
    }

    fn take_in(&mut self, event: Event, now: Instant) {
        match event {
            Event::Start => self.start(now),
            Event::Ready { slot, generation } => self.ready(slot, generation, now),
            Event::Ended { slot, generation, how } => self.ended(slot, generation, how, now),
            Event::ThreadDied { slot, thread } => self.thread_over(slot, thread, None, now),
            Event::ThreadRefused { slot, thread } => self.thread_over(slot, thread, Some(End::NoResources), now),
            Event::Stalled { slot, generation } => self.stalled(slot, generation, now),
            Event::Starved { slot, generation } => self.starved(slot, generation, now),
            Event::Recovered { slot, generation } => self.recovered(slot, generation),
            Event::Load { samples } => self.load(&samples, now),
            Event::Scale { count } => self.scale_asked(count, now),
            Event::Upgrade => self.upgrade_asked(now),
            Event::SuccessorReady { successor } => self.successor_ready(successor, now),
            Event::SuccessorFailed { successor } => self.successor_failed(successor),
            Event::Stop(mode) => self.stop(mode, now),
            Event::Tick => self.tick(now),
            Event::Together(events) => events.into_iter().for_each(|event| self.take_in(event, now)),
        }
    }

    /// When to send the next [`Event::Tick`] if nothing else happens. `None`: nothing is pending.
    pub fn next_deadline(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Exited => return None,
            Phase::Stopping { drain_until, .. } => drain_until,
            Phase::LameDuck { until, .. } => Some(until),
            _ => None,
        };
        let serves = self.phase.serves();
        let slots = self.slots.iter().filter_map(|slot| slot.state.deadline(serves));
        slots.chain(phase).chain(self.upgrade.deadline()).min()
    }

    /// How often to take a sample for [`Event::Load`]. `None`: automatic scaling is off.
    pub fn sample_period(&self) -> Option<Duration> {
        let (min, max) = self.bounds();
        (min < max).then_some(self.config.scaling.period.max(SAMPLE_PERIOD_MIN))
    }

    /// How many executors are to run.
    pub fn target(&self) -> u16 {
        self.target
    }

    /// What a load balancer is told at present.
    #[cfg_attr(not(test), expect(dead_code, reason = "for the handle's view of the slots, and readiness checks"))]
    pub fn readiness(&self) -> Readiness {
        self.readiness
    }

    /// Every slot as it stands, in order.
    pub fn slots(&self) -> impl Iterator<Item = SlotStatus> + '_ {
        self.slots.iter().map(Slot::status)
    }
}

/// The events in the lives of generations.
impl Policy {
    fn start(&mut self, now: Instant) {
        if self.phase != Phase::New {
            return;
        }
        self.phase = Phase::Starting;
        let (min, max) = self.bounds();
        self.target = self.config.slots_start.clamp(min, max);
        self.want_more(usize::from(self.target), now);
    }

    fn ready(&mut self, slot: u16, generation: u32, now: Instant) {
        let Some(slot) = self.slots.get_mut(usize::from(slot)) else {
            return;
        };
        if slot.generation == generation && matches!(slot.state, State::Starting(_)) {
            slot.state = State::Ready { since: now, health: Health::Well };
            slot.shortages = 0;
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
            Some(_) => {
                self.reclaim(index, |leaked| leaked.generation == generation);
            }
            None => {}
        }
    }

    /// A thread has ended, with the generation it had; what that says of the generation is `how`.
    fn thread_over(&mut self, slot: u16, thread: u32, how: Option<End>, now: Instant) {
        let index = usize::from(slot);
        match self.slots.get(index) {
            Some(slot) if slot.thread == thread && slot.holds != Thread::None => {
                let live = slot.state.is_live();
                self.retire_thread(index);
                if live {
                    self.generation_over(index, how, now);
                }
            }
            Some(_) => {
                self.reclaim(index, |leaked| leaked.thread == thread);
            }
            None => {}
        }
    }

    fn tick(&mut self, now: Instant) {
        self.tick_phase(now);
        self.tick_upgrade(now);
        for index in 0..self.slots.len() {
            self.tick_slot(index, now);
        }
    }

    fn tick_slot(&mut self, index: usize, now: Instant) {
        let config = &self.config;
        let up = match &mut self.slots[index].state {
            State::Backoff { until } => *until <= now,
            State::Starting(limit) => limit.strikes(now, config.start_timeout, config),
            State::Draining { limit: Some(limit) } => limit.strikes(now, config.drain_deadline, config),
            State::Stopping { limit, .. } => limit.strikes(now, config.stop_grace, config),
            State::Ready { .. } => return self.tick_stalled(index, now),
            _ => false,
        };
        match self.slots[index].state {
            State::Backoff { .. } if up => self.begin(index, now),
            State::Starting(_) if up => self.start_timed_out(index, now),
            State::Draining { .. } if up => self.stop_now(index, now),
            State::Stopping { .. } if up => self.abandon(index),
            _ => {}
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
        match self.phase {
            Phase::Running | Phase::LameDuck { .. } => self.over_in_service(index, how, now),
            Phase::Starting => {
                self.lay_down(index);
                self.fail_start(index, Failure::from_end(how), now);
            }
            _ => {
                self.note_end_of_drain(index, how);
                self.lay_down(index);
            }
        }
    }

    fn over_in_service(&mut self, index: usize, how: Option<End>, now: Instant) {
        let slot = &self.slots[index];
        let retired = matches!(slot.state, State::Draining { .. } | State::Stopping { retired: true, .. });
        match slot.wanted {
            false => self.rest(index),
            // It was on its way out when it was wanted again.
            true if retired => self.begin(index, now),
            true if how == Some(End::NoResources) => {
                let slot = &mut self.slots[index];
                slot.state = State::Backoff { until: slot.go_short(&self.config.restart, &mut self.random, now) };
            }
            true => self.restart(index, now),
        }
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
            let slot = self.slots[index].index;
            self.actions.push(Action::StartTimedOut { slot });
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

    /// Tells the slot's generation to stop, unless there is none or it has been told already.
    fn stop_now(&mut self, index: usize, now: Instant) {
        let slot = &mut self.slots[index];
        if !slot.state.is_live() || matches!(slot.state, State::Stopping { .. }) {
            return;
        }
        let cut = matches!(slot.state, State::Draining { .. });
        let retired = cut || !slot.wanted;
        slot.state = State::Stopping { limit: Limit::new(now, self.config.stop_grace), retired };
        self.actions.push(Action::StopNow { slot: slot.index });
        if let Phase::Stopping { how, .. } = &mut self.phase
            && cut
            && *how == Stopped::Drained
        {
            *how = Stopped::DeadlinePassed;
        }
    }

    /// The generation has not answered a stop: nobody can say what its thread still holds, so the slot
    /// gets no other.
    fn abandon(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.holds = Thread::Abandoned;
        let (slot, thread) = (slot.index, slot.thread);
        self.actions.push(Action::Abandon { slot, thread });
        if self.phase.serves() {
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
        let started =
            self.phase == Phase::Starting && self.wanted().all(|slot| matches!(slot.state, State::Ready { .. }));
        if started {
            self.phase = Phase::Running;
        }
        self.settle_table();
        self.settle_rescue();
        self.settle_readiness();
        if started {
            self.actions.push(Action::Started);
        }
        if let Some(outcome) = self.outcome() {
            self.phase = Phase::Exited;
            self.actions.push(Action::Exit(outcome));
        }
    }

    fn wanted(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|slot| slot.wanted)
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

    /// Whoever is not active has nobody to empty its queue: it is spare, down, on its way in or out, or busy with something
    /// else. Without an active slot there is nobody to hand connections to, and they are better off in the queues.
    fn settle_rescue(&mut self) {
        let active = self.active();
        let mut rescue = Vec::new();
        if !active.is_empty() {
            rescue.extend(self.slots.iter().map(|slot| slot.index).filter(|slot| !active.contains(slot)));
        }
        if rescue != self.rescue {
            self.rescue.clone_from(&rescue);
            self.actions.push(Action::Rescue(rescue));
        }
    }

    fn settle_readiness(&mut self) {
        let readiness = match self.phase {
            Phase::New | Phase::Starting => Readiness::NotReady(NotReady::Starting),
            Phase::Running => self.readiness_in_service(),
            _ => Readiness::NotReady(NotReady::Stopping),
        };
        if readiness != self.readiness {
            self.readiness = readiness;
            self.actions.push(Action::Readiness(readiness));
        }
    }

    /// The ratios are those of the slots that are wanted. A stall that is shorter than
    /// [`ReadinessPolicy::stalled_after`] is no reason, even if no other slot is left.
    fn readiness_in_service(&self) -> Readiness {
        let count = |test: fn(&State) -> bool| self.wanted().filter(|slot| test(&slot.state)).count();
        let all = self.wanted().count();
        let quarantined = count(|state| *state == State::Quarantined);
        let stalled =
            count(|state| matches!(state, State::Ready { health: Health::Stalled { unready: None, .. }, .. }));
        if self.config.readiness.is_unfit(quarantined, all) {
            Readiness::NotReady(NotReady::MostQuarantined)
        } else if self.config.readiness.is_unfit(quarantined + stalled, all) {
            Readiness::NotReady(NotReady::Stalled)
        } else if count(|state| matches!(state, State::Ready { .. })) == 0 {
            Readiness::NotReady(NotReady::NoActiveSlot)
        } else {
            Readiness::Ready
        }
    }

    fn active(&self) -> Vec<u16> {
        match self.phase.serves() {
            true => self.slots.iter().filter(|slot| slot.state.is_active()).map(|slot| slot.index).collect(),
            false => Vec::new(),
        }
    }

    fn outcome(&self) -> Option<Outcome> {
        if self.slots.iter().any(|slot| slot.state.is_live()) {
            return None;
        }
        let abandoned = self.slots.iter().fold(0_u16, |sum, slot| sum.saturating_add(slot.abandoned()));
        match self.phase {
            // A successor that is on its way may be the cure.
            Phase::Running
                if self.wanted().all(|slot| slot.state == State::Quarantined) && !self.upgrade.is_waiting() =>
            {
                Some(Outcome::AllQuarantined { abandoned })
            }
            Phase::Failing { slot, failure } => Some(Outcome::StartFailed { slot, failure, abandoned }),
            Phase::Stopping { how, handed_over, failed, .. } => {
                Some(Outcome::Stopped { how, handed_over, failed, abandoned })
            }
            _ => None,
        }
    }
}
