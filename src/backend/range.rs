//! A stage of work, marked for a profiler.

use std::marker::PhantomData;

/// Ends its stage when dropped, on the thread on which it began.
#[must_use = "a stage ends when this is dropped"]
#[derive(Debug, Default)]
pub struct Range(Option<unsafe extern "C" fn() -> i32>, PhantomData<*const ()>);

impl Range {
    /// Where nobody looks.
    pub(crate) const NONE: Range = Range(None, PhantomData);

    /// `end` may be called once on this thread.
    pub(super) fn ended_by(end: unsafe extern "C" fn() -> i32) -> Range {
        Range(Some(end), PhantomData)
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        if let Some(end) = self.0 {
            // SAFETY: `ended_by` was promised it.
            unsafe { end() };
        }
    }
}
