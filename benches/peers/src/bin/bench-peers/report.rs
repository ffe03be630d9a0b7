//! The report as text. Pure: everything returns a string.

use std::fmt::Write;

use crate::measure::{Metric, Sample};
use crate::options::{AGAIN, Options};
use crate::perf::Counters;
use crate::scenario::Scenario;
use crate::summary::{Cost, PAIRS_MIN, Ratio, Summary, Verdict};
use ringleader_peers::stats::{RESAMPLES, median, spread};

/// Fewer pairs than this make an interval that only looks like one.
const PAIRS_FEW: usize = 15;

/// What is said before anything is measured.
pub fn preamble(options: &Options, machine: &str, counters: &Counters) -> String {
    let Options { pairs, seconds, server_cpu, load_cpu, seed, baseline, .. } = options;
    let mut text = format!(
        "Cost of a request to the server's process. Lower is better.
machine: {machine}

held equal: one worker (the default commands); every thread of a server on CPU {server_cpu}; wrk with one thread on
  CPU {load_cpu}; a fresh server for each run; TCP_NODELAY; the response bytes (compared below). The default servers
  also share allocator (glibc) and build profile, if they were built in one workspace.
not held equal: timeouts. The peers run hyper without a timer, Ringleader with its header-read timeout. Backlog:
  4096 asked, glommio 1024. `bare` is no server: it parses nothing and shows the limit.
order: A B .. B A over {pairs} rounds of {seconds} s per server; ratios to `{baseline}` are taken within a round.
  95 % intervals: percentile bootstrap of the median, {RESAMPLES} resamples, seed {seed}.
counted: perf stat (CPU time: /proc) on the process from before wrk connects until it has ended, divided by wrk's total of requests.
  Connection set-up and teardown are thus included, for all servers alike.
not measured: latency and its tail, memory, several cores, a real network, TLS, large bodies. Requests/s say little:
  wrk is closed-loop, and where `busy` is below 1 wrk or the wake-ups are the bound.
"
    );
    if !counters.has_hardware() {
        text.push_str(
            "WARNING: this machine gives perf no cycles and instructions (a virtual machine without a PMU, or
  kernel.perf_event_paranoid above 1). Only CPU time is left (the scheduler's account, without stolen
  time), which swings with clock rate and neighbours. It ranks; it must not gate. User and kernel are estimates
  from the kernel's tick.\n",
        );
    }
    text
}

/// One scenario's tables.
pub fn scenario(scenario: Scenario, summary: &Summary, samples: &[Sample]) -> String {
    let mut text = format!("\n== {}: {}\n", scenario.name, scenario.what);
    for metric in Metric::ALL {
        text.push_str(&costs(metric, summary));
    }
    text.push_str("  server              runs   requests/s   busy\n");
    for server in &summary.servers {
        let rate = thousands(server.requests_per_second);
        let (name, runs, busy) = (&server.server, server.runs, server.busy);
        line(&mut text, format_args!("  {name:<18} {runs:>5} {rate:>12} {busy:>6.2}"));
    }
    if !summary.ratios.is_empty() {
        text.push_str("  ratio                                           median   95 % interval   pairs\n");
    }
    for ratio in &summary.ratios {
        let Ratio { server, baseline, metric, median, low, high, pairs } = ratio;
        let (name, few) = (metric.name(), if *pairs < PAIRS_FEW { "  (few)" } else { "" });
        let row = format!("{median:>6.3}   {low:.3} to {high:.3}   {pairs:>5}{few}");
        line(&mut text, format_args!("  {server:<18} to {baseline:<10} {name:<13} {row}"));
    }
    let again = |ratio: &&Ratio| ratio.server.ends_with(AGAIN) && !(ratio.low..=ratio.high).contains(&1.0);
    for ratio in summary.ratios.iter().filter(again) {
        let row = format_args!(
            "  WARNING: the baseline differs from itself ({:.3}): no ratio nearer to 1 than that means anything here",
            ratio.median
        );
        line(&mut text, row);
    }
    let ours = |sample: &&Sample| sample.scenario == scenario.name;
    text.push_str(&remarks(&samples.iter().filter(ours).collect::<Vec<_>>()));
    text
}

fn costs(metric: Metric, summary: &Summary) -> String {
    let mut rows = String::new();
    for server in &summary.servers {
        let Some(cost) = server.costs.iter().find(|cost| cost.metric == metric) else {
            continue;
        };
        let Cost { user, kernel, total, total_min, total_max, .. } = *cost;
        let show = |value: f64| match metric {
            Metric::CpuTime => format!("{value:.2}"),
            Metric::Cycles | Metric::Instructions => thousands(value),
        };
        let [user, kernel, total] = [user, kernel, total].map(show);
        let range = format!("{} to {}", show(total_min), show(total_max));
        let name = &server.server;
        line(&mut rows, format_args!("  {name:<18} {user:>9} {kernel:>9} {total:>9}   {range}"));
    }
    if rows.is_empty() {
        return rows;
    }
    let title = format!("{} / request", metric.name());
    format!("  {title:<22}  user    kernel     total   min to max\n{rows}")
}

/// What a reader must know before trusting the numbers.
fn remarks(samples: &[&Sample]) -> String {
    let mut text = String::new();
    let mut answers: Vec<_> = samples.iter().map(|sample| (&sample.answer, &sample.server)).collect();
    answers.sort();
    answers.dedup();
    if let Some((first, _)) = answers.first() {
        if answers.iter().all(|(answer, _)| answer == first) {
            line(&mut text, format_args!("  answers: the same {} bytes from all", first.len()));
        } else {
            text.push_str("  answers DIFFER, so the work does too:\n");
            for (answer, server) in &answers {
                let length = answer.len();
                line(&mut text, format_args!("    {server}: {length} bytes, {answer:?}"));
            }
        }
    }
    let disturbances = samples.iter().filter_map(|sample| sample.disturbance);
    let (steal, others): (Vec<f64>, Vec<f64>) =
        disturbances.map(|each| (each.steal_percent, each.others_percent)).unzip();
    for (values, whose) in [(others, "used by others"), (steal, "stolen by the hypervisor")] {
        if let (Some(middle), Some((_, most))) = (median(&values), spread(&values)) {
            let row = format_args!("  the server's CPU, {whose}: median {middle:.1} %, at most {most:.1} % of a run");
            line(&mut text, row);
        }
    }
    let counted = samples.iter().filter_map(|sample| sample.counters.counted_percent);
    if let Some(least) = counted.min_by(f64::total_cmp).filter(|percent| *percent < 99.0) {
        let text = &mut text;
        line(text, format_args!("  counters shared hardware ({least:.0} %): totals are estimates"));
    }
    text
}

/// The end: where the subject wins, where nothing can be said, and the case it loses.
pub fn verdict(options: &Options, summaries: &[Summary]) -> String {
    let Options { subject, baseline, .. } = options;
    let of = |verdict: Verdict| {
        let mut cases = Vec::new();
        for summary in summaries {
            let ours = |ratio: &&Ratio| is_of(subject, &ratio.server) && ratio.verdict() == verdict;
            cases.extend(summary.ratios.iter().filter(ours).map(|ratio| {
                let Ratio { server, baseline, metric, median, low, high, .. } = ratio;
                let name = metric.name().trim_end_matches(", µs");
                let scenario = summary.scenario;
                format!("{scenario}: {median:.3} ({low:.3} to {high:.3}) in {name}, {server} to {baseline}")
            }));
        }
        if cases.is_empty() { "none of those measured".to_owned() } else { cases.join("\n  ") }
    };
    let ratios = summaries.iter().flat_map(|summary| &summary.ratios);
    if !ratios.into_iter().any(|ratio| is_of(subject, &ratio.server)) {
        return format!(
            "\n`{subject}` was not measured against `{baseline}`, so no case can be named in which it loses.\n"
        );
    }
    format!(
        "\n{subject} against its baseline (interval below 1; around it or fewer than {PAIRS_MIN} pairs; above it):\n\
         case it wins:\n  {}\nundecided:\n  {}\ncase it loses:\n  {}\n",
        of(Verdict::Wins),
        of(Verdict::Undecided),
        of(Verdict::Loses)
    )
}

/// Whether a server is the subject, or one of its kinds: `ringleader-axum` of `ringleader`.
fn is_of(subject: &str, server: &str) -> bool {
    server.strip_prefix(subject).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    writeln!(text, "{arguments}").expect("writing to a string does not fail");
}

/// `28200.4` as `28,200`.
pub fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::CommandLine;
    use clap::Parser;

    #[test]
    fn thousands_are_grouped() {
        let texts = [0.4, 999.0, 1000.0, 28_200.4, 1_234_567.0].map(thousands);
        assert_eq!(texts, ["0", "999", "1,000", "28,200", "1,234,567"]);
    }

    fn summary(low: f64, high: f64) -> Summary {
        let (server, baseline, metric) = ("ringleader".to_owned(), "tokio".to_owned(), Metric::Cycles);
        let ratio = Ratio { server, baseline, metric, pairs: 15, median: (low + high) / 2.0, low, high };
        Summary { scenario: "s", servers: Vec::new(), ratios: vec![ratio] }
    }

    #[test]
    fn the_lost_case_is_named() {
        let options = CommandLine::parse_from(["bench-peers"]).options;
        let text = verdict(&options, &[summary(1.02, 1.1)]);
        assert!(text.contains("case it loses:\n  s: 1.060 (1.020 to 1.100) in cycles, ringleader to tokio"), "{text}");
        let text = verdict(&options, &[summary(0.8, 0.9)]);
        assert!(text.contains("case it loses:\n  none of those measured"), "{text}");
        assert!(verdict(&options, &[]).contains("was not measured"));
    }

    #[test]
    fn missing_counters_are_said() {
        let options = CommandLine::parse_from(["bench-peers"]).options;
        assert!(preamble(&options, "", &Counters::default()).contains("WARNING"));
    }
}
