//! The program: what was typed goes to [`ares::cli`], what comes back becomes an exit code.

use std::io::{ErrorKind, Write};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use ares::backend::pages::LargePages;
use ares::{Error, visible};

#[global_allocator]
static MEMORY: LargePages = LargePages;

/// Whether standard output was closed when the program began. Rust opens /dev/null in its place, and results would be lost there
/// in silence; so this is asked before Rust begins.
static OUTPUT_CLOSED: AtomicBool = AtomicBool::new(false);

#[cfg(target_os = "linux")]
#[used]
// SAFETY: the loader calls what lies there once, before `main`; the function needs nothing of Rust's runtime.
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = {
    extern "C" fn look() {
        // SAFETY: the call asks about a descriptor and changes nothing.
        OUTPUT_CLOSED.store(unsafe { libc::fcntl(1, libc::F_GETFD) } < 0, Ordering::Relaxed);
    }
    look
};

fn main() -> ExitCode {
    ares::text::isolate_templates();
    set_hook(Box::new(report_fault));
    if OUTPUT_CLOSED.load(Ordering::Relaxed) {
        let _ = writeln!(
            std::io::stderr(),
            "error: standard output: expected it open, found it closed; send it to a file or /dev/null"
        );
        return ExitCode::FAILURE;
    }
    let run = || {
        let cli = ares::cli::parse()?;
        ares::run::interrupt::install()?;
        ares::cli::run(cli)
    };
    // Unwinding removes temporary files; the hook has said the rest.
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        // A reader that has gone away (`ares … | head`) is nothing to talk about: the code is that of SIGPIPE.
        Ok(Err(Error::Io { source, .. })) if source.kind() == ErrorKind::BrokenPipe => ExitCode::from(141),
        Ok(Err(error)) => {
            // Nothing can be done if even the error stream is gone.
            let _ = writeln!(std::io::stderr(), "error: {}", visible(&error.to_string()));
            ExitCode::from(match error {
                Error::Interrupted(_) => ares::run::interrupt::exit_code(),
                other => other.exit_code(),
            })
        }
        Err(_) => ExitCode::FAILURE,
    }
}

/// Reports a panic: a fault of the program, whatever was typed.
fn report_fault(info: &PanicHookInfo) {
    if ares::text::is_contained() {
        return;
    }
    let what = info.payload_as_str().unwrap_or("no message");
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let _ = writeln!(
        std::io::stderr(),
        "error: this is a fault of ares, not of your input: {what} ({place}); please report it with what you typed"
    );
}
