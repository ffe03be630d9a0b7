//! The driver on loopback: an echo on one connection, and on 64 that all speak at once.
//!
//! Held equal: messages of 64 bytes, TCP_NODELAY, the same client on a thread of its own. The rival is a thread that
//! blocks in read(2) and write(2): for one connection the least there is, for 64 it would take 64 threads, so there
//! the figures stand alone. The client's own work is part of every figure.

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use ringleader::internals::Echo;
use support::compare;

const MESSAGE: [u8; 64] = [7; 64];

fn pairs(count: usize) -> (Vec<TcpStream>, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let address = listener.local_addr().expect("bound");
    let pair = |_| {
        let client = TcpStream::connect(address).expect("the listener is there");
        let (server, _) = listener.accept().expect("a connection waits");
        client.set_nodelay(true).expect("TCP");
        server.set_nodelay(true).expect("TCP");
        (server, client)
    };
    (0..count).map(pair).unzip()
}

/// Nanoseconds per message, over `rounds` in which every client writes and then reads its answer.
fn talk(mut clients: Vec<TcpStream>, rounds: u32) -> f64 {
    let (start, mut answer) = (Instant::now(), [0; MESSAGE.len()]);
    for _ in 0..rounds {
        for client in &mut clients {
            client.write_all(&MESSAGE).expect("the server is there");
        }
        for client in &mut clients {
            client.read_exact(&mut answer).expect("the server is there");
        }
    }
    start.elapsed().as_nanos() as f64 / f64::from(rounds) / clients.len() as f64
}

struct Calls {
    enters: f64,
    sends: f64,
}

fn through_driver(connections: usize, rounds: u32, calls: &mut Option<Calls>) -> f64 {
    let (servers, clients) = pairs(connections);
    let server = std::thread::spawn(move || {
        servers.iter().for_each(|server| server.set_nonblocking(true).expect("a socket"));
        let mut echo = Echo::new(servers.into_iter().map(Into::into).collect()).expect("io_uring works here");
        while echo.turn() {}
        let messages = echo.messages as f64;
        Calls { enters: echo.enters as f64 / messages, sends: echo.sends as f64 / messages }
    });
    let figure = talk(clients, rounds);
    *calls = Some(server.join().expect("no panic"));
    figure
}

fn through_a_thread(rounds: u32) -> f64 {
    let (mut servers, clients) = pairs(1);
    let server = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = servers[0].read(&mut bytes) {
            servers[0].write_all(&bytes[..count]).expect("the client is there");
        }
    });
    let figure = talk(clients, rounds);
    server.join().expect("no panic");
    figure
}

fn print_calls(calls: Option<Calls>) {
    let Some(Calls { enters, sends }) = calls else { return };
    println!("  driver, system calls per message: {enters:.2} io_uring_enter + {sends:.2} send");
}

fn main() {
    println!("echo of 64 bytes over loopback, client on its own thread");
    let (mut one, mut many) = (None, None);
    let ping_pong: Vec<support::Rival<'_>> = vec![
        ("driver", Box::new(|| through_driver(1, 5_000, &mut one))),
        ("a thread in read(2) and write(2)", Box::new(|| through_a_thread(5_000))),
    ];
    compare("ping-pong on one connection", "ns/message", ping_pong);
    print_calls(one);
    let batch: Vec<support::Rival<'_>> = vec![("driver", Box::new(|| through_driver(64, 300, &mut many)))];
    compare("64 connections that speak at once", "ns/message", batch);
    print_calls(many);
}
