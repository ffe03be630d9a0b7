//! glommio as it comes: its executor, its `TcpListener` and `TcpStream`, and hyper's HTTP/1 on top.
//! Ringleader uses the same executor without these sockets; the difference is what its own ring brings.
//!
//! glommio binds its listeners itself, with a backlog of its choice (1024 in 0.9); the other rivals
//! and Ringleader ask for more. hyper gets no timer, as in `peer-tokio`.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use clap::Parser;
use futures_lite::io::{AsyncRead, AsyncWrite};
use glommio::net::{TcpListener, TcpStream};
use glommio::{LocalExecutorBuilder, Placement};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use ringleader_peers::{PeerOptions, answer, run};

fn main() {
    run(PeerOptions::parse(), |options, cpu| {
        // glommio's defaults but for the memory it registers for files, which nobody uses here.
        let executor = LocalExecutorBuilder::new(Placement::Fixed(cpu)).io_memory(64 << 10).make()?;
        executor.run(serve(options))
    })
}

async fn serve(options: &PeerOptions) -> io::Result<()> {
    let listener = TcpListener::bind(options.listen)?;
    loop {
        let stream = listener.accept().await?;
        stream.set_nodelay(true)?;
        glommio::spawn_local(connection(stream)).detach();
    }
}

async fn connection(stream: TcpStream) {
    let served = http1::Builder::new().serve_connection(GlommioIo(stream), service_fn(answer));
    // A client that resets its connection is the load generator's end of a run, not an error here.
    let _ = served.await;
}

/// One read takes at most this much; hyper's own buffer starts at the same size.
const READ_BYTES_MAX: usize = 8192;

thread_local! {
    /// glommio wants initialised bytes and hyper offers uninitialised ones. Bytes pass through here, which
    /// costs a copy of a request head (some 40 bytes) and needs no `unsafe`.
    static SCRATCH: RefCell<[u8; READ_BYTES_MAX]> = const { RefCell::new([0; READ_BYTES_MAX]) };
}

/// glommio's stream with hyper's traits.
struct GlommioIo(TcpStream);

impl Read for GlommioIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let room = buffer.remaining().min(READ_BYTES_MAX);
            let read = Pin::new(&mut self.0).poll_read(context, &mut scratch[..room]);
            let length = ready!(read)?;
            buffer.put_slice(&scratch[..length]);
            Poll::Ready(Ok(()))
        })
    }
}

impl Write for GlommioIo {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_close(context)
    }
}
