//! Bodies of requests and responses.

mod watch;

use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;

use crate::BoxError;
use crate::files::FileBody;
use crate::time::Sleep;
pub(crate) use watch::UploadWatch;

/// A request's body, and the default body of a response: empty, one piece of bytes, what arrives on a connection, a file,
/// or any [`http_body::Body`]. An empty one and one of bytes cost no allocation.
///
/// ```
/// use ringleader::Body;
/// let hello = Body::from("Hello, World!");
/// let nothing = Body::empty();
/// ```
pub struct Body {
    inner: Inner,
    connection: Option<Connection>,
}

enum Inner {
    Empty,
    Full(Bytes),
    /// Boxed, for it is large: a request without a body must stay small, since futures that hold it are moved about.
    Incoming(Box<Upload>),
    Boxed(Pin<Box<dyn HttpBody<Data = Bytes, Error = BoxError> + Send>>),
    File(Box<FileBody>),
}

/// A request body as it arrives, with its limits.
struct Upload {
    incoming: Incoming,
    bytes_left: u64,
    bytes_max: u64,
    timeout: Option<Duration>,
    waiting: Option<Sleep>,
    /// A wait away from the connection's executor, where there is no timer, is noted in the watch.
    waits_elsewhere: bool,
    /// Told when the body is dropped before its end.
    watch: Arc<UploadWatch>,
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.end_wait();
        if !self.incoming.is_end_stream() {
            self.watch.note_cut();
        }
    }
}

impl Body {
    /// A body of no bytes.
    #[must_use]
    pub fn empty() -> Self {
        Self { inner: Inner::Empty, connection: None }
    }

    /// Any body of bytes, at the price of a box.
    ///
    /// ```
    /// use ringleader::{BodyError, Request, Response, Body, service_fn};
    ///
    /// // The request's body back, as it arrives. A body of another crate goes the same way.
    /// let echo = service_fn(async |request: Request| Ok(Response::new(Body::new(request.into_body()))));
    /// # let _ = echo;
    /// ```
    pub fn new<B>(body: B) -> Self
    where
        B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        Self { inner: Inner::Boxed(Box::pin(ErrorBoxed { body: Box::pin(body) })), connection: None }
    }

    pub(crate) fn incoming(
        incoming: Incoming,
        bytes_max: u64,
        timeout: Option<Duration>,
        watch: &Arc<UploadWatch>,
        connection: Connection,
    ) -> Self {
        let inner = if incoming.is_end_stream() {
            Inner::Empty
        } else {
            Inner::Incoming(Box::new(Upload {
                incoming,
                bytes_left: bytes_max,
                bytes_max,
                timeout,
                waiting: None,
                waits_elsewhere: false,
                watch: Arc::clone(watch),
            }))
        };
        Self { inner, connection: Some(connection) }
    }

    /// The file that this body is, for who can send it better than by frames.
    pub(crate) fn file_mut(&mut self) -> Option<&mut FileBody> {
        match &mut self.inner {
            Inner::File(file) => Some(file),
            _ => None,
        }
    }

    /// The connection that this request came on; `None` for a body that came on none.
    ///
    /// ```
    /// use ringleader::{Body, Request, Response, service_fn};
    ///
    /// let who = service_fn(async |request: Request| {
    ///     let peer = request.body().connection().and_then(|connection| connection.peer_addr());
    ///     Ok(Response::new(Body::from(format!("you are {peer:?}"))))
    /// });
    /// # let _ = who;
    /// ```
    #[must_use]
    pub fn connection(&self) -> Option<&Connection> {
        self.connection.as_ref()
    }

    /// Reads the body to its end.
    ///
    /// # Errors
    /// [`BodyError`] when it is longer than `bytes_max` (its status is 413), stalls (408), breaks off or is malformed
    /// (400). Returned from a service by `?`, it becomes the answer with that status.
    ///
    /// ```
    /// use ringleader::{Body, Request, Response, service_fn};
    ///
    /// let lengths = service_fn(async |request: Request| {
    ///     let bytes = request.into_body().collect(64 * 1024).await?; // 413 if it is longer
    ///     Ok(Response::new(Body::from(format!("{} bytes\n", bytes.len()))))
    /// });
    /// # let _ = lengths;
    /// ```
    pub async fn collect(mut self, bytes_max: usize) -> Result<Bytes, BodyError> {
        let too_large = || BodyError(BodyErrorKind::TooLarge { bytes_max: bytes_max as u64 });
        if self.size_hint().lower() > bytes_max as u64 {
            return Err(too_large());
        }
        let mut first = Bytes::new();
        let mut rest = BytesMut::new();
        while let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut self).poll_frame(context)).await {
            let Ok(data) = frame?.into_data() else { continue };
            if first.len() + rest.len() + data.len() > bytes_max {
                return Err(too_large());
            }
            if first.is_empty() {
                first = data;
            } else {
                rest.extend_from_slice(&data);
            }
        }
        if rest.is_empty() {
            return Ok(first);
        }
        let mut whole = BytesMut::with_capacity(first.len() + rest.len());
        whole.extend_from_slice(&first);
        whole.extend_from_slice(&rest);
        Ok(whole.freeze())
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

impl<T: Into<Bytes>> From<T> for Body {
    fn from(bytes: T) -> Self {
        let bytes = bytes.into();
        let inner = if bytes.is_empty() { Inner::Empty } else { Inner::Full(bytes) };
        Self { inner, connection: None }
    }
}

/// A file of [`Files`](crate::Files). As long as it is not wrapped into another body, a large one is sent by the kernel from
/// its page cache.
impl From<FileBody> for Body {
    fn from(file: FileBody) -> Self {
        let inner = match file.into_bytes() {
            Ok(bytes) => return Self::from(bytes),
            Err(file) => Inner::File(Box::new(file)),
        };
        Self { inner, connection: None }
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.inner {
            Inner::Empty => "empty",
            Inner::Full(_) => "full",
            Inner::Incoming(_) => "incoming",
            Inner::Boxed(_) => "boxed",
            Inner::File(_) => "file",
        };
        formatter.debug_tuple("Body").field(&kind).finish()
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.inner {
            Inner::Empty => Poll::Ready(None),
            Inner::Full(_) => match std::mem::replace(&mut self.inner, Inner::Empty) {
                Inner::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
                _ => Poll::Ready(None),
            },
            Inner::Incoming(upload) => upload.poll_frame(context),
            Inner::Boxed(body) => body
                .as_mut()
                .poll_frame(context)
                .map(|frame| frame.map(|frame| frame.map_err(|error| BodyError(BodyErrorKind::Source(error))))),
            Inner::File(file) => Pin::new(&mut **file)
                .poll_frame(context)
                .map_err(|error| BodyError(BodyErrorKind::Source(error.into()))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.inner {
            Inner::Empty => true,
            Inner::Full(_) => false,
            Inner::Incoming(upload) => upload.incoming.is_end_stream(),
            Inner::Boxed(body) => body.is_end_stream(),
            Inner::File(file) => file.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.inner {
            Inner::Empty => SizeHint::with_exact(0),
            Inner::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Inner::Incoming(upload) => upload.incoming.size_hint(),
            Inner::Boxed(body) => body.size_hint(),
            Inner::File(file) => file.size_hint(),
        }
    }
}

impl Upload {
    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(context) else {
            return self.poll_timeout(context);
        };
        self.waiting = None;
        self.end_wait();
        let Some(frame) = frame else { return Poll::Ready(None) };
        let frame = frame.map_err(|error| BodyError(BodyErrorKind::Incoming(error)))?;
        if let Some(data) = frame.data_ref() {
            match self.bytes_left.checked_sub(data.len() as u64) {
                Some(left) => self.bytes_left = left,
                None => {
                    let error = BodyErrorKind::TooLarge { bytes_max: self.bytes_max };
                    return Poll::Ready(Some(Err(BodyError(error))));
                }
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    /// Nothing has arrived: bounds the wait. The timer is made at the first wait only.
    ///
    /// A body may be read wherever it was sent, such as by a task of tokio's; timers are an executor's. There the
    /// connection bounds the wait.
    fn poll_timeout(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(limit) = self.timeout else { return Poll::Pending };
        let timed_out = Poll::Ready(Some(Err(BodyError(BodyErrorKind::TimedOut { limit }))));
        let waiting = self.waiting.take().filter(Sleep::is_at_home).unwrap_or_else(|| Sleep::new(limit));
        if !waiting.is_at_home() {
            self.waits_elsewhere = true;
            return if self.watch.wait(context.waker()) { timed_out } else { Poll::Pending };
        }
        self.end_wait();
        match Pin::new(self.waiting.insert(waiting)).poll(context) {
            Poll::Ready(()) => timed_out,
            Poll::Pending => Poll::Pending,
        }
    }

    fn end_wait(&mut self) {
        if std::mem::take(&mut self.waits_elsewhere) {
            self.watch.has_waited();
        }
    }
}

struct ErrorBoxed<B> {
    body: Pin<Box<B>>,
}

impl<B: HttpBody<Data = Bytes, Error: Into<BoxError>>> HttpBody for ErrorBoxed<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.body.as_mut().poll_frame(context).map(|frame| frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Why a body could not be read. It knows the status to answer with: returned from a service by `?`, it becomes that
/// answer.
///
/// ```
/// use ringleader::{Body, BoxError, Request, Response, StatusCode, service_fn, test::App};
///
/// let app = App::start(async |_| {
///     Ok(service_fn(async |request: Request| match request.into_body().collect(4).await {
///         Ok(bytes) => Ok(Response::new(Body::from(bytes))),
///         Err(error) if error.is_too_large() => Ok(Response::new(Body::from("four bytes at most"))),
///         Err(error) if error.is_timeout() => Ok(Response::new(Body::from("too slow"))),
///         Err(error) => Err(error.into()), // answered with `error.status()`
///     }))
/// })?;
/// let answer = app.call(Request::new(Body::from("too long")))?;
/// assert_eq!(answer.body(), "four bytes at most");
/// # Ok::<(), BoxError>(())
/// ```
#[derive(Debug)]
pub struct BodyError(BodyErrorKind);

#[derive(Debug)]
enum BodyErrorKind {
    TooLarge { bytes_max: u64 },
    TimedOut { limit: Duration },
    Incoming(hyper::Error),
    Source(BoxError),
}

impl BodyError {
    /// The status to answer with: 413, 408, 400, or 500 for a body of one's own that failed.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self.0 {
            BodyErrorKind::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            BodyErrorKind::TimedOut { .. } => StatusCode::REQUEST_TIMEOUT,
            BodyErrorKind::Incoming(_) => StatusCode::BAD_REQUEST,
            BodyErrorKind::Source(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The body is longer than its limit.
    #[must_use]
    pub fn is_too_large(&self) -> bool {
        matches!(self.0, BodyErrorKind::TooLarge { .. })
    }

    /// The client stopped sending in the middle.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self.0, BodyErrorKind::TimedOut { .. })
    }
}

impl fmt::Display for BodyError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            BodyErrorKind::TooLarge { bytes_max } => write!(formatter, "the body is longer than {bytes_max} bytes"),
            BodyErrorKind::TimedOut { limit } => write!(formatter, "no more of the body arrived within {limit:?}"),
            BodyErrorKind::Incoming(error) => write!(formatter, "the body could not be read: {error}"),
            BodyErrorKind::Source(error) => write!(formatter, "the body failed: {error}"),
        }
    }
}

impl std::error::Error for BodyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0 {
            BodyErrorKind::Incoming(error) => Some(error),
            BodyErrorKind::Source(error) => Some(&**error),
            _ => None,
        }
    }
}

/// What is known of the connection a request came on. Cheap to clone; `Send + Sync`, so that it can travel with the
/// request.
///
/// ```
/// use ringleader::Connection;
///
/// /// Behind a proxy on this machine headers can be believed.
/// fn from_here(connection: &Connection) -> bool {
///     connection.listener() == "127.0.0.1:8080" && connection.peer_addr().is_some_and(|peer| peer.ip().is_loopback())
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Connection(Arc<ConnectionInfo>);

#[derive(Debug)]
struct ConnectionInfo {
    peer: Option<SocketAddr>,
    listener: Arc<str>,
}

impl Connection {
    pub(crate) fn new(peer: Option<SocketAddr>, listener: &Arc<str>) -> Self {
        Self(Arc::new(ConnectionInfo { peer, listener: Arc::clone(listener) }))
    }

    /// The client's address as the kernel gave it at accept.
    #[must_use]
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        self.0.peer
    }

    /// The address of the listener that took the connection.
    #[must_use]
    pub fn listener(&self) -> &str {
        &self.0.listener
    }
}
