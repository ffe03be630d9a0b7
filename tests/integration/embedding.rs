//! What a host program may expect: a server starts wherever it is asked to, takes nothing that is the host's, and leaks
//! nothing to the host's children.

use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::panic;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use ringleader::{Body, Files, Method, Request, Response, Running, Server, Shard, Stop, service_fn};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::support::{BOUND, Client, Process, Site, echo, eventually, expect_refusal, heap, local, settle};

/// Set in a process that a test starts for itself.
const ALONE: &str = "RINGLEADER_TEST_ALONE";

/// Runs `test`, which is called `name`, in a process where nobody else changes what it looks at.
fn alone(name: &str, test: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some() {
        return test();
    }
    let itself = std::env::current_exe().expect("it is running");
    let name = format!("embedding::{name}");
    let child = Process::of(Command::new(itself).args([&name, "--exact", "--nocapture"]).env(ALONE, "1"));
    child.wait().expect(0, &["1 passed"]);
}

fn server() -> Server {
    local(2).serve(async |_| Ok(service_fn(echo)))
}

/// As a host's code would: start, serve, drain.
async fn live(server: Server) {
    let running = server.start().await.expect("it starts");
    let address = running.local_addrs()[0];
    assert_ne!(address.port(), 0);
    assert_eq!(Client::connect(address).get("/").status, 200);
    assert!(running.stop(Stop::Drain(BOUND)).await.expect("it stops").drained);
}

#[test]
fn a_server_starts_and_stops_on_tokio_with_many_threads() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().expect("tokio has its threads");
    runtime.block_on(async {
        // On its workers, which must be free to run other tasks meanwhile, and to migrate these.
        let servers: Vec<_> = (0..3).map(|_| tokio::spawn(live(server()))).collect();
        for server in servers {
            server.await.expect("no panic");
        }
    });
}

#[test]
fn a_server_ends_with_the_runtime_whose_task_owns_it() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("tokio has what it needs");
    let address = runtime.block_on(async {
        let running = server().start().await.expect("it starts");
        let address = running.local_addrs()[0];
        assert_eq!(Client::connect(address).get("/").status, 200);
        tokio::spawn(async move {
            let _owner = running;
            std::future::pending::<()>().await;
        });
        address
    });
    // Nobody has ordered a stop, and nobody joins.
    drop(runtime);
    expect_refusal(address);
}

#[test]
fn a_server_starts_and_stops_on_smol() {
    smol::block_on(async {
        let servers: Vec<_> = (0..2).map(|_| smol::spawn(live(server()))).collect();
        for server in servers {
            server.await;
        }
    });
}

#[test]
fn a_server_outlives_the_thread_that_started_it() {
    let running = thread::spawn(|| server().start().wait().expect("it starts")).join().expect("no panic");
    assert_eq!(Client::connect(running.local_addrs()[0]).get("/").status, 200);
    thread::spawn(move || settle(running.stop(Stop::Now)).expect("it stops")).join().expect("no panic");
}

#[test]
fn a_server_runs_on_an_executor_of_another_server() {
    let outer = Site::start(local(1).serve(async |_| {
        let inner = local(1).serve(async |_| Ok(service_fn(echo))).start().await?;
        let address = inner.local_addrs()[0];
        Ok(service_fn(async move |_: Request| {
            // Its owner goes with this generation, and orders it to stop.
            let _owner: &Running = &inner;
            Ok(Response::new(Body::from(address.to_string())))
        }))
    }));
    let inner = outer.connect().get("/").text().parse().expect("an address");
    assert_eq!(Client::connect(inner).get("/").status, 200);
    settle(outer.stop(Stop::Now)).expect("it stops");
    eventually("the inner one has stopped", || Client::try_connect(inner).is_err());
}

#[test]
fn each_listener_on_port_0_gets_a_port_of_its_own() {
    let server = Server::builder().listen("127.0.0.1:0").listen("127.0.0.1:0").executors(2);
    let site = Site::start(server.serve(async |_| Ok(service_fn(echo))));
    let addresses = site.local_addrs();
    assert_eq!(addresses.len(), 2);
    assert_ne!(addresses[0].port(), addresses[1].port());
    for address in addresses {
        assert_eq!(Client::connect(*address).get("/").status, 200);
    }
}

#[test]
fn an_order_to_start_that_nobody_awaits_leaves_no_server_behind() {
    // On a host that no other test uses, whatever the port.
    let address = TcpListener::bind("127.0.77.101:0").and_then(|listener| listener.local_addr()).expect("it is free");
    drop(Server::builder().listen(address).executors(1).serve(async |_| Ok(service_fn(echo))).start());
    // It may be up for a moment; then its owner, whom nobody fetched, is dropped.
    eventually("the address is free", || {
        let next = Server::builder().listen(address).executors(1).serve(async |_| Ok(service_fn(echo)));
        settle(next.start()).is_ok()
    });
}

/// What a child of this process has open, as it sees it itself: number and kind.
fn descriptors_of_a_child() -> Vec<String> {
    let listing = Command::new("ls").args(["-l", "/proc/self/fd"]).output().expect("ls is there");
    let text = String::from_utf8(listing.stdout).expect("text");
    let kind = |line: &str| {
        let (number, target) = line.rsplit_once(" -> ")?;
        let number = number.rsplit(' ').next()?;
        // Its own directory and its pipes differ from child to child.
        let target = if target.starts_with("/proc/") { "/proc" } else { target.split(':').next()? };
        Some(format!("{number} {target}"))
    };
    text.lines().filter_map(kind).collect()
}

#[test]
fn children_of_the_host_inherit_no_descriptor_of_ours() {
    alone("children_of_the_host_inherit_no_descriptor_of_ours", || {
        let before = descriptors_of_a_child();
        // That one would be seen:
        // SAFETY: makes a descriptor, and closes that one.
        let (seen, closed) = unsafe {
            let inherited = libc::dup(0);
            (descriptors_of_a_child().len(), libc::close(inherited))
        };
        assert_eq!((seen, closed), (before.len() + 1, 0), "{before:?}");
        let builder = local(2).stop_on_signals().stall_backtraces(true).drain_timeout(BOUND);
        let site = Site::start(builder.serve(async |shard: Shard| {
            let files = Files::open(env!("CARGO_MANIFEST_DIR"))?;
            // A thread of the pool.
            shard.spawn_blocking(|| ()).await?;
            Ok(service_fn(async move |request: Request| Ok(files.respond(&request).await)))
        }));
        let mut clients: Vec<Client> = (0..8).map(|_| site.connect()).collect();
        for client in &mut clients {
            assert_eq!(client.get("/Cargo.toml").status, 200);
        }
        assert_eq!(descriptors_of_a_child(), before);
        // A program that another one becomes, as well.
        let by_shell = Command::new("sh").args(["-c", "ls /proc/self/fd | wc -l"]).output().expect("sh is there");
        let count: usize = String::from_utf8_lossy(&by_shell.stdout).trim().parse().expect("a number");
        assert!(count <= before.len() + 1, "{count} descriptors, {before:?} before");
        drop(clients);
        settle(site.stop(Stop::Now)).expect("it stops");
        assert_eq!(descriptors_of_a_child(), before);
    });
}

/// The handler, the flags and the mask of each signal, and the mask of this thread.
fn signals() -> Vec<(usize, i32)> {
    let mut found = Vec::new();
    for signal in 1..=64 {
        // SAFETY: all zero is a valid `struct sigaction`, and nothing is set.
        let (answer, action) = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            (libc::sigaction(signal, std::ptr::null(), &raw mut action), action)
        };
        // The C library keeps two to itself.
        if answer == 0 {
            found.push((action.sa_sigaction, action.sa_flags));
        }
    }
    // SAFETY: all zero is a valid set, and nothing is set; `sigismember` reads it.
    unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask), 0);
        found.extend((1..=64).map(|signal| (0, libc::sigismember(&raw const mask, signal))));
    }
    found
}

static HEARD: AtomicUsize = AtomicUsize::new(0);

extern "C" fn hear(_: libc::c_int) {
    HEARD.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn the_hosts_signal_handlers_are_left_alone() {
    alone("the_hosts_signal_handlers_are_left_alone", || {
        let taken = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR2, libc::SIGPIPE, libc::SIGRTMAX()];
        for signal in taken {
            // SAFETY: the handler does nothing but add to an atomic.
            let old = unsafe { libc::signal(signal, hear as extern "C" fn(libc::c_int) as libc::sighandler_t) };
            assert_ne!(old, libc::SIG_ERR);
        }
        let before = signals();
        let site = Site::start(server());
        assert_eq!(site.connect().get("/").status, 200);
        assert_eq!(signals(), before);
        for signal in taken {
            // SAFETY: sends a signal to this process, which has a handler for it.
            assert_eq!(unsafe { libc::kill(std::process::id() as i32, signal) }, 0);
            eventually("the host hears it", || HEARD.swap(0, Ordering::SeqCst) == 1);
        }
        assert_eq!(site.connect().get("/").status, 200, "it serves on");
        settle(site.stop(Stop::Now)).expect("it stops");
        assert_eq!(signals(), before);
    });
}

#[test]
fn a_server_that_stops_on_signals_takes_none_away_from_the_host() {
    alone("a_server_that_stops_on_signals_takes_none_away_from_the_host", || {
        // SAFETY: the handler does nothing but add to an atomic.
        let old = unsafe { libc::signal(libc::SIGTERM, hear as extern "C" fn(libc::c_int) as libc::sighandler_t) };
        assert_ne!(old, libc::SIG_ERR);
        let signalled = || {
            // SAFETY: sends a signal to this process, which has a handler for it.
            assert_eq!(unsafe { libc::kill(std::process::id() as i32, libc::SIGTERM) }, 0);
            eventually("the host hears it", || HEARD.swap(0, Ordering::SeqCst) == 1);
        };
        // The second hears it, though the first has stopped listening.
        for _ in 0..2 {
            let builder = local(2).stop_on_signals().drain_timeout(BOUND);
            let site = Site::start(builder.serve(async |_| Ok(service_fn(echo))));
            assert_eq!(site.connect().get("/").status, 200);
            signalled();
            assert!(settle(site.into_running().join()).expect("it stops").drained);
            signalled();
        }
    });
}

#[test]
fn signals_end_a_program_that_goes_on_after_its_server() {
    const NAME: &str = "embedding::signals_end_a_program_that_goes_on_after_its_server";
    if std::env::var_os(ALONE).is_some() {
        // A shell that starts the tests in the background of a script has them ignore Ctrl-C, and so would this.
        // SAFETY: the default action is no function.
        assert_ne!(unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) }, libc::SIG_ERR);
        let handlers = || signals().into_iter().map(|(handler, _)| handler).collect::<Vec<_>>();
        let before = handlers();
        for _ in 0..2 {
            let builder = local(1).stop_on_signals().upgrade_on_signal().reload_on_signal(Vec::new);
            let site = Site::start(builder.serve(async |_| Ok(service_fn(echo))));
            assert_ne!(handlers(), before);
            settle(site.stop(Stop::Now)).expect("it stops");
            assert_eq!(handlers(), before);
        }
        eprintln!("goes on");
        loop {
            thread::park();
        }
    }
    let itself = std::env::current_exe().expect("it is running");
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let mut child = Process::of(Command::new(&itself).args([NAME, "--exact", "--nocapture"]).env(ALONE, "1"));
        child.wait_for_line("goes on");
        child.signal(signal);
        assert_eq!(child.wait().signal, Some(signal));
    }
}

#[test]
fn a_reload_that_panics_is_over_and_the_next_one_is_carried_out() {
    alone("a_reload_that_panics_is_over_and_the_next_one_is_carried_out", || {
        // What it prints is taken for an unexpected panic.
        panic::set_hook(Box::new(|_| ()));
        let (calls, called) = std::sync::mpsc::channel();
        let builder = local(1).reload_on_signal(move || {
            calls.send(()).expect("the test waits");
            panic!("the reload of the test's");
        });
        let site = Site::start(builder.serve(async |_| Ok(service_fn(echo))));
        for _ in 0..3 {
            // SAFETY: sends a signal to this process, which the server has a handler for.
            assert_eq!(unsafe { libc::kill(std::process::id() as i32, libc::SIGHUP) }, 0);
            called.recv_timeout(BOUND).expect("it is called");
        }
        settle(site.stop(Stop::Now)).expect("it stops");
    });
}

#[test]
fn the_hosts_panic_hook_is_left_alone() {
    alone("the_hosts_panic_hook_is_left_alone", || {
        let seen = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&seen);
        panic::set_hook(Box::new(move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        let server = local(1).serve(async |_| {
            Ok(service_fn(async |request: Request| {
                assert_ne!(request.uri().path(), "/panic", "the handler of the test's panics");
                Ok(Response::new(Body::empty()))
            }))
        });
        let site = Site::start(server);
        assert_eq!(site.connect().get("/panic").status, 500);
        assert_eq!(seen.load(Ordering::SeqCst), 1, "a contained panic is the host's to hear of");
        assert!(panic::catch_unwind(|| panic!("the host's own")).is_err());
        assert_eq!(seen.load(Ordering::SeqCst), 2);
        settle(site.stop(Stop::Now)).expect("it stops");
        assert!(panic::catch_unwind(|| panic!("the host's own")).is_err());
        assert_eq!(seen.load(Ordering::SeqCst), 3, "it is still there");
        drop(panic::take_hook());
    });
}

/// A host's subscriber that counts.
struct Counts(Arc<AtomicUsize>);

impl Subscriber for Counts {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        if event.metadata().target().starts_with("ringleader") {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn the_log_is_the_hosts() {
    alone("the_log_is_the_hosts", || {
        // Else the panic that is meant to be would be taken for one of the test's own.
        panic::set_hook(Box::new(|_| ()));
        let panicking = || {
            let server = local(1).serve(async |_| {
                Ok(service_fn(async |request: Request| {
                    assert_ne!(request.method(), Method::GET, "the handler of the test's panics");
                    Ok(Response::new(Body::empty()))
                }))
            });
            let site = Site::start(server);
            assert_eq!(site.connect().get("/").status, 500);
            settle(site.stop(Stop::Now)).expect("it stops");
        };
        panicking();
        assert!(!tracing::dispatcher::has_been_set(), "nobody installed a subscriber");
        let said = Arc::new(AtomicUsize::new(0));
        tracing::subscriber::set_global_default(Counts(Arc::clone(&said))).expect("it is the first");
        panicking();
        assert!(said.load(Ordering::SeqCst) > 0, "the host's subscriber hears of the panic");
    });
}

#[test]
fn standard_streams_are_left_alone() {
    alone("standard_streams_are_left_alone", || {
        let targets = || {
            let streams = [std::io::stdin().as_raw_fd(), std::io::stdout().as_raw_fd(), std::io::stderr().as_raw_fd()];
            streams.map(|stream| std::fs::read_link(format!("/proc/self/fd/{stream}")).expect("it is open"))
        };
        let before = targets();
        let site = Site::start(server());
        assert_eq!(targets(), before);
        settle(site.stop(Stop::Now)).expect("it stops");
        assert_eq!(targets(), before);
    });
}

#[test]
fn the_hosts_allocator_is_the_servers() {
    const KEPT: usize = 32 * 1024 * 1024;
    alone("the_hosts_allocator_is_the_servers", || {
        let before = heap::in_use();
        let site = Site::start(local(2).serve(async |_| {
            let kept = vec![1_u8; KEPT];
            Ok(service_fn(async move |_: Request| Ok(Response::new(Body::from(kept[KEPT - 1].to_string())))))
        }));
        assert_eq!(site.connect().get("/").text(), "1");
        let meanwhile = heap::in_use();
        assert!(meanwhile >= before + 2 * KEPT, "{before} bytes have become {meanwhile}");
        settle(site.stop(Stop::Now)).expect("it stops");
        let after = heap::in_use();
        assert!(after < before + KEPT / 16, "{before} bytes have become {after}");
    });
}

#[test]
fn the_hosts_heap_is_trimmed_when_asked_for_only() {
    const BLOCK: usize = 1024;
    const BLOCKS: usize = 64 * 1024;
    alone("the_hosts_heap_is_trimmed_when_asked_for_only", || {
        // Freed but for one block in 64: whole pages, none of them at the heap's end.
        let mut blocks: Vec<_> = (0..BLOCKS).map(|_| Some(vec![1_u8; BLOCK])).collect();
        blocks.iter_mut().enumerate().for_each(|(number, block)| *block = block.take().filter(|_| number % 64 == 0));
        let half = heap::resident() - BLOCK * BLOCKS / 2;
        for trim in [false, true] {
            let site = Site::start(local(1).trim_heap(trim).serve(async |_| Ok(service_fn(echo))));
            assert_eq!(site.connect().get("/").status, 200);
            if trim {
                eventually("freed memory is given back", || heap::resident() < half);
            } else {
                // Nothing tells of what does not happen: an executor rests twice in this time.
                thread::sleep(std::time::Duration::from_secs(2));
                assert!(heap::resident() > half, "it was given back");
            }
            settle(site.stop(Stop::Now)).expect("it stops");
        }
        drop(blocks);
    });
}

#[test]
fn a_fork_of_the_host_starts_servers_of_its_own() {
    alone("a_fork_of_the_host_starts_servers_of_its_own", || {
        let serve = || {
            let site = Site::start(server());
            assert_eq!(site.connect().get("/").status, 200);
            settle(site.stop(Stop::Now)).expect("it stops");
        };
        // From here on threads wait for the next server: the fork will not have them.
        serve();
        // SAFETY: no thread of this process is within anything that the child uses: those of the server wait, the test
        // harness's, too. The C library sees to its own locks.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let well = panic::catch_unwind(serve).is_ok();
            // SAFETY: ends the child, without what belongs to the parent's harness.
            unsafe { libc::_exit(i32::from(!well)) };
        }
        assert!(child > 0, "{}", std::io::Error::last_os_error());
        let mut status = 0;
        eventually("the child has ended", || {
            // SAFETY: asks after a child of this process; the status is written.
            unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) == child }
        });
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
        serve();
    });
}

/// On which CPUs a child of the calling thread may run, and which signals it blocks.
fn surroundings_of_a_child() -> String {
    let child = Command::new("grep").args(["-E", "Cpus_allowed_list|SigBlk", "/proc/self/status"]).output();
    String::from_utf8(child.expect("grep is there").stdout).expect("text")
}

#[test]
fn children_made_beside_the_executors_have_what_the_host_has() {
    let site = Site::start(local(1).serve(async |shard: Shard| {
        Ok(service_fn(async move |_: Request| {
            Ok(Response::new(Body::from(shard.spawn_blocking(surroundings_of_a_child).await?)))
        }))
    }));
    assert_eq!(site.connect().get("/").text(), surroundings_of_a_child());
}
