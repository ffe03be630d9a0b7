//! The body of a file response: nothing, bytes, or ranges of an open file read as the client takes
//! them.
//!
//! **Two ways to read.** Each chunk is first asked for with `preadv2(RWF_NOWAIT)`, which copies
//! what the page cache holds and does not wait. That is the hot path: no ring, no wake-up. What is
//! not in memory is read through glommio's ring, so that a cold disk stalls this body and not the
//! executor.
//!
//! **Memory.** A body holds at most two chunks: one on its way to hyper and, after a chunk that
//! came from the disk, the next one being read while the network takes the first (disk and network
//! overlap). For hot files nothing is read ahead: the page cache is the buffer. What hyper itself
//! gathers before it writes is hyper's `max_buf_size`.
//!
//! **Past this memory.** A large body on a connection of ours is not read at all: its connection asks which bytes are in
//! memory ([`FileBody::resident`]) and has the kernel send those, and takes frames for the others.
//!
//! **A body dropped half-way** (the client went away) either owns its file, which drops and closes,
//! or has lent it to a read in flight. Then the drop of that read's future does this, in order, in
//! glommio 0.9:
//! 1. `Source::drop`: a read not yet submitted is skipped; a submitted one gets a cancellation,
//!    which goes in before any new submission. The buffer belongs to the source, and the reactor's
//!    source map keeps that alive until the kernel's completion has been seen, so the kernel never
//!    writes to freed memory.
//! 2. `GlommioFile::drop` queues the close in the same ring. It runs behind the read, on the
//!    reactor's next turn: the descriptor's number cannot be reused under the read.
//! 3. The [`Pending`] count goes down.
//!
//! So an executor has to turn once more after its last body was dropped; one that ends in that very
//! moment leaves the descriptor open.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::mem;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::thread::{self, ThreadId};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use slab::Slab;

use super::open::{self, Nowait};
use super::pending::Pending;
use super::range::ByteRange;

/// The most bytes of one read. Measured on a 256 MiB file: 64, 128 and 256 KiB read it at the same
/// speed, 11 GiB/s hot and 1.6 cold, at the same CPU time; 16 KiB at two thirds of that. So the
/// smallest of the good ones.
pub(super) const CHUNK_BYTES: usize = 64 << 10;

/// Bodies of this size and more are sent by sendfile(2), where they can be; smaller ones that are in memory are read
/// and leave in one write with their head. Measured: at 16 KiB sendfile took 1.17 times the CPU time of copying, at 32
/// KiB 0.86, at 64 KiB 0.75.
pub(super) const SENDFILE_BYTES_MIN: u64 = 32 << 10;

/// The body of every response of [`Files`](super::Files).
///
/// It is `Send`, so that a [`Body`](crate::Body) made of it is. But a read from the disk that has begun is its executor's:
/// polled on another thread, it fails.
///
/// Its error is an I/O error from the disk, or `UnexpectedEof` when the file became shorter than
/// the response had promised; the connection is then to be closed, as hyper does. A file that grew
/// is sent up to the promised length.
///
/// ```
/// use ringleader::{Body, FileBody, Response};
///
/// /// Sent by sendfile, as long as nothing is wrapped around it.
/// fn cached(mut response: Response<FileBody>) -> Response<Body> {
///     response.headers_mut().insert("cache-control", "max-age=60".parse().expect("a header's value"));
///     response.map(Body::from)
/// }
/// ```
pub struct FileBody(Inner);

enum Inner {
    Empty,
    Full(Bytes),
    Stream(Box<Stream>),
}

/// A piece of a streamed body.
pub(super) enum Part {
    /// A part header of multipart/byteranges.
    Text(Bytes),
    File(ByteRange),
}

impl Part {
    pub(super) fn length(&self) -> u64 {
        match self {
            Part::Text(text) => text.len() as u64,
            Part::File(range) => range.length(),
        }
    }
}

impl FileBody {
    pub(crate) fn empty() -> FileBody {
        FileBody(Inner::Empty)
    }

    pub(super) fn full(bytes: Bytes) -> FileBody {
        FileBody(if bytes.is_empty() { Inner::Empty } else { Inner::Full(bytes) })
    }

    /// Streams `parts`. `first` is what has been read already from the start of the first part;
    /// `nowait` says whether the file's file system knows RWF_NOWAIT, `sendfile` whether the connection may send it.
    pub(super) fn stream(
        file: File,
        parts: VecDeque<Part>,
        first: Option<Bytes>,
        nowait: bool,
        sendfile: bool,
    ) -> FileBody {
        let remaining = parts.iter().map(Part::length).sum();
        let state = match first {
            Some(bytes) => State::Ready(file, bytes),
            None => State::Idle(file),
        };
        let reader = Some(Reader { state, nowait, chunk_bytes: CHUNK_BYTES });
        FileBody(Inner::Stream(Box::new(Stream { parts, remaining, reader, sendfile })))
    }
}

/// Bytes of a file that are in memory.
pub(crate) struct Resident<'a> {
    pub file: &'a File,
    pub position: u64,
    /// Exclusive.
    pub end: u64,
}

/// What a connection asks of a body that it sends past this memory.
impl FileBody {
    /// The bytes, when they have been read already.
    pub(crate) fn into_bytes(self) -> Result<Bytes, FileBody> {
        match self.0 {
            Inner::Empty => Ok(Bytes::new()),
            Inner::Full(bytes) => Ok(bytes),
            Inner::Stream(_) => Err(self),
        }
    }

    /// Whether it gains from being sent by sendfile(2).
    pub(crate) fn is_for_sendfile(&self) -> bool {
        match &self.0 {
            Inner::Stream(stream) => stream.sendfile && stream.remaining >= SENDFILE_BYTES_MIN,
            Inner::Empty | Inner::Full(_) => false,
        }
    }

    /// Those of the next bytes, `most` at most, that are in memory: to be sent now, and reported to
    /// [`FileBody::advance`]. `None` when a frame is to be taken.
    ///
    /// # Errors
    /// As preadv2(2).
    pub(crate) fn resident(&mut self, most: u64) -> io::Result<Option<Resident<'_>>> {
        match &mut self.0 {
            Inner::Stream(stream) => stream.resident(most),
            Inner::Empty | Inner::Full(_) => Ok(None),
        }
    }

    /// So many of the resident bytes have been sent.
    pub(crate) fn advance(&mut self, count: u64) {
        if let Inner::Stream(stream) = &mut self.0
            && let Some(Part::File(range)) = stream.parts.front_mut()
        {
            range.start += count;
            stream.took(Some(count));
        }
    }
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Inner::Stream(stream) = &mut self.0 {
            return stream.poll_part(context).map_ok(Frame::data);
        }
        match mem::replace(&mut self.0, Inner::Empty) {
            Inner::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
            Inner::Empty | Inner::Stream(_) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.remaining() == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.remaining())
    }
}

impl FileBody {
    /// Bytes still promised.
    pub(crate) fn remaining(&self) -> u64 {
        match &self.0 {
            Inner::Empty => 0,
            Inner::Full(bytes) => bytes.len() as u64,
            Inner::Stream(stream) => stream.remaining,
        }
    }
}

impl fmt::Debug for FileBody {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("FileBody").field("remaining_bytes", &self.remaining()).finish_non_exhaustive()
    }
}

struct Stream {
    parts: VecDeque<Part>,
    /// Bytes still promised.
    remaining: u64,
    /// Gone as soon as it is not needed, so that a finished body holds no descriptor while hyper
    /// still flushes.
    reader: Option<Reader>,
    /// It may be sent by sendfile(2).
    sendfile: bool,
}

impl Stream {
    fn poll_part(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        let chunk = match (self.parts.front_mut(), &mut self.reader) {
            (Some(Part::Text(text)), _) => Ok(mem::take(text)),
            (Some(Part::File(range)), Some(reader)) => {
                ready!(reader.poll_chunk(context, *range)).inspect(|chunk| range.start += chunk.len() as u64)
            }
            (None, _) | (Some(Part::File(_)), None) => return Poll::Ready(None),
        };
        self.took(chunk.as_ref().map(|bytes| bytes.len() as u64).ok());
        Poll::Ready(Some(chunk))
    }

    /// So many bytes of the first part are done with; `None`: the body has failed, and is over.
    fn took(&mut self, count: Option<u64>) {
        match count {
            Some(count) => {
                self.remaining -= count;
                if self.parts.front().is_some_and(|part| part.length() == 0) {
                    self.parts.pop_front();
                }
            }
            None => self.parts.clear(),
        }
        if self.parts.is_empty() {
            self.reader = None;
            self.remaining = 0;
        }
    }

    fn resident(&mut self, most: u64) -> io::Result<Option<Resident<'_>>> {
        let (Some(Part::File(range)), Some(reader)) = (self.parts.front(), &mut self.reader) else { return Ok(None) };
        let State::Idle(file) = &reader.state else { return Ok(None) };
        if !reader.nowait {
            return Ok(None);
        }
        match open::resident_bytes(file, range.start, range.length().min(most)) {
            Ok(0) => Ok(None),
            Ok(count) => Ok(Some(Resident { file, position: range.start, end: range.start + count })),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                reader.nowait = false;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Reads ranges of one file, a chunk at a time.
struct Reader {
    state: State,
    nowait: bool,
    chunk_bytes: usize,
}

enum State {
    Idle(File),
    /// The next chunk has been read.
    Ready(File, Bytes),
    /// The next chunk is being read by glommio, which has the file.
    Reading(DiskRead),
    Failed(io::Error),
    Taken,
}

impl Reader {
    /// The next bytes of `range`; at least one. Callers go through a range in order.
    fn poll_chunk(&mut self, context: &mut Context<'_>, range: ByteRange) -> Poll<io::Result<Bytes>> {
        loop {
            match mem::replace(&mut self.state, State::Taken) {
                State::Idle(file) => self.state = self.begin(file, range),
                State::Ready(file, bytes) => {
                    self.state = State::Idle(file);
                    return Poll::Ready(Ok(bytes));
                }
                State::Reading(mut read) => match read.poll(context) {
                    Poll::Pending => {
                        self.state = State::Reading(read);
                        return Poll::Pending;
                    }
                    Poll::Ready(Ok((file, bytes))) if !bytes.is_empty() => {
                        let rest = ByteRange { start: range.start + bytes.len() as u64, ..range };
                        self.read_ahead(context, file, rest);
                        return Poll::Ready(Ok(bytes));
                    }
                    Poll::Ready(Ok(_)) => self.state = State::Failed(shrunk(range)),
                    Poll::Ready(Err(error)) => self.state = State::Failed(error),
                },
                State::Failed(error) => return Poll::Ready(Err(error)),
                State::Taken => {
                    return Poll::Ready(Err(io::Error::other("a file body was polled after its error")));
                }
            }
        }
    }

    /// Reads the start of `range` from memory, or starts to read it from the disk.
    fn begin(&mut self, file: File, range: ByteRange) -> State {
        let length = usize::try_from(range.length()).map_or(self.chunk_bytes, |length| length.min(self.chunk_bytes));
        if self.nowait {
            match open::read_nowait(&file, range.start, length) {
                Ok(Nowait::Bytes(bytes)) => return State::Ready(file, bytes),
                Ok(Nowait::End) => return State::Failed(shrunk(range)),
                Ok(Nowait::Cold) => {}
                Ok(Nowait::Unsupported) => self.nowait = false,
                Err(error) => return State::Failed(error),
            }
        }
        State::Reading(DiskRead::new(file, range.start, length))
    }

    /// After a chunk from the disk, the next one is fetched while the network takes this one.
    fn read_ahead(&mut self, context: &mut Context<'_>, file: File, rest: ByteRange) {
        if rest.length() == 0 {
            self.state = State::Idle(file);
            return;
        }
        self.state = self.begin(file, rest);
        // A glommio read is queued when it is first polled.
        if let State::Reading(read) = &mut self.state
            && let Poll::Ready(result) = read.poll(context)
        {
            self.state = match result {
                Ok((file, bytes)) if !bytes.is_empty() => State::Ready(file, bytes),
                Ok(_) => State::Failed(shrunk(rest)),
                Err(error) => State::Failed(error),
            };
        }
    }
}

/// Never padded: the client must see that what it got is not the file.
fn shrunk(range: ByteRange) -> io::Error {
    let start = range.start;
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        format!("the file became shorter while it was sent: it has no byte {start} any more"),
    )
}

type ReadFuture = Pin<Box<dyn Future<Output = io::Result<(File, Bytes)>>>>;

thread_local! {
    /// Reads of this thread's bodies; `None` while one is polled. They are bound to the thread, and the bodies are not.
    static READS: RefCell<Slab<Option<ReadFuture>>> = const { RefCell::new(Slab::new()) };
}

/// One read by glommio.
///
/// glommio's read stores another clone of the waker each time it is polled while pending, and hyper
/// polls a body for reasons of its own. So the future is polled only when it has been woken, with a
/// waker of ours that passes the wake on.
struct DiskRead {
    /// Where its future is, in [`READS`] of this thread.
    thread: ThreadId,
    key: usize,
    relay: Arc<Relay>,
}

struct Relay {
    woken: AtomicBool,
    task: Mutex<Waker>,
}

impl DiskRead {
    fn new(file: File, position: u64, length: usize) -> DiskRead {
        let relay = Relay { woken: AtomicBool::new(true), task: Mutex::new(Waker::noop().clone()) };
        let future: ReadFuture = Box::pin(read_from_disk(file, position, length));
        let key = READS.with_borrow_mut(|reads| reads.insert(Some(future)));
        DiskRead { thread: thread::current().id(), key, relay: Arc::new(relay) }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<(File, Bytes)>> {
        if thread::current().id() != self.thread {
            return Poll::Ready(Err(io::Error::other(
                "a file body was polled on another thread than the one it began on",
            )));
        }
        self.relay.task.lock().unwrap_or_else(PoisonError::into_inner).clone_from(context.waker());
        if !self.relay.woken.swap(false, Ordering::Acquire) {
            return Poll::Pending;
        }
        let future = READS.with_borrow_mut(|reads| reads[self.key].take());
        let Some(mut future) = future else {
            return Poll::Ready(Err(io::Error::other("a read was polled after its end")));
        };
        let waker = Waker::from(Arc::clone(&self.relay));
        let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
        if polled.is_pending() {
            READS.with_borrow_mut(|reads| reads[self.key] = Some(future));
        }
        polled
    }
}

impl Drop for DiskRead {
    fn drop(&mut self) {
        // On another thread, it stays where it is until its own one ends.
        if thread::current().id() == self.thread {
            // Dropped outside of the borrow. The table has gone already when the thread is ending.
            let future = READS.try_with(|reads| reads.borrow_mut().try_remove(self.key));
            drop(future);
        }
    }
}

impl Wake for Relay {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).clone();
        task.wake();
    }
}

/// The bytes are copied out of glommio's buffer, which is bound to its thread and not a `Bytes`;
/// against a disk that copy is small.
async fn read_from_disk(file: File, position: u64, length: usize) -> io::Result<(File, Bytes)> {
    let _pending = Pending::enter();
    let lent = open::lend(file)?;
    let bytes = lent.read_at(position, length).await.map(|read| Bytes::copy_from_slice(&read));
    let file = open::take_back(lent);
    Ok((file, bytes?))
}
