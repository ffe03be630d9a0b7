//! Backtraces of panics: taken where it panicked, given their names where nothing waits.
//!
//! The standard library has one lock for taking and for naming, and names take seconds in a large program: a second
//! executor that panicked meanwhile would stand still with all its connections. So names are looked up on threads of their
//! own, never on an executor's, and who panics meanwhile goes without a backtrace. Embedders' own hooks and errors that
//! take backtraces (`anyhow`) know nothing of this, and may wait.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::sync::{PoisonError, RwLock, TryLockError};

/// Read while one is taken, which takes microseconds; written while names are looked up.
static NAMING: RwLock<()> = RwLock::new(());

/// A panic's backtrace, or why there is none. To be shown by a thread that may wait.
#[derive(Debug)]
pub(crate) struct Trace(Option<Backtrace>);

impl Trace {
    /// If `RUST_BACKTRACE` asks for one. Does not wait.
    pub(super) fn capture() -> Option<Self> {
        let taken = match NAMING.try_read() {
            Ok(_nobody_names) => Backtrace::capture(),
            Err(TryLockError::Poisoned(poisoned)) => {
                let _nobody_names = poisoned.into_inner();
                Backtrace::capture()
            }
            // Names are looked up only where backtraces are asked for.
            Err(TryLockError::WouldBlock) => return Some(Self(None)),
        };
        (taken.status() == BacktraceStatus::Captured).then_some(Self(Some(taken)))
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(backtrace) => {
                let _naming = NAMING.write().unwrap_or_else(PoisonError::into_inner);
                backtrace.fmt(formatter)
            }
            None => {
                formatter.write_str("not taken: names for another one were looked up, and it would have had to wait")
            }
        }
    }
}

/// Puts it into the log from a thread of its own.
pub(crate) fn log_apart(trace: std::sync::Arc<Trace>) {
    let write = move || tracing::error!("its backtrace:\n{trace}");
    if let Err(error) = std::thread::Builder::new().name("backtrace".to_owned()).spawn(write) {
        tracing::warn!(%error, "no thread to make a backtrace in");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_panics_while_names_are_looked_up_goes_without_and_does_not_wait() {
        let naming = NAMING.write().expect("nothing panics under it");
        let trace =
            crate::panics::tests::with_hook(|| crate::panics::tests::caught_from(|| panic!("meanwhile")).backtrace);
        drop(naming);
        let trace = trace.expect("it is said that there is none").to_string();
        assert!(trace.starts_with("not taken"), "{trace}");
    }

    #[test]
    fn names_are_looked_up_apart_from_those_that_are_taken() {
        let trace = Trace(Some(Backtrace::force_capture()));
        assert!(trace.to_string().contains("names_are_looked_up"), "{trace}");
    }
}
