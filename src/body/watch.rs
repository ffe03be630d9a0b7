//! What a connection and the body of its request know of each other, wherever the body is read: whether it was read to its
//! end, and since when its reader waits.
//!
//! On its executor a body has a timer of its own. Elsewhere (a task of tokio's, a thread) it cannot reach one; there it
//! leaves a note of its wait here, and the connection, which has a timer, wakes it when its time is over.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Instant;

/// One for each connection, so it is small.
#[derive(Debug, Default)]
pub(crate) struct UploadWatch {
    cut: AtomicBool,
    /// Whether there is a wait whose time is not over: the lock is for that only.
    waits: AtomicBool,
    wait: Mutex<Option<Box<Wait>>>,
}

/// Of a reader that is not on the connection's executor.
#[derive(Debug)]
struct Wait {
    since: Instant,
    waker: Waker,
    is_over: bool,
}

/// The connection's side.
impl UploadWatch {
    /// A body was dropped with bytes of it still to come.
    pub(crate) fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    /// Since when a reader elsewhere waits for the next piece.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        // One that is missed here is met when the connection looks again.
        let waits = self.waits.load(Ordering::Relaxed);
        waits.then(|| self.lock().as_ref().filter(|wait| !wait.is_over).map(|wait| wait.since)).flatten()
    }

    /// The time of that wait is over. False if there is none.
    pub(crate) fn end_wait(&self) -> bool {
        let waker = {
            let mut wait = self.lock();
            let Some(wait) = wait.as_mut().filter(|wait| !wait.is_over) else { return false };
            wait.is_over = true;
            self.waits.store(false, Ordering::Relaxed);
            wait.waker.clone()
        };
        waker.wake();
        true
    }
}

/// The body's side.
impl UploadWatch {
    pub(super) fn note_cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
    }

    /// Nothing has arrived for a reader elsewhere. Whether the time of its wait is over; then the wait is, too.
    pub(super) fn wait(&self, waker: &Waker) -> bool {
        let mut wait = self.lock();
        match wait.as_mut() {
            Some(wait) if !wait.is_over => {
                wait.waker.clone_from(waker);
                false
            }
            Some(_) => wait.take().is_some(),
            None => {
                *wait = Some(Box::new(Wait { since: Instant::now(), waker: waker.clone(), is_over: false }));
                self.waits.store(true, Ordering::Relaxed);
                false
            }
        }
    }

    /// Something has arrived, or nobody reads on.
    pub(super) fn has_waited(&self) {
        let wait = self.lock().take();
        self.waits.store(false, Ordering::Relaxed);
        // Its waker is somebody's.
        drop(wait);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<Wait>>> {
        self.wait.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_wait_ends_once_and_only_if_there_is_one() {
        let (watch, woken) = (UploadWatch::default(), Arc::new(Woken::default()));
        let waker = Waker::from(Arc::clone(&woken));
        assert!(!watch.end_wait() && watch.waits_since().is_none());
        let before = Instant::now();
        assert!(!watch.wait(&waker) && !watch.wait(&waker));
        assert!(watch.waits_since().is_some_and(|since| since >= before));
        assert!(watch.end_wait() && !watch.end_wait());
        assert_eq!((woken.0.load(Ordering::SeqCst), watch.waits_since()), (1, None));
        assert!(watch.wait(&waker), "its time is over");
        assert!(!watch.wait(&waker), "another wait begins");
        watch.has_waited();
        assert!(!watch.end_wait() && watch.waits_since().is_none());
        assert_eq!(Arc::strong_count(&woken), 2, "nothing is kept of who waited");
    }
}
