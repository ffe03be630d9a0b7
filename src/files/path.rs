//! From a request path to a file name below the root, and back into a URL. Pure text: nothing here
//! touches the disk, and nothing here is what keeps a request inside the root. That is the kernel's
//! job (`RESOLVE_BENEATH`, see `open`); this module only refuses early what can have no honest
//! meaning. Names are bytes, as Linux has them, and need not be UTF-8.

use std::borrow::Cow;
use std::fmt::Write;

/// A request path, decoded and with its dot segments resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// Segments joined by `/`, without a leading or trailing one; empty for the root itself.
    relative: Vec<u8>,
    /// The path named a directory: it ended in `/`, or in a dot segment.
    directory_form: bool,
}

/// Why a request path names nothing. All of these are answered with 400, as nginx does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PathError {
    /// It does not start with `/` (`OPTIONS *` and the like).
    NotAbsolute,
    /// A `%` that two hexadecimal digits do not follow.
    Escape,
    /// NUL cannot be part of a Linux file name.
    Nul,
    /// More `..` than there are directories above it.
    AboveRoot,
}

impl Target {
    /// Decodes once, and only then looks for separators and dots: what a second decoder further
    /// down would see is what was checked here. Empty segments are merged, as nginx does
    /// (`merge_slashes`).
    pub(super) fn parse(path: &str) -> Result<Target, PathError> {
        if !path.starts_with('/') {
            return Err(PathError::NotAbsolute);
        }
        let decoded = decode(path)?;
        let mut relative = Vec::with_capacity(decoded.len());
        let mut directory_form = true;
        for segment in decoded.split(|byte| *byte == b'/') {
            directory_form = matches!(segment, b"" | b"." | b"..");
            match segment {
                b"" | b"." => {}
                b".." if relative.is_empty() => return Err(PathError::AboveRoot),
                b".." => relative.truncate(relative.iter().rposition(|byte| *byte == b'/').unwrap_or(0)),
                name => {
                    if !relative.is_empty() {
                        relative.push(b'/');
                    }
                    relative.extend_from_slice(name);
                }
            }
        }
        Ok(Target { relative, directory_form })
    }

    pub(super) fn is_root(&self) -> bool {
        self.relative.is_empty()
    }

    pub(super) fn is_directory_form(&self) -> bool {
        self.directory_form
    }

    /// Without a leading or trailing slash; empty for the root itself.
    pub(super) fn relative(&self) -> &[u8] {
        &self.relative
    }

    /// The name to open relative to the root. The slash form opens a directory or fails with
    /// ENOTDIR: it never touches a FIFO or device.
    pub(super) fn name(&self) -> Cow<'_, [u8]> {
        if self.is_root() {
            b".".into()
        } else if self.directory_form {
            [&self.relative[..], b"/"].concat().into()
        } else {
            self.relative.as_slice().into()
        }
    }

    /// The name of `file` inside the directory that this target names.
    pub(super) fn join(&self, file: &str) -> Vec<u8> {
        let file = file.as_bytes();
        if self.is_root() { file.to_vec() } else { [&self.relative[..], file].join(&b'/') }
    }

    /// The URL of this target as a directory, rebuilt from the decoded segments and not copied from
    /// the request: it starts with exactly one `/`, so that `//evil.example/dir` cannot become a
    /// redirect to another host, and holds no byte that could end a header line.
    pub(super) fn directory_url(&self, query: Option<&str>) -> String {
        let mut url = String::with_capacity(self.relative.len() + 8);
        url.push('/');
        if !self.is_root() {
            encode_into(&mut url, &self.relative, b"/");
            url.push('/');
        }
        if let Some(query) = query {
            url.push('?');
            url.push_str(query);
        }
        url
    }
}

/// Percent-encodes one segment for use in an `href`.
pub(super) fn encode_segment(out: &mut String, segment: &[u8]) {
    encode_into(out, segment, b"");
}

/// Everything but RFC 3986's unreserved characters and `keep` is encoded.
fn encode_into(out: &mut String, text: &[u8], keep: &[u8]) {
    for &byte in text {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a String cannot fail");
        }
    }
}

fn decode(path: &str) -> Result<Vec<u8>, PathError> {
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let byte = match bytes[at] {
            b'%' => {
                let high = bytes.get(at + 1).and_then(|byte| hexadecimal(*byte));
                let low = bytes.get(at + 2).and_then(|byte| hexadecimal(*byte));
                at += 3;
                high.zip(low).map(|(high, low)| high << 4 | low).ok_or(PathError::Escape)?
            }
            byte => {
                at += 1;
                byte
            }
        };
        if byte == 0 {
            return Err(PathError::Nul);
        }
        decoded.push(byte);
    }
    Ok(decoded)
}

fn hexadecimal(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relative(path: &str) -> Result<(Vec<u8>, bool), PathError> {
        Target::parse(path).map(|target| (target.relative, target.directory_form))
    }

    #[test]
    fn paths_that_mean_something() {
        let table = [
            ("/", "", true),
            ("//", "", true),
            ("/.", "", true),
            ("/a", "a", false),
            ("/a/", "a", true),
            ("//a///b", "a/b", false),
            ("/a/./b", "a/b", false),
            ("/a/b/..", "a", true),
            ("/a/b/../", "a", true),
            ("/a/../b", "b", false),
            ("/a/%2e%2e/b", "b", false),
            ("/a%2Fb", "a/b", false),
            ("/a%2f..%2fb", "b", false),
            ("/...", "...", false),
            ("/..a", "..a", false),
            ("/.hidden", ".hidden", false),
            ("/a+b%20c", "a+b c", false),
            ("/%C3%A9t%c3%a9", "été", false),
            ("/%252e%252e/x", "%2e%2e/x", false),
            ("/%3Fx", "?x", false),
            ("/a\\..\\b", "a\\..\\b", false),
            ("/%0d%0aSet-Cookie:x", "\r\nSet-Cookie:x", false),
        ];
        for (path, expected, directory) in table {
            assert_eq!(relative(path), Ok((expected.into(), directory)), "{path}");
        }
        // Not UTF-8: neither a slash nor a dot, whatever a careless decoder would make of it.
        for (path, expected) in [
            ("/%ff", &b"\xff"[..]),
            ("/caf%E9.txt", b"caf\xe9.txt"),
            ("/%c0%ae%c0%ae/etc/passwd", b"\xc0\xae\xc0\xae/etc/passwd"),
            ("/%e0%80%ae/x", b"\xe0\x80\xae/x"),
            ("/a%c0%afb", b"a\xc0\xafb"),
            ("/%ed%a0%80", b"\xed\xa0\x80"),
        ] {
            assert_eq!(relative(path), Ok((expected.to_vec(), false)), "{path}");
        }
        let name = |path| Target::parse(path).expect("a valid path").name().into_owned();
        assert_eq!([name("/"), name("/a/b"), name("/a/b/")], [&b"."[..], b"a/b", b"a/b/"]);
    }

    #[test]
    fn hostile_paths_are_refused() {
        let table = [
            ("/../etc/passwd", PathError::AboveRoot),
            ("/%2e%2e/", PathError::AboveRoot),
            ("/%2E%2e/etc/passwd", PathError::AboveRoot),
            ("/..%2f", PathError::AboveRoot),
            ("/..%2f..%2fetc%2fpasswd", PathError::AboveRoot),
            ("/a/../../b", PathError::AboveRoot),
            ("/a/b/../../../c/d", PathError::AboveRoot),
            ("//../x", PathError::AboveRoot),
            ("/./../x", PathError::AboveRoot),
            ("/a%00.html", PathError::Nul),
            ("/%00", PathError::Nul),
            ("/a\0b", PathError::Nul),
            ("/%", PathError::Escape),
            ("/%2", PathError::Escape),
            ("/%zz", PathError::Escape),
            ("/%+1", PathError::Escape),
            ("/%u002e", PathError::Escape),
            ("*", PathError::NotAbsolute),
            ("", PathError::NotAbsolute),
            ("a/b", PathError::NotAbsolute),
        ];
        for (path, expected) in table {
            assert_eq!(relative(path), Err(expected), "{path}");
        }
    }

    #[test]
    fn no_parsed_target_holds_a_dot_segment() {
        // Every path of up to six symbols of a hostile alphabet.
        let alphabet = ["/", ".", "a", "%2e", "%2f", "%5c"];
        for code in 0..alphabet.len().pow(6) {
            let mut rest = code;
            let mut path = String::from("/");
            for _ in 0..6 {
                path.push_str(alphabet[rest % alphabet.len()]);
                rest /= alphabet.len();
            }
            if let Ok(target) = Target::parse(&path) {
                let bad = target.relative.split(|byte| *byte == b'/').any(|name| matches!(name, b"" | b"." | b".."));
                assert!(target.is_root() || !bad, "{path} -> {target:?}");
            }
        }
    }

    #[test]
    fn redirects_stay_on_this_host_and_in_one_line() {
        let table = [
            ("/a/b", None, "/a/b/"),
            ("//evil.example/dir", None, "/evil.example/dir/"),
            ("/a", Some("x=1&y"), "/a/?x=1&y"),
            ("/%0d%0aX:%20y", None, "/%0D%0AX%3A%20y/"),
            ("/%5Cevil", None, "/%5Cevil/"),
            ("/é", None, "/%C3%A9/"),
        ];
        for (path, query, expected) in table {
            let target = Target::parse(path).expect("a valid path");
            assert_eq!(target.directory_url(query), expected);
        }
    }

    #[test]
    fn encoding_and_decoding_are_inverse() {
        for name in ["a b", "100%", "x&y<z>\"'", "semi;colon:", "日本", "~.-_", "?#"]
            .map(str::as_bytes)
            .into_iter()
            .chain([&b"caf\xe9"[..]])
        {
            let mut url = String::from("/");
            encode_segment(&mut url, name);
            assert_eq!(Target::parse(&url).expect("own encoding").relative(), name);
        }
    }
}
