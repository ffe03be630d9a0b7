//! Tests of the watch: by histories of a thread that are told to it, and by threads that really spin and block.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use super::*;
use crate::sys::affinity;
use crate::sys::cpu_clock::ThreadClock;
use crate::sys::heartbeats::{Heartbeat, Heartbeats};
use crate::sys::procfs;
use crate::sys::stack_sample::ThreadId;

const LIMIT: Duration = Duration::from_millis(100);

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// A thread whose life is told in pieces, with a look at the end of each.
struct Told {
    watch: Watch,
    now: Instant,
    turn: Option<Instant>,
    cpu: Duration,
    run_delay: Duration,
    asked: usize,
}

impl Told {
    fn new() -> Self {
        let now = Instant::now();
        let zero = Duration::ZERO;
        Self { watch: Watch::new(LIMIT), now, turn: Some(now), cpu: zero, run_delay: zero, asked: 0 }
    }

    /// `passed` milliseconds go by, for `ran` of which it has the CPU; at the end it is in `state`, and `waited` more
    /// milliseconds of run delay have been counted.
    fn then(&mut self, passed: u64, ran: u64, state: ThreadState, waited: u64) -> Verdict {
        self.now += ms(passed);
        self.cpu += ms(ran);
        self.run_delay += ms(waited);
        let reading = Reading { now: self.now, busy: self.turn.map(|began| self.now - began), cpu: self.cpu };
        let scheduling = Scheduling { state, run_delay: Some(self.run_delay) };
        self.watch.look(reading, || {
            self.asked += 1;
            Some(scheduling)
        })
    }

    /// The same `times` over; the last verdict.
    fn again(&mut self, times: usize, passed: u64, ran: u64, state: ThreadState, waited: u64) -> Verdict {
        (0..times).map(|_| self.then(passed, ran, state, waited)).last().unwrap_or(Verdict::Healthy)
    }

    fn new_turn(&mut self) {
        self.turn = Some(self.now);
    }
}

use ThreadState::{Blocked, Runnable, Stopped};

#[test]
fn a_turn_that_computes_is_stalled_once_it_is_late() {
    let mut told = Told::new();
    told.then(5, 5, Runnable, 0);
    assert_eq!(told.then(45, 45, Runnable, 0), Verdict::Healthy);
    assert_eq!(told.then(49, 49, Runnable, 0), Verdict::Healthy);
    assert_eq!(told.then(1, 1, Runnable, 0), Verdict::Stalled { own: ms(100) });
    assert_eq!(told.then(900, 900, Runnable, 0), Verdict::Stalled { own: ms(1000) });
}

#[test]
fn a_turn_that_blocks_in_a_system_call_is_stalled_although_it_uses_no_cpu() {
    let mut told = Told::new();
    assert_eq!(told.again(3, 25, 0, Blocked, 0), Verdict::Healthy);
    assert!(matches!(told.again(3, 25, 0, Blocked, 0), Verdict::Stalled { .. }));
}

#[test]
fn a_thread_that_is_ready_and_gets_no_cpu_is_starved() {
    let mut told = Told::new();
    // The kernel counts the wait when it ends, so there is no run delay yet.
    assert_eq!(told.again(3, 25, 0, Runnable, 0), Verdict::Healthy);
    assert_eq!(told.then(25, 0, Runnable, 0), Verdict::Starved { late: ms(100) });
    assert_eq!(told.again(90, 25, 1, Runnable, 24), Verdict::Starved { late: ms(2350) });
    // What it has computed by now would have been late on a machine of its own, too.
    assert!(matches!(told.again(10, 25, 1, Runnable, 24), Verdict::Stalled { own } if own == ms(100)));
}

#[test]
fn a_cgroup_that_is_throttled_is_starved_until_the_turn_has_used_what_it_may() {
    let mut told = Told::new();
    // 20 of every 100 ms.
    assert_eq!(told.again(10, 25, 5, Runnable, 20), Verdict::Starved { late: ms(250) });
    assert!(matches!(told.again(30, 25, 5, Runnable, 20), Verdict::Stalled { .. }));
}

#[test]
fn a_thread_that_sleeps_for_an_instant_between_waits_for_the_cpu_is_starved() {
    let mut told = Told::new();
    assert_eq!(told.again(8, 25, 0, Blocked, 24), Verdict::Starved { late: ms(200) });
}

#[test]
fn a_thread_that_is_stopped_is_starved_and_time_without_a_watch_is_not_its_own() {
    let mut told = Told::new();
    assert_eq!(told.again(8, 25, 0, Stopped, 0), Verdict::Starved { late: ms(200) });

    // The whole process, watch and all, is stopped for a minute in the middle of a turn that has just begun.
    let mut told = Told::new();
    told.then(5, 5, Runnable, 0);
    assert_eq!(told.then(60_000, 0, Blocked, 0), Verdict::Healthy, "it had no chance to end the turn");
    assert_eq!(told.then(20, 0, Runnable, 0), Verdict::Healthy);
    assert!(matches!(told.then(5, 0, Runnable, 0), Verdict::Starved { .. }));
    // It is the same if it goes on at once.
    let mut told = Told::new();
    told.then(5, 5, Runnable, 0);
    assert_eq!(told.then(60_000, 0, Runnable, 0), Verdict::Healthy);
    told.new_turn();
    assert_eq!(told.then(20, 0, Runnable, 0), Verdict::Healthy);
    // Or of one that was stalled: the minute does not bring it nearer to being replaced.
    let mut told = Told::new();
    told.again(10, 25, 25, Runnable, 0);
    assert!(matches!(told.then(60_000, 0, Runnable, 0), Verdict::Stalled { own } if own == ms(250)));
}

#[test]
fn a_turn_first_seen_when_it_is_late_is_watched_before_it_is_judged() {
    let mut told = Told::new();
    assert_eq!(told.then(500, 0, Runnable, 0), Verdict::Healthy);
    assert_eq!(told.then(10, 10, Runnable, 0), Verdict::Healthy);
    assert!(matches!(told.then(20, 20, Runnable, 0), Verdict::Starved { .. }));
    assert!(matches!(told.again(4, 25, 25, Runnable, 0), Verdict::Stalled { .. }));
}

#[test]
fn short_turns_are_healthy_however_many_and_cost_no_look_at_proc() {
    let mut told = Told::new();
    for _ in 0..100 {
        told.new_turn();
        assert_eq!(told.then(1, 1, Runnable, 0), Verdict::Healthy);
        assert_eq!(told.then(40, 40, Runnable, 0), Verdict::Healthy);
    }
    told.turn = None;
    assert_eq!(told.again(100, 25, 1, Blocked, 0), Verdict::Healthy);
    assert_eq!(told.asked, 0);
}

/// What sleeps wakes by itself within this.
fn rest() -> u64 {
    Watch::new(LIMIT).rest_limit().as_millis() as u64
}

#[test]
fn a_sleep_without_end_is_starved_until_the_thread_runs() {
    for turn in [true, false] {
        let mut told = Told::new();
        told.turn = None;
        assert_eq!(told.then(25, 1, Blocked, 0), Verdict::Healthy);
        assert_eq!(told.then(rest() - 1, 0, Stopped, 0), Verdict::Healthy);
        assert!(!told.watch.has_doubts());
        assert_eq!(told.then(1, 0, Stopped, 0), Verdict::Healthy, "all may have stood still");
        assert!(told.watch.has_doubts());
        assert_eq!(told.watch.next_look(told.now), told.now + LIMIT / 4);
        assert_eq!(told.then(25, 0, Stopped, 0), Verdict::Starved { late: ms(rest() + 25) });
        assert_eq!(told.watch.next_look(told.now), told.now + LIMIT / 10);
        assert_eq!(told.then(60_000, 0, Stopped, 0), Verdict::Starved { late: ms(rest() + 60_025) });
        if turn {
            told.new_turn();
        }
        let cpu = if turn { 0 } else { 1 };
        assert_eq!(told.then(10, cpu, Runnable, 0), Verdict::Recovered { after: ms(rest() + 60_035) });
        assert!(!told.watch.has_doubts());
        assert_eq!(told.then(10, cpu, Runnable, 0), Verdict::Healthy);
    }
}

#[test]
fn a_sleeper_that_wakes_in_time_is_healthy_however_rarely_it_is_looked_at() {
    let mut told = Told::new();
    told.turn = None;
    assert_eq!(told.again(20, rest(), 1, Blocked, 0), Verdict::Healthy);
    // The watch runs first after all have stood still.
    assert_eq!(told.then(rest() * 2, 0, Blocked, 0), Verdict::Healthy);
    assert_eq!(told.then(25, 1, Blocked, 0), Verdict::Healthy);
    // And after a minute of that.
    assert_eq!(told.again(2, 60_000, 0, Blocked, 0), Verdict::Healthy);
    assert_eq!(told.then(25, 0, Blocked, 0), Verdict::Healthy);
}

#[test]
fn a_small_limit_leaves_a_sleeper_time_to_be_given_its_cpu_back() {
    let mut told = Told::new();
    told.watch = Watch::new(ms(1));
    told.turn = None;
    told.then(1, 1, Blocked, 0);
    assert_eq!(told.watch.rest_limit(), REST_MAX + PATIENCE_MIN);
    assert_eq!(told.then(told.watch.rest_limit().as_millis() as u64, 0, Blocked, 0), Verdict::Healthy);
    assert_eq!(told.watch.next_look(told.now), told.now + PATIENCE_MIN);
    assert_eq!(told.then(24, 0, Blocked, 0), Verdict::Healthy);
    assert!(matches!(told.then(1, 0, Blocked, 0), Verdict::Starved { .. }));
}

#[test]
fn a_sleep_after_a_late_turn_is_a_new_beginning() {
    let mut told = Told::new();
    assert!(matches!(told.again(8, 25, 0, Runnable, 0), Verdict::Starved { .. }));
    told.turn = None;
    assert_eq!(told.then(10, 0, Blocked, 0), Verdict::Recovered { after: ms(200) });
    assert_eq!(told.then(rest() - 1, 0, Blocked, 0), Verdict::Healthy);
    assert!(!told.watch.has_doubts());
}

#[test]
fn the_end_of_a_late_turn_is_told_once() {
    for asleep in [true, false] {
        let mut told = Told::new();
        assert!(matches!(told.again(8, 25, 25, Runnable, 0), Verdict::Stalled { .. }));
        told.new_turn();
        if asleep {
            told.turn = None;
        }
        assert_eq!(told.then(10, 5, Runnable, 0), Verdict::Recovered { after: ms(200) });
        assert_eq!(told.then(10, 5, Runnable, 0), Verdict::Healthy);
    }
}

#[test]
fn without_proc_only_cpu_time_tells() {
    let watch_of = |ran: u64| {
        let (mut watch, began) = (Watch::new(LIMIT), Instant::now());
        let reading =
            |tick: u64| Reading { now: began + ms(25 * tick), busy: Some(ms(25 * tick)), cpu: ms(ran * tick) };
        (1..=8).map(|tick| watch.look(reading(tick), || None)).last().unwrap()
    };
    assert!(matches!(watch_of(25), Verdict::Stalled { .. }));
    assert!(matches!(watch_of(0), Verdict::Starved { .. }));
}

#[test]
fn looks_are_asked_for_when_they_tell_something() {
    let mut told = Told::new();
    let began = told.now;
    told.then(1, 1, Runnable, 0);
    assert_eq!(told.watch.next_look(told.now), began + ms(50));
    told.then(49, 49, Runnable, 0);
    assert_eq!(told.watch.next_look(told.now), began + ms(100));
    told.then(50, 50, Runnable, 0);
    assert_eq!(told.watch.next_look(told.now), told.now + ms(10));
}

/// Looks at a real thread, and waits until the next look is worth it.
fn looks(heartbeat: Heartbeat, thread: ThreadId, clock: ThreadClock) -> impl FnMut() -> Verdict {
    let mut watch = Watch::new(LIMIT);
    move || {
        let now = Instant::now();
        let reading = Reading { now, busy: heartbeat.busy_for(now), cpu: clock.read().unwrap() };
        let verdict = watch.look(reading, || procfs::scheduling(thread.number()));
        std::thread::sleep(watch.next_look(now).saturating_duration_since(now));
        verdict
    }
}

fn spin(over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        std::hint::spin_loop();
    }
}

/// Watches a thread in `turn` until it is found stalled, lets it end, and sees it recover. On a machine that is busy it may
/// really be starved for a while, which is no failure.
fn is_found_stalled(turn: impl FnOnce(&AtomicBool) + Send + 'static, release: impl FnOnce()) {
    let heartbeat = Heartbeats::on_heap(1).of(0);
    let ended = Arc::new(AtomicBool::new(false));
    let (send, receive) = mpsc::channel();
    let (close, hold) = mpsc::channel::<()>();
    let worker = std::thread::spawn({
        let (heartbeat, ended) = (heartbeat.clone(), Arc::clone(&ended));
        move || {
            heartbeat.busy(Instant::now());
            send.send((ThreadId::current().unwrap(), ThreadClock::current().unwrap())).unwrap();
            turn(&ended);
            heartbeat.asleep();
            let _ = hold.recv();
        }
    });
    let (thread, clock) = receive.recv().unwrap();
    let mut look = looks(heartbeat, thread, clock);
    while !matches!(look(), Verdict::Stalled { .. }) {}
    ended.store(true, Ordering::Relaxed);
    release();
    while !matches!(look(), Verdict::Recovered { .. }) {}
    assert_eq!(look(), Verdict::Healthy);
    drop(close);
    worker.join().unwrap();
}

#[test]
fn a_thread_that_spins_is_found_stalled() {
    is_found_stalled(spin, || ());
}

#[test]
fn a_thread_that_blocks_is_found_stalled() {
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let block = move |_: &AtomicBool| reader.read_exact(&mut [0]).unwrap();
    is_found_stalled(block, move || writer.write_all(&[1]).unwrap());
}

#[test]
fn a_thread_that_gets_no_cpu_is_found_starved() {
    let heartbeat = Heartbeats::on_heap(1).of(0);
    let cpu = affinity::available().allowed[0];
    let over = Arc::new(AtomicBool::new(false));
    let (send, receive) = mpsc::channel();
    let (begin, begun) = mpsc::channel::<()>();
    let worker = std::thread::spawn({
        let (heartbeat, over) = (heartbeat.clone(), Arc::clone(&over));
        move || {
            affinity::run_on(&[cpu]).unwrap();
            affinity::step_back();
            send.send((ThreadId::current().unwrap(), ThreadClock::current().unwrap())).unwrap();
            begun.recv().unwrap();
            heartbeat.busy(Instant::now());
            spin(&over);
            heartbeat.asleep();
        }
    });
    let (thread, clock) = receive.recv().unwrap();
    let (spins, spinning) = mpsc::channel();
    let rivals: Vec<_> = (0..2)
        .map(|_| {
            let (over, spins) = (Arc::clone(&over), spins.clone());
            std::thread::spawn(move || {
                affinity::run_on(&[cpu]).unwrap();
                spins.send(()).unwrap();
                spin(&over);
            })
        })
        .collect();
    rivals.iter().for_each(|_| spinning.recv().unwrap());
    begin.send(()).unwrap();
    let mut look = looks(heartbeat, thread, clock);
    let found = std::iter::repeat_with(&mut look).find(|verdict| *verdict != Verdict::Healthy);
    over.store(true, Ordering::Relaxed);
    assert!(matches!(found, Some(Verdict::Starved { .. })), "{found:?}");
    rivals.into_iter().chain([worker]).for_each(|thread| thread.join().unwrap());
}
