//! What other threads can put before an executor: orders of the supervisor, jobs, and wakes of its tasks.
//!
//! A busy executor looks at one word per turn and makes no system call. One that sleeps has said so first; the poster
//! that finds it asleep writes the eventfd, once for however many messages follow.
//!
//! All that is said is in that word ([`ASLEEP`], [`OPEN`], [`ANNOUNCED`]), and said by read-modify-writes only: they have one
//! order, and whoever acquires sees what was done before each earlier one. With a flag of its own for each, two fences
//! would order poster and executor, but one poster's store would cover another's: who reads it sees the second message,
//! and need not see the first. Who finds something announced already says nothing, and fences order that.
//!
//! No wake is lost: the poster publishes its message, then announces it; the executor says that it sleeps unless something
//! is announced. If the poster comes first the executor does not sleep; else the poster finds it asleep. Who wipes
//! announcements out sees the messages of all of them.
//!
//! No job is forgotten: an inbox takes jobs only while it is open. Who closes it says so first, then throws away what is
//! there. A poster that came before has its job thrown away; one that comes later finds the inbox closed as it announces
//! its job, and has to throw it away itself.
//!
//! `tests/model` runs this file through every interleaving.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use slab::Slab;

use crate::executor::core::Core;
use crate::panics::caught;
use crate::sync::{ArrayQueue, AtomicUsize, Mutex, MutexGuard, Ordering, SegQueue, fence};
use crate::sys::eventfd::EventFd;

/// Jobs that may wait in one inbox; the next one is refused at once ([`Refusal::Full`]), never waited for: two executors that
/// waited for room in each other's inbox would wait for ever.
pub(crate) const JOBS_MAX: usize = 4096;

type Closure = Box<dyn FnOnce(&Rc<Core>) + Send>;

/// Something to run on the executor, between two turns.
pub(crate) enum Job {
    Closure(Closure),
    Call(Errand),
}

impl Job {
    pub(crate) fn run(self, core: &Rc<Core>) {
        match self {
            Self::Closure(closure) => closure(core),
            Self::Call(mut errand) => {
                if let Some(call) = errand.0.take() {
                    call.begin(core);
                }
            }
        }
    }
}

/// A call on its way. Its caller is told if it is dropped before it was begun.
pub(crate) struct Errand(Option<Arc<dyn Outstanding>>);

impl Errand {
    pub(crate) fn new(call: Arc<dyn Outstanding>) -> Self {
        Self(Some(call))
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        if let Some(call) = self.0.take() {
            call.lose();
        }
    }
}

/// An order of the supervisor to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Start this generation.
    Start(u64),
    /// Accept connections: every first generation of a process that takes over is ready.
    Accept,
    /// Accept nothing more; finish what is running; whatever is left at the deadline is closed.
    ///
    /// With `accept_rest` what the kernel has completed is accepted first: there may be nobody else who would. With
    /// `patient` a client between two requests gets time for another one, since it may be sending it at this very moment;
    /// else it is closed.
    Drain { deadline: Instant, accept_rest: bool, patient: bool },
    /// End the generation now.
    Stop,
    /// End the slot's thread.
    Quit,
}

/// A connection that the supervisor accepted from the queue of a slot that cannot.
pub(crate) struct Handed {
    pub fd: OwnedFd,
    pub peer: SocketAddr,
    /// The name of the listener it came by.
    pub listener: Arc<str>,
}

/// The executor sleeps, or is about to: whoever announces something first has to signal it.
const ASLEEP: usize = 1;
/// Jobs are taken.
const OPEN: usize = 2;
/// Counts what has been put in since the queues were last looked into. Nobody asks how many: to add is one instruction on
/// every processor, to set a bit and get the word as it was is a loop.
const ANNOUNCED: usize = 4;

/// Why a job was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// [`JOBS_MAX`] jobs are waiting.
    Full,
    /// There is no generation, and none is starting.
    Down,
}

/// What becomes of a job that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "one that came too late is to be thrown away"]
pub(crate) enum Posted {
    /// It is run, or thrown away when the inbox is closed.
    InTime,
    /// The inbox was closed meanwhile, and perhaps emptied before the job was there.
    Late,
}

/// A call that is not answered yet. One allocation, made and given back by the caller's thread: what is allocated by one
/// thread and freed by another is, for the allocator, the most expensive kind.
pub(crate) trait Outstanding: Send + Sync {
    /// Runs it up to its first wait, on the executor that was called.
    fn begin(self: Arc<Self>, core: &Rc<Core>);
    /// There will be no answer. May be called after all when there has been one.
    fn lose(&self);
}

/// Where a call that was begun is noted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallKey {
    opened: u64,
    index: usize,
}

/// Calls that have been begun since the inbox was opened. Behind a lock that hardly anybody else ever takes: a thread that
/// hangs cannot tell its callers, so the supervisor must be able to.
#[derive(Default)]
struct Begun {
    open: bool,
    /// How often the inbox has been opened; tells apart the rows of different generations.
    opened: u64,
    calls: Slab<Arc<dyn Outstanding>>,
}

pub(crate) struct Inbox {
    /// Few, from the supervisor only: unbounded so that an order cannot be refused.
    orders: SegQueue<Order>,
    jobs: ArrayQueue<Job>,
    /// From the supervisor only, which counts them against the executor's limit on connections.
    handed: SegQueue<Handed>,
    /// Tasks woken from other threads; bounded by the number of tasks and of calls they have made, for a task is queued once,
    /// and once for each answer.
    wakes: SegQueue<u32>,
    /// [`ASLEEP`], [`OPEN`], and in units of [`ANNOUNCED`] the announcements.
    said: Apart<AtomicUsize>,
    /// Written by the executor with each call.
    begun: Apart<Mutex<Begun>>,
    eventfd: EventFd,
}

/// On cache lines of its own, two since neighbours are fetched in pairs: a line that one thread writes and the other
/// reads costs both a tenth of a microsecond each time.
#[derive(Default)]
#[repr(align(128))]
struct Apart<T>(T);

impl Inbox {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            orders: SegQueue::new(),
            jobs: ArrayQueue::new(JOBS_MAX),
            handed: SegQueue::new(),
            wakes: SegQueue::new(),
            said: Apart(AtomicUsize::new(0)),
            begun: Apart::default(),
            eventfd: EventFd::new()?,
        })
    }

    pub(crate) fn order(&self, order: Order) {
        self.orders.push(order);
        self.announce();
    }

    /// Takes jobs from here on.
    pub(crate) fn open(&self) {
        let mut begun = self.begun();
        if !begun.open {
            begun.open = true;
            begun.opened += 1;
            self.said.0.fetch_or(OPEN, Ordering::AcqRel);
        }
    }

    /// Takes no more jobs, throws away those that wait, and tells the callers of those that were begun that there will be
    /// no answer. To be called on any thread, however often.
    pub(crate) fn close(&self) {
        let mut begun = self.begun();
        begun.open = false;
        self.said.0.fetch_and(!OPEN, Ordering::AcqRel);
        // See `announce`.
        fence(Ordering::SeqCst);
        let calls = std::mem::take(&mut begun.calls);
        drop(begun);
        self.drop_jobs();
        for (_, call) in calls {
            guard(|| call.lose());
        }
    }

    fn is_open(&self) -> bool {
        self.said.0.load(Ordering::Relaxed) & OPEN != 0
    }

    /// Throws away the jobs that wait; their callers are told by the drop.
    pub(crate) fn drop_jobs(&self) {
        while let Some(job) = self.jobs.pop() {
            guard(|| drop(job));
        }
    }

    /// Adds a job. When it [came too late](Posted::Late), who posts has to [throw it away](Inbox::drop_jobs); not under a
    /// lock, for what jobs own is dropped there.
    ///
    /// # Errors
    /// [`Refusal`], at once, with the job.
    pub(crate) fn post(&self, job: Job) -> Result<Posted, (Refusal, Job)> {
        if !self.is_open() {
            return Err((Refusal::Down, job));
        }
        self.jobs.push(job).map_err(|job| (Refusal::Full, job))?;
        Ok(if self.announce() & OPEN != 0 { Posted::InTime } else { Posted::Late })
    }

    fn begun(&self) -> MutexGuard<'_, Begun> {
        self.begun.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a call that has been begun; `None` when the inbox is closed, and nobody would tell its caller.
    pub(crate) fn begin_call(&self, call: Arc<dyn Outstanding>) -> Option<CallKey> {
        let mut begun = self.begun();
        let opened = begun.opened;
        begun.open.then(|| CallKey { opened, index: begun.calls.insert(call) })
    }

    /// The call has been answered, or its caller told.
    pub(crate) fn end_call(&self, key: CallKey) {
        let mut begun = self.begun();
        let call = if begun.opened == key.opened { begun.calls.try_remove(key.index) } else { None };
        drop(begun);
        drop(call);
    }

    pub(crate) fn hand(&self, connection: Handed) {
        self.handed.push(connection);
        self.announce();
    }

    pub(crate) fn wake(&self, task: u32) {
        self.wakes.push(task);
        self.announce();
    }

    /// Has the executor look into what is not kept here: values that came home to its thread.
    pub(crate) fn nudge(&self) {
        self.announce();
    }

    /// To be called when something has been put in. What had been said before.
    fn announce(&self) -> usize {
        // In a flood most find that another one has said so, and write nothing: the word's cache line stays where it is. Who
        // wipes announcements out, or closes, has a fence behind it too: either this load sees that, or what was put in
        // before is found in the queues.
        fence(Ordering::SeqCst);
        let said = self.said.0.load(Ordering::Relaxed);
        if said >= ANNOUNCED {
            return said;
        }
        let before = self.said.0.fetch_add(ANNOUNCED, Ordering::AcqRel);
        if before < ANNOUNCED && before & ASLEEP != 0 {
            self.eventfd.signal();
        }
        before
    }

    /// Whether anything has been put in since [`Inbox::begin`]; one load.
    pub(crate) fn is_filled(&self) -> bool {
        self.said.0.load(Ordering::Relaxed) >= ANNOUNCED
    }

    /// To be called before emptying the queues: what comes later announces itself anew.
    pub(crate) fn begin(&self) {
        self.said.0.fetch_and(ASLEEP | OPEN, Ordering::AcqRel);
        // See `announce`.
        fence(Ordering::SeqCst);
    }

    /// Undoes [`Inbox::begin`]: the queues have not been emptied.
    pub(crate) fn look_again(&self) {
        self.said.0.fetch_add(ANNOUNCED, Ordering::AcqRel);
    }

    /// Forgets orders that were meant for a thread that has ended.
    pub(crate) fn forget_orders(&self) {
        while self.orders.pop().is_some() {}
    }

    pub(crate) fn next_order(&self) -> Option<Order> {
        self.orders.pop()
    }

    /// Number of jobs that wait.
    pub(crate) fn jobs(&self) -> usize {
        self.jobs.len()
    }

    pub(crate) fn next_job(&self) -> Option<Job> {
        self.jobs.pop()
    }

    pub(crate) fn next_handed(&self) -> Option<Handed> {
        self.handed.pop()
    }

    /// Number of connections handed over and not yet adopted.
    pub(crate) fn handed(&self) -> usize {
        self.handed.len()
    }

    pub(crate) fn next_wake(&self) -> Option<u32> {
        self.wakes.pop()
    }

    /// Says that the executor is about to sleep; false when it must not, since there is something here.
    pub(crate) fn fall_asleep(&self) -> bool {
        let asleep = |said| (said < ANNOUNCED).then_some(said | ASLEEP);
        self.said.0.fetch_update(Ordering::AcqRel, Ordering::Relaxed, asleep).is_ok()
    }

    pub(crate) fn awake(&self) {
        self.said.0.fetch_and(!ASLEEP, Ordering::AcqRel);
    }
}

/// Runs what may drop a user's values, or wake a user's waker, on a thread that must not end by it.
fn guard(act: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(act)) {
        let panic = caught(payload);
        tracing::error!(
            place = panic.place.as_deref(),
            "what a lost message owned panicked as it was dropped: {panic}"
        );
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::net::driver::{Arrivals, Driver};
    use crate::net::ring::RingOptions;
    use crate::net::ring::tests::{Random, Watchdog, seed_to_replay};

    const POSTERS: u32 = 4;
    const WAKES: u32 = 100_000;

    fn inbox() -> Arc<Inbox> {
        Arc::new(Inbox::new().expect("an eventfd"))
    }

    /// Posters with random pauses against a receiver that sleeps, with no time limit, whenever there is nothing: one
    /// lost wake leaves it asleep for ever.
    #[test]
    fn no_wake_is_lost_and_each_senders_order_is_kept() {
        let seed = seed_to_replay().unwrap_or(7);
        println!("RINGLEADER_SEED={seed}");
        let _watchdog = Watchdog::new(format!("the inbox, RINGLEADER_SEED={seed}"), Duration::from_secs(300));
        let inbox = inbox();
        let posters: Vec<_> = (0..POSTERS)
            .map(|poster| {
                let inbox = Arc::clone(&inbox);
                std::thread::spawn(move || {
                    let mut random = Random::new(seed + u64::from(poster));
                    for number in 0..WAKES {
                        inbox.wake(poster * WAKES + number);
                        // Bursts, with pauses about as long as it takes to fall asleep.
                        for _ in 0..if random.one_in(8) { random.below(2000) } else { 0 } {
                            std::hint::spin_loop();
                        }
                        if random.one_in(500) {
                            std::thread::sleep(Duration::from_micros(random.below(200)));
                        }
                    }
                })
            })
            .collect();
        let mut driver =
            Driver::new(RingOptions { buffers: 1, buffer_bytes: 64 }, Arc::default()).expect("io_uring works here");
        driver.watch_inbox(inbox.as_fd());
        let (mut next, mut left, mut sleeps) = ([0; POSTERS as usize], POSTERS * WAKES, 0_u32);
        let mut arrivals = Arrivals::default();
        while left > 0 {
            driver.turn(false, &mut arrivals).expect("io_uring_enter");
            if inbox.is_filled() {
                inbox.begin();
                while let Some(wake) = inbox.next_wake() {
                    let (poster, number) = ((wake / WAKES) as usize, wake % WAKES);
                    assert_eq!(number, next[poster], "seed {seed}: poster {poster} out of order");
                    next[poster] += 1;
                    left -= 1;
                }
            } else if inbox.fall_asleep() {
                sleeps += 1;
                driver.turn(true, &mut arrivals).expect("io_uring_enter");
                inbox.awake();
            }
        }
        posters.into_iter().for_each(|poster| poster.join().expect("no panic"));
        println!("slept {sleeps} times");
        assert!(sleeps > 100, "the receiver was hardly ever asleep ({sleeps} times): nothing was tested");
    }

    fn refusal(posted: Result<Posted, (Refusal, Job)>) -> Option<Refusal> {
        posted.err().map(|(refusal, _)| refusal)
    }

    #[test]
    fn a_full_inbox_refuses_at_once_and_takes_again_when_there_is_room() {
        let inbox = inbox();
        inbox.open();
        for _ in 0..JOBS_MAX {
            assert_eq!(refusal(inbox.post(Job::Closure(Box::new(|_| {})))), None);
        }
        assert_eq!(refusal(inbox.post(Job::Closure(Box::new(|_| {})))), Some(Refusal::Full));
        inbox.order(Order::Stop);
        assert!(inbox.next_order() == Some(Order::Stop), "an order is never refused");
        assert!(inbox.next_job().is_some());
        assert_eq!(refusal(inbox.post(Job::Closure(Box::new(|_| {})))), None);
    }

    #[test]
    fn a_closed_inbox_takes_nothing_and_keeps_nothing() {
        let inbox = inbox();
        assert_eq!(refusal(inbox.post(Job::Closure(Box::new(|_| {})))), Some(Refusal::Down));
        inbox.open();
        let owned = Arc::new(());
        for _ in 0..3 {
            let owned = Arc::clone(&owned);
            assert_eq!(refusal(inbox.post(Job::Closure(Box::new(move |_| drop(owned))))), None);
        }
        assert_eq!(Arc::strong_count(&owned), 4);
        inbox.close();
        assert_eq!(Arc::strong_count(&owned), 1);
        assert_eq!(refusal(inbox.post(Job::Closure(Box::new(|_| {})))), Some(Refusal::Down));
    }

    #[test]
    fn closing_tells_the_callers_of_what_was_begun_and_of_nothing_else() {
        #[derive(Default)]
        struct Lost(std::sync::atomic::AtomicU32);
        impl Outstanding for Lost {
            fn begin(self: Arc<Self>, _: &Rc<Core>) {}

            fn lose(&self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let inbox = inbox();
        let (ended, begun, late) = (Arc::new(Lost::default()), Arc::new(Lost::default()), Arc::new(Lost::default()));
        inbox.open();
        let key = inbox.begin_call(ended.clone()).expect("it is open");
        let old = inbox.begin_call(begun.clone()).expect("it is open");
        inbox.end_call(key);
        inbox.close();
        assert!(inbox.begin_call(late.clone()).is_none());
        inbox.open();
        inbox.begin_call(late.clone()).expect("it is open again");
        inbox.begin_call(late.clone()).expect("it is open again");
        // The end of a call of an earlier generation, from a thread that hung: not that of the one in its row.
        inbox.end_call(old);
        inbox.close();
        let count = |lost: &Lost| lost.0.load(Ordering::Relaxed);
        assert_eq!((count(&ended), count(&begun), count(&late)), (0, 1, 2));
    }

    /// Posters against somebody who opens and closes: every job is run or dropped, whoever meets it.
    #[test]
    fn no_job_is_forgotten_by_a_close() {
        let inbox = inbox();
        let owned = Arc::new(());
        let posters: Vec<_> = (0..2)
            .map(|_| {
                let (inbox, owned) = (Arc::clone(&inbox), Arc::clone(&owned));
                std::thread::spawn(move || {
                    for _ in 0..20_000 {
                        let owned = Arc::clone(&owned);
                        let job = Job::Closure(Box::new(move |_| drop(owned)));
                        if matches!(inbox.post(job), Ok(Posted::Late)) {
                            inbox.drop_jobs();
                        }
                    }
                })
            })
            .collect();
        while posters.iter().any(|poster| !poster.is_finished()) {
            inbox.open();
            inbox.close();
        }
        posters.into_iter().for_each(|poster| poster.join().expect("no panic"));
        assert_eq!(Arc::strong_count(&owned), 1, "jobs lie in an inbox that is closed");
    }

    #[test]
    fn a_sleeper_is_rung_once_for_many_messages() {
        use std::io::Read;
        let inbox = inbox();
        inbox.open();
        for round in 0..3 {
            inbox.begin();
            while inbox.next_job().is_some() {}
            assert!(inbox.fall_asleep());
            (0..100).for_each(|_| assert!(inbox.post(Job::Closure(Box::new(|_| ()))).is_ok()));
            let mut rung = [0; 8];
            let mut bell = std::fs::File::from(inbox.as_fd().try_clone_to_owned().expect("a descriptor is free"));
            bell.read_exact(&mut rung).expect("it was rung");
            assert_eq!(u64::from_ne_bytes(rung), 1, "round {round}");
            inbox.awake();
        }
    }

    #[test]
    fn an_inbox_that_is_filled_does_not_let_its_executor_sleep() {
        let inbox = inbox();
        assert!(inbox.fall_asleep());
        inbox.awake();
        inbox.wake(1);
        assert!(!inbox.fall_asleep());
        inbox.begin();
        assert_eq!(inbox.next_wake(), Some(1));
        assert!(inbox.fall_asleep());
    }
}
