//! What user code holds of its executor.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::BoxError;
use crate::executor::core::{Core, Failure};
use crate::executor::tasks::OnPanic;
use crate::handle::{ExecutorState, ExecutorStats};
use crate::protocol::answer::Contained;
use crate::time::{Sleep, Timeout};

/// A slot's number: 0 to the number of slots less one, for the life of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub(crate) u16);

impl SlotId {
    /// The number.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// This executor: identity, timers, tasks. Given to the start-up closure; clone it into whatever needs it. It is bound
/// to its thread (neither `Send` nor `Sync`) and to one generation.
#[derive(Clone)]
pub struct Shard {
    core: Rc<Core>,
}

impl Shard {
    pub(crate) fn new(core: &Rc<Core>) -> Self {
        Self { core: Rc::clone(core) }
    }

    pub(crate) fn core(&self) -> &Rc<Core> {
        &self.core
    }

    /// The slot this executor lives in.
    #[must_use]
    pub fn id(&self) -> SlotId {
        SlotId(self.core.slot)
    }

    /// Which generation of the slot this is: 1 at first, one more after each restart.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.core.generation
    }

    /// The CPU this thread is running on.
    #[must_use]
    pub fn cpu(&self) -> usize {
        crate::sys::affinity::current_cpu()
    }

    /// The slot's counters.
    #[must_use]
    pub fn stats(&self) -> ExecutorStats {
        ExecutorStats::read(self.core.slot, ExecutorState::Serving, &self.core.cells)
    }

    /// Runs a future on this executor. A panic in it is contained: it becomes the task's error. Dropping the [`Task`]
    /// lets it run on.
    ///
    /// It lives as long as the generation at most.
    pub fn spawn<F: Future + 'static>(&self, future: F) -> Task<F::Output> {
        let task = Rc::new(RefCell::new(Join::Running(None)));
        let join = Rc::clone(&task);
        let future = async move {
            let outcome = Contained::new(future).await.map_err(TaskError);
            let waker = match std::mem::replace(&mut *join.borrow_mut(), Join::Done(Some(outcome))) {
                Join::Running(waker) => waker,
                Join::Done(_) => None,
            };
            waker.into_iter().for_each(Waker::wake);
        };
        self.core.spawn(Box::pin(future), OnPanic::Contain);
        Task(task)
    }

    /// Runs a future that this executor cannot do without: when it fails or panics the executor is restarted. It may
    /// end with `Ok`.
    pub fn background<F>(&self, name: &'static str, future: F)
    where
        F: Future<Output = Result<(), BoxError>> + 'static,
    {
        let core = Rc::clone(&self.core);
        let future = async move {
            if let Err(error) = future.await {
                core.fail(Failure::Background { name, error: error.to_string() });
            }
        };
        self.core.spawn(Box::pin(future), OnPanic::Escape);
    }

    /// Completes after `duration`, rounded up to a millisecond.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        Sleep::new(duration)
    }

    /// Drops `future` when it is not done within `limit`.
    pub fn timeout<F: Future>(&self, limit: Duration, future: F) -> Timeout<F> {
        Timeout::new(future, limit)
    }

    /// Completes when the executor is told to drain: time for long-lived work to come to its end.
    pub fn draining(&self) -> Draining {
        Draining { core: Rc::clone(&self.core), place: None }
    }
}

/// Completes when the executor is told to drain. Made by [`Shard::draining`].
#[must_use = "this does nothing until it is awaited"]
pub struct Draining {
    core: Rc<Core>,
    /// Where its waker is kept, which is not always that of its task.
    place: Option<usize>,
}

impl Future for Draining {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.core.draining().is_some() {
            return Poll::Ready(());
        }
        self.place = Some(self.core.watch_drain(self.place, context.waker()));
        Poll::Pending
    }
}

impl Drop for Draining {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.core.unwatch_drain(place);
        }
    }
}

impl fmt::Debug for Draining {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Draining")
    }
}

impl fmt::Debug for Shard {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Shard")
            .field("slot", &self.core.slot)
            .field("generation", &self.core.generation)
            .finish()
    }
}

enum Join<T> {
    Running(Option<Waker>),
    Done(Option<Result<T, TaskError>>),
}

/// A spawned future's outcome. Made by [`Shard::spawn`].
pub struct Task<T>(Rc<RefCell<Join<T>>>);

impl<T> Future for Task<T> {
    type Output = Result<T, TaskError>;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self.0.borrow_mut() {
            Join::Running(waker) => {
                *waker = Some(context.waker().clone());
                Poll::Pending
            }
            Join::Done(outcome) => Poll::Ready(outcome.take().expect("a task's outcome is taken once")),
        }
    }
}

impl<T> fmt::Debug for Task<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Task")
    }
}

/// A task panicked; this holds what the panic said.
#[derive(Debug)]
pub struct TaskError(String);

impl fmt::Display for TaskError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "the task panicked: {}", self.0)
    }
}

impl std::error::Error for TaskError {}
