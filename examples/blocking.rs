//! How do I call what blocks, or compute for long?
//!
//! On an executor it would hold up every connection of it. `spawn_blocking` takes it to a thread of a bounded pool; when
//! that is full, the error's answer is 503.
//!
//! ```sh
//! cargo run --example blocking
//! curl http://127.0.0.1:8080/name                # a name server is asked
//! curl http://127.0.0.1:8080/primes              # arithmetic
//! ```

use std::net::ToSocketAddrs;

use ringleader::{Body, Error, Reject, Request, Response, Server, Shard, StatusCode, service_fn};

/// Up to here, by the slow method.
const PRIMES_BELOW: u64 = 100_000;

fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let server = Server::builder()
        .listen(address)
        // 8 run, 32 wait, the next is refused at once.
        .blocking_threads_max(8)
        .blocking_queue_max(32)
        .stop_on_signals()
        .serve(async |shard: Shard| {
            Ok(service_fn(async move |request: Request| {
                let text = match request.uri().path() {
                    // Two errors are possible: the closure's own, and that it did not run to its end.
                    "/name" => shard.spawn_blocking(look_up).await??,
                    "/primes" => shard.spawn_blocking(count_primes).await?,
                    _ => return Err(Reject::new(StatusCode::NOT_FOUND, "try /name or /primes").into()),
                };
                Ok(Response::new(Body::from(text)))
            }))
        });
    server.run().map(drop)
}

fn look_up() -> std::io::Result<String> {
    let addresses: Vec<_> = ("localhost", 80).to_socket_addrs()?.collect();
    Ok(format!("localhost is {addresses:?}\n"))
}

fn count_primes() -> String {
    let is_prime = |number: &u64| {
        (2..*number).take_while(|divisor| divisor * divisor <= *number).all(|divisor| !number.is_multiple_of(divisor))
    };
    format!("{} primes are below {PRIMES_BELOW}\n", (2..PRIMES_BELOW).filter(is_prime).count())
}
