//! What does a panic cost, and how do I change that?
//!
//! By default its connection. This program wants to know sooner that something is wrong: with the third contained panic
//! within a minute the executor is restarted, with fresh state. (`PanicPolicy::Restart` would restart it with the first.)
//!
//! ```sh
//! cargo run --example panics
//! curl -i http://127.0.0.1:8080/panic     # 500; at the third time the generation is another one
//! curl http://127.0.0.1:8080/
//! ```

use std::time::Duration;

use ringleader::{
    Body, Error, Escalation, PanicPolicy, Request, Response, RestartPolicy, Server, Shard, install_panic_hook,
    service_fn,
};

fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    // Each panic once in the log, with executor and place. The library never replaces the hook by itself.
    install_panic_hook();
    let mut restart = RestartPolicy::default();
    // Restarted as often as it takes; the pauses grow to two seconds. By default the fifth failure in 30 s is the last.
    restart.quarantine_after = 0;
    restart.backoff_max = Duration::from_secs(2);
    let server = Server::builder()
        .listen(address)
        .executors(1)
        .panics(PanicPolicy::Contain)
        .escalation(Escalation::after(2, Duration::from_secs(60)))
        .restart(restart)
        .stop_on_signals()
        .serve(async |shard: Shard| {
            Ok(service_fn(async move |request: Request| {
                assert!(request.uri().path() != "/panic", "somebody asked for a panic");
                let (generation, contained) = (shard.generation(), shard.stats().panics_contained);
                Ok(Response::new(Body::from(format!("generation {generation}, {contained} panics contained\n"))))
            }))
        });
    server.run().map(drop)
}
