//! A router whose state has not been given, where nothing says which state that is.
//!
//! says: mismatched types
//! says: Router

use axum::{Router, extract, routing::get};

#[derive(Clone)]
pub struct State;

async fn answer(_: extract::State<State>) {}

pub fn program() -> ringleader::Axum {
    let router = Router::new().route("/", get(answer));
    ringleader::axum(router)
}

fn main() {}
