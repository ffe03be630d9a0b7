//! A handler of axum's is `Send`, also between two of its awaits; `ShardLocal::run` is for what is not.
//!
//! says: Handler<

use axum::extract::State;
use axum::{Router, routing::get};
use ringleader::{Shard, ShardLocal};
use std::cell::RefCell;
use std::time::Duration;

pub struct Application {
    shard: Shard,
    count: RefCell<u8>,
}

async fn answer(State(application): State<ShardLocal<Application>>) -> String {
    let count = application.count.borrow_mut();
    application.shard.sleep(Duration::ZERO).await;
    count.to_string()
}

pub fn program(application: ShardLocal<Application>) -> ringleader::Axum {
    ringleader::axum(Router::new().route("/", get(answer)).with_state(application))
}

fn main() {}
