//! The page that lists a directory: plain, sorted, escaped. What may be listed, and whether, is
//! decided elsewhere.

use std::io;
use std::os::fd::OwnedFd;

use super::open::{self, Entry};
use super::path;

/// The most entries one page shows. Ten thousand are about a megabyte; who has more needs another
/// tool than a page.
pub(super) const LISTING_ENTRIES_MAX: usize = 10_000;

/// The most bytes of one page, as 10,000 names of 255 bytes, each escaped six-fold, would be 23
/// MiB.
const LISTING_BYTES_MAX: usize = 4 << 20;

/// Reads and renders an open directory. Blocks.
///
/// # Errors
/// As reading the directory.
pub(super) fn page(directory: OwnedFd, title: &str, is_root: bool) -> io::Result<String> {
    let (mut entries, mut more) = open::entries(directory, LISTING_ENTRIES_MAX)?;
    entries.sort_unstable();
    Ok(render(title, is_root, &entries, &mut more))
}

fn render(title: &str, is_root: bool, entries: &[Entry], more: &mut bool) -> String {
    let mut page = String::with_capacity(256 + entries.len() * 64);
    let mut heading = String::new();
    escape_into(&mut heading, title);
    page.push_str("<!DOCTYPE html>\n<html><head><meta charset=\"utf-8\"><title>");
    page.push_str(&heading);
    page.push_str("</title></head>\n<body><h1>");
    page.push_str(&heading);
    page.push_str("</h1>\n<ul>\n");
    if !is_root {
        page.push_str("<li><a href=\"../\">../</a></li>\n");
    }
    for entry in entries {
        if page.len() > LISTING_BYTES_MAX {
            *more = true;
            break;
        }
        let slash = if entry.is_directory { "/" } else { "" };
        // "./": a name such as "javascript:x" must not read as a scheme.
        page.push_str("<li><a href=\"./");
        path::encode_segment(&mut page, &entry.name);
        page.push_str(slash);
        page.push_str("\">");
        escape_into(&mut page, &String::from_utf8_lossy(&entry.name));
        page.push_str(slash);
        page.push_str("</a></li>\n");
    }
    page.push_str("</ul>\n");
    if *more {
        page.push_str("<p>There are more entries than this page shows.</p>\n");
    }
    page.push_str("</body></html>\n");
    page
}

fn escape_into(out: &mut String, text: &str) {
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, is_directory: bool) -> Entry {
        Entry { name: name.into(), is_directory }
    }

    #[test]
    fn names_are_escaped_in_text_and_in_links() {
        let entries =
            [entry("<script>alert('1')</script>", false), entry("a&b\" onclick=x", true), entry("javascript:x", false)];
        let page = render("/<b>/", false, &entries, &mut false);
        assert!(!page.contains("<script>") && !page.contains("<b>") && !page.contains("\" onclick"));
        assert!(page.contains("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;"));
        assert!(page.contains("<a href=\"./a%26b%22%20onclick%3Dx/\">a&amp;b&quot; onclick=x/</a>"));
        assert!(page.contains("href=\"./javascript%3Ax\""));
        assert!(page.contains("href=\"../\"") && page.contains("<h1>/&lt;b&gt;/</h1>"));
        assert!(!page.contains("more entries"));
    }

    #[test]
    fn a_name_that_is_not_utf_8_has_a_link_that_leads_to_it() {
        let entries = [Entry { name: b"caf\xe9.txt".to_vec(), is_directory: false }];
        let page = render("/", true, &entries, &mut false);
        assert!(page.contains("<a href=\"./caf%E9.txt\">caf\u{fffd}.txt</a>"), "{page}");
    }

    #[test]
    fn the_root_has_no_parent_and_the_page_is_bounded() {
        let long = "<".repeat(255);
        let entries = vec![entry(&long, false); LISTING_ENTRIES_MAX];
        let page = render("/", true, &entries, &mut false);
        assert!(!page.contains("href=\"../\""));
        assert!(page.len() < LISTING_BYTES_MAX + 4096 && page.contains("more entries"));
    }
}
