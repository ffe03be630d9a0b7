//! Clients that go away before they are answered, and those that only look like it: a FIN may be from either.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use ringleader::{Body, Builder, HttpLimits, Request, Response, Shard, Sleep, service_fn};

use crate::support::{BOUND, Client, Gate, Site, eventually, local};

/// Tells when it is dropped.
struct Told(mpsc::Sender<()>);

impl Drop for Told {
    fn drop(&mut self) {
        // Nobody may listen any more.
        let _ = self.0.send(());
    }
}

/// With this for clients that have ended their direction.
fn local_with(half_close_timeout: Option<Duration>) -> Builder {
    let mut limits = HttpLimits::default();
    limits.half_close_timeout = half_close_timeout;
    local(1).http_limits(limits)
}

/// Requests wait at the gate, but those for `/at-once`; it tells of each future of a handler that is dropped.
fn gated(builder: Builder, gate: &Gate) -> (Site, mpsc::Receiver<()>) {
    let (teller, dropped) = mpsc::channel();
    let gate = gate.clone();
    let site = Site::start(builder.serve(async move |_| {
        let (teller, gate) = (teller.clone(), gate.clone());
        Ok(service_fn(async move |request: Request| {
            let _told = Told(teller.clone());
            if request.uri().path() != "/at-once" {
                gate.passed().await;
            }
            Ok(Response::new(Body::from("answered")))
        }))
    }));
    (site, dropped)
}

fn expect(dropped: &mpsc::Receiver<()>) {
    dropped.recv_timeout(BOUND).expect("the handler's future is dropped");
}

fn wait_for_a_handler(site: &Site) {
    eventually("the handler runs", || site.stats().executors[0].in_flight == 1);
}

/// Asks, and waits until the handler waits.
fn ask(site: &Site) -> Client {
    let mut client = site.connect();
    client.ask("/");
    wait_for_a_handler(site);
    client
}

#[test]
fn a_client_that_closes_has_its_handler_dropped() {
    for timeout in [Duration::ZERO, Duration::from_millis(10), Duration::from_secs(1)] {
        let (site, dropped) = gated(local_with(Some(timeout)), &Gate::shut());
        drop(ask(&site));
        expect(&dropped);
        eventually("nothing of it is left", || {
            let executor = &site.stats().executors[0];
            (executor.open, executor.in_flight) == (0, 0)
        });
        assert_eq!(site.stats().executors[0].timed_out, 0, "it is not the client that was slow");
    }
}

#[test]
fn a_client_that_resets_has_its_handler_dropped_at_once() {
    let (site, dropped) = gated(local_with(None), &Gate::shut());
    ask(&site).reset();
    expect(&dropped);
    eventually("it is gone", || site.stats().executors[0].open == 0);
}

#[test]
fn a_client_that_has_asked_for_more_and_closes_has_its_handler_dropped() {
    let (site, dropped) = gated(local_with(Some(Duration::ZERO)), &Gate::shut());
    let mut client = ask(&site);
    client.ask("/at-once");
    drop(client);
    expect(&dropped);
    eventually("it is gone", || site.stats().executors[0].open == 0);
}

#[test]
fn the_place_of_a_client_that_has_gone_is_free_again() {
    let gate = Gate::shut();
    let (site, _dropped) = gated(local_with(Some(Duration::ZERO)).connections_max(1), &gate);
    for _ in 0..3 {
        drop(ask(&site));
        eventually("it is gone", || site.stats().executors[0].open == 0);
        assert_eq!(site.connect().get("/at-once").text(), "answered");
        eventually("the next one is gone, too", || site.stats().executors[0].open == 0);
    }
}

#[test]
fn a_client_that_has_ended_its_half_is_waited_for_when_that_is_asked_for() {
    let gate = Gate::shut();
    let (site, dropped) = gated(local_with(None), &gate);
    let mut client = ask(&site);
    client.finish_sending();
    // What is to be seen is that nothing happens. Without the option it would within a second.
    assert_eq!(dropped.recv_timeout(Duration::from_millis(1500)), Err(mpsc::RecvTimeoutError::Timeout));
    gate.open();
    assert_eq!(client.answer().text(), "answered");
    client.expect_end();
}

#[test]
fn a_client_that_has_ended_its_half_gets_what_is_answered_at_once() {
    let (site, _dropped) = gated(local_with(Some(Duration::ZERO)), &Gate::shut());
    for _ in 0..20 {
        let mut client = site.connect();
        client.ask("/at-once");
        client.finish_sending();
        assert_eq!(client.answer().text(), "answered");
        client.expect_end();
    }
}

#[test]
fn pipelined_requests_before_the_end_are_all_answered() {
    let (site, _dropped) = gated(local_with(Some(Duration::ZERO)), &Gate::shut());
    let mut client = site.connect();
    client.send("GET /at-once HTTP/1.1\r\nhost: test\r\n\r\n".repeat(50));
    client.finish_sending();
    for _ in 0..50 {
        assert_eq!(client.answer().text(), "answered");
    }
    client.expect_end();
}

/// A body of so many bytes, one each tenth of a second; after them it never ends.
struct Drips {
    left: u32,
    shard: Shard,
    wait: Sleep,
    _told: Told,
}

impl Drips {
    const PERIOD: Duration = Duration::from_millis(100);

    fn new(left: u32, shard: &Shard, teller: &mpsc::Sender<()>) -> Self {
        Self { left, shard: shard.clone(), wait: shard.sleep(Self::PERIOD), _told: Told(teller.clone()) }
    }
}

impl http_body::Body for Drips {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Pending;
        }
        ready!(Pin::new(&mut self.wait).poll(context));
        self.left -= 1;
        self.wait = self.shard.sleep(Self::PERIOD);
        Poll::Ready(Some(Ok(http_body::Frame::data(Bytes::from_static(b".")))))
    }
}

#[test]
fn an_answer_on_its_way_goes_on_for_as_long_as_it_moves() {
    const BYTES: u32 = 12;
    let (teller, dropped) = mpsc::channel();
    let site = Site::start(local_with(Some(Drips::PERIOD * 5)).serve(async move |shard: Shard| {
        let teller = teller.clone();
        Ok(service_fn(async move |_| Ok(Response::new(Drips::new(BYTES, &shard, &teller)))))
    }));
    let mut client = site.connect();
    client.ask("/");
    client.finish_sending();
    assert_eq!(client.head().status, 200);
    for _ in 0..BYTES {
        assert_eq!(client.chunk().expect("it goes on").as_deref(), Some(&b"."[..]));
    }
    // It stands still now.
    client.expect_end();
    expect(&dropped);
}
