//! A file that follows its response's head past hyper: sent by sendfile(2) where it is in memory, by frames of its body
//! where it is not.
//!
//! hyper gets a body of length 0 under a head that promises the file's length: for it, the response is complete with its
//! head. The file goes out in the flush that hands the head over ([`Outgoing::poll_send`], from the connection's I/O),
//! which is pending until all of it has been sent. That is safe for one reason: after a request without a body, hyper
//! does nothing further on the connection before that flush is done (hyper 1.12, `proto/h1`: `Reading::KeepAlive` is left
//! only by `Conn::try_keep_alive`, which is called at the end of a flush and where a request's body is read). It reads
//! no request, so it writes no other head, and it shuts down behind a flush, too. A request with a body is answered by
//! frames. Should another hyper ever do otherwise, its connection is broken off: [`Activity::is_sending_file`].
//!
//! [`Activity::is_sending_file`]: super::http1::Activity::is_sending_file

use std::any::Any;
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::{HeaderValue, Method, StatusCode, header};
use http_body::Body as HttpBody;

use super::answer::InFlight;
use crate::Response;
use crate::body::Body;
use crate::files::{FileBody, Resident};
use crate::net::stream::Stream;

/// The most of a file that is asked for, and sent, at once. Measured: by 64 KiB, sending takes 1.15 times the CPU time.
const PIECE_BYTES_MAX: usize = 256 * 1024;
/// A file shorter than this leaves in one piece with its head, which saves a segment and a wake-up of the client: a fifth
/// of the CPU time of 64 KiB. For longer ones it is the worse way, as the head shifts all that follows in the segments.
const WITH_HEAD_BYTES_MAX: u64 = 256 * 1024;

/// What a connection ends with, should hyper ever go on before a file has been sent.
pub(super) const OUT_OF_TURN: &str = "hyper went on to another response before the file of the last one had been sent";

/// Whether a response to this request may go past hyper, if it is a file.
pub(crate) fn is_possible(method: &Method, body: &impl HttpBody) -> bool {
    // The answer to HEAD has no body, that to CONNECT no end.
    body.is_end_stream() && !matches!(*method, Method::HEAD | Method::CONNECT)
}

/// Takes the file out of a response, if it has one that is to go past hyper, and promises its length.
pub(super) fn take_file<B: 'static>(response: &mut Response<B>) -> Option<FileBody> {
    // Asked first: most responses have none, and their header fields need not be looked at.
    file_of(response.body_mut())?;
    let (status, headers) = (response.status(), response.headers());
    let bodiless = status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if bodiless || headers.contains_key(header::TRANSFER_ENCODING) {
        return None;
    }
    let file = file_of(response.body_mut())?;
    let file = std::mem::replace(file, FileBody::empty());
    response.headers_mut().insert(header::CONTENT_LENGTH, content_length(file.remaining()));
    Some(file)
}

/// The file that this body is, if it is one for sendfile(2).
fn file_of<B: 'static>(body: &mut B) -> Option<&mut FileBody> {
    let body: &mut dyn Any = body;
    let file = if body.is::<Body>() {
        body.downcast_mut::<Body>().and_then(Body::file_mut)
    } else {
        body.downcast_mut::<FileBody>()
    };
    file.filter(|file| file.is_for_sendfile())
}

/// A value that hyper passes on as it is. Built for debugging, hyper compares it with the length that it knows of, if it
/// can parse it; white space at the end of a value, which no recipient counts (RFC 9110 5.5), it does not parse.
fn content_length(length: u64) -> HeaderValue {
    if cfg!(debug_assertions) {
        return HeaderValue::try_from(format!("{length} ")).expect("digits and a space are valid in a header");
    }
    HeaderValue::from(length)
}

/// How far a response has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// The service has answered; hyper writes the head next.
    Answered,
    /// hyper is handing the head over.
    Head,
    /// All of the head has been handed over, and hyper is to write nothing before the file's end.
    File,
}

/// A file on its way.
pub(crate) struct Outgoing {
    file: FileBody,
    /// Taken from the body, not sent yet.
    frame: Bytes,
    progress: Progress,
    _in_flight: InFlight,
}

impl Outgoing {
    pub(super) fn new(file: FileBody, in_flight: InFlight) -> Self {
        Self { file, frame: Bytes::new(), progress: Progress::Answered, _in_flight: in_flight }
    }

    /// Sends bytes of the head.
    ///
    /// # Errors
    /// The socket's; and when hyper, having handed all of the head over, goes on to write something else.
    pub(super) fn poll_head(
        &mut self,
        context: &mut Context<'_>,
        stream: &mut Stream,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.progress == Progress::File {
            return Poll::Ready(Err(io::Error::other(OUT_OF_TURN)));
        }
        self.progress = Progress::Head;
        if self.file.remaining() < WITH_HEAD_BYTES_MAX {
            return stream.poll_send_ahead(context, bytes);
        }
        stream.poll_send(context, bytes)
    }

    /// Sends what is left.
    ///
    /// # Errors
    /// That of the socket or the disk, or that the file has become shorter than it was: the connection is to be closed.
    pub(super) fn poll_send(&mut self, context: &mut Context<'_>, stream: &mut Stream) -> Poll<io::Result<()>> {
        if self.progress == Progress::Answered {
            return Poll::Ready(Err(io::Error::other("hyper wrote no head for a file")));
        }
        self.progress = Progress::File;
        loop {
            while !self.frame.is_empty() {
                let sent = ready!(stream.poll_send(context, &self.frame))?;
                self.frame.advance(sent);
            }
            if self.file.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_resident(context, stream))?;
            if self.file.remaining() > 0 {
                ready!(self.poll_frame(context))?;
            }
        }
    }

    /// Sends from the page cache for as long as that has what comes next.
    fn poll_resident(&mut self, context: &mut Context<'_>, stream: &mut Stream) -> Poll<io::Result<()>> {
        while self.file.remaining() > 0 {
            let most = ready!(stream.poll_send_budget(context)).min(PIECE_BYTES_MAX);
            let Some(Resident { file, mut position, end }) = self.file.resident(most as u64)? else { break };
            let start = position;
            let mut polled: Poll<io::Result<()>> = Poll::Ready(Ok(()));
            // What was in memory a moment ago is not asked for again.
            while position < end && matches!(polled, Poll::Ready(Ok(()))) {
                polled =
                    stream.poll_send_file(context, file.as_fd(), position, (end - position) as usize).map(|sent| {
                        position += sent? as u64;
                        Ok(())
                    });
            }
            self.file.advance(position - start);
            ready!(polled)?;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.file).poll_frame(context)) {
            Some(frame) => {
                self.frame = frame?.into_data().unwrap_or_default();
                Poll::Ready(Ok(()))
            }
            None => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a file body ended before its length")))
            }
        }
    }
}
