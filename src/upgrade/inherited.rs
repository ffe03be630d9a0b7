//! The new side: takes the listeners that the old process hands over, and tells it when they are served.

use std::env;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::message::{BYTES_MAX, Message, VERSION};
use super::{Group, VARIABLE};
use crate::sys::descriptors;
use crate::sys::poll::wait_readable;

/// How long the old process may take over a message: it sends all at once.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The old process, which waits for our word. Dropped without one, it hears the line go dead.
#[derive(Debug)]
pub struct Predecessor {
    line: OwnedFd,
    process: u32,
    executors: Option<NonZeroU16>,
}

/// The old process and what it hands over; `None` if nobody does. Asked a second time in a process, it is `None`.
///
/// # Errors
/// When there is such a process and it cannot be understood; it has been told.
pub fn from_environment() -> Result<Option<(Predecessor, Vec<Group>)>, String> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(process) = env::var(VARIABLE).ok().and_then(|process| process.parse().ok()) else { return Ok(None) };
    // Who inherited no more than the variable has another standard input.
    if descriptors::peer_process(std::io::stdin().as_fd()) != Some(process) {
        return Ok(None);
    }
    let line = descriptors::take_stdin().map_err(|error| format!("taking over standard input: {error}"))?;
    let mut predecessor = Predecessor { line, process, executors: None };
    match receive(predecessor.line.as_fd()) {
        Ok((executors, groups)) => {
            predecessor.executors = executors;
            Ok(Some((predecessor, groups)))
        }
        Err(why) => {
            let why = format!("taking over from process {process}: {why}");
            predecessor.failed(&why);
            Err(why)
        }
    }
}

impl Predecessor {
    /// The process that serves until it has our word.
    pub fn process(&self) -> u32 {
        self.process
    }

    /// How many executors it wanted to run for its load.
    pub fn executors(&self) -> Option<NonZeroU16> {
        self.executors
    }

    /// Every executor accepts connections: the old process may go. `then` is called, on another thread, when it has
    /// acted upon it or is gone.
    pub fn ready(self, then: impl FnOnce() + Send + 'static) {
        self.say(&Message::Ready { process: std::process::id() });
        let waiting = std::thread::Builder::new().name("predecessor".to_owned()).spawn(move || {
            let _ = wait_readable(&[self.line.as_fd()], Some(MESSAGE_TIMEOUT));
            then();
        });
        if let Err(error) = waiting {
            tracing::warn!(%error, "starting a thread to wait for the process that hands over");
        }
    }

    /// This process will not serve.
    pub fn failed(self, reason: &str) {
        self.say(&Message::Failed { reason: reason.to_owned() });
    }

    fn say(&self, message: &Message) {
        if let Err(error) = descriptors::send(self.line.as_fd(), &message.bytes(), &[]) {
            tracing::warn!(%error, process = self.process, "the process that hands over to this one does not hear");
        }
    }
}

fn receive(line: BorrowedFd<'_>) -> Result<(Option<NonZeroU16>, Vec<Group>), String> {
    let (groups, executors) = match next(line)? {
        (Message::Hello { version: VERSION, groups, executors, .. }, _) => (groups, NonZeroU16::new(executors)),
        (Message::Hello { version, .. }, _) => {
            return Err(format!(
                "it hands over in version {version} of the protocol, this binary in {VERSION}: start this one afresh"
            ));
        }
        (other, _) => return Err(format!("it begins with '{other}' instead of a greeting")),
    };
    let groups = (0..groups).map(|_| group(line)).collect::<Result<_, _>>()?;
    Ok((executors, groups))
}

fn group(line: BorrowedFd<'_>) -> Result<Group, String> {
    let (Message::Group { listeners: expected, address, activated, steered }, _) = next(line)? else {
        return Err("it sends something else where listeners of an address should come".to_owned());
    };
    let mut listeners = Vec::new();
    while listeners.len() < expected {
        match next(line)? {
            (Message::Listeners { count }, with) if count == with.len() && count > 0 => listeners.extend(with),
            (Message::Listeners { count }, with) => {
                return Err(format!("of {count} listeners on {address} {} arrived", with.len()));
            }
            (other, _) => return Err(format!("it sends '{other}' where listeners on {address} should come")),
        }
    }
    if let Some(other) = listeners.iter().find(|listener| !descriptors::listens(listener.as_fd())) {
        return Err(format!("descriptor {other:?} on {address} is not a listening TCP socket"));
    }
    let sockets = if steered { Some(sockets(line, address)?) } else { None };
    Ok(Group { address, listeners, activated, sockets })
}

fn sockets(line: BorrowedFd<'_>, address: SocketAddr) -> Result<OwnedFd, String> {
    match next(line)? {
        (Message::Sockets { count: 1 }, with) if with.len() == 1 => {
            Ok(with.into_iter().next().expect("its length has just been looked at"))
        }
        (other, with) => Err(format!(
            "it sends '{other}' with {} descriptors where the array of its steering on {address} should come",
            with.len()
        )),
    }
}

fn next(line: BorrowedFd<'_>) -> Result<(Message, Vec<OwnedFd>), String> {
    let ready = wait_readable(&[line], Some(MESSAGE_TIMEOUT)).map_err(|error| format!("waiting for it: {error}"))?;
    if ready.is_empty() {
        return Err(format!("it says nothing for {} s", MESSAGE_TIMEOUT.as_secs()));
    }
    let mut buffer = [0; BYTES_MAX];
    let (length, with) = descriptors::receive(line, &mut buffer).map_err(|error| format!("hearing it: {error}"))?;
    if length == 0 {
        return Err("it has gone".to_owned());
    }
    let message = Message::parse(&buffer[..length]).ok_or("it speaks in words that this version does not know")?;
    Ok((message, with))
}

/// Takes the group out that an address asked for means. Port 0 means any: the one that was listened on.
pub fn claim(groups: &mut Vec<Group>, asked: SocketAddr) -> Option<Group> {
    let means = |bound: SocketAddr| bound.ip() == asked.ip() && (asked.port() == 0 || asked.port() == bound.port());
    let position = groups.iter().position(|group| means(group.address))?;
    Some(groups.remove(position))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// What the new side makes of these messages; a listener goes with each that speaks of one.
    fn heard(messages: &[&[u8]]) -> Result<Vec<Group>, String> {
        let (ours, theirs) = descriptors::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        for message in messages {
            let with = if message.starts_with(b"listeners") { &[listener.as_fd()][..] } else { &[] };
            descriptors::send(ours.as_fd(), message, with).unwrap();
        }
        drop(ours);
        receive(theirs.as_fd()).map(|(_, groups)| groups)
    }

    #[test]
    fn groups_arrive_in_order() {
        let messages: [&[u8]; 6] = [
            b"ringleader-upgrade 1 12 2",
            b"group 2 127.0.0.1:1000",
            b"listeners 1",
            b"listeners 1",
            b"group 1 [::1]:1000",
            b"listeners 1",
        ];
        let groups = heard(&messages).unwrap();
        let seen: Vec<_> = groups.iter().map(|group| (group.address.to_string(), group.listeners.len())).collect();
        assert_eq!(seen, [("127.0.0.1:1000".to_owned(), 2), ("[::1]:1000".to_owned(), 1)]);
    }

    #[test]
    fn what_is_not_understood_is_refused_with_a_reason() {
        for (messages, word) in [
            (&[&b"ringleader-upgrade 2 12 1"[..]][..], "version 2"),
            (&[b"ready 12"], "greeting"),
            (&[b"\xff nonsense"], "does not know"),
            (&[b"ringleader-upgrade 1 12 1"], "gone"),
            (&[b"ringleader-upgrade 1 12 1", b"group 2 127.0.0.1:1000", b"listeners 2"], "of 2 listeners"),
            (&[b"ringleader-upgrade 1 12 1", b"group 1 127.0.0.1:1000", b"ready 12"], "'ready 12'"),
        ] {
            let why = heard(messages).unwrap_err();
            assert!(why.contains(word), "no {word:?} in {why}");
        }
    }

    #[test]
    fn an_address_is_claimed_once_and_port_zero_takes_what_there_is() {
        let group = |address: &str| Group {
            address: address.parse().unwrap(),
            listeners: Vec::new(),
            activated: 0,
            sockets: None,
        };
        let mut groups = vec![group("127.0.0.1:80"), group("[::]:80"), group("127.0.0.1:81")];
        let mut claimed =
            |asked: &str| claim(&mut groups, asked.parse().unwrap()).map(|group| group.address.to_string());
        assert_eq!(claimed("127.0.0.1:82"), None);
        assert_eq!(claimed("0.0.0.0:80"), None);
        assert_eq!(claimed("127.0.0.1:81").as_deref(), Some("127.0.0.1:81"));
        assert_eq!(claimed("127.0.0.1:81"), None);
        assert_eq!(claimed("127.0.0.1:0").as_deref(), Some("127.0.0.1:80"));
        assert_eq!(claimed("[::]:80").as_deref(), Some("[::]:80"));
    }

    #[test]
    fn without_the_variable_nobody_hands_over() {
        assert!(from_environment().unwrap().is_none());
    }
}
