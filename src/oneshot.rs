//! An outcome that another thread comes to: one place, which one side fills and the other empties, under a lock for the
//! time of a move. For orders to a server and for closures that block.
//!
//! A call between executors has a place of its own (`peers/call.rs`): there the message lies in it on its way, so that a
//! call is one allocation, and whoever gives the executor up may settle it from outside.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

enum Place<T> {
    Waiting(Option<Waker>),
    /// `None` when whoever had promised it is gone.
    Done(Option<T>),
    Taken,
}

fn lock<T>(place: &Mutex<Place<T>>) -> MutexGuard<'_, Place<T>> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The side that fills the place. Dropped before, it tells whoever waits that there will be nothing.
pub(crate) struct Promise<T>(Option<Arc<Mutex<Place<T>>>>);

impl<T> Promise<T> {
    /// If nobody waits for `outcome` any more, it is dropped here.
    pub(crate) fn fulfil(mut self, outcome: T) {
        self.settle(Some(outcome));
    }

    fn settle(&mut self, outcome: Option<T>) {
        let Some(shared) = self.0.take() else { return };
        let before = std::mem::replace(&mut *lock(&shared), Place::Done(outcome));
        if let Place::Waiting(Some(waker)) = before {
            waker.wake();
        }
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        self.settle(None);
    }
}

impl<T> fmt::Debug for Promise<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Promise")
    }
}

/// The side that empties the place: a future that is `None` when the promise was dropped.
pub(crate) struct Outcome<T>(Arc<Mutex<Place<T>>>);

impl<T> Outcome<T> {
    pub(crate) fn new() -> (Promise<T>, Self) {
        let place = Arc::new(Mutex::new(Place::Waiting(None)));
        (Promise(Some(Arc::clone(&place))), Self(place))
    }

    /// One that nobody needs to wait for.
    pub(crate) fn ready(outcome: T) -> Self {
        Self(Arc::new(Mutex::new(Place::Done(Some(outcome)))))
    }

    /// Blocks this thread until the outcome is there.
    ///
    /// # Panics
    /// When it has been taken already, by polling.
    pub(crate) fn wait(mut self) -> Option<T> {
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut context = Context::from_waker(&waker);
        loop {
            if let Poll::Ready(outcome) = Pin::new(&mut self).poll(&mut context) {
                return outcome;
            }
            thread::park();
        }
    }
}

impl<T> Future for Outcome<T> {
    type Output = Option<T>;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut place = lock(&self.0);
        match &mut *place {
            Place::Waiting(Some(waker)) => waker.clone_from(context.waker()),
            Place::Waiting(none) => *none = Some(context.waker().clone()),
            Place::Done(outcome) => {
                let outcome = outcome.take();
                *place = Place::Taken;
                return Poll::Ready(outcome);
            }
            Place::Taken => {
                drop(place);
                panic!("an outcome is taken once, and this one has been");
            }
        }
        Poll::Pending
    }
}

/// Wakes the thread that waits, as channels of `std` do.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    #[test]
    fn a_thread_waits_for_what_another_one_comes_to() {
        let (promise, outcome) = Outcome::new();
        // It waits, or will; either way it is told.
        let waiting = thread::spawn(move || outcome.wait());
        promise.fulfil(5);
        assert_eq!(waiting.join().expect("no panic"), Some(5));
        assert_eq!(Outcome::ready(6).wait(), Some(6));
    }

    #[test]
    fn whoever_waits_is_told_of_a_promise_that_is_dropped() {
        let (promise, outcome) = Outcome::<()>::new();
        let waiting = thread::spawn(move || outcome.wait());
        drop(promise);
        assert_eq!(waiting.join().expect("no panic"), None);
    }

    #[test]
    fn a_thread_may_wait_for_what_has_been_polled() {
        let (promise, mut outcome) = Outcome::new();
        assert!(Pin::new(&mut outcome).poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let waiting = thread::spawn(move || outcome.wait());
        promise.fulfil(7);
        assert_eq!(waiting.join().expect("no panic"), Some(7));
    }

    #[test]
    fn waiting_for_what_has_been_taken_panics_instead_of_waiting_for_ever() {
        let mut outcome = Outcome::ready(8);
        assert!(Pin::new(&mut outcome).poll(&mut Context::from_waker(Waker::noop())).is_ready());
        assert!(catch_unwind(AssertUnwindSafe(|| outcome.wait())).is_err());
    }

    /// Says on which thread it is dropped.
    struct Tells(Sender<thread::ThreadId>);

    impl Drop for Tells {
        fn drop(&mut self) {
            let _ = self.0.send(thread::current().id());
        }
    }

    #[test]
    fn what_nobody_waits_for_is_dropped_where_it_was_come_to() {
        let (tell, told) = channel();
        let (promise, outcome) = Outcome::new();
        drop(outcome);
        let there = thread::spawn(move || promise.fulfil(Tells(tell)));
        assert_eq!(told.recv(), Ok(there.thread().id()));
    }
}
