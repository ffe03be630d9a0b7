//! A text is no service.
//!
//! says: `&str` is not a ringleader service
//! says: the start-up closure returned this as the executor's service
//! says: wrap an async closure in `ringleader::service_fn`
//! says: a service lives on one executor: it need be neither `Send` nor `Clone`

use ringleader::{Server, Shard};

pub fn program() -> Server {
    Server::builder().serve(async |_: Shard| Ok("hello"))
}

fn main() {}
