//! What systemd is told, and what it hands over; played by the tests.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::stopped::Stopped;
use crate::support::{BOUND, Client, Process, spawn};

/// A service manager that listens.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ringleader-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).expect("it is new");
        socket.set_read_timeout(Some(BOUND)).expect("it is a time");
        Self { socket, path }
    }

    /// The next message.
    #[track_caller]
    fn says(&self) -> String {
        let mut buffer = [0; 1000];
        let length = self.socket.recv(&mut buffer).expect("it is told something");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    /// The next message that is no status.
    #[track_caller]
    fn heard(&self) -> String {
        loop {
            let message = self.says();
            if !message.starts_with("STATUS=") {
                return message;
            }
        }
    }

    /// Waits for this message.
    #[track_caller]
    fn hears(&self, expected: &str) {
        while self.says() != expected {}
    }

    fn variable(&self) -> String {
        format!("NOTIFY_SOCKET={}", self.path.display())
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn a_service_says_when_it_serves_reloads_and_stops() {
    let manager = Manager::new("notify");
    let server = spawn(&["env", &manager.variable()], &["--executors", "2"]);
    assert_eq!(manager.heard(), "READY=1");
    assert_eq!(server.connect().get("/").status, 200);
    server.signal(libc::SIGHUP);
    assert!(manager.heard().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(manager.heard(), "READY=1");
    assert_eq!(server.connect().get("/").status, 200);
    server.signal(libc::SIGTERM);
    assert_eq!(manager.heard(), "STOPPING=1");
    server.wait().expect(0, &["reload: the limit on open files is", "reload: everything else", "stopped"]);
}

#[test]
fn a_service_that_does_not_start_is_never_ready() {
    let manager = Manager::new("unready");
    let variable = manager.variable();
    let ended = crate::support::run(&["env", &variable], &["serve", "--listen", "192.0.2.1:80"]);
    assert_eq!(ended.status, Some(1));
    manager.socket.set_nonblocking(true).expect("it is a socket");
    assert!(manager.socket.recv(&mut [0; 100]).is_err(), "it was told something");
}

#[test]
fn the_watchdog_hears_from_the_supervisor() {
    let manager = Manager::new("watchdog");
    let _server = spawn(&["env", &manager.variable(), "WATCHDOG_USEC=200000"], &["--executors", "1"]);
    let mut heard: Vec<String> = (0..4).map(|_| manager.heard()).collect();
    heard.retain(|message| message != "READY=1");
    assert_eq!(heard, ["WATCHDOG=1"; 3]);
}

#[test]
fn the_watchdog_hears_nothing_while_the_supervisor_stands_still_though_executors_answer() {
    const PERIOD: Duration = Duration::from_millis(200);
    let manager = Manager::new("silent");
    let period = format!("WATCHDOG_USEC={}", PERIOD.as_micros());
    let server = spawn(&["env", &manager.variable(), &period], &["--executors", "1"]);
    while manager.heard() != "WATCHDOG=1" {}
    let stopped = Stopped::thread(server.id(), "ringleader-sup");
    manager.socket.set_nonblocking(true).expect("it is a socket");
    while manager.socket.recv(&mut [0; 1000]).is_ok() {}
    for _ in 0..5 {
        assert_eq!(server.connect().get("/").status, 200);
        std::thread::sleep(PERIOD);
        assert!(manager.socket.recv(&mut [0; 1000]).is_err(), "who speaks for a supervisor that stands still?");
    }
    manager.socket.set_nonblocking(false).expect("it is a socket");
    drop(stopped);
    assert_eq!(manager.heard(), "WATCHDOG=1", "it goes round again");
}

#[test]
fn the_status_says_how_many_executors_serve_and_how_many_are_stalled() {
    let manager = Manager::new("status");
    let server = spawn(&["env", &manager.variable()], &["--executors", "3", "--chaos"]);
    let first = manager.says();
    let status = "STATUS=3 executors serve, 0 connections, 0 stalled, 0 quarantined";
    assert!(first == status || (first == "READY=1" && manager.says() == status), "{first}");
    let mut stalled = server.connect();
    stalled.ask("/chaos/block?ms=60000");
    manager.hears("STATUS=2 executors serve, 1 connections, 1 stalled, 0 quarantined");
}

#[test]
fn after_an_upgrade_the_new_process_is_the_service() {
    let manager = Manager::new("main");
    let mut server = spawn(&["env", &manager.variable()], &["--executors", "1"]);
    assert_eq!(manager.heard(), "READY=1");
    server.signal(libc::SIGUSR2);
    let line = server.wait_for_line("has taken over");
    let heir: i32 = line.rsplit("process=").next().and_then(|n| n.trim().parse().ok()).expect("it is numbered");
    assert_eq!(manager.heard(), format!("MAINPID={heir}"));
    assert_eq!(manager.heard(), "READY=1", "the new one speaks after the old one has said that it may");
    assert_eq!(server.wait_alone(), Some(0));
    // SAFETY: sends a signal to the process that the test has brought about.
    unsafe { libc::kill(heir, libc::SIGTERM) };
    assert_eq!(manager.heard(), "STOPPING=1", "the old one has said nothing of its stop");
    server.wait().expect(0, &["stopped"]);
}

#[test]
fn in_a_unit_that_is_not_listened_to_an_upgrade_is_refused_and_the_service_goes_on() {
    let mut command = Command::new("sh");
    let script = "INVOCATION_ID=0123 SYSTEMD_EXEC_PID=$$ exec \"$0\" serve --listen 127.0.0.1:0 --executors 1";
    command.args(["-c", script, env!("CARGO_BIN_EXE_ringleader")]).env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
    let mut server = Process::of(&mut command).serving();
    server.signal(libc::SIGUSR2);
    let line = server.wait_for_line("no new process takes over");
    assert!(line.contains("Type=notify"), "{line}");
    assert_eq!(server.connect().get("/").status, 200);
    server.signal(libc::SIGTERM);
    server.wait().expect(0, &["stopped"]);
}

/// Opens listeners as `systemd-socket-activate` does, and becomes the command given to it.
const ACTIVATE: &str = "
import os, socket, sys
listener = socket.socket()
listener.bind(('127.0.0.1', 0))
listener.listen(5)
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES='web.socket')
print('opened', listener.getsockname()[1], flush=True)
os.execvp(sys.argv[1], sys.argv[1:])
";

/// The command, activated, and the port opened for it.
fn activated(wrapper: &[&str]) -> (Process, u16) {
    let mut command = Command::new("python3");
    command.args(["-c", ACTIVATE]).args(wrapper);
    command.args([env!("CARGO_BIN_EXE_ringleader"), "serve", "--executors", "3"]).stdin(Stdio::null());
    let mut process = Process::of(&mut command);
    let line = process.wait_for_line("opened ");
    (process.serving(), line.trim_start_matches("opened ").trim().parse().expect("it is a port"))
}

/// Which executors answer.
fn executors(server: &Process) -> Vec<String> {
    let mut seen: Vec<String> = (0..60)
        .map(|_| {
            let answer = Client::connect(server.address()).get("/whoami");
            answer.text().split(',').next().unwrap_or_default().to_owned()
        })
        .collect();
    seen.sort_unstable();
    seen.dedup();
    seen
}

#[test]
fn a_socket_that_systemd_opened_is_served_by_every_executor() {
    let (server, port) = activated(&[]);
    assert_eq!(server.addresses().len(), 1, "the default address is for those who get none");
    assert_eq!(server.address().port(), port);
    assert_eq!(executors(&server).len(), 3);
}

#[test]
fn a_socket_of_another_user_is_shared_with_a_warning() {
    // SAFETY: has no preconditions and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root can become somebody else");
        return;
    }
    // Without CAP_NET_ADMIN and the like; exec keeps the number of the process, which LISTEN_PID names.
    let (mut server, port) = activated(&["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]);
    server.wait_for_line("3 executors share 1 listeners");
    assert_eq!(server.address().port(), port);
    for _ in 0..30 {
        assert_eq!(server.connect().get("/").status, 200);
    }
}

/// A manager with a store: starts the server, keeps its listeners, kills it, lets a client knock, starts it again.
const STORE: &str = "
import os, signal, socket, subprocess, sys, tempfile
directory = tempfile.mkdtemp()
path = directory + '/notify'
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind(path)
manager.settimeout(20)
def start(stored):
    names = sorted(stored)
    def become():
        if stored:
            copies = [os.dup(stored[name]) for name in names]
            high = [os.dup2(fd, 100 + n) for n, fd in enumerate(copies)]
            for n, fd in enumerate(high):
                os.dup2(fd, 3 + n, inheritable=True)
            os.environ.update(LISTEN_FDS=str(len(names)), LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=':'.join(names))
        os.execv(sys.argv[1], [sys.argv[1], 'serve', '--executors', '2', '--listen', sys.argv[2]])
    environment = ('NOTIFY_SOCKET', path), ('FDSTORE', '16')
    os.environ.update(environment)
    pid = os.fork()
    if pid == 0:
        become()
    return pid
def listen(until):
    stored = {}
    while len(stored) < until:
        message, fds, _, _ = socket.recv_fds(manager, 4096, 8)
        if message.startswith(b'FDSTORE=1'):
            stored[message.decode().split('FDNAME=')[1]] = fds[0]
    return stored
pid = start({})
stored = listen(2)
address = socket.socket(fileno=os.dup(list(stored.values())[0])).getsockname()
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
clients = [socket.create_connection(address, timeout=20) for _ in range(20)]
for client in clients:
    client.sendall(b'GET / HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n\\r\\n')
pid = start(stored)
try:
    for client in clients:
        assert client.recv(4096).startswith(b'HTTP/1.1 200'), 'lost'
    print('names', sorted(stored))
    print('all served after a crash')
finally:
    os.kill(pid, signal.SIGKILL)
";

#[test]
fn what_waits_in_a_queue_outlives_a_crash_with_a_store_of_descriptors() {
    let mut command = Command::new("python3");
    command.args(["-c", STORE, env!("CARGO_BIN_EXE_ringleader"), "127.0.0.1:0"]).stdin(Stdio::null());
    Process::of(&mut command).wait().expect(0, &["all served after a crash", "ringleader-127.0.0.1_"]);
}

#[test]
fn a_socket_that_cannot_be_served_is_an_error_unless_another_address_is_given() {
    let activated = |arguments: &[&str]| {
        let mut command = Command::new("python3");
        command.args([
            "-c",
            &ACTIVATE
                .replace("socket.socket()", "socket.socket(type=socket.SOCK_DGRAM)")
                .replace("listener.listen(5)", "pass"),
            env!("CARGO_BIN_EXE_ringleader"),
            "serve",
        ]);
        Process::of(command.args(arguments).stdin(Stdio::null()))
    };
    activated(&[]).wait().expect(1, &["LISTEN_FDS", "3 'web.socket'", "ListenStream=", "--listen"]);
    let server = activated(&["--listen", "127.0.0.1:0"]).serving();
    assert_eq!(server.connect().get("/").status, 200);
}
