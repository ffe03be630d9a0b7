//! The system calls of the file service, and all of its `unsafe`: opening below the root, reading
//! what the page cache holds, lending a file to glommio, reading a directory.

use std::cell::Cell;
use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use bytes::Bytes;
use glommio::io::BufferedFile;

/// `openat2` answers EAGAIN when a rename raced with a `..` in a symlink. Nobody renames eight
/// times in a row by accident.
const OPEN_ATTEMPTS_MAX: usize = 8;

/// What stands behind a name.
#[derive(Debug)]
pub(super) enum Opened {
    Regular(Regular),
    /// Open for reading its entries.
    Directory(OwnedFd),
    /// FIFO, socket, device: never served.
    Other,
}

/// An open regular file and what fstat(2) said of it when it was opened.
#[derive(Debug)]
pub(super) struct Regular {
    pub(super) file: File,
    pub(super) length: u64,
    pub(super) inode: u64,
    pub(super) mtime: i64,
    pub(super) mtime_nanoseconds: i64,
}

/// How far a lookup may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lookup {
    /// Only names the kernel has in memory; EAGAIN otherwise. Does not wait for a disk (Linux
    /// 5.12).
    Cached,
    /// Whatever it takes: for a thread that may wait.
    Full,
}

/// The root as a place to look names up from (`O_PATH`), and whether the kernel knows
/// [`Lookup::Cached`].
///
/// # Errors
/// What the system answers when it is no directory, is not readable, or when `openat2` is missing
/// or forbidden.
pub(super) fn root(path: &Path) -> io::Result<(OwnedFd, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC);
    let root = OwnedFd::from(options.open(path)?);
    openat2(&root, c".", Lookup::Full)?;
    let cached = match openat2(&root, c".", Lookup::Cached) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => false,
        Ok(_) | Err(_) => true,
    };
    Ok((root, cached))
}

/// The same directory by a descriptor that shares nothing with `root`: each use of an open file counts it, and a count in
/// common would go to and fro between the CPUs of those who look names up from it.
///
/// # Errors
/// As openat(2): too few descriptors, mostly.
pub(super) fn again(root: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: `root` is open, and the path is a constant that ends in NUL.
    let fd = unsafe { libc::openat(root.as_raw_fd(), c".".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens `path` for reading, wherever below `root` its symlinks lead, and says what it is.
///
/// # Errors
/// As openat2(2) and fstat(2); EXDEV for a way out of `root`.
pub(super) fn open(root: &OwnedFd, path: &[u8], lookup: Lookup) -> io::Result<Opened> {
    let path = CString::new(path)?;
    let mut attempts = match lookup {
        Lookup::Cached => 1,
        Lookup::Full => OPEN_ATTEMPTS_MAX,
    };
    let file = loop {
        attempts -= 1;
        match openat2(root, &path, lookup) {
            Err(error) if attempts > 0 && error.raw_os_error() == Some(libc::EAGAIN) => {}
            answer => break File::from(answer?),
        }
    };
    // On an open file of a local file system this reads the inode in memory; it does not wait.
    let metadata = file.metadata()?;
    if metadata.is_file() {
        Ok(Opened::Regular(Regular {
            length: metadata.len(),
            inode: metadata.ino(),
            mtime: metadata.mtime(),
            mtime_nanoseconds: metadata.mtime_nsec(),
            file,
        }))
    } else if metadata.is_dir() {
        Ok(Opened::Directory(file.into()))
    } else {
        Ok(Opened::Other)
    }
}

fn openat2(root: &OwnedFd, path: &CStr, lookup: Lookup) -> io::Result<OwnedFd> {
    // SAFETY: `open_how` is three integers, for which all-zero is a value.
    let mut how: libc::open_how = unsafe { mem::zeroed() };
    // O_NONBLOCK: opening a FIFO that has no writer would wait for one.
    let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
    how.flags = u64::try_from(flags).expect("open flags are positive");
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
    if lookup == Lookup::Cached {
        how.resolve |= libc::RESOLVE_CACHED;
    }
    // SAFETY: `root` is open, `path` ends in NUL, and `how` is read, with its true size, during the
    // call only.
    let answer = unsafe {
        libc::syscall(libc::SYS_openat2, root.as_raw_fd(), path.as_ptr(), &raw const how, size_of::<libc::open_how>())
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(answer).expect("a file descriptor is an int");
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What the page cache had.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Nowait {
    /// At least one byte, perhaps fewer than asked for.
    Bytes(Bytes),
    /// The file ends at or before the position.
    End,
    /// Not in memory.
    Cold,
    /// This file system cannot say (tmpfs, FUSE, overlayfs of older kernels).
    Unsupported,
}

/// `preadv2(RWF_NOWAIT)`: copies what the page cache holds and does not wait for a disk. It is the
/// same attempt that io_uring makes first when a read is submitted, without the ring around it.
///
/// # Errors
/// As preadv2(2).
pub(super) fn read_nowait(file: &File, position: u64, length: usize) -> io::Result<Nowait> {
    let mut buffer: Vec<u8> = Vec::with_capacity(length);
    let vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: length };
    let offset = offset(position)?;
    // SAFETY: the vector names `length` writable bytes that `buffer` has reserved, and the kernel
    // is done with them when the call returns; `file` is open.
    let answer = unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, offset, libc::RWF_NOWAIT) };
    let Ok(count) = usize::try_from(answer) else {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::EAGAIN) => {
                COLD_SINCE.set(Some(Instant::now()));
                Ok(Nowait::Cold)
            }
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => Ok(Nowait::Unsupported),
            _ => Err(error),
        };
    };
    assert!(count <= length, "preadv2 returned {count} bytes for a buffer of {length}");
    // SAFETY: the kernel has written the first `count` bytes, and `count` is within the capacity,
    // see above.
    unsafe { buffer.set_len(count) };
    Ok(if count == 0 { Nowait::End } else { Nowait::Bytes(buffer.into()) })
}

/// The granularity at which residence is asked for: the smallest page of any architecture.
const PAGE_BYTES: u64 = 4096;
/// Where `cachestat` has said that every page is there, every so many pages are asked for all the same: a page is in the
/// cache, too, while a read from the disk is filling it, and such reads come in runs.
const CACHED_PAGES_PER_PROBE: u64 = 16;
/// For so long after something was found missing, by any body of this thread, `cachestat` is not believed: what was
/// missing is being read, with what the kernel reads ahead. Without this, the executor spent 3 % of a cold download
/// waiting for the disk in sendfile(2); with it, none.
const COLD_LASTS: Duration = Duration::from_secs(1);

thread_local! {
    /// When something was last found missing.
    static COLD_SINCE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// How many of `length` bytes at `position`, at least one, can be read without waiting for a disk; what follows them was
/// found missing.
///
/// `cachestat` (Linux 6.5) answers for a whole range at once. Since Linux 6.13 it is refused to those who neither own the
/// file nor may write to it, which a server had better not, because residence tells what others do with the file. To read
/// a byte with RWF_NOWAIT is allowed to everybody; then every page is read from, at a third of the cost of copying it.
///
/// # Errors
/// As preadv2(2); EOPNOTSUPP where the file system does not know RWF_NOWAIT.
pub(super) fn resident_bytes(file: &File, position: u64, length: u64) -> io::Result<u64> {
    let (mut page, last) = (position / PAGE_BYTES, (position + length - 1) / PAGE_BYTES);
    let is_cold = COLD_SINCE.get().is_some_and(|since| since.elapsed() < COLD_LASTS);
    let step = if !is_cold && is_cached(file, position, length) { CACHED_PAGES_PER_PROBE } else { 2 };
    loop {
        // Two bytes, one on each side of a boundary, ask for two pages in one call.
        let boundary = (page + 1) * PAGE_BYTES;
        let (at, count) = if page < last { (boundary - 1, 2) } else { (position.max(page * PAGE_BYTES), 1) };
        let found = probe_nowait(file, at, count)?;
        if found < count {
            COLD_SINCE.set(Some(Instant::now()));
            let missing = if found == 0 { page * PAGE_BYTES } else { boundary };
            return Ok(missing.saturating_sub(position));
        }
        if page + 1 >= last {
            return Ok(length);
        }
        page = last.min(page + step);
    }
}

/// How many of `count` bytes, two at most, a read without waiting brings; 0 also at the file's end.
fn probe_nowait(file: &File, position: u64, count: usize) -> io::Result<usize> {
    let mut bytes = [0_u8; 2];
    assert!(count <= bytes.len(), "a probe of {count} bytes");
    let vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: count };
    let offset = offset(position)?;
    // SAFETY: the vector names `count` bytes of `bytes`, which is live and large enough; `file` is open.
    let answer = unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, offset, libc::RWF_NOWAIT) };
    usize::try_from(answer).or_else(|_| {
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::EAGAIN) { Ok(0) } else { Err(error) }
    })
}

/// Whether the page cache has a page for every byte of the range; false when the kernel does not say.
fn is_cached(file: &File, position: u64, length: u64) -> bool {
    /// `cachestat` has one number on every architecture (Linux 6.5); libc does not name it everywhere.
    const SYS_CACHESTAT: libc::c_long = 451;
    // `struct cachestat_range` and `struct cachestat` of linux/mman.h.
    let range = [position, length];
    let mut counts = [0_u64; 5];
    // SAFETY: both arrays are live and of the layout and size that the kernel reads and writes; `file` is open.
    let answer = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0 as libc::c_uint)
    };
    let pages = (position + length - 1) / PAGE_BYTES - position / PAGE_BYTES + 1;
    // On larger pages there are fewer of them: taken for missing, and asked for one by one.
    answer == 0 && counts[0] == pages
}

/// File positions are signed in the kernel.
fn offset(position: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(position).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// Gives `file` to glommio. The counterpart is [`take_back`]; a `BufferedFile` that is dropped
/// instead is closed by glommio's ring.
///
/// # Errors
/// As fcntl(2).
pub(super) fn lend(file: File) -> io::Result<BufferedFile> {
    // Opened with O_NONBLOCK because of FIFOs. io_uring of older kernels takes that flag, of a regular
    // file too, for "answer EAGAIN instead of waiting", and waiting is what glommio is asked for here.
    // (Linux 6.18 waits either way, on ext4 and on tmpfs; the call is cheap and on the cold path.)
    // SAFETY: F_SETFL changes flags of an open description that is ours alone; it touches no
    // memory.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `into_raw_fd` gives up ownership, and from here the BufferedFile alone has it.
    Ok(unsafe { BufferedFile::from_raw_fd(file.into_raw_fd()) })
}

/// Takes a file back from glommio, between reads: then an ordinary close(2) at an ordinary drop
/// ends it, at once and whether or not the executor turns again. (close(2) of a file that was only
/// read does not wait, and io_uring's close would do the same inline.)
pub(super) fn take_back(lent: BufferedFile) -> File {
    let fd = lent.as_raw_fd();
    // glommio has no public way out of a BufferedFile. Forgetting it skips the close in its Drop
    // and, besides, the release of one weak reference: the memory of the reactor struct (not what
    // it owns) outlives an executor that has ended. That is some kilobytes per executor, not per
    // file.
    mem::forget(lent);
    // SAFETY: `lent` owned the descriptor, it is gone without having closed it, and it was not
    // cloned: BufferedFile is not Clone, and its reads borrow it, so none is in flight.
    unsafe { File::from_raw_fd(fd) }
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    /// Any bytes but NUL and slashes.
    pub(super) name: Vec<u8>,
    pub(super) is_directory: bool,
}

/// Up to `limit` entries, in the directory's own order, and whether there are more. Left out: names
/// with a leading dot, which a listing hides. Blocks.
///
/// # Errors
/// As fdopendir(3) and readdir(3).
pub(super) fn entries(directory: OwnedFd, limit: usize) -> io::Result<(Vec<Entry>, bool)> {
    let mut stream = DirectoryStream::new(directory)?;
    let mut entries = Vec::new();
    while let Some(entry) = stream.next_entry()? {
        let Some(entry) = entry else {
            continue;
        };
        if entries.len() == limit {
            return Ok((entries, true));
        }
        entries.push(entry);
    }
    Ok((entries, false))
}

/// A `DIR`, closed on drop.
struct DirectoryStream(NonNull<libc::DIR>);

impl DirectoryStream {
    fn new(directory: OwnedFd) -> io::Result<DirectoryStream> {
        // SAFETY: the descriptor is open and, on success, belongs to the stream: it is forgotten
        // just below.
        let stream = unsafe { libc::fdopendir(directory.as_raw_fd()) };
        let stream = NonNull::new(stream).ok_or_else(io::Error::last_os_error)?;
        mem::forget(directory);
        Ok(DirectoryStream(stream))
    }

    /// `None` at the end, `Some(None)` for an entry that is not shown.
    fn next_entry(&mut self) -> io::Result<Option<Option<Entry>>> {
        // readdir tells its end from an error by errno alone.
        // SAFETY: errno is this thread's own.
        unsafe { *libc::__errno_location() = 0 };
        // SAFETY: the stream is open, and `&mut self` excludes another reader of it.
        let Some(entry) = NonNull::new(unsafe { libc::readdir64(self.0.as_ptr()) }) else {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(0) { Ok(None) } else { Err(error) };
        };
        // SAFETY: the entry is valid until the next readdir or closedir, both of which need `&mut
        // self`. Its fields are reached by raw pointer and not through a reference, as the record
        // may be shorter than the struct; the name ends in NUL.
        let (name, kind) = unsafe {
            let entry = entry.as_ptr();
            (CStr::from_ptr((&raw const (*entry).d_name).cast()), (*entry).d_type)
        };
        let shown = Some(name.to_bytes()).filter(|name| !name.starts_with(b"."));
        Ok(Some(shown.map(|name| Entry { name: name.to_vec(), is_directory: kind == libc::DT_DIR })))
    }
}

impl Drop for DirectoryStream {
    fn drop(&mut self) {
        // SAFETY: the stream is open and is not used again.
        unsafe { libc::closedir(self.0.as_ptr()) };
    }
}
