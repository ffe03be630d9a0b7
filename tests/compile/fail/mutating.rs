//! Requests are answered side by side: state is in a `Cell` or a `RefCell`.
//!
//! says: cannot borrow `count` as mutable

use ringleader::{Body, Request, Response, Server, Shard, service_fn};

pub fn program() -> Server {
    Server::builder().serve(async |_: Shard| {
        let mut count = 0;
        Ok(service_fn(async move |_: Request| {
            count += 1;
            Ok(Response::new(Body::from(count.to_string())))
        }))
    })
}

fn main() {}
