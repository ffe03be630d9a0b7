//! `?` takes any error in the start-up closure, and types of arguments are inferred.

use ringleader::{Body, Response, Server, service_fn};
use std::sync::Arc;

pub fn program() -> Server {
    let name: Arc<str> = "x".into();
    Server::builder().executors(4).executors(2..=8).serve(move |_| {
        let name = name.clone();
        async move {
            let _: u8 = "1".parse()?;
            Ok(service_fn(move |_| {
                let name = name.clone();
                async move { Ok(Response::new(Body::from(name.to_string()))) }
            }))
        }
    })
}
