//! What the one who started a server holds of it.

use std::fmt;
use std::net::SocketAddr;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::Error;
use crate::executor::cells::Cells;
use crate::executor::threads;
use crate::order::{Order, Promise};
use crate::shard::SlotId;
use crate::supervisor::post::{Message, Post};

/// How to stop.
///
/// ```
/// use std::time::Duration;
/// use ringleader::{Stop, test::App};
/// # use ringleader::{Body, Request, Response, service_fn};
/// # let app = App::start(async |_| Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty())))))?;
///
/// let stopped = app.stop(Stop::Drain(Duration::from_secs(10)));
/// // Not to wait any longer: a second order.
/// app.stop(Stop::Now).wait()?;
/// stopped.wait()?;
/// # Ok::<(), ringleader::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// Close every connection at once.
    Now,
    /// Accept nothing more, answer what has been asked, close what is left after this time.
    Drain(Duration),
}

/// How a server ended, when it ended as it was told to.
///
/// ```
/// use std::process::ExitCode;
/// use ringleader::Exit;
///
/// fn code(exit: &Exit) -> ExitCode {
///     let in_order = exit.handed_over || (exit.drained && exit.failed == 0 && exit.abandoned == 0);
///     if in_order { ExitCode::SUCCESS } else { ExitCode::FAILURE }
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Exit {
    /// Whatever had been asked was answered before the drain's deadline, or before it was cut short. False after
    /// [`Stop::Now`] alone.
    pub drained: bool,
    /// Another process has taken over the addresses, and serves on.
    pub handed_over: bool,
    /// Another process had taken over the addresses, and failed before this one had drained: nobody serves.
    pub successor_failed: bool,
    /// Executors that failed during the drain.
    pub failed: usize,
    /// Executors that did not answer the order to stop, or hung at any time before; their threads were left behind.
    pub abandoned: usize,
    /// Blocking closures that still ran at the drain's deadline; their threads were left behind, and end with them.
    pub abandoned_closures: usize,
}

/// What a slot's executor is doing.
///
/// ```
/// use ringleader::{ExecutorState, Stats};
///
/// /// Slots that somebody should look at.
/// fn in_trouble(stats: &Stats) -> impl Iterator<Item = String> {
///     let trouble = |state| matches!(state, ExecutorState::Stalled | ExecutorState::Backoff | ExecutorState::Quarantined);
///     let troubled = stats.executors.iter().filter(move |executor| trouble(executor.state));
///     troubled.map(|executor| format!("slot {}: {:?}", executor.slot, executor.state))
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u8)]
pub enum ExecutorState {
    /// The slot has none: fewer are wanted at present, or everything has ended.
    Idle,
    /// Its start-up closure runs.
    Starting,
    /// It serves.
    Serving,
    /// One turn takes longer than [`Builder::stall_limit`](crate::Builder::stall_limit): new connections go elsewhere.
    Stalled,
    /// The same, but because its thread gets no CPU; or it does not wake from its sleep, for the same reason.
    Starved,
    /// It finishes what is running.
    Draining,
    /// It is being stopped.
    Stopping,
    /// It failed, and is started again after a pause.
    Backoff,
    /// It failed too often: the slot stays empty.
    Quarantined,
}

impl ExecutorState {
    const ALL: [Self; 9] = [
        Self::Idle,
        Self::Starting,
        Self::Serving,
        Self::Stalled,
        Self::Starved,
        Self::Draining,
        Self::Stopping,
        Self::Backoff,
        Self::Quarantined,
    ];
}

/// The counters of one slot at one moment, over all its generations.
///
/// ```
/// use std::time::Duration;
/// use ringleader::ExecutorStats;
///
/// /// The part of the time between two reads that an executor was at work.
/// fn utilisation(before: &ExecutorStats, after: &ExecutorStats, passed: Duration) -> f64 {
///     (after.busy - before.busy).as_secs_f64() / passed.as_secs_f64()
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExecutorStats {
    /// The slot.
    pub slot: SlotId,
    /// What its executor is doing, as far as the supervisor knows.
    pub state: ExecutorState,
    /// The generation that lives in it, or lived last.
    pub generation: u64,
    /// Connections accepted.
    pub accepted: u64,
    /// Those of them that waited for another slot's executor, which could not accept them.
    pub rescued: u64,
    /// Connections open now.
    pub open: u64,
    /// Requests, with those that were refused.
    pub requests: u64,
    /// Requests being answered now.
    pub in_flight: u64,
    /// Panics that cost their connection or task only.
    pub panics_contained: u64,
    /// Connections closed unanswered for want of file descriptors.
    pub shed: u64,
    /// Connections closed because the client took too long.
    pub timed_out: u64,
    /// Time spent in turns: divided by the time that has passed, the executor's utilisation.
    pub busy: Duration,
    /// Requests answered 503 because the executor had too much to do ([`Overload`](crate::Overload)).
    pub overloaded: u64,
    /// Turns of the executor's loop.
    pub turns: u64,
    /// Times the executor went to sleep.
    pub sleeps: u64,
    /// Values of [`ShardLocal`](crate::ShardLocal) that are never dropped, for their executor ended for good before their
    /// last handle.
    pub values_leaked: u64,
}

impl ExecutorStats {
    pub(crate) fn read(slot: u16, state: ExecutorState, cells: &Cells) -> Self {
        Self {
            slot: SlotId(slot),
            state,
            generation: cells.generation.get(),
            accepted: cells.accepted.get(),
            rescued: cells.rescued.get(),
            open: cells.open.get(),
            requests: cells.requests.get(),
            in_flight: cells.in_flight.get(),
            panics_contained: cells.panics_contained.get(),
            shed: cells.shed.get(),
            timed_out: cells.timed_out.get(),
            busy: Duration::from_nanos(cells.busy.get()),
            overloaded: cells.overloaded.get(),
            turns: cells.turns.get(),
            sleeps: cells.sleeps.get(),
            values_leaked: cells.values_leaked.get(),
        }
    }
}

/// A server's counters at one moment. Each is read by itself: they may differ by what happened between two reads.
///
/// ```
/// use ringleader::{Handle, StatusCode};
///
/// /// For a load balancer.
/// fn health(handle: &Handle) -> StatusCode {
///     if handle.stats().ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Whether the server is fit to take traffic, by [`Builder::readiness`](crate::Builder::readiness).
    pub ready: bool,
    /// Threads of executors that hung and were left behind; what they held stays held until they come back.
    pub threads_leaked: u64,
    /// Descriptors that executors which have ended with their threads have left behind, one each; of the whole process,
    /// since its start. See [`Builder::thread_keep_alive`](crate::Builder::thread_keep_alive).
    pub descriptors_leaked: u64,
    /// One for each slot, in order.
    pub executors: Vec<ExecutorStats>,
}

/// What handles and the supervisor share.
pub(crate) struct Shared {
    pub addresses: Vec<SocketAddr>,
    pub warnings: Vec<String>,
    pub steering: String,
    pub slots: Vec<Slot>,
    pub connections_max: u64,
    pub ready: AtomicBool,
    pub threads_leaked: AtomicU64,
    pub post: Post,
    pub exit: Mutex<Waiting>,
}

/// A slot as handles see it.
pub(crate) struct Slot {
    pub cpu: usize,
    /// Those of the seat that is in the slot: another's after a hung executor was replaced.
    pub cells: Mutex<Arc<Cells>>,
    pub state: AtomicU8,
}

impl Slot {
    pub(crate) fn new(cpu: usize, cells: Arc<Cells>) -> Self {
        Self { cpu, cells: Mutex::new(cells), state: AtomicU8::new(ExecutorState::Idle as u8) }
    }

    pub(crate) fn cells(&self) -> Arc<Cells> {
        Arc::clone(&self.cells.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn count_in(&self, cells: Arc<Cells>) {
        *self.cells.lock().unwrap_or_else(PoisonError::into_inner) = cells;
    }

    pub(crate) fn set_state(&self, state: ExecutorState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    fn state(&self) -> ExecutorState {
        let number = self.state.load(Ordering::Relaxed);
        ExecutorState::ALL.into_iter().find(|state| *state as u8 == number).unwrap_or(ExecutorState::Idle)
    }
}

/// Who waits for the end, until it is known.
pub(crate) enum Waiting {
    For(Vec<Promise<Exit>>),
    Ended(Result<Exit, Error>),
}

impl Shared {
    /// Tells everybody how the server ended.
    pub(crate) fn ended(&self, outcome: &Result<Exit, Error>) {
        let before = {
            let mut waiting = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *waiting, Waiting::Ended(outcome.clone()))
        };
        let Waiting::For(promises) = before else { return };
        for promise in promises {
            // One whose waker panics does not keep it from the others. What it panicked with may do so as it is dropped.
            catch_unwind(AssertUnwindSafe(|| promise.fulfil(outcome.clone()))).unwrap_or_else(std::mem::forget);
        }
    }

    /// Whether it is known how the server ended.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(*self.exit.lock().unwrap_or_else(PoisonError::into_inner), Waiting::Ended(_))
    }

    fn exit(&self) -> Order<Exit> {
        let mut waiting = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *waiting {
            Waiting::Ended(outcome) => Order::done(outcome.clone()),
            Waiting::For(promises) => {
                let (promise, order) = Order::new();
                promises.push(promise);
                order
            }
        }
    }
}

/// Looks at a running server and gives it orders; clone it as you like. It does not keep the server running.
///
/// ```
/// use ringleader::{Body, Request, Response, Server, service_fn};
///
/// let server = Server::builder().listen("127.0.0.1:0").executors(2).serve(async |_| {
///     Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
/// });
/// let running = server.start().wait()?;
/// let handle = running.handle(); // for another thread, say
/// println!("on {:?}, CPUs {:?}, {}", handle.local_addrs(), handle.cpus(), handle.steering());
/// println!("{} connections at once on each executor", handle.connections_max());
/// handle.warnings().iter().for_each(|warning| println!("warning: {warning}"));
/// # Ok::<(), ringleader::Error>(())
/// ```
#[derive(Clone)]
pub struct Handle(pub(crate) Arc<Shared>);

impl Handle {
    /// The addresses that are listened on, with the ports the system chose.
    #[must_use]
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.0.addresses
    }

    /// What works less well than it could on this system, each in a sentence.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.0.warnings
    }

    /// How the kernel chooses the executor of a new connection: the policy, and the kind of program that carries it out,
    /// with the reason where it is not the better kind.
    #[must_use]
    pub fn steering(&self) -> &str {
        &self.0.steering
    }

    /// The CPU of each slot's executor, in order of the slots.
    #[must_use]
    pub fn cpus(&self) -> Vec<usize> {
        self.0.slots.iter().map(|slot| slot.cpu).collect()
    }

    /// Connections that may be open at once on one executor.
    #[must_use]
    pub fn connections_max(&self) -> u64 {
        self.0.connections_max
    }

    /// The server's counters now. Costs the executors nothing.
    ///
    /// ```
    /// use ringleader::{ExecutorState, Handle};
    ///
    /// fn report(handle: &Handle) -> String {
    ///     let stats = handle.stats();
    ///     let serving = stats.executors.iter().filter(|executor| executor.state == ExecutorState::Serving).count();
    ///     let requests: u64 = stats.executors.iter().map(|executor| executor.requests).sum();
    ///     format!("ready: {}, {serving} executors serve, {requests} requests so far", stats.ready)
    /// }
    /// ```
    #[must_use]
    pub fn stats(&self) -> Stats {
        let read = |(index, slot): (usize, &Slot)| ExecutorStats::read(index as u16, slot.state(), &slot.cells());
        Stats {
            ready: self.0.ready.load(Ordering::Relaxed),
            threads_leaked: self.0.threads_leaked.load(Ordering::Relaxed),
            descriptors_leaked: threads::ended(),
            executors: self.0.slots.iter().enumerate().map(read).collect(),
        }
    }

    /// Orders so many executors, from 1 to the number of slots. Executors that are added start at once, those that are
    /// removed drain first, and no connection is lost by either.
    ///
    /// Done when the order is **accepted**, not when so many serve: a start-up closure may take its time, a drain takes as
    /// long as its requests, up to [`Builder::drain_timeout`](crate::Builder::drain_timeout), and another order may come
    /// first. Who has to wait for that looks at [`Handle::stats`], as below, and not without end: a slot that is quarantined
    /// gets no executor.
    ///
    /// Where the number follows the load ([`Executors`](crate::Executors) is a range) it goes on doing so after a minute.
    ///
    /// # Errors
    /// When the number is out of range, and while the server starts, stops or is being upgraded; nothing changes then.
    ///
    /// ```
    /// # use ringleader::{Body, Request, Response, Server, service_fn};
    /// # let server = Server::builder().listen("127.0.0.1:0").executors(2).serve(async |_| {
    /// #     Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
    /// # });
    /// let running = server.start().wait()?; // with two executors
    /// running.scale(1).wait()?;
    /// assert!(running.scale(3).wait().is_err_and(|error| error.is_refused()));
    ///
    /// use ringleader::{ExecutorState, Handle};
    /// use std::time::{Duration, Instant};
    ///
    /// /// Whether so many serve, and none is on its way in or out.
    /// fn has_reached(handle: &Handle, executors: usize) -> bool {
    ///     use ExecutorState::{Idle, Quarantined, Serving, Stalled, Starved};
    ///     let states: Vec<_> = handle.stats().executors.iter().map(|executor| executor.state).collect();
    ///     let count = |wanted: &[ExecutorState]| states.iter().filter(|state| wanted.contains(state)).count();
    ///     let serving = count(&[Serving, Stalled, Starved]);
    ///     serving == executors && serving + count(&[Idle, Quarantined]) == states.len()
    /// }
    ///
    /// let deadline = Instant::now() + Duration::from_secs(60);
    /// while !has_reached(&running, 1) && Instant::now() < deadline {
    ///     std::thread::sleep(Duration::from_millis(20));
    /// }
    /// assert!(has_reached(&running, 1));
    /// # Ok::<(), ringleader::Error>(())
    /// ```
    pub fn scale(&self, executors: usize) -> Order<()> {
        let (promise, order) = Order::new();
        self.0.post.send(Message::Scale(executors, promise));
        order
    }

    /// Orders a stop. A second order during a drain makes it stop at once if it says [`Stop::Now`]; another drain changes
    /// nothing, nor does its limit: the first one's stands, and the log says so.
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringleader::{Handle, Stop};
    ///
    /// async fn end(handle: Handle) -> Result<(), ringleader::Error> {
    ///     let exit = handle.stop(Stop::Drain(Duration::from_secs(30))).await?;
    ///     if !exit.drained {
    ///         eprintln!("some connections were cut off");
    ///     }
    ///     Ok(())
    /// }
    /// ```
    pub fn stop(&self, how: Stop) -> Order<Exit> {
        // The supervisor is gone when the server has ended, and then the outcome is there.
        self.0.post.send(Message::Stop(how));
        self.0.exit()
    }
}

impl Handle {
    /// Orders an upgrade: a new process is started ([`Builder::successor`](crate::Builder::successor) says how), is given
    /// the listeners, and serves when it is ready; then this server drains, and [`Running::join`] tells its end. The order
    /// is done when the new process is ready, with its number.
    ///
    /// # Errors
    /// [`Error::is_refused`]: the new process could not be started, ended, refused or took too long; or the server is
    /// starting, stopping or being upgraded already. Then it goes on as before.
    ///
    /// ```
    /// use ringleader::{Error, Handle};
    ///
    /// async fn upgrade(handle: Handle) -> Result<(), Error> {
    ///     match handle.upgrade().await {
    ///         Ok(process) => println!("process {process} serves; this one drains"),
    ///         Err(error) if error.is_refused() => println!("this process goes on: {error}"),
    ///         Err(error) => return Err(error),
    ///     }
    ///     Ok(())
    /// }
    /// ```
    pub fn upgrade(&self) -> Order<u32> {
        let (promise, order) = Order::new();
        // If the server has ended, the promise is dropped, which is an answer, too.
        self.0.post.send(Message::Upgrade(Some(promise)));
        order
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Handle").field("addresses", &self.0.addresses).finish_non_exhaustive()
    }
}

/// A running server's owner. Dropping it orders an immediate stop, and does not wait for it.
///
/// ```
/// use ringleader::{Body, Error, Request, Response, Server, Stop, service_fn};
///
/// let server = Server::builder().listen("127.0.0.1:0").executors(1).serve(async |_| {
///     Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
/// });
/// let running = server.start().wait()?;
/// // The thread that stops it has a handle; this one waits for the end.
/// let handle = running.handle();
/// std::thread::spawn(move || drop(handle.stop(Stop::Now)));
/// let exit = running.join().wait()?;
/// assert!(!exit.handed_over);
/// # Ok::<(), Error>(())
/// ```
#[must_use = "dropping `Running` stops the server"]
#[derive(Debug)]
pub struct Running {
    handle: Handle,
    joined: bool,
}

impl Running {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { handle: Handle(shared), joined: false }
    }

    /// A handle that may be cloned and sent about.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits for the server's end, which somebody else orders: a handle, or a signal. From here on nothing stops the server
    /// by being dropped: one whose `join` is given up (by a `select!`, a timeout) runs on, so keep a handle, or a signal,
    /// to end it.
    pub fn join(mut self) -> Order<Exit> {
        self.joined = true;
        self.handle.0.exit()
    }
}

impl Deref for Running {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.joined {
            self.handle.0.post.send(Message::Stop(Stop::Now));
        }
    }
}
