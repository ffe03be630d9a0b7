//! axum's state is `Send`, and a shard is not.
//!
//! says: Handler<
//! says: cannot be sent between threads safely
//! says: within `Shard`

use axum::extract::State;
use axum::{Router, routing::get};
use ringleader::Shard;

async fn which(State(shard): State<Shard>) -> String {
    shard.id().to_string()
}

pub fn program(shard: Shard) -> ringleader::Axum {
    ringleader::axum(Router::new().route("/", get(which)).with_state(shard))
}

fn main() {}
