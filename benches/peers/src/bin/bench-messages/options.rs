//! The command line.

use std::str::FromStr;

use crate::measure::Scenario;
use crate::rivals::{Rival, socketpair::Serve};

/// Compare calls between executors with channels between runtimes and sockets between processes.
#[derive(Debug, Clone, clap::Parser)]
pub struct Options {
    /// Rounds; in each, every rival takes one sample of every scenario.
    #[arg(long, default_value = "21")]
    pub rounds: usize,
    /// Scenarios, by name; all of them without this.
    #[arg(long)]
    pub scenario: Vec<Scenario>,
    /// Rivals, by name; all of them without this. Ringleader always takes part.
    #[arg(long)]
    pub rival: Vec<Rival>,
    /// Answered calls of one flood.
    #[arg(long, default_value = "400000")]
    pub calls: u64,
    /// CPU of the callers.
    #[arg(long, default_value = "0")]
    pub caller_cpu: usize,
    /// CPU of the one that is called.
    #[arg(long, default_value = "1")]
    pub target_cpu: usize,
    /// Seed of the bootstrap.
    #[arg(long, default_value = "1")]
    pub seed: u64,
    /// Take one sample in this process and print it: RIVAL,SCENARIO.
    #[arg(long, hide = true, value_parser = rival_and_scenario)]
    pub sample: Option<(Rival, Scenario)>,
    /// Be the other process of a socketpair, whose end is standard input.
    #[arg(long, hide = true)]
    pub serve: Option<Serve>,
}

fn rival_and_scenario(text: &str) -> Result<(Rival, Scenario), String> {
    let (rival, scenario) = text.split_once(',').ok_or("RIVAL,SCENARIO is wanted")?;
    Ok((Rival::from_str(rival)?, Scenario::from_str(scenario)?))
}
