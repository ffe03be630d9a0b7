//! Accepting: readiness first, then `accept4` in a bounded batch. A connection is taken only when it will be served at
//! once; one that is not accepted stays in the slot's queue, where whoever lives in the slot next finds it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cells::Cells;
use super::reserve::{self, Claim};
use crate::rarely::Rarely;
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
    /// Its place in the address's group.
    pub index: usize,
}

/// The acceptor of one slot: its listeners, and a claim on a descriptor in reserve to shed with.
pub(crate) struct Acceptor {
    listeners: Arc<Vec<Listener>>,
    ready: Vec<bool>,
    _claim: Claim,
    /// Connections closed for want of descriptors.
    no_descriptors: Rarely,
    /// Connections closed because there were too many.
    too_many: Rarely,
    failures: Rarely,
    /// Tries in a row in which nothing could be accepted, not even to close it.
    stuck: u32,
    rest_until: Option<Instant>,
    open_max: u64,
    full_since: Option<Instant>,
}

impl Acceptor {
    /// Accepts while fewer than `open_max` connections are open.
    pub(crate) fn new(listeners: Arc<Vec<Listener>>, open_max: u64) -> Self {
        let ready = vec![true; listeners.len()];
        Self {
            listeners,
            ready,
            _claim: Claim::new(),
            no_descriptors: Rarely::default(),
            too_many: Rarely::default(),
            failures: Rarely::default(),
            stuck: 0,
            rest_until: None,
            open_max,
            full_since: None,
        }
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
        // With nothing ready, a report comes first; a time that has passed would have the executor spin until then.
        let waiting = self.ready.contains(&true);
        self.rest_until.max(self.full_since.map(|since| since + FULL_MAX)).filter(|_| waiting)
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
        let scarce = reserve::is_scarce() && !reserve::relieve();
        for index in 0..self.listeners.len() {
            match self.ready[index] {
                true if scarce => self.out_of_descriptors(index, now, None, cells),
                true => self.accept_from(index, now, cells, &mut adopt),
                false => {}
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
                Ok((fd, _)) if reserve::is_scarce() => {
                    drop(fd);
                    cells.shed.add(1);
                    self.no_descriptors.count(1);
                    return self.out_of_descriptors(index, now, None, cells);
                }
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
                    AcceptFailure::Resources => return self.out_of_descriptors(index, now, Some(&error), cells),
                    AcceptFailure::Fatal => {
                        self.failures.count(1);
                        if let Some(times) = self.failures.say(now) {
                            let name = &listener.name;
                            tracing::error!(listener = %name, %error, times, "accept4 failed, and is tried again");
                        }
                        self.rest_until = Some(now + REST);
                        return;
                    }
                },
            }
        }
    }

    /// There is no place for what waits: closes it when there has been none for long.
    fn full(&mut self, index: usize, now: Instant, cells: &Cells) {
        let since = *self.full_since.get_or_insert(now);
        if now < since + FULL_MAX {
            return;
        }
        let (shed, error) = self.close_waiting(index, cells, |listener| socket::accept(listener).map(drop));
        self.rest_until = Some(now + REST);
        self.too_many.count(shed);
        if self.too_many.owes()
            && let Some(closed) = self.too_many.say(now)
        {
            tracing::warn!(
                listener = %self.listeners[index].name, closed, open = cells.open.get(),
                "an executor has as many connections as it may: more were closed unanswered; raise --connections or the \
                 limit on open files, or run more executors"
            );
        }
        if let Some(error) = error {
            self.out_of_descriptors(index, now, Some(&error), cells);
        }
    }

    /// Accepts with a reserve and closes, so that clients learn at once, then rests. Without `error` it is another
    /// executor that ran out.
    fn out_of_descriptors(&mut self, index: usize, now: Instant, error: Option<&io::Error>, cells: &Cells) {
        let (shed, stopped_by) = self.close_waiting(index, cells, reserve::shed);
        self.rest_until = Some(now + REST);
        self.no_descriptors.count(shed);
        let (name, open) = (&self.listeners[index].name, cells.open.get());
        if (self.no_descriptors.owes() || error.is_some())
            && let Some(closed) = self.no_descriptors.say(now)
        {
            tracing::warn!(
                listener = %name, error = error.map(tracing::field::display), closed, open,
                "accept4 ran out of resources: connections were closed unanswered; raise the limit (ulimit -n, \
                 LimitNOFILE=) or lower the number of connections per executor"
            );
        }
        self.stuck = if shed == 0 && stopped_by.is_some() { self.stuck.saturating_add(1) } else { 0 };
        // Once is another executor that has a reserve by accident and gives it back at once.
        if let (2, Some(error)) = (self.stuck, stopped_by) {
            tracing::error!(
                listener = %name, %error, open,
                "no descriptor is left, not even to close new connections with: they wait until something is closed; raise \
                 the limit (ulimit -n, LimitNOFILE=)"
            );
        }
    }

    /// Closes what waits, in bounds, by means of `close_one`. How many that were, and what kept it from closing more.
    fn close_waiting(
        &mut self,
        index: usize,
        cells: &Cells,
        close_one: impl Fn(BorrowedFd<'_>) -> io::Result<()>,
    ) -> (u64, Option<io::Error>) {
        let mut closed = 0;
        let mut stopped_by = None;
        for _ in 0..SHED_MAX {
            match close_one(self.listeners[index].fd.as_fd()) {
                Ok(()) => closed += 1,
                Err(error) => match socket::classify_accept(&error) {
                    AcceptFailure::Connection => {}
                    AcceptFailure::Empty => {
                        self.ready[index] = false;
                        break;
                    }
                    AcceptFailure::Resources | AcceptFailure::Fatal => {
                        stopped_by = Some(error);
                        break;
                    }
                },
            }
        }
        cells.shed.add(closed);
        (closed, stopped_by)
    }
}
