//! How a server's end is told: an outcome of the policy becomes what `join`, `stop` and `start` answer.

use super::policy::{self, Outcome, Stopped};
use crate::Error;
use crate::error::Kind;
use crate::handle::Exit;

/// A drain that was told to end at once, or whose time was up, when nothing was left to finish has still finished everything.
pub(super) fn unless_cut_off(outcome: Outcome, cut_off: bool) -> Outcome {
    match outcome {
        Outcome::Stopped { how: Stopped::Interrupted | Stopped::DeadlinePassed, handed_over, failed, abandoned }
            if !cut_off =>
        {
            Outcome::Stopped { how: Stopped::Drained, handed_over, failed, abandoned }
        }
        other => other,
    }
}

/// What everybody is told who waits for the end.
///
/// `had_started`: whether `start` has been answered already. `threads_left` did not return, beside those that the policy
/// knows of; `abandoned_closures` still run. `successor_failed`: the process that has taken over has. `failure_of` is what
/// the last failure of a slot said.
pub(super) fn result(
    outcome: Outcome,
    had_started: bool,
    threads_left: usize,
    abandoned_closures: usize,
    successor_failed: bool,
    failure_of: impl Fn(Option<u16>) -> Option<String>,
) -> Result<Exit, Error> {
    match outcome {
        Outcome::Stopped { .. } if !had_started => {
            Err(Error::new(Kind::Stopped, "the server was stopped before it had started"))
        }
        Outcome::Stopped { how, handed_over, failed, abandoned } => Ok(Exit {
            drained: how == Stopped::Drained && failed == 0,
            handed_over: handed_over && !successor_failed,
            successor_failed,
            failed: usize::from(failed),
            abandoned: usize::from(abandoned) + threads_left,
            abandoned_closures,
        }),
        Outcome::StartFailed { slot, failure, .. } => {
            let why = failure_of(Some(slot)).unwrap_or_else(|| match failure {
                policy::Failure::StartTimedOut => "its start-up took too long".to_owned(),
                policy::Failure::ThreadDied => "its thread ended; the log has more".to_owned(),
                other => format!("{other:?}"),
            });
            Err(Error::new(Kind::Start, format!("executor {slot} did not start: {why}")))
        }
        Outcome::AllQuarantined { .. } => {
            let last = failure_of(None).unwrap_or_default();
            let message =
                format!("every executor failed too often and was given up; the last to be heard of one: {last}");
            Err(Error::new(Kind::Quarantined, message))
        }
    }
}
