//! The program: what was typed goes to [`ares::cli`], what comes back becomes an exit code.

use std::any::Any;
use std::io::{ErrorKind, Write};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook};
use std::process::ExitCode;

use ares::Error;
use ares::backend::pages::LargePages;

#[global_allocator]
static MEMORY: LargePages = LargePages;

fn main() -> ExitCode {
    set_hook(Box::new(tell_fault));
    // Unwinding removes temporary files; the hook has told the rest.
    let outcome: Result<anyhow::Result<()>, Box<dyn Any + Send>> = catch_unwind(AssertUnwindSafe(run));
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => tell(&error),
        Err(_) => ExitCode::FAILURE,
    }
}

fn run() -> anyhow::Result<()> {
    let cli = ares::cli::parse();
    ares::run::interrupt::install()?;
    Ok(ares::cli::run(cli)?)
}

/// Says what went wrong; a reader that has gone away (`ares … | head`) is nothing wrong.
fn tell(error: &anyhow::Error) -> ExitCode {
    let known = error.downcast_ref::<Error>();
    if matches!(known, Some(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    // Nothing can be done if even the error stream is gone.
    let _ = writeln!(std::io::stderr(), "error: {error}");
    ExitCode::from(known.map_or(1, Error::exit_code))
}

/// A panic is a fault of the program, whatever was typed.
fn tell_fault(info: &PanicHookInfo) {
    let what = info.payload_as_str().unwrap_or("no message");
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let _ = writeln!(
        std::io::stderr(),
        "error: this is a fault of ares, not of your input: {what} ({place}); please report it with what you typed"
    );
}
