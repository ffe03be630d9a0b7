//! Two servers in one process, and an order from a thread of its own.

use ringleader::{Body, BoxError, Response, Server, Stop, service_fn, test};
use std::thread;

fn server(name: &'static str) -> Server {
    let builder = Server::builder().name(name).listen("127.0.0.1:0").executors(1..=2);
    builder.serve(async |_| Ok(service_fn(async |_| Ok(Response::new(Body::from("hello"))))))
}

async fn both(one: Server, other: Server) -> Result<(), BoxError> {
    let (one, other) = (one.start(), other.start());
    let (one, other) = (one.await?, other.await?);
    let handle = one.handle();
    let scaled = thread::spawn(move || handle.scale(2).wait());
    scaled.join().expect("it does not panic")?;
    one.stop(Stop::Now).await?;

    assert_eq!(test::get(other.local_addrs()[0], "/")?.body(), "hello");
    let handle = other.handle();
    let stopped = thread::spawn(move || handle.stop(Stop::Now).wait());
    other.join().await?;
    stopped.join().expect("it does not panic")?;
    Ok(())
}

pub fn main() -> Result<(), BoxError> {
    tokio::runtime::Builder::new_current_thread().build()?.block_on(both(server("one"), server("other")))
}
