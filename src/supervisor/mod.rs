//! The supervisor: one plain thread that owns the slots. It turns what it hears (reports of slots, orders of handles,
//! signals, heartbeats) into events for the pure [`policy`], and carries out the actions that come back. It decides
//! nothing itself.

mod backtrace;
mod exit;
mod fall;
pub(crate) mod handover;
mod late;
mod listeners;
mod load;
pub(crate) mod policy;
pub(crate) mod post;
pub(crate) mod provoke;
mod rescue;
pub(crate) mod signals;
mod steer;
mod threads;
mod watch;
mod watchdog;
mod words;

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::Error;
use crate::blocking::Pool;
use crate::error::Kind;
use crate::executor::core::Failure;
use crate::executor::directory::Directory;
use crate::executor::generation::Ended;
use crate::executor::inbox::Order as SlotOrder;
use crate::executor::lookout::Lookout;
use crate::executor::slot::{self, Report, SlotSeat};
use crate::executor::threads::Employment;
use crate::handle::{ExecutorState, Exit, Running, Shared, Stop};
use crate::order::{Order, Promise};
use crate::steering::Table;
use crate::sys::affinity;
use crate::sys::limits;
use crate::sys::poll::wait_readable;
use crate::sys::thread;
use backtrace::Scribe;
use handover::Handover;
use policy::{Action, DrainReason, End, Event, Outcome, Policy, Readiness, SlotLoad, SlotState, StopMode, later};
use post::{Message, PostBox};
use rescue::Rescue;
use steer::Steer;
use threads::Ending;
use watchdog::Watchdog;

/// How soon connections that no executor had room for are tried again.
const RESCUE_AGAIN: Duration = Duration::from_millis(10);

/// How a server is to be supervised.
pub(crate) struct Supervision {
    pub name: String,
    pub policy: policy::Config,
    /// How long a turn may take until a steering program that can looks for another executor.
    pub stale_after: Duration,
    pub signals: signals::Wanted,
    pub handover: Handover,
    /// Whether the log says what a stalled executor is doing, which takes a signal.
    pub stall_backtraces: bool,
    pub blocking: Arc<Pool>,
    pub lookout: Arc<Lookout>,
}

struct Supervisor {
    name: String,
    policy: Policy,
    seats: Vec<Arc<SlotSeat>>,
    /// By slot and number; those joined are gone. `None` is one that could not be started.
    threads: HashMap<(u16, u32), Option<Employment>>,
    /// The seats of threads that were left behind, for the orders to them.
    left_behind: HashMap<(u16, u32), Arc<SlotSeat>>,
    /// Those that have been told to return.
    ending: Vec<Ending>,
    steer: Steer,
    rescue: Rescue,
    /// The slots of which the policy says that nobody accepts there.
    left_alone: Vec<u16>,
    watchdog: Watchdog,
    scribe: Scribe,
    scaling: Option<Sampling>,
    shared: Arc<Shared>,
    starting: Option<Promise<Running>>,
    /// Who waits for the answer to an order to scale, the oldest first.
    scale_orders: VecDeque<Promise<()>>,
    /// What the last failure of each slot said, for messages.
    failures: HashMap<u16, String>,
    signals: Option<signals::Watch>,
    stop_signals: u32,
    /// A generation that ended during the stop had something left to finish.
    cut_off: bool,
    blocking: Arc<Pool>,
    /// Of the drain, while nobody has ordered an immediate stop.
    drain_deadline: Option<Instant>,
    handover: Handover,
}

/// When the next sample of the load is due, for automatic scaling.
struct Sampling {
    sampler: load::Sampler,
    period: Duration,
    next: Instant,
}

/// Starts the supervisor's thread, which starts the executors.
pub(crate) fn start(
    supervision: Supervision,
    seats: Vec<Arc<SlotSeat>>,
    table: Table,
    shared: Arc<Shared>,
    inbox: PostBox,
) -> Result<Order<Running>, Error> {
    let signals = signals::watch(supervision.signals, shared.post.clone());
    let signals = signals.map_err(|error| Error::new(Kind::System, format!("watching for signals: {error}")))?;
    let (promise, order) = Order::new();
    let post = shared.post.clone();
    // Who waits for a start no longer is not to find it done later.
    let order = order.or_when_given_up(move || post.send(Message::Stop(Stop::Now)));
    let seed = u64::from(std::process::id()) ^ Arc::as_ptr(&shared) as u64;
    let policy = Policy::new(supervision.policy.clone(), seats.len() as u16, seed);
    let sampling = |period| Sampling { sampler: load::Sampler::default(), period, next: later(Instant::now(), period) };
    let supervisor = Supervisor {
        watchdog: Watchdog::new(supervision.policy.stall_limit, supervision.stall_backtraces, supervision.lookout),
        scribe: Scribe::default(),
        scaling: policy.sample_period().map(sampling),
        policy,
        name: supervision.name.clone(),
        seats,
        threads: HashMap::new(),
        left_behind: HashMap::new(),
        ending: Vec::new(),
        steer: Steer::new(table, supervision.stale_after),
        rescue: Rescue::default(),
        left_alone: Vec::new(),
        shared,
        starting: Some(promise),
        scale_orders: VecDeque::new(),
        failures: HashMap::new(),
        signals,
        stop_signals: 0,
        cut_off: false,
        blocking: supervision.blocking,
        drain_deadline: None,
        handover: supervision.handover,
    };
    std::thread::Builder::new()
        .name(thread::name(&supervision.name, &"sup"))
        .spawn(move || supervisor.run(&inbox))
        .map_err(|error| {
            Error::new(Kind::System, format!("starting the supervisor's thread: {}", limits::explained(&error)))
        })?;
    Ok(order)
}

/// What happens.
impl Supervisor {
    fn supervise(&mut self, inbox: &PostBox) -> Outcome {
        let mut events = VecDeque::from([Event::Start]);
        loop {
            while let Some(event) = events.pop_front() {
                let actions = self.policy.step(event, Instant::now());
                // Others may be there now than those it looked at; one that starts has not parked, so it does not tell.
                self.watchdog.look_soon();
                // Before anybody is answered, who might look at once.
                self.show();
                self.open_inboxes(&actions);
                for action in actions {
                    if let Action::Exit(outcome) = action {
                        return outcome;
                    }
                    self.act(action);
                }
            }
            self.wait(inbox, &mut events);
        }
    }

    /// Waits for what happens next: a message, a connection to rescue, or something due.
    fn wait(&mut self, inbox: &PostBox, events: &mut VecDeque<Event>) {
        let again = self.rescue.is_blocked().then(|| Instant::now() + RESCUE_AGAIN);
        let sample = self.scaling.as_ref().map(|sampling| sampling.next);
        let due = [
            self.policy.next_deadline(),
            again,
            sample,
            Some(self.watchdog.next_look().unwrap_or_else(Instant::now)),
            self.steer.next_refresh(),
            self.handover.due(),
            self.next_join(),
        ];
        let timeout = due.into_iter().flatten().min().map(|due| due.saturating_duration_since(Instant::now()));
        let waited: Vec<_> = [inbox.as_fd()].into_iter().chain(self.rescue.listeners()).collect();
        let before = Instant::now();
        let ready = wait_readable(&waited, timeout).unwrap_or_else(|error| {
            tracing::error!(%error, "the supervisor cannot wait; it looks again in 10 ms");
            std::thread::sleep(RESCUE_AGAIN);
            Vec::new()
        });
        let late = timeout.map_or(Duration::ZERO, |timeout| before.elapsed().saturating_sub(timeout));
        if late >= self.policy.config().standstill_limit {
            let late_ms = late.as_millis() as u64;
            tracing::warn!(
                late_ms,
                "this process stood still: stopped by a signal, a machine that was paused, or no CPU"
            );
        }
        if ready.first() == Some(&0) {
            inbox.answer_bell();
        }
        while let Some(message) = inbox.next() {
            events.extend(self.event_of_message(message));
        }
        if ready.last().is_some_and(|last| *last > 0) || again.is_some() {
            self.rescue();
        }
        let now = Instant::now();
        events.extend(self.watchdog.look(&self.seats, self.policy.slots(), now));
        events.extend(self.sample(now));
        self.steer.refresh(&self.seats, now);
        self.tell_service_manager(now);
        self.join_ended(now);
        // After the messages: what has come in time is not to be found late.
        if self.policy.next_deadline().is_some_and(|deadline| deadline <= now) {
            events.push_back(Event::Tick);
        }
    }

    fn event_of_message(&mut self, message: Message) -> Option<Event> {
        match message {
            Message::Report(report) => self.event_of(report),
            Message::Stop(how) => {
                if self.handover.is_stopping() {
                    let what = match how {
                        Stop::Now => "it is to stop at once",
                        Stop::Drain(_) => "what was ordered before stands",
                    };
                    tracing::warn!("a stop was ordered while the server stops: {what}");
                }
                self.handover.stopping();
                Some(match how {
                    Stop::Now => self.stop_at_once(),
                    Stop::Drain(limit) => Event::Stop(StopMode::Drain { deadline: Some(limit) }),
                })
            }
            Message::Scale(count, promise) => {
                self.scale_orders.push_back(promise);
                // Beyond what can be said is as far out of range as what can.
                Some(Event::Scale { count: u16::try_from(count).unwrap_or(u16::MAX) })
            }
            Message::Provoke(slot, what, promise) => {
                self.provoke(slot, what, promise);
                None
            }
            Message::Signal(signal) => {
                self.handover.stopping();
                Some(self.event_of_signal(signal))
            }
            Message::Upgrade(asked) => {
                self.handover.asked(asked);
                Some(Event::Upgrade)
            }
            Message::Successor(successor, said) => self.handover.answered(successor, said),
            Message::TakenOver => {
                self.taken_over();
                None
            }
            Message::Reload => {
                self.reload_asked();
                None
            }
            Message::Reloaded(lines) => {
                self.reloaded(&lines);
                None
            }
        }
    }

    fn stop_at_once(&mut self) -> Event {
        self.drain_deadline = None;
        Event::Stop(StopMode::Now)
    }

    fn event_of_signal(&mut self, signal: i32) -> Event {
        self.stop_signals += 1;
        let name = signals::name(signal);
        if self.stop_signals > 1 {
            tracing::warn!(signal = name, "a second signal: stopping at once");
            return self.stop_at_once();
        }
        tracing::info!(signal = name, "draining; a second signal stops at once");
        Event::Stop(StopMode::Drain { deadline: None })
    }

    fn event_of(&mut self, report: Report) -> Option<Event> {
        match report {
            Report::Ready { slot, generation } => {
                if generation > 1 {
                    tracing::info!(slot, generation, "the executor serves again");
                }
                Some(Event::Ready { slot, generation: generation as u32 })
            }
            Report::Roused => {
                self.watchdog.look_soon();
                None
            }
            Report::Full { slot, generation, full } => {
                self.note_full(slot, generation, full);
                None
            }
            Report::Ended { slot, generation, ended } => {
                self.note_full(slot, generation, false);
                // What one that was given up still had was counted then.
                self.cut_off |=
                    !matches!(ended, Ended::Drained { in_time: true }) && !self.is_left_behind(slot, generation);
                let how = match &ended {
                    Ended::Drained { in_time: true } => End::Drained,
                    Ended::Drained { in_time: false } | Ended::Stopped => End::Stopped,
                    Ended::Failed(failure) => self.note_failure(slot, generation, failure),
                };
                Some(Event::Ended { slot, generation: generation as u32, how })
            }
            Report::ThreadEnded { slot, thread, failure } => self.thread_ended(slot, thread, failure.as_ref()),
        }
    }

    /// A thread that was left behind comes back in a slot that is another's.
    fn note_full(&mut self, slot: u16, generation: u64, full: bool) {
        let latest = self.policy.slots().nth(usize::from(slot)).map(|status| u64::from(status.generation));
        if latest == Some(generation) {
            self.steer.set_full(slot, full, &self.seats);
            self.arm_rescue();
        }
    }

    fn note_failure(&mut self, slot: u16, generation: u64, failure: &Failure) -> End {
        let (how, what) = match failure {
            Failure::Start(error) => (End::StartFailed, format!("its start-up failed: {error}")),
            Failure::NoResources(what) => return self.note_shortage(slot, generation, what),
            Failure::Panicked(panic) => (End::Panicked, format!("it panicked: {panic}")),
            Failure::Escalated(last) => (End::Panicked, format!("too many of its panics were contained: {last}")),
            Failure::Background { name, error } => {
                (End::Failed, format!("its background task '{name}' failed: {error}"))
            }
        };
        if self.starting.is_some() {
            // Whoever waits for the start hears of the first; that and no more is the news.
            tracing::debug!(slot, generation, "an executor does not start, {what}");
        } else {
            tracing::error!(slot, generation, "an executor has ended, {what}; its connections are closed");
        }
        let is_news = self.starting.is_none() || self.failures.is_empty();
        if let Some(backtrace) = failure.backtrace().filter(|_| is_news) {
            let write = move || {
                affinity::step_back();
                tracing::error!(slot, generation, "its backtrace:\n{backtrace}");
            };
            if !self.scribe.write(write) {
                tracing::info!(slot, generation, "its backtrace is not shown: another is being written");
            }
        }
        self.failures.insert(slot, what);
        how
    }

    /// The load since the last sample, when the next is due.
    fn sample(&mut self, now: Instant) -> Option<Event> {
        let sampling = self.scaling.as_mut().filter(|sampling| sampling.next <= now)?;
        sampling.next = later(now, sampling.period);
        let mut load = |seat: &Arc<SlotSeat>| SlotLoad {
            slot: seat.slot,
            utilisation: sampling.sampler.utilisation(seat, now),
            queue: load::queue(seat),
        };
        Some(Event::Load { samples: self.seats.iter().map(&mut load).collect() })
    }
}

/// What is done about it.
impl Supervisor {
    fn act(&mut self, action: Action) {
        match action {
            Action::StartGeneration { slot, generation, thread, fresh_thread } => {
                self.start_generation(slot, generation, thread, fresh_thread);
            }
            Action::Drain { slot, deadline, why } => {
                // The queue of a slot that is scaled down is rescued; the successor may not have asked for every address.
                let accept_rest = why != DrainReason::ScaleDown;
                // After a stop there is nobody who would answer.
                let patient = why != DrainReason::Stop;
                if why == DrainReason::ScaleDown {
                    self.directory().leave(slot);
                } else {
                    self.drain_deadline = Some(deadline);
                }
                self.seat(slot).inbox.order(SlotOrder::Drain { deadline, accept_rest, patient });
            }
            Action::StopNow { slot } => self.seat(slot).inbox.order(SlotOrder::Stop),
            Action::Join { slot, thread } => self.join(slot, thread),
            Action::Abandon { slot, thread } => self.abandon(slot, thread),
            Action::Condemn { slot, thread, generation } => self.condemn(slot, thread, generation),
            Action::Abort { slot } => {
                tracing::error!(slot, "an executor hangs: aborting, as the hang policy says");
                std::process::abort();
            }
            Action::SetActive(slots) => {
                self.steer.set_active(slots, &self.seats);
                self.arm_rescue();
            }
            Action::Rescue(slots) => {
                self.left_alone = slots;
                self.arm_rescue();
            }
            Action::Reattach => self.steer.reattach(&self.seats),
            Action::CloseListeners => {
                // What was cut off before was no part of the stop.
                self.cut_off = false;
                self.let_go_of_listeners();
            }
            Action::Readiness(readiness) => {
                if let Readiness::NotReady(why) = readiness {
                    tracing::info!("not ready: {}", words::not_ready(why));
                }
                self.show_readiness(readiness == Readiness::Ready);
            }
            Action::Started => {
                self.accept_everywhere();
                self.announce_start();
                if let Some(promise) = self.starting.take() {
                    promise.fulfil(Ok(Running::new(Arc::clone(&self.shared))));
                }
            }
            Action::StartFailed { slot, failure } => tracing::debug!(slot, ?failure, "the start has failed"),
            Action::StartTimedOut { slot } => {
                tracing::error!(slot, "an executor's start-up takes longer than the start timeout: it is stopped");
                self.failures.insert(slot, "its start-up took too long".to_owned());
            }
            Action::Quarantined { slot, reason } => tracing::error!(
                slot,
                "the slot is quarantined: {}; it gets no executor until the server is restarted",
                words::quarantine(reason)
            ),
            Action::Target { count, why } => tracing::info!(executors = count, "scaling: {}", words::target(why)),
            Action::ScaleAnswer(answer) => self.answer_scale(answer),
            Action::SpawnSuccessor { successor, .. } => self.spawn_successor(successor),
            Action::KillSuccessor { successor } => self.handover.kill_successor(successor),
            Action::UpgradeAnswer(answer) => self.handover.answer(answer),
            Action::Exit(_) => unreachable!("handled by `run`"),
        }
    }

    fn seat(&self, slot: u16) -> &Arc<SlotSeat> {
        &self.seats[usize::from(slot)]
    }

    fn start_generation(&mut self, slot: u16, generation: u32, thread: u32, fresh_thread: bool) {
        if fresh_thread {
            let started = self.vacate(slot).and_then(|()| {
                let seat = self.seat(slot);
                // Again: it is another's seat, or the thread before this one has closed it since.
                seat.inbox.open();
                seat.inbox.forget_orders();
                slot::spawn(Arc::clone(seat), thread)
            });
            let failure = started.as_ref().err().map(|error| Failure::of_setup("starting an executor's thread", error));
            // Known as if it had lived, so that the report counts.
            self.threads.insert((slot, thread), started.ok());
            if let Some(failure) = failure {
                self.seat(slot).inbox.close();
                let report = Report::ThreadEnded { slot, thread, failure: Some(failure) };
                return self.shared.post.send(Message::Report(report));
            }
        }
        self.seat(slot).inbox.order(SlotOrder::Start(u64::from(generation)));
    }

    /// Sees to it that nobody sits in the slot's seat: one that was left behind keeps the seat it has.
    fn vacate(&mut self, slot: u16) -> std::io::Result<()> {
        let seat = Arc::clone(self.seat(slot));
        if !self.is_former(&seat) {
            return Ok(());
        }
        let fresh = seat.replacement()?;
        while let Some(handed) = seat.inbox.next_handed() {
            fresh.inbox.hand(handed);
        }
        self.shared.slots[usize::from(slot)].count_in(Arc::clone(&fresh.cells));
        self.directory().seat(slot, &fresh.inbox);
        self.seats[usize::from(slot)] = fresh;
        Ok(())
    }

    /// Gives up an executor that was told to stop, and does not.
    fn abandon(&mut self, slot: u16, thread: u32) {
        let connections = self.leave_behind(slot, thread);
        tracing::error!(
            slot,
            thread,
            connections,
            "an executor does not answer the order to stop: its connections were ended, its thread is left behind"
        );
    }

    /// All executors are in the same one.
    fn directory(&self) -> &Directory {
        self.seats[0].components.directory()
    }

    /// Before any of these generations runs: the first that does may send messages to all of them.
    fn open_inboxes(&self, actions: &[Action]) {
        for action in actions {
            if let Action::StartGeneration { slot, .. } = action {
                self.directory().join(*slot);
                let seat = self.seat(*slot);
                // One that hangs would keep what it is sent.
                if !self.is_former(seat) {
                    seat.inbox.open();
                }
            }
        }
    }

    /// Gives a hung executor up: its thread may come back, and ends then.
    fn condemn(&mut self, slot: u16, thread: u32, generation: u32) {
        let connections = self.leave_behind(slot, thread);
        tracing::error!(
            slot,
            generation,
            connections,
            "an executor hangs and is replaced: its connections were ended, its thread is left behind"
        );
        self.failures.insert(slot, "it hung".to_owned());
        let seat = self.seat(slot);
        seat.inbox.order(SlotOrder::Stop);
        seat.inbox.order(SlotOrder::Quit);
        self.watchdog.forget(slot);
        self.steer.set_full(slot, false, &self.seats);
        self.arm_rescue();
    }

    /// Ends the connections of an executor from outside, so that its clients do not wait for it; how many there were.
    fn leave_behind(&mut self, slot: u16, thread: u32) -> usize {
        let seat = Arc::clone(self.seat(slot));
        let connections = seat.sockets.shut_down_all();
        // Nor do those who wait for its answers, which it cannot tell.
        seat.inbox.close();
        // Nor do others who drain.
        seat.give_up();
        self.left_behind.insert((slot, thread), seat);
        self.shared.threads_leaked.fetch_add(1, Ordering::Relaxed);
        self.cut_off |= connections > 0;
        connections
    }

    /// Where connections wait for nobody: in the queues of the slots that the policy names, and of those that are full while
    /// others are not. New ones go elsewhere by then, but a burst is faster.
    fn arm_rescue(&mut self) {
        let waiting = self.left_alone.iter().copied().chain(self.steer.overflowing());
        if self.rescue.set(waiting, &self.seats) {
            self.rescue();
        }
    }

    fn rescue(&mut self) -> u64 {
        if self.rescue.is_empty() {
            return 0;
        }
        let before = self.rescue.rescued();
        let count = self.rescue.run(&self.seats, &self.steer.receivers());
        if count > 0 {
            tracing::debug!(count, before, "connections were rescued from queues that nobody empties");
        }
        count
    }

    /// Rescues until nothing is left: whether that came to be. Clients may come faster, but not without end: the steering
    /// sends them elsewhere.
    fn rescue_all(&mut self) -> bool {
        const ROUNDS_MAX: usize = 64;
        (0..ROUNDS_MAX).any(|_| self.rescue() == 0) && !self.rescue.is_blocked()
    }

    /// Every first generation is ready: in a process that takes over each accepts from here on, and those that follow do so as
    /// soon as they are ready.
    fn accept_everywhere(&self) {
        if self.seats[0].accepting.swap(true, Ordering::SeqCst) {
            return;
        }
        // Whatever is said of their health by now.
        for status in self.policy.slots().filter(|status| status.state != SlotState::Idle) {
            self.seat(status.slot).inbox.order(SlotOrder::Accept);
        }
    }

    fn answer_scale(&mut self, answer: Result<u16, policy::ScaleRefusal>) {
        let answer = answer.map(drop).map_err(|refusal| Error::new(Kind::Refused, words::scale_refusal(refusal)));
        if let Err(error) = &answer {
            tracing::warn!("an order to scale was refused: {error}");
        }
        if let Some(promise) = self.scale_orders.pop_front() {
            promise.fulfil(answer);
        }
    }

    /// Lets handles and handlers see whether the server is fit to take traffic.
    fn show_readiness(&self, ready: bool) {
        // After a hand-over, who asks over a connection that was kept means the address, and another process serves it.
        if ready || !self.handover.is_over() {
            self.seats[0].ready.store(ready, Ordering::Relaxed);
        }
        self.shared.ready.store(ready, Ordering::Relaxed);
    }

    /// Lets handles see what the slots are doing.
    fn show(&self) {
        for status in self.policy.slots() {
            let state = match status.state {
                SlotState::Idle | SlotState::Ended => ExecutorState::Idle,
                SlotState::Starting => ExecutorState::Starting,
                SlotState::Ready => ExecutorState::Serving,
                SlotState::Stalled => ExecutorState::Stalled,
                SlotState::Starved => ExecutorState::Starved,
                SlotState::Draining => ExecutorState::Draining,
                SlotState::Stopping => ExecutorState::Stopping,
                SlotState::Backoff => ExecutorState::Backoff,
                SlotState::Quarantined => ExecutorState::Quarantined,
            };
            self.shared.slots[usize::from(status.slot)].set_state(state);
            // Between two generations a slot keeps its keys; here there will be none.
            if matches!(status.state, SlotState::Idle | SlotState::Quarantined) {
                self.directory().leave(status.slot);
            }
        }
    }

    /// Waits for blocking closures that run; how many did not end in time. A stop at once, or a second signal, ends it.
    fn close_blocking(&mut self, inbox: &PostBox) -> usize {
        const LOOK: Duration = Duration::from_millis(50);
        // After a stop that was not a drain, as long as executors may.
        let grace = self.policy.config().stop_grace;
        let deadline = self.drain_deadline.unwrap_or_else(|| later(Instant::now(), grace));
        loop {
            let now = Instant::now();
            let left = self.blocking.close(deadline.min(now + LOOK));
            let hurry = |message| matches!(message, Message::Signal(_) | Message::Stop(Stop::Now));
            if left == 0 || now >= deadline || std::iter::from_fn(|| inbox.next()).any(hurry) {
                if left > 0 {
                    tracing::error!(closures = left, "blocking closures do not end: their threads are left behind");
                }
                return left;
            }
        }
    }

    /// Gives back what can be; what everybody is told who waits for the end.
    fn exit(&mut self, outcome: Outcome, inbox: &PostBox) -> Result<Exit, Error> {
        self.end_listeners();
        self.show();
        // Whoever still holds a token gets answers, and keeps no descriptor open.
        self.seats.iter().chain(self.former_seats()).for_each(|seat| seat.inbox.close());
        self.directory().clear();
        let threads_left = self.await_ending();
        let abandoned_closures = self.close_blocking(inbox);
        drop(self.signals.take());
        self.shared.ready.store(false, Ordering::Relaxed);
        let failure_of = |slot: Option<u16>| match slot {
            Some(slot) => self.failures.get(&slot).cloned(),
            None => self.failures.values().next().cloned(),
        };
        let lost = self.handover.heir_has_failed();
        let outcome = exit::unless_cut_off(outcome, self.cut_off);
        let result = exit::result(outcome, self.starting.is_none(), threads_left, abandoned_closures, lost, failure_of);
        if let Err(error) = &result {
            self.handover.refuse(error);
        }
        if let (Some(promise), Err(error)) = (self.starting.take(), &result) {
            promise.fulfil(Err(error.clone()));
        } else {
            tracing::debug!(name = self.name, ?outcome, "the server has ended");
        }
        result
    }
}
