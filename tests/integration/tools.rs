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
fn the_built_in_application_is_read_only_but_for_its_echo() {
    let server = spawn(&[], &["--executors", "1"]);
    let mut client = server.connect();
    for path in ["/", "/json", "/whoami"] {
        for method in ["POST", "DELETE", "OPTIONS", "TRACE", "BREW"] {
            client.send(format!("{method} {path} HTTP/1.1\r\nhost: test\r\n\r\n"));
            let answer = client.answer();
            assert_eq!((answer.status, answer.header("allow")), (405, Some("get, head")), "{method} {path}");
        }
        assert_eq!(client.get(path).status, 200);
        client.send(format!("HEAD {path} HTTP/1.1\r\nhost: test\r\n\r\n"));
        assert_eq!(client.head().status, 200);
    }
    client.send("DELETE /echo HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\nhello");
    assert_eq!(client.answer().text(), "hello");
    client.send("DELETE /nowhere HTTP/1.1\r\nhost: test\r\n\r\n");
    assert_eq!(client.answer().status, 404);
}

#[test]
fn an_echo_tells_a_client_that_waits_for_it_to_send_its_body() {
    let server = spawn(&[], &["--executors", "1"]);
    for (framing, body) in [("content-length: 5", "hello"), ("transfer-encoding: chunked", "5\r\nhello\r\n0\r\n\r\n")] {
        let mut client = server.connect();
        client.send(format!("POST /echo HTTP/1.1\r\nhost: test\r\n{framing}\r\nexpect: 100-continue\r\n\r\n"));
        assert_eq!(client.head().head, "http/1.1 100 continue\r\n\r\n");
        client.send(body);
        let answer = client.answer();
        assert_eq!((answer.status, answer.text()), (200, "hello"));
        assert_eq!(answer.header("content-length").is_some(), framing.starts_with("content-length"));
    }
    let url = format!("http://{}/echo", server.address());
    let arguments = ["-sS", "-v", "--max-time", "10", "-H", "Expect: 100-continue", "-d", "hello", &url];
    let printed = output("curl", &arguments);
    assert!(printed.contains("< HTTP/1.1 100 Continue"), "{printed}");
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
