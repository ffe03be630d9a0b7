//! Handles on every thread, against real executors; meant to be run under AddressSanitizer, too.

use std::cell::{Cell, RefCell};
use std::future::{pending, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::task::{Context, Poll, Waker};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use crate::{
    Body, BoxError, ExecutorStats, Request, Response, RestartPolicy, Running, Server, Shard, ShardLocal, Stop,
    service_fn,
};

/// Far above what anything here takes, so that a test fails only when something hangs.
const BOUND: Duration = Duration::from_secs(60);

/// What became of values.
#[derive(Default)]
struct Log {
    dropped: AtomicUsize,
    elsewhere: AtomicUsize,
}

impl Log {
    fn dropped(&self) -> usize {
        assert_eq!(self.elsewhere.load(Ordering::SeqCst), 0, "a value was dropped on another thread than its own");
        self.dropped.load(Ordering::SeqCst)
    }
}

/// A value that is bound to its thread, and knows.
struct Bound {
    born: ThreadId,
    heap: Rc<RefCell<Vec<u8>>>,
    log: Arc<Log>,
    panics: bool,
}

impl Bound {
    fn new(log: &Arc<Log>) -> Self {
        let heap = Rc::new(RefCell::new(vec![7; 100]));
        Self { born: thread::current().id(), heap, log: Arc::clone(log), panics: false }
    }

    fn panicking(log: &Arc<Log>, panics: bool) -> Self {
        let mut bound = Self::new(log);
        bound.panics = panics;
        bound
    }

    fn touch(&self) -> usize {
        self.heap.borrow_mut().push(7);
        assert!(self.heap.borrow().iter().all(|byte| *byte == 7));
        self.heap.borrow().len()
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.touch();
        if thread::current().id() != self.born {
            self.log.elsewhere.fetch_add(1, Ordering::SeqCst);
        }
        self.log.dropped.fetch_add(1, Ordering::SeqCst);
        assert!(!self.panics, "a drop of the test's panics");
    }
}

type Handle = ShardLocal<Bound>;

/// One executor, on which `work` runs as a task in each generation; it fails when `work` does.
fn executor<F>(work: F) -> Running
where
    F: AsyncFn(Shard) -> Result<(), BoxError> + Clone + Send + Sync + 'static,
{
    let restart = RestartPolicy {
        backoff_base: Duration::from_millis(1),
        backoff_max: Duration::from_millis(5),
        quarantine_after: 0,
        ..RestartPolicy::default()
    };
    let server = Server::builder().listen("127.0.0.1:0").executors(1).restart(restart);
    let server = server.serve(async move |shard: Shard| {
        let (work, its) = (work.clone(), shard.clone());
        shard.background("work", async move { work(its).await });
        Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
    });
    server.start().wait().expect("the server starts")
}

fn stats(running: &Running) -> ExecutorStats {
    running.stats().executors.remove(0)
}

fn stop(running: &Running) {
    running.stop(Stop::Now).wait().expect("the server stops");
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < BOUND, "in vain waited until {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A way for values out of an executor, from closures that must be `Sync`.
fn channel<T: Send>() -> (Arc<Mutex<mpsc::Sender<T>>>, mpsc::Receiver<T>) {
    let (sender, receiver) = mpsc::channel();
    (Arc::new(Mutex::new(sender)), receiver)
}

fn send<T: Send>(sender: &Mutex<mpsc::Sender<T>>, value: T) {
    let _ = locked(sender).send(value);
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics with it")
}

fn receive<T>(receiver: &mpsc::Receiver<T>) -> T {
    receiver.recv_timeout(BOUND).expect("it is sent in time")
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref().copied()).expect("a text")
}

#[test]
fn values_let_go_of_elsewhere_by_the_thousand_are_dropped_at_home() {
    const VALUES: usize = 20_000;
    const THREADS: usize = 4;
    let log = Arc::new(Log::default());
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..THREADS).map(|_| mpsc::channel::<Handle>()).unzip();
    let senders = Arc::new(Mutex::new(Some(senders)));
    let running = {
        let log = Arc::clone(&log);
        executor(async move |shard: Shard| {
            let senders = locked(&senders).take().ok_or("a second generation")?;
            let mut kept = Vec::new();
            for number in 0..VALUES {
                let handle = shard.local(Bound::new(&log));
                // To all of them, or to one, with or without one that stays here.
                let to = if number % 3 == 0 { THREADS } else { 1 };
                for sender in senders.iter().cycle().skip(number).take(to) {
                    sender.send(handle.clone())?;
                }
                if number % 5 == 0 {
                    kept.push(handle);
                }
                if number % 64 == 0 {
                    kept.retain(|handle| handle.touch() % 2 == 0);
                    shard.sleep(Duration::from_millis(1)).await;
                }
            }
            Ok(())
        })
    };
    let threads: Vec<_> = receivers
        .into_iter()
        .map(|handles| {
            thread::spawn(move || {
                for (number, handle) in handles.into_iter().enumerate() {
                    let clones: Vec<Handle> = (0..number % 4).map(|_| handle.clone()).collect();
                    assert!(handle.try_get().is_none());
                    drop(handle);
                    drop(clones);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("no thread panics"));
    eventually("all have come home", || log.dropped() == VALUES);
    stop(&running);
    assert_eq!((log.dropped(), stats(&running).values_leaked), (VALUES, 0));
}

#[test]
fn a_handle_outlives_its_generation_and_its_value_is_dropped_by_the_next_one() {
    let log = Arc::new(Log::default());
    let (out, handles) = channel::<Handle>();
    let (seen, afterwards) = channel::<(bool, String)>();
    let old: Arc<Mutex<Option<Handle>>> = Arc::default();
    let running = {
        let (log, old) = (Arc::clone(&log), Arc::clone(&old));
        executor(async move |shard: Shard| {
            if shard.generation() == 1 {
                for _ in 0..1000 {
                    send(&out, shard.local(Bound::new(&log)));
                }
                *locked(&old) = Some(shard.local(Bound::new(&log)));
                return Err("the first generation ends".into());
            }
            let old = locked(&old).take().ok_or("a third generation")?;
            let used = catch_unwind(AssertUnwindSafe(|| old.touch())).expect_err("its generation has ended");
            let unreachable = old.try_get().is_none();
            // This is its thread all the same: it is dropped in place.
            drop(old);
            assert_eq!(log.dropped(), 1);
            send(&seen, (unreachable, message_of(&*used).to_owned()));
            pending().await
        })
    };
    let (unreachable, message) = receive(&afterwards);
    assert!(unreachable && message.contains("after the end of the generation"), "{message}");
    let held: Vec<Handle> = (0..1000).map(|_| receive(&handles)).collect();
    assert_eq!(log.dropped(), 1, "the end of a generation frees nothing that has a handle");
    drop(held);
    eventually("all have come home", || log.dropped() == 1001);
    stop(&running);
    assert_eq!((stats(&running).generation, stats(&running).values_leaked), (2, 0));
}

#[test]
fn restarts_in_the_middle_of_drops_lose_nothing() {
    let (log, made) = (Arc::new(Log::default()), Arc::new(AtomicUsize::new(0)));
    let (out, handles) = channel::<Handle>();
    let running = {
        let (log, made) = (Arc::clone(&log), Arc::clone(&made));
        executor(async move |shard: Shard| {
            let kept = shard.local(Bound::new(&log));
            made.fetch_add(1, Ordering::SeqCst);
            for _ in 0..200 {
                made.fetch_add(1, Ordering::SeqCst);
                send(&out, shard.local(Bound::new(&log)));
                kept.touch();
            }
            shard.sleep(Duration::from_millis(1)).await;
            if shard.generation() < 30 { Err("the test ends this generation".into()) } else { pending().await }
        })
    };
    let dropper = thread::spawn(move || handles.into_iter().take(30 * 200).for_each(drop));
    dropper.join().expect("it does not panic");
    // The last generation keeps one.
    eventually("all have come home", || log.dropped() == made.load(Ordering::SeqCst) - 1);
    stop(&running);
    assert_eq!((log.dropped(), made.load(Ordering::SeqCst)), (30 * 201, 30 * 201));
    assert_eq!(stats(&running).values_leaked, 0);
}

/// The leak is meant: `tests/lsan-suppressions.txt` names this function.
#[inline(never)]
fn made_to_be_leaked(shard: &Shard, log: &Arc<Log>) -> Handle {
    shard.local(Bound::new(log))
}

#[test]
fn values_whose_handles_outlive_the_server_are_counted_and_never_touched() {
    let log = Arc::new(Log::default());
    let (out, handles) = channel::<Handle>();
    let running = {
        let log = Arc::clone(&log);
        executor(async move |shard: Shard| {
            for _ in 0..3 {
                send(&out, made_to_be_leaked(&shard, &log));
            }
            let _home = shard.local(Bound::new(&log));
            pending().await
        })
    };
    let held: Vec<Handle> = (0..3).map(|_| receive(&handles)).collect();
    stop(&running);
    assert_eq!((log.dropped(), stats(&running).values_leaked), (1, 3));
    let clones = held.clone();
    drop(running);
    drop(held);
    assert!(clones.iter().all(|handle| handle.try_get().is_none()));
    drop(clones);
    assert_eq!(log.dropped(), 1);
}

#[test]
fn a_value_that_panics_as_it_is_dropped_costs_nobody_anything() {
    let log = Arc::new(Log::default());
    let (out, handles) = channel::<Handle>();
    let running = {
        let log = Arc::clone(&log);
        executor(async move |shard: Shard| {
            for number in 0..60 {
                send(&out, shard.local(Bound::panicking(&log, number % 2 == 0)));
            }
            pending().await
        })
    };
    let held: Vec<Handle> = (0..60).map(|_| receive(&handles)).collect();
    drop(held);
    eventually("all are dropped", || log.dropped() == 60);
    eventually("the panics are counted", || stats(&running).panics_contained == 30);
    assert_eq!(stats(&running).generation, 1);
    stop(&running);
}

#[test]
fn use_on_another_thread_panics_and_harms_nobody() {
    let log = Arc::new(Log::default());
    let (out, handles) = channel::<Handle>();
    let (back, returned) = mpsc::channel::<()>();
    let returned = Mutex::new(returned);
    let (seen, lengths) = channel::<usize>();
    let running = {
        let log = Arc::clone(&log);
        let returned = Arc::new(returned);
        executor(async move |shard: Shard| {
            let handle = shard.local(Bound::new(&log));
            handle.touch();
            send(&out, handle.clone());
            while locked(&returned).try_recv().is_err() {
                shard.sleep(Duration::from_millis(1)).await;
            }
            send(&seen, handle.touch());
            pending().await
        })
    };
    let handle = receive(&handles);
    for _ in 0..10 {
        let handle = handle.clone();
        let panic = thread::spawn(move || handle.touch()).join().expect_err("it is used elsewhere");
        let message = message_of(&*panic);
        assert!(message.contains("Bound") && message.contains("not its executor's"), "{message}");
    }
    let run = catch_unwind(AssertUnwindSafe(|| drop(handle.run(async |value: &Bound| value.touch()))));
    assert!(run.is_err(), "what the closure holds would be this thread's");
    back.send(()).expect("the executor waits");
    assert_eq!(receive(&lengths), 102);
    drop(handle);
    stop(&running);
    assert_eq!((log.dropped(), stats(&running).values_leaked), (1, 0));
}

/// What safe code can do at worst: a reference of the life of the program, used after its generation.
#[test]
fn a_reference_from_a_leaked_handle_is_good_to_the_end_of_its_thread_and_beyond_its_generation() {
    /// Uses the reference when its thread ends.
    struct AtTheEnd(Cell<Option<&'static Bound>>);
    impl Drop for AtTheEnd {
        fn drop(&mut self) {
            if let Some(value) = self.0.get() {
                value.touch();
                value.log.elsewhere.fetch_add(usize::from(thread::current().id() != value.born), Ordering::SeqCst);
            }
        }
    }
    thread_local! {
        static KEPT: AtTheEnd = const { AtTheEnd(Cell::new(None)) };
    }
    /// Where the sanitizer finds what is leaked on purpose.
    static LEAKED: Mutex<Vec<&'static Handle>> = Mutex::new(Vec::new());

    let log = Arc::new(Log::default());
    let (seen, lengths) = channel::<usize>();
    let running = {
        let log = Arc::clone(&log);
        executor(async move |shard: Shard| {
            if shard.generation() == 1 {
                let handle: &'static Handle = Box::leak(Box::new(shard.local(Bound::new(&log))));
                locked(&LEAKED).push(handle);
                KEPT.with(|kept| kept.0.set(Some(handle)));
                return Err("the first generation ends".into());
            }
            send(&seen, KEPT.with(|kept| kept.0.get()).ok_or("another thread")?.touch());
            pending().await
        })
    };
    assert_eq!(receive(&lengths), 101);
    stop(&running);
    assert_eq!((log.dropped(), stats(&running).values_leaked), (0, 1));
}

fn poll<T>(future: Pin<&mut (impl Future<Output = T> + ?Sized)>) -> Poll<T> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

type Portable<T> = Pin<Box<dyn Future<Output = T> + Send>>;

#[test]
fn work_that_is_not_send_runs_in_a_future_that_is() {
    let log = Arc::new(Log::default());
    let (seen, lengths) = channel::<(usize, usize)>();
    let running = {
        let log = Arc::clone(&log);
        executor(async move |shard: Shard| {
            let handle = shard.local(Bound::new(&log));
            let (mine, its) = (Rc::new(Cell::new(0)), shard.clone());
            let counted = Rc::clone(&mine);
            let future: Portable<usize> = Box::pin(handle.run(async move |value: &Bound| {
                let heap = Rc::clone(&value.heap);
                its.sleep(Duration::from_millis(2)).await;
                counted.set(counted.get() + 1);
                heap.borrow_mut().push(7);
                value.touch()
            }));
            drop(handle);
            let length = future.await;
            assert_eq!(Rc::strong_count(&mine), 1, "it is dropped when it is done");
            send(&seen, (length, mine.get()));
            pending().await
        })
    };
    assert_eq!(receive(&lengths), (102, 1));
    eventually("its handle is gone", || log.dropped() == 1);
    stop(&running);
}

#[test]
fn work_goes_home_to_be_dropped_and_is_polled_nowhere_else() {
    const FUTURES: usize = 3000;
    let log = Arc::new(Log::default());
    let (out, futures) = channel::<Portable<()>>();
    let running = {
        let log = Arc::clone(&log);
        executor(async move |shard: Shard| {
            let handle = shard.local(Bound::new(&log));
            for number in 0..FUTURES {
                let held = Bound::new(&log);
                let mut future: Portable<()> = Box::pin(handle.run(async move |value: &Bound| {
                    held.touch();
                    let reference = value;
                    poll_fn(|_| {
                        reference.touch();
                        Poll::<()>::Pending
                    })
                    .await;
                }));
                // Some have begun, and hold a reference to the value.
                if number % 2 == 0 {
                    assert!(poll(future.as_mut()).is_pending());
                }
                send(&out, future);
            }
            drop(handle);
            if shard.generation() == 1 { Err("the first generation ends".into()) } else { pending().await }
        })
    };
    let dropper = thread::spawn(move || {
        for number in 0..2 * FUTURES {
            let mut future = receive(&futures);
            if number % 100 == 0 {
                let polled = catch_unwind(AssertUnwindSafe(|| poll(future.as_mut())));
                let panic = polled.expect_err("it is polled elsewhere");
                assert!(message_of(&*panic).contains("elsewhere"));
            }
        }
    });
    dropper.join().expect("only the polls panic");
    eventually("all have come home", || log.dropped() == 2 * FUTURES + 2);
    stop(&running);
    assert_eq!(stats(&running).values_leaked, 0);
}
