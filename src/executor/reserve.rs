//! Descriptors held in reserve, to accept and close with when the process has no other left: clients then learn at once
//! that they are not served. What is done with a connection is not decided here.
//!
//! This is state of the process, shared by all executors of all its servers, because descriptor numbers are: one that is
//! let go of here can be the next that `accept4` returns on another thread, which would serve a connection with it, and
//! nobody could shed any more. So scarcity is declared *before* a reserve is let go of, and whoever accepts asks
//! [`is_scarce`] *after* `accept4` and gives back what it got. Only scarcity takes the lock; on the path of an ordinary
//! accept there is one load of a flag that hardly ever changes.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::sys::socket;

static PROCESS: Reserves = Reserves::new(spare);

/// An acceptor's claim that one descriptor be held in reserve. All claims together form one stock: an executor that hangs
/// keeps none for itself.
pub(super) struct Claim(());

impl Claim {
    pub(super) fn new() -> Self {
        PROCESS.claim();
        Self(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        PROCESS.disclaim();
    }
}

/// Whether descriptors have run out and a reserve may be in use. Asked after an accept that succeeded: the connection is
/// then to be closed, since its descriptor may be that reserve.
pub(crate) fn is_scarce() -> bool {
    PROCESS.is_scarce()
}

/// Ends scarcity if it is over: every reserve is back and one descriptor more is free. Whether it is.
pub(crate) fn relieve() -> bool {
    PROCESS.relieve()
}

/// Accepts one connection with a descriptor of the reserve, closes it, and takes the descriptor back.
///
/// # Errors
/// `accept4`'s. `EMFILE` although a reserve was let go of: another thread was quicker. One that accepts gives it back, and
/// the next call takes it back; otherwise it is missing until somebody closes something.
pub(super) fn shed(listener: BorrowedFd<'_>) -> io::Result<()> {
    PROCESS.shed(|| socket::accept(listener).map(drop))
}

struct Reserves {
    /// Set whenever a reserve is missing. Written under the lock only.
    scarce: AtomicBool,
    stock: Mutex<Stock>,
    open: fn() -> io::Result<OwnedFd>,
}

struct Stock {
    claims: usize,
    kept: Vec<OwnedFd>,
}

impl Reserves {
    const fn new(open: fn() -> io::Result<OwnedFd>) -> Self {
        let stock = Stock { claims: 0, kept: Vec::new() };
        Self { scarce: AtomicBool::new(false), stock: Mutex::new(stock), open }
    }

    fn is_scarce(&self) -> bool {
        self.scarce.load(Ordering::Acquire)
    }

    fn claim(&self) {
        let mut stock = self.lock();
        stock.claims += 1;
        if !self.fill(&mut stock) {
            self.scarce.store(true, Ordering::SeqCst);
        }
    }

    fn disclaim(&self) {
        let mut stock = self.lock();
        stock.claims -= 1;
        let claims = stock.claims;
        stock.kept.truncate(claims);
        if claims == 0 {
            self.scarce.store(false, Ordering::SeqCst);
        }
    }

    fn relieve(&self) -> bool {
        let mut stock = self.lock();
        if self.is_scarce() && self.fill(&mut stock) && (self.open)().is_ok() {
            self.scarce.store(false, Ordering::SeqCst);
        }
        !self.is_scarce()
    }

    fn shed(&self, accept_and_close: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut stock = self.lock();
        // Before the number is free for anybody to take. The kernel's lock around the descriptor table, which closing it
        // and getting it both take, orders this store before the other thread's load.
        self.scarce.store(true, Ordering::SeqCst);
        self.fill(&mut stock);
        drop(stock.kept.pop());
        let outcome = accept_and_close();
        self.fill(&mut stock);
        outcome
    }

    /// Opens reserves until there is one for each claim; whether there is.
    fn fill(&self, stock: &mut Stock) -> bool {
        while stock.kept.len() < stock.claims {
            let Ok(reserve) = (self.open)() else { return false };
            stock.kept.push(reserve);
        }
        true
    }

    /// Held for a few system calls that do not block. Nothing panics meanwhile.
    fn lock(&self) -> MutexGuard<'_, Stock> {
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A descriptor that costs nothing but its number.
fn spare() -> io::Result<OwnedFd> {
    File::open("/dev/null").map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// Descriptors that this thread may still open: a limit that no other test notices.
        static FREE: Cell<usize> = const { Cell::new(0) };
    }

    /// Takes one of the free ones. What is closed is not free again until the test says so.
    fn limited() -> io::Result<OwnedFd> {
        match FREE.get() {
            0 => Err(io::Error::from_raw_os_error(libc::EMFILE)),
            free => {
                FREE.set(free - 1);
                spare()
            }
        }
    }

    fn reserves(claims: usize) -> Reserves {
        let reserves = Reserves::new(limited);
        FREE.set(claims);
        (0..claims).for_each(|_| reserves.claim());
        assert!(!reserves.is_scarce());
        reserves
    }

    fn kept(reserves: &Reserves) -> usize {
        reserves.lock().kept.len()
    }

    /// Sheds one connection.
    fn shed(reserves: &Reserves) {
        reserves
            .shed(|| {
                assert!(reserves.is_scarce());
                FREE.set(FREE.get() + 1);
                Ok(())
            })
            .unwrap();
    }

    /// Another thread gets the reserve between its close and `accept4`.
    fn lose(reserves: &Reserves) {
        let error = reserves.shed(|| Err(io::Error::from_raw_os_error(libc::EMFILE))).unwrap_err();
        assert_eq!(socket::classify_accept(&error), socket::AcceptFailure::Resources);
    }

    #[test]
    fn scarcity_is_declared_before_a_reserve_is_let_go_of_and_ends_when_a_descriptor_is_free() {
        let reserves = reserves(1);
        shed(&reserves);
        assert_eq!(kept(&reserves), 1);
        assert!(!reserves.relieve(), "none is free but the reserve");
        FREE.set(1);
        assert!(reserves.relieve());
        assert!(!reserves.is_scarce());
    }

    #[test]
    fn scarcity_lasts_until_a_reserve_that_another_thread_took_is_given_back() {
        let reserves = reserves(1);
        lose(&reserves);
        lose(&reserves);
        assert_eq!(kept(&reserves), 0);
        assert!(!reserves.relieve() && reserves.is_scarce(), "who took it must still learn that it is to be returned");
        FREE.set(1);
        shed(&reserves);
        assert_eq!(kept(&reserves), 1);
    }

    #[test]
    fn when_one_is_lost_those_of_other_executors_are_there_to_shed_with() {
        let reserves = reserves(2);
        lose(&reserves);
        shed(&reserves);
        assert_eq!(kept(&reserves), 1);
        FREE.set(1);
        assert!(!reserves.relieve(), "it goes to the reserve, and then none is free");
        assert_eq!(kept(&reserves), 2);
    }

    #[test]
    fn the_last_claim_takes_every_reserve_and_the_scarcity_with_it() {
        let reserves = reserves(2);
        lose(&reserves);
        reserves.disclaim();
        assert_eq!(kept(&reserves), 1);
        assert!(reserves.is_scarce());
        reserves.disclaim();
        assert_eq!(kept(&reserves), 0);
        assert!(!reserves.is_scarce());
    }
}
