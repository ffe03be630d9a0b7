//! Instructions per request, of a fresh server after another: counted by perf where the machine has counters, otherwise by
//! stepping, which knows user mode only.

mod clock;
mod load;
mod report;
#[cfg(target_arch = "x86_64")]
mod stepper;
#[cfg(target_arch = "x86_64")]
mod symbols;

use std::fs;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use ringleader_peers::pin_to;

use self::load::{Gauge, Load};
use self::report::{Cost, Row};
use crate::check::check;
use crate::options::{ADAPTERS, Server, known};
use crate::perf::{self, Session};
use crate::process::{CpuUse, Process, wait_until_free};
use crate::{check_programs, own_directory, process};

/// Counts the instructions of a request.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A server, as above; repeatable. By default `ringleader` and the adapters with their rivals.
    #[arg(long = "server", value_name = "NAME[=COMMAND]")]
    servers: Vec<Server>,
    /// The server that the others are compared with (ringleader-axum: with tokio-axum).
    #[arg(long, default_value = "tokio")]
    baseline: String,
    /// Connections, each with one request at a time; repeatable.
    #[arg(long, default_value = "64", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1000))]
    connections: Vec<u32>,
    /// Rounds that are counted: as many answers as there are connections each.
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    rounds: u16,
    /// Seconds of load at full speed before that, in which CPU time is taken.
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Step even where the machine has counters.
    #[arg(long)]
    step: bool,
    /// List so many functions of each server with the instructions they take; only when stepping.
    #[arg(long, default_value = "0")]
    profile: usize,
    /// The first of the loopback ports that the servers listen on, one after another.
    #[arg(long, default_value = "18080", value_parser = clap::value_parser!(u16).range(1..=65_000))]
    port: u16,
    /// The CPU that all threads of a server are confined to.
    #[arg(long, default_value = "0")]
    server_cpu: usize,
    /// The CPU that the load is confined to.
    #[arg(long, default_value = "1")]
    load_cpu: usize,
}

/// Rounds at the begin of counting that are left out: they meet the change from full speed.
const ROUNDS_SKIPPED: usize = 1;

/// Counts all servers under all loads, and prints a table for each.
pub fn run(options: &Options) -> Result<(), String> {
    let servers = options.servers();
    let bin = own_directory()?;
    check_programs(&servers, &bin)?;
    let step = options.step || !perf::probe().is_ok_and(|counters| counters.has_hardware());
    print!("{}", report::preamble(&process::machine(), step, options.rounds));
    let mut port = options.port;
    for connections in &options.connections {
        let mut rows: Vec<Row> = Vec::new();
        for server in &servers {
            let run = Run { options, connections: *connections, step, port };
            let mut row = run.count(server, &bin).map_err(|why| format!("{}: {why}", server.name))?;
            row.baseline = server.baseline(&servers, &options.baseline).to_owned();
            if let Some(first) = rows.first().filter(|first| first.answer != row.answer) {
                let (one, two) = (&first.answer, &row.answer);
                return Err(format!("the answers of {} and {} differ: {one:?}, {two:?}", first.server, row.server));
            }
            rows.push(row);
            port += 1;
        }
        print!("{}", report::table(*connections, &rows, options.profile));
    }
    Ok(())
}

impl Options {
    fn servers(&self) -> Vec<Server> {
        if !self.servers.is_empty() {
            return self.servers.clone();
        }
        let mut servers = known(ADAPTERS);
        servers.splice(1..1, known(&["ringleader"]));
        servers
    }
}

/// One server under one load.
struct Run<'a> {
    options: &'a Options,
    connections: u32,
    step: bool,
    port: u16,
}

impl Run<'_> {
    fn count(&self, server: &Server, bin: &str) -> Result<Row, String> {
        let Self { options, port, .. } = *self;
        wait_until_free(port)?;
        let process = Process::start(&server.arguments(options.server_cpu, bin, port), options.server_cpu, port)?;
        let answer = check(port)?;
        let load = Load::connect(port, self.connections, answer.len());
        let load = load.map_err(|error| format!("connect to port {port}: {error}"))?;
        let gauge = Gauge::default();
        let (bytes, load_cpu) = (answer.len(), options.load_cpu);
        let (counted, loaded) = thread::scope(|scope| {
            let gauge = &gauge;
            let load = scope.spawn(move || {
                pin_to(load_cpu).map_err(|error| error.to_string())?;
                load.run(gauge, bytes)
            });
            let counted = self.full_speed(&process, gauge).and_then(|(cpu, requests)| {
                let cost = if self.step { self.by_stepping(&process, gauge) } else { self.by_perf(&process, gauge) };
                Ok((cpu, requests, cost?))
            });
            gauge.stop.store(true, Ordering::SeqCst);
            (counted, load.join().unwrap_or_else(|_| Err("the load panicked".to_owned())))
        });
        // What ended the load explains what was not counted.
        loaded?;
        let (cpu, requests, cost) = counted?;
        let per_request = |seconds: f64| seconds * 1e6 / requests as f64;
        Ok(Row {
            server: server.name.clone(),
            baseline: String::new(),
            answer,
            cpu_us: [cpu.user_s, cpu.kernel_s, cpu.total_s].map(per_request),
            cost,
        })
    }

    /// CPU time and requests of some time at full speed.
    fn full_speed(&self, process: &Process, gauge: &Gauge) -> Result<(CpuUse, u64), String> {
        // Connections become lively first.
        await_answers(gauge, u64::from(self.connections) * 4)?;
        let (before, answers) = (process.cpu_use()?, gauge.answers.load(Ordering::SeqCst));
        thread::sleep(Duration::from_secs(self.options.seconds.into()));
        let (after, more) = (process.cpu_use()?, gauge.answers.load(Ordering::SeqCst));
        if more == answers {
            return Err("no answers".to_owned());
        }
        Ok((after.since(before), more - answers))
    }

    #[cfg(target_arch = "x86_64")]
    fn by_stepping(&self, process: &Process, gauge: &Gauge) -> Result<Cost, String> {
        let thread = busiest_thread(process.id())?;
        // On the server's own CPU: a step is two switches between the two threads.
        pin_to(self.options.server_cpu).map_err(|error| error.to_string())?;
        let mut stepper = stepper::Stepper::stop(process.id(), thread)?;
        let rounds = usize::from(self.options.rounds);
        let counted = stepper.count(gauge, u64::from(self.connections), rounds, ROUNDS_SKIPPED)?;
        // While it stands still: its mappings are needed.
        let functions = match self.options.profile {
            0 => Vec::new(),
            _ => symbols::by_function(process.id(), &counted.addresses),
        };
        let requests = counted.requests as f64;
        let per_request = |(name, count): (String, u64)| (name, count as f64 / requests);
        Ok(Cost {
            user: counted.rounds.iter().sum::<u64>() as f64 / requests,
            kernel: None,
            rounds: counted.rounds.iter().map(|count| *count as f64 / f64::from(self.connections)).collect(),
            calls: counted
                .calls
                .into_iter()
                .map(|(number, count)| (stepper::call_name(number), count))
                .map(per_request)
                .collect(),
            functions: functions.into_iter().map(per_request).collect(),
        })
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn by_stepping(&self, _process: &Process, _gauge: &Gauge) -> Result<Cost, String> {
        Err("this machine has no counters, and stepping is written for x86-64 only".to_owned())
    }

    fn by_perf(&self, process: &Process, gauge: &Gauge) -> Result<Cost, String> {
        let mut rounds = Vec::new();
        let (mut user, mut kernel, mut requests) = (0.0, 0.0, 0.0);
        for _ in 0..self.options.rounds {
            let session = Session::start(process.id())?;
            let before = gauge.answers.load(Ordering::SeqCst);
            thread::sleep(Duration::from_millis(200));
            let answers = (gauge.answers.load(Ordering::SeqCst) - before) as f64;
            let counters = session.finish()?;
            let counted = counters.instructions_user.zip(counters.instructions_kernel);
            let (of_user, of_kernel) = counted.ok_or("perf counted no instructions")?;
            rounds.push((of_user + of_kernel) / answers);
            (user, kernel, requests) = (user + of_user, kernel + of_kernel, requests + answers);
        }
        Ok(Cost {
            user: user / requests,
            kernel: Some(kernel / requests),
            rounds,
            calls: Vec::new(),
            functions: Vec::new(),
        })
    }
}

fn await_answers(gauge: &Gauge, count: u64) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while gauge.answers.load(Ordering::SeqCst) < count {
        if Instant::now() > deadline {
            return Err("no answers within 10 s".to_owned());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The thread of a process that has used the most CPU time.
fn busiest_thread(process: u32) -> Result<i32, String> {
    let path = format!("/proc/{process}/task");
    let tasks = fs::read_dir(&path).map_err(|error| format!("read {path}: {error}"))?;
    let used = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let used: u64 = text.split(' ').next()?.parse().ok()?;
        Some((used, task.file_name().to_str()?.parse().ok()?))
    };
    let busiest = tasks.filter_map(|task| used(task.ok()?)).max();
    busiest.map(|(_, thread)| thread).ok_or_else(|| format!("{path} lists no thread"))
}
