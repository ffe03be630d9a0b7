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
use std::task::{Context, Poll, Wake, Waker};

use slab::Slab;

use super::inbox::Inbox;

pub(crate) type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

/// What a panic in a task means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnPanic {
    /// It costs this task only.
    Contain,
    /// It ends the generation.
    Escape,
}

/// A caught panic's message, as far as it can be had without a hook.
pub(crate) type Panic = String;

thread_local! {
    /// Tasks that are ready on the generation that lives on this thread.
    static READY: Ready = const { Ready { serial: Cell::new(0), queue: RefCell::new(VecDeque::new()) } };
}

struct Ready {
    /// Serial of that generation; 0 when there is none.
    serial: Cell<u64>,
    queue: RefCell<VecDeque<u32>>,
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
            READY.with(|ready| ready.queue.borrow_mut().push_back(self.index));
        } else {
            self.inbox.wake(self.index);
        }
    }
}

struct Task {
    future: LocalFuture,
    handle: Arc<Handle>,
    waker: Waker,
    on_panic: OnPanic,
}

/// A row is `None` while its task is being polled.
pub(crate) struct Tasks {
    rows: RefCell<Slab<Option<Task>>>,
    serial: u64,
    inbox: Arc<Inbox>,
}

impl Tasks {
    /// Makes this thread the home of generation `serial`'s wakes.
    pub(crate) fn new(serial: u64, inbox: Arc<Inbox>) -> Self {
        READY.with(|ready| {
            ready.serial.set(serial);
            ready.queue.borrow_mut().clear();
        });
        Self { rows: RefCell::new(Slab::new()), serial, inbox }
    }

    /// Adds a task, ready to be polled in the next turn.
    pub(crate) fn add(&self, future: LocalFuture, on_panic: OnPanic) {
        let mut rows = self.rows.borrow_mut();
        let row = rows.vacant_entry();
        let handle = Arc::new(Handle {
            index: row.key() as u32,
            serial: self.serial,
            queued: AtomicBool::new(false),
            inbox: Arc::clone(&self.inbox),
        });
        let waker = Waker::from(Arc::clone(&handle));
        row.insert(Some(Task { future, handle, waker: waker.clone(), on_panic }));
        drop(rows);
        waker.wake();
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.borrow().len()
    }

    /// Queues a task that was woken from another thread.
    pub(crate) fn woken_elsewhere(&self, index: u32) {
        READY.with(|ready| ready.queue.borrow_mut().push_back(index));
    }

    pub(crate) fn wake_all(&self) {
        for (_, task) in self.rows.borrow().iter() {
            if let Some(task) = task {
                task.waker.wake_by_ref();
            }
        }
    }

    /// Number of tasks that are ready.
    pub(crate) fn ready(&self) -> usize {
        READY.with(|ready| ready.queue.borrow().len())
    }

    /// Polls each task that is ready now, once; those woken meanwhile wait for the next turn. Calls `panicked` for
    /// each panic with what it means.
    pub(crate) fn poll_ready(&self, mut panicked: impl FnMut(OnPanic, Panic)) {
        let count = self.ready();
        for _ in 0..count {
            let Some(index) = READY.with(|ready| ready.queue.borrow_mut().pop_front()) else { break };
            self.poll(index, &mut panicked);
        }
    }

    fn poll(&self, index: u32, panicked: &mut impl FnMut(OnPanic, Panic)) {
        // A wake may come for a task that has ended, or for its successor in the row: a needless poll at the worst.
        let Some(mut task) = self.rows.borrow_mut().get_mut(index as usize).and_then(Option::take) else { return };
        task.handle.queued.swap(false, Ordering::AcqRel);
        let mut context = Context::from_waker(&task.waker);
        let polled = catch_unwind(AssertUnwindSafe(|| task.future.as_mut().poll(&mut context)));
        if matches!(polled, Ok(Poll::Pending)) {
            if let Some(row) = self.rows.borrow_mut().get_mut(index as usize) {
                *row = Some(task);
            }
            return;
        }
        let on_panic = task.on_panic;
        if let Err(payload) = polled {
            panicked(on_panic, message(payload));
        }
        self.rows.borrow_mut().try_remove(index as usize);
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(task))) {
            panicked(on_panic, message(payload));
        }
    }

    /// Drops every task; a panic in one's drop costs the others nothing.
    pub(crate) fn clear(&self) {
        // A drop may spawn: go on until nothing is left. Spawning is refused to no one here, but each round drops what
        // the one before has added, and a drop that always spawns again is bounded by the rounds.
        for _ in 0..16 {
            let rows = std::mem::take(&mut *self.rows.borrow_mut());
            if rows.is_empty() {
                break;
            }
            for (_, task) in rows {
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(task))) {
                    tracing::error!(panic = message(payload), "a task panicked while it was dropped");
                }
            }
        }
        READY.with(|ready| {
            ready.serial.set(0);
            ready.queue.borrow_mut().clear();
        });
    }
}

/// What a panic payload says; the location is known to panic hooks only.
pub(crate) fn message(payload: Box<dyn std::any::Any + Send>) -> Panic {
    let text = match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => match payload.downcast::<&'static str>() {
            Ok(text) => (*text).to_owned(),
            Err(payload) => {
                // Dropping a foreign payload may panic in its turn; losing it is the safe way out.
                std::mem::forget(payload);
                "a panic with a payload that is not text".to_owned()
            }
        },
    };
    text
}
