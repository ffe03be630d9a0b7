//! How do I answer requests?
//!
//! ```sh
//! cargo run --example hello
//! curl -i http://127.0.0.1:8080/ -d 'anything'
//! ```

use ringleader::{Body, Error, Reject, Request, Response, Server, StatusCode, service_fn};

/// A body may be this long here; the server's own limit (`HttpLimits::body_bytes_max`) is 1 MiB.
const BODY_BYTES_MAX: usize = 1000;

fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let server = Server::builder().listen(address).stop_on_signals().serve(async |_| {
        Ok(service_fn(async |request: Request| {
            if request.uri().path() != "/" {
                return Err(Reject::new(StatusCode::NOT_FOUND, "there is nothing here").into());
            }
            // `?` is right on a body: one that is too long becomes a 413, one that breaks off a 400.
            let body = request.into_body().collect(BODY_BYTES_MAX).await?;
            Ok(Response::new(Body::from(format!("Hello, World! You sent {} bytes.\n", body.len()))))
        }))
    });
    // Blocks until SIGTERM or SIGINT has been obeyed.
    let exit = server.run()?;
    println!("every connection finished in time: {}", exit.drained);
    Ok(())
}
