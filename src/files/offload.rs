//! Where system calls go that may wait for a disk and that no ring operation of glommio's covers:
//! `openat2` on a cold name cache, reading a directory. A small interface, so that a runtime's own
//! pool can take its place, and a default: one helper thread per [`Files`](super::Files).

use std::error::Error;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::thread::{Builder, JoinHandle};

/// Jobs that may wait for the helper thread. At 100 µs each, a typical cold lookup, the last one
/// waits 0.1 s; beyond that "busy, try again" (503) is the better answer.
const HELPER_QUEUE_JOBS_MAX: usize = 1024;

/// One blocking piece of work. Dropping it unrun is allowed and tells whoever waits for it.
pub type Job = Box<dyn FnOnce() + Send>;

/// Runs blocking work away from the executor's thread.
///
/// ```
/// use std::sync::{Arc, mpsc};
/// use ringleader::{Files, Job, Offload, Overloaded};
///
/// /// One thread for the files of all executors.
/// struct OneThread(mpsc::SyncSender<Job>);
///
/// impl Offload for OneThread {
///     fn run(&self, job: Job) -> Result<(), Overloaded> {
///         self.0.try_send(job).map_err(|_| Overloaded)
///     }
/// }
///
/// let (send, receive) = mpsc::sync_channel::<Job>(100);
/// std::thread::spawn(move || receive.iter().for_each(|job| job()));
/// let files = Files::open("/usr/share/doc")?.offload(Arc::new(OneThread(send)));
/// # Ok::<(), ringleader::FilesError>(())
/// ```
pub trait Offload: Send + Sync {
    /// Takes `job` to run soon on another thread. Must not block: it is called on an executor.
    ///
    /// # Errors
    /// [`Overloaded`] when there is no room; the request is then answered with 503.
    fn run(&self, job: Job) -> Result<(), Overloaded>;
}

/// The answer of an [`Offload`] that takes no more work at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overloaded;

impl fmt::Display for Overloaded {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("no room for another blocking file operation; try again when some have finished")
    }
}

impl Error for Overloaded {}

/// Runs `work` elsewhere and waits for its result. [`Overloaded`] also when the job was dropped or
/// panicked: the request cannot be answered now, and that is all its owner can do about it.
/// Dropping the future skips work that has not begun.
pub(super) async fn offload<T: Send + 'static>(
    to: &dyn Offload,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Overloaded> {
    let completion = Arc::new(Completion { state: Mutex::new(State::Waiting(None)) });
    let finisher = Finisher(Arc::clone(&completion));
    to.run(Box::new(move || {
        if finisher.is_awaited() {
            finisher.0.finish(State::Done(work()));
        }
    }))?;
    poll_fn(|context| completion.poll(context.waker())).await
}

/// A one-shot result between two threads. The lock is held for a few instructions, never across
/// work or a wake.
struct Completion<T> {
    state: Mutex<State<T>>,
}

enum State<T> {
    Waiting(Option<Waker>),
    Done(T),
    Lost,
}

impl<T> Completion<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first end counts; the later ones (the finisher's drop) change nothing.
    fn finish(&self, end: State<T>) {
        let mut state = self.lock();
        let State::Waiting(waker) = &mut *state else {
            return;
        };
        let waker = waker.take();
        *state = end;
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn poll(&self, waker: &Waker) -> Poll<Result<T, Overloaded>> {
        let mut state = self.lock();
        match &mut *state {
            State::Waiting(Some(known)) if known.will_wake(waker) => Poll::Pending,
            State::Waiting(known) => {
                *known = Some(waker.clone());
                Poll::Pending
            }
            State::Done(_) | State::Lost => match std::mem::replace(&mut *state, State::Lost) {
                State::Done(value) => Poll::Ready(Ok(value)),
                State::Waiting(_) | State::Lost => Poll::Ready(Err(Overloaded)),
            },
        }
    }
}

/// The job's half: however the job ends, run, dropped or by a panic, its owner is woken.
struct Finisher<T>(Arc<Completion<T>>);

impl<T> Finisher<T> {
    fn is_awaited(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl<T> Drop for Finisher<T> {
    fn drop(&mut self) {
        self.0.finish(State::Lost);
    }
}

/// The default [`Offload`]: one thread, started with the first job, ended and joined on drop. Jobs
/// that still wait then are dropped unrun.
///
/// The thread inherits the CPU affinity of the thread that starts it, so on a pinned executor it
/// shares its core; it mostly sleeps in the kernel.
#[derive(Default)]
pub(super) struct Helper {
    thread: Mutex<Option<Running>>,
    stopping: Arc<AtomicBool>,
}

struct Running {
    jobs: SyncSender<Job>,
    handle: JoinHandle<()>,
}

impl Helper {
    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self) -> io::Result<Running> {
        let (jobs, queue) = sync_channel(HELPER_QUEUE_JOBS_MAX);
        let stopping = Arc::clone(&self.stopping);
        // Linux cuts thread names at 15 bytes.
        let handle = Builder::new().name("ringleader-file".into()).spawn(move || work_off(&queue, &stopping))?;
        Ok(Running { jobs, handle })
    }
}

impl Offload for Helper {
    fn run(&self, job: Job) -> Result<(), Overloaded> {
        let mut thread = self.lock();
        let running = match &mut *thread {
            Some(running) => running,
            none => {
                let started = self.start().inspect_err(|error| {
                    tracing::warn!(%error, "starting the file helper thread failed; raise the limit on threads (ulimit -u, TasksMax=)");
                });
                none.insert(started.map_err(|_| Overloaded)?)
            }
        };
        running.jobs.try_send(job).map_err(|_| Overloaded)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let Some(Running { jobs, handle }) = self.lock().take() else {
            return;
        };
        self.stopping.store(true, Ordering::Relaxed);
        drop(jobs);
        if handle.join().is_err() {
            tracing::error!("the file helper thread ended by a panic, though each of its jobs is caught");
        }
    }
}

fn work_off(queue: &Receiver<Job>, stopping: &AtomicBool) {
    while let Ok(job) = queue.recv() {
        if stopping.load(Ordering::Relaxed) {
            continue;
        }
        // Unwind safe: a job owns what it touches, and its finisher tells the waiting request.
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            tracing::error!("a blocking file operation panicked; its request is answered with 503");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::mpsc::channel;
    use std::task::{Context, Wake};
    use std::thread::{Thread, current, park};

    use super::*;

    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let waker = Waker::from(Arc::new(Unpark(current())));
        let mut future = pin!(future);
        loop {
            if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return value;
            }
            park();
        }
    }

    #[test]
    fn runs_elsewhere_and_survives_a_panic() {
        let helper = Helper::default();
        let here = current().id();
        assert_ne!(block_on(offload(&helper, || current().id())), Ok(here));
        let lost: Result<(), _> = block_on(offload(&helper, || panic!("deliberate, from a test")));
        assert_eq!(lost, Err(Overloaded));
        assert_eq!(block_on(offload(&helper, || 7)), Ok(7));
    }

    #[test]
    fn the_queue_is_bounded_and_a_drop_tells_those_who_wait() {
        let helper = Helper::default();
        let (release, gate) = channel::<()>();
        let (begun, started) = channel::<()>();
        let block = move || {
            begun.send(()).expect("the test listens");
            gate.recv().expect("the test releases");
        };
        helper.run(Box::new(block)).expect("room");
        started.recv().expect("the helper runs");
        let waiting = Arc::new(Completion { state: Mutex::new(State::<u8>::Waiting(None)) });
        let finisher = Finisher(Arc::clone(&waiting));
        helper.run(Box::new(move || finisher.0.finish(State::Done(1)))).expect("room");
        for _ in 1..HELPER_QUEUE_JOBS_MAX {
            helper.run(Box::new(|| ())).expect("room");
        }
        assert_eq!(helper.run(Box::new(|| ())), Err(Overloaded));
        helper.stopping.store(true, Ordering::Relaxed);
        release.send(()).expect("the job waits");
        drop(helper);
        assert!(matches!(*waiting.lock(), State::Lost), "dropped unrun");
    }

    #[test]
    fn abandoned_work_is_skipped() {
        struct Later(Mutex<Vec<Job>>);
        impl Offload for Later {
            fn run(&self, job: Job) -> Result<(), Overloaded> {
                self.0.lock().expect("no panic").push(job);
                Ok(())
            }
        }
        let later = Later(Mutex::new(Vec::new()));
        let ran = Arc::new(AtomicBool::new(false));
        let mark = Arc::clone(&ran);
        {
            let mut future = pin!(offload(&later, move || mark.store(true, Ordering::Relaxed)));
            assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        later.0.lock().expect("no panic").drain(..).for_each(|job| job());
        assert!(!ran.load(Ordering::Relaxed));
    }
}
