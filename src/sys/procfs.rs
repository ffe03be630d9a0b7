//! What `/proc` tells: who holds a port, which kernel this is, what this process uses.
//!
//! `/proc` may be hidden or incomplete (containers, `hidepid`), so nothing here is an error: what
//! cannot be read is absent from the answer.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

/// A process that holds a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub pid: u32,
    /// The kernel's name of the process, at most 15 bytes.
    pub command: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}

/// The processes that listen on the port of `addr` at an address that overlaps with it, by pid.
///
/// Reads the descriptors of every process it may look at: for error messages, not for a hot path.
/// Listeners of other users need root, those of other containers cannot be seen.
pub fn listener_holders(addr: SocketAddr) -> Vec<Holder> {
    let inodes: HashSet<String> = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"]
        .into_iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|table| listening_inodes(&table, addr))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    if inodes.is_empty() {
        return Vec::new();
    }
    let mut holders: Vec<_> = numbered("/proc")
        .filter(|pid| holds_any(*pid, &inodes))
        .map(|pid| Holder { pid, command: command(pid) })
        .collect();
    holders.sort_by_key(|holder| holder.pid);
    holders
}

/// The release of the running kernel as `uname -r` prints it; "unknown" without `/proc`.
pub fn kernel_release() -> String {
    match fs::read_to_string("/proc/sys/kernel/osrelease") {
        Ok(release) => release.trim().to_owned(),
        Err(_) => "unknown".to_owned(),
    }
}

/// Whether replacing a reuseport group's classic BPF program under traffic is safe in this release
/// (CVE-2026-52910, a use after free, before 6.1.176, 6.6.143, 6.12.94 and 6.18.36).
///
/// `None` where the number does not tell: other series, and distributions that count their own way
/// (`6.1.0-18-amd64`, `6.8.0-45-generic`).
pub fn cbpf_replacement_is_safe(release: &str) -> Option<bool> {
    let digits = release.split(|c: char| !(c.is_ascii_digit() || c == '.'));
    let mut numbers = digits.take(1).flat_map(|version| version.split('.'));
    let mut next = || numbers.next()?.parse::<u32>().ok();
    let (major, minor, patch) = (next()?, next()?, next()?);
    if patch == 0 && release.contains('-') {
        return None;
    }
    let fixed_in = match (major, minor) {
        (6, 1) => 176,
        (6, 6) => 143,
        (6, 12) => 94,
        (6, 18) => 36,
        _ => return None,
    };
    Some(patch >= fixed_in)
}

/// Whether a kernel of this release counts the memory of rings as locked: since 6.14.
pub fn counts_rings_as_locked(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().ok());
    let mut next = || numbers.next().flatten().unwrap_or_default();
    (next(), next()) >= (6, 14)
}

/// Whether this process may lock as much memory as it likes: CAP_IPC_LOCK, in no user namespace but the first.
pub fn may_lock_any_memory() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    let namespace = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let is_the_first = namespace.split_whitespace().eq(["0", "0", "4294967295"]);
    is_the_first && effective.is_some_and(|capabilities| capabilities >> CAP_IPC_LOCK & 1 == 1)
}

/// What the kernel says about a thread's use of CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheduling {
    pub state: ThreadState,
    /// Time it was ready to run and waited for a CPU, since its start; a wait counts when it is over. `None` where the
    /// kernel is built without `CONFIG_SCHED_INFO`.
    pub run_delay: Option<Duration>,
}

/// What a thread is doing at this instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadState {
    /// Runs, or waits for a CPU to run on.
    Runnable,
    /// Waits in the kernel for something else.
    Blocked,
    /// By a signal or a debugger.
    Stopped,
    /// Ending.
    Other,
}

/// Scheduling of the thread with this number, of this process; `None` when it has ended or `/proc` does not tell.
pub fn scheduling(thread: i32) -> Option<Scheduling> {
    let read = |file: &str| fs::read_to_string(format!("/proc/self/task/{thread}/{file}")).ok();
    let state = thread_state(&read("stat")?)?;
    let run_delay = read("schedstat").and_then(|text| text.split(' ').nth(1)?.parse().ok().map(Duration::from_nanos));
    Some(Scheduling { state, run_delay })
}

/// From the text of a `stat`: the field after the name, which is in parentheses and may contain some itself.
fn thread_state(stat: &str) -> Option<ThreadState> {
    let (_, fields) = stat.rsplit_once(") ")?;
    Some(match fields.chars().next()? {
        'R' => ThreadState::Runnable,
        'S' | 'D' | 'I' => ThreadState::Blocked,
        'T' | 't' => ThreadState::Stopped,
        _ => ThreadState::Other,
    })
}

/// Inodes of the listeners in the text of /proc/net/tcp or tcp6 that overlap with `addr`.
fn listening_inodes(table: &str, addr: SocketAddr) -> Vec<u64> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<_> = line.split_whitespace().take(10).collect();
            let [_, local, _, LISTEN, .., inode] = fields[..] else {
                return None;
            };
            let (ip, port) = local.split_once(':')?;
            let port = u16::from_str_radix(port, 16).ok()?;
            let matches = port == addr.port() && overlap(parse_ip(ip)?, addr.ip());
            matches.then(|| inode.parse().ok())?
        })
        .collect()
}

/// The state "listening" in /proc/net/tcp.
const LISTEN: &str = "0A";

/// An address of /proc/net/tcp: 32-bit words of network order, each printed as a native integer.
fn parse_ip(text: &str) -> Option<IpAddr> {
    let words: Vec<[u8; 4]> = (0..text.len() / 8)
        .map(|i| u32::from_str_radix(text.get(i * 8..i * 8 + 8)?, 16).ok())
        .map(|word| word.map(u32::to_ne_bytes))
        .collect::<Option<_>>()?;
    match words.len() {
        1 => Some(Ipv4Addr::from(words[0]).into()),
        4 => {
            let octets: [u8; 16] = words.concat().try_into().ok()?;
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

/// Whether listeners on both would exclude one another. Whether one on `::` takes IPv4 as well is
/// not in /proc, so it is taken for granted.
fn overlap(one: IpAddr, two: IpAddr) -> bool {
    let covers = |wide: IpAddr, narrow: IpAddr| match wide {
        IpAddr::V4(ip) => ip.is_unspecified() && narrow.is_ipv4(),
        IpAddr::V6(ip) => ip.is_unspecified(),
    };
    one.to_canonical() == two.to_canonical() || covers(one, two) || covers(two, one)
}

fn holds_any(pid: u32, links: &HashSet<String>) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    entries
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .any(|target| target.to_str().is_some_and(|link| links.contains(link)))
}

fn command(pid: u32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => name.trim_end().to_owned(),
        Err(_) => "unknown".to_owned(),
    }
}

/// The entries of a directory that are numbers.
fn numbered(directory: impl AsRef<Path>) -> impl Iterator<Item = u32> {
    fs::read_dir(directory).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_holder_of_a_port_is_found_and_nobody_once_it_is_closed() {
        for bound in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(bound) else {
                eprintln!("skipped: {bound}");
                continue;
            };
            let addr = listener.local_addr().unwrap();
            let holders = listener_holders(addr);
            let own = std::process::id();
            assert_eq!(holders.iter().filter(|h| h.pid == own).count(), 1);
            let comm = fs::read_to_string("/proc/self/comm").unwrap();
            assert_eq!(holders[0].command, comm.trim_end());
            drop(listener);
            assert!(!listener_holders(addr).iter().any(|h| h.pid == own));
        }
    }

    #[test]
    fn addresses_overlap_as_the_kernel_sees_it() {
        let overlap = |one: &str, two: &str| {
            let (one, two) = (one.parse().unwrap(), two.parse().unwrap());
            assert_eq!(super::overlap(one, two), super::overlap(two, one));
            super::overlap(one, two)
        };
        assert!(overlap("10.0.0.1", "10.0.0.1"));
        assert!(!overlap("10.0.0.1", "10.0.0.2"));
        assert!(overlap("0.0.0.0", "10.0.0.2"));
        assert!(!overlap("0.0.0.0", "::1"));
        assert!(overlap("::", "::1"));
        assert!(overlap("::", "10.0.0.2"));
        assert!(overlap("::ffff:10.0.0.2", "10.0.0.2"));
    }

    #[test]
    fn strange_lines_in_the_table_are_passed_over() {
        let good =
            "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n";
        let table = format!("header\nnonsense\n{good}{}", good.replace(" 0A ", " 01 "));
        let addr = "127.0.0.1:8080".parse().unwrap();
        if cfg!(target_endian = "little") {
            assert_eq!(listening_inodes(&table, addr), [4711]);
        }
        assert_eq!(parse_ip("0100"), None);
        assert_eq!(parse_ip("zzzzzzzz"), None);
    }

    #[test]
    fn safety_of_program_replacement_follows_the_fixed_releases() {
        for (release, expected) in [
            ("6.18.35", Some(false)),
            ("6.18.36", Some(true)),
            ("6.18.44-fc-v657", Some(true)),
            ("6.12.93+deb13-amd64", Some(false)),
            ("6.12.94", Some(true)),
            ("6.6.143-x", Some(true)),
            ("6.1.175", Some(false)),
            ("6.1.0-18-amd64", None),
            ("6.8.0-45-generic", None),
            ("5.15.200", None),
            ("6.18", None),
            ("unknown", None),
            ("", None),
        ] {
            assert_eq!(cbpf_replacement_is_safe(release), expected, "{release}");
        }
    }

    #[test]
    fn a_threads_state_is_the_field_after_its_name() {
        assert_eq!(thread_state("12 (name) S 1 12"), Some(ThreadState::Blocked));
        assert_eq!(thread_state("12 (a) R (b) t 1 12"), Some(ThreadState::Stopped));
        assert_eq!(thread_state("12 (name) Z 1"), Some(ThreadState::Other));
        assert_eq!(thread_state("12 (name"), None);
        assert_eq!(thread_state(""), None);
        // SAFETY: takes no memory.
        let own = scheduling(unsafe { libc::gettid() }).unwrap();
        assert_eq!(own.state, ThreadState::Runnable);
        assert_eq!(scheduling(0), None);
    }

    #[test]
    fn rings_count_as_locked_memory_since_6_14() {
        for (release, counts) in [
            ("6.1.0-9-amd64", false),
            ("6.13.9", false),
            ("6.14", true),
            ("6.18.44-vm", true),
            ("7.0-rc1", true),
            ("?", false),
        ] {
            assert_eq!(counts_rings_as_locked(release), counts, "{release}");
        }
    }

    #[test]
    fn the_kernel_has_a_release() {
        assert!(kernel_release().contains('.'));
    }
}
