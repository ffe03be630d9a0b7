//! The threads that slots live on. Each has an executor of glommio's and serves one slot after the other, those of later
//! servers of the process too.
//!
//! glommio 0.9 never frees what wakes an executor, an eventfd and some memory: each task that ends keeps a reference to it,
//! and running an executor makes a task (`destroy` in its `task/raw.rs` frees the task and leaves out its header). So an
//! executor that has ended leaks, and one that is used again does not: what waits here is as much as was ever in use at
//! once. An idle thread waits for work and nothing else; it holds no state of a server.

use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use glommio::{LocalExecutor, LocalExecutorBuilder, Placement, PoolPlacement};

use super::core::Failure;
use crate::panics::caught;
use crate::sys::thread::{rename, try_join};
use crate::sys::{affinity, limits};

/// glommio keeps this much memory registered for direct I/O, which we do not use; it is the least it takes.
const GLOMMIO_IO_MEMORY_BYTES: usize = 64 * 1024;
/// Entries of each of glommio's three rings; they carry file reads, three eventfds and two alarms here.
const GLOMMIO_RING_DEPTH: usize = 64;
/// Large on purpose: with a short one glommio 0.9 can park with runnable work (see ARCHITECTURE.md, "Parking").
const GLOMMIO_PREEMPT: Duration = Duration::from_millis(100);

/// What the kernel counts as locked memory for one executor of glommio's, in bytes: three rings, and the memory for direct
/// I/O once for each of them. It does without the latter where the limit is too low, but takes it where it gets it.
pub(crate) fn locked_bytes() -> u64 {
    let depth = GLOMMIO_RING_DEPTH as u32;
    3 * (limits::ring_bytes(depth, 2 * depth) + limits::whole_pages(GLOMMIO_IO_MEMORY_BYTES as u64))
}

/// What the system calls a thread that waits; 15 bytes is what it takes.
const NAME_IDLE: &str = "ringleader-idle";
/// And glommio's threads, which take it from the thread that makes their executor.
const NAME_GLOMMIO: &str = "ringleader-pool";

/// What the thread is to be left to after its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// The executor has nothing left to do: it may serve another slot.
    Idle,
    /// Something of this work lives on in the executor, or it fell: it ends with its thread.
    Spent,
}

/// What a thread is to do with its executor, or with the reason why it has none.
pub(crate) type Work = Box<dyn FnOnce(Result<&LocalExecutor, Failure>) -> Condition + Send>;

struct Job {
    name: String,
    cpu: usize,
    work: Work,
    /// Told when the thread waits for other work, and dropped without a word when it ends instead.
    done: Sender<()>,
}

/// What the thread is joined by, for whoever has work done by it at last.
type Handle = Arc<Mutex<Option<JoinHandle<()>>>>;

/// A thread at work.
pub(crate) struct Employment {
    done: Receiver<()>,
    thread: Handle,
}

impl Employment {
    /// Joins it when everything of the work is gone and the thread waits for other work, or has ended; `Err` gives back one
    /// that is not so far.
    ///
    /// # Errors
    /// While it works, or is ending.
    pub(crate) fn try_join(self) -> Result<(), Self> {
        match self.done.try_recv() {
            Ok(()) => Ok(()),
            Err(TryRecvError::Empty) => Err(self),
            Err(TryRecvError::Disconnected) => {
                let mut handle = lock(&self.thread);
                *handle = handle.take().and_then(|handle| try_join(handle).err());
                let busy = handle.is_some();
                drop(handle);
                if busy { Err(self) } else { Ok(()) }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread that waits for work.
struct Idle {
    /// What the standard library calls it.
    name: String,
    cpu: usize,
    jobs: Sender<Job>,
    thread: Handle,
}

struct Stock {
    /// The process whose threads these are: a fork has the list, and not the threads.
    process: u32,
    idle: Vec<Idle>,
}

static STOCK: Mutex<Stock> = Mutex::new(Stock { process: 0, idle: Vec::new() });

impl Stock {
    fn with<R>(use_it: impl FnOnce(&mut Vec<Idle>) -> R) -> R {
        let mut stock = lock(&STOCK);
        let process = std::process::id();
        if stock.process != process {
            stock.process = process;
            // Of the parent's threads, which may have held their channels' locks at the moment of the fork.
            mem::forget(mem::take(&mut stock.idle));
        }
        use_it(&mut stock.idle)
    }

    /// The one that waited least of those that suit best: its name is right for ever, and on the same CPU its memory is near.
    fn take(name: &str, cpu: usize) -> Option<Idle> {
        Self::with(|idle| {
            let suits = |(_, thread): &(usize, &Idle)| (thread.name == name, thread.cpu == cpu);
            let best = idle.iter().enumerate().max_by_key(suits).map(|(index, _)| index);
            best.map(|index| idle.remove(index))
        })
    }
}

/// Has `work` done by a thread called `name` that is pinned to `cpu`: by one that waits, or by a new one.
///
/// # Errors
/// When there is none and none can be made.
pub(crate) fn employ(name: String, cpu: usize, work: Work) -> io::Result<Employment> {
    let (tell, done) = mpsc::channel();
    let mut job = Job { name, cpu, work, done: tell };
    while let Some(Idle { jobs, thread, .. }) = Stock::take(&job.name, cpu) {
        match jobs.send(job) {
            Ok(()) => return Ok(Employment { done, thread }),
            // It has ended, which no waiting thread does; there are others.
            Err(back) => job = back.0,
        }
    }
    let thread = Handle::default();
    let its = Arc::clone(&thread);
    let spawned = thread::Builder::new().name(job.name.clone()).spawn(move || live(job, &its))?;
    *lock(&thread) = Some(spawned);
    Ok(Employment { done, thread })
}

/// A thread's life.
fn live(first: Job, this: &Handle) {
    let first_name = first.name.clone();
    rename(NAME_GLOMMIO);
    let executor = match make(first.cpu) {
        Ok(executor) => executor,
        Err(failure) => {
            (first.work)(Err(failure));
            return;
        }
    };
    rename(&first_name);
    let (to_this, jobs) = mpsc::channel();
    let mut ready = Ok(());
    let mut next = Some(first);
    while let Some(Job { name: _, cpu, work, done }) = next.take() {
        let usable = ready.is_ok();
        let executor_or_why = mem::replace(&mut ready, Ok(())).map(|()| &executor);
        // A panic that comes so far is reported by what unwinds.
        let after = catch_unwind(AssertUnwindSafe(|| work(executor_or_why))).map_err(caught);
        if !usable || after.unwrap_or(Condition::Spent) == Condition::Spent {
            drop(executor);
            // Only now: `done` is dropped with the rest.
            return;
        }
        // Before the word that it is done: who hears it and starts the next server is to find this thread waiting.
        rename(NAME_IDLE);
        let (name, jobs_for_it, thread) = (first_name.clone(), to_this.clone(), Arc::clone(this));
        Stock::with(|idle| idle.push(Idle { name, cpu, jobs: jobs_for_it, thread }));
        let _ = done.send(());
        drop(done);
        next = jobs.recv().ok();
        if let Some(job) = &next {
            ready = move_in(job);
        }
    }
}

/// Makes an executor for the calling thread and pins that.
fn make(cpu: usize) -> Result<LocalExecutor, Failure> {
    let builder = LocalExecutorBuilder::new(Placement::Fixed(cpu))
        .io_memory(GLOMMIO_IO_MEMORY_BYTES)
        .ring_depth(GLOMMIO_RING_DEPTH)
        .preempt_timer(GLOMMIO_PREEMPT)
        .blocking_thread_pool_placement(PoolPlacement::Unbound(1));
    let attempt = format!("making glommio's executor for CPU {cpu}");
    match catch_unwind(AssertUnwindSafe(|| builder.make())) {
        Ok(Ok(executor)) => Ok(executor),
        Ok(Err(error)) => {
            let of_system = error.raw_os_error().map(io::Error::from_raw_os_error);
            Err(Failure::of_setup(&attempt, &of_system.unwrap_or_else(|| io::Error::other(error.to_string()))))
        }
        // glommio's way to say that it could not have the thread of its pool.
        Err(payload) => {
            let panic = caught(payload);
            let refused = panic.message.contains("failed to spawn thread");
            let kind = if refused { Failure::NoResources } else { Failure::Start };
            Err(kind(format!("{attempt}: {panic}")))
        }
    }
}

/// Makes the calling thread what the job wants: its CPU and its name. The name that the standard library knows, and says
/// in its message of a panic, stays the first.
fn move_in(job: &Job) -> Result<(), Failure> {
    rename(&job.name);
    let attempt = format!("pinning an executor to CPU {}", job.cpu);
    affinity::run_on(&[job.cpu]).map_err(|error| Failure::of_setup(&attempt, &error))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    type Seen = (thread::ThreadId, usize, String);

    fn look(executor: Result<&LocalExecutor, Failure>) -> Seen {
        let id = executor.expect("it can be made").run(async { glommio::executor().id() });
        let name = fs::read_to_string("/proc/thread-self/comm").expect("/proc is there");
        (thread::current().id(), id, name.trim_end().to_owned())
    }

    fn join(employment: io::Result<Employment>) {
        let mut employment = employment.expect("a thread can be made");
        while let Err(again) = employment.try_join() {
            employment = again;
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Other tests of this process leave threads, too, and take them.
    fn ask(name: &str, cpu: usize, condition: Condition) -> Seen {
        let (tell, told) = mpsc::channel();
        let work: Work = Box::new(move |executor| {
            tell.send(look(executor)).expect("somebody listens");
            condition
        });
        join(employ(name.to_owned(), cpu, work));
        told.recv().expect("it worked")
    }

    fn a_cpu() -> usize {
        affinity::available().allowed[0]
    }

    #[test]
    fn a_thread_bears_the_name_and_lives_on_the_cpu_that_its_work_wants() {
        for cpu in affinity::available().allowed {
            let name = format!("threads-{cpu}");
            let (tell, told) = mpsc::channel();
            let work: Work = Box::new(move |executor| {
                tell.send((look(executor).2, affinity::available().allowed)).expect("somebody listens");
                Condition::Idle
            });
            join(employ(name.clone(), cpu, work));
            assert_eq!(told.recv().expect("it worked"), (name, vec![cpu]));
        }
    }

    #[test]
    fn a_spent_executor_serves_nobody_else() {
        let first = ask("spent", a_cpu(), Condition::Spent);
        for _ in 0..3 {
            let other = ask("after", a_cpu(), Condition::Idle);
            assert_ne!((other.0, other.1), (first.0, first.1));
        }
    }

    #[test]
    fn work_that_panics_is_done_and_its_thread_serves_nobody_else() {
        let (tell, told) = mpsc::channel();
        let work: Work = Box::new(move |executor| {
            tell.send(look(executor).0).expect("somebody listens");
            panic!("a test's")
        });
        join(employ("panics".to_owned(), a_cpu(), work));
        let fallen = told.recv().expect("it began");
        assert_ne!(ask("after", a_cpu(), Condition::Idle).0, fallen);
    }

    #[test]
    fn work_that_cannot_be_pinned_is_told_why() {
        let (tell, told) = mpsc::channel();
        let work: Work = Box::new(move |executor| {
            tell.send(executor.err().map(|failure| format!("{failure:?}"))).expect("somebody listens");
            Condition::Idle
        });
        // More than any Linux has.
        join(employ("nowhere".to_owned(), 8191, work));
        let why = told.recv().expect("it was asked").expect("there is no such CPU");
        assert!(why.contains("CPU 8191"), "{why}");
    }
}
