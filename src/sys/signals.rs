//! Signals that are listened to for a while: by a handler that counts them and calls the one that was there before, and that
//! is taken away with the last listener.
//!
//! What is counted is heard through a futex. A pipe, as is usual, would be a descriptor that must not be closed while a
//! handler is about to write to it; here there is nothing to close, and any number of listeners hear the same bell.
//!
//! Handlers cannot be stacked in any order: one that was installed over ours calls ours, as long as the process lives, for
//! all we know. So ours stays then, hears for later listeners, and does nothing while there is none. To install ours once
//! more, over it, would have the two call each other for ever. The default action and none at all call nobody: over those
//! ours is installed anew.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libc::c_int;

/// One past the highest signal that is not a real-time one.
const SIGNALS: usize = 32;

/// How often each was heard, modulo 2^32.
static HEARD: [AtomicU32; SIGNALS] = [const { AtomicU32::new(0) }; SIGNALS];

/// The handler that each had before ours: an address, or one of the system's constants.
static BEFORE: [AtomicUsize; SIGNALS] = [const { AtomicUsize::new(libc::SIG_DFL) }; SIGNALS];

/// The futex: changes when a signal is heard, or a listener is to end.
static BELL: AtomicU32 = AtomicU32::new(0);

static HELD: Mutex<[Held; SIGNALS]> = Mutex::new([const { Held { listeners: 0, saved: None } }; SIGNALS]);

struct Held {
    listeners: usize,
    /// The action before ours, while ours is installed.
    saved: Option<libc::sigaction>,
}

/// Hears signals. As long as it lives, their default action does not take place.
#[derive(Debug)]
pub struct Listener {
    /// Each with how often it had been heard when it was last looked at.
    heard: Vec<(c_int, u32)>,
    ended: Arc<AtomicBool>,
}

/// Ends the wait of a [`Listener`], from another thread.
#[derive(Debug)]
pub struct Closer(Arc<AtomicBool>);

impl Listener {
    /// Listens from now on.
    ///
    /// # Panics
    /// For real-time signals.
    pub fn new(signals: &[c_int]) -> io::Result<Self> {
        let mut listener = Self { heard: Vec::new(), ended: Arc::default() };
        for &signal in signals {
            let heard = HEARD[signal as usize].load(Ordering::SeqCst);
            hold(signal)?;
            // What is in here is given back, by the drop at an error, too.
            listener.heard.push((signal, heard));
        }
        Ok(listener)
    }

    pub fn closer(&self) -> Closer {
        Closer(Arc::clone(&self.ended))
    }

    /// The next signal: one that came several times before it was asked for is told once. `None` after [`Closer::close`].
    pub fn next(&mut self) -> Option<c_int> {
        loop {
            let bell = BELL.load(Ordering::SeqCst);
            if self.ended.load(Ordering::SeqCst) {
                return None;
            }
            for (signal, seen) in &mut self.heard {
                let heard = HEARD[*signal as usize].load(Ordering::SeqCst);
                if heard != *seen {
                    *seen = heard;
                    return Some(*signal);
                }
            }
            wait_while(bell);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        for (signal, _) in &self.heard {
            let_go(*signal);
        }
    }
}

impl Closer {
    pub fn close(&self) {
        self.0.store(true, Ordering::SeqCst);
        ring();
    }
}

/// The handler. Runs on any thread at any instant, so all it does is atomics and a system call.
extern "C" fn hear(signal: c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: `__errno_location` gives this thread's errno, live as long as the thread.
    let errno = unsafe { *libc::__errno_location() };
    let index = signal as usize;
    HEARD[index].fetch_add(1, Ordering::SeqCst);
    ring();
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    let before = BEFORE[index].load(Ordering::SeqCst);
    if before != libc::SIG_DFL && before != libc::SIG_IGN {
        // SAFETY: the address is of a handler that `sigaction` gave out, called with what the kernel would call it with: it
        // passes all three, also to a handler that has asked for the first only.
        unsafe {
            type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut libc::c_void);
            let before = std::mem::transmute::<*const (), Handler>(before as *const ());
            before(signal, info, context);
        }
    }
}

/// Of the handler.
fn address() -> libc::sighandler_t {
    hear as *const () as libc::sighandler_t
}

fn ring() {
    BELL.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the futex is static memory; waking takes no other.
    unsafe { libc::syscall(libc::SYS_futex, BELL.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, c_int::MAX) };
}

/// Returns when the bell is another than this, and may at any time.
fn wait_while(bell: u32) {
    let forever = ptr::null::<libc::timespec>();
    // SAFETY: the futex is static memory; there is no timeout to read.
    unsafe {
        libc::syscall(libc::SYS_futex, BELL.as_ptr(), libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, bell, forever);
    }
}

/// Installs the handler, unless it is called already.
fn hold(signal: c_int) -> io::Result<()> {
    let held = &mut lock()[signal as usize];
    // What others have done to it in the meantime nobody has told us.
    let now = action(signal)?;
    if now.sa_sigaction == libc::SIG_DFL || now.sa_sigaction == libc::SIG_IGN {
        held.saved = None;
    } else if held.saved.is_some() && now.sa_sigaction != address() {
        tracing::warn!(
            signal,
            "this program has installed a handler of its own over the server's: the signal is heard only if that handler \
             calls the one before it"
        );
    }
    if held.saved.is_none() {
        // Before it can be asked for; and again, should it have changed in between.
        BEFORE[signal as usize].store(now.sa_sigaction, Ordering::SeqCst);
        let mut ours = now;
        ours.sa_sigaction = address();
        // On the alternate stack, if the thread has one: a stack that is about to overflow has no room.
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
        let saved = set_action(signal, &ours)?;
        BEFORE[signal as usize].store(saved.sa_sigaction, Ordering::SeqCst);
        held.saved = Some(saved);
    }
    held.listeners += 1;
    Ok(())
}

/// With the last listener the action that was there before comes back, unless somebody has installed another over ours.
fn let_go(signal: c_int) {
    let held = &mut lock()[signal as usize];
    held.listeners -= 1;
    let is_ours = |action: &libc::sigaction| action.sa_sigaction == address();
    if held.listeners > 0 || !action(signal).is_ok_and(|now| is_ours(&now)) {
        return;
    }
    let Some(saved) = held.saved else { return };
    match set_action(signal, &saved) {
        Ok(replaced) if is_ours(&replaced) => held.saved = None,
        // Somebody did between the two calls.
        Ok(replaced) => drop(set_action(signal, &replaced)),
        Err(_) => (),
    }
}

fn action(signal: c_int) -> io::Result<libc::sigaction> {
    let mut now = MaybeUninit::uninit();
    // SAFETY: `now` is live, exclusively borrowed memory; no action is set.
    if unsafe { libc::sigaction(signal, ptr::null(), now.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has succeeded and filled it in.
    Ok(unsafe { now.assume_init() })
}

/// Sets an action and returns what was there.
fn set_action(signal: c_int, action: &libc::sigaction) -> io::Result<libc::sigaction> {
    let mut before = MaybeUninit::uninit();
    // SAFETY: both are live. The handler is ours, which does only what may be done in one, with the flags that go with it,
    // or comes from `sigaction` with all that belongs to it.
    if unsafe { libc::sigaction(signal, action, before.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has succeeded and filled it in.
    Ok(unsafe { before.assume_init() })
}

/// Nothing that this guards can be left half done by a panic.
fn lock() -> MutexGuard<'static, [Held; SIGNALS]> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raise(signal: c_int) {
        // SAFETY: the signal has a handler for as long as each test's listener lives.
        assert_eq!(unsafe { libc::raise(signal) }, 0);
    }

    fn handler(signal: c_int) -> usize {
        action(signal).unwrap().sa_sigaction
    }

    // Each test has a signal that no other test uses.

    #[test]
    fn every_listener_hears_a_signal_and_the_last_gives_it_back() {
        let before = handler(libc::SIGURG);
        let mut first = Listener::new(&[libc::SIGURG]).unwrap();
        let mut second = Listener::new(&[libc::SIGURG]).unwrap();
        raise(libc::SIGURG);
        assert_eq!((first.next(), second.next()), (Some(libc::SIGURG), Some(libc::SIGURG)));
        drop(first);
        raise(libc::SIGURG);
        assert_eq!(second.next(), Some(libc::SIGURG));
        assert_ne!(handler(libc::SIGURG), before);
        drop(second);
        assert_eq!(handler(libc::SIGURG), before);
    }

    #[test]
    fn a_listener_that_waits_can_be_closed() {
        let mut listener = Listener::new(&[libc::SIGCONT]).unwrap();
        let closer = listener.closer();
        let waits = std::thread::spawn(move || listener.next());
        closer.close();
        assert_eq!(waits.join().unwrap(), None);
    }

    /// Neither calls the handler that was there before.
    #[test]
    fn a_listener_hears_after_others_have_replaced_the_handler_of_an_earlier_one() {
        for replaced_by in [libc::SIG_IGN, libc::SIG_DFL] {
            let first = Listener::new(&[libc::SIGUSR1]).unwrap();
            let mut theirs = action(libc::SIGUSR1).unwrap();
            theirs.sa_sigaction = replaced_by;
            set_action(libc::SIGUSR1, &theirs).unwrap();
            drop(first);
            assert_eq!(handler(libc::SIGUSR1), replaced_by, "it is theirs");
            let mut second = Listener::new(&[libc::SIGUSR1]).unwrap();
            assert_eq!(handler(libc::SIGUSR1), address());
            raise(libc::SIGUSR1);
            assert_eq!(second.next(), Some(libc::SIGUSR1));
            drop(second);
            assert_eq!(handler(libc::SIGUSR1), replaced_by, "it goes as it came");
        }
    }

    static CALLED: AtomicU32 = AtomicU32::new(0);

    extern "C" fn call(_signal: c_int) {
        CALLED.fetch_add(1, Ordering::SeqCst);
    }

    #[test]
    fn a_handler_that_was_installed_over_ours_stays() {
        let mut listener = Listener::new(&[libc::SIGWINCH]).unwrap();
        let mut theirs = action(libc::SIGWINCH).unwrap();
        let ours = theirs;
        theirs.sa_sigaction = call as *const () as usize;
        theirs.sa_flags = 0;
        set_action(libc::SIGWINCH, &theirs).unwrap();
        drop(listener);
        assert_eq!(handler(libc::SIGWINCH), theirs.sa_sigaction);
        // They call ours after theirs, which hears for later ones, too.
        listener = Listener::new(&[libc::SIGWINCH]).unwrap();
        raise(libc::SIGWINCH);
        hear(libc::SIGWINCH, ptr::null_mut(), ptr::null_mut());
        assert_eq!((listener.next(), CALLED.load(Ordering::SeqCst)), (Some(libc::SIGWINCH), 1));
        // They go as they came.
        set_action(libc::SIGWINCH, &ours).unwrap();
        drop(listener);
        assert_eq!(handler(libc::SIGWINCH), libc::SIG_DFL);
    }
}
