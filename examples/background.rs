//! How do I run something beside the requests, on each executor?
//!
//! `background` for what the executor cannot do without: when it fails, the executor is restarted. `spawn` for a piece of
//! work of its own: a panic in it is its owner's to look at. Both end with the executor's generation.
//!
//! ```sh
//! cargo run --example background
//! curl http://127.0.0.1:8080/
//! ```

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use ringleader::{Body, Error, Request, Response, Server, Shard, service_fn};

fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let server = Server::builder().listen(address).stop_on_signals().serve(async |shard: Shard| {
        let ticks = Rc::new(Cell::new(0_u64));
        let (ticking, clock) = (Rc::clone(&ticks), shard.clone());
        shard.background("ticks", async move {
            loop {
                clock.sleep(Duration::from_millis(100)).await;
                ticking.set(ticking.get() + 1);
            }
        });
        Ok(service_fn(async move |_: Request| {
            let timer = shard.clone();
            let work = shard.spawn(async move {
                timer.sleep(Duration::from_millis(20)).await;
                21 * 2
            });
            let text = match shard.timeout(Duration::from_secs(1), work).await {
                Ok(Ok(answer)) => format!("{answer}, after {} ticks of this executor\n", ticks.get()),
                Ok(Err(panicked)) => format!("{panicked}\n"),
                Err(elapsed) => format!("{elapsed}\n"),
            };
            Ok(Response::new(Body::from(text)))
        }))
    });
    server.run().map(drop)
}
