//! Threads: what they are called, and that they are joined without waiting for them.

use std::ffi::CString;
use std::fmt;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::thread::JoinHandle;

/// So much of a server's name shows in those of its threads: what comes after it tells them apart.
const NAME_SHOWN_BYTES: usize = 10;

/// What a server calls a thread of its own. The name is cut, and not by the system, which takes 15 bytes of the whole.
pub fn name(server: &str, what: &dyn fmt::Display) -> String {
    let shown = (0..=NAME_SHOWN_BYTES).rev().find_map(|bytes| server.get(..bytes)).unwrap_or_default();
    format!("{shown}-{what}")
}

/// Joins a thread that has ended, thread-local destructors included; `Err` gives back one that has not.
///
/// `JoinHandle::is_finished` does not say that: it is true before those destructors, and `join` waits for them.
///
/// # Errors
/// While it runs.
pub fn try_join(handle: JoinHandle<()>) -> Result<(), JoinHandle<()>> {
    // SAFETY: the handle is ours, so the thread has been neither joined nor detached. What it returned is not asked for.
    let busy = unsafe { libc::pthread_tryjoin_np(handle.as_pthread_t(), ptr::null_mut()) };
    match busy {
        libc::EBUSY => Err(handle),
        _ => {
            // It is joined: the handle must not detach it any more.
            let _ = handle.into_pthread_t();
            Ok(())
        }
    }
}

/// What the system calls the calling thread from here on; cut to 15 bytes. By a call and not through /proc, which a
/// container may have read-only.
pub fn rename(name: &str) {
    // A name ends at a zero byte.
    let Ok(name) = CString::new(name.split('\0').next().unwrap_or_default()) else { return };
    // SAFETY: the kernel reads up to 16 bytes of a string that ends with a zero, and keeps nothing of it.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    thread_local! {
        static LAST: std::cell::RefCell<Option<Waits>> = const { std::cell::RefCell::new(None) };
    }

    /// Holds its thread up after everything else.
    struct Waits(std::sync::mpsc::Receiver<()>);

    impl Drop for Waits {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    #[test]
    fn a_long_name_is_cut_and_not_what_tells_threads_apart() {
        assert_eq!(name("ringleader", &7), "ringleader-7");
        assert_eq!(name("a-very-long-server-name", &1023), "a-very-lon-1023");
        assert_eq!(name("a-very-lo\u{f6}-server-name", &"sup"), "a-very-lo-sup");
        assert_eq!(name("", &"sup"), "-sup");
    }

    #[test]
    fn a_thread_is_joined_once_its_destructors_have_run_and_not_before() {
        let (go_on, wait) = channel();
        let mut handle = thread::spawn(move || LAST.set(Some(Waits(wait))));
        while !handle.is_finished() {
            thread::yield_now();
        }
        handle = try_join(handle).unwrap_err();
        drop(go_on);
        while let Err(again) = try_join(handle) {
            handle = again;
            thread::yield_now();
        }
    }
}
