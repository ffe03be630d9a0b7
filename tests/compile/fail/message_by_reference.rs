//! A call's message gets an `Rc`, since it may hold the state while it waits; only `send`, which cannot wait, gets a
//! reference.
//!
//! says: type mismatch in closure arguments
//! says: Rc<State>

use ringleader::{Call, Sharded, SlotId};
use std::cell::Cell;

pub struct State(Cell<u8>);

pub fn program(states: &Sharded<State>, to: SlotId) -> Call<u8> {
    states.call(to, move |state: &State| async move { state.0.get() })
}

fn main() {}
