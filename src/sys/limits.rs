//! Resource limits of the process and kernel settings that bound the server.

use std::fs;
use std::io;

/// The limit on open descriptors (RLIMIT_NOFILE), in descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nofile {
    /// What applies now.
    pub soft: u64,
    /// How far the process may raise it by itself.
    pub hard: u64,
    /// What applied before [`raise_nofile`]; otherwise the same as `soft`.
    pub was: u64,
}

/// The limit on open descriptors as it is.
pub fn nofile() -> io::Result<Nofile> {
    let (soft, hard) = get(libc::RLIMIT_NOFILE)?;
    Ok(Nofile { soft, hard, was: soft })
}

/// Raises the soft limit on open descriptors to the hard one, for the whole process.
pub fn raise_nofile() -> io::Result<Nofile> {
    let before = nofile()?;
    set_soft(libc::RLIMIT_NOFILE, before.hard, before.hard)?;
    Ok(Nofile { was: before.soft, ..nofile()? })
}

/// Locked memory allowed, soft and hard, in bytes. `(0, 0)` if the system does not say.
pub fn memlock() -> (u64, u64) {
    get(libc::RLIMIT_MEMLOCK).unwrap_or_default()
}

/// Raises the soft limit on locked memory to the hard one; both as they are afterwards, in bytes.
pub fn raise_memlock() -> io::Result<(u64, u64)> {
    let (_, hard) = get(libc::RLIMIT_MEMLOCK)?;
    set_soft(libc::RLIMIT_MEMLOCK, hard, hard)?;
    get(libc::RLIMIT_MEMLOCK)
}

/// What the kernel counts as locked memory for an io_uring with so many entries, where it counts it: one piece for the two
/// queues with their heads, one for the entries that are submitted.
pub fn ring_bytes(submission: u32, completion: u32) -> u64 {
    // `struct io_rings`; an index of four bytes for each entry to submit, unless NO_SQARRAY saves them.
    const HEADS: u64 = 320;
    let queues = HEADS + 16 * u64::from(completion) + 4 * u64::from(submission);
    whole_pages(queues) + whole_pages(64 * u64::from(submission))
}

/// Memory is locked by the page.
pub fn whole_pages(bytes: u64) -> u64 {
    // SAFETY: has no preconditions.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    bytes.next_multiple_of(u64::try_from(page).unwrap_or(4096).max(1))
}

/// The longest queue the kernel grants a listener (`net.core.somaxconn` of this network namespace).
pub fn somaxconn() -> Option<u32> {
    fs::read_to_string("/proc/sys/net/core/somaxconn").ok()?.trim().parse().ok()
}

/// What to do about an error that says that the system has no descriptors, memory or threads to give at the moment; `None`
/// for any other error.
pub fn shortage(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error()? {
        libc::EMFILE => {
            Some("raise the limit on open files (ulimit -n; LimitNOFILE= of a unit), or allow fewer connections")
        }
        libc::ENFILE => Some("all descriptors of the system are in use: raise fs.file-max, or end what holds them"),
        libc::ENOMEM | libc::ENOBUFS => Some(
            "free memory, or raise the limits on it (of the cgroup; ulimit -v, LimitAS= and ulimit -l, LimitMEMLOCK= of a unit)",
        ),
        libc::EAGAIN => Some("raise the limit on threads (ulimit -u; TasksMax= and LimitNPROC= of a unit)"),
        _ => None,
    }
}

/// The error, and what to do about it if it is a [`shortage`].
pub fn explained(error: &io::Error) -> String {
    shortage(error).map_or_else(|| error.to_string(), |remedy| format!("{error}; {remedy}"))
}

/// C libraries differ in the type of the constants; this is glibc's or musl's.
#[cfg(target_env = "gnu")]
type Resource = libc::__rlimit_resource_t;
#[cfg(not(target_env = "gnu"))]
type Resource = libc::c_int;

fn get(resource: Resource) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is live, exclusively borrowed memory of the right type.
    if unsafe { libc::getrlimit(resource, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((limit.rlim_cur, limit.rlim_max))
}

fn set_soft(resource: Resource, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` is live and only read.
    if unsafe { libc::setrlimit(resource, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptor_limit_is_raised_as_far_as_allowed() {
        let before = nofile().unwrap();
        let raised = raise_nofile().unwrap();
        assert_eq!(raised.soft, raised.hard);
        assert_eq!((raised.hard, raised.was), (before.hard, before.soft));
        assert_eq!(nofile().unwrap().soft, raised.soft);
    }

    #[test]
    fn a_shortage_is_told_from_other_errors() {
        let of = |errno| shortage(&io::Error::from_raw_os_error(errno)).is_some();
        assert!([libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS, libc::EAGAIN].into_iter().all(of));
        assert!(![libc::EPERM, libc::EINVAL, libc::ENOSYS, libc::ECONNREFUSED].into_iter().any(of));
        assert_eq!(shortage(&io::Error::other("not from the system")), None);
    }

    #[test]
    fn limits_of_this_machine_can_be_read() {
        let (soft, hard) = memlock();
        assert!(soft <= hard);
        assert!(somaxconn().is_some_and(|limit| limit > 0));
    }
}
