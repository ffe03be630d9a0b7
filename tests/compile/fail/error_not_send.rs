//! Errors leave their executor: they are reported by the supervisor.
//!
//! says: `?` couldn't convert the error
//! says: dyn std::error::Error

use ringleader::{Body, Request, Response, Server, Shard, service_fn};

fn configuration() -> Result<u8, Box<dyn std::error::Error>> {
    Ok(1)
}

pub fn program() -> Server {
    Server::builder().serve(async |_: Shard| {
        configuration()?;
        Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
    })
}

fn main() {}
