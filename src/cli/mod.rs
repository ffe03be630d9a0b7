//! The command line: the only place that prints, reads arguments, installs hooks or sets the exit status. It uses the
//! library as any embedder would, through its public interface.

mod app;
mod chaos;
mod log;
mod panics;
mod policies;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A thread-per-core, shared-nothing HTTP server for Linux: one io_uring executor and one listener per core.
#[derive(Parser)]
#[command(name = "ringleader", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// One row per command; each has its file.
#[derive(Subcommand)]
enum Command {
    /// Serve the built-in application, or a directory of files
    Serve(Box<serve::Arguments>),
}

/// What a command ends with, if not well.
pub(crate) enum Failure {
    /// The command was asked for something that cannot be: status 2.
    Usage(String),
    /// It went wrong: status 1.
    Failed(String),
    /// It has ended as ordered, but not everything was finished: status 3.
    Unfinished(String),
}

impl From<ringleader::Error> for Failure {
    fn from(error: ringleader::Error) -> Self {
        if error.is_usage() { Self::Usage(error.to_string()) } else { Self::Failed(error.to_string()) }
    }
}

/// Parses the arguments and runs the command.
pub(crate) fn run() -> ExitCode {
    log::prepare();
    let outcome = match Arguments::parse().command {
        Command::Serve(arguments) => serve::run(&arguments),
    };
    let (status, message) = match outcome {
        Ok(()) => (0, None),
        Err(Failure::Usage(message)) => (2, Some(message)),
        Err(Failure::Failed(message)) => (1, Some(message)),
        Err(Failure::Unfinished(message)) => (3, Some(message)),
    };
    if let Some(message) = message {
        log::say(&format!("ringleader: {message}\n"));
    }
    log::finish();
    ExitCode::from(status)
}
