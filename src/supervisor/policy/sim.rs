//! The simulation: thousands of seeded histories of a small world, each step checked.
//!
//! The [`World`] plays the executors, the successors and the people. The [`model::Model`] says in its own words what the
//! policy must have done. A failure prints the seed, and `RINGLEADER_SEED=<seed> cargo test policy::sim` replays that
//! history with all its events.

mod actions;
mod model;
mod ramp;
mod rules;
mod world;

use std::collections::BTreeMap;

use super::defects::Defect;
use world::World;

const HISTORIES: u64 = 10_000;
const SEED_VARIABLE: &str = "RINGLEADER_SEED";

#[test]
fn histories_keep_the_rules() {
    let seeds = match std::env::var(SEED_VARIABLE) {
        Ok(text) => {
            let seed = text.parse().expect("the seed is a number");
            seed..seed + 1
        }
        Err(_) => 0..HISTORIES,
    };
    let all = seeds.end - seeds.start > 1;
    let mut seen = BTreeMap::new();
    for seed in seeds {
        let told = Told(seed);
        let mut world = World::new(seed, None);
        if let Err(broken) = world.run() {
            let log = world.told();
            panic!("{log}broken rule: {} ({})", broken.rule, broken.detail);
        }
        if !all {
            println!("{}", world.told());
        }
        for what in world.seen {
            *seen.entry(what).or_insert(0_u64) += 1;
        }
        drop(told);
    }
    if all {
        assert_nothing_was_missed(&seen);
    }
}

/// A simulation that never got anywhere would pass as well.
fn assert_nothing_was_missed(seen: &BTreeMap<&'static str, u64>) {
    for what in [
        "restart",
        "backoff",
        "fresh thread",
        "crash loop",
        "shortage",
        "stuck",
        "jump",
        "most quarantined",
        "no active slot",
        "at once",
        "drained",
        "deadline passed",
        "interrupted",
        "start failed",
        "start timed out",
        "all quarantined",
        "abandoned",
        "stale",
        "stop while starting",
        "stalled, not ready",
        "all late together",
        "condemned",
        "aborted",
        "hangs",
        "a hung thread came back",
        "rescue",
        "ordered",
        "busy",
        "idle",
        "queue",
        "bounds",
        "scaled down",
        "scaled up",
        "wanted again",
        "scale refused",
        "upgraded",
        "upgrade refused",
        "upgrade twice",
        "upgrade failed",
        "upgrade timed out",
        "upgrade interrupted",
        "re-attached",
        "handed over",
        "crashed before the drain",
    ] {
        let count = seen.get(what).copied().unwrap_or(0);
        assert!(count >= 10, "{what}: seen in {count} histories only; {seen:?}");
    }
}

/// Every defect is caught, and by a rule that is about it.
macro_rules! caught {
    ($($name:ident: $defect:ident by $($rule:literal)|+;)*) => {$(
        #[test]
        fn $name() {
            let broken = (0..HISTORIES).find_map(|seed| {
                World::new(seed, Some(Defect::$defect)).run().err()
            });
            let broken = broken.expect("the simulation catches the defect");
            assert!([$($rule),+].contains(&broken.rule), "{}: {}", broken.rule, broken.detail);
        }
    )*};
}

caught! {
    catches_a_skipped_backoff: SkipBackoff by "backoff" | "deadline";
    catches_a_forgotten_slot: ForgetSlotAfterCrash by "slot comes back";
    catches_a_shortage_taken_for_a_crash: ShortageIsACrash by "slot comes back" | "backoff" | "quarantine";
    catches_a_shortage_that_is_tried_at_once: TryShortageAtOnce by "backoff" | "deadline";
    catches_a_missing_quarantine: NeverQuarantine by "quarantine";
    catches_a_start_in_quarantine: StartQuarantined by "start in quarantine" | "one exit";
    catches_a_start_after_stop: StartAfterStop by "start after stop" | "one exit";
    catches_a_dropped_exit: DropExit by "exit";
    catches_a_second_exit: ExitTwice by "one exit";
    catches_a_believed_stale_report: BelieveStale by "stale" | "start" | "live" | "table" | "two generations";
    catches_two_generations: TwoGenerations by "two generations" | "start after stop";
    catches_skipped_generation_numbers: SkipGenerationNumber by "generation number";
    catches_a_dead_slot_in_the_table: KeepDeadInTable by "table" | "drain before leaving the table";
    catches_forgotten_readiness: ForgetReadiness by "readiness";
    catches_a_reused_dead_thread: ReuseDeadThread by "fresh thread";
    catches_a_forgotten_join: ForgetJoin by "join" | "fresh thread";
    catches_an_endless_drain: EndlessDrain by "exit in time" | "drain";
    catches_an_endless_stop: EndlessStopGrace by "exit in time" | "stop grace";
    catches_an_endless_start: EndlessStart by "start timeout";
    catches_an_ignored_second_stop: IgnoreSecondStop by "exit in time" | "drain";
    catches_a_drain_cut_early: EarlyCut by "drain";
    catches_a_backoff_never_reset: NeverHealthy by "slot comes back";
    catches_undue_praise: PraiseEveryDrain by "outcome";
    catches_a_rescue_of_the_healthy: RescueHealthy by "rescue";
    catches_a_forgotten_rescue: ForgetRescue by "rescue";
    catches_a_rescue_during_a_stop: RescueInStop by "rescue";
    catches_a_missing_last_rescue: NoLastRescue by "rescue";
    catches_a_stalled_slot_in_the_table: KeepStalledInTable by "table";
    catches_a_table_made_in_the_middle_of_a_look: OneByOne by "table";
    catches_a_forgotten_recovery: ForgetRecovery by "table" | "stale";
    catches_a_starved_one_replaced: ReplaceStarved by "hang" | "stale" | "readiness";
    catches_a_hang_that_is_never_struck: HangNeverStruck by "hang";
    catches_hasty_unreadiness: StallCountsAtOnce by "readiness";
    catches_a_stall_that_never_counts: StallNeverCounts by "readiness";
    catches_unbounded_leaks: LeakWithoutBound by "leaked threads";
    catches_a_forgotten_leaked_thread: ForgetLeakedThread by "join";
    catches_a_start_during_a_drain: StartDuringDrain by "two generations";
    catches_a_scale_past_the_maximum: ScalePastMax by "scale bounds";
    catches_a_lost_target: LoseTarget by "target";
    catches_a_drain_before_leaving_the_table: DrainBeforeTable by "drain before leaving the table";
    catches_an_endless_scale_down: EndlessScaleDown by "drain";
    catches_a_scale_order_without_answer: NoScaleAnswer by "one answer";
    catches_two_successors: TwoSuccessors by "two successors";
    catches_an_upgrade_without_answer: NoUpgradeAnswer by "one answer";
    catches_a_successor_left_alive: ForgetKill by "upgrade answer" | "re-attach";
    catches_a_table_left_to_the_successor: NoReattach by "re-attach";
    catches_a_start_after_the_hand_over: GoOnAfterHandOver by "start after stop" | "one exit";
    catches_a_lame_duck_that_drains_at_once: NoDelay by "drain" | "listeners";
    catches_listeners_kept: KeepListeners by "listeners" | "outcome" | "rescue";
}

/// Says the seed on the way out, if the way out is a panic, wherever it began.
struct Told(u64);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay: {SEED_VARIABLE}={} cargo test policy::sim", self.0);
        }
    }
}
