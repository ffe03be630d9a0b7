//! A small world for a policy to live in, made from a seed.
//!
//! Executors become ready, fail to start, panic, lose their thread, stall, starve, recover, hang and come back after they
//! were given up, or never answer; successors are ready, fail, or are never heard of; people order executors, upgrades
//! and the end; loads come in; reports come twice, late and out of order; the clock jumps.

use std::time::{Duration, Instant};

use super::super::defects::{self, Defect};
use super::super::slot::Random;
use super::super::*;
use super::model::{Broken, Model};

/// How likely things are in one history, in percent.
struct Temper {
    /// Whether this is also so for the first generations, whose failure ends it all.
    bad_start: bool,
    start_fails: u64,
    start_hangs: u64,
    shortages: u64,
    crashes: u64,
    thread_dies: u64,
    deaf: u64,
    echoes: u64,
    jumps: u64,
    stalls: u64,
    upgrades_work: u64,
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
            shortages: up_to(2, 30),
            crashes: up_to(40, 100),
            thread_dies: up_to(10, 40),
            deaf: up_to(5, 40),
            echoes: up_to(20, 40),
            jumps: up_to(1, 5),
            stalls: up_to(20, 60),
            upgrades_work: up_to(20, 60),
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

pub(super) struct World {
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
    /// What happened when, and what was done about it.
    log: Vec<(Duration, Event, Vec<Action>)>,
    pub(super) seen: Vec<&'static str>,
}

impl World {
    pub(super) fn new(seed: u64, defect: Option<Defect>) -> Self {
        let mut dice = Dice(Random::new(seed));
        let config = random_config(&mut dice);
        let slots = [1, 1, 2, 3, 4, 8][dice.below(6) as usize];
        let config = Config {
            slots_min: 1 + dice.below(u64::from(slots) + 1) as u16,
            slots_start: 1 + dice.below(u64::from(slots) + 1) as u16,
            ..config
        };
        let now = Instant::now();
        let mut post = vec![(now, Event::Start)];
        let stops_within = Duration::from_secs([2, 60, 400][dice.below(3) as usize]);
        orders(&mut dice, &mut post, slots, stops_within);
        loads(&mut dice, &mut post, slots, stops_within);
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

    pub(super) fn run(&mut self) -> Result<(), Broken> {
        for _ in 0..20_000 {
            let letter = self.post.iter().map(|(at, _)| *at).min();
            let deadline = self.policy.next_deadline();
            let Some(next) = [letter, deadline].into_iter().flatten().min() else {
                return Err(Broken::new("exit", "no event, no deadline, no exit".into()));
            };
            self.pass_time_until(next);
            self.deliver_post()?;
            if self.dice.chance(1) {
                self.stand_still()?;
            }
            if deadline.is_some_and(|at| at <= self.now) || self.dice.chance(5) {
                self.step(Event::Tick)?;
                self.model.check_after_tick(self.policy.next_deadline())?;
            }
            if self.model.aborted {
                return Ok(());
            }
            if self.model.exited.is_some() {
                return self.check_silence();
            }
        }
        Err(Broken::new("deadline", "a history without end".into()))
    }

    /// The history so far, in words.
    pub(super) fn told(&self) -> String {
        let actions = |actions: &[Action]| actions.iter().map(|action| format!("\n    {action:?}")).collect::<String>();
        self.log.iter().map(|(at, event, then)| format!("{at:?} {event:?}{}\n", actions(then))).collect()
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
        let order = matches!(old, Event::Stop(_) | Event::Scale { .. } | Event::Upgrade | Event::Load { .. });
        if !order {
            let wait = self.dice.up_to(Duration::from_secs(5));
            self.post.push((self.now + wait, old));
        }
    }

    fn step(&mut self, event: Event) -> Result<(), Broken> {
        if matches!(event, Event::Ended { .. }) && self.model.is_lame_duck() {
            self.seen.push("crashed before the drain");
        }
        self.model.observe(&event);
        let actions = defects::step(&mut self.policy, self.defect, event.clone(), self.now);
        self.log.push((self.now - self.began, event, actions.clone()));
        for action in actions {
            self.seen.extend(self.model.apply(&action)?);
            self.act(&action);
        }
        self.model.check(&self.policy)
    }

    /// The machine gives nobody any CPU for a while, or what all executors call takes long.
    fn stand_still(&mut self) -> Result<(), Broken> {
        self.seen.push("all late together");
        let stalled = self.dice.chance(50);
        let mut found = Vec::new();
        for slot in self.model.slots() {
            let generation = self.model.generation(slot);
            // Now and then one is spared.
            if self.dice.chance(90) {
                found.push(if stalled {
                    Event::Stalled { slot, generation }
                } else {
                    Event::Starved { slot, generation }
                });
            }
            let at = self.now + self.dice.up_to(Duration::from_secs(2));
            self.post.push((at, Event::Together(vec![Event::Recovered { slot, generation }])));
        }
        self.step(Event::Together(found))
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
            Action::Condemn { slot, thread, generation } if self.dice.chance(60) => {
                let at = self.now + self.dice.up_to(Duration::from_secs(100));
                let ended = Event::Ended { slot, generation, how: End::Stopped };
                let died = Event::ThreadDied { slot, thread };
                self.post.push((at, if self.dice.chance(50) { ended } else { died }));
            }
            Action::SpawnSuccessor { successor, .. } => self.bring_up(successor),
            Action::KillSuccessor { successor } if self.dice.chance(70) => {
                let at = self.now + self.dice.up_to(Duration::from_secs(8));
                self.post.push((at, Event::SuccessorFailed { successor }));
            }
            Action::StopNow { slot } if !self.dice.chance(self.temper.deaf) => {
                self.post_end(slot, End::Stopped, Duration::from_millis(200));
            }
            _ => {}
        }
    }

    fn bring_up(&mut self, successor: u32) {
        let at = self.now + self.dice.up_to(Duration::from_secs(6));
        if self.dice.chance(self.temper.upgrades_work) {
            self.post.push((at, Event::SuccessorReady { successor }));
        }
        if self.dice.chance(40) {
            let at = at + self.dice.up_to(Duration::from_secs(1));
            self.post.push((at, Event::SuccessorFailed { successor }));
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
        if !spared && self.dice.chance(self.temper.shortages) {
            let ended = Event::Ended { slot, generation, how: End::NoResources };
            let refused = Event::ThreadRefused { slot, thread };
            return self.post.push((at, if self.dice.chance(50) { ended } else { refused }));
        }
        let fails = !spared && self.dice.chance(self.temper.start_fails);
        if !fails {
            self.post.push((at, Event::Ready { slot, generation }));
            self.fall_ill(slot, generation, at);
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

    /// Turns that take too long, one after another; the last may have no end.
    fn fall_ill(&mut self, slot: u16, generation: u32, mut at: Instant) {
        while self.dice.chance(self.temper.stalls) {
            let longest = [50, 2_000, 60_000][self.dice.below(3) as usize];
            at += self.dice.up_to(Duration::from_millis(longest));
            let mut stalled = self.dice.chance(70);
            for _ in 0..=self.dice.below(3) {
                let event =
                    if stalled { Event::Stalled { slot, generation } } else { Event::Starved { slot, generation } };
                self.post.push((at, event));
                let longest = [200, 3_000, 40_000][self.dice.below(3) as usize];
                at += self.dice.up_to(Duration::from_millis(longest));
                stalled ^= self.dice.chance(80);
            }
            if self.dice.chance(15) {
                return;
            }
            self.post.push((at, Event::Recovered { slot, generation }));
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

/// What people ask for, sensible or not.
fn orders(dice: &mut Dice, post: &mut Vec<(Instant, Event)>, slots: u16, within: Duration) {
    let began = post[0].0;
    for _ in 0..dice.below(7) {
        let count = dice.below(u64::from(slots) + 2) as u16;
        let mut at = began + dice.up_to(within);
        post.push((at, Event::Scale { count }));
        if dice.chance(50) {
            // At once something else, while it is still under way.
            at += dice.up_to(Duration::from_secs(2));
            let count = dice.below(u64::from(slots) + 1) as u16;
            post.push((at, Event::Scale { count }));
        }
    }
    for _ in 0..dice.below(4) {
        post.push((began + dice.up_to(within), Event::Upgrade));
    }
}

/// Samples of a load that now and then is another.
fn loads(dice: &mut Dice, post: &mut Vec<(Instant, Event)>, slots: u16, within: Duration) {
    let mut at = post[0].0 + dice.up_to(within);
    for _ in 0..dice.below(6) {
        let (level, queue) = (dice.0.fraction() as f32, if dice.chance(20) { 100 } else { 20 });
        for _ in 0..dice.below(20) {
            at += Duration::from_secs(1);
            let load = |slot| SlotLoad {
                slot,
                utilisation: (level + dice.0.fraction() as f32 * 0.2 - 0.1).clamp(0.0, 1.0),
                queue: dice.below(queue) as u32,
            };
            post.push((at, Event::Load { samples: (0..slots).map(load).collect() }));
        }
    }
}

fn random_scaling(dice: &mut Dice) -> Scaling {
    Scaling {
        up_after: 1 + dice.below(3) as u32,
        down_after: 1 + dice.below(5) as u32,
        order_hold: dice.below(8) as u32,
        step_up: 1 + dice.below(3) as u16,
        step_down: 1 + dice.below(3) as u16,
        emergency_step: 1 + dice.below(3) as u16,
        ..Scaling::default()
    }
}

fn random_config(dice: &mut Dice) -> Config {
    let mut config = Config { scaling: random_scaling(dice), ..Config::default() };
    config.hang =
        [HangPolicy::Replace, HangPolicy::Replace, HangPolicy::Replace, HangPolicy::Abort, HangPolicy::Ignore]
            [dice.below(5) as usize];
    if dice.chance(30) {
        config.drain_delay = dice.up_to(Duration::from_secs(15));
    }
    if dice.chance(50) {
        config.drain_deadline = dice.up_to(Duration::from_secs(20));
        config.upgrade_timeout = Duration::from_secs(1) + dice.up_to(Duration::from_secs(9));
        config.stall_limit = dice.up_to(Duration::from_millis(500));
        config.readiness = ReadinessPolicy {
            unfit_max: [0.0, 0.3, 0.5, 0.7, 1.0][dice.below(5) as usize],
            stalled_after: dice.up_to(Duration::from_secs(3)),
        };
        config.stop_grace = Duration::from_millis(10) + dice.up_to(Duration::from_secs(8));
        config.standstill_limit = Duration::from_millis(10) + dice.up_to(Duration::from_secs(3));
        config.hang_timeout =
            [None, Some(Duration::ZERO), Some(dice.up_to(Duration::from_secs(10)))][dice.below(3) as usize];
        config.start_timeout = Duration::from_secs(1) + dice.up_to(Duration::from_secs(9));
        config.restart = RestartPolicy {
            backoff_base: Duration::from_millis(1 + dice.below(2_000)),
            backoff_max: Duration::from_millis(1 + dice.below(20_000)),
            jitter: [0.0, 0.2, 1.0][dice.below(3) as usize],
            healthy_after: dice.up_to(Duration::from_secs(40)),
            quarantine_after: dice.below(7) as u32,
            quarantine_window: dice.up_to(Duration::from_secs(120)),
            leaked_max: dice.below(4) as u16,
        };
    }
    config
}
