//! Sleeping through glommio: for the executor that is idle, or that waits for glommio's files.
//!
//! What is waited for are descriptors, read through glommio's own ring: an eventfd that our ring signals with each
//! completion, one that the inbox signals, and alarms. All belong to the slot's outer future, for a glommio file is to be
//! closed before the executor ends. None is a timer of glommio's: before it sleeps with one of those pending, glommio 0.9
//! asserts that the kernel took it, so that a single EAGAIN or EINTR costs the executor.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::time::{Duration, Instant};

use glommio::io::BufferedFile;
use glommio::timer::Timer;

use crate::sys::eventfd::{self, EventFd};
use crate::sys::timerfd::{self, TimerFd};

/// What a wake that glommio loses costs at the most.
pub(super) const LOST_WAKE_MAX: Duration = Duration::from_millis(500);
/// glommio may lose the wake of a guard as well, and that of the next. Each goes off in twice the time of the one before.
const GUARDS: u32 = 5;

/// How long after what is waited for each guard goes off, at the most.
fn reaches() -> impl Iterator<Item = Duration> {
    (0..GUARDS).map(|guard| LOST_WAKE_MAX * 2_u32.pow(guard))
}

/// The places where an executor waits through glommio.
pub(crate) struct Park {
    /// Rung by our ring.
    ring: Doorbell,
    /// Rung by the inbox. By way of our ring it would be late or not heard: inside the wake-up of one eventfd the kernel
    /// puts off signalling another (`io_eventfd_signal`) by an RCU grace period, and 6.18 never does so a second time.
    inbox: Doorbell,
    /// Rung by ourselves, to be woken after a round of glommio's reactor.
    round: Doorbell,
    alarm: Doorbell,
    guards: Vec<Guard>,
}

impl Park {
    /// For the executor on this thread, which `inbox` wakes.
    ///
    /// # Errors
    /// When descriptors or memory run out.
    ///
    /// # Panics
    /// Outside of a glommio executor.
    pub(crate) fn new(inbox: BorrowedFd<'_>) -> io::Result<Self> {
        let (ring, inbox, round) = (EventFd::new()?, inbox.try_clone_to_owned()?, EventFd::new()?);
        let alarm = TimerFd::new()?;
        let guards = reaches().map(Guard::new).collect::<io::Result<_>>()?;
        Ok(Self {
            ring: Doorbell::new(ring.into()),
            inbox: Doorbell::new(inbox),
            round: Doorbell::new(round.into()),
            alarm: Doorbell::new(alarm.into()),
            guards,
        })
    }

    /// What our ring is to signal with its completions.
    pub(crate) fn ring_bell(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    /// Lets glommio serve its timers, files and foreign wakes.
    pub(crate) async fn hand_over(&mut self) {
        self.set_guard(Instant::now());
        eventfd::signal(self.round.as_fd());
        poll_fn(|context| {
            self.stay_guarded(context);
            self.round.poll_rung(context)
        })
        .await;
    }

    /// Completes when `yielded`, which glommio wakes at once, comes to its turn again.
    pub(crate) async fn give_way(&mut self, yielded: impl Future<Output = ()>) {
        self.set_guard(Instant::now());
        let mut yielded = pin!(yielded);
        poll_fn(|context| {
            self.stay_guarded(context);
            yielded.as_mut().poll(context)
        })
        .await;
    }

    /// Completes when our ring or the inbox has rung since the last time, when `woken` is ready, or after `limit`.
    pub(crate) async fn wait(&mut self, limit: Duration, mut woken: impl FnMut(&mut Context<'_>) -> Poll<()>) {
        let until = Instant::now() + limit;
        self.set_guard(until);
        timerfd::set(self.alarm.as_fd(), limit);
        poll_fn(|context| {
            self.stay_guarded(context);
            let rung = self.ring.poll_rung(context).is_ready() | self.inbox.poll_rung(context).is_ready();
            if rung || woken(context).is_ready() {
                return Poll::Ready(());
            }
            // An alarm of an earlier wait may have gone off since.
            while self.alarm.poll_rung(context).is_ready() {
                if Instant::now() >= until {
                    return Poll::Ready(());
                }
            }
            Poll::Pending
        })
        .await;
    }

    /// Has glommio look again soon after `until`, when what is waited for should have come by then.
    ///
    /// When the thread loses its processor at the wrong moment for longer than glommio's preempt timer, glommio 0.9 goes to
    /// sleep although what it waited for has come and we are ready to run. If that was the last thing it waited for, it
    /// sleeps for ever. A guard is one more: its end does nothing but end that sleep.
    fn set_guard(&mut self, until: Instant) {
        for guard in &mut self.guards {
            guard.set(until);
        }
    }

    fn stay_guarded(&mut self, context: &mut Context<'_>) {
        for guard in &mut self.guards {
            while guard.bell.poll_rung(context).is_ready() {
                guard.set(Instant::now());
            }
        }
    }

    /// Closes the files, and those that were dropped in the middle of a read; to be awaited before the executor ends.
    pub(crate) async fn close(self) {
        for bell in [self.ring, self.inbox, self.round, self.alarm] {
            bell.close().await;
        }
        for guard in self.guards {
            guard.bell.close().await;
        }
        guarded(Timer::new(ROUND)).await;
    }
}

/// The shortest glommio timer that makes the executor go through its reactor; a zero timer never yields.
const ROUND: Duration = Duration::from_micros(5);

/// As [`Park::set_guard`] says, when there is no guard any more.
async fn guarded<T>(future: impl Future<Output = T>) -> T {
    let mut guards: Vec<_> = reaches().map(|reach| (reach, Timer::new(reach))).collect();
    let mut future = pin!(future);
    poll_fn(|context| {
        for (reach, guard) in &mut guards {
            if Pin::new(&mut *guard).poll(context).is_ready() {
                *guard = Timer::new(*reach);
                let _ = Pin::new(guard).poll(context);
            }
        }
        future.as_mut().poll(context)
    })
    .await
}

/// An alarm behind everything that is waited for.
struct Guard {
    bell: Doorbell,
    /// One of [`reaches`]; it goes off after half of that at the least, so that it need not be set for each wait.
    reach: Duration,
    /// When it goes off.
    until: Instant,
}

impl Guard {
    fn new(reach: Duration) -> io::Result<Self> {
        Ok(Self { bell: Doorbell::new(TimerFd::new()?.into()), reach, until: Instant::now() })
    }

    fn set(&mut self, awaited: Instant) {
        if self.until < awaited + self.reach / 2 || self.until > awaited + self.reach {
            self.until = awaited + self.reach;
            timerfd::set(self.bell.as_fd(), self.until.saturating_duration_since(Instant::now()));
        }
    }
}

type Read = Pin<Box<dyn Future<Output = ()>>>;

/// An eventfd or a timerfd that can be waited for through glommio.
struct Doorbell {
    file: Rc<BufferedFile>,
    /// A read in flight, kept over waits: dropping it would cancel it.
    read: Option<Read>,
    notice: Option<Arc<Notice>>,
}

/// Whether a read is to be polled. glommio 0.9 keeps the waker of every poll until the read is done, and a read may never
/// be: at 32,767 of them, two hours of an idle executor, it would panic.
struct Notice {
    due: AtomicBool,
    waker: Waker,
}

impl Wake for Notice {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.due.store(true, Ordering::Release);
        self.waker.wake_by_ref();
    }
}

impl Doorbell {
    /// `fd` must be in blocking mode: a non-blocking one would answer EAGAIN instead of waiting.
    fn new(fd: OwnedFd) -> Self {
        // SAFETY: the descriptor is ours and open, and is given to the file, which closes it.
        let file = unsafe { BufferedFile::from_raw_fd(fd.into_raw_fd()) };
        Self { file: Rc::new(file), read: None, notice: None }
    }

    /// Ready when the eventfd has been signalled, or the alarm has gone off, since the last time.
    fn poll_rung(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let waker = context.waker();
        let notice = match self.notice.take().filter(|notice| notice.waker.will_wake(waker)) {
            Some(notice) => notice,
            None => Arc::new(Notice { due: AtomicBool::new(true), waker: waker.clone() }),
        };
        let notice = self.notice.insert(notice);
        if !notice.due.swap(false, Ordering::Acquire) && self.read.is_some() {
            return Poll::Pending;
        }
        let waker = Waker::from(Arc::clone(notice));
        let read = self.read.get_or_insert_with(|| {
            let file = Rc::clone(&self.file);
            Box::pin(async move {
                // An error means that the descriptor is gone, which only teardown does; the limit bounds it anyway.
                let _ = file.read_at(0, 8).await;
            })
        });
        ready!(read.as_mut().poll(&mut Context::from_waker(&waker)));
        self.read = None;
        Poll::Ready(())
    }

    async fn close(mut self) {
        drop(self.read.take());
        if let Ok(file) = Rc::try_unwrap(self.file) {
            let _ = guarded(file.close()).await;
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

#[cfg(test)]
mod tests {
    use glommio::{Latency, LocalExecutorBuilder, Placement, Shares};

    use super::*;

    /// Has `act` done on a queue whose preempt timer is this. The executor's own is long: nothing guards the first run.
    #[expect(clippy::disallowed_methods, reason = "nothing but glommio is under test")]
    fn parked(preempt: Duration, act: impl AsyncFnOnce(&mut Park, &EventFd) + 'static) {
        let builder = LocalExecutorBuilder::new(Placement::Unbound).io_memory(1 << 20).preempt_timer(CALM);
        builder.make().expect("an executor").run(async {
            let latency = Latency::Matters(preempt);
            let queue = glommio::executor().create_task_queue(Shares::default(), latency, "parked");
            let acts = async {
                let inbox = EventFd::new().expect("an eventfd");
                let mut park = Park::new(inbox.as_fd()).expect("descriptors");
                act(&mut park, &inbox).await;
                park.close().await;
            };
            glommio::spawn_local_into(acts, queue).expect("the queue is there").await;
        });
    }

    const CALM: Duration = Duration::from_secs(3600);
    const LONG: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_millis(2);

    fn nobody(_: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }

    #[test]
    fn a_wait_ends_with_its_limit_or_with_a_bell() {
        parked(CALM, async |park, inbox| {
            let begun = Instant::now();
            park.wait(SHORT, nobody).await;
            assert!(begun.elapsed() >= SHORT);
            inbox.signal();
            park.wait(LONG, nobody).await;
            eventfd::signal(park.ring_bell());
            park.wait(LONG, nobody).await;
            park.wait(LONG, |_| Poll::Ready(())).await;
        });
    }

    #[test]
    fn an_alarm_that_was_left_over_does_not_end_a_later_wait() {
        parked(CALM, async |park, inbox| {
            // Ended by the bell, with the alarm set to go off soon.
            inbox.signal();
            park.wait(SHORT, nobody).await;
            std::thread::sleep(2 * SHORT);
            let begun = Instant::now();
            park.wait(5 * SHORT, nobody).await;
            assert!(begun.elapsed() >= 5 * SHORT);
        });
    }

    /// As the inbox of an idle executor, and as the guard of a busy one.
    #[test]
    fn a_bell_that_is_never_rung_may_be_waited_for_without_end() {
        parked(CALM, async |park, _| {
            for _ in 0..40_000 {
                park.wait(LONG, |_| Poll::Ready(())).await;
            }
            park.hand_over().await;
        });
    }

    /// Without guards this sleeps for ever within the first thousands, on a machine that is busy sooner.
    #[test]
    fn a_wake_that_glommio_loses_comes_late_and_not_never() {
        parked(Duration::from_micros(40), async |park, _| {
            let (mut rounds, mut late) = (0, 0);
            // On a machine that is busy each of them may be lost.
            while rounds < 1000 && late < 3 {
                let begun = Instant::now();
                park.hand_over().await;
                rounds += 1;
                late += u32::from(begun.elapsed() >= LOST_WAKE_MAX / 2);
            }
            println!("{late} of {rounds} wakes were lost");
        });
    }
}
