//! A client of a few lines for tests: one request, one connection, no pool, no redirects, no TLS.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{HeaderValue, Method, Request, Response, StatusCode};

use super::LIMIT;

/// Sends a GET by a connection of its own and waits for the whole answer.
///
/// # Errors
/// As [`send`].
pub fn get(address: SocketAddr, path: &str) -> io::Result<Response<Bytes>> {
    send(address, Request::get(path).body(Bytes::new()).map_err(io::Error::other)?)
}

/// Sends a request by a connection of its own and waits for the whole answer.
///
/// ```no_run
/// use ringleader::{Request, test};
///
/// let address = "127.0.0.1:8080".parse()?;
/// let answer = test::send(address, Request::put("/key").header("x-tag", "1").body("value")?)?;
/// assert!(answer.status().is_success());
/// # Ok::<(), ringleader::BoxError>(())
/// ```
///
/// # Errors
/// When there is no connection, nothing happens on it for [`LIMIT`](super::LIMIT), or it ends before the answer does: an
/// answer that was broken off is never taken for a whole one.
pub fn send<B: AsRef<[u8]>>(address: SocketAddr, request: Request<B>) -> io::Result<Response<Bytes>> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let (mut head, body) = request.into_parts();
    let body = body.as_ref();
    let host = HeaderValue::try_from(address.to_string()).map_err(io::Error::other)?;
    head.headers.entry(HOST).or_insert(host);
    head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
    if !body.is_empty() {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    }
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut output = format!("{} {path} HTTP/1.1\r\n", head.method).into_bytes();
    for (name, value) in &head.headers {
        output.extend_from_slice(name.as_ref());
        output.extend_from_slice(b": ");
        output.extend_from_slice(value.as_bytes());
        output.extend_from_slice(b"\r\n");
    }
    output.extend_from_slice(b"\r\n");
    output.extend_from_slice(body);
    // A server that refuses a body need not read it: its answer says more than the write that fails.
    let sent = stream.write_all(&output);
    let mut input = Vec::new();
    let received = stream.read_to_end(&mut input);
    let answer = read_answer(&input, head.method == Method::HEAD, received.is_ok());
    match (answer, received, sent) {
        (Ok(answer), _, _) => Ok(answer),
        (Err(_), _, Err(error)) | (Err(_), Err(error), _) | (Err(error), _, _) => Err(error),
    }
}

/// `ended`: the connection has come to an orderly end, which is the body's end where nothing else says so.
fn read_answer(input: &[u8], of_head: bool, ended: bool) -> io::Result<Response<Bytes>> {
    let (head, rest) = cut(input, b"\r\n\r\n").ok_or_else(|| broken_off(input))?;
    let head = std::str::from_utf8(head).map_err(io::Error::other)?;
    let mut lines = head.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let mut answer = Response::builder().status(status_line.split(' ').nth(1).unwrap_or_default().as_bytes());
    for line in lines {
        let (name, value) = line.split_once(':').ok_or_else(|| malformed(line.as_bytes()))?;
        answer = answer.header(name, value.trim().as_bytes());
    }
    let mut answer = answer.body(Bytes::new()).map_err(io::Error::other)?;
    let headers = answer.headers();
    let has_none = of_head || matches!(answer.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let body = if has_none {
        Vec::new()
    } else if headers.get(TRANSFER_ENCODING).is_some_and(|coding| coding == "chunked") {
        read_chunks(rest)?
    } else if let Some(length) = headers.get(CONTENT_LENGTH) {
        let length = length.to_str().ok().and_then(|length| length.parse::<usize>().ok());
        let length = length.ok_or_else(|| malformed(head.as_bytes()))?;
        rest.get(..length).ok_or_else(|| broken_off(input))?.to_vec()
    } else if ended {
        rest.to_vec()
    } else {
        return Err(broken_off(input));
    };
    *answer.body_mut() = Bytes::from(body);
    Ok(answer)
}

fn read_chunks(mut rest: &[u8]) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let (line, after) = cut(rest, b"\r\n").ok_or_else(|| broken_off(rest))?;
        let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
        let digits = std::str::from_utf8(digits).map_err(io::Error::other)?;
        let length = usize::from_str_radix(digits.trim(), 16).map_err(|_| malformed(line))?;
        if length == 0 {
            return Ok(body);
        }
        let chunk = after.get(..length).ok_or_else(|| broken_off(rest))?;
        body.extend_from_slice(chunk);
        rest = after[length..].strip_prefix(b"\r\n").ok_or_else(|| broken_off(rest))?;
    }
}

/// What is before the first `end` and what is behind it.
fn cut<'a>(input: &'a [u8], end: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = input.windows(end.len()).position(|window| window == end)?;
    Some((&input[..at], &input[at + end.len()..]))
}

fn broken_off(input: &[u8]) -> io::Error {
    let start = String::from_utf8_lossy(&input[..input.len().min(200)]).into_owned();
    let message = format!("the connection ended in the middle of the answer, after {} bytes: {start:?}", input.len());
    io::Error::new(ErrorKind::UnexpectedEof, message)
}

fn malformed(what: &[u8]) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("not HTTP/1.1: {:?}", String::from_utf8_lossy(what)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(input: &str) -> io::Result<String> {
        let answer = read_answer(input.as_bytes(), false, true)?;
        Ok(format!("{} {:?}", answer.status().as_u16(), answer.body()))
    }

    #[test]
    fn bodies_of_every_length_are_read() {
        for (input, wanted) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", "200 b\"hi\""),
            ("HTTP/1.1 404 Not Found\r\n\r\nuntil the end", "404 b\"until the end\""),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\nA;x\r\n0123456789\r\n0\r\n\r\n",
                "200 b\"hi0123456789\"",
            ),
            ("HTTP/1.1 204 No Content\r\n\r\n", "204 b\"\""),
        ] {
            assert_eq!(read(input).unwrap(), wanted, "{input:?}");
        }
    }

    #[test]
    fn what_was_broken_off_is_an_error() {
        for input in [
            "",
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nhi",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhi",
        ] {
            assert_eq!(read(input).unwrap_err().kind(), ErrorKind::UnexpectedEof, "{input:?}");
        }
        assert!(read_answer(b"HTTP/1.1 200 OK\r\n\r\nsome", false, false).is_err(), "reset before its end");
        assert!(read("hello\r\n\r\n").is_err(), "not HTTP");
    }
}
