//! Tests of backtraces: of real threads in calls, loops, the allocator and the kernel, and of how they read.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use super::*;
use crate::sys::stack_sample::tests::sample_in_time;

/// Samples a thread in `work`, which returns when the flag is set, until `done` with a sample.
fn sample_until(work: fn(&AtomicBool), mut done: impl FnMut(StackSample) -> bool) {
    let sampler = Arc::new(Sampler::install().unwrap());
    let end = Arc::new(AtomicBool::new(false));
    let (send, receive) = mpsc::channel();
    let ended = Arc::clone(&end);
    let worker = std::thread::spawn(move || {
        send.send(ThreadId::current().unwrap()).unwrap();
        work(&ended);
    });
    let thread = receive.recv().unwrap();
    while !done(sample_in_time(&sampler, &thread).unwrap()) {}
    end.store(true, Ordering::Relaxed);
    worker.join().unwrap();
}

#[inline(never)]
fn a_handler_that_spins(end: &AtomicBool) {
    while !end.load(Ordering::Relaxed) {
        std::hint::spin_loop();
    }
}

/// Calls that lead into the vdso, the allocator, the C library and the kernel.
#[inline(never)]
fn a_handler_that_does_everything(end: &AtomicBool) {
    let mut file = std::fs::File::open("/proc/self/cmdline").unwrap();
    while !end.load(Ordering::Relaxed) {
        let began = Instant::now();
        let text = format!("{:?} {:?}", began, std::hint::black_box([0_u8; 300]));
        let _ = file.read(&mut [0; 8]);
        let _ = std::hint::black_box(text.replace('0', "zero").len());
    }
}

#[test]
fn a_backtrace_names_the_function_and_its_line_and_leaves_out_what_started_the_thread() {
    let mut text = String::new();
    // Until the thread has come as far as the function.
    sample_until(a_handler_that_spins, |sample| {
        text = Backtrace::of(&sample).to_string();
        text.contains("a_handler_that_spins")
    });
    assert!(text.contains("backtrace/tests.rs:"), "{text}");
    assert!(!text.contains("__rust_begin_short_backtrace"), "{text}");
    assert!(!text.contains("not known"), "{text}");
    assert!(text.starts_with("   0: "), "{text}");
}

#[test]
fn a_stack_is_unwound_to_its_end_wherever_the_thread_is() {
    let loaded = Loaded::all().unwrap();
    let images: Vec<Image<'_>> = loaded.iter().filter_map(Image::new).collect();
    let (mut complete, mut outermost) = (0, std::collections::HashSet::new());
    let mut broken = Vec::new();
    sample_until(a_handler_that_does_everything, |sample| {
        let (addresses, incomplete) = unwind(&sample, &images);
        match incomplete {
            None => {
                complete += 1;
                outermost.insert(addresses.last().unwrap().address());
            }
            Some(why) => broken.push((why, addresses)),
        }
        complete + broken.len() == 2_000
    });
    // An instruction in the middle of a prologue that its unwind table does not describe is no error of ours.
    assert!(broken.len() <= 20, "{} of 2000 are incomplete, such as {:x?}", broken.len(), broken[0]);
    assert!(outermost.len() <= 3, "stacks of one thread end in different places: {outermost:x?}");
}

#[test]
fn code_without_names_is_told_by_file_and_address() {
    let frame = |place: &str, functions: &[&str]| Frame {
        place: place.to_owned(),
        functions: functions.iter().map(|name| Function { name: (*name).to_owned(), location: None }).collect(),
    };
    let stripped =
        [frame("libc.so.6+0x1100", &["read"]), frame("server+0x5100", &[]), frame("libc.so.6+0x900", &["clone"])];
    let backtrace = Backtrace { frames: stripped.to_vec(), incomplete: None };
    assert_eq!(backtrace.to_string(), "   0: read\n   1: server+0x5100\n   2: clone");
}

fn backtrace(names: &[&str]) -> Backtrace {
    let function = |name: &&str| Function { name: (*name).to_owned(), location: None };
    let frames = names.iter().map(|name| Frame { place: String::new(), functions: vec![function(name)] }).collect();
    Backtrace { frames, incomplete: None }
}

#[test]
fn the_executors_own_frames_are_left_out_unless_there_are_no_others() {
    let runtime =
        ["ringleader::executor::generation::run", "<glommio::Task<T> as core::Future>::poll", "std::rt::start"];
    let text = backtrace(&[&["core::slice::sort", "app::handle", "hyper::serve"], &runtime[..]].concat()).to_string();
    assert_eq!(text, "   0: core::slice::sort\n   1: app::handle\n   2: hyper::serve");
    let caught = ["app::handle", "__rust_try", "std::panic::catch_unwind", "hyper::serve", TURNS, "some::library"];
    assert_eq!(backtrace(&[&caught[..], &runtime[..]].concat()).to_string(), "   0: app::handle\n   1: hyper::serve");
    assert_eq!(backtrace(&runtime).to_string().lines().count(), 3);
}

#[test]
fn long_backtraces_and_names_are_cut() {
    let name = "x".repeat(5_000);
    let text = backtrace(&vec![&name[..]; 100]).to_string();
    assert_eq!(text.lines().count(), LINES_MAX + 1);
    assert!(text.ends_with("and 60 more"), "{text}");
    assert!(text.lines().all(|line| line.len() < NAME_CHARACTERS_MAX + 20), "{text}");
}

#[test]
fn names_and_paths_read_the_same_on_every_machine() {
    assert_eq!(without_hash("app::handle::h0123456789abcdef"), "app::handle");
    assert_eq!(without_hash("app::house"), "app::house");
    assert_eq!(
        short_path("/home/me/.cargo/registry/src/index.example-1a2b/hyper-1.12.0/src/lib.rs"),
        "hyper-1.12.0/src/lib.rs"
    );
    assert_eq!(short_path("/rustc/5980761/library/std/src/time.rs"), "library/std/src/time.rs");
    assert_eq!(short_path("src/main.rs"), "src/main.rs");
}

#[test]
fn a_thread_that_has_ended_has_no_backtrace() {
    let sampler = Arc::new(Sampler::install().unwrap());
    let thread = std::thread::spawn(|| ThreadId::current().unwrap()).join().unwrap();
    assert!(matches!(of_thread(sampler, &thread), Err(SampleError::Ended)));
}

#[test]
fn what_takes_long_to_write_is_not_waited_for_at_the_end() {
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let mut scribe = Scribe::default();
    assert!(scribe.write(move || wait.recv().unwrap_or_default()));
    assert!(!scribe.write(|| ()), "one at a time");
    drop(scribe);
    assert_eq!(go_on.send(()), Ok(()), "the thread has ended before it could");
}

#[test]
fn what_is_soon_written_is_waited_for_at_the_end() {
    let (wrote, written) = std::sync::mpsc::channel();
    let mut scribe = Scribe::default();
    assert!(scribe.write(move || wrote.send(()).unwrap_or_default()));
    drop(scribe);
    assert_eq!(written.recv(), Ok(()));
}
