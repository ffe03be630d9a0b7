//! An axum router, unmodified: state, extractors, JSON, fallbacks, middleware; and what it cannot do here.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::extract::{ConnectInfo, Extension, Path, Query, Request, State, WebSocketUpgrade};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use ringleader::{Connection, HttpLimits};
use serde::{Deserialize, Serialize};

use crate::support::{Client, Site, local};

#[derive(Clone, Serialize, Deserialize)]
struct Book {
    title: String,
    pages: u32,
}

/// Shared by all executors, as in any axum application.
type Shelf = Arc<Mutex<BTreeMap<u32, Book>>>;

#[derive(Deserialize)]
struct Wanted {
    pages_min: u32,
}

async fn put(State(shelf): State<Shelf>, Json(book): Json<Book>) -> (StatusCode, Json<u32>) {
    let mut shelf = shelf.lock().expect("nobody panics");
    let number = shelf.len() as u32 + 1;
    shelf.insert(number, book);
    (StatusCode::CREATED, Json(number))
}

async fn one(State(shelf): State<Shelf>, Path(number): Path<u32>) -> Result<Json<Book>, StatusCode> {
    let book = shelf.lock().expect("nobody panics").get(&number).cloned();
    book.map(Json).ok_or(StatusCode::NOT_FOUND)
}

async fn all(State(shelf): State<Shelf>, Query(wanted): Query<Wanted>) -> Json<Vec<Book>> {
    let shelf = shelf.lock().expect("nobody panics");
    Json(shelf.values().filter(|book| book.pages >= wanted.pages_min).cloned().collect())
}

async fn stamp(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    response.headers_mut().insert("x-stamp", HeaderValue::from_static("library"));
    response
}

async fn talk(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(async |_| ()).into_response()
}

fn library() -> Router {
    Router::new()
        .route("/books", post(put).get(all))
        .route("/books/{number}", get(one))
        .route("/talk", get(talk))
        .route("/refuses", get(async || (StatusCode::UPGRADE_REQUIRED, [("upgrade", "h3")], "speak HTTP/3 to me")))
        .layer(middleware::from_fn(stamp))
        .with_state(Shelf::default())
}

fn site() -> Site {
    let router = library();
    Site::start(local(2).serve(async move |_| Ok(ringleader::axum(router.clone()))))
}

fn post_json(client: &mut Client, json: &str) -> u16 {
    client.send(format!(
        "POST /books HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{json}",
        json.len()
    ));
    client.answer().status
}

/// The head of a client that wants a WebSocket.
fn ask_for_websocket(client: &mut Client, path: &str) {
    client.send(websocket(path, ""));
}

fn websocket(path: &str, more: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: websocket\r\n{more}\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
}

#[test]
fn state_extractors_json_and_middleware_work_as_on_axums_own_server() {
    let site = site();
    let mut client = site.connect();
    assert_eq!(post_json(&mut client, r#"{"title":"Short","pages":10}"#), 201);
    assert_eq!(post_json(&mut client, r#"{"title":"Long","pages":1000}"#), 201);
    // On whichever executor.
    for mut client in (0..8).map(|_| site.connect()) {
        let answer = client.get("/books/2");
        assert_eq!((answer.status, answer.text()), (200, r#"{"title":"Long","pages":1000}"#));
        assert_eq!(
            (answer.header("content-type"), answer.header("x-stamp")),
            (Some("application/json"), Some("library"))
        );
        assert_eq!(client.get("/books?pages_min=11").text(), r#"[{"title":"Long","pages":1000}]"#);
    }
}

#[test]
fn handlers_know_their_connection() {
    let told = async |ConnectInfo(peer): ConnectInfo<SocketAddr>, Extension(connection): Extension<Connection>| {
        assert_eq!(connection.peer_addr(), Some(peer));
        format!("{peer} at {}", connection.listener())
    };
    let router = Router::new().route("/", get(told));
    let site = Site::start(local(1).serve(async move |_| Ok(ringleader::axum(router.clone()).connect_info())));
    let mut client = site.connect();
    let address = client.sender().local_addr().expect("it is connected");
    assert_eq!(client.get("/").text(), format!("{address} at {}", site.address()));
}

#[test]
fn refusals_are_axums_own() {
    let site = site();
    let mut client = site.connect();
    assert_eq!(post_json(&mut client, r#"{"title":"#), 400);
    assert_eq!(post_json(&mut client, r#"{"title":"No pages"}"#), 422);
    assert_eq!(client.get("/books").status, 400);
    assert_eq!(client.get("/books/7").status, 404);
    assert_eq!(client.get("/nowhere").status, 404);
    client.send("DELETE /books HTTP/1.1\r\nhost: test\r\n\r\n");
    assert_eq!(client.answer().status, 405);
}

#[test]
fn the_servers_limit_on_bodies_comes_before_axums() {
    let announced = |bytes: usize| format!("POST /books HTTP/1.1\r\nhost: test\r\ncontent-length: {bytes}\r\n\r\n");
    let in_one_chunk = |bytes: usize| {
        let head = "POST /read HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n";
        format!("{head}{bytes:x}\r\n{}\r\n0\r\n\r\n", "x".repeat(bytes))
    };
    let serving = |body_bytes_max| {
        let mut limits = HttpLimits::default();
        limits.body_bytes_max = body_bytes_max;
        let router = Router::new().route("/read", post(async |bytes: Bytes| bytes.len().to_string()));
        let router = router.route("/books", post(async |_: Bytes| ()));
        Site::start(local(1).http_limits(limits).serve(async move |_| Ok(ringleader::axum(router.clone()))))
    };
    let status = |site: &Site, request: String| {
        let mut client = site.connect();
        client.send(request);
        client.answer().status
    };
    let short = serving(100);
    assert_eq!(status(&short, in_one_chunk(100)), 200);
    assert_eq!(status(&short, in_one_chunk(101)), 400);
    assert_eq!(status(&short, announced(101)), 413);
    let none = serving(u64::MAX);
    assert_eq!(status(&none, in_one_chunk(1_100_000)), 200);
}

#[test]
fn a_websocket_is_refused_with_501_before_anything_is_promised_and_the_connection_goes_on() {
    let site = site();
    let mut client = site.connect();
    ask_for_websocket(&mut client, "/talk");
    let answer = client.answer();
    assert_eq!((answer.status, answer.header("upgrade")), (501, None));
    assert_eq!(client.get("/books?pages_min=0").text(), "[]");
    assert_eq!(site.stats().executors.iter().map(|executor| executor.panics_contained).sum::<u64>(), 0);
}

#[test]
fn a_websocket_behind_layers_that_change_the_refusals_body_is_refused_with_501_all_the_same() {
    let layered = library().layer(tower_http::compression::CompressionLayer::new());
    let site = Site::start(local(1).serve(async move |_| Ok(ringleader::axum(layered.clone()))));
    let mut client = site.connect();
    client.send(websocket("/talk", "accept-encoding: gzip\r\n"));
    let answer = client.answer();
    assert_eq!((answer.status, answer.header("content-encoding")), (501, None));
}

#[test]
fn what_is_no_refused_upgrade_is_passed_on() {
    let site = site();
    let mut client = site.connect();
    for asks in
        ["", "connection: upgrade\r\nupgrade: websocket\r\n", "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"]
    {
        client.send(format!("GET /refuses HTTP/1.1\r\nhost: test\r\n{asks}\r\n"));
        let answer = client.answer();
        assert_eq!((answer.status, answer.header("upgrade")), (426, Some("h3")), "{asks}");
        assert_eq!(answer.text(), "speak HTTP/3 to me");
    }
    // A client that asks for a WebSocket where there is none.
    ask_for_websocket(&mut client, "/books/7");
    assert_eq!(client.answer().status, 404);
}
