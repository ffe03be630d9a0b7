//! `ringleader serve`: the built-in application, or files, until a signal.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use ringleader::{Handle, HangPolicy, HttpLimits, Overload, Server, Shard, Steering};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use tracing_subscriber::EnvFilter;

use super::policies::Policies;
use super::{Failure, app};

#[derive(Args)]
pub(crate) struct Arguments {
    /// Address to listen on; may be given more than once [default: what systemd gives, or 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS")]
    listen: Vec<String>,

    /// Executors: a number; a range such as 2..8 to follow the load; or `auto` for one per CPU that affinity and cgroup
    /// quota allow. More than CPUs is allowed
    #[arg(long, value_name = "auto|N|N..M", default_value = "auto", value_parser = parse_executors)]
    executors: Count,

    /// CPUs to pin executors to, such as 0-3,8
    #[arg(long, value_name = "LIST")]
    cpus: Option<String>,

    /// How the kernel chooses the executor of a new connection
    #[arg(long, value_enum, default_value = "random")]
    steering: SteeringName,

    /// Serve the files of this directory instead of the built-in application
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// With --root: list directories that have no index.html
    #[arg(long, requires = "root")]
    listing: bool,

    /// Path that answers 200 while the server is fit to take traffic and 503 while it is not, for load balancers [default:
    /// /ready; with --root: none]
    #[arg(long, value_name = "PATH", value_parser = parse_path)]
    ready_path: Option<String>,

    /// Add endpoints under /chaos/ (panic, escape, abort, and spin, block, offload, sleep with ?ms=N), which break things
    /// on purpose
    #[arg(long)]
    chaos: bool,

    /// Connections open at once on one executor; default: what the limit on open files allows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    connections: Option<u64>,

    /// Requests being answered at once on one executor, above which it answers 503; default: no limit
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_in_flight: Option<u64>,

    /// Milliseconds that an executor's turns may take; when they have taken longer for 100 ms without a rest, it answers
    /// 503 to what it has not begun by then; default: no limit
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    max_delay: Option<u64>,

    /// Connections that may wait to be accepted, per executor and address
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    backlog: u32,

    /// Seconds a client may take over the head of a request
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = parse_seconds)]
    header_timeout: f64,

    /// Seconds a connection may be idle
    #[arg(long, value_name = "SECONDS", default_value_t = 75.0, value_parser = parse_seconds)]
    idle_timeout: f64,

    /// Seconds between two pieces of a request body
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, value_parser = parse_seconds)]
    body_timeout: f64,

    /// Seconds a client may take nothing of an answer that is ready for it
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, value_parser = parse_seconds)]
    send_timeout: f64,

    /// Seconds that requests in flight may take after a signal to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = parse_seconds)]
    drain_timeout: f64,

    /// Seconds that the executors go on accepting after such a signal, for a load balancer to notice
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, value_parser = parse_seconds)]
    drain_delay: f64,

    /// Milliseconds that one turn of an executor may take, 1 at least and a day at most; beyond, new connections go to
    /// others
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=86_400_000))]
    stall_limit: u64,

    /// Milliseconds that one turn may take, 1 at least and a day at most, until new connections pass over its executor where
    /// steering is by eBPF; what is above --stall-limit is that
    #[arg(long, value_name = "MS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=86_400_000))]
    stale_after: u64,

    /// Seconds after which a stalled executor is held to hang; 0 is never
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = parse_seconds)]
    hang_timeout: f64,

    /// What becomes of an executor that hangs
    #[arg(long, value_enum, default_value = "replace")]
    on_hang: OnHang,

    /// Seconds a new binary may take to become ready after SIGUSR2; 0 is no limit
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, value_parser = parse_seconds)]
    upgrade_timeout: f64,

    /// Bytes of a request's head, 8192 to 1048576
    #[arg(long, value_name = "BYTES", default_value_t = 32 * 1024, value_parser = parse_header_bytes)]
    header_bytes: usize,

    /// Header fields of a request, 1 to 10000
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = parse_headers)]
    headers: usize,

    /// Bytes of a request body; 0 is no limit
    #[arg(long, value_name = "BYTES", default_value_t = 1024 * 1024)]
    body_bytes: u64,

    /// Let other processes of this user listen on the same address, and share the traffic; all have to be started with
    /// this. The kernel spreads new connections over the executors of all, so there is no steering
    #[arg(long)]
    share_port: bool,

    /// What to log: error, warn, info, debug, trace, or a filter such as ringleader=debug
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log: String,

    #[command(flatten)]
    policies: Policies,
}

#[derive(Clone, Copy)]
enum Count {
    Auto,
    Range(usize, usize),
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum OnHang {
    /// Its connections are ended, its thread is left behind, another takes its place
    Replace,
    /// The process ends as by a crash, for whoever restarts it
    Abort,
    /// It is waited for
    Ignore,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum SteeringName {
    /// By chance: spreads the connections of one client, too
    Random,
    /// By addresses and ports: a retransmitted SYN meets the same executor
    Hash,
    /// Preferably to executors with fewer open connections and less to do: for connections that live long
    LeastLoaded,
}

fn parse_executors(text: &str) -> Result<Count, String> {
    match text {
        "auto" => Ok(Count::Auto),
        _ => {
            let (min, max) = text.split_once("..").unwrap_or((text, text));
            let number =
                |text: &str| text.parse().map_err(|_| "give a number, a range such as 2..8, or `auto`".to_owned());
            match (number(min)?, number(max.trim_start_matches('='))?) {
                (0, _) => Err("a server needs one executor at least".to_owned()),
                (min, max) if min > max => Err(format!("{min} is more than {max}")),
                (min, max) => Ok(Count::Range(min, max)),
            }
        }
    }
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "give a number of seconds".to_owned())?;
    if (0.0..=1e9).contains(&seconds) { Ok(seconds) } else { Err("give 0 (no limit) to 1000000000 seconds".to_owned()) }
}

fn parse_path(text: &str) -> Result<String, String> {
    let is_path = text.starts_with('/') && !text.contains(['?', '#', ' ']);
    if is_path { Ok(text.to_owned()) } else { Err("give a path such as /ready".to_owned()) }
}

fn parse_header_bytes(text: &str) -> Result<usize, String> {
    let bytes: usize = text.parse().map_err(|_| "give a number of bytes".to_owned())?;
    match bytes {
        ..8192 => Err("8192 bytes is the least".to_owned()),
        8192..=1_048_576 => Ok(bytes),
        _ => Err("1048576 bytes is the most: a head is read from its beginning with each piece that comes".to_owned()),
    }
}

fn parse_headers(text: &str) -> Result<usize, String> {
    let count: usize = text.parse().map_err(|_| "give a number of fields".to_owned())?;
    match count {
        0 => Err("1 is the least: every request of HTTP/1.1 has `Host`".to_owned()),
        1..=10_000 => Ok(count),
        _ => Err("10000 is the most: a table of so many fields is made for each head, 64 bytes a field".to_owned()),
    }
}

/// 0 stands for no limit.
fn limit(seconds: f64) -> Option<Duration> {
    (seconds > 0.0).then(|| Duration::from_secs_f64(seconds))
}

/// Serves until a signal, or until nothing is left that could.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    start_logging(&arguments.log)?;
    super::panics::install();
    ringleader::raise_limits();
    let ready_path = arguments.ready_path.clone();
    let app = app::App::new(arguments.root.as_deref(), arguments.listing, arguments.chaos, ready_path)?;
    let root = app.root();
    let surroundings = Surroundings::look();
    let builder = builder(arguments)?.reload_on_signal(move || reload(root.as_deref(), &surroundings));
    let running = builder.serve(async move |shard: Shard| Ok(app.on(shard))).start().wait();
    let running = match running {
        Err(error) if error.is_stopped() => {
            tracing::info!("stopped as ordered: {error}");
            return Ok(());
        }
        other => other?,
    };
    // One that comes after the server's end, before that of the process, is not to change the exit status.
    for signal in [SIGTERM, SIGINT, SIGHUP, SIGUSR2] {
        if let Err(error) = signal_hook::flag::register(signal, Arc::default()) {
            tracing::warn!(signal, %error, "a signal that comes late may change the exit status");
        }
    }
    announce(&running, arguments);
    let exit = running.join().wait()?;
    if exit.successor_failed {
        return Err(Failure::Failed("the process that had taken over has failed: nobody serves".to_owned()));
    }
    if exit.abandoned > 0 {
        return Err(Failure::Failed(format!(
            "the threads of {} executors hung, or did not answer the order to stop, and were left behind",
            exit.abandoned
        )));
    }
    if exit.abandoned_closures > 0 {
        return Err(Failure::Failed(format!("{} blocking closures did not end in time", exit.abandoned_closures)));
    }
    if exit.failed > 0 {
        return Err(Failure::Unfinished(format!("stopped; {} executors failed during the drain", exit.failed)));
    }
    if !exit.drained {
        return Err(Failure::Unfinished(
            "stopped; connections were cut off before their requests were answered".to_owned(),
        ));
    }
    tracing::info!(drained = exit.drained, "stopped");
    Ok(())
}

fn builder(arguments: &Arguments) -> Result<ringleader::Builder, Failure> {
    let mut limits = HttpLimits::default();
    limits.header_timeout = limit(arguments.header_timeout);
    limits.idle_timeout = limit(arguments.idle_timeout);
    limits.body_timeout = limit(arguments.body_timeout);
    limits.send_timeout = limit(arguments.send_timeout);
    limits.header_bytes_max = arguments.header_bytes;
    limits.headers_max = arguments.headers;
    limits.body_bytes_max = if arguments.body_bytes == 0 { u64::MAX } else { arguments.body_bytes };
    let mut overload = Overload::default();
    overload.in_flight_max = arguments.max_in_flight;
    overload.delay_max = arguments.max_delay.map(Duration::from_millis);
    let builder = Server::builder()
        .stop_on_signals()
        .stall_backtraces(true)
        .trim_heap(true)
        .upgrade_on_signal()
        .upgrade_timeout(limit(arguments.upgrade_timeout).unwrap_or(Duration::MAX))
        .systemd()
        .listen_by_default("127.0.0.1:8080")
        .backlog(arguments.backlog)
        .drain_timeout(Duration::from_secs_f64(arguments.drain_timeout))
        .drain_delay(Duration::from_secs_f64(arguments.drain_delay))
        .stall_limit(Duration::from_millis(arguments.stall_limit))
        .stale_after(Duration::from_millis(arguments.stale_after))
        .hang(
            match arguments.on_hang {
                OnHang::Replace => HangPolicy::Replace,
                OnHang::Abort => HangPolicy::Abort,
                OnHang::Ignore => HangPolicy::Ignore,
            },
            limit(arguments.hang_timeout),
        )
        .share_port(arguments.share_port)
        .http_limits(limits)
        .overload(overload)
        .steering(match arguments.steering {
            SteeringName::Random => Steering::Random,
            SteeringName::Hash => Steering::Hash,
            SteeringName::LeastLoaded => Steering::LeastLoaded,
        });
    let mut builder = arguments.policies.apply(builder)?;
    for address in &arguments.listen {
        builder = builder.listen(address.as_str());
    }
    if let Count::Range(min, max) = arguments.executors {
        builder = builder.executors(min..=max);
    }
    if let Some(list) = &arguments.cpus {
        builder = builder.cpus(ringleader::parse_cpu_list(list).map_err(Failure::Usage)?);
    }
    if arguments.root.is_some() {
        // Each download has its file open.
        builder = builder.descriptors_per_connection(2);
    }
    if let Some(count) = arguments.connections {
        builder = builder.connections_max(count);
    }
    Ok(builder)
}

/// What SIGHUP changes: the directory of `--root` and the limits of the process. All else of this command comes from its
/// arguments, which nobody can change, or is settled at the start by what the system allows.
fn reload(root: Option<&app::Root>, at_start: &Surroundings) -> Vec<String> {
    let before = Surroundings::look();
    ringleader::raise_limits();
    let after = Surroundings::look();
    let rest = "everything else (addresses, executors, steering, timeouts, limits, policies, paths, the log's filter) comes \
                from the command line, which a reload does not change: for others, start the server anew; SIGUSR2 starts \
                the binary anew, with these same arguments";
    let found = [after.open_files_since(&before)].into_iter().chain(after.since(at_start)).chain([rest.to_owned()]);
    root.map(app::Root::reopen).into_iter().chain(found).collect()
}

/// What a server finds around it.
#[derive(Clone, PartialEq)]
struct Surroundings {
    /// The soft limit, as the kernel writes it.
    open_files: String,
    /// Those that affinity and cgroup quota allow.
    cpus: usize,
    somaxconn: String,
}

impl Surroundings {
    fn look() -> Self {
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
        let open_files = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
        let open_files = open_files.and_then(|line| line.split_whitespace().next()).unwrap_or("unknown").to_owned();
        let somaxconn = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap_or_default().trim().to_owned();
        Self { open_files, cpus: std::thread::available_parallelism().map_or(0, usize::from), somaxconn }
    }

    /// What the reload has changed.
    fn open_files_since(&self, before: &Self) -> String {
        let (after, before) = (&self.open_files, &before.open_files);
        if before == after {
            format!("the limit on open files is {after}, as before")
        } else {
            format!("the limit on open files is {after} instead of {before}")
        }
    }

    /// What has changed since the start and is not followed.
    fn since(&self, start: &Self) -> Vec<String> {
        let mut stays = Vec::new();
        let mut note = |is: &dyn std::fmt::Display, was: &dyn std::fmt::Display, what: &str| {
            if is.to_string() != was.to_string() {
                stays.push(format!("{what} {is} instead of {was} at the start: that takes a restart, or SIGUSR2"));
            }
        };
        let connections = "how many connections an executor may have stays, though the limit on open files is";
        note(&self.open_files, &start.open_files, connections);
        note(&self.cpus, &start.cpus, "the executors stay on their CPUs, though the number of CPUs allowed is");
        note(&self.somaxconn, &start.somaxconn, "the listen queues keep their length, though net.core.somaxconn is");
        stays
    }
}

fn start_logging(filter: &str) -> Result<(), Failure> {
    if filter.trim().is_empty() {
        return Err(Failure::Usage(
            "--log: give a level such as `info`, or a filter such as `ringleader=debug`".to_owned(),
        ));
    }
    let filter = EnvFilter::try_new(filter).map_err(|error| Failure::Usage(format!("--log {filter}: {error}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        // What cannot be written is counted by the writer. To say so, the subscriber would print, and panic for it.
        .log_internal_errors(false)
        .with_writer(super::log::writer)
        .init();
    Ok(())
}

/// What an operator wants to see at the start.
fn announce(handle: &Handle, arguments: &Arguments) {
    let addresses: Vec<String> = handle.local_addrs().iter().map(|address| format!("http://{address}")).collect();
    let cpus = handle.cpus();
    tracing::info!("serving on {}", addresses.join(" and "));
    tracing::info!("{} executors on CPUs {cpus:?}, one listener each; process {}", cpus.len(), std::process::id());
    tracing::info!("steering: {}", handle.steering());
    tracing::info!(
        "limits: {} connections per executor, backlog {}, head {} bytes and {} fields in {}, body {} in pieces of {}, answer {}, idle {}, drain {}",
        handle.connections_max(),
        arguments.backlog,
        arguments.header_bytes,
        arguments.headers,
        seconds(arguments.header_timeout),
        if arguments.body_bytes == 0 { "unlimited".to_owned() } else { format!("{} bytes", arguments.body_bytes) },
        seconds(arguments.body_timeout),
        seconds(arguments.send_timeout),
        seconds(arguments.idle_timeout),
        seconds(arguments.drain_timeout),
    );
    if arguments.chaos {
        tracing::warn!("--chaos: anybody who can connect can break this server");
    }
    handle.warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
}

fn seconds(seconds: f64) -> String {
    if seconds == 0.0 { "no limit".to_owned() } else { format!("{seconds} s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reload_names_what_has_changed_and_is_not_followed() {
        let start = Surroundings { open_files: "1024".to_owned(), cpus: 2, somaxconn: "4096".to_owned() };
        assert!(start.since(&start).is_empty());
        let now = Surroundings { cpus: 4, open_files: "9999".to_owned(), ..start.clone() };
        let said = now.since(&start);
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].contains("connections") && said[0].contains("9999 instead of 1024"), "{said:?}");
        assert!(said[1].contains("executors") && said[1].contains("4 instead of 2"), "{said:?}");
        let looked = Surroundings::look();
        assert!(looked.cpus > 0 && !looked.open_files.is_empty());
    }
}
