//! Where entries are stored: one trait, a registry by name, and the backends in memory.
//!
//! A backend stores entries and finds them; it knows nothing of clocks, expiry, versions or limits: that is the
//! [`crate::store::Store`]'s. There is one instance per core and it is never shared, so it needs no lock.
//!
//! | name | here |
//! |---|---|
//! | `memory-sharded` (default) | a table per shard: a shard is dropped or walked without touching others |
//! | `memory` | one table per core: the simplest |
//! | `file` | as `memory-sharded`, and every change is noted for the log on disk ([`crate::journal`]) |
//!
//! An embedder adds his own with [`Registry::register`] and runs [`conformance::run`] on it.

pub mod conformance;

use std::ops::Range;

use crate::hash::{KeyHash, Keyspace, ShardId};
use crate::hlc::Version;
use crate::journal::{Change, Journal};
use crate::record::{Entry, Meta, Record};
use crate::table::Table;

/// A backend could not do what it was asked; its state is as before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("storage backend: {0}")]
pub struct BackendError(pub String);

/// What a backend is made for.
#[derive(Clone, Debug)]
pub struct BackendConfig {
    /// How keys map to shards.
    pub keyspace: Keyspace,
    /// The shards of this core; others are never asked for.
    pub owned: Range<u16>,
}

/// What an entry was that is replaced or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Old {
    /// Its description.
    pub meta: Meta,
    /// Length of its value.
    pub value_len: usize,
}

/// A part of a value that is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Length of the whole value afterwards.
    pub whole: usize,
    /// Where the part begins.
    pub from: usize,
    /// Where it ends: at `whole`, if the value becomes longer.
    pub to: usize,
}

/// Entry storage of one core. Object safe.
///
/// `hash` is always [`Keyspace::locate`] of `key`, and `shard` its shard; callers guarantee it.
pub trait Backend {
    /// The entry under `key`.
    fn get(&mut self, shard: ShardId, hash: KeyHash, key: &[u8]) -> Option<Entry<'_>>;

    /// Writes the entry under `key`, replacing what was there; what that was.
    ///
    /// # Errors
    /// When the medium fails; nothing was changed.
    fn put(
        &mut self,
        shard: ShardId,
        hash: KeyHash,
        key: &[u8],
        value: &[u8],
        meta: Meta,
    ) -> Result<Option<Old>, BackendError>;

    /// Changes the description of an existing entry; what it was, `None` when there is no entry.
    ///
    /// # Errors
    /// As [`Backend::put`].
    fn set_meta(&mut self, shard: ShardId, hash: KeyHash, key: &[u8], meta: Meta)
    -> Result<Option<Meta>, BackendError>;

    /// Changes a part of an existing value, which becomes longer for it if need be, with zeros behind what was there, and the
    /// entry's description; what that was. `None` when there is no such entry, its value is longer than that, or the backend cannot;
    /// then `change` was not called, and the caller reads and puts.
    fn edit(
        &mut self,
        shard: ShardId,
        hash: KeyHash,
        key: &[u8],
        part: Part,
        meta: Meta,
        change: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Meta>;

    /// Removes the entry under `key`; what it was.
    ///
    /// # Errors
    /// As [`Backend::put`].
    fn remove(&mut self, shard: ShardId, hash: KeyHash, key: &[u8]) -> Result<Option<Old>, BackendError>;

    /// Calls `look` with the shard's entries in hash order from position `from` on: at least `limit` unless the shard
    /// ends, more only to keep equal hashes together. The position to go on from; `None` at the shard's end.
    fn visit(
        &mut self,
        shard: ShardId,
        from: KeyHash,
        limit: usize,
        look: &mut dyn FnMut(KeyHash, Entry<'_>),
    ) -> Option<KeyHash>;

    /// Calls `look` with the entries under exactly that hash: normally one, more when keys collide.
    fn by_hash(&mut self, shard: ShardId, hash: KeyHash, look: &mut dyn FnMut(Entry<'_>)) {
        self.visit(shard, hash, 1, &mut |found, entry| {
            if found == hash {
                look(entry);
            }
        });
    }

    /// A hint that the entry of that hash is wanted soon: bring closer where it would be found. Misses of the cache that are
    /// begun for many keys at once overlap.
    fn prefetch_place(&self, _shard: ShardId, _hash: KeyHash) {}

    /// The second half of the hint, a while after [`Backend::prefetch_place`]: bring closer the entry itself.
    fn prefetch_entry(&self, _shard: ShardId, _hash: KeyHash) {}

    /// Number of entries, tombstones included.
    fn len(&self) -> usize;

    /// Whether there is no entry.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory in use, allocation rounding included. Called for each write: must be cheap.
    fn memory_bytes(&self) -> usize;

    /// Drops all entries of a shard: from now on none is found. Their memory may be given back later, by [`Backend::reclaim`], and
    /// should be where there may be many: the core does nothing else meanwhile.
    ///
    /// # Errors
    /// As [`Backend::put`].
    fn clear(&mut self, shard: ShardId) -> Result<(), BackendError>;

    /// Drops the entries of all shards, if there is a cheaper way than [`Backend::clear`] for each; whether there is. If not nothing
    /// is changed.
    ///
    /// # Errors
    /// As [`Backend::put`].
    fn clear_all(&mut self) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// Gives back memory of about that many entries that are gone already; whether there is more.
    fn reclaim(&mut self, _entries: usize) -> bool {
        false
    }

    /// Where the backend notes its changes, if it is one to be kept on disk: the node reads it from there when it starts, tells the
    /// journal to begin, and empties it each turn.
    fn journal(&mut self) -> Option<&mut Journal> {
        None
    }

    /// Moves the tables out if this is one of the backends in memory, which the store then calls without indirection.
    fn take_in_memory(&mut self) -> Option<InMemory> {
        None
    }
}

/// A backend as the store holds it: the usual ones directly, so that the compiler sees through a read or write.
pub(crate) enum Chosen {
    InMemory(InMemory),
    Other(Box<dyn Backend>),
}

impl Chosen {
    pub(crate) fn new(mut backend: Box<dyn Backend>) -> Chosen {
        match backend.take_in_memory() {
            Some(tables) => Chosen::InMemory(tables),
            None => Chosen::Other(backend),
        }
    }
}

macro_rules! either {
    ($self:ident, $backend:ident => $call:expr) => {
        match $self {
            Chosen::InMemory($backend) => $call,
            Chosen::Other($backend) => $call,
        }
    };
}

impl Backend for Chosen {
    #[inline]
    fn get(&mut self, shard: ShardId, hash: KeyHash, key: &[u8]) -> Option<Entry<'_>> {
        either!(self, backend => backend.get(shard, hash, key))
    }

    #[inline]
    fn put(
        &mut self,
        shard: ShardId,
        hash: KeyHash,
        key: &[u8],
        value: &[u8],
        meta: Meta,
    ) -> Result<Option<Old>, BackendError> {
        either!(self, backend => backend.put(shard, hash, key, value, meta))
    }

    fn set_meta(
        &mut self,
        shard: ShardId,
        hash: KeyHash,
        key: &[u8],
        meta: Meta,
    ) -> Result<Option<Meta>, BackendError> {
        either!(self, backend => backend.set_meta(shard, hash, key, meta))
    }

    fn edit(
        &mut self,
        shard: ShardId,
        hash: KeyHash,
        key: &[u8],
        part: Part,
        meta: Meta,
        change: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Meta> {
        either!(self, backend => backend.edit(shard, hash, key, part, meta, change))
    }

    fn remove(&mut self, shard: ShardId, hash: KeyHash, key: &[u8]) -> Result<Option<Old>, BackendError> {
        either!(self, backend => backend.remove(shard, hash, key))
    }

    fn visit(
        &mut self,
        shard: ShardId,
        from: KeyHash,
        limit: usize,
        look: &mut dyn FnMut(KeyHash, Entry<'_>),
    ) -> Option<KeyHash> {
        either!(self, backend => backend.visit(shard, from, limit, look))
    }

    fn by_hash(&mut self, shard: ShardId, hash: KeyHash, look: &mut dyn FnMut(Entry<'_>)) {
        either!(self, backend => backend.by_hash(shard, hash, look))
    }

    #[inline]
    fn prefetch_place(&self, shard: ShardId, hash: KeyHash) {
        either!(self, backend => backend.prefetch_place(shard, hash))
    }

    #[inline]
    fn prefetch_entry(&self, shard: ShardId, hash: KeyHash) {
        either!(self, backend => backend.prefetch_entry(shard, hash))
    }

    fn len(&self) -> usize {
        either!(self, backend => backend.len())
    }

    #[inline]
    fn memory_bytes(&self) -> usize {
        either!(self, backend => backend.memory_bytes())
    }

    fn clear(&mut self, shard: ShardId) -> Result<(), BackendError> {
        either!(self, backend => backend.clear(shard))
    }

    fn clear_all(&mut self) -> Result<bool, BackendError> {
        either!(self, backend => backend.clear_all())
    }

    fn reclaim(&mut self, entries: usize) -> bool {
        either!(self, backend => backend.reclaim(entries))
    }

    fn journal(&mut self) -> Option<&mut Journal> {
        either!(self, backend => backend.journal())
    }
}

/// Makes a backend; called once on each core.
pub type MakeBackend = fn(&BackendConfig) -> Result<Box<dyn Backend>, BackendError>;

/// Backends by name.
#[derive(Clone, Debug)]
pub struct Registry {
    known: Vec<(String, MakeBackend)>,
}

/// Name of the default backend.
pub const DEFAULT_BACKEND: &str = "memory-sharded";

/// Name of the backend in memory that is kept on disk.
pub const FILE_BACKEND: &str = "file";

impl Default for Registry {
    fn default() -> Registry {
        let mut registry = Registry { known: Vec::new() };
        registry.register(DEFAULT_BACKEND, |config| Ok(Box::new(InMemory::sharded(config))));
        registry.register("memory", |config| Ok(Box::new(InMemory::single(config))));
        registry.register(FILE_BACKEND, |config| Ok(Box::new(InMemory::journaled(config))));
        registry
    }
}

impl Registry {
    /// Adds a backend, replacing one of the same name.
    pub fn register(&mut self, name: &str, make: MakeBackend) {
        self.known.retain(|(known, _)| known != name);
        self.known.push((name.to_owned(), make));
    }

    /// The names, in order of registration.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.known.iter().map(|(name, _)| name.as_str())
    }

    /// Makes the backend of that name.
    ///
    /// # Errors
    /// When the name is unknown (the error lists those that are), or the backend cannot start.
    pub fn make(&self, name: &str, config: &BackendConfig) -> Result<Box<dyn Backend>, BackendError> {
        match self.known.iter().find(|(known, _)| known == name) {
            Some((_, make)) => make(config),
            None => {
                let names: Vec<_> = self.names().collect();
                Err(BackendError(format!("'{name}' is unknown; there are {}", names.join(", "))))
            }
        }
    }
}

/// `memory-sharded`, `memory` and `file`: tables of owned records.
#[derive(Debug)]
pub struct InMemory {
    keyspace: Keyspace,
    /// One per owned shard, or one for all.
    tables: Vec<Table>,
    /// Bits of a hash that name its table, and the table that comes first.
    bits: u32,
    first: usize,
    /// Cleared tables that are being freed, segment by segment. They still count as memory in use.
    dropping: Vec<Table>,
    records_bytes: usize,
    tables_bytes: usize,
    journal: Option<Box<Journal>>,
}

impl InMemory {
    fn journaled(config: &BackendConfig) -> InMemory {
        InMemory { journal: Some(Box::default()), ..InMemory::sharded(config) }
    }

    fn sharded(config: &BackendConfig) -> InMemory {
        let space = config.keyspace;
        let table = |shard| Table::new(space, space.shards.bits(), space.first_hash(ShardId(shard)));
        let tables = config.owned.clone().map(table).collect();
        InMemory::new(space, tables, space.shards.bits(), usize::from(config.owned.start))
    }

    fn single(config: &BackendConfig) -> InMemory {
        InMemory::new(config.keyspace, vec![Table::new(config.keyspace, 0, KeyHash(0))], 0, 0)
    }

    fn new(keyspace: Keyspace, tables: Vec<Table>, bits: u32, first: usize) -> InMemory {
        let tables_bytes = tables.iter().map(Table::memory_bytes).sum();
        let dropping = Vec::new();
        InMemory { keyspace, tables, bits, first, dropping, records_bytes: 0, tables_bytes, journal: None }
    }

    /// The number of the table that has a hash; beyond all tables for a shard of another core.
    #[inline]
    fn index(&self, hash: KeyHash) -> usize {
        // Shifted in two steps: no bits would shift by 64.
        (((hash.0 >> 1) >> (63 - self.bits)) as usize).wrapping_sub(self.first)
    }

    /// The table that has a hash.
    #[inline]
    pub(crate) fn table_of(&self, hash: KeyHash) -> &Table {
        &self.tables[self.index(hash)]
    }

    /// See [`Table::overwrite`].
    #[inline]
    pub(crate) fn overwrite(&mut self, hash: KeyHash, key: &[u8], value: &[u8], version: Version) -> Option<Version> {
        let old = self.table(hash).overwrite(hash, key, value, version)?;
        self.note(|| Change::Put { key, value, meta: Meta { version, expires_at: 0, tombstone: false } });
        Some(old)
    }

    /// Notes a change that was made, where changes are noted.
    #[inline]
    fn note<'a>(&mut self, change: impl FnOnce() -> Change<'a>) {
        if let Some(journal) = &mut self.journal {
            journal.note(change());
        }
    }

    /// Begins to free what is taken out of the table that has a hash; until then it counts as memory in use.
    fn drop_of(&mut self, hash: KeyHash, take: impl FnOnce(&mut Table) -> Table) {
        let table = self.table(hash);
        let before = table.memory_bytes();
        let mut old = vec![take(table)];
        if table.len() == 0 {
            // A directory without entries, and what else emptying leaves behind.
            old.push(table.take());
        }
        old.retain(|old| old.memory_bytes() > 0);
        let after = table.memory_bytes() + old.iter().map(Table::memory_bytes).sum::<usize>();
        self.tables_bytes = self.tables_bytes + after - before;
        self.dropping.append(&mut old);
    }

    #[inline]
    fn table(&mut self, hash: KeyHash) -> &mut Table {
        let at = self.index(hash);
        &mut self.tables[at]
    }
}

fn old(record: &Record) -> Old {
    let entry = record.entry();
    Old { meta: entry.meta(), value_len: entry.value.len() }
}

impl Backend for InMemory {
    fn take_in_memory(&mut self) -> Option<InMemory> {
        let (tables, dropping) = (std::mem::take(&mut self.tables), std::mem::take(&mut self.dropping));
        Some(InMemory { tables, dropping, journal: self.journal.take(), ..*self })
    }

    #[inline]
    fn get(&mut self, _: ShardId, hash: KeyHash, key: &[u8]) -> Option<Entry<'_>> {
        self.table(hash).get(hash, key).map(Record::entry)
    }

    #[inline]
    fn put(
        &mut self,
        _: ShardId,
        hash: KeyHash,
        key: &[u8],
        value: &[u8],
        meta: Meta,
    ) -> Result<Option<Old>, BackendError> {
        self.note(|| Change::Put { key, value, meta });
        let table = self.table(hash);
        if let Some(record) = table.get_mut(hash, key) {
            let before = old(record);
            if !record.overwrite(value, meta) {
                let new = Record::new(key, value, meta);
                let grown = new.footprint();
                let shrunk = record.footprint();
                *record = new;
                self.records_bytes = self.records_bytes + grown - shrunk;
            }
            return Ok(Some(before));
        }
        let record = Record::new(key, value, meta);
        let grown = record.footprint();
        let before = table.memory_bytes();
        table.insert(hash, record);
        let after = table.memory_bytes();
        self.records_bytes += grown;
        self.tables_bytes = self.tables_bytes + after - before;
        Ok(None)
    }

    fn set_meta(&mut self, _: ShardId, hash: KeyHash, key: &[u8], meta: Meta) -> Result<Option<Meta>, BackendError> {
        let Some(record) = self.table(hash).get_mut(hash, key) else { return Ok(None) };
        let before = record.entry().meta();
        if !record.set_meta(meta) {
            let shrunk = record.footprint();
            let new = Record::new(key, record.entry().value, meta);
            let grown = new.footprint();
            *record = new;
            self.records_bytes = self.records_bytes + grown - shrunk;
        }
        self.note(|| Change::Meta { key, meta });
        Ok(Some(before))
    }

    fn edit(
        &mut self,
        _: ShardId,
        hash: KeyHash,
        key: &[u8],
        part: Part,
        meta: Meta,
        change: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Meta> {
        let at = self.index(hash);
        let record = self.tables[at].get_mut(hash, key)?;
        let Entry { value, .. } = record.entry();
        let before = record.entry().meta();
        if value.len() > part.whole || before.tombstone {
            return None;
        }
        if value.len() < part.whole || !record.set_meta(meta) {
            let mut longer = Vec::with_capacity(part.whole);
            longer.extend_from_slice(record.entry().value);
            longer.resize(part.whole, 0);
            let shrunk = record.footprint();
            *record = Record::new(key, &longer, meta);
            self.records_bytes = self.records_bytes + record.footprint() - shrunk;
        }
        let bytes = &mut record.value_mut()[part.from..part.to];
        change(bytes);
        if let Some(journal) = &mut self.journal {
            journal.note(Change::Patch { key, at: part.from as u32, bytes, meta });
        }
        Some(before)
    }

    fn remove(&mut self, _: ShardId, hash: KeyHash, key: &[u8]) -> Result<Option<Old>, BackendError> {
        let Some(record) = self.table(hash).remove(hash, key) else { return Ok(None) };
        self.records_bytes -= record.footprint();
        self.note(|| Change::Remove { key });
        Ok(Some(old(&record)))
    }

    fn visit(
        &mut self,
        shard: ShardId,
        from: KeyHash,
        limit: usize,
        look: &mut dyn FnMut(KeyHash, Entry<'_>),
    ) -> Option<KeyHash> {
        let space = self.keyspace;
        let from = from.max(space.first_hash(shard));
        let next = self.table(space.first_hash(shard)).visit(from, limit, &mut |hash, record| {
            // A table of all shards walks on into the next one.
            if space.shard(hash) == shard {
                look(hash, record.entry());
            }
        })?;
        (space.shard(next) == shard).then_some(next)
    }

    fn by_hash(&mut self, _: ShardId, hash: KeyHash, look: &mut dyn FnMut(Entry<'_>)) {
        self.table(hash).by_hash(hash, &mut |record| look(record.entry()));
    }

    #[inline]
    fn prefetch_place(&self, _: ShardId, hash: KeyHash) {
        if let Some(table) = self.tables.get(self.index(hash)) {
            table.prefetch_bucket(hash);
        }
    }

    #[inline]
    fn prefetch_entry(&self, _: ShardId, hash: KeyHash) {
        if let Some(table) = self.tables.get(self.index(hash)) {
            table.prefetch_record(hash);
        }
    }

    fn len(&self) -> usize {
        self.tables.iter().map(Table::len).sum()
    }

    #[inline]
    fn memory_bytes(&self) -> usize {
        self.records_bytes + self.tables_bytes
    }

    fn clear(&mut self, shard: ShardId) -> Result<(), BackendError> {
        let (first, bits) = (self.keyspace.first_hash(shard), self.keyspace.shards.bits());
        let whole = self.bits > 0;
        self.drop_of(first, |table| if whole { table.take() } else { table.take_range(first, bits) });
        self.note(|| Change::Clear { shard });
        Ok(())
    }

    fn clear_all(&mut self) -> Result<bool, BackendError> {
        if self.bits > 0 {
            return Ok(false);
        }
        debug_assert!(self.journal.is_none(), "what is journaled is cleared shard by shard");
        self.drop_of(KeyHash(0), Table::take);
        Ok(true)
    }

    fn reclaim(&mut self, entries: usize) -> bool {
        let mut looked = 0;
        while looked < entries {
            let Some(table) = self.dropping.last_mut() else { return false };
            let before = table.memory_bytes();
            match table.dismantle() {
                Some((records, bytes)) => {
                    looked += records.max(1);
                    self.records_bytes -= bytes;
                    self.tables_bytes -= before - table.memory_bytes();
                }
                None => {
                    self.tables_bytes -= before;
                    self.dropping.pop();
                }
            }
        }
        !self.dropping.is_empty()
    }

    fn journal(&mut self) -> Option<&mut Journal> {
        self.journal.as_deref_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::ShardCount;

    const SLICE: usize = 100;
    /// A slice ends with a segment, which has 448 records at most.
    const MOST: usize = SLICE + 448;

    /// A core with that many entries of one tag and as many of none, all of one size.
    fn filled(name: &str, shards: u16, each: usize) -> (InMemory, Keyspace, ShardId, usize) {
        let space = Keyspace { shards: ShardCount::new(shards.into()).unwrap(), ..Keyspace::default() };
        let config = BackendConfig { keyspace: space, owned: 0..shards };
        let mut tables = Registry::default().make(name, &config).unwrap().take_in_memory().unwrap();
        for n in 0..each {
            for key in [format!("{{tag}}{n:06}"), format!("free:{n:06}")] {
                let hash = space.locate(key.as_bytes());
                tables.put(space.shard(hash), hash, key.as_bytes(), &[b'v'; 32], Meta::default()).unwrap();
            }
        }
        let size = tables.records_bytes / (2 * each);
        (tables, space, space.shard(space.locate(b"{tag}")), size)
    }

    fn in_shard(tables: &mut InMemory, shard: ShardId) -> usize {
        let mut count = 0;
        tables.visit(shard, KeyHash(0), usize::MAX, &mut |_, _| count += 1);
        count
    }

    /// Frees all that is gone; how many records the slices freed.
    fn slices(tables: &mut InMemory, record: usize) -> Vec<usize> {
        let mut slices = Vec::new();
        loop {
            let before = tables.records_bytes;
            let more = tables.reclaim(SLICE);
            slices.push((before - tables.records_bytes) / record);
            if !more {
                return slices;
            }
        }
    }

    #[test]
    fn clearing_frees_no_record_and_reclaiming_a_slice_of_them() {
        // Few shards have segments of their own also in a table of all; of many shards some share one.
        let (few, many) = if cfg!(miri) { (600, 300) } else { (20_000, 2000) };
        for (name, shards, each) in
            ["memory", DEFAULT_BACKEND].into_iter().flat_map(|name| [(name, 32, few), (name, 1024, many)])
        {
            // One shard of many entries, beside others.
            let (mut tables, space, shard, record) = filled(name, shards, each);
            let (records, table_bytes, held) =
                (tables.records_bytes, tables.tables_bytes, in_shard(&mut tables, shard));
            tables.clear(shard).unwrap();
            assert_eq!((in_shard(&mut tables, shard), tables.len()), (0, 2 * each - held), "{name}: gone at once");
            assert_eq!(tables.records_bytes, records, "{name}: and freed later");
            let freed = slices(&mut tables, record);
            assert!(freed.iter().all(|records| *records <= MOST), "{name}: {freed:?}");
            assert_eq!(freed.iter().sum::<usize>(), held, "{name}");
            assert!(
                each < few || tables.tables_bytes < table_bytes * 3 / 4,
                "{name}: {} of {table_bytes}",
                tables.tables_bytes
            );

            // Everything. Where there is no cheaper way the store clears shard by shard.
            tables.put(shard, space.first_hash(shard), b"{tag}", b"", Meta::default()).unwrap();
            let (records, held) = (tables.records_bytes, tables.len());
            if !tables.clear_all().unwrap() {
                (0..shards).for_each(|shard| tables.clear(ShardId(shard)).unwrap());
            }
            assert_eq!((tables.len(), tables.records_bytes), (0, records), "{name}");
            let freed = slices(&mut tables, record);
            assert!(freed.iter().all(|records| *records <= MOST), "{name}: {freed:?}");
            assert!(freed.len() > held / MOST, "{name}: {} slices", freed.len());
            assert_eq!((tables.records_bytes, tables.tables_bytes), (0, 0), "{name}");
        }
    }
}
