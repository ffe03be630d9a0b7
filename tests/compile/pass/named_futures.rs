//! A shard's futures borrow nothing, so that each can be a task of its own, and are `Send`, as axum wants its handlers.

use ringleader::test::App;
use ringleader::{Body, BoxError, Request, Response, Shard, Task, service_fn};
use std::time::Duration;

fn nap(shard: &Shard) -> Task<()> {
    shard.spawn(shard.sleep(Duration::ZERO))
}

fn for_axum<F: Future + Send + 'static>(future: F) -> F {
    future
}

pub fn main() -> Result<(), BoxError> {
    let app = App::start(async |shard: Shard| {
        Ok(service_fn(async move |_: Request| {
            nap(&shard).await?;
            drop(for_axum(shard.draining()));
            for_axum(shard.sleep(Duration::ZERO)).await;
            Ok(Response::new(Body::from("rested")))
        }))
    })?;
    assert_eq!(app.get("/")?.body(), "rested");
    Ok(())
}
