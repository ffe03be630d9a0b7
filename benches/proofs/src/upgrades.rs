//! Upgrade after upgrade under load: a new process takes the listeners over on SIGUSR2, the old one drains. And new
//! binaries that are broken, which must cost nothing.
//!
//! A copy of the binary is served, so that the file can be swapped. The new process is known by the pid that /whoami
//! says; it is nobody's child in the end, and is adopted by the proof so that its exit status can be seen.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::load::{self, Kept, Over, Plan, in_time, middle_and_worst};
use crate::network::{self, Counters};
use crate::report::{Progress, Verdicts};
use crate::server::{Common, Server};
use crate::sys;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Upgrades, one after another
    #[arg(long, default_value_t = 50)]
    runs: usize,
    /// New connections a second meanwhile
    #[arg(long, default_value_t = 1000.0)]
    rate: f64,
    /// Clients that keep their connections
    #[arg(long, default_value_t = 32)]
    keep_alive: usize,
    /// Executors
    #[arg(long, default_value_t = 2)]
    executors: usize,
    /// Milliseconds between the end of an old process and the next upgrade
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pause: u64,
    /// Seconds in which the server has to notice that a new binary is broken
    #[arg(long, value_name = "SECONDS", default_value_t = 70)]
    broken_limit: u64,
    /// How often each of the broken binaries is tried; the one that hangs once, since it takes the whole time limit
    #[arg(long, default_value_t = 4)]
    broken_runs: usize,
    /// Leave out the broken binaries
    #[arg(long)]
    no_broken: bool,
}

/// A new process answers within this time after the order.
const TAKEOVER_MAX: Duration = Duration::from_secs(30);
/// The old one has drained and ended within this time after that.
const DRAIN_MAX: Duration = Duration::from_secs(20);
/// How long a broken binary's server is watched after it has said so.
const AFTER_BROKEN: Duration = Duration::from_secs(1);

const HANGS: &str = "hangs";

/// New binaries that cannot take over.
const BROKEN: &[(&str, Option<&str>)] = &[
    ("exits with an error at once", Some("#!/bin/sh\nexit 1\n")),
    ("exits with success at once", Some("#!/bin/sh\nexit 0\n")),
    (
        "prints garbage to everybody and ends",
        Some("#!/bin/sh\nhead -c 100000 /dev/urandom >&0\nhead -c 100000 /dev/urandom\n"),
    ),
    ("kills itself", Some("#!/bin/sh\nkill -SEGV $$\n")),
    ("is not a program", Some("not a program\n")),
    ("is not there", None),
    (HANGS, Some("#!/bin/sh\nexec sleep 300\n")),
];

/// The file that is served, and the good binary it can be put back to.
struct Binary {
    good: PathBuf,
    served: PathBuf,
}

impl Binary {
    fn new(common: &Common) -> Result<Self, String> {
        let served = common.scratch.join(format!("ringleader-upgrades-{}", std::process::id()));
        let binary = Self { good: common.server.clone(), served };
        binary.restore()?;
        Ok(binary)
    }

    fn restore(&self) -> Result<(), String> {
        self.swap(|new| {
            fs::copy(&self.good, new)?;
            fs::set_permissions(new, fs::Permissions::from_mode(0o755))
        })
    }

    /// In one step, as a package manager does it: by a rename.
    fn swap(&self, make: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), String> {
        let new = self.served.with_extension("new");
        let swapped = make(&new).and_then(|()| fs::rename(&new, &self.served));
        swapped.map_err(|error| format!("replacing {}: {error}", self.served.display()))
    }

    fn break_with(&self, script: Option<&str>) -> Result<(), String> {
        let Some(script) = script else {
            return match fs::remove_file(&self.served) {
                // It was tried before.
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(format!("removing the binary: {error}")),
                _ => Ok(()),
            };
        };
        self.swap(|new| {
            let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o755).open(new)?;
            file.write_all(script.as_bytes())
        })
    }
}

impl Drop for Binary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.served);
    }
}

/// Which process serves now; it is ended with the proof.
struct Serving {
    pid: u32,
    server: Server,
}

impl Drop for Serving {
    fn drop(&mut self) {
        if self.pid != self.server.pid() {
            sys::signal(self.pid, sys::KILL);
        }
    }
}

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let mut verdicts = Verdicts::default();
    let alone = network::enter();
    if let Err(reason) = &alone {
        println!("  the kernel's counters are not the proof's alone: {reason}");
    }
    sys::adopt_orphans().map_err(|error| format!("adopting orphans: {error}"))?;
    let binary = Binary::new(&arguments.common)?;
    let common = Common { server: binary.served.clone(), ..arguments.common.clone() };
    let (executors, cpus) = (arguments.executors.to_string(), common.cpus_or("0,1"));
    let server = common.start(common.port, &["--executors", &executors, "--cpus", &cpus, "--drain-timeout", "10"])?;
    println!("server: {}, process {}, log {}", server.command, server.pid(), server.log_path());
    println!(
        "load: {} new connections a second, {} kept ones; {} upgrades",
        arguments.rate, arguments.keep_alive, arguments.runs
    );
    let mut serving = Serving { pid: server.pid(), server };
    upgrades(arguments, &mut serving, &mut verdicts).await?;
    if !arguments.no_broken {
        broken(arguments, &binary, &mut serving, &mut verdicts).await?;
    }
    let last = serving.pid;
    sys::signal(last, sys::TERMINATE);
    let ended = reap(&mut serving, last, DRAIN_MAX * 2).await;
    verdicts.check(ended.as_deref() == Some("exit status: 0"), "the last server stops in order", format!("{ended:?}"));
    Ok(verdicts)
}

/// The load of both parts.
struct Load {
    over: Over,
    fresh: tokio::task::JoinHandle<load::Fresh>,
    kept: std::rc::Rc<std::cell::RefCell<Kept>>,
    clients: Vec<tokio::task::JoinHandle<()>>,
    counters: Counters,
}

impl Load {
    fn start(arguments: &Arguments, server: &Server) -> Self {
        let over = Over::default();
        let rate = arguments.rate;
        let counters = Counters::read();
        let fresh = Plan::whoami(server.address()).run(move |_| rate, &over);
        let (kept, clients) = load::keep(server.address(), arguments.keep_alive, &over);
        Self { over, fresh, kept, clients, counters }
    }

    async fn end(self, what: &str, verdicts: &mut Verdicts) -> Result<load::Fresh, String> {
        self.over.set();
        let fresh = self.fresh.await.map_err(|error| error.to_string())?;
        load::all(self.clients).await?;
        let counters = Counters::read().since(&self.counters);
        let kept = self.kept.borrow();
        println!("  {what}: new connections {}; {}", fresh.waits(), fresh.describe());
        println!("  {what}: kept connections: {}", kept.describe());
        println!("  {what}: {counters:?}");
        verdicts.check(
            fresh.is_whole(),
            &format!("{what}: no new connection fails"),
            format!("{} of {}", fresh.failed.show("failures"), fresh.begun),
        );
        verdicts.check(
            kept.failed.count() == 0,
            &format!("{what}: kept connections finish their requests"),
            format!("{} of {} requests", kept.failed.show("failures"), kept.asked),
        );
        let syns = counters.syn_retransmits;
        verdicts.check(syns == 0, &format!("{what}: no SYN is sent again"), format!("{syns}"));
        verdicts.check(
            fresh.is_honest(),
            &format!("{what}: the load kept its schedule"),
            format!("lag p99 {:.2?}", fresh.lag.percentile(0.99)),
        );
        drop(kept);
        Ok(fresh)
    }
}

async fn upgrades(arguments: &Arguments, serving: &mut Serving, verdicts: &mut Verdicts) -> Result<(), String> {
    let load = Load::start(arguments, &serving.server);
    sleep(Duration::from_millis(500)).await;
    let (mut takeovers, mut drains, mut ends) = (Vec::new(), Vec::new(), Vec::new());
    let mut progress = Progress::new();
    for number in 1..=arguments.runs {
        let Some(took) = upgrade(serving).await? else {
            println!("  upgrade {number}: no new process answered within {TAKEOVER_MAX:?}");
            break;
        };
        takeovers.push(took.takeover);
        drains.push(took.drain);
        ends.extend((took.ended.as_deref() != Some("exit status: 0")).then(|| format!("{number}: {:?}", took.ended)));
        progress.say(|| format!("{number} upgrades"));
        sleep(Duration::from_millis(arguments.pause)).await;
    }
    load.end("upgrades", verdicts).await?;
    let done = takeovers.len();
    let ((takeover, slowest), (drain, longest)) = (middle_and_worst(takeovers), middle_and_worst(drains));
    verdicts.check(
        done == arguments.runs,
        "every upgrade comes about",
        format!(
            "{done} of {}; the new process answers after {takeover:.1?} (median), {slowest:.1?} (worst); the old one is \
             gone {drain:.1?} later (median), {longest:.1?} (worst)",
            arguments.runs
        ),
    );
    verdicts.check(ends.is_empty(), "every old process ends in order", format!("{} did not {ends:?}", ends.len()));
    Ok(())
}

struct Took {
    /// From the order to the first answer of the new process.
    takeover: Duration,
    /// From that to the end of the old one.
    drain: Duration,
    ended: Option<String>,
}

/// One upgrade; `None` when no new process answers.
async fn upgrade(serving: &mut Serving) -> Result<Option<Took>, String> {
    let old = serving.pid;
    let began = Instant::now();
    sys::signal(old, sys::UPGRADE);
    while serving.pid == old {
        if began.elapsed() > TAKEOVER_MAX {
            return Ok(None);
        }
        sleep(Duration::from_millis(2)).await;
        serving.pid = who_serves(&serving.server).await.unwrap_or(old);
    }
    let (takeover, answered) = (began.elapsed(), Instant::now());
    let ended = reap(serving, old, DRAIN_MAX).await;
    Ok(Some(Took { takeover, drain: answered.elapsed(), ended }))
}

async fn who_serves(server: &Server) -> io::Result<u32> {
    Ok(in_time(load::ask_whoami(server.address())).await?.pid)
}

/// How a process ended, if it does in time.
async fn reap(serving: &mut Serving, pid: u32, limit: Duration) -> Option<String> {
    let began = Instant::now();
    while began.elapsed() < limit {
        let ours = pid == serving.server.pid();
        if let Some(status) = if ours { serving.server.ended() } else { sys::reap(pid) } {
            return Some(status.to_string());
        }
        if !ours && !Path::new(&format!("/proc/{pid}")).exists() {
            return Some("gone, and not by our hand".to_owned());
        }
        sleep(Duration::from_millis(5)).await;
    }
    None
}

async fn broken(
    arguments: &Arguments,
    binary: &Binary,
    serving: &mut Serving,
    verdicts: &mut Verdicts,
) -> Result<(), String> {
    let load = Load::start(arguments, &serving.server);
    let old = serving.pid;
    let again = |(what, _): &&(&str, _)| if *what == HANGS { 1 } else { arguments.broken_runs };
    for (what, script) in BROKEN.iter().flat_map(|broken| std::iter::repeat_n(broken, again(&broken))) {
        binary.break_with(*script)?;
        let before = serving.server.log_length();
        let began = Instant::now();
        sys::signal(old, sys::UPGRADE);
        let limit = Duration::from_secs(arguments.broken_limit);
        let said = loop {
            let lines = serving.server.log_since(before, &["WARN", "ERROR"]);
            if !lines.is_empty() || began.elapsed() > limit {
                break lines;
            }
            sleep(Duration::from_millis(20)).await;
        };
        let noticed = began.elapsed();
        sleep(AFTER_BROKEN).await;
        said.iter().take(3).for_each(|line| println!("  log: {line}"));
        verdicts.check(
            !said.is_empty(),
            &format!("a new binary that {what}: the log says so"),
            format!("after {noticed:.1?}"),
        );
        let now = who_serves(&serving.server).await.map_err(|error| format!("after a binary that {what}: {error}"))?;
        verdicts.check(now == old, &format!("a new binary that {what}: the old goes on"), format!("{now}"));
    }
    let fresh = load.end("broken binaries", verdicts).await?;
    let strangers = fresh.answered.iter().filter(|answered| answered.who.is_some_and(|who| who.pid != old)).count();
    verdicts.check(strangers == 0, "only the old process answers", format!("{strangers} answers of others"));
    binary.restore()?;
    let took = upgrade(serving).await?;
    let figures = took.as_ref().map_or("no".to_owned(), |took| format!("after {:.1?}", took.takeover));
    verdicts.check(took.is_some(), "a good binary takes over after all the broken ones", figures);
    Ok(())
}
