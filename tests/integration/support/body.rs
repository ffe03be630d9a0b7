//! Large bodies that are made as they are sent, and recognised as they are received.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame};

/// Bytes of one piece of a [`Pattern`].
const PIECE: usize = 64 * 1024;

/// A body of [`pattern`]'s bytes, made one piece at a time.
pub struct Pattern {
    piece: Bytes,
    left: u64,
    made: Arc<AtomicU64>,
}

impl Pattern {
    /// Of `length` bytes, a multiple of 64 KiB; `made` says how many there have been so far.
    pub fn new(length: u64, made: &Arc<AtomicU64>) -> Self {
        assert_eq!(length % PIECE as u64, 0);
        Self { piece: pattern(PIECE).into(), left: length, made: Arc::clone(made) }
    }
}

impl Body for Pattern {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        self.left -= PIECE as u64;
        self.made.fetch_add(PIECE as u64, Ordering::Relaxed);
        Poll::Ready(Some(Ok(Frame::data(self.piece.clone()))))
    }
}

/// So many bytes that repeat after 64 KiB and not before.
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x2545_F491_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    let piece: Vec<u8> = (0..PIECE.min(length)).map(|_| next()).collect();
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        bytes.extend_from_slice(&piece[..PIECE.min(length - bytes.len())]);
    }
    bytes
}

/// Compares what arrives, piece by piece, with [`pattern`]'s bytes.
pub struct Check {
    /// Two of them, so that any piece is found in one.
    pieces: Vec<u8>,
    pub received: u64,
}

impl Check {
    pub fn new() -> Self {
        Self { pieces: pattern(2 * PIECE), received: 0 }
    }

    #[track_caller]
    pub fn take(&mut self, bytes: &[u8]) {
        for bytes in bytes.chunks(PIECE) {
            let start = self.received as usize % PIECE;
            assert!(self.pieces[start..start + bytes.len()] == *bytes, "wrong after {} bytes", self.received);
            self.received += bytes.len() as u64;
        }
    }
}
