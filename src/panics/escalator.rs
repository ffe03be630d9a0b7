//! When contained panics are too many to go on with the same state. The time is an argument.
//!
//! State that a restart has made anew, and that panics as before, was not what is broken: then the requests are, or the code,
//! and restarting again costs everybody else's connections for nothing. So a slot rests between two of them, by as long
//! as restarts are counted towards its quarantine. Whoever knows a request that panics could end the server otherwise.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::settings::Escalation;

/// What generations of one slot hand on to the next.
#[derive(Clone, Default)]
pub(crate) struct Escalated(Arc<Mutex<Option<Instant>>>);

impl Escalated {
    /// True unless it was true less than `rest` ago.
    fn again(&self, now: Instant, rest: Duration) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rested = last.is_none_or(|last| now.saturating_duration_since(last) >= rest);
        if rested {
            *last = Some(now);
        }
        rested
    }
}

/// A sliding window over one executor's contained panics, exact: it keeps the time of each, `panics_max` of them at most.
pub(crate) struct Escalator {
    escalation: Option<Escalation>,
    times: VecDeque<Instant>,
    rest: Duration,
    before: Escalated,
}

impl Escalator {
    pub(crate) fn new(escalation: Option<Escalation>, rest: Duration, before: Escalated) -> Self {
        Self { escalation, times: VecDeque::new(), rest, before }
    }

    /// Counts a panic; true when it is one too many, and a restart may help. Times are not to go backwards; those that do count as now.
    pub(crate) fn note(&mut self, now: Instant) -> bool {
        let Some(escalation) = self.escalation else { return false };
        while self.times.front().is_some_and(|time| now.saturating_duration_since(*time) >= escalation.within) {
            self.times.pop_front();
        }
        let too_many = self.times.len() >= escalation.panics_max as usize;
        if !too_many {
            self.times.push_back(now);
        }
        too_many && self.before.again(now, self.rest)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn escalator(panics_max: u32, seconds: u64) -> Escalator {
        let escalation = Escalation::after(panics_max, Duration::from_secs(seconds));
        Escalator::new(Some(escalation), Duration::ZERO, Escalated::default())
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
        let mut never = Escalator::new(None, Duration::ZERO, Escalated::default());
        assert!((0..10_000).all(|_| !never.note(now)));
    }

    #[test]
    fn a_slot_rests_between_two() {
        let (start, rest, slot) = (Instant::now(), Duration::from_secs(30), Escalated::default());
        let generation = || Escalator::new(Some(Escalation::after(3, rest)), rest, slot.clone());
        let escalates =
            |escalator: &mut Escalator, second| (0..4).any(|_| escalator.note(start + Duration::from_secs(second)));
        assert!(escalates(&mut generation(), 0));
        let mut next = generation();
        assert!((1..30).all(|second| !escalates(&mut next, second)), "a restart has not helped");
        assert!(escalates(&mut next, 30));
        assert!(!escalates(&mut generation(), 31));
    }
}
