//! Where the command's log goes may be full, gone or stuck: lines are lost, and the service goes on.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringleader::{Request, Response};

use crate::support::{BOUND, Client, Site, alone, eventually, spawn};

/// Opens a listener for the command, whose log will not say where it serves, prints its port, and becomes the command.
const ACTIVATE: &str = "
import os, signal, socket, sys
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
listener = socket.socket()
listener.bind(('127.0.0.1', 0))
listener.listen(100)
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))
print(listener.getsockname()[1], flush=True)
os.execvp(sys.argv[1], sys.argv[1:])
";

/// A running command whose log goes to a place of the test's; killed when the test is done with it.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    fn logging_to(log: impl Into<Stdio>) -> Self {
        let mut command = Command::new("python3");
        command.args(["-c", ACTIVATE, env!("CARGO_BIN_EXE_ringleader"), "serve", "--executors", "2", "--chaos"]);
        command.env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().expect("python3 is there (`make test` installs what is needed)");
        let mut port = String::new();
        let stdout = child.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut port).expect("it prints");
        let port: u16 = port.trim().parse().expect("it is a port");
        let server = Self { child, address: ([127, 0, 0, 1], port).into() };
        // The first executor answers before the last has started.
        eventually("all executors serve", || server.get("/ready") == 200);
        server
    }

    fn get(&self, path: &str) -> u16 {
        Client::connect(self.address).get(path).status
    }

    /// It answers, contains panics, restarts executors, and drains with status 0.
    #[track_caller]
    fn works_to_its_end(&mut self) {
        assert_eq!(self.get("/"), 200);
        for _ in 0..20 {
            assert_eq!(self.get("/chaos/panic"), 500);
        }
        assert_eq!(self.get("/chaos/escape"), 200);
        eventually("an executor has been restarted", || {
            let answer = Client::try_connect(self.address).and_then(|mut client| {
                client.ask("/whoami");
                client.try_answer()
            });
            // The executor that fails may take this connection with it.
            answer.is_ok_and(|answer| answer.text().contains(r#""generation":2,"#))
        });
        self.ends_with(0);
    }

    #[track_caller]
    fn ends_with(&mut self, status: i32) {
        // SAFETY: sends a signal to our own child, which has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) }, 0);
        let begun = Instant::now();
        let ended = loop {
            if let Some(ended) = self.child.try_wait().expect("it is our child") {
                break ended;
            }
            assert!(begun.elapsed() < BOUND, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(ended.code(), Some(status), "{ended}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn full_device() -> File {
    OpenOptions::new().write(true).open("/dev/full").expect("Linux has it")
}

/// Both ends of a pipe that has no room.
fn full_pipe() -> (File, File) {
    let (reader, writer) = std::io::pipe().expect("descriptors are left");
    let (reader, mut writer) = (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)));
    fill(&mut writer);
    (reader, writer)
}

fn fill(writer: &mut File) {
    set_flags(writer, libc::O_NONBLOCK);
    while writer.write(&[b'\n'; 4096]).is_ok() {}
    set_flags(writer, 0);
}

fn set_flags(file: &File, flags: i32) {
    // SAFETY: sets flags of a descriptor that is borrowed for the call.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) }, 0);
}

#[test]
fn a_log_on_a_full_disk_costs_its_lines_and_nothing_else() {
    Server::logging_to(full_device()).works_to_its_end();
}

#[test]
fn a_log_file_at_its_size_limit_costs_its_lines_and_nothing_else() {
    let path = std::env::temp_dir().join(format!("ringleader-log-at-its-limit-{}", std::process::id()));
    let mut server = Server::logging_to(File::create(&path).expect("there is room"));
    let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid `struct rlimit`; the old one is not asked for.
    let set =
        unsafe { libc::prlimit(server.child.id() as i32, libc::RLIMIT_FSIZE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    let before = std::fs::read(&path).expect("it is there");
    server.works_to_its_end();
    assert_eq!(std::fs::read(&path).expect("it is there"), before);
    let _ = std::fs::remove_file(&path);
}

#[test]
fn a_log_whose_reader_has_gone_costs_its_lines_and_nothing_else() {
    let (reader, writer) = std::io::pipe().expect("descriptors are left");
    let mut server = Server::logging_to(writer);
    assert_eq!(server.get("/"), 200);
    drop(reader);
    server.works_to_its_end();
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let (_reader, writer) = full_pipe();
    Server::logging_to(writer).works_to_its_end();
}

#[test]
fn what_waited_for_a_reader_is_read_at_the_end() {
    let (reader, writer) = full_pipe();
    let mut server = Server::logging_to(writer);
    assert_eq!(server.get("/"), 200);
    let read = std::thread::spawn(|| BufReader::new(reader).lines().map_while(Result::ok).collect::<Vec<_>>());
    server.ends_with(0);
    let read = read.join().expect("it reads").join("\n");
    for word in ["serving on", "draining", "stopped"] {
        assert!(read.contains(word), "no {word:?} in {}", read.trim());
    }
}

#[test]
fn a_reader_that_comes_back_is_told_how_many_lines_it_missed() {
    let path = std::env::temp_dir().join(format!("ringleader-log-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    assert!(Command::new("mkfifo").arg(&path).status().expect("coreutils are there").success());
    let reader = || OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).expect("it is a FIFO");
    let lines_of = |file: File| {
        set_flags(&file, 0);
        BufReader::new(file).lines().map(|line| line.expect("it is text"))
    };
    let first = reader();
    let server = Server::logging_to(OpenOptions::new().write(true).open(&path).expect("it is a FIFO"));
    let mut lines = lines_of(first);
    assert!(lines.any(|line| line.contains("anybody who can connect can break this server")));
    drop(lines);
    assert_eq!(server.get("/chaos/panic"), 500);
    assert_eq!(server.get("/chaos/panic"), 500);
    let second = reader();
    assert_eq!(server.get("/chaos/panic"), 500);
    let mut lines = lines_of(second);
    // What was in the FIFO when its first reader went is still there.
    let told = lines.find(|line| line.contains("missing here")).expect("it logs");
    let lost: u64 = told.split(" WARN ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap_or(0);
    assert!(lost >= 2, "{told}");
    assert!(lines.any(|line| line.contains("ordered by /chaos/panic")));
    let _ = std::fs::remove_file(&path);
}

#[test]
fn a_message_that_cannot_be_written_leaves_the_status_as_it_is() {
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringleader"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(full_device());
        command.status().expect("it starts").code()
    };
    assert_eq!(run(&["serve", "--listen", "foo"]), Some(2));
    assert_eq!(run(&["serve", "--listen", "192.0.2.1:80"]), Some(1));
}

#[test]
fn requests_for_files_that_cannot_be_opened_do_not_fill_the_log() {
    const REQUESTS: usize = 200;
    let root = env!("CARGO_MANIFEST_DIR");
    let server = spawn(&[], &["--executors", "1", "--root", root]);
    let mut client = server.connect();
    assert_eq!(client.get("/Cargo.toml").status, 200);
    let begun = Instant::now();
    let allowed = server.limit_descriptors_for_now(3);
    assert!((0..REQUESTS).all(|_| client.get("/Cargo.toml").status == 503));
    server.limit_descriptors_for_now(allowed);
    let most = 2 + begun.elapsed().as_secs();
    server.signal(libc::SIGTERM);
    let printed = server.wait().printed;
    let lines = printed.lines().filter(|line| line.contains("opening a file failed")).count();
    assert!((1..=most).contains(&(lines as u64)), "{lines} lines, {most} at most:\n{printed}");
}

const ORDERED: &str = "an error ordered by the test of how many lines are logged";

/// Keeps the lines that tell of the error above.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<String>>>);

impl Write for Kept {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        if text.contains(ORDERED) {
            self.0.lock().expect("nobody panics with it").push(text.into_owned());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn errors_of_a_service_that_clients_can_cause_do_not_fill_the_log() {
    if !alone("log_sinks::errors_of_a_service_that_clients_can_cause_do_not_fill_the_log") {
        return;
    }
    const REQUESTS: usize = 200;
    let (kept, begun) = (Kept::default(), Instant::now());
    let writer = kept.clone();
    tracing_subscriber::fmt().with_max_level(tracing::Level::ERROR).with_writer(move || writer.clone()).init();
    let site = Site::serving(async |_: Request| Err::<Response, _>(ORDERED.into()));
    let mut client = site.connect();
    assert!((0..REQUESTS).all(|_| client.get("/").status == 500));
    // A few at once, and then one a second on each executor.
    let most = 5 + 1 + begun.elapsed().as_secs();
    let lines = kept.0.lock().expect("nobody panics with it").len();
    assert!((1..=most).contains(&(lines as u64)), "{lines} lines, {most} at most");
}
