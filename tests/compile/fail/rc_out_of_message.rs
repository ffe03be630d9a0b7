//! So does its answer.
//!
//! says: `Rc<String>` cannot be sent between threads safely
//! says: required by this bound in `Sharded::<T>::call`

use ringleader::{Call, Sharded, SlotId};
use std::rc::Rc;

pub struct State(Rc<String>);

pub fn program(states: &Sharded<State>, to: SlotId) -> Call<Rc<String>> {
    states.call(to, async move |state| state.0.clone())
}

fn main() {}
