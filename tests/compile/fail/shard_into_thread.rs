//! A shard stays on its executor.
//!
//! says: cannot be sent between threads safely
//! says: required by this bound in `Shard::spawn_blocking`

use ringleader::{Blocking, Shard, SlotId};

pub fn program(shard: &Shard) -> Blocking<SlotId> {
    let other = shard.clone();
    shard.spawn_blocking(move || other.id())
}

fn main() {}
