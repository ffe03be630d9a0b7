//! What spoils measurements and has nothing to do with the server: other programs that take the CPUs away. They are named at
//! the head of a report, in a line each, for whoever reads figures that nothing explains. That is no verdict: a proof of
//! what must never happen holds on a busy machine, too.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::proc::{self, Task};

/// For this long it is looked who uses a CPU.
const LOOK: Duration = Duration::from_millis(500);
/// Percent of a CPU from which somebody is in the way.
const USES_MIN: f64 = 1.0;
/// Tasks that run or want to, in the mean of the last minute.
const LOAD_MAX: f64 = 1.0;
const BUSIEST: usize = 3;

/// What was found, a line each. Takes half a second, in which the caller does nothing.
pub fn look() -> Vec<String> {
    let (began, before) = (Instant::now(), proc::tasks());
    std::thread::sleep(LOOK);
    let before: HashMap<_, _> = before.into_iter().map(|task| (task.id, task.cpu_ns)).collect();
    let wall = began.elapsed().as_nanos() as f64;
    // Who has come meanwhile has used what it has used.
    let percent = |task: &Task| {
        let earlier = before.get(&task.id).copied().unwrap_or(0);
        task.cpu_ns.saturating_sub(earlier) as f64 / wall * 100.0
    };
    let itself = std::process::id();
    let others = proc::tasks().into_iter().filter(|task| task.process != itself);
    let mut users: Vec<(f64, Task)> = others.map(|task| (percent(&task), task)).collect();
    users.sort_unstable_by(|one, other| other.0.total_cmp(&one.0));
    let mut warnings: Vec<String> = users.iter().filter_map(|(percent, task)| goes_first(*percent, task)).collect();
    warnings.extend(proc::load_average().and_then(|load| is_busy(load, &users)));
    warnings
}

/// Somebody before whom the server gives way.
fn goes_first(percent: f64, task: &Task) -> Option<String> {
    if percent < USES_MIN {
        return None;
    }
    let how = match (task.policy, task.nice) {
        (proc::FIFO | proc::ROUND_ROBIN | proc::DEADLINE, _) => "is a real-time task".to_owned(),
        (proc::NORMAL | proc::BATCH, nice) if nice < 0 => format!("has nice {nice}"),
        _ => return None,
    };
    Some(format!(
        "thread {} ({}) of process {} {how} and uses {percent:.0} % of a CPU",
        task.id, task.name, task.process
    ))
}

fn is_busy(load: f64, users: &[(f64, Task)]) -> Option<String> {
    if load <= LOAD_MAX {
        return None;
    }
    let users = users.iter().filter(|(percent, _)| *percent >= USES_MIN).take(BUSIEST);
    let users: Vec<String> =
        users.map(|(percent, task)| format!("{} of process {} {percent:.0} %", task.name, task.process)).collect();
    let now = if users.is_empty() { "nobody".to_owned() } else { users.join(", ") };
    Some(format!("the load average is {load:.2}, above {LOAD_MAX}; now busy: {now}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(policy: u32, nice: i64) -> Task {
        Task { id: 12, process: 11, name: "hog".to_owned(), policy, nice, cpu_ns: 0 }
    }

    #[test]
    fn who_goes_first_and_uses_a_cpu_is_named() {
        assert!(goes_first(50.0, &task(proc::FIFO, 0)).is_some_and(|line| line.contains("real-time")));
        assert!(goes_first(50.0, &task(proc::NORMAL, -5)).is_some_and(|line| line.contains("nice -5")));
        assert_eq!(goes_first(0.1, &task(proc::FIFO, 0)), None);
        assert_eq!(goes_first(50.0, &task(proc::NORMAL, 0)), None);
        // SCHED_IDLE: whatever its nice value, everybody goes before it.
        assert_eq!(goes_first(50.0, &task(5, -5)), None);
    }

    #[test]
    fn a_busy_machine_is_said_with_those_who_are_busy() {
        let users = [(90.0, task(proc::NORMAL, 0)), (0.2, task(proc::NORMAL, 0))];
        assert_eq!(is_busy(0.9, &users), None);
        let line = is_busy(2.5, &users).expect("2.5 is above 1");
        assert!(line.contains("2.50") && line.ends_with("hog of process 11 90 %"), "{line}");
    }

    #[test]
    fn a_line_of_stat_is_read_whatever_the_name() {
        let line = "12 (a b) c) S 1 12 12 0 -1 4194560 1 0 0 0 3 4 0 0 -2 -5 1 0 9 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 17 1 50 1 0 0 0";
        let read = proc::parse_stat(line).expect("it is whole");
        assert_eq!(read, ("a b) c".to_owned(), 4_194_560, -5, proc::FIFO));
        assert_eq!(proc::parse_stat("12 (a) S"), None);
    }
}
