//! One node of a simulated world: its machines, its stores and its clock, and the part of a driver that runs commands.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use gridkv_engine::Millis;
use gridkv_engine::backend::Registry;
use gridkv_engine::hash::{KeyHash, Keyspace, ShardCount};
use gridkv_engine::store::{Store, StoreConfig};

use super::history::EPOCH_MS;
use super::options::Options;
use super::plane::{Disk, Plane};
use crate::ids::{NodeId, NodeNo, Now};
use crate::map::{Candidate, Map, NORMAL_WEIGHT};
use crate::outbox::Outbox;
use crate::planted::{Bug, Planted};
use crate::replica::Pages;
use crate::shards::{Limits, Shards};
use crate::wire::Ask;

/// One core.
#[derive(Debug)]
pub struct Core {
    /// Its machines.
    pub shards: Shards,
    /// Its data.
    pub store: Store,
    /// What they want done.
    pub out: Outbox,
    /// The earliest timer that is set.
    pub armed: u64,
}

/// Who waits for an ordered command.
#[derive(Clone, Copy, Debug)]
pub enum Asker {
    /// A client here: the number of its operation.
    Here(usize),
    /// A peer.
    There(NodeNo, Ask),
}

/// What an operation of the machines is part of.
#[derive(Clone, Copy, Debug)]
pub enum Pending {
    /// It is all that the client asked.
    Plain(usize),
    /// The keys of a command are being brought up to date.
    Prepare(Asker),
    /// A command has run with that result; its changes are being stored.
    Commit(Asker, u64),
    /// The orderer runs it.
    Forwarded(usize),
}

/// One node.
#[derive(Debug)]
pub struct Node {
    /// Over all its lives.
    pub id: NodeId,
    /// Which life this is: each time the process starts it is one more.
    pub boot: u64,
    /// The number of this life, once it is admitted.
    pub no: NodeNo,
    /// Whether the process runs.
    pub up: bool,
    /// It has left the cluster for good.
    pub gone: bool,
    /// It stands still until then.
    pub paused_until: u64,
    /// It, or a former life, has stood still until then at the latest.
    pub stood_until: u64,
    /// Its clock beside the true time.
    pub offset_ms: i64,
    /// Its cores, empty when it is down.
    pub cores: Vec<Core>,
    /// Whom it believes to be there, by index, and as which life.
    pub sees: BTreeMap<usize, NodeNo>,
    /// What waits for the machines.
    pub pending: BTreeMap<u64, Pending>,
    /// The number of the next operation.
    pub next_token: u64,
    /// Its control plane, where there is one and it runs.
    pub plane: Option<Plane>,
    /// What outlives its process.
    pub disk: Disk,
}

/// The key of a number.
pub fn key_of(key: u64, is_counter: bool) -> Vec<u8> {
    format!("{}{key}", if is_counter { "counter:" } else { "key:" }).into_bytes()
}

/// The bytes of a value: its number, then as many as it is long.
pub fn bytes_of(value: u64, most: usize) -> Vec<u8> {
    let len = if most == 0 { 0 } else { (value.wrapping_mul(0x9e37_79b9) >> 8) as usize % (most + 1) };
    let mut bytes = value.to_le_bytes().to_vec();
    bytes.resize(8 + len, value as u8);
    bytes
}

/// The number of a value; `u64::MAX` when the bytes are none.
pub fn value_of(bytes: &[u8]) -> u64 {
    let Some((head, rest)) = bytes.split_first_chunk::<8>() else { return u64::MAX };
    let value = u64::from_le_bytes(*head);
    if rest.iter().all(|&byte| byte == value as u8) { value } else { u64::MAX }
}

impl Node {
    /// A node that has never run.
    pub fn new(index: usize, offset_ms: i64) -> Node {
        Node {
            id: NodeId(index as u128 + 1),
            boot: 0,
            no: NodeNo(0),
            up: false,
            gone: false,
            paused_until: 0,
            stood_until: 0,
            offset_ms,
            cores: Vec::new(),
            sees: BTreeMap::new(),
            pending: BTreeMap::new(),
            next_token: 1,
            plane: None,
            disk: Disk::new(NodeId(index as u128 + 1)),
        }
    }

    /// What it says of itself.
    pub fn candidate(&self, cores: usize) -> Candidate {
        let host = (self.id.0 as u16).to_be_bytes();
        Candidate {
            id: self.id,
            boot: self.boot,
            peer: ([10, 0, host[0], host[1]], 7380).into(),
            client: ([10, 0, host[0], host[1]], 7379).into(),
            cores: cores as u16,
            zone: String::new(),
            weight: NORMAL_WEIGHT,
        }
    }

    /// A new life begins, with nothing.
    pub fn start(&mut self, options: &Options, map: &Arc<Map>, planted: Planted) {
        (self.up, self.boot, self.no) = (true, self.boot + 1, NodeNo(0));
        self.sees.clear();
        self.pending.clear();
        let shards = ShardCount::new(u32::from(options.shards)).expect("a world has a valid number of shards");
        let keyspace = Keyspace { seed: map.seed, shards };
        self.cores = ranges(options.shards, options.cores)
            .map(|owned| {
                let config = StoreConfig {
                    keyspace,
                    owned: owned.clone(),
                    change_log_entries: options.change_log,
                    keep_tombstones: !planted.has(Bug::ExpiredDropped) && !planted.has(Bug::NoTombstones),
                    ..StoreConfig::default()
                };
                let backend =
                    Registry::default().make("memory-sharded", &config.backend()).expect("the backend is built in");
                let mut limits = Limits::default();
                limits.coordinator.operations = options.operations;
                limits.coordinator.timeout_ms = options.timeout_ms;
                limits.coordinator.again_ms = options.again_ms;
                limits.hints.bytes = options.hint_bytes;
                limits.hints.under_way = 4;
                limits.fill.streams = options.fill_streams;
                limits.fill.bytes_per_second = options.fill_bytes;
                if let page @ 1.. = options.page {
                    limits.pages = Pages {
                        bytes: if page == 1 { 1 } else { limits.pages.bytes },
                        entries: page,
                        step: page,
                        fetched: page,
                        compared: page,
                        window: page,
                    };
                }
                // Its shards are small, and still have to take several steps.
                limits.purge.slice = 3;
                (limits.purge.min_age_ms, limits.purge.rest_ms) = options.purge_ms;
                Core {
                    shards: Shards::new(owned, map.clone(), limits, planted),
                    store: limited(Store::new(config, backend), options.memory),
                    out: Outbox::new(),
                    armed: u64::MAX,
                }
            })
            .collect();
    }

    /// The process ends, and with it all that it held.
    pub fn stop(&mut self) -> BTreeMap<u64, Pending> {
        (self.up, self.paused_until) = (false, 0);
        self.cores.clear();
        self.plane = None;
        self.disk.forget_unwritten();
        self.sees.clear();
        std::mem::take(&mut self.pending)
    }

    /// Its clock.
    pub fn wall(&self, at: u64) -> Millis {
        (EPOCH_MS + at / 1000).saturating_add_signed(self.offset_ms)
    }

    /// The time of an input.
    pub fn now(&self, at: u64) -> Now {
        Now { mono: 1 + at / 1000, wall: self.wall(at) }
    }

    /// Whom it believes to be there, itself included.
    pub fn alive(&self) -> BTreeSet<NodeNo> {
        self.sees.values().copied().chain([self.no]).filter(|no| *no != NodeNo(0)).collect()
    }

    /// The core of a shard.
    pub fn core_of(&self, shard: u16) -> Option<usize> {
        self.cores.iter().position(|core| core.shards.view().owned.contains(&shard))
    }

    /// The core of a hash, and nothing when the node is down.
    pub fn core_of_hash(&self, hash: KeyHash) -> Option<usize> {
        self.cores.iter().position(|core| core.store.owns(hash))
    }

    /// A number for an operation.
    pub fn token(&mut self, pending: Pending) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.pending.insert(token, pending);
        token
    }

    /// The oldest map of its cores.
    pub fn adopted(&self) -> u64 {
        self.cores.iter().map(|core| core.shards.view().map.epoch).min().unwrap_or(0)
    }
}

/// A store that may take so much more than now; 0: no limit.
fn limited(mut store: Store, memory: u64) -> Store {
    if memory > 0 {
        store.set_max_memory(store.memory_bytes() as u64 + memory);
    }
    store
}

/// The shards of each core.
fn ranges(shards: u16, cores: usize) -> impl Iterator<Item = Range<u16>> {
    let at = move |core: usize| (usize::from(shards) * core / cores) as u16;
    (0..cores).map(move |core| at(core)..at(core + 1))
}
