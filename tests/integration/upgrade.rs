//! A new binary takes over, or does not.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use ringleader::{Body, BoxError, Response, Server, Shard, service_fn};

use crate::support::{Client, Process, Site, echo, eventually, local, settle, spawn};

/// A process that took over; ended when the test is done with it.
struct Heir(u32);

impl Heir {
    /// The one that the log tells of.
    #[track_caller]
    fn of(server: &mut Process) -> Self {
        let line = server.wait_for_line("has taken over");
        let number = line.rsplit("process=").next().and_then(|number| number.trim().parse().ok());
        Self(number.unwrap_or_else(|| panic!("no process in {line}")))
    }

    fn signal(&self, signal: i32) {
        // SAFETY: sends a signal to the process that the test has brought about.
        unsafe { libc::kill(self.0 as i32, signal) };
    }
}

impl Drop for Heir {
    fn drop(&mut self) {
        self.signal(libc::SIGKILL);
    }
}

fn who(client: &mut Client) -> u32 {
    let answer = client.get("/whoami");
    let text = answer.text();
    let number = text.split(r#""pid":"#).nth(1).and_then(|rest| rest.split(',').next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no process in {text}"))
}

#[test]
fn on_sigusr2_a_new_process_takes_over_and_the_old_one_finishes_what_it_has() {
    let mut server = spawn(&[], &["--executors", "2", "--chaos"]);
    let mut busy = server.connect();
    assert_eq!(busy.get("/").status, 200);
    busy.ask("/chaos/sleep?ms=1500");
    server.signal(libc::SIGUSR2);
    let heir = Heir::of(&mut server);
    assert_ne!(heir.0, server.id());
    let answer = busy.answer();
    assert_eq!((answer.status, answer.text()), (200, "slept\n"));
    assert_eq!(server.wait_alone(), Some(0));
    for _ in 0..8 {
        assert_eq!(who(&mut server.connect()), heir.0);
    }
}

#[test]
fn without_a_time_limit_a_new_process_takes_over_when_it_is_ready() {
    let mut server = spawn(&[], &["--executors", "1", "--upgrade-timeout", "0"]);
    server.signal(libc::SIGUSR2);
    let heir = Heir::of(&mut server);
    assert_eq!(server.wait_alone(), Some(0));
    assert_eq!(who(&mut server.connect()), heir.0);
}

#[test]
fn upgrades_in_a_row_lose_no_connection() {
    let mut server = spawn(&[], &["--executors", "3"]);
    let address = server.address();
    let (over, served) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut heirs = Vec::new();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    assert_eq!(Client::connect(address).get("/").status, 200);
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        server.signal(libc::SIGUSR2);
        heirs.push(Heir::of(&mut server));
        for generation in 0..3 {
            server.wait_for_line("drained=true");
            heirs[generation].signal(libc::SIGUSR2);
            heirs.push(Heir::of(&mut server));
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(served.load(Ordering::Relaxed) > 10);
}

/// The old process ends a stalled executor's listener only where nobody else has it.
#[test]
fn while_an_executor_is_stalled_an_upgrade_loses_no_connection() {
    let mut server = spawn(&[], &["--executors", "2", "--chaos"]);
    let mut stalled = server.connect();
    stalled.ask("/chaos/spin?ms=3000");
    server.wait_for_line("an executor is stalled");
    server.signal(libc::SIGUSR2);
    let heir = Heir::of(&mut server);
    for _ in 0..40 {
        assert_eq!(server.connect().get("/").status, 200, "whoever answers");
    }
    assert_eq!(stalled.answer().status, 200, "its turn was over in time");
    assert_eq!(server.wait_alone(), Some(0));
    let mut met = HashSet::new();
    eventually("each executor of the new process gets connections", || {
        let mut client = server.connect();
        assert_eq!(who(&mut client), heir.0);
        met.insert(client.get("/whoami").text().split(',').next().map(str::to_owned));
        met.len() == 2
    });
}

/// The executors that run, by the names of their threads.
fn executors(process: u32) -> usize {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("it lives").flatten();
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    let numbered =
        |name: &String| name.trim().strip_prefix("ringleader-").is_some_and(|slot| slot.parse::<u16>().is_ok());
    names.filter(numbered).count()
}

#[test]
fn the_new_process_begins_with_as_many_executors_as_the_load_has_asked_for() {
    // One client in a row keeps one executor busy all of the time, which is a third of three and more than a fifth.
    let hasty = ["--scale-period", "0.1", "--scale-high", "0.2", "--scale-low", "0", "--scale-up-after", "1"];
    let lazy = ["--scale-down-after", "1000000"];
    let mut server = spawn(&[], &[&["--executors", "1..4", "--chaos"][..], &hasty, &lazy].concat());
    assert_eq!(executors(server.id()), 1);
    let mut client = server.connect();
    eventually("the load has four", || {
        assert_eq!(client.get("/chaos/block?ms=20").status, 200);
        executors(server.id()) == 4
    });
    drop(client);
    server.signal(libc::SIGUSR2);
    let heir = Heir::of(&mut server);
    assert_eq!(executors(heir.0), 4, "nobody has asked it for anything yet");
}

/// A place from which a program is run that can be replaced.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ringleader-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("there is room");
        let place = Self(path);
        place.put_the_binary();
        place
    }

    fn program(&self) -> PathBuf {
        self.0.join("server")
    }

    fn put_the_binary(&self) {
        let next = self.0.join("next");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_ringleader"), &next).expect("it is new");
        fs::rename(next, self.program()).expect("it is there");
    }

    fn put_a_script(&self, text: &str) {
        let next = self.0.join("next");
        fs::write(&next, format!("#!/bin/sh\n{text}\n")).expect("there is room");
        fs::set_permissions(&next, fs::Permissions::from_mode(0o755)).expect("it is ours");
        fs::rename(next, self.program()).expect("it is there");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_new_binary_that_is_no_good_costs_nothing_and_the_next_one_takes_over() {
    let place = Place::new("replaced");
    let mut command = Command::new(place.program());
    command.args(["serve", "--listen", "127.0.0.1:0", "--executors", "2", "--upgrade-timeout", "3"]);
    let mut server = Process::of(command.env_remove("RUST_LOG").stdin(Stdio::null())).serving();
    let mut kept = server.connect();
    for (script, reason) in [
        ("exit 3", "it exited with status 3 before it was ready"),
        ("kill -ABRT $$", "it was killed by SIGABRT before it was ready"),
        ("exec <&-; exec sleep 1000", "it closed its standard input without a word"),
        ("exec sleep 1000", "it was not ready in time"),
        (&format!("exec {} serve --listen 192.0.2.1:80", env!("CARGO_BIN_EXE_ringleader")), "192.0.2.1:80"),
        (&format!("exec {} serve --no-such-flag", env!("CARGO_BIN_EXE_ringleader")), "exited with status 2"),
    ] {
        place.put_a_script(script);
        server.signal(libc::SIGUSR2);
        let line = server.wait_for_line("no new process takes over");
        assert!(line.contains(reason), "no {reason:?} in {line}");
        assert_eq!(kept.get("/").status, 200);
        for _ in 0..4 {
            assert_eq!(who(&mut server.connect()), server.id());
        }
    }
    place.put_the_binary();
    server.signal(libc::SIGUSR2);
    let heir = Heir::of(&mut server);
    // What is in the queues when the old one begins to drain is answered by either.
    eventually("the new one answers", || who(&mut server.connect()) == heir.0);
}

#[test]
fn a_new_process_that_fails_after_it_has_taken_over_is_told_of() {
    let place = Place::new("failing");
    let mut command = Command::new(place.program());
    command.args(["serve", "--listen", "127.0.0.1:0", "--executors", "1", "--chaos"]);
    let mut server = Process::of(command.env_remove("RUST_LOG").stdin(Stdio::null())).serving();
    // It says that it is ready, is heard, and fails.
    place.put_a_script(
        "exec python3 -c \"import os, socket; line = socket.socket(fileno=0); line.send(b'ready %d' % os.getpid())\nwhile \
         line.recv(9999): pass\nos._exit(7)\"",
    );
    let mut busy = server.connect();
    assert_eq!(busy.get("/").status, 200);
    busy.ask("/chaos/sleep?ms=5000");
    // Answered after that request has been taken up.
    assert_eq!(server.connect().get("/").status, 200);
    server.signal(libc::SIGUSR2);
    server.wait_for_line("has taken over; this one drains");
    let line = server.wait_for_line("nobody serves the addresses");
    assert!(line.contains("exited with status 7"), "{line}");
    assert_eq!(busy.answer().status, 200, "what it has it answers");
    server.wait().expect(1, &["nobody serves"]);
}

#[test]
fn during_an_upgrade_another_is_refused_and_a_stop_ends_both() {
    let place = Place::new("hanging");
    let mut command = Command::new(place.program());
    command.args(["serve", "--listen", "127.0.0.1:0", "--executors", "1"]).stdin(Stdio::null());
    let mut server = Process::of(&mut command).serving();
    place.put_a_script("exec sleep 1000");
    server.signal(libc::SIGUSR2);
    server.wait_for_line("has been started");
    server.signal(libc::SIGUSR2);
    server.wait_for_line("an upgrade is under way");
    server.signal(libc::SIGTERM);
    // Its end is that of everybody who could still print: the new process has been killed.
    server.wait().expect(0, &["the server was told to stop meanwhile", "stopped"]);
}

#[test]
fn while_it_drains_an_upgrade_is_refused_and_the_service_goes_on() {
    let mut server = spawn(&[], &["--executors", "1", "--drain-delay", "3600"]);
    server.signal(libc::SIGTERM);
    server.wait_for_line("not ready");
    server.signal(libc::SIGUSR2);
    let line = server.wait_for_line("no new process takes over");
    assert!(line.contains("the server is stopping"), "{line}");
    assert_eq!(server.connect().get("/").status, 200);
}

/// The cure for a crash loop may be the new binary.
#[test]
fn in_a_crash_loop_a_new_process_takes_over() {
    let mut server = spawn(&[], &["--executors", "1", "--chaos", "--quarantine-after", "0"]);
    // The wait for the next generation doubles each time: it is 800 ms or so after the fifth.
    for _ in 0..5 {
        server.connect().ask("/chaos/escape");
        server.wait_for_line("an executor has ended");
    }
    server.signal(libc::SIGUSR2);
    let heir = Heir::of(&mut server);
    assert_eq!(server.wait_alone(), Some(0));
    assert_eq!(who(&mut server.connect()), heir.0);
}

#[test]
fn without_descriptors_an_upgrade_is_refused_with_the_reason_and_the_service_goes_on() {
    let mut server = spawn(&[], &["--executors", "1"]);
    let mut kept = server.connect();
    assert_eq!(kept.get("/").status, 200);
    let allowed = server.limit_descriptors_for_now(4);
    server.signal(libc::SIGUSR2);
    let line = server.wait_for_line("no new process takes over");
    assert!(line.contains("Too many open files") && line.contains("raise the limit on open files"), "{line}");
    assert_eq!(kept.get("/").status, 200);
    server.limit_descriptors_for_now(allowed);
    server.signal(libc::SIGUSR2);
    let heir = Heir::of(&mut server);
    assert_eq!(server.wait_alone(), Some(0));
    assert_eq!(who(&mut server.connect()), heir.0);
}

#[test]
fn fewer_or_more_executors_take_over_all_listeners() {
    for executors in [2, 6] {
        let place = Place::new(&format!("sizes-{executors}"));
        let mut command = Command::new(place.program());
        command.args(["serve", "--listen", "127.0.0.1:0", "--executors", "4"]).stdin(Stdio::null());
        let mut server = Process::of(&mut command).serving();
        let binary = env!("CARGO_BIN_EXE_ringleader");
        place.put_a_script(&format!("exec {binary} serve --listen 127.0.0.1:0 --executors {executors}"));
        server.signal(libc::SIGUSR2);
        let heir = Heir::of(&mut server);
        assert_eq!(server.wait_alone(), Some(0));
        for _ in 0..24 {
            assert_eq!(who(&mut server.connect()), heir.0);
        }
        heir.signal(libc::SIGUSR2);
        let next = Heir::of(&mut server);
        for _ in 0..24 {
            let answering = who(&mut server.connect());
            assert!([heir.0, next.0].contains(&answering), "{answering}");
        }
    }
}

#[test]
fn an_order_to_upgrade_has_an_answer() {
    let site = Site::start(
        local(1).successor(|| Command::new("/no/such/program")).serve(async |_: Shard| Ok(service_fn(echo))),
    );
    let error = settle(site.upgrade()).expect_err("there is no such program");
    assert!(error.is_refused() && error.to_string().contains("/no/such/program"), "{error}");
    assert_eq!(site.connect().get("/").status, 200);
    let handle = ringleader::Handle::clone(&site);
    drop(site);
    assert!(settle(handle.upgrade()).is_err(), "it has ended");
}

#[test]
fn who_orders_an_upgrade_during_another_is_refused_and_the_first_has_its_own_answer() {
    let sleeps = || {
        let mut command = Command::new("sleep");
        command.arg("600");
        command
    };
    let builder = local(1).successor(sleeps).upgrade_timeout(Duration::from_secs(2));
    let site = Site::start(builder.serve(async |_: Shard| Ok(service_fn(echo))));
    let first = site.upgrade();
    let second = settle(site.upgrade()).expect_err("one is under way").to_string();
    assert!(second.contains("under way"), "{second}");
    let first = settle(first).expect_err("it only sleeps").to_string();
    assert!(first.contains("not ready in time"), "{first}");
    assert_eq!(site.connect().get("/").status, 200);
}

#[test]
fn an_embedder_says_how_its_successor_is_started() {
    let server: Server = local(2)
        .successor(|| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_ringleader"));
            command.args(["serve", "--listen", "127.0.0.1:0", "--executors", "2"]).stderr(Stdio::null());
            command
        })
        .serve(async |_: Shard| Ok(service_fn(echo)));
    let running = Site::start(server).into_running();
    let address = running.local_addrs()[0];
    let heir = Heir(settle(running.upgrade()).expect("it is ready"));
    assert!(settle(running.join()).expect("it has drained").drained);
    assert_eq!(who(&mut Client::connect(address)), heir.0);
}

/// Set for a process that is to take over.
const SUCCESSOR: &str = "RINGLEADER_TEST_SUCCESSOR";

/// Of a process that takes over from that of the next test, and of no other: its first executor is ready at once and hangs
/// then, and the start of the second fails when it does.
#[test]
fn a_successor_that_hangs_and_fails() {
    if std::env::var_os(SUCCESSOR).is_none() {
        return;
    }
    let hangs = Arc::new(AtomicBool::new(false));
    let server = local(2).stop_grace(Duration::from_millis(100)).serve(async move |shard: Shard| {
        if shard.id().to_string() == "1" {
            while !hangs.load(Ordering::SeqCst) {
                shard.sleep(Duration::from_millis(5)).await;
            }
            return Err("the second cannot start".into());
        }
        let (hangs, sleep) = (Arc::clone(&hangs), shard.sleep(Duration::from_millis(300)));
        shard.background("hangs", async move {
            sleep.await;
            hangs.store(true, Ordering::SeqCst);
            loop {
                thread::park();
            }
        });
        Ok(service_fn(async |_| Ok::<_, BoxError>(Response::new(Body::from("of the new process")))))
    });
    let error = server.start().wait().expect_err("the second cannot start");
    assert!(error.to_string().contains("the second cannot start"), "{error}");
    #[expect(clippy::disallowed_methods, reason = "its executor hangs, and the process is the test's own")]
    std::process::exit(0);
}

#[test]
fn a_new_process_that_hangs_and_fails_costs_nobody_a_connection_and_leaves_the_listeners_as_they_were() {
    let server = local(2)
        .successor(|| {
            let mut command = Command::new(std::env::current_exe().expect("it is there"));
            command.args(["upgrade::a_successor_that_hangs_and_fails", "--exact", "--nocapture"]);
            command.env(SUCCESSOR, "1").stdout(Stdio::null()).stderr(Stdio::null());
            command
        })
        .serve(async |shard: Shard| {
            let name = shard.id().to_string();
            Ok(service_fn(async move |_| Ok::<_, BoxError>(Response::new(Body::from(name.clone())))))
        });
    let site = Site::start(server);
    for _ in 0..2 {
        let (over, served) = (AtomicBool::new(false), AtomicU64::new(0));
        let error = thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    let answer = site.connect().get("/");
                    assert!(answer.status == 200 && answer.text() != "of the new process", "{answer:?}");
                    served.fetch_add(1, Ordering::SeqCst);
                }
            });
            let order = settle(site.upgrade());
            over.store(true, Ordering::SeqCst);
            order.expect_err("its second executor cannot start")
        });
        assert!(served.load(Ordering::SeqCst) > 10);
        assert!(error.to_string().contains("the second cannot start"), "{error}");
        let mut met = HashSet::new();
        eventually("both executors answer", || {
            met.insert(site.connect().get("/").text().to_owned());
            met.len() == 2
        });
        for _ in 0..20 {
            assert_eq!(site.connect().get("/").status, 200);
        }
    }
}
