//! More executors and fewer: by order and by load, with nothing lost.

use std::cell::RefCell;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ringleader::{Body, Builder, ExecutorState, Request, Response, Scaling, Stop, service_fn};

use crate::support::held::{Held, Thread, own_descriptors, threads};
use crate::support::{BOUND, Client, Gate, Site, alone, echo, eventually, local, settle};

const MIB: usize = 1024 * 1024;

/// Answers with its executor; `/slow` waits at the gate, `/busy` keeps its thread for 5 ms.
fn site(builder: Builder) -> (Site, Gate) {
    let gate = Gate::shut();
    let server = {
        let gate = gate.clone();
        builder.serve(async move |shard: ringleader::Shard| {
            let gate = gate.clone();
            Ok(service_fn(async move |request: Request| {
                match request.uri().path() {
                    "/slow" => gate.passed().await,
                    "/busy" => std::thread::sleep(Duration::from_millis(5)),
                    _ => {}
                }
                Ok(Response::new(Body::from(shard.id().to_string())))
            }))
        })
    };
    (Site::start(server), gate)
}

fn serving(site: &Site) -> usize {
    site.stats().executors.iter().filter(|executor| executor.state == ExecutorState::Serving).count()
}

fn idle_executors(site: &Site) -> usize {
    site.stats().executors.iter().filter(|executor| executor.state == ExecutorState::Idle).count()
}

#[test]
fn an_order_takes_executors_away_and_brings_them_back() {
    let (site, gate) = site(local(4));
    let mut slow: Vec<Client> = (0..16).map(|_| site.connect()).collect();
    slow.iter_mut().for_each(|client| client.ask("/slow"));
    eventually("the handlers run", || {
        site.stats().executors.iter().map(|executor| executor.in_flight).sum::<u64>() == 16
    });
    settle(site.scale(1)).expect("there are four slots");
    eventually("one serves", || serving(&site) == 1);
    for _ in 0..20 {
        assert_eq!(site.connect().get("/").text().len(), 1);
    }
    gate.open();
    slow.iter_mut().for_each(|client| assert_eq!(client.answer().status, 200));
    eventually("the others have gone", || idle_executors(&site) == 3);
    settle(site.scale(4)).expect("there are four slots");
    eventually("all serve", || serving(&site) == 4);
    let mut met = std::collections::HashSet::new();
    eventually("each is met", || {
        met.insert(site.connect().get("/").text().to_owned());
        met.len() == 4
    });
    assert!(settle(site.stop(Stop::Drain(BOUND))).expect("it stops").drained);
}

const MOST: usize = 8;
const GONE: usize = MOST - 1;

/// A server with one executor, in a process of its own, that has had more and traffic on them; what it held before, and what
/// with all. Threads that nobody needs wait for so long.
fn grown_and_shrunk(thread_keep_alive: Duration) -> (Site, Held, Held) {
    let mut scaling = Scaling::default();
    scaling.period = Duration::from_secs(3600); // by order only
    let builder = local(1).executors(1..=MOST).scaling(scaling).trim_heap(true).thread_keep_alive(thread_keep_alive);
    let site = Site::start(builder.name("scaled").serve(async |_: ringleader::Shard| Ok(service_fn(echo))));
    let traffic = || {
        let idle = own_descriptors();
        let mut clients: Vec<Client> = (0..64).map(|_| site.connect()).collect();
        let request = format!("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 16384\r\n\r\n{}", "x".repeat(16384));
        clients.iter_mut().for_each(|client| client.send(&request));
        clients.iter_mut().for_each(|client| assert_eq!(client.answer().status, 200));
        drop(clients);
        eventually("their sockets are closed on both sides", || own_descriptors() == idle);
    };
    traffic();
    let before = Held::now();
    grow(&site);
    traffic();
    let grown = Held::now();
    settle(site.scale(1)).expect("there are as many slots");
    eventually("the others have gone", || idle_executors(&site) == GONE);
    (site, before, grown)
}

fn grow(site: &Site) {
    settle(site.scale(MOST)).expect("there are as many slots");
    eventually("all serve", || serving(site) == MOST);
}

#[test]
fn an_executor_that_goes_leaves_a_thread_for_the_next_that_costs_no_time() {
    if !alone("scaling::an_executor_that_goes_leaves_a_thread_for_the_next_that_costs_no_time") {
        return;
    }
    let (site, before, grown) = grown_and_shrunk(Duration::MAX);
    // Of glommio's executor: three rings and what wakes it. Ours, its eventfds and timers are gone.
    let waits = |kind: &str| match kind {
        "io_uring" => 3,
        "eventfd" => 1,
        _ => 0,
    };
    for (kind, count) in &grown.descriptors {
        let expected = before.count(kind) + GONE * waits(kind);
        eventually(&format!("of kind {kind}, which were {count}, there are {expected}"), || {
            Held::now().count(kind) == expected
        });
    }
    eventually("its memory is given back", || Held::now().heap < before.heap + GONE * 256 * 1024);
    // Of more than 2 MiB for each; a thread of this test may have left its stack behind.
    eventually("receive buffers are given back", || Held::now().data + GONE * 3 * MIB / 2 < grown.data);
    // Each with one of glommio's.
    let came = |thread: &Thread| {
        let is_it = |other: &Thread| other.id == thread.id;
        grown.threads.iter().any(is_it) && !before.threads.iter().any(is_it)
    };
    let waiting = || threads().into_iter().filter(came).collect::<Vec<_>>();
    eventually("their threads wait", || waiting().len() == 2 * GONE);
    // Once they have given back what the allocator keeps.
    std::thread::sleep(Duration::from_secs(2));
    eventually("they sleep for good", || {
        let before = waiting();
        std::thread::sleep(Duration::from_secs(2));
        waiting() == before
    });
    grow(&site);
    assert_eq!(waiting().len(), 2 * GONE, "they are used again");
    assert_eq!(Held::now().descriptors, grown.descriptors);
    assert_eq!(site.stats().descriptors_leaked, 0);
}

#[test]
fn what_an_executor_had_is_given_back_when_its_thread_has_waited_in_vain() {
    if !alone("scaling::what_an_executor_had_is_given_back_when_its_thread_has_waited_in_vain") {
        return;
    }
    let (site, before, grown) = grown_and_shrunk(Duration::ZERO);
    for (kind, count) in &grown.descriptors {
        // One of glommio's for each.
        let expected = before.count(kind) + if kind == "eventfd" { GONE } else { 0 };
        eventually(&format!("of kind {kind}, which were {count}, there are {expected}"), || {
            Held::now().count(kind) == expected
        });
    }
    assert_eq!(site.stats().descriptors_leaked, GONE as u64);
    eventually("their threads have ended", || threads().len() <= before.threads.len());
    eventually("no memory is pinned for them", || Held::now().pinned_kib == before.pinned_kib);
    // 1.5 KiB for each is glommio's; what else differs is lists that have grown.
    eventually("their memory is given back", || Held::now().heap < before.heap + GONE * 16 * 1024);
    eventually("and with it the pages", || Held::now().anonymous < before.anonymous + GONE * 128 * 1024);
    println!("from {before:?}\nby {grown:?}\nto {:?}", Held::now());
    grow(&site);
}

#[test]
fn what_a_slot_has_counted_stays_when_its_executor_goes() {
    let (site, _gate) = site(local(4).thread_keep_alive(Duration::ZERO));
    let total = || {
        let stats = site.stats();
        let sum = |count: fn(&ringleader::ExecutorStats) -> u64| stats.executors.iter().map(count).sum::<u64>();
        (sum(|executor| executor.accepted), sum(|executor| executor.requests), sum(|executor| executor.open))
    };
    for round in 1..=3 {
        (0..40).for_each(|_| assert_eq!(site.connect().get("/").status, 200));
        eventually("all are counted", || total() == (40 * round, 40 * round, 0));
        settle(site.scale(1)).expect("there are four slots");
        eventually("three have gone", || idle_executors(&site) == 3);
        assert_eq!(total(), (40 * round, 40 * round, 0));
        settle(site.scale(4)).expect("there are four slots");
        eventually("all serve", || serving(&site) == 4);
        assert_eq!(total(), (40 * round, 40 * round, 0));
    }
}

#[test]
fn an_order_out_of_range_is_refused_and_changes_nothing() {
    let (site, _gate) = site(local(2));
    for count in [0, 3, 1_000_000] {
        let error = settle(site.scale(count)).expect_err("there are two slots");
        assert!(error.is_refused(), "{error:?}");
        assert!(error.to_string().contains("1 to 2"), "{error}");
    }
    assert_eq!(serving(&site), 2);
}

#[test]
fn an_order_to_a_server_that_has_ended_is_refused() {
    let (site, _gate) = site(local(1));
    let handle = (*site).clone();
    settle(site.stop(Stop::Now)).expect("it stops");
    assert!(settle(handle.scale(1)).expect_err("it has ended").is_refused());
}

#[test]
fn orders_under_traffic_lose_nothing() {
    orders_under_traffic(local(4));
}

/// An executor that is to start may meet the thread of one that has gone as that ends.
#[test]
fn orders_under_traffic_lose_nothing_while_threads_end() {
    orders_under_traffic(local(4).thread_keep_alive(Duration::ZERO));
}

fn orders_under_traffic(builder: Builder) {
    let (site, _gate) = site(builder);
    let (done, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (done, served, address) = (Arc::clone(&done), Arc::clone(&served), site.address());
            std::thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(Client::connect(address).get("/").status, 200);
                    served.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for round in 0..60 {
        settle(site.scale([1, 4, 2, 3][round % 4])).expect("there are four slots");
        let before = served.load(Ordering::Relaxed);
        eventually("clients are served", || served.load(Ordering::Relaxed) >= before + 8);
    }
    done.store(true, Ordering::Relaxed);
    clients.into_iter().for_each(|client| client.join().expect("every connection was answered"));
}

#[test]
fn executors_follow_the_load() {
    let mut scaling = Scaling::default();
    (scaling.period, scaling.up_after, scaling.down_after) = (Duration::from_millis(50), 2, 4);
    let server = local(1).executors(1..=3).scaling(scaling);
    let (site, _gate) = site(server);
    assert_eq!((serving(&site), idle_executors(&site)), (1, 2), "it starts with the fewest");
    let done = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..12)
        .map(|_| {
            let (done, address) = (Arc::clone(&done), site.address());
            std::thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(Client::connect(address).get("/busy").status, 200);
                }
            })
        })
        .collect();
    eventually("there are as many as there may be", || serving(&site) == 3);
    done.store(true, Ordering::Relaxed);
    clients.into_iter().for_each(|client| client.join().expect("every connection was answered"));
    eventually("there are as few as there may be", || serving(&site) == 1 && idle_executors(&site) == 2);
}

#[test]
fn readiness_turns_before_a_drain_begins_to_refuse() {
    let (site, _gate) = site(local(2).drain_delay(Duration::from_secs(1)));
    let start = Instant::now();
    let exit = site.stop(Stop::Drain(BOUND));
    eventually("it is not ready", || !site.stats().ready);
    assert_eq!(site.connect().get("/").status, 200, "it still accepts");
    assert!(settle(exit).expect("it stops").drained);
    assert!(start.elapsed() >= Duration::from_secs(1), "it has waited for the load balancer");
}

#[test]
fn a_stop_at_once_does_not_wait_for_the_load_balancer() {
    let (site, _gate) = site(local(1).drain_delay(Duration::from_secs(3600)));
    let drain = site.stop(Stop::Drain(BOUND));
    settle(site.stop(Stop::Now)).expect("it stops");
    settle(drain).expect("so does the drain");
}

#[test]
fn a_client_between_two_requests_is_answered_once_more_by_an_executor_that_goes() {
    let (site, _gate) = site(local(2));
    let mut idle: Vec<Client> = (0..16).map(|_| site.connect()).collect();
    idle.iter_mut().for_each(|client| assert!(!client.get("/").closes()));
    // Those that have not spoken are waited for as well.
    let mut silent: Vec<Client> = (0..16).map(|_| site.connect()).collect();
    eventually("all are accepted", || site.stats().executors.iter().map(|executor| executor.open).sum::<u64>() == 32);
    settle(site.scale(1)).expect("there are two slots");
    eventually("one drains", || {
        site.stats().executors.iter().any(|executor| executor.state == ExecutorState::Draining)
    });
    let closing = idle.iter_mut().chain(&mut silent).map(|client| {
        let answer = client.get("/");
        assert_eq!(answer.status, 200);
        answer.closes()
    });
    // Of 32, chance leaves none to one of two executors once in 10^9 runs.
    assert!(closing.filter(|closes| *closes).count() > 0, "those of the executor that goes are told so");
    eventually("it has gone, since nobody is left on it", || idle_executors(&site) == 1);
}

/// What a thread drops last of all; it takes until the lock can be read.
struct Lingers(Arc<RwLock<()>>);

impl Drop for Lingers {
    fn drop(&mut self) {
        drop(self.0.read());
    }
}

thread_local! {
    static LINGERS: RefCell<Option<Lingers>> = const { RefCell::new(None) };
}

/// A server whose executors' threads do not end before `lock` can be read; but they do not wait for another server.
fn lingering(builder: Builder, lock: &Arc<RwLock<()>>) -> Site {
    let lock = Arc::clone(lock);
    Site::start(builder.serve(async move |_: ringleader::Shard| {
        LINGERS.set(Some(Lingers(Arc::clone(&lock))));
        // What an embedder can do by itself: such a thread serves nobody else.
        #[allow(clippy::disallowed_methods)]
        glommio::spawn_local(glommio::timer::sleep(Duration::from_millis(1))).await;
        Ok(service_fn(echo))
    }))
}

#[test]
fn threads_that_do_not_end_keep_the_supervisor_from_nothing() {
    let lock = Arc::default();
    let site = lingering(local(3), &lock);
    let held = lock.write().expect("nobody has panicked");
    settle(site.scale(1)).expect("there are three slots");
    eventually("the others have gone", || idle_executors(&site) == 2);
    settle(site.scale(3)).expect("the supervisor hears it");
    eventually("others are in their places", || serving(&site) == 3);
    for _ in 0..20 {
        assert_eq!(site.connect().get("/").status, 200);
    }
    drop(held);
    let exit = settle(site.stop(Stop::Drain(BOUND))).expect("it stops");
    assert!(exit.drained && exit.abandoned == 0, "{exit:?}");
}

#[test]
fn threads_that_do_not_end_at_a_stop_are_counted_and_left_behind() {
    let lock = Arc::default();
    let site = lingering(local(3).stop_grace(Duration::from_millis(100)), &lock);
    let held = lock.write().expect("nobody has panicked");
    let before = Instant::now();
    let exit = settle(site.stop(Stop::Now)).expect("it stops");
    assert_eq!(exit.abandoned, 3);
    assert!(before.elapsed() < Duration::from_secs(5), "they had the time that was given, and not that of the default");
    drop(held);
}

/// So many pieces of so many bytes: the last one comes when the connection has sent what it may send in one turn.
const PIECES: usize = 5;
const PIECE_BYTES: usize = 64 * 1024;

/// A body that keeps its executor's thread, at its first piece, until it is told to go on.
struct Pausing {
    pieces_left: usize,
    held: Arc<AtomicU64>,
    release: Arc<AtomicBool>,
}

impl http_body::Body for Pausing {
    type Data = bytes::Bytes;
    type Error = ringleader::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<bytes::Bytes>, ringleader::BoxError>>> {
        if self.pieces_left == 0 {
            return Poll::Ready(None);
        }
        if self.pieces_left == PIECES {
            self.held.fetch_add(1, Ordering::SeqCst);
            let start = Instant::now();
            while !self.release.load(Ordering::SeqCst) && start.elapsed() < BOUND {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.pieces_left -= 1;
        Poll::Ready(Some(Ok(http_body::Frame::data(vec![b'x'; PIECE_BYTES].into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces_left == 0
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact((self.pieces_left * PIECE_BYTES) as u64)
    }
}

#[test]
fn the_end_of_an_answer_that_waits_for_its_turn_is_not_lost_with_an_executor_that_goes() {
    let (held, release) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let server = {
        let (held, release) = (Arc::clone(&held), Arc::clone(&release));
        local(2).serve(async move |shard: ringleader::Shard| {
            let (held, release) = (Arc::clone(&held), Arc::clone(&release));
            Ok(service_fn(async move |request: Request| {
                let (held, release) = (Arc::clone(&held), Arc::clone(&release));
                Ok(Response::new(match request.uri().path() {
                    "/large" => Body::from(vec![b'x'; 4 << 20]),
                    "/held" => Body::new(Pausing { pieces_left: PIECES, held, release }),
                    _ => Body::from(shard.id().to_string()),
                }))
            }))
        })
    };
    let site = Site::start(server);
    let mut clients = std::collections::HashMap::new();
    eventually("each executor has a client", || {
        let mut client = site.connect();
        let executor = client.get("/").text().to_owned();
        clients.insert(executor, client);
        clients.len() == 2
    });
    let mut clients: Vec<Client> = clients.into_values().collect();
    for client in &mut clients {
        // The kernel's buffers grow by it: what the test is about fits in.
        assert_eq!(client.get("/large").body.len(), 4 << 20);
        client.ask("/held");
    }
    eventually("both executors stand still", || held.load(Ordering::SeqCst) == 2);
    settle(site.scale(1)).expect("there are two slots");
    eventually("one drains", || {
        site.stats().executors.iter().any(|executor| executor.state == ExecutorState::Draining)
    });
    release.store(true, Ordering::SeqCst);
    for client in &mut clients {
        assert_eq!(client.answer().body.len(), PIECES * PIECE_BYTES);
    }
}
