//! How do I serve files?
//!
//! ```sh
//! cargo run --example static_files -- /usr/share/doc
//! curl -i http://127.0.0.1:8080/
//! curl -i -r 0-99 http://127.0.0.1:8080/bash/copyright
//! ```

use std::path::PathBuf;

use ringleader::{Files, Request, Server, service_fn};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    // Opened once, before anything has started: an executor that starts afresh serves the same directory as the others.
    let opened = Files::open(&root)?.listing(true);
    let address = std::env::args().nth(2).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    println!("serving {} on http://{address}", root.display());
    // Each download has its file open beside its connection.
    let builder = Server::builder().listen(address).descriptors_per_connection(2).stop_on_signals();
    let server = builder.serve(async move |_| {
        // Each executor has a descriptor of its own. What is read from a disk goes through its ring: a slow disk keeps
        // this request waiting and no other.
        let files = opened.try_clone()?;
        Ok(service_fn(async move |request: Request| Ok(files.respond(&request).await)))
    });
    server.run()?;
    Ok(())
}
