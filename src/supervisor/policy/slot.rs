//! One slot as the policy sees it: which generation, in which state, with what past.
//!
//! It knows when its next generation may start; that one is started is the policy's business.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{LATE_TICK, RestartPolicy, STOP_GRACE};

/// A slot, for display and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotStatus {
    pub slot: u16,
    /// The latest generation, live or not; 0 before the first.
    pub generation: u32,
    pub state: SlotState,
    /// Failures in a row, without a healthy generation in between.
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
#[cfg_attr(not(test), expect(dead_code, reason = "stalls are not told apart yet"))]
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
    /// Failures without a healthy generation in between.
    pub(super) in_a_row: u32,
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
    Ready { since: Instant },
    Draining,
    Stopping(Limit),
    Backoff { until: Instant },
    Quarantined,
    Ended,
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
            in_a_row: 0,
            recent: VecDeque::new(),
        }
    }

    /// Enters a failure of the live generation, and says what is to become of the slot.
    pub(super) fn fail(&mut self, policy: &RestartPolicy, random: &mut Random, now: Instant) -> Verdict {
        if let State::Ready { since } = self.state
            && now.saturating_duration_since(since) >= policy.healthy_after
        {
            self.in_a_row = 0;
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        if self.is_crash_loop(policy, now) {
            return Verdict::Quarantine;
        }
        Verdict::RestartAt(later(now, policy.pause(self.in_a_row, random)))
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

    pub(super) fn status(&self) -> SlotStatus {
        let (state, restart_at) = match self.state {
            State::Idle => (SlotState::Idle, None),
            State::Starting(_) => (SlotState::Starting, None),
            State::Ready { .. } => (SlotState::Ready, None),
            State::Draining => (SlotState::Draining, None),
            State::Stopping(_) => (SlotState::Stopping, None),
            State::Backoff { until } => (SlotState::Backoff, Some(until)),
            State::Quarantined => (SlotState::Quarantined, None),
            State::Ended => (SlotState::Ended, None),
        };
        SlotStatus {
            slot: self.index,
            generation: self.generation,
            state,
            failures: self.in_a_row,
            restart_at,
            abandoned: u16::from(self.holds == Thread::Abandoned),
            wanted: true,
        }
    }
}

impl State {
    /// Whether a generation is in the slot.
    pub(super) fn is_live(&self) -> bool {
        match self {
            Self::Starting(_) | Self::Ready { .. } | Self::Draining | Self::Stopping(_) => true,
            Self::Idle | Self::Backoff { .. } | Self::Quarantined | Self::Ended => false,
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Starting(limit) | Self::Stopping(limit) => Some(limit.at),
            Self::Backoff { until } => Some(*until),
            _ => None,
        }
    }

    /// Whether the state's deadline has passed, and no extension was due to it.
    pub(super) fn strikes(&mut self, now: Instant, start_timeout: Duration) -> bool {
        match self {
            Self::Backoff { until } => *until <= now,
            Self::Starting(limit) => limit.strikes(now, start_timeout),
            Self::Stopping(limit) => limit.strikes(now, STOP_GRACE),
            _ => false,
        }
    }
}

impl Limit {
    pub(super) fn new(now: Instant, allowed: Duration) -> Self {
        Self { at: later(now, allowed), extended: false }
    }

    /// Whether the time is up. Found out much too late, it is granted once more instead: see
    /// [`LATE_TICK`].
    fn strikes(&mut self, now: Instant, allowed: Duration) -> bool {
        if now < self.at {
            return false;
        }
        if self.extended || now.saturating_duration_since(self.at) <= LATE_TICK {
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
pub(super) fn later(now: Instant, wait: Duration) -> Instant {
    now.checked_add(wait.min(FAR)).unwrap_or(now)
}

pub(super) const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
