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
        Node::within(map, Limits::default())
    }

    fn within(map: Map, limits: Limits) -> Node {
        let map = Arc::new(map);
        let mut shards = Shards::new(0..32, map.clone(), limits, Planted::default());
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
        self.set_at(key, value, Level::Quorum);
    }

    fn set_at(&mut self, key: &[u8], value: &[u8], level: Level) {
        let write = Operation::Write { key: (self.locate(key), key), value: Some(value), expires_at: 0, level };
        self.shards.begin(self.now, &mut self.store, TOKEN, write, &mut self.out);
    }

    fn read(&mut self, key: &[u8], level: Level) {
        let read = Operation::Read { key: (self.locate(key), key), level };
        self.shards.begin(self.now, &mut self.store, TOKEN, read, &mut self.out);
    }

    /// Hints that wait.
    fn hints(&self) -> u64 {
        self.shards.stats().hints.waiting
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
    let commit = Operation::Commit {
        changes: vec![change],
        level: Level::Quorum,
        ordered: false,
        deadline: node.now.mono + 1000,
    };
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

/// The rest of the cluster may have given up this node and filled another from what is acknowledged since.
#[test]
fn a_node_that_is_cut_off_begins_no_write_that_one_copy_is_enough_for() {
    for (w, level) in [(2, Level::One), (2, Level::Exactly(1)), (1, Level::Quorum)] {
        let mut map = three();
        (map.quorums.w, map.quorums.r) = (w, 4 - w);
        let mut node = Node::with(map);
        node.alive(&[1, 2]);
        node.shards.set_isolated(true);
        node.set_at(b"k", b"v", level);
        assert!(matches!(node.outcome(), Some(Outcome::Failed(Failure::NoQuorum { .. }))), "{level:?}");
        let hash = node.locate(b"k");
        for ordered in [false, true] {
            let orderer = (0..).map(|n: u32| n.to_string().into_bytes()).find(|key| {
                let placement = node.shards.view().placement_of(node.store.locate(key));
                placement.orderer() == Some(NodeNo(1))
            });
            let key = orderer.unwrap();
            let changes = vec![Changed {
                hash: node.locate(&key),
                key: key.clone().into(),
                value: Some(b"v".to_vec()),
                expires_at: 0,
                version: None,
            }];
            let commit = Operation::Commit { changes, level, ordered, deadline: node.now.mono + 1000 };
            node.shards.begin(node.now, &mut node.store, TOKEN, commit, &mut node.out);
            assert!(matches!(node.outcome(), Some(Outcome::Failed(Failure::NoQuorum { .. }))), "{level:?} {ordered}");
        }
        assert!(node.writes().is_empty() && node.store.is_empty() && node.hints() == 0);
        // Two that have it are more than this node alone.
        node.set_at(b"k", b"v", Level::Exactly(2));
        let (to, ask) = node.writes()[0];
        node.hear(to, &Message::Wrote(ask));
        assert!(matches!(node.outcome(), Some(Outcome::Written { .. })));
        assert!(node.store.raw(hash, b"k").is_some());
    }
}

/// The rest of the cluster may have given up this node and filled another from what is acknowledged since.
#[test]
fn a_node_that_is_cut_off_answers_no_read_that_one_copy_is_enough_for() {
    let mut map = three();
    (map.quorums.w, map.quorums.r) = (3, 1);
    let mut node = Node::with(map);
    node.alive(&[1, 2]);
    for (isolated, refused) in [(false, false), (true, true)] {
        node.shards.set_isolated(isolated);
        for level in [Level::One, Level::Quorum, Level::Exactly(1)] {
            node.read(b"k", level);
            let outcome = node.outcome().expect("it has a copy");
            assert_eq!(matches!(outcome, Outcome::Failed(Failure::NoQuorum { .. })), refused, "{level:?}");
        }
        let keys = [(node.locate(b"k"), b"k".as_slice())];
        let prepare =
            Operation::Prepare { keys: &keys, payload: 0, level: Level::Quorum, deadline: node.now.mono + 1000 };
        node.shards.begin(node.now, &mut node.store, TOKEN, prepare, &mut node.out);
        assert_eq!(matches!(node.outcome(), Some(Outcome::Failed(Failure::NoQuorum { .. }))), refused);
    }
    node.read(b"k", Level::Exactly(2));
    assert_eq!(node.reads().len(), 1, "two of three: one of those that would be asked elsewhere");
    let mut map = three();
    map.quorums = crate::quorum::Quorums { n: 1, w: 1, r: 1 };
    map.placements.iter_mut().for_each(|placement| placement.replicas.truncate(1));
    let mut node = Node::with(map);
    node.shards.set_isolated(true);
    let own = (0..).map(|n: u32| n.to_string().into_bytes());
    let own = own.into_iter().find(|key| {
        let hash = node.store.locate(key);
        node.shards.view().placement_of(hash).names(NodeNo(1))
    });
    let own = own.unwrap();
    node.read(&own, Level::Quorum);
    assert_eq!(node.outcome(), Some(Outcome::Found(None)), "nobody else ever had it");
    node.set(&own, b"v");
    assert!(matches!(node.outcome(), Some(Outcome::Written { .. })));
}

#[test]
fn what_was_reported_as_refused_is_not_kept_for_a_replica_that_is_away() {
    // Node 3 goes away after it has refused, or was away from the start.
    for (away_first, why, failure) in [
        (false, Why::Ahead, Failure::Clock),
        (true, Why::Ahead, Failure::Clock),
        (false, Why::Full, Failure::Full),
        (true, Why::Full, Failure::Full),
    ] {
        let mut node = Node::new();
        if away_first {
            node.alive(&[1, 2]);
        }
        node.set(b"k", b"v");
        for (to, ask) in node.writes().into_iter().rev() {
            assert_eq!(node.outcome(), None);
            node.hear(to, &Message::Refused(ask, why));
            if to == NodeNo(3) {
                node.alive(&[1, 2]);
            }
        }
        assert_eq!(node.outcome(), Some(Outcome::Failed(failure)), "{why:?}, away first: {away_first}");
        assert_eq!(node.hints(), 0, "it would appear later");
        let hash = node.locate(b"k");
        assert!(node.store.raw(hash, b"k").is_none());
    }
}

#[test]
fn a_command_of_which_one_key_was_written_and_one_refused_says_so() {
    let mut map = three();
    let [(here, key), (there, other)] = {
        let node = Node::new();
        let located = |key: &'static [u8]| (node.shards.view().shard(node.locate(key)), key);
        [located(b"a"), located(b"b")]
    };
    assert_ne!(here, there);
    // Of the second one's shard all other copies are out of reach.
    for (replica, no) in map.placements[there.index()].replicas.iter_mut().zip([1, 8, 9]) {
        replica.node = NodeNo(no);
    }
    let mut node = Node::with(map);
    let change = |key: &[u8]| Changed {
        hash: node.locate(key),
        key: key.into(),
        value: Some(b"v".to_vec()),
        expires_at: 0,
        version: None,
    };
    let changes = vec![change(key), change(other)];
    let commit = Operation::Commit { changes, level: Level::Quorum, ordered: false, deadline: node.now.mono + 1000 };
    node.shards.begin(node.now, &mut node.store, TOKEN, commit, &mut node.out);
    assert_eq!(node.outcome(), None);
    let (to, ask) = node.writes()[0];
    node.hear(to, &Message::Wrote(ask));
    let failure = Failure::NoQuorum { shard: there.0, have: 1, need: 2 };
    assert_eq!(node.outcome(), Some(Outcome::Part(failure)));
}

#[test]
fn what_somebody_has_is_kept_for_those_that_are_away() {
    let mut node = Node::new();
    node.alive(&[1, 2]);
    node.set(b"k", b"v");
    assert_eq!(node.hints(), 0, "nobody has it yet");
    let (to, ask) = node.writes()[0];
    node.hear(to, &Message::Wrote(ask));
    assert!(matches!(node.outcome(), Some(Outcome::Written { .. })));
    assert_eq!(node.hints(), 1);
}

/// One that may have stored it went away: that the other has no room does not make it a refusal.
#[test]
fn a_write_that_one_replica_has_no_room_for_and_another_may_have_is_unknown() {
    let mut node = Node::new();
    node.set(b"k", b"v");
    let sent = node.writes();
    node.hear(NodeNo(2), &Message::Refused(sent[0].1, Why::Full));
    node.alive(&[1, 2]);
    assert_eq!(node.outcome(), None);
    node.wait(1000);
    assert!(matches!(node.outcome(), Some(Outcome::Unknown { .. })));
    assert_ne!(node.hints(), 0);
}

#[test]
fn values_that_reads_hold_and_commands_that_wait_are_counted() {
    let mut limits = Limits::default();
    limits.coordinator.bytes = 1000;
    let mut node = Node::within(three(), limits);
    let big = |key| {
        let version = Version { hlc: gridkv_engine::hlc::Hlc::at(1_000_000_000), node: 2 };
        Entry { key, value: &[7; 600], version, expires_at: 0, tombstone: false }
    };
    node.store.merge(big(b"k"), node.now.wall).unwrap();
    let answer = |node: &mut Node, asked: Vec<(NodeNo, Ask)>| {
        let hash = node.locate(b"k");
        for (to, ask) in asked {
            let entry = Entry { key: &[], value: &[], ..big(b"k") };
            node.hear(to, &Message::Found(ask, Some(Stored { hash, entry }), false));
        }
    };
    let keys = [(node.locate(b"k"), b"k".as_slice())];
    let prepare = |node: &mut Node, payload| {
        let prepare = Operation::Prepare { keys: &keys, payload, level: Level::Quorum, deadline: node.now.mono + 1000 };
        node.shards.begin(node.now, &mut node.store, TOKEN + 1, prepare, &mut node.out);
    };
    let busy = Some(Outcome::Failed(Failure::Busy));
    // While a replica is slow, each read holds its copy of the value.
    node.read(b"k", Level::Quorum);
    let slow = node.reads();
    assert_eq!((slow.len(), node.outcome()), (1, None));
    node.read(b"k", Level::Quorum);
    assert_eq!(node.outcome(), busy);
    node.shards.invariants();
    node.out.clear_sends();
    answer(&mut node, slow);
    assert!(matches!(node.outcome(), Some(Outcome::Found(Some(_)))));
    node.shards.invariants();
    // Alone it may be as large as it is: the command, and then what it finds.
    prepare(&mut node, 2000);
    let slow = node.reads();
    assert_eq!((slow.len(), node.out.take_done()), (1, Vec::new()));
    node.set(b"other", b"v");
    assert_eq!(node.outcome(), busy);
    node.shards.invariants();
    answer(&mut node, slow);
    assert!(matches!(node.out.take_done()[..], [(_, Outcome::Ready(_))]));
    node.shards.invariants();
    node.set(b"other", b"v");
    assert_eq!((node.writes().len(), node.outcome()), (2, None), "all of it was given back");
}

/// They are here, so no read of them waits for anybody: it is done before it is weighed.
#[test]
fn values_found_for_a_command_are_counted_as_they_come() {
    let mut limits = Limits::default();
    limits.coordinator.bytes = 1000;
    let mut node = Node::within(three(), limits);
    let version = Version { hlc: gridkv_engine::hlc::Hlc::at(1_000_000_000), node: 2 };
    for key in [b"j", b"k"] {
        let entry = Entry { key, value: &[7; 600], version, expires_at: 0, tombstone: false };
        node.store.merge(entry, node.now.wall).unwrap();
    }
    let keys = [b"j", b"k"].map(|key| (node.locate(key), key.as_slice()));
    let prepare = |node: &mut Node| {
        let prepare = Operation::Prepare { keys: &keys, payload: 0, level: Level::One, deadline: node.now.mono + 1000 };
        node.shards.begin(node.now, &mut node.store, TOKEN + 1, prepare, &mut node.out);
        node.shards.invariants();
        node.out.take_done().pop().map(|(_, outcome)| outcome)
    };
    assert!(matches!(prepare(&mut node), Some(Outcome::Ready(_))), "alone it may be as large as it is");
    node.read(b"k", Level::Quorum);
    assert_eq!(node.outcome(), None, "it holds its copy of the value");
    assert_eq!(prepare(&mut node), Some(Outcome::Failed(Failure::Busy)));
}

/// In between another orderer may have written what is newer, and the write-back of what is old reaches a quorum just as well.
#[test]
fn a_read_that_wrote_back_reads_again_when_its_shard_has_changed() {
    let before = three().apply(&Change::Admit(candidate(4, 1))).unwrap();
    let mut node = Node::with(before.clone());
    node.alive(&[1, 2, 3, 4]);
    let version = Version { hlc: gridkv_engine::hlc::Hlc::at(1_000_000_000), node: 2 };
    let entry = Entry { key: b"k", value: b"v", version, expires_at: 0, tombstone: false };
    node.store.merge(entry, node.now.wall).unwrap();
    let keys = [(node.locate(b"k"), b"k".as_slice())];
    let prepare = Operation::Prepare { keys: &keys, payload: 0, level: Level::Quorum, deadline: node.now.mono + 1000 };
    node.shards.begin(node.now, &mut node.store, TOKEN, prepare, &mut node.out);
    let (to, ask) = node.reads()[0];
    node.hear(to, &Message::Found(ask, None, false));
    assert_eq!(node.sent(|message| matches!(message, Message::Write(..))).len(), 2, "it writes back");
    let begin = Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) };
    let map = Arc::new(step_all(&before, begin));
    node.shards.on_map(node.now, &mut node.store, map, NodeNo(1), &mut node.out);
    let sent = node.sent(|message| matches!(message, Message::Write(..) | Message::Read(..)));
    assert_eq!(sent.len(), 1, "it asks again and writes nothing");
    node.shards.invariants();
    assert_eq!(node.outcome(), None);
}

/// The orderer was at work when this node was cut off and heard of another map of the shard: it asked "again", as if it were a read,
/// and told its client that nothing was done.
#[test]
fn a_command_that_was_forwarded_is_unknown_until_its_answer_whatever_this_node_hears_of_the_map() {
    let mut map = three();
    map.placements.iter_mut().for_each(|placement| placement.replicas.rotate_left(1));
    let mut node = Node::with(map);
    node.alive(&[1, 2, 3]);
    let hash = node.locate(b"k");
    assert_eq!(node.shards.orderer(hash), Ok(NodeNo(2)));
    for answers in [true, false] {
        let forward = Operation::Forward { hash, request: b"INCR", to: NodeNo(2), deadline: node.now.mono + 2100 };
        node.shards.begin(node.now, &mut node.store, TOKEN, forward, &mut node.out);
        let (to, ask) = node.sent(|message| matches!(message, Message::Order(..)))[0];
        assert_eq!(ask.left_ms, 2000, "the orderer has to end before, so that its answer comes in time");
        node.shards.set_isolated(true);
        let mut map = (*node.shards.view().map).clone();
        map.epoch += 1;
        let shard = node.shards.view().shard(hash).index();
        map.placements[shard].epoch = map.epoch;
        node.shards.on_map(node.now, &mut node.store, Arc::new(map), NodeNo(1), &mut node.out);
        node.wait(1000);
        assert_eq!(node.outcome(), None);
        if answers {
            node.hear(to, &Message::Ordered(ask, b"1"));
            assert_eq!(node.outcome(), Some(Outcome::Ordered(b"1".to_vec())));
        } else {
            node.wait(60_000);
            assert!(matches!(node.outcome(), Some(Outcome::Unknown { .. })));
        }
    }
}
