//! Panics: contained, they cost one connection; escaped, one executor's.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use ringleader::{Body, BoxError, ExecutorStats, Request, Response, RestartPolicy, Server, Shard, service_fn};

use crate::support::{Client, Site, eventually, local};

/// Panics when it is dropped.
struct PanicsOnDrop;

impl Drop for PanicsOnDrop {
    fn drop(&mut self) {
        panic!("a drop of the test's panics");
    }
}

fn only(site: &Site) -> ExecutorStats {
    site.stats().executors.remove(0)
}

fn expect_500(client: &mut Client) {
    let answer = client.answer();
    assert_eq!(answer.status, 500);
    assert!(answer.closes());
    client.expect_end();
}

#[test]
fn a_handlers_panic_costs_its_connection_only() {
    let site = Site::serving(async |request: Request| {
        assert!(request.uri().path() != "/panic", "a handler of the test's panics");
        Ok(Response::new(Body::from("fine")))
    });
    let mut sibling = site.connect();
    assert_eq!(sibling.get("/").text(), "fine");
    for count in 1..=3 {
        let mut client = site.connect();
        client.ask("/panic");
        expect_500(&mut client);
        assert_eq!(sibling.get("/").text(), "fine");
        assert_eq!(only(&site).panics_contained, count);
    }
    assert_eq!(only(&site).generation, 1);
    assert!(site.stats().ready);
}

#[test]
fn a_panic_after_an_await_is_contained_too() {
    let site = Site::start(local(1).serve(async |shard: Shard| {
        Ok(service_fn(async move |_: Request| -> Result<Response, BoxError> {
            shard.sleep(Duration::from_millis(1)).await;
            panic!("a handler of the test's panics");
        }))
    }));
    let mut client = site.connect();
    client.ask("/");
    expect_500(&mut client);
    eventually("nothing is in flight", || only(&site).in_flight == 0);
}

#[test]
fn a_panic_before_a_service_returns_its_future_is_contained_too() {
    let site = Site::start(local(1).serve(async |_: Shard| {
        Ok(service_fn(|request: Request| {
            assert!(request.uri().path() != "/panic", "a handler of the test's panics");
            async { Ok(Response::new(Body::from("fine"))) }
        }))
    }));
    let mut client = site.connect();
    client.ask("/panic");
    expect_500(&mut client);
    assert_eq!(site.connect().get("/").text(), "fine");
    assert_eq!((only(&site).panics_contained, only(&site).generation), (1, 1));
}

#[test]
fn pipelined_requests_before_a_panic_are_answered() {
    let site = Site::serving(async |request: Request| {
        assert!(request.uri().path() != "/panic", "a handler of the test's panics");
        Ok(Response::new(Body::from("fine")))
    });
    let mut client = site.connect();
    let get = |path| format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n");
    client.send([get("/1"), get("/2"), get("/panic"), get("/4")].concat());
    assert_eq!((client.answer().text(), client.answer().text()), ("fine", "fine"));
    let answer = client.answer();
    assert_eq!(answer.status, 500);
    client.expect_end();
}

/// One piece, then a panic.
struct PanickingBody {
    begun: bool,
}

impl http_body::Body for PanickingBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        assert!(!std::mem::replace(&mut self.begun, true), "a body of the test's panics");
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"begun")))))
    }
}

#[test]
fn a_panic_in_an_answers_body_breaks_the_connection_off() {
    let site = Site::serving(async |request: Request| {
        Ok(Response::new(match request.uri().path() {
            "/panic" => Body::new(PanickingBody { begun: false }),
            _ => Body::from("fine"),
        }))
    });
    let mut sibling = site.connect();
    assert_eq!(sibling.get("/").text(), "fine");
    let mut client = site.connect();
    client.ask("/panic");
    assert!(client.try_answer().is_err(), "an answer that was broken off must not look complete");
    assert_eq!(sibling.get("/").text(), "fine");
    assert_eq!(only(&site).panics_contained, 1);
}

#[test]
fn a_panic_in_the_drop_of_a_finished_handler_is_contained() {
    let site = Site::serving(async |request: Request| {
        // Moved into the future, dropped with it.
        let _held = (request.uri().path() == "/panic").then(|| PanicsOnDrop);
        Ok(Response::new(Body::from("fine")))
    });
    let mut sibling = site.connect();
    assert_eq!(sibling.get("/").text(), "fine");
    let mut client = site.connect();
    client.ask("/panic");
    expect_500(&mut client);
    assert_eq!(sibling.get("/").text(), "fine");
}

/// Handlers that hang, and panic when they are dropped; except for `/`, and for `/escape`, which fells the executor.
fn hanging() -> Server {
    local(1).restart(tireless()).serve(async |shard: Shard| {
        Ok(service_fn(async move |request: Request| {
            match request.uri().path() {
                "/" => {}
                "/escape" => shard.background("test", async { panic!("a background task of the test's panics") }),
                _ => {
                    let _held = PanicsOnDrop;
                    std::future::pending::<()>().await;
                }
            }
            Ok(Response::new(Body::from(shard.generation().to_string())))
        }))
    })
}

/// So many clients whose handlers hang.
fn hung(site: &Site, count: u64) -> Vec<Client> {
    let mut clients: Vec<Client> = (0..count).map(|_| site.connect()).collect();
    clients.iter_mut().for_each(|client| client.ask("/hang"));
    eventually("the handlers run", || only(site).in_flight == count);
    clients
}

#[test]
fn an_executor_whose_handlers_panic_in_their_drops_can_be_stopped() {
    let site = Site::start(hanging());
    let mut clients = hung(&site, 5);
    drop(site);
    clients.iter_mut().for_each(Client::expect_end);
}

#[test]
fn an_executor_whose_handlers_panic_in_their_drops_can_be_restarted() {
    let site = Site::start(hanging());
    let mut clients = hung(&site, 5);
    site.connect().ask("/escape");
    clients.iter_mut().for_each(Client::expect_end);
    assert_eq!(site.connect().get("/").text(), "2");
}

/// Restarts without delay, and for ever.
fn tireless() -> RestartPolicy {
    let mut policy = RestartPolicy::default();
    policy.backoff_base = Duration::from_millis(1);
    policy.backoff_max = Duration::from_millis(2);
    policy.quarantine_after = 0;
    policy
}

/// Executors that answer with slot and generation, and that `/escape` fells.
fn fragile(executors: usize) -> Server {
    local(executors).restart(tireless()).serve(async |shard: Shard| {
        Ok(service_fn(async move |request: Request| {
            match request.uri().path() {
                "/escape" => shard.background("test", async { panic!("a background task of the test's panics") }),
                "/fail" => shard.background("test", async { Err("a background task of the test's fails".into()) }),
                "/end" => shard.background("test", async { Ok(()) }),
                "/hang" => std::future::pending().await,
                _ => {}
            }
            Ok(Response::new(Body::from(format!("{} {}", shard.id(), shard.generation()))))
        }))
    })
}

#[test]
fn an_escaped_panic_ends_every_connection_of_its_executor_and_the_next_generation_serves() {
    for (path, generation) in [("/escape", 2), ("/fail", 2)] {
        let site = Site::start(fragile(1));
        let mut idle = site.connect();
        assert_eq!(idle.get("/").text(), "0 1");
        let mut silent = site.connect();
        let mut waiting = site.connect();
        waiting.ask("/hang");
        eventually("all are known", || only(&site).open == 3 && only(&site).in_flight == 1);
        site.connect().ask(path);
        idle.expect_end();
        silent.expect_end();
        waiting.expect_end();
        assert_eq!(site.connect().get("/").text(), format!("0 {generation}"));
        eventually("the counters of the dead are gone", || only(&site).open <= 1 && only(&site).in_flight == 0);
    }
}

#[test]
fn a_background_task_may_end_well() {
    let site = Site::start(fragile(1));
    let mut client = site.connect();
    assert_eq!(client.get("/end").text(), "0 1");
    assert_eq!(client.get("/").text(), "0 1");
}

#[test]
fn an_escaped_panic_costs_other_executors_nothing() {
    let site = Site::start(fragile(4));
    let mut clients: Vec<(Client, String)> = (0..24)
        .map(|_| {
            let mut client = site.connect();
            let home = client.get("/").text().to_owned();
            (client, home)
        })
        .collect();
    let (mut villain, felled) = clients.pop().expect("there are clients");
    villain.ask("/escape");
    eventually("the executor is replaced", || site.stats().executors.iter().any(|executor| executor.generation == 2));
    for (client, home) in &mut clients {
        if *home == felled {
            client.expect_end();
        } else {
            assert_eq!(client.get("/").text(), home);
        }
    }
}

#[test]
fn clients_in_the_kernels_queue_are_served_by_the_next_generation() {
    // The second generation's start-up waits for this.
    let go = Arc::new((Mutex::new(false), Condvar::new()));
    let failing = Arc::new(AtomicBool::new(false));
    let server = {
        let (go, failing) = (Arc::clone(&go), Arc::clone(&failing));
        local(1).restart(tireless()).serve(async move |shard: Shard| {
            if shard.generation() == 2 {
                failing.store(true, Ordering::Relaxed);
                // The whole thread stands still, as with a start-up that computes.
                let went = go.1.wait_while(go.0.lock().unwrap(), |go| !*go).unwrap();
                drop(went);
            }
            Ok(service_fn(async move |request: Request| {
                if request.uri().path() == "/escape" {
                    shard.background("test", async { panic!("a background task of the test's panics") });
                }
                Ok(Response::new(Body::from(shard.generation().to_string())))
            }))
        })
    };
    let site = Site::start(server);
    site.connect().ask("/escape");
    eventually("the second generation starts", || failing.load(Ordering::Relaxed));
    let mut queued: Vec<Client> = (0..50).map(|_| site.connect()).collect();
    queued.iter_mut().for_each(|client| client.ask("/"));
    *go.0.lock().unwrap() = true;
    go.1.notify_all();
    for client in &mut queued {
        assert_eq!(client.answer().text(), "2");
    }
}

#[test]
fn an_executor_survives_a_hundred_escapes_in_a_row() {
    let site = Site::start(fragile(1));
    for generation in 1..=100 {
        let mut client = site.connect();
        assert_eq!(client.get("/").text(), format!("0 {generation}"));
        client.ask("/escape");
        eventually("the next generation lives", || only(&site).generation > generation);
    }
}
