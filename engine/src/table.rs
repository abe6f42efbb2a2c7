//! The hash table of a shard: extendible hashing over buckets of one cache line.
//!
//! A directory, indexed by the bits of the hash behind the shard's, points to segments. A segment is 64 buckets; a bucket
//! is one cache line: seven slots and a tag of eight hash bits for each. A read touches the directory, one bucket and the
//! record.
//!
//! ```text
//!   hash   [ shard | directory ...  |      ...      | tag: 8 | bucket: 6..8 ]
//!
//!   directory            segment (up to 64 buckets)
//!   00 ──────────────▶   [ t t t t t t t n | r r r r r r r ]   t: tag of a slot, 0 = empty
//!   01 ──────────────▶   [ t t t t t t t n | r r r r r r r ]   r: owned record
//!   10 ─┬────────────▶   ...                                   n: entries that wanted this bucket or an earlier one
//!   11 ─┘                                                         and were placed behind it
//! ```
//!
//! **Growth has no long pause.** A full segment is split in two: 448 records are looked at, after a prefetch of all of
//! them. Only the directory is ever copied whole, and where hashes are spread it has one entry per several hundred records.
//! The first segment starts with 4 buckets and doubles, so that an empty node is small.
//!
//! **Hash tags in a table of all shards** are the exception: when most keys are in one shard, the directory is as fine everywhere
//! as that shard needs it, with as many times more entries as there are shards, 16 bytes each. 200 000 keys of one tag take 8 MB
//! of it with 256 shards, 100 000 with 2048 take 33 MB, and each doubling copies it in one step. Up to 2048 shards it may
//! become so large; with more, most of such keys go to the list below. Tables of one shard know nothing of this.
//!
//! **Order.** Segments cover ranges of hash space, so walking the directory and sorting inside a segment walks the table in
//! hash order. A position in hash space is therefore a cursor that growth does not disturb ([`Table::visit`]).
//!
//! Invariants: an entry lies in its home bucket or one of the next [`PROBES`]` - 1`, around the segment; `spilled` of a
//! bucket is exactly the number of entries whose probe passed it; tag 0 means an empty slot. Entries that no split could
//! separate (equal hashes in bulk, from somebody who knows the seed) go to a list, so that nobody can make the directory
//! explode. Segments never merge; [`Table::take`] and [`Table::take_range`] give back everything of all hashes, or of a range.
//!
//! References: Fagin et al., "Extendible Hashing" (1979); Folly's F14 for the spill count.

use std::ptr::NonNull;

use crate::hash::{KeyHash, Keyspace};
use crate::hlc::Version;
use crate::record::{Record, prefetch};

/// Slots of a bucket.
const SLOTS: usize = 7;
/// Buckets of a full-grown segment.
const BUCKETS: usize = 64;
/// Buckets of the first segment of a table.
const FIRST_BUCKETS: usize = 4;
/// Buckets that an entry may lie in.
const PROBES: usize = 3;
/// No place in the list of segments.
const NOWHERE: u32 = u32::MAX;
/// The directory doubles only while it has at most this many entries per segment; see the file's head.
const DIRECTORY_PER_SEGMENT: usize = 64;
/// Of a table that holds several shards it may have more, twice for each bit of the shard's up to so many: hash tags may put most
/// entries into one shard, whose part of the directory is the smaller the more shards there are. Six are enough for 2048 shards;
/// each one more would double what somebody who chooses the keys can make of the directory.
const SHARED_BITS: u32 = 6;

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x8080_8080_8080_8080;
/// The high bits of the seven tags.
const TAG_HIGHS: u64 = HIGHS >> 8;

#[derive(Debug, Default)]
#[repr(C, align(64))]
struct Bucket {
    /// Bytes 0 to 6: tags; byte 7: `spilled`.
    meta: u64,
    slots: [Option<Record>; SLOTS],
}

const _: () = assert!(size_of::<Bucket>() == 64);

impl Bucket {
    /// High bits of the tags that may equal `tag`; never misses one.
    #[inline]
    fn matches(&self, tag: u8) -> u64 {
        let x = self.meta ^ (ONES * u64::from(tag));
        x.wrapping_sub(ONES) & !x & TAG_HIGHS
    }

    #[inline(always)]
    fn find(&self, tag: u8, key: &[u8]) -> Option<(usize, &Record)> {
        let mut candidates = self.matches(tag);
        while candidates != 0 {
            let slot = (candidates.trailing_zeros() / 8) as usize;
            if let Some(record) = &self.slots[slot]
                && record.is_under(key)
            {
                return Some((slot, record));
            }
            candidates &= candidates - 1;
        }
        None
    }

    #[inline]
    fn free_slot(&self) -> Option<usize> {
        self.slots.iter().position(Option::is_none)
    }

    #[inline]
    fn spilled(&self) -> u8 {
        (self.meta >> 56) as u8
    }

    fn put(&mut self, slot: usize, tag: u8, record: Record) {
        self.meta |= u64::from(tag) << (8 * slot);
        self.slots[slot] = Some(record);
    }

    fn take(&mut self, slot: usize) -> Record {
        self.meta &= !(0xff << (8 * slot));
        self.slots[slot].take().expect("a found slot holds a record")
    }
}

/// Hash bits of the tag; zero is kept for empty slots.
#[inline]
fn tag(hash: KeyHash) -> u8 {
    ((hash.0 >> 8) as u8).max(1)
}

/// Where the bits of a hash that index a directory end. Of a directory with one entry the bits do not matter.
fn shift(skip: u32, depth: u32) -> u32 {
    (64 - skip - depth).min(63)
}

/// Owner of a run of buckets. They are reached through raw pointers only, so the directory's copies of the pointer stay
/// good until the run is freed.
#[derive(Debug)]
struct Segment {
    start: NonNull<Bucket>,
    /// Buckets; none when the place is vacant.
    len: u16,
    /// Records in them.
    records: u16,
    /// Bits of the hash, behind the table's, that all its entries share. Of a vacant place: the next vacant one.
    depth: u32,
}

// SAFETY: a segment owns its buckets alone, like a Box<[Bucket]>.
unsafe impl Send for Segment {}

impl Segment {
    fn new(buckets: usize, depth: u32) -> Segment {
        let run: Box<[Bucket]> = (0..buckets).map(|_| Bucket::default()).collect();
        let start = NonNull::from(Box::leak(run)).cast();
        Segment { start, len: buckets as u16, records: 0, depth }
    }

    #[inline]
    fn mask(&self) -> usize {
        self.len as usize - 1
    }

    fn buckets(&self) -> &[Bucket] {
        // SAFETY: `new` leaked a run of that length, freed only by `drop`; `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len as usize) }
    }

    fn buckets_mut(&mut self) -> &mut [Bucket] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len as usize) }
    }

    /// Places a record whose key is absent; gives it back when its buckets are full.
    #[inline]
    fn insert(&mut self, hash: KeyHash, record: Record) -> Result<(), Record> {
        let mask = self.mask();
        let home = hash.0 as usize & mask;
        let buckets = self.buckets_mut();
        for probe in 0..PROBES.min(mask + 1) {
            let at = (home + probe) & mask;
            let Some(slot) = buckets[at].free_slot() else { continue };
            buckets[at].put(slot, tag(hash), record);
            for passed in 0..probe {
                buckets[(home + passed) & mask].meta += 1 << 56;
            }
            self.records += 1;
            return Ok(());
        }
        Err(record)
    }

    fn records(&self) -> impl Iterator<Item = &Record> {
        self.buckets().iter().flat_map(|bucket| bucket.slots.iter().flatten())
    }

    /// Takes all records out, prefetched, for a rebuild.
    fn drain(&mut self) -> Vec<Record> {
        self.records().for_each(Record::prefetch);
        self.records = 0;
        self.buckets_mut().iter_mut().flat_map(|bucket| std::mem::take(bucket).slots.into_iter().flatten()).collect()
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let run = NonNull::slice_from_raw_parts(self.start, self.len as usize);
        // SAFETY: leaked by `new` with that length; the directory's copies are not used after their segment is gone.
        drop(unsafe { Box::from_raw(run.as_ptr()) });
    }
}

/// What the directory knows of a segment: enough that a read does not touch the segment's own description.
#[derive(Clone, Copy, Debug)]
struct Pointer {
    buckets: NonNull<Bucket>,
    mask: u32,
    segment: u32,
}

impl Pointer {
    /// The bucket where a hash belongs.
    #[inline]
    fn home(&self, hash: KeyHash) -> NonNull<Bucket> {
        // SAFETY: the index is masked to the segment's length.
        unsafe { self.buckets.add(hash.0 as usize & self.mask as usize) }
    }
}

// SAFETY: the pointers lead into `Table::segments`, which the table owns and which moves with it.
unsafe impl Send for Pointer {}

/// A hash table of owned records; see the file's head. What a read needs of it lies in its first cache line.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Table {
    /// Where the bits of a hash that index the directory end.
    shift: u32,
    depth: u32,
    /// As many entries as `depth` bits name, or none before the first insertion.
    directory: Vec<Pointer>,
    keyspace: Keyspace,
    /// Hash bits in front of the directory's: the shard's, or none for a table that holds all shards.
    skip: u32,
    /// The first vacant place in `segments`.
    vacant: u32,
    /// Lowest position in hash space that belongs to the table.
    base: KeyHash,
    segments: Vec<Segment>,
    /// Records that no split could separate.
    crowd: Vec<Record>,
    /// Buckets of all segments.
    buckets: usize,
    len: usize,
}

/// What a look at the home bucket of a key tells.
pub(crate) enum Look<'a> {
    Found(&'a Record),
    Absent,
    /// It may lie elsewhere: [`Table::get`] knows.
    Behind,
}

/// Where an entry was found.
enum Place {
    Slot { bucket: NonNull<Bucket>, slot: usize, home: usize, probe: usize, pointer: Pointer },
    Crowd(usize),
}

impl Table {
    /// An empty table for the hashes that share `skip` bits with `base`.
    pub(crate) fn new(keyspace: Keyspace, skip: u32, base: KeyHash) -> Table {
        Table {
            shift: shift(skip, 0),
            depth: 0,
            directory: Vec::new(),
            keyspace,
            skip,
            vacant: NOWHERE,
            base,
            segments: Vec::new(),
            crowd: Vec::new(),
            buckets: 0,
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of directory and segments, without the records.
    #[inline]
    pub(crate) fn memory_bytes(&self) -> usize {
        self.directory.capacity() * size_of::<Pointer>()
            + self.segments.capacity() * size_of::<Segment>()
            + self.buckets * size_of::<Bucket>()
            + self.crowd.capacity() * size_of::<Record>()
    }

    #[inline]
    fn directory_index(&self, hash: KeyHash) -> usize {
        (hash.0 >> self.shift) as usize & self.directory.len().wrapping_sub(1)
    }

    #[inline]
    fn locate(&self, hash: KeyHash, key: &[u8]) -> Option<Place> {
        let pointer = *self.directory.get(self.directory_index(hash))?;
        let (tag, home) = (tag(hash), hash.0 as usize & pointer.mask as usize);
        for probe in 0..PROBES.min(pointer.mask as usize + 1) {
            // SAFETY: the index is masked to the segment's length; `point_at` keeps pointers true to the segments, which
            // live as long as the borrow of `self`.
            let (bucket, found) = unsafe {
                let bucket = pointer.buckets.add((home + probe) & pointer.mask as usize);
                (bucket, bucket.as_ref())
            };
            if let Some((slot, _)) = found.find(tag, key) {
                return Some(Place::Slot { bucket, slot, home, probe, pointer });
            }
            if found.spilled() == 0 {
                break;
            }
        }
        if self.crowd.is_empty() {
            return None;
        }
        self.crowd.iter().position(|record| record.key() == key).map(Place::Crowd)
    }

    /// Brings the bucket of a hash closer, for a read or write soon.
    #[inline]
    pub(crate) fn prefetch_bucket(&self, hash: KeyHash) {
        if let Some(pointer) = self.directory.get(self.directory_index(hash)) {
            prefetch(pointer.home(hash).as_ptr());
        }
    }

    /// Brings the record that a hash probably has closer; reads its bucket, which should be close already.
    #[inline]
    pub(crate) fn prefetch_record(&self, hash: KeyHash) {
        let Some(pointer) = self.directory.get(self.directory_index(hash)) else { return };
        // SAFETY: as in `locate`.
        let bucket = unsafe { pointer.home(hash).as_ref() };
        let candidates = bucket.matches(tag(hash));
        if candidates != 0
            && let Some(record) = &bucket.slots[(candidates.trailing_zeros() / 8) as usize]
        {
            record.prefetch_value();
        }
    }

    /// The record of a key.
    #[inline]
    pub(crate) fn get(&self, hash: KeyHash, key: &[u8]) -> Option<&Record> {
        match self.look(hash, key) {
            Look::Found(record) => Some(record),
            Look::Absent => None,
            Look::Behind => self.get_behind(hash, key),
        }
    }

    /// The record of a key, if the bucket where it belongs tells.
    #[inline]
    pub(crate) fn look(&self, hash: KeyHash, key: &[u8]) -> Look<'_> {
        let Some(pointer) = self.directory.get(self.directory_index(hash)) else { return Look::Absent };
        // SAFETY: as in `locate`.
        let home = unsafe { pointer.home(hash).as_ref() };
        match home.find(tag(hash), key) {
            Some((_, record)) => Look::Found(record),
            None if home.spilled() == 0 && self.crowd.is_empty() => Look::Absent,
            None => Look::Behind,
        }
    }

    /// The record of a key that is not in its home bucket.
    #[cold]
    fn get_behind(&self, hash: KeyHash, key: &[u8]) -> Option<&Record> {
        match self.locate(hash, key)? {
            // SAFETY: `locate` found a record there, and `self` is borrowed.
            Place::Slot { bucket, slot, .. } => unsafe { bucket.as_ref().slots[slot].as_ref() },
            Place::Crowd(at) => Some(&self.crowd[at]),
        }
    }

    /// The record of a key, to be changed or replaced by one of the same key.
    #[inline]
    pub(crate) fn get_mut(&mut self, hash: KeyHash, key: &[u8]) -> Option<&mut Record> {
        match self.locate(hash, key)? {
            // SAFETY: `locate` found a record there, and `self` is borrowed mutably.
            Place::Slot { mut bucket, slot, .. } => unsafe { bucket.as_mut().slots[slot].as_mut() },
            Place::Crowd(at) => Some(&mut self.crowd[at]),
        }
    }

    /// Writes a value over one of the same length, of a record without expiry in its home bucket; the version it had. `None` when
    /// that is not how the key is stored: then nothing has changed.
    #[inline]
    pub(crate) fn overwrite(&mut self, hash: KeyHash, key: &[u8], value: &[u8], version: Version) -> Option<Version> {
        let pointer = self.directory.get(self.directory_index(hash))?;
        let mut home = pointer.home(hash);
        // SAFETY: as in `locate`, and `self` is borrowed mutably.
        let home = unsafe { home.as_mut() };
        let (slot, _) = home.find(tag(hash), key)?;
        home.slots[slot].as_mut()?.overwrite_plain(value, version)
    }

    /// Calls `look` with the records of exactly that hash.
    pub(crate) fn by_hash(&self, hash: KeyHash, look: &mut dyn FnMut(&Record)) {
        let Some(pointer) = self.directory.get(self.directory_index(hash)) else { return };
        let buckets = self.segments[pointer.segment as usize].buckets();
        let (mask, home, tag) = (pointer.mask as usize, hash.0 as usize & pointer.mask as usize, tag(hash));
        let tagged = |bucket: &Bucket, slot: usize| (bucket.meta >> (8 * slot)) as u8 == tag;
        let probed = (0..PROBES.min(mask + 1)).flat_map(|probe| {
            let bucket = &buckets[(home + probe) & mask];
            (0..SLOTS).filter(move |&slot| tagged(bucket, slot)).filter_map(|slot| bucket.slots[slot].as_ref())
        });
        probed.chain(&self.crowd).filter(|record| self.keyspace.locate(record.key()) == hash).for_each(look);
    }

    /// Takes the record of a key out.
    pub(crate) fn remove(&mut self, hash: KeyHash, key: &[u8]) -> Option<Record> {
        let place = self.locate(hash, key)?;
        self.len -= 1;
        Some(match place {
            Place::Slot { slot, home, probe, pointer, .. } => {
                let segment = &mut self.segments[pointer.segment as usize];
                let mask = segment.mask();
                segment.records -= 1;
                let buckets = segment.buckets_mut();
                for passed in 0..probe {
                    buckets[(home + passed) & mask].meta -= 1 << 56;
                }
                buckets[(home + probe) & mask].take(slot)
            }
            Place::Crowd(at) => self.crowd.swap_remove(at),
        })
    }

    /// Adds a record whose key is not in the table.
    pub(crate) fn insert(&mut self, hash: KeyHash, mut record: Record) {
        self.len += 1;
        if self.directory.is_empty() {
            self.segments.push(Segment::new(FIRST_BUCKETS, 0));
            self.buckets = FIRST_BUCKETS;
            self.directory.push(Pointer { buckets: NonNull::dangling(), mask: 0, segment: 0 });
            self.point(0..1);
        }
        loop {
            let index = self.directory[self.directory_index(hash)].segment;
            match self.segments[index as usize].insert(hash, record) {
                Ok(()) => return,
                Err(back) => record = back,
            }
            if !self.grow(hash) {
                self.crowd.push(record);
                return;
            }
        }
    }

    /// Makes room in the segment of `hash`; false when that would make the directory explode.
    #[cold]
    fn grow(&mut self, hash: KeyHash) -> bool {
        let index = self.directory[self.directory_index(hash)].segment;
        let segment = &mut self.segments[index as usize];
        let (depth, buckets) = (segment.depth, segment.len as usize);
        if buckets < BUCKETS {
            let mut records = segment.drain();
            records.append(&mut self.crowd);
            *segment = Segment::new(buckets * 2, depth);
            self.buckets += buckets;
            let range = self.entries_of(hash);
            self.point(range);
            self.replant(records);
            return true;
        }
        if depth == self.depth {
            let entries = self.directory.len() * 2;
            let per_segment = DIRECTORY_PER_SEGMENT << (self.keyspace.shards.bits() - self.skip).min(SHARED_BITS);
            if entries > per_segment * (self.segments.len() + 1) || self.skip + depth >= 40 {
                return false;
            }
            self.directory = self.directory.iter().flat_map(|&pointer| [pointer, pointer]).collect();
            self.depth += 1;
            self.shift = shift(self.skip, self.depth);
        }
        let range = self.entries_of(hash);
        let mut records = self.segments[index as usize].drain();
        records.append(&mut self.crowd);
        self.segments[index as usize] = Segment::new(BUCKETS, depth + 1);
        let sibling = self.place(Segment::new(BUCKETS, depth + 1));
        // The upper half of the entries that led to the segment lead to its sibling from now on.
        let middle = range.start + range.len() / 2;
        self.directory[middle..range.end].iter_mut().for_each(|pointer| pointer.segment = sibling);
        self.point(range.start..middle);
        self.point(middle..range.end);
        self.replant(records);
        true
    }

    /// Adds a segment; where it is.
    fn place(&mut self, segment: Segment) -> u32 {
        self.buckets += usize::from(segment.len);
        if self.vacant == NOWHERE {
            self.segments.push(segment);
            return self.segments.len() as u32 - 1;
        }
        let place = self.vacant;
        self.vacant = self.segments[place as usize].depth;
        self.segments[place as usize] = segment;
        place
    }

    /// The directory's entries that lead to the segment of `hash`: neighbours, starting at a multiple of their number.
    fn entries_of(&self, hash: KeyHash) -> std::ops::Range<usize> {
        let entry = self.directory_index(hash);
        let segment = &self.segments[self.directory[entry].segment as usize];
        let span = 1 << (self.depth - segment.depth);
        let start = entry & !(span - 1);
        start..start + span
    }

    /// Makes the entries, which all name one segment, point to where it is.
    fn point(&mut self, entries: std::ops::Range<usize>) {
        for pointer in &mut self.directory[entries] {
            let segment = &self.segments[pointer.segment as usize];
            pointer.buckets = segment.start;
            pointer.mask = u32::from(segment.len) - 1;
        }
    }

    /// Puts back what [`Segment::drain`] took out; the records count already.
    fn replant(&mut self, records: Vec<Record>) {
        for record in records {
            let hash = self.keyspace.locate(record.key());
            let index = self.directory[self.directory_index(hash)].segment;
            if let Err(record) = self.segments[index as usize].insert(hash, record) {
                // Another order filled a probe run that was not full before: rare, and mended by the next growth.
                self.crowd.push(record);
            }
        }
    }

    /// Calls `look` with entries in hash order, from position `from` on: at least `limit` of them unless the end is
    /// reached, more only to keep equal hashes together. Returns the position to go on from, `None` at the end.
    pub(crate) fn visit(&self, from: KeyHash, limit: usize, look: &mut dyn FnMut(KeyHash, &Record)) -> Option<KeyHash> {
        let mut seen = 0;
        let mut from = from.max(self.base);
        let mut found = Vec::new();
        while let Some(pointer) = self.directory.get(self.directory_index(from)) {
            let segment = &self.segments[pointer.segment as usize];
            // The segment's range of hash space: `depth` bits behind the table's own are fixed.
            let span = u64::MAX.checked_shr(self.skip + segment.depth).unwrap_or(0);
            let last = KeyHash(from.0 | span);
            found.clear();
            segment.records().for_each(Record::prefetch);
            for record in segment.records().chain(&self.crowd) {
                let hash = self.keyspace.locate(record.key());
                if (from..=last).contains(&hash) {
                    found.push((hash, record));
                }
            }
            found.sort_unstable_by_key(|&(hash, _)| hash);
            let mut previous = None;
            for &(hash, record) in &found {
                if seen >= limit && previous != Some(hash) {
                    return Some(hash);
                }
                look(hash, record);
                seen += 1;
                previous = Some(hash);
            }
            let end = KeyHash(self.base.0 | u64::MAX.checked_shr(self.skip).unwrap_or(0));
            if last >= end {
                return None;
            }
            from = KeyHash(last.0 + 1);
            if seen >= limit {
                return Some(from);
            }
        }
        None
    }
    /// Empties the table and gives back what it held, to be freed by [`Table::dismantle`].
    pub(crate) fn take(&mut self) -> Table {
        let mut old = std::mem::replace(self, Table::new(self.keyspace, self.skip, self.base));
        // Nothing is found in it any more, so that its segments may go one by one.
        old.directory = Vec::new();
        old
    }

    /// Takes out the entries whose hashes share the first `bits` bits with `first`, which are more than the table's own, and gives them
    /// back, to be freed by [`Table::dismantle`]. Segments that hold nothing else are taken as they are, without a look at
    /// their records; at most one is shared with other hashes, and its records are sorted out, as are those that no split could separate.
    pub(crate) fn take_range(&mut self, first: KeyHash, bits: u32) -> Table {
        let mut old = Table::new(self.keyspace, self.skip, self.base);
        let Some(pointer) = self.directory.get(self.directory_index(first)) else { return old };
        let (keyspace, depth) = (self.keyspace, bits - self.skip);
        let hashes = first..=KeyHash(first.0 | u64::MAX.checked_shr(bits).unwrap_or(0));
        let is_inside = |record: &mut Record| hashes.contains(&keyspace.locate(record.key()));
        old.crowd.extend(self.crowd.extract_if(.., is_inside));
        if self.segments[pointer.segment as usize].depth < depth {
            let mut records = self.segments[pointer.segment as usize].drain();
            old.crowd.extend(records.extract_if(.., is_inside));
            self.replant(records);
            self.len -= old.crowd.len();
            return old;
        }
        self.len -= old.crowd.len();
        let span = 1 << (self.depth - depth);
        let start = self.directory_index(first) & !(span - 1);
        let mut moved = NOWHERE;
        for entry in start..start + span {
            let place = self.directory[entry].segment;
            if place == moved {
                continue;
            }
            moved = place;
            let vacated = Segment::new(0, self.vacant);
            self.vacant = place;
            let segment = std::mem::replace(&mut self.segments[place as usize], vacated);
            self.len -= usize::from(segment.records);
            self.buckets -= usize::from(segment.len);
            old.buckets += usize::from(segment.len);
            old.segments.push(segment);
        }
        let fresh = self.place(Segment::new(FIRST_BUCKETS, depth));
        self.directory[start..start + span].iter_mut().for_each(|pointer| pointer.segment = fresh);
        self.point(start..start + span);
        old
    }

    /// Frees a part of what [`Table::take`] gave back, at most a segment: the number and the bytes of its records. `None` when
    /// nothing is left.
    pub(crate) fn dismantle(&mut self) -> Option<(usize, usize)> {
        let Some(segment) = self.segments.pop() else {
            let crowd = self.crowd.drain(self.crowd.len().saturating_sub(BUCKETS * SLOTS)..);
            return (crowd.len() > 0)
                .then(|| crowd.fold((0, 0), |(n, bytes), record| (n + 1, bytes + record.footprint())));
        };
        self.buckets -= segment.len as usize;
        segment.records().for_each(Record::prefetch);
        let (records, bytes) = segment.records().fold((0, 0), |(n, bytes), record| (n + 1, bytes + record.footprint()));
        Some((records, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Meta;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn record(key: &[u8], value: &[u8]) -> Record {
        Record::new(key, value, Meta::default())
    }

    fn table() -> (Keyspace, Table) {
        let keyspace = Keyspace::default();
        (keyspace, Table::new(keyspace, 0, KeyHash(0)))
    }

    impl Table {
        /// Checks what the file's head promises.
        fn invariants(&self) {
            let mut seen = self.crowd.len();
            assert!(self.directory.is_empty() || self.directory.len() == 1 << self.depth);
            for (index, segment) in self.segments.iter().enumerate().filter(|(_, segment)| segment.len > 0) {
                assert_eq!(usize::from(segment.records), segment.records().count());
                let entries = || self.directory.iter().enumerate().filter(|(_, p)| p.segment == index as u32);
                let range = entries().next().unwrap().0..entries().next_back().unwrap().0 + 1;
                assert_eq!((range.len(), entries().count()), (1 << (self.depth - segment.depth), range.len()));
                let mut spilled = vec![0u64; segment.len as usize];
                for (at, bucket) in segment.buckets().iter().enumerate() {
                    for (slot, record) in bucket.slots.iter().enumerate() {
                        let found = (bucket.meta >> (8 * slot)) as u8;
                        let Some(record) = record else {
                            assert_eq!(found, 0, "an empty slot has a tag");
                            continue;
                        };
                        seen += 1;
                        let hash = self.keyspace.locate(record.key());
                        assert_eq!(found, tag(hash));
                        assert!(range.contains(&self.directory_index(hash)));
                        let home = hash.0 as usize & segment.mask();
                        let probe = at.wrapping_sub(home) & segment.mask();
                        assert!(probe < PROBES);
                        (0..probe).for_each(|p| spilled[(home + p) & segment.mask()] += 1);
                    }
                }
                for (bucket, spilled) in segment.buckets().iter().zip(spilled) {
                    assert_eq!(u64::from(bucket.spilled()), spilled);
                }
            }
            assert_eq!(self.buckets, self.segments.iter().map(|s| s.len as usize).sum::<usize>());
            assert_eq!(seen, self.len);
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Put(u16, u8),
        Remove(u16),
        Get(u16),
        /// Takes out the hashes that share so many bits with that key's.
        Take(u16, u32),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let key = 0..2000u16;
        proptest::collection::vec(
            prop_oneof![
                4 => (key.clone(), any::<u8>()).prop_map(|(k, v)| Step::Put(k, v)),
                2 => key.clone().prop_map(Step::Remove),
                1 => key.clone().prop_map(Step::Get),
                1 => (key, 2..12u32).prop_map(|(k, bits)| Step::Take(k, bits)),
            ],
            1..3000,
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 40 }))]

        /// The table does what an ordered map does.
        #[test]
        fn a_table_is_a_map(steps in steps()) {
            let (space, mut table) = table();
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Put(k, v) => {
                        let (key, value) = (k.to_le_bytes(), vec![v; usize::from(v % 5)]);
                        let hash = space.locate(&key);
                        match table.get_mut(hash, &key) {
                            Some(old) => *old = record(&key, &value),
                            None => table.insert(hash, record(&key, &value)),
                        }
                        model.insert(k, value);
                    }
                    Step::Remove(k) => {
                        let key = k.to_le_bytes();
                        let removed = table.remove(space.locate(&key), &key);
                        prop_assert_eq!(removed.is_some(), model.remove(&k).is_some());
                    }
                    Step::Take(k, bits) => {
                        let first = KeyHash(space.locate(&k.to_le_bytes()).0 & !(u64::MAX >> bits));
                        let is_taken = |k: &u16| space.locate(&k.to_le_bytes()).0 >> (64 - bits) == first.0 >> (64 - bits);
                        let taken = model.keys().filter(|k| is_taken(k)).count();
                        model.retain(|k, _| !is_taken(k));
                        let mut old = table.take_range(first, bits);
                        let freed: usize = std::iter::from_fn(|| old.dismantle()).map(|(records, _)| records).sum();
                        prop_assert_eq!((freed, old.buckets), (taken, 0));
                        table.invariants();
                    }
                    Step::Get(k) => {
                        let key = k.to_le_bytes();
                        let found = table.get(space.locate(&key), &key).map(|r| r.entry().value.to_vec());
                        prop_assert_eq!(found.as_ref(), model.get(&k));
                    }
                }
            }
            table.invariants();
            prop_assert_eq!(table.len(), model.len());
            for (k, value) in &model {
                let key = k.to_le_bytes();
                prop_assert_eq!(table.get(space.locate(&key), &key).unwrap().entry().value, &value[..]);
            }
        }
    }

    /// A cursor is a position in hash space: what is there all along is seen exactly once, however the table grows
    /// between two pages.
    #[test]
    fn a_walk_survives_growth_between_pages() {
        let (space, mut table) = table();
        let put = |table: &mut Table, n: u32| {
            let key = n.to_le_bytes();
            table.insert(space.locate(&key), record(&key, b""));
        };
        (0..500).for_each(|n| put(&mut table, n));
        let (mut seen, mut next, mut extra, mut last) = (BTreeMap::new(), Some(KeyHash(0)), 500, None);
        while let Some(from) = next {
            next = table.visit(from, 7, &mut |hash, record| {
                assert!(last < Some(hash), "in order");
                last = Some(hash);
                *seen.entry(u32::from_le_bytes(record.key().try_into().unwrap())).or_insert(0) += 1;
            });
            (0..40).for_each(|_| {
                put(&mut table, extra);
                extra += 1;
            });
        }
        table.invariants();
        assert!((0..500).all(|n| seen.get(&n) == Some(&1)));
        assert!(seen.values().all(|&times| times == 1));
    }

    /// A hundred thousand entries stay within the slots that one would expect of a healthy load.
    #[test]
    #[cfg_attr(miri, ignore)]
    fn growth_keeps_a_healthy_load() {
        let (space, mut table) = table();
        for n in 0..100_000u32 {
            let key = n.to_le_bytes();
            table.insert(space.locate(&key), record(&key, b""));
        }
        table.invariants();
        let per_entry = table.memory_bytes() / table.len();
        assert!(per_entry < 24, "{per_entry} bytes of table per entry");
        assert!(table.crowd.len() < 10);
    }

    /// Hash tags put most entries of a table of all shards into one of them: with up to 2048 shards they are found through the
    /// directory all the same, for what it takes.
    #[test]
    #[cfg_attr(miri, ignore)]
    fn a_shard_that_has_most_entries_is_no_list() {
        for (bits, most) in [(5, 23), (8, 54), (10, 159), (11, 299)] {
            let space = Keyspace { shards: crate::hash::ShardCount::new(1 << bits).unwrap(), ..Keyspace::default() };
            let mut table = Table::new(space, 0, KeyHash(0));
            for n in 0..30_000u32 {
                let key = [b"{tag}", &n.to_le_bytes()[..]].concat();
                table.insert(space.locate(&key), record(&key, b""));
            }
            table.invariants();
            assert!(table.crowd.len() < 10, "{} of {} shards", table.crowd.len(), 1 << bits);
            let per_entry = table.memory_bytes() / table.len();
            assert!(per_entry <= most, "{per_entry} bytes of table per entry with {} shards", 1 << bits);
        }
    }

    /// Keys that share everything but the key cannot make the directory explode.
    #[test]
    fn inseparable_entries_are_kept_and_found() {
        let (_, mut table) = table();
        let hash = KeyHash(0x1234);
        for n in 0..100u32 {
            // Placed by a hash that is not theirs, as an attacker with the seed could arrange.
            table.insert(hash, record(&n.to_le_bytes(), b"v"));
        }
        assert!(table.directory.len() <= 4096, "{}", table.directory.len());
        assert_eq!(table.len(), 100);
    }
}
