//! An axum application of the usual kind (`examples/axum_app/app.rs`), served by axum's own server on tokio and by this one:
//! what clients see of the two is the same, header by header and byte by byte.

#[path = "../../examples/axum_app/app.rs"]
mod app;

use std::net::SocketAddr;
use std::process::Command;
use std::thread;
use std::time::Duration;

use ringleader::Stop;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::support::{BOUND, Client, Site, eventually, expect_refusal, local, settle};

/// The application twice. A request's order matters, and each gets the same ones: what they know stays the same, too.
struct Twins {
    /// Where axum's own server is, and where ours.
    addresses: [SocketAddr; 2],
    site: Site,
    stop: oneshot::Sender<()>,
    stopped: JoinHandle<std::io::Result<()>>,
    runtime: Runtime,
}

impl Twins {
    fn start(request_timeout: Duration) -> Self {
        let runtime =
            Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime can be made");
        let router = || {
            let _inside = runtime.enter();
            app::router(app::Settings { request_timeout, ..app::Settings::default() })
        };
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port is free");
        let theirs = listener.local_addr().expect("it is bound");
        let (stop, order) = oneshot::channel();
        let app = router().into_make_service_with_connect_info::<SocketAddr>();
        let serve = axum::serve(listener, app).with_graceful_shutdown(async move { drop(order.await) });
        let stopped = runtime.spawn(serve.into_future());
        let ours = router();
        let site = Site::start(
            local(2)
                .tokio(runtime.handle().clone())
                .serve(async move |_| Ok(ringleader::axum(ours.clone()).connect_info())),
        );
        Self { addresses: [theirs, site.address()], site, stop, stopped, runtime }
    }

    /// Has both answer one request, and compares; what both said.
    #[track_caller]
    fn ask(&self, request: &str) -> Seen {
        let [theirs, ours] = self.addresses.map(|address| Seen::of(address, request));
        assert_eq!(ours, theirs, "this server's answer, and axum's own server's, to {request:?}");
        ours
    }

    /// The same with curl, whose arguments come before the URL of a path.
    #[track_caller]
    fn curl(&self, arguments: &[&str], path: &str) -> String {
        let [theirs, ours] = self.addresses.map(|address| curl(address, arguments, path));
        assert_eq!(ours, theirs, "this server's answer, and axum's own server's, to {arguments:?} {path}");
        ours
    }

    fn open_streams(&self) -> [String; 2] {
        self.addresses.map(|address| Client::connect(address).get("/streams/open").text().to_owned())
    }
}

/// An answer, without what may differ from one time to the next.
#[derive(Debug, PartialEq)]
struct Seen {
    status: u16,
    /// The status line and header fields, in lower case and sorted; the date's value and that of an identifier of chance
    /// left out.
    head: Vec<String>,
    /// Without a transfer coding's framing.
    body: String,
}

impl Seen {
    /// Sends one request by a connection of its own, and reads until the server closes it.
    fn of(address: SocketAddr, request: &str) -> Self {
        let (head, body) = request.split_once("\r\n\r\n").expect("a head has an end");
        let mut client = Client::connect(address);
        client.send(format!("{head}\r\nconnection: close\r\n\r\n{body}"));
        let of_head = request.starts_with("HEAD ");
        let answer = if of_head { client.head() } else { client.answer() };
        client.expect_end();
        let asked_for_id = head.contains("x-request-id: ");
        let mask = |line: &str| match line.split_once(": ") {
            Some((name @ "date", _)) => name.to_owned(),
            Some((name @ "x-request-id", value)) if !asked_for_id => format!("{name} of {} characters", value.len()),
            _ => line.to_owned(),
        };
        let mut lines: Vec<_> = answer.head.trim_end().lines().map(mask).collect();
        lines[1..].sort_unstable();
        Self { status: answer.status, head: lines, body: String::from_utf8_lossy(&answer.body).into_owned() }
    }

    fn has(&self, field: &str) -> bool {
        self.head.iter().any(|line| line == field)
    }
}

fn curl(address: SocketAddr, arguments: &[&str], path: &str) -> String {
    let mut command = Command::new("curl");
    command.args(["-sS", "-i", "--max-time", "30", "-H", "x-request-id: 1"]).args(arguments);
    let output = command.arg(format!("http://{address}{path}")).output();
    let output = output.unwrap_or_else(|error| panic!("starting curl (`make test` installs it): {error}"));
    assert!(output.status.success(), "curl {arguments:?} {path}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter(|line| !line.starts_with("date: ")).collect::<Vec<_>>().join("\n")
}

/// A request with these lines after its first.
fn with(line: &str, fields: &[&str], body: &str) -> String {
    let mut request = format!("{line} HTTP/1.1\r\nhost: test\r\n");
    for field in fields {
        request.push_str(field);
        request.push_str("\r\n");
    }
    if !body.is_empty() {
        request.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    request + "\r\n" + body
}

fn plain(line: &str) -> String {
    with(line, &[], "")
}

const GARDENER: &str = "authorization: Bearer spade";
const JSON: &str = "content-type: application/json";
const FORM: &str = "content-type: application/x-www-form-urlencoded";
/// For what is not about timeouts.
const PATIENT: Duration = BOUND;

/// JSON to put in, of a gardener.
fn put_in(json: &str) -> String {
    with("POST /packets", &[GARDENER, JSON], json)
}

#[test]
fn packets_are_kept_looked_up_changed_and_removed_alike() {
    let twins = Twins::start(PATIENT);
    assert_eq!(twins.ask(&plain("GET /packets")).body, "[]");
    assert_eq!(twins.ask(&put_in(r#"{"name":"Beet","grams":20}"#)).status, 201);
    assert!(twins.ask(&put_in(r#"{"name":"Rocket","grams":300}"#)).has("location: /packets/2"));
    let one = twins.ask(&plain("GET /packets/1"));
    assert_eq!(one.body, r#"{"id":1,"version":1,"name":"Beet","grams":20}"#);
    assert!(one.has("etag: \"1\"") && one.has("x-route: /packets/{id}"), "{one:?}");
    assert_eq!(twins.ask(&plain("HEAD /packets/1")).status, 200);
    assert_eq!(twins.ask(&plain("GET /packets/%31")).status, 200);
    let replace = with("PUT /packets/1", &[GARDENER, JSON], r#"{"name":"Red beet","grams":50}"#);
    assert_eq!(twins.ask(&replace).status, 200);
    assert_eq!(twins.ask(&with("POST /packets/1/take", &[FORM], "grams=5")).body, "45 g left");
    assert_eq!(twins.ask(&with("POST /packets/1/take", &[FORM], "grams=500")).status, 409);
    assert_eq!(twins.ask(&plain("GET /packets?grams_min=100&limit=1")).body.matches("Rocket").count(), 1);
    assert_eq!(twins.ask(&with("DELETE /packets/2", &[GARDENER], "")).status, 204);
    assert_eq!(twins.ask(&with("DELETE /packets/2", &[GARDENER], "")).status, 404);
    assert_eq!(twins.ask(&with("POST /packets/1/take", &[FORM], "grams=45")).body, "0 g left");
    // The application's background task has it gone.
    eventually("nothing is left", || {
        twins.addresses.map(|at| Seen::of(at, &plain("GET /packets")).body) == ["[]", "[]"]
    });
}

#[test]
fn what_is_refused_is_refused_alike() {
    let twins = Twins::start(PATIENT);
    let good = r#"{"name":"Beet","grams":20}"#;
    for (status, request) in [
        (401, with("POST /packets", &[JSON], good)),
        (415, with("POST /packets", &[GARDENER], good)),
        (400, put_in(r#"{"name":"#)),
        (422, put_in(r#"{"name":"Beet"}"#)),
        (422, put_in(r#"{"name":"Beet","grams":20,"colour":"red"}"#)),
        (400, plain("GET /packets?limit=many")),
        (400, plain("GET /packets/first")),
        (404, plain("GET /packets/7")),
        (404, plain("GET /nowhere")),
        (404, plain("GET /packets/7/nowhere")),
        (405, plain("DELETE /")),
        (405, with("POST /", &[], "nobody reads this")),
        (405, plain("BREW /packets/1")),
        (415, with("POST /packets/1/take", &[], "grams=1")),
        (422, with("POST /packets/1/take", &[FORM], "ounces=1")),
        (404, with("POST /packets/1/take", &[FORM], "grams=1")),
        (500, plain("GET /demanding/panic")),
    ] {
        assert_eq!(twins.ask(&request).status, status, "{request}");
    }
}

#[test]
fn handlers_know_who_asks_alike() {
    let twins = Twins::start(PATIENT);
    assert_eq!(twins.ask(&plain("GET /address")).body, "127.0.0.1");
}

#[test]
fn middleware_and_layers_do_the_same() {
    let twins = Twins::start(PATIENT);
    assert!(twins.ask(&plain("GET /")).has("x-request-id of 36 characters"));
    assert!(twins.ask(&with("GET /", &["x-request-id: seventh"], "")).has("x-request-id: seventh"));
    assert_eq!(twins.ask(&plain("HEAD /")).body, "");
    assert!(twins.ask(&plain("GET /seeds")).has("location: /packets"));
    assert_eq!(twins.ask(&plain("GET /cookies")).head.iter().filter(|line| line.starts_with("set-cookie")).count(), 2);
    assert!(twins.ask(&with("GET /", &["origin: http://garden.test"], "")).has("access-control-allow-origin: *"));
    let asks_first = ["origin: http://garden.test", "access-control-request-method: PUT"];
    let preflight = twins.ask(&with("OPTIONS /packets/1", &asks_first, ""));
    assert!(preflight.has("access-control-allow-methods: get,put"), "{preflight:?}");
    twins.ask(&plain("OPTIONS /packets"));
    twins.ask(&plain("OPTIONS *"));
    twins.ask(&plain("GET http://elsewhere.test/cookies"));
    twins.ask(&with("GET /cookies", &["accept-encoding: br, gzip;q=0"], ""));
}

#[test]
fn tasks_timers_and_a_pool_of_tokios_serve_handlers_on_both() {
    let twins = Twins::start(PATIENT);
    assert_eq!(twins.ask(&plain("GET /demanding/report")).body, "the sum is 66\n");
    assert_eq!(twins.ask(&plain("GET /demanding/wait/20")).body, "waited for 20 ms");
    assert_eq!(twins.ask(&put_in(r#"{"name":"Beet","grams":20}"#)).status, 201);
    let of_one = |address: SocketAddr| {
        let mut client = Client::connect(address);
        let mut seen = Vec::new();
        for path in ["/packets/1", "/demanding/report", "/packets", "/demanding/wait/1", "/nowhere"] {
            let answer = client.get(path);
            seen.push((answer.status, answer.header("x-route").map(str::to_owned), answer.text().to_owned()));
        }
        seen
    };
    let of_many = |address| {
        let clients: Vec<_> = (0..32).map(|_| thread::spawn(move || of_one(address))).collect();
        clients.into_iter().map(|client| client.join().expect("it is served")).collect::<Vec<_>>()
    };
    let [theirs, ours] = twins.addresses.map(of_many);
    assert_eq!(ours, theirs);
    assert_eq!(twins.site.stats().executors.iter().map(|executor| executor.panics_contained).sum::<u64>(), 0);
}

#[test]
fn bodies_are_streamed_and_bounded_alike() {
    let twins = Twins::start(PATIENT);
    let export = twins.ask(&plain("GET /streams/export?count=3000"));
    assert_eq!((export.body.lines().count(), export.has("transfer-encoding: chunked")), (3000, true));
    let events = twins.ask(&plain("GET /streams/events?count=5"));
    assert_eq!(events.body.matches("event: ripe\n").count(), 5, "{events:?}");
    let much = "seed".repeat(10_000);
    assert!(twins.ask(&with("POST /streams/weigh", &[], &much)).body.starts_with("40000 bytes"));
    assert_eq!(twins.ask(&with("POST /streams/echo", &[], &much)).body, much);
    let chunked = ["transfer-encoding: chunked"];
    let in_chunks = with("POST /streams/weigh", &chunked, "") + "4\r\nseed\r\n3\r\nbed\r\n0\r\n\r\n";
    assert!(twins.ask(&in_chunks).body.starts_with("7 bytes"));
    let echoed = with("POST /streams/echo", &chunked, "") + "4\r\nseed\r\n3\r\nbed\r\n0\r\n\r\n";
    assert_eq!(twins.ask(&echoed).body, "seedbed");
    // More than the application takes: by what is announced, and by what comes. Nothing is sent that would be left unread,
    // since a reset because of that may overtake the answer.
    let announced = with("POST /streams/weigh", &["content-length: 70000"], "");
    assert_eq!(twins.ask(&announced).status, 413);
    let too_much = format!("{:x}\r\n{}", 64 * 1024 + 1, "x".repeat(64 * 1024 + 1));
    assert_eq!(twins.ask(&(with("POST /streams/weigh", &chunked, "") + &too_much)).status, 413);
    assert_eq!(twins.ask(&(with("POST /packets", &[GARDENER, JSON, chunked[0]], "") + &too_much)).status, 413);
}

#[test]
fn curl_sees_no_difference() {
    let twins = Twins::start(PATIENT);
    for name in ["Beet", "Rocket", "Cress", "Lovage"] {
        let json = format!(r#"{{"name":"{name}","grams":20}}"#);
        twins.curl(&["-H", GARDENER, "-H", JSON, "-d", &json], "/packets");
    }
    let list = twins.curl(&["--compressed"], "/packets");
    assert!(list.contains("content-encoding: gzip") && list.contains("Lovage"), "{list}");
    assert!(twins.curl(&["--compressed"], "/streams/export?count=2000").contains(r#""line":1999"#));
    assert!(twins.curl(&["--compressed", "-N"], "/streams/events?count=3").contains(r#"{"number":2}"#));
    twins.curl(&["-I"], "/packets/2");
    twins.curl(&["--http1.0"], "/packets/2");
    twins.curl(&["--http1.0"], "/streams/export?count=10");
    twins.curl(&["-H", "if-none-match: \"1\""], "/packets/2");
    twins.curl(&["-d", "grams=3"], "/packets/2/take");
    twins.curl(&["-L"], "/seeds");
    twins.curl(
        &["-X", "OPTIONS", "-H", "origin: http://a.test", "-H", "access-control-request-method: GET"],
        "/packets",
    );
    let much = "seed".repeat(1000);
    let expects = twins.curl(&["-H", "expect: 100-continue", "-d", &much], "/streams/weigh");
    assert!(expects.starts_with("HTTP/1.1 100 Continue") && expects.contains("4000 bytes"), "{expects}");
    twins.curl(&["-H", "expect: 100-continue", "-d", &much, "-H", "transfer-encoding: chunked"], "/streams/echo");
    twins.curl(&["-F", "grams=5"], "/packets/2/take");
}

#[test]
fn a_connection_is_kept_or_closed_alike() {
    let twins = Twins::start(PATIENT);
    let [theirs, ours] = twins.addresses.map(|address| {
        let mut client = Client::connect(address);
        // Two at once, one without a body, one that is refused with its body unread.
        client.send(plain("GET /cookies") + &plain("GET /seeds"));
        let mut seen: Vec<_> = [client.answer(), client.answer()].iter().map(|a| (a.status, a.closes())).collect();
        client.send(plain("HEAD /"));
        let head = client.head();
        seen.push((head.status, head.closes()));
        client.send(with("POST /", &[], "a short body that nobody reads"));
        let refused = client.answer();
        seen.push((refused.status, refused.closes()));
        let answer = client.get("/streams/export?count=3");
        seen.push((answer.status, answer.closes()));
        client.send("GET / HTTP/1.1\r\nno field\r\n\r\n");
        let malformed = client.answer();
        seen.push((malformed.status, malformed.closes()));
        client.expect_end();
        seen
    });
    assert_eq!(ours, theirs);
}

#[test]
fn a_request_that_takes_too_long_is_answered_by_the_layer() {
    let twins = Twins::start(Duration::from_millis(50));
    assert_eq!(twins.ask(&plain("GET /demanding/wait/600000")).status, 408);
}

#[test]
fn the_application_notices_a_client_that_goes_away_in_the_middle_of_an_answer() {
    let twins = Twins::start(PATIENT);
    for path in ["/streams/export?count=1000000000", "/streams/events?count=1000000000"] {
        let clients = twins.addresses.map(|address| {
            let mut client = Client::connect(address);
            client.ask(path);
            assert_eq!(client.head().status, 200);
            assert!(client.chunk().expect("it goes on").is_some());
            client
        });
        assert_eq!(twins.open_streams(), ["1", "1"]);
        drop(clients);
        eventually("both have noticed", || twins.open_streams() == ["0", "0"]);
    }
}

#[test]
fn a_graceful_stop_lets_a_request_in_flight_finish_on_both() {
    let twins = Twins::start(PATIENT);
    let mut clients = twins.addresses.map(|address| {
        let mut client = Client::connect(address);
        client.ask("/streams/events?count=40");
        assert_eq!(client.head().status, 200);
        client
    });
    let _ = twins.stop.send(());
    let running = twins.site.into_running();
    let stop = running.stop(Stop::Drain(BOUND));
    let [theirs, ours] = clients.each_mut().map(|client| {
        let mut events = Vec::new();
        while let Some(event) = client.chunk().expect("it goes on to its end") {
            events.extend(event);
        }
        client.expect_end();
        String::from_utf8(events).expect("events are text")
    });
    assert_eq!(ours.matches("event: ripe\n").count(), 40);
    assert_eq!(ours, theirs);
    assert!(settle(stop).expect("it stops").drained);
    let ended = twins.runtime.block_on(async { tokio::time::timeout(BOUND, twins.stopped).await });
    ended.expect("it stops in time").expect("it does not panic").expect("it does not fail");
    twins.addresses.into_iter().for_each(expect_refusal);
}
