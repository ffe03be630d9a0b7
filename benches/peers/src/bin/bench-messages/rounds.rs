//! The rounds: every rival takes a sample of every scenario in each, in a process of its own.

use std::error::Error;
use std::process::{Command, Stdio};

use crate::measure::{SCENARIOS, Sample, Scenario};
use crate::options::Options;
use crate::report;
use crate::rivals::{RIVALS, Rival};

/// A rival's samples of a scenario, one for each round.
pub struct Series {
    pub rival: Rival,
    pub scenario: Scenario,
    pub samples: Vec<Sample>,
}

pub fn compare(options: &Options) -> Result<(), Box<dyn Error>> {
    let mut series: Vec<Series> = pairs(options)
        .into_iter()
        .map(|(rival, scenario)| Series { rival, scenario, samples: Vec::with_capacity(options.rounds) })
        .collect();
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        for one in &mut series {
            one.samples.push(take(one.rival, one.scenario, options)?);
        }
    }
    print!("{}", report::report(&series, options));
    Ok(())
}

/// Who takes part in what. Rivals alternate within a scenario, so that what is compared was measured close together.
fn pairs(options: &Options) -> Vec<(Rival, Scenario)> {
    let mut pairs = Vec::new();
    for (_, scenario) in SCENARIOS {
        if !options.scenario.is_empty() && !options.scenario.contains(scenario) {
            continue;
        }
        for (_, rival, _) in RIVALS {
            let wanted = options.rival.is_empty() || options.rival.contains(rival) || *rival == Rival::Ringleader;
            if wanted && rival.takes_part(*scenario) {
                pairs.push((*rival, *scenario));
            }
        }
    }
    pairs
}

fn take(rival: Rival, scenario: Scenario, options: &Options) -> Result<Sample, Box<dyn Error>> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--sample", &format!("{},{}", rival.name(), scenario.name())])
        .args(["--calls", &options.calls.to_string()])
        .args(["--caller-cpu", &options.caller_cpu.to_string()])
        .args(["--target-cpu", &options.target_cpu.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    let output = command.output()?;
    if !output.status.success() {
        return Err(format!("{} in {}: {}", rival.name(), scenario.name(), output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}
