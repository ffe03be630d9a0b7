//! What happens on an executor and on a connection that have had nothing to do for a while.

use std::time::{Duration, Instant};

use ringleader::{Body, HttpLimits, Request, Response, Shard, service_fn};

use crate::support::{Site, eventually, local};

/// Below the 500 ms after which an executor looks around by itself, far above what a wake takes.
const WOKEN: Duration = Duration::from_millis(400);
/// A machine that stalls makes some of these late; a wake that is lost makes all of them late.
const TRIES: usize = 10;

#[test]
fn a_task_that_glommio_wakes_is_polled_though_the_executor_sleeps() {
    let server = local(1).serve(async |_: Shard| {
        Ok(service_fn(async |_: Request| {
            // Several in a row: the executor has long been asleep when the later ones end.
            for _ in 0..4 {
                glommio::timer::sleep(Duration::from_millis(30)).await;
            }
            Ok(Response::new(Body::from("woken")))
        }))
    });
    let site = Site::start(server);
    let mut client = site.connect();
    let mut took = || {
        let start = Instant::now();
        assert_eq!(client.get("/").body, b"woken");
        start.elapsed()
    };
    let in_time = (0..TRIES).any(|_| took() < Duration::from_millis(120) + WOKEN);
    assert!(in_time, "no wake of {TRIES} came before the executor looked around by itself");
}

/// A server whose connections hibernate at once.
fn hibernating() -> Site {
    let mut limits = HttpLimits::default();
    limits.hibernate_after = Some(Duration::from_millis(20));
    Site::start(local(1).http_limits(limits).serve(async |_: Shard| Ok(service_fn(crate::support::echo))))
}

#[test]
fn a_connection_that_hibernates_answers_its_next_request() {
    let site = hibernating();
    let mut client = site.connect();
    for round in 0..5 {
        let body = format!("round {round}");
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
        assert_eq!(client.answer().body, body.as_bytes());
        // No event tells of hibernation: this is more than its time, and the next round works either way.
        std::thread::sleep(Duration::from_millis(60));
    }
    drop(client);
    eventually("the connection is gone", || site.stats().executors[0].open == 0);
}

#[test]
fn a_head_that_pauses_after_its_first_bytes_is_not_lost_to_hibernation() {
    let site = hibernating();
    let mut client = site.connect();
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT");
    assert_eq!(client.answer().status, 200);
    std::thread::sleep(Duration::from_millis(100));
    client.send("TP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(client.answer().status, 200);
}
