//! A child process by a descriptor of it (pidfd), which never means another process, whatever became of the number.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::socket::check;

/// A descriptor of this process; readable when it has ended. Close-on-exec.
pub fn open(process: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, process as libc::pid_t, 0) } as i32;
    check(fd)?;
    // SAFETY: pidfd_open succeeded, so this number is an open descriptor that nothing else owns yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ends the process at once (SIGKILL). One that has ended already is no error.
pub fn kill(process: BorrowedFd<'_>) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: takes no memory: without `siginfo_t` the kernel makes that of kill(2).
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), libc::SIGKILL, no_info, 0) } as i32;
    match check(result) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::sys::poll::wait_readable;

    #[test]
    fn a_child_is_killed_and_seen_to_end() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let descriptor = open(child.id()).unwrap();
        assert!(wait_readable(&[descriptor.as_fd()], Some(Duration::ZERO)).unwrap().is_empty());
        kill(descriptor.as_fd()).unwrap();
        assert_eq!(wait_readable(&[descriptor.as_fd()], Some(Duration::from_secs(10))).unwrap(), [0]);
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        kill(descriptor.as_fd()).unwrap();
    }
}
