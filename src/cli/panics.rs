//! Where a panic happened is known to its hook only: the command installs the library's, and one of its own for the
//! threads that are not the library's. Embedders decide for themselves.

use std::panic;

/// Logs each panic once, with its place, through the log instead of raw on standard error.
pub(crate) fn install() {
    panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let message = payload(info.payload());
        tracing::error!(thread = thread.name().unwrap_or("?"), place, "panic: {message}");
    }));
    ringleader::install_panic_hook();
}

fn payload(payload: &dyn std::any::Any) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&'static str>().copied()).unwrap_or("a payload that is not text")
}
