//! What a write means: the data of one core.
//!
//! A [`Backend`] stores entries; the store gives them their semantics. Every write gets a version from the core's hybrid
//! logical clock, is noted in the change log of its shard, moves the shard's digest, and is refused beyond the memory
//! limit. Every read hides what is expired or deleted. All reads and writes of a node end here.
//!
//! ```text
//!   set ─▶ limit? ─▶ version ─▶ backend.put ─▶ digest: − old + new ─▶ change log
//! ```
//!
//! Invariants, checked by [`Store::invariants`]: `digest` equals the sum over what the backend holds; `live`, `expiring`
//! and `tombstones` count it; versions of a key only grow.
//!
//! **Expiry** is lazy (a read that meets an expired entry removes it) and swept in bounded slices. **Tombstones** are kept
//! only where replication needs them (`keep_tombstones`): at most `tombstone_limit` per shard, oldest first out, and
//! [`Store::tombstone_floor`] says below which version absence proves nothing any more.
//!
//! Not here: what commands do with it ([`crate::command`]), and who may write (the session).

use std::collections::VecDeque;
use std::ops::Range;

use crate::Millis;
use crate::backend::{Backend, BackendConfig, BackendError, Chosen, Old};
use crate::change_log::{Change, ChangeLog};
use crate::digest::Digest;
use crate::hash::{KeyHash, Keyspace, ShardId};
use crate::hlc::{Clock, TooFarAhead, Version};
use crate::record::{Entry, MAX_KEY_LEN, MAX_VALUE_LEN, Meta, Record};

/// Entries freed before a write that finds memory full looks again.
const RECLAIMED_AT_ONCE: usize = 512;

/// What a store is made with.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// How keys map to shards; equal on all nodes of a cluster.
    pub keyspace: Keyspace,
    /// The shards of this core.
    pub owned: Range<u16>,
    /// Number of this node in versions.
    pub node: u16,
    /// Bytes beyond which writes are refused; 0 = no limit.
    pub max_memory: u64,
    /// Changes that the log of each shard keeps, at most.
    pub change_log_entries: usize,
    /// Tombstones that each shard keeps, at most.
    pub tombstone_limit: usize,
    /// Whether deletes leave tombstones: needed as soon as there are replicas.
    pub keep_tombstones: bool,
}

/// Change-log entries of a whole node, at most: bounds the memory of many shards.
const NODE_LOG_ENTRIES: usize = 2 << 20;

impl StoreConfig {
    /// What a backend for this store is made with.
    pub fn backend(&self) -> BackendConfig {
        BackendConfig { keyspace: self.keyspace, owned: self.owned.clone() }
    }
}

impl Default for StoreConfig {
    fn default() -> StoreConfig {
        let keyspace = Keyspace::default();
        StoreConfig {
            keyspace,
            owned: 0..keyspace.shards.get(),
            node: 0,
            max_memory: 0,
            change_log_entries: 8192,
            tombstone_limit: 4096,
            keep_tombstones: false,
        }
    }
}

/// Why a write was refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The memory limit is reached: delete something, raise the limit, or write later.
    #[error("OOM command not allowed when used memory > 'maxmemory'.")]
    OutOfMemory,
    /// The key is longer than [`MAX_KEY_LEN`].
    #[error("ERR key is longer than {MAX_KEY_LEN} bytes")]
    KeyTooLong,
    /// The value is longer than [`MAX_VALUE_LEN`].
    #[error("ERR string exceeds maximum allowed size (proto-max-bulk-len)")]
    ValueTooLong,
    /// A version from too far in the future: the sender's clock is wrong.
    #[error("ERR {0}")]
    Clock(#[from] TooFarAhead),
    /// The backend failed.
    #[error("ERR {0}")]
    Backend(#[from] BackendError),
}

/// What [`Store::merge`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// The entry is newer than what was there and has replaced it.
    Applied,
    /// What is there is as new or newer.
    Stale,
}

/// What a slice of [`Store::sweep`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries looked at.
    pub looked: usize,
    /// Entries that were expired and are gone.
    pub expired: usize,
    /// Whether the round is not finished: there is more to look at now.
    pub more: bool,
}

/// Counters of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Keys that can be read (expired ones that were not yet met included).
    pub keys: u64,
    /// Of these, keys with an expiry.
    pub expiring: u64,
    /// Tombstones held.
    pub tombstones: u64,
    /// Changes held in the logs.
    pub change_log: u64,
    /// Bytes in use: entries, tables, change logs.
    pub memory_bytes: u64,
    /// Reads that found their key.
    pub hits: u64,
    /// Reads that did not.
    pub misses: u64,
    /// Entries that expired.
    pub expired: u64,
    /// Writes, deletes included, since the start.
    pub writes: u64,
    /// Writes refused by the memory limit.
    pub refused: u64,
}

#[derive(Debug)]
struct Shard {
    live: u64,
    expiring: u64,
    digest: Digest,
    log: ChangeLog,
    /// Tombstones in the order they were made; one that was overwritten meanwhile is skipped when its turn comes.
    graves: VecDeque<(KeyHash, Version)>,
    floor: Version,
    /// No entry of the shard expires before this; the sweep skips the shard until then.
    next_expiry: Millis,
}

/// The data of one core; see the file's head.
pub struct Store {
    config: StoreConfig,
    backend: Chosen,
    clock: Clock,
    shards: Vec<Shard>,
    log_bytes: usize,
    /// An expired entry that a read met; the next operation removes it.
    doomed: Option<(KeyHash, Box<[u8]>)>,
    /// Where the sweep goes on: shard, position, and the earliest expiry it saw in that shard so far.
    sweep_at: (usize, KeyHash, Millis),
    stats: StoreStats,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("config", &self.config).field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Store {
    /// A store over an empty backend made with [`StoreConfig::backend`].
    pub fn new(config: StoreConfig, backend: Box<dyn Backend>) -> Store {
        let log = config.change_log_entries.min(NODE_LOG_ENTRIES / usize::from(config.keyspace.shards.get())).max(1);
        let shard = |_| Shard {
            live: 0,
            expiring: 0,
            digest: Digest::default(),
            log: ChangeLog::new(log),
            graves: VecDeque::new(),
            floor: Version::default(),
            next_expiry: Millis::MAX,
        };
        let shards = config.owned.clone().map(shard).collect();
        let clock = Clock::new(config.node, Clock::DEFAULT_MAX_DRIFT_MS);
        Store {
            config,
            backend: Chosen::new(backend),
            clock,
            shards,
            log_bytes: 0,
            doomed: None,
            sweep_at: (0, KeyHash(0), Millis::MAX),
            stats: StoreStats::default(),
        }
    }

    /// How keys map to shards.
    #[inline]
    pub fn keyspace(&self) -> Keyspace {
        self.config.keyspace
    }

    /// The shards of this store.
    pub fn owned(&self) -> Range<u16> {
        self.config.owned.clone()
    }

    /// Whether a hash belongs to one of this store's shards.
    #[inline]
    pub fn owns(&self, hash: KeyHash) -> bool {
        self.config.owned.contains(&self.config.keyspace.shard(hash).0)
    }

    /// Hash of a key.
    #[inline]
    pub fn locate(&self, key: &[u8]) -> KeyHash {
        self.config.keyspace.locate(key)
    }

    #[inline]
    fn shard_of(&self, hash: KeyHash) -> ShardId {
        let shard = self.config.keyspace.shard(hash);
        debug_assert!(self.config.owned.contains(&shard.0), "a key of another core");
        shard
    }

    #[inline]
    fn shard(&mut self, shard: ShardId) -> &mut Shard {
        &mut self.shards[usize::from(shard.0 - self.config.owned.start)]
    }

    /// See [`Backend::prefetch_place`]. A hash of another store is ignored.
    #[inline]
    pub fn prefetch_place(&self, hash: KeyHash) {
        let shard = self.config.keyspace.shard(hash);
        if self.config.owned.contains(&shard.0) {
            self.backend.prefetch_place(shard, hash);
        }
    }

    /// See [`Backend::prefetch_entry`]. A hash of another store is ignored.
    #[inline]
    pub fn prefetch_entry(&self, hash: KeyHash) {
        let shard = self.config.keyspace.shard(hash);
        if self.config.owned.contains(&shard.0) {
            self.backend.prefetch_entry(shard, hash);
        }
    }

    /// The live entry under a key; counts as a hit or a miss.
    #[inline]
    pub fn get(&mut self, hash: KeyHash, key: &[u8], now: Millis) -> Option<Entry<'_>> {
        self.settle(now);
        let shard = self.shard_of(hash);
        let found = match &mut self.backend {
            // The record is judged before the entry is made of it, which then need not be moved.
            Chosen::InMemory(tables) => match tables.find(shard, hash, key) {
                Some(record) if record.is_plain() => {
                    self.stats.hits += 1;
                    return Some(record.entry());
                }
                found => found.map(Record::entry),
            },
            Chosen::Other(backend) => backend.get(shard, hash, key),
        };
        match found {
            Some(entry) if is_live(&entry, now) => {
                self.stats.hits += 1;
                Some(entry)
            }
            Some(entry) if !entry.tombstone => {
                self.stats.misses += 1;
                self.doomed = Some((hash, key.into()));
                None
            }
            _ => {
                self.stats.misses += 1;
                None
            }
        }
    }

    /// Removes the expired entry that the last read met. A read itself cannot: it has lent the backend to its caller.
    #[inline]
    fn settle(&mut self, now: Millis) {
        if self.doomed.is_some() {
            self.remove_doomed(now);
        }
    }

    #[cold]
    fn remove_doomed(&mut self, now: Millis) {
        let Some((hash, key)) = self.doomed.take() else { return };
        let shard = self.shard_of(hash);
        if self.backend.get(shard, hash, &key).is_some_and(|entry| !entry.tombstone && !is_live(&entry, now)) {
            self.expire(shard, hash, &key, now);
        }
    }

    /// The live entry under a key, without counting.
    #[inline]
    pub fn peek(&mut self, hash: KeyHash, key: &[u8], now: Millis) -> Option<Entry<'_>> {
        let shard = self.shard_of(hash);
        self.backend.get(shard, hash, key).filter(|entry| is_live(entry, now))
    }

    /// Whether a key exists, without counting.
    #[inline]
    pub fn exists(&mut self, hash: KeyHash, key: &[u8], now: Millis) -> bool {
        self.peek(hash, key, now).is_some()
    }

    /// The version of a live entry: what WATCH compares.
    pub fn version(&mut self, hash: KeyHash, key: &[u8], now: Millis) -> Option<Version> {
        self.peek(hash, key, now).map(|entry| entry.version)
    }

    /// Bytes in use.
    #[inline]
    pub fn memory_bytes(&self) -> usize {
        self.backend.memory_bytes() + self.log_bytes
    }

    /// Changes the memory limit; 0 = none.
    pub fn set_max_memory(&mut self, bytes: u64) {
        self.config.max_memory = bytes;
    }

    /// The memory limit; 0 = none.
    pub fn max_memory(&self) -> u64 {
        self.config.max_memory
    }

    /// Whether the memory limit is reached. What was cleared and is not yet freed makes room first.
    #[inline]
    pub fn is_full(&mut self) -> bool {
        self.is_over() && !self.make_room()
    }

    #[inline]
    fn is_over(&self) -> bool {
        self.config.max_memory != 0 && self.memory_bytes() as u64 >= self.config.max_memory
    }

    #[cold]
    fn make_room(&mut self) -> bool {
        while self.is_over() {
            if !self.reclaim(RECLAIMED_AT_ONCE) {
                return !self.is_over();
            }
        }
        true
    }

    /// Gives back memory of about that many entries that [`Store::clear`] dropped; whether there is more.
    pub fn reclaim(&mut self, entries: usize) -> bool {
        self.backend.reclaim(entries)
    }

    /// Whether a write may take memory now.
    ///
    /// # Errors
    /// [`StoreError::OutOfMemory`]; counted.
    #[inline]
    pub fn admit(&mut self) -> Result<(), StoreError> {
        if self.is_full() {
            self.stats.refused += 1;
            return Err(StoreError::OutOfMemory);
        }
        Ok(())
    }

    /// Writes an entry that lives until `expires_at` (0 = for ever), whatever was there.
    ///
    /// # Errors
    /// [`StoreError::OutOfMemory`], [`StoreError::KeyTooLong`], [`StoreError::ValueTooLong`], [`StoreError::Backend`].
    #[inline]
    pub fn set(
        &mut self,
        hash: KeyHash,
        key: &[u8],
        value: &[u8],
        expires_at: Millis,
        now: Millis,
    ) -> Result<Version, StoreError> {
        check(key, value.len())?;
        self.settle(now);
        self.admit()?;
        let version = self.clock.tick(now);
        self.write(hash, key, value, Meta { version, expires_at, tombstone: false })?;
        Ok(version)
    }

    /// Changes when an entry expires; 0 = never. False when there is no such key.
    ///
    /// # Errors
    /// [`StoreError::Backend`].
    pub fn set_expiry(
        &mut self,
        hash: KeyHash,
        key: &[u8],
        expires_at: Millis,
        now: Millis,
    ) -> Result<bool, StoreError> {
        if !self.exists(hash, key, now) {
            return Ok(false);
        }
        let shard = self.shard_of(hash);
        let meta = Meta { version: self.clock.tick(now), expires_at, tombstone: false };
        let old = self.backend.set_meta(shard, hash, key, meta)?.expect("the key was seen just now");
        self.account(shard, hash, Some(old), Some(meta));
        Ok(true)
    }

    /// Changes the bytes of a value: it is `new_len` long for `change`, with zeros behind what was there (never shorter
    /// than it was). An absent key is created. The expiry stays. Returns the new length.
    ///
    /// # Errors
    /// As [`Store::set`]; the value is as before.
    pub fn edit(
        &mut self,
        hash: KeyHash,
        key: &[u8],
        new_len: usize,
        now: Millis,
        change: &mut dyn FnMut(&mut [u8]),
    ) -> Result<usize, StoreError> {
        self.settle(now);
        let shard = self.shard_of(hash);
        let (len, expires_at) = self.peek(hash, key, now).map_or((None, 0), |e| (Some(e.value.len()), e.expires_at));
        let new_len = new_len.max(len.unwrap_or(0));
        check(key, new_len)?;
        self.admit()?;
        let meta = Meta { version: self.clock.tick(now), expires_at, tombstone: false };
        if len == Some(new_len) {
            let old = self.backend.get(shard, hash, key).map(|entry| entry.meta());
            if let Some(value) = self.backend.edit(shard, hash, key, new_len, meta) {
                change(value);
                self.account(shard, hash, old, Some(meta));
                return Ok(new_len);
            }
        }
        let mut value = Vec::with_capacity(new_len);
        value.extend_from_slice(self.peek(hash, key, now).map_or(&[], |entry| entry.value));
        value.resize(new_len, 0);
        change(&mut value);
        self.write(hash, key, &value, meta)?;
        Ok(new_len)
    }

    /// Deletes an entry; whether there was one to read.
    ///
    /// # Errors
    /// [`StoreError::Backend`].
    pub fn delete(&mut self, hash: KeyHash, key: &[u8], now: Millis) -> Result<bool, StoreError> {
        self.settle(now);
        let shard = self.shard_of(hash);
        let Some(entry) = self.backend.get(shard, hash, key).filter(|entry| !entry.tombstone) else {
            return Ok(false);
        };
        let live = is_live(&entry, now);
        self.bury(shard, hash, key, now)?;
        if !live {
            self.stats.expired += 1;
        }
        Ok(live)
    }

    /// Applies an entry made elsewhere if it is newer than what is here (last writer wins). Tombstones and expired
    /// entries count like any other.
    ///
    /// # Errors
    /// [`StoreError::Clock`] for a version from too far in the future; else as [`Store::set`].
    pub fn merge(&mut self, entry: Entry<'_>, now: Millis) -> Result<Merged, StoreError> {
        check(entry.key, entry.value.len())?;
        self.settle(now);
        self.clock.observe(entry.version, now)?;
        let hash = self.locate(entry.key);
        let shard = self.shard_of(hash);
        if self.backend.get(shard, hash, entry.key).is_some_and(|known| known.version >= entry.version) {
            return Ok(Merged::Stale);
        }
        if !entry.tombstone {
            self.admit()?;
        }
        self.write(hash, entry.key, entry.value, entry.meta())?;
        if entry.tombstone {
            self.shard(shard).graves.push_back((hash, entry.version));
            self.trim_graves(shard)?;
        }
        Ok(Merged::Applied)
    }

    #[inline]
    fn write(&mut self, hash: KeyHash, key: &[u8], value: &[u8], meta: Meta) -> Result<(), StoreError> {
        let shard = self.shard_of(hash);
        let old = self.backend.put(shard, hash, key, value, meta)?;
        self.account(shard, hash, old.map(|old: Old| old.meta), Some(meta));
        Ok(())
    }

    /// Takes note of a change that the backend has made.
    #[inline]
    fn account(&mut self, shard: ShardId, hash: KeyHash, old: Option<Meta>, new: Option<Meta>) {
        let bits = self.config.keyspace.shards.bits();
        self.stats.writes += 1;
        let shard = self.shard(shard);
        if let Some(old) = old {
            shard.digest.remove(hash, old, bits);
            shard.live -= u64::from(!old.tombstone);
            shard.expiring -= u64::from(old.expires_at != 0);
        }
        if let Some(new) = new {
            shard.digest.add(hash, new, bits);
            shard.live += u64::from(!new.tombstone);
            if new.expires_at != 0 {
                shard.expiring += 1;
                shard.next_expiry = shard.next_expiry.min(new.expires_at);
            }
            let grown = shard.log.push(Change { hash, hlc: new.version.hlc });
            self.log_bytes += grown;
        }
    }

    /// Removes an entry, leaving a tombstone if they are kept.
    fn bury(&mut self, shard: ShardId, hash: KeyHash, key: &[u8], now: Millis) -> Result<(), StoreError> {
        let version = self.clock.tick(now);
        if self.config.keep_tombstones {
            self.write(hash, key, &[], Meta { version, expires_at: 0, tombstone: true })?;
            self.shard(shard).graves.push_back((hash, version));
            return self.trim_graves(shard);
        }
        let old = self.backend.remove(shard, hash, key)?;
        self.account(shard, hash, old.map(|old| old.meta), None);
        let grown = self.shard(shard).log.push(Change { hash, hlc: version.hlc });
        self.log_bytes += grown;
        Ok(())
    }

    fn trim_graves(&mut self, shard: ShardId) -> Result<(), StoreError> {
        while self.shard(shard).graves.len() > self.config.tombstone_limit {
            let (hash, version) = self.shard(shard).graves.pop_front().expect("longer than the limit");
            self.purge(shard, hash, version)?;
        }
        Ok(())
    }

    /// Forgets the tombstone of that hash and version, if it is still there, and raises the floor.
    fn purge(&mut self, shard: ShardId, hash: KeyHash, version: Version) -> Result<(), StoreError> {
        let mut key = None;
        self.backend.visit(shard, hash, 1, &mut |found, entry| {
            if found == hash && entry.tombstone && entry.version == version {
                key = Some(entry.key.to_vec());
            }
        });
        if let Some(key) = key {
            let old = self.backend.remove(shard, hash, &key)?;
            self.account(shard, hash, old.map(|old| old.meta), None);
        }
        let shard = self.shard(shard);
        shard.floor = shard.floor.max(version);
        Ok(())
    }

    /// Forgets the tombstones of a shard that are not newer than `floor`: every replica has agreed to it.
    ///
    /// # Errors
    /// [`StoreError::Backend`].
    pub fn purge_tombstones(&mut self, shard: ShardId, floor: Version) -> Result<usize, StoreError> {
        let mut purged = 0;
        while let Some(&(hash, version)) = self.shard(shard).graves.front()
            && version <= floor
        {
            self.shard(shard).graves.pop_front();
            self.purge(shard, hash, version)?;
            purged += 1;
        }
        Ok(purged)
    }

    /// The newest version whose tombstone may be forgotten: an entry not newer than this that is absent here may have
    /// been deleted.
    pub fn tombstone_floor(&self, shard: ShardId) -> Version {
        self.shards[usize::from(shard.0 - self.config.owned.start)].floor
    }

    /// Removes an expired entry. A backend that cannot is asked again by the next read or sweep; readers see nothing either
    /// way.
    fn expire(&mut self, shard: ShardId, hash: KeyHash, key: &[u8], now: Millis) -> bool {
        let gone = self.bury(shard, hash, key, now).is_ok();
        self.stats.expired += u64::from(gone);
        gone
    }

    /// Removes expired entries: a slice that looks at about `budget` entries. Call again while `more`.
    pub fn sweep(&mut self, now: Millis, budget: usize) -> Swept {
        self.settle(now);
        let mut swept = Swept::default();
        let mut expired: Vec<(KeyHash, Vec<u8>)> = Vec::new();
        while swept.looked < budget {
            let (at, from, mut earliest) = self.sweep_at;
            if at >= self.shards.len() {
                self.sweep_at = (0, KeyHash(0), Millis::MAX);
                return swept;
            }
            let shard = ShardId(self.config.owned.start + at as u16);
            let fresh = from == KeyHash(0);
            if fresh && (self.shards[at].expiring == 0 || self.shards[at].next_expiry > now) {
                self.sweep_at = (at + 1, KeyHash(0), Millis::MAX);
                continue;
            }
            if fresh {
                // Entries written while the shard is swept lower it again.
                self.shards[at].next_expiry = Millis::MAX;
            }
            let next = self.backend.visit(shard, from, budget - swept.looked, &mut |hash, entry| {
                swept.looked += 1;
                if entry.expires_at != 0 && entry.expires_at <= now {
                    expired.push((hash, entry.key.to_vec()));
                } else if entry.expires_at != 0 {
                    earliest = earliest.min(entry.expires_at);
                }
            });
            for (hash, key) in expired.drain(..) {
                if self.expire(shard, hash, &key, now) {
                    swept.expired += 1;
                } else {
                    earliest = earliest.min(now);
                }
            }
            match next {
                Some(next) => self.sweep_at = (at, next, earliest),
                None => {
                    self.shards[at].next_expiry = self.shards[at].next_expiry.min(earliest);
                    self.sweep_at = (at + 1, KeyHash(0), Millis::MAX);
                }
            }
        }
        swept.more = true;
        swept
    }

    /// Live entries in hash order from position `from` on, about `limit` of them; the position to go on from, `None` at
    /// the end of this store.
    pub fn scan(
        &mut self,
        from: KeyHash,
        limit: usize,
        now: Millis,
        look: &mut dyn FnMut(Entry<'_>),
    ) -> Option<KeyHash> {
        let owned = self.config.owned.clone();
        let mut shard = self.config.keyspace.shard(from).0.max(owned.start);
        let mut from = from;
        let mut seen = 0;
        while shard < owned.end {
            let next = self.backend.visit(ShardId(shard), from, limit - seen, &mut |_, entry| {
                seen += 1;
                if is_live(&entry, now) {
                    look(entry);
                }
            });
            match next {
                Some(next) => return Some(next),
                None => shard += 1,
            }
            if shard < owned.end {
                from = self.config.keyspace.first_hash(ShardId(shard));
                if seen >= limit {
                    return Some(from);
                }
            }
        }
        None
    }

    /// Some live entry, chosen by `random`: the first at or behind a random position.
    pub fn random(&mut self, random: u64, now: Millis, look: &mut dyn FnMut(Entry<'_>)) -> bool {
        let shards = self.shards.len() as u64;
        let shard = ShardId(self.config.owned.start + (random % shards) as u16);
        let bits = self.config.keyspace.shards.bits();
        let mut from = Some(KeyHash(self.config.keyspace.first_hash(shard).0 | random.rotate_left(32) >> bits));
        let (mut found, mut wrapped) = (false, false);
        while !found {
            let Some(at) = from else {
                if wrapped {
                    return false;
                }
                wrapped = true;
                from = Some(KeyHash(0));
                continue;
            };
            from = self.scan(at, 1, now, &mut |entry| {
                if !found {
                    found = true;
                    look(entry);
                }
            });
        }
        true
    }

    /// All entries of a shard in hash order, tombstones and expired ones included: about `limit` from `from` on; the
    /// position to go on from.
    pub fn snapshot(
        &mut self,
        shard: ShardId,
        from: KeyHash,
        limit: usize,
        look: &mut dyn FnMut(Entry<'_>),
    ) -> Option<KeyHash> {
        self.backend.visit(shard, from, limit, &mut |_, entry| look(entry))
    }

    /// What the shard holds, for comparing with a replica's.
    pub fn digest(&self, shard: ShardId) -> Digest {
        self.shards[usize::from(shard.0 - self.config.owned.start)].digest
    }

    /// Recent changes of a shard.
    pub fn change_log(&self, shard: ShardId) -> &ChangeLog {
        &self.shards[usize::from(shard.0 - self.config.owned.start)].log
    }

    /// Deletes everything that can be read. The memory comes back with [`Store::reclaim`].
    ///
    /// With tombstones kept each key leaves one, as any delete does; otherwise the tables are dropped.
    ///
    /// # Errors
    /// [`StoreError::Backend`].
    pub fn clear(&mut self, now: Millis) -> Result<(), StoreError> {
        self.doomed = None;
        for shard in self.config.owned.clone().map(ShardId) {
            if self.config.keep_tombstones {
                let mut keys = Vec::new();
                self.backend.visit(shard, KeyHash(0), usize::MAX, &mut |hash, entry| {
                    if !entry.tombstone {
                        keys.push((hash, entry.key.to_vec()));
                    }
                });
                for (hash, key) in keys {
                    self.bury(shard, hash, &key, now)?;
                }
                continue;
            }
            self.backend.clear(shard)?;
            let version = self.clock.tick(now);
            let shard = self.shard(shard);
            shard.digest = Digest::default();
            (shard.live, shard.expiring, shard.next_expiry) = (0, 0, Millis::MAX);
            shard.floor = version;
        }
        self.stats.writes += 1;
        Ok(())
    }

    /// Number of keys (expired ones that were not yet met included).
    pub fn len(&self) -> u64 {
        self.shards.iter().map(|shard| shard.live).sum::<u64>() - u64::from(self.doomed.is_some())
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sets hits, misses, expired, writes and refused to zero.
    pub fn reset_stats(&mut self) {
        self.stats = StoreStats::default();
    }

    /// Counters and sizes now.
    pub fn stats(&self) -> StoreStats {
        StoreStats {
            keys: self.len(),
            expiring: self.shards.iter().map(|s| s.expiring).sum(),
            tombstones: self.backend.len() as u64 - self.shards.iter().map(|s| s.live).sum::<u64>(),
            change_log: self.shards.iter().map(|s| s.log.len() as u64).sum(),
            memory_bytes: self.memory_bytes() as u64,
            ..self.stats
        }
    }

    /// Checks what the file's head promises, by walking everything. For tests and the simulator.
    ///
    /// # Panics
    /// When a promise is broken.
    pub fn invariants(&mut self) {
        self.doomed = None;
        let bits = self.config.keyspace.shards.bits();
        for at in 0..self.shards.len() {
            let shard = ShardId(self.config.owned.start + at as u16);
            let (mut digest, mut live, mut expiring) = (Digest::default(), 0, 0);
            let mut earliest = Millis::MAX;
            self.backend.visit(shard, KeyHash(0), usize::MAX, &mut |hash, entry| {
                digest.add(hash, entry.meta(), bits);
                live += u64::from(!entry.tombstone);
                if entry.expires_at != 0 {
                    expiring += 1;
                    earliest = earliest.min(entry.expires_at);
                }
            });
            let known = &self.shards[at];
            assert_eq!((known.digest, known.live, known.expiring), (digest, live, expiring), "{shard:?}");
            let swept_now = self.sweep_at.0 == at && self.sweep_at.1 != KeyHash(0);
            assert!(swept_now || known.next_expiry <= earliest, "{shard:?}: the sweep would skip an entry");
            assert!(known.graves.len() <= self.config.tombstone_limit);
        }
    }
}

#[inline]
fn is_live(entry: &Entry<'_>, now: Millis) -> bool {
    !entry.tombstone && (entry.expires_at == 0 || entry.expires_at > now)
}

#[inline]
fn check(key: &[u8], value_len: usize) -> Result<(), StoreError> {
    if key.len() > MAX_KEY_LEN {
        return Err(StoreError::KeyTooLong);
    }
    if value_len > MAX_VALUE_LEN {
        return Err(StoreError::ValueTooLong);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Registry;
    use crate::hlc::Hlc;
    use proptest::prelude::*;

    fn store(config: StoreConfig) -> Store {
        let backend = Registry::default().make("memory-sharded", &config.backend()).unwrap();
        Store::new(config, backend)
    }

    fn plain() -> Store {
        store(StoreConfig::default())
    }

    fn replicated(node: u16) -> Store {
        store(StoreConfig { keep_tombstones: true, node, ..StoreConfig::default() })
    }

    impl Store {
        fn put(&mut self, key: &str, value: &str, expires_at: Millis, now: Millis) {
            let hash = self.locate(key.as_bytes());
            self.set(hash, key.as_bytes(), value.as_bytes(), expires_at, now).unwrap();
        }

        fn read(&mut self, key: &str, now: Millis) -> Option<String> {
            let hash = self.locate(key.as_bytes());
            self.get(hash, key.as_bytes(), now).map(|e| String::from_utf8(e.value.to_vec()).unwrap())
        }

        fn del(&mut self, key: &str, now: Millis) -> bool {
            let hash = self.locate(key.as_bytes());
            self.delete(hash, key.as_bytes(), now).unwrap()
        }

        fn digests(&self) -> Vec<Digest> {
            self.owned().map(|shard| self.digest(ShardId(shard))).collect()
        }
    }

    #[test]
    fn an_expired_entry_is_gone_for_every_reader_and_then_removed() {
        let mut store = plain();
        store.put("k", "v", 100, 1);
        store.put("stays", "v", 0, 1);
        assert_eq!(store.read("k", 99).as_deref(), Some("v"));
        assert_eq!(store.read("k", 100), None);
        assert_eq!(store.len(), 1, "the read counts as the removal");
        assert_eq!(store.read("stays", 100).as_deref(), Some("v"));
        assert_eq!((store.stats().expired, store.stats().expiring), (1, 0));
        store.put("again", "v", 200, 101);
        assert!(!store.del("again", 300), "an expired entry cannot be deleted");
        store.invariants();
    }

    #[test]
    fn the_sweep_finds_what_nobody_reads_in_bounded_slices() {
        let mut store = plain();
        for n in 0..5000 {
            store.put(&format!("k{n}"), "v", if n % 2 == 0 { 50 + n % 7 } else { 0 }, 1);
        }
        assert_eq!(store.sweep(40, 100), Swept::default(), "nothing is due, nothing is looked at");
        let mut slices = 0;
        loop {
            let swept = store.sweep(100, 64);
            assert!(swept.looked < 64 + 448 * 2, "{swept:?}");
            slices += 1;
            // Writes go on between slices; what they add is not forgotten.
            if slices < 50 {
                store.put(&format!("late{slices}"), "v", 150, 100);
            }
            if !swept.more {
                break;
            }
        }
        assert_eq!(store.stats().expired, 2500);
        store.invariants();
        while store.sweep(200, 64).more {}
        assert_eq!(store.len(), 2500);
        store.invariants();
    }

    #[test]
    fn writes_beyond_the_limit_are_refused_and_deletes_make_room() {
        let mut store = store(StoreConfig { max_memory: 1 << 20, ..StoreConfig::default() });
        let value = "x".repeat(1000);
        let refused = (0..10_000).find(|n| {
            let key = format!("k{n}");
            let hash = store.locate(key.as_bytes());
            store.set(hash, key.as_bytes(), value.as_bytes(), 0, 1) == Err(StoreError::OutOfMemory)
        });
        let refused = refused.expect("the limit is enforced");
        assert!(refused > 300, "{refused}");
        assert_eq!(store.read("k0", 1).as_deref(), Some(&value[..]));
        for n in 0..refused {
            assert!(store.del(&format!("k{n}"), 1));
        }
        store.put("k", "v", 0, 1);
        assert_eq!(store.stats().refused, 1);
        store.invariants();
    }

    #[test]
    fn memory_comes_back_when_everything_is_deleted() {
        let mut store = plain();
        for n in 0..20_000 {
            store.put(&format!("k{n}"), &"v".repeat(n % 300), if n % 3 == 0 { 1 << 40 } else { 0 }, 1);
        }
        store.clear(2).unwrap();
        assert_eq!(store.len(), 0);
        let before = store.backend.memory_bytes();
        assert!(before > 1 << 20, "freed at once, which takes long: {before} left");
        store.put("k", "v", 0, 3);
        let mut slices = 0;
        while store.reclaim(512) {
            slices += 1;
            store.invariants();
        }
        assert!(slices > 20, "{slices}");
        assert!(store.backend.memory_bytes() < 64 << 10, "{}", store.backend.memory_bytes());
        assert_eq!(store.len(), 1);
        store.invariants();
    }

    #[test]
    fn what_was_cleared_makes_room_for_writes() {
        let mut store = plain();
        for n in 0..20_000 {
            store.put(&format!("k{n}"), &"v".repeat(100), 0, 1);
        }
        store.set_max_memory(store.memory_bytes() as u64);
        store.clear(2).unwrap();
        let hash = store.locate(b"k");
        store.set(hash, b"k", b"v", 0, 3).expect("there is room behind what is being freed");
        assert_eq!(store.stats().refused, 0);
    }

    #[test]
    fn a_delete_beats_an_older_write_that_arrives_later() {
        let (mut a, mut b) = (replicated(1), replicated(2));
        a.put("k", "old", 0, 10);
        let old = {
            let h = a.locate(b"k");
            a.peek(h, b"k", 10).unwrap().version
        };
        b.merge(Entry { key: b"k", value: b"old", version: old, expires_at: 0, tombstone: false }, 10).unwrap();
        assert!(b.del("k", 20));
        let late = Entry { key: b"k", value: b"old", version: old, expires_at: 0, tombstone: false };
        assert_eq!(b.merge(late, 30), Ok(Merged::Stale));
        assert_eq!(b.read("k", 30), None);
        assert_eq!(b.stats().tombstones, 1);
        b.invariants();
    }

    #[test]
    fn a_snapshot_taken_in_pages_makes_an_equal_replica() {
        let (mut a, mut b) = (replicated(1), replicated(2));
        for n in 0..3000 {
            a.put(&format!("k{n}"), &n.to_string(), if n % 5 == 0 { 1 << 40 } else { 0 }, 10);
        }
        for n in (0..3000).step_by(7) {
            assert!(a.del(&format!("k{n}"), 20));
        }
        for shard in a.owned().map(ShardId) {
            let mut from = Some(a.keyspace().first_hash(shard));
            while let Some(at) = from {
                from = a.snapshot(shard, at, 4, &mut |entry| {
                    assert_eq!(b.merge(entry, 30), Ok(Merged::Applied), "each entry comes once");
                });
            }
            assert_eq!(a.digest(shard), b.digest(shard));
        }
        assert_eq!((b.len(), b.stats().tombstones), (a.len(), a.stats().tombstones));
        assert!(b.stats().tombstones > 400 && b.stats().expiring > 400);
        b.invariants();
    }

    #[test]
    fn tombstones_are_bounded_and_the_floor_tells_what_was_forgotten() {
        let mut store = store(StoreConfig { keep_tombstones: true, tombstone_limit: 10, ..StoreConfig::default() });
        for n in 0..100 {
            store.put(&format!("{{tag}}{n}"), "v", 0, n);
            store.del(&format!("{{tag}}{n}"), n);
        }
        let hash = store.locate(b"{tag}");
        let shard = store.keyspace().shard(hash);
        assert_eq!(store.stats().tombstones, 10);
        assert_eq!(store.tombstone_floor(shard).hlc.millis(), 89);
        let all = Version { hlc: Hlc(u64::MAX), node: 0 };
        assert_eq!(store.purge_tombstones(shard, all), Ok(10));
        assert_eq!(store.stats().tombstones, 0);
        store.invariants();
    }

    #[test]
    fn a_version_from_the_far_future_is_refused_and_moves_nothing() {
        let mut store = replicated(1);
        let version = Version { hlc: Hlc::new(10_000, 0), node: 2 };
        let entry = Entry { key: b"k", value: b"v", version, expires_at: 0, tombstone: false };
        assert!(matches!(store.merge(entry, 1_000), Err(StoreError::Clock(_))));
        store.put("k", "mine", 0, 1_000);
        let hash = store.locate(b"k");
        assert_eq!(store.version(hash, b"k", 1_000).unwrap().hlc.millis(), 1_000);
    }

    #[test]
    fn edit_extends_with_zeros_and_keeps_the_expiry() {
        let mut store = plain();
        store.put("k", "abc", 500, 1);
        let hash = store.locate(b"k");
        assert_eq!(store.edit(hash, b"k", 5, 2, &mut |v| v[4] = b'!'), Ok(5));
        assert_eq!(store.read("k", 3).as_deref(), Some("abc\0!"));
        assert_eq!(store.edit(hash, b"k", 2, 4, &mut |v| v[0] = b'X'), Ok(5));
        assert_eq!(store.read("k", 499).as_deref(), Some("Xbc\0!"));
        assert_eq!(store.read("k", 500), None);
        store.invariants();
    }

    #[test]
    fn random_finds_any_key_that_is_there() {
        let mut store = plain();
        assert!(!store.random(7, 1, &mut |_| ()));
        store.put("only", "v", 0, 1);
        for random in 0..200u64 {
            assert!(store.random(random.wrapping_mul(0x9e37_79b9_7f4a_7c15), 1, &mut |e| assert_eq!(e.key, b"only")));
        }
    }

    /// A write or delete of a small set of keys by one of several nodes.
    fn entries() -> impl Strategy<Value = Vec<(u8, u8, u64, u16, bool)>> {
        proptest::collection::vec((0..20u8, any::<u8>(), 0..400u64, 1..4u16, any::<bool>()), 1..60)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 200 }))]

        /// Replicas that got the same entries hold the same, in whatever order and however often they came.
        #[test]
        fn merging_converges(entries in entries(), order in any::<u64>()) {
            let mut first = replicated(8);
            let mut second = replicated(9);
            let mut shuffled = entries.clone();
            shuffled.extend_from_slice(&entries[entries.len() / 2..]);
            let n = shuffled.len();
            for i in 0..n {
                shuffled.swap(i, order.rotate_left(i as u32) as usize % n);
            }
            let merge = |store: &mut Store, (key, _, ms, node, tombstone): (u8, u8, u64, u16, bool)| {
                let version = Version { hlc: Hlc::new(ms, 0), node };
                // One version names one write: its value follows from it.
                let value = format!("{ms}:{node}");
                let tombstone = tombstone && ms % 2 == 0;
                let value: &[u8] = if tombstone { b"" } else { value.as_bytes() };
                let tombstone = value.is_empty();
                let key = [key, if tombstone { 1 } else { 0 }];
                store.merge(Entry { key: &key[..1], value, version, expires_at: 0, tombstone }, 1_000).unwrap();
            };
            // The same (key, version) must be the same write, so drop repeats that differ.
            let mut known = std::collections::BTreeSet::new();
            let entries: Vec<_> = entries.into_iter().filter(|e| known.insert((e.0, e.2, e.3))).collect();
            let shuffled: Vec<_> = shuffled.into_iter().filter(|e| entries.contains(e)).collect();
            entries.iter().for_each(|&e| merge(&mut first, e));
            shuffled.iter().for_each(|&e| merge(&mut second, e));
            prop_assert_eq!(first.digests(), second.digests());
            first.invariants();
            second.invariants();
        }
    }
}
