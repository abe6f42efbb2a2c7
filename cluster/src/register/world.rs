//! Whole groups of nodes around one register, under faults, from one seed.
//!
//! Seven nodes, each with a voter, its file and a proposer. Messages are lost, doubled, reordered, and some copies come seconds
//! late. Nodes crash at any time, also in the middle of writing their file, and come back with what the file says. Meanwhile
//! they propose, read, and exchange voters. Then everything heals, and a proposal must succeed.
//!
//! What must hold:
//! - one value per epoch, and each value's parent is the value of the epoch before: the chain is one, without gaps;
//! - a change is in the chain once if it was said to be chosen, never if it was said to have failed, and never twice;
//! - a read, and a change, come after all that was chosen before they began;
//! - after healing every node can change the value, and all read the same.

use std::collections::{BTreeMap, BTreeSet};

use gridkv_engine::Millis;
use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::ids::Now;

const NODES: u16 = 7;
const TROUBLE_MS: Millis = 8_000;
const PATIENCE_MS: Millis = 2_500;

/// The value of these tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Value {
    pub(super) epoch: u64,
    pub(super) parent: u64,
    pub(super) tag: u64,
    pub(super) config: Config,
}

impl Value {
    pub(super) fn first(voters: &[u16]) -> Value {
        let config = Config { voters: voters.iter().copied().map(NodeNo).collect(), next: Vec::new() };
        Value { epoch: 1, parent: 0, tag: 0, config }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = [self.epoch, self.parent, self.tag].iter().flat_map(|n| n.to_le_bytes()).collect();
        bytes.push(self.config.voters.len() as u8);
        bytes.extend(self.config.voters.iter().chain(&self.config.next).map(|node| node.0 as u8));
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Value> {
        let (numbers, rest) = bytes.split_at_checked(24)?;
        let number = |at: usize| u64::from_le_bytes(numbers[at..at + 8].try_into().expect("8 bytes"));
        let (&voters, nodes) = rest.split_first()?;
        let (voters, next) = nodes.split_at_checked(usize::from(voters))?;
        let group = |bytes: &[u8]| bytes.iter().map(|&node| NodeNo(u16::from(node))).collect();
        let config = Config { voters: group(voters), next: group(next) };
        Some(Value { epoch: number(0), parent: number(8), tag: number(16), config })
    }
}

/// A wish to change it; the tag tells it from all others.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) tag: u64,
    pub(super) what: What,
}

#[derive(Clone, Debug)]
pub(super) enum What {
    Touch,
    Voters(Vec<u16>),
    VotersDone,
    VotersBack,
    /// Against the rules: other voters at once.
    Seize(u16),
}

#[derive(Debug)]
pub(super) struct Plain;

impl Rules for Plain {
    type Change = Change;
    type Refusal = ();

    fn head(&self, value: &[u8]) -> Option<Head> {
        Value::decode(value).map(|value| Head { epoch: value.epoch, config: value.config })
    }

    fn apply(&self, current: &[u8], change: &Change) -> Result<Vec<u8>, ()> {
        let mut value = Value::decode(current).ok_or(())?;
        (value.epoch, value.parent, value.tag) = (value.epoch + 1, xxh3_64(current), change.tag);
        let config = &mut value.config;
        match &change.what {
            What::Touch => {}
            What::Voters(_) if !config.next.is_empty() => return Err(()),
            What::Voters(nodes) => config.next = nodes.iter().copied().map(NodeNo).collect(),
            What::VotersDone | What::VotersBack if config.next.is_empty() => return Err(()),
            What::VotersDone => config.voters = std::mem::take(&mut config.next),
            What::VotersBack => config.next.clear(),
            What::Seize(node) => config.voters = vec![NodeNo(*node)],
        }
        Ok(value.encode())
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn permille(&mut self, chance: u64) -> bool {
        self.below(1000) < chance
    }
}

/// An operation under way, to judge its outcome.
enum Op {
    Create,
    Read { floor: u64 },
    Change { tag: u64, floor: u64 },
}

struct Node {
    up: bool,
    boot: u64,
    acceptor: Acceptor,
    proposer: Proposer<Plain>,
    generation: u64,
    /// Slots A and B of its file.
    file: [Vec<u8>; 2],
    op: Option<Op>,
}

enum Event {
    Deliver { from: usize, to: usize, message: RegisterMessage },
    Tell { to: usize, value: Vec<u8> },
    Start { node: usize },
    Crash { node: usize },
    Restart { node: usize },
}

/// What a run has seen, to know that the seeds do reach what they are for.
#[derive(Debug, Default)]
struct Seen {
    epochs: u64,
    voters_changed: u64,
    torn: u64,
    unknown: u64,
    voters_at_end: BTreeMap<usize, u64>,
}

struct World {
    now: Millis,
    sequence: u64,
    random: Random,
    plant: Option<Plant>,
    loss: u64,
    doubled: u64,
    late: u64,
    crash_on_write: u64,
    healed: bool,
    events: BTreeMap<(Millis, u64), Event>,
    nodes: Vec<Node>,
    chain: BTreeMap<u64, Vec<u8>>,
    next_tag: u64,
    /// Changes that were said to be chosen, and those said to have failed.
    chosen: BTreeSet<u64>,
    failed: BTreeSet<u64>,
    last: Option<Outcome<()>>,
    seen: Seen,
}

type Checked = Result<(), String>;

impl World {
    fn new(seed: u64, plant: Option<Plant>) -> World {
        let mut random = Random(seed.wrapping_mul(0x1234_5678_9ABC_DEF1) ^ 0xC0FFEE);
        let (loss, doubled) = (random.below(4) * 60, random.below(3) * 100);
        let (late, crash_on_write) = (random.below(3) * 40, random.below(3) * 8);
        let nodes = (0..NODES)
            .map(|_| Node {
                up: false,
                boot: 0,
                acceptor: Acceptor::default(),
                proposer: Proposer::new(Plain, NodeNo(0), 0, 0, None),
                generation: 0,
                file: Default::default(),
                op: None,
            })
            .collect();
        World {
            now: 0,
            sequence: 0,
            random,
            plant,
            loss,
            doubled,
            late,
            crash_on_write,
            healed: false,
            events: BTreeMap::new(),
            nodes,
            chain: BTreeMap::new(),
            next_tag: 1,
            chosen: BTreeSet::new(),
            failed: BTreeSet::new(),
            last: None,
            seen: Seen::default(),
        }
    }

    fn after(&mut self, delay: Millis, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + delay, self.sequence), event);
    }

    fn time(&self) -> Now {
        Now { mono: self.now, wall: 0 }
    }

    fn send(&mut self, from: usize, to: usize, message: RegisterMessage) {
        if to >= self.nodes.len() {
            return;
        }
        if from != to && self.random.permille(self.loss) {
            return;
        }
        if from != to && self.random.permille(self.doubled) {
            let delay = if self.random.permille(300) { self.random.below(4_000) } else { self.random.below(60) };
            self.after(delay, Event::Deliver { from, to, message: message.clone() });
        }
        let delay = match from == to {
            true => 0,
            false if self.random.permille(self.late) => self.random.below(2_000),
            false => 1 + self.random.below(20),
        };
        self.after(delay, Event::Deliver { from, to, message });
    }

    fn start_node(&mut self, at: usize) -> Checked {
        let node = &mut self.nodes[at];
        if node.up {
            return Ok(());
        }
        let found = slots::recover(&node.file[0], &node.file[1]).map_err(|error| error.to_string())?;
        let (generation, mut state) = found.map_or_else(Default::default, |found| (found.generation, found.state));
        if self.plant == Some(Plant::ForgetsPromise) {
            state.promised = state.accepted.as_ref().map_or(Ballot::default(), |(ballot, _)| *ballot);
        }
        node.boot += 1;
        let hint = state.accepted.as_ref().map(|(_, value)| value.clone());
        node.proposer = Proposer::new(Plain, NodeNo(at as u16), node.boot, self.random.next(), hint.as_deref());
        node.proposer.plant = self.plant;
        node.acceptor = Acceptor::new(state);
        node.acceptor.plant = self.plant;
        (node.generation, node.up) = (generation, true);
        Ok(())
    }

    fn crash(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        if node.up {
            (node.up, node.op) = (false, None);
            let delay = 10 + self.random.below(1_500);
            self.after(delay, Event::Restart { node: at });
        }
    }

    /// Writes the voter's file, or crashes on the way; false if the answer must not leave.
    fn persist(&mut self, at: usize) -> bool {
        let crash = !self.healed && self.random.permille(self.crash_on_write);
        let node = &mut self.nodes[at];
        let new = slots::encode_slot(node.generation + 1, node.acceptor.state());
        let slot = &mut node.file[usize::from(slots::Slot::of(node.generation + 1) == slots::Slot::B)];
        let cut = if crash { self.random.below(new.len() as u64 + 1) as usize } else { new.len() };
        if slot.len() < cut {
            slot.resize(cut, 0);
        }
        slot[..cut].copy_from_slice(&new[..cut]);
        node.generation += 1;
        if crash {
            self.seen.torn += 1;
            self.crash(at);
        }
        !crash
    }

    fn handle(&mut self, event: Event) -> Checked {
        match event {
            Event::Deliver { from, to, message } if self.nodes[to].up => {
                let from_no = NodeNo(from as u16);
                if let RegisterMessage::Prepare { .. } | RegisterMessage::Accept { .. } = message {
                    let answer = self.nodes[to].acceptor.on_message(message);
                    if let Some(answer) = answer {
                        let hasty = self.plant == Some(Plant::AnswersBeforeDisk);
                        if !answer.persist || self.persist(to) || hasty {
                            self.send(to, from, answer.reply);
                        }
                    }
                } else {
                    let (now, mut out) = (self.time(), Vec::new());
                    self.nodes[to].proposer.on_message(now, from_no, message, &mut out);
                    self.drain(to, out)?;
                }
            }
            Event::Deliver { .. } => {}
            Event::Tell { to, value } => {
                if self.nodes[to].up {
                    self.nodes[to].proposer.learn(&value);
                }
            }
            Event::Start { node } => self.start_op(node)?,
            Event::Crash { node } => self.crash(node),
            Event::Restart { node } => {
                self.start_node(node)?;
                if self.random.permille(500) {
                    self.tell(node);
                }
            }
        }
        Ok(())
    }

    /// Somebody tells a node what it knows to be chosen, perhaps late.
    fn tell(&mut self, to: usize) {
        let from = self.random.below(u64::from(NODES)) as usize;
        if let Some(value) = self.nodes[from].proposer.chosen().filter(|_| self.nodes[from].up) {
            let value = value.to_vec();
            let delay = if self.random.permille(300) { self.random.below(2_000) } else { 5 };
            self.after(delay, Event::Tell { to, value });
        }
    }

    fn newest(&self) -> u64 {
        self.chain.keys().next_back().copied().unwrap_or(0)
    }

    fn start_op(&mut self, at: usize) -> Checked {
        if !self.nodes[at].up || self.nodes[at].proposer.is_busy() {
            return Ok(());
        }
        let (now, mut out, floor) = (self.time(), Vec::new(), self.newest());
        let known = self.nodes[at].proposer.chosen().and_then(Value::decode);
        if self.chain.is_empty() && at == 0 {
            self.nodes[at].op = Some(Op::Create);
            let first = Value::first(&[0]).encode();
            self.nodes[at].proposer.create(now, first, PATIENCE_MS, &mut out).expect("not busy");
        } else if self.random.permille(250) && !self.healed {
            self.nodes[at].op = Some(Op::Read { floor });
            self.nodes[at].proposer.read(now, PATIENCE_MS, &mut out).expect("not busy");
        } else {
            let what = match self.random.below(10) {
                0..4 => What::Touch,
                _ if self.healed => What::Touch,
                4 => What::VotersBack,
                _ if known.is_some_and(|value| !value.config.next.is_empty()) => What::VotersDone,
                _ => {
                    let size = [1, 3, 3, 5][self.random.below(4) as usize];
                    let mut nodes: Vec<u16> = (0..NODES).collect();
                    for at in 0..size {
                        let left = (nodes.len() - at) as u64;
                        nodes.swap(at, at + self.random.below(left) as usize);
                    }
                    nodes.truncate(size);
                    What::Voters(nodes)
                }
            };
            let tag = self.next_tag;
            self.next_tag += 1;
            self.nodes[at].op = Some(Op::Change { tag, floor });
            let change = Change { tag, what };
            self.nodes[at].proposer.propose(now, change, PATIENCE_MS, &mut out).expect("not busy");
        }
        self.drain(at, out)
    }

    fn drain(&mut self, at: usize, out: Vec<Output<()>>) -> Checked {
        for output in out {
            match output {
                Output::Send { to, message } => self.send(at, usize::from(to.0), message),
                Output::Learned(value) => self.record(value)?,
                Output::Done(outcome) => self.judge(at, outcome)?,
            }
        }
        Ok(())
    }

    /// A value is said to be chosen.
    fn record(&mut self, bytes: Vec<u8>) -> Checked {
        let value = Value::decode(&bytes).ok_or("no value")?;
        if let Some(known) = self.chain.get(&value.epoch) {
            return match *known == bytes {
                true => Ok(()),
                false => Err(format!("two values of epoch {}", value.epoch)),
            };
        }
        let before = self.chain.get(&(value.epoch - 1));
        let after = self.chain.get(&(value.epoch + 1)).and_then(|bytes| Value::decode(bytes));
        if before.is_some_and(|before| xxh3_64(before) != value.parent)
            || after.is_some_and(|after| after.parent != xxh3_64(&bytes))
        {
            return Err(format!("epoch {} does not follow from the one before", value.epoch));
        }
        self.seen.voters_changed +=
            u64::from(before.and_then(|b| Value::decode(b)).is_some_and(|b| b.config.voters != value.config.voters));
        self.chain.insert(value.epoch, bytes);
        Ok(())
    }

    fn judge(&mut self, at: usize, outcome: Outcome<()>) -> Checked {
        self.last = Some(outcome.clone());
        let op = self.nodes[at].op.take().ok_or("an outcome of nothing")?;
        if let Outcome::Chosen(bytes) = &outcome {
            self.record(bytes.clone())?;
            let value = Value::decode(bytes).ok_or("no value")?;
            let floor = match op {
                Op::Create => 0,
                Op::Read { floor } => floor,
                Op::Change { tag, .. } if value.tag != tag => return Err("another change was chosen".into()),
                Op::Change { floor, .. } => floor + 1,
            };
            if value.epoch < floor {
                return Err(format!("epoch {} after {floor} was chosen", value.epoch));
            }
        }
        match (&op, outcome) {
            (Op::Change { tag, .. }, Outcome::Chosen(_)) => drop(self.chosen.insert(*tag)),
            (_, Outcome::Unknown) => self.seen.unknown += 1,
            (Op::Change { .. }, Outcome::Illegal | Outcome::Exists(_)) => return Err("not a possible outcome".into()),
            (Op::Change { tag, .. }, _) => drop(self.failed.insert(*tag)),
            _ => {}
        }
        Ok(())
    }

    /// Lets time pass until `until` or until `done`.
    fn run(&mut self, until: Millis, done: impl Fn(&World) -> bool) -> Checked {
        while !done(self) {
            let timers = self.nodes.iter().enumerate().filter(|(_, node)| node.up);
            let timer = timers.filter_map(|(at, node)| Some((node.proposer.next_deadline()?, at))).min();
            let event = self.events.keys().next().copied();
            match (timer, event) {
                (Some((time, at)), event) if time <= until && event.is_none_or(|(first, _)| time < first) => {
                    self.now = self.now.max(time);
                    let (now, mut out) = (self.time(), Vec::new());
                    self.nodes[at].proposer.on_deadline(now, &mut out);
                    self.drain(at, out)?;
                }
                (_, Some((time, sequence))) if time <= until => {
                    self.now = time;
                    let event = self.events.remove(&(time, sequence)).expect("it is the first");
                    self.handle(event)?;
                }
                _ => {
                    self.now = until;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Trouble, then healing.
    fn story(mut self) -> Result<Seen, String> {
        for at in 0..self.nodes.len() {
            self.start_node(at)?;
        }
        let mut at = 0;
        while at < TROUBLE_MS {
            let gap = if self.random.permille(500) { 20 } else { 300 };
            at += 1 + self.random.below(gap);
            let node = self.random.below(u64::from(NODES)) as usize;
            let event = match self.random.below(12) {
                0 => Event::Crash { node },
                _ => Event::Start { node: if at < 300 { 0 } else { node } },
            };
            self.after(at, event);
        }
        for step in 1..TROUBLE_MS / 150 {
            self.run(step * 150, |_| false)?;
            let to = self.random.below(u64::from(NODES)) as usize;
            self.tell(to);
        }
        self.run(TROUBLE_MS, |_| false)?;

        (self.healed, self.loss, self.doubled, self.late) = (true, 0, 0, 0);
        for at in 0..self.nodes.len() {
            self.start_node(at)?;
        }
        self.run(self.now + 2 * PATIENCE_MS, |_| false)?;
        for at in 0..self.nodes.len() {
            if self.nodes[at].proposer.chosen().is_none()
                && let Some(value) = self.chain.values().next_back()
            {
                self.nodes[at].proposer.learn(&value.clone());
            }
            let mut tries = 0;
            while !matches!(self.last.take(), Some(Outcome::Chosen(_))) {
                tries += 1;
                if tries > 3 {
                    return Err(format!("node {at} has no success after healing"));
                }
                self.start_op(at)?;
                self.run(self.now + 2 * PATIENCE_MS, |world| world.last.is_some())?;
            }
        }
        self.finish()
    }

    fn finish(mut self) -> Result<Seen, String> {
        if self.chain.keys().copied().ne(1..=self.newest()) {
            return Err("the chain has gaps".into());
        }
        let values: Vec<Value> = self.chain.values().filter_map(|bytes| Value::decode(bytes)).collect();
        let tags: BTreeSet<u64> = values.iter().map(|value| value.tag).collect();
        if tags.len() != values.len() {
            return Err("a change was applied twice".into());
        }
        if !self.chosen.is_subset(&tags) {
            return Err("a change that was chosen is not there".into());
        }
        if !self.failed.is_disjoint(&tags) {
            return Err("a change that failed is there".into());
        }
        self.seen.epochs = self.newest();
        let voters = values.last().map_or(0, |value| value.config.voters.len());
        self.seen.voters_at_end.insert(voters, 1);
        Ok(self.seen)
    }
}

#[test]
fn any_seed_gives_one_chain_and_heals() {
    let mut sum = Seen::default();
    for seed in 0..2_000 {
        let seen = World::new(seed, None).story().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        sum.epochs += seen.epochs;
        sum.voters_changed += seen.voters_changed;
        sum.torn += seen.torn;
        sum.unknown += seen.unknown;
        seen.voters_at_end.into_iter().for_each(|(n, count)| *sum.voters_at_end.entry(n).or_default() += count);
    }
    assert!(sum.epochs > 40_000 && sum.voters_changed > 4_000, "the seeds reach too little: {sum:?}");
    assert!(sum.torn > 2_000 && sum.unknown > 500, "the seeds reach too little: {sum:?}");
    assert!([1, 3, 5].iter().all(|n| sum.voters_at_end.contains_key(n)), "the seeds reach too little: {sum:?}");
}

#[test]
fn planted_bugs_are_found() {
    let plants = [
        Plant::ForgetsPromise,
        Plant::AcceptsBelowPromise,
        Plant::MajorityOfUnion,
        Plant::AcceptsByNextOnly,
        Plant::BuildsOnUnchosen,
        Plant::StaysWithOldVoters,
        Plant::TakesAnyValue,
        Plant::ReadsUnchosen,
        Plant::AppliesAgain,
        Plant::AnswersBeforeDisk,
    ];
    let mut missed = Vec::new();
    for plant in plants {
        let found = (0..6_000).find_map(|seed| World::new(seed, Some(plant)).story().err().map(|error| (seed, error)));
        if found.is_none() {
            missed.push(plant);
        }
    }
    assert_eq!(missed, [], "these bugs are not seen by any seed");
}
