//! The threads of executors as they end, or do not come to be.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::policy::{End, Event, later};
use super::{SlotOrder, Supervisor};
use crate::executor::core::Failure;
use crate::executor::slot::SlotSeat;
use crate::executor::threads::Employment;

/// How long a thread that is told to return is waited for there and then: some times what it takes if nothing keeps it.
const JOIN_AT_ONCE: Duration = Duration::from_millis(20);
/// How often those are looked at that take longer.
const JOIN_AGAIN: Duration = Duration::from_millis(50);

/// A thread that has been told to return. What is the embedder's may still run on it as it is dropped, for as long as it
/// likes: values that came back from other threads, thread-local ones.
pub(super) struct Ending {
    slot: u16,
    thread: u32,
    seat: Arc<SlotSeat>,
    /// `None` once it is joined.
    handle: Option<Employment>,
    give_up_at: Instant,
    given_up: bool,
}

impl Ending {
    /// Whether it has ended.
    fn join(&mut self) -> bool {
        self.handle = self.handle.take().and_then(|handle| handle.try_join().err());
        self.handle.is_none()
    }

    /// Waits for its end, up to `until`.
    fn join_until(&mut self, until: Instant) -> bool {
        while !self.join() {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        true
    }
}

/// The ends of threads.
impl Supervisor {
    /// The slot has no use for the thread: tells it to return. It is waited for without keeping the supervisor from others.
    pub(super) fn join(&mut self, slot: u16, thread: u32) {
        let Some(handle) = self.threads.remove(&(slot, thread)) else { return };
        let left_behind = self.left_behind.remove(&(slot, thread));
        if left_behind.is_some() {
            self.shared.threads_leaked.fetch_sub(1, Ordering::Relaxed);
        }
        let Some(handle) = handle else { return };
        let was_left_behind = left_behind.is_some();
        let seat = left_behind.unwrap_or_else(|| Arc::clone(self.seat(slot)));
        seat.inbox.order(SlotOrder::Quit);
        let now = Instant::now();
        let give_up_at = later(now, self.policy.config().stop_grace);
        let mut ending = Ending { slot, thread, seat, handle: Some(handle), give_up_at, given_up: false };
        if ending.join_until(now + JOIN_AT_ONCE) {
            return;
        }
        if !was_left_behind {
            // Another may be in the slot by the time it says its last.
            ending.seat.heartbeat.disown();
        }
        self.ending.push(ending);
    }

    /// Tells all to return that there are, as if nobody had a use for any, and waits.
    pub(super) fn join_all(&mut self) {
        let threads: Vec<(u16, u32)> = self.threads.keys().copied().collect();
        for (slot, thread) in threads {
            self.join(slot, thread);
        }
        self.await_ending();
    }

    /// When to look at those that are about to return.
    pub(super) fn next_join(&self) -> Option<Instant> {
        (!self.ending.is_empty()).then(|| Instant::now() + JOIN_AGAIN)
    }

    pub(super) fn join_ended(&mut self, now: Instant) {
        let leaked = &self.shared.threads_leaked;
        self.ending.retain_mut(|ending| {
            let joined = ending.join();
            if joined && ending.given_up {
                leaked.fetch_sub(1, Ordering::Relaxed);
            } else if !joined && !ending.given_up && ending.give_up_at <= now {
                ending.given_up = true;
                leaked.fetch_add(1, Ordering::Relaxed);
                tracing::error!(
                    slot = ending.slot,
                    thread = ending.thread,
                    "an executor's thread does not end, and is left behind: look for what blocks as it is dropped there"
                );
            }
            !joined
        });
    }

    /// Waits for those that are about to return, each for as long as it may take; how many did not.
    pub(super) fn await_ending(&mut self) -> usize {
        for ending in &mut self.ending {
            ending.join_until(ending.give_up_at);
        }
        self.join_ended(Instant::now());
        self.ending.len()
    }

    /// Seats that a thread may still sit in and that no other gets.
    pub(super) fn former_seats(&self) -> impl Iterator<Item = &Arc<SlotSeat>> {
        self.left_behind.values().chain(self.ending.iter().map(|ending| &ending.seat))
    }

    /// Whether this generation's thread has been given up, and has not been joined since.
    pub(super) fn is_left_behind(&self, slot: u16, generation: u64) -> bool {
        self.left_behind.values().any(|seat| seat.slot == slot && seat.cells.generation.get() == generation)
    }

    pub(super) fn is_former(&self, seat: &Arc<SlotSeat>) -> bool {
        self.former_seats().any(|former| Arc::ptr_eq(former, seat))
    }
}

/// Their ends that nobody ordered.
impl Supervisor {
    /// `failure`: there was no executor on it, or no thread.
    pub(super) fn thread_ended(&mut self, slot: u16, thread: u32, failure: Option<&Failure>) -> Option<Event> {
        // Expected after a `Join`, which waits for the thread: only those that still stand ended by themselves.
        if !self.threads.contains_key(&(slot, thread)) {
            return None;
        }
        // Whatever connections there were; of one that was given up they were counted then.
        self.cut_off |= !self.left_behind.contains_key(&(slot, thread));
        if let Some(failure) = failure {
            let generation = self.policy.slots().nth(usize::from(slot)).map_or(0, |status| status.generation);
            if self.note_failure(slot, u64::from(generation), failure) == End::NoResources {
                return Some(Event::ThreadRefused { slot, thread });
            }
        } else if self.left_behind.contains_key(&(slot, thread)) {
            tracing::info!(slot, thread, "an executor's thread that was left behind has come back and ended");
        } else if self.starting.is_some() {
            tracing::debug!(slot, thread, "an executor's thread ended");
        } else {
            tracing::error!(slot, thread, "an executor's thread ended");
        }
        Some(Event::ThreadDied { slot, thread })
    }

    /// What an executor is made from could not be had.
    pub(super) fn note_shortage(&mut self, slot: u16, generation: u64, what: &str) -> End {
        if self.starting.is_some() {
            tracing::debug!(slot, generation, "an executor could not be started: {what}");
        } else {
            tracing::error!(
                slot,
                generation,
                "an executor could not be started: {what}; it is tried again, after longer and longer pauses"
            );
        }
        self.failures.insert(slot, what.to_owned());
        End::NoResources
    }
}
