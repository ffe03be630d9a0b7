//! A server is started and stopped from futures that move between threads.

use ringleader::{Error, Running, Server, Stop};

async fn start_and_stop(server: Server) -> Result<(), Error> {
    let running = server.start().await?;
    let handle = running.handle();
    std::thread::spawn(move || handle.scale(4).wait());
    running.stop(Stop::Now).await.map(drop)
}

async fn two(one: Server, other: Server) -> Result<(Running, Running), Error> {
    let (one, other) = (one.start(), other.start());
    Ok((one.await?, other.await?))
}

fn send<T: Send>(_: T) {}

pub fn program(one: Server, other: Server, third: Server) {
    send(start_and_stop(one));
    send(two(other, third));
}
