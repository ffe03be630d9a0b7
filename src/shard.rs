//! What user code holds of its executor.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::BoxError;
use crate::blocking::{Lost, Ticket};
use crate::executor::core::{Core, Failure, Scene};
use crate::executor::tasks::{LocalFuture, OnPanic};
use crate::handle::{ExecutorState, ExecutorStats};
use crate::protocol::answer::Contained;
use crate::shard_local::ShardLocal;
#[cfg(feature = "glommio")]
use crate::task_queue::TaskQueue;
use crate::time::{Sleep, Timeout};

/// A slot's number: 0 to the number of slots less one, for the life of the server.
///
/// ```
/// use ringleader::{Shard, Stats};
///
/// fn requests_here(shard: &Shard, stats: &Stats) -> u64 {
///     stats.executors[shard.id().index()].requests
/// }
/// ```
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
///
/// The thread is pinned to one CPU and blocks SIGPIPE. Threads and processes that are made on it (a thread pool on first
/// use, `std::process::Command`) inherit both: make them in [`Shard::spawn_blocking`], or outside of the server.
///
/// ```
/// use ringleader::{Body, Request, Response, Server, Shard, service_fn};
///
/// let server = Server::builder().listen("127.0.0.1:0").serve(async |shard: Shard| {
///     println!("executor {} on CPU {}, generation {}", shard.id(), shard.cpu(), shard.generation());
///     Ok(service_fn(async move |_: Request| {
///         Ok(Response::new(Body::from(format!("{} connections are open here\n", shard.stats().open))))
///     }))
/// });
/// # drop(server);
/// ```
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

    /// Whether the server is fit to take traffic: what a load balancer's probe wants to know. False until every executor
    /// has started; while no executor serves, or too many of them are stalled or quarantined
    /// ([`Builder::readiness`](crate::Builder::readiness): more than half); and from an order to
    /// drain on, of which [`Builder::drain_delay`](crate::Builder::drain_delay) is the time for a load balancer to notice.
    ///
    /// The same as [`Stats::ready`](crate::Stats::ready), but for one thing: it stays true in a process whose addresses
    /// another one has taken over ([`Handle::upgrade`](crate::Handle::upgrade)). A probe over a connection that was kept asks
    /// about the address, which is served.
    ///
    /// ```
    /// use ringleader::{Body, Request, Response, Server, Shard, StatusCode, service_fn};
    ///
    /// let server = Server::builder().listen("127.0.0.1:0").serve(async |shard: Shard| {
    ///     Ok(service_fn(async move |request: Request| {
    ///         let mut response = Response::new(Body::from("Hello, World!"));
    ///         if request.uri().path() == "/ready" && !shard.is_ready() {
    ///             *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    ///         }
    ///         Ok(response)
    ///     }))
    /// });
    /// # drop(server);
    /// ```
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.core.ready.load(Ordering::Relaxed)
    }

    /// Runs a future on this executor. A panic in it is contained whatever the [`PanicPolicy`](crate::PanicPolicy): it
    /// becomes the task's error. Dropping the [`Task`] lets it run on.
    ///
    /// It lives as long as the generation at most. A [`Task`] that is waited for after that, in a later generation of the
    /// slot, is an error, and so is one that is spawned then: the future is dropped at once.
    ///
    /// ```
    /// use ringleader::{Shard, TaskError};
    ///
    /// async fn both(shard: &Shard) -> Result<u32, TaskError> {
    ///     let (one, other) = (shard.spawn(async { 20 }), shard.spawn(async { 22 }));
    ///     Ok(one.await? + other.await?)
    /// }
    /// ```
    pub fn spawn<F: Future + 'static>(&self, future: F) -> Task<F::Output> {
        let (task, future) = joined(&self.core, future);
        self.core.spawn(future, OnPanic::Contain);
        task
    }

    /// The task queue of this executor with this name and so many shares of its thread's time; it is made when there is
    /// none yet. Feature `glommio`. See [`TaskQueue`].
    ///
    /// Shares are 1 to 1000. Everything else on the executor (connections, spawned tasks) has 1000 together. So a queue with
    /// 100 gets one eleventh of the time while both have work, and all of it while nothing else has.
    ///
    /// # Errors
    /// When `shares` is out of range, or when the executor has 64 queues already: they are never given back while its
    /// thread lives.
    #[cfg(feature = "glommio")]
    pub fn task_queue(&self, name: &str, shares: usize) -> Result<TaskQueue, crate::Error> {
        TaskQueue::of(&self.core, name, shares)
    }

    /// Runs a future that this executor cannot do without: when it fails or panics the executor is restarted. It may
    /// end with `Ok`.
    ///
    /// ```
    /// use std::{cell::RefCell, rc::Rc, time::Duration};
    /// use ringleader::{BoxError, Shard};
    ///
    /// /// Keeps a copy of a file in memory; the service restarts with a fresh one if it cannot be read.
    /// fn keep_up_to_date(shard: &Shard, copy: Rc<RefCell<String>>) {
    ///     let clock = shard.clone();
    ///     shard.background("hosts", async move {
    ///         loop {
    ///             let fresh = clock.spawn_blocking(|| std::fs::read_to_string("/etc/hosts")).await??;
    ///             copy.replace(fresh);
    ///             clock.sleep(Duration::from_secs(10)).await;
    ///         }
    ///     });
    /// }
    /// ```
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

    /// Runs a closure that blocks, or computes for long, on a thread of the server's own pool, and lets this executor go
    /// on meanwhile.
    ///
    /// The pool has up to [`Builder::blocking_threads_max`](crate::Builder::blocking_threads_max) threads, which are
    /// started when they are needed, are not pinned, and end after 10 s without work. As many closures as
    /// [`Builder::blocking_queue_max`](crate::Builder::blocking_queue_max) says may wait for one; more fail at once with a
    /// [`TaskError`] that [is overloaded](TaskError::is_overloaded), and that a service may return as it is: it is answered
    /// with 503 and `Retry-After`.
    ///
    /// What the closure starts, threads and processes, may run on every CPU that the server's process may, and does not
    /// inherit what an executor's thread has of its own. An executor's thread is pinned, and so is what is started on it.
    ///
    /// A panic in the closure becomes the error, and costs nothing else. Dropping the [`Blocking`], which the end of the
    /// generation does too, takes the closure not back: it runs to its end, and its result is dropped on its thread. When
    /// the server stops, closures that wait are dropped, and those that run have until the drain's deadline ([`Builder::stop_grace`](crate::Builder::stop_grace), 5 s, when
    /// there is no drain); then their threads are left behind and counted in
    /// [`Exit::abandoned_closures`](crate::Exit::abandoned_closures).
    ///
    /// ```
    /// use ringleader::{Body, Request, Response, Server, Shard, service_fn};
    ///
    /// let builder = Server::builder().listen("127.0.0.1:0").blocking_threads_max(8).blocking_queue_max(100);
    /// let server = builder.serve(async |shard: Shard| {
    ///     Ok(service_fn(async move |_: Request| {
    ///         // A cold disk takes its time.
    ///         let name = shard.spawn_blocking(|| std::fs::read_to_string("/etc/hostname")).await??;
    ///         Ok(Response::new(Body::from(name)))
    ///     }))
    /// });
    /// # drop(server);
    /// ```
    pub fn spawn_blocking<F, T>(&self, closure: F) -> Blocking<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        Blocking(self.core.blocking.run(self.core.slot, self.core.generation, closure))
    }

    /// Wraps a value of this executor in a handle that is `Send`, for frameworks that demand it: see [`ShardLocal`].
    /// Where nothing demands it, capture the value, or use an `Rc`.
    ///
    /// ```
    /// use std::cell::Cell;
    /// use ringleader::{Shard, ShardLocal};
    ///
    /// /// `Clone` and `Send`, as axum demands of a state, although a `Cell` is not shared between threads.
    /// fn state(shard: &Shard) -> ShardLocal<Cell<u64>> {
    ///     shard.local(Cell::new(0))
    /// }
    /// ```
    #[must_use]
    pub fn local<T: 'static>(&self, value: T) -> ShardLocal<T> {
        ShardLocal::new(&self.core, value)
    }

    /// Completes after `duration`, rounded up to a millisecond.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # async fn example(shard: &ringleader::Shard) {
    /// shard.sleep(Duration::from_millis(20)).await;
    /// # }
    /// ```
    pub fn sleep(&self, duration: Duration) -> Sleep {
        Sleep::new(duration)
    }

    /// Drops `future` when it is not done within `limit`.
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringleader::{Body, BoxError, Reject, Request, Response, Shard, StatusCode};
    ///
    /// async fn answer(shard: &Shard, request: Request) -> Result<Response, BoxError> {
    ///     let slow = request.into_body().collect(1024);
    ///     match shard.timeout(Duration::from_secs(2), slow).await {
    ///         Ok(bytes) => Ok(Response::new(Body::from(bytes?))),
    ///         Err(elapsed) => Err(Reject::new(StatusCode::REQUEST_TIMEOUT, elapsed).into()),
    ///     }
    /// }
    /// ```
    pub fn timeout<F: Future>(&self, limit: Duration, future: F) -> Timeout<F> {
        Timeout::new(future, limit)
    }

    /// Completes when the executor is told to drain: time for long-lived work to come to its end.
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringleader::{BoxError, Shard};
    ///
    /// async fn flush() -> Result<(), BoxError> {
    ///     Ok(())
    /// }
    ///
    /// /// Once more before the end.
    /// fn flush_now_and_then(shard: &Shard) {
    ///     let clock = shard.clone();
    ///     shard.background("flush", async move {
    ///         while clock.timeout(Duration::from_secs(1), clock.draining()).await.is_err() {
    ///             flush().await?;
    ///         }
    ///         flush().await
    ///     });
    /// }
    /// ```
    pub fn draining(&self) -> Draining {
        Draining { home: self.core.serial, place: None }
    }
}

/// Completes when the executor is told to drain. Made by [`Shard::draining`]. `Send`, so that an axum handler may await it,
/// but it is to be awaited where it was made.
#[must_use = "this does nothing until it is awaited"]
pub struct Draining {
    /// Serial of the generation it was made on.
    home: u64,
    /// Where its waker is kept, which is not always that of its task.
    place: Option<usize>,
}

impl Future for Draining {
    type Output = ();

    /// # Panics
    /// When polled elsewhere than on the executor, and in the generation, it was made on.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let place = self.place;
        let watched = Core::on(self.home, |core| match core.draining() {
            Some(_) => None,
            None => Some(core.watch_drain(place, context.waker())),
        });
        match watched.expect("a drain was waited for outside of the executor that drains") {
            Some(place) => self.place = Some(place),
            None => return Poll::Ready(()),
        }
        Poll::Pending
    }
}

impl Drop for Draining {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            // Elsewhere the executor cannot be reached: it is woken in vain, once.
            Core::on(self.home, |core| core.unwatch_drain(place));
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

/// A future whose outcome a [`Task`] has, panic or not.
pub(crate) fn joined<F: Future + 'static>(core: &Rc<Core>, future: F) -> (Task<F::Output>, LocalFuture) {
    let task = Rc::new(RefCell::new(Join::Running(None)));
    let (promise, core) = (TaskPromise(Rc::clone(&task)), Rc::clone(core));
    let future = async move {
        let outcome = Contained::new(future).await.map_err(|panic| {
            let error = TaskError(Lost::Panicked(panic.message.clone()));
            core.contained(Scene::SpawnedTask, panic);
            error
        });
        promise.fulfil(outcome);
    };
    (Task(task), Box::pin(future))
}

/// The outcome that somebody may wait for; when there will be none, that is the outcome.
struct TaskPromise<T>(Rc<RefCell<Join<T>>>);

impl<T> TaskPromise<T> {
    fn fulfil(&self, outcome: Result<T, TaskError>) {
        let waker = match &mut *self.0.borrow_mut() {
            Join::Done(_) => return,
            Join::Running(waker) => waker.take(),
        };
        // On its own: what was there is dropped by it.
        self.0.replace(Join::Done(Some(outcome)));
        waker.into_iter().for_each(Waker::wake);
    }
}

impl<T> Drop for TaskPromise<T> {
    fn drop(&mut self) {
        self.fulfil(Err(TaskError(Lost::GenerationEnded)));
    }
}

enum Join<T> {
    Running(Option<Waker>),
    Done(Option<Result<T, TaskError>>),
}

/// A spawned future's outcome. Made by [`Shard::spawn`] and `TaskQueue::spawn`.
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

/// A closure's outcome, from another thread. Made by [`Shard::spawn_blocking`].
#[must_use = "the closure runs all the same, but its outcome is lost"]
pub struct Blocking<T>(Ticket<T>);

impl<T> Future for Blocking<T> {
    type Output = Result<T, TaskError>;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map_err(TaskError)
    }
}

impl<T> fmt::Debug for Blocking<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Blocking")
    }
}

/// Why a [`Task`] or a [`Blocking`] has no result.
///
/// ```
/// use ringleader::{BoxError, Reject, Shard, StatusCode};
///
/// async fn digest(shard: &Shard, bytes: Vec<u8>) -> Result<u64, BoxError> {
///     let sum = shard.spawn_blocking(move || bytes.iter().map(|byte| u64::from(*byte)).sum());
///     sum.await.map_err(|error| match error {
///         error if error.is_panic() => Reject::new(StatusCode::UNPROCESSABLE_ENTITY, "not to be digested").into(),
///         error if error.is_overloaded() => Reject::new(StatusCode::TOO_MANY_REQUESTS, error).into(),
///         error => error.into(),
///     })
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskError(Lost);

impl TaskError {
    /// It panicked.
    #[must_use]
    pub fn is_panic(&self) -> bool {
        matches!(self.0, Lost::Panicked(_))
    }

    /// There was no thread for it: it has not begun, and may be tried again later.
    #[must_use]
    pub fn is_overloaded(&self) -> bool {
        matches!(self.0, Lost::Full { .. } | Lost::NoThread(_))
    }
}

impl fmt::Display for TaskError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Lost::Panicked(message) => write!(formatter, "the task panicked: {message}"),
            Lost::Full { running, waiting } => write!(
                formatter,
                "no thread is free for a blocking closure: {running} run and {waiting} wait, which is as many as may; \
                 try again later, or raise blocking_threads_max"
            ),
            Lost::NoThread(error) => write!(
                formatter,
                "starting a thread for a blocking closure: {error}; raise the limit on threads (ulimit -u, TasksMax=)"
            ),
            Lost::GenerationEnded => {
                formatter.write_str("the generation that the task was spawned on has ended before it")
            }
            Lost::Stopped => formatter.write_str("the server stopped before the blocking closure had begun"),
        }
    }
}

impl std::error::Error for TaskError {}
