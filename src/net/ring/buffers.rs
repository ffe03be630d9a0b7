//! The receive buffers that the kernel picks from: a provided-buffer ring and the memory behind it.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

/// A buffer the kernel has filled and handed out. Whoever holds one has the only access to its bytes until it is
/// recycled; it cannot be cloned.
#[derive(Debug)]
pub(crate) struct Buffer {
    id: u16,
    len: u32,
}

impl Buffer {
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }
}

/// Buffers that start at the same place of their pages compete for the same few cache sets, and small requests use
/// nothing but the starts: two lines of distance spread them.
const STAGGER: usize = 128;

/// Buffers offered to the kernel at first. It takes them in turn, the one given back last after all others, so each that is
/// offered is touched before long: one is to be offered when there is a use for it, and not before.
const OFFERED_AT_FIRST: u16 = 64;

/// Buffers used since their pages were given back from which on it is worth doing again.
const GIVE_BACK_MIN: u16 = 256;

/// `count` buffers of `bytes` each, some of them offered to the kernel.
pub(super) struct Buffers {
    map: Map,
    count: u16,
    /// Those below are offered or taken, those from here on have never been.
    offered: u16,
    /// Buffers that the kernel has filled and that have not been recycled.
    taken: u16,
    bytes: u32,
    /// Bytes from the start of one buffer to that of the next.
    stride: usize,
    /// Free-running index of the next entry to publish.
    tail: u16,
    /// `tail` when the pages were given back last.
    given_back_at: u16,
}

impl Buffers {
    pub(super) fn new(count: u16, bytes: u32) -> io::Result<Self> {
        assert!(count.is_power_of_two() && count <= 1 << 15, "a buffer ring has 2^n entries, 32768 at most");
        let entries = usize::from(count) * size_of::<BufRingEntry>();
        let stride = bytes as usize + STAGGER;
        let map = Map::new(entries.next_multiple_of(4096), usize::from(count) * stride)?;
        let mut buffers = Self { map, count, offered: 0, taken: 0, bytes, stride, tail: 0, given_back_at: 0 };
        buffers.offer(OFFERED_AT_FIRST);
        Ok(buffers)
    }

    /// Offers so many more, if there are.
    fn offer(&mut self, more: u16) {
        let offered = self.offered.saturating_add(more).min(self.count);
        (self.offered..offered).for_each(|id| self.publish(id));
        self.offered = offered;
    }

    /// The kernel found none: offers as many again.
    pub(super) fn offer_more(&mut self) {
        self.offer(self.offered);
    }

    /// The kernel has filled one, of this id and with so many bytes, and handed it out.
    pub(super) fn take(&mut self, id: u16, len: u32) -> Buffer {
        self.taken += 1;
        Buffer { id, len }
    }

    /// Gives the pages of the buffers back to the system, when many have been used and none is held. Those that are used
    /// next cost a page fault each.
    pub(super) fn give_back(&mut self) {
        if self.taken == 0 && self.tail.wrapping_sub(self.given_back_at) >= GIVE_BACK_MIN {
            self.given_back_at = self.tail;
            let length = usize::from(self.count) * self.stride;
            // SAFETY: the data part of the map, which begins with a page. No `Buffer` is about, so nobody reads it; the kernel
            // writes to it by its addresses, as anybody does, and meets fresh pages. A failure leaves things as they are.
            unsafe { libc::madvise(self.map.data.as_ptr().cast(), length, libc::MADV_DONTNEED) };
        }
    }

    pub(super) fn ring_address(&self) -> u64 {
        self.map.entries.as_ptr() as u64
    }

    pub(super) fn count(&self) -> u16 {
        self.count
    }

    pub(super) fn bytes(&self, buffer: &Buffer) -> &[u8] {
        assert!(buffer.id < self.count && buffer.len <= self.bytes, "a buffer of another ring");
        // SAFETY: the range lies inside the map by the assertion, was filled before the completion was posted, and is not offered again while
        // the `Buffer` exists, so nobody writes to it.
        unsafe { std::slice::from_raw_parts(self.address(buffer.id), buffer.len()) }
    }

    pub(super) fn recycle(&mut self, buffer: Buffer) {
        self.taken -= 1;
        self.publish(buffer.id);
    }

    /// The memory of all buffers.
    #[cfg(test)]
    pub(super) fn data(&self) -> (*mut u8, usize) {
        (self.map.data.as_ptr(), usize::from(self.count) * self.stride)
    }

    fn address(&self, id: u16) -> *mut u8 {
        // SAFETY: `id < count`, so the offset stays inside the data part of the map.
        unsafe { self.map.data.as_ptr().add(usize::from(id) * self.stride) }
    }

    fn publish(&mut self, id: u16) {
        let address = self.address(id) as u64;
        let index = usize::from(self.tail & (self.count - 1));
        let base = self.map.entries.as_ptr().cast::<BufRingEntry>();
        // SAFETY: `index < count`. The kernel reads an entry only below the published tail and has consumed this one
        // (there are never more than `count` buffers about), so the write races with nobody. The tail overlays the
        // unused last field of entry 0, where the setters below do not reach.
        unsafe {
            let entry = &mut *base.add(index);
            entry.set_addr(address);
            entry.set_len(self.bytes);
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail is an aligned u16 inside the map, read by the kernel with acquire semantics.
        unsafe { AtomicU16::from_ptr(BufRingEntry::tail(base).cast_mut()).store(self.tail, Ordering::Release) };
    }

    /// Gives up the memory for ever: the kernel may still write to it.
    pub(super) fn leak(&mut self) {
        self.map.leaked = true;
    }
}

/// Anonymous pages; those never touched take no memory.
struct Map {
    entries: NonNull<u8>,
    data: NonNull<u8>,
    length: usize,
    leaked: bool,
}

impl Map {
    fn new(entries: usize, data: usize) -> io::Result<Self> {
        let length = entries + data;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh anonymous mapping aliases nothing.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A child of fork() must not share pages the kernel writes to.
        // SAFETY: the range is the mapping just made.
        unsafe { libc::madvise(address, length, libc::MADV_DONTFORK) };
        let entries_start = NonNull::new(address.cast::<u8>()).expect("mmap does not map page zero");
        // SAFETY: `entries <= length`, inside the mapping.
        let data_start = unsafe { entries_start.add(entries) };
        Ok(Self { entries: entries_start, data: data_start, length, leaked: false })
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        if !self.leaked {
            // SAFETY: the mapping made in `new`, unmapped once; the owner has seen to it that the kernel is done.
            unsafe { libc::munmap(self.entries.as_ptr().cast(), self.length) };
        }
    }
}
