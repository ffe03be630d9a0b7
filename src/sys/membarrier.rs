//! Registering the process for expedited memory barriers before it has threads.

/// Registers this process for `MEMBARRIER_CMD_PRIVATE_EXPEDITED`. Call it before threads start;
/// later it is correct, but slow.
///
/// glommio sleeps with such a barrier and registers for it in its first sleep. With several threads
/// alive the kernel then waits for a grace period, which takes 30 to 80 ms on kernels from 6.6. With
/// one thread it is immediate. A refusal is no error: glommio has a way without.
pub fn register() {
    // SAFETY: takes no memory.
    let result =
        unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0_u32, 0_i32) };
    if result < 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "membarrier is not available; executors sleep the slower way");
    }
}

/// From linux/membarrier.h; libc has it for Android only.
const MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

#[cfg(test)]
mod tests {
    #[test]
    fn may_be_repeated() {
        super::register();
        super::register();
    }
}
