//! What is run through every interleaving.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use loom::thread;

use crate::executor::directory::Directory;
use crate::executor::inbox::{Inbox, Job, Refusal};
use crate::executor::lookout::{Lookout, Presence};
use crate::receiver::Receiver;
use crate::sync::ROOM;

/// Two threads wake tasks of an executor that sleeps whenever it may. It has both in the end, and no sleep of it was
/// signalled twice.
pub fn two_wake_an_executor_that_falls_asleep() {
    let (_, mut receiver) = Receiver::new();
    let threads = [0, 1].map(|task| {
        let inbox = Arc::clone(&receiver.inbox);
        thread::spawn(move || inbox.wake(task))
    });
    let mut tasks = Vec::new();
    receiver.run(|taken| {
        tasks.extend(taken.wakes);
        tasks.len() == 2
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    tasks.sort_unstable();
    assert_eq!(tasks, [0, 1]);
    assert!(receiver.signals + receiver.bell.count() <= receiver.sleeps, "a sleep is signalled once");
}

/// Two threads post to an executor that has said that it sleeps, and does not come round to waking up meanwhile.
pub fn two_post_to_an_executor_that_sleeps() {
    let (directory, receiver) = Receiver::new();
    assert!(receiver.inbox.fall_asleep());
    let other = {
        let directory = Arc::clone(&directory);
        thread::spawn(move || assert!(directory.post(0, Job::Closure(Box::new(|_| {}))).is_ok()))
    };
    receiver.inbox.wake(0);
    other.join().unwrap();
    assert_eq!(receiver.bell.count(), 1, "one signal for all that is there");
    receiver.inbox.awake();
    let taken = receiver.take_in();
    assert_eq!((taken.wakes.len(), taken.jobs), (1, 1));
}

/// Two threads post as many jobs as there is room for, and one more, while an executor that does not sleep takes in once.
pub fn more_is_posted_than_there_is_room_for() {
    let (directory, receiver) = Receiver::new();
    let other = {
        let directory = Arc::clone(&directory);
        thread::spawn(move || taken(&directory, ROOM))
    };
    let refused = !posted(&directory);
    let run = receiver.take_in().jobs;
    let taken = other.join().unwrap() + usize::from(!refused);
    assert!(taken >= ROOM, "nothing is refused while there is room");
    assert!(taken <= ROOM + run, "nothing is taken without room");
    assert_eq!(receiver.inbox.jobs() + run, taken, "what was taken is there");
    let room = ROOM - receiver.inbox.jobs();
    assert_eq!(self::taken(&directory, room + 1), room, "there is room again for as many as have been run");
}

fn taken(directory: &Directory, jobs: usize) -> usize {
    (0..jobs).filter(|_| posted(directory)).count()
}

fn posted(directory: &Directory) -> bool {
    match directory.post(0, Job::Closure(Box::new(|_| {}))) {
        Ok(()) => true,
        Err((refusal, _)) => {
            assert_eq!(refusal, Refusal::Full);
            false
        }
    }
}

/// What becomes of a job.
#[derive(Default)]
struct Fate {
    run: AtomicU32,
    thrown_away: AtomicU32,
    refused: AtomicU32,
}

impl Fate {
    fn job(self: &Arc<Self>) -> Job {
        struct Token(Option<Arc<Fate>>);
        impl Drop for Token {
            fn drop(&mut self) {
                self.0.take().inspect(|fate| _ = fate.thrown_away.fetch_add(1, Ordering::Relaxed));
            }
        }
        let mut token = Token(Some(Arc::clone(self)));
        Job::Closure(Box::new(move |_| _ = token.0.take().inspect(|fate| _ = fate.run.fetch_add(1, Ordering::Relaxed))))
    }

    /// Posts the job. What is refused is neither run nor thrown away: the sender has it back.
    fn post(self: &Arc<Self>, post: impl FnOnce(Job) -> Option<Job>) {
        if let Some(job) = post(self.job()) {
            assert_eq!(self.counts(), [0, 0, 0]);
            self.refused.store(1, Ordering::Relaxed);
            std::mem::forget(job);
        }
    }

    fn counts(&self) -> [u32; 3] {
        [&self.run, &self.thrown_away, &self.refused].map(|count| count.load(Ordering::Relaxed))
    }
}

/// A thread posts a job while the executor takes in, ends its generation and closes its inbox. `with_second_look` is what
/// ringleader does; without it the poster does not ask whether its job came too late.
pub fn a_job_is_posted_while_the_inbox_is_closed(with_second_look: bool) {
    let (directory, receiver) = Receiver::new();
    let fate = Arc::new(Fate::default());
    let poster = {
        let (fate, inbox) = (Arc::clone(&fate), Arc::clone(&receiver.inbox));
        thread::spawn(move || match with_second_look {
            true => fate.post(|job| directory.post(0, job).err().map(|(_, job)| job)),
            false => fate.post(|job| inbox.post(job).err().map(|(_, job)| job)),
        })
    };
    receiver.take_in();
    receiver.inbox.close();
    poster.join().unwrap();
    assert_eq!(fate.counts().iter().sum::<u32>(), 1, "run, thrown away or refused: one of them, once");
    assert_eq!(receiver.inbox.jobs(), 0);
}

/// The same when the supervisor closes the inbox of an executor that hangs, and comes back just then.
pub fn a_job_is_posted_while_two_close_the_inbox() {
    let (directory, receiver) = Receiver::new();
    let fate = Arc::new(Fate::default());
    let poster = {
        let fate = Arc::clone(&fate);
        thread::spawn(move || fate.post(|job| directory.post(0, job).err().map(|(_, job)| job)))
    };
    let supervisor = close_elsewhere(&receiver.inbox);
    receiver.inbox.close();
    supervisor.join().unwrap();
    poster.join().unwrap();
    assert_eq!(fate.counts().iter().sum::<u32>(), 1, "thrown away or refused: one of them, once");
}

pub(crate) fn close_elsewhere(inbox: &Arc<Inbox>) -> thread::JoinHandle<()> {
    let inbox = Arc::clone(inbox);
    thread::spawn(move || inbox.close())
}

/// Two parked executors get something to do while the supervisor goes to sleep. It stays up, or one of them tells it.
pub fn two_executors_get_up_while_the_supervisor_falls_asleep() {
    let lookout = Lookout::new();
    let executors = [0, 1].map(|_| Arc::new(Presence::new(&lookout)));
    executors.iter().for_each(|executor| executor.park());
    let threads = executors.clone().map(|executor| thread::spawn(move || executor.rouse()));
    let dozes = lookout.doze(executors.iter().map(Arc::as_ref));
    let told = threads.into_iter().map(|thread| thread.join().unwrap()).filter(|told| *told).count();
    assert!(told <= 1, "who sleeps is woken once");
    assert!(told == 1 || !dozes, "nobody looks, and nobody says so");
    assert!(!lookout.doze(executors.iter().map(Arc::as_ref)), "both are up");
}
