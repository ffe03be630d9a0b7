//! Compares what a request from one executor to another costs, and how long its answer takes: Ringleader's `call` beside
//! channels between two tokio runtimes and a socketpair between two processes.
//!
//! Each sample is taken in a process of its own, which this program starts from itself; the rivals take turns. What is
//! compared is the ratio of two samples of one round.
#![forbid(unsafe_code)]

mod measure;
mod options;
mod report;
mod rivals;
mod rounds;

use std::process::ExitCode;

use clap::Parser;

use crate::options::Options;

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match (options.sample, options.serve) {
        (Some((rival, scenario)), _) => rivals::sample(rival, scenario, &options).and_then(|sample| sample.print()),
        (None, Some(serve)) => rivals::socketpair::serve(serve, &options),
        (None, None) => rounds::compare(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
