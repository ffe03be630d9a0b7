//! From samples to medians and paired ratios. Pure.

use serde::Serialize;

use crate::measure::{Metric, Sample};
use ringleader_peers::stats::{bootstrap_median, median, spread};

/// One scenario, all servers.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub scenario: &'static str,
    pub servers: Vec<ServerSummary>,
    pub ratios: Vec<Ratio>,
}

#[derive(Debug, Serialize)]
pub struct ServerSummary {
    pub server: String,
    pub runs: usize,
    pub costs: Vec<Cost>,
    pub requests_per_second: f64,
    /// CPU time over wall time: 1 is one busy CPU.
    pub busy: f64,
}

/// Medians per request, and the spread of the total.
#[derive(Debug, Serialize)]
pub struct Cost {
    pub metric: Metric,
    pub user: f64,
    pub kernel: f64,
    pub total: f64,
    pub total_min: f64,
    pub total_max: f64,
}

/// A server's cost over the baseline's of the same round: median and 95 % bootstrap interval.
#[derive(Debug, Serialize)]
pub struct Ratio {
    pub server: String,
    pub baseline: String,
    pub metric: Metric,
    pub pairs: usize,
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

/// What a ratio's interval says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Wins,
    Undecided,
    Loses,
}

/// With fewer pairs no 95 % interval of a median exists: n pairs all fall on one side of it by chance
/// in 2 of 2ⁿ cases, which is 25 % for 3, 6 % for 5 and 3 % for 6.
pub const PAIRS_MIN: usize = 6;

impl Ratio {
    pub fn verdict(&self) -> Verdict {
        match (self.low, self.high) {
            _ if self.pairs < PAIRS_MIN => Verdict::Undecided,
            (_, high) if high < 1.0 => Verdict::Wins,
            (low, _) if low > 1.0 => Verdict::Loses,
            _ => Verdict::Undecided,
        }
    }
}

/// A server's name, and that of the server it is compared with.
pub type Names<'a> = (&'a str, &'a str);

/// Sums up one scenario. `names` gives the order; servers without a valid run are left out, and one that is compared with
/// itself has no ratio.
pub fn summarise(scenario: &'static str, samples: &[Sample], names: &[Names<'_>], seed: u64) -> Summary {
    let of = |name: &str| -> Vec<&Sample> {
        let ours = |sample: &&Sample| sample.scenario == scenario && sample.server == name;
        samples.iter().filter(ours).collect()
    };
    let servers = names.iter().filter_map(|(name, _)| server(name, &of(name))).collect();
    let others = names.iter().filter(|(name, baseline)| name != baseline);
    let ratios = others
        .flat_map(|names| Metric::ALL.map(|metric| ratio(*names, metric, &of(names.0), &of(names.1), seed)))
        .flatten()
        .collect();
    Summary { scenario, servers, ratios }
}

fn server(name: &str, samples: &[&Sample]) -> Option<ServerSummary> {
    let median_of =
        |value: &dyn Fn(&Sample) -> f64| median(&samples.iter().map(|sample| value(sample)).collect::<Vec<_>>());
    Some(ServerSummary {
        server: name.to_owned(),
        runs: samples.len(),
        requests_per_second: median_of(&|sample| sample.requests as f64 / sample.seconds)?,
        busy: median_of(&|sample| sample.cpu.total_s / sample.seconds)?,
        costs: Metric::ALL.iter().filter_map(|metric| cost(*metric, samples)).collect(),
    })
}

fn cost(metric: Metric, samples: &[&Sample]) -> Option<Cost> {
    let values: Vec<[f64; 3]> = samples.iter().filter_map(|sample| metric.of(sample)).collect();
    let column = |index: usize| values.iter().map(|value| value[index]).collect::<Vec<_>>();
    let (total_min, total_max) = spread(&column(2))?;
    Some(Cost {
        metric,
        user: median(&column(0))?,
        kernel: median(&column(1))?,
        total: median(&column(2))?,
        total_min,
        total_max,
    })
}

/// Pairs by round: a round in which either run was void gives no pair.
fn ratio(names: Names<'_>, metric: Metric, samples: &[&Sample], base: &[&Sample], seed: u64) -> Option<Ratio> {
    let total = |sample: &Sample| metric.of(sample).map(|[_, _, total]| total);
    let pair = |sample: &&Sample| {
        let other = base.iter().find(|other| other.round == sample.round)?;
        Some(total(sample)? / total(other)?)
    };
    let ratios: Vec<f64> = samples.iter().filter_map(pair).collect();
    let (low, high) = bootstrap_median(&ratios, seed)?;
    let (server, baseline, pairs) = (names.0.to_owned(), names.1.to_owned(), ratios.len());
    Some(Ratio { server, baseline, metric, pairs, median: median(&ratios)?, low, high })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::Counters;
    use crate::process::CpuUse;

    fn sample(server: &str, round: u32, clock_ms: f64) -> Sample {
        Sample {
            scenario: "s",
            server: server.to_owned(),
            round,
            requests: 1000,
            seconds: 2.0,
            counters: Counters::default(),
            cpu: CpuUse { user_s: clock_ms / 4e3, kernel_s: clock_ms * 3.0 / 4e3, total_s: clock_ms / 1e3 },
            disturbance: None,
            answer: String::new(),
        }
    }

    #[test]
    fn ratios_are_paired_by_round_and_void_rounds_left_out() {
        // The machine is twice as slow in round 1; b always costs half. Round 2 of a was void.
        let samples = [
            sample("a", 0, 100.0),
            sample("b", 0, 50.0),
            sample("b", 1, 100.0),
            sample("a", 1, 200.0),
            sample("b", 2, 999.0),
        ];
        let summary = summarise("s", &samples, &[("a", "a"), ("b", "a"), ("absent", "a")], 1);
        let [ratio] = &summary.ratios[..] else { panic!("{summary:?}") };
        assert_eq!((ratio.pairs, ratio.median, ratio.low, ratio.high), (2, 0.5, 0.5, 0.5));
        assert_eq!(ratio.verdict(), Verdict::Undecided, "two pairs prove nothing");
        assert_eq!(summary.servers.len(), 2, "a server without runs is left out");
    }

    #[test]
    fn verdicts_need_pairs_and_an_interval_on_one_side() {
        let verdict = |pairs, low, high| {
            let (server, baseline, metric) = ("b".to_owned(), "a".to_owned(), Metric::CpuTime);
            Ratio { server, baseline, metric, pairs, median: 1.0, low, high }.verdict()
        };
        assert_eq!(verdict(6, 0.8, 0.9), Verdict::Wins);
        assert_eq!(verdict(6, 1.1, 1.2), Verdict::Loses);
        assert_eq!(verdict(6, 0.9, 1.1), Verdict::Undecided);
        assert_eq!(verdict(5, 1.1, 1.2), Verdict::Undecided);
    }

    #[test]
    fn costs_are_per_request() {
        let summary = summarise("s", &[sample("a", 0, 100.0)], &[("a", "a")], 1);
        let [cost] = &summary.servers[0].costs[..] else { panic!("{summary:?}") };
        assert_eq!((cost.user, cost.kernel, cost.total), (25.0, 75.0, 100.0));
        assert!((summary.servers[0].busy - 0.05).abs() < 1e-9);
    }
}
