//! A line of the log that would come at every turn, or with every request, held to one a second.

use std::time::{Duration, Instant};

const AGAIN: Duration = Duration::from_secs(1);

/// What a line is about, counted while it is held back.
#[derive(Debug, Default)]
pub(crate) struct Rarely {
    said: Option<Instant>,
    unsaid: u64,
}

impl Rarely {
    /// `count` more of it have happened.
    pub(crate) fn count(&mut self, count: u64) {
        self.unsaid += count;
    }

    /// How many there were since the last line, when it is time for another.
    pub(crate) fn say(&mut self, now: Instant) -> Option<u64> {
        if self.said.is_some_and(|said| now < said + AGAIN) {
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }

    /// Whether something has not been told.
    pub(crate) fn owes(&self) -> bool {
        self.unsaid > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_said_at_once_and_then_each_second_with_what_came_between() {
        let (mut line, begun) = (Rarely::default(), Instant::now());
        line.count(1);
        assert_eq!(line.say(begun), Some(1));
        line.count(2);
        assert_eq!(line.say(begun + AGAIN / 2), None);
        line.count(3);
        assert_eq!(line.say(begun + AGAIN), Some(5));
        assert!(!line.owes());
    }
}
