//! An HTTP/1.1 client that trusts nothing: it sees every byte, and closes as it is told.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

const READ_SIZE: usize = 16 * 1024;
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Source addresses, so that ports in TIME_WAIT never run out: 127.0.0.2 to 127.0.0.32.
const SOURCES: usize = 31;

/// How a message's body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
}

/// A response's head.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    pub status: u16,
    pub framing: Framing,
    pub close: bool,
}

pub struct Answer {
    pub status: u16,
    /// The server has said that it will close.
    pub close: bool,
    pub body: Vec<u8>,
}

/// Bytes received and not yet used.
#[derive(Default)]
pub struct Received {
    bytes: Vec<u8>,
    used: usize,
}

pub struct Client {
    pub stream: TcpStream,
    pub received: Received,
}

pub fn wrong(text: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text.into())
}

impl Client {
    pub async fn connect(server: SocketAddr) -> io::Result<Self> {
        Self::with(TcpStream::connect(server).await?)
    }

    /// Without Nagle's delay: the waits measured are the server's.
    fn with(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, received: Received::default() })
    }

    /// From one of 31 source addresses, chosen by `number`; `receive_buffer` bytes if that is not 0.
    pub async fn connect_from(server: SocketAddr, number: usize, receive_buffer: u32) -> io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        crate::sys::bind_without_port(&socket)?;
        if receive_buffer > 0 {
            socket.set_recv_buffer_size(receive_buffer)?;
        }
        socket.bind(SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2 + (number % SOURCES) as u8), 0)))?;
        Self::with(socket.connect(server).await?)
    }

    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Reads one response.
    pub async fn answer(&mut self) -> io::Result<Answer> {
        let head = self.received.head(&mut self.stream).await?;
        let mut body = Vec::new();
        self.received
            .body(&mut self.stream, head.framing, &mut |piece| {
                body.extend_from_slice(piece);
                Ok(())
            })
            .await?;
        Ok(Answer { status: head.status, close: head.close, body })
    }

    pub async fn get(&mut self, path: &str) -> io::Result<Answer> {
        self.send(get(path, false).as_bytes()).await?;
        self.answer().await
    }

    /// Ready when the server closes (`Ok`), resets or says something unasked (`Err`).
    pub async fn closed(&mut self) -> io::Result<()> {
        match self.received.fill(&mut self.stream).await {
            Ok(0) => Ok(()),
            Ok(count) => Err(wrong(format!("{count} bytes that were not asked for"))),
            Err(error) => Err(error),
        }
    }

    /// Closes with RST: no TIME_WAIT stays behind.
    pub fn reset(self) {
        let _ = self.stream.set_zero_linger();
    }
}

pub fn get(path: &str, close: bool) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: proof\r\n{}\r\n", if close { "Connection: close\r\n" } else { "" })
}

impl Received {
    fn rest(&self) -> &[u8] {
        &self.bytes[self.used..]
    }

    pub fn is_empty(&self) -> bool {
        self.used == self.bytes.len()
    }

    fn consume(&mut self, count: usize) {
        self.used += count;
        if self.is_empty() {
            self.bytes.clear();
            self.used = 0;
        }
    }

    /// Receives once; 0 bytes is the end.
    pub async fn fill(&mut self, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
        self.bytes.reserve(if self.bytes.capacity() == 0 { 1024 } else { READ_SIZE.min(self.bytes.capacity() * 2) });
        reader.read_buf(&mut self.bytes).await
    }

    async fn more(&mut self, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        match self.fill(reader).await? {
            0 => Err(io::Error::new(ErrorKind::UnexpectedEof, "closed in the middle of an answer")),
            _ => Ok(()),
        }
    }

    /// Reads a head. EOF before its first byte is `ConnectionAborted`, later `UnexpectedEof`.
    pub async fn head(&mut self, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Head> {
        loop {
            if let Some(end) = find(self.rest(), b"\r\n\r\n") {
                let head = parse_head(&self.rest()[..end])?;
                self.consume(end + 4);
                return Ok(head);
            }
            if self.rest().len() > HEAD_BYTES_MAX {
                return Err(wrong("a head without an end"));
            }
            let nothing_yet = self.is_empty();
            self.more(reader).await.map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof if nothing_yet => {
                    io::Error::new(ErrorKind::ConnectionAborted, "closed without an answer")
                }
                _ => error,
            })?;
        }
    }

    async fn line(&mut self, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
        loop {
            if let Some(end) = find(self.rest(), b"\r\n") {
                let line = String::from_utf8_lossy(&self.rest()[..end]).into_owned();
                self.consume(end + 2);
                return Ok(line);
            }
            if self.rest().len() > HEAD_BYTES_MAX {
                return Err(wrong("a line without an end"));
            }
            self.more(reader).await?;
        }
    }

    /// Reads a body to its end, piece by piece.
    pub async fn body(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        framing: Framing,
        piece: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        match framing {
            Framing::Length(length) => self.counted(reader, length, piece).await,
            Framing::Chunked => self.chunks(reader, piece).await,
            Framing::UntilClose => loop {
                piece(self.rest())?;
                self.consume(self.rest().len());
                if self.fill(reader).await? == 0 {
                    return Ok(());
                }
            },
        }
    }

    async fn counted(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        mut left: u64,
        piece: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        while left > 0 {
            if self.is_empty() {
                self.more(reader).await?;
            }
            let count = self.rest().len().min(usize::try_from(left).unwrap_or(usize::MAX));
            piece(&self.rest()[..count])?;
            self.consume(count);
            left -= count as u64;
        }
        Ok(())
    }

    async fn chunks(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        piece: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        loop {
            let line = self.line(reader).await?;
            let size = line.split(';').next().unwrap_or_default().trim();
            let size = u64::from_str_radix(size, 16).map_err(|_| wrong(format!("chunk size {line:?}")))?;
            self.counted(reader, size, piece).await?;
            let end = self.line(reader).await?;
            if !end.is_empty() {
                return Err(wrong(format!("{end:?} instead of the end of a chunk")));
            }
            if size == 0 {
                return Ok(());
            }
        }
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

fn parse_head(bytes: &[u8]) -> io::Result<Head> {
    let text = std::str::from_utf8(bytes).map_err(|_| wrong("a head that is not text"))?;
    let mut lines = text.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = first.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
    let status: u16 = status.ok_or_else(|| wrong(format!("status line {first:?}")))?;
    let mut head = Head { status, framing: Framing::UntilClose, close: false };
    for line in lines {
        let (name, value) = line.split_once(':').ok_or_else(|| wrong(format!("header line {line:?}")))?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            head.framing = Framing::Length(value.parse().map_err(|_| wrong(format!("length {value:?}")))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") && value.eq_ignore_ascii_case("chunked") {
            head.framing = Framing::Chunked;
        } else if name.eq_ignore_ascii_case("connection") {
            head.close = value.eq_ignore_ascii_case("close");
        }
    }
    if status == 204 || status == 304 || status / 100 == 1 {
        head.framing = Framing::Length(0);
    }
    Ok(head)
}

/// Who answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Whoami {
    pub executor: usize,
    pub generation: u64,
    pub pid: u32,
}

/// Reads the answer of /whoami.
pub fn whoami(answer: &Answer) -> io::Result<Whoami> {
    let text = String::from_utf8_lossy(&answer.body);
    let number = |name: &str| -> Option<u64> {
        let (_, rest) = text.split_once(&format!("\"{name}\":"))?;
        rest.split(|byte: char| !byte.is_ascii_digit()).next()?.parse().ok()
    };
    match (answer.status, number("executor"), number("generation"), number("pid")) {
        (200, Some(executor), Some(generation), Some(pid)) => {
            Ok(Whoami { executor: executor as usize, generation, pid: pid as u32 })
        }
        _ => Err(wrong(format!("/whoami answered {} {text:?}", answer.status))),
    }
}

/// Checks the answer of /.
pub fn hello(answer: &Answer) -> io::Result<()> {
    match (answer.status, answer.body.as_slice()) {
        (200, b"Hello, World!") => Ok(()),
        (status, body) => Err(wrong(format!("/ answered {status} {:?}", String::from_utf8_lossy(body)))),
    }
}
