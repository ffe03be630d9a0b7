//! The handler of every rival that runs hyper.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE as CONTENT_TYPE_NAME, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

/// The answer's body.
pub const BODY: &str = "Hello, World!";
/// The answer's `content-type`.
pub const CONTENT_TYPE: &str = "text/plain; charset=utf-8";

/// `GET /` says hello, anything else is 404. hyper adds `content-length` and `date`, which gives the
/// same bytes in the same order as Ringleader's own hello.
///
/// # Errors
/// None.
pub async fn answer<B>(request: Request<B>) -> Result<Response<Full<Bytes>>, Infallible> {
    let known = request.method() == Method::GET && request.uri().path() == "/";
    let (status, body) = if known { (StatusCode::OK, BODY) } else { (StatusCode::NOT_FOUND, "Not Found\n") };
    let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
    *response.status_mut() = status;
    let content_type = HeaderValue::from_static(CONTENT_TYPE);
    response.headers_mut().insert(CONTENT_TYPE_NAME, content_type);
    Ok(response)
}

/// The same as an axum router: axum gives text the same `content-type`.
pub fn router() -> Router {
    Router::new().route("/", get(async || BODY))
}

/// The same as [`answer`], and `GET /chaos/spin?ms=N` computes for so long first, for comparisons of what a stalled executor costs.
///
/// # Errors
/// None.
pub async fn answer_or_spin<B>(request: Request<B>) -> Result<Response<Full<Bytes>>, Infallible> {
    let asked = request.uri().path() == "/chaos/spin";
    let milliseconds = request.uri().query().and_then(|query| query.strip_prefix("ms=")?.parse::<u64>().ok());
    match milliseconds {
        Some(milliseconds) if asked => {
            let until = Instant::now() + Duration::from_millis(milliseconds);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            Ok(Response::new(Full::new(Bytes::from_static(b"spun\n"))))
        }
        _ => answer(request).await,
    }
}
