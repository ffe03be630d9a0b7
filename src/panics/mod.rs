//! What is known of a caught panic, and the hook by which its place becomes known.
//!
//! A payload says what a panic said; where it happened only the process's panic hook is told, and that hook is the
//! embedder's. So the hook is opt-in ([`install_panic_hook`]): on the library's own threads it prints nothing and leaves
//! a note for whoever catches the panic, who logs it once, with slot, generation and place. How many such lines there
//! may be is decided in [`lines`], when they are too many to go on in [`escalator`].

pub(crate) mod escalator;
pub(crate) mod lines;
pub(crate) mod trace;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::panic::{self, PanicHookInfo};
use std::sync::{Arc, Once};
use std::time::Instant;

use lines::{Lines, More};
use trace::Trace;

const NOT_TEXT: &str = "a panic with a payload that is not text";
/// What tokio says when it is called on a thread that knows of no runtime of its kind.
const NO_TOKIO: &str = "must be called from the context of a Tokio 1.x runtime";
const NO_TOKIO_HINT: &str =
    " (an executor is no tokio runtime; `Builder::tokio`, feature `tokio`, lets services use one)";
/// What the standard library says right before it aborts the process: nobody comes by after that to log the note.
const LAST_WORDS: &[&str] = &["panic in a destructor during cleanup", "panic in a function that cannot unwind"];

thread_local! {
    /// Whether panics on this thread are caught and reported by the library.
    static OURS: Cell<bool> = const { Cell::new(false) };
    /// The latest panic of this thread that nobody has reported yet.
    static NOTE: RefCell<Option<Panic>> = const { RefCell::new(None) };
    /// Which of those that were not caught by the library are logged.
    static MISSED: RefCell<Lines> = RefCell::default();
}

/// A caught panic.
#[derive(Debug, Clone)]
pub(crate) struct Panic {
    pub message: String,
    /// File, line and column; known to the hook only.
    pub place: Option<String>,
    /// If `RUST_BACKTRACE` asks for one. Its symbols are looked up when it is printed: not on an executor.
    pub backtrace: Option<Arc<Trace>>,
}

impl Panic {
    /// For a defect that is treated as a panic is.
    pub(crate) fn of(message: String) -> Self {
        Self { message, place: None, backtrace: None }
    }

    /// What tells this panic from others in the log: the place, or the message as far as it is likely to be the same
    /// again.
    pub(crate) fn site(&self) -> &str {
        /// Long enough for words, short enough to leave most numbers and names out.
        const PREFIX_CHARS: usize = 40;
        let prefix =
            self.message.char_indices().nth(PREFIX_CHARS).map_or(&*self.message, |(end, _)| &self.message[..end]);
        self.place.as_deref().unwrap_or(prefix)
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Some(place) => write!(formatter, "{}, at {place}", self.message),
            None => formatter.write_str(&self.message),
        }
    }
}

/// Says that panics on this thread are caught by the library; for the life of the thread.
pub(crate) fn mark_thread() {
    OURS.set(true);
}

/// What a payload says, with the hook's note of it. To be called where it has been caught.
pub(crate) fn caught(payload: Box<dyn Any + Send>) -> Panic {
    let message = text_of(&*payload).to_owned();
    if payload.is::<String>() || payload.is::<&'static str>() {
        drop(payload);
    } else {
        // Dropping a foreign payload may panic in its turn; losing it is the safe way out.
        std::mem::forget(payload);
    }
    let mut panic = match NOTE.try_with(RefCell::take).ok().flatten() {
        Some(note) if note.message == message => note,
        other => {
            // A panic that somebody caught before, and then this one, which passed no hook (`resume_unwind`).
            if let Some(other) = other {
                report_missed(other);
            }
            Panic::of(message)
        }
    };
    if panic.message.contains(NO_TOKIO) {
        panic.message.push_str(NO_TOKIO_HINT);
    }
    panic
}

fn text_of(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&'static str>().copied()).unwrap_or(NOT_TEXT)
}

/// Installs a panic hook that lets the library log each panic of its own threads once, with the executor, the generation
/// and the place in the source. Panics of all other threads go to the hook that was installed before, as ever.
///
/// Without it the library logs the same line without the place, and the hook that is installed, by default the standard
/// library's, prints each of those panics as well. The library never calls this by itself. Call it once, at the start
/// of the program, after a hook of your own is installed; more calls do nothing.
///
/// With `RUST_BACKTRACE=1` a panic that ends a generation is logged with its backtrace. Of panics that code of yours catches by
/// itself (tower-http's `CatchPanic`) the latest is not logged; those before it are, as followed by another, since nobody may
/// have caught them: a few of each place at once, and then one a second, which says how many it stands for.
///
/// ```
/// tracing_subscriber::fmt().init();
/// ringleader::install_panic_hook();
/// // ... and then the server.
/// ```
pub fn install_panic_hook() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(
            move |info| {
                if OURS.try_with(Cell::get).unwrap_or(false) { note(info) } else { previous(info) }
            },
        ));
    });
}

fn note(info: &PanicHookInfo<'_>) {
    let note = Panic {
        message: text_of(info.payload()).to_owned(),
        place: info.location().map(ToString::to_string),
        backtrace: Trace::capture().map(Arc::new),
    };
    let aborts = LAST_WORDS.contains(&note.message.as_str());
    let earlier = NOTE.try_with(|kept| kept.replace((!aborts).then(|| note.clone()))).ok().flatten();
    // Two in a row and nobody has come by to catch the first: it may be that nobody ever will.
    if aborts {
        if let Some(earlier) = earlier {
            log_missed(&earlier, None);
            // No other thread would come to it.
            if let Some(backtrace) = earlier.backtrace {
                tracing::error!("its backtrace:\n{backtrace}");
            }
        }
        let thread = std::thread::current();
        tracing::error!(
            thread = thread.name().unwrap_or("?"),
            "{note}: a drop panicked while a panic unwound its frame, or foreign code was unwound into; the process aborts"
        );
    } else if let Some(earlier) = earlier {
        report_missed(earlier);
    }
}

/// Logs a panic that was not caught by the library before the next one came, unless its place has had its share of lines:
/// code that catches its own may have any number of them.
fn report_missed(panic: Panic) {
    let note = |lines: &RefCell<Lines>| lines.try_borrow_mut().ok()?.note(panic.site(), Instant::now());
    let Some(more) = MISSED.try_with(note).ok().flatten() else { return };
    log_missed(&panic, more);
    if let Some(backtrace) = panic.backtrace {
        trace::log_apart(backtrace);
    }
}

fn log_missed(panic: &Panic, more: Option<More>) {
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("?");
    let place = panic.place.as_deref();
    if let Some(more) = more {
        tracing::error!(thread, place, "{more}");
    }
    tracing::error!(thread, place, "a panic, followed by another: {}", panic.message);
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind, panic_any, resume_unwind};

    use super::*;

    pub(super) fn caught_from(act: impl FnOnce()) -> Panic {
        caught(catch_unwind(AssertUnwindSafe(act)).expect_err("it panics"))
    }

    /// On a thread of the library's with the hook installed.
    pub(super) fn with_hook<T: Send>(act: impl FnOnce() -> T + Send) -> T {
        install_panic_hook();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                mark_thread();
                act()
            });
            thread.join().expect("nothing escapes")
        })
    }

    #[test]
    fn a_panic_has_its_message_and_by_the_hook_its_place() {
        let (first, second) = with_hook(|| (caught_from(|| panic!("one")), caught_from(|| panic!("two {}", 2))));
        assert_eq!((&*first.message, &*second.message), ("one", "two 2"));
        let place = first.place.expect("the hook saw it");
        assert!(place.starts_with("src/panics/mod.rs:"), "{place}");
        assert_ne!(Some(place), second.place);
    }

    #[test]
    fn payloads_that_are_not_text_and_panic_when_dropped_are_named_and_let_go_of() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("the payload's drop");
            }
        }
        let (number, bomb) = with_hook(|| (caught_from(|| panic_any(7)), caught_from(|| panic_any(Bomb))));
        assert_eq!((&*number.message, &*bomb.message), (NOT_TEXT, NOT_TEXT));
        assert!(number.place.is_some() && bomb.place.is_some());
    }

    #[test]
    fn a_note_is_not_taken_for_another_panics() {
        let (other, same) = with_hook(|| {
            // Caught by somebody else: the note stays behind.
            let payload = catch_unwind(|| panic!("caught by the user")).expect_err("it panics");
            let other = caught_from(|| resume_unwind(Box::new("passed no hook")));
            assert!(NOTE.with_borrow(Option::is_none), "it has been reported");
            drop(payload);
            // Thrown again it is the same panic.
            let payload = catch_unwind(|| panic!("thrown again")).expect_err("it panics");
            (other, caught_from(|| resume_unwind(payload)))
        });
        assert_eq!((&*other.message, other.place), ("passed no hook", None));
        assert!(same.message == "thrown again" && same.place.is_some());
    }

    #[test]
    fn a_call_of_tokios_without_its_runtime_is_told_what_to_do() {
        let panic = with_hook(|| caught_from(|| drop(tokio::runtime::Handle::current())));
        assert!(panic.message.contains("Builder::tokio") && panic.place.is_some(), "{panic}");
        assert!(!caught_from(|| panic!("another")).message.contains("tokio"));
    }

    #[test]
    fn a_site_is_the_place_or_the_beginning_of_the_message() {
        let mut panic = Panic::of("ä".repeat(100));
        assert_eq!(panic.site(), "ä".repeat(40));
        panic.place = Some("src/x.rs:1:2".to_owned());
        assert_eq!((panic.site(), panic.to_string().ends_with("ä, at src/x.rs:1:2")), ("src/x.rs:1:2", true));
        assert_eq!(Panic::of("short".to_owned()).site(), "short");
    }
}
