//! SIGTERM and SIGINT, for servers that asked for it.

use std::io;
use std::thread::JoinHandle;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use super::post::{Message, Post};

/// Until [`Watch::end`], signals become messages.
pub(super) struct Watch {
    handle: Handle,
    thread: JoinHandle<()>,
}

pub(super) fn watch(post: Post) -> io::Result<Watch> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let handle = signals.handle();
    let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in signals.forever() {
            post.send(Message::Signal(signal));
        }
    })?;
    Ok(Watch { handle, thread })
}

impl Watch {
    /// Gives the signals back and ends the thread.
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
