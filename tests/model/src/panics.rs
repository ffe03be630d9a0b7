//! What ringleader knows of a panic, as far as the inbox asks.

use std::any::Any;
use std::fmt;

pub struct Panic {
    pub place: Option<String>,
}

/// Nothing panics in a model but a model that fails, and loom itself.
pub fn caught(payload: Box<dyn Any + Send>) -> Panic {
    std::panic::resume_unwind(payload)
}

impl fmt::Display for Panic {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("unreachable")
    }
}
