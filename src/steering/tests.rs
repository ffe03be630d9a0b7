//! The table on real listeners, in both ways of realising it. Where eBPF cannot be loaded its half is skipped.

use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use super::*;
use crate::sys::bind::{ListenOptions, bind_group};
use crate::sys::poll::wait_readable;

/// Groups of listeners on loopback and a table over them.
struct Fixture {
    groups: Vec<Vec<OwnedFd>>,
    addresses: Vec<SocketAddr>,
    kernel: Kernel,
    table: Table,
}

impl Fixture {
    /// `None` if this way of realising a table is not to be had here.
    fn make(slots: u16, policy: Box<dyn Steering>, realise: Realise, listen: &[&str]) -> Option<Self> {
        let options = ListenOptions::default();
        let groups: Result<Vec<_>, _> =
            listen.iter().map(|address| bind_group(address.parse().unwrap(), slots.into(), &options)).collect();
        let groups = groups.inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
        let addresses = groups.iter().map(|group| socket::local_addr(group[0].as_fd()).unwrap()).collect();
        let kernel = Kernel::probe(slots, realise);
        let table = Table::new(policy, slots, members(&groups), &kernel).unwrap();
        if realise == Realise::Best && slots > 1 && table.realisation() != "eBPF" {
            assert!(!privileged(), "{:?}", table.reason());
            eprintln!("skipped: {:?}", table.reason());
            return None;
        }
        Some(Self { groups, addresses, kernel, table })
    }

    /// Random over one IPv4 group, in each way there is.
    fn each(slots: u16) -> impl Iterator<Item = Self> {
        let make = move |realise| Self::make(slots, Box::new(random::Random), realise, &["127.0.0.1:0"]);
        [Realise::Classic, Realise::Best].into_iter().filter_map(make)
    }

    fn extended(slots: u16, policy: Box<dyn Steering>) -> Option<Self> {
        Self::make(slots, policy, Realise::Best, &["127.0.0.1:0"])
    }

    fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addresses[0]).unwrap()
    }

    /// Connects, and accepts all; how many each slot got. In parts that fit into a queue of any length.
    fn spread(&self, connections: usize) -> Vec<usize> {
        let mut counts = vec![0; self.groups[0].len()];
        for part in (0..connections).collect::<Vec<_>>().chunks(100) {
            let _clients: Vec<_> = part.iter().map(|_| self.connect()).collect();
            for (sum, count) in counts.iter_mut().zip(accept_all(&self.groups[0], part.len())) {
                *sum += count;
            }
            self.rest();
        }
        counts
    }

    /// Whoever slept has been awake, and has accepted.
    fn rest(&self) {
        for slot in 0..self.groups[0].len() as u16 {
            let heartbeat = self.kernel.heartbeats().of(slot);
            if heartbeat.busy_for(Instant::now()).is_none() {
                heartbeat.asleep();
            }
        }
    }
}

fn members(groups: &[Vec<OwnedFd>]) -> Vec<Members<'_>> {
    groups.iter().map(|listeners| Members { listeners, sockets: None }).collect()
}

/// Whether the kernel should let us load programs: then what does not load is a defect and not skipped.
fn privileged() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let capabilities = u64::from_str_radix(capabilities.trim(), 16).unwrap();
    let (net_admin, bpf) = (1 << 12, 1 << 39);
    // Containers may take the system call away from a process that has them.
    capabilities & net_admin != 0 && capabilities & bpf != 0 && crate::sys::bpf::shared_words(1, 1).is_ok()
}

fn equal(slots: &[u16]) -> Vec<Share> {
    weighted(&slots.iter().map(|slot| (*slot, 1)).collect::<Vec<_>>())
}

fn weighted(shares: &[(u16, u16)]) -> Vec<Share> {
    shares.iter().map(|(slot, weight)| Share { slot: *slot, weight: *weight }).collect()
}

/// Accepts `expected` connections, waiting for each; how many each slot got.
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
    for mut fixture in Fixture::each(4) {
        for active in [vec![2], vec![0, 3], vec![3, 1], vec![0, 1, 2, 3]] {
            fixture.table.set_active(&active).unwrap();
            let counts = fixture.spread(60);
            for slot in 0..4 {
                // With four slots a slot stays empty in one of 10^7 runs.
                assert_eq!(counts[usize::from(slot)] > 0, active.contains(&slot));
            }
        }
    }
}

#[test]
fn connections_are_spread_by_weight() {
    for mut fixture in Fixture::each(4) {
        fixture.table.set(weighted(&[(3, 60), (0, 30), (1, 10), (2, 0)])).unwrap();
        let counts = fixture.spread(1000);
        // Five standard deviations and more of each.
        assert_eq!(counts[2], 0);
        let around = |count: usize, expected: usize| count.abs_diff(expected) < 80;
        assert!(around(counts[0], 300) && around(counts[1], 100) && around(counts[3], 600), "{counts:?}");
    }
}

#[test]
fn with_no_active_slot_the_program_before_stays() {
    for mut fixture in Fixture::each(3) {
        fixture.table.set_active(&[1]).unwrap();
        fixture.table.set_active(&[]).unwrap();
        fixture.table.set(weighted(&[(0, 0), (2, 0)])).unwrap();
        assert_eq!(fixture.table.in_force(), Some(&equal(&[1])[..]));
        assert_eq!(fixture.spread(10), [0, 10, 0]);
    }
}

#[test]
fn a_slot_that_does_not_exist_is_refused_and_nothing_changes() {
    for mut fixture in Fixture::each(2) {
        fixture.table.set_active(&[1]).unwrap();
        let error = fixture.table.set_active(&[0, 2]).unwrap_err();
        assert!(error.to_string().contains("slot 2"), "{error}");
        assert_eq!(fixture.table.in_force(), Some(&equal(&[1])[..]));
        assert_eq!(fixture.spread(10), [0, 10]);
    }
}

#[test]
fn order_and_repetition_do_not_matter_and_weights_are_in_lowest_terms() {
    for mut fixture in Fixture::each(3) {
        fixture.table.set_active(&[2, 0, 2]).unwrap();
        assert_eq!(fixture.table.in_force(), Some(&equal(&[0, 2])[..]));
        fixture.table.set(weighted(&[(2, 30), (1, 5), (2, 10), (0, 20)])).unwrap();
        assert_eq!(fixture.table.in_force(), Some(&weighted(&[(0, 4), (1, 1), (2, 6)])[..]));
    }
}

#[test]
fn a_single_slot_needs_no_program() {
    for mut fixture in Fixture::each(1) {
        fixture.table.set_active(&[0]).unwrap();
        assert_eq!((fixture.spread(1), fixture.table.realisation()), (vec![1], "nothing"));
    }
}

#[test]
fn a_failure_says_what_was_attempted_and_is_not_taken_for_success() {
    for mut fixture in Fixture::each(2) {
        let plain = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let group = std::mem::replace(&mut fixture.table.groups[0], plain.into());
        let error = fixture.table.set_active(&[1]).unwrap_err();
        assert!(error.to_string().contains("'random' steering program"), "{error}");
        assert_eq!(fixture.table.in_force(), None);
        assert!(fixture.table.set_active(&[1]).is_err());
        fixture.table.groups[0] = group;
        fixture.table.set_active(&[1]).unwrap();
        assert_eq!(fixture.spread(10), [0, 10]);
    }
}

#[test]
fn random_spreads_evenly_over_four() {
    for mut fixture in Fixture::each(4) {
        fixture.table.set_active(&[0, 1, 2, 3]).unwrap();
        let counts = fixture.spread(400);
        // 15 % to 35 % of 400 is 4.6 standard deviations.
        assert!(counts.iter().all(|count| (60..=140).contains(count)), "{counts:?}");
    }
}

#[test]
fn changing_the_table_under_traffic_loses_no_connection() {
    const CONNECTS: usize = 600;
    for Fixture { groups, addresses, mut table, .. } in Fixture::each(4) {
        std::thread::scope(|scope| {
            let clients = scope.spawn(move || {
                let connect = |_| TcpStream::connect(addresses[0]).unwrap();
                (0..CONNECTS).map(connect).collect::<Vec<_>>()
            });
            let accepted = scope.spawn(|| accept_all(&groups[0], CONNECTS));
            let sets = [equal(&[0]), equal(&[1, 3]), weighted(&[(2, 1), (3, 7)]), equal(&[0, 1, 2, 3])];
            let mut changes = 0;
            for set in sets.iter().cycle() {
                if accepted.is_finished() {
                    break;
                }
                table.set(set.iter().copied()).unwrap();
                changes += 1;
            }
            assert!(changes > 4, "only {changes} changes");
            assert_eq!(accepted.join().unwrap().iter().sum::<usize>(), CONNECTS);
            assert_eq!(clients.join().unwrap().len(), CONNECTS);
        });
    }
}

#[test]
fn every_address_of_either_family_gets_the_table() {
    for realise in [Realise::Classic, Realise::Best] {
        let listen = ["127.0.0.1:0", "127.0.0.1:0", "[::1]:0"];
        let random = || Box::new(random::Random);
        let Some(mut fixture) =
            Fixture::make(3, random(), realise, &listen).or_else(|| Fixture::make(3, random(), realise, &listen[..2]))
        else {
            continue;
        };
        for slot in [1, 2] {
            fixture.table.set_active(&[slot]).unwrap();
            for (group, address) in fixture.groups.iter().zip(&fixture.addresses) {
                let _clients: Vec<_> = (0..8).map(|_| TcpStream::connect(address).unwrap()).collect();
                let counts = accept_all(group, 8);
                assert_eq!(counts[usize::from(slot)], 8, "{address}");
            }
        }
    }
}

#[test]
fn the_kernel_takes_the_longest_programs() {
    for name in ["random", "hash", "least-loaded"] {
        for realise in [Realise::Classic, Realise::Best] {
            let policy = || by_name(name, 1).unwrap();
            let Some(mut fixture) = Fixture::make(2, policy(), realise, &["127.0.0.1:0"]) else { continue };
            assert_eq!(fixture.table.policy(), name);
            match fixture.table.way {
                Way::Classic { .. } => fixture.table.slots = SLOTS_MAX,
                Way::Extended { ref mut programs, .. } => {
                    let (_heartbeats, map) = Heartbeats::in_map(SLOTS_MAX).unwrap();
                    let mut none = [Members { listeners: &[], sockets: None }];
                    *programs = Extended::load(policy().draw(), SLOTS_MAX, &mut none, &map).unwrap();
                    fixture.table.slots = SLOTS_MAX;
                }
                Way::Nothing => panic!("nobody asked for that"),
            }
            let scattered = (0..SLOTS_MAX).step_by(2).map(|slot| Share { slot, weight: 1 + slot % 7 });
            fixture.table.set(scattered.clone()).unwrap();
            fixture.table.set(scattered.map(|share| Share { slot: share.slot + 1, ..share })).unwrap();
        }
    }
    assert!(by_name("fair", 1).is_none());
}

#[test]
fn a_slot_with_a_stale_heartbeat_gets_nothing_while_another_is_fresh() {
    for policy in ["random", "hash"] {
        let Some(mut fixture) = Fixture::extended(4, by_name(policy, 3).unwrap()) else { return };
        // Half of the time that this machine is up: no pause of this test makes a fresh one stale.
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = uptime.split_whitespace().next().unwrap().parse().unwrap();
        fixture.table.set_stale_after(Duration::from_secs_f64(uptime / 2.0));
        fixture.table.set_active(&[0, 1, 2, 3]).unwrap();
        let now = Instant::now();
        let beat = |slot| fixture.kernel.heartbeats().of(slot);
        let long_ago = || now.checked_sub(Duration::from_secs_f64(0.9 * uptime)).unwrap();
        beat(1).busy(long_ago());
        beat(2).busy(now);
        let counts = fixture.spread(200);
        assert!(counts[1] == 0 && counts[0] > 0 && counts[2] > 0 && counts[3] > 0, "{policy}: {counts:?}");

        // Three stale ones, and the fresh one is found every time.
        beat(0).busy(long_ago());
        beat(3).busy(long_ago());
        assert_eq!(fixture.spread(100), [0, 0, 100, 0], "{policy}");

        // All stale: by weight as ever.
        beat(2).busy(long_ago());
        let counts = fixture.spread(200);
        assert!(counts.iter().all(|count| *count > 0), "{policy}: {counts:?}");

        beat(1).asleep();
        assert_eq!(fixture.spread(60), [0, 60, 0, 0], "{policy}");
    }
}

#[test]
fn one_that_sleeps_and_does_not_wake_gets_no_more_than_a_few_where_all_others_are_stale() {
    for policy in ["random", "hash"] {
        let Some(mut fixture) = Fixture::extended(4, by_name(policy, 3).unwrap()) else { return };
        fixture.table.set_stale_after(Duration::from_millis(1));
        fixture.table.set_active(&[0, 1, 2, 3]).unwrap();
        let begun = Instant::now();
        (1..4).for_each(|slot| fixture.kernel.heartbeats().of(slot).busy(begun));
        while begun.elapsed() <= Duration::from_millis(2) {
            std::thread::yield_now();
        }
        for _ in 0..2 {
            // In one go: nobody accepts meanwhile.
            let _clients: Vec<_> = (0..364).map(|_| fixture.connect()).collect();
            let counts = accept_all(&fixture.groups[0], 364);
            // 64, and a quarter of the other 300: 139 with a standard deviation of 7.5.
            assert!((100..180).contains(&counts[0]), "{policy}: {counts:?}");
            fixture.rest();
        }
    }
}

#[test]
fn heartbeats_go_stale_after_the_limit() {
    let Some(mut fixture) = Fixture::extended(2, Box::new(random::Random)) else { return };
    fixture.table.set_active(&[0, 1]).unwrap();
    let heartbeat = fixture.kernel.heartbeats().of(0);
    let begun = Instant::now();
    heartbeat.busy(begun);
    // 20 ms unless told otherwise. A connection that was made later than that did not meet the slot.
    while begun.elapsed() <= Duration::from_millis(21) {
        std::thread::yield_now();
    }
    assert_eq!(fixture.spread(50), [0, 50]);
    fixture.table.set_stale_after(Duration::from_secs(3600));
    assert!(fixture.spread(50)[0] > 0);
}

#[test]
fn least_loaded_evens_out_connections_that_stay() {
    for realise in [Realise::Classic, Realise::Best] {
        let policy = Box::new(least_loaded::LeastLoaded);
        let Some(mut fixture) = Fixture::make(4, policy, realise, &["127.0.0.1:0"]) else { continue };
        let mut open = [0_u64; 4];
        // What comes between two samples when 500, and then 1,000, come within three seconds.
        for (connections, sample) in [(500, 17), (1000, 33)] {
            for already in (0..connections).step_by(sample) {
                let load = |slot| SlotLoad { slot, open: open[usize::from(slot)], ..SlotLoad::default() };
                fixture.table.set_loads(&[0, 1, 2, 3].map(load)).unwrap();
                let counts = fixture.spread(sample.min(connections - already));
                open.iter_mut().zip(counts).for_each(|(open, count)| *open += count as u64);
            }
            if connections == 500 {
                // One is restarted.
                open[2] = 0;
            }
        }
        let (least, most) = (open.iter().min().unwrap(), open.iter().max().unwrap());
        assert!(*most as f64 / *least as f64 <= 1.25, "{open:?}");
        assert_eq!(fixture.table.refresh(), Some(Duration::from_millis(100)));
    }
}

#[test]
fn a_full_slot_gets_nothing_with_any_policy() {
    for policy in ["random", "hash", "least-loaded"] {
        let policy = by_name(policy, 1).unwrap();
        let Some(mut fixture) = Fixture::make(3, policy, Realise::Best, &["127.0.0.1:0"]) else { return };
        let load = |slot| SlotLoad { slot, full: slot == 1, ..SlotLoad::default() };
        fixture.table.set_loads(&[0, 1, 2].map(load)).unwrap();
        let counts = fixture.spread(60);
        assert!(counts[1] == 0 && counts[0] > 0 && counts[2] > 0, "{counts:?}");
    }
}

/// In a process of its own, since other tests open descriptors at the same time.
#[test]
fn a_table_gives_back_its_descriptors_and_its_memory() {
    const NAME: &str = "steering::tests::a_table_gives_back_its_descriptors_and_its_memory";
    if std::env::var_os("RINGLEADER_ALONE").is_none() {
        let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
        let status = alone.args(["--exact", NAME, "--test-threads=1"]).env("RINGLEADER_ALONE", "1").status().unwrap();
        assert!(status.success());
        return;
    }
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mappings = || {
        let all = std::fs::read_to_string("/proc/self/maps").unwrap();
        all.lines().filter(|line| line.contains("bpf-map")).count()
    };
    let before = descriptors();
    for _ in 0..100 {
        for mut fixture in Fixture::each(4) {
            fixture.table.set_active(&[1, 2]).unwrap();
        }
    }
    assert_eq!((descriptors(), mappings()), (before, 0));
}

#[test]
fn a_slot_whose_listener_has_closed_leaves_its_part_to_the_others() {
    let Some(mut fixture) = Fixture::extended(3, Box::new(random::Random)) else { return };
    fixture.table.set_active(&[0, 1, 2]).unwrap();
    fixture.groups[0].remove(2);
    let counts = fixture.spread(60);
    assert!(counts[0] > 0 && counts[1] > 0, "{counts:?}");
    // None left in the table: the kernel's own hash decides.
    fixture.table.set_active(&[2]).unwrap();
    assert_eq!(fixture.spread(20).iter().sum::<usize>(), 20);
}

/// The table of a process that takes the listeners over, as far as the kernel can tell.
fn successor(fixture: &Fixture, sockets: Vec<Option<OwnedFd>>, kernel: &Kernel) -> Table {
    let groups = fixture.groups.iter().zip(sockets).map(|(listeners, sockets)| Members { listeners, sockets });
    Table::new(Box::new(random::Random), fixture.table.slots, groups.collect(), kernel).unwrap()
}

#[test]
fn a_successor_with_the_socket_array_takes_over_and_can_be_taken_over_from() {
    let Some(mut fixture) = Fixture::extended(3, Box::new(random::Random)) else { return };
    fixture.table.set_active(&[0]).unwrap();
    let arrays = fixture.table.socket_arrays();
    let arrays = arrays.iter().map(|array| Some(array.try_clone_to_owned().unwrap())).collect();
    let kernel = Kernel::probe(3, Realise::Best);
    let mut next = successor(&fixture, arrays, &kernel);
    assert_eq!(next.realisation(), "eBPF");
    // Until it has something to say, nothing changes.
    assert_eq!(fixture.spread(10), [10, 0, 0]);
    next.set_active(&[1]).unwrap();
    assert_eq!(fixture.spread(10), [0, 10, 0]);
    // It fails, and the old one goes on.
    fixture.table.forget();
    fixture.table.set_active(&[0]).unwrap();
    drop(next);
    assert_eq!(fixture.spread(10), [10, 0, 0]);
    fixture.table.set_active(&[2]).unwrap();
    assert_eq!(fixture.spread(10), [0, 0, 10]);
}

#[test]
fn a_successor_without_the_socket_array_of_a_living_predecessor_steers_by_classic_bpf() {
    let Some(mut fixture) = Fixture::extended(3, Box::new(random::Random)) else { return };
    fixture.table.set_active(&[0]).unwrap();
    let kernel = Kernel::probe(3, Realise::Best);
    let mut next = successor(&fixture, vec![None], &kernel);
    assert_eq!(next.realisation(), "classic BPF");
    assert!(next.reason().unwrap().contains("another process"), "{:?}", next.reason());
    next.set_active(&[1]).unwrap();
    assert_eq!(fixture.spread(10), [0, 10, 0]);
    fixture.table.forget();
    fixture.table.set_active(&[0]).unwrap();
    assert_eq!(fixture.spread(10), [10, 0, 0]);
}

#[test]
fn a_successor_of_a_dead_predecessor_takes_its_listeners_back_from_the_program_it_left() {
    let Some(mut fixture) = Fixture::extended(3, Box::new(random::Random)) else { return };
    fixture.table.set_active(&[0]).unwrap();
    let kernel = Kernel::probe(3, Realise::Best);
    let listeners = Fixture { groups: std::mem::take(&mut fixture.groups), ..fixture };
    let Fixture { groups, addresses, kernel: old_kernel, table } = listeners;
    drop((table, old_kernel));
    let mut next = Table::new(Box::new(random::Random), 3, members(&groups), &kernel).unwrap();
    if next.realisation() != "eBPF" {
        // The kernel's worker was not in time on this busy machine; then it says so, and classic BPF steers.
        assert!(next.reason().unwrap().contains("another process"));
    }
    next.set_active(&[1]).unwrap();
    let fixture = Fixture { groups, addresses, kernel, table: next };
    assert_eq!(fixture.spread(10), [0, 10, 0]);
}

#[test]
fn without_the_privilege_there_is_a_reason_in_words() {
    let reason = why_not(&io::Error::from_raw_os_error(libc::EPERM));
    assert!(reason.contains("CAP_BPF") && reason.contains("seccomp"));
    assert!(why_not(&io::Error::from_raw_os_error(libc::ENOSYS)).contains("no bpf system call"));
    let kernel = Kernel::probe(2, Realise::Classic);
    let groups = [bind_group("127.0.0.1:0".parse().unwrap(), 2, &ListenOptions::default()).unwrap()];
    let table = Table::new(Box::new(random::Random), 2, members(&groups), &kernel).unwrap();
    assert_eq!((table.realisation(), table.reason()), ("classic BPF", Some("classic BPF was asked for")));
    assert!(table.socket_arrays().is_empty());
}
