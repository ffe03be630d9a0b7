//! The rules that an action can break at the moment when it is given.

use std::time::{Duration, Instant};

use super::super::*;
use super::model::{Account, Broken, Leak, Life, Model, Succession, rule};

/// What a history has seen by an action.
type Seen = Result<Vec<&'static str>, Broken>;

impl Model {
    /// Takes in an action; answers with what a history has seen by it.
    pub(super) fn apply(&mut self, action: &Action) -> Seen {
        rule("one exit", self.exited.is_none(), action)?;
        match *action {
            Action::StartGeneration { slot, .. }
            | Action::Drain { slot, .. }
            | Action::StopNow { slot }
            | Action::Join { slot, .. }
            | Action::Abandon { slot, .. }
            | Action::Condemn { slot, .. }
            | Action::Abort { slot }
            | Action::StartFailed { slot, .. }
            | Action::StartTimedOut { slot }
            | Action::Quarantined { slot, .. } => {
                rule("slot exists", usize::from(slot) < self.slots.len(), action)?;
            }
            _ => {}
        }
        match *action {
            Action::StartGeneration { slot, generation, thread, fresh_thread } => {
                self.begin(slot, generation, thread, fresh_thread)
            }
            Action::Drain { slot, deadline, why } => self.drain(slot, deadline, why),
            Action::StopNow { slot } => self.stop_now(slot),
            Action::StartTimedOut { slot } => {
                let account = &self.slots[usize::from(slot)];
                let late = account.life == Life::Starting && self.now - account.started_at >= self.config.start_timeout;
                rule("start", late && self.serves(), account)?;
                Ok(vec!["a restart took too long"])
            }
            Action::Join { slot, thread } => self.join(slot, thread),
            Action::Abandon { slot, thread } => self.abandon(slot, thread),
            Action::Condemn { slot, thread, generation } => self.condemn(slot, thread, generation),
            Action::Abort { slot } => {
                self.hangs(slot, HangPolicy::Abort)?;
                self.aborted = true;
                Ok(vec!["aborted"])
            }
            Action::SetActive(ref table) => {
                let exist = table.iter().all(|slot| usize::from(*slot) < self.slots.len());
                rule("table", exist && !table.is_empty() && table.is_sorted(), table)?;
                rule("table", *table != self.table, "set to what it was")?;
                self.table.clone_from(table);
                Ok(Vec::new())
            }
            Action::Rescue(ref slots) => {
                let exist = slots.iter().all(|slot| usize::from(*slot) < self.slots.len());
                rule("rescue", !self.is_closing(), "the end of it belongs to the end of the listeners")?;
                rule("rescue", exist && slots.is_sorted() && *slots != self.rescue, slots)?;
                self.rescue.clone_from(slots);
                Ok(if slots.is_empty() { vec![] } else { vec!["rescue"] })
            }
            Action::Reattach => {
                rule("re-attach", self.reattach_due, "nobody has replaced the table")?;
                self.reattach_due = false;
                Ok(vec!["re-attached"])
            }
            Action::CloseListeners => {
                let may = self.is_closing() && self.start_failed.is_none() && !self.listeners_closed;
                rule("listeners", may, &*self)?;
                self.listeners_closed = true;
                self.rescue.clear();
                Ok(Vec::new())
            }
            Action::Readiness(readiness) => {
                rule("readiness", readiness != self.readiness, "set to what it was")?;
                self.readiness = readiness;
                Ok(match readiness {
                    Readiness::NotReady(NotReady::Stalled) => vec!["stalled, not ready"],
                    Readiness::NotReady(NotReady::NoActiveSlot) => vec!["no active slot"],
                    Readiness::NotReady(NotReady::MostQuarantined) => vec!["most quarantined"],
                    _ => Vec::new(),
                })
            }
            Action::Started => {
                let ready = self.slots.iter().filter(|a| matches!(a.life, Life::Ready { .. })).count();
                let may = !self.was_started && !self.is_closing();
                rule("started", may && ready == usize::from(self.target), &*self)?;
                self.was_started = true;
                // Hangs are looked at from now on.
                self.jumped_at = Some(self.now);
                Ok(Vec::new())
            }
            Action::StartFailed { slot, failure } => self.start_failed(slot, failure),
            Action::Quarantined { slot, reason } => self.quarantined(slot, reason),
            Action::Target { count, why } => self.aim(count, why),
            Action::ScaleAnswer(answer) => self.scale_answer(answer),
            Action::SpawnSuccessor { successor, deadline } => {
                rule("two successors", !self.is_upgrading(), successor)?;
                rule("upgrade", self.is_running() && self.event == Event::Upgrade, successor)?;
                rule("successor number", successor == self.successors + 1, successor)?;
                rule("upgrade", deadline == self.now + self.config.upgrade_timeout, deadline)?;
                self.successors = successor;
                self.succession = Succession::Waiting { successor, since: self.now };
                Ok(Vec::new())
            }
            Action::KillSuccessor { successor } => self.kill_successor(successor),
            Action::UpgradeAnswer(answer) => self.upgrade_answer(answer),
            Action::Exit(outcome) => self.exit(outcome),
        }
    }

    fn begin(&mut self, slot: u16, generation: u32, thread: u32, fresh_thread: bool) -> Seen {
        let (now, closing) = (self.now, self.is_closing());
        let restart = &self.config.restart;
        let scaled = matches!(self.event, Event::Scale { .. } | Event::Load { .. } | Event::Start);
        let account = &mut self.slots[usize::from(slot)];
        rule("start after stop", !closing, slot)?;
        rule("start in quarantine", !account.quarantined, slot)?;
        rule("stuck thread", !account.given_up, slot)?;
        rule("two generations", account.life == Life::None, slot)?;
        rule("generation number", generation == account.generation + 1, generation)?;
        rule("fresh thread", fresh_thread != account.unjoined, (slot, generation))?;
        rule("fresh thread", fresh_thread || !account.thread_dead, (slot, generation))?;
        let threads = account.threads + u32::from(fresh_thread);
        rule("thread number", thread == threads, thread)?;
        let mut seen = Vec::new();
        if let Some(since) = account.waits_since.take() {
            let (shortest, _) = account.pause(restart);
            rule("backoff", now - since >= shortest, (now - since, shortest))?;
            seen.push(if shortest > Duration::ZERO { "backoff" } else { "restart" });
            seen.extend(account.is_short.then_some("shortage"));
        } else {
            rule("start", scaled || account.retired_now, "nothing had failed, and nobody asked")?;
            seen.extend((self.event != Event::Start).then_some("scaled up"));
            seen.extend(account.retired_now.then_some("wanted again"));
        }
        let recent = account.failures.iter().filter(|at| now - **at <= restart.quarantine_window).count();
        let most = restart.quarantine_after as usize;
        rule("quarantine", most == 0 || recent < most, recent)?;
        if fresh_thread && generation > 1 {
            seen.push("fresh thread");
        }
        account.generation = generation;
        account.threads = threads;
        account.started_at = now;
        account.life = Life::Starting;
        account.illness = None;
        account.unjoined = true;
        account.thread_dead = false;
        Ok(seen)
    }

    fn drain(&mut self, slot: u16, deadline: Instant, why: DrainReason) -> Seen {
        let (now, closing, serves) = (self.now, self.is_closing(), self.serves());
        let anybody = self.slots.iter().any(|a| a.is_active());
        let in_table = self.table.contains(&slot);
        let account = &mut self.slots[usize::from(slot)];
        rule("drain", matches!(account.life, Life::Ready { .. }), &account)?;
        let (fits, until, name) = match why {
            DrainReason::ScaleDown => (serves, Some(now + self.config.drain_deadline), "scaled down"),
            DrainReason::Upgrade => (closing && self.handed_over, self.drain_until, "handed over"),
            DrainReason::Stop => (closing && !self.handed_over && self.stop.is_some(), self.drain_until, "stop"),
        };
        rule("drain", fits && until == Some(deadline), (why, deadline, until))?;
        let until = if why == DrainReason::ScaleDown {
            account.life = Life::None;
            // Unless it was the last that served, new connections go elsewhere by now.
            let anybody = anybody && self.slots.iter().any(|a| a.is_active());
            rule("drain before leaving the table", !(anybody && in_table), slot)?;
            until
        } else {
            rule("listeners", self.listeners_closed, "they are let go of before the drain")?;
            None
        };
        let account = &mut self.slots[usize::from(slot)];
        account.life = Life::Draining { since: now, until };
        account.illness = None;
        Ok(vec![name])
    }

    fn stop_now(&mut self, slot: u16) -> Seen {
        let (now, serves, closing) = (self.now, self.serves(), self.is_closing());
        let scaled = matches!(self.event, Event::Scale { .. } | Event::Load { .. });
        let account = &mut self.slots[usize::from(slot)];
        rule("live", !matches!(account.life, Life::None | Life::Stopping { .. }), &account)?;
        let late = account.life == Life::Starting && now - account.started_at >= self.config.start_timeout;
        let retired = match account.life {
            Life::Draining { until, .. } => {
                let over = until.is_some_and(|at| at <= now) || self.drain_until.is_some_and(|at| at <= now);
                rule("drain", over, &account)?;
                self.cut += usize::from(closing);
                true
            }
            _ => scaled,
        };
        if serves && !retired {
            rule("stop", late, &account)?;
        }
        if scaled {
            rule("stop", account.life == Life::Starting, &account)?;
        }
        account.life = Life::Stopping { since: now, retired };
        account.illness = None;
        Ok(Vec::new())
    }

    fn join(&mut self, slot: u16, thread: u32) -> Seen {
        let account = &mut self.slots[usize::from(slot)];
        if let Some(place) = account.leaks.iter().position(|leak| leak.thread == thread) {
            rule("join", account.leaks.remove(place).back, "it has not come back")?;
            return Ok(vec!["a hung thread came back"]);
        }
        let may = account.unjoined && account.threads == thread;
        rule("join", may && account.life == Life::None && !account.given_up, &account)?;
        account.unjoined = false;
        Ok(Vec::new())
    }

    fn start_failed(&mut self, slot: u16, why: Failure) -> Seen {
        let account = &self.slots[usize::from(slot)];
        if why == Failure::StartTimedOut {
            let late = self.now - account.started_at >= self.config.start_timeout;
            let hangs = account.life == Life::Starting && late;
            let may = hangs && !self.was_started && !self.is_closing();
            rule("start failed", may, &*self)?;
            self.start_failed = Some(slot);
            return Ok(vec!["start timed out"]);
        }
        rule("start failed", self.start_failed == Some(slot), slot)?;
        Ok(Vec::new())
    }

    fn quarantined(&mut self, slot: u16, why: Quarantine) -> Seen {
        let serves = self.serves();
        let crash_loop = self.is_crash_loop(slot);
        let most = usize::from(self.config.restart.leaked_max.max(1));
        let account = &mut self.slots[usize::from(slot)];
        rule("quarantine", serves && !account.quarantined, &account)?;
        account.quarantined = true;
        account.waits_since = None;
        let (fits, name) = match why {
            Quarantine::CrashLoop => (crash_loop, "crash loop"),
            Quarantine::Stuck => (account.given_up, "stuck"),
            Quarantine::Hangs => (account.leaks.len() == most, "hangs"),
        };
        rule("quarantine", fits, &account)?;
        Ok(vec![name])
    }

    fn abandon(&mut self, slot: u16, thread: u32) -> Seen {
        let (now, grace) = (self.now, self.config.stop_grace);
        let account = &mut self.slots[usize::from(slot)];
        let deaf = matches!(account.life, Life::Stopping { since, .. } if now - since >= grace);
        rule("stop grace", deaf && account.threads == thread, &account)?;
        account.life = Life::None;
        account.given_up = true;
        Ok(vec!["abandoned"])
    }

    fn condemn(&mut self, slot: u16, thread: u32, generation: u32) -> Seen {
        self.hangs(slot, HangPolicy::Replace)?;
        let (now, healthy_after) = (self.now, self.config.restart.healthy_after);
        let account = &mut self.slots[usize::from(slot)];
        let same = account.threads == thread && account.generation == generation && account.unjoined;
        rule("hang", same, &account)?;
        Self::fails(account, healthy_after, now);
        account.leaks.push(Leak { generation, thread, back: false });
        account.life = Life::None;
        account.unjoined = false;
        Ok(vec!["condemned"])
    }

    /// Whether it may be said that the slot hangs, and the policy is for it.
    fn hangs(&self, slot: u16, policy: HangPolicy) -> Result<(), Broken> {
        let account = &self.slots[usize::from(slot)];
        rule("hang", self.serves() && self.config.hang == policy, policy)?;
        let illness = account.illness.filter(|illness| illness.stalled);
        let long = illness.map(|illness| self.stalled_for(&illness).1);
        rule("hang", long.zip(self.config.hang_timeout).is_some_and(|(long, limit)| long >= limit), account)
    }

    fn aim(&mut self, count: u16, why: TargetReason) -> Seen {
        rule("scale bounds", count >= 1 && usize::from(count) <= self.slots.len(), count)?;
        rule("target", count != self.target && self.is_running(), count)?;
        let (min, max) = self.scaling_bounds();
        let (scaling, old) = (&self.config.scaling, self.target);
        let Event::Load { samples } = &self.event else {
            rule("target", why == TargetReason::Ordered && self.event == Event::Scale { count }, (count, why))?;
            self.target = count;
            return Ok(vec!["ordered"]);
        };
        // An order may have gone below, and an emergency goes up from there.
        let fits = (min..=max).contains(&count) || why == TargetReason::Queue && count <= max;
        rule("scale bounds", min < max && fits, (min, max, count))?;
        rule("upgrade", !self.is_upgrading(), "it is no time for scaling")?;
        let (mut total, mut queue, mut loads) = (0.0, 0, 0_u16);
        for load in samples {
            total += match &self.slots[usize::from(load.slot)] {
                account if account.is_active() => load.utilisation,
                account if account.illness.is_some_and(|illness| illness.stalled) => 1.0,
                _ => continue,
            };
            queue += load.queue;
            loads += 1;
        }
        let (fits, name) = match why {
            TargetReason::Ordered => (false, "ordered"),
            TargetReason::Busy => (count > old && total / f32::from(loads) > scaling.high, "busy"),
            TargetReason::Queue => (count > old && queue >= scaling.emergency_queue, "queue"),
            TargetReason::Idle => (count < old && total / f32::from(count) <= scaling.low + 0.001, "idle"),
            TargetReason::Bounds => (old < min && count == min, "bounds"),
        };
        rule("scaling", fits, (old, count, why, total, queue))?;
        self.target = count;
        Ok(vec![name])
    }

    fn scale_answer(&mut self, answer: Result<u16, ScaleRefusal>) -> Seen {
        let max = self.slots.len() as u16;
        let Event::Scale { count } = self.event else {
            return Err(Broken::new("one answer", "nobody had asked".into()));
        };
        let expected = if self.is_closing() || self.stop.is_some() {
            Err(ScaleRefusal::Stopping)
        } else if !self.was_started {
            Err(ScaleRefusal::Starting)
        } else if self.is_upgrading() {
            Err(ScaleRefusal::Upgrading)
        } else if count == 0 || count > max {
            Err(ScaleRefusal::OutOfRange { max })
        } else {
            Ok(count)
        };
        rule("scale answer", answer == expected, (answer, expected))?;
        rule("one answer", self.scales_due == 1, self.scales_due)?;
        self.scales_due = 0;
        Ok(if answer.is_err() { vec!["scale refused"] } else { vec![] })
    }

    fn kill_successor(&mut self, number: u32) -> Seen {
        let Succession::Waiting { successor, since } = self.succession else {
            return Err(Broken::new("upgrade", format!("{number} is not waited for")));
        };
        let late = self.now - since >= self.config.upgrade_timeout;
        rule("upgrade", successor == number && (late || self.stop.is_some()), (number, since))?;
        self.succession = Succession::Killed { successor, at: self.now };
        self.reattach_due = self.serves();
        Ok(Vec::new())
    }

    fn upgrade_answer(&mut self, answer: Result<(), UpgradeRefusal>) -> Seen {
        rule("one answer", self.upgrades_due > 0, answer)?;
        self.upgrades_due -= 1;
        let asked = self.event == Event::Upgrade;
        let killed_now = matches!(self.succession, Succession::Killed { at, .. } if at == self.now);
        let killed_lately =
            matches!(self.succession, Succession::Killed { at, .. } if self.now - at < self.config.stop_grace);
        let stopping = self.is_closing() || self.stop.is_some();
        let (fits, name) = match answer {
            Ok(()) => (self.handed_over && matches!(self.event, Event::SuccessorReady { .. }), "upgraded"),
            Err(UpgradeRefusal::Starting) => (asked && !self.was_started && !stopping, "upgrade refused"),
            Err(UpgradeRefusal::Stopping) => (asked && stopping, "upgrade refused"),
            Err(UpgradeRefusal::AlreadyUpgrading) => (asked && (self.is_upgrading() || killed_lately), "upgrade twice"),
            Err(UpgradeRefusal::TimedOut) => (self.event == Event::Tick && killed_now, "upgrade timed out"),
            Err(UpgradeRefusal::Failed) => (matches!(self.event, Event::SuccessorFailed { .. }), "upgrade failed"),
            Err(UpgradeRefusal::Interrupted) => {
                (matches!(self.event, Event::Stop(_)) && killed_now, "upgrade interrupted")
            }
        };
        rule("upgrade answer", fits, answer)?;
        Ok(vec![name])
    }

    fn exit(&mut self, outcome: Outcome) -> Seen {
        for account in &self.slots {
            rule("exit while live", account.life == Life::None, account)?;
            rule("join", account.unjoined == account.given_up, account)?;
        }
        rule("one answer", self.upgrades_due == 0 && self.scales_due == 0, "an order is left without one")?;
        let left: usize = self.slots.iter().map(Account::left_behind).sum();
        let stop_now = matches!(self.stop, Some((StopMode::Now, _)));
        let (fits, abandoned, name) = match outcome {
            Outcome::Stopped { how, handed_over, failed, abandoned } => {
                let (fits, name) = match how {
                    Stopped::AtOnce => (stop_now, "at once"),
                    Stopped::Drained => (!stop_now && self.cut == 0 && !self.delay_cut, "drained"),
                    Stopped::DeadlinePassed => (!stop_now && self.cut > 0, "deadline passed"),
                    Stopped::Interrupted => (!stop_now && (self.cut > 0 || self.delay_cut), "interrupted"),
                };
                let fits = fits && usize::from(failed) == self.crashed && self.listeners_closed;
                let fits = fits && handed_over == self.handed_over;
                (fits && (self.stop.is_some() || handed_over), abandoned, name)
            }
            Outcome::StartFailed { slot, abandoned, .. } => {
                (self.start_failed == Some(slot), abandoned, "start failed")
            }
            Outcome::AllQuarantined { abandoned } => {
                let all = self.all_quarantined() && !self.is_upgrading();
                (all && self.is_running(), abandoned, "all quarantined")
            }
        };
        rule("outcome", fits && usize::from(abandoned) == left, (outcome, left))?;
        let early = self.stop.is_some() && !self.was_started;
        self.exited = Some(outcome);
        Ok([Some(name), early.then_some("stop while starting")].into_iter().flatten().collect())
    }
}

impl Account {
    /// Whether new connections are in good hands.
    pub(super) fn is_active(&self) -> bool {
        matches!(self.life, Life::Ready { .. }) && self.illness.is_none()
    }

    /// The shortest and the longest pause before the restart that it waits for.
    pub(super) fn pause(&self, restart: &RestartPolicy) -> (Duration, Duration) {
        if !self.is_short {
            return pause(restart, self.in_a_row);
        }
        // Never at once: the first one waits as long as the second crash does.
        let (shortest, longest) = pause(restart, self.shortages + 1);
        (shortest.max(SHORTAGE_PAUSE_MIN), longest.max(SHORTAGE_PAUSE_MIN))
    }

    pub(super) fn left_behind(&self) -> usize {
        self.leaks.len() + usize::from(self.given_up)
    }
}

/// The shortest and the longest pause before the restart after so many failures in a row.
fn pause(restart: &RestartPolicy, in_a_row: u32) -> (Duration, Duration) {
    if in_a_row < 2 {
        return (Duration::ZERO, Duration::ZERO);
    }
    let mut longest = restart.backoff_base;
    for _ in 2..in_a_row {
        longest = (longest * 2).min(restart.backoff_max);
    }
    longest = longest.min(restart.backoff_max);
    let rounding = Duration::from_nanos(2);
    let shortest = longest.mul_f64(1.0 - f64::from(restart.jitter));
    (shortest.saturating_sub(rounding), longest + rounding)
}
