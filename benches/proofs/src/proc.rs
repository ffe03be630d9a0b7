//! What /proc says about the server: descriptors, threads, memory, CPU time, wake-ups; and about others: who listens on a
//! port, who uses the CPUs.

use std::fs;
use std::io;
use std::time::Instant;

/// One look at a process.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub at: Instant,
    pub fds: u64,
    pub threads: u64,
    /// Bytes.
    pub rss: u64,
    /// Bytes; the most since the process began.
    pub rss_peak: u64,
    /// Nanoseconds on a CPU, of the threads that live.
    pub cpu_ns: u64,
    /// Nanoseconds that these threads were runnable and did not run.
    pub queued_ns: u64,
}

/// One look at a thread.
#[derive(Clone, Debug)]
pub struct Thread {
    pub id: u32,
    pub name: String,
    pub cpu_ns: u64,
    /// Times that it gave up the CPU of itself, that is: slept and was woken.
    pub sleeps: u64,
}

/// A thread of any process, and how it is scheduled.
#[derive(Clone, Debug)]
pub struct Task {
    pub id: u32,
    pub process: u32,
    pub name: String,
    /// As in `sched.h`: [`NORMAL`] and its kin.
    pub policy: u32,
    pub nice: i64,
    pub cpu_ns: u64,
}

/// Scheduling policies, from `sched.h`.
pub const NORMAL: u32 = 0;
pub const FIFO: u32 = 1;
pub const ROUND_ROBIN: u32 = 2;
pub const BATCH: u32 = 3;
pub const DEADLINE: u32 = 6;

pub fn sample(pid: u32) -> io::Result<Sample> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(Sample {
        at: Instant::now(),
        fds: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
        threads: field(&status, "Threads:"),
        rss: field(&status, "VmRSS:") * 1024,
        rss_peak: field(&status, "VmHWM:") * 1024,
        cpu_ns: cpu_ns(pid)?,
        queued_ns: thread_ids(pid)?.into_iter().map(|id| schedstat(pid, id, 1)).sum(),
    })
}

/// Proportional set size in bytes: memory shared with other processes counts in parts. Costs a walk over all pages.
pub fn pss(pid: u32) -> io::Result<u64> {
    Ok(field(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?, "Pss:") * 1024)
}

/// Time on a CPU of all threads that live. A thread that ended meanwhile takes its time with it.
pub fn cpu_ns(pid: u32) -> io::Result<u64> {
    Ok(thread_ids(pid)?.into_iter().map(|id| schedstat(pid, id, 0)).sum())
}

pub fn threads(pid: u32) -> io::Result<Vec<Thread>> {
    let look = |id| {
        let status = fs::read_to_string(format!("/proc/{pid}/task/{id}/status")).ok()?;
        let name = status.lines().find_map(|line| line.strip_prefix("Name:"))?.trim().to_owned();
        Some(Thread { id, name, cpu_ns: schedstat(pid, id, 0), sleeps: field(&status, "voluntary_ctxt_switches:") })
    };
    Ok(thread_ids(pid)?.into_iter().filter_map(look).collect())
}

/// All threads of all processes, the kernel's own left out.
pub fn tasks() -> Vec<Task> {
    const KERNEL_THREAD: u64 = 0x0020_0000; // PF_KTHREAD
    let look = |process: u32, id: u32| {
        let stat = fs::read_to_string(format!("/proc/{process}/task/{id}/stat")).ok()?;
        let (name, flags, nice, policy) = parse_stat(&stat)?;
        let task = || Task { id, process, name, policy, nice, cpu_ns: schedstat(process, id, 0) };
        (flags & KERNEL_THREAD == 0).then(task)
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes
        .flat_map(|process| thread_ids(process).unwrap_or_default().into_iter().map(move |id| (process, id)))
        .filter_map(|(process, id)| look(process, id))
        .collect()
}

/// The name, the flags, the nice value and the policy in a line of /proc/PID/stat. The name may hold anything.
pub fn parse_stat(line: &str) -> Option<(String, u64, i64, u32)> {
    let (name, fields) = line.split_once('(')?.1.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // Counted from 1 with the number and the name in proc(5): 3 is the first here.
    let field = |number: usize| fields.get(number - 3);
    Some((name.to_owned(), field(9)?.parse().ok()?, field(19)?.parse().ok()?, field(41)?.parse().ok()?))
}

/// Tasks that ran or wanted to, in the mean of the last minute.
pub fn load_average() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

fn thread_ids(pid: u32) -> io::Result<Vec<u32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// The scheduler's account, in nanoseconds; /proc/PID/stat counts in ticks of 10 ms and misses short turns.
/// Field 0 is time on a CPU, field 1 time spent runnable without one.
fn schedstat(pid: u32, id: u32, field: usize) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{id}/schedstat")).unwrap_or_default();
    text.split_whitespace().nth(field).and_then(|time| time.parse().ok()).unwrap_or(0)
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Whether this process may take capabilities away from those that it starts.
pub fn may_drop_capabilities() -> bool {
    const SETPCAP: u32 = 8;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or_default();
    u64::from_str_radix(effective.trim(), 16).is_ok_and(|bits| bits & 1 << SETPCAP != 0)
}

/// How many sockets listen on a TCP port, of any process and address.
pub fn listeners(port: u16) -> usize {
    let listens = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next().and_then(|address| address.rsplit(':').next()?.to_owned().into());
        let state = fields.nth(1);
        state == Some("0A") && local.and_then(|text: String| u16::from_str_radix(&text, 16).ok()) == Some(port)
    };
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .map(|table| table.lines().skip(1).filter(|line| listens(line)).count())
        .sum()
}
