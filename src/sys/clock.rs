//! Clocks that `std` does not show as numbers.

use std::time::Duration;

/// `CLOCK_MONOTONIC`, which service managers compare with their own.
pub fn monotonic() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is live, exclusively borrowed memory of the right type. The clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}
