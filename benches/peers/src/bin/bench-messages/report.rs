//! What is printed at the end. Pure.

use std::fmt::Write;

use ringleader_peers::stats::{RESAMPLES, bootstrap_median, median, spread};

use crate::measure::{BUSY_TASKS, SCENARIOS, Sample, Scenario};
use crate::options::Options;
use crate::rivals::{RIVALS, Rival};
use crate::rounds::Series;

/// A flood through Ringleader is to answer so many times as many calls for the same CPU time as through each of these. Ahead
/// of all, and ten times a socketpair: both of its forms are told, since nobody said how many messages share a system call.
const WANTED: &[(Rival, f64)] = &[
    (Rival::Tokio, 1.0),
    (Rival::Flume, 1.0),
    (Rival::SocketpairPlain, 1.0),
    (Rival::SocketpairPlain, 10.0),
    (Rival::Socketpair, 1.0),
    (Rival::Socketpair, 10.0),
];

pub fn report(series: &[Series], options: &Options) -> String {
    let mut text = preamble(options);
    let mut verdicts = String::new();
    let mut losses = Vec::new();
    for (_, scenario) in SCENARIOS {
        let of_scenario: Vec<&Series> = series.iter().filter(|one| one.scenario == *scenario).collect();
        if of_scenario.is_empty() {
            continue;
        }
        if matches!(scenario, Scenario::Flood { .. }) {
            flood(&mut text, &mut verdicts, &mut losses, &of_scenario, options.seed);
        } else {
            round_trips(&mut text, &mut losses, &of_scenario, options.seed);
        }
    }
    let _ = writeln!(text, "\nverdicts (answered calls per CPU second in a flood, the whole interval)\n{verdicts}");
    let losses = if losses.is_empty() { "none".to_owned() } else { losses.join("\n  ") };
    let _ = writeln!(text, "what Ringleader loses, or does not surely win:\n  {losses}");
    text
}

fn preamble(options: &Options) -> String {
    let mut text = format!(
        "calls between two ends, callers on CPU {}, target on CPU {}; {} rounds in which all take turns, a process per sample\n\
         held equal: 8 bytes in, 8 bytes out; the work of an answer; the number in flight; a task per call in flight (but\n\
         socketpair-plain, -bare); placement; the allocator; room for 4,096 messages; runtimes with their I/O drivers; {} calls per flood\n\
         not equal: Ringleader sends closures and has a supervisor, contains panics and knows of lost answers; the others send a\n\
         message whose type is known; the other process of a socketpair is a bare loop without a runtime\n\
         CPU time: user and kernel, all threads and processes. Ratios: of the same round, median [95 % bootstrap interval, {} resamples]\n\
         busy: {} tasks on either end (in the other process: its loop) compute about 2 us at a time and yield\n",
        options.caller_cpu, options.target_cpu, options.rounds, options.calls, RESAMPLES, BUSY_TASKS
    );
    for (name, _, what) in RIVALS {
        let _ = writeln!(text, "  {name:<18}{what}");
    }
    text
}

fn per_cpu_second(sample: &Sample) -> f64 {
    sample.answered as f64 / sample.cpu_ns as f64 * 1e9
}

fn per_second(sample: &Sample) -> f64 {
    sample.answered as f64 / sample.wall_ns as f64 * 1e9
}

/// Of Ringleader over a rival, round by round.
struct Ratio {
    median: f64,
    low: f64,
    high: f64,
}

fn ratio(ours: &Series, theirs: &Series, figure: impl Fn(&Sample) -> f64, seed: u64) -> Option<Ratio> {
    let ratios: Vec<f64> =
        ours.samples.iter().zip(&theirs.samples).map(|(ours, theirs)| figure(ours) / figure(theirs)).collect();
    let (low, high) = bootstrap_median(&ratios, seed)?;
    Some(Ratio { median: median(&ratios)?, low, high })
}

fn ringleader<'a>(series: &[&'a Series]) -> Option<&'a Series> {
    series.iter().find(|one| one.rival == Rival::Ringleader).copied()
}

fn flood(text: &mut String, verdicts: &mut String, losses: &mut Vec<String>, series: &[&Series], seed: u64) {
    let Some(ours) = ringleader(series) else { return };
    let name = ours.scenario.name();
    let _ = writeln!(
        text,
        "\n{name}: answered calls, thousands\n  {:<18}{:>12}{:>20}{:>10}{:>12}{:>38}",
        "", "per CPU s", "(least to most)", "CPU ns", "per s", "Ringleader over it, per CPU s"
    );
    for one in series {
        let costs: Vec<f64> = one.samples.iter().map(per_cpu_second).collect();
        let speeds: Vec<f64> = one.samples.iter().map(per_second).collect();
        let (Some(middle), Some((least, most)), Some(speed)) = (median(&costs), spread(&costs), median(&speeds)) else {
            continue;
        };
        let spread = format!("({:.0} to {:.0})", least / 1e3, most / 1e3);
        let mut row = format!(
            "  {:<18}{:>12.0}{spread:>20}{:>10.0}{:>12.0}",
            one.rival.name(),
            middle / 1e3,
            1e9 / middle,
            speed / 1e3
        );
        if let Some(Ratio { median, low, high }) =
            (one.rival != Rival::Ringleader).then(|| ratio(ours, one, per_cpu_second, seed)).flatten()
        {
            let _ = write!(row, "{:>38}", format!("{median:.2} [{low:.2}, {high:.2}]"));
            if low <= 1.0 {
                losses.push(format!("{name}, calls per CPU second beside {}: {median:.2}", one.rival.name()));
            }
            for (_, wanted) in WANTED.iter().filter(|(rival, _)| *rival == one.rival) {
                let met = if low > *wanted { "met" } else { "missed" };
                let _ = writeln!(
                    verdicts,
                    "  {met:<8}{name:<12}{wanted:>4.0} x {:<18}{median:.2} [{low:.2}, {high:.2}]",
                    one.rival.name()
                );
            }
        }
        let _ = writeln!(text, "{row}");
    }
}

/// The value below which so many of the sorted values are.
fn percentile(sorted: &[u64], share: f64) -> f64 {
    let index = (sorted.len() as f64 * share) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).map_or(f64::NAN, |value| *value as f64)
}

fn sample_percentile(sample: &Sample, share: f64) -> f64 {
    let mut sorted = sample.round_trips_ns.clone();
    sorted.sort_unstable();
    percentile(&sorted, share)
}

fn round_trips(text: &mut String, losses: &mut Vec<String>, series: &[&Series], seed: u64) {
    let Some(ours) = ringleader(series) else { return };
    let name = ours.scenario.name();
    let _ = writeln!(
        text,
        "\n{name}: round trip, microseconds, over all rounds\n  {:<18}{:>10}{:>10}{:>10}{:>10}{:>38}",
        "", "calls", "p50", "p99", "worst", "Ringleader over it, p50 of a round"
    );
    for one in series {
        let mut all: Vec<u64> = one.samples.iter().flat_map(|sample| sample.round_trips_ns.iter().copied()).collect();
        all.sort_unstable();
        let at = |share| percentile(&all, share) / 1e3;
        let mut row =
            format!("  {:<18}{:>10}{:>10.1}{:>10.1}{:>10.1}", one.rival.name(), all.len(), at(0.5), at(0.99), at(1.0));
        let middle = |sample: &Sample| sample_percentile(sample, 0.5);
        if let Some(Ratio { median, low, high }) =
            (one.rival != Rival::Ringleader).then(|| ratio(ours, one, middle, seed)).flatten()
        {
            let _ = write!(row, "{:>38}", format!("{median:.2} [{low:.2}, {high:.2}]"));
            if high >= 1.0 {
                losses.push(format!(
                    "{name}, p50 of the round trip beside {}: {median:.2} of its time",
                    one.rival.name()
                ));
            }
        }
        let _ = writeln!(text, "{row}");
    }
}
