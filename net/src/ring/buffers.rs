//! The buffers that the kernel receives into, lent to it through a ring in shared memory.
//!
//! ```text
//!   entries   [ bid 3 | bid 0 | bid 1 | bid 2 ]   we append at the tail, the kernel takes at its head
//!                        │
//!   memory    bid 0 │ bid 1 │ bid 2 │ bid 3
//! ```
//!
//! Contract: a buffer is in exactly one place: in the ring (the kernel's), in a completion not yet reaped (nobody
//! touches it), or in a [`Lease`] (ours, read-only, until it is dropped, which puts it back). Memory and entries are
//! freed only through [`Buffers::free`], which the ring calls once the kernel is done with every operation; dropping
//! the value without that call leaks them, which is safe.
//!
//! Locked memory: only the entries are pinned (16 bytes each); the buffers themselves are ordinary memory.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

/// The kernel wants the entries to start on a page.
const PAGE: usize = 4096;

/// Provided buffers of one ring.
pub(super) struct Buffers {
    entries: NonNull<BufRingEntry>,
    memory: NonNull<u8>,
    count: u16,
    len: u32,
    /// Our copy of the tail; the kernel reads the one in the first entry.
    tail: u16,
}

impl Buffers {
    /// `count` (a power of two, at most 2^15) buffers of `len` bytes. `None` when there is no memory.
    pub(super) fn new(count: u16, len: u32) -> Option<Buffers> {
        assert!(count.is_power_of_two() && count <= 1 << 15, "the kernel masks with the count");
        assert!(len > 0, "a buffer holds something");
        // SAFETY: both layouts have a size above zero, asserted above.
        let (entries, memory) = unsafe {
            (
                NonNull::new(alloc_zeroed(entries_layout(count)).cast::<BufRingEntry>())?,
                NonNull::new(alloc_zeroed(memory_layout(count, len))),
            )
        };
        let Some(memory) = memory else {
            // SAFETY: allocated above with this very layout, and nobody saw it.
            unsafe { dealloc(entries.as_ptr().cast(), entries_layout(count)) };
            return None;
        };
        let mut buffers = Buffers { entries, memory, count, len, tail: 0 };
        for bid in 0..count {
            buffers.give(bid);
        }
        Some(buffers)
    }

    /// What the kernel must be told: address and number of the entries.
    pub(super) fn registration(&self) -> (u64, u16) {
        (self.entries.as_ptr() as u64, self.count)
    }

    /// What the kernel received into buffer `bid`.
    ///
    /// The caller vouches that the completion that named `bid` was reaped just now, so that the buffer is ours.
    pub(super) fn lease(&mut self, bid: u16, len: usize) -> Lease<'_> {
        assert!(bid < self.count && len <= self.len as usize, "the kernel names its own buffers");
        Lease { buffers: self, bid, len }
    }

    fn give(&mut self, bid: u16) {
        let addr = self.start(bid) as u64;
        let slot = (self.tail & (self.count - 1)) as usize;
        // SAFETY: `slot` is below `count`, so the entry lies in the allocation, which lives as long as `self`. The kernel
        // does not read this entry before the tail below says so. Only the three fields are written: the first entry's
        // fourth field is the tail itself. The reference is unique: `&mut self`, and the kernel only reads.
        let entry = unsafe { &mut *self.entries.as_ptr().add(slot) };
        entry.set_addr(addr);
        entry.set_len(self.len);
        entry.set_bid(bid);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail is the last two bytes of the first entry, inside the allocation and aligned to two; the kernel
        // reads it concurrently, so it is written as an atomic. Release: the entry is visible before the tail.
        unsafe {
            let tail = BufRingEntry::tail(self.entries.as_ptr()).cast_mut().cast::<AtomicU16>();
            (*tail).store(self.tail, Ordering::Release);
        }
    }

    fn start(&self, bid: u16) -> *mut u8 {
        // SAFETY: `bid` is below `count`, so the offset stays inside the allocation.
        unsafe { self.memory.as_ptr().add(bid as usize * self.len as usize) }
    }

    /// Gives the memory back to the allocator.
    ///
    /// # Safety
    ///
    /// The kernel must hold no operation that could still receive into these buffers, and the entries must not be
    /// registered any more.
    pub(super) unsafe fn free(self) {
        // SAFETY: allocated in `new` with these layouts; the kernel is done with them, says the caller; `self` is consumed.
        unsafe {
            dealloc(self.entries.as_ptr().cast(), entries_layout(self.count));
            dealloc(self.memory.as_ptr(), memory_layout(self.count, self.len));
        }
    }
}

/// A received buffer while its bytes are read. Dropping it lends the buffer to the kernel again.
pub(super) struct Lease<'a> {
    buffers: &'a mut Buffers,
    bid: u16,
    len: usize,
}

impl Lease<'_> {
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the buffer is initialised memory (zeroed at the start), `len` is within it, and until this lease is
        // dropped neither the kernel (it is not in the ring) nor anybody else (the lease borrows `Buffers`) writes it.
        unsafe { std::slice::from_raw_parts(self.buffers.start(self.bid), self.len) }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.buffers.give(self.bid);
    }
}

fn entries_layout(count: u16) -> Layout {
    Layout::from_size_align(count as usize * size_of::<BufRingEntry>(), PAGE).expect("at most 2^15 entries of 16 bytes")
}

fn memory_layout(count: u16, len: u32) -> Layout {
    Layout::from_size_align(count as usize * len as usize, PAGE).expect("the configuration bounds the buffers' bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_lease_puts_the_buffer_at_the_tail() {
        let mut buffers = Buffers::new(4, 100).unwrap();
        assert_eq!(buffers.tail, 4);
        assert_eq!(buffers.lease(2, 7).bytes(), &[0; 7]);
        assert_eq!(buffers.tail, 5);
        // SAFETY: never registered.
        let last = unsafe { &*buffers.entries.as_ptr() };
        assert_eq!((last.bid(), last.len(), last.addr()), (2, 100, buffers.start(2) as u64));
        // SAFETY: never registered.
        unsafe { buffers.free() };
    }
}
