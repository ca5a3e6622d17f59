//! Ctrl-C: while there is nothing to lose it stops the program at once; later the first finishes the unit in progress, and the
//! second stops.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, LazyLock};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::error::{Error, Result, start_thread};

static REQUESTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
/// Whether the flag is looked at: before, nothing has been made that is worth finishing.
static AT_WORK: AtomicBool = AtomicBool::new(false);
static SIGNAL: AtomicI32 = AtomicI32::new(SIGINT);

/// From now on Ctrl-C, and the signals that ask a process to end, set the flag. Called once, by `main`.
pub fn install() -> Result<()> {
    let failed = |error| Error::Usage(format!("Ctrl-C cannot be handled: {error}"));
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(failed)?;
    start_thread(move || {
        for signal in &mut signals {
            SIGNAL.store(signal, Ordering::SeqCst);
            if REQUESTED.swap(true, Ordering::SeqCst) {
                eprintln!("\nstopped at once: what was in progress is lost");
                std::process::exit(exit_code().into());
            }
            if !AT_WORK.load(Ordering::SeqCst) {
                eprintln!("\ninterrupted");
                std::process::exit(exit_code().into());
            }
            eprintln!("\ninterrupted: finishing what is in progress; Ctrl-C again stops at once");
        }
    })
}

/// From now on whoever is at work looks at the flag, and keeps what is done.
pub(crate) fn at_work() {
    AT_WORK.store(true, Ordering::SeqCst);
}

/// As shells count: 128 and the signal's number.
pub fn exit_code() -> u8 {
    128 + SIGNAL.load(Ordering::SeqCst) as u8
}

/// The flag itself, for those who look at it between batches.
pub(crate) fn flag() -> Arc<AtomicBool> {
    REQUESTED.clone()
}

/// Between units: `Err(Interrupted)` after Ctrl-C.
pub(crate) fn check() -> Result<()> {
    if REQUESTED.load(Ordering::SeqCst) { Err(Error::Interrupted(String::new())) } else { Ok(()) }
}
