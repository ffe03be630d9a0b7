//! Deliberate defects. A simulation that does not catch each of them proves nothing about the rest.
//!
//! They are worked from outside, on the policy's private state and on its actions, so that the policy
//! itself carries no trace of them.

use super::slot::{State, later};
use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Defect {
    SkipBackoff,
    ForgetSlotAfterCrash,
    NeverQuarantine,
    StartQuarantined,
    StartAfterStop,
    DropExit,
    ExitTwice,
    BelieveStale,
    TwoGenerations,
    SkipGenerationNumber,
    KeepDeadInTable,
    ForgetReadiness,
    ReuseDeadThread,
    ForgetJoin,
    EndlessDrain,
    EndlessStopGrace,
    EndlessStart,
    IgnoreSecondStop,
    EarlyCut,
    NeverHealthy,
    PraiseEveryDrain,
}

const NEVER: Duration = Duration::from_secs(1_000_000_000);

/// One step of a policy that has the defect.
pub(super) fn step(policy: &mut Policy, defect: Option<Defect>, event: Event, now: Instant) -> Vec<Action> {
    let Some(defect) = defect else {
        return policy.step(event, now);
    };
    spoil_before(policy, defect, now);
    if defect == Defect::IgnoreSecondStop
        && matches!(policy.phase, Phase::Stopping { .. })
        && event == Event::Stop(StopMode::Now)
    {
        return Vec::new();
    }
    let event = if defect == Defect::BelieveStale { believe(policy, event) } else { event };
    let mut actions = policy.step(event.clone(), now);
    spoil_actions(policy, defect, event, &mut actions, now);
    for slot in &mut policy.slots {
        spoil_state(defect, &mut slot.state, now);
        if defect == Defect::NeverQuarantine {
            slot.recent.clear();
        }
    }
    if let Phase::Stopping { drain_until: Some(until), .. } = &mut policy.phase
        && defect == Defect::EndlessDrain
    {
        *until = later(now, NEVER);
    }
    actions
}

fn spoil_before(policy: &mut Policy, defect: Defect, now: Instant) {
    if let (Defect::EarlyCut, Phase::Stopping { drain_until, .. }) = (defect, &mut policy.phase) {
        *drain_until = drain_until.map(|_| now);
    }
    for slot in &mut policy.slots {
        if let (Defect::NeverHealthy, State::Ready { since }) = (defect, &mut slot.state) {
            *since = now;
        }
    }
}

fn believe(policy: &Policy, event: Event) -> Event {
    let latest = |slot: u16| policy.slots.get(usize::from(slot)).map_or(0, |s| s.generation);
    match event {
        Event::Ready { slot, .. } => Event::Ready { slot, generation: latest(slot) },
        Event::Ended { slot, how, .. } => Event::Ended { slot, generation: latest(slot), how },
        other => other,
    }
}

fn spoil_state(defect: Defect, state: &mut State, now: Instant) {
    match (defect, state) {
        (Defect::SkipBackoff, State::Backoff { until }) => *until = now,
        (Defect::ForgetSlotAfterCrash, State::Backoff { until }) => *until = later(now, NEVER),
        (Defect::EndlessStopGrace, State::Stopping(limit)) | (Defect::EndlessStart, State::Starting(limit)) => {
            limit.at = later(now, NEVER)
        }
        _ => {}
    }
}

fn spoil_actions(policy: &mut Policy, defect: Defect, event: Event, actions: &mut Vec<Action>, now: Instant) {
    let mut begin = |index: u16| {
        policy.begin(usize::from(index), now);
        std::mem::take(&mut policy.actions)
    };
    match (defect, event) {
        (Defect::TwoGenerations, Event::Ready { slot: 0, .. })
        | (Defect::StartAfterStop, Event::Ended { slot: 0, how: End::Drained, .. }) => {
            actions.extend(begin(0));
        }
        (Defect::StartQuarantined, _) => {
            let quarantined = actions.iter().find_map(|action| match action {
                Action::Quarantined { slot, .. } => Some(*slot),
                _ => None,
            });
            actions.extend(quarantined.map(begin).unwrap_or_default());
        }
        (Defect::ExitTwice, _) if matches!(actions.last(), Some(Action::Exit(_))) => {
            actions.extend(actions.last().cloned());
        }
        _ => {}
    }
    let mut tables = policy.slots.len();
    actions.retain_mut(|action| match (defect, action) {
        (Defect::DropExit, Action::Exit(_))
        | (Defect::ForgetReadiness, Action::Readiness(_))
        | (Defect::ForgetJoin, Action::Join { .. }) => false,
        (Defect::KeepDeadInTable, Action::SetActive(active)) => {
            tables -= active.len();
            tables == 0
        }
        (Defect::PraiseEveryDrain, Action::Exit(Outcome::Stopped { how, .. })) => {
            *how = Stopped::Drained;
            true
        }
        (Defect::SkipGenerationNumber, Action::StartGeneration { generation, .. }) => {
            *generation += *generation / 2;
            true
        }
        (Defect::ReuseDeadThread, Action::StartGeneration { generation, fresh_thread, .. }) => {
            *fresh_thread &= *generation == 1;
            true
        }
        _ => true,
    });
}
