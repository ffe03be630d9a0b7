//! The watchdog: finds executors whose turn does not end, and those that have come back. It costs an executor nothing:
//! heartbeats are read where executors leave them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::policy::{Event, SlotState, SlotStatus};
use crate::executor::slot::SlotSeat;

/// How often a stalled executor is looked at, to notice that it has come back.
const RECOVERY_LOOK: Duration = Duration::from_millis(10);

/// Looks at the heartbeat of every executor that serves.
pub(super) struct Watchdog {
    limit: Duration,
    watches: HashMap<u16, Watch>,
    next: Option<Instant>,
}

/// What is known of one executor.
#[derive(Default)]
struct Watch {
    /// CPU time of its thread when it was last seen in good health.
    cpu_time: Duration,
    told: Told,
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
    /// Turns of up to `limit` are in order.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, watches: HashMap::new(), next: None }
    }

    /// When to look again: as soon as what is busy now would be stalled.
    pub(super) fn next_look(&self) -> Option<Instant> {
        self.next
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
        self.next = None;
        let mut events = Vec::new();
        for status in slots {
            if matches!(status.state, SlotState::Ready | SlotState::Stalled | SlotState::Starved) {
                let (event, again) = self.look_at(&seats[usize::from(status.slot)], status, now);
                events.extend(event);
                self.next = Some(self.next.map_or(again, |next| next.min(again)));
            } else {
                self.watches.remove(&status.slot);
            }
        }
        events
    }

    /// What there is to tell of one executor, and when to look at it again.
    fn look_at(&mut self, seat: &SlotSeat, status: SlotStatus, now: Instant) -> (Option<Event>, Instant) {
        let (slot, generation) = (status.slot, status.generation);
        let watch = self.watches.entry(slot).or_default();
        let cpu_time = seat.cpu_time().unwrap_or_default();
        let busy = seat.heartbeat.busy_for(now).unwrap_or_default();
        let before = watch.told;
        if busy < self.limit {
            watch.cpu_time = cpu_time;
            watch.told = Told::Healthy;
            let event = (before != Told::Healthy).then(|| {
                tracing::info!(slot, generation, "the executor has come back");
                Event::Recovered { slot, generation }
            });
            return (event, now + (self.limit - busy));
        }
        // The turn began after the last look that found it in good health.
        let used = cpu_time.saturating_sub(watch.cpu_time);
        watch.told = if used >= busy / 2 { Told::Stalled } else { Told::Starved };
        let busy_ms = busy.as_millis() as u64;
        let event = match watch.told {
            told if told == before => None,
            Told::Stalled => {
                tracing::warn!(slot, generation, busy_ms, "an executor is stalled: new connections go elsewhere");
                Some(Event::Stalled { slot, generation })
            }
            Told::Starved => {
                tracing::warn!(slot, generation, busy_ms, "an executor gets no CPU: new connections go elsewhere");
                Some(Event::Starved { slot, generation })
            }
            Told::Healthy => unreachable!("it has just been found late"),
        };
        (event, now + RECOVERY_LOOK.min(self.limit))
    }
}
