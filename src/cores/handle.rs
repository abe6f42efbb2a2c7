//! Application code beside the data: [`CoreHandle`].

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use gridkv_engine::Millis;
use gridkv_engine::command::Spec;
use gridkv_engine::hash::KeyHash;
use gridkv_net::frame::{Head, Kind};
use gridkv_net::mesh::{Busy, CoreId, Mesh};

use super::waiters::{Answer, Group};
use super::{CoreRc, LOCAL, State, serve};
use crate::cluster;
use crate::handle::{Reply, SetArgs, SetOptions, SetOutcome, check_key, check_value, spec_of};
use crate::metrics::CoreMetrics;
use crate::server::gather;
use crate::{Error, Values};

/// Keys looked at before the first of them is read.
const AHEAD: usize = 32;
/// Requests, of tasks or of a group, that are handed to siblings before the turn ends.
const WORTH_A_BATCH: usize = 16;

/// A core, from inside: for code that [`crate::GridKv::on_core`] runs.
///
/// For keys this core owns, [`CoreHandle::read`] and [`CoreHandle::write`] are plain function calls into its table. The
/// asynchronous operations take any key: at once if it is owned here, by one hop to a sibling otherwise; requests made
/// before the next `await` that really waits share one batch per sibling.
///
/// The type is neither `Send` nor `Sync`: it never leaves its core.
#[derive(Clone)]
pub struct CoreHandle {
    core: CoreRc,
}

impl std::fmt::Debug for CoreHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CoreHandle").field("core", &self.id()).finish_non_exhaustive()
    }
}

impl CoreHandle {
    pub(crate) fn new(core: CoreRc) -> CoreHandle {
        CoreHandle { core }
    }

    /// This core's number, from 0.
    pub fn id(&self) -> usize {
        self.core.id.index()
    }

    /// Number of cores of the node.
    pub fn cores(&self) -> usize {
        self.core.topology.cores()
    }

    /// Whether this core owns `key`.
    #[inline]
    pub fn owns(&self, key: impl AsRef<[u8]>) -> bool {
        let topology = &self.core.topology;
        topology.owner_of(topology.keyspace().locate(key.as_ref())) == self.core.id
    }

    #[inline]
    fn locate(&self, key: &[u8]) -> (KeyHash, CoreId) {
        let topology = &self.core.topology;
        let hash = topology.keyspace().locate(key);
        (hash, topology.owner_of(hash))
    }

    #[cold]
    fn not_owned(&self, hash: KeyHash) -> Error {
        Error::NotOwned { core: self.id(), owner: self.core.topology.owner_of(hash).index() }
    }

    /// Reads a key of this core in place: no copy, no hop, no allocation.
    ///
    /// # Errors
    /// [`Error::NotOwned`] when the key belongs to a sibling.
    ///
    /// # Panics
    /// When `look` uses a handle of the core: its data is lent to `look`.
    #[inline]
    pub fn read<T>(&self, key: impl AsRef<[u8]>, look: impl FnOnce(&[u8]) -> T) -> Result<Option<T>, Error> {
        let key = key.as_ref();
        let state = &mut *self.core.state.borrow_mut();
        let hash = state.store.locate(key);
        if !state.store.owns(hash) {
            return Err(self.not_owned(hash));
        }
        Ok(state.store.value(hash, key, state.now).map(look))
    }

    /// Reads many keys of this core in place: `look` is called for each, in order, with its position. Faster than
    /// [`CoreHandle::read`] one by one, because the cache misses of several keys overlap.
    ///
    /// # Errors
    /// [`Error::NotOwned`] for the first key that belongs to a sibling; `look` was called for those before it.
    ///
    /// # Panics
    /// As [`CoreHandle::read`].
    pub fn read_many<K: AsRef<[u8]>>(
        &self,
        keys: &[K],
        mut look: impl FnMut(usize, Option<&[u8]>),
    ) -> Result<(), Error> {
        let state = &mut *self.core.state.borrow_mut();
        let now = state.now;
        let mut hashes = [KeyHash::MIN; AHEAD];
        for (at, window) in keys.chunks(AHEAD).enumerate() {
            let (mut known, mut foreign) = (0, None);
            for key in window {
                let hash = state.store.locate(key.as_ref());
                if !state.store.owns(hash) {
                    foreign = Some(self.not_owned(hash));
                    break;
                }
                state.store.prefetch_place(hash);
                hashes[known] = hash;
                known += 1;
            }
            hashes[..known].iter().for_each(|hash| state.store.prefetch_entry(*hash));
            for (i, (key, hash)) in window.iter().zip(&hashes[..known]).enumerate() {
                look(at * AHEAD + i, state.store.value(*hash, key.as_ref(), now));
            }
            if let Some(error) = foreign {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Writes a key of this core, for ever.
    ///
    /// # Errors
    /// [`Error::NotOwned`], [`Error::OutOfMemory`], [`Error::KeyTooLong`], [`Error::ValueTooLong`]; nothing was changed.
    #[inline]
    pub fn write(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<(), Error> {
        let key = key.as_ref();
        let state = &mut *self.core.state.borrow_mut();
        let hash = state.store.locate(key);
        if !state.store.owns(hash) {
            return Err(self.not_owned(hash));
        }
        if !state.solo {
            return Err(replicated());
        }
        self.core.kick();
        state.store.set(hash, key, value.as_ref(), 0, state.now).map(drop).map_err(Error::from)
    }

    /// Reads any key.
    ///
    /// # Errors
    /// [`Error::KeyTooLong`], [`Error::Reply`].
    pub async fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Bytes>, Error> {
        let key = key.as_ref();
        check_key(key)?;
        let (hash, owner) = self.locate(key);
        if self.runs(owner) {
            let mut state = self.core.state.borrow_mut();
            let now = state.now;
            return Ok(state.store.value(hash, key, now).map(Bytes::copy_from_slice));
        }
        self.hop(owner, hash, 0, Ask::Get(key)).await.value()
    }

    /// Writes any key, for ever.
    ///
    /// # Errors
    /// As [`CoreHandle::write`], without [`Error::NotOwned`].
    pub async fn set(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<(), Error> {
        let (key, value) = (key.as_ref(), value.as_ref());
        check_key(key)?;
        check_value(value)?;
        let (hash, owner) = self.locate(key);
        if self.runs(owner) {
            return self.write(key, value);
        }
        self.hop(owner, hash, 0, Ask::Set(key, value)).await.done()
    }

    /// Writes any key under conditions; see [`crate::GridKv::set_with`].
    ///
    /// # Errors
    /// As [`CoreHandle::set`].
    pub async fn set_with(
        &self,
        key: impl AsRef<[u8]>,
        value: impl AsRef<[u8]>,
        options: SetOptions,
    ) -> Result<SetOutcome, Error> {
        let (key, value) = (key.as_ref(), value.as_ref());
        check_value(value)?;
        let args = SetArgs::new(options);
        let level = cluster::requests::level_word(options.level);
        args.outcome(self.command_at(key, &args.words(key, value), level).await?)
    }

    /// Deletes any key; whether it existed.
    ///
    /// # Errors
    /// As [`CoreHandle::set`].
    pub async fn delete(&self, key: impl AsRef<[u8]>) -> Result<bool, Error> {
        let key = key.as_ref();
        Ok(self.command(key, &[b"DEL", key]).await?.integer()? != 0)
    }

    /// Adds `by` to the number under any key; see [`crate::GridKv::incr`].
    ///
    /// # Errors
    /// As [`crate::GridKv::incr`].
    pub async fn incr(&self, key: impl AsRef<[u8]>, by: i64) -> Result<i64, Error> {
        let key = key.as_ref();
        self.command(key, &[b"INCRBY", key, by.to_string().as_bytes()]).await?.integer()
    }

    /// Reads many keys: those owned here at once, the others with one message per sibling.
    ///
    /// # Errors
    /// [`Error::KeyTooLong`] for the whole call; others per key.
    pub async fn get_many<K: AsRef<[u8]>>(&self, keys: &[K]) -> Result<Values, Error> {
        for key in keys {
            check_key(key.as_ref())?;
        }
        let slot = self.core.state.borrow_mut().waiters.many(keys.len());
        // From here on the slot is given back even if this future is dropped half way.
        let many = Many { core: &self.core, slot: Some(slot) };
        let mut next = 0;
        while next < keys.len() {
            next = self.begin_gets(keys, next, slot);
            self.core.kick();
            if next < keys.len() {
                self.yield_now().await;
            }
        }
        Ok(many.await.into_values())
    }

    /// Asks siblings for their keys of `keys[next..]`, until a lane is full or too much is under way to other nodes, and reads
    /// the own ones meanwhile. Where to go on.
    fn begin_gets<K: AsRef<[u8]>>(&self, keys: &[K], next: usize, slot: u32) -> usize {
        let state = &mut *self.core.state.borrow_mut();
        let now = state.now;
        let group = state.waiters.group(slot);
        let mut own: Vec<(u32, KeyHash)> = Vec::with_capacity(keys.len() - next);
        let mut shared: Vec<(u32, KeyHash)> = Vec::new();
        let room = self.core.member.borrow().as_ref().map_or(0, cluster::Member::room_for_task);
        let mut end = next;
        for key in &keys[next..] {
            let key = key.as_ref();
            let (hash, owner) = self.locate(key);
            if owner == self.core.id && state.solo {
                own.push((end as u32, hash));
            } else if owner == self.core.id {
                if shared.len() == room {
                    break;
                }
                shared.push((end as u32, hash));
            } else {
                let head = Head { conn: LOCAL, hash: hash.0, slot, index: end as u32, ..Head::default() };
                // Where other nodes hold copies each key is an operation of its own.
                let asked = match state.solo {
                    true => state.mesh.key(owner, &head, key),
                    false => state.mesh.request(owner, head, Kind::Get, &[key]),
                };
                if asked.is_err() {
                    break;
                }
                group.missing += 1;
            }
            end += 1;
        }
        if end - next >= WORTH_A_BATCH {
            // The siblings work while this core does.
            let (batches, wakes) = state.mesh.flush();
            state.metrics.record_turn(true, batches, wakes);
        }
        for window in own.chunks(AHEAD) {
            // The misses of a window's keys overlap: first their buckets are asked for, then their entries.
            window.iter().for_each(|(_, hash)| state.store.prefetch_place(*hash));
            window.iter().for_each(|(_, hash)| state.store.prefetch_entry(*hash));
            for &(at, hash) in window {
                if let Some(value) = state.store.value(hash, keys[at as usize].as_ref(), now) {
                    group.add(at, value);
                }
            }
        }
        group.missing += shared.len() as u32;
        for (at, hash) in shared {
            let head = Head { conn: LOCAL, hash: hash.0, slot, index: at, ..Head::default() };
            Ask::Get(keys[at as usize].as_ref()).begin(&self.core, state, head);
        }
        end
    }

    /// One page of this core's keys in hash order, starting at `from`; the position to go on from, or `None` at the end.
    pub(crate) fn scan_page(&self, from: KeyHash, limit: usize, mut look: impl FnMut(&[u8], &[u8])) -> Option<KeyHash> {
        let mut state = self.core.state.borrow_mut();
        let now = state.now;
        state.store.scan(from, limit, now, &mut |entry| look(entry.key, entry.value))
    }

    /// Empties all cores, or none. In a task of a core it goes on to its end whether or not somebody waits.
    pub(crate) async fn clear_all(&self) -> Result<(), Error> {
        let flushes = &self.core.topology.flushes;
        if !flushes.begin(1) {
            return Err(Error::Reply(cluster::NO_FLUSH.into()));
        }
        let _all = flushes.part();
        let done = gather::each_core(&self.core, |core| CoreHandle::new(core.clone()).clear()).await;
        if done.len() < self.cores() {
            return Err(Error::Closed);
        }
        done.into_iter().collect()
    }

    fn clear(&self) -> Result<(), Error> {
        let mut state = self.core.state.borrow_mut();
        if !state.solo {
            return Err(Error::Reply(crate::cluster::NO_FLUSH.into()));
        }
        let now = state.now;
        let cleared = state.store.clear(now).map_err(Error::from);
        drop(state);
        self.core.keep();
        cleared
    }

    /// A copy of this core's counters.
    pub(crate) fn metrics(&self) -> CoreMetrics {
        self.core.metrics()
    }

    /// The core's time in unix milliseconds, at most some 10 ms old: what expiries are compared with.
    pub fn now_ms(&self) -> Millis {
        self.core.state.borrow().now
    }

    /// Lets the core's other work run: its turn, other tasks.
    pub async fn yield_now(&self) {
        futures_lite::future::yield_now().await;
    }

    pub(crate) fn core(&self) -> &CoreRc {
        &self.core
    }

    async fn command(&self, key: &[u8], args: &[&[u8]]) -> Result<Reply, Error> {
        self.command_at(key, args, 0).await
    }

    /// As [`CoreHandle::command`], at a level as a head carries it.
    async fn command_at(&self, key: &[u8], args: &[&[u8]], level: u32) -> Result<Reply, Error> {
        check_key(key)?;
        let (hash, owner) = self.locate(key);
        let spec = spec_of(args[0]);
        if self.runs(owner) {
            let mut reply = serve::NativeReply::default();
            let state = &mut *self.core.state.borrow_mut();
            serve::run(&mut state.store, state.now, spec, args, &mut reply);
            self.core.kick();
            return Ok(Reply { status: reply.status, aux: reply.aux, bytes: Bytes::from(reply.bytes) });
        }
        Ok(self.hop(owner, hash, level, Ask::Command(spec, args)).await)
    }

    /// Whether requests to that core are function calls: see [`super::State::solo`].
    fn runs(&self, owner: CoreId) -> bool {
        owner == self.core.id && self.core.state.borrow().solo
    }
}

impl CoreHandle {
    /// One request to a sibling, or to other nodes, and its reply. Waits for room when the lane is full.
    async fn hop(&self, owner: CoreId, hash: KeyHash, level: u32, ask: Ask<'_>) -> Reply {
        while owner != self.core.id && !self.core.state.borrow().mesh.has_room(owner) {
            self.core.kick();
            self.yield_now().await;
        }
        let slot = {
            let state = &mut *self.core.state.borrow_mut();
            let slot = state.waiters.one();
            let head = Head { conn: LOCAL, hash: hash.0, slot, level, ..Head::default() };
            match owner == self.core.id {
                true => ask.begin(&self.core, state, head),
                false => ask.send(&mut state.mesh, owner, head).expect("room was seen, and nobody ran in between"),
            }
            slot
        };
        if owner != self.core.id && self.core.state.borrow().mesh.open_requests(owner) >= WORTH_A_BATCH {
            self.core.attend_siblings();
        }
        self.core.kick();
        let answer = One { core: &self.core, slot: Some(slot) }.await;
        Reply { status: answer.status, aux: answer.aux, bytes: answer.bytes }
    }
}

/// A request to a core.
#[derive(Clone, Copy)]
enum Ask<'a> {
    Get(&'a [u8]),
    Set(&'a [u8], &'a [u8]),
    Command(&'static Spec, &'a [&'a [u8]]),
}

impl Ask<'_> {
    /// Through the lane to a sibling.
    fn send(self, mesh: &mut Mesh, to: CoreId, mut head: Head) -> Result<(), Busy> {
        match self {
            Ask::Get(key) => mesh.request(to, head, Kind::Get, &[key]),
            Ask::Set(key, value) => {
                head.a = key.len() as u32;
                mesh.request(to, head, Kind::Set, &[key, value])
            }
            Ask::Command(spec, args) => {
                (head.spec, head.flag) = (spec.id.0, serve::NATIVE);
                mesh.command(to, head, args)
            }
        }
    }

    /// For data of this core that other nodes hold too.
    fn begin(self, core: &CoreRc, state: &mut State, mut head: Head) {
        cluster::begin_here(core, state, |batch| match self {
            Ask::Get(key) => batch.push(head, Kind::Get, &[key]),
            Ask::Set(key, value) => {
                head.a = key.len() as u32;
                batch.push(head, Kind::Set, &[key, value]);
            }
            Ask::Command(spec, args) => {
                (head.spec, head.flag) = (spec.id.0, serve::NATIVE);
                batch.push_command(head, args);
            }
        });
    }
}

/// What is told to who would write one copy of several.
fn replicated() -> Error {
    Error::Reply("ERR other nodes hold copies of this key: use `set`, which writes them all".into())
}

/// Waits for one reply; gives its slot back when dropped early.
struct One<'a> {
    core: &'a CoreRc,
    slot: Option<u32>,
}

/// Waits for all replies of a group; gives its slot back when dropped early.
struct Many<'a> {
    core: &'a CoreRc,
    slot: Option<u32>,
}

macro_rules! waiting {
    ($name:ident, $poll:ident, $out:ty) => {
        impl Future for $name<'_> {
            type Output = $out;

            fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<$out> {
                let slot = self.slot.expect("not polled again after it was ready");
                let polled = self.core.state.borrow_mut().waiters.$poll(slot, cx.waker());
                if polled.is_ready() {
                    self.slot = None;
                }
                polled
            }
        }

        impl Drop for $name<'_> {
            fn drop(&mut self) {
                if let Some(slot) = self.slot {
                    self.core.state.borrow_mut().waiters.abandon(slot);
                }
            }
        }
    };
}

waiting!(One, poll_one, Answer);
waiting!(Many, poll_many, Group);
