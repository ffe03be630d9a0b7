//! The counters of a slot: written by its executor only, read by anybody. No read-modify-write, no sharing of a cache
//! line between executors.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number with one writer.
#[derive(Debug, Default)]
pub(crate) struct Cell(AtomicU64);

impl Cell {
    /// Adds `count`; from the owning executor's thread only, else counts are lost.
    pub(crate) fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    pub(crate) fn subtract(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_sub(count), Ordering::Relaxed);
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One slot's counters, kept over its generations. Aligned to two cache lines: adjacent lines are fetched in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Cells {
    /// Connections accepted.
    pub accepted: Cell,
    /// Connections taken over from the queue of a slot that could not accept them; among `accepted`.
    pub rescued: Cell,
    /// Connections open now.
    pub open: Cell,
    /// Requests, with those that were refused.
    pub requests: Cell,
    /// Requests being answered now.
    pub in_flight: Cell,
    /// Panics that cost their connection or task only.
    pub panics_contained: Cell,
    /// Connections accepted and closed at once for want of file descriptors.
    pub shed: Cell,
    /// Connections closed by a timeout of ours.
    pub timed_out: Cell,
    /// Nanoseconds in turns, up to the last one's begin: what utilisation is computed from.
    pub busy: Cell,
    /// Requests refused because the executor had too much to do.
    pub overloaded: Cell,
    /// Turns of the executor.
    pub turns: Cell,
    /// Times it went to sleep.
    pub sleeps: Cell,
    /// Values that other threads still held when their executor's thread ended.
    pub values_leaked: Cell,
    /// The generation that lives, or lived last.
    pub generation: Cell,
}

impl Cells {
    /// Counters that go on from these, for an executor that takes the place of this one.
    pub(crate) fn successor(&self) -> Self {
        let new = Self::default();
        for (new, old) in [
            (&new.accepted, &self.accepted),
            (&new.rescued, &self.rescued),
            (&new.requests, &self.requests),
            (&new.panics_contained, &self.panics_contained),
            (&new.shed, &self.shed),
            (&new.timed_out, &self.timed_out),
            (&new.overloaded, &self.overloaded),
            (&new.busy, &self.busy),
            (&new.turns, &self.turns),
            (&new.sleeps, &self.sleeps),
            (&new.values_leaked, &self.values_leaked),
            (&new.generation, &self.generation),
        ] {
            new.set(old.get());
        }
        new
    }
}
