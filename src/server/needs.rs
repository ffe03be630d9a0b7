//! What a server needs of the system, looked at before anything is opened: io_uring, locked memory, descriptors. Each lack
//! is a sentence that says how much is needed, how much there is, and how to get it.

use std::io;
use std::thread;

use super::Builder;
use crate::Error;
use crate::error::Kind;
use crate::executor::threads;
use crate::net::ring::{self, RingOptions};
use crate::sys::probe::{self, RingUnavailable};
use crate::sys::{limits, procfs};

/// Descriptors kept for everything that is not a connection: files, logs, the embedder's own.
const DESCRIPTORS_RESERVED: u64 = 64;
/// Descriptors of one executor besides its connections: glommio's rings and eventfds, ours, the reserve.
const DESCRIPTORS_PER_EXECUTOR: u64 = 20;
/// With less room than this per executor a server is not worth starting.
const CONNECTIONS_MIN: u64 = 16;

/// How to raise the limit on locked memory.
const RAISE_MEMLOCK: &str = "`ulimit -l`, with systemd `LimitMEMLOCK=`, Docker `--ulimit memlock=`";

impl Builder {
    /// Whether this system can carry the rings of so many executors.
    pub(super) fn probe(&self, executors: usize, warnings: &mut Vec<String>) -> Result<(), Error> {
        // On a thread of its own: the kernel takes a closed ring down a little later, and then interrupts whatever system
        // call the thread that made the ring is in (EINTR).
        let probed = thread::scope(|scope| {
            let thread = thread::Builder::new().name("probe".to_owned()).spawn_scoped(scope, probe::io_uring)?;
            Ok(thread.join().expect("the probe returns what goes wrong, it does not panic"))
        });
        let probed = probed.map_err(|error: io::Error| {
            Error::new(Kind::System, format!("starting a thread: {}", limits::explained(&error)))
        })?;
        let memory = Memory::read();
        match probed {
            // What all executors need is more than what the probe lacked.
            Err(RingUnavailable::NoMemory { .. } | RingUnavailable::MemlockTooLow { .. }) | Ok(_) => {
                memory.suffices(executors as u64)?;
            }
            Err(_) => {}
        }
        probed.map_err(|error| Error::new(Kind::System, error.to_string()))?;
        if self.signals.upgrade {
            warnings.extend(memory.warning_of_an_upgrade(executors as u64));
        }
        Ok(())
    }

    /// Connections each executor may have open.
    pub(super) fn room(&self, executors: usize, warnings: &mut Vec<String>) -> Result<u64, Error> {
        let limit = limits::nofile()
            .map_err(|error| Error::new(Kind::System, format!("reading the limit on open files: {error}")))?;
        let executors = executors as u64;
        let each = self.descriptors_per_connection;
        let taken = DESCRIPTORS_RESERVED + executors * (DESCRIPTORS_PER_EXECUTOR + self.listen.len() as u64);
        let room = limit.soft.saturating_sub(taken) / executors / each;
        if room < CONNECTIONS_MIN {
            let least = taken.saturating_add(executors.saturating_mul(each).saturating_mul(CONNECTIONS_MIN));
            let message = format!(
                "{} open files are allowed, which leaves {room} connections to each of {executors} executors: raise the \
                 limit to {least} at least (ulimit -n, LimitNOFILE=; the hard limit, which only root raises, is {}), or run \
                 fewer executors",
                limit.soft, limit.hard
            );
            return Err(Error::new(Kind::System, message));
        }
        if let Some(asked) = self.connections_max.filter(|asked| *asked > room) {
            warnings.push(format!(
                "{asked} connections per executor were asked for, but the {} open files allowed leave {room} to each of \
                 {executors}: raise the limit (ulimit -n, LimitNOFILE=)",
                limit.soft
            ));
        }
        Ok(self.connections_max.map_or(room, |asked| asked.min(room)))
    }
}

/// Locked memory: what this process may have, and what the kernel counts.
#[derive(Clone, Copy)]
struct Memory {
    soft: u64,
    hard: u64,
    /// Whether rings count for this process on this kernel.
    counts: bool,
}

impl Memory {
    /// What the kernel counts for one executor.
    fn of_an_executor() -> u64 {
        ring::locked_bytes(RingOptions::default()) + threads::locked_bytes()
    }

    fn read() -> Self {
        let (soft, hard) = limits::memlock();
        let counts = procfs::counts_rings_as_locked(&procfs::kernel_release()) && !procfs::may_lock_any_memory();
        Self { soft, hard, counts }
    }

    fn need(executors: u64) -> u64 {
        executors.saturating_mul(Self::of_an_executor()).max(probe::GLOMMIO_MEMLOCK_MIN)
    }

    fn suffices(self, executors: u64) -> Result<(), Error> {
        let need = Self::need(executors);
        if !self.counts || self.soft >= need {
            return Ok(());
        }
        let message = format!(
            "locked memory is limited to {} (hard limit {}), and {executors} executors need {}, {} each, and twice that \
             while an upgrade hands over: raise it ({RAISE_MEMLOCK}), or run fewer executors",
            probe::Bytes(self.soft),
            probe::Bytes(self.hard),
            probe::Bytes(need),
            probe::Bytes(Self::of_an_executor()),
        );
        Err(Error::new(Kind::System, message))
    }

    /// During an upgrade there are two servers, whose locked memory counts together: it counts for the user.
    fn warning_of_an_upgrade(self, executors: u64) -> Option<String> {
        let need = Self::need(executors).saturating_mul(2);
        (self.counts && self.soft < need).then(|| {
            format!(
                "an upgrade needs {} of locked memory, for the executors of two servers, and {} are allowed: raise it \
                 ({RAISE_MEMLOCK}), or the new process will not start",
                probe::Bytes(need),
                probe::Bytes(self.soft)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    #[test]
    fn locked_memory_is_what_the_rings_and_registered_buffers_of_all_executors_take() {
        let of = |kib, counts| Memory { soft: kib * KIB, hard: kib * KIB, counts };
        if Memory::of_an_executor() == 276 * KIB {
            // As measured with 4 KiB pages: 52 for our ring and 8 for its buffers' ring, 8 for each of glommio's three
            // rings and three times 64 for what it registers.
            assert!(of(1024, true).suffices(3).is_ok());
            let message = of(1024, true).suffices(4).unwrap_err().to_string();
            for words in ["1024 KiB", "1104 KiB", "276 KiB each", "ulimit -l", "LimitMEMLOCK="] {
                assert!(message.contains(words), "no {words:?} in {message}");
            }
            assert!(of(2 * 1104, true).warning_of_an_upgrade(4).is_none());
            assert!(
                of(2 * 1104 - 4, true).warning_of_an_upgrade(4).is_some_and(|warning| warning.contains("2208 KiB"))
            );
        }
        assert!(of(512, true).suffices(1).is_ok());
        assert!(of(508, true).suffices(1).is_err(), "glommio takes no less");
        assert!(
            of(512, false).suffices(64).is_ok(),
            "whom the kernel does not count it for may have as many as he likes"
        );
        assert!(of(512, false).warning_of_an_upgrade(64).is_none());
    }
}
