//! Ringleader from outside: in this process through its public interface, and as the command in processes of its own.
//! One binary, a module for each kind of behaviour.

mod adapters;
#[cfg(all(feature = "axum", feature = "tokio"))]
mod axum_application;
#[cfg(feature = "axum")]
mod axum_router;
mod blocking;
mod command;
mod descriptors;
mod distribution;
mod embedding;
mod examples;
mod files;
mod fullness;
mod gone;
mod http1;
mod idle;
mod leaks;
mod lifecycle;
mod limits;
mod log_sinks;
mod overload;
mod panics;
mod panics_by_place;
mod panics_shown;
mod peers;
mod readiness;
mod scaling;
mod shard;
mod signals;
mod stalls;
mod start;
mod streaming;
mod support;
mod systemd;
#[cfg(feature = "glommio")]
mod task_queues;
mod testing;
#[cfg(feature = "tokio")]
mod tokio_host;
mod tools;
mod upgrade;
