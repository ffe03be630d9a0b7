//! The provided-buffer ring that multishot receives fill.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::{Submitter, types::BufRingEntry};

/// Buffers in the ring; a power of two, as the kernel wants it.
const COUNT: u16 = 1024;
/// Bytes per buffer: several times what 16 pipelined requests of wrk take.
const BYTES: usize = 4096;
/// The alignment the kernel asks of the ring's first entry.
const PAGE: usize = 4096;
/// The only buffer group.
pub const GROUP: u16 = 0;

/// Buffers lent to the kernel and taken back one by one. Its memory is never freed: the kernel may
/// write to it for as long as the process lives.
#[derive(Debug)]
pub struct Buffers {
    entries: *mut BufRingEntry,
    memory: *mut u8,
    tail: u16,
}

impl Buffers {
    /// Allocates the buffers, lends all of them to the kernel and registers the ring.
    pub fn register(submitter: &Submitter<'_>) -> io::Result<Self> {
        let entries = pages(usize::from(COUNT) * size_of::<BufRingEntry>()).cast();
        let memory = pages(usize::from(COUNT) * BYTES);
        let mut buffers = Self { entries, memory, tail: 0 };
        for id in 0..COUNT {
            buffers.lend(id);
        }
        // SAFETY: `entries` points to COUNT zeroed, page-aligned entries that are never freed, and every
        // one of them names a buffer of BYTES bytes that is never freed either.
        unsafe { submitter.register_buf_ring_with_flags(entries as u64, COUNT, GROUP, 0)? };
        Ok(buffers)
    }

    /// Hands the kernel's bytes to `look` and lends the buffer again.
    pub fn with<T>(&mut self, id: u16, length: usize, look: impl FnOnce(&[u8]) -> T) -> T {
        assert!(id < COUNT && length <= BYTES, "the kernel names buffers it was lent");
        // SAFETY: buffer `id` lies within the allocation (asserted), its bytes are initialised (zeroed at
        // first, then written by the kernel), and between its completion and `lend` below it is ours
        // alone: the kernel took the entry off the ring when it chose the buffer.
        let bytes = unsafe { std::slice::from_raw_parts(self.address(id), length) };
        let answer = look(bytes);
        self.lend(id);
        answer
    }

    fn lend(&mut self, id: u16) {
        let index = usize::from(self.tail % COUNT);
        let address = self.address(id) as u64;
        // SAFETY: `index` is below COUNT, so the entry lies within the allocation. The kernel reads only entries
        // before the published tail; at most COUNT buffers exist, so this entry is behind its head.
        // The tail shares memory with entry 0's last field, which none of these setters touches.
        let entry = unsafe { &mut *self.entries.add(index) };
        entry.set_addr(address);
        entry.set_len(BYTES as u32);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: `entries` is the address of the ring's first entry, initialised (zeroed) and never freed; the
        // tail field is an aligned u16 that the kernel only reads, so an atomic store to it is sound.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(self.entries).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    fn address(&self, id: u16) -> *mut u8 {
        self.memory.wrapping_add(usize::from(id) * BYTES)
    }
}

fn pages(bytes: usize) -> *mut u8 {
    let layout = Layout::from_size_align(bytes, PAGE).expect("the sizes are small constants");
    // SAFETY: the layout's size is not zero: both callers multiply constants above zero.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        handle_alloc_error(layout);
    }
    memory
}
