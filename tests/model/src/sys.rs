//! The eventfd: a count behind a lock, as in the kernel, which whoever reads it waits for.

pub mod eventfd {
    use std::cell::RefCell;
    use std::io;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::sync::Arc;

    use loom::sync::{Condvar, Mutex};

    #[derive(Clone)]
    pub struct EventFd(Arc<(Mutex<u64>, Condvar)>);

    thread_local! {
        static MADE: RefCell<Option<EventFd>> = const { RefCell::new(None) };
    }

    impl EventFd {
        pub fn new() -> io::Result<Self> {
            let made = Self(Arc::new((Mutex::new(0), Condvar::new())));
            MADE.set(Some(made.clone()));
            Ok(made)
        }

        /// The one that was made last: what an inbox has is its own.
        pub fn made_last() -> Self {
            MADE.take().expect("one has been made")
        }

        pub fn signal(&self) {
            *self.0.0.lock().unwrap() += 1;
            self.0.1.notify_one();
        }

        /// As a read(2) of it: blocks until there is a signal, and takes all there are.
        pub fn wait(&self) -> u64 {
            let mut count = self.0.0.lock().unwrap();
            while *count == 0 {
                count = self.0.1.wait(count).unwrap();
            }
            std::mem::take(&mut *count)
        }

        /// Signals that nobody has taken.
        pub fn count(&self) -> u64 {
            *self.0.0.lock().unwrap()
        }
    }

    impl AsFd for EventFd {
        fn as_fd(&self) -> BorrowedFd<'_> {
            unreachable!("no model has a ring")
        }
    }
}
