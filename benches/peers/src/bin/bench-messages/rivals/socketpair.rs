//! A socketpair between two processes: messages and answers of 16 bytes, a number of the caller's and a value.
//!
//! Three forms, since what it costs depends on how many messages share a system call. The other process is the same for
//! the two on a stream: a thread that reads what is there, answers all of it, and writes once. It has no runtime.

use std::cell::RefCell;
use std::error::Error;
use std::future::poll_fn;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::task::{Poll, Waker};
use std::time::Duration;

use ringleader_peers::pin_to;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::channels::{runtime, work_and_yield};
use super::{calls_each, round_trips};
use crate::measure::{BUSY_TASKS, Flood, Sample, Scenario, answer, cpu_time, other_work};
use crate::options::Options;

const MESSAGE: usize = 16;
/// Room for 4,096 of them.
const BUFFER: usize = 4096 * MESSAGE;
/// The number of a message that asks for the other process's CPU time.
const ASKS_CPU_TIME: u64 = u64::MAX;

/// How the other process is to serve.
#[derive(Debug, Clone, Copy)]
pub enum Serve {
    Waiting,
    /// It has other work, too, and looks for messages in between.
    Busy,
}

impl FromStr for Serve {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "waiting" => Ok(Self::Waiting),
            "busy" => Ok(Self::Busy),
            _ => Err("waiting or busy is wanted".to_owned()),
        }
    }
}

/// Is the other process, until the first one closes its end.
pub fn serve(serve: Serve, options: &Options) -> Result<(), Box<dyn Error>> {
    pin_to(options.target_cpu)?;
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    socket.set_nonblocking(matches!(serve, Serve::Busy))?;
    let (mut state, mut buffer, mut have) = (0, vec![0; BUFFER], 0);
    loop {
        match read(&mut socket, &mut buffer[have..])? {
            Some(0) => return Ok(()),
            Some(count) => have += count,
            None => {
                other_work();
                continue;
            }
        }
        let whole = have - have % MESSAGE;
        for message in buffer[..whole].chunks_exact_mut(MESSAGE) {
            let (number, value) = decode(message);
            let value = match number {
                ASKS_CPU_TIME => cpu_time().as_nanos() as u64,
                _ => answer(&mut state, value),
            };
            message.copy_from_slice(&encode(number, value));
        }
        socket.write_all(&buffer[..whole])?;
        buffer.copy_within(whole..have, 0);
        have -= whole;
    }
}

/// `None` when there is nothing, and the socket is not to be waited for.
fn read(socket: &mut UnixStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match socket.read(buffer) {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

fn encode(number: u64, value: u64) -> [u8; MESSAGE] {
    let mut message = [0; MESSAGE];
    message[..8].copy_from_slice(&number.to_le_bytes());
    message[8..].copy_from_slice(&value.to_le_bytes());
    message
}

fn decode(message: &[u8]) -> (u64, u64) {
    let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    (number(&message[..8]), number(&message[8..MESSAGE]))
}

/// The other process, and our end of the socket to it.
struct Other {
    process: Child,
    socket: UnixStream,
}

impl Other {
    fn start(kind: SocketType, scenario: Scenario, options: &Options) -> Result<Self, Box<dyn Error>> {
        pin_to(options.caller_cpu)?;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        let serve = if scenario == Scenario::Busy { "busy" } else { "waiting" };
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--serve", serve, "--target-cpu", &options.target_cpu.to_string()]);
        Ok(Self { process: command.stdin(Stdio::from(theirs)).spawn()?, socket: ours.into() })
    }

    fn cpu_time(&mut self) -> io::Result<u64> {
        self.socket.write_all(&encode(ASKS_CPU_TIME, 0))?;
        let mut message = [0; MESSAGE];
        self.socket.read_exact(&mut message)?;
        Ok(decode(&message).1)
    }

    /// Measures `flood`, which answers so many calls, in both processes.
    fn measure(&mut self, calls: u64, flood: impl FnOnce(&mut UnixStream) -> io::Result<()>) -> io::Result<Sample> {
        let (began, theirs) = (Flood::begin(), self.cpu_time()?);
        flood(&mut self.socket)?;
        let theirs = self.cpu_time()? - theirs;
        let mut sample = began.end(calls);
        sample.cpu_ns += theirs;
        Ok(sample)
    }

    fn end(self) -> io::Result<()> {
        let Self { mut process, socket } = self;
        drop(socket);
        process.wait().map(drop)
    }
}

pub fn sample_plain(scenario: Scenario, options: &Options) -> Result<Sample, Box<dyn Error>> {
    let mut other = Other::start(SocketType::SEQPACKET, scenario, options)?;
    let mut sample = Sample::default();
    if let Scenario::Flood { callers } = scenario {
        for each in calls_each(options, callers) {
            let calls = each * callers as u64;
            sample = other.measure(calls, |socket| flood_plain(socket, callers as u64, calls))?;
        }
    } else {
        sample = round_trips_plain(scenario, &mut other.socket)?;
    }
    other.end()?;
    Ok(sample)
}

fn flood_plain(socket: &mut UnixStream, in_flight: u64, calls: u64) -> io::Result<()> {
    let mut message = [0; MESSAGE];
    for sent in 0..calls + in_flight {
        if sent >= in_flight {
            socket.read_exact(&mut message)?;
            std::hint::black_box(decode(&message));
        }
        if sent < calls {
            socket.write_all(&encode(sent, sent))?;
        }
    }
    Ok(())
}

fn round_trips_plain(scenario: Scenario, socket: &mut UnixStream) -> io::Result<Sample> {
    socket.set_nonblocking(scenario == Scenario::Busy)?;
    let call = |value| {
        let mut message = [0; MESSAGE];
        socket.write_all(&encode(0, value)).expect("the other process lives");
        while read(socket, &mut message).expect("the other process lives").is_none() {
            other_work();
        }
        std::future::ready(decode(&message).1)
    };
    let rest = |gap: Duration| {
        std::thread::sleep(gap);
        std::future::ready(())
    };
    Ok(futures_lite::future::block_on(round_trips(scenario, call, rest)))
}

pub fn sample_bare(scenario: Scenario, options: &Options) -> Result<Sample, Box<dyn Error>> {
    let Scenario::Flood { callers } = scenario else { return Err("it has floods only".into()) };
    let mut other = Other::start(SocketType::STREAM, scenario, options)?;
    let mut sample = Sample::default();
    for each in calls_each(options, callers) {
        let calls = each * callers as u64;
        sample = other.measure(calls, |socket| flood_bare(socket, callers as u64, calls))?;
    }
    other.end()?;
    Ok(sample)
}

/// Each answer is followed by another message; all that are there, by one write.
fn flood_bare(socket: &mut UnixStream, in_flight: u64, calls: u64) -> io::Result<()> {
    let (mut buffer, mut outgoing, mut have) = (vec![0; BUFFER], Vec::with_capacity(BUFFER), 0);
    (0..in_flight).for_each(|number| outgoing.extend(encode(number, number)));
    let (mut sent, mut answered) = (in_flight, 0);
    while answered < calls {
        socket.write_all(&outgoing)?;
        outgoing.clear();
        have += socket.read(&mut buffer[have..])?;
        let whole = have - have % MESSAGE;
        for message in buffer[..whole].chunks_exact(MESSAGE) {
            let (number, value) = decode(message);
            std::hint::black_box(value);
            answered += 1;
            if sent < calls {
                sent += 1;
                outgoing.extend(encode(number, sent));
            }
        }
        buffer.copy_within(whole..have, 0);
        have -= whole;
    }
    Ok(())
}

thread_local! {
    /// What the tasks of the one thread share. A place for each caller, which has one call at a time: no allocation.
    static LINE: RefCell<Line> = const { RefCell::new(Line { outgoing: Vec::new(), writer: None, places: Vec::new() }) };
}

struct Line {
    outgoing: Vec<u8>,
    writer: Option<Waker>,
    places: Vec<(Option<u64>, Option<Waker>)>,
}

fn on_line<R>(act: impl FnOnce(&mut Line) -> R) -> R {
    LINE.with_borrow_mut(act)
}

pub fn sample_multiplexed(scenario: Scenario, options: &Options) -> Result<Sample, Box<dyn Error>> {
    let mut other = Other::start(SocketType::STREAM, scenario, options)?;
    let callers = match scenario {
        Scenario::Flood { callers } => callers,
        _ => 1,
    };
    on_line(|line| line.places.resize_with(callers, Default::default));
    let runtime = runtime()?;
    let socket = other.socket.try_clone()?;
    socket.set_nonblocking(true)?;
    runtime.block_on(async {
        let (reader, writer) = tokio::net::UnixStream::from_std(socket)?.into_split();
        tokio::spawn(write_all(writer));
        tokio::spawn(read_all(reader));
        io::Result::Ok(())
    })?;
    let mut sample = Sample::default();
    if let Scenario::Flood { .. } = scenario {
        for each in calls_each(options, callers) {
            sample = measure_multiplexed(&mut other, &runtime, callers, each)?;
        }
    } else {
        sample = runtime.block_on(async {
            if scenario == Scenario::Busy {
                (0..BUSY_TASKS).for_each(|_| drop(tokio::spawn(work_and_yield())));
            }
            tokio::spawn(round_trips(scenario, |value| call(0, value), tokio::time::sleep)).await
        })?;
    }
    drop(runtime);
    other.end()?;
    Ok(sample)
}

fn measure_multiplexed(
    other: &mut Other,
    runtime: &tokio::runtime::Runtime,
    callers: usize,
    each: u64,
) -> io::Result<Sample> {
    // The file description is shared with the runtime, which is not running when this process asks for CPU times.
    other.socket.set_nonblocking(false)?;
    let calls = each * callers as u64;
    other.measure(calls, |socket| {
        socket.set_nonblocking(true)?;
        runtime.block_on(async {
            let tasks: Vec<_> = (0..callers).map(|number| tokio::spawn(caller(number, each))).collect();
            for task in tasks {
                task.await.expect("no caller panics");
            }
        });
        socket.set_nonblocking(false)
    })
}

async fn caller(number: usize, calls: u64) {
    for value in 0..calls {
        std::hint::black_box(call(number, value).await);
    }
}

async fn call(number: usize, value: u64) -> u64 {
    on_line(|line| {
        line.outgoing.extend(encode(number as u64, value));
        line.writer.take().into_iter().for_each(Waker::wake);
    });
    poll_fn(|context| {
        on_line(|line| {
            let (answer, waker) = &mut line.places[number];
            match answer.take() {
                Some(answer) => Poll::Ready(answer),
                None => {
                    *waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
    })
    .await
}

/// Writes what the callers have put together since the last write.
async fn write_all(mut writer: tokio::net::unix::OwnedWriteHalf) {
    use tokio::io::AsyncWriteExt;
    let mut outgoing = Vec::new();
    loop {
        poll_fn(|context| {
            on_line(|line| {
                if line.outgoing.is_empty() {
                    line.writer = Some(context.waker().clone());
                    return Poll::Pending;
                }
                outgoing.clear();
                std::mem::swap(&mut outgoing, &mut line.outgoing);
                Poll::Ready(())
            })
        })
        .await;
        writer.write_all(&outgoing).await.expect("the other process lives");
    }
}

async fn read_all(mut reader: tokio::net::unix::OwnedReadHalf) {
    use tokio::io::AsyncReadExt;
    let (mut buffer, mut have) = (vec![0; BUFFER], 0);
    loop {
        let count = reader.read(&mut buffer[have..]).await.expect("the other process lives");
        if count == 0 {
            return;
        }
        have += count;
        let whole = have - have % MESSAGE;
        for message in buffer[..whole].chunks_exact(MESSAGE) {
            let (number, value) = decode(message);
            let waker = on_line(|line| {
                let (answer, waker) = &mut line.places[number as usize];
                *answer = Some(value);
                waker.take()
            });
            waker.into_iter().for_each(Waker::wake);
        }
        buffer.copy_within(whole..have, 0);
        have -= whole;
    }
}
