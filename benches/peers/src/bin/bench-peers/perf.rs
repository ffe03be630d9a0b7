//! Counts what a server's process costs, with `perf stat`.
//!
//! perf attaches before the load starts, is switched on through its control pipe, and is switched off when the load
//! has ended, so the count covers the load and nothing else.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

const EVENTS: &str = "cycles:u,cycles:k,instructions:u,instructions:k,task-clock";

/// Totals of one run. A counter that the machine does not have is `None`, never zero.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Counters {
    pub cycles_user: Option<f64>,
    pub cycles_kernel: Option<f64>,
    pub instructions_user: Option<f64>,
    pub instructions_kernel: Option<f64>,
    /// CPU time of all of the process's threads.
    pub task_clock_ms: Option<f64>,
    /// Least share of the time that a counter was on the hardware; below 100 the totals are estimates.
    pub counted_percent: Option<f64>,
}

impl Counters {
    /// Cycles and instructions, in user and in kernel mode.
    pub fn has_hardware(&self) -> bool {
        let all = [self.cycles_user, self.cycles_kernel, self.instructions_user, self.instructions_kernel];
        all.iter().all(Option::is_some)
    }
}

/// Whether perf works here, and what it can count.
pub fn probe() -> Result<Counters, String> {
    let output = command().args(["--", "true"]).output();
    let output = output.map_err(|error| format!("start perf: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let counters = parse(&said);
    if output.status.success() && counters.task_clock_ms.is_some() {
        return Ok(counters);
    }
    Err(format!("perf stat does not work here (see kernel.perf_event_paranoid): {}", said.trim()))
}

fn command() -> Command {
    let mut command = Command::new("perf");
    // A locale with a decimal comma would change the numbers.
    command.env("LC_ALL", "C").args(["stat", "-x,", "-e", EVENTS]);
    command
}

/// perf attached to a process and counting.
#[derive(Debug)]
pub struct Session {
    perf: Child,
    control: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Session {
    /// Attaches to all threads of the process, those it starts later included, and starts counting.
    pub fn start(pid: u32) -> Result<Self, String> {
        let mut perf = command()
            .args(["-D", "-1", "--control", "fd:0,1", "-p", &pid.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("start perf: {error}"))?;
        let control = perf.stdin.take().expect("stdin is piped");
        let answers = BufReader::new(perf.stdout.take().expect("stdout is piped"));
        let mut session = Self { perf, control, answers };
        match session.order("enable") {
            Ok(()) => Ok(session),
            Err(problem) => Err(format!("{problem}: {}", session.last_words().0)),
        }
    }

    /// Stops counting and returns the totals.
    pub fn finish(mut self) -> Result<Counters, String> {
        let ordered = self.order("disable");
        let (said, ended) = self.last_words();
        ordered.and(ended).map_err(|problem| format!("{problem}: {}", said.trim()))?;
        let counters = parse(&said);
        match counters.task_clock_ms {
            Some(_) => Ok(counters),
            None => Err(format!("perf counted nothing: {}", said.trim())),
        }
    }

    /// Gives an order and waits until perf has carried it out.
    fn order(&mut self, order: &str) -> Result<(), String> {
        let mut answer = String::new();
        let asked = writeln!(self.control, "{order}").and_then(|()| self.control.flush());
        asked
            .and_then(|()| self.answers.read_line(&mut answer))
            .map_err(|error| format!("order perf to {order}: {error}"))?;
        // perf writes a NUL after the line, which comes in front of the next one.
        if answer.trim_matches(['\0', '\n', ' ']) == "ack" {
            return Ok(());
        }
        Err(format!("perf did not answer the order to {order}"))
    }

    /// Ends perf and returns what it printed.
    fn last_words(self) -> (String, Result<(), String>) {
        // The process is our child and not yet waited for, so the number is still its own.
        let killed = kill_process(Pid::from_child(&self.perf), Signal::INT);
        drop(self.control);
        let said = self.perf.wait_with_output();
        let said = said.map(|output| String::from_utf8_lossy(&output.stderr).into_owned());
        (said.unwrap_or_default(), killed.map_err(|error| format!("interrupt perf: {error}")))
    }
}

/// Reads `perf stat -x,`: `value,unit,event,runtime,percent,...`. Lines of another form are passed over.
/// On machines with two kinds of cores an event comes once per kind; they are added up.
fn parse(text: &str) -> Counters {
    let mut counters = Counters::default();
    for line in text.lines() {
        let fields: Vec<_> = line.split(',').map(str::trim).collect();
        let [value, _unit, event, _runtime, percent, ..] = fields[..] else {
            continue;
        };
        let Ok(value) = value.parse::<f64>() else {
            continue;
        };
        let place = match event_name(event) {
            Some(("cycles", "u")) => &mut counters.cycles_user,
            Some(("cycles", "k")) => &mut counters.cycles_kernel,
            Some(("instructions", "u")) => &mut counters.instructions_user,
            Some(("instructions", "k")) => &mut counters.instructions_kernel,
            Some(("task-clock", _)) => &mut counters.task_clock_ms,
            _ => continue,
        };
        *place.get_or_insert(0.0) += value;
        let percent = percent.parse().unwrap_or(100.0);
        let least = counters.counted_percent.get_or_insert(percent);
        *least = least.min(percent);
    }
    counters
}

/// `cycles:u` and `cpu_core/cycles/u` are both `("cycles", "u")`.
fn event_name(event: &str) -> Option<(&str, &str)> {
    let mut parts = event.split('/');
    match (parts.next()?, parts.next()) {
        (_, Some(name)) => Some((name, parts.next().unwrap_or("").trim_start_matches(':'))),
        (plain, None) => Some(plain.split_once(':').unwrap_or((plain, ""))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read() {
        let text = "Events enabled
Events disabled
2800000,,cycles:u,1000000,100.00,
5200000,,cycles:k,1000000,99.50,
660000,,instructions:u,1000000,100.00,0.24,insn per cycle
1300000,,instructions:k,1000000,100.00,
1234.56,msec,task-clock,1234560000,100.00,0.998,CPUs utilized
";
        let counters = parse(text);
        assert!(counters.has_hardware());
        assert_eq!(counters.cycles_user, Some(2_800_000.0));
        assert_eq!(counters.instructions_kernel, Some(1_300_000.0));
        assert_eq!(counters.task_clock_ms, Some(1234.56));
        assert_eq!(counters.counted_percent, Some(99.5));
    }

    #[test]
    fn what_is_not_counted_is_not_zero() {
        let text = "<not supported>,,cycles:u,0,100.00,,\n<not counted>,,cycles:k,0,0.00,,\n";
        assert_eq!(parse(text), Counters::default());
        assert!(!parse(text).has_hardware());
        assert_eq!(parse("Error:\nNo permission, sorry"), Counters::default());
    }

    #[test]
    fn two_kinds_of_cores_are_added_up() {
        let text = "5,,cpu_core/cycles/u,1,60.00,,\n7,,cpu_atom/cycles/u,1,40.00,,\n";
        let counters = parse(text);
        assert_eq!(counters.cycles_user, Some(12.0));
        assert_eq!(counters.counted_percent, Some(40.0));
    }
}
