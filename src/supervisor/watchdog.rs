//! The watchdog: finds executors whose turn does not end, and those that have come back. It costs an executor nothing:
//! heartbeats are read where executors leave them. While all of them are parked it looks about once a second, for those that
//! do not wake any more.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::backtrace::Reporter;
use super::late::{Late, Stage};
use super::policy::{Event, FAR, SlotStatus};
use super::watch::{Reading, Verdict, Watch};
use crate::executor::lookout::Lookout;
use crate::executor::slot::SlotSeat;
use crate::sys::procfs;

/// How long a start-up closure may keep its thread without a word in the log: to read a file, say. Nobody waits for its
/// executor, and it has a time limit of its own, which cannot end one that blocks.
const START_PATIENCE: Duration = Duration::from_secs(1);

/// Looks at the heartbeat of every executor that has a generation.
pub(super) struct Watchdog {
    limit: Duration,
    watches: HashMap<u16, Watched>,
    next: Option<Instant>,
    lookout: Arc<Lookout>,
    late: Late,
    /// `None` if it was not asked for, or cannot be.
    reporter: Option<Reporter>,
}

/// A generation, while it starts, or from then on.
struct Watched {
    generation: u32,
    starts: bool,
    watch: Watch,
    told: Told,
    /// Whether the log was told as well.
    said: bool,
}

impl Watched {
    /// What is known of this generation, while it is at this.
    fn of(all: &mut HashMap<u16, Self>, limit: Duration, slot: u16, generation: u32, stage: Stage) -> &mut Self {
        let starts = stage == Stage::Starts;
        let limit = if starts { limit.max(START_PATIENCE) } else { limit };
        let fresh = || Self { generation, starts, watch: Watch::new(limit), told: Told::Healthy, said: false };
        let watched = all.entry(slot).or_insert_with(fresh);
        if (watched.generation, watched.starts) != (generation, starts) {
            *watched = fresh();
        }
        watched
    }
}

/// What the policy has been told, if the executor serves.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Told {
    #[default]
    Healthy,
    Stalled,
    Starved,
}

impl Watchdog {
    /// Turns of up to `limit` are in order. With `backtraces`, the log says what a stalled executor is doing.
    pub(super) fn new(limit: Duration, backtraces: bool, lookout: Arc<Lookout>) -> Self {
        let reporter = backtraces.then(Reporter::new).and_then(|reporter| {
            reporter.inspect_err(|error| tracing::warn!(%error, "no backtraces of stalled executors")).ok()
        });
        // Three times of it are reckoned with.
        let limit = limit.min(FAR);
        Self { limit, watches: HashMap::new(), next: None, lookout, late: Late::default(), reporter }
    }

    /// When to look again; `None` is at once.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.next
    }

    /// What is known of when to look is out of date.
    pub(super) fn look_soon(&mut self) {
        self.next = None;
    }

    /// Another thread is in the slot.
    pub(super) fn forget(&mut self, slot: u16) {
        self.watches.remove(&slot);
    }

    /// What there is to tell the policy: of all executors together.
    pub(super) fn look(
        &mut self,
        seats: &[Arc<SlotSeat>],
        slots: impl Iterator<Item = SlotStatus>,
        now: Instant,
    ) -> Option<Event> {
        let due = self.next.is_none_or(|next| next <= now);
        if !due {
            return None;
        }
        let mut next = now + FAR;
        let mut events = Vec::new();
        let mut watched = Vec::new();
        for status in slots {
            if let Some(stage) = Stage::of(status.state) {
                let seat = &seats[usize::from(status.slot)];
                let (event, again) = self.look_at(seat, status, stage, now);
                events.extend(event);
                next = next.min(again);
                watched.push(&seat.presence);
            } else {
                self.watches.remove(&status.slot);
            }
        }
        self.late.say_due(now);
        let calm = self.watches.values().all(|watched| watched.told == Told::Healthy && !watched.watch.has_doubts());
        // While nobody has anything to do nobody is late, except in waking; and where there is nobody, nobody is.
        let doze = calm && self.lookout.doze(watched.into_iter());
        let rest = self.watches.values().map(|watched| watched.watch.rest_limit()).min();
        let next = if doze { now + rest.unwrap_or(FAR) } else { next };
        self.next = Some(self.late.due().map_or(next, |due| next.min(due)));
        (!events.is_empty()).then_some(Event::Together(events))
    }

    /// What there is to tell of one executor, and when to look at it again.
    fn look_at(&mut self, seat: &SlotSeat, status: SlotStatus, stage: Stage, now: Instant) -> (Option<Event>, Instant) {
        let (slot, generation) = (status.slot, status.generation);
        let watched = Watched::of(&mut self.watches, self.limit, slot, generation, stage);
        // Without a thread there is nobody to be late.
        let (Some(thread), Some(cpu)) = (seat.thread(), seat.cpu_time()) else { return (None, now + self.limit) };
        let reading = Reading { now, busy: seat.heartbeat.busy_for(now), cpu };
        let verdict = watched.watch.look(reading, || procfs::scheduling(thread.number()));
        let again = watched.watch.next_look(now);
        let before = watched.told;
        watched.told = match verdict {
            // The verdict on a turn that was late stays until its end.
            Verdict::Healthy => before,
            Verdict::Recovered { .. } => Told::Healthy,
            Verdict::Stalled { .. } => Told::Stalled,
            Verdict::Starved { .. } => Told::Starved,
        };
        if watched.told == before {
            return (None, again);
        }
        let event = match verdict {
            Verdict::Healthy | Verdict::Recovered { .. } => {
                if watched.said {
                    tracing::info!(slot, generation, "the executor has come back");
                }
                watched.said = false;
                Event::Recovered { slot, generation }
            }
            Verdict::Stalled { own } => {
                let said = self.late.say_stalled(slot, generation, stage, own, now);
                watched.said |= said;
                if let Some(reporter) = self.reporter.as_mut().filter(|_| said) {
                    reporter.report(slot, generation, thread);
                }
                Event::Stalled { slot, generation }
            }
            Verdict::Starved { late } => {
                watched.said |= self.late.say_starved(slot, generation, stage, late, now);
                Event::Starved { slot, generation }
            }
        };
        // One that starts or ends has a limit for that.
        (Some(event).filter(|_| stage == Stage::Serves), again)
    }
}
