//! What answers requests.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;

use http::StatusCode;

use crate::{BoxError, Request, Response};

/// Answers the requests of one executor. It lives on that executor only, so it need be neither `Send` nor `Clone`, and
/// its futures may hold `Rc`s and borrow from it.
///
/// Async closures become services through [`service_fn`], services of others through [`hyper`](fn@crate::hyper),
/// [`tower`](fn@crate::tower) and `axum` (feature `axum`). An `Err` is logged and answered with 500, unless it is a
/// [`Reject`] or a [`BodyError`](crate::BodyError), which carry their own status, or says that there was no room (503 with
/// `Retry-After`): an overloaded [`TaskError`](crate::TaskError), [`PeerError::Full`](crate::PeerError::Full) or
/// [`PeerError::Down`](crate::PeerError::Down).
///
/// ```
/// use ringleader::{Body, BoxError, Request, Response, Server, Service, Shard};
///
/// struct Greeter {
///     name: String,
/// }
///
/// impl Service for Greeter {
///     type Body = Body;
///
///     async fn call(&self, request: Request) -> Result<Response, BoxError> {
///         Ok(Response::new(Body::from(format!("{} is at {}\n", self.name, request.uri().path()))))
///     }
/// }
///
/// let server = Server::builder()
///     .listen("127.0.0.1:0")
///     .serve(async |shard: Shard| Ok(Greeter { name: format!("executor {}", shard.id()) }));
/// # drop(server);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a ringleader service",
    label = "the start-up closure returned this as the executor's service",
    note = "wrap an async closure in `ringleader::service_fn`, a tower service in `ringleader::tower`, a hyper service in \
            `ringleader::hyper`, an axum `Router` in `ringleader::axum` (feature `axum`)",
    note = "a service lives on one executor: it need be neither `Send` nor `Clone`"
)]
pub trait Service: 'static {
    /// The body of its responses.
    type Body: http_body::Body<Data: 'static, Error: Into<BoxError>> + 'static;

    /// Answers one request. The future may borrow from `self` and need not be `Send`.
    fn call(&self, request: Request) -> impl Future<Output = Result<Response<Self::Body>, BoxError>>;
}

/// An async closure as a [`Service`]. Made by [`service_fn`].
pub struct ServiceFn<F, B>(F, PhantomData<fn() -> B>);

/// Makes a service of an async closure.
///
/// ```
/// use ringleader::{Body, Request, Response, service_fn};
/// use std::cell::Cell;
///
/// let hits = Cell::new(0);
/// let service = service_fn(async move |_: Request| {
///     hits.set(hits.get() + 1); // borrowed, not cloned: the closure belongs to one executor
///     Ok(Response::new(Body::from(format!("{}\n", hits.get()))))
/// });
/// # let _ = service;
/// ```
pub fn service_fn<F, B>(answer: F) -> ServiceFn<F, B>
where
    F: AsyncFn(Request) -> Result<Response<B>, BoxError> + 'static,
    B: http_body::Body<Data: 'static, Error: Into<BoxError>> + 'static,
{
    ServiceFn(answer, PhantomData)
}

#[diagnostic::do_not_recommend]
impl<F, B> Service for ServiceFn<F, B>
where
    F: AsyncFn(Request) -> Result<Response<B>, BoxError> + 'static,
    B: http_body::Body<Data: 'static, Error: Into<BoxError>> + 'static,
{
    type Body = B;

    fn call(&self, request: Request) -> impl Future<Output = Result<Response<B>, BoxError>> {
        (self.0)(request)
    }
}

impl<F, B> fmt::Debug for ServiceFn<F, B> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ServiceFn")
    }
}

/// An error that knows its answer. One with the status 101 is answered 501, one with another of 1xx 500: they are none.
///
/// ```
/// use ringleader::{Reject, StatusCode};
/// let error = Reject::new(StatusCode::NOT_FOUND, "no such key");
/// # let _ = error;
/// ```
#[derive(Debug)]
pub struct Reject {
    status: StatusCode,
    why: BoxError,
}

impl Reject {
    /// `why` becomes the text of the answer.
    pub fn new(status: StatusCode, why: impl Into<BoxError>) -> Self {
        Self { status, why: why.into() }
    }

    /// The status to answer with.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }
}

impl fmt::Display for Reject {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.why.fmt(formatter)
    }
}

impl std::error::Error for Reject {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.why)
    }
}

/// What a service gets for the answer 101: connections are not handed over to anybody.
#[derive(Debug)]
pub(crate) struct NoUpgrade;

impl fmt::Display for NoUpgrade {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(
            "a service meant to upgrade its connection (101 Switching Protocols), and connections cannot be taken over here; \
             axum's `WebSocketUpgrade` and hyper's `upgrade::on` do not work: serve such paths by another server",
        )
    }
}

impl std::error::Error for NoUpgrade {}
