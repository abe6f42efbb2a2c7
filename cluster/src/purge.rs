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
//! Each replica walks through its copy in slices (`purge/walks.rs`), and writes go on meanwhile. So the digests are of no one moment:
//! each says of every key what was there when the walk came by. Why that is enough:
//!
//! - A key counts with its version up to `until`, or not at all. A write of now that is seen by one walk and missed by
//!   another makes a **false difference**. It costs a look at the lists, no more: there the newer one is brought to the other
//!   side, and counts for no difference once it is there.
//! - A **false equality** is the danger: all seem to agree on a key, one forgets its tombstone, another still holds what that
//!   hides. When two digests are equal, every key counted with the same version on both sides, or on neither. Versions of a key
//!   only grow, so a replica that counted a tombstone never again holds anything older. What can go wrong is a tombstone that came
//!   *after* the walk and was compared with nobody. The fence refuses what is absent and not above `until`, but not tombstones,
//!   nor what replaces something older still. So the store counts what it takes below its floor, and a replica forgets only as
//!   long as that number is what it was when its last walk began; from the first slice to the last.
//! - Where one side holds something newer than `until` and the other something older, a third replica may hold yet another
//!   thing. That the newer one is brought to both, and confirmed, before the purge, closes this: neither the tombstone nor what
//!   it hid is left on them.
//!
//! So a tombstone is forgotten only if every replica has counted it or holds something newer. What was forgotten in part, when
//! a walk ends early, is as if a replica had not heard of the purge: the next round brings those tombstones back and
//! forgets them again. The fence is the shard's floor and stays, whether or not the round ends: late writes, hints and repair
//! are refused by it.
//!
//! Contract: all replicas must serve, be reachable and be at rest in one epoch, from the fence to the purge. A replica that
//! is away or being filled keeps every tombstone of its shards; the statistics say so.

mod walks;

use std::collections::{BTreeMap, BTreeSet};

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
use crate::wire::{Ask, Message, Why};
pub(crate) use walks::Fences;
use walks::Own;

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
    /// Entries that a step of a walk looks at; the few that share the last one's hash are still looked at.
    pub slice: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { min_age_ms: 60_500, rest_ms: 60_000, bytes_per_second: 20 << 20, slice: 2048 }
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

#[derive(Debug)]
enum Phase {
    /// Replicas say what they hold.
    Compare { waiting: Vec<NodeNo>, digests: Vec<(NodeNo, Digest)>, own: Option<Digest> },
    /// One after the other, those that differ are made equal.
    Exchange { left: Vec<(NodeNo, u16)>, session: Box<Session>, differences: u64 },
    /// Replicas forget.
    Purge { waiting: Vec<NodeNo>, own: bool },
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
    /// Shards of which copies differ below their floors, because a round broke off: they need one that does not.
    uneven: BTreeSet<ShardId>,
    at: ShardId,
    look: Millis,
    begun: u64,
    bucket: Bucket,
    stats: PurgeStats,
}

/// Who sees to the tombstones of a shard.
pub(crate) fn is_orderer(node: NodeNo, placement: &Placement) -> bool {
    placement.replicas.first().is_some_and(|replica| replica.node == node)
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
            fences: Fences::new(&limits),
            round: None,
            rests: BTreeMap::new(),
            uneven: BTreeSet::new(),
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

    /// These shards were found to differ below their floors.
    pub(crate) fn found_uneven(&mut self, shards: BTreeSet<ShardId>) {
        self.uneven.extend(shards);
    }

    /// Looks for a shard with old tombstones, or with copies that differ below their floors, in turn.
    fn look(&mut self, cx: &mut Context<'_>) {
        let until = Version { hlc: Hlc::at(cx.now.wall.saturating_sub(self.limits.min_age_ms)), node: 0 };
        self.stats.blocked = 0;
        let (mut first, mut next) = (None, None);
        for shard in cx.view.owned.clone().map(ShardId) {
            let placement = cx.view.map.placement(shard);
            if !is_orderer(cx.view.me, placement) {
                self.uneven.remove(&shard);
                continue;
            }
            let has_old = cx.store.oldest_tombstone(shard).is_some_and(|oldest| oldest <= until);
            if !has_old && !self.uneven.contains(&shard) {
                continue;
            }
            if !is_whole(cx, placement) {
                self.stats.blocked += u64::from(has_old);
            } else if self.rests.get(&shard).is_none_or(|rest| *rest <= cx.now.mono) {
                first = first.or(Some(shard));
                next = next.or(Some(shard).filter(|shard| *shard > self.at));
            }
        }
        // With a wrong clock it would call versions old that are not.
        if let (None, Some(shard), false) = (&self.round, next.or(first), cx.view.quarantined) {
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
            phase: Phase::Purge { waiting: Vec::new(), own: false },
        });
        let next = if cx.planted.has(Bug::PurgeWithoutFence) { Next::Purge } else { Next::Compare };
        self.go(cx, next);
    }

    fn go(&mut self, cx: &mut Context<'_>, next: Next) {
        let Some(round) = &mut self.round else { return };
        let (now, waiting, shard, until) = (cx.now.mono, round.peers.clone(), round.shard, round.until);
        let ask = Ask { op: round.op, shard: round.shard, epoch: round.epoch, left_ms: 0 };
        let own = match next {
            Next::Wait => return,
            Next::Compare if round.passes > PASSES || round.op & (1 << (SEQUENCE_BITS - 1)) != 0 => {
                return self.end(cx, false);
            }
            Next::Purge if round.fenced && !self.fences.is_clean(cx, shard) => return self.go(cx, Next::Compare),
            Next::Compare => {
                (round.asked, round.op, round.again, round.tries) = (round.op, round.op + 1, now + AGAIN_MS, 0);
                cx.out.send(&waiting, Class::Background, &Message::Fence(ask, until, round.fenced));
                round.phase = Phase::Compare { waiting, digests: Vec::new(), own: None };
                self.fences.compare(cx, cx.view.me, &ask, until, round.fenced)
            }
            Next::Purge => {
                (round.asked, round.op, round.again, round.tries) = (round.op, round.op + 1, now + AGAIN_MS, 0);
                cx.out.send(&waiting, Class::Background, &Message::Purge(ask, until));
                round.phase = Phase::Purge { waiting, own: false };
                self.fences.purge(cx, cx.view.me, &ask, until)
            }
            Next::GiveUp => return self.end(cx, false),
            Next::Over => return self.end(cx, true),
        };
        // A small shard is through at once, and one with a single copy waits for nobody else.
        if let Some(own) = own {
            let next = self.on_own(cx, ask.op, own);
            self.go(cx, next);
        }
    }

    /// The walk through this node's own copy is over.
    fn on_own(&mut self, cx: &mut Context<'_>, op: u64, end: Own) -> Next {
        let Some(round) = self.round.as_mut().filter(|round| round.asked == op) else { return Next::Wait };
        match (&mut round.phase, end) {
            (Phase::Compare { own, .. }, Own::Digest(digest)) => *own = Some(digest),
            (Phase::Purge { own, .. }, Own::Purged) => *own = true,
            _ => return Next::GiveUp,
        }
        self.advance(cx)
    }

    /// Looks whether everybody has answered.
    fn advance(&mut self, cx: &mut Context<'_>) -> Next {
        let Some(round) = &mut self.round else { return Next::Wait };
        match &mut round.phase {
            Phase::Purge { waiting, own: true } if waiting.is_empty() => Next::Over,
            Phase::Compare { waiting, digests, own: Some(own) } if waiting.is_empty() => {
                let own = *own;
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
                    // What could be exchanged before the fence is; now it is raised. Also when something is left: below the floor of a
                    // round that broke off, only the exchange behind a fence is let in.
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
        self.fences.stop(round.shard, cx.view.me);
        if purged {
            self.stats.purged += 1;
            self.uneven.remove(&round.shard);
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
                // It is still walking through its copy.
                (_, Message::Refused(_, Why::Busy)) => (round.tries, round.again) = (0, cx.now.mono + AGAIN_MS),
                (_, Message::Refused(..)) => next = Next::GiveUp,
                (Phase::Compare { waiting, digests, .. }, Message::Digested(_, digest, _))
                    if waiting.contains(&from) =>
                {
                    waiting.retain(|&node| node != from);
                    digests.push((from, *digest));
                    next = self.advance(cx);
                }
                (Phase::Purge { waiting, .. }, Message::Wrote(_)) => {
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
            if placement.epoch != round.epoch || !is_orderer(cx.view.me, placement) || !is_whole(cx, placement) {
                self.end(cx, false);
            }
        }
        self.fences.on_change(cx);
    }

    /// When to look again.
    pub(crate) fn next_deadline(&self) -> Option<Millis> {
        let round = self.round.as_ref().map(|round| match &round.phase {
            Phase::Exchange { session, .. } => session.next_deadline(),
            _ => round.again,
        });
        [Some(self.look), round, self.fences.next_deadline()].into_iter().flatten().min()
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
                Phase::Compare { waiting, .. } | Phase::Purge { waiting, .. } if late && waiting.is_empty() => {
                    // Only its own walk is left.
                    round.again = now + AGAIN_MS;
                }
                Phase::Compare { .. } | Phase::Purge { .. } if late && round.tries + 1 >= TRIES => next = Next::GiveUp,
                Phase::Compare { waiting, .. } if late => {
                    (round.tries, round.again) = (round.tries + 1, now + AGAIN_MS);
                    cx.out.send(waiting, Class::Background, &Message::Fence(ask, round.until, round.fenced));
                }
                Phase::Purge { waiting, .. } if late => {
                    (round.tries, round.again) = (round.tries + 1, now + AGAIN_MS);
                    cx.out.send(waiting, Class::Background, &Message::Purge(ask, round.until));
                }
                _ => {}
            }
        }
        self.go(cx, next);
        if self.fences.next_deadline().is_some_and(|at| at <= now)
            && let Some((op, own)) = self.fences.step(cx)
        {
            let next = self.on_own(cx, op, own);
            self.go(cx, next);
        }
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
        self.fences.invariants();
    }
}

#[cfg(test)]
mod tests;
