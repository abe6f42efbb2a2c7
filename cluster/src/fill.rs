//! How a replica that holds nothing, or not all, comes to hold everything.
//!
//! A filling replica takes part in writes and counts for none. It asks as many serving replicas of the old set as every
//! acknowledged write is bound to have met ([`crate::quorum::Quorums::sources`]) for all they have, **in the present epoch of
//! the shard**: a source that answers in an epoch has adopted it, and will send on what is written in it. The first streams;
//! from the others comes what differs. Then the replica holds every write that was acknowledged, and reports it.
//!
//! ```text
//!   named as filling ─▶ source 1: Digest, Stream ... ─▶ source 2: Digest, List, Fetch ─▶ ... ─▶ filled(shard, epoch)
//!          ▲                     │ new epoch                       │
//!          └─────────────────────┴───── keep the data, ask anew ───┘
//! ```
//!
//! **Nothing is cleared that counts.** What is dropped: a shard that the map at rest gives to others, for nobody reads it
//! here; and what is left of an earlier membership when a new one begins, because it may have been deleted meanwhile and the
//! tombstone purged. Within a membership data stays from epoch to epoch.
//!
//! With it comes the floor of its sources: what they refuse is refused here too. Their floors may differ. A source with a higher one
//! than those before it makes this replica shed what is not above, in slices; then the others are asked once more, for one that
//! serves may hold a write there that the first does not. It is not complete before that is through. When the map makes it serve all
//! the same, because a loss was accepted, the rest goes in that step, however much it is: no read meets it.
//!
//! Bounds: shards at once, bytes per second, one question each. The rate gives way to clients' operations: it falls while
//! answers are slow (`sync::bucket`). When too few sources can be reached it waits; when memory is
//! full it waits, and asks again.

use std::collections::BTreeMap;

use gridkv_engine::Millis;
use gridkv_engine::hash::{KeyHash, ShardId};

use crate::ids::NodeNo;
use crate::map::Stage;
use crate::planted::Bug;
use crate::shards::Context;
use crate::sync::{Bucket, Kind, Progress, Session, Shared, SyncStats};
use crate::wire::Message;

/// Marks the operation numbers of filling.
pub(crate) const FILL: u64 = 1 << 62;

/// Bounds of filling on one core.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Shards that are filled at once.
    pub streams: usize,
    /// Bytes per second that they take together, at most: less while answers are slow.
    pub bytes_per_second: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { streams: 4, bytes_per_second: 100 << 20 }
    }
}

/// How long a shard waits after a source has failed.
const RETRY_MS: Millis = 200;
/// Entries whose memory is given back at once.
const FREED_AT_ONCE: usize = 2048;

/// Counters of filling.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FillStats {
    /// Of its conversations.
    pub sync: SyncStats,
    /// Shards that are not complete now.
    pub filling: u64,
    /// Of these, shards of which fewer sources can be reached than are needed.
    pub blocked: u64,
    /// Times that a shard became complete.
    pub filled: u64,
    /// Shards that were freed because others hold them.
    pub dropped: u64,
    /// Bytes per second that it may move now.
    pub rate: u64,
}

/// A shard that lacks something.
#[derive(Debug)]
struct Filling {
    epoch: u64,
    /// Sources from which everything is here.
    done: Vec<NodeNo>,
    session: Option<Session>,
    /// Where the stream goes on; `None` when most is here.
    stream: Option<KeyHash>,
    failures: usize,
    wait: Millis,
    blocked: bool,
    filled: bool,
}

/// The shards of one core that are filled.
#[derive(Debug)]
pub(crate) struct Fill {
    limits: Limits,
    shards: BTreeMap<ShardId, Filling>,
    bucket: Bucket,
    begun: u64,
    /// Memory of dropped shards is still to be given back.
    freeing: bool,
    stats: FillStats,
}

impl Fill {
    pub(crate) fn new(limits: Limits) -> Fill {
        Fill {
            limits,
            shards: BTreeMap::new(),
            bucket: Bucket::yielding(limits.bytes_per_second),
            begun: 0,
            freeing: false,
            stats: FillStats::default(),
        }
    }

    pub(crate) fn stats(&self) -> FillStats {
        let open = || self.shards.values().filter(|filling| !filling.filled);
        let blocked = open().filter(|filling| filling.blocked).count() as u64;
        FillStats { filling: open().count() as u64, blocked, rate: self.bucket.rate(), ..self.stats }
    }

    /// Shards that are complete and that the map still calls filling, each with its epoch.
    pub(crate) fn filled(&self) -> impl Iterator<Item = (ShardId, u64)> + '_ {
        self.shards.iter().filter(|(_, filling)| filling.filled).map(|(shard, filling)| (*shard, filling.epoch))
    }

    /// The map changed: begin, begin anew, end, or free.
    pub(crate) fn on_map(&mut self, cx: &mut Context<'_>) {
        let me = cx.view.me;
        for shard in cx.view.owned.clone().map(ShardId) {
            let placement = cx.view.map.placement(shard);
            let holds = cx.store.digest(shard).count > 0 || cx.store.tombstone_floor(shard) > Default::default();
            if placement.is_filling(me) {
                let known = self.shards.get_mut(&shard);
                let first = cx.view.keyspace().first_hash(shard);
                let filling = match known {
                    Some(known) if known.epoch == placement.epoch => continue,
                    // It may have been out of the set in between: its sources' floor will tell.
                    Some(known) => Filling { stream: known.stream, ..Filling::new(placement.epoch) },
                    None => {
                        if holds {
                            self.drop_shard(cx, shard);
                        }
                        Filling { stream: Some(first), ..Filling::new(placement.epoch) }
                    }
                };
                self.shards.insert(shard, filling);
            } else {
                self.shards.remove(&shard);
                if !placement.names(me) && placement.stage == Stage::Normal && holds {
                    self.drop_shard(cx, shard);
                } else if placement.names(me) {
                    // It serves from now on, shed or not: a loss was accepted.
                    while cx.store.shed(shard, cx.pages.entries).is_ok_and(|shed| shed.more) {}
                }
            }
        }
        self.schedule(cx);
    }

    fn drop_shard(&mut self, cx: &mut Context<'_>, shard: ShardId) {
        self.stats.dropped += 1;
        self.freeing |= cx.store.drop_shard(shard, FREED_AT_ONCE).unwrap_or(true);
    }

    /// Begins with as many shards as may be filled at once.
    pub(crate) fn schedule(&mut self, cx: &mut Context<'_>) {
        let mut room = self.limits.streams.saturating_sub(self.shards.values().filter(|f| f.session.is_some()).count());
        let mut begun = Vec::new();
        for (&shard, filling) in self.shards.iter_mut().filter(|(_, f)| !f.filled && f.session.is_none()) {
            let placement = cx.view.map.placement(shard);
            let usable = |node: NodeNo| node != cx.view.me && cx.view.is_alive(node) && !filling.done.contains(&node);
            let serving = placement.replicas.iter().filter(|replica| !replica.filling).map(|replica| replica.node);
            let sources: Vec<NodeNo> = serving.filter(|&node| usable(node)).collect();
            let need = cx.view.map.quorums.sources(placement.replicas.len());
            filling.blocked = filling.done.len() + sources.len() < need;
            if sources.is_empty() || room == 0 || filling.wait > cx.now.mono {
                continue;
            }
            room -= 1;
            // Shards begin with different sources, and go on with another one when one fails.
            let source = sources[(shard.index() + filling.failures) % sources.len()];
            self.begun += 1;
            self.stats.sync.begun += 1;
            let number = Session::number(FILL, self.begun);
            let mut session = Session::new(Kind::Fill, shard, filling.epoch, source, number);
            session.stream = filling.stream;
            filling.session = Some(session);
            begun.push(shard);
        }
        for shard in begun {
            self.with(cx, shard, |session, cx, shared| Some(session.go(cx, shared)));
        }
    }

    /// Lets a conversation do something, and looks what came of it.
    fn with(
        &mut self,
        cx: &mut Context<'_>,
        shard: ShardId,
        act: impl FnOnce(&mut Session, &mut Context<'_>, &mut Shared<'_>) -> Option<Progress>,
    ) {
        let Some(filling) = self.shards.get_mut(&shard) else { return };
        let Some(session) = &mut filling.session else { return };
        let mut shared = Shared { bucket: &mut self.bucket, stats: &mut self.stats.sync };
        let Some(progress) = act(session, cx, &mut shared) else { return };
        let source = session.peer;
        filling.stream = session.stream;
        if std::mem::take(&mut session.shed) {
            // Ends, for it happens only when this copy's floor rises to a source's.
            filling.done.clear();
        }
        match progress {
            Progress::Going => return,
            Progress::Failed | Progress::Differs => {
                filling.failures += 1;
                filling.wait = cx.now.mono + RETRY_MS;
            }
            Progress::Done => {
                filling.done.push(source);
                let placement = cx.view.map.placement(shard);
                let need = match cx.planted.has(Bug::OneSource) {
                    true => 1,
                    false => cx.view.map.quorums.sources(placement.replicas.len()),
                };
                if filling.done.len() >= need {
                    filling.filled = true;
                    self.stats.filled += 1;
                    cx.out.filled(shard, filling.epoch);
                }
            }
        }
        filling.session = None;
    }

    /// An answer to a question of a fill.
    pub(crate) fn on_answer(&mut self, cx: &mut Context<'_>, from: NodeNo, message: &Message<'_>) {
        let shard = message.ask().shard;
        self.with(cx, shard, |session, cx, shared| session.on_answer(cx, shared, from, message));
        if self.shards.get(&shard).is_some_and(|filling| filling.session.is_none()) {
            self.schedule(cx);
        }
    }

    /// Who can be reached has changed.
    pub(crate) fn on_alive(&mut self, cx: &mut Context<'_>) {
        for filling in self.shards.values_mut() {
            if filling.session.as_ref().is_some_and(|session| !cx.view.is_alive(session.peer)) {
                filling.session = None;
                filling.failures += 1;
            }
        }
        self.schedule(cx);
    }

    /// Whether a source is asked, or about to be.
    pub(crate) fn is_asking(&self) -> bool {
        self.shards.values().any(|filling| filling.session.is_some())
    }

    /// When to look again.
    pub(crate) fn next_deadline(&self, now: Millis) -> Option<Millis> {
        let room = self.shards.values().filter(|filling| filling.session.is_some()).count() < self.limits.streams;
        let of = |filling: &Filling| match &filling.session {
            Some(session) => Some(session.next_deadline()),
            None if filling.filled || filling.blocked && filling.wait <= now => None,
            None => room.then_some(filling.wait),
        };
        let free = self.freeing.then_some(now);
        self.shards.values().filter_map(of).chain(free).min()
    }

    /// Time has passed.
    pub(crate) fn on_deadline(&mut self, cx: &mut Context<'_>) {
        if self.freeing {
            self.freeing = cx.store.reclaim(FREED_AT_ONCE);
        }
        let late = |filling: &Filling| filling.session.as_ref().is_some_and(|s| s.next_deadline() <= cx.now.mono);
        let shards: Vec<ShardId> = self.shards.iter().filter(|(_, f)| late(f)).map(|(shard, _)| *shard).collect();
        for shard in shards {
            self.with(cx, shard, |session, cx, shared| Some(session.on_deadline(cx, shared)));
        }
        self.schedule(cx);
    }

    /// Whether what is bounded is within its bounds.
    pub(crate) fn invariants(&self) {
        let sessions = || self.shards.values().flat_map(|filling| &filling.session);
        assert!(sessions().count() <= self.limits.streams, "streams are bounded");
        sessions().for_each(Session::invariants);
        self.bucket.invariants();
        assert!(self.shards.values().all(|f| !f.filled || f.session.is_none()), "a filled shard asks nobody");
    }
}

impl Filling {
    fn new(epoch: u64) -> Filling {
        Filling {
            epoch,
            done: Vec::new(),
            session: None,
            stream: None,
            failures: 0,
            wait: 0,
            blocked: false,
            filled: false,
        }
    }
}
