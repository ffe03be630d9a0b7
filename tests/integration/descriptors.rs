//! What happens when file descriptors run out.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{Client, eventually, spawn};

#[test]
fn without_descriptors_connections_are_closed_with_a_count_and_served_again_when_some_are_free() {
    let mut server = spawn(&[], &["--executors", "2"]);
    let mut early = server.connect();
    assert_eq!(early.get("/").status, 200);
    // Room for twenty more, though the server believes it has room for thousands.
    server.limit_descriptors(server.descriptors().len() as u64 + 20);
    let mut clients: Vec<Client> = (0..100).map(|_| server.connect()).collect();
    server.wait_for_line("ran out of resources");
    let (before, start) = (server.cpu_time(), Instant::now());
    let mut shed = 0;
    for client in &mut clients {
        // Those that are shed may find out while sending or while reading.
        let answered = client.try_send("GET / HTTP/1.1\r\nhost: test\r\n\r\n").and_then(|()| client.try_answer());
        match answered {
            Ok(answer) => assert_eq!(answer.status, 200),
            Err(error) => {
                assert!(error.kind() != io::ErrorKind::WouldBlock, "neither served nor closed");
                shed += 1;
            }
        }
    }
    assert!((60..=100).contains(&shed), "{shed} of 100 were closed");
    assert_eq!(early.get("/").status, 200, "who is connected is served");
    // Clients go on knocking, in vain.
    while start.elapsed() < Duration::from_secs(1) {
        let mut client = server.connect();
        let _ = client.try_send("GET / HTTP/1.1\r\nhost: test\r\n\r\n").and_then(|()| client.try_answer());
    }
    let (used, passed) = (server.cpu_time() - before, start.elapsed());
    assert!(used < passed / 2, "{used:?} of processor time within {passed:?}: it spins");
    drop(clients);
    eventually("new connections are served again", || {
        let mut client = server.connect();
        client.try_send("GET / HTTP/1.1\r\nhost: test\r\n\r\n").and_then(|()| client.try_answer()).is_ok()
    });
    for _ in 0..20 {
        assert_eq!(server.connect().get("/").status, 200);
    }
}

/// Executors that run out at the same time must not take the descriptors from each other with which they close what
/// waits: one that has none left would leave its queue waiting until something closes.
#[test]
fn executors_that_run_out_together_leave_nobody_waiting() {
    const ROUNDS: usize = 40;
    const THREADS: usize = 4;
    const CLIENTS: usize = 32;
    let server = spawn(&[], &["--executors", "4"]);
    let idle = server.descriptors();
    server.limit_descriptors(idle.len() as u64 + 8);
    let address = server.address();
    // Served or closed; all stay connected until the last has been looked at.
    let hammer = move |round: usize| {
        let connect = |_| {
            let mut client = Client::connect(address);
            let _ = client.try_send("GET / HTTP/1.1\r\nhost: test\r\n\r\n");
            client
        };
        let mut clients: Vec<Client> = (0..CLIENTS).map(connect).collect();
        for client in &mut clients {
            if let Err(error) = client.try_answer() {
                assert!(error.kind() != io::ErrorKind::WouldBlock, "neither served nor closed in round {round}");
            }
        }
        clients
    };
    for round in 0..ROUNDS {
        let threads: Vec<_> = (0..THREADS).map(|_| thread::spawn(move || hammer(round))).collect();
        let clients: Vec<_> = threads.into_iter().map(thread::JoinHandle::join).collect();
        assert!(clients.iter().all(Result::is_ok), "somebody waited in vain");
    }
    eventually("new connections are served again", || {
        let mut client = server.connect();
        client.try_send("GET / HTTP/1.1\r\nhost: test\r\n\r\n").and_then(|()| client.try_answer()).is_ok()
    });
    eventually("every reserve is back, and nothing else is open", || server.descriptors() == idle);
}

/// The only executor falls by what `path` does while no descriptor can be had; two failures would have its slot quarantined.
fn outlasts_a_lack_of_descriptors(path: &str, attempt: &str) {
    let executors = ["--executors", "1", "--quarantine-after", "2", "--hang-timeout", "0.3", "--chaos"];
    let mut server = spawn(&[], &executors);
    let mut client = server.connect();
    assert_eq!(client.get("/whoami").status, 200);
    // Fewer than there are: not one can be opened, wherever there is a gap.
    let allowed = server.limit_descriptors_for_now(3);
    client.ask(path);
    for _ in 0..4 {
        let line = server.wait_for_line("an executor could not be started");
        for part in [attempt, "Too many open files", "raise the limit on open files", "it is tried again"] {
            assert!(line.contains(part), "no {part:?} in {line}");
        }
    }
    let mut waiting = server.connect();
    waiting.ask("/whoami");
    server.limit_descriptors_for_now(allowed);
    assert_eq!(waiting.answer().status, 200, "who came meanwhile is served");
}

#[test]
fn an_executor_that_cannot_have_a_ring_is_tried_again_until_it_can() {
    outlasts_a_lack_of_descriptors("/chaos/escape", "setting up the executor's io_uring");
}

#[test]
fn an_executor_that_cannot_have_a_thread_is_tried_again_until_it_can() {
    outlasts_a_lack_of_descriptors("/chaos/spin?ms=60000", "starting an executor's thread");
}
