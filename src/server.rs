//! Building and starting a server: the main path, on one page ([`Server::start`]).

mod address;
mod beyond;
mod checks;
mod needs;
pub(crate) mod sharded;
mod supervision;

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::blocking::{self, Pool};
use crate::error::Kind;
use crate::executor::lookout::Lookout;
use crate::executor::slot::{Common, Report, Reports, SlotSeat};
use crate::executor::tasks::LocalFuture;
use crate::handle::{Exit, Running, Shared, Slot, Waiting};
use crate::listen::{self, Group, Inheritance};
use crate::net::stream::Stream;
use crate::order::Order;
use crate::protocol::http1::Http1;
use crate::service::Service;
use crate::settings::{Escalation, Host, HttpLimits, Overload, PanicPolicy, Settings, THREAD_KEEP_ALIVE};
use crate::shard::Shard;
use crate::steering::{self, Kernel, Members, Realise, Table};
use crate::supervisor::handover::{Handover, Reload};
use crate::supervisor::policy;
use crate::supervisor::post::{self, Message, Post};
use crate::supervisor::{self, signals};
use crate::sys::bind::ListenOptions;
use crate::sys::heartbeats::Heartbeats;
use crate::sys::{affinity, limits, membarrier, procfs};
use crate::upgrade::successor::Launch;
use crate::{BoxError, Error};

pub use address::Listen;

/// How the kernel chooses the executor of a new connection.
///
/// ```
/// // Connections of server-sent events stay for hours: new ones go where there are few.
/// let builder = ringleader::Server::builder().steering(ringleader::Steering::LeastLoaded);
/// # drop(builder);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Steering {
    /// By chance: spreads the connections of one client, too.
    #[default]
    Random,
    /// By a hash of addresses and ports: a retransmitted SYN meets the same executor.
    Hash,
    /// Preferably to executors with fewer open connections and less to do: for connections that live long.
    LeastLoaded,
}

/// How many executors. Made from a number, or from a range such as `2..=8`: then the server starts with the fewest, or
/// in an upgrade with as many as the old process has, and follows the load ([`Builder::scaling`]).
///
/// ```
/// let four = ringleader::Server::builder().executors(4);
/// let by_load = ringleader::Server::builder().executors(2..=8);
/// # drop((four, by_load));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Executors {
    min: usize,
    max: usize,
}

impl From<usize> for Executors {
    fn from(count: usize) -> Self {
        Self { min: count, max: count }
    }
}

impl From<RangeInclusive<usize>> for Executors {
    fn from(range: RangeInclusive<usize>) -> Self {
        Self { min: *range.start(), max: *range.end() }
    }
}

/// What a server is to be. Made by [`Server::builder`]; ends with [`Builder::serve`].
///
/// ```
/// use std::time::Duration;
/// use ringleader::{Body, Request, Response, Server, service_fn};
///
/// let server = Server::builder()
///     .name("api")
///     .listen("0.0.0.0:80")
///     .executors(4)
///     .cpus([0, 2, 4, 6])
///     .connections_max(20_000)
///     .descriptors_per_connection(2) // each has a file open while it is answered
///     .backlog(1024)
///     .keepalive(Some(Duration::from_secs(30)))
///     .user_timeout(Some(Duration::from_secs(60)))
///     .share_port(true) // with another process, for an experiment
///     .drain_timeout(Duration::from_secs(10))
///     .drain_delay(Duration::from_secs(5)) // a load balancer needs as long to notice
///     .start_timeout(Duration::from_secs(60))
///     .stop_on_signals()
///     .serve(async |_| Ok(service_fn(async |_: Request| Ok(Response::new(Body::from("hello"))))));
/// # drop(server);
/// ```
#[must_use = "a builder does nothing until `serve`"]
#[derive(Clone)]
pub struct Builder {
    name: String,
    listen: Vec<Listen>,
    executors: Option<Executors>,
    cpus: Option<Vec<usize>>,
    steering: Steering,
    policy: policy::Config,
    stale_after: Duration,
    connections_max: Option<u64>,
    descriptors_per_connection: u64,
    backlog: u32,
    keepalive: Option<Duration>,
    user_timeout: Option<Duration>,
    share_port: bool,
    listen_by_default: Option<Listen>,
    without_listeners: bool,
    signals: signals::Wanted,
    reload: Option<Reload>,
    successor: Option<Launch>,
    systemd: bool,
    stall_backtraces: bool,
    http: HttpLimits,
    overload: Overload,
    panics: PanicPolicy,
    escalation: Option<Escalation>,
    host: Host,
    trim_heap: bool,
    thread_keep_alive: Duration,
    blocking_threads_max: usize,
    blocking_queue_max: usize,
    components: sharded::Components,
}

/// The start-up closure's outcome, to be awaited.
pub(crate) type Boot<'a> = Pin<Box<dyn Future<Output = Result<Rc<dyn Connect>, BoxError>> + 'a>>;

/// Makes one executor's service, again for every generation; the type of it forgotten.
pub(crate) trait Factory: Send + Sync {
    fn boot(&self, shard: Shard) -> Boot<'_>;
}

/// Makes a connection's task.
pub(crate) trait Connect {
    fn connect(self: Rc<Self>, stream: Stream, peer: SocketAddr, listener: &Arc<str>) -> LocalFuture;
}

struct ServiceFactory<F>(F);

impl<F, S> Factory for ServiceFactory<F>
where
    F: AsyncFn(Shard) -> Result<S, BoxError> + Send + Sync,
    S: Service,
{
    fn boot(&self, shard: Shard) -> Boot<'_> {
        Box::pin(async move {
            let core = Rc::clone(shard.core());
            let service = (self.0)(shard).await?;
            Ok(Rc::new(Http1::new(core, service)) as Rc<dyn Connect>)
        })
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Builder")
            .field("name", &self.name)
            .field("listen", &self.listen)
            .field("executors", &self.executors)
            .field("steering", &self.steering)
            .field("policy", &self.policy)
            .field("panics", &self.panics)
            .field("escalation", &self.escalation)
            .field("overload", &self.overload)
            .field("http", &self.http)
            .finish_non_exhaustive()
    }
}

impl Builder {
    fn new() -> Self {
        Self {
            name: "ringleader".to_owned(),
            listen: Vec::new(),
            executors: None,
            cpus: None,
            steering: Steering::default(),
            policy: policy::Config::default(),
            stale_after: steering::STALE_AFTER,
            connections_max: None,
            descriptors_per_connection: 1,
            backlog: 4096,
            keepalive: Some(Duration::from_secs(60)),
            user_timeout: Some(Duration::from_secs(180)),
            share_port: false,
            listen_by_default: None,
            without_listeners: false,
            signals: signals::Wanted::default(),
            reload: None,
            successor: None,
            systemd: false,
            stall_backtraces: false,
            http: HttpLimits::default(),
            overload: Overload::default(),
            panics: PanicPolicy::default(),
            escalation: Some(Escalation::default()),
            host: Host::default(),
            trim_heap: false,
            thread_keep_alive: THREAD_KEEP_ALIVE,
            blocking_threads_max: blocking::THREADS_MAX,
            blocking_queue_max: blocking::QUEUE_MAX,
            components: sharded::Components::default(),
        }
    }

    /// Names the server's threads (`name-slot`, supervisor `name-sup`) and its log lines; at most 10 bytes of it show
    /// in thread names. Default `ringleader`.
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Adds an address to listen on; port 0 takes a free one. May be called more than once.
    pub fn listen(mut self, address: impl Into<Listen>) -> Self {
        self.listen.push(address.into());
        self
    }

    /// How many executors. Default: one for each CPU that the thread which starts the server may run on (its affinity, which
    /// is the process's unless somebody has pinned it), no more than the cgroup's quota pays for.
    /// More than there are CPUs is allowed; they share.
    pub fn executors(mut self, count: impl Into<Executors>) -> Self {
        self.executors = Some(count.into());
        self
    }

    /// The CPUs to pin executors to, in order, from the start again when there are more executors. Default, and the most:
    /// all that the thread which starts the server may run on.
    pub fn cpus(mut self, cpus: impl Into<Vec<usize>>) -> Self {
        self.cpus = Some(cpus.into());
        self
    }

    /// How the kernel chooses the executor of a new connection.
    pub fn steering(mut self, steering: Steering) -> Self {
        self.steering = steering;
        self
    }

    /// Connections open at once on one executor, 1 at least. When it has so many, new ones are steered to others and what
    /// waits in its queue is handed to them; where all are full they wait for a place in the kernel's queue, and after a
    /// second they are closed unanswered, since a client that waits without end learns nothing. Default: what the process's limit on
    /// open files leaves to each executor.
    pub fn connections_max(mut self, count: u64) -> Self {
        self.connections_max = Some(count);
        self
    }

    /// Descriptors that a connection takes in the limit on open files, itself included, 1 at least: what
    /// [`connections_max`](Self::connections_max) is computed with. Default 1; 2 where each request may open a file
    /// ([`Files`](crate::Files)) or a connection of its own (a proxy), since otherwise those fail first when clients are many.
    pub fn descriptors_per_connection(mut self, count: u64) -> Self {
        self.descriptors_per_connection = count;
        self
    }

    /// Connections that may wait for an executor to accept them, 1 at least. Default 4096; the kernel lowers it to `somaxconn`.
    pub fn backlog(mut self, count: u32) -> Self {
        self.backlog = count;
        self
    }

    /// Idle time after which TCP asks whether the client is still there; four unanswered probes close the connection.
    /// Default 60 s; `None` never asks.
    pub fn keepalive(mut self, idle: Option<Duration>) -> Self {
        self.keepalive = idle;
        self
    }

    /// How long sent bytes may stay unacknowledged. Default 180 s, which is what a client that reads 1 kB/s needs to
    /// open its window again; `None` is the kernel's own (about 15 minutes).
    pub fn user_timeout(mut self, limit: Option<Duration>) -> Self {
        self.user_timeout = limit;
        self
    }

    /// Lets other processes of this user listen on the same addresses; the kernel divides new connections among the
    /// executors of all by a hash. All of the processes have to be started so: one that was not steers, and keeps all
    /// connections. There is no steering then ([`steering`](Self::steering) other than random is a usage error), so what
    /// comes to an executor that is stalled, full or idle is handed to another. A process that ends resets what the kernel
    /// queues for it at that moment, unless the sysctl `net.ipv4.tcp_migrate_req` is 1.
    /// Default false: a second server is an error, not half of the traffic.
    pub fn share_port(mut self, share: bool) -> Self {
        self.share_port = share;
        self
    }

    /// Limits of HTTP/1.1 connections.
    pub fn http_limits(mut self, limits: HttpLimits) -> Self {
        self.http = limits;
        self
    }

    /// Threads for [`Shard::spawn_blocking`], of all executors together. Default 64; 1 at least, 32,768 at
    /// most.
    pub fn blocking_threads_max(mut self, count: usize) -> Self {
        self.blocking_threads_max = count;
        self
    }

    /// Closures that may wait for such a thread; more fail at once. Default 1,024; 0 lets none wait.
    pub fn blocking_queue_max(mut self, count: usize) -> Self {
        self.blocking_queue_max = count;
        self
    }

    /// Gives the start-up closure: it runs once on every executor, again for every generation, and returns that
    /// executor's service. What it makes lives on that executor alone, so none of it need be `Send`.
    pub fn serve<F, S>(self, start_up: F) -> Server
    where
        F: AsyncFn(Shard) -> Result<S, BoxError> + Send + Sync + 'static,
        S: Service,
    {
        Server { builder: self, factory: Arc::new(ServiceFactory(start_up)) }
    }
}

/// A server that can be started.
///
/// ```
/// use ringleader::{Body, Error, Request, Response, Server, Stop, service_fn};
///
/// fn server() -> Server {
///     Server::builder().listen("127.0.0.1:0").executors(1).serve(async |_| {
///         Ok(service_fn(async |_: Request| Ok(Response::new(Body::from("hello")))))
///     })
/// }
///
/// # let blocks = || -> Result<(), Error> {
/// server().run()?; // until a signal ends it, or nothing is left
/// # Ok(()) };
/// let running = server().start().wait()?; // to go on with something else
/// running.stop(Stop::Now).wait()?;
/// # Ok::<(), Error>(())
/// ```
#[must_use = "a server does nothing until `run` or `start`"]
pub struct Server {
    builder: Builder,
    factory: Arc<dyn Factory>,
}

impl Server {
    /// Starts to describe a server.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Starts the server and blocks this thread until it has ended.
    ///
    /// # Errors
    /// What [`Server::start`] says; and when every slot has been quarantined.
    pub fn run(self) -> Result<Exit, Error> {
        self.start().wait()?.join().wait()
    }

    /// Starts the server. The order is done when every executor's first generation accepts connections, or fails with
    /// the first reason why one does not, with everything taken down again. Later failures go to the restart policy.
    ///
    /// Unlike other orders this one is taken back by dropping it before its outcome has been taken, by a timeout, say: that
    /// is [`Stop::Now`](crate::Stop::Now). It does not wait; the addresses are free when the executors have ended, which
    /// those whose start-up closure blocks its thread do late.
    ///
    /// # Errors
    /// When the configuration cannot be ([`Error::is_usage`]: the message names the setting, what was given and what may
    /// be), the system lacks something, an address cannot be listened on, or a start-up closure fails, panics or takes too
    /// long. The message says what to do. Times and counts of 0 that could not work are refused, and never taken for
    /// "no limit": that is `None`.
    #[must_use = "dropped, the start is taken back: await it, or call `wait`"]
    pub fn start(self) -> Order<Running> {
        match self.try_start() {
            Ok(order) => order,
            Err(error) => Order::done(Err(error)),
        }
    }

    fn try_start(self) -> Result<Order<Running>, Error> {
        let mut inheritance = Inheritance::find(self.builder.systemd)?;
        let started = self.start_with(&mut inheritance);
        if let Err(error) = &started {
            inheritance.refuse(error);
        }
        started
    }

    fn start_with(self, inheritance: &mut Inheritance) -> Result<Order<Running>, Error> {
        let Self { builder, factory } = self;
        builder.check()?;
        let cpus = builder.executor_cpus()?;
        let mut warnings = Vec::new();
        builder.probe(cpus.len(), &mut warnings)?;
        membarrier::register();
        let connections_max = builder.room(cpus.len(), &mut warnings)?;
        // Before the executors, who write their heartbeats into its memory.
        let kernel = Kernel::probe(cpus.len() as u16, builder.realise()?);
        let mut groups = builder.bind(cpus.len(), inheritance, &mut warnings)?;
        let table = builder.table(&mut groups, cpus.len(), &kernel, &mut warnings)?;
        let places: Vec<_> = groups.iter().map(|group| (group.address, group.activated)).collect();
        let addresses = places.iter().map(|(address, _)| *address).collect();
        warnings.extend(supervision::containment_warning(cfg!(panic = "abort")));
        let settings = Arc::new(Settings {
            name: builder.name.clone(),
            connections_max,
            http: builder.http.clone(),
            overload: builder.overload.clone(),
            panics: builder.panics,
            escalation: builder.escalation,
            escalation_rest: builder.policy.restart.quarantine_window,
            host: builder.host.clone(),
            trim_heap: builder.trim_heap,
            thread_keep_alive: builder.thread_keep_alive,
        });
        let blocking = Arc::new(builder.blocking_pool());
        let (post, inbox) = post::post()
            .map_err(|error| Error::new(Kind::System, format!("making the supervisor's eventfd: {error}")))?;
        let components = builder.components.of_one_server();
        let common = Common {
            settings,
            factory,
            components,
            blocking: Arc::clone(&blocking),
            lookout: Lookout::new(),
            ready: Arc::default(),
            accepting: Arc::new(AtomicBool::new(inheritance.predecessor.is_none())),
        };
        let seats = seats(&cpus, groups, kernel.heartbeats(), &common, &post)?;
        common.components.seat(&seats)?;
        let slots = seats.iter().map(|seat| Slot::new(seat.cpu, Arc::clone(&seat.cells))).collect();
        let shared = Arc::new(Shared {
            addresses,
            warnings,
            steering: table.description(),
            slots,
            connections_max,
            ready: AtomicBool::new(false),
            threads_leaked: AtomicU64::new(0),
            post,
            exit: Mutex::new(Waiting::For(Vec::new())),
        });
        let handover = builder.handover(places, std::mem::take(inheritance));
        let started =
            supervisor::start(builder.supervision(cpus.len(), &common, handover), seats, table, shared, inbox);
        // Nobody else would.
        started.inspect_err(|_| common.components.directory().clear())
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Server").field("builder", &self.builder).finish_non_exhaustive()
    }
}

impl Builder {
    /// The CPU of each slot.
    fn executor_cpus(&self) -> Result<Vec<usize>, Error> {
        let available = affinity::available();
        let cpus = self.cpus.clone().unwrap_or_else(|| available.allowed.clone());
        if let Some(cpu) = cpus.iter().find(|cpu| !available.allowed.contains(cpu)) {
            let message = format!(
                "cannot pin an executor to CPU {cpu}: this thread may run on {:?} only (affinity, cpuset); choose from \
                 those, or start it with a wider taskset or AllowedCPUs=",
                available.allowed
            );
            return Err(Error::new(Kind::Usage, message));
        }
        let auto = if self.cpus.is_some() { cpus.len() } else { available.executors() };
        let count = self.executors.map_or(auto, |executors| executors.max);
        if count > usize::from(steering::SLOTS_MAX) {
            let most = steering::SLOTS_MAX;
            return Err(Error::new(Kind::Usage, format!("{count} executors were asked for: give 1 to {most}")));
        }
        Ok((0..count).map(|slot| cpus[slot % cpus.len()]).collect())
    }

    fn bind(
        &self,
        executors: usize,
        inheritance: &mut Inheritance,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<Group>, Error> {
        let asked = self.addresses(inheritance)?;
        let options = ListenOptions {
            backlog: self.backlog,
            keepalive: self.keepalive,
            user_timeout: self.user_timeout,
            v6_only: true,
            share_port: self.share_port,
        };
        if let Some(most) = limits::somaxconn().filter(|most| *most < self.backlog) {
            warnings.push(format!(
                "the kernel limits the listen backlog to {most} instead of {}: raise net.core.somaxconn",
                self.backlog
            ));
        }
        listen::open(&asked, executors, &options, inheritance, warnings)
    }

    /// Who steers. The program of a shared port would be all processes'.
    fn realise(&self) -> Result<Realise, Error> {
        match self.steering {
            _ if !self.share_port => Ok(Realise::Best),
            Steering::Random => Ok(Realise::Nothing),
            Steering::Hash | Steering::LeastLoaded => Err(Error::new(
                Kind::Usage,
                "a port that is shared with other processes cannot be steered by hash or load: the kernel spreads its \
                 connections over the executors of all of them; choose random steering, or do not share the port",
            )),
        }
    }

    fn table<'a>(
        &self,
        groups: &'a mut [Group],
        executors: usize,
        kernel: &Kernel,
        warnings: &mut Vec<String>,
    ) -> Result<Table, Error> {
        let name = match self.steering {
            Steering::Random => "random",
            Steering::Hash => "hash",
            Steering::LeastLoaded => "least-loaded",
        };
        let seed = std::process::id().wrapping_mul(0x9E37_79B9);
        let policy = steering::by_name(name, seed).expect("every variant of `Steering` names a policy");
        let steered = groups.iter_mut().filter(|group| group.can_be_steered(executors));
        let member = |group: &'a mut Group| {
            let sockets = group.sockets.take();
            Members { listeners: &group.listeners[..executors], sockets }
        };
        let members = steered.map(member).collect();
        let table = Table::new(policy, executors as u16, members, kernel)
            .map_err(|error| Error::new(Kind::System, format!("doubling a listener: {error}")))?;
        if table.replaces_programs() && procfs::cbpf_replacement_is_safe(&procfs::kernel_release()) == Some(false) {
            warnings.push(format!(
                "kernel {} can crash when a steering program is replaced under traffic (CVE-2026-52910): upgrade it",
                procfs::kernel_release()
            ));
        }
        Ok(table)
    }

    fn blocking_pool(&self) -> Pool {
        let bounds = blocking::Bounds {
            threads_max: self.blocking_threads_max,
            queue_max: self.blocking_queue_max,
            idle_max: blocking::IDLE_MAX,
        };
        Pool::new(&self.name, affinity::available().allowed, bounds)
    }

    /// How to supervise `slots` slots.
    fn supervision(&self, slots: usize, common: &Common, handover: Handover) -> supervisor::Supervision {
        let mut policy = self.policy.clone();
        if let Some(Executors { min, .. }) = self.executors.filter(|executors| executors.min < executors.max) {
            // No more than the slots, which are counted in u16.
            policy.slots_min = min.min(slots) as u16;
            // As many as have the load that this one is about to get.
            policy.slots_start = handover.predecessors_executors().map_or(policy.slots_min, NonZeroU16::get);
        }
        // Passing an executor over costs nothing, so it is done sooner than anything else is made of a long turn.
        let stale_after = self.stale_after.min(policy.stall_limit);
        supervisor::Supervision {
            name: self.name.clone(),
            policy,
            stale_after,
            signals: self.signals,
            handover,
            stall_backtraces: self.stall_backtraces,
            blocking: Arc::clone(&common.blocking),
            lookout: Arc::clone(&common.lookout),
        }
    }
}

/// One seat for each slot, with its listener of each group.
fn seats(
    cpus: &[usize],
    groups: Vec<Group>,
    heartbeats: &Arc<Heartbeats>,
    common: &Common,
    post: &Post,
) -> Result<Vec<Arc<SlotSeat>>, Error> {
    let dealt = listen::deal(groups, cpus.len());
    let dealt = dealt.map_err(|error| Error::new(Kind::System, format!("doubling a shared listener: {error}")))?;
    let mut seats = Vec::new();
    for ((slot, cpu), listeners) in cpus.iter().enumerate().zip(dealt) {
        let post = post.clone();
        // The supervisor outlives its slots' threads; those it has abandoned have nobody to tell.
        let reports: Reports = Arc::new(move |report: Report| post.send(Message::Report(report)));
        let slot = slot as u16;
        let seat = SlotSeat::new(slot, *cpu, common.clone(), reports, heartbeats.of(slot), listeners)
            .map_err(|error| Error::new(Kind::System, format!("making the inbox of executor {slot}: {error}")))?;
        seats.push(seat);
    }
    Ok(seats)
}
