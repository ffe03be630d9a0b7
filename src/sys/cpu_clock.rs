//! How much CPU time a thread has used: what tells a stalled thread from a starved one.

use std::io;
use std::time::Duration;

/// CPU time the calling thread has used since it started.
#[cfg(test)]
pub fn thread_cpu_time() -> Duration {
    // The kernel has had this clock since 2.6.12 and it takes no argument that could be wrong.
    read(libc::CLOCK_THREAD_CPUTIME_ID).unwrap_or_default()
}

/// The CPU clock of one thread, readable from any thread of the process.
#[derive(Clone, Copy, Debug)]
pub struct ThreadClock {
    clock: libc::clockid_t,
}

impl ThreadClock {
    /// The clock of the calling thread.
    pub fn current() -> io::Result<Self> {
        let mut clock = 0;
        // SAFETY: the calling thread is alive, and `clock` is live, exclusively borrowed memory.
        let errno = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) };
        if errno != 0 {
            return Err(io::Error::from_raw_os_error(errno));
        }
        Ok(Self { clock })
    }

    /// CPU time that thread has used since it started. `InvalidInput` once it has ended.
    ///
    /// The clock names the thread by its kernel id. Should a later thread of this process get the
    /// same id, its time is read, so let go of the clock when the thread is joined.
    pub fn read(&self) -> io::Result<Duration> {
        read(self.clock)
    }
}

fn read(clock: libc::clockid_t) -> io::Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is live, exclusively borrowed memory; a wrong clock is answered with EINVAL.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // The kernel normalises: seconds are not negative, nanoseconds below 10^9.
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn burn(duration: Duration) {
        let end = thread_cpu_time() + duration;
        while thread_cpu_time() < end {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn a_thread_is_charged_for_its_own_work_only() {
        let (send, receive) = mpsc::channel();
        let (release, hold) = mpsc::channel::<()>();
        let worker = std::thread::spawn(move || {
            send.send(ThreadClock::current().unwrap()).unwrap();
            burn(Duration::from_millis(20));
            send.send(ThreadClock::current().unwrap()).unwrap();
            let _ = hold.recv();
        });
        let clock = receive.recv().unwrap();
        receive.recv().unwrap();
        let used = clock.read().unwrap();
        assert!(used >= Duration::from_millis(20), "{used:?}");

        burn(Duration::from_millis(20));
        let idle = clock.read().unwrap() - used;
        assert!(idle < Duration::from_millis(10), "{idle:?}");

        drop(release);
        worker.join().unwrap();
        // The kernel lets go of the thread shortly after join returns.
        while clock.read().is_ok() {
            std::thread::yield_now();
        }
    }
}
