//! Steering by extended BPF against classic: what a change of the table costs, and what the program adds to a connect.
//!
//! Held equal: the listeners, the weights, one client that connects and closes, one connection at a time. A connect on
//! loopback runs the program within the client's system call. Accepting is not counted. Without CAP_BPF and
//! CAP_NET_ADMIN the extended half is left out.

mod support;

use std::net::TcpStream;
use std::time::Instant;

use ringleader::internals::Steered;
use support::{Rival, compare};

const CHANGES: u32 = 2_000;
const CONNECTS: u32 = 1_000;
/// Below the backlog of one listener, if all should go to one.
const PART: u32 = 100;

fn equal(slots: u16) -> impl Iterator<Item = u16> {
    (0..slots).map(|_| 1)
}

fn unequal(slots: u16, step: u16) -> impl Iterator<Item = u16> {
    (0..slots).map(move |slot| 8 + (slot * 7 + step) % 25)
}

fn change(steered: &mut Steered, slots: u16) -> f64 {
    let start = Instant::now();
    for step in 0..CHANGES as u16 {
        steered.set(unequal(slots, step)).expect("the table is taken");
    }
    start.elapsed().as_nanos() as f64 / f64::from(CHANGES) / 1e3
}

fn connect(steered: &Steered) -> f64 {
    let address = steered.address().expect("it listens");
    let mut nanoseconds = 0;
    for _ in 0..CONNECTS / PART {
        let start = Instant::now();
        let clients: Vec<_> = (0..PART).map(|_| TcpStream::connect(address).expect("it listens")).collect();
        nanoseconds += start.elapsed().as_nanos();
        // The client's end first, so that the port is not held in TIME_WAIT on the side that is reused.
        drop(clients);
        steered.empty();
    }
    nanoseconds as f64 / f64::from(CONNECTS) / 1e3
}

fn main() {
    for slots in [4, 64, 1024] {
        let both = [("classic BPF: a new program", false), ("eBPF: stores", true)];
        let rivals = both.into_iter().filter_map(|(name, extended)| {
            let mut steered = Steered::new(slots, "least-loaded", extended).expect("it can listen")?;
            Some((name, Box::new(move || change(&mut steered, slots)) as Box<dyn FnMut() -> f64>))
        });
        compare(&format!("a change of the weights of {slots} slots, one address"), "us", rivals.collect());
    }
    for slots in [4, 64] {
        let mut rivals: Vec<Rival<'_>> = Vec::new();
        let unsteered = Steered::new(slots, "random", false).expect("it can listen").expect("it needs no privilege");
        rivals.push(("no program: the kernel's hash", Box::new(move || connect(&unsteered))));
        for (name, policy, extended) in [
            ("classic BPF, random", "random", false),
            ("classic BPF, weights", "least-loaded", false),
            ("classic BPF, hash", "hash", false),
            ("eBPF, random", "random", true),
            ("eBPF, weights", "least-loaded", true),
            ("eBPF, hash", "hash", true),
        ] {
            let Some(mut steered) = Steered::new(slots, policy, extended).expect("it can listen") else { continue };
            let set = if policy == "least-loaded" { steered.set(unequal(slots, 0)) } else { steered.set(equal(slots)) };
            set.expect("the table is taken");
            rivals.push((name, Box::new(move || connect(&steered))));
        }
        compare(&format!("a connect to {slots} slots"), "us", rivals);
    }
}
