//! The service as a whole, on real directories, in a glommio executor.

use std::fs;
use std::future::poll_fn;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::process::Command;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Waker};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use glommio::{LocalExecutorBuilder, Placement};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderName, LAST_MODIFIED, LOCATION, RETRY_AFTER};
use http_body::Body;

use super::*;

/// A directory of this test's own, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Directory {
        Directory::below(&std::env::temp_dir())
    }

    fn below(parent: &Path) -> Directory {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("ringleader-files-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        fs::create_dir(&path).expect("a fresh directory");
        Directory(path)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().expect("below the root")).expect("parents");
        fs::write(&path, content).expect("a file");
        path
    }

    fn files(&self) -> Files {
        Files::open(&self.0).expect("the directory exists")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("ours to remove");
    }
}

/// With a preempt timer so long that it never fires: glommio 0.9 may park for ever when it does (see ARCHITECTURE.md,
/// "Parking"), which on a busy machine happens to the default of 100 ms.
fn on_executor<T>(future: impl Future<Output = T>) -> T {
    let builder = LocalExecutorBuilder::new(Placement::Unbound).io_memory(1 << 20);
    builder.preempt_timer(Duration::from_secs(3600)).make().expect("an executor").run(future)
}

fn request(method: Method, path: &str, headers: &[(HeaderName, &str)]) -> Request<()> {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(name, *value);
    }
    request.body(()).expect("a valid request")
}

async fn get(files: &Files, path: &str, headers: &[(HeaderName, &str)]) -> Response<FileBody> {
    files.respond(&request(Method::GET, path, headers)).await
}

async fn status(files: &Files, path: &str) -> u16 {
    get(files, path, &[]).await.status().as_u16()
}

async fn next_chunk(body: &mut FileBody) -> Option<io::Result<Bytes>> {
    let frame = poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await?;
    Some(frame.map(|frame| frame.into_data().expect("no trailers")))
}

/// The whole body; checks that the size hint told the truth all along.
async fn collect(mut body: FileBody) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    let promised = body.size_hint().exact().expect("an exact size");
    while let Some(chunk) = next_chunk(&mut body).await {
        content.extend_from_slice(&chunk?);
        assert_eq!(body.size_hint().exact(), Some(promised - content.len() as u64));
    }
    assert!(body.is_end_stream());
    assert_eq!(content.len() as u64, promised);
    Ok(content)
}

async fn text(response: Response<FileBody>) -> String {
    String::from_utf8(collect(response.into_body()).await.expect("readable")).expect("text")
}

fn header<'a>(response: &'a Response<FileBody>, name: &HeaderName) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().expect("ASCII"))
}

/// Content that differs in every chunk (a 64-bit generator of Knuth's).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut content = Vec::with_capacity(length);
    while content.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        content.extend_from_slice(&state.to_le_bytes());
    }
    content.truncate(length);
    content
}

/// Throws the file's pages out of the page cache, as far as the file system does that.
fn make_cold(path: &Path) {
    let file = File::open(path).expect("the file");
    file.sync_all().expect("dirty pages stay");
    // SAFETY: an advice about an open file; no memory of ours is involved.
    let answer =
        unsafe { libc::posix_fadvise(std::os::fd::AsRawFd::as_raw_fd(&file), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(answer, 0);
}

/// The three ways a file is read. The last two differ in who says that RWF_NOWAIT is of no use.
fn each_way(directory: &Directory) -> [Files; 3] {
    let mut uncached = directory.files();
    uncached.cached_lookup = false;
    let no_nowait = directory.files();
    no_nowait.nowait.store(false, Ordering::Relaxed);
    [directory.files(), uncached, no_nowait]
}

fn descriptors_into(root: &Path) -> usize {
    let open = fs::read_dir("/proc/self/fd").expect("procfs").flatten();
    open.filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(root) && target != root))
        .count()
}

#[test]
fn a_whole_file() {
    let directory = Directory::new();
    directory.file("page.html", "<p>hello");
    directory.file("empty.bin", "");
    directory.file("a/b c/é.css", "x{}");
    directory.file(".hidden", "seen");
    for files in each_way(&directory) {
        on_executor(async {
            let response = get(&files, "/page.html", &[]).await;
            assert_eq!(response.status(), 200);
            assert_eq!(header(&response, &CONTENT_TYPE), "text/html; charset=utf-8");
            assert_eq!(header(&response, &CONTENT_LENGTH), "8");
            assert_eq!(header(&response, &ACCEPT_RANGES), "bytes");
            assert!(header(&response, &LAST_MODIFIED).ends_with(" GMT"));
            assert!(header(&response, &ETAG).starts_with('"'));
            assert_eq!(text(response).await, "<p>hello");
            let css = get(&files, "/a//b%20c/./%C3%A9.css?v=1", &[]).await;
            assert_eq!(header(&css, &CONTENT_TYPE), "text/css; charset=utf-8");
            assert_eq!(text(css).await, "x{}");
            let empty = get(&files, "/empty.bin", &[(RANGE, "bytes=0-")]).await;
            assert_eq!((empty.status().as_u16(), header(&empty, &CONTENT_LENGTH)), (200, "0"));
            assert_eq!(text(empty).await, "");
            assert_eq!(text(get(&files, "/.hidden", &[]).await).await, "seen");
            assert_eq!(pending::outstanding(), 0);
        });
    }
}

#[test]
fn head_and_not_modified_carry_no_body_and_other_methods_are_refused() {
    let directory = Directory::new();
    directory.file("f.txt", "12345");
    let files = directory.files();
    on_executor(async {
        let whole = get(&files, "/f.txt", &[]).await;
        let (etag, modified) = (header(&whole, &ETAG).to_owned(), header(&whole, &LAST_MODIFIED).to_owned());
        let head = files.respond(&request(Method::HEAD, "/f.txt", &[(RANGE, "bytes=0-1")])).await;
        assert_eq!((head.status().as_u16(), header(&head, &CONTENT_LENGTH)), (200, "5"));
        assert_eq!(head.headers(), whole.headers());
        assert!(head.body().is_end_stream());
        for (name, value) in [(http::header::IF_NONE_MATCH, &etag), (http::header::IF_MODIFIED_SINCE, &modified)] {
            let unchanged = get(&files, "/f.txt", &[(name, value)]).await;
            assert_eq!((unchanged.status().as_u16(), header(&unchanged, &CONTENT_LENGTH)), (304, ""));
            assert_eq!((header(&unchanged, &ETAG), header(&unchanged, &LAST_MODIFIED)), (&*etag, &*modified));
            assert!(unchanged.body().is_end_stream());
        }
        let failed = get(&files, "/f.txt", &[(http::header::IF_MATCH, "\"other\"")]).await;
        assert_eq!(failed.status(), 412);
        let missing = files.respond(&request(Method::HEAD, "/missing", &[])).await;
        assert_eq!((missing.status().as_u16(), header(&missing, &CONTENT_LENGTH)), (404, "14"));
        assert!(missing.body().is_end_stream());
        for method in [Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS, Method::TRACE] {
            let refused = files.respond(&request(method, "/f.txt", &[])).await;
            assert_eq!((refused.status().as_u16(), header(&refused, &ALLOW)), (405, "GET, HEAD"));
        }
    });
}

#[test]
fn the_tag_changes_with_the_content() {
    let directory = Directory::new();
    let path = directory.file("f", "one");
    let files = directory.files();
    on_executor(async {
        let before = header(&get(&files, "/f", &[]).await, &ETAG).to_owned();
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_modified(UNIX_EPOCH + Duration::new(1, 5)))
            .expect("utimensat");
        let response = get(&files, "/f", &[]).await;
        assert_ne!(before, header(&response, &ETAG));
        assert!(header(&response, &ETAG).starts_with("\"3b9aca05-3-"), "nanoseconds count");
        assert_eq!(header(&response, &LAST_MODIFIED), "Thu, 01 Jan 1970 00:00:01 GMT");
    });
}

#[test]
fn ranges() {
    let directory = Directory::new();
    let content = noise(300_000);
    directory.file("f.bin", &content);
    for files in each_way(&directory) {
        on_executor(async {
            let table = [
                ("bytes=0-0", 0..1),
                ("bytes=65535-65536", 65_535..65_537),
                ("bytes=100-", 100..300_000),
                ("bytes=-5", 299_995..300_000),
            ];
            for (range, expected) in table {
                let response = get(&files, "/f.bin", &[(RANGE, range)]).await;
                assert_eq!(response.status(), 206);
                assert_eq!(
                    header(&response, &CONTENT_RANGE),
                    format!("bytes {}-{}/300000", expected.start, expected.end - 1)
                );
                assert_eq!(header(&response, &CONTENT_LENGTH), expected.len().to_string());
                assert_eq!(collect(response.into_body()).await.expect("readable"), &content[expected]);
            }
            let beyond = get(&files, "/f.bin", &[(RANGE, "bytes=300000-")]).await;
            assert_eq!((beyond.status().as_u16(), header(&beyond, &CONTENT_RANGE)), (416, "bytes */300000"));
            let whole: [&[(HeaderName, &str)]; 4] = [
                &[(RANGE, "bytes=x")],
                &[(RANGE, "bytes=0-1"), (http::header::IF_RANGE, "\"other\"")],
                &[(RANGE, "bytes=0-1"), (RANGE, "bytes=0-1")],
                &[(RANGE, "bytes=0-9,5-20")],
            ];
            for headers in whole {
                let response = get(&files, "/f.bin", headers).await;
                assert_eq!(
                    (response.status().as_u16(), header(&response, &CONTENT_LENGTH)),
                    (200, "300000"),
                    "{headers:?}"
                );
            }
            assert_eq!(pending::outstanding(), 0);
        });
    }
}

#[test]
fn several_ranges_are_multipart() {
    let directory = Directory::new();
    let content = noise(200_000);
    directory.file("f.bin", &content);
    for files in each_way(&directory) {
        on_executor(async {
            let response = get(&files, "/f.bin", &[(RANGE, "bytes=199999-,10-99999")]).await;
            assert_eq!(response.status(), 206);
            let kind = header(&response, &CONTENT_TYPE).to_owned();
            let boundary = kind.strip_prefix("multipart/byteranges; boundary=").expect("a boundary");
            let part = |range: &str| {
                format!(
                    "--{boundary}\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes {range}/200000\r\n\r\n"
                )
            };
            let mut expected = part("199999-199999").into_bytes();
            expected.extend_from_slice(&content[199_999..]);
            expected.extend_from_slice(format!("\r\n{}", part("10-99999")).as_bytes());
            expected.extend_from_slice(&content[10..100_000]);
            expected.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
            assert_eq!(header(&response, &CONTENT_LENGTH), expected.len().to_string());
            assert_eq!(response.headers().get(CONTENT_RANGE), None);
            assert!(collect(response.into_body()).await.expect("readable") == expected);
        });
    }
}

#[test]
fn hostile_paths_reach_nothing() {
    let directory = Directory::new();
    directory.file("secret", "outside");
    directory.file("root/inside", "x");
    let mut cached = Files::open(directory.0.join("root")).expect("a root");
    for lookup in [true, false] {
        cached.cached_lookup &= lookup;
        on_executor(async {
            let table = [
                ("/../secret", 400),
                ("/%2e%2e/secret", 400),
                ("/..%2fsecret", 400),
                ("/a/../../secret", 400),
                ("/inside%00", 400),
                ("/%c0%ae%c0%ae/secret", 404),
                ("/inside/../../secret", 400),
                ("//secret", 404),
                ("/inside/x", 404),
                ("/inside/", 404),
                ("/inside/..", 403),
                ("/proc/self/root/etc/passwd", 404),
            ];
            for (path, expected) in table {
                assert_eq!(status(&cached, path).await, expected, "{path}");
            }
            let long = format!("/{}", "x".repeat(300));
            assert_eq!(status(&cached, &long).await, 404);
            assert_eq!(status(&cached, &"/x".repeat(4000)).await, 404);
        });
    }
}

#[test]
fn symlinks_inside_are_followed_and_ways_out_refused() {
    let directory = Directory::new();
    directory.file("secret", "outside");
    directory.file("root/a/real", "inside");
    let root = directory.0.join("root");
    symlink("a/real", root.join("inside")).expect("a link");
    symlink("../a/real", root.join("a/up")).expect("a link");
    symlink("../secret", root.join("out")).expect("a link");
    symlink("..", root.join("outdir")).expect("a link");
    symlink(root.join("a/real"), root.join("absolute")).expect("a link");
    symlink("/proc/self/root/etc/passwd", root.join("magic")).expect("a link");
    symlink("loop", root.join("loop")).expect("a link");
    symlink("nowhere", root.join("dangling")).expect("a link");
    symlink("a", root.join("adir")).expect("a link");
    let mut files = Files::open(&root).expect("a root");
    for lookup in [true, false] {
        files.cached_lookup &= lookup;
        on_executor(async {
            assert_eq!(text(get(&files, "/inside", &[]).await).await, "inside");
            assert_eq!(text(get(&files, "/a/up", &[]).await).await, "inside");
            assert_eq!(text(get(&files, "/adir/real", &[]).await).await, "inside");
            for path in ["/out", "/outdir/secret", "/outdir/", "/absolute", "/magic", "/loop"] {
                assert_eq!(status(&files, path).await, 403, "{path}");
            }
            assert_eq!(status(&files, "/dangling").await, 404);
        });
    }
}

#[test]
fn only_regular_files_are_served_and_a_fifo_does_not_hang() {
    let directory = Directory::new();
    let fifo = directory.0.join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo").success());
    let _socket = UnixListener::bind(directory.0.join("socket")).expect("a socket");
    directory.file("d/index.html/x", "an index that is a directory");
    for files in each_way(&directory) {
        on_executor(async {
            for path in ["/fifo", "/socket", "/d/"] {
                assert_eq!(status(&files, path).await, 403, "{path}");
            }
            assert_eq!(status(&files, "/fifo/").await, 404);
        });
    }
}

#[test]
fn directories_redirect_then_serve_their_index() {
    let directory = Directory::new();
    directory.file("with/index.html", "the index");
    directory.file("with/home.htm", "home");
    directory.file("without/x y.txt", "x");
    for files in each_way(&directory) {
        on_executor(async {
            let redirect = get(&files, "/with?a=1&b", &[]).await;
            assert_eq!((redirect.status().as_u16(), header(&redirect, &LOCATION)), (301, "/with/?a=1&b"));
            assert_eq!(header(&get(&files, "//with", &[]).await, &LOCATION), "/with/");
            let index = get(&files, "/with/", &[]).await;
            assert_eq!(header(&index, &CONTENT_TYPE), "text/html; charset=utf-8");
            assert_eq!(text(index).await, "the index");
            assert_eq!(text(get(&files, "/with/.", &[]).await).await, "the index");
            assert_eq!(status(&files, "/without/").await, 403);
            assert_eq!(status(&files, "/").await, 403);
            assert_eq!(status(&files, "/missing/").await, 404);
            assert_eq!(text(get(&files.index("home.htm"), "/with/", &[]).await).await, "home");
        });
    }
}

#[test]
fn listings_are_sorted_and_escaped() {
    let directory = Directory::new();
    for name in ["d/b<i>.txt", "d/a&b", "d/.hidden", "d/sub/x"] {
        directory.file(name, "x");
    }
    fs::write(directory.0.join("d").join(std::ffi::OsStr::from_bytes(b"caf\xe9.txt")), "latin").expect("a file");
    let files = directory.files().listing(true);
    on_executor(async {
        let response = get(&files, "/d/", &[]).await;
        assert_eq!(header(&response, &CONTENT_TYPE), "text/html; charset=utf-8");
        let page = text(response).await;
        let links: Vec<&str> = page.split("href=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert_eq!(links, ["../", "./a%26b", "./b%3Ci%3E.txt", "./caf%E9.txt", "./sub/"]);
        let response = get(&files, "/d/caf%E9.txt", &[]).await;
        assert_eq!(header(&response, &CONTENT_TYPE), "text/plain; charset=utf-8");
        assert_eq!(text(response).await, "latin");
        assert!(page.contains("b&lt;i&gt;.txt") && page.contains("<h1>/d/</h1>"));
        assert!(!text(get(&files, "/", &[]).await).await.contains("../"));
        let head = files.respond(&request(Method::HEAD, "/d/", &[])).await;
        assert_eq!(header(&head, &CONTENT_LENGTH), page.len().to_string());
        assert!(head.body().is_end_stream());
    });
}

#[test]
fn a_listing_is_bounded() {
    let directory = Directory::new();
    for number in 0..=listing::LISTING_ENTRIES_MAX {
        directory.file(&format!("{number}"), "");
    }
    let files = directory.files().listing(true);
    let page = on_executor(async { text(get(&files, "/", &[]).await).await });
    assert_eq!(page.matches("<li>").count(), listing::LISTING_ENTRIES_MAX);
    assert!(page.contains("There are more entries"));
}

#[test]
fn a_file_that_shrinks_ends_in_an_error_and_one_that_grows_in_time() {
    let directory = Directory::new();
    let content = noise(1 << 20);
    for files in each_way(&directory) {
        on_executor(async {
            let path = directory.file("f", &content);
            let mut body = get(&files, "/f", &[]).await.into_body();
            let first = next_chunk(&mut body).await.expect("a chunk").expect("readable");
            assert!(first.len() <= CHUNK_BYTES);
            File::options().write(true).open(&path).and_then(|file| file.set_len(200_000)).expect("truncate");
            let mut received = first.len();
            let error = loop {
                match next_chunk(&mut body).await.expect("neither padded nor ended early") {
                    Ok(chunk) => received += chunk.len(),
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            assert!(received <= 262_144, "at most what was read ahead: {received}");
            assert!(next_chunk(&mut body).await.is_none());
            assert_eq!(descriptors_into(&directory.0), 0);

            let path = directory.file("f", &content);
            let body = get(&files, "/f", &[]).await.into_body();
            fs::write(&path, noise(2 << 20)).expect("the file grows");
            assert!(collect(body).await.expect("readable") == content);
        });
    }
}

#[test]
fn a_large_cold_file_arrives_intact_in_bounded_chunks() {
    let directory = Directory::new();
    let content = noise(64 << 20);
    let path = directory.file("f", &content);
    for files in each_way(&directory) {
        make_cold(&path);
        on_executor(async {
            let mut body = get(&files, "/f", &[]).await.into_body();
            let mut position = 0;
            while let Some(chunk) = next_chunk(&mut body).await {
                let chunk = chunk.expect("readable");
                assert!(!chunk.is_empty() && chunk.len() <= CHUNK_BYTES);
                assert!(pending::outstanding() <= 1, "one read ahead at most");
                assert!(chunk == content[position..position + chunk.len()], "at {position}");
                position += chunk.len();
            }
            assert_eq!(position, content.len());
            assert_eq!((pending::outstanding(), descriptors_into(&directory.0)), (0, 0));
        });
    }
}

/// What is really cold needs a file system that drops its pages on POSIX_FADV_DONTNEED; on others
/// (tmpfs) this shows less. RWF_NOWAIT is off for the cold read, as its attempt warms the file.
#[test]
fn a_cold_file_goes_through_glommio_and_a_hot_one_does_not() {
    let directory = Directory::new();
    let content = noise(32 << 10);
    let path = directory.file("f", &content);
    let files = directory.files();
    // Since the last call.
    let reads = || glommio::executor().io_stats().all_rings().file_buffered_reads().0;
    on_executor(async {
        files.nowait.store(false, Ordering::Relaxed);
        make_cold(&path);
        let cold = collect(get(&files, "/f", &[]).await.into_body()).await;
        assert!(cold.expect("waits for the disk, though opened with O_NONBLOCK") == content);
        assert_eq!(reads(), 1);
        files.nowait.store(true, Ordering::Relaxed);
        let hot = collect(get(&files, "/f", &[]).await.into_body()).await;
        assert!(hot.expect("readable") == content);
        assert!(reads() == 0 || !files.nowait.load(Ordering::Relaxed));
    });
}

/// tmpfs knows no RWF_NOWAIT (Linux 6.18).
#[test]
fn residence_is_known_to_the_page() {
    const PAGES: u64 = 256;
    let directory = Directory::new();
    let path = directory.file("f", noise(PAGES as usize * 4096 - 100));
    let file = File::open(&path).expect("the file");
    let length = PAGES * 4096 - 100;
    match open::resident_bytes(&file, 0, length) {
        Ok(resident) => assert_eq!(resident, length, "it has just been written"),
        Err(error) => return assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP)),
    }
    for (position, length) in [(0, 1), (4095, 1), (4095, 2), (5000, 300_000), (length - 1, 1), (4096, 8192), (1, 4096)]
    {
        assert_eq!(open::resident_bytes(&file, position, length).expect("readable"), length, "{position}");
    }
    assert_eq!(open::resident_bytes(&file, length, 1).expect("readable"), 0, "the end");
    make_cold(&path);
    let resident = open::resident_bytes(&file, 4097, 100_000).expect("readable");
    // A file system may keep the pages; and the question may have begun to read them.
    assert!(resident < 100_000 || open::resident_bytes(&file, 0, length).expect("readable") == length);
}

#[test]
fn bodies_may_change_threads_but_not_in_the_middle_of_a_read() {
    let directory = Directory::new();
    directory.file("f", noise(1 << 20));
    let files = directory.files();
    files.nowait.store(false, Ordering::Relaxed);
    on_executor(async {
        let mut body = get(&files, "/f", &[]).await.into_body();
        let mut context = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut body).poll_frame(&mut context).is_pending(), "glommio reads");
        let error = std::thread::spawn(move || {
            let frame = Pin::new(&mut body).poll_frame(&mut Context::from_waker(Waker::noop()));
            assert!(matches!(&frame, std::task::Poll::Ready(Some(Err(_)))), "not here");
            body
        });
        let mut body = error.join().expect("no panic");
        assert!(next_chunk(&mut body).await.is_none(), "it has failed");
    });
}

#[test]
fn a_file_system_without_nowait_is_read_through_glommio() {
    let shared_memory = Path::new("/dev/shm");
    if !shared_memory.is_dir() {
        return;
    }
    let directory = Directory::below(shared_memory);
    let content = noise(300_000);
    let path = directory.file("f", &content);
    let files = directory.files();
    let supported = open::read_nowait(&File::open(&path).expect("the file"), 0, 1)
        .is_ok_and(|answer| answer != Nowait::Unsupported);
    on_executor(async {
        for _ in 0..2 {
            let body = get(&files, "/f", &[]).await.into_body();
            assert!(collect(body).await.expect("readable") == content);
            assert_eq!(files.nowait.load(Ordering::Relaxed), supported);
        }
        let ranges = get(&files, "/f", &[(RANGE, "bytes=0-9,100-109")]).await;
        assert!(collect(ranges.into_body()).await.is_ok());
    });
}

#[test]
fn bodies_dropped_half_way_leak_nothing() {
    let directory = Directory::new();
    directory.file("f", noise(1 << 20));
    for files in each_way(&directory) {
        let nowait = files.nowait.load(Ordering::Relaxed);
        on_executor(async {
            for round in 0..200 {
                let mut body = get(&files, "/f", &[]).await.into_body();
                for _ in 0..round % 4 {
                    next_chunk(&mut body).await.expect("a chunk").expect("readable");
                }
                // A poll more, so that a read is in flight when there is one to be had.
                let mut context = Context::from_waker(Waker::noop());
                let _ = Pin::new(&mut body).poll_frame(&mut context);
                let in_flight = pending::outstanding();
                assert!(in_flight <= 1);
                assert!(nowait || in_flight == 1, "this way a read is always in flight");
                if round % 2 == 0 {
                    // Let the read reach the kernel, or even complete.
                    glommio::timer::sleep(Duration::from_micros(50)).await;
                }
                drop(body);
                assert_eq!(pending::outstanding(), 0);
            }
            glommio::timer::sleep(Duration::from_millis(5)).await;
            assert_eq!(descriptors_into(&directory.0), 0);
        });
    }
}

#[test]
fn responses_can_be_dropped_while_the_helper_works() {
    let directory = Directory::new();
    directory.file("f", "x");
    let mut files = directory.files();
    files.cached_lookup = false;
    on_executor(async {
        for _ in 0..100 {
            let request = request(Method::GET, "/f", &[]);
            let mut future = std::pin::pin!(files.respond(&request));
            // Pending as a rule; the helper may be faster.
            let _ = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        }
        assert_eq!(status(&files, "/f").await, 200);
    });
    drop(files);
    assert_eq!(descriptors_into(&directory.0), 0);
}

#[test]
fn an_overloaded_offload_is_answered_with_503() {
    struct Full;
    impl Offload for Full {
        fn run(&self, _: Job) -> Result<(), Overloaded> {
            Err(Overloaded)
        }
    }
    let directory = Directory::new();
    directory.file("f", "x");
    let mut files = directory.files().offload(Arc::new(Full)).listing(true);
    on_executor(async {
        assert_eq!(status(&files, "/f").await, 200, "names in memory need no helper");
        assert_eq!(status(&files, "/").await, 503);
        files.cached_lookup = false;
        let busy = get(&files, "/f", &[]).await;
        assert_eq!((busy.status().as_u16(), header(&busy, &RETRY_AFTER)), (503, "1"));
    });
}

#[test]
fn opening_says_what_is_wrong() {
    let directory = Directory::new();
    let file = directory.file("f", "x");
    let missing = Files::open(directory.0.join("missing")).expect_err("not there").to_string();
    assert!(
        missing.contains("missing") && missing.contains("No such file") && missing.contains("create it"),
        "{missing}"
    );
    let not_directory = Files::open(file).expect_err("a file").to_string();
    assert!(not_directory.contains("Not a directory") && not_directory.contains("name a directory"), "{not_directory}");
}

#[test]
fn a_clone_serves_the_same_directory_whatever_its_name_leads_to() {
    let directory = Directory::new();
    directory.file("old/f", "old");
    directory.file("new/f", "new");
    let link = directory.0.join("link");
    symlink(directory.0.join("old"), &link).expect("it is new");
    let files = Files::open(&link).expect("it leads to a directory").index("f").listing(true);
    fs::remove_file(&link).expect("ours to remove");
    symlink(directory.0.join("new"), &link).expect("it is free again");
    let clone = files.try_clone().expect("descriptors are free");
    drop(files);
    on_executor(async {
        assert_eq!(text(get(&clone, "/f", &[]).await).await, "old");
        assert_eq!(text(get(&clone, "/", &[]).await).await, "old", "the options are the same");
    });
}
