//! How do I change the number of executors, and see what they do?
//!
//! `executors(1..=4)` starts one, and adds one while they are busy for more than 70 % of the time. An order counts for a
//! minute; then the number follows the load again. No connection is lost by either.
//!
//! ```sh
//! cargo run --example scaling
//! curl http://127.0.0.1:8080/             # the executors, one a line
//! curl http://127.0.0.1:8080/scale/3
//! ```

use std::fmt::Write;
use std::sync::OnceLock;

use ringleader::{Body, Error, Handle, Reject, Request, Response, Scaling, Server, StatusCode, service_fn};

/// There is a handle once the server has started, which is after the start-up closures have run.
static HANDLE: OnceLock<Handle> = OnceLock::new();

fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let mut scaling = Scaling::default();
    // Samples, one a second, of little to do until one goes.
    scaling.down_after = 10;
    let builder = Server::builder().listen(address).executors(1..=4).scaling(scaling).stop_on_signals();
    let running = builder.serve(async |_| Ok(service_fn(answer))).start().wait()?;
    HANDLE.get_or_init(|| running.handle());
    running.join().wait().map(drop)
}

async fn answer(request: Request) -> Result<Response, ringleader::BoxError> {
    let handle = HANDLE.get().ok_or_else(|| Reject::new(StatusCode::SERVICE_UNAVAILABLE, "starting"))?;
    if let Some(count) = request.uri().path().strip_prefix("/scale/") {
        // Refused if it is no number from 1 to 4: the error says why.
        let order = handle.scale(count.parse().unwrap_or(0));
        order.await.map_err(|refused| Reject::new(StatusCode::BAD_REQUEST, refused))?;
    }
    let mut text = String::new();
    for executor in handle.stats().executors {
        let (slot, state, requests, busy) = (executor.slot, executor.state, executor.requests, executor.busy);
        writeln!(text, "executor {slot}: {state:?}, {requests} requests, {} open, busy for {busy:.1?}", executor.open)?;
    }
    Ok(Response::new(Body::from(text)))
}
