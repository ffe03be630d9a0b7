//! Steering: which slots new connections may go to, in which proportion, and the program in the kernel that realises it.
//!
//! The listeners of one address form a reuseport group, and a small BPF program picks the member for every SYN.
//! [`Table`] holds the shares of the slots and puts a change in force. Listeners are never closed, so a change loses
//! nothing: what is already in a queue, or half-open on its way into one, stays with its slot, and the supervisor
//! empties the queues of inactive slots. Only new connections are steered; open ones are never moved.
//!
//! A policy is one file with one implementation of [`Steering`] and a row in [`by_name`]. [`random`] spreads best,
//! [`hash`] keeps the retransmitted SYNs of a client on one slot, [`least_loaded`] evens out connections that live long.
//!
//! A table is realised in one of two ways. [`extended`] BPF, where the process may load it: a change is a store to
//! memory, and the program passes over slots with a stale heartbeat by itself. Otherwise classic BPF ([`program`]),
//! which needs no privilege: a change attaches a new program, and a stalled slot gets connections until the supervisor
//! has noticed. On a port that is shared with other processes it is realised in neither: the program of a group decides
//! over the listeners of all, so one of ours would take the others' connections ([`Realise::Nothing`]).
//!
//! Not here: deciding which slots are active, and sampling their loads. That is the supervisor's.

mod extended;
pub mod hash;
pub mod least_loaded;
mod program;
pub mod random;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use libc::sock_filter;

use crate::sys::heartbeats::Heartbeats;
use crate::sys::socket;
use extended::Extended;

/// The most slots a table can have. The longest classic program for them has about half of the 4,096 instructions the
/// kernel takes.
pub const SLOTS_MAX: u16 = 1024;

/// A heartbeat this old is stale, by default: an executor's turn takes microseconds, and 64 busy ones on two CPUs may have to
/// wait for each other for so long.
pub const STALE_AFTER: Duration = Duration::from_millis(20);

/// A slot's part of the new connections: its weight over the sum of all weights. None with weight 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share {
    pub slot: u16,
    pub weight: u16,
}

/// How loaded a slot is at the moment, as the supervisor samples it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlotLoad {
    pub slot: u16,
    /// Connections open on its executor.
    pub open: u64,
    /// The part of the time since the last sample in which the executor was busy, 0 to 1.
    pub utilisation: f64,
    /// Connections that wait to be accepted, over all its listeners.
    pub queue: u32,
    /// It has no place for a connection.
    pub full: bool,
}

/// Where a program takes the number from by which it chooses.
#[derive(Clone, Copy, Debug)]
pub enum Draw {
    /// From the kernel's generator: another one for every SYN.
    Random,
    /// From the client's address and both ports: the same for every SYN of a connection.
    Hash { seed: u32 },
}

/// A way to choose among the slots for each new connection.
pub trait Steering: Send {
    /// The policy's name in options and output.
    fn name(&self) -> &'static str;

    /// What the extended program chooses by.
    fn draw(&self) -> Draw;

    /// The classic program that picks one of `shares`: by slot in ascending order, each once, no weight 0, all below
    /// `slots`, which is at most [`SLOTS_MAX`]. `None` if there is none to pick from.
    fn program(&self, shares: &[Share], slots: u16) -> Option<Vec<sock_filter>>;

    /// Whether weights mean anything; otherwise all are taken for equal.
    fn takes_weights(&self) -> bool {
        true
    }

    /// How often [`Table::set_loads`] is to be called; `None` for a policy that loads do not concern.
    fn refresh(&self) -> Option<Duration> {
        None
    }

    /// The shares of active slots under these loads. By default the same for all that have room.
    fn shares(&self, loads: &[SlotLoad]) -> Vec<Share> {
        with_room(loads).iter().map(|load| Share { slot: load.slot, weight: 1 }).collect()
    }
}

/// The policy of that name. `seed` makes choices that clients could predict differ between processes.
pub fn by_name(name: &str, seed: u32) -> Option<Box<dyn Steering>> {
    let policies: [Box<dyn Steering>; 3] =
        [Box::new(random::Random), Box::new(hash::Hash::new(seed)), Box::new(least_loaded::LeastLoaded)];
    policies.into_iter().find(|policy| policy.name() == name)
}

/// The slots that have a place for a connection; all of them if none has, since the kernel has to put them somewhere.
fn with_room(loads: &[SlotLoad]) -> Vec<SlotLoad> {
    let with_room: Vec<SlotLoad> = loads.iter().copied().filter(|load| !load.full).collect();
    if with_room.is_empty() { loads.to_vec() } else { with_room }
}

/// Which of the two ways is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Realise {
    /// Extended BPF where it can be loaded, classic BPF otherwise.
    #[default]
    Best,
    /// Classic BPF.
    #[cfg_attr(
        not(any(test, feature = "internals")),
        expect(dead_code, reason = "no option of the builder asks for it yet")
    )]
    Classic,
    /// No program: the kernel spreads connections over all listeners of the address, those of other processes too.
    Nothing,
}

/// What a server says of it at the start.
const LEFT_TO_THE_KERNEL: &str = "by the kernel, since the port is shared; executors that are stalled, full or idle get \
                                  connections like others, and those are handed on; processes that were not started to \
                                  share it keep theirs";

/// What the kernel grants to steering: found out first of all, since executors write their heartbeats into its memory.
pub struct Kernel {
    heartbeats: Arc<Heartbeats>,
    /// The map behind the heartbeats, or why there is none.
    map: Result<OwnedFd, String>,
    realise: Realise,
}

impl Kernel {
    /// Tries to make the heartbeats of `slots` slots where programs can read them; in ordinary memory otherwise.
    pub fn probe(slots: u16, realise: Realise) -> Self {
        let map = match realise {
            Realise::Classic => Err("classic BPF was asked for".to_owned()),
            Realise::Nothing => Err("the port is shared".to_owned()),
            // Nothing to choose from.
            Realise::Best if slots == 1 => Err("a single executor needs no steering".to_owned()),
            Realise::Best => Heartbeats::in_map(slots).map_err(|error| why_not(&error)),
        };
        match map {
            Ok((heartbeats, map)) => Self { heartbeats, map: Ok(map), realise },
            Err(reason) => Self { heartbeats: Heartbeats::on_heap(slots), map: Err(reason), realise },
        }
    }

    /// The heartbeats of the slots.
    pub fn heartbeats(&self) -> &Arc<Heartbeats> {
        &self.heartbeats
    }
}

/// The listeners of one address, one for each slot in order.
pub struct Members<'a> {
    pub listeners: &'a [OwnedFd],
    /// With listeners that another process has passed on: the array that its program selects from
    /// ([`Table::socket_arrays`]). Without it they are steered by classic BPF for as long as that process lives.
    pub sockets: Option<OwnedFd>,
}

/// The slots that take new connections, put in force in the reuseport group of each address.
pub struct Table {
    policy: Box<dyn Steering>,
    slots: u16,
    /// One member of each group; the program belongs to the group.
    groups: Vec<OwnedFd>,
    way: Way,
    /// What every group's program realises. `None` before the first and after a failure half-way.
    in_force: Option<Vec<Share>>,
}

/// How the table is realised.
enum Way {
    Extended {
        programs: Extended,
        /// Whether the groups have it.
        attached: bool,
    },
    Classic {
        /// Why not the other.
        reason: String,
    },
    /// It is not: whoever is in it or not, connections come to all listeners.
    Nothing,
}

impl Table {
    /// A table of `slots` slots over groups of as many listeners each. Nothing is attached yet: the kernel spreads over
    /// all slots by a hash, or by what another process has attached to listeners that were passed on.
    ///
    /// # Errors
    /// When descriptors run out. That extended BPF cannot be had is no error.
    pub fn new(
        policy: Box<dyn Steering>,
        slots: u16,
        mut groups: Vec<Members<'_>>,
        kernel: &Kernel,
    ) -> io::Result<Self> {
        debug_assert!((1..=SLOTS_MAX).contains(&slots), "{slots} slots");
        debug_assert!(groups.iter().all(|group| group.listeners.len() == usize::from(slots)));
        let duplicate = |group: &Members<'_>| group.listeners[0].try_clone();
        let duplicates: io::Result<Vec<OwnedFd>> = groups.iter().map(duplicate).collect();
        let loaded = match &kernel.map {
            Ok(map) => Extended::load(policy.draw(), slots, &mut groups, map).map_err(|error| why_not(&error)),
            Err(reason) => Err(reason.clone()),
        };
        let way = match loaded {
            Ok(programs) => Way::Extended { programs, attached: false },
            Err(_) if kernel.realise == Realise::Nothing => Way::Nothing,
            Err(reason) => Way::Classic { reason },
        };
        Ok(Self { policy, slots, groups: duplicates?, way, in_force: None })
    }

    /// Policy and realisation in words.
    pub fn description(&self) -> String {
        if self.is_left_to_the_kernel() {
            return LEFT_TO_THE_KERNEL.to_owned();
        }
        let (policy, way) = (self.policy.name(), self.realisation());
        match self.reason() {
            Some(reason) if self.slots > 1 => format!("{policy}, by {way}, because {reason}"),
            _ => format!("{policy}, by {way}"),
        }
    }

    /// The policy's name.
    #[cfg(test)]
    pub fn policy(&self) -> &'static str {
        self.policy.name()
    }

    /// The shares by which the programs in force choose, by slot in ascending order and in lowest terms; `None` if that
    /// is not known.
    #[cfg(test)]
    pub fn in_force(&self) -> Option<&[Share]> {
        self.in_force.as_deref()
    }

    /// What steers: `eBPF` or `classic BPF`; `nothing` where there is one slot.
    pub fn realisation(&self) -> &'static str {
        match self.way {
            _ if self.slots == 1 => "nothing",
            Way::Extended { .. } => "eBPF",
            Way::Classic { .. } => "classic BPF",
            Way::Nothing => "nothing",
        }
    }

    /// Whether connections come to all slots, whatever the table says.
    pub fn is_left_to_the_kernel(&self) -> bool {
        matches!(self.way, Way::Nothing)
    }

    /// Whether a change replaces a classic program, which kernels before 6.18.36, 6.12.94, 6.6.143 and 6.1.176 do not do
    /// safely under traffic.
    pub fn replaces_programs(&self) -> bool {
        self.slots > 1 && matches!(self.way, Way::Classic { .. })
    }

    /// Why it is not eBPF, in words that fit behind "because".
    pub fn reason(&self) -> Option<&str> {
        match &self.way {
            Way::Extended { .. } | Way::Nothing => None,
            Way::Classic { reason } => Some(reason),
        }
    }

    /// How often [`Table::set_loads`] is to be called; `None` if loads do not concern the policy.
    pub fn refresh(&self) -> Option<Duration> {
        self.policy.refresh().filter(|_| !self.is_left_to_the_kernel())
    }

    /// How old a heartbeat is that makes the extended program pass over its slot; 20 ms until this is called. Classic
    /// programs do not look at heartbeats.
    pub fn set_stale_after(&self, limit: Duration) {
        if let Way::Extended { programs, .. } = &self.way {
            programs.set_stale_after(limit);
        }
    }

    /// For a process that takes the listeners over: the array of each group's sockets, in the order of the groups. None
    /// with classic BPF, which leaves nothing to pass on.
    pub fn socket_arrays(&self) -> Vec<BorrowedFd<'_>> {
        match &self.way {
            Way::Extended { programs, .. } => programs.socket_arrays().collect(),
            Way::Classic { .. } | Way::Nothing => Vec::new(),
        }
    }

    /// Forgets what is in force, since another process may have given the groups a program of its own: the next change
    /// attaches ours again, and puts its table in force, too, if it is the same as before.
    pub fn forget(&mut self) {
        self.in_force = None;
        if let Way::Extended { attached, .. } = &mut self.way {
            *attached = false;
        }
    }

    /// Steers new connections to these slots, in equal parts, from the next SYN on.
    ///
    /// # Errors
    /// As [`Table::set`].
    pub fn set_active(&mut self, active: &[u16]) -> io::Result<()> {
        self.set(active.iter().map(|slot| Share { slot: *slot, weight: 1 }))
    }

    /// Steers new connections to these active slots as the policy sees fit under their loads.
    ///
    /// # Errors
    /// As [`Table::set`].
    pub fn set_loads(&mut self, loads: &[SlotLoad]) -> io::Result<()> {
        self.set(self.policy.shares(loads))
    }

    /// Steers new connections to these slots, in proportion to their weights, from the next SYN on. In any order; of a
    /// slot that is named twice the larger weight counts. Cheap if nothing changes.
    ///
    /// With none (or nothing but weights of 0) the programs stay as they are, because the kernel has to put connections
    /// somewhere and the supervisor empties the queues of inactive slots anyway.
    ///
    /// # Errors
    /// For a slot that does not exist, and when the kernel does not take a program. Some groups may have the new program
    /// then already; the next call attaches to all again.
    pub fn set(&mut self, shares: impl IntoIterator<Item = Share>) -> io::Result<()> {
        let shares = normalised(shares, self.policy.takes_weights());
        if let Some(share) = shares.last().filter(|share| share.slot >= self.slots) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("cannot steer to slot {}: there are {} slots", share.slot, self.slots),
            ));
        }
        if shares.is_empty() || self.in_force.as_ref() == Some(&shares) {
            return Ok(());
        }
        self.in_force = None;
        // A single listener is no group yet, which takes no program and needs none.
        if self.slots > 1 {
            self.realise(&shares)?;
        }
        self.in_force = Some(shares);
        Ok(())
    }

    fn realise(&mut self, shares: &[Share]) -> io::Result<()> {
        let attached = match &mut self.way {
            Way::Extended { programs, attached } => {
                programs.store(shares);
                let outcome = if *attached { Ok(()) } else { programs.attach(&self.groups) };
                *attached = outcome.is_ok();
                outcome
            }
            Way::Classic { .. } => {
                let program = self.policy.program(shares, self.slots).expect("there is a share to choose");
                self.groups.iter().try_for_each(|group| socket::attach_reuseport_cbpf(group.as_fd(), &program))
            }
            Way::Nothing => Ok(()),
        };
        attached.map_err(|error| self.explain(shares, &error))
    }

    fn explain(&self, shares: &[Share], error: &io::Error) -> io::Error {
        let remedy = match error.raw_os_error() {
            Some(libc::ENOMEM) => "; raise the sysctl net.core.optmem_max or use fewer executors",
            _ => "",
        };
        let (way, policy, slots) = (self.realisation(), self.policy.name(), shares.len());
        io::Error::new(
            error.kind(),
            format!("cannot attach the '{policy}' steering program ({way}) for {slots} slots: {error}{remedy}"),
        )
    }
}

/// By slot, each once, without weights of 0, and in lowest terms, so that what chooses alike is equal.
fn normalised(shares: impl IntoIterator<Item = Share>, takes_weights: bool) -> Vec<Share> {
    let mut shares: Vec<Share> = shares.into_iter().filter(|share| share.weight > 0).collect();
    // The larger weight of a slot comes first.
    shares.sort_unstable_by_key(|share| (share.slot, u16::MAX - share.weight));
    shares.dedup_by_key(|share| share.slot);
    let divisor = shares.iter().fold(0, |divisor, share| greatest_common_divisor(divisor, share.weight));
    for share in &mut shares {
        share.weight = if takes_weights { share.weight / divisor } else { 1 };
    }
    shares
}

fn greatest_common_divisor(mut one: u16, mut other: u16) -> u16 {
    while other != 0 {
        (one, other) = (other, one % other);
    }
    one
}

/// Why extended BPF cannot be had, for somebody who reads what a server says at its start.
fn why_not(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => "the kernel lets this process load no eBPF program: it takes CAP_BPF and CAP_NET_ADMIN \
                              (with systemd AmbientCapabilities=), and in a container a seccomp profile that allows bpf"
            .to_owned(),
        Some(libc::ENOSYS) => "this kernel has no bpf system call".to_owned(),
        Some(libc::EBUSY) => "the listeners belong to the eBPF program of another process".to_owned(),
        Some(libc::ENOMEM) => format!("the kernel has no memory for an eBPF program: {error}"),
        _ => format!("the kernel does not take the eBPF program: {error}"),
    }
}
