//! What the command says to bad input and to systems that lack something: one message, a status, no panic.

use std::net::TcpListener;

use crate::support::{eventually, run, spawn};

#[test]
fn usage_errors_are_explained_and_end_with_status_2() {
    for (arguments, words) in [
        (&["--listen", "nonsense"][..], &["nonsense", "port"][..]),
        (&["--listen", "127.0.0.1:99999"], &["127.0.0.1:99999"]),
        (&["--listen", "no-such-host.invalid:80"], &["no-such-host.invalid"]),
        (&["--executors", "0"], &["--executors", "one executor at least"]),
        (&["--executors", "many"], &["--executors", "auto"]),
        (&["--executors", "100000"], &["100000"]),
        (&["--cpus", "999"], &["999"]),
        (&["--cpus", "a-b"], &["a-b"]),
        (&["--root", "/no/such/directory"], &["/no/such/directory"]),
        (&["--idle-timeout=-1"], &["--idle-timeout"]),
        (&["--header-bytes", "10"], &["8192"]),
        (&["--max-in-flight", "0"], &["--max-in-flight"]),
        (&["--max-delay", "soon"], &["--max-delay"]),
        (&["--stall-limit", "0"], &["--stall-limit"]),
        (&["--backlog", "0"], &["--backlog"]),
        (&["--connections", "0"], &["--connections"]),
        (&["--headers", "0"], &["--headers", "1 is the least"]),
        (&["--headers", "18446744073709551615"], &["--headers", "10000 is the most", "table"]),
        (&["--headers", "10001"], &["--headers", "10000 is the most"]),
        (&["--header-bytes", "1048577"], &["--header-bytes", "1048576 bytes is the most"]),
        (&["--stall-limit", "18446744073709551615"], &["--stall-limit", "86400000"]),
        (&["--restart-delay", "15001"], &["--restart-delay", "15.001s", "--restart-delay-max"]),
        (&["--restart-jitter", "1.5"], &["--restart-jitter", "0 to 1"]),
        (&["--leaked-max", "0"], &["--leaked-max"]),
        (&["--unfit-max", "most"], &["--unfit-max", "0 to 1"]),
        (&["--stop-grace", "0"], &["stop_grace", "100 ms is the least"]),
        (&["--standstill-limit=-1"], &["--standstill-limit"]),
        (&["--scale-low", "0.8"], &["Scaling::low", "below `high`"]),
        (&["--scale-up-after", "0"], &["--scale-up-after"]),
        (&["--escalate-after", "10001"], &["--escalate-after", "10000"]),
        (&["--ready-path", "ready"], &["--ready-path", "such as /ready"]),
        (&["--log", "ringleader=loud"], &["--log"]),
        (&["--log", ""], &["--log", "info"]),
        (&["--listen", ":18001"], &["host", "0.0.0.0:18001", "[::]:18001"]),
        (&["--listen", "[fe80::1]:18001"], &["interface", "ip link", "[fe80::1%2]:18001"]),
        (&["--listen", "::1:18001"], &["brackets", "[::1]:18001"]),
        (&["--listen", "[::ffff:127.0.0.1]:18001"], &["IPv4-mapped", "127.0.0.1:18001"]),
        (&["--listen", "unix:/run/web.sock"], &["not supported"]),
        (&["--share-port", "--steering", "least-loaded"], &["shared", "random"]),
        (&["--no-such-flag"], &["--no-such-flag"]),
    ] {
        let free = if arguments[0] == "--listen" { &[][..] } else { &["--listen", "127.0.0.1:0"] };
        run(&[], &[&["serve"], free, arguments].concat()).expect(2, words);
    }
    run(&[], &["no-such-command"]).expect(2, &["no-such-command"]);
    run(&[], &[]).expect(2, &["serve"]);
}

#[test]
fn help_is_not_an_error() {
    run(&[], &["--help"]).expect(0, &["serve"]);
    run(&[], &["serve", "--help"]).expect(0, &["--listen", "--executors", "--drain-timeout"]);
    run(&[], &["--version"]).expect(0, &[env!("CARGO_PKG_VERSION")]);
}

#[test]
fn a_port_in_use_is_explained_with_its_holder() {
    let first = spawn(&[], &["--executors", "1"]);
    let address = first.address().to_string();
    let holder = format!("{}", first.id());
    run(&[], &["serve", "--listen", &address]).expect(1, &[&address, "in use", &holder, "ringleader"]);
    assert_eq!(first.connect().get("/").status, 200);
}

#[test]
fn sharing_a_port_in_use_is_proposed_where_it_can_help() {
    // Nobody can join a single listener.
    for (executors, options, proposed) in [("2", &[][..], true), ("1", &[], false), ("1", &["--share-port"], false)] {
        let first = spawn(&[], &["--executors", executors]);
        let address = first.address().to_string();
        let ended = run(&[], &[&["serve", "--listen", &address], options].concat());
        assert_eq!(ended.printed.contains("--share-port"), proposed, "{}", ended.printed);
        ended.expect(1, &["in use", "another port"]);
    }
}

#[test]
fn addresses_that_overlap_are_explained() {
    for of_all in [false, true] {
        // Again with another port when somebody takes this one meanwhile; a child of another test's may still have it.
        eventually("both are this process's", || {
            let free =
                TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port is free");
            let (address, all) = (free.to_string(), format!("0.0.0.0:{}", free.port()));
            let first = if of_all { &all } else { &address };
            let ended = run(&[], &["serve", "--listen", first, "--listen", &address]);
            ended.expect(1, &[&address, "in use"]);
            ended.printed.contains("this process itself") && ended.printed.contains("overlap")
        });
    }
}

#[test]
fn a_port_held_by_another_program_is_explained_too() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it is bound").to_string();
    let holder = format!("{}", std::process::id());
    run(&[], &["serve", "--listen", &address]).expect(1, &[&address, "in use", &holder]);
}

#[test]
fn an_address_of_another_machine_is_explained() {
    // TEST-NET-1 of RFC 5737: nobody's.
    run(&[], &["serve", "--listen", "192.0.2.1:8080"]).expect(1, &["192.0.2.1:8080", "interface"]);
}

#[test]
fn too_few_descriptors_are_explained() {
    // 64, and for each executor 20, one for its listener, and 16 for connections.
    let words = &["40 open files", "138 at least", "ulimit -n", "LimitNOFILE"];
    run(&["prlimit", "--nofile=40:40"], &["serve", "--listen", "127.0.0.1:0", "--executors", "2"]).expect(1, words);
}

#[test]
fn io_uring_refused_is_explained() {
    let refusing = |errno| {
        let inject = format!("inject=io_uring_setup:error={errno}");
        let strace = ["strace", "-f", "-o", "/dev/null", "-e", "trace=io_uring_setup", "-e", &inject];
        run(&strace, &["serve", "--listen", "127.0.0.1:0", "--executors", "1"])
    };
    refusing("EPERM").expect(1, &["io_uring", "seccomp", "Docker"]);
    refusing("ENOSYS").expect(1, &["io_uring", "kernel", "6.1"]);
    refusing("ENOMEM").expect(1, &["io_uring", "memory"]);
}

#[test]
fn a_start_that_fails_is_told_once() {
    // Of each thread the fourth ring: of the probe's it is one that is not required, of an executor's it is ours.
    let inject = "inject=io_uring_setup:error=ENOMEM:when=4+";
    let strace = ["strace", "-f", "-o", "/dev/null", "-e", "trace=io_uring_setup", "-e", inject];
    let ended = run(&strace, &["serve", "--listen", "127.0.0.1:0", "--executors", "4"]);
    // No line for each executor, nor a promise that is not kept.
    for untrue in ["could not be started", "tried again"] {
        assert!(!ended.printed.contains(untrue), "{untrue:?} in:\n{}", ended.printed);
    }
    ended.expect(1, &["did not start"]);
}

#[test]
fn a_thread_that_cannot_be_had_at_the_start_is_an_error() {
    let inject = "inject=clone3:error=EAGAIN:when=1";
    let strace = ["strace", "-f", "-o", "/dev/null", "-e", "trace=clone3", "-e", inject];
    let ended = run(&strace, &["serve", "--listen", "127.0.0.1:0", "--executors", "1"]);
    ended.expect(1, &["starting a thread", "ulimit -u"]);
}

#[test]
fn a_lack_of_threads_at_any_point_of_the_start_is_told_with_a_remedy_and_without_a_panic() {
    // A user of this test's own, whose threads are counted.
    let as_somebody = ["setpriv", "--reuid=61123", "--regid=61123", "--clear-groups", "prlimit"];
    // SAFETY: has no preconditions and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let wrapper = if root { &as_somebody[..] } else { &as_somebody[4..] };
    // Main's, the supervisor's, two executors', and two of glommio's: with one fewer the start fails somewhere.
    for threads in 1..6 {
        let limit = format!("--nproc={threads}:{threads}");
        let ended = run(&[wrapper, &[&limit]].concat(), &["serve", "--listen", "127.0.0.1:0", "--executors", "2"]);
        assert!(!ended.printed.contains("panic"), "{threads}:\n{}", ended.printed);
        ended.expect(1, &["ulimit -u", "TasksMax="]);
    }
}

#[test]
fn too_little_locked_memory_for_so_many_executors_is_explained() {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("Linux has it");
    let version: Vec<u32> = release.split(['.', '-', '\n']).map_while(|number| number.parse().ok()).take(2).collect();
    if version < vec![6, 14] {
        return eprintln!("skipped: before Linux 6.14 rings are not counted");
    }
    // Still root, if it was, and without any privilege of root's.
    let without_privilege = ["setpriv", "--bounding-set=-all", "prlimit", "--memlock=1048576:2097152"];
    // SAFETY: has no preconditions and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let wrapper = if root { &without_privilege[..] } else { &without_privilege[2..] };
    let ended = run(wrapper, &["serve", "--listen", "127.0.0.1:0", "--executors", "16"]);
    ended.expect(1, &["locked memory", "2048 KiB", "16 executors need", "ulimit -l", "LimitMEMLOCK="]);
}

#[test]
fn too_little_locked_memory_is_explained() {
    // Root may lock memory whatever the limit; without that privilege the limit counts.
    let as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "prlimit", "--memlock=65536:65536"];
    // SAFETY: has no preconditions and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let wrapper = if root { &as_nobody[..] } else { &as_nobody[4..] };
    run(wrapper, &["serve", "--listen", "127.0.0.1:0", "--executors", "1"]).expect(1, &["locked memory", "64 KiB"]);
}

#[test]
fn it_serves_where_there_is_no_sys_and_its_executors_alone_are_pinned() {
    let apart =
        ["unshare", "-m", "--propagation", "private", "sh", "-c", "mount -t tmpfs none /sys && exec \"$@\"", "sh"];
    let tried = std::process::Command::new(apart[0]).args(&apart[1..]).arg("true").output().expect("unshare is there");
    if !tried.status.success() {
        return eprintln!("skipped: {}", String::from_utf8_lossy(&tried.stderr));
    }
    let server = spawn(&apart, &["--executors", "2"]);
    assert_eq!(server.connect().get("/").status, 200);
    let everywhere = server.cpus_of("ringleader");
    for executor in ["ringleader-0", "ringleader-1"] {
        let cpus = server.cpus_of(executor);
        assert!(cpus.len() == 1 && cpus[0].parse::<usize>().is_ok(), "{executor} runs on {cpus:?}");
    }
    assert_eq!(server.cpus_of("ringleader-pool"), [&everywhere[0][..]; 2], "of {everywhere:?}");
}

#[test]
fn the_start_says_what_is_served_and_within_which_limits() {
    let mut server = spawn(&[], &["--executors", "3", "--chaos"]);
    let executors = server.wait_for_line("3 executors");
    assert!(executors.contains(&format!("process {}", server.id())), "{executors}");
    let limits = server.wait_for_line("limits:");
    for word in ["backlog 4096", "head 32768 bytes", "100 fields", "body 1048576 bytes", "idle 75 s", "drain 30 s"] {
        assert!(limits.contains(word), "no {word:?} in {limits}");
    }
    server.wait_for_line("--chaos");
}

#[test]
fn the_built_in_application_answers() {
    let server = spawn(&[], &["--executors", "1"]);
    let mut client = server.connect();
    let hello = client.get("/");
    assert_eq!((hello.status, hello.text()), (200, "Hello, World!"));
    assert!(hello.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")));
    assert!(hello.header("date").is_some());
    let json = client.get("/json");
    assert_eq!(
        (json.header("content-type"), json.text()),
        (Some("application/json"), r#"{"message":"Hello, World!"}"#)
    );
    let whoami = client.get("/whoami");
    for word in [
        r#""executor":0,"#,
        r#""generation":1,"#,
        r#""cpu":"#,
        &format!(r#""pid":{},"#, server.id()),
        r#""connections":1,"#,
        r#""requests":3"#,
    ] {
        assert!(whoami.text().contains(word), "no {word:?} in {}", whoami.text());
    }
    assert_eq!(client.get("/nothing").status, 404);
    assert_eq!(client.get("/chaos/panic").status, 404, "without --chaos there is no chaos");
}

#[test]
fn no_tunnel_is_opened() {
    let server = spawn(&[], &["--executors", "1"]);
    for target in ["/echo", "example.com:80"] {
        let mut client = server.connect();
        client.send(format!("CONNECT {target} HTTP/1.1\r\nHost: a\r\n\r\n"));
        assert_eq!(client.answer().status, 501, "CONNECT {target}");
    }
}
