//! The rules one at a time, as examples. Everything together is the simulation's.

use super::*;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// A policy, and a clock that moves when told.
struct Bench {
    policy: Policy,
    now: Instant,
}

impl Bench {
    fn new(slots: u16) -> Self {
        Self { policy: Policy::new(Config::default(), slots, 1), now: Instant::now() }
    }

    fn started(slots: u16) -> Self {
        let mut bench = Self::new(slots);
        bench.step(Event::Start);
        for slot in 0..slots {
            bench.ready(slot);
        }
        bench
    }

    fn step(&mut self, event: Event) -> Vec<Action> {
        self.policy.step(event, self.now)
    }

    fn tick_after(&mut self, wait: Duration) -> Vec<Action> {
        self.now += wait;
        self.step(Event::Tick)
    }

    fn generation(&self, slot: u16) -> u32 {
        self.policy.slots[usize::from(slot)].generation
    }

    fn ready(&mut self, slot: u16) -> Vec<Action> {
        let generation = self.generation(slot);
        self.step(Event::Ready { slot, generation })
    }

    fn ended(&mut self, slot: u16, how: End) -> Vec<Action> {
        let generation = self.generation(slot);
        self.step(Event::Ended { slot, generation, how })
    }

    fn drain(&mut self, deadline: Option<Duration>) -> Vec<Action> {
        self.step(Event::Stop(StopMode::Drain { deadline }))
    }

    fn wait(&self) -> Option<Duration> {
        let at = self.policy.next_deadline()?;
        Some(at.saturating_duration_since(self.now))
    }

    /// Crashes the slot, and waits out its backoff.
    fn crash_and_return(&mut self, slot: u16) -> Vec<Action> {
        let mut actions = self.ended(slot, End::Panicked);
        let restart_at = self.policy.slots().filter_map(|slot| slot.restart_at).min();
        if let Some(at) = restart_at {
            actions.extend(self.tick_after(at - self.now));
        }
        actions.extend(self.ready(slot));
        actions
    }
}

fn start_of(slot: u16, generation: u32, thread: u32, fresh_thread: bool) -> Action {
    Action::StartGeneration { slot, generation, thread, fresh_thread }
}

#[test]
fn the_start_is_eager_and_resolves_when_all_are_ready() {
    let mut bench = Bench::new(2);
    let first = [start_of(0, 1, 1, true), start_of(1, 1, 1, true)];
    assert_eq!(bench.step(Event::Start), first);
    assert_eq!(bench.ready(1), []);
    let up = [Action::SetActive(vec![0, 1]), Action::Readiness(Readiness::Ready), Action::Started];
    assert_eq!(bench.ready(0), up);
    assert_eq!(bench.step(Event::Start), []);
    assert_eq!(bench.wait(), None);
}

#[test]
fn a_failed_first_generation_stops_the_others_and_names_its_slot() {
    let mut bench = Bench::new(3);
    bench.step(Event::Start);
    bench.ready(0);
    let failure = Failure::StartFailed;
    let down = [
        Action::Join { slot: 2, thread: 1 },
        Action::StartFailed { slot: 2, failure },
        Action::StopNow { slot: 0 },
        Action::StopNow { slot: 1 },
        Action::Readiness(Readiness::NotReady(NotReady::Stopping)),
    ];
    assert_eq!(bench.ended(2, End::StartFailed), down);
    bench.ended(0, End::Stopped);
    let outcome = Outcome::StartFailed { slot: 2, failure, abandoned: 0 };
    let over = [Action::Join { slot: 1, thread: 1 }, Action::Exit(outcome)];
    assert_eq!(bench.ended(1, End::Stopped), over);
    assert_eq!(bench.step(Event::Stop(StopMode::Now)), []);
}

#[test]
fn a_start_that_takes_too_long_is_a_failed_start_and_is_left_behind() {
    let mut bench = Bench::new(1);
    bench.step(Event::Start);
    let timeout = Config::default().start_timeout;
    assert_eq!(bench.wait(), Some(timeout));
    assert_eq!(bench.tick_after(timeout - MS), []);
    let actions = bench.tick_after(MS);
    assert!(actions.contains(&Action::StopNow { slot: 0 }));
    let outcome = Outcome::StartFailed { slot: 0, failure: Failure::StartTimedOut, abandoned: 1 };
    let abandon = Action::Abandon { slot: 0, thread: 1 };
    let over = [abandon, Action::Exit(outcome)];
    assert_eq!(bench.tick_after(STOP_GRACE), over);
}

#[test]
fn a_process_that_stood_still_does_not_fail_its_start() {
    let mut bench = Bench::new(1);
    bench.step(Event::Start);
    let timeout = Config::default().start_timeout;
    assert_eq!(bench.tick_after(3600 * SECOND), []);
    assert_eq!(bench.wait(), Some(timeout));
    // A second time it is no excuse.
    assert!(!bench.tick_after(3600 * SECOND).is_empty());
}

#[test]
fn the_first_crash_is_answered_at_once_and_the_next_after_a_pause() {
    let mut bench = Bench::started(2);
    let at_once = [start_of(0, 2, 1, false), Action::SetActive(vec![1])];
    assert_eq!(bench.ended(0, End::Panicked), at_once);
    assert_eq!(bench.ready(0), [Action::SetActive(vec![0, 1])]);
    for base in [100, 200, 400] {
        let base = base * MS;
        assert_eq!(bench.ended(0, End::Failed), [Action::SetActive(vec![1])]);
        let wait = bench.wait().unwrap();
        assert!(wait <= base && wait >= base.mul_f64(0.8) - MS, "{wait:?}");
        assert_eq!(bench.tick_after(wait).len(), 1);
        bench.ready(0);
        // Not healthy for long enough, yet out of the quarantine's window.
        bench.tick_after(29 * SECOND);
    }
}

#[test]
fn a_healthy_generation_starts_the_backoff_over() {
    let mut bench = Bench::started(2);
    bench.crash_and_return(0);
    bench.crash_and_return(0);
    bench.tick_after(30 * SECOND);
    let generation = bench.generation(0);
    let again = start_of(0, generation + 1, 1, false);
    assert_eq!(bench.ended(0, End::Panicked)[0], again);
}

#[test]
fn the_pause_grows_to_its_maximum_and_no_further() {
    let config = RestartPolicy { quarantine_after: 0, jitter: 0.0, ..RestartPolicy::default() };
    let mut bench = Bench::started(1);
    bench.policy.config.restart = config;
    let mut longest = Duration::ZERO;
    for _ in 0..100 {
        bench.ended(0, End::Panicked);
        let wait = bench.wait().unwrap();
        assert!(wait <= Duration::from_secs(30));
        if bench.policy.slots[0].state.is_live() {
            continue;
        }
        longest = longest.max(wait);
        bench.tick_after(wait);
    }
    assert_eq!(longest, Duration::from_secs(15));
}

#[test]
fn five_crashes_quarantine_the_slot_and_the_other_goes_on() {
    let mut bench = Bench::started(2);
    for _ in 0..4 {
        bench.crash_and_return(0);
    }
    let reason = Quarantine::CrashLoop;
    let out =
        [Action::Join { slot: 0, thread: 1 }, Action::Quarantined { slot: 0, reason }, Action::SetActive(vec![1])];
    assert_eq!(bench.ended(0, End::Panicked), out);
    assert_eq!(bench.wait(), None);
    assert_eq!(bench.policy.readiness(), Readiness::Ready);
}

#[test]
fn all_quarantined_is_the_end() {
    let mut bench = Bench::started(3);
    let mut seen = Vec::new();
    for slot in 0..3 {
        for _ in 0..5 {
            seen.extend(bench.crash_and_return(slot));
        }
    }
    let most = Action::Readiness(Readiness::NotReady(NotReady::MostQuarantined));
    let outcome = Outcome::AllQuarantined { abandoned: 0 };
    assert!(seen.contains(&most));
    assert_eq!(seen.last(), Some(&Action::Exit(outcome)));
}

#[test]
fn the_last_table_stands_while_no_slot_is_ready() {
    let mut bench = Bench::started(1);
    let none = Action::Readiness(Readiness::NotReady(NotReady::NoActiveSlot));
    assert_eq!(bench.ended(0, End::Panicked), [start_of(0, 2, 1, false), none]);
    assert_eq!(bench.ready(0), [Action::Readiness(Readiness::Ready)]);
}

#[test]
fn a_dead_thread_is_joined_and_replaced_and_its_reports_are_stale() {
    let mut bench = Bench::started(1);
    let died = Event::ThreadDied { slot: 0, thread: 1 };
    let actions = bench.step(died.clone());
    let replaced = [Action::Join { slot: 0, thread: 1 }, start_of(0, 2, 2, true)];
    assert_eq!(actions[..2], replaced);
    assert_eq!(bench.step(died.clone()), []);
    let stale = Event::Ended { slot: 0, generation: 1, how: End::Panicked };
    assert_eq!(bench.step(stale), []);
    let nobody = Event::Ready { slot: 9, generation: 1 };
    assert_eq!(bench.step(nobody), []);
}

#[test]
fn a_thread_that_dies_during_the_backoff_is_replaced_without_another_failure() {
    let mut bench = Bench::started(1);
    bench.crash_and_return(0);
    bench.ended(0, End::Panicked);
    let join = [Action::Join { slot: 0, thread: 1 }];
    assert_eq!(bench.step(Event::ThreadDied { slot: 0, thread: 1 }), join);
    let wait = bench.wait().unwrap();
    assert_eq!(bench.tick_after(wait), [start_of(0, 3, 2, true)]);
}

#[test]
fn a_restart_that_hangs_quarantines_its_slot_and_its_thread_may_yet_come_back() {
    let mut bench = Bench::started(2);
    bench.ended(0, End::Panicked);
    let stop = [Action::StopNow { slot: 0 }];
    assert_eq!(bench.tick_after(Config::default().start_timeout), stop);
    let reason = Quarantine::Stuck;
    let stuck = [Action::Abandon { slot: 0, thread: 1 }, Action::Quarantined { slot: 0, reason }];
    assert_eq!(bench.tick_after(STOP_GRACE), stuck);
    assert_eq!(bench.policy.slots().next().unwrap().abandoned, 1);
    let join = [Action::Join { slot: 0, thread: 1 }];
    assert_eq!(bench.ended(0, End::Stopped), join);
    assert_eq!(bench.policy.slots().next().unwrap().abandoned, 0);
}

#[test]
fn a_drain_in_time_says_so() {
    let mut bench = Bench::started(2);
    let deadline = bench.now + Config::default().drain_deadline;
    let drain = [
        Action::Drain { slot: 0, deadline, why: DrainReason::Stop },
        Action::Drain { slot: 1, deadline, why: DrainReason::Stop },
        Action::Readiness(Readiness::NotReady(NotReady::Stopping)),
    ];
    assert_eq!(bench.drain(None), drain);
    assert_eq!(bench.drain(Some(SECOND)), []);
    bench.ended(0, End::Drained);
    let outcome = Outcome::Stopped { handed_over: false, how: Stopped::Drained, failed: 0, abandoned: 0 };
    assert_eq!(bench.ended(1, End::Drained).last(), Some(&Action::Exit(outcome)));
    assert_eq!(bench.wait(), None);
}

#[test]
fn a_drain_is_cut_at_its_deadline_and_a_silent_generation_is_abandoned() {
    let mut bench = Bench::started(2);
    bench.drain(Some(SECOND));
    bench.ended(0, End::Panicked);
    assert_eq!(bench.tick_after(SECOND), [Action::StopNow { slot: 1 }]);
    assert_eq!(bench.wait(), Some(STOP_GRACE));
    let outcome = Outcome::Stopped { handed_over: false, how: Stopped::DeadlinePassed, failed: 1, abandoned: 1 };
    let abandon = Action::Abandon { slot: 1, thread: 1 };
    let over = [abandon, Action::Exit(outcome)];
    assert_eq!(bench.tick_after(STOP_GRACE), over);
}

#[test]
fn a_second_stop_cuts_the_drain_short() {
    let mut bench = Bench::started(1);
    bench.drain(Some(Duration::MAX));
    let stop = [Action::StopNow { slot: 0 }];
    assert_eq!(bench.step(Event::Stop(StopMode::Now)), stop);
    assert_eq!(bench.step(Event::Stop(StopMode::Now)), []);
    let outcome = Outcome::Stopped { handed_over: false, how: Stopped::Interrupted, failed: 0, abandoned: 0 };
    assert_eq!(bench.ended(0, End::Stopped).last(), Some(&Action::Exit(outcome)));
}

#[test]
fn a_stop_ends_a_backoff_and_a_start_that_is_under_way() {
    let mut bench = Bench::started(2);
    bench.crash_and_return(0);
    bench.ended(0, End::Panicked);
    let actions = bench.step(Event::Stop(StopMode::Now));
    let expected = [Action::Join { slot: 0, thread: 1 }, Action::StopNow { slot: 1 }];
    assert_eq!(actions[..2], expected);

    let mut bench = Bench::new(1);
    bench.step(Event::Start);
    assert_eq!(bench.drain(None)[0], Action::StopNow { slot: 0 });
    assert_eq!(bench.ready(0), []);
}

#[test]
fn a_stop_before_the_start_ends_it_at_once() {
    let mut bench = Bench::new(2);
    let outcome = Outcome::Stopped { handed_over: false, how: Stopped::AtOnce, failed: 0, abandoned: 0 };
    assert_eq!(bench.step(Event::Stop(StopMode::Now)).last(), Some(&Action::Exit(outcome)));
    assert_eq!(bench.step(Event::Start), []);
}

#[test]
fn time_that_runs_backwards_is_taken_as_standing_still() {
    let mut bench = Bench::started(1);
    bench.crash_and_return(0);
    bench.ended(0, End::Panicked);
    let (now, due) = (bench.now, bench.policy.next_deadline());
    bench.now = now.checked_sub(SECOND).unwrap_or(now);
    assert_eq!(bench.step(Event::Tick), []);
    assert_eq!(bench.policy.next_deadline(), due);
}

#[test]
fn absurd_settings_are_survived() {
    let mut bench = Bench::started(1);
    bench.policy.config.restart = RestartPolicy {
        backoff_base: Duration::MAX,
        backoff_max: Duration::MAX,
        jitter: f32::NAN,
        healthy_after: Duration::MAX,
        quarantine_after: u32::MAX,
        quarantine_window: Duration::MAX,
    };
    bench.ended(0, End::Panicked);
    bench.ended(0, End::Panicked);
    assert!(bench.wait() > Some(1_000_000 * SECOND));
}
