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

/// How long tasks are polled until the kernel is looked at again: one that comes meanwhile waits for so long and not for all
/// that are ready, and a heartbeat is late for a task that does not return, not for many that do. Seastar's default is 0.5 ms;
/// twice that lets 64 connections that are ready together have their answers sent together.
const POLLING_MAX: Duration = Duration::from_millis(1);
/// Tasks polled between two looks at the clock, which costs a hundredth of a short one.
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
}

impl Clock {
    fn new() -> Self {
        Self { every: Cell::new(LOOK_EVERY), until: Cell::new(LOOK_EVERY) }
    }

    /// Another task has been polled: whether to look.
    fn is_due(&self) -> bool {
        let until = self.until.get() - 1;
        self.until.set(until);
        until == 0
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
            if self.clock.is_due() {
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
mod tests {
    use std::future::poll_fn;
    use std::rc::Rc;
    use std::sync::atomic::AtomicU64;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::net::ring::tests::Watchdog;

    fn tasks() -> (Tasks, Arc<Inbox>) {
        let inbox = Arc::new(Inbox::new().expect("an eventfd"));
        (Tasks::new(1, Arc::clone(&inbox)), inbox)
    }

    fn take_in(tasks: &Tasks, inbox: &Inbox) {
        inbox.begin();
        tasks.woken_elsewhere(std::iter::from_fn(|| inbox.next_wake()));
    }

    fn poll(tasks: &Tasks) -> Vec<(OnPanic, String)> {
        let mut panics = Vec::new();
        tasks.poll_ready(Instant::now(), |on_panic, panic| panics.push((on_panic, panic.message)));
        panics
    }

    /// A task that hands its waker over at its first poll and counts all of them.
    fn waiting(tasks: &Tasks) -> (Waker, Rc<Cell<u32>>) {
        let (place, polls) = (Rc::new(RefCell::new(None)), Rc::new(Cell::new(0)));
        let (out, count) = (Rc::clone(&place), Rc::clone(&polls));
        let future = poll_fn(move |context| {
            *out.borrow_mut() = Some(context.waker().clone());
            count.set(count.get() + 1);
            Poll::Pending
        });
        tasks.add(Box::pin(future), OnPanic::Contain);
        poll(tasks);
        let waker = place.borrow_mut().take().expect("it has been polled");
        (waker, polls)
    }

    struct Bomb(Rc<Cell<u32>>);

    impl Drop for Bomb {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
            panic!("drop");
        }
    }

    #[test]
    fn a_storm_of_wakes_is_one_poll() {
        let (tasks, inbox) = tasks();
        let (waker, polls) = waiting(&tasks);
        (0..10_000).for_each(|_| waker.wake_by_ref());
        let elsewhere = waker.clone();
        std::thread::spawn(move || (0..10_000).for_each(|_| elsewhere.wake_by_ref())).join().expect("no panic");
        take_in(&tasks, &inbox);
        assert_eq!(tasks.ready(), 1);
        poll(&tasks);
        assert_eq!((polls.get(), tasks.ready()), (2, 0));
    }

    #[test]
    fn a_wake_from_another_thread_comes_through_the_inbox() {
        let (tasks, inbox) = tasks();
        let (waker, polls) = waiting(&tasks);
        std::thread::spawn(move || waker.wake()).join().expect("no panic");
        assert!(inbox.is_filled() && tasks.ready() == 0);
        take_in(&tasks, &inbox);
        poll(&tasks);
        assert_eq!(polls.get(), 2);
    }

    /// Tasks that take this long whenever they are polled, and the order of the polls.
    fn slow(tasks: &Tasks, number: u32, takes: Duration, polls: &Rc<RefCell<Vec<u32>>>) {
        let polls = Rc::clone(polls);
        let future = poll_fn(move |context| {
            let until = Instant::now() + takes;
            while Instant::now() < until {}
            polls.borrow_mut().push(number);
            context.waker().wake_by_ref();
            Poll::Pending
        });
        tasks.add(Box::pin(future), OnPanic::Contain);
    }

    #[test]
    fn a_round_of_long_tasks_is_interrupted_after_each_and_polls_every_one_once() {
        let (tasks, _) = tasks();
        let polls = Rc::new(RefCell::new(Vec::new()));
        // What begins with short tasks needs some polls to learn.
        (0..3).for_each(|number| slow(&tasks, number, 2 * POLLING_MAX, &polls));
        (0..LOOK_EVERY).for_each(|_| drop(poll(&tasks)));
        while !tasks.is_between_rounds() {
            poll(&tasks);
        }
        polls.borrow_mut().clear();
        for polled in 1..=6 {
            poll(&tasks);
            assert_eq!((polls.borrow().len(), tasks.ready()), (polled, 3));
            assert_eq!(tasks.is_between_rounds(), polled % 3 == 0);
        }
        assert_eq!(*polls.borrow(), [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn wakes_from_elsewhere_do_not_keep_an_interrupted_round_from_its_end() {
        let (tasks, inbox) = tasks();
        let (waker, _) = waiting(&tasks);
        let polls = Rc::new(RefCell::new(Vec::new()));
        (0..3).for_each(|number| slow(&tasks, number, 2 * POLLING_MAX, &polls));
        (0..2 * LOOK_EVERY).for_each(|_| drop(poll(&tasks)));
        polls.borrow_mut().clear();
        // Longer than a round: each finds one from elsewhere that wants to be the first.
        for _ in 0..8 {
            let elsewhere = waker.clone();
            std::thread::spawn(move || elsewhere.wake()).join().expect("no panic");
            take_in(&tasks, &inbox);
            poll(&tasks);
        }
        let seen = polls.borrow();
        assert!((0..3).all(|number| seen.contains(&number)), "{seen:?}");
    }

    #[test]
    fn the_clock_is_read_as_rarely_as_tasks_are_short() {
        let clock = Clock::new();
        let looks = |polls: u32| (0..polls).filter(|_| clock.is_due()).count();
        assert_eq!(looks(LOOK_EVERY), 1);
        clock.looked(LOOK_EVERY, POLLING_MAX * LOOK_EVERY);
        assert_eq!(looks(1), 1, "each took as long as all may");
        for every in [2, 4, 8, 16, 32, 64, 64] {
            clock.looked(1, Duration::from_micros(5));
            assert_eq!((looks(every - 1), looks(1)), (0, 1));
        }
        clock.looked(1, Duration::ZERO);
        assert_eq!((looks(LOOK_EVERY - 1), looks(1)), (0, 1));
    }

    #[test]
    fn a_wake_after_the_end_harms_nobody() {
        let (tasks, _) = tasks();
        let place = Rc::new(RefCell::new(None));
        let out = Rc::clone(&place);
        let ends = poll_fn(move |context| {
            *out.borrow_mut() = Some(context.waker().clone());
            Poll::Ready(())
        });
        tasks.add(Box::pin(ends), OnPanic::Contain);
        poll(&tasks);
        assert_eq!(tasks.len(), 0);
        let (_, polls) = waiting(&tasks);
        // The row is another task's by now: a needless poll is all it gets.
        place.borrow_mut().take().expect("polled").wake();
        poll(&tasks);
        assert_eq!((polls.get(), tasks.len()), (2, 1));
    }

    /// Begins a task that ends at once, and leaves its waker in `kept` if it `keeps` it. What it saw of its number.
    fn begun(tasks: &Tasks, kept: &Rc<RefCell<Vec<Waker>>>, keeps: bool) -> Option<u32> {
        let seen = Rc::new(Cell::new(None));
        let (out, place) = (Rc::clone(&seen), Rc::clone(kept));
        let ends = poll_fn(move |context| {
            out.set(polled(context.waker()));
            assert_eq!(polled(Waker::noop()), None, "another waker is not the task's");
            if keeps {
                place.borrow_mut().push(context.waker().clone());
            }
            Poll::Ready(())
        });
        tasks.add_begun(Box::pin(ends), OnPanic::Contain, |_, panic| panic!("{}", panic.message));
        seen.get()
    }

    #[test]
    fn tasks_that_end_at_once_have_one_seat_in_turns_unless_they_may_be_woken_later() {
        let (tasks, _) = tasks();
        let kept = Rc::default();
        let first = begun(&tasks, &kept, false);
        assert!(first.is_some());
        assert_eq!(begun(&tasks, &kept, false), first);
        (0..3).for_each(|_| assert!(begun(&tasks, &kept, true).is_some()));
        let wakers = kept.borrow();
        for (at, waker) in wakers.iter().enumerate() {
            assert!(!wakers[..at].iter().any(|earlier| earlier.will_wake(waker)), "each has its own");
        }
        let (_, polls) = waiting(&tasks);
        wakers.iter().for_each(Waker::wake_by_ref);
        poll(&tasks);
        assert!(polls.get() <= 1 + wakers.len() as u32 && tasks.len() == 1, "needless polls at the worst");
    }

    #[test]
    fn a_wake_after_the_generations_end_does_not_reach_the_next_ones_queue() {
        let (tasks, inbox) = tasks();
        let (waker, _) = waiting(&tasks);
        tasks.clear(|_| ());
        let next = Tasks::new(2, Arc::clone(&inbox));
        waker.wake();
        assert_eq!(next.ready(), 0);
        take_in(&next, &inbox);
        assert!(poll(&next).is_empty());
    }

    #[test]
    fn panics_in_poll_and_then_in_drop_are_both_caught() {
        let (tasks, _) = tasks();
        let dropped = Rc::new(Cell::new(0));
        let bomb = Bomb(Rc::clone(&dropped));
        let future = poll_fn(move |_| {
            let _held = &bomb;
            panic!("poll")
        });
        tasks.add(Box::pin(future), OnPanic::Escape);
        let (_, polls) = waiting(&tasks);
        assert_eq!((dropped.get(), polls.get(), tasks.len()), (1, 1, 1));
        let bomb = Bomb(Rc::clone(&dropped));
        let future = poll_fn(move |_| {
            let _held = &bomb;
            panic!("poll {}", 2)
        });
        tasks.add(Box::pin(future), OnPanic::Escape);
        let panics = poll(&tasks);
        assert_eq!(panics, [(OnPanic::Escape, "poll 2".to_owned()), (OnPanic::Escape, "drop".to_owned())]);
        assert_eq!(tasks.len(), 1);
    }

    #[test]
    fn clear_drops_every_task_although_drops_panic_and_spawn() {
        let (tasks, _) = tasks();
        let tasks = Rc::new(tasks);
        let dropped = Rc::new(Cell::new(0));
        struct Spawns(Rc<Tasks>, Rc<Cell<u32>>);
        impl Drop for Spawns {
            fn drop(&mut self) {
                let bomb = Bomb(Rc::clone(&self.1));
                self.0.add(Box::pin(async move { drop(bomb) }), OnPanic::Contain);
            }
        }
        for _ in 0..10 {
            let bomb = Bomb(Rc::clone(&dropped));
            tasks.add(Box::pin(async move { drop(bomb) }), OnPanic::Contain);
            let spawns = Spawns(Rc::clone(&tasks), Rc::clone(&dropped));
            tasks.add(Box::pin(async move { drop(spawns) }), OnPanic::Contain);
        }
        let mut panics = 0;
        tasks.clear(|_| panics += 1);
        assert_eq!((dropped.get(), panics, tasks.len(), tasks.ready()), (20, 20, 0, 0));
    }

    /// What is written before a wake from another thread is seen by the poll that follows, also when the task was
    /// queued already: the last write of each round has no second wake to make up for it.
    #[test]
    fn what_was_written_before_a_wake_is_seen() {
        const ROUNDS: u64 = 50_000;
        let _watchdog = Watchdog::new("a wake whose write was not seen".to_owned(), Duration::from_secs(300));
        let (tasks, inbox) = tasks();
        let (written, seen) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (give, take) = mpsc::channel();
        let (source, sink) = (Arc::clone(&written), Arc::clone(&seen));
        let future = poll_fn(move |context| {
            let value = source.load(Ordering::Relaxed);
            if value == 0 {
                let _ = give.send(context.waker().clone());
            }
            sink.store(value, Ordering::Relaxed);
            if value == 2 * ROUNDS { Poll::Ready(()) } else { Poll::Pending }
        });
        tasks.add(Box::pin(future), OnPanic::Contain);
        poll(&tasks);
        let writer = std::thread::spawn(move || {
            let waker: Waker = take.recv().expect("the task's first poll");
            drop(take);
            for round in 1..=ROUNDS {
                // The first wake queues the task; the second falls anywhere into its poll.
                for write in [2 * round - 1, 2 * round] {
                    written.store(write, Ordering::Relaxed);
                    waker.wake_by_ref();
                }
                let mut spins = 0_u32;
                while seen.load(Ordering::Relaxed) != 2 * round {
                    spins += 1;
                    // The other thread may want this CPU.
                    if spins.is_multiple_of(1000) { std::thread::yield_now() } else { std::hint::spin_loop() }
                }
            }
        });
        while tasks.len() > 0 {
            if inbox.is_filled() {
                take_in(&tasks, &inbox);
                poll(&tasks);
            } else {
                std::thread::yield_now();
            }
        }
        writer.join().expect("no panic");
    }
}
