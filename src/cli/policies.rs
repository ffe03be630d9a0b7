//! The flags of what the supervisor decides by. Each is named as the library's setting, whose documentation has the origin of
//! its default.

use std::time::Duration;

use clap::Args;
use ringleader::{Builder, Escalation, PanicPolicy, ReadinessPolicy, RestartPolicy, Scaling};

use super::Failure;

#[derive(Args)]
#[command(next_help_heading = "Restarts, readiness and scaling")]
pub(crate) struct Policies {
    /// Failures within --quarantine-window after which an executor is not restarted any more; 0 is never
    #[arg(long, value_name = "N", default_value_t = 5)]
    quarantine_after: u32,

    /// Seconds within which those count
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = parse_time)]
    quarantine_window: Duration,

    /// Milliseconds before the second restart in a row; doubles up to --restart-delay-max
    #[arg(long, value_name = "MS", default_value_t = 100)]
    restart_delay: u64,

    /// Seconds before any restart at the most
    #[arg(long, value_name = "SECONDS", default_value = "15", value_parser = parse_time)]
    restart_delay_max: Duration,

    /// The part of such a delay that is left to chance, 0 to 1; it only shortens
    #[arg(long, value_name = "PART", default_value_t = 0.2, value_parser = parse_part)]
    restart_jitter: f32,

    /// Seconds after which a healthy executor's failures are forgotten
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = parse_time)]
    healthy_after: Duration,

    /// Threads of hung executors left behind in one slot, with which it gets no other
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    leaked_max: u16,

    /// What a panic in a request's handler costs
    #[arg(long, value_enum, default_value = "contain")]
    on_panic: OnPanic,

    /// With `--on-panic contain`: panics within --escalate-window, more than which restart their executor, 10000 at most; 0
    /// is never
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(..=10_000))]
    escalate_after: u32,

    /// Seconds within which those count
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = parse_time)]
    escalate_window: Duration,

    /// Seconds an executor may take to start
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = parse_time)]
    start_timeout: Duration,

    /// Seconds an executor that is told to stop at once may take, until its thread is left behind
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = parse_time)]
    stop_grace: Duration,

    /// Seconds by which the supervisor has to be late for the whole process to have stood still, which grants all their time
    /// once more
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_time)]
    standstill_limit: Duration,

    /// The part of the executors, 0 to 1, that may be quarantined or stalled while the server is ready
    #[arg(long, value_name = "PART", default_value_t = 0.5, value_parser = parse_part)]
    unfit_max: f32,

    /// Seconds of one turn after which a stalled executor counts for that
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_time)]
    stalled_after: Duration,

    /// With a range of executors: seconds between two samples of the load
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_time)]
    scale_period: Duration,

    /// The mean utilisation above which one more is wanted, up to 1
    #[arg(long, value_name = "PART", default_value_t = 0.7, value_parser = parse_part)]
    scale_high: f32,

    /// The mean utilisation that the rest may have without one, below --scale-high
    #[arg(long, value_name = "PART", default_value_t = 0.5, value_parser = parse_part)]
    scale_low: f32,

    /// Samples in a row that want one more, until it is added
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = at_least_one())]
    scale_up_after: u32,

    /// Samples in a row that can do without one, until it is taken away
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = at_least_one())]
    scale_down_after: u32,

    /// Added to --scale-down-after each time that one had to be added again soon
    #[arg(long, value_name = "N", default_value_t = 6)]
    scale_reversal_penalty: u32,

    /// Connections waiting to be accepted that are an emergency
    #[arg(long, value_name = "N", default_value_t = 33, value_parser = at_least_one())]
    scale_emergency_queue: u32,

    /// Samples in a row with an emergency, until executors are added
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = at_least_one())]
    scale_emergency_after: u32,

    /// How many are added in an emergency
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    scale_emergency_step: u16,

    /// How many are added at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    scale_step_up: u16,

    /// How many are taken away at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    scale_step_down: u16,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum OnPanic {
    /// Its connection
    Contain,
    /// Its executor's connections: the executor starts anew
    Restart,
}

impl Policies {
    /// # Errors
    /// Two that do not go together.
    pub(crate) fn apply(&self, builder: Builder) -> Result<Builder, Failure> {
        let panics = match self.on_panic {
            OnPanic::Contain => PanicPolicy::Contain,
            OnPanic::Restart => PanicPolicy::Restart,
        };
        let escalation =
            (self.escalate_after > 0).then(|| Escalation::after(self.escalate_after, self.escalate_window));
        let mut readiness = ReadinessPolicy::default();
        readiness.unfit_max = self.unfit_max;
        readiness.stalled_after = self.stalled_after;
        Ok(builder
            .restart(self.restart()?)
            .panics(panics)
            .escalation(escalation)
            .start_timeout(self.start_timeout)
            .stop_grace(self.stop_grace)
            .standstill_limit(self.standstill_limit)
            .readiness(readiness)
            .scaling(self.scaling()))
    }

    fn restart(&self) -> Result<RestartPolicy, Failure> {
        let (first, longest) = (Duration::from_millis(self.restart_delay), self.restart_delay_max);
        if first > longest {
            return Err(Failure::Usage(format!(
                "--restart-delay {first:?} is more than --restart-delay-max {longest:?}"
            )));
        }
        let mut restart = RestartPolicy::default();
        restart.backoff_base = first;
        restart.backoff_max = longest;
        restart.jitter = self.restart_jitter;
        restart.healthy_after = self.healthy_after;
        restart.quarantine_after = self.quarantine_after;
        restart.quarantine_window = self.quarantine_window;
        restart.leaked_max = self.leaked_max;
        Ok(restart)
    }

    fn scaling(&self) -> Scaling {
        let mut scaling = Scaling::default();
        scaling.period = self.scale_period;
        scaling.high = self.scale_high;
        scaling.low = self.scale_low;
        scaling.up_after = self.scale_up_after;
        scaling.down_after = self.scale_down_after;
        scaling.reversal_penalty = self.scale_reversal_penalty;
        scaling.emergency_queue = self.scale_emergency_queue;
        scaling.emergency_after = self.scale_emergency_after;
        scaling.emergency_step = self.scale_emergency_step;
        scaling.step_up = self.scale_step_up;
        scaling.step_down = self.scale_step_down;
        scaling
    }
}

fn at_least_one() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..)
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "give a number of seconds".to_owned())?;
    let fits = (0.0..=1e9).contains(&seconds);
    if fits { Ok(Duration::from_secs_f64(seconds)) } else { Err("give 0 to 1000000000 seconds".to_owned()) }
}

fn parse_part(text: &str) -> Result<f32, String> {
    let part: f32 = text.parse().map_err(|_| "give a number from 0 to 1".to_owned())?;
    if (0.0..=1.0).contains(&part) { Ok(part) } else { Err("give a part, from 0 to 1".to_owned()) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        policies: Policies,
    }

    /// What a builder makes of these flags.
    fn built(flags: &[&str]) -> String {
        let policies = Alone::parse_from([&["serve"], flags].concat()).policies;
        match policies.apply(ringleader::Server::builder()) {
            Ok(builder) => format!("{builder:#?}"),
            Err(_) => panic!("they go together: {flags:?}"),
        }
    }

    /// Two places have them: the help names them, and embedders get them.
    #[test]
    fn the_flags_defaults_are_the_librarys() {
        assert_eq!(built(&[]), format!("{:#?}", ringleader::Server::builder()));
    }

    #[test]
    fn each_flag_changes_its_setting_and_no_other() {
        for (flag, value, line) in [
            ("--restart-delay", "7", "backoff_base: 7ms"),
            ("--restart-delay-max", "7", "backoff_max: 7s"),
            ("--restart-jitter", "0.7", "jitter: 0.7"),
            ("--healthy-after", "7", "healthy_after: 7s"),
            ("--quarantine-after", "7", "quarantine_after: 7"),
            ("--quarantine-window", "7", "quarantine_window: 7s"),
            ("--leaked-max", "7", "leaked_max: 7"),
            ("--on-panic", "restart", "panics: Restart"),
            ("--escalate-after", "7", "panics_max: 7"),
            ("--escalate-window", "7", "within: 7s"),
            ("--start-timeout", "7", "start_timeout: 7s"),
            ("--stop-grace", "7", "stop_grace: 7s"),
            ("--standstill-limit", "7", "standstill_limit: 7s"),
            ("--unfit-max", "0.7", "unfit_max: 0.7"),
            ("--stalled-after", "7", "stalled_after: 7s"),
            ("--scale-period", "7", "period: 7s"),
            ("--scale-high", "0.9", "high: 0.9"),
            ("--scale-low", "0.1", "low: 0.1"),
            ("--scale-up-after", "7", "up_after: 7"),
            ("--scale-down-after", "7", "down_after: 7"),
            ("--scale-reversal-penalty", "7", "reversal_penalty: 7"),
            ("--scale-emergency-queue", "7", "emergency_queue: 7"),
            ("--scale-emergency-after", "7", "emergency_after: 7"),
            ("--scale-emergency-step", "7", "emergency_step: 7"),
            ("--scale-step-up", "7", "step_up: 7"),
            ("--scale-step-down", "7", "step_down: 7"),
        ] {
            let (before, after) = (built(&[]), built(&[flag, value]));
            let changed: Vec<&str> =
                before.lines().zip(after.lines()).filter(|(old, new)| old != new).map(|(_, new)| new.trim()).collect();
            assert_eq!(changed, [format!("{line},")], "{flag}");
        }
    }
}
