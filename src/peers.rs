//! Messages between executors: closures that run where the state is, and their answers.
//!
//! Every message goes the same way, also one to the own executor: a job in the receiver's inbox, begun in its next turn.
//! This module makes the jobs; how the receiver is woken, and what becomes of messages when it ends, is `executor::inbox`'s.

mod call;

use std::cell::Cell;
use std::fmt;
use std::hash::Hash;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

pub use call::{Call, PeerError};

use crate::executor::core::{Core, Scene};
use crate::executor::directory::Directory;
use crate::executor::inbox::{CallKey, Errand, Job, Outstanding};
use crate::panics::caught;
use crate::protocol::answer::Contained;
use crate::shard::{Shard, SlotId};
use call::{Exchange, Promise};

/// The executors of a server, to send messages to. From [`Shard::peers`]; clone it and send it wherever you like. It does
/// not keep the server running.
///
/// # Messages
/// A message is a closure; it runs on the executor in the slot it was sent to, in one of that executor's next turns, also
/// when that is the executor that sends it. Those of one sender to one slot are begun in the order they were sent, calls and
/// [`sends`](Sharded::send) alike; one that waits for something lets later ones go before it then.
///
/// Sending never blocks and never waits: [`PeerError::Full`] and [`PeerError::Down`] are known at once. A slot whose
/// executor is starting takes messages, which run as soon as its [sharded](crate::Builder::sharded) state is built, before
/// its start-up closure is done; so start-up closures may call each other. One that drains takes messages until it ends, and
/// answers the calls it has before it does, within the drain's deadline. When a whole server drains, those that have
/// finished wait until all have, since a request of another one may need them.
///
/// # Owners
/// [`Peers::owner_of`] gives each key to one of the slots that are in use ([`Peers::iter`]), by rendezvous hashing, seeded by
/// chance for each server:
/// - When a slot is added to n others, 1 of n + 1 keys moves, to the new slot, and none moves between the others; when one is
///   taken away (by scaling, or quarantined) its keys go to the others evenly, and no other key moves.
/// - A restart moves nothing: while a failed executor waits for its restart it owns its keys, and calls to it are
///   [`PeerError::Down`]. Its state is made anew: what it held is gone.
/// - Nothing moves values along with their keys. After scaling, the new owner of a key has not heard of it, and the former
///   one, if it is still there, has a value that nobody asks for. So sharded state is a cache, or is read from elsewhere when
///   it is missing, unless the number of executors is fixed.
/// - Around such a change two executors may take different slots for a key's owner for as long as it takes to tell them, and
///   messages that are on their way run where they were sent.
///
/// ```
/// use ringleader::{Body, BoxError, Request, Response, Server, Shard, service_fn, test::App};
///
/// let app = App::with(Server::builder().executors(2), async |shard: Shard| {
///     Ok(service_fn(async move |request: Request| {
///         let peers = shard.peers();
///         let owner = peers.owner_of(request.uri().path());
///         let answered = peers.call(owner, async |there: Shard| there.id()).await?;
///         assert!(answered == owner && peers.iter().any(|slot| slot == owner));
///         Ok(Response::new(Body::from(format!("executor {answered}"))))
///     }))
/// })?;
/// assert_eq!(app.call_on(0, Request::get("/key").body(Body::empty())?)?.body(), app.call_on(1, Request::get("/key").body(Body::empty())?)?.body());
/// # Ok::<(), BoxError>(())
/// ```
#[derive(Clone)]
pub struct Peers(Arc<Directory>);

impl Shard {
    /// The executors of this server, this one included.
    #[must_use]
    pub fn peers(&self) -> Peers {
        Peers(Arc::clone(&self.core().directory))
    }
}

impl Peers {
    /// The slots in use, in order: those whose executor serves, starts, or is going to be restarted.
    #[must_use]
    pub fn iter(&self) -> std::vec::IntoIter<SlotId> {
        self.0.members().map(SlotId).collect::<Vec<_>>().into_iter()
    }

    /// The slot that a key belongs to. Costs a SipHash of the key and a multiplication or three for each slot.
    ///
    /// The same for equal keys on every executor of this server. Not the same in another process: do not store it.
    #[must_use]
    pub fn owner_of<K: Hash + ?Sized>(&self, key: &K) -> SlotId {
        // There are none before the server has started; then a call says so.
        SlotId(self.0.owner_of(key).unwrap_or(0))
    }

    /// Runs `message` on the executor in `to`, and brings its answer back. A panic in it costs nothing but the answer.
    pub fn call<R, F, Fut>(&self, to: SlotId, message: F) -> Call<R>
    where
        F: FnOnce(Shard) -> Fut + Send + 'static,
        Fut: Future<Output = R> + 'static,
        R: Send + 'static,
    {
        call(&self.0, to, message)
    }
}

impl IntoIterator for &Peers {
    type Item = SlotId;
    type IntoIter = std::vec::IntoIter<SlotId>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Debug for Peers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.0.members()).finish()
    }
}

fn call<R, F, Fut>(directory: &Directory, to: SlotId, message: F) -> Call<R>
where
    F: FnOnce(Shard) -> Fut + Send + 'static,
    Fut: Future<Output = R> + 'static,
    R: Send + 'static,
{
    let (exchange, call) = Call::new(message, directory.number());
    let job = Job::Call(Errand::new(exchange.clone()));
    if let Err((refusal, job)) = directory.post(to.0, job) {
        // Before the job's drop, which would call it lost.
        exchange.settle(Err(refusal.into()));
        drop(job);
    }
    call
}

impl<R, F, Fut> Outstanding for Exchange<F, R>
where
    F: FnOnce(Shard) -> Fut + Send + 'static,
    Fut: Future<Output = R> + 'static,
    R: Send + 'static,
{
    /// Keeps it as a task if it has to wait.
    fn begin(self: Arc<Self>, core: &Rc<Core>) {
        if core.calls.get() >= BEGUN_MAX {
            return self.settle(Err(PeerError::Full));
        }
        let Some(message) = Exchange::begin(&self) else { return };
        // A thread that was given up while it hung: the promise's drop says so.
        let (noted, promise) = (core.inbox.begin_call(self.clone()), Promise::new(self));
        let Some(key) = noted else { return };
        let (running, shard) = (Running::new(core, key), Shard::new(core));
        core.spawn_begun(Box::pin(async move {
            let outcome = Contained::new(async move { message(shard).await }).await.map_err(|panic| {
                running.core.contained(Scene::Message, panic);
                PeerError::Panicked
            });
            let core = running.end();
            promise.keep(outcome, &core.directory, core.slot);
        }));
    }

    fn lose(&self) {
        self.settle(Err(PeerError::Lost));
    }
}

/// Calls of one executor that have begun and wait for something. What others wait for beside it is theirs to bound, but an
/// executor whose backend has stopped would otherwise take in calls until its memory is gone: each is a task of some
/// hundred bytes.
const BEGUN_MAX: usize = if cfg!(test) { 64 } else { 65_536 };

/// A call that has been begun.
struct Running {
    core: Rc<Core>,
    key: CallKey,
}

impl Running {
    fn new(core: &Rc<Core>, key: CallKey) -> Self {
        add(&core.calls, 1);
        Self { core: Rc::clone(core), key }
    }

    fn end(self) -> Rc<Core> {
        Rc::clone(&self.core)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        add(&self.core.calls, -1);
        self.core.inbox.end_call(self.key);
    }
}

fn add(count: &Cell<usize>, difference: isize) {
    count.set(count.get().wrapping_add_signed(difference));
}

/// One `T` for each executor, which never moves; made by [`Builder::sharded`](crate::Builder::sharded). This token is
/// `Clone`, `Send` and `Sync` whatever `T` is. See [`Peers`] for what holds of every message.
///
/// ```
/// use std::{cell::Cell, rc::Rc};
/// use ringleader::{Body, BoxError, Request, Response, Server, Shard, service_fn, test::App};
///
/// let mut builder = Server::builder().executors(2);
/// let hits = builder.sharded("hits", async |_: Shard| Ok(Cell::new(0_u64)));
/// let app = App::with(builder, async move |shard: Shard| {
///     let hits = hits.clone();
///     Ok(service_fn(async move |_: Request| {
///         let mine = hits.local(&shard);
///         mine.set(mine.get() + 1);
///         let all = hits.call_all(async |hits: Rc<Cell<u64>>| hits.get()).await?;
///         let sum: u64 = all.into_iter().filter_map(|(_, hits)| hits.ok()).sum();
///         Ok(Response::new(Body::from(sum.to_string())))
///     }))
/// })?;
/// app.call_on(0, Request::new(Body::empty()))?;
/// assert_eq!(app.call_on(1, Request::new(Body::empty()))?.body(), "2");
/// # Ok::<(), BoxError>(())
/// ```
pub struct Sharded<T> {
    directory: Arc<Directory>,
    key: Key,
    state: PhantomData<fn(T) -> T>,
}

/// What a message takes along to find its state. Not the token: two executors that counted one directory's handles with
/// each message would pass the count to and fro.
#[derive(Clone, Copy)]
struct Key {
    number: u64,
    name: &'static str,
}

impl Key {
    fn state<T: 'static>(self, core: &Core) -> Rc<T> {
        let state = core.states.get(self.number).and_then(|state| state.downcast().ok());
        state.unwrap_or_else(|| {
            let name = self.name;
            panic!("this executor has no sharded state '{name}': it is another server's, or not built yet or any more")
        })
    }
}

impl<T> Clone for Sharded<T> {
    fn clone(&self) -> Self {
        Self { directory: Arc::clone(&self.directory), key: self.key, state: PhantomData }
    }
}

impl<T: 'static> Sharded<T> {
    pub(crate) fn new(directory: Arc<Directory>, key: u64, name: &'static str) -> Self {
        Self { directory, key: Key { number: key, name }, state: PhantomData }
    }

    /// The executors that have one: where messages go.
    #[must_use]
    pub fn peers(&self) -> Peers {
        Peers(Arc::clone(&self.directory))
    }

    /// This executor's own.
    ///
    /// # Panics
    /// On an executor of another server, and while those registered before this one are being built.
    #[must_use]
    pub fn local(&self, shard: &Shard) -> Rc<T> {
        self.key.state(shard.core())
    }

    /// Runs `message` with the `T` of the executor in `to`, and brings its answer back.
    pub fn call<R, F, Fut>(&self, to: SlotId, message: F) -> Call<R>
    where
        F: FnOnce(Rc<T>) -> Fut + Send + 'static,
        Fut: Future<Output = R> + 'static,
        R: Send + 'static,
    {
        let key = self.key;
        call(&self.directory, to, async move |shard: Shard| message(key.state(shard.core())).await)
    }

    /// The same on the executor of every slot in use ([`Peers::iter`]), with an outcome for each. The messages have been
    /// sent when this returns; the call itself does not fail.
    pub fn call_all<R, F, Fut>(&self, message: F) -> Call<Vec<(SlotId, Result<R, PeerError>)>>
    where
        F: FnOnce(Rc<T>) -> Fut + Clone + Send + 'static,
        Fut: Future<Output = R> + 'static,
        R: Send + 'static,
    {
        let one = |slot| (slot, self.call(slot, message.clone()));
        let calls: Vec<_> = self.peers().iter().map(one).collect();
        Call::joint(async move {
            let mut outcomes = Vec::with_capacity(calls.len());
            for (slot, call) in calls {
                outcomes.push((slot, call.await));
            }
            outcomes
        })
    }

    /// Runs `message` with the `T` of the executor in `to`, without an answer: nobody is told if it is lost or panics. The
    /// cheapest message.
    ///
    /// # Errors
    /// [`PeerError::Full`] and [`PeerError::Down`]: it was not sent.
    ///
    /// ```
    /// use std::cell::Cell;
    /// use ringleader::Sharded;
    ///
    /// /// A metric: if it cannot be sent it is not worth waiting for.
    /// fn count(hits: &Sharded<Cell<u64>>, key: &str) {
    ///     let owner = hits.peers().owner_of(key);
    ///     let _ = hits.send(owner, |hits| hits.set(hits.get() + 1));
    /// }
    /// ```
    pub fn send<F>(&self, to: SlotId, message: F) -> Result<(), PeerError>
    where
        F: FnOnce(&T) + Send + 'static,
    {
        let key = self.key;
        let job = Job::Closure(Box::new(move |core| {
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| message(&key.state(core)))) {
                core.contained(Scene::Message, caught(payload));
            }
        }));
        self.directory.post(to.0, job).map_err(|(refusal, _)| refusal.into())
    }
}

impl<T> fmt::Debug for Sharded<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Sharded").field(&self.key.name).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test::App;
    use crate::{Body, Request, Response, Server, service_fn};

    #[test]
    fn calls_that_have_begun_and_do_not_end_are_not_taken_without_bound() {
        let app = App::with(Server::builder().executors(1), async |shard: Shard| {
            Ok(service_fn(async move |_: Request| {
                let (peers, here) = (shard.peers(), shard.id());
                let begun: Vec<_> = (0..BEGUN_MAX)
                    .map(|_| {
                        peers.call(here, async |shard: Shard| shard.sleep(std::time::Duration::from_secs(3600)).await)
                    })
                    .collect();
                let one_more = peers.call(here, async |_| ()).await;
                drop(begun);
                Ok(Response::new(Body::from(format!("{one_more:?}"))))
            }))
        });
        let app = app.expect("it starts");
        assert_eq!(app.get("/").expect("it answers").body(), "Err(Full)");
    }
}
