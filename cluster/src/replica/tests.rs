//! What a peer may say that is not true, to a core that owns half of the shards: it is refused, and the core lives on.

use std::sync::Arc;

use gridkv_engine::backend::Registry;
use gridkv_engine::hash::{KeyHash, ShardId};
use gridkv_engine::hlc::{Hlc, Version};
use gridkv_engine::record::Entry;
use gridkv_engine::store::{Store, StoreConfig};
use rkyv::util::AlignedVec;

use crate::ids::{NodeNo, Now};
use crate::map::testing::three;
use crate::outbox::Outbox;
use crate::planted::Planted;
use crate::shards::{Limits, Shards};
use crate::wire::{Ask, Message, Stored, Why};

const NOW: Now = Now { mono: 1, wall: 1_000_000_000 };
const PEER: NodeNo = NodeNo(2);

struct Core {
    shards: Shards,
    store: Store,
}

impl Core {
    fn new() -> Core {
        let map = Arc::new(three());
        let mut shards = Shards::new(0..16, map.clone(), Limits::default(), Planted::default());
        let keyspace = shards.view().keyspace();
        let config = StoreConfig { keyspace, owned: 0..16, keep_tombstones: true, ..StoreConfig::default() };
        let backend = Registry::default().make("memory-sharded", &config.backend()).unwrap();
        let mut store = Store::new(config, backend);
        shards.on_map(NOW, &mut store, map, NodeNo(1), &mut Outbox::new());
        Core { shards, store }
    }

    /// A key of a shard, and its hash.
    fn key_in(&self, shards: std::ops::Range<u16>) -> (KeyHash, Vec<u8>) {
        let keys = (0..).map(|number: u32| number.to_string().into_bytes());
        let mut located = keys.map(|key| (self.store.locate(&key), key));
        located.find(|(hash, _)| shards.contains(&self.shards.view().shard(*hash).0)).unwrap()
    }

    fn ask(&self, shard: ShardId) -> Ask {
        Ask { op: 1, shard, epoch: self.shards.view().map.placement(shard).epoch, left_ms: 1000 }
    }

    /// What it answers, if it answers with a refusal.
    fn refusal(&mut self, message: &Message<'_>) -> Option<Why> {
        self.refusal_at(NOW, message)
    }

    fn refusal_at(&mut self, now: Now, message: &Message<'_>) -> Option<Why> {
        let mut out = Outbox::new();
        self.shards.on_message(now, &mut self.store, PEER, message, &mut out);
        let (send, bytes) = out.sends().next()?;
        assert_eq!(send.to, PEER);
        let mut aligned = AlignedVec::<16>::new();
        aligned.extend_from_slice(bytes);
        match Message::read(&aligned).unwrap() {
            Message::Refused(_, why) => Some(why),
            _ => None,
        }
    }
}

fn entry(key: &[u8]) -> Entry<'_> {
    let version = Version { hlc: Hlc::new(NOW.wall, 0), node: PEER.0 };
    Entry { key, value: b"value", version, expires_at: 0, tombstone: false }
}

#[test]
fn an_honest_peer_is_served() {
    let mut core = Core::new();
    let (hash, key) = core.key_in(0..16);
    let ask = core.ask(core.shards.view().shard(hash));
    assert_eq!(core.refusal(&Message::Write(ask, Stored { hash, entry: entry(&key) })), None);
    assert_eq!(core.store.raw(hash, &key).unwrap().value, b"value");
    assert_eq!(core.refusal(&Message::Read(ask, hash, &key, true)), None);
}

#[test]
fn a_hash_of_another_cores_shard_is_refused() {
    let mut core = Core::new();
    let (mine, _) = core.key_in(0..16);
    let (other, key) = core.key_in(16..32);
    let ask = core.ask(core.shards.view().shard(mine));
    assert_eq!(core.refusal(&Message::Write(ask, Stored { hash: other, entry: entry(&key) })), Some(Why::Broken));
    assert_eq!(core.refusal(&Message::Read(ask, other, &key, true)), Some(Why::Broken));
    let shard =
        ShardId(core.shards.view().map.placements.iter().position(|p| p.orderer() == Some(NodeNo(1))).unwrap() as u16);
    assert!(shard.0 < 16);
    let ask = core.ask(shard);
    assert_eq!(core.refusal(&Message::Order(ask, other, b"request")), Some(Why::Broken));
    assert_eq!(core.shards.take_orders(), []);
}

#[test]
fn a_hash_that_is_not_the_keys_is_refused() {
    let mut core = Core::new();
    let (mine, _) = core.key_in(0..16);
    let (_, key) = core.key_in(16..32);
    let ask = core.ask(core.shards.view().shard(mine));
    assert_eq!(core.refusal(&Message::Write(ask, Stored { hash: mine, entry: entry(&key) })), Some(Why::Broken));
    assert!(core.store.is_empty());
}

#[test]
fn a_place_outside_of_the_shard_is_its_end() {
    let mut core = Core::new();
    let (mine, key) = core.key_in(0..16);
    let ask = core.ask(core.shards.view().shard(mine));
    assert_eq!(core.refusal(&Message::Write(ask, Stored { hash: mine, entry: entry(&key) })), None);
    for at in [KeyHash::MIN, KeyHash(u64::MAX)] {
        assert_eq!(core.refusal(&Message::Stream(ask, at)), None);
        assert_eq!(core.refusal(&Message::List(ask, at, u16::MAX)), None);
    }
}

/// A read met it at another replica, which had not swept it yet, when this one had forgotten it in a purge.
#[test]
fn what_has_expired_is_taken_below_the_floor() {
    let mut core = Core::new();
    let (hash, key) = core.key_in(0..16);
    let shard = core.shards.view().shard(hash);
    core.store.raise_floor(shard, Version { hlc: Hlc::new(NOW.wall + 1, 0), node: 0 });
    let ask = core.ask(shard);
    let gone = Entry { expires_at: NOW.wall - 1, ..entry(&key) };
    assert_eq!(core.refusal(&Message::Write(ask, Stored { hash, entry: gone })), None);
    let other = [b"{", &key[..], b"}"].concat();
    let (hash, lives) = (core.store.locate(&other), Entry { expires_at: NOW.wall + 1, ..entry(&other) });
    assert_eq!(core.refusal(&Message::Write(ask, Stored { hash, entry: lives })), Some(Why::BelowFloor));
}

/// Beyond the bound there is one entry at most, so that no answer is longer than a frame.
#[test]
fn a_page_of_large_entries_has_one_beyond_the_bound() {
    let mut core = Core::new();
    let (hash, key) = core.key_in(0..16);
    let shard = core.shards.view().shard(hash);
    let value = vec![7; 3 * super::ANSWER_BYTES];
    let mut stored = 0;
    for n in 0..4000u32 {
        let name = format!("{{{}}}{n}", String::from_utf8_lossy(&key));
        if stored < 5 && core.shards.view().shard(core.store.locate(name.as_bytes())) == shard {
            let version = Version { hlc: Hlc::new(NOW.wall, 0), node: PEER.0 };
            let entry = Entry { key: name.as_bytes(), value: &value, version, expires_at: 0, tombstone: false };
            core.store.merge(entry, NOW.wall).unwrap();
            stored += 1;
        }
    }
    assert_eq!(stored, 5);
    let (mut at, mut pages) = (Some(core.shards.view().keyspace().first_hash(shard)), 0);
    while let Some(from) = at {
        let (mut out, ask) = (Outbox::new(), core.ask(shard));
        core.shards.on_message(NOW, &mut core.store, PEER, &Message::Stream(ask, from), &mut out);
        let (_, bytes) = out.sends().next().unwrap();
        let mut aligned = AlignedVec::<16>::new();
        aligned.extend_from_slice(bytes);
        let Message::Entries(_, next, packed) = Message::read(&aligned).unwrap() else { panic!("not a page") };
        assert_eq!(packed.iter().count(), 1);
        (at, pages) = (next, pages + 1);
    }
    assert_eq!(pages, 5);
}

/// The write was stored and the answer lost, then the clock was set back by an hour: the version is far ahead now, and it is here.
#[test]
fn a_write_that_comes_again_after_the_clock_was_set_back_is_acknowledged() {
    let mut core = Core::new();
    let (hash, key) = core.key_in(0..16);
    let ask = core.ask(core.shards.view().shard(hash));
    let set_back = Now { mono: NOW.mono + 100, wall: NOW.wall - 3_600_000 };
    let write = Message::Write(ask, Stored { hash, entry: entry(&key) });
    assert_eq!(core.refusal(&write), None);
    assert_eq!(core.refusal_at(set_back, &write), None);
    let version = Version { hlc: Hlc::new(NOW.wall, 1), node: PEER.0 };
    let newer = Message::Write(ask, Stored { hash, entry: Entry { version, ..entry(&key) } });
    assert_eq!(core.refusal_at(set_back, &newer), Some(Why::Ahead), "this one is not here");
}
