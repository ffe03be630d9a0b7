//! The load for counting: keep-alive connections that ask again and again, in one of two patterns. wrk cannot be used:
//! what is counted has to be divided by the answers of exactly that time, and a stepped server answers some fifty times
//! a second.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use ringleader_peers::BODY;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// When the next request follows an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    /// At once, on its connection: as wrk does. The server never runs out of work.
    Saturated,
    /// When all have been answered and the server has gone to sleep: it is woken for each round.
    Asleep,
}

impl Pattern {
    pub fn name(self) -> &'static str {
        match self {
            Self::Saturated => "saturated",
            Self::Asleep => "asleep",
        }
    }
}

/// What the load and who counts know of each other.
#[derive(Debug, Default)]
pub struct Gauge {
    /// Whole answers.
    pub answers: AtomicU64,
    /// Instructions that have been stepped over.
    pub steps: AtomicU64,
    /// The server's thread is stepped, and now in the kernel.
    pub in_kernel: AtomicBool,
    /// The server's thread is stepped.
    pub stepped: AtomicBool,
    /// The server's thread is not to be stepped on: a round of requests is on its way, and it shall find all of it.
    pub hold: AtomicBool,
    pub stop: AtomicBool,
}

/// Patience for an answer: a stepped server is a thousand times slower than usual.
const ANSWER_MAX: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };
/// A thread that has been in the kernel for so long has gone to sleep there.
const ASLEEP_AFTER: Duration = Duration::from_millis(3);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";

/// Connections, all open.
#[derive(Debug)]
pub struct Load {
    connections: Vec<Connection>,
    pattern: Pattern,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    /// Bytes of the answer that have come.
    came: Vec<u8>,
}

impl Load {
    /// Connects. `answer` is what each answer looks like but for its date.
    pub fn connect(port: u16, connections: u32, pattern: Pattern, answer_bytes: usize) -> io::Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let connect = |_| {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            Ok(Connection { stream, came: Vec::with_capacity(answer_bytes) })
        };
        let connections = (0..connections).map(connect).collect::<io::Result<_>>()?;
        Ok(Self { connections, pattern })
    }

    /// Asks until it is told to stop.
    pub fn run(mut self, gauge: &Gauge, answer_bytes: usize) -> Result<(), String> {
        let result = self.ask_all(gauge);
        let result = result.and_then(|()| self.go_on(gauge, answer_bytes));
        gauge.hold.store(false, Ordering::SeqCst);
        result.map_err(|error| format!("the load: {error}"))
    }

    fn ask_all(&mut self, gauge: &Gauge) -> io::Result<()> {
        gauge.hold.store(true, Ordering::SeqCst);
        for connection in &mut self.connections {
            connection.ask()?;
        }
        gauge.hold.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn go_on(&mut self, gauge: &Gauge, answer_bytes: usize) -> io::Result<()> {
        let mut unanswered = self.connections.len();
        while !gauge.stop.load(Ordering::SeqCst) {
            for index in self.readable()? {
                let connection = &mut self.connections[index];
                if !connection.is_answered(answer_bytes)? {
                    continue;
                }
                gauge.answers.fetch_add(1, Ordering::SeqCst);
                match self.pattern {
                    Pattern::Saturated => connection.ask()?,
                    Pattern::Asleep => unanswered -= 1,
                }
            }
            if unanswered == 0 {
                await_sleep(gauge);
                self.ask_all(gauge)?;
                unanswered = self.connections.len();
            }
        }
        Ok(())
    }

    fn readable(&self) -> io::Result<Vec<usize>> {
        let watch = |connection| PollFd::new(connection, PollFlags::IN);
        let mut watched: Vec<_> = self.connections.iter().map(|connection| watch(&connection.stream)).collect();
        if poll(&mut watched, Some(&ANSWER_MAX))? == 0 {
            return Err(io::Error::new(ErrorKind::TimedOut, "no answer within 20 s"));
        }
        let ready = watched.iter().enumerate().filter(|(_, watched)| !watched.revents().is_empty());
        Ok(ready.map(|(index, _)| index).collect())
    }
}

impl Connection {
    fn ask(&mut self) -> io::Result<()> {
        // A socket's empty buffer takes forty bytes at once.
        self.stream.write_all(REQUEST)
    }

    /// Reads what has come; true with the whole answer.
    fn is_answered(&mut self, answer_bytes: usize) -> io::Result<bool> {
        let mut part = [0; 4096];
        let count = match self.stream.read(&mut part) {
            Ok(0) => return Err(io::Error::new(ErrorKind::UnexpectedEof, "the server closed a connection")),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        self.came.extend_from_slice(&part[..count]);
        if self.came.len() < answer_bytes {
            return Ok(false);
        }
        let right = self.came.starts_with(b"HTTP/1.1 200 ") && self.came.ends_with(BODY.as_bytes());
        if !right || self.came.len() > answer_bytes {
            return Err(io::Error::other(format!("a wrong answer: {}", String::from_utf8_lossy(&self.came))));
        }
        self.came.clear();
        Ok(true)
    }
}

/// Returns when the server's thread has been in the kernel for a while, or has had the time to get there when it is not
/// stepped and therefore not watched.
fn await_sleep(gauge: &Gauge) {
    let mut since = Instant::now();
    let mut steps = gauge.steps.load(Ordering::SeqCst);
    while since.elapsed() < ASLEEP_AFTER && !gauge.stop.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_micros(200));
        let now = gauge.steps.load(Ordering::SeqCst);
        if now != steps || gauge.stepped.load(Ordering::SeqCst) && !gauge.in_kernel.load(Ordering::SeqCst) {
            (since, steps) = (Instant::now(), now);
        }
    }
}
