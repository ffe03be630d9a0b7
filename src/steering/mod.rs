//! Steering: which slots new connections may go to, and the program in the kernel that realises it.
//!
//! The listeners of one address form a reuseport group, and a small BPF program picks the member for
//! every SYN. [`Table`] holds the set of active slots and attaches a new program when the set changes;
//! a [`Steering`] policy writes the program. Listeners are never closed, so a change loses nothing:
//! what is already in a queue, or half-open on its way into one, stays with its slot, and the
//! supervisor empties the queues of inactive slots.
//!
//! A policy is one file with one implementation of [`Steering`] and a row in [`by_name`].
//! [`random`] spreads best, [`hash`] keeps the retransmitted SYNs of a client on one slot.
//!
//! To come, each as one file: *eBPF*, a `BPF_PROG_TYPE_SK_REUSEPORT` program with its table in an
//! mmapable array map, so that a change of the table is a store to memory and the program passes over
//! slots with a stale heartbeat by itself. It needs CAP_BPF and CAP_NET_ADMIN when it is loaded, so
//! classic BPF stays as what works everywhere; `Table` then holds "how a set is put in force" behind
//! the same `set_active`. *Least-loaded*, weights from queue depth and utilisation: with classic BPF
//! a slot is repeated in the list a policy gets in proportion to its weight, with eBPF the weights are
//! in the map.
//!
//! Not here: deciding which slots are active. That is the supervisor's policy.

pub mod hash;
mod program;
pub mod random;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use libc::sock_filter;

use crate::sys::socket;

/// The most slots a table can have. The longest program for them has about half of the 4,096
/// instructions the kernel takes.
pub const SLOTS_MAX: u16 = 1024;

/// A way to choose among the active slots for each new connection.
pub trait Steering: Send {
    /// The policy's name in options and output.
    fn name(&self) -> &'static str;

    /// The program that picks one of `active`: ascending, each once, all below `slots`, which is at
    /// most [`SLOTS_MAX`]. `None` if there is none to pick from.
    fn program(&self, active: &[u16], slots: u16) -> Option<Vec<sock_filter>>;
}

/// The policy of that name. `seed` makes choices that clients could predict differ between processes.
pub fn by_name(name: &str, seed: u32) -> Option<Box<dyn Steering>> {
    let policies: [Box<dyn Steering>; 2] = [Box::new(random::Random), Box::new(hash::Hash::new(seed))];
    policies.into_iter().find(|policy| policy.name() == name)
}

/// The slots that take new connections, put in force in the reuseport group of each address.
pub struct Table {
    policy: Box<dyn Steering>,
    slots: u16,
    /// One member of each group; the program belongs to the group.
    groups: Vec<OwnedFd>,
    /// What every group's program realises. `None` before the first and after a failure half-way.
    in_force: Option<Vec<u16>>,
}

impl Table {
    /// A table of `slots` slots over groups of as many listeners each, given by a duplicate of one
    /// listener per address. Nothing is attached yet: the kernel spreads over all slots by a hash.
    pub fn new(policy: Box<dyn Steering>, slots: u16, groups: Vec<OwnedFd>) -> Self {
        debug_assert!((1..=SLOTS_MAX).contains(&slots), "{slots} slots");
        Self { policy, slots, groups, in_force: None }
    }

    /// The policy's name.
    #[cfg(test)]
    pub fn policy(&self) -> &'static str {
        self.policy.name()
    }

    /// The slots that the programs in force choose from, ascending; `None` if that is not known.
    #[cfg(test)]
    pub fn in_force(&self) -> Option<&[u16]> {
        self.in_force.as_deref()
    }

    /// Forgets what is in force: another process may have replaced it.
    pub fn forget(&mut self) {
        self.in_force = None;
    }

    /// Steers new connections to these slots from the next SYN on, in any order. Cheap if nothing
    /// changes.
    ///
    /// With none active the programs stay as they are, because the kernel has to put connections
    /// somewhere and the supervisor empties the queues of inactive slots anyway. After an error some
    /// groups may have the new program already; the next call attaches to all again.
    pub fn set_active(&mut self, active: &[u16]) -> io::Result<()> {
        let mut active = active.to_vec();
        active.sort_unstable();
        active.dedup();
        if let Some(slot) = active.last().filter(|slot| **slot >= self.slots) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("cannot steer to slot {slot}: there are {} slots", self.slots),
            ));
        }
        if self.in_force.as_ref() == Some(&active) {
            return Ok(());
        }
        let Some(program) = self.policy.program(&active, self.slots) else {
            return Ok(());
        };
        // A single listener is no group yet, which takes no program and needs none.
        if self.slots > 1 {
            self.in_force = None;
            for group in &self.groups {
                socket::attach_reuseport_cbpf(group.as_fd(), &program)
                    .map_err(|error| explain(self.policy.name(), &active, program.len(), &error))?;
            }
        }
        self.in_force = Some(active);
        Ok(())
    }
}

fn explain(policy: &str, active: &[u16], length: usize, error: &io::Error) -> io::Error {
    let remedy = match error.raw_os_error() {
        Some(libc::ENOMEM) => "; raise the sysctl net.core.optmem_max or use fewer executors",
        _ => "",
    };
    io::Error::new(
        error.kind(),
        format!(
            "cannot attach the '{policy}' steering program ({length} instructions) for {} slots: \
             {error}{remedy}",
            active.len()
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpStream};
    use std::os::fd::BorrowedFd;
    use std::time::Duration;

    use super::*;
    use crate::sys::bind::{ListenOptions, bind_group};
    use crate::sys::poll::wait_readable;

    /// A group of listeners on loopback and a table over it.
    struct Fixture {
        listeners: Vec<OwnedFd>,
        addr: SocketAddr,
        table: Table,
    }

    impl Fixture {
        fn new(slots: u16, policy: Box<dyn Steering>) -> Self {
            let any = "127.0.0.1:0".parse().unwrap();
            let options = ListenOptions::default();
            let listeners = bind_group(any, slots.into(), &options).unwrap();
            let addr = socket::local_addr(listeners[0].as_fd()).unwrap();
            let groups = vec![listeners[0].try_clone().unwrap()];
            Self { addr, table: Table::new(policy, slots, groups), listeners }
        }

        fn random(slots: u16) -> Self {
            Self::new(slots, Box::new(random::Random))
        }

        fn connect(&self) -> TcpStream {
            TcpStream::connect(self.addr).unwrap()
        }

        /// Accepts `expected` connections, waiting for each; how many each slot got.
        fn accept(&self, expected: usize) -> Vec<usize> {
            accept_all(&self.listeners, expected)
        }
    }

    fn accept_all(listeners: &[OwnedFd], expected: usize) -> Vec<usize> {
        let fds: Vec<BorrowedFd<'_>> = listeners.iter().map(AsFd::as_fd).collect();
        let mut counts = vec![0; fds.len()];
        while counts.iter().sum::<usize>() < expected {
            let ready = wait_readable(&fds, Some(Duration::from_secs(10))).unwrap();
            assert!(!ready.is_empty(), "lost: {counts:?} of {expected}");
            for slot in ready {
                while socket::accept(fds[slot]).is_ok() {
                    counts[slot] += 1;
                }
            }
        }
        counts
    }

    #[test]
    fn connections_go_to_active_slots_only() {
        let mut fixture = Fixture::random(4);
        for active in [vec![2], vec![0, 3], vec![3, 1], vec![0, 1, 2, 3]] {
            fixture.table.set_active(&active).unwrap();
            let _clients: Vec<_> = (0..60).map(|_| fixture.connect()).collect();
            let counts = fixture.accept(60);
            for slot in 0..4 {
                // With four slots a slot stays empty in one of 10^7 runs.
                assert_eq!(counts[usize::from(slot)] > 0, active.contains(&slot));
            }
        }
    }

    #[test]
    fn with_no_active_slot_the_program_before_stays() {
        let mut fixture = Fixture::random(3);
        fixture.table.set_active(&[1]).unwrap();
        fixture.table.set_active(&[]).unwrap();
        assert_eq!(fixture.table.in_force(), Some(&[1][..]));
        let _clients: Vec<_> = (0..10).map(|_| fixture.connect()).collect();
        assert_eq!(fixture.accept(10), [0, 10, 0]);
    }

    #[test]
    fn a_slot_that_does_not_exist_is_refused_and_nothing_changes() {
        let mut fixture = Fixture::random(2);
        fixture.table.set_active(&[1]).unwrap();
        let error = fixture.table.set_active(&[0, 2]).unwrap_err();
        assert!(error.to_string().contains("slot 2"), "{error}");
        assert_eq!(fixture.table.in_force(), Some(&[1][..]));
    }

    #[test]
    fn order_and_repetition_do_not_matter_and_a_single_slot_needs_no_program() {
        let mut fixture = Fixture::random(3);
        fixture.table.set_active(&[2, 0, 2]).unwrap();
        assert_eq!(fixture.table.in_force(), Some(&[0, 2][..]));

        let mut fixture = Fixture::random(1);
        fixture.table.set_active(&[0]).unwrap();
        let _client = fixture.connect();
        assert_eq!(fixture.accept(1), [1]);
    }

    #[test]
    fn a_failure_says_what_was_attempted_and_is_not_taken_for_success() {
        let plain = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut table = Table::new(Box::new(random::Random), 2, vec![plain.into()]);
        let error = table.set_active(&[0, 1]).unwrap_err();
        assert!(error.to_string().contains("'random' steering program"));
        assert_eq!(table.in_force(), None);
        assert!(table.set_active(&[0, 1]).is_err());
    }

    #[test]
    fn after_a_failure_half_way_the_next_call_attaches_to_all_again() {
        let mut fixture = Fixture::random(2);
        fixture.table.set_active(&[0]).unwrap();
        let plain = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        fixture.table.groups.push(plain.into());
        fixture.table.set_active(&[1]).unwrap_err();
        fixture.table.groups.pop();
        fixture.table.set_active(&[0]).unwrap();
        let _clients: Vec<_> = (0..10).map(|_| fixture.connect()).collect();
        assert_eq!(fixture.accept(10), [10, 0]);
    }

    #[test]
    fn random_spreads_evenly_over_four() {
        let mut fixture = Fixture::random(4);
        fixture.table.set_active(&[0, 1, 2, 3]).unwrap();
        let _clients: Vec<_> = (0..400).map(|_| fixture.connect()).collect();
        let counts = fixture.accept(400);
        // 15 % to 35 % of 400 is 4.6 standard deviations.
        assert!(counts.iter().all(|count| (60..=140).contains(count)), "{counts:?}");
    }

    #[test]
    fn changing_the_table_under_traffic_loses_no_connection() {
        const CONNECTS: usize = 600;
        let Fixture { listeners, addr, mut table } = Fixture::random(4);
        std::thread::scope(|scope| {
            let clients = scope.spawn(move || {
                let connect = |_| TcpStream::connect(addr).unwrap();
                (0..CONNECTS).map(connect).collect::<Vec<_>>()
            });
            let accepted = scope.spawn(|| accept_all(&listeners, CONNECTS));
            let sets: [&[u16]; 4] = [&[0], &[1, 3], &[2], &[0, 1, 2, 3]];
            let mut swaps = 0;
            for set in sets.iter().cycle() {
                if accepted.is_finished() {
                    break;
                }
                table.set_active(set).unwrap();
                swaps += 1;
            }
            assert!(swaps > 4, "only {swaps} swaps");
            assert_eq!(accepted.join().unwrap().iter().sum::<usize>(), CONNECTS);
            assert_eq!(clients.join().unwrap().len(), CONNECTS);
        });
    }

    #[test]
    fn every_address_gets_the_program() {
        let any = "127.0.0.1:0".parse().unwrap();
        let options = ListenOptions::default();
        let groups: Vec<_> = (0..2).map(|_| bind_group(any, 3, &options).unwrap()).collect();
        let members = groups.iter().map(|g| g[2].try_clone().unwrap()).collect();
        let mut table = Table::new(Box::new(random::Random), 3, members);
        table.set_active(&[1]).unwrap();
        for group in &groups {
            let addr = socket::local_addr(group[0].as_fd()).unwrap();
            let _clients: Vec<_> = (0..8).map(|_| TcpStream::connect(addr).unwrap()).collect();
            assert_eq!(accept_all(group, 8), [0, 8, 0]);
        }
    }

    #[test]
    fn the_kernel_takes_the_longest_programs() {
        let mut fixture = Fixture::random(2);
        fixture.table.slots = SLOTS_MAX;
        let scattered: Vec<u16> = (0..SLOTS_MAX).step_by(2).collect();
        for name in ["random", "hash"] {
            fixture.table.policy = by_name(name, 1).unwrap();
            assert_eq!(fixture.table.policy(), name);
            fixture.table.in_force = None;
            fixture.table.set_active(&scattered).unwrap();
        }
        assert!(by_name("fair", 1).is_none());
    }
}
