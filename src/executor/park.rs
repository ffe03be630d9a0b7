//! Sleeping through glommio: for the executor that is idle, or that waits for glommio's files.
//!
//! Two eventfds stay readable through glommio's own ring: one that our ring signals with each completion, one that the
//! inbox signals. Both belong to the slot's outer future, for a glommio file is to be closed before the executor ends.

use std::future::{Future, poll_fn};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use glommio::io::BufferedFile;
use glommio::timer::Timer;

/// The shortest glommio timer that makes the executor go through its reactor; a zero timer never yields.
const HAND_OVER: Duration = Duration::from_micros(5);

/// What a wake that glommio loses costs at the most.
const LOST_WAKE_MAX: Duration = Duration::from_millis(500);

/// Lets glommio serve its timers, files and foreign wakes.
pub(crate) async fn hand_over() {
    guarded(HAND_OVER, Timer::new(HAND_OVER)).await;
}

/// Awaits what glommio wakes, within about `limit`, and has glommio look again soon after that.
///
/// When the thread loses its processor at the wrong moment for longer than glommio's preempt timer, glommio 0.9 goes to
/// sleep although what it waited for has come and we are ready to run. If that was the last thing it waited for, it sleeps
/// for ever. The timer here is one more: its end does nothing but end that sleep.
async fn guarded<T>(limit: Duration, future: impl Future<Output = T>) -> T {
    let (mut guard, mut future) = (Timer::new(limit + LOST_WAKE_MAX), pin!(future));
    poll_fn(|context| {
        if Pin::new(&mut guard).poll(context).is_ready() {
            guard = Timer::new(LOST_WAKE_MAX);
            let _ = Pin::new(&mut guard).poll(context);
        }
        future.as_mut().poll(context)
    })
    .await
}

type Read = Pin<Box<dyn Future<Output = ()>>>;

/// An eventfd that can be waited for through glommio.
pub(crate) struct Doorbell {
    file: Rc<BufferedFile>,
    /// A read in flight, kept over waits: dropping it would cancel it.
    read: Option<Read>,
}

impl Doorbell {
    /// `eventfd` must be in blocking mode: a non-blocking one would answer EAGAIN instead of waiting.
    pub(crate) fn new(eventfd: OwnedFd) -> Self {
        // SAFETY: the descriptor is ours and open, and is given to the file, which closes it.
        let file = unsafe { BufferedFile::from_raw_fd(eventfd.into_raw_fd()) };
        Self { file: Rc::new(file), read: None }
    }

    /// Completes when the eventfd has been signalled since the last time, when `woken` is ready, or after `limit`.
    pub(crate) async fn wait(&mut self, limit: Duration, mut woken: impl FnMut(&mut Context<'_>) -> Poll<()>) {
        // A timer of zero would never yield to glommio.
        let limit = limit.max(HAND_OVER);
        let mut timer = Timer::new(limit);
        let rung = poll_fn(|context| {
            if self.poll_rung(context).is_ready() || woken(context).is_ready() {
                return Poll::Ready(());
            }
            Pin::new(&mut timer).poll(context).map(drop)
        });
        guarded(limit, rung).await;
    }

    /// Ready when the eventfd has been signalled since the last time.
    pub(crate) fn poll_rung(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let read = self.read.get_or_insert_with(|| {
            let file = Rc::clone(&self.file);
            Box::pin(async move {
                // An error means that the eventfd is gone, which only teardown does; the limit bounds it anyway.
                let _ = file.read_at(0, 8).await;
            })
        });
        ready!(read.as_mut().poll(context));
        self.read = None;
        Poll::Ready(())
    }

    /// Closes the file; to be awaited before the executor ends.
    pub(crate) async fn close(mut self) {
        drop(self.read.take());
        if let Ok(file) = Rc::try_unwrap(self.file) {
            let _ = guarded(Duration::ZERO, file.close()).await;
        }
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the file is open as long as `self` is.
        unsafe { BorrowedFd::borrow_raw(self.file.as_raw_fd()) }
    }
}
