//! A new process takes over: spawned, waited for, and then this one drains; or it comes to nothing, and this one goes on
//! as before. At most one at a time, and whoever asked gets exactly one answer.
//!
//! The successor attaches a steering program of its own before it says that it is ready, so that after a failure this
//! process must put its own in force again: once when the failure is known, and once more when a killed successor has
//! ended, since it may have got there in between.
//!
//! An upgrade in a crash loop is allowed: the successor shares nothing with us but the listeners, and a new binary is what
//! ends a crash loop. Even the end by "all quarantined" waits for it.

use std::time::Instant;

use super::slot::{Limit, later};
use super::{Action, DrainReason, Phase, Policy, UpgradeRefusal};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Upgrade {
    None,
    Waiting {
        successor: u32,
        limit: Limit,
    },
    /// Its end has been ordered and not been heard of. After a while it is taken for granted.
    Killing {
        successor: u32,
        until: Instant,
    },
}

impl Upgrade {
    pub(super) fn is_waiting(self) -> bool {
        matches!(self, Self::Waiting { .. })
    }

    pub(super) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Waiting { limit, .. } => Some(limit.at),
            Self::None | Self::Killing { .. } => None,
        }
    }
}

impl Policy {
    pub(super) fn upgrade_asked(&mut self, now: Instant) {
        let refusal = match (self.phase, self.upgrade) {
            (Phase::New | Phase::Starting, _) => Some(UpgradeRefusal::Starting),
            (Phase::Running, Upgrade::Waiting { .. }) => Some(UpgradeRefusal::AlreadyUpgrading),
            (Phase::Running, Upgrade::Killing { until, .. }) if now < until => Some(UpgradeRefusal::AlreadyUpgrading),
            (Phase::Running, _) => None,
            _ => Some(UpgradeRefusal::Stopping),
        };
        if let Some(refusal) = refusal {
            return self.actions.push(Action::UpgradeAnswer(Err(refusal)));
        }
        self.successors += 1;
        let (successor, limit) = (self.successors, Limit::new(now, self.config.upgrade_timeout));
        self.upgrade = Upgrade::Waiting { successor, limit };
        self.actions.push(Action::SpawnSuccessor { successor, deadline: limit.at });
    }

    pub(super) fn successor_ready(&mut self, number: u32, now: Instant) {
        if matches!(self.upgrade, Upgrade::Waiting { successor, .. } if successor == number) {
            self.upgrade = Upgrade::None;
            self.actions.push(Action::UpgradeAnswer(Ok(())));
            self.begin_drain(DrainReason::Upgrade, later(now, self.config.drain_deadline), now);
        }
    }

    /// After the hand-over it is too late: the listeners are let go of.
    pub(super) fn successor_failed(&mut self, number: u32) {
        match self.upgrade {
            Upgrade::Waiting { successor, .. } if successor == number => {
                self.upgrade = Upgrade::None;
                self.actions.push(Action::UpgradeAnswer(Err(UpgradeRefusal::Failed)));
                self.reattach();
            }
            Upgrade::Killing { successor, .. } if successor == number => {
                self.upgrade = Upgrade::None;
                self.reattach();
            }
            _ => {}
        }
    }

    /// Ends an upgrade whose successor is not ready yet.
    pub(super) fn cut_upgrade(&mut self, why: UpgradeRefusal, now: Instant) {
        if let Upgrade::Waiting { successor, .. } = self.upgrade {
            self.upgrade = Upgrade::Killing { successor, until: later(now, self.config.stop_grace) };
            self.actions.push(Action::KillSuccessor { successor });
            self.actions.push(Action::UpgradeAnswer(Err(why)));
            self.reattach();
        }
    }

    pub(super) fn tick_upgrade(&mut self, now: Instant) {
        let allowed = self.config.upgrade_timeout;
        if let Upgrade::Waiting { limit, .. } = &mut self.upgrade
            && limit.strikes(now, allowed, &self.config)
        {
            self.cut_upgrade(UpgradeRefusal::TimedOut, now);
        }
    }

    fn reattach(&mut self) {
        if self.phase.serves() {
            self.actions.push(Action::Reattach);
        }
    }
}
