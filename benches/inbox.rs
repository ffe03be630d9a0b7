//! The inbox of an executor against std's channel (crossbeam's code since Rust 1.67).
//!
//! Held equal: one poster thread, one receiver thread, messages of four bytes. The receiver of the inbox sleeps in
//! its io_uring, as an executor does, that of the channel in a futex: the channel could not wake an executor at all.

mod support;

use std::sync::mpsc;
use std::time::{Duration, Instant};

use ringleader::internals::Receiver;
use support::{compare, percentile};

const FLOOD: u32 = 500_000;
const WAKES: u32 = 2_000;

fn post_inbox() -> f64 {
    let (poster, mut receiver) = Receiver::new().expect("io_uring works here");
    let start = Instant::now();
    (0..FLOOD).for_each(|message| poster.post(message));
    let took = start.elapsed();
    receiver.take(false, drop);
    took.as_nanos() as f64 / f64::from(FLOOD)
}

fn post_channel() -> f64 {
    let (sender, receiver) = mpsc::channel();
    let start = Instant::now();
    (0..FLOOD).for_each(|message| sender.send(message).expect("received"));
    let took = start.elapsed();
    drop(receiver);
    took.as_nanos() as f64 / f64::from(FLOOD)
}

fn flood_inbox() -> f64 {
    let (poster, mut receiver) = Receiver::new().expect("io_uring works here");
    let start = Instant::now();
    let thread = std::thread::spawn(move || (0..FLOOD).for_each(|message| poster.post(message)));
    let mut left = FLOOD;
    while left > 0 {
        receiver.take(true, |_| left -= 1);
    }
    thread.join().expect("no panic");
    f64::from(FLOOD) / start.elapsed().as_secs_f64() / 1e6
}

fn flood_channel() -> f64 {
    let (sender, receiver) = mpsc::channel();
    let start = Instant::now();
    let thread = std::thread::spawn(move || (0..FLOOD).for_each(|message| sender.send(message).expect("received")));
    for _ in 0..FLOOD {
        receiver.recv().expect("sent");
    }
    thread.join().expect("no panic");
    f64::from(FLOOD) / start.elapsed().as_secs_f64() / 1e6
}

/// Microseconds from the post to the receiver having it, the receiver asleep before.
fn wake_up(mut post: impl FnMut(u32) + Send, mut receive: impl FnMut() -> Instant) -> Vec<f64> {
    let (posted_at, posts) = mpsc::channel();
    let (go, next) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for message in next {
                // Time for the receiver to fall asleep.
                std::thread::sleep(Duration::from_micros(300));
                posted_at.send(Instant::now()).expect("received");
                post(message);
            }
        });
        let latencies = (0..WAKES).map(|message| {
            go.send(message).expect("the poster waits");
            let received = receive();
            received.duration_since(posts.recv().expect("posted")).as_nanos() as f64 / 1000.0
        });
        let latencies = latencies.collect();
        drop(go);
        latencies
    })
}

fn print_wake_ups(name: &str, mut figures: Vec<f64>) {
    let (middle, tail) = (percentile(&mut figures, 0.5), percentile(&mut figures, 0.99));
    println!("  {name:<44} {middle:>10.1} us p50 {tail:>10.1} us p99");
}

fn main() {
    println!("one poster, one receiver, messages of 4 bytes");
    let post: Vec<support::Rival<'_>> =
        vec![("inbox", Box::new(post_inbox)), ("std::sync::mpsc", Box::new(post_channel))];
    compare("post to a busy receiver (no system call)", "ns/post", post);
    let flood: Vec<support::Rival<'_>> =
        vec![("inbox", Box::new(flood_inbox)), ("std::sync::mpsc", Box::new(flood_channel))];
    compare("flood, both ends running", "M/s", flood);

    println!("\nwake-up of a receiver that sleeps, {WAKES} posts 300 us apart");
    let (poster, mut receiver) = Receiver::new().expect("io_uring works here");
    let inbox = wake_up(
        move |message| poster.post(message),
        || {
            let mut got = false;
            while !got {
                receiver.take(true, |_| got = true);
            }
            Instant::now()
        },
    );
    print_wake_ups("inbox (eventfd into io_uring)", inbox);
    let (sender, receiver) = mpsc::channel();
    let channel = wake_up(
        move |message| sender.send(message).expect("received"),
        || {
            receiver.recv().expect("sent");
            Instant::now()
        },
    );
    print_wake_ups("std::sync::mpsc (futex)", channel);
}
