//! The start-up closure runs more than once: it clones what it gives to a service.
//!
//! says: cannot move out of `database`, a captured variable in an `AsyncFn` closure

use ringleader::{Body, Request, Response, Server, Shard, service_fn};
use std::sync::Arc;

pub fn program(database: Arc<String>) -> Server {
    Server::builder().serve(async move |_: Shard| {
        Ok(service_fn(async move |_: Request| Ok(Response::new(Body::from(database.to_string())))))
    })
}

fn main() {}
