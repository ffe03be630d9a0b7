//! What a builder may ask for, looked at before anything is begun: values that can never work, and those that would mean
//! something else than they say. The command refuses the same where its flags are read.

use std::fmt::Debug;
use std::time::Duration;

use super::Builder;
use crate::Error;
use crate::error::Kind;
use crate::supervisor::policy::SAMPLE_PERIOD_MIN;

/// hyper has no smaller buffer.
const HEADER_BYTES_MIN: usize = 8192;
/// hyper begins at the head's first byte again with each piece of it that comes, which is the square of this.
const HEADER_BYTES_MAX: usize = 1024 * 1024;
/// hyper makes a table of 64 bytes a field for each head that it reads, and `http` panics above 24,576.
const HEADERS_MAX: usize = 10_000;
/// As many as Linux lets exist by default.
const BLOCKING_THREADS_MAX: usize = 32_768;
/// A response says it in seconds; no client waits for longer than a day.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(86_400);
/// What an executor that is well may need for a turn: the default of `stall_limit`.
const STOP_GRACE_MIN: Duration = Duration::from_millis(100);
/// What the supervisor may be late by, on a machine with other things to do.
const STANDSTILL_LIMIT_MIN: Duration = Duration::from_millis(10);
/// Of a turn: the watchdog does not look more closely.
const STALL_LIMIT_MIN: Duration = Duration::from_millis(1);

impl Builder {
    /// # Errors
    /// The first setting that cannot be: its name, what was given and what may be.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.check_executors()?;
        self.check_capacities()?;
        self.check_http()?;
        self.check_supervision()?;
        self.check_scaling()
    }

    fn check_executors(&self) -> Result<(), Error> {
        if self.cpus.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::new(Kind::Usage, "no CPUs were given to pin executors to: name one at least"));
        }
        if let Some(super::Executors { min, max }) = self.executors.filter(|asked| asked.min > asked.max) {
            let message = format!("{min} to {max} executors were asked for: give a range upward");
            return Err(Error::new(Kind::Usage, message));
        }
        let from = self.executors.map_or(1, |asked| asked.min);
        holds(from > 0, "`executors`", from, "a server needs 1 at least; a range begins there, too")?;
        // A thread cannot be called so.
        holds(!self.name.contains('\0'), "`name`", &self.name, "a name has no zero byte")
    }

    fn check_capacities(&self) -> Result<(), Error> {
        let at_least_one = "give 1 at least";
        let connections = self.connections_max.unwrap_or(1);
        holds(connections > 0, "`connections_max`", connections, at_least_one)?;
        let descriptors = self.descriptors_per_connection;
        holds(descriptors > 0, "`descriptors_per_connection`", descriptors, at_least_one)?;
        holds(self.backlog > 0, "`backlog`", self.backlog, at_least_one)?;
        let threads = self.blocking_threads_max;
        holds(threads > 0, "`blocking_threads_max`", threads, at_least_one)?;
        let most = "32768 is the most: Linux has no more threads by default";
        holds(threads <= BLOCKING_THREADS_MAX, "`blocking_threads_max`", threads, most)?;
        let in_flight = self.overload.in_flight_max;
        holds(in_flight != Some(0), "`Overload::in_flight_max`", in_flight, "give 1 at least; `None` is no limit")?;
        optional("`Overload::delay_max`", self.overload.delay_max)?;
        let retry_after = self.overload.retry_after;
        holds(retry_after <= RETRY_AFTER_MAX, "`Overload::retry_after`", retry_after, "a day is the most")?;
        let never = "give `None` to never ask";
        holds(self.keepalive != Some(Duration::ZERO), "`keepalive`", self.keepalive, never)?;
        let kernels = "give `None` for the kernel's own";
        holds(self.user_timeout != Some(Duration::ZERO), "`user_timeout`", self.user_timeout, kernels)
    }

    fn check_http(&self) -> Result<(), Error> {
        let limits = &self.http;
        optional("`HttpLimits::header_timeout`", limits.header_timeout)?;
        optional("`HttpLimits::idle_timeout`", limits.idle_timeout)?;
        optional("`HttpLimits::body_timeout`", limits.body_timeout)?;
        optional("`HttpLimits::send_timeout`", limits.send_timeout)?;
        let bytes = limits.header_bytes_max;
        holds(bytes >= HEADER_BYTES_MIN, "`HttpLimits::header_bytes_max`", bytes, "8192 bytes is the least")?;
        let most = "1048576 bytes is the most: a head is read from its beginning with each piece of it that comes";
        holds(bytes <= HEADER_BYTES_MAX, "`HttpLimits::header_bytes_max`", bytes, most)?;
        let fields = "1 is the least: every request of HTTP/1.1 has `Host`";
        holds(limits.headers_max > 0, "`HttpLimits::headers_max`", limits.headers_max, fields)?;
        let most = "10000 is the most: a table of so many fields is made for each head that is read, 64 bytes a field";
        holds(limits.headers_max <= HEADERS_MAX, "`HttpLimits::headers_max`", limits.headers_max, most)
    }

    fn check_supervision(&self) -> Result<(), Error> {
        let policy = &self.policy;
        let some_time = "give it some time";
        holds(!policy.start_timeout.is_zero(), "`start_timeout`", policy.start_timeout, some_time)?;
        let unlimited = "give it some time; `Duration::MAX` is no limit";
        holds(!policy.upgrade_timeout.is_zero(), "`upgrade_timeout`", policy.upgrade_timeout, unlimited)?;
        holds(policy.stall_limit >= STALL_LIMIT_MIN, "`stall_limit`", policy.stall_limit, "1 ms is the least")?;
        holds(self.stale_after >= STALL_LIMIT_MIN, "`stale_after`", self.stale_after, "1 ms is the least")?;
        let hang = policy.hang_timeout;
        holds(hang != Some(Duration::ZERO), "the time of `hang`", hang, "give it some time; `None` is never")?;
        let restart = &policy.restart;
        let window = restart.quarantine_window;
        let quarantines = restart.quarantine_after > 0;
        let never = "give it some time; a `quarantine_after` of 0 is never";
        holds(!(quarantines && window.is_zero()), "`RestartPolicy::quarantine_window`", window, never)?;
        part("`RestartPolicy::jitter`", restart.jitter)?;
        let one = "give 1 at least: each is a thread that nobody can end";
        holds(restart.leaked_max > 0, "`RestartPolicy::leaked_max`", restart.leaked_max, one)?;
        part("`ReadinessPolicy::unfit_max`", policy.readiness.unfit_max)?;
        holds(policy.stop_grace >= STOP_GRACE_MIN, "`stop_grace`", policy.stop_grace, "100 ms is the least")?;
        let least = "10 ms is the least; `Duration::MAX` is never";
        holds(policy.standstill_limit >= STANDSTILL_LIMIT_MIN, "`standstill_limit`", policy.standstill_limit, least)?;
        let within = self.escalation.map_or(Duration::MAX, |escalation| escalation.within);
        holds(!within.is_zero(), "`Escalation::within`", within, "give it some time; `escalation(None)` is never")
    }

    fn check_scaling(&self) -> Result<(), Error> {
        let scaling = &self.policy.scaling;
        let high = scaling.high;
        holds(high > 0.0 && high <= 1.0, "`Scaling::high`", high, "give a part of the time, above 0 and up to 1")?;
        let low = scaling.low;
        holds(low >= 0.0 && low < high, "`Scaling::low`", low, "give a part of the time, from 0 and below `high`")?;
        let period = scaling.period;
        holds(period >= SAMPLE_PERIOD_MIN, "`Scaling::period`", period, "10 ms is the least")?;
        for (setting, count) in [
            ("`Scaling::up_after`", scaling.up_after),
            ("`Scaling::down_after`", scaling.down_after),
            ("`Scaling::emergency_after`", scaling.emergency_after),
            ("`Scaling::emergency_queue`", scaling.emergency_queue),
            ("`Scaling::step_up`", scaling.step_up.into()),
            ("`Scaling::step_down`", scaling.step_down.into()),
            ("`Scaling::emergency_step`", scaling.emergency_step.into()),
        ] {
            holds(count > 0, setting, count, "give 1 at least")?;
        }
        Ok(())
    }
}

/// A limit of time that need not be.
fn optional(setting: &str, given: Option<Duration>) -> Result<(), Error> {
    holds(given != Some(Duration::ZERO), setting, given, "give it some time; `None` is no limit")
}

/// Of a whole.
fn part(setting: &str, given: f32) -> Result<(), Error> {
    holds((0.0..=1.0).contains(&given), setting, given, "give a part, from 0 to 1")
}

fn holds(does: bool, setting: &str, given: impl Debug, allowed: &str) -> Result<(), Error> {
    if does { Ok(()) } else { Err(Error::new(Kind::Usage, format!("{setting} was given as {given:?}: {allowed}"))) }
}
