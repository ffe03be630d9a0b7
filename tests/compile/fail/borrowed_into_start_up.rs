//! The start-up closure outlives the function that gives it.
//!
//! says: closure may outlive the current function, but it borrows `name`
//! says: to force the closure to take ownership of `name`

use ringleader::{Body, Request, Response, Server, Shard, service_fn};

pub fn program() -> Server {
    let name = String::new();
    Server::builder().serve(async |_: Shard| {
        drop(name.clone());
        Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
    })
}
