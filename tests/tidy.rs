//! Rules of the house that a machine can check, with the table of who may import whom.

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a file that can still be read in one sitting; a file of tests is looked things up in instead.
const LINES_MAX: usize = 700;
const LINES_MAX_OF_TESTS: usize = 1000;

/// Each module of `src` and those it may import, from the top downward. `root` is what `lib.rs` re-exports.
///
/// Some rows look upward: what a slot's thread runs is described by `server` (the factory of a service, the connector
/// of a connection), the start-up closure is handed a `shard`, a `shard_local` value that was let go of elsewhere comes
/// home to its executor, and a stream belongs to the `executor` that owns its ring.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    // The command is a user of the public interface: it imports `ringleader`, which needs no row.
    ("cli", &[]),
    // For the benches of this package.
    ("internals", &["executor", "net", "steering", "sys"]),
    ("test", &["root", "supervisor"]),
    (
        "server",
        &[
            "root",
            "blocking",
            "error",
            "executor",
            "handle",
            "listen",
            "net",
            "order",
            "peers",
            "protocol",
            "service",
            "settings",
            "shard",
            "steering",
            "supervisor",
            "sys",
            "systemd",
            "upgrade",
        ],
    ),
    (
        "supervisor",
        &[
            "root", "blocking", "error", "executor", "handle", "listen", "order", "panics", "steering", "sys",
            "systemd", "upgrade",
        ],
    ),
    ("listen", &["root", "error", "executor", "sys", "systemd", "upgrade"]),
    ("systemd", &["sys", "upgrade"]),
    ("upgrade", &["panics", "sys"]),
    ("handle", &["root", "executor", "order", "shard", "supervisor"]),
    ("peers", &["executor", "panics", "protocol", "shard", "sync"]),
    ("shard", &["root", "blocking", "executor", "handle", "protocol", "shard_local", "sys", "task_queue", "time"]),
    ("task_queue", &["root", "error", "executor", "shard"]),
    ("shard_local", &["executor", "panics"]),
    ("protocol", &["root", "body", "executor", "files", "net", "panics", "server", "service", "settings", "time"]),
    (
        "executor",
        &["blocking", "files", "net", "panics", "rarely", "server", "settings", "shard", "shard_local", "sync", "sys"],
    ),
    ("net", &["executor", "sys"]),
    ("blocking", &["oneshot", "panics", "sys"]),
    ("panics", &["settings"]),
    ("steering", &["sys"]),
    ("adapters", &["root", "service"]),
    ("body", &["root", "files", "time"]),
    ("service", &["root"]),
    ("time", &["executor", "net"]),
    ("order", &["root", "error", "oneshot"]),
    ("oneshot", &[]),
    ("files", &["rarely"]),
    ("error", &[]),
    ("settings", &[]),
    ("rarely", &[]),
    ("sync", &[]),
    ("sys", &[]),
];

/// Where `unsafe` may be: system calls, the ring, two doors to a descriptor, and handles that may leave their thread while
/// what they hold does not.
const UNSAFE: &[&str] =
    &["src/sys/", "src/net/ring/", "src/files/open.rs", "src/executor/park.rs", "src/shard_local.rs"];

/// What the pure part of the supervisor must not know of.
const IMPURE: &[&str] =
    &["crate::", "glommio", "io_uring", "libc", "std::net", "std::thread", "std::fs", "Instant::now", "SystemTime"];

/// A file of ours.
struct Source {
    /// Relative to the package.
    path: String,
    text: String,
    /// Compiled for tests only.
    of_tests: bool,
}

impl Source {
    /// What is compiled into the product, line by line with its number; comments left out.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = if self.of_tests { 0 } else { self.test_module_line() };
        let without_comment = |line| str::split(line, "//").next().unwrap_or_default();
        self.text.lines().take(lines).enumerate().map(move |(index, line)| (index + 1, without_comment(line)))
    }

    /// The line before a test module that is written in this file; by custom the last thing in it.
    fn test_module_line(&self) -> usize {
        let lines: Vec<&str> = self.text.lines().collect();
        let begins = |pair: &[&str]| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod ") && pair[1].ends_with('{');
        lines.windows(2).position(begins).unwrap_or(lines.len())
    }

    /// `src/net/ring/mod.rs` is of module `net`.
    fn module(&self) -> &str {
        let inside = self.path.trim_start_matches("src/");
        inside.split('/').next().unwrap_or(inside).trim_end_matches(".rs")
    }

    /// Paths, without `.rs`, of the modules that this file declares for tests only.
    fn test_modules(&self) -> Vec<String> {
        let home = match self.path.trim_end_matches(".rs") {
            path if path.ends_with("/mod") || path.ends_with("/lib") => {
                path.rsplit_once('/').map_or(path, |parts| parts.0)
            }
            path => path,
        };
        let lines: Vec<&str> = self.text.lines().collect();
        let declared = |pair: &[&str]| {
            let (before, name) = pair[1].strip_suffix(';')?.split_once("mod ")?;
            (pair[0] == "#[cfg(test)]" && !before.contains("//")).then(|| format!("{home}/{name}"))
        };
        lines.windows(2).filter_map(declared).collect()
    }
}

/// Every Rust file below a directory of the package.
fn sources(directory: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut directories = vec![root.join(directory)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).expect("the package is readable") {
            let path: PathBuf = entry.expect("the package is readable").path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("sources are text");
                let path = path.strip_prefix(root).expect("it was found there").display().to_string();
                found.push(Source { of_tests: path.starts_with("tests/"), path, text });
            }
        }
    }
    let of_tests: Vec<String> = found.iter().flat_map(Source::test_modules).collect();
    for source in &mut found {
        let path = source.path.trim_end_matches(".rs").to_owned();
        source.of_tests |= of_tests.iter().any(|module| path == *module || path.starts_with(&format!("{module}/")));
    }
    assert!(found.len() > 2, "the sources are not where they are looked for");
    found
}

/// The modules that a line of code names after `crate::`.
fn imports(line: &str) -> Vec<&str> {
    let first_name = |text: &'_ str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let module = |name: &'_ str| name.starts_with(char::is_lowercase);
    line.split("crate::")
        .skip(1)
        .flat_map(|rest| rest.strip_prefix('{').map_or(vec![rest], |list| list.split([',', '}']).collect()))
        .map(|rest| rest.trim_start())
        .map(move |rest| &rest[..first_name(rest)])
        .filter(|name| !name.is_empty())
        .map(move |name| if module(name) { name } else { "root" })
        .collect()
}

/// Fails with all that was found, one per line.
#[track_caller]
fn expect_none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

#[test]
fn modules_import_what_the_table_allows() {
    let mut found = Vec::new();
    for source in sources("src").iter().filter(|source| !matches!(source.module(), "lib" | "main")) {
        let row = MAY_IMPORT.iter().find(|(module, _)| *module == source.module());
        let Some((module, allowed)) = row else {
            found.push(format!("{}: its module has no row in the table of tests/tidy.rs", source.path));
            continue;
        };
        for (number, line) in source.code() {
            for import in imports(line).iter().filter(|import| *import != module && !allowed.contains(import)) {
                found.push(format!("{}:{number}: {module} may not import {import}", source.path));
            }
        }
    }
    expect_none("imports that the table in tests/tidy.rs does not allow", found);
}

#[test]
fn the_table_of_imports_is_not_wider_than_needed() {
    let sources = sources("src");
    let used = |module: &str, import: &str| {
        let of_module = sources.iter().filter(|source| source.module() == module);
        of_module.flat_map(Source::code).any(|(_, line)| imports(line).contains(&import))
    };
    let mut found = Vec::new();
    for (module, allowed) in MAY_IMPORT {
        found.extend(allowed.iter().filter(|import| !used(module, import)).map(|import| format!("{module}: {import}")));
    }
    expect_none("rows of the table in tests/tidy.rs that nothing uses", found);
}

#[test]
fn the_policy_is_pure() {
    let mut found = Vec::new();
    for source in sources("src").iter().filter(|source| source.path.starts_with("src/supervisor/policy")) {
        for (number, line) in source.code() {
            let impure = IMPURE.iter().filter(|word| line.contains(**word));
            found.extend(impure.map(|word| format!("{}:{number}: {word}", source.path)));
        }
    }
    expect_none("the policy decides, and knows nothing of how it is done", found);
}

/// Lines of code of `src` that contain one of `words`, except in files that begin with one of `exempt`.
fn lines_with(words: &[&str], exempt: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources("src").iter().filter(|source| !exempt.iter().any(|path| source.path.starts_with(path))) {
        let with_word = source.code().filter(|(_, line)| words.iter().any(|word| line.contains(word)));
        found.extend(with_word.map(|(number, line)| format!("{}:{number}: {}", source.path, line.trim())));
    }
    found
}

#[test]
fn unsafe_code_is_in_few_places() {
    let words = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe trait"];
    expect_none("unsafe code outside of its places", lines_with(&words, UNSAFE));
}

#[test]
fn only_the_command_prints() {
    let words = ["println!(", "eprintln!(", "print!(", "eprint!("];
    expect_none("a library does not print", lines_with(&words, &["src/cli/"]));
}

#[test]
fn nothing_is_left_unfinished() {
    let words = ["todo!(", "unimplemented!(", "dbg!("];
    expect_none("unfinished code", lines_with(&words, &[]));
}

#[test]
fn the_product_does_not_unwrap() {
    expect_none("say in `expect` why it cannot fail", lines_with(&[".unwrap()"], &[]));
}

#[test]
fn no_test_is_ignored() {
    let ignore = concat!("#[ig", "nore");
    let all = sources("src").into_iter().chain(sources("tests"));
    expect_none(
        "tests that nobody runs",
        all.filter(|source| source.text.contains(ignore)).map(|source| source.path).collect(),
    );
}

#[test]
fn files_say_what_they_are_for_and_end_in_time() {
    let mut found = Vec::new();
    for source in sources("src").into_iter().chain(sources("tests")) {
        if !source.text.starts_with("//!") {
            found.push(format!("{}: it does not begin with `//!`", source.path));
        }
        let lines = source.text.lines().count();
        let most = if source.path.ends_with("tests.rs") { LINES_MAX_OF_TESTS } else { LINES_MAX };
        if lines > most {
            found.push(format!("{}: {lines} lines, {most} at most", source.path));
        }
    }
    expect_none("files", found);
}

/// Text of a file of the package.
fn text(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("the package has it, as text")
}

/// What is between two marks, or behind the first one.
fn section<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let inside = text.split_once(from).expect("it has this section").1;
    inside.split_once(to).map_or(inside, |parts| parts.0)
}

/// Name and the rest of the line of every direct dependency.
fn dependencies() -> Vec<(String, String)> {
    let manifest = text("Cargo.toml");
    let lines = section(&manifest, "\n[dependencies]\n", "\n[").lines();
    let found: Vec<_> = lines.filter_map(|line| line.split_once(" = ")).collect();
    assert!(found.len() > 10, "the dependencies are not where they are looked for: {found:?}");
    found.into_iter().map(|(name, rest)| (name.to_owned(), rest.to_owned())).collect()
}

#[test]
fn embedders_do_not_compile_what_only_the_command_uses() {
    let sources = sources("src");
    let of_the_library: Vec<_> = sources.iter().filter(|file| !matches!(file.module(), "cli" | "main")).collect();
    let is_used = |name: &str| {
        let path = format!("{}::", name.replace('-', "_"));
        of_the_library.iter().any(|file| file.code().any(|(_, line)| line.contains(&path)))
    };
    let demanded = dependencies().into_iter().filter(|(_, rest)| !rest.contains("optional = true"));
    expect_none(
        "the library does not use them: `optional = true`, and into the feature `cli` of Cargo.toml",
        demanded.map(|(name, _)| name).filter(|name| !is_used(name)).collect(),
    );
}

#[test]
fn every_direct_dependency_has_a_line_that_says_why() {
    let (dependencies, architecture) = (dependencies(), text("ARCHITECTURE.md"));
    let reasons = section(&architecture, "\n### Direct dependencies\n", "\n#");
    let names: Vec<&str> = dependencies.iter().map(|(name, _)| name.as_str()).collect();
    let without = names.iter().filter(|name| !reasons.contains(&format!("`{name}`")));
    expect_none(
        "dependencies without a line in ARCHITECTURE.md, \"Direct dependencies\"",
        without.map(|name| (*name).to_owned()).collect(),
    );
    let rows = reasons.lines().filter_map(|line| line.strip_prefix("| `")?.split(" |").next());
    let gone = rows.flat_map(|row| row.split(", ")).map(|row| row.trim_start_matches('`'));
    let gone = gone.filter_map(|row| row.split('`').next()).filter(|name| !names.contains(name));
    expect_none("lines of \"Direct dependencies\" for what is none", gone.map(str::to_owned).collect());
}

#[test]
fn the_index_of_the_examples_has_each_of_them() {
    let index = text("examples/README.md");
    let all = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")).expect("the package is readable");
    let names = all.map(|entry| entry.expect("the package is readable").file_name().to_string_lossy().into_owned());
    let linked = |name: &String| [')', '/'].iter().any(|end| index.contains(&format!("({name}{end}")));
    let without: Vec<String> = names.filter(|name| name != "README.md" && !linked(name)).collect();
    expect_none("examples that examples/README.md does not list", without);
}

/// Names that the crate's root, or its module `test`, makes public.
fn exported() -> Vec<String> {
    let of_the_root =
        text("src/lib.rs").lines().filter(|line| line.starts_with("pub use ")).collect::<Vec<_>>().join("\n");
    let words = of_the_root.split(|c: char| !c.is_alphanumeric() && c != '_');
    let of_test = ["App", "Provocation"];
    words.filter(|word| word.starts_with(char::is_uppercase)).chain(of_test).map(str::to_owned).collect()
}

/// The name after `before`, if the line begins so.
fn declared<'a>(line: &'a str, before: &[&str]) -> Option<&'a str> {
    let rest = before.iter().find_map(|before| line.strip_prefix(before))?;
    rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()
}

#[test]
fn public_types_that_may_grow_say_so() {
    let (exported, mut found) = (exported(), Vec::new());
    for source in sources("src") {
        let lines: Vec<&str> = source.text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let Some(name) = declared(line, &["pub enum ", "pub struct "]) else { continue };
            let inside = || lines[index + 1..].iter().take_while(|line| !line.starts_with('}'));
            let grows = line.starts_with("pub enum ")
                || (line.ends_with('{') && inside().any(|line| line.starts_with("    pub ")));
            let attributes = lines[..index].iter().rev().take_while(|line| line.starts_with("#["));
            if grows
                && exported.iter().any(|known| known == name)
                && !attributes.into_iter().any(|a| a.contains("non_exhaustive"))
            {
                found.push(format!("{}:{}: {name}", source.path, index + 1));
            }
        }
    }
    expect_none("public enums, and structs with public fields, without #[non_exhaustive]", found);
}

/// All lines of code of the examples in the documentation of `src`.
fn examples_in_documentation(sources: &[Source]) -> String {
    let mut code = String::new();
    for source in sources {
        let mut inside = false;
        for line in source.text.lines() {
            let line = line.trim_start();
            let Some(line) = line.strip_prefix("///").or_else(|| line.strip_prefix("//!")) else { continue };
            if line.trim_start().starts_with("```") {
                inside = !inside;
            } else if inside {
                code.push_str(line);
                code.push('\n');
            }
        }
    }
    code
}

#[test]
fn public_types_and_methods_are_used_in_an_example_of_the_documentation() {
    let (exported, sources) = (exported(), sources("src"));
    let examples = examples_in_documentation(&sources);
    let words: Vec<&str> = examples.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    let mut found = Vec::new();
    for source in sources.iter().filter(|source| !source.of_tests) {
        let (mut public, mut own) = (false, String::new());
        for line in source.text.lines() {
            if let Some(name) = declared(line, &["pub struct ", "pub enum ", "pub trait ", "pub fn ", "pub type "]) {
                let made_elsewhere = own.contains("ade by [");
                if exported.iter().any(|known| known == name)
                    && !(own.contains("```") || made_elsewhere || words.contains(&name))
                {
                    found.push(format!("{}: {name}", source.path));
                }
            }
            match line.strip_prefix("///") {
                Some(more) => own.push_str(more),
                None if line.starts_with('#') => {}
                None => own.clear(),
            }
            if line.starts_with("impl") && line.ends_with('{') {
                let of = line.split(" for ").next().unwrap_or(line);
                public =
                    exported.iter().any(|name| of.contains(&format!(" {name} ")) || of.contains(&format!(" {name}<")));
            } else if public && let Some(name) = declared(line, &["    pub fn ", "    pub async fn "]) {
                let used = [format!(".{name}("), format!("::{name}("), format!("::{name})")];
                if !used.iter().any(|used| examples.contains(used.as_str())) {
                    found.push(format!("{}: {name}", source.path));
                }
            }
        }
    }
    expect_none("public, and in no example of the documentation", found);
}
