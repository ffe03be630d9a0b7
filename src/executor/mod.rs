//! A slot's life: its pinned thread with glommio's executor on it, and in that one generation after the other.
//!
//! Reading order: [`slot`] (the thread), [`generation`] (the main future and its turns), [`core`] (what a generation's
//! parts share), [`tasks`], [`inbox`], [`park`] (sleeping), [`accept`] and [`reserve`]
//! (new connections, and descriptors to refuse them with), [`directory`] and [`states`] (messages between executors, and
//! the state they meet).

pub(crate) mod accept;
pub(crate) mod cells;
pub(crate) mod core;
pub(crate) mod directory;
pub(crate) mod generation;
pub(crate) mod inbox;
pub(crate) mod overload;
pub(crate) mod park;
mod rarely;
pub(crate) mod reserve;
pub(crate) mod slot;
pub(crate) mod states;
pub(crate) mod tasks;
