//! The policy's settings, and the arithmetic of the backoff.

use std::time::Duration;

use super::slot::{FAR, Random};

/// What an operator may set. Plain data, already validated.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// When a failed generation is followed by another, and when no more.
    pub restart: RestartPolicy,
    /// How long a drain may take when the one who asks names no time. 30 s (DESIGN section 8).
    pub drain_deadline: Duration,
    /// How long a generation may take from the order to start until it is ready. 30 s: an executor is up
    /// in milliseconds, the rest is for the embedder's start-up code, and it is well within the 90 s that
    /// systemd grants a service.
    pub start_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            restart: RestartPolicy::default(),
            drain_deadline: Duration::from_secs(30),
            start_timeout: Duration::from_secs(30),
        }
    }
}

/// How a slot comes back after its generation failed. The defaults are those of DESIGN section 5.
///
/// The first failure is answered at once, the next after `backoff_base`, then doubling up to
/// `backoff_max`.
#[derive(Clone, Debug, PartialEq)]
pub struct RestartPolicy {
    /// The pause before the second restart in a row. 100 ms.
    pub backoff_base: Duration,
    /// The longest pause. 15 s.
    pub backoff_max: Duration,
    /// The part of a pause that is random, 0 to 1, so that slots felled by one cause do not return in
    /// step. It only shortens: 0.2 means 80 % to 100 % of the pause, and `backoff_max` stays the maximum.
    pub jitter: f32,
    /// A generation that was ready for so long starts its slot's backoff over. 30 s.
    pub healthy_after: Duration,
    /// So many failures within `quarantine_window` quarantine the slot. 5; 0 means never.
    pub quarantine_after: u32,
    /// The sliding window in which failures are counted. 30 s.
    pub quarantine_window: Duration,
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
