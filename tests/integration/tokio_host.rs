//! A tokio runtime that the server is embedded in, found by services.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::mpsc;
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use http_body::Body as _;
use ringleader::{Body, BoxError, HttpLimits, Request, Response, Server, Shard, Stop, service_fn};
use tokio::runtime::{Builder, Handle, Runtime};

use crate::support::{BOUND, Site, local};

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime can be made")
}

/// Uses tokio in every way that needs its runtime, and says which thread a task of its ran on.
async fn use_tokio() -> Result<String, BoxError> {
    tokio::time::sleep(Duration::from_millis(1)).await;
    let slow = tokio::time::timeout(Duration::from_millis(1), std::future::pending::<()>());
    assert!(slow.await.is_err());
    let blocking = tokio::task::spawn_blocking(|| 1);
    let name = tokio::spawn(async { thread::current().name().unwrap_or_default().to_owned() });
    assert_eq!(blocking.await?, 1);
    Ok(name.await?)
}

fn serving(handle: Handle) -> Server {
    local(2).tokio(handle).serve(async |shard: Shard| {
        // In the start-up closure as well.
        use_tokio().await?;
        Ok(service_fn(async move |request: Request| {
            let text = match request.uri().path() {
                "/task" => shard.spawn(use_tokio()).await??,
                _ => use_tokio().await?,
            };
            Ok(Response::new(Body::from(text)))
        }))
    })
}

#[test]
fn handlers_tasks_and_the_start_up_closure_use_the_hosts_tokio() {
    let runtime = runtime();
    let site = Site::start(serving(runtime.handle().clone()));
    for path in ["/", "/task", "/"] {
        let answer = site.connect().get(path);
        assert_eq!(answer.status, 200);
        assert!(answer.text().starts_with("tokio-r"), "{}", answer.text());
    }
    assert_eq!(site.stats().executors.iter().map(|executor| executor.panics_contained).sum::<u64>(), 0);
}

#[test]
fn a_server_lives_in_a_tokio_program_of_one_thread() {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
    runtime.block_on(async {
        let running = serving(Handle::current()).start().await.expect("the server starts");
        let address = running.local_addrs()[0];
        // The client blocks, and the runtime must go on.
        let answer = tokio::task::spawn_blocking(move || crate::support::Client::connect(address).get("/").status);
        assert_eq!(answer.await.expect("the client does not panic"), 200);
        running.stop(Stop::Now).await.expect("the server stops");
    });
}

/// `let _guard = handle.enter();` before an await: tokio's guards nest like brackets, and the task's is open when its
/// executor's closes.
#[test]
fn a_guard_that_is_held_over_an_await_costs_its_request_only() {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let site = Site::start(local(1).tokio(handle.clone()).serve(async move |shard: Shard| {
        let handle = handle.clone();
        Ok(service_fn(async move |request: Request| {
            if request.uri().path() == "/guard" {
                let _guard = handle.enter();
                shard.sleep(Duration::from_millis(5)).await;
            }
            Ok(Response::new(Body::from(use_tokio().await?)))
        }))
    }));
    let mut kept = site.connect();
    assert_eq!(kept.get("/").status, 200);
    for _ in 0..3 {
        // Two at once leave in another order than that of their coming, too.
        let mut guilty = [site.connect(), site.connect()];
        guilty.iter_mut().for_each(|client| client.ask("/guard"));
        guilty.iter_mut().for_each(|client| assert_eq!(client.answer().status, 500));
        assert_eq!(kept.get("/").status, 200, "others find tokio as before");
    }
    let executor = &site.stats().executors[0];
    assert_eq!((executor.generation, executor.panics_contained), (1, 6));
    drop(site);
    // What is left in a thread-local of tokio's does not come along.
    let finds = async |_: Request| Ok(Response::new(Body::from(Handle::try_current().is_ok().to_string())));
    let site = Site::start(local(1).serve(async move |_| Ok(service_fn(finds))));
    assert_eq!(site.connect().get("/").text(), "false");
}

#[test]
fn what_a_generation_leaves_behind_finds_tokio_as_it_is_dropped() {
    struct SaysGoodbye(mpsc::Sender<bool>);
    impl Drop for SaysGoodbye {
        fn drop(&mut self) {
            let _ = self.0.send(Handle::try_current().is_ok());
        }
    }
    let (runtime, (sender, goodbyes)) = (runtime(), mpsc::channel());
    let site = Site::start(local(1).tokio(runtime.handle().clone()).serve(async move |shard: Shard| {
        let (in_task, in_service) = (SaysGoodbye(sender.clone()), SaysGoodbye(sender.clone()));
        shard.spawn(async move {
            let _kept = in_task;
            std::future::pending::<()>().await;
        });
        Ok(service_fn(async move |_: Request| {
            let _kept = &in_service;
            Ok(Response::new(Body::empty()))
        }))
    }));
    drop(site);
    assert_eq!([goodbyes.recv_timeout(BOUND), goodbyes.recv_timeout(BOUND)], [Ok(true), Ok(true)]);
}

#[test]
fn a_request_body_is_read_by_a_task_of_the_runtimes() {
    let (runtime, (sender, begun)) = (runtime(), mpsc::channel());
    let site = Site::start(local(1).tokio(runtime.handle().clone()).serve(async move |_| {
        let sender = sender.clone();
        Ok(service_fn(async move |request: Request| {
            let (mut body, sender) = (request.into_body(), sender.clone());
            // Looked for once here, where it waits with a time limit, and then there.
            let looked = poll_fn(|context| Poll::Ready(Pin::new(&mut body).poll_frame(context).is_pending())).await;
            let reader = tokio::spawn(async move {
                let _ = sender.send(looked);
                body.collect(1 << 20).await
            });
            Ok(Response::new(Body::from(reader.await??)))
        }))
    }));
    let mut client = site.connect();
    for piece in ["a", "few", "pieces"].map(|word| word.repeat(30_000)) {
        client.send(format!("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n", piece.len()));
        assert_eq!(begun.recv_timeout(BOUND), Ok(true));
        client.send(&piece);
        assert_eq!(client.answer().text(), piece);
    }
}

#[test]
fn a_body_that_stalls_is_answered_with_408_by_whomever_it_is_read() {
    let runtime = runtime();
    let mut limits = HttpLimits::default();
    (limits.body_timeout, limits.hibernate_after) = (Some(Duration::from_secs(1)), Some(Duration::from_millis(50)));
    let host = runtime.handle().clone();
    let site = Site::start(local(1).http_limits(limits).serve(async move |_| {
        let host = host.clone();
        Ok(service_fn(async move |request: Request| {
            let bytes = host.spawn(request.into_body().collect(1 << 20)).await??;
            Ok(Response::new(Body::from(bytes)))
        }))
    }));
    let mut client = site.connect();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\n");
    client.send("hello");
    assert_eq!(client.answer().text(), "hello");
    let start = Instant::now();
    client.send("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 10\r\n\r\nhalf");
    let answer = client.answer();
    assert_eq!(answer.status, 408);
    assert!(answer.closes());
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[test]
fn an_executor_is_no_part_of_the_runtime() {
    let runtime = runtime();
    let site = Site::start(local(1).tokio(runtime.handle().clone()).serve(async |_| {
        Ok(service_fn(async |_: Request| {
            Ok(Response::new(Body::from(std::fs::read_to_string("/proc/thread-self/comm")?)))
        }))
    }));
    assert_eq!(site.connect().get("/").text(), "ringleader-0\n");
}
