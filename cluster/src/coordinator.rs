//! One client operation, from its first message to its answer.
//!
//! ```text
//!   write   ── Write to all ──▶ w good answers ──▶ done
//!   read    ── Read to r ─────▶ equal versions ──▶ done                    one round trip
//!                          └──▶ versions differ ─▶ fetch the newest if need be ─▶ write it back until w have it ─▶ done
//!   delete  ── as a read ─────▶ absent: done; else a write of a tombstone
//! ```
//!
//! The write-back before the answer ("blocking read repair") makes quorum reads monotonic: a version that was read once
//! is on a quorum, so no later read misses it. A write that too few replicas confirm in time is [`Outcome::Unknown`], never
//! a failure: it may be there. Whatever is sent again carries the same version, so it cannot overtake what came later.
//!
//! Contract: every operation ends, at its deadline at the latest. An operation counts answers of one shard epoch only; when
//! the map changes the shard under way, it starts again with the same version.
//!
//! Not here: what a replica does with a message ([`crate::replica`]), and which answers make a quorum ([`crate::quorum`]).

use std::collections::BTreeMap;

use gridkv_engine::Millis;
use gridkv_engine::hash::KeyHash;
use gridkv_engine::hlc::Version;
use gridkv_engine::record::Entry;
use gridkv_engine::store::Merged;

use crate::ids::NodeNo;
use crate::map::{Placement, Stage};
use crate::outbox::{Changed, Class, Failure, Found, Outcome, Value};
use crate::planted::Bug;
use crate::quorum::{Level, Standing, Tally};
use crate::replica;
use crate::shards::Context;
use crate::wire::{Ask, Message, Stored, Why};

/// Bounds of a coordinator.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Operations under way on a core, at most.
    pub operations: usize,
    /// Bytes that those operations hold, at most.
    pub bytes: usize,
    /// How long an operation may take.
    pub timeout_ms: Millis,
    /// When those that have not answered are asked again, or others instead: once.
    pub again_ms: Millis,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { operations: 16 << 10, bytes: 256 << 20, timeout_ms: 1000, again_ms: 100 }
    }
}

/// An entry that an operation holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    value: Vec<u8>,
    version: Version,
    expires_at: Millis,
    tombstone: bool,
}

impl Held {
    fn of(entry: &Entry<'_>) -> Held {
        let Entry { value, version, expires_at, tombstone, .. } = *entry;
        Held { value: value.to_vec(), version, expires_at, tombstone }
    }

    fn entry<'a>(&'a self, key: &'a [u8]) -> Entry<'a> {
        let Held { value, version, expires_at, tombstone } = self;
        Entry { key, value, version: *version, expires_at: *expires_at, tombstone: *tombstone }
    }

    fn is_live(&self, wall: Millis) -> bool {
        !self.tombstone && (self.expires_at == 0 || self.expires_at > wall)
    }
}

/// What follows a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// The client gets the value.
    Answer,
    /// The key is deleted, if it is there.
    Delete,
    /// One key less to wait for, of a command: the number of the key.
    Join(u32),
}

#[derive(Debug)]
enum Phase {
    /// Replicas are storing `held`.
    Write { held: Held, then: Option<Then>, existed: bool },
    /// Replicas are asked for what they have.
    Collect { versions: Vec<(NodeNo, Version)>, best: Option<Held>, then: Then },
    /// The replica with the newest version is asked for its value.
    Fetch { versions: Vec<(NodeNo, Version)>, from: NodeNo, then: Then },
    /// The orderer runs a request of so many bytes.
    Order { to: NodeNo, request: usize },
}

#[derive(Debug)]
struct Op {
    token: u64,
    hash: KeyHash,
    key: Box<[u8]>,
    level: Level,
    epoch: u64,
    deadline: Millis,
    /// When those that are silent are asked again; `Millis::MAX` after that.
    again: Millis,
    tally: Tally,
    phase: Phase,
    /// Whether a replica may have stored something of this operation.
    begun: bool,
    /// Replicas that refused its version as too far in the future.
    ahead: usize,
    /// Replicas that refused it because their memory is full.
    full: usize,
    /// To how many it was sent as a write at first.
    asked: usize,
    /// How often it was sent out as a write.
    sent: u32,
    /// It belongs to the epoch in which it began: in a later one another orderer may have run commands without it.
    ordered: bool,
    /// What it counts among the bytes of all: its weight when that was looked at last.
    bytes: usize,
}

impl Op {
    /// Keeps the write for replicas that are away, once somebody has it: what nobody has must not appear later.
    fn keep_hints(&self, cx: &mut Context<'_>) {
        let Phase::Write { held, .. } = &self.phase else { return };
        if self.tally.answered().is_empty() {
            return;
        }
        let (placement, shard) = (cx.view.placement_of(self.hash), cx.view.shard(self.hash));
        let stored = Stored { hash: self.hash, entry: held.entry(&self.key) };
        for node in placement.written().filter(|&node| node != cx.view.me && !self.tally.has(node)) {
            if !cx.view.is_alive(node) {
                cx.hints.keep(cx.now, node, shard, &stored);
            }
        }
    }

    /// Bytes of the key and of the value that it holds.
    fn weight(&self) -> usize {
        let held = match &self.phase {
            Phase::Write { held, .. } => held.value.len(),
            Phase::Collect { best, .. } => best.as_ref().map_or(0, |best| best.value.len()),
            Phase::Fetch { .. } => 0,
            Phase::Order { request, .. } => *request,
        };
        self.key.len() + held
    }
}

/// Keys of an ordered command that are being brought up to date.
#[derive(Debug)]
struct Joined {
    left: usize,
    failed: Option<Outcome>,
    /// What was read, by the number of the key; `None` for writes.
    found: Option<Vec<Found>>,
    /// Writes that are on a quorum.
    written: usize,
    /// Bytes of the command, and of the values that were found.
    bytes: usize,
    /// Of those, the command's.
    payload: usize,
}

impl Joined {
    fn of(keys: usize, found: Option<Vec<Found>>, payload: usize) -> Joined {
        // One more than there are keys: the last is taken when all have begun, so that nothing is ready before.
        Joined { left: keys + 1, failed: None, found, written: 0, bytes: payload, payload }
    }

    fn weight(&self) -> usize {
        let values = self.found.iter().flatten().flat_map(|found| &found.value);
        self.payload + values.map(|value| value.bytes.len()).sum::<usize>()
    }
}

/// A place for an operation; its generation tells a late answer from a fitting one.
#[derive(Debug)]
struct Place {
    generation: u32,
    op: Option<Op>,
}

/// Counters of a coordinator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CoordinatorStats {
    /// Operations begun.
    pub begun: u64,
    /// Ended as [`Outcome::Unknown`].
    pub unknown: u64,
    /// Ended as [`Outcome::Failed`].
    pub failed: u64,
    /// Reads that met replicas of different versions.
    pub read_repairs: u64,
    /// Operations that were started again because the map changed their shard.
    pub restarted: u64,
    /// Operations that asked again because somebody was silent.
    pub asked_again: u64,
    /// Operations under way.
    pub under_way: u64,
}

/// The operations of one core.
#[derive(Debug)]
pub(crate) struct Coordinator {
    limits: Limits,
    places: Vec<Place>,
    free: Vec<u32>,
    joined: BTreeMap<u64, Joined>,
    bytes: usize,
    stats: CoordinatorStats,
}

/// How an entry is written.
struct Writing {
    token: u64,
    level: Level,
    deadline: Millis,
    /// What the client waits for besides the write.
    then: Option<Then>,
    /// The write is the tombstone of a key that was there.
    existed: bool,
    /// It is what an ordered command wrote.
    ordered: bool,
}

/// How a key is read and what comes of it.
struct Reading {
    token: u64,
    level: Level,
    deadline: Millis,
    then: Then,
}

impl Coordinator {
    pub(crate) fn new(limits: Limits) -> Coordinator {
        Coordinator {
            limits,
            places: Vec::new(),
            free: Vec::new(),
            joined: BTreeMap::new(),
            bytes: 0,
            stats: CoordinatorStats::default(),
        }
    }

    pub(crate) fn stats(&self) -> CoordinatorStats {
        CoordinatorStats { under_way: self.under_way() as u64, ..self.stats }
    }

    pub(crate) fn under_way(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// When to look at the operations again.
    pub(crate) fn next_deadline(&self) -> Option<Millis> {
        self.places.iter().flat_map(|place| &place.op).map(|op| op.deadline.min(op.again)).min()
    }

    fn insert(&mut self, op: Op) -> u64 {
        self.stats.begun += 1;
        self.bytes += op.bytes;
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { generation: 0, op: None });
            self.places.len() as u32 - 1
        });
        let place = &mut self.places[index as usize];
        // The highest bits of an operation's number say whose it is.
        place.generation = ((place.generation + 1) % GENERATIONS).max(1);
        place.op = Some(op);
        u64::from(place.generation) << 32 | u64::from(index)
    }

    fn place(&mut self, number: u64) -> Option<&mut Op> {
        let place = self.places.get_mut(number as u32 as usize)?;
        if place.generation == (number >> 32) as u32 { place.op.as_mut() } else { None }
    }

    fn remove(&mut self, number: u64) -> Option<Op> {
        let place = self.places.get_mut(number as u32 as usize)?;
        if place.generation != (number >> 32) as u32 {
            return None;
        }
        let op = place.op.take()?;
        self.free.push(number as u32);
        self.bytes -= op.bytes;
        Some(op)
    }

    /// As [`Coordinator::admit`], for what makes versions.
    fn admit_write(&mut self, cx: &mut Context<'_>, token: u64, bytes: usize) -> bool {
        if !cx.view.quarantined {
            return self.admit(cx, token, bytes);
        }
        self.stats.failed += 1;
        cx.out.done(token, Outcome::Failed(Failure::Clock));
        false
    }

    /// Whether one more operation of that many bytes is taken.
    fn admit(&mut self, cx: &mut Context<'_>, token: u64, bytes: usize) -> bool {
        let failure = if cx.view.me == NodeNo(0) {
            Failure::NotAdmitted
        } else if self.under_way() >= self.limits.operations || self.is_too_much(self.bytes, bytes) {
            Failure::Busy
        } else {
            return true;
        };
        self.stats.failed += 1;
        cx.out.done(token, Outcome::Failed(failure));
        false
    }

    /// Whether so many bytes more are too many beside those of the others. What is alone, or nearly, may be as large as it is.
    fn is_too_much(&self, others: usize, more: usize) -> bool {
        others + more > self.limits.bytes && others > self.limits.bytes / 2
    }

    /// Counts what an operation holds now, and ends it if that is too much: a read that has just got its value.
    fn holds(&mut self, cx: &mut Context<'_>, number: u64) {
        self.weigh(number);
        let Some(op) = self.place(number) else { return };
        let (token, bytes) = (op.token, op.bytes);
        if self.bytes <= self.limits.bytes {
            return;
        }
        let own = self.bytes_of(token).unwrap_or(bytes);
        if self.is_too_much(self.bytes - own, own) {
            self.end(cx, number, Outcome::Failed(Failure::Busy));
        }
    }

    /// What a command over several keys holds: its other keys are no others.
    fn bytes_of(&self, token: u64) -> Option<usize> {
        let ops = self.places.iter().flat_map(|place| &place.op).filter(|op| op.token == token);
        self.joined.get(&token).map(|joined| joined.bytes + ops.map(|op| op.bytes).sum::<usize>())
    }

    /// Counts what an operation holds now.
    fn weigh(&mut self, number: u64) {
        let Some(op) = self.place(number) else { return };
        let (before, now) = (op.bytes, op.weight());
        op.bytes = now;
        self.bytes = self.bytes + now - before;
    }

    /// Begins a command over several keys.
    fn insert_joined(&mut self, token: u64, joined: Joined) {
        self.bytes += joined.bytes;
        self.joined.insert(token, joined);
    }

    /// Writes an entry, or deletes blindly when `value` is `None`.
    pub(crate) fn write(
        &mut self,
        cx: &mut Context<'_>,
        token: u64,
        (hash, key): (KeyHash, &[u8]),
        value: Option<&[u8]>,
        expires_at: Millis,
        level: Level,
    ) {
        let bytes = key.len() + value.map_or(0, <[u8]>::len);
        if !self.admit_write(cx, token, bytes) {
            return;
        }
        let version = cx.store.mint(cx.now.wall);
        let held = Held { value: value.unwrap_or_default().to_vec(), version, expires_at, tombstone: value.is_none() };
        let deadline = cx.now.mono + self.limits.timeout_ms;
        self.begin_write(
            cx,
            (hash, key.into()),
            held,
            Writing { token, level, deadline, then: None, existed: false, ordered: false },
        );
    }

    fn begin_write(&mut self, cx: &mut Context<'_>, (hash, key): (KeyHash, Box<[u8]>), held: Held, writing: Writing) {
        let Writing { token, level, deadline, then, existed, ordered } = writing;
        let placement = cx.view.placement_of(hash);
        let tally = of_write(cx, placement, level);
        let bytes = key.len() + held.value.len();
        let op = Op {
            token,
            hash,
            key,
            level,
            epoch: placement.epoch,
            deadline,
            again: cx.now.mono + self.limits.again_ms,
            tally,
            phase: Phase::Write { held, then, existed },
            begun: false,
            ahead: 0,
            full: 0,
            asked: 0,
            sent: 0,
            ordered,
            bytes,
        };
        let number = self.insert(op);
        self.send_write(cx, number, true);
    }

    /// Stores here if a copy is here, and sends to every other replica that has not answered.
    fn send_write(&mut self, cx: &mut Context<'_>, number: u64, first: bool) {
        let Some(op) = self.place(number) else { return };
        if let Some(failure) = cut_off(cx, op).filter(|_| first) {
            return self.end(cx, number, Outcome::Failed(failure));
        }
        let placement = cx.view.placement_of(op.hash);
        let Phase::Write { held, .. } = &mut op.phase else { return };
        if !first && cx.planted.has(Bug::AgainWithNewVersion) {
            held.version = cx.store.mint(cx.now.wall);
        }
        let (mut to, mut away) = (Vec::new(), Vec::new());
        for node in placement.written() {
            match () {
                _ if op.tally.has(node) || node == cx.view.me => {}
                _ if cx.view.is_alive(node) => to.push(node),
                _ => away.push(node),
            }
        }
        away.iter().for_each(|&node| op.tally.fail(node));
        if cx.planted.has(Bug::HintCounts) {
            away.iter().for_each(|&node| op.tally.answer(node));
        }
        if first && !op.begun && op.tally.standing() == Standing::Impossible {
            // Nothing was sent yet: better to say no than to leave a write behind that nobody vouches for.
            return self.refuse(cx, number);
        }
        // Merging has headroom that clients have not.
        if first && !held.tombstone && placement.names(cx.view.me) && cx.store.admit().is_err() {
            return self.end(cx, number, Outcome::Failed(Failure::Full));
        }
        // The next command that this node orders must see it; and when nobody else can have it, this copy is the one.
        if op.ordered || to.is_empty() {
            self.store_own(cx, number);
        }
        let Some(op) = self.place(number) else { return };
        let Phase::Write { held, .. } = &op.phase else { return };
        let entry = held.entry(&op.key);
        let shard = cx.view.shard(op.hash);
        let left_ms = op.deadline.saturating_sub(cx.now.mono) as u32;
        let ask = Ask { op: number, shard, epoch: op.epoch, left_ms };
        let stored = Stored { hash: op.hash, entry };
        op.begun |= !to.is_empty();
        if op.sent == 0 {
            op.asked = to.len();
        }
        op.sent += 1;
        cx.out.send(&to, Class::Request, &Message::Write(ask, stored));
        op.keep_hints(cx);
        self.judge(cx, number);
    }

    /// Stores what is written in this core's own copy.
    fn store_own(&mut self, cx: &mut Context<'_>, number: u64) {
        let me = cx.view.me;
        let Some(op) = self.place(number) else { return };
        let Phase::Write { held, .. } = &op.phase else { return };
        if !cx.view.placement_of(op.hash).names(me) || op.tally.has(me) || op.tally.has_failed(me) {
            return;
        }
        match replica::store(cx, held.entry(&op.key)) {
            Ok(Merged::Applied | Merged::Stale) => {
                op.begun = true;
                op.tally.answer(me);
                op.keep_hints(cx);
            }
            Ok(Merged::BelowFloor) | Err(_) => op.tally.fail(me),
        }
    }

    /// Stores in this core's own copy once another replica has, or when no other can any more. So what a clock that is far ahead
    /// has made is refused by the others before it is anywhere.
    fn follow_own(&mut self, cx: &mut Context<'_>, number: u64) {
        let me = cx.view.me;
        let Some(op) = self.place(number) else { return };
        if !matches!(op.phase, Phase::Write { .. }) {
            return;
        }
        let placement = cx.view.placement_of(op.hash);
        let alone = placement.written().all(|node| node == me || op.tally.has_failed(node));
        if alone && op.tally.answered().is_empty() && !op.ordered {
            // Only if all that it was sent to have refused it, nobody has it; no hint of it was kept. What was sent twice to a
            // clock that is set in between may be refused the one time and stored the other.
            let nowhere = op.ahead + op.full >= op.asked && op.sent <= 1;
            let (ahead, full, need) = (op.ahead > 0, op.full > 0, op.tally.need());
            match () {
                _ if nowhere && ahead => return self.end(cx, number, Outcome::Failed(Failure::Clock)),
                _ if nowhere && full => return self.end(cx, number, Outcome::Failed(Failure::Full)),
                _ if ahead => return self.end(cx, number, Outcome::Unknown { have: 0, need }),
                _ => {}
            }
        }
        if alone || !op.tally.answered().is_empty() {
            self.store_own(cx, number);
        }
    }

    /// Reads a key.
    pub(crate) fn read(&mut self, cx: &mut Context<'_>, token: u64, hash: KeyHash, key: &[u8], level: Level) {
        self.start_read(cx, token, hash, key, level, Then::Answer);
    }

    /// Deletes a key if it is there.
    pub(crate) fn delete(&mut self, cx: &mut Context<'_>, token: u64, hash: KeyHash, key: &[u8], level: Level) {
        self.start_read(cx, token, hash, key, level, Then::Delete);
    }

    fn start_read(&mut self, cx: &mut Context<'_>, token: u64, hash: KeyHash, key: &[u8], level: Level, then: Then) {
        let admitted = match then {
            Then::Delete => self.admit_write(cx, token, key.len()),
            Then::Answer | Then::Join(_) => self.admit(cx, token, key.len()),
        };
        if admitted {
            let deadline = cx.now.mono + self.limits.timeout_ms;
            self.begin_read(cx, hash, key.into(), Reading { token, level, deadline, then });
        }
    }

    /// Reads keys, for a command that runs next.
    pub(crate) fn prepare(
        &mut self,
        cx: &mut Context<'_>,
        token: u64,
        keys: &[(KeyHash, &[u8])],
        payload: usize,
        level: Level,
        deadline: Millis,
    ) {
        let bytes = keys.iter().map(|(_, key)| key.len()).sum::<usize>();
        if !self.admit(cx, token, bytes + payload) {
            return;
        }
        let since = cx.store.mint(cx.now.wall);
        let nothing = |&(hash, key): &(KeyHash, &[u8])| Found {
            hash,
            key: key.into(),
            value: None,
            newest: Version::ZERO,
            since,
        };
        let found = keys.iter().map(nothing).collect();
        self.insert_joined(token, Joined::of(keys.len(), Some(found), payload));
        for (number, (hash, key)) in keys.iter().enumerate() {
            let then = Then::Join(number as u32);
            self.begin_read(cx, *hash, (*key).into(), Reading { token, level, deadline, then });
        }
        self.join(cx, token, None);
    }

    /// Writes what a command changed.
    pub(crate) fn commit(
        &mut self,
        cx: &mut Context<'_>,
        token: u64,
        changes: Vec<Changed>,
        level: Level,
        ordered: bool,
        deadline: Millis,
    ) {
        let bytes = changes.iter().map(|c| c.key.len() + c.value.as_ref().map_or(0, Vec::len)).sum();
        if !self.admit_write(cx, token, bytes) {
            return;
        }
        self.insert_joined(token, Joined::of(changes.len(), None, 0));
        for Changed { hash, key, value, expires_at, version } in changes {
            let version = version.unwrap_or_else(|| cx.store.mint(cx.now.wall));
            let tombstone = value.is_none();
            let held = Held { value: value.unwrap_or_default(), version, expires_at, tombstone };
            let writing = Writing { token, level, deadline, then: Some(Then::Join(0)), existed: false, ordered };
            self.begin_write(cx, (hash, key), held, writing);
        }
        self.join(cx, token, None);
    }

    /// One key of a joined operation is through.
    fn join(&mut self, cx: &mut Context<'_>, token: u64, failed: Option<Outcome>) {
        let Some(joined) = self.joined.get_mut(&token) else { return };
        joined.left -= 1;
        joined.written += usize::from(failed.is_none());
        // Of several bad ends the one that leaves more open is told.
        if failed.is_some() && !matches!(joined.failed, Some(Outcome::Unknown { .. })) {
            joined.failed = failed;
        }
        if joined.left == 0 {
            let Some(joined) = self.joined.remove(&token) else { return };
            self.bytes -= joined.bytes;
            let outcome = match (joined.failed, joined.found) {
                // The last of them is nobody's: see `commit`.
                (Some(Outcome::Failed(failure)), None) if joined.written > 1 => Outcome::Part(failure),
                (Some(failed), _) => failed,
                (None, Some(found)) => Outcome::Ready(found),
                (None, None) => Outcome::Committed,
            };
            cx.out.done(token, outcome);
        }
    }

    fn begin_read(&mut self, cx: &mut Context<'_>, hash: KeyHash, key: Box<[u8]>, reading: Reading) {
        let placement = cx.view.placement_of(hash);
        let tally = of_read(cx, placement, reading.level);
        let bytes = key.len();
        let op = Op {
            token: reading.token,
            hash,
            key,
            level: reading.level,
            epoch: placement.epoch,
            deadline: reading.deadline,
            again: cx.now.mono + self.limits.again_ms,
            tally,
            phase: Phase::Collect { versions: Vec::new(), best: None, then: reading.then },
            begun: false,
            ahead: 0,
            full: 0,
            asked: 0,
            sent: 0,
            ordered: false,
            bytes,
        };
        let number = self.insert(op);
        self.send_read(cx, number, false);
    }

    /// Looks here if a readable copy is here, and asks as many others as are needed; all others when `more`.
    fn send_read(&mut self, cx: &mut Context<'_>, number: u64, more: bool) {
        let Some(op) = self.place(number) else { return };
        if let Some(failure) = cut_off(cx, op) {
            return self.end(cx, number, Outcome::Failed(failure));
        }
        let Phase::Collect { versions, best, .. } = &mut op.phase else { return };
        let me = cx.view.me;
        let mut asked = op.tally.answered().len();
        let mut to = Vec::new();
        let counted = op.tally.counted();
        if counted.contains(&me) && !op.tally.has(me) {
            let entry = cx.store.raw(op.hash, &op.key);
            versions.push((me, entry.map_or(Version::ZERO, |entry| entry.version)));
            *best = entry.map(|entry| Held::of(&entry));
            op.tally.answer(me);
            asked += 1;
        }
        let need = op.tally.need();
        for node in counted.into_iter().filter(|&node| node != me) {
            if op.tally.has(node) {
                continue;
            }
            if !cx.view.is_alive(node) {
                op.tally.fail(node);
            } else if more || asked < need {
                to.push(node);
                asked += 1;
            }
        }
        if op.tally.standing() == Standing::Impossible {
            return self.refuse(cx, number);
        }
        let left_ms = op.deadline.saturating_sub(cx.now.mono) as u32;
        let ask = Ask { op: number, shard: cx.view.shard(op.hash), epoch: op.epoch, left_ms };
        // One whole value is enough, and there is one if a copy is here; the rest say their version.
        let whole = usize::from(best.is_none() && !versions.iter().any(|(node, _)| *node == me));
        let holds = best.is_some();
        let (whole, bare) = to.split_at(whole.min(to.len()));
        let (hash, key) = (op.hash, &op.key);
        cx.out.send(whole, Class::Request, &Message::Read(ask, hash, key, true));
        cx.out.send(bare, Class::Request, &Message::Read(ask, hash, key, false));
        self.judge(cx, number);
        if holds {
            // It goes on: the value is kept until others have answered.
            self.holds(cx, number);
        }
    }

    /// Sends a request to the orderer of its shard.
    pub(crate) fn forward(
        &mut self,
        cx: &mut Context<'_>,
        token: u64,
        hash: KeyHash,
        request: &[u8],
        to: NodeNo,
        deadline: Millis,
    ) {
        if !self.admit(cx, token, request.len()) {
            return;
        }
        let placement = cx.view.placement_of(hash);
        let op = Op {
            token,
            hash,
            key: Box::default(),
            level: Level::Quorum,
            epoch: placement.epoch,
            deadline,
            again: Millis::MAX,
            tally: of_read(cx, placement, Level::One),
            phase: Phase::Order { to, request: request.len() },
            begun: true,
            ahead: 0,
            full: 0,
            asked: 0,
            sent: 0,
            ordered: false,
            bytes: request.len(),
        };
        let epoch = op.epoch;
        // The orderer's own operations have to end before: the answer needs its time.
        let left_ms = deadline.saturating_sub(cx.now.mono + self.limits.again_ms) as u32;
        let number = self.insert(op);
        let ask = Ask { op: number, shard: cx.view.shard(hash), epoch, left_ms };
        cx.out.send(&[to], Class::Request, &Message::Order(ask, hash, request));
    }

    /// A replica stored what it was asked to store.
    pub(crate) fn on_wrote(&mut self, cx: &mut Context<'_>, from: NodeNo, ask: Ask) {
        let Some(op) = self.place(ask.op) else { return };
        if op.epoch != ask.epoch || !matches!(op.phase, Phase::Write { .. }) {
            return;
        }
        let first = op.tally.answered().is_empty();
        op.tally.answer(from);
        if first {
            op.keep_hints(cx);
        }
        self.judge(cx, ask.op);
    }

    /// A replica said what it has.
    pub(crate) fn on_found(
        &mut self,
        cx: &mut Context<'_>,
        from: NodeNo,
        ask: Ask,
        found: Option<Stored<'_>>,
        whole: bool,
    ) {
        let Some(op) = self.place(ask.op) else { return };
        if op.epoch != ask.epoch || found.is_some_and(|stored| stored.hash != op.hash) {
            return;
        }
        if op.deadline <= cx.now.mono {
            // This process stood still: what is found now may be long past.
            return self.expire(cx, ask.op);
        }
        let version = found.map_or(Version::ZERO, |stored| stored.entry.version);
        match &mut op.phase {
            Phase::Collect { versions, best, .. } => {
                if !versions.iter().any(|(node, _)| *node == from) {
                    versions.push((from, version));
                }
                let newer = best.as_ref().is_none_or(|best| best.version < version);
                if let Some(stored) = found.filter(|_| whole && newer) {
                    *best = Some(Held::of(&stored.entry));
                }
                op.tally.answer(from);
                self.judge(cx, ask.op);
                self.holds(cx, ask.op);
            }
            Phase::Fetch { versions, from: asked, then } if *asked == from && whole => {
                // It may have got a newer one meanwhile: then that is what was found.
                let (versions, then) = (std::mem::take(versions), *then);
                match found {
                    Some(stored) => {
                        let held = Held::of(&stored.entry);
                        self.settle(cx, ask.op, versions, Some(held), then);
                        self.holds(cx, ask.op);
                    }
                    // It was there a moment ago and is purged now: start over.
                    None => self.restart(cx, ask.op),
                }
            }
            _ => {}
        }
    }

    /// A replica refused.
    pub(crate) fn on_refused(&mut self, cx: &mut Context<'_>, from: NodeNo, ask: Ask, why: Why) {
        let shard_epoch = cx.view.map.placements.get(ask.shard.index()).map_or(0, |p| p.epoch);
        let newer = why == Why::Stale && ask.epoch > shard_epoch;
        if newer {
            cx.out.want_map(ask.epoch);
        }
        let Some(op) = self.place(ask.op) else { return };
        if let Phase::Order { .. } = op.phase {
            let shard = ask.shard.0;
            return self.end(cx, ask.op, Outcome::Failed(Failure::NoOrderer { shard }));
        }
        match why {
            // The operation starts again when the newer map is here.
            Why::Stale if newer => {}
            // It will have adopted the map in a moment.
            Why::Behind | Why::Stale => op.again = op.again.min(cx.now.mono + BEHIND_MS),
            _ => {
                if let Phase::Fetch { .. } = op.phase {
                    return self.restart(cx, ask.op);
                }
                let first = !op.tally.has_failed(from);
                op.ahead += usize::from(why == Why::Ahead && first);
                op.full += usize::from(why == Why::Full && first);
                op.tally.fail(from);
                if matches!(op.phase, Phase::Collect { .. }) {
                    return self.send_read(cx, ask.op, true);
                }
                self.judge(cx, ask.op);
            }
        }
    }

    /// The orderer answered.
    pub(crate) fn on_ordered(&mut self, cx: &mut Context<'_>, from: NodeNo, ask: Ask, answer: &[u8]) {
        let fits = self.place(ask.op).is_some_and(|op| matches!(op.phase, Phase::Order { to, .. } if to == from));
        if fits {
            self.end(cx, ask.op, Outcome::Ordered(answer.to_vec()));
        }
    }

    /// Looks whether an operation has enough answers, or cannot get them any more.
    fn judge(&mut self, cx: &mut Context<'_>, number: u64) {
        self.follow_own(cx, number);
        let Some(op) = self.place(number) else { return };
        match (op.tally.standing(), &mut op.phase) {
            (Standing::Open, _) => {}
            (Standing::Impossible, Phase::Write { .. }) if op.begun => {
                // It may be on some replicas and come back with the next read. Those that are silent may still answer,
                // and those that are away may return, until the deadline.
            }
            (Standing::Impossible, _) => self.refuse(cx, number),
            (Standing::Reached, Phase::Write { .. }) => self.end_write(cx, number),
            (Standing::Reached, Phase::Collect { versions, best, then }) => {
                let (versions, best, then) = (std::mem::take(versions), best.take(), *then);
                self.settle(cx, number, versions, best, then);
            }
            (Standing::Reached, Phase::Fetch { .. } | Phase::Order { .. }) => {}
        }
    }

    /// Enough replicas have said what they have.
    fn settle(
        &mut self,
        cx: &mut Context<'_>,
        number: u64,
        versions: Vec<(NodeNo, Version)>,
        best: Option<Held>,
        then: Then,
    ) {
        let newest = versions.iter().map(|(_, version)| *version).max().unwrap_or_default();
        let newest = newest.max(best.as_ref().map_or(Version::ZERO, |best| best.version));
        let have = best.as_ref().is_some_and(|best| best.version == newest);
        let repairs = !cx.planted.has(Bug::NoBlockingRepair);
        let Some(op) = self.place(number) else { return };
        if newest == Version::ZERO {
            return self.read_done(cx, number, None, then);
        }
        if !have {
            let from = versions.iter().find(|(_, version)| *version == newest).map(|(node, _)| *node);
            let from = from.expect("the newest is of one of them");
            let left_ms = op.deadline.saturating_sub(cx.now.mono) as u32;
            let ask = Ask { op: number, shard: cx.view.shard(op.hash), epoch: op.epoch, left_ms };
            cx.out.send(&[from], Class::Request, &Message::Read(ask, op.hash, &op.key, true));
            op.phase = Phase::Fetch { versions, from, then };
            return self.weigh(number);
        }
        let best = best.expect("it has the newest version");
        let placement = cx.view.placement_of(op.hash);
        let equal = versions.iter().all(|(_, version)| *version == newest);
        // A quorum that agrees is enough as long as the next read asks the same replicas. While the shard moves, the next one
        // may ask the new set, of which one alone may have what was found.
        if op.level == Level::One || equal && placement.stage == Stage::Normal || !repairs {
            return self.read_done(cx, number, Some(best), then);
        }
        let mut tally = of_write(cx, placement, Level::Quorum);
        versions.iter().filter(|(_, version)| *version == newest).for_each(|(node, _)| tally.answer(*node));
        if tally.standing() == Standing::Reached {
            return self.read_done(cx, number, Some(best), then);
        }
        // Write it back until as many have it as would acknowledge a write, then answer.
        self.stats.read_repairs += 1;
        let op = self.place(number).expect("seen above");
        op.tally = tally;
        op.again = cx.now.mono + AGAIN_REPAIR_MS;
        op.phase = Phase::Write { held: best, then: Some(then), existed: false };
        self.weigh(number);
        self.send_write(cx, number, false);
    }

    /// A read has its answer, and a quorum holds it.
    fn read_done(&mut self, cx: &mut Context<'_>, number: u64, found: Option<Held>, then: Then) {
        let live = found.as_ref().is_some_and(|held| held.is_live(cx.now.wall));
        match then {
            Then::Answer => {
                let value = found.filter(|_| live).map(|held| Value {
                    bytes: held.value,
                    version: held.version,
                    expires_at: held.expires_at,
                });
                self.end(cx, number, Outcome::Found(value));
            }
            Then::Delete if !live => self.end(cx, number, Outcome::Deleted(false)),
            Then::Delete => {
                let Some(op) = self.remove(number) else { return };
                let version = found.map_or(Version::ZERO, |held| held.version);
                // The tombstone has to be newer than what it deletes, whoever's clock made that.
                if cx.view.quarantined || cx.store.observe(version, cx.now.wall).is_err() {
                    return cx.out.done(op.token, Outcome::Failed(Failure::Clock));
                }
                let version = cx.store.mint(cx.now.wall);
                let grave = Held { value: Vec::new(), version, expires_at: 0, tombstone: true };
                let Op { token, level, deadline, .. } = op;
                let writing = Writing { token, level, deadline, then: None, existed: true, ordered: false };
                self.begin_write(cx, (op.hash, op.key), grave, writing);
            }
            Then::Join(at) => {
                let Some(op) = self.remove(number) else { return };
                let version = found.as_ref().map_or(Version::ZERO, |held| held.version);
                // What the command writes must be newer than what it read. What it has written is done, whatever became of
                // this node's clock meanwhile.
                let reads = self.joined.get(&op.token).is_some_and(|joined| joined.found.is_some());
                let observed = if reads { cx.store.observe(version, cx.now.wall) } else { Ok(()) };
                let mut failed = observed.err().map(|_| Outcome::Failed(Failure::Clock));
                let grown = found.as_ref().filter(|_| reads && live).map_or(0, |held| held.value.len());
                if grown > 0 && self.bytes + grown > self.limits.bytes {
                    // Of many keys the values come one by one, and each may have been the last that its read waited for.
                    let own = self.bytes_of(op.token).unwrap_or(0);
                    if self.is_too_much(self.bytes - own, own + grown) {
                        failed = failed.or(Some(Outcome::Failed(Failure::Busy)));
                        return self.join(cx, op.token, failed);
                    }
                }
                let place =
                    self.joined.get_mut(&op.token).and_then(|joined| joined.found.as_mut()?.get_mut(at as usize));
                if let Some(place) = place {
                    place.newest = version;
                    place.value = found.filter(|_| live).map(|held| Value {
                        bytes: held.value,
                        version: held.version,
                        expires_at: held.expires_at,
                    });
                }
                if let Some(joined) = self.joined.get_mut(&op.token) {
                    joined.bytes += grown;
                    self.bytes += grown;
                }
                self.join(cx, op.token, failed);
            }
        }
    }

    fn end_write(&mut self, cx: &mut Context<'_>, number: u64) {
        let Some(op) = self.place(number) else { return };
        let Phase::Write { held, then, existed } = &mut op.phase else { return };
        match then {
            None if *existed => self.end(cx, number, Outcome::Deleted(true)),
            None => {
                let version = held.version;
                self.end(cx, number, Outcome::Written { version });
            }
            Some(then) => {
                let then = *then;
                let empty = Held { value: Vec::new(), version: Version::ZERO, expires_at: 0, tombstone: true };
                let held = std::mem::replace(held, empty);
                self.read_done(cx, number, Some(held), then);
            }
        }
    }

    /// Ends an operation that never began to change anything.
    fn refuse(&mut self, cx: &mut Context<'_>, number: u64) {
        let Some(op) = self.place(number) else { return };
        let counted = op.tally.counted();
        let have = counted.iter().filter(|&&node| node == cx.view.me || cx.view.is_alive(node)).count();
        let failure = Failure::NoQuorum { shard: cx.view.shard(op.hash).0, have, need: op.tally.need() };
        self.end(cx, number, Outcome::Failed(failure));
    }

    fn end(&mut self, cx: &mut Context<'_>, number: u64, outcome: Outcome) {
        let Some(op) = self.remove(number) else { return };
        self.stats.failed += u64::from(matches!(outcome, Outcome::Failed(_)));
        self.stats.unknown += u64::from(matches!(outcome, Outcome::Unknown { .. }));
        let joins = match &op.phase {
            Phase::Write { then, .. } => matches!(then, Some(Then::Join(_))),
            Phase::Collect { then, .. } | Phase::Fetch { then, .. } => matches!(then, Then::Join(_)),
            Phase::Order { .. } => false,
        };
        if joins {
            self.join(cx, op.token, Some(outcome));
        } else {
            cx.out.done(op.token, outcome);
        }
    }

    /// Starts an operation again, under the present map, with the version it has.
    fn restart(&mut self, cx: &mut Context<'_>, number: u64) {
        let Some(op) = self.place(number) else { return };
        if op.deadline <= cx.now.mono {
            // This process stood still: what it wanted to write then may have been deleted, and the tombstone purged.
            return self.expire(cx, number);
        }
        let token = op.token;
        self.stats.restarted += 1;
        let reads = self.joined.get(&token).is_some_and(|joined| joined.found.is_some());
        let Some(op) = self.place(number) else { return };
        let placement = cx.view.placement_of(op.hash);
        if op.ordered && placement.epoch != op.epoch {
            // Another orderer may have run commands without having seen it.
            let (have, need) = (op.tally.answered().len(), op.tally.need());
            return self.end(cx, number, Outcome::Unknown { have, need });
        }
        op.epoch = placement.epoch;
        if let Phase::Order { .. } = op.phase {
            // The request may be running there: only its answer, or the deadline, ends it. Nobody is asked again.
            return;
        }
        op.again = cx.now.mono + AGAIN_REPAIR_MS;
        let then = match op.phase {
            Phase::Collect { then, .. } | Phase::Fetch { then, .. } => Some(then),
            // What a read found in the old epoch and is writing back may not be the newest in this one.
            Phase::Write { then: Some(then @ (Then::Answer | Then::Delete)), .. } => Some(then),
            Phase::Write { then: Some(then), .. } if reads => Some(then),
            Phase::Write { .. } | Phase::Order { .. } => None,
        };
        match (&op.phase, then) {
            (_, Some(then)) => {
                op.tally = of_read(cx, placement, op.level);
                op.phase = Phase::Collect { versions: Vec::new(), best: None, then };
                self.weigh(number);
                self.send_read(cx, number, false);
            }
            (Phase::Write { .. }, None) => {
                op.tally = of_write(cx, placement, op.level);
                self.send_write(cx, number, false);
            }
            _ => {}
        }
    }

    /// The map changed: operations of shards that it changed start again.
    pub(crate) fn on_map(&mut self, cx: &mut Context<'_>) {
        for number in self.numbers() {
            let Some(op) = self.place(number) else { continue };
            if cx.view.placement_of(op.hash).epoch != op.epoch {
                self.restart(cx, number);
            }
        }
    }

    /// A peer is not reachable any more: nobody waits for it.
    pub(crate) fn on_away(&mut self, cx: &mut Context<'_>, node: NodeNo) {
        for number in self.numbers() {
            let Some(op) = self.place(number) else { continue };
            match &op.phase {
                Phase::Order { to, .. } if *to == node => {
                    // It may have run: nobody can tell.
                    self.end(cx, number, Outcome::Unknown { have: 0, need: 1 });
                }
                Phase::Fetch { from, .. } if *from == node => self.restart(cx, number),
                Phase::Collect { .. } => {
                    if !op.tally.has(node) && op.tally.counted().contains(&node) {
                        op.tally.fail(node);
                        self.send_read(cx, number, true);
                    }
                }
                Phase::Write { .. } => {
                    let placement = cx.view.placement_of(op.hash);
                    if placement.written().any(|written| written == node) && !op.tally.has(node) {
                        op.keep_hints(cx);
                        op.tally.fail(node);
                        self.judge(cx, number);
                    }
                }
                Phase::Order { .. } | Phase::Fetch { .. } => {}
            }
        }
    }

    /// Asks the silent again, and ends what is over.
    pub(crate) fn on_deadline(&mut self, cx: &mut Context<'_>) {
        for number in self.numbers() {
            let now = cx.now.mono;
            let Some(op) = self.place(number) else { continue };
            if op.deadline <= now {
                self.expire(cx, number);
            } else if op.again <= now {
                op.again = Millis::MAX;
                let (is_write, is_fetch) =
                    (matches!(op.phase, Phase::Write { .. }), matches!(op.phase, Phase::Fetch { .. }));
                self.stats.asked_again += 1;
                match () {
                    _ if is_write => self.send_write(cx, number, false),
                    _ if is_fetch => self.restart(cx, number),
                    _ => self.send_read(cx, number, true),
                }
            }
        }
    }

    fn expire(&mut self, cx: &mut Context<'_>, number: u64) {
        let Some(token) = self.place(number).map(|op| op.token) else { return };
        let reads = self.joined.get(&token).is_some_and(|joined| joined.found.is_some());
        let Some(op) = self.place(number) else { return };
        let shard = cx.view.shard(op.hash);
        let outcome = match &op.phase {
            Phase::Write { held, then, .. } => {
                let placement = cx.view.placement_of(op.hash);
                let stored = Stored { hash: op.hash, entry: held.entry(&op.key) };
                let missing = |&node: &NodeNo| op.begun && node != cx.view.me && !op.tally.has(node);
                for node in placement.written().filter(missing) {
                    cx.hints.keep(cx.now, node, shard, &stored);
                }
                let (have, need) = (op.tally.answered().len(), op.tally.need());
                match then {
                    // The write-back of a read: nothing of the client's own was begun.
                    Some(Then::Answer | Then::Delete) => Outcome::Failed(Failure::TimedOut { shard: shard.0 }),
                    Some(Then::Join(_)) if reads => Outcome::Failed(Failure::TimedOut { shard: shard.0 }),
                    _ if op.begun => Outcome::Unknown { have, need },
                    _ => Outcome::Failed(Failure::TimedOut { shard: shard.0 }),
                }
            }
            Phase::Collect { .. } | Phase::Fetch { .. } => Outcome::Failed(Failure::TimedOut { shard: shard.0 }),
            Phase::Order { .. } => Outcome::Unknown { have: 0, need: 1 },
        };
        self.end(cx, number, outcome);
    }

    fn numbers(&self) -> Vec<u64> {
        let number = |(index, place): (usize, &Place)| u64::from(place.generation) << 32 | index as u64;
        self.places.iter().enumerate().filter(|(_, place)| place.op.is_some()).map(number).collect()
    }

    /// Whether what it counts is what there is.
    pub(crate) fn invariants(&self) {
        let ops = || self.places.iter().flat_map(|place| &place.op);
        assert_eq!(ops().count(), self.under_way());
        let joined = self.joined.values().map(Joined::weight);
        assert_eq!(ops().map(Op::weight).chain(joined).sum::<usize>(), self.bytes);
        assert!(self.under_way() <= self.limits.operations + self.joined.len() * MAX_JOINED, "operations are bounded");
    }
}

/// Whether this node has the one copy that the cluster keeps of a shard.
fn is_only_copy(cx: &Context<'_>, hash: KeyHash) -> bool {
    let placement = cx.view.placement_of(hash);
    cx.view.map.quorums.n == 1 && placement.written().eq([cx.view.me])
}

/// Why an operation that one answer is enough for is not begun at a node that has to think that it is cut off: the others may
/// have replaced its copy, and whichever else can be reached from here, and gone on. What is written here is gone then.
fn cut_off(cx: &Context<'_>, op: &Op) -> Option<Failure> {
    let alone = cx.view.isolated && op.tally.need() == 1 && !is_only_copy(cx, op.hash);
    alone.then(|| Failure::NoQuorum { shard: cx.view.shard(op.hash).0, have: 0, need: 1 })
}

/// What a write of a shard needs.
fn of_write(cx: &Context<'_>, placement: &Placement, level: Level) -> Tally {
    let tally = Tally::of_write(placement, cx.view.map.quorums, level);
    match () {
        _ if cx.planted.has(Bug::WriteNewOnly) => tally.of_new_set(),
        _ if cx.planted.has(Bug::FillingVotes) => tally.with_filling(placement),
        _ => tally,
    }
}

/// What a read of a shard needs.
fn of_read(cx: &Context<'_>, placement: &Placement, level: Level) -> Tally {
    let tally = Tally::of_read(placement, cx.view.map.quorums, level);
    if cx.planted.has(Bug::FillingVotes) { tally.with_filling(placement) } else { tally }
}

/// Keys of one ordered command, at most; the driver refuses more.
pub const MAX_JOINED: usize = 4096;
/// Generations of a place; the bits above those are other machines'.
const GENERATIONS: u32 = 1 << 28;
/// When a replica that had not adopted the map yet is asked again.
const BEHIND_MS: Millis = 20;
/// When a repair or a restarted operation asks the silent again.
const AGAIN_REPAIR_MS: Millis = 100;

#[cfg(test)]
mod tests;
