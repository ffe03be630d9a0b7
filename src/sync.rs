//! What threads meet in, under one name: the files that import it from here are also compiled against stand-ins that try
//! every interleaving (`tests/model`). Nothing else is to be here.

pub(crate) use std::sync::atomic::{AtomicUsize, Ordering, fence};
pub(crate) use std::sync::{Mutex, MutexGuard, RwLock};

pub(crate) use crossbeam_queue::{ArrayQueue, SegQueue};
