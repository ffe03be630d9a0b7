//! A call's answer on its way back: one place, which the answering executor fills and the caller empties. The caller is woken
//! through its executor's inbox; there is no second message.
//!
//! A caller that is a task of the same server is woken by its number. Its waker is there for whoever else may tell it, and
//! goes back to it with the answer: a waker that another processor wakes and drops is a cache line that moves there and back.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::executor::core::Core;
use crate::executor::directory::{Directory, TaskKey};
use crate::executor::inbox::Refusal;
use crate::sync::{Mutex, MutexGuard};

/// Why a message has no answer.
///
/// ```
/// use ringleader::{PeerError, Reject, StatusCode};
///
/// /// What a request is answered that needed another executor. Returned as it is (`?`), the error is 503 with
/// /// `Retry-After` for those two, and 500 for others.
/// fn answer(error: PeerError) -> Reject {
///     let status = match error {
///         PeerError::Full | PeerError::Down => StatusCode::SERVICE_UNAVAILABLE, // nothing has been done: try again
///         _ => StatusCode::BAD_GATEWAY,                                         // it may have been done
///     };
///     Reject::new(status, error)
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeerError {
    /// As many messages wait for that executor as may (4,096), or it has begun as many calls as it may (65,536), which wait
    /// for something. The message was not run, and may be tried again later.
    ///
    /// Nobody waits for room: two executors that waited for room with each other would wait for ever.
    Full,
    /// The slot has no executor and none is starting: it waits for a restart, was given up, or is not needed at present;
    /// or the server has not been started, or has ended. Nothing was sent.
    Down,
    /// The executor ended, or was given up because it hung, before it answered. The message may have run, wholly or
    /// partly, or not at all.
    Lost,
    /// The message panicked. That was contained, logged and counted
    /// ([`ExecutorStats::panics_contained`](crate::ExecutorStats::panics_contained)) where it ran.
    Panicked,
}

impl fmt::Display for PeerError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Full => "the message was not sent: too many wait for that executor already; try again later",
            Self::Down => "the message was not sent: there is no executor in that slot at present",
            Self::Lost => "the executor ended before it answered; the message may have run or not",
            Self::Panicked => "the message panicked on the executor it was sent to; that one's log says where",
        })
    }
}

impl std::error::Error for PeerError {}

impl From<Refusal> for PeerError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Full => Self::Full,
            Refusal::Down => Self::Down,
        }
    }
}

/// Who waits for the answer.
struct Waiter {
    waker: Waker,
    /// The task that the waker wakes, if it is one of the server that was called.
    task: Option<TaskKey>,
}

enum Place<F, R> {
    Sent(F, Option<Waiter>),
    Begun(Option<Waiter>),
    /// With a waiter that was woken by its number, and drops its waker itself.
    Done(Result<R, PeerError>, Option<Waiter>),
    Taken,
}

/// How the waiter is to be told. To be done when the lock is let go of.
enum Tell {
    Nobody,
    Task(TaskKey),
    Waker(Waker),
}

impl Tell {
    /// # Panics
    /// If a task is to be told, which only a directory can.
    fn waker(self) {
        match self {
            Self::Nobody => {}
            Self::Waker(waker) => waker.wake(),
            Self::Task(_) => unreachable!("who has no directory takes the waker"),
        }
    }
}

/// A call, on its way there and back: one place, shared by the caller and who answers. Under a lock for the time of a move;
/// the two hardly ever meet in it.
pub(super) struct Exchange<F, R>(Mutex<Place<F, R>>);

impl<F, R> Exchange<F, R> {
    fn lock(&self) -> MutexGuard<'_, Place<F, R>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The message, to be run; `None` when the caller was told that it is lost.
    pub(super) fn begin(&self) -> Option<F> {
        let mut place = self.lock();
        match std::mem::replace(&mut *place, Place::Taken) {
            Place::Sent(message, waiter) => {
                *place = Place::Begun(waiter);
                Some(message)
            }
            other => {
                *place = other;
                None
            }
        }
    }

    /// The first outcome counts. The second that is returned is to be dropped after the first was told: it may be a message
    /// that nobody will run, and panic. Tasks of the server that are not in the slot `here` are to be told by their numbers.
    fn put(&self, outcome: Result<R, PeerError>, here: Option<u16>) -> (Tell, Place<F, R>) {
        let mut place = self.lock();
        let mut waiter = match &mut *place {
            Place::Sent(_, waiter) | Place::Begun(waiter) => waiter.take(),
            // It comes too late, and is dropped after the lock is let go of.
            Place::Done(..) | Place::Taken => return (Tell::Nobody, Place::Done(outcome, None)),
        };
        let task =
            waiter.as_ref().and_then(|waiter| waiter.task).filter(|task| here.is_some_and(|slot| slot != task.slot));
        let tell = match task {
            Some(task) => Tell::Task(task),
            None => waiter.take().map_or(Tell::Nobody, |waiter| Tell::Waker(waiter.waker)),
        };
        (tell, std::mem::replace(&mut *place, Place::Done(outcome, waiter)))
    }

    pub(super) fn settle(&self, outcome: Result<R, PeerError>) {
        let (tell, before) = self.put(outcome, None);
        tell.waker();
        drop(before);
    }
}

/// The caller's view, to which it does not matter what the message is.
trait Answer<R>: Send + Sync {
    /// `server` is the number of the directory that it was sent by.
    fn poll(&self, context: &mut Context<'_>, server: u64) -> Poll<Result<R, PeerError>>;
}

impl<F: Send, R: Send> Answer<R> for Exchange<F, R> {
    fn poll(&self, context: &mut Context<'_>, server: u64) -> Poll<Result<R, PeerError>> {
        let mut place = self.lock();
        let waiter = match &mut *place {
            Place::Sent(_, waiter) | Place::Begun(waiter) => waiter,
            Place::Done(..) => {
                let Place::Done(outcome, waiter) = std::mem::replace(&mut *place, Place::Taken) else {
                    unreachable!("it has just been looked at");
                };
                drop(place);
                drop(waiter);
                return Poll::Ready(outcome);
            }
            Place::Taken => panic!("a call's answer is taken once"),
        };
        let task = Core::task_of(context.waker(), server);
        match waiter {
            Some(waiter) => {
                waiter.waker.clone_from(context.waker());
                waiter.task = task;
            }
            none => *none = Some(Waiter { waker: context.waker().clone(), task }),
        }
        Poll::Pending
    }
}

/// The answering side. Dropped without an answer it tells the caller that there will be none.
pub(super) struct Promise<F, R>(Option<Arc<Exchange<F, R>>>);

impl<F, R> Promise<F, R> {
    pub(super) fn new(exchange: Arc<Exchange<F, R>>) -> Self {
        Self(Some(exchange))
    }

    /// To be called by the executor in the slot `here`; `directory` is the one that the message was sent by.
    pub(super) fn keep(mut self, outcome: Result<R, PeerError>, directory: &Directory, here: u16) {
        if let Some(exchange) = self.0.take() {
            let (tell, before) = exchange.put(outcome, Some(here));
            // Before the caller runs: it is to find the place its own.
            drop(exchange);
            match tell {
                Tell::Task(task) => directory.wake(task),
                other => other.waker(),
            }
            drop(before);
        }
    }
}

impl<F, R> Drop for Promise<F, R> {
    fn drop(&mut self) {
        if let Some(exchange) = self.0.take() {
            exchange.settle(Err(PeerError::Lost));
        }
    }
}

enum Inner<R> {
    /// With the number of the server's directory.
    One(Arc<dyn Answer<R>>, u64),
    /// Several calls that have been made, as one.
    Joint(Pin<Box<dyn Future<Output = R> + Send>>),
}

/// The answer to a message, to be awaited on any executor, in any async runtime. Made by [`Peers`](crate::Peers) and
/// [`Sharded`](crate::Sharded).
///
/// The message has been sent when this is returned: dropping it takes nothing back, and loses the answer only. It always
/// comes to an outcome, [`PeerError::Lost`] at the latest when the executor that was called ends. It has no time limit of
/// its own: an executor that is busy answers late ([`Shard::timeout`](crate::Shard::timeout)).
///
/// It names no lifetime: nothing of the caller's is borrowed while it is awaited.
///
/// ```
/// use std::time::Duration;
/// use ringleader::{BoxError, Shard, SlotId};
///
/// /// Both at once, and no longer than 10 ms.
/// async fn generations(shard: &Shard, one: SlotId, other: SlotId) -> Result<(u64, u64), BoxError> {
///     let peers = shard.peers();
///     // Sent here; what is awaited is the answers.
///     let one = peers.call(one, async |shard: Shard| shard.generation());
///     let other = peers.call(other, async |shard: Shard| shard.generation());
///     Ok(shard.timeout(Duration::from_millis(10), async { Ok::<_, BoxError>((one.await?, other.await?)) }).await??)
/// }
/// ```
#[must_use = "the call is made, but its answer is lost"]
pub struct Call<R>(Inner<R>);

impl<R> Call<R> {
    /// A call to an executor of the server whose directory has the number `server`.
    pub(super) fn new<F: Send + 'static>(message: F, server: u64) -> (Arc<Exchange<F, R>>, Self)
    where
        R: Send + 'static,
    {
        let exchange = Arc::new(Exchange(Mutex::new(Place::Sent(message, None))));
        (Arc::clone(&exchange), Self(Inner::One(exchange, server)))
    }

    pub(super) fn joint(calls: impl Future<Output = R> + Send + 'static) -> Self {
        Self(Inner::Joint(Box::pin(calls)))
    }
}

impl<R> Future for Call<R> {
    type Output = Result<R, PeerError>;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Inner::One(answer, server) => answer.poll(context, *server),
            Inner::Joint(calls) => calls.as_mut().poll(context).map(Ok),
        }
    }
}

impl<R> fmt::Debug for Call<R> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Call")
    }
}
