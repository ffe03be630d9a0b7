//! What tests share: a server in this process, the command in another one, a client that sees every byte.

mod body;
mod client;
pub mod heap;
pub mod held;
pub mod log;
mod process;
pub mod stopped;

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use std::{net::SocketAddr, ops::Deref, thread};

use ringleader::{BoxError, Builder, Handle, Order, Request, Response, Running, Server, Stop};
use tokio::sync::Semaphore;

pub use body::{Check, Pattern, pattern};
pub use client::Client;
pub use process::{Process, alone, run, spawn};

/// The longest that anything awaited may take: far above what it does take on a busy machine, so that a test fails
/// only when something hangs.
pub const BOUND: Duration = Duration::from_secs(30);

/// A server of this process; it is stopped, and its end awaited, when the test is done with it.
pub struct Site {
    running: Option<Running>,
}

impl Site {
    pub fn start(server: Server) -> Self {
        Self { running: Some(settle(server.start()).expect("the server starts")) }
    }

    /// One that answers every request with `service`, on one executor.
    pub fn serving<F>(service: F) -> Self
    where
        F: AsyncFn(Request) -> Result<Response, BoxError> + Clone + Send + Sync + 'static,
    {
        Self::start(local(1).serve(async move |_| Ok(ringleader::service_fn(service.clone()))))
    }

    pub fn address(&self) -> SocketAddr {
        self.local_addrs()[0]
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.address())
    }

    /// The owner of the server, which is now the caller's to stop.
    pub fn into_running(mut self) -> Running {
        self.running.take().expect("it is taken once")
    }
}

impl Deref for Site {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        self.running.as_ref().expect("it is there until it is taken")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let (Some(running), false) = (&self.running, thread::panicking()) {
            settle(running.stop(Stop::Now)).expect("the server stops");
        }
    }
}

/// A server on a free port of the loopback.
pub fn local(executors: usize) -> Builder {
    Server::builder().listen("127.0.0.1:0").executors(executors)
}

/// Gives the body back.
pub async fn echo(request: Request) -> Result<Response, BoxError> {
    Ok(Response::new(request.into_body()))
}

/// An order's outcome, in time.
pub fn settle<T: Send + 'static>(order: Order<T>) -> Result<T, ringleader::Error> {
    let (sender, outcome) = mpsc::channel();
    thread::spawn(move || sender.send(order.wait()));
    outcome.recv_timeout(BOUND).expect("the order is carried out in time")
}

/// Waits for what only a look can tell, such as a counter.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < BOUND, "in vain waited until {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until nothing listens on an address any more. That takes a moment even when the listeners are closed, since
/// other tests fork: their children hold every descriptor until they exec.
pub fn expect_refusal(address: SocketAddr) {
    eventually("new connections are refused", || Client::try_connect(address).is_err());
}

/// A gate that handlers wait at until the test opens it, for good.
#[derive(Clone)]
pub struct Gate {
    semaphore: Arc<Semaphore>,
}

impl Gate {
    pub fn shut() -> Self {
        Self { semaphore: Arc::new(Semaphore::new(0)) }
    }

    pub fn open(&self) {
        self.semaphore.close();
    }

    pub async fn passed(&self) {
        // Closing the semaphore ends every wait, with an error.
        let _ = self.semaphore.acquire().await;
    }
}
