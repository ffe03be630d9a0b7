//! How do I keep work on the side from slowing requests down?
//!
//! A task queue of glommio's with few shares: what is spawned there gets a small part of the executor's time while requests
//! come, and all of it while none do. A panic there costs its task only.
//!
//! ```sh
//! cargo run --features glommio --example task_queues
//! curl http://127.0.0.1:8080/    # how far the work on the side has come
//! ```

use std::cell::Cell;
use std::rc::Rc;

use ringleader::{Body, Error, Request, Response, Server, Shard, glommio, service_fn};

fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let server = Server::builder().listen(address).stop_on_signals().serve(async |shard: Shard| {
        // Connections have 1000 shares together: at most a twenty-first part of the time is taken from them.
        let aside = shard.task_queue("primes", 50)?;
        let found = Rc::new(Cell::new(0_u64));
        let primes = Rc::clone(&found);
        drop(aside.spawn(async move {
            for candidate in 2_u64.. {
                let root = candidate.isqrt();
                primes.set(primes.get() + u64::from((2..=root).all(|divisor| candidate % divisor != 0)));
                // Between two of these nothing else runs on this executor: keep it short.
                if candidate % 64 == 0 {
                    glommio::executor().yield_task_queue_now().await;
                }
            }
        }));
        Ok(service_fn(async move |_: Request| {
            Ok(Response::new(Body::from(format!("{} primes so far\n", found.get()))))
        }))
    });
    server.run().map(drop)
}
