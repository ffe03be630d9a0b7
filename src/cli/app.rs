//! The built-in application: a few endpoints to try a server with, to measure it and to break it.

use std::path::Path;

use http::{HeaderValue, header};
use ringleader::{Body, BoxError, Request, Response, Service, Shard, StatusCode};

use super::{Failure, chaos};

/// What every executor's service is made from.
#[derive(Clone)]
pub(crate) struct App {
    chaos: bool,
}

/// One executor's service.
pub(crate) struct OnShard {
    app: App,
    shard: Shard,
}

impl App {
    pub(crate) fn new(_root: Option<&Path>, _listing: bool, chaos: bool) -> Result<Self, Failure> {
        Ok(Self { chaos })
    }

    pub(crate) fn on(self, shard: Shard) -> OnShard {
        OnShard { app: self, shard }
    }
}

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

impl Service for OnShard {
    type Body = Body;

    async fn call(&self, request: Request) -> Result<Response, BoxError> {
        match request.uri().path() {
            "/" => Ok(answer(TEXT, "Hello, World!")),
            "/json" => Ok(answer(JSON, r#"{"message":"Hello, World!"}"#)),
            "/echo" => Ok(echo(request)),
            "/whoami" => Ok(answer(JSON, self.whoami())),
            path if self.app.chaos && path.starts_with("/chaos/") => chaos::respond(&self.shard, &request).await,
            _ => {
                let mut response = answer(TEXT, "Not Found\n");
                *response.status_mut() = StatusCode::NOT_FOUND;
                Ok(response)
            }
        }
    }
}

impl OnShard {
    fn whoami(&self) -> String {
        let stats = self.shard.stats();
        format!(
            r#"{{"executor":{},"generation":{},"cpu":{},"pid":{},"connections":{},"requests":{}}}"#,
            self.shard.id(),
            self.shard.generation(),
            self.shard.cpu(),
            std::process::id(),
            stats.open,
            stats.requests,
        )
    }
}

/// A body of text with its type.
pub(crate) fn answer(content_type: HeaderValue, text: impl Into<bytes::Bytes>) -> Response {
    let mut response = Response::new(Body::from(text.into()));
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

/// Streams the request's body back, with its type.
fn echo(request: Request) -> Response {
    let (head, body) = request.into_parts();
    let mut response = Response::new(body);
    if let Some(content_type) = head.headers.get(header::CONTENT_TYPE) {
        response.headers_mut().insert(header::CONTENT_TYPE, content_type.clone());
    }
    response
}
