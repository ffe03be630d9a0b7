//! The policy's settings, and the arithmetic of the backoff.

use std::time::Duration;

use super::slot::{FAR, Random};

/// What an operator may set. Plain data, already validated.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// When a failed generation is followed by another, and when no more.
    pub restart: RestartPolicy,
    /// How long a drain may take when the one who asks names no time. 30 s, as gunicorn's
    /// `graceful_timeout`.
    pub drain_deadline: Duration,
    /// How long the executors go on accepting after readiness has turned false at a stop: the time that a load balancer
    /// needs to notice. 0, as nginx and systemd expect; in Kubernetes what is otherwise a `preStop` sleep of some seconds.
    pub drain_delay: Duration,
    /// How long a generation may take from the order to start until it is ready. 30 s: an executor is up
    /// in milliseconds, the rest is for the embedder's start-up code, and it is well within the 90 s that
    /// systemd grants a service.
    pub start_timeout: Duration,
    /// The fewest executors that automatic scaling keeps. All slots, which is no automatic scaling: that is on where this
    /// is below the number of slots. Values above the number of slots mean all.
    pub slots_min: u16,
    /// How many executors to start with; brought into the range from `slots_min` to the number of slots. All.
    pub slots_start: u16,
    /// How automatic scaling decides.
    pub scaling: Scaling,
    /// How long one turn of an executor may take until it is called stalled: the watchdog's limit. What lasts from the
    /// beginning of the turn is counted from this long before [`Stalled`](super::Event::Stalled). 100 ms (DESIGN section 5).
    pub stall_limit: Duration,
    /// When failures make the server unready.
    pub readiness: ReadinessPolicy,
    /// What becomes of an executor whose turn does not end.
    pub hang: HangPolicy,
    /// When a turn is held to have no end. 30 s (DESIGN section 5; gunicorn's `timeout` is as long); `None` is never.
    pub hang_timeout: Option<Duration>,
    /// How long a generation that was told to stop at once may take before its thread is given up; and so long a successor
    /// that was killed. 5 s: a generation drops its connections in well under a millisecond, so that is for one that sits in
    /// a system call or a computation and may yet return. At least 100 ms.
    pub stop_grace: Duration,
    /// A tick this much later than its deadline means that the whole process stood still (SIGSTOP, a paused virtual
    /// machine): the executors did not run either, so their time to start or stop begins anew, once. 1 s, ten times the
    /// default of `stall_limit`; at least 10 ms.
    pub standstill_limit: Duration,
    /// How long a successor may take to be ready. 60 s: twice `start_timeout`, and within systemd's 90 s.
    pub upgrade_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            restart: RestartPolicy::default(),
            drain_deadline: Duration::from_secs(30),
            drain_delay: Duration::ZERO,
            start_timeout: Duration::from_secs(30),
            slots_min: u16::MAX,
            slots_start: u16::MAX,
            scaling: Scaling::default(),
            stall_limit: Duration::from_millis(100),
            readiness: ReadinessPolicy::default(),
            hang: HangPolicy::default(),
            hang_timeout: Some(Duration::from_secs(30)),
            stop_grace: Duration::from_secs(5),
            standstill_limit: Duration::from_secs(1),
            upgrade_timeout: Duration::from_secs(60),
        }
    }
}

impl Config {
    /// After how long in one turn something is to be done about it.
    pub(super) fn hang_limit(&self) -> Option<Duration> {
        self.hang_timeout.filter(|_| self.hang != HangPolicy::Ignore)
    }
}

/// What becomes of an executor that has been stalled for as long as a hang takes.
///
/// ```
/// use std::time::Duration;
/// use ringleader::{HangPolicy, Server};
///
/// // Under systemd with `Restart=always`: a clean process instead of one with a thread left behind.
/// let builder = Server::builder().hang(HangPolicy::Abort, Some(Duration::from_secs(60)));
/// # drop(builder);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum HangPolicy {
    /// Its sockets are shut down, its thread is left behind, and another takes the slot.
    #[default]
    Replace,
    /// The process is ended as by a crash.
    Abort,
    /// It is waited for; its slot gets no new connections.
    Ignore,
}

/// When executors are added and removed by load. The model is uWSGI's `cheaper_busyness`; where a default is its
/// default, that is said. It takes a sample every 3 s (`cheaper-overload`), we take one each second: times are the same.
///
/// Utilisation is added up over the running executors. One is added when their mean is above `high`; one is removed when
/// the rest would have a mean of at most `low` with what is there. See `scaling.rs` for why these two cannot alternate.
///
/// ```
/// use std::time::Duration;
/// use ringleader::{Scaling, Server};
///
/// let mut scaling = Scaling::default();
/// scaling.high = 0.6;
/// scaling.period = Duration::from_millis(500);
/// let builder = Server::builder().executors(2..=8).scaling(scaling);
/// # let _ = builder;
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Scaling {
    /// Between two samples. 1 s, and at least 10 ms. The loop takes the samples; the policy counts them.
    pub period: Duration,
    /// Mean utilisation above which one more is wanted, 0 to 1. 0.7: there a request waits 2.3 times as long as it is
    /// served (M/M/1), at 0.9 nine times. uWSGI has 0.5, for workers that take one request at a time.
    pub high: f32,
    /// Mean utilisation that the rest may have after one was removed, 0 to 1, below `high`. 0.5; going from two to one,
    /// that is uWSGI's `cheaper-busyness-min` of 25 %.
    pub low: f32,
    /// Samples in a row above `high` until one is added. 3: uWSGI's `cheaper-overload`, 3 s.
    pub up_after: u32,
    /// Samples in a row that allow it until one is removed. 30: uWSGI's `cheaper-busyness-multiplier` of 10 times 3 s.
    pub down_after: u32,
    /// Added to `down_after` for each time that one had to be added again within that many samples after one was removed;
    /// taken off again as such times pass without. 6: uWSGI's `cheaper-busyness-penalty` of 2 times 3 s. `down_after`
    /// grows to ten times its value at most, which by the defaults takes 45 reversals: a bound, and no setting.
    pub reversal_penalty: u32,
    /// Connections in the listen queues of running executors that are an emergency. 33: uWSGI's
    /// `cheaper-busyness-backlog-alert`.
    pub emergency_queue: u32,
    /// Samples in a row with such queues until executors are added, whatever the utilisation. 2: one may be a burst
    /// that the next turn takes.
    pub emergency_after: u32,
    /// How many are added at a time. 1: uWSGI's `cheaper-step`.
    pub step_up: u16,
    /// How many are removed at a time. 1, as uWSGI does.
    pub step_down: u16,
    /// How many are added in an emergency. 1: uWSGI's `cheaper-busyness-backlog-step`.
    pub emergency_step: u16,
    /// Samples after an order during which nothing is decided by load, emergencies apart. 60: whoever gives an order wants
    /// to see it in force.
    pub order_hold: u32,
}

impl Default for Scaling {
    fn default() -> Self {
        Self {
            period: Duration::from_secs(1),
            high: 0.7,
            low: 0.5,
            up_after: 3,
            down_after: 30,
            reversal_penalty: 6,
            emergency_queue: 33,
            emergency_after: 2,
            step_up: 1,
            step_down: 1,
            emergency_step: 1,
            order_hold: 60,
        }
    }
}

/// When failures of executors make the server unready, which is what `/ready`, [`Stats::ready`](crate::Stats::ready) and
/// the service manager are told. One whose start is under way, or that is being stopped, is unready whatever these say, and so
/// is one of which no executor serves at the moment.
///
/// ```
/// use std::time::Duration;
/// use ringleader::{ReadinessPolicy, Server};
///
/// // Behind a load balancer with many servers: out at the first executor that hangs.
/// let mut readiness = ReadinessPolicy::default();
/// readiness.unfit_max = 0.0;
/// readiness.stalled_after = Duration::from_millis(300);
/// let builder = Server::builder().readiness(readiness);
/// # let _ = builder;
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ReadinessPolicy {
    /// The part of the executors, 0 to 1, that may be unfit, quarantined or stalled, while the server is ready. 0.5: as
    /// Envoy's `healthy_panic_threshold`, below which it no longer believes that to leave a host out helps. 0 is unready at
    /// the first; with 1 the server is ready until the last is quarantined, and ends then.
    pub unfit_max: f32,
    /// A turn that takes so long makes its executor unfit; below [`Builder::stall_limit`](crate::Builder::stall_limit), at
    /// once when it is stalled. 1 s: a probe that waits for it has then been given up, by Kubernetes with its
    /// default `timeoutSeconds`.
    pub stalled_after: Duration,
}

impl Default for ReadinessPolicy {
    fn default() -> Self {
        Self { unfit_max: 0.5, stalled_after: Duration::from_secs(1) }
    }
}

impl ReadinessPolicy {
    /// Whether so many of `all` are too many.
    pub(super) fn is_unfit(&self, unfit: usize, all: usize) -> bool {
        // 0.7 is less than seven tenths, and far from any other part of as many slots as there may be.
        const ROUNDING: f64 = 1e-3;
        unfit as f64 > f64::from(self.unfit_max) * all as f64 + ROUNDING
    }
}

/// When and how often a failed executor is restarted. The first failure is answered at once, the next after `backoff_base`,
/// then after twice as long each time, up to `backoff_max`.
///
/// ```
/// use ringleader::{RestartPolicy, Server};
///
/// let mut restart = RestartPolicy::default();
/// restart.quarantine_after = 0; // as often as it takes
/// let builder = Server::builder().restart(restart);
/// # let _ = builder;
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RestartPolicy {
    /// The pause before the second restart in a row. 100 ms, as systemd's `RestartSec` and in PM2's examples of
    /// `exp_backoff_restart_delay`.
    pub backoff_base: Duration,
    /// The longest pause. 15 s, as PM2's.
    pub backoff_max: Duration,
    /// The part of a pause that is random, 0 to 1, so that executors felled by one cause do not return in step. It only
    /// shortens: 0.2, the default and that of gRPC's connection backoff, means 80 % to 100 % of the pause, and `backoff_max`
    /// stays the maximum.
    pub jitter: f32,
    /// Healthy for this long, an executor's failures are forgotten. 30 s, as PM2's.
    pub healthy_after: Duration,
    /// This many failures within `quarantine_window` and the slot stays down; 0 is never. 5, as systemd's
    /// `StartLimitBurst`.
    pub quarantine_after: u32,
    /// The sliding window in which failures are counted. 30 s, as `healthy_after`: systemd's `StartLimitIntervalSec`
    /// is 10 s, for pauses that do not grow.
    pub quarantine_window: Duration,
    /// With so many threads of executors left behind that hung ([`HangPolicy::Replace`]), a slot stays down as well. 3: a
    /// hang takes the time of [`Builder::hang`](crate::Builder::hang), so that `quarantine_window` never sees five of them.
    /// The second may be the same chance as the first; the third is the code's way. At least 1.
    pub leaked_max: u16,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            backoff_base: Duration::from_millis(100),
            backoff_max: Duration::from_secs(15),
            jitter: 0.2,
            healthy_after: Duration::from_secs(30),
            quarantine_after: 5,
            quarantine_window: Duration::from_secs(30),
            leaked_max: 3,
        }
    }
}

impl RestartPolicy {
    /// The pause before the restart that follows so many failures in a row.
    pub(super) fn pause(&self, in_a_row: u32, random: &mut Random) -> Duration {
        let Some(doublings) = in_a_row.checked_sub(2) else {
            return Duration::ZERO;
        };
        let factor = 2_u32.saturating_pow(doublings);
        let full = self.backoff_base.saturating_mul(factor);
        let full = full.min(self.backoff_max).min(FAR);
        #[expect(clippy::manual_clamp, reason = "clamp keeps NaN, max does not")]
        let jitter = f64::from(self.jitter.max(0.0).min(1.0));
        full.mul_f64(1.0 - jitter * random.fraction())
    }
}
