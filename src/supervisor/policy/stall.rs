//! Executors that are busy with one turn for too long: out of the table, counted against readiness, and given up when
//! the turn has no end. What a turn is and who looks at it is the watchdog's business.

use std::time::Instant;

use super::slot::{Health, Leaked, State, Thread};
use super::{Action, HangPolicy, Policy, Quarantine};

impl Policy {
    pub(super) fn stalled(&mut self, slot: u16, generation: u32, now: Instant) {
        let fresh = Health::starved(&self.config, now);
        self.change_health(slot, generation, |health| match health {
            Health::Well => fresh.run(now),
            // Has it counted against readiness before, it does so again.
            ill => ill.run(now),
        });
    }

    pub(super) fn starved(&mut self, slot: u16, generation: u32, now: Instant) {
        let fresh = Health::starved(&self.config, now);
        self.change_health(slot, generation, |health| match health {
            Health::Well => fresh,
            ill => ill.pause(now),
        });
    }

    pub(super) fn recovered(&mut self, slot: u16, generation: u32) {
        self.change_health(slot, generation, |_| Health::Well);
    }

    fn change_health(&mut self, slot: u16, generation: u32, change: impl FnOnce(Health) -> Health) {
        if let Some(slot) = self.slots.get_mut(usize::from(slot))
            && slot.generation == generation
            && let State::Ready { health, .. } = &mut slot.state
        {
            *health = change(*health);
        }
    }

    /// Lets the deadlines of a stalled slot strike.
    pub(super) fn tick_stalled(&mut self, index: usize, now: Instant) {
        if !self.phase.serves() {
            return;
        }
        let State::Ready { health: Health::Stalled { unready, hang, .. }, .. } = &mut self.slots[index].state else {
            return;
        };
        let config = &self.config;
        if unready.as_mut().is_some_and(|limit| limit.strikes(now, config.readiness.stalled_after, config)) {
            *unready = None;
        }
        let allowed = config.hang_timeout.unwrap_or_default();
        if !hang.as_mut().is_some_and(|limit| limit.strikes(now, allowed, config)) {
            return;
        }
        *hang = None;
        match self.config.hang {
            HangPolicy::Replace => self.condemn(index, now),
            HangPolicy::Abort => {
                let slot = self.slots[index].index;
                self.actions.push(Action::Abort { slot });
            }
            HangPolicy::Ignore => {}
        }
    }

    /// Gives the slot's executor up and goes on without it. It has failed, like one that crashed; and since each time
    /// leaves a thread behind, that is counted as well.
    fn condemn(&mut self, index: usize, now: Instant) {
        let most = usize::from(self.config.restart.leaked_max.max(1));
        let slot = &mut self.slots[index];
        let (thread, generation) = (slot.thread, slot.generation);
        slot.leaked.push(Leaked { generation, thread });
        slot.holds = Thread::None;
        let leaked = slot.leaked.len();
        self.actions.push(Action::Condemn { slot: slot.index, thread, generation });
        if leaked >= most {
            self.quarantine(index, Quarantine::Hangs);
        } else {
            self.restart(index, now);
        }
    }

    /// A thread that was left behind has nothing left to run, or has ended. Says whether it was one.
    pub(super) fn reclaim(&mut self, index: usize, is_it: impl Fn(&Leaked) -> bool) -> bool {
        let slot = &mut self.slots[index];
        let Some(place) = slot.leaked.iter().position(is_it) else { return false };
        let thread = slot.leaked.remove(place).thread;
        let slot = slot.index;
        self.actions.push(Action::Join { slot, thread });
        true
    }
}
