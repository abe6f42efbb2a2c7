//! The connections of one core: what the socket ring reports becomes calls of sessions, what they write goes out.
//!
//! ```text
//!   ring ─ Data ─▶ session.feed ─▶ out ─┐          siblings, tasks ─▶ session.answer ─▶ out ─┐
//!     ▲                                 └────────── marked, flushed once per turn ◀──────────┘
//!     └── one send per connection, the next when it is done; output beyond the bound stops the reading
//! ```
//!
//! Replies of a turn leave together. A client that does not read stops being read from, so what it can make the node
//! hold is bounded; where many do so at once the bound of each becomes small ([`OUTPUT_BUDGET`]). Connections over the
//! limit are told so and closed. Those of HTTP have a small limit of their own: clients who take all places must not make a
//! probe of liveness fail, nor idle scrapers take the clients' places.
//!
//! A session that cannot go on is tried again when what it waits for has moved: output when some was sent, answers when
//! one came, room in a lane every turn.
//!
//! Replies leave as far as the core's [`Gate`] lets them; the rest stays in `out`, counts as output like any other, and is looked
//! at again when the gate has moved. So a connection that ends still gets what waits, and one that is gone takes it along.
//! Pages of HTTP wait for nothing: a probe is answered while a disk hangs.
//!
//! Not here: what commands mean (the session), what the pages of HTTP show (`http`).

use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use futures_lite::FutureExt;
use gridkv_engine::Millis;
use gridkv_engine::reply::Reply;
use gridkv_net::frame::{Frame, Status};
use gridkv_net::gossip::Gossip;
use gridkv_net::peer::{HandOver, Links};
use gridkv_net::resp::{Limits as WireLimits, Protocol, Writer};
use gridkv_net::ring::{ConnId, Event, ListenerId, Ring, RingConfig, RingPort};
use gridkv_net::session::{Answer, Limits, Session};

use super::backplane::Plane;
use super::gate::{Gate, Held};
use super::launch::Seat;
use super::{Core, CoreRc, Counted, serve};
use crate::metrics::NodeMetrics;
use crate::node::Clients;
use crate::server::clients::ClientView;
use crate::server::gather::each_core;
use crate::{Error, cluster, config, http};

/// Connections waiting to be accepted.
const BACKLOG: i32 = 1024;
/// Input kept for a stalled session before its socket is no longer read.
const PAUSE_ABOVE: usize = 256 << 10;
/// Bytes of output that a core holds before each connection may have only [`TIGHT_OUTPUT`] of its own.
const OUTPUT_BUDGET: usize = 64 << 20;
const TIGHT_OUTPUT: usize = 16 << 10;
/// Send buffers that grew beyond this are given back.
const KEEP_BUFFER: usize = 256 << 10;
/// Output of an HTTP connection that waits while its next request is answered.
const PAGE_OUTPUT: usize = 64 << 10;
/// Bytes of replies that a connection may have waiting when another answer comes. What was asked for before the bounds of
/// the session took hold can be more than they allow; beyond this the client is cut off.
const MOST_OUTPUT: usize = 256 << 20;
/// Connections of HTTP that a node has, beside those of clients. One that is silent for so long is closed, and the one that was
/// silent for longest when there is no room for another.
pub(crate) const MOST_PAGES: u32 = 64;
const PAGE_IDLE_MS: Millis = 300_000;
/// What a client beyond the limit reads.
const TOO_MANY: &[u8] = b"-ERR max number of clients reached\r\n";

/// Facts about a peer that its session does not need.
pub(super) struct Peer {
    pub(super) addr: SocketAddr,
    /// The name it gave itself, for the slow log.
    pub(super) name: String,
    created: Millis,
    last_active: Millis,
}

enum Kind {
    Resp(Box<Session>),
    Http(Http),
    /// Was told that there is no place for it.
    Refused,
}

/// A connection of a browser or a scraper.
#[derive(Default)]
struct Http {
    input: Vec<u8>,
    /// A page is being made.
    busy: bool,
    last: bool,
}

struct Conn {
    id: ConnId,
    kind: Kind,
    peer: Peer,
    /// Counted with those of HTTP, and not with the clients.
    page: bool,
    /// Replies that are not yet handed to the kernel.
    out: Vec<u8>,
    /// What of `out` may not leave yet.
    gated: Held,
    /// On the list of those that wait for the gate.
    waits: bool,
    spare: Vec<u8>,
    /// On the list of connections to flush.
    marked: bool,
    /// Bytes that the kernel is sending.
    sending: usize,
    /// What of [`Table::unsent`] is this connection's.
    held: usize,
    /// The session waits for something.
    stalled: bool,
    /// On the list of those to try again every turn.
    listed: bool,
    paused: bool,
    eof: bool,
}

/// An answer that a task has made.
struct Made {
    conn: ConnId,
    slot: u32,
    bytes: Vec<u8>,
}

/// Connections of a core, and the ring under them.
pub(crate) struct Connections {
    ring: Ring,
    table: Table,
    /// Links to other nodes, where this one is in a cluster.
    links: Option<Links>,
}

struct Table {
    conns: Vec<Option<Conn>>,
    marked: Vec<ConnId>,
    /// Sessions that wait for room in a lane.
    stalled: Vec<ConnId>,
    /// Connections with output that waits for the gate.
    waiting: Vec<ConnId>,
    /// Where the gate was when these were last looked at.
    safe: u64,
    /// Bytes of output that this core holds.
    unsent: usize,
    made: VecDeque<Made>,
    /// The listener for RESP clients; any other serves HTTP.
    resp: Option<(ListenerId, SocketAddr)>,
    config_limits: config::Limits,
    limits: Limits,
    /// The same with little output per connection.
    tight: Limits,
    clients: Arc<Clients>,
    /// When connections of HTTP that are silent are looked for again.
    look_at_pages: Millis,
    /// Commands begun in this turn, for the latency histogram.
    fed: u64,
    fed_since: Option<Instant>,
}

fn session_limits(limits: &config::Limits) -> Limits {
    Limits {
        wire: WireLimits {
            max_args: u32::try_from(limits.max_args).unwrap_or(u32::MAX),
            max_bulk: u32::try_from(limits.max_value).unwrap_or(u32::MAX),
            ..WireLimits::default()
        },
        max_key: limits.max_key,
        query_buffer: limits.query_buffer,
        output_high_water: limits.output_high_water,
        max_pending: limits.max_pending,
        multi_queue: limits.multi_queue,
    }
}

fn tight(limits: Limits) -> Limits {
    Limits { output_high_water: limits.output_high_water.min(TIGHT_OUTPUT), ..limits }
}

/// Runs a task that makes the answer to `slot` of `conn`; a panic in it is answered too.
pub(super) fn answer_later(core: &CoreRc, conn: ConnId, slot: u32, work: impl Future<Output = Vec<u8>> + 'static) {
    let core = core.clone();
    let counted = Counted::new(&core);
    glommio::spawn_local(async move {
        let _counted = counted;
        // A task runs at once up to its first await, and its maker still borrows the core.
        futures_lite::future::yield_now().await;
        let bytes = AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_| {
            core.state.borrow_mut().metrics.panics += 1;
            let mut out = Vec::new();
            Writer::new(Protocol::Resp2, &mut out).error(serve::PANIC_REPLY);
            out
        });
        if let Some(connections) = &mut *core.connections.borrow_mut() {
            connections.table.made.push_back(Made { conn, slot, bytes });
        }
        core.kick();
    })
    .detach();
}

impl Connections {
    pub(super) fn open(seat: &Seat) -> Result<Connections, Error> {
        let limits = &seat.config.limits;
        // At the limit of clients the ring still has places for HTTP.
        let ring =
            Ring::new(RingConfig { max_connections: limits.max_connections + MOST_PAGES, ..RingConfig::default() })?;
        let table = Table {
            conns: Vec::new(),
            marked: Vec::new(),
            stalled: Vec::new(),
            waiting: Vec::new(),
            safe: 0,
            unsent: 0,
            made: VecDeque::new(),
            resp: None,
            config_limits: limits.clone(),
            limits: session_limits(limits),
            tight: tight(session_limits(limits)),
            clients: seat.clients.clone(),
            look_at_pages: 0,
            fed: 0,
            fed_since: None,
        };
        let mut connections = Connections { ring, table, links: None };
        // Others listen when the whole node is ready for clients.
        if seat.config.cluster.is_none() && seat.config.data.is_none() {
            connections.listen(seat.resp, seat.http)?;
        }
        Ok(connections)
    }

    /// Lets clients come.
    pub(crate) fn listen(&mut self, resp: Option<SocketAddr>, http: Option<SocketAddr>) -> Result<(), Error> {
        let mut listen = |addr: Option<SocketAddr>| -> Result<_, Error> {
            Ok(addr.map(|addr| self.ring.listen(addr, BACKLOG)).transpose()?)
        };
        self.table.resp = listen(resp)?;
        listen(http)?;
        Ok(())
    }

    /// Begins to speak with other nodes; their connections arrive at `addr`, on core 0 alone. Where they do.
    pub(super) fn open_links(
        &mut self,
        mut links: Links,
        addr: Option<SocketAddr>,
    ) -> Result<Option<(SocketAddr, Gossip)>, Error> {
        let opened = match addr {
            None => None,
            Some(addr) => {
                let addr = links.listen(&mut self.ring, addr)?;
                Some((addr, Gossip::open(&mut self.ring, addr)?))
            }
        };
        self.links = Some(links);
        Ok(opened)
    }

    /// The links to other nodes.
    pub(crate) fn links(&mut self) -> Option<&mut Links> {
        self.links.as_mut()
    }

    /// Takes a link that another core accepted for this one.
    pub(crate) fn adopt(&mut self, core: &CoreRc, handed: HandOver) {
        if let Some(links) = &mut self.links {
            links.adopt(cluster::mono(core), &mut self.ring.port(), handed, &mut cluster::Meeting { core });
        }
    }

    pub(super) fn wake_fd(&self) -> Result<std::os::fd::OwnedFd, Error> {
        self.ring.wake_fd().try_clone_to_owned().map_err(|e| Error::os("duplicating an eventfd", e))
    }

    /// Takes what the sockets have. Returns whether there was anything.
    pub(super) fn turn(&mut self, core: &Rc<Core>) -> bool {
        let Connections { ring, table, links } = self;
        {
            let settings = &core.state.borrow().settings;
            if settings.limits != table.config_limits {
                table.config_limits = settings.limits.clone();
                table.limits = session_limits(&settings.limits);
                table.tight = tight(table.limits.clone());
            }
        }
        let handled = ring.turn(&mut |port, event| match links {
            Some(links) if links.owns(&event) => {
                links.on_event(cluster::mono(core), port, event, &mut cluster::Meeting { core });
            }
            Some(_) if matches!(event, Event::Readable { .. }) => cluster::plane::readable(core, &event),
            _ => table.on_event(core, port, event),
        });
        let handled = handled.unwrap_or_else(|error| {
            tracing::error!(core = core.id.0, %error, "a core's socket ring failed");
            core.topology.fail("the socket ring of a core failed; the log has the error");
            0
        });
        handled > 0
    }

    /// The last part of a turn in which sessions run: takes the answers that tasks have made, tries stalled sessions again.
    pub(super) fn resume(&mut self, core: &Rc<Core>) -> bool {
        let Connections { ring, table, .. } = self;
        let work = !table.made.is_empty();
        while let Some(Made { conn, slot, bytes }) = table.made.pop_front() {
            table.on_made(core, conn, slot, bytes);
        }
        let mut stalled = std::mem::take(&mut table.stalled);
        for conn in stalled.drain(..) {
            if let Some(conn) = live(&mut table.conns, conn) {
                conn.listed = false;
            }
            table.try_again(core, &mut ring.port(), conn);
        }
        if table.stalled.is_empty() {
            table.stalled = stalled;
        }
        for at in 0..table.marked.len() {
            let conn = table.marked[at];
            table.try_again(core, &mut ring.port(), conn);
        }
        work
    }

    /// Hands the output that may leave to the kernel, and what there is for other nodes to the links.
    pub(super) fn flush(&mut self, core: &Rc<Core>, look: bool) -> bool {
        let Connections { ring, table, links } = self;
        let gate = core.state.borrow().gate;
        table.look_at_gate(&gate);
        let work = !table.marked.is_empty();
        let mut marked = std::mem::take(&mut table.marked);
        for conn in marked.drain(..) {
            table.send(core, ring, conn, &gate);
        }
        table.marked = marked;
        if table.fed > 0 {
            let elapsed = table.fed_since.map_or_else(Default::default, |since| since.elapsed());
            core.state.borrow_mut().metrics.record_latency(elapsed, table.fed);
            table.fed = 0;
        }
        table.fed_since = None;
        if let Some(links) = links {
            cluster::flush(core, links, &mut ring.port(), look);
        }
        // What was queued goes to the kernel with the next turn's system call, which follows at once.
        work
    }

    /// Gives the kernel what was queued, when no turn follows. What the sockets have is lost.
    pub(super) fn submit(&mut self) {
        if let Err(error) = self.ring.turn(&mut |_, _| {}) {
            tracing::warn!(%error, "the last replies of a core did not leave");
        }
    }

    /// Takes the answer of a sibling.
    pub(crate) fn answer(&mut self, core: &Rc<Core>, frame: &Frame<'_>) {
        let table = &mut self.table;
        let id = ConnId::from_bits(frame.head.conn);
        let Some(conn) = live(&mut table.conns, id) else { return };
        let Kind::Resp(session) = &mut conn.kind else { return };
        if conn.out.len() + session.parked_bytes() > MOST_OUTPUT {
            tracing::warn!(client = session.client().id, "closed: it asks for more than it reads");
            return self.ring.close(id);
        }
        let answer = Answer { status: frame.status(), aux: frame.head.aux, bytes: frame.payload };
        let state = &mut *core.state.borrow_mut();
        let mut plane = Plane { core, state, limits: &table.limits, conn: id, peer: &conn.peer, level: 0, watch: None };
        let (slot, index) = (frame.head.slot, frame.head.index);
        if !shielded(&mut plane, &mut conn.out, |plane, out| session.answer(slot, index, &answer, plane, out)) {
            conn.kind = Kind::Refused;
        }
        settle(&mut table.unsent, conn);
        mark(&mut table.marked, conn);
    }

    /// Address and name of a client, unless it is gone.
    pub(crate) fn who(&mut self, conn: u64) -> Option<(String, String)> {
        let conn = live(&mut self.table.conns, ConnId::from_bits(conn))?;
        Some((conn.peer.addr.to_string(), conn.peer.name.clone()))
    }

    pub(super) fn has_work(&mut self) -> bool {
        self.ring.has_work()
            || !self.table.made.is_empty()
            || !self.table.marked.is_empty()
            || self.links.as_ref().is_some_and(Links::has_work)
    }

    pub(super) fn set_wakeups(&mut self, on: bool) {
        self.ring.set_wakeups(on);
    }

    /// The RESP clients of this core.
    pub(crate) fn views(&self, core: usize) -> Vec<ClientView> {
        let Some((_, laddr)) = self.table.resp else { return Vec::new() };
        let view = |conn: &Conn| {
            let Kind::Resp(session) = &conn.kind else { return None };
            let client = session.client();
            Some(ClientView {
                id: client.id,
                addr: conn.peer.addr,
                laddr,
                name: client.name.clone(),
                created: conn.peer.created,
                last_active: conn.peer.last_active,
                core,
                multi: session.queued().map_or(-1, |queued| queued as i64),
                watching: session.watched(),
                input_bytes: session.input_bytes(),
                output_bytes: conn.out.len() + session.parked_bytes(),
                last_command: client.last,
                protocol: client.protocol,
                lib_name: client.lib_name.clone(),
                lib_ver: client.lib_ver.clone(),
                no_evict: client.no_evict,
                no_touch: client.no_touch,
                reply_off: session.is_silent(),
                total_commands: client.commands,
            })
        };
        self.table.conns.iter().flatten().filter_map(view).collect()
    }

    /// Closes a client when its replies so far are sent; at once if it does not read them. False when it is not here.
    pub(crate) fn kill(&mut self, client: u64) -> bool {
        for conn in self.table.conns.iter_mut().flatten() {
            if let Kind::Resp(session) = &mut conn.kind
                && session.client().id == client
            {
                session.close();
                end(&mut self.ring, &mut self.table.marked, conn);
                return true;
            }
        }
        false
    }

    /// Closes clients that were silent for `patience`, if there is one, and connections of HTTP that were for long. Whether
    /// there were some.
    pub(crate) fn kill_idle(&mut self, now: Millis, patience: Option<Millis>) -> bool {
        let mut some = false;
        let look_at_pages = now >= self.table.look_at_pages;
        if look_at_pages {
            self.table.look_at_pages = now + PAGE_IDLE_MS / 8;
        }
        if patience.is_none() && !look_at_pages {
            return false;
        }
        for conn in self.table.conns.iter_mut().flatten() {
            let silent = now.saturating_sub(conn.peer.last_active);
            match &mut conn.kind {
                Kind::Resp(session) if patience.is_some_and(|most| silent > most) && !session.is_waiting() => {
                    session.close();
                }
                Kind::Http(page) if silent > PAGE_IDLE_MS && !page.busy => page.last = true,
                _ => continue,
            }
            end(&mut self.ring, &mut self.table.marked, conn);
            some = true;
        }
        some
    }

    /// Bytes of replies that wait for clients.
    pub(crate) fn output_bytes(&self) -> u64 {
        self.table.conns.iter().flatten().map(|conn| conn.out.len() as u64).sum()
    }
}

#[inline]
fn live(conns: &mut [Option<Conn>], id: ConnId) -> Option<&mut Conn> {
    conns.get_mut(id.index())?.as_mut().filter(|conn| conn.id == id)
}

/// Runs code of a session. A request that panics is answered where it runs; should the session itself panic, its connection
/// ends with an error, and no other: false.
#[inline]
fn shielded(plane: &mut Plane<'_>, out: &mut Vec<u8>, work: impl FnOnce(&mut Plane<'_>, &mut Vec<u8>)) -> bool {
    let before = out.len();
    if catch_unwind(AssertUnwindSafe(|| work(plane, out))).is_ok() {
        return true;
    }
    out.truncate(before);
    plane.state.metrics.panics += 1;
    Writer::new(Protocol::Resp2, out).error(serve::PANIC_REPLY);
    false
}

/// Ends a connection that reads no further: at once if its peer has not even taken what was sent.
fn end(ring: &mut Ring, marked: &mut Vec<ConnId>, conn: &mut Conn) {
    if ring.is_sending(conn.id) {
        ring.close(conn.id);
    } else {
        mark(marked, conn);
    }
}

/// Takes note of how much output a connection holds.
#[inline]
fn settle(unsent: &mut usize, conn: &mut Conn) {
    let holds = conn.out.len() + conn.sending;
    *unsent = *unsent + holds - conn.held;
    conn.held = holds;
}

#[inline]
fn mark(marked: &mut Vec<ConnId>, conn: &mut Conn) {
    if !conn.marked {
        conn.marked = true;
        marked.push(conn.id);
    }
}

impl Table {
    #[inline]
    fn on_event(&mut self, core: &CoreRc, port: &mut RingPort<'_>, event: Event<'_>) {
        match event {
            Event::Data { conn, bytes } => self.on_data(core, port, conn, bytes),
            Event::Sent { conn, mut buf } => {
                let Some(conn) = live(&mut self.conns, conn) else { return };
                if buf.capacity() > KEEP_BUFFER {
                    buf = Vec::new();
                }
                conn.spare = buf;
                conn.sending = 0;
                if let Kind::Http(page) = &mut conn.kind {
                    next_page(core, conn.id, page, &mut conn.out);
                }
                settle(&mut self.unsent, conn);
                mark(&mut self.marked, conn);
            }
            Event::Accepted { conn, listener, peer, over_limit } => {
                self.on_accepted(core, port, conn, listener, peer, over_limit);
            }
            Event::Eof { conn } => {
                let Some(conn) = live(&mut self.conns, conn) else { return };
                conn.eof = true;
                mark(&mut self.marked, conn);
            }
            Event::Closed { conn, .. } => self.on_closed(core, conn),
            _ => {}
        }
    }

    #[inline]
    fn on_data(&mut self, core: &CoreRc, port: &mut RingPort<'_>, id: ConnId, bytes: &[u8]) {
        let Some(conn) = live(&mut self.conns, id) else { return };
        let state = &mut *core.state.borrow_mut();
        state.metrics.bytes_in += bytes.len() as u64;
        match &mut conn.kind {
            Kind::Resp(session) => {
                conn.peer.last_active = state.now;
                let before = session.client().commands;
                if self.fed_since.is_none() {
                    self.fed_since = Some(Instant::now());
                }
                let limits = if self.unsent > OUTPUT_BUDGET { &self.tight } else { &self.limits };
                let mut plane = Plane { core, state, limits, conn: id, peer: &conn.peer, level: 0, watch: None };
                if !shielded(&mut plane, &mut conn.out, |plane, out| session.feed(bytes, plane, out)) {
                    conn.kind = Kind::Refused;
                    mark(&mut self.marked, conn);
                    return;
                }
                self.fed += session.client().commands - before;
                conn.stalled = session.is_stalled();
                let pause_above = PAUSE_ABOVE.min(limits.query_buffer / 2);
                if conn.stalled && session.input_bytes() > pause_above && !conn.paused {
                    conn.paused = true;
                    port.pause_reads(id);
                }
            }
            Kind::Http(page) => {
                if page.input.len() + bytes.len() <= 2 * http::MAX_HEAD {
                    page.input.extend_from_slice(bytes);
                } else {
                    page.last = true;
                }
                conn.peer.last_active = state.now;
                next_page(core, id, page, &mut conn.out);
            }
            Kind::Refused => {}
        }
        settle(&mut self.unsent, conn);
        mark(&mut self.marked, conn);
    }

    /// Lets a stalled session go on if it can.
    #[inline]
    fn try_again(&mut self, core: &CoreRc, port: &mut RingPort<'_>, id: ConnId) {
        let Some(conn) = live(&mut self.conns, id) else { return };
        if !conn.stalled || conn.listed {
            return;
        }
        let Kind::Resp(session) = &mut conn.kind else { return };
        let state = &mut *core.state.borrow_mut();
        let before = session.client().commands;
        let limits = if self.unsent > OUTPUT_BUDGET { &self.tight } else { &self.limits };
        let mut plane = Plane { core, state, limits, conn: id, peer: &conn.peer, level: 0, watch: None };
        if !shielded(&mut plane, &mut conn.out, |plane, out| session.resume(plane, out)) {
            (conn.kind, conn.stalled) = (Kind::Refused, false);
            return mark(&mut self.marked, conn);
        }
        self.fed += session.client().commands - before;
        conn.stalled = session.is_stalled();
        if conn.stalled && !session.is_waiting() && conn.out.is_empty() && conn.sending == 0 {
            // Nothing of its own will wake it: it waits for room that others take.
            conn.listed = true;
            self.stalled.push(id);
        }
        if conn.paused && !conn.stalled {
            conn.paused = false;
            port.resume_reads(id);
        }
        let finished = session.is_finished();
        settle(&mut self.unsent, conn);
        if !conn.out.is_empty() || finished {
            mark(&mut self.marked, conn);
        }
    }

    fn on_made(&mut self, core: &CoreRc, id: ConnId, slot: u32, bytes: Vec<u8>) {
        let Some(conn) = live(&mut self.conns, id) else { return };
        match &mut conn.kind {
            Kind::Resp(session) => {
                let answer = Answer { status: Status::Encoded, aux: 0, bytes: &bytes };
                let state = &mut *core.state.borrow_mut();
                let mut plane =
                    Plane { core, state, limits: &self.limits, conn: id, peer: &conn.peer, level: 0, watch: None };
                if !shielded(&mut plane, &mut conn.out, |plane, out| session.answer(slot, 0, &answer, plane, out)) {
                    conn.kind = Kind::Refused;
                }
            }
            Kind::Http(page) => {
                conn.out.extend_from_slice(&bytes);
                page.busy = false;
                next_page(core, id, page, &mut conn.out);
            }
            Kind::Refused => {}
        }
        settle(&mut self.unsent, conn);
        mark(&mut self.marked, conn);
    }

    /// Marks the connections some of whose output the gate has let go.
    #[inline]
    fn look_at_gate(&mut self, gate: &Gate) {
        if self.waiting.is_empty() || self.safe == gate.safe() {
            return;
        }
        self.safe = gate.safe();
        let Table { waiting, conns, marked, .. } = self;
        waiting.retain(|&id| {
            let Some(conn) = live(conns, id) else { return false };
            conn.waits = !conn.gated.passes(gate);
            if !conn.waits {
                mark(marked, conn);
            }
            conn.waits
        });
    }

    /// Hands the output of a connection that may leave to the kernel, or ends the connection when there is nothing more to come.
    #[inline]
    fn send(&mut self, core: &CoreRc, ring: &mut Ring, id: ConnId, gate: &Gate) {
        let Some(conn) = live(&mut self.conns, id) else { return };
        conn.marked = false;
        let held = !(conn.page || gate.is_open() && conn.gated.is_empty());
        if held {
            // Also while the kernel is sending: what is said in a later turn may have to wait for longer.
            conn.gated.seal(gate.position(), conn.out.len());
        }
        if ring.is_sending(id) {
            return;
        }
        let leaves = if held { conn.gated.passing(gate) } else { conn.out.len() };
        if held {
            conn.gated.sent(leaves);
            if !conn.gated.is_empty() && !conn.waits {
                conn.waits = true;
                self.waiting.push(id);
            }
        }
        if leaves > 0 {
            let mut rest = std::mem::take(&mut conn.spare);
            rest.extend_from_slice(&conn.out[leaves..]);
            conn.out.truncate(leaves);
            let out = std::mem::replace(&mut conn.out, rest);
            core.state.borrow_mut().metrics.bytes_out += out.len() as u64;
            conn.sending = out.len();
            if let Err(unsent) = ring.send(id, out) {
                drop(unsent);
                ring.close(id);
                return;
            }
        }
        let (finished, waiting) = match &mut conn.kind {
            Kind::Resp(session) => {
                if conn.eof && !conn.stalled {
                    session.close();
                }
                conn.peer.name.clone_from(&session.client().name);
                (session.is_finished(), session.is_stalled() || session.is_waiting())
            }
            Kind::Http(page) => (page.last && !page.busy, page.busy),
            Kind::Refused => (true, false),
        };
        if conn.out.is_empty() && (finished || conn.eof && !waiting) {
            ring.finish(id);
        }
    }

    fn on_accepted(
        &mut self,
        core: &CoreRc,
        port: &mut RingPort<'_>,
        id: ConnId,
        listener: ListenerId,
        peer: SocketAddr,
        over_limit: bool,
    ) {
        let state = &mut *core.state.borrow_mut();
        let is_resp = self.resp.is_some_and(|(known, _)| known == listener);
        let full = if is_resp {
            let open = self.clients.open.fetch_add(1, Ordering::Relaxed);
            state.metrics.connections += 1;
            state.metrics.connections_total += 1;
            over_limit || open >= u64::from(state.settings.maxclients)
        } else {
            self.clients.pages.fetch_add(1, Ordering::Relaxed) >= u64::from(MOST_PAGES) && !self.close_a_page(port)
        };
        let kind = if full {
            state.metrics.connections_refused += 1;
            Kind::Refused
        } else if is_resp {
            let id = self.clients.next_id.fetch_add(1, Ordering::Relaxed) + 1;
            Kind::Resp(Box::new(Session::new(id, state.settings.requirepass.is_some())))
        } else {
            Kind::Http(Http::default())
        };
        let peer = Peer { addr: peer, name: String::new(), created: state.now, last_active: state.now };
        let mut out = Vec::new();
        match (full, is_resp) {
            (true, true) => out.extend_from_slice(TOO_MANY),
            (true, false) => http::refuse_connection(&mut out),
            (false, _) => {}
        }
        if full {
            port.pause_reads(id);
        } else if over_limit {
            // Clients that are being refused hold the places for now; a page is served all the same.
            port.resume_reads(id);
        }
        if self.conns.len() <= id.index() {
            self.conns.resize_with(id.index() + 1, || None);
        }
        let conn = Conn {
            id,
            kind,
            peer,
            page: !is_resp,
            out,
            gated: Held::default(),
            waits: false,
            spare: Vec::new(),
            marked: false,
            sending: 0,
            held: 0,
            stalled: false,
            listed: false,
            paused: false,
            eof: false,
        };
        let conn = self.conns[id.index()].insert(conn);
        if full {
            mark(&mut self.marked, conn);
        }
    }

    /// Makes room for a connection of HTTP: the one that was silent for longest goes, if this core has one that waits for nothing.
    fn close_a_page(&mut self, port: &mut RingPort<'_>) -> bool {
        let conns = self.conns.iter_mut().flatten();
        let pages = conns.filter_map(|conn| match &mut conn.kind {
            Kind::Http(page) if !page.busy && !page.last && conn.out.is_empty() => {
                Some((conn.peer.last_active, conn.id, page))
            }
            _ => None,
        });
        let Some((_, id, page)) = pages.min_by_key(|(active, ..)| *active) else { return false };
        page.last = true;
        port.close(id);
        true
    }

    fn on_closed(&mut self, core: &CoreRc, id: ConnId) {
        if let Some(conn) = live(&mut self.conns, id) {
            self.unsent -= conn.held;
            let page = conn.page;
            self.conns[id.index()] = None;
            if page {
                self.clients.pages.fetch_sub(1, Ordering::Relaxed);
            } else {
                self.clients.open.fetch_sub(1, Ordering::Relaxed);
                core.state.borrow_mut().metrics.connections -= 1;
            }
        }
    }
}

/// Answers the next request of an HTTP connection, if it is whole.
fn next_page(core: &CoreRc, conn: ConnId, page: &mut Http, out: &mut Vec<u8>) {
    while !page.busy && !page.last && out.len() <= PAGE_OUTPUT {
        let http::Parsed::Request(request) = http::parse(&page.input) else { return };
        page.input.drain(..request.consumed.min(page.input.len()));
        page.last = !request.keep_alive;
        let goes_on = !core.topology.is_stopping();
        let ready = goes_on && core.topology.is_ready();
        let asks_cores = match request.page {
            http::Page::Metrics => true,
            http::Page::Ready => goes_on && !ready,
            _ => false,
        };
        if !asks_cores {
            http::respond(&request, http::Content { metrics: "", ready }, out);
            continue;
        }
        page.busy = true;
        let asked = core.clone();
        answer_later(core, conn, 0, async move {
            let (metrics, ready) = match request.page {
                http::Page::Ready => (String::new(), crate::cluster::view::look_whether_ready(&asked).await),
                _ => (metrics_page(&asked).await, ready),
            };
            let mut out = Vec::new();
            http::respond(&request, http::Content { metrics: &metrics, ready }, &mut out);
            out
        });
    }
}

async fn metrics_page(core: &CoreRc) -> String {
    let started = core.state.borrow().settings.facts.started;
    let cores = each_core(core, |core| core.metrics()).await;
    let node = NodeMetrics { cores, uptime: started.elapsed() };
    crate::cluster::metrics::render(core, &node).await
}
