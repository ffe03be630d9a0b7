//! Limits of time and size.

use std::time::{Duration, Instant};

use std::task::Poll;

use ringleader::{
    Body, BoxError, Escalation, HangPolicy, HttpLimits, Overload, ReadinessPolicy, Request, Response, RestartPolicy,
    Scaling, Shard, Stop, service_fn,
};

use crate::support::{BOUND, Site, echo, eventually, local, settle};

/// The limit in tests of time: long enough for what is to be done within it on a machine that stalls for half a second.
const SHORT: Duration = Duration::from_secs(1);

fn limited(change: impl FnOnce(&mut HttpLimits)) -> Site {
    let mut limits = HttpLimits::default();
    change(&mut limits);
    Site::start(local(1).http_limits(limits).serve(async |_| Ok(service_fn(echo))))
}

fn timed_out(site: &Site) -> u64 {
    site.stats().executors[0].timed_out
}

#[test]
fn a_slow_head_is_cut() {
    let site = limited(|limits| limits.header_timeout = Some(SHORT));
    let start = Instant::now();
    let mut client = site.connect();
    client.send("GET / HTTP/1.1\r\nhost: te");
    client.expect_end();
    assert!(start.elapsed() >= SHORT);
    eventually("it is counted", || timed_out(&site) == 1);
}

#[test]
fn a_head_that_trickles_in_is_cut_all_the_same() {
    let site = limited(|limits| limits.header_timeout = Some(SHORT));
    let mut client = site.connect();
    let start = Instant::now();
    client.send("GET / HTTP/1.1\r\n");
    // Each of these comes in time; the whole does not.
    while client.try_send("x-more: y\r\n").is_ok() {
        assert!(start.elapsed() < BOUND, "every line buys more time");
        std::thread::sleep(Duration::from_millis(20));
    }
    eventually("it is counted", || timed_out(&site) == 1);
}

#[test]
fn the_header_timeout_begins_with_the_head() {
    let site = limited(|limits| limits.header_timeout = Some(SHORT));
    let mut client = site.connect();
    // Time must pass here: it is the subject.
    std::thread::sleep(SHORT * 3 / 2);
    assert_eq!(client.get("/").status, 200);
    std::thread::sleep(SHORT * 3 / 2);
    assert_eq!(client.get("/").status, 200);
    let start = Instant::now();
    client.send("GET / HTTP/1.1\r\n");
    client.expect_end();
    assert!(start.elapsed() >= SHORT);
}

#[test]
fn a_head_that_begins_in_the_segment_of_the_request_before_is_cut_like_others() {
    for hibernate_after in [None, Some(SHORT / 2), Some(BOUND)] {
        let site = limited(|limits| {
            limits.header_timeout = Some(SHORT);
            limits.hibernate_after = hibernate_after;
            // It would end the wait, too, and is not to.
            limits.idle_timeout = None;
        });
        let mut client = site.connect();
        client.send("GET / HTTP/1.1\r\nhost: test\r\n\r\nGET / HTTP/1.1\r\nho");
        let start = Instant::now();
        assert_eq!(client.answer().status, 200);
        client.expect_end();
        // The answer may have been under way for a moment.
        assert!(start.elapsed() >= SHORT / 2, "{hibernate_after:?}");
        eventually("it is counted", || timed_out(&site) == 1);
    }
}

#[test]
fn an_idle_connection_is_closed() {
    let site = limited(|limits| limits.idle_timeout = Some(SHORT));
    let mut client = site.connect();
    let start = Instant::now();
    assert_eq!(client.get("/").status, 200);
    client.expect_end();
    assert!(start.elapsed() >= SHORT);
    eventually("it is counted", || timed_out(&site) == 1);
}

#[test]
fn a_connection_that_never_speaks_is_closed() {
    let site = limited(|limits| limits.idle_timeout = Some(SHORT));
    let start = Instant::now();
    let mut client = site.connect();
    client.expect_end();
    assert!(start.elapsed() >= SHORT);
    eventually("it is counted", || timed_out(&site) == 1);
    eventually("it is gone", || site.stats().executors[0].open == 0);
}

#[test]
fn work_is_not_idleness() {
    let mut limits = HttpLimits::default();
    limits.idle_timeout = Some(SHORT);
    limits.header_timeout = Some(SHORT);
    let server = local(1).http_limits(limits).serve(async |shard| {
        Ok(service_fn(async move |_: Request| {
            shard.sleep(SHORT * 3).await;
            Ok(Response::new(Body::from("done")))
        }))
    });
    let site = Site::start(server);
    let mut client = site.connect();
    assert_eq!(client.get("/").text(), "done");
    client.expect_end();
}

#[test]
fn a_head_that_is_too_large_is_answered_with_431() {
    let site = limited(|limits| limits.header_bytes_max = 8192);
    let mut client = site.connect();
    let large = "x".repeat(9000);
    client.send(format!("GET / HTTP/1.1\r\nhost: test\r\nx-large: {large}\r\n\r\n"));
    assert_eq!(client.answer().status, 431);
    client.expect_end();
}

#[test]
fn a_head_below_the_limit_is_taken() {
    let site = limited(|limits| limits.header_bytes_max = 8192);
    let large = "x".repeat(8000);
    let mut client = site.connect();
    client.send(format!("GET / HTTP/1.1\r\nhost: test\r\nx-large: {large}\r\n\r\n"));
    assert_eq!(client.answer().status, 200);
}

#[test]
fn too_many_header_fields_are_answered_with_431() {
    let site = limited(|limits| limits.headers_max = 20);
    let fields = |count: usize| -> String { (0..count).map(|n| format!("x-{n}: {n}\r\n")).collect() };
    let mut client = site.connect();
    client.send(format!("GET / HTTP/1.1\r\nhost: test\r\n{}\r\n", fields(19)));
    assert_eq!(client.answer().status, 200);
    client.send(format!("GET / HTTP/1.1\r\nhost: test\r\n{}\r\n", fields(20)));
    assert_eq!(client.answer().status, 431);
    client.expect_end();
}

#[test]
fn a_body_that_says_it_is_too_long_is_answered_with_413() {
    let site = limited(|limits| limits.body_bytes_max = 100);
    let mut client = site.connect();
    client.send(format!("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\n{}", "x".repeat(100)));
    assert_eq!(client.answer().body.len(), 100);
    client.send(format!("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 101\r\n\r\n{}", "x".repeat(101)));
    let answer = client.answer();
    assert_eq!(answer.status, 413);
    assert!(answer.closes());
    client.finish_sending();
    client.expect_end();
}

#[test]
fn a_client_in_the_middle_of_sending_too_much_can_read_the_413() {
    let site = limited(|limits| limits.body_bytes_max = 64 * 1024);
    let mut client = site.connect();
    let length = 3 * 1024 * 1024;
    client.send(format!("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n"));
    // All of it, before a look at the answer.
    client.send(vec![b'x'; length]);
    assert_eq!(client.answer().status, 413);
    client.finish_sending();
    client.expect_end();
}

/// Reads the whole body first; its errors become the answer.
async fn collect(request: Request) -> Result<Response, BoxError> {
    let body = request.into_body().collect(1000).await?;
    Ok(Response::new(Body::from(body)))
}

#[test]
fn a_chunked_body_that_grows_too_long_is_answered_with_413() {
    let site = Site::serving(collect);
    let mut client = site.connect();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n3e8\r\n");
    client.send(format!("{}\r\n0\r\n\r\n", "x".repeat(1000)));
    assert_eq!(client.answer().body.len(), 1000);
    client.send("POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n");
    client.send(format!("{}\r\n", "x".repeat(1001)));
    let answer = client.answer();
    assert_eq!(answer.status, 413);
    assert!(answer.closes());
    assert!(answer.text().contains("1000 bytes"), "{}", answer.text());
    client.finish_sending();
    client.expect_end();
}

#[test]
fn the_servers_own_body_limit_holds_for_chunks_too() {
    let mut limits = HttpLimits::default();
    limits.body_bytes_max = 500;
    let site = Site::start(local(1).http_limits(limits).serve(async |_| Ok(service_fn(collect))));
    let mut client = site.connect();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n1f5\r\n");
    client.send(format!("{}\r\n", "x".repeat(501)));
    assert_eq!(client.answer().status, 413);
}

#[test]
fn a_body_that_stalls_is_answered_with_408() {
    let mut limits = HttpLimits::default();
    limits.body_timeout = Some(SHORT);
    let site = Site::start(local(1).http_limits(limits).serve(async |_| Ok(service_fn(collect))));
    let mut client = site.connect();
    let start = Instant::now();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 10\r\n\r\nhalf");
    let answer = client.answer();
    assert_eq!(answer.status, 408);
    assert!(answer.closes());
    assert!(start.elapsed() >= SHORT);
    client.finish_sending();
    client.expect_end();
}

#[test]
fn a_client_that_does_not_read_its_answer_is_reset() {
    const ENOUGH: usize = 64 << 20;
    let mut limits = HttpLimits::default();
    limits.send_timeout = Some(SHORT);
    // They would close it too, and are not to.
    limits.idle_timeout = None;
    let site = Site::start(local(1).http_limits(limits).serve(async |_| {
        Ok(service_fn(async |request: Request| {
            Ok(Response::new(match request.uri().path() {
                "/whole" => Body::from(vec![b'x'; ENOUGH]),
                "/pieces" => Body::new(Pieces),
                _ => Body::from("small"),
            }))
        }))
    }));
    for (count, path) in (1..).zip(["/whole", "/pieces"]) {
        let mut client = site.connect();
        client.ask(path);
        eventually("it is counted", || timed_out(&site) == count);
        assert_eq!(client.outlast().kind(), std::io::ErrorKind::ConnectionReset, "{path}");
    }
    assert_eq!(site.connect().get("/").text(), "small");
}

/// A body without an end.
struct Pieces;

impl http_body::Body for Pieces {
    type Data = bytes::Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<bytes::Bytes>, Self::Error>>> {
        std::task::Poll::Ready(Some(Ok(http_body::Frame::data(bytes::Bytes::from_static(&[b'x'; 4096])))))
    }
}

#[test]
fn a_malformed_chunk_is_answered_with_400() {
    let site = Site::serving(collect);
    let mut client = site.connect();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\nnot hex\r\n");
    assert_eq!(client.answer().status, 400);
    client.finish_sending();
    client.expect_end();
}

#[test]
fn connections_above_the_limit_wait_for_their_turn() {
    let site = Site::start(local(1).connections_max(2).serve(async |_| Ok(service_fn(echo))));
    assert_eq!(site.connections_max(), 2);
    let mut first = site.connect();
    let mut second = site.connect();
    assert_eq!((first.get("/").status, second.get("/").status), (200, 200));
    let mut third = site.connect();
    third.ask("/");
    // The others are served all the while.
    assert_eq!(first.get("/").status, 200);
    assert_eq!(site.stats().executors[0].open, 2);
    drop(second);
    assert_eq!(third.answer().status, 200);
}

/// Whatever adds these to the time of day would overflow.
#[test]
fn a_time_beyond_all_reason_is_no_limit() {
    const NEVER: Duration = Duration::MAX;
    let mut limits = HttpLimits::default();
    (limits.header_timeout, limits.idle_timeout) = (Some(NEVER), Some(NEVER));
    (limits.body_timeout, limits.hibernate_after) = (Some(NEVER), Some(NEVER));
    limits.send_timeout = Some(NEVER);
    let (mut overload, mut scaling, mut restart) = (Overload::default(), Scaling::default(), RestartPolicy::default());
    overload.delay_max = Some(NEVER);
    scaling.period = NEVER;
    (restart.backoff_base, restart.backoff_max) = (NEVER, NEVER);
    (restart.healthy_after, restart.quarantine_window) = (NEVER, NEVER);
    let builder = local(1).executors(1..=2).http_limits(limits).overload(overload).scaling(scaling).restart(restart);
    let builder = builder.start_timeout(NEVER).drain_timeout(NEVER).upgrade_timeout(NEVER).stall_limit(NEVER);
    let mut readiness = ReadinessPolicy::default();
    readiness.stalled_after = NEVER;
    let builder = builder.stop_grace(NEVER).standstill_limit(NEVER).readiness(readiness);
    let builder = builder.hang(HangPolicy::Replace, Some(NEVER)).escalation(Escalation::after(3, NEVER));
    let site = Site::start(builder.serve(async |shard: Shard| {
        Ok(service_fn(async move |request: Request| {
            let mut sleep = std::pin::pin!(shard.sleep(NEVER));
            assert!(std::future::poll_fn(|context| Poll::Ready(sleep.as_mut().poll(context))).await.is_pending());
            let body = shard.timeout(NEVER, request.into_body().collect(1024)).await??;
            Ok(Response::new(Body::from(body)))
        }))
    }));
    let mut client = site.connect();
    for _ in 0..3 {
        client.send("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\n");
        client.send("slow\n");
        assert_eq!(client.answer().text(), "slow\n");
    }
    assert_eq!(site.stats().executors[0].generation, 1, "its executor has not fallen");
    drop(client);
    assert!(settle(site.stop(Stop::Drain(NEVER))).expect("it stops").drained);
}
