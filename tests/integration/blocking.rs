//! Closures that block, through `Shard::spawn_blocking`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ringleader::{Body, Builder, Request, Response, Shard, Stop, service_fn};

use crate::support::{BOUND, Site, eventually, local, settle};

/// `/block` waits in a closure until the test sends or hangs up, `/panic` panics in one, `/escape` fells the executor.
/// The receiver hears of each closure that has begun, and of each result that was dropped instead of awaited.
fn site(builder: Builder) -> (Site, Sender<()>, Receiver<&'static str>) {
    let (open, gate) = channel::<()>();
    let (tell, heard) = channel();
    let gate = Arc::new(Mutex::new(gate));
    let site = Site::start(builder.serve(async move |shard: Shard| {
        let (gate, tell) = (Arc::clone(&gate), tell.clone());
        Ok(service_fn(async move |request: Request| {
            let text = match request.uri().path() {
                "/block" => {
                    let (gate, tell) = (Arc::clone(&gate), tell.clone());
                    let blocked = move || {
                        tell.send("begun").expect("the test listens");
                        let _ = gate.lock().expect("nobody panics with it").recv();
                        Tells(tell, "blocked")
                    };
                    shard.spawn_blocking(blocked).await?.take()
                }
                "/panic" => {
                    let error = shard.spawn_blocking(|| -> () { panic!("a closure of the test's panics") }).await;
                    let error = error.expect_err("it panics");
                    assert!(error.is_panic() && !error.is_overloaded());
                    return Ok(Response::new(Body::from(error.to_string())));
                }
                "/escape" => {
                    shard.background("test", async { panic!("a background task of the test's panics") });
                    "escaped"
                }
                _ => "fine",
            };
            Ok(Response::new(Body::from(text)))
        }))
    }));
    (site, open, heard)
}

/// A result that says when it is dropped unused.
struct Tells(Sender<&'static str>, &'static str);

impl Tells {
    fn take(mut self) -> &'static str {
        std::mem::take(&mut self.1)
    }
}

impl Drop for Tells {
    fn drop(&mut self) {
        if !self.1.is_empty() {
            let _ = self.0.send("dropped");
        }
    }
}

fn hears(heard: &Receiver<&'static str>, what: &str) {
    assert_eq!(heard.recv_timeout(BOUND), Ok(what));
}

#[test]
fn an_executor_serves_others_while_a_closure_blocks() {
    let (site, open, heard) = site(local(1));
    let mut client = site.connect();
    client.ask("/block");
    hears(&heard, "begun");
    assert_eq!(site.connect().get("/").text(), "fine");
    open.send(()).expect("the closure waits");
    assert_eq!(client.answer().text(), "blocked");
}

#[test]
fn a_closure_that_panics_costs_its_result_only() {
    let (site, _open, _heard) = site(local(1));
    let mut client = site.connect();
    for _ in 0..3 {
        assert_eq!(client.get("/panic").text(), "the task panicked: a closure of the test's panics");
    }
    let stats = site.stats().executors.remove(0);
    // Neither the connection nor the executor knows of it.
    assert_eq!((stats.generation, stats.panics_contained), (1, 0));
}

#[test]
fn when_no_thread_and_no_place_is_free_the_answer_is_503_at_once() {
    let (site, open, heard) = site(local(2).blocking_threads_max(1).blocking_queue_max(1));
    let mut running = site.connect();
    running.ask("/block");
    hears(&heard, "begun");
    // Of two more one waits, whichever executors they are on, and as long as it does the other has its answer alone.
    let (tell, answers) = channel();
    for mut client in [site.connect(), site.connect()] {
        let tell = tell.clone();
        std::thread::spawn(move || {
            let answer = client.get("/block");
            assert_eq!(answer.header("retry-after"), (answer.status == 503).then_some("1"));
            tell.send(answer.status)
        });
    }
    assert_eq!(answers.recv_timeout(BOUND), Ok(503));
    drop(open);
    assert_eq!(running.answer().text(), "blocked");
    assert_eq!(answers.recv_timeout(BOUND), Ok(200));
}

#[test]
fn a_generation_that_ends_leaves_its_closures_to_end_by_themselves() {
    let mut policy = ringleader::RestartPolicy::default();
    policy.quarantine_after = 0;
    let (site, open, heard) = site(local(1).restart(policy));
    let mut client = site.connect();
    client.ask("/block");
    hears(&heard, "begun");
    site.connect().ask("/escape");
    client.expect_end();
    eventually("the next generation lives", || site.stats().executors[0].generation == 2);
    open.send(()).expect("the closure waits");
    hears(&heard, "dropped");
    assert_eq!(site.connect().get("/").text(), "fine");
}

#[test]
fn a_stop_waits_for_closures_that_run_and_drops_those_that_wait() {
    let begun = Arc::new(AtomicBool::new(false));
    let (open, gate) = channel::<()>();
    let gate = Arc::new(Mutex::new(Some(gate)));
    let (tell, heard) = channel();
    let mark = Arc::clone(&begun);
    let site = Site::start(local(1).blocking_threads_max(1).serve(async move |shard: Shard| {
        let (gate, mark, tell) = (gate.lock().expect("no panic").take(), Arc::clone(&mark), tell.clone());
        let (first, second) = (Tells(tell.clone(), "first"), Tells(tell, "second"));
        drop(shard.spawn_blocking(move || {
            mark.store(true, Ordering::SeqCst);
            let _ = gate.expect("there is one generation").recv();
            first.take()
        }));
        drop(shard.spawn_blocking(move || second.take()));
        Ok(service_fn(crate::support::echo))
    }));
    eventually("the closure runs", || begun.load(Ordering::SeqCst));
    let running = site.into_running();
    let exit = running.stop(Stop::Drain(BOUND));
    // The one that waits is dropped while the other still runs.
    hears(&heard, "dropped");
    open.send(()).expect("the closure waits");
    let exit = settle(exit).expect("it stops");
    assert_eq!((exit.drained, exit.abandoned, exit.abandoned_closures), (true, 0, 0));
    assert!(heard.try_recv().is_err(), "the other one has run to its end");
}

#[test]
fn a_closure_that_outlasts_the_drain_is_left_behind_and_counted() {
    let (open, gate) = channel::<()>();
    let gate = Arc::new(Mutex::new(Some(gate)));
    let (tell, heard) = channel();
    let site = Site::start(local(1).serve(async move |shard: Shard| {
        let (gate, tell) = (gate.lock().expect("no panic").take(), tell.clone());
        drop(shard.spawn_blocking(move || {
            tell.send("begun").expect("the test listens");
            let _ = gate.expect("there is one generation").recv();
            tell.send("ended")
        }));
        Ok(service_fn(crate::support::echo))
    }));
    hears(&heard, "begun");
    let running = site.into_running();
    let exit = settle(running.stop(Stop::Drain(Duration::from_millis(100)))).expect("it stops");
    assert_eq!((exit.abandoned, exit.abandoned_closures), (0, 1));
    drop(open);
    hears(&heard, "ended");
}
