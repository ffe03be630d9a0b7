//! A thousand escaped panics under load, one after another, on the executors in turn.
//!
//! How a failure is judged, from outside:
//! - A connection whose executor is known (it has answered /whoami) may end only in an escape of that executor and
//!   generation, and has to end within 100 ms of the order. Any other end is an error seen by an innocent.
//! - A fresh connection whose executor is not known yet may be reset without an answer only if it overlapped an escape
//!   *and* its connect was over before the victim's first known connection was seen to end: then the victim may have
//!   accepted it, and it was in flight. These are counted apart. One that was connected later can only have been in the
//!   queue of a listener, and to reset it is a fault. A refused connect is always a fault: a listener was closed.

pub mod clients;
pub mod stage;

use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::client::{self, Client, Whoami};
use crate::proc::Sample;
use crate::report::{Progress, Verdicts, bytes};
use crate::server::{Common, Server};
use stage::Stage;

/// After the order, a victim's connection that has not ended by now is taken to hang.
const HANG: Duration = Duration::from_secs(5);
const RESTART_MAX: Duration = Duration::from_secs(20);
/// Escapes that may fail to come about before the proof gives up.
const FAILED_MAX: usize = 5;
const EXECUTORS: usize = 4;
/// Clients that look out for the next generation, without a pause.
const PROBES: usize = 4;
/// An executor gives memory back when it has been idle for a second or so.
const GIVE_BACK: Duration = Duration::from_secs(3);
/// "From the 10th on."
const FIRST_REST: usize = 10;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Escapes
    #[arg(long, default_value_t = 1000)]
    count: usize,
    /// Clients that ask /whoami on one connection, over all executors
    #[arg(long, default_value_t = 32)]
    keep_alive: usize,
    /// Clients in the middle of an upload and its echo, over all executors
    #[arg(long, default_value_t = 32)]
    uploads: usize,
    /// Clients that make one connection after another
    #[arg(long, default_value_t = 8)]
    fresh: usize,
    /// Milliseconds in which a victim's clients have to see the end
    #[arg(long, value_name = "MS", default_value_t = 100)]
    end_limit: u64,
    /// Milliseconds from a victim's end to the first answer of the next generation, in the middle of all escapes
    #[arg(long, value_name = "MS", default_value_t = 5)]
    restart_limit: u64,
    /// MiB that memory at rest may grow by from the 10th escape to the last
    #[arg(long, default_value_t = 2.0)]
    rss_tolerance: f64,
}

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let cpus = arguments.common.cpus_or("0");
    let executors = EXECUTORS.to_string();
    let server = arguments.common.start(
        arguments.common.port,
        &[
            "--executors",
            &executors,
            "--cpus",
            &cpus,
            "--chaos",
            "--quarantine-after",
            "0",
            "--restart-delay",
            "0",
            "--body-bytes",
            "0",
        ],
    )?;
    println!("server: {}, process {}, log {}", server.command, server.pid(), server.log_path());
    println!(
        "load: {} keep-alive, {} in an upload, {} fresh clients; {} escapes, one after another, on executors in turn",
        arguments.keep_alive, arguments.uploads, arguments.fresh, arguments.count
    );
    let stage = Rc::new(Stage::new(server.address(), Duration::from_millis(arguments.end_limit)));
    let first = arguments.count.min(FIRST_REST);
    let mut rests = Vec::new();
    let middle = first + (arguments.count - first) / 2;
    let mut done = 0;
    for until in [first, middle, arguments.count] {
        series(arguments, &stage, &server, done, until).await?;
        done = until;
        sleep(GIVE_BACK).await;
        let rest = server.settled(Duration::from_secs(15)).await?;
        println!("  at rest after {done}: fds {}, threads {}, RSS {}", rest.fds, rest.threads, bytes(rest.rss as f64));
        rests.push(rest);
    }
    let mut verdicts = Verdicts::default();
    judge(&stage, arguments, &mut verdicts);
    judge_rests(&rests, arguments.rss_tolerance, &mut verdicts);
    let (status, time) = server.stop()?;
    verdicts.check(status.success(), "the server stops in order", format!("{status} after {time:.2?}"));
    Ok(verdicts)
}

/// Escapes `from` to `until` under load, then the load ends.
async fn series(
    arguments: &Arguments,
    stage: &Rc<Stage>,
    server: &Server,
    from: usize,
    until: usize,
) -> Result<(), String> {
    let clients = clients::start(stage, arguments.keep_alive, arguments.uploads, arguments.fresh);
    let steady = arguments.keep_alive + arguments.uploads;
    let mut progress = Progress::new();
    let mut failed = 0;
    for number in from..until {
        // The clients of the last victim are back.
        let back = Instant::now() + Duration::from_secs(1);
        while stage.known() < steady && Instant::now() < back {
            sleep(Duration::from_millis(2)).await;
        }
        if let Err(error) = escape(stage, number % EXECUTORS).await {
            println!("  escape {number}: {error}");
            failed += 1;
            if failed > FAILED_MAX {
                return Err(format!("{failed} escapes did not come about; the server's log is {}", server.log_path()));
            }
        }
        progress.say(|| format!("{number} escapes; {}", stage.summary()));
    }
    sleep(Duration::from_millis(100)).await;
    stop(stage, clients).await
}

async fn stop(stage: &Rc<Stage>, clients: Vec<JoinHandle<()>>) -> Result<(), String> {
    stage.stop();
    for client in clients {
        timeout(Duration::from_secs(20), client)
            .await
            .map_err(|_| "a client of the proof does not stop".to_owned())?
            .map_err(|error| format!("a client of the proof: {error}"))?;
    }
    stage.restarted();
    Ok(())
}

/// One escape: find a connection to the victim, order it, wait for the next generation and for all ends.
async fn escape(stage: &Rc<Stage>, victim: usize) -> Result<(), String> {
    let (mut client, who) =
        reach(stage, victim).await.map_err(|error| format!("reaching executor {victim}: {error}"))?;
    stage.order(who);
    let sent = client.send(client::get("/chaos/escape", false).as_bytes()).await;
    sent.map_err(|error| format!("ordering the escape of {who:?}: {error}"))?;
    (0..PROBES).for_each(|_| drop(tokio::task::spawn_local(clients::probe(Rc::clone(stage)))));
    let served = async {
        while stage.latest(victim) <= who.generation {
            stage.changed.notified().await;
        }
    };
    let restarted = timeout(RESTART_MAX, served).await.is_ok();
    let hang = Instant::now() + HANG;
    while stage.live(who) > 0 && Instant::now() < hang {
        sleep(Duration::from_millis(1)).await;
    }
    // The trigger's own connection ends, too; it may have been answered before.
    let _ = timeout(Duration::from_secs(1), client.answer()).await;
    let ended = timeout(Duration::from_secs(1), client.closed()).await.is_ok();
    stage.over(who, ended);
    if restarted { Ok(()) } else { Err(format!("no generation after {who:?} within {RESTART_MAX:?}")) }
}

async fn reach(stage: &Stage, victim: usize) -> std::io::Result<(Client, Whoami)> {
    for _ in 0..1000 {
        let mut client = Client::connect(stage.server).await?;
        let who = timeout(HANG, client.get("/whoami")).await??;
        let who = client::whoami(&who)?;
        stage.note(who);
        if who.executor == victim {
            return Ok((client, who));
        }
        client.reset();
    }
    Err(client::wrong("1,000 connections and none reached it"))
}

fn judge(stage: &Stage, arguments: &Arguments, verdicts: &mut Verdicts) {
    let count = arguments.count;
    let seen = stage.seen.borrow();
    println!("  victim's clients saw the end: {}", seen.ends);
    println!("  first answer of the next generation: {}", seen.restarts);
    println!("  the same since the first end: {}", seen.gaps);
    println!(
        "  answers: {} kept alive, {} pieces of bodies, {} fresh; {} fresh in flight at the victim",
        seen.asked, seen.pieces, seen.fresh, seen.in_flight
    );
    println!("  of the victims' clients, {} were in the middle of a body", seen.ends_in_body);
    let restarts = seen.restarts.count();
    verdicts.check(
        restarts == count as u64,
        "every escape leads to a next generation",
        format!("{restarts} of {count}"),
    );
    let (ends, in_body) = (seen.ends.count(), seen.ends_in_body);
    verdicts.check(
        3 * in_body >= ends && ends > 0,
        "a third of the victims' clients and more are in the middle of a body",
        format!("{in_body} of {ends}"),
    );
    let (limit, middle) = (Duration::from_millis(arguments.restart_limit), seen.gaps.percentile(0.5));
    verdicts.check(
        middle <= limit && restarts > 0,
        &format!("it serves again in {limit:?} (median) after its end"),
        format!(
            "{middle:.2?}, worst {:.2?}; {:.2?} after the request that makes it panic",
            seen.gaps.longest(),
            seen.restarts.percentile(0.5)
        ),
    );
    verdicts.check(
        seen.innocents.count() == 0,
        "no client of another executor notices",
        seen.innocents.show("errors at innocents"),
    );
    verdicts.check(
        seen.late == 0 && seen.hung == 0,
        "the victim's clients see EOF or RST in time",
        format!("{} later than {:?}, {} hung; {}", seen.late, stage.end_limit, seen.hung, seen.ends),
    );
    verdicts.check(
        seen.queued.count() == 0 && seen.unanswered.count() == 0,
        "no queued connection is reset, every fresh one is answered",
        format!(
            "{}, {}; {} in flight",
            seen.queued.show("queued and reset"),
            seen.unanswered.show("unanswered"),
            seen.in_flight
        ),
    );
    verdicts.check(seen.wrong.count() == 0, "every answer is right", seen.wrong.show("wrong"));
}

fn judge_rests(rests: &[Sample], rss_tolerance_mib: f64, verdicts: &mut Verdicts) {
    let [first, .., last] = rests else { return };
    verdicts.check(last.fds <= first.fds, "fds are level", format!("{} after 10, {} at the end", first.fds, last.fds));
    let threads = format!("{} after 10, {} at the end", first.threads, last.threads);
    verdicts.check(last.threads <= first.threads, "threads are level", threads);
    let growth = last.rss as f64 - first.rss as f64;
    let figures: Vec<String> = rests.iter().map(|rest| bytes(rest.rss as f64)).collect();
    verdicts.check(
        growth <= rss_tolerance_mib * 1048576.0,
        "memory is level",
        format!("RSS at rest {} after 10, half and all; tolerance {rss_tolerance_mib} MiB", figures.join(", ")),
    );
}
