//! Starts and ends the servers, and asks the kernel about ports and CPU time.

use std::fs;
use std::io;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

/// How long a server may take to listen, and how long a port may take to become free again.
const START_MAX: Duration = Duration::from_secs(10);
/// From SIGTERM to SIGKILL.
const STOP_MAX: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A server this program started. Dropping it ends the process.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Starts a server confined to one CPU and waits until the port is listened on.
    pub fn start(arguments: &[String], cpu: usize, port: u16) -> Result<Self, String> {
        // Should this program be killed, the kernel ends the server too: a forgotten server with SO_REUSEPORT
        // would silently take a share of the next run's load.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "taskset", "-c", &cpu.to_string()])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("start {}: {error}", arguments.join(" ")))?;
        let mut process = Self(child);
        let deadline = Instant::now() + START_MAX;
        while !listening(port)? {
            if let Ok(Some(status)) = process.0.try_wait() {
                return Err(format!("`{}` ended with {status}", arguments.join(" ")));
            }
            if Instant::now() > deadline {
                return Err(format!("`{}` does not listen on port {port}", arguments.join(" ")));
            }
            thread::sleep(LOOK_EVERY);
        }
        Ok(process)
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// The CPU time the process has used.
    pub fn cpu_use(&self) -> Result<CpuUse, String> {
        let path = format!("/proc/{}/stat", self.id());
        let failed = |error: io::Error| format!("read {path}: {error}");
        let text = fs::read_to_string(&path).map_err(failed)?;
        let (user, kernel) = cpu_ticks(&text).ok_or_else(|| format!("{path} reads: {text}"))?;
        let mut total_ns = 0;
        for thread in fs::read_dir(format!("/proc/{}/task", self.id())).map_err(failed)? {
            // A thread that ends between the listing and this line takes its time with it.
            let path = thread.map_err(failed)?.path().join("schedstat");
            let text = fs::read_to_string(path).unwrap_or_default();
            total_ns += text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0_u64);
        }
        let per_second = rustix::param::clock_ticks_per_second() as f64;
        let [user_s, kernel_s] = [user, kernel].map(|ticks| ticks as f64 / per_second);
        Ok(CpuUse { user_s, kernel_s, total_s: total_ns as f64 / 1e9 })
    }

    /// An error if the process has ended by itself.
    pub fn check_alive(&mut self) -> Result<(), String> {
        match self.0.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!("the server ended with {status}")),
            Err(error) => Err(format!("wait for the server: {error}")),
        }
    }

    fn stop(&mut self) -> io::Result<()> {
        if self.0.try_wait()?.is_some() {
            return Ok(());
        }
        // Not yet waited for, so the number still belongs to our child.
        kill_process(Pid::from_child(&self.0), Signal::TERM)?;
        let deadline = Instant::now() + STOP_MAX;
        while Instant::now() < deadline {
            if self.0.try_wait()?.is_some() {
                return Ok(());
            }
            thread::sleep(LOOK_EVERY);
        }
        self.0.kill()?;
        self.0.wait().map(drop)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("warning: end the server with pid {}: {error}", self.id());
        }
    }
}

/// CPU time in seconds, of all threads alive. Time stolen by a hypervisor is not in it (it is in perf's task-clock).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CpuUse {
    /// Estimated: the kernel divides the exact sum by sampling at its tick.
    pub user_s: f64,
    /// Estimated, as above.
    pub kernel_s: f64,
    /// The scheduler's own account, in nanoseconds.
    pub total_s: f64,
}

impl CpuUse {
    pub fn since(self, before: Self) -> Self {
        Self {
            user_s: self.user_s - before.user_s,
            kernel_s: self.kernel_s - before.kernel_s,
            total_s: self.total_s - before.total_s,
        }
    }
}

/// Waits until nothing listens on the port; a ring's sockets go a moment after its process.
pub fn wait_until_free(port: u16) -> Result<(), String> {
    let deadline = Instant::now() + STOP_MAX;
    while listening(port)? {
        if Instant::now() > deadline {
            return Err(format!(
                "something listens on port {port}; with SO_REUSEPORT it would take a share of the load. \
                 Find it with `ss -ltnp sport = :{port}`, or choose another --port"
            ));
        }
        thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

fn listening(port: u16) -> Result<bool, String> {
    for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
        match fs::read_to_string(path) {
            Ok(text) if table_listens(&text, port) => return Ok(true),
            Ok(_) => {}
            // A kernel without IPv6 has no tcp6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("read {path}: {error}")),
        }
    }
    Ok(false)
}

/// Whether a table in the form of /proc/net/tcp has a socket in state LISTEN (0A) on the port.
fn table_listens(table: &str, port: u16) -> bool {
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let local = fields.next().and_then(|address| address.rsplit(':').next());
        let local = local.and_then(|hex| u16::from_str_radix(hex, 16).ok());
        local == Some(port) && fields.nth(1) == Some("0A")
    })
}

/// Fields 14 and 15 of /proc/PID/stat. The second field is a name that may hold spaces and brackets.
fn cpu_ticks(stat: &str) -> Option<(u64, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// Time of one CPU since boot, in ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTime {
    total: u64,
    idle: u64,
    /// What the hypervisor gave to others.
    steal: u64,
}

/// What disturbed a run, as shares of its time on the server's CPU.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Disturbance {
    /// Taken by the hypervisor.
    pub steal_percent: f64,
    /// Used by something other than the server.
    pub others_percent: f64,
}

impl CpuTime {
    pub fn read(cpu: usize) -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?, cpu)
    }

    fn parse(stat: &str, cpu: usize) -> Option<Self> {
        let name = format!("cpu{cpu}");
        let line = stat.lines().find(|line| line.split(' ').next() == Some(&name))?;
        // user nice system idle iowait irq softirq steal; what follows is counted in these already.
        let fields: Vec<u64> = line.split(' ').skip(1).take(8).flat_map(str::parse).collect();
        let [_user, _nice, _system, idle, iowait, _irq, _softirq, steal] = fields[..] else {
            return None;
        };
        Some(Self { total: fields.iter().sum(), idle: idle + iowait, steal })
    }

    /// What disturbed a server that used `server_s` seconds of this CPU since `before`.
    pub fn disturbance_since(self, before: Self, server_s: f64) -> Option<Disturbance> {
        let total = self.total.checked_sub(before.total).filter(|ticks| *ticks > 0)? as f64;
        let steal = self.steal.checked_sub(before.steal)? as f64;
        // The kernel lets idle time run backwards by a tick at times.
        let idle = self.idle.saturating_sub(before.idle) as f64;
        let server = server_s * rustix::param::clock_ticks_per_second() as f64;
        Some(Disturbance {
            steal_percent: 100.0 * steal / total,
            others_percent: 100.0 * (total - steal - idle - server).max(0.0) / total,
        })
    }
}

/// Kernel and processor, for whoever reads the numbers later.
pub fn machine() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processors.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, name)| name);
    let count = processors.lines().filter(|line| line.starts_with("processor")).count();
    format!("Linux {}, {count} x {model}", kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_found() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid
   0: 0100007F:46A0 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0
   1: 0100007F:46A1 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0
";
        assert!(table_listens(table, 18080));
        assert!(!table_listens(table, 18081), "an established connection is no listener");
        let six = "head\n 0: 00000000000000000000000000000000:1F90 0000:0000 0A rest\n";
        assert!(table_listens(six, 8080));
        assert!(!table_listens("", 80));
    }

    #[test]
    fn cpu_time_of_a_process_with_an_odd_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 123 456 0 0 20 0 1 0";
        assert_eq!(cpu_ticks(stat), Some((123, 456)));
        assert_eq!(cpu_ticks("nonsense"), None);
    }

    #[test]
    fn disturbances() {
        let at = |idle, steal| {
            let text = format!("cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 10 0 10 {idle} 0 0 0 {steal} 0 0\n");
            CpuTime::parse(&text, 0).unwrap()
        };
        let disturbance = at(180, 20).disturbance_since(at(100, 0), 0.0).unwrap();
        assert_eq!((disturbance.steal_percent, disturbance.others_percent), (20.0, 0.0));
        assert_eq!(at(1, 1).disturbance_since(at(1, 1), 0.0), None);
        assert_eq!(CpuTime::parse("cpu0 1 2\n", 0), None);
    }
}
