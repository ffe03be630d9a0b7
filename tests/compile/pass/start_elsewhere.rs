//! A server is started and stopped from futures that move between threads.

use ringleader::{Body, BoxError, Error, Exit, Response, Server, Stop, service_fn};

fn server() -> Server {
    let builder = Server::builder().listen("127.0.0.1:0").executors(1);
    builder.serve(async |_| Ok(service_fn(async |_| Ok(Response::new(Body::empty())))))
}

async fn start_and_stop(server: Server) -> Result<Exit, Error> {
    let running = server.start().await?;
    running.stop(Stop::Now).await
}

pub fn main() -> Result<(), BoxError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build()?;
    // `spawn` demands that it is `Send`.
    let exit = runtime.block_on(runtime.spawn(start_and_stop(server())))??;
    assert_eq!((exit.failed, exit.abandoned), (0, 0));
    Ok(())
}
