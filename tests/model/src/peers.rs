//! Ringleader's own file of the answers, beside it the lines of `src/peers.rs` that make a call, without what a core does
//! for it, and the models of calls.

#[path = "../../../src/peers/call.rs"]
pub mod call;

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use loom::thread;

use self::call::{Call, Exchange, PeerError, Promise};
use crate::executor::core::Core;
use crate::executor::directory::{Directory, TaskKey};
use crate::executor::inbox::{Errand, Inbox, Job, Outstanding};
use crate::models::close_elsewhere;
use crate::receiver::Receiver;

const ANSWER: u8 = 1;

/// What a message is here: where it runs.
type Message = Arc<Inbox>;

/// As `Peers::call` with a message that answers at once.
fn call(directory: &Directory, receiver: &Arc<Inbox>) -> Call<u8> {
    let (exchange, call) = Call::new(Arc::clone(receiver), directory.number());
    let job = Job::Call(Errand::new(exchange.clone()));
    if let Err((refusal, job)) = directory.post(0, job) {
        exchange.settle(Err(refusal.into()));
        drop(job);
    }
    call
}

impl Outstanding for Exchange<Message, u8> {
    fn begin(self: Arc<Self>, core: &Rc<Core>) {
        if let Some(keep) = begin(self, &core.directory) {
            keep();
        }
    }

    fn lose(&self) {
        self.settle(Err(PeerError::Lost));
    }
}

/// As `Exchange::begin` in ringleader; what it returns ends the call.
fn begin(exchange: Arc<Exchange<Message, u8>>, directory: &Arc<Directory>) -> Option<impl FnOnce() + use<>> {
    let directory = Arc::clone(directory);
    let inbox = Exchange::begin(&exchange)?;
    let (noted, promise) = (inbox.begin_call(exchange.clone()), Promise::new(exchange));
    let key = noted?;
    Some(move || {
        inbox.end_call(key);
        promise.keep(Ok(ANSWER), &directory, 0);
    })
}

/// The caller's task.
struct Task(Arc<Inbox>);

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        self.0.wake(0);
    }
}

/// The caller, in the second slot of the server that it calls, or in another server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// Woken by its number, but by its waker when its call is lost.
    Peer,
    /// Woken by its waker.
    Stranger,
}

/// The directory, the executor that is called, and the one that calls, on this thread.
fn ends(caller: Caller) -> (Arc<Directory>, Receiver, Receiver) {
    match caller {
        Caller::Peer => {
            let ([callee, home], directory) = Receiver::of_one_server();
            Core::polls(directory.number(), TaskKey { slot: 1, index: 0 });
            (directory, callee, home)
        }
        Caller::Stranger => {
            let (directory, callee) = Receiver::new();
            let (elsewhere, home) = Receiver::new();
            Core::polls(elsewhere.number(), TaskKey { slot: 0, index: 0 });
            (directory, callee, home)
        }
    }
}

/// The caller's executor: polls the call whenever its task is woken, and sleeps in between.
fn outcome(mut call: Call<u8>, mut home: Receiver) -> Result<u8, PeerError> {
    let waker = Waker::from(Arc::new(Task(Arc::clone(&home.inbox))));
    let mut poll = || Pin::new(&mut call).poll(&mut Context::from_waker(&waker));
    let mut outcome = poll();
    if outcome.is_pending() {
        home.run(|taken| {
            if !taken.wakes.is_empty() {
                outcome = poll();
            }
            outcome.is_ready()
        });
    }
    match outcome {
        Poll::Ready(outcome) => outcome,
        Poll::Pending => unreachable!("it has just been looked at"),
    }
}

/// An executor calls another one, which takes in once, at any time, and then ends.
pub fn an_executor_is_called_and_ends(caller: Caller) {
    let (directory, receiver, home) = ends(caller);
    let inbox = Arc::clone(&receiver.inbox);
    let callee = thread::spawn(move || {
        let run = receiver.take_in().jobs;
        receiver.inbox.close();
        run
    });
    let outcome = outcome(call(&directory, &inbox), home);
    match callee.join().unwrap() {
        0 => assert!(matches!(outcome, Err(PeerError::Lost | PeerError::Down)), "{outcome:?}"),
        _ => assert_eq!(outcome, Ok(ANSWER)),
    }
}

/// An executor that was called answers when the supervisor has given it up for hanging.
pub fn a_call_is_answered_while_its_executor_is_given_up(caller: Caller) {
    let (directory, receiver, home) = ends(caller);
    let (exchange, call) = Call::new(Arc::clone(&receiver.inbox), directory.number());
    let keep = begin(exchange, &directory).expect("it is open");
    let callee = thread::spawn(keep);
    let supervisor = close_elsewhere(&receiver.inbox);
    assert!(matches!(outcome(call, home), Ok(ANSWER) | Err(PeerError::Lost)));
    callee.join().unwrap();
    supervisor.join().unwrap();
}

/// The supervisor gives up an executor that never answers, while that one begins a call. If `noted`, as ringleader does;
/// else nobody can tell the caller.
pub fn a_call_is_begun_while_its_executor_is_given_up(noted: bool) {
    let (directory, receiver, home) = ends(Caller::Peer);
    let (exchange, call) = Call::new(Arc::clone(&receiver.inbox), directory.number());
    let supervisor = close_elsewhere(&receiver.inbox);
    let hung = thread::spawn(move || {
        if noted {
            std::mem::forget(begin(exchange, &directory));
        } else {
            std::mem::forget(exchange);
        }
    });
    assert_eq!(outcome(call, home), Err(PeerError::Lost));
    hung.join().unwrap();
    supervisor.join().unwrap();
}

/// The caller looks once and goes away, while the answer comes.
pub fn a_caller_goes_away_while_it_is_answered(caller: Caller) {
    let (directory, receiver, home) = ends(caller);
    let (exchange, mut call) = Call::new(Arc::clone(&receiver.inbox), directory.number());
    let keep = begin(exchange, &directory).expect("it is open");
    let callee = thread::spawn(keep);
    let waker = Waker::from(Arc::new(Task(Arc::clone(&home.inbox))));
    let looked = Pin::new(&mut call).poll(&mut Context::from_waker(&waker));
    drop(call);
    callee.join().unwrap();
    let woken = home.take_in().wakes.len();
    assert_eq!(woken, usize::from(looked.is_pending()), "who was told to wait is woken, once");
}
