//! What everything on one executor shares: the driver, the timers, the tasks, the time. One per generation, never
//! leaves its thread.

use std::cell::{Cell, OnceCell, RefCell, RefMut};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use slab::Slab;

use super::cells::Cells;
use super::directory::{Directory, TaskKey};
use super::inbox::Inbox;
use super::overload::Shedder;
use super::slot::SlotSeat;
use super::states::States;
use super::tasks::{self, LocalFuture, OnPanic, Tasks};
use super::threads;
use crate::blocking::Pool;
use crate::net::driver::Driver;
use crate::net::ring::RingOptions;
use crate::net::wheel::{TimerKey, Wheel};
use crate::panics::escalator::Escalator;
use crate::panics::lines::{Lines, More};
use crate::panics::trace::Trace;
use crate::panics::{Panic, caught};
use crate::settings::{Entered, PanicPolicy, Settings};
use crate::shard_local::Home;
use crate::sys::{limits, memory};

/// Hibernated connections from which on their memory, 8 KiB each, is worth a round through the allocator.
const GIVE_BACK_MIN: u32 = 256;

thread_local! {
    static CURRENT: RefCell<Option<Rc<Core>>> = const { RefCell::new(None) };
}

/// Numbers generations of all executors of the process; 0 is none.
static SERIAL: AtomicU64 = AtomicU64::new(0);

/// Why a generation ends before it is told to.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    /// The start-up closure returned an error, or panicked.
    Start(String),
    /// What an executor is made from could not be had: what was attempted, what the system said, what to do.
    NoResources(String),
    /// A panic got out of everything that contains one, or the policy is not to contain it.
    Panicked(Panic),
    /// Too many panics were contained; the last of them.
    Escalated(Panic),
    /// A background task returned an error.
    Background { name: &'static str, error: String },
}

impl Failure {
    /// Of setting up an executor.
    pub(crate) fn of_setup(attempt: &str, error: &std::io::Error) -> Self {
        match limits::shortage(error) {
            Some(advice) => Self::NoResources(format!("{attempt}: {error}; {advice}")),
            None => Self::Start(format!("{attempt}: {error}")),
        }
    }

    /// Of the start-up closure, which `error` came from. EAGAIN may mean anything there.
    pub(crate) fn of_start_up(what: String, error: &(dyn std::error::Error + 'static)) -> Self {
        let of_system = std::iter::successors(Some(error), |error| error.source())
            .find_map(|error| error.downcast_ref::<std::io::Error>())
            .filter(|error| error.kind() != std::io::ErrorKind::WouldBlock);
        match of_system.and_then(limits::shortage) {
            Some(advice) => Self::NoResources(format!("its start-up failed: {what}; {advice}")),
            None => Self::Start(what),
        }
    }

    /// Of the panic, if there was one and a backtrace was asked for.
    pub(crate) fn backtrace(&self) -> Option<Arc<Trace>> {
        match self {
            Self::Panicked(panic) | Self::Escalated(panic) => panic.backtrace.clone(),
            Self::Start(_) | Self::NoResources(_) | Self::Background { .. } => None,
        }
    }
}

/// Where a panic was caught that cost no more than this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scene {
    Handler,
    ResponseBody,
    /// A connection's task outside of the two above.
    Connection,
    /// A spawned task, which has an owner to tell.
    SpawnedTask,
    /// A value whose last handle was dropped on another thread, as it was dropped here.
    Returned,
    /// A message of another executor, or of whoever else holds its token.
    Message,
    /// The end of a generation: something panicked as it was dropped.
    TearDown,
}

impl Scene {
    fn cost(self) -> &'static str {
        match self {
            Self::Handler => "a request handler panicked, its connection is closed",
            Self::ResponseBody => "a response's body panicked, its connection is broken off",
            Self::Connection => "a connection's task panicked, the connection is broken off",
            Self::SpawnedTask => "a spawned task panicked, it alone has ended",
            Self::Returned => {
                "a value that was let go of on another thread panicked as it was dropped, which costs nothing more"
            }
            Self::Message => "a message from elsewhere panicked, it alone has ended and its caller is told",
            Self::TearDown => "something panicked as it was dropped at its generation's end, which costs nothing more",
        }
    }
}

pub(crate) struct Core {
    /// Process-unique number of this generation.
    pub serial: u64,
    pub slot: u16,
    pub generation: u64,
    pub cells: Arc<Cells>,
    pub settings: Arc<Settings>,
    pub blocking: Arc<Pool>,
    /// Whether the server is fit to take traffic; written by its supervisor.
    pub ready: Arc<AtomicBool>,
    /// Where values come back to that were let go of on other threads: this thread, over all its generations.
    pub home: Arc<Home>,
    pub inbox: Arc<Inbox>,
    /// The other executors of the server.
    pub directory: Arc<Directory>,
    /// What was registered to be built by each executor for itself.
    pub states: States,
    /// Calls from elsewhere that were begun and are not answered yet.
    pub calls: Cell<usize>,
    /// `None` once the generation has been torn down, while something of its user's still holds on to it.
    driver: RefCell<Option<Driver>>,
    wheel: RefCell<Wheel<Waker>>,
    pub tasks: Tasks,
    /// Refuses requests, when a limit of load is set.
    pub shedder: Option<RefCell<Shedder>>,
    now: Cell<Instant>,
    turn: Cell<u64>,
    draining: Cell<Option<Instant>>,
    patience: Cell<Duration>,
    /// Who waits for a drain and is not simply a task of ours.
    drain_watchers: RefCell<Slab<Waker>>,
    /// Open connections on which nothing is under way: they have not spoken, or have been answered.
    pub quiet: Cell<u64>,
    /// Connections that gave their protocol's memory back since the allocator was last asked to pass it on.
    hibernated: Cell<u32>,
    failure: OnceCell<Failure>,
    /// The generation is over, and something of its user's still holds on to it.
    torn_down: Cell<bool>,
    escalator: RefCell<Escalator>,
    lines: RefCell<Lines>,
    /// When `lines` has a count that nobody has told; looked at each turn.
    lines_due: Cell<Option<Instant>>,
}

impl Core {
    /// Of generation `generation` in `seat`.
    ///
    /// # Errors
    /// When the kernel refuses the ring.
    pub(crate) fn new(seat: &SlotSeat, generation: u64) -> std::io::Result<Rc<Self>> {
        let driver = Driver::new(RingOptions::default(), Arc::clone(&seat.sockets))?;
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed) + 1;
        let now = Instant::now();
        let escalator = RefCell::new(Escalator::new(
            seat.settings.escalation,
            seat.settings.escalation_rest,
            seat.escalated.clone(),
        ));
        let core = Rc::new(Self {
            serial,
            slot: seat.slot,
            generation,
            cells: Arc::clone(&seat.cells),
            shedder: Shedder::new(&seat.settings.overload).map(RefCell::new),
            settings: Arc::clone(&seat.settings),
            blocking: Arc::clone(&seat.blocking),
            ready: Arc::clone(&seat.ready),
            home: Home::of_this_thread(&seat.inbox),
            inbox: Arc::clone(&seat.inbox),
            directory: Arc::clone(seat.components.directory()),
            states: States::default(),
            calls: Cell::new(0),
            driver: RefCell::new(Some(driver)),
            wheel: RefCell::new(Wheel::new(now)),
            tasks: Tasks::new(serial, Arc::clone(&seat.inbox)),
            now: Cell::new(now),
            turn: Cell::new(0),
            draining: Cell::new(None),
            patience: Cell::new(Duration::ZERO),
            drain_watchers: RefCell::new(Slab::new()),
            // As many as are worth a round: what the generation before has left is to go as well.
            quiet: Cell::new(0),
            hibernated: Cell::new(GIVE_BACK_MIN),
            failure: OnceCell::new(),
            torn_down: Cell::new(false),
            escalator,
            lines: RefCell::default(),
            lines_due: Cell::new(None),
        });
        CURRENT.set(Some(Rc::clone(&core)));
        Ok(core)
    }

    /// The core of the executor that runs on this thread.
    pub(crate) fn current() -> Option<Rc<Self>> {
        CURRENT.try_with(|current| current.borrow().clone()).ok().flatten()
    }

    /// Serial of the generation that lives on this thread; 0 when there is none.
    pub(crate) fn serial_here() -> u64 {
        let serial = |core: &Option<Rc<Self>>| core.as_ref().map_or(0, |core| core.serial);
        CURRENT.try_with(|current| current.try_borrow().map_or(0, |core| serial(&core))).unwrap_or(0)
    }

    /// Runs `act` on this thread's core when it is generation `serial`; on any other thread, or after that generation's
    /// end, it is not run.
    pub(crate) fn on<R>(serial: u64, act: impl FnOnce(&Core) -> R) -> Option<R> {
        Self::current().filter(|core| core.serial == serial).map(|core| act(&core))
    }

    /// # Panics
    /// After the generation's end.
    pub(crate) fn driver(&self) -> RefMut<'_, Driver> {
        RefMut::map(self.driver.borrow_mut(), |driver| {
            driver.as_mut().expect("the generation of this socket has ended")
        })
    }

    /// The task that is being polled on this thread, if `waker` is its own, and its executor is of the server whose directory
    /// has this number.
    pub(crate) fn task_of(waker: &Waker, directory: u64) -> Option<TaskKey> {
        let core = Self::current().filter(|core| core.directory.number() == directory)?;
        tasks::polled(waker).map(|index| TaskKey { slot: core.slot, index })
    }

    /// The driver, unless the generation has ended.
    pub(crate) fn driver_if_live(&self) -> Option<RefMut<'_, Driver>> {
        RefMut::filter_map(self.driver.borrow_mut(), Option::as_mut).ok()
    }

    /// The time at the start of this turn; within a turn time stands still.
    pub(crate) fn now(&self) -> Instant {
        self.now.get()
    }

    /// Number of this turn.
    pub(crate) fn turn(&self) -> u64 {
        self.turn.get()
    }

    pub(crate) fn begin_turn(&self, now: Instant) {
        self.now.set(now);
        self.turn.set(self.turn.get() + 1);
    }

    /// After the generation's end the future is dropped here and now: nobody would poll it.
    pub(crate) fn spawn(&self, future: LocalFuture, on_panic: OnPanic) {
        if !self.torn_down.get() {
            self.tasks.add(future, on_panic);
        }
    }

    /// Runs a task up to its first wait at once.
    pub(crate) fn spawn_begun(&self, future: LocalFuture) {
        self.tasks.add_begun(future, OnPanic::Contain, |_, panic| self.contained(Scene::Message, panic));
    }

    pub(crate) fn set_timer(&self, deadline: Instant, waker: Waker) -> TimerKey {
        self.wheel.borrow_mut().insert(deadline, waker)
    }

    /// Replaces the waker of a pending timer; false when it has fired.
    pub(crate) fn rewake_timer(&self, key: TimerKey, waker: &Waker) -> bool {
        match self.wheel.borrow_mut().get_mut(key) {
            Some(kept) => {
                kept.clone_from(waker);
                true
            }
            None => false,
        }
    }

    pub(crate) fn cancel_timer(&self, key: TimerKey) {
        let waker = self.wheel.borrow_mut().cancel(key);
        drop(waker);
    }

    /// Wakes those whose time has come.
    pub(crate) fn fire_timers(&self) {
        let mut due = Vec::new();
        self.wheel.borrow_mut().advance(self.now(), |waker| due.push(waker));
        due.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.wheel.borrow().next_deadline()
    }

    /// Since a drain was ordered: when it ends.
    pub(crate) fn draining(&self) -> Option<Instant> {
        self.draining.get()
    }

    /// For how long, during a drain, a client between two requests is waited for.
    pub(crate) fn patience(&self) -> Duration {
        self.patience.get()
    }

    /// Tells every task, connections among them, that the executor drains until `deadline`.
    pub(crate) fn drain(&self, deadline: Instant, patience: Duration) {
        self.draining.set(Some(deadline));
        self.patience.set(patience);
        self.tasks.wake_all();
        let watchers: Vec<Waker> = self.drain_watchers.borrow().iter().map(|(_, waker)| waker.clone()).collect();
        watchers.into_iter().for_each(Waker::wake);
    }

    /// Keeps `waker` for the drain, in its place of an earlier call if there was one; where it is kept.
    pub(crate) fn watch_drain(&self, place: Option<usize>, waker: &Waker) -> usize {
        let mut watchers = self.drain_watchers.borrow_mut();
        match place {
            Some(place) => {
                watchers[place].clone_from(waker);
                place
            }
            None => watchers.insert(waker.clone()),
        }
    }

    pub(crate) fn unwatch_drain(&self, place: usize) {
        let waker = self.drain_watchers.borrow_mut().try_remove(place);
        drop(waker);
    }

    pub(crate) fn note_hibernation(&self) {
        self.hibernated.set(self.hibernated.get() + 1);
    }

    /// To be called when there is nothing to do: passes freed memory on to the system when it is worth the time.
    pub(crate) fn give_memory_back(&self) {
        self.driver().ring().give_memory_back();
        if self.settings.trim_heap && self.hibernated.get() >= GIVE_BACK_MIN {
            self.hibernated.set(0);
            memory::give_back();
        }
    }

    /// Ends the generation with this turn; the first failure counts.
    pub(crate) fn fail(&self, failure: Failure) {
        let _ = self.failure.set(failure);
    }

    pub(crate) fn failure(&self) -> Option<&Failure> {
        self.failure.get()
    }

    /// A panic was caught at `scene`: logs and counts it, and decides whether it was one too many.
    pub(crate) fn contained(&self, scene: Scene, panic: Panic) {
        // Those two have somebody to tell, who decides.
        let told = matches!(scene, Scene::SpawnedTask | Scene::Message);
        if self.settings.panics == PanicPolicy::Restart && !told {
            return self.fail(Failure::Panicked(panic));
        }
        self.cells.panics_contained.add(1);
        if self.escalator.borrow_mut().note(self.now()) {
            return self.fail(Failure::Escalated(panic));
        }
        self.log(scene, &panic);
    }

    /// Logs a panic, unless its place has had its share of lines.
    pub(crate) fn log(&self, scene: Scene, panic: &Panic) {
        let Some(more) = self.may_say(&format!("panics at {}", panic.site())) else { return };
        let (slot, generation, place) = (self.slot, self.generation, panic.place.as_deref());
        tracing::error!(slot, generation, place, "{}: {}{more}", scene.cost(), panic.message);
    }

    /// User code is done for now. Guards of tokio's nest like brackets, and one that a task holds while it waits is open when
    /// ours closes. Nothing is lost by that: ours is inside of it the next time. Its own end is a panic, in its task.
    pub(crate) fn leave_host(&self, host: Entered<'_>) {
        if let Err(payload) = host.leave() {
            threads::spoil();
            let what = "a task holds a guard of tokio's `Handle::enter` while it waits, and will panic when it lets go of \
                        it: hold none over an await (with `Builder::tokio` none is needed)";
            self.log_refusal(what, &caught(payload));
        }
    }

    /// Logs an error that requests are answered with, unless `what` has had its share of lines: who sends them decides how
    /// many there are.
    pub(crate) fn log_refusal(&self, what: &str, error: &dyn fmt::Display) {
        if let Some(more) = self.may_say(what) {
            tracing::error!(slot = self.slot, %error, "{what}{more}");
        }
    }

    /// What to add to a line of this kind, if there may be one: how many before it there were not.
    fn may_say(&self, kind: &str) -> Option<String> {
        let said = self.lines.borrow_mut().note(kind, self.now());
        self.lines_due.set(self.lines.borrow().due());
        said.map(|more| more.map(|more| format!(" ({more})")).unwrap_or_default())
    }

    /// Tells of what got no line, when it is time to.
    pub(crate) fn log_suppressed(&self) {
        let now = self.now();
        if self.lines_due.get().is_some_and(|due| due <= now) {
            let due = self.lines.borrow_mut().take_due(now);
            self.lines_due.set(self.lines.borrow().due());
            self.log_counts(due);
        }
    }

    fn log_counts(&self, counts: Vec<(String, More)>) {
        for (site, more) in counts {
            tracing::error!(slot = self.slot, generation = self.generation, "{site}: {more}");
        }
    }

    /// Ends everything of this generation: tasks first (their streams close their sockets), then the ring. State that was
    /// built before the service goes after it; tasks that its drops spawn go with the others.
    pub(crate) fn tear_down(&self) {
        self.tasks.clear(|panic| self.log(Scene::TearDown, &panic));
        self.states.clear(|panic| self.log(Scene::TearDown, &panic));
        self.torn_down.set(true);
        self.tasks.clear(|panic| self.log(Scene::TearDown, &panic));
        drop(self.wheel.replace(Wheel::new(Instant::now())));
        CURRENT.set(None);
        drop(self.driver.take());
        let rest = self.lines.borrow_mut().take_all(Instant::now());
        self.log_counts(rest);
    }
}
