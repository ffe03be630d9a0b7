//! What everything on one executor shares: the driver, the timers, the tasks, the time. One per generation, never
//! leaves its thread.

use std::cell::{Cell, OnceCell, RefCell, RefMut};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;
use std::time::Instant;

use slab::Slab;

use super::cells::Cells;
use super::overload::Shedder;
use super::slot::SlotSeat;
use super::tasks::{LocalFuture, OnPanic, Tasks};
use crate::net::driver::Driver;
use crate::net::ring::RingOptions;
use crate::net::wheel::{TimerKey, Wheel};
use crate::settings::Settings;
use crate::sys::memory;

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
    /// A panic got out of everything that contains one.
    Panicked(String),
    /// A background task returned an error.
    Background { name: &'static str, error: String },
}

pub(crate) struct Core {
    /// Process-unique number of this generation.
    pub serial: u64,
    pub slot: u16,
    pub generation: u64,
    pub cells: Arc<Cells>,
    pub settings: Arc<Settings>,
    /// `None` once the generation has been torn down, while something of its user's still holds on to it.
    driver: RefCell<Option<Driver>>,
    wheel: RefCell<Wheel<Waker>>,
    pub tasks: Tasks,
    /// Refuses requests, when a limit of load is set.
    pub shedder: Option<RefCell<Shedder>>,
    now: Cell<Instant>,
    turn: Cell<u64>,
    draining: Cell<Option<Instant>>,
    /// Who waits for a drain and is not simply a task of ours.
    drain_watchers: RefCell<Slab<Waker>>,
    /// Connections that gave their protocol's memory back since the allocator was last asked to pass it on.
    hibernated: Cell<u32>,
    failure: OnceCell<Failure>,
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
        let core = Rc::new(Self {
            serial,
            slot: seat.slot,
            generation,
            cells: Arc::clone(&seat.cells),
            shedder: Shedder::new(&seat.settings.overload).map(RefCell::new),
            settings: Arc::clone(&seat.settings),
            driver: RefCell::new(Some(driver)),
            wheel: RefCell::new(Wheel::new(now)),
            tasks: Tasks::new(serial, Arc::clone(&seat.inbox)),
            now: Cell::new(now),
            turn: Cell::new(0),
            draining: Cell::new(None),
            drain_watchers: RefCell::new(Slab::new()),
            hibernated: Cell::new(0),
            failure: OnceCell::new(),
        });
        CURRENT.set(Some(Rc::clone(&core)));
        Ok(core)
    }

    /// The core of the executor that runs on this thread.
    pub(crate) fn current() -> Option<Rc<Self>> {
        CURRENT.try_with(|current| current.borrow().clone()).ok().flatten()
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

    pub(crate) fn spawn(&self, future: LocalFuture, on_panic: OnPanic) {
        self.tasks.add(future, on_panic);
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

    /// Tells every task, connections among them, that the executor drains until `deadline`.
    pub(crate) fn drain(&self, deadline: Instant) {
        self.draining.set(Some(deadline));
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
        if self.hibernated.get() >= GIVE_BACK_MIN {
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

    /// Ends everything of this generation: tasks first (their streams close their sockets), then the ring.
    pub(crate) fn tear_down(&self) {
        self.tasks.clear();
        drop(self.wheel.replace(Wheel::new(Instant::now())));
        CURRENT.set(None);
        drop(self.driver.take());
    }
}
