//! A random drive of many connections whose every byte, end and error a model checks. `RINGLEADER_SEED=<n>` replays one
//! drive; what fails prints its seed.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use super::{MANY, Runnable, STEP, held_max, read_as, turn, turn_until};
use crate::net::driver::{Driver, UNREAD_BYTES_MAX};
use crate::net::ring::RingOptions;
use crate::net::ring::tests::{Random, Watchdog, descriptors, ends, pair, reset, seed_to_replay, shrink};

/// How far the peer has gone in ending the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum PeerEnd {
    Open,
    /// Its direction is closed; it still reads.
    Half,
    /// Its socket is closed, which may have reset ours.
    Gone,
}

/// One connection, and what must be true of it. "Ours" is the driver's side.
struct Connection {
    id: u64,
    key: u32,
    /// Names our socket in `/proc/self/fd`, for as long as it is open.
    inode: String,
    peer: Option<TcpStream>,
    peer_end: PeerEnd,
    /// The peer knows that our side has ended.
    peer_saw_end: bool,
    /// A write of the peer's has taken away the error of a reset: its read finds an end instead.
    cut: bool,
    peer_sent: u64,
    peer_received: u64,
    reader: Arc<Runnable>,
    writer: Arc<Runnable>,
    received: u64,
    sent: u64,
    /// What our reads found at the end: an errno, or none at the end of the stream.
    end: Option<Option<i32>>,
    shut: bool,
    abandoned: bool,
    /// A send or shutdown of ours has failed.
    refused: bool,
    /// One in this many chances to read is taken.
    lazy: u64,
}

/// Length of the text that every connection sends over and over, each from a place of its own. A prime: no buffer's
/// size divides it, so a lost, doubled or misplaced buffer is seen.
const TEXT_BYTES: usize = 65_521;

static TEXT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random::new(0);
    (0..TEXT_BYTES).map(|_| random.below(256) as u8).collect()
});

/// `count` bytes, `from` the given one on, of what connection `id` carries in one direction.
fn bytes(id: u64, ours: bool, from: u64, count: usize) -> Vec<u8> {
    let place = (from + id * 7919 + u64::from(ours) * 31_337) as usize % TEXT_BYTES;
    let mut bytes = Vec::with_capacity(count + TEXT_BYTES);
    bytes.extend_from_slice(&TEXT[place..]);
    while bytes.len() < count {
        bytes.extend_from_slice(&TEXT);
    }
    bytes.truncate(count);
    bytes
}

struct Drive {
    seed: u64,
    random: Random,
    options: RingOptions,
    driver: Driver,
    connections: Vec<Connection>,
    next_id: u64,
    closed_inodes: Vec<String>,
    seen: Seen,
}

/// What a drive has come across: a drive that meets nothing proves nothing.
#[derive(Debug, Default)]
struct Seen {
    bytes: u64,
    full: u64,
    blocked: u64,
    ends: u64,
    errors: u64,
    abandoned: u64,
}

const CONNECTIONS: usize = 12;

/// The socket's row of `/proc/net/tcp` and its peer's: addresses, state, queues, timers.
fn kernel_view(inode: &str) -> String {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("/proc is mounted");
    let number = inode.trim_start_matches("socket:[").trim_end_matches(']');
    let columns = |row: &str| row.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let rows: Vec<Vec<String>> = table.lines().skip(1).map(columns).collect();
    let Some(ours) = rows.iter().find(|row| row.get(9).is_some_and(|inode| inode == number)) else {
        return "no such socket".to_owned();
    };
    let pair = rows.iter().filter(|row| row[1] == ours[1] || row[2] == ours[1]);
    pair.map(|row| row[1..7].join(" ")).collect::<Vec<_>>().join("; ")
}

impl Drive {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let tiny = RingOptions { buffers: [4, 8, 256][random.size(3)], buffer_bytes: 64 << random.below(3) };
        // With tiny buffers a burst stops a receive long before the limit on unread bytes does: one drive in four has
        // those of a server.
        let options = if seed % 4 == 3 { RingOptions::default() } else { tiny };
        let driver = Driver::new(options, Arc::default()).expect("io_uring works here");
        let (connections, closed_inodes) = (Vec::new(), Vec::new());
        let mut drive =
            Self { seed, random, options, driver, connections, next_id: 0, closed_inodes, seen: Seen::default() };
        drive.fill_up();
        drive
    }

    fn fill_up(&mut self) {
        while self.connections.len() < CONNECTIONS {
            let (ours, peer) = pair();
            if self.random.one_in(2) {
                shrink(&ours, 16 * 1024);
                shrink(&peer, 64 * 1024);
            }
            let (inode, id) = (inode(&ours), self.next_id);
            self.next_id += 1;
            self.connections.push(Connection {
                id,
                key: self.driver.adopt(ours),
                inode,
                peer: Some(peer),
                peer_end: PeerEnd::Open,
                peer_saw_end: false,
                cut: false,
                peer_sent: 0,
                peer_received: 0,
                reader: Runnable::new(),
                writer: Runnable::new(),
                received: 0,
                sent: 0,
                end: None,
                shut: false,
                abandoned: false,
                refused: false,
                lazy: [1, 2, 200, 2000][self.random.size(4)],
            });
        }
    }

    /// One turn of the executor with a few random things done in it.
    fn step(&mut self) {
        let wait = self.random.one_in(8).then(|| Duration::from_micros(100 + self.random.below(900)));
        turn(&mut self.driver, wait);
        if wait.is_some() && self.random.one_in(2) {
            // As after a nap: the turn that follows enters once more before anything is polled.
            turn(&mut self.driver, None);
        }
        let ready = if self.random.one_in(2) { MANY } else { 0 };
        self.driver.begin_turn(ready);
        for _ in 0..self.random.below(12) {
            let index = self.random.size(self.connections.len());
            self.act(index);
        }
        self.driver.end_turn();
        let closed = self.connections.extract_if(.., |one| one.abandoned && one.peer_saw_end);
        self.closed_inodes.extend(closed.map(|one| one.inode));
        self.fill_up();
    }

    fn act(&mut self, index: usize) {
        match self.random.below(1000) {
            0..300 => {
                let most = [1, 10, 300, 5000][self.random.size(4)];
                let count = 1 + self.random.size(most);
                self.peer_writes(index, count);
            }
            300..340 => self.peer_writes(index, 100_000),
            340..500 => {
                let most = 1 + self.random.size(20_000);
                self.peer_reads(index, most);
            }
            500..800 if self.random.one_in(self.connections[index].lazy) => {
                let limit = [1, 50, 1000, usize::MAX][self.random.size(4)];
                self.we_read(index, limit);
            }
            800..960 => {
                let most = [1, 100, 4096, 50_000][self.random.size(4)];
                let count = 1 + self.random.size(most);
                self.we_send(index, count);
            }
            960..966 => self.peer_closes_its_half(index),
            966..969 => self.peer_goes(index),
            969..975 => {
                self.we_shut(index);
            }
            975..980 => self.we_abandon(index),
            _ => {}
        }
    }

    fn peer_writes(&mut self, index: usize, count: usize) {
        let seed = self.seed;
        let one = &mut self.connections[index];
        let Some(peer) = one.peer.as_mut().filter(|_| one.peer_end == PeerEnd::Open) else { return };
        match peer.write(&bytes(one.id, false, one.peer_sent, count)) {
            Ok(count) => one.peer_sent += count as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => {
                assert!(one.abandoned, "seed {seed}: connection {} was cut: {error}", one.id);
                one.cut = true;
            }
        }
    }

    fn peer_reads(&mut self, index: usize, most: usize) {
        let seed = self.seed;
        let one = &mut self.connections[index];
        let Some(peer) = one.peer.as_mut().filter(|_| !one.peer_saw_end) else { return };
        let mut buffer = vec![0; most];
        match peer.read(&mut buffer) {
            Ok(0) => {
                assert!(one.shut || one.abandoned, "seed {seed}: connection {} ended for its peer", one.id);
                assert!(
                    one.cut || one.peer_received == one.sent,
                    "seed {seed}: connection {} (shut {}, abandoned {}, peer {:?}): the peer saw an end after {} of {} bytes",
                    one.id,
                    one.shut,
                    one.abandoned,
                    one.peer_end,
                    one.peer_received,
                    one.sent
                );
                one.peer_saw_end = true;
            }
            Ok(count) => {
                let expected = bytes(one.id, true, one.peer_received, count);
                assert!(buffer[..count] == expected, "seed {seed}: connection {}: wrong bytes sent", one.id);
                one.peer_received += count as u64;
                assert!(one.peer_received <= one.sent, "seed {seed}: connection {}: more than was sent", one.id);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => {
                assert!(one.abandoned, "seed {seed}: connection {} was cut: {error}", one.id);
                one.peer_saw_end = true;
            }
        }
    }

    fn peer_closes_its_half(&mut self, index: usize) {
        let one = &mut self.connections[index];
        if let (PeerEnd::Open, Some(peer)) = (one.peer_end, &one.peer) {
            one.peer_end = PeerEnd::Half;
            // Fails when we have reset it.
            let _ = peer.shutdown(Shutdown::Write);
        }
    }

    fn peer_goes(&mut self, index: usize) {
        let one = &mut self.connections[index];
        if let Some(peer) = one.peer.take() {
            (one.peer_end, one.peer_saw_end) = (PeerEnd::Gone, true);
            if self.random.one_in(2) { reset(peer) } else { drop(peer) }
        }
    }

    fn we_read(&mut self, index: usize, limit: usize) {
        let (seed, options) = (self.seed, self.options);
        let one = &mut self.connections[index];
        if one.abandoned {
            return;
        }
        let Some(outcome) = read_as(&mut self.driver, one.key, limit, &one.reader) else { return };
        let end = match outcome {
            Ok(read) if !read.is_empty() => {
                assert!(one.end.is_none(), "seed {seed}: connection {}: bytes after the end", one.id);
                assert!(read.len() <= held_max(options), "seed {seed}: {} bytes were held", read.len());
                let expected = bytes(one.id, false, one.received, read.len());
                assert!(read == expected, "seed {seed}: connection {}: wrong bytes at {}", one.id, one.received);
                one.received += read.len() as u64;
                assert!(one.received <= one.peer_sent, "seed {seed}: connection {}: more than was sent", one.id);
                self.seen.bytes += read.len() as u64;
                self.seen.full += u64::from(read.len() >= UNREAD_BYTES_MAX);
                return;
            }
            Ok(_) => None,
            Err(error) => Some(error.raw_os_error().expect("an errno")),
        };
        let fair = match (end, one.peer_end) {
            (None, PeerEnd::Half) => one.received == one.peer_sent,
            // A send of ours that fails takes the socket's error away; what is left for the receive is an end.
            (None, PeerEnd::Gone) => one.received == one.peer_sent || one.sent > 0 || one.refused,
            (Some(errno), PeerEnd::Gone) => [libc::ECONNRESET, libc::EPIPE].contains(&errno),
            (_, PeerEnd::Open) | (Some(_), PeerEnd::Half) => false,
        };
        assert!(
            fair && *one.end.get_or_insert(end) == end,
            "seed {seed}: connection {}: read {end:?} after {:?}, {} of {} bytes, peer {:?}",
            one.id,
            one.end,
            one.received,
            one.peer_sent,
            one.peer_end
        );
        self.seen.ends += u64::from(end.is_none());
        self.seen.errors += u64::from(end.is_some());
    }

    fn we_send(&mut self, index: usize, count: usize) {
        let seed = self.seed;
        let one = &mut self.connections[index];
        if one.abandoned || one.shut {
            return;
        }
        let text = bytes(one.id, true, one.sent, count);
        let waiting = !one.writer.0.load(Ordering::Relaxed);
        match one.writer.run(|context| self.driver.send(one.key, &text, context)) {
            Some(Ok(count)) => {
                assert!(count > 0 && count <= text.len(), "seed {seed}: sent {count} of {}", text.len());
                one.sent += count as u64;
            }
            Some(Err(error)) => {
                assert!(one.peer_end == PeerEnd::Gone, "seed {seed}: connection {}: send: {error}", one.id);
                one.refused = true;
            }
            None => self.seen.blocked += u64::from(!waiting),
        }
    }

    /// True when it is done.
    fn we_shut(&mut self, index: usize) -> bool {
        let seed = self.seed;
        let one = &mut self.connections[index];
        if one.abandoned || one.shut {
            return true;
        }
        match one.writer.run(|context| self.driver.poll_shutdown(one.key, context)) {
            Some(Ok(())) => one.shut = true,
            Some(Err(error)) => {
                assert!(one.peer_end == PeerEnd::Gone, "seed {seed}: connection {}: shutdown: {error}", one.id);
                (one.shut, one.refused) = (true, true);
            }
            None => {}
        }
        one.shut
    }

    fn we_abandon(&mut self, index: usize) {
        let one = &mut self.connections[index];
        if !one.abandoned {
            one.abandoned = true;
            self.driver.abandon(one.key);
            self.seen.abandoned += 1;
        }
    }

    /// Turns, with everybody reading what there is, until `done` holds for every connection.
    fn settle(&mut self, what: &str, done: impl Fn(&mut Self, usize) -> bool) {
        let (mut progress, mut progress_at) = (0, Instant::now());
        loop {
            turn(&mut self.driver, STEP);
            let mut left = None;
            for index in 0..self.connections.len() {
                self.peer_reads(index, 1 << 20);
                self.we_read(index, usize::MAX);
                if !done(self, index) {
                    left = Some(index);
                }
            }
            self.driver.end_turn();
            let Some(index) = left else { return };
            // Slow is not stuck, on a machine that does other things.
            let bytes = self.connections.iter().map(|one| one.received + one.peer_received).sum::<u64>();
            let steps = bytes + self.connections.iter().filter(|one| one.peer_saw_end || one.shut).count() as u64;
            if steps != progress {
                (progress, progress_at) = (steps, Instant::now());
            }
            let one = &self.connections[index];
            assert!(
                progress_at.elapsed() < Duration::from_secs(5),
                "seed {}: connection {} waited in vain for {what}: received {} of {}, peer received {} of {}, peer {:?}, \
                 abandoned {}, reader woken {}; in the kernel: {}",
                self.seed,
                one.id,
                one.received,
                one.peer_sent,
                one.peer_received,
                one.sent,
                one.peer_end,
                one.abandoned,
                one.reader.0.load(Ordering::Relaxed),
                kernel_view(&one.inode)
            );
        }
    }

    /// Everything sent arrives, every end is seen, every socket is closed.
    fn finish(mut self) -> Seen {
        self.settle("its bytes", |drive, index| {
            let one = &drive.connections[index];
            let ours = one.received == one.peer_sent || one.peer_end == PeerEnd::Gone && one.end.is_some();
            let theirs = one.peer_received == one.sent || one.peer_end == PeerEnd::Gone;
            one.abandoned || ours && theirs
        });
        for index in 0..self.connections.len() {
            self.peer_closes_its_half(index);
        }
        self.settle("its end", |drive, index| {
            let shut = drive.we_shut(index);
            let one = &drive.connections[index];
            one.peer_saw_end && (one.abandoned || shut && one.end.is_some())
        });
        self.rests();
        for index in 0..self.connections.len() {
            self.we_abandon(index);
        }
        let seed = self.seed;
        turn_until(&mut self.driver, "the sockets' close", |driver| driver.sockets() == 0);
        turn_until(&mut self.driver, "the end of all operations", |driver| driver.ring().in_flight() <= 1);
        assert_eq!(self.open_sockets(), Vec::<String>::new(), "seed {seed}: still open");
        self.end()
    }

    /// When nothing happens the driver waits, and only a tick ends the wait.
    fn rests(&mut self) {
        let start = Instant::now();
        for _ in 0..10 {
            turn(&mut self.driver, Some(Duration::from_millis(2)));
            self.driver.end_turn();
        }
        let took = start.elapsed();
        assert!(took > Duration::from_millis(8), "seed {}: ten waits of 2 ms took {took:?}: it spins", self.seed);
    }

    /// Drops the driver as it is, whatever is in flight.
    fn cut(mut self) -> Seen {
        for index in 0..self.connections.len() {
            self.connections[index].abandoned = true;
        }
        self.end()
    }

    fn end(self) -> Seen {
        let Self { seed, driver, connections, closed_inodes, seen, .. } = self;
        ends();
        drop(driver);
        assert_eq!(ends(), [0], "seed {seed}: operations in flight when the buffers were freed");
        let open = descriptors();
        for inode in closed_inodes.iter().chain(connections.iter().map(|one| &one.inode)) {
            assert!(!open.values().any(|target| target == inode), "seed {seed}: {inode} is still open");
        }
        for mut peer in connections.into_iter().filter_map(|one| one.peer) {
            peer.set_nonblocking(false).expect("a socket");
            peer.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket");
            if let Err(error) = peer.read_to_end(&mut Vec::new()) {
                assert!(error.kind() == ErrorKind::ConnectionReset, "seed {seed}: the peer saw no end: {error}");
            }
        }
        seen
    }

    fn open_sockets(&self) -> Vec<String> {
        let open = descriptors();
        let mine = self.connections.iter().map(|one| &one.inode).chain(&self.closed_inodes);
        mine.filter(|inode| open.values().any(|target| target == *inode)).cloned().collect()
    }
}

fn inode(fd: &OwnedFd) -> String {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("/proc is mounted");
    link.to_string_lossy().into_owned()
}

fn drive(seed: u64) -> Seen {
    let _watchdog = Watchdog::new(format!("RINGLEADER_SEED={seed}"), Duration::from_secs(300));
    let mut drive = Drive::new(seed);
    for _ in 0..3000 {
        drive.step();
    }
    if seed % 4 == 3 { drive.cut() } else { drive.finish() }
}

#[test]
fn a_random_drive_loses_invents_and_mixes_up_nothing() {
    if let Some(seed) = seed_to_replay() {
        println!("{:?}", drive(seed));
        return;
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    let mut seen = Seen::default();
    // As many again as are asked for: `RINGLEADER_DRIVES=1000`.
    let drives = std::env::var("RINGLEADER_DRIVES").ok().and_then(|count| count.parse().ok()).unwrap_or(4);
    for seed in (0..4).chain((0..drives).map(|index| (now / 4 + index) & 0xFFFF_FFFF)) {
        println!("RINGLEADER_SEED={seed}");
        let one = drive(seed);
        println!("{one:?}");
        seen.full += one.full;
        seen.blocked += one.blocked;
        seen.ends += one.ends;
        seen.errors += one.errors;
        seen.abandoned += one.abandoned;
    }
    let met = [seen.full, seen.blocked, seen.ends, seen.errors, seen.abandoned];
    assert!(met.iter().all(|count| *count > 0), "the drives have not met everything they are there for: {seen:?}");
}
