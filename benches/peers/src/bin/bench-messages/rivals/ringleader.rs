//! Ringleader, through its public interface.

use std::cell::Cell;
use std::error::Error;
use std::rc::Rc;
use std::sync::mpsc;

use ringleader::{Body, Request, Response, Server, Shard, Sharded, SlotId, Stop, service_fn};

use super::{calls_each, round_trips};
use crate::measure::{BUSY_TASKS, Flood, Sample, Scenario, answer, other_work};
use crate::options::Options;

type State = Cell<u64>;

pub fn sample(scenario: Scenario, options: &Options) -> Result<Sample, Box<dyn Error>> {
    let cpus = [options.caller_cpu, options.target_cpu];
    let mut builder = Server::builder().listen("127.0.0.1:0").executors(2).cpus(cpus);
    let state = builder.sharded("state", async |_| Ok(State::default()));
    let (done, taken) = mpsc::channel();
    let options = options.clone();
    let server = builder.serve(async move |shard: Shard| {
        if scenario == Scenario::Busy {
            (0..BUSY_TASKS).for_each(|_| drop(shard.spawn(work_and_yield())));
        }
        if shard.id().index() == 0 {
            let (state, done, options) = (state.clone(), done.clone(), options.clone());
            drop(shard.spawn(run(shard.clone(), state, scenario, options, done)));
        }
        Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
    });
    let running = server.start().wait()?;
    let sample = taken.recv()?;
    running.handle().stop(Stop::Now).wait()?;
    Ok(sample)
}

async fn work_and_yield() {
    loop {
        other_work();
        futures_lite::future::yield_now().await;
    }
}

async fn call(state: &Sharded<State>, to: SlotId, value: u64) -> u64 {
    let call = state.call(to, async move |state: Rc<State>| {
        let mut held = state.get();
        let answered = answer(&mut held, value);
        state.set(held);
        answered
    });
    call.await.expect("the target lives, and has room for as many messages as there are callers")
}

async fn run(shard: Shard, state: Sharded<State>, scenario: Scenario, options: Options, done: mpsc::Sender<Sample>) {
    let target = loop {
        match shard.peers().iter().find(|slot| slot.index() == 1) {
            Some(slot) => break slot,
            None => futures_lite::future::yield_now().await,
        }
    };
    let sample = match scenario {
        Scenario::Flood { callers } => {
            let mut sample = Sample::default();
            for each in calls_each(&options, callers) {
                let flood = Flood::begin();
                let tasks: Vec<_> = (0..callers).map(|_| shard.spawn(caller(state.clone(), target, each))).collect();
                for task in tasks {
                    task.await.expect("no caller panics");
                }
                sample = flood.end(each * callers as u64);
            }
            sample
        }
        Scenario::Busy | Scenario::Asleep { .. } => {
            round_trips(scenario, |value| call(&state, target, value), |gap| shard.sleep(gap)).await
        }
    };
    let _ = done.send(sample);
}

async fn caller(state: Sharded<State>, target: SlotId, calls: u64) {
    for value in 0..calls {
        std::hint::black_box(call(&state, target, value).await);
    }
}
