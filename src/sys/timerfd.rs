//! An alarm in the kernel that wakes whoever waits for it through a ring.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::socket::check;

/// A close-on-exec timerfd(2) on the monotonic clock, in blocking mode: a ring's read of a non-blocking one would answer
/// EAGAIN instead of waiting. It is readable once its time has come, until it is read or set again.
#[derive(Debug)]
pub struct TimerFd(OwnedFd);

impl TimerFd {
    /// An alarm that is not set. Fails when descriptors or memory run out.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no memory.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) };
        check(fd)?;
        // SAFETY: timerfd_create succeeded, so this number is an open descriptor that nothing else owns yet.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

/// Sets the alarm `fd` to go off once, `after` from now, in place of what it was set to.
///
/// # Panics
/// When `fd` is no timerfd.
pub fn set(fd: BorrowedFd<'_>, after: Duration) {
    // Zero would turn it off.
    let after = after.max(Duration::from_nanos(1));
    let seconds = libc::time_t::try_from(after.as_secs()).unwrap_or(libc::time_t::MAX);
    let value = libc::timespec { tv_sec: seconds, tv_nsec: libc::c_long::from(after.subsec_nanos() as i32) };
    let once = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
    // SAFETY: reads one live itimerspec; a null pointer for the old value is allowed.
    let set = unsafe { libc::timerfd_settime(fd.as_raw_fd(), 0, &raw const once, std::ptr::null_mut()) };
    // A valid time on an open timerfd is never refused.
    assert!(set == 0, "setting a timerfd to {after:?}: {}", io::Error::last_os_error());
}

impl AsFd for TimerFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<TimerFd> for OwnedFd {
    fn from(timer: TimerFd) -> Self {
        timer.0
    }
}
