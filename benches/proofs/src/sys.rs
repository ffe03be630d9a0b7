//! The few system calls that std and tokio do not offer. All `unsafe` of this package is here.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};

/// A set of CPUs.
#[derive(Clone, Copy)]
pub struct Cpus(libc::cpu_set_t);

impl Cpus {
    /// The CPUs that the calling thread may run on.
    pub fn allowed() -> io::Result<Self> {
        // SAFETY: cpu_set_t is a plain bit set, for which all zeroes is a valid value.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer and the size are those of `set`, which outlives the call.
        let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
        if result == 0 { Ok(Self(set)) } else { Err(io::Error::last_os_error()) }
    }

    /// One CPU.
    pub fn one(cpu: usize) -> io::Result<Self> {
        if cpu >= libc::CPU_SETSIZE as usize {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("there is no CPU {cpu}")));
        }
        // SAFETY: as in `allowed`.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: the index is below CPU_SETSIZE, checked above.
        unsafe { libc::CPU_SET(cpu, &mut set) };
        Ok(Self(set))
    }

    /// Pins the calling thread, and the threads and processes that it starts from now on.
    pub fn pin(&self) -> io::Result<()> {
        // SAFETY: the pointer and the size are those of the set, which outlives the call.
        let result = unsafe { libc::sched_setaffinity(0, size_of_val(&self.0), &raw const self.0) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Makes the command run on these CPUs, and end when this process ends.
pub fn prepare_child(command: &mut Command, cpus: Cpus) {
    // SAFETY: between fork and exec only two system calls are made, on memory that the closure owns.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            cpus.pin()
        });
    }
}

/// Lets the kernel choose the port at connect, by the whole four-tuple: one source address gives 28,000 ports per
/// destination then, not 28,000 in all.
pub fn bind_without_port(socket: &impl AsRawFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the pointer and the length are those of `on`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Signals by what they are for.
pub const TERMINATE: i32 = libc::SIGTERM;
pub const KILL: i32 = libc::SIGKILL;
pub const UPGRADE: i32 = libc::SIGUSR2;
pub const PAUSE: i32 = libc::SIGSTOP;
pub const RESUME: i32 = libc::SIGCONT;

/// Sends a signal to a child, or to a process that was adopted, and that has not been waited for.
pub fn signal(pid: u32, signal: i32) {
    // SAFETY: kill takes no pointers. The number is still that process's own, as the caller has not waited for it.
    unsafe { libc::kill(pid as libc::pid_t, signal) };
}

/// Makes this process the parent of its descendants whose own parent ends.
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: takes no pointers.
    let result = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How a child, or an adopted one, has ended; `None` while it runs, and when it is nobody of ours (yet).
pub fn reap(pid: u32) -> Option<ExitStatus> {
    let mut status = 0;
    // SAFETY: the pointer is that of `status`, which outlives the call.
    let found = unsafe { libc::waitpid(pid as libc::pid_t, &raw mut status, libc::WNOHANG) };
    (found == pid as libc::pid_t).then(|| ExitStatus::from_raw(status))
}

/// Puts the calling thread, and the processes it starts from now on, into a new network namespace.
pub fn unshare_network() -> io::Result<()> {
    // SAFETY: takes no pointers.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks a process to end in order.
pub fn terminate(pid: u32) {
    // SAFETY: kill takes no pointers. The process is our child and has not been waited for, so the number is its own.
    unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
}

/// Raises the soft limit on open files to the hard one, and returns it.
pub fn raise_open_files() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is that of `limit`, which outlives both calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
    limit.rlim_cur
}
