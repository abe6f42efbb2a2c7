//! MULTI, EXEC and WATCH.
//!
//! A transaction whose keys, watched ones included, lie in one shard runs on the shard's owner in one go: nothing comes
//! between its commands. One that spans shards runs command by command in order, which is what pipelines of client libraries
//! that wrap themselves in MULTI ask for; with watched keys it is refused, because then atomicity was meant.

use gridkv_engine::command::{Route, Spec};
use gridkv_engine::hash::{KeyHash, ShardId};
use gridkv_engine::reply::Reply;

use super::claims::Touch;
use super::replies::Loudness;
use super::transaction::{Packer, Watched};
use super::{Backplane, Blame, CROSS_SLOT, Multi, Queued, Request, Session, Step, Watching, touch_of};
use crate::resp::Writer;

/// Bytes of replies that the session's own commands may add to a transaction.
const MAX_ANSWERED: usize = 16 << 20;
/// Keys that a connection may watch. Each is compared with all others, so that none is watched twice.
const MAX_WATCHED: usize = 4096;
const ABORTED: &str = "EXECABORT Transaction discarded because of previous errors.";

/// Where a transaction's keys lie.
enum Place {
    /// In one shard, or there are none.
    One(Option<KeyHash>),
    Several,
}

impl Session {
    /// Keeps a command for EXEC.
    pub(super) fn queue(
        &mut self,
        spec: &'static Spec,
        args: &[&[u8]],
        loudness: Loudness,
        back: &mut impl Backplane,
        out: &mut Vec<u8>,
    ) {
        let limits = back.limits();
        let (most, most_bytes) = (limits.multi_queue, limits.query_buffer);
        let Some(multi) = &mut self.multi else { return };
        let bytes: usize = args.iter().map(|arg| arg.len() + size_of::<Vec<u8>>()).sum();
        if multi.queue.len() >= most || multi.bytes + bytes > most_bytes {
            let text = format!("ERR a transaction may queue {most} commands and {most_bytes} bytes; run it in parts");
            return self.refuse(&text, loudness, back, out);
        }
        multi.bytes += bytes;
        if !multi.broken {
            multi.queue.push(Queued { spec, args: args.iter().map(|arg| arg.to_vec()).collect() });
        }
        self.reply(loudness, out, |out| out.extend_from_slice(b"+QUEUED\r\n"));
    }

    pub(super) fn multi(&mut self, loudness: Loudness, back: &mut impl Backplane, out: &mut Vec<u8>) {
        if self.multi.is_some() {
            // Redis does not break the transaction for it.
            let text = "ERR MULTI calls can not be nested";
            back.count_error(self.blame, text.as_bytes());
            let protocol = self.client.protocol;
            return self.reply(loudness, out, |out| Writer::new(protocol, out).error(text));
        }
        self.multi = Some(Multi::default());
        self.update_plain();
        self.ok(loudness, out);
    }

    pub(super) fn discard(&mut self, loudness: Loudness, back: &mut impl Backplane, out: &mut Vec<u8>) {
        if self.multi.is_none() {
            return self.refuse("ERR DISCARD without MULTI", loudness, back, out);
        }
        self.end_multi();
        self.ok(loudness, out);
    }

    pub(super) fn end_multi(&mut self) -> Option<Multi> {
        let multi = self.multi.take();
        self.watched.clear();
        self.update_plain();
        multi
    }

    pub(super) fn watch(
        &mut self,
        args: &[&[u8]],
        loudness: Loudness,
        back: &mut impl Backplane,
        out: &mut Vec<u8>,
    ) -> Step {
        if self.multi.is_some() {
            let text = "ERR WATCH inside MULTI is not allowed";
            back.count_error(self.blame, text.as_bytes());
            let protocol = self.client.protocol;
            self.reply(loudness, out, |out| Writer::new(protocol, out).error(text));
            return Step::Done;
        }
        // Versions are numbered by position, so one WATCH at a time.
        if self.replies.open() > 0 {
            return Step::Later;
        }
        if self.watched.len() + args.len() - 1 > MAX_WATCHED {
            self.refuse("ERR a connection may watch 4096 keys", loudness, back, out);
            return Step::Done;
        }
        let keyspace = back.keyspace();
        let known = self.watched.len();
        for &key in &args[1..] {
            let hash = keyspace.locate(key);
            if !self.watched.iter().any(|watched| watched.hash == hash && watched.key == key) {
                self.watched.push(Watched { key: key.to_vec(), hash, version: None });
            }
        }
        if !self.watched[known..].iter().all(|key| {
            let owner = back.owner(key.hash);
            back.runs(owner) || back.has_room(owner)
        }) {
            self.watched.truncate(known);
            return Step::Later;
        }
        let remote = self.watched[known..].iter().filter(|key| !back.runs(back.owner(key.hash))).count() as u32;
        for key in &mut self.watched[known..] {
            if back.runs(back.owner(key.hash)) {
                key.version = back.version(key.hash, &key.key);
            }
        }
        if remote == 0 {
            self.ok(loudness, out);
            return Step::Done;
        }
        let slot = self.replies.wait(self.client.protocol, loudness);
        for (at, key) in self.watched.iter().enumerate().skip(known) {
            let owner = back.owner(key.hash);
            if !back.runs(owner) {
                back.send(owner, key.hash, slot, at as u32, Request::Version(&key.key));
            }
        }
        self.watching = Some(Watching { slot, missing: remote, known, failed: None });
        self.barrier = Some(slot);
        Step::Done
    }

    pub(super) fn exec(&mut self, loudness: Loudness, back: &mut impl Backplane, out: &mut Vec<u8>) -> Step {
        let Some(multi) = &self.multi else {
            self.refuse("ERR EXEC without MULTI", loudness, back, out);
            return Step::Done;
        };
        if multi.broken {
            self.end_multi();
            self.refuse(ABORTED, loudness, back, out);
            return Step::Done;
        }
        let wide = multi.queue.iter().find(|step| matches!(step.spec.route, Route::Every(_) | Route::Node));
        let watching = !self.watched.is_empty();
        let protocol = self.client.protocol;
        match (self.place(&multi.queue, back), wide) {
            (Place::Several, _) if watching => {
                self.end_multi();
                self.refuse(CROSS_SLOT, loudness, back, out);
            }
            (Place::One(_), Some(step)) if watching => {
                let name = step.spec.name;
                self.end_multi();
                let text = format!("ERR '{name}' works on all shards; a transaction with WATCH works within one");
                self.refuse(&text, loudness, back, out);
            }
            (Place::One(hash), None) => {
                let owner = hash.map_or(back.here(), |hash| back.owner(hash));
                // Without a key it touches no data.
                let own = hash.is_none() || back.runs(owner);
                let keys: Vec<KeyHash> =
                    if back.may_overtake() { self.keys(&multi.queue, back).collect() } else { Vec::new() };
                let writes = multi.queue.iter().any(|step| touch_of(step.spec) == Touch::Write);
                let touch = if writes { Touch::Write } else { Touch::Read };
                if self.are_claimed(keys.iter().copied(), touch) || !own && !back.has_room(owner) {
                    return Step::Later;
                }
                let watched = std::mem::take(&mut self.watched);
                let queue = self.end_multi().expect("seen above").queue;
                let Some(packed) = self.pack(&watched, queue, back) else {
                    let text = "EXECABORT the replies of this transaction's own commands are too large; run them apart";
                    self.refuse(text, loudness, back, out);
                    return Step::Done;
                };
                if own {
                    self.reply(loudness, out, |out| back.exec(&packed, protocol, out));
                } else {
                    let slot = self.replies.wait(protocol, loudness);
                    self.claim(slot, keys, touch, back);
                    let hash = hash.unwrap_or(KeyHash::MIN);
                    back.send(owner, hash, slot, 0, Request::Exec(&packed, protocol));
                }
            }
            _ => {
                let queue = self.end_multi().expect("seen above").queue;
                let len = queue.len();
                self.reply(loudness, out, |out| Writer::new(protocol, out).array(len));
                self.running = queue.into();
            }
        }
        Step::Done
    }

    /// The keys of a transaction, watched ones included.
    fn keys(&self, queue: &[Queued], back: &impl Backplane) -> impl Iterator<Item = KeyHash> {
        let keyspace = back.keyspace();
        let keys = queue.iter().flat_map(|step| step.spec.keys(step.args.len()).map(|at| step.args[at].as_slice()));
        keys.map(move |key| keyspace.locate(key)).chain(self.watched.iter().map(|key| key.hash))
    }

    fn place(&self, queue: &[Queued], back: &impl Backplane) -> Place {
        let keyspace = back.keyspace();
        let mut first: Option<(KeyHash, ShardId)> = None;
        for hash in self.keys(queue, back) {
            let shard = keyspace.shard(hash);
            match first {
                None => first = Some((hash, shard)),
                Some((_, known)) if known != shard => return Place::Several,
                Some(_) => {}
            }
        }
        Place::One(first.map(|(hash, _)| hash))
    }

    /// Commands of the session itself are answered now, the others packed for the shard's owner. `None` when those answers
    /// are more than a transaction may carry.
    fn pack(&mut self, watched: &[Watched], queue: Vec<Queued>, back: &mut impl Backplane) -> Option<Vec<u8>> {
        let mut packer = Packer::new(watched, queue.len());
        let blame = self.blame;
        let mut answered = 0;
        for step in queue {
            if step.spec.route == Route::Session {
                let args: Vec<&[u8]> = step.args.iter().map(Vec::as_slice).collect();
                let before = std::mem::take(&mut self.replies);
                let mut reply = Vec::new();
                self.own(step.spec, &args, Loudness::Heard, back, &mut reply);
                (self.replies, self.blame) = (before, blame);
                answered += reply.len();
                if answered > MAX_ANSWERED {
                    return None;
                }
                packer.raw(&reply);
            } else {
                packer.command(step.spec, &step.args);
            }
        }
        Some(packer.into_bytes())
    }

    /// The next command of an EXEC that runs one after the other.
    pub(super) fn run_queued(&mut self, back: &mut impl Backplane, out: &mut Vec<u8>) -> Step {
        let Some(step) = self.running.pop_front() else { return Step::Done };
        let args: Vec<&[u8]> = step.args.iter().map(Vec::as_slice).collect();
        let loudness = if self.is_silent() { Loudness::Quiet } else { Loudness::Heard };
        self.blame = Blame::Refused(step.spec.id);
        let done = self.route(step.spec, &args, loudness, back, out);
        if done == Step::Later {
            self.running.push_front(step);
        }
        done
    }
}
