//! How do I test what I built on this?
//!
//! The start-up closure is a function, so that tests can run it as `main` does. `cargo test --example testing` runs the
//! tests below; in your crate they are in `src` or `tests`, as always.
//!
//! ```sh
//! cargo test --example testing
//! ```

use std::cell::Cell;

use ringleader::{Body, BoxError, Error, Reject, Request, Response, Server, Service, Shard, StatusCode, service_fn};

fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    Server::builder().listen(address).stop_on_signals().serve(start_up).run().map(drop)
}

/// Counts in the body's length; `/total` says how much there was on this executor.
async fn start_up(_: Shard) -> Result<impl Service, BoxError> {
    let total = Cell::new(0);
    Ok(service_fn(async move |request: Request| match request.uri().path() {
        "/total" => Ok(Response::new(Body::from(total.get().to_string()))),
        "/add" => {
            total.set(total.get() + request.into_body().collect(1000).await?.len());
            Ok(Response::new(Body::empty()))
        }
        _ => Err(Reject::new(StatusCode::NOT_FOUND, "there is /add and /total").into()),
    }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ringleader::test::{self, App, Provocation, provoke, wait_until};
    use ringleader::{ExecutorState, Stop};

    use super::*;

    fn add(text: &'static str) -> Request {
        Request::post("/add").body(Body::from(text)).expect("it is a path")
    }

    #[test]
    fn lengths_are_added_up() {
        let app = App::start(start_up).expect("it starts");
        app.call(add("123")).expect("it is short enough");
        app.call(add("45")).expect("it is short enough");
        assert_eq!(app.get("/total").expect("it is there").body(), "5");
    }

    #[test]
    fn an_error_is_the_services_own() {
        let app = App::start(start_up).expect("it starts");
        let error = app.get("/nowhere").expect_err("there is nothing");
        assert_eq!(error.downcast_ref::<Reject>().expect("it is refused").status(), StatusCode::NOT_FOUND);
    }

    #[test]
    fn clients_see_statuses() {
        let server = Server::builder().listen("127.0.0.1:0").executors(1).serve(start_up);
        let running = server.start().wait().expect("it starts");
        let address = running.local_addrs()[0];
        assert_eq!(test::get(address, "/total").expect("it answers").body(), "0");
        let long = Request::post("/add").body("x".repeat(1001)).expect("it is a path");
        assert_eq!(test::send(address, long).expect("it answers").status(), StatusCode::PAYLOAD_TOO_LARGE);
        assert!(running.stop(Stop::Drain(Duration::from_secs(5))).wait().expect("it stops").drained);
    }

    #[test]
    fn the_total_begins_anew_after_a_panic_that_escapes() {
        let app = App::start(start_up).expect("it starts");
        app.call(add("123")).expect("it is short enough");
        provoke(&app, 0, Provocation::Panic).wait().expect("the executor serves");
        wait_until(&app, |stats| {
            let executor = &stats.executors[0];
            executor.generation == 2 && executor.state == ExecutorState::Serving
        });
        assert_eq!(app.get("/total").expect("it is there").body(), "0");
    }
}
