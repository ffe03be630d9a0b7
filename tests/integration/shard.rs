//! What user code does with its executor: time and tasks.

use std::cell::{Cell, RefCell};
use std::future::pending;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ringleader::test::{Provocation, provoke, wait_until};
use ringleader::{Body, ExecutorState, Request, Response, Shard, Stop, Task, service_fn};

use crate::support::{Gate, Site, local, settle};

/// Starts a server of one executor, runs `act` on it once, and returns what it sent.
fn on_an_executor<T: Send + Sync + 'static>(act: impl AsyncFn(&Shard) -> T + Copy + Send + Sync + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    let server = local(1).serve(async move |shard: Shard| {
        sender.send(act(&shard).await)?;
        Ok(service_fn(crate::support::echo))
    });
    let site = Site::start(server);
    let outcome = receiver.recv().expect("the start-up closure has run");
    drop(site);
    outcome
}

#[test]
fn a_sleep_is_never_early_and_not_much_late() {
    // A wake that gets lost would cost 500 ms. So may a machine that stalls, but not in every try.
    const LATE: Duration = Duration::from_millis(250);
    const TRIES: usize = 5;
    let sleeps = on_an_executor(async |shard| {
        let mut sleeps = Vec::new();
        for milliseconds in [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89] {
            let asked = Duration::from_millis(milliseconds);
            let mut took = Vec::new();
            while took.len() < TRIES && took.last().is_none_or(|took| *took >= asked + LATE) {
                let start = Instant::now();
                shard.sleep(asked).await;
                took.push(start.elapsed());
            }
            sleeps.push((asked, took));
        }
        sleeps
    });
    for (asked, took) in sleeps {
        assert!(took.iter().all(|took| *took >= asked), "{asked:?} took {took:?}");
        assert!(took.last().is_some_and(|took| *took < asked + LATE), "{asked:?} took {took:?}");
    }
}

#[test]
fn sleeps_end_in_the_order_of_their_times() {
    let order = on_an_executor(async |shard| {
        let (sender, receiver) = mpsc::channel();
        let tasks: Vec<_> = [60, 20, 40, 1, 80]
            .map(Duration::from_millis)
            .into_iter()
            .map(|asked| {
                let (shard, sender) = (shard.clone(), sender.clone());
                // The machine may stall at any of these lines: that is what makes two ends of one sleep's time.
                let earliest = Instant::now() + asked;
                let sleep = shard.sleep(asked);
                let latest = Instant::now() + asked;
                shard.spawn(async move {
                    sleep.await;
                    sender.send((earliest, latest))
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("no task panics").expect("the receiver is there");
        }
        receiver.try_iter().collect::<Vec<_>>()
    });
    assert_eq!(order.len(), 5);
    // Two within one tick of the timers may end in either order.
    let tick = Duration::from_millis(2);
    assert!(order.windows(2).all(|pair| pair[1].1 + tick >= pair[0].0), "{order:?}");
}

#[test]
fn a_timeout_cuts_what_takes_too_long_and_nothing_else() {
    let (done, cut, took) = on_an_executor(async |shard| {
        let done = shard.timeout(Duration::from_secs(5), async { 7 }).await;
        let start = Instant::now();
        let cut = shard.timeout(Duration::from_millis(20), std::future::pending::<()>()).await;
        (done, cut.is_err(), start.elapsed())
    });
    assert_eq!(done, Ok(7));
    assert!(cut && took >= Duration::from_millis(20), "{took:?}");
}

#[test]
fn a_spawned_task_gives_its_output_or_its_panic() {
    let (output, panic) = on_an_executor(async |shard| {
        let output = shard.spawn(async { 40 + 2 }).await;
        let panic = shard.spawn(async { panic!("a task of the test's panics") }).await;
        let _: &Result<(), _> = &panic;
        (output.ok(), panic.err().map(|error| error.to_string()))
    });
    assert_eq!(output, Some(42));
    assert_eq!(panic.as_deref(), Some("the task panicked: a task of the test's panics"));
}

/// What is kept on the thread survives a restart; generation 2 finds there what was generation 1's.
#[test]
fn tasks_of_a_generation_that_has_ended_are_errors_at_once() {
    struct SaysGoodbye(Rc<Cell<bool>>);
    impl Drop for SaysGoodbye {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }
    thread_local! {
        static KEPT: RefCell<Option<(Shard, Task<()>)>> = const { RefCell::new(None) };
    }
    let site = Site::start(local(1).serve(async |shard: Shard| {
        if shard.generation() == 1 {
            KEPT.set(Some((shard.clone(), shard.spawn(pending::<()>()))));
        }
        Ok(service_fn(async |_: Request| {
            let (former, never) = KEPT.take().expect("the first generation has left it here");
            let dropped = Rc::new(Cell::new(false));
            let goodbye = SaysGoodbye(Rc::clone(&dropped));
            let late = former.spawn(async move {
                let _kept = goodbye;
                pending::<()>().await;
            });
            let dropped = dropped.get();
            let told = [never.await, late.await].map(|outcome| outcome.expect_err("nobody runs it").to_string());
            Ok(Response::new(Body::from(format!("{dropped} {told:?}"))))
        }))
    }));
    settle(provoke(&site, 0, Provocation::Restart)).expect("it serves");
    wait_until(&site, |stats| stats.executors[0].state == ExecutorState::Serving && stats.executors[0].generation == 2);
    let answer = site.connect().get("/");
    assert!(answer.text().starts_with("true "), "the future is dropped: {}", answer.text());
    assert_eq!(answer.text().matches("has ended").count(), 2, "{}", answer.text());
}

#[test]
fn a_task_outlives_its_handle() {
    let (sender, receiver) = mpsc::channel();
    let site = Site::start(local(1).serve(async move |shard: Shard| {
        let (sender, sleep) = (sender.clone(), shard.sleep(Duration::from_millis(5)));
        drop(shard.spawn(async move {
            sleep.await;
            sender.send(())
        }));
        Ok(service_fn(crate::support::echo))
    }));
    receiver.recv_timeout(crate::support::BOUND).expect("the task has run");
    drop(site);
}

#[test]
fn a_task_woken_from_another_thread_goes_on_at_once() {
    let site = Site::start(local(1).serve(async |_| {
        Ok(service_fn(async move |_: Request| {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            std::thread::spawn(move || {
                // Long enough for the executor to fall asleep.
                std::thread::sleep(Duration::from_millis(30));
                sender.send(Instant::now())
            });
            let sent = receiver.await?;
            Ok(Response::new(Body::from(sent.elapsed().as_micros().to_string())))
        }))
    }));
    let mut client = site.connect();
    let mut delays: Vec<u64> = (0..15).map(|_| client.get("/").text().parse().expect("microseconds")).collect();
    delays.sort_unstable();
    // Far from the executor's guard wake-ups (100 ms, of which 30 have passed, and 500 ms), which would hide a lost wake.
    // A busy machine delays many, but a few are always at once.
    assert!(delays[delays.len() / 4] < 20_000, "{delays:?} µs");
}

#[test]
fn a_shard_knows_when_its_executor_drains() {
    let (sender, receiver) = mpsc::channel();
    let gate = Gate::shut();
    let server = {
        let gate = gate.clone();
        local(1).serve(async move |shard: Shard| {
            let (sender, draining) = (sender.clone(), shard.draining());
            drop(shard.spawn(async move {
                draining.await;
                sender.send(())
            }));
            let gate = gate.clone();
            Ok(service_fn(async move |_: Request| {
                gate.passed().await;
                Ok(Response::new(Body::empty()))
            }))
        })
    };
    let site = Site::start(server);
    let mut client = site.connect();
    client.ask("/");
    crate::support::eventually("the handler runs", || site.stats().executors[0].in_flight == 1);
    assert!(receiver.try_recv().is_err(), "nothing drains yet");
    let exit = site.stop(Stop::Drain(crate::support::BOUND));
    receiver.recv_timeout(crate::support::BOUND).expect("the task hears of the drain");
    gate.open();
    assert_eq!(client.answer().status, 200);
    assert!(settle(exit).expect("it stops").drained);
}

/// Polls its future only when that future's own waker has been used, as `FuturesUnordered` does.
struct OnlyWhenWoken<F> {
    future: std::pin::Pin<Box<F>>,
    woken: std::sync::Arc<Flag>,
}

#[derive(Default)]
struct Flag {
    set: std::sync::atomic::AtomicBool,
    outer: std::sync::Mutex<Option<std::task::Waker>>,
}

impl std::task::Wake for Flag {
    fn wake(self: std::sync::Arc<Self>) {
        self.set.store(true, std::sync::atomic::Ordering::SeqCst);
        let outer = self.outer.lock().expect("nobody panics with it").take();
        outer.into_iter().for_each(std::task::Waker::wake);
    }
}

impl<F: Future> Future for OnlyWhenWoken<F> {
    type Output = F::Output;

    fn poll(mut self: std::pin::Pin<&mut Self>, context: &mut std::task::Context<'_>) -> std::task::Poll<Self::Output> {
        *self.woken.outer.lock().expect("nobody panics with it") = Some(context.waker().clone());
        if !self.woken.set.swap(false, std::sync::atomic::Ordering::SeqCst) {
            return std::task::Poll::Pending;
        }
        let waker = std::task::Waker::from(std::sync::Arc::clone(&self.woken));
        self.future.as_mut().poll(&mut std::task::Context::from_waker(&waker))
    }
}

#[test]
fn a_drain_is_heard_inside_a_combinator_with_wakers_of_its_own() {
    let (sender, receiver) = mpsc::channel();
    let server = local(1).serve(async move |shard: Shard| {
        let (sender, draining) = (sender.clone(), shard.draining());
        let woken = std::sync::Arc::new(Flag::default());
        woken.set.store(true, std::sync::atomic::Ordering::SeqCst);
        let only_when_woken = OnlyWhenWoken { future: Box::pin(draining), woken };
        drop(shard.spawn(async move {
            only_when_woken.await;
            sender.send(())
        }));
        // A second handler that waits keeps the drain from being over at once.
        let waiting = shard.clone();
        Ok(service_fn(async move |_: Request| {
            waiting.draining().await;
            waiting.sleep(Duration::from_millis(50)).await;
            Ok(Response::new(Body::empty()))
        }))
    });
    let site = Site::start(server);
    let mut client = site.connect();
    client.ask("/");
    crate::support::eventually("the handler runs", || site.stats().executors[0].in_flight == 1);
    let exit = site.stop(Stop::Drain(crate::support::BOUND));
    receiver.recv_timeout(crate::support::BOUND).expect("the combinator hears of the drain");
    assert_eq!(client.answer().status, 200);
    settle(exit).expect("the server stops");
}
