//! The driver against real sockets, case by case, and what its tests share: a task, turns as the executor does them. In
//! `drive` what happens to connections is random.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use super::{Arrivals, Driver, UNREAD_BYTES_MAX};
use crate::net::ring::RingOptions;
use crate::net::ring::tests::{alone, descriptors, ends, pair, reset, shrink};
use crate::sys::eventfd::EventFd;

mod drive;

/// What the driver may hold of one connection: its limit, and what the kernel delivers until the stop is seen. That is
/// a burst of 33 buffers (`MULTISHOT_MAX_RETRY` and the first) for each entry: two of a nap and the turn after it, one
/// that was under way when the stop was submitted, and one for a kernel that orders these otherwise.
fn held_max(options: RingOptions) -> usize {
    UNREAD_BYTES_MAX + 4 * 33 * options.buffer_bytes as usize
}

/// So many ready tasks that small writes are queued, whatever the threshold is.
const MANY: usize = usize::MAX;

/// A task that runs when it has been woken.
struct Runnable(AtomicBool);

impl Wake for Runnable {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Runnable {
    fn new() -> Arc<Self> {
        Arc::new(Self(AtomicBool::new(true)))
    }

    /// Polls if it has been woken; it stays runnable when it was not left waiting.
    fn run<T>(self: &Arc<Self>, poll: impl FnOnce(&mut Context<'_>) -> Poll<T>) -> Option<T> {
        if !self.0.swap(false, Ordering::Relaxed) {
            return None;
        }
        match poll(&mut Context::from_waker(&Waker::from(Arc::clone(self)))) {
            Poll::Ready(value) => {
                self.0.store(true, Ordering::Relaxed);
                Some(value)
            }
            Poll::Pending => None,
        }
    }
}

/// One turn as the executor does it, with a wait of `wait` at most.
fn turn(driver: &mut Driver, wait: Option<Duration>) {
    let mut arrivals = Arrivals::default();
    if let Some(wait) = wait {
        let now = Instant::now();
        driver.wake_by(now + wait, now);
    }
    driver.turn(wait.is_some(), &mut arrivals).expect("io_uring_enter");
}

const STEP: Option<Duration> = Some(Duration::from_millis(1));

/// Turns until `done`, for five seconds at most.
fn turn_until(driver: &mut Driver, what: &str, mut done: impl FnMut(&mut Driver) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        turn(driver, STEP);
        let done = done(driver);
        driver.end_turn();
        if done {
            return;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
    }
}

fn driver(buffers: u16, buffer_bytes: u32) -> Driver {
    Driver::new(RingOptions { buffers, buffer_bytes }, Arc::default()).expect("io_uring works here")
}

/// Reads `limit` bytes at most; `None` when there is nothing yet.
fn read(driver: &mut Driver, key: u32, limit: usize) -> Option<std::io::Result<Vec<u8>>> {
    read_as(driver, key, limit, &Runnable::new())
}

fn read_as(driver: &mut Driver, key: u32, limit: usize, reader: &Arc<Runnable>) -> Option<std::io::Result<Vec<u8>>> {
    let mut bytes = Vec::new();
    let outcome = reader.run(|context| {
        driver.poll_read(key, context, |offered| {
            let count = offered.len().min(limit - bytes.len());
            bytes.extend_from_slice(&offered[..count]);
            count
        })
    })?;
    Some(outcome.map(|count| {
        assert_eq!(count, bytes.len(), "poll_read says what was taken");
        bytes
    }))
}

fn send(driver: &mut Driver, key: u32, bytes: &[u8]) -> usize {
    match driver.send(key, bytes, &mut Context::from_waker(Waker::noop())) {
        Poll::Ready(sent) => sent.expect("the peer is there"),
        Poll::Pending => 0,
    }
}

#[test]
fn more_readable_connections_than_buffers_all_get_their_bytes() {
    let mut driver = driver(4, 64);
    let mut connections: Vec<(u32, TcpStream, Vec<u8>)> = Vec::new();
    for index in 0..20_u8 {
        let (ours, mut peer) = pair();
        peer.write_all(&[index; 1000]).expect("room");
        connections.push((driver.adopt(ours), peer, Vec::new()));
    }
    turn_until(&mut driver, "all bytes", |driver| {
        for (key, _, received) in &mut connections {
            received.extend(read(driver, *key, usize::MAX).transpose().expect("no error").unwrap_or_default());
        }
        connections.iter().all(|(.., received)| received.len() == 1000)
    });
    for (index, (.., received)) in connections.iter().enumerate() {
        assert!(received.iter().all(|byte| usize::from(*byte) == index));
    }
}

#[test]
fn a_connection_that_is_not_read_is_held_to_its_limit_and_goes_on_when_it_is() {
    // Fewer buffers than arrive in a turn: running out of them must not stop it before. More: it must stop all the same.
    held_to_its_limit(RingOptions { buffers: 16, buffer_bytes: 1024 });
    held_to_its_limit(RingOptions { buffers: 256, buffer_bytes: 1024 });
}

fn held_to_its_limit(options: RingOptions) {
    let mut driver = driver(options.buffers, options.buffer_bytes);
    let (ours, mut peer) = pair();
    shrink(&ours, 32 * 1024);
    shrink(&peer, 32 * 1024);
    let key = driver.adopt(ours);
    let (mut sent, mut idle) = (0, 0);
    while idle < 50 {
        idle += 1;
        while let Ok(count) = peer.write(&[1; 4096]) {
            (sent, idle) = (sent + count, 0);
        }
        assert!(sent < 4 << 20, "nothing pushes back on the peer");
        turn(&mut driver, STEP);
        driver.end_turn();
    }
    let held = read(&mut driver, key, usize::MAX).expect("bytes").expect("no error").len();
    assert!((UNREAD_BYTES_MAX..=held_max(options)).contains(&held), "{held} bytes held of {sent}");
    let mut received = held;
    turn_until(&mut driver, "the rest", |driver| {
        received += read(driver, key, usize::MAX).transpose().expect("no error").map_or(0, |bytes| bytes.len());
        received == sent
    });
}

#[test]
fn a_peer_that_has_closed_its_half_still_gets_its_answer() {
    let mut driver = driver(4, 64);
    let (ours, mut peer) = pair();
    let key = driver.adopt(ours);
    peer.write_all(b"question").expect("room");
    peer.shutdown(Shutdown::Write).expect("connected");
    let mut question = Vec::new();
    turn_until(&mut driver, "the end of the question", |driver| match read(driver, key, 3) {
        Some(Ok(bytes)) if bytes.is_empty() => true,
        Some(bytes) => {
            question.extend(bytes.expect("no error"));
            false
        }
        None => false,
    });
    assert_eq!(question, b"question");
    assert_eq!(send(&mut driver, key, b"answer"), 6);
    turn_until(&mut driver, "the shutdown", |driver| {
        driver.poll_shutdown(key, &mut Context::from_waker(Waker::noop())).is_ready()
    });
    let mut answer = String::new();
    peer.set_nonblocking(false).expect("a socket");
    peer.read_to_string(&mut answer).expect("the end");
    assert_eq!(answer, "answer");
}

#[test]
fn an_abandoned_connection_is_closed_and_its_number_can_be_used_again() {
    let mut driver = driver(4, 64);
    let (ours, mut peer) = pair();
    let first = driver.adopt(ours);
    turn(&mut driver, None);
    peer.write_all(b"unread").expect("room");
    turn_until(&mut driver, "bytes", |driver| driver.is_readable(first));
    driver.abandon(first);
    let (ours, mut other) = pair();
    let second = driver.adopt(ours);
    assert_ne!(first, second, "the kernel still has an operation of the first");
    turn_until(&mut driver, "the close", |driver| driver.sockets() == 1);
    let (ours, mut third) = pair();
    assert_eq!(driver.adopt(ours), first);
    other.write_all(b"other").expect("room");
    third.write_all(b"third").expect("room");
    let mut received = Vec::new();
    turn_until(&mut driver, "bytes of the third", |driver| {
        received.extend(read(driver, first, usize::MAX).transpose().expect("no error").unwrap_or_default());
        received.len() == 5
    });
    assert_eq!(received, b"third");
    peer.set_nonblocking(false).expect("a socket");
    let mut rest = Vec::new();
    peer.read_to_end(&mut rest).expect("an end: the ring had taken what was unread");
    drop(third);
}

/// What is sent directly, from a file too, waits for what was queued before it.
#[test]
fn a_file_does_not_overtake_a_queued_send() {
    let mut driver = driver(4, 64);
    let path = std::env::temp_dir().join(format!("ringleader-driver-{}", std::process::id()));
    std::fs::write(&path, [2; 5000]).expect("there is room");
    let file = std::fs::File::open(&path).expect("it is there");
    std::fs::remove_file(&path).expect("it is ours");
    let (ours, mut peer) = pair();
    let key = driver.adopt(ours);
    driver.begin_turn(MANY);
    assert_eq!(send(&mut driver, key, &[1; 1000]), 1000, "queued");
    let mut context = Context::from_waker(Waker::noop());
    assert!(driver.send_file(key, file.as_fd(), 0, 4000, &mut context).is_pending());
    assert!(driver.send_ahead(key, &[3], &mut context).is_pending());
    turn_until(&mut driver, "the queued send", |driver| {
        match driver.send_file(key, file.as_fd(), 1000, 9000, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(sent) => {
                assert_eq!(sent.expect("the peer is there"), 4000, "as much as there is");
                true
            }
            Poll::Pending => false,
        }
    });
    assert!(matches!(driver.send_file(key, file.as_fd(), 5000, 1, &mut context), Poll::Ready(Ok(0))), "its end");
    assert!(matches!(driver.send_ahead(key, &[3; 10], &mut context), Poll::Ready(Ok(10))));
    let mut received = Vec::new();
    turn_until(&mut driver, "all of it", |_| {
        let mut buffer = [0; 8192];
        if let Ok(count) = peer.read(&mut buffer) {
            received.extend_from_slice(&buffer[..count]);
        }
        received.len() == 5010
    });
    assert!(received == [&[1; 1000][..], &[2; 4000], &[3; 10]].concat());
}

/// A queued send has been taken: the peer gets it although the connection is given up while it waits for room.
#[test]
fn an_abandoned_connection_still_sends_what_was_taken() {
    let mut driver = driver(4, 64);
    let (ours, mut peer) = pair();
    shrink(&ours, 16 * 1024);
    let key = driver.adopt(ours);
    let (mut sent, mut idle) = (0, 0);
    while idle < 20 {
        idle += 1;
        driver.begin_turn(MANY);
        let taken = send(&mut driver, key, &[1; 4096]);
        if taken > 0 {
            (sent, idle) = (sent + taken, 0);
        }
        turn(&mut driver, STEP);
        driver.end_turn();
    }
    driver.abandon(key);
    let mut received = 0;
    let mut buffer = vec![0; 1 << 20];
    turn_until(&mut driver, "the end", |_| match peer.read(&mut buffer) {
        Ok(count) => {
            received += count;
            count == 0
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            false
        }
    });
    assert_eq!(received, sent);
}

#[test]
fn a_driver_gives_every_descriptor_back_whatever_is_in_flight() {
    if !alone("net::driver::tests::a_driver_gives_every_descriptor_back_whatever_is_in_flight") {
        return;
    }
    let before = descriptors();
    for round in 0..50 {
        let inbox = EventFd::new().expect("an eventfd");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let mut driver = driver(4, 64);
        driver.watch_inbox(inbox.as_fd());
        driver.watch_listener(listener.as_fd(), 0);
        let mut peers = Vec::new();
        for _ in 0..8 {
            let (ours, mut peer) = pair();
            let key = driver.adopt(ours);
            peer.write_all(&[0; 300]).expect("room");
            while send(&mut driver, key, &[0; 1 << 16]) > 0 {}
            peers.push((key, peer));
        }
        if round % 2 == 0 {
            turn(&mut driver, STEP);
            driver.end_turn();
            driver.abandon(peers[0].0);
        }
        drop(driver);
        assert_eq!(ends(), [0], "operations in flight when the buffers were freed");
        for (_, mut peer) in peers {
            peer.set_nonblocking(false).expect("a socket");
            // The end or a RST: never a hang.
            let _ = peer.read_to_end(&mut Vec::new());
        }
    }
    assert_eq!(descriptors(), before);
}

/// A reset that was there before the receive was armed, behind more bytes than it takes in one go: the kernel itself
/// never reports it.
#[test]
fn a_reset_that_came_before_the_receive_is_seen() {
    for count in [1, 33 * 128, 33 * 128 + 1, 15_000, 60_000] {
        for buffers in [8, 64, 512] {
            let mut driver = driver(buffers, 128);
            let (ours, mut peer) = pair();
            let sent = peer.write(&vec![1; count]).expect("room");
            reset(peer);
            let key = driver.adopt(ours);
            let (mut received, reader) = (0, Runnable::new());
            turn_until(&mut driver, &format!("the reset behind {count} bytes, {buffers} buffers"), |driver| {
                match read_as(driver, key, usize::MAX, &reader) {
                    Some(Ok(bytes)) => received += bytes.len(),
                    Some(Err(error)) => {
                        assert_eq!((error.kind(), received), (ErrorKind::ConnectionReset, sent));
                        return true;
                    }
                    None => {}
                }
                false
            });
        }
    }
}

#[test]
fn ticks_do_not_pile_up() {
    let mut driver = driver(4, 64);
    for _ in 0..50 {
        let now = Instant::now();
        driver.wake_by(now + Duration::from_millis(10), now);
        driver.wake_by(now + Duration::from_millis(1), now);
        driver.turn(true, &mut Arrivals::default()).expect("io_uring_enter");
        assert!(driver.ring().in_flight() <= 4, "{} operations for one tick", driver.ring().in_flight());
    }
}

#[test]
fn a_listener_that_is_no_longer_watched_refuses_clients_once_closed() {
    let mut driver = driver(4, 64);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let address = listener.local_addr().expect("bound");
    let watch = driver.watch_listener(listener.as_fd(), 0);
    turn(&mut driver, None);
    drop(listener);
    driver.unwatch_listener(watch);
    turn(&mut driver, STEP);
    let refused = TcpStream::connect(address).expect_err("nobody listens");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_watch_that_the_kernel_has_ended_is_reported() {
    let mut driver = driver(4, 64);
    let inbox = EventFd::new().expect("an eventfd");
    driver.watch_inbox(inbox.as_fd());
    let tick = driver.ring().tick(Duration::from_secs(3600));
    // More completions than the ring has room for.
    for _ in 0..5000 {
        driver.ring().cancel(tick);
    }
    inbox.signal();
    let mut arrivals = Arrivals::default();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !arrivals.inbox_unwatched {
        driver.turn(false, &mut arrivals).expect("io_uring_enter");
        assert!(Instant::now() < deadline, "the watch has not ended");
    }
    driver.watch_inbox(inbox.as_fd());
    let mut arrivals = Arrivals::default();
    driver.turn(true, &mut arrivals).expect("io_uring_enter");
    assert!(arrivals.activity && !arrivals.inbox_unwatched);
}
