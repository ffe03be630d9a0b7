//! Ringleader's own files.

#[path = "../../../src/executor/directory.rs"]
pub mod directory;
#[path = "../../../src/executor/inbox.rs"]
pub mod inbox;
#[path = "../../../src/executor/lookout.rs"]
pub mod lookout;

pub mod core {
    //! Jobs get a core; those of the models do nothing with it.

    pub struct Core;
}
