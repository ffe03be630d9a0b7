//! Messages between executors, and the state they meet.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use ringleader::{
    Body, Builder, Call, ExecutorState, HangPolicy, PanicPolicy, PeerError, Peers, Request, Response, Sharded, SlotId,
    Stop, service_fn,
};

use crate::support::{BOUND, Gate, Site, eventually, local, settle};

/// A call's outcome, from this plain thread.
fn wait<R: Send + 'static>(call: Call<R>) -> Result<R, PeerError> {
    let (sender, outcome) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        sender.send(runtime.block_on(call))
    });
    outcome.recv_timeout(BOUND).expect("a call comes to an outcome")
}

/// What these tests keep on each executor.
struct State {
    slot: SlotId,
    generation: u64,
    seen: RefCell<Vec<u32>>,
    shard: ringleader::Shard,
}

/// Answers nothing of interest; what is looked at is its state.
fn site(mut builder: Builder) -> (Site, Sharded<State>) {
    let state = builder.sharded("state", async |shard: ringleader::Shard| {
        Ok(State { slot: shard.id(), generation: shard.generation(), seen: RefCell::default(), shard })
    });
    (Site::start(builder.serve(async |_| Ok(service_fn(crate::support::echo)))), state)
}

fn slots(peers: &Peers) -> Vec<SlotId> {
    peers.iter().collect()
}

/// Ends the generation in `slot`, by a background task that fails.
fn fail(state: &Sharded<State>, slot: SlotId) {
    let sent = state.send(slot, |state| state.shard.background("escape", async { Err("ordered by a test".into()) }));
    sent.expect("the executor takes messages");
}

fn generation(state: &Sharded<State>, slot: SlotId) -> Result<u64, PeerError> {
    wait(state.call(slot, async |state| state.generation))
}

/// Lets a test block an executor's thread: whether it is, and whether it is to go on.
#[derive(Clone, Default)]
struct Block(Arc<(AtomicBool, Mutex<bool>, Condvar)>);

impl Block {
    fn hold(&self) {
        self.0.0.store(true, Ordering::SeqCst);
        let ended = self.0.1.lock().expect("nobody panics with it");
        drop(self.0.2.wait_while(ended, |ended| !*ended).expect("nobody panics with it"));
    }

    fn wait_until_held(&self) {
        eventually("the executor is blocked", || self.0.0.load(Ordering::SeqCst));
    }

    fn end(&self) {
        *self.0.1.lock().expect("nobody panics with it") = true;
        self.0.2.notify_all();
    }
}

/// A test that fails must not leave its executor blocked: the server could not be stopped.
struct EndAtLast(Block);

impl Drop for EndAtLast {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[test]
fn every_executor_calls_every_other_and_itself() {
    let mut builder = local(3);
    let names = builder.sharded("name", async |shard: ringleader::Shard| Ok(Rc::new(shard.id().to_string())));
    let site = Site::start(builder.serve(async move |shard: ringleader::Shard| {
        let names = names.clone();
        Ok(service_fn(async move |_: Request| {
            let mut text = format!("{}:", names.local(&shard));
            for slot in shard.peers().iter() {
                // The one that calls has gone to sleep by then, and so have the others.
                shard.sleep(Duration::from_millis(2)).await;
                text += &names.call(slot, async |name| name.to_string()).await?;
                let id = shard.peers().call(slot, async |peer| peer.id()).await?;
                assert_eq!(id, slot);
            }
            Ok(Response::new(Body::from(text)))
        }))
    }));
    let mut met = std::collections::HashSet::new();
    eventually("each is met", || {
        let answer = site.connect().get("/");
        let (own, all) = answer.text().split_once(':').expect("a colon");
        assert_eq!((answer.status, all), (200, "012"));
        met.insert(own.to_owned());
        met.len() == 3
    });
}

#[test]
fn a_parked_executor_is_woken_at_once() {
    let (_site, state) = site(local(2));
    let slot = slots(&state.peers())[1];
    let mut delays: Vec<Duration> = (0..15)
        .map(|_| {
            // Long enough for it to park: its naps end after 100 ms, its sleeps after 500 ms.
            std::thread::sleep(Duration::from_millis(250));
            let sent = Instant::now();
            wait(state.call(slot, async move |_| sent.elapsed())).expect("it is there")
        })
        .collect();
    delays.sort_unstable();
    // A busy machine delays many, but a few are always at once.
    assert!(delays[delays.len() / 4] < Duration::from_millis(50), "{delays:?}");
}

#[test]
fn messages_of_one_sender_are_begun_in_their_order() {
    const COUNT: u32 = 100_000;
    let (_site, state) = site(local(2));
    let slot = slots(&state.peers())[1];
    let mut calls = Vec::new();
    for number in 0..COUNT {
        // Every tenth is a call: they keep to one order.
        let mut sent = false;
        while !sent {
            if number % 10 == 0 {
                let note = async move |state: Rc<State>| state.seen.borrow_mut().push(number);
                let mut call = Box::pin(state.call(slot, note));
                let mut context = std::task::Context::from_waker(std::task::Waker::noop());
                sent = call.as_mut().poll(&mut context) != std::task::Poll::Ready(Err(PeerError::Full));
                calls.push(call);
            } else {
                sent = state.send(slot, move |state| state.seen.borrow_mut().push(number)).is_ok();
            }
            if !sent {
                std::thread::yield_now();
            }
        }
    }
    let seen = wait(state.call(slot, async |state| state.seen.take())).expect("it comes after all others");
    assert_eq!(seen.len(), COUNT as usize);
    assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "out of order");
}

#[test]
fn a_full_inbox_refuses_at_once_and_the_rest_is_answered() {
    let (_site, state) = site(local(2).hang(HangPolicy::Ignore, None));
    let slot = slots(&state.peers())[0];
    let block = Block::default();
    let _end = EndAtLast(block.clone());
    let held = block.clone();
    state.send(slot, move |_| held.hold()).expect("it is there");
    block.wait_until_held();
    let mut taken = 0_u32;
    while state.send(slot, |state| state.seen.borrow_mut().push(0)).is_ok() {
        taken += 1;
        assert!(taken <= 4096, "an inbox has an end");
    }
    assert_eq!(taken, 4096);
    assert_eq!(state.send(slot, |_| ()), Err(PeerError::Full));
    assert_eq!(wait(state.call(slot, async |_| ())), Err(PeerError::Full));
    // Others are not concerned.
    assert_eq!(wait(state.call(slots(&state.peers())[1], async |state| state.slot.index())), Ok(1));
    block.end();
    let mut seen = Err(PeerError::Full);
    eventually("there is room", || {
        seen = wait(state.call(slot, async |state| state.seen.borrow().len()));
        seen.is_ok()
    });
    assert_eq!(seen, Ok(4096));
}

#[test]
fn a_slot_without_an_executor_is_down() {
    let (site, state) = site(local(2));
    let last = slots(&state.peers())[1];
    settle(site.scale(1)).expect("there are two slots");
    eventually("it has gone", || site.stats().executors[1].state == ExecutorState::Idle);
    assert_eq!(wait(state.call(last, async |_| ())), Err(PeerError::Down));
    assert_eq!(state.send(last, |_| ()), Err(PeerError::Down));
    let all = wait(state.call_all(async |state| state.slot)).expect("it does not fail");
    assert_eq!(all.len(), 1, "it is not in use: {all:?}");
    settle(site.scale(2)).expect("there are two slots");
    eventually("it is back", || generation(&state, last) == Ok(2));
}

#[test]
fn a_token_of_a_server_that_has_not_begun_or_has_ended_is_down() {
    let mut builder = local(1);
    let state = builder.sharded("state", async |shard: ringleader::Shard| Ok(shard.id()));
    let slot = state.peers().owner_of("anything");
    assert_eq!(wait(state.call(slot, async |_| ())), Err(PeerError::Down));
    let site = Site::start(builder.serve(async |_| Ok(service_fn(crate::support::echo))));
    assert_eq!(wait(state.call(slot, async |id| *id)), Ok(slot));
    settle(site.stop(Stop::Now)).expect("it stops");
    assert_eq!(wait(state.call(slot, async |_| ())), Err(PeerError::Down));
}

#[test]
fn a_request_whose_message_was_not_sent_is_answered_503_with_a_time_to_try_again() {
    let nobodys = local(1).sharded("state", async |_: ringleader::Shard| Ok(()));
    let site = Site::serving(async move |_: Request| {
        nobodys.call(nobodys.peers().owner_of("anything"), async |_| ()).await?;
        Ok(Response::new(Body::empty()))
    });
    let mut client = site.connect();
    let answer = client.get("/");
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    assert_eq!(client.get("/").status, 503, "the connection goes on");
}

#[test]
fn a_call_that_its_executor_does_not_live_to_answer_is_lost() {
    let (_site, state) = site(local(2));
    let slot = slots(&state.peers())[1];
    let (sender, begun) = mpsc::channel();
    let call = state.call(slot, async move |_| {
        sender.send(()).expect("it is waited for");
        std::future::pending::<()>().await;
    });
    begun.recv_timeout(BOUND).expect("it begins");
    fail(&state, slot);
    assert_eq!(wait(call), Err(PeerError::Lost));
    eventually("the next generation answers", || generation(&state, slot) == Ok(2));
}

#[test]
fn no_call_hangs_while_executors_are_restarted() {
    let restart = {
        let mut restart = ringleader::RestartPolicy::default();
        restart.quarantine_after = 0;
        (restart.backoff_base, restart.backoff_max) = (Duration::from_millis(1), Duration::from_millis(5));
        restart
    };
    let (site, state) = site(local(2).restart(restart));
    let all = slots(&state.peers());
    let done = Arc::new(AtomicBool::new(false));
    let counts = Arc::new(Mutex::new(HashMap::<String, u64>::new()));
    let callers: Vec<_> = (0..2)
        .map(|number| {
            let (state, slot, done, counts) = (state.clone(), all[number], Arc::clone(&done), Arc::clone(&counts));
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
                while !done.load(Ordering::Relaxed) {
                    // Some that are answered at once, some that wait, some that never answer.
                    let calls: Vec<_> = (0..64_u64)
                        .map(|number| {
                            state.call(slot, async move |state| match number % 4 {
                                0 | 1 => {}
                                2 => state.shard.sleep(Duration::from_millis(1)).await,
                                _ => state.shard.sleep(Duration::from_millis(3)).await,
                            })
                        })
                        .collect();
                    std::thread::sleep(Duration::from_millis(1));
                    for call in calls {
                        let outcome = format!("{:?}", runtime.block_on(call));
                        *counts.lock().expect("nobody panics with it").entry(outcome).or_default() += 1;
                    }
                }
            })
        })
        .collect();
    for round in 0..30 {
        let slot = all[round % 2];
        let before = site.stats().executors[slot.index()].generation;
        eventually("it takes an order to fail", || {
            let order = |state: &State| state.shard.background("escape", async { Err("ordered by a test".into()) });
            state.send(slot, order).is_ok()
        });
        eventually("it is restarted", || site.stats().executors[slot.index()].generation > before);
    }
    // In the midst of it.
    settle(site.stop(Stop::Now)).expect("it stops");
    done.store(true, Ordering::Relaxed);
    let start = Instant::now();
    while callers.iter().any(|caller| !caller.is_finished()) {
        assert!(start.elapsed() < BOUND, "a call hangs: {counts:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    let counts = counts.lock().expect("nobody panics with it");
    println!("{counts:?}");
    assert!(counts.contains_key("Ok(())"), "{counts:?}");
    assert_eq!(wait(state.call(all[0], async |_| ())), Err(PeerError::Down));
}

#[test]
fn the_calls_of_an_executor_that_hangs_are_lost_and_its_successor_answers() {
    let (site, state) = site(local(2).hang(HangPolicy::Replace, Some(Duration::from_millis(300))));
    let slot = slots(&state.peers())[0];
    let block = Block::default();
    let _end = EndAtLast(block.clone());
    // One that waits, one that hangs, one behind it.
    let waiting = state.call(slot, async |_| std::future::pending::<()>().await);
    let held = block.clone();
    let hanging = state.call(slot, async move |_| held.hold());
    block.wait_until_held();
    let behind = state.call(slot, async |_| ());
    assert_eq!(wait(waiting), Err(PeerError::Lost));
    assert_eq!(wait(hanging), Err(PeerError::Lost));
    assert_eq!(wait(behind), Err(PeerError::Lost));
    eventually("its successor answers", || generation(&state, slot) == Ok(2));
    block.end();
    eventually("the thread has come back and ended", || site.stats().threads_leaked == 0);
    assert_eq!(generation(&state, slot), Ok(2), "that one's end is none of the successor's business");
}

#[test]
fn a_panic_in_a_message_costs_its_answer_only() {
    for policy in [PanicPolicy::Contain, PanicPolicy::Restart] {
        let (site, state) = site(local(2).panics(policy));
        let slot = slots(&state.peers())[1];
        let panics: Call<()> = state.call(slot, async |_| panic!("a message of the test's panics"));
        assert_eq!(wait(panics), Err(PeerError::Panicked));
        state.send(slot, |_| panic!("a message of the test's panics")).expect("it is there");
        assert_eq!(generation(&state, slot), Ok(1));
        assert_eq!(site.stats().executors[1].panics_contained, 2);
    }
}

#[test]
fn a_call_to_all_has_an_outcome_of_each() {
    let (_site, state) = site(local(3));
    let second = slots(&state.peers())[1];
    let all = state.call_all(async move |state| {
        assert!(state.slot != second, "a message of the test's panics");
        state.slot.index()
    });
    let all = wait(all).expect("it does not fail");
    let expected: Vec<_> = slots(&state.peers()).into_iter().zip([Ok(0), Err(PeerError::Panicked), Ok(2)]).collect();
    assert_eq!(all, expected);
}

#[test]
fn state_is_built_in_order_before_the_service_and_dropped_in_reverse_after_it() {
    struct Logged(&'static str, mpsc::Sender<String>);
    impl Drop for Logged {
        fn drop(&mut self) {
            let _ = self.1.send(format!("{} dropped", self.0));
        }
    }
    let (sender, log) = mpsc::channel();
    let mut builder = local(1);
    let build = |name: &'static str, sender: &mpsc::Sender<String>| {
        let sender = sender.clone();
        async move |shard: ringleader::Shard| {
            shard.sleep(Duration::from_millis(1)).await;
            sender.send(format!("{name} built"))?;
            Ok(Logged(name, sender.clone()))
        }
    };
    let first = builder.sharded("first", build("first", &sender));
    let _second = builder.sharded("second", build("second", &sender));
    let site = Site::start(builder.serve(async move |shard: ringleader::Shard| {
        assert_eq!(first.local(&shard).0, "first");
        sender.send("service built".to_owned())?;
        let service = Logged("service", sender.clone());
        Ok(service_fn(async move |request: Request| {
            let _held = &service;
            Ok(Response::new(request.into_body()))
        }))
    }));
    settle(site.stop(Stop::Now)).expect("it stops");
    let built = ["first built", "second built", "service built"];
    let dropped = ["service dropped", "second dropped", "first dropped"];
    assert_eq!(log.try_iter().collect::<Vec<_>>(), [built, dropped].concat());
}

#[test]
fn every_generation_has_state_of_its_own() {
    let (_site, state) = site(local(1));
    let slot = slots(&state.peers())[0];
    state.send(slot, |state| state.seen.borrow_mut().push(7)).expect("it is there");
    assert_eq!(wait(state.call(slot, async |state| state.seen.borrow().len())), Ok(1));
    fail(&state, slot);
    eventually("the next generation answers", || generation(&state, slot) == Ok(2));
    assert_eq!(wait(state.call(slot, async |state| state.seen.borrow().len())), Ok(0));
}

#[test]
fn state_that_cannot_be_built_fails_the_start_with_its_name() {
    let mut builder = local(2);
    let _state: Sharded<()> = builder.sharded("table", async |_| Err("no disk".into()));
    let error = settle(builder.serve(async |_| Ok(service_fn(crate::support::echo))).start()).expect_err("it fails");
    assert!(error.to_string().contains("'table': no disk"), "{error}");
}

#[test]
fn start_up_closures_may_call_each_other() {
    let mut builder = local(3);
    let slow = builder.sharded("slow", async |shard: ringleader::Shard| {
        shard.sleep(Duration::from_millis(10) * shard.id().index() as u32).await;
        Ok(shard.id())
    });
    let site = Site::start(builder.serve(async move |_| {
        for (slot, outcome) in slow.call_all(async |id| *id).await? {
            assert_eq!(outcome?, slot);
        }
        Ok(service_fn(crate::support::echo))
    }));
    assert_eq!(site.connect().get("/").status, 200);
}

#[test]
fn keys_move_with_the_number_of_executors_and_not_with_restarts() {
    let (site, state) = site(local(3));
    let peers = state.peers();
    let owners = || (0..3000).map(|key: u32| peers.owner_of(&key).index()).collect::<Vec<_>>();
    let three = owners();
    assert!((0..3).all(|slot| three.contains(&slot)));
    let theirs = wait(state.call(slots(&peers)[1], async |state| {
        let peers = state.shard.peers();
        (0..3000).map(|key: u32| peers.owner_of(&key).index()).collect::<Vec<_>>()
    }));
    assert_eq!(theirs, Ok(three.clone()), "every executor sees the same");
    settle(site.scale(2)).expect("there are three slots");
    eventually("one has left", || peers.iter().len() == 2);
    let two = owners();
    assert!(three.iter().zip(&two).all(|(before, after)| *before == 2 || before == after));
    assert!(!two.contains(&2));
    eventually("it has gone", || site.stats().executors[2].state == ExecutorState::Idle);
    settle(site.scale(3)).expect("there are three slots");
    eventually("it is back", || generation(&state, slots(&peers)[peers.iter().len() - 1]) == Ok(2));
    assert_eq!(owners(), three);
    fail(&state, slots(&peers)[0]);
    eventually("it is restarted", || {
        assert_eq!(owners(), three, "a restart moves nothing");
        generation(&state, slots(&peers)[0]) == Ok(2)
    });
}

#[test]
fn a_drain_answers_the_calls_that_have_begun() {
    let (site, state) = site(local(2));
    let slot = slots(&state.peers())[1];
    let (sender, begun) = mpsc::channel();
    let call = state.call(slot, async move |state| {
        sender.send(()).expect("it is waited for");
        state.shard.draining().await;
        state.shard.sleep(Duration::from_millis(20)).await;
        7
    });
    begun.recv_timeout(BOUND).expect("it begins");
    assert!(settle(site.stop(Stop::Drain(BOUND))).expect("it stops").drained);
    assert_eq!(wait(call), Ok(7));
}

#[test]
fn in_the_drain_of_a_whole_server_an_executor_without_work_answers_those_that_have_some() {
    let gate = Gate::shut();
    let mut builder = local(2);
    let state = builder.sharded("state", async |shard: ringleader::Shard| Ok(shard.id()));
    let site = {
        let gate = gate.clone();
        Site::start(builder.serve(async move |shard: ringleader::Shard| {
            let (gate, state) = (gate.clone(), state.clone());
            Ok(service_fn(async move |_: Request| {
                let other = shard.peers().iter().find(|slot| *slot != shard.id()).ok_or("there are two")?;
                let before = state.call(other, async move |slot| *slot == other).await;
                gate.passed().await;
                let after = state.call(other, async move |slot| *slot == other).await;
                Ok(Response::new(Body::from(format!("{before:?} {after:?}"))))
            }))
        }))
    };
    let mut client = site.connect();
    client.ask("/");
    let with_work = || site.stats().executors.iter().position(|executor| executor.in_flight == 1);
    eventually("the handler runs", || with_work().is_some());
    let other = 1 - with_work().expect("it waits");
    let exit = site.stop(Stop::Drain(BOUND));
    eventually("the other one drains", || site.stats().executors[other].state == ExecutorState::Draining);
    // It has nothing to do, and would have ended within a turn.
    std::thread::sleep(Duration::from_millis(50));
    gate.open();
    let answer = client.answer();
    assert_eq!((answer.status, answer.text()), (200, "Ok(true) Ok(true)"));
    assert!(settle(exit).expect("it stops").drained);
}

#[test]
fn a_call_is_dropped_without_harm_before_its_answer() {
    static ANSWERED: AtomicU64 = AtomicU64::new(0);
    let (_site, state) = site(local(2));
    let slot = slots(&state.peers())[1];
    for _ in 0..100 {
        drop(state.call(slot, async |state| {
            state.shard.sleep(Duration::from_millis(1)).await;
            ANSWERED.fetch_add(1, Ordering::Relaxed);
        }));
    }
    eventually("all have run", || ANSWERED.load(Ordering::Relaxed) == 100);
}

#[test]
fn two_copies_of_a_builder_cannot_share_state() {
    let mut builder = local(1);
    let state = builder.sharded("state", async |_| Ok(Cell::new(0)));
    let copy = builder.clone();
    let _site = Site::start(builder.serve(async |_| Ok(service_fn(crate::support::echo))));
    let error = settle(copy.serve(async |_| Ok(service_fn(crate::support::echo))).start()).expect_err("it is refused");
    assert!(error.to_string().contains("one server"), "{error}");
    assert!(wait(state.call(slots(&state.peers())[0], async |count| count.get())).is_ok());
}
