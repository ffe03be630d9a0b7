//! State that is not `Send` in an axum router, and a part of a handler that is not either.

use axum::extract::State;
use axum::{Router, routing::get};
use ringleader::{Shard, ShardLocal};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

pub struct Application {
    shard: Shard,
    count: RefCell<u8>,
}

async fn short(State(application): State<ShardLocal<Application>>) -> String {
    *application.count.borrow_mut() += 1;
    application.shard.sleep(Duration::ZERO).await;
    application.count.borrow().to_string()
}

async fn long(State(application): State<ShardLocal<Application>>) -> String {
    let work = async |application: &Application| {
        let count = application.count.borrow_mut();
        application.shard.sleep(Duration::ZERO).await;
        let _ = application.shard.spawn(async { drop(Rc::new(1)) }).await;
        count.to_string()
    };
    application.run(work).await
}

pub fn program(application: ShardLocal<Application>) -> ringleader::Axum {
    ringleader::axum(Router::new().route("/", get(short)).route("/long", get(long)).with_state(application))
}
