//! What is said between the old and the new process: one line of text per message, its first word the kind.
//!
//! A process of another version understands [`Message::Hello`] and [`Message::Failed`] at least, and so can say why it
//! will not go on.

use std::fmt;
use std::net::SocketAddr;

/// Raised when a message changes its meaning, or one that must be understood is added.
pub const VERSION: u32 = 1;

/// Bytes of the longest message; a longer reason is cut.
pub const BYTES_MAX: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The first one: the old process, how many groups will follow, and how many executors it wants to run at present; 0 is
    /// not known.
    Hello { version: u32, process: u32, groups: usize, executors: u16 },
    /// A group's address, the number of its listeners, which follow, how many of them the service manager gave, and
    /// whether the array of a steering program follows after them.
    Group { listeners: usize, address: SocketAddr, activated: usize, steered: bool },
    /// This many of the group's listeners are with this message.
    Listeners { count: usize },
    /// So many arrays of a steering program, which is one, are with this message.
    Sockets { count: usize },
    /// The new process accepts connections on every executor.
    Ready { process: u32 },
    /// The new process will not serve.
    Failed { reason: String },
}

impl Message {
    /// Reads a message; `None` if it is none of ours.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let (kind, rest) = text.split_once(' ')?;
        let mut words = rest.split(' ');
        let mut number = || words.next()?.parse().ok();
        match kind {
            "ringleader-upgrade" => Some(Self::Hello {
                version: number()?,
                process: number()?,
                // Absent or changed in another version, which is told apart by its number.
                groups: number().map_or(0, |groups| groups as usize),
                executors: number().and_then(|executors| u16::try_from(executors).ok()).unwrap_or(0),
            }),
            "group" => Some(Self::Group {
                listeners: number()? as usize,
                address: words.next()?.parse().ok()?,
                activated: words.next().map_or(Some(0), |count| count.parse().ok())?,
                steered: words.next() == Some("steered"),
            }),
            "listeners" => Some(Self::Listeners { count: number()? as usize }),
            "sockets" => Some(Self::Sockets { count: number()? as usize }),
            "ready" => Some(Self::Ready { process: number()? }),
            "failed" => Some(Self::Failed { reason: rest.to_owned() }),
            _ => None,
        }
    }

    /// The message as it is sent, at most [`BYTES_MAX`].
    pub fn bytes(&self) -> Vec<u8> {
        let mut text = self.to_string();
        let end = (0..=BYTES_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or(0));
        text.into_bytes()
    }
}

impl fmt::Display for Message {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello { version, process, groups, executors } => {
                write!(formatter, "ringleader-upgrade {version} {process} {groups} {executors}")
            }
            Self::Group { listeners, address, activated, steered } => {
                write!(formatter, "group {listeners} {address} {activated}{}", if *steered { " steered" } else { "" })
            }
            Self::Listeners { count } => write!(formatter, "listeners {count}"),
            Self::Sockets { count } => write!(formatter, "sockets {count}"),
            Self::Ready { process } => write!(formatter, "ready {process}"),
            Self::Failed { reason } => write!(formatter, "failed {reason}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_is_read_as_it_was_written() {
        for message in [
            Message::Hello { version: VERSION, process: 4711, groups: 2, executors: 8 },
            Message::Group { listeners: 1024, address: "127.0.0.1:8080".parse().unwrap(), activated: 0, steered: true },
            Message::Group { listeners: 1, address: "[::1]:443".parse().unwrap(), activated: 1, steered: false },
            Message::Sockets { count: 1 },
            Message::Listeners { count: 250 },
            Message::Ready { process: 1 },
            Message::Failed { reason: "cannot listen on 127.0.0.1:80: permission denied; ü".to_owned() },
        ] {
            assert_eq!(Message::parse(&message.bytes()), Some(message));
        }
    }

    #[test]
    fn a_greeting_of_another_version_is_understood_as_far_as_its_version() {
        let later = b"ringleader-upgrade 7 12 with=something else";
        assert_eq!(Message::parse(later), Some(Message::Hello { version: 7, process: 12, groups: 0, executors: 0 }));
        let without_a_number = b"ringleader-upgrade 1 12 2";
        let greeting = Message::Hello { version: 1, process: 12, groups: 2, executors: 0 };
        assert_eq!(Message::parse(without_a_number), Some(greeting));
    }

    #[test]
    fn anything_else_is_no_message() {
        for bytes in [&b""[..], b"ready", b"ready x", b"group 1", b"group 1 nowhere", b"\xff\xff 1", b"hello 1 2"] {
            assert_eq!(Message::parse(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let bytes = Message::Failed { reason: "ü".repeat(BYTES_MAX) }.bytes();
        assert!((BYTES_MAX - 2..=BYTES_MAX).contains(&bytes.len()));
        assert!(matches!(Message::parse(&bytes), Some(Message::Failed { .. })));
    }
}
