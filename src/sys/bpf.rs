//! bpf(2): maps, memory shared with programs, loading a program and giving it to a reuseport group.
//!
//! Extended BPF only; classic programs need no more than a socket option (`sys::socket`). Every descriptor that the
//! call returns is close-on-exec by itself. What a program does is the business of `steering`; whether it is sound is
//! the kernel's, which verifies it before it takes it.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

use super::socket::{check, set_option};

/// One instruction of extended BPF, as `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    pub opcode: u8,
    registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

impl Instruction {
    /// The two registers are half bytes whose order is the machine's.
    pub const fn new(opcode: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Self {
        let registers =
            if cfg!(target_endian = "little") { source << 4 | destination } else { destination << 4 | source };
        Self { opcode, registers, offset, immediate }
    }
}

/// From linux/bpf.h, which libc does not have.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_REUSEPORT_SOCKARRAY: u32 = 20;
const BPF_PROG_TYPE_SK_REUSEPORT: u32 = 21;
const BPF_F_MMAPABLE: u32 = 1 << 10;
/// From asm-generic/socket.h.
const SO_DETACH_REUSEPORT_BPF: libc::c_int = 68;

/// The leading fields of `union bpf_attr` for `BPF_MAP_CREATE`; the kernel takes the rest for zero.
#[repr(C)]
struct CreateMap {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

/// For `BPF_MAP_LOOKUP_ELEM` and `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct Element {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// For `BPF_PROG_LOAD`.
#[repr(C)]
struct LoadProgram {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// An array map of `count` values of `words` times eight bytes each, and its memory, in which they follow each other.
///
/// # Errors
/// `EPERM` without CAP_BPF (and under most container profiles), `ENOSYS`, or no memory.
pub fn shared_words(count: u32, words: u32) -> io::Result<(OwnedFd, SharedWords)> {
    let map = create_map(BPF_MAP_TYPE_ARRAY, 8 * words, count, BPF_F_MMAPABLE)?;
    let memory = SharedWords::of(&map, count as usize * words as usize)?;
    Ok((map, memory))
}

fn create_map(map_type: u32, value_size: u32, max_entries: u32, map_flags: u32) -> io::Result<OwnedFd> {
    let attributes = CreateMap {
        map_type,
        key_size: 4,
        value_size,
        max_entries,
        map_flags,
        inner_map_fd: 0,
        numa_node: 0,
        map_name: *b"ringleader\0\0\0\0\0\0",
    };
    // SAFETY: the structure is what this command reads, and holds no pointer.
    owned(unsafe { bpf(BPF_MAP_CREATE, &attributes) })
}

/// A map of places for listening sockets, from which a program of a reuseport group selects. It takes no reference: a
/// listener that closes leaves its place.
#[derive(Debug)]
pub struct SocketArray(OwnedFd);

impl SocketArray {
    /// An empty one of `entries` places.
    ///
    /// # Errors
    /// As [`shared_words`].
    pub fn new(entries: u32) -> io::Result<Self> {
        Ok(Self(create_map(BPF_MAP_TYPE_REUSEPORT_SOCKARRAY, 8, entries, 0)?))
    }

    /// One that another process has made and passed on, which is to have `entries` places at least.
    ///
    /// # Errors
    /// `InvalidInput` when the descriptor is something else.
    pub fn inherited(fd: OwnedFd, entries: u32) -> io::Result<Self> {
        // The kernel tells type and sizes of a map here; to ask bpf(2) takes a larger structure for the same.
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim_start_matches(':').trim().parse::<u32>().ok()
        };
        let fits = field("map_type") == Some(BPF_MAP_TYPE_REUSEPORT_SOCKARRAY)
            && field("key_size") == Some(4)
            && field("value_size") == Some(8)
            && field("max_entries").is_some_and(|most| most >= entries);
        let refuse = || io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is no array of enough sockets");
        fits.then(|| Self(fd)).ok_or_else(refuse)
    }

    /// Puts a listener into a place.
    ///
    /// # Errors
    /// `EBUSY`: the socket is in an array already, of whatever process; it can be in one. `EINVAL`: it does not listen,
    /// or is in no reuseport group.
    pub fn put(&self, place: u32, listener: BorrowedFd<'_>) -> io::Result<()> {
        let value = listener.as_raw_fd() as u64;
        let element = self.element(&place, (&raw const value).cast());
        // SAFETY: key and value are live for the call, four and eight bytes, which are the sizes of this map.
        check(unsafe { bpf(BPF_MAP_UPDATE_ELEM, &element) } as i32)
    }

    /// The [`cookie`] of the socket in a place; `None` for an empty one.
    ///
    /// # Errors
    /// When there is no such place.
    pub fn get(&self, place: u32) -> io::Result<Option<u64>> {
        let mut value = 0_u64;
        let element = self.element(&place, (&raw mut value).cast_const());
        // SAFETY: as in `put`; `value` is exclusively ours, and its address was made from a mutable reference.
        match check(unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &element) } as i32) {
            Ok(()) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn element(&self, place: &u32, value: *const u64) -> Element {
        let (key, value) = (&raw const *place as u64, value as u64);
        Element { map_fd: self.0.as_raw_fd() as u32, padding: 0, key, value, flags: 0 }
    }
}

impl AsFd for SocketArray {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The number by which the kernel tells sockets apart.
///
/// # Errors
/// When the descriptor is no socket.
pub fn cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = mem::size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: `cookie` is live and `length` its size, so the kernel writes within it.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    })?;
    Ok(cookie)
}

/// Loads a program for reuseport groups.
///
/// # Errors
/// `EPERM` without CAP_BPF and CAP_NET_ADMIN; when the verifier refuses, the last lines of what it says.
pub fn load_reuseport(program: &[Instruction]) -> io::Result<OwnedFd> {
    let quick = load(program, &mut []);
    match quick {
        // Only a refusal is worth the verifier's words, which cost it time and us memory.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EACCES | libc::E2BIG)) => {
            let mut log = vec![0_u8; 64 * 1024];
            let error = load(program, &mut log).err().unwrap_or(error);
            let written = log.split(|byte| *byte == 0).next().unwrap_or_default();
            let text = String::from_utf8_lossy(written);
            let last = text.lines().rfind(|line| !line.starts_with("processed ")).unwrap_or("says nothing");
            Err(io::Error::new(error.kind(), format!("{error}; the verifier: {last}")))
        }
        other => other,
    }
}

fn load(program: &[Instruction], log: &mut [u8]) -> io::Result<OwnedFd> {
    // The helpers that are called are open to any licence.
    let license = c"MIT OR Apache-2.0";
    let attributes = LoadProgram {
        prog_type: BPF_PROG_TYPE_SK_REUSEPORT,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: u32::from(!log.is_empty()),
        log_size: log.len() as u32,
        log_buf: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"ringleader\0\0\0\0\0\0",
    };
    // SAFETY: the instructions and the licence are live and only read, with the count given; the log is exclusively ours
    // and the kernel writes at most the size given.
    owned(unsafe { bpf(BPF_PROG_LOAD, &attributes) })
}

/// Gives the reuseport group of this listener a loaded program, in the place of any other, classic or extended.
///
/// # Errors
/// `EINVAL` when the listener is in no group.
pub fn attach_reuseport(listener: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    set_option(listener, libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_EBPF, program.as_raw_fd())
}

/// Takes the program away from the reuseport group of this listener: the kernel's hash over all members is left.
///
/// # Errors
/// `ENOENT` when there was none.
pub fn detach_reuseport(listener: BorrowedFd<'_>) -> io::Result<()> {
    set_option(listener, libc::SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)
}

/// bpf(2); the new descriptor, 0, or -1.
///
/// # Safety
/// `attributes` must be what `command` reads, and the addresses in it valid for what it does with them.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> libc::c_long {
    // SAFETY: live memory of the size given, which these commands only read; the rest is the caller's promise.
    unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, mem::size_of::<T>()) }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    check(result as i32)?;
    // SAFETY: the call succeeded, so this number is an open descriptor that nothing else owns yet.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// The memory of an array map: what is stored here, programs read, and no system call is between. It keeps the map
/// alive without its descriptor.
#[derive(Debug)]
pub struct SharedWords {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: it owns its mapping and gives out nothing but atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    fn of(map: &OwnedFd, words: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice, over nothing that exists; its length is what the map
        // was made with, which the kernel rounds up to pages on both sides.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                words * 8,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("a mapping at address 0"))?;
        Ok(Self { start, words })
    }
}

impl std::ops::Deref for SharedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, of that many words, zeroed by the kernel, and lives as long as `self`. The
        // kernel's side only reads it, and programs read whole words.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `of`, of that length; what `deref` lent has ended with the borrow.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * 8) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::bind::{ListenOptions, bind_group};

    fn refused(error: &io::Error) -> bool {
        matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS))
    }

    #[test]
    fn descriptors_are_closed_on_exec_and_memory_outlives_them() {
        let (map, memory) = match shared_words(20, 5) {
            Ok(made) => made,
            Err(error) if refused(&error) => return eprintln!("skipped: {error}"),
            Err(error) => panic!("{error}"),
        };
        for fd in [map.as_fd(), SocketArray::new(4).unwrap().as_fd()] {
            // SAFETY: takes no memory.
            assert_ne!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) } & libc::FD_CLOEXEC, 0);
        }
        drop(map);
        memory[99].store(7, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(memory[99].load(std::sync::atomic::Ordering::Relaxed), 7);
    }

    #[test]
    fn a_socket_is_in_one_array_at_a_time_and_an_array_that_ends_lets_it_go() {
        let array = match SocketArray::new(4) {
            Ok(array) => array,
            Err(error) if refused(&error) => return eprintln!("skipped: {error}"),
            Err(error) => panic!("{error}"),
        };
        let group = bind_group("127.0.0.1:0".parse().unwrap(), 2, &ListenOptions::default()).unwrap();
        array.put(1, group[0].as_fd()).unwrap();
        assert_eq!(array.get(1).unwrap(), Some(cookie(group[0].as_fd()).unwrap()));
        assert_eq!(array.get(0).unwrap(), None);
        let other = SocketArray::new(4).unwrap();
        // Not even in the same place again.
        for (array, place) in [(&array, 1), (&array, 2), (&other, 0)] {
            let error = array.put(place, group[0].as_fd()).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
        }
        let plain = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(array.put(3, plain.as_fd()).unwrap_err().raw_os_error(), Some(libc::EINVAL));

        drop(array);
        // The kernel takes maps down a little later.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while other.put(0, group[0].as_fd()).is_err() {
            assert!(std::time::Instant::now() < deadline, "the array that has ended still holds its socket");
            std::thread::yield_now();
        }
        drop(group);
        // A process that another test is starting has a copy of each descriptor until it runs its program.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while other.get(0).unwrap().is_some() {
            assert!(std::time::Instant::now() < deadline, "a closed listener leaves its place");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_descriptor_from_elsewhere_is_looked_at_before_it_is_used() {
        let Ok(array) = SocketArray::new(4) else { return eprintln!("skipped: bpf(2) is refused") };
        let copy = || array.as_fd().try_clone_to_owned().unwrap();
        assert!(SocketArray::inherited(copy(), 4).is_ok());
        assert!(SocketArray::inherited(copy(), 5).is_err());
        let (words, _memory) = shared_words(1, 1).unwrap();
        assert!(SocketArray::inherited(words, 1).is_err());
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(SocketArray::inherited(file.into(), 1).is_err());
    }

    #[test]
    fn a_program_that_is_refused_comes_with_the_verifiers_reason() {
        // Returns without a value.
        let error = load_reuseport(&[Instruction::new(0x95, 0, 0, 0, 0)]).unwrap_err();
        if !refused(&error) {
            assert!(error.to_string().contains("R0 !read_ok"), "{error}");
        }
    }
}
