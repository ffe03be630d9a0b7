//! Services of hyper's, of tower's, and an axum router.

use axum::{Router, routing::get};
use ringleader::test::{self, App};
use ringleader::{Body, BoxError, Request, Response, Server, Service, Shard, Stop};
use std::convert::Infallible;
use std::rc::Rc;

/// Neither `Send` nor `'static` by accident: the adapters ask for no more than the trait does.
fn hyper() -> Server {
    Server::builder().listen("127.0.0.1:0").executors(1).serve(async |_| {
        let name = Rc::new("hyper");
        Ok(ringleader::hyper(hyper::service::service_fn(move |_: Request| {
            let name = Rc::clone(&name);
            async move { Ok::<_, Infallible>(Response::new(Body::from(*name))) }
        })))
    })
}

fn router() -> Router {
    Router::new().route("/", get(async || "axum"))
}

async fn axum(_: Shard) -> Result<impl Service, BoxError> {
    Ok(ringleader::axum(router()))
}

/// As any other tower service.
async fn router_as_tower(_: Shard) -> Result<impl Service, BoxError> {
    Ok(ringleader::tower(router()))
}

/// A part of what another service answers.
async fn router_inside(_: Shard) -> Result<impl Service, BoxError> {
    let router = ringleader::axum(router());
    Ok(ringleader::service_fn(async move |request: Request| {
        if request.uri().path() == "/ours" {
            return Ok(Response::new(Body::from("ours")));
        }
        Ok(router.call(request).await?.map(Body::new))
    }))
}

pub fn main() -> Result<(), BoxError> {
    let running = hyper().start().wait()?;
    assert_eq!(test::get(running.local_addrs()[0], "/")?.body(), "hyper");
    running.stop(Stop::Now).wait()?;

    assert_eq!(App::start(axum)?.get("/")?.body(), "axum");
    assert_eq!(App::start(router_as_tower)?.get("/")?.body(), "axum");
    let both = App::start(router_inside)?;
    assert_eq!((both.get("/ours")?.body(), both.get("/")?.body()), (&"ours".into(), &"axum".into()));
    Ok(())
}
