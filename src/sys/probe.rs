//! Whether this system's io_uring can carry the runtime, found out by using it.
//!
//! Everything the rings of `net` and those of glommio need is tried once, on rings that are closed
//! again, because glommio itself panics or ends the process where something is missing. The answer to
//! "no" is a sentence that names the cause and the remedy.

use std::alloc::{self, Layout};
use std::error::Error;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::{BufRingEntry, Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode};

use super::{limits, procfs};

/// What works here, beyond what is required.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingFeatures {
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
    /// `IORING_RECVSEND_BUNDLE` (6.10): several buffers in one receive or send.
    pub bundles: bool,
    /// `IORING_SETUP_NO_SQARRAY` (6.6): submission without the indirection.
    pub no_sqarray: bool,
    /// `IORING_OP_SEND_ZC` (6.0): sending without a copy.
    pub send_zero_copy: bool,
}

/// Why io_uring cannot be used here.
#[derive(Debug)]
pub enum RingUnavailable {
    /// EPERM or EACCES: a seccomp profile, or the sysctl with this value (absent before 6.6).
    Forbidden { sysctl: Option<u32> },
    /// ENOSYS: a kernel (or a sandbox that plays one) without io_uring.
    Missing { release: String },
    /// EINVAL: a kernel older than 6.1.
    TooOld { release: String, step: &'static str },
    /// ENOMEM: rings did not fit into the locked memory allowed, or into memory.
    NoMemory { soft: u64, hard: u64 },
    /// Less locked memory allowed than glommio demands.
    MemlockTooLow { soft: u64, hard: u64 },
    /// Too many open files for even one ring.
    TooManyFiles,
    /// An operation that is required is not known to the kernel.
    MissingOperation { name: &'static str, release: String },
    /// Anything else, with the step that failed.
    Other { step: &'static str, release: String, error: io::Error },
}

/// Tries all that the runtime needs: a few system calls, about a millisecond.
pub fn io_uring() -> Result<RingFeatures, RingUnavailable> {
    let surroundings = Surroundings::read();
    let (soft, hard) = surroundings.memlock;
    let features = try_all(&surroundings.release).map_err(|failure| match failure {
        Failure::Step(step, error) => surroundings.explain(step, error),
        Failure::Operation(name) => RingUnavailable::MissingOperation { name, release: surroundings.release.clone() },
    })?;
    // Last, since whatever is wrong above is the more fundamental.
    if soft < GLOMMIO_MEMLOCK_MIN {
        return Err(RingUnavailable::MemlockTooLow { soft, hard });
    }
    Ok(features)
}

/// What glommio 0.9 demands of RLIMIT_MEMLOCK for each executor, in bytes (sys/uring.rs there).
pub const GLOMMIO_MEMLOCK_MIN: u64 = 512 * 1024;

enum Failure {
    Step(&'static str, io::Error),
    Operation(&'static str),
}

const SET_UP: &str = "to set up a ring";
const SET_UP_DEFERRED: &str = "to set up a ring with deferred task work";
const SET_UP_POLLED: &str = "to set up a ring for polled files";
const PROBE: &str = "to ask a ring for its operations";
const BUFFERS: &str = "to register a ring of buffers";
const RECEIVE: &str = "to receive into a ring of buffers";

fn try_all(release: &str) -> Result<RingFeatures, Failure> {
    let step = |name| move |error| Failure::Step(name, error);
    // glommio's two kinds of rings. Tried first: plain set-up is what a ban or an old kernel refuses.
    IoUring::new(ENTRIES).map_err(step(SET_UP))?;
    IoUring::builder().setup_iopoll().build(ENTRIES).map(|_: IoUring| ()).map_err(step(SET_UP_POLLED))?;

    let mut ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(ENTRIES)
        .map_err(step(SET_UP_DEFERRED))?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(step(PROBE))?;
    for (code, name) in OPERATIONS {
        if !probe.is_supported(*code) {
            return Err(Failure::Operation(name));
        }
    }
    try_multishot_receive(&mut ring)?;
    let no_sqarray: io::Result<IoUring> = IoUring::builder().setup_no_sqarray().build(ENTRIES);
    Ok(RingFeatures {
        release: release.to_owned(),
        bundles: ring.params().is_feature_recvsend_bundle(),
        no_sqarray: no_sqarray.is_ok(),
        send_zero_copy: probe.is_supported(opcode::SendZc::CODE),
    })
}

/// Entries of the rings that are tried.
const ENTRIES: u32 = 8;

/// What glommio 0.9 requires (`GLOMMIO_URING_OPS`, or it exits the process) and what `net` uses.
const OPERATIONS: &[(u8, &str)] = &[
    (opcode::Nop::CODE, "NOP"),
    (opcode::Readv::CODE, "READV"),
    (opcode::Writev::CODE, "WRITEV"),
    (opcode::Fsync::CODE, "FSYNC"),
    (opcode::ReadFixed::CODE, "READ_FIXED"),
    (opcode::WriteFixed::CODE, "WRITE_FIXED"),
    (opcode::PollAdd::CODE, "POLL_ADD"),
    (opcode::PollRemove::CODE, "POLL_REMOVE"),
    (opcode::SendMsg::CODE, "SENDMSG"),
    (opcode::RecvMsg::CODE, "RECVMSG"),
    (opcode::Timeout::CODE, "TIMEOUT"),
    (opcode::TimeoutRemove::CODE, "TIMEOUT_REMOVE"),
    (opcode::Accept::CODE, "ACCEPT"),
    (opcode::LinkTimeout::CODE, "LINK_TIMEOUT"),
    (opcode::Connect::CODE, "CONNECT"),
    (opcode::Fallocate::CODE, "FALLOCATE"),
    (opcode::OpenAt::CODE, "OPENAT"),
    (opcode::Close::CODE, "CLOSE"),
    (opcode::Statx::CODE, "STATX"),
    (opcode::Read::CODE, "READ"),
    (opcode::Write::CODE, "WRITE"),
    (opcode::Send::CODE, "SEND"),
    (opcode::Recv::CODE, "RECV"),
    (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
];

/// Receives two messages with one operation into buffers of a registered ring.
fn try_multishot_receive(ring: &mut IoUring) -> Result<(), Failure> {
    let step = |error| Failure::Step(RECEIVE, error);
    let (mut ours, theirs) = UnixStream::pair().map_err(step)?;
    let mut page = Page::new().map_err(|error| Failure::Step(BUFFERS, error))?;
    page.provide();
    // SAFETY: the page is aligned for any page size and large enough for its entries. From here on
    // there is one way out of this function, which unregisters the page before it is freed or never
    // frees it.
    unsafe { ring.submitter().register_buf_ring_with_flags(page.memory.as_ptr() as u64, Page::BUFFERS, GROUP, 0) }
        .map_err(|error| Failure::Step(BUFFERS, error))?;

    let receive = opcode::RecvMulti::new(Fd(theirs.as_raw_fd()), GROUP).build();
    // SAFETY: the kernel holds the socket's file for as long as the operation runs, and the buffers it
    // writes are in `page`, which is freed only once the operation has ended.
    let pushed = unsafe { ring.submission().push(&receive) }.map_err(io::Error::other);
    let received = pushed.and_then(|()| receive_two(ring, &mut ours));
    let outcome = received.and_then(|()| {
        // The end of the stream ends the operation.
        drop(ours);
        match next_completion(ring)? {
            (0, flags) if !cqueue::more(flags) => Ok(()),
            other => Err(unexpected(other)),
        }
    });
    let unregistered = ring.submitter().unregister_buf_ring(GROUP);
    if outcome.is_err() || unregistered.is_err() {
        // The operation may still be in flight and could write; a page once in a process is cheap.
        std::mem::forget(page);
    }
    outcome.map_err(step)
}

fn receive_two(ring: &mut IoUring, sender: &mut UnixStream) -> io::Result<()> {
    for _ in 0..2 {
        sender.write_all(b"ping")?;
        match next_completion(ring)? {
            (4, flags) if cqueue::more(flags) && cqueue::buffer_select(flags).is_some() => {}
            other => return Err(unexpected(other)),
        }
    }
    Ok(())
}

/// Result and flags of the next completion, within a second.
fn next_completion(ring: &mut IoUring) -> io::Result<(i32, u32)> {
    let second = Timespec::new().sec(1);
    let arguments = SubmitArgs::new().timespec(&second);
    loop {
        if let Some(entry) = ring.completion().next() {
            return match entry.result() {
                result if result < 0 => Err(io::Error::from_raw_os_error(-result)),
                result => Ok((result, entry.flags())),
            };
        }
        match ring.submitter().submit_with_args(1, &arguments) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
    }
}

fn unexpected((result, flags): (i32, u32)) -> io::Error {
    io::Error::other(format!("the kernel completed with {result} and flags {flags:#x}"))
}

/// The buffer group that is tried.
const GROUP: u16 = 0;

/// Memory for a ring of buffers and, behind it, the buffers.
struct Page {
    memory: NonNull<u8>,
}

impl Page {
    const BUFFERS: u16 = 4;
    const BUFFER_BYTES: usize = 64;
    const FIRST_BUFFER: usize = 2048;
    /// The kernel wants page alignment; 64 KiB is the largest page of any architecture.
    const LAYOUT: Layout = match Layout::from_size_align(4096, 65_536) {
        Ok(layout) => layout,
        Err(_) => panic!("a constant layout is valid"),
    };

    fn new() -> io::Result<Self> {
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc::alloc_zeroed(Self::LAYOUT) };
        match NonNull::new(memory) {
            Some(memory) => Ok(Self { memory }),
            None => Err(io::ErrorKind::OutOfMemory.into()),
        }
    }

    /// Fills the ring with all buffers.
    fn provide(&mut self) {
        let entries: *mut BufRingEntry = self.memory.as_ptr().cast();
        for index in 0..Self::BUFFERS {
            let buffer = Self::FIRST_BUFFER + usize::from(index) * Self::BUFFER_BYTES;
            // SAFETY: entries (16 bytes each) and buffers end within the 4,096 bytes, which are ours
            // alone until registered; zeroed memory is a valid entry.
            unsafe {
                let entry = &mut *entries.add(usize::from(index));
                entry.set_addr(self.memory.as_ptr().add(buffer) as u64);
                entry.set_len(Self::BUFFER_BYTES as u32);
                entry.set_bid(index);
            }
        }
        // SAFETY: the tail lies in the first entry, aligned for a u16, in memory that is ours.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(entries).cast_mut()) };
        tail.store(Self::BUFFERS, Ordering::Release);
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; no operation is left, or it was forgotten.
        unsafe { alloc::dealloc(self.memory.as_ptr(), Self::LAYOUT) };
    }
}

/// What an errno is explained with.
struct Surroundings {
    release: String,
    /// `kernel.io_uring_disabled`: 0 allowed, 1 for a privileged group, 2 for nobody.
    disabled: Option<u32>,
    memlock: (u64, u64),
}

impl Surroundings {
    fn read() -> Self {
        let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
        Self {
            release: procfs::kernel_release(),
            disabled: disabled.ok().and_then(|text| text.trim().parse().ok()),
            memlock: limits::memlock(),
        }
    }

    fn explain(&self, step: &'static str, error: io::Error) -> RingUnavailable {
        let release = self.release.clone();
        let (soft, hard) = self.memlock;
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => RingUnavailable::Forbidden { sysctl: self.disabled },
            Some(libc::ENOSYS) => RingUnavailable::Missing { release },
            Some(libc::EINVAL) => RingUnavailable::TooOld { release, step },
            Some(libc::ENOMEM) => RingUnavailable::NoMemory { soft, hard },
            Some(libc::EMFILE | libc::ENFILE) => RingUnavailable::TooManyFiles,
            _ => RingUnavailable::Other { step, release, error },
        }
    }
}

impl fmt::Display for RingUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forbidden { sysctl: Some(value @ 1..) } => write!(
                f,
                "io_uring is switched off by the administrator (sysctl kernel.io_uring_disabled = \
                 {value}); set it to 0{}",
                if *value == 1 { ", or add this process's group to kernel.io_uring_group" } else { "" }
            ),
            Self::Forbidden { .. } => f.write_str(
                "io_uring is forbidden to this process, by a seccomp profile or security module: \
                 Docker and containerd block it by default; allow io_uring_setup, io_uring_enter and \
                 io_uring_register in the profile (`--security-opt seccomp=profile.json`, in \
                 Kubernetes seccompProfile)",
            ),
            Self::Missing { release } => write!(
                f,
                "the kernel ({release}) has no io_uring; use Linux 6.1 or later with \
                 CONFIG_IO_URING, and no sandbox that lacks it (gVisor, WSL 1)"
            ),
            Self::TooOld { release, step } => {
                write!(f, "the kernel ({release}) is too old: it refused {step}; Linux 6.1 or later is needed")
            }
            Self::NoMemory { soft, hard } => write!(
                f,
                "no memory for an io_uring ring; locked memory is limited to {} (hard limit {}): \
                 raise it (`ulimit -l`, with systemd `LimitMEMLOCK=`, Docker `--ulimit memlock=`), or \
                 give the cgroup more memory",
                Bytes(*soft),
                Bytes(*hard)
            ),
            Self::MemlockTooLow { soft, hard } => write!(
                f,
                "locked memory is limited to {} (hard limit {}), {} are needed; raise it \
                 (`ulimit -l`, with systemd `LimitMEMLOCK=`, Docker `--ulimit memlock=`)",
                Bytes(*soft),
                Bytes(*hard),
                Bytes(GLOMMIO_MEMLOCK_MIN)
            ),
            Self::TooManyFiles => f.write_str(
                "too many open files for an io_uring ring; raise the limit (`ulimit -n`, with \
                 systemd `LimitNOFILE=`)",
            ),
            Self::MissingOperation { name, release } => write!(
                f,
                "the kernel ({release}) does not know the io_uring operation {name}; Linux 6.1 or \
                 later is needed"
            ),
            Self::Other { step, release, error } => write!(f, "io_uring failed {step} (kernel {release}): {error}"),
        }
    }
}

impl Error for RingUnavailable {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Other { error, .. } => Some(error),
            _ => None,
        }
    }
}

/// A limit in bytes, as people read it.
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            libc::RLIM_INFINITY => f.write_str("unlimited"),
            bytes => write!(f, "{} KiB", bytes / 1024),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(disabled: Option<u32>, errno: i32) -> String {
        Surroundings { release: "5.15.0-test".to_owned(), disabled, memlock: (65_536, libc::RLIM_INFINITY) }
            .explain(SET_UP_DEFERRED, io::Error::from_raw_os_error(errno))
            .to_string()
    }

    #[test]
    fn this_machine_has_what_the_runtime_needs_or_the_answer_says_why_not() {
        match io_uring() {
            Ok(features) => assert_eq!(features.release, procfs::kernel_release()),
            // As in a container that blocks it: then the message is what can be tested.
            Err(error) => eprintln!("skipped: {error}"),
        }
    }

    #[test]
    fn a_ban_is_told_from_the_sysctl() {
        assert!(message(Some(2), libc::EPERM).contains("kernel.io_uring_disabled = 2"));
        assert!(!message(Some(2), libc::EPERM).contains("io_uring_group"));
        assert!(message(Some(1), libc::EPERM).contains("io_uring_group"));
        for disabled in [Some(0), None] {
            assert!(message(disabled, libc::EPERM).contains("seccomp"));
            assert!(message(disabled, libc::EACCES).contains("seccomp"));
        }
    }

    #[test]
    fn each_errno_names_its_cause_and_the_remedy() {
        let of = |errno| message(None, errno);
        assert!(of(libc::ENOSYS).contains("5.15.0-test) has no io_uring"));
        assert!(of(libc::EINVAL).contains("5.15.0-test) is too old"));
        assert!(of(libc::EINVAL).contains("deferred task work"));
        assert!(of(libc::EINVAL).contains("6.1 or later"));
        assert!(of(libc::ENOMEM).contains("64 KiB (hard limit unlimited)"));
        assert!(of(libc::ENOMEM).contains("LimitMEMLOCK"));
        assert!(of(libc::EMFILE).contains("ulimit -n"));
        assert!(of(libc::EIO).contains("failed to set up a ring"));
    }

    #[test]
    fn a_missing_operation_and_a_low_limit_are_explained() {
        let error = RingUnavailable::MissingOperation { name: "RECV", release: "5.5.0".to_owned() };
        assert!(error.to_string().contains("RECV"));
        let error = RingUnavailable::MemlockTooLow { soft: 65_536, hard: 65_536 };
        assert!(error.to_string().contains("512 KiB are needed"));
    }
}
