//! Where a server's listeners come from: bound by itself, handed over by the process before it, or given by the service
//! manager; and which slot accepts from which.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::Error;
use crate::error::Kind;
use crate::executor::accept::Listener;
use crate::sys::bind::{self, BindError, ListenOptions};
use crate::sys::socket;
use crate::systemd;
use crate::upgrade;
use crate::upgrade::inherited::{self, Predecessor};

/// The listeners of one address, in the order of their group in the kernel.
#[derive(Debug)]
pub(crate) struct Group {
    pub address: SocketAddr,
    pub listeners: Vec<OwnedFd>,
    /// So many of the first were given by the service manager.
    pub activated: usize,
    /// The array of the old process's steering program: a listener can be in one only.
    pub sockets: Option<OwnedFd>,
}

/// What this process has been given by the one before it or by the service manager.
#[derive(Debug, Default)]
pub(crate) struct Inheritance {
    /// Not used yet.
    groups: Vec<upgrade::Group>,
    /// What the service manager has passed beside them, and cannot be served.
    unusable: Vec<String>,
    /// It serves until it hears that this one does.
    pub predecessor: Option<Predecessor>,
}

impl Inheritance {
    /// Looks for both; for the service manager's only if it is to be listened to.
    pub(crate) fn find(with_service_manager: bool) -> Result<Self, Error> {
        match inherited::from_environment() {
            Ok(Some((predecessor, groups))) => {
                tracing::info!(process = predecessor.process(), "taking over from a running server");
                Ok(Self { groups, unusable: Vec::new(), predecessor: Some(predecessor) })
            }
            Ok(None) if with_service_manager => {
                let systemd::Passed { groups, unusable } = systemd::listeners();
                Ok(Self { groups, unusable, predecessor: None })
            }
            Ok(None) => Ok(Self::default()),
            Err(why) => Err(Error::new(Kind::Start, why)),
        }
    }

    /// Whether there is something to serve even if no address is asked for.
    pub(crate) fn has_activated(&self) -> bool {
        self.groups.iter().any(|group| group.activated > 0)
    }

    /// Fails when sockets were to be passed, and none is one to serve: who set that up does not mean an address of ours.
    pub(crate) fn expect_usable(&self) -> Result<(), Error> {
        if self.unusable.is_empty() || !self.groups.is_empty() {
            return Ok(());
        }
        let message = format!(
            "the service manager has passed {} descriptors (LISTEN_FDS), and none of them is a TCP socket that listens: {}; \
             expected is a stream socket for an address and a port (ListenStream=8080), with Accept=no; or name an address \
             to listen on (--listen)",
            self.unusable.len(),
            self.unusable.join(", ")
        );
        Err(Error::new(Kind::Listen, message))
    }

    /// Closes what nobody has asked for; the addresses and sizes of those groups. The process before this one, if there
    /// is one, answers what is in their queues when it drains.
    pub(crate) fn close_rest(&mut self) -> Vec<(SocketAddr, usize)> {
        let rest: Vec<_> = self.groups.drain(..).map(|group| (group.address, group.listeners.len())).collect();
        for (address, _) in &rest {
            tracing::info!(%address, "no longer listened on");
        }
        rest
    }

    /// Tells the process before this one that it has to go on.
    pub(crate) fn refuse(&mut self, why: &Error) {
        if let Some(predecessor) = self.predecessor.take() {
            predecessor.failed(&why.to_string());
        }
    }
}

/// Opens `count` listeners on each address asked for, or takes over those there are, and all that the service manager
/// gave.
pub(crate) fn open(
    asked: &[SocketAddr],
    count: usize,
    options: &ListenOptions,
    inheritance: &mut Inheritance,
    warnings: &mut Vec<String>,
) -> Result<Vec<Group>, Error> {
    let explain = |error: BindError| Error::new(Kind::Listen, error.to_string());
    let mut groups = Vec::new();
    for address in asked {
        groups.push(match inherited::claim(&mut inheritance.groups, *address) {
            Some(group) => adopt(group, count, options, warnings).map_err(explain)?,
            None => {
                let listeners = bind::bind_group(*address, count, options).map_err(explain)?;
                let address = socket::local_addr(listeners[0].as_fd()).unwrap_or(*address);
                Group { address, listeners, activated: 0, sockets: None }
            }
        });
    }
    let (activated, rest) = std::mem::take(&mut inheritance.groups).into_iter().partition(|group| group.activated > 0);
    inheritance.groups = rest;
    for group in activated {
        groups.push(adopt(group, count, options, warnings).map_err(explain)?);
    }
    Ok(groups)
}

fn adopt(
    group: upgrade::Group,
    count: usize,
    options: &ListenOptions,
    warnings: &mut Vec<String>,
) -> Result<Group, BindError> {
    let upgrade::Group { address, listeners, activated, sockets } = group;
    let (listeners, missing) = bind::adopt_group(address, listeners, count, options)?;
    if missing.is_some() {
        warnings.push(format!(
            "{count} executors share {} listeners on {address}, without steering: they belong to another user, and the \
             kernel lets nobody else add to them; to have one for each, let the server open the address itself, or run \
             it as the user who opened it",
            listeners.len()
        ));
    }
    Ok(Group { address, listeners, activated, sockets })
}

impl Group {
    /// Whether each slot has a listener of its own, so that a steering program means slots by its numbers.
    pub(crate) fn can_be_steered(&self, slots: usize) -> bool {
        self.listeners.len() >= slots
    }
}

/// The listeners of each slot. Those of a group beyond the number of slots, which new connections are not steered to any
/// more, are emptied by the slots in turn; where there are too few, several slots accept from one.
pub(crate) fn deal(groups: Vec<Group>, slots: usize) -> std::io::Result<Vec<Vec<Listener>>> {
    let mut dealt: Vec<Vec<Listener>> = (0..slots).map(|_| Vec::new()).collect();
    for group in groups {
        let name: Arc<str> = Arc::from(group.address.to_string());
        let present = group.listeners.len();
        for (slot, of_slot) in dealt.iter_mut().enumerate().skip(present) {
            let index = slot % present;
            let fd = group.listeners[index].try_clone()?;
            of_slot.push(Listener { fd, name: Arc::clone(&name), index });
        }
        for (index, fd) in group.listeners.into_iter().enumerate() {
            dealt[index % slots].push(Listener { fd, name: Arc::clone(&name), index });
        }
    }
    Ok(dealt)
}

/// Duplicates of all listeners, put together again as the groups they were dealt from: addresses, and how many of each
/// the service manager gave.
pub(crate) fn gather<'a>(
    addresses: &[(SocketAddr, usize)],
    dealt: impl Iterator<Item = &'a Listener> + Clone,
) -> std::io::Result<Vec<upgrade::Group>> {
    let group = |(address, activated): &(SocketAddr, usize)| {
        let name = address.to_string();
        let mut members: Vec<&Listener> = dealt.clone().filter(|listener| *listener.name == *name).collect();
        members.sort_by_key(|listener| listener.index);
        // What several slots share is one.
        members.dedup_by_key(|listener| listener.index);
        let listeners = members.iter().map(|listener| listener.fd.try_clone()).collect::<std::io::Result<_>>()?;
        Ok(upgrade::Group { address: *address, listeners, activated: *activated, sockets: None })
    };
    addresses.iter().map(group).collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;

    use super::*;

    fn group(members: usize) -> Group {
        let listeners = bind::bind_group("127.0.0.1:0".parse().unwrap(), members, &ListenOptions::default()).unwrap();
        let address = socket::local_addr(listeners[0].as_fd()).unwrap();
        Group { address, listeners, activated: 0, sockets: None }
    }

    fn inode(fd: BorrowedFd<'_>) -> u64 {
        use std::os::unix::fs::MetadataExt;
        std::fs::File::from(fd.try_clone_to_owned().unwrap()).metadata().unwrap().ino()
    }

    #[test]
    fn every_slot_has_a_listener_and_every_listener_a_slot_and_the_group_can_be_put_together_again() {
        for (members, slots) in [(3, 3), (5, 2), (1, 4), (2, 3), (1, 1)] {
            let group = group(members);
            let (address, before): (_, Vec<u64>) =
                (group.address, group.listeners.iter().map(|fd| inode(fd.as_fd())).collect());
            let steered = group.can_be_steered(slots);
            let dealt = deal(vec![group], slots).unwrap();
            assert!(dealt.iter().all(|of_slot| !of_slot.is_empty()), "{members} for {slots}");
            if steered {
                for (slot, of_slot) in dealt.iter().enumerate() {
                    assert_eq!(of_slot[0].index, slot, "what is steered to a slot arrives there");
                }
            }
            let gathered = gather(&[(address, 0)], dealt.iter().flatten()).unwrap();
            let after: Vec<u64> = gathered[0].listeners.iter().map(|fd| inode(fd.as_fd())).collect();
            assert_eq!(before, after, "{members} for {slots}");
        }
    }

    #[test]
    fn what_is_inherited_is_not_bound_and_what_nobody_asks_for_is_kept_until_the_end() {
        let (kept, dropped, activated) = (group(2), group(1), group(1));
        let [kept_at, dropped_at, activated_at] = [kept.address, dropped.address, activated.address];
        let passed = |group: Group, activated| upgrade::Group {
            address: group.address,
            listeners: group.listeners,
            activated,
            sockets: None,
        };
        let mut inheritance = Inheritance {
            groups: vec![passed(dropped, 0), passed(activated, 1), passed(kept, 0)],
            ..Inheritance::default()
        };
        assert!(inheritance.has_activated());
        let mut warnings = Vec::new();
        let asked = [kept_at, "127.0.0.2:0".parse().unwrap()];
        let groups = open(&asked, 3, &ListenOptions::default(), &mut inheritance, &mut warnings).unwrap();
        let seen: Vec<_> = groups.iter().map(|group| (group.address.ip(), group.listeners.len())).collect();
        assert_eq!(seen, [(asked[0].ip(), 3), (asked[1].ip(), 3), (activated_at.ip(), 3)]);
        assert_eq!((groups[0].address, groups[2].address), (kept_at, activated_at));
        assert_eq!(warnings, Vec::<String>::new());
        assert!(std::net::TcpStream::connect(dropped_at).is_ok(), "it listens still");
        assert_eq!(inheritance.close_rest(), [(dropped_at, 1)]);
        assert!(std::net::TcpStream::connect(dropped_at).is_err());
    }
}
