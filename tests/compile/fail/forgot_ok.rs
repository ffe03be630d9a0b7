//! The start-up closure may fail, so it returns a result.
//!
//! says: mismatched types
//! says: Result<_, Box<dyn

use ringleader::{Body, Request, Response, Server, Shard, service_fn};

pub fn program() -> Server {
    Server::builder().serve(async |_: Shard| service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
}

fn main() {}
