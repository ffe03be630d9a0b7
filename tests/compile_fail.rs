//! Programs that must not compile, and what the compiler says of them: a wrong program has to tell its author what is
//! wrong in words of this crate, not in a list of trait bounds. And programs that must, and that are run: each starts what
//! it shows, asks it, and panics or fails if the answer is not what it should be.
//!
//! Each file of `tests/compile/fail` begins with lines `//! says: TEXT`. The first text is part of the first error, the
//! others are anywhere in what the compiler prints. Whole outputs, as `trybuild` compares them, differ from one compiler
//! to the next, and this is to hold for every one from the oldest supported on.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

/// The features that this test is built with (it requires two). Asked for others, cargo would build this crate again.
const FEATURES: [(&str, bool); 6] = [
    ("axum", true),
    ("tokio", true),
    ("cli", cfg!(feature = "cli")),
    ("default", cfg!(feature = "default")),
    ("glommio", cfg!(feature = "glommio")),
    ("internals", cfg!(feature = "internals")),
];

/// How rustc is called for a program that uses this crate and what it is used with.
struct Compiler {
    arguments: Vec<String>,
    out: PathBuf,
}

impl Compiler {
    /// Asks cargo where the libraries are that this very test was built with, which are therefore up to date.
    fn new() -> Self {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        cargo.args(["test", "--no-run", "--offline", "--quiet", "--message-format=json", "--test", "compile_fail"]);
        cargo.arg("--no-default-features");
        for (feature, _) in FEATURES.iter().filter(|(_, is_on)| *is_on) {
            cargo.args(["--features", feature]);
        }
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let output = cargo.output().expect("cargo, which runs this test, can be started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut arguments = Vec::new();
        let mut directories = Vec::new();
        for line in String::from_utf8(output.stdout).expect("cargo prints text").lines() {
            let message: serde_json::Value = serde_json::from_str(line).expect("cargo prints JSON");
            for file in message["filenames"].as_array().into_iter().flatten().filter_map(|file| file.as_str()) {
                if let Some(directory) = Path::new(file).parent() {
                    directories.push(directory.display().to_string());
                }
                let name = message["target"]["name"].as_str().unwrap_or_default().replace('-', "_");
                let is_ours = ["ringleader", "axum", "bytes", "hyper", "tokio", "tower_service"].contains(&&*name);
                if is_ours && file.ends_with(".rlib") {
                    arguments.extend(["--extern".to_owned(), format!("{name}={file}")]);
                }
            }
        }
        directories.sort_unstable();
        directories.dedup();
        for directory in directories {
            arguments.extend(["-L".to_owned(), format!("dependency={directory}")]);
        }
        Self { arguments, out: PathBuf::from(env!("CARGO_TARGET_TMPDIR")) }
    }

    fn compile(&self, program: &Path, kind: &[&str]) -> Output {
        let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        rustc.args(["--edition", "2024", "--cap-lints", "allow", "--color", "never"]).args(kind);
        rustc.arg("--out-dir").arg(&self.out).args(&self.arguments).arg(program);
        rustc.output().expect("rustc can be started")
    }

    /// Only looks whether a program is right.
    fn check(&self, program: &Path) -> Output {
        self.compile(program, &["--crate-type", "lib", "--emit", "metadata"])
    }

    /// Compiles a program that has a `main`; where it is then.
    fn build(&self, program: &Path) -> Result<PathBuf, String> {
        // Their debugging information is most of a linker's work.
        let output = self.compile(program, &["--crate-type", "bin", "-C", "strip=debuginfo"]);
        let printed = String::from_utf8_lossy(&output.stderr);
        output.status.success().then(|| self.out.join(program.file_stem().unwrap_or_default())).ok_or(printed.into())
    }
}

fn programs(directory: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compile").join(directory);
    let entries = fs::read_dir(directory).expect("the directory is there");
    let mut programs: Vec<_> = entries.map(|entry| entry.expect("it is readable").path()).collect();
    programs.sort_unstable();
    assert!(!programs.is_empty());
    programs
}

/// What is wrong with how a program fails.
fn complaint(program: &Path, compiler: &Compiler) -> Option<String> {
    let text = fs::read_to_string(program).expect("it is readable");
    let mut says = text.lines().filter_map(|line| line.strip_prefix("//! says: "));
    let first = says.next().expect("each program says what is said of it");
    let output = compiler.check(program);
    let printed = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        return Some("it compiles".to_owned());
    }
    let error = printed.lines().find(|line| line.starts_with("error")).unwrap_or_default();
    if !error.contains(first) {
        return Some(format!("its first error is not '{first}':\n{printed}"));
    }
    let missing = says.find(|text| !printed.contains(text))?;
    Some(format!("it is not said '{missing}':\n{printed}"))
}

#[test]
fn wrong_programs_fail_with_words_that_help() {
    let compiler = Compiler::new();
    let complaints = programs("fail").into_iter().filter_map(|program| {
        let complaint = complaint(&program, &compiler)?;
        Some(format!("{}: {complaint}", program.display()))
    });
    let complaints: Vec<_> = complaints.collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn right_programs_compile_and_do_what_they_say() {
    let compiler = Compiler::new();
    for program in programs("pass") {
        let binary = compiler.build(&program).unwrap_or_else(|printed| panic!("{}: {printed}", program.display()));
        // What hangs in it fails by itself: the test client and `App` wait for 30 s at most.
        let output = Command::new(&binary).output().expect("what was built can be started");
        let printed = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {}\n{printed}", program.display(), output.status);
        fs::remove_file(&binary).expect("it is there");
    }
}
