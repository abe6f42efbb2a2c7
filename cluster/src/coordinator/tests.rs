//! Dialogues with a coordinator: what it tells its client, answer by answer. Peers are played by the test.

use std::sync::Arc;

use gridkv_engine::backend::Registry;
use gridkv_engine::hash::KeyHash;
use gridkv_engine::store::{Store, StoreConfig};
use rkyv::util::AlignedVec;

use super::*;
use crate::ids::Now;
use crate::map::testing::{candidate, step_all, three};
use crate::map::{Change, Map, Transition};
use crate::outbox::Outbox;
use crate::planted::Planted;
use crate::shards::{Limits, Operation, Shards};

const TOKEN: u64 = 7;

/// Node 1, of three that each hold everything if nothing else is said.
struct Node {
    shards: Shards,
    store: Store,
    out: Outbox,
    now: Now,
}

impl Node {
    fn new() -> Node {
        Node::with(three())
    }

    fn with(map: Map) -> Node {
        let map = Arc::new(map);
        let mut shards = Shards::new(0..32, map.clone(), Limits::default(), Planted::default());
        let keyspace = shards.view().keyspace();
        let config = StoreConfig { keyspace, owned: 0..32, keep_tombstones: true, ..StoreConfig::default() };
        let backend = Registry::default().make("memory-sharded", &config.backend()).unwrap();
        let mut store = Store::new(config, backend);
        let (now, mut out) = (Now { mono: 1, wall: 1_000_000_000 }, Outbox::new());
        shards.on_map(now, &mut store, map, NodeNo(1), &mut out);
        let mut node = Node { shards, store, out, now };
        node.alive(&[1, 2, 3]);
        node
    }

    fn alive(&mut self, alive: &[u16]) {
        let alive = alive.iter().map(|&no| NodeNo(no)).collect();
        self.shards.on_alive(self.now, &mut self.store, alive, &mut self.out);
        self.out.clear_sends();
    }

    fn locate(&self, key: &[u8]) -> KeyHash {
        self.store.locate(key)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) {
        let hash = self.locate(key);
        let place = (hash, key);
        let write = Operation::Write { key: place, value: Some(value), expires_at: 0, level: Level::Quorum };
        self.shards.begin(self.now, &mut self.store, TOKEN, write, &mut self.out);
    }

    /// Writes that were sent, by receiver, with what an answer to them names.
    fn writes(&mut self) -> Vec<(NodeNo, Ask)> {
        self.sent(|message| matches!(message, Message::Write(..)))
    }

    fn reads(&mut self) -> Vec<(NodeNo, Ask)> {
        self.sent(|message| matches!(message, Message::Read(..)))
    }

    fn sent(&mut self, wanted: impl Fn(&Message<'_>) -> bool) -> Vec<(NodeNo, Ask)> {
        let mut found = Vec::new();
        for (send, bytes) in self.out.sends() {
            let mut aligned = AlignedVec::<16>::new();
            aligned.extend_from_slice(bytes);
            if let Some(message) = Message::read(&aligned).ok().filter(&wanted) {
                found.push((send.to, message.ask()));
            }
        }
        self.out.clear_sends();
        found
    }

    fn hear(&mut self, from: NodeNo, message: &Message<'_>) {
        self.shards.on_message(self.now, &mut self.store, from, message, &mut self.out);
    }

    /// Time passes until so many milliseconds later.
    fn wait(&mut self, ms: Millis) {
        self.now = Now { mono: self.now.mono + ms, wall: self.now.wall + ms };
        self.shards.on_deadline(self.now, &mut self.store, &mut self.out);
    }

    /// How the operation has ended.
    fn outcome(&mut self) -> Option<Outcome> {
        let mut done = self.out.take_done();
        assert!(done.len() <= 1 && done.iter().all(|(token, _)| *token == TOKEN));
        done.pop().map(|(_, outcome)| outcome)
    }
}

#[test]
fn a_write_at_a_node_without_a_copy_is_acknowledged_when_w_replicas_have_stored_it() {
    let map = three().apply(&Change::Admit(candidate(4, 1))).unwrap();
    let leave = Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) };
    let map = [leave, Transition::ReadNew, Transition::Finish].into_iter().fold(map, |map, step| step_all(&map, step));
    let mut node = Node::with(map);
    node.alive(&[1, 2, 3, 4]);
    node.set(b"k", b"v");
    let sent = node.writes();
    assert_eq!(sent.iter().map(|(to, _)| to.0).collect::<Vec<_>>(), [4, 2, 3]);
    assert_eq!(node.outcome(), None, "sent is not stored");
    node.hear(sent[0].0, &Message::Wrote(sent[0].1));
    node.hear(sent[0].0, &Message::Wrote(sent[0].1));
    assert_eq!(node.outcome(), None, "one of them is not two");
    node.hear(sent[2].0, &Message::Wrote(sent[2].1));
    assert!(matches!(node.outcome(), Some(Outcome::Written { .. })));
}

#[test]
fn a_replica_that_is_filled_does_not_count() {
    let map = three().apply(&Change::Admit(candidate(2, 2))).unwrap();
    let mut node = Node::with(map);
    node.alive(&[1, 3, 4]);
    node.set(b"k", b"v");
    let sent = node.writes();
    let answer = |no: u16| *sent.iter().find(|(to, _)| to.0 == no).expect("it is written to");
    let ((filling, ask), (serving, again)) = (answer(4), answer(3));
    node.hear(filling, &Message::Wrote(ask));
    assert_eq!(node.outcome(), None);
    node.hear(serving, &Message::Wrote(again));
    assert!(matches!(node.outcome(), Some(Outcome::Written { .. })));
}

#[test]
fn a_write_that_nobody_answers_is_never_acknowledged() {
    let mut node = Node::new();
    node.set(b"k", b"v");
    assert_eq!(node.writes().len(), 2);
    node.wait(999);
    assert_eq!(node.outcome(), None);
    node.wait(1);
    assert!(matches!(node.outcome(), Some(Outcome::Unknown { .. })), "they may have it");
}

#[test]
fn a_write_with_nobody_to_send_it_to_is_refused_and_leaves_nothing() {
    let mut node = Node::new();
    node.alive(&[1]);
    node.set(b"k", b"v");
    assert!(node.writes().is_empty());
    assert!(matches!(node.outcome(), Some(Outcome::Failed(Failure::NoQuorum { have: 1, need: 2, .. }))));
    let hash = node.locate(b"k");
    assert!(node.store.raw(hash, b"k").is_none());
}

/// The next read may ask replicas of the new set only, and of these node 2 alone may have it: a write that nobody acknowledged, which
/// the joining node missed.
#[test]
fn what_a_read_finds_while_its_shard_moves_is_on_a_quorum_of_the_new_set_first() {
    let entry = |key| {
        let version = Version { hlc: gridkv_engine::hlc::Hlc::at(1_000_000_000), node: 2 };
        Entry { key, value: b"v", version, expires_at: 0, tombstone: false }
    };
    for moves in [false, true] {
        let mut map = three().apply(&Change::Admit(candidate(4, 1))).unwrap();
        if moves {
            map = step_all(&map, Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) });
        }
        let mut node = Node::with(map);
        node.alive(&[1, 2, 3, 4]);
        node.store.merge(entry(b"k"), node.now.wall).unwrap();
        let hash = node.locate(b"k");
        let read = Operation::Read { key: (hash, b"k"), level: Level::Quorum };
        node.shards.begin(node.now, &mut node.store, TOKEN, read, &mut node.out);
        let asked = node.reads();
        let (to, ask) = asked[0];
        assert_eq!((asked.len(), to), (1, NodeNo(2)));
        node.hear(to, &Message::Found(ask, Some(Stored { hash, entry: Entry { key: &[], ..entry(b"k") } }), false));
        if moves {
            assert_eq!(node.outcome(), None, "node 2 alone is no quorum of the new set");
            let writes = node.writes();
            let (to, ask) = *writes.iter().find(|(to, _)| *to == NodeNo(4)).unwrap();
            node.hear(to, &Message::Wrote(ask));
        }
        assert!(matches!(node.outcome(), Some(Outcome::Found(Some(_)))), "moves: {moves}");
    }
}

#[test]
fn a_version_that_all_others_refuse_as_far_ahead_is_nowhere_and_has_failed() {
    let mut node = Node::new();
    node.set(b"k", b"v");
    for (to, ask) in node.writes() {
        assert_eq!(node.outcome(), None);
        node.hear(to, &Message::Refused(ask, Why::Ahead));
    }
    assert_eq!(node.outcome(), Some(Outcome::Failed(Failure::Clock)));
    let hash = node.locate(b"k");
    assert!(node.store.raw(hash, b"k").is_none(), "not even here");
}

/// Somebody's clock was set while it was sent for the second time: what was refused first may be stored now, or the other way about.
#[test]
fn a_version_that_was_sent_twice_and_refused_may_be_there() {
    let mut node = Node::new();
    node.set(b"k", b"v");
    let first = node.writes();
    node.wait(100);
    assert_eq!(node.writes().len(), 2, "the silent are asked again");
    for (to, ask) in first {
        node.hear(to, &Message::Refused(ask, Why::Ahead));
    }
    assert!(matches!(node.outcome(), Some(Outcome::Unknown { .. })));
}

#[test]
fn a_node_with_a_wrong_clock_makes_no_versions_and_does_all_else() {
    let mut node = Node::new();
    let wall = node.now.wall;
    // It was an hour ahead for a moment.
    node.store.mint(wall + 3_600_000);
    node.shards.set_quarantined(node.now, &mut node.store, true, 60_000);
    node.set(b"k", b"v");
    assert_eq!(node.outcome(), Some(Outcome::Failed(Failure::Clock)));
    let hash = node.locate(b"k");
    let delete = Operation::Delete { key: (hash, b"k"), level: Level::Quorum };
    node.shards.begin(node.now, &mut node.store, TOKEN, delete, &mut node.out);
    assert_eq!(node.outcome(), Some(Outcome::Failed(Failure::Clock)));
    let change = Changed { hash, key: (*b"k").into(), value: None, expires_at: 0, version: None };
    let commit = Operation::Commit { changes: vec![change], level: Level::Quorum, ordered: false };
    node.shards.begin(node.now, &mut node.store, TOKEN, commit, &mut node.out);
    assert_eq!(node.outcome(), Some(Outcome::Failed(Failure::Clock)));
    assert!(node.writes().is_empty());
    let ordered = (0..).map(|n: u32| node.locate(n.to_string().as_bytes()));
    let placement = |hash| node.shards.view().placement_of(hash).orderer();
    let own = ordered.clone().find(|&hash| placement(hash) == Some(NodeNo(1))).unwrap();
    assert!(matches!(node.shards.orderer(own), Err(Failure::NoOrderer { .. })));
    let shard = node.shards.view().shard(own);
    let epoch = node.shards.view().map.placement(shard).epoch;
    let ask = Ask { op: 1, shard, epoch, left_ms: 1000 };
    node.hear(NodeNo(2), &Message::Order(ask, own, b"request"));
    assert!(node.shards.take_orders().is_empty());
    // Its clock is a minute behind: what others write now is ahead of it by as much.
    for (ahead, stored) in [(60_400, true), (70_000, false)] {
        let key = ahead.to_string().into_bytes();
        let hash = node.locate(&key);
        let version = Version { hlc: gridkv_engine::hlc::Hlc::at(wall + ahead), node: 2 };
        let entry = Entry { key: &key, value: b"v", version, expires_at: 0, tombstone: false };
        let shard = node.shards.view().shard(hash);
        let ask = Ask { op: 1, shard, epoch: node.shards.view().map.placement(shard).epoch, left_ms: 1000 };
        node.hear(NodeNo(2), &Message::Write(ask, Stored { hash, entry }));
        assert_eq!(node.store.raw(hash, &key).is_some(), stored);
    }
    node.out.clear_sends();
    let read = Operation::Read { key: (hash, b"k"), level: Level::One };
    node.shards.begin(node.now, &mut node.store, TOKEN, read, &mut node.out);
    assert_eq!(node.outcome(), Some(Outcome::Found(None)));
    node.shards.set_quarantined(node.now, &mut node.store, false, 0);
    assert!(node.store.mint(wall).hlc.millis() <= wall + 501, "what it makes now is taken by others");
    node.set(b"k", b"v");
    assert_eq!(node.writes().len(), 2);
    assert!(node.shards.orderer(own).is_ok());
}
