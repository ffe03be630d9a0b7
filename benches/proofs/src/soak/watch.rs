//! The server's samples over a phase, and whether they are level.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::histogram::Histogram;
use crate::proc::{self, Sample};
use crate::report::{Verdicts, bytes};
use crate::server::Server;
use crate::trend::Series;

/// The first part of a series, in which caches and allocators fill.
const WARM_UP: f64 = 0.2;
/// Descriptors at rest may differ by this many: a probe that has just closed.
const REST_FDS_TOLERANCE: u64 = 2;

const LAG_EVERY: Duration = Duration::from_millis(10);

#[derive(Default)]
pub struct Watched {
    pub fds: Series,
    pub threads: Series,
    pub rss: Series,
    /// Percent of a core.
    pub cpu: Series,
    /// Percent of the wall time, all threads added, in which the server could have run and somebody else did.
    pub starved: Series,
}

/// Samples the server once per second until `over` is set.
pub async fn watch(pid: u32, over: Rc<Cell<bool>>) -> Watched {
    let began = Instant::now();
    let mut watched = Watched::default();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    let mut last: Option<Sample> = None;
    while !over.get() {
        ticks.tick().await;
        let Ok(sample) = proc::sample(pid) else { continue };
        let at = sample.at.duration_since(began).as_secs_f64();
        watched.fds.push(at, sample.fds as f64);
        watched.threads.push(at, sample.threads as f64);
        watched.rss.push(at, sample.rss as f64);
        if let Some(last) = last {
            let wall = sample.at.duration_since(last.at).as_nanos().max(1) as f64;
            watched.cpu.push(at, sample.cpu_ns.saturating_sub(last.cpu_ns) as f64 / wall * 100.0);
            watched.starved.push(at, sample.queued_ns.saturating_sub(last.queued_ns) as f64 / wall * 100.0);
        }
        last = Some(sample);
    }
    watched
}

/// How late this client's own timers are: that much of each wait is not the server's.
pub async fn lag(over: Rc<Cell<bool>>) -> Histogram {
    let mut lag = Histogram::default();
    while !over.get() {
        let due = Instant::now() + LAG_EVERY;
        tokio::time::sleep(LAG_EVERY).await;
        lag.record(due.elapsed());
    }
    lag
}

/// Compares the server at rest before and after a phase.
pub fn judge_rest(before: &Sample, after: &Sample, phase: &str, verdicts: &mut Verdicts) {
    verdicts.check(
        after.fds <= before.fds + REST_FDS_TOLERANCE,
        &format!("{phase}: fds at rest are the same"),
        format!("{} before, {} after", before.fds, after.fds),
    );
    verdicts.check(
        after.threads <= before.threads,
        &format!("{phase}: threads at rest are the same"),
        format!("{} before, {} after", before.threads, after.threads),
    );
    println!(
        "  memory at rest: {} before, {} after, {} at most",
        bytes(before.rss as f64),
        bytes(after.rss as f64),
        bytes(after.rss_peak as f64)
    );
}

/// Looks for growth while the phase ran.
pub fn judge_series(watched: &Watched, rss_tolerance_mib: f64, phase: &str, verdicts: &mut Verdicts) {
    let criterion = format!("{phase}: memory is level");
    let (Some(rss), Some(fds), Some(cpu)) =
        (watched.rss.trend(WARM_UP), watched.fds.trend(WARM_UP), watched.cpu.trend(WARM_UP))
    else {
        verdicts.skip(&criterion, "the phase was too short for a trend: 13 s at least");
        return;
    };
    let growth = rss.last - rss.first;
    verdicts.check(
        growth <= rss_tolerance_mib * 1048576.0,
        &criterion,
        format!(
            "{} in the first tenth, {} in the last, {} per hour by least squares over {} samples; tolerance {rss_tolerance_mib} MiB",
            bytes(rss.first),
            bytes(rss.last),
            bytes(rss.slope_per_hour),
            rss.samples
        ),
    );
    // The load comes and goes, so a slope that is small against the level says nothing.
    let tolerance = 16.0 + fds.first.max(fds.last) * 0.25;
    verdicts.check(
        fds.growth <= tolerance,
        &format!("{phase}: fds are level under load"),
        format!(
            "{:.0} first, {:.0} last, growth {:+.0} by least squares; tolerance {tolerance:.0}",
            fds.first, fds.last, fds.growth
        ),
    );
    let starved = watched.starved.mean();
    println!(
        "  server CPU: {:.0} % of a core on average, {:.0} % first, {:.0} % last; its threads waited for a CPU {starved:.0} % of the time",
        watched.cpu.mean(),
        cpu.first,
        cpu.last
    );
}

impl Watched {
    /// For progress.
    pub fn now(server: &Server) -> String {
        match server.sample() {
            Ok(sample) => format!("fds {}, threads {}, RSS {}", sample.fds, sample.threads, bytes(sample.rss as f64)),
            Err(error) => error,
        }
    }
}
