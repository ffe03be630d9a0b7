//! Messages to state that is not `Send`, by closures of either kind.

use ringleader::{Call, Sharded, SlotId};
use std::cell::Cell;
use std::rc::Rc;

pub struct State(Cell<u8>);

pub fn asynchronous(states: &Sharded<State>, to: SlotId) -> Call<u8> {
    states.call(to, async |state| state.0.get())
}

pub fn plain(states: &Sharded<State>, to: SlotId) -> Call<u8> {
    states.call(to, move |state: Rc<State>| async move { state.0.get() })
}
