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
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use slab::Slab;
use smallvec::SmallVec;

use super::registry::{Registered, Registry};
use super::ring::{Buffer, Completion, OperationKey, Purpose, Ring, RingOptions};
use crate::sys::socket;

/// Bytes of one connection that wait unread before its receive is stopped. The kernel delivers
/// in runs of up to 33 buffers (`MULTISHOT_MAX_RETRY`), and up to four of them before the stop takes effect: a connection
/// costs at most this plus about 530 KiB.
pub(crate) const UNREAD_BYTES_MAX: usize = 64 * 1024;

/// Tasks ready in one turn from which on small writes are queued. Measured: queueing costs about 250 instructions a
/// write and saves a system call; at 4 connections direct writes are the cheaper, at 64 queued ones.
const BATCH_MIN: usize = 8;
/// Longer writes are not worth copying.
const QUEUED_SEND_BYTES_MAX: usize = 4096;
/// Vectors kept for queued writes: 64 of 4 KiB at most.
const SPARE_MAX: usize = 64;

/// Buffers received in one turn from which on a multishot receive may have hit its bound (`MULTISHOT_MAX_RETRY`, 32).
const BURST: u16 = 32;

/// State of a connection's receive operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Receive {
    Stopped,
    Armed(OperationKey),
    /// A cancellation is under way; the final completion is still to come.
    Stopping,
}

struct Socket {
    fd: Registered,
    /// Received in this turn, not yet read. In place: a block of heap per connection, made between the buffers of
    /// protocols, would keep the memory of those from ever going back to the system.
    fresh: SmallVec<[Buffer; 2]>,
    /// How much of `fresh[0]` has been read.
    fresh_offset: usize,
    /// Received in earlier turns, not yet read.
    unread: Vec<u8>,
    unread_offset: usize,
    receive: Receive,
    end: Option<End>,
    /// A wait for room in the send buffer is under way.
    writable: Option<OperationKey>,
    /// A send is under way in the ring.
    sending: Option<OperationKey>,
    /// A send in the ring failed after its bytes had been taken: what the next write is told.
    send_error: Option<i32>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// Its stream is gone; the row stays until the last operation has completed.
    abandoned: bool,
    /// Already noted in `Driver::touched` in this turn.
    touched: bool,
    /// Buffers received in this turn.
    burst: u16,
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
    /// Keys of listeners whose watch has ended: by the kernel, when completions overflowed, or by us.
    pub unwatched: Vec<u32>,
    /// The inbox is to be watched again.
    pub inbox_unwatched: bool,
    /// Any completion but that of a tick.
    pub activity: bool,
}

pub(crate) struct Driver {
    registry: Arc<Registry>,
    ring: Ring,
    sockets: Slab<Socket>,
    completions: Vec<Completion>,
    /// Sockets that received in this turn.
    touched: Vec<u32>,
    /// Sockets whose receive ended for want of buffers; armed again at the end of the turn.
    starved: Vec<u32>,
    /// The ticks that are armed, the earliest last: one is armed only when it is to come before all others, so they
    /// fire from the end.
    ticks: Vec<Instant>,
    /// Whether small writes are queued in this turn.
    batching: bool,
    /// Vectors for queued writes.
    spare: Vec<Vec<u8>>,
}

impl Driver {
    /// A driver whose sockets are entered in `registry`.
    pub(crate) fn new(options: RingOptions, registry: Arc<Registry>) -> io::Result<Self> {
        Ok(Self {
            registry,
            ring: Ring::new(options)?,
            sockets: Slab::new(),
            completions: Vec::with_capacity(256),
            touched: Vec::new(),
            starved: Vec::new(),
            ticks: Vec::new(),
            batching: false,
            spare: Vec::new(),
        })
    }

    /// Starts watching a listener (or, after its watch has ended, starts again).
    pub(crate) fn watch_listener(&mut self, fd: BorrowedFd<'_>, listener: u32) -> OperationKey {
        self.ring.readable(fd, Purpose::Listener { listener })
    }

    /// Ends a watch; until the kernel has let go of it, it keeps the listener open.
    pub(crate) fn unwatch_listener(&mut self, watch: OperationKey) {
        self.ring.cancel(watch);
    }

    pub(crate) fn watch_inbox(&mut self, eventfd: BorrowedFd<'_>) {
        self.ring.readable(eventfd, Purpose::Inbox);
    }

    /// Adopts a connected, non-blocking socket and starts receiving from it.
    pub(crate) fn adopt(&mut self, fd: OwnedFd) -> u32 {
        let key = self.sockets.insert(Socket {
            fd: Registered::new(fd, &self.registry),
            fresh: SmallVec::new(),
            fresh_offset: 0,
            unread: Vec::new(),
            unread_offset: 0,
            receive: Receive::Stopped,
            end: None,
            writable: None,
            sending: None,
            send_error: None,
            reader: None,
            writer: None,
            abandoned: false,
            touched: false,
            burst: 0,
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
        // A queued send has been taken and is carried out, as the kernel does with what it has taken: the socket is closed
        // after it. TCP's user timeout bounds how long a peer may keep it.
        if let Some(operation) = socket.writable {
            self.ring.cancel(operation);
        }
        self.close_if_quiet(key);
    }

    /// Resets the connection: its peer is not to have what is queued for it. To be called before [`Driver::abandon`].
    pub(crate) fn reset(&mut self, key: u32) {
        // It fails only when the connection has ended anyway. A queued send ends by it, too.
        let _ = socket::reset(self.sockets[key as usize].fd.as_fd());
    }

    fn close_if_quiet(&mut self, key: u32) {
        let socket = &self.sockets[key as usize];
        if socket.abandoned
            && socket.receive == Receive::Stopped
            && socket.writable.is_none()
            && socket.sending.is_none()
        {
            self.sockets.remove(key as usize);
        }
    }

    /// Sockets that are not closed yet.
    #[cfg(test)]
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
            // Nearly always the only one, and then nothing has to move up.
            let read = if socket.fresh.len() == 1 { socket.fresh.pop() } else { Some(socket.fresh.remove(0)) };
            read.into_iter().for_each(|buffer| self.ring.recycle(buffer));
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

    /// Completes when the peer has ended its direction, or with the error that the connection has failed by, whatever is
    /// still unread. What is held back by [`UNREAD_BYTES_MAX`] hides what comes behind it.
    pub(crate) fn poll_peer_end(&mut self, key: u32, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let is_readable = self.is_readable(key);
        let socket = &mut self.sockets[key as usize];
        match socket.end {
            Some(End::Closed) => Poll::Ready(Ok(())),
            Some(End::Failed(errno)) => Poll::Ready(Err(io::Error::from_raw_os_error(errno))),
            None => {
                remember(&mut socket.reader, context.waker());
                if !is_readable {
                    self.arm(key);
                }
                Poll::Pending
            }
        }
    }

    /// Sends `bytes`, or as many of them as are taken now.
    ///
    /// Where few tasks are ready, a write is a `send(2)`: nothing to wait for, nothing copied. Where [`BATCH_MIN`] or more
    /// are (see [`Driver::begin_turn`]), small writes are copied and queued, and go to the kernel together with the next
    /// entry; that saves a system call each. A queued write has been taken: its error is met by the next one.
    pub(crate) fn send(&mut self, key: u32, bytes: &[u8], context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let socket = &mut self.sockets[key as usize];
        let free = socket.send_error.is_none() && socket.sending.is_none() && socket.writable.is_none();
        if free && self.batching && bytes.len() <= QUEUED_SEND_BYTES_MAX {
            let mut copy = self.spare.pop().unwrap_or_default();
            copy.extend_from_slice(bytes);
            socket.sending = Some(self.ring.send(socket.fd.as_fd(), copy, key));
            return Poll::Ready(Ok(bytes.len()));
        }
        self.send_directly(key, context, |fd| socket::send(fd, bytes))
    }

    /// [`Driver::send`] of what more is to follow at once: never queued, and kept by the kernel for what follows.
    pub(crate) fn send_ahead(&mut self, key: u32, bytes: &[u8], context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.send_directly(key, context, |fd| socket::send_ahead(fd, bytes))
    }

    /// Sends `length` bytes of `file` at `position`, or as many of them as are taken now; 0 when the file ends there.
    /// They should be in memory: for those that are not, the kernel waits for the disk.
    pub(crate) fn send_file(
        &mut self,
        key: u32,
        file: BorrowedFd<'_>,
        position: u64,
        length: usize,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        self.send_directly(key, context, |fd| socket::send_file(fd, file, position, length))
    }

    /// Sends by a system call, once a queued send has gone and while there is room.
    fn send_directly(
        &mut self,
        key: u32,
        context: &mut Context<'_>,
        send: impl FnOnce(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let socket = &mut self.sockets[key as usize];
        if let Some(errno) = socket.send_error {
            return Poll::Ready(Err(io::Error::from_raw_os_error(errno)));
        }
        if socket.sending.is_none() && socket.writable.is_none() {
            match send(socket.fd.as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    socket.writable = Some(self.ring.writable(socket.fd.as_fd(), key));
                }
                other => return Poll::Ready(other),
            }
        }
        remember(&mut socket.writer, context.waker());
        Poll::Pending
    }

    /// Lets the peer see the end of our direction, after all that was sent.
    pub(crate) fn poll_shutdown(&mut self, key: u32, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = &mut self.sockets[key as usize];
        if socket.sending.is_some() {
            remember(&mut socket.writer, context.waker());
            return Poll::Pending;
        }
        Poll::Ready(socket::shutdown_write(socket.fd.as_fd()))
    }

    /// Says how many tasks are about to be polled: whether writes are worth queueing.
    pub(crate) fn begin_turn(&mut self, ready: usize) {
        self.batching = ready >= BATCH_MIN;
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
            Purpose::Listener { listener } => {
                arrivals.listeners.push(listener);
                if !completion.more {
                    arrivals.unwatched.push(listener);
                }
            }
            Purpose::Inbox => arrivals.inbox_unwatched |= !completion.more,
            Purpose::Send { socket } => self.sent(socket, completion),
            Purpose::Cancel => {}
            Purpose::Tick => {
                self.ticks.pop();
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
                socket.burst = socket.burst.saturating_add(1);
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

    fn sent(&mut self, key: u32, completion: Completion) {
        let Completion { result, sent: mut bytes, .. } = completion;
        let socket = &mut self.sockets[key as usize];
        socket.sending = None;
        if result >= 0 && (result as usize) < bytes.len() {
            // Interrupted in the middle: the rest follows.
            bytes.drain(..result as usize);
            socket.sending = Some(self.ring.send(socket.fd.as_fd(), bytes, key));
            return;
        }
        if self.spare.len() < SPARE_MAX {
            bytes.clear();
            self.spare.push(bytes);
        }
        if socket.abandoned {
            return self.close_if_quiet(key);
        }
        if result < 0 {
            socket.send_error = Some(-result);
        }
        if let Some(waker) = socket.writer.take() {
            waker.wake();
        }
    }

    /// To be called when the tasks of a turn have run, before the kernel is entered again.
    pub(crate) fn end_turn(&mut self) {
        while let Some(key) = self.touched.pop() {
            self.spill(key);
        }
        if !self.starved.is_empty() {
            self.ring.offer_more_buffers();
        }
        while let Some(key) = self.starved.pop() {
            if self.sockets.get(key as usize).is_some_and(|socket| socket.unread.len() < UNREAD_BYTES_MAX) {
                self.arm(key);
            }
        }
    }

    /// Moves what a connection has not read to the heap, and stops its receive where that is due: when it holds enough,
    /// and after a burst. For a multishot receive that has hit the kernel's bound on its retries may go back to waiting
    /// with the peer's reset behind it, and never tell; armed anew it looks first.
    fn spill(&mut self, key: u32) {
        let Some(socket) = self.sockets.get_mut(key as usize) else { return };
        socket.touched = false;
        let burst = std::mem::take(&mut socket.burst) >= BURST;
        for buffer in std::mem::take(&mut socket.fresh) {
            socket.unread.extend_from_slice(&self.ring.bytes(&buffer)[std::mem::take(&mut socket.fresh_offset)..]);
            self.ring.recycle(buffer);
        }
        if let (true, Receive::Armed(operation)) = (burst || socket.unread.len() >= UNREAD_BYTES_MAX, socket.receive) {
            socket.receive = Receive::Stopping;
            self.ring.cancel(operation);
        }
    }

    /// Sees to it that a wait in the ring ends at `deadline` at the latest.
    pub(crate) fn wake_by(&mut self, deadline: Instant, now: Instant) {
        if self.ticks.last().is_none_or(|armed| *armed > deadline) {
            self.ticks.push(deadline);
            self.ring.tick(deadline.saturating_duration_since(now).max(Duration::from_micros(50)));
        }
    }

    /// Whether sends wait for the next entry into the kernel.
    pub(crate) fn has_queued_sends(&mut self) -> bool {
        self.batching && self.ring.has_entries()
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

#[cfg(test)]
mod tests;
