//! Orders to a server: carried out whether or not anybody waits, awaitable on any runtime and on none.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::Error;
use crate::error::Kind;

/// The outcome of an order, once it has one. Await it on any runtime, or block on it with [`Order::wait`]; dropping it
/// takes nothing back.
///
/// ```
/// use ringleader::{Body, Request, Response, Server, Stop, service_fn};
///
/// # fn server() -> Server {
/// #     Server::builder().listen("127.0.0.1:0").executors(1).serve(async |_| {
/// #         Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
/// #     })
/// # }
/// // On a plain thread:
/// let running = server().start().wait()?;
/// running.stop(Stop::Now).wait()?;
/// // In any async runtime:
/// # smol::block_on(async {
/// let running = server().start().await?;
/// running.stop(Stop::Now).await?;
/// # Ok::<(), ringleader::Error>(())
/// # })?;
/// # Ok::<(), ringleader::Error>(())
/// ```
#[must_use = "the order is carried out all the same, but its outcome is lost"]
pub struct Order<T>(Arc<Shared<T>>);

/// Where the outcome is put. Dropped without one, the order fails: whoever was to carry it out is gone.
pub(crate) struct Promise<T>(Option<Arc<Shared<T>>>);

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    outcome: Option<Result<T, Error>>,
    waker: Option<Waker>,
}

impl<T> Order<T> {
    pub(crate) fn new() -> (Promise<T>, Self) {
        let shared =
            Arc::new(Shared { state: Mutex::new(State { outcome: None, waker: None }), changed: Condvar::new() });
        (Promise(Some(Arc::clone(&shared))), Self(shared))
    }

    pub(crate) fn done(outcome: Result<T, Error>) -> Self {
        let (promise, order) = Self::new();
        promise.fulfil(outcome);
        order
    }

    /// Blocks this thread until the outcome is there.
    ///
    /// # Errors
    /// Those of the order.
    ///
    /// # Panics
    /// When the outcome has been taken already, by polling.
    pub fn wait(self) -> Result<T, Error> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = state.outcome.take() {
                return outcome;
            }
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<T> Promise<T> {
    pub(crate) fn fulfil(mut self, outcome: Result<T, Error>) {
        if let Some(shared) = self.0.take() {
            shared.settle(outcome);
        }
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.settle(Err(Error::new(Kind::Refused, "the server has ended")));
        }
    }
}

impl<T> fmt::Debug for Promise<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Promise")
    }
}

impl<T> Shared<T> {
    fn settle(&self, outcome: Result<T, Error>) {
        let waker = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.outcome = Some(outcome);
            state.waker.take()
        };
        self.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for Order<T> {
    type Output = Result<T, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.outcome.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl<T> fmt::Debug for Order<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Order")
    }
}
