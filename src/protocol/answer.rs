//! From a service's result to the response hyper sends: contained panics, errors with their status, and a body that
//! tells its connection when it is done.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::{HeaderValue, StatusCode, header};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::http1::Activity;
use super::outgoing::{self, OUT_OF_TURN, Outgoing};
use crate::body::BodyError;
use crate::executor::core::{Core, Scene};
use crate::panics::{Panic, caught};
use crate::service::{NoUpgrade, Reject};
use crate::{BoxError, PeerError, Response, TaskError};

pin_project! {
    /// Polls and drops a service's future with panics caught: `Err` is the panic.
    pub(crate) struct Contained<F> {
        #[pin]
        future: Option<F>,
    }
}

impl<F> Contained<F> {
    pub(crate) fn new(future: F) -> Self {
        Self { future: Some(future) }
    }
}

impl<F: Future> Future for Contained<F> {
    type Output = Result<F::Output, Panic>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let polled = catch_unwind(AssertUnwindSafe(|| match this.future.as_mut().as_pin_mut() {
            Some(future) => future.poll(context),
            None => Poll::Pending,
        }));
        let output = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(output)) => Ok(output),
            Err(payload) => Err(caught(payload)),
        };
        // Dropped here, caught on its own: its fields' drops may panic as well.
        match catch_unwind(AssertUnwindSafe(|| this.future.set(None))) {
            Ok(()) => Poll::Ready(output),
            Err(payload) => Poll::Ready(output.and(Err(caught(payload)))),
        }
    }
}

/// Counts a request as being answered, from the service's call to the end of the response's body.
pub(crate) struct InFlight {
    core: Rc<Core>,
    activity: Rc<Activity>,
}

impl InFlight {
    pub(crate) fn begin(core: &Rc<Core>, activity: &Rc<Activity>) -> Self {
        core.cells.requests.add(1);
        core.cells.in_flight.add(1);
        activity.request_began();
        Self { core: Rc::clone(core), activity: Rc::clone(activity) }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.core.cells.in_flight.subtract(1);
        self.activity.request_ended(self.core.now());
    }
}

/// Why a request does not get as far as the service.
#[derive(Clone, Copy)]
pub(crate) enum Refusal {
    /// It came before the file of the last response had been sent.
    OutOfTurn,
    Overloaded {
        body_to_come: bool,
    },
    Oversized,
}

pin_project! {
    /// Answers one request by what `call` returns, unless it is refused.
    ///
    /// Not an async block: that would keep room for the request once more beside `call`, which has it.
    pub(crate) struct Answering<F> {
        #[pin]
        call: Contained<F>,
        refusal: Option<Refusal>,
        // Taken with the answer.
        in_flight: Option<InFlight>,
        may_go_past_hyper: bool,
    }
}

impl<F> Answering<F> {
    pub(crate) fn new(call: F, refusal: Option<Refusal>, in_flight: InFlight, may_go_past_hyper: bool) -> Self {
        Self { call: Contained::new(call), refusal, in_flight: Some(in_flight), may_go_past_hyper }
    }
}

impl<F, B> Future for Answering<F>
where
    F: Future<Output = Result<Response<B>, BoxError>>,
    B: HttpBody + 'static,
{
    type Output = Result<Response<AnswerBody<B>>, BoxError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = match this.refusal {
            None => Ok(ready!(this.call.poll(context))),
            Some(refusal) => Err(*refusal),
        };
        let in_flight = this.in_flight.take().expect("it is not polled after its answer");
        Poll::Ready(match result {
            Ok(result) => Ok(respond(result, in_flight, *this.may_go_past_hyper)),
            Err(Refusal::Overloaded { body_to_come }) => Ok(overloaded(body_to_come, in_flight)),
            Err(Refusal::Oversized) => Ok(closing_text(StatusCode::PAYLOAD_TOO_LARGE, None, in_flight)),
            Err(Refusal::OutOfTurn) => Err(OUT_OF_TURN.into()),
        })
    }
}

/// The most of a body that hyper gets at once. It copies what it gets, into a buffer that it keeps as large as it ever was
/// for as long as it has the connection.
const SLICE_BYTES_MAX: usize = 64 * 1024;

pin_project! {
    /// A response's body.
    pub(crate) struct AnswerBody<B: HttpBody> {
        #[pin]
        content: Content<B>,
        // Of a piece of the service's that is too long for hyper: what comes next. Boxed, for hardly any response has one.
        rest: Option<Box<B::Data>>,
        // Dropped with the body, when hyper is done with it. One whose content goes past hyper has none.
        in_flight: Option<InFlight>,
    }
}

impl<B: HttpBody> AnswerBody<B> {
    fn new(content: Content<B>, in_flight: Option<InFlight>) -> Self {
        Self { content, rest: None, in_flight }
    }
}

pin_project! {
    #[project = ContentProjected]
    enum Content<B> {
        /// The service's body.
        Service { #[pin] body: B },
        /// Of ours, and not yet taken.
        Text { text: Bytes },
        /// A text that has been taken.
        Taken,
        /// It goes past hyper, which gets no bytes, in a body that is not known to be empty: for with one that is hyper
        /// leaves out a `content-length`.
        PastHyper,
    }
}

/// A piece of either.
pub(crate) enum Chunk<D> {
    Service(D),
    /// A text of ours, or a slice of a longer piece of the service's.
    Text(Bytes),
}

impl<D: Buf> Buf for Chunk<D> {
    fn remaining(&self) -> usize {
        match self {
            Self::Service(data) => data.remaining(),
            Self::Text(text) => text.remaining(),
        }
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Self::Service(data) => data.chunk(),
            Self::Text(text) => text.chunk(),
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::Service(data) => data.advance(count),
            Self::Text(text) => text.advance(count),
        }
    }
}

impl<B: HttpBody<Error: Into<BoxError>>> HttpBody for AnswerBody<B> {
    type Data = Chunk<B::Data>;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, BoxError>>> {
        let mut this = self.project();
        if let Some(rest) = this.rest.take() {
            return Poll::Ready(Some(Ok(Frame::data(slice(*rest, this.rest)))));
        }
        let body = match this.content.as_mut().project() {
            ContentProjected::Service { body } => body,
            ContentProjected::Text { text } => {
                let text = std::mem::take(text);
                this.content.set(Content::Taken);
                return Poll::Ready(Some(Ok(Frame::data(Chunk::Text(text)))));
            }
            ContentProjected::Taken | ContentProjected::PastHyper => return Poll::Ready(None),
        };
        match catch_unwind(AssertUnwindSafe(|| body.poll_frame(context))) {
            Ok(polled) => polled.map(|frame| {
                frame.map(|frame| frame.map(|frame| frame.map_data(|data| slice(data, this.rest))).map_err(Into::into))
            }),
            Err(payload) => {
                // The head has gone out, or is on its way: all that is left is to break the connection off.
                let panic = caught(payload);
                let error = format!("the response's body panicked: {panic}").into();
                if let Some(in_flight) = this.in_flight {
                    in_flight.core.contained(Scene::ResponseBody, panic);
                }
                Poll::Ready(Some(Err(error)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Service { body } => self.rest.is_none() && body.is_end_stream(),
            Content::Text { .. } | Content::PastHyper => false,
            Content::Taken => true,
        }
    }

    /// Of what the service's body has yet to give: it is asked before the first piece is taken.
    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Service { body } => body.size_hint(),
            Content::Text { text } => SizeHint::with_exact(text.len() as u64),
            Content::Taken | Content::PastHyper => SizeHint::with_exact(0),
        }
    }
}

/// As much of `data` as hyper gets at once; what is left is put into `rest`.
fn slice<D: Buf>(mut data: D, rest: &mut Option<Box<D>>) -> Chunk<D> {
    if data.remaining() <= SLICE_BYTES_MAX {
        return Chunk::Service(data);
    }
    let slice = data.copy_to_bytes(SLICE_BYTES_MAX);
    *rest = Some(Box::new(data));
    Chunk::Text(slice)
}

/// The response to what a service returned, or how it failed. A large file goes past hyper where it may.
fn respond<B: HttpBody + 'static>(
    result: Result<Result<Response<B>, BoxError>, Panic>,
    in_flight: InFlight,
    may_go_past_hyper: bool,
) -> Response<AnswerBody<B>> {
    // hyper says so by itself only for requests that came before it was told of the drain.
    let draining = in_flight.core.draining().is_some();
    let mut response = match result {
        // hyper would send it, and then find nobody to take the connection over.
        Ok(Ok(response)) if response.status() == StatusCode::SWITCHING_PROTOCOLS => refuse(NoUpgrade.into(), in_flight),
        Ok(Ok(response)) => content(response, in_flight, may_go_past_hyper),
        Ok(Err(error)) => refuse(error, in_flight),
        Err(panic) => {
            in_flight.core.contained(Scene::Handler, panic);
            closing_text(StatusCode::INTERNAL_SERVER_ERROR, None, in_flight)
        }
    };
    if draining {
        close_after(&mut response);
    }
    response
}

fn content<B: HttpBody + 'static>(
    mut response: Response<B>,
    in_flight: InFlight,
    may_go_past_hyper: bool,
) -> Response<AnswerBody<B>> {
    if may_go_past_hyper && let Some(file) = outgoing::take_file(&mut response) {
        let activity = Rc::clone(&in_flight.activity);
        activity.send_file(Outgoing::new(file, in_flight));
        return response.map(|_| AnswerBody::new(Content::PastHyper, None));
    }
    response.map(|body| AnswerBody::new(Content::Service { body }, Some(in_flight)))
}

/// Makes this the connection's last response.
fn close_after<B>(response: &mut Response<B>) {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
}

fn refuse<B: HttpBody>(error: BoxError, in_flight: InFlight) -> Response<AnswerBody<B>> {
    // Such a status is no answer; hyper would send 101, and break the connection off for the others.
    let reject = error.downcast_ref::<Reject>();
    if reject.is_some_and(|reject| reject.status() == StatusCode::SWITCHING_PROTOCOLS) {
        return refuse(NoUpgrade.into(), in_flight);
    }
    if let Some(reject) = reject.filter(|reject| !reject.status().is_informational()) {
        return text(reject.status(), Some(reject.to_string()), in_flight);
    }
    if let Some(body) = error.downcast_ref::<BodyError>() {
        return closing_text(body.status(), Some(body.to_string()), in_flight);
    }
    let nothing_was_sent = matches!(error.downcast_ref(), Some(PeerError::Full | PeerError::Down));
    if nothing_was_sent || error.downcast_ref::<TaskError>().is_some_and(TaskError::is_overloaded) {
        return try_again(in_flight);
    }
    if error.is::<NoUpgrade>() {
        in_flight.core.log_refusal("answered 501", &error);
        let why = "this server does not upgrade connections to other protocols".to_owned();
        return text(StatusCode::NOT_IMPLEMENTED, Some(why), in_flight);
    }
    in_flight.core.log_refusal("a service failed; answered 500", &error);
    text(StatusCode::INTERNAL_SERVER_ERROR, None, in_flight)
}

/// [`text`], after which the connection is closed.
fn closing_text<B: HttpBody>(status: StatusCode, why: Option<String>, in_flight: InFlight) -> Response<AnswerBody<B>> {
    let mut response = text(status, why, in_flight);
    close_after(&mut response);
    response
}

/// The refusal of a request that would be one too many. The connection stays: a new one would cost both sides more, and
/// come back here or make another executor's load worse. But what is left of a body is not waited for.
fn overloaded<B: HttpBody>(body_to_come: bool, in_flight: InFlight) -> Response<AnswerBody<B>> {
    let core = Rc::clone(&in_flight.core);
    core.cells.overloaded.add(1);
    let mut response = try_again(in_flight);
    if body_to_come || core.draining().is_some() {
        close_after(&mut response);
    }
    response
}

/// 503, with the time after which it may be otherwise.
fn try_again<B: HttpBody>(in_flight: InFlight) -> Response<AnswerBody<B>> {
    let wait = in_flight.core.settings.overload.retry_after;
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    let mut response = text(StatusCode::SERVICE_UNAVAILABLE, None, in_flight);
    response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    response
}

/// A response with a line of text: `why`, or the status in words.
fn text<B: HttpBody>(status: StatusCode, why: Option<String>, in_flight: InFlight) -> Response<AnswerBody<B>> {
    let line = why.unwrap_or_else(|| status.canonical_reason().unwrap_or("error").to_owned());
    let content = Content::Text { text: Bytes::from(format!("{line}\n")) };
    let mut response = Response::new(AnswerBody::new(content, Some(in_flight)));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;

    use http::HeaderMap;

    use super::*;

    struct Frames(VecDeque<Frame<Bytes>>);

    impl HttpBody for Frames {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.pop_front().map(Ok))
        }

        fn is_end_stream(&self) -> bool {
            self.0.is_empty()
        }

        fn size_hint(&self) -> SizeHint {
            SizeHint::with_exact(self.0.iter().filter_map(Frame::data_ref).map(|data| data.len() as u64).sum())
        }
    }

    #[test]
    fn a_long_piece_is_passed_on_in_slices_and_a_short_one_as_it_is() {
        let long: Vec<u8> = (0..SLICE_BYTES_MAX * 3 + 5).map(|index| (index % 251) as u8).collect();
        for trailers in [false, true] {
            let mut frames = vec![Frame::data(Bytes::from_static(b"short")), Frame::data(long.clone().into())];
            if trailers {
                frames.push(Frame::trailers(HeaderMap::new()));
            }
            let mut body = std::pin::pin!(AnswerBody::new(Content::Service { body: Frames(frames.into()) }, None));
            assert_eq!(body.size_hint().exact(), Some(5 + long.len() as u64));
            let (mut bytes, mut lengths) = (Vec::new(), Vec::new());
            let mut context = Context::from_waker(std::task::Waker::noop());
            while !body.is_end_stream() {
                match body.as_mut().poll_frame(&mut context) {
                    Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                        Ok(mut data) => {
                            lengths.push(data.remaining());
                            bytes.extend_from_slice(&data.copy_to_bytes(data.remaining()));
                        }
                        Err(frame) => assert!(trailers && frame.is_trailers() && bytes.len() == 5 + long.len()),
                    },
                    _ => panic!("it is not at its end"),
                }
            }
            assert_eq!(lengths, [5, SLICE_BYTES_MAX, SLICE_BYTES_MAX, SLICE_BYTES_MAX, 5]);
            assert!(bytes.starts_with(b"short") && bytes[5..] == long);
        }
    }
}
