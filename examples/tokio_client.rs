//! How do I use what needs tokio, such as a database driver or an HTTP client, in a handler?
//!
//! `Builder::tokio` is given a runtime. The client's connections, timers and tasks live on that runtime's threads; a handler
//! awaits it from its executor. Here it is hyper's client, as reqwest uses it, with one pool for all executors: each request
//! is passed on to a second server, and its answer back, both as they come. A pool of sqlx's is used in the same way.
//!
//! ```sh
//! cargo run --example tokio_client --features tokio
//! curl http://127.0.0.1:8080/hello
//! curl --data-binary @Cargo.lock http://127.0.0.1:8080/ | diff - Cargo.lock && echo the same
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use ringleader::{
    Body, BoxError, Method, Reject, Request, Response, Running, Server, Shard, StatusCode, Stop, service_fn,
};

/// `Clone`, `Send` and `Sync`: it is made once, outside, and every executor's start-up closure clones it.
type HttpClient = Client<HttpConnector, Body>;

fn main() -> Result<(), BoxError> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let upstream = start_upstream()?;
    let upstream_address = upstream.local_addrs()[0];
    let client: HttpClient = Client::builder(TokioExecutor::new()).build_http();
    let server = Server::builder().name("front").listen(address).tokio(runtime.handle().clone()).stop_on_signals();
    let server = server.serve(async move |shard: Shard| {
        let client = client.clone();
        Ok(service_fn(async move |request: Request| pass_on(&shard, &client, upstream_address, request).await))
    });
    server.run()?;
    upstream.stop(Stop::Now).wait()?;
    Ok(())
}

async fn pass_on(
    shard: &Shard,
    client: &HttpClient,
    upstream: SocketAddr,
    request: Request,
) -> Result<Response, BoxError> {
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let mut passed = Request::builder().method(request.method()).uri(format!("http://{upstream}{path}"));
    if let Some(length) = request.headers().get("content-length") {
        passed = passed.header("content-length", length);
    }
    let passed = passed.body(request.into_body())?;
    // Either clock will do: this is the executor's, and `tokio::time::timeout` would be the runtime's.
    let answer = shard.timeout(Duration::from_secs(5), client.request(passed)).await;
    let answer = answer.map_err(|_| Reject::new(StatusCode::GATEWAY_TIMEOUT, "the upstream does not answer"))?;
    let answer = answer.map_err(|error| Reject::new(StatusCode::BAD_GATEWAY, error))?;
    let mut response = Response::builder().status(answer.status()).header("x-executor", shard.id().index());
    if let Some(kind) = answer.headers().get("content-type") {
        response = response.header("content-type", kind);
    }
    Ok(response.body(Body::new(answer.into_body()))?)
}

/// Somebody else's server, which knows nothing of tokio.
fn start_upstream() -> Result<Running, BoxError> {
    let server = Server::builder().name("upstream").listen("127.0.0.1:0").executors(1).serve(async |_| {
        Ok(service_fn(async |request: Request| {
            if request.method() == Method::GET {
                let text = format!("upstream was asked for {}\n", request.uri().path());
                return Ok(Response::builder().header("content-type", "text/plain").body(Body::from(text))?);
            }
            Ok(Response::new(request.into_body()))
        }))
    });
    Ok(server.start().wait()?)
}
