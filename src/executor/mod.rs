//! A slot's life: its pinned thread with glommio's executor on it, and in that one generation after the other.
//!
//! Reading order: [`threads`] (where slots live), [`slot`] (one of them at work), [`generation`] (the main future and
//! its turns), [`core`] (what a generation's parts share), [`tasks`], [`inbox`], [`park`] (sleeping), [`accept`] and [`reserve`]
//! (new connections, and descriptors to refuse them with), [`directory`] and [`states`] (messages between executors, and
//! the state they meet), [`queues`] (futures on glommio's task queues).

pub(crate) mod accept;
pub(crate) mod cells;
pub(crate) mod core;
pub(crate) mod directory;
pub(crate) mod generation;
pub(crate) mod inbox;
pub(crate) mod lookout;
pub(crate) mod overload;
pub(crate) mod park;
#[cfg(feature = "glommio")]
pub(crate) mod queues;
pub(crate) mod reserve;
pub(crate) mod slot;
pub(crate) mod states;
pub(crate) mod tasks;
pub(crate) mod threads;

/// Without the feature `glommio` nothing is on glommio's task queues.
#[cfg(not(feature = "glommio"))]
pub(crate) mod queues {
    pub(crate) fn due() -> usize {
        0
    }

    pub(crate) fn close() {}

    pub(crate) async fn open() {}

    pub(crate) fn abandon() {}

    pub(crate) fn made() -> bool {
        false
    }
}
