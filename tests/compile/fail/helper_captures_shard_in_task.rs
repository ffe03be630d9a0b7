//! A task outlives what the function that spawned it borrows.
//!
//! says: borrowed data escapes outside of function
//! says: argument requires that

use ringleader::{Shard, Task};
use std::future::Future;
use std::time::Duration;

fn rest(shard: &Shard) -> impl Future<Output = ()> {
    shard.sleep(Duration::ZERO)
}

pub fn program(shard: &Shard) -> Task<()> {
    shard.spawn(rest(shard))
}

fn main() {}
