//! Rescue: the connections that wait in the queues of slots that cannot accept, or have no room, are accepted here and
//! handed to executors that can. Nothing is served here, and nothing is taken that an executor would accept itself.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::executor::accept::Listener;
use crate::executor::inbox::Handed;
use crate::executor::reserve;
use crate::executor::slot::SlotSeat;
use crate::sys::socket::{self, AcceptFailure};

/// Connections taken from one listener before the supervisor looks at its messages again.
const BATCH_MAX: usize = 256;

/// The slots whose queues are to be emptied.
#[derive(Default)]
pub(super) struct Rescue {
    slots: BTreeSet<u16>,
    listeners: Vec<Arc<Vec<Listener>>>,
    /// The last try ended because no executor had room, or descriptors ran out: waiting for readiness would spin.
    blocked: bool,
    /// The system has refused to accept, and that has been said.
    refused: bool,
    rescued: u64,
}

impl Rescue {
    /// Empties the queues of these slots from now on, and of no others. Whether there are any.
    pub(super) fn set(&mut self, slots: impl IntoIterator<Item = u16>, seats: &[Arc<SlotSeat>]) -> bool {
        self.slots = slots.into_iter().collect();
        self.blocked = false;
        self.listeners = self.seats(seats).filter_map(|seat| seat.listeners()).collect();
        !self.slots.is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether the last try left connections behind for want of room: to be tried again by the clock.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// What to wait for.
    pub(super) fn listeners(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let waiting = if self.blocked { &[] } else { self.listeners.as_slice() };
        waiting.iter().flat_map(|listeners| listeners.iter()).map(|listener| listener.fd.as_fd())
    }

    fn seats<'a>(&'a self, seats: &'a [Arc<SlotSeat>]) -> impl Iterator<Item = &'a Arc<SlotSeat>> {
        self.slots.iter().filter_map(|slot| seats.get(usize::from(*slot)))
    }

    /// Takes what waits and hands it to `live`, each time to the one with the fewest connections. Returns how many
    /// were handed over.
    pub(super) fn run(&mut self, seats: &[Arc<SlotSeat>], live: &[u16]) -> u64 {
        let mut receivers = Receivers::new(seats, live);
        self.blocked = false;
        let mut count = 0;
        for seat in self.seats(seats) {
            // What was handed to it before it failed, first: it has waited longest.
            while receivers.has_room() {
                let Some(handed) = seat.inbox.next_handed() else { break };
                receivers.hand(handed);
                count += 1;
            }
        }
        for listener in self.listeners.iter().flat_map(|listeners| listeners.iter()) {
            match empty(listener, &mut receivers) {
                Ok(taken) => count += taken,
                Err(Blocked::NoRoom) => self.blocked = true,
                Err(Blocked::Refused(error)) => {
                    if !std::mem::replace(&mut self.refused, true) {
                        let listener = &listener.name;
                        tracing::warn!(%listener, %error, "connections that are to be rescued cannot be accepted yet");
                    }
                    self.blocked = true;
                }
            }
        }
        self.refused &= self.blocked;
        self.rescued += count;
        count
    }

    /// All that were ever handed over.
    pub(super) fn rescued(&self) -> u64 {
        self.rescued
    }
}

/// Why connections stay where they wait.
enum Blocked {
    /// No executor has room.
    NoRoom,
    /// Descriptors or memory have run out.
    Refused(io::Error),
}

fn empty(listener: &Listener, receivers: &mut Receivers<'_>) -> Result<u64, Blocked> {
    let mut taken = 0;
    if reserve::is_scarce() && !reserve::relieve() {
        // What waits had better wait than be closed.
        return Err(Blocked::NoRoom);
    }
    for _ in 0..BATCH_MAX {
        if !receivers.has_room() {
            return Err(Blocked::NoRoom);
        }
        match socket::accept(listener.fd.as_fd()) {
            // Its number may be a reserve that an executor has just let go of, to close another connection with.
            Ok((fd, _)) if reserve::is_scarce() => {
                drop(fd);
                tracing::warn!(listener = %listener.name, "descriptors ran out: a connection was closed, not rescued");
                return Err(Blocked::NoRoom);
            }
            Ok((fd, peer)) => {
                receivers.hand(Handed { fd, peer, listener: Arc::clone(&listener.name) });
                taken += 1;
            }
            Err(error) => match socket::classify_accept(&error) {
                AcceptFailure::Empty => break,
                AcceptFailure::Connection => {}
                AcceptFailure::Resources | AcceptFailure::Fatal => return Err(Blocked::Refused(error)),
            },
        }
    }
    Ok(taken)
}

/// The executors that connections can be handed to, with the number each has.
struct Receivers<'a> {
    live: Vec<(u64, &'a SlotSeat)>,
}

impl<'a> Receivers<'a> {
    fn new(seats: &'a [Arc<SlotSeat>], live: &[u16]) -> Self {
        let seat = |slot: &u16| seats.get(usize::from(*slot)).map(Arc::as_ref);
        let load = |seat: &'a SlotSeat| (seat.cells.open.get() + seat.inbox.handed() as u64, seat);
        Self { live: live.iter().filter_map(seat).map(load).collect() }
    }

    fn best(&mut self) -> Option<&mut (u64, &'a SlotSeat)> {
        self.live.iter_mut().min_by_key(|(count, _)| *count)
    }

    fn has_room(&mut self) -> bool {
        self.best().is_some_and(|(count, seat)| *count < seat.settings.connections_max)
    }

    fn hand(&mut self, connection: Handed) {
        if let Some((count, seat)) = self.best() {
            *count += 1;
            seat.inbox.hand(connection);
        }
    }
}
