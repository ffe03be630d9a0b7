//! Handing over to a new binary: the old process starts it and gives it the listeners ([`successor`]), the new one takes
//! them and proves ready ([`inherited`]).
//!
//! The two are connected by a pair of Unix sockets, whose one end is the new process's standard input. An environment
//! variable says so, and the kernel's word for who made the pair confirms it: a grandchild that only inherited the
//! variable is not fooled. Messages are text ([`message`]); listeners travel beside them.
//!
//! Not here: when an upgrade may begin and how long it may take (the supervisor's policy), and what the old process does
//! once the new one is ready (drain).

pub mod inherited;
mod message;
pub mod successor;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

/// Names the process that has handed over its listeners on standard input.
const VARIABLE: &str = "RINGLEADER_SUCCESSOR_OF";

/// The listeners of one address, in the order of the reuseport group that they form in the kernel.
#[derive(Debug)]
pub struct Group {
    /// As it is bound.
    pub address: SocketAddr,
    pub listeners: Vec<OwnedFd>,
    /// So many of the first were given by the service manager, which holds them, too. If there are any, the address is
    /// served whether it is asked for or not.
    pub activated: usize,
    /// The array that the steering program selects from, if it is an extended one.
    pub sockets: Option<OwnedFd>,
}
