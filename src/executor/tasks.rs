//! The tasks of a generation: its connections and what was spawned. The generation's main future owns them, so dropping
//! the set drops every one of them; nothing outlives its generation in a run-time's queue.
//!
//! A task's waker is an `Arc<Handle>`: woken on its own executor it costs a flag and a push to a thread-local queue;
//! woken from elsewhere it goes through the inbox. Poll and drop of a task are caught separately: a field whose drop
//! panics after the poll has panicked must not abort the process.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, RawWakerVTable, Wake, Waker};
use std::time::{Duration, Instant};

use slab::Slab;

use super::inbox::Inbox;
use crate::panics::{Panic, caught};
use crate::sys::clock;

/// How long tasks are polled until the kernel is looked at again: one that comes meanwhile waits for so long and not for all
/// that are ready, and a heartbeat is late for a task that does not return, not for many that do. Seastar's default is 0.5 ms;
/// twice that lets 64 connections that are ready together have their answers sent together.
const POLLING_MAX: Duration = Duration::from_millis(1);
/// Tasks polled between two looks at the clock, which costs a hundredth of a short one, while the coarse clock stands still.
const LOOK_EVERY: u32 = 64;

pub(crate) type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

/// What a panic in a task means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnPanic {
    /// It costs this task only.
    Contain,
    /// It ends the generation.
    Escape,
}

thread_local! {
    /// Tasks that are ready on the generation that lives on this thread.
    static READY: Ready = const {
        Ready {
            serial: Cell::new(0),
            queue: RefCell::new(VecDeque::new()),
            sleeper: RefCell::new(None),
            polled: Cell::new(None),
        }
    };
}

struct Ready {
    /// Serial of that generation; 0 when there is none.
    serial: Cell<u64>,
    queue: RefCell<VecDeque<u32>>,
    /// The main future's waker while it sleeps through glommio, whose files wake tasks of ours on this very thread.
    sleeper: RefCell<Option<Waker>>,
    /// The task that is being polled.
    polled: Cell<Option<Polled>>,
}

/// A task by its number and, as addresses, by its waker.
#[derive(Clone, Copy)]
struct Polled {
    index: u32,
    data: *const (),
    functions: *const RawWakerVTable,
}

impl Polled {
    fn new(index: u32, waker: &Waker) -> Self {
        Self { index, data: waker.data(), functions: waker.vtable() }
    }
}

/// The number of the task that is being polled on this thread, if `waker` is its own.
pub(crate) fn polled(waker: &Waker) -> Option<u32> {
    let polled = READY.with(|ready| ready.polled.get())?;
    let own = polled.data == waker.data() && std::ptr::eq(polled.functions, waker.vtable());
    own.then_some(polled.index)
}

/// Wakes the main future of this thread if it sleeps through glommio.
pub(crate) fn rouse() {
    let sleeper = READY.with(|ready| ready.sleeper.borrow_mut().take());
    if let Some(sleeper) = sleeper {
        sleeper.wake();
    }
}

struct Handle {
    index: u32,
    serial: u64,
    queued: AtomicBool,
    inbox: Arc<Inbox>,
}

impl Wake for Handle {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let here = READY.try_with(|ready| ready.serial.get() == self.serial).unwrap_or(false);
        // Elsewhere the swap is needed even when the task is queued already: it publishes what the waker's owner wrote
        // before to the poll that is to come. A load could be done before those writes are seen, and the wake be lost.
        if (here && self.queued.load(Ordering::Relaxed)) || self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        if here {
            READY.with(|ready| {
                ready.queue.borrow_mut().push_back(self.index);
            });
            rouse();
        } else {
            self.inbox.wake(self.index);
        }
    }
}

struct Task {
    future: LocalFuture,
    seat: Seat,
    on_panic: OnPanic,
}

/// A row, and what wakes the task in it.
struct Seat {
    index: u32,
    handle: Arc<Handle>,
    waker: Waker,
}

impl Seat {
    /// Whether nobody can wake the task that was here, but by what is queued already.
    fn is_forgotten(&self) -> bool {
        Arc::strong_count(&self.handle) == OWN_HANDLES
    }
}

/// Those of a seat: one as such, one in its waker.
const OWN_HANDLES: usize = 2;

/// A row is `None` while its task is being polled.
pub(crate) struct Tasks {
    rows: RefCell<Slab<Option<Task>>>,
    /// The seat of the last task that [began](Tasks::add_begun) and ended at once, for the next one.
    spare: Cell<Option<Seat>>,
    /// Of a round that polling was interrupted in: how many it has left.
    left: Cell<usize>,
    clock: Clock,
    serial: u64,
    inbox: Arc<Inbox>,
}

/// When to look at the clock: after each task where they are long.
struct Clock {
    /// Polls between two looks.
    every: Cell<u32>,
    /// Polls until the next; turns go by meanwhile.
    until: Cell<u32>,
    /// What the coarse clock said last. It costs a fifth of a look and moves by milliseconds: enough to see long tasks that
    /// come after many short ones.
    coarse: Cell<Duration>,
}

impl Clock {
    fn new() -> Self {
        Self { every: Cell::new(LOOK_EVERY), until: Cell::new(LOOK_EVERY), coarse: Cell::default() }
    }

    /// Another task has been polled: whether to look.
    fn is_due(&self) -> bool {
        let until = self.until.get() - 1;
        self.until.set(until);
        until == 0
    }

    /// Whether milliseconds have passed since this was asked last.
    fn has_jumped(&self) -> bool {
        let coarse = clock::monotonic_coarse();
        self.coarse.replace(coarse) != coarse
    }

    /// So long have `polls` taken. The next look comes before as many can take too long; later again only by and by, for a few
    /// short ones say little about those that follow.
    fn looked(&self, polls: u32, took: Duration) {
        let most = POLLING_MAX.as_nanos() * u128::from(polls) / took.as_nanos().max(1);
        let every = most.min(u128::from(LOOK_EVERY)) as u32;
        let every = every.min(self.every.get() * 2).max(1);
        self.every.set(every);
        self.until.set(every);
    }
}

impl Tasks {
    /// Makes this thread the home of generation `serial`'s wakes.
    pub(crate) fn new(serial: u64, inbox: Arc<Inbox>) -> Self {
        READY.with(|ready| {
            ready.serial.set(serial);
            ready.queue.borrow_mut().clear();
        });
        Self {
            rows: RefCell::new(Slab::new()),
            spare: Cell::new(None),
            left: Cell::new(0),
            clock: Clock::new(),
            serial,
            inbox,
        }
    }

    /// Adds a task, ready to be polled in the next round.
    pub(crate) fn add(&self, future: LocalFuture, on_panic: OnPanic) {
        let seat = self.seat();
        let (index, waker) = (seat.index, seat.waker.clone());
        self.rows.borrow_mut()[index as usize] = Some(Task { future, seat, on_panic });
        waker.wake();
    }

    /// Adds a task and polls it at once, before those that are ready.
    ///
    /// Most end by that, and wake nobody later: they have one seat in turns, which saves each its allocation and a dozen
    /// atomic additions.
    pub(crate) fn add_begun(&self, future: LocalFuture, on_panic: OnPanic, mut panicked: impl FnMut(OnPanic, Panic)) {
        let seat = self.spare.take().unwrap_or_else(|| self.seat());
        if let Some(seat) = self.poll_task(Task { future, seat, on_panic }, &mut panicked) {
            if seat.is_forgotten() {
                seat.handle.queued.store(false, Ordering::Relaxed);
                let before = self.spare.replace(Some(seat));
                self.leave(before);
            } else {
                self.leave(Some(seat));
            }
        }
    }

    /// A row of its own for a task, empty yet.
    fn seat(&self) -> Seat {
        let index = self.rows.borrow_mut().insert(None) as u32;
        let queued = AtomicBool::new(false);
        let handle = Arc::new(Handle { index, serial: self.serial, queued, inbox: Arc::clone(&self.inbox) });
        Seat { index, waker: Waker::from(Arc::clone(&handle)), handle }
    }

    fn leave(&self, seat: Option<Seat>) {
        if let Some(seat) = seat {
            self.rows.borrow_mut().try_remove(seat.index as usize);
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.rows.borrow().iter().filter(|(_, task)| task.is_some()).count()
    }

    /// Queues tasks that were woken from other threads, before those that are ready: they have waited for this turn
    /// already. In the middle of a round they queue behind, or those that are left might wait for ever.
    pub(crate) fn woken_elsewhere(&self, indexes: impl Iterator<Item = u32>) {
        READY.with(|ready| {
            let mut queue = ready.queue.borrow_mut();
            let before = queue.len();
            queue.extend(indexes);
            if self.is_between_rounds() {
                let added = queue.len() - before;
                queue.rotate_right(added);
            }
        });
    }

    pub(crate) fn wake_all(&self) {
        for (_, task) in self.rows.borrow().iter() {
            if let Some(task) = task {
                task.seat.waker.wake_by_ref();
            }
        }
    }

    /// For a main future that sleeps through glommio: ready when a task is, and woken when one becomes so.
    pub(crate) fn poll_woken(&self, context: &Context<'_>) -> Poll<()> {
        READY.with(|ready| {
            if ready.queue.borrow().is_empty() {
                *ready.sleeper.borrow_mut() = Some(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
    }

    /// The main future is awake.
    pub(crate) fn awake(&self) {
        READY.with(|ready| drop(ready.sleeper.borrow_mut().take()));
    }

    /// Number of tasks that are ready.
    pub(crate) fn ready(&self) -> usize {
        READY.with(|ready| ready.queue.borrow().len())
    }

    /// Whether all that were ready when polling began have been polled.
    pub(crate) fn is_between_rounds(&self) -> bool {
        self.left.get() == 0
    }

    /// Polls tasks that are ready, each once: all that are ready as a round begins, those woken meanwhile in the next. A round
    /// that takes long is interrupted, and gone on with by the next call. `now` is a moment ago. Calls `panicked` for each
    /// panic with what it means.
    pub(crate) fn poll_ready(&self, now: Instant, mut panicked: impl FnMut(OnPanic, Panic)) {
        let count = if self.is_between_rounds() { self.ready() } else { self.left.get() };
        for polled in 1..=count {
            let Some(index) = READY.with(|ready| ready.queue.borrow_mut().pop_front()) else { break };
            self.poll(index, &mut panicked);
            if self.clock.is_due() | self.clock.has_jumped() {
                let took = now.elapsed();
                self.clock.looked(polled as u32, took);
                if took >= POLLING_MAX {
                    return self.left.set(count - polled);
                }
            }
        }
        self.left.set(0);
    }

    fn poll(&self, index: u32, panicked: &mut impl FnMut(OnPanic, Panic)) {
        // A wake may come for a task that has ended, or for its successor in the row: a needless poll at the worst.
        let Some(task) = self.rows.borrow_mut().get_mut(index as usize).and_then(Option::take) else { return };
        task.seat.handle.queued.swap(false, Ordering::AcqRel);
        let seat = self.poll_task(task, panicked);
        self.leave(seat);
    }

    /// Polls a task that is not in its row, and puts it there unless it has ended; then its seat is free.
    fn poll_task(&self, mut task: Task, panicked: &mut impl FnMut(OnPanic, Panic)) -> Option<Seat> {
        let index = task.seat.index;
        let mut context = Context::from_waker(&task.seat.waker);
        let before = READY.with(|ready| ready.polled.replace(Some(Polled::new(index, &task.seat.waker))));
        let polled = catch_unwind(AssertUnwindSafe(|| task.future.as_mut().poll(&mut context)));
        READY.with(|ready| ready.polled.set(before));
        if matches!(polled, Ok(Poll::Pending)) {
            if let Some(row) = self.rows.borrow_mut().get_mut(index as usize) {
                *row = Some(task);
            }
            return None;
        }
        let Task { future, seat, on_panic } = task;
        if let Err(payload) = polled {
            panicked(on_panic, caught(payload));
        }
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(future))) {
            panicked(on_panic, caught(payload));
        }
        Some(seat)
    }

    /// Drops every task; a panic in one's drop costs the others nothing. Calls `panicked` for each.
    pub(crate) fn clear(&self, mut panicked: impl FnMut(Panic)) {
        // A drop may spawn: go on until nothing is left. Spawning is refused to no one here, but each round drops what
        // the one before has added, and a drop that always spawns again is bounded by the rounds.
        for _ in 0..16 {
            // With the rows goes the one that was kept.
            drop(self.spare.take());
            let rows = std::mem::take(&mut *self.rows.borrow_mut());
            if rows.is_empty() {
                break;
            }
            for (_, task) in rows {
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(task))) {
                    panicked(caught(payload));
                }
            }
        }
        READY.with(|ready| {
            ready.serial.set(0);
            ready.queue.borrow_mut().clear();
            drop(ready.sleeper.borrow_mut().take());
        });
    }
}

#[cfg(test)]
mod tests;
