//! A network of this process's own, so that the kernel's counters tell of the proof alone.

use std::fs;
use std::process::Command;

use crate::sys;

/// Gives this process, and the servers it starts from now on, a network namespace with nothing but a loopback. It goes
/// with the last of them. Needs CAP_SYS_ADMIN.
pub fn enter() -> Result<(), String> {
    sys::unshare_network().map_err(|error| format!("making a network namespace (as root?): {error}"))?;
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("ip link set lo up: {status}")),
        Err(error) => Err(format!("ip link set lo up (iproute2 is needed): {error}")),
    }
}

/// The counters that tell of lost or refused connections.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// SYNs that were sent again.
    pub syn_retransmits: u64,
    /// Segments with RST that were sent.
    pub resets: u64,
    /// SYNs or handshakes dropped because a listener's queue was full, or for another reason.
    pub listen_drops: u64,
    /// All segments that were sent again.
    pub retransmits: u64,
}

impl Counters {
    pub fn read() -> Self {
        let (netstat, snmp) = (table("/proc/self/net/netstat"), table("/proc/self/net/snmp"));
        Self {
            syn_retransmits: value(&netstat, "TcpExt:", "TCPSynRetrans"),
            resets: value(&snmp, "Tcp:", "OutRsts"),
            listen_drops: value(&netstat, "TcpExt:", "ListenDrops"),
            retransmits: value(&snmp, "Tcp:", "RetransSegs"),
        }
    }

    pub fn since(&self, before: &Self) -> Self {
        Self {
            syn_retransmits: self.syn_retransmits - before.syn_retransmits,
            resets: self.resets - before.resets,
            listen_drops: self.listen_drops - before.listen_drops,
            retransmits: self.retransmits - before.retransmits,
        }
    }
}

fn table(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// A line of names is followed by one of values; both begin with the same word.
fn value(text: &str, begin: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter(|line| line.starts_with(begin));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let mut pairs = names.split_whitespace().zip(values.split_whitespace());
    pairs.find(|pair| pair.0 == name).and_then(|pair| pair.1.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let text = "TcpExt: A B TCPSynRetrans C\nTcpExt: 1 2 3 4\nIpExt: TCPSynRetrans\nIpExt: 9\n";
        assert_eq!(value(text, "TcpExt:", "TCPSynRetrans"), 3);
        assert_eq!(value(text, "TcpExt:", "D"), 0);
        assert_eq!(value("", "TcpExt:", "A"), 0);
    }
}
