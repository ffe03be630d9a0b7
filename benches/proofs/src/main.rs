//! Proofs that take long: each drives a `ringleader serve` as a black box on loopback, from a process of its own, and
//! ends with a verdict per criterion. Exit status: 0 all met, 1 something missed, 2 the proof could not be run.

mod bodies;
mod client;
mod escapes;
mod histogram;
mod idle;
mod load;
mod network;
mod proc;
mod random;
mod report;
mod scale;
mod server;
mod soak;
mod spread;
mod stall;
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
    proof: Proof,
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
    /// Transfers of 1 GiB, and clients that read slowly
    Bodies(bodies::Arguments),
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
            Self::Bodies(arguments) => &arguments.common,
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
            Self::Bodies(arguments) => bodies::run(arguments).await,
            Self::Stall(arguments) => stall::run(arguments).await,
            Self::Upgrades(arguments) => upgrades::run(arguments).await,
            Self::Scale(arguments) => scale::run(arguments).await,
        }
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse().proof) {
        Ok(verdicts) => ExitCode::from(u8::from(!verdicts.conclude())),
        Err(message) => {
            eprintln!("ringleader-proofs: {message}");
            ExitCode::from(2)
        }
    }
}

fn run(proof: &Proof) -> Result<Verdicts, String> {
    let files = sys::raise_open_files();
    let common = proof.common();
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
