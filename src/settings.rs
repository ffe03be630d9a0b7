//! What a server was configured with: validated, immutable, plain data. Every default states where it comes from.

use std::time::Duration;

/// Time and size limits of HTTP/1.1 connections.
///
/// ```
/// use ringleader::{HttpLimits, Server};
///
/// let mut limits = HttpLimits::default();
/// limits.body_bytes_max = 64 * 1024 * 1024; // uploads
/// let builder = Server::builder().http_limits(limits);
/// # let _ = builder;
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct HttpLimits {
    /// From the first byte of a request's head to its last. 10 s: below nginx's 60 s, since a head is small and a slow
    /// one holds a connection. `None` is no limit; 0 is refused at the start, as for the other timeouts.
    pub header_timeout: Option<Duration>,
    /// Of a connection between requests, and before its first. 75 s: nginx's `keepalive_timeout`.
    pub idle_timeout: Option<Duration>,
    /// How long a connection is idle before the memory of its protocol, mostly an 8 KiB buffer, is given back. At the
    /// next byte it is made anew, which costs about a tenth of a request; a client that asks more often than this keeps
    /// it. 5 s, and never more than [`header_timeout`](Self::header_timeout), since that memory may hold the beginning of a
    /// head that came with the request before; `None` is as long as that.
    pub hibernate_after: Option<Duration>,
    /// Between two pieces of a request body while the handler waits for one. 60 s: nginx's `client_body_timeout`. Of a body
    /// that is read elsewhere than on its executor, such as by a task of tokio's, the connection finds out when it looks
    /// at itself, each `hibernate_after` or minute: so much later it may be. A body that outlives its answer has the
    /// connection's limits only.
    pub body_timeout: Option<Duration>,
    /// How long a client may take nothing of an answer that is ready for it, before its connection is reset. The kernel says
    /// that there is room again when a third of its send buffer is free, so a client that reads, but less than that in this
    /// time, is reset too. 60 s: nginx's `send_timeout`, which means the same.
    pub send_timeout: Option<Duration>,
    /// How long an answer may stand still once its client has ended its direction (FIN), before its handler is dropped
    /// and the connection closed; each byte that passes gives it this long again. A FIN does not say whether the client has
    /// gone or has only nothing more to send, as `nc -N` and clients of HTTP/1.0 do: those get what is answered within this
    /// time. 1 s: hyper and nginx, before its proxied answers, give up at once, which is [`Duration::ZERO`] here, except
    /// that an answer that is ready then is still sent. `None` is for clients that end their direction and wait long; a
    /// handler then goes on for one that has gone. A client that resets its connection instead is given up at once in any
    /// case.
    pub half_close_timeout: Option<Duration>,
    /// How long what a client still sends after the last answer, or after an error, is thrown away before its connection is
    /// closed; it has seen the end of ours by then. Closing on unread bytes sends a reset, which may destroy the answer. 2 s;
    /// nginx's `lingering_timeout` is 5 s, from one piece to the next. It ends after 4 MiB in any case. `None` is no limit.
    pub linger_timeout: Option<Duration>,
    /// Bytes of a request's head. 32 KiB: what nginx takes with `large_client_header_buffers 4 8k`. At least 8 KiB; 1 MiB at
    /// most, since a head is read from its beginning with each piece of it that comes.
    pub header_bytes_max: usize,
    /// Header fields of a request. 100: hyper's own default. 10,000 at most: a table of so many, 64 bytes each, is made
    /// for each head that is read.
    pub headers_max: usize,
    /// Bytes of a request body. 1 MiB: nginx's `client_max_body_size`. `u64::MAX` is no limit; 0 takes no body.
    pub body_bytes_max: u64,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            header_timeout: Some(Duration::from_secs(10)),
            idle_timeout: Some(Duration::from_secs(75)),
            hibernate_after: Some(Duration::from_secs(5)),
            body_timeout: Some(Duration::from_secs(60)),
            send_timeout: Some(Duration::from_secs(60)),
            half_close_timeout: Some(Duration::from_secs(1)),
            linger_timeout: Some(Duration::from_secs(2)),
            header_bytes_max: 32 * 1024,
            headers_max: 100,
            body_bytes_max: 1024 * 1024,
        }
    }
}

/// When an executor refuses requests to go on serving others: it answers 503 with `Retry-After`, without calling the
/// service and without reading a body. Off by default.
///
/// ```
/// use std::time::Duration;
/// use ringleader::{Overload, Server};
///
/// let mut overload = Overload::default();
/// overload.in_flight_max = Some(1000);
/// overload.delay_max = Some(Duration::from_millis(50));
/// let builder = Server::builder().overload(overload);
/// # let _ = builder;
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Overload {
    /// Requests being answered at once on one executor; those above are refused. `None` is no limit.
    pub in_flight_max: Option<u64>,
    /// How long an executor's turns may be, that is: how late it comes to what is waiting. When turns have been longer than
    /// this for 100 ms, with no rest between them, what a turn has not begun within this time is refused. folly's `Codel`
    /// has 5 ms, for services with handlers that never compute for long; it has to be well above the longest computation
    /// of one request. `None` is no limit.
    pub delay_max: Option<Duration>,
    /// What `Retry-After` says, in whole seconds rounded up. 1 s; a day at most.
    pub retry_after: Duration,
}

impl Default for Overload {
    fn default() -> Self {
        Self { in_flight_max: None, delay_max: None, retry_after: Duration::from_secs(1) }
    }
}

/// What a panic in a request's handler, its response body or its connection costs.
///
/// ```
/// use std::time::Duration;
/// use ringleader::{Escalation, PanicPolicy, Server};
///
/// // State that a panic may have left half done: make it anew.
/// let careful = Server::builder().panics(PanicPolicy::Restart);
/// // Contain, but not for long.
/// let strict = Server::builder().escalation(Escalation::after(3, Duration::from_secs(60)));
/// // Contain whatever comes.
/// let patient = Server::builder().escalation(None);
/// # drop((careful, strict, patient));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PanicPolicy {
    /// Its connection: the client gets 500 if no answer has begun, and the connection is closed. [`Escalation`] says when
    /// that is no longer enough. As tower-http's `CatchPanic` and hyper's users in general.
    #[default]
    Contain,
    /// The executor's generation, with all its connections, once the client has been answered 500: for services whose
    /// state must not be met again after a panic. As actix-web, where it ends a worker. Five in 30 s quarantine the slot
    /// ([`RestartPolicy`](crate::RestartPolicy)).
    Restart,
}

/// How many contained panics an executor may have before it is restarted, since its state may be what is broken.
///
/// ```
/// use std::time::Duration;
/// use ringleader::Escalation;
///
/// assert_eq!(Escalation::default(), Escalation::after(100, Duration::from_secs(10)));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Escalation {
    /// One more than this many within [`within`](Self::within) and the generation ends, as if the last one had escaped. Not
    /// again for [`RestartPolicy::quarantine_window`](crate::RestartPolicy::quarantine_window), 30 s: those that a restart
    /// does not help against are only contained.
    /// 100: with handlers that panic once in a thousand, an executor that serves 10,000 a second; 10,000 at most, since the
    /// time of each is kept.
    pub panics_max: u32,
    /// 10 s. Erlang's supervisors have the same pair, `intensity` and `period`, with 1 in 5 s; but theirs counts
    /// processes that died with their state, here each is a connection, and somebody who found a request that panics
    /// should not be able to restart an executor by a handful of them.
    pub within: Duration,
}

impl Escalation {
    /// The times of so many panics are kept.
    const PANICS_MAX: u32 = 10_000;

    /// More than `panics_max` (10,000 at most) within this time.
    #[must_use]
    pub fn after(panics_max: u32, within: Duration) -> Self {
        Self { panics_max, within }.bounded()
    }

    pub(crate) fn bounded(self) -> Self {
        Self { panics_max: self.panics_max.min(Self::PANICS_MAX), ..self }
    }
}

impl Default for Escalation {
    fn default() -> Self {
        Self { panics_max: 100, within: Duration::from_secs(10) }
    }
}

/// [`Builder::thread_keep_alive`](crate::Builder::thread_keep_alive): as long as an order to scale keeps the load from
/// scaling; and what `ThreadPoolExecutor` of Java has. A load that goes up again within that time meets the old thread.
pub(crate) const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(60);

/// What every part of a running server may read.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Prefix of thread names and in logs.
    pub name: String,
    /// Connections open at once on one executor.
    pub connections_max: u64,
    pub http: HttpLimits,
    pub overload: Overload,
    pub panics: PanicPolicy,
    /// `None` is never.
    pub escalation: Option<Escalation>,
    /// Between two escalations of a slot.
    pub escalation_rest: Duration,
    pub host: Host,
    /// Whether an idle executor may have the process's allocator give pages back.
    pub trim_heap: bool,
    /// How long an executor's thread waits for another slot that needs one, at the least.
    pub thread_keep_alive: Duration,
}

/// The runtime of another kind that the server is embedded in, if user code is to find it. Without the feature `tokio`
/// there is none, and this is nothing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Host {
    #[cfg(feature = "tokio")]
    pub tokio: Option<tokio::runtime::Handle>,
}

/// For as long as this lives, user code on this thread finds its host.
#[must_use]
pub(crate) struct Entered<'a> {
    #[cfg(feature = "tokio")]
    _tokio: Option<tokio::runtime::EnterGuard<'a>>,
    #[cfg(not(feature = "tokio"))]
    _host: std::marker::PhantomData<&'a Host>,
}

impl Entered<'_> {
    /// The end of it.
    ///
    /// # Errors
    /// A panic of tokio's: user code has entered a runtime since, and has not left it. Then that one stays this thread's
    /// outside of ours.
    pub(crate) fn leave(self) -> std::thread::Result<()> {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(self)))
    }
}

impl Host {
    pub(crate) fn enter(&self) -> Entered<'_> {
        Entered {
            #[cfg(feature = "tokio")]
            _tokio: self.tokio.as_ref().map(tokio::runtime::Handle::enter),
            #[cfg(not(feature = "tokio"))]
            _host: std::marker::PhantomData,
        }
    }
}
