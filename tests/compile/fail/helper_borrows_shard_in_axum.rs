//! A helper that holds a `&Shard` while it waits is not `Send`, as any handler of axum's must be: it waits for what the
//! shard gave it instead (`shard.sleep(..)` is `Send` and borrows nothing), or goes into `ShardLocal::run`.
//!
//! says: Handler<

use axum::extract::State;
use axum::{Router, routing::get};
use ringleader::{Shard, ShardLocal};
use std::time::Duration;

pub struct Application {
    shard: Shard,
}

async fn rest(shard: &Shard) -> String {
    shard.sleep(Duration::ZERO).await;
    shard.id().to_string()
}

async fn answer(State(application): State<ShardLocal<Application>>) -> String {
    rest(&application.shard).await
}

pub fn program(application: ShardLocal<Application>) -> ringleader::Axum {
    ringleader::axum(Router::new().route("/", get(answer)).with_state(application))
}

fn main() {}
