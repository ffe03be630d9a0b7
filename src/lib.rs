//! A thread-per-core, shared-nothing HTTP server runtime for Linux: one pinned io_uring executor per CPU, each with its
//! own listener, its own connections and its own state; a supervisor that restarts an executor which fails.
//!
//! ```no_run
//! use ringleader::{Body, Request, Response, Server, Shard, service_fn};
//! use std::cell::Cell;
//!
//! fn main() -> Result<(), ringleader::Error> {
//!     let server = Server::builder().listen("127.0.0.1:8080").stop_on_signals().serve(async |shard: Shard| {
//!         // Runs once on every executor: what is made here is that executor's own.
//!         let (id, hits) = (shard.id(), Cell::new(0_u64));
//!         Ok(service_fn(async move |_: Request| {
//!             hits.set(hits.get() + 1);
//!             Ok(Response::new(Body::from(format!("executor {id}: request {}\n", hits.get()))))
//!         }))
//!     });
//!     server.run().map(drop)
//! }
//! ```
//!
//! # The model
//! - A **slot** is a permanent place: a number, a CPU, a listening socket for each address. Slots are made at the start and
//!   stay until the server stops. The kernel chooses a slot for each new connection ([`Steering`]).
//! - An **executor** lives in each slot: one pinned thread that accepts from the slot's listeners and serves what it has
//!   accepted, to the end. Connections do not move between executors, and nothing on the way of a request is shared.
//! - A **generation** is one life of an executor's state. The start-up closure given to [`Builder::serve`] runs at its
//!   beginning, and all that the closure made is dropped at its end. If an executor fails, its connections are closed and
//!   the next generation begins in the same slot, with whatever waits in its listeners' queues.
//! - The **supervisor** is one plain thread. It starts, watches, restarts ([`RestartPolicy`]) and stops executors, takes
//!   what waits for one that stalls to others, and changes their number ([`Scaling`]).
//!
//! State is therefore **per executor**: with four executors the counter above exists four times, and a client that comes
//! back on a new connection may meet another one.
//!
//! # What is `Send`
//! | | |
//! |---|---|
//! | the start-up closure | `Send + Sync`: every executor calls it |
//! | the [`Service`] it returns, its futures, its response bodies | need not be |
//! | [`Shard`], [`Task`] | not: bound to their executor |
//! | [`Body`], [`Connection`] | `Send`, so that a request can be passed on to where it has to be |
//! | closures of [`Shard::spawn_blocking`] and what they return; [`Blocking`] | `Send` |
//! | [`ShardLocal`], a handle to a value of one executor, whatever that is | `Send`, `Sync` and `Clone`; used elsewhere it panics |
//! | [`Sleep`], [`Draining`] | `Send`, for futures that must be; polled elsewhere than on its executor it panics |
//! | messages to other executors and their answers; [`Peers`], [`Sharded`], [`Call`] | `Send`; what they meet there need not be |
//! | [`Server`], [`Running`], [`Handle`], [`Order`] | `Send`; [`Handle`] is `Clone`, too |
//!
//! An executor is one thread: a handler that computes or blocks for long holds up every connection of it.
//! [`Shard::spawn_blocking`] takes such work elsewhere. The thread is pinned to its CPU and blocks SIGPIPE, which threads and
//! processes that are made in handlers or the start-up closure inherit: make them in [`Shard::spawn_blocking`] as well.
//!
//! # Where state goes
//! | it belongs to | it is | it lives |
//! |---|---|---|
//! | one executor | made in the start-up closure and captured by the service: `Cell`, `RefCell`, `Rc` | as long as the generation |
//! | one executor, reached from others | registered with [`Builder::sharded`], reached by a [`Sharded`] token | as long as the generation |
//! | one executor, behind a handle that must be `Send` (axum's `State`) | in a [`ShardLocal`] | as long as the generation |
//! | the whole process | made outside and captured by the start-up closure: `Arc`, atomics, `Mutex` | as long as the server; it survives restarts |
//! | a request | in the handler's future | until it is answered, or its client has gone ([`HttpLimits::half_close_timeout`]) |
//!
//! Do not hold a borrow of a `RefCell` over an `.await`: other requests of the executor run meanwhile.
//!
//! # Between executors
//! [`Builder::sharded`] registers state that every executor has one of; its token, a [`Sharded`], runs a closure where a
//! part of it is, from any executor, thread or runtime, and brings the answer back. [`Peers::owner_of`] says which executor a
//! key belongs to. Every message is fallible and none waits for room ([`PeerError`]).
//!
//! # Answering
//! A service is an async closure ([`service_fn`]) or a type with [`Service`]. It gets a [`Request`] whose [`Body`] arrives
//! as it is read, with limits of size and time; it returns a [`Response`] with a [`Body`] (bytes, a file of [`Files`]) or
//! any other `http_body::Body`, or an error: a [`Reject`] and a [`BodyError`] know their status, so that `?` is right on
//! both. What was refused for want of room is answered with 503 and `Retry-After`: a [`TaskError`] that
//! [is overloaded](TaskError::is_overloaded), [`PeerError::Full`] and [`PeerError::Down`]. Any other is logged and answered
//! with 500.
//!
//! A hyper service ([`hyper`](fn@hyper)), a tower service with its layers ([`tower`](fn@tower)) and an axum router (`axum`)
//! can be served, too. Features, of which only `cli` is on by default:
//! - `axum`: the function of that name. axum's WebSockets are answered 501.
//! - `cli`: the command `ringleader`, and the crates that only it needs. It adds nothing to the library: embedders leave it
//!   out, with `default-features = false`.
//! - `glommio`: `Shard::task_queue`, for work that is to have its share of an executor's time and no more; and the module
//!   `glommio`, which is glommio 0.9.
//! - `tokio`: `Builder::tokio`, with which `tokio::time`, `tokio::spawn` and what needs them work in handlers.
//!
//! # Starting and stopping
//! [`Server::run`] blocks until the end. [`Server::start`] gives an [`Order`], which is awaited on any async runtime or on
//! none ([`Order::wait`]), and resolves when every executor accepts connections, or with the reason why one does not.
//! [`Handle::stop`] drains or cuts off; a dropped [`Running`] cuts off without waiting.
//!
//! Inside of a tokio program, or of any other:
//!
//! ```
//! use std::time::Duration;
//! use ringleader::{Body, Request, Response, Server, Stop, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
//! let server = Server::builder().listen("127.0.0.1:0").executors(1).serve(async |_| {
//!     Ok(service_fn(async |_: Request| Ok(Response::new(Body::from("hello")))))
//! });
//! let running = server.start().await?;
//! println!("serving on {:?}", running.local_addrs());
//! // ... until the program is to end:
//! let exit = running.stop(Stop::Drain(Duration::from_secs(10))).await?;
//! assert!(exit.drained);
//! # Ok::<(), ringleader::Error>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The library installs no signal handler unless one is asked for ([`Builder::stop_on_signals`],
//! [`Builder::upgrade_on_signal`], [`Builder::reload_on_signal`], [`Builder::stall_backtraces`]), no panic hook and no log
//! subscriber, and never ends the process by itself ([`HangPolicy::Abort`] does, if it is chosen). Two servers in one
//! process share nothing; [`Builder::name`] tells their threads and log lines apart. Port 0 takes a free port, which
//! [`Handle::local_addrs`] names; [`mod@test`] has a client, a way to call a service without any socket, and faults on order.
//!
//! A stopped server has closed its descriptors and joined its threads, but for those of its executors: they wait, idle and
//! without anything of the server, for the next one of the process, since an executor of glommio 0.9 that ends leaks. As
//! many stay as were ever in use at once. What a program keeps in its own thread-locals there stays, too, and a thread
//! that it has confined (seccomp, Landlock, a namespace) is confined in the next server, as one that it has not is not.
//!
//! # When something goes wrong
//! | | costs | configured by |
//! |---|---|---|
//! | a service's `Err` | a 500, or the status it knows | |
//! | a panic in a handler | a 500 and its connection | [`Builder::panics`]: its executor's generation instead |
//! | a panic in a response's body | its connection, broken off: a client never takes what it got for the whole | the same |
//! | many contained panics | the generation | [`Builder::escalation`]: more than 100 in 10 s |
//! | a panic in a [`Shard::spawn`]ed task or a [`Shard::spawn_blocking`] closure | it alone; its owner sees a [`TaskError`] | |
//! | a panic or an error in a [`Shard::background`] task or in the start-up closure | the generation | [`Builder::restart`] |
//! | a generation's end | its connections; what waits in the listeners' queues is served by the next one, at once at first, then after 100 ms and up to 15 s | [`Builder::restart`] |
//! | five failures of a slot within 30 s | the slot (quarantine); when none is left, the server ends with an error | [`Builder::restart`] |
//! | a turn of more than 100 ms (a stall) | new connections go to other executors, and those in its queue are handed to them | [`Builder::stall_limit`], [`Builder::stall_backtraces`] |
//! | a turn of more than 30 s (a hang) | the executor's connections and its thread, which is left behind; another takes the slot | [`Builder::hang`] |
//! | too much to do | nothing by default; requests refused with 503 | [`Builder::overload`] |
//! | a new binary | nothing: it takes over the listeners and this one drains | [`Handle::upgrade`], [`Builder::upgrade_on_signal`] |
//!
//! - A panic of a task that was given to glommio directly (`glommio::spawn_local`, by those who name glommio) ends the
//!   generation and its thread; what waited on glommio's queues is lost without being dropped. A future's `Drop` that panics
//!   there ends the process. `Shard::task_queue` (feature `glommio`) has queues without these risks.
//! - [`install_panic_hook`] puts the place of each panic into the log.
//! - With `panic = "abort"`, and for a stack overflow, a double panic or a segmentation fault, there is no containment:
//!   the process ends.
//!
//! [`Handle::stats`] tells what each executor is doing ([`ExecutorState`]) and has done; [`Stats::ready`] and
//! [`Shard::is_ready`] are for load balancers. [`Handle::scale`] changes the number of executors by order, [`Builder::scaling`] by load.
//!
//! # Limits
//! Everything is bounded.
//!
//! | of | bound | default |
//! |---|---|---|
//! | a request's head | [`HttpLimits::header_bytes_max`], [`HttpLimits::headers_max`], [`HttpLimits::header_timeout`] | 32 KiB, 100 fields, 10 s |
//! | a request's body | [`HttpLimits::body_bytes_max`], [`HttpLimits::body_timeout`] between two pieces | 1 MiB, 60 s |
//! | a client that does not read its answer | [`HttpLimits::send_timeout`] | 60 s |
//! | an idle connection | [`HttpLimits::idle_timeout`] | 75 s |
//! | an executor's connections | [`Builder::connections_max`] | what the limit on open files leaves |
//! | connections that wait for it | [`Builder::backlog`] | 4,096, or `somaxconn` |
//! | its requests in flight, their delay | [`Overload`] | none |
//! | calls of other executors | 4,096 wait, 65,536 have begun: [`PeerError::Full`] beyond | |
//! | blocking closures of a server | [`Builder::blocking_threads_max`], [`Builder::blocking_queue_max`] | 64 run, 1,024 wait |
//! | a start-up closure | [`Builder::start_timeout`] | 30 s |
//! | a drain | [`Builder::drain_timeout`], [`Stop::Drain`] | 30 s |
//! | a server's executors | [`Builder::executors`] | one per CPU; 1,024 at most |
//!
//! A client that does not read costs its socket's send buffer and what its response body and hyper hold; one that sends
//! what nobody reads costs 192 KiB at most, then TCP holds it back.
//!
//! # Examples, by question
//! In the repository's `examples/`:
//!
//! | | |
//! |---|---|
//! | How do I answer requests, read a body, refuse one? | `hello` |
//! | Where does state go, and who shares it? | `executor_state` |
//! | How does a request reach the executor that has what it asks for? | `sharded_kv` |
//! | How do I serve files? | `static_files` |
//! | How do I run two servers in one process, stop them by hand, read their counters? | `two_servers` |
//! | How do I run something beside the requests? Timers and timeouts? | `background` |
//! | How do I keep work on the side from slowing requests down? | `task_queues` |
//! | How do I call what blocks, or compute for long? | `blocking` |
//! | How do I run a server inside my tokio program, and stop it gracefully? | `in_tokio` |
//! | How do I serve my axum application, with all it needs of tokio? | `axum_app` |
//! | How do I use what needs tokio, such as a database driver or an HTTP client, in a handler? | `tokio_client` |
//! | What does a panic cost, and how do I change that? | `panics` |
//! | How do I change the number of executors, and see what they do? | `scaling` |
//! | How do I test what I built on this? | `testing` |
//!
//! # Reading order
//! [`Server`] and [`Builder`] (what to configure), [`Shard`] (what the start-up closure gets), [`Service`], [`Body`] and
//! [`Reject`] (answering), [`Handle`] and [`Stop`] (what the owner holds), [`Files`] (static files). Of the source:
//! `server`, `executor::slot`, `executor::generation`, `net::driver`, `net::ring`, `protocol::http1`, `supervisor`;
//! ARCHITECTURE.md follows one connection through them.
//!
//! # Requirements
//! Linux 6.1 or later with io_uring allowed (containers often block it) and locked memory: 512 KiB at
//! least, 276 KiB for each executor. A start without them fails with a sentence that says what is missing and what to do.
//! Rust 1.88 or later; raising that is a minor version's matter.
#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod adapters;
mod blocking;
mod body;
mod error;
mod executor;
mod files;
mod handle;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
mod listen;
mod net;
mod oneshot;
mod order;
mod panics;
mod peers;
mod protocol;
mod rarely;
mod server;
mod service;
mod settings;
mod shard;
mod shard_local;
mod steering;
mod supervisor;
mod sync;
mod sys;
mod systemd;
#[cfg(feature = "glommio")]
mod task_queue;
pub mod test;
mod time;
mod upgrade;

#[cfg(feature = "glommio")]
pub use ::glommio;
#[cfg(feature = "axum")]
pub use adapters::{Axum, axum};
pub use adapters::{Hyper, Tower, hyper, tower};
pub use body::{Body, BodyError, Connection};
pub use error::Error;
pub use files::{FileBody, Files, FilesError, Job, Offload, Overloaded};
pub use handle::{ExecutorState, ExecutorStats, Exit, Handle, Running, Stats, Stop};
pub use http::{Method, StatusCode};
pub use order::Order;
pub use panics::install_panic_hook;
pub use peers::{Call, PeerError, Peers, Sharded};
pub use server::{Builder, Executors, Listen, Server, Steering};
pub use service::{Reject, Service, ServiceFn, service_fn};
pub use settings::{Escalation, HttpLimits, Overload, PanicPolicy};
pub use shard::{Blocking, Draining, Shard, SlotId, Task, TaskError};
pub use shard_local::ShardLocal;
pub use supervisor::policy::{HangPolicy, ReadinessPolicy, RestartPolicy, Scaling};
#[cfg(feature = "glommio")]
pub use task_queue::TaskQueue;
pub use time::{Elapsed, Sleep, Timeout};

/// An error of a user's.
///
/// ```
/// use ringleader::{BoxError, Reject, StatusCode};
///
/// /// `?` takes any error, and one that knows its status is answered with it.
/// fn number(text: &str) -> Result<u32, BoxError> {
///     if text.is_empty() {
///         return Err(Reject::new(StatusCode::BAD_REQUEST, "a number is missing").into());
///     }
///     Ok(text.parse()?)
/// }
/// ```
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A request; its head is [`http::Request`]'s.
pub type Request<B = Body> = http::Request<B>;
/// A response; its head is [`http::Response`]'s.
pub type Response<B = Body> = http::Response<B>;

/// What the command of this package needs beyond the interface, outside of its promises.
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod of_the_command {
    pub use crate::sys::poll::wait_writable;
}

/// Raises this process's limits on open files and locked memory as far as it may, for a program that is a server and
/// nothing else. The library never does so by itself.
///
/// ```
/// ringleader::raise_limits(); // in `main`, before the server is started
/// ```
pub fn raise_limits() {
    if let Err(error) = sys::limits::raise_nofile() {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
    if let Err(error) = sys::limits::raise_memlock() {
        tracing::debug!(%error, "the limit on locked memory stays as it is");
    }
}

/// Reads a list of CPUs as the kernel writes it: `0-3,8`.
///
/// # Errors
/// A sentence that says what is wrong with it.
///
/// ```
/// let cpus = ringleader::parse_cpu_list("0-2,8")?;
/// assert_eq!(cpus, [0, 1, 2, 8]);
/// let builder = ringleader::Server::builder().cpus(cpus);
/// # drop(builder);
/// # Ok::<(), String>(())
/// ```
pub fn parse_cpu_list(text: &str) -> Result<Vec<usize>, String> {
    sys::affinity::parse_cpu_list(text)
}
