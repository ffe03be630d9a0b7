//! Static files: a directory as a service.
//!
//! [`Files::open`] holds a directory, [`Files::respond`] answers a request from it. Conditional
//! requests, ranges, directory redirects, index files and, when asked for, listings; no
//! compression, no caching policy, no writing.
//!
//! # What can block, and where it goes
//! An executor's thread must not wait for a disk.
//! - *Opening* a name is tried in the kernel's name cache (`openat2` with `RESOLVE_CACHED`). A name
//!   that is not there goes to an [`Offload`], a helper thread unless you bring another, as glommio
//!   has no `openat2`.
//! - *Reading* is tried in the page cache (`RWF_NOWAIT`). What is not there is read through
//!   glommio's ring.
//!
//! So a hot file costs four system calls (open, stat, read, close) and no wake-up. Measured on the
//! reference machine for 1,000 bytes, response and body: 6 µs; 18 µs when the read goes through
//! glommio all the same; 0.13 ms when the name was not cached. Of the 4,096 `RWF_NOWAIT` reads of a
//! cold 256 MiB file not one gave up the CPU. This holds for local file systems; FUSE may wait for
//! its server in the open itself.
//!
//! # What keeps requests inside
//! The kernel: `RESOLVE_BENEATH` refuses every way out of the root, `..`, absolute symlinks and
//! races with renames included. Symlinks that stay below the root are followed. Names with a
//! leading dot are served, as nginx does: keep `.git` out of the root.
//!
//! # Why no cache of open files
//! It would save the open, the stat and the close, 4 of the 6 µs. In return it would serve a
//! replaced file until it noticed (a watch on every directory, or stale answers for a while after
//! each deploy), and hold, once per executor, descriptors that connections need.

mod answer;
mod body;
mod conditional;
mod listing;
mod offload;
mod open;
mod path;
mod pending;
mod range;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::error::Error;
use std::fmt;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use http::header::{ACCEPT_RANGES, ALLOW, CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use http::{Method, Request, Response, StatusCode, Uri};

pub use body::FileBody;
pub(crate) use body::Resident;
pub use offload::{Job, Offload, Overloaded};
pub(crate) use pending::outstanding;

use answer::{
    BYTES, HTML, Refusal, content_type, multipart_parts, page_response, redirect, response, value, with_content,
};
use body::{CHUNK_BYTES, Part, SENDFILE_BYTES_MIN};
use conditional::{Outcome, Validators};
use offload::Helper;
use open::{Lookup, Nowait, Opened, Regular};
use path::Target;
use range::{ByteRange, Selection};

/// A directory whose files are served.
///
/// Make one per executor: it is cheap (one descriptor, and a thread once a name was not cached),
/// and then nothing is shared between executors. It may be shared, too.
///
/// ```
/// use ringleader::{Body, Files, Request, Server, Shard, service_fn};
///
/// let server = Server::builder().listen("127.0.0.1:0").serve(async |_: Shard| {
///     let files = Files::open("/usr/share/doc")?.index("README.html").listing(true);
///     Ok(service_fn(async move |request: Request| Ok(files.respond(&request).await)))
/// });
/// # drop(server);
/// ```
pub struct Files {
    root: Arc<OwnedFd>,
    index: String,
    listing: bool,
    offload: Arc<dyn Offload>,
    /// The offload is one that was brought, and not the helper of this `Files` alone.
    offload_brought: bool,
    sendfile: bool,
    /// The kernel knows `RESOLVE_CACHED`.
    cached_lookup: bool,
    /// The file system knows `RWF_NOWAIT`, as far as has been seen.
    nowait: AtomicBool,
}

/// The directory cannot be served.
///
/// ```
/// use ringleader::Files;
///
/// let error = Files::open("/nowhere").err().expect("there is no such directory");
/// assert!(error.to_string().contains("/nowhere"));
/// ```
#[derive(Debug)]
pub struct FilesError {
    root: PathBuf,
    source: io::Error,
}

impl Files {
    /// Opens `root`, which must be a directory that this process may read and search. It stays the
    /// one that is served even when its name is moved or given to another directory. Blocks; call
    /// it before serving.
    ///
    /// # Errors
    /// When `root` cannot be opened so, or the system has no `openat2` (Linux before 5.6, some
    /// container sandboxes).
    pub fn open(root: impl AsRef<Path>) -> Result<Files, FilesError> {
        let root = root.as_ref();
        let (fd, cached_lookup) = open::root(root).map_err(|source| FilesError { root: root.to_owned(), source })?;
        Ok(Files {
            root: Arc::new(fd),
            index: "index.html".into(),
            listing: false,
            offload: Arc::new(Helper::default()),
            offload_brought: false,
            sendfile: true,
            cached_lookup,
            nowait: AtomicBool::new(true),
        })
    }

    /// The same directory, whatever has become of its name, with the same options: one that is opened at the start can so
    /// be given to every executor, and all serve the same files after a restart, too. It has a descriptor and a helper
    /// thread of its own; an [`Offload`] that was brought is shared.
    ///
    /// ```
    /// use ringleader::{Body, Files, Request, Server, service_fn};
    ///
    /// let opened = Files::open("/usr/share/doc")?;
    /// let server = Server::builder().listen("127.0.0.1:0").serve(async move |_| {
    ///     let files = opened.try_clone()?;
    ///     Ok(service_fn(async move |request: Request| Ok(files.respond(&request).await.map(Body::from))))
    /// });
    /// # drop(server);
    /// # Ok::<(), ringleader::FilesError>(())
    /// ```
    ///
    /// # Errors
    /// When there is no descriptor left, mostly.
    pub fn try_clone(&self) -> io::Result<Files> {
        let own = || Arc::new(Helper::default()) as Arc<dyn Offload>;
        Ok(Files {
            root: Arc::new(open::again(&self.root)?),
            index: self.index.clone(),
            listing: self.listing,
            offload: if self.offload_brought { Arc::clone(&self.offload) } else { own() },
            offload_brought: self.offload_brought,
            sendfile: self.sendfile,
            cached_lookup: self.cached_lookup,
            nowait: AtomicBool::new(self.nowait.load(Ordering::Relaxed)),
        })
    }

    /// Whether a directory without an index file is answered with a list of its entries; 403
    /// otherwise (the default). At most 10,000 entries are listed; those with a leading dot are
    /// not.
    #[must_use]
    pub fn listing(mut self, listing: bool) -> Files {
        self.listing = listing;
        self
    }

    /// The file that stands for a directory; `index.html` by default.
    #[must_use]
    pub fn index(mut self, name: impl Into<String>) -> Files {
        self.index = name.into();
        self
    }

    /// Whether large files are sent by sendfile(2) from the page cache, as nginx does with `sendfile on`; they are by
    /// default. What the kernel has queued for a client shares its memory with the file until the client has it. So a file
    /// that is cut or written to **in place** meanwhile may reach the client in a mixture of old, new and zeroes; without
    /// sendfile only the parts that were read later are new. Files that are replaced by renaming are sent as they were,
    /// either way.
    ///
    /// ```
    /// use ringleader::Files;
    ///
    /// // These are rewritten in place, by rsync --inplace for example.
    /// let files = Files::open("/usr/share/doc")?.sendfile(false);
    /// # Ok::<(), ringleader::FilesError>(())
    /// ```
    #[must_use]
    pub fn sendfile(mut self, sendfile: bool) -> Files {
        self.sendfile = sendfile;
        self
    }

    /// Where to run what may wait for the disk and no ring can do, instead of on a helper thread of
    /// this `Files`.
    #[must_use]
    pub fn offload(mut self, offload: Arc<dyn Offload>) -> Files {
        self.offload = offload;
        self.offload_brought = true;
        self
    }

    /// Answers GET and HEAD; every failure is a response too. To be awaited, and its body to be
    /// read, on a glommio executor.
    ///
    /// Redirects to directories are absolute paths: under a prefix, pass the request with its whole
    /// path and let the directory have the prefix as well.
    pub async fn respond<B>(&self, request: &Request<B>) -> Response<FileBody> {
        let head = request.method() == Method::HEAD;
        let answer = self.answer(request.method(), request.uri(), request.headers()).await;
        let mut response = answer.unwrap_or_else(Refusal::into_response);
        if head {
            *response.body_mut() = FileBody::empty();
        }
        response
    }

    async fn answer(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Response<FileBody>, Refusal> {
        if method != Method::GET && method != Method::HEAD {
            let allowed = HeaderValue::from_static("GET, HEAD");
            return Err(Refusal::from(StatusCode::METHOD_NOT_ALLOWED).with(ALLOW, allowed));
        }
        let target = Target::parse(uri.path())?;
        match self.find(&target).await? {
            Found::File(file, name) => self.file(method, headers, file, &name),
            Found::Directory => redirect(&target.directory_url(uri.query())),
            Found::Listable(directory) => self.list(&target, directory).await,
        }
    }

    /// What a request path stands for. A directory in its slash form stands for its index file, if
    /// it has one.
    async fn find<'a>(&self, target: &'a Target) -> Result<Found<'a>, Refusal> {
        if target.is_directory_form() {
            let index = target.join(&self.index);
            match self.open_name(&index).await {
                Ok(Opened::Regular(file)) => return Ok(Found::File(file, index.into())),
                Ok(_) => return Err(StatusCode::FORBIDDEN.into()),
                Err(refusal) if refusal.status == StatusCode::NOT_FOUND => {}
                Err(refusal) => return Err(refusal),
            }
        }
        let name = target.name();
        match self.open_name(&name).await? {
            Opened::Regular(file) => Ok(Found::File(file, name)),
            Opened::Directory(_) if !target.is_directory_form() => Ok(Found::Directory),
            Opened::Directory(directory) if self.listing => Ok(Found::Listable(directory)),
            Opened::Directory(_) | Opened::Other => Err(StatusCode::FORBIDDEN.into()),
        }
    }

    /// From the name cache if it is there, on the offload's thread otherwise. A name that is known
    /// not to exist is in that cache, too; one that was never asked for is not, so a flood of
    /// invented names ends as 503 at the helper's queue and does not stall the executor.
    async fn open_name(&self, name: &[u8]) -> Result<Opened, Refusal> {
        if self.cached_lookup {
            match open::open(&self.root, name, Lookup::Cached) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                answer => return answer.map_err(Refusal::from),
            }
        }
        let (root, name) = (Arc::clone(&self.root), name.to_owned());
        let opened = offload::offload(&*self.offload, move || open::open(&root, &name, Lookup::Full)).await?;
        opened.map_err(Refusal::from)
    }

    async fn list(&self, target: &Target, directory: OwnedFd) -> Result<Response<FileBody>, Refusal> {
        let is_root = target.is_root();
        let title = if is_root { "/".to_owned() } else { format!("/{}/", String::from_utf8_lossy(target.relative())) };
        let page = offload::offload(&*self.offload, move || listing::page(directory, &title, is_root)).await??;
        Ok(page_response(StatusCode::OK, HTML, page))
    }

    /// RFC 9110 13.2.2: preconditions, then ranges, then the file.
    fn file(
        &self,
        method: &Method,
        headers: &HeaderMap,
        file: Regular,
        name: &[u8],
    ) -> Result<Response<FileBody>, Refusal> {
        let now = SystemTime::now();
        let validators = Validators::new(file.mtime, file.mtime_nanoseconds, file.length, file.inode, now);
        match conditional::evaluate(headers, &validators) {
            Outcome::Proceed => {}
            Outcome::NotModified => {
                return Ok(response(StatusCode::NOT_MODIFIED, &validators, FileBody::empty()));
            }
            Outcome::PreconditionFailed => return Err(StatusCode::PRECONDITION_FAILED.into()),
        }
        let selection = selection(method, headers, &validators, file.length, now);
        let content_type = content_type(name);
        let length = file.length;
        let mut response = match selection {
            Selection::Whole if method == Method::HEAD => {
                with_content(StatusCode::OK, &validators, length, content_type, FileBody::empty())
            }
            Selection::Whole => {
                let body = self.body(file.file, ByteRange { start: 0, end: length })?;
                with_content(StatusCode::OK, &validators, length, content_type, body)
            }
            Selection::One(range) => {
                let body = self.body(file.file, range)?;
                let partial = StatusCode::PARTIAL_CONTENT;
                let mut response = with_content(partial, &validators, range.length(), content_type, body);
                response.headers_mut().insert(CONTENT_RANGE, value(range.content_range(length)));
                response
            }
            Selection::Many(ranges) => self.multipart(file, &ranges, &content_type, &validators),
            Selection::Unsatisfiable => {
                let unsatisfied = value(format!("bytes */{length}"));
                return Err(Refusal::from(StatusCode::RANGE_NOT_SATISFIABLE).with(CONTENT_RANGE, unsatisfied));
            }
        };
        response.headers_mut().insert(ACCEPT_RANGES, BYTES);
        Ok(response)
    }

    fn multipart(
        &self,
        file: Regular,
        ranges: &[ByteRange],
        part_type: &HeaderValue,
        validators: &Validators,
    ) -> Response<FileBody> {
        // 128 random bits that the client could not know: no content contains them but by chance.
        let random = || RandomState::new().hash_one(file.length);
        let boundary = format!("{:016x}{:016x}", random(), random());
        let parts = multipart_parts(ranges, &boundary, part_type, file.length);
        let length = parts.iter().map(Part::length).sum();
        let body = FileBody::stream(file.file, parts, None, self.nowait.load(Ordering::Relaxed), self.sendfile);
        let content_type = value(format!("multipart/byteranges; boundary={boundary}"));
        with_content(StatusCode::PARTIAL_CONTENT, validators, length, content_type, body)
    }

    /// A body of one range. When it is small and the page cache has all of it, it is read here and
    /// now: head and body then leave in one write, and the file is closed before the response is
    /// sent.
    fn body(&self, file: File, range: ByteRange) -> io::Result<FileBody> {
        if range.length() == 0 {
            return Ok(FileBody::empty());
        }
        let nowait = self.nowait.load(Ordering::Relaxed);
        // A large one is not read here; a byte tells whether it could be.
        let is_large = self.sendfile && range.length() >= SENDFILE_BYTES_MIN;
        let most = if is_large { 1 } else { CHUNK_BYTES };
        let mut first = None;
        if nowait {
            let length = usize::try_from(range.length()).map_or(most, |length| length.min(most));
            match open::read_nowait(&file, range.start, length)? {
                Nowait::Bytes(bytes) if bytes.len() as u64 == range.length() => {
                    return Ok(FileBody::full(bytes));
                }
                Nowait::Bytes(bytes) => first = Some(bytes).filter(|_| !is_large),
                Nowait::Unsupported => self.nowait.store(false, Ordering::Relaxed),
                Nowait::Cold | Nowait::End => {}
            }
        }
        Ok(FileBody::stream(file, VecDeque::from([Part::File(range)]), first, nowait, self.sendfile))
    }
}

impl fmt::Debug for Files {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = formatter.debug_struct("Files");
        debug
            .field("root", &self.root)
            .field("index", &self.index)
            .field("listing", &self.listing)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for FilesError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FilesError { root, source } = self;
        let advice = match source.raw_os_error() {
            Some(libc::ENOENT) => "create it, or name a directory that exists",
            Some(libc::ENOTDIR) => "name a directory, not a file",
            Some(libc::EACCES) => {
                "give this user the right to read and search it (r-x), and to search the directories above it"
            }
            Some(libc::ENOSYS | libc::EPERM) => {
                "serving files needs the openat2 system call: Linux 5.6 or newer, and a container sandbox (seccomp) that allows it"
            }
            Some(libc::EMFILE | libc::ENFILE) => "raise the limit on open files (ulimit -n, LimitNOFILE=)",
            _ => "check the directory and the file system it is on",
        };
        write!(
            formatter,
            "cannot serve files from {}: opening the directory failed: {source}; {advice}",
            root.display()
        )
    }
}

impl Error for FilesError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.source)
    }
}

enum Found<'a> {
    /// And the name it was opened by, which decides the content type.
    File(Regular, Cow<'a, [u8]>),
    /// A directory without its slash.
    Directory,
    Listable(OwnedFd),
}

/// Range is defined for GET only (RFC 9110 14.2), and a repeated Range header is malformed.
fn selection(method: &Method, headers: &HeaderMap, validators: &Validators, length: u64, now: SystemTime) -> Selection {
    let mut ranges = headers.get_all(RANGE).iter();
    match (ranges.next(), ranges.next()) {
        (Some(range), None) if method == Method::GET && conditional::range_applies(headers, validators, now) => {
            range::select(range, length)
        }
        _ => Selection::Whole,
    }
}
