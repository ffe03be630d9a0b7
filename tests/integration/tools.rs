//! Other people's clients.

use std::process::{Command, Stdio};

use crate::support::{Process, pattern, spawn};

/// Runs a client to its end; what it printed.
fn output(program: &str, arguments: &[&str]) -> String {
    let ended = Process::of(Command::new(program).args(arguments).stdin(Stdio::null())).wait();
    assert_eq!(ended.status, Some(0), "{program} {arguments:?}: {}", ended.printed);
    ended.printed
}

#[test]
fn curl_gets_posts_and_asks_for_the_head() {
    let server = spawn(&[], &["--executors", "2"]);
    let url = |path: &str| format!("http://{}{path}", server.address());
    let curl = |arguments: &[&str]| output("curl", &[&["-sS", "--max-time", "10"], arguments].concat());
    assert_eq!(curl(&[&url("/")]), "Hello, World!");
    assert_eq!(curl(&["--http1.0", &url("/json")]), r#"{"message":"Hello, World!"}"#);
    assert!(curl(&["-I", &url("/")]).to_lowercase().contains("content-length: 13"));
    assert_eq!(curl(&["-d", "hello", &url("/echo")]), "hello");
    assert_eq!(curl(&["-H", "Transfer-Encoding: chunked", "-d", "in chunks", &url("/echo")]), "in chunks");
    let twice = curl(&["-w", " %{num_connects}\n", &url("/"), &url("/")]);
    assert_eq!(twice, "Hello, World! 1\nHello, World! 0", "one connection serves both");
}

#[test]
fn curl_gets_back_what_it_uploads() {
    let server = spawn(&[], &["--executors", "1", "--body-bytes", "0"]);
    let directory = std::env::temp_dir().join(format!("ringleader-{}", server.id()));
    std::fs::create_dir(&directory).expect("it is new");
    let (sent, received) = (directory.join("sent"), directory.join("received"));
    std::fs::write(&sent, pattern(20 * 1024 * 1024)).expect("there is room");
    let url = format!("http://{}/echo", server.address());
    // -T sends `Expect: 100-continue` with a body of this size.
    let (from, to) = (sent.display().to_string(), received.display().to_string());
    output("curl", &["-sS", "--max-time", "20", "-T", &from, "-o", &to, &url]);
    let same = std::fs::read(&sent).expect("it is there") == std::fs::read(&received).expect("it is there");
    std::fs::remove_dir_all(&directory).expect("it is ours");
    assert!(same, "the content is what was sent");
}

#[test]
fn pythons_client_keeps_its_connection() {
    let server = spawn(&[], &["--executors", "2"]);
    let script = "
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1], timeout=10)
for n in range(20):
    connection.request('POST', '/echo', body=str(n) * n)
    answer = connection.getresponse()
    assert answer.status == 200 and answer.read().decode() == str(n) * n, n
connection.request('GET', '/whoami')
print(connection.getresponse().read().decode())
";
    let whoami = output("python3", &["-c", script, &server.address().to_string()]);
    assert!(whoami.contains(r#""requests":21"#), "{whoami}");
}
