//! Proofs that take long: each drives a `ringleader serve` as a black box on loopback, from a process of its own, and
//! ends with a verdict per criterion. Exit status: 0 all met, 1 something missed, 2 the proof could not be run.

mod activation;
mod bodies;
mod client;
mod crash_loop;
mod cycles;
mod escalation;
mod escapes;
mod faults;
mod histogram;
mod idle;
mod least_loaded;
mod load;
mod network;
mod panics;
mod proc;
mod random;
mod report;
mod scale;
mod scaling;
mod serve;
mod server;
mod soak;
mod spread;
mod stall;
mod surroundings;
mod sys;
mod trend;
mod upgrades;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use report::Verdicts;
use server::Common;

/// Long proofs of a ringleader binary.
#[derive(Parser)]
#[command(name = "ringleader-proofs", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// A proof, or the server that some of them start.
#[derive(Subcommand)]
enum Command {
    #[command(flatten)]
    Proof(Proof),
    /// Not a proof: a small server built with the library, which some proofs start
    #[command(hide = true)]
    Serve(serve::Arguments),
}

/// One row per proof; each has its file.
#[derive(Subcommand)]
enum Proof {
    /// Fresh connections and mixed load: no wake lost, no request unanswered, fds and memory level
    Soak(soak::Arguments),
    /// Escaped panics under load: nobody but the victim's clients notices, nothing leaks
    Escapes(escapes::Arguments),
    /// Memory and CPU time of idle connections
    Idle(idle::Arguments),
    /// Fresh connections over four executors
    Spread(spread::Arguments),
    /// Idle connections with `--steering least-loaded`: even over the executors, also after a restart
    LeastLoaded(least_loaded::Arguments),
    /// Transfers of 1 GiB, and clients that read slowly
    Bodies(bodies::Arguments),
    /// Start-ups that panic each time: quarantine, readiness, the end
    CrashLoop(crash_loop::Arguments),
    /// A thousand servers one after the other in one process: descriptors, threads and memory level
    Cycles(cycles::Arguments),
    /// System calls that fail, stops, no CPU, no descriptors: the service goes on
    Faults(faults::Arguments),
    /// systemd: socket activation, READY=1, STOPPING=1
    Activation(activation::Arguments),
    /// Handlers that panic: nobody but their own clients notices
    Panics(panics::Arguments),
    /// More and fewer executors by order, a thousand times
    Orders(scaling::Orders),
    /// More and fewer executors by load
    Ramp(scaling::Ramp),
    /// An executor that computes for seconds: detection, rescue of its queue, the tail beside tokio
    Stall(stall::Arguments),
    /// New processes that take over under load, and new binaries that are broken
    Upgrades(upgrades::Arguments),
    /// 64 executors on two cores, and what a request costs at 1 and at 64
    Scale(scale::Arguments),
}

impl Proof {
    fn common(&self) -> &Common {
        match self {
            Self::Soak(arguments) => &arguments.common,
            Self::Escapes(arguments) => &arguments.common,
            Self::Idle(arguments) => &arguments.common,
            Self::Spread(arguments) => &arguments.common,
            Self::LeastLoaded(arguments) => &arguments.common,
            Self::Bodies(arguments) => &arguments.common,
            Self::CrashLoop(arguments) => &arguments.common,
            Self::Cycles(arguments) => &arguments.common,
            Self::Faults(arguments) => &arguments.common,
            Self::Activation(arguments) => &arguments.common,
            Self::Panics(arguments) => &arguments.common,
            Self::Orders(arguments) => &arguments.common,
            Self::Ramp(arguments) => &arguments.common,
            Self::Stall(arguments) => &arguments.common,
            Self::Upgrades(arguments) => &arguments.common,
            Self::Scale(arguments) => &arguments.common,
        }
    }

    async fn run(&self) -> Result<Verdicts, String> {
        match self {
            Self::Soak(arguments) => soak::run(arguments).await,
            Self::Escapes(arguments) => escapes::run(arguments).await,
            Self::Idle(arguments) => idle::run(arguments).await,
            Self::Spread(arguments) => spread::run(arguments).await,
            Self::LeastLoaded(arguments) => least_loaded::run(arguments).await,
            Self::Bodies(arguments) => bodies::run(arguments).await,
            Self::CrashLoop(arguments) => crash_loop::run(arguments).await,
            Self::Cycles(arguments) => cycles::run(arguments).await,
            Self::Faults(arguments) => faults::run(arguments).await,
            Self::Activation(arguments) => activation::run(arguments).await,
            Self::Panics(arguments) => panics::run(arguments).await,
            Self::Orders(arguments) => scaling::orders(arguments).await,
            Self::Ramp(arguments) => scaling::ramp(arguments).await,
            Self::Stall(arguments) => stall::run(arguments).await,
            Self::Upgrades(arguments) => upgrades::run(arguments).await,
            Self::Scale(arguments) => scale::run(arguments).await,
        }
    }
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Proof(proof) => run(&proof).map(Verdicts::conclude),
        Command::Serve(arguments) => serve::run(&arguments).map(|()| true),
    };
    match outcome {
        Ok(met) => ExitCode::from(u8::from(!met)),
        Err(message) => {
            eprintln!("ringleader-proofs: {message}");
            ExitCode::from(2)
        }
    }
}

fn run(proof: &Proof) -> Result<Verdicts, String> {
    let files = sys::raise_open_files();
    let common = proof.common();
    for warning in surroundings::look() {
        println!("may spoil this: {warning}");
    }
    server::pin_client(common.client_cpu)?;
    println!(
        "held equal: binary {}, client on CPU {} in one thread, {files} open files per process, loopback",
        common.server.display(),
        common.client_cpu,
    );
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("starting the client's runtime: {error}"))?;
    tokio::task::LocalSet::new().block_on(&runtime, proof.run())
}
