//! Load that rises and falls, and what automatic scaling makes of it.
//!
//! The load model: so many executors' worth of work arrive, are spread over the active ones with noise, and no executor
//! is busy for more than all of the time; what is too much waits in the queues.

use std::time::{Duration, Instant};

use super::super::defects::{self, Defect};
use super::super::slot::Random;
use super::super::*;

/// A server under a load that is a function of time.
pub(super) struct Ramp {
    policy: Policy,
    defect: Option<Defect>,
    random: Random,
    now: Instant,
    noise: f32,
    /// Every target there was.
    pub(super) targets: Vec<u16>,
}

impl Ramp {
    pub(super) fn new(min: u16, max: u16, noise: f32, seed: u64, defect: Option<Defect>) -> Self {
        let config = Config { slots_min: min, slots_start: min, ..Config::default() };
        let mut ramp = Self {
            policy: Policy::new(config, max, seed),
            defect,
            random: Random::new(seed),
            now: Instant::now(),
            noise,
            targets: vec![min],
        };
        ramp.step(Event::Start);
        ramp
    }

    fn step(&mut self, event: Event) {
        for action in defects::step(&mut self.policy, self.defect, event, self.now) {
            match action {
                // Executors start and drain between two samples.
                Action::StartGeneration { slot, generation, .. } => self.step(Event::Ready { slot, generation }),
                Action::Drain { slot, .. } => {
                    let generation = self.policy.slots().find(|status| status.slot == slot).map_or(0, |s| s.generation);
                    self.step(Event::Ended { slot, generation, how: End::Drained });
                }
                Action::Target { count, .. } => self.targets.push(count),
                _ => {}
            }
        }
    }

    /// So many executors' worth of work, for so many seconds.
    pub(super) fn load(&mut self, work: f32, seconds: u32) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            let active: Vec<u16> =
                self.policy.slots().filter(|s| s.state == SlotState::Ready).map(|s| s.slot).collect();
            if active.is_empty() {
                self.load_of_the_stalled();
                continue;
            }
            let share = work / active.len() as f32;
            let mut samples = Vec::new();
            for slot in active {
                let wanted = share * (1.0 + self.noise * (self.random.fraction() as f32 * 2.0 - 1.0));
                let queue = if wanted > 1.0 { ((wanted - 1.0) * 20.0) as u32 } else { 0 };
                samples.push(SlotLoad { slot, utilisation: wanted.min(1.0), queue });
            }
            self.step(Event::Load { samples });
        }
    }

    /// Everybody who serves is in a turn that takes too long, or is back from it.
    fn all(&mut self, event: impl Fn(u16, u32) -> Event) {
        let serving = |status: &SlotStatus| matches!(status.state, SlotState::Ready | SlotState::Stalled);
        let slots: Vec<_> = self.policy.slots().filter(serving).collect();
        slots.into_iter().for_each(|status| self.step(event(status.slot, status.generation)));
    }

    /// The counters of an executor stand still while its turn lasts.
    fn load_of_the_stalled(&mut self) {
        let stalled: Vec<_> = self.policy.slots().filter(|status| status.state == SlotState::Stalled).collect();
        let load = |status: &SlotStatus| SlotLoad { slot: status.slot, utilisation: 0.0, queue: 0 };
        self.step(Event::Load { samples: stalled.iter().map(load).collect() });
    }

    /// From one share of what `max` executors can do to another, in a straight line.
    fn ramp(&mut self, max: u16, from: f32, to: f32, seconds: u32) {
        for second in 0..seconds {
            let share = from + (to - from) * second as f32 / seconds as f32;
            self.load(share * f32::from(max), 1);
        }
        self.load(to * f32::from(max), 400);
    }

    /// How often the direction changed.
    pub(super) fn reversals(&self) -> usize {
        let steps: Vec<bool> = self.targets.windows(2).map(|pair| pair[1] > pair[0]).collect();
        steps.windows(2).filter(|pair| pair[0] != pair[1]).count()
    }
}

#[test]
fn a_ramp_goes_from_the_minimum_to_the_maximum_and_back() {
    for seed in 0..8 {
        for (min, max) in [(1, 2), (1, 4), (2, 4), (2, 8), (4, 16)] {
            for seconds in [10, 60, 300, 1_200] {
                let mut ramp = Ramp::new(min, max, 0.15, seed, None);
                ramp.load(0.1 * f32::from(max), 60);
                ramp.ramp(max, 0.1, 0.9, seconds);
                let risen = ramp.targets.clone();
                assert_eq!(risen.last(), Some(&max), "seed {seed}, {min}..{max} in {seconds} s: {risen:?}");
                assert_eq!(ramp.reversals(), 0, "seed {seed}, {min}..{max} in {seconds} s: {risen:?}");
                ramp.ramp(max, 0.9, 0.1, seconds);
                let all = &ramp.targets;
                assert_eq!(all.last(), Some(&min), "seed {seed}, {min}..{max} in {seconds} s: {all:?}");
                assert_eq!(ramp.reversals(), 1, "seed {seed}, {min}..{max} in {seconds} s: {all:?}");
            }
        }
    }
}

#[test]
fn a_steady_load_is_never_followed_up_and_down() {
    for seed in 0..2 {
        for tenths in 1..=80 {
            let mut ramp = Ramp::new(1, 8, 0.1, seed, None);
            ramp.load(tenths as f32 / 10.0, 1_000);
            assert_eq!(ramp.reversals(), 0, "seed {seed}, {tenths} tenths: {:?}", ramp.targets);
        }
    }
}

/// Work that is high and low in turns, each just long enough to be followed.
pub(super) fn reversals_of_a_swinging_load(defect: Option<Defect>) -> usize {
    let mut ramp = Ramp::new(1, 4, 0.0, 1, defect);
    for _ in 0..40 {
        ramp.load(2.5, 10);
        ramp.load(0.5, 32);
    }
    ramp.reversals()
}

#[test]
fn a_load_that_swings_is_followed_less_and_less() {
    let reversals = reversals_of_a_swinging_load(None);
    assert!((1..10).contains(&reversals), "{reversals} reversals");
}

#[test]
fn catches_a_missing_penalty() {
    let reversals = reversals_of_a_swinging_load(Some(Defect::NoReversalPenalty));
    assert!(reversals >= 10, "{reversals} reversals");
}

fn reversals_of_a_noisy_load(defect: Option<Defect>) -> usize {
    let mut ramp = Ramp::new(1, 4, 0.5, 1, defect);
    ramp.load(1.2, 1_000);
    ramp.reversals()
}

#[test]
fn noise_is_not_followed() {
    assert_eq!(reversals_of_a_noisy_load(None), 0);
}

#[test]
fn catches_decisions_on_one_sample() {
    assert!(reversals_of_a_noisy_load(Some(Defect::OneSampleIsEnough)) > 2);
}

/// Work that comes as turns of some seconds each: whoever takes some is stalled, and so is whoever is added. Then calm.
fn targets_of_a_server_that_stalls(defect: Option<Defect>) -> Vec<u16> {
    let mut ramp = Ramp::new(1, 4, 0.0, 1, defect);
    for _ in 0..60 {
        ramp.all(|slot, generation| Event::Stalled { slot, generation });
        ramp.load(0.0, 1);
    }
    ramp.all(|slot, generation| Event::Recovered { slot, generation });
    ramp.load(0.4, 200);
    ramp.targets
}

#[test]
fn a_server_whose_executors_are_all_stalled_grows_and_shrinks_when_they_are_back() {
    assert_eq!(targets_of_a_server_that_stalls(None), [1, 2, 3, 4, 3, 2, 1]);
}

#[test]
fn catches_stalled_executors_that_are_left_out_of_the_load() {
    assert_eq!(targets_of_a_server_that_stalls(Some(Defect::StalledAreIdle)), [1]);
}
