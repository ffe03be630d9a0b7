//! Faults on order: what [`crate::test`] has embedders try their own behaviour with. A fault goes to the executor as a job
//! and strikes between two of its tasks, where nothing of the embedder's is on the stack.

use std::rc::Rc;
use std::time::Duration;

use super::Supervisor;
use super::policy::SlotState;
use crate::Error;
use crate::error::Kind;
use crate::executor::core::{Core, Failure};
use crate::executor::inbox::{Job, Posted};
use crate::order::Promise;

/// A fault to try one's own behaviour with. The order to [`provoke`](crate::test::provoke) it is done when it begins.
///
/// ```
/// use std::time::Duration;
/// use ringleader::test::{App, Provocation, provoke, wait_until};
/// # use ringleader::{Body, BoxError, Request, Response, service_fn};
/// # let app = App::start(async |_| Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty())))))?;
///
/// provoke(&app, 0, Provocation::Panic).wait()?;
/// wait_until(&app, |stats| stats.executors[0].generation == 2);
/// # Ok::<(), BoxError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Provocation {
    /// A panic that nothing contains, whatever the [`PanicPolicy`](crate::PanicPolicy): it ends the generation, with all
    /// its connections. For one that is contained, let a handler panic.
    Panic,
    /// A turn that takes this long: what a handler that blocks does to its executor. With more than
    /// [`Builder::hang`](crate::Builder::hang) says it is a hang; its thread cannot be joined before the time has passed.
    Stall(Duration),
    /// The generation ends as if a [`background`](crate::Shard::background) task had failed: no panic, no panic hook.
    Restart,
}

/// Whom to tell that the fault begins. Dropped by whoever does not come to it.
struct Answer(Option<Promise<()>>);

impl Answer {
    fn give(mut self, outcome: Result<(), Error>) {
        if let Some(promise) = self.0.take() {
            promise.fulfil(outcome);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(promise) = self.0.take() {
            promise
                .fulfil(refusal("the executor's generation ended before the fault could begin, or its inbox is full"));
        }
    }
}

fn refusal(why: impl Into<String>) -> Result<(), Error> {
    Err(Error::new(Kind::Refused, why))
}

impl Provocation {
    fn strike(self, core: &Core) {
        match self {
            Self::Panic => panic!("provoked by ringleader::test"),
            Self::Stall(time) => std::thread::sleep(time),
            Self::Restart => core.fail(Failure::Background {
                name: "ringleader::test",
                error: "a restart was provoked by ringleader::test".to_owned(),
            }),
        }
    }
}

impl Supervisor {
    pub(super) fn provoke(&self, slot: usize, what: Provocation, promise: Promise<()>) {
        let answer = Answer(Some(promise));
        let state = self.policy.slots().find(|status| usize::from(status.slot) == slot).map(|status| status.state);
        match state {
            Some(SlotState::Ready | SlotState::Stalled | SlotState::Starved) => {
                let strike = move |core: &Rc<Core>| {
                    answer.give(Ok(()));
                    what.strike(core);
                };
                // Dropped when it is refused or comes too late, and its answer with it.
                let inbox = &self.seats[slot].inbox;
                if matches!(inbox.post(Job::Closure(Box::new(strike))), Ok(Posted::Late)) {
                    inbox.drop_jobs();
                }
            }
            Some(state) => answer.give(refusal(format!("slot {slot} has no executor that serves: it is {state:?}"))),
            None => answer.give(refusal(format!("there is no slot {slot}, only {}", self.seats.len()))),
        }
    }
}
