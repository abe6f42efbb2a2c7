//! The machines of one core: the operations it coordinates and the replicas it holds.
//!
//! The hub routes, it decides nothing: each input has one arm and each machine its own file.
//!
//! ```text
//!    client operations ──▶ coordinator ──┐                 ┌──▶ messages to peers
//!    messages of peers ──▶ replica ──────┼──▶  Outbox  ────┼──▶ ends of operations
//!                      ──▶ fill, repair ─┤                 └──▶ shards that became complete
//!    map, who is alive ──▶ all ──────────┘
//! ```
//!
//! The data is the engine's [`Store`], lent with every input. Time comes in as [`Now`]. So the same bytes run in a node and
//! in the simulator.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use gridkv_engine::Millis;
use gridkv_engine::hash::{KeyHash, Keyspace, ShardCount, ShardId};
use gridkv_engine::record::Entry;
use gridkv_engine::store::Store;

use crate::coordinator::{self, Coordinator, CoordinatorStats};
use crate::fill::{self, FILL, Fill, FillStats};
use crate::hints::{self, HINT, HintStats, Hints};
use crate::ids::{NodeNo, Now};
use crate::map::{Map, Placement};
use crate::outbox::{Changed, Failure, Found, Outbox, Outcome, Value};
use crate::planted::Planted;
use crate::purge::{self, PURGE, Purge, PurgeStats};
use crate::quorum::Level;
use crate::repair::{self, REPAIR, Repair, RepairStats, SweepStats};
use crate::replica::{self, Pages, ReplicaStats};
use crate::wire::{Ask, Message, Why};

/// What a core knows of its cluster.
#[derive(Clone, Debug)]
pub struct View {
    /// This life of this node; 0 before it is admitted.
    pub me: NodeNo,
    /// The map that this core has adopted.
    pub map: Arc<Map>,
    /// Who can be reached, this node included.
    pub alive: BTreeSet<NodeNo>,
    /// The shards of this core.
    pub owned: Range<u16>,
    /// This node has to think that it is cut off: it answers no read alone, and begins no write that one copy is enough for.
    pub isolated: bool,
    /// This node's clock is wrong: it makes no versions.
    pub quarantined: bool,
}

impl View {
    /// How keys map to shards.
    pub fn keyspace(&self) -> Keyspace {
        let shards = ShardCount::new(self.map.placements.len() as u32).expect("a checked map has a valid number");
        Keyspace { seed: self.map.seed, shards }
    }

    /// The shard of a hash.
    pub fn shard(&self, hash: KeyHash) -> ShardId {
        ShardId((hash.0 >> (64 - self.map.placements.len().trailing_zeros())) as u16)
    }

    /// Who holds the shard of a hash.
    pub fn placement_of(&self, hash: KeyHash) -> &Placement {
        self.map.placement(self.shard(hash))
    }

    /// Whether a node can be reached.
    pub fn is_alive(&self, node: NodeNo) -> bool {
        self.alive.contains(&node)
    }
}

/// What a machine is lent for one input.
pub(crate) struct Context<'a> {
    pub(crate) now: Now,
    pub(crate) store: &'a mut Store,
    pub(crate) view: &'a View,
    pub(crate) hints: &'a mut Hints,
    pub(crate) planted: Planted,
    pub(crate) pages: Pages,
    pub(crate) out: &'a mut Outbox,
}

/// A request that a peer wants this core to run as the orderer of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrderRequest {
    /// Who asks.
    pub from: NodeNo,
    /// Its question; handed back with the answer.
    pub ask: Ask,
    /// Hash of its first key.
    pub hash: KeyHash,
    /// What to run.
    pub request: Vec<u8>,
}

/// What a client wants of the shards; each ends as one [`Outcome`].
#[derive(Debug)]
pub enum Operation<'a> {
    /// An entry is written; `None` deletes it without looking. Ends as [`Outcome::Written`].
    Write {
        /// Its hash and its key.
        key: (KeyHash, &'a [u8]),
        /// Its value.
        value: Option<&'a [u8]>,
        /// When it expires, in unix milliseconds; 0 = never.
        expires_at: Millis,
        /// On how many replicas.
        level: Level,
    },
    /// A key is read. Ends as [`Outcome::Found`].
    Read {
        /// Its hash and the key.
        key: (KeyHash, &'a [u8]),
        /// From how many replicas.
        level: Level,
    },
    /// A key is deleted if it is there. Ends as [`Outcome::Deleted`].
    Delete {
        /// Its hash and the key.
        key: (KeyHash, &'a [u8]),
        /// On how many replicas.
        level: Level,
    },
    /// Keys are read, for a command that the driver runs on what is found. Ends as [`Outcome::Ready`]; then the driver runs
    /// the command at once, on [`Shards::freshest`] of what was found, and begins a [`Operation::Commit`] with
    /// what it changed.
    ///
    /// A command whose outcome depends on what it finds runs at the [`Shards::orderer`] of its shard, else two of them may
    /// both find the same.
    Prepare {
        /// Their hashes and the keys.
        keys: &'a [(KeyHash, &'a [u8])],
        /// Bytes of the command, which the driver holds meanwhile.
        payload: usize,
        /// From how many replicas: [`Level::ordered`] if the command's outcome depends on what is found.
        level: Level,
        /// When it ends at the latest: a command is several operations, which share its time.
        deadline: Millis,
    },
    /// What a command changed is written. Ends as [`Outcome::Committed`].
    Commit {
        /// The keys and what they hold now.
        changes: Vec<Changed>,
        /// On how many replicas.
        level: Level,
        /// What such a command wrote is acknowledged in the shard epoch in which it ran, or not at all: in a later one
        /// another orderer may not have seen it.
        ordered: bool,
        /// When it ends at the latest.
        deadline: Millis,
    },
    /// A request goes to the orderer of its shard. Ends as [`Outcome::Ordered`].
    Forward {
        /// Hash of its first key.
        hash: KeyHash,
        /// What to run there.
        request: &'a [u8],
        /// The orderer.
        to: NodeNo,
        /// When it ends at the latest. The orderer is told how much is left.
        deadline: Millis,
    },
}

/// Bounds of a core's machines.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Of its operations.
    pub coordinator: coordinator::Limits,
    /// Of its hints.
    pub hints: hints::Limits,
    /// Of filling.
    pub fill: fill::Limits,
    /// Of repair.
    pub repair: repair::Limits,
    /// Of purging.
    pub purge: purge::Limits,
    /// Of what is sent of a shard at a time.
    pub pages: Pages,
}

/// Counters of a core's machines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardStats {
    /// Of its operations.
    pub coordinator: CoordinatorStats,
    /// Of its replicas.
    pub replica: ReplicaStats,
    /// Of its hints.
    pub hints: HintStats,
    /// Of the shards that are filled.
    pub fill: FillStats,
    /// Of repair.
    pub repair: RepairStats,
    /// Of purging.
    pub purge: PurgeStats,
}

/// The machines of one core.
#[derive(Debug)]
pub struct Shards {
    view: View,
    coordinator: Coordinator,
    hints: Hints,
    fill: Fill,
    repair: Repair,
    purge: Purge,
    replica: ReplicaStats,
    orders: Vec<OrderRequest>,
    planted: Planted,
    pages: Pages,
}

/// Splits the hub into a machine and what it is lent.
macro_rules! lend {
    ($self:ident, $now:expr, $store:expr, $out:expr) => {
        Context {
            now: $now,
            store: $store,
            view: &$self.view,
            hints: &mut $self.hints,
            planted: $self.planted,
            pages: $self.pages,
            out: $out,
        }
    };
}

/// The bits of an operation number that say whose it is; none of them are the coordinator's.
pub(crate) const MACHINES: u64 = 0xf << 60;

/// How far versions of a node whose clock is right may be ahead of it. What is less passes before anybody looks again; going back
/// has its price, for writes made from then on are older than what was written ahead of time.
const AHEAD_MS: Millis = 3000;

/// Requests of peers to this core as an orderer that wait for the driver, at most.
const MAX_ORDERS: usize = 4096;

impl Shards {
    /// The machines of a core that owns these shards. Until [`Shards::on_map`] brings a map that names this node, client
    /// operations fail with [`Failure::NotAdmitted`].
    pub fn new(owned: Range<u16>, map: Arc<Map>, limits: Limits, planted: Planted) -> Shards {
        Shards {
            view: View { me: NodeNo(0), map, alive: BTreeSet::new(), owned, isolated: false, quarantined: false },
            coordinator: Coordinator::new(limits.coordinator),
            hints: Hints::new(limits.hints),
            fill: Fill::new(limits.fill),
            repair: Repair::new(limits.repair),
            purge: Purge::new(limits.purge),
            replica: ReplicaStats::default(),
            orders: Vec::new(),
            planted,
            pages: limits.pages,
        }
    }

    /// What this core knows of the cluster.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Counters.
    pub fn stats(&self) -> ShardStats {
        ShardStats {
            coordinator: self.coordinator.stats(),
            replica: self.replica,
            hints: self.hints.stats(),
            fill: self.fill.stats(),
            repair: self.repair.stats(),
            purge: self.purge.stats(),
        }
    }

    /// Begins to compare the copies of all shards of this core, or of one, with all their other copies, and to exchange what
    /// differs. `false`: such a sweep is under way. [`Shards::sweep`] tells how far it is.
    pub fn repair_now(&mut self, now: Now, store: &mut Store, only: Option<ShardId>, out: &mut Outbox) -> bool {
        let cx = &mut lend!(self, now, store, out);
        self.repair.begin_now(cx, only)
    }

    /// How far the comparison of [`Shards::repair_now`] is, or how the last one ended.
    pub fn sweep(&self) -> SweepStats {
        self.repair.sweep()
    }

    /// Shards of this core that are complete while the map still calls this node filling, each with its epoch: what
    /// [`Outbox::take_filled`] told once.
    pub fn filled(&self) -> impl Iterator<Item = (ShardId, u64)> + '_ {
        self.fill.filled()
    }

    /// Begins an operation. It ends under its `token` in [`Outbox::take_done`], perhaps at once.
    pub fn begin(&mut self, now: Now, store: &mut Store, token: u64, operation: Operation<'_>, out: &mut Outbox) {
        if let Operation::Commit { changes, ordered: true, .. } = &operation
            && let Some(Changed { hash, .. }) = changes.first()
            && self.orderer(*hash) != Ok(self.view.me)
        {
            // The map has changed while its keys were read. Nothing was written.
            return out.fail(token, Failure::NoOrderer { shard: self.view.shard(*hash).0 });
        }
        let cx = &mut lend!(self, now, store, out);
        match operation {
            Operation::Write { key, value, expires_at, level } => {
                self.coordinator.write(cx, token, key, value, expires_at, level);
            }
            Operation::Read { key: (hash, key), level } => self.coordinator.read(cx, token, hash, key, level),
            Operation::Delete { key: (hash, key), level } => self.coordinator.delete(cx, token, hash, key, level),
            Operation::Prepare { keys, payload, level, deadline } => {
                self.coordinator.prepare(cx, token, keys, payload, level, deadline);
            }
            Operation::Commit { changes, level, ordered, deadline } => {
                self.coordinator.commit(cx, token, changes, level, ordered, deadline);
            }
            Operation::Forward { hash, request, to, deadline } => {
                self.coordinator.forward(cx, token, hash, request, to, deadline);
            }
        }
    }

    /// Who orders the commands of this hash's shard.
    ///
    /// # Errors
    /// [`Failure::NoOrderer`] when it cannot be reached, is being filled, or is this node and its clock is wrong.
    pub fn orderer(&self, hash: KeyHash) -> Result<NodeNo, Failure> {
        let shard = self.view.shard(hash).0;
        let orderer = self.view.placement_of(hash).orderer();
        let can = |no: NodeNo| if no == self.view.me { !self.view.quarantined } else { self.view.is_alive(no) };
        orderer.filter(|&no| can(no)).ok_or(Failure::NoOrderer { shard })
    }

    /// Replaces what was found by what this core's store has meanwhile, where that is newer: an ordered command sees all that
    /// ran before it.
    pub fn freshest(&self, now: Now, store: &mut Store, found: &mut [Found]) {
        for Found { hash, key, value, newest, .. } in found {
            let Some(entry) = store.raw(*hash, key).filter(|entry| entry.version > *newest) else { continue };
            *newest = entry.version;
            let live = !entry.tombstone && (entry.expires_at == 0 || entry.expires_at > now.wall);
            let Entry { value: bytes, version, expires_at, .. } = entry;
            *value = live.then(|| Value { bytes: bytes.to_vec(), version, expires_at });
        }
    }

    /// Requests that peers want this core to run as an orderer; each must be answered with [`Shards::answer_order`].
    pub fn take_orders(&mut self) -> Vec<OrderRequest> {
        std::mem::take(&mut self.orders)
    }

    /// Answers a request of [`Shards::take_orders`]; `Err` when it was not run at all.
    pub fn answer_order(&mut self, from: NodeNo, ask: Ask, answer: Result<&[u8], Why>, out: &mut Outbox) {
        let message = match answer {
            Ok(bytes) => Message::Ordered(ask, bytes),
            Err(why) => Message::Refused(ask, why),
        };
        out.send(&[from], crate::outbox::Class::Answer, &message);
    }

    /// A message came from a peer.
    pub fn on_message(&mut self, now: Now, store: &mut Store, from: NodeNo, message: &Message<'_>, out: &mut Outbox) {
        let cx = &mut lend!(self, now, store, out);
        if replica::serve(cx, &mut self.replica, &mut self.purge.fences, from, message) {
            return;
        }
        let ask = message.ask();
        if ask.shard.index() >= cx.view.map.placements.len() {
            return;
        }
        match *message {
            _ if ask.op & MACHINES == FILL => self.fill.on_answer(cx, from, message),
            _ if ask.op & MACHINES == PURGE => self.purge.on_answer(cx, from, message),
            _ if ask.op & MACHINES == REPAIR => self.repair.on_answer(cx, from, message),
            Message::Wrote(ask) if ask.op & HINT != 0 => cx.hints.on_answer(from, ask.op, true),
            Message::Wrote(ask) => self.coordinator.on_wrote(cx, from, ask),
            Message::Found(ask, found, whole) => self.coordinator.on_found(cx, from, ask, found, whole),
            Message::Ordered(ask, answer) => self.coordinator.on_ordered(cx, from, ask, answer),
            // A hint that met another epoch or a full replica waits for the next look.
            Message::Refused(ask, Why::Stale | Why::Behind | Why::Full | Why::Busy) if ask.op & HINT != 0 => {}
            Message::Refused(ask, _) if ask.op & HINT != 0 => cx.hints.on_answer(from, ask.op, false),
            Message::Refused(ask, why) => self.coordinator.on_refused(cx, from, ask, why),
            Message::Order(ask, hash, request) => {
                let why = match () {
                    _ if !cx.view.owned.contains(&ask.shard.0) => Some(Why::NotHere),
                    _ if cx.view.shard(hash) != ask.shard => Some(Why::Broken),
                    _ if cx.view.placement_of(hash).epoch > ask.epoch => Some(Why::Stale),
                    _ if cx.view.placement_of(hash).epoch < ask.epoch => Some(Why::Behind),
                    _ if cx.view.placement_of(hash).orderer() != Some(cx.view.me) => Some(Why::NotHere),
                    // Another one takes over.
                    _ if cx.view.quarantined => Some(Why::NotHere),
                    _ if self.orders.len() >= MAX_ORDERS => Some(Why::Busy),
                    _ => None,
                };
                match why {
                    None => self.orders.push(OrderRequest { from, ask, hash, request: request.to_vec() }),
                    Some(why) => {
                        let epoch = cx.view.map.placement(ask.shard).epoch;
                        self.answer_order(from, Ask { epoch, ..ask }, Err(why), out);
                    }
                }
            }
            _ => {}
        }
    }

    /// This core adopts a map. `me` is this node's present life.
    pub fn on_map(&mut self, now: Now, store: &mut Store, map: Arc<Map>, me: NodeNo, out: &mut Outbox) {
        if map.epoch <= self.view.map.epoch && self.view.me == me {
            return;
        }
        self.view.map = map;
        self.view.me = me;
        store.set_node(me.0);
        let cx = &mut lend!(self, now, store, out);
        // What a copy gives up goes before an operation that begins anew meets it.
        self.fill.on_map(cx);
        self.coordinator.on_map(cx);
        self.repair.on_map(cx);
        self.purge.on_change(cx);
    }

    /// Whether this node has to think that it is cut off. Then it answers no read alone and begins no write that one copy is
    /// enough for: others may have gone on without it.
    pub fn set_isolated(&mut self, isolated: bool) {
        self.view.isolated = isolated;
    }

    /// Whether this node's clock is wrong, and by how much it is behind the others. Then it makes no versions: what clients write
    /// through it fails, and it orders nothing. It reads, stores what others write, be it ahead of its clock by so much, and
    /// forwards commands to their orderers.
    ///
    /// That its clock is right has to be said again every few seconds. The wall clock may have been far ahead for a moment, and back
    /// before anybody looked: then versions from here follow what it said, and are refused until that time has come.
    pub fn set_quarantined(&mut self, now: Now, store: &mut Store, quarantined: bool, behind_ms: Millis) {
        let mended = self.view.quarantined && !quarantined;
        self.view.quarantined = quarantined;
        store.set_behind(if quarantined { behind_ms } else { 0 });
        let ahead = store.mint(now.wall).hlc.millis().saturating_sub(now.wall);
        if mended || !quarantined && ahead > AHEAD_MS {
            store.settle_clock(now.wall);
        }
    }

    /// Who can be reached has changed.
    pub fn on_alive(&mut self, now: Now, store: &mut Store, alive: BTreeSet<NodeNo>, out: &mut Outbox) {
        let away: Vec<NodeNo> = self.view.alive.difference(&alive).copied().collect();
        let back: Vec<NodeNo> = alive.difference(&self.view.alive).copied().collect();
        self.view.alive = alive;
        let cx = &mut lend!(self, now, store, out);
        for node in away {
            self.coordinator.on_away(cx, node);
        }
        self.fill.on_alive(cx);
        self.repair.on_alive(cx, &back);
        self.purge.on_change(cx);
        cx.hints.wake();
        cx.deliver_hints();
    }

    /// Whether this core is on its way through a shard, a slice per call of [`Shards::on_deadline`], or fills one, a few
    /// milliseconds' worth per call: these should come every few milliseconds then.
    pub fn is_walking(&self) -> bool {
        self.purge.fences.next_deadline().is_some() || self.fill.is_asking()
    }

    /// When to call [`Shards::on_deadline`], if nothing else happens.
    pub fn next_deadline(&self, now: Now) -> Option<Millis> {
        let machines = [
            self.coordinator.next_deadline(),
            self.hints.next_deadline(),
            self.fill.next_deadline(now.mono),
            self.repair.next_deadline(),
            self.purge.next_deadline(),
        ];
        machines.into_iter().flatten().min()
    }

    /// Time has passed.
    pub fn on_deadline(&mut self, now: Now, store: &mut Store, out: &mut Outbox) {
        let cx = &mut lend!(self, now, store, out);
        self.coordinator.on_deadline(cx);
        self.fill.on_deadline(cx);
        self.repair.on_deadline(cx);
        self.purge.found_uneven(self.repair.take_uneven());
        self.purge.on_deadline(cx);
        cx.deliver_hints();
    }

    /// Whether everything that is counted is there, and everything bounded within its bounds.
    pub fn invariants(&self) {
        self.coordinator.invariants();
        self.hints.invariants();
        self.fill.invariants();
        self.repair.invariants();
        self.purge.invariants();
        assert!(self.orders.len() <= MAX_ORDERS, "orders are bounded");
    }
}

impl Outbox {
    /// Ends an operation before it began.
    pub fn fail(&mut self, token: u64, failure: Failure) {
        self.done(token, Outcome::Failed(failure));
    }
}
