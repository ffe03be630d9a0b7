//! A handler answers with a response.
//!
//! says: mismatched types
//! says: Response

use ringleader::{Request, Server, Shard, service_fn};

pub fn program() -> Server {
    Server::builder().serve(async |_: Shard| Ok(service_fn(async |_: Request| Ok("hello"))))
}

fn main() {}
