//! Work beside the requests, on state that is sharded.

use ringleader::{Body, Error, Response, Server, Stop, service_fn};
use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Duration;

pub fn program() -> Result<(), Error> {
    let mut builder = Server::builder();
    let maps = builder.sharded("maps", async |_| Ok(RefCell::new(HashMap::<String, u64>::new())));
    let server = builder.serve(async move |shard| {
        let map = maps.local(&shard);
        let (timers, swept) = (shard.clone(), map.clone());
        shard.background("sweep", async move {
            loop {
                timers.sleep(Duration::from_secs(1)).await;
                swept.borrow_mut().clear();
            }
        });
        Ok(service_fn(async move |_| {
            let number = shard.spawn_blocking(|| 7).await?;
            Ok(Response::new(Body::from(format!("{number} {}", map.borrow().len()))))
        }))
    });
    let running = server.start().wait()?;
    running.stop(Stop::Now).wait()?;
    Ok(())
}
