//! Ringleader's inbox, directory and one-shot answers, the files themselves, compiled against stand-ins that loom runs
//! through every interleaving and every value that a load may see. The tests are in `tests/`.
//!
//! Substituted: what `sync.rs` and `sys.rs` say. Not covered: the ring and glommio, which wait for the eventfd; the turn of a
//! generation, of which [`receiver`] keeps the order of its steps.

// The files of ringleader would bring their own tests, which want the rest of it.
#![cfg(not(test))]
// What only parts of ringleader use that are not here.
#![allow(dead_code)]

mod executor;
pub mod models;
mod panics;
pub mod peers;
mod receiver;
// Public for the defects; the queues have what crossbeam's have that the inbox asks for.
#[allow(clippy::len_without_is_empty, clippy::new_without_default)]
pub mod sync;
mod sys;
