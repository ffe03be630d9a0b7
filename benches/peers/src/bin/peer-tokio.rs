//! The honest rival: what a careful Rust engineer writes without Ringleader. One thread per core, each
//! pinned, each with a tokio `current_thread` runtime and its own `SO_REUSEPORT` listener, serving
//! hyper's HTTP/1 with its defaults.
//!
//! No timer is given to hyper, so there is no header-read timeout: that favours this rival.
#![forbid(unsafe_code)]

use std::io;

use clap::Parser;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use ringleader_peers::{PeerOptions, answer, answer_or_spin, listen, run};
use tokio::net::{TcpListener, TcpStream};

fn main() {
    run(PeerOptions::parse(), |options, _cpu| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(serve(options))
    })
}

async fn serve(options: &PeerOptions) -> io::Result<()> {
    let listener = TcpListener::from_std(listen(options.listen)?)?;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                stream.set_nodelay(true)?;
                // Plain `spawn`, not a `LocalSet`: on this runtime it is the cheaper of the two.
                if options.chaos {
                    tokio::spawn(connection_that_may_spin(stream));
                } else {
                    tokio::spawn(connection(stream));
                }
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

/// Apart, so that a comparison without `--chaos` runs the plain handler.
async fn connection_that_may_spin(stream: TcpStream) {
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer_or_spin)).await;
}
