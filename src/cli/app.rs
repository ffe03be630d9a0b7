//! The built-in application: a few endpoints to try a server with, to measure it and to break it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, header};
use http_body::{Body as _, Frame, SizeHint};
use ringleader::{Body, BodyError, BoxError, Files, Method, Request, Response, Service, Shard, StatusCode};

use super::{Failure, chaos};

/// What every executor's service is made from.
#[derive(Clone)]
pub(crate) struct App {
    root: Option<Arc<Root>>,
    chaos: bool,
    /// Where load balancers ask.
    ready_path: Option<String>,
}

/// The directory of `--root`. It is opened by its name once for all executors, and again when a reload says so: a name
/// that leads elsewhere meanwhile, or nowhere, makes no difference to an executor that starts afresh.
pub(crate) struct Root {
    path: PathBuf,
    listing: bool,
    opened: Mutex<Arc<Files>>,
    /// How often it has been opened.
    version: AtomicU64,
}

impl Root {
    fn open(path: &Path, listing: bool) -> Result<Arc<Files>, ringleader::FilesError> {
        Ok(Arc::new(Files::open(path)?.listing(listing)))
    }

    fn new(path: &Path, listing: bool) -> Result<Self, ringleader::FilesError> {
        let opened = Mutex::new(Self::open(path, listing)?);
        Ok(Self { path: path.to_owned(), listing, opened, version: AtomicU64::new(1) })
    }

    /// Opens what the name leads to by now, for requests that begin from here on; what came of it, in a sentence.
    pub(crate) fn reopen(&self) -> String {
        let path = self.path.display();
        match Self::open(&self.path, self.listing) {
            Ok(files) => {
                *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = files;
                self.version.fetch_add(1, Ordering::Release);
                let leads_to = self.path.canonicalize().ok().filter(|target| *target != self.path);
                let target = leads_to.map(|target| format!(", which is {}", target.display())).unwrap_or_default();
                format!("--root was opened anew: {path}{target}")
            }
            Err(error) => format!("--root stays the directory that it was: {error}"),
        }
    }

    /// For one executor: with a descriptor of its own, or if there is none, the one that all have in common.
    fn for_executor(&self) -> Arc<Files> {
        let opened = Arc::clone(&self.opened.lock().unwrap_or_else(PoisonError::into_inner));
        opened.try_clone().map(Arc::new).unwrap_or(opened)
    }
}

/// One executor's view of the root.
struct Served {
    root: Arc<Root>,
    version: Cell<u64>,
    files: RefCell<Arc<Files>>,
}

impl Served {
    fn new(root: &Arc<Root>) -> Self {
        let version = Cell::new(root.version.load(Ordering::Acquire));
        Self { version, files: RefCell::new(root.for_executor()), root: Arc::clone(root) }
    }

    /// What a request that begins now is answered from, to its end.
    fn files(&self, shard: &Shard) -> Arc<Files> {
        let version = self.root.version.load(Ordering::Acquire);
        if self.version.replace(version) != version {
            let old = self.files.replace(self.root.for_executor());
            // It may have to wait for its helper thread. If the pool has no room, it is dropped here.
            drop(shard.spawn_blocking(move || drop(old)));
        }
        Arc::clone(&self.files.borrow())
    }
}

/// One executor's service.
pub(crate) struct OnShard {
    served: Option<Served>,
    chaos: bool,
    ready_path: Option<String>,
    shard: Shard,
}

impl App {
    /// Opens `root`, so that a directory that cannot be served is known before anything starts.
    pub(crate) fn new(
        root: Option<&Path>,
        listing: bool,
        chaos: bool,
        ready_path: Option<String>,
    ) -> Result<Self, Failure> {
        let root = root.map(|path| Root::new(path, listing)).transpose();
        let root = root.map_err(|error| Failure::Usage(error.to_string()))?.map(Arc::new);
        // Below a directory there may be a file of this name.
        let ready_path = ready_path.or_else(|| root.is_none().then(|| READY.to_owned()));
        Ok(Self { root, chaos, ready_path })
    }

    /// What a reload opens anew.
    pub(crate) fn root(&self) -> Option<Arc<Root>> {
        self.root.clone()
    }

    /// The service of one executor.
    pub(crate) fn on(&self, shard: Shard) -> OnShard {
        let served = self.root.as_ref().map(Served::new);
        OnShard { served, chaos: self.chaos, ready_path: self.ready_path.clone(), shard }
    }
}

/// Where load balancers ask the built-in application.
const READY: &str = "/ready";
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

impl Service for OnShard {
    type Body = Body;

    async fn call(&self, request: Request) -> Result<Response, BoxError> {
        // Whatever the path: 200 would open a tunnel, and this is no proxy.
        if request.method() == Method::CONNECT {
            return Ok(refusal(StatusCode::NOT_IMPLEMENTED, "Not Implemented\n"));
        }
        if self.chaos && request.uri().path().starts_with("/chaos/") {
            return Box::pin(chaos::respond(&self.shard, &request)).await;
        }
        if self.ready_path.as_deref() == Some(request.uri().path()) {
            return Ok(self.ready());
        }
        match &self.served {
            // Boxed like the one above: a connection keeps room for the largest future its service makes.
            Some(served) => {
                let files = served.files(&self.shard);
                Ok(Box::pin(files.respond(&request)).await.map(Body::from))
            }
            None if request.uri().path() == "/echo" && expects_to_be_told(&request) => {
                Box::pin(echo_begun(request)).await
            }
            None if request.uri().path() == "/echo" => Ok(echo(request)),
            None => Ok(self.built_in(&request)),
        }
    }
}

impl OnShard {
    fn built_in(&self, request: &Request) -> Response {
        let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
        match request.uri().path() {
            "/" | "/json" | "/whoami" if !is_read => {
                let mut response = refusal(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed\n");
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
                response
            }
            "/" => answer(TEXT, "Hello, World!"),
            "/json" => answer(JSON, r#"{"message":"Hello, World!"}"#),
            "/whoami" => answer(JSON, self.whoami()),
            _ => refusal(StatusCode::NOT_FOUND, "Not Found\n"),
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
pub(crate) fn answer(content_type: HeaderValue, text: impl Into<Bytes>) -> Response {
    let mut response = Response::new(Body::from(text.into()));
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

fn refusal(status: StatusCode, text: &'static str) -> Response {
    let mut response = answer(TEXT, text);
    *response.status_mut() = status;
    response
}

/// Whether the client holds its body back until it is told to go on.
fn expects_to_be_told(request: &Request) -> bool {
    request.headers().contains_key(header::EXPECT)
}

/// [`echo`] that answers when the body has begun: hyper tells a client to go on (100) when its body is asked for, but not
/// after an answer has begun.
async fn echo_begun(request: Request) -> Result<Response, BoxError> {
    let (head, mut body) = request.into_parts();
    let first = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await.transpose()?;
    Ok(echo(Request::from_parts(head, Body::new(Begun { first, rest: body }))))
}

/// A body whose first frame has been taken from it.
struct Begun {
    first: Option<Frame<Bytes>>,
    rest: Body,
}

impl http_body::Body for Begun {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.first.take() {
            Some(first) => Poll::Ready(Some(Ok(first))),
            None => Pin::new(&mut self.rest).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let first = self.first.as_ref().and_then(Frame::data_ref).map_or(0, |data| data.len() as u64);
        match self.rest.size_hint().exact() {
            Some(rest) => SizeHint::with_exact(first + rest),
            None => SizeHint::default(),
        }
    }
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
