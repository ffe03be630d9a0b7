//! The end: readiness first, then the drain, then the cut.

use std::time::Instant;

use super::slot::{State, later};
use super::{Action, DrainReason, End, Phase, Policy, StopMode, Stopped, UpgradeRefusal};

impl Policy {
    pub(super) fn stop(&mut self, mode: StopMode, now: Instant) {
        let in_service = self.phase.serves();
        match (self.phase, mode) {
            (Phase::Running, StopMode::Drain { deadline }) if !self.config.drain_delay.is_zero() => {
                let limit = deadline.unwrap_or(self.config.drain_deadline);
                self.phase = Phase::LameDuck { until: later(now, self.config.drain_delay), limit };
            }
            (Phase::New | Phase::Starting | Phase::Running, StopMode::Drain { deadline }) => {
                let limit = deadline.unwrap_or(self.config.drain_deadline);
                self.begin_drain(DrainReason::Stop, later(now, limit), now);
            }
            (Phase::New | Phase::Starting | Phase::Running, StopMode::Now) => self.stop_at_once(Stopped::AtOnce, now),
            (Phase::LameDuck { .. }, StopMode::Now) => self.stop_at_once(Stopped::Interrupted, now),
            (Phase::Stopping { .. }, StopMode::Now) => self.cut_drain(Stopped::Interrupted, now),
            _ => {}
        }
        if in_service {
            self.cut_upgrade(UpgradeRefusal::Interrupted, now);
        }
    }

    pub(super) fn tick_phase(&mut self, now: Instant) {
        match self.phase {
            Phase::LameDuck { until, limit } if until <= now => {
                self.begin_drain(DrainReason::Stop, later(now, limit), now);
            }
            Phase::Stopping { drain_until: Some(until), .. } if until <= now => {
                self.cut_drain(Stopped::DeadlinePassed, now);
            }
            _ => {}
        }
    }

    /// Nothing is started from here on, and no queue is emptied by the supervisor.
    pub(super) fn begin_drain(&mut self, why: DrainReason, deadline: Instant, now: Instant) {
        let handed_over = why == DrainReason::Upgrade;
        self.enter_stop(Stopped::Drained, Some(deadline), handed_over);
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            match slot.state {
                State::Ready { .. } => {
                    slot.state = State::Draining { limit: None };
                    let slot = slot.index;
                    self.actions.push(Action::Drain { slot, deadline, why });
                }
                State::Idle | State::Backoff { .. } => self.lay_down(index),
                // A generation that is still starting has no connection to finish.
                State::Starting(_) => self.stop_now(index, now),
                // One that is scaled down is at it, with a deadline of its own.
                _ => {}
            }
        }
    }

    fn stop_at_once(&mut self, how: Stopped, now: Instant) {
        self.enter_stop(how, None, false);
        for index in 0..self.slots.len() {
            match self.slots[index].state {
                State::Idle | State::Backoff { .. } => self.lay_down(index),
                _ => self.stop_now(index, now),
            }
        }
    }

    fn enter_stop(&mut self, how: Stopped, drain_until: Option<Instant>, handed_over: bool) {
        self.phase = Phase::Stopping { how, drain_until, handed_over, failed: 0 };
        // With what was to be rescued at this moment, one last time.
        self.rescue.clear();
        self.actions.push(Action::CloseListeners);
    }

    /// Ends the drain for the generations that are not done with it.
    fn cut_drain(&mut self, why: Stopped, now: Instant) {
        let draining = self.slots.iter().any(|slot| matches!(slot.state, State::Draining { .. }));
        if let Phase::Stopping { how, drain_until, .. } = &mut self.phase {
            *drain_until = None;
            if draining {
                *how = why;
            }
        }
        for index in 0..self.slots.len() {
            self.stop_now(index, now);
        }
    }

    /// A generation has ended during a stop. What is said of the stop is the worst that happened to one.
    pub(super) fn note_end_of_drain(&mut self, index: usize, end: Option<End>) {
        let draining = matches!(self.slots[index].state, State::Draining { .. });
        if let Phase::Stopping { how, failed, .. } = &mut self.phase
            && draining
        {
            match end {
                Some(End::Drained) => {}
                Some(End::Stopped) => *how = Stopped::DeadlinePassed,
                _ => *failed += 1,
            }
        }
    }
}
