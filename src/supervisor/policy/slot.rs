//! One slot as the policy sees it: which generation, in which state, with what past.
//!
//! It knows when its next generation may start; that one is started is the policy's business.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Config, RestartPolicy, SHORTAGE_PAUSE_MIN};

/// A slot, for display and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotStatus {
    pub slot: u16,
    /// The latest generation, live or not; 0 before the first.
    pub generation: u32,
    pub state: SlotState,
    /// Failures in a row, without a healthy generation in between, and starts in a row that the system had nothing for.
    pub failures: u32,
    /// When the next generation starts, during a backoff.
    pub restart_at: Option<Instant>,
    /// Threads that did not answer, or hung, and were left behind in this slot.
    pub abandoned: u16,
    /// Whether the slot belongs to those that are to run; the others are spare, or on their way to it.
    pub wanted: bool,
}

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Spare: nothing has been started, or it was scaled down.
    Idle,
    Starting,
    /// In service.
    Ready,
    /// In service, but busy with one turn for too long.
    Stalled,
    /// In service, but its thread gets no CPU.
    Starved,
    Draining,
    /// Told to stop at once.
    Stopping,
    /// Its generation failed, the next one is due later.
    Backoff,
    /// It gets no further generation, the others go on.
    Quarantined,
    /// Over, because everything is.
    Ended,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) index: u16,
    pub(super) generation: u32,
    /// The number of the latest thread, whatever became of it.
    pub(super) thread: u32,
    pub(super) holds: Thread,
    pub(super) state: State,
    /// Whether it is to have an executor.
    pub(super) wanted: bool,
    /// Executors that hung and were given up; their threads are still there.
    pub(super) leaked: Vec<Leaked>,
    /// Failures without a healthy generation in between.
    pub(super) in_a_row: u32,
    /// Starts in a row that the system had nothing for.
    pub(super) shortages: u32,
    /// When the latest failures were, at most `quarantine_after` of them.
    pub(super) recent: VecDeque<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thread {
    /// Never started, or handed to `Join`.
    None,
    Held,
    /// It did not answer and was left behind.
    Abandoned,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Idle,
    Starting(Limit),
    Ready {
        since: Instant,
        health: Health,
    },
    /// With a limit of its own when the slot is scaled down; a drain of all slots ends by the phase's.
    Draining {
        limit: Option<Limit>,
    },
    /// `retired`: because the slot was no longer wanted, and not because its generation has failed.
    Stopping {
        limit: Limit,
        retired: bool,
    },
    Backoff {
        until: Instant,
    },
    Quarantined,
    Ended,
}

/// Whether a generation that serves gets on with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    Well,
    /// Since `at`. It counts against readiness from `unready`, and does so already without; `hang` is when its turn is held
    /// to have no end.
    Stalled {
        at: Instant,
        unready: Option<Limit>,
        hang: Option<Limit>,
    },
    /// Since `at`, with what was left of those times when its thread last got CPU.
    Starved {
        at: Instant,
        unready: Option<Duration>,
        hang: Option<Duration>,
    },
}

/// An executor that was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leaked {
    pub(super) generation: u32,
    pub(super) thread: u32,
}

/// The time by which an executor must have answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) at: Instant,
    extended: bool,
}

pub(super) enum Verdict {
    RestartAt(Instant),
    Quarantine,
}

impl Slot {
    pub(super) fn new(index: u16) -> Self {
        Self {
            index,
            generation: 0,
            thread: 0,
            holds: Thread::None,
            state: State::Idle,
            wanted: false,
            leaked: Vec::new(),
            in_a_row: 0,
            shortages: 0,
            recent: VecDeque::new(),
        }
    }

    /// Enters a failure of the live generation, and says what is to become of the slot.
    pub(super) fn fail(&mut self, policy: &RestartPolicy, random: &mut Random, now: Instant) -> Verdict {
        if let State::Ready { since, health } = self.state {
            // What it spent in one turn was no health.
            let well_until = match health {
                Health::Well => now,
                Health::Stalled { at, .. } | Health::Starved { at, .. } => at,
            };
            if well_until.saturating_duration_since(since) >= policy.healthy_after {
                self.in_a_row = 0;
            }
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        if self.is_crash_loop(policy, now) {
            return Verdict::Quarantine;
        }
        Verdict::RestartAt(later(now, policy.pause(self.in_a_row, random)))
    }

    /// Enters a start that the system had nothing for, and says when to try again: never at once, since nothing has changed
    /// by then, and what crash loops are known by is left alone.
    pub(super) fn go_short(&mut self, policy: &RestartPolicy, random: &mut Random, now: Instant) -> Instant {
        self.shortages = self.shortages.saturating_add(1);
        let pause = policy.pause(self.shortages.saturating_add(1), random);
        later(now, pause.max(SHORTAGE_PAUSE_MIN))
    }

    fn is_crash_loop(&mut self, policy: &RestartPolicy, now: Instant) -> bool {
        let outside = |at: &Instant| now.saturating_duration_since(*at) > policy.quarantine_window;
        while self.recent.front().is_some_and(outside) {
            self.recent.pop_front();
        }
        if policy.quarantine_after == 0 {
            return false;
        }
        self.recent.push_back(now);
        self.recent.len() as u64 >= u64::from(policy.quarantine_after)
    }

    /// Threads that were left behind here.
    pub(super) fn abandoned(&self) -> u16 {
        let leaked = u16::try_from(self.leaked.len()).unwrap_or(u16::MAX);
        leaked.saturating_add(u16::from(self.holds == Thread::Abandoned))
    }

    pub(super) fn status(&self) -> SlotStatus {
        let (state, restart_at) = match self.state {
            State::Idle => (SlotState::Idle, None),
            State::Starting(_) => (SlotState::Starting, None),
            State::Ready { health: Health::Well, .. } => (SlotState::Ready, None),
            State::Ready { health: Health::Stalled { .. }, .. } => (SlotState::Stalled, None),
            State::Ready { health: Health::Starved { .. }, .. } => (SlotState::Starved, None),
            State::Draining { .. } => (SlotState::Draining, None),
            State::Stopping { .. } => (SlotState::Stopping, None),
            State::Backoff { until } => (SlotState::Backoff, Some(until)),
            State::Quarantined => (SlotState::Quarantined, None),
            State::Ended => (SlotState::Ended, None),
        };
        SlotStatus {
            slot: self.index,
            generation: self.generation,
            state,
            failures: self.in_a_row.saturating_add(self.shortages),
            restart_at,
            abandoned: self.abandoned(),
            wanted: self.wanted,
        }
    }
}

impl State {
    /// Whether a generation is in the slot.
    pub(super) fn is_live(&self) -> bool {
        match self {
            Self::Starting(_) | Self::Ready { .. } | Self::Draining { .. } | Self::Stopping { .. } => true,
            Self::Idle | Self::Backoff { .. } | Self::Quarantined | Self::Ended => false,
        }
    }

    /// Whether new connections are in good hands.
    pub(super) fn is_active(&self) -> bool {
        matches!(self, Self::Ready { health: Health::Well, .. })
    }

    /// When a tick is due. How long a stall may last matters while the server `serves`, and no longer in a drain.
    pub(super) fn deadline(&self, serves: bool) -> Option<Instant> {
        match self {
            Self::Starting(limit) | Self::Stopping { limit, .. } => Some(limit.at),
            Self::Draining { limit } => limit.map(|limit| limit.at),
            Self::Backoff { until } => Some(*until),
            Self::Ready { health: Health::Stalled { unready, hang, .. }, .. } if serves => {
                unready.iter().chain(hang).map(|limit| limit.at).min()
            }
            _ => None,
        }
    }
}

impl Health {
    /// One that has just been found busy or asleep for too long, with all of its patience left.
    pub(super) fn starved(config: &Config, now: Instant) -> Self {
        let left = |limit: Duration| limit.saturating_sub(config.stall_limit);
        Self::Starved {
            at: now,
            unready: Some(left(config.readiness.stalled_after)),
            hang: config.hang_limit().map(left),
        }
    }

    /// From starved to stalled: the clocks run.
    pub(super) fn run(self, now: Instant) -> Self {
        match self {
            Self::Starved { at, unready, hang } => {
                let limit = |left| Limit::new(now, left);
                Self::Stalled { at, unready: unready.map(limit), hang: hang.map(limit) }
            }
            other => other,
        }
    }

    /// From stalled to starved: the clocks stand still.
    pub(super) fn pause(self, now: Instant) -> Self {
        match self {
            Self::Stalled { at, unready, hang } => {
                let left = |limit: Limit| limit.at.saturating_duration_since(now);
                Self::Starved { at, unready: unready.map(left), hang: hang.map(left) }
            }
            other => other,
        }
    }
}

impl Limit {
    pub(super) fn new(now: Instant, allowed: Duration) -> Self {
        Self { at: later(now, allowed), extended: false }
    }

    /// Whether the time is up. Found out much too late, it is granted once more instead: see
    /// [`Config::standstill_limit`].
    pub(super) fn strikes(&mut self, now: Instant, allowed: Duration, config: &Config) -> bool {
        if now < self.at {
            return false;
        }
        let nothing_to_grant = self.extended || allowed.is_zero();
        if nothing_to_grant || now.saturating_duration_since(self.at) <= config.standstill_limit {
            return true;
        }
        self.at = later(now, allowed);
        self.extended = true;
        false
    }
}

/// SplitMix64: small, seeded, and good enough to keep slots out of step.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 up to, not including, 1.
    pub(super) fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// `now + wait`, where a wait beyond all reason is a century.
pub fn later(now: Instant, wait: Duration) -> Instant {
    now.checked_add(wait.min(FAR)).unwrap_or(now)
}

/// A century: longer than a server runs, and short enough for a clock to add some of it.
pub const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
