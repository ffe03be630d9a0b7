//! Which slots new connections go to at this moment: those that the policy wants, less those that have no place, in the
//! proportions that the steering policy sees fit.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::load::{self, Sampler};
use super::policy::later;
use crate::executor::slot::SlotSeat;
use crate::steering::{SlotLoad, Table};

pub(super) struct Steer {
    /// `None` once the server stops, so that listeners can close.
    table: Option<Table>,
    /// The slots that the policy wants new connections to go to.
    active: Vec<u16>,
    /// Those that have no place for one.
    full: HashSet<u16>,
    refresh: Option<Refresh>,
}

/// For a steering policy that goes by load.
struct Refresh {
    sampler: Sampler,
    period: Duration,
    next: Instant,
}

impl Steer {
    /// `stale_after`: how long a turn may take until the program in the kernel passes over its executor.
    pub(super) fn new(table: Table, stale_after: Duration) -> Self {
        table.set_stale_after(stale_after);
        let refresh =
            table.refresh().map(|period| Refresh { sampler: Sampler::default(), period, next: Instant::now() });
        Self { table: Some(table), active: Vec::new(), full: HashSet::new(), refresh }
    }

    pub(super) fn set_active(&mut self, slots: Vec<u16>, seats: &[Arc<SlotSeat>]) {
        self.active = slots;
        self.put_in_force(seats);
    }

    pub(super) fn set_full(&mut self, slot: u16, full: bool, seats: &[Arc<SlotSeat>]) {
        let changed = if full { self.full.insert(slot) } else { self.full.remove(&slot) };
        if changed {
            self.put_in_force(seats);
        }
    }

    /// The active slots that have room; all active ones when none has.
    pub(super) fn receivers(&self) -> Vec<u16> {
        let with_room: Vec<u16> = self.active.iter().copied().filter(|slot| !self.full.contains(slot)).collect();
        if with_room.is_empty() { self.active.clone() } else { with_room }
    }

    /// The slots that have no room while others have: what is in their queues would be closed.
    pub(super) fn overflowing(&self) -> Vec<u16> {
        let is_full = |slot: &u16| self.full.contains(slot);
        let room = self.table.is_some() && !self.active.iter().all(is_full);
        if room { self.active.iter().copied().filter(is_full).collect() } else { Vec::new() }
    }

    /// Puts the table in force again, which another process may have replaced by its own.
    pub(super) fn reattach(&mut self, seats: &[Arc<SlotSeat>]) {
        if let Some(table) = &mut self.table {
            table.forget();
        }
        self.put_in_force(seats);
    }

    /// Duplicates of what the steering program selects from, one for each address; none if it is a classic one.
    pub(super) fn socket_arrays(&self) -> std::io::Result<Vec<OwnedFd>> {
        let arrays = self.table.as_ref().map(Table::socket_arrays).unwrap_or_default();
        arrays.iter().map(|array| array.try_clone_to_owned()).collect()
    }

    /// When the loads are to be looked at next.
    pub(super) fn next_refresh(&self) -> Option<Instant> {
        self.refresh.as_ref().filter(|_| self.table.is_some()).map(|refresh| refresh.next)
    }

    /// Goes by the loads of this moment, when that is due.
    pub(super) fn refresh(&mut self, seats: &[Arc<SlotSeat>], now: Instant) {
        if self.next_refresh().is_some_and(|next| next <= now) {
            self.put_in_force(seats);
        }
    }

    /// Lets go of the listeners.
    pub(super) fn end(&mut self) {
        self.table = None;
    }

    fn put_in_force(&mut self, seats: &[Arc<SlotSeat>]) {
        let receivers = self.receivers();
        let Some(table) = &mut self.table else { return };
        let outcome = match &mut self.refresh {
            None => table.set_active(&receivers),
            Some(refresh) => {
                let now = Instant::now();
                refresh.next = later(now, refresh.period);
                let load = |slot: &u16| {
                    let seat = &seats[usize::from(*slot)];
                    SlotLoad {
                        slot: *slot,
                        open: seat.cells.open.get() + seat.inbox.handed() as u64,
                        utilisation: f64::from(refresh.sampler.utilisation(seat, now)),
                        queue: load::queue(seat),
                        full: self.full.contains(slot),
                    }
                };
                table.set_loads(&self.active.iter().map(load).collect::<Vec<_>>())
            }
        };
        if let Err(error) = outcome {
            tracing::error!(%error, "steering stays as it was");
        }
    }
}
