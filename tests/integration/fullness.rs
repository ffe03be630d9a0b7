//! What happens when an executor has as many connections as it may.

use ringleader::{Builder, Shard, service_fn};

use crate::support::{Client, Site, echo, eventually, local};

const EXECUTORS: usize = 4;
const EACH: u64 = 8;

fn site() -> Site {
    started(local(EXECUTORS))
}

fn started(builder: Builder) -> Site {
    let builder = builder.connections_max(EACH);
    Site::start(builder.serve(async |_: Shard| Ok(service_fn(echo))))
}

/// Connects and asks until one is answered: one that meets a full executor's queue is closed.
fn connect(site: &Site) -> Option<Client> {
    let mut client = site.connect();
    client.try_send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").ok()?;
    client.try_answer().ok().map(|_| client)
}

#[test]
fn new_connections_go_to_executors_that_have_room() {
    // On a shared port the kernel knows nothing of who is full: others take what comes to them.
    for share in [false, true] {
        fill(&started(local(EXECUTORS).share_port(share)));
    }
}

fn fill(site: &Site) {
    let all = EXECUTORS * EACH as usize;
    let mut clients = Vec::new();
    let mut tries = 0;
    while clients.len() < all {
        clients.extend(connect(site));
        tries += 1;
        assert!(tries < all + 12, "{} of {all} places are taken after {tries} tries", clients.len());
    }
    assert!(site.stats().executors.iter().all(|executor| executor.open == EACH), "{:?}", site.stats());
}

#[test]
fn when_every_executor_is_full_more_are_closed_with_a_count_until_there_is_room() {
    let site = site();
    let mut clients = Vec::new();
    eventually("every place is taken", || {
        clients.extend(connect(&site));
        site.stats().executors.iter().all(|executor| executor.open == EACH)
    });
    assert!(connect(&site).is_none(), "there was no place, yet it was answered");
    // The client may see the close before the executor has counted it.
    eventually("it is counted", || site.stats().executors.iter().any(|executor| executor.shed >= 1));
    clients.truncate(EACH as usize);
    eventually("there is room again", || connect(&site).is_some());
}

/// Chance gives some executors more of them than they have places for, faster than the supervisor can steer them elsewhere.
#[test]
fn a_burst_that_is_dealt_unevenly_finds_the_places_that_there_are() {
    let site = site();
    let burst = EXECUTORS * EACH as usize;
    let mut clients: Vec<Client> = (0..burst).map(|_| site.connect()).collect();
    clients.iter_mut().for_each(|client| client.ask("/"));
    for client in &mut clients {
        assert_eq!(client.answer().status, 200, "{:?}", site.stats());
    }
    let shed: u64 = site.stats().executors.iter().map(|executor| executor.shed).sum();
    assert_eq!(shed, 0);
}
