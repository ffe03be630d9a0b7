//! Stopping: at once, by draining, by dropping; and servers beside each other and one after the other.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, mpsc};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use ringleader::{Body, ExecutorState, Request, Response, Stop, service_fn};

use crate::support::{BOUND, Client, Gate, Site, echo, eventually, expect_refusal, local, settle};

/// A server whose handlers wait at the gate, except for `/`.
fn gated(executors: usize) -> (Site, Gate) {
    let gate = Gate::shut();
    let server = {
        let gate = gate.clone();
        local(executors).serve(async move |_| {
            let gate = gate.clone();
            Ok(service_fn(async move |request: Request| {
                if request.uri().path() != "/" {
                    gate.passed().await;
                }
                Ok(Response::new(Body::from("answered")))
            }))
        })
    };
    (Site::start(server), gate)
}

fn in_flight(site: &Site) -> u64 {
    site.stats().executors.iter().map(|executor| executor.in_flight).sum()
}

#[test]
fn stop_now_closes_everything() {
    let (site, _gate) = gated(2);
    let mut idle = site.connect();
    assert_eq!(idle.get("/").status, 200);
    let mut waiting = site.connect();
    waiting.ask("/slow");
    eventually("the handler runs", || in_flight(&site) == 1);
    let address = site.address();
    let exit = settle(site.stop(Stop::Now)).expect("it stops");
    assert!(!exit.drained);
    assert_eq!(exit.abandoned, 0);
    idle.expect_end();
    waiting.expect_end();
    expect_refusal(address);
    assert!(!site.stats().ready);
}

#[test]
fn a_drain_answers_what_has_been_asked_and_closes_the_rest() {
    let (site, gate) = gated(2);
    let address = site.address();
    let mut idle: Vec<Client> = (0..8).map(|_| site.connect()).collect();
    idle.iter_mut().for_each(|client| assert_eq!(client.get("/").status, 200));
    let mut slow: Vec<Client> = (0..8).map(|_| site.connect()).collect();
    slow.iter_mut().for_each(|client| client.ask("/slow"));
    eventually("the handlers run", || in_flight(&site) == 8);
    let exit = site.stop(Stop::Drain(BOUND));
    idle.iter_mut().for_each(Client::expect_end);
    expect_refusal(address);
    assert!(!site.stats().ready);
    assert_eq!(in_flight(&site), 8, "they are still waited for");
    gate.open();
    for client in &mut slow {
        let answer = client.answer();
        assert_eq!(answer.text(), "answered");
        assert!(answer.closes(), "{}", answer.head);
        client.expect_end();
    }
    let exit = settle(exit).expect("it stops");
    assert!(exit.drained);
    assert_eq!(exit.abandoned, 0);
}

#[test]
fn a_connection_that_has_not_spoken_when_the_drain_begins_may_still_ask_one_thing() {
    let (site, gate) = gated(1);
    let mut idle = site.connect();
    assert_eq!(idle.get("/").status, 200);
    let mut slow = site.connect();
    slow.ask("/slow");
    let mut fresh = site.connect();
    eventually("all are accepted", || site.stats().executors[0].open == 3 && in_flight(&site) == 1);
    let exit = site.stop(Stop::Drain(BOUND));
    idle.expect_end();
    // The drain has begun.
    let answer = fresh.get("/");
    assert_eq!(answer.text(), "answered");
    assert!(answer.closes());
    fresh.expect_end();
    gate.open();
    assert_eq!(slow.answer().text(), "answered");
    assert!(settle(exit).expect("it stops").drained);
}

#[test]
fn a_connection_that_never_speaks_does_not_hold_up_a_drain() {
    let (site, _gate) = gated(1);
    let mut silent = site.connect();
    eventually("it is accepted", || site.stats().executors[0].open == 1);
    let exit = settle(site.stop(Stop::Drain(BOUND * 3))).expect("it stops");
    assert!(exit.drained);
    silent.expect_end();
}

#[test]
fn a_deadline_that_cuts_off_nobody_who_has_asked_is_a_drain() {
    let (site, _gate) = gated(1);
    let mut silent = site.connect();
    eventually("it is accepted", || site.stats().executors[0].open == 1);
    // Less than what a new connection may take to speak.
    let exit = settle(site.stop(Stop::Drain(Duration::from_millis(50)))).expect("it stops");
    assert!(exit.drained);
    silent.expect_end();
}

/// Clients of one executor that have had an answer and sent half a head since, each in one of two ways, and have been heard.
fn in_the_middle_of_a_head(site: &Site) -> Vec<Client> {
    let mut clients: Vec<Client> = (0..8).map(|_| site.connect()).collect();
    for (index, client) in clients.iter_mut().enumerate() {
        if index % 2 == 0 {
            assert_eq!(client.get("/").status, 200);
            client.send("GET / HTTP/1.1\r\nHo");
        } else {
            client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHo");
            assert_eq!(client.answer().status, 200);
        }
    }
    // What was sent before this reaches the executor before it.
    let mut last = site.connect();
    (0..3).for_each(|_| assert_eq!(last.get("/").status, 200));
    clients
}

#[test]
fn a_client_in_the_middle_of_a_head_is_answered_by_a_drain() {
    let (site, gate) = gated(1);
    let mut slow = site.connect();
    slow.ask("/slow");
    let mut idle = site.connect();
    assert_eq!(idle.get("/").status, 200);
    let mut clients = in_the_middle_of_a_head(&site);
    let exit = site.stop(Stop::Drain(BOUND));
    // The drain has begun.
    idle.expect_end();
    for client in &mut clients {
        client.send("st: a\r\n\r\n");
        let answer = client.answer();
        assert_eq!(answer.text(), "answered");
        assert!(answer.closes(), "{}", answer.head);
        client.expect_end();
    }
    gate.open();
    assert_eq!(slow.answer().text(), "answered");
    assert!(settle(exit).expect("it stops").drained);
}

#[test]
fn clients_in_the_kernels_queue_are_answered_by_the_drain() {
    let (blocked, has_blocked) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let site = {
        let (blocked, released) = (std::sync::Mutex::new(blocked), std::sync::Arc::new(released));
        Site::start(local(1).serve(async move |_| {
            let (blocked, released) = (blocked.lock().unwrap().clone(), std::sync::Arc::clone(&released));
            Ok(service_fn(async move |request: Request| {
                if request.uri().path() == "/block" {
                    blocked.send(())?;
                    // The whole executor stands still, so that nothing is accepted.
                    let _ = released.lock().unwrap().recv_timeout(BOUND);
                }
                Ok(Response::new(Body::from("answered")))
            }))
        }))
    };
    let mut blocking = site.connect();
    blocking.ask("/block");
    has_blocked.recv_timeout(BOUND).expect("the handler runs");
    let mut queued: Vec<Client> = (0..200).map(|_| site.connect()).collect();
    queued.iter_mut().for_each(|client| client.ask("/"));
    let exit = site.stop(Stop::Drain(BOUND));
    eventually("the drain is ordered", || site.stats().executors[0].state == ExecutorState::Draining);
    release.send(()).expect("the handler waits");
    for client in &mut queued {
        let answer = client.answer();
        assert_eq!(answer.text(), "answered");
        assert!(answer.closes());
    }
    assert_eq!(blocking.answer().text(), "answered");
    assert!(settle(exit).expect("it stops").drained);
}

#[test]
fn a_drain_ends_at_its_deadline() {
    let (site, _gate) = gated(2);
    let mut slow = site.connect();
    slow.ask("/slow");
    eventually("the handler runs", || in_flight(&site) == 1);
    let limit = Duration::from_millis(200);
    let start = Instant::now();
    let exit = settle(site.stop(Stop::Drain(limit))).expect("it stops");
    assert!(start.elapsed() >= limit);
    assert!(!exit.drained);
    slow.expect_end();
}

#[test]
fn stop_now_cuts_a_drain_short() {
    let (site, _gate) = gated(1);
    let mut slow = site.connect();
    slow.ask("/slow");
    eventually("the handler runs", || in_flight(&site) == 1);
    let draining = site.stop(Stop::Drain(Duration::from_secs(3600)));
    let at_once = site.stop(Stop::Now);
    let (first, second) = (settle(draining).expect("it stops"), settle(at_once).expect("it stops"));
    assert_eq!(first, second);
    assert!(!first.drained);
    slow.expect_end();
}

#[test]
fn stopping_what_has_stopped_gives_the_same_outcome() {
    let site = Site::serving(echo);
    let exit = settle(site.stop(Stop::Drain(BOUND))).expect("it stops");
    assert!(exit.drained, "there was nothing to wait for");
    assert_eq!(settle(site.stop(Stop::Now)).expect("it has stopped"), exit);
}

#[test]
fn dropping_the_owner_stops_the_server() {
    let (site, _gate) = gated(2);
    let address = site.address();
    let mut client = site.connect();
    assert_eq!(client.get("/").status, 200);
    let running = site.into_running();
    let handle = running.handle();
    drop(running);
    client.expect_end();
    settle(handle.stop(Stop::Now)).expect("it has stopped");
    expect_refusal(address);
}

#[test]
fn who_joins_waits_for_who_stops() {
    let running = Site::serving(echo).into_running();
    let handle = running.handle();
    let joined = running.join();
    assert_eq!(Client::connect(handle.local_addrs()[0]).get("/").status, 200);
    let stopped = settle(handle.stop(Stop::Drain(BOUND))).expect("it stops");
    assert_eq!(settle(joined).expect("it has stopped"), stopped);
}

#[test]
fn two_servers_live_in_one_process() {
    let serve = |text: &'static str| Site::serving(async move |_| Ok(Response::new(Body::from(text))));
    let (first, second) = (serve("first"), serve("second"));
    let mut to_second = second.connect();
    assert_eq!(first.connect().get("/").text(), "first");
    assert_eq!(to_second.get("/").text(), "second");
    drop(first);
    assert_eq!(to_second.get("/").text(), "second");
    assert_eq!(second.connect().get("/").text(), "second");
}

#[test]
fn a_server_may_be_started_and_stopped_on_tokio() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("tokio has what it needs");
    let exit = runtime.block_on(async {
        let running = local(2).serve(async |_| Ok(service_fn(echo))).start().await.expect("it starts");
        assert_eq!(Client::connect(running.local_addrs()[0]).get("/").status, 200);
        running.stop(Stop::Drain(BOUND)).await.expect("it stops")
    });
    assert!(exit.drained);
}

/// Panics where it is woken: on the supervisor's thread, if an order is awaited with it.
struct Bomb;

impl Wake for Bomb {
    fn wake(self: Arc<Self>) {
        panic!("a waker of the test panics");
    }
}

#[test]
fn a_supervisor_that_panics_ends_the_server_and_whoever_waits_is_told() {
    let server = local(2).name("fallen").serve(async |_| Ok(service_fn(echo)));
    let site = Site::start(server);
    let mut client = site.connect();
    assert_eq!(client.get("/").status, 200);
    let (address, handle) = (site.address(), (*site).clone());
    let bomb = Waker::from(Arc::new(Bomb));
    // One that is answered before it is polled needs no waker.
    while pin!(handle.scale(2)).poll(&mut Context::from_waker(&bomb)).is_ready() {}
    let error = settle(site.into_running().join()).expect_err("nobody looks after the executors any more");
    assert!(error.to_string().contains("the supervisor panicked"), "{error}");
    assert!(error.to_string().contains("a waker of the test panics"), "{error}");
    client.expect_end();
    expect_refusal(address);
    assert!(!handle.stats().ready);
    assert!(handle.stats().executors.iter().all(|executor| executor.state == ExecutorState::Idle));
    assert!(settle(handle.scale(1)).expect_err("it has ended").is_refused());
    // Nor is a thread of it left.
    let threads = std::fs::read_dir("/proc/self/task").expect("our own").flatten();
    let names = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok());
    let left: Vec<String> = names.filter(|name| name.starts_with("fallen-") && !name.contains("sup")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_waker_that_panics_at_the_servers_end_keeps_nobody_else_from_being_told() {
    let (site, _gate) = gated(1);
    let handle = (*site).clone();
    let bomb = Waker::from(Arc::new(Bomb));
    let first = handle.stop(Stop::Drain(BOUND));
    let mut first = pin!(first);
    let polled = first.as_mut().poll(&mut Context::from_waker(&bomb));
    assert!(settle(site.into_running().join()).expect("it stops").drained);
    // It has its outcome, too, unless it had taken it already.
    if polled.is_pending() {
        assert!(first.poll(&mut Context::from_waker(Waker::noop())).is_ready());
    }
}
