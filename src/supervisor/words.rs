//! The policy's reasons in words, for logs and errors.

use super::policy::{NotReady, Quarantine, ScaleRefusal, TargetReason, UpgradeRefusal};

pub(super) fn not_ready(why: NotReady) -> &'static str {
    match why {
        NotReady::Starting => "not every executor has started yet",
        NotReady::MostQuarantined => "too many of the executors are quarantined",
        NotReady::Stalled => "too many of the executors are stalled or quarantined",
        NotReady::NoActiveSlot => "no executor serves at the moment",
        NotReady::Stopping => "the server stops",
    }
}

pub(super) fn quarantine(why: Quarantine) -> &'static str {
    match why {
        Quarantine::CrashLoop => "its executors failed too often",
        Quarantine::Stuck => "its executor answers neither start nor stop",
        Quarantine::Hangs => "too many of its executors hung and were left behind",
    }
}

pub(super) fn target(why: TargetReason) -> &'static str {
    match why {
        TargetReason::Ordered => "as ordered",
        TargetReason::Busy => "the executors are too busy",
        TargetReason::Queue => "connections wait to be accepted",
        TargetReason::Idle => "fewer executors are enough",
        TargetReason::Bounds => "an order's time is over, and it was out of the bounds for scaling by load",
    }
}

pub(super) fn scale_refusal(why: ScaleRefusal) -> String {
    match why {
        ScaleRefusal::OutOfRange { max } => format!(
            "this server has slots for 1 to {max} executors; how many there can be at the most is given at its start"
        ),
        ScaleRefusal::Starting => "the server is still starting; order it again when it has started".to_owned(),
        ScaleRefusal::Stopping => "the server is stopping, or another process has taken over".to_owned(),
        ScaleRefusal::Upgrading => {
            "an upgrade is under way, and the new process has a number of its own; order it there".to_owned()
        }
    }
}

/// `failure` is what the successor's own side had to say.
pub(super) fn upgrade_refusal(why: UpgradeRefusal, failure: Option<String>) -> String {
    match why {
        UpgradeRefusal::Starting => "the server is still starting".to_owned(),
        UpgradeRefusal::Stopping => "the server is stopping, or another process has taken over".to_owned(),
        UpgradeRefusal::AlreadyUpgrading => "an upgrade is under way, and goes on".to_owned(),
        UpgradeRefusal::TimedOut => "it was not ready in time".to_owned(),
        UpgradeRefusal::Failed => failure.unwrap_or_else(|| "it could not be started".to_owned()),
        UpgradeRefusal::Interrupted => "the server was told to stop meanwhile".to_owned(),
    }
}
