//! Handles that may go anywhere, to values that never leave their executor: for frameworks that demand `Send` of state
//! and futures which are used on one thread only. Not for state that threads share.
//!
//! # Why it is sound
//! `T` need be neither `Send` nor `Sync`, so nothing of it may be touched on another thread than that which made it. That
//! thread is its *home*; `Home` has a number that no other thread of the process ever has, nor this one when it works for
//! another slot or server. Five rules:
//!
//! 1. **The handles count, atomically.** They share an `Arc`; cloning and dropping one touches its counters only, and that
//!    from any thread. The value is in a box of its own, behind a pointer that nobody uses as `&mut` while a handle lives.
//! 2. **A reference is made on the home thread only**: `try_get` compares the serial number of the generation that lives on
//!    this thread. A serial is given once in a process, to a generation that lives on one thread.
//! 3. **A reference keeps its handle borrowed**, so the count is not zero while it lives, whatever becomes of the other
//!    handles and wherever they are. That holds for a handle that was leaked, too: it is never dropped, so a `&'static T`
//!    got from it, hidden in a thread-local and used after its generation, or in a destructor at the thread's end,
//!    points to a value that still lives. The end of a generation therefore frees no value: it ends the *access* (rule 2),
//!    which is what state of a generation means, while memory belongs to the handles. Nor does it matter in which order
//!    a generation is torn down, and whether each of its tasks was dropped.
//! 4. **The last handle frees the value, on the home thread or never.** There it is dropped in place. Elsewhere its box
//!    is put, unopened, into the home's queue, and the home thread drops it between two turns, or between two
//!    generations. All uses of the value happened before: on the home thread in its own order, and before the last
//!    decrement by the counter's release and acquire. Once the home is left, what still comes stays unopened: leaked,
//!    and counted before in `ExecutorStats::values_leaked`.
//! 5. **A future of `run` follows the same rules** with one owner instead of many: made on its home (`run` panics
//!    elsewhere, for what its closure holds is the *calling* thread's), polled there in its generation, dropped there or
//!    sent there. It stays in its box from its first poll to its drop. Its result comes out of a poll, which is at home.
//!
//! Weighed: values in a table of the generation, freed at its end. It cannot be: a reference that is hidden as in rule 3
//! would dangle, and safe code can make one.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use crossbeam_queue::SegQueue;

use crate::executor::core::Core;
use crate::executor::inbox::Inbox;
use crate::panics::{Panic, caught};

/// Numbers homes; 0 is none.
static THREADS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// This thread's number. It has no destructor, so that it can be read to the thread's very end.
    static HERE: Cell<u64> = const { Cell::new(0) };
    static HOME: RefCell<Option<Arc<Home>>> = const { RefCell::new(None) };
}

/// A thread that values belong to, as handles know it. It outlives the thread.
pub(crate) struct Home {
    thread: u64,
    /// Values and futures that belong here and have not been dropped. Written by the home thread only.
    alive: AtomicU64,
    /// What was let go of elsewhere; bounded by `alive`.
    returned: SegQueue<Returned>,
    /// To wake the thread; gone with its server.
    inbox: Weak<Inbox>,
}

/// Something that came home, or is on its way. Opened nowhere else; dropped unopened, it leaks.
struct Returned(ManuallyDrop<Pin<Box<dyn Any>>>);

// SAFETY: what is in it is touched by `Home::take_back` only, which asserts that it runs on the thread where it was made;
// elsewhere the box is moved as it is, and its drop does nothing.
unsafe impl Send for Returned {}

impl Home {
    /// The home that this thread is, with the inbox that wakes it.
    pub(crate) fn of_this_thread(inbox: &Arc<Inbox>) -> Arc<Self> {
        let make = || {
            HERE.set(THREADS.fetch_add(1, Ordering::Relaxed) + 1);
            Arc::new(Self {
                thread: HERE.get(),
                alive: AtomicU64::new(0),
                returned: SegQueue::new(),
                inbox: Arc::downgrade(inbox),
            })
        };
        HOME.with_borrow_mut(|home| Arc::clone(home.get_or_insert_with(make)))
    }

    /// The same, unless this thread is nobody's home.
    pub(crate) fn here() -> Option<Arc<Self>> {
        HOME.try_with(|home| home.borrow().clone()).ok().flatten()
    }

    /// Ends it, before the thread does: nothing comes home any more, and what is still somewhere leaks. The thread may
    /// become another home, for which this one is elsewhere.
    pub(crate) fn leave() -> Option<Arc<Self>> {
        HERE.set(0);
        HOME.try_with(|home| home.borrow_mut().take()).ok().flatten()
    }

    fn is_here(&self) -> bool {
        HERE.get() == self.thread
    }

    fn note_one_more(&self) {
        self.alive.store(self.alive.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    fn note_one_less(&self) {
        self.alive.store(self.alive.load(Ordering::Relaxed) - 1, Ordering::Relaxed);
    }

    /// Drops what was made on the home thread, if this is it, and sends it there otherwise.
    fn give_back(&self, value: Pin<Box<dyn Any>>) {
        if self.is_here() {
            self.note_one_less();
            return drop(value);
        }
        self.returned.push(Returned(ManuallyDrop::new(value)));
        if let Some(inbox) = self.inbox.upgrade() {
            inbox.nudge();
        }
    }

    /// Drops what has come home by now. Calls `panicked` for each that panics as it is dropped.
    ///
    /// # Panics
    /// On another thread.
    pub(crate) fn take_back(&self, mut panicked: impl FnMut(Panic)) {
        assert!(self.is_here(), "values are dropped on the thread that made them");
        for returned in (0..self.returned.len()).map_while(|_| self.returned.pop()) {
            self.note_one_less();
            let value = ManuallyDrop::into_inner(returned.0);
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
                panicked(caught(payload));
            }
        }
    }

    /// Values and futures of this home that have not been dropped; once it is left they never are.
    pub(crate) fn alive(&self) -> u64 {
        self.alive.load(Ordering::Relaxed)
    }
}

/// A handle to a value that never leaves its executor, for what must be `Send`: the `State` of an axum application, an
/// extension of a request, a closure on its way to another thread and back. Made by
/// [`Shard::local`](crate::Shard::local).
///
/// `T` may be anything, an `Rc` or a `RefCell` as well. The handle is `Send`, `Sync` and `Clone` all the same: it may be
/// cloned and dropped on any thread, at any time. The value is reached by `Deref` on its executor and in its generation
/// only; elsewhere `Deref` panics, and [`try_get`](Self::try_get) gives `None`.
///
/// The value is dropped with its last handle, on its executor's thread: when that handle was on another thread, a moment
/// later. A handle may outlive its generation, and the value then lives as long, though nobody reaches it any more. If it
/// outlives the executor (the end of the server, or of its thread) the value is never dropped, and counted in
/// [`ExecutorStats::values_leaked`](crate::ExecutorStats::values_leaked). A value that holds a handle to itself is never
/// dropped either, as with an `Rc`.
///
/// ```
/// use ringleader::{Body, Request, Response, Server, Shard, ShardLocal, service_fn};
/// use std::cell::RefCell;
/// use std::collections::HashMap;
///
/// fn must_be_send<T: Send + Sync + Clone>(state: T) -> T {
///     state
/// }
///
/// let server = Server::builder().listen("127.0.0.1:0").serve(async |shard: Shard| {
///     let hits: ShardLocal<RefCell<HashMap<String, u64>>> = must_be_send(shard.local(RefCell::default()));
///     Ok(service_fn(async move |request: Request| {
///         *hits.borrow_mut().entry(request.uri().path().to_owned()).or_default() += 1;
///         Ok(Response::new(Body::from(format!("{} paths\n", hits.borrow().len()))))
///     }))
/// });
/// # drop(server);
/// ```
pub struct ShardLocal<T: 'static>(Arc<Shared<T>>);

struct Shared<T: 'static> {
    /// Of the generation in which the value can be reached.
    serial: u64,
    home: Arc<Home>,
    /// From a box.
    value: NonNull<T>,
}

// SAFETY: cloning and dropping a handle touches the counters of the `Arc` and the queue of its `Home` (rules 1 and 4 at
// the head of this file), and the value is reached on its own thread only, whichever thread asks (rule 2).
unsafe impl<T: 'static> Send for ShardLocal<T> {}
// SAFETY: as above; what `&ShardLocal<T>` allows is to clone it and to ask for the value.
unsafe impl<T: 'static> Sync for ShardLocal<T> {}

impl<T: 'static> ShardLocal<T> {
    /// Of the generation that lives on this thread, or did.
    pub(crate) fn new(core: &Core, value: T) -> Self {
        let home = Arc::clone(&core.home);
        assert!(home.is_here(), "a core is bound to its thread");
        home.note_one_more();
        let value = NonNull::from(Box::leak(Box::new(value)));
        Self(Arc::new(Shared { serial: core.serial, home, value }))
    }

    /// The value, on its executor and in its generation; `None` elsewhere and afterwards.
    ///
    /// ```
    /// use std::cell::Cell;
    /// use ringleader::ShardLocal;
    ///
    /// /// `None` on other threads, and once the generation has ended.
    /// fn hits(counter: &ShardLocal<Cell<u64>>) -> Option<u64> {
    ///     counter.try_get().map(Cell::get)
    /// }
    /// ```
    #[must_use]
    pub fn try_get(&self) -> Option<&T> {
        // SAFETY: the serial says that this is the thread the value was made on (rule 2). The value is freed after the last
        // handle's drop, and this one is borrowed as long as the reference lives (rule 3); nobody makes a `&mut` to it
        // before.
        (Core::serial_here() == self.0.serial).then(|| unsafe { self.0.value.as_ref() })
    }

    /// Runs a part of a handler that is not `Send` in one that must be: what `work` borrows and holds over its awaits may
    /// be anything. The future that this returns is `Send`, and may be dropped anywhere.
    ///
    /// ```
    /// # use ringleader::{Shard, ShardLocal};
    /// # use std::{cell::RefCell, rc::Rc, time::Duration};
    /// struct State {
    ///     shard: Shard,
    ///     names: RefCell<Vec<Rc<str>>>,
    /// }
    ///
    /// // As axum demands it of a handler.
    /// fn handler(state: ShardLocal<State>) -> impl Future<Output = usize> + Send {
    ///     state.run(async |state: &State| {
    ///         let name: Rc<str> = Rc::from("a name");
    ///         state.shard.sleep(Duration::from_millis(1)).await;
    ///         state.names.borrow_mut().push(name);
    ///         state.names.borrow().len()
    ///     })
    /// }
    /// ```
    ///
    /// # Panics
    /// When it is called, or when the future is polled, elsewhere than on the value's executor or after its generation.
    #[track_caller]
    pub fn run<F, R>(&self, work: F) -> impl Future<Output = R> + Send + use<T, F, R>
    where
        F: AsyncFnOnce(&T) -> R + 'static,
        R: 'static,
    {
        // What `work` holds is this thread's, so this must be the home (rule 5).
        if self.try_get().is_none() {
            self.0.refuse();
        }
        let this = self.clone();
        self.0.home.note_one_more();
        let future = Box::pin(async move { work(&*this).await });
        OnShard { serial: self.0.serial, home: Arc::clone(&self.0.home), future: Some(future) }
    }
}

impl<T> Shared<T> {
    #[track_caller]
    fn refuse(&self) -> ! {
        let name = std::any::type_name::<T>();
        if self.home.is_here() {
            panic!("a ShardLocal<{name}> was used after the end of the generation that made it");
        }
        panic!(
            "a ShardLocal<{name}> was used on a thread that is not its executor's; it may be cloned and dropped \
             anywhere, but used on its executor only"
        );
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: the pointer is from a box, and this is the end of the last handle: no reference is left (rule 3), and
        // nobody else makes a box of it again.
        let value = unsafe { Box::from_raw(self.value.as_ptr()) };
        self.home.give_back(Box::into_pin(value as Box<dyn Any>));
    }
}

impl<T: 'static> Clone for ShardLocal<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: 'static> Deref for ShardLocal<T> {
    type Target = T;

    /// # Panics
    /// On another thread than its executor's, and after the end of its generation.
    #[track_caller]
    fn deref(&self) -> &T {
        match self.try_get() {
            Some(value) => value,
            None => self.0.refuse(),
        }
    }
}

impl<T: 'static> fmt::Debug for ShardLocal<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The value may be elsewhere.
        formatter.debug_struct("ShardLocal").finish_non_exhaustive()
    }
}

/// A future of one executor in a shell that is `Send`.
struct OnShard<F: Future + 'static> {
    serial: u64,
    home: Arc<Home>,
    /// `None` once it is done.
    future: Option<Pin<Box<F>>>,
}

// SAFETY: the future is made and polled on its home thread only, and given back to it unopened (rule 5 at the head of this
// file).
unsafe impl<F: Future + 'static> Send for OnShard<F> {}

impl<F: Future + 'static> Future for OnShard<F> {
    type Output = F::Output;

    /// # Panics
    /// Elsewhere than on its executor, after its generation, and when polled again after it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        assert!(
            Core::serial_here() == self.serial,
            "a future of ShardLocal::run was polled elsewhere than on its executor, or after its generation"
        );
        let future = self.future.as_mut().expect("a future is not polled again after it was ready");
        let polled = future.as_mut().poll(context);
        if polled.is_ready() {
            self.let_go();
        }
        polled
    }
}

impl<F: Future + 'static> OnShard<F> {
    fn let_go(&mut self) {
        if let Some(future) = self.future.take() {
            self.home.give_back(future);
        }
    }
}

impl<F: Future + 'static> Drop for OnShard<F> {
    fn drop(&mut self) {
        self.let_go();
    }
}

#[cfg(test)]
mod tests;
