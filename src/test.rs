//! For the tests of those who build on this crate. Nothing of it runs unless it is called.
//!
//! | to test | there is |
//! |---|---|
//! | a service by itself, without a socket | [`App`] |
//! | what clients see | a server on port 0, [`get`] and [`send`] |
//! | what becomes of it all when something fails | [`provoke`], [`wait_until`] |
//!
//! A service by itself:
//!
//! ```
//! use std::cell::Cell;
//! use ringleader::{Body, BoxError, Request, Response, Service, Shard, service_fn, test::App};
//!
//! // As the program gives it to `Builder::serve`.
//! async fn start_up(_: Shard) -> Result<impl Service, BoxError> {
//!     let hits = Cell::new(0);
//!     Ok(service_fn(async move |_: Request| {
//!         hits.set(hits.get() + 1);
//!         Ok(Response::new(Body::from(format!("request {}", hits.get()))))
//!     }))
//! }
//!
//! let app = App::start(start_up)?;
//! assert_eq!(app.get("/")?.body(), "request 1");
//! assert_eq!(app.get("/")?.body(), "request 2");
//! # Ok::<(), BoxError>(())
//! ```
//!
//! The same by way of a connection. [`Handle::local_addrs`] says which port the system chose, so that tests can run side by
//! side:
//!
//! ```
//! use ringleader::{Body, BoxError, Request, Response, Server, Stop, service_fn, test};
//!
//! let server = Server::builder().listen("127.0.0.1:0").executors(1).serve(async |_| {
//!     Ok(service_fn(async |_: Request| Ok(Response::new(Body::from("Hello, World!")))))
//! });
//! let running = server.start().wait()?;
//! let answer = test::get(running.local_addrs()[0], "/")?;
//! assert_eq!((answer.status().as_u16(), &answer.body()[..]), (200, &b"Hello, World!"[..]));
//! running.stop(Stop::Now).wait()?;
//! # Ok::<(), BoxError>(())
//! ```
//!
//! Always there, and not behind a feature: tokio has one, `test-util`, because a clock that can be paused costs every
//! program that has it; this costs a few kilobytes, which a linker drops. Whoever holds a [`Handle`] can end the server, so
//! that they may also provoke a panic in it gives them no new power.

mod client;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::{Future, poll_fn};
use std::ops::Deref;
use std::pin::pin;
use std::rc::Rc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use http_body::Body as HttpBody;

use crate::supervisor::post::Message;
use crate::{Body, BoxError, Builder, Error, Handle, Order, Request, Response, Running, Server, Service, Shard, Stats};

pub use crate::supervisor::provoke::Provocation;
pub use client::{get, send};

/// The longest that anything in this module waits, 30 s: far above what it takes on a busy machine, so that a test that
/// hangs fails.
pub const LIMIT: Duration = Duration::from_secs(30);

/// How often [`wait_until`] looks.
const LOOK: Duration = Duration::from_millis(2);

/// A service on an executor of its own, called without a socket.
///
/// It is a whole server but for its listeners: a pinned thread with its ring, so that timers, files, tasks and
/// [`spawn_blocking`](Shard::spawn_blocking) work, and a supervisor, so that generations are restarted. What belongs to
/// connections is not there: limits ([`HttpLimits`](crate::HttpLimits), [`Overload`](crate::Overload)),
/// [`Body::connection`], the counters of requests, and a drain that waits for them.
///
/// Dropping it orders the server's end, as dropping [`Running`] does; it is a [`Handle`] by `Deref`.
///
/// ```
/// use ringleader::{Body, BoxError, Reject, Request, Response, StatusCode, service_fn, test::App};
///
/// let app = App::start(async |_| {
///     Ok(service_fn(async |request: Request| match request.uri().path() {
///         "/" => Ok(Response::new(Body::from("home"))),
///         path => Err(Reject::new(StatusCode::NOT_FOUND, format!("no {path}")).into()),
///     }))
/// })?;
/// assert_eq!(app.get("/")?.body(), "home");
/// let error = app.get("/elsewhere").expect_err("it is not there");
/// assert_eq!(error.downcast_ref::<Reject>().map(Reject::status), Some(StatusCode::NOT_FOUND));
/// # Ok::<(), BoxError>(())
/// ```
pub struct App {
    running: Running,
    lanes: Arc<Lanes>,
}

impl App {
    /// Runs the start-up closure, as [`Builder::serve`] would, on one executor.
    ///
    /// # Errors
    /// As [`Server::start`]: when the start-up closure fails, its error is in the message.
    pub fn start<F, S>(start_up: F) -> Result<Self, Error>
    where
        F: AsyncFn(Shard) -> Result<S, BoxError> + Send + Sync + 'static,
        S: Service,
    {
        Self::with(Server::builder().name("test").executors(1), start_up)
    }

    /// The same with a builder's settings, such as several executors or a restart policy. If it has addresses to listen on,
    /// the service is there, too.
    ///
    /// # Errors
    /// As [`App::start`].
    ///
    /// ```
    /// use ringleader::{Body, BoxError, Request, Response, Server, Shard, service_fn, test::App};
    ///
    /// let app = App::with(Server::builder().executors(2), async |shard: Shard| {
    ///     Ok(service_fn(async move |_: Request| Ok(Response::new(Body::from(format!("slot {}", shard.id()))))))
    /// })?;
    /// assert_eq!(app.call_on(1, Request::new(Body::empty()))?.body(), "slot 1");
    /// # Ok::<(), BoxError>(())
    /// ```
    pub fn with<F, S>(builder: Builder, start_up: F) -> Result<Self, Error>
    where
        F: AsyncFn(Shard) -> Result<S, BoxError> + Send + Sync + 'static,
        S: Service,
    {
        let lanes = Arc::new(Lanes::default());
        let taken = Arc::clone(&lanes);
        let server = builder.without_listeners().serve(async move |shard: Shard| {
            let service = Rc::new(start_up(shard.clone()).await?);
            shard.background("calls", answer_calls(shard.clone(), Arc::clone(&taken), Rc::clone(&service)));
            Ok(SharedService(service))
        });
        Ok(Self { running: server.start().wait()?, lanes })
    }

    /// Calls the service on the executor of slot 0, and waits for its whole answer. Several threads may call at once.
    ///
    /// # Errors
    /// What the service returned, as it is: `downcast_ref` finds a [`Reject`](crate::Reject) or a
    /// [`BodyError`](crate::BodyError), for which a server would have sent an answer. A
    /// [`TaskError`](crate::TaskError) when it panicked. Another one when its executor failed meanwhile, at once when the
    /// server has ended or the slot is quarantined, or when there was no answer within [`LIMIT`].
    pub fn call(&self, request: Request) -> Result<Response<Bytes>, BoxError> {
        self.call_on(0, request)
    }

    /// The same on the executor of another slot, counted from 0.
    ///
    /// # Errors
    /// As [`App::call`], and when there is no such slot.
    pub fn call_on(&self, slot: usize, request: Request) -> Result<Response<Bytes>, BoxError> {
        let slots = self.cpus().len();
        if slot >= slots {
            return Err(format!("there is no slot {slot}, only {slots}").into());
        }
        let (reply, answer) = mpsc::channel();
        self.lanes.put(slot, Call { request, reply });
        let give_up = Instant::now() + LIMIT;
        loop {
            // First, so that the look at the answer which follows is the last.
            let nobody = self.nobody_on(slot);
            match answer.recv_timeout(LOOK) {
                Ok(answered) => return answered,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(format!("the executor of slot {slot} ended before it had answered").into());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(why) = nobody {
                return Err(format!("slot {slot} does not answer: {why}").into());
            }
            if Instant::now() >= give_up {
                return Err(format!("slot {slot} has not answered within {LIMIT:?}").into());
            }
        }
    }

    /// Why no executor will ever take a call on this slot.
    fn nobody_on(&self, slot: usize) -> Option<&'static str> {
        if self.running.0.has_ended() {
            return Some("the server has ended");
        }
        let quarantined = self.stats().executors[slot].state == crate::ExecutorState::Quarantined;
        quarantined.then_some("its executor failed too often, and is not started again")
    }

    /// Calls the service with a GET of this path and no body.
    ///
    /// # Errors
    /// As [`App::call`], and when it is not a path.
    pub fn get(&self, path: &str) -> Result<Response<Bytes>, BoxError> {
        self.call(Request::get(path).body(Body::empty())?)
    }
}

impl Deref for App {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.running
    }
}

impl fmt::Debug for App {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("App").field("running", &self.running).finish_non_exhaustive()
    }
}

/// Has a fault befall the executor of a slot, counted from 0. The order is done when the fault begins; [`wait_until`] tells
/// what follows from it.
///
/// ```
/// use ringleader::test::{App, Provocation, provoke, wait_until};
/// use ringleader::{Body, BoxError, ExecutorState, Request, Response, Shard, service_fn};
///
/// let app = App::start(async |shard: Shard| {
///     let generation = shard.generation();
///     Ok(service_fn(async move |_: Request| Ok(Response::new(Body::from(format!("generation {generation}"))))))
/// })?;
/// provoke(&app, 0, Provocation::Restart).wait()?;
/// wait_until(&app, |stats| {
///     let executor = &stats.executors[0];
///     executor.generation == 2 && executor.state == ExecutorState::Serving
/// });
/// assert_eq!(app.get("/")?.body(), "generation 2");
/// # Ok::<(), BoxError>(())
/// ```
///
/// # Errors
/// [`Error::is_refused`] when there is no such slot, it has no executor that serves, or that ended before.
pub fn provoke(handle: &Handle, slot: usize, what: Provocation) -> Order<()> {
    let (promise, order) = Order::new();
    handle.0.post.send(Message::Provoke(slot, what, promise));
    order
}

/// Waits until a server's counters are as the test wants them, and returns them. It looks every 2 ms: what lasts for less
/// may be missed.
///
/// # Panics
/// After [`LIMIT`], with the counters as they are then.
#[track_caller]
pub fn wait_until(handle: &Handle, mut is_so: impl FnMut(&Stats) -> bool) -> Stats {
    let start = Instant::now();
    loop {
        let stats = handle.stats();
        if is_so(&stats) {
            return stats;
        }
        assert!(start.elapsed() < LIMIT, "waited for {LIMIT:?} in vain; the server is now like this: {stats:#?}");
        thread::sleep(LOOK);
    }
}

/// A request on its way to an executor, and where its answer goes.
struct Call {
    request: Request,
    reply: mpsc::Sender<Result<Response<Bytes>, BoxError>>,
}

/// What waits for each slot's executor. As in a listener's queue, it waits for the next generation if one fails.
#[derive(Default)]
struct Lanes(Mutex<BTreeMap<usize, Lane>>);

#[derive(Default)]
struct Lane {
    calls: VecDeque<Call>,
    waker: Option<Waker>,
}

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Lane>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, slot: usize, call: Call) {
        let waker = {
            let mut lanes = self.lock();
            let lane = lanes.entry(slot).or_default();
            lane.calls.push_back(call);
            lane.waker.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }

    fn poll_next(&self, slot: usize, context: &Context<'_>) -> Poll<Call> {
        let mut lanes = self.lock();
        let lane = lanes.entry(slot).or_default();
        if let Some(call) = lane.calls.pop_front() {
            return Poll::Ready(call);
        }
        lane.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

/// One service for calls and connections.
struct SharedService<S>(Rc<S>);

impl<S: Service> Service for SharedService<S> {
    type Body = S::Body;

    fn call(&self, request: Request) -> impl Future<Output = Result<Response<Self::Body>, BoxError>> {
        self.0.call(request)
    }
}

/// Answers the calls of this shard's slot, each in a task of its own, as long as the generation lives.
async fn answer_calls<S: Service>(shard: Shard, lanes: Arc<Lanes>, service: Rc<S>) -> Result<(), BoxError> {
    let slot = shard.id().index();
    loop {
        let Call { request, reply } = poll_fn(|context| lanes.poll_next(slot, context)).await;
        let service = Rc::clone(&service);
        let task = shard.spawn(async move { collect(service.call(request).await?).await });
        // Left to itself: what it waits for is the task's end.
        drop(shard.spawn(async move {
            let answer = task.await.unwrap_or_else(|panicked| Err(panicked.into()));
            // Whoever has waited for too long is gone.
            let _ = reply.send(answer);
        }));
    }
}

async fn collect<B>(response: Response<B>) -> Result<Response<Bytes>, BoxError>
where
    B: HttpBody<Error: Into<BoxError>>,
{
    let (head, body) = response.into_parts();
    let (mut body, mut bytes) = (pin!(body), BytesMut::new());
    while let Some(frame) = poll_fn(|context| body.as_mut().poll_frame(context)).await {
        if let Ok(data) = frame.map_err(Into::into)?.into_data() {
            bytes.put(data);
        }
    }
    Ok(Response::from_parts(head, bytes.freeze()))
}
