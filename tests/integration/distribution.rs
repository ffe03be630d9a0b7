//! Load on all executors, and listening on more than one address.

use std::collections::HashMap;

use crate::support::{Client, Process, spawn};

/// Number of the executor in an answer of `/whoami`.
fn executor(whoami: &str) -> usize {
    let digits = whoami.split("\"executor\":").nth(1).expect("it names its executor");
    digits.split(',').next().unwrap_or_default().parse().expect("a number")
}

/// How many of `count` fresh connections each executor answers.
fn spread(server: &Process, count: usize) -> HashMap<usize, usize> {
    let mut spread = HashMap::new();
    for _ in 0..count {
        let answer = server.connect().get("/whoami");
        assert_eq!(answer.status, 200);
        *spread.entry(executor(answer.text())).or_default() += 1;
    }
    spread
}

#[test]
fn four_executors_get_a_fair_share_each() {
    for steering in ["random", "hash", "least-loaded"] {
        let server = spawn(&[], &["--executors", "4", "--steering", steering]);
        let spread = spread(&server, 400);
        assert_eq!(spread.len(), 4, "{steering}: {spread:?}");
        for (executor, count) in &spread {
            assert!((60..=140).contains(count), "{steering}: executor {executor} of {spread:?}");
        }
    }
}

#[test]
fn many_executors_serve_on_few_processors() {
    let server = spawn(&[], &["--executors", "16"]);
    let spread = spread(&server, 400);
    assert_eq!(spread.len(), 16, "{spread:?}");
}

#[test]
fn every_address_is_served_by_every_executor() {
    let server = spawn(&[], &["--executors", "2", "--listen", "127.0.0.1:0", "--listen", "[::1]:0"]);
    let [v4, v6] = server.addresses() else { panic!("two addresses, not {:?}", server.addresses()) };
    assert!(v4.is_ipv4() && v6.is_ipv6());
    for address in [*v4, *v6] {
        let seen: std::collections::HashSet<usize> =
            (0..40).map(|_| executor(Client::connect(address).get("/whoami").text())).collect();
        assert_eq!(seen.len(), 2, "{address}");
    }
}
