//! Writes kept for replicas that are away.
//!
//! A hint is what a replica missed while it could not be reached; it is delivered when the replica is back, so that
//! repair has less to find. It counts toward no quorum and acknowledges nothing, and losing it loses nothing: repair finds
//! the difference. So hints are bounded in bytes and in age, in memory only, and dropped without mercy.
//!
//! They are addressed to a *life*: a node that comes back without its memory has another number and is filled, not hinted.

use std::collections::{BTreeMap, BTreeSet};

use gridkv_engine::Millis;
use gridkv_engine::hash::{KeyHash, ShardId};
use gridkv_engine::hlc::Version;
use gridkv_engine::record::Entry;

use crate::ids::{NodeNo, Now};
use crate::outbox::Class;
use crate::shards::Context;
use crate::wire::{Ask, Message, Stored};

/// Bounds of the hints of one core.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of all hints, at most.
    pub bytes: usize,
    /// Hints older than this are dropped.
    pub age_ms: Millis,
    /// Hints that are on their way to one replica at once.
    pub under_way: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { bytes: 16 << 20, age_ms: 600_000, under_way: 256 }
    }
}

/// What a hint costs besides key and value.
const OVERHEAD: usize = 96;

#[derive(Debug)]
struct Hint {
    shard: ShardId,
    value: Vec<u8>,
    version: Version,
    expires_at: Millis,
    tombstone: bool,
    kept_at: Millis,
    /// Its number on its way; 0 while it waits.
    op: u64,
}

impl Hint {
    fn cost(&self, key: &[u8]) -> usize {
        key.len() + self.value.len() + OVERHEAD
    }
}

/// Counters of hints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HintStats {
    /// Kept.
    pub kept: u64,
    /// Delivered.
    pub delivered: u64,
    /// Dropped: too old, no room, or the replica's life is over.
    pub dropped: u64,
    /// Waiting now.
    pub waiting: u64,
}

/// By hash, then by key: hashes may collide.
type Queue = BTreeMap<(KeyHash, Box<[u8]>), Hint>;

/// The hints of one core.
#[derive(Debug)]
pub(crate) struct Hints {
    limits: Limits,
    queues: BTreeMap<NodeNo, Queue>,
    /// Shards of which a hint was dropped: repair looks at them first.
    dirty: BTreeSet<(ShardId, NodeNo)>,
    bytes: usize,
    next_op: u64,
    resend_at: Millis,
    look_at: Millis,
    stats: HintStats,
}

/// Marks the operation numbers of hints, which no coordinator gives.
pub(crate) const HINT: u64 = 1 << 63;
/// How long a hint may be on its way before it is sent again.
const RESEND_MS: Millis = 1000;

impl Hints {
    pub(crate) fn new(limits: Limits) -> Hints {
        Hints {
            limits,
            queues: BTreeMap::new(),
            dirty: BTreeSet::new(),
            bytes: 0,
            next_op: 0,
            resend_at: 0,
            look_at: 0,
            stats: HintStats::default(),
        }
    }

    pub(crate) fn stats(&self) -> HintStats {
        HintStats { waiting: self.queues.values().map(|queue| queue.len() as u64).sum(), ..self.stats }
    }

    /// Shards that repair should look at, with the replica that missed something.
    pub(crate) fn take_dirty(&mut self) -> BTreeSet<(ShardId, NodeNo)> {
        std::mem::take(&mut self.dirty)
    }

    /// Keeps an entry for a replica, unless a newer one is kept already.
    pub(crate) fn keep(&mut self, now: Now, node: NodeNo, shard: ShardId, stored: &Stored<'_>) {
        let Entry { key, value, version, expires_at, tombstone } = stored.entry;
        let queue = self.queues.entry(node).or_default();
        let place = (stored.hash, Box::from(key));
        if queue.get(&place).is_some_and(|known| known.version >= version) {
            return;
        }
        if let Some(old) = queue.remove(&place) {
            self.bytes -= old.cost(key);
        }
        let hint = Hint { shard, value: value.to_vec(), version, expires_at, tombstone, kept_at: now.mono, op: 0 };
        let cost = hint.cost(key);
        if self.bytes + cost > self.limits.bytes {
            // No room: repair will find it.
            self.stats.dropped += 1;
            self.dirty.insert((shard, node));
            return;
        }
        self.bytes += cost;
        self.stats.kept += 1;
        self.look_at = self.look_at.min(now.mono + TICK_MS);
        queue.insert(place, hint);
    }

    /// Somebody is back: the next delivery looks at once.
    pub(crate) fn wake(&mut self) {
        self.look_at = 0;
    }

    /// Sends what waits for replicas that are there, each time that a look is due: all hints are gone through for that.
    pub(crate) fn deliver(&mut self, cx: &mut Deliver<'_, '_>) {
        let now = cx.now.mono;
        if self.look_at > now {
            return;
        }
        self.forget(cx);
        if self.resend_at <= now {
            self.resend_at = now + RESEND_MS;
            self.queues.values_mut().flat_map(BTreeMap::values_mut).for_each(|hint| hint.op = 0);
        }
        // Who comes back is not waited for here; but what waits grows old.
        self.look_at = now + AWAY_MS;
        for (&node, queue) in &mut self.queues {
            if !cx.view.is_alive(node) {
                continue;
            }
            self.look_at = now + TICK_MS;
            let under_way = queue.values().filter(|hint| hint.op != 0).count();
            let room = self.limits.under_way.saturating_sub(under_way);
            // One that is being filled gets all this from its sources, and does not know yet what is too old for it.
            let waits = |hint: &Hint| hint.op == 0 && !cx.view.map.placement(hint.shard).is_filling(node);
            for ((hash, key), hint) in queue.iter_mut().filter(|(_, hint)| waits(hint)).take(room) {
                self.next_op += 1;
                hint.op = HINT | self.next_op;
                let epoch = cx.view.map.placement(hint.shard).epoch;
                let ask = Ask { op: hint.op, shard: hint.shard, epoch, left_ms: 0 };
                let Hint { version, expires_at, tombstone, .. } = *hint;
                let entry = Entry { key, value: &hint.value, version, expires_at, tombstone };
                cx.out.send(&[node], Class::Background, &Message::Write(ask, Stored { hash: *hash, entry }));
            }
        }
    }

    /// A replica has what was kept for it, or will never take it.
    pub(crate) fn on_answer(&mut self, from: NodeNo, op: u64, delivered: bool) {
        let Some(queue) = self.queues.get_mut(&from) else { return };
        let Some(place) = queue.iter().find(|(_, hint)| hint.op == op).map(|(place, _)| place.clone()) else { return };
        let hint = queue.remove(&place).expect("found just now");
        self.bytes -= hint.cost(&place.1);
        if delivered {
            self.stats.delivered += 1;
        } else {
            self.stats.dropped += 1;
            self.dirty.insert((hint.shard, from));
        }
    }

    /// Drops what is too old, and what is for a life that holds the shard no more.
    fn forget(&mut self, cx: &Deliver<'_, '_>) {
        let (oldest, stats, bytes, dirty) =
            (cx.now.mono.saturating_sub(self.limits.age_ms), &mut self.stats, &mut self.bytes, &mut self.dirty);
        for (&node, queue) in &mut self.queues {
            queue.retain(|(_, key), hint| {
                let named = cx.view.map.placement(hint.shard).names(node);
                let keep = named && hint.kept_at >= oldest;
                if !keep {
                    *bytes -= hint.cost(key);
                    stats.dropped += 1;
                    if named {
                        dirty.insert((hint.shard, node));
                    }
                }
                keep
            });
        }
        self.queues.retain(|_, queue| !queue.is_empty());
    }

    /// When to look again.
    pub(crate) fn next_deadline(&self) -> Option<Millis> {
        (!self.queues.is_empty()).then_some(self.look_at)
    }

    pub(crate) fn invariants(&self) {
        let cost = |queue: &Queue| queue.iter().map(|((_, key), hint)| hint.cost(key)).sum::<usize>();
        assert_eq!(self.queues.values().map(cost).sum::<usize>(), self.bytes);
        assert!(self.bytes <= self.limits.bytes, "hints are bounded");
    }
}

/// How often waiting hints are looked at, for a replica that is there.
const TICK_MS: Millis = 100;
/// And for those that are away.
const AWAY_MS: Millis = 1000;

/// What delivering needs: a [`Context`] without the hints themselves.
pub(crate) struct Deliver<'a, 'b> {
    pub(crate) now: Now,
    pub(crate) view: &'a crate::shards::View,
    pub(crate) out: &'b mut crate::outbox::Outbox,
}

impl<'a> Context<'a> {
    /// Delivers the hints of this context.
    pub(crate) fn deliver_hints(&mut self) {
        let mut cx = Deliver { now: self.now, view: self.view, out: self.out };
        self.hints.deliver(&mut cx);
    }
}
