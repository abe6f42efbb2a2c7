//! Nodes with a store each, their messages delivered in an order that a seed chooses, in virtual time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use gridkv_engine::Millis;
use gridkv_engine::backend::Registry;
use gridkv_engine::hash::ShardId;
use gridkv_engine::hlc::{Hlc, Version};
use gridkv_engine::record::Entry;
use gridkv_engine::store::{Store, StoreConfig};
use rkyv::util::AlignedVec;

use crate::ids::{NodeNo, Now};
use crate::map::testing::{candidate, step_all, three};
use crate::map::{Change, Map, Transition};
use crate::outbox::{Outbox, Outcome};
use crate::planted::{Bug, Planted};
use crate::quorum::Level;
use crate::replica::Pages;
use crate::shards::{Limits, Operation, Shards};
use crate::wire::Message;

struct Node {
    shards: Shards,
    store: Store,
}

struct World {
    map: Arc<Map>,
    nodes: BTreeMap<NodeNo, Node>,
    down: BTreeSet<NodeNo>,
    /// From, to, bytes.
    queue: Vec<(NodeNo, NodeNo, AlignedVec<16>)>,
    now: Millis,
    random: u64,
    done: Vec<(NodeNo, u64, Outcome)>,
    /// Bytes of messages between each two.
    bytes: u64,
    /// Bytes of the largest message.
    largest: usize,
    limits: Limits,
    planted: Planted,
}

const WALL: Millis = 1_000_000_000;

impl World {
    fn new(seed: u64) -> World {
        World::with(seed, three(), Limits::default(), Planted::default())
    }

    fn with(seed: u64, map: Map, limits: Limits, planted: Planted) -> World {
        let mut world = World {
            map: Arc::new(map),
            nodes: BTreeMap::new(),
            down: BTreeSet::new(),
            queue: Vec::new(),
            now: 1,
            random: seed | 1,
            done: Vec::new(),
            bytes: 0,
            largest: 0,
            limits,
            planted,
        };
        for no in 1..=3 {
            world.start(NodeNo(no));
        }
        world.set_alive();
        world
    }

    fn keyspace(&self) -> gridkv_engine::hash::Keyspace {
        self.nodes.values().next().unwrap().shards.view().keyspace()
    }

    /// A process with an empty memory that has that number.
    fn start(&mut self, no: NodeNo) {
        let mut shards = Shards::new(0..32, self.map.clone(), self.limits, self.planted);
        let keyspace = shards.view().keyspace();
        let config =
            StoreConfig { keyspace, owned: 0..32, keep_tombstones: true, node: no.0, ..StoreConfig::default() };
        let backend = Registry::default().make("memory-sharded", &config.backend()).unwrap();
        let mut store = Store::new(config, backend);
        let mut out = Outbox::new();
        shards.on_map(self.now(), &mut store, self.map.clone(), no, &mut out);
        self.nodes.insert(no, Node { shards, store });
        self.drain(no, &mut out);
    }

    fn now(&self) -> Now {
        Now { mono: self.now, wall: WALL + self.now }
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn drain(&mut self, no: NodeNo, out: &mut Outbox) {
        for (send, bytes) in out.sends() {
            let mut copy = AlignedVec::new();
            copy.extend_from_slice(bytes);
            self.bytes += bytes.len() as u64;
            self.largest = self.largest.max(bytes.len());
            self.queue.push((no, send.to, copy));
        }
        self.done.extend(out.take_done().into_iter().map(|(token, outcome)| (no, token, outcome)));
        out.clear_sends();
    }

    fn input(&mut self, no: NodeNo, act: impl FnOnce(&mut Node, Now, &mut Outbox)) {
        let now = self.now();
        let mut out = Outbox::new();
        let node = self.nodes.get_mut(&no).unwrap();
        act(node, now, &mut out);
        node.shards.invariants();
        self.drain(no, &mut out);
    }

    fn set_alive(&mut self) {
        let alive: BTreeSet<NodeNo> = self.nodes.keys().copied().filter(|no| !self.down.contains(no)).collect();
        for no in alive.clone() {
            let alive = alive.clone();
            self.input(no, |node, now, out| node.shards.on_alive(now, &mut node.store, alive, out));
        }
    }

    fn adopt(&mut self, map: Map) {
        self.map = Arc::new(map);
        let map = self.map.clone();
        for no in self.nodes.keys().copied().collect::<Vec<_>>() {
            if !self.down.contains(&no) {
                let map = map.clone();
                self.input(no, |node, now, out| node.shards.on_map(now, &mut node.store, map, no, out));
            }
        }
    }

    /// Delivers one message, any of those under way.
    fn deliver(&mut self) -> bool {
        if self.queue.is_empty() {
            return false;
        }
        let at = self.random() as usize % self.queue.len();
        let (from, to, bytes) = self.queue.remove(at);
        if self.nodes.contains_key(&to) && !self.down.contains(&to) && !self.down.contains(&from) {
            self.input(to, |node, now, out| {
                let message = Message::read(&bytes).unwrap();
                node.shards.on_message(now, &mut node.store, from, &message, out);
            });
        }
        true
    }

    /// Lets `ms` pass, with all messages and deadlines of that time.
    fn run(&mut self, ms: Millis) {
        let end = self.now + ms;
        loop {
            let mut delivered = 0;
            while self.deliver() {
                delivered += 1;
                if delivered % 64 == 0 {
                    self.now += 1;
                }
                assert!(delivered < 1_000_000, "they never stop talking");
            }
            let live: Vec<NodeNo> = self.nodes.keys().copied().filter(|no| !self.down.contains(no)).collect();
            let next = live.iter().filter_map(|no| self.nodes[no].shards.next_deadline(self.now())).min();
            match next {
                Some(next) if next.max(self.now + 1) <= end => self.now = next.max(self.now + 1),
                _ => {
                    self.now = self.now.max(end);
                    return;
                }
            }
            for no in live {
                self.input(no, |node, now, out| {
                    if node.shards.next_deadline(now).is_some_and(|at| at <= now.mono) {
                        node.shards.on_deadline(now, &mut node.store, out);
                    }
                });
            }
        }
    }

    fn version(&self, ms_ago: Millis, counter: u16) -> Version {
        Version { hlc: Hlc::new(WALL + self.now - ms_ago, counter), node: 1 }
    }

    /// Puts an entry into some stores, as if it had been written there.
    fn put(&mut self, nodes: &[u16], key: &str, value: Option<&[u8]>, version: Version) {
        for no in nodes {
            let now = self.now();
            let node = self.nodes.get_mut(&NodeNo(*no)).unwrap();
            let entry = Entry {
                key: key.as_bytes(),
                value: value.unwrap_or_default(),
                version,
                expires_at: 0,
                tombstone: value.is_none(),
            };
            node.store.merge(entry, now.wall).unwrap();
        }
    }

    /// A client's write, at a quorum.
    fn write(&mut self, at: u16, token: u64, key: &str, value: Option<&[u8]>) {
        let hash = self.keyspace().locate(key.as_bytes());
        self.input(NodeNo(at), |node, now, out| {
            let key = (hash, key.as_bytes());
            let write = Operation::Write { key, value, expires_at: 0, level: Level::Quorum };
            node.shards.begin(now, &mut node.store, token, write, out);
        });
    }

    fn holds(&mut self, no: u16, key: &str) -> Option<Vec<u8>> {
        let hash = self.keyspace().locate(key.as_bytes());
        let wall = self.now().wall;
        let store = &mut self.nodes.get_mut(&NodeNo(no)).unwrap().store;
        store.peek(hash, key.as_bytes(), wall).map(|entry| entry.value.to_vec())
    }

    fn raw(&mut self, no: u16, key: &str) -> Option<Version> {
        let hash = self.keyspace().locate(key.as_bytes());
        self.nodes.get_mut(&NodeNo(no)).unwrap().store.raw(hash, key.as_bytes()).map(|entry| entry.version)
    }

    fn equal(&self, a: u16, b: u16) -> bool {
        let store = |no: u16| &self.nodes[&NodeNo(no)].store;
        (0..32).all(|shard| store(a).digest(ShardId(shard)) == store(b).digest(ShardId(shard)))
    }

    fn all_filled(&self, no: u16) -> bool {
        let placements = self.map.placements.iter().enumerate();
        let shards = &self.nodes[&NodeNo(no)].shards;
        placements.into_iter().all(|(shard, p)| shards.filled().any(|one| one == (ShardId(shard as u16), p.epoch)))
    }

    fn crash(&mut self, no: u16) {
        self.down.insert(NodeNo(no));
        self.set_alive();
    }

    fn back(&mut self, no: u16) {
        self.down.remove(&NodeNo(no));
        self.set_alive();
    }

    /// Another node joins, as number 4.
    fn admit_fourth(&mut self) {
        let map = self.map.apply(&Change::Admit(candidate(4, 1))).unwrap();
        self.map = Arc::new(map.clone());
        self.start(NodeNo(4));
        self.adopt(map);
        self.set_alive();
    }

    /// What is not above the floor is refused by these from now on, in every shard.
    fn raise_floors(&mut self, nodes: &[u16], floor: Version) {
        for no in nodes {
            let store = &mut self.nodes.get_mut(&NodeNo(*no)).unwrap().store;
            (0..32).for_each(|shard| store.raise_floor(ShardId(shard), floor));
        }
    }

    /// The node of number 2 has lost its memory, and is number 4 now.
    fn restart_second(&mut self) {
        self.nodes.remove(&NodeNo(2));
        let map = self.map.apply(&Change::Admit(candidate(2, 2))).unwrap();
        self.map = Arc::new(map.clone());
        self.start(NodeNo(4));
        self.adopt(map);
        self.set_alive();
    }
}

fn seeds(run: impl Fn(u64)) {
    (1..6).for_each(|seed| run(seed * 0x9e37_79b9));
}

#[test]
fn a_restarted_node_gets_everything_while_it_is_written() {
    seeds(|seed| {
        let mut world = World::new(seed);
        for n in 0..3000u16 {
            // Each is on two of three, as an acknowledged write is.
            let on = [[1, 2], [2, 3], [1, 3]][usize::from(n) % 3];
            world.put(&on, &format!("k{n}"), (n % 10 > 0).then_some(b"old"), world.version(100_000, n));
        }
        world.restart_second();
        assert!(!world.all_filled(4));
        for n in 0..300u64 {
            world.write(1 + 2 * (n % 2) as u16, n, &format!("k{}", n * 7), Some(b"new"));
            for _ in 0..7 {
                world.deliver();
            }
        }
        world.run(1500);
        assert!(world.all_filled(4), "{:?}", world.nodes[&NodeNo(4)].shards.stats().fill);
        let written = world.done.iter().filter(|(.., outcome)| matches!(outcome, Outcome::Written { .. })).count();
        assert_eq!(written, 300);
        for n in 0..3000 {
            let expected: Option<&[u8]> = match n {
                _ if n % 7 == 0 && n < 2100 => Some(b"new"),
                _ => (n % 10 > 0).then_some(b"old"),
            };
            assert_eq!(world.holds(4, &format!("k{n}")).as_deref(), expected, "k{n}");
            assert!(world.raw(4, &format!("k{n}")).is_some(), "tombstones come too");
        }
    });
}

#[test]
fn one_source_is_not_enough_and_a_lost_one_is_replaced() {
    let mut world = World::new(3);
    for n in 0..2000u16 {
        world.put(&[1, 2, 3][usize::from(n) % 2..][..2], &format!("k{n}"), Some(&[b'v'; 2000]), world.version(9000, n));
    }
    world.restart_second();
    (0..60).for_each(|_| _ = world.deliver());
    world.crash(3);
    world.run(3000);
    let stats = world.nodes[&NodeNo(4)].shards.stats().fill;
    assert!(stats.blocked > 20 && stats.blocked + stats.filled == 32, "{stats:?}");
    assert!(stats.sync.pulled > 900, "it has taken what there is: {stats:?}");
    world.back(3);
    world.run(3000);
    assert!(world.all_filled(4));
    assert!((0..2000).all(|n| world.holds(4, &format!("k{n}")).is_some()));
}

#[test]
fn with_one_source_an_acknowledged_write_may_be_missed() {
    let planted = Planted::with(Bug::OneSource);
    let mut world = World::with(1, three(), Limits::default(), planted);
    (0..200).for_each(|n| world.put(&[2, 3], &format!("k{n}"), Some(b"v"), world.version(9000, n)));
    world.restart_second();
    world.run(500);
    assert!(world.all_filled(4));
    assert!((0..200).any(|n| world.holds(4, &format!("k{n}")).is_none()));
}

#[test]
fn a_new_epoch_asks_all_sources_again_and_keeps_the_data() {
    let mut world = World::new(5);
    (0..1000).for_each(|n| world.put(&[1, 2, 3], &format!("k{n}"), Some(&[b'v'; 3000]), world.version(9000, n)));
    world.restart_second();
    world.run(1000);
    assert!(world.all_filled(4));
    let before = world.bytes;
    // What was reported in the old epoch counts no more: this write is on the sources alone.
    (0..20).for_each(|n| world.put(&[1, 3], &format!("late{n}"), Some(b"v"), world.version(0, n)));
    let map = step_all(&world.map, Transition::First { node: NodeNo(3) });
    world.adopt(map);
    assert!(!world.all_filled(4));
    world.run(1000);
    assert!(world.all_filled(4) && world.equal(4, 1));
    assert!(world.bytes - before < 200_000, "{} bytes for 20 entries", world.bytes - before);
}

#[test]
fn large_values_come_in_bounded_answers() {
    let mut world = World::new(7);
    let value = vec![b'x'; 100_000];
    (0..150).for_each(|n| world.put(&[1], &format!("{{tag}}{n}"), Some(&value), world.version(9000, n)));
    (0..150).for_each(|n| world.put(&[3], &format!("{{tag}}x{n}"), Some(&value), world.version(9000, n)));
    world.restart_second();
    world.run(3000);
    assert!(world.all_filled(4));
    assert_eq!(world.nodes[&NodeNo(4)].store.len(), 300);
    assert!(world.largest < (64 << 10) + 5 * 100_200, "{}", world.largest);
    let stats = world.nodes[&NodeNo(4)].shards.stats().fill;
    assert_eq!(stats.sync.failed, 0, "it was throttled, and nobody was given up for that");
    assert!(stats.rate > 32 << 20, "nobody else works: {stats:?}");
}

#[test]
fn what_is_left_of_a_former_membership_is_not_kept() {
    let mut world = World::new(11);
    world.admit_fourth();
    world.put(&[1, 2, 3], "k", Some(b"deleted long ago"), world.version(90_000, 0));
    // Number 1 hands everything to number 4 and hears nothing of it until it is to come back.
    let step = |world: &mut World, transition| world.adopt(step_all(&world.map, transition));
    step(&mut world, Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) });
    world.run(500);
    assert!(world.all_filled(4));
    world.crash(1);
    step(&mut world, Transition::ReadNew);
    step(&mut world, Transition::Finish);
    for no in [2, 3, 4] {
        world.put(&[no], "k", None, world.version(80_000, 0));
        let (until, store) = (world.version(70_000, 0), &mut world.nodes.get_mut(&NodeNo(no)).unwrap().store);
        let shard = store.keyspace().shard(store.locate(b"k"));
        store.purge_below(shard, until, gridkv_engine::hash::KeyHash(0), 1000).unwrap();
    }
    step(&mut world, Transition::Begin { joining: Some(NodeNo(1)), leaving: Some(NodeNo(2)) });
    world.down.clear();
    let map = (*world.map).clone();
    world.adopt(map);
    world.set_alive();
    world.run(1000);
    assert!(world.all_filled(1));
    assert_eq!((world.raw(1, "k"), world.equal(1, 3)), (None, true));
    let shard = world.keyspace().shard(world.keyspace().locate(b"k"));
    let floor = |no: u16| world.nodes[&NodeNo(no)].store.tombstone_floor(shard);
    assert_eq!(floor(1), floor(3), "the floor comes with the data");
}

/// While it is filled its shard gets another epoch, and a floor was raised in between: it may have been out of the set. But
/// what was written in the new epoch may have been acknowledged because of its answer.
#[test]
fn what_is_above_the_floor_is_kept_when_a_fill_begins_anew() {
    let mut world = World::new(19);
    world.admit_fourth();
    for n in 0..200 {
        world.put(&[1, 2, 3], &format!("k{n}"), Some(b"v"), world.version(90_000, n));
    }
    let step = |world: &mut World, transition| world.adopt(step_all(&world.map, transition));
    step(&mut world, Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) });
    world.run(500);
    assert!(world.all_filled(4));
    let floor = world.version(60_000, 0);
    world.raise_floors(&[1, 2, 3], floor);
    step(&mut world, Transition::First { node: NodeNo(2) });
    world.put(&[4], "deleted long ago", Some(b"v"), world.version(80_000, 0));
    world.put(&[4], "acknowledged", Some(b"v"), world.version(5, 0));
    world.run(500);
    assert!(world.all_filled(4));
    assert_eq!((world.raw(4, "deleted long ago"), world.holds(4, "acknowledged")), (None, Some(b"v".to_vec())));
    assert_eq!(world.nodes[&NodeNo(4)].store.len(), 201);
}

/// A coordinator whose clock is far behind writes to a copy that does not know yet what its sources refuse.
#[test]
fn what_came_below_the_floor_before_it_was_known_is_shed() {
    let mut world = World::new(23);
    world.admit_fourth();
    for n in 0..200 {
        world.put(&[1, 2, 3], &format!("k{n}"), Some(b"v"), world.version(90_000, n));
    }
    let floor = world.version(60_000, 0);
    world.raise_floors(&[1, 2, 3], floor);
    world.adopt(step_all(&world.map, Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) }));
    world.put(&[4], "late", Some(b"v"), world.version(80_000, 0));
    world.run(500);
    assert!(world.all_filled(4));
    assert_eq!((world.raw(4, "late"), world.nodes[&NodeNo(4)].store.len()), (None, 200));
}

/// It is much, the shard gets another epoch half-way, and again late writes come. Nothing is complete before all of it has gone.
#[test]
fn what_is_shed_goes_in_slices_from_one_conversation_to_the_next() {
    const SLICE: usize = 10;
    let limits = Limits { pages: Pages { entries: SLICE, ..Pages::default() }, ..Limits::default() };
    let mut world = World::with(23, three(), limits, Planted::default());
    world.admit_fourth();
    for n in 0..200 {
        world.put(&[1, 2, 3], &format!("{{t}}{n}"), Some(b"v"), world.version(90_000, n));
    }
    let floor = world.version(60_000, 0);
    world.raise_floors(&[1, 2, 3], floor);
    world.adopt(step_all(&world.map, Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) }));
    for n in 0..300 {
        world.put(&[4], &format!("{{t}}late{n}"), Some(b"v"), world.version(80_000, n));
    }
    let shard = world.keyspace().shard(world.keyspace().locate(b"{t}"));
    let held = |world: &World| world.nodes[&NodeNo(4)].store.digest(shard).count as usize;
    let mut slices = 0;
    while slices == 0 || world.nodes[&NodeNo(4)].store.is_shedding(shard) {
        let before = held(&world);
        world.run(1);
        // However many turns this core takes in that time.
        (0..10)
            .for_each(|_| world.input(NodeNo(4), |node, now, out| node.shards.on_deadline(now, &mut node.store, out)));
        // One for the answer that tells of the floor, one for the millisecond.
        assert!(held(&world) + 2 * SLICE >= before, "{before} entries, then {}", held(&world));
        slices += usize::from(held(&world) < before);
        if slices == 15 {
            world.adopt(step_all(&world.map, Transition::First { node: NodeNo(2) }));
        }
        if world.nodes[&NodeNo(4)].store.is_shedding(shard) {
            assert!(world.nodes[&NodeNo(4)].shards.filled().all(|(filled, _)| filled != shard));
        }
    }
    assert!(slices >= 25, "{slices}");
    world.run(500);
    assert!(world.all_filled(4));
    assert_eq!((world.raw(4, "{t}late0"), world.nodes[&NodeNo(4)].store.len()), (None, 200));
}

/// The map makes the copy serve before that: a loss was accepted. What is left goes in that step, and no read meets it.
#[test]
fn who_serves_has_nothing_to_shed() {
    let limits = Limits { pages: Pages { entries: 10, ..Pages::default() }, ..Limits::default() };
    let mut world = World::with(31, three(), limits, Planted::default());
    (0..10).for_each(|n| world.put(&[1, 3], &format!("{{t}}{n}"), Some(b"v"), world.version(50_000, n)));
    let floor = world.version(60_000, 0);
    world.raise_floors(&[1, 3], floor);
    world.restart_second();
    (0..300).for_each(|n| world.put(&[4], &format!("{{t}}late{n}"), Some(b"v"), world.version(80_000, n)));
    let shard = world.keyspace().shard(world.keyspace().locate(b"{t}"));
    while !world.nodes[&NodeNo(4)].store.is_shedding(shard) {
        world.run(1);
    }
    assert!(world.nodes[&NodeNo(4)].store.len() > 100, "most is still to go");
    // One that is under way begins anew with that map, at this copy among others.
    let condemned = (0..300).map(|n| format!("{{t}}late{n}")).find(|key| world.holds(4, key).is_some()).unwrap();
    let hash = world.keyspace().locate(condemned.as_bytes());
    world.input(NodeNo(4), |node, now, out| {
        let read = Operation::Read { key: (hash, condemned.as_bytes()), level: Level::Quorum };
        node.shards.begin(now, &mut node.store, 7, read, out);
    });
    world.adopt(step_all(&world.map, Transition::AcceptLoss));
    assert!(world.map.placement(shard).is_readable(NodeNo(4)));
    let store = &world.nodes[&NodeNo(4)].store;
    assert!(!store.is_shedding(shard) && store.is_empty(), "{} keys", store.len());
    world.run(500);
    assert!(world.nodes[&NodeNo(4)].store.len() <= 10);
    assert!(world.done.contains(&(NodeNo(4), 7, Outcome::Found(None))), "{:?}", world.done);
}

/// A purge round broke off when one replica had raised its floor and the other had not, above writes that only the other has: the
/// third, which acknowledged them too, was the orderer and is gone.
#[test]
fn what_one_source_sheds_the_other_brings_again() {
    let mut world = World::new(29);
    (0..200).for_each(|n| world.put(&[1, 2], &format!("k{n}"), Some(b"acknowledged"), world.version(90_000, n)));
    (0..200).for_each(|n| world.put(&[3], &format!("x{n}"), Some(b"v"), world.version(50_000, n)));
    let floor = world.version(60_000, 0);
    world.raise_floors(&[3], floor);
    world.restart_second();
    world.run(500);
    assert!(world.all_filled(4));
    for n in 0..200 {
        assert!(world.holds(4, &format!("k{n}")).is_some() && world.holds(4, &format!("x{n}")).is_some(), "{n}");
    }
    world.put(&[4], "late", Some(b"v"), world.version(70_000, 0));
    assert_eq!(world.raw(4, "late"), None, "it has the higher floor all the same");
}

#[test]
fn a_shard_that_is_held_elsewhere_is_freed() {
    let mut world = World::new(13);
    (0..500).for_each(|n| world.put(&[1, 2, 3], &format!("k{n}"), Some(b"v"), world.version(9000, n)));
    world.admit_fourth();
    for transition in [Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) }, Transition::ReadNew] {
        world.adopt(step_all(&world.map, transition));
        world.run(1000);
        assert_eq!(world.nodes[&NodeNo(1)].store.len(), 500, "both sets hold it while it moves");
    }
    world.adopt(step_all(&world.map, Transition::Finish));
    world.run(1000);
    assert_eq!((world.nodes[&NodeNo(1)].store.len(), world.equal(4, 2)), (0, true));
}

#[test]
fn repair_finds_whatever_is_missing() {
    seeds(|seed| {
        let mut world = World::new(seed);
        (0..20_000u16).for_each(|n| world.put(&[1, 2, 3], &format!("k{n}"), Some(b"v"), world.version(50_000, n)));
        world.run(70_000);
        let idle = world.bytes;
        world.run(60_000);
        let idle = world.bytes - idle;
        assert!(idle <= 3 * 32 * 264 * 11 / 10, "{idle} bytes in a minute without differences");
        let before = world.bytes;
        // A key that two have not, a tombstone that one has not, an older value, and a thousand here and there.
        world.put(&[2], "lonely", Some(b"v"), world.version(5000, 0));
        world.put(&[1, 3], "k77", None, world.version(5000, 1));
        world.put(&[3], "k78", Some(b"newer"), world.version(5000, 2));
        for n in 0..1000u16 {
            let on = 1 + n % 3;
            world.put(&[on], &format!("k{}", n * 19 + 1000), Some(b"scattered"), world.version(5000, n + 3));
        }
        world.run(62_000);
        assert!(world.equal(1, 2) && world.equal(2, 3), "seed {seed}");
        assert!((1..=3).all(|no| world.holds(no, "lonely").is_some() && world.holds(no, "k77").is_none()));
        assert!((1..=3).all(|no| world.holds(no, "k78").as_deref() == Some(b"newer")));
        assert_eq!(world.nodes[&NodeNo(1)].store.len(), 20_000, "nothing else went or came");
        let moved = world.bytes - before;
        // Two pairs list every entry once or twice, and a thousand travel.
        assert!(moved < 20_000 * 24 * 8 + 1_000 * 400, "{moved} bytes");
    });
}

fn sweep(world: &mut World, no: u16, only: Option<u16>) -> bool {
    let mut began = false;
    world.input(NodeNo(no), |node, now, out| {
        began = node.shards.repair_now(now, &mut node.store, only.map(ShardId), out);
    });
    began
}

#[test]
fn what_differs_is_found_when_somebody_asks() {
    seeds(|seed| {
        // Nobody has a turn, and the node that is asked has the highest number: it compares with the others all the same.
        let mut limits = Limits::default();
        limits.repair.cycle_ms = 1 << 40;
        let mut world = World::with(seed, three(), limits, Planted::default());
        for n in 0..2000u16 {
            world.put(&[1, 2, 3], &format!("k{n}"), Some(b"v"), world.version(50_000, n));
        }
        world.put(&[2], "lonely", Some(b"v"), world.version(40_000, 0));
        world.put(&[3], "k7", None, world.version(40_000, 1));
        world.put(&[1, 3], "k8", Some(b"newer"), world.version(40_000, 2));
        assert!(sweep(&mut world, 3, None) && !sweep(&mut world, 3, Some(1)), "one at a time");
        let stats = |world: &World, no| world.nodes[&NodeNo(no)].shards.sweep();
        assert!(stats(&world, 3).running);
        world.run(10_000);
        let keyspace = world.keyspace();
        let differing: BTreeSet<ShardId> =
            ["lonely", "k7", "k8"].iter().map(|key| keyspace.shard(keyspace.locate(key.as_bytes()))).collect();
        let seen = stats(&world, 3);
        assert_eq!((seen.running, seen.shards, seen.done, seen.incomplete), (false, 32, 32, 0), "{seen:?}");
        assert_eq!((seen.differed, seen.received, seen.sent), (differing.len() as u64, 1, 3 + 1), "{seen:?}");
        assert!(world.equal(1, 2) && world.equal(2, 3), "seed {seed}");
        // One shard, with a copy away and one that goes away while it is asked.
        world.crash(1);
        assert!(sweep(&mut world, 3, Some(5)));
        world.crash(2);
        world.run(10_000);
        let seen = stats(&world, 3);
        let expected = (false, Some(5), 1, 1, 1, 0);
        assert_eq!((seen.running, seen.only, seen.shards, seen.done, seen.incomplete, seen.differed), expected);
    });
}

/// Its wall clock went ahead for a moment and back, between two looks at the others' clocks.
#[test]
fn a_clock_that_was_ahead_for_a_moment_is_settled() {
    let mut world = World::new(31);
    let now = world.now();
    let Node { shards, store } = world.nodes.get_mut(&NodeNo(1)).unwrap();
    for (ahead, settled) in [(2000, 2000), (3_600_000, 500)] {
        store.mint(now.wall + ahead);
        assert_eq!(store.mint(now.wall).hlc.millis(), now.wall + ahead);
        shards.set_quarantined(now, store, false, 0);
        assert_eq!(store.mint(now.wall).hlc.millis(), now.wall + settled, "a little is over soon");
    }
}

/// Going through all of them takes its time, and deadlines of other machines come every few milliseconds.
#[test]
fn hints_are_looked_at_when_a_look_is_due_and_delivered_at_once_to_who_is_back() {
    let mut limits = Limits::default();
    limits.hints.age_ms = 50;
    let mut world = World::with(37, three(), limits, Planted::default());
    let waiting = |world: &mut World, ms: Millis| {
        world.now += ms;
        world.input(NodeNo(1), |node, now, out| node.shards.on_deadline(now, &mut node.store, out));
        world.nodes[&NodeNo(1)].shards.stats().hints.waiting
    };
    world.crash(3);
    world.write(1, 1, "k", Some(b"v"));
    while world.deliver() {}
    assert_eq!(waiting(&mut world, 0), 1);
    assert_eq!(waiting(&mut world, 60), 1, "too old, but it is not looked at yet");
    assert_eq!(waiting(&mut world, 2000), 0);
    world.write(1, 2, "k", Some(b"w"));
    while world.deliver() {}
    assert_eq!(waiting(&mut world, 0), 1);
    world.back(3);
    while world.deliver() {}
    assert_eq!(world.holds(3, "k"), Some(b"w".to_vec()));
}

#[test]
fn a_sync_that_clears_is_noticed() {
    let planted = Planted::with(Bug::SyncClears);
    let mut world = World::with(1, three(), Limits::default(), planted);
    (0..100).for_each(|n| world.put(&[1], &format!("k{n}"), Some(b"v"), world.version(50_000, n)));
    world.run(70_000);
    assert!(world.nodes[&NodeNo(1)].store.len() < 100);
}

#[test]
fn a_replica_that_was_away_is_repaired_at_once() {
    let mut world = World::new(17);
    world.crash(3);
    for n in 0..500 {
        world.write(1, n, &format!("k{n}"), Some(b"v"));
    }
    world.run(5_000);
    // Its hints are gone with the coordinator.
    world.limits.repair.cycle_ms = 1 << 40;
    let map = world.map.clone();
    let shards = Shards::new(0..32, map.clone(), world.limits, Planted::default());
    world.nodes.get_mut(&NodeNo(1)).unwrap().shards = shards;
    world.input(NodeNo(1), |node, now, out| node.shards.on_map(now, &mut node.store, map, NodeNo(1), out));
    world.back(3);
    world.run(10_000);
    assert!(world.equal(1, 3));
    assert_eq!(world.nodes[&NodeNo(3)].store.len(), 500);
}

/// Tombstones on all nodes.
fn tombstones(world: &World) -> u64 {
    world.nodes.values().map(|node| node.store.stats().tombstones).sum()
}

#[test]
fn tombstones_go_and_what_they_hid_never_returns() {
    seeds(|seed| {
        let mut world = World::new(seed);
        (0..300).for_each(|n| world.put(&[1, 2, 3], &format!("k{n}"), Some(b"old"), world.version(200_000, n)));
        // The third misses the deletes; half of them reached one only, with a value that only another has.
        (0..300).for_each(|n| {
            let on = if n % 2 == 0 { &[1, 2][..] } else { &[2] };
            world.put(on, &format!("k{n}"), None, world.version(100_000, n));
        });
        (0..50).for_each(|n| world.put(&[3], &format!("x{n}"), Some(b"kept"), world.version(90_000, n)));
        world.crash(3);
        world.run(120_000);
        assert!(tombstones(&world) >= 450, "a replica that is away keeps them");
        assert!(world.nodes[&NodeNo(1)].shards.stats().purge.blocked > 20);
        world.back(3);
        world.run(300_000);
        assert_eq!(tombstones(&world), 0, "{:?}", world.nodes[&NodeNo(1)].shards.stats().purge);
        assert!(world.equal(1, 2) && world.equal(2, 3));
        // Late: a hint with the old value, and the round's own exchange once more.
        let rounds = (1..400).map(|round| (crate::purge::PURGE | round << 24 | 5, 1));
        for (op, from) in rounds.chain([(crate::hints::HINT | 1, 2)]) {
            let key = "k4";
            let hash = world.keyspace().locate(key.as_bytes());
            let shard = world.keyspace().shard(hash);
            let ask = crate::wire::Ask { op, shard, epoch: world.map.placement(shard).epoch, left_ms: 0 };
            let version = Version { hlc: Hlc::new(WALL - 200_000, 4), node: 1 };
            let entry = Entry { key: key.as_bytes(), value: b"old", version, expires_at: 0, tombstone: false };
            let message = Message::Write(ask, crate::wire::Stored { hash, entry });
            world.input(NodeNo(3), |node, now, out| {
                node.shards.on_message(now, &mut node.store, NodeNo(from), &message, out);
            });
        }
        world.run(130_000);
        for no in 1..=3 {
            assert!((0..300).all(|n| world.holds(no, &format!("k{n}")).is_none()));
            assert!((0..50).all(|n| world.holds(no, &format!("x{n}")).is_some()));
        }
    });
}

/// A round broke off behind its fence: repair may not touch what differs below it, the next round does.
#[test]
fn what_differs_below_a_fence_is_exchanged_by_the_next_round() {
    let mut world = World::new(19);
    for (on, key, value) in [(2, "{t}a", Some(&b"kept"[..])), (1, "{t}b", Some(b"kept")), (3, "{t}c", None)] {
        world.put(&[on], key, value, world.version(90_000, 0));
    }
    world.put(&[1], "{t}d", None, world.version(90_000, 0));
    let (until, shard) = (world.version(70_000, 0), world.keyspace().shard(world.keyspace().locate(b"{t}")));
    for node in world.nodes.values_mut() {
        node.store.raise_floor(shard, until);
    }
    world.run(100_000);
    assert!(world.equal(1, 2) && world.equal(2, 3));
    for no in 1..=3 {
        assert!(world.holds(no, "{t}a").is_some() && world.holds(no, "{t}b").is_some());
    }
    assert_eq!(tombstones(&world), 0);
}

/// The same without a tombstone that would call for a round: repair says that one is needed, whoever holds what the others lack.
#[test]
fn what_differs_below_a_fence_calls_for_a_round_itself() {
    for holders in [&[1][..], &[2], &[3], &[1, 2], &[2, 3]] {
        let mut world = World::new(29);
        (0..64).for_each(|n| world.put(holders, &format!("k{n}"), Some(b"kept"), world.version(90_000, n)));
        world.raise_floors(&[1, 2, 3], world.version(70_000, 0));
        world.run(300_000);
        for no in 1..=3 {
            assert!((0..64).all(|n| world.holds(no, &format!("k{n}")).is_some()), "{holders:?}, {no}");
        }
        let rounds = |world: &World| world.nodes.values().map(|n| n.shards.stats().purge.rounds).sum::<u64>();
        let before = rounds(&world);
        world.run(300_000);
        assert_eq!(rounds(&world), before, "once they are equal no more rounds are begun");
    }
}

/// A hint that was kept for long brings a tombstone to one replica after all have purged it. The orderer, which has none, would never
/// begin another round.
#[test]
fn a_tombstone_that_comes_after_its_purge_is_forgotten_once_more() {
    let mut world = World::new(23);
    let (until, shard) = (world.version(70_000, 0), world.keyspace().shard(world.keyspace().locate(b"k")));
    for node in world.nodes.values_mut() {
        node.store.raise_floor(shard, until);
    }
    let late = (1..=3).find(|&no| world.map.placement(shard).orderer() != Some(NodeNo(no))).unwrap();
    let (version, wall) = (world.version(90_000, 0), world.now().wall);
    let grave = Entry { key: b"k", value: b"", version, expires_at: 0, tombstone: true };
    world.nodes.get_mut(&NodeNo(late)).unwrap().store.fill(grave, wall).unwrap();
    world.run(200_000);
    assert_eq!(tombstones(&world), 0);
    assert!(world.equal(1, 2) && world.equal(2, 3));
}

/// The same without a fence: what the third had comes back.
#[test]
fn a_purge_without_a_fence_is_noticed() {
    let returns = |planted| {
        let mut limits = Limits::default();
        limits.repair.cycle_ms = 1_000_000;
        let mut world = World::with(1, three(), limits, planted);
        world.put(&[1, 2, 3], "k", Some(b"old"), world.version(200_000, 0));
        world.put(&[1, 2], "k", None, world.version(100_000, 0));
        // Past the first look at everything.
        world.run(1_500_000);
        assert_eq!(tombstones(&world), 0);
        (1..=3).any(|no| world.holds(no, "k").is_some())
    };
    assert!(!returns(Planted::default()));
    assert!(returns(Planted::with(Bug::PurgeWithoutFence)));
}

#[test]
fn whatever_happens_the_last_write_stays() {
    seeds(|seed| {
        let mut world = World::new(seed);
        let mut token = 0;
        for step in 0..60 {
            let random = world.random();
            if step % 12 == 3 {
                world.crash(1 + (random % 3) as u16);
            }
            if step % 12 == 9 {
                world.down.clear();
                world.set_alive();
            }
            for _ in 0..40 {
                let (random, at) = (world.random(), 1 + (world.random() % 3) as u16);
                if !world.down.contains(&NodeNo(at)) {
                    token += 1;
                    let value: Option<&[u8]> = (random % 3 > 0).then_some(b"random");
                    world.write(at, token, &format!("k{}", random % 97), value);
                }
                (0..random % 5).for_each(|_| _ = world.deliver());
            }
            world.run(7_000);
        }
        world.down.clear();
        world.set_alive();
        for n in 0..97u64 {
            world.write(1 + (n % 3) as u16, 1_000_000 + n, &format!("k{n}"), (n % 2 > 0).then_some(b"last"));
        }
        world.run(400_000);
        assert!(world.equal(1, 2) && world.equal(2, 3));
        assert_eq!(tombstones(&world), 0);
        for n in 0..97 {
            let expected: Option<&[u8]> = (n % 2 > 0).then_some(b"last");
            assert!((1..=3).all(|no| world.holds(no, &format!("k{n}")).as_deref() == expected), "k{n}");
        }
        let purged: u64 = world.nodes.values().map(|node| node.shards.stats().purge.purged).sum();
        assert!(purged > 32, "rounds ran meanwhile: {purged}");
    });
}
