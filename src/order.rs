//! Orders to a server: carried out whether or not anybody waits, but for a start; awaitable on any runtime and on none.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::Error;
use crate::error::Kind;
use crate::oneshot::{self, Outcome};

/// The outcome of an order, once it has one. Await it on any runtime, or block on it with [`Order::wait`]; dropping it
/// takes nothing back, except that of [`Server::start`](crate::Server::start), which gives the start up.
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
#[must_use = "its outcome is lost; a start is even taken back: await it, or call `wait`"]
pub struct Order<T> {
    outcome: Outcome<Result<T, Error>>,
    given_up: GivenUp,
}

/// What is to happen when nobody waits for the outcome any more before it has been taken.
#[derive(Default)]
struct GivenUp(Option<Box<dyn FnOnce() + Send + Sync>>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        if let Some(act) = self.0.take() {
            act();
        }
    }
}

/// Where the outcome is put. Dropped without one, the order fails: whoever was to carry it out is gone.
pub(crate) type Promise<T> = oneshot::Promise<Result<T, Error>>;

fn never_carried_out<T>() -> Result<T, Error> {
    Err(Error::new(Kind::Refused, "the server has ended"))
}

impl<T> Order<T> {
    pub(crate) fn new() -> (Promise<T>, Self) {
        let (promise, outcome) = Outcome::new();
        (promise, Self { outcome, given_up: GivenUp::default() })
    }

    pub(crate) fn done(outcome: Result<T, Error>) -> Self {
        Self { outcome: Outcome::ready(outcome), given_up: GivenUp::default() }
    }

    /// Has `act` done when this is dropped before its outcome has been taken.
    pub(crate) fn or_when_given_up(self, act: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self { given_up: GivenUp(Some(Box::new(act))), ..self }
    }

    /// Blocks this thread until the outcome is there.
    ///
    /// # Errors
    /// Those of the order.
    ///
    /// # Panics
    /// When the outcome has been taken already, by polling.
    pub fn wait(self) -> Result<T, Error> {
        let Self { outcome, mut given_up } = self;
        let outcome = outcome.wait();
        given_up.0 = None;
        outcome.unwrap_or_else(never_carried_out)
    }
}

impl<T> Future for Order<T> {
    type Output = Result<T, Error>;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let polled = Pin::new(&mut self.outcome).poll(context);
        if polled.is_ready() {
            self.given_up.0 = None;
        }
        polled.map(|outcome| outcome.unwrap_or_else(never_carried_out))
    }
}

impl<T> fmt::Debug for Order<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Order")
    }
}
