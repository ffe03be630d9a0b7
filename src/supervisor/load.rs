//! How busy the executors are: utilisation and the depth of their listen queues, from one look to the next.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use crate::executor::slot::SlotSeat;
use crate::sys::socket;

/// What an executor had done at the last look.
struct Look {
    at: Instant,
    busy_nanoseconds: u64,
}

/// One series of looks at every slot.
#[derive(Default)]
pub(super) struct Sampler {
    last: HashMap<u16, Look>,
}

impl Sampler {
    /// Busy time over wall time since the last look at this slot, 0 to 1; 0 at the first.
    ///
    /// A turn that goes on counts up to now, so that a stalled executor is at 1 and not at 0.
    pub(super) fn utilisation(&mut self, seat: &SlotSeat, now: Instant) -> f32 {
        let turn = seat.heartbeat.busy_for(now).unwrap_or_default();
        let busy_nanoseconds = seat.cells.busy.get() + turn.as_nanos() as u64;
        let before = self.last.insert(seat.slot, Look { at: now, busy_nanoseconds });
        let Some(before) = before else { return 0.0 };
        let wall = now.saturating_duration_since(before.at).as_nanos() as f32;
        // Two counters are read one after the other: a turn may end between.
        let busy = busy_nanoseconds.saturating_sub(before.busy_nanoseconds) as f32;
        if wall > 0.0 { (busy / wall).min(1.0) } else { 0.0 }
    }
}

/// Connections that wait in the slot's listen queues, and the most of a queue that is allowed.
pub(super) fn queue(seat: &Arc<SlotSeat>) -> u32 {
    let listeners = seat.listeners();
    let depths = listeners.iter().flat_map(|listeners| listeners.iter());
    depths.filter_map(|listener| socket::queue_depth(listener.fd.as_fd()).ok()).map(|(waiting, _)| waiting).sum()
}
