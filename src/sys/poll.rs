//! poll(2): how a plain thread, the supervisor or a test, waits for a handful of descriptors.
//!
//! Executors wait in their rings instead.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Waits until at least one descriptor is readable, hung up or in error; positions of those that
/// are, in order. Empty after `timeout` (`None`: no limit; rounded up to milliseconds) or a signal.
pub fn wait_readable(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<usize>> {
    let mut entries: Vec<_> = fds.iter().map(|fd| entry(*fd, libc::POLLIN)).collect();
    wait(&mut entries, timeout)?;
    Ok(entries.iter().enumerate().filter(|(_, entry)| entry.revents != 0).map(|(position, _)| position).collect())
}

/// Waits until a write tells at once what becomes of it: there is room for `PIPE_BUF` bytes if it is a pipe, or nobody
/// reads any more. False after `timeout` (as above) or a signal.
#[cfg(any(feature = "cli", test))]
pub fn wait_writable(fd: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<bool> {
    let mut entries = [entry(fd, libc::POLLOUT)];
    wait(&mut entries, timeout)?;
    Ok(entries[0].revents != 0)
}

fn entry(fd: BorrowedFd<'_>, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 }
}

fn wait(entries: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    let timeout_ms =
        timeout.map_or(-1, |timeout| i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX));
    // SAFETY: the pointer and count are those of a live, exclusively borrowed slice.
    let ready = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, timeout_ms) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        // The entries are as they were: nothing is ready.
        return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::eventfd::EventFd;

    #[test]
    fn reports_exactly_the_ready_ones_and_nothing_after_the_timeout() {
        let (one, two) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        let fds = [one.as_fd(), two.as_fd()];
        let none = wait_readable(&fds, Some(Duration::ZERO)).unwrap();
        assert_eq!(none, Vec::<usize>::new());
        two.signal();
        assert_eq!(wait_readable(&fds, None).unwrap(), [1]);
        one.signal();
        assert_eq!(wait_readable(&fds, None).unwrap(), [0, 1]);
    }

    #[test]
    fn a_pipe_is_writable_while_there_is_room_and_when_nobody_reads() {
        let (reader, mut writer) = io::pipe().unwrap();
        let mut pieces = 0;
        while wait_writable(writer.as_fd(), Some(Duration::ZERO)).unwrap() {
            assert_eq!(writer.write(&[0; libc::PIPE_BUF]).unwrap(), libc::PIPE_BUF);
            pieces += 1;
        }
        assert!(pieces > 0);
        drop(reader);
        assert!(wait_writable(writer.as_fd(), None).unwrap());
    }
}
