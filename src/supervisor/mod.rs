//! The supervisor: one plain thread that owns the slots. It turns what it hears (reports of slots, orders of handles,
//! signals) into events for the pure [`policy`], and carries out the actions that come back. It decides nothing itself.

pub(crate) mod policy;
pub(crate) mod post;
mod rescue;
mod signals;

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::Error;
use crate::error::Kind;
use crate::executor::core::Failure;
use crate::executor::generation::Ended;
use crate::executor::inbox::Order as SlotOrder;
use crate::executor::slot::{self, Report, SlotSeat};
use crate::handle::{Exit, Running, Shared, Stop};
use crate::order::{Order, Promise};
use crate::steering::Table;
use crate::sys::poll::wait_readable;
use policy::{Action, End, Event, Outcome, Policy, Readiness, StopMode, Stopped};
use post::{Message, PostBox};
use rescue::Rescue;

/// How soon connections that no executor had room for are tried again.
const RESCUE_AGAIN: Duration = Duration::from_millis(10);

/// How a server is to be supervised.
pub(crate) struct Supervision {
    pub name: String,
    pub policy: policy::Config,
    pub stop_on_signals: bool,
}

struct Supervisor {
    name: String,
    policy: Policy,
    seats: Vec<Arc<SlotSeat>>,
    /// By slot and number; those joined are gone.
    threads: HashMap<(u16, u32), JoinHandle<()>>,
    /// `None` once the server stops, so that listeners can close.
    table: Option<Table>,
    /// The slots that the policy wants new connections to go to.
    active: Vec<u16>,
    /// Those that have no place for one.
    full: HashSet<u16>,
    shared: Arc<Shared>,
    starting: Option<Promise<Running>>,
    /// What the last failure of each slot said, for messages.
    failures: HashMap<u16, String>,
    rescue: Rescue,
    signals: Option<signals::Watch>,
    stop_signals: u32,
}

/// Starts the supervisor's thread, which starts the executors.
pub(crate) fn start(
    supervision: Supervision,
    seats: Vec<Arc<SlotSeat>>,
    table: Table,
    shared: Arc<Shared>,
    inbox: PostBox,
) -> Result<Order<Running>, Error> {
    let signals = supervision.stop_on_signals.then(|| signals::watch(shared.post.clone())).transpose();
    let signals = signals.map_err(|error| Error::new(Kind::System, format!("watching for signals: {error}")))?;
    let (promise, order) = Order::new();
    let seed = u64::from(std::process::id()) ^ Arc::as_ptr(&shared) as u64;
    let supervisor = Supervisor {
        policy: Policy::new(supervision.policy, seats.len() as u16, seed),
        name: supervision.name.clone(),
        seats,
        threads: HashMap::new(),
        table: Some(table),
        active: Vec::new(),
        full: HashSet::new(),
        shared,
        starting: Some(promise),
        failures: HashMap::new(),
        rescue: Rescue::default(),
        signals,
        stop_signals: 0,
    };
    std::thread::Builder::new()
        .name(format!("{}-sup", supervision.name))
        .spawn(move || supervisor.run(&inbox))
        .map_err(|error| Error::new(Kind::System, format!("starting the supervisor's thread: {error}")))?;
    Ok(order)
}

impl Supervisor {
    fn run(mut self, inbox: &PostBox) {
        let mut events = VecDeque::from([Event::Start]);
        loop {
            while let Some(event) = events.pop_front() {
                for action in self.policy.step(event, Instant::now()) {
                    if let Action::Exit(outcome) = action {
                        return self.exit(outcome);
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
        let due = [self.policy.next_deadline(), again].into_iter().flatten().min();
        let timeout = due.map(|due| due.saturating_duration_since(Instant::now()));
        let waited: Vec<_> = [inbox.as_fd()].into_iter().chain(self.rescue.listeners()).collect();
        let ready = wait_readable(&waited, timeout).unwrap_or_else(|error| {
            tracing::error!(%error, "the supervisor cannot wait; it looks again in 10 ms");
            std::thread::sleep(RESCUE_AGAIN);
            Vec::new()
        });
        if ready.first() == Some(&0) {
            inbox.answer_bell();
        }
        while let Some(message) = inbox.next() {
            events.extend(self.event_of_message(message));
        }
        if ready.last().is_some_and(|last| *last > 0) || again.is_some() {
            self.rescue();
        }
        // After the messages: what has come in time is not to be found late.
        if self.policy.next_deadline().is_some_and(|deadline| deadline <= Instant::now()) {
            events.push_back(Event::Tick);
        }
    }

    fn event_of_message(&mut self, message: Message) -> Option<Event> {
        match message {
            Message::Report(report) => self.event_of(report),
            Message::Stop(how) => Some(Event::Stop(match how {
                Stop::Now => StopMode::Now,
                Stop::Drain(limit) => StopMode::Drain { deadline: Some(limit) },
            })),
            Message::Signal(signal) => Some(self.event_of_signal(signal)),
        }
    }

    fn rescue(&mut self) {
        let receivers: Vec<u16> = self.active.iter().copied().filter(|slot| !self.full.contains(slot)).collect();
        self.rescue.run(&self.seats, &receivers);
    }

    fn event_of_signal(&mut self, signal: i32) -> Event {
        self.stop_signals += 1;
        let name = signals::name(signal);
        if self.stop_signals > 1 {
            tracing::warn!(signal = name, "a second signal: stopping at once");
            return Event::Stop(StopMode::Now);
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
            Report::Full { slot, full } => {
                if full {
                    self.full.insert(slot)
                } else {
                    self.full.remove(&slot)
                };
                self.steer();
                None
            }
            Report::Ended { slot, generation, ended } => {
                self.full.remove(&slot);
                let how = match &ended {
                    Ended::Drained { in_time: true } => End::Drained,
                    Ended::Drained { in_time: false } | Ended::Stopped => End::Stopped,
                    Ended::Failed(failure) => self.note_failure(slot, generation, failure),
                };
                Some(Event::Ended { slot, generation: generation as u32, how })
            }
            Report::ThreadEnded { slot, thread } => {
                // Expected after a `Join`, which waits for the thread: only those that still stand died by themselves.
                self.threads.contains_key(&(slot, thread)).then(|| {
                    tracing::error!(slot, thread, "an executor's thread ended");
                    Event::ThreadDied { slot, thread }
                })
            }
        }
    }

    fn note_failure(&mut self, slot: u16, generation: u64, failure: &Failure) -> End {
        let (how, what) = match failure {
            Failure::Start(error) => (End::StartFailed, format!("its start-up failed: {error}")),
            Failure::Panicked(panic) => (End::Panicked, format!("it panicked: {panic}")),
            Failure::Background { name, error } => {
                (End::Failed, format!("its background task '{name}' failed: {error}"))
            }
        };
        tracing::error!(slot, generation, "an executor has ended, {what}; its connections are closed");
        self.failures.insert(slot, what);
        how
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::StartGeneration { slot, generation, thread, fresh_thread } => {
                self.start_generation(slot, generation, thread, fresh_thread);
            }
            Action::Drain { slot, deadline, why: _ } => {
                self.let_go_of_listeners();
                self.seats[usize::from(slot)].inbox.order(SlotOrder::Drain { deadline });
            }
            Action::StopNow { slot } => self.seats[usize::from(slot)].inbox.order(SlotOrder::Stop),
            Action::Join { slot, thread } => self.join(slot, thread),
            Action::Abandon { slot, thread } => {
                tracing::error!(
                    slot,
                    thread,
                    "an executor does not answer the order to stop: its thread is left behind"
                );
            }
            Action::SetActive(slots) => {
                self.active = slots;
                self.steer();
            }
            Action::Readiness(readiness) => {
                tracing::debug!(?readiness, "readiness");
                self.shared.ready.store(readiness == Readiness::Ready, Ordering::Relaxed);
            }
            Action::Started => {
                if let Some(promise) = self.starting.take() {
                    promise.fulfil(Ok(Running::new(Arc::clone(&self.shared))));
                }
            }
            Action::StartFailed { slot, failure } => tracing::debug!(slot, ?failure, "the start has failed"),
            Action::Quarantined { slot, reason } => {
                tracing::error!(
                    slot,
                    ?reason,
                    "the slot is quarantined: it gets no executor until the server is restarted"
                );
            }
            Action::Condemn { .. }
            | Action::Abort { .. }
            | Action::Rescue(_)
            | Action::Reattach
            | Action::CloseListeners
            | Action::Target { .. }
            | Action::ScaleAnswer(_)
            | Action::SpawnSuccessor { .. }
            | Action::KillSuccessor { .. }
            | Action::UpgradeAnswer(_) => tracing::debug!(?action, "not carried out yet"),
            Action::Exit(_) => unreachable!("handled by `run`"),
        }
    }

    /// Puts the steering table in force: the active slots that have room; all active ones when none has.
    fn steer(&mut self) {
        let with_room: Vec<u16> = self.active.iter().copied().filter(|slot| !self.full.contains(slot)).collect();
        let slots = if with_room.is_empty() { &self.active } else { &with_room };
        if let Some(Err(error)) = self.table.as_mut().map(|table| table.set_active(slots)) {
            tracing::error!(%error, "steering stays as it was");
        }
    }

    fn start_generation(&mut self, slot: u16, generation: u32, thread: u32, fresh_thread: bool) {
        let seat = Arc::clone(&self.seats[usize::from(slot)]);
        if fresh_thread {
            seat.inbox.forget_orders();
            match slot::spawn(Arc::clone(&seat), thread) {
                Ok(handle) => drop(self.threads.insert((slot, thread), handle)),
                Err(error) => {
                    tracing::error!(slot, %error, "starting an executor's thread");
                    let report = Report::ThreadEnded { slot, thread };
                    // Known as if it had lived, so that the report counts.
                    self.threads.insert((slot, thread), std::thread::spawn(|| ()));
                    self.shared.post.send(Message::Report(report));
                    return;
                }
            }
        }
        seat.inbox.order(SlotOrder::Start(u64::from(generation)));
    }

    fn join(&mut self, slot: u16, thread: u32) {
        let Some(handle) = self.threads.remove(&(slot, thread)) else { return };
        if !handle.is_finished() {
            self.seats[usize::from(slot)].inbox.order(SlotOrder::Quit);
        }
        if handle.join().is_err() {
            tracing::error!(slot, thread, "an executor's thread ended in a panic");
        }
    }

    /// From here on nothing keeps a listener open but the generation that still empties its queue.
    fn let_go_of_listeners(&mut self) {
        self.table = None;
        self.seats.iter().for_each(|seat| seat.release_listeners());
    }

    fn exit(mut self, outcome: Outcome) {
        self.let_go_of_listeners();
        if let Some(signals) = self.signals.take() {
            signals.end();
        }
        self.shared.ready.store(false, Ordering::Relaxed);
        let result = self.result(outcome);
        if let (Some(promise), Err(error)) = (self.starting.take(), &result) {
            promise.fulfil(Err(error.clone()));
        } else {
            tracing::debug!(name = self.name, ?outcome, "the server has ended");
        }
        let shared = Arc::clone(&self.shared);
        // What a caller sees after the end is final: nothing of the server's is left open when it is told.
        drop(self);
        shared.ended(result);
    }

    fn result(&self, outcome: Outcome) -> Result<Exit, Error> {
        match outcome {
            Outcome::Stopped { how, abandoned, .. } if self.starting.is_none() => {
                Ok(Exit { drained: how == Stopped::Drained, abandoned: usize::from(abandoned) })
            }
            Outcome::Stopped { .. } => Err(Error::new(Kind::Start, "the server was stopped before it had started")),
            Outcome::StartFailed { slot, failure, .. } => {
                let why = self.failures.get(&slot).cloned().unwrap_or_else(|| match failure {
                    policy::Failure::StartTimedOut => "its start-up took too long".to_owned(),
                    policy::Failure::ThreadDied => "its thread ended; the log has more".to_owned(),
                    other => format!("{other:?}"),
                });
                Err(Error::new(Kind::Start, format!("executor {slot} did not start: {why}")))
            }
            Outcome::AllQuarantined { .. } => {
                let last = self.failures.values().next().cloned().unwrap_or_default();
                let message =
                    format!("every executor failed too often and was given up; the last to be heard of one: {last}");
                Err(Error::new(Kind::Quarantined, message))
            }
        }
    }
}
