//! The timer wheel against a sorted map: what a connection does per request is insert and cancel.
//!
//! Held equal: the same deadlines, 10,000 timers pending, the same item, one thread.

mod support;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use ringleader::internals::Wheel;
use support::compare;

const PENDING: u32 = 10_000;
const OPERATIONS: u32 = 200_000;

/// Spread over 10 to 75 seconds, as header and keep-alive timeouts are.
fn delay(index: u32) -> Duration {
    Duration::from_millis(10_000 + u64::from(index.wrapping_mul(2_654_435_761)) % 65_000)
}

fn per_operation(start: Instant, count: u32) -> f64 {
    start.elapsed().as_nanos() as f64 / f64::from(count)
}

fn wheel_churn() -> f64 {
    let origin = Instant::now();
    let mut wheel = Wheel::new(origin);
    let mut keys: Vec<_> = (0..PENDING).map(|index| wheel.insert(origin + delay(index), index)).collect();
    let start = Instant::now();
    for index in 0..OPERATIONS {
        let place = (index % PENDING) as usize;
        black_box(wheel.cancel(keys[place]));
        keys[place] = wheel.insert(origin + delay(index), index);
    }
    per_operation(start, OPERATIONS)
}

fn map_churn() -> f64 {
    let origin = Instant::now();
    let mut map = BTreeMap::new();
    let mut keys: Vec<_> = (0..PENDING).map(|index| (origin + delay(index), index)).collect();
    map.extend(keys.iter().map(|key| (*key, key.1)));
    let start = Instant::now();
    for index in 0..OPERATIONS {
        let place = (index % PENDING) as usize;
        black_box(map.remove(&keys[place]));
        keys[place] = (origin + delay(index), index);
        map.insert(keys[place], index);
    }
    per_operation(start, OPERATIONS)
}

fn wheel_advance() -> f64 {
    let origin = Instant::now();
    let mut wheel = Wheel::new(origin);
    for index in 0..PENDING {
        wheel.insert(origin + delay(index), index);
    }
    let (start, mut fired) = (Instant::now(), 0);
    for millisecond in 0..80_000 {
        wheel.advance(origin + Duration::from_millis(millisecond), |_| fired += 1);
    }
    assert_eq!(fired, PENDING);
    per_operation(start, 80_000)
}

fn map_advance() -> f64 {
    let origin = Instant::now();
    let mut map: BTreeMap<_, _> = (0..PENDING).map(|index| ((origin + delay(index), index), index)).collect();
    let (start, mut fired) = (Instant::now(), 0);
    for millisecond in 0..80_000 {
        let now = origin + Duration::from_millis(millisecond);
        while map.first_key_value().is_some_and(|((deadline, _), _)| *deadline <= now) {
            black_box(map.pop_first());
            fired += 1;
        }
    }
    assert_eq!(fired, PENDING);
    per_operation(start, 80_000)
}

fn main() {
    println!("{PENDING} timers pending, 10 to 75 s away; one thread; wheel of 1 ms against BTreeMap");
    let churn: Vec<support::Rival<'_>> =
        vec![("wheel", Box::new(wheel_churn)), ("BTreeMap<(Instant, u32), u32>", Box::new(map_churn))];
    compare("cancel and insert again", "ns/pair", churn);
    let advance: Vec<support::Rival<'_>> =
        vec![("wheel", Box::new(wheel_advance)), ("BTreeMap<(Instant, u32), u32>", Box::new(map_advance))];
    compare("advance by 1 ms, 10,000 firing over 80,000 steps", "ns/step", advance);
}
