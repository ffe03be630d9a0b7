//! Ringleader's own entry in the comparison of adapters: the same hello, as a closure, a hyper service, a tower service
//! or an axum router. Its rivals are `peer-tokio --through hyper`, `axum` and `axum-serve`.
//!
//! The handler is the rivals' own (`answer`, and the router of `router`), so nothing differs but who calls it.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use ringleader::{Builder, Error, Request, Server, service_fn};
use ringleader_peers::{PeerOptions, answer, router};

#[derive(Debug, Parser)]
struct Options {
    /// What stands between the server and the handler.
    #[arg(long, value_enum, default_value = "closure")]
    through: Through,
    #[command(flatten)]
    peer: PeerOptions,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Through {
    Closure,
    Hyper,
    Tower,
    Axum,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match serve(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: &Options) -> Result<(), Error> {
    let PeerOptions { listen, executors, cpus, .. } = &options.peer;
    let cpus: Vec<_> = (0..usize::from(*executors)).map(|index| cpus.of_executor(index)).collect();
    let server = Server::builder().listen(*listen).executors(usize::from(*executors)).cpus(cpus).stop_on_signals();
    through(server, options.through)
}

/// Each with the shortest start-up closure that a user would write.
fn through(server: Builder, through: Through) -> Result<(), Error> {
    let ended = match through {
        Through::Closure => server
            .serve(async |_| {
                Ok(service_fn(async |request: Request| match answer(request).await {
                    Ok(response) => Ok(response),
                    Err(never) => match never {},
                }))
            })
            .run(),
        Through::Hyper => server.serve(async |_| Ok(ringleader::hyper(hyper::service::service_fn(answer)))).run(),
        Through::Tower => server.serve(async |_| Ok(ringleader::tower(tower::service_fn(answer)))).run(),
        Through::Axum => server.serve(async |_| Ok(ringleader::axum(router()))).run(),
    };
    ended.map(drop)
}
