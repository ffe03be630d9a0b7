//! Tells what an executor whose turn does not end is short of: stalled, if its own code holds it up; starved, if it would
//! go on but has no CPU. Only the first is a reason to replace it.
//!
//! A thread spends its time in one of three ways, and the kernel tells them apart:
//! - *running*: its CPU clock advances. Its own time;
//! - *blocked* in the kernel (state S or D): on a lock, a read, a sleep that its code asked for. Its own time as well;
//! - *waiting for a CPU* (state R without CPU time, or run delay), or stopped (T, t). Not its doing. A cgroup that is
//!   throttled shows as R.
//!
//! The state is that of one instant, so it decides about the time since the look before only, and about no more than what
//! CPU time and run delay leave unexplained. Run delay alone would not do: the kernel adds it up when the wait is over.
//!
//! An executor that sleeps has no turn that could be late, but it wakes by itself within [`REST_MAX`]. One whose CPU clock
//! stands still for longer has lost its CPU in its sleep, and clients wait in its queue: it is starved as well.
//!
//! Decides by what it is told; [`Scheduling`] is read by the caller, and only when a turn is late.

use std::time::{Duration, Instant};

use crate::executor::generation::REST_MAX;
use crate::sys::procfs::{Scheduling, ThreadState};

/// What a look at an executor has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Asleep and awake in time, or in a turn that is not late; or late, and it is too early to say why.
    Healthy,
    /// One turn has lasted longer than the limit, and it is the executor's doing. `own` is how long without the time for
    /// which it had no CPU: what a limit on hanging is to be compared with.
    Stalled { own: Duration },
    /// One turn, or one sleep, has lasted longer than its limit, since the executor has no CPU.
    Starved { late: Duration },
    /// The turn or sleep that was late has ended; the last thing known of it is how long it had lasted.
    Recovered { after: Duration },
}

/// Who is late is given this long to be seen at work, once a look has found it: a limit of a few milliseconds would leave less
/// than a loaded machine takes to give a thread its CPU back. A quarter of the default limit.
const PATIENCE_MIN: Duration = Duration::from_millis(25);

/// What one look at an executor can see without asking the kernel about its thread.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    pub now: Instant,
    /// How long the present turn lasts; `None` if the executor sleeps.
    pub busy: Option<Duration>,
    /// CPU time of the thread since its start.
    pub cpu: Duration,
}

/// One executor's. Looks may come at any time; [`Watch::next_look`] says when one is worth it.
#[derive(Debug)]
pub(super) struct Watch {
    limit: Duration,
    turn: Option<Turn>,
    /// There is none in a turn.
    rest: Option<Rest>,
}

/// A sleep, since the thread has last been seen to run in it.
#[derive(Debug)]
struct Rest {
    since: Instant,
    last_look: Instant,
    cpu: Duration,
    /// When it was first found too long.
    late_since: Option<Instant>,
    starved: bool,
}

/// A turn that was seen at least once.
#[derive(Debug)]
struct Turn {
    began: Instant,
    first_look: Instant,
    last: Look,
    /// Of the time since the first look, what was the executor's own; of all the turn, once it is late.
    own: Duration,
    late: Option<Late>,
}

#[derive(Debug, Clone, Copy)]
struct Look {
    at: Instant,
    cpu: Duration,
    /// Of the thread's whole life; `None` while the turn was not late, or where the kernel does not count it.
    run_delay: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Late {
    Stalled,
    Starved,
}

impl Watch {
    /// Turns of up to `limit` are in order.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, turn: None, rest: None }
    }

    /// Sleeps of up to this long are in order, and looks that are no rarer find those that are not.
    pub(super) fn rest_limit(&self) -> Duration {
        REST_MAX + self.limit.max(PATIENCE_MIN)
    }

    /// How long a sleep that is too long is looked at until it is judged.
    fn rest_patience(&self) -> Duration {
        (self.limit / 4).max(PATIENCE_MIN)
    }

    /// Whether a sleep is too long: the next look is not to be put off.
    pub(super) fn has_doubts(&self) -> bool {
        self.rest.as_ref().is_some_and(|rest| rest.late_since.is_some())
    }

    /// Takes a reading into account. `scheduling` is asked for only when the turn is late, or nearly so; it answers `None`
    /// where `/proc` does not tell, and then a blocked executor cannot be told from a starved one and counts as starved.
    pub(super) fn look(&mut self, reading: Reading, scheduling: impl FnOnce() -> Option<Scheduling>) -> Verdict {
        let Reading { now, busy, cpu } = reading;
        let sleep =
            if busy.is_none() { self.rest_on(now, cpu) } else { self.rest.take().and_then(|rest| rest.end(now)) };
        if let Some(verdict) = sleep {
            return verdict;
        }
        let began = busy.and_then(|busy| now.checked_sub(busy));
        let last = Look { at: now, cpu, run_delay: None };
        if self.turn.as_ref().map(|turn| turn.began) != began {
            let before = self.turn.take().filter(|turn| turn.late.is_some());
            let first = |began| Turn { began, first_look: now, last, own: Duration::ZERO, late: None };
            self.turn = began.map(first);
            return before.map_or(Verdict::Healthy, |turn| Verdict::Recovered { after: turn.last.at - turn.began });
        }
        let Some(turn) = &mut self.turn else { return Verdict::Healthy };
        let busy = busy.unwrap_or_default();
        if busy >= self.limit / 2 {
            turn.account(last, scheduling(), self.limit);
            turn.judge(busy, self.limit)
        } else {
            turn.account(last, None, self.limit);
            Verdict::Healthy
        }
    }

    /// What is to be said of a sleep: whether it has become too long, or is over.
    fn rest_on(&mut self, now: Instant, cpu: Duration) -> Option<Verdict> {
        let (limit, patience) = (self.rest_limit(), self.rest_patience());
        let fresh = || Rest { since: now, last_look: now, cpu, late_since: None, starved: false };
        let rest = self.rest.get_or_insert_with(fresh);
        // After a long absence of the watch itself the executor is given the time to wake that it had no chance to use.
        let away = !rest.starved && now.saturating_duration_since(rest.last_look) > limit * 2;
        if rest.cpu != cpu || away {
            return std::mem::replace(rest, fresh()).end(now);
        }
        rest.last_look = now;
        let late = now.saturating_duration_since(rest.since);
        if late < limit {
            return None;
        }
        // Looked at once more before it is judged: all may have stood still, and this is the first to run again.
        let late_since = *rest.late_since.get_or_insert(now);
        rest.starved |= now.saturating_duration_since(late_since) >= patience;
        rest.starved.then_some(Verdict::Starved { late })
    }

    /// When the next look can change the verdict: at least a quarter of the limit before the present turn, or the next,
    /// is late, so that there is something to compare with when it is; a tenth of the limit after it is, to see it come back.
    pub(super) fn next_look(&self, now: Instant) -> Instant {
        let Some(turn) = &self.turn else {
            return match &self.rest {
                Some(Rest { starved: true, .. }) => now + self.limit / 10,
                Some(Rest { late_since: Some(_), .. }) => now + self.rest_patience(),
                _ => now + self.limit * 3 / 4,
            };
        };
        let marks = [turn.began + self.limit / 2, turn.began + self.limit];
        marks.into_iter().find(|mark| *mark > now).unwrap_or(now + self.limit / 10)
    }
}

impl Rest {
    /// The executor has run.
    fn end(self, now: Instant) -> Option<Verdict> {
        self.starved.then(|| Verdict::Recovered { after: now.saturating_duration_since(self.since) })
    }
}

impl Turn {
    /// Adds the time since the last look to the executor's own, as far as it was that.
    fn account(&mut self, look: Look, scheduling: Option<Scheduling>, limit: Duration) {
        let passed = look.at.saturating_duration_since(self.last.at);
        let ran = look.cpu.saturating_sub(self.last.cpu).min(passed);
        let idle = passed - ran;
        let run_delay = scheduling.and_then(|scheduling| scheduling.run_delay);
        // The first figure has none to compare with.
        let waited = match (run_delay, self.last.run_delay) {
            (Some(now), Some(before)) => now.saturating_sub(before).min(idle),
            _ => Duration::ZERO,
        };
        // After a long absence of the watch itself (the process was stopped, say) the present state tells nothing.
        let away = passed > limit * 3;
        if away && self.late.is_none() {
            // And the executor is given the time to end its turn that it had no chance to use.
            self.first_look = look.at;
        }
        let blocked = match scheduling.map(|scheduling| scheduling.state) {
            Some(ThreadState::Blocked) if !away => idle - waited,
            _ => Duration::ZERO,
        };
        self.own += ran + blocked;
        self.last = Look { run_delay, ..look };
    }

    fn judge(&mut self, busy: Duration, limit: Duration) -> Verdict {
        let watched = self.last.at.saturating_duration_since(self.first_look);
        if busy < limit || watched < limit / 4 {
            return Verdict::Healthy;
        }
        if self.late.is_none() {
            // The part before the first look was like the rest; unless it is long, and the watch was away.
            let before = Some(busy.saturating_sub(watched)).filter(|before| *before <= limit * 3).unwrap_or_default();
            self.own += before.mul_f64(self.own.as_secs_f64() / watched.as_secs_f64());
        }
        let own = self.own;
        // More than half of the time; or as much as a turn may last with all the CPU it asks for. Once found, that stays
        // true until the turn ends, however little CPU it gets afterwards.
        let stalled = self.late == Some(Late::Stalled) || own >= busy / 2 || own >= limit;
        self.late = Some(if stalled { Late::Stalled } else { Late::Starved });
        if stalled { Verdict::Stalled { own } } else { Verdict::Starved { late: busy } }
    }
}

#[cfg(test)]
mod tests;
