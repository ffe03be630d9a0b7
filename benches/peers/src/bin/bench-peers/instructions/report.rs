//! The counts as text. Pure: everything returns a string.

use std::fmt::Write;

use super::clock::NS_PER_INSTRUCTION;
use crate::report::thousands;
use ringleader_peers::stats::spread;

/// What one server cost under one load, per request.
#[derive(Debug, Clone)]
pub struct Row {
    pub server: String,
    pub baseline: String,
    /// Its date blanked.
    pub answer: String,
    /// User, kernel and total, at full speed.
    pub cpu_us: [f64; 3],
    pub cost: Cost,
}

/// Instructions, and what else the counting brought up, per request.
#[derive(Debug, Clone)]
pub struct Cost {
    pub user: f64,
    /// `None` when stepped.
    pub kernel: Option<f64>,
    /// Each round's.
    pub rounds: Vec<f64>,
    /// System calls by name.
    pub calls: Vec<(String, f64)>,
    /// Instructions by function, the most first.
    pub functions: Vec<(String, f64)>,
}

impl Cost {
    fn total(&self) -> f64 {
        self.user + self.kernel.unwrap_or(0.0)
    }
}

/// What is said before anything is counted.
pub fn preamble(machine: &str, stepped: bool, rounds: u16) -> String {
    let how = if stepped {
        format!(
            "counted: USER instructions only, one by one (ptrace), of the server's busiest thread; the kernel's are NOT in the
  figure, since this machine gives perf no counters. Repetitions of a string instruction count once, as counters do.
  System calls are those made in the counted time. The stepped thread is a thousand times slower than usual, so
  - by its next look at its sockets every client has asked again: all turns are full, as under a load that it can
    just not keep up with. With few connections a real server finds fewer at a time;
  - its clock goes {NS_PER_INSTRUCTION} ns per instruction, so that what is done by the clock is not done more often per request;
  - its other threads stand still."
        )
    } else {
        "counted: perf stat, user and kernel, on all threads of the server, in 200 ms of load a round.".to_owned()
    };
    format!(
        "Instructions of a request. Lower is better.
machine: {machine}
{how}
held equal: as in the comparison by load; the responses are the same bytes from all, or this ends with an error.
rounds: {rounds}, of as many requests as there are connections; the figure is the mean, beside it the least and greatest round.
CPU time: of all threads, at full speed, before the counting; a figure to rank by on a quiet machine.
"
    )
}

/// All servers under one load.
pub fn table(connections: u32, rows: &[Row], functions: usize) -> String {
    let mut text = format!("\n== {connections} connections\n");
    text.push_str("  per request        instructions    min to max       ratio                CPU µs: user kernel total   system calls\n");
    for row in rows {
        let Row { server, cost, cpu_us: [user, kernel, total], .. } = row;
        let (least, most) = spread(&cost.rounds).unwrap_or_default();
        let range = format!("{} to {}", thousands(least), thousands(most));
        let calls: Vec<_> = cost.calls.iter().map(|(name, count)| format!("{name} {count:.3}")).collect();
        let count = thousands(cost.total());
        let (ratio, calls) = (ratio(row, rows), calls.join(", "));
        line(
            &mut text,
            format_args!(
                "  {server:<18} {count:>12}    {range:<16} {ratio:<26} {user:>6.2} {kernel:>6.2} {total:>5.2}   {calls}"
            ),
        );
        if let Some(kernel) = cost.kernel {
            let (user, kernel) = (thousands(cost.user), thousands(kernel));
            line(&mut text, format_args!("  {:<18} of these {user} in user mode, {kernel} in the kernel", ""));
        }
    }
    for row in rows.iter().filter(|row| functions > 0 && !row.cost.functions.is_empty()) {
        line(
            &mut text,
            format_args!(
                "\n  {}: user instructions per request by function (inlined ones are in their callers)",
                row.server
            ),
        );
        for (name, count) in row.cost.functions.iter().take(functions) {
            line(&mut text, format_args!("  {count:>8.1}  {name}"));
        }
    }
    text
}

fn ratio(row: &Row, rows: &[Row]) -> String {
    let baseline = rows.iter().find(|other| other.server == row.baseline && other.server != row.server);
    baseline
        .map_or_else(String::new, |other| format!("{:.3} to {}", row.cost.total() / other.cost.total(), other.server))
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    writeln!(text, "{arguments}").expect("writing to a string does not fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(server: &str, user: f64) -> Row {
        let cost = Cost {
            user,
            kernel: None,
            rounds: vec![user - 1.0, user + 1.0],
            calls: vec![("sendto".to_owned(), 1.0)],
            functions: vec![("f".to_owned(), 9.0)],
        };
        let (server, baseline) = (server.to_owned(), "tokio".to_owned());
        Row { server, baseline, answer: String::new(), cpu_us: [1.0, 2.0, 3.0], cost }
    }

    #[test]
    fn ratios_are_to_the_baseline() {
        let text = table(64, &[row("tokio", 5000.0), row("ringleader", 4000.0)], 1);
        assert!(text.contains("4,000    3,999 to 4,001   0.800 to tokio"), "{text}");
        assert!(text.contains("sendto 1.000") && text.contains("9.0  f"), "{text}");
    }

    #[test]
    fn what_is_not_counted_is_said() {
        assert!(preamble("", true, 15).contains("kernel's are NOT"));
        assert!(!preamble("", false, 15).contains("NOT"));
    }
}
