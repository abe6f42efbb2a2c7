//! What changes, as bytes: how a backend on disk is kept, and found again.
//!
//! A [`Journal`] notes every change that a backend makes, as **records**; who keeps it takes them now and then, packs
//! them into a **frame**, and appends that to a file. Reading the records of all frames in order gives the backend again.
//!
//! ```text
//!   record   put    1 flags key_len:u16 value_len:u32 hlc:u64 node:u16 [expires_at:u64] key value
//!            meta   2 the same with value_len 0: all but the value changes
//!            patch  3 as put, at:u32 in front of the key: these bytes of the value are new, from `at` on
//!            remove 4 0 key_len:u16 key
//!            clear  5 0 shard:u16
//!            end    6 0 0:u16 entries:u64            ends a snapshot
//!            after  7 0 0:u16 length:u64             begins a log: the one before was that long
//!   frame    "GKVF" len:u32 check:u64 position:u64 synced:u64 hlc:u64, then `len` bytes of records
//! ```
//!
//! All numbers are little endian. Records are **absolute**: each says what is there afterwards, so a snapshot that was taken
//! while entries changed, and then the changes since its begin, give what was there at the end of those.
//!
//! `check` is the xxh3 of the frame, header included, seeded with a number of the file's own. `position` is where the frame begins.
//! `synced` is up to where the file was known to be on disk when the frame was made. That tells a **torn** file from a
//! **damaged** one: when a machine loses power, what was not yet synced may be gone, in any order. What some later frame
//! says was synced, and cannot be read, was damaged afterwards.
//!
//! Not here: files ([`crate::disk`]), and which changes are made (the store).

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::hash::ShardId;
use crate::hlc::{Hlc, Version};
use crate::record::{MAX_KEY_LEN, MAX_VALUE_LEN, Meta};

/// Bytes in front of a frame's records.
pub const FRAME_HEAD: usize = 40;
/// How a frame begins.
pub const FRAME_MAGIC: [u8; 4] = *b"GKVF";
/// Bytes that a journal holds before it asks to be emptied.
const MUCH: usize = 4 << 20;

const EXPIRES: u8 = 1;
const TOMBSTONE: u8 = 2;

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// There is this entry under the key.
    Put {
        /// Its key.
        key: &'a [u8],
        /// Its value.
        value: &'a [u8],
        /// All else.
        meta: Meta,
    },
    /// The entry under the key has another description.
    Meta {
        /// Its key.
        key: &'a [u8],
        /// The new one.
        meta: Meta,
    },
    /// The entry under the key has another description, and other bytes from `at` on.
    Patch {
        /// Its key.
        key: &'a [u8],
        /// Where in the value.
        at: u32,
        /// What is there now.
        bytes: &'a [u8],
        /// The new description.
        meta: Meta,
    },
    /// There is no entry under the key.
    Remove {
        /// Which.
        key: &'a [u8],
    },
    /// The shard is empty.
    Clear {
        /// Which.
        shard: ShardId,
    },
    /// A snapshot is whole.
    End {
        /// Entries that it has.
        entries: u64,
    },
    /// The first record of a log that goes on where another was left.
    After {
        /// Bytes of that one.
        length: u64,
    },
}

impl Change<'_> {
    /// Appends the record.
    ///
    /// # Panics
    /// When a key or a value is longer than a record may have.
    pub fn write(&self, to: &mut Vec<u8>) {
        match *self {
            Change::Put { key, value, meta } => {
                described(to, 1, key, value.len(), meta);
                to.extend_from_slice(key);
                to.extend_from_slice(value);
            }
            Change::Meta { key, meta } => {
                described(to, 2, key, 0, meta);
                to.extend_from_slice(key);
            }
            Change::Patch { key, at, bytes, meta } => {
                described(to, 3, key, bytes.len(), meta);
                to.extend_from_slice(&at.to_le_bytes());
                to.extend_from_slice(key);
                to.extend_from_slice(bytes);
            }
            Change::Remove { key } => {
                short(to, 4, key_len(key));
                to.extend_from_slice(key);
            }
            Change::Clear { shard } => short(to, 5, shard.0),
            Change::End { entries } => {
                short(to, 6, 0);
                to.extend_from_slice(&entries.to_le_bytes());
            }
            Change::After { length } => {
                short(to, 7, 0);
                to.extend_from_slice(&length.to_le_bytes());
            }
        }
    }
}

fn key_len(key: &[u8]) -> u16 {
    u16::try_from(key.len()).expect("keys are no longer than MAX_KEY_LEN")
}

fn short(to: &mut Vec<u8>, kind: u8, number: u16) {
    to.extend_from_slice(&[kind, 0]);
    to.extend_from_slice(&number.to_le_bytes());
}

#[inline]
fn described(to: &mut Vec<u8>, kind: u8, key: &[u8], len: usize, meta: Meta) {
    let flags = if meta.expires_at != 0 { EXPIRES } else { 0 } | if meta.tombstone { TOMBSTONE } else { 0 };
    let mut head = [0; 18];
    head[0] = kind;
    head[1] = flags;
    head[2..4].copy_from_slice(&key_len(key).to_le_bytes());
    head[4..8].copy_from_slice(&u32::try_from(len).expect("values are no longer than MAX_VALUE_LEN").to_le_bytes());
    head[8..16].copy_from_slice(&meta.version.hlc.0.to_le_bytes());
    head[16..].copy_from_slice(&meta.version.node.to_le_bytes());
    to.extend_from_slice(&head);
    if meta.expires_at != 0 {
        to.extend_from_slice(&meta.expires_at.to_le_bytes());
    }
}

/// A record that makes no sense, in a frame whose checksum is right: it was written by another version, or wrongly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a record makes no sense ({0})")]
pub struct Malformed(pub &'static str);

/// The records of a frame, in order. Ends after the first that makes no sense.
#[derive(Clone, Debug)]
pub struct Changes<'a>(&'a [u8]);

impl<'a> Changes<'a> {
    /// Of what follows a frame's header.
    pub fn new(records: &'a [u8]) -> Changes<'a> {
        Changes(records)
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(Malformed("it is longer than its frame"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.take(2)?.try_into().expect("two bytes")))
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")))
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("eight bytes")))
    }

    fn read(&mut self) -> Result<Change<'a>, Malformed> {
        let &[kind, flags] = self.take(2)? else { unreachable!("two bytes") };
        let number = self.u16()?;
        Ok(match kind {
            1..=3 => {
                if usize::from(number) > MAX_KEY_LEN {
                    return Err(Malformed("its key is too long"));
                }
                let len = self.u32()? as usize;
                if len > MAX_VALUE_LEN {
                    return Err(Malformed("its value is too long"));
                }
                if flags & !(EXPIRES | TOMBSTONE) != 0 {
                    return Err(Malformed("it has unknown flags"));
                }
                let version = Version { hlc: Hlc(self.u64()?), node: self.u16()? };
                let expires_at = if flags & EXPIRES != 0 { self.u64()? } else { 0 };
                let meta = Meta { version, expires_at, tombstone: flags & TOMBSTONE != 0 };
                let at = if kind == 3 { self.u32()? } else { 0 };
                let key = self.take(number.into())?;
                let bytes = self.take(len)?;
                match kind {
                    1 if meta.tombstone && len > 0 => return Err(Malformed("it is a tombstone with a value")),
                    1 => Change::Put { key, value: bytes, meta },
                    2 | 3 if meta.tombstone => return Err(Malformed("it buries an entry and keeps its value")),
                    2 => Change::Meta { key, meta },
                    _ => Change::Patch { key, at, bytes, meta },
                }
            }
            4 => Change::Remove { key: self.take(number.into())? },
            5 => Change::Clear { shard: ShardId(number) },
            6 => Change::End { entries: self.u64()? },
            7 => Change::After { length: self.u64()? },
            _ => return Err(Malformed("its kind is unknown")),
        })
    }
}

impl<'a> Iterator for Changes<'a> {
    type Item = Result<Change<'a>, Malformed>;

    fn next(&mut self) -> Option<Result<Change<'a>, Malformed>> {
        if self.0.is_empty() {
            return None;
        }
        let read = self.read();
        if read.is_err() {
            self.0 = &[];
        }
        Some(read)
    }
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Bytes of its records.
    pub len: u32,
    /// Where it begins in its file.
    pub position: u64,
    /// Up to where the file was on disk by then.
    pub synced: u64,
    /// The clock of the core by then.
    pub hlc: Hlc,
    check: u64,
}

impl Frame {
    /// The header in front of these records, to be written at `position`.
    ///
    /// # Panics
    /// When the records are longer than 4 GiB.
    pub fn new(records: &[u8], position: u64, synced: u64, hlc: Hlc, salt: u64) -> Frame {
        let len = u32::try_from(records.len()).expect("a frame is no longer than 4 GiB");
        let mut frame = Frame { len, position, synced, hlc, check: 0 };
        frame.check = frame.sum(records, salt);
        frame
    }

    /// As it is written.
    pub fn to_bytes(self) -> [u8; FRAME_HEAD] {
        let mut head = [0; FRAME_HEAD];
        head[..4].copy_from_slice(&FRAME_MAGIC);
        head[4..8].copy_from_slice(&self.len.to_le_bytes());
        head[8..16].copy_from_slice(&self.check.to_le_bytes());
        head[16..24].copy_from_slice(&self.position.to_le_bytes());
        head[24..32].copy_from_slice(&self.synced.to_le_bytes());
        head[32..].copy_from_slice(&self.hlc.0.to_le_bytes());
        head
    }

    /// What was read at `position`, if it may be a frame's header: whether it is one its records tell.
    pub fn from_bytes(head: &[u8; FRAME_HEAD], position: u64) -> Option<Frame> {
        let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let frame = Frame {
            len: u32::from_le_bytes(head[4..8].try_into().expect("four bytes")),
            check: u64_at(8),
            position: u64_at(16),
            synced: u64_at(24),
            hlc: Hlc(u64_at(32)),
        };
        (head[..4] == FRAME_MAGIC && frame.position == position && frame.synced <= position).then_some(frame)
    }

    /// Whether these are its records, whole.
    pub fn covers(&self, records: &[u8], salt: u64) -> bool {
        records.len() == self.len as usize && self.sum(records, salt) == self.check
    }

    fn sum(&self, records: &[u8], salt: u64) -> u64 {
        let head = Frame { check: 0, ..*self }.to_bytes();
        xxh3_64_with_seed(records, xxh3_64_with_seed(&head, salt))
    }
}

/// Notes what a backend changes, once it is told to begin. Its memory is bounded by who keeps it: [`Journal::take`] after
/// each turn, and whenever [`Journal::keep_with`]'s function is called.
#[derive(Default)]
pub struct Journal {
    on: bool,
    records: Vec<u8>,
    spill: Option<Spill>,
}

/// Takes what was noted, in the middle of a turn.
type Spill = Box<dyn FnMut(&[u8])>;

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("on", &self.on).field("bytes", &self.records.len()).finish_non_exhaustive()
    }
}

impl Journal {
    /// From now on changes are noted. `spill` is given what was noted whenever that has become much, in the middle of a turn.
    pub fn keep_with(&mut self, spill: impl FnMut(&[u8]) + 'static) {
        self.on = true;
        self.spill = Some(Box::new(spill));
    }

    /// Nothing is noted from now on, and whoever kept it is let go.
    pub fn stop(&mut self) {
        *self = Journal::default();
    }

    /// Whether something was noted that nobody has taken.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Gives what was noted since the last time to `keep`, if anything was, and forgets it.
    pub fn take(&mut self, keep: impl FnOnce(&[u8])) {
        if !self.records.is_empty() {
            keep(&self.records);
            self.records.clear();
            self.records.shrink_to(MUCH);
        }
    }

    /// Notes a change.
    #[inline]
    pub fn note(&mut self, change: Change<'_>) {
        if self.on {
            change.write(&mut self.records);
            if self.records.len() >= MUCH {
                self.spill();
            }
        }
    }

    #[cold]
    fn spill(&mut self) {
        if let Some(mut spill) = self.spill.take() {
            self.take(&mut spill);
            self.spill = Some(spill);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// An owned change.
    #[derive(Clone, Debug)]
    enum Owned {
        Put(Vec<u8>, Vec<u8>, Meta),
        Meta(Vec<u8>, Meta),
        Patch(Vec<u8>, u32, Vec<u8>, Meta),
        Remove(Vec<u8>),
        Clear(u16),
        End(u64),
        After(u64),
    }

    impl Owned {
        fn lend(&self) -> Change<'_> {
            match self {
                Owned::Put(key, value, meta) => Change::Put { key, value, meta: *meta },
                Owned::Meta(key, meta) => Change::Meta { key, meta: *meta },
                Owned::Patch(key, at, bytes, meta) => Change::Patch { key, at: *at, bytes, meta: *meta },
                Owned::Remove(key) => Change::Remove { key },
                Owned::Clear(shard) => Change::Clear { shard: ShardId(*shard) },
                Owned::End(entries) => Change::End { entries: *entries },
                Owned::After(length) => Change::After { length: *length },
            }
        }
    }

    fn meta() -> impl Strategy<Value = Meta> {
        (any::<u64>(), any::<u16>(), prop_oneof![Just(0), any::<u64>()]).prop_map(|(hlc, node, expires_at)| Meta {
            version: Version { hlc: Hlc(hlc), node },
            expires_at,
            tombstone: false,
        })
    }

    fn change() -> impl Strategy<Value = Owned> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..40);
        prop_oneof![
            (bytes(), bytes(), meta()).prop_map(|(k, v, m)| Owned::Put(k, v, m)),
            (bytes(), meta()).prop_map(|(k, m)| Owned::Put(k, Vec::new(), Meta { tombstone: true, ..m })),
            (bytes(), meta()).prop_map(|(k, m)| Owned::Meta(k, m)),
            (bytes(), any::<u32>(), bytes(), meta()).prop_map(|(k, at, b, m)| Owned::Patch(k, at, b, m)),
            bytes().prop_map(Owned::Remove),
            any::<u16>().prop_map(Owned::Clear),
            any::<u64>().prop_map(Owned::End),
            any::<u64>().prop_map(Owned::After),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(changes in prop::collection::vec(change(), 0..20)) {
            let mut bytes = Vec::new();
            changes.iter().for_each(|change| change.lend().write(&mut bytes));
            let read: Result<Vec<_>, _> = Changes::new(&bytes).collect();
            let lent: Vec<_> = changes.iter().map(Owned::lend).collect();
            prop_assert_eq!(read.unwrap(), lent);
        }

        /// Whatever is there, reading ends, with an error or without, and never reads beyond it.
        #[test]
        fn nonsense_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0usize..200) {
            let _ = Changes::new(&bytes).last();
            let mut whole = Vec::new();
            Change::Put { key: b"key", value: &bytes, meta: Meta::default() }.write(&mut whole);
            let cut = cut.min(whole.len() - 1);
            let read: Result<Vec<_>, _> = Changes::new(&whole[..cut]).collect();
            prop_assert_eq!(read.is_err(), cut > 0);
        }

        /// No bit of a frame can be turned without notice, nor can it be taken for one elsewhere or of another file.
        #[test]
        fn a_frame_covers_itself(
            records in prop::collection::vec(any::<u8>(), 1..100), position: u32, synced: u16, bit: prop::sample::Index,
        ) {
            let position = u64::from(position) + u64::from(synced);
            let frame = Frame::new(&records, position, u64::from(synced), Hlc(77), 5);
            let head = frame.to_bytes();
            prop_assert_eq!(Frame::from_bytes(&head, position), Some(frame));
            prop_assert!(frame.covers(&records, 5) && !frame.covers(&records, 6));
            prop_assert_eq!(Frame::from_bytes(&head, position + 1), None);
            let mut bytes = [&head[..], &records].concat();
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let read = Frame::from_bytes(bytes[..FRAME_HEAD].try_into().unwrap(), position);
            prop_assert!(read.is_none_or(|read| !read.covers(&bytes[FRAME_HEAD..], 5)));
        }
    }

    /// The fuzz target log_reader made a tombstone of an entry that kept its value, which the store takes for a mistake of its own.
    #[test]
    fn a_tombstone_has_no_value() {
        let meta = Meta { tombstone: true, ..Meta::default() };
        for (change, good) in [
            (Change::Put { key: b"k", value: b"", meta }, true),
            (Change::Put { key: b"k", value: b"v", meta }, false),
            (Change::Meta { key: b"k", meta }, false),
            (Change::Patch { key: b"k", at: 0, bytes: b"", meta }, false),
        ] {
            let mut bytes = Vec::new();
            change.write(&mut bytes);
            let read = Changes::new(&bytes).next();
            assert_eq!(read.is_some_and(|read| read == Ok(change)), good, "{change:?}");
        }
    }

    #[test]
    fn a_journal_notes_nothing_until_it_is_kept_and_spills_what_is_much() {
        let mut journal = Journal::default();
        journal.note(Change::Remove { key: b"before" });
        assert!(journal.is_empty());
        let spilled = Rc::new(RefCell::new(Vec::new()));
        let to = spilled.clone();
        journal.keep_with(move |records| to.borrow_mut().push(records.len()));
        journal.note(Change::Remove { key: b"k" });
        let mut taken = Vec::new();
        journal.take(|records| taken.extend_from_slice(records));
        assert_eq!(Changes::new(&taken).collect::<Vec<_>>(), [Ok(Change::Remove { key: b"k" })]);
        journal.take(|_| panic!("there is nothing"));
        let value = vec![b'v'; 1 << 20];
        for _ in 0..5 {
            journal.note(Change::Put { key: b"k", value: &value, meta: Meta::default() });
        }
        let spilled = spilled.borrow();
        assert!(spilled.len() == 1 && spilled[0] >= MUCH && !journal.is_empty(), "{spilled:?}");
    }
}
