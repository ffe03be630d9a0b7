//! Channels between two tokio `current_thread` runtimes, each on a pinned thread and with its I/O driver, as a server's.

use std::error::Error;
use std::future::Future;
use std::io;
use std::thread;

use ringleader_peers::pin_to;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot};

use super::{calls_each, round_trips};
use crate::measure::{BUSY_TASKS, Flood, Sample, Scenario, answer, other_work};
use crate::options::Options;

/// As many as Ringleader's inbox holds.
const MESSAGES_MAX: usize = 4096;
/// Taken out together at most: no more than there are callers ever wait.
const BATCH_MAX: usize = 256;

pub struct Message {
    value: u64,
    reply: oneshot::Sender<u64>,
}

impl Message {
    fn answer(self, state: &mut u64) {
        let _ = self.reply.send(answer(state, self.value));
    }
}

/// One kind of channel.
pub trait Channel {
    type Sender: Clone + Send + Sync + 'static;
    type Receiver: Send + 'static;

    fn channel() -> (Self::Sender, Self::Receiver);
    /// At once, as Ringleader's; false when it is full.
    fn send(sender: &Self::Sender, message: Message) -> bool;
    fn serve(receiver: Self::Receiver) -> impl Future<Output = ()>;
}

pub struct Tokio;

impl Channel for Tokio {
    type Sender = mpsc::Sender<Message>;
    type Receiver = mpsc::Receiver<Message>;

    fn channel() -> (Self::Sender, Self::Receiver) {
        mpsc::channel(MESSAGES_MAX)
    }

    fn send(sender: &Self::Sender, message: Message) -> bool {
        sender.try_send(message).is_ok()
    }

    async fn serve(mut receiver: Self::Receiver) {
        let (mut state, mut batch) = (0, Vec::with_capacity(BATCH_MAX));
        while receiver.recv_many(&mut batch, BATCH_MAX).await > 0 {
            batch.drain(..).for_each(|message| message.answer(&mut state));
        }
    }
}

pub struct Flume;

impl Channel for Flume {
    type Sender = flume::Sender<Message>;
    type Receiver = flume::Receiver<Message>;

    fn channel() -> (Self::Sender, Self::Receiver) {
        flume::bounded(MESSAGES_MAX)
    }

    fn send(sender: &Self::Sender, message: Message) -> bool {
        sender.try_send(message).is_ok()
    }

    async fn serve(receiver: Self::Receiver) {
        let mut state = 0;
        while let Ok(message) = receiver.recv_async().await {
            message.answer(&mut state);
            receiver.drain().for_each(|message| message.answer(&mut state));
        }
    }
}

/// A runtime with everything that a server on it would use.
pub fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

pub async fn work_and_yield() {
    loop {
        other_work();
        tokio::task::yield_now().await;
    }
}

pub fn sample<C: Channel + 'static>(scenario: Scenario, options: &Options) -> Result<Sample, Box<dyn Error>> {
    let (sender, receiver) = C::channel();
    let cpu = options.target_cpu;
    let target = thread::spawn(move || -> io::Result<()> {
        pin_to(cpu)?;
        runtime()?.block_on(async {
            occupy(scenario);
            C::serve(receiver).await;
        });
        Ok(())
    });
    pin_to(options.caller_cpu)?;
    let options = options.clone();
    let run = async move {
        occupy(scenario);
        // As a task, as those it is compared with.
        tokio::spawn(run::<C>(sender, scenario, options)).await
    };
    let sample = runtime()?.block_on(run)?;
    target.join().map_err(|_| "the target panicked")??;
    Ok(sample)
}

fn occupy(scenario: Scenario) {
    if scenario == Scenario::Busy {
        (0..BUSY_TASKS).for_each(|_| drop(tokio::spawn(work_and_yield())));
    }
}

async fn call<C: Channel>(sender: &C::Sender, value: u64) -> u64 {
    let (reply, answer) = oneshot::channel();
    assert!(C::send(sender, Message { value, reply }), "there is room for as many messages as there are callers");
    answer.await.expect("the target lives")
}

async fn run<C: Channel + 'static>(sender: C::Sender, scenario: Scenario, options: Options) -> Sample {
    let Scenario::Flood { callers } = scenario else {
        return round_trips(scenario, |value| call::<C>(&sender, value), tokio::time::sleep).await;
    };
    let mut sample = Sample::default();
    for each in calls_each(&options, callers) {
        let flood = Flood::begin();
        let tasks: Vec<_> = (0..callers).map(|_| tokio::spawn(caller::<C>(sender.clone(), each))).collect();
        for task in tasks {
            task.await.expect("no caller panics");
        }
        sample = flood.end(each * callers as u64);
    }
    sample
}

async fn caller<C: Channel>(sender: C::Sender, calls: u64) {
    for value in 0..calls {
        std::hint::black_box(call::<C>(&sender, value).await);
    }
}
