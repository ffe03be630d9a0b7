//! A hierarchical timer wheel: four levels of 64 slots over ticks of one millisecond.
//!
//! Coarse on purpose: inserting and cancelling are a few stores, a deadline is never early and at most one tick late
//! plus whatever the executor's turn takes. Time is an argument; the wheel asks no clock.

use std::time::{Duration, Instant};

use slab::Slab;

/// Resolution of all timers of an executor.
pub(crate) const TICK: Duration = Duration::from_millis(1);
const LEVELS: usize = 4;
const SLOT_BITS: u32 = 6;
const SLOTS: usize = 1 << SLOT_BITS;
/// 64^4 ticks: 4.6 hours. What lies further off is filed at the horizon and filed again when it gets there.
const HORIZON_TICKS: u64 = 1 << (SLOT_BITS * LEVELS as u32);
const NONE: u32 = u32::MAX;

/// Names a pending timer. A key that has fired or was cancelled names nothing, and is not reused for another timer
/// while its owner can still present it (the `stamp`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TimerKey {
    index: u32,
    stamp: u32,
}

struct Entry<T> {
    item: T,
    deadline: u64,
    stamp: u32,
    place: u16,
    previous: u32,
    next: u32,
}

/// Timers that carry an item of `T` each (a waker, in the executor).
pub(crate) struct Wheel<T> {
    start: Instant,
    /// All ticks up to and including this one have been fired.
    now: u64,
    entries: Slab<Entry<T>>,
    heads: [u32; LEVELS * SLOTS],
    /// One bit per slot that has entries.
    occupied: [u64; LEVELS],
    stamp: u32,
}

impl<T> Wheel<T> {
    pub(crate) fn new(start: Instant) -> Self {
        Self { start, now: 0, entries: Slab::new(), heads: [NONE; LEVELS * SLOTS], occupied: [0; LEVELS], stamp: 0 }
    }

    /// Files `item` for `deadline`, rounded up to the next tick; a deadline in the past fires at the next tick.
    pub(crate) fn insert(&mut self, deadline: Instant, item: T) -> TimerKey {
        let tick = self.tick_after(deadline).max(self.now + 1);
        self.stamp = self.stamp.wrapping_add(1);
        let entry = Entry { item, deadline: tick, stamp: self.stamp, place: 0, previous: NONE, next: NONE };
        let index = self.entries.insert(entry) as u32;
        self.link(index);
        TimerKey { index, stamp: self.stamp }
    }

    /// Takes a timer back; `None` when it has fired or was taken before.
    pub(crate) fn cancel(&mut self, key: TimerKey) -> Option<T> {
        self.get_mut(key)?;
        self.unlink(key.index);
        Some(self.entries.remove(key.index as usize).item)
    }

    /// The item of a pending timer.
    pub(crate) fn get_mut(&mut self, key: TimerKey) -> Option<&mut T> {
        let entry = self.entries.get_mut(key.index as usize)?;
        (entry.stamp == key.stamp).then_some(&mut entry.item)
    }

    /// Number of pending timers.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Fires everything that is due at `now`.
    pub(crate) fn advance(&mut self, now: Instant, mut fire: impl FnMut(T)) {
        let target = self.tick_before(now);
        while self.now < target {
            // Leap over ticks in which nothing can happen.
            let next = self.next_tick().map_or(target, |tick| tick.min(target));
            self.now = next.max(self.now + 1);
            self.cascade();
            let slot = (self.now as usize) & (SLOTS - 1);
            while self.heads[slot] != NONE {
                let index = self.heads[slot];
                self.unlink(index);
                fire(self.entries.remove(index as usize).item);
            }
        }
    }

    /// When `advance` should be called next, never later than the first deadline. Far timers may ask for a call in
    /// between, to be filed more finely.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.next_tick().map(|tick| self.start + Duration::from_millis(tick))
    }

    fn tick_after(&self, deadline: Instant) -> u64 {
        let since = deadline.saturating_duration_since(self.start);
        since.as_nanos().div_ceil(TICK.as_nanos()) as u64
    }

    fn tick_before(&self, now: Instant) -> u64 {
        // In the tick's own unit: a division of nanoseconds is one of 128 bits, in every turn.
        (now.saturating_duration_since(self.start).as_millis() / TICK.as_millis()) as u64
    }

    /// The first tick at which a slot comes up, on any level.
    fn next_tick(&self) -> Option<u64> {
        (0..LEVELS).filter_map(|level| self.next_tick_of(level)).min()
    }

    fn next_tick_of(&self, level: usize) -> Option<u64> {
        let occupied = self.occupied[level];
        if occupied == 0 {
            return None;
        }
        let shift = SLOT_BITS * level as u32;
        let position = self.now >> shift;
        // The slot of the current position itself was emptied when it came up: look from the next one, once around.
        let rotated = occupied.rotate_right(((position + 1) & (SLOTS as u64 - 1)) as u32);
        Some((position + 1 + u64::from(rotated.trailing_zeros())) << shift)
    }

    /// Files the entries of coarser slots that have come up into finer ones.
    fn cascade(&mut self) {
        for level in (1..LEVELS).rev() {
            let shift = SLOT_BITS * level as u32;
            if self.now & ((1 << shift) - 1) != 0 {
                continue;
            }
            let place = level * SLOTS + ((self.now >> shift) as usize & (SLOTS - 1));
            let mut index = std::mem::replace(&mut self.heads[place], NONE);
            self.occupied[level] &= !(1 << (place % SLOTS));
            while index != NONE {
                let next = self.entries[index as usize].next;
                self.link(index);
                index = next;
            }
        }
    }

    fn place_of(&self, deadline: u64) -> usize {
        let distance = deadline.saturating_sub(self.now);
        if distance >= HORIZON_TICKS {
            let horizon = self.now + HORIZON_TICKS - (1 << (SLOT_BITS * 3));
            return 3 * SLOTS + ((horizon >> (SLOT_BITS * 3)) as usize & (SLOTS - 1));
        }
        // The level is that of the highest digit in which the deadline differs from now.
        let differing = (deadline ^ self.now) | 1;
        let level = ((63 - differing.leading_zeros()) / SLOT_BITS) as usize;
        let level = level.min(LEVELS - 1);
        level * SLOTS + ((deadline >> (SLOT_BITS * level as u32)) as usize & (SLOTS - 1))
    }

    fn link(&mut self, index: u32) {
        let place = self.place_of(self.entries[index as usize].deadline);
        let head = self.heads[place];
        let entry = &mut self.entries[index as usize];
        (entry.place, entry.previous, entry.next) = (place as u16, NONE, head);
        if head != NONE {
            self.entries[head as usize].previous = index;
        }
        self.heads[place] = index;
        self.occupied[place / SLOTS] |= 1 << (place % SLOTS);
    }

    fn unlink(&mut self, index: u32) {
        let Entry { place, previous, next, .. } = self.entries[index as usize];
        let place = usize::from(place);
        if previous == NONE {
            self.heads[place] = next;
            if next == NONE {
                self.occupied[place / SLOTS] &= !(1 << (place % SLOTS));
            }
        } else {
            self.entries[previous as usize].next = next;
        }
        if next != NONE {
            self.entries[next as usize].previous = previous;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn fired(wheel: &mut Wheel<u32>, now: Instant) -> Vec<u32> {
        let mut out = Vec::new();
        wheel.advance(now, |item| out.push(item));
        out
    }

    #[test]
    fn a_timer_is_never_early_and_at_most_one_tick_late() {
        let start = Instant::now();
        let mut wheel = Wheel::new(start);
        wheel.insert(start + Duration::from_micros(1500), 1);
        assert!(fired(&mut wheel, start + Duration::from_micros(1999)).is_empty());
        assert_eq!(fired(&mut wheel, start + Duration::from_micros(2000)), [1]);
    }

    #[test]
    fn a_cancelled_timer_does_not_fire_and_its_key_names_nothing_after() {
        let start = Instant::now();
        let mut wheel = Wheel::new(start);
        let key = wheel.insert(start + TICK * 5, 1);
        assert_eq!(wheel.cancel(key), Some(1));
        let other = wheel.insert(start + TICK * 5, 2);
        assert_eq!(wheel.cancel(key), None);
        assert_eq!(fired(&mut wheel, start + TICK * 9), [2]);
        assert_eq!(wheel.cancel(other), None);
    }

    /// Random inserts, cancels and leaps in time against a sorted map.
    #[test]
    fn agrees_with_a_sorted_map() {
        let seed = std::env::var("RINGLEADER_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand_seed);
        println!("RINGLEADER_SEED={seed}");
        let mut random = seed;
        let mut next = move |bound: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % bound
        };
        let start = Instant::now();
        let (mut wheel, mut model, mut keys) = (Wheel::new(start), BTreeMap::new(), BTreeMap::new());
        let mut now = 0u64;
        for id in 0..200_000u32 {
            let span = [10, 100, 5_000, 300_000, 40_000_000][next(5) as usize];
            let deadline = now + 1 + next(span);
            keys.insert(id, (deadline, wheel.insert(start + Duration::from_millis(deadline), id)));
            model.insert((deadline, id), ());
            if next(3) == 0 {
                let victim = next(u64::from(id) + 1) as u32;
                if let Some((deadline, key)) = keys.remove(&victim) {
                    assert_eq!(wheel.cancel(key), Some(victim), "seed {seed}");
                    model.remove(&(deadline, victim));
                }
            }
            if next(4) == 0 {
                let leap = [2, 50, 3_000, 2_000_000][next(4) as usize];
                now += next(leap);
                let mut expected: Vec<u32> = model.range(..=(now, u32::MAX)).map(|((_, id), ())| *id).collect();
                model = model.split_off(&(now + 1, 0));
                if let Some(at) = wheel.next_deadline() {
                    let first = model.keys().next().map(|(deadline, _)| start + Duration::from_millis(*deadline));
                    let pending = expected.is_empty() && first.is_some_and(|first| at > first);
                    assert!(!pending, "next_deadline is later than the first deadline, seed {seed}");
                }
                let mut got = fired(&mut wheel, start + Duration::from_millis(now));
                for id in &got {
                    keys.remove(id);
                }
                got.sort_unstable();
                expected.sort_unstable();
                assert_eq!(got, expected, "seed {seed} at {now}");
            }
        }
        assert_eq!(wheel.len(), model.len());
    }

    fn rand_seed() -> u64 {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos() as u64 | 1
    }
}
