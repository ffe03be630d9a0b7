//! glommio's task queues, for work that is to have a share of an executor's time and no more. Only with the feature
//! `glommio`; how futures get onto a queue and off it again, `executor::queues` knows.

use std::fmt;
use std::future::Future;
use std::rc::Rc;

use glommio::TaskQueueHandle;

use crate::Error;
use crate::error::Kind;
use crate::executor::core::Core;
use crate::executor::queues;
use crate::executor::tasks::OnPanic;
use crate::shard::{Task, joined};

/// What glommio makes of shares beyond is the nearest of these.
const SHARES: std::ops::RangeInclusive<usize> = 1..=1000;

/// A queue of glommio's for work that is to have its share of an executor's time: compaction beside requests, say. Made by
/// [`Shard::task_queue`](crate::Shard::task_queue); feature `glommio`.
///
/// What is spawned here is as safe as by [`Shard::spawn`](crate::Shard::spawn): a panic is its task's outcome and costs
/// nothing else, and what is not done at the generation's end is dropped then. It may await whatever a handler may, and
/// futures of [`glommio`]'s as well.
///
/// Shares are of time, and the choice is made when a future waits: one that computes has to give way every now and then,
/// with `glommio::executor().yield_task_queue_now().await`. In between it holds up its executor as a handler does. Shares
/// hold over 100 ms or so, then every queue starts anew; and not while files are read from disk, when they start
/// anew each millisecond.
///
/// A task that is given to glommio directly (`glommio::spawn_local`) has none of this: its panic costs the executor, and
/// with it what waits on glommio's queues is lost without being dropped.
///
/// ```
/// use ringleader::{Body, BoxError, Request, Response, Shard, glommio, service_fn, test::App};
///
/// let app = App::start(async |shard: Shard| {
///     let aside = shard.task_queue("sums", 50)?;
///     Ok(service_fn(async move |_: Request| {
///         let sum = aside.spawn(async {
///             let mut sum = 0_u64;
///             for round in 0..100 {
///                 sum += (round * 1000..(round + 1) * 1000).sum::<u64>();
///                 glommio::executor().yield_task_queue_now().await;
///             }
///             sum
///         });
///         Ok(Response::new(Body::from(sum.await?.to_string())))
///     }))
/// })?;
/// assert_eq!(app.get("/")?.body(), "4999950000");
/// # Ok::<(), BoxError>(())
/// ```
#[derive(Clone)]
pub struct TaskQueue {
    core: Rc<Core>,
    queue: TaskQueueHandle,
}

impl TaskQueue {
    pub(crate) fn of(core: &Rc<Core>, name: &str, shares: usize) -> Result<Self, Error> {
        if !SHARES.contains(&shares) {
            let (least, most) = (SHARES.start(), SHARES.end());
            let why = format!("making the task queue '{name}' with {shares} shares: they are {least} to {most}");
            return Err(Error::new(Kind::Usage, why));
        }
        let queue = queues::queue(name, shares).ok_or_else(|| {
            let most = queues::QUEUES_MAX;
            let why = format!(
                "making the task queue '{name}': this executor has {most} already, which is the most; make queues once, in \
                 the start-up closure, and not for each piece of work"
            );
            Error::new(Kind::Usage, why)
        })?;
        Ok(Self { core: Rc::clone(core), queue })
    }

    /// Runs a future on this executor, in this queue's share of the time. A panic becomes the task's error, and dropping the
    /// [`Task`] lets it run on, as with [`Shard::spawn`](crate::Shard::spawn).
    pub fn spawn<F: Future + 'static>(&self, future: F) -> Task<F::Output> {
        let (task, future) = joined(&self.core, future);
        self.core.spawn(queues::on_queue(&self.core, self.queue, future), OnPanic::Contain);
        task
    }
}

impl fmt::Debug for TaskQueue {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("TaskQueue")
    }
}
