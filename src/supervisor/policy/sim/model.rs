//! What a policy may do and must have done, said independently of how it does it.
//!
//! The model hears the same events, sees the actions, and keeps its own account of every slot.

use std::time::{Duration, Instant};

use super::super::*;

/// Virtual time that may go by between a deadline and the tick that finds it, jumps apart.
const SLACK: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(super) struct Broken {
    pub(super) rule: &'static str,
    pub(super) detail: String,
}

impl Broken {
    pub(super) fn new(rule: &'static str, detail: String) -> Self {
        Self { rule, detail }
    }
}

fn rule(name: &'static str, holds: bool, detail: impl std::fmt::Debug) -> Result<(), Broken> {
    if holds {
        return Ok(());
    }
    Err(Broken::new(name, format!("{detail:?}")))
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Life {
    None,
    Starting,
    Ready { since: Instant },
    Draining,
    Stopping { since: Instant },
}

#[derive(Debug)]
struct Account {
    generation: u32,
    started_at: Instant,
    life: Life,
    threads: u32,
    /// The thread is there, or is dead but not joined yet.
    unjoined: bool,
    thread_dead: bool,
    /// Given up after a stop that was not answered.
    given_up: bool,
    quarantined: bool,
    in_a_row: u32,
    failures: Vec<Instant>,
    starts: Vec<Instant>,
    /// Failed at, and not started since.
    waits_since: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Model {
    config: Config,
    now: Instant,
    /// When a tick last came so late that limits may have been extended.
    jumped_at: Option<Instant>,
    late: Duration,
    slots: Vec<Account>,
    was_started: bool,
    /// When, the mode of the first stop, and by when it must be over.
    stop: Option<(Instant, StopMode, Instant)>,
    /// Until when a drain may go on; passed at once by a second stop.
    drain_until: Option<Instant>,
    /// Generations that were cut short in their drain, and those that crashed in it.
    cut: usize,
    crashed: usize,
    start_failed: Option<u16>,
    table: Vec<u16>,
    readiness: Readiness,
    pub(super) exited: Option<Outcome>,
}

impl Model {
    pub(super) fn new(config: Config, slots: u16, now: Instant) -> Self {
        let account = || Account {
            generation: 0,
            started_at: now,
            life: Life::None,
            threads: 0,
            unjoined: false,
            thread_dead: false,
            given_up: false,
            quarantined: false,
            in_a_row: 0,
            failures: Vec::new(),
            starts: Vec::new(),
            waits_since: None,
        };
        Self {
            config,
            now,
            jumped_at: None,
            late: Duration::ZERO,
            slots: (0..slots).map(|_| account()).collect(),
            was_started: false,
            stop: None,
            drain_until: None,
            cut: 0,
            crashed: 0,
            start_failed: None,
            table: Vec::new(),
            readiness: Readiness::NotReady(NotReady::Starting),
            exited: None,
        }
    }

    pub(super) fn generation(&self, slot: u16) -> u32 {
        self.slots[usize::from(slot)].generation
    }

    pub(super) fn pass_time(&mut self, now: Instant, late: Duration) {
        self.now = now;
        self.late += late;
        if late > LATE_TICK {
            self.jumped_at = Some(now);
        }
    }

    fn is_running(&self) -> bool {
        self.was_started && !self.is_ending()
    }

    fn is_ending(&self) -> bool {
        self.stop.is_some() || self.start_failed.is_some() || self.exited.is_some()
    }

    // What happens.

    pub(super) fn observe(&mut self, event: &Event) {
        match *event {
            Event::Ready { slot, generation } => {
                let account = &mut self.slots[usize::from(slot)];
                if account.generation == generation && account.life == Life::Starting {
                    account.life = Life::Ready { since: self.now };
                }
            }
            Event::Ended { slot, generation, how } => {
                if self.slots[usize::from(slot)].generation == generation {
                    self.generation_over(slot, Some(how));
                }
            }
            Event::ThreadDied { slot, thread } => {
                let account = &mut self.slots[usize::from(slot)];
                if account.threads == thread && account.unjoined {
                    account.thread_dead = true;
                    self.generation_over(slot, None);
                }
            }
            Event::Stop(mode) => self.stop_asked(mode),
            _ => {}
        }
    }

    fn generation_over(&mut self, slot: u16, how: Option<End>) {
        let (running, starting) = (self.is_running(), !self.was_started && !self.is_ending());
        let (now, healthy_after) = (self.now, self.config.restart.healthy_after);
        let account = &mut self.slots[usize::from(slot)];
        account.given_up = false;
        let life = std::mem::replace(&mut account.life, Life::None);
        if life == Life::None {
            return;
        }
        if running {
            if matches!(life, Life::Ready { since } if now - since >= healthy_after) {
                account.in_a_row = 0;
            }
            account.in_a_row += 1;
            account.failures.push(now);
            account.waits_since = Some(now);
        } else if starting {
            self.start_failed = Some(slot);
        } else if life == Life::Draining {
            self.cut += usize::from(how == Some(End::Stopped));
            self.crashed += usize::from(!matches!(how, Some(End::Stopped | End::Drained)));
        }
    }

    fn stop_asked(&mut self, mode: StopMode) {
        if self.start_failed.is_some() {
            return;
        }
        let drain = match mode {
            StopMode::Now => Duration::ZERO,
            StopMode::Drain { deadline } => deadline.unwrap_or(self.config.drain_deadline),
        };
        // The grace may be granted once more after a jump.
        let over_by = self.now + drain + 2 * STOP_GRACE + SLACK;
        match &mut self.stop {
            None => {
                self.late = Duration::ZERO;
                self.drain_until = Some(self.now + drain);
                self.stop = Some((self.now, mode, over_by));
                for account in &mut self.slots {
                    account.waits_since = None;
                }
            }
            Some((.., by)) if mode == StopMode::Now => {
                *by = over_by.min(*by);
                self.drain_until = Some(self.now);
            }
            Some(_) => {}
        }
    }

    // What the policy does.

    /// Takes in an action; answers with what a history has seen by it.
    pub(super) fn apply(&mut self, action: &Action) -> Result<Vec<&'static str>, Broken> {
        rule("one exit", self.exited.is_none(), action)?;
        match *action {
            Action::StartGeneration { slot, .. }
            | Action::Drain { slot, .. }
            | Action::StopNow { slot }
            | Action::Join { slot, .. }
            | Action::Abandon { slot, .. }
            | Action::StartFailed { slot, .. }
            | Action::Quarantined { slot, .. } => {
                let exists = usize::from(slot) < self.slots.len();
                rule("slot exists", exists, action)?;
            }
            _ => {}
        }
        match *action {
            Action::StartGeneration { slot, generation, thread, fresh_thread } => {
                return self.begin(slot, generation, thread, fresh_thread);
            }
            Action::Drain { slot, .. } => {
                let draining = matches!(self.stop, Some((_, StopMode::Drain { .. }, _)));
                let account = &mut self.slots[usize::from(slot)];
                let ready = matches!(account.life, Life::Ready { .. });
                rule("drain", draining && ready, &account)?;
                account.life = Life::Draining;
            }
            Action::StopNow { slot } => return self.stop_now(slot),
            Action::Join { slot, thread } => {
                let account = &mut self.slots[usize::from(slot)];
                let may = account.unjoined && account.threads == thread;
                rule("join", may && account.life == Life::None, &account)?;
                account.unjoined = false;
            }
            Action::Abandon { slot, thread } => return self.abandon(slot, thread),
            Action::SetActive(ref table) => {
                let exist = table.iter().all(|slot| usize::from(*slot) < self.slots.len());
                rule("table", exist && !table.is_empty(), table)?;
                rule("table", *table != self.table, "set to what it was")?;
                self.table.clone_from(table);
            }
            Action::Readiness(readiness) => {
                rule("readiness", readiness != self.readiness, "set to what it was")?;
                self.readiness = readiness;
            }
            Action::Started => {
                let ready = |a: &Account| matches!(a.life, Life::Ready { .. });
                let may = !self.was_started && !self.is_ending();
                rule("started", may && self.slots.iter().all(ready), &*self)?;
                self.was_started = true;
            }
            Action::StartFailed { slot, failure } => return self.start_failed(slot, failure),
            Action::Quarantined { slot, reason } => return self.quarantined(slot, reason),
            Action::Exit(outcome) => return self.exit(outcome),
            _ => {}
        }
        Ok(Vec::new())
    }

    fn begin(
        &mut self,
        slot: u16,
        generation: u32,
        thread: u32,
        fresh_thread: bool,
    ) -> Result<Vec<&'static str>, Broken> {
        let (now, ending) = (self.now, self.is_ending());
        let restart = &self.config.restart;
        let account = &mut self.slots[usize::from(slot)];
        rule("start after stop", !ending, slot)?;
        rule("start in quarantine", !account.quarantined, slot)?;
        rule("two generations", account.life == Life::None, slot)?;
        rule("generation number", generation == account.generation + 1, generation)?;
        rule("fresh thread", fresh_thread != account.unjoined, (slot, generation))?;
        rule("fresh thread", fresh_thread || !account.thread_dead, (slot, generation))?;
        let threads = account.threads + u32::from(fresh_thread);
        rule("thread number", thread == threads, thread)?;
        let mut seen = Vec::new();
        if let Some(since) = account.waits_since.take() {
            let (shortest, _) = pause(restart, account.in_a_row);
            rule("backoff", now - since >= shortest, (now - since, shortest))?;
            seen.push(if account.in_a_row > 1 { "backoff" } else { "restart" });
        } else {
            rule("start", account.generation == 0, "nothing had failed")?;
        }
        if generation > 1 {
            account.starts.push(now);
            let window = restart.quarantine_window;
            let recent = account.starts.iter().filter(|at| now - **at <= window).count();
            let most = restart.quarantine_after as usize;
            rule("quarantine", most == 0 || recent <= most, recent)?;
        }
        if fresh_thread && generation > 1 {
            seen.push("fresh thread");
        }
        account.generation = generation;
        account.threads = threads;
        account.started_at = now;
        account.life = Life::Starting;
        account.unjoined = true;
        account.thread_dead = false;
        Ok(seen)
    }

    fn stop_now(&mut self, slot: u16) -> Result<Vec<&'static str>, Broken> {
        let (now, running) = (self.now, self.is_running());
        let account = &mut self.slots[usize::from(slot)];
        let told = matches!(account.life, Life::None | Life::Stopping { .. });
        rule("live", !told, &account)?;
        if running {
            let hangs = account.life == Life::Starting && now - account.started_at >= self.config.start_timeout;
            rule("stop", hangs, &account)?;
        }
        if account.life == Life::Draining {
            let over = self.drain_until.is_some_and(|until| until <= now);
            rule("drain", over, &account)?;
            self.cut += 1;
        }
        account.life = Life::Stopping { since: now };
        Ok(Vec::new())
    }

    fn start_failed(&mut self, slot: u16, why: Failure) -> Result<Vec<&'static str>, Broken> {
        let account = &self.slots[usize::from(slot)];
        if why == Failure::StartTimedOut {
            let late = self.now - account.started_at >= self.config.start_timeout;
            let hangs = account.life == Life::Starting && late;
            let may = hangs && !self.was_started && !self.is_ending();
            rule("start failed", may, &*self)?;
            self.start_failed = Some(slot);
            return Ok(vec!["start timed out"]);
        }
        rule("start failed", self.start_failed == Some(slot), slot)?;
        Ok(Vec::new())
    }

    fn quarantined(&mut self, slot: u16, why: Quarantine) -> Result<Vec<&'static str>, Broken> {
        let running = self.is_running();
        let crash_loop = self.is_crash_loop(slot);
        let account = &mut self.slots[usize::from(slot)];
        rule("quarantine", running && !account.quarantined, &account)?;
        account.quarantined = true;
        account.waits_since = None;
        if why == Quarantine::CrashLoop {
            rule("quarantine", crash_loop, &account)?;
            return Ok(vec!["crash loop"]);
        }
        rule("quarantine", account.given_up, &account)?;
        Ok(vec!["stuck"])
    }

    fn abandon(&mut self, slot: u16, thread: u32) -> Result<Vec<&'static str>, Broken> {
        let now = self.now;
        let account = &mut self.slots[usize::from(slot)];
        let deaf = matches!(account.life, Life::Stopping { since } if now - since >= STOP_GRACE);
        rule("stop grace", deaf && account.threads == thread, &account)?;
        account.life = Life::None;
        account.given_up = true;
        Ok(vec!["abandoned"])
    }

    fn is_crash_loop(&self, slot: u16) -> bool {
        let restart = &self.config.restart;
        let failures = &self.slots[usize::from(slot)].failures;
        let recent = |at: &&Instant| self.now - **at <= restart.quarantine_window;
        let count = failures.iter().filter(recent).count();
        restart.quarantine_after > 0 && count >= restart.quarantine_after as usize
    }

    fn exit(&mut self, outcome: Outcome) -> Result<Vec<&'static str>, Broken> {
        for account in &self.slots {
            rule("exit while live", account.life == Life::None, account)?;
            rule("join", account.unjoined == account.given_up, account)?;
        }
        let left = self.slots.iter().filter(|a| a.given_up).count();
        let stop_now = matches!(self.stop, Some((_, StopMode::Now, _)));
        let (fits, abandoned, name) = match outcome {
            Outcome::Stopped { how, failed, abandoned, .. } => {
                let (fits, name) = match how {
                    Stopped::AtOnce => (stop_now, "at once"),
                    Stopped::Drained => (!stop_now && self.cut == 0, "drained"),
                    Stopped::DeadlinePassed => (!stop_now && self.cut > 0, "deadline passed"),
                    Stopped::Interrupted => (!stop_now && self.cut > 0, "interrupted"),
                };
                let fits = fits && usize::from(failed) == self.crashed;
                (fits && self.stop.is_some(), abandoned, name)
            }
            Outcome::StartFailed { slot, abandoned, .. } => {
                (self.start_failed == Some(slot), abandoned, "start failed")
            }
            Outcome::AllQuarantined { abandoned } => {
                let all = self.slots.iter().all(|a| a.quarantined);
                (all && self.is_running(), abandoned, "all quarantined")
            }
        };
        rule("outcome", fits && usize::from(abandoned) == left, (outcome, left))?;
        let early = self.stop.is_some() && !self.was_started;
        self.exited = Some(outcome);
        let early = early.then_some("stop while starting");
        let (most, none) = self.unreadiness_seen();
        Ok([Some(name), early, most, none].into_iter().flatten().collect())
    }

    fn unreadiness_seen(&self) -> (Option<&'static str>, Option<&'static str>) {
        let quarantined = self.slots.iter().filter(|a| a.quarantined).count();
        let most = quarantined * 2 > self.slots.len();
        let none = self.slots.iter().any(|a| a.failures.len() > 1) && self.slots.len() == 1;
        (most.then_some("most quarantined"), none.then_some("no active slot"))
    }

    // What must be so.

    pub(super) fn check(&self, policy: &Policy) -> Result<(), Broken> {
        if self.exited.is_some() {
            return Ok(());
        }
        self.check_table_and_readiness()?;
        self.check_slots(policy)?;
        let quiet = self.slots.iter().all(|a| a.life == Life::None);
        rule("exit", !(self.is_ending() && quiet), "all have ended")?;
        let all = self.slots.iter().all(|a| a.quarantined);
        rule("exit", !all, "all are quarantined")?;
        if let Some((.., by)) = self.stop {
            rule("exit in time", self.now <= by + self.late, self.now - by)?;
        }
        rule("readiness", policy.readiness() == self.readiness, "the method differs")
    }

    fn check_table_and_readiness(&self) -> Result<(), Broken> {
        let mut ready = Vec::new();
        for (index, account) in (0_u16..).zip(&self.slots) {
            if matches!(account.life, Life::Ready { .. }) {
                ready.push(index);
            }
        }
        let quarantined = self.slots.iter().filter(|a| a.quarantined).count();
        let expected = if self.is_ending() {
            Readiness::NotReady(NotReady::Stopping)
        } else if !self.was_started {
            Readiness::NotReady(NotReady::Starting)
        } else if quarantined > self.slots.len() / 2 {
            Readiness::NotReady(NotReady::MostQuarantined)
        } else if ready.is_empty() {
            Readiness::NotReady(NotReady::NoActiveSlot)
        } else {
            Readiness::Ready
        };
        rule("readiness", self.readiness == expected, (self.readiness, expected))?;
        if self.is_running() && !ready.is_empty() {
            rule("table", self.table == ready, (&self.table, &ready))?;
        }
        Ok(())
    }

    fn check_slots(&self, policy: &Policy) -> Result<(), Broken> {
        for ((index, account), status) in (0_u16..).zip(&self.slots).zip(policy.slots()) {
            let live = match account.life {
                Life::None => None,
                Life::Starting => Some(SlotState::Starting),
                Life::Ready { .. } => Some(SlotState::Ready),
                Life::Draining => Some(SlotState::Draining),
                Life::Stopping { .. } => Some(SlotState::Stopping),
            };
            let fits = match status.state {
                SlotState::Quarantined => account.quarantined && live.is_none(),
                SlotState::Idle | SlotState::Backoff | SlotState::Ended => live.is_none(),
                state => live == Some(state),
            };
            let same = status.slot == index && status.generation == account.generation;
            rule("stale", fits && same, (status, account))?;
            let joined = !(account.thread_dead && account.unjoined);
            rule("join", joined && (status.abandoned == 1) == account.given_up, account)?;
            let out = account.quarantined || self.is_ending();
            rule("quarantine", out || account.life != Life::None || !self.is_crash_loop(index), account)?;
            if let Some(since) = account.waits_since {
                let (_, longest) = pause(&self.config.restart, account.in_a_row);
                let due = status.restart_at.is_some_and(|at| at <= since + longest);
                rule("slot comes back", due && !longest.is_zero(), account)?;
            }
        }
        Ok(())
    }

    pub(super) fn check_after_tick(&self, next_deadline: Option<Instant>) -> Result<(), Broken> {
        if self.exited.is_some() {
            return Ok(());
        }
        let ahead = next_deadline.is_none_or(|at| at > self.now);
        rule("deadline", ahead, "it has passed, and was not acted on")?;
        for account in &self.slots {
            let from = |at: Instant| self.jumped_at.map_or(at, |jump| jump.max(at));
            match account.life {
                Life::Starting => {
                    let in_time = self.now - from(account.started_at) < self.config.start_timeout;
                    rule("start timeout", in_time, account)?;
                }
                Life::Stopping { since } => {
                    rule("stop grace", self.now - from(since) < STOP_GRACE, account)?;
                }
                Life::None => {
                    let waits = account.waits_since.is_some() && next_deadline.is_none();
                    rule("slot comes back", !waits, account)?;
                }
                Life::Ready { .. } | Life::Draining => {}
            }
        }
        Ok(())
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
