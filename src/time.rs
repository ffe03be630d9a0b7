//! Timers of an executor, for its users.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::executor::core::Core;
use crate::net::wheel::TimerKey;

/// `now + wait`, where a wait that no clock can add is a century: users say `Duration::MAX` for never.
pub(crate) fn later(now: Instant, wait: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    now.checked_add(wait.min(FAR)).unwrap_or(now)
}

/// Completes after a time. Made by [`Shard::sleep`](crate::Shard::sleep).
///
/// Resolution is one millisecond, rounded up: never early. It belongs to the executor it was made on, and names no
/// lifetime; it is `Send` so that futures which must be may hold it, but polled elsewhere it panics.
///
/// ```
/// use std::time::Duration;
/// use ringleader::{Shard, Sleep};
///
/// /// Made now, awaited later: it ends a second from now.
/// fn deadline(shard: &Shard) -> Sleep {
///     shard.sleep(Duration::from_secs(1))
/// }
/// ```
#[must_use = "a sleep does nothing until it is awaited"]
pub struct Sleep {
    /// Serial of the generation whose wheel it is on; 0 when it was made outside of one.
    home: u64,
    deadline: Instant,
    timer: Option<TimerKey>,
    done: bool,
}

impl Sleep {
    /// Measured from now on the executor of this thread.
    pub(crate) fn new(duration: Duration) -> Self {
        Self::until(later(Instant::now(), duration))
    }

    pub(crate) fn until(deadline: Instant) -> Self {
        Self { home: Core::current().map_or(0, |core| core.serial), deadline, timer: None, done: false }
    }

    /// Whether this thread is its executor's, in the generation it was made in: where it may be polled.
    pub(crate) fn is_at_home(&self) -> bool {
        self.home != 0 && self.home == Core::serial_here()
    }

    /// Whether it waits on the wheel and need not be polled before its deadline, if its task has not changed.
    pub(crate) fn is_waiting(&self, now: Instant) -> bool {
        self.timer.is_some() && now < self.deadline
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Moves the deadline; to be polled again.
    pub(crate) fn reset(&mut self, deadline: Instant) {
        self.cancel();
        self.deadline = deadline;
        self.done = false;
    }

    fn cancel(&mut self) {
        if let Some(key) = self.timer.take() {
            Core::on(self.home, |core| core.cancel_timer(key));
        }
    }
}

impl Future for Sleep {
    type Output = ();

    /// # Panics
    /// When polled elsewhere than on the executor, and in the generation, it was made on.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.done {
            return Poll::Ready(());
        }
        let (home, deadline, timer) = (self.home, self.deadline, self.timer);
        let polled = Core::on(home, |core| {
            if timer.is_some_and(|key| core.rewake_timer(key, context.waker())) {
                return timer;
            }
            // Not filed yet, or fired. The wheel is never early, so fired means due.
            if timer.is_some() || deadline <= core.now() {
                return None;
            }
            Some(core.set_timer(deadline, context.waker().clone()))
        });
        self.timer = polled.expect("a ringleader timer was polled outside of the executor it was made on");
        self.done = self.timer.is_none();
        if self.done { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        // Elsewhere the wheel cannot be reached: the timer stays until it is due and wakes a task in vain.
        self.cancel();
    }
}

impl fmt::Debug for Sleep {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Sleep").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

/// A [`Timeout`] ran out before its future was done.
///
/// ```
/// use std::time::Duration;
/// use ringleader::{BoxError, Elapsed, Shard};
///
/// async fn waits(shard: &Shard) -> Result<(), BoxError> {
///     let never = std::future::pending::<()>();
///     let Err(Elapsed { .. }) = shard.timeout(Duration::from_millis(1), never).await else { return Ok(()) };
///     Err("it was not done in time".into())
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elapsed(());

impl fmt::Display for Elapsed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the time for this was up before it was done")
    }
}

impl std::error::Error for Elapsed {}

/// Made by [`Shard::timeout`](crate::Shard::timeout).
#[must_use = "a timeout does nothing until it is awaited"]
#[derive(Debug)]
pub struct Timeout<F> {
    future: Pin<Box<F>>,
    sleep: Sleep,
}

impl<F: Future> Timeout<F> {
    pub(crate) fn new(future: F, limit: Duration) -> Self {
        Self { future: Box::pin(future), sleep: Sleep::new(limit) }
    }
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(output) = self.future.as_mut().poll(context) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(&mut self.sleep).poll(context).map(|()| Err(Elapsed(())))
    }
}
