//! Bodies of 1 GiB through curl, compared by checksum, and clients that read slowly: the server's memory stays bounded.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{sleep, timeout};

use crate::client::{self, Client};
use crate::proc;
use crate::random::Random;
use crate::report::{Verdicts, bytes};
use crate::server::{Common, Server};

const FILE_NAME: &str = "ringleader-proofs-body.bin";
const TRANSFER_MAX_SECONDS: &str = "600";
/// What slow readers take per second.
const SLOW_BYTES: usize = 1000;
const SLOW_TIME: Duration = Duration::from_secs(20);

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// MiB of a body
    #[arg(long, default_value_t = 1024)]
    size: u64,
    /// MiB that the server's memory may rise by during a transfer, at most
    #[arg(long, default_value_t = 64.0)]
    rise: f64,
    /// Clients that read 1 kB/s from an echo of their own upload
    #[arg(long, default_value_t = 16)]
    slow: usize,
    /// MiB of the server's memory that one slow client may cost
    #[arg(long, default_value_t = 1.0)]
    slow_rise: f64,
}

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let directory = arguments.common.scratch.join("ringleader-proofs-root");
    std::fs::create_dir_all(&directory).map_err(|error| format!("creating {}: {error}", directory.display()))?;
    let path = directory.join(FILE_NAME);
    println!("held equal: 1 executor, a body of {} MiB without a pattern, {}", arguments.size, path.display());
    make_file(&path, arguments.size).map_err(|error| format!("writing {}: {error}", path.display()))?;
    let sum = checksum(&path)?;
    let mut verdicts = Verdicts::default();
    let outcome = async {
        echoes(arguments, &path, &sum, &mut verdicts).await?;
        downloads(arguments, &directory, &sum, &mut verdicts).await
    };
    let outcome = outcome.await;
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir(&directory);
    outcome.map(|()| verdicts)
}

fn make_file(path: &Path, mib: u64) -> std::io::Result<()> {
    let (mut file, mut random) = (BufWriter::with_capacity(1 << 20, File::create(path)?), Random::new(mib));
    for _ in 0..mib * 1024 * 128 {
        file.write_all(&random.next().to_le_bytes())?;
    }
    file.flush()
}

fn checksum(path: &Path) -> Result<String, String> {
    sum_of(Command::new("sha256sum").arg(path))
}

fn sum_of(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("running sha256sum (coreutils): {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace().next().map(str::to_owned).ok_or_else(|| "sha256sum printed nothing".to_owned())
}

/// What curl brought.
struct Transfer {
    status: String,
    sum: String,
    time: Duration,
}

/// Runs curl with these arguments and its output into sha256sum, while this task's siblings go on.
async fn curl(arguments: Vec<String>, input: Option<PathBuf>) -> Result<Transfer, String> {
    let run = move || {
        let began = Instant::now();
        let mut command = Command::new("curl");
        // The status goes to standard error: standard output is the body.
        command.args([
            "--silent",
            "--show-error",
            "--max-time",
            TRANSFER_MAX_SECONDS,
            "--write-out",
            "%{stderr}%{http_code}",
        ]);
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(match input {
            Some(path) => File::open(&path).map(Stdio::from).map_err(|error| format!("{}: {error}", path.display()))?,
            None => Stdio::null(),
        });
        let mut child = command.spawn().map_err(|error| format!("starting curl: {error}"))?;
        let body = child.stdout.take().ok_or("curl has no output")?;
        let sum = sum_of(Command::new("sha256sum").stdin(body))?;
        let output = child.wait_with_output().map_err(|error| format!("waiting for curl: {error}"))?;
        let status = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok(Transfer { status: format!("{status}, {}", output.status), sum, time: began.elapsed() })
    };
    spawn_blocking(run).await.map_err(|error| error.to_string())?
}

async fn echoes(arguments: &Arguments, path: &Path, sum: &str, verdicts: &mut Verdicts) -> Result<(), String> {
    let file = path.display().to_string();
    let ways = [
        ("upload and download through /echo, with a length", vec!["--upload-file", &file], None),
        (
            "upload and download through /echo, chunked",
            vec!["--upload-file", "-", "--header", "Expect:"],
            Some(path.to_owned()),
        ),
    ];
    for (what, way, input) in ways {
        let server = start(arguments, &[])?;
        let url = format!("http://{}/echo", server.address());
        let way = way.into_iter().map(str::to_owned).chain([url]).collect();
        judge_transfer(arguments, &server, what, curl(way, input), sum, verdicts).await?;
        server.stop()?;
    }
    let server = start(arguments, &[])?;
    slow_readers(arguments, &server, "/echo", true, verdicts).await?;
    server.stop().map(|_| ())
}

async fn downloads(arguments: &Arguments, root: &Path, sum: &str, verdicts: &mut Verdicts) -> Result<(), String> {
    let root = root.display().to_string();
    let server = start(arguments, &["--root", &root])?;
    let target = format!("/{FILE_NAME}");
    let mut probe = Client::connect(server.address()).await.map_err(|error| format!("connecting: {error}"))?;
    let head = async {
        probe.send(client::get(&target, true).as_bytes()).await?;
        probe.received.head(&mut probe.stream).await
    };
    let head = timeout(Duration::from_secs(10), head).await.map_err(|_| "no answer from --root".to_owned())?;
    probe.reset();
    if head.map_err(|error| format!("asking for a file: {error}"))?.status == 404 {
        verdicts.skip("download of a file", "this binary does not serve files with --root yet: 404");
        return server.stop().map(|_| ());
    }
    let url = vec![format!("http://{}{target}", server.address())];
    judge_transfer(arguments, &server, "download of a file", curl(url, None), sum, verdicts).await?;
    server.stop()?;
    let server = start(arguments, &["--root", &root])?;
    slow_readers(arguments, &server, &target, false, verdicts).await?;
    server.stop().map(|_| ())
}

fn start(arguments: &Arguments, more: &[&str]) -> Result<Server, String> {
    let cpus = arguments.common.cpus_or("0");
    let mut all = vec!["--executors", "1", "--cpus", &cpus, "--body-bytes", "0"];
    all.extend_from_slice(more);
    arguments.common.start(arguments.common.port, &all)
}

async fn judge_transfer(
    arguments: &Arguments,
    server: &Server,
    what: &str,
    transfer: impl Future<Output = Result<Transfer, String>>,
    sum: &str,
    verdicts: &mut Verdicts,
) -> Result<(), String> {
    let before = server.sample()?;
    let transfer = transfer.await?;
    let after = server.sample()?;
    let rate = arguments.size as f64 / transfer.time.as_secs_f64();
    verdicts.check(
        transfer.sum == sum,
        &format!("{what}: equal by checksum"),
        format!(
            "{}; {} MiB in {:.1?}, {rate:.0} MiB/s; status {}",
            &transfer.sum, arguments.size, transfer.time, transfer.status
        ),
    );
    let rise = after.rss_peak.saturating_sub(before.rss) as f64;
    verdicts.check(
        rise < arguments.rise * 1048576.0,
        &format!("{what}: memory is bounded"),
        format!(
            "{} at start, {} at most, rise {}; limit {} MiB",
            bytes(before.rss as f64),
            bytes(after.rss_peak as f64),
            bytes(rise),
            arguments.rise
        ),
    );
    Ok(())
}

/// Clients that ask for much and read 1 kB/s, and upload as much as they are let.
async fn slow_readers(
    arguments: &Arguments,
    server: &Server,
    target: &str,
    upload: bool,
    verdicts: &mut Verdicts,
) -> Result<(), String> {
    // One alone, so that what an executor allocates once is not taken for a cost of each.
    let warm_up = slow_reader(server.address(), target.to_owned(), upload, Duration::from_secs(2));
    warm_up.await.map_err(|error| format!("warming up with a slow client: {error}"))?;
    let before = server.sample()?;
    let mut clients = JoinSet::new();
    for _ in 0..arguments.slow {
        clients.spawn_local(slow_reader(server.address(), target.to_owned(), upload, SLOW_TIME));
    }
    let (mut sent, mut faults) = (0, Vec::new());
    while let Some(ended) = clients.join_next().await {
        match ended.map_err(|error| error.to_string())? {
            Ok(count) => sent += count,
            Err(error) => faults.push(error.to_string()),
        }
    }
    let after = server.sample()?;
    let what =
        if upload { "clients that read 1 kB/s of an endless echo" } else { "clients that read 1 kB/s of a file" };
    verdicts.check(
        faults.is_empty(),
        &format!("{what} are served"),
        format!("{} of {} failed {:?}", faults.len(), arguments.slow, faults.first()),
    );
    let each = after.rss_peak.saturating_sub(before.rss_peak) as f64 / arguments.slow.max(1) as f64;
    verdicts.check(
        each < arguments.slow_rise * 1048576.0,
        &format!("{what} cost bounded memory"),
        format!(
            "{} each at most, {} clients, {SLOW_TIME:?}; limit {} MiB; the server let them upload {}",
            bytes(each),
            arguments.slow,
            arguments.slow_rise,
            bytes(sent as f64)
        ),
    );
    // Their resets are taken in.
    sleep(Duration::from_millis(200)).await;
    proc::sample(server.pid()).map(|_| ()).map_err(|error| format!("the server is gone: {error}"))
}

/// Bytes that it could upload.
async fn slow_reader(
    server: std::net::SocketAddr,
    target: String,
    upload: bool,
    time: Duration,
) -> std::io::Result<u64> {
    let mut client = Client::connect_from(server, 0, 4096).await?;
    let request = if upload {
        format!("POST {target} HTTP/1.1\r\nHost: proof\r\nContent-Length: {}\r\n\r\n", 1u64 << 40)
    } else {
        client::get(&target, false)
    };
    client.send(request.as_bytes()).await?;
    let (mut sent, until) = (0, Instant::now() + time);
    {
        let (mut reader, mut writer) = client.stream.split();
        let write = async {
            let piece = vec![b'x'; 16 * 1024];
            if !upload {
                std::future::pending::<()>().await;
            }
            loop {
                sent += writer.write(&piece).await? as u64;
            }
        };
        let read = async {
            let mut piece = [0; SLOW_BYTES];
            while Instant::now() < until {
                if reader.read(&mut piece).await? == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                sleep(Duration::from_secs(1)).await;
            }
            Ok(())
        };
        let ended: std::io::Result<()> = tokio::select! { ended = write => ended, ended = read => ended };
        ended?;
    }
    client.reset();
    Ok(sent)
}
