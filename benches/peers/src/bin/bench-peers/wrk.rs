//! Runs wrk and reads its report.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{self, Command, Stdio};

use crate::options::Options;
use crate::scenario::{Kind, PIPELINED_LUA, Scenario};

/// What one run of wrk without errors reports.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    pub requests: u64,
    pub seconds: f64,
}

/// The Lua script, written where wrk can read it and removed at the end.
#[derive(Debug)]
pub struct Script(PathBuf);

impl Script {
    pub fn write() -> io::Result<Self> {
        let name = format!("bench-peers-{}-pipelined.lua", process::id());
        let path = std::env::temp_dir().join(name);
        fs::write(&path, PIPELINED_LUA)?;
        Ok(Self(path))
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // A small file left in the temporary directory harms nobody.
        let _ = fs::remove_file(&self.0);
    }
}

/// Loads the server for the duration and reads what wrk says.
pub fn run(options: &Options, scenario: Scenario, script: &Script, port: u16) -> Result<Load, String> {
    let mut command = Command::new("taskset");
    command.args(["-c", &options.load_cpu.to_string(), "wrk", "--threads", "1"]);
    command.args(["--connections", &scenario.connections.to_string()]);
    command.args(["--duration", &format!("{}s", options.seconds)]);
    match scenario.kind {
        Kind::KeepAlive => {}
        Kind::Pipelined => {
            command.arg("--script").arg(&script.0);
        }
        Kind::Close => {
            command.args(["--header", "Connection: close"]);
        }
    }
    command.arg(format!("http://127.0.0.1:{port}/"));
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("start wrk: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("wrk ended with {}: {}", output.status, said.trim()));
    }
    parse(&String::from_utf8_lossy(&output.stdout))
}

/// Reads wrk's report; lines that are not known are passed over. Socket errors, answers other than 2xx and
/// 3xx and a run without requests are errors: such a run says nothing about cost.
fn parse(text: &str) -> Result<Load, String> {
    let mut totals = None;
    let mut errors = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with("Socket errors:") || line.starts_with("Non-2xx or 3xx responses:") {
            errors.push(line);
        } else if let Some((requests, rest)) = line.split_once(" requests in ") {
            let duration = rest.split(',').next().unwrap_or(rest);
            totals = requests.trim().parse().ok().zip(seconds(duration));
        }
    }
    let (requests, seconds) =
        totals.ok_or_else(|| format!("wrk's report has no line `N requests in T`, it reads: {}", text.trim()))?;
    match (errors.is_empty(), requests) {
        (false, _) => Err(format!("wrk reports {}", errors.join("; "))),
        (true, 0) => Err("wrk got no answer at all".to_owned()),
        (true, _) => Ok(Load { requests, seconds }),
    }
}

/// A duration in wrk's notation, such as `3.00s` or `1.50m`.
fn seconds(text: &str) -> Option<f64> {
    let text = text.trim();
    let unit = text.find(|letter: char| letter.is_ascii_alphabetic())?;
    let factor = match &text[unit..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    let number: f64 = text[..unit].trim().parse().ok()?;
    (number > 0.0).then_some(number * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "Running 3s test @ http://127.0.0.1:18080/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   650.02us  100.00us   5.00ms   90.00%
    Req/Sec    96.12k     3.02k   99.95k    80.00%
  287401 requests in 3.10s, 35.63MB read
Requests/sec:  92710.00
Transfer/sec:     11.49MB
";

    #[test]
    fn a_clean_report_is_read() {
        let load = parse(REPORT).unwrap();
        assert_eq!(load, Load { requests: 287_401, seconds: 3.1 });
    }

    #[test]
    fn errors_void_the_run() {
        let text = REPORT.replace(
            "Requests/sec:",
            "  Socket errors: connect 0, read 3, write 0, timeout 0\n  Non-2xx or 3xx responses: 5\nRequests/sec:",
        );
        let errors = parse(&text).unwrap_err();
        assert!(errors.contains("read 3") && errors.contains("responses: 5"), "{errors}");
    }

    #[test]
    fn durations_and_nonsense() {
        assert_eq!(seconds("1.50m"), Some(90.0));
        assert_eq!(seconds("250.00ms"), Some(0.25));
        for text in ["", "s", "3", "3 parsecs", "0.00us"] {
            assert_eq!(seconds(text), None, "{text:?}");
        }
        assert!(parse("unable to connect to 127.0.0.1:1").is_err());
        assert!(parse("  0 requests in 3.00s, 0B read").is_err());
        assert!(parse("  x requests in 3.00s, 1MB read").is_err());
    }
}
