//! The command in a process of its own: its log, its end, and what /proc says of it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::{BOUND, Client};

/// A running command; killed when the test is done with it.
pub struct Process {
    child: Child,
    /// What it prints, line by line; disconnected at its end.
    lines: Receiver<String>,
    printed: Vec<String>,
    addresses: Vec<SocketAddr>,
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    /// `None` when a signal ended it.
    pub status: Option<i32>,
    /// The one that did.
    pub signal: Option<i32>,
    pub printed: String,
}

/// `ringleader serve` on a free port, with more arguments, started by way of `wrapper` (a command line; may be empty).
/// Comes back when it serves.
pub fn spawn(wrapper: &[&str], arguments: &[&str]) -> Process {
    let listen = if arguments.contains(&"--listen") { &[][..] } else { &["--listen", "127.0.0.1:0"] };
    Process::start(wrapper, &[&["serve"], listen, arguments].concat()).serving()
}

/// Set in the process that [`alone`] starts.
const ALONE: &str = "RINGLEADER_TEST_ALONE";

/// Whether this is a process of its own for the test of this name; otherwise one is made, and has passed.
#[track_caller]
pub fn alone(name: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let itself = std::env::current_exe().expect("it is running");
    let child = Process::of(Command::new(itself).args([name, "--exact", "--nocapture"]).env(ALONE, "1"));
    child.wait().expect(0, &["1 passed"]);
    false
}

/// Runs `ringleader` to its end by itself.
pub fn run(wrapper: &[&str], arguments: &[&str]) -> Ended {
    Process::start(wrapper, arguments).wait()
}

impl Process {
    fn start(wrapper: &[&str], arguments: &[&str]) -> Self {
        let words = [wrapper, &[env!("CARGO_BIN_EXE_ringleader")], arguments].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env_remove("RUST_LOG").stdin(Stdio::null());
        Self::of(&mut command)
    }

    /// Comes back when it serves.
    #[track_caller]
    pub fn serving(mut self) -> Self {
        let line = self.wait_for_line("serving on ");
        let urls = line.split("serving on ").nth(1).unwrap_or_default().split(" and ");
        self.addresses = urls
            .map(|url| url.trim().trim_start_matches("http://").parse().expect("an address follows http://"))
            .collect();
        self
    }

    /// Waits for its end, though others may go on printing where it did.
    #[track_caller]
    pub fn wait_alone(&mut self) -> Option<i32> {
        let start = std::time::Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return status.code();
            }
            assert!(start.elapsed() < BOUND, "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Any command.
    pub fn of(command: &mut Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("starting {command:?} (`make test` installs what is needed): {error}"));
        let (sender, lines) = channel();
        let (stdout, stderr) = (child.stdout.take().expect("it is piped"), child.stderr.take().expect("it is piped"));
        let (of_stdout, of_stderr) = (sender.clone(), sender);
        thread::spawn(move || BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|l| of_stdout.send(l)));
        thread::spawn(move || BufReader::new(stderr).lines().map_while(Result::ok).try_for_each(|l| of_stderr.send(l)));
        Self { child, lines, printed: Vec::new(), addresses: Vec::new() }
    }

    pub fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.address())
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: sends a signal to our own child, which has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// Waits until it prints a line that contains `text`, and returns the line.
    #[track_caller]
    pub fn wait_for_line(&mut self, text: &str) -> String {
        loop {
            match self.lines.recv_timeout(BOUND) {
                Ok(line) => {
                    self.printed.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(error) => panic!("{error} instead of {text:?} after:\n{}", self.printed.join("\n")),
            }
        }
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(mut self) -> Ended {
        loop {
            match self.lines.recv_timeout(BOUND) {
                Ok(line) => self.printed.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it does not end; it printed:\n{}", self.printed.join("\n")),
            }
        }
        let status = self.child.wait().expect("it is our child");
        Ended { status: status.code(), signal: status.signal(), printed: std::mem::take(&mut self.printed).join("\n") }
    }

    /// What its open descriptors are, sorted.
    pub fn descriptors(&self) -> Vec<String> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.id())).expect("it is running");
        let mut kinds: Vec<String> = entries
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .map(|target| target.to_string_lossy().split(':').next().unwrap_or_default().to_owned())
            .collect();
        kinds.sort_unstable();
        kinds
    }

    pub fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.id())).expect("it is running").count()
    }

    /// Whether one of its threads is called so.
    pub fn has_thread(&self, name: &str) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.id())).expect("it is running");
        let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.into_iter().any(|thread| thread.trim() == name)
    }

    /// For each thread of that name the CPUs it may run on, as the kernel lists them.
    pub fn cpus_of(&self, name: &str) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.id())).expect("it is running");
        let status = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
        let of_name = status.filter(|status| status.starts_with(&format!("Name:\t{name}\n")));
        let list = |status: String| {
            status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:").map(|list| list.trim().to_owned()))
        };
        of_name.map(|status| list(status).expect("it runs somewhere")).collect()
    }

    /// How often the thread of that name has gone to sleep.
    pub fn sleeps_of(&self, name: &str) -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.id())).expect("it runs");
        let status = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok());
        let line = format!("Name:\t{name}\n");
        let of_name = status.into_iter().find(|status| status.starts_with(&line)).expect("such a thread");
        let count = of_name.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).expect("a count");
        count.trim().parse().expect("a number")
    }

    /// Resident memory.
    pub fn rss_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).expect("it is running");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("kB is a number") * 1024
    }

    /// Processor time it has used.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id())).expect("it is running");
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks: u64 = after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        // USER_HZ is 100 on every architecture that has io_uring.
        Duration::from_millis(ticks * 10)
    }

    /// Sets what applies of its limit on open files, which may be raised again; answers with what applied before.
    pub fn limit_descriptors_for_now(&self, count: u64) -> u64 {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `limit` is a valid `struct rlimit` to write to; no new one is given.
        let read = unsafe { libc::prlimit(self.id() as i32, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) };
        let before = std::mem::replace(&mut limit.rlim_cur, count);
        // SAFETY: `limit` is a valid `struct rlimit`; the old one is not asked for.
        let set =
            unsafe { libc::prlimit(self.id() as i32, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
        assert_eq!((read, set), (0, 0), "prlimit: {}", std::io::Error::last_os_error());
        before
    }

    /// Sets its limit on open files.
    pub fn limit_descriptors(&self, count: u64) {
        let limit = libc::rlimit { rlim_cur: count, rlim_max: count };
        // SAFETY: `limit` is a valid `struct rlimit`; the old one is not asked for.
        let result =
            unsafe { libc::prlimit(self.id() as i32, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
        assert_eq!(result, 0, "prlimit: {}", std::io::Error::last_os_error());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// It ended with this status and a message that contains every one of `words`; it did not panic.
    #[track_caller]
    pub fn expect(&self, status: i32, words: &[&str]) {
        let printed = &self.printed;
        assert_eq!(self.status, Some(status), "{printed}");
        assert!(!printed.contains("panicked at") && !printed.contains("RUST_BACKTRACE"), "{printed}");
        for word in words {
            assert!(printed.contains(word), "no {word:?} in:\n{printed}");
        }
    }
}
