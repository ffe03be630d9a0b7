//! Which slots new connections go to at this moment: those that the policy wants, less those that have no place.

use std::collections::HashSet;

use crate::steering::Table;

pub(super) struct Steer {
    /// `None` once the server stops, so that listeners can close.
    table: Option<Table>,
    /// The slots that the policy wants new connections to go to.
    active: Vec<u16>,
    /// Those that have no place for one.
    full: HashSet<u16>,
}

impl Steer {
    pub(super) fn new(table: Table) -> Self {
        Self { table: Some(table), active: Vec::new(), full: HashSet::new() }
    }

    pub(super) fn set_active(&mut self, slots: Vec<u16>) {
        self.active = slots;
        self.put_in_force();
    }

    pub(super) fn set_full(&mut self, slot: u16, full: bool) {
        let changed = if full { self.full.insert(slot) } else { self.full.remove(&slot) };
        if changed {
            self.put_in_force();
        }
    }

    /// The active slots that have room; all active ones when none has.
    pub(super) fn receivers(&self) -> Vec<u16> {
        let with_room: Vec<u16> = self.active.iter().copied().filter(|slot| !self.full.contains(slot)).collect();
        if with_room.is_empty() { self.active.clone() } else { with_room }
    }

    /// Puts the table in force again, which another process may have replaced by its own.
    pub(super) fn reattach(&mut self) {
        if let Some(table) = &mut self.table {
            table.forget();
        }
        self.put_in_force();
    }

    /// Lets go of the listeners.
    pub(super) fn end(&mut self) {
        self.table = None;
    }

    fn put_in_force(&mut self) {
        let slots = self.receivers();
        if let Some(Err(error)) = self.table.as_mut().map(|table| table.set_active(&slots)) {
            tracing::error!(%error, "steering stays as it was");
        }
    }
}
