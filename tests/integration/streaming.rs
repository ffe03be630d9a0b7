//! Much data, slow peers, and peers that go away.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use ringleader::{Body, HttpLimits, Request, Response, service_fn};

use crate::support::{Check, Client, Gate, Pattern, Site, echo, eventually, local, pattern, spawn};

const MIB: u64 = 1024 * 1024;
/// What may be on its way between a sender that does not wait and a reader that does not read: the kernel's buffers
/// of both ends (`tcp_wmem` and `tcp_rmem` go up to 4 and 32 MiB), and a little of ours.
const ON_THE_WAY_MAX: u64 = 40 * MIB;

/// Waits until a counter has stopped to grow, and returns it.
fn settled(counter: &AtomicU64) -> u64 {
    let mut before = u64::MAX;
    eventually("the sender is held back", || {
        thread::sleep(Duration::from_millis(100));
        let now = counter.load(Ordering::Relaxed);
        now > 0 && std::mem::replace(&mut before, now) == now
    });
    before
}

#[test]
fn a_large_answer_reaches_a_slow_reader_whole_and_is_made_no_faster_than_read() {
    const LENGTH: u64 = 128 * MIB;
    let made = Arc::new(AtomicU64::new(0));
    let site = {
        let made = Arc::clone(&made);
        Site::serving(async move |_| Ok(Response::new(Body::new(Pattern::new(LENGTH, &made)))))
    };
    let mut client = site.connect();
    client.ask("/");
    client.head();
    let ahead = settled(&made);
    assert!(ahead < ON_THE_WAY_MAX, "{ahead} bytes made for a client that reads none");
    let mut check = Check::new();
    while let Some(piece) = client.chunk().expect("the body goes on") {
        check.take(&piece);
        let ahead = made.load(Ordering::Relaxed) - check.received;
        assert!(ahead < ON_THE_WAY_MAX, "{ahead} bytes made and not read");
    }
    assert_eq!(check.received, LENGTH);
    assert_eq!(site.connect().get("/").status, 200, "and the server goes on");
}

#[test]
fn a_slow_reader_does_not_delay_others() {
    let made = Arc::new(AtomicU64::new(0));
    let site = {
        let made = Arc::clone(&made);
        Site::serving(async move |request: Request| {
            Ok(match request.uri().path() {
                "/large" => Response::new(Body::new(Pattern::new(1024 * MIB, &made))),
                _ => Response::new(Body::from("small")),
            })
        })
    };
    let mut slow = site.connect();
    slow.ask("/large");
    slow.head();
    settled(&made);
    let mut quick = site.connect();
    for _ in 0..100 {
        assert_eq!(quick.get("/small").text(), "small");
    }
}

#[test]
fn an_echo_is_held_back_by_who_does_not_read_it() {
    const LENGTH: u64 = 128 * MIB;
    let server = spawn(&[], &["--executors", "1", "--body-bytes", "0"]);
    let before = server.rss_bytes();
    let mut client = server.connect();
    client.send(format!("POST /echo HTTP/1.1\r\nhost: test\r\ncontent-length: {LENGTH}\r\n\r\n"));
    let sent = Arc::new(AtomicU64::new(0));
    let sender = {
        let (sent, mut stream) = (Arc::clone(&sent), client.sender());
        thread::spawn(move || {
            let piece = pattern(64 * 1024);
            for _ in 0..LENGTH / piece.len() as u64 {
                stream.write_all(&piece).expect("the server takes it when there is room");
                sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
        })
    };
    let ahead = settled(&sent);
    // Twice the way: to the server and back.
    assert!(ahead < 2 * ON_THE_WAY_MAX, "the server took {ahead} bytes that nobody reads");
    let grown = server.rss_bytes().saturating_sub(before);
    assert!(grown < 8 * MIB, "the server has {grown} bytes more");
    client.head();
    let mut check = Check::new();
    while check.received < LENGTH {
        check.take(&client.some().expect("the body goes on"));
    }
    sender.join().expect("all is sent");
    let grown = server.rss_bytes().saturating_sub(before);
    assert!(grown < 8 * MIB, "the server has {grown} bytes more");
}

#[test]
fn an_upload_nobody_reads_is_held_back() {
    let mut limits = HttpLimits::default();
    limits.body_bytes_max = u64::MAX;
    let gate = Gate::shut();
    let server = {
        let gate = gate.clone();
        local(1).http_limits(limits).serve(async move |_| {
            let gate = gate.clone();
            Ok(service_fn(async move |request: Request| {
                gate.passed().await;
                echo(request).await
            }))
        })
    };
    let site = Site::start(server);
    let mut client = site.connect();
    let sent = Arc::new(AtomicU64::new(0));
    let sender = {
        let (sent, mut stream) = (Arc::clone(&sent), client.sender());
        thread::spawn(move || {
            let head = format!("POST /echo HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n", 1024 * MIB);
            stream.write_all(head.as_bytes()).expect("the head is taken");
            let piece = pattern(64 * 1024);
            while stream.write_all(&piece).is_ok() {
                sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
        })
    };
    let ahead = settled(&sent);
    assert!(ahead < ON_THE_WAY_MAX, "the server took {ahead} bytes that nobody reads");
    // It is stuck in the middle of a write; this frees it.
    client.finish_sending();
    sender.join().expect("the sender has ended");
    gate.open();
}

#[test]
fn clients_that_reset_harm_nobody() {
    let site = Site::serving(echo);
    let mut bystander = site.connect();
    assert_eq!(bystander.get("/").status, 200);
    for sent in [
        "",
        "GET / HT",
        "POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 1000\r\n\r\nhalf",
        "POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhe",
        "GET / HTTP/1.1\r\nhost: test\r\n\r\n",
    ] {
        for _ in 0..20 {
            let mut client = site.connect();
            client.send(sent);
            client.reset();
        }
        assert_eq!(bystander.get("/").status, 200);
    }
    eventually("all but the bystander are gone", || site.stats().executors[0].open == 1);
    eventually("nothing is in flight", || site.stats().executors[0].in_flight == 0);
    assert_eq!(site.stats().executors[0].panics_contained, 0);
}

#[test]
fn a_client_that_resets_in_the_middle_of_an_answer_harms_nobody() {
    let made = Arc::new(AtomicU64::new(0));
    let site = {
        let made = Arc::clone(&made);
        Site::serving(async move |_| Ok(Response::new(Body::new(Pattern::new(1024 * MIB, &made)))))
    };
    let clients: Vec<Client> = (0..8)
        .map(|_| {
            let mut client = site.connect();
            client.ask("/");
            client.head();
            client
        })
        .collect();
    clients.into_iter().for_each(Client::reset);
    eventually("all are gone", || site.stats().executors[0].open == 0);
    assert_eq!(site.stats().executors[0].in_flight, 0);
    let mut client = site.connect();
    client.ask("/");
    assert_eq!(client.head().status, 200);
}
