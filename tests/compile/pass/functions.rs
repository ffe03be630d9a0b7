//! Functions in place of closures.

use ringleader::test::App;
use ringleader::{Body, BoxError, Request, Response, Service, Shard, service_fn};

async fn start(_: Shard) -> Result<impl Service, BoxError> {
    Ok(service_fn(answer))
}

async fn answer(request: Request) -> Result<Response, BoxError> {
    Ok(Response::new(Body::from(request.uri().path().to_owned())))
}

pub fn main() -> Result<(), BoxError> {
    assert_eq!(App::start(start)?.get("/path")?.body(), "/path");
    Ok(())
}
