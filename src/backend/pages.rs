//! Large pages under large buffers.

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, which asks for large pages under a buffer that fills some. First writes fault once per page, and a
/// checkpoint is little but first writes. Where the system grants none (and outside Linux), nothing changes.
pub struct LargePages;

/// Smaller buffers may not hold one whole large page.
const LEAST: usize = 4 << 20;

// SAFETY: every call goes to `System` as it came; `advised` returns the pointer it was given and changes no memory.
unsafe impl GlobalAlloc for LargePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is the one that `System` asks for; so it is below.
        advised(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        advised(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, buffer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as in `alloc`.
        advised(unsafe { System.realloc(buffer, layout, size) }, size)
    }

    unsafe fn dealloc(&self, buffer: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(buffer, layout) }
    }
}

#[cfg(target_os = "linux")]
fn advised(buffer: *mut u8, size: usize) -> *mut u8 {
    const PAGE: usize = 2 << 20;
    if size >= LEAST && !buffer.is_null() {
        let (first, end) = (buffer.addr().next_multiple_of(PAGE), (buffer.addr() + size) / PAGE * PAGE);
        // SAFETY: the range lies inside the buffer, and the advice leaves its contents alone. Whether it was taken is no matter.
        unsafe { libc::madvise(buffer.with_addr(first).cast(), end - first, libc::MADV_HUGEPAGE) };
    }
    buffer
}

#[cfg(not(target_os = "linux"))]
fn advised(buffer: *mut u8, _size: usize) -> *mut u8 {
    buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What it holds survives growing and shrinking across the size from which advice is given; zeroed memory is zero.
    #[test]
    fn contents_survive() {
        for (from, to) in [(100, LEAST + 5), (LEAST + 5, 3 * LEAST), (3 * LEAST + 1, LEAST), (2 * LEAST, 64)] {
            let layout = Layout::array::<u8>(from).unwrap();
            // SAFETY: non-zero sizes; every access lies inside what was asked for; freed once, by its last size.
            unsafe {
                let buffer = LargePages.alloc_zeroed(layout);
                assert!((0..from).step_by(97).chain([from - 1]).all(|i| *buffer.add(i) == 0));
                (0..from).for_each(|i| *buffer.add(i) = i as u8);
                let buffer = LargePages.realloc(buffer, layout, to);
                assert!((0..from.min(to)).all(|i| *buffer.add(i) == i as u8), "{from} to {to}");
                LargePages.dealloc(buffer, Layout::array::<u8>(to).unwrap());
            }
        }
    }
}
