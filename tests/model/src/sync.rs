//! Stand-ins for `src/sync.rs`. Atomics and locks are loom's. The queues are written here, as crossbeam's know nothing of
//! loom: the algorithm and the memory orderings of its `ArrayQueue`, with room for few.
//!
//! A defect can be put in, to see that the models find it.

use std::cell::Cell;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{self, Ordering::*};
use loom::thread::yield_now;

pub use loom::sync::atomic::Ordering;
pub use loom::sync::{Mutex, MutexGuard, RwLock};

/// How many jobs the inbox of a model takes, in place of 4,096.
pub const ROOM: usize = 2;

/// What is wrong with the word that the inbox says everything in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    None,
    /// It orders nothing: every ordering is `Relaxed`.
    Unordered,
    /// No fence is made beside it.
    Unfenced,
    /// The executor looks at it, and only then says that it sleeps; posters look, and only then announce.
    TwoSteps,
}

thread_local! {
    /// All threads of a model run on the one that checks it.
    static DEFECT: Cell<Defect> = const { Cell::new(Defect::None) };
}

/// Runs `model`, with `defect` in it, through every interleaving with at most two preemptions, or as many as the variable
/// LOOM_MAX_PREEMPTIONS says. Each more takes about eight times as long; few defects need a third.
///
/// # Panics
/// When one of them fails, or leaves a thread that waits for ever.
pub fn check(defect: Defect, model: impl Fn() + Sync + Send + 'static) {
    DEFECT.set(defect);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(PREEMPTIONS));
    builder.max_branches = 10_000;
    let runs = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = std::sync::Arc::clone(&runs);
    builder.check(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    println!("{} interleavings", runs.load(std::sync::atomic::Ordering::Relaxed));
}

const PREEMPTIONS: usize = 2;

pub fn fence(order: Ordering) {
    if !matches!(DEFECT.get(), Defect::Unordered | Defect::Unfenced) {
        atomic::fence(order);
    }
}

/// The word of the inbox, with the defect in it.
#[derive(Debug)]
pub struct AtomicUsize(atomic::AtomicUsize);

impl AtomicUsize {
    pub fn new(value: usize) -> Self {
        Self(atomic::AtomicUsize::new(value))
    }

    fn order(order: Ordering) -> Ordering {
        if DEFECT.get() == Defect::Unordered { Relaxed } else { order }
    }

    pub fn load(&self, order: Ordering) -> usize {
        self.0.load(Self::order(order))
    }

    pub fn store(&self, value: usize, order: Ordering) {
        self.0.store(value, Self::order(order));
    }

    pub fn swap(&self, value: usize, order: Ordering) -> usize {
        self.0.swap(value, Self::order(order))
    }

    pub fn fetch_add(&self, more: usize, order: Ordering) -> usize {
        match DEFECT.get() {
            Defect::TwoSteps => self.in_two_steps(|value| value + more),
            _ => self.0.fetch_add(more, Self::order(order)),
        }
    }

    pub fn fetch_or(&self, bits: usize, order: Ordering) -> usize {
        match DEFECT.get() {
            Defect::TwoSteps => self.in_two_steps(|value| value | bits),
            _ => self.0.fetch_or(bits, Self::order(order)),
        }
    }

    pub fn fetch_and(&self, bits: usize, order: Ordering) -> usize {
        match DEFECT.get() {
            Defect::TwoSteps => self.in_two_steps(|value| value & bits),
            _ => self.0.fetch_and(bits, Self::order(order)),
        }
    }

    pub fn fetch_update<F>(&self, set: Ordering, fetch: Ordering, mut change: F) -> Result<usize, usize>
    where
        F: FnMut(usize) -> Option<usize>,
    {
        if DEFECT.get() != Defect::TwoSteps {
            return self.0.fetch_update(Self::order(set), Self::order(fetch), change);
        }
        let before = self.0.load(Acquire);
        self.0.store(change(before).ok_or(before)?, Release);
        Ok(before)
    }

    fn in_two_steps(&self, change: impl FnOnce(usize) -> usize) -> usize {
        let before = self.0.load(Acquire);
        self.0.store(change(before), Release);
        before
    }
}

/// Both of crossbeam's.
pub struct ArrayQueue<T> {
    slots: Vec<Slot<T>>,
    /// Where to pop: a slot's index, and above it how often the end has been passed.
    head: atomic::AtomicUsize,
    tail: atomic::AtomicUsize,
    lap: usize,
}

struct Slot<T> {
    /// Equal to the tail when it may be filled, one more than the head when it may be emptied.
    stamp: atomic::AtomicUsize,
    value: UnsafeCell<Option<T>>,
}

// As crossbeam's: `stamp` says who may touch `value`, and loom's cell sees to it that nobody else does.
unsafe impl<T: Send> Send for ArrayQueue<T> {}
unsafe impl<T: Send> Sync for ArrayQueue<T> {}

impl<T> ArrayQueue<T> {
    pub fn new(room: usize) -> Self {
        let room = room.min(ROOM);
        let slot = |stamp| Slot { stamp: atomic::AtomicUsize::new(stamp), value: UnsafeCell::new(None) };
        Self {
            slots: (0..room).map(slot).collect(),
            head: atomic::AtomicUsize::new(0),
            tail: atomic::AtomicUsize::new(0),
            lap: (room + 1).next_power_of_two(),
        }
    }

    fn after(&self, place: usize) -> usize {
        let (index, lap) = (place & (self.lap - 1), place & !(self.lap - 1));
        if index + 1 < self.slots.len() { place + 1 } else { lap + self.lap }
    }

    fn slot(&self, place: usize) -> &Slot<T> {
        &self.slots[place & (self.lap - 1)]
    }

    pub fn push(&self, value: T) -> Result<(), T> {
        let mut tail = self.tail.load(Relaxed);
        loop {
            let slot = self.slot(tail);
            let stamp = slot.stamp.load(Acquire);
            if tail == stamp {
                match self.tail.compare_exchange_weak(tail, self.after(tail), SeqCst, Relaxed) {
                    Ok(_) => {
                        slot.value.with_mut(|place| unsafe { *place = Some(value) });
                        slot.stamp.store(tail + 1, Release);
                        return Ok(());
                    }
                    Err(now) => tail = now,
                }
            } else if stamp + self.lap == tail + 1 {
                atomic::fence(SeqCst);
                if self.head.load(Relaxed) + self.lap == tail {
                    return Err(value);
                }
                yield_now();
                tail = self.tail.load(Relaxed);
            } else {
                yield_now();
                tail = self.tail.load(Relaxed);
            }
        }
    }

    pub fn pop(&self) -> Option<T> {
        let mut head = self.head.load(Relaxed);
        loop {
            let slot = self.slot(head);
            let stamp = slot.stamp.load(Acquire);
            if head + 1 == stamp {
                match self.head.compare_exchange_weak(head, self.after(head), SeqCst, Relaxed) {
                    Ok(_) => {
                        let value = slot.value.with_mut(|place| unsafe { (*place).take() });
                        slot.stamp.store(head + self.lap, Release);
                        return value;
                    }
                    Err(now) => head = now,
                }
            } else if stamp == head {
                atomic::fence(SeqCst);
                if self.tail.load(Relaxed) == head {
                    return None;
                }
                yield_now();
                head = self.head.load(Relaxed);
            } else {
                yield_now();
                head = self.head.load(Relaxed);
            }
        }
    }

    pub fn len(&self) -> usize {
        loop {
            let (tail, head) = (self.tail.load(SeqCst), self.head.load(SeqCst));
            if self.tail.load(SeqCst) == tail {
                let (first, end) = (head & (self.lap - 1), tail & (self.lap - 1));
                return match end.cmp(&first) {
                    std::cmp::Ordering::Greater => end - first,
                    std::cmp::Ordering::Less => self.slots.len() - first + end,
                    std::cmp::Ordering::Equal if tail == head => 0,
                    std::cmp::Ordering::Equal => self.slots.len(),
                };
            }
        }
    }
}

/// Bounded here; no model fills it.
pub struct SegQueue<T>(ArrayQueue<T>);

impl<T> SegQueue<T> {
    pub fn new() -> Self {
        Self(ArrayQueue::new(usize::MAX))
    }

    pub fn push(&self, value: T) {
        assert!(self.0.push(value).is_ok(), "a model puts no more than {ROOM} into an unbounded queue");
    }

    pub fn pop(&self) -> Option<T> {
        self.0.pop()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}
