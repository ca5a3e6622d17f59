//! Code of others that panics on files of others.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Runs what a library does with a file that came from outside. A panic in it is the file's fault, and its message the error. What
/// `work` writes to must not be used after a panic.
pub(crate) fn contained<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let before = CONTAINED.replace(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    CONTAINED.set(before);
    done.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        format!("what the library that reads it cannot handle ({text})")
    })
}

/// Whether a panic of this thread will be told as an error: then its hook has nothing to say.
pub fn is_contained() -> bool {
    CONTAINED.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_the_error_and_ends_at_its_border() {
        assert_eq!(contained(|| 5), Ok(5));
        let found = contained(|| assert!(!is_contained(), "number {}", 7)).unwrap_err();
        assert!(found.contains("number 7"), "{found}");
        assert!(!is_contained());
    }
}
