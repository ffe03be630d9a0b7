//! The end of the listeners, at a stop or after a hand-over.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use super::Supervisor;
use crate::executor::accept::Listener;
use crate::sys::socket;

impl Supervisor {
    /// From here on nothing keeps a listener open but the generation that still empties its queue.
    pub(super) fn let_go_of_listeners(&mut self) {
        // What waits where nobody accepts goes to those that are about to drain.
        let emptied = self.rescue_all();
        // Of these, stalled ones above all, nobody knows when they let go.
        let deaf = self.left_alone.drain(..).collect();
        if emptied {
            self.refuse_at(&deaf);
        }
        self.steer.end();
        self.arm_rescue();
        self.seats.iter().chain(self.former_seats()).for_each(|seat| seat.release_listeners());
    }

    /// The same at the end, when nobody will answer what waits: also of those whose thread was left behind.
    pub(super) fn end_listeners(&mut self) {
        self.let_go_of_listeners();
        self.refuse_at(&self.left_behind.keys().map(|(slot, _)| *slot).collect());
    }

    /// Has new clients of these slots refused, unless others have the listeners as well. The ring of a thread that hangs
    /// holds them: whoever else closes them, the kernel would go on accepting clients for nobody.
    fn refuse_at(&self, slots: &BTreeSet<u16>) {
        if self.handover.others_have_listeners() {
            return;
        }
        let held = |of_these: bool| {
            let seats = self.seats.iter().filter(move |seat| slots.contains(&seat.slot) == of_these);
            seats.filter_map(|seat| seat.held_listeners())
        };
        let is_same = |one: &Listener, other: &Listener| (&one.name, one.index) == (&other.name, other.index);
        let (theirs, others): (Vec<_>, Vec<_>) = (held(true).collect(), held(false).collect());
        for listener in theirs.iter().flat_map(|listeners| listeners.iter()) {
            // Where there are more slots than listeners, others may yet accept from it.
            if others.iter().any(|listeners| listeners.iter().any(|other| is_same(other, listener))) {
                continue;
            }
            // Closed by now, if another of these had it, too.
            if let Err(error) = socket::shutdown_listener(listener.fd.as_fd())
                && error.raw_os_error() != Some(libc::ENOTCONN)
            {
                tracing::warn!(listener = %listener.name, %error, "ending the listener of an executor that hangs");
            }
        }
    }
}
