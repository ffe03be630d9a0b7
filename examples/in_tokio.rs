//! How do I run a server inside my tokio program, and stop it gracefully?
//!
//! Start and stop are orders that any runtime can await. The executors are threads of their own: neither does tokio hold
//! them up, nor they tokio. Here the server's `/stop` asks for the end; in your program it may be whatever you like.
//!
//! ```sh
//! cargo run --example in_tokio
//! curl http://127.0.0.1:8080/slow & curl http://127.0.0.1:8080/stop    # the first is answered, too
//! ```

use std::time::Duration;

use ringleader::{Body, BoxError, Request, Response, Server, Shard, Stop, service_fn};
use tokio::sync::mpsc;

fn main() -> Result<(), BoxError> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).build()?.block_on(program())
}

async fn program() -> Result<(), BoxError> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    // Work goes from the executors to tokio and back by tokio's channels, which know no runtime.
    let (stop, mut stopped) = mpsc::channel::<()>(1);
    let server = Server::builder().listen(address).serve(async move |shard: Shard| {
        let stop = stop.clone();
        Ok(service_fn(async move |request: Request| {
            match request.uri().path() {
                "/slow" => {
                    println!("a slow request has begun");
                    shard.sleep(Duration::from_secs(1)).await;
                }
                // When it is full, somebody has asked already.
                "/stop" => drop(stop.try_send(())),
                _ => {}
            }
            Ok(Response::new(Body::from("hello from an executor\n")))
        }))
    });
    let running = server.start().await?;
    println!("serving on {:?}", running.local_addrs());

    let others = tokio::spawn(async { "what else the program does, on tokio's threads" });
    println!("{}", others.await?);

    stopped.recv().await;
    // New connections are refused, requests that run are answered, what is left after 10 s is closed.
    let exit = running.stop(Stop::Drain(Duration::from_secs(10))).await?;
    println!("every connection finished in time: {}", exit.drained);
    Ok(())
}
