//! Asks a server by hand, before it is measured: a fast wrong answer must not win.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use ringleader_peers::BODY;

const ANSWER_MAX: Duration = Duration::from_secs(2);
/// Ten times what two right answers take.
const BYTES_MAX: usize = 4096;

/// Checks a close and two pipelined requests. Returns the answer with its date blanked, for comparison
/// between servers: what is not the same bytes is not the same work.
pub fn check(port: u16) -> Result<String, String> {
    let closed = ask(port, "GET / HTTP/1.1\r\nHost: check\r\nConnection: close\r\n\r\n", None)
        .map_err(|error| format!("a request with `Connection: close`: {error}"))?;
    check_answer(&closed)?;
    let one = "GET / HTTP/1.1\r\nHost: check\r\n\r\n";
    let both = ask(port, &one.repeat(2), Some(2)).map_err(|error| format!("two pipelined requests: {error}"))?;
    let (first, second) = both.split_at(both.len() / 2);
    check_answer(first)?;
    check_answer(second)?;
    Ok(without_date(first))
}

/// Sends and reads until as many bodies have come, or else until the server closes.
fn ask(port: u16, request: &str, bodies: Option<usize>) -> io::Result<String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_MAX)?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    let mut part = [0; BYTES_MAX];
    loop {
        let length = stream.read(&mut part)?;
        answer.extend_from_slice(&part[..length]);
        let text = String::from_utf8_lossy(&answer);
        let complete = bodies.is_some_and(|bodies| text.matches(BODY).count() >= bodies);
        if complete || length == 0 || answer.len() > BYTES_MAX {
            return Ok(text.into_owned());
        }
    }
}

fn check_answer(answer: &str) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{what} in the answer {answer:?}"));
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        return wrong("no end of the head");
    };
    if !head.starts_with("HTTP/1.1 200 ") {
        return wrong("no `HTTP/1.1 200`");
    }
    if body != BODY {
        return wrong("a wrong body");
    }
    let length = format!("content-length: {}", BODY.len());
    if !head.to_ascii_lowercase().lines().any(|line| line == length) {
        return wrong("no right content-length");
    }
    Ok(())
}

fn without_date(answer: &str) -> String {
    let blank = |line: &str| match line.split_once(": ") {
        Some((name, value)) if name.eq_ignore_ascii_case("date") => {
            format!("{name}: {}", "x".repeat(value.len()))
        }
        _ => line.to_owned(),
    };
    answer.split("\r\n").map(blank).collect::<Vec<_>>().join("\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: &str = "HTTP/1.1 200 OK\r\ncontent-length: 13\r\ndate: Mon\r\n\r\nHello, World!";

    #[test]
    fn right_and_wrong_answers() {
        assert_eq!(check_answer(RIGHT), Ok(()));
        for (from, to) in [("200", "404"), ("World", "Earth"), ("13", "14"), ("\r\n\r\n", "")] {
            assert!(check_answer(&RIGHT.replace(from, to)).is_err(), "{from} to {to}");
        }
    }

    #[test]
    fn the_date_is_blanked_and_nothing_else() {
        assert_eq!(without_date(RIGHT), RIGHT.replace("Mon", "xxx"));
    }
}
