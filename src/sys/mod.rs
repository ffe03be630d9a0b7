//! What the runtime asks of Linux directly: sockets, descriptors, CPUs, limits, clocks and `/proc`.
//!
//! The unsafe code of the crate lives here and in `net::ring`, each block with the reason why it is
//! sound. Nothing here decides anything, keeps state or knows of executors; every function makes one
//! request and reports what the system answered.

pub mod affinity;
pub mod bind;
<<<<<<< HEAD
=======
pub mod bpf;
#[cfg_attr(not(test), expect(dead_code, reason = "for the watchdog and rescue of the supervision to come"))]
>>>>>>> c8c8b3f (Steering by weight and by load; extended BPF where it can be loaded)
pub mod cpu_clock;
pub mod eventfd;
pub mod heartbeats;
pub mod limits;
pub mod membarrier;
pub mod memory;
pub mod poll;
pub mod probe;
pub mod procfs;
pub mod socket;
