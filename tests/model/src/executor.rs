//! Ringleader's own files.

#[path = "../../../src/executor/directory.rs"]
pub mod directory;
#[path = "../../../src/executor/inbox.rs"]
pub mod inbox;
#[path = "../../../src/executor/lookout.rs"]
pub mod lookout;

pub mod core {
    //! Jobs get a core; those of the models have nothing but a directory in it.

    use std::cell::Cell;
    use std::sync::Arc;
    use std::task::Waker;

    use super::directory::{Directory, TaskKey};

    pub struct Core {
        pub directory: Arc<Directory>,
    }

    loom::thread_local! {
        static POLLED: Cell<Option<(u64, TaskKey)>> = Cell::new(None);
    }

    impl Core {
        /// What the thread polls from here on is `task`, of the server whose directory has this number.
        pub fn polls(directory: u64, task: TaskKey) {
            POLLED.with(|polled| polled.set(Some((directory, task))));
        }

        pub fn task_of(_: &Waker, directory: u64) -> Option<TaskKey> {
            let polled = POLLED.with(|polled| polled.get())?;
            (polled.0 == directory).then_some(polled.1)
        }
    }
}
