//! One run: a fresh server, checked, loaded and counted.

use serde::Serialize;

use crate::check::check;
use crate::options::{Options, Server};
use crate::perf::{Counters, Session};
use crate::process::{CpuTime, CpuUse, Disturbance, Process, wait_until_free};
use crate::scenario::Scenario;
use crate::wrk::{self, Load, Script};

/// A valid run.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    pub scenario: &'static str,
    pub server: String,
    /// Counted from zero; samples of one round are a pair.
    pub round: u32,
    pub requests: u64,
    pub seconds: f64,
    pub counters: Counters,
    pub cpu: CpuUse,
    pub disturbance: Option<Disturbance>,
    /// The answer, date blanked.
    pub answer: String,
}

/// What is compared between servers, per request. Lower is better in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    Cycles,
    Instructions,
    CpuTime,
}

impl Metric {
    pub const ALL: [Self; 3] = [Self::Cycles, Self::Instructions, Self::CpuTime];

    pub fn name(self) -> &'static str {
        match self {
            Self::Cycles => "cycles",
            Self::Instructions => "instructions",
            Self::CpuTime => "CPU time, µs",
        }
    }

    /// User, kernel and total per request; `None` if the machine cannot count it.
    pub fn of(self, sample: &Sample) -> Option<[f64; 3]> {
        let counters = &sample.counters;
        let (user, kernel, total) = match self {
            Self::Cycles => {
                let (user, kernel) = (counters.cycles_user?, counters.cycles_kernel?);
                (user, kernel, user + kernel)
            }
            Self::Instructions => {
                let (user, kernel) = (counters.instructions_user?, counters.instructions_kernel?);
                (user, kernel, user + kernel)
            }
            Self::CpuTime => {
                let CpuUse { user_s, kernel_s, total_s } = sample.cpu;
                (user_s * 1e6, kernel_s * 1e6, total_s * 1e6)
            }
        };
        Some([user, kernel, total].map(|value| value / sample.requests as f64))
    }
}

/// Why there is no sample.
#[derive(Debug)]
pub enum Problem {
    /// This run says nothing; the next may.
    Void(String),
    /// It makes no sense to go on.
    Fatal(String),
}

/// What the runs of one scenario share.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    pub options: &'a Options,
    pub scenario: Scenario,
    pub script: &'a Script,
    /// The directory of this program, for `{bin}`.
    pub bin: &'a str,
}

impl Run<'_> {
    /// One run of one server.
    pub fn measure(&self, server: &Server, round: u32, port: u16) -> Result<Sample, Problem> {
        let Self { options, scenario, script, bin } = *self;
        wait_until_free(port).map_err(Problem::Fatal)?;
        let arguments = server.arguments(options.server_cpu, bin, port);
        // A server that does not start at all is a typing error; one that fails later is a finding.
        let not_started = if round == 0 { Problem::Fatal } else { Problem::Void };
        let mut process = Process::start(&arguments, options.server_cpu, port).map_err(not_started)?;
        let answer = check(port).map_err(Problem::Void)?;

        let others_before = CpuTime::read(options.server_cpu);
        let cpu_before = process.cpu_use().map_err(Problem::Void)?;
        let session = Session::start(process.id()).map_err(Problem::Void)?;
        let load = wrk::run(options, scenario, script, port);
        let counters = session.finish();
        process.check_alive().map_err(Problem::Void)?;
        let cpu = process.cpu_use().map_err(Problem::Void)?.since(cpu_before);
        let others = CpuTime::read(options.server_cpu).zip(others_before);

        let Load { requests, seconds } = load.map_err(Problem::Void)?;
        Ok(Sample {
            scenario: scenario.name,
            server: server.name.clone(),
            round,
            requests,
            seconds,
            counters: counters.map_err(Problem::Void)?,
            cpu,
            disturbance: others.and_then(|(now, old)| now.disturbance_since(old, cpu.total_s)),
            answer,
        })
    }
}
