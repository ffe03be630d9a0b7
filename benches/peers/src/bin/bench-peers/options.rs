//! The command line, and the servers compared by default.

use std::path::PathBuf;
use std::str::FromStr;

use crate::instructions;
use crate::scenario::{SCENARIOS, Scenario, named};

/// Compares HTTP servers by what a request costs the server's process.
///
/// Servers take turns (A B B A ...); the load generator is wrk on a CPU of its own; ratios are paired and
/// come with a bootstrap interval. Lower is better.
#[derive(Debug, clap::Parser)]
#[command(name = "bench-peers", version, args_conflicts_with_subcommands = true)]
pub struct CommandLine {
    #[command(subcommand)]
    pub what: Option<What>,
    #[command(flatten)]
    pub options: Options,
}

/// What else can be compared.
#[derive(Debug, clap::Subcommand)]
pub enum What {
    /// Compares the ways into Ringleader (closure, hyper, tower, axum) with the same services on tokio.
    Adapters(Options),
    /// Counts the instructions of a request: with perf where the machine has counters, otherwise by stepping through
    /// them, which counts those in user mode.
    Instructions(instructions::Options),
}

/// What all comparisons by load take.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A server: NAME=COMMAND, or the NAME of a known one: ringleader, tokio, glommio, bare, ringleader-closure,
    /// ringleader-hyper, ringleader-tower, ringleader-axum, tokio-axum, tokio-axum-serve; repeatable.
    /// {port}, {cpu} and {bin} (this program's directory) are replaced in the command; no shell reads it.
    #[arg(long = "server", value_name = "NAME[=COMMAND]")]
    servers: Vec<Server>,
    /// A scenario by name; repeatable; all of them by default (of the adapters: keepalive-64).
    #[arg(long = "scenario", value_name = "NAME", value_parser = named)]
    scenarios: Vec<Scenario>,
    /// Rounds per scenario; in each round every server is measured once.
    #[arg(long, default_value = "15", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub pairs: u32,
    /// Seconds of load per run.
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub seconds: u32,
    /// The server that the others are compared with (ringleader-axum: with tokio-axum).
    #[arg(long, default_value = "tokio")]
    pub baseline: String,
    /// The server whose lost cases are named at the end, with those whose names begin with its own.
    #[arg(long, default_value = "ringleader")]
    pub subject: String,
    /// Measure the baseline a second time under another name: how far from 1 a ratio is by noise alone.
    #[arg(long)]
    pub self_check: bool,
    /// The first of 64 loopback ports that the runs use in turn, so that the closed connections of one run (which
    /// stay for a minute) are not in the way of the next.
    #[arg(long, default_value = "18080", value_parser = clap::value_parser!(u16).range(1..=65_000))]
    pub port: u16,
    /// The CPU that all threads of a server are confined to.
    #[arg(long, default_value = "0")]
    pub server_cpu: usize,
    /// The CPU that wrk is confined to.
    #[arg(long, default_value = "1")]
    pub load_cpu: usize,
    /// Seed of the bootstrap's random numbers.
    #[arg(long, default_value = "1")]
    pub seed: u64,
    /// Write every run and summary to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What the baseline's name ends with where it is measured a second time.
pub const AGAIN: &str = " (again)";

/// A server's name and how it is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    pub name: String,
    command: String,
    /// What it is compared with, if not with the baseline of all.
    against: Option<&'static str>,
}

/// Compared when nothing else is asked for.
const HELLO: &[&str] = &["ringleader", "tokio", "glommio", "bare"];

/// The ways into Ringleader, and the same service on tokio.
pub const ADAPTERS: &[&str] = &[
    "tokio",
    "ringleader-closure",
    "ringleader-hyper",
    "ringleader-tower",
    "tokio-axum",
    "ringleader-axum",
    "tokio-axum-serve",
];

const ALL: &[(&str, &str)] = &[
    ("ringleader", "{bin}/ringleader serve --listen 127.0.0.1:{port} --executors 1 --cpus {cpu} --log warn"),
    ("tokio", "{bin}/peer-tokio --listen 127.0.0.1:{port} --executors 1 --cpus {cpu}"),
    ("glommio", "{bin}/peer-glommio --listen 127.0.0.1:{port} --executors 1 --cpus {cpu}"),
    ("bare", "{bin}/peer-bare-ring --listen 127.0.0.1:{port} --executors 1 --cpus {cpu}"),
    ("ringleader-closure", "{bin}/peer-adapters --through closure --listen 127.0.0.1:{port} --cpus {cpu}"),
    ("ringleader-hyper", "{bin}/peer-adapters --through hyper --listen 127.0.0.1:{port} --cpus {cpu}"),
    ("ringleader-tower", "{bin}/peer-adapters --through tower --listen 127.0.0.1:{port} --cpus {cpu}"),
    ("ringleader-axum", "{bin}/peer-adapters --through axum --listen 127.0.0.1:{port} --cpus {cpu}"),
    ("tokio-axum", "{bin}/peer-tokio --through axum --listen 127.0.0.1:{port} --cpus {cpu}"),
    ("tokio-axum-serve", "{bin}/peer-tokio --through axum-serve --listen 127.0.0.1:{port} --cpus {cpu}"),
];

/// The router's comparison is with the router.
const AGAINST: &[(&str, &str)] = &[("ringleader-axum", "tokio-axum"), ("tokio-axum-serve", "tokio-axum")];

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = |name: &str| ALL.iter().find(|(known, _)| *known == name).copied();
        let pair = text.split_once('=').or_else(|| known(text));
        let (name, command) = pair.ok_or("no server of this name is known; write NAME=COMMAND")?;
        if name.is_empty() || command.trim().is_empty() {
            return Err("write NAME=COMMAND, both not empty".to_owned());
        }
        let against = AGAINST.iter().find(|(server, _)| *server == name).map(|(_, against)| *against);
        Ok(Self { name: name.to_owned(), command: command.to_owned(), against })
    }
}

impl Server {
    /// The program and its arguments, placeholders replaced.
    pub fn arguments(&self, cpu: usize, bin: &str, port: u16) -> Vec<String> {
        let fill = |word: &str| {
            word.replace("{port}", &port.to_string()).replace("{cpu}", &cpu.to_string()).replace("{bin}", bin)
        };
        self.command.split_whitespace().map(fill).collect()
    }

    /// What it is compared with: `baseline`, unless it has one of its own and that is there.
    pub fn baseline<'a>(&'a self, servers: &'a [Self], baseline: &'a str) -> &'a str {
        let own = self.against.filter(|own| servers.iter().any(|server| server.name == *own));
        if self.name == baseline { baseline } else { own.unwrap_or(baseline) }
    }
}

/// Known servers by name.
pub fn known(names: &[&str]) -> Vec<Server> {
    names.iter().map(|name| name.parse().expect("the lists of names are of known servers")).collect()
}

/// Ports in use by turns: at more than a second per run, a port comes again after the minute of TIME_WAIT.
const PORTS: usize = 64;

impl Options {
    /// The port of a run, runs counted from zero.
    pub fn port_of(&self, run: usize) -> u16 {
        self.port + (run % PORTS) as u16
    }

    /// Compares the adapters, unless servers and scenarios were named.
    pub fn of_adapters(mut self) -> Self {
        if self.servers.is_empty() {
            self.servers = known(ADAPTERS);
        }
        if self.scenarios.is_empty() {
            self.scenarios.extend(named("keepalive-64"));
        }
        self
    }

    /// The scenarios to run, all if none was named.
    pub fn scenarios(&self) -> Vec<Scenario> {
        if self.scenarios.is_empty() { SCENARIOS.to_vec() } else { self.scenarios.clone() }
    }

    /// The servers in the order of the first round.
    ///
    /// # Errors
    /// If a name comes twice or the baseline is not among them.
    pub fn servers(&self) -> Result<Vec<Server>, String> {
        let mut servers = self.servers.clone();
        if servers.is_empty() {
            servers = known(HELLO);
        }
        let baseline = servers.iter().find(|server| server.name == self.baseline);
        let baseline = baseline
            .ok_or_else(|| format!("the baseline `{}` is not among the servers: see --baseline", self.baseline))?;
        if self.self_check {
            let name = format!("{}{AGAIN}", baseline.name);
            servers.push(Server { name, command: baseline.command.clone(), against: None });
        }
        let mut names: Vec<_> = servers.iter().map(|server| &server.name).collect();
        names.sort();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("two servers are named `{}`", pair[0])),
            None => Ok(servers),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn the_command_line_is_consistent() {
        <CommandLine as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn placeholders_are_replaced() {
        let server: Server = "mine={bin}/x --at 127.0.0.1:{port} --cpus {cpu}".parse().unwrap();
        let words = server.arguments(3, "/b", 99);
        assert_eq!(words, ["/b/x", "--at", "127.0.0.1:99", "--cpus", "3"]);
    }

    #[test]
    fn servers_are_checked() {
        let servers = |words: &[&str]| CommandLine::parse_from(words).options.servers();
        assert_eq!(servers(&["bench-peers"]).unwrap().len(), 4);
        assert_eq!(servers(&["bench-peers", "--self-check"]).unwrap().len(), 5);
        assert!(servers(&["bench-peers", "--server", "bare"]).unwrap_err().contains("baseline"));
        let twice = ["bench-peers", "--server", "tokio", "--server", "tokio=x"];
        assert!(servers(&twice).unwrap_err().contains("two servers"));
        assert!("unknown".parse::<Server>().is_err());
    }

    #[test]
    fn the_router_is_compared_with_the_router() {
        let servers = known(ADAPTERS);
        let baseline = |name: &str| {
            let server = servers.iter().find(|server| server.name == name).unwrap();
            server.baseline(&servers, "tokio")
        };
        assert_eq!(baseline("ringleader-axum"), "tokio-axum");
        assert_eq!(baseline("ringleader-tower"), "tokio");
        assert_eq!(baseline("tokio"), "tokio");
        let axum = known(&["ringleader-axum"]);
        assert_eq!(axum[0].baseline(&axum, "tokio"), "tokio", "its own is not there");
    }
}
