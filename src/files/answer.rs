//! How decisions become responses: status lines, headers, error pages, multipart framing. No I/O
//! and no policy.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::thread::LocalKey;
use std::time::Instant;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderName, HeaderValue, LAST_MODIFIED, LOCATION, RETRY_AFTER};
use http::{Response, StatusCode};

use super::body::{FileBody, Part};
use super::conditional::Validators;
use super::offload::Overloaded;
use super::path::PathError;
use super::range::ByteRange;
use crate::rarely::Rarely;

pub(super) const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
pub(super) const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
pub(super) const BYTES: HeaderValue = HeaderValue::from_static("bytes");

thread_local! {
    /// What every request may meet while it lasts, and is told once a second.
    static SHORT_OF_RESOURCES: RefCell<Rarely> = RefCell::default();
    static UNREADABLE: RefCell<Rarely> = RefCell::default();
}

/// How often it has happened since the last line, when it is time for another.
fn rarely(line: &'static LocalKey<RefCell<Rarely>>) -> Option<u64> {
    line.with_borrow_mut(|line| {
        line.count(1);
        line.say(Instant::now())
    })
}

/// An answer without a file: a status, one header that belongs to it, and a line of text.
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    header: Option<(HeaderName, HeaderValue)>,
}

impl Refusal {
    pub(super) fn with(mut self, name: HeaderName, value: HeaderValue) -> Refusal {
        self.header = Some((name, value));
        self
    }

    pub(super) fn into_response(self) -> Response<FileBody> {
        let mut response = page_response(self.status, TEXT, format!("{}\n", self.status));
        response.headers_mut().extend(self.header);
        response
    }
}

impl From<StatusCode> for Refusal {
    fn from(status: StatusCode) -> Refusal {
        Refusal { status, header: None }
    }
}

impl From<PathError> for Refusal {
    fn from(_: PathError) -> Refusal {
        StatusCode::BAD_REQUEST.into()
    }
}

impl From<Overloaded> for Refusal {
    fn from(_: Overloaded) -> Refusal {
        Refusal::from(StatusCode::SERVICE_UNAVAILABLE).with(RETRY_AFTER, HeaderValue::from_static("1"))
    }
}

/// As nginx chooses (`ngx_http_static_handler`): what cannot be there is 404, what must not be
/// opened is 403. A way out of the root (EXDEV) is what nginx's `disable_symlinks` refuses, with
/// 403.
impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Refusal {
        match error.raw_os_error() {
            // EINVAL: a name that this file system cannot hold.
            Some(libc::ENOENT | libc::ENOTDIR | libc::ENAMETOOLONG | libc::EINVAL) => StatusCode::NOT_FOUND.into(),
            // ENXIO, ENODEV: a socket, a FIFO or a device nobody answers for.
            Some(libc::EACCES | libc::EPERM | libc::ELOOP | libc::EXDEV | libc::ENXIO | libc::ENODEV) => {
                StatusCode::FORBIDDEN.into()
            }
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN) => {
                if let Some(times) = rarely(&SHORT_OF_RESOURCES) {
                    tracing::warn!(%error, times, "opening a file failed for lack of resources; raise the limit on open files (ulimit -n, LimitNOFILE=) if that is it");
                }
                Overloaded.into()
            }
            _ => {
                if let Some(times) = rarely(&UNREADABLE) {
                    tracing::error!(%error, times, "reading a file or directory failed; answered with 500");
                }
                StatusCode::INTERNAL_SERVER_ERROR.into()
            }
        }
    }
}

pub(super) fn redirect(url: &str) -> Result<Response<FileBody>, Refusal> {
    // The path is encoded anew; the query comes from a parsed URI. That both make a header value is
    // checked all the same.
    let location = HeaderValue::from_str(url).map_err(|_| StatusCode::BAD_REQUEST)?;
    Ok(Refusal::from(StatusCode::MOVED_PERMANENTLY).with(LOCATION, location).into_response())
}

pub(super) fn page_response(status: StatusCode, content_type: HeaderValue, page: String) -> Response<FileBody> {
    let length = page.len();
    let mut response = Response::new(FileBody::full(Bytes::from(page)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    response
}

/// A response that names the file's content: ETag and Last-Modified.
pub(super) fn response(status: StatusCode, validators: &Validators, body: FileBody) -> Response<FileBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(ETAG, value(validators.etag.clone()));
    if let Some(modified) = validators.modified {
        headers.insert(LAST_MODIFIED, value(httpdate::fmt_http_date(modified)));
    }
    response
}

pub(super) fn with_content(
    status: StatusCode,
    validators: &Validators,
    length: u64,
    content_type: HeaderValue,
    body: FileBody,
) -> Response<FileBody> {
    let mut response = response(status, validators, body);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    response
}

pub(super) fn content_type(name: &[u8]) -> HeaderValue {
    match mime_guess::from_path(OsStr::from_bytes(name)).first_raw() {
        Some("text/html") => HTML,
        Some("text/plain") => TEXT,
        Some(text) if text.starts_with("text/") => value(format!("{text}; charset=utf-8")),
        Some(other) => HeaderValue::from_static(other),
        None => HeaderValue::from_static("application/octet-stream"),
    }
}

/// RFC 9110 14.6.
pub(super) fn multipart_parts(
    ranges: &[ByteRange],
    boundary: &str,
    content_type: &HeaderValue,
    length: u64,
) -> VecDeque<Part> {
    let content_type = content_type.to_str().expect("content types of ours are ASCII");
    let mut parts = VecDeque::with_capacity(ranges.len() * 2 + 1);
    let mut delimiter = format!("--{boundary}");
    for range in ranges {
        let content_range = range.content_range(length);
        let head = format!("{delimiter}\r\nContent-Type: {content_type}\r\nContent-Range: {content_range}\r\n\r\n");
        parts.push_back(Part::Text(head.into()));
        parts.push_back(Part::File(*range));
        delimiter = format!("\r\n--{boundary}");
    }
    parts.push_back(Part::Text(format!("{delimiter}--\r\n").into()));
    parts
}

/// Only for text that this module has composed.
pub(super) fn value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("digits, dates and media types are valid in a header")
}
