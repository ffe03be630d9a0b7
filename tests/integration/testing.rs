//! What embedders test with: services without a socket, and faults on order.

use std::sync::mpsc;
use std::time::Duration;

use ringleader::test::{self, App, Provocation, provoke, wait_until};
use ringleader::{
    Body, BodyError, BoxError, ExecutorState, Reject, Request, Response, Server, Service, Shard, Stats, StatusCode,
    Stop, TaskError, service_fn,
};

use crate::support::{BOUND, Site, local, settle};

/// Answers with executor and generation, or as the path says.
async fn start_up(shard: Shard) -> Result<impl Service, BoxError> {
    Ok(service_fn(async move |request: Request| {
        match request.uri().path() {
            "/echo" => return Ok(Response::new(Body::from(request.into_body().collect(10).await?))),
            "/blocking" => drop(shard.spawn_blocking(|| ()).await?),
            "/sleep" => shard.sleep(Duration::from_millis(1)).await,
            "/for-ever" => std::future::pending().await,
            "/reject" => return Err(Reject::new(StatusCode::CONFLICT, "no").into()),
            "/panic" => panic!("a handler of the test's panics"),
            _ => {}
        }
        Ok(Response::new(Body::from(format!("{} {}", shard.id(), shard.generation()))))
    }))
}

fn serves_in(generation: u64) -> impl FnMut(&Stats) -> bool {
    move |stats| stats.executors[0].generation == generation && stats.executors[0].state == ExecutorState::Serving
}

#[test]
fn a_service_is_called_on_a_real_executor_without_a_socket() {
    let app = App::start(start_up).expect("it starts");
    assert!(app.local_addrs().is_empty());
    for path in ["/", "/sleep", "/blocking"] {
        assert_eq!(app.get(path).expect("it answers").body(), "0 1");
    }
    let echo = |text: &'static str| app.call(Request::post("/echo").body(Body::from(text)).expect("it is a path"));
    assert_eq!(echo("hello").expect("it is short").body(), "hello");
    let error = echo("hello, hello").expect_err("it is long");
    assert!(error.downcast_ref::<BodyError>().is_some_and(BodyError::is_too_large), "{error}");
    assert!(settle(app.stop(Stop::Drain(Duration::from_secs(5)))).expect("it stops").drained);
}

#[test]
fn a_services_error_and_its_panic_come_back_as_such() {
    let app = App::start(start_up).expect("it starts");
    let error = app.get("/reject").expect_err("it is refused");
    assert_eq!(error.downcast_ref::<Reject>().map(Reject::status), Some(StatusCode::CONFLICT));
    let error = app.get("/panic").expect_err("it panics");
    assert!(error.downcast_ref::<TaskError>().is_some_and(TaskError::is_panic), "{error}");
    assert_eq!(app.get("/").expect("the executor lives").body(), "0 1");
}

#[test]
fn each_executor_of_a_service_without_a_socket_can_be_called() {
    let app = App::with(Server::builder().executors(3), start_up).expect("it starts");
    for slot in 0..3 {
        let request = Request::get("/").body(Body::empty()).expect("it is a path");
        assert_eq!(app.call_on(slot, request).expect("it answers").body(), format!("{slot} 1").as_bytes());
    }
    assert!(app.call_on(3, Request::new(Body::empty())).is_err());
}

#[test]
fn a_start_up_that_fails_says_why() {
    let error = App::start(async |_| match "42a".parse::<u8>() {
        Ok(_) => start_up_never().await,
        Err(error) => Err(error.into()),
    })
    .expect_err("it is no number");
    assert!(error.is_start() && error.to_string().contains("invalid digit"), "{error}");
}

async fn start_up_never() -> Result<impl Service, BoxError> {
    Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
}

#[test]
fn a_call_whose_executor_fails_is_an_error_and_the_next_meets_another_generation() {
    let (begins, began) = mpsc::channel();
    let app = App::start(async move |shard: Shard| {
        let begins = begins.clone();
        Ok(service_fn(async move |request: Request| {
            if request.uri().path() == "/for-ever" {
                begins.send(())?;
                std::future::pending::<()>().await;
            }
            Ok(Response::new(Body::from(shard.generation().to_string())))
        }))
    })
    .expect("it starts");
    std::thread::scope(|scope| {
        let call = scope.spawn(|| app.get("/for-ever"));
        began.recv_timeout(BOUND).expect("it is called");
        settle(provoke(&app, 0, Provocation::Restart)).expect("it serves");
        call.join().expect("no panic").expect_err("its executor has ended");
    });
    // Waits for the next generation.
    assert_eq!(app.get("/").expect("it answers").body(), "2");
}

#[test]
fn an_escaped_panic_can_be_provoked() {
    let site = Site::start(local(1).serve(start_up));
    let mut client = site.connect();
    assert_eq!(client.get("/").text(), "0 1");
    settle(provoke(&site, 0, Provocation::Panic)).expect("it serves");
    client.expect_end();
    wait_until(&site, serves_in(2));
    assert_eq!(test::get(site.address(), "/").expect("it answers").body(), "0 2");
}

#[test]
fn a_stall_can_be_provoked() {
    let site = Site::start(local(2).stall_limit(Duration::from_millis(10)).serve(start_up));
    // Long enough to be seen by one who looks every 2 ms, on any machine.
    settle(provoke(&site, 1, Provocation::Stall(Duration::from_secs(3)))).expect("it serves");
    let state = |stats: &ringleader::Stats| stats.executors[1].state;
    wait_until(&site, |stats| matches!(state(stats), ExecutorState::Stalled | ExecutorState::Starved));
    wait_until(&site, |stats| state(stats) == ExecutorState::Serving);
    assert_eq!(site.stats().executors[1].generation, 1);
}

#[test]
fn a_fault_where_nobody_is_is_refused() {
    let site = Site::start(local(2).serve(start_up));
    assert!(settle(provoke(&site, 2, Provocation::Panic)).is_err_and(|error| error.is_refused()));
    settle(site.scale(1)).expect("there are two");
    let idle = |stats: &Stats| stats.executors.iter().position(|executor| executor.state == ExecutorState::Idle);
    let idle = idle(&wait_until(&site, |stats| idle(stats).is_some())).expect("it has been waited for");
    assert!(settle(provoke(&site, idle, Provocation::Panic)).is_err_and(|error| error.is_refused()));
}

#[test]
fn a_call_that_nobody_will_ever_take_is_an_error_that_says_so() {
    let mut restart = ringleader::RestartPolicy::default();
    restart.quarantine_after = 1;
    let app = App::with(Server::builder().executors(2).restart(restart), start_up).expect("it starts");
    settle(provoke(&app, 1, Provocation::Restart)).expect("it serves");
    wait_until(&app, |stats| stats.executors[1].state == ExecutorState::Quarantined);
    let error = app.call_on(1, Request::new(Body::empty())).expect_err("nobody is there").to_string();
    assert!(error.contains("slot 1 does not answer: its executor failed too often"), "{error}");
    settle(app.stop(ringleader::Stop::Now)).expect("it stops");
    let error = app.get("/").expect_err("nobody is there").to_string();
    assert!(error.contains("slot 0 does not answer: the server has ended"), "{error}");
}
