//! The canned answers: made once a second for their `date`, shared by all sends of that second.

use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use ringleader_peers::{BODY, CONTENT_TYPE};

/// Pipelined requests that one send answers; more of them take more sends.
pub const COPIES_MAX: usize = 64;

/// What is sent within one second.
#[derive(Debug)]
pub struct Answers {
    keep_alive: Vec<u8>,
    close: Vec<u8>,
}

impl Answers {
    fn new(now: SystemTime) -> Self {
        let one = |connection: &str| {
            format!(
                "HTTP/1.1 200 OK\r\ncontent-type: {CONTENT_TYPE}\r\n{connection}content-length: {}\r\ndate: {}\r\n\r\n{BODY}",
                BODY.len(),
                httpdate::fmt_http_date(now),
            )
        };
        Self { keep_alive: one("").repeat(COPIES_MAX).into_bytes(), close: one("connection: close\r\n").into_bytes() }
    }

    /// The bytes of `copies` answers, at most [`COPIES_MAX`].
    pub fn keep_alive(&self, copies: usize) -> &[u8] {
        &self.keep_alive[..self.keep_alive.len() / COPIES_MAX * copies]
    }

    /// The bytes of one answer that is the connection's last.
    pub fn close(&self) -> &[u8] {
        &self.close
    }
}

/// The answers of the present second.
#[derive(Debug)]
pub struct AnswerClock {
    second: u64,
    answers: Rc<Answers>,
}

impl AnswerClock {
    pub fn new() -> Self {
        let now = SystemTime::now();
        Self { second: second_of(now), answers: Rc::new(Answers::new(now)) }
    }

    /// To be called once per turn of the loop.
    pub fn tick(&mut self) {
        let now = SystemTime::now();
        if second_of(now) != self.second {
            *self = Self { second: second_of(now), answers: Rc::new(Answers::new(now)) };
        }
    }

    pub fn answers(&self) -> &Rc<Answers> {
        &self.answers
    }
}

fn second_of(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_whole_answers() {
        let answers = Answers::new(UNIX_EPOCH);
        let two = String::from_utf8(answers.keep_alive(2).to_vec()).unwrap();
        assert_eq!(two.matches("HTTP/1.1 200 OK\r\n").count(), 2);
        assert!(two.ends_with("\r\n\r\nHello, World!"));
        assert!(two.contains("date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"));
    }
}
