//! Components: state that every executor builds for itself before its start-up closure, registered with the builder.

use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Builder;
use crate::error::Kind;
use crate::executor::directory::Directory;
use crate::executor::slot::SlotSeat;
use crate::peers::Sharded;
use crate::shard::Shard;
use crate::{BoxError, Error};

/// Numbers components of all servers of the process.
static KEYS: AtomicU64 = AtomicU64::new(0);

/// A component's state, to be awaited.
pub(crate) type Build<'a> = Pin<Box<dyn Future<Output = Result<Rc<dyn Any>, BoxError>> + 'a>>;

/// Builds one executor's state, again for every generation; the type of it forgotten.
pub(crate) trait Component: Send + Sync {
    fn key(&self) -> u64;
    fn name(&self) -> &'static str;
    fn build(&self, shard: Shard) -> Build<'_>;
}

struct Registered<F> {
    key: u64,
    name: &'static str,
    init: F,
}

impl<F, T> Component for Registered<F>
where
    F: AsyncFn(Shard) -> Result<T, BoxError> + Send + Sync,
    T: 'static,
{
    fn key(&self) -> u64 {
        self.key
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn build(&self, shard: Shard) -> Build<'_> {
        Box::pin(async move { Ok(Rc::new((self.init)(shard).await?) as Rc<dyn Any>) })
    }
}

/// What a builder has registered, with the directory that its tokens look into.
#[derive(Clone, Default)]
pub(crate) struct Components {
    list: Vec<Arc<dyn Component>>,
    directory: Arc<Directory>,
}

impl Components {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<dyn Component>> {
        self.list.iter()
    }

    pub(crate) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// For a server that is started: where there is no token, copies of a builder need not share a directory.
    pub(super) fn of_one_server(&self) -> Self {
        if self.list.is_empty() { Self::default() } else { self.clone() }
    }

    /// Lets tokens find the executors.
    pub(super) fn seat(&self, seats: &[Arc<SlotSeat>]) -> Result<(), Error> {
        let refused = "sharded state belongs to one server at a time: a builder with such state was copied, and another copy \
                       runs, or had fewer executors; register it with each copy instead";
        let filled = self.directory.fill(seats.iter().map(|seat| &seat.inbox));
        if filled { Ok(()) } else { Err(Error::new(Kind::Usage, refused)) }
    }
}

impl Builder {
    /// Registers state that every executor builds for itself, and that is reached from anywhere by the token this returns.
    ///
    /// It is built before [`Builder::serve`]'s closure runs, again for every generation, in order of registration, and
    /// dropped at the generation's end in reverse, after the service. If one fails or panics, that start has failed.
    /// Messages of other executors are held back until all is built: a closure here that waits for an answer of another
    /// executor, whose closure waits for one of this, waits until [`Builder::start_timeout`] is over.
    ///
    /// The token belongs to the server that is started from this builder. Of copies of a builder that has registered state
    /// one may run at a time, and none with more executors than the first: a start that has failed can be tried again, and
    /// one that has ended be followed by another, which builds its state anew.
    ///
    /// ```
    /// use ringleader::{Body, Request, Response, Server, Shard, service_fn};
    /// use std::{cell::RefCell, collections::HashMap};
    ///
    /// let mut builder = Server::builder().listen("127.0.0.1:0");
    /// // One map for each executor, neither `Send` nor locked.
    /// let visits = builder.sharded("visits", async |_| Ok(RefCell::new(HashMap::<String, u64>::new())));
    /// let server = builder.serve(async move |shard: Shard| {
    ///     let visits = visits.clone();
    ///     Ok(service_fn(async move |request: Request| {
    ///         let path = request.uri().path().to_owned();
    ///         let owner = shard.peers().owner_of(&path);
    ///         let count = visits.call(owner, async move |visits| {
    ///             let mut visits = visits.borrow_mut();
    ///             let count = visits.entry(path).or_default();
    ///             *count += 1;
    ///             *count
    ///         });
    ///         Ok(Response::new(Body::from(count.await?.to_string())))
    ///     }))
    /// });
    /// # drop(server);
    /// ```
    pub fn sharded<T, F>(&mut self, name: &'static str, init: F) -> Sharded<T>
    where
        T: 'static,
        F: AsyncFn(Shard) -> Result<T, BoxError> + Send + Sync + 'static,
    {
        let key = KEYS.fetch_add(1, Ordering::Relaxed);
        self.components.list.push(Arc::new(Registered { key, name, init }));
        Sharded::new(Arc::clone(&self.components.directory), key, name)
    }
}
