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
    ShortageIsACrash,
    TryShortageAtOnce,
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
    RescueHealthy,
    ForgetRescue,
    RescueInStop,
    NoLastRescue,
    KeepStalledInTable,
    ForgetRecovery,
    ReplaceStarved,
    HangNeverStruck,
    StallCountsAtOnce,
    StallNeverCounts,
    LeakWithoutBound,
    ForgetLeakedThread,
    StartDuringDrain,
    ScalePastMax,
    LoseTarget,
    DrainBeforeTable,
    EndlessScaleDown,
    NoScaleAnswer,
    TwoSuccessors,
    NoUpgradeAnswer,
    ForgetKill,
    NoReattach,
    GoOnAfterHandOver,
    NoDelay,
    KeepListeners,
    NoReversalPenalty,
    OneSampleIsEnough,
    StalledAreIdle,
    OneByOne,
}

const NEVER: Duration = Duration::from_secs(1_000_000_000);

/// One step of a policy that has the defect.
pub(super) fn step(policy: &mut Policy, defect: Option<Defect>, event: Event, now: Instant) -> Vec<Action> {
    let Some(defect) = defect else {
        return policy.step(event, now);
    };
    spoil_before(policy, defect, &event, now);
    if defect == Defect::IgnoreSecondStop
        && matches!(policy.phase, Phase::Stopping { .. })
        && event == Event::Stop(StopMode::Now)
    {
        return Vec::new();
    }
    let event = match (defect, event) {
        (Defect::OneByOne, Event::Together(events)) => {
            return events.into_iter().flat_map(|event| policy.step(event, now)).collect();
        }
        (Defect::BelieveStale, event) => believe(policy, event),
        (Defect::StalledAreIdle, Event::Load { mut samples }) => {
            samples.retain(|load| policy.slots[usize::from(load.slot)].state.is_active());
            Event::Load { samples }
        }
        (Defect::ShortageIsACrash, Event::Ended { slot, generation, how: End::NoResources }) => {
            Event::Ended { slot, generation, how: End::StartFailed }
        }
        (Defect::ShortageIsACrash, Event::ThreadRefused { slot, thread }) => Event::ThreadDied { slot, thread },
        (Defect::ForgetRecovery | Defect::ReplaceStarved, Event::Together(events)) => {
            Event::Together(events.into_iter().map(|event| misread(defect, event)).collect())
        }
        (defect, event) => misread(defect, event),
    };
    let leaked: Vec<(u16, u32)> =
        policy.slots.iter().flat_map(|slot| slot.leaked.iter().map(|leaked| (slot.index, leaked.thread))).collect();
    let mut actions = policy.step(event.clone(), now);
    spoil_actions(policy, defect, &event, &mut actions, now);
    if defect == Defect::ForgetLeakedThread {
        let back =
            |action: &Action| matches!(action, Action::Join { slot, thread } if leaked.contains(&(*slot, *thread)));
        actions.retain(|action| !back(action));
    }
    change_actions(policy, defect, &mut actions);
    for slot in &mut policy.slots {
        spoil_state(defect, &mut slot.state, now);
        if let (Defect::TryShortageAtOnce, State::Backoff { until }, 1..) = (defect, &mut slot.state, slot.shortages) {
            *until = now;
        }
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

fn spoil_before(policy: &mut Policy, defect: Defect, event: &Event, now: Instant) {
    match defect {
        Defect::EarlyCut => {
            if let Phase::Stopping { drain_until, .. } = &mut policy.phase {
                *drain_until = drain_until.map(|_| now);
            }
        }
        Defect::LeakWithoutBound => policy.config.restart.leaked_max = u16::MAX,
        Defect::NoDelay => policy.config.drain_delay = Duration::ZERO,
        Defect::NoReversalPenalty => policy.config.scaling.reversal_penalty = 0,
        Defect::OneSampleIsEnough => (policy.config.scaling.up_after, policy.scaler.down_after) = (1, 1),
        Defect::TwoSuccessors if *event == Event::Upgrade => policy.upgrade = Upgrade::None,
        Defect::LoseTarget => {
            if let Event::Ended { slot, .. } = event {
                let slot = &mut policy.slots[usize::from(*slot)];
                slot.wanted &= !matches!(slot.state, State::Draining { .. });
            }
        }
        _ => {}
    }
    for slot in &mut policy.slots {
        if let (Defect::NeverHealthy, State::Ready { since, .. }) = (defect, &mut slot.state) {
            *since = now;
        }
    }
}

fn misread(defect: Defect, event: Event) -> Event {
    match (defect, event) {
        (Defect::ForgetRecovery, Event::Recovered { .. }) => Event::Tick,
        (Defect::ReplaceStarved, Event::Starved { slot, generation }) => Event::Stalled { slot, generation },
        (_, event) => event,
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
        (Defect::EndlessStopGrace, State::Stopping { limit, .. }) | (Defect::EndlessStart, State::Starting(limit)) => {
            limit.at = later(now, NEVER)
        }
        (Defect::HangNeverStruck, State::Ready { health: Health::Stalled { hang, .. }, .. }) => *hang = None,
        (Defect::StallCountsAtOnce, State::Ready { health: Health::Stalled { unready, .. }, .. }) => *unready = None,
        (Defect::StallNeverCounts, State::Ready { health: Health::Stalled { unready, .. }, .. }) => {
            *unready = Some(Limit::new(now, NEVER));
        }
        (Defect::EndlessScaleDown, State::Draining { limit: Some(limit) }) => limit.at = later(now, NEVER),
        _ => {}
    }
}

/// Actions too many.
fn spoil_actions(policy: &mut Policy, defect: Defect, event: &Event, actions: &mut Vec<Action>, now: Instant) {
    let mut begin = |index: u16| {
        policy.begin(usize::from(index), now);
        std::mem::take(&mut policy.actions)
    };
    let scaled_down = |action: &Action| match action {
        Action::Drain { slot, why: DrainReason::ScaleDown, .. } => Some(*slot),
        _ => None,
    };
    match (defect, event) {
        (Defect::TwoGenerations, Event::Ready { slot: 0, .. })
        | (Defect::StartAfterStop, Event::Ended { slot: 0, how: End::Drained, .. })
        | (Defect::GoOnAfterHandOver, Event::SuccessorReady { .. }) => {
            actions.extend(begin(0));
        }
        (Defect::StartDuringDrain, _) => {
            let slot = actions.iter().find_map(scaled_down);
            actions.extend(slot.map(begin).unwrap_or_default());
        }
        (Defect::StartQuarantined, _) => {
            let quarantined = actions.iter().find_map(|action| match action {
                Action::Quarantined { slot, .. } => Some(*slot),
                _ => None,
            });
            actions.extend(quarantined.map(begin).unwrap_or_default());
        }
        (Defect::RescueInStop | Defect::NoLastRescue, _) => {
            let first = defect == Defect::NoLastRescue;
            let end = actions.iter().position(|action| *action == Action::CloseListeners);
            // Before it, what was in force is taken back; after it, it begins anew.
            let rescue = if first { Vec::new() } else { vec![0] };
            end.into_iter().for_each(|end| actions.insert(end + usize::from(!first), Action::Rescue(rescue.clone())));
        }
        (Defect::ExitTwice, _) if matches!(actions.last(), Some(Action::Exit(_))) => {
            actions.extend(actions.last().cloned());
        }
        (Defect::DrainBeforeTable, _) => actions.sort_by_key(|action| scaled_down(action).is_none()),
        _ => {}
    }
}

/// Actions too few, and other ones.
fn change_actions(policy: &Policy, defect: Defect, actions: &mut Vec<Action>) {
    let slots = policy.slots.len();
    let mut tables = slots;
    actions.retain_mut(|action| match (defect, action) {
        (Defect::DropExit, Action::Exit(_))
        | (Defect::ForgetReadiness, Action::Readiness(_))
        | (Defect::ForgetJoin, Action::Join { .. })
        | (Defect::NoScaleAnswer, Action::ScaleAnswer(Err(_)))
        | (Defect::NoUpgradeAnswer, Action::UpgradeAnswer(Err(UpgradeRefusal::TimedOut)))
        | (Defect::ForgetKill, Action::KillSuccessor { .. })
        | (Defect::NoReattach, Action::Reattach)
        | (Defect::KeepListeners, Action::CloseListeners) => false,
        (Defect::RescueHealthy, Action::Rescue(rescue)) => {
            *rescue = (0..slots as u16).collect();
            true
        }
        (Defect::ForgetRescue, Action::Rescue(rescue)) => {
            rescue.pop();
            true
        }
        (Defect::KeepStalledInTable, Action::SetActive(active)) => {
            let ill = policy.slots.iter().filter(|s| matches!(s.state, State::Ready { .. })).map(|s| s.index);
            *active = ill.collect();
            true
        }
        (Defect::ScalePastMax, Action::Target { count, .. }) => {
            *count += slots as u16;
            true
        }
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
