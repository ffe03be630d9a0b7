//! Futures on glommio's task queues, without what a task of glommio's own would cost: a panic is caught before glommio sees
//! it, and a future goes with its generation.
//!
//! A future has two tasks. The one among the generation's [`tasks`](super::tasks) owns it, so that it is dropped like all
//! others, and takes wakes from elsewhere; the [`Visit`] on glommio's queue polls it. What wakes it on its own thread goes
//! straight to the visit: a queue that went idle in between would be forgiven by glommio what it has used.
//!
//! Visits are let in only while the main future [gives way](open). When it sleeps, or waits for glommio's reactor, a
//! queue that always has something to do would keep the thread to itself: glommio looks at neither before all are idle,
//! or 100 ms have gone by.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use glommio::{Latency, Shares, TaskQueueHandle};
use slab::Slab;

use super::core::{Core, Scene};
use super::tasks::{LocalFuture, rouse};
use crate::panics::{Panic, caught};

/// Queues of one executor. glommio never gives one back while the thread lives, so more are a mistake: a name for each
/// request, say.
pub(crate) const QUEUES_MAX: usize = 64;

thread_local! {
    static LOCAL: Local = Local::default();
}

/// What the queues of a thread have in common. Queues outlive generations, the rest does not.
#[derive(Default)]
struct Local {
    /// By name and shares.
    queues: RefCell<HashMap<(String, usize), TaskQueueHandle>>,
    visits: RefCell<Slab<Row>>,
    /// Visits that are due.
    due: Cell<usize>,
    /// Whether visits are let in.
    open: Cell<bool>,
    /// Whether glommio's executor has ended, with visits in its queues.
    abandoned: Cell<bool>,
    /// Numbers the rows: a waker may outlive its own.
    rows: Cell<u64>,
}

struct Row {
    number: u64,
    due: bool,
    /// glommio's, once it has polled the visit.
    waker: Option<Waker>,
}

/// The queue with these properties, made when there is none yet. `None` if that would be one too many.
pub(crate) fn queue(name: &str, shares: usize) -> Option<TaskQueueHandle> {
    LOCAL.with(|local| {
        let mut queues = local.queues.borrow_mut();
        let key = (name.to_owned(), shares);
        if let Some(queue) = queues.get(&key) {
            return Some(*queue);
        }
        if queues.len() >= QUEUES_MAX {
            return None;
        }
        // A latency of its own would shorten the time after which glommio may lose a wake (see ARCHITECTURE.md, "Parking").
        let queue = glommio::executor().create_task_queue(Shares::Static(shares), Latency::NotImportant, name);
        queues.insert(key, queue);
        Some(queue)
    })
}

/// Whether there are any on this thread.
pub(crate) fn made() -> bool {
    LOCAL.with(|local| !local.queues.borrow().is_empty())
}

/// Number of futures on queues that are to be polled.
pub(crate) fn due() -> usize {
    LOCAL.with(|local| local.due.get())
}

/// Keeps visits out, before the main future sleeps.
pub(crate) fn close() {
    LOCAL.with(|local| local.open.set(false));
}

/// Lets visits in, and the queues have their shares of the thread: comes back when it is the main future's turn again.
pub(crate) async fn open() {
    let reopened = LOCAL.with(|local| !local.open.replace(true));
    if reopened {
        // Those that came while they were kept out.
        let kept_out = |row: &Row| if row.due { row.waker.clone() } else { None };
        let wakers: Vec<Waker> =
            LOCAL.with(|local| local.visits.borrow().iter().filter_map(|(_, row)| kept_out(row)).collect());
        wakers.into_iter().for_each(Waker::wake);
    }
    glommio::executor().yield_task_queue_now().await;
}

/// To be called when glommio's executor has ended by a panic, and its generation is yet to be taken down.
pub(crate) fn abandon() {
    LOCAL.with(|local| local.abandoned.set(true));
}

fn wake_visit(waker: Waker) {
    if LOCAL.with(|local| local.abandoned.get()) {
        // Waking it, or dropping the last of its wakers, would put it into a queue that is no more, and panic.
        mem::forget(waker);
    } else {
        waker.wake();
    }
}

/// What is known of a future by whoever wakes it, on any thread.
struct Bell {
    /// Of its generation.
    serial: u64,
    key: usize,
    number: u64,
    /// Of its task of ours, which takes wakes from elsewhere.
    relay: Waker,
}

impl Bell {
    /// To be called on the thread of the future.
    fn ring(&self) {
        let waker = LOCAL.with(|local| {
            let mut rows = local.visits.borrow_mut();
            let row = rows.get_mut(self.key).filter(|row| row.number == self.number && !row.due)?;
            row.due = true;
            local.due.set(local.due.get() + 1);
            row.waker.clone()
        });
        waker.into_iter().for_each(wake_visit);
        // The main future may sleep, and is to let it in.
        rouse();
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if Core::serial_here() == self.serial { self.ring() } else { self.relay.wake_by_ref() }
    }
}

/// What the two tasks of a future share.
struct Shared {
    future: RefCell<Option<LocalFuture>>,
    core: Rc<Core>,
    bell: Arc<Bell>,
    waker: Waker,
}

impl Shared {
    /// Whether it was due.
    fn begin(&self) -> bool {
        LOCAL.with(|local| {
            let mut rows = local.visits.borrow_mut();
            let row = rows.get_mut(self.bell.key).filter(|row| row.number == self.bell.number);
            let due = row.is_some_and(|row| mem::take(&mut row.due));
            local.due.set(local.due.get() - usize::from(due));
            due
        })
    }

    /// Ends the visit.
    fn end(&self) {
        self.begin();
        let row = LOCAL.with(|local| local.visits.borrow_mut().try_remove(self.bell.key));
        row.and_then(|row| row.waker).into_iter().for_each(wake_visit);
    }

    /// Polls the future; true when it is over.
    fn poll(&self) -> bool {
        // Not in its place while it is polled.
        let Some(future) = self.future.take() else { return true };
        let host = self.core.settings.host.enter();
        let over = self.poll_in_host(future);
        self.core.leave_host(host);
        over
    }

    fn poll_in_host(&self, mut future: LocalFuture) -> bool {
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut Context::from_waker(&self.waker))));
        if matches!(polled, Ok(Poll::Pending)) {
            self.future.replace(Some(future));
            return false;
        }
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(future)));
        for payload in [polled.err(), dropped.err()].into_iter().flatten() {
            self.panicked(caught(payload));
        }
        true
    }

    fn panicked(&self, panic: Panic) {
        self.core.contained(Scene::SpawnedTask, panic);
    }
}

/// The task on glommio's queue.
struct Visit(Rc<Shared>);

impl Future for Visit {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let shared = &self.0;
        let allowed = LOCAL.with(|local| {
            let mut rows = local.visits.borrow_mut();
            let row = rows.get_mut(shared.bell.key).filter(|row| row.number == shared.bell.number)?;
            row.waker.get_or_insert_with(|| context.waker().clone());
            Some(local.open.get())
        });
        match allowed {
            None => return Poll::Ready(()),
            Some(false) => return Poll::Pending,
            Some(true) => {}
        }
        if shared.begin() {
            end_round();
            if shared.poll() {
                shared.bell.relay.wake_by_ref();
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }
}

/// Has glommio look at all queues again after this task: otherwise it stays with one for 100 ms, whatever its shares.
fn end_round() {
    let executor = glommio::executor();
    let yields = pin!(executor.yield_task_queue_now());
    // What it would wake is not to be woken.
    let _ = yields.poll(&mut Context::from_waker(Waker::noop()));
}

/// The task among the generation's own.
struct Owner {
    queue: TaskQueueHandle,
    future: Option<LocalFuture>,
    core: Rc<Core>,
    shared: Option<Rc<Shared>>,
}

/// A future of the generation's that is polled on `queue`.
pub(crate) fn on_queue(core: &Rc<Core>, queue: TaskQueueHandle, future: LocalFuture) -> LocalFuture {
    Box::pin(Owner { queue, future: Some(future), core: Rc::clone(core), shared: None })
}

impl Future for Owner {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let Some(shared) = &this.shared else {
            this.begin(context.waker());
            return Poll::Pending;
        };
        if shared.future.borrow().is_none() {
            return Poll::Ready(());
        }
        shared.bell.ring();
        Poll::Pending
    }
}

impl Owner {
    fn begin(&mut self, relay: &Waker) {
        let (key, number) = LOCAL.with(|local| {
            let number = local.rows.get() + 1;
            local.rows.set(number);
            local.due.set(local.due.get() + 1);
            (local.visits.borrow_mut().insert(Row { number, due: true, waker: None }), number)
        });
        let bell = Arc::new(Bell { serial: self.core.serial, key, number, relay: relay.clone() });
        let waker = Waker::from(Arc::clone(&bell));
        let future = RefCell::new(self.future.take());
        let shared = Rc::new(Shared { future, core: Rc::clone(&self.core), bell, waker });
        self.shared = Some(Rc::clone(&shared));
        #[expect(clippy::disallowed_methods, reason = "what is leaked at the executor's end is an empty visit")]
        let visit = glommio::spawn_local_into(Visit(shared), self.queue);
        visit.expect("queues are never removed").detach();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            shared.end();
            // What it held is dropped here and now; whoever drops a task catches its panics.
            let future = shared.future.take();
            drop(future);
        }
    }
}
