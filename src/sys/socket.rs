//! TCP sockets by system call: accepting, sending, receiving, options and queue depths.
//!
//! Nothing here blocks: every descriptor is non-blocking or the call says `MSG_DONTWAIT`, and an
//! interrupted call is repeated. Errors are the system's own; [`classify_accept`] says what an error
//! of `accept` means for the loop around it. Opening listeners is the work of `sys::bind`.

use std::ffi::CString;
use std::io;
use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// What an error of [`accept`] means for the loop that accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcceptFailure {
    /// The queue is empty: wait until the listener is readable.
    Empty,
    /// Only this connection is lost (the peer gave up, or the network reported through it): go on.
    Connection,
    /// Descriptors or memory ran out; the connection is still queued. Back off, or the loop spins.
    Resources,
    /// The listener itself is unusable: a defect of ours.
    Fatal,
}

/// Sorts an error of [`accept`] by what the accepting loop should do, after accept(2).
pub fn classify_accept(error: &io::Error) -> AcceptFailure {
    match error.raw_os_error() {
        // EINVAL: it has been shut down, so that nothing will come any more.
        Some(libc::EAGAIN | libc::EINVAL) => AcceptFailure::Empty,
        // Pending network errors are passed on by accept(2) on Linux. EPERM is a firewall's answer.
        Some(
            libc::ECONNABORTED
            | libc::ECONNRESET
            | libc::EPROTO
            | libc::ENOPROTOOPT
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENONET
            | libc::EOPNOTSUPP
            | libc::ETIMEDOUT
            | libc::EPERM
            | libc::EINTR,
        ) => AcceptFailure::Connection,
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => AcceptFailure::Resources,
        _ => AcceptFailure::Fatal,
    }
}

/// Takes one connection from the queue: non-blocking, close-on-exec. `WouldBlock` when it is empty.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, SocketAddr)> {
    let mut storage = Storage::empty();
    let fd = retry(|| {
        storage.length = Storage::CAPACITY;
        // SAFETY: `storage` owns the memory and `length` is its size, so the kernel writes within it.
        unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                storage.as_mut_ptr(),
                &raw mut storage.length,
                libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            ) as isize
        }
    })?;
    // SAFETY: accept4 succeeded, so this number is an open descriptor that nothing else owns yet.
    let socket = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    Ok((socket, storage.to_address()?))
}

/// The address a socket is bound to.
pub fn local_addr(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let mut storage = Storage::empty();
    // SAFETY: `storage` owns the memory and `length` is its size, so the kernel writes within it.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), storage.as_mut_ptr(), &raw mut storage.length) })?;
    storage.to_address()
}

/// Sends what fits into the socket's buffer now; bytes accepted. Never raises SIGPIPE.
pub fn send(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: pointer and length are those of a live slice, which the kernel only reads.
    let sent = retry(|| unsafe {
        libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    })?;
    Ok(sent as usize)
}

/// [`send`] of what more is to follow at once: the kernel keeps it, for 200 ms at most, to go out together with that.
pub fn send_ahead(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT | libc::MSG_MORE;
    // SAFETY: pointer and length are those of a live slice, which the kernel only reads.
    let sent = retry(|| unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) })?;
    Ok(sent as usize)
}

/// sendfile(2): sends what fits of `length` bytes of `file` at `position`; 0 when the file ends there. The socket does
/// not block, since it was accepted so; the file does, for what is not in memory. Unlike [`send`] it raises SIGPIPE, see
/// [`block_sigpipe`].
pub fn send_file(fd: BorrowedFd<'_>, file: BorrowedFd<'_>, position: u64, length: usize) -> io::Result<usize> {
    let start = libc::off64_t::try_from(position).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    let sent = retry(|| {
        let mut offset = start;
        // SAFETY: `offset` is live for the call, which writes to it; both descriptors are open while they are borrowed.
        unsafe { libc::sendfile64(fd.as_raw_fd(), file.as_raw_fd(), &raw mut offset, length) }
    })?;
    Ok(sent as usize)
}

/// Keeps SIGPIPE from this thread, and from the threads and processes that it starts; `false`: no longer. [`send_file`] raises it, on the calling thread, when
/// the peer has gone, and has no flag against that. Rust programs ignore the signal anyway; an embedder may not, and its
/// disposition is not ours to change.
pub fn block_sigpipe(block: bool) -> io::Result<()> {
    let how = if block { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    // SAFETY: a signal set is plain bits, for which all zeroes is a value; sigemptyset makes it one by the book.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `set` is live; these write to it, and pthread_sigmask reads it and wants no old mask.
    let result = unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGPIPE);
        libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut())
    };
    // It returns its error and leaves errno alone.
    if result != 0 { Err(io::Error::from_raw_os_error(result)) } else { Ok(()) }
}

/// The number of the network interface of that name, if there is one.
pub fn interface_number(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: `name` ends in NUL and is only read.
    let number = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (number > 0).then_some(number)
}

/// Whether this thread blocks SIGPIPE.
pub fn blocks_sigpipe() -> bool {
    // SAFETY: as in `block_sigpipe`.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `set` is live; the first call writes the thread's mask to it and sets none, the second reads it.
    unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut set);
        libc::sigismember(&raw const set, libc::SIGPIPE) == 1
    }
}

/// Receives what has arrived; 0 at the end of the stream (or for an empty buffer).
#[cfg(test)]
pub fn recv(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is live, exclusively borrowed, and the kernel writes at most its length.
    let received =
        retry(|| unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) })?;
    Ok(received as usize)
}

/// Sends a FIN; the peer reads the end of the stream and can still answer.
pub fn shutdown_write(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes no memory; the descriptor is open for as long as it is borrowed.
    check(unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_WR) })
}

/// Resets the connection now: what it has not sent yet is thrown away, and the peer is told at once.
pub fn reset(fd: BorrowedFd<'_>) -> io::Result<()> {
    // connect(2) to no address is how TCP is told to disconnect.
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: reads as many bytes as a live sockaddr has.
    check(unsafe { libc::connect(fd.as_raw_fd(), &raw const nowhere, size_of_val(&nowhere) as libc::socklen_t) })
}

/// Ends both directions of the socket with this number at once. Operations waiting on it, in a ring too, complete, and the
/// peer sees the end. Never for a listener: it would reset every connection in its queue.
///
/// By number, since the socket is another thread's: the caller sees to it that the number is still that socket's.
pub fn shutdown_number(number: RawFd) -> io::Result<()> {
    // SAFETY: takes no memory; a number that is no open socket is answered with an error.
    check(unsafe { libc::shutdown(number, libc::SHUT_RDWR) })
}

/// Ends a listener, whoever else holds it open: what waits in its queue is reset, and new clients are refused. `ENOTCONN`
/// when it has been.
pub fn shutdown_listener(listener: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes no memory; the descriptor is open for as long as it is borrowed.
    check(unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) })
}

/// Connections waiting in a listener's accept queue, and the most it holds (backlog).
///
/// Full is `waiting > backlog`: the kernel admits one more than asked for.
pub fn queue_depth(listener: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    // SAFETY: tcp_info is plain integers, for which all zeroes is a value.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut length = mem::size_of_val(&info) as libc::socklen_t;
    // SAFETY: `info` is live and `length` its size, so the kernel writes within it.
    check(unsafe {
        libc::getsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    })?;
    if u32::from(info.tcpi_state) != TCP_LISTEN {
        // For a connection the same fields count unacknowledged segments.
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "queue depth asked of a socket that does not listen"));
    }
    Ok((info.tcpi_unacked, info.tcpi_sacked))
}

/// Gives the reuseport group of this listener a classic BPF program that picks the member for each
/// new connection, replacing the one before. Needs no privilege.
///
/// `EINVAL`: the listener is in no group, or the program is malformed. `ENOMEM`: the program is
/// larger than `net.core.optmem_max`.
pub fn attach_reuseport_cbpf(listener: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a BPF program has at most 65,535 instructions"))?;
    let argument = libc::sock_fprog {
        len: length,
        // The kernel copies the instructions in and never writes to them.
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: `argument` describes a live slice of exactly `len` instructions, copied during the call;
    // what a program may do is verified by the kernel.
    check(unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const argument).cast(),
            mem::size_of_val(&argument) as libc::socklen_t,
        )
    })
}

/// Sets an option whose value is a C int.
pub(super) fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: libc::c_int) -> io::Result<()> {
    // SAFETY: `value` is live and its size is given; the kernel only reads it.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            mem::size_of_val(&value) as libc::socklen_t,
        )
    })
}

/// Opens a stream socket, non-blocking and close-on-exec, for the family of `addr`.
pub(super) fn stream_socket(addr: SocketAddr) -> io::Result<OwnedFd> {
    let family = if addr.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: takes no memory.
    let fd = unsafe { libc::socket(family, kind, 0) };
    check(fd)?;
    // SAFETY: socket succeeded, so this number is an open descriptor that nothing else owns yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// bind(2).
pub(super) fn bind(fd: BorrowedFd<'_>, addr: SocketAddr) -> io::Result<()> {
    let storage = Storage::from_address(addr);
    // SAFETY: `storage` is live and holds `length` bytes of a valid address, only read.
    check(unsafe { libc::bind(fd.as_raw_fd(), storage.as_ptr(), storage.length) })
}

/// listen(2). The kernel lowers `backlog` to `net.core.somaxconn` without a word.
pub(super) fn listen(fd: BorrowedFd<'_>, backlog: u32) -> io::Result<()> {
    let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
    // SAFETY: takes no memory.
    check(unsafe { libc::listen(fd.as_raw_fd(), backlog) })
}

/// `TCP_LISTEN` of the kernel's tcp_states.h, which libc does not have.
const TCP_LISTEN: u32 = 10;

/// An Internet socket address as the kernel writes it.
struct Storage {
    address: libc::sockaddr_storage,
    length: libc::socklen_t,
}

impl Storage {
    const CAPACITY: libc::socklen_t = mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;

    fn empty() -> Self {
        Self {
            // SAFETY: sockaddr_storage is plain bytes, for which all zeroes is a value (AF_UNSPEC).
            address: unsafe { mem::zeroed() },
            length: Self::CAPACITY,
        }
    }

    fn as_ptr(&self) -> *const libc::sockaddr {
        (&raw const self.address).cast()
    }

    fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        (&raw mut self.address).cast()
    }

    fn from_address(addr: SocketAddr) -> Self {
        let mut storage = Self::empty();
        match addr {
            SocketAddr::V4(addr) => {
                let raw = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: addr.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
                    sin_zero: [0; 8],
                };
                storage.length = mem::size_of_val(&raw) as libc::socklen_t;
                // SAFETY: sockaddr_storage is by definition large and aligned enough for each family.
                unsafe { storage.as_mut_ptr().cast::<libc::sockaddr_in>().write(raw) };
            }
            SocketAddr::V6(addr) => {
                let raw = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: addr.port().to_be(),
                    sin6_flowinfo: addr.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: addr.ip().octets() },
                    sin6_scope_id: addr.scope_id(),
                };
                storage.length = mem::size_of_val(&raw) as libc::socklen_t;
                // SAFETY: sockaddr_storage is by definition large and aligned enough for each family.
                unsafe { storage.as_mut_ptr().cast::<libc::sockaddr_in6>().write(raw) };
            }
        }
        storage
    }

    fn to_address(&self) -> io::Result<SocketAddr> {
        match i32::from(self.address.ss_family) {
            libc::AF_INET => {
                // SAFETY: the family says that the storage, which is aligned for it, holds this type.
                let raw = unsafe { self.as_ptr().cast::<libc::sockaddr_in>().read() };
                let ip = Ipv4Addr::from(raw.sin_addr.s_addr.to_ne_bytes());
                let port = u16::from_be(raw.sin_port);
                Ok(SocketAddrV4::new(ip, port).into())
            }
            libc::AF_INET6 => {
                // SAFETY: the family says that the storage, which is aligned for it, holds this type.
                let raw = unsafe { self.as_ptr().cast::<libc::sockaddr_in6>().read() };
                let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
                let port = u16::from_be(raw.sin6_port);
                Ok(SocketAddrV6::new(ip, port, raw.sin6_flowinfo, raw.sin6_scope_id).into())
            }
            family => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("expected an Internet address, the socket has address family {family}"),
            )),
        }
    }
}

/// `Ok` for 0 and more, the thread's errno for -1.
pub(super) fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Repeats a call for as long as a signal interrupts it.
pub(super) fn retry(mut call: impl FnMut() -> isize) -> io::Result<isize> {
    loop {
        let result = call();
        if result >= 0 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::sys::bind::{ListenOptions, bind_group};
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::*;
    use crate::sys::poll::wait_readable;

    fn pair() -> (TcpStream, OwnedFd) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        wait_readable(&[listener.as_fd()], Some(Duration::from_secs(5))).unwrap();
        let (server, peer) = accept(listener.as_fd()).unwrap();
        assert_eq!(peer, client.local_addr().unwrap());
        (client, server)
    }

    #[test]
    fn a_listener_that_is_shut_down_refuses_whoever_else_holds_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let another = listener.try_clone().unwrap();
        shutdown_listener(listener.as_fd()).unwrap();
        assert_eq!(TcpStream::connect(address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(classify_accept(&accept(another.as_fd()).unwrap_err()), AcceptFailure::Empty);
        assert_eq!(shutdown_listener(another.as_fd()).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    }

    #[test]
    fn accept_failures_are_sorted_by_what_to_do() {
        let of = |errno| classify_accept(&io::Error::from_raw_os_error(errno));
        for errno in [libc::EAGAIN, libc::EINVAL] {
            assert_eq!(of(errno), AcceptFailure::Empty);
        }
        for errno in [libc::ECONNABORTED, libc::EPROTO, libc::ENETDOWN, libc::EPERM] {
            assert_eq!(of(errno), AcceptFailure::Connection);
        }
        for errno in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM] {
            assert_eq!(of(errno), AcceptFailure::Resources);
        }
        for errno in [libc::EBADF, libc::ENOTSOCK, libc::EFAULT] {
            assert_eq!(of(errno), AcceptFailure::Fatal);
        }
        assert_eq!(classify_accept(&io::Error::other("not from the system")), AcceptFailure::Fatal);
    }

    #[test]
    fn accept_on_an_empty_queue_would_block_and_accepted_sockets_do_not_block() {
        let options = ListenOptions::default();
        let group = bind_group("127.0.0.1:0".parse().unwrap(), 1, &options).unwrap();
        let error = accept(group[0].as_fd()).unwrap_err();
        assert_eq!(classify_accept(&error), AcceptFailure::Empty);

        let (_client, server) = pair();
        // SAFETY: takes no memory.
        let (status, descriptor) =
            unsafe { (libc::fcntl(server.as_raw_fd(), libc::F_GETFL), libc::fcntl(server.as_raw_fd(), libc::F_GETFD)) };
        assert_ne!(status & libc::O_NONBLOCK, 0);
        assert_ne!(descriptor & libc::FD_CLOEXEC, 0);
    }

    #[test]
    fn bytes_pass_both_ways_and_a_shutdown_is_seen_as_the_end() {
        let (mut client, server) = pair();
        assert_eq!(send(server.as_fd(), b"one ").unwrap(), 4);
        assert_eq!(send(server.as_fd(), b"two three").unwrap(), 9);
        shutdown_write(server.as_fd()).unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one two three");

        let mut buffer = [0; 16];
        let error = recv(server.as_fd(), &mut buffer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        client.write_all(b"four").unwrap();
        wait_readable(&[server.as_fd()], Some(Duration::from_secs(5))).unwrap();
        assert_eq!(recv(server.as_fd(), &mut buffer).unwrap(), 4);
        shutdown_number(server.as_raw_fd()).unwrap();
        assert_eq!(recv(server.as_fd(), &mut buffer).unwrap(), 0);
    }

    /// Runs `work` with SIGPIPE blocked in this thread, where even an ignored signal stays visible;
    /// whether one was raised.
    fn raises_sigpipe(work: impl FnOnce()) -> bool {
        // SAFETY: signal sets are plain bits, live and exclusively borrowed; the mask is this thread's.
        unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigaddset(&raw mut set, libc::SIGPIPE);
            let mut before: libc::sigset_t = mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before);
            work();
            let mut pending: libc::sigset_t = mem::zeroed();
            libc::sigpending(&raw mut pending);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
            libc::sigismember(&raw const pending, libc::SIGPIPE) == 1
        }
    }

    #[test]
    fn sending_to_a_closed_peer_is_an_error_and_no_signal() {
        let (_client, server) = pair();
        shutdown_write(server.as_fd()).unwrap();
        let raised = raises_sigpipe(|| {
            let error = send(server.as_fd(), b"late").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        });
        assert!(!raised);
    }

    #[test]
    fn a_full_send_buffer_would_block() {
        let (_client, server) = pair();
        let bytes = vec![0; 1 << 20];
        let error = (0..1024).find_map(|_| send(server.as_fd(), &bytes).err()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn queue_depth_counts_what_nobody_has_accepted() {
        let options = ListenOptions { backlog: 7, ..ListenOptions::default() };
        let group = bind_group("127.0.0.1:0".parse().unwrap(), 1, &options).unwrap();
        let listener = group[0].as_fd();
        assert_eq!(queue_depth(listener).unwrap(), (0, 7));
        let addr = local_addr(listener).unwrap();
        let mut clients: Vec<_> = (0..3).map(|_| TcpStream::connect(addr).unwrap()).collect();
        // A byte that was acknowledged proves that the handshake before it is complete on both sides.
        for client in &mut clients {
            client.write_all(b"x").unwrap();
        }
        wait_readable(&[listener], Some(Duration::from_secs(5))).unwrap();
        let mut accepted = Vec::new();
        for left in (0..3).rev() {
            accepted.push(accept(listener).unwrap());
            assert_eq!(queue_depth(listener).unwrap(), (left, 7));
        }
        let error = queue_depth(accepted[0].0.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn addresses_survive_the_way_to_the_kernel_form_and_back() {
        for text in ["127.0.0.1:80", "255.1.2.3:65535", "[::1]:443", "[fe80::1%7]:1"] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(Storage::from_address(addr).to_address().unwrap(), addr);
        }
        assert!(Storage::empty().to_address().is_err());
    }
}
