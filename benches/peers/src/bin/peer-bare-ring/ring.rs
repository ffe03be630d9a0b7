//! The ring itself, and what a connection must keep while operations on it are in flight.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use io_uring::{IoUring, Submitter, cqueue, opcode, squeue, types::Fd};
use rustix::net::Shutdown;

use crate::answers::{Answers, COPIES_MAX};
use crate::buffers::GROUP;
use crate::heads::{HeadCounter, asks_for_close};

const SUBMISSIONS: u32 = 1024;
const COMPLETIONS: u32 = 8192;

/// What an operation was for; it travels in the completion's user data.
#[derive(Debug, Clone, Copy)]
pub enum Operation {
    Listen,
    Receive(usize),
    Send(usize),
}

impl Operation {
    fn encode(self) -> u64 {
        match self {
            Self::Listen => 0,
            Self::Receive(index) => (index as u64) << 2 | 1,
            Self::Send(index) => (index as u64) << 2 | 2,
        }
    }

    fn decode(data: u64) -> Self {
        let index = (data >> 2) as usize;
        match data & 3 {
            0 => Self::Listen,
            1 => Self::Receive(index),
            _ => Self::Send(index),
        }
    }
}

/// A completion, copied out of the queue.
#[derive(Debug)]
pub struct Completion {
    pub operation: Operation,
    /// Bytes, or an error number below zero.
    pub result: i32,
    /// A multishot operation goes on.
    pub more: bool,
    /// The provided buffer that was filled.
    pub buffer: Option<u16>,
}

/// One connection and the operations it has in flight.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    heads: HeadCounter,
    /// Heads read and not yet answered.
    owed: usize,
    /// What is being sent: its bytes may not be freed before the completion.
    sending: Option<(Rc<Answers>, usize)>,
    /// Whether the first head asked for a close; unknown before it.
    close: Option<bool>,
    /// A receive is armed.
    pub receiving: bool,
    /// The peer is gone, or everything was said.
    pub ended: bool,
}

impl Connection {
    pub fn new(socket: OwnedFd) -> Self {
        let heads = HeadCounter::default();
        Self { socket, heads, owed: 0, sending: None, close: None, receiving: false, ended: false }
    }

    pub fn read(&mut self, bytes: &[u8]) {
        self.close.get_or_insert_with(|| asks_for_close(bytes));
        self.owed += self.heads.feed(bytes);
    }

    /// `length` is `None` if the send failed.
    pub fn sent(&mut self, length: Option<usize>) {
        let sending = self.sending.take().map(|(_, length)| length);
        self.ended |= sending != length || self.close == Some(true);
    }

    /// Whether there is something to send and nothing in the way of it.
    pub fn owes(&self) -> bool {
        self.owed > 0 && self.sending.is_none()
    }

    pub fn is_quiet(&self) -> bool {
        !self.receiving && self.sending.is_none()
    }

    pub fn shut_down(&self) {
        // It fails on a connection the peer has reset, which is what is wanted anyway.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

/// An io_uring of one thread.
pub struct Ring(IoUring);

impl Ring {
    pub fn new() -> io::Result<Self> {
        let ring =
            IoUring::builder().setup_single_issuer().setup_defer_taskrun().setup_cqsize(COMPLETIONS).build(SUBMISSIONS);
        ring.map(Self)
            .map_err(|error| io::Error::new(error.kind(), format!("io_uring_setup (Linux 6.1 or later): {error}")))
    }

    pub fn submitter(&self) -> Submitter<'_> {
        self.0.submitter()
    }

    /// Submits what was prepared, waits for at least one completion and takes all there are.
    pub fn wait(&mut self, completions: &mut Vec<Completion>) -> io::Result<()> {
        match self.0.submit_and_wait(1) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        completions.extend(self.0.completion().map(|entry| Completion {
            operation: Operation::decode(entry.user_data()),
            result: entry.result(),
            more: cqueue::more(entry.flags()),
            buffer: cqueue::buffer_select(entry.flags()),
        }));
        Ok(())
    }

    pub fn poll_readable(&mut self, listener: &impl AsRawFd) -> io::Result<()> {
        let poll = opcode::PollAdd::new(Fd(listener.as_raw_fd()), libc::POLLIN as u32).build();
        // SAFETY: a poll refers to no memory of ours.
        unsafe { self.push(poll, Operation::Listen) }
    }

    pub fn receive(&mut self, index: usize, connection: &mut Connection) -> io::Result<()> {
        let receive = opcode::RecvMulti::new(Fd(connection.socket.as_raw_fd()), GROUP).build();
        connection.receiving = true;
        // SAFETY: it writes to buffers of the registered group only, which are never freed.
        unsafe { self.push(receive, Operation::Receive(index)) }
    }

    /// Sends as many answers as are owed, up to [`COPIES_MAX`].
    pub fn send(&mut self, index: usize, connection: &mut Connection, answers: &Rc<Answers>) -> io::Result<()> {
        assert!(connection.sending.is_none(), "sends of one connection must not overtake another");
        let copies = connection.owed.min(COPIES_MAX);
        let last = connection.close == Some(true);
        let bytes = if last { answers.close() } else { answers.keep_alive(copies) };
        connection.owed -= copies;
        connection.sending = Some((Rc::clone(answers), bytes.len()));
        let send = opcode::Send::new(Fd(connection.socket.as_raw_fd()), bytes.as_ptr(), bytes.len() as u32)
            .flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL)
            .build();
        // SAFETY: the bytes belong to `answers`, whose vectors never change, and the connection holds
        // `answers` until this send's completion; a connection is dropped only when it is quiet.
        unsafe { self.push(send, Operation::Send(index)) }
    }

    /// # Safety
    /// Memory that the entry refers to must stay valid until the operation's last completion.
    unsafe fn push(&mut self, entry: squeue::Entry, operation: Operation) -> io::Result<()> {
        let entry = entry.user_data(operation.encode());
        loop {
            // SAFETY: the caller's promise; a failed push leaves nothing behind.
            if unsafe { self.0.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.0.submit()?;
        }
    }
}
