//! From a sample of a thread's stack to lines for the log: what a stalled executor is doing.
//!
//! Works on the copy, at leisure, in whichever thread asks; the sampled thread has long gone on. Reading the debug
//! information of a release build takes some tenths of a second and some ten megabytes, given back afterwards, so it does
//! not belong into the supervisor's loop.

mod images;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use framehop::FrameAddress;

use crate::sys::affinity;
use crate::sys::stack_sample::{SampleError, Sampler, StackSample, ThreadId};
use images::{Image, Loaded, SymbolsOf};

/// How long a thread is given to answer. One that runs answers in microseconds; one that has not after this has no CPU.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(200);

/// How long the end of a server waits for a backtrace that is being made.
const LAST_BACKTRACE: Duration = Duration::from_millis(500);

/// Lines in the log; what is further out is counted.
const LINES_MAX: usize = 40;

/// Stack frames that are unwound, which bounds the work on a stack that is broken.
const FRAMES_MAX: usize = 256;

/// Characters of a function's name: those of generic ones run to thousands.
const NAME_CHARACTERS_MAX: usize = 160;

/// Writes what takes long to the log, one thing at a time, from a thread of its own: the supervisor has better things to do
/// than to read debug information, which takes seconds in a large program.
#[derive(Default)]
pub(super) struct Scribe(Option<JoinHandle<()>>);

impl Scribe {
    /// False when the last thing is still being written: then this one is not.
    pub(super) fn write(&mut self, what: impl FnOnce() + Send + 'static) -> bool {
        if self.0.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return false;
        }
        match std::thread::Builder::new().name("backtrace".to_owned()).spawn(what) {
            Ok(thread) => self.0 = Some(thread),
            Err(error) => tracing::warn!(%error, "no thread to make a backtrace in"),
        }
        true
    }
}

/// What was begun is written, if it does not take long: the end of a server does not wait for debug information to be read.
impl Drop for Scribe {
    fn drop(&mut self) {
        const LOOK: Duration = Duration::from_millis(5);
        let Some(thread) = self.0.take() else { return };
        let give_up = Instant::now() + LAST_BACKTRACE;
        while !thread.is_finished() {
            if Instant::now() >= give_up {
                tracing::info!("a backtrace is still being made, and is not waited for");
                return;
            }
            std::thread::sleep(LOOK);
        }
        let _ = thread.join();
    }
}

/// Puts into the log what stalled threads are doing.
pub(super) struct Reporter {
    /// First, so that it has ended when the signal is given back.
    scribe: Scribe,
    sampler: Arc<Sampler>,
}

impl Reporter {
    /// # Errors
    /// As [`Sampler::install`].
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { sampler: Arc::new(Sampler::install()?), scribe: Scribe::default() })
    }

    /// Reports on the thread of this slot, unless a report is still being made: then this stall has none.
    pub(super) fn report(&mut self, slot: u16, generation: u32, thread: ThreadId) {
        let sampler = Arc::clone(&self.sampler);
        let report = move || match of_thread(sampler, &thread) {
            Ok(backtrace) => {
                let backtrace = format!("\n{backtrace}");
                tracing::warn!(slot, generation, %backtrace, "what the stalled executor is doing");
            }
            Err(error) => tracing::warn!(slot, generation, %error, "no backtrace of the stalled executor"),
        };
        if !self.scribe.write(report) {
            tracing::info!(slot, generation, "no backtrace of this one: another is being made");
        }
    }
}

/// Samples `thread`, and says what it was doing, or why that cannot be told.
fn of_thread(sampler: Arc<Sampler>, thread: &ThreadId) -> Result<Backtrace, SampleError> {
    let sample = sampler.sample(thread, ANSWER_TIMEOUT)?;
    // The signal can be given back while the rest is still at work.
    drop(sampler);
    // What follows is long work, at a time when executors that do serve have more to do than usual.
    affinity::step_back();
    Ok(Backtrace::of(&sample))
}

/// What a thread was in the middle of, the innermost function first.
#[derive(Debug)]
struct Backtrace {
    frames: Vec<Frame>,
    /// Why the outermost frame is not the thread's beginning.
    incomplete: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Frame {
    /// Where the code lies, as `file+0x1234`: what is left when nothing has a name.
    place: String,
    /// Several if functions were inlined; none if it is not known.
    functions: Vec<Function>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Function {
    name: String,
    location: Option<Location>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Location {
    file: String,
    line: u32,
}

impl Backtrace {
    /// Unwinds the sample and gives names to what it finds. Never fails: what cannot be read is missing.
    fn of(sample: &StackSample) -> Self {
        let loaded = match Loaded::all() {
            Ok(loaded) => loaded,
            Err(error) => {
                let frames = vec![Frame::nameless(sample.registers.program_counter, None)];
                return Self { frames, incomplete: Some(format!("reading /proc/self/maps: {error}")) };
            }
        };
        let images: Vec<Image<'_>> = loaded.iter().filter_map(Image::new).collect();
        let (addresses, incomplete) = unwind(sample, &images);
        let mut symbols = SymbolsOf::default();
        let frames = addresses.into_iter().map(|address| frame(address, &images, &mut symbols)).collect();
        Self { frames, incomplete }
    }

    /// The frames worth reading: those further out than the executor's own code are the same in every stall. All of them,
    /// if the program has no names to tell them by.
    fn of_interest(&self) -> &[Frame] {
        let names = || self.frames.iter().flat_map(|frame| &frame.functions).map(Function::path);
        if !names().any(|name| name.starts_with("std::")) {
            return &self.frames;
        }
        // What runs the executor is not all of the crates in `RUNTIME`.
        let loop_of_ours = |frame: &Frame| frame.functions.iter().any(|function| function.path().starts_with(TURNS));
        let inside = self.frames.iter().position(loop_of_ours).unwrap_or(self.frames.len());
        let outer = self.frames[..inside].iter().rev().take_while(|frame| frame.is_runtime()).count();
        match inside - outer {
            // The executor itself is what stalls.
            0 => &self.frames,
            kept => &self.frames[..kept],
        }
    }
}

/// Code addresses from the innermost frame outward, and why there are no more.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn unwind(sample: &StackSample, images: &[Image<'_>]) -> (Vec<FrameAddress>, Option<String>) {
    use framehop::Unwinder;

    let mut unwinder = arch::UnwinderOf::new();
    for image in images {
        unwinder.add_module(image.module());
    }
    let mut cache = arch::CacheOf::new();
    let mut read = |address| sample.word(address).ok_or(());
    let pc = sample.registers.program_counter;
    let mut steps = unwinder.iter_frames(pc, arch::registers(sample), &mut cache, &mut read);
    let mut addresses = Vec::new();
    while addresses.len() < FRAMES_MAX {
        match steps.next() {
            Ok(Some(address)) => addresses.push(address),
            Ok(None) => return (addresses, None),
            // How the thread's first function looks to an unwinder.
            Err(framehop::Error::ReturnAddressIsNull) => return (addresses, None),
            Err(_) if sample.cut_off => {
                return (addresses, Some("further out than the part of the stack that is copied".to_owned()));
            }
            Err(error) => return (addresses, Some(error.to_string())),
        }
    }
    (addresses, Some(format!("more than {FRAMES_MAX} frames")))
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn unwind(sample: &StackSample, _images: &[Image<'_>]) -> (Vec<FrameAddress>, Option<String>) {
    let innermost = FrameAddress::from_instruction_pointer(sample.registers.program_counter);
    (vec![innermost], Some("stacks are unwound on x86-64 and aarch64 only".to_owned()))
}

fn frame<'i>(address: FrameAddress, images: &'i [Image<'i>], symbols: &mut SymbolsOf<'i>) -> Frame {
    // Of a return address, the call before it.
    let address = address.address_for_lookup();
    let Some(image) = images.iter().find(|image| image.range.contains(&address)) else {
        return Frame::nameless(address, None);
    };
    let functions = symbols.image(image).at(image.address_in_file(address));
    Frame { functions, ..Frame::nameless(image.address_in_file(address), Some(image.name)) }
}

/// What every executor's stack begins with.
const RUNTIME: &[&str] = &["std::", "core::", "alloc::", "glommio::", "ringleader::executor::", "__rust_"];

/// The loop that polls everything; there is nothing of a request further out.
const TURNS: &str = "ringleader::executor::generation::Generation::turn";

/// What is between any two frames of interest when a panic is to be caught or a future is in a box, and says nothing.
const GLUE: &[&str] = &[
    "core::ops::function::Fn",
    "core::panic::unwind_safe::",
    "core::pin::Pin<P>",
    "std::panicking::catch_unwind",
    "std::panic::catch_unwind",
    "__rust_try",
];

impl Frame {
    fn nameless(address: u64, image: Option<&str>) -> Self {
        Self { place: format!("{}+{address:#x}", image.unwrap_or("?")), functions: Vec::new() }
    }

    /// Whether all of it is code that is below every request; what has no name says nothing at the outer end either.
    fn is_runtime(&self) -> bool {
        let runtime = |name: &str| RUNTIME.iter().any(|module| name.starts_with(module));
        let of_c = |name: &str| !name.contains("::");
        self.functions.iter().map(Function::path).all(|name| runtime(name) || of_c(name))
    }

    fn lines(&self) -> Vec<String> {
        if self.functions.is_empty() {
            return vec![self.place.clone()];
        }
        let says_something = |function: &&Function| !GLUE.iter().any(|glue| function.path().starts_with(glue));
        self.functions.iter().filter(says_something).map(Function::to_string).collect()
    }
}

impl Function {
    /// The name from where its crate is named: `<core::pin::Pin<P> as ...>::poll` is of `core`.
    fn path(&self) -> &str {
        self.name.trim_start_matches(['<', '&', '*'])
    }
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shortened(without_hash(&self.name)))?;
        match &self.location {
            Some(Location { file, line }) => write!(f, " at {}:{line}", short_path(file)),
            None => Ok(()),
        }
    }
}

/// Without the `::h0123456789abcdef` that compilers tell instances apart by.
fn without_hash(name: &str) -> &str {
    let is_hash = |hash: &str| hash.len() == 16 && hash.bytes().all(|digit| digit.is_ascii_hexdigit());
    name.rsplit_once("::h").filter(|(_, hash)| is_hash(hash)).map_or(name, |(name, _)| name)
}

fn shortened(name: &str) -> String {
    match name.char_indices().nth(NAME_CHARACTERS_MAX) {
        Some((end, _)) => format!("{}...", &name[..end]),
        None => name.to_owned(),
    }
}

/// Without what depends on the machine that built it: cargo's cache, the standard library's source.
fn short_path(path: &str) -> &str {
    let after = |marker: &str| path.split_once(marker).and_then(|(_, rest)| rest.split_once('/')).map(|(_, rest)| rest);
    after("/registry/src/").or_else(|| after("/rustc/")).unwrap_or(path)
}

impl fmt::Display for Backtrace {
    /// A line for each function, without a line break at the end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frames = self.of_interest();
        let lines: Vec<String> = frames.iter().flat_map(Frame::lines).collect();
        for (number, line) in lines.iter().take(LINES_MAX).enumerate() {
            let line_break = if number == 0 { "" } else { "\n" };
            write!(f, "{line_break}{number:>4}: {line}")?;
        }
        if lines.len() > LINES_MAX {
            write!(f, "\n      and {} more", lines.len() - LINES_MAX)?;
        }
        match &self.incomplete {
            Some(why) => write!(f, "\n      the rest is not known: {why}"),
            None => Ok(()),
        }
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod arch {
    use framehop::{CacheNative, MayAllocateDuringUnwind, UnwindRegsNative, UnwinderNative};

    use crate::sys::stack_sample::StackSample;

    pub(super) type UnwinderOf<'a> = UnwinderNative<&'a [u8], MayAllocateDuringUnwind>;
    pub(super) type CacheOf = CacheNative<MayAllocateDuringUnwind>;

    pub(super) fn registers(sample: &StackSample) -> UnwindRegsNative {
        let registers = &sample.registers;
        #[cfg(target_arch = "x86_64")]
        return UnwindRegsNative::new(registers.program_counter, registers.stack_pointer, registers.frame_pointer);
        #[cfg(target_arch = "aarch64")]
        return UnwindRegsNative::new(registers.link, registers.stack_pointer, registers.frame_pointer);
    }
}

#[cfg(test)]
mod tests;
