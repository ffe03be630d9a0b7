//! When contained panics are too many to go on with the same state. Pure: the time is an argument.

use std::collections::VecDeque;
use std::time::Instant;

use crate::settings::Escalation;

/// A sliding window over one executor's contained panics, exact: it keeps the time of each, `panics_max` of them at most.
pub(crate) struct Escalator {
    escalation: Option<Escalation>,
    times: VecDeque<Instant>,
}

impl Escalator {
    pub(crate) fn new(escalation: Option<Escalation>) -> Self {
        Self { escalation, times: VecDeque::new() }
    }

    /// Counts a panic; true when it is one too many. Times are not to go backwards; those that do count as now.
    pub(crate) fn note(&mut self, now: Instant) -> bool {
        let Some(escalation) = self.escalation else { return false };
        while self.times.front().is_some_and(|time| now.saturating_duration_since(*time) >= escalation.within) {
            self.times.pop_front();
        }
        let too_many = self.times.len() >= escalation.panics_max as usize;
        if !too_many {
            self.times.push_back(now);
        }
        too_many
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn escalator(panics_max: u32, seconds: u64) -> Escalator {
        Escalator::new(Some(Escalation::after(panics_max, Duration::from_secs(seconds))))
    }

    #[test]
    fn as_many_as_allowed_are_contained_and_one_more_is_not() {
        let (start, mut escalator) = (Instant::now(), escalator(100, 10));
        let at = |count: u32| start + Duration::from_millis(90) * count;
        assert!((0..100).all(|count| !escalator.note(at(count))));
        assert!(escalator.note(at(100)));
    }

    #[test]
    fn those_that_are_older_than_the_window_are_forgotten() {
        let (start, mut escalator) = (Instant::now(), escalator(10, 10));
        // Exactly as many as allowed in any 10 s, for a long time.
        assert!((0..10_000).all(|second| !escalator.note(start + Duration::from_secs(second))));
        assert!(escalator.times.len() <= 10);
        // A tenth of a second faster, and the eleventh of a window is one too many.
        let later = start + Duration::from_secs(100_000);
        let first = (0..100).find(|count| escalator.note(later + Duration::from_millis(900) * *count));
        assert_eq!(first, Some(10));
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_forgets_nothing() {
        let (start, mut still) = (Instant::now() + Duration::from_secs(60), escalator(3, 10));
        assert_eq!([0; 5].map(|_| still.note(start)), [false, false, false, true, true]);
        let mut back = escalator(3, 10);
        let earlier = |seconds| start - Duration::from_secs(seconds);
        assert_eq!([0, 20, 40, 50].map(|seconds| back.note(earlier(seconds))), [false, false, false, true]);
    }

    #[test]
    fn none_allowed_is_the_first_and_no_escalation_is_never() {
        let now = Instant::now();
        assert!(escalator(0, 10).note(now));
        let mut never = Escalator::new(None);
        assert!((0..10_000).all(|_| !never.note(now)));
    }
}
