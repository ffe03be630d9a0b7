//! How many executors the load asks for: arithmetic on samples, after uWSGI's `cheaper_busyness`.
//!
//! Why adding and removing cannot alternate under a steady load. Let `total` be the busy time of all executors together,
//! in executors. From n, one is added when `total / n > high`. One is removed when `total / (n - 1) <= low`, which looks at
//! what the *rest* would have. Since `low < high`:
//! - after a removal the rest has `total / (n - 1) <= low < high`, so none is added;
//! - after an addition, n + 1 would go back to n only if `total / n <= low`, but it was `> high`.
//!
//! A stalled executor is one that is as busy as can be: left out, a server would not grow while all its executors are stalled,
//! which is when it should.
//!
//! Load has to change by the ratio of the two, 1.4 with the defaults, before the direction changes. Noise that does so is
//! held off by the samples that must agree in a row, and where that is not enough, each reversal makes the next removal
//! wait for longer. (Additions of several at once may overshoot; removals then lead back, and end where they should.)

use super::{Scaling, TargetReason};

/// What is known of the load at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Utilisation, added up over the executors that serve, starved ones apart; stalled ones are at 1.
    pub(super) total: f32,
    /// So many are these.
    pub(super) working: u16,
    /// Connections that wait in their listen queues.
    pub(super) queue: u64,
    /// The others that are wanted are quarantined, and nobody is down who will be back.
    pub(super) settled: bool,
    /// One is on its way: its share of the load is not known yet, so nothing is added.
    pub(super) starting: bool,
}

/// How many there may be, and how many there are to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) min: u16,
    pub(super) max: u16,
    pub(super) target: u16,
}

/// What the samples so far amount to.
#[derive(Debug)]
pub(super) struct Scaler {
    /// Samples in a row that were too busy, that would bear a removal, and with too long queues.
    above: u32,
    below: u32,
    queued: u32,
    /// Samples for which an order is left alone.
    pub(super) hold: u32,
    /// How many `below` it takes at present.
    pub(super) down_after: u32,
    /// Samples since the last removal, until one was added again.
    since_down: Option<u32>,
}

impl Scaler {
    pub(super) fn new(config: &Scaling) -> Self {
        Self { above: 0, below: 0, queued: 0, hold: 0, down_after: config.down_after, since_down: None }
    }

    /// Somebody has said how many there are to be.
    pub(super) fn ordered(&mut self, config: &Scaling) {
        *self = Self { hold: config.order_hold, ..Self::new(config) };
    }

    /// Takes in a sample; answers with a new target, if there is to be one.
    pub(super) fn sample(&mut self, config: &Scaling, sample: Sample, bounds: Bounds) -> Option<(u16, TargetReason)> {
        self.since_down = self.since_down.map(|samples| samples.saturating_add(1));
        let held = self.hold > 0;
        self.hold = self.hold.saturating_sub(1);
        if sample.working == 0 {
            return None;
        }
        let more = bounds.target < bounds.max && !sample.starting;
        count(&mut self.queued, sample.queue >= u64::from(config.emergency_queue.max(1)));
        if more && self.queued >= config.emergency_after.max(1) {
            return Some((self.up(config, bounds, config.emergency_step), TargetReason::Queue));
        }
        if held {
            return None;
        }
        if bounds.target < bounds.min {
            return Some((bounds.min, TargetReason::Bounds));
        }
        let step = config.step_down.max(1).min(bounds.target - bounds.min);
        // Nothing is taken away while somebody is down.
        let fewer = step > 0 && sample.settled;
        // Those who are quarantined go first.
        let rest = sample.working.min(bounds.target - step);
        count(&mut self.below, fewer && sample.total <= config.low.min(config.high) * f32::from(rest));
        if !sample.starting {
            count(&mut self.above, sample.total > config.high * f32::from(sample.working));
        }
        if more && self.above >= config.up_after.max(1) {
            return Some((self.up(config, bounds, config.step_up), TargetReason::Busy));
        }
        if fewer && self.below >= self.down_after.max(1) {
            return Some((self.down(config, bounds.target - step), TargetReason::Idle));
        }
        None
    }

    fn up(&mut self, config: &Scaling, bounds: Bounds, step: u16) -> u16 {
        // The last removal was a mistake, as it turns out, if it was so short a while ago.
        if self.since_down.take().is_some_and(|samples| samples <= self.down_after) {
            let most = config.down_after.saturating_mul(10);
            self.down_after = self.down_after.saturating_add(config.reversal_penalty).min(most);
        } else {
            self.forgive(config);
        }
        self.begin_anew();
        bounds.target.saturating_add(step.max(1)).min(bounds.max)
    }

    fn down(&mut self, config: &Scaling, target: u16) -> u16 {
        if self.since_down.is_some() {
            self.forgive(config);
        }
        self.begin_anew();
        self.since_down = Some(0);
        target
    }

    fn forgive(&mut self, config: &Scaling) {
        self.down_after = self.down_after.saturating_sub(config.reversal_penalty).max(config.down_after);
    }

    fn begin_anew(&mut self) {
        (self.above, self.below, self.queued) = (0, 0, 0);
    }
}

/// Counts what is so in a row.
fn count(counter: &mut u32, so: bool) {
    *counter = if so { counter.saturating_add(1) } else { 0 };
}
