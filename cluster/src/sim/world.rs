//! A whole cluster under one virtual clock.
//!
//! ```text
//!   queue, by (time, number) ──▶ one event ──▶ machines of one core ──▶ outbox ──▶ more events
//! ```
//!
//! One thread, no real clock, no real randomness: the same options give the same run, event for event. The nodes are made
//! of the real machines over the real store; simulated are the network, the clocks, who is said to be alive, the clients, and the
//! part of a driver that carries things between them.
//!
//! A run has two phases. First faults, while only safety is asked for. Then everything is healed, and the cluster must become
//! whole, agree, and answer everything, in a simulated minute.

mod planes;
#[cfg(test)]
mod promises;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::rc::Rc;
use std::sync::Arc;

use gridkv_engine::hash::ShardId;
use rkyv::util::AlignedVec;
use xxhash_rust::xxh3::xxh3_64;

use super::authority::{Authority, MapSource, first_map, is_whole};
use super::history::{Asked, Came, EPOCH_MS, History, Op, Rule, Seen, Violation};
use super::network::Network;
use super::node::{Asker, Core, Node, Pending, bytes_of, key_of, value_of};
use super::options::{Control, Kind, Options};
use super::plane;
use super::random::Random;
use super::trace::Trace;
use crate::ids::NodeNo;
use crate::map::{Change, Map, Stage, Standing};
use crate::outbox::{Changed, Failure, Found, Outcome};
use crate::planner::Settings;
use crate::planted::{Bug, Planted};
use crate::quorum::Level;
use crate::shards::Operation;
use crate::wire::{Message, Why};

/// The observer that is no node: who decides on the map.
const AUTHORITY: usize = usize::MAX;
/// The client of the last look at everything.
const LAST: usize = usize::MAX;
/// How long after healing everything must work, in microseconds; twice that where one shard moves at a time.
const PATIENCE: u64 = 60_000_000;
/// How long after that every operation must succeed and replicas must be equal: two rounds of repair, the first of which may meet the end of a fault.
const REPAIRED: u64 = 130_000_000;
/// What expires within this may be a tombstone at one replica, and not yet at another.
const EXPIRY_SLACK_MS: u64 = 1000;
const MS: u64 = 1000;

#[derive(Debug)]
enum What {
    Deliver {
        to: usize,
        boot: u64,
        life: NodeNo,
        from: NodeNo,
        shard: ShardId,
        bytes: Rc<AlignedVec<16>>,
    },
    Wake {
        node: usize,
        boot: u64,
        core: usize,
    },
    Sweep {
        node: usize,
        boot: u64,
    },
    Map {
        node: usize,
        boot: u64,
        core: usize,
        map: Arc<Map>,
    },
    Admit {
        node: usize,
        boot: u64,
    },
    Start {
        node: usize,
    },
    Detect {
        observer: usize,
        subject: usize,
    },
    Adopted {
        node: usize,
        no: NodeNo,
        epoch: u64,
    },
    Filled {
        node: usize,
        no: NodeNo,
        shard: u16,
        epoch: u64,
    },
    Think,
    /// Something for or of a control plane.
    Plane {
        node: usize,
        boot: u64,
        note: planes::Note,
    },
    /// The operator looks whether a drained node may go.
    Operator,
    Client {
        client: usize,
    },
    Begin {
        op: usize,
    },
    Fault {
        at: usize,
        tries: u32,
    },
    FaultEnd {
        at: usize,
    },
    Heal,
    Settled,
}

#[derive(Debug)]
struct Event {
    at: u64,
    number: u64,
    what: What,
}

impl PartialEq for Event {
    fn eq(&self, other: &Event) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl Eq for Event {}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Event) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Event {
    fn cmp(&self, other: &Event) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// What a run did.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Faults that took place, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Faults that did not fit the state they met; another one took the place of each.
    pub skipped: u64,
    /// Messages lost and delivered twice; these are not among the faults.
    pub lost: u64,
    /// See there.
    pub duplicated: u64,
    /// Operations by how they ended: done, failed, unknown.
    pub ended: [u64; 3],
    /// Operations about which something was promised.
    pub checked: u64,
    /// Why operations failed.
    pub failures: BTreeMap<&'static str, u64>,
    /// Changes of the map.
    pub changes: u64,
    /// Messages sent.
    pub messages: u64,
    /// Events handled.
    pub events: u64,
    /// Simulated microseconds.
    pub time: u64,
    /// Microseconds from healing to rest.
    pub settled: u64,
}

/// See the head of the file.
#[derive(Debug)]
pub struct World {
    options: Options,
    planted: Planted,
    time: u64,
    number: u64,
    queue: BinaryHeap<Reverse<Event>>,
    nodes: Vec<Node>,
    /// Each life's node and boot.
    lives: BTreeMap<NodeNo, (usize, u64)>,
    network: Network,
    authority: Authority,
    /// How many faults keep a node from the authority.
    far: BTreeMap<usize, u32>,
    /// Whom a fault keeps from it.
    made_far: BTreeMap<usize, Vec<usize>>,
    /// Whom a fault has paused.
    paused: BTreeMap<usize, usize>,
    /// When the map changed last.
    changed_at: u64,
    maps: BTreeMap<u64, Arc<Map>>,
    /// With control planes: what the voters have on their disks, and the newest map that any node knows.
    votes: planes::Votes,
    /// When a leader last missed a member.
    missed: BTreeMap<NodeNo, u64>,
    newest: Arc<Map>,
    /// Whom the operator has told to empty itself.
    draining: Vec<usize>,
    history: History,
    /// Random numbers of the world and of the clients.
    random: Random,
    chooser: Random,
    next_value: u64,
    healed: bool,
    /// Operations of the last look, in reverse.
    last: Vec<(usize, u64, bool, Asked)>,
    looking: bool,
    /// Whether this is the last look of all, and since when the replicas must become equal.
    is_again: bool,
    looked_at: u64,
    over: bool,
    violation: Option<Violation>,
    /// What happened.
    pub trace: Trace,
    /// What the run did.
    pub stats: Stats,
}

impl World {
    /// A world at its beginning.
    pub fn new(options: &Options, planted: Planted, trace: Trace) -> World {
        let mut random = Random::new(options.seed, 3);
        let nodes: Vec<Node> = (0..options.nodes)
            .map(|index| Node { boot: 1, ..Node::new(index, random.signed(-options.skew_ms, options.skew_ms)) })
            .collect();
        let candidates: Vec<_> = nodes.iter().map(|node| node.candidate(options.cores)).collect();
        let map = first_map(&candidates, options.shards, options.seed, options.quorums);
        let settings = Settings { replace_after_ms: options.replace_after_ms, moves_at_once: options.moves_at_once };
        let mut world = World {
            options: options.clone(),
            planted,
            time: 0,
            number: 0,
            queue: BinaryHeap::new(),
            nodes,
            lives: BTreeMap::new(),
            network: Network::new(options),
            authority: Authority::new(map, settings, planted),
            far: BTreeMap::new(),
            made_far: BTreeMap::new(),
            paused: BTreeMap::new(),
            changed_at: 0,
            maps: BTreeMap::new(),
            votes: planes::Votes::default(),
            missed: BTreeMap::new(),
            newest: plane::no_map(options),
            draining: Vec::new(),
            history: History {
                ops: Vec::new(),
                ahead_ms: options.ahead_ms(),
                reads_are_monotonic: 2 * options.quorums.r > options.quorums.n,
                sane_ahead_ms: (options.quorums.w >= 2 && options.nodes >= 2).then_some(options.skew_ms as u64),
            },
            random,
            chooser: Random::new(options.seed, 4),
            next_value: 1,
            healed: false,
            last: Vec::new(),
            looking: false,
            is_again: false,
            looked_at: 0,
            over: false,
            violation: None,
            trace,
            stats: Stats::default(),
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        match self.options.control {
            Control::Authority => self.begin_with_authority(),
            Control::Planes => self.begin_with_planes(),
        }
        for client in 0..self.options.clients {
            self.push(client as u64 * MS, What::Client { client });
        }
        for at in 0..self.options.faults.len() {
            self.push(self.options.faults[at].at * MS, What::Fault { at, tries: 0 });
        }
        self.push(self.options.seconds * 1000 * MS, What::Heal);
    }

    fn begin_with_authority(&mut self) {
        let map = self.authority.map().clone();
        for index in 0..self.nodes.len() {
            let node = &mut self.nodes[index];
            node.boot = 0;
            node.start(&self.options, &map, self.planted);
            node.no = NodeNo(index as u16 + 1);
            self.lives.insert(node.no, (index, 1));
        }
        for observer in 0..self.nodes.len() {
            let sees =
                (0..self.nodes.len()).filter(|&other| other != observer).map(|other| (other, self.nodes[other].no));
            self.nodes[observer].sees = sees.collect();
            let (id, no) = (self.nodes[observer].id, self.nodes[observer].no);
            self.authority.on_seen(0, id, Some(no));
            for core in 0..self.options.cores {
                self.adopt(observer, core, &map, no);
            }
            self.tell_alive(observer);
            self.push(500 * MS, What::Sweep { node: observer, boot: 1 });
        }
        self.push(100 * MS, What::Think);
    }

    fn has_planes(&self) -> bool {
        self.options.control == Control::Planes
    }

    /// The newest map that anybody knows.
    fn map(&self) -> &Arc<Map> {
        match self.options.control {
            Control::Authority => self.authority.map(),
            Control::Planes => &self.newest,
        }
    }

    /// The number that a core of a node goes by.
    fn number(&self, node: usize, core: usize) -> NodeNo {
        match self.options.control {
            Control::Authority => self.nodes[node].no,
            Control::Planes => self.nodes[node].cores[core].shards.view().me,
        }
    }

    /// Runs it to its end.
    pub fn run(&mut self) -> Option<Violation> {
        while let Some(Reverse(event)) = self.queue.pop() {
            self.time = event.at;
            self.handle(event.what);
            if self.number > 2_000_000 {
                self.violate(Rule::Liveness, "the events do not come to an end".into());
            }
            if self.over {
                break;
            }
        }
        self.stats.time = self.time;
        self.stats.messages = self.network.stats.sent;
        self.stats.events = self.trace.events;
        self.stats.changes = match self.options.control {
            Control::Authority => self.authority.changes,
            Control::Planes => self.newest.epoch,
        };
        (self.stats.lost, self.stats.duplicated) = (self.network.stats.lost, self.network.stats.duplicated);
        for op in &mut self.history.ops {
            op.end = op.end.min(self.time + 1);
        }
        self.stats.checked = self.history.checked() as u64;
        let broken = self.history.check().err();
        // A count that a clock from the future has made stays above all others until its time comes.
        let poisoned = |violation: &Violation| violation.rule == Rule::Counters && self.options.clocks_are_apart();
        broken.filter(|violation| !poisoned(violation)).or(self.violation.take())
    }

    fn push(&mut self, after: u64, what: What) {
        self.number += 1;
        self.queue.push(Reverse(Event { at: self.time + after, number: self.number, what }));
    }

    fn violate(&mut self, rule: Rule, what: String) {
        self.over = true;
        self.violation.get_or_insert(Violation { rule, what, at: self.time, key: None });
    }

    fn handle(&mut self, what: What) {
        match what {
            What::Deliver { to, boot, life, from, shard, bytes } => self.deliver(to, boot, life, from, shard, bytes),
            What::Plane { node, boot, note } => self.on_note(node, boot, note),
            What::Operator => self.operate(),
            What::Wake { node, boot, core } => {
                if self.is_life(node, boot) && self.awake(node, || What::Wake { node, boot, core }) {
                    let time = self.time;
                    let state = &mut self.nodes[node];
                    if state.cores[core].armed <= time {
                        state.cores[core].armed = u64::MAX;
                    }
                    let now = state.now(time);
                    let Core { shards, store, out, .. } = &mut state.cores[core];
                    if shards.next_deadline(now).is_some_and(|at| at <= now.mono) {
                        self.trace.hash(&[1, time, node as u64]);
                        shards.on_deadline(now, store, out);
                    }
                    self.drain(node, core);
                }
            }
            What::Sweep { node, boot } => {
                if self.is_life(node, boot) && self.awake(node, || What::Sweep { node, boot }) {
                    let wall = self.nodes[node].wall(self.time);
                    for core in &mut self.nodes[node].cores {
                        core.store.sweep(wall, 64);
                    }
                    self.push(500 * MS, What::Sweep { node, boot });
                }
            }
            What::Map { node, boot, core, map } => {
                if self.is_life(node, boot) && self.awake(node, || What::Map { node, boot, core, map: map.clone() }) {
                    self.on_map(node, core, map);
                }
            }
            What::Admit { node, boot } => self.admit(node, boot),
            What::Start { node } => {
                if !self.nodes[node].up && !self.nodes[node].gone {
                    self.start(node);
                }
            }
            What::Detect { observer, subject } => self.detect(observer, subject),
            What::Adopted { node, no, epoch } => {
                if self.is_far(node) {
                    self.push(300 * MS, What::Adopted { node, no, epoch });
                } else {
                    self.authority.on_adopted(no, epoch);
                }
            }
            What::Filled { node, no, shard, epoch } => {
                if self.is_far(node) {
                    self.push(300 * MS, What::Filled { node, no, shard, epoch });
                } else {
                    self.authority.on_filled(shard, epoch, no);
                }
            }
            What::Think => self.think(),
            What::Client { client } => self.next_op(client),
            What::Begin { op } => {
                let (node, boot) = (self.history.ops[op].node, self.nodes[self.history.ops[op].node].boot);
                if !self.is_life(node, boot) {
                    self.end(op, Came::Failed);
                } else if self.awake(node, || What::Begin { op }) {
                    self.begin_op(op);
                }
            }
            What::Fault { at, tries } => self.fault(at, tries),
            What::FaultEnd { at } => self.fault_end(at),
            What::Heal => self.heal(),
            What::Settled => self.look(),
        }
    }

    fn is_life(&self, node: usize, boot: u64) -> bool {
        self.nodes[node].up && self.nodes[node].boot == boot
    }

    /// Whether a node runs now; if it is paused, the event comes again when it goes on.
    fn awake(&mut self, node: usize, again: impl FnOnce() -> What) -> bool {
        let until = self.nodes[node].paused_until;
        if until > self.time {
            self.push(until - self.time, again());
            return false;
        }
        true
    }

    fn is_far(&self, node: usize) -> bool {
        self.far.get(&node).is_some_and(|&faults| faults > 0)
    }

    // --- messages ---------------------------------------------------------------------------------------------------

    fn deliver(&mut self, to: usize, boot: u64, life: NodeNo, from: NodeNo, shard: ShardId, bytes: Rc<AlignedVec<16>>) {
        if !self.is_life(to, boot) {
            return;
        }
        let again = bytes.clone();
        if !self.awake(to, || What::Deliver { to, boot, life, from, shard, bytes: again }) {
            return;
        }
        let Some(core) = self.nodes[to].core_of(shard.0) else { return };
        if self.has_planes() && self.number(to, core) != life {
            return;
        }
        let message = match Message::read(&bytes) {
            Ok(message) => message,
            Err(error) => return self.violate(Rule::Invariants, format!("a message that cannot be read: {error}")),
        };
        self.trace.hash(&[2, self.time, to as u64, xxh3_64(&bytes)]);
        let sender = self.lives.get(&from).map_or(0, |life| life.0);
        self.trace.note(self.time, to, Some(shard.0), || format!("<- n{sender} {}", short(&message)));
        let now = self.nodes[to].now(self.time);
        let Core { shards, store, out, .. } = &mut self.nodes[to].cores[core];
        shards.on_message(now, store, from, &message, out);
        self.drain(to, core);
    }

    fn transmit(&mut self, (from, no): (usize, NodeNo), to: NodeNo, shard: ShardId, bytes: &Rc<AlignedVec<16>>) {
        let Some(&(index, boot)) = self.lives.get(&to) else { return };
        if index == from || !self.is_life(index, boot) {
            return;
        }
        let is_order = matches!(Message::read(bytes), Ok(Message::Order(..)));
        for at in self.network.arrivals(self.time, from, index, is_order).into_iter().flatten() {
            let what = What::Deliver { to: index, boot, life: to, from: no, shard, bytes: bytes.clone() };
            self.push(at - self.time, what);
        }
    }

    /// Takes all that a core wants done, and does it.
    fn drain(&mut self, node: usize, core: usize) {
        loop {
            let Some(state) = self.nodes[node].cores.get_mut(core) else { return };
            let orders = state.shards.take_orders();
            if state.out.is_empty() && orders.is_empty() {
                break;
            }
            let mut sends: Vec<(NodeNo, ShardId, Rc<AlignedVec<16>>)> = Vec::new();
            let mut last: Option<(*const u8, Rc<AlignedVec<16>>)> = None;
            for (send, bytes) in state.out.sends() {
                let same = last.take().filter(|(at, _)| *at == bytes.as_ptr());
                let (at, shared) = same.unwrap_or_else(|| {
                    let mut copy = AlignedVec::with_capacity(bytes.len());
                    copy.extend_from_slice(bytes);
                    (bytes.as_ptr(), Rc::new(copy))
                });
                sends.push((send.to, send.shard, shared.clone()));
                last = Some((at, shared));
            }
            state.out.clear_sends();
            let (done, filled, wanted) = (state.out.take_done(), state.out.take_filled(), state.out.take_wanted());
            let (no, boot) = (self.number(node, core), self.nodes[node].boot);
            for (to, shard, bytes) in sends {
                self.transmit((node, no), to, shard, &bytes);
            }
            let filled = match self.has_planes() {
                true => self.tell_plane(node, filled, wanted),
                false => filled,
            };
            for (shard, epoch) in filled {
                let after = self.random.within(0, self.options.map_ms) * MS;
                self.trace.note(self.time, node, Some(shard.0), || format!("filled s{} e{epoch}", shard.0));
                self.push(after, What::Filled { node, no, shard: shard.0, epoch });
            }
            if wanted > 0 && !self.has_planes() && !self.is_far(node) {
                let map = self.authority.map().clone();
                let after = self.random.within(1, 40) * MS;
                self.push(after, What::Map { node, boot, core, map });
            }
            for order in orders {
                let key = u64::from_le_bytes(order.request[..].try_into().expect("a request is a key's number"));
                self.prepare(node, core, Asker::There(order.from, order.ask), key);
            }
            for (token, outcome) in done {
                self.on_done(node, core, token, outcome);
            }
        }
        let time = self.time;
        let state = &mut self.nodes[node];
        let (now, boot) = (state.now(time), state.boot);
        let Core { shards, armed, .. } = &mut state.cores[core];
        shards.invariants();
        if let Some(deadline) = shards.next_deadline(now) {
            // The machines count whole milliseconds from the start, which is their first.
            let at = ((deadline.max(1) - 1) * MS).max(time + MS);
            if at < *armed {
                *armed = at;
                self.push(at - time, What::Wake { node, boot, core });
            }
        }
    }

    // --- operations -------------------------------------------------------------------------------------------------

    fn next_op(&mut self, client: usize) {
        if self.healed {
            return;
        }
        let (options, r) = (&self.options, &mut self.chooser);
        let up: Vec<usize> = (0..self.nodes.len()).filter(|&node| self.nodes[node].up).collect();
        if up.is_empty() {
            return self.push(100 * MS, What::Client { client });
        }
        let node = *r.pick(&up);
        let is_counter = r.chance(150);
        let key = match () {
            () if is_counter => r.below(options.counters),
            () if r.chance(400) => r.below(options.keys.min(2)),
            () => r.below(options.keys),
        };
        let value = self.next_value;
        self.next_value += 1;
        let asked = match r.below(100) {
            0..60 if is_counter => Asked::Count,
            _ if is_counter => Asked::Get,
            0..45 => Asked::Get,
            45..78 => Asked::Set { value, expires_at: 0 },
            78..86 => Asked::Set { value, expires_at: self.nodes[node].wall(self.time) + r.within(20, 8_000) },
            86..96 => Asked::Delete,
            _ => Asked::Erase,
        };
        let level = if is_counter && asked == Asked::Count { 0 } else { r.below(10) };
        let quorum = level < 8;
        self.start_op(client, node, (key, is_counter), asked, quorum);
    }

    fn start_op(&mut self, client: usize, node: usize, (key, is_counter): (u64, bool), asked: Asked, quorum: bool) {
        let op = self.history.ops.len();
        let (call, end, came) = (self.time, u64::MAX, Came::Unknown);
        self.history.ops.push(Op { client, node, key, is_counter, asked, quorum, call, end, wall: 0, came });
        if self.awake(node, || What::Begin { op }) {
            self.begin_op(op);
        }
    }

    fn begin_op(&mut self, op: usize) {
        let Op { node, key, is_counter, asked, quorum, .. } = self.history.ops[op];
        let name = key_of(key, is_counter);
        let time = self.time;
        let level = match () {
            () if !quorum => Level::One,
            () if op.is_multiple_of(7) && self.last.is_empty() && !self.looking => Level::All,
            () => Level::Quorum,
        };
        self.trace.hash(&[3, time, node as u64, key]);
        let state = &mut self.nodes[node];
        let hash = state.cores[0].store.locate(&name);
        let Some(core) = state.core_of_hash(hash) else { return self.end(op, Came::Failed) };
        let now = state.now(time);
        let shard = state.cores[core].shards.view().shard(hash).0;
        self.trace.note(time, node, Some(shard), || format!("call {op}: {asked:?} {key} {level:?}"));
        if asked == Asked::Count {
            let me = self.number(node, core);
            let state = &mut self.nodes[node];
            match state.cores[core].shards.orderer(hash) {
                Ok(no) if no == me => self.prepare(node, core, Asker::Here(op), key),
                Ok(no) => {
                    let token = state.token(Pending::Forwarded(op));
                    let Core { shards, store, out, .. } = &mut state.cores[core];
                    let deadline = now.mono + 2 * self.options.timeout_ms + self.options.again_ms;
                    let forward = Operation::Forward { hash, request: &key.to_le_bytes(), to: no, deadline };
                    shards.begin(now, store, token, forward, out);
                }
                Err(_) => return self.end(op, Came::Failed),
            }
            return self.drain(node, core);
        }
        let token = state.token(Pending::Plain(op));
        let Core { shards, store, out, .. } = &mut state.cores[core];
        let bytes;
        let key = (hash, &name[..]);
        let operation = match asked {
            Asked::Set { value, expires_at } => {
                bytes = bytes_of(value, self.options.value_bytes);
                Operation::Write { key, value: Some(&bytes), expires_at, level }
            }
            Asked::Erase => Operation::Write { key, value: None, expires_at: 0, level },
            Asked::Delete => Operation::Delete { key, level },
            Asked::Get | Asked::Count => Operation::Read { key, level },
        };
        shards.begin(now, store, token, operation, out);
        self.drain(node, core);
    }

    /// Brings the key of a command up to date at its orderer.
    fn prepare(&mut self, node: usize, core: usize, asker: Asker, key: u64) {
        let time = self.time;
        let state = &mut self.nodes[node];
        let (now, name) = (state.now(time), key_of(key, true));
        let token = state.token(Pending::Prepare(asker));
        let Core { shards, store, out, .. } = &mut state.cores[core];
        let hash = store.locate(&name);
        let deadline = now.mono + self.options.timeout_ms;
        let level = Level::Quorum.ordered(shards.view().placement_of(hash), self.options.quorums);
        let prepare = Operation::Prepare { keys: &[(hash, &name)], payload: 0, level, deadline };
        shards.begin(now, store, token, prepare, out);
    }

    /// Runs a command on what was found for it, and has its change stored.
    fn run_count(&mut self, node: usize, core: usize, asker: Asker, mut found: Vec<Found>) -> bool {
        let time = self.time;
        let me = self.number(node, core);
        let state = &mut self.nodes[node];
        let now = state.now(time);
        let Core { shards, store, .. } = &mut state.cores[core];
        shards.freshest(now, store, &mut found);
        let Some(found) = found.pop() else { return false };
        let version = found.version();
        let Found { hash, key, value, .. } = found;
        if shards.orderer(hash) != Ok(me) {
            return false;
        }
        let count = value.map_or(0, |value| value_of(&value.bytes)) + 1;
        let shard = shards.view().shard(hash).0;
        let token = state.token(Pending::Commit(asker, count));
        let changed = Changed { hash, key, value: Some(count.to_le_bytes().to_vec()), expires_at: 0, version };
        let Core { shards, store, out, .. } = &mut state.cores[core];
        let deadline = now.mono + self.options.timeout_ms;
        let commit = Operation::Commit { changes: vec![changed], level: Level::Quorum, ordered: true, deadline };
        shards.begin(now, store, token, commit, out);
        self.trace.note(time, node, Some(shard), || format!("run count -> {count}"));
        true
    }

    fn on_done(&mut self, node: usize, core: usize, token: u64, outcome: Outcome) {
        let Some(pending) = self.nodes[node].pending.remove(&token) else {
            return self.violate(Rule::Invariants, format!("operation {token} ended twice: {outcome:?}"));
        };
        match (pending, outcome) {
            (Pending::Plain(op), outcome) => {
                let came = match outcome {
                    Outcome::Written { version } => Came::Written(version),
                    Outcome::Deleted(was) => Came::Deleted(was),
                    Outcome::Found(found) => Came::Found(found.map(|value| Seen {
                        value: value_of(&value.bytes),
                        version: value.version,
                        expires_at: value.expires_at,
                    })),
                    Outcome::Failed(failure) => {
                        *self.stats.failures.entry(reason(failure)).or_default() += 1;
                        Came::Failed
                    }
                    _ => Came::Unknown,
                };
                self.end(op, came);
            }
            (Pending::Forwarded(op), outcome) => {
                let came = match outcome {
                    Outcome::Ordered(answer) => match <[u8; 8]>::try_from(&answer[..]) {
                        Ok(count) => Came::Counted(u64::from_le_bytes(count)),
                        Err(_) => Came::Unknown,
                    },
                    Outcome::Failed(_) => Came::Failed,
                    _ => Came::Unknown,
                };
                self.end(op, came);
            }
            (Pending::Prepare(asker), Outcome::Ready(found)) => {
                if !self.run_count(node, core, asker, found) {
                    self.answer(node, core, asker, None);
                }
            }
            (Pending::Prepare(asker), _) => self.answer(node, core, asker, None),
            (Pending::Commit(asker, count), Outcome::Committed) => self.answer(node, core, asker, Some(Some(count))),
            (Pending::Commit(asker, _), Outcome::Failed(_)) => self.answer(node, core, asker, None),
            (Pending::Commit(asker, _), _) => self.answer(node, core, asker, Some(None)),
        }
    }

    /// Tells who asked for a command what came of it: nothing, nobody knows, or a count.
    fn answer(&mut self, node: usize, core: usize, asker: Asker, count: Option<Option<u64>>) {
        match (asker, count) {
            (Asker::Here(op), None) => self.end(op, Came::Failed),
            (Asker::Here(op), Some(count)) => self.end(op, count.map_or(Came::Unknown, Came::Counted)),
            (Asker::There(from, ask), count) => {
                let bytes = count.map(|count| count.map_or(vec![b'?'], |count| count.to_le_bytes().to_vec()));
                let Core { shards, out, .. } = &mut self.nodes[node].cores[core];
                shards.answer_order(from, ask, bytes.as_deref().ok_or(Why::Busy), out);
            }
        }
    }

    fn end(&mut self, op: usize, came: Came) {
        let wall = self.nodes[self.history.ops[op].node].wall(self.time);
        let record = &mut self.history.ops[op];
        (record.end, record.wall, record.came) = (self.time, wall, came);
        let Op { client, node, key, is_counter, asked, call, .. } = *record;
        // A command waits for its orderer, which reads and writes.
        let most = 2 * self.options.timeout_ms + self.options.again_ms + 1_000;
        if self.time - call > most * MS && self.nodes[node].stood_until <= call {
            let what = format!("past its deadline: {:?}", self.history.ops[op]);
            return self.violate(Rule::Liveness, what);
        }
        let how = match came {
            Came::Failed => 1,
            Came::Unknown => 2,
            _ => 0,
        };
        self.stats.ended[how] += 1;
        self.trace.hash(&[4, self.time, op as u64, how as u64]);
        let shard = self.trace.only().map(|_| self.shard_of(key, is_counter));
        self.trace.note(self.time, node, shard, || format!("end {op}: {}", ended(came)));
        if client == LAST {
            if how != 0 && !self.nodes[node].up {
                // It was drained, and has gone in the middle: another one is asked.
                self.last.push((node, key, is_counter, asked));
            } else if how == 1 && self.time < self.looked_at + REPAIRED {
                // Nothing was done: the map has changed once more, or copies differ below their floors until they are repaired.
                self.last.push((node, key, is_counter, asked));
                return self.push(500 * MS, What::Settled);
            } else if how != 0 {
                let what = format!("after healing: {:?}", self.history.ops[op]);
                return self.violate(Rule::Liveness, what);
            }
            return self.push(MS, What::Settled);
        }
        let refused = u64::from(came == Came::Failed) * 30;
        let think = (self.chooser.exponential(self.options.think_ms) + refused) * MS;
        self.push(think, What::Client { client });
    }

    // --- maps -------------------------------------------------------------------------------------------------------

    fn on_map(&mut self, node: usize, core: usize, map: Arc<Map>) {
        let known = self.maps.entry(map.epoch).or_insert_with(|| map.clone());
        if !Arc::ptr_eq(known, &map) && **known != *map {
            let what = format!("two maps of epoch {}", map.epoch);
            return self.violate(Rule::OneMap, what);
        }
        let state = &self.nodes[node];
        let is_me = |m: &&crate::map::Member| m.about.id == state.id && m.standing != Standing::Lost;
        let me = map.members.iter().filter(is_me).find(|m| m.about.boot == state.boot).map(|m| m.no);
        let me = me.or_else(|| {
            let kept = self.planted.has(Bug::SameLife).then(|| map.life_of(state.id).map(|m| m.no));
            kept.flatten()
        });
        match me {
            Some(no) => {
                if state.no != no {
                    self.nodes[node].no = no;
                    self.lives.insert(no, (node, self.nodes[node].boot));
                    self.trace.note(self.time, node, None, || format!("is number {no}"));
                    self.changed(node);
                }
                self.adopt(node, core, &map, no);
            }
            None if state.no != NodeNo(0) && map.epoch > state.adopted() && !state.gone => {
                // The cluster has gone on without it: what it holds counts nowhere, so it starts anew.
                self.trace.note(self.time, node, None, || "given up, starts anew".into());
                self.stop(node);
                self.push(50 * MS, What::Start { node });
            }
            None => {}
        }
    }

    fn adopt(&mut self, node: usize, core: usize, map: &Arc<Map>, no: NodeNo) {
        let time = self.time;
        self.trace.hash(&[5, time, node as u64, map.epoch]);
        let state = &mut self.nodes[node];
        let (now, before, alive) = (state.now(time), state.adopted(), state.alive());
        let Core { shards, store, out, .. } = &mut state.cores[core];
        let is_new = shards.view().me != no;
        let known = self.trace.only().map_or(0, |shard| shards.view().map.placement(ShardId(shard)).epoch);
        if is_new {
            shards.on_alive(now, store, alive, out);
        }
        shards.on_map(now, store, map.clone(), no, out);
        if let Some(shard) = self.trace.only() {
            let epoch = map.placement(ShardId(shard)).epoch;
            let owns = self.nodes[node].core_of(shard) == Some(core);
            if owns && (known < epoch || is_new) {
                self.trace.note(time, node, Some(shard), || format!("adopts {epoch}"));
            }
        } else {
            self.trace.note(time, node, None, || format!("core {core} adopts {}", map.epoch));
        }
        self.drain(node, core);
        let epoch = self.nodes[node].adopted();
        if epoch > before || epoch == 1 {
            let after = self.random.within(1, self.options.map_ms) * MS;
            self.push(after, What::Adopted { node, no, epoch });
        }
    }

    /// As no more is killed than `w` copies survive, no shard may ever be given up.
    fn look_for_losses(&mut self, map: &Map) {
        if let Some(shard) = map.placements.iter().position(|p| p.losses > 0) {
            let placement = set(&map.placements[shard]);
            self.violate(Rule::Durability, format!("shard {shard} was given up: {placement}"));
        }
    }

    fn distribute(&mut self) {
        let map = self.authority.map().clone();
        self.changed_at = self.time;
        self.look_for_losses(&map);
        if let Some(shard) = self.trace.only() {
            let p = map.placement(ShardId(shard));
            if p.epoch == map.epoch {
                self.trace.note(self.time, AUTHORITY, None, || self::set(p));
            }
        } else {
            self.trace.note(self.time, AUTHORITY, None, || format!("map {}", map.epoch));
        }
        for node in 0..self.nodes.len() {
            if self.nodes[node].up && !self.is_far(node) {
                self.send_map(node, &map);
            }
        }
    }

    fn send_map(&mut self, node: usize, map: &Arc<Map>) {
        let (boot, base) = (self.nodes[node].boot, self.random.within(0, self.options.map_ms) * MS);
        for core in 0..self.nodes[node].cores.len() {
            let after = base + self.random.below(5 * MS);
            self.push(after, What::Map { node, boot, core, map: map.clone() });
        }
    }

    fn think(&mut self) {
        let now = self.time / MS;
        if self.authority.think(now) {
            self.distribute();
        }
        let map = self.authority.map().clone();
        // Those that have not heard of the newest map hear of it again.
        for node in 0..self.nodes.len() {
            let late = self.nodes[node].up && self.nodes[node].adopted() < map.epoch && !self.is_far(node);
            if late && self.random.chance(100) {
                self.send_map(node, &map);
            }
        }
        // Who has been emptied may go.
        let named = |no: NodeNo| map.placements.iter().any(|p| p.names(no));
        let empty =
            map.present().find(|m| m.standing == Standing::Draining && !named(m.no)).map(|m| (m.no, m.about.id));
        if let Some((no, id)) = empty
            && self.authority.ask(&Change::Lose(no)).is_ok()
        {
            let node = self.nodes.iter().position(|node| node.id == id).expect("members are nodes");
            self.nodes[node].gone = true;
            self.trace.note(self.time, AUTHORITY, None, || format!("n{node} is empty and goes"));
            self.stop(node);
            self.distribute();
        }
        let after = self.random.within(50, 300) * MS;
        self.push(after, What::Think);
    }

    // --- lives ------------------------------------------------------------------------------------------------------

    fn start(&mut self, node: usize) {
        if self.has_planes() {
            return self.start_plane(node);
        }
        let map = self.authority.map().clone();
        let former = self.nodes[node].no;
        self.nodes[node].start(&self.options, &map, self.planted);
        let boot = self.nodes[node].boot;
        self.trace.note(self.time, node, None, || format!("starts, life {boot}"));
        if self.planted.has(Bug::SameLife) && former != NodeNo(0) {
            // The map is not asked: the node goes on in the place of its former life.
            self.nodes[node].no = NodeNo(0);
            self.send_map(node, &map);
        }
        let after = self.random.within(10, 500) * MS;
        self.push(after, What::Admit { node, boot });
        self.push(500 * MS, What::Sweep { node, boot });
    }

    fn admit(&mut self, node: usize, boot: u64) {
        if !self.is_life(node, boot) || self.nodes[node].no != NodeNo(0) {
            return;
        }
        let known = self.authority.map().life_of(self.nodes[node].id);
        if self.is_far(node) || self.planted.has(Bug::SameLife) && known.is_some() {
            return self.push(500 * MS, What::Admit { node, boot });
        }
        let candidate = self.nodes[node].candidate(self.options.cores);
        if self.authority.ask(&Change::Admit(candidate)).is_ok() {
            self.distribute();
        }
        // Until it has heard that it was admitted.
        self.push(500 * MS, What::Admit { node, boot });
    }

    /// A process ends; what its clients waited for, nobody knows.
    fn stop(&mut self, node: usize) {
        self.trace.note(self.time, node, None, || "dies".into());
        let pending = self.nodes[node].stop();
        for waiting in pending.into_values() {
            match waiting {
                Pending::Plain(op) | Pending::Forwarded(op) => self.end(op, Came::Unknown),
                Pending::Prepare(Asker::Here(op)) | Pending::Commit(Asker::Here(op), _) => {
                    self.end(op, Came::Unknown);
                }
                Pending::Prepare(..) | Pending::Commit(..) => {}
            }
        }
        self.changed(node);
    }

    /// Whether a node can be reached has changed: others find out in their time.
    fn changed(&mut self, node: usize) {
        if self.has_planes() {
            return;
        }
        let observers: Vec<usize> = (0..self.nodes.len()).filter(|&other| other != node).chain([AUTHORITY]).collect();
        for observer in observers {
            self.detect_later(observer, node);
            if observer != AUTHORITY {
                self.detect_later(node, observer);
            }
        }
    }

    fn detect_later(&mut self, observer: usize, subject: usize) {
        let (quick, slow) = self.options.detect_ms;
        let after = match self.can_see(observer, subject) {
            true => self.random.within(20, quick),
            false => self.random.within(quick, slow),
        };
        self.push(after * MS, What::Detect { observer, subject });
    }

    fn can_see(&self, observer: usize, subject: usize) -> bool {
        let state = &self.nodes[subject];
        if !state.up || state.no == NodeNo(0) || state.paused_until > self.time {
            return false;
        }
        if observer == AUTHORITY {
            return !self.is_far(subject);
        }
        let open = |a, b| self.network.is_open(a, b) && self.network.is_open(b, a);
        let through =
            |k: usize| k != observer && k != subject && self.nodes[k].up && open(observer, k) && open(k, subject);
        open(observer, subject) || self.options.indirect && (0..self.nodes.len()).any(through)
    }

    fn detect(&mut self, observer: usize, subject: usize) {
        let is_seen = self.can_see(observer, subject);
        let no = self.nodes[subject].no;
        if observer == AUTHORITY {
            let id = self.nodes[subject].id;
            return self.authority.on_seen(self.time / MS, id, is_seen.then_some(no));
        }
        if !self.nodes[observer].up || !self.awake(observer, || What::Detect { observer, subject }) {
            return;
        }
        let sees = &mut self.nodes[observer].sees;
        let before = if is_seen { sees.insert(subject, no) } else { sees.remove(&subject) };
        if before != is_seen.then_some(no) {
            self.trace.note(self.time, observer, None, || {
                format!("n{subject} is {}", if is_seen { "there" } else { "away" })
            });
            self.tell_alive(observer);
        }
    }

    fn tell_alive(&mut self, node: usize) {
        let (now, alive) = (self.nodes[node].now(self.time), self.nodes[node].alive());
        for core in 0..self.nodes[node].cores.len() {
            let Core { shards, store, out, .. } = &mut self.nodes[node].cores[core];
            shards.on_alive(now, store, alive.clone(), out);
            self.drain(node, core);
        }
    }

    // --- faults -----------------------------------------------------------------------------------------------------

    /// Whether a node may lose its memory now. A write is on `w` copies, so at most `w - 1` of a shard may be away or
    /// incomplete at once; what remains is enough to fill the others from.
    fn may_lose(&self, node: usize) -> bool {
        let map = self.map();
        if map.epoch == 0 {
            return false;
        }
        let is_away = |no: NodeNo| {
            let Some(&(index, boot)) = self.lives.get(&no) else { return true };
            let lost = map.member(no).is_none_or(|m| m.standing == Standing::Lost);
            lost || index == node
                || !self.is_life(index, boot)
                || self.nodes[index].paused_until > self.time
                || self.nodes[index].no != no
                || !self.is_seen(no)
        };
        map.placements.iter().all(|placement| {
            let fits = |set: &[crate::map::Replica]| {
                let away = set.iter().filter(|r| r.filling || is_away(r.node)).count();
                away < map.quorums.of(set.len()).0
            };
            fits(&placement.replicas) && (placement.stage == Stage::Normal || fits(&placement.new_set()))
        })
    }

    /// Whether those who decide on the map believe that a life can be reached.
    fn is_seen(&self, no: NodeNo) -> bool {
        match self.options.control {
            Control::Authority => self.authority.sees(no),
            Control::Planes => self.leaders_see(no),
        }
    }

    fn fault(&mut self, at: usize, tries: u32) {
        let kind = self.options.faults[at].kind.clone();
        let nodes = self.nodes.len();
        let happened = match &kind {
            Kind::Kill { node, down_ms } => self.kill(node % nodes, *down_ms),
            Kind::Replace { node, down_ms } => self.replace_machine(node % nodes, *down_ms),
            Kind::KillMover { pick, down_ms } => {
                let map = self.map().clone();
                let filling =
                    map.placements.iter().flat_map(|p| p.replicas.iter().filter(|r| r.filling).map(|r| r.node));
                let moving = map.placements.iter().flat_map(|p| p.joining.into_iter().chain(p.leaving));
                let mut movers: Vec<usize> =
                    filling.chain(moving).filter_map(|no| self.lives.get(&no)).map(|life| life.0).collect();
                movers.sort_unstable();
                movers.dedup();
                !movers.is_empty() && self.kill(movers[pick % movers.len()], *down_ms)
            }
            Kind::Pause { node, ms } => {
                let node = node % nodes;
                // It ends before all is healed.
                let ms = &(*ms).min((self.options.seconds * 1000).saturating_sub(self.time / MS + 1));
                let is_long = 2 * ms > self.options.replace_after_ms;
                let may = self.nodes[node].up && self.nodes[node].paused_until <= self.time && !self.is_far(node);
                let happens = may && (!is_long || self.may_lose(node));
                if happens {
                    self.nodes[node].paused_until = self.time + ms * MS;
                    self.nodes[node].stood_until = self.time + ms * MS;
                    self.paused.insert(at, node);
                    self.trace.note(self.time, node, None, || format!("pauses for {ms} ms"));
                    self.changed(node);
                    self.push(ms * MS, What::FaultEnd { at });
                }
                happens
            }
            Kind::Slow { node, extra_ms, ms } => {
                self.network.slow(node % nodes, extra_ms * MS, self.time + ms * MS);
                self.nodes[node % nodes].up
            }
            Kind::Partition { cut, .. } if !cut.iter().any(|&(a, b)| a != b && a < nodes && b < nodes) => false,
            Kind::Partition { cut, far, ms } => {
                self.network.cut(cut);
                // Nobody is away for so long, by one fault after another, that it is given up with its data.
                let is_new = |node: &usize| {
                    let seen = self.nodes.get(*node).is_none_or(|state| self.is_seen(state.no));
                    seen && !self.is_far(*node) && self.nodes.get(*node).is_none_or(|n| n.paused_until <= self.time)
                };
                let far: Vec<usize> = if far.iter().all(is_new) { far.clone() } else { Vec::new() };
                self.made_far.insert(at, far.clone());
                far.iter().for_each(|&node| *self.far.entry(node).or_default() += 1);
                self.trace.note(self.time, AUTHORITY, None, || format!("partition {cut:?} for {ms} ms"));
                (0..nodes).for_each(|node| self.changed(node));
                self.push(ms * MS, What::FaultEnd { at });
                true
            }
            Kind::Clog { from, to, ms } => {
                let ms = (*ms).min((self.options.seconds * 1000).saturating_sub(self.time / MS + 1));
                self.network.clog(from % nodes, to % nodes, self.time + ms * MS);
                from % nodes != to % nodes
            }
            // A node that is alone with a shard acknowledges whatever its clock says.
            Kind::Clock { offset_ms, .. } if *offset_ms > self.options.skew_ms && self.has_single_copies() => false,
            Kind::Clock { node, offset_ms } => {
                let before = std::mem::replace(&mut self.nodes[node % nodes].offset_ms, *offset_ms);
                self.trace.note(self.time, node % nodes, None, || format!("clock {offset_ms} ms off"));
                before != *offset_ms
            }
            Kind::Join => {
                let room = nodes < self.options.max_nodes;
                if room {
                    let offset = self.random.signed(-self.options.skew_ms, self.options.skew_ms);
                    self.nodes.push(Node::new(nodes, offset));
                    self.start(nodes);
                }
                room
            }
            Kind::Drain { node } => self.drain_node(node % nodes),
        };
        let may_wait = matches!(
            kind,
            Kind::Kill { .. }
                | Kind::KillMover { .. }
                | Kind::Replace { .. }
                | Kind::Pause { .. }
                | Kind::Drain { .. }
                | Kind::Clock { .. }
        );
        let left = (self.options.seconds * 1000 * MS).saturating_sub(self.time);
        if happened {
            *self.stats.faults.entry(kind.name()).or_default() += 1;
        } else if may_wait && tries < 6 && left > 1000 * MS {
            self.push(700 * MS, What::Fault { at, tries: tries + 1 });
        } else if self.other_fault(left) {
            self.stats.skipped += 1;
        } else if left > 1000 * MS {
            self.push(700 * MS, What::Fault { at, tries });
        }
    }

    /// Whether one node alone acknowledges writes of some shard, as in a cluster that has just been founded.
    fn has_single_copies(&self) -> bool {
        let map = self.map();
        self.has_planes() && map.placements.iter().any(|p| map.quorums.of(p.replicas.len()).0 < 2)
    }

    /// In place of a fault that never fitted: one that nothing forbids.
    fn other_fault(&mut self, left: u64) -> bool {
        let up: Vec<usize> = (0..self.nodes.len()).filter(|&node| self.nodes[node].up).collect();
        if up.len() < 2 {
            return false;
        }
        let from = self.random.below(up.len() as u64) as usize;
        let to = up[(from + self.random.within(1, up.len() as u64 - 1) as usize) % up.len()];
        let time = (self.random.within(100, 3_000) * MS).min(left);
        let name = if self.random.chance(500) {
            self.network.clog(up[from], to, self.time + time);
            "clog"
        } else {
            let extra = self.random.within(5, 500) * MS;
            self.network.slow(to, extra, self.time + time);
            "slow"
        };
        self.trace.note(self.time, to, None, || format!("{name} for {} ms", time / MS));
        *self.stats.faults.entry(name).or_default() += 1;
        true
    }

    fn kill(&mut self, node: usize, down_ms: u64) -> bool {
        let may = self.nodes[node].up && self.may_lose(node);
        if may {
            self.stop(node);
            self.push(down_ms * MS, What::Start { node });
        }
        may
    }

    fn drain_node(&mut self, node: usize) -> bool {
        let map = self.map().clone();
        let up = map.present().filter(|m| m.standing == Standing::Up).count();
        let no = self.nodes[node].no;
        let may = self.nodes[node].up && up > usize::from(map.quorums.n).max(2) && no != NodeNo(0);
        if self.has_planes() {
            return may && self.ask_to_drain(node);
        }
        let happens = may && self.authority.ask(&Change::Drain(no, true)).is_ok();
        if happens {
            self.trace.note(self.time, node, None, || "is to be emptied".into());
            self.distribute();
        }
        happens
    }

    fn fault_end(&mut self, at: usize) {
        if self.healed {
            return;
        }
        match self.options.faults[at].kind.clone() {
            Kind::Pause { .. } => {
                if let Some(node) = self.paused.remove(&at) {
                    self.changed(node);
                }
            }
            Kind::Partition { cut, .. } => {
                self.network.mend(&cut);
                for node in self.made_far.remove(&at).unwrap_or_default() {
                    let faults = self.far.entry(node).or_default();
                    *faults = faults.saturating_sub(1);
                }
                self.trace.note(self.time, AUTHORITY, None, || "partition over".into());
                (0..self.nodes.len()).for_each(|node| self.changed(node));
            }
            _ => {}
        }
    }

    // --- the end ----------------------------------------------------------------------------------------------------

    fn heal(&mut self) {
        self.trace.note(self.time, AUTHORITY, None, || "all is healed".into());
        self.healed = true;
        self.network.heal();
        self.far.clear();
        self.options.map_ms = self.options.map_ms.min(100);
        self.options.memory = 0;
        self.nodes.iter_mut().flat_map(|node| &mut node.cores).for_each(|core| core.store.set_max_memory(0));
        for node in 0..self.nodes.len() {
            let skew = self.options.skew_ms;
            let state = &mut self.nodes[node];
            state.paused_until = state.paused_until.min(self.time);
            state.offset_ms = state.offset_ms.clamp(-skew, skew);
            if !state.up && !state.gone {
                self.start(node);
            }
        }
        (0..self.nodes.len()).for_each(|node| self.changed(node));
        self.push(1000 * MS, What::Settled);
    }

    /// Looks whether all is at rest; then at everything once more.
    fn look(&mut self) {
        if self.looking {
            if let Some((node, key, is_counter, asked)) = self.last.pop() {
                // Who was drained may have gone meanwhile.
                let others = (0..self.nodes.len()).filter(|&other| self.nodes[other].up);
                let node = [node].into_iter().filter(|&node| self.nodes[node].up).chain(others).next().unwrap_or(node);
                return self.start_op(LAST, node, (key, is_counter), asked, true);
            }
            match self.differs() {
                None => self.look_inside(),
                Some(what) if self.time - self.looked_at > REPAIRED => self.violate(Rule::Convergence, what),
                Some(_) => self.push(500 * MS, What::Settled),
            }
            return;
        }
        let waited = self.time - self.options.seconds * 1000 * MS;
        if self.options.is_poisoned() {
            self.over = true;
            return;
        }
        // Where one shard moves at a time, three nodes that are emptied take most of a minute for themselves.
        let patience = if self.options.moves_at_once == 1 { 2 * PATIENCE } else { PATIENCE };
        let unrest = self.unrest();
        match unrest {
            Some(why) if waited > patience => {
                self.violate(Rule::Liveness, format!("{} s after healing, {why}", patience / 1_000_000));
            }
            Some(_) => self.push(500 * MS, What::Settled),
            None => {
                self.stats.settled = waited;
                self.looking = true;
                self.looked_at = self.time;
                self.last_ops();
                self.push(MS, What::Settled);
            }
        }
    }

    /// The digests are equal: so must be what they stand for, which a digest, made of hashes and versions, does not tell. Then
    /// time passes, in which repair and purge have their rounds, and everything is read once more.
    fn look_inside(&mut self) {
        for node in &mut self.nodes {
            node.cores.iter_mut().for_each(|core| core.store.invariants());
        }
        let map = self.map().clone();
        for (shard, placement) in map.placements.iter().enumerate() {
            let shard = ShardId(shard as u16);
            let held = placement.replicas.iter().map(|r| (r.node, self.contents(r.node, shard)));
            let held: Vec<_> = held.collect();
            if let Some((no, _)) = held.iter().find(|(_, entries)| *entries != held[0].1) {
                let texts = [self.held(held[0].0, shard), self.held(*no, shard)].join("; ");
                let what = format!("replicas of shard {} agree on versions and not on what they are: {texts}", shard.0);
                return self.violate(Rule::Convergence, what);
            }
        }
        if self.is_again {
            self.over = true;
            return;
        }
        self.is_again = true;
        let up: Vec<usize> = (0..self.nodes.len()).filter(|&node| self.nodes[node].up).collect();
        let keys = (0..self.options.keys).map(|key| (key, false));
        let keys = keys.chain((0..self.options.counters).map(|key| (key, true)));
        let reads = keys.enumerate().flat_map(|(at, (key, is_counter))| {
            let read = |turn: usize| (up[(at + turn) % up.len()], key, is_counter, Asked::Get);
            [read(1), read(2)]
        });
        self.last = reads.collect();
        let rest = self.options.quiet_ms * MS;
        self.looked_at = self.time + rest;
        self.push(rest.max(MS), What::Settled);
    }

    /// All that a replica holds of a shard: key, version, whether it is gone, expiry and value.
    #[allow(clippy::type_complexity)]
    fn contents(
        &mut self,
        no: NodeNo,
        shard: ShardId,
    ) -> Vec<(Vec<u8>, gridkv_engine::hlc::Version, bool, u64, Vec<u8>)> {
        let now = EPOCH_MS + self.time / MS + EXPIRY_SLACK_MS;
        let node = &mut self.nodes[self.lives[&no].0];
        let Some(core) = node.core_of(shard.0) else { return Vec::new() };
        let store = &mut node.cores[core].store;
        let first = store.keyspace().first_hash(shard);
        let mut entries = Vec::new();
        store.snapshot(shard, first, usize::MAX, &mut |entry| {
            // Each replica makes a tombstone of what has expired in its own time.
            let gone = entry.tombstone || entry.expires_at != 0 && entry.expires_at <= now;
            let value = if gone { Vec::new() } else { entry.value.to_vec() };
            entries.push((entry.key.to_vec(), entry.version, gone, entry.expires_at, value));
        });
        entries.sort_unstable();
        entries
    }

    fn unrest(&self) -> Option<String> {
        let map = self.map();
        if map.epoch == 0 {
            return Some("there is no map".into());
        }
        if !is_whole(map) {
            let (shard, placement) = map.placements.iter().enumerate().find(|(shard, _)| {
                let mut one = (**map).clone();
                one.placements = vec![one.placements[*shard].clone()];
                !is_whole(&one)
            })?;
            let node = |m: &crate::map::Member| plane::index_of(m.about.peer).unwrap_or(usize::MAX);
            let member = |m: &crate::map::Member| format!("{} of n{} {:?}", m.no, node(m), m.standing);
            let members: Vec<String> = map.members.iter().map(member).collect();
            let gone: Vec<usize> = (0..self.nodes.len()).filter(|&node| self.nodes[node].gone).collect();
            let members = members.join(", ");
            return Some(format!("shard {shard} is not whole: {} [{members}], gone {gone:?}", set(placement)));
        }
        if self.time - self.changed_at < 1_500 * MS {
            return Some("the map still changes".into());
        }
        if self.has_planes() {
            return self.planes_unrest();
        }
        for (index, node) in self.nodes.iter().enumerate().filter(|(_, node)| !node.gone) {
            if !node.up || node.no == NodeNo(0) || node.adopted() < map.epoch {
                return Some(format!("node {index} has not adopted map {}", map.epoch));
            }
            let others = self.nodes.iter().filter(|other| !other.gone && other.id != node.id);
            if !others.clone().all(|other| node.sees.values().any(|&no| no == other.no)) {
                return Some(format!("node {index} does not see all"));
            }
            if !node.pending.is_empty() {
                return Some(format!("node {index} has operations {:?}", node.pending));
            }
        }
        None
    }

    fn last_ops(&mut self) {
        let up: Vec<usize> = (0..self.nodes.len()).filter(|&node| self.nodes[node].up).collect();
        let keys = (0..self.options.keys).map(|key| (key, false));
        let keys: Vec<_> = keys.chain((0..self.options.counters).map(|key| (key, true))).collect();
        for (at, &(key, is_counter)) in keys.iter().enumerate() {
            for turn in (0..2).rev() {
                let asked = match turn {
                    0 => Asked::Get,
                    _ if is_counter => Asked::Count,
                    _ if at % 5 > 0 => Asked::Get,
                    _ => {
                        self.next_value += 1;
                        Asked::Set { value: self.next_value, expires_at: 0 }
                    }
                };
                self.last.push((up[(at + turn) % up.len()], key, is_counter, asked));
            }
        }
        // The list is taken from its end: each key is read before it is changed.
        self.last.sort_by_key(|(_, _, _, asked)| *asked == Asked::Get);
    }

    /// Replicas of a shard that do not hold the same.
    fn differs(&mut self) -> Option<String> {
        let map = self.map().clone();
        for (shard, placement) in map.placements.iter().enumerate() {
            let shard = ShardId(shard as u16);
            let digest = |no: NodeNo| {
                let node = &self.nodes[self.lives[&no].0];
                node.core_of(shard.0).map(|core| node.cores[core].store.digest(shard))
            };
            let mut digests = placement.replicas.iter().map(|r| digest(r.node));
            let first = digests.next();
            if digests.any(|other| Some(other) != first) {
                let held: Vec<String> = placement.replicas.iter().map(|r| self.held(r.node, shard)).collect();
                return Some(format!("replicas of shard {} differ: {}", shard.0, held.join("; ")));
            }
        }
        None
    }

    /// What a replica holds of a shard, in words.
    fn held(&mut self, no: NodeNo, shard: ShardId) -> String {
        let node = &mut self.nodes[self.lives[&no].0];
        let Some(core) = node.core_of(shard.0) else { return format!("{no} is down") };
        let store = &mut node.cores[core].store;
        let floor = version(store.tombstone_floor(shard));
        let mut text = format!("{no} refuses up to {floor} and holds");
        let first = store.keyspace().first_hash(shard);
        store.snapshot(shard, first, 100, &mut |entry| {
            let grave = if entry.tombstone { " grave" } else { "" };
            let expires = entry.expires_at.saturating_sub(EPOCH_MS);
            let key = String::from_utf8_lossy(entry.key).into_owned();
            text += &format!(" [{key} v{}{grave} until {expires}]", version(entry.version));
        });
        text
    }

    /// The shard of a key.
    pub fn shard_of(&self, key: u64, is_counter: bool) -> u16 {
        let map = self.map();
        let name = key_of(key, is_counter);
        let shards = gridkv_engine::hash::ShardCount::new(map.placements.len() as u32).expect("checked");
        let keyspace = gridkv_engine::hash::Keyspace { seed: map.seed, shards };
        keyspace.shard(keyspace.locate(&name)).0
    }

    /// Now, in microseconds.
    pub fn time(&self) -> u64 {
        self.time
    }
}

/// Why an operation failed, in a word.
fn reason(failure: Failure) -> &'static str {
    match failure {
        Failure::NoQuorum { .. } => "no quorum",
        Failure::NoOrderer { .. } => "no orderer",
        Failure::TimedOut { .. } => "timed out",
        Failure::Full => "full",
        Failure::Clock => "clock",
        Failure::Busy => "busy",
        Failure::NotAdmitted => "not admitted",
        #[allow(unreachable_patterns)]
        _ => "other",
    }
}

/// A message in a few words.
fn short(message: &Message<'_>) -> String {
    let epoch = message.ask().epoch;
    match message {
        Message::Write(_, stored) => {
            let entry = stored.entry;
            let value = if entry.tombstone { "grave".into() } else { format!("{}", value_of(entry.value)) };
            format!("Write {value} v{} e{epoch}", version(entry.version))
        }
        Message::Found(_, found, _) => match found {
            Some(stored) => format!("Found v{} e{epoch}", version(stored.entry.version)),
            None => format!("Found nothing e{epoch}"),
        },
        Message::Refused(_, why) => format!("Refused {why:?} e{epoch}"),
        other => {
            let text = format!("{other:?}");
            let name = text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned();
            format!("{name} e{epoch}")
        }
    }
}

/// Who holds a shard, in a line.
fn set(placement: &crate::map::Placement) -> String {
    let copy = |r: &crate::map::Replica| format!("{}{}", r.node, if r.filling { " (filling)" } else { "" });
    let copies: Vec<String> = placement.replicas.iter().map(copy).collect();
    let mut text = format!("MAP {}: {} {:?}", placement.epoch, copies.join(", "), placement.stage);
    if let Some(no) = placement.joining {
        text += &format!(", {no} joins");
    }
    if let Some(no) = placement.leaving {
        text += &format!(", {no} leaves");
    }
    text
}

/// What came of an operation, in a few words.
fn ended(came: Came) -> String {
    match came {
        Came::Written(at) => format!("written v{}", version(at)),
        Came::Found(Some(seen)) => format!("found {} v{}", seen.value, version(seen.version)),
        other => format!("{other:?}"),
    }
}

fn version(version: gridkv_engine::hlc::Version) -> String {
    let ms = version.hlc.millis() as i64 - EPOCH_MS as i64;
    format!("{ms}.{}@{}", version.hlc.counter(), version.node)
}
