//! A client that sends exactly the bytes it is given and sees exactly what comes back.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;

use super::BOUND;

/// A connection. Every read and write fails after [`BOUND`], so that no test hangs.
pub struct Client {
    stream: TcpStream,
    /// Received, not yet looked at.
    input: Vec<u8>,
}

/// A response.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// The status line and the header fields, in lower case.
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("the body is text")
    }

    /// The server has said that it will close.
    pub fn closes(&self) -> bool {
        self.header("connection") == Some("close")
    }
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        Self::try_connect(address).expect("the server accepts a connection")
    }

    pub fn try_connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, BOUND)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(BOUND))?;
        stream.set_write_timeout(Some(BOUND))?;
        Ok(Self { stream, input: Vec::new() })
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).expect("the server takes what is sent");
    }

    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref())
    }

    pub fn get(&mut self, path: &str) -> Answer {
        self.ask(path);
        self.answer()
    }

    /// Sends a GET and does not wait.
    pub fn ask(&mut self, path: &str) {
        self.send(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"));
    }

    /// Reads a response to the end of its body.
    #[track_caller]
    pub fn answer(&mut self) -> Answer {
        self.try_answer().expect("a complete answer arrives")
    }

    pub fn try_answer(&mut self) -> io::Result<Answer> {
        let mut answer = self.try_head()?;
        if answer.header("transfer-encoding") == Some("chunked") {
            while let Some(piece) = self.chunk()? {
                answer.body.extend(piece);
            }
        } else if let Some(length) = answer.header("content-length") {
            let length = length.parse().map_err(io::Error::other)?;
            answer.body = self.take(length)?;
        } else {
            while self.fill()? > 0 {}
            answer.body = std::mem::take(&mut self.input);
        }
        Ok(answer)
    }

    /// Reads a response that has no body, or whose body is of interest later.
    #[track_caller]
    pub fn head(&mut self) -> Answer {
        self.try_head().expect("the head of an answer arrives")
    }

    fn try_head(&mut self) -> io::Result<Answer> {
        let head = loop {
            if let Some(end) = find(&self.input, b"\r\n\r\n") {
                let head = self.input.drain(..end + 4).collect();
                break String::from_utf8(head).map_err(io::Error::other)?.to_ascii_lowercase();
            }
            self.fill_some()?;
        };
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("no status in {head:?}")))?;
        Ok(Answer { status, head, body: Vec::new() })
    }

    /// The next chunk of a chunked body; `None` is its end.
    pub fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let length = loop {
            if let Some(end) = find(&self.input, b"\r\n") {
                let line: Vec<u8> = self.input.drain(..end + 2).collect();
                let digits = std::str::from_utf8(&line).map_err(io::Error::other)?.trim();
                break usize::from_str_radix(digits, 16).map_err(io::Error::other)?;
            }
            self.fill_some()?;
        };
        let mut piece = self.take(length + 2)?;
        piece.truncate(length);
        Ok((length > 0).then_some(piece))
    }

    /// Exactly so many bytes.
    pub fn take(&mut self, count: usize) -> io::Result<Vec<u8>> {
        while self.input.len() < count {
            self.fill_some()?;
        }
        Ok(self.input.drain(..count).collect())
    }

    /// What has arrived, or arrives next; empty at the end of the stream.
    pub fn some(&mut self) -> io::Result<Vec<u8>> {
        if self.input.is_empty() {
            self.fill()?;
        }
        Ok(std::mem::take(&mut self.input))
    }

    /// Reads and throws away until the connection ends; how it does.
    pub fn outlast(&mut self) -> io::Error {
        loop {
            match self.some() {
                Ok(bytes) if bytes.is_empty() => return io::ErrorKind::UnexpectedEof.into(),
                Ok(_) => {}
                Err(error) => return error,
            }
        }
    }

    /// The server closes or resets the connection, and sends nothing before it does.
    #[track_caller]
    pub fn expect_end(&mut self) {
        if let Some(unexpected) = self.unless_ended() {
            panic!("{unexpected} instead of the connection's end");
        }
    }

    fn unless_ended(&mut self) -> Option<String> {
        match self.some() {
            Ok(bytes) if bytes.is_empty() => None,
            Ok(bytes) => Some(format!("{:?} arrived", String::from_utf8_lossy(&bytes))),
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => None,
            Err(error) => Some(error.to_string()),
        }
    }

    /// Ends our direction; the other one stays open.
    pub fn finish_sending(&mut self) {
        self.stream.shutdown(Shutdown::Write).expect("the connection is open");
    }

    /// Ends the connection with RST.
    pub fn reset(self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        // SAFETY: `linger` is a valid `struct linger`, its size is given, and the descriptor is open.
        let result = unsafe {
            libc::setsockopt(
                self.stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                (&raw const linger).cast(),
                size_of::<libc::linger>() as libc::socklen_t,
            )
        };
        assert_eq!(result, 0, "SO_LINGER: {}", io::Error::last_os_error());
    }

    /// A second handle of the same connection, to send while reading.
    pub fn sender(&self) -> TcpStream {
        self.stream.try_clone().expect("a descriptor is free")
    }

    fn fill_some(&mut self) -> io::Result<()> {
        if self.fill()? == 0 {
            let got = String::from_utf8_lossy(&self.input[..self.input.len().min(200)]).into_owned();
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the stream ended after {} bytes: {got:?}", self.input.len()),
            ));
        }
        Ok(())
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 16 * 1024];
        let count = self.stream.read(&mut buffer)?;
        self.input.extend_from_slice(&buffer[..count]);
        Ok(count)
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
