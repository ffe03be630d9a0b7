//! What looks as if it could not be, and can.

use axum::{Router, extract::State, routing::get};
use ringleader::test::App;
use ringleader::{Body, BoxError, Response, Service, Shard, ShardLocal, service_fn};
use std::future::Future;
use std::time::Duration;

/// A type that nobody names: an async closure's request, if the closure is written where it is passed.
async fn inferred(_: Shard) -> Result<impl Service, BoxError> {
    Ok(service_fn(async |request| Ok(Response::new(Body::from(request.uri().path().to_owned())))))
}

/// By its type it may hold the `&Shard` (edition 2024), which is not `Send`; what it is said to be counts.
fn rest(shard: &Shard) -> impl Future<Output = ()> + Send {
    shard.sleep(Duration::ZERO)
}

async fn answer(State(shard): State<ShardLocal<Shard>>) -> &'static str {
    rest(&shard).await;
    "rested"
}

async fn helped(shard: Shard) -> Result<impl Service, BoxError> {
    Ok(ringleader::axum(Router::new().route("/", get(answer)).with_state(shard.local(shard.clone()))))
}

pub fn main() -> Result<(), BoxError> {
    assert_eq!(App::start(inferred)?.get("/path")?.body(), "/path");
    assert_eq!(App::start(helped)?.get("/")?.body(), "rested");
    Ok(())
}
