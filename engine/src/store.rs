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
//! and `graves` count it; versions of a key only grow.
//!
//! **Expiry** is lazy (a read that meets an expired entry removes it) and swept in bounded slices.
//!
//! **Replication** (`keep_tombstones`) changes what going away means:
//! - A delete leaves a tombstone under a new version.
//! - An expired entry becomes a tombstone **under its own version**: each replica converts it alone, at its own time, and
//!   all hold the same. Dropped outright, a replica that has missed it would bring back what it had replaced; under a new
//!   version, replicas would differ for ever.
//! - Nothing drops a tombstone but [`Store::purge_below`], when all replicas are known to agree up to a version. Which ones
//!   go depends on versions and expiry times alone, not on how far a replica's clock or sweep is.
//! - That version is the shard's floor: below it absence proves nothing, so [`Store::merge`] refuses what is absent.
//!
//! Not here: what commands do with it ([`crate::command`]), and who may write (the session).

use std::ops::Range;

use crate::Millis;
use crate::backend::{Backend, BackendConfig, BackendError, Chosen, Old, Part};
use crate::change_log::{Change, ChangeLog};
use crate::digest::Digest;
use crate::hash::{KeyHash, Keyspace, ShardId};
use crate::hlc::{Clock, Hlc, TooFarAhead, Version};
use crate::journal::{Change as Noted, Journal};
use crate::record::{Entry, MAX_KEY_LEN, MAX_VALUE_LEN, Meta};
use crate::table::{Look, Table};

/// Entries freed before a write that finds memory full looks again.
const RECLAIMED_AT_ONCE: usize = 512;
/// Neighbours of a random position among which [`Store::random`] chooses.
const RANDOM_WINDOW: u64 = 64;

/// Entries made elsewhere, and longer names, are taken until the memory limit is passed by this part of it.
const HEADROOM: u64 = 16;

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
    /// Longest value, in bytes; [`MAX_VALUE_LEN`] at most.
    pub max_value: usize,
    /// Changes that the log of each shard keeps, at most.
    pub change_log_entries: usize,
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
            max_value: MAX_VALUE_LEN,
            change_log_entries: 8192,
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
    /// The disk that the data is kept on is nearly full: make room there, or write later. Deletes are taken.
    #[error("MISCONF the disk that this node keeps its data on is nearly full; writes are refused until there is room")]
    DiskFull,
    /// The key is longer than [`MAX_KEY_LEN`].
    #[error("ERR key is longer than {MAX_KEY_LEN} bytes")]
    KeyTooLong,
    /// The value is longer than [`StoreConfig::max_value`].
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
    /// Refused: nothing is there, and the version is not above the shard's floor, so it may have been deleted, and the
    /// tombstone forgotten.
    BelowFloor,
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

/// What a slice of [`Store::purge_below`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Entries looked at.
    pub looked: usize,
    /// Tombstones and expired entries that are forgotten.
    pub forgotten: usize,
    /// The position to go on from; `None` when the shard is done.
    pub next: Option<KeyHash>,
}

/// What a slice of [`Store::shed`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shed {
    /// Entries looked at.
    pub looked: usize,
    /// Entries that are forgotten.
    pub forgotten: usize,
    /// Whether there is more to look at.
    pub more: bool,
}

/// What a slice of [`Store::digest_until`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digested {
    /// Entries looked at.
    pub looked: usize,
    /// The position to go on from; `None` when the shard is done.
    pub next: Option<KeyHash>,
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
    /// Of the bytes in use, those of tombstones.
    pub tombstone_bytes: u64,
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
    graves: Graves,
    floor: Version,
    /// The shedding under way: from where on what is not above which version is still to be forgotten.
    shedding: Option<(KeyHash, Version)>,
    /// Entries taken that were not above the floor of their time.
    below_floor: u64,
    /// No entry of the shard expires before this; the sweep skips the shard until then.
    next_expiry: Millis,
}

impl Shard {
    /// While the shard sheds: entries that are not above this one are about to go, or have gone.
    #[inline]
    fn condemned(&self) -> Version {
        self.shedding.map_or(Version::ZERO, |(_, floor)| floor)
    }
}

/// The tombstones of a shard.
#[derive(Debug, Default)]
struct Graves {
    count: u64,
    bytes: u64,
    /// No tombstone is older than this, as long as there are any.
    oldest: Version,
    /// The purge under way: where it goes on, and the oldest tombstone that it has left or that came meanwhile.
    round: Option<(KeyHash, Version)>,
}

impl Graves {
    fn came(&mut self, version: Version, bytes: u64) {
        self.oldest = if self.count == 0 { version } else { self.oldest.min(version) };
        self.count += 1;
        self.bytes += bytes;
        if let Some((_, left)) = &mut self.round {
            *left = version.min(*left);
        }
    }

    fn went(&mut self, bytes: u64) {
        self.count -= 1;
        self.bytes -= bytes;
    }
}

/// What reads leave behind.
#[derive(Debug, Default)]
struct Reads {
    hits: u64,
    misses: u64,
    /// An expired entry that a read met; the next operation removes it.
    doomed: Option<(KeyHash, Box<[u8]>)>,
}

impl Reads {
    fn count(&mut self, hash: KeyHash, key: &[u8], live: bool, expires: bool) {
        if live {
            self.hits += 1;
        } else {
            self.count_dead(hash, key, expires);
        }
    }

    #[cold]
    #[inline(never)]
    fn count_dead(&mut self, hash: KeyHash, key: &[u8], expired: bool) {
        self.misses += 1;
        if expired {
            self.doomed = Some((hash, key.into()));
        }
    }

    /// The live value of a key that may lie outside of its home bucket.
    #[cold]
    #[inline(never)]
    fn value_behind<'a>(&mut self, table: &'a Table, hash: KeyHash, key: &[u8], now: Millis) -> Option<&'a [u8]> {
        let found = table.get(hash, key);
        let value = found.and_then(|record| record.live_value(now));
        self.count(hash, key, value.is_some(), found.is_some_and(|record| !record.is_tombstone()));
        value
    }
}

/// The data of one core; see the file's head.
pub struct Store {
    config: StoreConfig,
    backend: Chosen,
    clock: Clock,
    shards: Vec<Shard>,
    log_bytes: usize,
    reads: Reads,
    /// What needs room on disk is refused.
    disk_full: bool,
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
    pub fn new(mut config: StoreConfig, backend: Box<dyn Backend>) -> Store {
        config.max_value = config.max_value.min(MAX_VALUE_LEN);
        let log = config.change_log_entries.min(NODE_LOG_ENTRIES / usize::from(config.keyspace.shards.get())).max(1);
        let shard = |_| Shard {
            live: 0,
            expiring: 0,
            digest: Digest::default(),
            log: ChangeLog::new(log),
            graves: Graves::default(),
            floor: Version::default(),
            shedding: None,
            below_floor: 0,
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
            reads: Reads::default(),
            disk_full: false,
            sweep_at: (0, KeyHash(0), Millis::MAX),
            stats: StoreStats::default(),
        }
    }

    /// Where the backend notes its changes, if it is one to be kept on disk.
    pub fn journal(&mut self) -> Option<&mut Journal> {
        self.backend.journal()
    }

    /// Takes a change that was noted before this store was made. Of changes that do not fit what is there, such as those of an entry that is
    /// gone, nothing is taken: a snapshot may be newer than the changes that follow it. Whoever is through with all calls
    /// [`Store::restored`], and nothing else before.
    ///
    /// # Errors
    /// [`StoreError::Backend`].
    pub fn restore(&mut self, change: Noted<'_>) -> Result<(), StoreError> {
        match change {
            Noted::Put { key, value, meta } => {
                let hash = self.locate(key);
                self.backend.put(self.shard_of(hash), hash, key, value, meta)?;
            }
            Noted::Meta { key, meta } => {
                let hash = self.locate(key);
                self.backend.set_meta(self.shard_of(hash), hash, key, meta)?;
            }
            Noted::Patch { key, at, bytes, meta } => {
                let hash = self.locate(key);
                let shard = self.shard_of(hash);
                let Some(entry) = self.backend.get(shard, hash, key).filter(|entry| !entry.tombstone) else {
                    return Ok(());
                };
                let (from, to) = (at as usize, at as usize + bytes.len());
                let part = Part { whole: entry.value.len().max(to), from, to };
                if part.whole <= MAX_VALUE_LEN {
                    self.backend.edit(shard, hash, key, part, meta, &mut |part| part.copy_from_slice(bytes));
                }
            }
            Noted::Remove { key } => {
                let hash = self.locate(key);
                self.backend.remove(self.shard_of(hash), hash, key)?;
            }
            Noted::Clear { shard } => {
                self.backend.clear(shard)?;
                while self.backend.reclaim(RECLAIMED_AT_ONCE) {}
            }
            Noted::End { .. } | Noted::After { .. } => {}
        }
        Ok(())
    }

    /// All that was noted before is there: counts it, and goes on from that time of the clock at least.
    pub fn restored(&mut self, hlc: Hlc) {
        let bits = self.config.keyspace.shards.bits();
        let mut last = hlc;
        for at in 0..self.shards.len() {
            let shard = ShardId(self.config.owned.start + at as u16);
            let state = &mut self.shards[at];
            let mut graves = Graves::default();
            self.backend.visit(shard, KeyHash(0), usize::MAX, &mut |hash, entry| {
                last = last.max(entry.version.hlc);
                state.digest.add(hash, entry.version, bits);
                state.live += u64::from(!entry.tombstone);
                if will_expire(entry.meta()) {
                    state.expiring += 1;
                    state.next_expiry = state.next_expiry.min(entry.expires_at);
                }
                if entry.tombstone {
                    graves.came(entry.version, entry.footprint() as u64);
                }
            });
            state.graves = graves;
        }
        self.clock.resume(last);
    }

    /// The latest time of the clock.
    pub fn last_hlc(&self) -> Hlc {
        self.clock.last()
    }

    /// How keys map to shards.
    #[inline]
    pub fn keyspace(&self) -> Keyspace {
        self.config.keyspace
    }

    /// What it was made with, as changed since.
    pub fn config(&self) -> &StoreConfig {
        &self.config
    }

    /// Whether deletes leave tombstones from now on: needed as soon as there are replicas.
    pub fn keep_tombstones(&mut self, keep: bool) {
        self.config.keep_tombstones = keep;
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

    fn state(&self, shard: ShardId) -> &Shard {
        &self.shards[usize::from(shard.0 - self.config.owned.start)]
    }

    /// Whether a key and a value of these lengths may be stored.
    ///
    /// # Errors
    /// [`StoreError::KeyTooLong`], [`StoreError::ValueTooLong`].
    #[inline]
    pub fn check(&self, key: &[u8], value_len: usize) -> Result<(), StoreError> {
        if key.len() > MAX_KEY_LEN {
            return Err(StoreError::KeyTooLong);
        }
        if value_len > self.config.max_value {
            return Err(StoreError::ValueTooLong);
        }
        Ok(())
    }

    #[inline]
    fn shard(&mut self, shard: ShardId) -> &mut Shard {
        &mut self.shards[usize::from(shard.0 - self.config.owned.start)]
    }

    /// See [`Backend::prefetch_place`]. A hash of another store is ignored.
    #[inline]
    pub fn prefetch_place(&self, hash: KeyHash) {
        if self.may_prefetch(hash) {
            self.backend.prefetch_place(self.config.keyspace.shard(hash), hash);
        }
    }

    /// See [`Backend::prefetch_entry`]. A hash of another store is ignored.
    #[inline]
    pub fn prefetch_entry(&self, hash: KeyHash) {
        if self.may_prefetch(hash) {
            self.backend.prefetch_entry(self.config.keyspace.shard(hash), hash);
        }
    }

    /// Backends are never asked for shards of another core; those in memory see for themselves, at no cost.
    #[inline]
    fn may_prefetch(&self, hash: KeyHash) -> bool {
        matches!(self.backend, Chosen::InMemory(_)) || self.owns(hash)
    }

    /// The live entry under a key; counts as a hit or a miss.
    pub fn get(&mut self, hash: KeyHash, key: &[u8], now: Millis) -> Option<Entry<'_>> {
        self.settle(now);
        let shard = self.shard_of(hash);
        let found = self.backend.get(shard, hash, key);
        let live = found.filter(|entry| is_live(entry, now));
        self.reads.count(hash, key, live.is_some(), found.is_some_and(|entry| !entry.tombstone));
        live
    }

    /// The value of the live entry under a key; counts as a hit or a miss. What [`Store::get`] does, for who wants no more:
    /// inlined and of few instructions, so that the CPU overlaps the cache misses of several reads in a row.
    #[inline(always)]
    pub fn value(&mut self, hash: KeyHash, key: &[u8], now: Millis) -> Option<&[u8]> {
        if self.reads.doomed.is_some() || matches!(self.backend, Chosen::Other(_)) {
            return self.settled_value(hash, key, now);
        }
        let Chosen::InMemory(tables) = &self.backend else { unreachable!("looked at just now") };
        let table = tables.table_of(hash);
        match table.look(hash, key) {
            Look::Found(record) => {
                let value = record.live_value(now);
                if value.is_some() {
                    self.reads.hits += 1;
                } else {
                    self.reads.count_dead(hash, key, !record.is_tombstone());
                }
                value
            }
            Look::Absent => {
                self.reads.misses += 1;
                None
            }
            Look::Behind => self.reads.value_behind(table, hash, key, now),
        }
    }

    #[cold]
    #[inline(never)]
    fn settled_value(&mut self, hash: KeyHash, key: &[u8], now: Millis) -> Option<&[u8]> {
        self.get(hash, key, now).map(|entry| entry.value)
    }

    /// Removes the expired entry that the last read met. A read itself cannot: it has lent the backend to its caller.
    #[inline]
    fn settle(&mut self, now: Millis) {
        if self.reads.doomed.is_some() {
            self.remove_doomed(now);
        }
    }

    #[cold]
    fn remove_doomed(&mut self, now: Millis) {
        let Some((hash, key)) = self.reads.doomed.take() else { return };
        let shard = self.shard_of(hash);
        if self.backend.get(shard, hash, &key).is_some_and(|entry| !entry.tombstone && !is_live(&entry, now)) {
            // A backend that cannot is asked again by the next read or sweep; readers see nothing either way.
            let _ = self.expire(shard, hash, &key, now);
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

    /// Refuses what needs room on disk from now on, or takes it again.
    pub fn set_disk_full(&mut self, full: bool) {
        self.disk_full = full;
    }

    /// Whether what needs room on disk is refused.
    pub fn is_disk_full(&self) -> bool {
        self.disk_full
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
        let limit = self.config.max_memory;
        self.is_over(limit) && !self.make_room(limit)
    }

    #[inline]
    fn is_over(&self, limit: u64) -> bool {
        limit != 0 && self.memory_bytes() as u64 >= limit
    }

    #[cold]
    fn make_room(&mut self, limit: u64) -> bool {
        while self.is_over(limit) {
            if !self.reclaim(RECLAIMED_AT_ONCE) {
                return !self.is_over(limit);
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
        self.admit_within(self.config.max_memory)
    }

    #[inline]
    fn admit_within(&mut self, limit: u64) -> Result<(), StoreError> {
        if self.disk_full {
            self.stats.refused += 1;
            return Err(StoreError::DiskFull);
        }
        if self.is_over(limit) && !self.make_room(limit) {
            self.stats.refused += 1;
            return Err(StoreError::OutOfMemory);
        }
        Ok(())
    }

    /// As [`Store::admit`] for an entry made elsewhere. Replicas fill unevenly: with the same limit the fullest one would
    /// refuse what the others have taken, and diverge. So these have headroom above it.
    fn admit_copy(&mut self) -> Result<(), StoreError> {
        let limit = if self.config.keep_tombstones { self.limit_and_headroom() } else { self.config.max_memory };
        self.admit_within(limit)
    }

    /// As [`Store::admit`] for a write whose records take `takes` bytes where others give back `gives`: what needs no more than
    /// before is admitted however full the store is, and growth within the headroom.
    fn admit_exchange(&mut self, takes: usize, gives: usize) -> Result<(), StoreError> {
        if self.config.max_memory == 0 || takes <= gives {
            // A value goes into the log once more, whatever it gives back.
            return if self.disk_full { self.admit_within(0) } else { Ok(()) };
        }
        // Zero would be no limit.
        self.admit_within(self.limit_and_headroom().saturating_sub((takes - gives) as u64).max(1))
    }

    fn limit_and_headroom(&self) -> u64 {
        let max = self.config.max_memory;
        max.saturating_add(max / HEADROOM)
    }

    /// The version of a write that happens now and whose data may be stored elsewhere: what [`Store::merge`] takes, here
    /// and at the other replicas.
    #[inline]
    pub fn mint(&mut self, now: Millis) -> Version {
        self.clock.tick(now)
    }

    /// Learns of a version that another node made, without an entry: later versions from here are higher.
    ///
    /// # Errors
    /// [`TooFarAhead`]; the clock is as before.
    #[inline]
    pub fn observe(&mut self, version: Version, now: Millis) -> Result<(), TooFarAhead> {
        self.clock.observe(version, now)
    }

    /// The number of this node in versions from now on: a new one for each life, so that no version names two writes.
    pub fn set_node(&mut self, node: u16) {
        self.config.node = node;
        self.clock.set_node(node);
    }

    /// The wall clock was wrong, and is right again: see [`Clock::settle`].
    pub fn settle_clock(&mut self, now: Millis) {
        self.clock.settle(now);
    }

    /// This node's wall clock is known to be behind by so much: versions of others may be ahead of it by that and the usual
    /// drift, until something else is said.
    pub fn set_behind(&mut self, ms: Millis) {
        self.clock.set_max_drift(Clock::DEFAULT_MAX_DRIFT_MS.saturating_add(ms));
    }

    /// What is stored under a key, be it expired or a tombstone.
    #[inline]
    pub fn raw(&mut self, hash: KeyHash, key: &[u8]) -> Option<Entry<'_>> {
        let shard = self.shard_of(hash);
        self.backend.get(shard, hash, key)
    }

    /// Calls `look` with what is stored under exactly that hash, expired entries and tombstones included: normally one.
    pub fn by_hash(&mut self, shard: ShardId, hash: KeyHash, look: &mut dyn FnMut(Entry<'_>)) {
        self.backend.by_hash(shard, hash, look);
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
        self.check(key, value.len())?;
        self.settle(now);
        self.admit()?;
        let version = self.clock.tick(now);
        if expires_at == 0
            && let Chosen::InMemory(tables) = &mut self.backend
            && let Some(old) = tables.overwrite(hash, key, value, version)
        {
            self.account_overwrite(hash, old, version);
            return Ok(version);
        }
        self.write_anew(hash, key, value, Meta { version, expires_at, tombstone: false })?;
        Ok(version)
    }

    /// Changes when an entry expires; 0 = never. False when there is no such key.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`], [`StoreError::Backend`].
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
        if self.disk_full {
            self.stats.refused += 1;
            return Err(StoreError::DiskFull);
        }
        let shard = self.shard_of(hash);
        let meta = Meta { version: self.clock.tick(now), expires_at, tombstone: false };
        let old = self.backend.set_meta(shard, hash, key, meta)?.expect("the key was seen just now");
        self.account(shard, hash, Some(old), Some(meta));
        Ok(true)
    }

    /// Changes the bytes of a value from `from` to `to`, which are given to `change`: the value becomes that long if it was shorter,
    /// with zeros behind what was there. An absent key is created. The expiry stays. Returns the length of the value.
    ///
    /// # Errors
    /// As [`Store::set`]; the value is as before.
    pub fn edit(
        &mut self,
        hash: KeyHash,
        key: &[u8],
        part: Range<usize>,
        now: Millis,
        change: &mut dyn FnMut(&mut [u8]),
    ) -> Result<usize, StoreError> {
        self.settle(now);
        let shard = self.shard_of(hash);
        let (len, expires_at) = self.peek(hash, key, now).map_or((None, 0), |e| (Some(e.value.len()), e.expires_at));
        let whole = part.end.max(len.unwrap_or(0));
        self.check(key, whole)?;
        self.admit()?;
        let meta = Meta { version: self.clock.tick(now), expires_at, tombstone: false };
        if len.is_some() {
            let part = Part { whole, from: part.start, to: part.end };
            if let Some(old) = self.backend.edit(shard, hash, key, part, meta, change) {
                self.account(shard, hash, Some(old), Some(meta));
                return Ok(whole);
            }
        }
        let mut value = Vec::with_capacity(whole);
        value.extend_from_slice(self.peek(hash, key, now).map_or(&[], |entry| entry.value));
        value.resize(whole, 0);
        change(&mut value[part]);
        self.write(hash, key, &value, meta)?;
        Ok(whole)
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
        if is_live(&entry, now) {
            self.bury(shard, hash, key, now)?;
            return Ok(true);
        }
        self.expire(shard, hash, key, now)?;
        Ok(false)
    }

    /// Gives the live entry under one key another key, whatever was there; value and expiry stay. False when there is none.
    ///
    /// A name takes memory, values do not: at the memory limit it goes through unless the new key is so much longer, or the
    /// tombstone of the old one so large, that the headroom above the limit does not hold it. While it is done the value
    /// exists up to three times. The new entry is written first: what fails then has changed nothing.
    ///
    /// # Errors
    /// [`StoreError::OutOfMemory`], [`StoreError::KeyTooLong`]; nothing is changed. [`StoreError::Backend`]: the old key may
    /// still be there, beside the new one.
    ///
    /// # Panics
    /// When both keys are the same.
    pub fn rename(&mut self, from: (KeyHash, &[u8]), to: (KeyHash, &[u8]), now: Millis) -> Result<bool, StoreError> {
        assert_ne!(from.1, to.1, "callers know that there is nothing to do");
        self.check(to.1, 0)?;
        self.settle(now);
        let Some(entry) = self.peek(from.0, from.1, now) else { return Ok(false) };
        let (value, expires_at) = (entry.value.to_vec(), entry.expires_at);
        let mut takes = Entry { key: to.1, ..entry }.footprint();
        let mut gives = entry.footprint();
        if self.config.keep_tombstones {
            takes += grave_bytes(from.1, Meta { tombstone: true, ..Meta::default() }) as usize;
        }
        gives += self.raw(to.0, to.1).map_or(0, |replaced| replaced.footprint());
        self.admit_exchange(takes, gives)?;
        let meta = Meta { version: self.clock.tick(now), expires_at, tombstone: false };
        self.write(to.0, to.1, &value, meta)?;
        let shard = self.shard_of(from.0);
        self.bury(shard, from.0, from.1, now)?;
        Ok(true)
    }

    /// Applies an entry made elsewhere if it is newer than what is here (last writer wins). Tombstones and expired
    /// entries count like any other. What is absent here and not above the floor is refused.
    ///
    /// # Errors
    /// [`StoreError::Clock`] for a version from too far in the future; else as [`Store::set`], but memory has headroom for
    /// what the other replicas have taken, and tombstones are always taken.
    pub fn merge(&mut self, entry: Entry<'_>, now: Millis) -> Result<Merged, StoreError> {
        self.apply(entry, now, true)
    }

    /// As [`Store::merge`] without the floor: for entries that are known not to have been deleted, because their sender
    /// serves the shard and nobody forgets tombstones meanwhile. It fills a replica that does not serve yet. While the shard
    /// sheds, what is condemned is refused here too ([`Merged::BelowFloor`]): it would be forgotten again.
    ///
    /// # Errors
    /// As [`Store::merge`].
    pub fn fill(&mut self, entry: Entry<'_>, now: Millis) -> Result<Merged, StoreError> {
        self.apply(entry, now, false)
    }

    fn apply(&mut self, entry: Entry<'_>, now: Millis, floored: bool) -> Result<Merged, StoreError> {
        self.check(entry.key, entry.value.len())?;
        self.settle(now);
        self.clock.observe(entry.version, now)?;
        let hash = self.locate(entry.key);
        let shard = self.shard_of(hash);
        let raised = self.tombstone_floor(shard);
        // What would go with what is condemned is not taken by anybody: who has sent it would take it for kept.
        let condemned = self.state(shard).condemned();
        let floor = if floored { raised } else { condemned };
        match self.backend.get(shard, hash, entry.key) {
            // What is about to be shed counts as absent, so that it does not matter how far the shedding has come.
            Some(known) if entry.version <= floor && known.version <= condemned => return Ok(Merged::BelowFloor),
            Some(known) if known.version >= entry.version => return Ok(Merged::Stale),
            // A tombstone that may be forgotten counts as absent, so that it does not matter how far the purge has come.
            Some(known) if entry.version <= floor && is_purged(&known, floor) => return Ok(Merged::BelowFloor),
            None if entry.version <= floor => return Ok(Merged::BelowFloor),
            _ => {}
        }
        let mut meta = entry.meta();
        meta.tombstone |= self.config.keep_tombstones && !is_live(&entry, now);
        if meta.tombstone {
            self.write(hash, entry.key, &[], meta)?;
        } else {
            self.admit_copy()?;
            self.write(hash, entry.key, entry.value, meta)?;
        }
        self.shard(shard).below_floor += u64::from(entry.version <= raised);
        Ok(Merged::Applied)
    }

    /// [`Store::write`], out of the way of a caller that writes in place most of the time.
    #[inline(never)]
    fn write_anew(&mut self, hash: KeyHash, key: &[u8], value: &[u8], meta: Meta) -> Result<(), StoreError> {
        self.write(hash, key, value, meta)
    }

    #[inline]
    fn write(&mut self, hash: KeyHash, key: &[u8], value: &[u8], meta: Meta) -> Result<(), StoreError> {
        let shard = self.shard_of(hash);
        let old = self.backend.put(shard, hash, key, value, meta)?.map(|old: Old| old.meta);
        self.account(shard, hash, old, Some(meta));
        if meta.tombstone || old.is_some_and(|old| old.tombstone) {
            self.account_graves(shard, key, old, Some(meta));
        }
        Ok(())
    }

    /// As [`Store::account`] for a readable entry without expiry that replaced another such.
    #[inline]
    fn account_overwrite(&mut self, hash: KeyHash, old: Version, new: Version) {
        let bits = self.config.keyspace.shards.bits();
        self.stats.writes += 1;
        let shard = self.shard_of(hash);
        let shard = self.shard(shard);
        shard.digest.replace(hash, old, new, bits);
        let grown = shard.log.push(Change { hash, hlc: new.hlc });
        self.log_bytes += grown;
    }

    /// Takes note of a change that the backend has made.
    #[inline]
    fn account(&mut self, shard: ShardId, hash: KeyHash, old: Option<Meta>, new: Option<Meta>) {
        let bits = self.config.keyspace.shards.bits();
        self.stats.writes += 1;
        let shard = self.shard(shard);
        if let Some(old) = old {
            shard.digest.remove(hash, old.version, bits);
            shard.live -= u64::from(!old.tombstone);
            shard.expiring -= u64::from(will_expire(old));
        }
        if let Some(new) = new {
            shard.digest.add(hash, new.version, bits);
            shard.live += u64::from(!new.tombstone);
            if will_expire(new) {
                shard.expiring += 1;
                shard.next_expiry = shard.next_expiry.min(new.expires_at);
            }
            let grown = shard.log.push(Change { hash, hlc: new.version.hlc });
            self.log_bytes += grown;
        }
    }

    /// Takes note of a tombstone that came, went, or both.
    #[cold]
    fn account_graves(&mut self, shard: ShardId, key: &[u8], old: Option<Meta>, new: Option<Meta>) {
        let graves = &mut self.shard(shard).graves;
        if let Some(old) = old.filter(|old| old.tombstone) {
            graves.went(grave_bytes(key, old));
        }
        if let Some(new) = new.filter(|new| new.tombstone) {
            graves.came(new.version, grave_bytes(key, new));
        }
    }

    /// Removes an entry, leaving a tombstone if they are kept.
    fn bury(&mut self, shard: ShardId, hash: KeyHash, key: &[u8], now: Millis) -> Result<(), StoreError> {
        let version = self.clock.tick(now);
        if self.config.keep_tombstones {
            return self.write(hash, key, &[], Meta { version, expires_at: 0, tombstone: true });
        }
        let old = self.backend.remove(shard, hash, key)?;
        self.account(shard, hash, old.map(|old| old.meta), None);
        let grown = self.shard(shard).log.push(Change { hash, hlc: version.hlc });
        self.log_bytes += grown;
        Ok(())
    }

    /// Removes an expired entry; where tombstones are kept it becomes one, under its own version and in no log: the other
    /// replicas do the same by themselves.
    fn expire(&mut self, shard: ShardId, hash: KeyHash, key: &[u8], now: Millis) -> Result<(), StoreError> {
        if !self.config.keep_tombstones {
            self.bury(shard, hash, key, now)?;
        } else if let Some(known) = self.backend.get(shard, hash, key).filter(|known| !known.tombstone) {
            // The expiry time stays: it says when the tombstone may be forgotten, on all replicas alike.
            let grave = Meta { tombstone: true, ..known.meta() };
            self.backend.put(shard, hash, key, &[], grave)?;
            self.account_graves(shard, key, None, Some(grave));
            let shard = self.shard(shard);
            shard.live -= 1;
            shard.expiring -= 1;
        }
        self.stats.expired += 1;
        Ok(())
    }

    /// Raises the floor of a shard at least to there, and forgets its tombstones and what had expired up to there, whatever
    /// floor a later purge had raised: a slice that looks at `budget` entries (and those that share the last one's hash) from
    /// position `from` on (the first slice: from the first hash of the shard or less). To be called only when all replicas hold
    /// the same up to `floor`, whose time lies so far back that all clocks have passed it. Reads and writes may come between
    /// slices; what they take below the floor, [`Store::below_floor`] counts.
    ///
    /// # Errors
    /// [`StoreError::Backend`]. The slice can be repeated.
    pub fn purge_below(
        &mut self,
        shard: ShardId,
        floor: Version,
        from: KeyHash,
        budget: usize,
    ) -> Result<Purged, StoreError> {
        self.reads.doomed = None;
        let first = self.config.keyspace.first_hash(shard);
        let state = self.shard(shard);
        state.floor = state.floor.max(floor);
        let mut left = match state.graves.round {
            _ if from <= first => Version::MAX,
            Some((at, left)) if at == from => left,
            // Slices that do not follow each other learn nothing about what is left.
            _ => Version::ZERO,
        };
        let mut purged = Purged::default();
        let mut dead: Vec<(KeyHash, Vec<u8>)> = Vec::new();
        purged.next = self.backend.visit(shard, from, budget.max(1), &mut |hash, entry| {
            purged.looked += 1;
            if is_purged(&entry, floor) {
                dead.push((hash, entry.key.to_vec()));
            } else if entry.tombstone {
                left = left.min(entry.version);
            }
        });
        self.shard(shard).graves.round = None;
        for (hash, key) in dead {
            let Some(old) = self.backend.remove(shard, hash, &key)? else { continue };
            self.forget(shard, hash, &key, old.meta);
            self.stats.expired += u64::from(!old.meta.tombstone);
            purged.forgotten += 1;
        }
        let graves = &mut self.shard(shard).graves;
        match purged.next {
            Some(next) => graves.round = Some((next, left)),
            None => graves.oldest = graves.oldest.max(left),
        }
        Ok(purged)
    }

    /// Takes note of an entry that the backend has removed and that leaves no trace.
    fn forget(&mut self, shard: ShardId, hash: KeyHash, key: &[u8], old: Meta) {
        let bits = self.config.keyspace.shards.bits();
        let state = self.shard(shard);
        state.digest.remove(hash, old.version, bits);
        state.live -= u64::from(!old.tombstone);
        state.expiring -= u64::from(will_expire(old));
        if old.tombstone {
            state.graves.went(grave_bytes(key, old));
        }
    }

    /// Raises the floor of a shard to there, and begins to forget all of it that is not above the floor, as if it had never been
    /// here. For what may have been deleted elsewhere, and the tombstone purged. [`Store::shed`] does it, in slices; until it
    /// is through, [`Store::merge`] and [`Store::fill`] take what is still to go for absent and refuse all that is not above the
    /// floor, but reads and digests find it.
    pub fn shed_below(&mut self, shard: ShardId, floor: Version) {
        self.raise_floor(shard, floor);
        let first = self.config.keyspace.first_hash(shard);
        let state = self.shard(shard);
        // What is left of an earlier one is not above its floor.
        let left = state.shedding.map_or(Version::ZERO, |(_, left)| left);
        state.shedding = Some((first, floor.max(left)));
    }

    /// Forgets what [`Store::shed_below`] has condemned: a slice that looks at `budget` entries (and those that share the last
    /// one's hash). Reads and writes may come between slices.
    ///
    /// # Errors
    /// [`StoreError::Backend`]. The slice can be repeated.
    pub fn shed(&mut self, shard: ShardId, budget: usize) -> Result<Shed, StoreError> {
        let mut shed = Shed::default();
        let Some((from, floor)) = self.state(shard).shedding else { return Ok(shed) };
        self.reads.doomed = None;
        let mut condemned: Vec<(KeyHash, Vec<u8>)> = Vec::new();
        let next = self.backend.visit(shard, from, budget.max(1), &mut |hash, entry| {
            shed.looked += 1;
            if entry.version <= floor {
                condemned.push((hash, entry.key.to_vec()));
            }
        });
        for (hash, key) in condemned {
            if let Some(old) = self.backend.remove(shard, hash, &key)? {
                self.forget(shard, hash, &key, old.meta);
                shed.forgotten += 1;
            }
        }
        self.shard(shard).shedding = next.map(|next| (next, floor));
        shed.more = next.is_some();
        Ok(shed)
    }

    /// Whether [`Store::shed`] is not through with a shard.
    pub fn is_shedding(&self, shard: ShardId) -> bool {
        self.state(shard).shedding.is_some()
    }

    /// An entry not newer than this that is absent here may have been deleted.
    pub fn tombstone_floor(&self, shard: ShardId) -> Version {
        self.state(shard).floor
    }

    /// Raises the floor of a shard and forgets nothing: from now on [`Store::merge`] refuses what is absent and not above it.
    /// A floor never sinks.
    pub fn raise_floor(&mut self, shard: ShardId, floor: Version) {
        let state = self.shard(shard);
        state.floor = state.floor.max(floor);
    }

    /// How many entries of a shard were taken though they were not above its floor: a tombstone, what replaced something older,
    /// what [`Store::fill`] brought. As long as it stays, nothing has come below the floor.
    pub fn below_floor(&self, shard: ShardId) -> u64 {
        self.state(shard).below_floor
    }

    /// Tombstones of a shard. They stay until [`Store::purge_below`]: a replica that forgot them by itself would take back what
    /// was deleted.
    pub fn tombstones(&self, shard: ShardId) -> u64 {
        self.state(shard).graves.count
    }

    /// A version that no tombstone of the shard is older than; near the oldest one after each purge. `None` when there are no
    /// tombstones.
    pub fn oldest_tombstone(&self, shard: ShardId) -> Option<Version> {
        let graves = &self.state(shard).graves;
        (graves.count > 0).then_some(graves.oldest)
    }

    /// Drops all of a shard that this node no longer holds, as if it had never been here: entries, tombstones, floor and
    /// change log, whose readers get a gap. Then gives back memory of about `budget` entries; whether there is more to give
    /// back, by calling again or with [`Store::reclaim`].
    ///
    /// # Errors
    /// [`StoreError::Backend`].
    pub fn drop_shard(&mut self, shard: ShardId, budget: usize) -> Result<bool, StoreError> {
        self.reads.doomed = None;
        let state = self.state(shard);
        if state.digest.count > 0 || !state.log.is_empty() || state.floor > Version::ZERO {
            self.backend.clear(shard)?;
            let state = self.shard(shard);
            state.shedding = None;
            (state.live, state.expiring, state.next_expiry) = (0, 0, Millis::MAX);
            (state.digest, state.graves, state.floor) = (Digest::default(), Graves::default(), Version::ZERO);
            let freed = state.log.forget();
            self.log_bytes -= freed;
        }
        Ok(self.reclaim(budget))
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
                if !will_expire(entry.meta()) {
                    return;
                }
                if entry.expires_at <= now {
                    expired.push((hash, entry.key.to_vec()));
                } else {
                    earliest = earliest.min(entry.expires_at);
                }
            });
            for (hash, key) in expired.drain(..) {
                if self.expire(shard, hash, &key, now).is_ok() {
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

    /// Some live entry, chosen by `random`: a shard by its share of the entries, then one of the first 64 behind a random
    /// position in it. Of few entries each is as likely as any other, of many nearly so: the first entry behind a
    /// position alone would follow the gaps between hashes, and be nearly always the same one of two.
    pub fn random(&mut self, random: u64, now: Millis, look: &mut dyn FnMut(Entry<'_>)) -> bool {
        let held: u64 = self.shards.iter().map(|shard| shard.live).sum();
        let Some(mut rank) = random.checked_rem(held) else { return false };
        let mut shard = ShardId(self.config.owned.start);
        while rank >= self.state(shard).live {
            rank -= self.state(shard).live;
            shard.0 += 1;
        }
        let mut from = self.config.keyspace.first_hash(shard);
        if self.state(shard).live > RANDOM_WINDOW {
            from.0 |= random.rotate_left(32) >> self.config.keyspace.shards.bits();
            rank %= RANDOM_WINDOW;
        }
        let mut chosen = false;
        self.backend.visit(shard, from, RANDOM_WINDOW as usize, &mut |_, entry| {
            if !chosen && is_live(&entry, now) {
                chosen = rank == 0;
                if chosen {
                    look(entry);
                } else {
                    rank -= 1;
                }
            }
        });
        // Expired entries and tombstones may have left too few there.
        chosen || self.first_from(from, now, look)
    }

    /// The first live entry from a position on, in a circle.
    fn first_from(&mut self, from: KeyHash, now: Millis, look: &mut dyn FnMut(Entry<'_>)) -> bool {
        let mut from = Some(from);
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
        self.state(shard).digest
    }

    /// Adds to `digest` the entries with versions up to `until`: a slice that looks at `budget` entries (and those that share the
    /// last one's hash) from position `from` on. Writes may come between slices: each key counts as it is when its slice is
    /// looked at, once at most.
    pub fn digest_until(
        &mut self,
        shard: ShardId,
        until: Version,
        from: KeyHash,
        budget: usize,
        digest: &mut Digest,
    ) -> Digested {
        let bits = self.config.keyspace.shards.bits();
        let mut looked = 0;
        let next = self.backend.visit(shard, from, budget.max(1), &mut |hash, entry| {
            looked += 1;
            if entry.version <= until {
                digest.add(hash, entry.version, bits);
            }
        });
        Digested { looked, next }
    }

    /// Recent changes of a shard.
    pub fn change_log(&self, shard: ShardId) -> &ChangeLog {
        &self.state(shard).log
    }

    /// Deletes everything that can be read. The memory comes back with [`Store::reclaim`].
    ///
    /// With tombstones kept each key leaves one, as any delete does, all in this step; otherwise the tables are dropped.
    ///
    /// # Errors
    /// [`StoreError::Backend`].
    pub fn clear(&mut self, now: Millis) -> Result<(), StoreError> {
        self.reads.doomed = None;
        let all_at_once = !self.config.keep_tombstones && self.backend.clear_all()?;
        for shard in self.config.owned.clone().map(ShardId) {
            if self.config.keep_tombstones {
                let mut keys = Vec::new();
                self.backend.visit(shard, KeyHash(0), usize::MAX, &mut |hash, entry| {
                    if !entry.tombstone {
                        keys.push((hash, entry.key.to_vec(), is_live(&entry, now)));
                    }
                });
                for (hash, key, live) in keys {
                    if live {
                        self.bury(shard, hash, &key, now)?;
                    } else {
                        self.expire(shard, hash, &key, now)?;
                    }
                }
                continue;
            }
            if !all_at_once {
                self.backend.clear(shard)?;
            }
            let version = self.clock.tick(now);
            let shard = self.shard(shard);
            (shard.digest, shard.graves) = (Digest::default(), Graves::default());
            (shard.live, shard.expiring, shard.next_expiry) = (0, 0, Millis::MAX);
            (shard.floor, shard.shedding) = (version, None);
        }
        self.stats.writes += 1;
        Ok(())
    }

    /// Number of keys (expired ones that were not yet met included).
    pub fn len(&self) -> u64 {
        self.shards.iter().map(|shard| shard.live).sum::<u64>() - u64::from(self.reads.doomed.is_some())
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sets hits, misses, expired, writes and refused to zero.
    pub fn reset_stats(&mut self) {
        self.stats = StoreStats::default();
        (self.reads.hits, self.reads.misses) = (0, 0);
    }

    /// Counters and sizes now.
    pub fn stats(&self) -> StoreStats {
        StoreStats {
            keys: self.len(),
            expiring: self.shards.iter().map(|s| s.expiring).sum(),
            tombstones: self.shards.iter().map(|s| s.graves.count).sum(),
            tombstone_bytes: self.shards.iter().map(|s| s.graves.bytes).sum(),
            change_log: self.shards.iter().map(|s| s.log.len() as u64).sum(),
            memory_bytes: self.memory_bytes() as u64,
            hits: self.reads.hits,
            misses: self.reads.misses,
            ..self.stats
        }
    }

    /// Checks what the file's head promises, by walking everything. For tests and the simulator.
    ///
    /// # Panics
    /// When a promise is broken.
    pub fn invariants(&mut self) {
        self.reads.doomed = None;
        let bits = self.config.keyspace.shards.bits();
        for at in 0..self.shards.len() {
            let shard = ShardId(self.config.owned.start + at as u16);
            let (mut digest, mut live, mut expiring) = (Digest::default(), 0, 0);
            let mut earliest = Millis::MAX;
            let (mut graves, mut grave_size, mut oldest) = (0, 0, Version::MAX);
            self.backend.visit(shard, KeyHash(0), usize::MAX, &mut |hash, entry| {
                digest.add(hash, entry.version, bits);
                live += u64::from(!entry.tombstone);
                if entry.tombstone {
                    assert!(entry.value.is_empty(), "{shard:?}: a tombstone with a value");
                    graves += 1;
                    grave_size += entry.footprint() as u64;
                    oldest = oldest.min(entry.version);
                }
                if will_expire(entry.meta()) {
                    expiring += 1;
                    earliest = earliest.min(entry.expires_at);
                }
            });
            let known = &self.shards[at];
            assert_eq!((known.digest, known.live, known.expiring), (digest, live, expiring), "{shard:?}");
            let swept_now = self.sweep_at.0 == at && self.sweep_at.1 != KeyHash(0);
            assert!(swept_now || known.next_expiry <= earliest, "{shard:?}: the sweep would skip an entry");
            assert_eq!((known.graves.count, known.graves.bytes), (graves, grave_size), "{shard:?}");
            assert!(graves == 0 || known.graves.oldest <= oldest, "{shard:?}: an older tombstone than said");
        }
    }
}

#[inline]
fn is_live(entry: &Entry<'_>, now: Millis) -> bool {
    !entry.tombstone && (entry.expires_at == 0 || entry.expires_at > now)
}

/// Whether it is an entry that an expiry ends. A tombstone may have an expiry time too: its entry's.
#[inline]
fn will_expire(meta: Meta) -> bool {
    meta.expires_at != 0 && !meta.tombstone
}

/// Whether nobody needs an entry any more when all replicas have agreed up to `floor`: a deleted one, or one that had
/// expired by then, be it a tombstone already or not. Says the same on all replicas.
fn is_purged(entry: &Entry<'_>, floor: Version) -> bool {
    let over = if entry.expires_at == 0 { entry.tombstone } else { entry.expires_at <= floor.hlc.millis() };
    over && entry.version <= floor
}

fn grave_bytes(key: &[u8], meta: Meta) -> u64 {
    let Meta { version, expires_at, tombstone } = meta;
    Entry { key, value: &[], version, expires_at, tombstone }.footprint() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Registry;
    use crate::hash::ShardCount;
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
            let value = self.value(hash, key.as_bytes(), now).map(<[u8]>::to_vec);
            assert_eq!(value.as_deref(), self.peek(hash, key.as_bytes(), now).map(|entry| entry.value), "{key}");
            value.map(|value| String::from_utf8(value).unwrap())
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
    fn what_is_written_in_place_counts_like_any_write() {
        for mut store in [plain(), replicated(3)] {
            let keys = ["k", "a key of 15 byt", "a key that is longer than two words"];
            let writes = [("one", 0), ("two", 0), ("longer", 0), ("expire", 100), ("expire", 200), ("plain!", 0)];
            for (now, (value, expires_at)) in (1..).zip(writes) {
                for key in keys {
                    let before = store.version(store.locate(key.as_bytes()), key.as_bytes(), now);
                    store.put(key, value, expires_at, now);
                    assert!(store.version(store.locate(key.as_bytes()), key.as_bytes(), now) > before);
                    assert_eq!(store.read(key, now).as_deref(), Some(value));
                }
                store.invariants();
            }
            assert!(store.del("k", 10));
            store.put("k", "after!", 0, 11);
            assert_eq!(store.read("k", 12).as_deref(), Some("after!"));
            assert_eq!((store.read("absent", 12), store.len(), store.stats().expiring), (None, 3, 0));
            assert_eq!((store.stats().hits, store.stats().misses, store.stats().writes), (19, 1, 20));
            store.reset_stats();
            assert_eq!((store.stats().hits, store.stats().misses, store.stats().writes), (0, 0, 0));
            store.invariants();
        }
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
    fn a_full_store_renames_and_longer_names_stay_within_the_headroom() {
        for keep_tombstones in [false, true] {
            let limit = 1 << 20;
            let mut store = store(StoreConfig { max_memory: limit, keep_tombstones, ..StoreConfig::default() });
            let mut held = 0;
            while store.set(store.locate(name(held).as_bytes()), name(held).as_bytes(), &[b'v'; 1000], 0, 1).is_ok() {
                held += 1;
            }
            fn name(n: u64) -> String {
                format!("k{n:09}")
            }
            let rename = |store: &mut Store, from: &str, to: &str| {
                let (from, to) = ((store.locate(from.as_bytes()), from), (store.locate(to.as_bytes()), to));
                store.rename((from.0, from.1.as_bytes()), (to.0, to.1.as_bytes()), 1)
            };
            let full = store.memory_bytes();
            assert_eq!(rename(&mut store, &name(0), "k"), Ok(true));
            assert_eq!(rename(&mut store, &name(0), "k2"), Ok(false), "it is gone");
            assert_eq!(rename(&mut store, &name(1), &name(2)), Ok(true), "what is replaced gives room");
            let (mut at, long) = (3, "x".repeat(10_000));
            while rename(&mut store, &name(at), &format!("{long}{at}")) == Ok(true) {
                at += 1;
            }
            assert!((5..held).contains(&at), "{at} of {held}: some, not all");
            let most = (limit + limit / HEADROOM) as usize;
            assert!(store.memory_bytes() <= most + 8192, "{} above {most}, of {full}", store.memory_bytes());
            assert!(store.memory_bytes() > most - 20_000, "and it is used");
            assert_eq!(store.read(&name(at), 1).map(|value| value.len()), Some(1000), "refused, nothing is lost");
            assert_eq!(store.len(), held - 1);
            // Far above a limit that has sunk, a name that takes no more goes through.
            store.set_max_memory(1);
            let same = name(at).replace('k', "K");
            let tried = rename(&mut store, &name(at), &same);
            assert_eq!(tried, if keep_tombstones { Err(StoreError::OutOfMemory) } else { Ok(true) });
            assert_eq!(store.stats().refused, 2 + u64::from(keep_tombstones));
            store.invariants();
        }
    }

    #[test]
    fn memory_comes_back_when_everything_is_deleted() {
        for name in ["memory", crate::backend::DEFAULT_BACKEND] {
            let config = StoreConfig::default();
            let backend = Registry::default().make(name, &config.backend()).unwrap();
            let mut store = Store::new(config, backend);
            for n in 0..20_000 {
                store.put(&format!("k{n}"), &"v".repeat(n % 300), if n % 3 == 0 { 1 << 40 } else { 0 }, 1);
            }
            store.clear(2).unwrap();
            assert_eq!(store.len(), 0);
            store.invariants();
            let before = store.backend.memory_bytes();
            assert!(before > 1 << 20, "{name}: freed at once, which takes long: {before} left");
            store.put("k", "v", 0, 3);
            let mut slices = 0;
            while store.reclaim(512) {
                slices += 1;
                store.invariants();
            }
            assert!(slices > 20, "{name}: {slices}");
            assert!(store.backend.memory_bytes() < 64 << 10, "{name}: {}", store.backend.memory_bytes());
            assert_eq!(store.len(), 1);
            store.invariants();
        }
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
    fn a_purge_forgets_tombstones_in_slices_and_the_floor_refuses_what_they_covered() {
        let mut store = store(StoreConfig { keep_tombstones: true, ..StoreConfig::default() });
        for n in 0..1000 {
            store.put(&format!("{{tag}}{n}"), "v", 0, n);
            store.del(&format!("{{tag}}{n}"), n);
        }
        // Older than all: tombstones come in any order.
        let early = Version { hlc: Hlc::new(0, 0), node: 7 };
        store
            .merge(Entry { key: b"{tag}late", value: b"", version: early, expires_at: 0, tombstone: true }, 9)
            .unwrap();
        let shard = store.keyspace().shard(store.locate(b"{tag}"));
        assert_eq!((store.tombstones(shard), store.oldest_tombstone(shard)), (1001, Some(early)));

        let floor = Version { hlc: Hlc::new(899, u16::MAX), node: 0 };
        let newer = Version { hlc: Hlc::new(900, 0), node: 7 };
        let (mut from, mut forgotten, mut slices) = (Some(KeyHash(0)), 0, 0);
        while let Some(at) = from {
            let purged = store.purge_below(shard, floor, at, 100).unwrap();
            assert!(purged.looked <= 100, "{purged:?}");
            (from, forgotten, slices) = (purged.next, forgotten + purged.forgotten, slices + 1);
            // A late write from before is refused wherever the purge is.
            let version = Version { hlc: Hlc::new(899, 0), node: 7 };
            let late = Entry { key: b"{tag}5", value: b"v", version, expires_at: 0, tombstone: false };
            assert_eq!(store.merge(late, 1000), Ok(Merged::BelowFloor));
            if slices == 10 {
                // Behind where the purge is, and older than what it has left.
                let grave = Entry { key: b"{tag}new", value: b"", version: newer, expires_at: 0, tombstone: true };
                assert_eq!(store.merge(grave, 1000), Ok(Merged::Applied));
            }
            store.invariants();
        }
        assert_eq!((forgotten, slices), (901, 11));
        assert_eq!((store.tombstones(shard), store.tombstone_floor(shard)), (101, floor));
        assert_eq!(store.oldest_tombstone(shard), Some(newer));
        store.purge_below(shard, Version { hlc: Hlc::new(1000, 0), node: 0 }, KeyHash(0), usize::MAX).unwrap();
        assert_eq!((store.stats().tombstones, store.stats().tombstone_bytes), (0, 0));
        assert_eq!(store.oldest_tombstone(shard), None);
        store.invariants();
    }

    #[test]
    fn shedding_forgets_what_is_not_above_the_floor_and_keeps_the_rest() {
        let mut store = store(StoreConfig { keep_tombstones: true, ..StoreConfig::default() });
        for n in 0..3000 {
            store.put(&format!("{{tag}}{n}"), "v", if n % 3 == 0 { 1 << 40 } else { 0 }, n);
            if n % 2 == 0 {
                store.del(&format!("{{tag}}{n}"), n);
            }
        }
        let shard = store.keyspace().shard(store.locate(b"{tag}"));
        let floor = Version { hlc: Hlc::new(1999, u16::MAX), node: u16::MAX };
        store.shed_below(shard, floor);
        let mut slices = Vec::new();
        while store.is_shedding(shard) {
            // What is still to go is refused as if it had gone, wherever the shedding is.
            for n in [0, 1, 998, 999, 1997, 1998] {
                let key = format!("{{tag}}{n}");
                let late = Version { hlc: Hlc::new(n + 1, 0), node: 2 };
                let late = Entry { key: key.as_bytes(), value: b"x", version: late, expires_at: 0, tombstone: false };
                assert_eq!(store.merge(late, 5000), Ok(Merged::BelowFloor), "{n} after {slices:?}");
            }
            // So is what is let in below a floor: said to be here, it would go with the rest.
            for n in [1, 2, 998, 999, 1997, 1998, 5000] {
                let key = format!("{{tag}}{n}");
                for version in [Version { hlc: Hlc::new(1, 0), node: 2 }, floor] {
                    let grave = Entry { key: key.as_bytes(), value: b"", version, expires_at: 0, tombstone: true };
                    assert_eq!(store.fill(grave, 5000), Ok(Merged::BelowFloor), "{n} after {slices:?}");
                }
            }
            // What hides it and stays makes it superfluous.
            let grave = Entry { key: b"{tag}2500", value: b"", version: floor, expires_at: 0, tombstone: true };
            assert_eq!(store.fill(grave, 5000), Ok(Merged::Stale));
            // What is above counts, also on what is still to go.
            let newer = Version { hlc: Hlc::new(4000 + slices.len() as u64, 0), node: 2 };
            let newer = Entry { key: b"{tag}7", value: b"new", version: newer, expires_at: 0, tombstone: false };
            assert_eq!(store.merge(newer, 5000), Ok(Merged::Applied));
            let shed = store.shed(shard, 100).unwrap();
            assert_eq!(shed.more, store.is_shedding(shard));
            slices.push((shed.looked, shed.forgotten));
            store.invariants();
        }
        assert!(slices.iter().all(|(looked, _)| *looked <= 100) && slices.len() >= 30, "{slices:?}");
        assert_eq!(slices.iter().map(|(_, forgotten)| forgotten).sum::<usize>(), 1999, "{slices:?}");
        assert_eq!(store.shed(shard, 100), Ok(Shed::default()), "it is through");
        let grave = Entry { key: b"{tag}7", value: b"", version: floor, expires_at: 0, tombstone: true };
        assert_eq!(store.fill(grave, 5000), Ok(Merged::Stale), "the new one is above");
        let hash = store.locate(b"{tag}7");
        assert!(store.exists(hash, b"{tag}7", 5000));
        assert_eq!((store.digest(shard).count, store.len(), store.tombstones(shard)), (1001, 501, 500));
        assert_eq!((store.tombstone_floor(shard), store.stats().expired), (floor, 0));
        let hash = store.locate(b"{tag}2001");
        assert!(store.exists(hash, b"{tag}2001", 5000) && !store.exists(hash, b"{tag}1999", 5000));
        store.invariants();
    }

    #[test]
    fn a_shedding_that_is_overtaken_by_a_higher_floor_or_a_drop_leaves_nothing_behind() {
        let mut store = store(StoreConfig { keep_tombstones: true, ..StoreConfig::default() });
        let fill = |store: &mut Store| (1..=1000).for_each(|n| store.put(&format!("{{tag}}{n}"), "v", 0, n));
        let at = |ms| Version { hlc: Hlc::new(ms, u16::MAX), node: u16::MAX };
        fill(&mut store);
        let shard = store.keyspace().shard(store.locate(b"{tag}"));
        store.shed_below(shard, at(500));
        store.shed(shard, 300).unwrap();
        store.shed_below(shard, at(700));
        while store.shed(shard, 300).unwrap().more {}
        assert_eq!((store.len(), store.tombstone_floor(shard)), (300, at(700)));
        store.shed_below(shard, at(800));
        store.drop_shard(shard, 0).unwrap();
        assert!(!store.is_shedding(shard));
        store.put("{tag}", "new", 0, 6000);
        store.shed(shard, 300).unwrap();
        assert_eq!(store.len(), 1);
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
        assert_eq!(store.edit(hash, b"k", 4..5, 2, &mut |v| v[0] = b'!'), Ok(5));
        assert_eq!(store.read("k", 3).as_deref(), Some("abc\0!"));
        assert_eq!(store.edit(hash, b"k", 0..2, 4, &mut |v| v[0] = b'X'), Ok(5));
        assert_eq!(store.read("k", 499).as_deref(), Some("Xbc\0!"));
        assert_eq!(store.read("k", 500), None);
        store.invariants();
    }

    #[test]
    fn random_takes_each_of_few_keys_as_often() {
        // Whatever their hashes: near each other or far apart, in one shard or in two.
        for (pair, keys) in [2, 3, 10].into_iter().flat_map(|keys| (0..20).map(move |pair| (pair, keys))) {
            let mut store = plain();
            for key in 0..keys {
                store.put(&format!("{pair}:{key}"), "v", 0, 1);
            }
            let mut counts = std::collections::BTreeMap::new();
            for random in 1..=1000u64 {
                let random = random.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                assert!(store.random(random, 1, &mut |entry| *counts.entry(entry.key.to_vec()).or_insert(0) += 1));
            }
            let least = counts.values().min().copied().unwrap_or(0);
            assert!(counts.len() == keys && least * keys > 700, "{pair}: {counts:?}");
        }
    }

    #[test]
    fn random_reaches_all_of_many_keys() {
        let mut store = plain();
        for key in 0..40_000 {
            store.put(&format!("{key}"), "v", 0, 1);
        }
        let mut seen = std::collections::BTreeSet::new();
        for random in 1..=40_000u64 {
            let random = random.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            assert!(store.random(random, 1, &mut |entry| _ = seen.insert(entry.key.to_vec())));
        }
        // Draws with equal chances would leave 1/e of them out: 63 % are seen.
        assert!(seen.len() > 40_000 * 55 / 100, "{}", seen.len());
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

    #[test]
    fn versions_are_minted_and_seen_without_data() {
        let mut store = replicated(1);
        let seen = Version { hlc: Hlc::new(1_400, 3), node: 2 };
        assert!(store.observe(Version { hlc: Hlc::new(1_501, 0), node: 2 }, 1_000).is_err());
        assert_eq!(store.mint(1_000).hlc, Hlc::new(1_000, 0), "what was refused has not moved the clock");
        store.observe(seen, 1_000).unwrap();
        store.set_node(77);
        let minted = store.mint(1_000);
        assert!(minted > seen && minted.node == 77, "{minted:?}");
        assert!(store.is_empty());
    }

    #[test]
    fn an_expired_entry_becomes_a_tombstone_under_its_own_version() {
        let mut store = replicated(1);
        for key in ["read", "swept", "deleted", "cleared"] {
            store.put(key, &"v".repeat(1000), 100, 1);
        }
        let (digests, memory) = (store.digests(), store.memory_bytes());
        assert_eq!(store.read("read", 200), None);
        assert!(!store.del("deleted", 200), "an expired entry cannot be deleted");
        let log = store.stats().change_log;
        store.clear(200).unwrap();
        store.put("new", "v", 300, 200);
        let hash = store.locate(b"swept");
        assert!(store.raw(hash, b"swept").is_some_and(|entry| entry.tombstone && entry.expires_at == 100));
        while store.sweep(400, 2).more {}
        assert_eq!((store.stats().tombstones, store.stats().expiring, store.stats().expired), (5, 0, 5));
        assert_eq!(store.stats().change_log, log + 1, "only the new entry is a change");
        assert!(store.memory_bytes() < memory - 3500, "values are given back");
        let mut held = replicated(2);
        held.put("new", "v", 300, 200);
        assert_ne!(digests, held.digests());
        let hash = store.locate(b"new");
        let version = store.raw(hash, b"new").unwrap().version;
        let again = Entry { key: b"new", value: b"v", version, expires_at: 300, tombstone: false };
        assert_eq!(store.merge(again, 400), Ok(Merged::Stale), "the same write, not yet expired elsewhere");
        let version = store.mint(400);
        let late = Entry { key: b"late", value: b"v", version, expires_at: 400, tombstone: false };
        assert_eq!(store.merge(late, 400), Ok(Merged::Applied));
        assert_eq!((store.stats().tombstones, store.stats().keys), (6, 0), "expired when it came");
        store.invariants();
    }

    #[test]
    fn copies_have_headroom_and_tombstones_are_always_taken() {
        let limit = 1 << 20;
        let mut store = store(StoreConfig { max_memory: limit, keep_tombstones: true, ..StoreConfig::default() });
        let value = "x".repeat(1000);
        let mut n = 0;
        let mut next = || {
            n += 1;
            (format!("k{n}"), Version { hlc: Hlc::new(1, n), node: 9 })
        };
        let mut client = Ok(Version::ZERO);
        while client.is_ok() {
            let (key, _) = next();
            client = store.set(store.locate(key.as_bytes()), key.as_bytes(), value.as_bytes(), 0, 1);
        }
        let at_limit = store.memory_bytes() as u64;
        let mut merged = Ok(Merged::Applied);
        while merged.is_ok() {
            let (key, version) = next();
            let entry =
                Entry { key: key.as_bytes(), value: value.as_bytes(), version, expires_at: 0, tombstone: false };
            merged = store.merge(entry, 1);
        }
        assert_eq!((client, merged), (Err(StoreError::OutOfMemory), Err(StoreError::OutOfMemory)));
        assert!((limit..limit + 8192).contains(&at_limit), "{at_limit}");
        let full = store.memory_bytes() as u64;
        assert!((limit + limit / 16..limit + limit / 16 + 8192).contains(&full), "{full}");
        let (key, version) = next();
        let grave = Entry { key: key.as_bytes(), value: b"", version, expires_at: 0, tombstone: true };
        assert_eq!(store.merge(grave, 1), Ok(Merged::Applied));
        assert_eq!(store.stats().refused, 2);
        store.invariants();
    }

    #[test]
    fn a_dropped_shard_is_as_new_and_can_be_filled_again() {
        let (mut a, mut b) = (small(1), small(2));
        for n in 0..6000 {
            let key = if n < 3000 { format!("{{tag}}{n}") } else { format!("k{n}") };
            a.put(&key, &"v".repeat(100), if n % 5 == 0 { 1 << 40 } else { 0 }, 10);
            if n % 7 == 0 {
                a.del(&key, 10);
            }
        }
        for shard in a.owned().map(ShardId) {
            copy(&mut a, &mut b, shard, 20);
        }
        let shard = a.keyspace().shard(a.locate(b"{tag}"));
        let floor = Version { hlc: Hlc::new(5, 0), node: 0 };
        b.purge_below(shard, floor, KeyHash(0), usize::MAX).unwrap();
        let (memory, followed) = (b.memory_bytes(), b.change_log(shard).next_seq());
        let writes = b.stats().writes;
        let mut slices = 1;
        while b.drop_shard(shard, 100).unwrap() {
            slices += 1;
            b.invariants();
        }
        assert!(slices > 3, "{slices}");
        assert!(b.memory_bytes() < memory * 6 / 10, "{} of {memory} left", b.memory_bytes());
        assert_eq!((b.digest(shard), b.tombstones(shard), b.tombstone_floor(shard)), Default::default());
        assert_eq!(b.stats().writes, writes, "nothing was written");
        let differ =
            |a: &Store, b: &Store| (0..32).filter(|&at| a.digest(ShardId(at)) != b.digest(ShardId(at))).count();
        assert_eq!(differ(&a, &b), 1, "the other shards are as before");
        assert!(b.change_log(shard).is_empty() && b.change_log(shard).read(followed).is_err());

        let followed = b.change_log(shard).next_seq();
        copy(&mut a, &mut b, shard, 30);
        assert_eq!(a.digests(), b.digests());
        assert_eq!(b.change_log(shard).read(followed).unwrap().count() as u64, b.digest(shard).count);
        b.invariants();
    }

    /// A store of few shards, so that each has many entries.
    fn small(node: u16) -> Store {
        let keyspace = Keyspace { shards: ShardCount::new(32).unwrap(), ..Keyspace::default() };
        store(StoreConfig { keyspace, owned: 0..32, keep_tombstones: true, node, ..StoreConfig::default() })
    }

    fn copy(from: &mut Store, to: &mut Store, shard: ShardId, now: Millis) {
        let mut next = Some(KeyHash(0));
        while let Some(at) = next {
            next = from.snapshot(shard, at, 50, &mut |entry| {
                assert_eq!(to.fill(entry, now), Ok(Merged::Applied));
            });
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum What {
        Value,
        Delete,
        Expires(Millis),
    }

    /// One write of one of few keys; its value follows from its version.
    #[derive(Clone, Copy, Debug)]
    struct Write {
        key: u8,
        version: Version,
        what: What,
    }

    impl Write {
        fn apply(self, store: &mut Store, now: Millis) -> Merged {
            let (version, value) = (self.version, format!("{:?}", self.version));
            let (value, expires_at, tombstone) = match self.what {
                What::Value => (&value[..], 0, false),
                What::Delete => ("", 0, true),
                What::Expires(at) => (&value[..], at, false),
            };
            let entry = Entry { key: &name(self.key), value: value.as_bytes(), version, expires_at, tombstone };
            store.merge(entry, now).unwrap()
        }
    }

    /// The keys share a few shards.
    fn name(key: u8) -> Vec<u8> {
        format!("{{{}}}{key}", key % 3).into_bytes()
    }

    /// Writes of the first [`WRITTEN`] milliseconds by three nodes, no version twice for a key.
    fn writes() -> impl Strategy<Value = Vec<Write>> {
        let what = prop_oneof![
            2 => Just(What::Value),
            2 => Just(What::Delete),
            3 => (1..2 * WRITTEN).prop_map(What::Expires),
        ];
        proptest::collection::vec((0..12u8, 1..WRITTEN, 1..4u16, what), 1..80).prop_map(|all| {
            let mut known = std::collections::BTreeSet::new();
            let writes = all.into_iter().filter(|&(key, ms, node, _)| known.insert((key, ms, node)));
            let version = |ms, node| Version { hlc: Hlc::new(ms, 0), node };
            writes.map(|(key, ms, node, what)| Write { key, version: version(ms, node), what }).collect()
        })
    }

    const WRITTEN: Millis = 400;
    const REPLICAS: usize = 3;

    /// How one replica gets on: which write comes next, how much later, and whether it sweeps, reads, or does nothing then.
    fn deliveries() -> impl Strategy<Value = Vec<(prop::sample::Index, Millis, u8)>> {
        proptest::collection::vec((any::<prop::sample::Index>(), 0..12u64, 0..8u8), 20)
    }

    /// Gives a replica the writes in an order of its own, some of them twice, while its time passes and entries expire.
    fn deliver(store: &mut Store, writes: &[Write], script: &[(prop::sample::Index, Millis, u8)]) {
        let mut left = writes.to_vec();
        let mut now = WRITTEN;
        for (at, (index, later, doing)) in script.iter().cycle().take(writes.len() * 2).enumerate() {
            now += later;
            let write = if at % 3 == 2 || left.is_empty() {
                writes[index.index(writes.len())]
            } else {
                left.swap_remove(index.index(left.len()))
            };
            write.apply(store, now);
            match doing {
                0 => _ = store.sweep(now, 300),
                1 => _ = store.get(store.locate(&name(write.key)), &name(write.key), now),
                _ => {}
            }
        }
        for write in left {
            write.apply(store, now);
        }
        store.invariants();
    }

    impl Store {
        fn clone_of(&mut self, key: u8, now: Millis) -> Option<Vec<u8>> {
            let hash = self.locate(&name(key));
            self.peek(hash, &name(key), now).map(|entry| entry.value.to_vec())
        }

        fn contents(&mut self, now: Millis) -> Vec<Option<Vec<u8>>> {
            (0..12).map(|key| self.clone_of(key, now)).collect()
        }

        fn purge_all(&mut self, floor: Version, budget: usize) {
            for shard in self.owned().map(ShardId) {
                let mut from = Some(KeyHash(0));
                while let Some(at) = from {
                    from = self.purge_below(shard, floor, at, budget).unwrap().next;
                }
            }
        }
    }

    /// What is readable at `now` when everything has arrived: the newest write of each key, unless it ends it.
    fn expected(writes: &[Write], now: Millis) -> Vec<Option<Vec<u8>>> {
        let newest = |key| writes.iter().filter(|write| write.key == key).max_by_key(|write| write.version);
        let value = |write: &Write| match write.what {
            What::Delete => None,
            What::Expires(at) if at <= now => None,
            _ => Some(format!("{:?}", write.version).into_bytes()),
        };
        (0..12).map(|key| newest(key).and_then(value)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 150 }))]

        /// Replicas that got the same writes hold the same, in whatever order and however often they came, and whenever
        /// each of them found out that an entry had expired.
        #[test]
        fn merging_converges(writes in writes(), scripts in proptest::collection::vec(deliveries(), REPLICAS)) {
            let mut replicas: Vec<Store> = (0..REPLICAS as u16).map(small).collect();
            for (store, script) in replicas.iter_mut().zip(&scripts) {
                deliver(store, &writes, script);
            }
            let late = 10 * WRITTEN;
            for store in &mut replicas {
                prop_assert_eq!(store.contents(late), expected(&writes, late));
            }
            // One replica has converted all that expired, the others have not.
            while replicas[0].sweep(late, 5).more {}
            for at in 1..REPLICAS {
                prop_assert_eq!(replicas[0].digests(), replicas[at].digests());
            }
            replicas[0].invariants();
        }

        /// After a purge replicas hold the same, whatever had expired where, and nothing of what it forgot comes back; a
        /// replica that is filled gets all of it.
        #[test]
        fn nothing_comes_back_after_a_purge(
            writes in writes(),
            scripts in proptest::collection::vec(deliveries(), 2),
            at in 1..2 * WRITTEN,
        ) {
            let (mut a, mut b) = (small(1), small(2));
            deliver(&mut a, &writes, &scripts[0]);
            deliver(&mut b, &writes, &scripts[1]);
            let (now, floor) = (2 * WRITTEN, Version { hlc: Hlc::new(at, 0), node: 2 });
            while a.sweep(now, 7).more {}
            a.purge_all(floor, 1);
            // The other one is at the very beginning of its purge.
            for shard in b.owned().map(ShardId) {
                b.purge_below(shard, floor, KeyHash(0), 1).unwrap();
            }
            let before = a.digests();
            for write in &writes {
                let (here, there) = (write.apply(&mut a, now), write.apply(&mut b, now));
                prop_assert!(here != Merged::Applied && there != Merged::Applied, "{write:?}: {here:?}, {there:?}");
            }
            // Nobody has seen these; what is refused does not depend on how far the purge is.
            for write in writes.iter().filter(|write| write.version <= floor) {
                let version = Version { node: 9, hlc: Hlc::new(write.version.hlc.millis().min(at - 1), 7) };
                let unseen = Write { version, what: What::Value, ..*write };
                let (here, there) = (unseen.apply(&mut a, now), unseen.apply(&mut b, now));
                prop_assert_eq!(here == Merged::Applied, there == Merged::Applied, "{:?}, {:?}", here, there);
            }
            b.purge_all(floor, 2);
            prop_assert_eq!(a.digests(), b.digests());
            prop_assert!(a.digests().iter().zip(&before).all(|(after, before)| after.count == before.count));
            a.invariants();
            b.invariants();

            let mut filled = small(3);
            filled.purge_all(floor, 1);
            for shard in filled.owned().map(ShardId) {
                copy(&mut a, &mut filled, shard, now);
            }
            prop_assert_eq!(a.digests(), filled.digests());
            prop_assert_eq!(a.contents(now), filled.contents(now));
            filled.invariants();
        }

        /// A digest up to a version is that of a store which has got no more.
        #[test]
        fn a_digest_can_end_at_a_version(writes in writes(), at in 1..WRITTEN, budget in 1..6usize) {
            let until = Version { hlc: Hlc::new(at, 0), node: 2 };
            let (mut all, mut some) = (small(1), small(2));
            // One write per key: a newer one would hide an older one.
            let first: std::collections::BTreeMap<_, _> = writes.iter().map(|write| (write.key, *write)).collect();
            for write in first.values() {
                write.apply(&mut all, WRITTEN);
                if write.version <= until {
                    write.apply(&mut some, WRITTEN);
                }
            }
            for shard in all.owned().map(ShardId) {
                let (mut digest, mut from) = (Digest::default(), Some(KeyHash(0)));
                while let Some(at) = from {
                    from = all.digest_until(shard, until, at, budget, &mut digest).next;
                }
                prop_assert_eq!(digest, some.digest(shard));
            }
        }
    }
}
