//! Ctrl-C: the first finishes the unit in progress, the second stops at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use crate::error::{Error, Result};

static REQUESTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// From now on Ctrl-C (and the signals that ask a process to end) set the flag. Called once, by `main`.
pub fn install() -> Result<()> {
    let flag = flag();
    let handler = move || {
        if flag.swap(true, Ordering::SeqCst) {
            eprintln!("\nstopped at once: what was in progress is lost");
            std::process::exit(130);
        }
        eprintln!("\ninterrupted: finishing what is in progress; Ctrl-C again stops at once");
    };
    ctrlc::set_handler(handler).map_err(|error| Error::Usage(format!("Ctrl-C cannot be handled: {error}")))
}

/// The flag itself, for those who look at it between batches.
pub(crate) fn flag() -> Arc<AtomicBool> {
    REQUESTED.clone()
}

/// Between units: `Err(Interrupted)` after Ctrl-C.
pub(crate) fn check() -> Result<()> {
    if REQUESTED.load(Ordering::SeqCst) { Err(Error::Interrupted(String::new())) } else { Ok(()) }
}
