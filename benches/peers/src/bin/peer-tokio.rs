//! The honest rival: what a careful Rust engineer writes without Ringleader. One thread per core, each
//! pinned, each with a tokio `current_thread` runtime and its own `SO_REUSEPORT` listener, serving
//! hyper's HTTP/1 with its defaults.
//!
//! `--through axum` puts an axum router behind the same loop, by hyper-util's adapter of tower services; `axum-serve` is
//! `axum::serve`, which is shorter to write and costs a little more.
//!
//! No timer is given to hyper, so there is no header-read timeout: that favours this rival.
#![forbid(unsafe_code)]

use std::io;

use axum::Router;
use clap::{Parser, ValueEnum};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use ringleader_peers::{PeerOptions, answer, answer_or_spin, listen, router, run};
use tokio::net::{TcpListener, TcpStream};

#[derive(Debug, Parser)]
struct Options {
    /// What stands between hyper and the handler.
    #[arg(long, value_enum, default_value = "hyper")]
    through: Through,
    #[command(flatten)]
    peer: PeerOptions,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Through {
    /// Nothing: a service function.
    Hyper,
    /// A router.
    Axum,
    /// A router, and axum's own server.
    AxumServe,
}

fn main() {
    let Options { through, peer } = Options::parse();
    run(peer, move |options, _cpu| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(serve(options, through))
    })
}

async fn serve(options: &PeerOptions, through: Through) -> io::Result<()> {
    let listener = TcpListener::from_std(listen(options.listen)?)?;
    let router = router();
    if matches!(through, Through::AxumServe) {
        use axum::serve::ListenerExt;
        let listener = listener.tap_io(|stream| {
            // As below; a connection that is gone already shows that at its first read.
            let _ = stream.set_nodelay(true);
        });
        return axum::serve(listener, router).await;
    }
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                stream.set_nodelay(true)?;
                // Plain `spawn`, not a `LocalSet`: on this runtime it is the cheaper of the two.
                match through {
                    Through::Hyper if options.chaos => tokio::spawn(connection_that_may_spin(stream)),
                    Through::Hyper => tokio::spawn(connection(stream)),
                    Through::Axum | Through::AxumServe => tokio::spawn(connection_to_router(stream, router.clone())),
                };
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

async fn connection(stream: TcpStream) {
    let served = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer));
    // A client that resets its connection is the load generator's end of a run, not an error here.
    let _ = served.await;
}

async fn connection_to_router(stream: TcpStream, router: Router) {
    let service = TowerToHyperService::new(router);
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

/// Apart, so that a comparison without `--chaos` runs the plain handler.
async fn connection_that_may_spin(stream: TcpStream) {
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer_or_spin)).await;
}
