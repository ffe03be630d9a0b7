//! The listening socket every rival uses.

use std::io;
use std::net::{SocketAddr, TcpListener};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen as start, socket_with};
use rustix::net::{ipproto, sockopt};

/// Asked of `listen(2)`; the kernel lowers it to `net.core.somaxconn`. Ringleader's default.
pub const BACKLOG: i32 = 4096;

/// A non-blocking listener of its own in the address's reuseport group.
///
/// # Errors
/// If the address cannot be bound.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    bind(&socket, &address).map_err(|error| io::Error::new(error.kind(), format!("bind {address}: {error}")))?;
    start(&socket, BACKLOG)?;
    Ok(socket.into())
}
