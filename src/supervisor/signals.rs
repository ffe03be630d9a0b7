//! Signals, for servers that asked for them.

use std::io;
use std::thread::JoinHandle;

use libc::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};

use super::post::{Message, Post};
use crate::sys::signals::{Closer, Listener};

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

/// While it lives, signals become messages. Then they are given back: what they did before the server, they do again.
pub(super) struct Watch {
    closer: Closer,
    thread: Option<JoinHandle<()>>,
}

/// Watches for those wanted; `None` if none is.
pub(super) fn watch(wanted: Wanted, post: Post) -> io::Result<Option<Watch>> {
    let numbers = wanted.numbers();
    if numbers.is_empty() {
        return Ok(None);
    }
    let mut listener = Listener::new(&numbers)?;
    let closer = listener.closer();
    let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        while let Some(signal) = listener.next() {
            let message = match signal {
                SIGUSR2 => Message::Upgrade(None),
                SIGHUP => Message::Reload,
                stop => Message::Signal(stop),
            };
            post.send(message);
        }
    })?;
    Ok(Some(Watch { closer, thread: Some(thread) }))
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.closer.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(super) fn name(signal: i32) -> &'static str {
    match signal {
        SIGTERM => "SIGTERM",
        SIGINT => "SIGINT",
        _ => "signal",
    }
}
