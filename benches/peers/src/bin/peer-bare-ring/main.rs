//! **The limit, not a server.** A bare io_uring loop that answers every request head with the same canned bytes,
//! whatever the head says. It has no HTTP parser, no limits, no timeouts and no errors worth the name; it shows
//! what the kernel's part of a request costs and so how far any server on this ring could get.
//!
//! `SINGLE_ISSUER | DEFER_TASKRUN`, multishot receives into a provided-buffer ring, sends as SQEs, and a
//! readiness poll with `accept4` for the listener. The first head of a connection decides whether the
//! connection is kept; a later `Connection: close` is not seen.

mod answers;
mod buffers;
mod heads;
mod ring;

use std::io;
use std::net::TcpListener;

use clap::Parser;
use ringleader_peers::{PeerOptions, listen, run};
use rustix::net::{SocketFlags, accept_with, sockopt};

use crate::answers::AnswerClock;
use crate::buffers::Buffers;
use crate::ring::{Completion, Connection, Operation, Ring};

fn main() {
    run(PeerOptions::parse(), |options, _cpu| {
        let mut ring = Ring::new()?;
        let server = Server {
            buffers: Buffers::register(&ring.submitter())?,
            listener: listen(options.listen)?,
            connections: Vec::new(),
            free: Vec::new(),
            clock: AnswerClock::new(),
        };
        // Operations in flight point into the ring's and the connections' memory. The loop ends only
        // by an error that ends the process, so the memory is leaked instead of freed under the kernel.
        let server = Box::leak(Box::new(server));
        ring.poll_readable(&server.listener)?;
        serve(Box::leak(Box::new(ring)), server)
    })
}

struct Server {
    buffers: Buffers,
    listener: TcpListener,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    clock: AnswerClock,
}

fn serve(ring: &mut Ring, server: &mut Server) -> io::Result<()> {
    let mut completions = Vec::new();
    loop {
        ring.wait(&mut completions)?;
        server.clock.tick();
        for completion in completions.drain(..) {
            match completion.operation {
                Operation::Listen => server.accept(ring)?,
                Operation::Receive(index) => server.received(ring, index, &completion)?,
                Operation::Send(index) => server.sent(ring, index, &completion)?,
            }
        }
    }
}

/// Connections accepted per readiness; the poll is level-triggered, so the rest is not lost.
const ACCEPT_BATCH: usize = 64;

impl Server {
    fn accept(&mut self, ring: &mut Ring) -> io::Result<()> {
        for _ in 0..ACCEPT_BATCH {
            // Not O_NONBLOCK: on such a socket io_uring answers EAGAIN instead of waiting.
            match accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Ok(socket) => {
                    sockopt::set_tcp_nodelay(&socket, true)?;
                    let index = self.free.pop().unwrap_or_else(|| {
                        self.connections.push(None);
                        self.connections.len() - 1
                    });
                    let connection = self.connections[index].insert(Connection::new(socket));
                    ring.receive(index, connection)?;
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
        ring.poll_readable(&self.listener)
    }

    fn received(&mut self, ring: &mut Ring, index: usize, done: &Completion) -> io::Result<()> {
        let connection = connection(&mut self.connections, index);
        connection.receiving = done.more;
        if let (Some(id), Ok(length)) = (done.buffer, usize::try_from(done.result)) {
            self.buffers.with(id, length, |bytes| connection.read(bytes));
        }
        let out_of_buffers = done.result == -libc::ENOBUFS;
        if done.result <= 0 && !out_of_buffers {
            connection.ended = true;
        } else if !done.more && !connection.ended {
            ring.receive(index, connection)?;
        }
        self.go_on(ring, index)
    }

    fn sent(&mut self, ring: &mut Ring, index: usize, done: &Completion) -> io::Result<()> {
        let connection = connection(&mut self.connections, index);
        // With MSG_WAITALL a short send means that the peer is gone.
        connection.sent(usize::try_from(done.result).ok());
        self.go_on(ring, index)
    }

    /// Sends what is owed, or ends the connection when nothing is left to do and in flight.
    fn go_on(&mut self, ring: &mut Ring, index: usize) -> io::Result<()> {
        let connection = connection(&mut self.connections, index);
        if !connection.ended && connection.owes() {
            ring.send(index, connection, self.clock.answers())?;
        }
        if connection.ended && connection.receiving {
            // Ends the multishot receive; its last completion comes back here.
            connection.shut_down();
        }
        if connection.ended && connection.is_quiet() {
            self.connections[index] = None;
            self.free.push(index);
        }
        Ok(())
    }
}

fn connection(connections: &mut [Option<Connection>], index: usize) -> &mut Connection {
    let slot = connections.get_mut(index).and_then(Option::as_mut);
    slot.expect("a slot is emptied only when no operation of it is in flight")
}
