//! New connections go preferably to slots with fewer open connections and less to do.
//!
//! Connections that are open stay where they are: an executor shares nothing with the others, so there is no way to take
//! a connection with its tasks, its timers and the user's state to another one. What this policy evens out is what comes.
//!
//! Weights and not "the one with the least": between two samples everything that comes would land on that one. With
//! weights bounded in both directions a slot that is empty among full ones gets at most [`WEIGHT_MAX`] to
//! [`WEIGHT_MIN`] times what another gets, so it catches up over many samples and no burst can flood it.

use std::time::Duration;

use libc::sock_filter;

use super::program::random_by_weight;
use super::{Draw, Share, SlotLoad, Steering, with_room};

/// How often loads are to be sampled. Long against a turn, short against the time in which connections pile up; a tenth
/// of a percent of a core for a few executors.
const REFRESH: Duration = Duration::from_millis(100);

/// The weight of a slot that is as loaded as the mean. A step of weight is then 6 %, so that noise does not change the
/// table each time.
const WEIGHT_MEAN: f64 = 16.0;
/// The most and the least: twice and half as much as the mean gets. Of four slots an empty one so gets four sevenths of
/// what comes, where three are full.
pub const WEIGHT_MAX: u16 = 32;
pub const WEIGHT_MIN: u16 = 8;

/// How strongly a difference is answered: connections 10 % below the mean give 40 % more weight. A correction that is
/// larger than what it corrects would swing; for that, a tenth of all open connections would have to come within one
/// refresh, and then the bounds above hold it.
const GAIN_CONNECTIONS: f64 = 4.0;
/// Half of a core less utilised than the mean gives 50 % more weight.
const GAIN_UTILISATION: f64 = 1.0;

/// The policy for connections that live long, or cost unequally much.
#[derive(Clone, Copy, Debug)]
pub struct LeastLoaded;

impl Steering for LeastLoaded {
    fn name(&self) -> &'static str {
        "least-loaded"
    }

    fn draw(&self) -> Draw {
        Draw::Random
    }

    fn program(&self, shares: &[Share], _slots: u16) -> Option<Vec<sock_filter>> {
        random_by_weight(shares)
    }

    fn refresh(&self) -> Option<Duration> {
        Some(REFRESH)
    }

    fn shares(&self, loads: &[SlotLoad]) -> Vec<Share> {
        shares(loads)
    }
}

/// The weights for slots of these loads. What waits in a slot's queue counts as its connection already. A full slot gets
/// nothing, unless all are.
pub fn shares(loads: &[SlotLoad]) -> Vec<Share> {
    let loads = with_room(loads);
    let count = loads.len().max(1) as f64;
    let connections = |load: &SlotLoad| load.open as f64 + f64::from(load.queue);
    let utilisation =
        |load: &SlotLoad| if load.utilisation.is_finite() { load.utilisation.clamp(0.0, 1.0) } else { 0.0 };
    let mean_connections = loads.iter().map(connections).sum::<f64>() / count;
    let mean_utilisation = loads.iter().map(utilisation).sum::<f64>() / count;
    let share = |load: &SlotLoad| {
        // With a handful of connections one more or less says little.
        let fewer = (mean_connections - connections(load)) / (mean_connections + 4.0);
        let idler = mean_utilisation - utilisation(load);
        let weight = WEIGHT_MEAN * (1.0 + GAIN_CONNECTIONS * fewer + GAIN_UTILISATION * idler);
        let weight = weight.round().clamp(f64::from(WEIGHT_MIN), f64::from(WEIGHT_MAX));
        Share { slot: load.slot, weight: weight as u16 }
    };
    loads.iter().map(share).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(slot: u16, open: u64) -> SlotLoad {
        SlotLoad { slot, open, ..SlotLoad::default() }
    }

    fn loads(open: &[u64]) -> Vec<SlotLoad> {
        (0..).zip(open).map(|(slot, open)| load(slot, *open)).collect()
    }

    fn weights(loads: &[SlotLoad]) -> Vec<u16> {
        shares(loads).iter().map(|share| share.weight).collect()
    }

    #[test]
    fn equally_loaded_slots_weigh_the_same() {
        for open in [0, 1, 250, 1_000_000] {
            assert_eq!(weights(&loads(&[open; 4])), [16; 4]);
        }
        assert!(shares(&[]).is_empty());
    }

    #[test]
    fn fewer_connections_and_less_utilisation_weigh_more_within_bounds() {
        let w = weights(&loads(&[100, 90, 110, 100]));
        assert!(w[1] > w[0] && w[0] > w[2] && w[0] == w[3], "{w:?}");
        assert_eq!(weights(&loads(&[0, 500, 500, 500]))[0], WEIGHT_MAX);
        assert_eq!(weights(&loads(&[0, 1_000_000]))[1], WEIGHT_MIN);

        let mut busy = loads(&[100, 100]);
        busy[1].utilisation = 0.9;
        let w = weights(&busy);
        assert!(w[0] > w[1], "{w:?}");
        busy[1].utilisation = f64::NAN;
        assert_eq!(weights(&busy), [16, 16]);
    }

    #[test]
    fn what_waits_in_a_queue_counts_and_a_full_slot_gets_nothing() {
        let mut queued = loads(&[50, 50]);
        queued[0].queue = 100;
        assert!(weights(&queued)[0] < weights(&queued)[1]);
        queued[1].full = true;
        assert_eq!(shares(&queued), [Share { slot: 0, weight: 16 }]);
        queued[0].full = true;
        assert_eq!(shares(&queued).len(), 2);
    }

    /// Four executors and clients that connect and stay, in virtual time.
    struct Simulation {
        open: [u64; 4],
        random: u64,
    }

    impl Simulation {
        fn new(seed: u64) -> Self {
            Self { open: [0; 4], random: seed }
        }

        /// SplitMix64, the upper half of it.
        fn number(&mut self) -> u32 {
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((mixed ^ (mixed >> 31)) >> 32) as u32
        }

        /// Connections that come between two samples.
        fn burst(&mut self, connections: u64) {
            let shares = shares(&loads(&self.open));
            let total: u32 = shares.iter().map(|share| u32::from(share.weight)).sum();
            for _ in 0..connections {
                let mut number = self.number() % total;
                let chosen = shares.iter().find(|share| match number.checked_sub(u32::from(share.weight)) {
                    Some(rest) => {
                        number = rest;
                        false
                    }
                    None => true,
                });
                self.open[usize::from(chosen.expect("the number is below the sum").slot)] += 1;
            }
        }

        /// Connections over a time, which come as they like: in some intervals twice as many as in others.
        fn connect(&mut self, connections: u64, over: Duration) {
            let intervals = over.as_millis() as u64 / REFRESH.as_millis() as u64;
            let mut left = connections;
            for interval in (1..=intervals).rev() {
                let mean = left / interval;
                let now = if interval == 1 { left } else { mean / 2 + u64::from(self.number()) % (mean + 1) };
                self.burst(now.min(left));
                left -= now.min(left);
            }
        }

        fn ratio(&self) -> f64 {
            let (least, most) = (self.open.iter().min(), self.open.iter().max());
            *most.expect("there are four") as f64 / *least.expect("there are four") as f64
        }
    }

    const SEEDS: u64 = 1000;

    #[test]
    fn a_thousand_idle_connections_end_up_evenly_spread() {
        for seed in 0..SEEDS {
            let mut simulation = Simulation::new(seed);
            simulation.connect(1000, Duration::from_secs(1 + seed % 5));
            assert!(simulation.ratio() <= 1.25, "seed {seed}: {:?}", simulation.open);
        }
    }

    #[test]
    fn an_executor_that_was_restarted_empty_catches_up() {
        for seed in 0..SEEDS {
            let mut simulation = Simulation::new(seed);
            simulation.connect(500, Duration::from_secs(2));
            simulation.open[(seed % 4) as usize] = 0;
            simulation.connect(1000, Duration::from_secs(1 + seed % 5));
            assert!(simulation.ratio() <= 1.25, "seed {seed}: {:?}", simulation.open);
        }
    }

    #[test]
    fn one_that_is_restarted_in_the_middle_catches_up_too() {
        for seed in 0..SEEDS {
            let mut simulation = Simulation::new(seed);
            simulation.connect(500, Duration::from_secs(2));
            simulation.connect(300, Duration::from_secs(1));
            simulation.open[(seed % 4) as usize] = 0;
            simulation.connect(700, Duration::from_secs(2));
            assert!(simulation.ratio() <= 1.25, "seed {seed}: {:?}", simulation.open);
        }
    }

    #[test]
    fn no_burst_between_two_samples_floods_an_empty_executor() {
        for seed in 0..SEEDS {
            let mut simulation = Simulation::new(seed);
            simulation.open = [0, 167, 167, 166];
            simulation.burst(1000);
            // Four sevenths, and five standard deviations.
            assert!(simulation.open[0] < 650, "seed {seed}: {:?}", simulation.open);
            assert!(simulation.open[1..].iter().all(|open| *open > 230), "seed {seed}: {:?}", simulation.open);
        }
    }
}
