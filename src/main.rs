//! The `ringleader` command. What it does is in `cli`, one file per subcommand.

use std::process::ExitCode;

mod cli;

fn main() -> ExitCode {
    cli::run()
}
