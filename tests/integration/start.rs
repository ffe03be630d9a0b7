//! Starting, and what happens when that fails, at first or later.

use std::io::{ErrorKind, Read};
use std::net::TcpListener;
use std::ops::RangeInclusive;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use ringleader::{
    Body, BoxError, Builder, Escalation, ExecutorState, HangPolicy, HttpLimits, Overload, ReadinessPolicy, Request,
    Response, RestartPolicy, Scaling, Server, Shard, StatusCode, Steering, Stop, service_fn,
};

use crate::support::{BOUND, Client, Site, echo, eventually, expect_refusal, local, settle};

/// A builder for an address that nobody else in these tests uses, whatever the port.
fn of_its_own(host: u8) -> (Builder, String) {
    let listener = TcpListener::bind(format!("127.0.77.{host}:0")).expect("all of 127/8 is the loopback");
    let address = listener.local_addr().expect("it is bound").to_string();
    (Server::builder().listen(address.as_str()), address)
}

/// The server does not start, says why in `words`, and leaves the address to the next one.
fn expect_failure(server: Server, address: &str, words: &[&str]) {
    let error = settle(server.start()).expect_err("it cannot start");
    assert!(error.is_start(), "{error:?}");
    for word in words {
        assert!(error.to_string().contains(word), "no {word:?} in: {error}");
    }
    // Not at once, since other tests fork: their children hold every descriptor until they exec.
    eventually("the address is free", || {
        let next = Server::builder().listen(address).executors(1).serve(async |_| Ok(service_fn(echo)));
        let Ok(next) = settle(next.start()) else { return false };
        assert_eq!(Client::connect(next.local_addrs()[0]).get("/").status, 200);
        true
    });
}

#[test]
fn a_start_up_that_fails_on_one_executor_fails_the_server() {
    let (builder, address) = of_its_own(1);
    let server = builder.executors(4).serve(async |shard: Shard| {
        if shard.id().index() == 2 {
            return Err("the database is away".into());
        }
        Ok(service_fn(echo))
    });
    expect_failure(server, &address, &["executor 2 ", "the database is away"]);
}

#[test]
fn a_start_up_that_panics_on_one_executor_fails_the_server() {
    let (builder, address) = of_its_own(2);
    let server = builder.executors(4).serve(async |shard: Shard| {
        assert!(shard.id().index() != 1, "the start-up of the test's panics");
        Ok(service_fn(echo))
    });
    expect_failure(server, &address, &["executor 1 ", "the start-up of the test's panics"]);
}

#[test]
fn a_start_up_that_takes_too_long_fails_the_server() {
    let (builder, address) = of_its_own(3);
    let server = builder.executors(2).start_timeout(Duration::from_millis(200)).serve(async |shard: Shard| {
        if shard.id().index() == 0 {
            std::future::pending::<()>().await;
        }
        Ok(service_fn(echo))
    });
    expect_failure(server, &address, &["executor 0 ", "too long"]);
}

#[test]
fn a_start_up_that_blocks_its_thread_fails_the_server_too() {
    let (builder, address) = of_its_own(6);
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let server = builder.executors(2).start_timeout(Duration::from_millis(200)).serve(async move |shard: Shard| {
        if shard.id().index() == 1 {
            // Nobody can end it from outside.
            let _ = released.lock().expect("nobody panics with it").recv();
        }
        Ok(service_fn(echo))
    });
    let error = settle(server.start()).expect_err("it cannot start");
    assert!(error.is_start(), "{error:?}");
    assert!(error.to_string().contains("executor 1 "), "{error}");
    drop(release);
    eventually("the thread has come back, and has let go of the address", || {
        settle(Server::builder().listen(address.as_str()).executors(1).serve(async |_| Ok(service_fn(echo))).start())
            .is_ok()
    });
}

#[test]
fn nobody_is_served_before_every_executor_has_started() {
    let (builder, _) = of_its_own(4);
    let started = Arc::new(AtomicUsize::new(0));
    let server = {
        let started = Arc::clone(&started);
        builder.executors(3).serve(async move |shard: Shard| {
            shard.sleep(Duration::from_millis(20) * shard.id().index() as u32).await;
            started.fetch_add(1, Ordering::Relaxed);
            Ok(service_fn(echo))
        })
    };
    let site = Site::start(server);
    assert_eq!(started.load(Ordering::Relaxed), 3);
    assert!(site.stats().ready);
    assert!(site.stats().executors.iter().all(|executor| executor.generation == 1));
}

#[test]
fn the_thread_that_starts_a_server_is_left_alone() {
    let (mut quiet, _peer) = UnixStream::pair().expect("descriptors are free");
    quiet.set_read_timeout(Some(Duration::from_millis(300))).expect("it can have a timeout");
    let _site = Site::serving(echo);
    // A ring made on this thread would interrupt it when it is taken down.
    let error = quiet.read(&mut [0]).expect_err("nothing is sent");
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_server_that_cannot_be_is_a_usage_error() {
    let serve = |builder: Builder| {
        let server = builder.serve(async |_| Ok(service_fn(echo)));
        settle(server.start()).expect_err("it cannot be")
    };
    for (builder, word) in [
        (Server::builder(), "address"),
        (Server::builder().listen("nonsense"), "nonsense"),
        (Server::builder().listen("127.0.0.1"), "port"),
        (local(0), "`executors` was given as 0"),
        (Server::builder().executors(0..=4), "`executors` was given as 0"),
        (Server::builder().executors(RangeInclusive::new(4, 2)), "4 to 2 executors"),
        (local(9999), "9999 executors"),
        (local(1).cpus([999]), "999"),
        (local(1).cpus([]), "CPU"),
        (local(2).share_port(true).steering(Steering::LeastLoaded), "shared"),
        (local(2).share_port(true).steering(Steering::Hash), "shared"),
    ] {
        let error = serve(builder);
        assert!(error.is_usage(), "{error:?}");
        assert!(error.to_string().contains(word), "no {word:?} in: {error}");
    }
}

/// What the command's flags refuse, the library refuses as well, and does not take it for something else.
#[test]
fn a_setting_that_cannot_work_is_a_usage_error_that_names_it() {
    const NO_TIME: Duration = Duration::ZERO;
    let http = |set: fn(&mut HttpLimits)| {
        let mut limits = HttpLimits::default();
        set(&mut limits);
        local(1).http_limits(limits)
    };
    let overload = |set: fn(&mut Overload)| {
        let mut limits = Overload::default();
        set(&mut limits);
        local(1).overload(limits)
    };
    let scaling = |set: fn(&mut Scaling)| {
        let mut scaling = Scaling::default();
        set(&mut scaling);
        local(1).executors(1..=2).scaling(scaling)
    };
    let restart = |set: fn(&mut RestartPolicy)| {
        let mut restart = RestartPolicy::default();
        set(&mut restart);
        local(1).restart(restart)
    };
    let mut readiness = ReadinessPolicy::default();
    readiness.unfit_max = 1.1;
    for (builder, setting, given) in [
        (local(1).name("a\0b"), "`name`", r"a\0b"),
        (local(1).connections_max(0), "`connections_max`", "0"),
        (local(1).descriptors_per_connection(0), "`descriptors_per_connection`", "0"),
        (local(1).backlog(0), "`backlog`", "0"),
        (local(1).blocking_threads_max(0), "`blocking_threads_max`", "0"),
        (local(1).keepalive(Some(NO_TIME)), "`keepalive`", "0ns"),
        (local(1).user_timeout(Some(NO_TIME)), "`user_timeout`", "0ns"),
        (http(|limits| limits.header_timeout = Some(NO_TIME)), "`HttpLimits::header_timeout`", "0ns"),
        (http(|limits| limits.idle_timeout = Some(NO_TIME)), "`HttpLimits::idle_timeout`", "0ns"),
        (http(|limits| limits.body_timeout = Some(NO_TIME)), "`HttpLimits::body_timeout`", "0ns"),
        (http(|limits| limits.send_timeout = Some(NO_TIME)), "`HttpLimits::send_timeout`", "0ns"),
        (http(|limits| limits.header_bytes_max = 8191), "`HttpLimits::header_bytes_max`", "8191"),
        (http(|limits| limits.headers_max = 0), "`HttpLimits::headers_max`", "0"),
        (http(|limits| limits.headers_max = usize::MAX), "`HttpLimits::headers_max`", "18446744073709551615"),
        (http(|limits| limits.headers_max = 10_001), "`HttpLimits::headers_max`", "10001"),
        (http(|limits| limits.header_bytes_max = usize::MAX), "`HttpLimits::header_bytes_max`", "18446744073709551615"),
        (overload(|limits| limits.retry_after = Duration::MAX), "`Overload::retry_after`", "a day"),
        (local(1).blocking_threads_max(usize::MAX), "`blocking_threads_max`", "18446744073709551615"),
        (overload(|limits| limits.in_flight_max = Some(0)), "`Overload::in_flight_max`", "0"),
        (overload(|limits| limits.delay_max = Some(NO_TIME)), "`Overload::delay_max`", "0ns"),
        (restart(|restart| restart.quarantine_window = NO_TIME), "`RestartPolicy::quarantine_window`", "0ns"),
        (restart(|restart| restart.jitter = -0.1), "`RestartPolicy::jitter`", "-0.1"),
        (restart(|restart| restart.jitter = f32::NAN), "`RestartPolicy::jitter`", "NaN"),
        (restart(|restart| restart.leaked_max = 0), "`RestartPolicy::leaked_max`", "0"),
        (local(1).readiness(readiness), "`ReadinessPolicy::unfit_max`", "1.1"),
        (local(1).stop_grace(Duration::from_millis(99)), "`stop_grace`", "99ms"),
        (local(1).standstill_limit(NO_TIME), "`standstill_limit`", "0ns"),
        (local(1).stale_after(NO_TIME), "`stale_after`", "0ns"),
        (local(1).escalation(Escalation::after(3, NO_TIME)), "`Escalation::within`", "0ns"),
        (local(1).start_timeout(NO_TIME), "`start_timeout`", "0ns"),
        (local(1).upgrade_timeout(NO_TIME), "`upgrade_timeout`", "0ns"),
        (local(1).stall_limit(Duration::from_micros(999)), "`stall_limit`", "999µs"),
        (local(1).hang(HangPolicy::Replace, Some(NO_TIME)), "`hang`", "0ns"),
        (scaling(|scaling| scaling.high = 1.5), "`Scaling::high`", "1.5"),
        (scaling(|scaling| scaling.high = f32::NAN), "`Scaling::high`", "NaN"),
        (scaling(|scaling| scaling.low = 0.7), "`Scaling::low`", "0.7"),
        (scaling(|scaling| scaling.period = NO_TIME), "`Scaling::period`", "0ns"),
        (scaling(|scaling| scaling.up_after = 0), "`Scaling::up_after`", "0"),
        (scaling(|scaling| scaling.step_up = 0), "`Scaling::step_up`", "0"),
        (scaling(|scaling| scaling.step_down = 0), "`Scaling::step_down`", "0"),
    ] {
        let error = settle(builder.serve(async |_| Ok(service_fn(echo))).start()).expect_err("it cannot be");
        assert!(error.is_usage(), "{setting}: {error:?}");
        let text = error.to_string();
        assert!(text.contains(setting) && text.contains(given), "no {setting} and {given} in: {text}");
        assert!(text.contains("least") || text.contains("give") || text.contains("has no"), "what is allowed: {text}");
    }
}

/// Zeroes that do mean something.
#[test]
fn settings_of_zero_that_say_what_they_mean_are_taken() {
    let mut limits = HttpLimits::default();
    (limits.body_bytes_max, limits.hibernate_after) = (0, Some(Duration::ZERO));
    let mut restart = RestartPolicy::default();
    (restart.quarantine_after, restart.backoff_base) = (0, Duration::ZERO);
    restart.quarantine_window = Duration::ZERO;
    let builder = local(1).http_limits(limits).restart(restart).drain_timeout(Duration::ZERO).blocking_queue_max(0);
    let site = Site::start(builder.serve(async |_| Ok(service_fn(echo))));
    assert_eq!(site.connect().get("/").status, 200);
}

#[test]
fn an_address_in_use_is_a_listen_error() {
    let site = Site::serving(echo);
    let second = Server::builder().listen(site.address()).executors(1).serve(async |_| Ok(service_fn(echo)));
    let error = settle(second.start()).expect_err("the address is taken");
    assert!(error.is_listen(), "{error:?}");
    assert!(error.to_string().contains("in use"), "{error}");
    assert_eq!(site.connect().get("/").status, 200);
}

/// A server that answers each request with its name.
fn named(builder: Builder, name: &'static str) -> Server {
    builder.serve(async move |_| Ok(service_fn(async move |_| Ok::<_, BoxError>(Response::new(Body::from(name))))))
}

/// Who answers `count` connections, one after the other.
fn who_answers(address: std::net::SocketAddr, count: usize) -> Vec<String> {
    (0..count).map(|_| Client::connect(address).get("/").text().to_owned()).collect()
}

#[test]
fn servers_that_share_a_port_each_get_a_part_of_the_connections() {
    let (builder, address) = of_its_own(5);
    let first = Site::start(named(builder.executors(2).share_port(true), "first"));
    let second = Server::builder().listen(address.as_str()).executors(2).share_port(true);
    let second = Site::start(named(second, "second"));
    assert!(second.steering().starts_with("by the kernel, since the port is shared"), "{}", second.steering());
    // A hash that the kernel seeds spreads them: that one server gets none of 200 has a chance of 2 in 2^200.
    let answers = who_answers(first.address(), 200);
    for name in ["first", "second"] {
        assert!(answers.iter().any(|answer| answer == name), "no connection for the {name} of {answers:?}");
    }
    drop(second);
    assert_eq!(first.connect().get("/").text(), "first");
}

#[test]
fn a_server_that_does_not_share_its_port_keeps_all_its_connections() {
    let (builder, address) = of_its_own(7);
    let site = Site::start(named(builder.executors(2), "not sharing"));
    let other = Server::builder().listen(address.as_str()).executors(2).share_port(true);
    let other = Site::start(named(other, "sharing"));
    let answers = who_answers(site.address(), 60);
    assert!(answers.iter().all(|answer| answer == "not sharing"), "{answers:?}");
    drop(other);
    let answers = who_answers(site.address(), 20);
    assert!(answers.iter().all(|answer| answer == "not sharing"), "{answers:?}");
}

#[test]
fn a_server_of_one_executor_that_does_not_share_its_port_is_not_joined() {
    let (builder, address) = of_its_own(8);
    let site = Site::start(named(builder.executors(1), "alone"));
    let other = Server::builder().listen(address.as_str()).executors(2).share_port(true);
    let error = settle(named(other, "sharing").start()).expect_err("the address is taken");
    assert!(error.is_listen(), "{error:?}");
    assert_eq!(site.connect().get("/").text(), "alone");
}

#[test]
fn a_shared_port_is_served_by_the_executors_that_can() {
    let (builder, address) = of_its_own(9);
    // Two of three listeners have no executor, and connections come to them all the same.
    let site = Site::start(named(builder.executors(1..=3).share_port(true), "one"));
    assert_eq!(who_answers(address.parse().expect("it is one"), 30), vec!["one"; 30]);
    assert!(site.stats().executors.iter().skip(1).all(|executor| executor.accepted == 0), "{:?}", site.stats());
}

#[test]
fn executors_that_keep_failing_are_given_up_one_by_one() {
    let mut restart = RestartPolicy::default();
    restart.backoff_base = Duration::from_millis(1);
    restart.backoff_max = Duration::from_millis(5);
    restart.quarantine_after = 3;
    // Executors with a lower index fail, in every generation.
    let doomed = Arc::new(AtomicUsize::new(0));
    let server = {
        let doomed = Arc::clone(&doomed);
        local(4).restart(restart).serve(async move |shard: Shard| {
            let (doomed, watching) = (Arc::clone(&doomed), shard.clone());
            shard.background("doom", async move {
                while doomed.load(Ordering::Relaxed) <= watching.id().index() {
                    watching.sleep(Duration::from_millis(1)).await;
                }
                Err("doomed by the test".into())
            });
            Ok(service_fn(async move |_: Request| {
                let mut response = Response::new(Body::from(shard.id().to_string()));
                if !shard.is_ready() {
                    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                }
                Ok(response)
            }))
        })
    };
    let running = Site::start(server).into_running();
    let handle = running.handle();
    let generation = |slot: usize| handle.stats().executors[slot].generation;
    let state = |slot: usize| handle.stats().executors[slot].state;
    for (count, ready) in [(1, true), (2, true), (3, false)] {
        doomed.store(count, Ordering::Relaxed);
        eventually("the slot is given up", || state(count - 1) == ExecutorState::Quarantined);
        eventually("readiness follows", || handle.stats().ready == ready);
        let status = if ready { 200 } else { 503 };
        eventually("handlers know", || Client::connect(handle.local_addrs()[0]).get("/").status == status);
        for _ in 0..40 {
            let answer = Client::connect(handle.local_addrs()[0]).get("/");
            let slot: usize = answer.text().parse().expect("a slot's number");
            assert!((count..4).contains(&slot), "{slot} answers");
        }
    }
    assert_eq!((0..4).map(generation).collect::<Vec<_>>(), [3, 3, 3, 1]);
    doomed.store(4, Ordering::Relaxed);
    let error = settle(running.join()).expect_err("nothing is left that serves");
    assert!(error.is_quarantined(), "{error:?}");
    assert!(error.to_string().contains("doomed by the test"), "{error}");
    assert!(!handle.stats().ready);
    expect_refusal(handle.local_addrs()[0]);
}

/// What is not refused works: times that no clock can add up are no limit, counts that nothing reaches are none either.
#[test]
fn the_largest_settings_that_are_taken_serve_and_stop() {
    const EVER: Option<Duration> = Some(Duration::MAX);
    let mut limits = HttpLimits::default();
    limits.header_timeout = EVER;
    limits.idle_timeout = EVER;
    limits.hibernate_after = EVER;
    limits.body_timeout = EVER;
    limits.send_timeout = EVER;
    limits.half_close_timeout = EVER;
    limits.linger_timeout = EVER;
    limits.header_bytes_max = 1024 * 1024;
    limits.headers_max = 10_000;
    limits.body_bytes_max = u64::MAX;
    let mut overload = Overload::default();
    overload.in_flight_max = Some(u64::MAX);
    overload.delay_max = EVER;
    overload.retry_after = Duration::from_secs(86_400);
    let mut restart = RestartPolicy::default();
    restart.backoff_base = Duration::MAX;
    restart.backoff_max = Duration::MAX;
    restart.healthy_after = Duration::MAX;
    restart.quarantine_after = u32::MAX;
    restart.quarantine_window = Duration::MAX;
    let mut scaling = Scaling::default();
    scaling.period = Duration::MAX;
    (scaling.up_after, scaling.down_after, scaling.reversal_penalty) = (u32::MAX, u32::MAX, u32::MAX);
    (scaling.emergency_after, scaling.emergency_queue, scaling.order_hold) = (u32::MAX, u32::MAX, u32::MAX);
    (scaling.step_up, scaling.step_down, scaling.emergency_step) = (u16::MAX, u16::MAX, u16::MAX);
    let builder = local(1)
        .executors(1..=2)
        .name(&"n".repeat(1000))
        .connections_max(u64::MAX)
        .backlog(u32::MAX)
        .keepalive(EVER)
        .user_timeout(EVER)
        .drain_timeout(Duration::MAX)
        .start_timeout(Duration::MAX)
        .upgrade_timeout(Duration::MAX)
        .stall_limit(Duration::MAX)
        .hang(HangPolicy::Replace, EVER)
        .blocking_threads_max(32_768)
        .blocking_queue_max(usize::MAX)
        .escalation(Some(Escalation::after(u32::MAX, Duration::MAX)))
        .http_limits(limits)
        .overload(overload)
        .restart(restart)
        .scaling(scaling);
    let server = builder.serve(async |shard: Shard| {
        Ok(service_fn(async move |_: Request| {
            shard.spawn_blocking(|| ()).await?;
            Ok(Response::new(Body::empty()))
        }))
    });
    let running = settle(server.start()).expect("it starts");
    let mut client = Client::connect(running.local_addrs()[0]);
    assert_eq!(client.get("/").status, 200);
    // The first restart is at once.
    let panic = ringleader::test::Provocation::Panic;
    settle(ringleader::test::provoke(&running, 0, panic)).expect("it is provoked");
    ringleader::test::wait_until(&running, |stats| stats.executors[0].generation == 2 && stats.ready);
    drop(client);
    assert_eq!(Client::connect(running.local_addrs()[0]).get("/").status, 200);
    let exit = settle(running.stop(Stop::Drain(Duration::MAX))).expect("it stops");
    assert!(exit.drained, "{exit:?}");
}

#[test]
fn a_start_that_nobody_waits_for_any_more_is_given_up() {
    struct Tells(mpsc::Sender<()>);
    impl Drop for Tells {
        fn drop(&mut self) {
            self.0.send(()).expect("the test waits");
        }
    }
    let (builder, address) = of_its_own(31);
    let (begins, begun) = mpsc::channel();
    let (ends, ended) = mpsc::channel();
    let server = builder.executors(1).start_timeout(Duration::from_secs(3600)).serve(async move |_| {
        let _at_the_end = Tells(ends.clone());
        begins.send(()).expect("the test waits");
        std::future::pending::<()>().await;
        Ok(service_fn(echo))
    });
    let starting = server.start();
    begun.recv().expect("it starts");
    drop(starting);
    ended.recv_timeout(BOUND).expect("its start-up closure is dropped, and not when its time is over");
    eventually("the address is free", || TcpListener::bind(&address).is_ok());
}

#[test]
fn a_builder_with_sharded_state_can_be_started_again_after_a_start_that_failed_and_after_an_end() {
    let mut builder = local(2);
    let counter = builder.sharded("counter", async |_: Shard| Ok(std::cell::Cell::new(0_u32)));
    let attempts = Arc::new(AtomicUsize::new(0));
    let server = || {
        let (counter, attempts) = (counter.clone(), Arc::clone(&attempts));
        builder.clone().serve(async move |shard: Shard| {
            if attempts.fetch_add(1, Ordering::Relaxed) < 2 {
                return Err("the database is not there yet".into());
            }
            let counter = counter.clone();
            Ok(service_fn(async move |_: Request| {
                let peers = counter.peers();
                let counted =
                    counter.call_all(async |count: std::rc::Rc<std::cell::Cell<u32>>| count.replace(1)).await?;
                assert!(peers.iter().any(|slot| slot == shard.id()));
                let sum: u32 = counted.into_iter().map(|(_, count)| count.expect("it answers")).sum();
                Ok(Response::new(Body::from(sum.to_string())))
            }))
        })
    };
    let error = settle(server().start()).expect_err("it fails");
    assert!(error.is_start(), "{error:?}");
    let running = loop {
        match settle(server().start()) {
            Ok(running) => break running,
            Err(error) => assert!(error.is_start(), "{error:?}"),
        }
    };
    let get = |running: &ringleader::Running| Client::connect(running.local_addrs()[0]).get("/").text().to_owned();
    assert_eq!((get(&running), get(&running)), ("0".to_owned(), "2".to_owned()));
    let error = settle(server().start()).expect_err("the other one runs");
    assert!(error.is_usage() && error.to_string().contains("another copy"), "{error:?}");
    settle(running.stop(Stop::Now)).expect("it stops");
    let running = settle(server().start()).expect("it starts again");
    assert_eq!(get(&running), "0", "its state is its own");
    settle(running.stop(Stop::Now)).expect("it stops");
}
