//! Compares HTTP servers by what a request costs the server's process.
//!
//! It starts the servers by their commands, loads them with wrk, counts with `perf stat`, lets them take turns
//! and reports paired ratios. It knows nothing of Ringleader but a default command. It does not measure
//! latency: wrk is a closed-loop generator, so its percentiles leave out what they should show.
#![forbid(unsafe_code)]

mod check;
mod instructions;
mod measure;
mod options;
mod perf;
mod process;
mod report;
mod scenario;
mod summary;
mod wrk;

use std::env;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use serde_json::json;

use crate::measure::{Problem, Run, Sample};
use crate::options::{CommandLine, Options, Server, What};
use crate::summary::{Summary, summarise};
use crate::wrk::Script;

fn main() -> ExitCode {
    let CommandLine { what, options } = CommandLine::parse();
    let ended = match what {
        None => run(&options),
        Some(What::Adapters(options)) => run(&options.of_adapters()),
        Some(What::Instructions(options)) => instructions::run(&options),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("error: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), String> {
    let servers = options.servers()?;
    check_tools()?;
    let bin = own_directory()?;
    check_programs(&servers, &bin)?;
    let counters = perf::probe()?;
    let script = Script::write().map_err(|error| format!("write wrk's script: {error}"))?;
    let machine = process::machine();
    print!("{}", report::preamble(options, &machine, &counters));
    let names: Vec<_> =
        servers.iter().map(|server| (server.name.as_str(), server.baseline(&servers, &options.baseline))).collect();
    let mut record = Record { machine, ..Record::default() };
    for scenario in options.scenarios() {
        let run = Run { options, scenario, script: &script, bin: &bin };
        rounds(run, &servers, &mut record)?;
        let summary = summarise(scenario.name, &record.samples, &names, options.seed);
        print!("{}", report::scenario(scenario, &summary, &record.samples));
        record.summaries.push(summary);
        // Written after each scenario, so that an interrupted hour is not lost.
        record.write(options)?;
    }
    print!("{}", report::verdict(options, &record.summaries));
    match record.voids.len() {
        0 => Ok(()),
        voids => Err(format!("{voids} runs were void (see above); their rounds are not in the ratios")),
    }
}

/// Everything that was found out.
#[derive(Debug, Default)]
struct Record {
    machine: String,
    samples: Vec<Sample>,
    voids: Vec<String>,
    summaries: Vec<Summary>,
}

impl Record {
    fn write(&self, options: &Options) -> Result<(), String> {
        let Some(path) = &options.json else {
            return Ok(());
        };
        let record = json!({
            "machine": self.machine,
            "baseline": options.baseline,
            "subject": options.subject,
            "pairs": options.pairs,
            "seconds": options.seconds,
            "seed": options.seed,
            "bootstrap_resamples": ringleader_peers::stats::RESAMPLES,
            "summaries": self.summaries,
            "void": self.voids,
            "samples": self.samples,
        });
        fs::write(path, format!("{record:#}\n")).map_err(|error| format!("write {}: {error}", path.display()))
    }
}

/// All rounds of one scenario: forwards, backwards, forwards ..., so that a drift of the machine meets all.
fn rounds(run: Run<'_>, servers: &[Server], record: &mut Record) -> Result<(), String> {
    for round in 0..run.options.pairs {
        let mut turn: Vec<_> = servers.iter().collect();
        if round % 2 == 1 {
            turn.reverse();
        }
        for server in turn {
            let port = run.options.port_of(record.samples.len() + record.voids.len());
            match run.measure(server, round, port) {
                Ok(sample) => record.samples.push(sample),
                Err(Problem::Fatal(why)) => return Err(why),
                Err(Problem::Void(why)) => {
                    let name = run.scenario.name;
                    let void = format!("{name} round {round}, {}: {why}", server.name);
                    eprintln!("void run: {void}");
                    record.voids.push(void);
                }
            }
        }
    }
    Ok(())
}

fn own_directory() -> Result<String, String> {
    let own = env::current_exe().map_err(|error| format!("find this program: {error}"))?;
    Ok(own.parent().unwrap_or(Path::new(".")).display().to_string())
}

/// Says before an hour of measuring that a server is not built.
fn check_programs(servers: &[Server], bin: &str) -> Result<(), String> {
    for server in servers {
        let arguments = server.arguments(0, bin, 0);
        let program = arguments.first().map_or("", String::as_str);
        if program.contains('/') && !Path::new(program).exists() {
            return Err(format!(
                "{program} (server `{}`) does not exist. Build with `cargo build --release --workspace`, \
                 or name the servers to compare with --server",
                server.name
            ));
        }
    }
    Ok(())
}

/// The programs this one cannot do without.
fn check_tools() -> Result<(), String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let missing = |tool: &&str| !env::split_paths(&path).any(|folder| folder.join(tool).is_file());
    let tools = ["perf", "wrk", "taskset", "setpriv"];
    let missing: Vec<_> = tools.into_iter().filter(missing).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!("not found: {}. On Debian: apt-get install linux-perf wrk util-linux", missing.join(", ")))
}
