//! The threads that slots live on. Each has an executor of glommio's and serves one slot after the other, those of later
//! servers of the process too.
//!
//! glommio 0.9 never frees what wakes an executor, an eventfd and some memory: each task that ends keeps a reference to it,
//! and running an executor makes a task (`destroy` in its `task/raw.rs` frees the task and leaves out its header). So an
//! executor that has ended leaks, and one that is used again does not: what waits here is as much as was ever in use at
//! once. An idle thread waits for work and nothing else; it holds no state of a server. One that has waited for long enough
//! ends with its executor, seldom enough for what leaks then never to be much ([`patience`]).

use std::cell::Cell;
use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use glommio::{LocalExecutor, LocalExecutorBuilder, Placement, PoolPlacement};

use super::core::Failure;
use crate::panics::{caught, mark_thread};
use crate::sys::thread::{rename, try_join};
use crate::sys::{affinity, limits, memory};

/// glommio keeps this much memory registered for direct I/O, which we do not use; it is the least it takes.
const GLOMMIO_IO_MEMORY_BYTES: usize = 64 * 1024;
/// Entries of each of glommio's three rings; they carry file reads, three eventfds and six alarms here.
const GLOMMIO_RING_DEPTH: usize = 64;
/// Large on purpose: with a short one glommio 0.9 can park with runnable work (see ARCHITECTURE.md, "Parking").
const GLOMMIO_PREEMPT: Duration = Duration::from_millis(100);

/// How long a thread waits before it has the allocator pass on what its work has left: orders to scale that follow each
/// other are not to pay for it, and those that go at the same time pay once.
const TRIM_AFTER: Duration = Duration::from_secs(1);

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

thread_local! {
    /// User code has left something on this thread that cannot be taken off it.
    static SPOILT: Cell<bool> = const { Cell::new(false) };
}

/// The calling thread is not to serve another server after this one.
pub(crate) fn spoil() {
    SPOILT.set(true);
}

pub(crate) fn is_spoilt() -> bool {
    SPOILT.get()
}

/// What a thread is to do with its executor, or with the reason why it has none.
pub(crate) type Work = Box<dyn FnOnce(Result<&LocalExecutor, Failure>) -> Condition + Send>;

/// What becomes of a thread that has nothing to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leisure {
    /// How long it waits for other work, at the least; see [`patience`].
    pub keep_alive: Duration,
    /// Whether the process's allocator may be asked to give back what was freed.
    pub trim_heap: bool,
}

struct Job {
    name: String,
    cpu: usize,
    leisure: Leisure,
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

/// Executors of this process that have ended: each has left a descriptor behind.
static ENDED: AtomicU64 = AtomicU64::new(0);
/// Something was freed since the allocator was last asked to give back, by threads that wanted it asked.
static TRIM_DUE: AtomicBool = AtomicBool::new(false);

pub(crate) fn ended() -> u64 {
    ENDED.load(Ordering::Relaxed)
}

#[derive(Default)]
struct Stock {
    /// The process whose threads these are: a fork has the list, and not the threads.
    process: u32,
    idle: Vec<Idle>,
    /// Threads that have an executor, waiting or not.
    alive: u64,
    alive_max: u64,
    /// Those that ended because nobody had work for them.
    bored: u64,
}

static STOCK: Mutex<Stock> = Mutex::new(Stock { process: 0, idle: Vec::new(), alive: 0, alive_max: 0, bored: 0 });

/// What a thread that waits is to do next.
enum Wait {
    /// Wait on, for so long.
    On(Duration),
    /// End: it is not on the list any more.
    Over,
    /// Take the work that somebody has for it.
    Called,
}

impl Stock {
    fn with<R>(use_it: impl FnOnce(&mut Self) -> R) -> R {
        let mut stock = lock(&STOCK);
        let process = std::process::id();
        if stock.process != process {
            let parents = mem::replace(&mut *stock, Self { process, ..Self::default() });
            // Of the parent's threads, which may have held their channels' locks at the moment of the fork.
            mem::forget(parents);
        }
        use_it(&mut stock)
    }

    /// The one that waited least of those that suit best: its name is right for ever, and on the same CPU its memory is near.
    fn take(&mut self, name: &str, cpu: usize) -> Option<Idle> {
        let suits = |(_, thread): &(usize, &Idle)| (thread.name == name, thread.cpu == cpu);
        let best = self.idle.iter().enumerate().max_by_key(suits).map(|(index, _)| index);
        best.map(|index| self.idle.remove(index))
    }

    /// Whether `this` thread, which has `waited`, is to go on with it. Who takes a thread off the list decides what
    /// becomes of it, so work that is given out at this very moment meets a thread that lives.
    fn wait_on(&mut self, this: &Handle, waited: Duration, keep_alive: Duration) -> Wait {
        let Some(place) = self.idle.iter().position(|idle| Arc::ptr_eq(&idle.thread, this)) else {
            return Wait::Called;
        };
        let patience = patience(keep_alive, self.bored, self.alive_max);
        if waited < patience {
            return Wait::On(patience - waited);
        }
        self.idle.remove(place);
        self.bored += 1;
        Wait::Over
    }

    fn begin(&mut self) {
        self.alive += 1;
        self.alive_max = self.alive_max.max(self.alive);
    }

    fn end(&mut self) {
        self.alive = self.alive.saturating_sub(1);
        ENDED.fetch_add(1, Ordering::Relaxed);
    }
}

/// How long a thread waits for work before it ends, when `ended` have ended so of no more than `most` at once.
///
/// Each end costs a descriptor and 1.5 KiB for good. A load that comes and goes once in two minutes would have them end and
/// be made for ever, so after as many ends as there were threads all wait twice as long: what is lost grows by the
/// logarithm of time. From a minute on the worst rhythm leaves 19 descriptors per thread in a year, and one more in the next.
fn patience(keep_alive: Duration, ended: u64, most: u64) -> Duration {
    let doublings = u32::try_from(ended / most.max(1)).unwrap_or(u32::MAX);
    keep_alive.saturating_mul(2_u32.saturating_pow(doublings))
}

/// Has `work` done by a thread called `name` that is pinned to `cpu`: by one that waits, or by a new one.
///
/// # Errors
/// When there is none and none can be made.
pub(crate) fn employ(name: String, cpu: usize, leisure: Leisure, work: Work) -> io::Result<Employment> {
    let (tell, done) = mpsc::channel();
    let mut job = Job { name, cpu, leisure, work, done: tell };
    while let Some(Idle { jobs, thread, .. }) = Stock::with(|stock| stock.take(&job.name, cpu)) {
        match jobs.send(job) {
            Ok(()) => return Ok(Employment { done, thread }),
            // It has ended, which no thread on the list does; there are others.
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
    // glommio's panics are told as failures.
    mark_thread();
    rename(NAME_GLOMMIO);
    let executor = match make(first.cpu) {
        Ok(executor) => executor,
        Err(failure) => {
            (first.work)(Err(failure));
            return;
        }
    };
    Stock::with(Stock::begin);
    let (to_this, jobs) = mpsc::channel();
    // Only now, or the pool's thread would be pinned, too.
    let mut ready = move_in(&first);
    let mut trim_heap = first.leisure.trim_heap;
    let mut next = Some(first);
    while let Some(Job { name: _, cpu, leisure, work, done }) = next.take() {
        trim_heap = leisure.trim_heap;
        let usable = ready.is_ok();
        let executor_or_why = mem::replace(&mut ready, Ok(())).map(|()| &executor);
        // A panic that comes so far is reported by what unwinds.
        let after = catch_unwind(AssertUnwindSafe(|| work(executor_or_why))).map_err(caught);
        if !usable || after.unwrap_or(Condition::Spent) == Condition::Spent {
            end(executor, trim_heap);
            // Only now: `done` is dropped with the rest.
            return;
        }
        // Before the word that it is done: who hears it and starts the next server is to find this thread waiting.
        rename(NAME_IDLE);
        let (name, jobs_for_it, thread) = (first_name.clone(), to_this.clone(), Arc::clone(this));
        Stock::with(|stock| stock.idle.push(Idle { name, cpu, jobs: jobs_for_it, thread }));
        let _ = done.send(());
        drop(done);
        next = wait(&jobs, this, leisure);
        if let Some(job) = &next {
            ready = move_in(job);
        }
    }
    end(executor, trim_heap);
}

/// Waits for other work; `None` when it is not worth while any more.
fn wait(jobs: &Receiver<Job>, this: &Handle, leisure: Leisure) -> Option<Job> {
    let since = Instant::now();
    let mut trims = leisure.trim_heap;
    TRIM_DUE.fetch_or(trims, Ordering::Relaxed);
    loop {
        let waited = since.elapsed();
        if trims && waited >= TRIM_AFTER {
            trims = false;
            if TRIM_DUE.swap(false, Ordering::Relaxed) {
                memory::give_back();
            }
        }
        let limit = match Stock::with(|stock| stock.wait_on(this, waited, leisure.keep_alive)) {
            Wait::On(limit) if trims => limit.min(TRIM_AFTER.saturating_sub(waited)),
            Wait::On(limit) => limit,
            Wait::Over => return None,
            Wait::Called => return jobs.recv().ok(),
        };
        match jobs.recv_timeout(limit) {
            Ok(job) => return Some(job),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}

/// The end of an executor, with what glommio has for it.
fn end(executor: LocalExecutor, trim_heap: bool) {
    Stock::with(Stock::end);
    drop(executor);
    if trim_heap {
        memory::give_back();
    }
}

/// Makes an executor for the calling thread. To be pinned by glommio would take a readable /sys, which a sandbox or a
/// chroot may be without: glommio panics there.
fn make(cpu: usize) -> Result<LocalExecutor, Failure> {
    let build = || {
        LocalExecutorBuilder::new(Placement::Unbound)
            .io_memory(GLOMMIO_IO_MEMORY_BYTES)
            .ring_depth(GLOMMIO_RING_DEPTH)
            .preempt_timer(GLOMMIO_PREEMPT)
            .blocking_thread_pool_placement(PoolPlacement::Unbound(1))
            .make()
    };
    let attempt = format!("making glommio's executor for CPU {cpu}");
    match catch_unwind(AssertUnwindSafe(build)) {
        Ok(Ok(executor)) => Ok(executor),
        Ok(Err(error)) => {
            let of_system = error.raw_os_error().map(io::Error::from_raw_os_error);
            Err(Failure::of_setup(&attempt, &of_system.unwrap_or_else(|| io::Error::other(error.to_string()))))
        }
        // glommio's way to say that it could not have the thread of its pool.
        Err(payload) => {
            let panic = caught(payload);
            if panic.message.contains("failed to spawn thread") {
                let attempt = format!("{attempt}: starting the thread of its pool");
                return Err(Failure::of_setup(&attempt, &io::Error::from_raw_os_error(libc::EAGAIN)));
            }
            Err(Failure::Start(format!("{attempt}: {panic}")))
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
    use std::path::Path;

    use super::*;
    use crate::net::ring::tests::alone;

    const PATIENT: Leisure = Leisure { keep_alive: Duration::MAX, trim_heap: false };

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
        join(employ(name.to_owned(), cpu, PATIENT, work));
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
            join(employ(name.clone(), cpu, PATIENT, work));
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
        join(employ("panics".to_owned(), a_cpu(), PATIENT, work));
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
        join(employ("nowhere".to_owned(), 8191, PATIENT, work));
        let why = told.recv().expect("it was asked").expect("there is no such CPU");
        assert!(why.contains("CPU 8191"), "{why}");
    }

    #[test]
    fn a_thread_that_nobody_needs_ends() {
        const IMPATIENT: Leisure = Leisure { keep_alive: Duration::ZERO, trim_heap: true };
        // Work that another test gave the thread before it looks would come with that test's patience.
        if !alone("executor::threads::tests::a_thread_that_nobody_needs_ends") {
            return;
        }
        let (tell, told) = mpsc::channel();
        let work: Work = Box::new(move |executor| {
            let id =
                executor.map(|_| fs::read_link("/proc/thread-self").expect("/proc is there")).expect("it can be made");
            tell.send(id).expect("somebody listens");
            Condition::Idle
        });
        let before = ended();
        join(employ("unwanted".to_owned(), a_cpu(), IMPATIENT, work));
        let task = Path::new("/proc").join(told.recv().expect("it worked"));
        let deadline = Instant::now() + Duration::from_secs(60);
        while task.exists() {
            assert!(Instant::now() < deadline, "{} is still there", task.display());
            thread::sleep(Duration::from_millis(1));
        }
        assert!(ended() > before);
    }

    /// Threads go at the moment at which they are needed again.
    #[test]
    fn work_is_done_whatever_thread_ends_meanwhile() {
        const ROUNDS: usize = 200;
        let employer = |number: usize| {
            for round in 0..ROUNDS {
                let (tell, told) = mpsc::channel();
                let work: Work = Box::new(move |executor| {
                    executor.map(drop).expect("it can be made");
                    tell.send(round).expect("somebody listens");
                    Condition::Idle
                });
                // About as long as it takes to come back with other work.
                let keep_alive = Duration::from_micros((round % 8 * 10) as u64);
                let leisure = Leisure { keep_alive, trim_heap: false };
                join(employ(format!("flap-{number}"), a_cpu(), leisure, work));
                assert_eq!(told.recv(), Ok(round), "it was done");
            }
        };
        thread::scope(|scope| (0..3).for_each(|number| drop(scope.spawn(move || employer(number)))));
    }

    #[test]
    fn what_ended_threads_leave_grows_by_the_logarithm_of_time() {
        const SLOTS: u64 = 8;
        const MINUTE: Duration = Duration::from_secs(60);
        const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);
        // A load that comes and goes: all but one wait for so long, again and again.
        for period in [61, 120, 3600, 24 * 3600, 30 * 24 * 3600].map(Duration::from_secs) {
            let (mut now, mut ended) = (Duration::ZERO, 0);
            while now < YEAR {
                for _ in 1..SLOTS {
                    ended += u64::from(patience(MINUTE, ended, SLOTS) <= period);
                }
                now += period;
            }
            assert!(ended <= 20 * SLOTS, "{ended} with a period of {period:?}");
        }
        // At its worst for each wait: it comes back just after they have gone.
        let (mut now, mut ended) = (Duration::ZERO, 0);
        while now < YEAR {
            now += patience(MINUTE, ended, SLOTS);
            ended += SLOTS - 1;
        }
        assert!(ended <= 20 * SLOTS, "{ended}");
        assert_eq!(patience(Duration::ZERO, ended, SLOTS), Duration::ZERO, "at once is at once");
        assert_eq!(patience(Duration::MAX, 0, SLOTS), Duration::MAX);
    }
}
