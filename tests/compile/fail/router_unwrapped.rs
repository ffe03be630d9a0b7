//! An axum router goes through an adapter.
//!
//! says: is not a ringleader service
//! says: an axum `Router` in `ringleader::axum` (feature `axum`)

use ringleader::{Server, Shard};

pub fn program() -> Server {
    Server::builder().serve(async |_: Shard| Ok(axum::Router::new()))
}

fn main() {}
