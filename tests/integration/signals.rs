//! Signals to the command.

use crate::support::{Client, Process, expect_refusal, spawn};

/// A server with a request under way, and its client.
fn busy(arguments: &[&str]) -> (Process, Client) {
    let server = spawn(&[], &[&["--executors", "2", "--chaos"], arguments].concat());
    let mut client = server.connect();
    // An answer to one request proves that the next on this connection is taken up, too.
    assert_eq!(client.get("/").status, 200);
    (server, client)
}

fn drains(signal: i32, name: &str) {
    let (mut server, mut client) = busy(&[]);
    // Long enough that the drain begins before it is over, on a machine that is slow, too.
    client.ask("/chaos/sleep?ms=4000");
    wait_until_in_flight(&server);
    server.signal(signal);
    server.wait_for_line(name);
    expect_refusal(server.address());
    let answer = client.answer();
    assert_eq!((answer.status, answer.text()), (200, "slept\n"));
    assert!(answer.closes());
    server.wait().expect(0, &["drained=true"]);
}

/// Each executor takes up what arrives in its order: an answer from every one of them to a later request says that the
/// earlier one is under way.
fn wait_until_in_flight(server: &Process) {
    for _ in 0..16 {
        assert_eq!(server.connect().get("/").status, 200);
    }
}

#[test]
fn sigterm_drains() {
    drains(libc::SIGTERM, "SIGTERM");
}

#[test]
fn sigint_drains() {
    drains(libc::SIGINT, "SIGINT");
}

#[test]
fn a_second_signal_stops_at_once() {
    let (mut server, mut client) = busy(&["--drain-timeout", "3600"]);
    client.ask("/chaos/sleep?ms=60000");
    wait_until_in_flight(&server);
    server.signal(libc::SIGTERM);
    server.wait_for_line("draining");
    server.signal(libc::SIGTERM);
    client.expect_end();
    server.wait().expect(3, &["second signal", "cut off"]);
}

#[test]
fn a_drain_on_a_signal_has_a_deadline() {
    let (server, mut client) = busy(&["--drain-timeout", "0.2"]);
    client.ask("/chaos/sleep?ms=60000");
    wait_until_in_flight(&server);
    server.signal(libc::SIGTERM);
    client.expect_end();
    server.wait().expect(3, &["cut off"]);
}

#[test]
fn an_idle_server_ends_at_once() {
    let server = spawn(&[], &[]);
    let idle = server.connect();
    server.signal(libc::SIGTERM);
    server.wait().expect(0, &["stopped"]);
    drop(idle);
}
