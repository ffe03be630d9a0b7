//! Registers and stack of another thread of this process, taken by a signal, for the backtrace of a stalled executor.
//!
//! The handler runs in the middle of whatever the thread was doing: it may hold the allocator's lock, or the loader's.
//! So it does next to nothing. It copies the registers and up to 64 KiB of stack into memory that has been there from the
//! beginning, says so in an atomic, and returns. No allocation, no lock, no unwinder; these come later, on the copy, in the
//! thread that asked.
//!
//! What the sampled thread may notice: some 20 microseconds, and EINTR from those system calls that Linux never restarts
//! (`epoll_wait`, `poll`, `nanosleep`, `io_uring_enter`; signal(7) has the list). Others are restarted.
//!
//! Nothing is installed before the first [`Sampler`], and the signal is given back with the last.

use std::cell::{OnceCell, UnsafeCell};
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arch::copy_words;

/// How much of a stack is copied, from its top frame outward. Handlers' futures are on the heap, so few stacks are deeper.
pub const STACK_BYTES_MAX: usize = 64 * 1024;

/// A leaf function may use this much below the stack pointer (x86-64's red zone).
const RED_ZONE_BYTES: u64 = 128;

/// Copying 64 KiB takes microseconds; a thread that began to and has not ended has lost its CPU in the middle of it.
const COPY_GRACE: Duration = Duration::from_millis(100);

/// What of a thread's registers an unwinder needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Registers {
    pub program_counter: u64,
    pub stack_pointer: u64,
    pub frame_pointer: u64,
    /// The return address of a leaf function (aarch64); 0 where it is on the stack.
    pub link: u64,
}

/// A thread at one instant.
#[derive(Debug, Clone)]
pub struct StackSample {
    pub registers: Registers,
    /// Address of the first of `words`.
    base: u64,
    words: Vec<u64>,
    /// Whether the stack goes on beyond what was copied.
    pub cut_off: bool,
}

impl StackSample {
    /// The eight bytes that were at this address; `None` if they were not copied.
    pub fn word(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.base)?;
        if offset % 8 != 0 {
            return None;
        }
        self.words.get(usize::try_from(offset / 8).ok()?).copied()
    }
}

/// Why there is no sample.
#[derive(Debug)]
pub enum SampleError {
    /// The thread has ended.
    Ended,
    /// The thread did not get to run its handler in time: it is stopped, has no CPU, sleeps uninterruptibly in the kernel,
    /// or blocks signals.
    NoAnswer { waited: Duration },
    /// A thread that was asked before is still answering.
    Busy,
    /// The signal could not be sent.
    Signal(io::Error),
}

impl fmt::Display for SampleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => write!(f, "the thread has ended"),
            Self::NoAnswer { waited } => write!(
                f,
                "the thread did not answer a signal within {} ms: it has no CPU, is stopped, or waits in the kernel where \
                 signals do not reach it",
                waited.as_millis()
            ),
            Self::Busy => write!(f, "a thread that was asked before has not finished its answer"),
            Self::Signal(error) => write!(f, "sending the thread a signal: {error}"),
        }
    }
}

impl std::error::Error for SampleError {}

/// A thread that can be sampled, by whoever holds this. Lets nobody else's thread be taken for it: the kernel reuses thread
/// ids, this becomes [`SampleError::Ended`] when its thread ends.
#[derive(Debug, Clone)]
pub struct ThreadId(Arc<Thread>);

#[derive(Debug)]
struct Thread {
    tid: libc::pid_t,
    /// The stack's lowest address, and the one past its highest.
    stack: (u64, u64),
    /// Held while a signal is sent, so that the thread cannot end, nor its id be reused, in between.
    lives: Mutex<bool>,
}

/// Ends with its thread.
struct Registration(ThreadId);

impl Drop for Registration {
    fn drop(&mut self) {
        *lock(&self.0.0.lives) = false;
    }
}

thread_local! {
    static REGISTRATION: OnceCell<Registration> = const { OnceCell::new() };
}

impl ThreadId {
    /// The calling thread's.
    ///
    /// # Errors
    /// When the stack's bounds cannot be found out (the C library reads the main thread's from `/proc`), or the thread is
    /// about to end.
    pub fn current() -> io::Result<Self> {
        let own = |registered: &OnceCell<Registration>| {
            if registered.get().is_none() {
                // SAFETY: takes no memory.
                let tid = unsafe { libc::gettid() };
                let thread = Thread { tid, stack: own_stack()?, lives: Mutex::new(true) };
                let _ = registered.set(Registration(Self(Arc::new(thread))));
            }
            Ok(registered.get().expect("it has just been set").0.clone())
        };
        REGISTRATION.try_with(own).unwrap_or_else(|_| Err(io::Error::other("the thread is about to end")))
    }

    /// The kernel's number of the thread, as in `/proc/self/task`. A later thread may have the same.
    pub fn number(&self) -> i32 {
        self.0.tid
    }

    /// Sends the signal, unless the thread has ended.
    fn send(&self, signal: libc::c_int) -> Result<(), SampleError> {
        let lives = lock(&self.0.lives);
        if !*lives {
            return Err(SampleError::Ended);
        }
        // SAFETY: takes no memory. `lives` is locked and true, so the thread is before the end of its `Registration`, and
        // the number is its own.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0.tid, signal) };
        match sent {
            0 => Ok(()),
            _ => Err(SampleError::Signal(io::Error::last_os_error())),
        }
    }
}

/// The calling thread's stack: its lowest address, and the one past its highest.
fn own_stack() -> io::Result<(u64, u64)> {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: the calling thread is alive, and `attributes` is live, exclusively borrowed memory.
    let errno = unsafe { libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) };
    if errno != 0 {
        return Err(io::Error::from_raw_os_error(errno));
    }
    let (mut lowest, mut bytes) = (ptr::null_mut(), 0);
    // SAFETY: `pthread_getattr_np` has succeeded, so `attributes` is initialised; the others are live and exclusively
    // borrowed. `attributes` is not used after it is destroyed.
    let errno = unsafe {
        let errno = libc::pthread_attr_getstack(attributes.as_ptr(), &raw mut lowest, &raw mut bytes);
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        errno
    };
    if errno != 0 {
        return Err(io::Error::from_raw_os_error(errno));
    }
    Ok((lowest as u64, (lowest as u64).saturating_add(bytes as u64)))
}

/// Where the one request of the process and its answer lie: in static memory, since a late handler may come at any time.
struct Desk {
    /// [`FREE`], or the asked thread's number with what has become of the request.
    state: AtomicU64,
    /// Of the asked thread.
    stack_lowest: AtomicU64,
    stack_end: AtomicU64,
    answer: UnsafeCell<Answer>,
}

struct Answer {
    registers: Registers,
    base: u64,
    words: usize,
    cut_off: bool,
    stack: [u64; STACK_BYTES_MAX / 8],
}

const FREE: u64 = 0;
const ASKED: u64 = 1;
const ANSWERING: u64 = 2;
const ANSWERED: u64 = 3;

fn state(tid: libc::pid_t, phase: u64) -> u64 {
    (tid as u64) << 2 | phase
}

// SAFETY: `answer` is written by a handler that has exchanged ASKED for ANSWERING, which one thread can for each ASKED.
// It is read by the holder of `ASKING` once it has seen ANSWERED, which the handler stores last, and nobody stores ASKED
// while the state is ANSWERING. The rest is atomic.
unsafe impl Sync for Desk {}

static DESK: Desk = Desk {
    state: AtomicU64::new(FREE),
    stack_lowest: AtomicU64::new(0),
    stack_end: AtomicU64::new(0),
    answer: UnsafeCell::new(Answer {
        registers: Registers { program_counter: 0, stack_pointer: 0, frame_pointer: 0, link: 0 },
        base: 0,
        words: 0,
        cut_off: false,
        stack: [0; STACK_BYTES_MAX / 8],
    }),
};

/// The signal's handler. Runs on any thread at any instant: see the head of this file for what it may do.
extern "C" fn answer(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: `__errno_location` gives this thread's errno, live as long as the thread.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: takes no memory; it is one system call.
    let tid = unsafe { libc::gettid() };
    // Not asked: somebody else's signal, or the request has been withdrawn.
    let mine =
        DESK.state.compare_exchange(state(tid, ASKED), state(tid, ANSWERING), Ordering::Acquire, Ordering::Relaxed);
    if mine.is_ok() {
        // SAFETY: the kernel hands an SA_SIGINFO handler the interrupted context.
        let registers = unsafe { arch::registers(context.cast()) };
        // SAFETY: ANSWERING gives this handler alone the use of `answer`.
        unsafe { (*DESK.answer.get()).registers = registers };
        copy_stack(registers.stack_pointer);
        DESK.state.store(state(tid, ANSWERED), Ordering::Release);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Copies the stack of the thread this runs on, from the interrupted top outward. Called in ANSWERING only.
fn copy_stack(stack_pointer: u64) {
    let (lowest, end) = (DESK.stack_lowest.load(Ordering::Relaxed), DESK.stack_end.load(Ordering::Relaxed));
    let inside = lowest < stack_pointer && stack_pointer < end;
    // Outside: a stack that the thread has switched to by itself. Where it ends is not known, so none of it is read.
    let base = if inside { stack_pointer.saturating_sub(RED_ZONE_BYTES).max(lowest) & !7 } else { 0 };
    let all = if inside { (end.saturating_sub(base) / 8) as usize } else { 0 };
    let words = all.min(STACK_BYTES_MAX / 8);
    // SAFETY: ANSWERING gives this handler alone the use of `answer`. The source is within this thread's stack and not
    // below its guard page, since the stack pointer is not; it is mapped, and nothing of this thread runs meanwhile that
    // could change it, nor does this handler's own frame lie in it: it is below the red zone or on the alternate stack.
    unsafe {
        let answer = DESK.answer.get();
        (*answer).base = base;
        (*answer).words = words;
        (*answer).cut_off = words < all;
        copy_words(base as *const u64, (&raw mut (*answer).stack).cast(), words);
    }
}

/// Lets the threads of this process be sampled, while it lives. Any number of them may be held at once.
#[derive(Debug)]
pub struct Sampler {
    signal: libc::c_int,
}

/// The signal, and by how many samplers it is held. One for the process: so are signal handlers.
struct Installed {
    signal: libc::c_int,
    samplers: usize,
}

static INSTALLED: Mutex<Installed> = Mutex::new(Installed { signal: 0, samplers: 0 });

/// Held by the one who asks.
static ASKING: Mutex<()> = Mutex::new(());

impl Sampler {
    /// Takes a real-time signal that nobody in the process has a use for: the highest that has its default action.
    ///
    /// # Errors
    /// When all are taken; `Unsupported` on processors other than x86-64 and aarch64.
    pub fn install() -> io::Result<Self> {
        if !arch::SUPPORTED {
            let message = "stacks of stalled threads can be taken on x86-64 and aarch64 only";
            return Err(io::Error::new(io::ErrorKind::Unsupported, message));
        }
        let mut installed = lock(&INSTALLED);
        if installed.samplers == 0 {
            installed.signal = take_a_signal()?;
        }
        installed.samplers += 1;
        Ok(Self { signal: installed.signal })
    }

    /// Registers and stack of `thread` as they are now. Takes some 50 microseconds of a thread that runs.
    ///
    /// Samples of one process are taken one after the other. The stack is empty if the thread runs on one that it did not
    /// start with.
    pub fn sample(&self, thread: &ThreadId, timeout: Duration) -> Result<StackSample, SampleError> {
        let _one_at_a_time = lock(&ASKING);
        let (asked, answering) = (state(thread.0.tid, ASKED), state(thread.0.tid, ANSWERING));
        if DESK.state.load(Ordering::Acquire) & 3 == ANSWERING {
            return Err(SampleError::Busy);
        }
        DESK.stack_lowest.store(thread.0.stack.0, Ordering::Relaxed);
        DESK.stack_end.store(thread.0.stack.1, Ordering::Relaxed);
        DESK.state.store(asked, Ordering::Release);
        let sent = thread.send(self.signal);
        if sent.is_ok() {
            wait_while(asked, timeout);
        }
        // An earlier signal to this thread may still be under way, so an answer can begin whether or not this was sent.
        if DESK.state.compare_exchange(asked, FREE, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return Err(sent.err().unwrap_or(SampleError::NoAnswer { waited: timeout }));
        }
        wait_while(answering, COPY_GRACE);
        if DESK.state.load(Ordering::Acquire) & 3 != ANSWERED {
            return Err(SampleError::NoAnswer { waited: timeout + COPY_GRACE });
        }
        // SAFETY: the state is ANSWERED, and `ASKING` is held.
        Ok(unsafe { taken(&*DESK.answer.get()) })
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        let mut installed = lock(&INSTALLED);
        installed.samplers -= 1;
        if installed.samplers == 0 {
            give_back(installed.signal);
        }
    }
}

fn taken(answer: &Answer) -> StackSample {
    StackSample {
        registers: answer.registers,
        base: answer.base,
        words: answer.stack[..answer.words].to_vec(),
        cut_off: answer.cut_off,
    }
}

/// Waits until the desk's state is another, `timeout` at most. By looking: the handler has nobody to wake but us, and a
/// thread that runs answers while we still spin.
fn wait_while(state: u64, timeout: Duration) {
    let begun = Instant::now();
    let mut pause = Duration::from_micros(20);
    for _ in 0..200 {
        if DESK.state.load(Ordering::Acquire) != state {
            return;
        }
        std::hint::spin_loop();
    }
    while DESK.state.load(Ordering::Acquire) == state && begun.elapsed() < timeout {
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(1));
    }
}

fn take_a_signal() -> io::Result<libc::c_int> {
    for signal in (libc::SIGRTMIN()..=libc::SIGRTMAX()).rev() {
        if action(signal)?.sa_sigaction != libc::SIG_DFL {
            continue;
        }
        let before = set_action(signal, answer as *const () as libc::sighandler_t)?;
        if before.sa_sigaction == libc::SIG_DFL {
            return Ok(signal);
        }
        // Somebody took it between the two calls. SAFETY: `before` is what the kernel itself gave out.
        unsafe { libc::sigaction(signal, &raw const before, ptr::null_mut()) };
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, "every real-time signal of the process has a handler already"))
}

/// Back to the default action, unless somebody else has taken the signal over. By way of ignoring it, which throws away
/// what is still on its way to a stopped thread: the default action would end the process.
fn give_back(signal: libc::c_int) {
    let ours = answer as *const () as libc::sighandler_t;
    if action(signal).is_ok_and(|now| now.sa_sigaction == ours) {
        let _ = set_action(signal, libc::SIG_IGN);
        let _ = set_action(signal, libc::SIG_DFL);
    }
}

fn action(signal: libc::c_int) -> io::Result<libc::sigaction> {
    let mut now = MaybeUninit::uninit();
    // SAFETY: `now` is live, exclusively borrowed memory; no action is set.
    if unsafe { libc::sigaction(signal, ptr::null(), now.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has succeeded and filled it in.
    Ok(unsafe { now.assume_init() })
}

/// Sets `handler`, an action or a function, and returns what was there.
fn set_action(signal: libc::c_int, handler: libc::sighandler_t) -> io::Result<libc::sigaction> {
    // SAFETY: all zeroes is a valid `sigaction`: integers, a set and an optional function.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    // On the alternate stack, if the thread has one: a stack that is about to overflow has no room.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
    // SAFETY: `sa_mask` is live, exclusively borrowed memory.
    unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    let mut before = MaybeUninit::uninit();
    // SAFETY: both are live. The handler is a function of the type that SA_SIGINFO asks for, which does only what may be
    // done in a handler, or a constant of the system's.
    if unsafe { libc::sigaction(signal, &raw const action, before.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has succeeded and filled it in.
    Ok(unsafe { before.assume_init() })
}

/// Nothing that these locks guard can be left half done by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What differs between processors. Words are copied in assembly: a stack is not memory that Rust has a name for, parts of
/// it were never written, and AddressSanitizer puts fences between the variables on it, which a copy in Rust would trip.
#[cfg(target_arch = "x86_64")]
mod arch {
    use super::Registers;

    pub const SUPPORTED: bool = true;

    /// # Safety
    /// `context` is what the kernel handed to a handler.
    pub unsafe fn registers(context: *const libc::ucontext_t) -> Registers {
        // SAFETY: the caller's promise.
        let registers = unsafe { &(*context).uc_mcontext.gregs };
        Registers {
            program_counter: registers[libc::REG_RIP as usize] as u64,
            stack_pointer: registers[libc::REG_RSP as usize] as u64,
            frame_pointer: registers[libc::REG_RBP as usize] as u64,
            link: 0,
        }
    }

    /// # Safety
    /// `words` words can be read at `from`, and written at `to` by nobody else.
    pub unsafe fn copy_words(from: *const u64, to: *mut u64, words: usize) {
        // SAFETY: the caller's promise; the direction flag is clear at the entry of every function, handlers too.
        unsafe {
            core::arch::asm!(
                "rep movsq",
                inout("rcx") words => _,
                inout("rsi") from => _,
                inout("rdi") to => _,
                options(nostack, preserves_flags)
            );
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arch {
    use super::Registers;

    pub const SUPPORTED: bool = true;

    /// # Safety
    /// `context` is what the kernel handed to a handler.
    pub unsafe fn registers(context: *const libc::ucontext_t) -> Registers {
        // SAFETY: the caller's promise.
        let machine = unsafe { &(*context).uc_mcontext };
        Registers {
            program_counter: machine.pc,
            stack_pointer: machine.sp,
            frame_pointer: machine.regs[29],
            link: machine.regs[30],
        }
    }

    /// # Safety
    /// `words` words can be read at `from`, and written at `to` by nobody else.
    pub unsafe fn copy_words(from: *const u64, to: *mut u64, words: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!(
                "2: cbz {words}, 3f",
                "ldr {word}, [{from}], #8",
                "str {word}, [{to}], #8",
                "sub {words}, {words}, #1",
                "b 2b",
                "3:",
                words = inout(reg) words => _,
                from = inout(reg) from => _,
                to = inout(reg) to => _,
                word = out(reg) _,
                options(nostack)
            );
        }
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod arch {
    use super::Registers;

    pub const SUPPORTED: bool = false;

    /// # Safety
    /// None is needed: it is never called.
    pub unsafe fn registers(_context: *const libc::ucontext_t) -> Registers {
        Registers::default()
    }

    /// # Safety
    /// None is needed: it is never called.
    pub unsafe fn copy_words(_from: *const u64, _to: *mut u64, _words: usize) {}
}

#[cfg(test)]
pub(crate) mod tests;
