//! What is left behind: by restarts, by connections, and by whole servers. Each in a process of its own, whose
//! descriptors and threads nobody else changes.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use ringleader::Stop;

use crate::support::{Client, Process, Site, echo, eventually, local, settle, spawn};

const MIB: u64 = 1024 * 1024;

#[test]
fn restarts_leave_nothing_behind() {
    let server = spawn(&[], &["--executors", "2", "--chaos", "--quarantine-after", "0", "--restart-delay", "0"]);
    let fresh = server.descriptors();
    let mut bystanders: Vec<Client> = Vec::new();
    let mut escapes = |count: usize| {
        for _ in 0..count {
            let mut others: Vec<Client> = (0..6).map(|_| server.connect()).collect();
            for (index, client) in others.iter_mut().enumerate() {
                match index % 3 {
                    0 => client.ask("/"),
                    1 => client.send("POST /echo HTTP/1.1\r\nhost: test\r\ncontent-length: 1000\r\n\r\nhalf"),
                    _ => {}
                }
            }
            let mut client = server.connect();
            client.ask("/chaos/escape");
            // Whether its answer gets out before the panic is a matter of luck; the end comes for certain.
            let _ = client.try_answer();
            client.expect_end();
            bystanders = others;
        }
        bystanders.clear();
        eventually("all descriptors but those of a fresh server are closed", || server.descriptors() == fresh);
        (server.threads(), server.rss_bytes())
    };
    let (threads, rss) = escapes(10);
    let (threads_later, rss_later) = escapes(90);
    assert_eq!(threads_later, threads);
    assert!(rss_later < rss + 4 * MIB, "{rss} bytes have become {rss_later}");
}

#[test]
fn connections_leave_nothing_behind() {
    let server = spawn(&[], &["--executors", "2"]);
    let connections = |count: usize| {
        for index in 0..count {
            let mut client = server.connect();
            match index % 4 {
                0 => drop(client.get("/")),
                1 => {
                    client.ask("/");
                    client.reset();
                }
                2 => client.send("POST /echo HTTP/1.1\r\nhost: test\r\ncontent-length: 1000\r\n\r\nhalf"),
                _ => {}
            }
        }
    };
    let idle = server.descriptors();
    connections(400);
    eventually("all descriptors are closed", || server.descriptors() == idle);
    let rss = server.rss_bytes();
    connections(2000);
    eventually("all descriptors are closed", || server.descriptors() == idle);
    let later = server.rss_bytes();
    assert!(later < rss + 4 * MIB, "{rss} bytes have become {later}");
}

/// Set in the process that [`whole_servers_leave_nothing_behind_but_glommios_eventfd`] starts.
const ALONE: &str = "RINGLEADER_TEST_ALONE";

#[test]
fn whole_servers_leave_nothing_behind_but_glommios_eventfd() {
    let name = "leaks::whole_servers_leave_nothing_behind_but_glommios_eventfd";
    if std::env::var_os(ALONE).is_none() {
        let itself = std::env::current_exe().expect("it is running");
        let child = Process::of(Command::new(itself).args([name, "--exact", "--nocapture"]).env(ALONE, "1"));
        child.wait().expect(0, &["1 passed"]);
        return;
    }
    const EXECUTORS: usize = 2;
    let cycle = || {
        let site = Site::start(local(EXECUTORS).serve(async |_| Ok(ringleader::service_fn(echo))));
        let mut client = site.connect();
        assert_eq!(client.get("/").status, 200);
        settle(site.stop(Stop::Now)).expect("it stops");
        client.expect_end();
    };
    for _ in 0..3 {
        cycle();
    }
    let (before, threads) = (own_descriptors(), own_threads());
    // More for who wants to see the numbers:
    // RINGLEADER_TEST_ALONE=1 RINGLEADER_TEST_CYCLES=1000 cargo test --test integration whole_servers -- --nocapture
    let cycles = std::env::var("RINGLEADER_TEST_CYCLES").map_or(100, |count| count.parse().expect("a number"));
    for number in 1..=cycles {
        cycle();
        if [10, 100, 500, 1000].contains(&number) {
            let (open, rss) = (own_descriptors().values().sum::<usize>(), own_rss_bytes() / 1024);
            println!("after {number} servers: {open} descriptors, {} threads, {rss} KiB", own_threads());
        }
    }
    let mut after = own_descriptors();
    // glommio 0.9 leaks one eventfd for each executor that has ended.
    let eventfds = after.get_mut("anon_inode:[eventfd]").expect("there are some");
    let leaked = *eventfds - before.get("anon_inode:[eventfd]").copied().unwrap_or(0);
    assert!(leaked <= cycles * EXECUTORS, "{leaked} eventfds in {cycles} cycles");
    *eventfds -= leaked;
    assert_eq!(after, before);
    eventually("the last threads have ended", || own_threads() <= threads);
}

fn own_descriptors() -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd").expect("/proc is there") {
        let Ok(target) = fs::read_link(entry.expect("it can be read").path()) else { continue };
        let target = target.to_string_lossy().into_owned();
        // Sockets and pipes carry a number.
        let kind = if target.starts_with('/') || target.starts_with("anon") { target } else { kind_of(&target) };
        *kinds.entry(kind).or_default() += 1;
    }
    kinds
}

fn kind_of(target: &str) -> String {
    target.split(':').next().unwrap_or_default().to_owned()
}

fn own_threads() -> usize {
    fs::read_dir("/proc/self/task").expect("/proc is there").count()
}

fn own_rss_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc is there");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("it has some");
    let kib: u64 = line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number");
    kib * 1024
}
