//! The load of the escapes: clients that keep a connection, clients in the middle of a body, clients that come and go.
//! Each sees the end of its connection at once, also while it pauses.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{sleep, timeout};

use super::stage::{Known, Stage};
use crate::client::{self, Client, wrong};
use crate::random::{self, Random};

/// After this a request counts as unanswered.
const ANSWER_MAX: Duration = Duration::from_secs(10);
const PIECE: usize = 16 * 1024;
/// Pieces of one body before the next request.
const PIECES_MAX: usize = 2000;

pub fn start(stage: &Rc<Stage>, keep_alive: usize, uploads: usize, fresh: usize) -> Vec<JoinHandle<()>> {
    let block: Rc<Vec<u8>> = Rc::new(random::block(7, 4 * PIECE));
    let mut clients = Vec::new();
    for number in 0..keep_alive {
        clients.push(spawn_local(steady(Rc::clone(stage), Random::of(1, number), None)));
    }
    for number in 0..uploads {
        clients.push(spawn_local(steady(Rc::clone(stage), Random::of(2, number), Some(Rc::clone(&block)))));
    }
    for number in 0..fresh {
        clients.push(spawn_local(come_and_go(Rc::clone(stage), Random::of(3, number))));
    }
    clients
}

/// Connects, learns who answers, and stays until the connection ends; again and again.
async fn steady(stage: Rc<Stage>, mut random: Random, block: Option<Rc<Vec<u8>>>) {
    while !stage.is_stopped() {
        let Some((mut client, known)) = introduced(&stage).await else {
            sleep(Duration::from_millis(5)).await;
            continue;
        };
        let in_body = block.is_some();
        let stayed = match &block {
            None => keep_asking(&stage, &mut client, &known, &mut random).await,
            Some(block) => keep_uploading(&stage, &mut client, block, &mut random).await,
        };
        match stayed {
            Ok(()) => {
                stage.leave(&known);
                client.reset();
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                stage.seen.borrow_mut().wrong.note(|| format!("{:?}: {error}", known.who));
                stage.leave(&known);
            }
            Err(error) => stage.ended(&known, in_body, &error),
        }
    }
}

/// A new connection that has been answered once.
pub async fn introduced(stage: &Stage) -> Option<(Client, Known)> {
    let began = Instant::now();
    let mut connected = None;
    let introduction = async {
        let mut client = Client::connect(stage.server).await?;
        connected = Some(Instant::now());
        let answer = client.get("/whoami").await?;
        Ok((client, client::whoami(&answer)?))
    };
    match in_time(introduction).await {
        Ok((client, who)) => Some((client, stage.register(who))),
        Err(error) => {
            stage.fresh_failed(began, connected, &error);
            None
        }
    }
}

async fn in_time<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match timeout(ANSWER_MAX, work).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer")),
    }
}

async fn keep_asking(stage: &Stage, client: &mut Client, known: &Known, random: &mut Random) -> io::Result<()> {
    while !stage.is_stopped() {
        tokio::select! {
            () = sleep(random.milliseconds(5, 20)) => {}
            closed = client.closed() => {
                closed?;
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed"));
            }
        }
        let answer = in_time(client.get("/whoami")).await?;
        let who = client::whoami(&answer)?;
        if who != known.who {
            return Err(wrong(format!("a connection changed its executor to {who:?}")));
        }
        stage.seen.borrow_mut().asked += 1;
    }
    Ok(())
}

/// Uploads an endless body piece by piece, each echoed before the next, so that the connection is always in the middle.
async fn keep_uploading(stage: &Stage, client: &mut Client, block: &[u8], random: &mut Random) -> io::Result<()> {
    while !stage.is_stopped() {
        let (echoed, news) = (Cell::new(0), Notify::new());
        let Client { stream, received } = &mut *client;
        let (mut reader, mut writer) = stream.split();
        let download = async {
            let head = received.head(&mut reader).await?;
            if head.status != 200 {
                return Err(wrong(format!("/echo answered {}", head.status)));
            }
            received
                .body(&mut reader, head.framing, &mut |piece| {
                    let at = echoed.get();
                    echoed.set(at + piece.len());
                    news.notify_one();
                    check(block, at, piece)
                })
                .await
        };
        let upload = async {
            writer.write_all(b"POST /echo HTTP/1.1\r\nHost: proof\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
            for number in 1..=PIECES_MAX {
                let piece = &block[(number - 1) * PIECE % block.len()..][..PIECE];
                writer.write_all(&[format!("{PIECE:x}\r\n").as_bytes(), piece, b"\r\n"].concat()).await?;
                in_time(async {
                    while echoed.get() < number * PIECE {
                        news.notified().await;
                    }
                    Ok(())
                })
                .await?;
                stage.seen.borrow_mut().pieces += 1;
                if stage.is_stopped() {
                    break;
                }
                sleep(random.milliseconds(5, 20)).await;
            }
            writer.write_all(b"0\r\n\r\n").await
        };
        tokio::try_join!(download, upload)?;
    }
    Ok(())
}

/// Compares a piece of the echo with the block, which repeats.
fn check(block: &[u8], mut at: usize, mut piece: &[u8]) -> io::Result<()> {
    while !piece.is_empty() {
        let expected = &block[at % block.len()..];
        let count = expected.len().min(piece.len());
        if expected[..count] != piece[..count] {
            return Err(wrong(format!("the echo differs near byte {at}")));
        }
        piece = &piece[count..];
        at += count;
    }
    Ok(())
}

/// Connects again and again without a pause until the victim's next generation has answered somebody.
pub async fn probe(stage: Rc<Stage>) {
    while !stage.is_stopped() && !stage.serves_again() {
        if let Some((client, known)) = introduced(&stage).await {
            stage.leave(&known);
            client.reset();
        }
    }
}

async fn come_and_go(stage: Rc<Stage>, mut random: Random) {
    while !stage.is_stopped() {
        if let Some((client, known)) = introduced(&stage).await {
            stage.leave(&known);
            stage.seen.borrow_mut().fresh += 1;
            if random.percent(50) {
                client.reset();
            }
        }
        sleep(random.milliseconds(1, 5)).await;
    }
}
