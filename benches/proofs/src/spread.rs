//! Fresh connections over the executors: with steering by chance, each of four gets its share.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::timeout;

use crate::client::{self, Client};
use crate::report::Verdicts;
use crate::server::Common;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub common: Common,
    /// Fresh connections
    #[arg(long, default_value_t = 400)]
    connections: usize,
    /// Executors
    #[arg(long, default_value_t = 4)]
    executors: usize,
}

/// Each executor's share of its equal part: 15 to 35 % for four.
const LEAST: f64 = 0.6;
const MOST: f64 = 1.4;

pub async fn run(arguments: &Arguments) -> Result<Verdicts, String> {
    let (executors, cpus) = (arguments.executors.to_string(), arguments.common.cpus_or("0"));
    let server = arguments.common.start(arguments.common.port, &["--executors", &executors, "--cpus", &cpus])?;
    println!("server: {}; {} fresh connections, one GET /whoami each", server.command, arguments.connections);
    let mut counts = BTreeMap::<usize, usize>::new();
    for number in 0..arguments.connections {
        let asked = async {
            let mut client = Client::connect(server.address()).await?;
            let who = client::whoami(&client.get("/whoami").await?)?;
            client.reset();
            Ok::<_, std::io::Error>(who)
        };
        let who =
            timeout(Duration::from_secs(10), asked).await.map_err(|_| format!("connection {number}: no answer"))?;
        *counts.entry(who.map_err(|error| format!("connection {number}: {error}"))?.executor).or_default() += 1;
    }
    let mut verdicts = Verdicts::default();
    for executor in 0..arguments.executors {
        let count = counts.get(&executor).copied().unwrap_or(0);
        let share = count as f64 / arguments.connections.max(1) as f64;
        let equal = 1.0 / arguments.executors.max(1) as f64;
        verdicts.check(
            (equal * LEAST..=equal * MOST).contains(&share),
            &format!("executor {executor} has {:.1} to {:.1} %", equal * LEAST * 100.0, equal * MOST * 100.0),
            format!("{count} connections, {:.1} %", share * 100.0),
        );
    }
    let (status, time) = server.stop()?;
    verdicts.check(status.success(), "the server stops in order", format!("{status} after {time:.2?}"));
    Ok(verdicts)
}
