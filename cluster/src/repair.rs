//! Anti-entropy: copies that differ become equal, whoever missed what.
//!
//! Each pair of serving replicas of a shard compares digests, in turn, once per cycle; the orderer of the shard asks, or, where it
//! is not one of the two, the one with the lower number.
//! Pairs of which something is known to be missing come first: a hint was dropped, a replica was away, the last look found
//! a difference. A digest that differs is looked at again two seconds later, for writes may be on their way; if it still
//! differs, both sides exchange what is newer ([`crate::sync`]), and look again until they are equal.
//!
//! What it promises: two serving replicas that can reach each other hold the same a cycle and a few seconds after the last
//! write. It merges, within the floor, and clears nothing.
//!
//! A round of purging that raised the floor and broke off may leave something below it on some copies that the others lack, and
//! refuse. The orderer, which compares its copy with each of the others, says so to [`crate::purge`]: the next round brings it to all.
//!
//! **On demand** ([`crate::shards::Shards::repair_now`]) it compares every pair of this node's shards, or of one of them, with
//! every other serving copy, whichever number is lower, and again until both are equal or a few tries were in vain; a shard
//! that differed has a second turn, since what came from one copy the others may lack. Each pair ends: a copy that is away,
//! is being filled, or does not answer is counted as not compared. One such sweep at a time; it shares the bounds below
//! with what goes on anyway.
//!
//! Bounds: conversations at once, bytes per second, a page of hashes and a window of writes each. When nothing differs, a
//! pair costs 264 bytes per cycle.

use std::collections::{BTreeMap, BTreeSet};

use gridkv_engine::Millis;
use gridkv_engine::hash::ShardId;

use crate::ids::NodeNo;
use crate::map::Placement;
use crate::purge::is_orderer;
use crate::shards::Context;
use crate::sync::{Bucket, Kind, Progress, Session, Shared, SyncStats};
use crate::wire::Message;

/// Marks the operation numbers of repair.
pub(crate) const REPAIR: u64 = 1 << 61;

/// Bounds of repair on one core.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// In that time every pair is looked at.
    pub cycle_ms: Millis,
    /// Pairs that are looked at together.
    pub at_once: usize,
    /// Bytes per second that it moves.
    pub bytes_per_second: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { cycle_ms: 60_000, at_once: 4, bytes_per_second: 20 << 20 }
    }
}

/// When a difference is looked at again.
const RECHECK_MS: Millis = 2000;
/// How often a pair is looked at out of turn before it waits for its turn again.
const RECHECKS: u32 = 6;
/// How often a pair of a sweep is looked at that differs or does not answer.
const SWEEP_TRIES: u32 = 3;
/// How often dropped hints are asked for.
const TICK_MS: Millis = 1000;

/// Counters of repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairStats {
    /// Of its conversations.
    pub sync: SyncStats,
    /// Cycles through all pairs.
    pub cycles: u64,
    /// Entries that differed.
    pub differences: u64,
    /// Pairs that wait to be looked at out of turn.
    pub dirty: u64,
}

/// Two copies: the shard and the other replica.
type Pair = (ShardId, NodeNo);

/// A pair that is looked at out of turn.
#[derive(Clone, Copy, Debug)]
struct Due {
    at: Millis,
    tries: u32,
}

#[derive(Debug)]
struct Active {
    session: Session,
    epoch: u64,
    tries: u32,
    /// It is of the sweep.
    swept: bool,
}

/// How far the comparison is that somebody asked for, or how it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepStats {
    /// It is not over.
    pub running: bool,
    /// The shard that was asked for; `None` for all.
    pub only: Option<u16>,
    /// Shards to compare: those of which this node has a copy.
    pub shards: u64,
    /// Of these, shards that are done.
    pub done: u64,
    /// Shards whose copies differed.
    pub differed: u64,
    /// Shards of which some copy was away, being filled, did not answer, or still differed at the end.
    pub incomplete: u64,
    /// Entries sent because they were newer here.
    pub sent: u64,
    /// Entries received that were newer there.
    pub received: u64,
    /// Bytes moved.
    pub bytes: u64,
}

/// A comparison that somebody asked for.
#[derive(Debug, Default)]
struct Sweep {
    stats: SweepStats,
    waiting: BTreeMap<Pair, Due>,
    /// Pairs of a shard that wait or talk, where there are any.
    open: BTreeMap<ShardId, usize>,
    /// Shards that are to begin: for the first time, or for the second since their copies differed.
    again: BTreeSet<ShardId>,
    /// Shards in their second turn.
    second: BTreeSet<ShardId>,
    differed: BTreeSet<ShardId>,
    incomplete: BTreeSet<ShardId>,
    /// When to look for the next pair that may begin.
    next: Option<Millis>,
}

impl Sweep {
    fn stats(&self) -> SweepStats {
        SweepStats {
            running: !self.open.is_empty() || !self.again.is_empty(),
            done: self.stats.shards - self.open.len() as u64 - self.again.len() as u64,
            differed: self.differed.len() as u64,
            incomplete: self.incomplete.len() as u64,
            ..self.stats
        }
    }

    /// A pair has come to its end.
    fn end(&mut self, pair: Pair, whole: bool) {
        if !whole {
            self.incomplete.insert(pair.0);
        }
        if let Some(open) = self.open.get_mut(&pair.0) {
            *open -= 1;
            if *open == 0 {
                self.open.remove(&pair.0);
                if self.differed.contains(&pair.0) && self.second.insert(pair.0) {
                    self.again.insert(pair.0);
                }
            }
        }
    }
}

/// The repair of one core's shards.
#[derive(Debug)]
pub(crate) struct Repair {
    limits: Limits,
    active: Vec<Active>,
    dirty: BTreeMap<Pair, Due>,
    /// The pair that was looked at last in its turn.
    turn: Pair,
    next_turn: Millis,
    tick: Millis,
    /// Pairs in a cycle.
    pairs: u64,
    /// Shards of which copies differ below their floors.
    uneven: BTreeSet<ShardId>,
    bucket: Bucket,
    begun: u64,
    sweep: Sweep,
    stats: RepairStats,
}

/// Which of two replicas compares in turn: the orderer of the shard, so that it hears of every difference.
fn asks(placement: &Placement, me: NodeNo, other: NodeNo) -> bool {
    is_orderer(me, placement) || !is_orderer(other, placement) && me < other
}

/// The replicas with which this node compares a shard in turn.
fn partners(cx: &Context<'_>, shard: ShardId) -> impl Iterator<Item = NodeNo> {
    let (me, view) = (cx.view.me, cx.view);
    let placement = view.map.placement(shard);
    let serves = placement.names(me) && !placement.is_filling(me);
    placement
        .written()
        .filter(move |&node| node != me && serves && !placement.is_filling(node) && view.is_alive(node))
        .filter(move |&node| asks(placement, me, node))
}

/// Whether this node and that one both serve the shard.
fn both_serve(cx: &Context<'_>, (shard, node): Pair) -> bool {
    let placement = cx.view.map.placement(shard);
    let serves = |node| placement.names(node) && !placement.is_filling(node);
    cx.view.owned.contains(&shard.0) && node != cx.view.me && serves(cx.view.me) && serves(node)
}

impl Repair {
    pub(crate) fn new(limits: Limits) -> Repair {
        Repair {
            limits,
            active: Vec::new(),
            dirty: BTreeMap::new(),
            turn: (ShardId(0), NodeNo(0)),
            next_turn: 0,
            tick: 0,
            pairs: 0,
            uneven: BTreeSet::new(),
            bucket: Bucket::new(limits.bytes_per_second),
            begun: 0,
            sweep: Sweep::default(),
            stats: RepairStats::default(),
        }
    }

    pub(crate) fn stats(&self) -> RepairStats {
        RepairStats { dirty: self.dirty.len() as u64, ..self.stats }
    }

    /// The map changed: conversations of an older epoch end.
    pub(crate) fn on_map(&mut self, cx: &mut Context<'_>) {
        let fits = |active: &Active| cx.view.map.placement(active.session.shard).epoch == active.epoch;
        for active in self.active.extract_if(.., |active| !fits(active)) {
            let pair = (active.session.shard, active.session.peer);
            let due = Due { at: cx.now.mono, tries: 0 };
            match active.swept {
                true => self.sweep.waiting.insert(pair, Due { tries: active.tries, ..due }),
                false => Some(*self.dirty.entry(pair).or_insert(due)),
            };
        }
        self.dirty.retain(|&pair, _| both_serve(cx, pair));
        self.count(cx);
        self.go_on(cx);
    }

    /// Who can be reached has changed: those that came back may have missed something.
    pub(crate) fn on_alive(&mut self, cx: &mut Context<'_>, back: &[NodeNo]) {
        for shard in cx.view.owned.clone().map(ShardId) {
            for node in partners(cx, shard).filter(|node| back.contains(node)) {
                self.dirty.insert((shard, node), Due { at: cx.now.mono, tries: 0 });
            }
        }
        for gone in self.active.extract_if(.., |active| !cx.view.is_alive(active.session.peer)) {
            let pair = (gone.session.shard, gone.session.peer);
            self.dirty.entry(pair).or_insert(Due { at: cx.now.mono, tries: 0 });
            if gone.swept {
                self.sweep.end(pair, false);
            }
        }
        self.count(cx);
        self.go_on(cx);
    }

    /// Begins to compare the copies of all shards, or of one, unless such a sweep is under way. Whether it began.
    pub(crate) fn begin_now(&mut self, cx: &mut Context<'_>, only: Option<ShardId>) -> bool {
        if self.sweep.stats().running {
            return false;
        }
        let mut sweep = Sweep::default();
        sweep.stats.only = only.map(|shard| shard.0);
        for shard in cx.view.owned.clone().map(ShardId).filter(|shard| only.is_none_or(|only| only == *shard)) {
            let placement = cx.view.map.placement(shard);
            if !placement.names(cx.view.me) {
                continue;
            }
            sweep.stats.shards += 1;
            sweep.again.insert(shard);
        }
        self.sweep = sweep;
        self.go_on(cx);
        true
    }

    /// How far the last sweep is.
    pub(crate) fn sweep(&self) -> SweepStats {
        self.sweep.stats()
    }

    /// Begins pairs of the sweep, as many as may talk at once.
    fn go_on(&mut self, cx: &mut Context<'_>) {
        for shard in std::mem::take(&mut self.sweep.again) {
            for node in cx.view.map.placement(shard).written().filter(|&node| node != cx.view.me) {
                if both_serve(cx, (shard, node)) && cx.view.is_alive(node) {
                    *self.sweep.open.entry(shard).or_default() += 1;
                    self.sweep.waiting.insert((shard, node), Due { at: cx.now.mono, tries: 0 });
                } else {
                    self.sweep.incomplete.insert(shard);
                }
            }
        }
        let gone: Vec<Pair> = self
            .sweep
            .waiting
            .keys()
            .copied()
            .filter(|&pair| !both_serve(cx, pair) || !cx.view.is_alive(pair.1))
            .collect();
        for pair in gone {
            self.sweep.waiting.remove(&pair);
            self.sweep.end(pair, false);
        }
        while self.active.len() < self.limits.at_once {
            let talks = |pair: &Pair| self.active.iter().any(|a| (a.session.shard, a.session.peer) == *pair);
            let due = |(pair, due): &(&Pair, &Due)| due.at <= cx.now.mono && !talks(pair);
            let Some((&pair, &Due { tries, .. })) = self.sweep.waiting.iter().find(due) else { break };
            self.sweep.waiting.remove(&pair);
            self.dirty.remove(&pair);
            self.begin(cx, pair, tries, false, true);
        }
        // Those that are due wait for the end of a conversation, which leads here.
        self.sweep.next = self.sweep.waiting.values().map(|due| due.at).filter(|&at| at > cx.now.mono).min();
    }

    fn count(&mut self, cx: &Context<'_>) {
        let before = self.pairs;
        self.pairs = cx.view.owned.clone().map(|shard| partners(cx, ShardId(shard)).count() as u64).sum();
        if before == 0 && self.pairs > 0 {
            self.next_turn = cx.now.mono + self.interval();
        }
    }

    fn interval(&self) -> Millis {
        (self.limits.cycle_ms / self.pairs.max(1)).max(1)
    }

    /// The pair whose turn it is.
    fn take_turn(&mut self, cx: &Context<'_>) -> Option<Pair> {
        let all = || {
            cx.view.owned.clone().map(ShardId).flat_map(|shard| {
                let mut nodes: Vec<NodeNo> = partners(cx, shard).collect();
                nodes.sort_unstable();
                nodes.into_iter().map(move |node| (shard, node))
            })
        };
        let next = all().find(|pair| *pair > self.turn).or_else(|| {
            self.stats.cycles += 1;
            all().next()
        })?;
        self.turn = next;
        Some(next)
    }

    fn begin(&mut self, cx: &mut Context<'_>, (shard, node): Pair, tries: u32, look_only: bool, swept: bool) {
        let epoch = cx.view.map.placement(shard).epoch;
        self.begun += 1;
        self.stats.sync.begun += 1;
        let mut session = Session::new(Kind::Repair, shard, epoch, node, Session::number(REPAIR, self.begun));
        session.look_only = look_only;
        self.active.push(Active { session, epoch, tries, swept });
        let last = self.active.len() - 1;
        self.with(cx, last, |session, cx, shared| Some(session.go(cx, shared)));
    }

    fn with(
        &mut self,
        cx: &mut Context<'_>,
        at: usize,
        act: impl FnOnce(&mut Session, &mut Context<'_>, &mut Shared<'_>) -> Option<Progress>,
    ) {
        let active = &mut self.active[at];
        let mut shared = Shared { bucket: &mut self.bucket, stats: &mut self.stats.sync };
        let before = *shared.stats;
        let Some(progress) = act(&mut active.session, cx, &mut shared) else { return };
        let (pair, tries, swept) = ((active.session.shard, active.session.peer), active.tries, active.swept);
        if swept {
            let (now, sweep) = (&self.stats.sync, &mut self.sweep.stats);
            sweep.sent += now.pushed - before.pushed;
            sweep.received += now.pulled - before.pulled;
            sweep.bytes += now.bytes - before.bytes;
        }
        let again = match progress {
            Progress::Going => return,
            Progress::Differs => true,
            Progress::Failed => true,
            Progress::Done => active.session.differences > 0,
        };
        self.stats.differences += active.session.differences;
        let ended = self.active.swap_remove(at);
        if swept && ended.session.differences > 0 {
            self.sweep.differed.insert(pair.0);
        }
        if ended.session.uneven {
            self.uneven.insert(pair.0);
        }
        let tries_of_it = if swept { SWEEP_TRIES } else { RECHECKS };
        if again && tries < tries_of_it {
            let due = Due { at: cx.now.mono + (RECHECK_MS << tries), tries: tries + 1 };
            if swept { &mut self.sweep.waiting } else { &mut self.dirty }.insert(pair, due);
        } else if swept {
            self.sweep.end(pair, !again);
        }
    }

    /// An answer to a question of repair.
    pub(crate) fn on_answer(&mut self, cx: &mut Context<'_>, from: NodeNo, message: &Message<'_>) {
        let shard = message.ask().shard;
        let fits = |active: &Active| active.session.shard == shard && active.session.peer == from;
        if let Some(at) = self.active.iter().position(fits) {
            self.with(cx, at, |session, cx, shared| session.on_answer(cx, shared, from, message));
            if self.sweep.stats().running {
                self.go_on(cx);
            }
        }
    }

    /// Shards of which copies were found to differ below their floors, since the last time.
    pub(crate) fn take_uneven(&mut self) -> BTreeSet<ShardId> {
        std::mem::take(&mut self.uneven)
    }

    /// When to look again.
    pub(crate) fn next_deadline(&self) -> Option<Millis> {
        if self.pairs == 0 && self.active.is_empty() && self.dirty.is_empty() && self.sweep.waiting.is_empty() {
            return None;
        }
        let active = self.active.iter().map(|active| active.session.next_deadline());
        let turn = (self.pairs > 0).then_some(self.next_turn);
        active.chain(self.sweep.next).chain(turn).chain([self.tick]).min()
    }

    /// Time has passed.
    pub(crate) fn on_deadline(&mut self, cx: &mut Context<'_>) {
        let now = cx.now.mono;
        for at in (0..self.active.len()).rev() {
            if self.active[at].session.next_deadline() <= now {
                self.with(cx, at, |session, cx, shared| Some(session.on_deadline(cx, shared)));
            }
        }
        // Before the others: somebody waits for it.
        self.go_on(cx);
        if self.tick <= now {
            self.tick = now + TICK_MS;
            for pair in cx.hints.take_dirty() {
                self.dirty.entry(pair).or_insert(Due { at: now, tries: 0 });
            }
            self.dirty.retain(|&pair, _| both_serve(cx, pair));
        }
        let due: Vec<(Pair, Due)> = self.dirty.iter().filter(|(_, due)| due.at <= now).map(|(p, d)| (*p, *d)).collect();
        for (pair, due) in due {
            let busy = self.active.iter().any(|active| (active.session.shard, active.session.peer) == pair);
            if self.active.len() < self.limits.at_once && !busy && cx.view.is_alive(pair.1) {
                self.dirty.remove(&pair);
                self.begin(cx, pair, due.tries, false, false);
            }
        }
        if !self.dirty.is_empty() && self.active.len() < self.limits.at_once {
            // Those that are not due yet, or cannot be reached.
            let next = self.dirty.values().map(|due| due.at).filter(|&at| at > now).min();
            self.tick = next.map_or(self.tick, |next| next.min(self.tick));
        }
        if self.next_turn <= now && self.pairs > 0 {
            self.next_turn = (self.next_turn + self.interval()).max(now + 1);
            if self.active.len() < self.limits.at_once
                && let Some(pair) = self.take_turn(cx)
                && !self.dirty.contains_key(&pair)
                && !self.sweep.waiting.contains_key(&pair)
                && !self.active.iter().any(|active| (active.session.shard, active.session.peer) == pair)
            {
                self.begin(cx, pair, 0, true, false);
            }
        }
    }

    /// Whether what is bounded is within its bounds.
    pub(crate) fn invariants(&self) {
        assert!(self.active.len() <= self.limits.at_once, "conversations are bounded");
        self.active.iter().for_each(|active| active.session.invariants());
        let swept = self.active.iter().filter(|active| active.swept).count() + self.sweep.waiting.len();
        assert_eq!(self.sweep.open.values().sum::<usize>(), swept, "each open pair of the sweep waits or talks");
    }
}
