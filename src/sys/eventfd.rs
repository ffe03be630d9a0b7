//! A counter in the kernel that wakes whoever waits for it: between threads, and into a ring.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::socket::check;

/// A close-on-exec eventfd(2) in blocking mode: a ring's read of a non-blocking one would answer EAGAIN instead of
/// waiting. But for [`EventFd::clear`] only rings read it.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new counter at zero. Fails when descriptors or memory run out.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no memory.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        check(fd)?;
        // SAFETY: eventfd succeeded, so this number is an open descriptor that nothing else owns yet.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Makes the descriptor readable.
    pub fn signal(&self) {
        signal(self.0.as_fd());
    }

    /// Takes the signals there are; to be called when it has been found readable, else it waits for one.
    pub fn clear(&self) {
        let mut count = 0_u64;
        // SAFETY: eight live bytes, exclusively borrowed.
        let read = unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
        debug_assert!(read == 8, "reading an eventfd: {}", io::Error::last_os_error());
    }
}

/// Makes the eventfd `fd` readable. Never blocks in practice: the counter would have to reach 2^64 - 2, and every waiter
/// resets it or is one of ours that was asleep.
pub fn signal(fd: BorrowedFd<'_>) {
    let one = 1_u64;
    // SAFETY: eight live bytes, only read.
    let written = unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
    debug_assert!(written == 8, "writing an eventfd: {}", io::Error::last_os_error());
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<EventFd> for OwnedFd {
    fn from(eventfd: EventFd) -> Self {
        eventfd.0
    }
}
