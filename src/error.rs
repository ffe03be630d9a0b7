//! Why a server did not start, or ended in error.

use std::fmt;
use std::sync::Arc;

/// What was attempted, what the system answered and what can be done, in one message. Cheap to clone.
///
/// ```
/// use std::process::ExitCode;
/// use ringleader::Error;
///
/// fn report(error: &Error) -> ExitCode {
///     eprintln!("{error}"); // what was attempted, what the system said, what to do
///     match () {
///         () if error.is_usage() => ExitCode::from(2),
///         // It was told to stop while it started, and did.
///         () if error.is_stopped() => ExitCode::SUCCESS,
///         // Another process has the port, or may have it in a moment.
///         () if error.is_listen() => ExitCode::from(75),
///         // No io_uring, not enough locked memory; a start-up closure that failed; executors that kept failing.
///         () if error.is_system() || error.is_start() || error.is_quarantined() => ExitCode::FAILURE,
///         () => ExitCode::FAILURE,
///     }
/// }
/// ```
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    kind: Kind,
    message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The server was asked for something that cannot be.
    Usage,
    /// An address could not be listened on.
    Listen,
    /// The system lacks something: io_uring, memory, descriptors.
    System,
    /// An executor did not start.
    Start,
    /// The server was told to stop before it had started.
    Stopped,
    /// Every slot has been quarantined.
    Quarantined,
    /// An order to a running server was not followed.
    Refused,
    /// The supervisor has panicked.
    Defect,
}

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner { kind, message: message.into() }))
    }

    /// The server was configured with something that cannot be; no system was asked.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        self.0.kind == Kind::Usage
    }

    /// An address could not be listened on.
    #[must_use]
    pub fn is_listen(&self) -> bool {
        self.0.kind == Kind::Listen
    }

    /// The system lacks something the runtime needs.
    #[must_use]
    pub fn is_system(&self) -> bool {
        self.0.kind == Kind::System
    }

    /// An executor's first generation did not start: its start-up closure failed, panicked or took too long.
    #[must_use]
    pub fn is_start(&self) -> bool {
        self.0.kind == Kind::Start
    }

    /// The server was told to stop, by a signal, before it had started; it has stopped.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.kind == Kind::Stopped
    }

    /// An order to a server was not followed, for the reason the message gives: it goes on as before, or it had ended
    /// already.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.0.kind == Kind::Refused
    }

    /// Executors kept failing until none was left.
    #[must_use]
    pub fn is_quarantined(&self) -> bool {
        self.0.kind == Kind::Quarantined
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}: {}", self.0.kind, self.0.message)
    }
}

impl std::error::Error for Error {}
