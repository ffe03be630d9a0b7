//! The threads of executors as they end, or do not come to be.

use super::Supervisor;
use super::policy::{End, Event};
use crate::executor::core::Failure;

impl Supervisor {
    /// `failure`: there was no executor on it, or no thread.
    pub(super) fn thread_ended(&mut self, slot: u16, thread: u32, failure: Option<&Failure>) -> Option<Event> {
        // Expected after a `Join`, which waits for the thread: only those that still stand ended by themselves.
        if !self.threads.contains_key(&(slot, thread)) {
            return None;
        }
        if let Some(failure) = failure {
            let generation = self.policy.slots().nth(usize::from(slot)).map_or(0, |status| status.generation);
            if self.note_failure(slot, u64::from(generation), failure) == End::NoResources {
                return Some(Event::ThreadRefused { slot, thread });
            }
        } else if self.left_behind.contains_key(&(slot, thread)) {
            tracing::info!(slot, thread, "an executor's thread that was left behind has come back and ended");
        } else {
            tracing::error!(slot, thread, "an executor's thread ended");
        }
        Some(Event::ThreadDied { slot, thread })
    }

    /// What an executor is made from could not be had.
    pub(super) fn note_shortage(&mut self, slot: u16, generation: u64, what: &str) -> End {
        tracing::error!(
            slot,
            generation,
            "an executor could not be started: {what}; it is tried again, after longer and longer pauses"
        );
        self.failures.insert(slot, what.to_owned());
        End::NoResources
    }
}
