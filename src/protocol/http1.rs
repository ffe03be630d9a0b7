//! A connection that speaks HTTP/1: hyper on our stream, with what hyper leaves to its user: timeouts that tell an idle
//! client from a slow head, the drain, and an orderly close.
//!
//! hyper is brought in at the first byte: a connection that has not spoken costs its row, its task and nothing else.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::Body as HttpBody;
use hyper::body::Incoming;
use hyper::rt::ReadBufCursor;
use hyper::server::conn::http1;

use super::answer::{Answering, InFlight, Refusal};
use super::outgoing::{self, Outgoing};
use crate::body::{Body, Connection as ConnectionInfo, UploadWatch};
use crate::executor::core::Core;
use crate::executor::generation::DRAIN_GRACE;
use crate::executor::tasks::LocalFuture;
use crate::net::stream::Stream;
use crate::server::Connect;
use crate::service::Service;
use crate::settings::HttpLimits;
use crate::time::{Sleep, later};
use crate::{BoxError, Request, Response};

/// Bytes of a request that was not read that are thrown away before the connection is closed.
const LINGER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// How often a connection is looked at when neither its hibernation nor the time limit of a head says so.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Serves connections of one generation with its service.
pub(crate) struct Http1 {
    core: Rc<Core>,
    speak: Rc<dyn Speak>,
}

impl Http1 {
    pub(crate) fn new<S: Service>(core: Rc<Core>, service: S) -> Self {
        let service = Rc::new(service);
        let speak = speaker(&core, move |request| {
            let service = Rc::clone(&service);
            // The call is in the future: a service may do its work before it returns one of its own, and panic.
            async move { service.call(request).await }
        });
        Self { core, speak }
    }
}

/// Makes hyper's connection on an I/O.
trait Speak {
    fn speak(self: Rc<Self>, io: HttpIo, info: ConnectionInfo) -> Pin<Box<dyn Speaking>>;
}

/// Has requests answered by the futures that `answer` makes.
struct Speaker<A> {
    core: Rc<Core>,
    builder: http1::Builder,
    answer: A,
}

fn speaker<A, F, B>(core: &Rc<Core>, answer: A) -> Rc<dyn Speak>
where
    A: Fn(Request) -> F + 'static,
    F: Future<Output = Result<Response<B>, BoxError>> + 'static,
    B: HttpBody<Data: 'static, Error: Into<BoxError>> + 'static,
{
    let limits = &core.settings.http;
    let mut builder = http1::Builder::new();
    builder
        // A client may close its half after the request and still wait for the answer; for how long, and whether it
        // has gone altogether, is ours to tell: hyper would not even poll the handler.
        .half_close(true)
        .max_headers(limits.headers_max)
        .max_header_size(limits.header_bytes_max)
        .max_buf_size(limits.header_bytes_max.max(8192))
        // Ours tell idle from slow; hyper's runs from the end of the last response.
        .header_read_timeout(None);
    Rc::new(Speaker { core: Rc::clone(core), builder, answer })
}

impl<A, F, B> Speak for Speaker<A>
where
    A: Fn(Request) -> F + 'static,
    F: Future<Output = Result<Response<B>, BoxError>> + 'static,
    B: HttpBody<Data: 'static, Error: Into<BoxError>> + 'static,
{
    fn speak(self: Rc<Self>, io: HttpIo, info: ConnectionInfo) -> Pin<Box<dyn Speaking>> {
        let (speaker, activity) = (Rc::clone(&self), Rc::clone(&io.activity));
        let answer = hyper::service::service_fn(move |request: http::Request<Incoming>| {
            // Boxed for the time of the request: hyper keeps room for a future of this type on every connection, idle ones
            // too, and moves it there; this one is large. The box is made first, so that the future comes into being in it:
            // one that is made on the stack is copied, with all the room that it has for what comes later.
            let place = Box::new_uninit();
            let core = &speaker.core;
            let refusal = refusal_of(&request, core, &activity);
            let limits = &core.settings.http;
            let may_go_past_hyper = outgoing::is_possible(request.method(), request.body());
            let in_flight = InFlight::begin(core, &activity);
            let request = request.map(|body| {
                Body::incoming(body, limits.body_bytes_max, limits.body_timeout, &activity.uploads, info.clone())
            });
            let call = (speaker.answer)(request);
            Box::into_pin(Box::write(place, Answering::new(call, refusal, in_flight, may_go_past_hyper)))
        });
        Box::pin(self.builder.serve_connection(io, answer))
    }
}

/// Why this request does not get to the service, if it does not.
fn refusal_of(request: &http::Request<Incoming>, core: &Core, activity: &Activity) -> Option<Refusal> {
    if activity.is_sending_file() {
        Some(Refusal::OutOfTurn)
    } else if is_overloaded(core) {
        Some(Refusal::Overloaded { body_to_come: !request.body().is_end_stream() })
    } else if request.body().size_hint().lower() > core.settings.http.body_bytes_max {
        Some(Refusal::Oversized)
    } else {
        None
    }
}

/// Whether the executor has too much to do to take one more request.
fn is_overloaded(core: &Core) -> bool {
    let shedder = core.shedder.as_ref();
    shedder.is_some_and(|shedder| shedder.borrow_mut().refuses(core.cells.in_flight.get(), Instant::now))
}

impl Connect for Http1 {
    fn connect(self: Rc<Self>, stream: Stream, peer: SocketAddr, listener: &Arc<str>) -> LocalFuture {
        let core = Rc::clone(&self.core);
        let activity = Rc::new(Activity::new(core.now()));
        let deadline = activity.deadline(&core.settings.http);
        let socket = stream.key();
        core.quiet.set(core.quiet.get() + 1);
        let io = HttpIo { stream, activity: Rc::clone(&activity), core: Rc::clone(&core), replay: None };
        Box::pin(Connection {
            core,
            speak: Rc::clone(&self.speak),
            socket,
            peer,
            listener: Arc::clone(listener),
            activity,
            stage: Stage::Silent(io),
            timer: deadline.map(Sleep::until),
            draining: Draining::No,
        })
    }
}

/// What a connection has been doing, shared by those who see a part of it each: the I/O (bytes), the service (requests),
/// the connection's task (time).
pub(crate) struct Activity {
    in_flight: Cell<u32>,
    /// The first byte since the last request came then.
    head_since: Cell<Option<Instant>>,
    /// The last request ended, the last byte passed or the client's end was noticed, then.
    quiet_since: Cell<Instant>,
    uploads: Arc<UploadWatch>,
    /// The client has taken nothing since then of what there is for it.
    blocked_since: Cell<Option<Instant>>,
    /// The client has ended its direction, and this was noticed while a request was in flight.
    has_finished: Cell<bool>,
    /// A request has been answered.
    spoke: Cell<bool>,
    /// hyper may have bytes of an answer that it has not handed over yet: a request ends when hyper has all of its answer.
    has_unsent: Cell<bool>,
    /// The file that follows the head hyper is writing. It holds an [`InFlight`], and that this: the connection's end
    /// takes it out.
    outgoing: Cell<Option<Box<Outgoing>>>,
}

impl Activity {
    fn new(now: Instant) -> Self {
        Self {
            in_flight: Cell::new(0),
            head_since: Cell::new(None),
            quiet_since: Cell::new(now),
            uploads: Arc::default(),
            blocked_since: Cell::new(None),
            has_finished: Cell::new(false),
            spoke: Cell::new(false),
            has_unsent: Cell::new(false),
            outgoing: Cell::new(None),
        }
    }

    /// Has the file sent when hyper flushes the head before it.
    pub(crate) fn send_file(&self, file: Outgoing) {
        self.outgoing.set(Some(Box::new(file)));
    }

    /// Whether a file, with its head before it, has not been sent to its end. hyper begins no request meanwhile.
    pub(crate) fn is_sending_file(&self) -> bool {
        let outgoing = self.outgoing.take();
        let is_sending = outgoing.is_some();
        self.outgoing.set(outgoing);
        is_sending
    }

    fn poll_file(&self, context: &mut Context<'_>, stream: &mut Stream, now: Instant) -> Poll<io::Result<()>> {
        let Some(mut outgoing) = self.outgoing.take() else { return Poll::Ready(Ok(())) };
        self.quiet_since.set(now);
        let polled = outgoing.poll_send(context, stream);
        if polled.is_pending() {
            self.outgoing.set(Some(outgoing));
        }
        polled
    }

    pub(crate) fn request_began(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
        self.head_since.set(None);
    }

    pub(crate) fn request_ended(&self, now: Instant) {
        self.in_flight.set(self.in_flight.get() - 1);
        self.quiet_since.set(now);
        self.spoke.set(true);
        self.has_unsent.set(true);
    }

    /// Whether nothing has been going on for long enough that hyper's part can be given back.
    fn is_asleep(&self, limits: &HttpLimits, now: Instant) -> bool {
        let quiet = now.saturating_duration_since(self.quiet_since.get());
        self.is_between_requests() && asleep_after(limits).is_some_and(|limit| quiet >= limit)
    }

    /// When the connection is to be looked at, unless it has a deadline before.
    fn next_look(&self, limits: &HttpLimits, now: Instant) -> Instant {
        let period = asleep_after(limits).unwrap_or(LOOK_AGAIN);
        let look = later(self.quiet_since.get(), period);
        if look > now { look } else { later(now, period) }
    }

    /// Whether hyper knows nothing that the next one would have to.
    fn is_between_requests(&self) -> bool {
        !self.is_answering() && self.head_since.get().is_none() && !self.has_rest()
    }

    /// Whether there is something for the client that the kernel has not taken yet.
    fn is_answering(&self) -> bool {
        self.in_flight.get() > 0 || self.has_unsent.get() || self.blocked_since.get().is_some()
    }

    /// Whether hyper has been given all of an answer and nothing but its next poll is needed for the kernel to have it.
    fn is_to_be_flushed(&self) -> bool {
        self.in_flight.get() == 0 && self.has_unsent.get() && self.blocked_since.get().is_none()
    }

    /// Whether the rest of a request's body may still come: hyper alone knows where that ends.
    fn has_rest(&self) -> bool {
        Arc::strong_count(&self.uploads) > 1 || self.uploads.was_cut()
    }

    fn bytes_came(&self, now: Instant) {
        self.quiet_since.set(now);
        if self.in_flight.get() == 0 && self.head_since.get().is_none() {
            self.head_since.set(Some(now));
        }
    }

    /// Until when the client may begin one more request in a drain that was noticed at `now`: a new one may still be
    /// sending its first.
    fn last_chance(&self, now: Instant, patience: Duration) -> Instant {
        let patient = later(now, patience);
        if self.spoke.get() { patient } else { patient.max(later(self.quiet_since.get(), DRAIN_GRACE)) }
    }

    /// When the client will have taken too long over what it is doing, which may be to read an answer; `None` while the
    /// server is at work for one that is there, unless it waits for a body away from here.
    fn deadline(&self, limits: &HttpLimits) -> Option<Instant> {
        if let Some(since) = self.blocked_since.get() {
            return limits.send_timeout.map(|limit| later(since, limit));
        }
        if self.in_flight.get() > 0 {
            let upload = limits.body_timeout.and_then(|limit| Some(later(self.uploads.waits_since()?, limit)));
            let half_close = limits.half_close_timeout.filter(|_| self.has_finished.get());
            let gone = half_close.map(|limit| later(self.quiet_since.get(), limit));
            return upload.into_iter().chain(gone).min();
        }
        match self.head_since.get() {
            Some(since) => limits.header_timeout.map(|limit| later(since, limit)),
            None => limits.idle_timeout.map(|limit| later(self.quiet_since.get(), limit)),
        }
    }
}

/// After which quiet time hyper's part is given back. That is also how it is found out that hyper holds the beginning of
/// another head, which came together with the last request: so it is no later than such a head may take.
fn asleep_after(limits: &HttpLimits) -> Option<Duration> {
    limits.hibernate_after.into_iter().chain(limits.header_timeout).min()
}

/// hyper's connection without its type.
trait Speaking {
    fn poll_done(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>>;
    fn drain(self: Pin<&mut Self>);
    /// The I/O, with what was read and not used.
    fn into_io(self: Pin<Box<Self>>) -> HttpIo;
}

impl<H, B> Speaking for http1::Connection<HttpIo, H>
where
    H: hyper::service::HttpService<Incoming, ResBody = B>,
    H::Error: Into<BoxError>,
    B: HttpBody<Error: Into<BoxError>> + 'static,
    Self: Future<Output = Result<(), hyper::Error>> + Unpin,
{
    fn poll_done(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.poll(context)
    }

    fn drain(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }

    fn into_io(self: Pin<Box<Self>>) -> HttpIo {
        let parts = (*Pin::into_inner(self)).into_parts();
        // Empty it would still keep hyper's buffer.
        let replay = (!parts.read_buf.is_empty()).then(|| Box::new(parts.read_buf));
        HttpIo { replay, ..parts.io }
    }
}

enum Stage {
    /// Nothing has been received yet, or for long.
    Silent(HttpIo),
    Speaking(Pin<Box<dyn Speaking>>),
    /// All is answered, or nothing can be any more: our direction is to end, and what still comes in is thrown away for a
    /// while.
    Lingering {
        io: HttpIo,
        is_shut: bool,
        bytes_left: usize,
    },
    Done,
}

/// A connection's task.
struct Connection {
    core: Rc<Core>,
    speak: Rc<dyn Speak>,
    /// The stream's, wherever that is.
    socket: u32,
    peer: SocketAddr,
    listener: Arc<str>,
    activity: Rc<Activity>,
    stage: Stage,
    /// Armed for no later than the deadline of what the client is doing; checked when it fires, so that a request costs
    /// no timer.
    timer: Option<Sleep>,
    draining: Draining,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Draining {
    No,
    /// The executor drains: the next answer is the last, and between two requests the connection is not kept.
    Noticed,
    /// hyper has been told, which alone knows where the rest of a request's body ends.
    Told,
}

impl Future for Connection {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if this.draining == Draining::No && this.core.draining().is_some() {
            this.draining = Draining::Noticed;
            if matches!(this.stage, Stage::Silent(_)) {
                this.await_last();
            }
        }
        if this.poll_stages(context).is_ready() || this.poll_timer(context).is_ready() {
            drop(this.take_stage());
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

impl Connection {
    fn poll_stages(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            match &mut self.stage {
                Stage::Silent(io) => {
                    if io.replay.is_none() {
                        ready!(io.stream.poll_readable(context));
                    }
                    self.begin_to_speak();
                }
                Stage::Speaking(speaking) => match speaking.as_mut().poll_done(context) {
                    Poll::Pending if self.draining == Draining::Noticed && !self.activity.is_answering() => {
                        if !self.part() {
                            return Poll::Pending;
                        }
                    }
                    Poll::Pending => {
                        if self.draining == Draining::Noticed && self.activity.is_to_be_flushed() {
                            context.waker().wake_by_ref();
                        }
                        return self.poll_peer_end(context);
                    }
                    Poll::Ready(done) => self.finish(done),
                },
                // hyper has done so, unless it ended in error.
                Stage::Lingering { io, is_shut: is_shut @ false, .. } => {
                    if ready!(hyper::rt::Write::poll_shutdown(Pin::new(io), context)).is_err() {
                        return Poll::Ready(());
                    }
                    *is_shut = true;
                }
                Stage::Lingering { io, bytes_left, .. } => match ready!(io.stream.poll_receive(context, <[u8]>::len)) {
                    Ok(count @ 1..) if count < *bytes_left => *bytes_left -= count,
                    _ => return Poll::Ready(()),
                },
                Stage::Done => return Poll::Ready(()),
            }
        }
    }

    /// Notes that the client has ended its direction while it is being answered, when hyper does not read; ready when
    /// there is no client any more.
    fn poll_peer_end(&self, context: &mut Context<'_>) -> Poll<()> {
        let activity = &self.activity;
        if activity.in_flight.get() == 0 || activity.has_finished.get() {
            return Poll::Pending;
        }
        match ready!(self.core.driver().poll_peer_end(self.socket, context)) {
            Ok(()) => {
                activity.has_finished.set(true);
                activity.quiet_since.set(self.core.now());
                Poll::Pending
            }
            Err(error) => {
                tracing::debug!(slot = self.core.slot, %error, "a client went away before it was answered");
                Poll::Ready(())
            }
        }
    }

    fn take_stage(&mut self) -> Stage {
        let stage = std::mem::replace(&mut self.stage, Stage::Done);
        if matches!(stage, Stage::Silent(_)) {
            self.core.quiet.set(self.core.quiet.get() - 1);
        }
        stage
    }

    fn begin_to_speak(&mut self) {
        if let Stage::Silent(io) = self.take_stage() {
            let info = ConnectionInfo::new(Some(self.peer), &self.listener);
            self.stage = Stage::Speaking(Rc::clone(&self.speak).speak(io, info));
            self.timer = Some(Sleep::until(self.next_look()));
        }
    }

    /// Gives hyper's part back; the next byte makes it anew, and so does what it has of another head already.
    fn hibernate(&mut self) {
        if let Stage::Speaking(speaking) = std::mem::replace(&mut self.stage, Stage::Done) {
            let io = speaking.into_io();
            if io.replay.is_some() {
                self.activity.head_since.set(Some(self.activity.quiet_since.get()));
            }
            self.stage = Stage::Silent(io);
            self.core.quiet.set(self.core.quiet.get() + 1);
            self.core.note_hibernation();
            self.timer = self.activity.deadline(&self.core.settings.http).map(Sleep::until);
        }
    }

    /// In a drain, with every answer sent: ends what hyper does for the client, unless it has begun to send another head.
    fn part(&mut self) -> bool {
        if let (Stage::Speaking(speaking), true) = (&mut self.stage, self.activity.has_rest()) {
            self.draining = Draining::Told;
            speaking.as_mut().drain();
            return true;
        }
        let is_asking = self.activity.head_since.get().is_some() || self.core.driver().is_readable(self.socket);
        if !is_asking {
            // hyper may hold the beginning of a head that came with the last request; it is then made anew.
            self.hibernate();
            self.await_last();
        }
        !is_asking
    }

    /// Gives the client its time for one more request, during a drain.
    fn await_last(&mut self) {
        let (now, patience) = (self.core.now(), self.core.patience());
        self.timer = Some(Sleep::until(self.activity.last_chance(now, patience)));
    }

    /// hyper is done: close now, or linger for what the client is still sending.
    fn finish(&mut self, done: Result<(), hyper::Error>) {
        if let Err(error) = done {
            tracing::debug!(slot = self.core.slot, %error, "a connection ended in error");
        }
        let Stage::Speaking(speaking) = std::mem::replace(&mut self.stage, Stage::Done) else { return };
        if self.activity.uploads.was_cut() {
            let limit = self.core.settings.http.linger_timeout;
            self.timer = limit.map(|limit| Sleep::until(later(self.core.now(), limit)));
            self.stage = Stage::Lingering { io: speaking.into_io(), is_shut: false, bytes_left: LINGER_BYTES_MAX };
        }
    }

    /// Ready when the client has taken too long.
    fn poll_timer(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let now = self.core.now();
        loop {
            let deadline = self.deadline();
            let Some(timer) = &mut self.timer else { return Poll::Pending };
            if let Some(nearer) = deadline.filter(|deadline| *deadline < timer.deadline()) {
                // A head has begun: its limit is nearer than what was waited for.
                timer.reset(nearer);
            }
            if timer.is_waiting(now) {
                return Poll::Pending;
            }
            ready!(Pin::new(&mut *timer).poll(context));
            match (&self.stage, deadline) {
                // Its reader is told, and decides.
                (Stage::Speaking(_), Some(deadline)) if deadline <= now && self.activity.uploads.end_wait() => {
                    self.look_later();
                }
                (Stage::Speaking(_), Some(deadline)) if deadline <= now => return self.time_out(),
                (Stage::Speaking(_), _) if self.activity.is_asleep(&self.core.settings.http, now) => self.hibernate(),
                // Lively, or at work: look again later.
                (Stage::Speaking(_), _) => self.look_later(),
                _ => return self.time_out(),
            }
            if matches!(self.stage, Stage::Silent(_)) && self.poll_stages(context).is_ready() {
                return Poll::Ready(());
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::Speaking(_) => self.activity.deadline(&self.core.settings.http),
            _ => None,
        }
    }

    fn look_later(&mut self) {
        let next_look = self.next_look();
        if let Some(timer) = &mut self.timer {
            timer.reset(next_look);
        }
    }

    fn next_look(&self) -> Instant {
        self.activity.next_look(&self.core.settings.http, self.core.now())
    }

    fn time_out(&mut self) -> Poll<()> {
        if self.activity.in_flight.get() > 0 && self.activity.blocked_since.get().is_none() {
            tracing::debug!(slot = self.core.slot, "a client that had ended its direction was not answered in time");
            return Poll::Ready(());
        }
        if self.draining == Draining::No || !matches!(self.stage, Stage::Silent(_)) {
            self.core.cells.timed_out.add(1);
        }
        if self.activity.blocked_since.get().is_some()
            && let Stage::Speaking(speaking) = std::mem::replace(&mut self.stage, Stage::Done)
        {
            // What it does not read would stay in the kernel's memory for minutes.
            speaking.into_io().stream.reset();
        }
        Poll::Ready(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        drop(self.activity.outgoing.take());
        // Dropped last: what a service's future does then may be a panic.
        let _stage = self.take_stage();
        self.core.cells.open.subtract(1);
    }
}

/// A stream that notes when bytes pass.
struct HttpIo {
    stream: Stream,
    activity: Rc<Activity>,
    core: Rc<Core>,
    /// Bytes that were read before and not used: to be read again first. Never empty; boxed, for hardly any connection
    /// has them.
    replay: Option<Box<Bytes>>,
}

impl hyper::rt::Read for HttpIo {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(replay) = &mut this.replay {
            let count = replay.len().min(buffer.remaining());
            buffer.put_slice(&replay.split_to(count));
            if replay.is_empty() {
                this.replay = None;
            }
            this.activity.bytes_came(this.core.now());
            return Poll::Ready(Ok(()));
        }
        let polled = hyper::rt::Read::poll_read(Pin::new(&mut this.stream), context, buffer);
        if polled.is_ready() {
            this.activity.bytes_came(this.core.now());
        }
        polled
    }
}

impl hyper::rt::Write for HttpIo {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = match this.activity.outgoing.take() {
            None => this.stream.poll_send(context, bytes),
            Some(mut outgoing) => {
                let polled = outgoing.poll_head(context, &mut this.stream, bytes);
                this.activity.outgoing.set(Some(outgoing));
                polled
            }
        };
        this.activity.blocked_since.set(this.stream.blocked_since());
        match polled {
            Poll::Ready(_) => this.activity.quiet_since.set(this.core.now()),
            Poll::Pending => this.activity.has_unsent.set(true),
        }
        polled
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // The stream itself has nothing to flush: what it took is in the kernel's hands, or goes there with this turn.
        let polled = this.activity.poll_file(context, &mut this.stream, this.core.now());
        this.activity.blocked_since.set(this.stream.blocked_since());
        if polled.is_ready() {
            // hyper flushes us when it has handed over all that it had.
            this.activity.has_unsent.set(false);
        }
        polled
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        hyper::rt::Write::poll_shutdown(Pin::new(&mut self.stream), context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_a_drain_a_new_connection_is_waited_for_from_its_accept_on() {
        let accepted = Instant::now();
        let activity = Activity::new(accepted);
        let chance = |after, patience| activity.last_chance(accepted + after, patience) - accepted;
        assert_eq!(chance(Duration::ZERO, Duration::ZERO), DRAIN_GRACE);
        assert_eq!(chance(DRAIN_GRACE / 2, Duration::ZERO), DRAIN_GRACE);
        assert_eq!(chance(DRAIN_GRACE * 3, Duration::ZERO), DRAIN_GRACE * 3, "not at all");
        assert_eq!(chance(DRAIN_GRACE * 3, DRAIN_GRACE), DRAIN_GRACE * 4, "as long as those that have spoken");
        activity.spoke.set(true);
        assert_eq!(chance(Duration::ZERO, Duration::ZERO), Duration::ZERO);
    }
}
