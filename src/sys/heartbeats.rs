//! Heartbeats: since when each slot's executor has been busy without coming to the end of a turn. Written by the
//! executor with one plain store per turn, read by the supervisor and, where it can be loaded, by the steering program
//! in the kernel.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use super::bpf::{self, SharedWords};

/// One slot's, with two cache lines to itself: adjacent lines are fetched in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line(AtomicU64);

/// Where in a slot's value the steering program counts what it has sent to an executor that sleeps: in bytes, the second word.
pub const SENT_AT: usize = 8;

/// From one slot's heartbeat to the next, in a map too.
const WORDS_PER_SLOT: usize = size_of::<Line>() / 8;

/// The heartbeats of all slots of a server.
#[derive(Debug)]
pub struct Heartbeats {
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    Heap(Box<[Line]>),
    Map(SharedWords),
}

impl Heartbeats {
    /// Of `slots` slots, in ordinary memory.
    pub fn on_heap(slots: u16) -> Arc<Self> {
        Arc::new(Self { memory: Memory::Heap((0..slots).map(|_| Line::default()).collect()) })
    }

    /// Of `slots` slots, in the memory of a BPF map, for the programs that are given its descriptor: an executor's store
    /// is what they read, as the first word of the value with the slot's number.
    ///
    /// # Errors
    /// When the kernel makes no such map, mostly for want of CAP_BPF.
    pub fn in_map(slots: u16) -> io::Result<(Arc<Self>, OwnedFd)> {
        let (map, words) = bpf::shared_words(slots.into(), WORDS_PER_SLOT as u32)?;
        Ok((Arc::new(Self { memory: Memory::Map(words) }), map))
    }

    /// The heartbeat of one slot.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn of(self: &Arc<Self>, slot: u16) -> Heartbeat {
        let slots = match &self.memory {
            Memory::Heap(lines) => lines.len(),
            Memory::Map(words) => words.len() / WORDS_PER_SLOT,
        };
        assert!(usize::from(slot) < slots, "slot {slot} of {slots}");
        Heartbeat { all: Arc::clone(self), slot, owned: Arc::new(AtomicBool::new(true)) }
    }
}

/// One slot's heartbeat: one executor writes, anybody reads.
#[derive(Debug, Clone)]
pub struct Heartbeat {
    all: Arc<Heartbeats>,
    slot: u16,
    /// Until the thread that writes has been given up: it may come back, and would speak for its successor.
    owned: Arc<AtomicBool>,
}

impl Heartbeat {
    /// The same for another thread in the place of this one's, which has been disowned.
    pub fn successor(&self) -> Self {
        Self { all: Arc::clone(&self.all), slot: self.slot, owned: Arc::new(AtomicBool::new(true)) }
    }

    /// What the thread that writes this says from now on does not count.
    pub fn disown(&self) {
        // A beat that is under way comes through, and lasts to the next one of the successor.
        self.owned.store(false, Ordering::SeqCst);
        self.forget_sent();
        self.line().store(0, Ordering::Relaxed);
    }

    fn beat(&self, value: u64) {
        if self.owned.load(Ordering::Relaxed) {
            self.line().store(value, Ordering::Relaxed);
        }
    }

    fn line(&self) -> &AtomicU64 {
        match &self.all.memory {
            Memory::Heap(lines) => &lines[usize::from(self.slot)].0,
            Memory::Map(words) => &words[WORDS_PER_SLOT * usize::from(self.slot)],
        }
    }

    /// A turn begins: the executor is busy since `now`.
    pub fn busy(&self, now: Instant) {
        self.beat(monotonic_nanoseconds(now));
    }

    /// There is nothing to do, or nobody to do it.
    pub fn asleep(&self) {
        // Before, or the program might find the count of the sleep before. What it counts meanwhile may be lost.
        if self.owned.load(Ordering::Relaxed) {
            self.forget_sent();
        }
        self.beat(0);
    }

    /// The program counts anew what it sends to one that sleeps.
    fn forget_sent(&self) {
        if let Memory::Map(words) = &self.all.memory {
            words[WORDS_PER_SLOT * usize::from(self.slot) + SENT_AT / 8].store(0, Ordering::Relaxed);
        }
    }

    /// How long the executor has been busy with one turn; `None` when it sleeps.
    pub fn busy_for(&self, now: Instant) -> Option<Duration> {
        match self.line().load(Ordering::Relaxed) {
            0 => None,
            since => Some(Duration::from_nanos(monotonic_nanoseconds(now).saturating_sub(since))),
        }
    }
}

/// `at` on CLOCK_MONOTONIC, as the kernel's `bpf_ktime_get_ns` tells it; `Instant` is that clock but keeps its figure to
/// itself. Never 0.
fn monotonic_nanoseconds(at: Instant) -> u64 {
    static ORIGIN: LazyLock<(Instant, u64)> = LazyLock::new(|| {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is live, exclusively borrowed memory; the clock exists on every kernel.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
        (Instant::now(), time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    });
    let (origin, nanoseconds) = *ORIGIN;
    match at.checked_duration_since(origin) {
        Some(after) => nanoseconds + after.as_nanos() as u64,
        None => nanoseconds.saturating_sub((origin - at).as_nanos() as u64).max(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tells_how_long_a_turn_takes_and_whether_there_is_one(all: &Arc<Heartbeats>) {
        let (one, other) = (all.of(0), all.of(1));
        let now = Instant::now();
        one.busy(now);
        assert_eq!(one.busy_for(now + Duration::from_millis(30)), Some(Duration::from_millis(30)));
        assert_eq!(other.busy_for(now), None);
        one.asleep();
        assert_eq!(one.busy_for(now), None);
    }

    #[test]
    fn a_thread_that_was_given_up_does_not_speak_for_its_successor() {
        let given_up = Heartbeats::on_heap(1).of(0);
        let now = Instant::now();
        given_up.busy(now);
        given_up.disown();
        let successor = given_up.successor();
        assert_eq!(successor.busy_for(now), None);
        successor.busy(now);
        given_up.asleep();
        assert_eq!(successor.busy_for(now), Some(Duration::ZERO));
    }

    #[test]
    fn a_heartbeat_tells_how_long_a_turn_takes_and_whether_there_is_one() {
        tells_how_long_a_turn_takes_and_whether_there_is_one(&Heartbeats::on_heap(2));
        match Heartbeats::in_map(2) {
            Ok((all, _map)) => tells_how_long_a_turn_takes_and_whether_there_is_one(&all),
            Err(error) => eprintln!("skipped: {error}"),
        }
    }
}
