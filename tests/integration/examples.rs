//! The examples do what their first lines say. Each is started by itself, as a reader would.
//!
//! Each has an address of the loopback network to itself, so that none meets another, or somebody's server on port 8080.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::support::{Client, Process, eventually};

/// A running example, and where it listens.
struct Example {
    process: Process,
    address: SocketAddr,
}

/// Starts an example with `arguments` before the address; comes back when it accepts connections. `number` is its own.
fn start(name: &str, number: u8, arguments: &[&str]) -> Example {
    let [.., high, low] = std::process::id().to_be_bytes();
    let address = SocketAddr::from(([127, 100 + number, high, low], 8080));
    let internal = SocketAddr::new(address.ip(), 8081);
    let mut command = Command::new(binary(name));
    command
        .args(arguments)
        .args([address.to_string(), internal.to_string()])
        .env_remove("RUST_LOG")
        .stdin(Stdio::null());
    let process = Process::of(&mut command);
    eventually("the example accepts connections", || Client::try_connect(address).is_ok());
    Example { process, address }
}

/// cargo builds examples with the tests, into a directory beside the binary's.
fn binary(name: &str) -> PathBuf {
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_ringleader")).with_file_name("examples").join(name);
    assert!(binary.exists(), "{} is not there: `cargo test` builds it, or `cargo build --examples`", binary.display());
    binary
}

impl Example {
    fn get(&self, path: &str) -> String {
        let answer = Client::connect(self.address).get(path);
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        answer.text().to_owned()
    }

    /// It drains and ends when it is told to.
    fn end(self) {
        self.process.signal(libc::SIGTERM);
        let ended = self.process.wait();
        // That one executor answers does not mean that every one has started, and a stop before that is an error.
        let early = ended.printed.contains("the server was stopped before it had started");
        assert!(early || ended.status == Some(0), "{ended:?}");
    }
}

#[test]
fn hello_greets() {
    let example = start("hello", 0, &[]);
    assert!(example.get("/").starts_with("Hello, World!"));
    assert_eq!(Client::connect(example.address).get("/elsewhere").status, 404);
    example.end();
}

#[test]
fn executor_state_counts_on_each_executor() {
    let example = start("executor_state", 1, &[]);
    assert!(example.get("/").contains("(generation 1, "));
    example.end();
}

#[test]
fn static_files_serves_a_directory() {
    let example = start("static_files", 2, &[concat!(env!("CARGO_MANIFEST_DIR"), "/examples")]);
    assert!(example.get("/README.md").starts_with("# Examples, by question"));
    example.end();
}

#[test]
fn two_servers_tell_of_each_other_and_stop_together() {
    let example = start("two_servers", 3, &[]);
    assert_eq!(example.get("/"), "hello from the public server\n");
    let internal = SocketAddr::new(example.address.ip(), 8081);
    eventually("the internal server serves, too", || Client::try_connect(internal).is_ok());
    assert!(Client::connect(internal).get("/").text().contains("ExecutorStats"));
    assert_eq!(Client::connect(internal).get("/stop").status, 200);
    example.process.wait().expect(0, &["drained: true"]);
}

#[test]
fn background_does_something_beside_the_requests() {
    let example = start("background", 4, &[]);
    assert!(example.get("/").starts_with("42, after "));
    example.end();
}

#[cfg(feature = "glommio")]
#[test]
fn task_queues_compute_beside_the_requests() {
    let example = start("task_queues", 12, &[]);
    assert!(example.get("/").ends_with(" primes so far\n"));
    eventually("some are found between two requests", || !example.get("/").starts_with("0 "));
    example.end();
}

#[test]
fn blocking_waits_elsewhere() {
    let example = start("blocking", 5, &[]);
    assert_eq!(example.get("/primes"), "9592 primes are below 100000\n");
    example.end();
}

#[test]
fn in_tokio_stops_gracefully_when_it_is_asked_to() {
    let mut example = start("in_tokio", 6, &[]);
    let mut slow = Client::connect(example.address);
    slow.ask("/slow");
    example.process.wait_for_line("a slow request has begun");
    example.get("/stop");
    assert_eq!(slow.answer().status, 200);
    drop(slow);
    example.process.wait().expect(0, &["every connection finished in time: true"]);
}

#[test]
fn panics_restart_the_executor_at_the_third() {
    let example = start("panics", 7, &[]);
    assert_eq!(example.get("/"), "generation 1, 0 panics contained\n");
    for _ in 0..2 {
        assert_eq!(Client::connect(example.address).get("/panic").status, 500);
    }
    let mut last = Client::connect(example.address);
    last.ask("/panic");
    // With it goes the executor: whether the answer arrives is not what is tested here.
    let _ = last.try_answer();
    eventually("the executor is another one", || example.get("/").starts_with("generation 2, "));
    example.process.signal(libc::SIGTERM);
    // What it printed has the panics in it.
    assert_eq!(example.process.wait().status, Some(0));
}

#[test]
fn sharded_kv_keeps_values_wherever_they_come_in() {
    let example = start("sharded_kv", 9, &[]);
    let put = |text: &str| {
        let mut client = Client::connect(example.address);
        client.send(format!("PUT /{text} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n{text}", text.len()));
        client.answer().status
    };
    eventually("all four have started", || example.get("/").matches(": 0 keys").count() == 4);
    for key in ["one", "two", "three", "four"] {
        assert_eq!(put(key), 200);
        assert_eq!(example.get(&format!("/{key}")), key);
    }
    example.end();
}

#[cfg(all(feature = "axum", feature = "tokio"))]
#[test]
fn axum_app_keeps_packets_of_seeds() {
    let example = start("axum_app", 10, &[]);
    let mut client = Client::connect(example.address);
    let json = r#"{"name":"Beet","grams":20}"#;
    client.send(format!(
        "POST /packets HTTP/1.1\r\nhost: test\r\nauthorization: Bearer spade\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{json}",
        json.len()
    ));
    assert_eq!(client.answer().status, 201);
    assert_eq!(example.get("/packets/1"), r#"{"id":1,"version":1,"name":"Beet","grams":20}"#);
    assert_eq!(example.get("/demanding/report"), "the sum is 66\n");
    let here = example.get("/here");
    assert!(here.starts_with("executor ") && here.ends_with(" was asked 1 times\n"), "{here}");
    drop(client);
    example.end();
}

#[cfg(feature = "tokio")]
#[test]
fn tokio_client_passes_requests_and_their_bodies_on() {
    let example = start("tokio_client", 11, &[]);
    assert_eq!(example.get("/hello"), "upstream was asked for /hello\n");
    let mut client = Client::connect(example.address);
    let body = "seed".repeat(50_000);
    client.send(format!("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    assert!(client.answer().text() == body, "the body is what was sent");
    drop(client);
    example.end();
}

#[test]
fn scaling_follows_orders() {
    let example = start("scaling", 8, &[]);
    eventually("there is a handle", || Client::connect(example.address).get("/").status == 200);
    assert_eq!(example.get("/").matches("Serving").count(), 1);
    example.get("/scale/3");
    eventually("three serve", || example.get("/").matches("Serving").count() == 3);
    assert_eq!(Client::connect(example.address).get("/scale/9").status, 400);
    example.end();
}
