//! The program: what was typed goes to [`ares::cli`], what comes back becomes an exit code.

use std::io::{ErrorKind, Write};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook};
use std::process::ExitCode;

use ares::Error;
use ares::backend::pages::LargePages;

#[global_allocator]
static MEMORY: LargePages = LargePages;

fn main() -> ExitCode {
    set_hook(Box::new(report_fault));
    let run = || {
        let cli = ares::cli::parse()?;
        ares::run::interrupt::install()?;
        ares::cli::run(cli)
    };
    // Unwinding removes temporary files; the hook has said the rest.
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        // A reader that has gone away (`ares … | head`) is nothing wrong.
        Ok(Err(Error::Io { source, .. })) if source.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            // Nothing can be done if even the error stream is gone.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::from(error.exit_code())
        }
        Err(_) => ExitCode::FAILURE,
    }
}

/// Reports a panic: a fault of the program, whatever was typed.
fn report_fault(info: &PanicHookInfo) {
    let what = info.payload_as_str().unwrap_or("no message");
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let _ = writeln!(
        std::io::stderr(),
        "error: this is a fault of ares, not of your input: {what} ({place}); please report it with what you typed"
    );
}
