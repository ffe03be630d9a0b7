//! The table as an extended BPF program per group, with what changes in memory that the programs share with us.
//!
//! A change of the table is a few stores and no system call, and the programs look at the heartbeats of the slots by
//! themselves. The price is that CAP_BPF and CAP_NET_ADMIN are needed to load them.
//!
//! **A change is atomic for the programs.** There are two lists of entries. The one that is not in force is written,
//! then one store to the header, with release ordering, puts it in force: where it begins and how many entries it has. A
//! program loads the header once, and its one load of an entry depends on what it found there, so it sees the list as it
//! was written before. What remains is a program that was held up between the two loads for the time of two changes; it
//! reads an entry of the list that is about to be in force. An entry is one word and thus whole; the lists have room for
//! all slots and are filled to the end with repetitions, so an old length leads to no left-over entry; and to be early
//! by one change is no more than to have come a moment later. So there is nothing to retry and nobody waits.

mod alias;
mod assembler;
mod program;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::{Draw, Members, SLOTS_MAX, STALE_AFTER, Share};
use crate::sys::bpf::{self, SharedWords, SocketArray};
#[cfg(test)]
pub(super) use alias::{choose, entries};

/// How long to wait for a program that has been detached to let go of its listeners; usually a few milliseconds.
const RELEASE_MAX: Duration = Duration::from_millis(200);

/// Programs and maps, loaded and not yet attached.
pub(super) struct Extended {
    slots: u16,
    table: SharedWords,
    groups: Vec<Group>,
}

struct Group {
    sockets: SocketArray,
    program: OwnedFd,
}

impl Extended {
    /// Makes the maps and loads a program for each group. What is attached to the groups stays in force.
    pub(super) fn load(draw: Draw, slots: u16, groups: &mut [Members<'_>], heartbeats: &OwnedFd) -> io::Result<Self> {
        let (map, table) = bpf::shared_words(program::ENTRIES + 2 * u32::from(slots), 1)?;
        table[program::STALE_AFTER as usize].store(STALE_AFTER.as_nanos() as u64, Ordering::Relaxed);
        let load = |group: &mut Members<'_>| {
            let sockets = socket_array(group)?;
            let plan = program::Plan {
                draw,
                table: map.as_raw_fd(),
                heartbeats: heartbeats.as_raw_fd(),
                sockets: sockets.as_fd().as_raw_fd(),
            };
            Ok(Group { program: bpf::load_reuseport(&program::program(&plan))?, sockets })
        };
        let groups: io::Result<_> = groups.iter_mut().map(load).collect();
        Ok(Self { slots, table, groups: groups? })
    }

    /// Puts the shares (not empty, each slot once and below `slots`) in force in every group that has our program.
    pub(super) fn store(&self, shares: &[Share]) {
        let entries = alias::entries(shares);
        let in_force = self.table[program::HEADER as usize].load(Ordering::Relaxed) >> 32;
        let base = if in_force == 0 { usize::from(self.slots) } else { 0 };
        let list = &self.table[program::ENTRIES as usize + base..][..usize::from(self.slots)];
        for (place, entry) in list.iter().zip(entries.iter().cycle()) {
            place.store(*entry, Ordering::Relaxed);
        }
        self.table[program::HEADER as usize].store((base as u64) << 32 | entries.len() as u64, Ordering::Release);
    }

    /// Gives each group its program. `listeners` has one of each group, in their order.
    pub(super) fn attach(&self, listeners: &[OwnedFd]) -> io::Result<()> {
        debug_assert_eq!(listeners.len(), self.groups.len());
        listeners
            .iter()
            .zip(&self.groups)
            .try_for_each(|(listener, group)| bpf::attach_reuseport(listener.as_fd(), group.program.as_fd()))
    }

    pub(super) fn set_stale_after(&self, limit: Duration) {
        let nanoseconds = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX).min(i64::MAX as u64);
        self.table[program::STALE_AFTER as usize].store(nanoseconds, Ordering::Relaxed);
    }

    /// The arrays of listeners, in the order of the groups.
    pub(super) fn socket_arrays(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.groups.iter().map(|group| group.sockets.as_fd())
    }
}

/// The group's listeners in an array, each at its slot: in the one that came with them, or in a new one.
///
/// A socket can be in one array only, and the kernel knows no way to take it out but by closing the socket or the array.
/// So a process that takes listeners over needs the array of the one before, too. If that one has gone without passing
/// it on, the array lives on for as long as its program is attached to the group: it is detached, and tried again.
fn socket_array(group: &mut Members<'_>) -> io::Result<SocketArray> {
    let entries = u32::from(SLOTS_MAX);
    let inherited = group.sockets.take().map(|fd| SocketArray::inherited(fd, entries)).transpose()?;
    let is_new = inherited.is_none();
    let array = inherited.map_or_else(|| SocketArray::new(entries), Ok)?;
    let Err(error) = fill(&array, group.listeners) else { return Ok(array) };
    if !is_new || error.raw_os_error() != Some(libc::EBUSY) {
        return Err(error);
    }
    // That there is none to detach is what follows from the next attempts.
    let _ = bpf::detach_reuseport(group.listeners[0].as_fd());
    let deadline = Instant::now() + RELEASE_MAX;
    loop {
        match fill(&array, group.listeners) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                // Maps are freed by a worker of the kernel's after a grace period: there is no event to wait for.
                thread::sleep(Duration::from_millis(2));
            }
            outcome => return outcome.map(|()| array),
        }
    }
}

/// Puts each listener into its place, unless it is there already.
fn fill(array: &SocketArray, listeners: &[OwnedFd]) -> io::Result<()> {
    for (place, listener) in (0..).zip(listeners) {
        if array.get(place)? != Some(bpf::cookie(listener.as_fd())?) {
            array.put(place, listener.as_fd())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::heartbeats::Heartbeats;

    #[test]
    fn after_two_changes_no_place_that_a_late_program_could_read_holds_a_slot_of_before() {
        let Ok((_heartbeats, map)) = Heartbeats::in_map(5) else { return eprintln!("skipped: bpf(2) is refused") };
        let mut no_listeners = [Members { listeners: &[], sockets: None }];
        let extended = Extended::load(Draw::Random, 5, &mut no_listeners, &map).unwrap();
        let slots = |slots: &[u16]| slots.iter().map(|slot| Share { slot: *slot, weight: 1 }).collect::<Vec<_>>();
        let in_force = || {
            let header = extended.table[program::HEADER as usize].load(Ordering::Relaxed);
            let first = program::ENTRIES as usize + (header >> 32) as usize;
            let entries = extended.table[first..][..header as u32 as usize].iter();
            entries.map(|entry| entry.load(Ordering::Relaxed) as u16).collect::<Vec<_>>()
        };
        for set in [&[0, 1, 2, 3, 4][..], &[4], &[2, 3]] {
            extended.store(&slots(set));
            assert_eq!(in_force(), set);
        }
        for place in &extended.table[program::ENTRIES as usize..] {
            let entry = place.load(Ordering::Relaxed);
            assert!([2, 3, 4].contains(&(entry as u16)) && [2, 3, 4].contains(&((entry >> 16) as u16)), "{entry:#x}");
        }
        // A third change does not touch what is in force until its last store.
        extended.store(&slots(&[0]));
        assert_eq!(in_force(), [0]);
    }
}
