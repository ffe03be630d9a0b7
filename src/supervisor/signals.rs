//! Signals, for servers that asked for them.

use std::io;
use std::thread::JoinHandle;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use signal_hook::iterator::{Handle, Signals};

use super::post::{Message, Post};

/// Which signals a server listens to. The others are left alone.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted {
    /// SIGTERM and SIGINT.
    pub stop: bool,
    /// SIGUSR2.
    pub upgrade: bool,
    /// SIGHUP.
    pub reload: bool,
}

impl Wanted {
    fn numbers(self) -> Vec<i32> {
        let rows = [(self.stop, SIGTERM), (self.stop, SIGINT), (self.upgrade, SIGUSR2), (self.reload, SIGHUP)];
        rows.into_iter().filter_map(|(wanted, signal)| wanted.then_some(signal)).collect()
    }
}

/// Until [`Watch::end`], signals become messages.
pub(super) struct Watch {
    handle: Handle,
    thread: JoinHandle<()>,
}

/// Watches for those wanted; `None` if none is.
pub(super) fn watch(wanted: Wanted, post: Post) -> io::Result<Option<Watch>> {
    let numbers = wanted.numbers();
    if numbers.is_empty() {
        return Ok(None);
    }
    let mut signals = Signals::new(numbers)?;
    let handle = signals.handle();
    let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in signals.forever() {
            let message = match signal {
                SIGUSR2 => Message::Upgrade(None),
                SIGHUP => Message::Reload,
                stop => Message::Signal(stop),
            };
            post.send(message);
        }
    })?;
    Ok(Some(Watch { handle, thread }))
}

impl Watch {
    /// Stops listening and ends the thread. The handler that calls the one before stays, since others may have theirs
    /// behind it by now; so the default action does not come back.
    pub(super) fn end(self) {
        self.handle.close();
        let _ = self.thread.join();
    }
}

pub(super) fn name(signal: i32) -> &'static str {
    match signal {
        SIGTERM => "SIGTERM",
        SIGINT => "SIGINT",
        _ => "signal",
    }
}
