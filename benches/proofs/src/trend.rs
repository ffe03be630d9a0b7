//! Whether a series of samples is level.

/// A series over time: (seconds, value).
#[derive(Default, Clone)]
pub struct Series(Vec<(f64, f64)>);

/// What the series does after its warm-up.
pub struct Trend {
    /// Means of the first and of the last tenth.
    pub first: f64,
    pub last: f64,
    /// Least squares.
    pub slope_per_hour: f64,
    /// The slope times the time it was observed.
    pub growth: f64,
    pub samples: usize,
}

impl Series {
    pub fn push(&mut self, seconds: f64, value: f64) {
        self.0.push((seconds, value));
    }

    pub fn mean(&self) -> f64 {
        if self.0.is_empty() { 0.0 } else { mean(&self.0) }
    }

    /// Looks at what comes after the first `warm_up` of the samples (0 to 1). Nothing for fewer than ten samples.
    pub fn trend(&self, warm_up: f64) -> Option<Trend> {
        let kept = &self.0[(self.0.len() as f64 * warm_up) as usize..];
        if kept.len() < 10 {
            return None;
        }
        let tenth = kept.len() / 10;
        let slope = slope(kept);
        Some(Trend {
            first: mean(&kept[..tenth]),
            last: mean(&kept[kept.len() - tenth..]),
            slope_per_hour: slope * 3600.0,
            growth: slope * (kept[kept.len() - 1].0 - kept[0].0),
            samples: kept.len(),
        })
    }
}

fn mean(samples: &[(f64, f64)]) -> f64 {
    samples.iter().map(|(_, value)| value).sum::<f64>() / samples.len() as f64
}

fn slope(samples: &[(f64, f64)]) -> f64 {
    let middle = samples.iter().map(|(at, _)| at).sum::<f64>() / samples.len() as f64;
    let average = mean(samples);
    let together: f64 = samples.iter().map(|(at, value)| (at - middle) * (value - average)).sum();
    let spread: f64 = samples.iter().map(|(at, _)| (at - middle).powi(2)).sum();
    if spread > 0.0 { together / spread } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_its_slope() {
        let mut series = Series::default();
        (0..100).for_each(|second| series.push(f64::from(second), 5.0 + 2.0 * f64::from(second)));
        let trend = series.trend(0.0).expect("enough samples");
        assert!((trend.slope_per_hour - 7200.0).abs() < 1e-6);
        assert!((trend.growth - 198.0).abs() < 1e-6);
        assert!((trend.last - trend.first - 180.0).abs() < 1e-6);
    }
}
