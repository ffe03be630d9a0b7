//! What the runtime asks of Linux directly: sockets, descriptors, CPUs, limits, clocks and `/proc`.
//!
//! The unsafe code of the crate lives here and in `net::ring`, each block with the reason why it is
//! sound. Nothing here decides anything, keeps state or knows of executors; every function makes one request and reports
//! what the system answered. But for signal handlers, which belong to the process (`signals`, `stack_sample`).

pub mod affinity;
pub mod bind;
pub mod bpf;
pub mod child;
pub mod clock;
pub mod cpu_clock;
pub mod descriptors;
pub mod eventfd;
pub mod heartbeats;
pub mod limits;
pub mod membarrier;
pub mod memory;
pub mod poll;
pub mod probe;
pub mod procfs;
pub mod signals;
pub mod socket;
pub mod stack_sample;
pub mod thread;
pub mod timerfd;
