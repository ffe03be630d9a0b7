//! What systemd does and hears: a socket that is listened on before the server starts, and `READY=1` when every executor
//! accepts, no earlier; `STOPPING=1` at the end.

use std::collections::HashSet;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::load::{self, Over, Plan, middle_and_worst};
use crate::report::{Faults, Verdicts};
use crate::server::{Common, Server};
use crate::sys;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Starts of each kind
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// New connections a second
    #[arg(long, default_value_t = 200.0)]
    rate: f64,
}

const EXECUTORS: usize = 4;
const READY_MAX: Duration = Duration::from_secs(20);
const STOPPING_MAX: Duration = Duration::from_secs(5);
/// Connections right after `READY=1`: an executor that gets none of them is a chance of one in 10^12.
const CONNECTIONS: usize = 100;
const LOAD: Duration = Duration::from_secs(1);
/// For so long a start-up is held up; the other executors take some 20 ms.
const GATE_SHUT: Duration = Duration::from_secs(1);

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let mut verdicts = Verdicts::default();
    activated(arguments, &mut verdicts).await?;
    notified(arguments, &mut verdicts).await?;
    held_up(arguments, &mut verdicts).await?;
    Ok(verdicts)
}

/// Started by the first connection.
async fn activated(arguments: &Arguments, verdicts: &mut Verdicts) -> Result<(), String> {
    let criterion = "systemd-socket-activate starts it, and every connection is answered";
    if Command::new("systemd-socket-activate").arg("--version").output().is_err() {
        verdicts.skip(criterion, "systemd-socket-activate is not installed");
        return Ok(());
    }
    let common = &arguments.common;
    let (mut failed, mut begun, mut unstopped) = (Faults::default(), 0, 0);
    for _ in 0..arguments.runs {
        let mut command = Command::new("systemd-socket-activate");
        let address = format!("127.0.0.1:{}", common.port);
        command.args(["-l", &address]).arg(&common.server).args(["serve", "--listen", &address]);
        command.args(["--executors", &EXECUTORS.to_string(), "--cpus", &common.cpus_or("0,1")]).args(&common.extra);
        let log = common.scratch.join("ringleader-proofs-activation.log");
        let server = match Server::start(command, common.port, &log) {
            Ok(server) => server,
            Err(reason) => {
                failed.note(|| reason);
                continue;
            }
        };
        let over = Over::default();
        let rate = arguments.rate;
        let fresh = Plan::whoami(server.address()).run(move |_| rate, &over);
        sleep(LOAD).await;
        over.set();
        let fresh = fresh.await.map_err(|error| error.to_string())?;
        begun += fresh.begun;
        failed.add(fresh.failed);
        let (status, _) = server.stop()?;
        unstopped += usize::from(!status.success());
    }
    let figures = format!("{} of {begun} in {} starts", failed.show("failures"), arguments.runs);
    verdicts.check(failed.count() == 0 && begun > 0, criterion, figures);
    verdicts.check(unstopped == 0, "it stops in order", format!("{unstopped} did not"));
    Ok(())
}

/// What a service manager hears.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    heard: Vec<String>,
}

impl Manager {
    fn new(common: &Common) -> Result<Self, String> {
        let path = common.scratch.join(format!("ringleader-proofs-{}.notify", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).and_then(|socket| socket.set_nonblocking(true).map(|()| socket));
        let socket = socket.map_err(|error| format!("binding {}: {error}", path.display()))?;
        Ok(Self { socket, path, heard: Vec::new() })
    }

    /// Waits for a line.
    async fn hear(&mut self, line: &str, limit: Duration) -> bool {
        let began = Instant::now();
        let mut buffer = [0; 4096];
        loop {
            while let Ok(count) = self.socket.recv(&mut buffer) {
                self.heard.extend(String::from_utf8_lossy(&buffer[..count]).lines().map(str::to_owned));
            }
            if self.heard.iter().any(|heard| heard == line) {
                return true;
            }
            if began.elapsed() > limit {
                return false;
            }
            sleep(Duration::from_micros(200)).await;
        }
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn notified(arguments: &Arguments, verdicts: &mut Verdicts) -> Result<(), String> {
    let common = &arguments.common;
    let (mut failed, mut early, mut deaf, mut mute) = (Faults::default(), 0, 0, 0);
    let mut times = Vec::new();
    for _ in 0..arguments.runs {
        let mut manager = Manager::new(common)?;
        let mut command = Command::new(&common.server);
        command.args(["serve", "--listen", &format!("127.0.0.1:{}", common.port)]).env("NOTIFY_SOCKET", &manager.path);
        command.args(["--executors", &EXECUTORS.to_string(), "--cpus", &common.cpus_or("0,1")]).args(&common.extra);
        let log = common.scratch.join("ringleader-proofs-notified.log");
        let server = Server::spawn(command, common.port, &log)?;
        // Only now: the kernel takes the port from the server before with a delay of seconds, which `spawn` waits for.
        let began = Instant::now();
        if !manager.hear("READY=1", READY_MAX).await {
            deaf += 1;
            drop(server);
            continue;
        }
        times.push(began.elapsed());
        let mut seen = HashSet::new();
        for _ in 0..CONNECTIONS {
            let asked = load::in_time(load::ask_whoami(server.address()));
            match asked.await {
                Ok(who) => drop(seen.insert(who.executor)),
                Err(error) => failed.note(|| format!("after READY=1: {error}")),
            }
        }
        early += usize::from(seen.len() < EXECUTORS);
        sys::signal(server.pid(), sys::TERMINATE);
        mute += usize::from(!manager.hear("STOPPING=1", STOPPING_MAX).await);
        server.stop()?;
    }
    let ((middle, worst), runs) = (middle_and_worst(times), arguments.runs);
    let figures = format!("{deaf} of {runs} did not; after {middle:.1?} (median), {worst:.1?} (worst)");
    verdicts.check(deaf == 0, "READY=1 is said", figures);
    verdicts.check(
        early == 0 && failed.count() == 0,
        "when READY=1 is said, every executor accepts",
        format!("{early} times not every one; {}", failed.show("failures")),
    );
    verdicts.check(mute == 0 && deaf == 0, "STOPPING=1 is said", format!("{mute} of {runs} did not"));
    Ok(())
}

/// One executor's start-up waits at a gate: until it is opened the other three are there and the server is not ready.
async fn held_up(arguments: &Arguments, verdicts: &mut Verdicts) -> Result<(), String> {
    let common = &arguments.common;
    let itself = std::env::current_exe().map_err(|error| format!("finding this program: {error}"))?;
    let (mut early, mut deaf, mut lone) = (0, 0, 0);
    for _ in 0..arguments.runs {
        let mut manager = Manager::new(common)?;
        let gate = manager.path.with_extension("gate");
        let _ = std::fs::remove_file(&gate);
        let mut command = Command::new(&itself);
        command.args(["serve", "--listen", &format!("127.0.0.1:{}", common.port)]).env("NOTIFY_SOCKET", &manager.path);
        command.args(["--executors", &EXECUTORS.to_string(), "--cpus", &common.cpus_or("0,1"), "--gate"]).arg(&gate);
        let log = common.scratch.join("ringleader-proofs-held-up.log");
        let server = Server::spawn(command, common.port, &log)?;
        early += usize::from(manager.hear("READY=1", GATE_SHUT).await);
        std::fs::write(&gate, "").map_err(|error| format!("writing {}: {error}", gate.display()))?;
        deaf += usize::from(!manager.hear("READY=1", READY_MAX).await);
        lone += usize::from(load::reach(server.address(), EXECUTORS - 1).await.is_err());
        std::fs::remove_file(&gate).map_err(|error| format!("removing {}: {error}", gate.display()))?;
        server.stop()?;
    }
    verdicts.check(
        early == 0 && deaf == 0 && lone == 0,
        "READY=1 waits for an executor whose start-up takes its time",
        format!(
            "of {} starts {early} said it within {GATE_SHUT:?} of waiting, {deaf} not after it; {lone} times that executor did \
             not answer",
            arguments.runs
        ),
    );
    Ok(())
}
