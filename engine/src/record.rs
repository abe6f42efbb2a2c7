//! One entry, one allocation.
//!
//! ```text
//!   0        8            12        14     16              16 or 24
//!   +--------+------------+---------+------+ - - - - - - - +-----------+-------------+
//!   | hlc    | value_len  | key_len | node | expiry, if any| key       | value       |
//!   +--------+------------+---------+------+ - - - - - - - +-----------+-------------+
//!              bit 31: has an expiry   bit 30: tombstone
//! ```
//!
//! A record is owned by exactly one table slot. Overwriting with the same sizes writes in place; everything else makes a
//! new record. All `unsafe` of reading and writing those bytes is in this file.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use crate::Millis;
use crate::hlc::{Hlc, Version};

/// Longest key, in bytes.
pub const MAX_KEY_LEN: usize = u16::MAX as usize;
/// Longest value, in bytes: 512 MiB, as in Redis.
pub const MAX_VALUE_LEN: usize = 512 << 20;

const HEADER: usize = 16;
const HAS_EXPIRY: u32 = 1 << 31;
const TOMBSTONE: u32 = 1 << 30;
const LEN: u32 = TOMBSTONE - 1;

/// What is stored about a key besides key and value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Which write made the entry.
    pub version: Version,
    /// Unix milliseconds after which the entry is gone; 0 = never.
    pub expires_at: Millis,
    /// A recorded delete: it has no value.
    pub tombstone: bool,
}

/// An entry, borrowed from where it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Key.
    pub key: &'a [u8],
    /// Value; empty for a tombstone.
    pub value: &'a [u8],
    /// Which write made it.
    pub version: Version,
    /// Unix milliseconds after which it is gone; 0 = never.
    pub expires_at: Millis,
    /// A recorded delete.
    pub tombstone: bool,
}

impl Entry<'_> {
    /// Its description.
    pub fn meta(&self) -> Meta {
        Meta { version: self.version, expires_at: self.expires_at, tombstone: self.tombstone }
    }

    /// Bytes that its record takes in memory, allocation rounding included.
    pub fn footprint(&self) -> usize {
        allocated(size(self.key.len(), self.value.len(), self.expires_at != 0))
    }
}

/// Owner of one record's memory.
#[derive(Debug)]
pub(crate) struct Record(NonNull<u8>);

#[inline]
fn size(key: usize, value: usize, has_expiry: bool) -> usize {
    HEADER + if has_expiry { 8 } else { 0 } + key + value
}

#[inline]
fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).expect("keys and values are bounded")
}

/// Bytes that the allocator really takes for a request (size classes as in mimalloc 2: four per doubling).
pub(crate) fn allocated(size: usize) -> usize {
    if size <= 64 {
        return size.next_multiple_of(16);
    }
    let step = (size.next_power_of_two() / 2 / 4).max(16);
    size.next_multiple_of(step)
}

impl Record {
    pub(crate) fn new(key: &[u8], value: &[u8], meta: Meta) -> Record {
        debug_assert!(key.len() <= MAX_KEY_LEN && value.len() <= MAX_VALUE_LEN);
        let layout = layout(size(key.len(), value.len(), meta.expires_at != 0));
        // SAFETY: the layout has at least the header's size.
        let raw = unsafe { alloc(layout) };
        let Some(at) = NonNull::new(raw) else { handle_alloc_error(layout) };
        let mut record = Record(at);
        record.write_header(key.len(), value.len(), meta);
        let from = record.key_at();
        // SAFETY: the layout has room for key and value behind the header, and both come from elsewhere.
        unsafe {
            at.add(from).copy_from_nonoverlapping(NonNull::from(key).cast(), key.len());
            at.add(from + key.len()).copy_from_nonoverlapping(NonNull::from(value).cast(), value.len());
        }
        record
    }

    #[inline]
    fn write_header(&mut self, key: usize, value: usize, meta: Meta) {
        let has_expiry = meta.expires_at != 0;
        let len = value as u32 | if has_expiry { HAS_EXPIRY } else { 0 } | if meta.tombstone { TOMBSTONE } else { 0 };
        // SAFETY: the allocation is aligned to 8 and holds the header, and the expiry when there is one.
        unsafe {
            self.0.cast::<u64>().write(meta.version.hlc.0);
            self.0.add(8).cast::<u32>().write(len);
            self.0.add(12).cast::<u16>().write(key as u16);
            self.0.add(14).cast::<u16>().write(meta.version.node);
            if has_expiry {
                self.0.add(16).cast::<u64>().write(meta.expires_at);
            }
        }
    }

    #[inline]
    fn len_word(&self) -> u32 {
        // SAFETY: written by `new`, aligned to 4.
        unsafe { self.0.add(8).cast::<u32>().read() }
    }

    #[inline]
    fn key_len(&self) -> usize {
        // SAFETY: written by `new`, aligned to 2.
        unsafe { self.0.add(12).cast::<u16>().read() as usize }
    }

    #[inline]
    fn value_len(&self) -> usize {
        (self.len_word() & LEN) as usize
    }

    #[inline]
    fn key_at(&self) -> usize {
        HEADER + if self.len_word() & HAS_EXPIRY != 0 { 8 } else { 0 }
    }

    /// Key of the entry.
    #[inline]
    pub(crate) fn key(&self) -> &[u8] {
        // SAFETY: `new` wrote that many bytes there, and `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.0.add(self.key_at()).as_ptr(), self.key_len()) }
    }

    /// Whether that is its key: two words for keys of 8 to 16 bytes, where a call would cost more than the comparison.
    #[inline]
    pub(crate) fn is_under(&self, key: &[u8]) -> bool {
        let own = self.key();
        if own.len() != key.len() {
            return false;
        }
        if let (8..=16, Some((a, b)), Some((x, y))) = (key.len(), ends(own), ends(key)) {
            return (a ^ x) | (b ^ y) == 0;
        }
        own == key
    }

    /// The value, if it can be read at that time: the record is no tombstone and has not expired.
    #[inline]
    pub(crate) fn live_value(&self, now: Millis) -> Option<&[u8]> {
        let len = self.len_word();
        if len & (HAS_EXPIRY | TOMBSTONE) != 0 && (len & TOMBSTONE != 0 || self.expires_at() <= now) {
            return None;
        }
        let from = self.key_at() + self.key_len();
        // SAFETY: `new` wrote that many bytes there, and `self` is borrowed.
        Some(unsafe { std::slice::from_raw_parts(self.0.add(from).as_ptr(), (len & LEN) as usize) })
    }

    /// Whether it is a recorded delete.
    pub(crate) fn is_tombstone(&self) -> bool {
        self.len_word() & TOMBSTONE != 0
    }

    /// Unix milliseconds after which the entry is gone; 0 = never.
    #[inline]
    fn expires_at(&self) -> Millis {
        if self.len_word() & HAS_EXPIRY == 0 {
            return 0;
        }
        // SAFETY: `new` wrote it there when the flag is set, aligned to 8.
        unsafe { self.0.add(HEADER).cast::<u64>().read() }
    }

    /// All of the entry.
    #[inline]
    pub(crate) fn entry(&self) -> Entry<'_> {
        let len = self.len_word();
        let (key_len, value_len) = (self.key_len(), (len & LEN) as usize);
        let has_expiry = len & HAS_EXPIRY != 0;
        let from = HEADER + if has_expiry { 8 } else { 0 };
        // SAFETY: `new` wrote header, expiry when flagged, key and value at those places; `self` is borrowed.
        unsafe {
            let key = self.0.add(from);
            Entry {
                key: std::slice::from_raw_parts(key.as_ptr(), key_len),
                value: std::slice::from_raw_parts(key.add(key_len).as_ptr(), value_len),
                version: self.version(),
                expires_at: self.expires_at(),
                tombstone: len & TOMBSTONE != 0,
            }
        }
    }

    /// The value, to be changed in place.
    pub(crate) fn value_mut(&mut self) -> &mut [u8] {
        let (from, len) = (self.key_at() + self.key_len(), self.value_len());
        // SAFETY: `new` wrote that many bytes there, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from).as_ptr(), len) }
    }

    /// Writes value and description in place if the record has exactly that shape; false otherwise.
    #[inline]
    pub(crate) fn overwrite(&mut self, value: &[u8], meta: Meta) -> bool {
        let has_expiry = self.len_word() & HAS_EXPIRY != 0;
        if self.value_len() != value.len() || has_expiry != (meta.expires_at != 0) {
            return false;
        }
        self.write_header(self.key_len(), value.len(), meta);
        self.value_mut().copy_from_slice(value);
        true
    }

    /// As [`Record::overwrite`] for a record without expiry that gets none: the version it had.
    #[inline]
    pub(crate) fn overwrite_plain(&mut self, value: &[u8], version: Version) -> Option<Version> {
        // Neither flag is set in the length of a plain record.
        if self.len_word() as usize != value.len() {
            return None;
        }
        let old = self.version();
        // SAFETY: `new` wrote header and value at those places, and `self` is borrowed mutably; `value` comes from elsewhere.
        unsafe {
            self.0.cast::<u64>().write(version.hlc.0);
            self.0.add(14).cast::<u16>().write(version.node);
            let at = self.0.add(HEADER + self.key_len());
            at.copy_from_nonoverlapping(NonNull::from(value).cast(), value.len());
        }
        Some(old)
    }

    /// Which write made the entry.
    #[inline]
    fn version(&self) -> Version {
        // SAFETY: `new` wrote both there, aligned to 8 and 2.
        unsafe { Version { hlc: Hlc(self.0.cast::<u64>().read()), node: self.0.add(14).cast::<u16>().read() } }
    }

    /// Writes the description in place if the record has a place for it; false otherwise.
    pub(crate) fn set_meta(&mut self, meta: Meta) -> bool {
        let has_expiry = self.len_word() & HAS_EXPIRY != 0;
        if has_expiry != (meta.expires_at != 0) || meta.tombstone != (self.len_word() & TOMBSTONE != 0) {
            return false;
        }
        self.write_header(self.key_len(), self.value_len(), meta);
        true
    }

    #[inline]
    fn size(&self) -> usize {
        size(self.key_len(), self.value_len(), self.len_word() & HAS_EXPIRY != 0)
    }

    /// Bytes that the record takes from the allocator.
    pub(crate) fn footprint(&self) -> usize {
        allocated(self.size())
    }

    /// Asks the CPU to bring the first bytes closer.
    #[inline]
    pub(crate) fn prefetch(&self) {
        prefetch(self.0.as_ptr());
    }

    /// The same for as much as a short value needs.
    #[inline]
    pub(crate) fn prefetch_value(&self) {
        prefetch(self.0.as_ptr());
        prefetch(self.0.as_ptr().wrapping_add(64));
    }
}

/// The first and the last eight bytes; of a key of 8 to 16 bytes that is all of it.
#[inline]
pub(crate) fn ends(bytes: &[u8]) -> Option<(u64, u64)> {
    let (first, last) = (bytes.first_chunk::<8>()?, bytes.last_chunk::<8>()?);
    Some((u64::from_le_bytes(*first), u64::from_le_bytes(*last)))
}

/// Whether one of the sixteen bytes is `byte`.
#[inline]
pub(crate) fn words_have(first: u64, second: u64, byte: u8) -> bool {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every CPU of this architecture has SSE2.
    unsafe {
        use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_movemask_epi8, _mm_set_epi64x, _mm_set1_epi8};
        let words = _mm_set_epi64x(second as i64, first as i64);
        _mm_movemask_epi8(_mm_cmpeq_epi8(words, _mm_set1_epi8(byte as i8))) != 0
    }
    #[cfg(not(target_arch = "x86_64"))]
    [first, second].into_iter().any(|word| word.to_ne_bytes().contains(&byte))
}

/// Asks the CPU to bring the cache line of an address closer. Does nothing where there is no such instruction.
#[inline]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a prefetch reads nothing; any address is allowed.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}

impl Drop for Record {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout: none of its parts changes afterwards.
        unsafe { dealloc(self.0.as_ptr(), layout(self.size())) }
    }
}

// SAFETY: a record owns its memory alone, like a Box<[u8]>.
unsafe impl Send for Record {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_gives_back_what_it_was_made_of() {
        for (key, value, expires_at) in
            [("", "", 0), ("k", "v", 0), ("key", "", 77), ("a longer key", "value", 1 << 50)]
        {
            let version = Version { hlc: Hlc(9 << 40), node: 513 };
            let meta = Meta { version, expires_at, tombstone: value.is_empty() };
            let record = Record::new(key.as_bytes(), value.as_bytes(), meta);
            let entry = record.entry();
            assert_eq!((entry.key, entry.value, entry.meta()), (key.as_bytes(), value.as_bytes(), meta));
            assert_eq!(record.key(), key.as_bytes());
        }
    }

    #[test]
    fn only_the_same_shape_is_overwritten_in_place() {
        let meta = Meta::default();
        let mut record = Record::new(b"k", b"abc", meta);
        assert!(record.overwrite(b"xyz", meta) && record.entry().value == b"xyz");
        assert!(!record.overwrite(b"longer", meta));
        assert!(!record.overwrite(b"xyz", Meta { expires_at: 5, ..meta }));
        assert_eq!(record.entry().value, b"xyz");
        record.value_mut()[0] = b'!';
        assert_eq!(record.entry().value, b"!yz");
    }

    #[test]
    fn footprints_round_up_as_the_allocator_does() {
        for (asked, given) in [(16, 16), (17, 32), (96, 96), (97, 112), (132, 160), (1000, 1024), (1025, 1280)] {
            assert_eq!(allocated(asked), given, "{asked}");
        }
    }
}
