//! What a server has to do with what is around it: a process that it hands over to, one that it takes over from, the
//! service manager, the runtime of its host. Options, and what follows from them.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use super::{Builder, Listen};
use crate::Error;
use crate::error::Kind;
use crate::listen::Inheritance;
use crate::supervisor::handover::Handover;
use crate::systemd::Notifier;
use crate::upgrade::successor::Launch;

impl Builder {
    /// Drains on SIGTERM and SIGINT, and stops at once on the second. Without this no signal is touched.
    ///
    /// Handlers that the program had for them are called as well. When the server has ended, the signals do again what they
    /// did before it, such as to end the process, unless a handler has been installed over the server's meanwhile: that stays.
    pub fn stop_on_signals(mut self) -> Self {
        self.signals.stop = true;
        self
    }

    /// Starts a new binary and hands over to it on SIGUSR2, as [`Handle::upgrade`](crate::Handle::upgrade) does by order.
    pub fn upgrade_on_signal(mut self) -> Self {
        self.signals.upgrade = true;
        self
    }

    /// How the new process of an upgrade is started. Default: as this one was, by the same name, so that what lies under
    /// it by then is run, with the same arguments. Its standard input is how it is spoken to; the first server it starts
    /// takes the listeners over.
    ///
    /// ```
    /// use std::process::Command;
    /// use ringleader::Server;
    ///
    /// let builder = Server::builder().upgrade_on_signal().upgrade_timeout(std::time::Duration::from_secs(20));
    /// let builder = builder.successor(|| {
    ///     let mut command = Command::new("/opt/server/current/bin/server");
    ///     command.arg("--port=80");
    ///     command
    /// });
    /// # drop(builder);
    /// ```
    pub fn successor(mut self, command: impl Fn() -> Command + Send + Sync + 'static) -> Self {
        self.successor = Some(Launch::Custom(Arc::new(command)));
        self
    }

    /// How long the new process of an upgrade may take until every executor of it accepts connections. Then it is killed,
    /// and this one goes on. Default 60 s, as tableflip's; [`Duration::MAX`] is no limit.
    pub fn upgrade_timeout(mut self, limit: Duration) -> Self {
        self.policy.upgrade_timeout = limit;
        self
    }

    /// Calls this on SIGHUP, on a thread of its own, and logs the sentences it returns: what has changed, and what cannot
    /// without a restart. One that panics is logged, and called again at the next signal.
    ///
    /// ```
    /// use ringleader::Server;
    ///
    /// let builder = Server::builder().reload_on_signal(|| {
    ///     // Takes effect where it is read: behind an `Arc` that the start-up closure has captured, say.
    ///     vec!["the log level stays as it is: it needs a restart".to_owned()]
    /// });
    /// # drop(builder);
    /// ```
    pub fn reload_on_signal(mut self, reload: impl Fn() -> Vec<String> + Send + Sync + 'static) -> Self {
        self.signals.reload = true;
        self.reload = Some(Arc::new(reload));
        self
    }

    /// Works with systemd, if it started this process: takes the listeners of its `.socket` units (`LISTEN_FDS`) and
    /// serves them besides the addresses given; tells it of readiness, reload, stop, status and a hand-over, and keeps its
    /// watchdog quiet (`NOTIFY_SOCKET`); and lets it keep the listeners over a crash (`FDSTORE`). Descriptors from 3 on are
    /// taken once in a process, by the first server that asks.
    ///
    /// ```
    /// use ringleader::Server;
    ///
    /// // What the unit's socket says; where there is none, by hand.
    /// let builder = Server::builder().systemd().listen_by_default("127.0.0.1:8080").stop_on_signals();
    /// # drop(builder);
    /// ```
    pub fn systemd(mut self) -> Self {
        self.systemd = true;
        self
    }

    /// An address to listen on if none is given otherwise, neither here nor by the service manager.
    pub fn listen_by_default(mut self, address: impl Into<Listen>) -> Self {
        self.listen_by_default = Some(address.into());
        self
    }

    /// Logs what a stalled executor is doing: the backtrace of its thread. Default: off.
    ///
    /// Takes the highest real-time signal that has no handler, for as long as the server runs. When an executor stalls, its
    /// thread gets this signal once; system calls that Linux never restarts (signal(7): `poll`, `nanosleep`) then return
    /// EINTR. On x86-64 and aarch64.
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringleader::Server;
    ///
    /// let builder = Server::builder().stall_limit(Duration::from_millis(50)).stall_backtraces(true);
    /// # drop(builder);
    /// ```
    pub fn stall_backtraces(mut self, log: bool) -> Self {
        self.stall_backtraces = log;
        self
    }

    /// Whether an idle executor asks glibc's allocator to give freed memory back to the system (`malloc_trim`), at its first
    /// rest and then whenever 256 connections have become idle for long ([`HttpLimits::hibernate_after`]). Default false:
    /// it is the whole process's heap, the program's own part as well, which then pays with page faults for what it uses
    /// again. A round takes about a microsecond for each free block, on an executor that has nothing to do, and holds the
    /// locks that allocations of other threads wait for meanwhile.
    ///
    /// Without it a freed block is reused, but its page stays with the process: an idle connection that has had a request
    /// costs up to 11 KiB of resident memory instead of 1 when many have become idle at once. `ringleader serve` has it on.
    ///
    /// [`HttpLimits::hibernate_after`]: crate::HttpLimits::hibernate_after
    ///
    /// ```
    /// let builder = ringleader::Server::builder().trim_heap(true); // a program that is nothing but a server
    /// # drop(builder);
    /// ```
    pub fn trim_heap(mut self, trim: bool) -> Self {
        self.trim_heap = trim;
        self
    }

    /// How long an executor's thread waits when its executor has been scaled down or its server has ended: for the slot that
    /// needs one next, of whichever server of the process. After that it ends, and with it all that it has. Default 60 s.
    /// [`Duration::ZERO`] is at once, [`Duration::MAX`] never.
    ///
    /// Meanwhile it holds four descriptors, a thread of glommio's and some 300 KiB, and takes no CPU time. But each end of
    /// an executor of glommio 0.9 leaves a descriptor and 1.5 KiB behind for good ([`Stats::descriptors_leaked`]). For a load
    /// that comes and goes this must not go on for ever: after as many ends as there were threads at once, all wait twice
    /// as long, and so on.
    ///
    /// [`Stats::descriptors_leaked`]: crate::Stats::descriptors_leaked
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringleader::Server;
    ///
    /// let once = Server::builder().thread_keep_alive(Duration::ZERO); // the only server there will be
    /// let often = Server::builder().thread_keep_alive(Duration::MAX); // one after the other, each test its own
    /// # drop((once, often));
    /// ```
    pub fn thread_keep_alive(mut self, wait: Duration) -> Self {
        self.thread_keep_alive = wait;
        self
    }

    /// Lets services use a tokio runtime: `tokio::time`, `tokio::spawn`, and what needs them (sqlx, reqwest, timeouts of
    /// tower-http) work in handlers, tasks and the start-up closure. Needs the feature `tokio`.
    ///
    /// What is spawned so runs on the runtime's threads; the executors stay as they are and only find the runtime, which
    /// they enter once a turn. Somebody must drive it: a `current_thread` one makes progress only while its owner is in
    /// `block_on`. Not for closures of [`Shard::spawn_blocking`](crate::Shard::spawn_blocking).
    ///
    /// Without this, such a call is a panic like any other of a handler's; its message names this option.
    ///
    /// ```
    /// use ringleader::{Body, Request, Response, Server, service_fn};
    /// use std::time::Duration;
    ///
    /// # let runtime = tokio::runtime::Runtime::new().unwrap();
    /// # let _entered = runtime.enter();
    /// let handle = tokio::runtime::Handle::current(); // in a `#[tokio::main]`
    /// let server = Server::builder().listen("127.0.0.1:0").tokio(handle).serve(async |_| {
    ///     Ok(service_fn(async |_: Request| {
    ///         tokio::time::sleep(Duration::from_millis(1)).await;
    ///         Ok(Response::new(Body::from("rested\n")))
    ///     }))
    /// });
    /// # drop(server);
    /// ```
    #[cfg(feature = "tokio")]
    pub fn tokio(mut self, handle: tokio::runtime::Handle) -> Self {
        self.host.tokio = Some(handle);
        self
    }
}

impl Builder {
    /// Does with no address to listen on: what is to be served comes from elsewhere.
    pub(crate) fn without_listeners(mut self) -> Self {
        self.without_listeners = true;
        self
    }

    /// The addresses asked for.
    pub(super) fn addresses(&self, inheritance: &Inheritance) -> Result<Vec<SocketAddr>, Error> {
        if self.listen.is_empty() && !self.without_listeners {
            inheritance.expect_usable()?;
        }
        let by_default =
            self.listen_by_default.iter().filter(|_| self.listen.is_empty() && !inheritance.has_activated());
        let found: Result<Vec<_>, _> = self.listen.iter().chain(by_default).map(Listen::resolve).collect();
        let addresses = found?.concat();
        if addresses.is_empty() && !inheritance.has_activated() && !self.without_listeners {
            return Err(Error::new(Kind::Usage, "no address to listen on was given"));
        }
        Ok(addresses)
    }

    pub(super) fn handover(&self, addresses: Vec<(SocketAddr, usize)>, inheritance: Inheritance) -> Handover {
        let mut notifier = self.systemd.then(Notifier::from_environment).flatten();
        if let (Some(notifier), true) = (&mut notifier, inheritance.predecessor.is_some()) {
            notifier.wait_for_turn();
        }
        let launch = self.successor.clone().unwrap_or_else(Launch::as_this_process);
        Handover::new(launch, addresses, inheritance, notifier, self.reload.clone())
    }
}
