//! What the clients of phase B do. An act fails with `InvalidData` when an answer is wrong, with anything else when there
//! was none. To add one: a function and a row.

use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::sleep;

use super::WORKLOAD_BODY;
use super::mixed::Actor;
use crate::client::{self, Client, wrong};
use crate::random::Random;

type Performing<'a> = Pin<Box<dyn Future<Output = io::Result<()>> + 'a>>;

pub struct Act {
    pub name: &'static str,
    /// Of the sum of all, how often.
    pub weight: usize,
    pub perform: fn(&mut Actor) -> Performing<'_>,
}

pub const ACTS: &[Act] = &[
    Act {
        name: "keep-alive, pauses of 0 to 50 ms, sometimes 1 to 3 s",
        weight: 30,
        perform: |a| Box::pin(keep_alive(a)),
    },
    Act { name: "pipelined", weight: 15, perform: |a| Box::pin(pipelined(a)) },
    Act { name: "echo, chunked", weight: 15, perform: |a| Box::pin(echo(a, true)) },
    Act { name: "echo, with a length", weight: 10, perform: |a| Box::pin(echo(a, false)) },
    Act { name: "slow reader", weight: 3, perform: |a| Box::pin(slow_reader(a)) },
    Act { name: "half-close", weight: 10, perform: |a| Box::pin(half_close(a)) },
    Act { name: "reset in the middle", weight: 10, perform: |a| Box::pin(reset(a)) },
    Act { name: "/chaos/sleep", weight: 5, perform: |a| Box::pin(chaos_sleep(a)) },
    Act { name: "never speaks", weight: 5, perform: |a| Box::pin(silent(a)) },
];

impl Actor {
    async fn connect(&mut self, receive_buffer: u32) -> io::Result<Client> {
        let (began, source) = (Instant::now(), self.random.below(31));
        let client = Client::connect_from(self.stage.server, source, receive_buffer).await?;
        self.stage.seen.borrow_mut().connects.record(began.elapsed());
        Ok(client)
    }

    /// One request for / or /whoami, checked and timed.
    async fn ask(&mut self, client: &mut Client) -> io::Result<()> {
        let (whoami, began) = (self.random.percent(30), Instant::now());
        let answer = client.get(if whoami { "/whoami" } else { "/" }).await?;
        self.stage.waited("ask", began.elapsed());
        if whoami { client::whoami(&answer).map(|_| ()) } else { client::hello(&answer) }
    }

    /// A range of the block, for a body.
    fn body(&mut self) -> Range<usize> {
        let length = self.random.below(WORKLOAD_BODY + 1);
        let start = self.random.below(self.stage.block.len() - length);
        start..start + length
    }
}

async fn keep_alive(actor: &mut Actor) -> io::Result<()> {
    let mut client = actor.connect(0).await?;
    for _ in 0..actor.random.between(1, 20) {
        actor.ask(&mut client).await?;
        let pause = if actor.random.percent(4) { (1000, 3000) } else { (0, 50) };
        sleep(actor.random.milliseconds(pause.0, pause.1)).await;
    }
    if actor.random.percent(50) {
        client.reset();
    }
    Ok(())
}

async fn pipelined(actor: &mut Actor) -> io::Result<()> {
    let mut client = actor.connect(0).await?;
    for _ in 0..actor.random.between(1, 8) {
        let whoami: Vec<bool> = (0..actor.random.between(2, 32)).map(|_| actor.random.percent(30)).collect();
        let requests: String =
            whoami.iter().map(|&whoami| client::get(if whoami { "/whoami" } else { "/" }, false)).collect();
        let began = Instant::now();
        // Sometimes torn apart at any byte.
        let cut = if actor.random.percent(30) { actor.random.below(requests.len()) } else { 0 };
        client.send(&requests.as_bytes()[..cut]).await?;
        if cut > 0 {
            sleep(actor.random.milliseconds(0, 3)).await;
        }
        client.send(&requests.as_bytes()[cut..]).await?;
        for whoami in whoami {
            let answer = client.answer().await?;
            if whoami { client::whoami(&answer).map(|_| ())? } else { client::hello(&answer)? }
        }
        actor.stage.waited("pipeline", began.elapsed());
    }
    Ok(())
}

/// Uploads and reads back at the same time, once to three times on one connection.
async fn echo(actor: &mut Actor, chunked: bool) -> io::Result<()> {
    let mut client = actor.connect(0).await?;
    for _ in 0..actor.random.between(1, 3) {
        let range = actor.body();
        let began = Instant::now();
        let stage = actor.stage.clone();
        let body = &stage.block[range];
        let Client { stream, received } = &mut client;
        let (mut reader, mut writer) = stream.split();
        let upload = upload(&mut writer, body, chunked, &mut actor.random);
        let download = async {
            let head = received.head(&mut reader).await?;
            if head.status != 200 {
                return Err(wrong(format!("/echo answered {}", head.status)));
            }
            let mut left = body;
            received.body(&mut reader, head.framing, &mut |piece| take(&mut left, piece)).await?;
            if left.is_empty() {
                Ok(())
            } else {
                Err(wrong(format!("the last {} bytes of the echo are missing", left.len())))
            }
        };
        tokio::try_join!(upload, download)?;
        actor.stage.echoed(began.elapsed());
    }
    actor.ask(&mut client).await
}

async fn upload(
    writer: &mut (impl AsyncWrite + Unpin),
    body: &[u8],
    chunked: bool,
    random: &mut Random,
) -> io::Result<()> {
    let framing =
        if chunked { "Transfer-Encoding: chunked".to_owned() } else { format!("Content-Length: {}", body.len()) };
    writer.write_all(format!("POST /echo HTTP/1.1\r\nHost: proof\r\n{framing}\r\n\r\n").as_bytes()).await?;
    let mut left = body;
    while !left.is_empty() {
        let (piece, rest) = left.split_at(random.between(1, 64 * 1024).min(left.len()));
        if chunked {
            writer.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await?;
        }
        writer.write_all(piece).await?;
        if chunked {
            writer.write_all(b"\r\n").await?;
        }
        if random.percent(10) {
            sleep(random.milliseconds(0, 10)).await;
        }
        left = rest;
    }
    if chunked { writer.write_all(b"0\r\n\r\n").await } else { Ok(()) }
}

fn take(left: &mut &[u8], piece: &[u8]) -> io::Result<()> {
    match left.strip_prefix(piece) {
        Some(rest) => {
            *left = rest;
            Ok(())
        }
        None => Err(wrong(format!("the echo differs within the {} bytes before the last {}", piece.len(), left.len()))),
    }
}

/// An echo that is read in small pieces with pauses, through a small receive buffer.
async fn slow_reader(actor: &mut Actor) -> io::Result<()> {
    let mut client = actor.connect(4096).await?;
    let range = actor.body();
    let stage = actor.stage.clone();
    let body = &stage.block[range];
    let Client { stream, received } = &mut client;
    let (mut reader, mut writer) = stream.split();
    let pauses = Duration::from_micros(actor.random.between(500, 5000) as u64);
    let upload = upload(&mut writer, body, true, &mut actor.random);
    let download = async {
        let mut slow = Slow::default();
        let until = Instant::now() + Duration::from_secs(8);
        // The slow part: bytes as they come, kept for the check.
        while Instant::now() < until {
            let mut piece = [0; 4096];
            let count = reader.read(&mut piece[..1 + slow.bytes.len() % 4096]).await?;
            slow.bytes.extend_from_slice(&piece[..count]);
            if count == 0 || slow.bytes.ends_with(b"\r\n0\r\n\r\n") {
                break;
            }
            sleep(pauses).await;
        }
        let mut chained = slow.bytes.as_slice().chain(&mut reader);
        let head = received.head(&mut chained).await?;
        let mut left = body;
        received.body(&mut chained, head.framing, &mut |piece| take(&mut left, piece)).await?;
        if left.is_empty() { Ok(()) } else { Err(wrong("the end of a slow echo is missing")) }
    };
    tokio::try_join!(upload, download).map(|_| ())
}

#[derive(Default)]
struct Slow {
    bytes: Vec<u8>,
}

/// Closes its half after the request, and still wants the answer.
async fn half_close(actor: &mut Actor) -> io::Result<()> {
    let mut client = actor.connect(0).await?;
    let began = Instant::now();
    if actor.random.percent(50) {
        client.send(client::get("/", false).as_bytes()).await?;
    } else {
        client.send(b"POST /echo HTTP/1.1\r\nHost: proof\r\nContent-Length: 13\r\n\r\nHello, World!").await?;
    }
    if actor.random.percent(50) {
        sleep(actor.random.milliseconds(0, 5)).await;
    }
    client.stream.shutdown().await?;
    client::hello(&client.answer().await?)?;
    client.closed().await?;
    actor.stage.waited("half-close", began.elapsed());
    Ok(())
}

/// Says a part of something, perhaps reads a part of the answer, and resets. Nothing is expected of the server.
async fn reset(actor: &mut Actor) -> io::Result<()> {
    let mut client = actor.connect(0).await?;
    let (kind, length) = (actor.random.below(4), actor.random.between(1, 200 * 1024));
    let said = match kind {
        0 => client.send(b"GET /who").await,
        1 => client.send(client::get("/chaos/sleep?ms=50", false).as_bytes()).await,
        2 => {
            let head = "POST /echo HTTP/1.1\r\nHost: proof\r\nContent-Length: 300000\r\n\r\n";
            let part = [head.as_bytes(), &actor.stage.block[..length]].concat();
            // The echo is not read: the server may well stop reading.
            let _ = tokio::time::timeout(Duration::from_millis(20), client.send(&part)).await;
            Ok(())
        }
        _ => client.send(client::get("/", false).repeat(length % 200 + 1).as_bytes()).await,
    };
    said?;
    sleep(actor.random.milliseconds(0, 20)).await;
    if actor.random.percent(50) {
        let _ = tokio::time::timeout(Duration::from_millis(5), client.received.fill(&mut client.stream)).await;
    }
    if actor.random.percent(80) {
        client.reset();
    }
    Ok(())
}

async fn chaos_sleep(actor: &mut Actor) -> io::Result<()> {
    let mut client = actor.connect(0).await?;
    let time = actor.random.milliseconds(0, 300);
    let began = Instant::now();
    let answer = client.get(&format!("/chaos/sleep?ms={}", time.as_millis())).await?;
    let took = began.elapsed();
    if answer.status != 200 || took < time {
        return Err(wrong(format!("a sleep of {time:?} answered {} after {took:?}", answer.status)));
    }
    actor.stage.waited("sleep, beyond its time", took - time);
    actor.ask(&mut client).await
}

/// Connects and says nothing; sometimes it speaks up in the end.
async fn silent(actor: &mut Actor) -> io::Result<()> {
    let mut client = actor.connect(0).await?;
    sleep(actor.random.milliseconds(0, 4000)).await;
    match actor.random.below(3) {
        0 => client.reset(),
        1 => {}
        _ => actor.ask(&mut client).await?,
    }
    Ok(())
}
