//! What reaches the supervisor's thread, and how: a channel, and a bell that wakes a thread which also waits for
//! listeners.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use super::provoke::Provocation;
use crate::executor::slot::Report;
use crate::handle::Stop;
use crate::order::Promise;
use crate::sys::eventfd::EventFd;
use crate::upgrade::successor::Taken;

/// What the supervisor is told.
#[derive(Debug)]
pub(crate) enum Message {
    Report(Report),
    Stop(Stop),
    /// So many executors are wanted.
    Scale(usize, Promise<()>),
    /// A fault in this slot, for a test.
    Provoke(usize, Provocation, Promise<()>),
    /// A signal that asks to stop.
    Signal(i32),
    /// Hand over to a new binary; by signal, there is nobody to tell.
    Upgrade(Option<Promise<u32>>),
    /// The successor of this number is ready, or there is none, for this reason.
    Successor(u32, Result<Taken, String>),
    /// The process before this one has acted upon our being ready.
    TakenOver,
    /// Re-read what can change while the server runs.
    Reload,
    /// What came of it.
    Reloaded(Vec<String>),
}

/// Sends messages to the supervisor; clone it as you like.
#[derive(Debug, Clone)]
pub(crate) struct Post {
    messages: Sender<Message>,
    bell: Arc<EventFd>,
}

/// The supervisor's side.
#[derive(Debug)]
pub(crate) struct PostBox {
    messages: Receiver<Message>,
    bell: Arc<EventFd>,
}

/// # Errors
/// When descriptors run out.
pub(crate) fn post() -> io::Result<(Post, PostBox)> {
    let (sender, messages) = mpsc::channel();
    let bell = Arc::new(EventFd::new()?);
    Ok((Post { messages: sender, bell: Arc::clone(&bell) }, PostBox { messages, bell }))
}

impl Post {
    /// A supervisor that has ended does not hear it.
    pub(crate) fn send(&self, message: Message) {
        if self.messages.send(message).is_ok() {
            self.bell.signal();
        }
    }
}

impl PostBox {
    pub(super) fn next(&self) -> Option<Message> {
        self.messages.try_recv().ok()
    }

    /// To be called when the bell was found rung, before [`PostBox::next`].
    pub(super) fn answer_bell(&self) {
        self.bell.clear();
    }
}

impl AsFd for PostBox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
