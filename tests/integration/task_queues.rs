//! glommio's task queues: their shares, and that what runs on them is as safe as what is spawned elsewhere.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ringleader::test::App;
use ringleader::{Body, BoxError, ExecutorState, Request, Response, Server, Service, Shard, glommio, service_fn};

use crate::support::eventually;

/// Answers with what `act` says of the request's path.
fn app<F>(act: F) -> App
where
    F: AsyncFn(&Shard, &str) -> Result<String, BoxError> + Clone + Send + Sync + 'static,
{
    App::start(async move |shard: Shard| serving(shard, act.clone())).expect("it starts")
}

fn serving<F>(shard: Shard, act: F) -> Result<impl Service, BoxError>
where
    F: AsyncFn(&Shard, &str) -> Result<String, BoxError> + 'static,
{
    Ok(service_fn(async move |request: Request| {
        Ok(Response::new(Body::from(act(&shard, request.uri().path()).await?)))
    }))
}

#[track_caller]
fn ask(app: &App, path: &str) -> String {
    let answer = app.get(path).expect("the service answers");
    String::from_utf8_lossy(answer.body()).into_owned()
}

/// Uses the thread for a fraction of a millisecond, without an end.
async fn compute(used: Rc<Cell<Duration>>) {
    loop {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_micros(200) {}
        used.set(used.get() + begun.elapsed());
        glommio::executor().yield_task_queue_now().await;
    }
}

#[test]
fn the_thread_is_divided_by_shares_and_requests_are_answered_meanwhile() {
    let app = app(async |shard, path| {
        thread_local! {
            static USED: RefCell<Vec<Rc<Cell<Duration>>>> = const { RefCell::new(Vec::new()) };
        }
        if path == "/start" {
            for shares in [1000, 100] {
                let used = Rc::new(Cell::new(Duration::ZERO));
                drop(shard.task_queue("compute", shares)?.spawn(compute(Rc::clone(&used))));
                USED.with_borrow_mut(|all| all.push(used));
            }
        }
        let used: Vec<u128> = USED.with_borrow(|all| all.iter().map(|used| used.get().as_millis()).collect());
        Ok(format!("{} {}", used[0], used[1]))
    });
    ask(&app, "/start");
    // By shares it is a tenth. With one's whole time slices of 100 ms it would be a half.
    eventually("the queue with more shares has had more time", || {
        let answer = ask(&app, "/");
        let (more, less) = answer.split_once(' ').expect("two numbers");
        let (more, less): (u64, u64) = (more.parse().expect("a number"), less.parse().expect("a number"));
        less > 0 && more > 200 && more > 4 * less
    });
}

#[test]
fn a_panic_on_a_queue_is_its_tasks_outcome_and_costs_nothing_else() {
    let app = app(async |shard, path| {
        let queue = shard.task_queue("of the test", 500)?;
        let sleeper = shard.clone();
        match path {
            "/at-once" => queue.spawn(async { panic!("a task of the test's panics") }).await?,
            "/later" => {
                let later = async move {
                    sleeper.sleep(Duration::from_millis(1)).await;
                    panic!("a task of the test's panics later")
                };
                queue.spawn(later).await?;
            }
            "/unobserved" => drop(queue.spawn(async { panic!("a task of the test's panics, and nobody looks") })),
            _ => {}
        }
        Ok(queue.spawn(async { 6 * 7 }).await?.to_string())
    });
    for path in ["/at-once", "/later"] {
        let error = app.get(path).expect_err("the task's error is the service's");
        assert!(error.to_string().contains("the task panicked: a task of the test's panics"), "{error}");
    }
    assert_eq!(ask(&app, "/unobserved"), "42");
    assert_eq!(ask(&app, "/"), "42");
    eventually("all are counted", || app.stats().executors[0].panics_contained == 3);
    assert_eq!(app.stats().executors[0].generation, 1);
}

#[test]
fn a_task_on_a_queue_awaits_what_a_handler_may() {
    let app = app(async |shard, _| {
        let (queue, inner) = (shard.task_queue("of the test", 1)?, shard.clone());
        let (give, take) = tokio::sync::oneshot::channel();
        let work = queue.spawn(async move {
            inner.sleep(Duration::from_millis(2)).await;
            // Woken by glommio, by a thread of the pool, and by a task of the executor's own.
            glommio::timer::sleep(Duration::from_millis(2)).await;
            let blocking = inner.spawn_blocking(|| 20).await.expect("the pool has room");
            let spawned = inner.spawn(async { 1 }).await.expect("no panic");
            let sent: u64 = take.await.expect("it is sent");
            blocking + spawned + sent
        });
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(5));
            let _ = give.send(21);
        });
        Ok(work.await?.to_string())
    });
    for _ in 0..20 {
        assert_eq!(ask(&app, "/"), "42");
    }
}

struct Counts(Arc<AtomicU64>);

impl Drop for Counts {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn what_is_on_a_queue_goes_with_its_generation() {
    let dropped = Arc::new(AtomicU64::new(0));
    let held = Arc::clone(&dropped);
    let app = app(async move |shard, path| {
        match path {
            "/fill" => {
                let queue = shard.task_queue("of the test", 10)?;
                // One that waits, one that is always due, one that nobody has polled yet.
                let (waits, computes, new) = (Counts(held.clone()), Counts(held.clone()), Counts(held.clone()));
                drop(queue.spawn(async move {
                    let _held = waits;
                    std::future::pending::<()>().await;
                }));
                drop(queue.spawn(async move {
                    let _held = computes;
                    compute(Rc::default()).await;
                }));
                shard.sleep(Duration::from_millis(10)).await;
                drop(queue.spawn(async move {
                    let _held = new;
                    std::future::pending::<()>().await;
                }));
            }
            "/end" => shard.background("of the test", async { Err("the test ends the generation".into()) }),
            _ => {}
        }
        Ok(shard.generation().to_string())
    });
    for generation in 1..=3_u64 {
        assert_eq!(ask(&app, "/fill"), generation.to_string());
        assert_eq!(dropped.load(Ordering::SeqCst), 3 * (generation - 1));
        let _ = app.get("/end");
        eventually("the next generation serves", || {
            app.get("/").is_ok_and(|answer| answer.body() == (generation + 1).to_string().as_bytes())
        });
        assert_eq!(dropped.load(Ordering::SeqCst), 3 * generation);
    }
}

#[test]
fn a_queue_that_is_asked_for_again_is_the_same_and_too_many_are_refused() {
    let app = app(async |shard, _| {
        for _ in 0..1000 {
            shard.task_queue("the same", 7)?;
        }
        let refused = (0..).find_map(|number| shard.task_queue(&format!("queue {number}"), 7).err());
        let wrong: Vec<String> = [0, 1001]
            .iter()
            .filter_map(|shares| shard.task_queue("wrong", *shares).err())
            .map(|e| e.to_string())
            .collect();
        Ok(format!("{}; {}", refused.expect("they are bounded"), wrong.join("; ")))
    });
    let said = ask(&app, "/");
    assert!(said.contains("has 64 already"), "{said}");
    assert_eq!(said.matches("they are 1 to 1000").count(), 2, "{said}");
}

#[test]
fn a_task_on_a_queue_that_does_not_give_way_is_a_stall_like_a_handlers() {
    let builder = Server::builder().executors(1).stall_limit(Duration::from_millis(50));
    let app = App::with(builder, async |shard: Shard| {
        let queue = shard.task_queue("of the test", 1)?;
        shard.background("of the test", async move {
            loop {
                queue.spawn(async { thread::sleep(Duration::from_millis(400)) }).await?;
            }
        });
        serving(shard, async |_: &Shard, _: &str| Ok(String::new()))
    })
    .expect("it starts");
    eventually("the stall is seen", || app.stats().executors[0].state == ExecutorState::Stalled);
}
