//! How many executors there are to be, and which slots they live in. The number comes from an order or from the load
//! (`scaling.rs`); this makes the slots follow it.

use std::time::Instant;

use super::scaling::{Bounds, Sample};
use super::slot::{Health, Limit, Slot, State};
use super::{Action, DrainReason, Phase, Policy, ScaleRefusal, SlotLoad, TargetReason};

impl Policy {
    pub(super) fn scale_asked(&mut self, count: u16, now: Instant) {
        let max = self.slot_count();
        let answer = match self.phase {
            Phase::New | Phase::Starting => Err(ScaleRefusal::Starting),
            Phase::Running if self.upgrade.is_waiting() => Err(ScaleRefusal::Upgrading),
            Phase::Running if count == 0 || count > max => Err(ScaleRefusal::OutOfRange { max }),
            Phase::Running => Ok(count),
            _ => Err(ScaleRefusal::Stopping),
        };
        self.actions.push(Action::ScaleAnswer(answer));
        if answer.is_ok() {
            self.scaler.ordered(&self.config.scaling);
            self.aim(count, TargetReason::Ordered, now);
        }
    }

    /// While an upgrade is under way two processes share the CPUs, and what they measure says nothing.
    pub(super) fn load(&mut self, samples: &[SlotLoad], now: Instant) {
        if self.phase != Phase::Running || self.upgrade.is_waiting() || self.sample_period().is_none() {
            return;
        }
        let here = |slot: &Slot| slot.state.is_active() || slot.state == State::Quarantined;
        let settled = self.wanted().all(here);
        let starting = self.slots.iter().any(Slot::is_coming);
        let mut sample = Sample { total: 0.0, working: 0, queue: 0, settled, starting };
        for load in samples {
            let state = self.slots.get(usize::from(load.slot)).map(|slot| slot.state);
            sample.total += match state {
                Some(State::Ready { health: Health::Well, .. }) => load.utilisation.clamp(0.0, 1.0),
                // Nobody is busier.
                Some(State::Ready { health: Health::Stalled { .. }, .. }) => 1.0,
                // One that is starved would need CPU, and another executor would take it from the same place.
                _ => continue,
            };
            sample.working += 1;
            sample.queue += u64::from(load.queue);
        }
        let (min, max) = self.bounds();
        let bounds = Bounds { min, max, target: self.target };
        if let Some((target, why)) = self.scaler.sample(&self.config.scaling, sample, bounds) {
            self.aim(target, why, now);
        }
    }

    /// From how many to how many automatic scaling may go.
    pub(super) fn bounds(&self) -> (u16, u16) {
        let max = self.slot_count();
        (self.config.slots_min.clamp(1, max), max)
    }

    pub(super) fn slot_count(&self) -> u16 {
        // The policy is made with a number of slots in u16.
        self.slots.len() as u16
    }

    fn aim(&mut self, count: u16, why: TargetReason, now: Instant) {
        if count == self.target {
            return;
        }
        self.target = count;
        self.actions.push(Action::Target { count, why });
        let wanted = self.slots.iter().filter(|slot| slot.wanted).count();
        let count = usize::from(count);
        self.want_more(count.saturating_sub(wanted), now);
        self.want_fewer(wanted.saturating_sub(count), now);
    }

    /// Spare slots first; else one that is on its way out, which starts again when it is through; else one that is
    /// quarantined, which at least counts.
    pub(super) fn want_more(&mut self, count: usize, now: Instant) {
        for _ in 0..count {
            let spare = self.slots.iter_mut().filter(|slot| !slot.wanted);
            let Some(slot) = spare.min_by_key(|slot| match slot.state {
                State::Idle => 0,
                State::Quarantined => 2,
                _ => 1,
            }) else {
                return;
            };
            slot.wanted = true;
            if slot.state == State::Idle {
                let index = usize::from(slot.index);
                self.begin(index, now);
            }
        }
    }

    /// The least useful first, so that nobody serves only when nobody can.
    fn want_fewer(&mut self, count: usize, now: Instant) {
        let mut leaving = Vec::new();
        for _ in 0..count {
            let wanted = self.slots.iter_mut().filter(|slot| slot.wanted);
            let Some(slot) = wanted.min_by_key(|slot| (usefulness(&slot.state), std::cmp::Reverse(slot.index))) else {
                break;
            };
            slot.wanted = false;
            let index = usize::from(slot.index);
            match slot.state {
                State::Ready { .. } => {
                    let limit = Limit::new(now, self.config.drain_deadline);
                    slot.state = State::Draining { limit: Some(limit) };
                    leaving.push((slot.index, limit.at));
                }
                // A generation that is still starting has no connection to finish.
                State::Starting(_) => self.stop_now(index, now),
                State::Backoff { .. } => self.rest(index),
                _ => {}
            }
        }
        self.settle_table();
        let drain = |(slot, deadline)| Action::Drain { slot, deadline, why: DrainReason::ScaleDown };
        self.actions.extend(leaving.into_iter().map(drain));
    }

    /// The slot is spare again: what it had is given back.
    pub(super) fn rest(&mut self, index: usize) {
        self.slots[index].state = State::Idle;
        self.retire_thread(index);
    }
}

impl Slot {
    /// Whether it will take a share of the load shortly.
    fn is_coming(&self) -> bool {
        let under_way = matches!(self.state, State::Starting(_) | State::Draining { .. } | State::Stopping { .. });
        self.wanted && under_way
    }
}

fn usefulness(state: &State) -> u8 {
    match state {
        State::Idle | State::Quarantined | State::Ended => 0,
        State::Backoff { .. } => 1,
        State::Draining { .. } | State::Stopping { .. } => 2,
        State::Starting(_) => 3,
        State::Ready { .. } if !state.is_active() => 4,
        State::Ready { .. } => 5,
    }
}
