//! Every place where user code may panic, and what is lost by it. The commonest are in `panics`, blocking closures in
//! `blocking`, and what aborts the process in `panics_shown`.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use ringleader::{
    Body, BoxError, Builder, Escalation, ExecutorStats, PanicPolicy, Request, Response, RestartPolicy, Server, Service,
    Shard, service_fn,
};

use crate::support::log::Log;
use crate::support::{Client, Site, alone, eventually, local, settle};

struct PanicsOnDrop;

impl Drop for PanicsOnDrop {
    fn drop(&mut self) {
        panic!("a drop of the test's panics");
    }
}

fn only(site: &Site) -> ExecutorStats {
    site.stats().executors.remove(0)
}

/// Restarts without delay, and for ever.
fn tireless(builder: Builder) -> Builder {
    let mut policy = RestartPolicy::default();
    policy.backoff_base = Duration::from_millis(1);
    policy.backoff_max = Duration::from_millis(2);
    policy.quarantine_after = 0;
    builder.restart(policy)
}

/// One executor with `service`, which is called with the shard; the rest of the paths answer with the generation.
fn site<F>(builder: Builder, service: F) -> Site
where
    F: AsyncFn(&Shard, Request) -> Result<Option<Body>, BoxError> + Clone + Send + Sync + 'static,
{
    Site::start(tireless(builder).serve(async move |shard: Shard| {
        let service = service.clone();
        Ok(service_fn(async move |request: Request| {
            let body = service(&shard, request).await?;
            Ok(Response::new(body.unwrap_or_else(|| Body::from(shard.generation().to_string()))))
        }))
    }))
}

/// `path` costs whoever asks for it the connection, unanswered or with an answer that cannot be taken for a whole one;
/// nobody else notices, and it is counted once.
#[track_caller]
fn expect_broken_off(site: &Site, path: &str) {
    let mut sibling = site.connect();
    assert_eq!(sibling.get("/").text(), "1");
    let before = only(site).panics_contained;
    let mut client = site.connect();
    client.ask(path);
    let answer = client.try_answer();
    assert!(answer.is_err(), "{path}: {answer:?}");
    assert_eq!(sibling.get("/").text(), "1");
    assert_eq!(only(site).panics_contained, before + 1, "{path}");
    eventually("nothing of it is left", || only(site).in_flight == 0 && only(site).open <= 1);
}

/// A body that panics after so many pieces; with its length declared or not; perhaps again when it is dropped.
struct Breaks {
    pieces: usize,
    declared: bool,
    _again: Option<PanicsOnDrop>,
}

impl http_body::Body for Breaks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        assert!(self.pieces > 0, "a body of the test's panics");
        self.pieces -= 1;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"piece")))))
    }

    fn size_hint(&self) -> SizeHint {
        if self.declared { SizeHint::with_exact(100) } else { SizeHint::default() }
    }
}

#[test]
fn a_body_that_panics_is_never_taken_for_a_whole_one() {
    let site = site(local(1), async |_, request| {
        let breaks = |pieces, declared| Some(Body::new(Breaks { pieces, declared, _again: None }));
        Ok(match request.uri().path() {
            "/chunked/first" => breaks(0, false),
            "/chunked/later" => breaks(3, false),
            "/declared/first" => breaks(0, true),
            "/declared/later" => breaks(3, true),
            _ => None,
        })
    });
    for path in ["/chunked/first", "/chunked/later", "/declared/first", "/declared/later"] {
        expect_broken_off(&site, path);
    }
}

#[test]
fn a_body_that_panics_again_as_it_is_dropped_costs_its_connection_only() {
    let site = site(local(1), async |_, request| {
        let body = || Body::new(Breaks { pieces: 1, declared: false, _again: Some(PanicsOnDrop) });
        Ok((request.uri().path() == "/panic").then(body))
    });
    let mut sibling = site.connect();
    assert_eq!(sibling.get("/").text(), "1");
    let mut client = site.connect();
    client.ask("/panic");
    assert!(client.try_answer().is_err());
    assert_eq!(sibling.get("/").text(), "1");
    // Two panics of one connection.
    assert_eq!((only(&site).panics_contained, only(&site).generation), (2, 1));
}

/// Whole, but panics when it is dropped.
struct EndsBadly(Option<Bytes>, PanicsOnDrop);

impl http_body::Body for EndsBadly {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }
}

#[test]
fn a_body_whose_drop_panics_costs_its_connection_only() {
    let site = site(local(1), async |_, request| {
        let body = || Body::new(EndsBadly(Some(Bytes::from_static(b"whole")), PanicsOnDrop));
        Ok((request.uri().path() == "/panic").then(body))
    });
    let mut sibling = site.connect();
    assert_eq!(sibling.get("/").text(), "1");
    let mut client = site.connect();
    client.ask("/panic");
    // The answer may have been sent by then, or not; the connection is lost in any case.
    let _ = client.try_answer();
    let _ = client.some();
    client.expect_end();
    assert_eq!(sibling.get("/").text(), "1");
    assert_eq!(only(&site).panics_contained, 1);
    eventually("nothing of it is left", || only(&site).in_flight == 0 && only(&site).open == 1);
}

#[test]
fn a_value_that_hyper_holds_for_a_connection_may_panic_in_its_drop() {
    // An extension of the response: dropped inside hyper, with hyper's frames around it.
    #[derive(Clone)]
    struct Held(#[expect(dead_code, reason = "it is there to be dropped")] Arc<PanicsOnDrop>);
    let site = Site::serving(async |request: Request| {
        let mut response = Response::new(Body::from("1"));
        if request.uri().path() == "/panic" {
            response.extensions_mut().insert(Held(Arc::new(PanicsOnDrop)));
        }
        Ok(response)
    });
    let mut sibling = site.connect();
    assert_eq!(sibling.get("/").text(), "1");
    let mut client = site.connect();
    client.ask("/panic");
    let _ = client.try_answer();
    let _ = client.some();
    client.expect_end();
    assert_eq!((sibling.get("/").text(), only(&site).panics_contained), ("1", 1));
    eventually("nothing of it is left", || only(&site).in_flight == 0 && only(&site).open == 1);
}

#[test]
fn a_handler_that_panics_in_the_middle_of_an_upload_is_answered_500() {
    let site = site(local(1), async |_, request| {
        if request.uri().path() == "/panic" {
            let mut body = request.into_body();
            let first = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
            panic!("a handler of the test's panics after {:?}", first.map(|frame| frame.is_ok()));
        }
        Ok(None)
    });
    let mut client = site.connect();
    // Chunked, and far from its end; the client goes on sending until it sees the answer.
    client.send("POST /panic HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n");
    let mut sender = client.sender();
    let chunk = [b"1000\r\n".as_slice(), &[b'x'; 0x1000], b"\r\n"].concat();
    let sending = std::thread::spawn(move || {
        use std::io::Write;
        (0..100).take_while(|_| sender.write_all(&chunk).is_ok()).count()
    });
    let answer = client.answer();
    assert_eq!((answer.status, answer.closes()), (500, true));
    sending.join().expect("the sender does not panic");
    assert_eq!(site.connect().get("/").text(), "1");
    assert_eq!(only(&site).panics_contained, 1);
}

#[test]
fn a_spawned_tasks_panic_is_its_owners_to_see_even_if_the_policy_is_to_restart() {
    let site = site(local(1).panics(PanicPolicy::Restart), async |shard, request| {
        if request.uri().path() == "/" {
            return Ok(None);
        }
        let nobody = shard.spawn(async { panic!("a task of the test's panics unseen") });
        drop::<ringleader::Task<()>>(nobody);
        let error = shard.spawn(async { panic!("a task of the test's panics") }).await;
        let _: &Result<(), _> = &error;
        Ok(error.err().map(|error| Body::from(error.to_string())))
    });
    let mut client = site.connect();
    assert_eq!(client.get("/spawn").text(), "the task panicked: a task of the test's panics");
    assert_eq!(client.get("/").text(), "1");
    assert_eq!(only(&site).panics_contained, 2);
}

#[test]
fn a_panic_in_the_first_generations_start_up_fails_the_start() {
    for yields in [false, true] {
        let server: Server = local(2).serve(async move |shard: Shard| {
            if yields {
                shard.sleep(Duration::from_millis(1)).await;
            }
            assert!(shard.id().index() == 0, "a start-up of the test's panics");
            Ok(service_fn(crate::support::echo))
        });
        let error = settle(server.start()).expect_err("executor 1 cannot start").to_string();
        assert!(error.contains("executor 1 did not start: it panicked: a start-up of the test's panics"), "{error}");
    }
}

#[test]
fn a_panic_in_a_later_generations_start_up_is_one_more_restart() {
    for yields in [false, true] {
        let server = tireless(local(1)).serve(async move |shard: Shard| {
            if yields {
                shard.sleep(Duration::from_millis(1)).await;
            }
            assert!(!(2..5).contains(&shard.generation()), "a start-up of the test's panics");
            Ok(service_fn(async move |request: Request| {
                if request.uri().path() == "/escape" {
                    shard.background("test", async { panic!("a background task of the test's panics") });
                }
                Ok(Response::new(Body::from(shard.generation().to_string())))
            }))
        });
        let site = Site::start(server);
        site.connect().ask("/escape");
        eventually("a generation starts", || only(&site).generation == 5);
        // The kernel's queue kept the connection meanwhile.
        assert_eq!(site.connect().get("/").text(), "5");
    }
}

/// A service that panics when it is dropped, which its generation's end does.
struct EndsWithABang(Shard);

impl Service for EndsWithABang {
    type Body = Body;

    async fn call(&self, request: Request) -> Result<Response, BoxError> {
        if request.uri().path() == "/escape" {
            self.0.background("test", async { panic!("a background task of the test's panics") });
        }
        Ok(Response::new(Body::from(self.0.generation().to_string())))
    }
}

impl Drop for EndsWithABang {
    fn drop(&mut self) {
        panic!("a service of the test's panics as it is dropped");
    }
}

#[test]
fn a_service_that_panics_as_it_is_dropped_holds_up_neither_restart_nor_stop() {
    let site = Site::start(tireless(local(1)).serve(async |shard: Shard| Ok(EndsWithABang(shard))));
    let mut idle = site.connect();
    assert_eq!(idle.get("/").text(), "1");
    site.connect().ask("/escape");
    idle.expect_end();
    assert_eq!(site.connect().get("/").text(), "2");
    // The site's end stops it, and finds out whether it can be.
}

#[test]
fn payloads_of_any_kind_are_contained() {
    let site = site(local(1), async |_, request| {
        match request.uri().path() {
            "/number" => std::panic::panic_any(7),
            // The payload's own drop panics.
            "/bomb" => std::panic::panic_any(PanicsOnDrop),
            _ => Ok(None),
        }
    });
    for (path, count) in [("/number", 1), ("/bomb", 2)] {
        let mut client = site.connect();
        assert_eq!(client.get(path).status, 500);
        client.expect_end();
        assert_eq!(only(&site).panics_contained, count);
    }
    assert_eq!(site.connect().get("/").text(), "1");
}

/// A waker of somebody else's, which panics.
struct PanickingWaker;

impl Wake for PanickingWaker {
    fn wake(self: Arc<Self>) {
        panic!("a waker of the test's panics");
    }
}

#[test]
fn a_waker_that_panics_in_the_executors_own_loop_costs_the_generation() {
    let site = site(local(1), async |shard, request| {
        if request.uri().path() == "/panic" {
            let mut sleep = Box::pin(shard.sleep(Duration::from_millis(1)));
            let waker = Waker::from(Arc::new(PanickingWaker));
            assert!(sleep.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            std::future::pending::<()>().await;
        }
        Ok(None)
    });
    let mut idle = site.connect();
    assert_eq!(idle.get("/").text(), "1");
    let mut client = site.connect();
    client.ask("/panic");
    client.expect_end();
    idle.expect_end();
    assert_eq!(site.connect().get("/").text(), "2");
}

/// Puts a panic on a task queue of glommio's; what embedders can do who name glommio themselves.
#[expect(clippy::disallowed_methods, reason = "this is how a panic gets past everything that contains one")]
fn panic_on_glommio(own_queue: bool) {
    let task = async {
        // glommio polls a task for the first time inside of `spawn_local`, where the panic is the handler's.
        glommio::timer::sleep(Duration::from_millis(1)).await;
        panic!("a task of the test's on glommio panics")
    };
    if own_queue {
        let queue = glommio::executor().create_task_queue(
            glommio::Shares::default(),
            glommio::Latency::NotImportant,
            "of the test",
        );
        glommio::spawn_local_into::<()>(task, queue).expect("the queue exists").detach();
    } else {
        glommio::spawn_local::<()>(task).detach();
    }
}

#[test]
fn a_panic_on_a_task_queue_of_glommios_costs_the_executor_and_a_fresh_thread_takes_its_slot() {
    let dropped = Arc::new(AtomicU64::new(0));
    struct Counts(Arc<AtomicU64>);
    impl Drop for Counts {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let counter = Arc::clone(&dropped);
    let server = tireless(local(1)).serve(async move |shard: Shard| {
        let held = Counts(Arc::clone(&counter));
        Ok(service_fn(async move |request: Request| {
            let _held = &held;
            match request.uri().path() {
                "/own" => panic_on_glommio(true),
                "/default" => panic_on_glommio(false),
                "/hang" => {
                    let _of_the_handler = Counts(Arc::clone(&held.0));
                    std::future::pending().await
                }
                _ => {}
            }
            Ok(Response::new(Body::from(shard.generation().to_string())))
        }))
    });
    let site = Site::start(server);
    for (round, path) in [(1, "/own"), (2, "/default"), (3, "/own")] {
        let mut idle = site.connect();
        assert_eq!(idle.get("/").text(), round.to_string());
        let (mut silent, mut waiting) = (site.connect(), site.connect());
        waiting.ask("/hang");
        eventually("all are known", || only(&site).open == 3 && only(&site).in_flight == 1);
        site.connect().ask(path);
        [&mut idle, &mut silent, &mut waiting].into_iter().for_each(Client::expect_end);
        // Served by the next generation, on another thread.
        assert_eq!(site.connect().get("/").text(), (round + 1).to_string());
        // The service and what the handler held have been dropped.
        assert_eq!(dropped.load(Ordering::SeqCst), 2 * round);
    }
    // The site's end finds out whether the listeners are let go of.
    let address = site.address();
    drop(site);
    crate::support::expect_refusal(address);
}

#[test]
fn under_restart_a_handlers_panic_is_answered_and_ends_its_generation() {
    let site = site(local(1).panics(PanicPolicy::Restart), async |_, request| {
        assert!(request.uri().path() != "/panic", "a handler of the test's panics");
        Ok(None)
    });
    for generation in 1..=20 {
        let mut idle = site.connect();
        assert_eq!(idle.get("/").text(), generation.to_string());
        let mut client = site.connect();
        client.ask("/panic");
        let answer = client.answer();
        assert_eq!((answer.status, answer.closes()), (500, true));
        client.expect_end();
        idle.expect_end();
    }
    assert_eq!(only(&site).panics_contained, 0);
}

#[test]
fn under_restart_answers_that_were_queued_together_go_out_too() {
    // Enough for the way by which sends go out together.
    const CLIENTS: usize = 32;
    let site = site(local(1).panics(PanicPolicy::Restart), async |_, request| {
        assert!(request.uri().path() != "/panic", "a handler of the test's panics");
        Ok(None)
    });
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| site.connect()).collect();
    clients.iter_mut().for_each(|client| assert_eq!(client.get("/").text(), "1"));
    clients.iter_mut().for_each(|client| client.ask("/panic"));
    // Those that were met in the same turn get their 500; the others' connections end. One at least was.
    let answers: Vec<_> = clients.iter_mut().filter_map(|client| client.try_answer().ok()).collect();
    assert!(!answers.is_empty() && answers.iter().all(|answer| answer.status == 500), "{answers:?}");
    assert_eq!(site.connect().get("/").text(), "2");
}

#[test]
fn under_restart_a_body_that_panics_ends_its_generation() {
    let site = site(local(1).panics(PanicPolicy::Restart), async |_, request| {
        let body = || Body::new(Breaks { pieces: 1, declared: false, _again: None });
        Ok((request.uri().path() == "/panic").then(body))
    });
    let mut client = site.connect();
    client.ask("/panic");
    assert!(client.try_answer().is_err());
    assert_eq!(site.connect().get("/").text(), "2");
}

#[test]
fn contained_panics_escalate_on_the_executor_that_has_too_many_of_them() {
    let escalation = Escalation::after(5, Duration::from_secs(3600));
    let server = tireless(local(4).escalation(escalation)).serve(async |shard: Shard| {
        Ok(service_fn(async move |request: Request| {
            assert!(request.uri().path() != "/panic", "a handler of the test's panics");
            Ok(Response::new(Body::from(format!("{} {}", shard.id(), shard.generation()))))
        }))
    });
    let site = Site::start(server);
    // Panics at random executors until one has had six.
    let mut panics = 0;
    while site.stats().executors.iter().all(|executor| executor.panics_contained <= 5) {
        let mut client = site.connect();
        assert_eq!(client.get("/panic").status, 500, "the last one is answered too");
        client.expect_end();
        panics += 1;
        assert!(panics <= 4 * 5 + 1, "six on one executor by now");
    }
    let stats = site.stats();
    let felled = stats.executors.iter().position(|executor| executor.panics_contained == 6).expect("one has six");
    eventually("it starts anew", || site.stats().executors[felled].generation == 2);
    let others = site.stats().executors;
    let others = others.iter().enumerate().filter(|(slot, _)| *slot != felled);
    assert!(others.into_iter().all(|(_, executor)| executor.generation == 1));
}

#[test]
fn without_escalation_panics_are_contained_for_ever() {
    let site = site(local(1).escalation(None), async |_, request| {
        assert!(request.uri().path() != "/panic", "a handler of the test's panics");
        Ok(None)
    });
    for count in 1..=150 {
        assert_eq!(site.connect().get("/panic").status, 500);
        assert_eq!(only(&site).panics_contained, count);
    }
    assert_eq!(site.connect().get("/").text(), "1");
}

/// Every place but the first start-up, which is the error of the start, and the handler, an escape and an abort, which
/// `panics_shown` has.
#[test]
fn the_log_has_each_panic_once_with_executor_generation_and_place() {
    if !alone("panics_by_place::the_log_has_each_panic_once_with_executor_generation_and_place") {
        return;
    }
    let log = Log::of_this_process();
    ringleader::install_panic_hook();
    let builder = tireless(local(1).escalation(None));
    let server = builder.serve(async move |shard: Shard| {
        assert!(shard.generation() != 2, "SCENE start-up");
        Ok(service_fn(async move |request: Request| {
            match request.uri().path() {
                "/body" => {
                    let body = Breaks { pieces: 0, declared: false, _again: None };
                    return Ok::<_, BoxError>(Response::new(Body::new(body)));
                }
                "/drop" => {
                    let body = EndsBadly(Some(Bytes::from_static(b"whole")), PanicsOnDrop);
                    return Ok(Response::new(Body::new(body)));
                }
                "/task" => drop(shard.spawn(async { panic!("SCENE task") })),
                "/blocking" => drop(shard.spawn_blocking(|| -> () { panic!("SCENE blocking") }).await),
                "/background" => shard.background("test", async { panic!("SCENE background") }),
                "/queue" => panic_on_glommio(true),
                _ => {}
            }
            Ok(Response::new(Body::from(shard.generation().to_string())))
        }))
    });
    let site = Site::start(server);
    // What ends the generation comes last; the one after that fails in its start-up.
    for (path, text, generation) in [
        ("/body", "a body of the test's panics", 1),
        ("/drop", "a drop of the test's panics", 1),
        ("/task", "SCENE task", 1),
        ("/blocking", "SCENE blocking", 1),
        ("/background", "SCENE background", 1),
        ("/", "SCENE start-up", 2),
        ("/queue", "a task of the test's on glommio panics", 3),
    ] {
        let mut client = site.connect();
        client.ask(path);
        let lines = || {
            let said = log.said();
            said.lines().filter(|line| line.contains(text)).map(str::to_owned).collect::<Vec<_>>()
        };
        eventually(path, || !lines().is_empty());
        let _ = client.try_answer();
        eventually("somebody serves", || site.connect().get("/").status == 200);
        let lines = lines();
        assert_eq!(lines.len(), 1, "{path}: {lines:#?}");
        for part in ["ERROR", "slot=0", &format!("generation={generation}"), "panics_by_place.rs:"] {
            assert!(lines[0].contains(part), "no {part}: {}", lines[0]);
        }
    }
}

/// Panics caught by the service itself are nobody's to log; that they may not be is what a few lines say.
#[test]
fn panics_that_a_service_catches_do_not_fill_the_log() {
    if !alone("panics_by_place::panics_that_a_service_catches_do_not_fill_the_log") {
        return;
    }
    let log = Log::of_this_process();
    ringleader::install_panic_hook();
    let site = Site::serving(async |_| {
        let caught = std::panic::catch_unwind(|| panic!("caught by the service"));
        Ok(Response::new(Body::from(if caught.is_err() { "caught" } else { "not" })))
    });
    let mut client = site.connect();
    for _ in 0..300 {
        assert_eq!(client.get("/").text(), "caught");
    }
    let said = log.said();
    let lines = said.lines().filter(|line| line.contains("caught by the service")).count();
    assert!((1..60).contains(&lines), "{lines} lines for 300:\n{said}");
}
