//! Services of others as services of ours: hyper's, tower's, and an axum router. What they answer with is passed on as
//! it is; none of them costs a box.

use std::fmt;
use std::future::poll_fn;

#[cfg(feature = "axum")]
use axum::extract::ConnectInfo;
#[cfg(feature = "axum")]
use http::{StatusCode, header};

#[cfg(feature = "axum")]
use crate::service::NoUpgrade;
use crate::service::Service;
use crate::{BoxError, Request, Response};

/// A hyper service as a [`Service`]. Made by [`hyper`](fn@hyper).
pub struct Hyper<S>(S);

/// Makes a service of one of hyper's. Neither it nor its futures need be `Send`.
///
/// ```
/// use ringleader::{Body, Request, Response, Server};
/// use std::convert::Infallible;
///
/// let server = Server::builder().listen("127.0.0.1:0").serve(async |_| {
///     Ok(ringleader::hyper(hyper::service::service_fn(async |_: Request| {
///         Ok::<_, Infallible>(Response::new(Body::from("Hello, World!")))
///     })))
/// });
/// # drop(server);
/// ```
pub fn hyper<S, B>(service: S) -> Hyper<S>
where
    S: hyper::service::Service<Request, Response = Response<B>, Error: Into<BoxError>> + 'static,
    B: http_body::Body<Data: 'static, Error: Into<BoxError>> + 'static,
{
    Hyper(service)
}

#[diagnostic::do_not_recommend]
impl<S, B> Service for Hyper<S>
where
    S: hyper::service::Service<Request, Response = Response<B>, Error: Into<BoxError>> + 'static,
    B: http_body::Body<Data: 'static, Error: Into<BoxError>> + 'static,
{
    type Body = B;

    async fn call(&self, request: Request) -> Result<Response<B>, BoxError> {
        self.0.call(request).await.map_err(Into::into)
    }
}

impl<S> fmt::Debug for Hyper<S> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Hyper")
    }
}

/// A tower service as a [`Service`]. Made by [`tower`](fn@tower).
pub struct Tower<S>(S);

/// Makes a service of one of tower's, with its layers. It is cloned for each request; the clone is waited for until it is
/// ready, and then it is the one that is called. Nothing of it need be `Send`.
///
/// An error of its `poll_ready` is answered as one of its `call` is. Layers that sleep (timeouts, rate limits) need tokio's
/// clock: `Builder::tokio` (feature `tokio`).
///
/// ```
/// use ringleader::{Body, Request, Response, Server};
/// use std::convert::Infallible;
///
/// let server = Server::builder().listen("127.0.0.1:0").serve(async |_| {
///     let hello = tower::service_fn(async |_: Request| Ok::<_, Infallible>(Response::new(Body::from("Hello, World!"))));
///     Ok(ringleader::tower(tower::ServiceBuilder::new().concurrency_limit(100).service(hello)))
/// });
/// # drop(server);
/// ```
pub fn tower<S, B>(service: S) -> Tower<S>
where
    S: tower_service::Service<Request, Response = Response<B>, Error: Into<BoxError>> + Clone + 'static,
    B: http_body::Body<Data: 'static, Error: Into<BoxError>> + 'static,
{
    Tower(service)
}

#[diagnostic::do_not_recommend]
impl<S, B> Service for Tower<S>
where
    S: tower_service::Service<Request, Response = Response<B>, Error: Into<BoxError>> + Clone + 'static,
    B: http_body::Body<Data: 'static, Error: Into<BoxError>> + 'static,
{
    type Body = B;

    async fn call(&self, request: Request) -> Result<Response<B>, BoxError> {
        let mut service = self.0.clone();
        poll_fn(|context| service.poll_ready(context)).await.map_err(Into::into)?;
        service.call(request).await.map_err(Into::into)
    }
}

impl<S> fmt::Debug for Tower<S> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Tower")
    }
}

/// An axum router as a [`Service`]. Made by [`axum`](fn@axum).
#[cfg(feature = "axum")]
pub struct Axum {
    router: Tower<axum::Router>,
    connect_info: bool,
}

/// Makes a service of an axum router, as it is, with its layers. Its handlers and its state stay `Send`, as axum wants
/// them. Needs the feature `axum`.
///
/// What axum's own server gives it and this one does not:
/// - `WebSocketUpgrade`, which needs hyper to part with the connection: answered 501, with the reason in the log.
/// - A tokio runtime: what calls tokio (server-sent events with keep-alive, timeouts of tower-http, database drivers) needs
///   `Builder::tokio`, feature `tokio`.
/// - `ConnectInfo`, unless it is asked for: [`Axum::connect_info`], as axum has it with
///   `into_make_service_with_connect_info`.
///
/// What this server bounds and axum's own does not ([`HttpLimits`](crate::HttpLimits)) comes first. A body of more than 1 MiB
/// does not get as far as axum's limit of 2 MB: one that announces its length is answered 413, one that does not fails in
/// the middle, which axum's extractors answer 400. With `body_bytes_max` of [`u64::MAX`] it is axum's alone.
///
/// ```
/// use axum::{Router, routing::get};
/// use ringleader::Server;
///
/// let server = Server::builder().listen("127.0.0.1:0").serve(async |_| {
///     Ok(ringleader::axum(Router::new().route("/", get(async || "Hello, World!"))))
/// });
/// # drop(server);
/// ```
#[cfg(feature = "axum")]
pub fn axum(router: axum::Router) -> Axum {
    Axum { router: Tower(router), connect_info: false }
}

#[cfg(feature = "axum")]
impl Axum {
    /// Lets handlers know who is at the other end: `ConnectInfo<SocketAddr>`; and `Extension<ringleader::Connection>`, which
    /// also knows the listener. Without it an extractor of either answers 500. It costs a request some 3 %.
    ///
    /// ```
    /// use axum::{Router, extract::ConnectInfo, routing::get};
    /// use ringleader::Server;
    /// use std::net::SocketAddr;
    ///
    /// let router = Router::new().route("/", get(async |ConnectInfo(peer): ConnectInfo<SocketAddr>| peer.to_string()));
    /// let server = Server::builder()
    ///     .listen("127.0.0.1:0")
    ///     .serve(async move |_| Ok(ringleader::axum(router.clone()).connect_info()));
    /// # drop(server);
    /// ```
    #[must_use]
    pub fn connect_info(self) -> Self {
        Self { connect_info: true, ..self }
    }
}

#[cfg(feature = "axum")]
#[diagnostic::do_not_recommend]
impl Service for Axum {
    type Body = axum::body::Body;

    async fn call(&self, mut request: Request) -> Result<Response<Self::Body>, BoxError> {
        if self.connect_info
            && let Some(connection) = request.body().connection().cloned()
        {
            if let Some(peer) = connection.peer_addr() {
                request.extensions_mut().insert(ConnectInfo(peer));
            }
            request.extensions_mut().insert(connection);
        }
        // Without this axum's extractor refuses before the handler runs, which would call `tokio::spawn` and have the
        // client believe in a WebSocket that nobody speaks.
        let can_upgrade = request.extensions_mut().remove::<hyper::upgrade::OnUpgrade>().is_some();
        let asks_for = request.headers().get(header::UPGRADE);
        let is_websocket = can_upgrade && asks_for.is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"));
        let response = self.router.call(request).await?;
        // Its answer names no protocol, as any other 426 has to (RFC 9110, 15.5.22). The body may be a layer's by now.
        let refused =
            response.status() == StatusCode::UPGRADE_REQUIRED && !response.headers().contains_key(header::UPGRADE);
        if is_websocket && refused { Err(NoUpgrade.into()) } else { Ok(response) }
    }
}

#[cfg(feature = "axum")]
impl fmt::Debug for Axum {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Axum")
    }
}
