//! A shard's sleep borrows nothing: it can be a task of its own.

use ringleader::test::App;
use ringleader::{Body, BoxError, Request, Response, Shard, Task, service_fn};
use std::time::Duration;

fn nap(shard: &Shard) -> Task<()> {
    shard.spawn(shard.sleep(Duration::ZERO))
}

fn main() -> Result<(), BoxError> {
    let app = App::start(async |shard: Shard| {
        Ok(service_fn(async move |_: Request| {
            nap(&shard).await?;
            Ok(Response::new(Body::from("rested")))
        }))
    })?;
    assert_eq!(app.get("/")?.body(), "rested");
    Ok(())
}
