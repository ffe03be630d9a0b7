//! Where the log goes: standard error, by a writer that makes nobody wait and fails nobody.
//!
//! Executors log. So a reader of the log that stops reading must not stop them, and one that has gone, or a full disk, must
//! not end the process. A line is written by whoever has it, at once, when there is room for it and nothing waits before
//! it: then it is out, even if the next thing is an abort. Otherwise it goes to a backlog of [`BACKLOG_BYTES`], which a
//! thread writes as there comes to be room. What finds no place there, or cannot be written at all, is dropped and counted,
//! and a line in its place says how many are missing.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use ringleader::of_the_command::wait_writable;
use tracing_subscriber::fmt::format;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// What may wait for a reader: some ten thousand lines.
const BACKLOG_BYTES: usize = 1 << 20;
/// How much a pipe that says it is writable takes for certain.
const PIECE_BYTES: usize = libc::PIPE_BUF;
/// How long the end of the process waits for what is in the backlog.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How soon the thread tries again when it cannot even wait.
const AGAIN: Duration = Duration::from_millis(10);

/// To be called before anything is written. A file that has reached the limit on its size (`ulimit -f`, `LimitFSIZE=`) is
/// then like a full disk: without a handler of SIGXFSZ the first write beyond it would end the process. A handler, since
/// what is ignored stays so in processes that are made from this one.
pub(crate) fn prepare() {
    if let Err(error) = signal_hook::flag::register(libc::SIGXFSZ, Arc::default()) {
        say(&format!("ringleader: handling SIGXFSZ: {error}; a log file at its size limit would end the process\n"));
    }
}

/// A writer for one event of the log.
pub(crate) fn writer() -> Line {
    Line(())
}

/// Writes a line as the log does.
pub(crate) fn say(line: &str) {
    log().take(line.as_bytes());
}

/// Gives what is still to be written a moment. Nothing is to be logged after it.
pub(crate) fn finish() {
    log().finish(Instant::now() + LAST_WORDS);
}

/// What is written to it at once is one event: the subscriber does so.
pub(crate) struct Line(());

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        log().take(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn log() -> &'static Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    LOG.get_or_init(|| Log::new(standard_error()))
}

/// Standard error past the lock of `std`. A pipe or a terminal is opened anew, where that may be, for writes that do not
/// wait: what a descriptor says before a write is true until others write, and other processes may. The flag would
/// otherwise be theirs, too.
fn standard_error() -> Option<File> {
    let stderr = io::stderr();
    let file = File::from(stderr.as_fd().try_clone_to_owned().ok()?);
    let may_wait = stderr.is_terminal() || file.metadata().is_ok_and(|kind| kind.file_type().is_fifo());
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let reopened = may_wait.then(|| OpenOptions::new().append(true).custom_flags(flags).open("/proc/self/fd/2"));
    Some(reopened.and_then(Result::ok).unwrap_or(file))
}

/// The lines that are on their way to a sink. Without one, all are lost.
struct Log {
    sink: Option<File>,
    state: Mutex<State>,
    /// For the thread: something is in the backlog.
    filled: Condvar,
    /// For the end: the thread has done what there was.
    emptied: Condvar,
}

#[derive(Default)]
struct State {
    backlog: VecDeque<Entry>,
    /// Of the entries in the backlog.
    bytes: usize,
    /// Lines lost since the last line that said so.
    lost: u64,
    /// The backlog has been full: until half of it is written, no line is taken, or there would be a gap after each.
    full: bool,
    /// There is a thread that writes the backlog.
    has_thread: bool,
    /// It has an entry in hand, which comes before all others.
    writes: bool,
}

struct Entry {
    text: Vec<u8>,
    /// Of `text`, what is still to be written.
    rest: usize,
    /// Lines that are lost if this one is: those that it tells of.
    lines: u64,
}

impl Entry {
    fn of(text: &[u8]) -> Self {
        Self { text: text.to_vec(), rest: text.len(), lines: lines(text) }
    }

    /// What there is to say of a gap, as the other lines are written.
    fn of_gap(lost: u64) -> Self {
        let mut text = String::new();
        // Without the time, if it cannot be written.
        let _ = SystemTime.format_time(&mut format::Writer::new(&mut text));
        let (lines, are) = if lost == 1 { ("line", "is") } else { ("lines", "are") };
        text.push_str(&format!(
            "  WARN {lost} {lines} of the log {are} missing here: they could not be written, or nobody read them in time\n"
        ));
        Self { rest: text.len(), text: text.into_bytes(), lines: lost }
    }

    fn unwritten(&self) -> &[u8] {
        &self.text[self.text.len() - self.rest..]
    }
}

fn lines(text: &[u8]) -> u64 {
    text.iter().filter(|byte| **byte == b'\n').count().max(1) as u64
}

impl Log {
    fn new(sink: Option<File>) -> Self {
        Self { sink, state: Mutex::default(), filled: Condvar::new(), emptied: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes an event, or keeps it until there is room, or drops it. Does not wait.
    fn take(&'static self, text: &[u8]) {
        let Some(sink) = &self.sink else { return };
        let mut state = self.lock();
        if state.is_empty() && state.lost == 0 {
            match write_now(sink, text) {
                Ok(written) if written == text.len() => return,
                Ok(written) => state.push(Entry { rest: text.len() - written, ..Entry::of(text) }),
                Err(_) => {
                    state.lost += lines(text);
                    return;
                }
            }
        } else {
            state.admit(text);
        }
        self.write_or_leave(state, sink);
    }

    /// Writes of the backlog what there is room for, and leaves the rest to the thread.
    fn write_or_leave(&'static self, mut state: MutexGuard<'_, State>, sink: &File) {
        if !state.writes {
            state.write_now(sink);
        }
        if state.is_empty() {
            return;
        }
        if !state.has_thread {
            let thread = std::thread::Builder::new().name("log".to_owned());
            // Without one the backlog is written with the next line for which there is room.
            state.has_thread = thread.spawn(|| self.write_backlog()).is_ok();
        }
        drop(state);
        self.filled.notify_one();
    }

    /// The thread: writes what others had no time for.
    fn write_backlog(&self) {
        let Some(sink) = &self.sink else { return };
        let mut state = self.lock();
        loop {
            let Some(mut entry) = state.next() else {
                self.emptied.notify_all();
                state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.writes = true;
            drop(state);
            let written = write_patiently(sink, &mut entry);
            state = self.lock();
            state.writes = false;
            state.lost += if written.is_ok() { 0 } else { entry.lines };
        }
    }

    fn finish(&'static self, deadline: Instant) {
        let Some(sink) = &self.sink else { return };
        let mut state = self.lock();
        state.note_gap();
        state.full = false;
        if !state.is_empty() {
            self.write_or_leave(state, sink);
            state = self.lock();
        }
        while !state.is_empty() && state.has_thread {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.emptied.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    /// Nothing is on its way.
    fn is_empty(&self) -> bool {
        self.backlog.is_empty() && !self.writes
    }

    /// A line for the backlog; before it, what there is to say of those that are missing.
    fn admit(&mut self, text: &[u8]) {
        self.full = if self.full { self.bytes > BACKLOG_BYTES / 2 } else { self.bytes + text.len() > BACKLOG_BYTES };
        if self.full {
            self.lost += lines(text);
            return;
        }
        self.note_gap();
        self.push(Entry::of(text));
    }

    fn note_gap(&mut self) {
        if self.lost > 0 {
            let gap = Entry::of_gap(std::mem::take(&mut self.lost));
            self.push(gap);
        }
    }

    fn push(&mut self, entry: Entry) {
        self.bytes += entry.text.len();
        self.backlog.push_back(entry);
    }

    /// The oldest entry. After the last one, if lines were lost for lack of room, the line that says so.
    fn next(&mut self) -> Option<Entry> {
        if self.backlog.is_empty() && std::mem::take(&mut self.full) {
            self.note_gap();
        }
        let entry = self.backlog.pop_front()?;
        self.bytes -= entry.text.len();
        Some(entry)
    }

    /// Writes as much of the backlog as there is room for.
    fn write_now(&mut self, sink: &File) {
        while let Some(entry) = self.backlog.front_mut() {
            match write_now(sink, entry.unwritten()) {
                Ok(written) => entry.rest -= written,
                Err(_) => {
                    self.lost += entry.lines;
                    entry.rest = 0;
                }
            }
            if entry.rest > 0 {
                return;
            }
            self.bytes -= entry.text.len();
            self.backlog.pop_front();
        }
    }
}

/// Writes what there is room for, without waiting; says how much.
fn write_now(sink: &File, text: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while written < text.len() && is_writable(sink) {
        match write_piece(sink, &text[written..]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

/// Writes all of it, as there comes to be room.
fn write_patiently(sink: &File, entry: &mut Entry) -> io::Result<()> {
    while entry.rest > 0 {
        if wait_writable(sink.as_fd(), None).is_err() {
            std::thread::sleep(AGAIN);
        }
        match write_piece(sink, entry.unwritten()) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => entry.rest -= count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_piece(mut sink: &File, text: &[u8]) -> io::Result<usize> {
    loop {
        match sink.write(&text[..text.len().min(PIECE_BYTES)]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn is_writable(sink: &File) -> bool {
    wait_writable(sink.as_fd(), Some(Duration::ZERO)).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, PipeReader, PipeWriter};
    use std::os::fd::OwnedFd;

    use super::*;

    fn leaked(writer: PipeWriter) -> &'static Log {
        Box::leak(Box::new(Log::new(Some(File::from(OwnedFd::from(writer))))))
    }

    /// A log into a pipe that is full, and what is read of it line by line.
    fn stuck() -> (&'static Log, BufReader<PipeReader>) {
        let (reader, mut filler) = io::pipe().expect("descriptors are left");
        while wait_writable(filler.as_fd(), Some(Duration::ZERO)).expect("it is a pipe") {
            filler.write_all(&[b'\n'; PIECE_BYTES]).expect("there is room");
        }
        (leaked(filler), BufReader::new(reader))
    }

    fn text(number: u64) -> String {
        format!("line {number} {}\n", ".".repeat(1000))
    }

    fn number(line: &str) -> u64 {
        assert!(line.starts_with("line ") && line.ends_with('.'), "it is not whole: {line}");
        line.split(' ').nth(1).and_then(|number| number.parse().ok()).expect("lines are numbered")
    }

    #[test]
    fn what_finds_no_room_is_written_later_in_order_with_a_line_where_some_are_missing() {
        let (log, reader) = stuck();
        let taken = 3000;
        (0..taken).for_each(|number| log.take(text(number).as_bytes()));
        let mut lines = reader.lines().map(|line| line.expect("it is text")).filter(|line| !line.is_empty());
        let mut next = 0;
        let gap = loop {
            let line = lines.next().expect("the log stays open");
            if line.contains("missing") {
                break line;
            }
            assert_eq!(number(&line), next);
            next += 1;
        };
        assert!(next > 900, "the backlog is a megabyte, and held {next} lines of a kilobyte");
        assert!(gap.contains(&format!(" WARN {} lines of the log are missing", taken - next)), "{next}: {gap}");
        log.take(text(taken).as_bytes());
        assert_eq!(number(&lines.next().expect("the log stays open")), taken);
    }

    #[test]
    fn the_end_waits_for_what_is_read_and_not_for_long_where_nobody_reads() {
        let (log, reader) = stuck();
        log.take(b"last words\n");
        let begun = Instant::now();
        log.finish(begun + Duration::from_millis(50));
        assert!(begun.elapsed() >= Duration::from_millis(50) && !log.lock().is_empty());
        let last = std::thread::spawn(|| reader.lines().map_while(Result::ok).find(|line| !line.is_empty()));
        log.finish(begun + Duration::from_secs(60));
        assert!(log.lock().is_empty());
        assert_eq!(last.join().expect("it reads"), Some("last words".to_owned()));
    }

    #[test]
    fn what_cannot_be_written_is_counted() {
        let (reader, writer) = io::pipe().expect("descriptors are left");
        let log = leaked(writer);
        drop(reader);
        log.take(b"one\n");
        log.take(b"two\nthree\n");
        log.finish(Instant::now());
        assert_eq!(log.lock().lost, 3);
    }

    #[test]
    fn with_room_a_line_is_out_when_it_has_been_taken() {
        let (mut reader, writer) = io::pipe().expect("descriptors are left");
        let log = leaked(writer);
        log.take(b"one\n");
        log.take(b"two\n");
        assert!(!log.lock().has_thread);
        let mut read = [0; 8];
        io::Read::read_exact(&mut reader, &mut read).expect("it has been written");
        assert_eq!(&read, b"one\ntwo\n");
    }
}
