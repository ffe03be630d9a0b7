//! A small server built with the library, for proofs of what the command cannot be told to do: start-ups that panic or wait,
//! and orders that go through the handle. Orders come as lines on a port of their own, one connection at a time.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ringleader::{Body, BoxError, Handle, Reject, Request, Response, Server, Shard, StatusCode, service_fn};

const GATE_LOOKED_AT: Duration = Duration::from_millis(10);

#[derive(clap::Args)]
pub struct Arguments {
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS")]
    listen: String,
    /// Executors at the start
    #[arg(long)]
    executors: usize,
    /// CPUs to pin executors to
    #[arg(long, value_name = "LIST")]
    cpus: String,
    /// Slots whose start-up panics in each generation but the first
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    crash_slots: Vec<usize>,
    /// The last slot's start-up waits until this file is there
    #[arg(long, value_name = "FILE")]
    gate: Option<PathBuf>,
    /// Port on 127.0.0.1 for orders: `scale N`
    #[arg(long, value_name = "PORT")]
    control: Option<u16>,
}

/// Serves until a signal, or until no executor is left.
pub fn run(arguments: &Arguments) -> Result<(), String> {
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let handle = Arc::new(OnceLock::<Handle>::new());
    let (crashing, of_service) = (arguments.crash_slots.clone(), Arc::clone(&handle));
    let gate = arguments.gate.clone().map(|gate| (arguments.executors - 1, gate));
    let server = Server::builder()
        .systemd()
        .listen(arguments.listen.as_str())
        .executors(arguments.executors)
        .cpus(ringleader::parse_cpu_list(&arguments.cpus)?)
        .stop_on_signals()
        .trim_heap(true) // as `ringleader serve`
        .serve(async move |shard: Shard| {
            let slot = shard.id().index();
            assert!(shard.generation() == 1 || !crashing.contains(&slot), "the start-up was told to panic");
            if let Some((_, gate)) = gate.as_ref().filter(|(last, _)| *last == slot) {
                while !gate.exists() {
                    shard.sleep(GATE_LOOKED_AT).await;
                }
            }
            let handle = Arc::clone(&of_service);
            Ok(service_fn(async move |request: Request| answer(&shard, &handle, &request)))
        });
    let running = server.start().wait().map_err(|error| error.to_string())?;
    let _ = handle.set(running.handle());
    if let Some(port) = arguments.control {
        let handle = running.handle();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .map_err(|error| format!("listening for orders on port {port}: {error}"))?;
        std::thread::spawn(move || take_orders(&listener, &handle));
    }
    running.join().wait().map(drop).map_err(|error| error.to_string())
}

fn answer(shard: &Shard, handle: &OnceLock<Handle>, request: &Request) -> Result<Response, BoxError> {
    let text = match request.uri().path() {
        "/" => "Hello, World!".to_owned(),
        "/whoami" => {
            format!(r#"{{"executor":{},"generation":{},"pid":{}}}"#, shard.id(), shard.generation(), std::process::id())
        }
        "/escape" => {
            shard.background("escape", async { panic!("ordered by /escape") });
            "a panic is on its way\n".to_owned()
        }
        "/stats" => handle.get().map(describe).unwrap_or_default(),
        _ => return Err(Reject::new(StatusCode::NOT_FOUND, "there is /, /whoami, /escape and /stats").into()),
    };
    Ok(Response::new(Body::from(text)))
}

/// `ready true generations 1 1 2 1`.
fn describe(handle: &Handle) -> String {
    let stats = handle.stats();
    let generations: Vec<String> = stats.executors.iter().map(|executor| executor.generation.to_string()).collect();
    format!("ready {} generations {}", stats.ready, generations.join(" "))
}

/// Answers each order with `ok` or a reason, when it has been accepted or refused.
fn take_orders(listener: &TcpListener, handle: &Handle) {
    for connection in listener.incoming().flatten() {
        let Ok(mut answers) = connection.try_clone() else { continue };
        for line in BufReader::new(connection).lines().map_while(Result::ok) {
            let count = line.strip_prefix("scale ").and_then(|count| count.parse().ok());
            let outcome = count.ok_or_else(|| format!("there is no order {line:?}")).and_then(|n| scale(handle, n));
            let answer = outcome.map_or_else(|reason| reason.replace('\n', " "), |()| "ok".to_owned());
            if writeln!(answers, "{answer}").is_err() {
                break;
            }
        }
    }
}

fn scale(handle: &Handle, count: usize) -> Result<(), String> {
    handle.scale(count).wait().map_err(|error| error.to_string())
}
