//! A server under proof: started from a binary, ended by its process number, observed through /proc.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use clap::Args;

use crate::proc::{self, Sample};
use crate::sys::{self, Cpus};

const START_MAX: Duration = Duration::from_secs(20);
/// A port is free again in this time after the end of its server.
const RELEASE_MAX: Duration = Duration::from_secs(3);
/// From its first answer to the line of its log that says what steers.
const ANNOUNCE_MAX: Duration = Duration::from_secs(5);
const STEERING: &str = "steering: ";
const STOP_MAX: Duration = Duration::from_secs(40);

/// The CPUs that this process began with: the server's.
static ALLOWED: OnceLock<Cpus> = OnceLock::new();

/// Pins this process to the client's CPU; servers started from now on may use all CPUs that it was allowed before.
pub fn pin_client(cpu: usize) -> Result<(), String> {
    let allowed = Cpus::allowed().map_err(|error| format!("reading the allowed CPUs: {error}"))?;
    ALLOWED.get_or_init(|| allowed);
    Cpus::one(cpu).and_then(|one| one.pin()).map_err(|error| format!("pinning the client to CPU {cpu}: {error}"))
}

/// What every proof takes.
#[derive(Args, Clone)]
pub struct Common {
    /// The binary under proof
    #[arg(long, value_name = "PATH", default_value = "target/release/ringleader")]
    pub server: PathBuf,

    /// Port on 127.0.0.1; nothing may listen there. Some proofs also take the next one
    #[arg(long, default_value_t = 18_080)]
    pub port: u16,

    /// CPUs of the server's executors; the default depends on the proof
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<String>,

    /// CPU that the client is pinned to
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub client_cpu: usize,

    /// Directory for the server's logs and for bodies
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    pub scratch: PathBuf,

    /// One more argument for the server, in front of which nothing is added; may be given more than once
    #[arg(long = "server-arg", value_name = "ARG", allow_hyphen_values = true)]
    pub extra: Vec<String>,
}

impl Common {
    pub fn cpus_or(&self, default: &str) -> String {
        self.cpus.clone().unwrap_or_else(|| default.to_owned())
    }

    /// Starts `ringleader serve` with these arguments on the given port.
    pub fn start(&self, port: u16, arguments: &[&str]) -> Result<Server, String> {
        self.start_by(&[], port, arguments)
    }

    /// Has it started by another program, which becomes the server: `by` and its arguments.
    pub fn start_by(&self, by: &[&str], port: u16, arguments: &[&str]) -> Result<Server, String> {
        let mut command = match by {
            [] => Command::new(&self.server),
            [program, its_arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(its_arguments).arg(&self.server);
                command
            }
        };
        command.args(["serve", "--listen", &format!("127.0.0.1:{port}")]).args(arguments).args(&self.extra);
        Server::start(command, port, &self.scratch.join(format!("ringleader-proofs-{port}.log")))
    }
}

pub struct Server {
    child: Child,
    port: u16,
    log: PathBuf,
    pub command: String,
}

impl Server {
    /// Starts a command and waits until it answers on the port. It runs on any CPU that this process began with, and
    /// pins itself.
    pub fn start(command: Command, port: u16, log: &std::path::Path) -> Result<Self, String> {
        let mut server = Self::spawn(command, port, log)?;
        server.wait_until_it_answers()?;
        Ok(server)
    }

    /// Starts it, and does not wait.
    pub fn spawn(mut command: Command, port: u16, log: &std::path::Path) -> Result<Self, String> {
        // The kernel takes the rings of an ended process down a little later, and with them the listeners they watch.
        let began = Instant::now();
        while proc::listeners(port) > 0 && began.elapsed() < RELEASE_MAX {
            std::thread::sleep(Duration::from_millis(10));
        }
        let listeners = proc::listeners(port);
        if listeners > 0 {
            return Err(format!("{listeners} sockets listen on port {port} already: end that server or give --port"));
        }
        let cpus = *ALLOWED.get().ok_or("the CPUs were not looked at before the client was pinned")?;
        let output = File::create(log).map_err(|error| format!("creating {}: {error}", log.display()))?;
        let errors = output.try_clone().map_err(|error| format!("duplicating a descriptor: {error}"))?;
        // A backtrace takes tens of milliseconds, in the middle of what is measured.
        command.env_remove("RUST_BACKTRACE").stdin(Stdio::null()).stdout(output).stderr(errors);
        sys::prepare_child(&mut command, cpus);
        let line = describe(&command);
        let child = command.spawn().map_err(|error| format!("starting {line}: {error}"))?;
        Ok(Self { child, port, log: log.to_owned(), command: line })
    }

    fn wait_until_it_answers(&mut self) -> Result<(), String> {
        let began = Instant::now();
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!("{} ended at once, {status}: {}", self.command, self.log_tail()));
            }
            match self.ask() {
                Ok(()) => return Ok(()),
                Err(error) if began.elapsed() > START_MAX => {
                    return Err(format!("{} does not answer after {START_MAX:?}: {error}", self.command));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn ask(&self) -> io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&self.address(), Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: proof\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        if answer.starts_with("HTTP/1.1 ") { Ok(()) } else { Err(io::Error::other("not an HTTP answer")) }
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub fn sample(&self) -> Result<Sample, String> {
        proc::sample(self.pid())
            .map_err(|error| format!("reading /proc of the server, process {}: {error}", self.pid()))
    }

    /// Samples until two in a row, half a second apart, have the same number of descriptors, for at most `limit`.
    pub async fn settled(&self, limit: Duration) -> Result<Sample, String> {
        let deadline = Instant::now() + limit;
        let mut last = self.sample()?;
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let sample = self.sample()?;
            if sample.fds == last.fds || Instant::now() >= deadline {
                return Ok(sample);
            }
            last = sample;
        }
    }

    /// Lines of the log that hold an error.
    pub fn log_errors(&self) -> usize {
        let log = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&log)
            .lines()
            .filter(|line| line.contains("ERROR") || line.contains("panicked at"))
            .count()
    }

    /// The first lines of the log that hold one of `words`, `most` at most.
    pub fn log_lines(&self, words: &[&str], most: usize) -> Vec<String> {
        let mut lines = self.log_since(0, words);
        lines.truncate(most);
        lines
    }

    /// What steers, in the server's words. It says so a moment after its first answer.
    pub fn steering(&self) -> String {
        let began = Instant::now();
        loop {
            let line = self.log_lines(&[STEERING], 1).pop();
            if let Some((_, steering)) = line.as_deref().and_then(|line| line.split_once(STEERING)) {
                return steering.to_owned();
            }
            if began.elapsed() > ANNOUNCE_MAX {
                return "its log does not say what steers".to_owned();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn log_length(&self) -> usize {
        std::fs::metadata(&self.log).map_or(0, |file| file.len() as usize)
    }

    /// The lines of the log, after its first `bytes`, that hold one of `words`.
    pub fn log_since(&self, bytes: usize, words: &[&str]) -> Vec<String> {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(log.get(bytes..).unwrap_or_default()).into_owned();
        log.lines().filter(|line| words.iter().any(|word| line.contains(word))).map(str::to_owned).collect()
    }

    fn log_tail(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().rev().take(5).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    pub fn log_path(&self) -> String {
        self.log.display().to_string()
    }

    /// SIGTERM, and SIGKILL when that does not help. How it ended and how long that took.
    pub fn stop(mut self) -> Result<(ExitStatus, Duration), String> {
        let began = Instant::now();
        sys::terminate(self.child.id());
        while began.elapsed() < STOP_MAX {
            match self.child.try_wait() {
                Ok(Some(status)) => return Ok((status, began.elapsed())),
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => return Err(format!("waiting for the server: {error}")),
            }
        }
        Err(format!("the server does not stop {STOP_MAX:?} after SIGTERM; it gets SIGKILL"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn describe(command: &Command) -> String {
    let arguments = command.get_args().map(|argument| argument.to_string_lossy());
    let words: Vec<_> = std::iter::once(command.get_program().to_string_lossy()).chain(arguments).collect();
    words.join(" ")
}
