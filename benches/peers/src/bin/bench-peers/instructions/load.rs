//! The load for counting: keep-alive connections that ask again as soon as they are answered. wrk cannot be used: what is
//! counted has to be divided by the answers of exactly that time, and a stepped server answers some ten times a second.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ringleader_peers::BODY;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// What the load and who counts know of each other.
#[derive(Debug, Default)]
pub struct Gauge {
    /// Whole answers.
    pub answers: AtomicU64,
    pub stop: AtomicBool,
}

/// Patience for an answer: a stepped server is a thousand times slower than usual.
const ANSWER_MAX: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";

/// Connections, all open.
#[derive(Debug)]
pub struct Load(Vec<Connection>);

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    /// Bytes of the answer that have come.
    came: Vec<u8>,
}

impl Load {
    /// Connects, for answers of so many bytes.
    pub fn connect(port: u16, connections: u32, answer_bytes: usize) -> io::Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let connect = |_| {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            Ok(Connection { stream, came: Vec::with_capacity(answer_bytes) })
        };
        (0..connections).map(connect).collect::<io::Result<_>>().map(Self)
    }

    /// Asks until it is told to stop.
    pub fn run(mut self, gauge: &Gauge, answer_bytes: usize) -> Result<(), String> {
        self.ask_and_ask(gauge, answer_bytes).map_err(|error| format!("the load: {error}"))
    }

    fn ask_and_ask(&mut self, gauge: &Gauge, answer_bytes: usize) -> io::Result<()> {
        for connection in &mut self.0 {
            connection.ask()?;
        }
        while !gauge.stop.load(Ordering::SeqCst) {
            for index in self.readable()? {
                let connection = &mut self.0[index];
                if connection.is_answered(answer_bytes)? {
                    gauge.answers.fetch_add(1, Ordering::SeqCst);
                    connection.ask()?;
                }
            }
        }
        Ok(())
    }

    fn readable(&self) -> io::Result<Vec<usize>> {
        let watch = |connection| PollFd::new(connection, PollFlags::IN);
        let mut watched: Vec<_> = self.0.iter().map(|connection| watch(&connection.stream)).collect();
        if poll(&mut watched, Some(&ANSWER_MAX))? == 0 {
            return Err(io::Error::new(ErrorKind::TimedOut, "no answer within a minute"));
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
