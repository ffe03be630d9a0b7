//! Whether an executor has more to do than it can: by the requests in flight, and by how long its rounds take. Decides for
//! each request whether it is refused; knows neither clocks nor requests.

use std::time::{Duration, Instant};

use crate::settings::Overload;

/// How long an executor has to be late before it refuses requests. 100 ms: the interval of CoDel (RFC 8289) and of folly's
/// `Codel`.
const INTERVAL: Duration = Duration::from_millis(100);
/// Who sleeps for more than this part of the time has no queue that stays.
const REST: u32 = 10;

/// Refuses requests of one executor.
#[derive(Debug)]
pub(crate) struct Shedder {
    in_flight_max: u64,
    delay: Option<Delay>,
}

impl Shedder {
    /// `None` when there is no limit.
    pub(crate) fn new(limits: &Overload) -> Option<Self> {
        if limits.in_flight_max.is_none() && limits.delay_max.is_none() {
            return None;
        }
        Some(Self { in_flight_max: limits.in_flight_max.unwrap_or(u64::MAX), delay: limits.delay_max.map(Delay::new) })
    }

    /// A round begins at `now`: the one before worked for `worked`, and then the executor slept for `slept`.
    pub(crate) fn round_began(&mut self, now: Instant, worked: Duration, slept: Duration) {
        if let Some(delay) = &mut self.delay {
            delay.round_began(now, worked, slept);
        }
    }

    /// Whether to refuse a request that has come while `in_flight` others are being answered.
    pub(crate) fn refuses(&mut self, in_flight: u64, now: impl FnOnce() -> Instant) -> bool {
        in_flight >= self.in_flight_max || self.delay.as_mut().is_some_and(|delay| delay.refuses(now))
    }
}

/// The part that looks at rounds.
///
/// A round that is longer than the limit is late for what it polls last and for what comes meanwhile. Overloaded is who
/// has been late again and again for an interval and hardly slept: a burst makes rounds late, too, but then there is rest.
/// Who is overloaded works in each round for as long as the limit and refuses what comes after, which costs little; so
/// what is not refused waits for about two limits at most.
#[derive(Debug)]
struct Delay {
    most: Duration,
    overloaded: bool,
    streak: Option<Streak>,
    /// The present round's begin.
    began: Instant,
    /// A request of the present round was refused.
    refused: bool,
}

/// Late rounds, one soon after the other.
#[derive(Debug)]
struct Streak {
    since: Instant,
    last_late: Instant,
    slept: Duration,
}

impl Delay {
    fn new(most: Duration) -> Self {
        Self { most, overloaded: false, streak: None, began: Instant::now(), refused: false }
    }

    fn round_began(&mut self, now: Instant, worked: Duration, slept: Duration) {
        self.began = now;
        // Refusing makes rounds short: that is no sign that there is less to do.
        let late = std::mem::take(&mut self.refused) || worked > self.most;
        let Some(streak) = &mut self.streak else {
            self.streak = late.then_some(Streak { since: now, last_late: now, slept });
            return;
        };
        streak.slept += slept;
        if late {
            streak.last_late = now;
        }
        let lasted = now.saturating_duration_since(streak.since);
        let rested = streak.slept > lasted.max(INTERVAL) / REST;
        if rested || now.saturating_duration_since(streak.last_late) > INTERVAL {
            self.streak = None;
            self.overloaded = false;
        } else if late && lasted >= INTERVAL {
            self.overloaded = true;
        }
    }

    fn refuses(&mut self, now: impl FnOnce() -> Instant) -> bool {
        let refused = self.overloaded && now().saturating_duration_since(self.began) > self.most;
        self.refused |= refused;
        refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(20);
    const LATE: Duration = Duration::from_millis(21);
    const NO: Duration = Duration::ZERO;

    /// A shedder with its time.
    struct Played {
        shedder: Shedder,
        now: Instant,
    }

    impl Played {
        fn new() -> Self {
            let limits = Overload { delay_max: Some(LIMIT), ..Overload::default() };
            Self { shedder: Shedder::new(&limits).expect("there is a limit"), now: Instant::now() }
        }

        /// One that has been late without a rest for an interval.
        fn overloaded() -> Self {
            let mut played = Self::new();
            (0..6).for_each(|_| played.turn(LATE, NO));
            played
        }

        fn turn(&mut self, worked: Duration, slept: Duration) {
            self.now += worked + slept;
            self.shedder.round_began(self.now, worked, slept);
        }

        /// Whether a request is refused that is polled so long after the turn's begin.
        fn refuses(&mut self, after: Duration) -> bool {
            let now = self.now + after;
            self.shedder.refuses(0, || now)
        }
    }

    fn milliseconds(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn without_limits_there_is_no_shedder() {
        assert!(Shedder::new(&Overload::default()).is_none());
    }

    #[test]
    fn requests_above_the_number_in_flight_are_refused() {
        let limits = Overload { in_flight_max: Some(2), ..Overload::default() };
        let mut shedder = Shedder::new(&limits).expect("there is a limit");
        let now = Instant::now();
        assert_eq!([0, 1, 2, 3].map(|in_flight| shedder.refuses(in_flight, || now)), [false, false, true, true]);
        (1..100).for_each(|turn| shedder.round_began(now + turn * LATE, LATE, NO));
        assert!(!shedder.refuses(1, || now + Duration::from_secs(10)), "there is no limit of time");
    }

    #[test]
    fn a_burst_is_not_overload() {
        let mut played = Played::new();
        for _ in 0..100 {
            (0..4).for_each(|_| played.turn(LATE, NO));
            assert!(!played.refuses(Duration::from_secs(1)));
            played.turn(NO, milliseconds(11));
        }
    }

    #[test]
    fn one_long_turn_is_not_overload() {
        let mut played = Played::new();
        played.turn(Duration::from_secs(5), NO);
        assert!(!played.refuses(Duration::from_secs(1)));
    }

    #[test]
    fn long_requests_with_rests_between_are_not_overload() {
        let mut played = Played::new();
        for _ in 0..100 {
            played.turn(milliseconds(80), milliseconds(20));
            assert!(!played.refuses(LATE));
        }
    }

    #[test]
    fn late_for_an_interval_it_works_as_long_as_the_limit_and_refuses_the_rest() {
        let mut played = Played::overloaded();
        assert_eq!([NO, LIMIT, LATE, LIMIT].map(|after| played.refuses(after)), [false, false, true, false]);
    }

    #[test]
    fn clients_that_all_ask_again_at_once_are_overload_too() {
        let mut played = Played::new();
        for _ in 0..3 {
            // All answers go out, the executor sleeps for as long as they travel; one asks first, then all others.
            played.turn(milliseconds(200), NO);
            played.turn(milliseconds(1), milliseconds(2));
        }
        assert!(played.refuses(LATE));
    }

    #[test]
    fn overload_goes_on_while_something_is_refused_however_short_the_turns() {
        let mut played = Played::overloaded();
        for _ in 0..100 {
            assert!(played.refuses(LATE));
            played.turn(milliseconds(2), NO);
        }
    }

    #[test]
    fn overload_ends_with_a_rest() {
        let mut played = Played::overloaded();
        assert!(played.refuses(LATE));
        played.turn(LATE, milliseconds(20));
        assert!(!played.refuses(LATE));
    }

    #[test]
    fn overload_ends_when_no_turn_has_been_late_for_an_interval() {
        let mut played = Played::overloaded();
        played.turn(milliseconds(1), NO);
        assert!(played.refuses(LATE));
        played.turn(milliseconds(1), NO);
        (0..101).for_each(|_| played.turn(milliseconds(1), NO));
        assert!(!played.refuses(LATE));
    }
}
