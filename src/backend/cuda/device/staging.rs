//! Pinned host memory through which copies run: the device reads it while the host goes on.

use cudarc::driver::result::{self, DriverError, event};
use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream};

/// Slots of pinned memory, used in turn; each waits for the copy that used it before.
pub(super) struct Ring {
    slots: Vec<Slot>,
    /// Of one slot.
    bytes: usize,
    next: usize,
}

struct Slot {
    memory: *mut u8,
    /// Of its last copy; before there was one, waiting for it ends at once.
    done: CUevent,
}

// SAFETY: pinned memory and events may be used from any thread; the ring is only reached through a lock.
unsafe impl Send for Ring {}

impl Ring {
    /// The context must be current, here and in every method.
    pub(crate) fn new(slots: usize, bytes: usize) -> Result<Ring, DriverError> {
        Ok(Ring { slots: (0..slots).map(|_| Slot::new(bytes)).collect::<Result<_, _>>()?, bytes, next: 0 })
    }

    /// The next slot, once the device has done with it.
    fn take(&mut self) -> Result<&mut Slot, DriverError> {
        let at = self.next;
        self.next = (at + 1) % self.slots.len();
        let slot = &mut self.slots[at];
        slot.wait()?;
        Ok(slot)
    }

    /// Queues a copy of `src` to the device; `src` is free as soon as this returns.
    ///
    /// # Safety
    /// `dst` has room for it.
    pub(crate) unsafe fn upload(&mut self, dst: u64, src: &[u8], stream: CUstream) -> Result<(), DriverError> {
        let mut dst = dst;
        for part in src.chunks(self.bytes) {
            let slot = self.take()?;
            // SAFETY: a part is no longer than a slot, which no copy uses any more; the rest is the caller's promise.
            unsafe {
                std::ptr::copy_nonoverlapping(part.as_ptr(), slot.memory, part.len());
                result::memcpy_htod_async(dst, std::slice::from_raw_parts(slot.memory, part.len()), stream)?;
                event::record(slot.done, stream)?;
            }
            dst += part.len() as u64;
        }
        Ok(())
    }

    /// Copies from the device and waits; while the host empties one slot the device fills the others.
    ///
    /// # Safety
    /// `src` holds that much.
    pub(crate) unsafe fn download(&mut self, dst: &mut [u8], src: u64, stream: CUstream) -> Result<(), DriverError> {
        let (mut queued, mut read) = (0, 0);
        // Slots in flight, oldest first.
        let mut flying = std::collections::VecDeque::new();
        while read < dst.len() {
            while queued < dst.len() && flying.len() < self.slots.len() {
                let length = self.bytes.min(dst.len() - queued);
                let at = self.next;
                let slot = self.take()?;
                // SAFETY: a slot that no copy uses; the rest is the caller's promise.
                unsafe {
                    let part = std::slice::from_raw_parts_mut(slot.memory, length);
                    result::memcpy_dtoh_async(part, src + queued as u64, stream)?;
                    event::record(slot.done, stream)?;
                }
                flying.push_back((at, length));
                queued += length;
            }
            let Some((at, length)) = flying.pop_front() else { break };
            let slot = &mut self.slots[at];
            slot.wait()?;
            // SAFETY: the copy into the slot is over; both hold `length` bytes.
            unsafe { std::ptr::copy_nonoverlapping(slot.memory, dst[read..].as_mut_ptr(), length) };
            read += length;
        }
        Ok(())
    }
}

impl Slot {
    fn new(bytes: usize) -> Result<Slot, DriverError> {
        // SAFETY: freed with the slot; flags 0 ask for plain pinned memory.
        let memory = unsafe { result::malloc_host(bytes, 0)? }.cast();
        let mut slot = Slot { memory, done: std::ptr::null_mut() };
        slot.done = event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        Ok(slot)
    }

    fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the event is alive.
        unsafe { event::synchronize(self.done) }
    }
}

impl Drop for Slot {
    /// The context must be current and idle.
    fn drop(&mut self) {
        // SAFETY: both are its own. After a fault there is nothing left to do about an error.
        unsafe {
            if !self.done.is_null() {
                let _ = event::destroy(self.done);
            }
            let _ = result::free_host(self.memory.cast());
        }
    }
}
