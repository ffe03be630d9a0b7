//! What lies between an executor and its sockets: the ring and what drives it, streams, timers.

pub(crate) mod driver;
pub(crate) mod registry;
pub(crate) mod ring;
pub(crate) mod stream;
pub(crate) mod wheel;
