//! The open sockets of one executor, for the one who may have to break them off from outside: the supervisor, when the
//! executor hangs. Touched when a connection opens and when it closes, never on a request's way; only a hung executor's
//! is ever looked at by another thread.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use crate::sys::socket;

/// Which descriptors are sockets of this executor: one bit for each descriptor number.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    bits: Mutex<Vec<u64>>,
}

impl Registry {
    /// Ends both directions of every open socket; their clients see the end at once. Nothing is closed: descriptors
    /// belong to the executor, which may come back, and their numbers must not be given to anybody else until it has let
    /// go of them. How many there were.
    pub(crate) fn shut_down_all(&self) -> usize {
        // Held throughout: a socket that is being closed meanwhile waits, so that no number is reused under our feet.
        let bits = self.bits.lock().unwrap_or_else(PoisonError::into_inner);
        let numbers = bits.iter().enumerate().flat_map(|(word, bits)| {
            (0..u64::BITS).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word as i32 * 64 + bit as i32)
        });
        // One that has ended already answers ENOTCONN.
        numbers.map(|number| drop(socket::shutdown_number(number))).count()
    }

    fn set(&self, number: i32) {
        let (word, bit) = (number as usize / 64, number as usize % 64);
        let mut bits = self.bits.lock().unwrap_or_else(PoisonError::into_inner);
        if bits.len() <= word {
            bits.resize(word + 1, 0);
        }
        bits[word] |= 1 << bit;
    }
}

/// A socket that its executor's [`Registry`] knows, until it is closed.
pub(crate) struct Registered {
    fd: Option<OwnedFd>,
    registry: Arc<Registry>,
}

impl Registered {
    pub(crate) fn new(fd: OwnedFd, registry: &Arc<Registry>) -> Self {
        registry.set(fd.as_raw_fd());
        Self { fd: Some(fd), registry: Arc::clone(registry) }
    }
}

impl AsFd for Registered {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("taken by drop only").as_fd()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let Some(fd) = self.fd.take() else { return };
        let number = fd.as_raw_fd() as usize;
        let mut bits = self.registry.bits.lock().unwrap_or_else(PoisonError::into_inner);
        bits[number / 64] &= !(1 << (number % 64));
        // Closed before the lock is let go of.
        drop(fd);
        drop(bits);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn pair(listener: &TcpListener) -> (TcpStream, OwnedFd) {
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("a listener on loopback");
        (client, listener.accept().expect("one has connected").0.into())
    }

    #[test]
    fn the_sockets_that_are_open_and_no_others_are_shut_down() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let registry = Arc::new(Registry::default());
        let (mut open, closed, other) = (pair(&listener), pair(&listener), pair(&listener));
        let held = Registered::new(open.1, &registry);
        drop(Registered::new(closed.1, &registry));
        assert_eq!(registry.shut_down_all(), 1);
        assert_eq!(open.0.read(&mut [0]).expect("an orderly end"), 0);
        other.0.set_nonblocking(true).expect("a socket");
        assert_eq!((&other.0).read(&mut [0]).expect_err("nothing came").kind(), std::io::ErrorKind::WouldBlock);
        drop(held);
        assert_eq!(registry.shut_down_all(), 0);
    }
}
