//! The simulation: thousands of seeded histories of a small world, each step checked.
//!
//! The world plays the executors: they become ready, fail to start, panic, lose their thread, or never
//! answer; reports come twice, late and out of order; the clock jumps; someone stops it all. The
//! [`Model`] says in its own words what the policy must have done. A failure prints the seed, and
//! `RINGLEADER_SIM_SEED=<seed> cargo test policy::sim` replays that history with all its events.

mod model;

use std::collections::BTreeMap;

use super::defects::{self, Defect};
use super::slot::Random;
use super::*;
use model::{Broken, Model};

const HISTORIES: u64 = 10_000;
const SEED_VARIABLE: &str = "RINGLEADER_SIM_SEED";

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
            let log = world.log.join("\n");
            panic!("{log}\nbroken rule: {} ({})", broken.rule, broken.detail);
        }
        if !all {
            println!("{}", world.log.join("\n"));
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
    catches_a_missing_quarantine: NeverQuarantine by "quarantine";
    catches_a_start_in_quarantine: StartQuarantined by "start in quarantine";
    catches_a_start_after_stop: StartAfterStop by "start after stop" | "one exit";
    catches_a_dropped_exit: DropExit by "exit";
    catches_a_second_exit: ExitTwice by "one exit";
    catches_a_believed_stale_report: BelieveStale by "stale" | "start" | "live" | "table";
    catches_two_generations: TwoGenerations by "two generations" | "start after stop";
    catches_skipped_generation_numbers: SkipGenerationNumber by "generation number";
    catches_a_dead_slot_in_the_table: KeepDeadInTable by "table";
    catches_forgotten_readiness: ForgetReadiness by "readiness";
    catches_a_reused_dead_thread: ReuseDeadThread by "fresh thread";
    catches_a_forgotten_join: ForgetJoin by "join" | "fresh thread";
    catches_an_endless_drain: EndlessDrain by "exit in time";
    catches_an_endless_stop: EndlessStopGrace by "exit in time" | "stop grace";
    catches_an_endless_start: EndlessStart by "start timeout";
    catches_an_ignored_second_stop: IgnoreSecondStop by "exit in time";
    catches_a_drain_cut_early: EarlyCut by "drain";
    catches_a_backoff_never_reset: NeverHealthy by "slot comes back";
    catches_undue_praise: PraiseEveryDrain by "outcome";
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

/// How likely things are in one history, in percent.
struct Temper {
    /// Whether this is also so for the first generations, whose failure ends it all.
    bad_start: bool,
    start_fails: u64,
    start_hangs: u64,
    crashes: u64,
    thread_dies: u64,
    deaf: u64,
    echoes: u64,
    jumps: u64,
    life_max: Duration,
}

impl Temper {
    fn new(dice: &mut Dice) -> Self {
        let rough = dice.chance(50);
        let life_max = Duration::from_millis([300, 3_000, 20_000, 90_000][dice.below(4) as usize]);
        let bad_start = dice.chance(30);
        let mut up_to = |calm: u64, wild: u64| dice.below(if rough { wild } else { calm } + 1);
        Self {
            bad_start,
            start_fails: up_to(2, 20),
            start_hangs: up_to(1, 8),
            crashes: up_to(40, 100),
            thread_dies: up_to(10, 40),
            deaf: up_to(5, 40),
            echoes: up_to(20, 40),
            jumps: up_to(1, 5),
            life_max,
        }
    }
}

struct Dice(Random);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0.next() % end.max(1)
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn up_to(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.0.fraction())
    }
}

struct World {
    policy: Policy,
    defect: Option<Defect>,
    model: Model,
    dice: Dice,
    temper: Temper,
    began: Instant,
    now: Instant,
    /// Reports under way, unordered.
    post: Vec<(Instant, Event)>,
    delivered: Vec<Event>,
    log: Vec<String>,
    seen: Vec<&'static str>,
}

impl World {
    fn new(seed: u64, defect: Option<Defect>) -> Self {
        let mut dice = Dice(Random::new(seed));
        let config = random_config(&mut dice);
        let slots = [1, 1, 2, 3, 4, 8][dice.below(6) as usize];
        let now = Instant::now();
        let mut post = vec![(now, Event::Start)];
        let stops_within = Duration::from_secs([2, 60, 400][dice.below(3) as usize]);
        let mut at = now + dice.up_to(stops_within);
        for _ in 0..1 + dice.below(3) {
            post.push((at, Event::Stop(random_stop(&mut dice))));
            at += dice.up_to(Duration::from_secs(20));
        }
        // In the end someone insists.
        post.push((at + Duration::from_secs(500), Event::Stop(StopMode::Now)));
        Self {
            policy: Policy::new(config.clone(), slots, seed),
            defect,
            model: Model::new(config, slots, now),
            temper: Temper::new(&mut dice),
            dice,
            began: now,
            now,
            post,
            delivered: Vec::new(),
            log: Vec::new(),
            seen: Vec::new(),
        }
    }

    fn run(&mut self) -> Result<(), Broken> {
        for _ in 0..20_000 {
            let letter = self.post.iter().map(|(at, _)| *at).min();
            let deadline = self.policy.next_deadline();
            let Some(next) = [letter, deadline].into_iter().flatten().min() else {
                return Err(Broken::new("exit", "no event, no deadline, no exit".into()));
            };
            self.pass_time_until(next);
            self.deliver_post()?;
            if deadline.is_some_and(|at| at <= self.now) || self.dice.chance(5) {
                self.step(Event::Tick)?;
                self.model.check_after_tick(self.policy.next_deadline())?;
            }
            if self.model.exited.is_some() {
                return self.check_silence();
            }
        }
        Err(Broken::new("deadline", "a history without end".into()))
    }

    fn pass_time_until(&mut self, next: Instant) {
        let mut late = match self.dice.below(4) {
            0 => self.dice.up_to(Duration::from_millis(20)),
            _ => Duration::ZERO,
        };
        if self.dice.chance(self.temper.jumps) {
            self.seen.push("jump");
            late += self.dice.up_to(Duration::from_secs(4_000));
        }
        self.now = self.now.max(next) + late;
        self.model.pass_time(self.now, late);
    }

    fn deliver_post(&mut self) -> Result<(), Broken> {
        loop {
            let due = self.post.iter().enumerate().filter(|(_, (at, _))| *at <= self.now);
            let Some((first, _)) = due.min_by_key(|(_, (at, _))| *at) else {
                return Ok(());
            };
            let (_, event) = self.post.remove(first);
            self.step(event.clone())?;
            self.delivered.push(event);
            if self.dice.chance(self.temper.echoes) {
                self.seen.push("stale");
                self.echo();
            }
        }
    }

    /// Says again something that was said before, now or later.
    fn echo(&mut self) {
        let old = self.delivered[self.dice.below(self.delivered.len() as u64) as usize].clone();
        if !matches!(old, Event::Stop(_)) {
            let wait = self.dice.up_to(Duration::from_secs(5));
            self.post.push((self.now + wait, old));
        }
    }

    fn step(&mut self, event: Event) -> Result<(), Broken> {
        let at = self.now - self.began;
        self.log.push(format!("{at:?} {event:?}"));
        self.model.observe(&event);
        let actions = defects::step(&mut self.policy, self.defect, event, self.now);
        for action in actions {
            self.log.push(format!("    {action:?}"));
            self.seen.extend(self.model.apply(&action)?);
            self.act(&action);
        }
        self.model.check(&self.policy)
    }

    /// What the executors make of an action.
    fn act(&mut self, action: &Action) {
        match *action {
            Action::StartGeneration { slot, generation, thread, .. } => {
                self.live_a_life(slot, generation, thread);
            }
            Action::Drain { slot, .. } if !self.dice.chance(self.temper.deaf) => {
                let how = if self.dice.chance(95) { End::Drained } else { End::Stopped };
                self.post_end(slot, how, Duration::from_secs(15));
            }
            Action::StopNow { slot } if !self.dice.chance(self.temper.deaf) => {
                self.post_end(slot, End::Stopped, Duration::from_millis(200));
            }
            _ => {}
        }
    }

    fn post_end(&mut self, slot: u16, how: End, longest: Duration) {
        let generation = self.model.generation(slot);
        let at = self.now + self.dice.up_to(longest);
        self.post.push((at, Event::Ended { slot, generation, how }));
    }

    fn live_a_life(&mut self, slot: u16, generation: u32, thread: u32) {
        let spared = generation == 1 && !self.temper.bad_start;
        if !spared && self.dice.chance(self.temper.start_hangs) {
            return;
        }
        let mut at = self.now + self.dice.up_to(Duration::from_millis(300));
        let fails = !spared && self.dice.chance(self.temper.start_fails);
        if !fails {
            self.post.push((at, Event::Ready { slot, generation }));
            at += self.dice.up_to(self.temper.life_max);
        }
        let ended = |how| Event::Ended { slot, generation, how };
        if self.dice.chance(self.temper.thread_dies) {
            self.post.push((at, Event::ThreadDied { slot, thread }));
        }
        if fails {
            let how = [End::StartFailed, End::Panicked][self.dice.below(2) as usize];
            self.post.push((at, ended(how)));
        } else if self.dice.chance(self.temper.crashes) {
            let how = [End::Panicked, End::Failed, End::Drained][self.dice.below(3) as usize];
            self.post.push((at, ended(how)));
        }
    }

    /// After the exit, whatever comes is answered with nothing.
    fn check_silence(&mut self) -> Result<(), Broken> {
        let rest = std::mem::take(&mut self.post).into_iter().map(|(_, event)| event);
        let again = [Event::Tick, Event::Stop(StopMode::Now), Event::Start];
        for event in rest.chain(again).chain(self.delivered.clone()) {
            let actions = defects::step(&mut self.policy, self.defect, event.clone(), self.now);
            if !actions.is_empty() || self.policy.next_deadline().is_some() {
                return Err(Broken::new("one exit", format!("{event:?} led to {actions:?}")));
            }
        }
        Ok(())
    }
}

fn random_stop(dice: &mut Dice) -> StopMode {
    match dice.below(3) {
        0 => StopMode::Now,
        1 => StopMode::Drain { deadline: None },
        _ => {
            let deadline = Some(dice.up_to(Duration::from_secs(30)));
            StopMode::Drain { deadline }
        }
    }
}

fn random_config(dice: &mut Dice) -> Config {
    let mut config = Config::default();
    if dice.chance(50) {
        config.drain_deadline = dice.up_to(Duration::from_secs(20));
        config.start_timeout = Duration::from_secs(1) + dice.up_to(Duration::from_secs(9));
        config.restart = RestartPolicy {
            backoff_base: Duration::from_millis(1 + dice.below(2_000)),
            backoff_max: Duration::from_millis(1 + dice.below(20_000)),
            jitter: [0.0, 0.2, 1.0][dice.below(3) as usize],
            healthy_after: dice.up_to(Duration::from_secs(40)),
            quarantine_after: dice.below(7) as u32,
            quarantine_window: dice.up_to(Duration::from_secs(120)),
        };
    }
    config
}
