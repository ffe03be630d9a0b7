//! The watchdog: finds executors whose turn does not end, and those that have come back. It costs an executor nothing:
//! heartbeats are read where executors leave them. While all of them are parked it does not look.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::backtrace::Reporter;
use super::policy::{Event, FAR, SlotState, SlotStatus};
use super::watch::{Reading, Verdict, Watch};
use crate::executor::lookout::Lookout;
use crate::executor::slot::SlotSeat;
use crate::sys::procfs;

/// Looks at the heartbeat of every executor that serves.
pub(super) struct Watchdog {
    limit: Duration,
    watches: HashMap<u16, (Watch, Told)>,
    next: Option<Instant>,
    lookout: Arc<Lookout>,
    /// `None` if it was not asked for, or cannot be.
    reporter: Option<Reporter>,
}

/// What the policy has been told.
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
        Self { limit, watches: HashMap::new(), next: None, lookout, reporter }
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

    /// What there is to tell the policy.
    pub(super) fn look(
        &mut self,
        seats: &[Arc<SlotSeat>],
        slots: impl Iterator<Item = SlotStatus>,
        now: Instant,
    ) -> Vec<Event> {
        let due = self.next.is_none_or(|next| next <= now);
        if !due {
            return Vec::new();
        }
        let mut next = now + FAR;
        let mut events = Vec::new();
        let mut watched = Vec::new();
        for status in slots {
            if matches!(status.state, SlotState::Ready | SlotState::Stalled | SlotState::Starved) {
                let seat = &seats[usize::from(status.slot)];
                let (event, again) = self.look_at(seat, status, now);
                events.extend(event);
                next = next.min(again);
                watched.push(&seat.presence);
            } else {
                self.watches.remove(&status.slot);
            }
        }
        let calm = self.watches.values().all(|(_, told)| *told == Told::Healthy);
        // While nobody has anything to do, or nobody serves, there is nobody to be late.
        let doze = calm && self.lookout.doze(watched.into_iter());
        self.next = Some(if doze { now + FAR } else { next });
        events
    }

    /// What there is to tell of one executor, and when to look at it again.
    fn look_at(&mut self, seat: &SlotSeat, status: SlotStatus, now: Instant) -> (Option<Event>, Instant) {
        let (slot, generation) = (status.slot, status.generation);
        let (watch, told) = self.watches.entry(slot).or_insert_with(|| (Watch::new(self.limit), Told::Healthy));
        // Without a thread there is nobody to be late.
        let (Some(thread), Some(cpu)) = (seat.thread(), seat.cpu_time()) else { return (None, now + self.limit) };
        let reading = Reading { now, busy: seat.heartbeat.busy_for(now), cpu };
        let verdict = watch.look(reading, || procfs::scheduling(thread.number()));
        let again = watch.next_look(now);
        let before = *told;
        *told = match verdict {
            // The verdict on a turn that was late stays until its end.
            Verdict::Healthy => before,
            Verdict::Recovered { .. } => Told::Healthy,
            Verdict::Stalled { .. } => Told::Stalled,
            Verdict::Starved { .. } => Told::Starved,
        };
        if *told == before {
            return (None, again);
        }
        let event = match verdict {
            Verdict::Healthy | Verdict::Recovered { .. } => {
                tracing::info!(slot, generation, "the executor has come back");
                Event::Recovered { slot, generation }
            }
            Verdict::Stalled { own } => {
                let busy_ms = own.as_millis() as u64;
                tracing::warn!(slot, generation, busy_ms, "an executor is stalled: new connections go elsewhere");
                if let Some(reporter) = &mut self.reporter {
                    reporter.report(slot, generation, thread);
                }
                Event::Stalled { slot, generation }
            }
            Verdict::Starved { busy } => {
                let busy_ms = busy.as_millis() as u64;
                tracing::warn!(slot, generation, busy_ms, "an executor gets no CPU: new connections go elsewhere");
                Event::Starved { slot, generation }
            }
        };
        (Some(event), again)
    }
}
