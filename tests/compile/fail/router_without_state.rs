//! A router whose state has not been given is no service yet.
//!
//! says: mismatched types
//! says: Router<State>

use axum::{Router, extract, routing::get};

#[derive(Clone)]
pub struct State;

async fn answer(_: extract::State<State>) {}

pub fn program() -> ringleader::Axum {
    let router: Router<State> = Router::new().route("/", get(answer));
    ringleader::axum(router)
}

fn main() {}
