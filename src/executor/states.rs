//! What an executor has built for itself before its start-up closure ran: one value for each registered component,
//! reached by the component's key.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use crate::panics::{Panic, caught};

/// Of one generation.
#[derive(Default)]
pub(crate) struct States {
    /// In order of building; a handful.
    rows: RefCell<Vec<(u64, Rc<dyn Any>)>>,
    complete: Cell<bool>,
}

impl States {
    pub(crate) fn add(&self, key: u64, state: Rc<dyn Any>) {
        self.rows.borrow_mut().push((key, state));
    }

    /// Everything has been built.
    pub(crate) fn complete(&self) {
        self.complete.set(true);
    }

    /// Whether messages may meet it.
    pub(crate) fn are_complete(&self) -> bool {
        self.complete.get()
    }

    /// `None` before it has been built, and for a component of another server.
    pub(crate) fn get(&self, key: u64) -> Option<Rc<dyn Any>> {
        self.rows.borrow().iter().find(|(of, _)| *of == key).map(|(_, state)| Rc::clone(state))
    }

    /// Lets go of everything, the last that was built first. Calls `panicked` for each panic.
    pub(crate) fn clear(&self, mut panicked: impl FnMut(Panic)) {
        self.complete.set(false);
        while let Some(state) = self.take_last() {
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(state))) {
                panicked(caught(payload));
            }
        }
    }

    /// On its own: a drop may look for what is left.
    fn take_last(&self) -> Option<Rc<dyn Any>> {
        self.rows.borrow_mut().pop().map(|(_, state)| state)
    }
}
