//! What is measured, and the clocks.

use std::error::Error;
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A load on the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// So many callers, each of which calls again when it has its answer.
    Flood { callers: usize },
    /// One caller; both ends have other work, and never sleep.
    Busy,
    /// One caller, which rests for so long before each call: both ends are asleep then.
    Asleep { gap: Duration },
}

/// All of them, in the order of the report.
pub const SCENARIOS: &[(&str, Scenario)] = &[
    ("flood-64", Scenario::Flood { callers: 64 }),
    ("flood-256", Scenario::Flood { callers: 256 }),
    ("busy", Scenario::Busy),
    ("asleep-1ms", Scenario::Asleep { gap: Duration::from_millis(1) }),
    // Ringleader goes to its deeper sleep after 100 ms.
    ("parked-250ms", Scenario::Asleep { gap: Duration::from_millis(250) }),
];

impl Scenario {
    pub fn name(self) -> &'static str {
        SCENARIOS.iter().find(|(_, scenario)| *scenario == self).map_or("?", |(name, _)| name)
    }

    /// Calls of one sample, made one after the other.
    pub fn round_trips(self) -> usize {
        match self {
            Self::Flood { .. } => 0,
            Self::Busy => 2000,
            Self::Asleep { gap } if gap < Duration::from_millis(10) => 400,
            Self::Asleep { .. } => 8,
        }
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = SCENARIOS.iter().find(|(name, _)| *name == text).map(|(_, scenario)| *scenario);
        found.ok_or_else(|| {
            let names: Vec<_> = SCENARIOS.iter().map(|(name, _)| *name).collect();
            format!("scenarios are {}", names.join(", "))
        })
    }
}

/// What one process measured of one scenario.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Calls answered.
    pub answered: u64,
    /// CPU time, user and kernel, of all threads and processes that take part.
    pub cpu_ns: u64,
    pub wall_ns: u64,
    /// Of each call, when they are made one after the other.
    pub round_trips_ns: Vec<u64>,
}

impl Sample {
    /// # Errors
    /// When standard output is gone.
    pub fn print(&self) -> Result<(), Box<dyn Error>> {
        serde_json::to_writer(std::io::stdout(), self)?;
        Ok(())
    }
}

/// CPU time of this process so far, user and kernel, with that of threads that have ended.
pub fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// From the beginning of a flood to its end.
pub struct Flood {
    wall: Instant,
    cpu: Duration,
}

impl Flood {
    pub fn begin() -> Self {
        Self { wall: Instant::now(), cpu: cpu_time() }
    }

    pub fn end(self, answered: u64) -> Sample {
        let (wall, cpu) = (self.wall.elapsed(), cpu_time() - self.cpu);
        Sample { answered, cpu_ns: cpu.as_nanos() as u64, wall_ns: wall.as_nanos() as u64, round_trips_ns: Vec::new() }
    }
}

/// What the busy ends do between two looks for messages, or two yields: about two microseconds.
pub fn other_work() {
    let mut mixed = 1_u64;
    for _ in 0..1000 {
        mixed = std::hint::black_box(mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (mixed >> 29));
    }
}

/// Tasks that do this on each busy end.
pub const BUSY_TASKS: usize = 4;

/// The work that a call asks for: small, with a result that depends on the message and on what the target holds.
pub fn answer(state: &mut u64, value: u64) -> u64 {
    *state = state.wrapping_add(value);
    *state ^ value
}
