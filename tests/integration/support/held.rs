//! What this process holds of the system's: descriptors, threads, memory. For tests in a process of their own.

use std::collections::BTreeMap;
use std::fs;

use super::heap;

/// All of it at one moment.
#[derive(Debug)]
pub struct Held {
    pub descriptors: BTreeMap<String, usize>,
    pub threads: Vec<Thread>,
    /// Bytes that are allocated.
    pub heap: usize,
    /// Bytes that are in memory and not pages of a file.
    pub anonymous: usize,
    /// Bytes that are mapped to be written, in memory or not.
    pub data: usize,
    /// Memory that the kernel was given for input and output, as often as it was given.
    pub pinned_kib: u64,
}

impl Held {
    pub fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").expect("/proc is there");
        Self {
            descriptors: own_descriptors(),
            threads: threads(),
            heap: heap::in_use(),
            anonymous: 1024 * field(&status, "RssAnon:") as usize,
            data: 1024 * field(&status, "VmData:") as usize,
            pinned_kib: field(&status, "VmPin:"),
        }
    }

    /// Descriptors of a kind.
    pub fn count(&self, kind: &str) -> usize {
        self.descriptors.get(kind).copied().unwrap_or(0)
    }
}

/// A thread of this process, and how often it has slept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    pub id: String,
    pub sleeps: u64,
}

/// Those that live.
pub fn threads() -> Vec<Thread> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/task").expect("/proc is there").flatten() {
        // It may have ended meanwhile.
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
        let id = entry.file_name().to_string_lossy().into_owned();
        found.push(Thread { id, sleeps: field(&status, "voluntary_ctxt_switches:") });
    }
    found
}

fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("it is there");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
}

/// Open descriptors by kind: `socket`, `pipe`, `eventfd`, `io_uring`; a file by its name.
pub fn own_descriptors() -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd").expect("/proc is there") {
        let Ok(target) = fs::read_link(entry.expect("it can be read").path()) else { continue };
        let target = target.to_string_lossy().into_owned();
        *kinds.entry(kind(&target)).or_default() += 1;
    }
    kinds
}

/// `anon_inode:[eventfd]`, `socket:[12345]`, `/dev/null`.
fn kind(target: &str) -> String {
    let anonymous = target.strip_prefix("anon_inode:").map(|kind| kind.trim_matches(['[', ']']));
    anonymous.or_else(|| target.split(':').next()).unwrap_or_default().to_owned()
}
