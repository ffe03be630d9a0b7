//! What systemd is told and what it hands over: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3), and its store of
//! descriptors. Other service managers that speak the same protocols will do.
//!
//! Nothing here fails a server: what cannot be said is logged once. Nor does anything wait for a manager that is slow to
//! read: what it must hear is said again until there is room, what would fill its queue is said on another thread.

use std::collections::VecDeque;
use std::env;
use std::ffi::OsStr;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::sys::{clock, descriptors, socket};
use crate::upgrade::Group;

/// How often the status may change: once a second is as often as a person looks.
const STATUS_PERIOD: Duration = Duration::from_secs(1);
/// How soon a word that the service manager had no room for is said again.
const RETRY_PERIOD: Duration = Duration::from_millis(50);
/// Words that may wait so; there are two at a start, two at a reload and one at the end.
const UNSENT_MAX: usize = 32;
/// How long the end of a server may be held up by words that wait: an upgrade fails if systemd never hears of it.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);
/// How long the service manager may leave its messages unread while it is given listeners.
const STORE_TIMEOUT: Duration = Duration::from_secs(5);
/// What the names of our listeners in systemd's store begin with.
const STORED: &str = "ringleader-";

/// Tells the service manager how the server is.
#[derive(Debug)]
pub struct Notifier {
    socket: UnixDatagram,
    /// What there was no room for, in order.
    unsent: VecDeque<String>,
    retry_due: Instant,
    /// A failure has been logged.
    failed: bool,
    /// Another process is the service's main one: what this one says would be refused, or mislead.
    silent: bool,
    /// When the watchdog ends a service that says nothing (`WatchdogSec=`); it is told twice as often.
    watchdog: Option<Duration>,
    watchdog_due: Instant,
    status: String,
    status_due: Instant,
    storing: Vec<JoinHandle<()>>,
}

impl Drop for Notifier {
    fn drop(&mut self) {
        let give_up = Instant::now() + LAST_WORDS_MAX;
        while !self.send_unsent() && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(1));
        }
        for thread in self.storing.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Notifier {
    /// Whom the environment (`NOTIFY_SOCKET`) says to tell; `None` if nobody wants to know, or cannot be reached.
    pub fn from_environment() -> Option<Self> {
        let path = env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty())?;
        match connect(&path) {
            Ok(socket) => Some(Self::new(socket, watchdog_period())),
            Err(error) => {
                tracing::warn!(%error, socket = %path.display(), "the service manager cannot be told anything");
                None
            }
        }
    }

    fn new(socket: UnixDatagram, watchdog: Option<Duration>) -> Self {
        let now = Instant::now();
        Self {
            socket,
            unsent: VecDeque::new(),
            retry_due: now,
            failed: false,
            silent: false,
            watchdog,
            watchdog_due: now,
            status: String::new(),
            status_due: now,
            storing: Vec::new(),
        }
    }

    /// The server serves: at its start, and after a reload.
    pub fn ready(&mut self) {
        self.say("READY=1");
    }

    /// A reload has begun; [`Notifier::ready`] ends it.
    pub fn reloading(&mut self) {
        self.say(&format!("RELOADING=1\nMONOTONIC_USEC={}", clock::monotonic().as_micros()));
    }

    /// The server is on its way to its end.
    pub fn stopping(&mut self) {
        self.say("STOPPING=1");
    }

    /// Another process is the service's main one from now on. This one is silent then.
    pub fn main_pid(&mut self, process: u32) {
        self.say(&format!("MAINPID={process}"));
        self.silent = true;
    }

    /// Until the process before this one has said that this one is the service's: nothing is sent.
    pub fn wait_for_turn(&mut self) {
        self.silent = true;
    }

    /// This process is the service's main one now.
    pub fn take_turn(&mut self) {
        self.silent = false;
    }

    /// A line for `systemctl status`, once a second at most and when it has changed.
    pub fn status(&mut self, text: &str, now: Instant) {
        if !self.silent && text != self.status && now >= self.status_due {
            self.status_due = now + STATUS_PERIOD;
            if self.mention(&format!("STATUS={}", text.replace('\n', " "))) {
                text.clone_into(&mut self.status);
            }
        }
    }

    /// Tells the watchdog that the supervisor goes round, when it is time.
    pub fn watchdog(&mut self, now: Instant) {
        if let Some(period) = self.watchdog.filter(|_| now >= self.watchdog_due) {
            let said = self.mention("WATCHDOG=1");
            self.watchdog_due = now + if said { period / 2 } else { RETRY_PERIOD.min(period / 2) };
        }
    }

    /// When [`Notifier::watchdog`] or [`Notifier::retry`] is to be called at the latest.
    pub fn due(&self) -> Option<Instant> {
        let retry = (!self.unsent.is_empty()).then_some(self.retry_due);
        self.watchdog.map(|_| self.watchdog_due).into_iter().chain(retry).min()
    }

    /// Says again what there was no room for, when it is time.
    pub fn retry(&mut self, now: Instant) {
        if now >= self.retry_due && !self.send_unsent() {
            self.retry_due = now + RETRY_PERIOD;
        }
    }

    /// Gives systemd duplicates of these listeners, to hold for the next process of this service should this one crash.
    /// It keeps one of each. Those it has opened itself it holds anyway.
    ///
    /// Does nothing unless the environment says that there is a store (`FDSTORE`, which systemd sets from version 254 on;
    /// with an older one, the unit file can).
    pub fn store(&mut self, groups: Vec<Group>) {
        let enabled = env::var("FDSTORE").is_ok_and(|most| most.parse().is_ok_and(|most: u64| most > 0));
        if enabled && !self.silent {
            self.in_background(move |socket| store(socket, &groups));
        }
    }

    fn in_background(&mut self, work: impl FnOnce(&UnixDatagram) -> io::Result<()> + Send + 'static) {
        let started = self.socket.try_clone().and_then(|socket| {
            let store = move || {
                if let Err(error) = work(&socket) {
                    tracing::warn!(%error, "the service manager could not be told what listeners to keep");
                }
            };
            std::thread::Builder::new().name("store".to_owned()).spawn(store)
        });
        match started {
            Ok(thread) => self.storing.push(thread),
            Err(error) => tracing::warn!(%error, "starting a thread that tells the service manager what to keep"),
        }
    }

    /// Asks systemd to close the listeners that it holds for us of these addresses, of each so many.
    pub fn forget(&mut self, groups: Vec<(SocketAddr, usize)>) {
        if !self.silent && !groups.is_empty() {
            self.in_background(move |socket| forget(socket, &groups));
        }
    }

    /// Says what must be heard: if there is no room now, then when there is.
    fn say(&mut self, message: &str) {
        if self.silent || (self.unsent.is_empty() && self.attempt(message)) {
            return;
        }
        if self.unsent.is_empty() {
            self.retry_due = Instant::now() + RETRY_PERIOD;
        }
        if self.unsent.len() < UNSENT_MAX {
            self.unsent.push_back(message.to_owned());
        } else {
            self.warn(message, &io::ErrorKind::WouldBlock.into());
        }
    }

    /// Says what there will be another occasion to say; false if there is no room now.
    fn mention(&mut self, message: &str) -> bool {
        self.silent || (self.unsent.is_empty() && self.attempt(message))
    }

    /// True when nothing waits any more.
    fn send_unsent(&mut self) -> bool {
        while let Some(message) = self.unsent.pop_front() {
            if !self.attempt(&message) {
                self.unsent.push_front(message);
                return false;
            }
        }
        true
    }

    /// True when there is no more to be done about it; false if there is no room now.
    fn attempt(&mut self, message: &str) -> bool {
        match self.socket.send(message.as_bytes()) {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                self.warn(message, &error);
                true
            }
        }
    }

    fn warn(&mut self, message: &str, error: &io::Error) {
        if !std::mem::replace(&mut self.failed, true) {
            tracing::warn!(%error, message, "the service manager could not be told; further failures are not logged");
        }
    }
}

/// A message for each listener, since its name tells its place.
fn store(socket: &UnixDatagram, groups: &[Group]) -> io::Result<()> {
    for group in groups {
        for (index, listener) in group.listeners.iter().enumerate().skip(group.activated) {
            let message = format!("FDSTORE=1\nFDNAME={}", stored_name(group.address, index));
            send_patiently(socket, &message, &[listener.as_fd()])?;
        }
    }
    Ok(())
}

/// Likewise.
fn forget(socket: &UnixDatagram, groups: &[(SocketAddr, usize)]) -> io::Result<()> {
    for (address, listeners) in groups {
        for index in 0..*listeners {
            let message = format!("FDSTOREREMOVE=1\nFDNAME={}", stored_name(*address, index));
            send_patiently(socket, &message, &[])?;
        }
    }
    Ok(())
}

/// There may be a thousand such messages: the manager gets time to read.
fn send_patiently(socket: &UnixDatagram, message: &str, with: &[BorrowedFd<'_>]) -> io::Result<()> {
    let give_up = Instant::now() + STORE_TIMEOUT;
    loop {
        match descriptors::send(socket.as_fd(), message.as_bytes(), with) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < give_up => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return other,
        }
    }
}

fn connect(path: &OsStr) -> io::Result<UnixDatagram> {
    let address = match path.as_bytes() {
        [b'@', name @ ..] => UnixAddress::from_abstract_name(name)?,
        [b'/', ..] => UnixAddress::from_pathname(path)?,
        _ => return Err(io::Error::new(io::ErrorKind::Unsupported, "neither a path nor an abstract name")),
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // A service manager that does not read must not hold up the supervisor.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// `WATCHDOG_USEC`, if it is meant for this process.
fn watchdog_period() -> Option<Duration> {
    let number = |name| env::var(name).ok()?.parse::<u64>().ok();
    let for_another = env::var_os("WATCHDOG_PID").is_some() && !is_this_process("WATCHDOG_PID");
    number("WATCHDOG_USEC").filter(|period| *period > 0 && !for_another).map(Duration::from_micros)
}

fn is_this_process(variable: &str) -> bool {
    env::var(variable).is_ok_and(|process| process.parse() == Ok(std::process::id()))
}

/// `ringleader-127.0.0.1_8080-3`: a colon would end the name. An address has no underscore.
fn stored_name(address: SocketAddr, index: usize) -> String {
    format!("{STORED}{}-{index}", address.to_string().replace(':', "_"))
}

/// The position in its group that a stored listener's name tells; the address is asked of the listener itself.
fn stored_index(name: &str) -> Option<usize> {
    name.strip_prefix(STORED)?.rsplit_once('-')?.1.parse().ok()
}

/// The listeners that the service manager has opened (socket activation) or kept (`FDSTORE`) for this process. A process
/// has them once.
#[derive(Default)]
pub struct Passed {
    pub groups: Vec<Group>,
    /// Numbers and names of descriptors that are something else.
    pub unusable: Vec<String>,
}

/// What was passed to this process.
pub fn listeners() -> Passed {
    let count = env::var("LISTEN_FDS").ok().and_then(|count| count.parse().ok()).unwrap_or(0);
    if count == 0 || !is_this_process("LISTEN_PID") {
        return Passed::default();
    }
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut unusable = Vec::new();
    let named = descriptors::passed_at_start(count).into_iter().enumerate().filter_map(|(number, passed)| {
        let name = names.next().unwrap_or_default().to_owned();
        if passed.is_none() {
            tracing::warn!(descriptor = number + 3, name, "left alone, since it is no listening TCP socket");
            unusable.push(format!("{} '{name}'", number + 3));
        }
        Some((name, passed?))
    });
    let groups = group(named.collect());
    Passed { groups, unusable }
}

/// Sorts listeners into groups: those of one address, activated ones first, stored ones in the order they had.
fn group(named: Vec<(String, OwnedFd)>) -> Vec<Group> {
    let mut found: Vec<(SocketAddr, Option<usize>, OwnedFd)> = Vec::new();
    for (name, listener) in named {
        match socket::local_addr(listener.as_fd()) {
            Ok(address) => found.push((address, stored_index(&name), listener)),
            Err(error) => tracing::warn!(%error, name, "a listener of the service manager has no address"),
        }
    }
    // The sort is stable: activated listeners stay in the order of the unit.
    found.sort_by_key(|(_, index, _)| *index);
    let mut groups: Vec<Group> = Vec::new();
    for (address, index, listener) in found {
        match groups.iter_mut().find(|group| group.address == address) {
            Some(group) => {
                group.activated += usize::from(index.is_none());
                group.listeners.push(listener);
            }
            None => groups.push(Group {
                address,
                listeners: vec![listener],
                activated: usize::from(index.is_none()),
                sockets: None,
            }),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;

    use super::*;

    fn pair(watchdog: Option<Duration>) -> (Notifier, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Notifier::new(ours, watchdog), theirs)
    }

    fn heard(manager: &UnixDatagram) -> Vec<String> {
        let mut buffer = [0; 1000];
        let next =
            || manager.recv(&mut buffer).ok().map(|length| String::from_utf8_lossy(&buffer[..length]).into_owned());
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn a_life_is_told_in_the_words_of_the_protocol() {
        let (mut notifier, manager) = pair(None);
        notifier.ready();
        notifier.reloading();
        notifier.stopping();
        let said = heard(&manager);
        assert_eq!((said[0].as_str(), said[2].as_str()), ("READY=1", "STOPPING=1"));
        let time = said[1].strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(time.parse::<u64>().unwrap() > 0);
    }

    #[test]
    fn after_a_hand_over_this_process_is_silent() {
        let (mut notifier, manager) = pair(Some(Duration::from_secs(1)));
        notifier.main_pid(77);
        notifier.stopping();
        notifier.watchdog(Instant::now());
        assert_eq!(heard(&manager), ["MAINPID=77"]);
        notifier.take_turn();
        notifier.ready();
        assert_eq!(heard(&manager), ["READY=1"]);
    }

    #[test]
    fn the_status_is_told_when_it_changes_and_once_a_second() {
        let (mut notifier, manager) = pair(None);
        let start = Instant::now();
        notifier.status("one", start);
        notifier.status("two", start + Duration::from_millis(900));
        notifier.status("three\nfour", start + Duration::from_millis(1100));
        notifier.status("three\nfour", start + Duration::from_secs(5));
        assert_eq!(heard(&manager), ["STATUS=one", "STATUS=three four"]);
    }

    #[test]
    fn the_watchdog_hears_from_us_twice_a_period() {
        let (mut notifier, manager) = pair(Some(Duration::from_secs(10)));
        let start = notifier.due().unwrap();
        for second in 0..=20 {
            notifier.watchdog(start + Duration::from_secs(second));
        }
        assert_eq!(heard(&manager), vec!["WATCHDOG=1"; 5]);
        let (mut without, manager) = pair(None);
        without.watchdog(start);
        assert_eq!((heard(&manager), without.due()), (Vec::new(), None));
    }

    #[test]
    fn a_manager_that_does_not_listen_costs_nothing() {
        let (mut notifier, manager) = pair(None);
        drop(manager);
        notifier.ready();
        notifier.ready();
        assert!(notifier.failed);
    }

    /// Fills the manager's queue; with how many messages.
    fn fill(notifier: &Notifier) -> usize {
        notifier.socket.set_nonblocking(true).unwrap();
        let count = (0..).take_while(|_| notifier.socket.send(b"full").is_ok()).count();
        assert!(count > 0);
        count
    }

    #[test]
    fn what_a_manager_has_no_room_for_is_said_in_order_when_it_has() {
        let (mut notifier, manager) = pair(Some(Duration::from_secs(10)));
        let full = fill(&notifier);
        notifier.ready();
        notifier.reloading();
        notifier.ready();
        let start = Instant::now();
        notifier.watchdog(start);
        notifier.status("busy", start);
        assert!(notifier.due().unwrap() <= start + RETRY_PERIOD, "it does not wait for the watchdog");
        notifier.retry(start + RETRY_PERIOD);
        assert_eq!(heard(&manager).len(), full);
        notifier.retry(start + 2 * RETRY_PERIOD);
        notifier.watchdog(start + 2 * RETRY_PERIOD);
        notifier.status("busy", start + STATUS_PERIOD);
        let said = heard(&manager);
        assert_eq!((said[0].as_str(), said[2].as_str()), ("READY=1", "READY=1"));
        assert!(said[1].starts_with("RELOADING=1"));
        assert_eq!(said[3..], ["WATCHDOG=1", "STATUS=busy"]);
        assert!(!notifier.failed && notifier.unsent.is_empty());
    }

    #[test]
    fn the_last_word_is_said_when_there_is_room_although_the_server_ends() {
        let (mut notifier, manager) = pair(None);
        let full = fill(&notifier);
        notifier.main_pid(77);
        assert_eq!(heard(&manager).len(), full);
        drop(notifier);
        assert_eq!(heard(&manager), ["MAINPID=77"]);
    }

    #[test]
    fn a_thousand_listeners_to_be_forgotten_hold_nobody_up() {
        let (mut notifier, manager) = pair(None);
        let address = "127.0.0.1:8080".parse().unwrap();
        notifier.socket.set_nonblocking(true).unwrap();
        notifier.ready();
        notifier.forget(vec![(address, 1000)]);
        manager.set_nonblocking(false).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut buffer = [0; 100];
        let mut next =
            || manager.recv(&mut buffer).map(|length| String::from_utf8_lossy(&buffer[..length]).into_owned());
        assert_eq!(next().unwrap(), "READY=1");
        for index in 0..1000 {
            let expected = format!("FDSTOREREMOVE=1\nFDNAME=ringleader-127.0.0.1_8080-{index}");
            assert_eq!(next().unwrap(), expected);
        }
    }

    #[test]
    fn a_stored_listener_goes_with_a_name_that_tells_its_place() {
        let (mut notifier, manager) = pair(None);
        let address = "[::1]:8080".parse().unwrap();
        let listeners = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap().into()).collect();
        let groups = vec![Group { address, listeners, activated: 2, sockets: None }];
        notifier.in_background(move |socket| store(socket, &groups));
        for thread in notifier.storing.drain(..) {
            thread.join().unwrap();
        }
        notifier.forget(vec![(address, 1)]);
        for thread in notifier.storing.drain(..) {
            thread.join().unwrap();
        }
        let mut buffer = [0; 200];
        let (length, with) = descriptors::receive(manager.as_fd(), &mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"FDSTORE=1\nFDNAME=ringleader-[__1]_8080-2");
        assert_eq!(with.len(), 1);
        assert_eq!(heard(&manager), ["FDSTOREREMOVE=1\nFDNAME=ringleader-[__1]_8080-0"]);
        assert_eq!(stored_index("ringleader-[__1]_8080-3"), Some(3));
        assert_eq!((stored_index("web.socket"), stored_index("ringleader.socket")), (None, None));
    }

    #[test]
    fn listeners_are_put_back_into_their_order() {
        let listeners: Vec<TcpListener> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let (first, other) = (&listeners[0], &listeners[1]);
        let double = |listener: &TcpListener| OwnedFd::from(listener.try_clone().unwrap());
        let (second, third) = (double(first), double(first));
        let order = [second.as_raw_fd(), third.as_raw_fd()];
        let groups = group(vec![
            ("ringleader-x-10".to_owned(), third),
            ("web.socket".to_owned(), double(other)),
            ("ringleader-x-2".to_owned(), second),
        ]);
        let seen: Vec<_> = groups.iter().map(|group| (group.address, group.activated)).collect();
        assert_eq!(seen, [(other.local_addr().unwrap(), 1), (first.local_addr().unwrap(), 0)]);
        assert_eq!(groups[1].listeners.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>(), order);
    }

    #[test]
    fn names_and_paths_of_the_manager_are_both_understood() {
        let name = format!("ringleader-test-{}", std::process::id());
        let bound = UnixDatagram::bind_addr(&UnixAddress::from_abstract_name(&name).unwrap()).unwrap();
        let socket = connect(OsStr::new(&format!("@{name}"))).unwrap();
        socket.send(b"hello").unwrap();
        bound.set_nonblocking(true).unwrap();
        assert_eq!(heard(&bound), ["hello"]);
        assert!(connect(OsStr::new("/no/such/socket")).is_err());
        assert!(connect(OsStr::new("vsock:2:1")).is_err());
    }
}
