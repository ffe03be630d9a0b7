//! Panics as the log shows them, and the one that nothing can catch: the command in a process of its own.

use crate::support::{Process, spawn};

/// Panics once on a connection of its own, and reads the 500.
fn panic_once(process: &Process) {
    let mut client = process.connect();
    client.ask("/chaos/panic");
    let answer = client.answer();
    assert_eq!((answer.status, answer.closes()), (500, true));
    client.expect_end();
}

/// Stops it, and gives all that it printed.
fn stopped(process: Process) -> String {
    process.signal(libc::SIGTERM);
    let ended = process.wait();
    ended.expect(0, &["stopped"]);
    ended.printed
}

fn count(printed: &str, words: &[&str]) -> usize {
    printed.lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
}

#[test]
fn a_contained_panic_is_one_line_with_executor_generation_and_place() {
    let process = spawn(&[], &["--executors", "1", "--chaos"]);
    panic_once(&process);
    let printed = stopped(process);
    assert_eq!(count(&printed, &["ordered by /chaos/panic"]), 1, "{printed}");
    let words = ["ERROR", "a request handler panicked", "slot=0", "generation=1", "place=\"src/cli/chaos.rs:"];
    assert_eq!(count(&printed, &words), 1, "{printed}");
}

#[test]
fn a_storm_of_panics_is_a_few_lines_and_none_of_it_goes_uncounted() {
    const PANICS: u64 = 60;
    let process = spawn(&[], &["--executors", "1", "--chaos"]);
    (0..PANICS).for_each(|_| panic_once(&process));
    // The count comes out by itself.
    let mut process = process;
    process.wait_for_line(" more like it in the last ");
    let printed = stopped(process);
    let lines = count(&printed, &["a request handler panicked"]) as u64;
    let suppressed: u64 = printed
        .lines()
        .filter_map(|line| line.split_once(" more like it")?.0.rsplit("and ").next()?.parse::<u64>().ok())
        .sum();
    assert_eq!(lines + suppressed, PANICS, "{printed}");
    assert!((5..PANICS / 2).contains(&lines), "{printed}");
}

#[test]
fn an_escaped_panic_is_one_line_and_has_a_backtrace_when_one_is_asked_for() {
    for (wrapper, traced) in [(&["env", "RUST_BACKTRACE=1"], true), (&["env", "RUST_BACKTRACE=0"], false)] {
        let mut process = spawn(wrapper, &["--executors", "1", "--chaos"]);
        assert_eq!(process.connect().get("/chaos/panic").status, 500);
        process.connect().ask("/chaos/escape");
        // It comes before the restart or after it, and the end does not wait for one that takes long.
        process.wait_for_line(if traced { "its backtrace" } else { "the executor serves again" });
        let printed = stopped(process);
        assert_eq!(count(&printed, &["ordered by /chaos/escape"]), 1, "{printed}");
        let words =
            ["an executor has ended", "slot=0", "generation=1", "ordered by /chaos/escape, at src/cli/chaos.rs:"];
        assert_eq!(count(&printed, &words), 1, "{printed}");
        // Of the escaped one only.
        assert_eq!(count(&printed, &["its backtrace"]), usize::from(traced), "{printed}");
    }
}

#[test]
fn on_panic_restart_is_one_line_and_a_new_generation() {
    let mut process = spawn(&[], &["--executors", "1", "--chaos", "--on-panic", "restart"]);
    let mut idle = process.connect();
    assert_eq!(idle.get("/").status, 200);
    panic_once(&process);
    idle.expect_end();
    process.wait_for_line("the executor serves again");
    assert!(process.connect().get("/whoami").text().contains("\"generation\":2"));
    let printed = stopped(process);
    assert_eq!(count(&printed, &["ordered by /chaos/panic"]), 1, "{printed}");
    assert_eq!(count(&printed, &["an executor has ended", "generation=1", "at src/cli/chaos.rs:"]), 1, "{printed}");
}

#[test]
fn too_many_contained_panics_restart_the_executor_once() {
    let mut process = spawn(&[], &["--executors", "1", "--chaos", "--escalate-after", "3"]);
    let mut idle = process.connect();
    assert_eq!(idle.get("/").status, 200);
    (0..4).for_each(|_| panic_once(&process));
    let line = process.wait_for_line("an executor has ended");
    assert!(
        line.contains("too many of its panics were contained: ordered by /chaos/panic, at src/cli/chaos.rs:"),
        "{line}"
    );
    idle.expect_end();
    process.wait_for_line("the executor serves again");
    let mut idle = process.connect();
    (0..20).for_each(|_| panic_once(&process));
    assert!(idle.get("/whoami").text().contains("\"generation\":2"), "a restart has not helped: it is not repeated");
}

#[test]
fn a_drop_that_panics_while_a_panic_unwinds_its_frame_aborts_the_process() {
    let process = spawn(&[], &["--executors", "2", "--chaos"]);
    let mut sibling = process.connect();
    let mut client = process.connect();
    client.ask("/chaos/abort");
    client.expect_end();
    sibling.expect_end();
    let ended = process.wait();
    assert_eq!((ended.status, ended.signal), (None, Some(libc::SIGABRT)), "{}", ended.printed);
    // The first panic, the second, and what they led to; in this order.
    let lines = ["ordered by /chaos/abort", "the drop panics while the first panic unwinds", "the process aborts"];
    let places: Vec<_> = lines.iter().map(|line| ended.printed.find(line)).collect();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{}", ended.printed);
}

#[test]
fn a_closure_that_does_not_end_is_waited_for_and_then_left_behind() {
    // Bounded by the drain's deadline, which leaves no time at all.
    let process = spawn(&[], &["--executors", "1", "--chaos", "--drain-timeout", "0"]);
    let mut client = process.connect();
    client.ask("/chaos/offload?ms=60000");
    // Its answer to come; what is asked on another connection of the executor is served meanwhile.
    assert_eq!(process.connect().get("/").status, 200);
    crate::support::eventually("the closure has a thread", || process.has_thread("ringleader-blk"));
    process.signal(libc::SIGTERM);
    let ended = process.wait();
    ended.expect(1, &["1 blocking closures did not end in time"]);
    client.expect_end();
}
