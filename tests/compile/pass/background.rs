//! Work beside the requests, on state that is sharded.

use ringleader::{Body, BoxError, Response, Server, Stop, service_fn, test};
use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Duration;

pub fn main() -> Result<(), BoxError> {
    let mut builder = Server::builder().listen("127.0.0.1:0").executors(1);
    let maps = builder.sharded("maps", async |_| Ok(RefCell::new(HashMap::<String, u64>::from([("old".into(), 1)]))));
    let server = builder.serve(async move |shard| {
        let map = maps.local(&shard);
        let (timers, swept) = (shard.clone(), map.clone());
        shard.background("sweep", async move {
            loop {
                swept.borrow_mut().clear();
                timers.sleep(Duration::from_secs(1)).await;
            }
        });
        Ok(service_fn(async move |_| {
            while !map.borrow().is_empty() {
                shard.sleep(Duration::from_millis(1)).await;
            }
            let number = shard.spawn_blocking(|| 7).await?;
            Ok(Response::new(Body::from(format!("{number} {}", map.borrow().len()))))
        }))
    });
    let running = server.start().wait()?;
    assert_eq!(test::get(running.local_addrs()[0], "/")?.body(), "7 0");
    running.stop(Stop::Now).wait()?;
    Ok(())
}
