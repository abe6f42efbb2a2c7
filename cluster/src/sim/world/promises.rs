//! What is promised, one promise after the other: worlds in which a hand-written story happens, and its end is looked at.
//!
//! The nodes have their real control planes with the times of a real cluster, over a calm network; one client asks one thing at a time.
//! Seeds look for what nobody thought of; these say what everybody counts on.

use gridkv_engine::hash::ShardId;

use super::{MS, World};
use crate::map::{Map, Standing};
use crate::planted::Planted;
use crate::quorum::Quorums;
use crate::sim::authority::is_whole;
use crate::sim::history::{Asked, Came};
use crate::sim::node::key_of;
use crate::sim::options::{Control, Gossip, Options};
use crate::sim::trace::Trace;
use crate::{membership, planner};

const KEYS: u64 = 40;
/// How long anything may take that has no time of its own.
const PATIENCE: u64 = 120_000;
/// After so long each copy was compared with the others, also when something changed meanwhile.
const REPAIRED: u64 = 120_000;

struct Story {
    world: World,
    value: u64,
}

impl Story {
    /// So many nodes, three copies, and all of them where they should be.
    fn new(nodes: usize) -> Story {
        let times = membership::Settings::default();
        Story::with(
            nodes,
            Gossip {
                probe_ms: times.probe_period,
                suspect_ms: times.suspect,
                exchange_ms: times.exchange,
                disk_us: 1000,
            },
        )
    }

    fn with(nodes: usize, gossip: Gossip) -> Story {
        let options = Options {
            nodes,
            max_nodes: nodes,
            cores: 1,
            quorums: Quorums { n: 3, w: 2, r: 2 },
            keys: KEYS,
            clients: 0,
            value_bytes: 8,
            hint_bytes: 1 << 20,
            change_log: 1024,
            fill_streams: 4,
            fill_bytes: 100 << 20,
            skew_ms: 0,
            map_ms: 2,
            replace_after_ms: planner::Settings::default().replace_after_ms,
            moves_at_once: planner::Settings::default().moves_at_once,
            control: Control::Planes,
            gossip,
            ..Options::calm(1, 1_000_000)
        };
        let mut world = World::new(&options, Planted::default(), Trace::new());
        // Everything is asked for at the normal level, and nothing is asked by itself.
        (world.looking, world.healed) = (true, true);
        let mut story = Story { world, value: 0 };
        story.until("the cluster is there", |story| story.is_whole(nodes));
        story
    }

    fn step(&mut self) {
        let event = self.world.queue.pop().expect("a node always has something to do").0;
        self.world.time = event.at;
        self.world.handle(event.what);
        assert!(self.world.violation.is_none(), "{:?}", self.world.violation);
    }

    fn now_ms(&self) -> u64 {
        self.world.time / MS
    }

    /// Time passes.
    fn pass(&mut self, ms: u64) {
        let end = self.world.time + ms * MS;
        while self.world.queue.peek().is_some_and(|event| event.0.at <= end) {
            self.step();
        }
        self.world.time = end;
    }

    fn until(&mut self, what: &str, condition: impl Fn(&Story) -> bool) {
        let end = self.now_ms() + PATIENCE;
        while !condition(self) {
            assert!(self.now_ms() < end, "still not so: {what}; {:?}", self.map());
            self.step();
        }
    }

    fn map(&self) -> &Map {
        self.world.map()
    }

    /// So many nodes are members, all of them say so, and all copies are where they should be: each holds its share, about.
    fn is_whole(&self, nodes: usize) -> bool {
        let map = self.map();
        let present = map.present().count();
        let shards = map.placements.len();
        let share = shards * nodes.min(3) / nodes;
        let held = |no| map.placements.iter().filter(|p| p.names(no)).count();
        let up = self.world.nodes.iter().filter(|node| node.up);
        map.epoch > 0
            && present == nodes
            && map.present().all(|m| m.standing == Standing::Up && held(m.no) + 1 >= share)
            && is_whole(map)
            && map.placements.iter().all(|p| p.replicas.len() == nodes.min(3))
            && up.clone().count() == nodes
            && up.clone().all(|node| {
                let views = node.cores.iter().map(|core| core.shards.view());
                views.clone().all(|view| view.map.epoch == map.epoch && view.alive.len() == nodes)
            })
    }

    /// Whether these nodes all see so many.
    fn see(&self, nodes: &[usize], count: usize) -> bool {
        nodes.iter().all(|&node| self.world.nodes[node].cores[0].shards.view().alive.len() == count)
    }

    /// What a client is told at a node.
    fn ask(&mut self, node: usize, key: u64, asked: Asked) -> Came {
        let op = self.world.history.ops.len();
        self.world.start_op(0, node, (key, false), asked, true);
        while self.world.history.ops[op].end == u64::MAX {
            self.step();
        }
        self.world.history.ops[op].came
    }

    fn write(&mut self, node: usize, key: u64) -> (u64, Came) {
        self.value += 1;
        let value = self.value;
        (value, self.ask(node, key, Asked::Set { value, expires_at: 0 }))
    }

    /// Writes a new value, which is acknowledged.
    fn set(&mut self, node: usize, key: u64) -> u64 {
        let (value, came) = self.write(node, key);
        assert!(matches!(came, Came::Written(_)), "key {key} at node {node}: {came:?}");
        value
    }

    /// What a node finds.
    fn get(&mut self, node: usize, key: u64) -> Option<u64> {
        match self.ask(node, key, Asked::Get) {
            Came::Found(seen) => seen.map(|seen| seen.value),
            other => panic!("key {key} at node {node}: {other:?}"),
        }
    }

    fn stop(&mut self, node: usize) {
        self.world.stop(node);
    }

    fn start(&mut self, node: usize) {
        self.world.start(node);
    }

    fn links(&self, node: usize) -> Vec<(usize, usize)> {
        let others = (0..self.world.nodes.len()).filter(|&other| other != node);
        others.flat_map(|other| [(node, other), (other, node)]).collect()
    }

    /// The nodes that hold a key, by what they hold.
    fn holders(&mut self, key: u64) -> Vec<Option<u64>> {
        let name = key_of(key, false);
        let shard = self.world.shard_of(key, false);
        let placement = self.map().placement(ShardId(shard)).clone();
        let mut held = Vec::new();
        for replica in placement.replicas {
            let node = &mut self.world.nodes[self.world.lives[&replica.node].0];
            let core = node.core_of(shard).expect("it runs");
            let store = &mut node.cores[core].store;
            let hash = store.locate(&name);
            let entry = store.raw(hash, &name);
            held.push(entry.filter(|entry| !entry.tombstone).map(|entry| crate::sim::node::value_of(entry.value)));
        }
        held
    }
}

/// Each node in turn, for one key after the other.
fn turn(nodes: &[usize]) -> impl Iterator<Item = (u64, usize)> + use<> {
    let nodes = nodes.to_vec();
    (0..KEYS).map(move |key| (key, nodes[key as usize % nodes.len()]))
}

#[test]
fn a_node_that_never_returns_is_replaced_and_nothing_is_lost() {
    let mut story = Story::new(4);
    let mut values: Vec<u64> = turn(&[0, 1, 2, 3]).map(|(key, node)| story.set(node, key)).collect();
    let dead = story.world.nodes[3].no;
    let replace_after = story.world.options.replace_after_ms;
    story.stop(3);
    let at = story.now_ms();
    story.until("others know it", |story| story.see(&[0, 1, 2], 3));
    for (key, node) in turn(&[0, 1, 2]).step_by(2) {
        values[key as usize] = story.set(node, key);
    }
    story.pass(at + replace_after - story.now_ms());
    assert!(story.map().placements.iter().any(|p| p.names(dead)), "it could have come back");
    story.until("three others hold everything", |story| story.is_whole(3));
    assert!(story.map().placements.iter().all(|p| !p.names(dead) && p.losses == 0));
    assert!(story.now_ms() < at + replace_after + 30_000, "{} ms after its end", story.now_ms() - at);
    story.pass(REPAIRED);
    for (key, node) in turn(&[0, 1, 2]) {
        assert_eq!(story.holders(key), [Some(values[key as usize]); 3], "key {key}");
        assert_eq!(story.get(node, key), Some(values[key as usize]), "key {key}");
    }
    // The copies are worth something: another one may go now.
    story.stop(0);
    story.until("others know it", |story| story.see(&[1, 2], 2));
    for (key, node) in turn(&[1, 2]) {
        assert_eq!(story.get(node, key), Some(values[key as usize]), "key {key}");
    }
}

/// Writes everything, sends node 3 away for an hour, overwrites one half meanwhile and deletes the other half.
fn away_for_an_hour(away: fn(&mut Story), back: fn(&mut Story)) {
    const HOUR: u64 = 3_600_000;
    // Less talk than usual, as an hour is long.
    let mut story = Story::with(4, Gossip { probe_ms: 2000, suspect_ms: 6000, exchange_ms: 30_000, disk_us: 1000 });
    let old: Vec<u64> = turn(&[0, 1, 2, 3]).map(|(key, node)| story.set(node, key)).collect();
    let stale = story.world.nodes[3].no;
    let returns = story.now_ms() + HOUR;
    away(&mut story);
    story.until("it is replaced", |story| {
        let is_there = |m: &crate::map::Member| m.no == stale && m.standing == Standing::Up;
        is_whole(story.map()) && !story.map().members.iter().any(is_there)
    });
    let mut values = vec![None; KEYS as usize];
    for (key, node) in turn(&[0, 1, 2]) {
        if key % 2 == 0 {
            values[key as usize] = Some(story.set(node, key));
        } else {
            assert_eq!(story.ask(node, key, Asked::Delete), Came::Deleted(true));
        }
    }
    story.pass(returns - story.now_ms());
    let of_shard = |node: usize, shard| story.world.nodes[node].cores[0].store.digest(ShardId(shard)).count;
    let entries: u64 =
        (0..3).flat_map(|node| (0..32).map(move |shard| (node, shard))).map(|(n, s)| of_shard(n, s)).sum();
    assert_eq!(entries, 3 * KEYS / 2, "the tombstones are purged: nothing but its number keeps the old values out");
    back(&mut story);
    // From its first moment on: it refuses, or it says what holds now.
    let mut refused = 0;
    let end = story.now_ms() + PATIENCE;
    while !story.is_whole(4) {
        assert!(story.now_ms() < end, "it does not come back: {:?}", story.map());
        let key = story.now_ms() % KEYS;
        if story.world.nodes[3].up {
            match story.ask(3, key, Asked::Get) {
                Came::Found(seen) => assert_eq!(seen.map(|seen| seen.value), values[key as usize], "key {key}"),
                _ => refused += 1,
            }
        }
        story.pass(7);
    }
    assert!(refused > 0, "it was asked before it knew");
    assert!(story.world.nodes[3].no > stale, "another life");
    story.pass(REPAIRED);
    for key in 0..KEYS {
        assert_eq!(story.holders(key), [values[key as usize]; 3], "key {key}, {} before", old[key as usize]);
        for node in 0..4 {
            assert_eq!(story.get(node, key), values[key as usize], "key {key} at node {node}");
        }
    }
    assert_eq!(story.world.history.check(), Ok(()));
}

#[test]
fn a_node_that_was_cut_off_for_an_hour_brings_nothing_back() {
    let away = |story: &mut Story| {
        let links = story.links(3);
        story.world.network.cut(&links);
    };
    let back = |story: &mut Story| {
        let links = story.links(3);
        story.world.network.mend(&links);
    };
    away_for_an_hour(away, back);
}

#[test]
fn a_node_that_stood_still_for_an_hour_brings_nothing_back() {
    let away = |story: &mut Story| story.world.nodes[3].paused_until = story.world.time + 3_600_000 * MS;
    away_for_an_hour(away, |_| {});
}

#[test]
fn a_replica_that_missed_deletes_does_not_undo_them() {
    let mut story = Story::new(3);
    for (key, node) in turn(&[0, 1, 2]) {
        story.set(node, key);
    }
    let links = story.links(2);
    story.world.network.cut(&links);
    story.until("others know it", |story| story.see(&[0, 1], 2));
    for (key, node) in turn(&[0, 1]) {
        assert_eq!(story.ask(node, key, Asked::Delete), Came::Deleted(true));
    }
    assert!(story.holders(0).contains(&None) && story.holders(0).iter().any(Option::is_some), "it has missed them");
    let life = story.world.nodes[2].no;
    story.world.network.mend(&links);
    story.until("it is there again", |story| story.is_whole(3));
    assert_eq!(story.world.nodes[2].no, life, "it was not away for long");
    for key in 0..KEYS {
        for node in [2, 0, 1] {
            assert_eq!(story.get(node, key), None, "key {key} at node {node}");
        }
    }
    story.pass(REPAIRED);
    for key in 0..KEYS {
        assert_eq!(story.holders(key), [None; 3], "key {key}");
    }
}

#[test]
fn a_node_that_dies_is_noticed_by_all_within_five_seconds() {
    for nodes in [3, 5] {
        let mut story = Story::new(nodes);
        story.stop(1);
        let at = story.now_ms();
        let others = |story: &Story| {
            let mut others = story.world.nodes.iter().filter(|node| node.up);
            others.all(|node| node.cores[0].shards.view().alive.len() == nodes - 1)
        };
        story.until("all others know it", |story| others(story));
        let took = story.now_ms() - at;
        assert!(took < 5_000, "{took} ms, of {nodes} nodes");
        assert!(story.map().present().count() == nodes, "noticed, not given up");
    }
}

#[test]
fn a_node_that_joins_answers_for_all_keys_from_its_first_answer_on() {
    let mut story = Story::new(3);
    let values: Vec<u64> = turn(&[0, 1, 2]).map(|(key, node)| story.set(node, key)).collect();
    let node = crate::sim::node::Node::new(3, 0);
    story.world.nodes.push(node);
    story.start(3);
    let (mut answers, mut key) = (0, 0);
    let end = story.now_ms() + PATIENCE;
    while !story.is_whole(4) {
        assert!(story.now_ms() < end, "it does not join: {:?}", story.map());
        if let Came::Found(seen) = story.ask(3, key, Asked::Get) {
            assert_eq!(seen.map(|seen| seen.value), Some(values[key as usize]), "key {key}, answer {answers}");
            answers += 1;
        }
        key = (key + 1) % KEYS;
        story.pass(1);
    }
    assert!(answers > 10, "only {answers} while it joined");
    story.pass(REPAIRED);
    for key in 0..KEYS {
        assert_eq!(story.get(3, key), Some(values[key as usize]), "key {key}");
        assert_eq!(story.holders(key), [Some(values[key as usize]); 3], "key {key}");
    }
}

#[test]
fn with_two_of_three_nodes_dead_no_write_is_acknowledged_and_none_appears_later() {
    let mut story = Story::new(3);
    let values: Vec<u64> = turn(&[0, 1, 2]).map(|(key, node)| story.set(node, key)).collect();
    let links: Vec<_> = [1, 2].into_iter().flat_map(|node| story.links(node)).collect();
    story.world.network.cut(&links);
    let mut failed = Vec::new();
    for key in 0..KEYS {
        let (value, came) = story.write(0, key);
        assert!(matches!(came, Came::Failed | Came::Unknown), "key {key}: {came:?}");
        if came == Came::Failed {
            failed.push((key, value));
        }
        story.pass(200);
    }
    assert!(failed.len() as u64 > KEYS / 2, "as soon as it knows it says so");
    story.world.network.mend(&links);
    story.until("all are there again", |story| story.is_whole(3));
    for (key, value) in failed {
        for node in 0..3 {
            assert_ne!(story.get(node, key), Some(value), "key {key} at node {node}");
        }
    }
    for key in 0..KEYS {
        assert!(story.get(1, key).is_some_and(|value| value >= values[key as usize]), "key {key}");
    }
    assert_eq!(story.world.history.check(), Ok(()));
}

/// One clock runs a tenth too fast. As long as that is little its writes count like all others; when it is far ahead nobody takes
/// them, and they shadow nothing.
#[test]
fn a_clock_that_runs_a_tenth_fast_loses_and_hides_nothing() {
    let mut story = Story::new(3);
    story.world.history.ahead_ms = u64::MAX;
    let begun = story.now_ms();
    let (mut refused, mut taken) = (0, 0);
    let mut mine: Vec<Option<u64>> = vec![None; KEYS as usize];
    for round in 0..300 {
        story.pass(100);
        let ahead = (story.now_ms() - begun) / 10;
        story.world.nodes[0].offset_ms = ahead as i64;
        let key = round % (KEYS / 2);
        // Its own keys: what it acknowledges is there.
        let before = story.now_ms();
        match story.write(0, KEYS / 2 + key) {
            (value, Came::Written(_)) => {
                // A write that waits for a new map is less far ahead when it is sent again.
                let took = story.now_ms() - before;
                assert!(ahead <= 510 + took, "{ahead} ms ahead, after {took} ms");
                mine[key as usize] = Some(value);
                taken += 1;
            }
            (_, came) => {
                assert!(ahead >= 490, "{came:?} when it was {ahead} ms ahead");
                refused += 1;
            }
        }
        // Keys of all: it tries to be the newest, and must not be when its clock is far off.
        if ahead > 510 {
            let (_, came) = story.write(0, key);
            assert!(!matches!(came, Came::Written(_)), "{ahead} ms ahead");
        }
        for (node, other) in [(1, 2), (2, 1)] {
            let value = story.set(node, key);
            for reader in [other, node, 0] {
                assert_eq!(story.get(reader, key), Some(value), "round {round}, node {reader}, {ahead} ms ahead");
            }
        }
    }
    assert!(taken > 30 && refused > 100, "{taken} taken, {refused} refused");
    for reader in 0..3 {
        for key in 0..KEYS / 2 {
            if let Some(value) = mine[key as usize] {
                assert_eq!(story.get(reader, KEYS / 2 + key), Some(value), "its key {key} at node {reader}");
            }
        }
    }
}
