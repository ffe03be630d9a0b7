//! An executor whose handler does not give the thread back: who is served meanwhile, and by whom.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::Duration;

use ringleader::{Body, Builder, ExecutorState, HangPolicy, Request, Response, Scaling, Server, Stop, service_fn};

use crate::support::log::Log;
use crate::support::stopped::Stopped;
use crate::support::{BOUND, Client, Gate, Site, alone, eventually, local, settle, spawn};

/// What `/block` waits for, with its thread: this is the stall.
#[derive(Clone, Default)]
struct Block(Arc<(Mutex<bool>, Condvar)>, Arc<AtomicUsize>);

impl Block {
    fn end(&self) {
        *self.0.0.lock().expect("no handler panics") = true;
        self.0.1.notify_all();
    }

    fn wait(&self) {
        self.1.fetch_add(1, Ordering::SeqCst);
        let ended = self.0.0.lock().expect("no handler panics");
        drop(self.0.1.wait_while(ended, |ended| !*ended).expect("no handler panics"));
    }
}

/// A test that fails must not leave its executor blocked: the server could not be stopped.
impl Drop for Block {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.end();
        }
    }
}

/// Answers with executor and generation; `/block` does so only when the block ends.
fn site(builder: Builder) -> (Site, Block) {
    let block = Block::default();
    let server = {
        let block = block.clone();
        builder.serve(async move |shard: ringleader::Shard| {
            let block = block.clone();
            Ok(service_fn(async move |request: Request| {
                if request.uri().path() == "/block" {
                    block.wait();
                }
                Ok(Response::new(Body::from(format!("{} {}", shard.id(), shard.generation()))))
            }))
        })
    };
    (Site::start(server), block)
}

/// Executor and generation that answer on this connection.
fn who(client: &mut Client) -> (usize, u64) {
    let answer = client.get("/");
    let (executor, generation) = answer.text().split_once(' ').expect("two numbers");
    (executor.parse().expect("a number"), generation.parse().expect("a number"))
}

/// Blocks the executor of a new connection; that connection and the executor. What the executor accepts from here on it
/// accepts after the block.
fn block_one(site: &Site, block: &Block) -> (Client, usize) {
    let mut victim = site.connect();
    let (executor, _) = who(&mut victim);
    let before = block.1.load(Ordering::SeqCst);
    victim.ask("/block");
    eventually("the handler blocks", || block.1.load(Ordering::SeqCst) > before);
    (victim, executor)
}

fn state(site: &Site, executor: usize) -> ExecutorState {
    site.stats().executors[executor].state
}

fn is_set_aside(site: &Site, executor: usize) -> bool {
    matches!(state(site, executor), ExecutorState::Stalled | ExecutorState::Starved)
}

#[test]
fn nobody_waits_for_a_stalled_executor_who_has_not_met_it_before() {
    let (site, block) = site(local(3));
    let (mut victim, executor) = block_one(&site, &block);
    // Some of these are in the stalled executor's queue before anybody has noticed.
    let mut clients: Vec<Client> = (0..60).map(|_| site.connect()).collect();
    for client in &mut clients {
        assert_ne!(who(client).0, executor, "it is blocked");
    }
    eventually("the stall is noticed", || is_set_aside(&site, executor));
    let mut later: Vec<Client> = (0..20).map(|_| site.connect()).collect();
    for client in &mut later {
        assert_ne!(who(client).0, executor, "it is blocked");
    }
    assert!(site.stats().ready, "two of three serve");
    block.end();
    assert!(victim.answer().text().starts_with(&executor.to_string()), "its own connection has waited for it");
    eventually("it serves again", || state(&site, executor) == ExecutorState::Serving);
    let mut met = Vec::new();
    eventually("new connections go to it again", || {
        met.push(site.connect());
        who(met.last_mut().expect("just pushed")).0 == executor
    });
}

#[test]
fn connections_from_a_stalled_executors_queue_are_counted() {
    let (site, block) = site(local(2));
    let (_victim, executor) = block_one(&site, &block);
    let mut clients: Vec<Client> = (0..40).map(|_| site.connect()).collect();
    clients.iter_mut().for_each(|client| assert_ne!(who(client).0, executor));
    let rescued: u64 = site.stats().executors.iter().map(|executor| executor.rescued).sum();
    // Of 40, chance leaves all to the other executor once in 10^12 runs.
    assert!(rescued > 0, "some were in the stalled executor's queue");
    block.end();
}

#[test]
fn a_server_of_which_most_executors_are_stalled_is_not_ready() {
    let (site, block) = site(local(2));
    let (_one, first) = block_one(&site, &block);
    eventually("one is stalled", || is_set_aside(&site, first));
    let (_two, second) = block_one(&site, &block);
    assert_ne!(first, second);
    eventually("both are stalled", || is_set_aside(&site, 0) && is_set_aside(&site, 1));
    eventually("it is not ready", || !site.stats().ready);
    block.end();
    eventually("it is ready again", || site.stats().ready);
}

#[test]
fn a_hung_executor_is_replaced_and_its_clients_see_the_end() {
    let hang = Duration::from_millis(300);
    let (site, block) = site(local(2).hang(HangPolicy::Replace, Some(hang)));
    let (mut victim, executor) = block_one(&site, &block);
    victim.expect_end();
    eventually("another generation is in its place", || {
        let stats = site.stats();
        stats.executors[executor].generation == 2 && stats.executors[executor].state == ExecutorState::Serving
    });
    assert_eq!(site.stats().threads_leaked, 1);
    let mut met = Vec::new();
    eventually("it serves", || {
        met.push(site.connect());
        who(met.last_mut().expect("just pushed")) == (executor, 2)
    });
    assert!(site.stats().ready);
    block.end();
    eventually("the thread has come back and ended", || site.stats().threads_leaked == 0);
    assert_eq!(who(met.last_mut().expect("one met it")), (executor, 2), "the one in its place goes on");
    let exit = settle(site.stop(Stop::Drain(BOUND))).expect("it stops");
    assert_eq!(exit.abandoned, 0);
}

/// In the drain of a whole server executors wait for whoever may still ask them, which one that hangs does not.
#[test]
fn a_drain_does_not_wait_for_an_executor_that_hung_and_was_replaced() {
    let (site, block) = site(local(2).hang(HangPolicy::Replace, Some(Duration::from_millis(300))));
    let (mut victim, executor) = block_one(&site, &block);
    victim.expect_end();
    eventually("another generation is in its place", || {
        let stats = &site.stats().executors[executor];
        stats.generation == 2 && stats.state == ExecutorState::Serving
    });
    let exit = settle(site.stop(Stop::Drain(100 * BOUND))).expect("it stops");
    assert_eq!(exit.abandoned, 1, "its thread hangs all the same");
    block.end();
}

/// By their number alone: a stalled executor counts as busy all of the time, and here that is not too much.
#[test]
fn connections_that_wait_to_be_accepted_bring_another_executor() {
    let mut scaling = Scaling::default();
    (scaling.period, scaling.high) = (Duration::from_millis(20), 1.0);
    scaling.emergency_queue = 5;
    let (site, block) = site(local(1).executors(1..=2).scaling(scaling));
    let (_victim, executor) = block_one(&site, &block);
    eventually("it is stalled", || is_set_aside(&site, executor));
    assert_eq!(state(&site, 1 - executor), ExecutorState::Idle, "nobody waits yet");
    let mut waiting: Vec<Client> = (0..10).map(|_| site.connect()).collect();
    for client in &mut waiting {
        assert_ne!(who(client).0, executor, "it is blocked");
    }
    block.end();
}

/// The ring of its thread holds the listener, whoever else closes it.
#[test]
fn in_a_drain_new_clients_of_an_executor_that_is_stalled_are_refused_and_those_in_its_queue_answered() {
    let (site, block) = site(local(2));
    let (mut victim, executor) = block_one(&site, &block);
    eventually("it is stalled", || state(&site, executor) == ExecutorState::Stalled);
    let mut waiting: Vec<Client> = (0..20).map(|_| site.connect()).collect();
    let order = site.stop(Stop::Drain(100 * BOUND));
    for client in &mut waiting {
        assert_ne!(who(client).0, executor, "it is blocked");
    }
    eventually("nobody is accepted", || refuses(&site));
    assert_eq!(state(&site, executor), ExecutorState::Draining, "it has not come back");
    block.end();
    assert!(victim.answer().text().starts_with(&executor.to_string()));
    assert!(settle(order).expect("it stops").drained);
}

#[test]
fn an_address_is_free_when_a_server_has_ended_whose_executors_hang() {
    let hang = Some(Duration::from_millis(300));
    let (site, block) = site(local(3).hang(HangPolicy::Replace, hang).stop_grace(Duration::from_secs(1)));
    // One that is replaced before, and one that nobody has found yet when the server is told to stop.
    let (mut replaced, _) = block_one(&site, &block);
    replaced.expect_end();
    eventually("another is in its place", || site.stats().executors.iter().any(|executor| executor.generation == 2));
    let _victim = block_one(&site, &block);
    let address = site.address();
    assert_eq!(settle(site.stop(Stop::Now)).expect("it stops").abandoned, 2);
    assert!(refuses(&site), "nobody is there any more");
    let next = Site::start(
        Server::builder().listen(address).executors(2).serve(async |_| Ok(service_fn(crate::support::echo))),
    );
    for _ in 0..20 {
        assert_eq!(next.connect().get("/").status, 200);
    }
    block.end();
}

fn refuses(site: &Site) -> bool {
    TcpStream::connect(site.address()).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

/// Generation 1 and then generation 2 of the only executor hang. The first thread comes back in the meantime: it takes
/// no connection from the queue that is its successor's now, and does not speak for it.
#[test]
fn a_thread_that_comes_back_leaves_its_successor_alone() {
    let (first, second) = (Block::default(), Block::default());
    let blocks = [first.clone(), second.clone()];
    let builder = local(1).hang(HangPolicy::Replace, Some(Duration::from_millis(400)));
    let site = Site::start(builder.serve(async move |shard: ringleader::Shard| {
        let blocks = blocks.clone();
        Ok(service_fn(async move |request: Request| {
            if request.uri().path() == "/block" {
                blocks[shard.generation() as usize - 1].wait();
            }
            Ok(Response::new(Body::from(format!("{} {}", shard.id(), shard.generation()))))
        }))
    }));
    let (_victim, _) = block_one(&site, &first);
    let mut next = site.connect();
    assert_eq!(who(&mut next), (0, 2));
    next.ask("/block");
    eventually("the successor blocks", || second.1.load(Ordering::SeqCst) > 0);
    let mut queued: Vec<Client> = (0..10).map(|_| site.connect()).collect();
    queued.iter_mut().for_each(|client| client.ask("/"));
    first.end();
    for client in &mut queued {
        assert_eq!(client.answer().text(), "0 3", "the successor is replaced as well, and who waits is served");
    }
    second.end();
    eventually("both threads have come back and ended", || site.stats().threads_leaked == 0);
    assert_eq!(who(&mut queued[0]), (0, 3));
}

/// It hung in a message, and a turn that has run messages accepts: what waits there is its successor's by then.
#[test]
fn a_thread_that_comes_back_in_the_middle_of_a_turn_accepts_nothing() {
    let (message, handler) = (Block::default(), Block::default());
    let mut builder = local(1).hang(HangPolicy::Replace, Some(Duration::from_millis(400)));
    let state = builder.sharded("nothing", async |_| Ok(()));
    let site = {
        let handler = handler.clone();
        Site::start(builder.serve(async move |shard: ringleader::Shard| {
            let handler = handler.clone();
            Ok(service_fn(async move |request: Request| {
                if request.uri().path() == "/block" {
                    handler.wait();
                }
                Ok(Response::new(Body::from(format!("{} {}", shard.id(), shard.generation()))))
            }))
        }))
    };
    // It has looked into its queue for the first time: from here on it accepts when it is told that there is somebody.
    let mut before = site.connect();
    (0..2).for_each(|_| assert_eq!(who(&mut before), (0, 1)));
    let slot = state.peers().iter().next().expect("there is one");
    let (address, again, blocks) = (site.address(), state.clone(), message.clone());
    let (tell, waiting) = mpsc::channel();
    // In the next turn there is a connection to accept and, before that, a message to run.
    let first = move |_: &()| {
        tell.send(Client::connect(address)).expect("the test waits");
        again.send(slot, move |_| blocks.wait()).expect("there is room");
    };
    state.send(slot, first).expect("there is room");
    let mut next = waiting.recv_timeout(BOUND).expect("the message runs");
    assert_eq!(who(&mut next), (0, 2), "it was accepted by the successor");
    next.ask("/block");
    eventually("the successor blocks", || handler.1.load(Ordering::SeqCst) > 0);
    let mut queued: Vec<Client> = (0..10).map(|_| site.connect()).collect();
    queued.iter_mut().for_each(|client| client.ask("/"));
    message.end();
    for client in &mut queued {
        assert_eq!(client.answer().text(), "0 3", "who waits is served");
    }
    handler.end();
    eventually("both threads have come back and ended", || site.stats().threads_leaked == 0);
}

/// The thread of an executor that hung comes back while the server drains: the drain has cut nothing off by that.
#[test]
fn a_thread_that_comes_back_in_a_drain_makes_it_no_failure() {
    let (block, gate, waiting) = (Block::default(), Gate::shut(), Arc::new(AtomicUsize::new(0)));
    let builder = local(1).hang(HangPolicy::Replace, Some(Duration::from_millis(300)));
    let site = {
        let (block, gate, waiting) = (block.clone(), gate.clone(), Arc::clone(&waiting));
        Site::start(builder.serve(async move |_| {
            let (block, gate, waiting) = (block.clone(), gate.clone(), Arc::clone(&waiting));
            Ok(service_fn(async move |request: Request| {
                match request.uri().path() {
                    "/block" => block.wait(),
                    _ => {
                        waiting.fetch_add(1, Ordering::SeqCst);
                        gate.passed().await;
                    }
                }
                Ok(Response::new(Body::empty()))
            }))
        }))
    };
    let mut victim = site.connect();
    victim.ask("/block");
    victim.expect_end();
    // Of the one in its place, and the drain's last until the thread is back.
    let mut other = site.connect();
    other.ask("/");
    eventually("a handler waits", || waiting.load(Ordering::SeqCst) == 1);
    let stopped = site.stop(Stop::Drain(2 * BOUND));
    eventually("it drains", || state(&site, 0) == ExecutorState::Draining);
    block.end();
    eventually("the thread has come back and ended", || site.stats().threads_leaked == 0);
    gate.open();
    assert_eq!(other.answer().status, 200);
    let exit = settle(stopped).expect("it stops");
    assert!(exit.drained, "{exit:?}");
}

/// The executor that took the place of one that hung has all the connections it may. When the thread of the one before comes
/// back, new connections go elsewhere as before.
#[test]
fn a_thread_that_comes_back_does_not_make_room_in_its_successor() {
    const EACH: u64 = 8;
    let builder = local(2).connections_max(EACH).hang(HangPolicy::Replace, Some(Duration::from_millis(400)));
    let (site, block) = site(builder);
    let (_victim, executor) = block_one(&site, &block);
    eventually("another generation is in its place", || {
        let stats = &site.stats().executors[executor];
        stats.generation == 2 && stats.state == ExecutorState::Serving
    });
    let mut full = Vec::new();
    eventually("the successor is full", || {
        let mut client = site.connect();
        let answered = client.try_send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").and_then(|()| client.try_answer());
        let here = format!("{executor} 2");
        full.extend(answered.ok().filter(|answer| answer.text() == here).map(|_| client));
        full.len() as u64 == EACH
    });
    block.end();
    eventually("the thread has come back and ended", || site.stats().threads_leaked == 0);
    for _ in 0..30 {
        assert_eq!(who(&mut site.connect()).0, 1 - executor, "it has no room");
    }
}

#[test]
fn a_hung_executor_that_is_not_to_be_replaced_is_waited_for() {
    let hang = Duration::from_millis(150);
    let (site, block) = site(local(2).hang(HangPolicy::Ignore, Some(hang)));
    let (mut victim, executor) = block_one(&site, &block);
    eventually("the stall is noticed", || is_set_aside(&site, executor));
    std::thread::sleep(2 * hang);
    assert_eq!(site.stats().executors[executor].generation, 1);
    block.end();
    assert_eq!(victim.answer().text(), format!("{executor} 1"));
}

#[test]
fn a_server_told_to_abort_on_a_hang_does() {
    let server = spawn(&[], &["--executors", "2", "--chaos", "--on-hang", "abort", "--hang-timeout", "0.3"]);
    let mut victim = server.connect();
    victim.ask("/chaos/spin?ms=60000");
    let ended = server.wait();
    assert_eq!(ended.status, None, "it ends by a signal");
    assert!(ended.printed.contains("hangs"), "{}", ended.printed);
}

#[test]
fn a_server_with_nothing_to_do_is_hardly_looked_at_and_a_stall_after_that_is_found() {
    let arguments = ["--executors", "2", "--chaos"];
    let mut server = spawn(&[], &arguments);
    eventually("the supervisor sleeps", || {
        let before = server.sleeps_of("ringleader-sup");
        // Of the looks at heartbeats five would be in it.
        std::thread::sleep(Duration::from_millis(400));
        server.sleeps_of("ringleader-sup") <= before + 1
    });
    server.connect().ask("/chaos/spin?ms=600");
    // Stalled, or on a machine that is busy without a CPU.
    server.wait_for_line("new connections go elsewhere");
    server.wait_for_line("the executor has come back");
}

/// What hangs in a drain has the drain's deadline: it is neither replaced nor cut off before, but the log says what it does.
#[test]
fn a_handler_that_hangs_in_a_drain_is_told_of_and_waited_for() {
    let limits = ["--stall-limit", "1500", "--hang-timeout", "2"];
    let mut server = spawn(&[], &[&["--executors", "1", "--chaos"], &limits[..]].concat());
    let mut client = server.connect();
    assert_eq!(client.get("/").status, 200);
    client.ask("/chaos/block?ms=7000");
    server.signal(libc::SIGTERM);
    server.wait_for_line("draining");
    server.wait_for_line("an executor that drains is stalled");
    assert_eq!(client.answer().status, 200);
    let ended = server.wait();
    ended.expect(0, &["drained=true"]);
    // Reading the debug information may take longer than the handler does.
    let told = ["what the stalled executor is doing", "a backtrace is still being made"];
    assert!(told.iter().any(|text| ended.printed.contains(text)), "{}", ended.printed);
    assert!(!ended.printed.contains("replaced"), "{}", ended.printed);
}

#[test]
fn a_start_up_that_keeps_its_thread_is_told_of() {
    if !alone("stalls::a_start_up_that_keeps_its_thread_is_told_of") {
        return;
    }
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let log = Log::of_this_process();
    let server = local(1).stall_backtraces(true).serve(async move |_| {
        let _ = released.lock().expect("nobody panics with it").recv();
        Ok(service_fn(async |_: Request| Ok(Response::new(Body::empty()))))
    });
    let started = server.start();
    let has = |text: &str| log.said().contains(text);
    eventually("the log says so", || has("an executor's start-up keeps its thread"));
    eventually("and what it is doing", || has("what the stalled executor is doing"));
    drop(release);
    drop(settle(started).expect("it starts when it is let"));
}

/// The number of the executor that has said this for `/whoami`.
fn executor_of(text: &str) -> usize {
    let number = text.split("\"executor\":").nth(1).and_then(|rest| rest.split(',').next());
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no executor in {text}"))
}

/// One that computes for long and loses its CPU meanwhile is not what a turn without an end is.
#[test]
fn an_executor_that_is_stopped_in_a_turn_is_starved_and_never_replaced() {
    let limits = ["--stall-limit", "1500", "--hang-timeout", "0.5"];
    let mut server = spawn(&[], &[&["--executors", "2", "--chaos"], &limits[..]].concat());
    let mut client = server.connect();
    let thread = format!("ringleader-{}", executor_of(client.get("/whoami").text()));
    let before = server.cpu_time();
    client.ask("/chaos/spin?ms=3000");
    eventually("it computes", || server.cpu_time() > before + Duration::from_millis(50));
    let stopped = Stopped::thread(server.id(), &thread);
    server.wait_for_line("an executor gets no CPU: new connections go elsewhere");
    for _ in 0..20 {
        assert_eq!(server.connect().get("/").status, 200, "the other one answers");
    }
    // Four times as long as one may be stalled.
    std::thread::sleep(Duration::from_secs(2));
    drop(stopped);
    assert_eq!(client.answer().text(), "spun\n");
    assert!(client.get("/whoami").text().contains("\"generation\":1,"), "it has not been replaced");
    server.signal(libc::SIGTERM);
    let ended = server.wait();
    ended.expect(0, &["drained=true"]);
    assert!(!ended.printed.contains("hangs") && !ended.printed.contains("is stalled"), "{}", ended.printed);
}

/// It has no turn that could be late, and nobody else has anything to do, so that nobody would look.
#[test]
fn clients_of_an_executor_that_is_stopped_in_its_sleep_are_answered_by_another() {
    let mut server = spawn(&[], &["--executors", "2"]);
    let stopped = Stopped::thread(server.id(), "ringleader-1");
    let mut clients: Vec<_> = (0..20).map(|_| server.connect()).collect();
    clients.iter_mut().for_each(|client| client.ask("/whoami"));
    for client in &mut clients {
        assert_eq!(executor_of(client.answer().text()), 0);
    }
    server.wait_for_line("an executor gets no CPU: new connections go elsewhere");
    for _ in 0..20 {
        assert_eq!(executor_of(server.connect().get("/whoami").text()), 0);
    }
    drop(stopped);
    server.wait_for_line("the executor has come back");
    eventually("it answers again", || executor_of(server.connect().get("/whoami").text()) == 1);
    server.signal(libc::SIGTERM);
    server.wait().expect(0, &["drained=true"]);
}

/// Its heartbeat is the only one that is not stale, and it does not wake either.
#[test]
fn what_comes_while_the_process_stands_still_is_not_all_given_to_the_executor_that_slept() {
    let mut server = spawn(&[], &["--executors", "4", "--chaos", "--stall-limit", "60000"]);
    if !server.wait_for_line("steering: ").contains("eBPF") {
        return eprintln!("skipped: without eBPF nobody looks at heartbeats while the process stands still");
    }
    let mut at_work = BTreeMap::new();
    while at_work.len() < 3 {
        let mut client = server.connect();
        let executor = executor_of(client.get("/whoami").text());
        at_work.entry(executor).or_insert(client);
    }
    // Until the three are seen to be at work: whoever asks one of them waits, and they have to begin again.
    loop {
        at_work.values_mut().for_each(|client| client.ask("/chaos/block?ms=3000"));
        std::thread::sleep(Duration::from_millis(50));
        let mut executors = (0..30).map(|_| executor_of(server.connect().get("/whoami").text()));
        if executors.all(|executor| !at_work.contains_key(&executor)) {
            break;
        }
        at_work.values_mut().for_each(|client| drop(client.answer()));
    }
    // It sleeps by then; and if not, what it has said last is stale as well.
    std::thread::sleep(Duration::from_millis(50));
    server.signal(libc::SIGSTOP);
    std::thread::sleep(Duration::from_millis(50));
    let mut clients: Vec<_> = (0..300).map(|_| server.connect()).collect();
    clients.iter_mut().for_each(|client| client.ask("/whoami"));
    server.signal(libc::SIGCONT);
    let executors: Vec<_> = clients.iter_mut().map(|client| executor_of(client.answer().text())).collect();
    // Three quarters of what is beyond the first 64: 177, with a standard deviation of 7.
    let count = executors.iter().filter(|executor| at_work.contains_key(executor)).count();
    assert!((100..=250).contains(&count), "{count} of 300 went to the three that were at work");
    server.signal(libc::SIGTERM);
    server.wait().expect(0, &["drained=true"]);
}
