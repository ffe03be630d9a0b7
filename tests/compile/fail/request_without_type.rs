//! The request of an async closure is named, if its fields are used and the closure is not written where it is passed.
//!
//! says: type annotations needed

use ringleader::{Body, Response, Server, service_fn};

pub fn program() -> Server {
    Server::builder().serve(async |_| {
        let service = async |request| {
            drop(request.uri().path().to_owned());
            Ok(Response::new(Body::empty()))
        };
        Ok(service_fn(service))
    })
}

fn main() {}
