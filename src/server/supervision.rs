//! What the builder says of failures: restarts, stalls, hangs, panics, overload; of drains, and of the number of executors.

use std::time::Duration;

use super::Builder;
use crate::settings::{Escalation, Overload, PanicPolicy};
use crate::supervisor::policy::{HangPolicy, ReadinessPolicy, RestartPolicy, Scaling};

impl Builder {
    /// When and how often a failed executor is restarted.
    pub fn restart(mut self, restart: RestartPolicy) -> Self {
        self.policy.restart = restart;
        self
    }

    /// When failed and stalled executors make the server unready.
    pub fn readiness(mut self, readiness: ReadinessPolicy) -> Self {
        self.policy.readiness = readiness;
        self
    }

    /// The start-up closure's time, which is some. Default 30 s: an executor is up in milliseconds, the rest is for what the
    /// closure opens and reads, and it is well within the 90 s that systemd grants a service.
    pub fn start_timeout(mut self, limit: Duration) -> Self {
        self.policy.start_timeout = limit;
        self
    }

    /// How long a drain ordered by a signal may take; and that of an executor that is scaled down, and of the old process
    /// after an upgrade. Default 30 s, as gunicorn's `graceful_timeout` and what Kubernetes grants a pod; 0 cuts off what is
    /// in flight.
    pub fn drain_timeout(mut self, limit: Duration) -> Self {
        self.policy.drain_deadline = limit;
        self
    }

    /// How long the executors go on accepting after readiness has turned false at a stop by a signal or an order to
    /// drain: the time that a load balancer needs to notice. Default 0.
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringleader::Server;
    ///
    /// // In Kubernetes: five seconds for the endpoints to be updated, then twenty for what runs.
    /// let builder = Server::builder()
    ///     .stop_on_signals()
    ///     .drain_delay(Duration::from_secs(5))
    ///     .drain_timeout(Duration::from_secs(20));
    /// # let _ = builder;
    /// ```
    pub fn drain_delay(mut self, delay: Duration) -> Self {
        self.policy.drain_delay = delay;
        self
    }

    /// How long an executor that is told to stop at once may take, as at the end of a drain's time, until its thread is left
    /// behind; and blocking closures after a stop that was not a drain, and a successor that was killed. Nothing shortens
    /// it for executors: be above the longest turn there may be, and below what the service manager allows. Default 5 s: an executor drops
    /// its connections in well under a millisecond, so that is for a handler in a computation or a system call. At least
    /// 100 ms.
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringleader::Server;
    ///
    /// // Within systemd's `TimeoutStopSec` of a minute: what runs has 45 s, and what computes then 10 s more.
    /// let builder = Server::builder().drain_timeout(Duration::from_secs(45)).stop_grace(Duration::from_secs(10));
    /// # let _ = builder;
    /// ```
    pub fn stop_grace(mut self, grace: Duration) -> Self {
        self.policy.stop_grace = grace;
        self
    }

    /// How late the supervisor has to be for the whole process to have stood still: stopped by a signal, on a machine that
    /// was paused, or without CPU. What starts, stops, is scaled down, hangs or takes over has its time once more
    /// then, since it could not use it; the drain of the server keeps its deadline.
    /// Default 1 s, ten times that of [`Builder::stall_limit`]; at least 10 ms; `Duration::MAX` is never.
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringleader::Server;
    ///
    /// // On a machine that takes the CPU away for seconds, as some do that are shared: that is no pause yet.
    /// let builder = Server::builder().standstill_limit(Duration::from_secs(10));
    /// # let _ = builder;
    /// ```
    pub fn standstill_limit(mut self, limit: Duration) -> Self {
        self.policy.standstill_limit = limit;
        self
    }

    /// How the number of executors follows the load, when [`Builder::executors`] is given a range.
    pub fn scaling(mut self, scaling: Scaling) -> Self {
        self.policy.scaling = scaling;
        self
    }

    /// How long one turn of an executor may take. Beyond it the executor is stalled: new connections go to others, and
    /// those in its queue are handed to others. Default 100 ms: what a user takes for at once, and far above what a busy
    /// machine keeps a thread waiting. At least 1 ms. An executor that sleeps wakes within a second; one that is later by this
    /// limit has no CPU, and new connections go to others as well.
    pub fn stall_limit(mut self, limit: Duration) -> Self {
        self.policy.stall_limit = limit;
        self
    }

    /// How long a turn may take until new connections pass over its executor, where steering is by eBPF: it reads the
    /// executors' heartbeats itself, and being passed over costs an executor nothing. Default 20 ms: as long as 64 busy
    /// executors on two CPUs may have to wait for each other. At least 1 ms; what is above [`Builder::stall_limit`] is that.
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringleader::Server;
    ///
    /// // Handlers compute for up to 50 ms: that is no reason to pass over their executor.
    /// let builder = Server::builder().stale_after(Duration::from_millis(60));
    /// # let _ = builder;
    /// ```
    pub fn stale_after(mut self, limit: Duration) -> Self {
        self.stale_after = limit;
        self
    }

    /// What becomes of an executor that has been stalled for `after`: a handler that never returns. Default: replaced
    /// after 30 s, as gunicorn's `timeout`. `None` is never, and so is [`HangPolicy::Ignore`].
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringleader::{HangPolicy, Server};
    ///
    /// // Requests that compute for a second are in order here; a minute is not, and then the service manager is to start
    /// // the process afresh.
    /// let builder = Server::builder()
    ///     .stall_limit(Duration::from_secs(2))
    ///     .hang(HangPolicy::Abort, Some(Duration::from_secs(60)));
    /// # let _ = builder;
    /// ```
    pub fn hang(mut self, policy: HangPolicy, after: Option<Duration>) -> Self {
        (self.policy.hang, self.policy.hang_timeout) = (policy, after);
        self
    }

    /// When requests are refused to go on serving others. Off by default.
    pub fn overload(mut self, limits: Overload) -> Self {
        self.overload = limits;
        self
    }

    /// What a panic in a request's handler, its response body or its connection costs. Default: its connection.
    pub fn panics(mut self, policy: PanicPolicy) -> Self {
        self.panics = policy;
        self
    }

    /// How many contained panics restart their executor after all. Default: more than 100 in 10 s; `None` is never.
    ///
    /// A request that panics each time lets whoever sends it restart each executor once in
    /// [`RestartPolicy::quarantine_window`]. `None` where that is worse than an executor whose state is broken.
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringleader::{Escalation, Server};
    ///
    /// let restarts_at_the_fourth = Server::builder().escalation(Escalation::after(3, Duration::from_secs(60)));
    /// let never_restarts = Server::builder().escalation(None);
    /// # let _ = (restarts_at_the_fourth, never_restarts);
    /// ```
    pub fn escalation(mut self, escalation: impl Into<Option<Escalation>>) -> Self {
        self.escalation = escalation.into().map(Escalation::bounded);
        self
    }
}

/// What there is to say of a build that cannot catch panics.
pub(super) fn containment_warning(aborts: bool) -> Option<String> {
    let warning = "built with panic = \"abort\": every panic ends the process, none is contained and no executor restarted; \
                   build with panic = \"unwind\"";
    aborts.then(|| warning.to_owned())
}
