//! Requests are refused when there are too many at once, or when turns are late for long; off unless asked for.

use std::thread;
use std::time::Duration;

use ringleader::{Body, Overload, Request, Response, Shard, service_fn};

use crate::support::{Client, Gate, Site, eventually, local, spawn};

fn limits(change: impl FnOnce(&mut Overload)) -> Overload {
    let mut limits = Overload::default();
    change(&mut limits);
    limits
}

fn refused(site: &Site) -> u64 {
    site.stats().executors.iter().map(|executor| executor.overloaded).sum()
}

/// One executor that answers two requests at once, each when the gate is open.
fn gated(gate: &Gate) -> Site {
    let gate = gate.clone();
    let limits = limits(|limits| {
        limits.in_flight_max = Some(2);
        limits.retry_after = Duration::from_millis(6500);
    });
    Site::start(local(1).overload(limits).serve(async move |_: Shard| {
        let gate = gate.clone();
        Ok(service_fn(async move |_: Request| {
            gate.passed().await;
            Ok(Response::new(Body::from("fine")))
        }))
    }))
}

fn two_waiting(site: &Site) -> [Client; 2] {
    let mut waiting = [site.connect(), site.connect()];
    waiting.iter_mut().for_each(|client| client.ask("/"));
    eventually("both are in flight", || site.stats().executors[0].in_flight == 2);
    waiting
}

#[test]
fn requests_above_the_number_in_flight_are_refused_and_their_connection_stays() {
    let gate = Gate::shut();
    let site = gated(&gate);
    let mut waiting = two_waiting(&site);
    let mut client = site.connect();
    for count in 1..=3 {
        let answer = client.get("/");
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("7")), "{}", answer.head);
        assert!(!answer.closes());
        assert_eq!(refused(&site), count);
    }
    gate.open();
    waiting.iter_mut().for_each(|client| assert_eq!(client.answer().text(), "fine"));
    eventually("nothing is in flight", || site.stats().executors[0].in_flight == 0);
    assert_eq!(client.get("/").text(), "fine");
    assert_eq!(refused(&site), 3);
}

#[test]
fn a_refusal_does_not_wait_for_the_body() {
    let gate = Gate::shut();
    let site = gated(&gate);
    let _waiting = two_waiting(&site);
    let mut client = site.connect();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 1000000\r\n\r\nthe begin");
    let answer = client.answer();
    assert_eq!(answer.status, 503);
    assert!(answer.closes());
    client.finish_sending();
    client.expect_end();
}

#[test]
fn without_limits_nothing_is_refused() {
    let site = Site::serving(async |_: Request| Ok(Response::new(Body::from("fine"))));
    assert_eq!(site.connect().get("/").text(), "fine");
    assert_eq!(refused(&site), 0);
}

/// Asks for more than can be done in time, all at once: how many are served and how many refused.
fn pipeline(client: &mut Client, path: &str) -> (u64, u64) {
    const COUNT: usize = 100;
    client.send(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n").repeat(COUNT));
    let statuses: Vec<u16> = (0..COUNT).map(|_| client.answer().status).collect();
    let count = |status| statuses.iter().filter(|answered| **answered == status).count() as u64;
    assert_eq!(count(200) + count(503), COUNT as u64, "{statuses:?}");
    (count(200), count(503))
}

#[test]
fn an_executor_that_is_late_for_long_refuses_some_and_serves_the_rest() {
    let limits = limits(|limits| limits.delay_max = Some(Duration::from_millis(15)));
    let site = Site::start(local(1).overload(limits).serve(async |_: Shard| {
        Ok(service_fn(async |_: Request| {
            // As a handler does that computes, but it leaves the CPU to other tests.
            thread::sleep(Duration::from_millis(10));
            Ok(Response::new(Body::from("fine")))
        }))
    }));
    let (served, turned_away) = pipeline(&mut site.connect(), "/");
    assert_eq!(refused(&site), turned_away);
    // What came first is served, and something in each turn.
    assert!(served >= 10 && turned_away > 0, "{served} served, {turned_away} refused");
    // Whoever is alone is first in its turn, and the first is never refused.
    assert_eq!(site.connect().get("/").text(), "fine");
}

#[test]
fn the_command_refuses_what_it_is_told_to() {
    let server = spawn(&[], &["--executors", "1", "--chaos", "--max-in-flight", "1"]);
    let mut client = server.connect();
    let mut sleeping = Vec::new();
    eventually("the limit is reached", || {
        let mut another = server.connect();
        another.ask("/chaos/sleep?ms=200");
        sleeping.push(another);
        client.get("/").status == 503
    });
    eventually("there is room again", || client.get("/").status == 200);
}

#[test]
fn the_command_refuses_when_it_spins() {
    let server = spawn(&[], &["--executors", "1", "--chaos", "--max-delay", "15"]);
    let (served, refused) = pipeline(&mut server.connect(), "/chaos/spin?ms=10");
    assert!(served > 0 && refused > 0, "{served} served, {refused} refused");
}
