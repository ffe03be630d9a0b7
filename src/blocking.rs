//! A pool of threads for calls that block: one per server, shared by its executors, with a bound on the threads and one
//! on what waits for them.
//!
//! Threads start when there is work and no idle thread, run on every CPU that the process had at the start (and not on
//! the pinned one of the executor that happened to start them), and end after a while without work. tokio's pool is the
//! model; what differs is that its queue has no end, and that dropping the pool waits for ever unless told otherwise.
//!
//! glommio's own pool is not used: a panic there leaves whoever waits for it waiting, and its one thread per executor is
//! made before there is any work.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::oneshot::Outcome;
use crate::panics::lines::{Lines, More};
use crate::panics::{self, Panic, caught};
use crate::sys::{affinity, socket};

/// Threads at most, unless the builder says otherwise. A thread here waits for a disk, a name server or a database: 64
/// keep a disk's queue full and are more than most databases want connections. tokio's 512 carries its file I/O as well,
/// which here goes through a ring; libuv has 4.
pub(crate) const THREADS_MAX: usize = 64;
/// Closures that may wait for a thread. At 10 ms each the last of them waits 0.16 s on 64 threads; beyond that a
/// client is better told to come again.
pub(crate) const QUEUE_MAX: usize = 1024;
/// A thread without work ends after this: tokio's keep-alive.
pub(crate) const IDLE_MAX: Duration = Duration::from_secs(10);

/// Why a closure has no result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lost {
    /// It panicked, and said this.
    Panicked(String),
    /// As many run and wait as may.
    Full { running: usize, waiting: usize },
    /// There is no thread, and the system gives none.
    NoThread(String),
    /// The server has stopped.
    Stopped,
    /// It was no closure, but a task, and its generation is over.
    GenerationEnded,
}

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub threads_max: usize,
    pub queue_max: usize,
    pub idle_max: Duration,
}

/// A closure with where to put its result; what it panicked with.
struct Job {
    slot: u16,
    generation: u64,
    run: Box<dyn FnOnce() -> Option<Panic> + Send>,
}

/// The threads of one server. They live on when it is dropped until [`Pool::close`] has been called.
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    cpus: Vec<usize>,
    /// As in the thread that started the server.
    blocks_sigpipe: bool,
    bounds: Bounds,
    state: Mutex<State>,
    /// There is work, or the pool has been closed.
    work: Condvar,
    /// A thread has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: HashMap<u64, JoinHandle<()>>,
    threads_made: u64,
    /// Threads that wait for work or have just been made; each takes one of the queue.
    idle: usize,
    closed: bool,
    /// The last thread that ended by itself, which has joined the one before it.
    last_ended: Option<JoinHandle<()>>,
    lines: Lines,
}

impl Pool {
    /// Threads run on `cpus` and are called `name-blk`.
    pub(crate) fn new(name: &str, cpus: Vec<usize>, bounds: Bounds) -> Self {
        let bounds = Bounds { threads_max: bounds.threads_max.max(1), ..bounds };
        let name = crate::sys::thread::name(name, &"blk");
        let (state, work, ended) = Default::default();
        let blocks_sigpipe = socket::blocks_sigpipe();
        Self { shared: Arc::new(Shared { name, cpus, blocks_sigpipe, bounds, state, work, ended }) }
    }

    /// Runs `closure` on a thread of the pool for generation `generation` of `slot`. A refusal is the ticket's outcome.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        slot: u16,
        generation: u64,
        closure: impl FnOnce() -> T + Send + 'static,
    ) -> Ticket<T> {
        let (promise, outcome) = Outcome::new();
        let run = move || match catch_unwind(AssertUnwindSafe(closure)) {
            Ok(value) => {
                promise.fulfil(Ok(value));
                None
            }
            Err(payload) => {
                let panic = caught(payload);
                promise.fulfil(Err(Lost::Panicked(panic.message.clone())));
                Some(panic)
            }
        };
        match self.shared.submit(Job { slot, generation, run: Box::new(run) }) {
            Ok(()) => Ticket(outcome),
            Err((why, _)) => Ticket(Outcome::ready(Err(why))),
        }
    }

    /// Takes no more work and drops what waits; waits for the closures that run until `deadline`. How many still run:
    /// their threads are left behind, and end with them. May be called again, with a later deadline.
    pub(crate) fn close(&self, deadline: Instant) -> usize {
        let mut state = self.shared.lock();
        state.closed = true;
        let waiting = std::mem::take(&mut state.queue);
        drop(state);
        self.shared.work.notify_all();
        // Whoever waits for them is told by the promises' drops; what the closures hold may panic in its own.
        waiting.into_iter().for_each(|job| {
            self.shared.guard(job.slot, job.generation, move || {
                drop(job);
                None
            })
        });
        let mut state = self.shared.lock();
        while !state.threads.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.shared.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let (last, left) = (state.last_ended.take(), state.threads.len());
        let counts = state.lines.take_all(Instant::now());
        drop(state);
        log_counts(counts);
        join(last);
        left
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(self: &Arc<Self>, job: Job) -> Result<(), (Lost, Job)> {
        let mut state = self.lock();
        if state.closed {
            return Err((Lost::Stopped, job));
        }
        // A thread that is idle has one of the queue to take already for each entry.
        if state.queue.len() >= state.idle {
            let made = match state.threads.len() < self.bounds.threads_max {
                true => self.start_thread(&mut state),
                false => Err(io::Error::other("as many threads run as may")),
            };
            match made {
                Ok(()) => {}
                Err(error) if state.threads.is_empty() => return Err((Lost::NoThread(error.to_string()), job)),
                Err(_) => {
                    // Each idle thread has a closure to take, so all of them are as good as running.
                    let (running, waiting) = (state.threads.len(), state.queue.len() - state.idle);
                    if waiting >= self.bounds.queue_max {
                        return Err((Lost::Full { running, waiting }, job));
                    }
                }
            }
        }
        state.queue.push_back(job);
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    fn start_thread(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let number = state.threads_made;
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new().name(self.name.clone()).spawn(move || shared.work_off(number))?;
        state.threads_made += 1;
        state.idle += 1;
        state.threads.insert(number, thread);
        Ok(())
    }

    /// A thread's life.
    fn work_off(&self, number: u64) {
        panics::mark_thread();
        if let Err(error) = affinity::run_on(&self.cpus) {
            tracing::debug!(%error, "a thread for blocking calls stays on its executor's CPU");
        }
        // What is started here inherits it, and a child that writes to a pipe whose reader has gone is to end.
        if let Err(error) = socket::block_sigpipe(self.blocks_sigpipe) {
            tracing::debug!(%error, "a thread for blocking calls blocks SIGPIPE, as its executor does");
        }
        while let Some(job) = self.next_job() {
            self.guard(job.slot, job.generation, job.run);
            self.lock().idle += 1;
        }
        let mut state = self.lock();
        let own = state.threads.remove(&number);
        let before = std::mem::replace(&mut state.last_ended, own);
        let counts = if state.threads.is_empty() { state.lines.take_all(Instant::now()) } else { Vec::new() };
        drop(state);
        self.ended.notify_all();
        log_counts(counts);
        join(before);
    }

    /// The next one to run, for a thread that is idle and no longer will be; `None` when it is to end.
    fn next_job(&self) -> Option<Job> {
        let since = Instant::now();
        let mut state = self.lock();
        loop {
            let job = state.queue.pop_front();
            if job.is_some() || state.closed || since.elapsed() >= self.bounds.idle_max {
                state.idle -= 1;
                return job;
            }
            let now = Instant::now();
            let counts = state.lines.take_due(now);
            if !counts.is_empty() {
                drop(state);
                log_counts(counts);
                state = self.lock();
                continue;
            }
            let wake =
                state.lines.due().map_or(since + self.bounds.idle_max, |due| due.min(since + self.bounds.idle_max));
            let limit = wake.saturating_duration_since(now);
            state = self.work.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Runs what may panic, and logs it if it does.
    fn guard(&self, slot: u16, generation: u64, act: impl FnOnce() -> Option<Panic>) {
        // What is caught here was dropped with the closure, or is a result that nobody wanted.
        let panic = match catch_unwind(AssertUnwindSafe(act)) {
            Ok(panic) => panic,
            Err(payload) => Some(caught(payload)),
        };
        let Some(panic) = panic else { return };
        let Some(more) = self.lock().lines.note(panic.site(), Instant::now()) else { return };
        let more = more.map(|more| format!(" ({more})")).unwrap_or_default();
        let place = panic.place.as_deref();
        tracing::error!(
            slot,
            generation,
            place,
            "a blocking closure panicked, it alone has ended: {}{more}",
            panic.message
        );
    }
}

fn log_counts(counts: Vec<(String, More)>) {
    counts.into_iter().for_each(|(site, more)| tracing::error!("panics in blocking closures at {site}: {more}"));
}

fn join(thread: Option<JoinHandle<()>>) {
    if thread.is_some_and(|thread| thread.join().is_err()) {
        tracing::error!("a thread for blocking calls ended in a panic, though each of its closures is caught");
    }
}

/// What becomes of a closure. Dropping it does not stop the closure; the result is then dropped on the closure's thread.
pub(crate) struct Ticket<T>(Outcome<Result<T, Lost>>);

impl<T> Future for Ticket<T> {
    type Output = Result<T, Lost>;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // The promise goes with a closure that is not run.
        Pin::new(&mut self.0).poll(context).map(|outcome| outcome.unwrap_or(Err(Lost::Stopped)))
    }
}

#[cfg(test)]
mod tests;
