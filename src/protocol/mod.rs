//! What is spoken on a connection.

pub(crate) mod answer;
pub(crate) mod http1;
mod outgoing;
