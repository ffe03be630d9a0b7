//! Durations, counted in buckets of 3 % width: percentiles of millions of waits in a few KiB.

use std::fmt;
use std::time::Duration;

const STEPS: usize = 32;

#[derive(Clone, Default)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    longest: Duration,
}

impl Histogram {
    pub fn record(&mut self, wait: Duration) {
        let bucket = bucket(wait.as_micros() as u64);
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
        self.longest = self.longest.max(wait);
    }

    pub fn add(&mut self, other: &Self) {
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(mine, theirs)| *mine += theirs);
        self.count += other.count;
        self.longest = self.longest.max(other.longest);
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// The wait that a share of `fraction` does not exceed, within 3 %.
    pub fn percentile(&self, fraction: f64) -> Duration {
        let rank = ((self.count as f64 * fraction).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_micros(upper(bucket)).min(self.longest);
            }
        }
        self.longest
    }

    /// How many waits were longer, within 3 %.
    pub fn over(&self, limit: Duration) -> u64 {
        self.buckets.iter().skip(bucket(limit.as_micros() as u64) + 1).sum()
    }
}

/// Buckets of 1 µs up to 32 µs, and 32 per doubling from there.
fn bucket(value: u64) -> usize {
    if value < STEPS as u64 {
        return value as usize;
    }
    let doubling = (63 - value.leading_zeros() as usize) - STEPS.ilog2() as usize;
    (doubling + 1) * STEPS + ((value >> doubling) as usize - STEPS)
}

fn upper(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let doubling = bucket / STEPS - 1;
    ((((bucket % STEPS) + STEPS + 1) as u64) << doubling) - 1
}

impl fmt::Display for Histogram {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.count == 0 {
            return formatter.write_str("none");
        }
        write!(
            formatter,
            "{}: p50 {:.2?}, p99 {:.2?}, p99.9 {:.2?}, worst {:.2?}",
            self.count,
            self.percentile(0.5),
            self.percentile(0.99),
            self.percentile(0.999),
            self.longest
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_bucket() {
        let mut histogram = Histogram::default();
        (1..=100_000u64).for_each(|wait| histogram.record(Duration::from_micros(wait)));
        for percent in [1, 10, 50, 90, 99] {
            let (found, exact) = (histogram.percentile(f64::from(percent) / 100.0).as_micros(), percent as u128 * 1000);
            assert!(found >= exact && found <= exact + exact / 25, "{percent} %: {found} instead of {exact}");
        }
        let over = histogram.over(Duration::from_micros(50_000));
        assert!((48_000..=50_000).contains(&over), "{over}");
    }
}
