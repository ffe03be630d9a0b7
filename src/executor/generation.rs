//! One generation: from the start-up closure to teardown. Its main loop runs turns of its own inside glommio's
//! executor and hands over to glommio by the clock, or when there is nothing else to do.
//!
//! A turn: take in completions, look into the inbox, fire timers, accept, poll what is ready, for a millisecond or so; what
//! is left then is polled in the turns that follow, which make one round. When nothing is ready the executor sleeps, on one
//! of two levels: in its own ring while there was traffic a moment ago (one system call, no timer of its own), through
//! glommio when it is idle or waits for glommio's files.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::accept::{Acceptor, Listener};
use super::core::{Core, Failure, Scene};
use super::directory::AtWork;
use super::inbox::{Handed, Order};
use super::park::{LOST_WAKE_MAX, Park};
use super::queues;
use super::slot::SlotSeat;
use super::tasks::OnPanic;
use crate::files;
use crate::net::driver::Arrivals;
use crate::net::ring::OperationKey;
use crate::net::stream::Stream;
use crate::panics::{Panic, caught};
use crate::rarely::Rarely;
use crate::server::sharded::Components;
use crate::server::{Connect, Factory};
use crate::shard::Shard;

/// How often glommio is served while the executor is busy and glommio is known to have work.
const HAND_OVER_BUSY: Duration = Duration::from_millis(1);
/// The same when it is not known to have any, and how long the executor sleeps in its own ring before it parks. This
/// bounds how late something is served that an embedder started on glommio behind our back; it is glommio's own bound
/// for a wake from elsewhere. A hand-over costs five system calls. When it slept as well, through a timer of
/// glommio's, 64 executors on one core with 10 ms here spent two thirds of their time on it.
const HAND_OVER_GUARD: Duration = Duration::from_millis(100);
/// The longest sleep of an idle executor: two wake-ups a second.
const PARK_MAX: Duration = Duration::from_millis(500);
/// The longest time that an executor with a generation sleeps without having run, whatever it waits for.
pub(crate) const REST_MAX: Duration = PARK_MAX.saturating_add(LOST_WAKE_MAX);
/// How long a connection that has not spoken may take to do so, from its accept on, when there is a drain.
pub(crate) const DRAIN_GRACE: Duration = Duration::from_secs(1);
/// How long a client between two requests is waited for when others serve on. A busy client asks again sooner, and is told
/// to close with that answer; one that is closed at a moment of our choice may be in the middle of asking, and fail.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);

/// How long messages of other executors may take of one turn: connections wait meanwhile. 4,096 of 25 us would be a stall.
const MESSAGES_MAX: Duration = Duration::from_millis(5);
/// So many of them are run between two looks at the clock.
const MESSAGES_TIMED: usize = 64;

/// How a generation ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// It drained: true when all that was under way had finished by the deadline. Or it was told to end at once, and there
    /// was nothing left to finish.
    Drained {
        in_time: bool,
    },
    /// It was told to end at once, which cut connections off.
    Stopped,
    Failed(Failure),
}

/// What the turns of a generation have between them.
struct Generation {
    core: Rc<Core>,
    acceptor: Option<Acceptor>,
    /// What is not accepted from yet.
    unwatched: Option<Arc<Vec<Listener>>>,
    /// The watch of each listener.
    watches: Vec<OperationKey>,
    connect: Rc<RefCell<Option<Rc<dyn Connect>>>>,
    arrivals: Arrivals,
    ended: Option<Ended>,
    /// Until it has finished in the drain of a whole server.
    at_work: Option<AtWork>,
    /// Whether it has to wait for the others to finish as well: they may ask it, and whole servers drain for nobody else.
    waits_for_others: bool,
    handed_over: Instant,
    /// Whether anything but a tick came since the last sleep, or a task was polled.
    active: bool,
    /// Whether the supervisor may take it that there is nothing to do.
    parked: bool,
    /// Whether the last turn ended with a wait in the ring, which has taken in what came.
    waited: bool,
    /// Up to when the time in turns has been counted; `None` after a sleep.
    counted: Option<Instant>,
    /// When the present round began; looked at only where requests may be refused.
    round_began: Option<Instant>,
    /// Since when it has been asleep; looked at only where requests may be refused.
    asleep_at: Option<Instant>,
    /// Whether the supervisor has been told that the slot is full.
    full: bool,
    announced: bool,
    /// Submissions that the kernel put off.
    put_off: Rarely,
}

/// What to do after a turn.
enum Next {
    Turn,
    HandOver,
    /// Give way to glommio's task queues.
    GiveWay,
    /// Sleep through glommio, this long at most.
    Park(Duration),
    End,
}

/// Runs generation `number` in `seat` until it ends, and takes it down.
pub(crate) async fn run(seat: &SlotSeat, number: u64, park: &mut Park) -> Ended {
    let core = match start(seat, number, park) {
        Ok(core) => core,
        Err(error) => return Ended::Failed(Failure::of_setup("setting up the executor's io_uring", &error)),
    };
    let connect = boot(&core, Arc::clone(&seat.factory), seat.components.clone());
    let mut generation = Generation {
        acceptor: None,
        unwatched: None,
        watches: Vec::new(),
        connect,
        arrivals: Arrivals::default(),
        ended: None,
        at_work: Some(seat.at_work()),
        waits_for_others: false,
        handed_over: Instant::now(),
        active: true,
        parked: false,
        waited: false,
        counted: None,
        round_began: None,
        asleep_at: None,
        full: false,
        announced: false,
        put_off: Rarely::default(),
        core: Rc::clone(&core),
    };
    seat.rouse();
    let ended = generation.turns(seat, park).await;
    seat.heartbeat.busy(Instant::now());
    generation.rouse(seat);
    // The user's things may call their host's runtime as they are dropped.
    let host = seat.settings.host.enter();
    // They may panic, too; the ring must come down all the same.
    let dropped = catch_unwind(AssertUnwindSafe(|| {
        core.tasks.clear(|panic| core.log(Scene::TearDown, &panic));
        drop(generation);
    }));
    if let Err(payload) = dropped {
        core.log(Scene::TearDown, &caught(payload));
    }
    core.tear_down();
    core.leave_host(host);
    seat.heartbeat.asleep();
    ended
}

fn start(seat: &SlotSeat, number: u64, park: &Park) -> io::Result<Rc<Core>> {
    let core = Core::new(seat, number)?;
    seat.cells.generation.set(number);
    seat.cells.open.set(0);
    seat.cells.in_flight.set(0);
    let prepared = (|| {
        let mut driver = core.driver();
        driver.ring().register_eventfd(park.ring_bell())?;
        driver.ring().signal_eventfd(false);
        driver.watch_inbox(seat.inbox.as_fd());
        Ok(())
    })();
    match prepared {
        Ok(()) => Ok(core),
        Err(error) => {
            core.tear_down();
            Err(error)
        }
    }
}

/// Starts the start-up closure as a task, after the closures of the components; what it makes appears in the cell it
/// returns. Between the two messages of other executors begin to be taken: they need the components only, and start-up
/// closures may ask one another.
fn boot(core: &Rc<Core>, factory: Arc<dyn Factory>, components: Components) -> Rc<RefCell<Option<Rc<dyn Connect>>>> {
    let place = Rc::new(RefCell::new(None));
    let (made, home) = (Rc::clone(&place), Rc::clone(core));
    let shard = Shard::new(core);
    let start = async move {
        for component in components.iter() {
            match component.build(shard.clone()).await {
                Ok(state) => home.states.add(component.key(), state),
                Err(error) => {
                    let what = format!("the sharded state '{}': {error}", component.name());
                    return home.fail(Failure::of_start_up(what, &*error));
                }
            }
        }
        home.states.complete();
        // Those that came meanwhile have been announced in vain.
        home.inbox.look_again();
        match factory.boot(shard).await {
            Ok(connect) => *made.borrow_mut() = Some(connect),
            Err(error) => home.fail(Failure::of_start_up(error.to_string(), &*error)),
        }
    };
    core.spawn(Box::pin(start), OnPanic::Escape);
    place
}

impl Generation {
    async fn turns(&mut self, seat: &SlotSeat, park: &mut Park) -> Ended {
        loop {
            // A panic in what follows is ours, not a task's: it costs this generation.
            match catch_unwind(AssertUnwindSafe(|| self.turn(seat))) {
                Ok(Next::Turn) => {}
                Ok(Next::GiveWay) => park.give_way(queues::open()).await,
                Ok(Next::HandOver) => {
                    queues::close();
                    park.hand_over().await;
                    self.handed_over = Instant::now();
                }
                Ok(Next::Park(limit)) => {
                    self.core.driver().ring().signal_eventfd(true);
                    // What the kernel completed before the signal was switched on would ring no bell.
                    if !self.core.driver().ring().wants_enter() {
                        self.rest(seat);
                        self.park(seat);
                        queues::close();
                        let woken = |context: &mut Context<'_>| match queues::due() {
                            0 => self.core.tasks.poll_woken(context),
                            _ => Poll::Ready(()),
                        };
                        park.wait(limit, woken).await;
                        self.core.tasks.awake();
                    }
                    self.core.driver().ring().signal_eventfd(false);
                    seat.inbox.awake();
                    self.handed_over = Instant::now();
                }
                Ok(Next::End) => return self.ended.take().unwrap_or(Ended::Stopped),
                Err(payload) => return Ended::Failed(Failure::Panicked(caught(payload))),
            }
        }
    }

    fn turn(&mut self, seat: &SlotSeat) -> Next {
        let core = Rc::clone(&self.core);
        let host = core.settings.host.enter();
        let next = self.turn_in_host(seat);
        core.leave_host(host);
        next
    }

    fn turn_in_host(&mut self, seat: &SlotSeat) -> Next {
        let core = Rc::clone(&self.core);
        self.begin_turn(seat);
        core.log_suppressed();
        self.take_in(seat);
        core.fire_timers();
        self.accept(seat);
        self.note_fullness(seat);
        if core.tasks.ready() > 0 {
            // What a timer woke may have called other executors: the answers are nearer than glommio.
            self.active = true;
            self.rouse(seat);
        }
        core.driver().begin_turn(core.tasks.ready());
        core.tasks.poll_ready(core.now(), |on_panic, panic| contained_or_not(&core, on_panic, panic));
        core.driver().end_turn();
        self.announce(seat);
        if !self.is_over() {
            return self.sleep_or_go_on(seat);
        }
        // What has been answered in this turn goes out before the sockets are closed.
        self.enter(false);
        Next::End
    }

    fn begin_turn(&mut self, seat: &SlotSeat) {
        let now = Instant::now();
        seat.heartbeat.busy(now);
        if let Some(before) = self.counted.replace(now) {
            self.core.cells.busy.add(now.saturating_duration_since(before).as_nanos() as u64);
        }
        self.core.begin_turn(now);
        self.core.cells.turns.add(1);
        if self.core.tasks.is_between_rounds() {
            self.note_delay();
        }
    }

    /// The executor is about to sleep: nobody is to take that for work.
    fn rest(&mut self, seat: &SlotSeat) {
        if let Some(before) = self.counted.take() {
            self.core.cells.busy.add(before.elapsed().as_nanos() as u64);
        }
        seat.heartbeat.asleep();
    }

    fn park(&mut self, seat: &SlotSeat) {
        if !self.parked {
            self.parked = true;
            seat.presence.park();
        }
    }

    /// Something is about to run. The two turns a second in which an idle executor finds nothing rouse nobody.
    fn rouse(&mut self, seat: &SlotSeat) {
        if std::mem::take(&mut self.parked) {
            seat.rouse();
        }
    }

    /// How long the last round took, and the sleep after it.
    fn note_delay(&mut self) {
        if let Some(shedder) = &self.core.shedder {
            let now = self.core.now();
            let last = self.round_began.replace(now).unwrap_or(now);
            let asleep_at = self.asleep_at.take().unwrap_or(now);
            shedder.borrow_mut().round_began(now, asleep_at.duration_since(last), now.duration_since(asleep_at));
        }
    }

    /// Completions of the ring and what is in the inbox.
    fn take_in(&mut self, seat: &SlotSeat) {
        if !std::mem::take(&mut self.waited) {
            self.enter(false);
        }
        for listener in self.arrivals.listeners.drain(..) {
            if let Some(acceptor) = &mut self.acceptor {
                acceptor.note_ready(listener);
            }
        }
        self.watch_again(seat);
        if seat.inbox.is_filled() {
            self.rouse(seat);
            self.active = true;
            seat.inbox.begin();
            self.core.tasks.woken_elsewhere(std::iter::from_fn(|| seat.inbox.next_wake()));
            // What follows the order to end is for the thread.
            while self.ended.is_none()
                && let Some(order) = seat.inbox.next_order()
            {
                self.obey(order, seat);
            }
            self.adopt_handed(seat);
            let core = Rc::clone(&self.core);
            core.home.take_back(|panic| core.contained(Scene::Returned, panic));
            // Those there are now: one that posts another has announced it, for the next turn.
            let jobs = if self.core.states.are_complete() { seat.inbox.jobs() } else { 0 };
            for number in 1..=jobs {
                let Some(job) = seat.inbox.next_job() else { break };
                job.run(&self.core);
                let enough = number % MESSAGES_TIMED == 0 && core.now().elapsed() >= MESSAGES_MAX;
                if enough && number < jobs {
                    seat.inbox.look_again();
                    break;
                }
            }
        }
    }

    /// The kernel ends a watch when it could not post a completion.
    fn watch_again(&mut self, seat: &SlotSeat) {
        if std::mem::take(&mut self.arrivals.inbox_unwatched) {
            self.core.driver().watch_inbox(seat.inbox.as_fd());
        }
        for listener in self.arrivals.unwatched.drain(..) {
            if let Some(acceptor) = &self.acceptor {
                let watch =
                    self.core.driver().watch_listener(acceptor.listeners()[listener as usize].fd.as_fd(), listener);
                self.watches[listener as usize] = watch;
            }
        }
    }

    fn enter(&mut self, wait: bool) {
        self.arrivals.activity = false;
        if let Err(error) = self.core.driver().turn(wait, &mut self.arrivals) {
            self.core.fail(Failure::Panicked(Panic::of(format!("io_uring_enter: {error}"))));
        }
        let put_off = self.core.driver().ring().take_put_off();
        if let Some(error) = put_off {
            self.note_put_off(&error);
        }
        self.active |= self.arrivals.activity;
    }

    /// Nothing is lost by it: what was submitted stays so, and the next turn enters again.
    fn note_put_off(&mut self, error: &io::Error) {
        self.put_off.count(1);
        if let Some(times) = self.put_off.say(Instant::now()) {
            let slot = self.core.slot;
            tracing::warn!(slot, times, %error, "io_uring_enter was put off by the kernel and is tried again");
        }
    }

    fn obey(&mut self, order: Order, seat: &SlotSeat) {
        match order {
            Order::Accept => self.listen(),
            Order::Drain { deadline, accept_rest, patient } => {
                if accept_rest {
                    self.listen();
                }
                // Scaled down, its keys are others' already.
                self.waits_for_others = accept_rest;
                self.release_listeners(accept_rest, seat);
                self.core.drain(deadline, if patient { DRAIN_PATIENCE } else { Duration::ZERO });
            }
            Order::Stop | Order::Quit => self.ended = Some(Ended::Stopped),
            Order::Start(number) => {
                debug_assert!(false, "ordered to start generation {number} while one lives");
            }
        }
    }

    /// Whether what comes in is another's to take: the listeners' queues and the slot outlive this generation. One that
    /// hung, in a message of this very turn perhaps, is told so before it finds its orders.
    fn has_ended(&self, seat: &SlotSeat) -> bool {
        self.ended.is_some() || self.core.failure().is_some() || seat.is_given_up()
    }

    fn accept(&mut self, seat: &SlotSeat) {
        let Some(acceptor) = &self.acceptor else { return };
        if !acceptor.has_work(self.core.now(), self.core.cells.open.get()) || self.has_ended(seat) {
            return;
        }
        let (core, connect) = (Rc::clone(&self.core), self.connect.borrow().clone());
        let (Some(connect), Some(acceptor)) = (connect, &mut self.acceptor) else { return };
        self.active = true;
        acceptor.accept(core.now(), &core.cells, |fd, peer, name| adopt(&core, Rc::clone(&connect), fd, peer, name));
    }

    /// Takes over what the supervisor accepted for this executor. Before the service is there it waits.
    fn adopt_handed(&mut self, seat: &SlotSeat) {
        if self.has_ended(seat) {
            return;
        }
        let Some(connect) = self.connect.borrow().clone() else { return };
        while let Some(Handed { fd, peer, listener }) = seat.inbox.next_handed() {
            self.core.cells.accepted.add(1);
            self.core.cells.rescued.add(1);
            adopt(&self.core, Rc::clone(&connect), fd, peer, &listener);
        }
    }

    /// Tells the supervisor when the slot has become full, or has room again: new connections go where there is room.
    fn note_fullness(&mut self, seat: &SlotSeat) {
        let Some(acceptor) = &self.acceptor else { return };
        let full = acceptor.is_full(self.core.cells.open.get(), self.full);
        if full != self.full {
            self.full = full;
            seat.full(self.core.generation, full);
        }
    }

    /// Lets go of the listeners. Where nobody else holds them, what the kernel has completed already is taken first, and
    /// from here on new clients are refused, not left waiting.
    fn release_listeners(&mut self, accept_rest: bool, seat: &SlotSeat) {
        if accept_rest {
            self.accept_rest(seat);
        }
        for watch in self.watches.drain(..) {
            self.core.driver().unwatch_listener(watch);
        }
        self.enter(false);
        if accept_rest {
            self.accept_rest(seat);
        }
        (self.acceptor, self.unwatched) = (None, None);
    }

    /// Accepts until the queues are empty (or the connection limit is reached).
    fn accept_rest(&mut self, seat: &SlotSeat) {
        let most = self.acceptor.as_ref().map_or(0, |acceptor| acceptor.listeners().len() * 128);
        for _ in 0..most {
            if let Some(acceptor) = &mut self.acceptor {
                (0..acceptor.listeners().len() as u32).for_each(|listener| acceptor.note_ready(listener));
            }
            let before = self.core.cells.accepted.get();
            self.accept(seat);
            if self.core.cells.accepted.get() == before {
                break;
            }
        }
    }

    /// Once the service is there: accepts, and says so. In a process that takes over it accepts when all can: if the start of
    /// another failed its clients would be cut off, whom the process that still serves would have served.
    fn announce(&mut self, seat: &SlotSeat) {
        if self.announced || self.connect.borrow().is_none() || seat.is_given_up() {
            return;
        }
        self.announced = true;
        self.unwatched = seat.listeners().filter(|_| self.core.draining().is_none());
        if seat.accepting.load(Ordering::SeqCst) {
            self.listen();
        }
        self.adopt_handed(seat);
        seat.ready(self.core.generation);
        self.active = true;
    }

    fn listen(&mut self) {
        let Some(listeners) = self.unwatched.take() else { return };
        for (index, listener) in listeners.iter().enumerate() {
            let watch = self.core.driver().watch_listener(listener.fd.as_fd(), index as u32);
            self.watches.push(watch);
        }
        self.acceptor = Some(Acceptor::new(listeners, self.core.settings.connections_max));
        self.active = true;
    }

    fn is_over(&mut self) -> bool {
        let finished = self.core.cells.open.get() == 0 && !self.owes_answers();
        if let Some(failure) = self.core.failure() {
            self.ended = Some(Ended::Failed(failure.clone()));
        } else if let (None, Some(deadline)) = (&self.ended, self.core.draining()) {
            if finished && self.waits_for_others {
                self.at_work = None;
            }
            let alone = !self.waits_for_others || self.core.directory.is_quiet();
            if (finished && alone) || self.core.now() >= deadline {
                self.ended = Some(Ended::Drained { in_time: finished || self.cuts_off_nobody() });
            }
        } else if let (Some(Ended::Stopped), true) =
            (&self.ended, finished || (self.core.draining().is_some() && self.cuts_off_nobody()))
        {
            self.ended = Some(Ended::Drained { in_time: true });
        }
        self.ended.is_some()
    }

    /// Whether the end of a drain is nobody's loss: who has asked for nothing has none.
    fn cuts_off_nobody(&self) -> bool {
        self.core.cells.open.get() == self.core.quiet.get() && !self.owes_answers()
    }

    /// Whether others wait for this executor: a drain answers their calls as it answers requests.
    fn owes_answers(&self) -> bool {
        self.core.calls.get() > 0 || (self.core.states.are_complete() && self.core.inbox.jobs() > 0)
    }

    fn sleep_or_go_on(&mut self, seat: &SlotSeat) -> Next {
        let core = Rc::clone(&self.core);
        let now = core.now();
        let glommio_works = files::outstanding() > 0;
        let due = if glommio_works { HAND_OVER_BUSY } else { HAND_OVER_GUARD };
        let open = core.cells.open.get();
        let busy =
            core.tasks.ready() > 0 || self.acceptor.as_ref().is_some_and(|acceptor| acceptor.has_work(now, open));
        let queued = queues::due() > 0;
        if busy || queued {
            self.active |= queued;
            let other = if queued { Next::GiveWay } else { Next::Turn };
            return if now.duration_since(self.handed_over) >= due { Next::HandOver } else { other };
        }
        if !seat.inbox.fall_asleep() {
            return Next::Turn;
        }
        self.asleep_at = core.shedder.is_some().then(Instant::now);
        core.cells.sleeps.add(1);
        if glommio_works || !std::mem::take(&mut self.active) {
            // Submit what is queued before sleeping elsewhere; what completes meanwhile rings.
            if core.driver().ring().wants_enter() {
                seat.inbox.awake();
                self.active = true;
                self.enter(false);
                return Next::Turn;
            }
            // Not at the first park: a burst may follow the other within less than a second.
            if self.parked && !glommio_works {
                core.give_memory_back();
            }
            return Next::Park(
                self.next_deadline().map_or(PARK_MAX, |at| at.saturating_duration_since(now)).min(PARK_MAX),
            );
        }
        if core.driver().has_queued_sends() {
            // Their completions would end the wait at once: hand them over first.
            seat.inbox.awake();
            self.active = true;
            return Next::Turn;
        }
        let latest = now + HAND_OVER_GUARD;
        core.driver().wake_by(self.next_deadline().map_or(latest, |at| at.min(latest)), now);
        self.rest(seat);
        self.enter(true);
        self.waited = true;
        seat.inbox.awake();
        if core.now().duration_since(self.handed_over) >= due { Next::HandOver } else { Next::Turn }
    }

    /// When something is to be done although nothing arrives.
    fn next_deadline(&self) -> Option<Instant> {
        let rest = self.acceptor.as_ref().and_then(Acceptor::look_again);
        [self.core.next_timer(), self.core.draining(), rest].into_iter().flatten().min()
    }
}

fn adopt(core: &Rc<Core>, connect: Rc<dyn Connect>, fd: OwnedFd, peer: SocketAddr, name: &Arc<str>) {
    let key = core.driver().adopt(fd);
    let stream = Stream::new(Rc::clone(core), key);
    core.cells.open.add(1);
    core.spawn(connect.connect(stream, peer, name), OnPanic::Contain);
}

fn contained_or_not(core: &Core, on_panic: OnPanic, panic: Panic) {
    match on_panic {
        OnPanic::Contain => core.contained(Scene::Connection, panic),
        OnPanic::Escape => core.fail(Failure::Panicked(panic)),
    }
}
