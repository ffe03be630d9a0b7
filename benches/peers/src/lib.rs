//! What the rivals have in common, so that only their runtimes differ: the command line, the pinned
//! threads, the listener and the handler. And the statistics that the programs which compare share.
//!
//! Nothing of it depends on Ringleader, and nothing here is tuned for one rival: hyper's defaults,
//! glibc's allocator, one `SO_REUSEPORT` listener per executor, `TCP_NODELAY` on every connection.
#![forbid(unsafe_code)]

mod executors;
mod handler;
mod options;
mod socket;
pub mod stats;

pub use executors::{pin_to, run};
pub use handler::{BODY, CONTENT_TYPE, answer, answer_or_spin, router};
pub use options::PeerOptions;
pub use socket::{BACKLOG, listen};
