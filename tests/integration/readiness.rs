//! Whether the server is fit to take traffic, as load balancers see it.

use crate::support::{Client, Process, eventually, spawn};

/// What a probe over a connection of its own is told.
fn probe(server: &Process, path: &str) -> (u16, String) {
    let answer = server.connect().get(path);
    (answer.status, answer.text().to_owned())
}

fn ready() -> (u16, String) {
    (200, "ready".to_owned())
}

fn not_ready() -> (u16, String) {
    (503, "not ready".to_owned())
}

#[test]
fn during_the_drain_delay_probes_fail_and_requests_are_answered() {
    let mut server = spawn(&[], &["--executors", "2", "--drain-delay", "3600"]);
    let mut kept = server.connect();
    assert_eq!(kept.get("/ready").status, 200);
    assert_eq!(probe(&server, "/ready"), ready());
    server.signal(libc::SIGTERM);
    server.wait_for_line("not ready: the server stops");
    eventually("a probe is told", || probe(&server, "/ready") == not_ready());
    let refused = kept.get("/ready");
    assert_eq!((refused.status, refused.text()), (503, "not ready"));
    assert_eq!(refused.header("cache-control"), Some("no-store"));
    for _ in 0..8 {
        assert_eq!(probe(&server, "/").0, 200, "connections are accepted and answered as before");
    }
    server.signal(libc::SIGTERM);
    server.wait().expect(3, &["second signal"]);
}

#[test]
fn with_more_than_half_of_the_executors_quarantined_probes_fail_and_with_all_the_server_does() {
    let mut server = spawn(&[], &["--executors", "3", "--chaos", "--quarantine-after", "1"]);
    assert_eq!(probe(&server, "/ready"), ready());
    let mut first = server.connect();
    first.ask("/chaos/escape");
    server.wait_for_line("the slot is quarantined");
    eventually("the others are asked", || probe(&server, "/ready") == ready());
    let mut second = server.connect();
    second.ask("/chaos/escape");
    server.wait_for_line("not ready: too many");
    eventually("a probe is told", || probe(&server, "/ready") == not_ready());
    assert_eq!(probe(&server, "/").0, 200, "the third executor serves");
    server.connect().ask("/chaos/escape");
    server.wait().expect(1, &["every executor failed too often and was given up"]);
}

#[test]
fn how_many_may_be_unfit_is_the_operators_choice() {
    let strict = ["--executors", "4", "--chaos", "--quarantine-after", "1", "--unfit-max", "0"];
    let server = spawn(&[], &strict);
    assert_eq!(probe(&server, "/ready"), ready());
    server.connect().ask("/chaos/escape");
    eventually("one is too many", || probe(&server, "/ready") == not_ready());

    let mut lenient = strict;
    lenient[6] = "1";
    let mut server = spawn(&[], &lenient);
    for slot in 0..3 {
        server.connect().ask("/chaos/escape");
        server.wait_for_line("the slot is quarantined");
        eventually(&format!("{slot} and all before are out"), || probe(&server, "/ready") == ready());
    }
    assert_eq!(probe(&server, "/ready"), ready(), "three of four are not too many");
}

/// A connection to each of two executors.
fn one_each(server: &Process) -> [Client; 2] {
    let mut clients = [server.connect(), server.connect()];
    let executor = |client: &mut Client| client.get("/whoami").text().split(',').next().map(str::to_owned);
    let first = executor(&mut clients[0]);
    eventually("the other executor answers", || {
        clients[1] = server.connect();
        executor(&mut clients[1]) != first
    });
    clients
}

#[test]
fn a_stall_counts_against_readiness_after_the_time_that_was_given() {
    let server = spawn(&[], &["--executors", "2", "--chaos", "--unfit-max", "0", "--stalled-after", "0.2"]);
    let [mut stalled, mut other] = one_each(&server);
    assert_eq!(other.get("/ready").status, 200);
    stalled.ask("/chaos/block?ms=60000");
    eventually("one that is stalled is too many", || other.get("/ready").status == 503);

    let lenient = ["--executors", "2", "--chaos", "--unfit-max", "0", "--stalled-after", "1000000"];
    let mut server = spawn(&[], &lenient);
    let [mut stalled, mut other] = one_each(&server);
    stalled.ask("/chaos/block?ms=2000");
    server.wait_for_line("an executor is stalled");
    assert_eq!(stalled.answer().status, 200);
    assert_eq!(other.get("/ready").status, 200);
    server.signal(libc::SIGTERM);
    let printed = server.wait().printed;
    assert!(!printed.contains("not ready: too many"), "two seconds are not that long: {printed}");
}

#[test]
fn files_keep_their_names_unless_a_path_for_probes_is_given() {
    let root = std::env::temp_dir().join(format!("ringleader-probed-{}", std::process::id()));
    std::fs::create_dir_all(&root).expect("there is room");
    std::fs::write(root.join("ready"), "a file").expect("there is room");
    let path = root.display().to_string();
    let server = spawn(&[], &["--executors", "1", "--root", &path]);
    assert_eq!(probe(&server, "/ready"), (200, "a file".to_owned()));
    let server = spawn(&[], &["--executors", "1", "--root", &path, "--ready-path", "/-/ready"]);
    assert_eq!(probe(&server, "/ready"), (200, "a file".to_owned()));
    assert_eq!(probe(&server, "/-/ready"), ready());
    std::fs::remove_dir_all(&root).expect("it is ours");
}
