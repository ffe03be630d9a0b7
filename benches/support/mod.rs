//! The little that the micro benches share: repeats, a median with its spread, percentiles.

/// Repeats of each measurement; rivals take turns, so that a change of the machine's speed hits all alike.
pub const REPEATS: usize = 9;

/// A named measurement that returns one figure per run.
pub type Rival<'a> = (&'a str, Box<dyn FnMut() -> f64 + 'a>);

/// Runs the rivals in turn and prints median and spread of each, with its ratio to the first.
pub fn compare(title: &str, unit: &str, mut rivals: Vec<Rival<'_>>) {
    println!("\n{title}");
    let mut figures = vec![Vec::new(); rivals.len()];
    for (_, run) in &mut rivals {
        run();
    }
    for _ in 0..REPEATS {
        for ((_, run), figures) in rivals.iter_mut().zip(&mut figures) {
            figures.push(run());
        }
    }
    let mut first = None;
    for ((name, _), figures) in rivals.iter().zip(&mut figures) {
        figures.sort_by(f64::total_cmp);
        let median = figures[REPEATS / 2];
        let first = *first.get_or_insert(median);
        let (low, high, ratio) = (figures[0], figures[REPEATS - 1], median / first);
        println!("  {name:<44} {median:>10.1} {unit:<10} ({low:.1} to {high:.1})  {ratio:.2}x");
    }
}

/// The `share` (0 to 1) percentile.
#[allow(dead_code, reason = "not every bench has a distribution")]
pub fn percentile(figures: &mut [f64], share: f64) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[((figures.len() - 1) as f64 * share) as usize]
}
