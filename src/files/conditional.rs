//! Conditional requests (RFC 9110, section 13): compares what the client knows with what the file
//! is. Pure: headers and validators in, a decision out; the time is an argument.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::header::{HeaderMap, HeaderName, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE};

/// HTTP dates have four-digit years: the first second of the year 10000.
const HTTP_DATE_END_SECONDS: u64 = 253_402_300_800;

/// How long a file must have been unchanged for its date to name one content (RFC 9110 8.8.2.2):
/// within one second it may change twice and keep its date.
const STRONG_DATE_AGE: Duration = Duration::from_secs(1);

/// What identifies the present content of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Validators {
    /// A strong entity tag, with its quotes.
    pub(super) etag: String,
    /// Whole seconds; `None` when HTTP cannot express it (before 1970, after 9999).
    pub(super) modified: Option<SystemTime>,
}

impl Validators {
    /// `mtime` and `mtime_nanoseconds` as stat(2) gives them. A date in the future is brought back
    /// to `now` (RFC 9110 8.8.2.1), in the header only: the tag holds what the file system says.
    pub(super) fn new(mtime: i64, mtime_nanoseconds: i64, length: u64, inode: u64, now: SystemTime) -> Validators {
        let nanoseconds = i128::from(mtime) * 1_000_000_000 + i128::from(mtime_nanoseconds);
        let modified = u64::try_from(mtime).ok().filter(|seconds| *seconds < HTTP_DATE_END_SECONDS);
        let modified = modified.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
        Validators {
            etag: format!("\"{nanoseconds:x}-{length:x}-{inode:x}\""),
            modified: modified.map(|modified| modified.min(whole_seconds(now))),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Proceed,
    /// 304
    NotModified,
    /// 412
    PreconditionFailed,
}

/// RFC 9110 13.2.2, steps 1 to 4, for GET and HEAD of a file that exists.
pub(super) fn evaluate(headers: &HeaderMap, file: &Validators) -> Outcome {
    if headers.contains_key(IF_MATCH) {
        if !any_tag(headers, IF_MATCH, |tag| tag.strong_equals(&file.etag)) {
            return Outcome::PreconditionFailed;
        }
    } else if let Some((date, modified)) = date(headers, IF_UNMODIFIED_SINCE).zip(file.modified)
        && modified > date
    {
        return Outcome::PreconditionFailed;
    }
    if headers.contains_key(IF_NONE_MATCH) {
        if any_tag(headers, IF_NONE_MATCH, |tag| tag.weak_equals(&file.etag)) {
            return Outcome::NotModified;
        }
    } else if let Some((date, modified)) = date(headers, IF_MODIFIED_SINCE).zip(file.modified)
        && modified <= date
    {
        return Outcome::NotModified;
    }
    Outcome::Proceed
}

/// Step 5: whether a `Range` header counts, which it does without `If-Range` or when that names
/// exactly the present content. An unreadable `If-Range` names nothing, so the whole file is sent.
pub(super) fn range_applies(headers: &HeaderMap, file: &Validators, now: SystemTime) -> bool {
    if !headers.contains_key(IF_RANGE) {
        return true;
    }
    let Some(value) = single(headers, IF_RANGE) else {
        return false;
    };
    if let Some((tag, rest)) = Tag::split(value) {
        return rest.is_empty() && tag.strong_equals(&file.etag);
    }
    let date = httpdate::parse_http_date(value).ok();
    let Some(modified) = file.modified.filter(|modified| Some(*modified) == date) else {
        return false;
    };
    now.duration_since(modified).is_ok_and(|age| age >= STRONG_DATE_AGE)
}

/// An entity tag as a client sent it: `*`, `W/"x"` or `"x"`.
#[derive(Debug, Clone, Copy)]
enum Tag<'a> {
    Any,
    /// The opaque part, with its quotes.
    Weak(&'a str),
    Strong(&'a str),
}

impl<'a> Tag<'a> {
    /// The tag at the start of `text`, and what follows it. A comma may be part of a tag.
    fn split(text: &'a str) -> Option<(Tag<'a>, &'a str)> {
        let (weak, quoted) = match text.strip_prefix("W/") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let end = quoted.strip_prefix('"')?.find('"')? + 2;
        let (opaque, rest) = quoted.split_at(end);
        Some((if weak { Tag::Weak(opaque) } else { Tag::Strong(opaque) }, rest))
    }

    fn strong_equals(self, etag: &str) -> bool {
        match self {
            Tag::Any => true,
            Tag::Weak(_) => false,
            Tag::Strong(opaque) => opaque == etag,
        }
    }

    fn weak_equals(self, etag: &str) -> bool {
        match self {
            Tag::Any => true,
            Tag::Weak(opaque) | Tag::Strong(opaque) => opaque == etag,
        }
    }
}

/// Whether one of the listed tags satisfies `matches`. A list ends where it becomes unreadable:
/// what cannot be read matches nothing.
fn any_tag(headers: &HeaderMap, name: HeaderName, matches: impl Fn(Tag<'_>) -> bool) -> bool {
    headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).any(|list| {
        if list.trim() == "*" {
            return matches(Tag::Any);
        }
        let mut rest = list;
        loop {
            rest = rest.trim_start_matches([' ', '\t', ',']);
            let Some((tag, after)) = Tag::split(rest) else {
                return false;
            };
            if matches(tag) {
                return true;
            }
            rest = after;
        }
    })
}

/// A date, when the header is there once and readable; it is to be ignored otherwise.
fn date(headers: &HeaderMap, name: HeaderName) -> Option<SystemTime> {
    httpdate::parse_http_date(single(headers, name)?).ok()
}

fn single(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(first.trim())
}

fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::Outcome::{NotModified, PreconditionFailed, Proceed};
    use super::*;

    const BEFORE: &str = "Sun, 06 Nov 1994 08:49:36 GMT";
    const SAME: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    const AFTER: &str = "Sun, 06 Nov 1994 08:49:38 GMT";

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn file() -> Validators {
        Validators { etag: "\"v,1\"".into(), modified: Some(at(784_111_777)) }
    }

    fn headers(list: &[(HeaderName, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in list {
            map.append(name, HeaderValue::from_str(value).expect("a header value"));
        }
        map
    }

    #[test]
    fn each_precondition_alone() {
        let table = [
            (IF_MATCH, "*", Proceed),
            (IF_MATCH, "\"v,1\"", Proceed),
            (IF_MATCH, "\"x\", \"v,1\"", Proceed),
            (IF_MATCH, "W/\"v,1\"", PreconditionFailed),
            (IF_MATCH, "\"x\"", PreconditionFailed),
            (IF_MATCH, "v,1", PreconditionFailed),
            (IF_MATCH, "\"v,1", PreconditionFailed),
            (IF_MATCH, "", PreconditionFailed),
            (IF_UNMODIFIED_SINCE, BEFORE, PreconditionFailed),
            (IF_UNMODIFIED_SINCE, SAME, Proceed),
            (IF_UNMODIFIED_SINCE, AFTER, Proceed),
            (IF_UNMODIFIED_SINCE, "yesterday", Proceed),
            (IF_NONE_MATCH, "*", NotModified),
            (IF_NONE_MATCH, "\"v,1\"", NotModified),
            (IF_NONE_MATCH, "W/\"v,1\"", NotModified),
            (IF_NONE_MATCH, "\"a\",,W/\"b\" ,\"v,1\"", NotModified),
            (IF_NONE_MATCH, "\"v\", \"1\"", Proceed),
            (IF_NONE_MATCH, "w/\"v,1\"", Proceed),
            (IF_NONE_MATCH, "garbage, \"v,1\"", Proceed),
            (IF_MODIFIED_SINCE, BEFORE, Proceed),
            (IF_MODIFIED_SINCE, SAME, NotModified),
            (IF_MODIFIED_SINCE, AFTER, NotModified),
            (IF_MODIFIED_SINCE, "Sunday, 06-Nov-94 08:49:37 GMT", NotModified),
            (IF_MODIFIED_SINCE, "Sun Nov  6 08:49:37 1994", NotModified),
            (IF_MODIFIED_SINCE, "784111777", Proceed),
        ];
        for (name, value, expected) in table {
            assert_eq!(evaluate(&headers(&[(name.clone(), value)]), &file()), expected, "{name}: {value}");
        }
        assert_eq!(evaluate(&HeaderMap::new(), &file()), Proceed);
    }

    #[test]
    fn the_order_of_rfc_9110_13_2_2() {
        let table: [(&[(HeaderName, &str)], Outcome); 8] = [
            // A tag that matches makes the date irrelevant, in both pairs.
            (&[(IF_MATCH, "\"v,1\""), (IF_UNMODIFIED_SINCE, BEFORE)], Proceed),
            (&[(IF_NONE_MATCH, "\"x\""), (IF_MODIFIED_SINCE, AFTER)], Proceed),
            (&[(IF_NONE_MATCH, "garbage"), (IF_MODIFIED_SINCE, AFTER)], Proceed),
            // 412 goes before 304.
            (&[(IF_MATCH, "\"x\""), (IF_NONE_MATCH, "\"v,1\"")], PreconditionFailed),
            (&[(IF_UNMODIFIED_SINCE, BEFORE), (IF_MODIFIED_SINCE, AFTER)], PreconditionFailed),
            (&[(IF_MATCH, "*"), (IF_NONE_MATCH, "\"v,1\"")], NotModified),
            // Several header lines are one list; a repeated date is none.
            (&[(IF_NONE_MATCH, "\"x\""), (IF_NONE_MATCH, "\"v,1\"")], NotModified),
            (&[(IF_MODIFIED_SINCE, AFTER), (IF_MODIFIED_SINCE, AFTER)], Proceed),
        ];
        for (list, expected) in table {
            assert_eq!(evaluate(&headers(list), &file()), expected, "{list:?}");
        }
    }

    #[test]
    fn if_range() {
        let later = at(784_111_777 + 60);
        let table = [
            ("\"v,1\"", later, true),
            ("W/\"v,1\"", later, false),
            ("\"x\"", later, false),
            ("\"v,1\", \"x\"", later, false),
            ("*", later, false),
            (SAME, later, true),
            (BEFORE, later, false),
            (AFTER, later, false),
            ("nonsense", later, false),
            // Changed in this very second: its date does not yet identify the content.
            (SAME, at(784_111_777), false),
            (SAME, at(784_111_778), true),
            (SAME, at(784_111_000), false),
        ];
        for (value, now, expected) in table {
            assert_eq!(range_applies(&headers(&[(IF_RANGE, value)]), &file(), now), expected, "{value}");
        }
        assert!(range_applies(&HeaderMap::new(), &file(), later));
        let twice = headers(&[(IF_RANGE, "\"v,1\""), (IF_RANGE, "\"v,1\"")]);
        assert!(!range_applies(&twice, &file(), later));
    }

    #[test]
    fn validators_of_odd_times() {
        let now = at(2_000);
        assert_eq!(Validators::new(1, 255, 16, 10, now).etag, "\"3b9acaff-10-a\"");
        assert_eq!(Validators::new(1, 5, 0, 1, now).modified, Some(at(1)));
        assert_eq!(Validators::new(9_999, 0, 0, 1, now).modified, Some(now));
        assert_eq!(Validators::new(-1, 999_999_999, 0, 1, now).modified, None);
        assert_eq!(Validators::new(i64::MAX, 0, 0, 1, now).modified, None);
        assert_eq!(Validators::new(i64::MIN, 0, 0, 1, now).modified, None);
    }
}
