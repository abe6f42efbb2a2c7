//! Walks through a whole shard, a slice at a time: the digest up to a version, and forgetting.
//!
//! A shard may have millions of entries and a turn of a core may take none of its clients' time. So a walk looks at 2048
//! entries per step, one step for all walks of the core and per millisecond; small shards are done at the question. One walk is
//! under way per shard, and its answer leaves when it is through.
//!
//! What a replica keeps of a round is its [`Fence`]. It knows how many entries at or below a floor the shard had taken
//! ([`Store::below_floor`]) when the digest of the present comparison was begun. Any that comes after that was not compared:
//! nothing is forgotten any more, and a walk that forgets ends where it is. See [`crate::purge`] for why that is enough.
//!
//! An orderer whose clock is ahead would raise the fence above what is written now: a fence has to lie in the past by the clock
//! of the replica, too. Walks end with the map epoch of their shard. Bounds: one walk and one fence per shard.

use std::collections::{BTreeMap, VecDeque};

use gridkv_engine::Millis;
use gridkv_engine::digest::Digest;
use gridkv_engine::hash::{KeyHash, ShardId};
use gridkv_engine::hlc::Version;
use gridkv_engine::store::Digested;
#[cfg(doc)]
use gridkv_engine::store::Store;

use crate::ids::NodeNo;
use crate::outbox::Class;
use crate::planted::Bug;
use crate::shards::Context;
use crate::sync::SEQUENCE_BITS;
use crate::wire::{Ask, Message, Why};

/// A round as a replica knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fence {
    by: NodeNo,
    round: u64,
    epoch: u64,
    until: Version,
    /// The comparison for which the last digest was begun.
    op: u64,
    /// Entries at or below the floor that the shard had taken by then.
    taken: u64,
    /// The exchange is over.
    purged: bool,
}

impl Fence {
    fn fits(&self, by: NodeNo, ask: &Ask) -> bool {
        (self.by, self.round, self.epoch) == (by, round_of(ask.op), ask.epoch)
    }
}

fn round_of(op: u64) -> u64 {
    op >> SEQUENCE_BITS
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Digest(Digest),
    /// Forgets, as long as the shard has taken no more below its floor than that.
    Purge {
        taken: Option<u64>,
    },
}

#[derive(Debug)]
struct Walk {
    /// Who asks; this node itself for a round of its own.
    by: NodeNo,
    ask: Ask,
    until: Version,
    at: KeyHash,
    what: What,
}

/// How a walk of a round of this node ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Own {
    Digest(Digest),
    Purged,
    /// Something came that was not compared.
    Spoiled,
}

/// The fences of the shards of one core, as a replica, and the walks through its shards.
#[derive(Debug)]
pub(crate) struct Fences {
    /// How old a version that a peer wants to raise the fence to has to be by this node's clock.
    min_age_ms: Millis,
    slice: usize,
    fences: BTreeMap<ShardId, Fence>,
    walks: VecDeque<Walk>,
    stepped: Option<Millis>,
    pub(super) steps: u64,
    /// The most entries that one of them has looked at.
    pub(super) widest: usize,
}

impl Fences {
    pub(super) fn new(limits: &super::Limits) -> Fences {
        // The peer keeps to the whole of it by its own clock.
        let min_age_ms = limits.min_age_ms / 2;
        Fences {
            min_age_ms,
            slice: limits.slice,
            fences: BTreeMap::new(),
            walks: VecDeque::new(),
            stepped: None,
            steps: 0,
            widest: 0,
        }
    }

    /// Begins the digest of a shard up to a version, behind the fence if that is to be raised. The end comes at once or with
    /// [`Fences::step`].
    pub(crate) fn compare(
        &mut self,
        cx: &mut Context<'_>,
        by: NodeNo,
        ask: &Ask,
        until: Version,
        raise: bool,
    ) -> Option<Own> {
        if self.is_at(by, ask) {
            self.still(cx, by, ask);
            return None;
        }
        if until.hlc.millis() + self.min_age_ms > cx.now.wall && by != cx.view.me {
            // A fence that lies ahead would refuse what is written now.
            cx.out.send(&[by], Class::Answer, &Message::Refused(*ask, Why::Ahead));
            return None;
        }
        if raise && !cx.planted.has(Bug::PurgeWithoutFence) {
            let known = self.fences.get(&ask.shard).filter(|fence| fence.fits(by, ask));
            let taken = match known {
                // It comes late: the round is further than that.
                Some(fence) if ask.op < fence.op || fence.purged => return None,
                // Asked again, the first answer may still be the one that counts.
                Some(fence) if ask.op == fence.op => fence.taken,
                _ => cx.store.below_floor(ask.shard),
            };
            cx.store.raise_floor(ask.shard, until);
            let fence =
                Fence { by, round: round_of(ask.op), epoch: ask.epoch, until, op: ask.op, taken, purged: false };
            self.fences.insert(ask.shard, fence);
        }
        self.begin(cx, by, ask, until, What::Digest(Digest::default()))
    }

    /// Begins to forget, if that ends the round under way and all that is here was compared. From now on the round
    /// exchanges nothing more.
    pub(crate) fn purge(&mut self, cx: &mut Context<'_>, by: NodeNo, ask: &Ask, until: Version) -> Option<Own> {
        if self.is_at(by, ask) {
            self.still(cx, by, ask);
            return None;
        }
        let fence = self.fences.get_mut(&ask.shard).filter(|fence| fence.fits(by, ask) && fence.until == until);
        let taken = match fence {
            _ if cx.planted.has(Bug::PurgeWithoutFence) => None,
            Some(fence) => {
                fence.purged = true;
                Some(fence.taken)
            }
            // Of another round, or of one that this process knows nothing of: what it relied on may not hold.
            None => return answer(cx, by, *ask, until, Own::Spoiled),
        };
        self.begin(cx, by, ask, until, What::Purge { taken })
    }

    fn begin(&mut self, cx: &mut Context<'_>, by: NodeNo, ask: &Ask, until: Version, what: What) -> Option<Own> {
        // A shard has one orderer, which has one question.
        self.walks.retain(|walk| walk.ask.shard != ask.shard);
        let at = cx.view.keyspace().first_hash(ask.shard);
        self.walks.push_back(Walk { by, ask: *ask, until, at, what });
        let alone = self.walks.len() == 1 && self.stepped != Some(cx.now.mono);
        if alone { self.step(cx).map(|(_, own)| own) } else { None }
    }

    fn is_at(&self, by: NodeNo, ask: &Ask) -> bool {
        self.walks.iter().any(|walk| (walk.by, walk.ask.shard, walk.ask.op) == (by, ask.shard, ask.op))
    }

    /// Says to who asked again that the answer will come.
    fn still(&self, cx: &mut Context<'_>, by: NodeNo, ask: &Ask) {
        if by != cx.view.me {
            cx.out.send(&[by], Class::Answer, &Message::Refused(*ask, Why::Busy));
        }
    }

    /// Whether that write is part of the exchange of the round under way.
    pub(crate) fn lets_in(&self, from: NodeNo, ask: &Ask) -> bool {
        self.fences.get(&ask.shard).is_some_and(|fence| fence.fits(from, ask) && !fence.purged)
    }

    /// Whether all that is in the shard was compared, as far as this fence can tell.
    pub(super) fn is_clean(&self, cx: &Context<'_>, shard: ShardId) -> bool {
        self.fences.get(&shard).is_some_and(|fence| fence.taken == cx.store.below_floor(shard))
    }

    /// One slice of one walk. The question and its end, when it was of this node.
    pub(crate) fn step(&mut self, cx: &mut Context<'_>) -> Option<(u64, Own)> {
        self.stepped = Some(cx.now.mono);
        let mut walk = self.walks.pop_front()?;
        let (shard, until) = (walk.ask.shard, walk.until);
        let (looked, next, end) = match &mut walk.what {
            What::Digest(digest) => {
                let Digested { looked, next } = cx.store.digest_until(shard, until, walk.at, self.slice, digest);
                (looked, next, Own::Digest(*digest))
            }
            What::Purge { taken } if taken.is_some_and(|taken| taken != cx.store.below_floor(shard)) => {
                (0, None, Own::Spoiled)
            }
            What::Purge { .. } => match cx.store.purge_below(shard, until, walk.at, self.slice) {
                Ok(purged) => (purged.looked, purged.next, Own::Purged),
                Err(_) => (0, None, Own::Spoiled),
            },
        };
        self.steps += 1;
        self.widest = self.widest.max(looked);
        match next {
            Some(next) => {
                walk.at = next;
                self.walks.push_back(walk);
                None
            }
            None => answer(cx, walk.by, walk.ask, until, end).map(|own| (walk.ask.op, own)),
        }
    }

    /// Drops walks and fences that belong to another epoch.
    pub(super) fn on_change(&mut self, cx: &Context<'_>) {
        let fits = |shard, epoch| cx.view.map.placement(shard).epoch == epoch;
        self.walks.retain(|walk| fits(walk.ask.shard, walk.ask.epoch));
        self.fences.retain(|&shard, fence| fits(shard, fence.epoch));
    }

    /// Ends the walk through a shard for a round of this node that is over.
    pub(super) fn stop(&mut self, shard: ShardId, me: NodeNo) {
        self.walks.retain(|walk| walk.by != me || walk.ask.shard != shard);
    }

    /// When the next step is due.
    pub(crate) fn next_deadline(&self) -> Option<Millis> {
        (!self.walks.is_empty()).then(|| self.stepped.map_or(0, |stepped| stepped + 1))
    }

    /// Whether what is bounded is within its bounds.
    pub(super) fn invariants(&self) {
        let mut shards: Vec<ShardId> = self.walks.iter().map(|walk| walk.ask.shard).collect();
        shards.sort_unstable();
        assert!(shards.windows(2).all(|pair| pair[0] != pair[1]), "one walk per shard");
    }
}

/// Hands the end of a walk to who asked: a peer, or this node.
fn answer(cx: &mut Context<'_>, by: NodeNo, ask: Ask, until: Version, end: Own) -> Option<Own> {
    if by == cx.view.me {
        return Some(end);
    }
    let message = match end {
        Own::Digest(digest) => Message::Digested(ask, digest, until),
        Own::Purged => Message::Wrote(ask),
        Own::Spoiled => Message::Refused(ask, Why::BelowFloor),
    };
    cx.out.send(&[by], Class::Answer, &message);
    None
}
