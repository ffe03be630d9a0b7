//! What reaches beyond this process: a new binary that takes over, the process that this one takes over from, the
//! service manager, and a reload.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::policy::{Event, SlotState, UpgradeRefusal};
use super::post::{Message, Post};
use super::{Supervisor, words};
use crate::Error;
use crate::error::Kind;
use crate::listen::{self, Inheritance};
use crate::order::Promise;
use crate::panics::caught;
use crate::sys::limits::explained;
use crate::systemd::Notifier;
use crate::upgrade::Group;
use crate::upgrade::successor::{Heir, Launch, Successor, Taken};

/// How often the status for the service manager is looked at when nothing happens.
const STATUS_PERIOD: Duration = Duration::from_secs(5);

/// How often this process, while it drains, looks whether the one that has taken over lives.
const HEIR_PERIOD: Duration = Duration::from_millis(250);

/// What a reload does: what changed and what cannot, in sentences.
pub(crate) type Reload = Arc<dyn Fn() -> Vec<String> + Send + Sync>;

/// All of it that the supervisor keeps.
pub(crate) struct Handover {
    /// How a new process is started.
    launch: Launch,
    /// The addresses, and how many listeners of each the service manager holds, too.
    addresses: Vec<(SocketAddr, usize)>,
    /// What this process has inherited and not used, and from whom.
    inheritance: Inheritance,
    notifier: Option<Notifier>,
    status_due: Instant,
    reload: Option<Reload>,
    reloading: Reloading,
    /// The start is over.
    serves: bool,
    /// This process is to take over from another, which has not acted upon it yet: should this one fail, it goes on.
    predecessor_serves: bool,
    /// A stop has been ordered.
    stopping: bool,
    /// Who has asked for an upgrade and has no answer yet, the oldest first; `None` for a signal.
    orders: VecDeque<Option<Promise<u32>>>,
    successor: Option<(u32, Progress)>,
    /// Another process serves the addresses.
    is_over: bool,
    /// That process, until it is known to have ended, and when to look.
    heir: Option<(Heir, Instant)>,
    /// It has ended, and not in order.
    heir_failed: bool,
    /// Why the last successor came to nothing.
    failure: Option<String>,
}

/// How far a reload is.
#[derive(Default)]
struct Reloading {
    runs: bool,
    /// It was asked for once more, or too early.
    again: bool,
}

/// How far a successor is.
enum Progress {
    /// Dropped, it is killed and waited for.
    Starts(Successor),
    /// Dropped, it learns that we go.
    Ready(Taken),
}

impl Handover {
    pub(crate) fn new(
        launch: Launch,
        addresses: Vec<(SocketAddr, usize)>,
        inheritance: Inheritance,
        notifier: Option<Notifier>,
        reload: Option<Reload>,
    ) -> Self {
        Self {
            launch,
            addresses,
            predecessor_serves: inheritance.predecessor.is_some(),
            inheritance,
            notifier,
            status_due: Instant::now(),
            reload,
            reloading: Reloading::default(),
            serves: false,
            stopping: false,
            orders: VecDeque::new(),
            successor: None,
            is_over: false,
            heir: None,
            heir_failed: false,
            failure: None,
        }
    }

    /// When the service manager wants to hear from us although nothing happens, or the new process is to be looked at.
    pub(super) fn due(&self) -> Option<Instant> {
        let heir = self.heir.as_ref().map(|(_, due)| *due);
        let notifier = self.notifier.as_ref().map(|notifier| {
            // What it has to hear again may be nearer.
            notifier.due().map_or(self.status_due, |due| due.min(self.status_due))
        });
        heir.into_iter().chain(notifier).min()
    }

    /// Whether the listeners are another's, too: of the process that has taken over, of the one that this one is to take over
    /// from, or of the service manager, which opened them or keeps them for the next process.
    pub(super) fn others_have_listeners(&self) -> bool {
        let managed = self.notifier.is_some() || self.addresses.iter().any(|(_, activated)| *activated > 0);
        self.is_over || self.predecessor_serves || managed
    }

    /// How many executors the process wants to run that this one takes over from.
    pub(crate) fn predecessors_executors(&self) -> Option<NonZeroU16> {
        self.inheritance.predecessor.as_ref()?.executors()
    }

    /// Whether a stop has been ordered.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping || self.is_over
    }

    /// Whether another process has taken over.
    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Whether the process that has taken over has failed since.
    pub(super) fn heir_has_failed(&mut self) -> bool {
        self.look_after_heir(None);
        self.heir_failed
    }

    /// Looks whether the process that has taken over lives: at any time, or `now` if it is due. This one cannot take its
    /// place: it has let go of the listeners, as the last to hold them.
    fn look_after_heir(&mut self, now: Option<Instant>) {
        let Some((heir, due)) = self.heir.as_mut().filter(|(_, due)| now.is_none_or(|now| *due <= now)) else { return };
        *due = now.map_or(*due, |now| now + HEIR_PERIOD);
        let Some(end) = heir.end() else { return };
        self.heir = None;
        self.heir_failed = !end.in_order;
        if end.in_order {
            // It may have handed over to another.
            tracing::info!("the process that has taken over has {}", end.how);
        } else {
            tracing::error!(
                "the process that has taken over {}: nobody serves the addresses any more, and this process, which drains, \
                 has let go of them; start the server anew",
                end.how
            );
        }
    }

    /// Tells the service manager and the old process that the server serves.
    fn started(&mut self, post: Post) {
        let rest = self.inheritance.close_rest();
        if let Some(notifier) = &mut self.notifier {
            // First: the manager waits for this, and not for ever.
            notifier.ready();
            notifier.forget(rest);
        }
        if let Some(predecessor) = self.inheritance.predecessor.take() {
            predecessor.ready(move || post.send(Message::TakenOver));
        }
    }

    /// The server does not start, or ends in error: the process before this one, if it waits, has to go on.
    pub(super) fn refuse(&mut self, error: &Error) {
        self.inheritance.refuse(error);
    }

    /// The server was told to stop.
    pub(super) fn stopping(&mut self) {
        self.stopping = true;
        if let Some(notifier) = &mut self.notifier {
            notifier.stopping();
        }
    }

    /// Somebody wants an upgrade; the policy answers.
    pub(super) fn asked(&mut self, asked: Option<Promise<u32>>) {
        self.orders.push_back(asked);
    }

    /// A successor has spoken, or has ended.
    pub(super) fn answered(&mut self, successor: u32, said: Result<Taken, String>) -> Option<Event> {
        let current = self.successor.take_if(|(number, _)| *number == successor);
        match said {
            Ok(taken) if current.is_none() => {
                // Given up before it spoke.
                taken.kill();
                Some(Event::SuccessorFailed { successor })
            }
            Ok(mut taken) => {
                if let Some(end) = taken.end() {
                    self.failure = Some(format!("it {} as soon as it was ready", end.how));
                    return Some(Event::SuccessorFailed { successor });
                }
                self.successor = Some((successor, Progress::Ready(taken)));
                Some(Event::SuccessorReady { successor })
            }
            Err(why) => {
                self.failure = Some(why);
                Some(Event::SuccessorFailed { successor })
            }
        }
    }

    /// Ends a successor that nobody waits for any more. It answers when it has ended.
    pub(super) fn kill_successor(&mut self, successor: u32) {
        match self.successor.take_if(|(number, _)| *number == successor) {
            Some((_, Progress::Starts(starting))) => {
                starting.kill("it was too late");
                // Kept until it has answered: dropped, it would be waited for.
                self.successor = Some((successor, Progress::Starts(starting)));
            }
            Some((_, Progress::Ready(taken))) => taken.kill(),
            None => {}
        }
    }

    /// The policy's answer to whoever asked.
    pub(super) fn answer(&mut self, answer: Result<(), UpgradeRefusal>) {
        // Who asked during an upgrade is refused at once; whose order it is waits for its end.
        let asked = match answer {
            Err(UpgradeRefusal::AlreadyUpgrading) => self.orders.pop_back(),
            _ => self.orders.pop_front(),
        };
        match (answer, self.successor.take()) {
            (Ok(()), Some((_, Progress::Ready(taken)))) => {
                self.is_over = true;
                tracing::info!(process = taken.process, "a new process has taken over; this one drains");
                if let Some(notifier) = &mut self.notifier {
                    notifier.main_pid(taken.process);
                }
                let process = taken.process;
                self.heir = Some((taken.acknowledge(), Instant::now()));
                if let Some(Some(asked)) = asked {
                    asked.fulfil(Ok(process));
                }
            }
            (answer, successor) => {
                self.successor = successor;
                let refusal = answer.err().unwrap_or(UpgradeRefusal::Failed);
                let why = words::upgrade_refusal(refusal, self.failure.take());
                tracing::error!("no new process takes over: {why}");
                if let Some(Some(asked)) = asked {
                    asked.fulfil(Err(Error::new(Kind::Refused, format!("no new process takes over: {why}"))));
                }
            }
        }
    }
}

impl Supervisor {
    /// Whatever is due by the clock. Called each time round the loop, so that the watchdog's keep-alives stop when the
    /// loop does.
    pub(super) fn tell_service_manager(&mut self, now: Instant) {
        self.handover.look_after_heir(Some(now));
        // Before that there is nothing to say that will not be wrong in a moment.
        let due = self.handover.serves && now >= self.handover.status_due;
        let status = (due && self.handover.notifier.is_some()).then(|| self.status());
        let Some(notifier) = &mut self.handover.notifier else { return };
        notifier.retry(now);
        notifier.watchdog(now);
        if let Some(status) = status {
            self.handover.status_due = now + STATUS_PERIOD;
            notifier.status(&status, now);
        }
    }

    fn status(&self) -> String {
        let open: u64 = self.seats.iter().map(|seat| seat.cells.open.get()).sum();
        let count = |state: SlotState| self.policy.slots().filter(|slot| slot.state == state).count();
        let (serving, stalled) = (count(SlotState::Ready), count(SlotState::Stalled));
        let quarantined = count(SlotState::Quarantined);
        let leaked = match self.shared.threads_leaked.load(Ordering::Relaxed) {
            0 => String::new(),
            leaked => format!(", {leaked} threads left behind"),
        };
        format!("{serving} executors serve, {open} connections, {stalled} stalled, {quarantined} quarantined{leaked}")
    }

    /// Every executor accepts.
    pub(super) fn announce_start(&mut self) {
        self.handover.started(self.shared.post.clone());
        self.store_listeners();
        self.handover.serves = true;
        self.handover.status_due = Instant::now();
        self.reload_again();
    }

    /// The old process has acted upon our being ready: this one is the service's main process.
    pub(super) fn taken_over(&mut self) {
        self.handover.predecessor_serves = false;
        self.handover.status_due = Instant::now();
        if let Some(notifier) = &mut self.handover.notifier {
            notifier.take_turn();
            notifier.ready();
        }
        self.store_listeners();
    }

    fn store_listeners(&mut self) {
        if self.handover.notifier.is_none() {
            return;
        }
        match (self.listeners(), &mut self.handover.notifier) {
            (Ok(groups), Some(notifier)) => notifier.store(groups),
            (Err(error), _) => tracing::warn!(%error, "doubling the listeners for the service manager to keep"),
            (Ok(_), None) => {}
        }
    }

    /// Duplicates of all listeners.
    fn listeners(&self) -> std::io::Result<Vec<Group>> {
        let dealt: Vec<_> = self.seats.iter().filter_map(|seat| seat.listeners()).collect();
        listen::gather(&self.handover.addresses, dealt.iter().flat_map(|of_slot| of_slot.iter()))
    }

    /// Starts the process that is to take over.
    pub(super) fn spawn_successor(&mut self, successor: u32) {
        tracing::info!("starting a new process that is to take over");
        self.handover.failure = None;
        let post = self.shared.post.clone();
        let tell = move |said| post.send(Message::Successor(successor, said));
        let steered = self.listeners().and_then(|mut groups| {
            let arrays = self.steer.socket_arrays()?;
            // With fewer some address is not steered, and there is no telling which.
            if arrays.len() == groups.len() {
                groups.iter_mut().zip(arrays).for_each(|(group, array)| group.sockets = Some(array));
            }
            Ok(groups)
        });
        let started =
            steered.map_err(|error| format!("doubling the listeners: {}", explained(&error))).and_then(|groups| {
                let executors = self.policy.target();
                let started = Successor::start(self.handover.launch.clone(), groups, executors, tell);
                started.map_err(|error| format!("starting a thread for it: {}", explained(&error)))
            });
        match started {
            Ok(starting) => self.handover.successor = Some((successor, Progress::Starts(starting))),
            Err(why) => self.shared.post.send(Message::Successor(successor, Err(why))),
        }
    }
}

/// A reload.
impl Supervisor {
    pub(super) fn reload_asked(&mut self) {
        // What the service manager is told of a reload ends in READY, which is not true before or after.
        if self.handover.stopping {
            tracing::info!("not reloaded: the server is stopping");
            return;
        }
        if !self.handover.serves || self.handover.reloading.runs {
            tracing::info!(
                "a reload follows when the {} is over",
                if self.handover.serves { "one under way" } else { "start" }
            );
            self.handover.reloading.again = true;
            return;
        }
        let Some(reload) = self.handover.reload.clone() else { return };
        if let Some(notifier) = &mut self.handover.notifier {
            notifier.reloading();
        }
        tracing::info!("reloading");
        let post = self.shared.post.clone();
        // On a thread of its own: reading files may take long.
        let run = move || {
            // Whatever becomes of it, the reload is over, and others may follow.
            let lines = catch_unwind(AssertUnwindSafe(|| reload())).unwrap_or_else(|payload| {
                tracing::error!("the closure of `reload_on_signal` panicked: {}", caught(payload));
                vec!["broken off by a panic: some of it may have been done".to_owned()]
            });
            post.send(Message::Reloaded(lines));
        };
        match std::thread::Builder::new().name("reload".to_owned()).spawn(run) {
            Ok(_) => self.handover.reloading.runs = true,
            Err(error) => self.reloaded(&[format!("starting a thread for the reload: {error}")]),
        }
    }

    pub(super) fn reloaded(&mut self, lines: &[String]) {
        self.handover.reloading.runs = false;
        lines.iter().for_each(|line| tracing::info!("reload: {line}"));
        if let Some(notifier) = self.handover.notifier.as_mut().filter(|_| !self.handover.stopping) {
            notifier.ready();
        }
        self.reload_again();
    }

    /// For what has changed since the reload that was under way began to read.
    fn reload_again(&mut self) {
        if std::mem::take(&mut self.handover.reloading.again) {
            self.reload_asked();
        }
    }
}
