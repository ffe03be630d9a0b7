//! Medians and the bootstrap. Pure; randomness comes from a seed.

/// The middle value, or the mean of the two middle ones. `None` without values.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    median_in_place(&mut sorted)
}

fn median_in_place(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        length if length % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// The least and the greatest value.
pub fn spread(values: &[f64]) -> Option<(f64, f64)> {
    let least = values.iter().copied().min_by(f64::total_cmp)?;
    let greatest = values.iter().copied().max_by(f64::total_cmp)?;
    Some((least, greatest))
}

/// Resamples of one bootstrap.
pub const RESAMPLES: usize = 10_000;

/// The 95 % percentile-bootstrap interval of the median. `None` without values.
pub fn bootstrap_median(values: &[f64], seed: u64) -> Option<(f64, f64)> {
    if values.is_empty() {
        return None;
    }
    let mut random = SplitMix64(seed);
    let mut drawn = vec![0.0; values.len()];
    let mut medians = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        drawn.fill_with(|| values[random.below(values.len())]);
        medians.push(median_in_place(&mut drawn)?);
    }
    medians.sort_by(f64::total_cmp);
    let tail = RESAMPLES / 40;
    Some((medians[tail], medians[RESAMPLES - 1 - tail]))
}

/// Vigna's SplitMix64: enough for resampling, and a result can be repeated from its seed.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; the bias of the multiplication is below 2⁻⁵⁰ for bounds of this size.
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some((1.0, 3.0)));
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn splitmix64_gives_the_published_numbers() {
        let mut random = SplitMix64(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn the_interval_repeats_and_holds_the_median() {
        let values: Vec<f64> = (0..21).map(|step| 0.9 + 0.01 * f64::from(step)).collect();
        let (low, high) = bootstrap_median(&values, 7).unwrap();
        assert_eq!(bootstrap_median(&values, 7), Some((low, high)));
        let middle = median(&values).unwrap();
        assert!(0.9 <= low && low < middle && middle < high && high <= 1.1, "{low} {high}");
        // The exact order-statistic interval for 21 values is the 6th to the 16th: 0.95 to 1.05.
        assert!((low - 0.95).abs() < 0.015 && (high - 1.05).abs() < 0.015, "{low} {high}");
        assert_eq!(bootstrap_median(&[1.5], 7), Some((1.5, 1.5)));
        assert_eq!(bootstrap_median(&[], 7), None);
    }
}
