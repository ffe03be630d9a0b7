//! What a policy may do and must have done, said independently of how it does it.
//!
//! The model hears the same events, sees the actions, and keeps its own account of every slot. Here is the account; the
//! rules that an action can break are in `actions.rs`, those that hold between steps in `rules.rs`.

use std::time::{Duration, Instant};

use super::super::*;

/// Virtual time that may go by between a deadline and the tick that finds it, jumps apart.
pub(super) const SLACK: Duration = Duration::from_millis(50);

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

pub(super) fn rule(name: &'static str, holds: bool, detail: impl std::fmt::Debug) -> Result<(), Broken> {
    if holds {
        return Ok(());
    }
    Err(Broken::new(name, format!("{detail:?}")))
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Life {
    None,
    Starting,
    Ready {
        since: Instant,
    },
    /// Alone, when it is scaled down, and then with a deadline of its own.
    Draining {
        since: Instant,
        until: Option<Instant>,
    },
    Stopping {
        since: Instant,
        retired: bool,
    },
}

/// Busy with one turn for too long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Illness {
    pub(super) began: Instant,
    pub(super) stalled: bool,
    /// Since it was last stalled, or starved.
    pub(super) changed: Instant,
    /// For how long it was stalled before that.
    pub(super) before: Duration,
    /// A tick has found it to count against readiness.
    pub(super) counted: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Leak {
    pub(super) generation: u32,
    pub(super) thread: u32,
    pub(super) back: bool,
}

#[derive(Debug)]
pub(super) struct Account {
    pub(super) generation: u32,
    pub(super) started_at: Instant,
    pub(super) life: Life,
    pub(super) illness: Option<Illness>,
    /// As the policy said after the last step: which slot is taken is its choice.
    pub(super) wanted: bool,
    pub(super) threads: u32,
    /// The thread is there, or is dead but not joined yet.
    pub(super) unjoined: bool,
    pub(super) thread_dead: bool,
    /// Given up after a stop that was not answered.
    pub(super) given_up: bool,
    /// Given up because they hung.
    pub(super) leaks: Vec<Leak>,
    pub(super) quarantined: bool,
    pub(super) in_a_row: u32,
    /// Starts in a row that the system had nothing for.
    pub(super) shortages: u32,
    /// What it waits for is the end of a shortage.
    pub(super) is_short: bool,
    pub(super) failures: Vec<Instant>,
    /// Failed at, and not started since.
    pub(super) waits_since: Option<Instant>,
    /// It ended in this step, on its way out.
    pub(super) retired_now: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Succession {
    None,
    Waiting { successor: u32, since: Instant },
    Killed { successor: u32, at: Instant },
}

#[derive(Debug)]
pub(super) struct Model {
    pub(super) config: Config,
    pub(super) now: Instant,
    /// What is being answered.
    pub(super) event: Event,
    /// When a tick last came so late that limits may have been extended.
    pub(super) jumped_at: Option<Instant>,
    pub(super) late: Duration,
    pub(super) slots: Vec<Account>,
    pub(super) target: u16,
    pub(super) was_started: bool,
    /// The mode of the first stop, and by when it must be over.
    pub(super) stop: Option<(StopMode, Instant)>,
    /// During the delay before a drain: until when, and how long the drain may take.
    pub(super) lame_duck: Option<(Instant, Duration)>,
    pub(super) delay_cut: bool,
    /// Until when a drain may go on; passed at once by a second stop.
    pub(super) drain_until: Option<Instant>,
    /// Generations that were cut short in their drain, and those that crashed in it.
    pub(super) cut: usize,
    pub(super) crashed: usize,
    pub(super) start_failed: Option<u16>,
    pub(super) succession: Succession,
    pub(super) successors: u32,
    pub(super) handed_over: bool,
    /// Orders without an answer.
    pub(super) scales_due: u32,
    pub(super) upgrades_due: u32,
    pub(super) reattach_due: bool,
    pub(super) listeners_closed: bool,
    pub(super) table: Vec<u16>,
    /// As it was before the last event.
    pub(super) table_before: Vec<u16>,
    pub(super) rescue: Vec<u16>,
    pub(super) readiness: Readiness,
    pub(super) aborted: bool,
    pub(super) exited: Option<Outcome>,
}

impl Model {
    pub(super) fn new(config: Config, slots: u16, now: Instant) -> Self {
        let account = || Account {
            generation: 0,
            started_at: now,
            life: Life::None,
            illness: None,
            wanted: false,
            threads: 0,
            unjoined: false,
            thread_dead: false,
            given_up: false,
            leaks: Vec::new(),
            quarantined: false,
            in_a_row: 0,
            shortages: 0,
            is_short: false,
            failures: Vec::new(),
            waits_since: None,
            retired_now: false,
        };
        Self {
            target: 0,
            config,
            now,
            event: Event::Tick,
            jumped_at: None,
            late: Duration::ZERO,
            slots: (0..slots).map(|_| account()).collect(),
            was_started: false,
            stop: None,
            lame_duck: None,
            delay_cut: false,
            drain_until: None,
            cut: 0,
            crashed: 0,
            start_failed: None,
            succession: Succession::None,
            successors: 0,
            handed_over: false,
            scales_due: 0,
            upgrades_due: 0,
            reattach_due: false,
            listeners_closed: false,
            table: Vec::new(),
            table_before: Vec::new(),
            rescue: Vec::new(),
            readiness: Readiness::NotReady(NotReady::Starting),
            aborted: false,
            exited: None,
        }
    }

    pub(super) fn generation(&self, slot: u16) -> u32 {
        self.slots[usize::from(slot)].generation
    }

    pub(super) fn slots(&self) -> std::ops::Range<u16> {
        0..self.slots.len() as u16
    }

    pub(super) fn pass_time(&mut self, now: Instant, late: Duration) {
        self.now = now;
        self.late += late;
        if late > self.config.standstill_limit {
            self.jumped_at = Some(now);
        }
    }

    /// Accepting is over, or never came to be.
    pub(super) fn is_closing(&self) -> bool {
        let stopping = self.stop.is_some() && self.lame_duck.is_none();
        stopping || self.handed_over || self.start_failed.is_some() || self.exited.is_some()
    }

    pub(super) fn serves(&self) -> bool {
        self.was_started && !self.is_closing()
    }

    pub(super) fn is_running(&self) -> bool {
        self.serves() && self.stop.is_none()
    }

    pub(super) fn is_lame_duck(&self) -> bool {
        self.lame_duck.is_some()
    }

    pub(super) fn is_upgrading(&self) -> bool {
        matches!(self.succession, Succession::Waiting { .. })
    }

    /// From how many to how many automatic scaling may go.
    pub(super) fn scaling_bounds(&self) -> (u16, u16) {
        let max = self.slots.len() as u16;
        (self.config.slots_min.max(1).min(max), max)
    }

    // What happens.

    pub(super) fn observe(&mut self, event: &Event) {
        self.event = event.clone();
        self.table_before.clone_from(&self.table);
        self.happens(event);
    }

    fn happens(&mut self, event: &Event) {
        match *event {
            Event::Start if self.target == 0 => {
                let (min, max) = self.scaling_bounds();
                self.target = self.config.slots_start.max(min).min(max);
            }
            Event::Ready { slot, generation } => {
                let account = &mut self.slots[usize::from(slot)];
                if account.generation == generation && account.life == Life::Starting {
                    account.life = Life::Ready { since: self.now };
                    account.shortages = 0;
                }
            }
            Event::Ended { slot, generation, how } => {
                let account = &mut self.slots[usize::from(slot)];
                if let Some(leak) = account.leaks.iter_mut().find(|leak| leak.generation == generation) {
                    leak.back = true;
                } else if account.generation == generation {
                    self.generation_over(slot, Some(how));
                }
            }
            Event::ThreadDied { slot, thread } | Event::ThreadRefused { slot, thread } => {
                let account = &mut self.slots[usize::from(slot)];
                if let Some(leak) = account.leaks.iter_mut().find(|leak| leak.thread == thread) {
                    leak.back = true;
                } else if account.threads == thread && account.unjoined {
                    account.thread_dead = true;
                    let refused = matches!(event, Event::ThreadRefused { .. });
                    self.generation_over(slot, refused.then_some(End::NoResources));
                }
            }
            Event::Stalled { slot, generation } => self.ill(slot, generation, true),
            Event::Starved { slot, generation } => self.ill(slot, generation, false),
            Event::Recovered { slot, generation } => {
                let account = &mut self.slots[usize::from(slot)];
                if account.generation == generation {
                    account.illness = None;
                }
            }
            Event::Scale { .. } => self.scales_due += 1,
            Event::Upgrade => self.upgrades_due += 1,
            Event::SuccessorReady { successor: number } => {
                if matches!(self.succession, Succession::Waiting { successor, .. } if successor == number) {
                    self.succession = Succession::None;
                    self.handed_over = true;
                    self.drain_until = Some(self.now + self.config.drain_deadline);
                }
            }
            Event::SuccessorFailed { successor: number } => match self.succession {
                Succession::Waiting { successor, .. } | Succession::Killed { successor, .. } if successor == number => {
                    self.reattach_due = self.serves();
                    self.succession = Succession::None;
                }
                _ => {}
            },
            Event::Stop(mode) => self.stop_asked(mode),
            Event::Tick => self.tick(),
            Event::Together(ref events) => events.iter().for_each(|event| self.happens(event)),
            Event::Start | Event::Load { .. } => {}
        }
    }

    fn ill(&mut self, slot: u16, generation: u32, stalled: bool) {
        let now = self.now;
        let account = &mut self.slots[usize::from(slot)];
        if account.generation != generation || !matches!(account.life, Life::Ready { .. }) {
            return;
        }
        let fresh = Illness { began: now, stalled, changed: now, before: Duration::ZERO, counted: false };
        let illness = account.illness.get_or_insert(fresh);
        if illness.stalled != stalled {
            if illness.stalled {
                illness.before += now - illness.changed;
            }
            (illness.stalled, illness.changed) = (stalled, now);
        }
    }

    /// How long a slot has been stalled, for certain and at most: what was granted again after a jump is left out of the
    /// first.
    pub(super) fn stalled_for(&self, illness: &Illness) -> (Duration, Duration) {
        let at_most = illness.before + (self.now - illness.changed) + self.config.stall_limit;
        let certain = match self.jumped_at {
            Some(jump) if jump >= illness.began => self.now - jump.max(illness.changed),
            _ => at_most,
        };
        (certain, at_most)
    }

    fn tick(&mut self) {
        if let Some((until, limit)) = self.lame_duck
            && until <= self.now
        {
            self.lame_duck = None;
            self.drain_until = Some(self.now + limit);
        }
        let enough = self.config.readiness.stalled_after;
        for index in 0..self.slots.len() {
            if let Some(illness) = self.slots[index].illness
                && illness.stalled
                && self.serves()
                && self.stalled_for(&illness).0 >= enough
            {
                self.slots[index].illness = Some(Illness { counted: true, ..illness });
            }
        }
    }

    pub(super) fn fails(account: &mut Account, healthy_after: Duration, now: Instant) {
        let well_until = account.illness.map_or(now, |illness| illness.began);
        if matches!(account.life, Life::Ready { since } if well_until.saturating_duration_since(since) >= healthy_after)
        {
            account.in_a_row = 0;
        }
        account.in_a_row += 1;
        account.failures.push(now);
        account.is_short = false;
        account.waits_since = Some(now);
        account.illness = None;
    }

    fn generation_over(&mut self, slot: u16, how: Option<End>) {
        let (serves, closing, starting) = (self.serves(), self.is_closing(), !self.was_started && !self.is_closing());
        let (now, healthy_after) = (self.now, self.config.restart.healthy_after);
        let account = &mut self.slots[usize::from(slot)];
        account.given_up = false;
        if account.life == Life::None {
            return;
        }
        let retired = matches!(account.life, Life::Draining { .. } | Life::Stopping { retired: true, .. });
        if serves && (retired || !account.wanted) {
            account.retired_now = true;
        } else if serves && how == Some(End::NoResources) {
            account.shortages += 1;
            (account.is_short, account.waits_since) = (true, Some(now));
        } else if serves {
            Self::fails(account, healthy_after, now);
        } else if starting {
            self.start_failed = Some(slot);
        } else if closing && matches!(account.life, Life::Draining { .. }) {
            self.cut += usize::from(how == Some(End::Stopped));
            self.crashed += usize::from(!matches!(how, Some(End::Stopped | End::Drained)));
        }
        account.life = Life::None;
        account.illness = None;
    }

    fn stop_asked(&mut self, mode: StopMode) {
        if self.start_failed.is_some() {
            return;
        }
        let drain = match mode {
            StopMode::Now => Duration::ZERO,
            StopMode::Drain { deadline } => deadline.unwrap_or(self.config.drain_deadline),
        };
        let delayed = self.is_running() && mode != StopMode::Now;
        let delay = if delayed { self.config.drain_delay } else { Duration::ZERO };
        // The grace may be granted once more after a jump.
        let over_by = self.now + delay + drain + 2 * self.config.stop_grace + SLACK;
        if self.handed_over {
            if mode == StopMode::Now {
                self.drain_until = Some(self.now);
            }
            return;
        }
        match &mut self.stop {
            None => {
                self.late = Duration::ZERO;
                if delay.is_zero() {
                    self.drain_until = Some(self.now + drain);
                    self.slots.iter_mut().for_each(|account| account.waits_since = None);
                } else {
                    self.lame_duck = Some((self.now + delay, drain));
                }
                self.stop = Some((mode, over_by));
            }
            Some((_, by)) if mode == StopMode::Now => {
                *by = over_by.min(*by);
                self.delay_cut |= self.lame_duck.take().is_some();
                self.drain_until = Some(self.now);
            }
            Some(_) => {}
        }
    }
}
