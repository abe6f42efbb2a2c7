//! Making one shard equal to a peer's copy: one conversation, used by filling, repair and purging.
//!
//! ```text
//!   Digest ──▶ equal: done
//!          ──▶ nothing here yet: Stream, page by page ──▶ done
//!          ──▶ List of the leaves that differ, page by page
//!                 newer there: Fetch by hash          newer here: Write (not while filling)
//! ```
//!
//! It merges and never clears: what is here is replaced by newer versions only. One question is under way at a time; what it
//! holds is a page of hashes and versions, and a window of writes. Every question names the shard epoch it began with, and an
//! answer of another one ends it.
//!
//! What entries it takes depends on who asks (`Kind`): a replica that is filled takes what its sources hold, a repair
//! keeps to the floor ([`gridkv_engine::store::Store::merge`]).
//!
//! A fill sheds what is below the floor of its source before anything else, in slices. How far that has come the store knows, not
//! the conversation: whichever comes next goes on with it, and none asks for data, or is done, before it is through.
//!
//! How fast it may move data, and that filling gives way to other work: `bucket`.
//!
//! Not here: with whom and when ([`crate::fill`], [`crate::repair`], [`crate::purge`]).

mod bucket;

use std::collections::BTreeSet;

use gridkv_engine::Millis;
use gridkv_engine::digest::{Digest, LEAVES};
use gridkv_engine::hash::{KeyHash, ShardId};
use gridkv_engine::hlc::Version;
use gridkv_engine::record::Entry;
use gridkv_engine::store::{Merged, StoreError};

use crate::ids::NodeNo;
use crate::outbox::Class;
use crate::planted::Bug;
use crate::replica::{self, leaf_of};
use crate::shards::Context;
use crate::wire::{Ask, Item, Message, Packed, Stored, Why};
pub(crate) use bucket::Bucket;

/// When a question is asked again.
const AGAIN_MS: Millis = 1000;
/// How often a question is asked, before the peer is given up.
const TRIES: u32 = 3;
/// How long a peer that lacks the map, or has too much to do, is left alone.
const PAUSE_MS: Millis = 100;
/// How long a core without memory waits before it goes on.
const FULL_MS: Millis = 1000;
/// Differences younger than this may be writes on their way.
const YOUNG_MS: Millis = 2000;
/// Bits of an operation number below the conversation's.
pub(crate) const SEQUENCE_BITS: u32 = 24;

/// Who talks, and so what may be changed where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A replica that does not serve yet takes what a source holds, whatever its floor.
    Fill,
    /// Two replicas exchange what is newer, within their floors, and leave alone what is on its way.
    Repair,
    /// As repair, for versions up to that one and whatever the floor: the reconciliation of a purge.
    Round(Version),
}

/// How a conversation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It goes on.
    Going,
    /// The digests differ, and that is all that was asked.
    Differs,
    /// All that the peer had at its start is here, and for repair the other way round too.
    Done,
    /// The peer does not answer, or will not.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Digest,
    Stream(KeyHash),
    List(KeyHash),
    /// Own entries from there on are compared with the page.
    Compare(KeyHash),
    Fetch,
    /// All is asked; writes may be on their way.
    Over,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    op: u64,
    at: Millis,
    again: Millis,
    /// The answer moves data, for which the bucket has given something.
    moves: bool,
}

/// Counters of conversations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncStats {
    /// Conversations begun.
    pub begun: u64,
    /// Digests that were equal at once.
    pub equal: u64,
    /// Conversations that failed.
    pub failed: u64,
    /// Entries that came and were newer than what was here.
    pub pulled: u64,
    /// Entries that were sent because they are newer here.
    pub pushed: u64,
    /// Bytes of lists and entries that came or were sent.
    pub bytes: u64,
    /// Entries that were refused here: absent, and older than what may still appear.
    pub below_floor: u64,
    /// How often memory was full.
    pub full: u64,
}

/// What a conversation uses of its machine.
pub(crate) struct Shared<'a> {
    pub(crate) bucket: &'a mut Bucket,
    pub(crate) stats: &'a mut SyncStats,
}

/// A conversation about one shard with one peer.
#[derive(Debug)]
pub(crate) struct Session {
    kind: Kind,
    pub(crate) shard: ShardId,
    epoch: u64,
    pub(crate) peer: NodeNo,
    /// Number of the next question.
    pub(crate) op: u64,
    step: Step,
    asked: Option<Asked>,
    tries: u32,
    pause: Millis,
    /// Where streaming goes on, as long as this core lacks most.
    pub(crate) stream: Option<KeyHash>,
    /// Whether the stream began at the first hash: then there is nothing left to compare.
    whole: bool,
    /// Ends at the digest.
    pub(crate) look_only: bool,
    leaves: u16,
    items: Vec<Item>,
    page_end: Option<KeyHash>,
    wants: Vec<KeyHash>,
    pushes: BTreeSet<u64>,
    pushed_at: Millis,
    /// As many writes are under way as may be.
    waits: bool,
    /// Entries that differed.
    pub(crate) differences: u64,
    /// What other sources had brought was given up: they have to be asked again.
    pub(crate) shed: bool,
    /// One side holds something that the other refuses, absent there and below its floor: only a round of purging makes them equal.
    pub(crate) uneven: bool,
}

impl Session {
    /// `number` must be of the machine's own, with its tag in the highest bits; see [`Session::number`].
    pub(crate) fn new(kind: Kind, shard: ShardId, epoch: u64, peer: NodeNo, number: u64) -> Session {
        Session {
            kind,
            shard,
            epoch,
            peer,
            op: number,
            step: Step::Digest,
            asked: None,
            tries: 0,
            pause: 0,
            stream: None,
            whole: false,
            look_only: false,
            leaves: 0,
            items: Vec::new(),
            page_end: None,
            wants: Vec::new(),
            pushes: BTreeSet::new(),
            pushed_at: 0,
            waits: false,
            differences: 0,
            shed: false,
            uneven: false,
        }
    }

    /// The first operation number of the `n`-th conversation of a machine.
    pub(crate) fn number(tag: u64, n: u64) -> u64 {
        tag | (n & 0xffff_ffff) << SEQUENCE_BITS
    }

    /// Skips the digest: these leaves differ.
    pub(crate) fn list(&mut self, cx: &Context<'_>, leaves: u16) {
        self.leaves = leaves;
        self.step = self.list_from(cx, Some(cx.view.keyspace().first_hash(self.shard)));
    }

    fn ask(&mut self, cx: &Context<'_>) -> Ask {
        let op = self.op;
        self.op += 1;
        let at = cx.now.mono;
        self.asked = Some(Asked { op, at, again: at + AGAIN_MS, moves: false });
        Ask { op, shard: self.shard, epoch: self.epoch, left_ms: 0 }
    }

    /// A question whose answer moves data.
    fn ask_for_data(&mut self, cx: &Context<'_>, shared: &mut Shared<'_>) -> Ask {
        let ask = self.ask(cx);
        shared.bucket.asked();
        self.asked.iter_mut().for_each(|asked| asked.moves = true);
        ask
    }

    /// Asks what is to be asked now.
    pub(crate) fn go(&mut self, cx: &mut Context<'_>, shared: &mut Shared<'_>) -> Progress {
        loop {
            self.waits = self.pushes.len() >= cx.pages.window;
            if self.asked.is_some() || self.pause > cx.now.mono {
                return Progress::Going;
            }
            if self.kind == Kind::Fill && cx.store.is_shedding(self.shard) {
                match self.shed_slice(cx) {
                    Ok(true) => return Progress::Going,
                    Ok(false) => {}
                    Err(progress) => return progress,
                }
            }
            let to = [self.peer];
            if self.step != Step::Digest && self.step != Step::Over && !shared.bucket.ready(cx.now.mono) {
                self.pause = shared.bucket.ready_at().max(cx.now.mono + 1);
                return Progress::Going;
            }
            match self.step {
                Step::Digest => {
                    let ask = self.ask(cx);
                    cx.out.send(&to, Class::Background, &Message::Digest(ask));
                }
                Step::Stream(at) => {
                    let ask = self.ask_for_data(cx, shared);
                    cx.out.send(&to, Class::Background, &Message::Stream(ask, at));
                }
                Step::List(at) => {
                    let ask = self.ask_for_data(cx, shared);
                    cx.out.send(&to, Class::Background, &Message::List(ask, at, self.leaves));
                }
                Step::Compare(from) => {
                    if self.waits {
                        return Progress::Going;
                    }
                    self.step = match self.compare(cx, shared, from) {
                        Some(next) => Step::Compare(next),
                        None => Step::Fetch,
                    };
                }
                Step::Fetch if self.wants.is_empty() => self.step = self.list_from(cx, self.page_end),
                Step::Fetch => {
                    let hashes: Vec<u8> =
                        self.wants.iter().take(cx.pages.fetched).flat_map(|hash| hash.0.to_le_bytes()).collect();
                    let ask = self.ask_for_data(cx, shared);
                    cx.out.send(&to, Class::Background, &Message::Fetch(ask, Message::hashes(&hashes)));
                }
                Step::Over if self.pushes.is_empty() => return Progress::Done,
                Step::Over => return Progress::Going,
            }
        }
    }

    /// Where the next page of differing leaves begins, from a place on.
    fn list_from(&self, cx: &Context<'_>, from: Option<KeyHash>) -> Step {
        let Some(from) = from else { return Step::Over };
        let keyspace = cx.view.keyspace();
        let shift = 60 - keyspace.shards.bits();
        let first = keyspace.first_hash(self.shard).0;
        let leaf = (from.0.max(first) - first) >> shift;
        match (leaf..LEAVES as u64).find(|leaf| self.leaves >> leaf & 1 == 1) {
            Some(next) if next == leaf => Step::List(from),
            Some(next) => Step::List(KeyHash(first | next << shift)),
            None => Step::Over,
        }
    }

    /// An answer came. `None` when it is not one of this conversation's.
    pub(crate) fn on_answer(
        &mut self,
        cx: &mut Context<'_>,
        shared: &mut Shared<'_>,
        from: NodeNo,
        message: &Message<'_>,
    ) -> Option<Progress> {
        let ask = message.ask();
        if from != self.peer || ask.shard != self.shard {
            return None;
        }
        if self.pushes.remove(&ask.op) {
            // Refused or not: the next look at the digests tells. But not what was pushed because it hides something.
            let refused = matches!(message, Message::Refused(..)) && matches!(self.kind, Kind::Round(_));
            self.differences += u64::from(refused);
            self.uneven |= matches!(message, Message::Refused(_, Why::BelowFloor));
            return Some(self.go(cx, shared));
        }
        if self.asked.is_none_or(|asked| asked.op != ask.op) {
            return None;
        }
        if let Message::Refused(_, why) = message {
            return Some(self.on_refused(cx, shared, ask, *why));
        }
        if ask.epoch != self.epoch {
            return None;
        }
        let taken = match (*message, self.step) {
            (Message::Digested(_, digest, floor), Step::Digest) => self.on_digested(cx, shared, &digest, floor),
            (Message::Listed(_, next, items), Step::List(at)) => {
                shared.stats.bytes += items.iter().len() as u64 * 24;
                shared.bucket.spend(items.iter().len() * 24);
                self.items = items.iter().collect();
                self.items.sort_unstable();
                // A place that does not move on would never end.
                let next = next_page(cx, next);
                if next.is_some_and(|next| next <= at) {
                    return Some(Progress::Failed);
                }
                self.page_end = next;
                self.step = Step::Compare(at);
                Ok(())
            }
            (Message::Entries(_, next, packed), Step::Stream(at)) => self.take(cx, shared, packed).and_then(|()| {
                let next = next_page(cx, next);
                if next.is_some_and(|next| next <= at) {
                    return Err(Progress::Failed);
                }
                self.stream = next;
                self.step = match next {
                    Some(next) => Step::Stream(next),
                    None if self.whole => Step::Over,
                    // The beginning came from another source.
                    None => Step::Digest,
                };
                Ok(())
            }),
            (Message::Entries(_, _, packed), Step::Fetch) => self.take(cx, shared, packed).map(|()| {
                let asked = self.wants.len().min(cx.pages.fetched);
                let last = packed.iter().last().map(|stored| stored.hash);
                // It may have been full before the end. How much fits is for the source to say, so what comes after the last one
                // is asked for again, until nothing of it comes.
                let at = last.and_then(|last| self.wants[..asked].iter().position(|hash| *hash == last));
                self.wants.drain(..at.map_or(asked, |at| at + 1));
            }),
            _ => return None,
        };
        if let Some(asked) = self.asked.take().filter(|asked| asked.moves) {
            shared.bucket.answered(cx.now.mono, from, asked.at);
        }
        self.tries = 0;
        Some(match taken {
            Ok(()) => self.go(cx, shared),
            Err(progress) => progress,
        })
    }

    fn on_digested(
        &mut self,
        cx: &mut Context<'_>,
        shared: &mut Shared<'_>,
        digest: &Digest,
        floor: Version,
    ) -> Result<(), Progress> {
        let shard = self.shard;
        if self.kind == Kind::Fill {
            // What is here and not above the floor of the source was taken without knowing it: from a time when this node
            // was out of the set, or as a late write. It may have been deleted, and the tombstone purged. What is above
            // stays: it may have been written in this very epoch, and this copy's answer have counted. What an earlier source
            // of this epoch has brought goes with it, though it serves and holds it: it is asked for it again.
            let missed = floor > cx.store.tombstone_floor(shard) && cx.store.digest(shard).count > 0;
            if cx.planted.has(Bug::SyncClears) {
                let _ = cx.store.drop_shard(shard, 0);
            } else if missed {
                cx.store.shed_below(shard, floor);
            }
            if missed || cx.planted.has(Bug::SyncClears) {
                self.stream = Some(cx.view.keyspace().first_hash(shard));
            }
            cx.store.raise_floor(shard, floor);
            if cx.store.is_shedding(shard) {
                // The digest is asked for once more when that is through.
                return Ok(());
            }
        }
        let own = cx.store.digest(shard);
        if own == *digest {
            shared.stats.equal += 1;
            self.step = Step::Over;
            self.stream = None;
            return Ok(());
        }
        if self.look_only {
            return Err(Progress::Differs);
        }
        if self.kind == Kind::Repair && cx.planted.has(Bug::SyncClears) {
            let _ = cx.store.drop_shard(shard, 0);
        }
        if let Some(at) = self.stream {
            self.whole = at == cx.view.keyspace().first_hash(shard);
            self.step = Step::Stream(at);
            return Ok(());
        }
        self.list(cx, differing(&own, digest));
        Ok(())
    }

    /// Sheds a part of what is below the floor, the next one not before the next millisecond: clients' operations come between.
    /// Whether there is more.
    fn shed_slice(&mut self, cx: &mut Context<'_>) -> Result<bool, Progress> {
        let shed = cx.store.shed(self.shard, cx.pages.entries);
        self.shed |= shed.as_ref().map_or(true, |shed| shed.forgotten > 0);
        let more = shed.map_err(|_| Progress::Failed)?.more;
        // Behind the last one nothing has to wait.
        self.pause = cx.now.mono + Millis::from(more);
        Ok(more)
    }

    fn on_refused(&mut self, cx: &mut Context<'_>, shared: &mut Shared<'_>, ask: Ask, why: Why) -> Progress {
        let asked = self.asked.take();
        if let Some(asked) = asked.filter(|asked| asked.moves && why == Why::Busy) {
            shared.bucket.on_slow(cx.now.mono, asked.at);
        }
        match why {
            Why::Stale => cx.out.want_map(ask.epoch),
            Why::Behind | Why::Busy if self.tries < 10 * TRIES => {
                self.tries += 1;
                self.pause = cx.now.mono + PAUSE_MS;
                return Progress::Going;
            }
            _ => {}
        }
        shared.stats.failed += 1;
        Progress::Failed
    }

    /// Takes entries of the peer.
    fn take(&mut self, cx: &mut Context<'_>, shared: &mut Shared<'_>, packed: Packed<'_>) -> Result<(), Progress> {
        shared.stats.bytes += packed.bytes() as u64;
        shared.bucket.spend(packed.bytes());
        for Stored { hash, entry } in packed.iter() {
            if cx.view.keyspace().locate(entry.key) != hash || cx.view.shard(hash) != self.shard {
                shared.stats.failed += 1;
                return Err(Progress::Failed);
            }
            let expires_at = match cx.planted.has(Bug::FillNeverExpires) && self.kind == Kind::Fill {
                true => 0,
                false => entry.expires_at,
            };
            let entry = Entry { expires_at, ..entry };
            let exempt = match self.kind {
                Kind::Fill | Kind::Round(_) => true,
                Kind::Repair => false,
            };
            let taken = match exempt {
                true => cx.store.fill(entry, cx.now.wall),
                // A tombstone that another one took below its floor comes to all, the orderer too, which purges it once more.
                false => replica::store(cx, entry),
            };
            match taken {
                Ok(Merged::Applied) => shared.stats.pulled += 1,
                Ok(Merged::Stale) => {}
                Ok(Merged::BelowFloor) => {
                    shared.stats.below_floor += 1;
                    self.uneven = true;
                }
                Err(StoreError::OutOfMemory | StoreError::Clock(_)) if self.kind == Kind::Fill => {
                    // A copy with a hole is none: it asks for the same again, until there is room.
                    shared.stats.full += 1;
                    self.pause = cx.now.mono + FULL_MS;
                    return Err(Progress::Going);
                }
                // The others find it in their next round.
                Err(StoreError::OutOfMemory) => {
                    shared.stats.full += 1;
                    return Err(Progress::Failed);
                }
                Err(StoreError::Clock(_)) => self.differences += u64::from(matches!(self.kind, Kind::Round(_))),
                Err(_) => {
                    shared.stats.failed += 1;
                    return Err(Progress::Failed);
                }
            }
        }
        Ok(())
    }

    /// Compares some own entries from `from` on with the page; where to go on, `None` when the page is through.
    fn compare(&mut self, cx: &mut Context<'_>, shared: &mut Shared<'_>, from: KeyHash) -> Option<KeyHash> {
        let (keyspace, leaves, end) = (cx.view.keyspace(), self.leaves, self.page_end);
        let mut own: Vec<Item> = Vec::with_capacity(cx.pages.compared);
        let next = cx.store.snapshot(self.shard, from, cx.pages.compared, &mut |entry| {
            let hash = keyspace.locate(entry.key);
            if leaves >> leaf_of(keyspace, hash) & 1 == 1 && end.is_none_or(|end| hash < end) {
                own.push(Item { hash, version: entry.version });
            }
        });
        let until = match (next, end) {
            (Some(next), Some(end)) => Some(next.min(end)),
            (next, end) => next.or(end),
        };
        let listed = until.map_or(self.items.len(), |until| self.items.partition_point(|item| item.hash < until));
        let there: Vec<Item> = self.items.drain(..listed).collect();
        own.sort_unstable();
        for (only_here, only_there) in differences(&own, &there) {
            self.judge(cx, shared, &only_here, &only_there);
        }
        next.filter(|next| end.is_none_or(|end| *next < end))
    }

    /// What to do about one hash of which the copies hold different versions.
    fn judge(&mut self, cx: &mut Context<'_>, shared: &mut Shared<'_>, here: &[Item], there: &[Item]) {
        let newest = |items: &[Item]| items.iter().map(|item| item.version).max().unwrap_or_default();
        let (ours, theirs) = (newest(here), newest(there));
        let hash = here.first().or(there.first()).expect("one of them holds something").hash;
        let is_young = |version: Version| version.hlc.millis() + YOUNG_MS > cx.now.wall;
        match self.kind {
            // Whatever is newer here, the peer's may be of another key with the same hash.
            Kind::Fill if there.is_empty() => return,
            Kind::Fill => {
                self.differences += 1;
                self.wants.push(hash);
                return;
            }
            Kind::Repair if is_young(ours.max(theirs)) => return,
            Kind::Round(until) => {
                let is_old = here.iter().chain(there).any(|item| item.version <= until);
                if !is_old {
                    return;
                }
                // One key, and what is newer stays. It goes to the other side, where it hides the older; for the round that is
                // no difference, or a shard that is written all the time would never be done.
                let is_hidden = here.len() <= 1 && there.len() <= 1 && ours.max(theirs) > until;
                self.differences += u64::from(!is_hidden);
            }
            Kind::Repair => self.differences += 1,
        }
        if theirs > ours {
            self.wants.push(hash);
            return;
        }
        let (shard, epoch, peer) = (self.shard, self.epoch, self.peer);
        let Context { store, out, .. } = cx;
        store.by_hash(shard, hash, &mut |entry: Entry<'_>| {
            let ask = Ask { op: self.op, shard, epoch, left_ms: 0 };
            self.op += 1;
            self.pushes.insert(ask.op);
            shared.stats.pushed += 1;
            shared.stats.bytes += (entry.key.len() + entry.value.len()) as u64;
            shared.bucket.spend(entry.key.len() + entry.value.len());
            out.send(&[peer], Class::Background, &Message::Write(ask, Stored { hash, entry }));
        });
        self.pushed_at = cx.now.mono;
    }

    /// When to look again.
    pub(crate) fn next_deadline(&self) -> Millis {
        match self.asked {
            Some(asked) => asked.again,
            None if self.step == Step::Over || self.waits => self.pushed_at + AGAIN_MS,
            None => self.pause,
        }
    }

    /// Time has passed.
    pub(crate) fn on_deadline(&mut self, cx: &mut Context<'_>, shared: &mut Shared<'_>) -> Progress {
        let now = cx.now.mono;
        if let Some(asked) = self.asked
            && asked.again <= now
        {
            self.tries += 1;
            if asked.moves {
                shared.bucket.on_slow(now, asked.at);
            }
            if self.tries >= TRIES {
                shared.stats.failed += 1;
                return Progress::Failed;
            }
            self.asked = None;
        }
        if self.pushed_at + AGAIN_MS <= now {
            // Lost on the way: found again next time.
            if matches!(self.kind, Kind::Round(_)) {
                self.differences += self.pushes.len() as u64;
            }
            self.pushes.clear();
        }
        self.go(cx, shared)
    }

    /// Whether what it holds is bounded.
    pub(crate) fn invariants(&self) {
        assert!(self.pushes.len() < MAX_PUSHED, "writes to a peer are bounded");
        assert!(self.asked.is_none() || self.step != Step::Over, "nothing is asked when all is asked");
    }
}

/// Writes under way, about: what a page, and what is compared at once, may add to a window.
const MAX_PUSHED: usize = 64 + 2 * 512 + 2048;

/// Where the next page begins.
fn next_page(cx: &Context<'_>, next: Option<KeyHash>) -> Option<KeyHash> {
    let late = u64::from(cx.planted.has(Bug::PageTooLate));
    next.map(|next| KeyHash(next.0.saturating_add(late)))
}

/// The leaves in which two digests differ; all, when only their counts do.
pub(crate) fn differing(a: &Digest, b: &Digest) -> u16 {
    let mask = (0..LEAVES).filter(|&leaf| a.leaves[leaf] != b.leaves[leaf]).fold(0, |mask, leaf| mask | 1 << leaf);
    if mask == 0 { u16::MAX } else { mask }
}

/// By hash, what only one of two sorted lists holds. Several keys may have one hash.
fn differences(own: &[Item], there: &[Item]) -> Vec<(Vec<Item>, Vec<Item>)> {
    let (mut found, mut own, mut there) = (Vec::new(), own, there);
    loop {
        let Some(hash) = own.first().into_iter().chain(there.first()).map(|item| item.hash).min() else { return found };
        let (a, rest) = own.split_at(own.partition_point(|item| item.hash <= hash));
        own = rest;
        let (b, rest) = there.split_at(there.partition_point(|item| item.hash <= hash));
        there = rest;
        if a != b {
            let minus = |a: &[Item], b: &[Item]| a.iter().copied().filter(|item| !b.contains(item)).collect::<Vec<_>>();
            let (only_own, only_there) = (minus(a, b), minus(b, a));
            if !only_own.is_empty() || !only_there.is_empty() {
                found.push((only_own, only_there));
            }
        }
    }
}

#[cfg(test)]
mod tests;
