//! The rules one at a time, as examples. Everything together is the simulation's.

use super::*;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn stop_grace() -> Duration {
    Config::default().stop_grace
}

/// A policy, and a clock that moves when told.
struct Bench {
    policy: Policy,
    now: Instant,
}

impl Bench {
    fn new(slots: u16) -> Self {
        Self::with(slots, Config::default())
    }

    fn with(slots: u16, config: Config) -> Self {
        Self { policy: Policy::new(config, slots, 1), now: Instant::now() }
    }

    fn started(slots: u16) -> Self {
        Self::started_with(slots, Config::default())
    }

    fn started_with(slots: u16, config: Config) -> Self {
        let mut bench = Self::with(slots, config);
        bench.step(Event::Start);
        for slot in 0..bench.policy.target() {
            bench.ready(slot);
        }
        bench
    }

    fn stalled(&mut self, slot: u16) -> Vec<Action> {
        let generation = self.generation(slot);
        self.step(Event::Stalled { slot, generation })
    }

    fn starved(&mut self, slot: u16) -> Vec<Action> {
        let generation = self.generation(slot);
        self.step(Event::Starved { slot, generation })
    }

    /// All of them in one look.
    fn look(&mut self, found: impl Fn(u16, u32) -> Event, slots: impl IntoIterator<Item = u16>) -> Vec<Action> {
        let found = slots.into_iter().map(|slot| found(slot, self.generation(slot))).collect();
        self.step(Event::Together(found))
    }

    fn recovered(&mut self, slot: u16) -> Vec<Action> {
        let generation = self.generation(slot);
        self.step(Event::Recovered { slot, generation })
    }

    fn scale(&mut self, count: u16) -> Vec<Action> {
        self.step(Event::Scale { count })
    }

    /// Everybody equally busy, for so many samples; answers with what was done.
    fn load(&mut self, utilisation: f32, queue: u32, samples: u32) -> Vec<Action> {
        let mut actions = Vec::new();
        for _ in 0..samples {
            self.now += SECOND;
            let load = |slot| SlotLoad { slot, utilisation, queue };
            let samples = (0..self.policy.slot_count()).map(load).collect();
            actions.extend(self.step(Event::Load { samples }));
        }
        actions
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
    assert_eq!(bench.tick_after(stop_grace()), over);
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
    let at_once = [start_of(0, 2, 1, false), Action::SetActive(vec![1]), Action::Rescue(vec![0])];
    assert_eq!(bench.ended(0, End::Panicked), at_once);
    assert_eq!(bench.ready(0), [Action::SetActive(vec![0, 1]), Action::Rescue(vec![])]);
    for base in [100, 200, 400] {
        let base = base * MS;
        assert_eq!(bench.ended(0, End::Failed), [Action::SetActive(vec![1]), Action::Rescue(vec![0])]);
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
    let out = [
        Action::Join { slot: 0, thread: 1 },
        Action::Quarantined { slot: 0, reason },
        Action::SetActive(vec![1]),
        Action::Rescue(vec![0]),
    ];
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
    let stop = [Action::StartTimedOut { slot: 0 }, Action::StopNow { slot: 0 }];
    assert_eq!(bench.tick_after(Config::default().start_timeout), stop);
    let reason = Quarantine::Stuck;
    let stuck = [Action::Abandon { slot: 0, thread: 1 }, Action::Quarantined { slot: 0, reason }];
    assert_eq!(bench.tick_after(stop_grace()), stuck);
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
        Action::CloseListeners,
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
    assert_eq!(bench.wait(), Some(stop_grace()));
    let outcome = Outcome::Stopped { handed_over: false, how: Stopped::DeadlinePassed, failed: 1, abandoned: 1 };
    let abandon = Action::Abandon { slot: 1, thread: 1 };
    let over = [abandon, Action::Exit(outcome)];
    assert_eq!(bench.tick_after(stop_grace()), over);
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
    // What waits for the slot that is down is rescued with the end of the listeners, and not taken back before.
    let expected = [Action::CloseListeners, Action::Join { slot: 0, thread: 1 }, Action::StopNow { slot: 1 }];
    assert_eq!(actions[..3], expected);

    let mut bench = Bench::new(1);
    bench.step(Event::Start);
    assert_eq!(bench.drain(None)[1], Action::StopNow { slot: 0 });
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
        leaked_max: 0,
    };
    bench.ended(0, End::Panicked);
    bench.ended(0, End::Panicked);
    assert!(bench.wait() > Some(1_000_000 * SECOND));
}

#[test]
fn a_stalled_slot_leaves_the_table_is_rescued_and_returns() {
    let mut bench = Bench::started(3);
    assert_eq!(bench.stalled(1), [Action::SetActive(vec![0, 2]), Action::Rescue(vec![1])]);
    assert_eq!(bench.stalled(1), []);
    assert_eq!(bench.policy.slots().nth(1).unwrap().state, SlotState::Stalled);
    assert_eq!(bench.recovered(1), [Action::SetActive(vec![0, 1, 2]), Action::Rescue(vec![])]);
    assert_eq!(bench.recovered(1), []);
    let stale = Event::Stalled { slot: 1, generation: 7 };
    assert_eq!(bench.step(stale), []);
    assert_eq!(bench.wait(), None);
}

#[test]
fn while_nobody_is_active_the_table_stands_and_nothing_is_rescued() {
    let mut bench = Bench::started(2);
    bench.stalled(0);
    assert_eq!(bench.starved(1), [Action::Rescue(vec![])]);
    assert_eq!(bench.policy.table, [1]);
    assert_eq!(bench.recovered(0), [Action::SetActive(vec![0]), Action::Rescue(vec![1])]);
}

#[test]
fn when_all_are_late_in_one_look_the_table_stands_with_all_of_them() {
    let starved = |slot, generation| Event::Starved { slot, generation };
    let recovered = |slot, generation| Event::Recovered { slot, generation };
    let mut bench = Bench::started(4);
    assert_eq!(bench.look(starved, 0..4), []);
    assert_eq!(bench.policy.table, [0, 1, 2, 3]);
    assert_eq!(bench.look(recovered, 0..4), []);
    // Of those that come back the first are found together as well, and so is who is late for longer.
    bench.look(starved, 0..4);
    assert_eq!(bench.look(recovered, [1, 2]), [Action::SetActive(vec![1, 2]), Action::Rescue(vec![0, 3])]);
    assert_eq!(bench.look(recovered, [0, 3]), [Action::SetActive(vec![0, 1, 2, 3]), Action::Rescue(vec![])]);
}

#[test]
fn a_stall_of_a_second_makes_a_single_slot_not_ready() {
    let mut bench = Bench::started(1);
    assert_eq!(bench.stalled(0), []);
    assert_eq!(bench.wait(), Some(900 * MS));
    let not_ready = Action::Readiness(Readiness::NotReady(NotReady::Stalled));
    assert_eq!(bench.tick_after(900 * MS), [not_ready]);
    assert_eq!(bench.recovered(0), [Action::Readiness(Readiness::Ready)]);
}

#[test]
fn half_of_the_slots_stalled_is_still_ready() {
    let mut bench = Bench::started(4);
    bench.stalled(0);
    bench.stalled(1);
    assert_eq!(bench.tick_after(SECOND), []);
    bench.stalled(2);
    let not_ready = Action::Readiness(Readiness::NotReady(NotReady::Stalled));
    assert_eq!(bench.tick_after(SECOND), [not_ready]);
}

#[test]
fn a_starved_slot_is_neither_replaced_nor_a_reason_for_unreadiness() {
    let mut bench = Bench::started(1);
    bench.starved(0);
    assert_eq!(bench.wait(), None);
    assert_eq!(bench.tick_after(3_600 * SECOND), []);
    assert_eq!(bench.policy.readiness(), Readiness::Ready);
    assert_eq!(bench.policy.slots().next().unwrap().state, SlotState::Starved);
}

#[test]
fn only_stalled_time_counts_towards_a_hang() {
    let mut bench = Bench::started(2);
    bench.stalled(0);
    bench.tick_after(SECOND);
    bench.tick_after(19 * SECOND);
    bench.starved(0);
    bench.tick_after(100 * SECOND);
    bench.stalled(0);
    assert_eq!(bench.wait(), Some(9_900 * MS));
    assert_eq!(bench.tick_after(9_900 * MS)[0], Action::Condemn { slot: 0, thread: 1, generation: 1 });
}

#[test]
fn a_hung_executor_is_condemned_and_replaced_and_its_thread_may_come_back() {
    let mut bench = Bench::started(2);
    bench.stalled(0);
    assert_eq!(bench.tick_after(SECOND), []);
    let replaced = [Action::Condemn { slot: 0, thread: 1, generation: 1 }, start_of(0, 2, 2, true)];
    assert_eq!(bench.tick_after(28_900 * MS), replaced);
    assert_eq!(bench.policy.slots().next().unwrap().abandoned, 1);
    assert_eq!(bench.ready(0), [Action::SetActive(vec![0, 1]), Action::Rescue(vec![])]);
    let back = Event::Ended { slot: 0, generation: 1, how: End::Stopped };
    assert_eq!(bench.step(back.clone()), [Action::Join { slot: 0, thread: 1 }]);
    assert_eq!(bench.step(back), []);
    assert_eq!(bench.policy.slots().next().unwrap().abandoned, 0);
}

#[test]
fn hangs_end_in_quarantine_with_a_bounded_number_of_threads() {
    let mut bench = Bench::started(2);
    let mut actions = Vec::new();
    for _ in 0..3 {
        bench.stalled(0);
        actions = bench.tick_after(30 * SECOND);
        // A hang is no health: the backoff grows.
        if let Some(wait) = bench.wait().filter(|_| !bench.policy.slots[0].state.is_live()) {
            bench.tick_after(wait);
        }
        bench.ready(0);
    }
    let out = [
        Action::Condemn { slot: 0, thread: 3, generation: 3 },
        Action::Quarantined { slot: 0, reason: Quarantine::Hangs },
    ];
    assert_eq!(actions, out);
    bench.step(Event::Stop(StopMode::Now));
    let outcome = Outcome::Stopped { how: Stopped::AtOnce, handed_over: false, failed: 0, abandoned: 3 };
    assert_eq!(bench.ended(1, End::Stopped).last(), Some(&Action::Exit(outcome)));
}

#[test]
fn a_hang_is_waited_for_or_ends_the_process_if_that_was_chosen() {
    for (hang, hang_timeout, struck) in [
        (HangPolicy::Ignore, Some(SECOND), vec![]),
        (HangPolicy::Replace, None, vec![]),
        (HangPolicy::Abort, Some(SECOND), vec![Action::Abort { slot: 0 }]),
    ] {
        let mut bench = Bench::started_with(4, Config { hang, hang_timeout, ..Config::default() });
        bench.stalled(0);
        assert_eq!(bench.tick_after(SECOND), struck);
        assert_eq!(bench.tick_after(100 * SECOND), []);
    }
}

#[test]
fn a_process_that_stood_still_does_not_find_its_executors_hung() {
    let mut bench = Bench::started(4);
    bench.stalled(0);
    assert_eq!(bench.tick_after(3_600 * SECOND), []);
    assert_eq!(bench.recovered(0).len(), 2);
}

fn two_to_four() -> Config {
    Config { slots_min: 2, slots_start: 2, ..Config::default() }
}

#[test]
fn slots_that_are_not_wanted_stay_spare_and_their_queues_are_emptied() {
    let mut bench = Bench::with(4, two_to_four());
    assert_eq!(bench.step(Event::Start), [start_of(0, 1, 1, true), start_of(1, 1, 1, true)]);
    bench.ready(0);
    let up = [
        Action::SetActive(vec![0, 1]),
        Action::Rescue(vec![2, 3]),
        Action::Readiness(Readiness::Ready),
        Action::Started,
    ];
    assert_eq!(bench.ready(1), up);
    assert_eq!(bench.policy.sample_period(), Some(SECOND));
    assert_eq!(Bench::started(4).policy.sample_period(), None);
}

#[test]
fn an_order_starts_spare_slots_and_drains_the_last_ones() {
    let mut bench = Bench::started_with(4, two_to_four());
    let why = TargetReason::Ordered;
    let up = [Action::ScaleAnswer(Ok(3)), Action::Target { count: 3, why }, start_of(2, 1, 1, true)];
    assert_eq!(bench.scale(3), up);
    bench.ready(2);
    let deadline = bench.now + Config::default().drain_deadline;
    let drain = |slot| Action::Drain { slot, deadline, why: DrainReason::ScaleDown };
    let down = [
        Action::ScaleAnswer(Ok(1)),
        Action::Target { count: 1, why },
        Action::SetActive(vec![0]),
        drain(2),
        drain(1),
        Action::Rescue(vec![1, 2, 3]),
    ];
    assert_eq!(bench.scale(1), down);
    assert_eq!(bench.ended(2, End::Drained), [Action::Join { slot: 2, thread: 1 }]);
    assert_eq!(bench.policy.slots().nth(2).unwrap().state, SlotState::Idle);
    // Again, with a fresh thread.
    assert_eq!(bench.scale(2).last(), Some(&start_of(2, 2, 2, true)));
}

#[test]
fn the_same_target_again_is_answered_and_changes_nothing() {
    let mut bench = Bench::started_with(4, two_to_four());
    assert_eq!(bench.scale(2), [Action::ScaleAnswer(Ok(2))]);
}

#[test]
fn orders_that_cannot_be_followed_are_refused_with_the_reason() {
    let refused = |refusal| [Action::ScaleAnswer(Err(refusal))];
    let mut bench = Bench::with(4, two_to_four());
    assert_eq!(bench.scale(3), refused(ScaleRefusal::Starting));
    let mut bench = Bench::started_with(4, two_to_four());
    assert_eq!(bench.scale(0), refused(ScaleRefusal::OutOfRange { max: 4 }));
    assert_eq!(bench.scale(5), refused(ScaleRefusal::OutOfRange { max: 4 }));
    bench.step(Event::Upgrade);
    assert_eq!(bench.scale(3), refused(ScaleRefusal::Upgrading));
    bench.drain(None);
    assert_eq!(bench.scale(3), refused(ScaleRefusal::Stopping));
}

#[test]
fn a_scale_up_during_a_drain_waits_for_the_slot_if_no_other_is_spare() {
    let mut bench = Bench::started(2);
    bench.scale(1);
    assert_eq!(bench.scale(2)[2..], []);
    assert_eq!(bench.ended(1, End::Stopped), [start_of(1, 2, 1, false)]);
    let mut bench = Bench::started_with(3, Config { slots_start: 2, slots_min: 1, ..Config::default() });
    bench.scale(1);
    assert_eq!(bench.scale(2)[2], start_of(2, 1, 1, true));
}

#[test]
fn a_scale_down_that_takes_too_long_is_cut() {
    let mut bench = Bench::started(2);
    bench.scale(1);
    assert_eq!(bench.wait(), Some(Config::default().drain_deadline));
    assert_eq!(bench.tick_after(30 * SECOND), [Action::StopNow { slot: 1 }]);
    assert_eq!(bench.ended(1, End::Stopped), [Action::Join { slot: 1, thread: 1 }]);
    assert_eq!(bench.wait(), None);
}

#[test]
fn whoever_serves_is_the_last_to_go() {
    let mut bench = Bench::started(3);
    bench.stalled(0);
    bench.ended(1, End::Panicked);
    bench.scale(1);
    let wanted: Vec<bool> = bench.policy.slots().map(|slot| slot.wanted).collect();
    assert_eq!(wanted, [false, false, true]);
}

#[test]
fn three_busy_samples_add_an_executor_and_thirty_idle_ones_remove_it() {
    let mut bench = Bench::started_with(4, two_to_four());
    assert_eq!(bench.load(0.9, 0, 2), []);
    let added = bench.load(0.9, 0, 1);
    assert_eq!(added, [Action::Target { count: 3, why: TargetReason::Busy }, start_of(2, 1, 1, true)]);
    // It is on its way: nothing more is added.
    assert_eq!(bench.load(1.0, 100, 10), []);
    bench.ready(2);
    assert_eq!(bench.load(0.3, 0, 29), []);
    let removed = bench.load(0.3, 0, 1);
    assert_eq!(removed[0], Action::Target { count: 2, why: TargetReason::Idle });
    assert_eq!(bench.load(0.0, 0, 100), [], "the minimum is kept");
}

#[test]
fn samples_are_apart_however_often_they_are_asked_for() {
    let mut config = two_to_four();
    config.scaling.period = Duration::ZERO;
    assert_eq!(Bench::with(4, config.clone()).policy.sample_period(), Some(SAMPLE_PERIOD_MIN));
    config.scaling.period = SECOND;
    assert_eq!(Bench::with(4, config).policy.sample_period(), Some(SECOND));
    assert_eq!(Bench::new(4).policy.sample_period(), None, "there is nothing to decide by load");
}

#[test]
fn a_queue_is_an_emergency_whatever_the_utilisation() {
    let mut bench = Bench::started_with(4, two_to_four());
    assert_eq!(bench.load(0.1, 17, 1), []);
    assert_eq!(bench.load(0.1, 17, 1)[0], Action::Target { count: 3, why: TargetReason::Queue });
}

#[test]
fn an_order_is_left_alone_for_a_while_and_then_comes_back_into_bounds() {
    let mut bench = Bench::started_with(4, two_to_four());
    bench.scale(1);
    bench.ended(1, End::Drained);
    assert_eq!(bench.load(1.0, 0, 60), []);
    assert_eq!(bench.load(1.0, 0, 1)[0], Action::Target { count: 2, why: TargetReason::Bounds });
}

#[test]
fn nobody_is_taken_away_while_somebody_is_down() {
    let mut bench = Bench::started_with(4, two_to_four());
    bench.scale(4);
    bench.ready(2);
    bench.ready(3);
    bench.load(0.0, 0, 60);
    bench.stalled(3);
    assert_eq!(bench.load(0.0, 0, 100), []);
    bench.recovered(3);
    assert!(!bench.load(0.0, 0, 30).is_empty());
}

#[test]
fn an_upgrade_hands_over_once_the_successor_is_ready() {
    let mut bench = Bench::started(1);
    let spawn = [Action::SpawnSuccessor { successor: 1, deadline: bench.now + Config::default().upgrade_timeout }];
    assert_eq!(bench.step(Event::Upgrade), spawn);
    let again = [Action::UpgradeAnswer(Err(UpgradeRefusal::AlreadyUpgrading))];
    assert_eq!(bench.step(Event::Upgrade), again);
    assert_eq!(bench.step(Event::SuccessorReady { successor: 7 }), []);
    let deadline = bench.now + Config::default().drain_deadline;
    let over = [
        Action::UpgradeAnswer(Ok(())),
        Action::CloseListeners,
        Action::Drain { slot: 0, deadline, why: DrainReason::Upgrade },
        Action::Readiness(Readiness::NotReady(NotReady::Stopping)),
    ];
    assert_eq!(bench.step(Event::SuccessorReady { successor: 1 }), over);
    assert_eq!(bench.step(Event::SuccessorFailed { successor: 1 }), []);
    let outcome = Outcome::Stopped { how: Stopped::Drained, handed_over: true, failed: 0, abandoned: 0 };
    assert_eq!(bench.ended(0, End::Drained).last(), Some(&Action::Exit(outcome)));
}

#[test]
fn an_upgrade_that_fails_changes_nothing_but_the_table_is_attached_again() {
    let mut bench = Bench::started(1);
    bench.step(Event::Upgrade);
    let failed = [Action::UpgradeAnswer(Err(UpgradeRefusal::Failed)), Action::Reattach];
    assert_eq!(bench.step(Event::SuccessorFailed { successor: 1 }), failed);
    assert_eq!(bench.wait(), None);
    assert!(matches!(bench.step(Event::Upgrade)[..], [Action::SpawnSuccessor { successor: 2, .. }]));
}

#[test]
fn a_successor_that_is_late_is_killed_and_no_other_comes_before_its_end() {
    let mut bench = Bench::started(1);
    bench.step(Event::Upgrade);
    let late = [
        Action::KillSuccessor { successor: 1 },
        Action::UpgradeAnswer(Err(UpgradeRefusal::TimedOut)),
        Action::Reattach,
    ];
    assert_eq!(bench.tick_after(60 * SECOND), late);
    assert_eq!(bench.step(Event::SuccessorReady { successor: 1 }), []);
    let twice = [Action::UpgradeAnswer(Err(UpgradeRefusal::AlreadyUpgrading))];
    assert_eq!(bench.step(Event::Upgrade), twice);
    assert_eq!(bench.step(Event::SuccessorFailed { successor: 1 }), [Action::Reattach]);
    assert_eq!(bench.step(Event::Upgrade).len(), 1);
}

#[test]
fn an_upgrade_is_refused_before_the_start_and_after_a_stop_and_cut_by_one() {
    let refused = |refusal| [Action::UpgradeAnswer(Err(refusal))];
    let mut bench = Bench::new(1);
    assert_eq!(bench.step(Event::Upgrade), refused(UpgradeRefusal::Starting));
    let mut bench = Bench::started(1);
    bench.step(Event::Upgrade);
    let actions = bench.drain(None);
    assert!(actions.contains(&Action::KillSuccessor { successor: 1 }));
    assert!(actions.contains(&Action::UpgradeAnswer(Err(UpgradeRefusal::Interrupted))));
    assert!(!actions.contains(&Action::Reattach));
    assert_eq!(bench.step(Event::Upgrade), refused(UpgradeRefusal::Stopping));
}

#[test]
fn the_end_of_all_slots_waits_for_a_successor() {
    let mut bench = Bench::started(1);
    for _ in 0..4 {
        bench.crash_and_return(0);
    }
    bench.step(Event::Upgrade);
    let actions = bench.ended(0, End::Panicked);
    assert!(!actions.iter().any(|action| matches!(action, Action::Exit(_))));
    let outcome = Outcome::Stopped { how: Stopped::Drained, handed_over: true, failed: 0, abandoned: 0 };
    let actions = bench.step(Event::SuccessorReady { successor: 1 });
    assert_eq!(actions.last(), Some(&Action::Exit(outcome)));
}

fn delayed() -> Config {
    Config { drain_delay: 5 * SECOND, ..Config::default() }
}

#[test]
fn readiness_turns_before_the_drain_and_executors_go_on_meanwhile() {
    let mut bench = Bench::started_with(2, delayed());
    let stopping = [Action::Readiness(Readiness::NotReady(NotReady::Stopping))];
    assert_eq!(bench.drain(Some(SECOND)), stopping);
    assert_eq!(bench.drain(None), [], "a second one changes nothing");
    assert_eq!(bench.ended(0, End::Panicked)[0], start_of(0, 2, 1, false));
    bench.ready(0);
    assert_eq!(bench.wait(), Some(5 * SECOND));
    let deadline = bench.now + 6 * SECOND;
    let why = DrainReason::Stop;
    let drain =
        [Action::CloseListeners, Action::Drain { slot: 0, deadline, why }, Action::Drain { slot: 1, deadline, why }];
    assert_eq!(bench.tick_after(5 * SECOND), drain);
}

#[test]
fn a_stop_at_once_does_not_wait_for_the_delay() {
    let mut bench = Bench::started_with(1, delayed());
    bench.drain(None);
    assert_eq!(bench.step(Event::Stop(StopMode::Now)), [Action::CloseListeners, Action::StopNow { slot: 0 }]);
    let outcome = Outcome::Stopped { how: Stopped::Interrupted, handed_over: false, failed: 0, abandoned: 0 };
    assert_eq!(bench.ended(0, End::Stopped).last(), Some(&Action::Exit(outcome)));
}

#[test]
fn a_quarantined_slot_is_the_first_to_go_and_does_not_keep_the_others() {
    let config = Config { slots_min: 1, slots_start: 3, ..Config::default() };
    let mut bench = Bench::started_with(3, config);
    for _ in 0..5 {
        bench.crash_and_return(0);
    }
    assert_eq!(bench.load(0.1, 0, 30)[..], [Action::Target { count: 2, why: TargetReason::Idle }]);
    assert_eq!(bench.policy.active(), [1, 2]);
}

#[test]
fn the_penalty_of_reversals_is_bounded_and_forgiven() {
    use super::scaling::{Bounds, Sample, Scaler};
    let config = Scaling { up_after: 1, down_after: 3, reversal_penalty: 6, ..Scaling::default() };
    let mut scaler = Scaler::new(&config);
    let mut after = |total: f32| {
        let sample = Sample { total, working: 5, queue: 0, settled: true, starting: false };
        let bounds = Bounds { min: 1, max: 9, target: 5 };
        let samples = (1..).find(|_| scaler.sample(&config, sample, bounds).is_some()).unwrap();
        (samples, scaler.down_after)
    };
    for _ in 0..20 {
        after(0.0);
        assert_eq!(after(5.0).0, 1);
    }
    // Ten times what it was at first.
    assert_eq!(after(0.0), (30, 30));
    assert_eq!(after(0.0), (30, 24));
    assert_eq!(after(0.0), (24, 18));
}

#[test]
fn a_generation_has_the_grace_that_was_given() {
    let grace = 300 * MS;
    let mut bench = Bench::started_with(1, Config { stop_grace: grace, ..Config::default() });
    bench.step(Event::Stop(StopMode::Now));
    assert_eq!(bench.wait(), Some(grace));
    assert_eq!(bench.tick_after(grace - MS), []);
    assert_eq!(bench.tick_after(MS)[0], Action::Abandon { slot: 0, thread: 1 });
}

#[test]
fn how_late_is_too_late_is_a_setting() {
    let lenient = Config { standstill_limit: 2 * SECOND, ..Config::default() };
    let mut bench = Bench::with(1, lenient);
    bench.step(Event::Start);
    let late = Config::default().start_timeout + 2 * SECOND;
    assert!(!bench.tick_after(late).is_empty(), "two seconds are not too late: its time is over");
    let mut bench = Bench::new(1);
    bench.step(Event::Start);
    assert_eq!(bench.tick_after(late), [], "more than one is: it has its time once more");
}

#[test]
fn the_part_that_may_be_unfit_and_the_stall_that_counts_are_settings() {
    let (strict, lenient) = (0.0, 1.0);
    let bench = |unfit_max| {
        let readiness = ReadinessPolicy { unfit_max, stalled_after: 300 * MS };
        Bench::started_with(4, Config { readiness, ..Config::default() })
    };
    let not_ready = Action::Readiness(Readiness::NotReady(NotReady::Stalled));
    let mut first = bench(strict);
    first.stalled(0);
    assert_eq!(first.wait(), Some(200 * MS), "its turn has lasted for 100 ms by then");
    assert_eq!(first.tick_after(200 * MS), [not_ready]);
    let mut all = bench(lenient);
    for slot in 0..4 {
        all.stalled(slot);
    }
    assert_eq!(all.tick_after(SECOND), []);
}

#[test]
fn a_part_that_binary_fractions_do_not_have_is_what_it_says() {
    for (unfit_max, all, tolerated) in
        [(0.7, 10, 7), (0.9, 10, 9), (0.35, 20, 7), (0.5, 3, 1), (0.0, 4, 0), (1.0, 1024, 1024)]
    {
        let readiness = ReadinessPolicy { unfit_max, ..ReadinessPolicy::default() };
        assert!(!readiness.is_unfit(tolerated, all) && readiness.is_unfit(tolerated + 1, all), "{unfit_max} of {all}");
    }
}

#[test]
fn threads_left_behind_quarantine_their_slot_at_the_number_that_was_given() {
    let restart = RestartPolicy { leaked_max: 1, ..RestartPolicy::default() };
    let mut bench = Bench::started_with(2, Config { restart, ..Config::default() });
    bench.stalled(0);
    bench.tick_after(SECOND);
    let reason = Quarantine::Hangs;
    assert_eq!(bench.tick_after(28_900 * MS)[1], Action::Quarantined { slot: 0, reason });
}
