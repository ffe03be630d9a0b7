//! Services of others: hyper's and tower's.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use ringleader::{Body, BoxError, Reject, Request, Response, Server, StatusCode};
use tower::{ServiceBuilder, ServiceExt};

use crate::support::{Gate, Site, eventually, local};

/// A tower service that is ready at the third look, and knows whether it has been asked.
struct Shy {
    looks: u32,
    /// Counted over all clones.
    waits: Rc<Cell<u32>>,
}

impl Clone for Shy {
    /// A clone is not ready because its original was.
    fn clone(&self) -> Self {
        Self { looks: 0, waits: Rc::clone(&self.waits) }
    }
}

impl tower::Service<Request> for Shy {
    type Response = Response;
    type Error = BoxError;
    type Future = Ready<Result<Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.looks += 1;
        if self.looks < 3 {
            self.waits.set(self.waits.get() + 1);
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request) -> Self::Future {
        assert_eq!(self.looks, 3, "the one that was ready is the one that is called");
        ready(Ok(Response::new(Body::from(self.waits.get().to_string()))))
    }
}

fn serving_shy() -> Server {
    local(1).serve(async |_| Ok(ringleader::tower(Shy { looks: 0, waits: Rc::default() })))
}

#[test]
fn a_hyper_service_answers_with_its_own_body_and_state_that_is_not_send() {
    let site = Site::start(local(1).serve(async |_| {
        let hits = Rc::new(Cell::new(0));
        Ok(ringleader::hyper(hyper::service::service_fn(move |request: Request| {
            hits.set(hits.get() + 1);
            let hits = Rc::clone(&hits);
            async move {
                let bytes = request.into_body().collect(1024).await?;
                let text = format!("{}: {}", hits.get(), String::from_utf8_lossy(&bytes));
                Ok::<_, BoxError>(Response::new(text))
            }
        })))
    }));
    let mut client = site.connect();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 3\r\n\r\nabc");
    assert_eq!(client.answer().text(), "1: abc");
    assert_eq!(client.get("/").text(), "2: ");
}

#[test]
fn an_error_of_a_hyper_service_has_its_status() {
    let site = Site::start(local(1).serve(async |_| {
        Ok(ringleader::hyper(hyper::service::service_fn(async |_: Request| {
            Err::<Response, _>(Reject::new(StatusCode::NOT_FOUND, "no such thing"))
        })))
    }));
    let answer = site.connect().get("/");
    assert_eq!((answer.status, answer.text()), (404, "no such thing\n"));
}

#[test]
fn a_tower_service_that_is_not_ready_is_waited_for_and_then_called_itself() {
    let site = Site::start(serving_shy());
    let mut client = site.connect();
    assert_eq!(client.get("/").text(), "2");
    assert_eq!(client.get("/").text(), "4");
}

#[test]
fn a_limit_of_concurrency_holds_requests_back_until_there_is_room() {
    let (gate, calls) = (Gate::shut(), Arc::new(AtomicUsize::new(0)));
    let (pass, count) = (gate.clone(), Arc::clone(&calls));
    let site = Site::start(local(1).serve(async move |_| {
        let (pass, count) = (pass.clone(), Arc::clone(&count));
        let answer = tower::service_fn(move |_: Request| {
            let before = count.fetch_add(1, Ordering::Relaxed);
            let pass = pass.clone();
            async move {
                pass.passed().await;
                Ok::<_, Infallible>(Response::new(Body::from(before.to_string())))
            }
        });
        let layers = ServiceBuilder::new().map_response(named).concurrency_limit(1);
        Ok(ringleader::tower(layers.service(answer)))
    }));
    let (mut first, mut second) = (site.connect(), site.connect());
    first.ask("/");
    eventually("the first is being answered", || calls.load(Ordering::Relaxed) == 1);
    second.ask("/");
    eventually("both have arrived", || site.stats().executors[0].in_flight == 2);
    assert_eq!(calls.load(Ordering::Relaxed), 1, "the layer has room for one");
    gate.open();
    let answers = [first.answer(), second.answer()];
    assert_eq!(answers.each_ref().map(|answer| answer.text()), ["0", "1"]);
    assert!(answers.iter().all(|answer| answer.header("x-layer") == Some("passed")));
}

fn named(mut response: Response) -> Response {
    response.headers_mut().insert("x-layer", http::HeaderValue::from_static("passed"));
    response
}

#[test]
fn an_error_of_readiness_is_answered_as_one_of_the_call() {
    #[derive(Clone)]
    struct Closed;
    impl tower::Service<Request> for Closed {
        type Response = Response;
        type Error = Reject;
        type Future = Ready<Result<Response, Reject>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Reject>> {
            Poll::Ready(Err(Reject::new(StatusCode::SERVICE_UNAVAILABLE, "closed")))
        }
        fn call(&mut self, _: Request) -> Self::Future {
            unreachable!("it was never ready")
        }
    }
    let site = Site::start(local(1).serve(async |_| Ok(ringleader::tower(Closed.map_response(named)))));
    let answer = site.connect().get("/");
    assert_eq!((answer.status, answer.text()), (503, "closed\n"));
}

#[test]
fn an_answer_that_switches_protocols_is_refused_and_the_connection_goes_on() {
    let site = Site::serving(async |request: Request| {
        if request.uri().path() == "/reject" {
            return Err(Reject::new(StatusCode::SWITCHING_PROTOCOLS, "not so").into());
        }
        if request.uri().path() == "/hints" {
            return Err(Reject::new(StatusCode::from_u16(103)?, "nor so").into());
        }
        let status = if request.uri().path() == "/" { 200 } else { 101 };
        let status = StatusCode::from_u16(status)?;
        Ok(http::Response::builder().status(status).header("upgrade", "test").body(Body::empty())?)
    });
    let mut client = site.connect();
    client.send("GET /up HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: test\r\n\r\n");
    let answer = client.answer();
    assert_eq!((answer.status, answer.header("upgrade")), (501, None));
    assert_eq!(client.get("/up").status, 501);
    assert_eq!(client.get("/reject").status, 501);
    assert_eq!(client.get("/hints").status, 500);
    assert_eq!(client.get("/").status, 200);
}

#[test]
fn a_call_of_tokios_without_its_runtime_names_the_option_that_helps() {
    let site = Site::start(local(1).serve(async |shard: ringleader::Shard| {
        Ok(ringleader::service_fn(async move |request: Request| {
            if request.uri().path() == "/handler" {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            let task = shard.spawn(async { drop(tokio::spawn(async {})) });
            let error = task.await.expect_err("there is no runtime");
            Ok(Response::new(Body::from(error.to_string())))
        }))
    }));
    let answer = site.connect().get("/task");
    assert!(answer.text().contains("`Builder::tokio`, feature `tokio`"), "{}", answer.text());
    assert_eq!(site.connect().get("/handler").status, 500);
    assert_eq!(site.stats().executors[0].panics_contained, 2);
}
