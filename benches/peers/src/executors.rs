//! One pinned thread per executor.

use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::process::exit;
use std::thread;

use crate::PeerOptions;

/// Runs `executor` on as many pinned threads as the options ask for. It does not return: a rival
/// serves until a signal ends the process.
///
/// An executor that fails or panics ends the process, because a rival that goes on with fewer executors
/// than it was asked for would be measured as something it is not.
pub fn run<F>(options: PeerOptions, executor: F) -> !
where
    F: Fn(&PeerOptions, usize) -> io::Result<()> + Clone + Send + 'static,
{
    for index in 0..usize::from(options.executors) {
        let (options, executor) = (options.clone(), executor.clone());
        let cpu = options.cpus.of_executor(index);
        let serve = move || pin_to(cpu).and_then(|()| executor(&options, cpu));
        let spawned = thread::Builder::new().name(format!("executor-{index}")).spawn(move || {
            // Nothing is used after the panic but the exit, so no broken state can be seen.
            match panic::catch_unwind(AssertUnwindSafe(serve)) {
                Ok(Ok(())) => fail("an executor returned"),
                Ok(Err(error)) => fail(&error.to_string()),
                Err(_) => fail("an executor panicked"),
            }
        });
        if let Err(error) = spawned {
            fail(&format!("start executor {index}: {error}"));
        }
    }
    loop {
        thread::park();
    }
}

/// Pins the calling thread.
///
/// # Errors
/// If the CPU does not exist or is outside the process's affinity mask.
pub fn pin_to(cpu: usize) -> io::Result<()> {
    if core_affinity::set_for_current(core_affinity::CoreId { id: cpu }) {
        return Ok(());
    }
    let message = format!("pin a thread to CPU {cpu}: refused (see `taskset -cp $$`)");
    Err(io::Error::other(message))
}

fn fail(what: &str) -> ! {
    eprintln!("error: {what}");
    exit(1)
}
