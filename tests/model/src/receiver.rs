//! An executor as the inbox sees it: the steps of `Generation::take_in` and `Generation::sleep_or_go_on` in their order,
//! without what they do besides.

use std::rc::Rc;
use std::sync::Arc;

use crate::executor::core::Core;
use crate::executor::directory::Directory;
use crate::executor::inbox::{Inbox, Order};
use crate::sys::eventfd::EventFd;

pub(crate) struct Receiver {
    pub inbox: Arc<Inbox>,
    pub bell: EventFd,
    core: Rc<Core>,
    /// How often it has slept.
    pub sleeps: u64,
    /// Signals that have ended a sleep, each with whatever else was there.
    pub signals: u64,
}

/// What a turn has taken in.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub wakes: Vec<u32>,
    pub jobs: usize,
    pub stop: bool,
}

impl Receiver {
    /// Open, in the only slot of a directory.
    pub fn new() -> (Arc<Directory>, Self) {
        let ([receiver], directory) = Self::of_one_server();
        (directory, receiver)
    }

    /// Open, in the slots of one directory.
    pub fn of_one_server<const COUNT: usize>() -> ([Self; COUNT], Arc<Directory>) {
        let directory = Arc::new(Directory::default());
        let receivers = std::array::from_fn(|_| {
            let inbox = Arc::new(Inbox::new().expect("an eventfd"));
            let bell = EventFd::made_last();
            inbox.open();
            Self { inbox, bell, core: Rc::new(Core { directory: Arc::clone(&directory) }), sleeps: 0, signals: 0 }
        });
        assert!(directory.fill(receivers.iter().map(|receiver| &receiver.inbox)));
        (receivers, directory)
    }

    /// Turns until one has taken in what `is_last` says.
    pub fn run(&mut self, mut is_last: impl FnMut(Taken) -> bool) {
        while !is_last(self.take_in()) {
            self.sleep();
        }
    }

    pub fn take_in(&self) -> Taken {
        let mut taken = Taken::default();
        if self.inbox.is_filled() {
            self.inbox.begin();
            taken.wakes.extend(std::iter::from_fn(|| self.inbox.next_wake()));
            while let Some(order) = self.inbox.next_order() {
                taken.stop |= order == Order::Stop;
            }
            let jobs = self.inbox.jobs();
            for job in (0..jobs).map_while(|_| self.inbox.next_job()) {
                job.run(&self.core);
                taken.jobs += 1;
            }
        }
        taken
    }

    fn sleep(&mut self) {
        if self.inbox.fall_asleep() {
            self.sleeps += 1;
            self.signals += self.bell.wait();
            self.inbox.awake();
        }
    }
}
