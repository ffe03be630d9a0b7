//! Programs that must not compile, and what the compiler says of them: a wrong program has to tell its author what is
//! wrong in words of this crate, not in a list of trait bounds. And programs that must, and that are run: each starts what
//! it shows, asks it, and panics or fails if the answer is not what it should be.
//!
//! What is printed of each wrong program lies beside it and is compared as a whole, by `trybuild`. After a change that is
//! meant: `TRYBUILD=overwrite cargo test --features axum,tokio,glommio --test compile_fail`, and read the difference.

use std::fs;
use std::io::Write;
use std::path::Path;

/// Compilers differ in how they print what they say. With another than this the outputs are not compared.
const IS_THE_OUTPUTS_COMPILER: bool = rustversion::cfg!(stable(1.95));

#[test]
fn right_programs_do_what_they_say_and_wrong_ones_fail_as_they_did() {
    let programs = trybuild::TestCases::new();
    programs.pass("tests/compile/pass/*.rs");
    if IS_THE_OUTPUTS_COMPILER {
        programs.compile_fail("tests/compile/fail/*.rs");
    } else {
        // Not `eprintln`, which is shown for tests that fail.
        let note = b"tests/compile/fail was left out: its outputs are those of Rust 1.95\n";
        std::io::stderr().write_all(note).expect("standard error can be written to");
    }
}

/// Each of them begins with lines `//! says: TEXT`. The first text is part of the first error, the others are anywhere in
/// what is printed. It is what an overwritten output must not lose.
#[test]
fn wrong_programs_are_told_what_counts() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compile/fail");
    let mut programs = 0;
    for entry in fs::read_dir(directory).expect("the directory is there") {
        let program = entry.expect("it is readable").path();
        if program.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        programs += 1;
        let text = fs::read_to_string(&program).expect("it is readable");
        let printed = fs::read_to_string(program.with_extension("stderr")).expect("its output lies beside it");
        let mut says = text.lines().filter_map(|line| line.strip_prefix("//! says: "));
        let first = says.next().expect("each program says what is said of it");
        let error = printed.lines().find(|line| line.starts_with("error")).unwrap_or_default();
        assert!(error.contains(first), "{}: the first error is not '{first}', but {error}", program.display());
        for text in says {
            assert!(printed.contains(text), "{}: it is not said '{text}'", program.display());
        }
    }
    assert!(programs > 0);
}
