//! The handle of an embedded node: for any thread and any async runtime.
//!
//! A handle knows which core owns a key, so a request goes straight there: it is written as a frame into a batch, left in
//! the core's flume inbox, served in the core's next turn, and answered with a batch in the same format. The futures use
//! nothing of a runtime but the waker they are polled with.
//!
//! ```text
//!   your thread            core that owns the key
//!   frame ── flume ──────▶ serve, in its turn
//!   value ◀── oneshot ──── reply batch (the value is a reference into it)
//! ```

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_channel::oneshot;
use gridkv_engine::command::{self, Spec};
use gridkv_net::frame::{Batch, Frame, Head, Kind, Status};
use gridkv_net::mesh::CoreId;

use crate::cluster::requests::level_word;
use crate::cluster::{ClusterEvent, ClusterView, Level};
use crate::cores::CoreHandle;
use crate::cores::serve::NATIVE;
use crate::node::Running;
use crate::scan::{Scan, ScanKeys};
use crate::topology::{Message, ReplyTo, Topology};
use crate::values::Values;
use crate::{Builder, Error, Stats};

/// Room made for a group's requests to one core: frames, and bytes of a key each.
const MOST_ROOM: usize = 1024;
const EXPECTED_KEY: usize = 32;

/// An embedded node. Cloning is cheap; every clone reaches the same node, from any thread.
///
/// The node stops when the last clone is dropped or [`GridKv::close`] is called.
///
/// ```
/// # fn main() -> Result<(), gridkv::Error> {
/// let db = gridkv::GridKv::builder().cores("1")?.start()?;
/// let blocking = db.blocking();
/// blocking.set("user:1001", "Alice")?;
/// assert_eq!(blocking.get("user:1001")?.as_deref(), Some(&b"Alice"[..]));
/// blocking.close()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct GridKv {
    running: Arc<Running>,
}

impl std::fmt::Debug for GridKv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GridKv").field("cores", &self.cores()).finish_non_exhaustive()
    }
}

/// What a [`GridKv::set_with`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetOutcome {
    /// Whether the value was written; `nx` and `xx` may prevent it.
    pub applied: bool,
    /// The value before, when it was asked for with [`SetOptions::get`] and there was one.
    pub previous: Option<Bytes>,
}

/// Conditions and lifetime of a write; see [`GridKv::set_with`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetOptions {
    ttl: Option<Duration>,
    keep_ttl: bool,
    condition: Option<Condition>,
    get: bool,
    pub(crate) level: Level,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Absent,
    Present,
}

impl SetOptions {
    /// Writes always, for ever.
    pub fn new() -> SetOptions {
        SetOptions::default()
    }

    /// The entry expires that long from now; whole milliseconds, at least one. Wins over [`SetOptions::keep_ttl`].
    pub fn ttl(mut self, ttl: Duration) -> SetOptions {
        self.ttl = Some(ttl);
        self
    }

    /// Keeps the lifetime that the key already has.
    pub fn keep_ttl(mut self) -> SetOptions {
        self.keep_ttl = true;
        self
    }

    /// Writes only if the key does not exist. Replaces [`SetOptions::xx`].
    pub fn nx(mut self) -> SetOptions {
        self.condition = Some(Condition::Absent);
        self
    }

    /// Writes only if the key exists. Replaces [`SetOptions::nx`].
    pub fn xx(mut self) -> SetOptions {
        self.condition = Some(Condition::Present);
        self
    }

    /// Acknowledged when that many replicas have it; conditional writes never at fewer than a quorum.
    pub fn level(mut self, level: Level) -> SetOptions {
        self.level = level;
        self
    }

    /// Returns the value before.
    pub fn get(mut self) -> SetOptions {
        self.get = true;
        self
    }
}

impl GridKv {
    /// Starts describing a node.
    pub fn builder() -> Builder {
        Builder::new()
    }

    pub(crate) fn new(running: Arc<Running>) -> GridKv {
        GridKv { running }
    }

    fn topology(&self) -> &Topology {
        &self.running.topology
    }

    /// The same operations for threads that may block.
    ///
    /// Never call them on a core (inside [`GridKv::on_core`]): the core would wait for itself.
    pub fn blocking(&self) -> Blocking {
        Blocking { db: self.clone() }
    }

    /// Number of cores that own shards.
    pub fn cores(&self) -> usize {
        self.topology().cores()
    }

    /// The core, from 0, that owns `key`.
    pub fn core_of(&self, key: impl AsRef<[u8]>) -> usize {
        let topology = self.topology();
        topology.owner_of(topology.keyspace().locate(key.as_ref())).index()
    }

    /// Address the RESP server listens on, if it does.
    pub fn resp_addr(&self) -> Option<std::net::SocketAddr> {
        self.running.resp_addr
    }

    /// Address where other nodes connect, if this one takes part in a cluster: a seed for them.
    pub fn peer_addr(&self) -> Option<std::net::SocketAddr> {
        self.running.peer_addr
    }

    /// The cluster as this node sees it now; `None` when it stands alone.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub async fn cluster_status(&self) -> Result<Option<ClusterView>, Error> {
        self.on_core(0, |handle| async move { crate::cluster::view(handle.core()).await }).await
    }

    /// What happens in the cluster from now on: nodes that come and go, maps that are adopted, copies of shards that have
    /// moved, shards at risk. Ends when the node stops; at once
    /// when it stands alone. Several streams share the events: each goes to one of them. Up to 1024 wait for a slow listener,
    /// further ones are missed.
    pub fn cluster_events(&self) -> impl futures_lite::Stream<Item = ClusterEvent> + Send + use<> {
        let events = self.running.events.clone().unwrap_or_else(|| flume::bounded(0).1);
        events.into_stream()
    }

    /// Address the HTTP server (`/metrics`, `/healthz`, `/readyz`) listens on, if it does.
    pub fn http_addr(&self) -> Option<std::net::SocketAddr> {
        self.running.http_addr
    }

    /// Reads a key. The value is a reference into the reply of the core: no further copy is made.
    ///
    /// # Errors
    /// [`Error::Closed`] when the node has stopped; [`Error::KeyTooLong`]; [`Error::Reply`] when the request failed on
    /// its core. Nothing was changed in any case.
    pub async fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Bytes>, Error> {
        let reply = self.one(key.as_ref(), |head, key, batch| batch.push(head, Kind::Get, &[key])).await?;
        reply.value()
    }

    /// Writes a key, for ever.
    ///
    /// # Errors
    /// As [`GridKv::get`], and [`Error::OutOfMemory`]: then nothing was changed. After [`Error::Closed`] the write may
    /// or may not have been applied.
    pub async fn set(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<(), Error> {
        let value = value.as_ref();
        check_value(value)?;
        let reply = self
            .one(key.as_ref(), |mut head, key, batch| {
                head.a = key.len() as u32;
                batch.push(head, Kind::Set, &[key, value]);
            })
            .await?;
        reply.done()
    }

    /// Writes a key under conditions, with a lifetime, or returning what was there.
    ///
    /// # Errors
    /// As [`GridKv::set`]; a prevented write is not an error but `applied: false`.
    pub async fn set_with(
        &self,
        key: impl AsRef<[u8]>,
        value: impl AsRef<[u8]>,
        options: SetOptions,
    ) -> Result<SetOutcome, Error> {
        let (key, value) = (key.as_ref(), value.as_ref());
        check_value(value)?;
        let level = level_word(options.level);
        let args = SetArgs::new(options);
        let reply = self.command_at(key, &args.words(key, value), level).await?;
        args.outcome(reply)
    }

    /// Deletes a key; whether it existed.
    ///
    /// # Errors
    /// As [`GridKv::set`].
    pub async fn delete(&self, key: impl AsRef<[u8]>) -> Result<bool, Error> {
        let reply = self.one(key.as_ref(), |head, key, batch| batch.push(head, Kind::Delete, &[key])).await?;
        Ok(reply.integer()? != 0)
    }

    /// Reads a key, asking as many replicas as `level` says; see `docs/CONSISTENCY.md` for what each level promises. On a node
    /// that stands alone all levels are the same.
    ///
    /// # Errors
    /// As [`GridKv::get`].
    pub async fn get_with(&self, key: impl AsRef<[u8]>, level: Level) -> Result<Option<Bytes>, Error> {
        let read = |head: Head, key: &[u8], batch: &mut Batch| {
            batch.push(Head { level: level_word(level), ..head }, Kind::Get, &[key]);
        };
        self.one(key.as_ref(), read).await?.value()
    }

    /// Whether a key exists.
    ///
    /// # Errors
    /// As [`GridKv::get`].
    pub async fn exists(&self, key: impl AsRef<[u8]>) -> Result<bool, Error> {
        let key = key.as_ref();
        Ok(self.command(key, &[b"EXISTS", key]).await?.integer()? != 0)
    }

    /// Adds `by` to the number under the key (0 when absent), keeping its lifetime; the number after.
    ///
    /// # Errors
    /// As [`GridKv::set`]; [`Error::Reply`] when the value is no 64-bit integer or the sum does not fit.
    pub async fn incr(&self, key: impl AsRef<[u8]>, by: i64) -> Result<i64, Error> {
        let key = key.as_ref();
        self.command(key, &[b"INCRBY", key, by.to_string().as_bytes()]).await?.integer()
    }

    /// Subtracts `by`; see [`GridKv::incr`].
    ///
    /// # Errors
    /// As [`GridKv::incr`].
    pub async fn decr(&self, key: impl AsRef<[u8]>, by: i64) -> Result<i64, Error> {
        let key = key.as_ref();
        self.command(key, &[b"DECRBY", key, by.to_string().as_bytes()]).await?.integer()
    }

    /// Reads many keys: grouped by core, all cores in parallel, one message each.
    ///
    /// # Errors
    /// [`Error::Closed`] and [`Error::KeyTooLong`] for the whole call; other errors come per key in the answer.
    pub async fn get_many<K: AsRef<[u8]>>(&self, keys: &[K]) -> Result<Values, Error> {
        let mut values = Values::missing(keys.len());
        let batches = self.group(keys.iter().map(AsRef::as_ref), |head, key, _, batch| batch.push_key(&head, key))?;
        for part in self.ask_all(batches).await? {
            let part = Bytes::from_owner(part);
            let number = values.add_part(part.clone());
            for frame in gridkv_net::frame::Frames::new(&part) {
                let frame = frame.expect("batches inside a node are whole");
                let key = frame.head.index as usize;
                match frame.status() {
                    Status::Values => {
                        for value in frame.values() {
                            let (key, place) = value.expect("batches inside a node are whole");
                            if let Some(place) = place {
                                values.place(key as usize, number, frame.payload_at + place.start, place.len());
                            }
                        }
                    }
                    Status::Value => values.place(key, number, frame.payload_at, frame.payload.len()),
                    Status::Nil => {}
                    _ => values.fail(key, Error::from_reply(frame.payload)),
                }
            }
        }
        Ok(values)
    }

    /// Writes many pairs, for ever: grouped by core, in parallel. Not atomic: each pair has its own result.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::KeyTooLong`], [`Error::ValueTooLong`] for the whole call, before anything was sent in
    /// the case of the last two.
    pub async fn set_many<K: AsRef<[u8]>, V: AsRef<[u8]>>(
        &self,
        pairs: &[(K, V)],
    ) -> Result<Vec<Result<(), Error>>, Error> {
        for (_, value) in pairs {
            check_value(value.as_ref())?;
        }
        let batches = self.group(pairs.iter().map(|(k, _)| k.as_ref()), |mut head, key, i, batch| {
            head.a = key.len() as u32;
            batch.push(head, Kind::Set, &[key, pairs[i].1.as_ref()]);
        })?;
        self.collect(batches, pairs.len(), |reply| reply.done()).await
    }

    /// Deletes many keys: grouped by core, in parallel; for each whether it existed.
    ///
    /// # Errors
    /// As [`GridKv::get_many`].
    pub async fn delete_many<K: AsRef<[u8]>>(&self, keys: &[K]) -> Result<Vec<Result<bool, Error>>, Error> {
        let batches =
            self.group(keys.iter().map(AsRef::as_ref), |head, key, _, batch| batch.push(head, Kind::Delete, &[key]))?;
        self.collect(batches, keys.len(), |reply| Ok(reply.integer()? != 0)).await
    }

    /// Streams all pairs whose key starts with `prefix`, in no useful order.
    ///
    /// A key that exists all along is seen exactly once (twice only if its core's table answers a page again); one that
    /// comes or goes meanwhile may or may not be seen. In a cluster with more nodes than copies these are the keys of which this node
    /// has a copy, and no others.
    pub fn scan(&self, prefix: impl AsRef<[u8]>) -> Scan {
        Scan::new(self.clone(), prefix.as_ref())
    }

    /// Streams all keys that start with `prefix`; see [`GridKv::scan`].
    pub fn scan_keys(&self, prefix: impl AsRef<[u8]>) -> ScanKeys {
        ScanKeys::new(self.clone(), prefix.as_ref())
    }

    /// Counters of every core.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub async fn stats(&self) -> Result<Stats, Error> {
        crate::node::stats(self, &self.running).await
    }

    /// Deletes every key on every core.
    ///
    /// # Errors
    /// [`Error::Closed`]. [`Error::Reply`] while other nodes hold copies: nothing is deleted.
    pub async fn clear(&self) -> Result<(), Error> {
        self.on_core(0, |handle| async move { handle.clear_all().await }).await?
    }

    /// Stops the node: connections are closed, every thread ends. Other clones answer [`Error::Closed`] from now on.
    ///
    /// # Errors
    /// [`Error::Panicked`] if a core's thread ended with a panic, [`Error::Failed`] if the node had stopped by itself because it
    /// could not go on.
    pub async fn close(&self) -> Result<(), Error> {
        self.running.topology.stop();
        let running = self.running.clone();
        // Joining blocks, so it is done by a thread of its own and awaited.
        let (done, ended) = oneshot::channel();
        std::thread::spawn(move || {
            let _ = done.send(running.join());
        });
        ended.await.map_err(|_| Error::Closed)?
    }

    /// Waits until the node has stopped, whoever stopped it: [`GridKv::close`] on another clone, or a client's `SHUTDOWN`.
    /// Every core has left its loop by then; [`GridKv::close`] waits for their threads too.
    pub async fn closed(&self) {
        let _ = self.running.ended.recv_async().await;
    }

    /// Runs `work` as a task on a core, beside the data: no hop for the keys that core owns.
    ///
    /// The future stays on that core, so it need not be `Send`. It shares the core with everything else: a loop that does
    /// not await for long should call [`CoreHandle::yield_now`].
    ///
    /// # Errors
    /// [`Error::NoSuchCore`], [`Error::Closed`]; [`Error::Panicked`] when the task panicked (the core goes on).
    pub async fn on_core<F, Fut, T>(&self, core: usize, work: F) -> Result<T, Error>
    where
        F: FnOnce(CoreHandle) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        if core >= self.cores() {
            return Err(Error::NoSuchCore { core, cores: self.cores() });
        }
        let (done, result) = oneshot::channel();
        let run: Box<dyn FnOnce(&crate::cores::CoreRc) + Send> = Box::new(move |core| {
            let handle = CoreHandle::new(core.clone());
            crate::cores::spawn_guarded(core, async move { work(handle).await }, done);
        });
        if !self.topology().links[core].send(Message::Run(run)).await {
            return Err(Error::Closed);
        }
        result.await.map_err(|_| Error::Closed)?
    }

    /// Runs `work` on every core at once; the results in core order.
    ///
    /// # Errors
    /// As [`GridKv::on_core`]; the first error.
    pub async fn on_each_core<F, Fut, T>(&self, work: F) -> Result<Vec<T>, Error>
    where
        F: FnOnce(CoreHandle) -> Fut + Clone + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let mut pending = Vec::new();
        for core in 0..self.cores() {
            let (done, result) = oneshot::channel();
            let work = work.clone();
            let run: Box<dyn FnOnce(&crate::cores::CoreRc) + Send> = Box::new(move |core| {
                let handle = CoreHandle::new(core.clone());
                crate::cores::spawn_guarded(core, async move { work(handle).await }, done);
            });
            if !self.topology().links[core].send(Message::Run(run)).await {
                return Err(Error::Closed);
            }
            pending.push(result);
        }
        let mut results = Vec::with_capacity(pending.len());
        for result in pending {
            results.push(result.await.map_err(|_| Error::Closed)??);
        }
        Ok(results)
    }

    /// Runs a function on a core between two turns and returns its result.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        core: usize,
        f: impl FnOnce(&CoreHandle) -> T + Send + 'static,
    ) -> Result<T, Error> {
        self.on_core(core, move |handle| async move { f(&handle) }).await
    }

    /// Runs one command of the command table on the owner of `key`.
    async fn command(&self, key: &[u8], args: &[&[u8]]) -> Result<Reply, Error> {
        self.command_at(key, args, 0).await
    }

    async fn command_at(&self, key: &[u8], args: &[&[u8]], level: u32) -> Result<Reply, Error> {
        let spec = spec_of(args[0]);
        self.one(key, |mut head, _, batch| {
            (head.spec, head.level) = (spec.id.0, level);
            head.flag = NATIVE;
            batch.push_command(head, args);
        })
        .await
    }

    async fn one(&self, key: &[u8], push: impl FnOnce(Head, &[u8], &mut Batch)) -> Result<Reply, Error> {
        check_key(key)?;
        let topology = self.topology();
        let hash = topology.keyspace().locate(key);
        let mut batch = Batch::new();
        push(Head { hash: hash.0, ..Head::default() }, key, &mut batch);
        let pending = self.send(topology.owner_of(hash), batch, None).await?;
        Ok(Reply::new(pending.await.map_err(|_| Error::Closed)?))
    }

    async fn send(
        &self,
        core: CoreId,
        batch: Batch,
        all: Option<Arc<oneshot::Sender<()>>>,
    ) -> Result<oneshot::Receiver<Batch>, Error> {
        let (reply, pending) = ReplyTo::new(all);
        if self.topology().links[core.index()].send(Message::Requests(batch, reply)).await {
            Ok(pending)
        } else {
            Err(Error::Closed)
        }
    }

    fn group<'k>(
        &self,
        keys: impl Iterator<Item = &'k [u8]>,
        mut push: impl FnMut(Head, &'k [u8], usize, &mut Batch),
    ) -> Result<Vec<Batch>, Error> {
        let topology = self.topology();
        let mut batches: Vec<Batch> = (0..topology.cores()).map(|_| Batch::new()).collect();
        // Keys spread evenly, give or take some.
        let share = keys.size_hint().0 / batches.len();
        batches.iter_mut().for_each(|batch| batch.reserve((share + share / 4).min(MOST_ROOM), EXPECTED_KEY));
        for (i, key) in keys.enumerate() {
            check_key(key)?;
            let hash = topology.keyspace().locate(key);
            let owner = topology.owner_of(hash).index();
            let head = Head { hash: hash.0, index: i as u32, ..Head::default() };
            push(head, key, i, &mut batches[owner]);
        }
        Ok(batches)
    }

    /// Asks all cores that have a batch and waits until the last one has answered: the caller's thread wakes up once.
    async fn ask_all(&self, batches: Vec<Batch>) -> Result<Vec<Batch>, Error> {
        let (all, ended) = oneshot::channel();
        let all = Arc::new(all);
        let mut pending = Vec::with_capacity(batches.len());
        for (core, batch) in batches.into_iter().enumerate() {
            if !batch.is_empty() {
                pending.push(self.send(CoreId(core as u16), batch, Some(all.clone())).await?);
            }
        }
        drop(all);
        // Nothing is ever sent: it ends when nobody is left who could.
        let _ = ended.await;
        pending.into_iter().map(|mut answer| answer.try_recv().ok().flatten().ok_or(Error::Closed)).collect()
    }

    async fn collect<T>(
        &self,
        batches: Vec<Batch>,
        keys: usize,
        read: impl Fn(Reply) -> Result<T, Error>,
    ) -> Result<Vec<Result<T, Error>>, Error> {
        let mut results: Vec<Result<T, Error>> = (0..keys).map(|_| Err(Error::Closed)).collect();
        for batch in self.ask_all(batches).await? {
            for frame in batch.frames() {
                let frame = frame.expect("batches inside a node are whole");
                results[frame.head.index as usize] = read(Reply::copied(&frame));
            }
        }
        Ok(results)
    }
}

/// The operations of [`GridKv`] for threads that may block; see [`GridKv::blocking`].
#[derive(Clone, Debug)]
pub struct Blocking {
    db: GridKv,
}

macro_rules! blocking {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) -> $out:ty;)*) => {
        $($(#[$doc])*
        pub fn $name(&self, $($arg: $type),*) -> $out {
            futures_lite::future::block_on(self.db.$name($($arg),*))
        })*
    };
}

impl Blocking {
    blocking! {
        /// See [`GridKv::get`].
        ///
        /// # Errors
        /// The same.
        get(key: impl AsRef<[u8]>) -> Result<Option<Bytes>, Error>;
        /// See [`GridKv::set`].
        ///
        /// # Errors
        /// The same.
        set(key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<(), Error>;
        /// See [`GridKv::set_with`].
        ///
        /// # Errors
        /// The same.
        set_with(key: impl AsRef<[u8]>, value: impl AsRef<[u8]>, options: SetOptions) -> Result<SetOutcome, Error>;
        /// See [`GridKv::delete`].
        ///
        /// # Errors
        /// The same.
        delete(key: impl AsRef<[u8]>) -> Result<bool, Error>;
        /// See [`GridKv::exists`].
        ///
        /// # Errors
        /// The same.
        exists(key: impl AsRef<[u8]>) -> Result<bool, Error>;
        /// See [`GridKv::incr`].
        ///
        /// # Errors
        /// The same.
        incr(key: impl AsRef<[u8]>, by: i64) -> Result<i64, Error>;
        /// See [`GridKv::decr`].
        ///
        /// # Errors
        /// The same.
        decr(key: impl AsRef<[u8]>, by: i64) -> Result<i64, Error>;
        /// See [`GridKv::stats`].
        ///
        /// # Errors
        /// The same.
        stats() -> Result<Stats, Error>;
        /// See [`GridKv::clear`].
        ///
        /// # Errors
        /// The same.
        clear() -> Result<(), Error>;
        /// See [`GridKv::close`].
        ///
        /// # Errors
        /// The same.
        close() -> Result<(), Error>;
    }

    /// See [`GridKv::get_many`].
    ///
    /// # Errors
    /// The same.
    pub fn get_many<K: AsRef<[u8]>>(&self, keys: &[K]) -> Result<Values, Error> {
        futures_lite::future::block_on(self.db.get_many(keys))
    }

    /// See [`GridKv::set_many`].
    ///
    /// # Errors
    /// The same.
    pub fn set_many<K: AsRef<[u8]>, V: AsRef<[u8]>>(&self, pairs: &[(K, V)]) -> Result<Vec<Result<(), Error>>, Error> {
        futures_lite::future::block_on(self.db.set_many(pairs))
    }

    /// See [`GridKv::delete_many`].
    ///
    /// # Errors
    /// The same.
    pub fn delete_many<K: AsRef<[u8]>>(&self, keys: &[K]) -> Result<Vec<Result<bool, Error>>, Error> {
        futures_lite::future::block_on(self.db.delete_many(keys))
    }

    /// All pairs whose key starts with `prefix`, page by page; see [`GridKv::scan`].
    pub fn scan(&self, prefix: impl AsRef<[u8]>) -> impl Iterator<Item = Result<(Bytes, Bytes), Error>> {
        futures_lite::stream::block_on(self.db.scan(prefix))
    }

    /// All keys that start with `prefix`; see [`GridKv::scan_keys`].
    pub fn scan_keys(&self, prefix: impl AsRef<[u8]>) -> impl Iterator<Item = Result<Bytes, Error>> {
        futures_lite::stream::block_on(self.db.scan_keys(prefix))
    }

    /// See [`GridKv::on_core`].
    ///
    /// # Errors
    /// The same.
    pub fn on_core<F, Fut, T>(&self, core: usize, work: F) -> Result<T, Error>
    where
        F: FnOnce(CoreHandle) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        futures_lite::future::block_on(self.db.on_core(core, work))
    }

    /// See [`GridKv::on_each_core`].
    ///
    /// # Errors
    /// The same.
    pub fn on_each_core<F, Fut, T>(&self, work: F) -> Result<Vec<T>, Error>
    where
        F: FnOnce(CoreHandle) -> Fut + Clone + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        futures_lite::future::block_on(self.db.on_each_core(work))
    }
}

/// One reply, whoever carried it.
pub(crate) struct Reply {
    pub(crate) status: Status,
    pub(crate) aux: i64,
    pub(crate) bytes: Bytes,
}

impl Reply {
    fn new(batch: Batch) -> Reply {
        let frame = batch.frames().next().expect("each request is answered").expect("batches inside a node are whole");
        let (status, aux) = (frame.status(), frame.head.aux);
        let (at, len) = (frame.payload_at, frame.payload.len());
        let bytes = if len == 0 { Bytes::new() } else { Bytes::from_owner(batch).slice(at..at + len) };
        Reply { status, aux, bytes }
    }

    fn copied(frame: &Frame<'_>) -> Reply {
        Reply { status: frame.status(), aux: frame.head.aux, bytes: Bytes::copy_from_slice(frame.payload) }
    }

    pub(crate) fn value(self) -> Result<Option<Bytes>, Error> {
        match self.status {
            Status::Value => Ok(Some(self.bytes)),
            Status::Nil => Ok(None),
            _ => Err(Error::from_reply(&self.bytes)),
        }
    }

    pub(crate) fn done(self) -> Result<(), Error> {
        match self.status {
            Status::Done => Ok(()),
            _ => Err(Error::from_reply(&self.bytes)),
        }
    }

    pub(crate) fn integer(self) -> Result<i64, Error> {
        match self.status {
            Status::Integer => Ok(self.aux),
            _ => Err(Error::from_reply(&self.bytes)),
        }
    }
}

/// The words of a conditional SET and the meaning of its reply.
pub(crate) struct SetArgs {
    options: SetOptions,
    ttl_ms: Option<String>,
}

impl SetArgs {
    pub(crate) fn new(options: SetOptions) -> SetArgs {
        let ttl_ms = options.ttl.map(|ttl| ttl.as_millis().clamp(1, i64::MAX as u128 / 2).to_string());
        SetArgs { options, ttl_ms }
    }

    /// The whole command.
    pub(crate) fn words<'a>(&'a self, key: &'a [u8], value: &'a [u8]) -> Vec<&'a [u8]> {
        let mut words: Vec<&[u8]> = vec![b"SET", key, value];
        if let Some(ttl) = &self.ttl_ms {
            words.extend([&b"PX"[..], ttl.as_bytes()]);
        } else if self.options.keep_ttl {
            words.push(b"KEEPTTL");
        }
        match self.options.condition {
            Some(Condition::Absent) => words.push(b"NX"),
            Some(Condition::Present) => words.push(b"XX"),
            None => {}
        }
        if self.options.get {
            words.push(b"GET");
        }
        words
    }

    /// With GET the reply is the value before, so whether a condition held follows from it; without, it is OK or nil.
    pub(crate) fn outcome(&self, reply: Reply) -> Result<SetOutcome, Error> {
        if !self.options.get {
            let applied = reply.status != Status::Nil;
            if applied {
                reply.done()?;
            }
            return Ok(SetOutcome { applied, previous: None });
        }
        let previous = reply.value()?;
        let applied = match self.options.condition {
            Some(Condition::Absent) => previous.is_none(),
            Some(Condition::Present) => previous.is_some(),
            None => true,
        };
        Ok(SetOutcome { applied, previous })
    }
}

/// The table entry of a command this crate itself uses.
pub(crate) fn spec_of(name: &[u8]) -> &'static Spec {
    command::lookup(name).expect("the facade names commands of the table")
}

pub(crate) fn check_key(key: &[u8]) -> Result<(), Error> {
    let max = gridkv_engine::record::MAX_KEY_LEN;
    if key.len() > max { Err(Error::KeyTooLong { len: key.len(), max }) } else { Ok(()) }
}

pub(crate) fn check_value(value: &[u8]) -> Result<(), Error> {
    let max = gridkv_engine::record::MAX_VALUE_LEN;
    if value.len() > max { Err(Error::ValueTooLong { len: value.len(), max }) } else { Ok(()) }
}

/// The wall clock in unix milliseconds.
pub(crate) fn unix_ms() -> u64 {
    unix_us() / 1000
}

/// The wall clock in unix microseconds: the one place of this crate that reads it.
pub(crate) fn unix_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}
