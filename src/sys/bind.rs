//! Opening the listeners of one address: one reuseport group, complete before anything is accepted.
//!
//! The index of a listener in the returned list is its index in the kernel's group, which is what a
//! steering program returns. That holds because members are added in the order of `listen`.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::Duration;

use super::descriptors;
use super::procfs::{self, Holder};
use super::socket;

/// How listeners are made. Accepted connections inherit everything but the backlog.
#[derive(Clone, Debug)]
pub struct ListenOptions {
    /// Connections that may wait in each listener's queue; the kernel lowers it to `somaxconn`.
    pub backlog: u32,
    /// Idle time before the first TCP keep-alive probe; further ones follow at a quarter of it
    /// (at least 1 s), and the fourth unanswered ends the connection. Rounded up to seconds.
    pub keepalive: Option<Duration>,
    /// How long sent bytes may stay unacknowledged before the connection is given up
    /// (`TCP_USER_TIMEOUT`). Rounded up to milliseconds.
    pub user_timeout: Option<Duration>,
    /// Whether an IPv6 listener leaves IPv4 alone, whatever `net.ipv6.bindv6only` says.
    pub v6_only: bool,
    /// Whether other processes of this user may listen on the address at the same time. The kernel
    /// then divides new connections among the listeners of all, if none of them steers.
    pub share_port: bool,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self { backlog: 4096, keepalive: None, user_timeout: None, v6_only: true, share_port: false }
    }
}

/// Why an address could not be listened on.
#[derive(Debug)]
pub enum BindError {
    /// Someone listens there already; `holder` if `/proc` shows who.
    InUse { addr: SocketAddr, holder: Option<Holder>, sharing: Sharing },
    /// No interface has the address, or its family is switched off.
    NotAvailable { addr: SocketAddr },
    /// The port is privileged and we are not, or a security module objects.
    Permission { addr: SocketAddr },
    /// `count` descriptors did not fit.
    TooManyFiles { addr: SocketAddr, count: usize },
    /// Anything else, with the step that failed.
    Other { addr: SocketAddr, attempt: &'static str, error: io::Error },
}

/// Whether it would help to share an address that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// The kernel would let us in.
    WouldHelp,
    /// It would not.
    WouldNot,
    /// That was asked for, and it did not.
    DidNot,
}

impl Sharing {
    fn of(addr: SocketAddr, options: &ListenOptions) -> Self {
        if options.share_port {
            return Self::DidNot;
        }
        // Bound, it takes no connections yet.
        if open_bound(addr, options, true).is_ok() { Self::WouldHelp } else { Self::WouldNot }
    }

    /// What there is to do about an address that is in use.
    fn remedy(self) -> &'static str {
        match self {
            Self::WouldHelp => {
                "stop it, choose another port, or start both so that they share it (--share-port, `Builder::share_port`)"
            }
            Self::WouldNot => "stop it, or choose another port",
            Self::DidNot => "it does not share the port, or belongs to another user: stop it, or choose another port",
        }
    }
}

/// Opens `count` non-blocking listeners on `addr` as one reuseport group, in order: index in the
/// list == index in the group. With port 0 the first takes a free port and the others follow it
/// ([`socket::local_addr`] tells which).
///
/// Unless [`ListenOptions::share_port`], it is an error if anything listens on the address already.
pub fn bind_group(addr: SocketAddr, count: usize, options: &ListenOptions) -> Result<Vec<OwnedFd>, BindError> {
    let fail = |(attempt, error)| BindError::new(addr, count, options, attempt, error);
    if count == 0 {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "no listener was asked for");
        return Err(fail(("to open listeners", error)));
    }
    let mut group = Vec::with_capacity(count);
    group.push(open_first(addr, count == 1, options).map_err(fail)?);
    let first: &OwnedFd = &group[0];
    let chosen = socket::local_addr(first.as_fd()).map_err(|error| fail((NAME, error)))?;
    while group.len() < count {
        group.push(open_next(chosen, options).map_err(fail)?);
    }
    Ok(group)
}

/// Takes over a group that is listened on already, its members in order, and adds to it until it has `count`. Its
/// sockets get these options, too; of an IPv6 group, what it does with IPv4 stays.
///
/// The kernel lets nobody join a group of another user's. Then the group stays as it is, and the reason comes with it.
pub fn adopt_group(
    addr: SocketAddr,
    mut group: Vec<OwnedFd>,
    count: usize,
    options: &ListenOptions,
) -> Result<(Vec<OwnedFd>, Option<BindError>), BindError> {
    let fail = |(attempt, error)| BindError::new(addr, count, options, attempt, error);
    for listener in &group {
        let listener = listener.as_fd();
        descriptors::set_nonblocking(listener).map_err(|error| fail((CONFIGURE, error)))?;
        configure_common(listener, options).map_err(|error| fail((CONFIGURE, error)))?;
        // Of a socket that listens it changes the backlog, and nothing else.
        socket::listen(listener, options.backlog).map_err(|error| fail((LISTEN, error)))?;
    }
    if group.len() < count
        && let [only] = &group[..]
    {
        set_reuse_port(only.as_fd()).map_err(|error| fail((CONFIGURE, error)))?;
    }
    while group.len() < count {
        match open_next(addr, options) {
            Ok(listener) => group.push(listener),
            Err((attempt, error)) if error.kind() == io::ErrorKind::AddrInUse => {
                return Ok((group, Some(fail((attempt, error)))));
            }
            Err(failure) => return Err(fail(failure)),
        }
    }
    Ok((group, None))
}

/// The step that failed, in words, and the system's answer.
type Failure = (&'static str, io::Error);

const OPEN: &str = "to open a socket";
const CONFIGURE: &str = "to set the options of a socket";
const BIND: &str = "to bind a socket";
const LISTEN: &str = "to listen";
const NAME: &str = "to read back the address of a listener";

/// Opens the member with index 0.
///
/// Without `SO_REUSEPORT` no second listener is possible, not even one of this user, so of several
/// processes that start at once at most one gets past `listen`. The option is set afterwards, which
/// opens the group to the other members: the kernel makes the group when the second one listens and
/// gives this one index 0. (Probing with a separate socket first would leave a gap.) One that stays `alone` has no
/// program that would keep newcomers from its connections, so it does without the option, and nobody can join it.
fn open_first(addr: SocketAddr, alone: bool, options: &ListenOptions) -> Result<OwnedFd, Failure> {
    if options.share_port && addr.port() != 0 {
        return open_member(addr, options);
    }
    let listener = open_bound(addr, options, false)?;
    socket::listen(listener.as_fd(), options.backlog).map_err(|error| (LISTEN, error))?;
    if options.share_port || !alone {
        set_reuse_port(listener.as_fd()).map_err(|error| (CONFIGURE, error))?;
    }
    Ok(listener)
}

/// Opens a member after the first.
///
/// The address is ours by now. A rival that starts at the same time still looks like a listener for
/// the instant in which its `listen` is being refused, so "in use" is asked again a few times.
fn open_next(addr: SocketAddr, options: &ListenOptions) -> Result<OwnedFd, Failure> {
    for _ in 1..MEMBER_ATTEMPTS {
        match open_member(addr, options) {
            Err((_, error)) if error.kind() == io::ErrorKind::AddrInUse => thread::yield_now(),
            other => return other,
        }
    }
    open_member(addr, options)
}

/// Attempts to open a member on an address that is ours already.
const MEMBER_ATTEMPTS: u32 = 100;

fn open_member(addr: SocketAddr, options: &ListenOptions) -> Result<OwnedFd, Failure> {
    let listener = open_bound(addr, options, true)?;
    socket::listen(listener.as_fd(), options.backlog).map_err(|error| (LISTEN, error))?;
    Ok(listener)
}

fn open_bound(addr: SocketAddr, options: &ListenOptions, reuse_port: bool) -> Result<OwnedFd, Failure> {
    let listener = socket::stream_socket(addr).map_err(|error| (OPEN, error))?;
    configure(listener.as_fd(), addr, options).map_err(|error| (CONFIGURE, error))?;
    if reuse_port {
        set_reuse_port(listener.as_fd()).map_err(|error| (CONFIGURE, error))?;
    }
    socket::bind(listener.as_fd(), addr).map_err(|error| (BIND, error))?;
    Ok(listener)
}

fn set_reuse_port(fd: BorrowedFd<'_>) -> io::Result<()> {
    socket::set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)
}

fn configure(fd: BorrowedFd<'_>, addr: SocketAddr, options: &ListenOptions) -> io::Result<()> {
    // Connections of a previous run in TIME_WAIT must not keep us from starting.
    socket::set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    if addr.is_ipv6() {
        let v6_only = i32::from(options.v6_only);
        socket::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, v6_only)?;
    }
    configure_common(fd, options)
}

/// What may be set at any time.
fn configure_common(fd: BorrowedFd<'_>, options: &ListenOptions) -> io::Result<()> {
    let tcp = |name, value| socket::set_option(fd, libc::IPPROTO_TCP, name, value);
    tcp(libc::TCP_NODELAY, 1)?;
    if let Some(idle) = options.keepalive {
        let idle = seconds(idle);
        socket::set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
        tcp(libc::TCP_KEEPIDLE, idle)?;
        tcp(libc::TCP_KEEPINTVL, (idle / 4).max(1))?;
        tcp(libc::TCP_KEEPCNT, KEEPALIVE_PROBES)?;
    }
    if let Some(timeout) = options.user_timeout {
        let timeout_ms = timeout.as_nanos().div_ceil(1_000_000);
        tcp(libc::TCP_USER_TIMEOUT, i32::try_from(timeout_ms).unwrap_or(i32::MAX))?;
    }
    Ok(())
}

/// Whole seconds, rounded up, within what the kernel takes for a keep-alive time.
fn seconds(duration: Duration) -> i32 {
    let seconds = duration.as_nanos().div_ceil(1_000_000_000).clamp(1, KEEPALIVE_SECONDS_MAX);
    i32::try_from(seconds).unwrap_or(i32::MAX)
}

/// Unanswered keep-alive probes that end a connection.
const KEEPALIVE_PROBES: i32 = 4;
/// `MAX_TCP_KEEPIDLE` of the kernel.
const KEEPALIVE_SECONDS_MAX: u128 = 32_767;

impl BindError {
    fn new(addr: SocketAddr, count: usize, options: &ListenOptions, attempt: &'static str, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EADDRINUSE) => {
                let holder = procfs::listener_holders(addr).into_iter().next();
                Self::InUse { addr, holder, sharing: Sharing::of(addr, options) }
            }
            Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT) => Self::NotAvailable { addr },
            Some(libc::EACCES | libc::EPERM) => Self::Permission { addr },
            Some(libc::EMFILE | libc::ENFILE) => Self::TooManyFiles { addr, count },
            _ => Self::Other { addr, attempt, error },
        }
    }
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse { addr, holder, sharing } => {
                write!(f, "cannot listen on {addr}: the address is in use by ")?;
                match holder {
                    Some(holder) if holder.pid == std::process::id() => {
                        return f.write_str(
                            "this process itself: two of the addresses that were given overlap (0.0.0.0 is every address of \
                             IPv4), or another server of this process has it, one that is ending perhaps; give each address \
                             once, and wait for the end of a server (`join`, `stop`) before the next one is started",
                        );
                    }
                    Some(holder) => write!(f, "{holder}")?,
                    None => write!(f, "a process that /proc does not show (try `ss -ltnp` as root)")?,
                }
                write!(f, "; {}", sharing.remedy())
            }
            Self::NotAvailable { addr } => write!(
                f,
                "cannot listen on {addr}: no network interface of this machine has this address{}; \
                 `ip address` lists those it has",
                if addr.is_ipv6() { ", or IPv6 is switched off" } else { "" }
            ),
            Self::Permission { addr } => write!(
                f,
                "cannot listen on {addr}: permission denied; ports below \
                 net.ipv4.ip_unprivileged_port_start (1024) need CAP_NET_BIND_SERVICE: with systemd \
                 `AmbientCapabilities=CAP_NET_BIND_SERVICE`, otherwise \
                 `setcap cap_net_bind_service=+ep` on the program, or choose a higher port"
            ),
            Self::TooManyFiles { addr, count } => write!(
                f,
                "cannot open {count} listeners on {addr}: too many open files; raise the limit \
                 (`ulimit -n`, with systemd `LimitNOFILE=`) or use fewer executors"
            ),
            Self::Other { addr, attempt, error } => write!(f, "cannot listen on {addr}: failed {attempt}: {error}"),
        }
    }
}

impl Error for BindError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Other { error, .. } => Some(error),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::sys::poll::wait_readable;

    const WAIT: Option<Duration> = Some(Duration::from_secs(5));

    fn loopback() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    fn option(fd: BorrowedFd<'_>, level: i32, name: i32) -> i32 {
        let mut value = 0_i32;
        let mut length = 4;
        // SAFETY: `value` is live and `length` its size.
        let result = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length) };
        assert_eq!(result, 0);
        value
    }

    #[test]
    fn port_zero_gives_every_member_the_same_free_port() {
        let group = bind_group(loopback(), 4, &ListenOptions::default()).unwrap();
        let ports: Vec<_> = group.iter().map(|fd| socket::local_addr(fd.as_fd()).unwrap().port()).collect();
        assert_ne!(ports[0], 0);
        assert!(ports.iter().all(|port| *port == ports[0]));
    }

    #[test]
    fn position_in_the_list_is_the_index_in_the_group() {
        let group = bind_group(loopback(), 5, &ListenOptions::default()).unwrap();
        let addr = socket::local_addr(group[0].as_fd()).unwrap();
        for index in [3, 0, 4, 1, 2] {
            let program = [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: index }];
            socket::attach_reuseport_cbpf(group[0].as_fd(), &program).unwrap();
            let _client = TcpStream::connect(addr).unwrap();
            let fds: Vec<_> = group.iter().map(AsFd::as_fd).collect();
            let ready = wait_readable(&fds, WAIT).unwrap();
            assert_eq!(ready, [index as usize]);
            socket::accept(fds[index as usize]).unwrap();
        }
    }

    #[test]
    fn accepted_connections_inherit_the_options() {
        let options = ListenOptions {
            keepalive: Some(Duration::from_secs(30)),
            user_timeout: Some(Duration::from_millis(12_345)),
            ..ListenOptions::default()
        };
        let group = bind_group(loopback(), 1, &options).unwrap();
        let _client = TcpStream::connect(socket::local_addr(group[0].as_fd()).unwrap()).unwrap();
        wait_readable(&[group[0].as_fd()], WAIT).unwrap();
        let (socket, _) = socket::accept(group[0].as_fd()).unwrap();
        let tcp = |name| option(socket.as_fd(), libc::IPPROTO_TCP, name);
        assert_eq!(tcp(libc::TCP_NODELAY), 1);
        assert_eq!(tcp(libc::TCP_KEEPIDLE), 30);
        assert_eq!(tcp(libc::TCP_KEEPINTVL), 7);
        assert_eq!(tcp(libc::TCP_KEEPCNT), 4);
        assert_eq!(tcp(libc::TCP_USER_TIMEOUT), 12_345);
        assert_eq!(option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE), 1);
    }

    #[test]
    fn a_second_group_is_refused_and_the_holder_named() {
        for count in [1, 3] {
            let group = bind_group(loopback(), count, &ListenOptions::default()).unwrap();
            let addr = socket::local_addr(group[0].as_fd()).unwrap();
            let error = bind_group(addr, 2, &ListenOptions::default()).unwrap_err();
            let BindError::InUse { addr: reported, holder: Some(holder), .. } = &error else {
                panic!("{error:?}");
            };
            assert_eq!(*reported, addr);
            assert_eq!(holder.pid, std::process::id());
            assert!(error.to_string().contains("this process itself"), "{error}");
        }
    }

    #[test]
    fn a_single_listener_lets_nobody_join_unless_it_is_to() {
        let shared = ListenOptions { share_port: true, ..ListenOptions::default() };
        for (options, joined) in [(ListenOptions::default(), false), (shared.clone(), true)] {
            let group = bind_group(loopback(), 1, &options).unwrap();
            let addr = socket::local_addr(group[0].as_fd()).unwrap();
            assert_eq!(bind_group(addr, 1, &shared).is_ok(), joined);
        }
    }

    #[test]
    fn a_listener_that_shares_its_port_does_not_make_us_share_it() {
        let group = bind_group(loopback(), 2, &ListenOptions::default()).unwrap();
        let addr = socket::local_addr(group[0].as_fd()).unwrap();
        let shared = ListenOptions { share_port: true, ..ListenOptions::default() };
        // Sharing is asked of the newcomer only; the kernel lets a member of the same user in.
        let second = bind_group(addr, 2, &shared).unwrap();
        assert_eq!(socket::local_addr(second[1].as_fd()).unwrap(), addr);
        drop(group);
        let error = bind_group(addr, 1, &ListenOptions::default()).unwrap_err();
        assert!(matches!(error, BindError::InUse { sharing: Sharing::WouldHelp, .. }), "{error:?}");
    }

    #[test]
    fn an_ordinary_listener_and_one_on_all_addresses_are_in_the_way_too() {
        let other = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = other.local_addr().unwrap().port();
        for share_port in [false, true] {
            let options = ListenOptions { share_port, ..ListenOptions::default() };
            let addr = SocketAddr::from(([127, 0, 0, 1], port));
            let error = bind_group(addr, 1, &options).unwrap_err();
            let BindError::InUse { holder, sharing, .. } = error else {
                panic!("{error:?}");
            };
            // Nobody can join an ordinary listener.
            assert_eq!(sharing, if share_port { Sharing::DidNot } else { Sharing::WouldNot });
            assert_eq!(holder.unwrap().pid, std::process::id());
        }
    }

    #[test]
    fn of_several_starting_at_once_one_wins_and_the_others_see_it() {
        const RIVALS: usize = 3;
        let rounds = 8;
        let mut won = 0;
        for _ in 0..rounds {
            let free = TcpListener::bind(loopback()).unwrap();
            let addr = free.local_addr().unwrap();
            drop(free);
            let barrier = std::sync::Barrier::new(RIVALS);
            let groups: Vec<_> = thread::scope(|scope| {
                let start = || {
                    barrier.wait();
                    bind_group(addr, 3, &ListenOptions::default())
                };
                let threads: Vec<_> = (0..RIVALS).map(|_| scope.spawn(start)).collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            let winners = groups.iter().filter(|group| group.is_ok()).count();
            assert!(winners <= 1);
            won += winners;
        }
        // Two that listen in the same instant may both be refused; that is rare.
        assert!(won > rounds / 2, "{won} of {rounds}");
    }

    #[test]
    fn a_group_is_taken_over_with_its_order_and_grows_at_its_end() {
        let options = ListenOptions::default();
        let old = bind_group(loopback(), 2, &options).unwrap();
        let addr = socket::local_addr(old[0].as_fd()).unwrap();
        let passed = old.iter().map(|listener| listener.try_clone().unwrap()).collect();
        let (group, missing) = adopt_group(addr, passed, 4, &ListenOptions { backlog: 7, ..options }).unwrap();
        assert!(missing.is_none(), "{missing:?}");
        assert_eq!(group.len(), 4);
        for listener in &old {
            assert_eq!(socket::queue_depth(listener.as_fd()).unwrap().1, 7, "the backlog is adapted");
        }
        drop(old);
        for index in [3_u32, 0, 2, 1] {
            let to = [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: index }];
            socket::attach_reuseport_cbpf(group[1].as_fd(), &to).unwrap();
            let _client = TcpStream::connect(addr).unwrap();
            let fds: Vec<_> = group.iter().map(AsFd::as_fd).collect();
            assert_eq!(wait_readable(&fds, WAIT).unwrap(), [index as usize]);
            socket::accept(fds[index as usize]).unwrap();
        }
    }

    #[test]
    fn a_single_listener_of_somebody_who_knew_nothing_of_groups_becomes_the_first_of_one() {
        let plain = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = plain.local_addr().unwrap();
        let (group, missing) = adopt_group(addr, vec![plain.into()], 3, &ListenOptions::default()).unwrap();
        assert!(missing.is_none(), "{missing:?}");
        assert_eq!(group.len(), 3);
        let error = socket::accept(group[0].as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "it does not block any more");
    }

    #[test]
    fn ipv6_listens_alone_or_with_ipv4_as_asked() {
        for v6_only in [true, false] {
            let options = ListenOptions { v6_only, ..ListenOptions::default() };
            let group = match bind_group("[::]:0".parse().unwrap(), 2, &options) {
                Ok(group) => group,
                Err(BindError::NotAvailable { .. }) => {
                    eprintln!("skipped: no IPv6 here");
                    return;
                }
                Err(error) => panic!("{error}"),
            };
            let port = socket::local_addr(group[1].as_fd()).unwrap().port();
            if TcpListener::bind("[::1]:0").is_ok() {
                TcpStream::connect(("::1", port)).unwrap();
            }
            assert_eq!(TcpStream::connect(("127.0.0.1", port)).is_err(), v6_only);
        }
    }

    #[test]
    fn an_address_of_another_machine_is_not_available() {
        let addr = "192.0.2.1:0".parse().unwrap();
        let error = bind_group(addr, 1, &ListenOptions::default()).unwrap_err();
        assert!(matches!(error, BindError::NotAvailable { .. }), "{error:?}");
    }

    #[test]
    fn every_failure_says_what_to_do() {
        let addr: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let of = |errno| {
            BindError::new(addr, 3, &ListenOptions::default(), BIND, io::Error::from_raw_os_error(errno)).to_string()
        };
        assert!(of(libc::EACCES).contains("CAP_NET_BIND_SERVICE"));
        assert!(of(libc::EACCES).contains("systemd"));
        assert!(of(libc::EMFILE).contains("3 listeners on 127.0.0.1:80"));
        assert!(of(libc::EADDRNOTAVAIL).contains("ip address"));
        assert!(of(libc::EINVAL).contains("to bind a socket"));
        let none = bind_group(addr, 0, &ListenOptions::default()).unwrap_err();
        assert!(matches!(none, BindError::Other { .. }));
    }
}
