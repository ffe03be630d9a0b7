//! Static files over a connection: large ones, which go past hyper, small ones, which do not, and both in one pipeline.
//! Every byte is compared.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ringleader::{Body, Files, HttpLimits, Request, Response, Stop, service_fn};

use crate::support::{BOUND, Client, Process, Site, eventually, local, settle, spawn};

const MIB: usize = 1024 * 1024;
/// More than the kernel's buffers hold of a connection whose client does not read: 4 MiB to send (`tcp_wmem`), 32 to
/// receive (`tcp_rmem`).
const TOO_MUCH_TO_BUFFER: usize = 48 * MIB;

/// Numbers that a seed determines (a 64-bit generator of Knuth's).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 ^ self.0 >> 29
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 16) as usize % bound
    }
}

/// Content that does not repeat.
fn noise(length: usize) -> Vec<u8> {
    let mut random = Random(length as u64 + 1);
    let mut content = Vec::with_capacity(length + 8);
    while content.len() < length {
        content.extend_from_slice(&random.next().to_le_bytes());
    }
    content.truncate(length);
    content
}

/// A directory of files, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("ringleader-served-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("it is new");
        Self(path)
    }

    /// A file of [`noise`]; its content.
    fn file(&self, name: &str, length: usize) -> Vec<u8> {
        let content = noise(length);
        fs::write(self.0.join(name), &content).expect("there is room");
        content
    }

    fn files(&self) -> Arc<Files> {
        Arc::new(Files::open(&self.0).expect("it is there"))
    }

    /// Serves them, and what is posted to `/hello` or another path, after it has been read.
    fn site(&self) -> Site {
        self.site_with(HttpLimits::default())
    }

    fn site_with(&self, limits: HttpLimits) -> Site {
        let files = self.files();
        Site::start(local(1).http_limits(limits).serve(async move |_| {
            let files = Arc::clone(&files);
            Ok(service_fn(async move |request: Request| {
                let request = match request.method().as_str() {
                    "POST" => {
                        let (mut head, body) = request.into_parts();
                        body.collect(MIB).await?;
                        head.method = http::Method::GET;
                        Request::from_parts(head, Body::empty())
                    }
                    _ => request,
                };
                match request.uri().path() {
                    "/hello" => Ok(Response::new(Body::from("hello"))),
                    _ => Ok(files.respond(&request).await.map(Body::from)),
                }
            }))
        }))
    }

    fn descriptors(&self) -> usize {
        let open = fs::read_dir("/proc/self/fd").expect("procfs").flatten();
        let below = |target: PathBuf| target.starts_with(&self.0) && target != self.0;
        open.filter(|entry| fs::read_link(entry.path()).is_ok_and(below)).count()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let removed = fs::remove_dir_all(&self.0);
        assert!(removed.is_ok() || thread::panicking(), "{removed:?}");
    }
}

/// Throws pages out of the page cache, as far as the file system does that; `length` 0 is to the end.
fn make_cold(path: &Path, start: usize, length: usize) {
    let file = File::open(path).expect("the file");
    file.sync_all().expect("dirty pages stay");
    // SAFETY: an advice about an open file; no memory of ours is involved.
    let answer =
        unsafe { libc::posix_fadvise(file.as_raw_fd(), start as i64, length as i64, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(answer, 0);
}

fn in_flight(site: &Site) -> u64 {
    site.stats().executors[0].in_flight
}

/// Reads on until the server ends the connection, however it does.
fn rest(client: &mut Client) -> Vec<u8> {
    let mut received = Vec::new();
    loop {
        match client.some() {
            Ok(bytes) if bytes.is_empty() => return received,
            Ok(bytes) => received.extend(bytes),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return received,
            Err(error) => panic!("{error} instead of the connection's end"),
        }
    }
}

#[test]
fn files_of_every_size_arrive_whole_on_one_connection() {
    let directory = Directory::new();
    let sizes = [0, 1, 4095, 4096, 32_767, 32_768, 65_535, 65_536, 65_537, 262_144, 300_001, MIB, 5 * MIB + 3];
    let contents: Vec<Vec<u8>> = sizes.iter().map(|size| directory.file(&size.to_string(), *size)).collect();
    let site = directory.site();
    let mut client = site.connect();
    for _ in 0..2 {
        for content in &contents {
            let path = format!("/{}", content.len());
            let answer = client.get(&path);
            assert_eq!(answer.status, 200);
            assert!(answer.body == *content, "{path}");
            client.send(format!("HEAD {path} HTTP/1.1\r\nhost: test\r\n\r\n"));
            let head = client.head();
            assert_eq!(head.header("content-length"), Some(content.len().to_string().as_str()));
            let etag = answer.header("etag").expect("a file has a tag");
            client.send(format!("GET {path} HTTP/1.1\r\nhost: test\r\nif-none-match: {etag}\r\n\r\n"));
            assert_eq!(client.head().status, 304);
        }
        // On a connection where anything too much had been sent, this would not be the answer.
        assert_eq!(client.get("/hello").text(), "hello");
    }
    eventually("the last file is closed", || directory.descriptors() == 0);
    assert_eq!(in_flight(&site), 0);
}

#[test]
fn ranges_of_a_large_file() {
    let directory = Directory::new();
    let content = directory.file("f", 5 * MIB);
    let site = directory.site();
    let mut client = site.connect();
    let mut ask = |ranges: &str| {
        client.send(format!("GET /f HTTP/1.1\r\nhost: test\r\nrange: bytes={ranges}\r\n\r\n"));
        client.answer()
    };
    for (range, from, to) in [("4097-3000000", 4097, 3_000_001), ("1000000-", 1_000_000, 5 * MIB), ("0-9", 0, 10)] {
        let answer = ask(range);
        assert_eq!(answer.status, 206);
        assert!(answer.body == content[from..to], "{range}");
    }
    let answer = ask("-100000");
    assert!(answer.body == content[5 * MIB - 100_000..]);
    let answer = ask("10-1000009,2000000-2999999,5000000-5000009");
    assert_eq!(answer.status, 206);
    let at = |piece: &[u8]| answer.body.windows(piece.len()).position(|window| window == piece);
    let heads: Vec<usize> = ["10-1000009/", "2000000-2999999/", "5000000-5000009/"]
        .map(|part| at(format!("Content-Range: bytes {part}").as_bytes()).expect("its part has a head"))
        .to_vec();
    for (head, from, length) in [(heads[0], 10, 1_000_000), (heads[1], 2_000_000, 1_000_000), (heads[2], 5_000_000, 10)]
    {
        let start = head + answer.body[head..].windows(4).position(|end| end == b"\r\n\r\n").expect("an end") + 4;
        assert!(answer.body[start..start + length] == content[from..from + length], "{from}");
    }
    assert!(answer.body.ends_with(b"--\r\n"));
    assert_eq!(ask("9999999-").status, 416);
}

#[test]
fn http_1_0_and_connection_close_end_the_connection_after_the_file() {
    let directory = Directory::new();
    let content = directory.file("f", 3 * MIB);
    let site = directory.site();
    for request in ["GET /f HTTP/1.0\r\n\r\n", "GET /f HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"] {
        let mut client = site.connect();
        client.send(request);
        assert_eq!(client.head().header("content-length"), Some("3145728"));
        assert!(rest(&mut client) == content);
    }
    // HTTP/1.0 with keep-alive.
    let mut client = site.connect();
    for _ in 0..2 {
        client.send("GET /f HTTP/1.0\r\nconnection: keep-alive\r\n\r\n");
        assert!(client.answer().body == content);
    }
    eventually("all but that are closed", || site.stats().executors[0].open == 1);
}

/// One request of a pipeline, and how its answer is recognised.
struct Asked {
    request: String,
    status: u16,
    body: Vec<u8>,
    has_body: bool,
}

fn any_request(random: &mut Random, contents: &[Vec<u8>]) -> Asked {
    let content = &contents[random.below(contents.len())];
    let path = format!("/{}", content.len());
    let asked = |request: String, status, body: &[u8]| Asked { request, status, body: body.to_vec(), has_body: true };
    match random.below(8) {
        0 => asked("GET /hello HTTP/1.1\r\nhost: test\r\n\r\n".into(), 200, b"hello"),
        1 => {
            let request = format!("HEAD {path} HTTP/1.1\r\nhost: test\r\n\r\n");
            Asked { has_body: false, ..asked(request, 200, b"") }
        }
        2 if content.len() > 1 => {
            let first = random.below(content.len() - 1);
            let last = first + random.below(content.len() - first);
            let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nrange: bytes={first}-{last}\r\n\r\n");
            asked(request, 206, &content[first..=last])
        }
        3 => {
            let posted = "x".repeat(random.below(20_000));
            let length = posted.len();
            asked(
                format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n{posted}"),
                200,
                content,
            )
        }
        4 => {
            let head = format!("POST {path} HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n");
            asked(head + "5\r\nhello\r\n0\r\n\r\n", 200, content)
        }
        _ => asked(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"), 200, content),
    }
}

/// `RINGLEADER_SEED=N` replays one run.
#[test]
fn pipelined_mixtures_are_answered_in_order_byte_by_byte() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later than 1970").as_nanos() as u64;
    let seed = std::env::var("RINGLEADER_SEED").map_or(now, |seed| seed.parse().expect("a number"));
    println!("RINGLEADER_SEED={seed}");
    let mut random = Random(seed);
    let directory = Directory::new();
    let sizes = [0, 1, 1000, 32_767, 32_768, 40_000, 65_535, 65_536, 65_537, 200_000, MIB, 3 * MIB + 1];
    let contents: Vec<Vec<u8>> = sizes.iter().map(|size| directory.file(&size.to_string(), *size)).collect();
    let site = directory.site();
    for _ in 0..12 {
        let count = 1 + random.below(24);
        let asked: Vec<Asked> = (0..count).map(|_| any_request(&mut random, &contents)).collect();
        // Some in one piece, some cut anywhere.
        let all: Vec<u8> = asked.iter().flat_map(|asked| asked.request.bytes()).collect();
        let cut = random.below(all.len());
        let mut client = site.connect();
        let mut stream = client.sender();
        let whole = random.below(2) == 0;
        let sender = thread::spawn(move || {
            let (first, second) = all.split_at(if whole { all.len() } else { cut });
            stream.write_all(first).and_then(|()| stream.write_all(second)).expect("the server takes it");
        });
        for (number, asked) in asked.iter().enumerate() {
            let answer = if asked.has_body { client.answer() } else { client.head() };
            assert_eq!(answer.status, asked.status, "{number}: {}", &asked.request[..30]);
            assert!(answer.body == asked.body, "{number} of {count}: {}", &asked.request[..30]);
        }
        sender.join().expect("all was sent");
        assert_eq!(client.get("/hello").text(), "hello");
    }
    eventually("nothing is in flight", || in_flight(&site) == 0);
    assert_eq!(directory.descriptors(), 0);
}

#[test]
fn a_request_that_is_garbage_waits_for_the_file_before_it() {
    let directory = Directory::new();
    let content = directory.file("f", 5 * MIB);
    let site = directory.site();
    for first in [
        "GET /f HTTP/1.1\r\nhost: test\r\n\r\n",
        "POST /f HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\nhello",
        // Answered before its body has come to an end: nothing but bytes in order is promised.
        "GET /f HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\nhello",
    ] {
        let mut client = site.connect();
        client.send(format!("{first}\0\0\0 garbage\r\n\r\n"));
        assert!(client.answer().body == content, "{first}");
        let rest = String::from_utf8(rest(&mut client)).expect("a head");
        assert!(rest.is_empty() || rest.starts_with("HTTP/1.1 400"), "{rest}");
    }
}

#[test]
fn a_client_that_reads_late_gets_the_file_and_is_not_idle_meanwhile() {
    let directory = Directory::new();
    let content = directory.file("f", TOO_MUCH_TO_BUFFER);
    let mut limits = HttpLimits::default();
    limits.idle_timeout = Some(Duration::from_millis(300));
    limits.hibernate_after = Some(Duration::from_millis(100));
    let site = directory.site_with(limits);
    let mut client = site.connect();
    client.ask("/f");
    client.head();
    // Nothing here can be waited for: it is about what does not happen.
    thread::sleep(Duration::from_secs(1));
    assert_eq!(in_flight(&site), 1);
    for _ in 0..3 {
        assert_eq!(site.connect().get("/hello").text(), "hello");
    }
    assert!(client.take(content.len()).expect("it goes on") == content);
    // The limits are in force again after it.
    client.expect_end();
    eventually("it is counted", || in_flight(&site) == 0 && site.stats().executors[0].timed_out > 0);
}

#[test]
fn a_client_that_has_ended_its_half_gets_the_file() {
    let directory = Directory::new();
    let content = directory.file("f", TOO_MUCH_TO_BUFFER);
    let site = directory.site();
    let mut client = site.connect();
    client.ask("/f");
    client.finish_sending();
    assert!(client.answer().body == content);
    client.expect_end();
}

#[test]
fn clients_that_go_away_in_the_middle_leave_nothing_behind() {
    let directory = Directory::new();
    directory.file("f", TOO_MUCH_TO_BUFFER);
    let site = directory.site();
    let clients: Vec<Client> = (0..8)
        .map(|_| {
            let mut client = site.connect();
            client.ask("/f");
            client.head();
            client
        })
        .collect();
    assert_eq!(in_flight(&site), 8);
    for (number, client) in clients.into_iter().enumerate() {
        if number % 2 == 0 { client.reset() } else { drop(client) }
    }
    eventually("all are gone", || site.stats().executors[0].open == 0 && in_flight(&site) == 0);
    eventually("their files are closed", || directory.descriptors() == 0);
    assert_eq!(site.connect().get("/hello").text(), "hello");
}

#[test]
fn a_file_that_becomes_shorter_breaks_off_the_connection() {
    let directory = Directory::new();
    let content = directory.file("f", TOO_MUCH_TO_BUFFER);
    let site = directory.site();
    let mut client = site.connect();
    client.ask("/f");
    client.head();
    let file = File::options().write(true).open(directory.0.join("f")).expect("it is there");
    file.set_len(MIB as u64).expect("it becomes shorter");
    let received = rest(&mut client);
    assert!(received.len() < content.len(), "neither padded nor invented");
    // What the kernel has queued shares its memory with the file: past the new end it may have become zeroes. The response
    // is broken off, so nobody takes it for the file.
    let kept = received.len().min(MIB);
    assert!(received[..kept] == content[..kept]);
    assert!(received.iter().zip(&content).skip(kept).all(|(received, byte)| received == byte || *received == 0));
    eventually("it is gone", || site.stats().executors[0].open == 0 && in_flight(&site) == 0);
    assert_eq!(site.connect().get("/f").body.len(), MIB);
}

#[test]
fn a_file_that_is_replaced_is_sent_as_it_was() {
    let directory = Directory::new();
    let content = directory.file("f", TOO_MUCH_TO_BUFFER);
    let site = directory.site();
    let mut client = site.connect();
    client.ask("/f");
    client.head();
    let new = directory.file("new", 2 * MIB);
    fs::rename(directory.0.join("new"), directory.0.join("f")).expect("a rename");
    assert!(client.take(content.len()).expect("it goes on") == content);
    assert!(client.get("/f").body == new);
}

#[test]
fn a_drain_waits_for_a_file_until_its_deadline() {
    let directory = Directory::new();
    let content = directory.file("f", TOO_MUCH_TO_BUFFER);
    let ask = |site: &Site, close: &str| {
        let mut client = site.connect();
        client.send(format!("GET /f HTTP/1.1\r\nhost: test\r\n{close}\r\n"));
        client.head();
        client
    };
    let site = directory.site();
    let mut clients = [ask(&site, ""), ask(&site, "connection: close\r\n")];
    let exit = site.stop(Stop::Drain(BOUND * 100));
    eventually("it drains", || !site.stats().ready);
    for client in &mut clients {
        assert!(client.take(content.len()).expect("it goes on") == content);
        client.expect_end();
    }
    assert!(settle(exit).expect("it stops").drained);

    let site = directory.site();
    let mut client = ask(&site, "");
    let exit = settle(site.stop(Stop::Drain(Duration::from_millis(300)))).expect("it stops");
    assert!(!exit.drained);
    let received = rest(&mut client);
    assert!(received.len() < content.len() && received == content[..received.len()]);
}

#[test]
fn cold_files_and_files_with_cold_parts_arrive_whole() {
    let directory = Directory::new();
    let content = directory.file("f", 20 * MIB);
    let path = directory.0.join("f");
    let site = directory.site();
    let mut client = site.connect();
    make_cold(&path, 0, 0);
    assert!(client.get("/f").body == content, "all of it cold");
    for round in 1..6 {
        for hole in 0..20 {
            make_cold(&path, hole * MIB + round * 4096, round * round * 4096);
        }
        assert!(client.get("/f").body == content, "in part cold");
    }
}

#[test]
fn a_file_in_other_bodies_arrives_as_well() {
    let directory = Directory::new();
    let content = directory.file("f", 3 * MIB);
    let files = directory.files();
    let wrapped = {
        let files = Arc::clone(&files);
        Site::serving(async move |request| Ok(files.respond(&request).await.map(Body::new)))
    };
    let bare = Site::start(local(1).serve(async move |_| {
        let files = Arc::clone(&files);
        Ok(service_fn(async move |request: Request| Ok(files.respond(&request).await)))
    }));
    for site in [wrapped, bare] {
        let mut client = site.connect();
        for _ in 0..2 {
            assert!(client.get("/f").body == content);
        }
    }
}

/// Whether reads of a file may be asked not to wait, without which nothing is sent past hyper.
fn knows_nowait(path: &Path) -> bool {
    let file = File::open(path).expect("the file");
    let mut byte = 0_u8;
    let vector = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: the vector names one live byte; the descriptor is open.
    unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, 0, libc::RWF_NOWAIT) == 1 }
}

/// Two trees and a link that leads to the first.
fn releases(directory: &Directory) -> PathBuf {
    for release in ["one", "two"] {
        let tree = directory.0.join(release);
        fs::create_dir(&tree).expect("it is new");
        fs::write(tree.join("f"), release).expect("there is room");
    }
    let link = directory.0.join("current");
    symlink(directory.0.join("one"), &link).expect("it is new");
    link
}

fn switch(link: &Path, target: &Path) {
    let next = link.with_extension("next");
    symlink(target, &next).expect("it is new");
    fs::rename(next, link).expect("it is ours");
}

#[test]
fn a_restarted_executor_serves_the_directory_that_was_opened_and_a_reload_opens_it_anew_for_all() {
    let directory = Directory::new();
    let link = releases(&directory);
    let path = link.display().to_string();
    let mut server = spawn(&[], &["--executors", "3", "--chaos", "--root", &path, "--ready-path", "/-/ready"]);
    let mut kept = server.connect();
    let served = |server: &Process, release: &str| {
        for _ in 0..16 {
            assert_eq!(server.connect().get("/f").text(), release);
        }
    };
    assert_eq!(kept.get("/f").text(), "one");
    // Switched, and then away for a moment: nobody notices, those who start afresh included.
    switch(&link, &directory.0.join("two"));
    let mut last = server.connect();
    last.ask("/chaos/escape");
    server.wait_for_line("the executor serves again");
    served(&server, "one");
    fs::remove_file(&link).expect("it is ours");
    let mut last = server.connect();
    last.ask("/chaos/escape");
    server.wait_for_line("the executor serves again");
    served(&server, "one");
    server.signal(libc::SIGHUP);
    server.wait_for_line("--root stays the directory that it was: cannot serve files from");
    served(&server, "one");
    switch(&link, &directory.0.join("two"));
    server.signal(libc::SIGHUP);
    let line = server.wait_for_line("--root was opened anew");
    assert!(line.contains(&directory.0.join("two").display().to_string()), "{line}");
    served(&server, "two");
}

#[test]
fn the_command_sends_a_large_file_by_sendfile() {
    let directory = Directory::new();
    let content = directory.file("f", MIB);
    if !knows_nowait(&directory.0.join("f")) {
        println!("not on this file system");
        return;
    }
    let trace = directory.0.join("trace");
    // -D: the server is our child, and strace a grandchild that ends with it.
    let strace = ["strace", "-D", "-f", "-e", "trace=sendfile", "-o", &trace.display().to_string()].map(str::to_owned);
    let strace: Vec<&str> = strace.iter().map(String::as_str).collect();
    let server = spawn(&strace, &["--executors", "1", "--root", &directory.0.display().to_string()]);
    assert!(server.connect().get("/f").body == content);
    eventually("the trace shows it", || fs::read_to_string(&trace).is_ok_and(|trace| trace.contains("sendfile(")));
}

#[test]
fn as_many_downloads_as_connections_are_promised_have_descriptors() {
    let directory = Directory::new();
    directory.file("large", 16 << 20);
    let root = directory.0.display().to_string();
    let mut server = spawn(&["prlimit", "--nofile=256:256"], &["--executors", "1", "--root", &root]);
    let line = server.wait_for_line(" connections per executor");
    let before = line.split(" connections per executor").next().unwrap_or_default();
    let promised: usize = before.rsplit(' ').next().and_then(|count| count.parse().ok()).expect("it is a number");
    assert!(promised >= 64, "{promised}");
    // They read no more than the beginning, so each keeps the file open.
    let mut clients: Vec<_> = (0..promised).map(|_| server.connect()).collect();
    clients.iter_mut().for_each(|client| client.ask("/large"));
    for (number, client) in clients.iter_mut().enumerate() {
        let bytes = client.some().expect("it is answered");
        let head = String::from_utf8_lossy(&bytes[..bytes.len().min(12)]).into_owned();
        assert_eq!(head, "HTTP/1.1 200", "download {number} of {promised}");
    }
}

#[test]
fn a_client_that_does_not_read_a_file_is_reset_and_one_that_reads_slowly_is_not() {
    const LENGTH: usize = 64 << 20;
    let directory = Directory::new();
    directory.file("large", LENGTH);
    let mut limits = HttpLimits::default();
    limits.send_timeout = Some(Duration::from_secs(3));
    let site = directory.site_with(limits);
    let (mut idle, mut slow) = (site.connect(), site.connect());
    idle.ask("/large");
    slow.ask("/large");
    // Time must pass here, for a client that reads at an even pace: longer than the limit in all.
    let (begun, pace) = (Instant::now(), Duration::from_millis(4500).as_secs_f64() / LENGTH as f64);
    let mut received = 0;
    while received < LENGTH {
        let bytes = slow.some().expect("it goes on");
        assert!(!bytes.is_empty(), "the connection ended after {received} bytes");
        received += bytes.len();
        let due = Duration::from_secs_f64(received as f64 * pace);
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
    }
    assert_eq!(idle.outlast().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(site.stats().executors[0].timed_out, 1);
}
