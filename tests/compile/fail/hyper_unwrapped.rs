//! A hyper service goes through an adapter.
//!
//! says: is not a ringleader service
//! says: a hyper service in `ringleader::hyper`

use ringleader::{Body, Request, Response, Server, Shard};
use std::convert::Infallible;

pub fn program() -> Server {
    Server::builder().serve(async |_: Shard| {
        Ok(hyper::service::service_fn(async |_: Request| Ok::<_, Infallible>(Response::new(Body::empty()))))
    })
}

fn main() {}
