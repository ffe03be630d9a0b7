//! The `Range` header (RFC 9110, section 14): which bytes of a file of a given length a request
//! asks for. Pure: text and a length in, a decision out.

use http::HeaderValue;

/// The most ranges that one answer carries. Each one costs a part header and breaks sequential
/// reading, and a download manager asks for a handful; a header with more is answered with the
/// whole file.
pub(super) const RANGES_MAX: usize = 16;

/// Bytes `start..end` of a file. Never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ByteRange {
    pub(super) start: u64,
    /// Exclusive.
    pub(super) end: u64,
}

impl ByteRange {
    pub(super) fn length(self) -> u64 {
        self.end - self.start
    }

    /// The value of `Content-Range`.
    pub(super) fn content_range(self, length: u64) -> String {
        format!("bytes {}-{}/{length}", self.start, self.end - 1)
    }
}

/// What to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Selection {
    /// The whole file: nothing usable was asked for.
    Whole,
    /// One range: 206 with `Content-Range`.
    One(ByteRange),
    /// Two to [`RANGES_MAX`] disjoint ranges, in the order of the request: 206
    /// multipart/byteranges.
    Many(Vec<ByteRange>),
    /// Well formed, and nothing of it is inside the file: 416.
    Unsatisfiable,
}

/// Decides what a `Range` header with this value selects from `length` bytes.
///
/// Ignored, as RFC 9110 14.2 asks or allows: another unit than bytes, a malformed list (one bad
/// member spoils it), more than [`RANGES_MAX`] members, members that overlap (no honest client asks
/// for a byte twice; answering it multiplies the traffic). So is any range of an empty file:
/// clients that put `Range` on every request expect 200 there.
pub(super) fn select(header: &HeaderValue, length: u64) -> Selection {
    let Some(specs) = header.to_str().ok().and_then(parse) else {
        return Selection::Whole;
    };
    if length == 0 || specs.len() > RANGES_MAX {
        return Selection::Whole;
    }
    let ranges: Vec<ByteRange> = specs.iter().filter_map(|spec| spec.within(length)).collect();
    match ranges.as_slice() {
        [] => Selection::Unsatisfiable,
        [range] => Selection::One(*range),
        many if overlapping(many) => Selection::Whole,
        _ => Selection::Many(ranges),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spec {
    /// `first-` and `first-last`; both inclusive.
    From { first: u64, last: u64 },
    /// `-length`
    Suffix(u64),
}

impl Spec {
    fn parse(text: &str) -> Option<Spec> {
        let (first, last) = text.split_once('-')?;
        if first.is_empty() {
            return number(last).map(Spec::Suffix);
        }
        let first = number(first)?;
        let last = if last.is_empty() { u64::MAX } else { number(last)? };
        (first <= last).then_some(Spec::From { first, last })
    }

    /// The part of it that exists in a file of `length` bytes; `None` when it is unsatisfiable.
    fn within(self, length: u64) -> Option<ByteRange> {
        let (start, end) = match self {
            Spec::From { first, last } => (first, last.saturating_add(1).min(length)),
            Spec::Suffix(suffix) => (length.saturating_sub(suffix), length),
        };
        (start < end).then_some(ByteRange { start, end })
    }
}

/// The members of a byte-range-set; `None` when the value is malformed. Stops one after the limit,
/// so that the work is bounded whatever the header's size.
fn parse(value: &str) -> Option<Vec<Spec>> {
    let (unit, set) = value.split_once('=')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    // Empty list members are to be accepted (RFC 9110 5.6.1.2), an empty list is not.
    let members = set.split(',').map(|member| member.trim_matches([' ', '\t'])).filter(|member| !member.is_empty());
    let specs: Vec<Spec> = members.take(RANGES_MAX + 1).map(Spec::parse).collect::<Option<_>>()?;
    (!specs.is_empty()).then_some(specs)
}

/// Digits only (`u64::from_str` would take a sign). A number beyond u64 is well formed and beyond
/// every file.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

fn overlapping(ranges: &[ByteRange]) -> bool {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable_by_key(|range| range.start);
    sorted.windows(2).any(|pair| pair[1].start < pair[0].end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(header: &str, length: u64) -> Selection {
        select(&HeaderValue::from_str(header).expect("a header value"), length)
    }

    fn one(start: u64, end: u64) -> Selection {
        Selection::One(ByteRange { start, end })
    }

    #[test]
    fn rfc_9110_examples_of_a_10000_byte_file() {
        let many = |ranges: &[(u64, u64)]| {
            Selection::Many(ranges.iter().map(|&(start, end)| ByteRange { start, end }).collect())
        };
        let table = [
            ("bytes=0-499", one(0, 500)),
            ("bytes=500-999", one(500, 1000)),
            ("bytes=-500", one(9500, 10_000)),
            ("bytes=9500-", one(9500, 10_000)),
            ("bytes=0-0,-1", many(&[(0, 1), (9999, 10_000)])),
            ("bytes= 0-999, 4500-5499, -1000", many(&[(0, 1000), (4500, 5500), (9000, 10_000)])),
            ("bytes=500-600,601-999", many(&[(500, 601), (601, 1000)])),
            ("bytes=500-700,601-999", Selection::Whole),
            ("bytes=9-9,0-0", many(&[(9, 10), (0, 1)])),
        ];
        for (header, expected) in table {
            assert_eq!(selected(header, 10_000), expected, "{header}");
        }
    }

    #[test]
    fn edges_of_the_file() {
        let table = [
            ("bytes=0-", 10, one(0, 10)),
            ("bytes=9-", 10, one(9, 10)),
            ("bytes=10-", 10, Selection::Unsatisfiable),
            ("bytes=10-20,30-", 10, Selection::Unsatisfiable),
            ("bytes=9-99", 10, one(9, 10)),
            ("bytes=0-18446744073709551615", 10, one(0, 10)),
            ("bytes=0-99999999999999999999999", 10, one(0, 10)),
            ("bytes=99999999999999999999999-", 10, Selection::Unsatisfiable),
            ("bytes=-10", 10, one(0, 10)),
            ("bytes=-11", 10, one(0, 10)),
            ("bytes=-0", 10, Selection::Unsatisfiable),
            ("bytes=-0,3-3", 10, one(3, 4)),
            ("bytes=50-60,3-3", 10, one(3, 4)),
            ("bytes=0-", 0, Selection::Whole),
            ("bytes=-5", 0, Selection::Whole),
            ("BYTES=1-2", 10, one(1, 3)),
            ("bytes=,1-2,", 10, one(1, 3)),
        ];
        for (header, length, expected) in table {
            assert_eq!(selected(header, length), expected, "{header} of {length}");
        }
    }

    #[test]
    fn malformed_headers_are_ignored() {
        let table = [
            "",
            "bytes",
            "bytes=",
            "bytes=,",
            "bytes=-",
            "bytes=a-b",
            "bytes=1",
            "bytes=2-1",
            "bytes=1-2-3",
            "bytes=+1-2",
            "bytes=--1",
            "bytes=1-2,x",
            "bytes=0x1-2",
            "bytes 1-2",
            "items=0-5",
            "bytes=1 - 2",
            "bytes =1-2",
        ];
        for header in table {
            assert_eq!(selected(header, 10), Selection::Whole, "{header:?}");
        }
        let opaque = HeaderValue::from_bytes(b"bytes=1-2\xff").expect("obs-text is allowed");
        assert_eq!(select(&opaque, 10), Selection::Whole);
    }

    #[test]
    fn the_number_of_ranges_is_bounded() {
        let header = |count: usize| {
            let members: Vec<String> = (0..count).map(|at| format!("{}-{}", at * 10, at * 10 + 1)).collect();
            format!("bytes={}", members.join(","))
        };
        assert!(
            matches!(selected(&header(RANGES_MAX), 1 << 20), Selection::Many(ranges) if ranges.len() == RANGES_MAX)
        );
        assert_eq!(selected(&header(RANGES_MAX + 1), 1 << 20), Selection::Whole);
        assert_eq!(selected(&header(5_000), 1 << 20), Selection::Whole);
        // CVE-2011-3192: many overlapping ranges.
        assert_eq!(selected("bytes=0-,1-,2-,3-,4-", 1 << 20), Selection::Whole);
    }

    #[test]
    fn content_range_is_inclusive() {
        assert_eq!(ByteRange { start: 0, end: 500 }.content_range(1234), "bytes 0-499/1234");
    }
}
