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
//! - The **supervisor** is one plain thread. It starts, watches, restarts ([`RestartPolicy`]) and stops executors.
//!
//! State is therefore **per executor**: with four executors the counter above exists four times, and a client that comes
//! back on a new connection may meet another one. State for the whole process is made outside of the closure and captured,
//! as an `Arc` or whatever else may be shared between threads; it survives restarts.
//!
//! # What is `Send`
//! | | |
//! |---|---|
//! | the start-up closure | `Send + Sync`: every executor calls it |
//! | the [`Service`] it returns, its futures, its response bodies | need not be |
//! | [`Shard`], [`Task`] | not: bound to their executor |
//! | closures of [`Shard::spawn_blocking`] and what they return; [`Blocking`] | `Send` |
//! | [`ShardLocal`], a handle to a value of one executor, whatever that is | `Send`, `Sync` and `Clone`; used elsewhere it panics |
//! | [`Sleep`] | `Send`, for futures that must be; polled elsewhere than on its executor it panics |
//! | messages to other executors and their answers; [`Peers`], [`Sharded`], [`Call`] | `Send`; what they meet there need not be |
//! | [`Server`], [`Running`], [`Handle`], [`Order`] | `Send`; [`Handle`] is `Clone`, too |
//!
//! An executor is one thread: a handler that computes or blocks for long holds up every connection of it.
//! [`Shard::spawn_blocking`] takes such work elsewhere.
//!
//! # Between executors
//! [`Builder::sharded`] registers state that every executor has one of; its token, a [`Sharded`], runs a closure where a
//! part of it is, from any executor, thread or runtime, and brings the answer back. [`Peers::owner_of`] says which executor a
//! key belongs to. Every message is fallible and none waits for room ([`PeerError`]).
//!
//! # Answering
//! With an async closure ([`service_fn`]), a type of one's own ([`Service`]), a hyper service ([`hyper`](fn@hyper)), a tower
//! service with its layers ([`tower`](fn@tower)) or an axum router (`axum`). Features, none of them by default:
//! - `axum`: the function of that name. axum's WebSockets are answered 501.
//! - `tokio`: `Builder::tokio`, with which `tokio::time`, `tokio::spawn` and what needs them work in handlers.
//!
//! # Starting and stopping
//! [`Server::run`] blocks until the end. [`Server::start`] gives an [`Order`], which is awaited on any async runtime or on
//! none ([`Order::wait`]), and resolves when every executor accepts connections, or with the reason why one does not.
//! [`Handle::stop`] drains or cuts off. The library installs no signal handler unless [`Builder::stop_on_signals`] or
//! [`Builder::stall_backtraces`] asks for it, no panic hook and no log subscriber, has no global state that two servers
//! would share, and never ends the process.
//! A stopped server has joined its threads and closed its descriptors; one eventfd per executor is leaked by glommio 0.9.
//!
//! # When something goes wrong
//! - A service's `Err` is logged and answered with 500; a [`Reject`] or a [`BodyError`] has a status of its own, so that `?`
//!   is right on both.
//! - A panic in a service is contained: it costs a 500 and its connection. [`PanicPolicy::Restart`] makes it end the
//!   generation instead, and so does the last of too many ([`Escalation`]). A panic in a [`Shard::spawn`]ed task, or in a
//!   closure of [`Shard::spawn_blocking`], is its owner's, who sees a [`TaskError`].
//! - A panic in a response's body breaks the connection off: a client never takes what it got for the whole.
//! - A panic or an error in a [`Shard::background`] task or in the start-up closure ends the generation.
//! - A panic on a task queue of glommio's (for those who use glommio by themselves) ends the generation and its thread;
//!   what waited on such queues is lost without being dropped. A future's `Drop` that panics there ends the process.
//! - [`install_panic_hook`] puts the place of each panic into the log.
//! - With `panic = "abort"`, and for a stack overflow, a double panic or a segmentation fault, there is no containment:
//!   the process ends.
//!
//! # Limits
//! Everything is bounded. Of a connection: [`HttpLimits`]. Of an executor: [`Builder::connections_max`],
//! [`Builder::backlog`] and, if asked for, [`Overload`]. Of a server: 1,024 executors. A client that does not read costs its socket's send buffer and what
//! its response body and hyper hold; one that sends what nobody reads costs 192 KiB at most, then TCP holds it back.
//!
//! # Reading order
//! [`Server`] and [`Builder`] (what to configure), [`Shard`] (what the start-up closure gets), [`Service`], [`Body`] and
//! [`Reject`] (answering), [`Handle`] and [`Stop`] (what the owner holds), [`Files`] (static files). Of the source:
//! `server`, `executor::slot`, `executor::generation`, `net::driver`, `net::ring`, `protocol::http1`, `supervisor`;
//! ARCHITECTURE.md follows one connection through them.
//!
//! # Requirements
//! Linux 6.1 or later with io_uring allowed (containers often block it), 512 KiB of locked memory, Rust 1.88. A start without
//! them fails with a sentence that says what is missing and what to do.
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
mod order;
mod panics;
mod peers;
mod protocol;
mod server;
mod service;
mod settings;
mod shard;
mod shard_local;
mod steering;
mod supervisor;
mod sys;
mod systemd;
mod time;
mod upgrade;

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
pub use server::{Builder, Executors, Listen, RestartPolicy, Server, Steering};
pub use service::{Reject, Service, ServiceFn, service_fn};
pub use settings::{Escalation, HttpLimits, Overload, PanicPolicy};
pub use shard::{Blocking, Draining, Shard, SlotId, Task, TaskError};
pub use shard_local::ShardLocal;
pub use supervisor::policy::{HangPolicy, Scaling};
pub use time::{Elapsed, Sleep, Timeout};

/// An error of a user's.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A request; its head is [`http::Request`]'s.
pub type Request<B = Body> = http::Request<B>;
/// A response; its head is [`http::Response`]'s.
pub type Response<B = Body> = http::Response<B>;

/// Raises this process's limits on open files and locked memory as far as it may, for a program that is a server and
/// nothing else. The library never does so by itself.
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
pub fn parse_cpu_list(text: &str) -> Result<Vec<usize>, String> {
    sys::affinity::parse_cpu_list(text)
}
