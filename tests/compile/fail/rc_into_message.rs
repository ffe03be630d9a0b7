//! A message goes to another thread.
//!
//! says: `Rc<String>` cannot be sent between threads safely
//! says: required by this bound in `Sharded::<T>::call`

use ringleader::{Call, Sharded, SlotId};
use std::cell::RefCell;
use std::rc::Rc;

pub fn program(items: &Sharded<RefCell<Vec<String>>>, to: SlotId) -> Call<()> {
    let item = Rc::new(String::new());
    items.call(to, async move |items| items.borrow_mut().push(item.to_string()))
}

fn main() {}
