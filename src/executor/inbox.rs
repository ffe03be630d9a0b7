//! What other threads can put before an executor: orders of the supervisor, jobs, and wakes of its tasks.
//!
//! A busy executor looks at one flag per turn and makes no system call. One that sleeps has said so first; the poster
//! that finds it asleep writes the eventfd, once for however many messages follow.
//!
//! No wake is lost: the poster publishes its message, then reads `asleep`; the executor sets `asleep`, then looks for
//! messages. Both steps are sequentially consistent, so at least one of the two sees the other.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Instant;

use crossbeam_queue::{ArrayQueue, SegQueue};

use crate::executor::core::Core;
use crate::sys::eventfd::EventFd;

/// Jobs that may wait in one inbox; the next one is refused at once ([`Full`]), never waited for: two executors that
/// waited for room in each other's inbox would wait for ever.
pub(crate) const JOBS_MAX: usize = 4096;

/// Something to run on the executor, between two turns.
pub(crate) type Job = Box<dyn FnOnce(&Core) + Send>;

/// An order of the supervisor to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Start this generation.
    Start(u64),
    /// Accept nothing more; finish what is running; whatever is left at the deadline is closed.
    Drain { deadline: Instant },
    /// End the generation now.
    Stop,
    /// End the slot's thread.
    Quit,
}

/// The inbox has [`JOBS_MAX`] jobs waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

pub(crate) struct Inbox {
    /// Few, from the supervisor only: unbounded so that an order cannot be refused.
    orders: SegQueue<Order>,
    jobs: ArrayQueue<Job>,
    /// Tasks woken from other threads; bounded by the number of tasks, for a task is queued once.
    wakes: SegQueue<u32>,
    filled: AtomicBool,
    asleep: AtomicBool,
    eventfd: EventFd,
}

impl Inbox {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            orders: SegQueue::new(),
            jobs: ArrayQueue::new(JOBS_MAX),
            wakes: SegQueue::new(),
            filled: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            eventfd: EventFd::new()?,
        })
    }

    pub(crate) fn order(&self, order: Order) {
        self.orders.push(order);
        self.announce();
    }

    /// # Errors
    /// [`Full`], at once.
    pub(crate) fn post(&self, job: Job) -> Result<(), Full> {
        self.jobs.push(job).map_err(|_| Full)?;
        self.announce();
        Ok(())
    }

    pub(crate) fn wake(&self, task: u32) {
        self.wakes.push(task);
        self.announce();
    }

    fn announce(&self) {
        self.filled.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::AcqRel) {
            self.eventfd.signal();
        }
    }

    /// Whether anything has been put in since [`Inbox::begin`]; one load.
    pub(crate) fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Relaxed)
    }

    /// To be called before emptying the queues: what comes later announces itself anew.
    ///
    /// A swap, not a store: it reads the last announcement it wipes out, so that message is seen by the queues' `pop`.
    pub(crate) fn begin(&self) {
        self.filled.swap(false, Ordering::AcqRel);
    }

    /// Forgets orders that were meant for a thread that has ended.
    pub(crate) fn forget_orders(&self) {
        while self.orders.pop().is_some() {}
    }

    pub(crate) fn next_order(&self) -> Option<Order> {
        self.orders.pop()
    }

    pub(crate) fn next_job(&self) -> Option<Job> {
        self.jobs.pop()
    }

    pub(crate) fn next_wake(&self) -> Option<u32> {
        self.wakes.pop()
    }

    /// Says that the executor is about to sleep; false when it must not, since there is something here.
    pub(crate) fn fall_asleep(&self) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.is_filled() {
            self.asleep.store(false, Ordering::Relaxed);
            return false;
        }
        true
    }

    pub(crate) fn awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
