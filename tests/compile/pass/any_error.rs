//! `?` takes any error in the start-up closure, and types of arguments are inferred.

use ringleader::{Body, BoxError, Response, Server, Stop, service_fn, test};
use std::sync::Arc;

fn program(number: &str) -> Server {
    let name: Arc<str> = number.into();
    Server::builder().listen("127.0.0.1:0").executors(4).executors(1..=2).serve(move |_| {
        let name = name.clone();
        async move {
            let _: u8 = name.parse()?;
            Ok(service_fn(move |_| {
                let name = name.clone();
                async move { Ok(Response::new(Body::from(name.to_string()))) }
            }))
        }
    })
}

pub fn main() -> Result<(), BoxError> {
    let running = program("1").start().wait()?;
    assert_eq!(test::get(running.local_addrs()[0], "/")?.body(), "1");
    running.stop(Stop::Now).wait()?;

    let refused = program("one").start().wait().expect_err("it is no number");
    assert!(refused.to_string().contains("invalid digit"), "{refused}");
    Ok(())
}
