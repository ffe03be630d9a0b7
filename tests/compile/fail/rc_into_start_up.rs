//! What the start-up closure captures is shared by all executors.
//!
//! says: `Rc<String>` cannot be
//! says: between threads safely
//! says: required by this bound in `Builder::serve`

use ringleader::{Body, Request, Response, Server, Shard, service_fn};
use std::rc::Rc;

pub fn program() -> Server {
    let cache = Rc::new(String::new());
    Server::builder().serve(async move |_: Shard| {
        let cache = Rc::clone(&cache);
        Ok(service_fn(async move |_: Request| Ok(Response::new(Body::from(cache.to_string())))))
    })
}

fn main() {}
