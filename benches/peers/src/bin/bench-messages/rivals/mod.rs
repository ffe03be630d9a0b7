//! Those that are compared. One more is a file and a row.

mod channels;
mod ringleader;
pub mod socketpair;

use std::error::Error;
use std::future::Future;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::measure::{Sample, Scenario};
use crate::options::Options;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rival {
    Ringleader,
    Tokio,
    Flume,
    /// Callers on an async runtime, their messages sent together where there are several.
    Socketpair,
    /// A message per system call.
    SocketpairPlain,
    /// No callers: a loop that writes and reads batches. What the bytes alone cost.
    SocketpairBare,
}

/// All of them, with what the report says of each.
pub const RIVALS: &[(&str, Rival, &str)] = &[
    ("ringleader", Rival::Ringleader, "Sharded::call between two executors of one Server"),
    ("tokio", Rival::Tokio, "mpsc (4,096; received with recv_many) + oneshot, two current_thread runtimes"),
    ("flume", Rival::Flume, "flume (4,096; recv_async, then drain) + tokio's oneshot, two current_thread runtimes"),
    (
        "socketpair-plain",
        Rival::SocketpairPlain,
        "two processes, SOCK_SEQPACKET, a message per system call, as many in flight",
    ),
    (
        "socketpair",
        Rival::Socketpair,
        "two processes, a stream; tasks on a current_thread runtime, whose calls share writes and reads",
    ),
    (
        "socketpair-bare",
        Rival::SocketpairBare,
        "the same without callers: one loop that writes and reads whole batches; a limit, not a rival",
    ),
];

impl Rival {
    pub fn name(self) -> &'static str {
        RIVALS.iter().find(|(_, rival, _)| *rival == self).map_or("?", |(name, _, _)| name)
    }
}

impl Rival {
    pub fn takes_part(self, scenario: Scenario) -> bool {
        self != Self::SocketpairBare || matches!(scenario, Scenario::Flood { .. })
    }
}

impl FromStr for Rival {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = RIVALS.iter().find(|(name, _, _)| *name == text).map(|(_, rival, _)| *rival);
        found.ok_or_else(|| {
            let names: Vec<_> = RIVALS.iter().map(|(name, _, _)| *name).collect();
            format!("rivals are {}", names.join(", "))
        })
    }
}

/// Takes one sample in this process.
pub fn sample(rival: Rival, scenario: Scenario, options: &Options) -> Result<Sample, Box<dyn Error>> {
    match rival {
        Rival::Ringleader => ringleader::sample(scenario, options),
        Rival::Tokio => channels::sample::<channels::Tokio>(scenario, options),
        Rival::Flume => channels::sample::<channels::Flume>(scenario, options),
        Rival::Socketpair => socketpair::sample_multiplexed(scenario, options),
        Rival::SocketpairPlain => socketpair::sample_plain(scenario, options),
        Rival::SocketpairBare => socketpair::sample_bare(scenario, options),
    }
}

/// Calls one after the other, the first few of which are not counted.
pub async fn round_trips<C, R>(
    scenario: Scenario,
    mut call: impl FnMut(u64) -> C,
    rest: impl Fn(Duration) -> R,
) -> Sample
where
    C: Future<Output = u64>,
    R: Future<Output = ()>,
{
    let gap = match scenario {
        Scenario::Asleep { gap } => gap,
        _ => Duration::ZERO,
    };
    let warm_up = if gap > Duration::from_millis(10) { 1 } else { 50 };
    let mut sample = Sample::default();
    for number in 0..warm_up + scenario.round_trips() {
        if !gap.is_zero() {
            rest(gap).await;
        }
        let began = Instant::now();
        std::hint::black_box(call(number as u64).await);
        if number >= warm_up {
            sample.round_trips_ns.push(began.elapsed().as_nanos() as u64);
            sample.answered += 1;
        }
    }
    sample
}

/// How many calls each caller makes, at least one; the first time to warm up, the second time to be measured.
pub fn calls_each(options: &Options, callers: usize) -> [u64; 2] {
    let each = (options.calls / callers as u64).max(1);
    [each.div_ceil(5), each]
}
