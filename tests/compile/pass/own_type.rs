//! The trait by hand.

use ringleader::{Body, BoxError, Request, Response, Server, Service, Shard};
use std::cell::Cell;

struct Application(Cell<u8>);

impl Service for Application {
    type Body = Body;

    async fn call(&self, _: Request) -> Result<Response, BoxError> {
        self.0.set(1);
        Ok(Response::new(Body::empty()))
    }
}

pub fn program() -> Server {
    Server::builder().serve(async |_: Shard| Ok(Application(Cell::new(0))))
}
