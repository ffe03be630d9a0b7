//! Signals to the command.

use std::process::{Command, Stdio};

use crate::support::{Client, Process, eventually, expect_refusal, spawn};

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

#[test]
fn a_second_signal_when_there_is_nothing_to_cut_off_is_no_failure() {
    let mut server = spawn(&[], &["--drain-delay", "3600"]);
    server.signal(libc::SIGTERM);
    server.wait_for_line("draining");
    server.signal(libc::SIGINT);
    server.wait().expect(0, &["second signal", "drained=true"]);
}

#[test]
fn two_signals_at_once_are_no_failure_either() {
    let server = spawn(&[], &[]);
    // Both are there when it goes on.
    server.signal(libc::SIGSTOP);
    server.signal(libc::SIGTERM);
    server.signal(libc::SIGINT);
    server.signal(libc::SIGCONT);
    server.wait().expect(0, &["drained=true"]);
}

#[test]
fn a_stop_that_comes_during_the_start_is_no_failure() {
    let mut command = Command::new("strace");
    // Each ring takes a second, and an executor has several. `-D`: the child is the command, and not strace.
    command.args(["-D", "-f", "-o", "/dev/null", "-e", "trace=io_uring_setup"]);
    command.args(["-e", "inject=io_uring_setup:delay_enter=1000000", env!("CARGO_BIN_EXE_ringleader")]);
    command.args(["serve", "--listen", "127.0.0.1:0", "--executors", "1"]).stdin(Stdio::null());
    let server = Process::of(&mut command);
    eventually("signals are watched for, and the executor starts", || server.has_thread("signals"));
    server.signal(libc::SIGTERM);
    server.wait().expect(0, &["stopped before it had started"]);
}

#[test]
fn an_executor_that_fails_during_the_drain_is_in_the_exit_status() {
    let mut server = spawn(&[], &["--executors", "1", "--chaos"]);
    let (mut waiting, mut falls) = (server.connect(), server.connect());
    for client in [&mut waiting, &mut falls] {
        assert_eq!(client.get("/").status, 200);
    }
    waiting.ask("/chaos/sleep?ms=60000");
    // Its head has begun: the drain waits for the rest of it.
    falls.send("GET /chaos/escape HTTP/1.1\r\n");
    server.signal(libc::SIGTERM);
    server.wait_for_line("draining");
    falls.send("host: test\r\n\r\n");
    waiting.expect_end();
    server.wait().expect(3, &["1 executors failed during the drain"]);
}
