//! Requests of clients for shards that other nodes hold too: each becomes an operation of this core's coordinator, and its
//! end a reply.
//!
//! ```text
//!   session, future, sibling, foreign thread, peer        (origin)
//!        │ frame
//!        ▼
//!   GET SET DEL ───────────▶ one operation ─────────────────────────────────────────▶ reply
//!   other commands ────────▶ read their keys ──────────▶ run on the scratch store ─▶ write what changed ─▶ reply
//!        └ whose outcome depends on what they find: at the orderer of the shard only, forwarded there
//! ```
//!
//! The scratch store holds the keys of one command for as long as it runs. So every command of the table works on replicated
//! data as it does alone, and no command knows of replication.
//!
//! Bounded by the coordinator, which refuses beyond its limits, and by [`Requests::has_room`]. What a link between nodes cannot
//! carry is refused here, before anything is stored: see [`MAX_VALUE`].

use std::collections::BTreeSet;
use std::time::Duration;

use gridkv_cluster::ids::{NodeNo, Now};
use gridkv_cluster::outbox::{Changed, Failure, Found, Outbox, Outcome};
use gridkv_cluster::quorum::Level;
use gridkv_cluster::shards::{Operation, Shards};
use gridkv_cluster::wire::{Ask, Why};
use gridkv_engine::Millis;
use gridkv_engine::command::{self, CommandId, Flags, Spec};
use gridkv_engine::hash::KeyHash;
use gridkv_engine::hlc::Version;
use gridkv_engine::record::Entry;
use gridkv_engine::store::{Store, StoreError};
use gridkv_net::frame::{Batch, Frame, HEAD_LEN, Head, Kind, Status};
use gridkv_net::mesh::CoreId;
use gridkv_net::session::PART_WRITTEN;
use gridkv_net::session::transaction::{Step, Transaction, version_bytes};

use crate::cores::LOCAL;
use crate::cores::serve::{self, Scratch, Serving};
use crate::metrics::CoreMetrics;
use crate::server::settings::Settings;
use crate::server::slowlog;
use crate::topology::ReplyTo;

/// Who waits for the reply.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Origin {
    /// A session or a future of this core: the head says which.
    Here,
    /// A sibling.
    Sibling(CoreId),
    /// A foreign thread: its group, and the place in it.
    Foreign(u32, u32),
    /// Another node, for which this core orders the command.
    Peer(NodeNo, Ask),
}

/// How a command is run on replicated data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// It tells what is there: it runs anywhere, on what as many replicas have as the client wants.
    Read,
    /// What it writes does not depend on what is there: it runs anywhere, without reading.
    Blind,
    /// It deletes what is there, or tells it if nothing watched has changed; twice is as good as once: it runs anywhere, on
    /// what a quorum has.
    Loose,
    /// Its outcome depends on what it finds.
    Ordered,
}

#[derive(Debug)]
enum Stage {
    Get,
    Set,
    Delete,
    Version,
    /// Its keys are being read.
    Reading,
    /// The orderer runs it.
    Forwarded,
    /// It has run; what it changed is being written.
    Writing {
        status: Status,
        aux: i64,
        bytes: Vec<u8>,
    },
}

#[derive(Debug)]
struct Request {
    origin: Origin,
    kind: Kind,
    head: Head,
    /// Of commands and transactions; of others what the slow log shows.
    payload: Vec<u8>,
    /// What it counts among the bytes of all.
    bytes: usize,
    stage: Stage,
    /// Until when it is tried again while its shard has no orderer.
    patience: Millis,
    /// When it has ended at the latest.
    deadline: Millis,
    /// When it began, as [`Lent::since`].
    begun: Duration,
    /// How it is run; of commands and transactions.
    class: Class,
}

/// A reply on its way.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) head: Head,
    pub(crate) status: Status,
    pub(crate) aux: i64,
    pub(crate) bytes: Vec<u8>,
}

/// A request of a client that took long.
#[derive(Debug)]
pub(crate) struct Slow {
    /// Where its client is: `None` when it is one of this core.
    pub(crate) core: Option<CoreId>,
    pub(crate) conn: u64,
    pub(crate) spec: &'static Spec,
    pub(crate) took: Duration,
    /// As the slow log shows them; none when it keeps none.
    pub(crate) shown: Vec<Vec<u8>>,
}

/// Requests of a foreign thread that are answered together.
#[derive(Debug)]
struct Group {
    left: usize,
    replies: Vec<Option<Reply>>,
    to: ReplyTo,
}

/// Places by number.
#[derive(Debug)]
struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    fn new() -> Slab<T> {
        Slab { places: Vec::new(), free: Vec::new() }
    }

    fn insert(&mut self, value: T) -> u32 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() as u32 - 1
        });
        self.places[at as usize] = Some(value);
        at
    }

    fn take(&mut self, at: u32) -> Option<T> {
        let value = self.places.get_mut(at as usize)?.take();
        if value.is_some() {
            self.free.push(at);
        }
        value
    }

    fn get(&mut self, at: u32) -> Option<&mut T> {
        self.places.get_mut(at as usize)?.as_mut()
    }

    fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }
}

/// What running a request needs of its core.
pub(crate) struct Lent<'a> {
    pub(crate) now: Now,
    /// Time since the core's part in the cluster began: finer than [`Lent::now`], and never set back.
    pub(crate) since: Duration,
    pub(crate) store: &'a mut Store,
    pub(crate) metrics: &'a mut CoreMetrics,
    pub(crate) settings: &'a Settings,
    pub(crate) shards: &'a mut Shards,
    pub(crate) out: &'a mut Outbox,
}

impl Lent<'_> {
    fn start(&mut self, token: u64, operation: Operation<'_>) {
        self.shards.begin(self.now, self.store, token, operation, self.out);
    }
}

/// The requests of one core.
pub(crate) struct Requests {
    requests: Slab<Request>,
    /// Bytes of the requests under way.
    bytes: usize,
    /// How many of them are of foreign threads.
    foreign: usize,
    groups: Slab<Group>,
    /// Where commands run on what was read.
    scratch: Store,
    buffers: Scratch,
    /// Replies for sessions and futures of this core.
    pub(crate) here: Vec<Reply>,
    /// Replies for siblings.
    pub(crate) siblings: Vec<(CoreId, Reply)>,
    /// For the slow log and the latency monitor.
    pub(crate) slow: Vec<Slow>,
    /// Commands that wait for an orderer, and when they are tried again.
    again: Vec<(Millis, u32)>,
    timeout: Millis,
}

/// Keys of one command, at most.
const MAX_KEYS: usize = gridkv_cluster::coordinator::MAX_JOINED;
/// How soon a command is tried again whose shard had no orderer.
const AGAIN_MS: Millis = 50;
/// Requests of one core that are under way, at most: beyond it sessions wait.
const MAX_REQUESTS: usize = 8192;
/// Bytes of them, likewise: half of what the coordinator takes, which refuses nothing as long as it holds no more.
const MAX_BYTES: usize = 128 << 20;
/// Of them those of foreign threads, at most, so that a large batch leaves room for sessions; and those that one look of a task
/// of this core begins.
const MAX_BATCHED: usize = 1024;
/// Longest value in a cluster: with its key and the heads of all layers it has to fit into one frame of a link.
pub(crate) const MAX_VALUE: usize = 64 << 20;
/// Longest command that is sent to its orderer, and longest answer from there: likewise.
const MAX_MESSAGE: usize = MAX_VALUE + (128 << 10);
const LONG_COMMAND: &str = "ERR a command that another node of the cluster runs may be 64 MiB long; nothing was done";
const LONG_ANSWER: &str =
    "ERR the answer of a command that another node of the cluster runs may be 64 MiB long; nothing was done";

impl Requests {
    pub(crate) fn new(scratch: Store, timeout: Millis) -> Requests {
        Requests {
            requests: Slab::new(),
            bytes: 0,
            foreign: 0,
            groups: Slab::new(),
            scratch,
            buffers: Scratch::default(),
            here: Vec::new(),
            siblings: Vec::new(),
            slow: Vec::new(),
            again: Vec::new(),
            timeout,
        }
    }

    /// Another scratch store, for another seed of the key hash.
    pub(crate) fn set_scratch(&mut self, scratch: Store) {
        self.scratch = scratch;
    }

    /// Whether a session may send one more.
    pub(crate) fn has_room(&self) -> bool {
        self.requests.len() < MAX_REQUESTS && self.bytes < MAX_BYTES
    }

    /// Whether one more of a foreign thread is begun.
    pub(crate) fn has_room_for_foreign(&self) -> bool {
        self.has_room() && self.foreign < MAX_BATCHED
    }

    /// How many requests a task of this core may begin at once. What it leaves is for sessions.
    pub(crate) fn room_for_task(&self) -> usize {
        let free = if self.has_room() { MAX_REQUESTS - self.requests.len() } else { 0 };
        free.div_ceil(2).min(MAX_BATCHED)
    }

    fn insert(&mut self, request: Request) -> u32 {
        self.bytes += request.bytes;
        self.foreign += usize::from(matches!(request.origin, Origin::Foreign(..)));
        self.requests.insert(request)
    }

    fn take(&mut self, token: u32) -> Option<Request> {
        let request = self.requests.take(token)?;
        self.bytes -= request.bytes;
        self.foreign -= usize::from(matches!(request.origin, Origin::Foreign(..)));
        Some(request)
    }

    /// Requests under way.
    pub(crate) fn under_way(&self) -> usize {
        self.requests.len()
    }

    /// A group of `requests` requests of a foreign thread, answered together.
    pub(crate) fn group(&mut self, requests: usize, to: ReplyTo) -> u32 {
        let replies = (0..requests).map(|_| None).collect();
        self.groups.insert(Group { left: requests, replies, to })
    }

    /// Begins a request. `Err` when it is none for replicated data: then the core serves it by itself.
    pub(crate) fn begin(&mut self, lent: &mut Lent<'_>, frame: &Frame<'_>, origin: Origin) -> Result<(), Origin> {
        let (hash, level) = (KeyHash(frame.head.hash), level_of(frame.head.level));
        let patience = lent.now.mono + self.timeout;
        // What a command changes has some time left to be written when all else took as long as it may.
        let deadline = patience + self.timeout / 2;
        let request = |stage, payload: &[u8]| Request {
            patience,
            deadline,
            begun: lent.since,
            origin,
            kind: frame.kind,
            head: frame.head,
            payload: payload.to_vec(),
            bytes: frame.payload.len(),
            stage,
            class: Class::Read,
        };
        match frame.kind {
            Kind::Get => {
                let token = u64::from(self.insert(request(Stage::Get, frame.payload)));
                lent.start(token, Operation::Read { key: (hash, frame.payload), level });
            }
            Kind::Set => {
                let Ok((key, value)) = frame.key_value() else { return Err(origin) };
                let shown = key.len() + value.len().min(slowlog::MAX_ARG_LEN);
                let token = self.insert(request(Stage::Set, &frame.payload[..shown]));
                if value.len() > MAX_VALUE {
                    self.reply(token, Status::Error, 0, too_long(), lent);
                    return Ok(());
                }
                let token = u64::from(token);
                let expires_at = frame.head.aux as u64;
                lent.start(token, Operation::Write { key: (hash, key), value: Some(value), expires_at, level });
            }
            Kind::Delete => {
                let token = u64::from(self.insert(request(Stage::Delete, frame.payload)));
                lent.start(token, Operation::Delete { key: (hash, frame.payload), level });
            }
            Kind::Version => {
                let token = u64::from(self.insert(request(Stage::Version, &[])));
                lent.start(token, Operation::Read { key: (hash, frame.payload), level: Level::Quorum });
            }
            Kind::Command | Kind::Exec => {
                if frame.kind == Kind::Command
                    && command::by_id(CommandId(frame.head.spec)).is_none_or(|spec| spec.first_key == 0)
                {
                    return Err(origin);
                }
                let token = self.insert(request(Stage::Reading, frame.payload));
                self.run(lent, token);
            }
            Kind::Group | Kind::Reply => return Err(origin),
        }
        Ok(())
    }

    /// Finds out how a command is to be run, and begins.
    fn run(&mut self, lent: &mut Lent<'_>, token: u32) {
        let Some(request) = self.requests.get(token) else { return };
        let payload = std::mem::take(&mut request.payload);
        let (kind, head, patience, deadline) = (request.kind, request.head, request.patience, request.deadline);
        let is_peer = matches!(request.origin, Origin::Peer(..));
        let frame = Frame { kind, head, payload: &payload, payload_at: HEAD_LEN };
        let keyspace = lent.shards.view().keyspace();
        let plan = plan(&frame).map(|(class, keys)| {
            let hashed: Vec<(KeyHash, &[u8])> = keys.iter().map(|key| (keyspace.locate(key), *key)).collect();
            (class, hashed)
        });
        if let Ok((class, _)) = &plan {
            request.class = *class;
        }
        match plan {
            Err(text) => self.reply(token, Status::Error, 0, text.as_bytes().to_vec(), lent),
            Ok((class, keys)) => {
                let shard = keyspace.shard(KeyHash(head.hash));
                let apart = keys.iter().any(|(hash, _)| keyspace.shard(*hash) != shard);
                let orderer = match class {
                    // What a peer sends is run here whatever it is, so its keys have to be of the shard that it named.
                    _ if apart && (is_peer || class == Class::Ordered) => {
                        let text = "CROSSSLOT Keys in request don't hash to the same slot; a hash tag {...} puts them together";
                        return self.reply(token, Status::Error, 0, text.into(), lent);
                    }
                    Class::Ordered => lent.shards.orderer(KeyHash(head.hash)).map(Some),
                    _ => Ok(None),
                };
                let number = u64::from(token);
                match orderer {
                    Err(failure) => {
                        if let Some(request) = self.requests.get(token) {
                            request.payload = payload;
                        }
                        return self.without_orderer(lent, token, failure);
                    }
                    Ok(Some(orderer)) if orderer != lent.shards.view().me && !is_peer => {
                        if payload.len() > MAX_MESSAGE {
                            return self.reply(token, Status::Error, 0, LONG_COMMAND.into(), lent);
                        }
                        let mut batch = Batch::new();
                        batch.push(head, kind, &[&payload]);
                        if let Some(request) = self.requests.get(token) {
                            request.stage = Stage::Forwarded;
                        }
                        let hash = KeyHash(head.hash);
                        let request = batch.bytes();
                        lent.start(number, Operation::Forward { hash, request, to: orderer, deadline });
                    }
                    _ if class == Class::Blind => {
                        let nothing = |&(hash, key): &(KeyHash, &[u8])| Found {
                            hash,
                            key: key.into(),
                            value: None,
                            newest: Version::ZERO,
                            since: Version::ZERO,
                        };
                        let nothing = keys.iter().map(nothing).collect();
                        self.requests.get(token).expect("begun above").payload = payload;
                        return self.execute(lent, token, nothing);
                    }
                    _ => {
                        let (level, view) = (level_of(head.level), lent.shards.view());
                        let level = match class {
                            Class::Read => level,
                            Class::Ordered => level.ordered(view.placement_of(KeyHash(head.hash)), view.map.quorums),
                            Class::Blind | Class::Loose => level.at_least(quorums(lent, &head).1),
                        };
                        let (keys, payload) = (&keys, payload.len());
                        lent.start(number, Operation::Prepare { keys, payload, level, deadline: patience });
                    }
                }
            }
        }
        if let Some(request) = self.requests.get(token) {
            request.payload = payload;
        }
    }

    /// Runs a command on what was found, and writes what it changed.
    fn execute(&mut self, lent: &mut Lent<'_>, token: u32, mut found: Vec<Found>) {
        let Some(request) = self.requests.get(token) else { return };
        let (origin, kind, head, class) = (request.origin, request.kind, request.head, request.class);
        let deadline = request.deadline;
        let ordered = class == Class::Ordered;
        let payload = std::mem::take(&mut request.payload);
        let wall = lent.now.wall;
        if ordered {
            lent.shards.freshest(lent.now, lent.store, &mut found);
        }
        for Found { key, value, .. } in &found {
            if let Some(value) = value {
                let entry = Entry {
                    key,
                    value: &value.bytes,
                    version: value.version,
                    expires_at: value.expires_at,
                    tombstone: false,
                };
                if let Err(error) = self.scratch.fill(entry, wall) {
                    self.tidy(&found, wall);
                    return self.reply(token, Status::Error, 0, error.to_string().into_bytes(), lent);
                }
            }
        }
        let mut replies = Batch::new();
        let frame = Frame { kind, head, payload: &payload, payload_at: HEAD_LEN };
        let mut serving = Serving {
            store: &mut self.scratch,
            metrics: lent.metrics,
            scratch: &mut self.buffers,
            now: wall,
            flushes: None,
        };
        serve::guarded(&mut serving, &frame, &mut Vec::new(), &mut replies);
        let (status, aux, bytes) = match replies.frames().next() {
            Some(Ok(reply)) => (reply.status(), reply.head.aux, reply.payload.to_vec()),
            _ => (Status::Error, 0, serve::PANIC_REPLY.as_bytes().to_vec()),
        };
        if let Some(request) = self.requests.get(token) {
            request.payload = payload;
        }
        if matches!(origin, Origin::Peer(..)) && bytes.len() > MAX_MESSAGE {
            // Before anything is written: what it deletes would be lost with the answer.
            self.tidy(&found, wall);
            return self.reply(token, Status::Error, 0, LONG_ANSWER.into(), lent);
        }
        let mut changes = Vec::new();
        for place in &found {
            let Found { hash, key, value, .. } = place;
            let before = value.as_ref().map(|value| value.version);
            let after = self.scratch.raw(*hash, key).filter(|entry| !entry.tombstone);
            // A key whose expiry is past is absent afterwards. Nobody has looked whether it was there.
            let gone = class == Class::Blind && after.is_none() && status != Status::Error;
            if gone || after.map(|entry| entry.version) != before {
                changes.push(Changed {
                    hash: *hash,
                    key: key.clone(),
                    value: after.map(|entry| entry.value.to_vec()),
                    expires_at: after.map_or(0, |entry| entry.expires_at),
                    version: place.version(),
                });
            }
        }
        self.tidy(&found, wall);
        if changes.is_empty() {
            return self.reply(token, status, aux, bytes, lent);
        }
        if let Some(request) = self.requests.get(token) {
            request.stage = Stage::Writing { status, aux, bytes };
        }
        let mut level = level_of(head.level);
        if ordered {
            // It is of no use on fewer replicas than the next one reads.
            level = level.at_least(quorums(lent, &head).0);
        }
        lent.start(u64::from(token), Operation::Commit { changes, level, ordered, deadline });
    }

    /// Empties the scratch store.
    fn tidy(&mut self, found: &[Found], wall: u64) {
        for Found { hash, key, .. } in found {
            // An expired entry is gone for `delete`, and its removal is what a read does.
            let _ = self.scratch.delete(*hash, key, wall);
            let _ = self.scratch.exists(*hash, key, wall);
        }
    }

    /// A peer wants a command run that this core orders.
    pub(crate) fn order(&mut self, lent: &mut Lent<'_>, from: NodeNo, ask: Ask, bytes: &[u8]) {
        let batch = Batch::from_bytes(bytes).unwrap_or_default();
        let shard = lent.shards.view().keyspace();
        let frame = batch.frames().flatten().next().filter(|frame| {
            matches!(frame.kind, Kind::Command | Kind::Exec) && shard.shard(KeyHash(frame.head.hash)) == ask.shard
        });
        let Some(frame) = frame else { return lent.shards.answer_order(from, ask, Err(Why::Broken), lent.out) };
        let left = Millis::from(ask.left_ms).min(2 * self.timeout);
        let token = self.insert(Request {
            patience: lent.now.mono + left * 2 / 3,
            deadline: lent.now.mono + left,
            begun: lent.since,
            origin: Origin::Peer(from, ask),
            kind: frame.kind,
            head: frame.head,
            payload: frame.payload.to_vec(),
            bytes: frame.payload.len(),
            stage: Stage::Reading,
            class: Class::Read,
        });
        self.run(lent, token);
    }

    /// The shard's orderer is away or has changed: nothing was done, and it is tried again while there is time.
    fn without_orderer(&mut self, lent: &mut Lent<'_>, token: u32, failure: Failure) {
        let Some(request) = self.requests.get(token) else { return };
        if let Origin::Peer(from, ask) = request.origin {
            self.take(token);
            return lent.shards.answer_order(from, ask, Err(Why::NotHere), lent.out);
        }
        if lent.now.mono + AGAIN_MS >= request.patience {
            return self.reply(token, Status::Error, 0, failure.to_string().into_bytes(), lent);
        }
        request.stage = Stage::Reading;
        self.again.push((lent.now.mono + AGAIN_MS, token));
    }

    /// Tries commands again that waited for an orderer.
    pub(crate) fn try_again(&mut self, lent: &mut Lent<'_>) {
        let now = lent.now.mono;
        let mut due = Vec::new();
        self.again.retain(|&(at, token)| {
            if at <= now {
                due.push(token);
            }
            at > now
        });
        for token in due {
            self.run(lent, token);
        }
    }

    /// An operation has ended.
    pub(crate) fn done(&mut self, lent: &mut Lent<'_>, token: u64, outcome: Outcome) {
        let token = token as u32;
        let Some(request) = self.requests.get(token) else { return };
        let (status, aux, bytes) = match (outcome, &mut request.stage) {
            (Outcome::Ready(found), Stage::Reading) => return self.execute(lent, token, found),
            (Outcome::Found(Some(value)), Stage::Version) => (Status::Value, 0, version_bytes(value.version).to_vec()),
            (Outcome::Found(Some(value)), _) => (Status::Value, 0, value.bytes),
            (Outcome::Found(None), _) => (Status::Nil, 0, Vec::new()),
            (Outcome::Written { .. }, _) => (Status::Done, 0, Vec::new()),
            (Outcome::Deleted(deleted), _) => (Status::Integer, i64::from(deleted), Vec::new()),
            (Outcome::Committed, Stage::Writing { status, aux, bytes }) => (*status, *aux, std::mem::take(bytes)),
            (Outcome::Ordered(bytes), _) => read_answer(&bytes),
            (Outcome::Failed(failure @ Failure::NoOrderer { .. }), _) => {
                return self.without_orderer(lent, token, failure);
            }
            (Outcome::Failed(failure), _) => (Status::Error, 0, failure.to_string().into_bytes()),
            (Outcome::Part(failure), _) => (Status::Error, 0, format!("{PART_WRITTEN}{failure}").into_bytes()),
            (Outcome::Unknown { have, need }, stage) => {
                let who = match stage {
                    Stage::Forwarded => {
                        "the orderer of the shard, which runs the command, did not answer in time".into()
                    }
                    _ => format!("{have} of {need} replicas confirmed the write in time"),
                };
                let text = format!("UNKNOWN {who}; it may have been done or not: read to find out");
                (Status::Error, 0, text.into_bytes())
            }
            (Outcome::Ready(_) | Outcome::Committed, _) => {
                (Status::Error, 0, b"ERR internal error: stages mixed up".to_vec())
            }
        };
        self.reply(token, status, aux, bytes, lent);
    }

    fn reply(&mut self, token: u32, status: Status, aux: i64, bytes: Vec<u8>, lent: &mut Lent<'_>) {
        let Some(request) = self.take(token) else { return };
        self.count(&request, status, &bytes, lent);
        self.route(lent, request.origin, Reply { head: request.head, status, aux, bytes });
    }

    /// Counts a request that is over, by its command, where it began: what a peer wants run is counted by the peer.
    fn count(&mut self, request: &Request, status: Status, bytes: &[u8], lent: &mut Lent<'_>) {
        let error = match status {
            Status::Error => Some(bytes),
            Status::Encoded => bytes.strip_prefix(b"-"),
            _ => None,
        };
        let of_session = match request.origin {
            Origin::Peer(..) => return,
            Origin::Here | Origin::Sibling(_) => request.head.conn != LOCAL,
            Origin::Foreign(..) => false,
        };
        // Sessions count the errors that they pass on.
        if status == Status::Error && !of_session {
            lent.metrics.record_error(bytes);
        }
        let took = lent.since.saturating_sub(request.begun);
        let id = serve::command_of(request.kind, &request.head, lent.metrics);
        if of_session && lent.settings.is_slow(took) {
            let is_kept = lent.settings.slowlog_threshold.is_some_and(|least| took >= least);
            self.slow.extend(id.and_then(command::by_id).map(|spec| slow(request, spec, took, is_kept)));
        }
        match id {
            // Its session counts it.
            Some(id) if request.kind == Kind::Exec => {
                lent.metrics.record_took(id, took);
                if error.is_some() {
                    lent.metrics.record_failed(id);
                }
            }
            Some(id) => lent.metrics.record_call(id, took, error),
            None => {}
        }
    }

    /// Sends a reply to who waits for it.
    pub(crate) fn route(&mut self, lent: &mut Lent<'_>, origin: Origin, reply: Reply) {
        match origin {
            Origin::Here => self.here.push(reply),
            Origin::Sibling(core) => self.siblings.push((core, reply)),
            Origin::Foreign(group, at) => self.place(group, at, reply),
            Origin::Peer(from, ask) => {
                let answer = pack_answer(reply);
                lent.shards.answer_order(from, ask, Ok(&answer), lent.out);
            }
        }
    }

    /// Puts a reply into its group; the last one sends them all.
    fn place(&mut self, group: u32, at: u32, reply: Reply) {
        let Some(place) = self.groups.get(group) else { return };
        place.left -= 1;
        place.replies[at as usize] = Some(reply);
        if place.left == 0
            && let Some(group) = self.groups.take(group)
        {
            let mut batch = Batch::new();
            for Reply { head, status, aux, bytes } in group.replies.iter().flatten() {
                batch.push_reply(head, *status, *aux, bytes);
            }
            group.to.send(batch);
        }
    }
}

/// What there is to say of a slow request; of its arguments no more than is shown, and that only if the slow log keeps it.
fn slow(request: &Request, spec: &'static Spec, took: Duration, is_kept: bool) -> Slow {
    let (head, payload) = (request.head, request.payload.as_slice());
    let mut args = vec![spec.name.as_bytes()];
    match request.kind {
        Kind::Get | Kind::Delete => args.push(payload),
        Kind::Set => {
            let (key, value) = payload.split_at((head.a as usize).min(payload.len()));
            args.extend([key, value]);
        }
        Kind::Command => {
            // A request that ends while it is being looked at has lent its arguments away.
            let frame = Frame { kind: request.kind, head, payload, payload_at: HEAD_LEN };
            if frame.args(&mut args).is_err() {
                args = vec![spec.name.as_bytes()];
            }
        }
        _ => {}
    }
    let shown = if is_kept { slowlog::shown(&args) } else { Vec::new() };
    let core = if let Origin::Sibling(core) = request.origin { Some(core) } else { None };
    Slow { core, conn: head.conn, spec, took, shown }
}

fn too_long() -> Vec<u8> {
    StoreError::ValueTooLong.to_string().into_bytes()
}

/// What an orderer answers with.
fn pack_answer(reply: Reply) -> Vec<u8> {
    let Reply { status, aux, bytes, .. } = reply;
    let mut answer = vec![status as u8];
    answer.extend_from_slice(&aux.to_le_bytes());
    answer.extend_from_slice(&bytes);
    answer
}

fn read_answer(bytes: &[u8]) -> (Status, i64, Vec<u8>) {
    let parts = bytes.split_first().and_then(|(status, rest)| {
        let (aux, rest) = rest.split_first_chunk::<8>()?;
        Some((Status::from_u8(*status)?, i64::from_le_bytes(*aux), rest.to_vec()))
    });
    parts.unwrap_or_else(|| (Status::Error, 0, b"ERR the orderer's answer cannot be read".to_vec()))
}

/// A level as a head carries it.
pub(crate) fn level_word(level: Level) -> u32 {
    match level {
        Level::Quorum => 0,
        Level::One => 1,
        Level::All => 2,
        Level::Exactly(k) => 0x100 | u32::from(k),
    }
}

/// The level that a word of a head stands for; unknown words mean the cluster's own.
pub(crate) fn level_of(word: u32) -> Level {
    match word {
        1 => Level::One,
        2 => Level::All,
        word if word >> 8 == 1 => Level::Exactly(word as u8),
        _ => Level::Quorum,
    }
}

/// How many replicas of a request's shard are a quorum, for a write and for a read.
fn quorums(lent: &Lent<'_>, head: &Head) -> (usize, usize) {
    let view = lent.shards.view();
    view.map.quorums.of(view.placement_of(KeyHash(head.hash)).replicas.len())
}

/// How a command is run, and on which keys.
fn plan<'f>(frame: &Frame<'f>) -> Result<(Class, Vec<&'f [u8]>), String> {
    let mut args = Vec::new();
    if frame.kind == Kind::Exec {
        return transaction(frame.payload, &mut args);
    }
    let args = frame.args(&mut args).map_err(|error| format!("ERR {error}"))?;
    let spec = command::by_id(CommandId(frame.head.spec)).ok_or("ERR unknown command number")?;
    fits(spec, args)?;
    let keys: BTreeSet<&[u8]> = spec.keys(args.len()).map(|at| args[at]).collect();
    if keys.len() > MAX_KEYS {
        return Err(format!("ERR a command in a cluster may name {MAX_KEYS} keys of one core: send it in parts"));
    }
    Ok((class(spec, args), keys.into_iter().collect()))
}

/// Sessions look at it first; a peer may not have.
fn fits(spec: &Spec, args: &[&[u8]]) -> Result<(), String> {
    if spec.accepts(args.len()) { Ok(()) } else { Err(command::Refusal::arity(spec).text().to_owned()) }
}

fn transaction<'f>(payload: &'f [u8], args: &mut Vec<&'f [u8]>) -> Result<(Class, Vec<&'f [u8]>), String> {
    let mut keys: BTreeSet<&[u8]> = BTreeSet::new();
    let mut packed = Transaction::new(payload);
    let mut only_reads = true;
    packed
        .watched(|_, key, _| {
            keys.insert(key);
            true
        })
        .map_err(|error| format!("ERR {error}"))?;
    let watches = !keys.is_empty();
    let steps = packed.steps().map_err(|error| format!("ERR {error}"))?;
    for _ in 0..steps {
        if let Step::Command(spec) = packed.step(args).map_err(|error| format!("ERR {error}"))? {
            fits(spec, args)?;
            keys.extend(spec.keys(args.len()).map(|at| args[at]));
            only_reads &= class(spec, args) == Class::Read;
        }
        if keys.len() > MAX_KEYS {
            return Err(format!("ERR a transaction in a cluster may name {MAX_KEYS} keys: send it in parts"));
        }
    }
    let class = match () {
        _ if !only_reads => Class::Ordered,
        _ if watches => Class::Loose,
        _ => Class::Read,
    };
    Ok((class, keys.into_iter().collect()))
}

fn class(spec: &Spec, args: &[&[u8]]) -> Class {
    if !spec.flags.contains(Flags::WRITE) {
        return Class::Read;
    }
    match spec.name {
        "setex" | "psetex" | "mset" => Class::Blind,
        "del" | "unlink" => Class::Loose,
        // Options that give an expiry look at nothing; NX, XX, GET, KEEPTTL do.
        "set" => {
            let mut rest = args.get(3..).unwrap_or_default().iter();
            let mut blind = true;
            while let Some(option) = rest.next() {
                let gives_expiry =
                    ["EX", "PX", "EXAT", "PXAT"].iter().any(|name| option.eq_ignore_ascii_case(name.as_bytes()));
                blind &= gives_expiry;
                rest.next();
            }
            if blind { Class::Blind } else { Class::Ordered }
        }
        _ => Class::Ordered,
    }
}

#[cfg(test)]
mod tests {
    use gridkv_engine::store::StoreConfig;

    use super::*;

    #[test]
    fn sessions_wait_while_commands_under_way_hold_too_many_bytes() {
        let mut requests = Requests::new(crate::cluster::scratch(&StoreConfig::default()).unwrap(), 1000);
        let half = |at| Request {
            origin: Origin::Foreign(0, at),
            kind: Kind::Command,
            head: Head::default(),
            payload: Vec::new(),
            bytes: MAX_BYTES / 2,
            stage: Stage::Reading,
            patience: 0,
            deadline: 0,
            begun: Duration::ZERO,
            class: Class::Read,
        };
        let first = requests.insert(half(0));
        assert!(requests.has_room());
        let second = requests.insert(half(1));
        assert!(!requests.has_room());
        assert!(requests.take(first).is_some() && requests.take(first).is_none());
        assert!(requests.has_room());
        requests.take(second);
        assert_eq!((requests.bytes, requests.under_way()), (0, 0));
    }

    /// Of a long argument no more is copied than is shown, nothing when nothing is kept, and the name is always there.
    #[test]
    fn a_slow_request_is_told_briefly() {
        let spec = command::lookup(b"APPEND").unwrap();
        let mut batch = Batch::new();
        batch.push_command(Head { spec: spec.id.0, ..Head::default() }, &[b"append", b"k", &[b'v'; 1 << 20]]);
        let frame = batch.frames().next().unwrap().unwrap();
        let mut request = Request {
            origin: Origin::Here,
            kind: Kind::Command,
            head: frame.head,
            payload: frame.payload.to_vec(),
            bytes: frame.payload.len(),
            stage: Stage::Reading,
            patience: 0,
            deadline: 0,
            begun: Duration::ZERO,
            class: Class::Ordered,
        };
        let shown = slow(&request, spec, Duration::ZERO, true).shown;
        assert_eq!((shown.len(), &*shown[0], &*shown[1]), (3, &b"append"[..], &b"k"[..]));
        assert!(shown[2].len() < 200 && shown[2].ends_with(b"more bytes)"));
        assert!(slow(&request, spec, Duration::ZERO, false).shown.is_empty());
        request.payload.clear();
        assert_eq!(slow(&request, spec, Duration::ZERO, true).shown, [b"append"]);
    }
}
