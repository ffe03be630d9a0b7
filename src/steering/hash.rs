//! Each new connection goes to the active slot its client's address and port hash to.
//!
//! A SYN that is sent again, a client that reconnects from the same port and a SYN cookie that comes
//! back all meet the same slot for as long as the table does not change. Weights would change it all the time, so
//! they are ignored. Where the extended program finds the slot stale, the connection goes to another one, which is found
//! from the same hash.
//!
//! The hash is computed here, from the packet. The one that the kernel offers ready-made
//! (`SKF_AD_RXHASH`) is only what someone else has left in the packet: the network card, or nobody, and
//! then it is 0 for all and one slot gets everything; on loopback the sending socket, and then 30
//! connects from one port met all of four slots.

#[cfg(test)]
use std::net::SocketAddr;

use libc::{
    BPF_ABS, BPF_ALU, BPF_B, BPF_IND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_LDX, BPF_MEM, BPF_MISC, BPF_MSH, BPF_MUL,
    BPF_RSH, BPF_ST, BPF_TAX, BPF_W, BPF_X, BPF_XOR, SKF_NET_OFF, sock_filter,
};

use super::program::{choose, jump, statement};
use super::{Draw, Share, Steering};

/// The policy for clients whose retries should stay together.
#[derive(Clone, Copy, Debug)]
pub struct Hash {
    seed: u32,
}

impl Hash {
    /// With a `seed` that clients do not know they cannot easily aim at one slot.
    pub fn new(seed: u32) -> Self {
        Self { seed }
    }

    /// What the programs compute, as a function: the hash of a connection from `client` to the local `port`.
    #[cfg(test)]
    pub fn number(&self, client: SocketAddr, port: u16) -> u32 {
        let words: Vec<u32> = match client {
            SocketAddr::V4(client) => vec![u32::from(*client.ip())],
            SocketAddr::V6(client) => {
                let octets = client.ip().octets();
                let word = |i: usize| u32::from_be_bytes([octets[i], octets[i + 1], octets[i + 2], octets[i + 3]]);
                [0, 4, 8, 12].map(word).to_vec()
            }
        };
        let ports = u32::from(client.port()) << 16 | u32::from(port);
        let address = words.into_iter().fold(0, |hash: u32, word| (hash ^ word).wrapping_mul(SPREAD));
        let mut hash = address ^ ports ^ self.seed;
        hash = (hash ^ (hash >> 16)).wrapping_mul(MIX_ONE);
        hash = (hash ^ (hash >> 13)).wrapping_mul(MIX_TWO);
        hash ^ (hash >> 16)
    }

    /// The slot that the classic program chooses for it.
    #[cfg(test)]
    pub fn slot(&self, client: SocketAddr, port: u16, active: &[u16]) -> Option<u16> {
        let position = self.number(client, port).checked_rem(u32::try_from(active.len()).ok()?)?;
        active.get(position as usize).copied()
    }
}

impl Steering for Hash {
    fn name(&self) -> &'static str {
        "hash"
    }

    fn draw(&self) -> Draw {
        Draw::Hash { seed: self.seed }
    }

    fn takes_weights(&self) -> bool {
        false
    }

    fn program(&self, shares: &[Share], _slots: u16) -> Option<Vec<sock_filter>> {
        if shares.is_empty() {
            return None;
        }
        let active: Vec<u16> = shares.iter().map(|share| share.slot).collect();
        let v6 = combine_v6();
        let v4 = combine_v4(v6.len() as u32);
        let mut program = vec![
            // The version is the first half byte of the packet.
            statement(BPF_LD | BPF_B | BPF_ABS, network(0)),
            statement(BPF_ALU | BPF_RSH | BPF_K, 4),
            jump(BPF_JMP | BPF_JEQ | BPF_K, 6, v4.len() as u8, 0),
        ];
        program.extend(v4);
        program.extend(v6);
        program.push(statement(BPF_ALU | BPF_XOR | BPF_K, self.seed));
        // The finaliser of MurmurHash3: every bit of the input reaches the low bits.
        for (shift, multiplier) in [(16, Some(MIX_ONE)), (13, Some(MIX_TWO)), (16, None)] {
            program.push(statement(BPF_MISC | BPF_TAX, 0));
            program.push(statement(BPF_ALU | BPF_RSH | BPF_K, shift));
            program.push(statement(BPF_ALU | BPF_XOR | BPF_X, 0));
            if let Some(multiplier) = multiplier {
                program.push(statement(BPF_ALU | BPF_MUL | BPF_K, multiplier));
            }
        }
        Some(choose(program, &active))
    }
}

/// Source address and both ports of an IPv4 packet into A, then past the `skip` instructions after.
fn combine_v4(skip: u32) -> Vec<sock_filter> {
    vec![
        statement(BPF_LD | BPF_W | BPF_ABS, network(12)),
        statement(BPF_ALU | BPF_MUL | BPF_K, SPREAD),
        statement(BPF_ST, 0),
        // X is the length of the header, which may have options.
        statement(BPF_LDX | BPF_B | BPF_MSH, network(0)),
        statement(BPF_LD | BPF_W | BPF_IND, network(0)),
        statement(BPF_MISC | BPF_TAX, 0),
        statement(BPF_LD | BPF_MEM, 0),
        statement(BPF_ALU | BPF_XOR | BPF_X, 0),
        statement(BPF_JMP | libc::BPF_JA, skip),
    ]
}

/// Source address and both ports of an IPv6 packet into A. With extension headers, which a SYN
/// hardly ever has, the bytes in the place of the ports; they are the same for each packet all the same.
fn combine_v6() -> Vec<sock_filter> {
    let mut program =
        vec![statement(BPF_LD | BPF_W | BPF_ABS, network(8)), statement(BPF_ALU | BPF_MUL | BPF_K, SPREAD)];
    for offset in [12, 16, 20] {
        program.push(statement(BPF_MISC | BPF_TAX, 0));
        program.push(statement(BPF_LD | BPF_W | BPF_ABS, network(offset)));
        program.push(statement(BPF_ALU | BPF_XOR | BPF_X, 0));
        program.push(statement(BPF_ALU | BPF_MUL | BPF_K, SPREAD));
    }
    program.push(statement(BPF_MISC | BPF_TAX, 0));
    program.push(statement(BPF_LD | BPF_W | BPF_ABS, network(40)));
    program.push(statement(BPF_ALU | BPF_XOR | BPF_X, 0));
    program
}

/// An offset from the start of the network header; plain offsets count from the TCP payload.
fn network(offset: i32) -> u32 {
    (SKF_NET_OFF + offset) as u32
}

/// 2^32 over the golden ratio, made odd.
pub(super) const SPREAD: u32 = 0x9e37_79b9;
pub(super) const MIX_ONE: u32 = 0x85eb_ca6b;
pub(super) const MIX_TWO: u32 = 0xc2b2_ae35;

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::time::Duration;

    use super::*;
    use crate::steering::{Kernel, Members, Realise, Table, extended};
    use crate::sys::bind::BindError;
    use crate::sys::bind::{ListenOptions, bind_group};
    use crate::sys::poll::wait_readable;
    use crate::sys::socket;

    /// Connects 100 times in each way and compares the slot the kernel chose with the function's.
    fn kernel_and_function_agree(listen: &str, connect: std::net::IpAddr, active: &[u16]) {
        for realise in [Realise::Classic, Realise::Best] {
            kernel_and_function_agree_in(realise, listen, connect, active);
        }
    }

    fn kernel_and_function_agree_in(realise: Realise, listen: &str, connect: std::net::IpAddr, active: &[u16]) {
        let options = ListenOptions { v6_only: false, ..ListenOptions::default() };
        let listeners = match bind_group(listen.parse().unwrap(), 6, &options) {
            Ok(listeners) => listeners,
            Err(BindError::NotAvailable { .. }) => return eprintln!("skipped: no IPv6 here"),
            Err(error) => panic!("{error}"),
        };
        let port = socket::local_addr(listeners[0].as_fd()).unwrap().port();
        let hash = Hash::new(0x5eed_1234);
        let groups = vec![Members { listeners: &listeners, sockets: None }];
        let kernel = Kernel::probe(6, realise);
        let mut table = Table::new(Box::new(hash), 6, groups, &kernel).unwrap();
        // Weights are not for this policy.
        table.set(active.iter().map(|slot| Share { slot: *slot, weight: 1 + slot })).unwrap();
        let shares: Vec<_> = active.iter().map(|slot| Share { slot: *slot, weight: 1 }).collect();
        assert_eq!(table.in_force(), Some(&shares[..]));

        let fds: Vec<BorrowedFd<'_>> = listeners.iter().map(AsFd::as_fd).collect();
        let mut used = [0; 6];
        for _ in 0..100 {
            let client = match TcpStream::connect((connect, port)) {
                Ok(client) => client,
                Err(_) if connect.is_ipv6() => return eprintln!("skipped: no ::1 here"),
                Err(error) => panic!("{error}"),
            };
            let ready = wait_readable(&fds, Some(Duration::from_secs(5))).unwrap();
            let client = client.local_addr().unwrap();
            let expected = match table.realisation() {
                "eBPF" => extended::choose(&extended::entries(&shares), hash.number(client, port)),
                _ => hash.slot(client, port, active).unwrap(),
            };
            assert_eq!(ready, [usize::from(expected)], "{}", table.realisation());
            socket::accept(fds[ready[0]]).unwrap();
            // As whoever accepts has been awake: one that sleeps on is passed over after some dozens.
            kernel.heartbeats().of(expected).asleep();
            used[ready[0]] += 1;
        }
        for (slot, used) in used.into_iter().enumerate() {
            // Of six slots one stays without any of 100 in one of 10^7 runs.
            assert_eq!(used > 0, active.contains(&(slot as u16)), "slot {slot}");
        }
    }

    #[test]
    fn the_kernel_chooses_by_client_address_and_port_alone() {
        let v4 = std::net::Ipv4Addr::LOCALHOST.into();
        let v6 = std::net::Ipv6Addr::LOCALHOST.into();
        kernel_and_function_agree("127.0.0.1:0", v4, &[0, 1, 2, 3, 4, 5]);
        kernel_and_function_agree("127.0.0.1:0", v4, &[1, 2, 5]);
        kernel_and_function_agree("[::1]:0", v6, &[0, 2, 3]);
        // One listener for both families meets both kinds of packets.
        kernel_and_function_agree("[::]:0", v4, &[0, 4]);
        kernel_and_function_agree("[::]:0", v6, &[0, 4]);
    }

    #[test]
    fn neighbouring_ports_and_addresses_spread_evenly() {
        let active: Vec<u16> = (0..8).collect();
        let ports = (32_768..33_568).map(|port| SocketAddr::from(([10, 0, 0, 1], port)));
        let hosts = (0..800_u32).map(|host| {
            let [.., high, low] = host.to_be_bytes();
            SocketAddr::from(([10, 0, high, low], 40_000))
        });
        let clients: [Vec<_>; 2] = [ports.collect(), hosts.collect()];
        for clients in clients {
            let mut counts = [0; 8];
            for client in clients {
                let slot = Hash::new(7).slot(client, 80, &active).unwrap();
                counts[usize::from(slot)] += 1;
            }
            assert!(counts.iter().all(|n| (60..=140).contains(n)), "{counts:?}");
        }
    }

    #[test]
    fn without_an_active_slot_there_is_no_program() {
        assert!(Hash::new(1).program(&[], 4).is_none());
        let client = SocketAddr::from(([10, 0, 0, 1], 1));
        assert_eq!(Hash::new(1).slot(client, 80, &[]), None);
    }
}
