//! Closures that return async blocks, for those who cannot or will not write async closures.

use ringleader::{Body, Request, Response, Server, Shard, service_fn};
use std::cell::Cell;
use std::rc::Rc;

pub fn program() -> Server {
    Server::builder().serve(|_: Shard| async move {
        let hits = Rc::new(Cell::new(0));
        Ok(service_fn(move |_: Request| {
            let hits = hits.clone();
            async move {
                hits.set(hits.get() + 1);
                Ok(Response::new(Body::empty()))
            }
        }))
    })
}
