//! Services of hyper's, of tower's, and an axum router.

use axum::{Router, routing::get};
use ringleader::{Body, Request, Response, Server, Service};
use std::convert::Infallible;
use std::rc::Rc;

/// Neither `Send` nor `'static` by accident: the adapters ask for no more than the trait does.
pub fn hyper() -> Server {
    Server::builder().serve(async |_| {
        let name = Rc::new("hyper");
        Ok(ringleader::hyper(hyper::service::service_fn(move |_: Request| {
            let name = Rc::clone(&name);
            async move { Ok::<_, Infallible>(Response::new(Body::from(*name))) }
        })))
    })
}

pub fn router() -> Server {
    Server::builder().serve(async |_| Ok(ringleader::axum(Router::new().route("/", get(async || "axum")))))
}

/// As any other tower service.
pub fn router_as_tower() -> Server {
    Server::builder().serve(async |_| Ok(ringleader::tower(Router::new())))
}

/// A part of what another service answers.
pub fn router_inside() -> Server {
    Server::builder().serve(async |_| {
        let router = ringleader::axum(Router::new());
        Ok(ringleader::service_fn(async move |request: Request| {
            if request.uri().path() == "/" {
                return Ok(Response::new(Body::from("ours")));
            }
            Ok(router.call(request).await?.map(Body::new))
        }))
    })
}
