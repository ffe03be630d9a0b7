//! A connected TCP stream of one executor. Implements hyper's and tokio's I/O traits (the traits only: no tokio runtime
//! is involved), so that the ecosystem's protocol crates work on it.

use std::io;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use hyper::rt::ReadBufCursor;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::executor::core::Core;

/// Bytes a connection may send in one turn of the executor before it yields to the others: fairness between one bulk
/// download and many small requests. 256 KiB is about 50 µs of copying. A direct send may overshoot it.
const SEND_BYTES_PER_TURN_MAX: usize = 256 * 1024;
/// The same for receiving.
const RECEIVE_BYTES_PER_TURN_MAX: usize = 256 * 1024;

/// A stream's socket is closed when it is dropped.
pub(crate) struct Stream {
    core: Rc<Core>,
    key: u32,
    /// Turn that the budgets below belong to.
    turn: u64,
    sent: usize,
    received: usize,
    /// The last send found no room, and none has since.
    blocked_since: Option<Instant>,
}

impl Stream {
    /// The stream of socket `key` of `core`'s driver.
    pub(crate) fn new(core: Rc<Core>, key: u32) -> Self {
        Self { core, key, turn: 0, sent: 0, received: 0, blocked_since: None }
    }

    /// The number of its socket, for [`Driver::poll_peer_end`](crate::net::driver::Driver::poll_peer_end) while somebody
    /// else has the stream.
    pub(crate) fn key(&self) -> u32 {
        self.key
    }

    /// Whether a read would find something now.
    pub(crate) fn is_readable(&self) -> bool {
        self.core.driver().is_readable(self.key)
    }

    /// Completes when there is something to read: bytes, the end of the stream or an error.
    pub(crate) fn poll_readable(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.is_readable() {
            return Poll::Ready(());
        }
        self.poll_receive(context, |_| 0).map(drop)
    }

    fn within_budget(&mut self, context: &Context<'_>) -> bool {
        let turn = self.core.turn();
        if self.turn != turn {
            (self.turn, self.sent, self.received) = (turn, 0, 0);
        }
        let within = self.sent < SEND_BYTES_PER_TURN_MAX && self.received < RECEIVE_BYTES_PER_TURN_MAX;
        if !within {
            context.waker().wake_by_ref();
        }
        within
    }

    pub(crate) fn poll_receive(
        &mut self,
        context: &mut Context<'_>,
        copy: impl FnMut(&[u8]) -> usize,
    ) -> Poll<io::Result<usize>> {
        if !self.within_budget(context) {
            return Poll::Pending;
        }
        let polled = self.core.driver().poll_read(self.key, context, copy);
        if let Poll::Ready(Ok(count)) = polled {
            self.received += count;
        }
        polled
    }

    /// Bytes it may still send in this turn; at least one.
    pub(crate) fn poll_send_budget(&mut self, context: &mut Context<'_>) -> Poll<usize> {
        if self.within_budget(context) { Poll::Ready(SEND_BYTES_PER_TURN_MAX - self.sent) } else { Poll::Pending }
    }

    pub(crate) fn poll_send(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_send_budget(context));
        let polled = self.core.driver().send(self.key, bytes, context);
        self.count_sent(polled)
    }

    /// Sends what more is to follow at once.
    pub(crate) fn poll_send_ahead(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_send_budget(context));
        let polled = self.core.driver().send_ahead(self.key, bytes, context);
        self.count_sent(polled)
    }

    /// Sends from a file, past our memory; at least a byte. What is sent should be in the page cache.
    ///
    /// # Errors
    /// The socket's, and `UnexpectedEof` when the file ends at `position`.
    pub(crate) fn poll_send_file(
        &mut self,
        context: &mut Context<'_>,
        file: BorrowedFd<'_>,
        position: u64,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        let length = length.min(ready!(self.poll_send_budget(context)));
        let polled = self.core.driver().send_file(self.key, file, position, length, context);
        if let Poll::Ready(Ok(0)) = polled {
            let shrunk = format!("the file became shorter while it was sent: it has no byte {position} any more");
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, shrunk)));
        }
        self.count_sent(polled)
    }

    fn count_sent(&mut self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match polled {
            Poll::Ready(Ok(count)) => {
                self.sent += count;
                self.blocked_since = None;
            }
            Poll::Pending => _ = self.blocked_since.get_or_insert(self.core.now()),
            Poll::Ready(Err(_)) => {}
        }
        polled
    }

    /// Since when the peer has taken nothing of what there is for it.
    pub(crate) fn blocked_since(&self) -> Option<Instant> {
        self.blocked_since
    }

    /// Resets the connection, and throws away what is queued for the peer.
    pub(crate) fn reset(&mut self) {
        if let Some(mut driver) = self.core.driver_if_live() {
            driver.reset(self.key);
        }
    }

    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.core.driver().poll_shutdown(self.key, context) {
            // The peer has gone already: there is nobody left to tell.
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            other => other,
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(mut driver) = self.core.driver_if_live() {
            driver.abandon(self.key);
        }
    }
}

/// Copies from what was received into hyper's and tokio's buffers, which differ in type only.
macro_rules! copy_into {
    ($buffer:expr) => {
        |bytes: &[u8]| {
            let count = bytes.len().min($buffer.remaining());
            $buffer.put_slice(&bytes[..count]);
            count
        }
    };
}

impl hyper::rt::Read for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        self.get_mut().poll_receive(context, copy_into!(buffer)).map_ok(drop)
    }
}

impl hyper::rt::Write for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What was taken is in the kernel's hands, or queued for them and goes there with this turn.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_end(context)
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_receive(context, copy_into!(buffer)).map_ok(drop)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        hyper::rt::Write::poll_write(self, context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        hyper::rt::Write::poll_flush(self, context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        hyper::rt::Write::poll_shutdown(self, context)
    }
}
