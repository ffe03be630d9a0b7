//! How many glommio file operations this thread has in flight.
//!
//! The ring driver of an executor naps in its own ring, where it cannot see completions of
//! glommio's; it must not do so while this module's count is above zero. A plain thread-local
//! counter: an executor is one thread, and nobody else may look.

use std::cell::Cell;
use std::marker::PhantomData;

thread_local! {
    static OUTSTANDING: Cell<usize> = const { Cell::new(0) };
}

/// Glommio file operations begun on this thread and neither finished nor dropped.
pub(crate) fn outstanding() -> usize {
    OUTSTANDING.get()
}

/// Counts one operation for as long as it lives. Not `Send`: it must be given back where it was
/// taken.
#[must_use = "the operation is counted only while this lives"]
pub(crate) struct Pending {
    on_this_thread: PhantomData<*const ()>,
}

impl Pending {
    pub(crate) fn enter() -> Pending {
        OUTSTANDING.set(OUTSTANDING.get() + 1);
        Pending { on_this_thread: PhantomData }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let before = OUTSTANDING.get();
        debug_assert!(before > 0, "a Pending is dropped once, on the thread that made it");
        OUTSTANDING.set(before.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_lives_on_this_thread() {
        let first = Pending::enter();
        let second = Pending::enter();
        assert_eq!(outstanding(), 2);
        assert_eq!(std::thread::spawn(outstanding).join().expect("no panic"), 0);
        drop(first);
        assert_eq!(outstanding(), 1);
        drop(second);
        assert_eq!(outstanding(), 0);
    }
}
