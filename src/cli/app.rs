//! The built-in application: a few endpoints to try a server with, to measure it and to break it.

use std::path::Path;
use std::rc::Rc;

use http::{HeaderValue, header};
use ringleader::{Body, BoxError, Files, Request, Response, Service, Shard, StatusCode};

use super::{Failure, chaos};

/// What every executor's service is made from.
#[derive(Clone)]
pub(crate) struct App {
    root: Option<Root>,
    chaos: bool,
    /// Where load balancers ask.
    ready_path: Option<String>,
}

/// The directory of `--root`.
#[derive(Clone)]
struct Root {
    path: std::path::PathBuf,
    listing: bool,
}

impl Root {
    fn open(&self) -> Result<Files, ringleader::FilesError> {
        Ok(Files::open(&self.path)?.listing(self.listing))
    }
}

/// One executor's service.
pub(crate) struct OnShard {
    files: Option<Rc<Files>>,
    chaos: bool,
    ready_path: Option<String>,
    shard: Shard,
}

impl App {
    /// Opens `root` once, so that a directory that cannot be served is known before anything starts.
    pub(crate) fn new(
        root: Option<&Path>,
        listing: bool,
        chaos: bool,
        ready_path: Option<String>,
    ) -> Result<Self, Failure> {
        let root = root.map(|path| Root { path: path.to_owned(), listing });
        if let Some(root) = &root {
            root.open().map_err(|error| Failure::Usage(error.to_string()))?;
        }
        // Below a directory there may be a file of this name.
        let ready_path = ready_path.or_else(|| root.is_none().then(|| READY.to_owned()));
        Ok(Self { root, chaos, ready_path })
    }

    /// The service of one executor, with its own descriptor of the directory.
    pub(crate) fn on(&self, shard: Shard) -> Result<OnShard, BoxError> {
        let files = self.root.as_ref().map(Root::open).transpose()?.map(Rc::new);
        Ok(OnShard { files, chaos: self.chaos, ready_path: self.ready_path.clone(), shard })
    }
}

/// Where load balancers ask the built-in application.
const READY: &str = "/ready";
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

impl Service for OnShard {
    type Body = Body;

    async fn call(&self, request: Request) -> Result<Response, BoxError> {
        if self.chaos && request.uri().path().starts_with("/chaos/") {
            return Box::pin(chaos::respond(&self.shard, &request)).await;
        }
        if self.ready_path.as_deref() == Some(request.uri().path()) {
            return Ok(self.ready());
        }
        match &self.files {
            // Boxed like the one above: a connection keeps room for the largest future its service makes.
            Some(files) => Ok(Box::pin(files.respond(&request)).await.map(Body::from)),
            None => self.built_in(request),
        }
    }
}

impl OnShard {
    fn built_in(&self, request: Request) -> Result<Response, BoxError> {
        match request.uri().path() {
            "/" => Ok(answer(TEXT, "Hello, World!")),
            "/json" => Ok(answer(JSON, r#"{"message":"Hello, World!"}"#)),
            "/echo" => Ok(echo(request)),
            "/whoami" => Ok(answer(JSON, self.whoami())),
            _ => {
                let mut response = answer(TEXT, "Not Found\n");
                *response.status_mut() = StatusCode::NOT_FOUND;
                Ok(response)
            }
        }
    }

    /// For load balancers: 200 or 503.
    fn ready(&self) -> Response {
        let ready = self.shard.is_ready();
        let mut response = answer(TEXT, if ready { "ready" } else { "not ready" });
        if !ready {
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        }
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }

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
