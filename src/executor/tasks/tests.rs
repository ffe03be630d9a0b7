//! Tests of tasks: who is polled, when, and for how long.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::net::ring::tests::Watchdog;

fn tasks() -> (Tasks, Arc<Inbox>) {
    let inbox = Arc::new(Inbox::new().expect("an eventfd"));
    (Tasks::new(1, Arc::clone(&inbox)), inbox)
}

fn take_in(tasks: &Tasks, inbox: &Inbox) {
    inbox.begin();
    tasks.woken_elsewhere(std::iter::from_fn(|| inbox.next_wake()));
}

/// One turn: it ends early if its tasks take long, or this thread has no CPU.
fn poll(tasks: &Tasks) -> Vec<(OnPanic, String)> {
    let mut panics = Vec::new();
    tasks.poll_ready(Instant::now(), |on_panic, panic| panics.push((on_panic, panic.message)));
    panics
}

/// Turns until every task that is ready has been polled, and those that keep themselves ready once more at the most.
fn poll_all(tasks: &Tasks) -> Vec<(OnPanic, String)> {
    let mut panics = poll(tasks);
    while !tasks.is_between_rounds() {
        panics.extend(poll(tasks));
    }
    panics
}

/// A task that hands its waker over at its first poll and counts all of them.
fn waiting(tasks: &Tasks) -> (Waker, Rc<Cell<u32>>) {
    let (place, polls) = (Rc::new(RefCell::new(None)), Rc::new(Cell::new(0)));
    let (out, count) = (Rc::clone(&place), Rc::clone(&polls));
    let future = poll_fn(move |context| {
        *out.borrow_mut() = Some(context.waker().clone());
        count.set(count.get() + 1);
        Poll::Pending
    });
    tasks.add(Box::pin(future), OnPanic::Contain);
    poll_all(tasks);
    let waker = place.borrow_mut().take().expect("it has been polled");
    (waker, polls)
}

struct Bomb(Rc<Cell<u32>>);

impl Drop for Bomb {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
        panic!("drop");
    }
}

#[test]
fn a_storm_of_wakes_is_one_poll() {
    let (tasks, inbox) = tasks();
    let (waker, polls) = waiting(&tasks);
    (0..10_000).for_each(|_| waker.wake_by_ref());
    let elsewhere = waker.clone();
    std::thread::spawn(move || (0..10_000).for_each(|_| elsewhere.wake_by_ref())).join().expect("no panic");
    take_in(&tasks, &inbox);
    assert_eq!(tasks.ready(), 1);
    poll_all(&tasks);
    assert_eq!((polls.get(), tasks.ready()), (2, 0));
}

#[test]
fn a_wake_from_another_thread_comes_through_the_inbox() {
    let (tasks, inbox) = tasks();
    let (waker, polls) = waiting(&tasks);
    std::thread::spawn(move || waker.wake()).join().expect("no panic");
    assert!(inbox.is_filled() && tasks.ready() == 0);
    take_in(&tasks, &inbox);
    poll_all(&tasks);
    assert_eq!(polls.get(), 2);
}

/// Tasks that take this long whenever they are polled, and the order of the polls.
fn slow(tasks: &Tasks, number: u32, takes: Duration, polls: &Rc<RefCell<Vec<u32>>>) {
    let polls = Rc::clone(polls);
    let future = poll_fn(move |context| {
        let until = Instant::now() + takes;
        while Instant::now() < until {}
        polls.borrow_mut().push(number);
        context.waker().wake_by_ref();
        Poll::Pending
    });
    tasks.add(Box::pin(future), OnPanic::Contain);
}

#[test]
fn a_round_of_long_tasks_is_interrupted_after_each_and_polls_every_one_once() {
    let (tasks, _) = tasks();
    let polls = Rc::new(RefCell::new(Vec::new()));
    // What begins with short tasks needs some polls to learn.
    (0..3).for_each(|number| slow(&tasks, number, 2 * POLLING_MAX, &polls));
    (0..LOOK_EVERY).for_each(|_| drop(poll(&tasks)));
    while !tasks.is_between_rounds() {
        poll(&tasks);
    }
    polls.borrow_mut().clear();
    for polled in 1..=6 {
        poll(&tasks);
        assert_eq!((polls.borrow().len(), tasks.ready()), (polled, 3));
        assert_eq!(tasks.is_between_rounds(), polled % 3 == 0);
    }
    assert_eq!(*polls.borrow(), [0, 1, 2, 0, 1, 2]);
}

#[test]
fn long_tasks_that_follow_short_ones_interrupt_the_round_as_well() {
    let (tasks, _) = tasks();
    let takes = Rc::new(Cell::new(Duration::ZERO));
    let polled = Rc::new(Cell::new(0));
    for _ in 0..LOOK_EVERY {
        let (takes, polled) = (Rc::clone(&takes), Rc::clone(&polled));
        let future = poll_fn(move |context| {
            std::thread::sleep(takes.get());
            polled.set(polled.get() + 1);
            context.waker().wake_by_ref();
            Poll::Pending
        });
        tasks.add(Box::pin(future), OnPanic::Contain);
    }
    for _ in 0..20 {
        poll(&tasks);
    }
    while !tasks.is_between_rounds() {
        poll(&tasks);
    }
    takes.set(50 * POLLING_MAX);
    polled.set(0);
    poll(&tasks);
    // The coarse clock moves once in 10 ms (`CONFIG_HZ` is 100 or more), but for where another CPU that keeps it is taken away.
    assert!(polled.get() <= 3, "{} tasks of 50 ms each in one turn", polled.get());
}

#[test]
fn wakes_from_elsewhere_do_not_keep_an_interrupted_round_from_its_end() {
    let (tasks, inbox) = tasks();
    let (waker, _) = waiting(&tasks);
    let polls = Rc::new(RefCell::new(Vec::new()));
    (0..3).for_each(|number| slow(&tasks, number, 2 * POLLING_MAX, &polls));
    (0..2 * LOOK_EVERY).for_each(|_| drop(poll(&tasks)));
    polls.borrow_mut().clear();
    // Longer than a round: each finds one from elsewhere that wants to be the first.
    for _ in 0..8 {
        let elsewhere = waker.clone();
        std::thread::spawn(move || elsewhere.wake()).join().expect("no panic");
        take_in(&tasks, &inbox);
        poll(&tasks);
    }
    let seen = polls.borrow();
    assert!((0..3).all(|number| seen.contains(&number)), "{seen:?}");
}

#[test]
fn the_clock_is_read_as_rarely_as_tasks_are_short() {
    let clock = Clock::new();
    let looks = |polls: u32| (0..polls).filter(|_| clock.is_due()).count();
    assert_eq!(looks(LOOK_EVERY), 1);
    clock.looked(LOOK_EVERY, POLLING_MAX * LOOK_EVERY);
    assert_eq!(looks(1), 1, "each took as long as all may");
    for every in [2, 4, 8, 16, 32, 64, 64] {
        clock.looked(1, Duration::from_micros(5));
        assert_eq!((looks(every - 1), looks(1)), (0, 1));
    }
    clock.looked(1, Duration::ZERO);
    assert_eq!((looks(LOOK_EVERY - 1), looks(1)), (0, 1));
}

#[test]
fn a_wake_after_the_end_harms_nobody() {
    let (tasks, _) = tasks();
    let place = Rc::new(RefCell::new(None));
    let out = Rc::clone(&place);
    let ends = poll_fn(move |context| {
        *out.borrow_mut() = Some(context.waker().clone());
        Poll::Ready(())
    });
    tasks.add(Box::pin(ends), OnPanic::Contain);
    poll_all(&tasks);
    assert_eq!(tasks.len(), 0);
    let (_, polls) = waiting(&tasks);
    // The row is another task's by now: a needless poll is all it gets.
    place.borrow_mut().take().expect("polled").wake();
    poll_all(&tasks);
    assert_eq!((polls.get(), tasks.len()), (2, 1));
}

/// Begins a task that ends at once, and leaves its waker in `kept` if it `keeps` it. What it saw of its number.
fn begun(tasks: &Tasks, kept: &Rc<RefCell<Vec<Waker>>>, keeps: bool) -> Option<u32> {
    let seen = Rc::new(Cell::new(None));
    let (out, place) = (Rc::clone(&seen), Rc::clone(kept));
    let ends = poll_fn(move |context| {
        out.set(polled(context.waker()));
        assert_eq!(polled(Waker::noop()), None, "another waker is not the task's");
        if keeps {
            place.borrow_mut().push(context.waker().clone());
        }
        Poll::Ready(())
    });
    tasks.add_begun(Box::pin(ends), OnPanic::Contain, |_, panic| panic!("{}", panic.message));
    seen.get()
}

#[test]
fn tasks_that_end_at_once_have_one_seat_in_turns_unless_they_may_be_woken_later() {
    let (tasks, _) = tasks();
    let kept = Rc::default();
    let first = begun(&tasks, &kept, false);
    assert!(first.is_some());
    assert_eq!(begun(&tasks, &kept, false), first);
    (0..3).for_each(|_| assert!(begun(&tasks, &kept, true).is_some()));
    let wakers = kept.borrow();
    for (at, waker) in wakers.iter().enumerate() {
        assert!(!wakers[..at].iter().any(|earlier| earlier.will_wake(waker)), "each has its own");
    }
    let (_, polls) = waiting(&tasks);
    wakers.iter().for_each(Waker::wake_by_ref);
    poll_all(&tasks);
    assert!(polls.get() <= 1 + wakers.len() as u32 && tasks.len() == 1, "needless polls at the worst");
}

#[test]
fn a_wake_after_the_generations_end_does_not_reach_the_next_ones_queue() {
    let (tasks, inbox) = tasks();
    let (waker, _) = waiting(&tasks);
    tasks.clear(|_| ());
    let next = Tasks::new(2, Arc::clone(&inbox));
    waker.wake();
    assert_eq!(next.ready(), 0);
    take_in(&next, &inbox);
    assert!(poll_all(&next).is_empty());
}

#[test]
fn panics_in_poll_and_then_in_drop_are_both_caught() {
    let (tasks, _) = tasks();
    let dropped = Rc::new(Cell::new(0));
    let bomb = Bomb(Rc::clone(&dropped));
    let future = poll_fn(move |_| {
        let _held = &bomb;
        panic!("poll")
    });
    tasks.add(Box::pin(future), OnPanic::Escape);
    let (_, polls) = waiting(&tasks);
    assert_eq!((dropped.get(), polls.get(), tasks.len()), (1, 1, 1));
    let bomb = Bomb(Rc::clone(&dropped));
    let future = poll_fn(move |_| {
        let _held = &bomb;
        panic!("poll {}", 2)
    });
    tasks.add(Box::pin(future), OnPanic::Escape);
    let panics = poll_all(&tasks);
    assert_eq!(panics, [(OnPanic::Escape, "poll 2".to_owned()), (OnPanic::Escape, "drop".to_owned())]);
    assert_eq!(tasks.len(), 1);
}

#[test]
fn clear_drops_every_task_although_drops_panic_and_spawn() {
    let (tasks, _) = tasks();
    let tasks = Rc::new(tasks);
    let dropped = Rc::new(Cell::new(0));
    struct Spawns(Rc<Tasks>, Rc<Cell<u32>>);
    impl Drop for Spawns {
        fn drop(&mut self) {
            let bomb = Bomb(Rc::clone(&self.1));
            self.0.add(Box::pin(async move { drop(bomb) }), OnPanic::Contain);
        }
    }
    for _ in 0..10 {
        let bomb = Bomb(Rc::clone(&dropped));
        tasks.add(Box::pin(async move { drop(bomb) }), OnPanic::Contain);
        let spawns = Spawns(Rc::clone(&tasks), Rc::clone(&dropped));
        tasks.add(Box::pin(async move { drop(spawns) }), OnPanic::Contain);
    }
    let mut panics = 0;
    tasks.clear(|_| panics += 1);
    assert_eq!((dropped.get(), panics, tasks.len(), tasks.ready()), (20, 20, 0, 0));
}

/// What is written before a wake from another thread is seen by the poll that follows, also when the task was
/// queued already: the last write of each round has no second wake to make up for it.
#[test]
fn what_was_written_before_a_wake_is_seen() {
    const ROUNDS: u64 = 50_000;
    let _watchdog = Watchdog::new("a wake whose write was not seen".to_owned(), Duration::from_secs(300));
    let (tasks, inbox) = tasks();
    let (written, seen) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (give, take) = mpsc::channel();
    let (source, sink) = (Arc::clone(&written), Arc::clone(&seen));
    let future = poll_fn(move |context| {
        let value = source.load(Ordering::Relaxed);
        if value == 0 {
            let _ = give.send(context.waker().clone());
        }
        sink.store(value, Ordering::Relaxed);
        if value == 2 * ROUNDS { Poll::Ready(()) } else { Poll::Pending }
    });
    tasks.add(Box::pin(future), OnPanic::Contain);
    poll_all(&tasks);
    let writer = std::thread::spawn(move || {
        let waker: Waker = take.recv().expect("the task's first poll");
        drop(take);
        for round in 1..=ROUNDS {
            // The first wake queues the task; the second falls anywhere into its poll.
            for write in [2 * round - 1, 2 * round] {
                written.store(write, Ordering::Relaxed);
                waker.wake_by_ref();
            }
            let mut spins = 0_u32;
            while seen.load(Ordering::Relaxed) != 2 * round {
                spins += 1;
                // The other thread may want this CPU.
                if spins.is_multiple_of(1000) { std::thread::yield_now() } else { std::hint::spin_loop() }
            }
        }
    });
    while tasks.len() > 0 {
        if inbox.is_filled() {
            take_in(&tasks, &inbox);
            poll_all(&tasks);
        } else {
            std::thread::yield_now();
        }
    }
    writer.join().expect("no panic");
}
