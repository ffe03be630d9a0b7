//! A thread-per-core, shared-nothing server runtime for Linux.
#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod body;
mod error;
mod executor;
mod files;
mod handle;
mod net;
mod order;
mod protocol;
mod server;
mod service;
mod settings;
mod shard;
mod steering;
mod supervisor;
mod sys;
mod time;

pub use body::{Body, BodyError, Connection};
pub use error::Error;
pub use files::{FileBody, Files, FilesError, Job, Offload, Overloaded};
pub use handle::{ExecutorStats, Exit, Handle, Running, Stats, Stop};
pub use http::{Method, StatusCode};
pub use order::Order;
pub use server::{Builder, Executors, Listen, RestartPolicy, Server, Steering};
pub use service::{Reject, Service, ServiceFn, service_fn};
pub use settings::HttpLimits;
pub use shard::{Shard, SlotId, Task, TaskError};
pub use time::{Elapsed, Sleep, Timeout};

/// An error of a user's.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A request; its head is [`http::Request`]'s.
pub type Request<B = Body> = http::Request<B>;
/// A response; its head is [`http::Response`]'s.
pub type Response<B = Body> = http::Response<B>;

/// Raises this process's limits on open files and locked memory as far as it may, for a program that is a server and
/// nothing else. The library never does so by itself.
pub fn raise_limits() {
    if let Err(error) = sys::limits::raise_nofile() {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
    if let Err(error) = sys::limits::raise_memlock() {
        tracing::debug!(%error, "the limit on locked memory stays as it is");
    }
}

/// Reads a list of CPUs as the kernel writes it: `0-3,8`.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn parse_cpu_list(text: &str) -> Result<Vec<usize>, String> {
    sys::affinity::parse_cpu_list(text)
}
