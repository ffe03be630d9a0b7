//! Where the executors of a server find one another: the inbox that is in each slot, and which slots own keys. One per
//! server, shared by its executors, its supervisor, and whoever holds a token of it.
//!
//! The only thing of a server that all its executors touch, and only when they send each other something. A message takes
//! the read lock of its receiver's row, which no writer asks for but once per hung executor: two atomic additions on a
//! cache line that the senders to one receiver share, as they share the end of its queue. Rows keep apart. A pointer that
//! each executor caches would save those; but then a token would need an executor, and plain threads have none.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};

use super::inbox::{Inbox, Job, Posted, Refusal};
use crate::sync::RwLock;

/// Two cache lines: adjacent ones are fetched in pairs.
#[repr(align(128))]
struct Row(RwLock<Option<Arc<Inbox>>>);

struct Rows {
    inboxes: Box<[Row]>,
    /// Whether the slot owns keys. Apart from the rows: read by many, written when the number of executors changes.
    members: Box<[AtomicBool]>,
}

/// A task of an executor, as the others of its server find it. It outlives the task: what is woken by it then is nobody, or
/// another task in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TaskKey {
    pub slot: u16,
    pub index: u32,
}

/// Empty until the server is started.
pub(crate) struct Directory {
    /// Unlike that of any other in the process.
    number: u64,
    /// A server has it, and has not ended.
    taken: AtomicBool,
    /// As many as its first server had slots.
    rows: OnceLock<Rows>,
    /// Chosen by chance, so that nobody can send keys that all have the same owner.
    hasher: RandomState,
    /// How many generations may still have something to ask of others.
    at_work: AtomicUsize,
}

/// A generation that may still have something to ask of others, until this is dropped.
pub(crate) struct AtWork(Arc<Asking>);

/// The same for whoever may have to speak for a generation that hangs.
pub(crate) struct Asking {
    directory: Arc<Directory>,
    over: AtomicBool,
}

impl AtWork {
    pub(crate) fn asking(&self) -> Arc<Asking> {
        Arc::clone(&self.0)
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Asking {
    /// Nobody is to wait for this generation any more. The first call counts.
    pub(crate) fn end(&self) {
        let directory = &self.directory;
        if !self.over.swap(true, Ordering::AcqRel) && directory.at_work.fetch_sub(1, Ordering::AcqRel) == 1 {
            let count = directory.rows.get().map_or(0, |rows| rows.inboxes.len());
            // For them to look: they wait for this. One whose inbox is full is awake.
            (0..count as u16).for_each(|slot| drop(directory.post(slot, Job::Closure(Box::new(|_| {})))));
        }
    }
}

static NUMBER: AtomicU64 = AtomicU64::new(0);

impl Default for Directory {
    fn default() -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self {
            number,
            taken: AtomicBool::new(false),
            rows: OnceLock::new(),
            hasher: RandomState::new(),
            at_work: AtomicUsize::new(0),
        }
    }
}

impl Directory {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Puts in the inbox of each slot, in order. False while another server has it, or when the one before had fewer slots.
    pub(crate) fn fill<'a>(&self, inboxes: impl ExactSizeIterator<Item = &'a Arc<Inbox>>) -> bool {
        if self.taken.swap(true, Ordering::AcqRel) {
            return false;
        }
        let count = inboxes.len();
        let rows = self.rows.get_or_init(|| Rows {
            inboxes: (0..count).map(|_| Row(RwLock::new(None))).collect(),
            members: (0..count).map(|_| AtomicBool::new(false)).collect(),
        });
        if rows.inboxes.len() < count {
            self.taken.store(false, Ordering::Release);
            return false;
        }
        rows.members.iter().for_each(|member| member.store(false, Ordering::Release));
        (0..).zip(inboxes).for_each(|(slot, inbox)| self.seat(slot, inbox));
        true
    }

    /// Another executor, with another inbox, has taken the place of the slot's.
    pub(crate) fn seat(&self, slot: u16, inbox: &Arc<Inbox>) {
        self.replace(slot, Some(Arc::clone(inbox)));
    }

    /// A generation begins, and asks others whatever it likes.
    pub(crate) fn at_work(self: &Arc<Self>) -> AtWork {
        self.at_work.fetch_add(1, Ordering::Relaxed);
        AtWork(Arc::new(Asking { directory: Arc::clone(self), over: AtomicBool::new(false) }))
    }

    /// Whether nobody will ask anybody any more. When it comes to that, everybody is sent an empty message.
    pub(crate) fn is_quiet(&self) -> bool {
        self.at_work.load(Ordering::Acquire) == 0
    }

    /// The server has ended; another may have it.
    pub(crate) fn clear(&self) {
        let count = self.rows.get().map_or(0, |rows| rows.inboxes.len());
        (0..count as u16).for_each(|slot| self.replace(slot, None));
        self.taken.store(false, Ordering::Release);
    }

    fn replace(&self, slot: u16, inbox: Option<Arc<Inbox>>) {
        let Some(row) = self.rows.get().and_then(|rows| rows.inboxes.get(usize::from(slot))) else { return };
        let old = std::mem::replace(&mut *row.0.write().unwrap_or_else(PoisonError::into_inner), inbox);
        drop(old);
    }

    /// The slot owns keys from here on.
    pub(crate) fn join(&self, slot: u16) {
        self.set_member(slot, true);
    }

    /// It no longer does.
    pub(crate) fn leave(&self, slot: u16) {
        self.set_member(slot, false);
    }

    fn set_member(&self, slot: u16, is_member: bool) {
        if let Some(member) = self.rows.get().and_then(|rows| rows.members.get(usize::from(slot))) {
            member.store(is_member, Ordering::Release);
        }
    }

    /// Those that own keys, in order.
    pub(crate) fn members(&self) -> impl Iterator<Item = u16> {
        let members = self.rows.get().map_or(&[][..], |rows| &rows.members);
        (0..).zip(members).filter(|(_, member)| member.load(Ordering::Acquire)).map(|(slot, _)| slot)
    }

    /// The member that a key belongs to: rendezvous hashing. `None` when there is none.
    pub(crate) fn owner_of<K: Hash + ?Sized>(&self, key: &K) -> Option<u16> {
        let hash = self.hasher.hash_one(key);
        self.members().max_by_key(|slot| weight(hash, *slot))
    }

    /// Posts a job to the executor in a slot.
    ///
    /// # Errors
    /// [`Refusal`], at once, with the job.
    pub(crate) fn post(&self, slot: u16, job: Job) -> Result<(), (Refusal, Job)> {
        let Some(row) = self.rows.get().and_then(|rows| rows.inboxes.get(usize::from(slot))) else {
            return Err((Refusal::Down, job));
        };
        let seated = row.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(inbox) = seated.as_ref() else { return Err((Refusal::Down, job)) };
        if inbox.post(job)? == Posted::Late {
            let inbox = Arc::clone(inbox);
            drop(seated);
            inbox.drop_jobs();
        }
        Ok(())
    }

    /// Wakes a task, unless its executor has ended. What its own waker would do, without touching that: it stays in the
    /// cache of the task's processor.
    pub(crate) fn wake(&self, task: TaskKey) {
        let Some(row) = self.rows.get().and_then(|rows| rows.inboxes.get(usize::from(task.slot))) else { return };
        let seated = row.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(inbox) = seated.as_ref() {
            inbox.wake(task.index);
        }
    }
}

/// How much a slot wants a key: the finish of splitmix64, which lets every bit of both count.
fn weight(hash: u64, slot: u16) -> u64 {
    let mut mixed = hash ^ (u64::from(slot) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(slots: usize) -> Directory {
        let directory = Directory::default();
        let inboxes: Vec<_> = (0..slots).map(|_| Arc::new(Inbox::new().expect("an eventfd"))).collect();
        assert!(directory.fill(inboxes.iter()));
        directory
    }

    fn owners(directory: &Directory) -> Vec<u16> {
        (0..20_000).map(|key: u32| directory.owner_of(&key).expect("there are members")).collect()
    }

    /// Of 20,000 keys; the bounds are ten standard deviations wide.
    #[test]
    fn keys_are_spread_evenly_and_only_as_many_move_as_must() {
        let directory = directory(8);
        assert_eq!(directory.owner_of(&1), None, "nobody is there yet");
        (0..4).for_each(|slot| directory.join(slot));
        let four = owners(&directory);
        for slot in 0..4 {
            let count = four.iter().filter(|owner| **owner == slot).count();
            assert!((4400..5600).contains(&count), "slot {slot} has {count} of 20,000 keys");
        }
        directory.join(6);
        let five = owners(&directory);
        let moved: Vec<_> = four.iter().zip(&five).filter(|(before, after)| before != after).collect();
        assert!(moved.iter().all(|(_, after)| **after == 6), "no key moves between those that stay");
        assert!((3400..4600).contains(&moved.len()), "a fifth moves: {} of 20,000", moved.len());
        directory.leave(6);
        assert_eq!(owners(&directory), four, "they come back");
        directory.leave(1);
        let three = owners(&directory);
        assert!(four.iter().zip(&three).all(|(before, after)| *before == 1 || before == after));
    }

    #[test]
    fn a_generation_that_is_given_up_and_comes_back_is_taken_off_once() {
        let directory = Arc::new(directory(2));
        let (hung, healthy) = (directory.at_work(), directory.at_work());
        let asking = hung.asking();
        asking.end();
        assert!(!directory.is_quiet(), "the other may ask");
        drop(hung);
        asking.end();
        assert!(!directory.is_quiet(), "it has been taken off already");
        drop(healthy);
        assert!(directory.is_quiet());
    }

    #[test]
    fn a_message_goes_to_the_inbox_that_is_in_the_slot_now() {
        let directory = directory(1);
        let second = Arc::new(Inbox::new().expect("an eventfd"));
        second.open();
        let refusal = |slot| directory.post(slot, Job::Closure(Box::new(|_| {}))).err().map(|(refusal, _)| refusal);
        assert_eq!(refusal(0), Some(Refusal::Down), "the first was never opened");
        directory.seat(0, &second);
        assert_eq!((refusal(0), second.jobs()), (None, 1));
        assert_eq!(refusal(1), Some(Refusal::Down), "there is no such slot");
        (0..2).for_each(|slot| directory.wake(TaskKey { slot, index: 7 }));
        assert_eq!((second.next_wake(), second.next_wake()), (Some(7), None));
        directory.clear();
        directory.wake(TaskKey { slot: 0, index: 7 });
        assert_eq!(refusal(0), Some(Refusal::Down));
    }

    #[test]
    fn one_server_has_it_and_when_that_has_ended_another_of_its_size() {
        let directory = directory(2);
        directory.join(1);
        let inboxes: Vec<_> = (0..3).map(|_| Arc::new(Inbox::new().expect("an eventfd"))).collect();
        assert!(!directory.fill(inboxes[..2].iter()), "the first has not ended");
        directory.clear();
        assert!(!directory.fill(inboxes.iter()), "there is no room for a third");
        assert!(directory.fill(inboxes[..2].iter()));
        assert_eq!(directory.members().count(), 0, "whom it knew are gone");
        inboxes[1].open();
        assert!(directory.post(1, Job::Closure(Box::new(|_| {}))).is_ok());
    }
}
