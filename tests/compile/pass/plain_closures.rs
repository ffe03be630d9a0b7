//! Closures that return async blocks, for those who cannot or will not write async closures.

use ringleader::{Body, BoxError, Request, Response, Server, Shard, Stop, service_fn, test};
use std::cell::Cell;
use std::rc::Rc;

fn program() -> Server {
    Server::builder().listen("127.0.0.1:0").executors(1).serve(|_: Shard| async move {
        let hits = Rc::new(Cell::new(0));
        Ok(service_fn(move |_: Request| {
            let hits = hits.clone();
            async move {
                hits.set(hits.get() + 1);
                Ok(Response::new(Body::from(hits.get().to_string())))
            }
        }))
    })
}

pub fn main() -> Result<(), BoxError> {
    let running = program().start().wait()?;
    let address = running.local_addrs()[0];
    test::get(address, "/")?;
    assert_eq!(test::get(address, "/")?.body(), "2");
    running.stop(Stop::Now).wait()?;
    Ok(())
}
