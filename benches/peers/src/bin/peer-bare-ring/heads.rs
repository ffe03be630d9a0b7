//! Counts the ends of request heads in a byte stream. This is all the parsing the bare ring does.

const END: &[u8; 4] = b"\r\n\r\n";

/// Remembers how much of a blank line the bytes so far end with, so that a head may be cut anywhere.
#[derive(Debug, Default)]
pub struct HeadCounter {
    matched: usize,
}

impl HeadCounter {
    /// How many heads end within `bytes`.
    pub fn feed(&mut self, bytes: &[u8]) -> usize {
        let mut count = 0;
        let mut at = 0;
        while self.matched > 0 && at < bytes.len() {
            count += self.step(bytes[at]);
            at += 1;
        }
        // Looks at the window's last byte and moves as far as that byte allows (Boyer and Moore), so that
        // most bytes are never looked at: the limit should not be spent on searching.
        while let Some(window) = bytes.get(at..at + END.len()) {
            at += match window[3] {
                b'\n' if window == END => {
                    count += 1;
                    4
                }
                b'\n' => 2,
                b'\r' => 1,
                _ => 4,
            };
        }
        for &byte in &bytes[at..] {
            count += self.step(byte);
        }
        count
    }

    fn step(&mut self, byte: u8) -> usize {
        self.matched = match (byte == END[self.matched], byte) {
            (true, _) => self.matched + 1,
            (false, b'\r') => 1,
            (false, _) => 0,
        };
        if self.matched < END.len() {
            return 0;
        }
        self.matched = 0;
        1
    }
}

/// Whether a request asks for its connection to be closed, in the spelling of wrk's `-H` option.
/// Case and position inside a value do not matter here: this is a canned answer's question.
pub fn asks_for_close(bytes: &[u8]) -> bool {
    let wanted = b"\r\nConnection: close\r\n";
    bytes.windows(wanted.len()).any(|window| window.eq_ignore_ascii_case(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_counted_however_they_are_cut() {
        let stream = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n";
        for first in 0..=stream.len() {
            for second in first..=stream.len() {
                let mut counter = HeadCounter::default();
                let parts = [&stream[..first], &stream[first..second], &stream[second..]];
                let count: usize = parts.iter().map(|part| counter.feed(part)).sum();
                assert_eq!(count, 2, "cut at {first} and {second}");
            }
        }
    }

    /// Every string of up to nine bytes from the alphabet that matters, against a plain search.
    #[test]
    fn it_agrees_with_a_plain_search() {
        for length in 0..=9_u32 {
            for code in 0..3_usize.pow(length) {
                let digit = |place| b"\r\nx"[code / 3_usize.pow(place) % 3];
                let stream: Vec<u8> = (0..length).map(digit).collect();
                let plain = String::from_utf8_lossy(&stream).matches("\r\n\r\n").count();
                assert_eq!(HeadCounter::default().feed(&stream), plain, "{stream:?}");
            }
        }
    }

    #[test]
    fn close_is_recognised() {
        assert!(asks_for_close(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n"));
        assert!(!asks_for_close(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"));
    }
}
