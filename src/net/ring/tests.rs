//! The ring against real sockets, and what the tests of `net` share: socket pairs, a seeded source of choices, a
//! watchdog.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::mpsc;

use super::*;
use crate::sys::eventfd::EventFd;

thread_local! {
    static ENDS: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// Called by each ring of this thread at the moment its buffers are freed, with the operations still in flight.
pub(super) fn note_end(in_flight: usize) {
    ENDS.with_borrow_mut(|ends| ends.push(in_flight));
}

/// Operations that were in flight at the end of each ring of this thread since the last call.
pub(crate) fn ends() -> Vec<usize> {
    ENDS.take()
}

/// Choices that can be replayed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        // Zero is the one state that xorshift does not leave.
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    pub(crate) fn size(&mut self, bound: usize) -> usize {
        self.below(bound as u64) as usize
    }

    pub(crate) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

/// `RINGLEADER_SEED`, to replay one run; `None` when it is not set.
pub(crate) fn seed_to_replay() -> Option<u64> {
    std::env::var("RINGLEADER_SEED").ok()?.parse().ok()
}

/// Ends the process, saying what hangs, when it is not dropped within `limit`.
pub(crate) struct Watchdog(Option<mpsc::Sender<()>>);

impl Watchdog {
    pub(crate) fn new(what: String, limit: Duration) -> Self {
        let (alive, dead) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            if dead.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("hangs: {what} (more than {limit:?})");
                std::process::abort();
            }
        });
        Self(Some(alive))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.take();
    }
}

/// A connected pair over loopback: ours as the driver takes it, and the peer's, non-blocking both.
pub(crate) fn pair() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let peer = TcpStream::connect(listener.local_addr().expect("bound")).expect("the listener is there");
    let (ours, _) = listener.accept().expect("a connection waits");
    for stream in [&ours, &peer] {
        stream.set_nodelay(true).expect("TCP");
        stream.set_nonblocking(true).expect("a socket");
    }
    (ours.into(), peer)
}

fn set_socket_option<T>(fd: impl AsFd, name: i32, value: T) {
    let fd = fd.as_fd().as_raw_fd();
    let (address, size) = ((&raw const value).cast(), size_of::<T>() as libc::socklen_t);
    // SAFETY: `address` points to `size` bytes that live over the call.
    let done = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, name, address, size) };
    assert_eq!(done, 0, "setsockopt {name}: {}", io::Error::last_os_error());
}

/// A small send buffer, so that it is full soon. The receive buffer stays: one smaller than loopback's segments (64 KiB)
/// makes TCP drop them and wait for its retransmit timer, longer each time.
pub(crate) fn shrink(fd: impl AsFd, bytes: i32) {
    set_socket_option(&fd, libc::SO_SNDBUF, bytes);
}

/// Closes with a RST instead of a FIN.
pub(crate) fn reset(stream: TcpStream) {
    set_socket_option(&stream, libc::SO_LINGER, libc::linger { l_onoff: 1, l_linger: 0 });
    drop(stream);
}

/// What `/proc/self/fd` says, by descriptor.
pub(crate) fn descriptors() -> BTreeMap<i32, String> {
    let entries = std::fs::read_dir("/proc/self/fd").expect("/proc is mounted");
    entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let target = std::fs::read_link(&path).ok()?;
            Some((path.file_name()?.to_str()?.parse().ok()?, target.to_string_lossy().into_owned()))
        })
        .collect()
}

/// Runs one test again, alone in a process of its own, where descriptors can be counted. True in that process.
pub(crate) fn alone(test: &str) -> bool {
    if std::env::var_os("RINGLEADER_ALONE").is_some_and(|name| name == test) {
        return true;
    }
    let child = Command::new(std::env::current_exe().expect("/proc is mounted"))
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env("RINGLEADER_ALONE", test)
        .output()
        .expect("the test binary runs");
    let (out, error) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success() && out.contains("1 passed"), "{}\n{out}\n{error}", child.status);
    false
}

const SMALL: RingOptions = RingOptions { buffers: 4, buffer_bytes: 64 };

fn ring(options: RingOptions) -> Ring {
    Ring::new(options).expect("io_uring works here")
}

/// Enters and reaps until `enough`, for five seconds at most.
fn reap_until(ring: &mut Ring, what: &str, mut enough: impl FnMut(&[Completion]) -> bool) -> Vec<Completion> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut completions = Vec::new();
    loop {
        ring.reap(&mut completions);
        if enough(&completions) {
            return completions;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}; came: {completions:?}");
        ring.enter_for(1, Duration::from_millis(20)).expect("io_uring_enter");
    }
}

fn readable(fd: impl AsFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one live pollfd.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

#[test]
fn received_bytes_are_in_the_buffers_in_order() {
    let (ours, mut peer) = pair();
    let mut ring = ring(SMALL);
    ring.receive(ours.as_fd(), 7);
    let text: Vec<u8> = (0..200).collect();
    peer.write_all(&text).expect("room");
    let mut received = Vec::new();
    let completions =
        reap_until(&mut ring, "200 bytes", |all| all.iter().map(|one| one.result.max(0)).sum::<i32>() == 200);
    for completion in completions {
        assert_eq!(completion.purpose, Purpose::Receive { socket: 7 });
        if let Some(buffer) = completion.buffer {
            assert_eq!(buffer.len(), completion.result as usize);
            received.extend_from_slice(ring.bytes(&buffer));
            ring.recycle(buffer);
        }
    }
    assert_eq!(received, text);
}

#[test]
fn the_end_of_the_stream_ends_the_receive_without_a_buffer() {
    let (ours, peer) = pair();
    let mut ring = ring(SMALL);
    ring.receive(ours.as_fd(), 0);
    peer.shutdown(std::net::Shutdown::Write).expect("connected");
    let completions = reap_until(&mut ring, "the end", |all| !all.is_empty());
    assert_eq!((completions.len(), completions[0].result, completions[0].more), (1, 0, false));
    assert!(completions[0].buffer.is_none(), "an end takes no buffer");
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn buffers_run_out_and_come_back() {
    let (ours, mut peer) = pair();
    let mut ring = ring(SMALL);
    let text: Vec<u8> = (0..1000).map(|index| index as u8).collect();
    peer.write_all(&text).expect("room");
    let mut received = Vec::new();
    let mut rounds = 0;
    while received.len() < text.len() {
        ring.receive(ours.as_fd(), 0);
        let completions = reap_until(&mut ring, "the receive's end", |all| all.last().is_some_and(|last| !last.more));
        let last = completions.last().expect("one at least").result;
        let buffers: Vec<Buffer> = completions.into_iter().filter_map(|completion| completion.buffer).collect();
        assert!(buffers.len() <= 4, "more buffers than there are");
        assert_eq!(last, -libc::ENOBUFS);
        for buffer in buffers {
            received.extend_from_slice(ring.bytes(&buffer));
            ring.recycle(buffer);
        }
        rounds += 1;
        if text.len() - received.len() < 256 {
            break;
        }
    }
    assert!(rounds >= 3, "1000 bytes do not fit into four buffers of 64");
    assert_eq!(received, text[..received.len()]);
}

/// Receives until the receive ends, and says how many buffers that took.
fn drain(ring: &mut Ring, socket: impl AsFd) -> usize {
    ring.receive(socket.as_fd(), 0);
    let completions = reap_until(ring, "the receive's end", |all| all.last().is_some_and(|last| !last.more));
    let buffers: Vec<Buffer> = completions.into_iter().filter_map(|completion| completion.buffer).collect();
    let count = buffers.len();
    buffers.into_iter().for_each(|buffer| ring.recycle(buffer));
    count
}

#[test]
fn more_buffers_are_offered_only_when_there_are_too_few() {
    let mut ring = ring(RingOptions { buffers: 256, buffer_bytes: 16 });
    // Every receive ends for want of buffers: a run of the kernel's is shorter than what is sent, and goes on.
    let mut round = || {
        let (ours, mut peer) = pair();
        peer.write_all(&[1; 16 * 300]).expect("room");
        let count = drain(&mut ring, &ours);
        ring.offer_more_buffers();
        count
    };
    assert_eq!([round(), round(), round(), round()], [64, 128, 256, 256]);
}

#[test]
fn buffers_whose_memory_was_given_back_are_used_again() {
    let mut ring = ring(RingOptions { buffers: 4, buffer_bytes: 4096 });
    let resident = |ring: &Ring| {
        let (start, length) = ring.buffers.data();
        let mut pages = vec![0_u8; length.div_ceil(4096)];
        // SAFETY: it asks about the map that the ring holds; one byte for each of its pages.
        assert_eq!(unsafe { libc::mincore(start.cast(), length, pages.as_mut_ptr()) }, 0);
        pages.iter().filter(|page| **page & 1 == 1).count()
    };
    let use_often = |ring: &mut Ring| {
        for _ in 0..100 {
            let (ours, mut peer) = pair();
            peer.write_all(&[1; 5 * 4096]).expect("room");
            assert_eq!(drain(ring, &ours), 4);
        }
    };
    for _ in 0..2 {
        use_often(&mut ring);
        assert!(resident(&ring) >= 4);
        ring.give_memory_back();
        assert_eq!(resident(&ring), 0);
    }
    // One that is held keeps them all.
    use_often(&mut ring);
    let (ours, mut peer) = pair();
    ring.receive(ours.as_fd(), 0);
    peer.write_all(b"held").expect("room");
    let held = reap_until(&mut ring, "four bytes", |all| !all.is_empty()).pop().and_then(|one| one.buffer);
    let held = held.expect("four bytes need a buffer");
    ring.give_memory_back();
    assert_eq!(ring.bytes(&held), b"held");
    ring.recycle(held);
}

/// The id and address of each buffer stay together however often they go round and in whatever order they come back.
#[test]
fn buffers_recycled_in_any_order_never_overlap() {
    let seed = seed_to_replay().unwrap_or(1);
    let mut random = Random::new(seed);
    let (ours, mut peer) = pair();
    let mut ring = ring(RingOptions { buffers: 8, buffer_bytes: 16 });
    let mut held: Vec<(Buffer, Vec<u8>)> = Vec::new();
    let (mut armed, mut sent, mut completions) = (false, 0_u64, Vec::new());
    for _ in 0..20_000 {
        if !armed {
            ring.receive(ours.as_fd(), 0);
            armed = true;
        }
        sent += peer.write(&[sent as u8; 16][..1 + random.size(16)]).unwrap_or(0) as u64;
        ring.enter(0).expect("io_uring_enter");
        ring.reap(&mut completions);
        for completion in completions.drain(..) {
            armed &= completion.more;
            if let Some(buffer) = completion.buffer {
                let bytes = ring.bytes(&buffer).to_vec();
                held.push((buffer, bytes));
            }
        }
        assert!(held.len() <= 8, "seed {seed}: the kernel handed out a buffer twice");
        while !held.is_empty() && random.one_in(2) {
            let (buffer, bytes) = held.swap_remove(random.size(held.len()));
            assert_eq!(ring.bytes(&buffer), bytes, "seed {seed}: a held buffer was written to");
            ring.recycle(buffer);
        }
    }
}

#[test]
fn a_send_gives_its_bytes_back() {
    let (ours, mut peer) = pair();
    let mut ring = ring(SMALL);
    ring.send(ours.as_fd(), b"hello".to_vec(), 3);
    let completions = reap_until(&mut ring, "the send", |all| !all.is_empty());
    assert_eq!(completions[0].purpose, Purpose::Send { socket: 3 });
    assert_eq!((completions[0].result, &completions[0].sent[..]), (5, &b"hello"[..]));
    let mut text = [0; 5];
    peer.set_nonblocking(false).expect("a socket");
    peer.read_exact(&mut text).expect("five bytes");
    assert_eq!(&text, b"hello");
}

#[test]
fn a_cancelled_receive_completes_for_the_last_time() {
    let (ours, _peer) = pair();
    let mut ring = ring(SMALL);
    let receive = ring.receive(ours.as_fd(), 0);
    ring.enter(0).expect("io_uring_enter");
    ring.cancel(receive);
    assert_eq!(ring.in_flight(), 2);
    let completions = reap_until(&mut ring, "both ends", |all| all.len() == 2);
    let of = |purpose| completions.iter().find(|one| one.purpose == purpose).map(|one| (one.result, one.more));
    assert_eq!(of(Purpose::Receive { socket: 0 }), Some((-libc::ECANCELED, false)));
    assert_eq!(of(Purpose::Cancel), Some((0, false)));
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn cancelling_what_has_ended_harms_nobody() {
    let mut ring = ring(SMALL);
    let tick = ring.tick(Duration::from_micros(100));
    reap_until(&mut ring, "the tick", |all| !all.is_empty());
    ring.cancel(tick);
    let completions = reap_until(&mut ring, "the cancellation", |all| !all.is_empty());
    assert_eq!((completions[0].purpose, completions[0].result), (Purpose::Cancel, -libc::ENOENT));
}

#[test]
fn a_tick_ends_a_wait_and_is_never_early() {
    let mut ring = ring(SMALL);
    let start = Instant::now();
    ring.tick(Duration::from_millis(5));
    ring.enter(1).expect("io_uring_enter");
    let mut completions = Vec::new();
    ring.reap(&mut completions);
    assert!(start.elapsed() >= Duration::from_millis(5), "after {:?}", start.elapsed());
    assert_eq!((completions[0].purpose, completions[0].result), (Purpose::Tick, -libc::ETIME));
}

#[test]
fn a_parked_ring_signals_its_eventfd_and_another_does_not() {
    let (ours, mut peer) = pair();
    let bell = EventFd::new().expect("an eventfd");
    let mut ring = ring(SMALL);
    ring.register_eventfd(bell.as_fd()).expect("registered");
    ring.signal_eventfd(false);
    ring.receive(ours.as_fd(), 0);
    ring.enter(0).expect("io_uring_enter");
    assert!(!ring.wants_enter());

    peer.write_all(b"a").expect("room");
    assert!(ring.wants_enter(), "the kernel flags the work it has put off");
    assert!(!readable(&bell), "signals are off");
    ring.signal_eventfd(true);
    assert!(ring.wants_enter(), "what came before the signal was switched on is still to be seen");

    let mut completions = reap_until(&mut ring, "a byte", |all| !all.is_empty());
    ring.recycle(completions.remove(0).buffer.expect("a byte"));
    assert!(!ring.wants_enter());
    peer.write_all(b"b").expect("room");
    assert!(readable(&bell), "a parked ring rings");
}

#[test]
fn a_watch_reports_each_time_and_while_the_ring_waits() {
    let inbox = std::sync::Arc::new(EventFd::new().expect("an eventfd"));
    let mut ring = ring(SMALL);
    ring.readable(inbox.as_fd(), Purpose::Inbox);
    for _ in 0..3 {
        let poster = std::sync::Arc::clone(&inbox);
        let poster = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(2));
            poster.signal();
        });
        let completions = reap_until(&mut ring, "the inbox", |all| !all.is_empty());
        assert!(completions.iter().all(|one| one.purpose == Purpose::Inbox && one.more));
        poster.join().expect("no panic");
    }
}

/// What `Driver` has to know: a watch is not for ever. When completions back up, the kernel ends it, and says so by
/// `more` only.
#[test]
fn a_watch_ends_when_completions_overflow() {
    let inbox = EventFd::new().expect("an eventfd");
    let mut ring = ring(SMALL);
    ring.readable(inbox.as_fd(), Purpose::Inbox);
    let nothing = OperationKey(u32::MAX);
    for _ in 0..2 * COMPLETION_ENTRIES {
        ring.cancel(nothing);
    }
    inbox.signal();
    let completions = reap_until(&mut ring, "all", |all| {
        all.len() > 2 * COMPLETION_ENTRIES as usize && all.iter().any(|one| one.purpose == Purpose::Inbox)
    });
    let watch: Vec<bool> = completions.iter().filter(|one| one.purpose == Purpose::Inbox).map(|one| one.more).collect();
    println!("the watch reported {watch:?}, in flight {}", ring.in_flight());
    assert_eq!(watch.last(), Some(&(ring.in_flight() == 1)), "`more` and the table agree on whether the watch goes on");
}

#[test]
fn a_full_submission_queue_is_handed_over_and_nothing_is_lost() {
    let mut ring = ring(SMALL);
    let count = 4 * SUBMISSION_ENTRIES as usize + 3;
    for _ in 0..count {
        ring.tick(Duration::from_micros(50));
    }
    assert_eq!(ring.in_flight(), count);
    let completions = reap_until(&mut ring, "all ticks", |all| all.len() == count);
    assert!(completions.iter().all(|one| one.purpose == Purpose::Tick && one.result == -libc::ETIME));
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn completions_beyond_the_queue_are_kept() {
    let mut ring = ring(SMALL);
    let count = 3 * COMPLETION_ENTRIES as usize;
    for _ in 0..count {
        ring.cancel(OperationKey(u32::MAX));
    }
    let completions = reap_until(&mut ring, "all", |all| all.len() == count);
    assert!(completions.iter().all(|one| one.result == -libc::ENOENT));
}

/// Fills a socket's send buffer, so that sends and waits for room stay in flight.
fn fill(stream: &mut TcpStream) {
    while stream.write(&[0; 65536]).is_ok() {}
}

/// One operation of each kind, none of which can complete; what has to stay open for that.
fn one_of_each(ring: &mut Ring) -> (OwnedFd, TcpStream, TcpListener, EventFd) {
    let (ours, peer) = pair();
    let mut ours = TcpStream::from(ours);
    fill(&mut ours);
    let ours = OwnedFd::from(ours);
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let inbox = EventFd::new().expect("an eventfd");
    ring.receive(ours.as_fd(), 0);
    ring.send(ours.as_fd(), vec![1; 1 << 20], 0);
    ring.writable(ours.as_fd(), 0);
    ring.readable(listener.as_fd(), Purpose::Listener { listener: 0 });
    ring.readable(inbox.as_fd(), Purpose::Inbox);
    ring.tick(Duration::from_secs(3600));
    (ours, peer, listener, inbox)
}

#[test]
fn teardown_waits_for_operations_of_every_kind() {
    ends();
    let mut ring = ring(RingOptions::default());
    let (ours, mut peer, listener, inbox) = one_of_each(&mut ring);
    ring.enter(0).expect("io_uring_enter");
    let mut completions = Vec::new();
    ring.reap(&mut completions);
    assert!(completions.is_empty(), "{completions:?}");
    assert_eq!(ring.in_flight(), 6);
    let start = Instant::now();
    drop(ring);
    assert_eq!(ends(), [0], "operations in flight when the buffers were freed");
    assert!(start.elapsed() < QUIESCE_LIMIT / 2, "teardown took {:?}", start.elapsed());
    // The sockets' numbers are the caller's to close: the kernel holds none of them any more.
    drop((ours, listener, inbox));
    peer.set_nonblocking(false).expect("a socket");
    let mut rest = Vec::new();
    peer.read_to_end(&mut rest).expect("the end, not a hang");
}

#[test]
fn teardown_takes_in_what_was_never_submitted_or_reaped() {
    ends();
    let mut ring = ring(SMALL);
    let held = one_of_each(&mut ring);
    let (ours, mut peer) = pair();
    ring.receive(ours.as_fd(), 1);
    ring.enter(0).expect("io_uring_enter");
    peer.write_all(&[0; 4096]).expect("room");
    ring.enter(0).expect("io_uring_enter");
    let cancelled = ring.tick(Duration::from_secs(3600));
    ring.cancel(cancelled);
    ring.tick(Duration::from_secs(3600));
    assert!(ring.in_flight() >= 10);
    drop(ring);
    assert_eq!(ends(), [0]);
    drop(held);
}

#[test]
fn a_ring_gives_every_descriptor_back() {
    if !alone("net::ring::tests::a_ring_gives_every_descriptor_back") {
        return;
    }
    let before = descriptors();
    // More often than a thread has places for registered rings (16).
    for _ in 0..100 {
        let mut ring = ring(SMALL);
        let held = one_of_each(&mut ring);
        ring.enter(0).expect("io_uring_enter");
        assert!(ring.enter_flags & ENTER_REGISTERED_RING != 0, "no place for the ring's descriptor was left");
        drop(ring);
        drop(held);
    }
    assert_eq!(descriptors(), before);
    assert_eq!(ends(), [0; 100]);
}

#[test]
#[should_panic(expected = "a buffer of another ring")]
fn a_buffer_of_a_larger_ring_is_refused() {
    let mut ring = ring(SMALL);
    let foreign = ring.buffers.take(4, 1);
    ring.bytes(&foreign);
}
