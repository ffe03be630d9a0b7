//! Descriptors that change hands: over a Unix socket (`SCM_RIGHTS`), as standard input, or by number from the service
//! manager.
//!
//! What is received is close-on-exec from the moment it exists. Who may send what is the caller's concern.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use super::socket::{check, retry};

/// Descriptors that one message may carry. The kernel's `SCM_MAX_FD` is 253.
pub const BATCH_MAX: usize = 250;

/// Memory for one control message with [`BATCH_MAX`] descriptors: `CMSG_SPACE(250 * 4)` is 1,016 on 64-bit systems.
const CONTROL_BYTES: usize = 1024;

/// What `recvmsg` and `sendmsg` want their control messages in: aligned for `cmsghdr`.
#[repr(C)]
struct Control {
    _align: [libc::cmsghdr; 0],
    bytes: [u8; CONTROL_BYTES],
}

impl Control {
    fn new() -> Self {
        Self { _align: [], bytes: [0; CONTROL_BYTES] }
    }
}

/// Two connected sockets that keep the bounds of messages (`SOCK_SEQPACKET`); both close-on-exec, both blocking.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: `fds` has room for the two numbers that the kernel writes.
    check(unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) })?;
    // SAFETY: socketpair succeeded, so these are open descriptors that nothing else owns yet.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Sends one message with at most [`BATCH_MAX`] descriptors. Blocks if the socket does; never raises SIGPIPE.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    if descriptors.len() > BATCH_MAX {
        let message = format!("{} descriptors in one message: {BATCH_MAX} at most", descriptors.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let mut control = Control::new();
    // The kernel only reads it, though the type says otherwise.
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut message = header(&mut part);
    if !numbers.is_empty() {
        let length = mem::size_of_val(numbers.as_slice()) as u32;
        message.msg_control = (&raw mut control).cast();
        // SAFETY: both only calculate. BATCH_MAX numbers need 1,016 bytes, and `control` has 1,024.
        let (space, filled) = unsafe { (libc::CMSG_SPACE(length), libc::CMSG_LEN(length)) };
        debug_assert!(space as usize <= CONTROL_BYTES);
        message.msg_controllen = space as _;
        // SAFETY: `msg_control` and `msg_controllen` describe live memory, aligned for `cmsghdr` and with room for one
        // header and `length` bytes behind it, so CMSG_FIRSTHDR is not null and all writes are within `control`.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&raw const message);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = filled as _;
            std::ptr::copy_nonoverlapping(numbers.as_ptr().cast::<u8>(), libc::CMSG_DATA(first), length as usize);
        }
    }
    // SAFETY: `message` describes `bytes` and `control`, which live until the call returns and are only read; the
    // numbers in it are open descriptors, since they are borrowed.
    let sent = retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) })?;
    if sent as usize != bytes.len() {
        return Err(io::Error::new(io::ErrorKind::WriteZero, "a message was sent in part"));
    }
    Ok(())
}

/// Receives one message into `buffer`: its bytes, 0 at the end of the stream, and the descriptors that came with it.
///
/// # Errors
/// The system's own; and when the message or its descriptors did not fit, which for descriptors means that the limit on
/// open files was reached.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = Control::new();
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut message = header(&mut part);
    message.msg_control = (&raw mut control).cast();
    let received = retry(|| {
        message.msg_controllen = CONTROL_BYTES as _;
        // SAFETY: `message` describes `buffer` and `control`, which are live and exclusively borrowed, with their sizes.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) }
    })?;
    // Owned before anything can fail, so that none leaks.
    let descriptors = take_descriptors(&message);
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        let why = "some descriptors did not fit: raise the limit on open files (ulimit -n, LimitNOFILE=)";
        return Err(io::Error::other(why));
    }
    if message.msg_flags & libc::MSG_TRUNC != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is longer than any that is known"));
    }
    Ok((received as usize, descriptors))
}

fn header(part: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: msghdr is plain pointers and integers, for which all zeroes is a value (no name, no control message).
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = part;
    message.msg_iovlen = 1;
    message
}

#[allow(clippy::unnecessary_cast, reason = "the length is 32 bits with musl")]
fn take_descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has filled in `msg_control` and `msg_controllen`, which describe memory of the caller's that is
    // live for as long as `message` is borrowed; CMSG_FIRSTHDR and CMSG_NXTHDR stay within it or give null. A message of
    // SCM_RIGHTS holds `cmsg_len - CMSG_LEN(0)` bytes of descriptor numbers, possibly unaligned, which the kernel has
    // made for this process alone: nothing else owns them yet.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(message);
        while let Some(found) = next.as_ref() {
            if (found.cmsg_level, found.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let bytes = found.cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let numbers = libc::CMSG_DATA(next).cast::<RawFd>();
                for index in 0..bytes / mem::size_of::<RawFd>() {
                    descriptors.push(OwnedFd::from_raw_fd(numbers.add(index).read_unaligned()));
                }
            }
            next = libc::CMSG_NXTHDR(message, next);
        }
    }
    descriptors
}

/// The process that made a connected Unix socket's other end, as the kernel recorded it; `None` for anything else.
pub fn peer_process(socket: BorrowedFd<'_>) -> Option<u32> {
    if option(socket, libc::SO_DOMAIN).ok()? != libc::AF_UNIX {
        return None;
    }
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = mem::size_of_val(&peer) as libc::socklen_t;
    // SAFETY: `peer` is live and `length` its size, so the kernel writes within it.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    check(result).ok()?;
    u32::try_from(peer.pid).ok().filter(|pid| *pid > 0)
}

/// Whether this is a listening TCP socket.
pub fn listens(socket: BorrowedFd<'_>) -> bool {
    let is = |name, value| option(socket, name).is_ok_and(|found| found == value);
    is(libc::SO_TYPE, libc::SOCK_STREAM) && is(libc::SO_PROTOCOL, libc::IPPROTO_TCP) && is(libc::SO_ACCEPTCONN, 1)
}

fn option(socket: BorrowedFd<'_>, name: i32) -> io::Result<i32> {
    let mut value = 0_i32;
    let mut length = mem::size_of_val(&value) as libc::socklen_t;
    // SAFETY: `value` is live and `length` its size, so the kernel writes within it.
    check(unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut length)
    })?;
    Ok(value)
}

/// Makes accepting from a listener that somebody else has opened non-blocking, for everybody who has it.
pub fn set_nonblocking(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes no memory; the descriptor is open for as long as it is borrowed.
    let flags = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

/// Takes the open file that standard input is and puts `/dev/null` in its place, so that nobody reads from it, and no
/// child inherits it, by mistake.
pub fn take_stdin() -> io::Result<OwnedFd> {
    let taken = io::stdin().as_fd().try_clone_to_owned()?;
    let null = std::fs::File::open("/dev/null")?;
    // SAFETY: takes no memory. Descriptor 0 belongs to nobody: `std::io::stdin` reads whatever it is at the time.
    check(unsafe { libc::dup2(null.as_raw_fd(), libc::STDIN_FILENO) })?;
    Ok(taken)
}

/// Takes over the listening TCP sockets among the descriptors from 3 on that a service manager has opened for this
/// process (sd_listen_fds(3)), and makes them close-on-exec; `None` in the place of anything else, which is left alone.
/// Each process has them once: later calls get none.
///
/// The caller has checked that they are meant for this process (`LISTEN_PID`).
pub fn passed_at_start(count: u32) -> Vec<Option<OwnedFd>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    let take = |number: RawFd| {
        // SAFETY: takes no memory, and changes nothing.
        check(unsafe { libc::fcntl(number, libc::F_GETFD) }).ok()?;
        // SAFETY: it is open, as fcntl has just shown, and by the protocol nobody closes it before it is taken.
        if !listens(unsafe { BorrowedFd::borrow_raw(number) }) {
            return None;
        }
        // SAFETY: takes no memory.
        check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) }).ok()?;
        // SAFETY: it is open. By the protocol these numbers were open before `main` and belong to who asks for them by
        // it; `TAKEN` sees to it that nobody gets one from here twice.
        Some(unsafe { OwnedFd::from_raw_fd(number) })
    };
    (0..count.min(FIRST_PASSED_MAX)).map(|index| take(FIRST_PASSED + index as RawFd)).collect()
}

/// `SD_LISTEN_FDS_START`.
const FIRST_PASSED: RawFd = 3;
/// More are not believed: `FileDescriptorStoreMax=` and the largest group of listeners are far below.
const FIRST_PASSED_MAX: u32 = 1 << 20;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::TcpListener;

    use super::*;

    fn inode(fd: BorrowedFd<'_>) -> u64 {
        use std::os::unix::fs::MetadataExt;
        File::from(fd.try_clone_to_owned().unwrap()).metadata().unwrap().ino()
    }

    #[test]
    fn six_hundred_descriptors_arrive_in_order_and_close_on_exec() {
        let listeners: Vec<TcpListener> = (0..600).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let (ours, theirs) = pair().unwrap();
        let borrowed: Vec<BorrowedFd<'_>> = listeners.iter().map(AsFd::as_fd).collect();
        for (number, batch) in borrowed.chunks(BATCH_MAX).enumerate() {
            send(ours.as_fd(), format!("batch {number}").as_bytes(), batch).unwrap();
        }
        drop(ours);
        let (mut received, mut buffer, mut batches) = (Vec::new(), [0; 64], 0);
        loop {
            let (length, descriptors) = receive(theirs.as_fd(), &mut buffer).unwrap();
            if length == 0 {
                break;
            }
            assert_eq!(&buffer[..length], format!("batch {batches}").as_bytes());
            batches += 1;
            received.extend(descriptors);
        }
        assert_eq!((batches, received.len()), (3, 600));
        for (sent, got) in listeners.iter().zip(&received) {
            assert_eq!(inode(sent.as_fd()), inode(got.as_fd()));
            // SAFETY: takes no memory.
            assert_eq!(unsafe { libc::fcntl(got.as_raw_fd(), libc::F_GETFD) } & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
            assert!(listens(got.as_fd()));
        }
    }

    #[test]
    fn more_than_a_batch_in_one_message_is_refused() {
        let (ours, _theirs) = pair().unwrap();
        let many = vec![ours.as_fd(); BATCH_MAX + 1];
        assert_eq!(send(ours.as_fd(), b"x", &many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_message_that_does_not_fit_is_an_error_and_leaks_nothing() {
        let (ours, theirs) = pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        send(ours.as_fd(), b"a long message", &[writer.as_fd()]).unwrap();
        assert!(receive(theirs.as_fd(), &mut [0; 4]).is_err());
        drop(writer);
        assert_eq!(io::read_to_string(reader).unwrap(), "", "no writer is left");
    }

    #[test]
    fn the_other_end_of_a_pair_is_known_and_other_things_have_none() {
        let (ours, _theirs) = pair().unwrap();
        assert_eq!(peer_process(ours.as_fd()), Some(std::process::id()));
        assert_eq!(peer_process(File::open("/dev/null").unwrap().as_fd()), None);
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(peer_process(tcp.as_fd()), None);
        assert!(listens(tcp.as_fd()));
        assert!(!listens(ours.as_fd()));
    }
}
