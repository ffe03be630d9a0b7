//! Clocks that `std` does not show as numbers.

use std::time::Duration;

/// `CLOCK_MONOTONIC`, which service managers compare with their own.
pub fn monotonic() -> Duration {
    read(libc::CLOCK_MONOTONIC)
}

/// The same as of the kernel's last tick, 1 to 10 ms ago (`CONFIG_HZ`). Reading it costs no system call whatever the clock
/// source is, and no look at the source.
pub fn monotonic_coarse() -> Duration {
    read(libc::CLOCK_MONOTONIC_COARSE)
}

fn read(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is live, exclusively borrowed memory of the right type. Both clocks exist on every Linux.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}
