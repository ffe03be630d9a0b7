//! The rules that hold between steps, and those that hold after a tick.

use std::time::Instant;

use super::super::*;
use super::model::{Account, Broken, Life, Model, Succession, rule};

impl Model {
    pub(super) fn is_crash_loop(&self, slot: u16) -> bool {
        let restart = &self.config.restart;
        let failures = &self.slots[usize::from(slot)].failures;
        let recent = |at: &&Instant| self.now - **at <= restart.quarantine_window;
        let count = failures.iter().filter(recent).count();
        restart.quarantine_after > 0 && count >= restart.quarantine_after as usize
    }

    /// Nobody is left who could serve.
    pub(super) fn all_quarantined(&self) -> bool {
        self.slots.iter().all(|a| a.life == Life::None && (a.quarantined || !a.wanted) && a.waits_since.is_none())
    }

    /// After a step.
    pub(super) fn check(&mut self, policy: &Policy) -> Result<(), Broken> {
        if self.exited.is_some() || self.aborted {
            return Ok(());
        }
        self.check_scale(policy)?;
        self.check_slots(policy)?;
        self.check_table()?;
        self.check_readiness()?;
        self.check_orders()?;
        let quiet = self.slots.iter().all(|a| a.life == Life::None);
        rule("exit", !(self.is_closing() && quiet), "all have ended")?;
        let over = self.is_running() && self.all_quarantined() && !self.is_upgrading();
        rule("exit", !over, "all are quarantined")?;
        if let Some((_, by)) = self.stop {
            rule("exit in time", self.now <= by + self.late, self.now - by)?;
        }
        rule("readiness", policy.readiness() == self.readiness, "the method differs")
    }

    /// Which slots run is the policy's choice; how many is not, nor that it keeps to its choice.
    fn check_scale(&mut self, policy: &Policy) -> Result<(), Broken> {
        rule("target", policy.target() == self.target, (policy.target(), self.target))?;
        for (account, status) in self.slots.iter_mut().zip(policy.slots()) {
            account.wanted = status.wanted;
            account.retired_now = false;
            if !status.wanted {
                account.waits_since = None;
            }
        }
        let wanted = self.slots.iter().filter(|a| a.wanted).count();
        rule("target", wanted == usize::from(self.target), (wanted, self.target))?;
        if self.is_closing() {
            return Ok(());
        }
        for account in &self.slots {
            let at_rest = account.life == Life::None && account.waits_since.is_none() && !account.quarantined;
            rule("scale up", !(account.wanted && at_rest), account)?;
            let serves = matches!(account.life, Life::Starting | Life::Ready { .. });
            rule("scale down", account.wanted || !serves, account)?;
            rule("given back", !(at_rest && account.unjoined), account)?;
        }
        Ok(())
    }

    fn check_table(&self) -> Result<(), Broken> {
        let slots = || (0_u16..).zip(&self.slots);
        let active: Vec<u16> = slots().filter(|(_, a)| a.is_active()).map(|(index, _)| index).collect();
        let anybody = self.serves() && !active.is_empty();
        if anybody {
            rule("table", self.table == active, (&self.table, &active))?;
        } else {
            // The last that was in force: not one made of those that were still to be found late.
            rule("table", self.table == self.table_before, (&self.table, &self.table_before))?;
        }
        let unattended = slots().filter(|(_, a)| anybody && !a.is_active()).map(|(index, _)| index);
        let rescue: Vec<u16> = unattended.collect();
        rule("rescue", self.rescue == rescue, (&self.rescue, &rescue))
    }

    fn check_readiness(&self) -> Result<(), Broken> {
        let enough = self.config.readiness.stalled_after;
        let stalled = |a: &Account| a.illness.filter(|illness| illness.stalled);
        let certain = self.readiness_if(|a| stalled(a).is_some_and(|illness| illness.counted));
        // Only a tick finds out.
        let possible = self.readiness_if(|a| stalled(a).is_some_and(|i| i.counted || self.stalled_for(&i).1 >= enough));
        let fits = self.readiness == certain || self.readiness == possible;
        rule("readiness", fits, (self.readiness, certain, possible))
    }

    fn readiness_if(&self, stalled: impl Fn(&Account) -> bool) -> Readiness {
        let wanted = || self.slots.iter().filter(|a| a.wanted);
        let quarantined = wanted().filter(|a| a.quarantined).count();
        let out = quarantined + wanted().filter(|a| stalled(a)).count();
        let tolerated = (f64::from(self.config.readiness.unfit_max) * wanted().count() as f64 + 1e-3) as usize;
        let why = if self.is_closing() || self.stop.is_some() {
            NotReady::Stopping
        } else if !self.was_started {
            NotReady::Starting
        } else if quarantined > tolerated {
            NotReady::MostQuarantined
        } else if out > tolerated {
            NotReady::Stalled
        } else if !wanted().any(|a| matches!(a.life, Life::Ready { .. })) {
            NotReady::NoActiveSlot
        } else {
            return Readiness::Ready;
        };
        Readiness::NotReady(why)
    }

    fn check_orders(&self) -> Result<(), Broken> {
        rule("one answer", self.scales_due == 0, "a scale order")?;
        let waiting = u32::from(self.is_upgrading());
        rule("one answer", self.upgrades_due == waiting, (self.upgrades_due, self.succession))?;
        rule("re-attach", !self.reattach_due, "the successor's table is in force")?;
        let over = |a: &Account| matches!(a.life, Life::Draining { until: None, .. });
        rule("drain", self.is_closing() || !self.slots.iter().any(over), "it goes on serving")
    }

    fn check_slots(&self, policy: &Policy) -> Result<(), Broken> {
        let most = usize::from(self.config.restart.leaked_max.max(1));
        for ((index, account), status) in (0_u16..).zip(&self.slots).zip(policy.slots()) {
            let live = match (account.life, account.illness) {
                (Life::None, _) => None,
                (Life::Starting, _) => Some(SlotState::Starting),
                (Life::Ready { .. }, None) => Some(SlotState::Ready),
                (Life::Ready { .. }, Some(illness)) if illness.stalled => Some(SlotState::Stalled),
                (Life::Ready { .. }, Some(_)) => Some(SlotState::Starved),
                (Life::Draining { .. }, _) => Some(SlotState::Draining),
                (Life::Stopping { .. }, _) => Some(SlotState::Stopping),
            };
            let fits = match status.state {
                SlotState::Quarantined => account.quarantined && live.is_none(),
                SlotState::Idle | SlotState::Backoff | SlotState::Ended => live.is_none(),
                state => live == Some(state),
            };
            let same = status.slot == index && status.generation == account.generation;
            rule("stale", fits && same, (status, account))?;
            let back = account.leaks.iter().any(|leak| leak.back);
            let joined = !(back || account.thread_dead && account.unjoined);
            rule("join", joined && usize::from(status.abandoned) == account.left_behind(), account)?;
            let out = account.quarantined || !self.serves();
            rule("quarantine", out || account.life != Life::None || !self.is_crash_loop(index), account)?;
            rule("leaked threads", account.leaks.len() < most || account.quarantined, account)?;
            if let Some(since) = account.waits_since.filter(|_| self.serves()) {
                let (_, longest) = account.pause(&self.config.restart);
                let due = status.restart_at.is_some_and(|at| at <= since + longest);
                rule("slot comes back", due && !longest.is_zero(), account)?;
            }
        }
        Ok(())
    }

    pub(super) fn check_after_tick(&self, next_deadline: Option<Instant>) -> Result<(), Broken> {
        if self.exited.is_some() || self.aborted {
            return Ok(());
        }
        let ahead = next_deadline.is_none_or(|at| at > self.now);
        rule("deadline", ahead, "it has passed, and was not acted on")?;
        let from = |at: Instant| self.jumped_at.map_or(at, |jump| jump.max(at));
        for account in &self.slots {
            match account.life {
                Life::Starting => {
                    let in_time = self.now - from(account.started_at) < self.config.start_timeout;
                    rule("start timeout", in_time, account)?;
                }
                Life::Stopping { since, .. } => {
                    rule("stop grace", self.now - from(since) < self.config.stop_grace, account)?;
                }
                Life::Draining { since, until: Some(_) } => {
                    rule("drain", self.now - from(since) < self.config.drain_deadline, account)?;
                }
                Life::Draining { .. } => {
                    rule("drain", self.drain_until.is_none_or(|until| self.now < until), account)?;
                }
                Life::None => {
                    let waits = self.serves() && account.waits_since.is_some() && next_deadline.is_none();
                    rule("slot comes back", !waits, account)?;
                }
                Life::Ready { .. } => {
                    let illness = account.illness.filter(|illness| illness.stalled && self.serves());
                    let certain = illness.map(|illness| self.stalled_for(&illness).0);
                    let limit = self.config.hang_timeout.filter(|_| self.config.hang != HangPolicy::Ignore);
                    let struck = certain.zip(limit).is_some_and(|(certain, limit)| certain >= limit);
                    rule("hang", !struck, account)?;
                }
            }
        }
        if let Succession::Waiting { since, .. } = self.succession {
            rule("upgrade timeout", self.now - from(since) < self.config.upgrade_timeout, since)?;
        }
        rule("delay", self.lame_duck.is_none_or(|(until, _)| until > self.now), "the drain is due")
    }
}
