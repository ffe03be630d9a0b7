//! The old side: starts the new process, gives it the listeners and waits for its word, on a thread of its own.
//!
//! Starting a process and talking to one that may hang blocks; the supervisor's thread must not. The new process is
//! made with `posix_spawn`, which copies no page tables: a `fork` of a process with gigabytes would stop every executor
//! for as long as the copying takes. That is why the line to it is its standard input: no other descriptor can be passed
//! to a child without running code of ours between fork and exec.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::message::{BYTES_MAX, Message, VERSION};
use super::{Group, VARIABLE};
use crate::panics::caught;
use crate::sys::limits::explained;
use crate::sys::poll::wait_readable;
use crate::sys::{child, descriptors};

/// How long a process that has said that it will not serve, or has hung up, may take to end by itself.
const ENDING_MAX: Duration = Duration::from_secs(1);

/// How the new process is started.
#[derive(Clone)]
pub enum Launch {
    /// As this one was.
    Same(ThisProcess),
    /// As the embedder says.
    Custom(Arc<dyn Fn() -> Command + Send + Sync>),
}

/// How this process was started, taken down when the server starts.
#[derive(Clone, Debug)]
pub struct ThisProcess {
    program: PathBuf,
    arguments: Vec<OsString>,
    directory: Option<PathBuf>,
}

impl Launch {
    /// The program is looked up by the name it was started with, so that what lies there at the time of the upgrade is
    /// run: `/proc/self/exe` would be the old binary, also after it has been replaced.
    pub fn as_this_process() -> Self {
        let directory = env::current_dir().ok();
        let mut arguments = env::args_os();
        let name = arguments.next().unwrap_or_default();
        let program = resolve(Path::new(&name), directory.as_deref(), env::var_os("PATH"))
            .or_else(|| env::current_exe().ok())
            .unwrap_or_else(|| PathBuf::from(name));
        Self::Same(ThisProcess { program, arguments: arguments.collect(), directory })
    }

    fn command(&self) -> Command {
        match self {
            Self::Same(this) => {
                let mut command = Command::new(&this.program);
                command.args(&this.arguments);
                // Inherited as it is unless the program has moved: a directory may have been replaced by name, too.
                if let Some(directory) =
                    this.directory.as_ref().filter(|at_start| env::current_dir().ok().as_ref() != Some(at_start))
                {
                    command.current_dir(directory);
                }
                command
            }
            Self::Custom(make) => make(),
        }
    }
}

impl fmt::Debug for Launch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Same(this) => this.fmt(formatter),
            Self::Custom(_) => formatter.write_str("Custom"),
        }
    }
}

/// Where a name leads, as a shell would say.
fn resolve(name: &Path, directory: Option<&Path>, search: Option<OsString>) -> Option<PathBuf> {
    let runs =
        |path: &PathBuf| path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
    if name.as_os_str().is_empty() {
        return None;
    }
    if name.components().count() > 1 || name.is_absolute() {
        return Some(directory?.join(name)).filter(runs);
    }
    let search = search?;
    env::split_paths(&search).map(|path| directory.unwrap_or(Path::new("/")).join(path).join(name)).find(runs)
}

/// A new process that is ready to serve. Dropped, it tells the new one that this one has acted upon it.
#[derive(Debug)]
pub struct Taken {
    /// Its own number; that of the child may be a wrapper's.
    pub process: u32,
    heir: Heir,
    _line: OwnedFd,
}

impl Taken {
    /// Ends it after all: it spoke too late.
    pub fn kill(self) {
        if let Err(error) = child::kill(self.heir.handle.as_fd()) {
            tracing::error!(%error, process = self.process, "killing the new process");
        }
    }

    /// How it ended, if it has.
    pub fn end(&mut self) -> Option<End> {
        self.heir.end()
    }

    /// Tells it that it was heard. What is left is to look whether it lives.
    pub fn acknowledge(self) -> Heir {
        self.heir
    }
}

/// The process that has taken over. It may outlive this one, and is not ended with it.
#[derive(Debug)]
pub struct Heir {
    child: Child,
    handle: OwnedFd,
    /// Of the process itself, if the child is a wrapper of it.
    itself: Option<OwnedFd>,
}

/// How the process that has taken over ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// As a server does that was told to.
    pub in_order: bool,
    /// "exited with status 1".
    pub how: String,
}

impl Heir {
    fn new(child: Child, handle: OwnedFd, process: u32) -> Self {
        let itself = (process != child.id()).then(|| child::open(process).ok()).flatten();
        Self { child, handle, itself }
    }

    /// How it ended, if it has. Does not wait.
    pub fn end(&mut self) -> Option<End> {
        let process = self.itself.as_ref().unwrap_or(&self.handle).as_fd();
        let ended = wait_readable(&[process], Some(Duration::ZERO)).is_ok_and(|ready| !ready.is_empty());
        if !ended {
            return None;
        }
        // A wrapper's says nothing, and of a child that somebody else has waited for nothing is known.
        let status = if self.itself.is_some() { None } else { self.child.try_wait().ok().flatten() };
        Some(match status {
            Some(status) => End { in_order: status.success(), how: in_words(status) },
            None => End { in_order: false, how: "ended".to_owned() },
        })
    }
}

/// A new process that is to take over. Dropped before it has said that it is ready, it is killed and waited for.
#[derive(Debug)]
pub struct Successor {
    shared: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum State {
    /// Not made yet.
    Starting,
    /// It lives, as this descriptor of it says.
    Lives(OwnedFd),
    /// It is to end, or has been killed, for this reason.
    Killed(String),
    /// It has spoken, or has ended by itself.
    Over,
}

impl Successor {
    /// Starts the process and gives it these listeners, and the number of executors that are wanted at present. `tell` is called once, on another thread: when the process is
    /// ready to serve, or with the reason why it will not; then it has ended and been waited for.
    ///
    /// # Errors
    /// When no thread can be made for it.
    pub fn start(
        launch: Launch,
        groups: Vec<Group>,
        executors: u16,
        tell: impl FnOnce(Result<Taken, String>) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Mutex::new(State::Starting));
        let state = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("successor".to_owned()).spawn(move || {
            let outcome = run(&launch, groups, executors, &state);
            let killed = std::mem::replace(&mut *lock(&state), State::Over);
            // One that was ready and was killed before it could say so is dead all the same.
            tell(match killed {
                State::Killed(why) => Err(why),
                _ => outcome,
            });
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Ends the process; `why` is what will be told. Does nothing once it is ready.
    pub fn kill(&self, why: &str) {
        let mut state = lock(&self.shared);
        if let State::Lives(process) = &*state
            && let Err(error) = child::kill(process.as_fd())
        {
            tracing::error!(%error, "killing the new process");
        }
        if matches!(*state, State::Lives(_) | State::Starting) {
            *state = State::Killed(why.to_owned());
        }
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        self.kill("the server has ended meanwhile");
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(launch: &Launch, groups: Vec<Group>, executors: u16, state: &Mutex<State>) -> Result<Taken, String> {
    if let Some(why) = obstacle(std::process::id(), std::os::unix::process::parent_id(), |name| env::var(name).ok()) {
        return Err(why.to_owned());
    }
    let (line, theirs) =
        descriptors::pair().map_err(|error| format!("making the sockets to talk to it: {}", explained(&error)))?;
    // The embedder's closure.
    let made = catch_unwind(AssertUnwindSafe(|| launch.command()));
    let mut command = made.map_err(|payload| format!("making its command panicked: {}", caught(payload)))?;
    let program = command.get_program().display().to_string();
    let mut child =
        spawn(&mut command, theirs).map_err(|error| format!("starting {program}: {}", explained(&error)))?;
    // The command holds our copy of the other end: as long as it is open, nobody hears the line go dead.
    drop(command);
    tracing::info!(program, process = child.id(), "the new process has been started");
    let process = match child::open(child.id()) {
        Ok(process) => process,
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("opening a descriptor of the new process: {error}"));
        }
    };
    match (&mut *lock(state), process.try_clone()) {
        (killed @ State::Starting, Ok(process)) => *killed = State::Lives(process),
        // Killed before it was born.
        _ => drop(child::kill(process.as_fd())),
    }
    let outcome = give(line.as_fd(), groups, executors).and_then(|()| listen(line.as_fd(), process.as_fd()));
    match outcome {
        Ok(number) => Ok(Taken { process: number, heir: Heir::new(child, process, number), _line: line }),
        Err(why) => {
            drop(line);
            Err(bury(child, process.as_fd(), why))
        }
    }
}

/// Why the end of `process` would be the end of a process that it has started, too.
fn obstacle(process: u32, parent: u32, variable: impl Fn(&str) -> Option<String>) -> Option<&'static str> {
    if process == 1 {
        return Some(
            "this is process 1 of its container, whose end ends all others: a new binary cannot take over here; start a \
             new container instead",
        );
    }
    // The second is set from systemd 248 on, the first since 232; both are inherited by all that a service starts.
    let of_unit = variable("INVOCATION_ID").is_some()
        && variable("SYSTEMD_EXEC_PID").map_or(parent == 1, |main| main.parse() == Ok(process));
    let heard = variable("NOTIFY_SOCKET").is_some_and(|path| !path.is_empty());
    (of_unit && !heard).then_some(
        "systemd started this process and does not listen to it (NOTIFY_SOCKET is not set), so it would end the new \
         process with this one; set Type=notify, or NotifyAccess=main, in the unit, and restart it this once",
    )
}

fn spawn(command: &mut Command, line: OwnedFd) -> io::Result<Child> {
    command
        .stdin(Stdio::from(line))
        .env(VARIABLE, std::process::id().to_string())
        // They name this process; without WATCHDOG_PID the new one knows that the watchdog's period is meant for it.
        .env_remove("WATCHDOG_PID")
        .env_remove("LISTEN_PID")
        .env_remove("LISTEN_FDS")
        .env_remove("LISTEN_FDNAMES")
        .spawn()
}

/// `None`: the process has hung up, and its end will say more.
type Why = Option<String>;

/// Sends all there is to hand over. Blocks when the other side does not read; a kill ends that.
fn give(line: BorrowedFd<'_>, groups: Vec<Group>, executors: u16) -> Result<(), Why> {
    let send = |message: Message, with: &[BorrowedFd<'_>]| match descriptors::send(line, &message.bytes(), with) {
        Ok(()) => Ok(()),
        // It may have said why before it closed its end.
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(()),
        Err(error) => Err(Some(format!("handing it the listeners: {error}"))),
    };
    let process = std::process::id();
    send(Message::Hello { version: VERSION, process, groups: groups.len(), executors }, &[])?;
    for Group { address, listeners, activated, sockets } in groups {
        send(Message::Group { listeners: listeners.len(), address, activated, steered: sockets.is_some() }, &[])?;
        let listeners: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
        for batch in listeners.chunks(descriptors::BATCH_MAX) {
            send(Message::Listeners { count: batch.len() }, batch)?;
        }
        if let Some(sockets) = sockets {
            send(Message::Sockets { count: 1 }, &[sockets.as_fd()])?;
        }
    }
    Ok(())
}

/// Waits until the process speaks or ends.
fn listen(line: BorrowedFd<'_>, process: BorrowedFd<'_>) -> Result<u32, Why> {
    loop {
        let ready = wait_readable(&[line, process], None).map_err(|error| Some(format!("waiting for it: {error}")))?;
        if ready.contains(&0) {
            let mut buffer = [0; BYTES_MAX];
            // One that ended without having heard us out resets the line, and the kernel tells of that before it hands over
            // what had been said.
            let received = match descriptors::receive(line, &mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => descriptors::receive(line, &mut buffer),
                received => received,
            };
            return match received {
                Ok((0, _)) => Err(None),
                Ok((length, _)) => match Message::parse(&buffer[..length]) {
                    Some(Message::Ready { process }) => Ok(process),
                    Some(Message::Failed { reason }) => Err(Some(reason)),
                    _ => Err(Some("it answers in words that this version does not know".to_owned())),
                },
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(None),
                Err(error) => Err(Some(format!("hearing it: {error}"))),
            };
        }
        if ready.contains(&1) {
            return Err(None);
        }
    }
}

/// Sees to it that the process ends, waits for it, and says why there is no successor.
fn bury(mut child: Child, process: BorrowedFd<'_>, why: Why) -> String {
    let ended = wait_readable(&[process], Some(ENDING_MAX)).is_ok_and(|ready| !ready.is_empty());
    if !ended {
        let _ = child.kill();
    }
    let status = child.wait();
    match (why, status) {
        (Some(why), _) => why,
        (None, _) if !ended => "it closed its standard input without a word".to_owned(),
        (None, Ok(status)) => format!("it {} before it was ready", in_words(status)),
        // Somebody else has waited for all children, or lets the kernel do so (SIGCHLD ignored).
        (None, Err(_)) => "it ended before it was ready".to_owned(),
    }
}

fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => match signal_hook::low_level::signal_name(signal) {
            Some(name) => format!("was killed by {name}"),
            None => format!("was killed by signal {signal}"),
        },
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::mpsc;

    use super::*;

    const BOUND: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Launch {
        let script = script.to_owned();
        Launch::Custom(Arc::new(move || {
            let mut command = Command::new("sh");
            command.arg("-c").arg(&script);
            command
        }))
    }

    fn group() -> Vec<Group> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        vec![Group {
            address: listener.local_addr().unwrap(),
            listeners: vec![listener.into()],
            activated: 0,
            sockets: None,
        }]
    }

    fn start(launch: Launch) -> (Successor, mpsc::Receiver<Result<Taken, String>>) {
        let (sender, said) = mpsc::channel();
        let successor = Successor::start(launch, group(), 1, move |outcome| sender.send(outcome).unwrap()).unwrap();
        (successor, said)
    }

    fn refusal(launch: Launch) -> String {
        let (_successor, said) = start(launch);
        said.recv_timeout(BOUND).unwrap().unwrap_err()
    }

    #[test]
    fn whatever_goes_wrong_has_a_reason() {
        assert_eq!(refusal(shell("exit 2")), "it exited with status 2 before it was ready");
        assert_eq!(refusal(shell("exit 0")), "it exited with status 0 before it was ready");
        assert_eq!(refusal(shell("kill -SEGV $$")), "it was killed by SIGSEGV before it was ready");
        assert_eq!(refusal(shell("exec <&-; exec sleep 1000")), "it closed its standard input without a word");
        let missing = Launch::Custom(Arc::new(|| Command::new("/no/such/binary")));
        assert!(refusal(missing).starts_with("starting /no/such/binary: No such file"));
    }

    #[test]
    fn a_closure_that_panics_is_told_of_at_once() {
        let broken = Launch::Custom(Arc::new(|| panic!("no such version")));
        assert_eq!(refusal(broken), "making its command panicked: no such version");
    }

    #[test]
    fn one_that_hangs_is_killed_for_the_reason_given() {
        let (successor, said) = start(shell("exec sleep 1000"));
        successor.kill("it was not ready within 30 s");
        assert_eq!(said.recv_timeout(BOUND).unwrap().unwrap_err(), "it was not ready within 30 s");
        successor.kill("again");
    }

    #[test]
    fn one_that_is_forgotten_does_not_outlive_the_server() {
        let (successor, said) = start(shell("exec sleep 1000"));
        drop(successor);
        assert_eq!(said.recv_timeout(BOUND).unwrap().unwrap_err(), "the server has ended meanwhile");
    }

    /// An answer from a real child: python is among the tools of the tests.
    fn answering(answer: &str) -> Launch {
        let script = format!("import socket; socket.socket(fileno=0).send({answer})");
        Launch::Custom(Arc::new(move || {
            let mut command = Command::new("python3");
            command.arg("-c").arg(&script);
            command
        }))
    }

    #[test]
    fn a_refusal_is_passed_on_and_nonsense_is_called_so() {
        assert_eq!(refusal(answering("b'failed no room here'")), "no room here");
        assert_eq!(refusal(answering("b'what?'")), "it answers in words that this version does not know");
    }

    #[test]
    fn one_that_is_ready_is_left_alone() {
        let (successor, said) = start(answering("b'ready 4711'"));
        assert_eq!(said.recv_timeout(BOUND).unwrap().unwrap().process, 4711);
        successor.kill("too late");
        drop(successor);
    }

    #[test]
    fn one_that_ends_after_all_is_seen_to() {
        let end_of = |script: &str| {
            let (_successor, said) = start(answering(script));
            let mut taken = said.recv_timeout(BOUND).unwrap().unwrap();
            let handle = taken.heir.handle.try_clone().unwrap();
            assert_eq!(wait_readable(&[handle.as_fd()], Some(BOUND)).unwrap(), [0]);
            taken.end().unwrap()
        };
        let own = "b'ready %d' % __import__('os').getpid()";
        assert_eq!(end_of(own), End { in_order: true, how: "exited with status 0".to_owned() });
        let killed = format!("{own}); __import__('os').kill(__import__('os').getpid(), 11");
        assert_eq!(end_of(&killed), End { in_order: false, how: "was killed by SIGSEGV".to_owned() });
    }

    #[test]
    fn the_program_is_found_by_the_name_it_was_called() {
        let directory = env::temp_dir().join(format!("ringleader-successor-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let program = directory.join("program");
        std::fs::write(&program, "").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let search = Some(env::join_paths(["/nowhere", directory.to_str().unwrap()]).unwrap());
        let root = Some(Path::new("/"));
        assert_eq!(resolve(&program, root, None), Some(program.clone()));
        assert_eq!(resolve(Path::new("program"), root, search), Some(program.clone()));
        assert_eq!(resolve(Path::new("program"), Some(&directory), Some("/nowhere".into())), None);
        assert_eq!(resolve(Path::new("./program"), Some(&directory), None), Some(directory.join("./program")));
        assert_eq!(resolve(Path::new("-sh"), root, Some("/bin".into())), None);
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn whose_end_would_end_its_successor_does_not_hand_over() {
        let refused = |process, parent, variables: &[(&str, &str)]| {
            let find =
                |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
            obstacle(process, parent, find).is_some()
        };
        let unit = ("INVOCATION_ID", "0123");
        assert!(refused(1, 0, &[]), "of a container");
        assert!(!refused(70, 60, &[]));
        // The main process of a unit, of a newer systemd and an older one.
        assert!(refused(70, 1, &[unit, ("SYSTEMD_EXEC_PID", "70")]));
        assert!(refused(70, 65, &[unit, ("SYSTEMD_EXEC_PID", "70")]), "of a user's own systemd");
        assert!(refused(70, 1, &[unit]));
        assert!(refused(70, 1, &[unit, ("NOTIFY_SOCKET", "")]));
        // systemd hears who the next main process is.
        assert!(!refused(70, 1, &[unit, ("SYSTEMD_EXEC_PID", "70"), ("NOTIFY_SOCKET", "/run/systemd/notify")]));
        // Something that a unit has started: a shell in a terminal, a build.
        assert!(!refused(70, 60, &[unit, ("SYSTEMD_EXEC_PID", "50")]));
        assert!(!refused(70, 60, &[unit]));
    }

    #[test]
    fn this_process_is_started_again_as_it_was() {
        let command = Launch::as_this_process().command();
        assert!(Path::new(command.get_program()).is_file());
        assert_eq!(command.get_args().count(), env::args_os().count() - 1);
    }
}
