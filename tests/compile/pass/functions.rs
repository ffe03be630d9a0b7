//! Functions in place of closures.

use ringleader::{Body, BoxError, Request, Response, Server, Service, Shard, service_fn};

async fn start(_: Shard) -> Result<impl Service, BoxError> {
    Ok(service_fn(answer))
}

async fn answer(_: Request) -> Result<Response, BoxError> {
    Ok(Response::new(Body::empty()))
}

pub fn program() -> Server {
    Server::builder().serve(start)
}
