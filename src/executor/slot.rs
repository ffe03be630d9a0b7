//! What a slot's thread does: the outer future in which generations come and go, on glommio's executor. The executor lives
//! longer than the slot, since replacing it leaks an eventfd of glommio's (see `threads`); a generation that fails leaves
//! nothing behind.

use std::future::{Future, poll_fn};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use glommio::LocalExecutor;

use super::accept::Listener;
use super::cells::Cells;
use super::core::{Core, Failure, Scene};
use super::directory::{Asking, AtWork};
use super::generation::{self, Ended};
use super::inbox::{Inbox, Order};
use super::lookout::{Lookout, Presence};
use super::park::Park;
use super::queues;
use super::threads::{self, Condition, Employment, Leisure};
use crate::blocking::Pool;
use crate::net::registry::Registry;
use crate::panics::escalator::Escalated;
use crate::panics::{self, Panic, caught, trace};
use crate::server::Factory;
use crate::server::sharded::Components;
use crate::settings::Settings;
use crate::shard_local::Home;
use crate::sys::cpu_clock::ThreadClock;
use crate::sys::heartbeats::Heartbeat;
use crate::sys::socket;
use crate::sys::stack_sample::ThreadId;
use crate::sys::thread;

/// How long a slot's thread stays awake when its generation has ended: some times what the supervisor takes to answer.
const ORDER_AWAITED: Duration = Duration::from_millis(2);

/// What a slot's thread tells the supervisor.
#[derive(Debug)]
pub(crate) enum Report {
    /// The generation serves.
    Ready { slot: u16, generation: u64 },
    /// The generation has as many connections as it may, or has room again.
    Full { slot: u16, generation: u64, full: bool },
    /// The generation has something to do, and nobody looked at its heartbeat.
    Roused,
    /// The generation has ended and is torn down.
    Ended { slot: u16, generation: u64, ended: Ended },
    /// The thread ends, expected or not: the last report of it. `failure`: it could not be made, or could not be made an
    /// executor.
    ThreadEnded { slot: u16, thread: u32, failure: Option<Failure> },
}

/// Where reports go; called on the slot's thread.
pub(crate) type Reports = Arc<dyn Fn(Report) + Send + Sync>;

/// What is known of a slot's thread from outside.
#[derive(Clone)]
struct Occupant {
    clock: ThreadClock,
    thread: ThreadId,
}

impl Occupant {
    /// `None` if the system does not tell: then a stall of the thread is not noticed.
    fn current() -> Option<Self> {
        let of_thread = || Ok(Self { clock: ThreadClock::current()?, thread: ThreadId::current()? });
        of_thread()
            .inspect_err(|error: &std::io::Error| tracing::warn!(%error, "stalls of an executor will not be noticed"))
            .ok()
    }
}

/// What all slots of a server have in common.
#[derive(Clone)]
pub(crate) struct Common {
    pub settings: Arc<Settings>,
    pub factory: Arc<dyn Factory>,
    pub components: Components,
    pub blocking: Arc<Pool>,
    pub lookout: Arc<Lookout>,
    /// What [`Shard::is_ready`](crate::Shard::is_ready) says.
    pub ready: Arc<AtomicBool>,
    /// Whether connections are accepted: in a process that takes over, once every executor could.
    pub accepting: Arc<AtomicBool>,
}

/// What is permanent about a slot. Shared by the supervisor and the slot's thread.
pub(crate) struct SlotSeat {
    pub slot: u16,
    pub cpu: usize,
    pub settings: Arc<Settings>,
    pub factory: Arc<dyn Factory>,
    pub components: Components,
    pub inbox: Arc<Inbox>,
    pub cells: Arc<Cells>,
    pub heartbeat: Heartbeat,
    pub presence: Presence,
    /// The open sockets of its executor.
    pub sockets: Arc<Registry>,
    pub blocking: Arc<Pool>,
    pub ready: Arc<AtomicBool>,
    pub accepting: Arc<AtomicBool>,
    pub escalated: Escalated,
    pub reports: Reports,
    /// The thread that lives here, once it does.
    occupant: Mutex<Option<Occupant>>,
    /// The slot is another's: the thread that lives here has been given up, and may come back.
    given_up: AtomicBool,
    /// Of the generation that lives here, or lived last.
    asking: Mutex<Option<Arc<Asking>>>,
    /// Closed when the last of supervisor and generation lets go, which is after a drain has begun.
    listeners: Mutex<Held>,
}

/// The listeners of a slot, until the supervisor lets go of them; and then for as long as a generation has them.
#[derive(Clone)]
struct Held {
    ours: Option<Arc<Vec<Listener>>>,
    anybodys: Weak<Vec<Listener>>,
}

impl SlotSeat {
    pub(crate) fn new(
        slot: u16,
        cpu: usize,
        common: Common,
        reports: Reports,
        heartbeat: Heartbeat,
        listeners: Vec<Listener>,
    ) -> std::io::Result<Arc<Self>> {
        let Common { settings, factory, components, blocking, lookout, ready, accepting } = common;
        let listeners = Arc::new(listeners);
        Ok(Arc::new(Self {
            slot,
            cpu,
            settings,
            factory,
            components,
            inbox: Arc::new(Inbox::new()?),
            cells: Arc::new(Cells::default()),
            heartbeat,
            presence: Presence::new(&lookout),
            sockets: Arc::default(),
            blocking,
            ready,
            accepting,
            escalated: Escalated::default(),
            reports,
            occupant: Mutex::new(None),
            given_up: AtomicBool::new(false),
            asking: Mutex::new(None),
            listeners: Mutex::new(Held { anybodys: Arc::downgrade(&listeners), ours: Some(listeners) }),
        }))
    }

    /// A seat for another thread in the place of this one's, which hangs and may come back at any time: it keeps its
    /// inbox and its counters, so that each still has one writer. The new counters go on from the old ones.
    ///
    /// # Errors
    /// When there is no descriptor for an inbox.
    pub(crate) fn replacement(&self) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            slot: self.slot,
            cpu: self.cpu,
            settings: Arc::clone(&self.settings),
            factory: Arc::clone(&self.factory),
            components: self.components.clone(),
            inbox: Arc::new(Inbox::new()?),
            cells: Arc::new(self.cells.successor()),
            heartbeat: self.heartbeat.successor(),
            presence: self.presence.successor(),
            sockets: Arc::default(),
            blocking: Arc::clone(&self.blocking),
            ready: Arc::clone(&self.ready),
            accepting: Arc::clone(&self.accepting),
            escalated: self.escalated.clone(),
            reports: Arc::clone(&self.reports),
            occupant: Mutex::new(None),
            given_up: AtomicBool::new(false),
            asking: Mutex::new(None),
            listeners: Mutex::new(self.held().clone()),
        }))
    }

    /// The slot is another's from here on. Whatever the thread that lives here does once it comes back, it takes nothing
    /// that is the slot's, and nobody waits for it.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
        self.heartbeat.disown();
        let asking = self.asking().take();
        asking.into_iter().for_each(|asking| asking.end());
    }

    /// Whether the slot is another's. It may become so at any instant; to be asked after what may have taken long.
    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// A generation begins here, and asks others whatever it likes.
    pub(super) fn at_work(&self) -> AtWork {
        let at_work = self.components.directory().at_work();
        *self.asking() = Some(at_work.asking());
        // Given up before that, with nothing to take back.
        if self.is_given_up() {
            at_work.asking().end();
        }
        at_work
    }

    fn asking(&self) -> MutexGuard<'_, Option<Arc<Asking>>> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// CPU time used by the thread that lives here; `None` when there is none.
    pub(crate) fn cpu_time(&self) -> Option<Duration> {
        self.occupant().and_then(|occupant| occupant.clock.read().ok())
    }

    /// The thread that lives here, to be sampled; `None` when there is none.
    pub(crate) fn thread(&self) -> Option<ThreadId> {
        self.occupant().map(|occupant| occupant.thread)
    }

    fn occupant(&self) -> Option<Occupant> {
        self.occupant.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn occupy(&self, occupant: Option<Occupant>) {
        *self.occupant.lock().unwrap_or_else(PoisonError::into_inner) = occupant;
    }

    /// The slot's listeners, until the server stops.
    pub(crate) fn listeners(&self) -> Option<Arc<Vec<Listener>>> {
        self.held().ours.clone()
    }

    /// The slot's listeners, if anybody has them still: the supervisor, or a generation that has not emptied their queues.
    pub(crate) fn held_listeners(&self) -> Option<Arc<Vec<Listener>>> {
        self.held().anybodys.upgrade()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of the listeners: a generation that accepts from them still holds on until it has emptied their queues.
    pub(crate) fn release_listeners(&self) {
        self.held().ours.take();
    }

    pub(crate) fn full(&self, generation: u64, full: bool) {
        (self.reports)(Report::Full { slot: self.slot, generation, full });
    }

    /// To be called before something runs that may take its time, when the executor was parked.
    pub(crate) fn rouse(&self) {
        if self.presence.rouse() {
            (self.reports)(Report::Roused);
        }
    }

    pub(crate) fn ready(&self, generation: u64) {
        (self.reports)(Report::Ready { slot: self.slot, generation });
    }
}

/// Gives the slot a thread, its `thread`th; it waits for orders.
///
/// # Errors
/// When no thread can be made.
pub(crate) fn spawn(seat: Arc<SlotSeat>, thread: u32) -> std::io::Result<Employment> {
    let (name, cpu) = (thread::name(&seat.settings.name, &seat.slot), seat.cpu);
    let leisure = Leisure { keep_alive: seat.settings.thread_keep_alive, trim_heap: seat.settings.trim_heap };
    let work = move |executor: Result<&LocalExecutor, Failure>| {
        panics::mark_thread();
        let mut guard = ThreadGuard { seat: Arc::clone(&seat), thread, failure: None };
        seat.occupy(Occupant::current());
        // Busy until `outer` is reached, so that the watchdog sees a first run that glommio loses: sampled for the log, the
        // thread gets a signal, which ends that sleep.
        seat.heartbeat.busy(Instant::now());
        executor.and_then(|executor| execute(&seat, executor)).unwrap_or_else(|failure| {
            guard.failure = Some(failure);
            Condition::Spent
        })
    };
    threads::employ(name, cpu, leisure, Box::new(work))
}

/// Tells the supervisor of the thread's end, whatever brought it about.
struct ThreadGuard {
    seat: Arc<SlotSeat>,
    thread: u32,
    failure: Option<Failure>,
}

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        // Whatever ended the thread: nobody is to wait for its answers.
        let seat = &self.seat;
        if std::thread::panicking() {
            tracing::error!(slot = seat.slot, thread = self.thread, "an executor's thread ends in a panic");
        }
        seat.inbox.close();
        seat.occupy(None);
        seat.heartbeat.asleep();
        leave_home(seat);
        let (slot, thread, failure) = (seat.slot, self.thread, self.failure.take());
        (seat.reports)(Report::ThreadEnded { slot, thread, failure });
    }
}

/// Fails where there is not even an executor for generations to live in.
fn execute(seat: &SlotSeat, executor: &LocalExecutor) -> Result<Condition, Failure> {
    if let Err(error) = socket::block_sigpipe(true) {
        tracing::warn!(slot = seat.slot, %error, "SIGPIPE is not blocked on an executor; harmless while the program ignores it");
    }
    // It stays ours: glommio never drops a task that waits, and when a panic gets out of it nothing else of it either.
    let mut outer = Box::pin(outer(seat));
    let mut polls = 0;
    let counted = poll_fn(|context| {
        if polls == 0 {
            // Taken, and with that set to zero.
            let _ = glommio::executor().executor_stats();
        }
        polls += 1;
        outer.as_mut().poll(context)
    });
    match catch_unwind(AssertUnwindSafe(|| executor.run(counted))) {
        Ok(ended) => ended?,
        Err(payload) => {
            report_fall(seat, &caught(payload));
            queues::abandon();
            take_down(outer);
            return Ok(Condition::Spent);
        }
    }
    // What an embedder has put on glommio's queues cannot be taken off them, nor can the queues, and neither is to go on in
    // another server.
    let executed = executor.run(async { glommio::executor().executor_stats().tasks_executed() });
    Ok(if executed == polls && !queues::made() && !threads::is_spoilt() { Condition::Idle } else { Condition::Spent })
}

/// A panic of a task that the embedder gave to glommio, or of glommio's own. Those of ours are caught before they get here.
fn report_fall(seat: &SlotSeat, panic: &Panic) {
    let (slot, generation, place) = (seat.slot, seat.cells.generation.get(), panic.place.as_deref());
    tracing::error!(
        slot,
        generation,
        place,
        "a task on one of glommio's queues panicked, which ends the executor with its thread: {}; its connections are \
         closed, and tasks that waited on glommio's queues are lost without being dropped",
        panic.message
    );
    if let Some(backtrace) = &panic.backtrace {
        trace::log_apart(Arc::clone(backtrace));
    }
}

/// Does what the end of a generation would have done.
fn take_down<F>(outer: F) {
    let core = Core::current();
    if let Some(core) = &core {
        core.tasks.clear(|panic| core.log(Scene::TearDown, &panic));
    }
    // The generation's own part, with the service and the acceptor; then the eventfds.
    let dropped = catch_unwind(AssertUnwindSafe(|| drop(outer))).map_err(caught);
    if let Some(core) = &core {
        dropped.unwrap_or_else(|panic| core.log(Scene::TearDown, &panic));
        core.tear_down();
    }
}

async fn outer(seat: &SlotSeat) -> Result<(), Failure> {
    seat.heartbeat.asleep();
    let mut park = Park::new(seat.inbox.as_fd())
        .map_err(|error| Failure::of_setup("making the eventfds and timers of an executor", &error))?;
    loop {
        seat.inbox.begin();
        match seat.inbox.next_order() {
            Some(Order::Start(number)) => {
                // What came after the order to start is the generation's: `begin` has wiped out its announcement.
                seat.inbox.look_again();
                let ended = generation::run(seat, number, &mut park).await;
                // Before the report, after which the supervisor may open it for the next one.
                seat.inbox.close();
                (seat.reports)(Report::Ended { slot: seat.slot, generation: number, ended });
                await_order(seat);
            }
            Some(Order::Quit) => break,
            // There is no generation to drain or stop.
            Some(Order::Accept | Order::Drain { .. } | Order::Stop) => {}
            None => {
                // Jobs are left alone: those that are here came after the inbox was opened for the next generation.
                while seat.inbox.next_wake().is_some() {}
                take_back(seat);
                if seat.inbox.fall_asleep() {
                    park.wait(Duration::from_secs(1), |_| Poll::Pending).await;
                    seat.inbox.awake();
                }
            }
        }
    }
    park.close().await;
    Ok(())
}

/// Drops values of earlier generations that other threads have let go of by now.
fn take_back(seat: &SlotSeat) {
    if let Some(home) = Home::here() {
        home.take_back(|panic| {
            let (slot, place) = (seat.slot, panic.place.as_deref());
            tracing::error!(
                slot,
                place,
                "a value of an earlier generation panicked as it was dropped: {}",
                panic.message
            );
        });
    }
}

/// At the end of the slot's life on this thread: whatever has not come home by now never will.
fn leave_home(seat: &SlotSeat) {
    take_back(seat);
    let left = Home::leave().map_or(0, |home| home.alive());
    if left > 0 {
        seat.cells.values_leaked.add(left);
        tracing::warn!(
            slot = seat.slot,
            "{left} values of this executor are still held elsewhere as it ends, and will never be dropped"
        );
    }
}

/// Stays awake for the supervisor's answer, which mostly is another generation at once: on a busy CPU, going to sleep and
/// being woken takes longer than all the rest of a restart.
fn await_order(seat: &SlotSeat) {
    let until = Instant::now() + ORDER_AWAITED;
    while !seat.inbox.is_filled() && Instant::now() < until {
        std::thread::yield_now();
    }
}
