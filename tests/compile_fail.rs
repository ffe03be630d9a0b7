//! Programs that must not compile, and what the compiler says of them: a wrong program has to tell its author what is
//! wrong in words of this crate, not in a list of trait bounds. And programs that must, and that are run: each starts what
//! it shows, asks it, and panics or fails if the answer is not what it should be.
//!
//! What is printed of each wrong program lies beside it and is compared as a whole, by `trybuild`. After a change that is
//! meant: `TRYBUILD=overwrite cargo test --features axum,tokio,glommio --test compile_fail`, and read the difference.
//!
//! The right ones are modules of this test: to have `trybuild` link each would take it minutes, on a machine that has not
//! built it before.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use ringleader::BoxError;

#[path = "compile/pass/adapters.rs"]
mod adapters;
#[path = "compile/pass/any_error.rs"]
mod any_error;
#[path = "compile/pass/axum_with_peers.rs"]
mod axum_with_peers;
#[path = "compile/pass/background.rs"]
mod background;
#[path = "compile/pass/functions.rs"]
mod functions;
#[path = "compile/pass/looks_wrong.rs"]
mod looks_wrong;
#[path = "compile/pass/messages.rs"]
mod messages;
#[path = "compile/pass/named_futures.rs"]
mod named_futures;
#[path = "compile/pass/own_type.rs"]
mod own_type;
#[path = "compile/pass/plain_closures.rs"]
mod plain_closures;
#[path = "compile/pass/shard_local_in_axum.rs"]
mod shard_local_in_axum;
#[path = "compile/pass/start_elsewhere.rs"]
mod start_elsewhere;
#[path = "compile/pass/threads.rs"]
mod threads;
#[path = "compile/pass/two_servers.rs"]
mod two_servers;
#[path = "compile/pass/whole.rs"]
mod whole;

/// Compilers differ in how they print what they say. With another than this the outputs are not compared.
const IS_THE_OUTPUTS_COMPILER: bool = rustversion::cfg!(stable(1.95));

macro_rules! right_programs {
    ($($program:ident),* $(,)?) => {
        const RIGHT_PROGRAMS: &[&str] = &[$(stringify!($program)),*];
        $(#[test]
        fn $program() -> Result<(), BoxError> {
            $program::main()
        })*
    };
}

right_programs![
    adapters,
    any_error,
    axum_with_peers,
    background,
    functions,
    looks_wrong,
    messages,
    named_futures,
    own_type,
    plain_closures,
    shard_local_in_axum,
    start_elsewhere,
    threads,
    two_servers,
    whole
];

#[test]
fn every_right_program_is_run() {
    let mut names: Vec<_> =
        programs("pass").iter().map(|path| path.file_stem().expect("it has a name").to_owned()).collect();
    names.sort_unstable();
    assert_eq!(names, RIGHT_PROGRAMS);
}

#[test]
fn wrong_programs_fail_as_they_did() {
    if IS_THE_OUTPUTS_COMPILER {
        trybuild::TestCases::new().compile_fail("tests/compile/fail/*.rs");
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
    for program in programs("fail") {
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
}

fn programs(directory: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compile").join(directory);
    let entries =
        fs::read_dir(directory).expect("the directory is there").map(|entry| entry.expect("it is readable").path());
    let programs: Vec<_> = entries.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect();
    assert!(!programs.is_empty());
    programs
}
