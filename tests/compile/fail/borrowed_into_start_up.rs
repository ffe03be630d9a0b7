//! The start-up closure outlives the function that gives it.
//!
//! says: `name` does not live long enough
//! says: argument requires that `name` is borrowed for `'static`

use ringleader::{Body, Request, Response, Server, Shard, service_fn};

pub fn program() -> Server {
    let name = String::new();
    Server::builder().serve(async |_: Shard| {
        drop(name.clone());
        Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
    })
}

fn main() {}
