//! The socket table of an executor: turns completions of the ring into bytes that can be read, and wakes who waits.
//!
//! Receiving: one multishot receive per connection, armed for as long as somebody may want its bytes. Provided buffers
//! are held within a turn only: what its connection has not read by the end of the turn is moved to the heap
//! ([`Driver::end_turn`]), so a slow handler can never starve the others of buffers. A connection that holds
//! [`UNREAD_BYTES_MAX`] is not received from until it has been read empty: TCP's own window pushes back on the peer.
//!
//! Sending: see [`Driver::send`]. The driver never blocks and spawns nothing; `executor` calls it once per turn.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use slab::Slab;

use super::ring::{Buffer, Completion, OperationKey, Purpose, Ring, RingOptions};
use crate::sys::socket;

/// Bytes of one connection that wait unread before its receive is stopped. The kernel may deliver up to 32 more
/// buffers before the stop takes effect (`MULTISHOT_MAX_RETRY`), so a connection costs at most this plus 128 KiB.
pub(crate) const UNREAD_BYTES_MAX: usize = 64 * 1024;

/// State of a connection's receive operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Receive {
    Stopped,
    Armed(OperationKey),
    /// A cancellation is under way; the final completion is still to come.
    Stopping,
}

struct Socket {
    fd: OwnedFd,
    /// Received in this turn, not yet read.
    fresh: Vec<Buffer>,
    /// How much of `fresh[0]` has been read.
    fresh_offset: usize,
    /// Received in earlier turns, not yet read.
    unread: Vec<u8>,
    unread_offset: usize,
    receive: Receive,
    end: Option<End>,
    /// A wait for room in the send buffer is under way.
    writable: Option<OperationKey>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// Its stream is gone; the row stays until the last operation has completed.
    abandoned: bool,
    /// Already noted in `Driver::touched` in this turn.
    touched: bool,
}

/// How the peer ended its direction.
#[derive(Clone, Copy)]
enum End {
    Closed,
    Failed(i32),
}

/// What a turn of the ring brought besides bytes.
#[derive(Default, Debug)]
pub(crate) struct Arrivals {
    /// Keys of listeners that have connections to accept.
    pub listeners: Vec<u32>,
    pub inbox: bool,
    /// Any completion but that of a tick.
    pub activity: bool,
}

pub(crate) struct Driver {
    ring: Ring,
    sockets: Slab<Socket>,
    completions: Vec<Completion>,
    /// Sockets that received in this turn.
    touched: Vec<u32>,
    /// Sockets whose receive ended for want of buffers; armed again at the end of the turn.
    starved: Vec<u32>,
    /// The earliest tick that is armed.
    tick: Option<Instant>,
}

impl Driver {
    pub(crate) fn new(options: RingOptions) -> io::Result<Self> {
        Ok(Self {
            ring: Ring::new(options)?,
            sockets: Slab::new(),
            completions: Vec::with_capacity(256),
            touched: Vec::new(),
            starved: Vec::new(),
            tick: None,
        })
    }

    /// Starts watching a listener (or, after its watch has ended, starts again).
    pub(crate) fn watch_listener(&mut self, fd: BorrowedFd<'_>, listener: u32) {
        self.ring.readable(fd, Purpose::Listener { listener });
    }

    pub(crate) fn watch_inbox(&mut self, eventfd: BorrowedFd<'_>) {
        self.ring.readable(eventfd, Purpose::Inbox);
    }

    /// Adopts a connected, non-blocking socket and starts receiving from it.
    pub(crate) fn adopt(&mut self, fd: OwnedFd) -> u32 {
        let key = self.sockets.insert(Socket {
            fd,
            fresh: Vec::new(),
            fresh_offset: 0,
            unread: Vec::new(),
            unread_offset: 0,
            receive: Receive::Stopped,
            end: None,
            writable: None,
            reader: None,
            writer: None,
            abandoned: false,
            touched: false,
        }) as u32;
        self.arm(key);
        key
    }

    fn arm(&mut self, key: u32) {
        let socket = &mut self.sockets[key as usize];
        if socket.receive == Receive::Stopped && socket.end.is_none() && !socket.abandoned {
            socket.receive = Receive::Armed(self.ring.receive(socket.fd.as_fd(), key));
        }
    }

    /// Gives up a connection: what is unread is dropped, the descriptor is closed as soon as the kernel has let go of
    /// it, which is at once when the peer has ended.
    pub(crate) fn abandon(&mut self, key: u32) {
        let socket = &mut self.sockets[key as usize];
        socket.abandoned = true;
        (socket.reader, socket.writer) = (None, None);
        for buffer in socket.fresh.drain(..) {
            self.ring.recycle(buffer);
        }
        if let Receive::Armed(operation) = socket.receive {
            socket.receive = Receive::Stopping;
            self.ring.cancel(operation);
        }
        if let Some(operation) = socket.writable {
            self.ring.cancel(operation);
        }
        self.close_if_quiet(key);
    }

    fn close_if_quiet(&mut self, key: u32) {
        let socket = &self.sockets[key as usize];
        if socket.abandoned && socket.receive == Receive::Stopped && socket.writable.is_none() {
            self.sockets.remove(key as usize);
        }
    }

    pub(crate) fn fd(&self, key: u32) -> BorrowedFd<'_> {
        self.sockets[key as usize].fd.as_fd()
    }

    /// Sockets that are not closed yet.
    pub(crate) fn sockets(&self) -> usize {
        self.sockets.len()
    }

    /// Hands received bytes to `copy`, which says how many it took, until it takes none; `Ready(0)` is the end of the
    /// stream.
    pub(crate) fn poll_read(
        &mut self,
        key: u32,
        context: &mut Context<'_>,
        mut copy: impl FnMut(&[u8]) -> usize,
    ) -> Poll<io::Result<usize>> {
        let socket = &mut self.sockets[key as usize];
        let mut taken = 0;
        if !socket.unread.is_empty() {
            taken += copy(&socket.unread[socket.unread_offset..]);
            socket.unread_offset += taken;
            if socket.unread_offset < socket.unread.len() {
                return Poll::Ready(Ok(taken));
            }
            // Read empty: the memory goes back, an idle connection holds none.
            socket.unread = Vec::new();
            socket.unread_offset = 0;
        }
        while let Some(buffer) = socket.fresh.first() {
            let bytes = &self.ring.bytes(buffer)[socket.fresh_offset..];
            let (all, took) = (bytes.len(), copy(bytes));
            taken += took;
            if took < all {
                socket.fresh_offset += took;
                return Poll::Ready(Ok(taken));
            }
            socket.fresh_offset = 0;
            self.ring.recycle(socket.fresh.remove(0));
        }
        if taken > 0 {
            self.arm(key);
            return Poll::Ready(Ok(taken));
        }
        match socket.end {
            Some(End::Closed) => Poll::Ready(Ok(0)),
            Some(End::Failed(errno)) => Poll::Ready(Err(io::Error::from_raw_os_error(errno))),
            None => {
                remember(&mut socket.reader, context.waker());
                self.arm(key);
                Poll::Pending
            }
        }
    }

    /// Whether a read would find something: bytes, the end or an error.
    pub(crate) fn is_readable(&self, key: u32) -> bool {
        let socket = &self.sockets[key as usize];
        !socket.unread.is_empty() || !socket.fresh.is_empty() || socket.end.is_some()
    }

    /// Sends at once as much as the socket takes; waits for room when it takes nothing.
    pub(crate) fn send(&mut self, key: u32, bytes: &[u8], context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let socket = &mut self.sockets[key as usize];
        if socket.writable.is_none() {
            match socket::send(socket.fd.as_fd(), bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    socket.writable = Some(self.ring.writable(socket.fd.as_fd(), key));
                }
                other => return Poll::Ready(other),
            }
        }
        remember(&mut socket.writer, context.waker());
        Poll::Pending
    }

    /// Lets the peer see the end of our direction.
    pub(crate) fn shutdown_write(&self, key: u32) -> io::Result<()> {
        socket::shutdown_write(self.fd(key))
    }

    /// Enters the kernel when that does anything, or to wait (`wait`), and takes in what it completed.
    pub(crate) fn turn(&mut self, wait: bool, arrivals: &mut Arrivals) -> io::Result<()> {
        if wait || self.ring.wants_enter() {
            self.ring.enter(u32::from(wait))?;
        }
        let mut completions = std::mem::take(&mut self.completions);
        self.ring.reap(&mut completions);
        for completion in completions.drain(..) {
            self.take_in(completion, arrivals);
        }
        self.completions = completions;
        Ok(())
    }

    fn take_in(&mut self, completion: Completion, arrivals: &mut Arrivals) {
        match completion.purpose {
            Purpose::Receive { socket } => self.received(socket, completion),
            Purpose::Writable { socket } => self.became_writable(socket),
            Purpose::Listener { listener } => arrivals.listeners.push(listener),
            Purpose::Inbox => arrivals.inbox = true,
            Purpose::Send { .. } | Purpose::Cancel => {}
            Purpose::Tick => {
                self.tick = None;
                return;
            }
        }
        arrivals.activity = true;
    }

    fn received(&mut self, key: u32, completion: Completion) {
        let socket = &mut self.sockets[key as usize];
        if !completion.more {
            socket.receive = Receive::Stopped;
        }
        if let Some(buffer) = completion.buffer {
            if socket.abandoned || buffer.len() == 0 {
                self.ring.recycle(buffer);
            } else {
                socket.fresh.push(buffer);
            }
        }
        if socket.abandoned {
            return self.close_if_quiet(key);
        }
        match completion.result {
            0 => socket.end = Some(End::Closed),
            result if result > 0 => {}
            result if -result == libc::ENOBUFS => self.starved.push(key),
            // Our own stop: whoever reads next starts again.
            result if -result == libc::ECANCELED => {}
            result => socket.end = Some(End::Failed(-result)),
        }
        if !socket.touched {
            socket.touched = true;
            self.touched.push(key);
        }
        if let Some(waker) = &socket.reader {
            waker.wake_by_ref();
        }
    }

    fn became_writable(&mut self, key: u32) {
        let socket = &mut self.sockets[key as usize];
        socket.writable = None;
        if socket.abandoned {
            return self.close_if_quiet(key);
        }
        if let Some(waker) = socket.writer.take() {
            waker.wake();
        }
    }

    /// To be called when the tasks of a turn have run, before the kernel is entered again.
    pub(crate) fn end_turn(&mut self) {
        while let Some(key) = self.touched.pop() {
            let Some(socket) = self.sockets.get_mut(key as usize) else { continue };
            socket.touched = false;
            if socket.fresh.is_empty() {
                continue;
            }
            for buffer in std::mem::take(&mut socket.fresh) {
                socket.unread.extend_from_slice(&self.ring.bytes(&buffer)[std::mem::take(&mut socket.fresh_offset)..]);
                self.ring.recycle(buffer);
            }
            if let (true, Receive::Armed(operation)) = (socket.unread.len() >= UNREAD_BYTES_MAX, socket.receive) {
                socket.receive = Receive::Stopping;
                self.ring.cancel(operation);
            }
        }
        while let Some(key) = self.starved.pop() {
            if self.sockets.get(key as usize).is_some_and(|socket| socket.unread.len() < UNREAD_BYTES_MAX) {
                self.arm(key);
            }
        }
    }

    /// Sees to it that a wait in the ring ends at `deadline` at the latest.
    pub(crate) fn wake_by(&mut self, deadline: Instant, now: Instant) {
        if self.tick.is_none_or(|armed| armed > deadline) {
            self.tick = Some(deadline);
            self.ring.tick(deadline.saturating_duration_since(now).max(Duration::from_micros(50)));
        }
    }

    /// Whether a tick is armed, that is: the next wait in the ring is bounded.
    pub(crate) fn has_tick(&self) -> bool {
        self.tick.is_some()
    }

    pub(crate) fn ring(&mut self) -> &mut Ring {
        &mut self.ring
    }
}

/// Keeps `waker` unless the one kept already wakes the same task.
fn remember(place: &mut Option<Waker>, waker: &Waker) {
    if !place.as_ref().is_some_and(|kept| kept.will_wake(waker)) {
        *place = Some(waker.clone());
    }
}
