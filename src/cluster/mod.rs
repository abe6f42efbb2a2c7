//! A node in its cluster: what drives the pure machines of `gridkv-cluster` on the cores of this node.
//!
//! Only this module knows both sides. The machines decide; here their messages become frames on peer links, their
//! deadlines timers, and requests of clients become operations.
//!
//! ```text
//!   core 0                                   every core
//!   ┌───────────────────────────┐            ┌──────────────────────────────────────────────┐
//!   │ plane: Control, gossip,   │ map, alive │ Member: Shards, requests, the way to the peers│
//!   │ disk                      │───────────▶│                                              │
//!   │                           │◀───────────│                                              │
//!   └───────────────────────────┘  adopted,  └──────────────────────────────────────────────┘
//!                                  filled
//! ```
//!
//! A core of a node that stands alone, or whose shards no other node holds, is *solo*: its requests run as plain function
//! calls, and nothing of this is on their way.

mod directory;
pub(crate) mod metrics;
pub(crate) mod plane;
pub(crate) mod requests;
mod seeds;
pub(crate) mod start;
pub(crate) mod view;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gridkv_cluster::coordinator;
use gridkv_cluster::ids::{NodeNo, Now};
use gridkv_cluster::map::{Change, Stage};
use gridkv_cluster::outbox::{Class, Failure, Outbox};
use gridkv_cluster::shards::{Limits, Shards};
use gridkv_cluster::wire::Message;
use gridkv_engine::Millis;
use gridkv_engine::backend::Registry;
use gridkv_engine::hash::Keyspace;
use gridkv_engine::hlc::{Hlc, Version};
use gridkv_engine::store::{Store, StoreConfig};
use gridkv_net::frame::{Batch, Frame, Frames, Mark, Status};
use gridkv_net::peer::{HandOver, Hello, Identity, LinkConfig, LinkEvent, LinkId, Links, Peers, Priority, SendError};
use gridkv_net::ring::RingPort;

use crate::Error;
use crate::config::{ClusterConfig, Config};
use crate::cores::flush::empties;
use crate::cores::launch::Seat;
use crate::cores::{Core, CoreRc, LOCAL, State, serve};
use crate::handle::{unix_ms, unix_us};
use crate::server;
use crate::topology::{Message as Note, ReplyTo, shards_of};
use requests::{Lent, Origin, Requests};

pub use gridkv_cluster::control::Event as ClusterEvent;
pub use gridkv_cluster::control::watch::Moved;
pub use gridkv_cluster::map::{Map, Placement};
pub use gridkv_cluster::quorum::Level;
pub use view::ClusterView;

/// What a frame on a peer link carries: the first byte of sixteen, so that what follows is aligned.
const DATA: u8 = 1;
const CONTROL: u8 = 2;
const PREFIX: usize = 16;

const fn prefix(kind: u8) -> [u8; PREFIX] {
    let mut bytes = [0; PREFIX];
    bytes[0] = kind;
    bytes
}

/// A batch of a foreign thread, begun in part.
struct Waiting {
    batch: Batch,
    /// Where its first request is that has not begun.
    at: usize,
    /// Which of all that is.
    next: u32,
    /// Under which its replies are gathered.
    group: u32,
}

/// A core's part in the cluster.
pub(crate) struct Member {
    shards: Shards,
    out: Outbox,
    requests: Requests,
    /// Requests of foreign threads that wait for room.
    waiting: VecDeque<Waiting>,
    started: Instant,
    /// Where the cores of other lives are reached.
    peers: BTreeMap<NodeNo, (SocketAddr, u16)>,
    /// Links to the cores of peers, by life and core.
    links: BTreeMap<(NodeNo, u16), LinkId>,
    /// Lives to which a link has failed: not asked until it stands again.
    unlinked: BTreeSet<NodeNo>,
    /// Who is alive, as the control plane says.
    alive: BTreeSet<NodeNo>,
    identity: Identity,
    config: Arc<Config>,
    /// Messages that no link took.
    pub(crate) unsent: u64,
    /// When deadlines were last looked at.
    looked_at: Millis,
    shard_count: u32,
}

/// The store in which commands run on what was read.
fn scratch(store: &StoreConfig) -> Result<Store, Error> {
    let config = StoreConfig {
        owned: 0..store.keyspace.shards.get(),
        max_memory: 0,
        change_log_entries: 1,
        keep_tombstones: false,
        ..store.clone()
    };
    let backend = Registry::default().make("memory", &config.backend()).map_err(|e| Error::Reply(e.to_string()))?;
    Ok(Store::new(config, backend))
}

/// Batches of foreign threads that wait for room, at most.
const MAX_WAITING: usize = 16 << 10;
/// How often the deadlines of operations are looked at, at most.
const LOOK_MS: Millis = 5;

impl Member {
    pub(crate) fn new(seat: &Seat, config: &ClusterConfig, identity: Identity) -> Result<Member, Error> {
        let scratch = scratch(&seat.store)?;
        let timeout_ms = config.timeout.as_millis() as Millis;
        let limits = Limits {
            coordinator: coordinator::Limits { timeout_ms, ..coordinator::Limits::default() },
            ..Limits::default()
        };
        Ok(Member {
            shards: Shards::new(seat.store.owned.clone(), plane::no_map(&seat.store), limits, Default::default()),
            out: Outbox::new(),
            requests: Requests::new(scratch, timeout_ms),
            waiting: VecDeque::new(),
            config: seat.config.clone(),
            started: Instant::now(),
            peers: BTreeMap::new(),
            links: BTreeMap::new(),
            unlinked: BTreeSet::new(),
            alive: BTreeSet::new(),
            identity,
            unsent: 0,
            looked_at: 0,
            shard_count: u32::from(seat.store.keyspace.shards.get()),
        })
    }

    pub(crate) fn now(&self) -> Now {
        Now { mono: self.mono(), wall: unix_ms() }
    }

    fn mono(&self) -> Millis {
        self.started.elapsed().as_millis() as Millis
    }

    /// Lends what a request needs.
    fn lend<'a>(&'a mut self, state: &'a mut State) -> (&'a mut Requests, Lent<'a>) {
        let (us, since) = (unix_us(), self.started.elapsed());
        let now = Now { mono: since.as_millis() as Millis, wall: us / 1000 };
        // Versions begin at the microsecond, not at the millisecond: else a client that writes a key twice within one, through
        // two nodes, would find its first write. It is never too far ahead of itself.
        let _ = state.store.observe(version_at(us), now.wall);
        let lent = Lent {
            now,
            since,
            store: &mut state.store,
            metrics: &mut state.metrics,
            settings: &state.settings,
            shards: &mut self.shards,
            out: &mut self.out,
        };
        (&mut self.requests, lent)
    }

    /// Begins one request, or serves it at once if it is not for replicated data.
    pub(crate) fn begin(&mut self, state: &mut State, frame: &Frame<'_>, origin: Origin) {
        let (requests, mut lent) = self.lend(state);
        if let Err(origin) = requests.begin(&mut lent, frame, origin) {
            let mut replies = Batch::new();
            if is_flush(frame) {
                // It began as one of all cores, and this one cannot do its part: it never comes to this, see `cores::flush`.
                let _part = state.flushes.part();
                replies.push_reply(&frame.head, Status::Error, 0, NO_FLUSH.as_bytes());
            } else {
                serve::guarded(&mut state.serving(), frame, &mut Vec::new(), &mut replies);
            }
            if let Some(Ok(reply)) = replies.frames().next() {
                let (status, aux, bytes) = (reply.status(), reply.head.aux, reply.payload.to_vec());
                let (requests, mut lent) = self.lend(state);
                requests.route(&mut lent, origin, requests::Reply { head: frame.head, status, aux, bytes });
            }
        }
    }

    /// Begins the requests of a foreign thread, behind those that wait. When too many do, these are refused.
    pub(crate) fn begin_group(&mut self, state: &mut State, batch: Batch, to: ReplyTo) {
        if batch.is_empty() {
            to.send(batch);
            return;
        }
        let batch = batch.flat(Mark::default());
        if self.waiting.len() >= MAX_WAITING {
            let (mut replies, busy) = (Batch::new(), Failure::Busy.to_string());
            for frame in batch.frames() {
                let head = &frame.expect("batches inside a node are whole").head;
                replies.push_reply(head, Status::Error, 0, busy.as_bytes());
            }
            to.send(replies);
            return;
        }
        let group = self.requests.group(batch.len(), to);
        self.waiting.push_back(Waiting { batch, at: 0, next: 0, group });
        self.go_on(state);
    }

    /// Begins what waits, as far as there is room. Whatever is left is looked at again when something has ended.
    fn go_on(&mut self, state: &mut State) {
        while let Some(Waiting { batch, at, mut next, group }) = self.waiting.pop_front() {
            for frame in Frames::from(batch.bytes(), at) {
                let frame = frame.expect("batches inside a node are whole");
                if !self.requests.has_room_for_foreign() {
                    let at = frame.at();
                    return self.waiting.push_front(Waiting { batch, at, next, group });
                }
                self.begin(state, &frame, Origin::Foreign(group, next));
                next += 1;
            }
            state.mesh.recycle(batch);
        }
    }

    /// Whether a session of this core may send one more request.
    pub(crate) fn has_room(&self) -> bool {
        self.requests.has_room()
    }

    /// How many requests a task of this core may begin at once.
    pub(crate) fn room_for_task(&self) -> usize {
        self.requests.room_for_task()
    }

    /// Ends operations, runs what peers want ordered, looks at deadlines. Returns whether there was anything.
    fn pump(&mut self, state: &mut State, look: bool) -> bool {
        let mut work = false;
        let now = if look { self.now() } else { Now::default() };
        if look && now.mono >= self.looked_at + LOOK_MS {
            self.looked_at = now.mono;
            let (requests, mut lent) = self.lend(state);
            requests.try_again(&mut lent);
            if self.shards.next_deadline(now).is_some_and(|at| at <= now.mono) {
                self.shards.on_deadline(now, &mut state.store, &mut self.out);
                work = true;
            }
        }
        loop {
            self.go_on(state);
            let done = self.out.take_done();
            let orders = self.shards.take_orders();
            if done.is_empty() && orders.is_empty() {
                return work;
            }
            work = true;
            let (requests, mut lent) = self.lend(state);
            for (token, outcome) in done {
                requests.done(&mut lent, token, outcome);
            }
            for order in orders {
                requests.order(&mut lent, order.from, order.ask, &order.request);
            }
        }
    }

    /// A message of a peer.
    fn on_message(&mut self, state: &mut State, from: NodeNo, bytes: &[u8]) {
        match Message::read(bytes) {
            Ok(message) => {
                let now = self.now();
                self.shards.on_message(now, &mut state.store, from, &message, &mut self.out);
            }
            Err(error) => tracing::warn!(from = from.0, %error, "a message of a peer was dropped"),
        }
    }

    /// Makes empty stores for the seed of the cluster that this node joins. Its tables know by it where an entry belongs. Only
    /// before the first map: a cluster's seed never changes, and clients come later.
    fn reseed(&mut self, state: &mut State, keyspace: Keyspace) -> Result<(), Error> {
        assert!(state.store.is_empty(), "a node that knows its cluster's seed keeps it");
        let config = StoreConfig { keyspace, ..state.store.config().clone() };
        self.requests.set_scratch(scratch(&config)?);
        let backend = self.config.new_backend(&config)?;
        state.store = Store::new(config, backend);
        Ok(())
    }

    /// Adopts a map. Whether this core is solo now.
    fn adopt(&mut self, state: &mut State, links: &mut Links, map: &Arc<Map>, me: NodeNo) -> bool {
        let now = self.now();
        if self.shards.view().me != me {
            // What stands was greeted under another number.
            let dialled: Vec<LinkId> =
                links.views().filter(|view| view.dialled.is_some()).map(|view| view.link).collect();
            dialled.into_iter().for_each(|link| links.hang_up(link));
            self.links.clear();
            self.unlinked.clear();
        }
        self.identity = Identity { cluster: map.cluster, number: me.0, boot: self.identity.boot, ..self.identity };
        if let Some(member) = map.member(me) {
            self.identity.boot = member.about.boot;
        }
        links.set_identity(self.identity);
        let owned = self.shards.view().owned.clone();
        let solo = owned.clone().all(|shard| is_alone(&map.placements[usize::from(shard)], me));
        // A copy that nobody shares needs no tombstones.
        state.store.keep_tombstones(!solo);
        self.peers = map.present().filter(|m| m.no != me).map(|m| (m.no, (m.about.peer, m.about.cores))).collect();
        self.links.retain(|(no, _), link| {
            let keep = self.peers.contains_key(no);
            if !keep {
                links.hang_up(*link);
            }
            keep
        });
        if me != NodeNo(0) {
            let wanted: Vec<_> = self.peers.iter().map(|(&no, &peer)| (no, peer)).collect();
            for (no, (addr, cores)) in wanted {
                for core in 0..cores {
                    let theirs = shards_of(usize::from(core), usize::from(cores.max(1)), self.shard_count);
                    let shared = u32::from(owned.start) < theirs.end && theirs.start < u32::from(owned.end);
                    if shared && !self.links.contains_key(&(no, core)) {
                        self.links.insert((no, core), links.dial(addr, core));
                    }
                }
            }
        }
        self.shards.on_map(now, &mut state.store, map.clone(), me, &mut self.out);
        self.tell_alive(state);
        solo
    }

    fn on_alive(&mut self, state: &mut State, alive: BTreeSet<NodeNo>) {
        self.alive = alive;
        self.tell_alive(state);
    }

    fn tell_alive(&mut self, state: &mut State) {
        let me = self.shards.view().me;
        let alive: BTreeSet<NodeNo> =
            self.alive.iter().copied().filter(|no| *no == me || !self.unlinked.contains(no)).collect();
        if alive != self.shards.view().alive {
            let now = self.now();
            self.shards.on_alive(now, &mut state.store, alive, &mut self.out);
        }
    }

    fn on_link(&mut self, state: &mut State, link: LinkId, up: bool) {
        let Some(no) = self.links.iter().find(|(_, known)| **known == link).map(|((no, _), _)| *no) else { return };
        let changed = if up { self.unlinked.remove(&no) } else { self.unlinked.insert(no) };
        if changed {
            self.tell_alive(state);
        }
    }

    /// Hands messages to the links.
    fn send(&mut self, links: &mut Links) {
        let me = self.shards.view().me;
        for (send, bytes) in self.out.sends() {
            debug_assert_ne!(send.to, me, "a core does not write to its own node");
            let Some(&(_, cores)) = self.peers.get(&send.to) else {
                self.unsent += 1;
                continue;
            };
            let core = owner(send.shard.0, cores, self.shard_count);
            let sent = match self.links.get(&(send.to, core)) {
                Some(&link) => {
                    let priority = match send.class {
                        Class::Answer => Priority::Answer,
                        Class::Request => Priority::Request,
                        Class::Background => Priority::Background,
                    };
                    let sent = links.send(link, priority, &[&prefix(DATA), bytes]);
                    if sent == Err(SendError::TooLong) {
                        let (to, bytes) = (send.to.0, bytes.len());
                        tracing::error!(
                            to,
                            bytes,
                            "a message to a peer is too long; what waits for it ends without knowing"
                        );
                    }
                    sent.is_ok()
                }
                None => false,
            };
            self.unsent += u64::from(!sent);
        }
        self.out.clear_sends();
    }

    /// How many replicas have each write at least that was acknowledged at that level.
    pub(crate) fn written_to(&self, level: Level) -> usize {
        let map = &self.shards.view().map;
        let fewest = map.placements.iter().map(|placement| placement.replicas.len()).min().unwrap_or(0);
        level.need(map.quorums.of(fewest).0, fewest.max(1)).max(1)
    }

    /// Counters of the machines.
    pub(crate) fn stats(&self) -> gridkv_cluster::shards::ShardStats {
        self.shards.stats()
    }
}

/// Whether no other node has, or gets, a copy of a shard.
fn is_alone(placement: &Placement, me: NodeNo) -> bool {
    placement.stage == Stage::Normal && placement.replicas.len() == 1 && placement.replicas[0].node == me
}

/// A time in unix microseconds as a version has it.
fn version_at(us: u64) -> Version {
    // A millisecond has 65,536 places and 1000 microseconds, so each of those has 65 for the versions within it.
    Version { hlc: Hlc::new(us / 1000, (us % 1000 * 65) as u16), node: 0 }
}

/// The core of a node with that many that owns a shard.
fn owner(shard: u16, cores: u16, shards: u32) -> u16 {
    let cores = cores.max(1);
    let guess = (u32::from(shard) * u32::from(cores) / shards) as u16;
    let owns = |core: &u16| shards_of(usize::from(*core), usize::from(cores), shards).contains(&u32::from(shard));
    [guess, guess.saturating_add(1), guess.saturating_sub(1)].into_iter().filter(|c| *c < cores).find(owns).unwrap_or(0)
}

/// What is told to who wants to empty a cluster.
pub(crate) const NO_FLUSH: &str = "ERR FLUSHALL and FLUSHDB do not run on replicated data: one node cannot empty the copies of the others; delete keys instead";

fn is_flush(frame: &Frame<'_>) -> bool {
    use gridkv_engine::command::{CommandId, by_id};
    frame.kind == gridkv_net::frame::Kind::Command && by_id(CommandId(frame.head.spec)).is_some_and(empties)
}

/// Links of a core as they meet the rest of it.
pub(crate) struct Meeting<'a> {
    pub(crate) core: &'a CoreRc,
}

impl Peers for Meeting<'_> {
    fn judge(&mut self, hello: &Hello, _from: SocketAddr) -> Result<(), String> {
        let member = self.core.member.borrow();
        let Some(member) = &*member else { return Err("this node stands alone".into()) };
        member.identity.fits(&hello.from)
    }

    fn hand_over(&mut self, handed: HandOver) {
        let to = usize::from(handed.hello.core);
        if to < self.core.topology.cores() {
            post(self.core, to, move |core| {
                if let Some(connections) = &mut *core.connections.borrow_mut() {
                    connections.adopt(core, handed);
                }
            });
        }
    }

    fn on_link(&mut self, _links: &mut Links, event: LinkEvent) {
        let (link, up) = match &event {
            LinkEvent::Up { link, dialled: true, .. } => (*link, true),
            LinkEvent::Down { link, reason } | LinkEvent::Failed { link, reason } => {
                tracing::debug!(core = self.core.id.0, %reason, "a peer link is down");
                (*link, false)
            }
            _ => return,
        };
        if let Some(member) = &mut *self.core.member.borrow_mut() {
            member.on_link(&mut self.core.state.borrow_mut(), link, up);
        }
    }

    fn on_frame(&mut self, links: &mut Links, link: LinkId, body: &[u8]) {
        let Some((head, bytes)) = body.split_at_checked(PREFIX) else { return };
        match head[0] {
            DATA => {
                let Some(from) = links.peer(link).map(|peer| NodeNo(peer.number)).filter(|no| *no != NodeNo(0)) else {
                    return;
                };
                if let Some(member) = &mut *self.core.member.borrow_mut() {
                    member.on_message(&mut self.core.state.borrow_mut(), from, bytes);
                }
            }
            CONTROL => {
                if let Some(plane) = &mut *self.core.plane.borrow_mut() {
                    plane.on_message(bytes);
                }
            }
            _ => {}
        }
    }
}

/// Bounds and times of a core's links.
pub(crate) fn link_config(core: usize) -> LinkConfig {
    LinkConfig { seed: unix_ms() ^ (core as u64) << 48, redial_most: 1000, ..LinkConfig::default() }
}

/// Runs `work` on another core of this node, or on this one, between two of its turns.
pub(crate) fn post(core: &Core, to: usize, work: impl FnOnce(&CoreRc) + Send + 'static) {
    match core.topology.links[to].try_send(Note::Run(Box::new(work))) {
        Ok(()) | Err(flume::TrySendError::Disconnected(_)) => {}
        Err(flume::TrySendError::Full(note)) => {
            // Rare, and it must not be lost: it waits for room in a task of its own.
            let topology = core.topology.clone();
            glommio::spawn_local(async move {
                topology.links[to].send(note).await;
            })
            .detach();
        }
    }
}

/// Begins the requests that `write` puts down: of a session or a future of this core, for data that other nodes hold too.
pub(crate) fn begin_here(core: &Core, state: &mut State, write: impl FnOnce(&mut Batch)) {
    let mut batch = state.mesh.spare();
    write(&mut batch);
    if let Some(member) = &mut *core.member.borrow_mut() {
        for frame in batch.frames() {
            member.begin(state, &frame.expect("written just now"), Origin::Here);
        }
    }
    state.mesh.recycle(batch);
}

/// The cluster's part of a turn, before output goes out. Deadlines are only looked at when the turn looks at the clock: a timer
/// sees to that.
pub(crate) fn turn(core: &CoreRc, look: bool) -> bool {
    let mut work = false;
    if core.id.0 == 0 {
        work |= plane::turn(core, look);
    }
    let (here, siblings, slow) = {
        let mut member = core.member.borrow_mut();
        let Some(member) = &mut *member else { return work };
        let state = &mut *core.state.borrow_mut();
        work |= member.pump(state, look);
        for (shard, epoch) in member.out.take_filled() {
            post(core, 0, move |core| plane::on_filled(core, shard.0, epoch));
        }
        let wanted = member.out.take_wanted();
        if wanted > 0 {
            post(core, 0, move |core| plane::on_wanted(core, wanted));
        }
        let requests = &mut member.requests;
        let (here, siblings) = (std::mem::take(&mut requests.here), std::mem::take(&mut requests.siblings));
        (here, siblings, std::mem::take(&mut requests.slow))
    };
    slow.into_iter().for_each(|slow| server::note_later(core, slow));
    if !siblings.is_empty() {
        work = true;
        let state = &mut *core.state.borrow_mut();
        for (to, reply) in siblings {
            state.mesh.replies(to).push_reply(&reply.head, reply.status, reply.aux, &reply.bytes);
        }
    }
    if !here.is_empty() {
        work = true;
        let mut batch = Batch::new();
        for reply in &here {
            batch.push_reply(&reply.head, reply.status, reply.aux, &reply.bytes);
        }
        let mut connections = core.connections.borrow_mut();
        for frame in batch.frames() {
            let frame = frame.expect("written just now");
            if frame.head.conn == LOCAL {
                core.state.borrow_mut().waiters.answer(&frame);
            } else if let Some(connections) = &mut *connections {
                connections.answer(core, &frame);
            }
        }
    }
    work
}

/// Hands what the cluster has to say to the links. Called when the ring can be used.
pub(crate) fn flush(core: &CoreRc, links: &mut Links, port: &mut RingPort<'_>, look: bool) {
    let now = {
        let mut member = core.member.borrow_mut();
        let Some(member) = &mut *member else { return };
        member.send(links);
        if let Some(plane) = &mut *core.plane.borrow_mut() {
            plane.send(links);
        }
        if !look && !links.has_work() {
            return;
        }
        member.now().mono
    };
    let mut meeting = Meeting { core };
    if links.next_deadline().is_some_and(|at| at <= now) {
        links.on_deadline(now, port, &mut meeting);
    }
    links.flush(now, port, &mut meeting);
}

/// This core's milliseconds, for its links.
pub(crate) fn mono(core: &Core) -> u64 {
    core.member.borrow().as_ref().map_or(0, |member| member.now().mono)
}

/// Adopts a map on this core.
pub(crate) fn adopt(core: &CoreRc, map: &Arc<Map>, me: NodeNo) {
    if let Some(connections) = &mut *core.connections.borrow_mut()
        && let Some(links) = connections.links()
        && let Some(member) = &mut *core.member.borrow_mut()
    {
        let state = &mut *core.state.borrow_mut();
        let keyspace = Keyspace { seed: map.seed, ..core.topology.keyspace() };
        if state.store.keyspace() != keyspace
            && let Err(error) = member.reseed(state, keyspace)
        {
            tracing::error!(%error, "no store for the cluster's seed");
            return core.topology.fail("its store cannot be made anew for the seed of the cluster");
        }
        core.topology.set_seed(map.seed);
        state.solo = member.adopt(state, links, map, me);
    }
    core.kick();
}

/// Who is alive has changed.
pub(crate) fn alive(core: &CoreRc, alive: BTreeSet<NodeNo>, isolated: bool) {
    if let Some(member) = &mut *core.member.borrow_mut() {
        member.shards.set_isolated(isolated);
        member.on_alive(&mut core.state.borrow_mut(), alive);
    }
    core.kick();
}

/// Whether this node's clock is wrong, and by how much it is behind.
pub(crate) fn quarantined(core: &CoreRc, quarantined: bool, behind: Millis) {
    if let Some(member) = &mut *core.member.borrow_mut() {
        let now = member.now();
        member.shards.set_quarantined(now, &mut core.state.borrow_mut().store, quarantined, behind);
    }
}

/// Keeps a sleeping core's deadlines: a task that looks now and then.
pub(crate) fn start_timer(core: &CoreRc) {
    let weak = Rc::downgrade(core);
    let idle = Cell::new(0u32);
    glommio::spawn_local(async move {
        loop {
            // Operations, walks and links are looked at every few milliseconds while there are any, else 20 times a second.
            let busy = idle.get() < 20;
            glommio::timer::sleep(Duration::from_millis(if busy { 5 } else { 50 })).await;
            let Some(core) = weak.upgrade() else { return };
            if core.stopping() {
                return;
            }
            let is_busy = |member: &Member| member.requests.under_way() > 0 || member.shards.is_walking();
            let under_way = core.member.borrow().as_ref().is_some_and(is_busy);
            idle.set(if under_way { 0 } else { idle.get() + 1 });
            core.ticked();
            core.kick();
        }
    })
    .detach();
}

/// The cluster as this node sees it; `None` for a node that stands alone.
pub(crate) async fn view(core: &CoreRc) -> Option<ClusterView> {
    core.member.borrow().as_ref()?;
    let stats = crate::server::gather::each_core(core, |core| core.member.borrow().as_ref().map(Member::stats)).await;
    let plane = crate::server::gather::on_core(core, 0, plane::facts).await??;
    Some(ClusterView { cores: stats.into_iter().flatten().collect(), ..plane })
}

/// Has a change of the map proposed.
///
/// # Errors
/// Why it was refused, in words.
pub(crate) async fn propose(core: &CoreRc, change: Change) -> Result<(), String> {
    let (to, end) = futures_channel::oneshot::channel();
    post(core, 0, move |core| plane::propose(core, change, to));
    end.await.unwrap_or_else(|_| Err("this node is stopping".into()))
}
