//! A tower service is cloned for each request.
//!
//! says: the trait bound `Once: Clone` is not satisfied
//! says: required by this bound in `tower`

use ringleader::{BoxError, Request, Response, Server, Shard};
use std::future::Ready;
use std::task::{Context, Poll};

struct Once;

impl tower_service::Service<Request> for Once {
    type Response = Response;
    type Error = BoxError;
    type Future = Ready<Result<Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        unimplemented!()
    }

    fn call(&mut self, _: Request) -> Self::Future {
        unimplemented!()
    }
}

pub fn program() -> Server {
    Server::builder().serve(async |_: Shard| Ok(ringleader::tower(Once)))
}

fn main() {}
