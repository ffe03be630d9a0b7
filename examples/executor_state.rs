//! Where does state go, and who shares it?
//!
//! Each executor has its own: it is made in the start-up closure, needs no `Arc` and no lock, and lives until that
//! executor is restarted. What must be one for the whole process is made outside and captured.
//!
//! ```sh
//! cargo run --example executor_state
//! for i in 1 2 3 4 5 6; do curl -s http://127.0.0.1:8080/; done
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ringleader::{Body, Error, Request, Response, Server, Shard, service_fn};

/// The whole process's: every executor writes to one cache line, which is what sharing costs.
static EVERYBODY: AtomicU64 = AtomicU64::new(0);

/// One executor's: neither `Send` nor `Sync`.
#[derive(Default)]
struct State {
    hits: Cell<u64>,
    paths: RefCell<BTreeMap<String, u64>>,
}

fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    // The whole process's, made outside: read by all.
    let started = Instant::now();
    let server = Server::builder().listen(address).executors(2).stop_on_signals();
    let server = server.serve(async move |shard: Shard| {
        let state = Rc::new(State::default());
        Ok(service_fn(async move |request: Request| {
            state.hits.set(state.hits.get() + 1);
            // Do not hold a borrow over an `.await`: other requests of this executor run meanwhile.
            *state.paths.borrow_mut().entry(request.uri().path().to_owned()).or_default() += 1;
            let text = format!(
                "executor {} (generation {}, CPU {}): {} of {} requests here in {:.0?}, by path {:?}\n",
                shard.id(),
                shard.generation(),
                shard.cpu(),
                state.hits.get(),
                EVERYBODY.fetch_add(1, Ordering::Relaxed) + 1,
                started.elapsed(),
                state.paths.borrow(),
            );
            Ok(Response::new(Body::from(text)))
        }))
    });
    server.run().map(drop)
}
