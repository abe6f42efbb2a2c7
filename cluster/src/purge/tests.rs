//! Walks through a shard of many slices, as a replica does them for an orderer, with writes between the slices.

use std::collections::BTreeSet;
use std::sync::Arc;

use gridkv_engine::backend::Registry;
use gridkv_engine::digest::Digest;
use gridkv_engine::hash::KeyHash;
use gridkv_engine::record::Entry;
use gridkv_engine::store::{Merged, Store, StoreConfig};
use rkyv::util::AlignedVec;

use super::*;
use crate::hints::{self, Hints};
use crate::ids::Now;
use crate::map::testing::three;
use crate::outbox::Outbox;
use crate::planted::Planted;
use crate::shards::View;

const WALL: Millis = 1_000_000_000;
const SLICE: usize = 2048;
const ENTRIES: usize = 5 * SLICE;

/// A replica, and what it answers the orderer.
struct Replica {
    view: View,
    store: Store,
    hints: Hints,
    fences: Fences,
    out: Outbox,
    mono: Millis,
    shard: ShardId,
    orderer: NodeNo,
}

#[derive(Debug, PartialEq)]
enum Answer {
    Digest(Digest),
    Forgot,
    Refused(Why),
}

fn key(n: usize) -> String {
    format!("{{tag}}{n}")
}

fn version(ago: Millis, n: u16) -> Version {
    Version { hlc: Hlc::new(WALL - ago, n), node: 3 }
}

impl Replica {
    /// Every second entry is a tombstone; the last tenth is too young to be forgotten.
    fn new() -> Replica {
        let map = Arc::new(three());
        let keyspace = gridkv_engine::hash::Keyspace {
            seed: map.seed,
            shards: gridkv_engine::hash::ShardCount::new(map.placements.len() as u32).unwrap(),
        };
        let config = StoreConfig { keyspace, owned: 0..32, keep_tombstones: true, node: 9, ..StoreConfig::default() };
        let backend = Registry::default().make("memory-sharded", &config.backend()).unwrap();
        let mut store = Store::new(config, backend);
        for n in 0..ENTRIES {
            let (key, ago) = (key(n), if n < ENTRIES / 10 * 9 { 100_000 } else { 1000 });
            let (tombstone, value) = (n % 2 == 0, if n % 2 == 0 { &b""[..] } else { b"v" });
            let version = version(ago, n as u16);
            let entry = Entry { key: key.as_bytes(), value, version, expires_at: 0, tombstone };
            assert_eq!(store.merge(entry, WALL), Ok(Merged::Applied));
        }
        let shard = keyspace.shard(keyspace.locate(b"{tag}"));
        let orderer = map.placement(shard).orderer().unwrap();
        let me = map.placement(shard).replicas[1].node;
        let view = View { me, map, alive: BTreeSet::new(), owned: 0..32, isolated: false, quarantined: false };
        let hints = Hints::new(hints::Limits::default());
        let fences = Fences::new(&Limits { slice: SLICE, ..Limits::default() });
        Replica { view, store, hints, fences, out: Outbox::new(), mono: 1, shard, orderer }
    }

    fn ask(&self, round: u64, op: u64) -> Ask {
        let epoch = self.view.map.placement(self.shard).epoch;
        Ask { op: Session::number(PURGE, round) + op, shard: self.shard, epoch, left_ms: 0 }
    }

    fn with(&mut self, act: impl FnOnce(&mut Fences, &mut Context<'_>)) -> Option<Answer> {
        let Replica { view, store, hints, out, mono, .. } = self;
        let now = Now { mono: *mono, wall: WALL };
        act(
            &mut self.fences,
            &mut Context { now, store, view, hints, planted: Planted::default(), pages: Default::default(), out },
        );
        self.fences.invariants();
        let answer = self.out.sends().next().map(|(send, bytes)| {
            assert_eq!(send.to, self.orderer);
            let mut aligned = AlignedVec::<16>::new();
            aligned.extend_from_slice(bytes);
            match Message::read(&aligned).unwrap() {
                Message::Digested(_, digest, _) => Answer::Digest(digest),
                Message::Wrote(_) => Answer::Forgot,
                Message::Refused(_, why) => Answer::Refused(why),
                message => panic!("{message:?}"),
            }
        });
        self.out.clear_sends();
        answer
    }

    fn fence(&mut self, ask: Ask) -> Option<Answer> {
        self.fence_at(ask, version(60_000, 0))
    }

    fn fence_at(&mut self, ask: Ask, until: Version) -> Option<Answer> {
        let by = self.orderer;
        self.with(|fences, cx| _ = fences.compare(cx, by, &ask, until, true))
    }

    fn purge(&mut self, ask: Ask) -> Option<Answer> {
        let (by, until) = (self.orderer, version(60_000, 0));
        self.with(|fences, cx| _ = fences.purge(cx, by, &ask, until))
    }

    fn step(&mut self) -> Option<Answer> {
        self.mono += 1;
        assert!(self.fences.next_deadline().is_some_and(|at| at <= self.mono));
        self.with(|fences, cx| _ = fences.step(cx))
    }

    fn walk(&mut self) -> Answer {
        (0..100).find_map(|_| self.step()).expect("a walk ends")
    }

    /// A write with an old version arrives late.
    fn late(&mut self, n: usize) {
        let key = key(n);
        let entry =
            Entry { key: key.as_bytes(), value: b"", version: version(90_000, 0), expires_at: 0, tombstone: true };
        assert_eq!(self.store.merge(entry, WALL), Ok(Merged::Applied));
    }

    fn tombstones(&self) -> u64 {
        self.store.tombstones(self.shard)
    }
}

#[test]
fn a_large_shard_is_walked_in_bounded_steps_and_the_digest_is_that_of_one_walk() {
    let mut replica = Replica::new();
    let mut whole = Digest::default();
    let walked = replica.store.digest_until(replica.shard, version(60_000, 0), KeyHash(0), ENTRIES, &mut whole);
    assert_eq!((walked.looked, walked.next, whole.count), (ENTRIES, None, (ENTRIES / 10 * 9) as u64));
    let (first, second) = (replica.ask(1, 0), replica.ask(1, 1));
    assert_eq!(replica.fence(first), None);
    assert_eq!(replica.fence(first), Some(Answer::Refused(Why::Busy)), "asked again, it does not begin again");
    assert_eq!(replica.walk(), Answer::Digest(whole));
    assert_eq!((replica.fences.steps, replica.fences.widest), (5, SLICE));
    assert_eq!(replica.fences.next_deadline(), None, "nothing is left to do");
    let before = replica.tombstones();
    replica.mono += 1;
    assert_eq!(replica.purge(second), None);
    assert!((1..before).contains(&replica.tombstones()), "a slice is forgotten, not all");
    assert_eq!(replica.walk(), Answer::Forgot);
    assert_eq!((replica.fences.steps, replica.fences.widest), (10, SLICE));
    assert_eq!(replica.tombstones(), (ENTRIES / 20) as u64, "the young ones stay");
    replica.store.invariants();
}

#[test]
fn what_comes_below_the_fence_uncompared_is_not_forgotten_and_ends_the_purge() {
    let mut replica = Replica::new();
    let ask = |replica: &Replica, op| replica.ask(1, op);
    assert_eq!(replica.fence(ask(&replica, 0)), None);
    // Behind the walk or before it: nobody can tell.
    replica.late(1);
    assert!(matches!(replica.walk(), Answer::Digest(_)));
    let before = replica.tombstones();
    assert_eq!(replica.purge(ask(&replica, 1)), None);
    assert_eq!(replica.step(), Some(Answer::Refused(Why::BelowFloor)));
    assert_eq!(replica.tombstones(), before);
    // Asked again after its answer, a comparison does not excuse what came since.
    let mut replica = Replica::new();
    assert_eq!(replica.fence(ask(&replica, 0)), None);
    assert!(matches!(replica.walk(), Answer::Digest(_)));
    replica.late(1);
    assert_eq!(replica.fence(ask(&replica, 0)), None);
    assert!(matches!(replica.walk(), Answer::Digest(_)));
    assert_eq!(replica.purge(ask(&replica, 1)), None);
    assert_eq!(replica.step(), Some(Answer::Refused(Why::BelowFloor)));
    // The next comparison has it. What comes while the shard forgets ends that.
    let mut replica = Replica::new();
    replica.late(1);
    assert_eq!(replica.fence(ask(&replica, 2)), None);
    assert!(matches!(replica.walk(), Answer::Digest(_)));
    let before = replica.tombstones();
    assert_eq!(replica.purge(ask(&replica, 3)), None);
    replica.step();
    replica.late(3);
    assert_eq!(replica.step(), Some(Answer::Refused(Why::BelowFloor)));
    let left = replica.tombstones();
    assert!((1..before).contains(&left), "{left} of {before}");
    for late in [1, 2] {
        assert_eq!(replica.fence(ask(&replica, late)), None, "the round is further");
        assert_eq!(replica.fences.next_deadline(), None);
    }
    let hash = replica.store.locate(key(3).as_bytes());
    assert!(replica.store.raw(hash, key(3).as_bytes()).is_some_and(|entry| entry.tombstone));
}

#[test]
fn a_walk_ends_with_the_epoch_of_its_shard_and_a_purge_of_another_round_is_refused() {
    let mut replica = Replica::new();
    assert_eq!(replica.purge(replica.ask(1, 0)), Some(Answer::Refused(Why::BelowFloor)), "there was no fence");
    let ahead = Version { hlc: Hlc::new(WALL + 60_000, 0), node: 0 };
    assert_eq!(replica.fence_at(replica.ask(1, 0), ahead), Some(Answer::Refused(Why::Ahead)), "its clock is wrong");
    assert_eq!(replica.store.tombstone_floor(replica.shard), Version::ZERO);
    assert_eq!(replica.fence(replica.ask(1, 0)), None);
    assert!(matches!(replica.walk(), Answer::Digest(_)));
    assert_eq!(replica.purge(replica.ask(2, 0)), Some(Answer::Refused(Why::BelowFloor)));
    assert_eq!(replica.fence(replica.ask(1, 1)), None);
    let mut map = (*replica.view.map).clone();
    map.placements[replica.shard.index()].epoch += 1;
    replica.view.map = Arc::new(map);
    assert_eq!(replica.with(|fences, cx| fences.on_change(cx)), None);
    assert_eq!(replica.fences.next_deadline(), None);
}
