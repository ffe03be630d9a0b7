//! One io_uring of an executor's own, for sockets. All memory that the kernel reads or writes asynchronously is owned
//! here, so that what stands above (`net::driver`) is safe code.
//!
//! The one rule that every `unsafe` block below leans on: *an operation has a row in `operations` from before its entry
//! is pushed until its final completion has been reaped, and the row owns the memory the operation uses.* `Drop`
//! cancels what is left, reaps to the last completion and only then lets the memory go.
//!
//! What it does not do: it knows no sockets' state, wakes nobody and never blocks except in [`Ring::enter`] when asked.

mod buffers;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use slab::Slab;

pub(crate) use buffers::Buffer;
use buffers::Buffers;

use crate::sys::limits;

/// Group id of the one provided-buffer ring.
const BUFFER_GROUP: u16 = 0;
/// Submission entries. A turn that needs more submits in between; 256 is what a turn over 64 busy connections needs,
/// with room.
const SUBMISSION_ENTRIES: u32 = 256;
/// Completion entries: a multishot receive may post many completions per connection and turn. The kernel keeps what
/// does not fit (NODROP), at a price.
const COMPLETION_ENTRIES: u32 = 2048;
/// How long teardown waits for the last completion before it leaks the memory instead of freeing it. Cancellation of
/// socket operations completes at once; this is a bound on a kernel bug.
const QUIESCE_LIMIT: Duration = Duration::from_secs(5);
const QUIESCE_STEP: Duration = Duration::from_millis(100);

const ENTER_GETEVENTS: u32 = 1;
const ENTER_EXT_ARG: u32 = 1 << 3;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
/// Linux 6.15: a wait for sockets is idle time, not "iowait" in the operator's statistics.
const ENTER_NO_IOWAIT: u32 = 1 << 7;

/// Size of the receive side of a ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingOptions {
    /// Number of provided receive buffers at most; a power of two, at most 32768. A few are offered at first, more when
    /// they do not suffice.
    pub buffers: u16,
    /// Bytes of each.
    pub buffer_bytes: u32,
}

impl Default for RingOptions {
    /// 512 × 4 KiB: more buffers than connections that are readable in one turn (measured at 256 connections), each of
    /// a page, so that a small request touches one page only.
    fn default() -> Self {
        Self { buffers: 512, buffer_bytes: 4096 }
    }
}

/// What an operation is for; `socket` and `listener` are keys of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Receive { socket: u32 },
    Send { socket: u32 },
    Writable { socket: u32 },
    Listener { listener: u32 },
    Inbox,
    Tick,
    Cancel,
}

/// Names an operation until its final completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OperationKey(u32);

struct Operation {
    purpose: Purpose,
    /// What the kernel reads while a send is in flight; its heap block does not move when the row does.
    bytes: Vec<u8>,
    /// What the kernel reads when a timeout is submitted.
    #[expect(dead_code, reason = "kept for the kernel, nobody else reads it")]
    timeout: Option<Box<types::Timespec>>,
}

/// One completion, already matched with its operation.
#[derive(Debug)]
pub(crate) struct Completion {
    pub purpose: Purpose,
    /// As the kernel gave it: a count, or a negative errno.
    pub result: i32,
    /// More completions of this operation will follow.
    pub more: bool,
    /// The received bytes, for receives with a positive result. Must go back through [`Ring::recycle`].
    pub buffer: Option<Buffer>,
    /// The bytes of a finished send, given back for reuse.
    pub sent: Vec<u8>,
}

/// What Linux 6.14 and later count as locked memory for a ring with these options, in bytes.
pub(crate) fn locked_bytes(options: RingOptions) -> u64 {
    let of_buffers = u64::from(options.buffers) * size_of::<types::BufRingEntry>() as u64;
    limits::ring_bytes(SUBMISSION_ENTRIES, COMPLETION_ENTRIES) + limits::whole_pages(of_buffers)
}

pub(crate) struct Ring {
    ring: IoUring,
    /// What `io_uring_enter` is called on: the registered index where the kernel has it, else the descriptor.
    enter_fd: RawFd,
    enter_flags: u32,
    buffers: Buffers,
    operations: Slab<Operation>,
    put_off: Option<io::Error>,
}

impl Ring {
    /// Sets the ring up for use by this thread only.
    ///
    /// # Errors
    /// What the kernel said; `sys::probe` has said earlier, in words, what is missing when it is a matter of support.
    pub(crate) fn new(options: RingOptions) -> io::Result<Self> {
        let ring = match Self::builder().setup_no_sqarray().build(SUBMISSION_ENTRIES) {
            // NO_SQARRAY is of Linux 6.6.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Self::builder().build(SUBMISSION_ENTRIES)?,
            other => other?,
        };
        let buffers = Buffers::new(options.buffers, options.buffer_bytes)?;
        // SAFETY: `buffers` holds a page-aligned block of `entries` ring entries; it is unmapped only after `Drop` of
        // `Ring` has unregistered it.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(buffers.ring_address(), buffers.count(), BUFFER_GROUP, 0)?
        };
        let (enter_fd, enter_flags) = match register_ring_fd(ring.as_raw_fd()) {
            Ok(index) => (index, ENTER_REGISTERED_RING),
            Err(_) => (ring.as_raw_fd(), 0),
        };
        let enter_flags = enter_flags | if ring.params().is_feature_no_iowait() { ENTER_NO_IOWAIT } else { 0 };
        Ok(Self { ring, enter_fd, enter_flags, buffers, operations: Slab::with_capacity(64), put_off: None })
    }

    fn builder() -> io_uring::Builder {
        let mut builder = IoUring::builder();
        builder
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(COMPLETION_ENTRIES)
            .dontfork();
        builder
    }

    /// Receives on `fd` until cancelled, at the end of the stream or out of buffers, into provided buffers.
    pub(crate) fn receive(&mut self, fd: BorrowedFd<'_>, socket: u32) -> OperationKey {
        let entry = opcode::RecvMulti::new(types::Fd(fd.as_raw_fd()), BUFFER_GROUP).build();
        self.start(Purpose::Receive { socket }, Vec::new(), entry)
    }

    /// Sends all of `bytes`; the vector comes back in the completion.
    pub(crate) fn send(&mut self, fd: BorrowedFd<'_>, bytes: Vec<u8>, socket: u32) -> OperationKey {
        let entry = opcode::Send::new(types::Fd(fd.as_raw_fd()), bytes.as_ptr(), bytes.len() as u32)
            .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
            .build();
        self.start(Purpose::Send { socket }, bytes, entry)
    }

    /// Completes once when `fd` can be written to.
    pub(crate) fn writable(&mut self, fd: BorrowedFd<'_>, socket: u32) -> OperationKey {
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLOUT as u32).build();
        self.start(Purpose::Writable { socket }, Vec::new(), entry)
    }

    /// Completes each time `fd` becomes readable: for listeners and the inbox's eventfd.
    pub(crate) fn readable(&mut self, fd: BorrowedFd<'_>, purpose: Purpose) -> OperationKey {
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
        self.start(purpose, Vec::new(), entry)
    }

    /// Completes once after `delay`.
    pub(crate) fn tick(&mut self, delay: Duration) -> OperationKey {
        let timeout = Box::new(types::Timespec::from(delay));
        let entry = opcode::Timeout::new(&*timeout).build();
        self.push(Operation { purpose: Purpose::Tick, bytes: Vec::new(), timeout: Some(timeout) }, entry)
    }

    /// Asks for the end of an operation; its final completion still comes.
    pub(crate) fn cancel(&mut self, operation: OperationKey) {
        let entry = opcode::AsyncCancel::new(u64::from(operation.0)).build();
        self.start(Purpose::Cancel, Vec::new(), entry);
    }

    fn start(&mut self, purpose: Purpose, bytes: Vec<u8>, entry: squeue::Entry) -> OperationKey {
        self.push(Operation { purpose, bytes, timeout: None }, entry)
    }

    fn push(&mut self, operation: Operation, entry: squeue::Entry) -> OperationKey {
        let key = self.operations.insert(operation);
        let entry = entry.user_data(key as u64);
        loop {
            // SAFETY: whatever memory `entry` points to is owned by row `key` (a vector's or box's heap block, which
            // stays in place when the row moves) until the final completion is reaped; provided buffers are owned by
            // `self.buffers`, which outlives the ring. File descriptors are only numbers to the kernel.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return OperationKey(key as u32);
            }
            // The queue is full: hand over what is there. An error leaves it full and is met again by the caller's
            // next `enter`; the kernel takes entries whatever the state of the completion side (NODROP), so this ends.
            if let Err(error) = self.enter(0) {
                tracing::debug!(%error, "submitting a full queue");
            }
        }
    }

    /// Whether entering the kernel would do anything: entries to submit, or deferred work to run.
    pub(crate) fn wants_enter(&mut self) -> bool {
        let submission = self.ring.submission();
        !submission.is_empty() || submission.taskrun() || submission.cq_overflow()
    }

    /// Whether entries wait to be submitted.
    pub(crate) fn has_entries(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Submits what is queued, runs the kernel's deferred work and waits until `wait` completions are there.
    ///
    /// # Errors
    /// Those of `io_uring_enter(2)`; `EINTR` is not one, the caller simply turns once more. Nor are those that say "later",
    /// see [`Ring::take_put_off`].
    pub(crate) fn enter(&mut self, wait: u32) -> io::Result<()> {
        let submit = self.ring.submission().len() as u32;
        match enter(self.enter_fd, submit, wait, ENTER_GETEVENTS | self.enter_flags, std::ptr::null(), 0) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR)) => Ok(()),
            // The completion side is backed up: reap first.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => {
                self.put_off = Some(error);
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// What the kernel said when it last put off what was submitted, since this was last asked: completions are backed up,
    /// or memory is short.
    pub(crate) fn take_put_off(&mut self) -> Option<io::Error> {
        self.put_off.take()
    }

    fn enter_for(&mut self, wait: u32, limit: Duration) -> io::Result<()> {
        let submit = self.ring.submission().len() as u32;
        let limit = types::Timespec::from(limit);
        let arguments = types::SubmitArgs::new().timespec(&limit);
        let (address, size) = (std::ptr::from_ref(&arguments).cast(), size_of_val(&arguments));
        match enter(self.enter_fd, submit, wait, ENTER_GETEVENTS | ENTER_EXT_ARG | self.enter_flags, address, size) {
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)) =>
            {
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Moves what the kernel has completed into `completions`.
    pub(crate) fn reap(&mut self, completions: &mut Vec<Completion>) {
        let Self { ring, operations, buffers, .. } = self;
        for entry in ring.completion() {
            let key = entry.user_data() as usize;
            let (result, flags) = (entry.result(), entry.flags());
            let more = cqueue::more(flags);
            // SAFETY of the buffer id: the kernel names a buffer of our only group; it left the group with this
            // completion and comes back through `recycle`.
            let buffer = cqueue::buffer_select(flags).map(|id| buffers.take(id, result.max(0) as u32));
            let (purpose, sent) = if more {
                (operations[key].purpose, Vec::new())
            } else {
                let operation = operations.remove(key);
                (operation.purpose, operation.bytes)
            };
            completions.push(Completion { purpose, result, more, buffer, sent });
        }
    }

    /// The bytes of a received buffer.
    pub(crate) fn bytes(&self, buffer: &Buffer) -> &[u8] {
        self.buffers.bytes(buffer)
    }

    /// Gives a buffer back to the kernel.
    pub(crate) fn recycle(&mut self, buffer: Buffer) {
        self.buffers.recycle(buffer);
    }

    /// To be called when a receive has ended for want of buffers.
    pub(crate) fn offer_more_buffers(&mut self) {
        self.buffers.offer_more();
    }

    /// To be called when nothing has been received for a while: gives the memory of buffers back to the system when it is
    /// worth the time.
    pub(crate) fn give_memory_back(&mut self) {
        // The kernel fills buffers while we are in it, and so with what has been reaped since then `Buffers` knows of all
        // that are filled; what overflowed makes us enter again.
        if self.ring.completion().is_empty() && !self.ring.submission().cq_overflow() {
            self.buffers.give_back();
        }
    }

    /// Operations the kernel still has.
    #[cfg(test)]
    pub(crate) fn in_flight(&self) -> usize {
        self.operations.len()
    }

    /// Lets `eventfd` be signalled with each completion, for waiting elsewhere.
    pub(crate) fn register_eventfd(&self, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.ring.submitter().register_eventfd(eventfd.as_raw_fd())
    }

    /// Switches the signalling of the registered eventfd.
    pub(crate) fn signal_eventfd(&mut self, on: bool) {
        let queue = self.ring.completion();
        if !on {
            return queue.disable_eventfd();
        }
        queue.enable_eventfd();
        // Whoever switches it on looks for deferred work next. The kernel flags work, then reads the switch; we set the
        // switch, then read the flag: at least one of the two sees the other.
        fence(Ordering::SeqCst);
    }

    /// Cancels everything and reaps to the last completion; true when nothing is left in flight.
    fn quiesce(&mut self) -> bool {
        if self.operations.is_empty() {
            return true;
        }
        let entry = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build();
        self.start(Purpose::Cancel, Vec::new(), entry);
        let deadline = Instant::now() + QUIESCE_LIMIT;
        let mut completions = Vec::new();
        while !self.operations.is_empty() && Instant::now() < deadline {
            if let Err(error) = self.enter_for(1, QUIESCE_STEP) {
                tracing::error!(%error, "io_uring_enter while ending a ring");
                break;
            }
            self.reap(&mut completions);
            for buffer in completions.drain(..).filter_map(|completion| completion.buffer) {
                self.recycle(buffer);
            }
        }
        self.operations.is_empty()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let quiet = self.quiesce();
        let left = self.operations.len();
        #[cfg(test)]
        tests::note_end(left);
        if quiet {
            let _ = self.ring.submitter().unregister_buf_ring(BUFFER_GROUP);
        } else {
            // Freed memory that the kernel may still write to is worse than lost memory.
            tracing::error!(operations = left, "a ring did not come to rest: its buffers are leaked");
            self.buffers.leak();
            std::mem::forget(std::mem::take(&mut self.operations));
        }
        if self.enter_flags & ENTER_REGISTERED_RING != 0 {
            unregister_ring_fd(self.ring.as_raw_fd(), self.enter_fd);
        }
        // The invariant "no operation is in flight when buffers are freed". Last, so that where it fails the buffers are
        // leaked and not freed by unwinding.
        debug_assert!(quiet, "{left} operations left in flight at the end of a ring");
    }
}

fn enter(fd: RawFd, submit: u32, wait: u32, flags: u32, argument: *const libc::c_void, size: usize) -> io::Result<u32> {
    // SAFETY: the entries that are submitted are sound by `Ring::start`; `argument` is null or points to `size` bytes
    // that live until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, submit, wait, flags, argument, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as u32) }
}

const REGISTER_RING_FDS: u32 = 20;
const UNREGISTER_RING_FDS: u32 = 21;

/// `struct io_uring_rsrc_update`.
#[repr(C)]
struct RingUpdate {
    offset: u32,
    reserved: u32,
    data: u64,
}

/// Spares the look-up of the descriptor at each `enter`. The registration is this thread's and ends with it.
fn register_ring_fd(fd: RawFd) -> io::Result<RawFd> {
    let mut update = RingUpdate { offset: u32::MAX, reserved: 0, data: fd as u64 };
    // SAFETY: one well-formed `io_uring_rsrc_update`, which the kernel writes the index back into.
    let done = unsafe { libc::syscall(libc::SYS_io_uring_register, fd, REGISTER_RING_FDS, &raw mut update, 1) };
    if done == 1 { Ok(update.offset as RawFd) } else { Err(io::Error::last_os_error()) }
}

fn unregister_ring_fd(fd: RawFd, index: RawFd) {
    let update = RingUpdate { offset: index as u32, reserved: 0, data: 0 };
    // SAFETY: as above; a failure leaves one of the thread's 16 places taken until the thread ends.
    unsafe { libc::syscall(libc::SYS_io_uring_register, fd, UNREGISTER_RING_FDS, &raw const update, 1) };
}

#[cfg(test)]
pub(crate) mod tests;
