//! The pool without a server.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Wake, Waker};
use std::thread::{Thread, current, park};

use super::*;

/// Far above what anything here takes on a busy machine.
const BOUND: Duration = Duration::from_secs(60);

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        park();
    }
}

fn pool(threads_max: usize, queue_max: usize) -> Pool {
    Pool::new("test", affinity::available().allowed, Bounds { threads_max, queue_max, idle_max: BOUND })
}

fn close(pool: &Pool) {
    assert_eq!(pool.close(Instant::now() + BOUND), 0);
}

fn threads(pool: &Pool) -> usize {
    pool.shared.lock().threads.len()
}

/// A closure that says when it runs and then waits to be let go.
fn gated(pool: &Pool) -> (Ticket<()>, Receiver<()>, Sender<()>) {
    let ((begin, begun), (open, gate)) = (channel(), channel::<()>());
    let ticket = pool.run(0, 1, move || {
        let _ = begin.send(());
        let _ = gate.recv();
    });
    (ticket, begun, open)
}

#[test]
fn a_closure_runs_on_another_thread_and_its_result_comes_back() {
    let pool = pool(4, 4);
    assert_eq!(threads(&pool), 0, "nothing is started before it is needed");
    let here = current().id();
    let (there, name) =
        block_on(pool.run(0, 1, || (current().id(), current().name().map(str::to_owned)))).expect("room");
    assert_ne!(there, here);
    assert_eq!(name.as_deref(), Some("test-blk"));
    close(&pool);
    assert_eq!(threads(&pool), 0);
}

#[test]
fn one_idle_thread_is_used_again_and_no_second_one_started() {
    let pool = pool(4, 4);
    let first = block_on(pool.run(0, 1, || current().id())).expect("room");
    // It is idle a moment after its result has arrived.
    let start = Instant::now();
    while pool.shared.lock().idle == 0 {
        assert!(start.elapsed() < BOUND);
        std::thread::yield_now();
    }
    assert_eq!(block_on(pool.run(0, 1, || current().id())), Ok(first));
    assert_eq!(threads(&pool), 1);
    close(&pool);
}

#[test]
fn threads_are_not_bound_to_the_cpu_of_whoever_starts_them() {
    let cpus = affinity::available().allowed;
    let pool = pool(1, 1);
    let expected = cpus.clone();
    std::thread::scope(|scope| {
        let starter = scope.spawn(|| {
            affinity::run_on(&cpus[..1]).expect("it may run there");
            assert_eq!(block_on(pool.run(0, 1, || affinity::available().allowed)), Ok(expected));
        });
        starter.join().expect("no assertion fails");
    });
    close(&pool);
}

#[test]
fn threads_and_queue_are_bounded_and_more_fails_at_once() {
    let pool = pool(2, 3);
    let running = [gated(&pool), gated(&pool)];
    running.iter().for_each(|(_, begun, _)| begun.recv().expect("it runs"));
    let waiting: Vec<_> = (0..3).map(|number| pool.run(0, 1, move || number)).collect();
    assert_eq!(block_on(pool.run(0, 1, || 9)), Err(Lost::Full { running: 2, waiting: 3 }));
    assert_eq!(threads(&pool), 2);
    drop(running);
    for (number, ticket) in waiting.into_iter().enumerate() {
        assert_eq!(block_on(ticket), Ok(number));
    }
    assert_eq!(block_on(pool.run(0, 1, || 9)), Ok(9), "there is room again");
    close(&pool);
}

#[test]
fn without_a_queue_there_is_room_for_as_many_as_there_are_threads() {
    let pool = pool(2, 0);
    let running = [gated(&pool), gated(&pool)];
    assert_eq!(block_on(pool.run(0, 1, || ())), Err(Lost::Full { running: 2, waiting: 0 }));
    drop(running);
    close(&pool);
}

#[test]
fn a_panic_is_the_result_and_the_thread_goes_on() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("a drop of the test's");
        }
    }
    let pool = pool(1, 8);
    let lost = |message: &str| Err(Lost::Panicked(message.to_owned()));
    assert_eq!(
        block_on(pool.run(0, 1, || -> u8 { panic!("a closure of the test's") })),
        lost("a closure of the test's")
    );
    let payload = || -> u8 { std::panic::panic_any(Bomb) };
    assert_eq!(block_on(pool.run(0, 1, payload)), lost("a panic with a payload that is not text"));
    // A result that nobody wants, and that panics as it is dropped.
    let (_, begun, open) = gated(&pool);
    begun.recv().expect("it runs");
    drop(pool.run(0, 1, || Bomb));
    drop(open);
    assert_eq!(block_on(pool.run(0, 1, || 7)), Ok(7));
    assert_eq!(pool.shared.lock().threads_made, 1);
    close(&pool);
}

#[test]
fn a_waker_that_panics_costs_the_pool_nothing() {
    struct Panics(Sender<()>);
    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            let _ = self.0.send(());
            panic!("a waker of the test's");
        }
    }
    let pool = pool(1, 8);
    let (mut ticket, _, open) = gated(&pool);
    let (sender, woken) = channel();
    let waker = Waker::from(Arc::new(Panics(sender)));
    assert!(Pin::new(&mut ticket).poll(&mut Context::from_waker(&waker)).is_pending());
    drop(open);
    woken.recv_timeout(BOUND).expect("it is woken");
    assert_eq!((block_on(ticket), block_on(pool.run(0, 1, || 7))), (Ok(()), Ok(7)));
    close(&pool);
}

#[test]
fn a_result_that_nobody_wants_is_dropped_on_its_thread() {
    struct Tells(Sender<std::thread::ThreadId>);
    impl Drop for Tells {
        fn drop(&mut self) {
            let _ = self.0.send(current().id());
        }
    }
    let pool = pool(1, 8);
    let (blocker, begun, open) = gated(&pool);
    begun.recv().expect("it runs");
    let (sender, dropped) = channel();
    let ran = Arc::new(AtomicBool::new(false));
    let mark = Arc::clone(&ran);
    drop(pool.run(0, 1, move || {
        mark.store(true, Ordering::SeqCst);
        Tells(sender)
    }));
    drop(open);
    block_on(blocker).expect("it ends");
    let there = dropped.recv_timeout(BOUND).expect("it is dropped");
    assert!(ran.load(Ordering::SeqCst) && there != current().id());
    close(&pool);
}

#[test]
fn a_close_drops_what_waits_and_waits_for_what_runs() {
    let pool = pool(1, 8);
    let (ticket, begun, open) = gated(&pool);
    begun.recv().expect("it runs");
    let waiting = pool.run(0, 1, || 1);
    assert_eq!(pool.close(Instant::now()), 1, "one still runs");
    assert_eq!(block_on(waiting), Err(Lost::Stopped));
    assert_eq!(block_on(pool.run(0, 1, || 1)), Err(Lost::Stopped), "nothing more is taken");
    drop(open);
    close(&pool);
    assert_eq!(block_on(ticket), Ok(()));
}

#[test]
fn threads_without_work_end() {
    let bounds = Bounds { threads_max: 8, queue_max: 8, idle_max: Duration::from_millis(1) };
    let pool = Pool::new("test", affinity::available().allowed, bounds);
    let running: Vec<_> = (0..8).map(|_| gated(&pool)).collect();
    assert_eq!(threads(&pool), 8);
    drop(running);
    let start = Instant::now();
    while threads(&pool) > 0 {
        assert!(start.elapsed() < BOUND, "{} threads are left", threads(&pool));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(pool.shared.lock().idle, 0);
    assert_eq!(block_on(pool.run(0, 1, || 7)), Ok(7), "others start when they are needed");
    close(&pool);
}

#[test]
fn every_closure_of_many_runs_once() {
    const CLOSURES: usize = 2000;
    let bounds = Bounds { threads_max: 3, queue_max: CLOSURES, idle_max: Duration::from_micros(50) };
    let pool = Pool::new("test", affinity::available().allowed, bounds);
    let ran = Arc::new(AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for number in 0..CLOSURES / 4 {
                    let ran = Arc::clone(&ran);
                    let outcome = block_on(pool.run(0, 1, move || (ran.fetch_add(1, Ordering::Relaxed), number).1));
                    assert_eq!(outcome, Ok(number));
                }
            });
        }
    });
    assert_eq!(ran.load(Ordering::Relaxed), CLOSURES);
    close(&pool);
    assert_eq!(pool.shared.lock().idle, 0);
}
