//! Accepting: readiness first, then `accept4` in a bounded batch. A connection is taken only when it will be served at
//! once; one that is not accepted stays in the slot's queue, where whoever lives in the slot next finds it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cells::Cells;
use crate::sys::socket::{self, AcceptFailure};

/// Connections accepted from one listener per turn: enough that a burst of 1,000 is taken within a few milliseconds,
/// few enough that requests on open connections do not wait for it.
pub(crate) const ACCEPTS_PER_TURN_MAX: usize = 64;
/// Rest after the descriptors ran out: long enough not to spin, short enough to be back soon after some were closed.
const REST: Duration = Duration::from_millis(50);
/// How long a slot is full before what waits in its queue is closed unanswered. New connections are steered elsewhere as
/// soon as it is full; those in its queue already, and all when every slot is full, get this long for a place to fall
/// vacant.
const FULL_MAX: Duration = Duration::from_secs(1);
/// Connections answered with a close when the descriptors have run out, per rest.
const SHED_MAX: usize = 64;

/// A listening socket of one slot, for one address.
#[derive(Debug)]
pub(crate) struct Listener {
    pub fd: OwnedFd,
    /// The address as it was bound, for logs and `Connection::listener`.
    pub name: Arc<str>,
}

/// The acceptor of one slot: its listeners, and one descriptor in reserve to shed with.
pub(crate) struct Acceptor {
    listeners: Arc<Vec<Listener>>,
    ready: Vec<bool>,
    reserve: Option<OwnedFd>,
    rest_until: Option<Instant>,
    open_max: u64,
    full_since: Option<Instant>,
}

impl Acceptor {
    /// Accepts while fewer than `open_max` connections are open.
    pub(crate) fn new(listeners: Arc<Vec<Listener>>, open_max: u64) -> Self {
        let ready = vec![true; listeners.len()];
        Self { listeners, ready, reserve: reserve(), rest_until: None, open_max, full_since: None }
    }

    pub(crate) fn listeners(&self) -> &[Listener] {
        &self.listeners
    }

    /// The listener has been reported readable.
    pub(crate) fn note_ready(&mut self, listener: u32) {
        if let Some(ready) = self.ready.get_mut(listener as usize) {
            *ready = true;
        }
    }

    /// Whether [`Acceptor::accept`] would do anything now.
    pub(crate) fn has_work(&self, now: Instant, open: u64) -> bool {
        let room = open < self.open_max || self.full_since.is_none_or(|since| now >= since + FULL_MAX);
        room && self.rest_until.is_none_or(|until| until <= now) && self.ready.contains(&true)
    }

    /// When to look again although nothing has been reported.
    pub(crate) fn look_again(&self) -> Option<Instant> {
        let full = self.full_since.filter(|_| self.ready.contains(&true)).map(|since| since + FULL_MAX);
        self.rest_until.max(full)
    }

    /// Whether new connections should go elsewhere; one that was full is so until a sixteenth of its places is free.
    pub(crate) fn is_full(&self, open: u64, was_full: bool) -> bool {
        open >= if was_full { self.open_max - self.open_max / 16 } else { self.open_max }
    }

    /// Accepts a batch from each ready listener and hands each connection to `adopt`.
    pub(crate) fn accept(
        &mut self,
        now: Instant,
        cells: &Cells,
        mut adopt: impl FnMut(OwnedFd, SocketAddr, &Arc<str>),
    ) {
        if self.rest_until.is_some_and(|until| until > now) {
            return;
        }
        self.rest_until = None;
        if self.reserve.is_none() {
            self.reserve = reserve();
        }
        for index in 0..self.listeners.len() {
            if self.ready[index] {
                self.accept_from(index, now, cells, &mut adopt);
            }
        }
    }

    fn accept_from(
        &mut self,
        index: usize,
        now: Instant,
        cells: &Cells,
        adopt: &mut impl FnMut(OwnedFd, SocketAddr, &Arc<str>),
    ) {
        let listeners = Arc::clone(&self.listeners);
        let listener = &listeners[index];
        for _ in 0..ACCEPTS_PER_TURN_MAX {
            if cells.open.get() >= self.open_max {
                return self.full(index, now, cells);
            }
            self.full_since = None;
            match socket::accept(listener.fd.as_fd()) {
                Ok((fd, peer)) => {
                    cells.accepted.add(1);
                    adopt(fd, peer, &listener.name);
                }
                Err(error) => match socket::classify_accept(&error) {
                    AcceptFailure::Empty => {
                        self.ready[index] = false;
                        return;
                    }
                    AcceptFailure::Connection => {}
                    AcceptFailure::Resources => return self.out_of_descriptors(listener, now, &error, cells),
                    AcceptFailure::Fatal => {
                        tracing::error!(listener = %listener.name, %error, "accept4 failed; resting before the next try");
                        self.rest_until = Some(now + REST);
                        return;
                    }
                },
            }
        }
    }

    /// There is no place for what waits: closes it when there has been none for long.
    fn full(&mut self, index: usize, now: Instant, cells: &Cells) {
        let listener = &self.listeners[index];
        let since = *self.full_since.get_or_insert(now);
        if now < since + FULL_MAX {
            return;
        }
        let shed = (0..SHED_MAX).map_while(|_| socket::accept(listener.fd.as_fd()).ok()).count() as u64;
        cells.shed.add(shed);
        self.rest_until = Some(now + REST);
        self.ready[index] = shed == SHED_MAX as u64;
        if shed > 0 {
            tracing::warn!(
                listener = %listener.name, closed = shed, open = cells.open.get(),
                "an executor has as many connections as it may: more were closed unanswered; raise --connections or the \
                 limit on open files, or run more executors"
            );
        }
    }

    /// Uses the reserve to accept and close, so that clients learn at once, then rests.
    fn out_of_descriptors(&mut self, listener: &Listener, now: Instant, error: &io::Error, cells: &Cells) {
        let mut shed = 0;
        for _ in 0..SHED_MAX {
            drop(self.reserve.take());
            let accepted = socket::accept(listener.fd.as_fd());
            shed += u64::from(accepted.is_ok());
            let over = accepted.is_err();
            drop(accepted);
            self.reserve = reserve();
            if over || self.reserve.is_none() {
                break;
            }
        }
        cells.shed.add(shed);
        self.rest_until = Some(now + REST);
        tracing::warn!(
            listener = %listener.name, %error, closed = shed, open = cells.open.get(),
            "accept4 ran out of resources: connections were closed unanswered; raise the limit (ulimit -n, LimitNOFILE=) \
             or lower the number of connections per executor"
        );
    }
}

fn reserve() -> Option<OwnedFd> {
    std::fs::File::open("/dev/null").ok().map(OwnedFd::from)
}
