//! HTTP/1.1 as it is on the wire.

use ringleader::{Body, BoxError, HttpLimits, Method, Request, Response, service_fn};

use crate::support::{Site, echo, eventually, local, pattern};

/// Answers with the method and the path.
async fn repeat(request: Request) -> Result<Response, BoxError> {
    Ok(Response::new(Body::from(format!("{} {}", request.method(), request.uri().path()))))
}

#[test]
fn a_connection_is_kept_alive() {
    let site = Site::serving(repeat);
    let mut client = site.connect();
    for path in ["/one", "/two", "/three"] {
        let answer = client.get(path);
        assert_eq!((answer.status, answer.text()), (200, format!("GET {path}").as_str()));
        assert!(!answer.closes());
    }
    let stats = &site.stats().executors[0];
    assert_eq!((stats.accepted, stats.open, stats.requests), (1, 1, 3));
}

#[test]
fn fifty_pipelined_requests_are_answered_in_order() {
    let site = Site::serving(repeat);
    let mut client = site.connect();
    let requests: String = (0..50).map(|n| format!("GET /{n} HTTP/1.1\r\nhost: test\r\n\r\n")).collect();
    client.send(requests);
    for n in 0..50 {
        assert_eq!(client.answer().text(), format!("GET /{n}"));
    }
}

#[test]
fn pipelined_bodies_stay_with_their_requests() {
    let site = Site::serving(echo);
    let mut client = site.connect();
    let requests: String = (0..20)
        .map(|n| {
            let body = n.to_string().repeat(n);
            format!("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        })
        .collect();
    client.send(requests);
    for n in 0..20 {
        assert_eq!(client.answer().text(), n.to_string().repeat(n));
    }
}

#[test]
fn a_request_may_come_byte_by_byte() {
    let site = Site::serving(echo);
    let mut client = site.connect();
    for byte in b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\nhello" {
        client.send([*byte]);
    }
    assert_eq!(client.answer().text(), "hello");
}

#[test]
fn chunked_bodies_go_both_ways() {
    let site = Site::serving(echo);
    let mut client = site.connect();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n");
    let mut sent = Vec::new();
    for length in [1, 10, 1000, 70_000] {
        let piece = pattern(length);
        client.send(format!("{length:x}\r\n"));
        client.send(&piece);
        client.send("\r\n");
        sent.extend(piece);
    }
    client.send("0\r\n\r\n");
    let answer = client.answer();
    assert_eq!(answer.header("transfer-encoding"), Some("chunked"));
    assert!(answer.body == sent, "the body comes back as it was sent");
    assert_eq!(client.get("/").status, 200);
}

#[test]
fn the_answer_may_begin_before_the_body_has_ended() {
    let site = Site::serving(echo);
    let mut client = site.connect();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n");
    client.send("5\r\nfirst\r\n");
    assert_eq!(client.head().status, 200);
    assert_eq!(client.chunk().unwrap().as_deref(), Some(&b"first"[..]));
    client.send("6\r\nsecond\r\n0\r\n\r\n");
    assert_eq!(client.chunk().unwrap().as_deref(), Some(&b"second"[..]));
    assert_eq!(client.chunk().unwrap(), None);
}

#[test]
fn a_client_that_expects_100_is_told_to_continue() {
    let site = Site::serving(async |request: Request| {
        let body = request.into_body().collect(100).await?;
        Ok(Response::new(Body::from(body)))
    });
    let mut client = site.connect();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n");
    assert_eq!(client.head().status, 100);
    client.send("hello");
    let answer = client.answer();
    assert_eq!((answer.status, answer.text()), (200, "hello"));
}

#[test]
fn a_client_that_expects_100_is_refused_before_it_sends_too_much() {
    let site = Site::serving(echo);
    let mut client = site.connect();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 9999999\r\nexpect: 100-continue\r\n\r\n");
    let answer = client.answer();
    assert_eq!(answer.status, 413, "and no 100 before it");
    assert!(answer.closes());
    client.finish_sending();
    client.expect_end();
}

#[test]
fn head_has_the_length_and_no_body() {
    let site = Site::serving(async |_| Ok(Response::new(Body::from("Hello, World!"))));
    let mut client = site.connect();
    client.send("HEAD / HTTP/1.1\r\nhost: test\r\n\r\n");
    let head = client.head();
    assert_eq!((head.status, head.header("content-length")), (200, Some("13")));
    assert_eq!(client.get("/").text(), "Hello, World!");
}

#[test]
fn a_connection_that_ends_in_error_is_seen_to_end_before_the_server_has_lingered() {
    let mut limits = HttpLimits::default();
    limits.linger_timeout = None;
    let site = Site::start(local(1).http_limits(limits).serve(async |_| Ok(service_fn(echo))));
    let mut client = site.connect();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n");
    client.head();
    assert_eq!(client.chunk().expect("it goes on").as_deref(), Some(&b"first"[..]));
    client.send("zz\r\n");
    client.expect_end();
    assert_eq!(site.stats().executors[0].open, 1, "it throws away what still comes");
    client.send("more");
    client.finish_sending();
    eventually("it is gone", || site.stats().executors[0].open == 0);
}

#[test]
fn http_1_0_closes_after_the_answer() {
    let site = Site::serving(repeat);
    let mut client = site.connect();
    client.send("GET /old HTTP/1.0\r\n\r\n");
    assert_eq!(client.answer().text(), "GET /old");
    client.expect_end();
}

#[test]
fn http_1_0_keeps_alive_when_asked() {
    let site = Site::serving(repeat);
    let mut client = site.connect();
    for path in ["/one", "/two"] {
        client.send(format!("GET {path} HTTP/1.0\r\nconnection: keep-alive\r\n\r\n"));
        let answer = client.answer();
        assert_eq!(answer.header("connection"), Some("keep-alive"));
        assert_eq!(answer.text(), format!("GET {path}"));
    }
}

#[test]
fn connection_close_closes_after_the_answer() {
    let site = Site::serving(repeat);
    let mut client = site.connect();
    client.send("GET /last HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    let answer = client.answer();
    assert_eq!(answer.text(), "GET /last");
    assert!(answer.closes());
    client.expect_end();
}

#[test]
fn what_is_not_http_is_answered_with_400() {
    let site = Site::serving(repeat);
    for nonsense in
        ["NONSENSE\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "GET / HTTP/1.1\r\nno colon\r\n\r\n", "\0\0\0\0\r\n\r\n"]
    {
        let mut client = site.connect();
        client.send(nonsense);
        assert_eq!(client.answer().status, 400, "{nonsense:?}");
        client.expect_end();
    }
    assert_eq!(site.connect().get("/").status, 200);
}

#[test]
fn a_request_knows_its_connection() {
    let site = Site::serving(async |request: Request| {
        let connection = request.body().connection().expect("it came on one").clone();
        let peer = connection.peer_addr().expect("TCP has addresses");
        Ok(Response::new(Body::from(format!("{} {}", peer.ip(), connection.listener()))))
    });
    let expected = format!("127.0.0.1 {}", site.address());
    assert_eq!(site.connect().get("/").text(), expected);
}

#[test]
fn the_service_chooses_the_status_of_its_errors() {
    use ringleader::{Reject, StatusCode};
    let site = Site::serving(async |request: Request| match *request.method() {
        Method::GET => Err(Reject::new(StatusCode::NOT_FOUND, "no such key").into()),
        _ => Err("a secret of ours".into()),
    });
    let mut client = site.connect();
    let answer = client.get("/");
    assert_eq!((answer.status, answer.text()), (404, "no such key\n"));
    client.send("DELETE / HTTP/1.1\r\nhost: test\r\n\r\n");
    let answer = client.answer();
    assert_eq!(answer.status, 500);
    assert!(!answer.text().contains("secret"), "an error's text is for the log");
}

#[test]
fn each_executor_has_its_own_service() {
    let server = local(2).serve(async |shard| {
        let (slot, count) = (shard.id(), std::cell::Cell::new(0));
        Ok(service_fn(async move |_| {
            count.set(count.get() + 1);
            Ok(Response::new(Body::from(format!("{slot} {}", count.get()))))
        }))
    });
    let site = Site::start(server);
    let mut counts = [0, 0];
    for _ in 0..20 {
        let answer = site.connect().get("/");
        let (slot, count) = answer.text().split_once(' ').expect("two numbers");
        let slot: usize = slot.parse().unwrap();
        counts[slot] += 1;
        assert_eq!(count, counts[slot].to_string());
    }
}
