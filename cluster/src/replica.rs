//! What a replica does with a question about one of its shards.
//!
//! It answers from its store or refuses, at once and alone: it waits for nobody and remembers nothing of the question, but
//! for the fence of a purge.
//!
//! Contract: a question is served only in the shard epoch that this node has adopted, so all answers of a quorum belong to
//! one epoch. A replica that is being filled stores what it is sent and answers no read: what it lacks would be read as
//! absence. Answers are bounded by [`ANSWER_BYTES`], whatever was asked for.

use gridkv_engine::Millis;
use gridkv_engine::digest::LEAVES;
use gridkv_engine::hash::{KeyHash, Keyspace};
use gridkv_engine::record::Entry;
use gridkv_engine::store::{Merged, StoreError};

use crate::ids::NodeNo;
use crate::outbox::Class;
use crate::planted::Bug;
use crate::purge::{self, Fences, PURGE};
use crate::shards::{Context, MACHINES};
use crate::wire::{Ask, Item, Message, Stored, Why, pack, pack_item};

/// Bytes of entries in one answer, about; the entry that crosses it is still in. It is copied in one turn of this core, and stored
/// in one turn of the other: clients' operations wait meanwhile, on both.
pub const ANSWER_BYTES: usize = 64 << 10;
/// Entries that one answer looks at, at most.
const ANSWER_ENTRIES: usize = 2048;

/// How much is done and sent at a time of what may be much. A simulated shard holds few entries, and still has to take several
/// pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// Bytes of entries in one answer, about; see [`ANSWER_BYTES`].
    pub bytes: usize,
    /// Entries that one answer looks at, at most.
    pub entries: usize,
    /// Entries that the table is asked for at once: each time it orders a segment's entries anew.
    pub step: usize,
    /// Hashes in one [`Message::Fetch`].
    pub fetched: usize,
    /// Entries of this core that are compared at once.
    pub compared: usize,
    /// Writes under way to the peer of a conversation, at most.
    pub window: usize,
}

impl Default for Pages {
    fn default() -> Pages {
        let entries = ANSWER_ENTRIES;
        Pages { bytes: ANSWER_BYTES, entries, step: 256, fetched: 512, compared: 512, window: 64 }
    }
}

/// Questions answered and refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplicaStats {
    /// Writes stored, or known already.
    pub writes: u64,
    /// Reads answered.
    pub reads: u64,
    /// Questions refused because their shard epoch was not this node's.
    pub refused_epoch: u64,
    /// Questions refused for other reasons.
    pub refused: u64,
    /// Bytes of entries sent to replicas that are filled or repaired.
    pub sent_bytes: u64,
}

/// Answers one question. False when it is not a question.
pub(crate) fn serve(
    cx: &mut Context<'_>,
    stats: &mut ReplicaStats,
    fences: &mut Fences,
    from: NodeNo,
    message: &Message<'_>,
) -> bool {
    let ask = message.ask();
    match message {
        Message::Write(..)
        | Message::Read(..)
        | Message::Digest(_)
        | Message::List(..)
        | Message::Fetch(..)
        | Message::Stream(..)
        | Message::Fence(..)
        | Message::Purge(..) => {}
        _ => return false,
    }
    if let Err((why, epoch)) = admit(cx, from, &ask, message) {
        match why {
            Why::Stale | Why::Behind => stats.refused_epoch += 1,
            _ => stats.refused += 1,
        }
        refuse(cx, from, ask, why, epoch);
        return true;
    }
    match *message {
        Message::Write(_, stored) => {
            let lets_in = ask.op & MACHINES == PURGE && fences.lets_in(from, &ask);
            let stored = match lets_in {
                true => cx.store.fill(stored.entry, cx.now.wall),
                false => store(cx, stored.entry),
            };
            match stored {
                Ok(Merged::Applied | Merged::Stale) => {
                    stats.writes += 1;
                    cx.out.send(&[from], Class::Answer, &Message::Wrote(ask));
                }
                Ok(Merged::BelowFloor) => refuse(cx, from, ask, Why::BelowFloor, ask.epoch),
                Err(error) => refuse(cx, from, ask, why_not(&error), ask.epoch),
            }
        }
        Message::Read(_, hash, key, whole) => {
            stats.reads += 1;
            let found = cx.store.raw(hash, key).map(|entry| {
                let value = if whole { entry.value } else { &[] };
                Stored { hash, entry: Entry { key: &[], value, ..entry } }
            });
            cx.out.send(&[from], Class::Answer, &Message::Found(ask, found, whole));
        }
        Message::Digest(_) => {
            let (digest, floor) = (cx.store.digest(ask.shard), cx.store.tombstone_floor(ask.shard));
            cx.out.send(&[from], Class::Answer, &Message::Digested(ask, digest, floor));
        }
        Message::List(_, at, leaves) => list(cx, from, ask, at, leaves),
        Message::Fetch(_, hashes) => {
            let mut bytes = Vec::new();
            for hash in hashes.iter().take(ANSWER_ENTRIES) {
                if cx.view.shard(hash) == ask.shard && bytes.len() < cx.pages.bytes {
                    cx.store.by_hash(ask.shard, hash, &mut |entry| pack(&mut bytes, hash, &entry));
                }
            }
            stats.sent_bytes += bytes.len() as u64;
            cx.out.send(&[from], Class::Background, &Message::Entries(ask, None, Message::packed(&bytes)));
        }
        Message::Stream(_, at) => stream(cx, stats, from, ask, at),
        Message::Fence(_, until, raise) => _ = fences.compare(cx, from, &ask, until, raise),
        Message::Purge(_, until) => _ = fences.purge(cx, from, &ask, until),
        _ => unreachable!("looked at above"),
    }
    true
}

/// Stores an entry in this node's copy of its shard: a peer's, or one that this core coordinates.
///
/// A tombstone, or what has expired, is taken below the floor, too: it brings nothing back, and a read that found it at another
/// replica has to get it onto a quorum. The next purge takes it away again. A copy that sheds refuses it until it is through: what
/// is not above that floor goes, whatever the answer was.
pub(crate) fn store(cx: &mut Context<'_>, entry: Entry<'_>) -> Result<Merged, StoreError> {
    match cx.planted.merge(cx.store, entry, cx.now.wall) {
        Ok(Merged::BelowFloor) if entry.tombstone || has_expired(&entry, cx.now.wall) => {
            cx.store.fill(entry, cx.now.wall)
        }
        // It came before, and this clock was set back since.
        Err(StoreError::Clock(_)) if is_known(cx, &entry) => Ok(Merged::Stale),
        merged => merged,
    }
}

fn has_expired(entry: &Entry<'_>, now: Millis) -> bool {
    entry.expires_at != 0 && entry.expires_at <= now
}

/// Whether something as new is held for that key.
fn is_known(cx: &mut Context<'_>, entry: &Entry<'_>) -> bool {
    let hash = cx.store.locate(entry.key);
    cx.store.raw(hash, entry.key).is_some_and(|held| held.version >= entry.version)
}

/// Whether this node may answer now; if not, why, and its own epoch of the shard.
fn admit(cx: &Context<'_>, from: NodeNo, ask: &Ask, message: &Message<'_>) -> Result<(), (Why, u64)> {
    if !cx.view.owned.contains(&ask.shard.0) {
        return Err((Why::NotHere, 0));
    }
    let placement = cx.view.map.placement(ask.shard);
    let epoch = placement.epoch;
    if !cx.planted.has(Bug::AnyEpoch) {
        if ask.epoch < epoch {
            return Err((Why::Stale, epoch));
        }
        if ask.epoch > epoch {
            return Err((Why::Behind, epoch));
        }
    }
    if !placement.names(cx.view.me) {
        return Err((Why::NotHere, epoch));
    }
    let stores = matches!(message, Message::Write(..));
    if !stores && placement.is_filling(cx.view.me) && !cx.planted.has(Bug::FillingVotes) {
        return Err((Why::Filling, epoch));
    }
    // The table finds a place by the hash: one of another shard, or of another key, must not get as far as that.
    let fits = match message {
        Message::Write(_, stored) => {
            cx.view.shard(stored.hash) == ask.shard && cx.store.locate(stored.entry.key) == stored.hash
        }
        Message::Read(_, hash, ..) => cx.view.shard(*hash) == ask.shard,
        Message::Fence(..) | Message::Purge(..) => purge::is_orderer(from, placement),
        _ => true,
    };
    if fits { Ok(()) } else { Err((Why::Broken, epoch)) }
}

fn refuse(cx: &mut Context<'_>, from: NodeNo, ask: Ask, why: Why, epoch: u64) {
    if why == Why::Behind {
        cx.out.want_map(ask.epoch);
    }
    cx.out.send(&[from], Class::Answer, &Message::Refused(Ask { epoch, ..ask }, why));
}

pub(crate) fn why_not(error: &StoreError) -> Why {
    match error {
        StoreError::OutOfMemory => Why::Full,
        StoreError::Clock(_) => Why::Ahead,
        _ => Why::Broken,
    }
}

/// The leaf of a hash in the digest of its shard.
pub(crate) fn leaf_of(keyspace: Keyspace, hash: KeyHash) -> usize {
    (hash.0 << keyspace.shards.bits() >> 60) as usize % LEAVES
}

fn list(cx: &mut Context<'_>, from: NodeNo, ask: Ask, at: KeyHash, leaves: u16) {
    let mut bytes = Vec::new();
    let keyspace = cx.view.keyspace();
    let next = cx.store.snapshot(ask.shard, at, cx.pages.entries, &mut |entry| {
        let hash = keyspace.locate(entry.key);
        if leaves >> leaf_of(keyspace, hash) & 1 == 1 {
            pack_item(&mut bytes, Item { hash, version: entry.version });
        }
    });
    cx.out.send(&[from], Class::Background, &Message::Listed(ask, next, Message::items(&bytes)));
}

fn stream(cx: &mut Context<'_>, stats: &mut ReplicaStats, from: NodeNo, ask: Ask, at: KeyHash) {
    let (mut bytes, mut looked) = (Vec::new(), 0);
    let (mut next, mut last) = (Some(at), None);
    let (keyspace, pages) = (cx.view.keyspace(), cx.pages);
    while let Some(at) = next
        && bytes.len() < pages.bytes
        && looked < pages.entries
    {
        looked += pages.step;
        let mut rest = None;
        let after = cx.store.snapshot(ask.shard, at, pages.step, &mut |entry| {
            if rest.is_some() {
                return;
            }
            let hash = keyspace.locate(entry.key);
            // One entry may be beyond the bound, whatever its size, and no more: so the answer fits into a frame.
            if bytes.len() >= pages.bytes && last != Some(hash) {
                rest = Some(hash);
                return;
            }
            pack(&mut bytes, hash, &entry);
            last = Some(hash);
        });
        next = rest.or(after);
    }
    stats.sent_bytes += bytes.len() as u64;
    cx.out.send(&[from], Class::Background, &Message::Entries(ask, next, Message::packed(&bytes)));
}

#[cfg(test)]
mod tests;
