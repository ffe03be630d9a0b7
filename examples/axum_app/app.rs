//! A seed library: packets of seeds are put in, looked up and taken out of by JSON. An application for axum and tokio as one
//! writes it for axum's own server; nothing in it knows what serves it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock, Weak};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::JsonRejection;
use axum::extract::{
    ConnectInfo, Form, FromRef, FromRequest, FromRequestParts, MatchedPath, Path, Query, Request, State,
};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, ETAG, IF_NONE_MATCH, LOCATION, SET_COOKIE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{AppendHeaders, Html, IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream::{self, Stream, StreamExt};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;
use tower_http::cors::{Any, CorsLayer};
use tower_http::limit::RequestBodyLimitLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tower_http::timeout::TimeoutLayer;
use tower_http::trace::TraceLayer;

/// What one sets where it runs.
pub struct Settings {
    pub request_timeout: Duration,
    pub body_bytes_max: usize,
    /// What a gardener has to show.
    pub token: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self { request_timeout: Duration::from_secs(5), body_bytes_max: 64 * 1024, token: "spade".to_owned() }
    }
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Packet {
    name: String,
    grams: u32,
}

/// A packet as it is kept.
#[derive(Clone, Serialize)]
struct Kept {
    id: u32,
    /// Goes up with each change.
    version: u32,
    #[serde(flatten)]
    packet: Packet,
}

#[derive(Default)]
struct Shelf {
    packets: BTreeMap<u32, Kept>,
    last_id: u32,
}

/// What all handlers share.
#[derive(Clone)]
struct Library {
    shelf: Arc<RwLock<Shelf>>,
    database: Database,
    token: Arc<str>,
    streams: Arc<AtomicUsize>,
}

impl FromRef<Library> for Database {
    fn from_ref(library: &Library) -> Self {
        library.database.clone()
    }
}

/// To a program, a database's driver is this: a few connections that are waited for, and tasks and timers of tokio's.
#[derive(Clone)]
struct Database {
    connections: Arc<Semaphore>,
}

impl Database {
    const CONNECTIONS: usize = 4;
    const PATIENCE: Duration = Duration::from_secs(10);

    async fn run<R: Send + 'static>(&self, query: impl FnOnce() -> R + Send + 'static) -> Result<R, Problem> {
        let connection = timeout(Self::PATIENCE, Arc::clone(&self.connections).acquire_owned()).await;
        let connection = connection.map_err(|_| Problem::Busy)?.map_err(|_| Problem::Busy)?;
        let work = tokio::spawn(async move {
            sleep(Duration::from_millis(1)).await;
            let answer = query();
            drop(connection);
            answer
        });
        work.await.map_err(|_| Problem::Busy)
    }
}

/// Everything that is answered with an error, as JSON.
enum Problem {
    NotFound,
    NotAllowed,
    NoGardener,
    TooFew { grams: u32 },
    Malformed(JsonRejection),
    Busy,
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, what) = match self {
            Self::NotFound => (StatusCode::NOT_FOUND, "there is nothing here".to_owned()),
            Self::NotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "not with this method".to_owned()),
            Self::NoGardener => (StatusCode::UNAUTHORIZED, "only gardeners may do this".to_owned()),
            Self::TooFew { grams } => (StatusCode::CONFLICT, format!("there are only {grams} g left")),
            Self::Malformed(rejection) => (rejection.status(), rejection.body_text()),
            Self::Busy => (StatusCode::SERVICE_UNAVAILABLE, "the database is busy".to_owned()),
        };
        (status, Json(json!({ "problem": what }))).into_response()
    }
}

/// Whoever has shown the token.
struct Gardener;

impl FromRequestParts<Library> for Gardener {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, library: &Library) -> Result<Self, Problem> {
        let shown = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = shown.and_then(|value| value.strip_prefix("Bearer "));
        if token == Some(&library.token) { Ok(Self) } else { Err(Problem::NoGardener) }
    }
}

/// JSON whose refusal is a [`Problem`], too.
struct Sent<T>(T);

impl<T, S> FromRequest<S> for Sent<T>
where
    Json<T>: FromRequest<S, Rejection = JsonRejection>,
    S: Send + Sync,
{
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        Json::from_request(request, state).await.map(|Json(sent)| Self(sent)).map_err(Problem::Malformed)
    }
}

/// The application. Called within a tokio runtime, which its background task lives on.
pub fn router(settings: Settings) -> Router {
    let library = Library {
        shelf: Arc::default(),
        database: Database { connections: Arc::new(Semaphore::new(Database::CONNECTIONS)) },
        token: settings.token.into(),
        streams: Arc::default(),
    };
    tokio::spawn(throw_empty_packets_away(Arc::downgrade(&library.shelf)));
    let packets = Router::new()
        .route("/", get(list).post(put_in))
        .route("/{id}", get(look_up).put(replace).delete(remove))
        .route("/{id}/take", post(take))
        .route_layer(middleware::from_fn(name_route));
    let streams = Router::new()
        .route("/export", get(export))
        .route("/events", get(events))
        .route("/weigh", post(weigh))
        .route("/echo", post(async |body: Body| body))
        .route("/open", get(open_streams));
    let demanding = Router::new()
        .route("/report", get(report))
        .route("/wait/{ms}", get(wait))
        .route("/panic", get(async || -> &'static str { panic!("a handler's own mistake") }));
    let layers = ServiceBuilder::new()
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .layer(TraceLayer::new_for_http())
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(CorsLayer::new().allow_origin(Any).allow_methods([Method::GET, Method::PUT]).allow_headers(Any))
        .layer(CompressionLayer::new())
        .layer(CatchPanicLayer::new())
        .layer(RequestBodyLimitLayer::new(settings.body_bytes_max))
        .layer(TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, settings.request_timeout));
    Router::new()
        .route("/", get(async || Html("<h1>Seed library</h1>")))
        .route("/seeds", get(async || Redirect::permanent("/packets")))
        .route("/cookies", get(cookies))
        .route("/address", get(async |ConnectInfo(peer): ConnectInfo<SocketAddr>| peer.ip().to_string()))
        .nest("/packets", packets)
        .nest("/streams", streams)
        .nest("/demanding", demanding)
        .fallback(async || Problem::NotFound)
        .method_not_allowed_fallback(async || Problem::NotAllowed)
        .layer(layers)
        .with_state(library)
}

/// Says which route it was that answered.
async fn name_route(request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let mut response = next.run(request).await;
    if let Some(route) = route.and_then(|route| HeaderValue::try_from(route).ok()) {
        response.headers_mut().insert(HeaderName::from_static("x-route"), route);
    }
    response
}

#[derive(Deserialize)]
struct Wanted {
    #[serde(default)]
    grams_min: u32,
    limit: Option<usize>,
}

async fn list(State(library): State<Library>, Query(wanted): Query<Wanted>) -> Result<Json<Vec<Kept>>, Problem> {
    let shelf = Arc::clone(&library.shelf);
    let found = library.database.run(move || {
        let shelf = shelf.read().expect("nobody panics with it");
        let enough = shelf.packets.values().filter(|kept| kept.packet.grams >= wanted.grams_min);
        enough.take(wanted.limit.unwrap_or(100)).cloned().collect()
    });
    found.await.map(Json)
}

async fn put_in(State(library): State<Library>, _: Gardener, Sent(packet): Sent<Packet>) -> Result<Response, Problem> {
    let shelf = Arc::clone(&library.shelf);
    let kept = library.database.run(move || {
        let mut shelf = shelf.write().expect("nobody panics with it");
        shelf.last_id += 1;
        let kept = Kept { id: shelf.last_id, version: 1, packet };
        shelf.packets.insert(kept.id, kept.clone());
        kept
    });
    let kept = kept.await?;
    let place = [(LOCATION, format!("/packets/{}", kept.id))];
    Ok((StatusCode::CREATED, place, Json(kept)).into_response())
}

async fn look_up(State(library): State<Library>, Path(id): Path<u32>, headers: HeaderMap) -> Result<Response, Problem> {
    let shelf = Arc::clone(&library.shelf);
    let kept = library.database.run(move || shelf.read().expect("nobody panics with it").packets.get(&id).cloned());
    let kept = kept.await?.ok_or(Problem::NotFound)?;
    let tag = format!("\"{}\"", kept.version);
    if headers.get(IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        return Ok((StatusCode::NOT_MODIFIED, [(ETAG, tag)]).into_response());
    }
    Ok(([(ETAG, tag)], Json(kept)).into_response())
}

/// Changes a packet, if there is one.
async fn change<R: Send + 'static>(
    library: &Library,
    id: u32,
    change: impl FnOnce(&mut Kept) -> R + Send + 'static,
) -> Result<R, Problem> {
    let shelf = Arc::clone(&library.shelf);
    let changed = library.database.run(move || {
        let mut shelf = shelf.write().expect("nobody panics with it");
        shelf.packets.get_mut(&id).map(|kept| {
            kept.version += 1;
            change(kept)
        })
    });
    changed.await?.ok_or(Problem::NotFound)
}

async fn replace(
    State(library): State<Library>,
    Path(id): Path<u32>,
    _: Gardener,
    Sent(packet): Sent<Packet>,
) -> Result<Json<Kept>, Problem> {
    let replaced = change(&library, id, move |kept| {
        kept.packet = packet;
        kept.clone()
    });
    replaced.await.map(Json)
}

async fn remove(State(library): State<Library>, Path(id): Path<u32>, _: Gardener) -> Result<StatusCode, Problem> {
    let removed = library.shelf.write().expect("nobody panics with it").packets.remove(&id);
    removed.map(|_| StatusCode::NO_CONTENT).ok_or(Problem::NotFound)
}

#[derive(Deserialize)]
struct Taken {
    grams: u32,
}

async fn take(
    State(library): State<Library>,
    Path(id): Path<u32>,
    Form(taken): Form<Taken>,
) -> Result<String, Problem> {
    let left = change(&library, id, move |kept| {
        let grams = kept.packet.grams;
        kept.packet.grams = grams.checked_sub(taken.grams).ok_or(Problem::TooFew { grams })?;
        Ok(kept.packet.grams)
    });
    Ok(format!("{} g left", left.await??))
}

/// Beside the requests, as long as there are handlers that share the shelf.
async fn throw_empty_packets_away(shelf: Weak<RwLock<Shelf>>) {
    loop {
        sleep(Duration::from_millis(20)).await;
        let Some(shelf) = shelf.upgrade() else { return };
        shelf.write().expect("nobody panics with it").packets.retain(|_, kept| kept.packet.grams > 0);
    }
}

async fn cookies() -> impl IntoResponse {
    (AppendHeaders([(SET_COOKIE, "first=1; Path=/"), (SET_COOKIE, "second=2; Path=/")]), "two cookies")
}

/// Asks for more at once than there are connections.
async fn report(State(database): State<Database>) -> Result<String, Problem> {
    let queries: Vec<_> = (0..3 * Database::CONNECTIONS as u64)
        .map(|number| {
            let database = database.clone();
            tokio::spawn(async move { database.run(move || number).await })
        })
        .collect();
    let mut sum = 0;
    for query in queries {
        sum += query.await.map_err(|_| Problem::Busy)??;
    }
    Ok(format!("the sum is {sum}\n"))
}

async fn wait(Path(ms): Path<u64>) -> String {
    sleep(Duration::from_millis(ms)).await;
    format!("waited for {ms} ms")
}

#[derive(Deserialize)]
struct Count {
    count: usize,
}

/// Lines from a task that writes as fast as they are read.
async fn export(State(library): State<Library>, Query(Count { count }): Query<Count>) -> Response {
    let (sender, lines) = mpsc::channel::<Result<Bytes, std::io::Error>>(8);
    let open = Open::new(&library.streams);
    tokio::spawn(async move {
        let _open = open;
        for number in 0..count {
            let line = format!("{{\"line\":{number},\"of\":\"{}\"}}\n", "seeds ".repeat(10));
            if sender.send(Ok(line.into())).await.is_err() {
                return;
            }
        }
    });
    // The compression asks once more after the end.
    let lines = stream::unfold(lines, async |mut lines| Some((lines.recv().await?, lines))).fuse();
    ([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

/// One now and the others after a moment each; the connection is kept alive in between.
async fn events(
    State(library): State<Library>,
    Query(Count { count }): Query<Count>,
) -> Sse<impl Stream<Item = Result<Event, axum::Error>>> {
    let open = Open::new(&library.streams);
    let events = stream::iter(0..count).then(move |number| {
        let _open = &open;
        async move {
            sleep(Duration::from_millis(if number == 0 { 0 } else { 5 })).await;
            Event::default().id(number.to_string()).event("ripe").json_data(json!({ "number": number }))
        }
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}

/// Reads the body piece by piece, and keeps none of it.
async fn weigh(body: Body) -> Result<String, StatusCode> {
    let (mut body, mut bytes, mut sum) = (body.into_data_stream(), 0, 0_u64);
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|_| StatusCode::PAYLOAD_TOO_LARGE)?;
        bytes += piece.len();
        sum = piece.iter().fold(sum, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    }
    Ok(format!("{bytes} bytes, {sum:x}"))
}

async fn open_streams(State(library): State<Library>) -> String {
    library.streams.load(Ordering::Relaxed).to_string()
}

/// Counts a stream for as long as it has a reader.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(streams: &Arc<AtomicUsize>) -> Self {
        streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(streams))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
