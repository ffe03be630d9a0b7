//! The start-up closure is async.
//!
//! says: is not a future

use ringleader::{Body, Request, Response, Server, Shard, service_fn};

pub fn program() -> Server {
    Server::builder().serve(|_: Shard| service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
}

fn main() {}
