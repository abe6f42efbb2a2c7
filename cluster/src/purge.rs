//! Forgetting tombstones, so that nothing comes back.
//!
//! A tombstone may go when no copy holds anything older that it has to hide, and none can get it. The orderer of a shard
//! sees to that in rounds, for versions up to a point more than a minute ago:
//!
//! ```text
//!   orderer                                        replicas
//!     │── compare and exchange up to `until` ────────▶│  so that the fence meets few differences
//!     │── Fence(until) ──────────────────────────────▶│  from now on refuse what is absent and not newer
//!     │◀── digest up to `until` ──────────────────────│
//!     │── exchange what differs, in this round only ─▶│  and Fence again, until all are equal
//!     │── Purge(until) ──────────────────────────────▶│  forget
//! ```
//!
//! After the fence nothing up to `until` enters but by the round's own exchange; when all are equal nobody holds what a
//! tombstone hides; so after the purge nothing is left that could return. The fence is the shard's floor and stays, whether or
//! not the round ends: late writes, hints and repair are refused by it.
//!
//! A difference in a key of which one side holds something newer than `until` is none: that stays, and hides the older.
//!
//! Contract: all replicas must serve, be reachable and be at rest in one epoch, from the fence to the purge. A replica that
//! is away or being filled keeps every tombstone of its shards; the statistics say so.

use std::collections::BTreeMap;

use gridkv_engine::Millis;
use gridkv_engine::digest::Digest;
use gridkv_engine::hash::ShardId;
use gridkv_engine::hlc::{Hlc, Version};

use crate::ids::NodeNo;
use crate::map::{Placement, Stage};
use crate::outbox::Class;
use crate::planted::Bug;
use crate::shards::Context;
use crate::sync::{Bucket, Kind, Progress, SEQUENCE_BITS, Session, Shared, SyncStats, differing};
use crate::wire::{Ask, Message};

/// Marks the operation numbers of purging.
pub(crate) const PURGE: u64 = 1 << 60;

/// When tombstones are forgotten.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tombstones younger than this stay: no write may be under way so long, and no clock be off so far.
    pub min_age_ms: Millis,
    /// Between two rounds of a shard.
    pub rest_ms: Millis,
    /// Bytes per second that the exchange moves.
    pub bytes_per_second: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { min_age_ms: 60_500, rest_ms: 60_000, bytes_per_second: 20 << 20 }
    }
}

/// How often a core looks for a shard to purge.
const LOOK_MS: Millis = 1000;
/// When a fence or a purge is sent again.
const AGAIN_MS: Millis = 1000;
/// How often.
const TRIES: u32 = 3;
/// How often all are compared behind the fence, before the round is given up.
const PASSES: u32 = 6;
/// Entries of a slice.
const SLICE: usize = 4096;

/// Counters of purging.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PurgeStats {
    /// Of its conversations.
    pub sync: SyncStats,
    /// Rounds begun.
    pub rounds: u64,
    /// Rounds at whose end every replica has forgotten.
    pub purged: u64,
    /// Rounds given up.
    pub failed: u64,
    /// Shards whose old tombstones have to stay, because a replica is away or not complete.
    pub blocked: u64,
}

/// A round as a replica knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fence {
    by: NodeNo,
    round: u64,
    epoch: u64,
    until: Version,
    /// The exchange is over.
    purged: bool,
}

/// The fences of the shards of one core, as a replica.
#[derive(Debug, Default)]
pub(crate) struct Fences {
    fences: BTreeMap<ShardId, Fence>,
}

fn round_of(op: u64) -> u64 {
    op >> SEQUENCE_BITS
}

impl Fences {
    /// A fence is raised.
    pub(crate) fn raise(&mut self, cx: &mut Context<'_>, by: NodeNo, ask: &Ask, until: Version) {
        cx.store.raise_floor(ask.shard, until);
        let fence = Fence { by, round: round_of(ask.op), epoch: ask.epoch, until, purged: false };
        self.fences.insert(ask.shard, fence);
    }

    /// Whether that write is part of the exchange of the round under way.
    pub(crate) fn lets_in(&self, from: NodeNo, ask: &Ask) -> bool {
        self.fences.get(&ask.shard).is_some_and(|fence| fence.fits(from, ask) && !fence.purged)
    }

    /// Whether that purge ends the round under way; if so the exchange is over.
    pub(crate) fn end(&mut self, from: NodeNo, ask: &Ask, until: Version) -> bool {
        match self.fences.get_mut(&ask.shard) {
            Some(fence) if fence.fits(from, ask) && fence.until == until => {
                fence.purged = true;
                true
            }
            _ => false,
        }
    }
}

impl Fence {
    fn fits(&self, from: NodeNo, ask: &Ask) -> bool {
        (self.by, self.round, self.epoch) == (from, round_of(ask.op), ask.epoch)
    }
}

#[derive(Debug)]
enum Phase {
    /// Replicas say what they hold.
    Compare { waiting: Vec<NodeNo>, digests: Vec<(NodeNo, Digest)> },
    /// One after the other, those that differ are made equal.
    Exchange { left: Vec<(NodeNo, u16)>, session: Box<Session>, differences: u64 },
    /// Replicas forget.
    Purge { waiting: Vec<NodeNo> },
}

#[derive(Debug)]
struct Round {
    shard: ShardId,
    epoch: u64,
    until: Version,
    peers: Vec<NodeNo>,
    /// Number of the next question.
    op: u64,
    /// Number of the question that all are asked.
    asked: u64,
    fenced: bool,
    passes: u32,
    tries: u32,
    again: Millis,
    phase: Phase,
}

/// How a round goes on.
enum Next {
    Wait,
    Compare,
    Purge,
    GiveUp,
    Over,
}

/// The purging of one core's shards.
#[derive(Debug)]
pub(crate) struct Purge {
    limits: Limits,
    pub(crate) fences: Fences,
    round: Option<Round>,
    rests: BTreeMap<ShardId, Millis>,
    at: ShardId,
    look: Millis,
    begun: u64,
    bucket: Bucket,
    stats: PurgeStats,
}

/// Whether every copy can take part.
fn is_whole(cx: &Context<'_>, placement: &Placement) -> bool {
    let takes_part = |node: NodeNo| node == cx.view.me || cx.view.is_alive(node);
    placement.stage == Stage::Normal && placement.replicas.iter().all(|r| !r.filling && takes_part(r.node))
}

impl Purge {
    pub(crate) fn new(limits: Limits) -> Purge {
        Purge {
            limits,
            fences: Fences::default(),
            round: None,
            rests: BTreeMap::new(),
            at: ShardId(0),
            look: 0,
            begun: 0,
            bucket: Bucket::new(limits.bytes_per_second),
            stats: PurgeStats::default(),
        }
    }

    pub(crate) fn stats(&self) -> PurgeStats {
        self.stats
    }

    /// Looks for a shard with old tombstones, in turn.
    fn look(&mut self, cx: &mut Context<'_>) {
        let until = Version { hlc: Hlc::at(cx.now.wall.saturating_sub(self.limits.min_age_ms)), node: 0 };
        self.stats.blocked = 0;
        let (mut first, mut next) = (None, None);
        for shard in cx.view.owned.clone().map(ShardId) {
            let placement = cx.view.map.placement(shard);
            let mine = placement.replicas.first().is_some_and(|replica| replica.node == cx.view.me);
            if !mine || cx.store.oldest_tombstone(shard).is_none_or(|oldest| oldest > until) {
                continue;
            }
            if !is_whole(cx, placement) {
                self.stats.blocked += 1;
            } else if self.rests.get(&shard).is_none_or(|rest| *rest <= cx.now.mono) {
                first = first.or(Some(shard));
                next = next.or(Some(shard).filter(|shard| *shard > self.at));
            }
        }
        if let (None, Some(shard)) = (&self.round, next.or(first)) {
            self.at = shard;
            self.begin(cx, shard, until);
        }
    }

    fn begin(&mut self, cx: &mut Context<'_>, shard: ShardId, until: Version) {
        let placement = cx.view.map.placement(shard);
        self.begun += 1;
        self.stats.rounds += 1;
        let op = Session::number(PURGE, self.begun);
        self.round = Some(Round {
            shard,
            epoch: placement.epoch,
            until,
            peers: placement.replicas.iter().map(|r| r.node).filter(|&node| node != cx.view.me).collect(),
            op,
            asked: op,
            fenced: false,
            passes: 0,
            tries: 0,
            again: 0,
            phase: Phase::Purge { waiting: Vec::new() },
        });
        let next = if cx.planted.has(Bug::PurgeWithoutFence) { Next::Purge } else { Next::Compare };
        self.go(cx, next);
    }

    fn go(&mut self, cx: &mut Context<'_>, next: Next) {
        let Some(round) = &mut self.round else { return };
        let (now, waiting) = (cx.now.mono, round.peers.clone());
        let ask = Ask { op: round.op, shard: round.shard, epoch: round.epoch, left_ms: 0 };
        match next {
            Next::Wait => return,
            Next::Compare if round.passes > PASSES || round.op & (1 << (SEQUENCE_BITS - 1)) != 0 => {
                return self.end(cx, false);
            }
            Next::Compare => {
                (round.asked, round.op, round.again, round.tries) = (round.op, round.op + 1, now + AGAIN_MS, 0);
                if round.fenced {
                    cx.store.raise_floor(round.shard, round.until);
                }
                cx.out.send(&waiting, Class::Background, &Message::Fence(ask, round.until, round.fenced));
                round.phase = Phase::Compare { waiting, digests: Vec::new() };
            }
            Next::Purge => {
                (round.asked, round.op, round.again, round.tries) = (round.op, round.op + 1, now + AGAIN_MS, 0);
                purge(cx, round.shard, round.until);
                cx.out.send(&waiting, Class::Background, &Message::Purge(ask, round.until));
                round.phase = Phase::Purge { waiting };
            }
            Next::GiveUp => return self.end(cx, false),
            Next::Over => return self.end(cx, true),
        }
        // A shard with one copy waits for nobody.
        let next = self.advance(cx);
        match next {
            Next::Wait => {}
            next => self.go(cx, next),
        }
    }

    /// Looks whether everybody has answered.
    fn advance(&mut self, cx: &mut Context<'_>) -> Next {
        let Some(round) = &mut self.round else { return Next::Wait };
        match &mut round.phase {
            Phase::Purge { waiting } if waiting.is_empty() => Next::Over,
            Phase::Compare { waiting, digests } if waiting.is_empty() => {
                let own = digest_until(cx, round.shard, round.until);
                let differ = digests.iter().filter(|(_, digest)| *digest != own);
                let left: Vec<(NodeNo, u16)> = differ.map(|(node, digest)| (*node, differing(&own, digest))).collect();
                round.passes += 1;
                self.exchange(cx, left, 0)
            }
            _ => Next::Wait,
        }
    }

    /// Begins with the next replica that differs; when there is none, says what comes.
    fn exchange(&mut self, cx: &mut Context<'_>, mut left: Vec<(NodeNo, u16)>, differences: u64) -> Next {
        let Some(round) = &mut self.round else { return Next::Wait };
        let Some((peer, leaves)) = left.pop() else {
            return match (round.fenced, differences) {
                (true, 0) => Next::Purge,
                (fenced, _) => {
                    // What could be exchanged before the fence is; now it is raised.
                    round.passes = if fenced { round.passes } else { 0 };
                    round.fenced = true;
                    Next::Compare
                }
            };
        };
        let mut session = Session::new(Kind::Round(round.until), round.shard, round.epoch, peer, round.op);
        session.list(cx, leaves);
        self.stats.sync.begun += 1;
        round.phase = Phase::Exchange { left, session: Box::new(session), differences };
        self.with(cx, |session, cx, shared| Some(session.go(cx, shared)))
    }

    fn with(
        &mut self,
        cx: &mut Context<'_>,
        act: impl FnOnce(&mut Session, &mut Context<'_>, &mut Shared<'_>) -> Option<Progress>,
    ) -> Next {
        let Some(round) = &mut self.round else { return Next::Wait };
        let Phase::Exchange { left, session, differences } = &mut round.phase else { return Next::Wait };
        let mut shared = Shared { bucket: &mut self.bucket, stats: &mut self.stats.sync };
        let progress = act(session, cx, &mut shared);
        round.op = session.op;
        match progress {
            None | Some(Progress::Going) => Next::Wait,
            Some(Progress::Failed | Progress::Differs) => Next::GiveUp,
            Some(Progress::Done) => {
                let (left, differences) = (std::mem::take(left), *differences + session.differences);
                self.exchange(cx, left, differences)
            }
        }
    }

    fn end(&mut self, cx: &mut Context<'_>, purged: bool) {
        let Some(round) = self.round.take() else { return };
        if purged {
            self.stats.purged += 1;
        } else {
            self.stats.failed += 1;
        }
        self.rests.insert(round.shard, cx.now.mono + self.limits.rest_ms);
    }

    /// An answer to a question of a round.
    pub(crate) fn on_answer(&mut self, cx: &mut Context<'_>, from: NodeNo, message: &Message<'_>) {
        let Some(round) = &mut self.round else { return };
        let ask = message.ask();
        let mut next = Next::Wait;
        if ask.op == round.asked && ask.shard == round.shard && ask.epoch == round.epoch {
            match (&mut round.phase, message) {
                (_, Message::Refused(..)) => next = Next::GiveUp,
                (Phase::Compare { waiting, digests }, Message::Digested(_, digest, _)) if waiting.contains(&from) => {
                    waiting.retain(|&node| node != from);
                    digests.push((from, *digest));
                    next = self.advance(cx);
                }
                (Phase::Purge { waiting }, Message::Wrote(_)) => {
                    waiting.retain(|&node| node != from);
                    next = self.advance(cx);
                }
                _ => {}
            }
        } else {
            next = self.with(cx, |session, cx, shared| session.on_answer(cx, shared, from, message));
        }
        self.go(cx, next);
    }

    /// The map changed, or who can be reached: a round that leaned on it is over.
    pub(crate) fn on_change(&mut self, cx: &mut Context<'_>) {
        if let Some(round) = &self.round {
            let placement = cx.view.map.placement(round.shard);
            if placement.epoch != round.epoch || !is_whole(cx, placement) {
                self.end(cx, false);
            }
        }
    }

    /// When to look again.
    pub(crate) fn next_deadline(&self) -> Option<Millis> {
        let round = self.round.as_ref().map(|round| match &round.phase {
            Phase::Exchange { session, .. } => session.next_deadline(),
            _ => round.again,
        });
        Some(self.look.min(round.unwrap_or(Millis::MAX)))
    }

    /// Time has passed.
    pub(crate) fn on_deadline(&mut self, cx: &mut Context<'_>) {
        let now = cx.now.mono;
        let mut next = Next::Wait;
        if let Some(round) = &mut self.round {
            let ask = Ask { op: round.asked, shard: round.shard, epoch: round.epoch, left_ms: 0 };
            let late = round.again <= now;
            match &mut round.phase {
                Phase::Exchange { session, .. } if session.next_deadline() <= now => {
                    next = self.with(cx, |session, cx, shared| Some(session.on_deadline(cx, shared)));
                }
                Phase::Compare { .. } | Phase::Purge { .. } if late && round.tries + 1 >= TRIES => next = Next::GiveUp,
                Phase::Compare { waiting, .. } if late => {
                    (round.tries, round.again) = (round.tries + 1, now + AGAIN_MS);
                    cx.out.send(waiting, Class::Background, &Message::Fence(ask, round.until, round.fenced));
                }
                Phase::Purge { waiting } if late => {
                    (round.tries, round.again) = (round.tries + 1, now + AGAIN_MS);
                    cx.out.send(waiting, Class::Background, &Message::Purge(ask, round.until));
                }
                _ => {}
            }
        }
        self.go(cx, next);
        if self.look <= now {
            self.look = now + LOOK_MS;
            self.look(cx);
        }
    }

    /// Whether what is bounded is within its bounds.
    pub(crate) fn invariants(&self) {
        if let Some(Round { phase: Phase::Exchange { session, .. }, .. }) = &self.round {
            session.invariants();
        }
    }
}

/// Forgets what may be forgotten of a shard.
pub(crate) fn purge(cx: &mut Context<'_>, shard: ShardId, until: Version) {
    let mut at = Some(cx.view.keyspace().first_hash(shard));
    while let Some(from) = at {
        at = cx.store.purge_below(shard, until, from, SLICE).ok().and_then(|purged| purged.next);
    }
}

/// What the shard holds up to a version.
pub(crate) fn digest_until(cx: &mut Context<'_>, shard: ShardId, until: Version) -> Digest {
    let mut digest = Digest::default();
    let mut at = Some(cx.view.keyspace().first_hash(shard));
    while let Some(from) = at {
        at = cx.store.digest_until(shard, until, from, SLICE, &mut digest);
    }
    digest
}
