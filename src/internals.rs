//! What the micro benches (`benches/`) need of the crate's inside, and nothing else does. Behind the feature
//! `internals`, outside of the crate's promises.
#![allow(missing_docs, reason = "for the benches of this package only")]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::executor::inbox::Inbox;
use crate::net::driver::{Arrivals, Driver};
use crate::net::ring::RingOptions;
use crate::net::wheel;
use crate::steering::{self, Kernel, Members, Realise, Share, Table};
use crate::sys::bind::{ListenOptions, bind_group};
use crate::sys::socket;

/// The executor's driver, echoing on every connection.
pub struct Echo {
    driver: Driver,
    keys: Vec<u32>,
    arrivals: Arrivals,
    chunk: Vec<u8>,
    /// System calls made: entries into the ring, and direct sends.
    pub enters: u64,
    pub sends: u64,
    pub messages: u64,
}

impl Echo {
    pub fn new(sockets: Vec<OwnedFd>) -> io::Result<Self> {
        let mut driver = Driver::new(RingOptions::default(), Arc::default())?;
        let keys = sockets.into_iter().map(|fd| driver.adopt(fd)).collect();
        let (arrivals, chunk) = (Arrivals::default(), Vec::new());
        Ok(Self { driver, keys, arrivals, chunk, enters: 0, sends: 0, messages: 0 })
    }

    /// One turn of an executor with its sleep: true until a peer has gone.
    pub fn turn(&mut self) -> bool {
        let mut waker = Context::from_waker(Waker::noop());
        let now = Instant::now();
        self.driver.wake_by(now + Duration::from_millis(10), now);
        self.enters += 1;
        self.driver.turn(true, &mut self.arrivals).expect("io_uring_enter");
        let ready = self.keys.iter().filter(|key| self.driver.is_readable(**key)).count();
        self.driver.begin_turn(ready);
        for key in &self.keys {
            if !self.driver.is_readable(*key) {
                continue;
            }
            self.chunk.clear();
            let read = self.driver.poll_read(*key, &mut waker, |bytes| {
                self.chunk.extend_from_slice(bytes);
                bytes.len()
            });
            if !matches!(read, Poll::Ready(Ok(1..))) {
                return false;
            }
            self.messages += 1;
            match self.driver.send(*key, &self.chunk, &mut waker) {
                Poll::Ready(Ok(sent)) => assert_eq!(sent, self.chunk.len(), "a small message fits"),
                _ => return false,
            }
            self.sends += u64::from(!self.driver.has_queued_sends());
        }
        self.driver.end_turn();
        true
    }
}

/// An executor's inbox: the posting side, cloneable.
#[derive(Clone)]
pub struct Poster(Arc<Inbox>);

impl Poster {
    pub fn post(&self, message: u32) {
        self.0.wake(message);
    }
}

/// The executor's side: takes messages in, and sleeps in its ring when there are none.
pub struct Receiver {
    inbox: Arc<Inbox>,
    driver: Driver,
    arrivals: Arrivals,
}

impl Receiver {
    pub fn new() -> io::Result<(Poster, Self)> {
        let inbox = Arc::new(Inbox::new()?);
        let mut driver = Driver::new(RingOptions { buffers: 1, buffer_bytes: 64 }, Arc::default())?;
        driver.watch_inbox(inbox.as_fd());
        Ok((Poster(Arc::clone(&inbox)), Self { inbox, driver, arrivals: Arrivals::default() }))
    }

    /// Hands over what is there; when nothing is, sleeps first if it may.
    pub fn take(&mut self, may_sleep: bool, mut message: impl FnMut(u32)) {
        if may_sleep && self.inbox.fall_asleep() {
            self.driver.turn(true, &mut self.arrivals).expect("io_uring_enter");
            self.inbox.awake();
        }
        if self.inbox.is_filled() {
            self.inbox.begin();
            while let Some(one) = self.inbox.next_wake() {
                message(one);
            }
        }
    }
}

/// The executor's timers.
pub struct Wheel(wheel::Wheel<u32>);

#[derive(Clone, Copy)]
pub struct TimerKey(wheel::TimerKey);

impl Wheel {
    pub fn new(start: Instant) -> Self {
        Self(wheel::Wheel::new(start))
    }

    pub fn insert(&mut self, deadline: Instant, item: u32) -> TimerKey {
        TimerKey(self.0.insert(deadline, item))
    }

    pub fn cancel(&mut self, key: TimerKey) -> Option<u32> {
        self.0.cancel(key.0)
    }

    pub fn advance(&mut self, now: Instant, fire: impl FnMut(u32)) {
        self.0.advance(now, fire);
    }
}

/// Listeners of one address on loopback, steered.
pub struct Steered {
    listeners: Vec<OwnedFd>,
    table: Table,
    // For the programs that read the heartbeats.
    _kernel: Kernel,
}

impl Steered {
    /// `None` without the privilege to load extended BPF, if that is asked for.
    pub fn new(slots: u16, policy: &str, extended: bool) -> io::Result<Option<Self>> {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let listeners = bind_group(address, slots.into(), &ListenOptions::default()).map_err(io::Error::other)?;
        let kernel = Kernel::probe(slots, if extended { Realise::Best } else { Realise::Classic });
        let policy = steering::by_name(policy, 1).ok_or(io::ErrorKind::InvalidInput)?;
        let members = vec![Members { listeners: &listeners, sockets: None }];
        let table = Table::new(policy, slots, members, &kernel)?;
        let as_asked = extended == (table.realisation() == "eBPF");
        Ok(as_asked.then_some(Self { listeners, table, _kernel: kernel }))
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        socket::local_addr(self.listeners[0].as_fd())
    }

    /// Weights in the order of the slots.
    pub fn set(&mut self, weights: impl Iterator<Item = u16>) -> io::Result<()> {
        self.table.set((0..).zip(weights).map(|(slot, weight)| Share { slot, weight }))
    }

    /// Accepts and closes what is there.
    pub fn empty(&self) {
        for listener in &self.listeners {
            while socket::accept(listener.as_fd()).is_ok() {}
        }
    }
}
