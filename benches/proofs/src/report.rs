//! What a proof prints: progress now and then, and one verdict per criterion.

use std::time::{Duration, Instant};

const PROGRESS_EVERY: Duration = Duration::from_secs(30);

/// Prints at most once every 30 s.
pub struct Progress {
    began: Instant,
    last: Instant,
}

impl Progress {
    pub fn new() -> Self {
        let now = Instant::now();
        Self { began: now, last: now }
    }

    pub fn say(&mut self, text: impl FnOnce() -> String) {
        if self.last.elapsed() >= PROGRESS_EVERY {
            self.last = Instant::now();
            println!("  {:>5.0} s: {}", self.began.elapsed().as_secs_f64(), text());
        }
    }
}

/// The criteria of one proof.
#[derive(Default)]
pub struct Verdicts {
    lines: Vec<String>,
    missed: usize,
}

impl Verdicts {
    /// Notes whether a criterion is met, and the figures that say so.
    pub fn check(&mut self, met: bool, criterion: &str, figures: impl Into<String>) {
        self.missed += usize::from(!met);
        self.lines.push(format!("{} {criterion}: {}", if met { "met   " } else { "MISSED" }, figures.into()));
    }

    /// Notes that a criterion could not be looked at, and why.
    pub fn skip(&mut self, criterion: &str, reason: &str) {
        self.lines.push(format!("SKIPPED {criterion}: {reason}"));
    }

    /// Prints all; whether none was missed.
    pub fn conclude(self) -> bool {
        println!("verdicts:");
        self.lines.iter().for_each(|line| println!("  {line}"));
        self.missed == 0
    }
}

/// Counts what went wrong, and keeps the first few descriptions.
#[derive(Default)]
pub struct Faults {
    count: u64,
    first: Vec<String>,
}

const FAULTS_SHOWN: usize = 8;

impl Faults {
    pub fn note(&mut self, text: impl FnOnce() -> String) {
        self.count += 1;
        if self.first.len() < FAULTS_SHOWN {
            self.first.push(text());
        }
    }

    pub fn add(&mut self, other: Self) {
        self.count += other.count;
        let room = FAULTS_SHOWN - self.first.len();
        self.first.extend(other.first.into_iter().take(room));
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// The figure for a verdict; prints the descriptions first.
    pub fn show(&self, what: &str) -> String {
        self.first.iter().for_each(|text| println!("  {what}: {text}"));
        format!("{} {what}", self.count)
    }
}

/// Bytes, for people.
pub fn bytes(count: f64) -> String {
    match count.abs() {
        size if size >= 1048576.0 => format!("{:.1} MiB", count / 1048576.0),
        size if size >= 1024.0 => format!("{:.1} KiB", count / 1024.0),
        _ => format!("{count:.0} B"),
    }
}
