//! How do I run two servers in one process, and stop them by hand?
//!
//! A public one and an internal one that reports on it. Nothing here touches signals; the internal server's `/stop` ends
//! both.
//!
//! ```sh
//! cargo run --example two_servers
//! curl http://127.0.0.1:8080/
//! curl http://127.0.0.1:8081/          # the public server's counters
//! curl http://127.0.0.1:8081/stop
//! ```

use std::sync::mpsc;
use std::time::Duration;

use ringleader::{Body, Error, Request, Response, Server, Stop, service_fn};

fn main() -> Result<(), Error> {
    let mut addresses = std::env::args().skip(1);
    let public = addresses.next().unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let internal = addresses.next().unwrap_or_else(|| "127.0.0.1:8081".to_owned());
    let public = Server::builder().name("public").listen(public).executors(2).serve(async |_| {
        Ok(service_fn(async |_: Request| Ok(Response::new(Body::from("hello from the public server\n")))))
    });
    // `wait` blocks; in an async program `.start().await` does the same on any runtime.
    let public = public.start().wait()?;

    let (stop, stopped) = mpsc::channel();
    let watched = public.handle();
    let internal = Server::builder().name("internal").listen(internal).executors(1).serve(async move |_| {
        let (watched, stop) = (watched.clone(), stop.clone());
        Ok(service_fn(async move |request: Request| {
            if request.uri().path() == "/stop" {
                stop.send(())?;
            }
            Ok(Response::new(Body::from(format!("{:#?}\n", watched.stats()))))
        }))
    });
    let internal = internal.start().wait()?;
    println!("public on {:?}, internal on {:?}", public.local_addrs(), internal.local_addrs());

    stopped.recv().expect("the internal server holds a sender");
    let drain = Stop::Drain(Duration::from_secs(5));
    // Both orders are under way before the first is waited for.
    let orders = [public.stop(drain), internal.stop(drain)];
    for order in orders {
        println!("{:?}", order.wait()?);
    }
    Ok(())
}
