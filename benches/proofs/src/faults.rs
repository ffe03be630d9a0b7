//! System calls that fail, processes that are stopped, CPUs that are taken away, limits that shrink: the service goes on,
//! and says what happened. Some faults cost connections, and those are counted; when the fault is over none may fail.
//!
//! strace injects the errors, as many as `when=` says and for each thread apart, so that every fault has an end.

use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::time::sleep;

use crate::client;
use crate::load::{self, Fresh, Kept, Over, Plan};
use crate::report::Verdicts;
use crate::server::{Common, Server};
use crate::sys;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Runs of each fault
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Only the faults whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// New connections a second
    #[arg(long, default_value_t = 200.0)]
    rate: f64,
    /// Clients that keep their connections
    #[arg(long, default_value_t = 16)]
    keep_alive: usize,
}

/// What is done while the load runs; strace's injections come by themselves.
#[derive(Clone, Copy)]
enum Act {
    Wait,
    /// Escaped panics, so that executors make new rings.
    Escape,
    /// SIGSTOP, and SIGCONT half a second later.
    Stop,
    /// A real-time process on the first executor's CPU.
    Hog,
    /// A limit on open files below what is open: nothing can be accepted for a second.
    Limit,
}

struct Fault {
    name: &'static str,
    inject: Option<&'static str>,
    act: Act,
    /// It may cost connections.
    costs: bool,
    /// The log has a line with one of these.
    said: &'static [&'static str],
}

const NONE: Fault = Fault { name: "", inject: None, act: Act::Wait, costs: false, said: &[] };

const FAULTS: &[Fault] = &[
    Fault {
        name: "accept4 EMFILE",
        inject: Some("accept4:error=EMFILE:when=5..80+7"),
        costs: true,
        said: &["accept4"],
        ..NONE
    },
    Fault {
        name: "accept4 ENOBUFS",
        inject: Some("accept4:error=ENOBUFS:when=5..80+7"),
        costs: true,
        said: &["accept4"],
        ..NONE
    },
    Fault { name: "accept4 ECONNABORTED", inject: Some("accept4:error=ECONNABORTED:when=5..80+7"), ..NONE },
    Fault { name: "io_uring_enter EINTR", inject: Some("io_uring_enter:error=EINTR:when=50..500+5"), ..NONE },
    Fault {
        name: "io_uring_enter EBUSY",
        inject: Some("io_uring_enter:error=EBUSY:when=50..500+5"),
        said: &["io_uring_enter"],
        ..NONE
    },
    Fault {
        name: "io_uring_enter EAGAIN",
        inject: Some("io_uring_enter:error=EAGAIN:when=50..500+5"),
        said: &["io_uring_enter"],
        ..NONE
    },
    Fault {
        name: "io_uring_setup ENOMEM on restart",
        inject: Some("io_uring_setup:error=ENOMEM:when=SETUPS"),
        act: Act::Escape,
        costs: true,
        said: &["io_uring"],
    },
    Fault { name: "SIGSTOP and SIGCONT", act: Act::Stop, said: &["stood still"], ..NONE },
    // It has nothing to say where the executor was parked, as it mostly is at this rate.
    Fault { name: "no CPU for one executor", act: Act::Hog, ..NONE },
    Fault {
        name: "prlimit --nofile in flight",
        act: Act::Limit,
        costs: true,
        said: &["accept4", "open files"],
        ..NONE
    },
];

/// Rings that an executor's thread makes until it serves: glommio's three, one to ask the kernel with, and ours. The next is
/// that of a restart.
const RINGS_AT_START: usize = 5;
/// A fault is in force for this long, and the calm after it is as long.
const PHASE: Duration = Duration::from_secs(2);
/// Longer than what the log takes for a busy machine.
const STOPPED: Duration = Duration::from_millis(1500);

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let mut verdicts = Verdicts::default();
    for fault in FAULTS.iter().filter(|fault| fault.name.contains(&arguments.only)) {
        println!("{}:", fault.name);
        let mut sum = Sum::default();
        for number in 1..=arguments.runs {
            let run = one(arguments, fault, number == 1);
            if let Err(reason) = run.await.and_then(|run| sum.add(run)) {
                println!("  run {number}: {reason}");
                sum.broken.get_or_insert(reason);
                break;
            }
        }
        sum.judge(arguments, fault, &mut verdicts);
    }
    Ok(verdicts)
}

/// One run: what was answered while the fault was in force, and after it.
struct Run {
    during: Fresh,
    after: Fresh,
    kept_during: u64,
    kept_after: u64,
    said: bool,
    stopped: bool,
}

impl Run {
    fn lost(&self) -> u64 {
        self.during.failed.count() + self.kept_during
    }
}

#[derive(Default)]
struct Sum {
    runs: usize,
    during: u64,
    lost: u64,
    after: u64,
    lost_after: u64,
    /// Runs whose log did not say it.
    silent: usize,
    unstopped: usize,
    longest: Duration,
    broken: Option<String>,
}

impl Sum {
    fn add(&mut self, run: Run) -> Result<(), String> {
        self.runs += 1;
        self.during += run.during.begun;
        self.lost += run.lost();
        self.after += run.after.begun;
        self.lost_after += run.after.failed.count() + run.kept_after;
        self.silent += usize::from(!run.said);
        self.unstopped += usize::from(!run.stopped);
        self.longest = self.longest.max(run.during.waits().longest());
        run.after.failed.show("failures after it");
        if run.after.answered.is_empty() {
            return Err("nothing was answered in the end".to_owned());
        }
        if run.during.answered.is_empty() { Err("nothing was answered".to_owned()) } else { Ok(()) }
    }

    fn judge(&self, arguments: &Arguments, fault: &Fault, verdicts: &mut Verdicts) {
        let name = fault.name;
        let figures = self.broken.clone().unwrap_or_else(|| format!("{} runs of {}", self.runs, arguments.runs));
        verdicts.check(self.broken.is_none(), &format!("{name}: the service survives"), figures);
        let figures = format!(
            "{} of {} new connections and kept requests; worst wait {:.2?}",
            self.lost, self.during, self.longest
        );
        if fault.costs {
            println!("  lost meanwhile: {figures}");
        } else {
            verdicts.check(self.lost == 0, &format!("{name}: nothing fails meanwhile"), figures);
        }
        let figures = format!("{} of {}", self.lost_after, self.after);
        verdicts.check(self.lost_after == 0 && self.after > 0, &format!("{name}: nothing fails after it"), figures);
        if !fault.said.is_empty() {
            let figures = format!("{} runs without a line with {:?}", self.silent, fault.said);
            verdicts.check(self.silent == 0, &format!("{name}: the log says so"), figures);
        }
        let figures = format!("{} of {} did not", self.unstopped, self.runs);
        verdicts.check(self.unstopped == 0, &format!("{name}: the server stops in order"), figures);
    }
}

async fn one(arguments: &Arguments, fault: &Fault, talk: bool) -> Result<Run, String> {
    let server = start(&arguments.common, fault)?;
    let (during, kept_during) = phase(arguments, &server, Some(fault.act)).await?;
    let (after, kept_after) = phase(arguments, &server, None).await?;
    let lines = server.log_since(0, &["WARN", "ERROR"]);
    if talk {
        lines.iter().take(3).for_each(|line| println!("  log: {line}"));
        during.failed.show("failures while it is in force");
    }
    let said = fault.said.is_empty() || lines.iter().any(|line| fault.said.iter().any(|word| line.contains(word)));
    let (status, _) = server.stop()?;
    Ok(Run { during, after, kept_during, kept_after, said, stopped: status.success() })
}

fn start(common: &Common, fault: &Fault) -> Result<Server, String> {
    let mut command = match fault.inject {
        None => Command::new(&common.server),
        Some(inject) => {
            let setups = format!("{}..{}", RINGS_AT_START + 1, RINGS_AT_START + 3);
            let call = inject.split(':').next().unwrap_or_default();
            let mut strace = Command::new("strace");
            // -D: the server is our child, not strace's.
            strace.args(["-D", "-f", "-q", "-o", "/dev/null", "-e", &format!("trace={call}")]);
            strace.args(["-e", &format!("inject={}", inject.replace("SETUPS", &setups))]).arg(&common.server);
            strace
        }
    };
    let port = common.port;
    command.args(["serve", "--listen", &format!("127.0.0.1:{port}"), "--executors", "2"]);
    command.args(["--cpus", &common.cpus_or("0,1"), "--chaos", "--drain-timeout", "5"]).args(&common.extra);
    Server::start(command, port, &common.scratch.join("ringleader-proofs-faults.log"))
}

/// New and kept connections while something is done, or nothing; and how many kept requests failed.
async fn phase(arguments: &Arguments, server: &Server, act: Option<Act>) -> Result<(Fresh, u64), String> {
    let over = Over::default();
    let rate = arguments.rate;
    let fresh = Plan::whoami(server.address()).run(move |_| rate, &over);
    let (kept, clients) = load::keep(server.address(), arguments.keep_alive, &over);
    sleep(PHASE / 4).await;
    if let Some(act) = act {
        perform(act, arguments, server).await?;
    }
    sleep(PHASE).await;
    over.set();
    let fresh = fresh.await.map_err(|error| error.to_string())?;
    load::all(clients).await?;
    let Kept { failed, .. } = kept.take();
    Ok((fresh, failed.count()))
}

async fn perform(act: Act, arguments: &Arguments, server: &Server) -> Result<(), String> {
    match act {
        Act::Wait => {}
        Act::Escape => {
            // Twice: one of the threads has made a ring less, as glommio asks the kernel only once what it can do.
            for executor in [0, 1, 0, 1] {
                let (mut client, _) = load::reach(server.address(), executor).await?;
                let sent = client.send(client::get("/chaos/escape", false).as_bytes()).await;
                sent.map_err(|error| format!("ordering an escape: {error}"))?;
                sleep(PHASE / 2).await;
            }
        }
        Act::Stop => {
            sys::signal(server.pid(), sys::PAUSE);
            sleep(STOPPED).await;
            sys::signal(server.pid(), sys::RESUME);
        }
        Act::Hog => {
            let cpus = arguments.common.cpus_or("0,1");
            hog(cpus.split([',', '-']).next().unwrap_or("0")).await?;
        }
        Act::Limit => {
            limit(server, 8)?;
            sleep(PHASE / 2).await;
            limit(server, 4096)?;
        }
    }
    Ok(())
}

/// Takes a CPU away for 300 ms. The kernel ends the hog by its limit on real-time, as it may be above everybody who would
/// like to; should that fail, somebody who is not on that CPU and has no such priority ends it after a second.
async fn hog(cpu: &str) -> Result<(), String> {
    let limits = ["-s", "KILL", "1", "prlimit", "--rttime=300000:300000"];
    let spin = ["taskset", "-c", cpu, "chrt", "-f", "50", "sh", "-c", "while :; do :; done"];
    let spawned = Command::new("timeout").args(limits).args(spin).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut hog = spawned.map_err(|error| format!("starting timeout, prlimit, taskset, chrt: {error}"))?;
    sleep(Duration::from_millis(1200)).await;
    let status = hog.wait().map_err(|error| format!("waiting for the hog: {error}"))?;
    // timeout(1) says 128 and the signal's number, or died of the same signal.
    if status.code().is_none_or(|code| code >= 128) {
        Ok(())
    } else {
        Err(format!("taking the CPU away (chrt needs CAP_SYS_NICE): {status}"))
    }
}

/// The soft limit alone, so that it can be raised again.
fn limit(server: &Server, files: u64) -> Result<(), String> {
    let arguments = ["--pid", &server.pid().to_string(), &format!("--nofile={files}:")];
    match Command::new("prlimit").args(arguments).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("prlimit --nofile={files}: {status}")),
        Err(error) => Err(format!("running prlimit: {error}")),
    }
}
