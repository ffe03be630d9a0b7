//! What the log says of executors whose turn takes too long: in words for what they are at, and not without end.
//!
//! What is to be done about one decides the policy, and only while it serves. One that starts has
//! [`start_timeout`](super::policy::Config::start_timeout), one that drains the drain's deadline, and one that was told to
//! stop [`stop_grace`](super::policy::Config::stop_grace); to replace it would help nobody. But an operator wants to know what it is
//! doing, above all where such a time passes and the thread is left behind.

use std::time::{Duration, Instant};

use super::policy::SlotState;
use crate::panics::lines::{Lines, More};

/// Between two lines of a kind, after the first few. A machine that has too much to do takes the CPU from executors several
/// times a second, for hours.
const INTERVAL: Duration = Duration::from_secs(10);

/// The name under which executors without CPU are counted, all together: the cause is not theirs.
const STARVED: &str = "executors that got no CPU";

/// What an executor that has a generation is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Starts,
    Serves,
    Drains,
    Stops,
}

impl Stage {
    /// `None`: there is no generation.
    pub(super) fn of(state: SlotState) -> Option<Self> {
        match state {
            SlotState::Starting => Some(Self::Starts),
            SlotState::Ready | SlotState::Stalled | SlotState::Starved => Some(Self::Serves),
            SlotState::Draining => Some(Self::Drains),
            SlotState::Stopping => Some(Self::Stops),
            SlotState::Idle | SlotState::Backoff | SlotState::Quarantined | SlotState::Ended => None,
        }
    }

    fn stalled(self) -> &'static str {
        match self {
            Self::Starts => "an executor's start-up keeps its thread, which nobody can take from it",
            Self::Serves => "an executor is stalled: new connections go elsewhere",
            Self::Drains => {
                "an executor that drains is stalled: its connections wait, until the drain's deadline at most"
            }
            Self::Stops => "an executor that was told to stop is stalled: it is given up if it does not come back soon",
        }
    }

    fn starved(self) -> &'static str {
        match self {
            Self::Starts => "an executor that starts gets no CPU",
            Self::Serves => "an executor gets no CPU: new connections go elsewhere",
            Self::Drains => "an executor that drains gets no CPU",
            Self::Stops => "an executor that was told to stop gets no CPU",
        }
    }
}

/// What has been said.
pub(super) struct Late(Lines);

impl Default for Late {
    fn default() -> Self {
        Self(Lines::every(INTERVAL))
    }
}

impl Late {
    /// Whether it was said. Lines are counted by executor: which one it is matters.
    pub(super) fn say_stalled(
        &mut self,
        slot: u16,
        generation: u32,
        stage: Stage,
        own: Duration,
        now: Instant,
    ) -> bool {
        let name = format!("stalls of executor {slot}");
        let Some(more) = self.0.note(&name, now) else { return false };
        say_more(&name, more);
        tracing::warn!(slot, generation, busy_ms = own.as_millis() as u64, "{}", stage.stalled());
        true
    }

    /// Whether it was said.
    pub(super) fn say_starved(
        &mut self,
        slot: u16,
        generation: u32,
        stage: Stage,
        late: Duration,
        now: Instant,
    ) -> bool {
        let Some(more) = self.0.note(STARVED, now) else { return false };
        say_more(STARVED, more);
        tracing::warn!(slot, generation, late_ms = late.as_millis() as u64, "{}", stage.starved());
        true
    }

    /// When [`Late::say_due`] has something to say.
    pub(super) fn due(&self) -> Option<Instant> {
        self.0.due()
    }

    /// How many have not been told of, when no line has come for a while that would have said so.
    pub(super) fn say_due(&mut self, now: Instant) {
        self.0.take_due(now).into_iter().for_each(|(name, more)| say_more(&name, Some(more)));
    }
}

/// What is counted, and how many were left out.
fn say_more(name: &str, more: Option<More>) {
    if let Some(more) = more {
        tracing::warn!("{name}: {more}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_takes_the_cpu_all_the_time_fills_no_log() {
        let (start, mut late) = (Instant::now(), Late::default());
        let mut say = |tenths: u64| {
            let now = start + Duration::from_millis(100 * tenths);
            let slot = (tenths % 8) as u16;
            late.say_starved(slot, 1, Stage::Serves, Duration::from_millis(100), now)
        };
        let said = (0..600).filter(|tenths| say(*tenths)).count();
        assert_eq!(said, 5 + 5, "a few at once, and then one each ten seconds, of all executors together");
        assert_eq!(late.due(), Some(start + Duration::from_secs(60)));
        late.say_due(start + Duration::from_secs(60));
        assert_eq!(late.due(), None, "the count of the last ones comes out by itself");
    }

    #[test]
    fn the_stalls_of_one_executor_do_not_hide_those_of_another() {
        let (now, mut late) = (Instant::now(), Late::default());
        let mut say = |slot| late.say_stalled(slot, 1, Stage::Serves, Duration::from_millis(100), now);
        assert_eq!((0..100).filter(|_| say(0)).count(), 5);
        assert!(say(1));
    }
}
