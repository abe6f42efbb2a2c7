//! Links: how a core of this node talks with a core of another one.
//!
//! ```text
//!   dialer (core i)                                    listener (core 0)           core k
//!     │ connect ────────────────────────────────────────▶ Accepted
//!     │ Hello {who, wants core k} ──────────────────────▶ judge ── no ──▶ Refuse {text}, close
//!     │ says nothing until the Welcome                      │ yes
//!     │                                                     └─ detach ─ HandOver ──▶ adopt
//!     │ ◀─────────────────────────────────────────────────────────────── Welcome {who} ┤
//!     │ ◀═════════════════════ messages and pings, both ways ═════════════════════════▶│
//! ```
//!
//! A link joins one core with one core, so a message meets the core that serves it without a further hop. Whoever wants to
//! ask dials: two cores that ask each other have two links. All connections to a node arrive at its core 0, which learns
//! from the Hello whose they are, and hands the socket over.
//!
//! [`Links`] is driven by the core that also drives its [`Ring`]: give it the events it [`Links::owns`], call
//! [`Links::flush`] at the end of a turn, and [`Links::on_deadline`] when [`Links::next_deadline`] is there. Time comes in
//! as `now`, milliseconds of a clock that never goes back. What happens goes to a [`Peers`].
//!
//! # Contract
//!
//! - Messages of a link arrive in the order in which they were sent, each once, or the link goes down. What was under way
//!   then is lost, on both sides, and so are messages sent meanwhile: [`SendError::Down`]. Nothing is sent again here.
//! - Everything sent in a turn leaves with one send. What waits is bounded: [`SendError::Full`] is the peer's slowness made
//!   visible. Control messages have a small reserve beyond the bound.
//! - A dialled link keeps its id for good: it is dialled again, with growing pauses, until [`Links::hang_up`]. The id of an
//!   accepted one ends with its connection. An id of the past is harmless.
//! - [`LinkEvent::Up`] and [`LinkEvent::Down`] alternate, and messages come between them.
//! - A side that has sent nothing for a while pings; one that hears nothing for longer ends the link. Only time in which
//!   this core ran counts, so its own stall is not taken for the peer's silence.
//! - A peer that breaks the format is cut off. What a stranger can hold is bounded: connections without a Hello, their
//!   time, and their memory.
//!
//! Not here: who is welcome and what messages mean (the owner), gossip ([`crate::gossip`]), encryption.

mod frame;
mod hello;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

pub use frame::{ALIGN, FrameError, FrameReader, FrameWriter, Kind, frame_len};
pub use hello::{HELLO_LEN, Hello, HelloError, Identity, PROTOCOL, REFUSE_LEN};

use crate::ring::{ConnId, Event, ListenerId, MAX_PEERS, Ring, RingError, RingPort, probe_port};

/// Connections waiting to be accepted.
const BACKLOG: i32 = 256;
/// Send buffers that grew beyond this are given back.
const KEEP_BUFFER: usize = 256 << 10;

/// Bounds and times of all links of a core.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// Bytes of the longest message, sent or taken.
    pub max_frame: usize,
    /// Bytes that may wait on a link before it is full. A single message may exceed it.
    pub max_queued_bytes: usize,
    /// Messages that may wait on a link before it is full.
    pub max_queued_frames: usize,
    /// What [`Priority::Control`] may use beyond both: this many bytes, and an eighth of the frames.
    pub control_bytes: usize,
    /// Accepted connections whose Hello has not come.
    pub max_waiting: usize,
    /// Links of a core, dialled and accepted.
    pub max_links: usize,
    /// Milliseconds between the beginning of a connection and its Welcome.
    pub greet_within: u64,
    /// Milliseconds without sending after which a ping is sent.
    pub ping_after: u64,
    /// Milliseconds without hearing after which a link is dead.
    pub silent_after: u64,
    /// Milliseconds before a link is dialled again, the first time and the most; doubled in between.
    pub redial_first: u64,
    /// See [`LinkConfig::redial_first`].
    pub redial_most: u64,
    /// Makes the pauses of different cores different.
    pub seed: u64,
}

impl Default for LinkConfig {
    fn default() -> LinkConfig {
        LinkConfig {
            max_frame: (64 << 20) + (256 << 10),
            max_queued_bytes: 4 << 20,
            max_queued_frames: 8192,
            control_bytes: 1 << 20,
            max_waiting: 256,
            max_links: MAX_PEERS as usize,
            greet_within: 3000,
            ping_after: 1000,
            silent_after: 3000,
            redial_first: 50,
            redial_most: 2000,
            seed: 0,
        }
    }
}

/// How much of a link's queue a message may fill: what matters least is refused first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Half of it: work that is tried again by itself.
    Background,
    /// Three quarters: it can be refused, and whoever asked is told.
    Request,
    /// All of it: the work is done, and would be lost.
    Answer,
    /// All and a reserve: what the rest depends on.
    Control,
}

/// Names a link of a core, for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId {
    index: u32,
    generation: u32,
}

/// A connection on its way to the core that its Hello wants: give it to that core's [`Links::adopt`].
#[derive(Debug)]
pub struct HandOver {
    /// What the dialer said; it was judged already.
    pub hello: Hello,
    /// The connection's address, which is not the one that the peer listens on.
    pub from: SocketAddr,
    /// The socket.
    pub fd: OwnedFd,
}

/// Why a link is not up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// The peer ended the connection.
    #[error("the peer hung up")]
    Closed,
    /// The connection broke, or never stood.
    #[error("{0}")]
    Broken(String),
    /// The peer said nothing for too long.
    #[error("the peer is silent")]
    Silent,
    /// The greeting took too long.
    #[error("no greeting in time")]
    TooSlow,
    /// The peer does not keep to the format.
    #[error("{0}")]
    Format(#[from] FrameError),
    /// The peer will not have us, in its own words.
    #[error("refused: {0}")]
    Refused(String),
    /// This side will not have the peer.
    #[error("turned away: {0}")]
    TurnedAway(String),
}

/// What happens to links.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkEvent {
    /// The link stands; messages may be sent.
    Up {
        /// The link.
        link: LinkId,
        /// Who is at the other end, in its own words.
        peer: Identity,
        /// This side dialled. Else the peer did.
        dialled: bool,
    },
    /// The link stood and does no more. A dialled one is dialled again; an accepted one is gone.
    Down {
        /// The link.
        link: LinkId,
        /// Why.
        reason: Reason,
    },
    /// A dialled link did not come to stand. It is dialled again.
    Failed {
        /// The link.
        link: LinkId,
        /// Why.
        reason: Reason,
    },
    /// A connection of a stranger was ended before it was a link.
    TurnedAway {
        /// Its address.
        from: SocketAddr,
        /// Why.
        reason: Reason,
    },
}

/// The owner of the links: whom to take, where sockets of other cores go, what to do with messages.
///
/// The calls come from inside [`Links`]' own methods. They may use the links they get.
pub trait Peers {
    /// Whether a dialer is welcome. The text of a refusal reaches it, up to [`REFUSE_LEN`] bytes. Version and core are
    /// checked already; [`Identity::fits`] is what most owners begin with.
    fn judge(&mut self, hello: &Hello, from: SocketAddr) -> Result<(), String>;

    /// A connection is for another core of this node.
    fn hand_over(&mut self, handed: HandOver);

    /// A link came up, went down, failed.
    fn on_link(&mut self, links: &mut Links, event: LinkEvent);

    /// A message came. Its bytes start at a multiple of [`ALIGN`] and are lent for the call.
    fn on_frame(&mut self, links: &mut Links, link: LinkId, body: &[u8]);
}

/// Why a message was not taken. Nothing of it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// As much as allowed waits already. Try again when the peer has read some, or give up.
    #[error("the link is full")]
    Full,
    /// The link does not stand, or is none any more.
    #[error("the link is down")]
    Down,
    /// The message is longer than [`LinkConfig::max_frame`].
    #[error("the message is longer than a frame may be")]
    TooLong,
}

/// What the links of a core have done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Connections begun.
    pub dialled: u64,
    /// Connections accepted.
    pub accepted: u64,
    /// Connections handed to other cores.
    pub handed_over: u64,
    /// Links that came to stand.
    pub ups: u64,
    /// Links that stood and went down.
    pub downs: u64,
    /// Of all ends, those for a silence.
    pub silent: u64,
    /// Of all ends, those for a breach of the format.
    pub malformed: u64,
    /// Refusals by peers.
    pub refused: u64,
    /// Strangers turned away, for whatever reason.
    pub turned_away: u64,
    /// Messages received.
    pub frames_in: u64,
    /// Bytes of their bodies.
    pub bytes_in: u64,
    /// Messages taken to be sent.
    pub frames_out: u64,
    /// Bytes of their bodies.
    pub bytes_out: u64,
    /// Of these, what was sent at each [`Priority`], in its order.
    pub bytes_out_at: [u64; 4],
    /// Messages not taken because a link was full.
    pub full: u64,
}

/// A link as an operator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkView {
    /// Its id.
    pub link: LinkId,
    /// The address dialled, or that of the dialer's connection.
    pub addr: SocketAddr,
    /// The core of the peer that was dialled; `None` if the peer dialled.
    pub dialled: Option<u16>,
    /// The peer, while the link stands.
    pub peer: Option<Identity>,
    /// Bytes that wait to be sent or are being sent.
    pub queued_bytes: usize,
}

impl Identity {
    /// Whether a node of that identity can be in one cluster with this one: same number of shards, same cluster or none
    /// yet.
    ///
    /// # Errors
    /// The reason in words.
    pub fn fits(&self, other: &Identity) -> Result<(), String> {
        if self.shards != other.shards {
            return Err(format!("{} shards meet {}", other.shards, self.shards));
        }
        if self.cluster != 0 && other.cluster != 0 && self.cluster != other.cluster {
            return Err(format!("cluster {:016x} meets cluster {:016x}", other.cluster, self.cluster));
        }
        Ok(())
    }
}

/// Where a link is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// To be dialled at `until`.
    Resting,
    /// The connection is being made.
    Connecting,
    /// The Hello is on its way, a Welcome is due until `until`.
    Greeting,
    /// Accepted; a Hello is due until `until`.
    Awaiting,
    /// On its way to another core.
    Leaving(Hello),
    Up,
}

struct Link {
    /// Whom it dials.
    target: Option<(SocketAddr, u16)>,
    addr: SocketAddr,
    stage: Stage,
    until: u64,
    conn: Option<ConnId>,
    peer: Option<Identity>,
    reader: FrameReader,
    writer: FrameWriter,
    out: Vec<u8>,
    out_frames: usize,
    /// Bytes and messages in the kernel's hands.
    flying: usize,
    flying_frames: usize,
    spare: Vec<u8>,
    /// On the list of those that [`Links::flush`] looks at.
    marked: bool,
    /// Milliseconds, as far as this core ran, since the peer was heard.
    silent: u64,
    sent_at: u64,
    up_since: u64,
    /// The next pause before dialling again.
    pause: u64,
}

struct Slot {
    generation: u32,
    link: Option<Link>,
}

/// The links of one core.
pub struct Links {
    config: LinkConfig,
    me: Identity,
    core: u16,
    listener: Option<ListenerId>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    targets: BTreeMap<(SocketAddr, u16), LinkId>,
    /// By index of the connection: ours until the ring says that they are gone, also when their link has let go.
    conns: Vec<Option<(ConnId, Option<LinkId>)>>,
    /// Links with something to be done in [`Links::flush`].
    marked: Vec<LinkId>,
    /// Connections to be closed there.
    closing: Vec<ConnId>,
    /// Links in [`Stage::Awaiting`].
    awaiting: usize,
    now: u64,
    last_tick: u64,
    deadline: Option<u64>,
    random: u64,
    counters: LinkCounters,
}

impl Links {
    /// The links of core `core` of the node `me`.
    pub fn new(config: LinkConfig, me: Identity, core: u16) -> Links {
        Links {
            random: config.seed ^ u64::from(core).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            config,
            me,
            core,
            listener: None,
            slots: Vec::new(),
            free: Vec::new(),
            targets: BTreeMap::new(),
            conns: Vec::new(),
            marked: Vec::new(),
            closing: Vec::new(),
            awaiting: 0,
            now: 0,
            last_tick: 0,
            deadline: None,
            counters: LinkCounters::default(),
        }
    }

    /// Who this node says it is.
    pub fn identity(&self) -> Identity {
        self.me
    }

    /// Changes what this node says in later greetings. Links that stand stay.
    pub fn set_identity(&mut self, me: Identity) {
        self.me = me;
    }

    /// Listens for dialers, on core 0 alone; returns the actual address, port 0 resolved.
    pub fn listen(&mut self, ring: &mut Ring, addr: SocketAddr) -> Result<SocketAddr, RingError> {
        let (listener, addr) = ring.listen_for_peers(probe_port(addr)?, BACKLOG)?;
        self.listener = Some(listener);
        Ok(addr)
    }

    /// A link to that core of the node at that address: the one there is, or a new one, dialled with the next
    /// [`Links::flush`].
    pub fn dial(&mut self, to: SocketAddr, core: u16) -> LinkId {
        if let Some(&link) = self.targets.get(&(to, core)) {
            return link;
        }
        let id = self.insert(Link::new(self.config.redial_first, to, Some((to, core)), Stage::Resting));
        self.targets.insert((to, core), id);
        self.mark(id);
        id
    }

    /// Ends a link, dialled or accepted, without another event. What waits on it is dropped.
    pub fn hang_up(&mut self, link: LinkId) {
        let Some(link) = self.remove(link) else { return };
        if let Some(conn) = link.conn {
            self.let_go(conn);
            self.closing.push(conn);
        }
    }

    /// Sends a message that is `parts` end to end. It leaves with the next [`Links::flush`].
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn send(&mut self, link: LinkId, priority: Priority, parts: &[&[u8]]) -> Result<(), SendError> {
        self.enqueue(link, parts, priority)
    }

    /// Whether the link stands.
    pub fn is_up(&self, link: LinkId) -> bool {
        self.get(link).is_some_and(|link| link.stage == Stage::Up)
    }

    /// The peer of a link that stands.
    pub fn peer(&self, link: LinkId) -> Option<Identity> {
        self.get(link).and_then(|link| link.peer)
    }

    /// All links.
    pub fn views(&self) -> impl Iterator<Item = LinkView> + '_ {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let link = slot.link.as_ref()?;
            Some(LinkView {
                link: LinkId { index: index as u32, generation: slot.generation },
                addr: link.addr,
                dialled: link.target.map(|(_, core)| core),
                peer: link.peer,
                queued_bytes: link.out.len() + link.flying,
            })
        })
    }

    /// What the links have done so far.
    pub fn counters(&self) -> LinkCounters {
        self.counters
    }

    /// Checks what must hold between two calls.
    ///
    /// # Panics
    /// When it does not.
    pub fn invariants(&self) {
        let waiting = self.slots.iter().flat_map(|slot| &slot.link).filter(|link| link.stage == Stage::Awaiting);
        assert_eq!(waiting.count(), self.awaiting, "strangers are counted");
        for (index, slot) in self.slots.iter().enumerate() {
            let Some(link) = &slot.link else { continue };
            let id = LinkId { index: index as u32, generation: slot.generation };
            assert_eq!(link.conn.is_none(), link.stage == Stage::Resting, "only a resting link has no connection");
            assert!(link.conn.is_none_or(|conn| self.link_of(conn) == Some(id)), "a connection knows its link");
            assert!(link.target.is_none_or(|to| self.targets.get(&to) == Some(&id)), "a target knows its link");
            assert!(link.stage == Stage::Up || link.peer.is_none(), "a peer is known while a link stands");
            let timed = !matches!(link.stage, Stage::Leaving(_)) && !link.marked;
            assert!(!timed || self.deadline.is_some(), "whatever waits has a deadline");
        }
    }

    /// Whether an event of the ring is about a link, and so goes to [`Links::on_event`].
    pub fn owns(&self, event: &Event<'_>) -> bool {
        match event {
            Event::Accepted { listener, .. } => self.listener == Some(*listener),
            event => event.conn().is_some_and(|conn| self.is_ours(conn)),
        }
    }

    /// Takes an event of the ring. One that is not about a link is ignored.
    pub fn on_event(&mut self, now: u64, port: &mut RingPort<'_>, event: Event<'_>, peers: &mut impl Peers) {
        self.now = now;
        if !self.owns(&event) {
            return;
        }
        match event {
            Event::Accepted { conn, peer, over_limit, .. } => self.on_accepted(port, conn, peer, over_limit, peers),
            Event::Connected { conn } => self.on_connected(port, conn),
            Event::Data { conn, bytes } => self.on_data(port, conn, bytes, peers),
            Event::Sent { conn, buf } => self.on_sent(port, conn, buf),
            Event::Eof { conn } => {
                if let Some(id) = self.link_of(conn) {
                    self.down(port, id, Reason::Closed, peers);
                }
            }
            Event::Detached { conn, fd } => self.on_detached(conn, fd, peers),
            Event::Closed { conn, error } => self.on_closed(port, conn, error, peers),
            Event::Readable { .. } => {}
        }
    }

    /// Takes over a connection that core 0 accepted for this core.
    pub fn adopt(&mut self, now: u64, port: &mut RingPort<'_>, handed: HandOver, peers: &mut impl Peers) {
        self.now = now;
        let HandOver { hello, from, fd } = handed;
        let adopted = if self.live() < self.config.max_links { port.adopt(fd).ok() } else { None };
        let Some(conn) = adopted else {
            self.counters.turned_away += 1;
            let reason = Reason::TurnedAway("no room for another link".into());
            return peers.on_link(self, LinkEvent::TurnedAway { from, reason });
        };
        let mut link = Link::new(self.config.redial_first, from, None, Stage::Awaiting);
        // The Hello was the dialer's first frame, and core 0 has read it.
        link.reader.skip_one();
        let id = self.insert(link);
        self.awaiting += 1;
        self.bind(conn, id);
        self.welcome(id, &hello, peers);
    }

    /// Hands to the kernel what was sent since the last time; begins new dials.
    pub fn flush(&mut self, now: u64, port: &mut RingPort<'_>, peers: &mut impl Peers) {
        self.now = now;
        for conn in self.closing.drain(..) {
            port.close(conn);
        }
        let mut marked = std::mem::take(&mut self.marked);
        for id in marked.drain(..) {
            let Some(link) = self.get_mut(id) else { continue };
            link.marked = false;
            match link.stage {
                Stage::Resting if link.until <= now => self.begin(port, id, peers),
                Stage::Up => self.pump(port, id),
                _ => {}
            }
        }
        if self.marked.is_empty() {
            self.marked = marked;
        }
    }

    /// Whether [`Links::flush`] has something to do.
    pub fn has_work(&self) -> bool {
        !self.marked.is_empty() || !self.closing.is_empty()
    }

    /// When [`Links::on_deadline`] is due. Earlier calls do no harm.
    pub fn next_deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Does what time asks for: dials, pings, ends what takes too long.
    pub fn on_deadline(&mut self, now: u64, port: &mut RingPort<'_>, peers: &mut impl Peers) {
        self.now = now;
        // However long this core did not come here: it could have heard nothing meanwhile.
        let passed = now.saturating_sub(self.last_tick).min(self.config.ping_after);
        self.last_tick = now;
        self.deadline = None;
        for index in 0..self.slots.len() {
            let LinkConfig { ping_after, silent_after, .. } = self.config;
            let Slot { generation, link: Some(link) } = &mut self.slots[index] else { continue };
            let id = LinkId { index: index as u32, generation: *generation };
            match link.stage {
                Stage::Resting if link.until <= now => self.begin(port, id, peers),
                Stage::Connecting | Stage::Greeting | Stage::Awaiting if link.until <= now => {
                    self.down(port, id, Reason::TooSlow, peers);
                }
                Stage::Resting | Stage::Connecting | Stage::Greeting | Stage::Awaiting => {
                    let until = link.until;
                    self.due(until);
                }
                Stage::Leaving(_) => {}
                Stage::Up => {
                    link.silent += passed;
                    if link.silent >= silent_after {
                        self.down(port, id, Reason::Silent, peers);
                        continue;
                    }
                    let idle = link.out.is_empty() && link.flying == 0;
                    if idle && now.saturating_sub(link.sent_at) >= ping_after {
                        link.writer.push(&mut link.out, Kind::Ping, &[]);
                        self.pump(port, id);
                    }
                    self.due(now + ping_after / 2);
                }
            }
        }
    }
}

/// Beginnings and ends.
impl Links {
    fn begin(&mut self, port: &mut RingPort<'_>, id: LinkId, peers: &mut impl Peers) {
        let Some((to, _)) = self.get(id).and_then(|link| link.target) else { return };
        self.counters.dialled += 1;
        match port.connect_peer(to) {
            Ok(conn) => {
                self.bind(conn, id);
                let until = self.now + self.config.greet_within;
                let link = self.get_mut(id).expect("just found");
                link.stage = Stage::Connecting;
                link.until = until;
                self.due(until);
            }
            Err(error) => self.down(port, id, Reason::Broken(error.to_string()), peers),
        }
    }

    fn on_accepted(
        &mut self,
        port: &mut RingPort<'_>,
        conn: ConnId,
        from: SocketAddr,
        over_limit: bool,
        peers: &mut impl Peers,
    ) {
        self.counters.accepted += 1;
        if over_limit || self.awaiting >= self.config.max_waiting || self.live() >= self.config.max_links {
            self.hold(conn, None);
            port.close(conn);
            self.counters.turned_away += 1;
            let reason = Reason::TurnedAway("no room for another connection".into());
            return peers.on_link(self, LinkEvent::TurnedAway { from, reason });
        }
        let mut link = Link::new(self.config.redial_first, from, None, Stage::Awaiting);
        link.until = self.now + self.config.greet_within;
        self.due(link.until);
        let id = self.insert(link);
        self.awaiting += 1;
        self.bind(conn, id);
    }

    fn on_connected(&mut self, port: &mut RingPort<'_>, conn: ConnId) {
        let from = self.me;
        let Some(link) = self.link_of(conn).and_then(|id| self.get_mut(id)) else { return };
        let Some((_, core)) = link.target else { return };
        link.stage = Stage::Greeting;
        let mut out = std::mem::take(&mut link.spare);
        link.writer.push(&mut out, Kind::Hello, &[&Hello { from, core }.encode()]);
        // Refused only by a connection that is ending, which is reported.
        let _ = port.send(conn, out);
    }

    fn on_hello(&mut self, port: &mut RingPort<'_>, id: LinkId, body: &[u8], peers: &mut impl Peers) {
        let Some(link) = self.get(id) else { return };
        let (from, conn) = (link.addr, link.conn);
        let judged = match Hello::decode(body) {
            Err(HelloError::Malformed) => {
                return self.down(port, id, FrameError::Body(Kind::Hello).into(), peers);
            }
            Err(error @ HelloError::Version { .. }) => Err(error.to_string()),
            Ok(hello) if hello.core >= self.me.cores => {
                Err(format!("no core {} among the {} here", hello.core, self.me.cores))
            }
            Ok(hello) => peers.judge(&hello, from).map(|()| hello),
        };
        match judged {
            Err(text) => self.refuse(port, id, text, peers),
            Ok(hello) if hello.core == self.core => self.welcome(id, &hello, peers),
            Ok(hello) => {
                self.awaiting -= 1;
                self.get_mut(id).expect("judging has no hold of the links").stage = Stage::Leaving(hello);
                port.detach(conn.expect("a link that hears has a connection"));
            }
        }
    }

    fn refuse(&mut self, port: &mut RingPort<'_>, id: LinkId, mut text: String, peers: &mut impl Peers) {
        let Some(mut link) = self.remove(id) else { return };
        let mut end = text.len().min(REFUSE_LEN);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        let conn = link.conn.expect("only who was heard is refused");
        self.let_go(conn);
        link.writer.push(&mut link.out, Kind::Refuse, &[text.as_bytes()]);
        // A few bytes, which the kernel takes at once even if the peer never reads them.
        let _ = port.send(conn, link.out);
        port.finish(conn);
        self.counters.turned_away += 1;
        peers.on_link(self, LinkEvent::TurnedAway { from: link.addr, reason: Reason::TurnedAway(text) });
    }

    fn welcome(&mut self, id: LinkId, hello: &Hello, peers: &mut impl Peers) {
        let body = Hello { from: self.me, core: 0 }.encode();
        let link = self.get_mut(id).expect("the caller has just found it");
        link.writer.push(&mut link.out, Kind::Welcome, &[&body]);
        self.awaiting -= 1;
        self.mark(id);
        self.up(id, hello.from, peers);
    }

    fn on_welcome(&mut self, port: &mut RingPort<'_>, id: LinkId, body: &[u8], peers: &mut impl Peers) {
        match Hello::decode(body) {
            Err(HelloError::Malformed) => self.down(port, id, FrameError::Body(Kind::Welcome).into(), peers),
            Err(error) => self.down(port, id, Reason::TurnedAway(error.to_string()), peers),
            Ok(welcome) => match self.me.fits(&welcome.from) {
                Err(text) => self.down(port, id, Reason::TurnedAway(text), peers),
                Ok(()) => self.up(id, welcome.from, peers),
            },
        }
    }

    fn up(&mut self, id: LinkId, peer: Identity, peers: &mut impl Peers) {
        let now = self.now;
        let link = self.get_mut(id).expect("the caller has just found it");
        link.stage = Stage::Up;
        link.peer = Some(peer);
        (link.silent, link.sent_at, link.up_since) = (0, now, now);
        let dialled = link.target.is_some();
        self.due(now + self.config.ping_after / 2);
        self.counters.ups += 1;
        peers.on_link(self, LinkEvent::Up { link: id, peer, dialled });
    }

    /// Ends the connection of a link, if it has one, and what follows from that.
    fn down(&mut self, port: &mut RingPort<'_>, id: LinkId, reason: Reason, peers: &mut impl Peers) {
        let now = self.now;
        let Some(link) = self.get_mut(id) else { return };
        let (was_up, dialled, addr, conn) = (link.stage == Stage::Up, link.target.is_some(), link.addr, link.conn);
        if let Some(conn) = conn {
            self.let_go(conn);
            port.close(conn);
        }
        match &reason {
            Reason::Silent => self.counters.silent += 1,
            Reason::Format(_) => self.counters.malformed += 1,
            Reason::Refused(_) => self.counters.refused += 1,
            _ => {}
        }
        if dialled {
            self.rest(id, now, &reason);
        } else {
            self.remove(id);
        }
        let event = if was_up {
            self.counters.downs += 1;
            LinkEvent::Down { link: id, reason }
        } else if dialled {
            LinkEvent::Failed { link: id, reason }
        } else {
            self.counters.turned_away += 1;
            LinkEvent::TurnedAway { from: addr, reason }
        };
        peers.on_link(self, event);
    }

    /// Makes a dialled link as new and has it dialled after a pause.
    fn rest(&mut self, id: LinkId, now: u64, reason: &Reason) {
        let random = self.random();
        let LinkConfig { redial_first, redial_most, .. } = self.config;
        let link = self.get_mut(id).expect("the caller has just found it");
        let mut pause = link.pause;
        if link.stage == Stage::Up && now.saturating_sub(link.up_since) >= redial_most {
            pause = redial_first;
        }
        // Who was turned away is not welcome a moment later.
        if matches!(reason, Reason::Refused(_) | Reason::TurnedAway(_)) {
            pause = redial_most;
        }
        let half = pause / 2;
        let until = now + half + random % (pause - half + 1);
        let marked = link.marked;
        *link = Link {
            until,
            marked,
            pause: (pause * 2).min(redial_most),
            ..Link::new(redial_first, link.addr, link.target, Stage::Resting)
        };
        self.due(until);
    }

    fn on_detached(&mut self, conn: ConnId, fd: OwnedFd, peers: &mut impl Peers) {
        let id = self.link_of(conn);
        self.conns[conn.index()] = None;
        let Some(link) = id.and_then(|id| self.remove(id)) else { return };
        if let Stage::Leaving(hello) = link.stage {
            self.counters.handed_over += 1;
            peers.hand_over(HandOver { hello, from: link.addr, fd });
        }
    }

    fn on_closed(&mut self, port: &mut RingPort<'_>, conn: ConnId, error: Option<io::Error>, peers: &mut impl Peers) {
        let id = self.link_of(conn);
        self.conns[conn.index()] = None;
        if let Some(id) = id {
            self.get_mut(id).expect("a bound link lives").conn = None;
            let reason = error.map_or(Reason::Closed, |error| Reason::Broken(error.to_string()));
            self.down(port, id, reason, peers);
        }
    }
}

/// Bytes in and out.
impl Links {
    fn on_data(&mut self, port: &mut RingPort<'_>, conn: ConnId, mut bytes: &[u8], peers: &mut impl Peers) {
        let Some(id) = self.link_of(conn) else { return };
        let max_frame = self.config.max_frame;
        let link = self.get_mut(id).expect("a bound link lives");
        link.silent = 0;
        // Taken out, so that the owner can use the links while it looks at a message.
        let mut reader = std::mem::take(&mut link.reader);
        loop {
            let stage = self.get(id).expect("checked below").stage;
            if stage == Stage::Up {
                reader.set_max(max_frame);
            }
            match reader.next(&mut bytes) {
                Ok(None) => break,
                Ok(Some((kind, body))) => match (stage, kind) {
                    (Stage::Up, Kind::Message) => {
                        self.counters.frames_in += 1;
                        self.counters.bytes_in += body.len() as u64;
                        peers.on_frame(self, id, body);
                    }
                    (Stage::Up, Kind::Ping) => {}
                    (Stage::Awaiting, Kind::Hello) if !bytes.is_empty() => {
                        self.down(port, id, FrameError::Early.into(), peers);
                    }
                    (Stage::Awaiting, Kind::Hello) => self.on_hello(port, id, body, peers),
                    (Stage::Greeting, Kind::Welcome) => self.on_welcome(port, id, body, peers),
                    (Stage::Greeting, Kind::Refuse) => {
                        self.down(port, id, Reason::Refused(hello::refusal(body)), peers);
                    }
                    (_, kind) => self.down(port, id, FrameError::NotNow(kind).into(), peers),
                },
                Err(error) => self.down(port, id, error.into(), peers),
            }
            if self.link_of(conn) != Some(id) {
                return;
            }
        }
        let link = self.get_mut(id).expect("just found");
        match link.stage {
            // Bytes that came before the hand-over was done: the Hello was not all the dialer had to say.
            Stage::Leaving(_) if reader.held() > 0 => self.down(port, id, FrameError::Early.into(), peers),
            _ => link.reader = reader,
        }
    }

    fn enqueue(&mut self, id: LinkId, parts: &[&[u8]], priority: Priority) -> Result<(), SendError> {
        let LinkConfig { max_frame, max_queued_bytes, max_queued_frames, control_bytes, .. } = self.config;
        let (bytes, frames) = match priority {
            Priority::Control => (max_queued_bytes + control_bytes, max_queued_frames + max_queued_frames / 8 + 1),
            Priority::Answer => (max_queued_bytes, max_queued_frames),
            Priority::Request => (max_queued_bytes / 4 * 3, max_queued_frames / 4 * 3),
            Priority::Background => (max_queued_bytes / 2, max_queued_frames / 2),
        };
        let body: usize = parts.iter().map(|part| part.len()).sum();
        let link = self.get_mut(id).filter(|link| link.stage == Stage::Up).ok_or(SendError::Down)?;
        if body > max_frame {
            return Err(SendError::TooLong);
        }
        if link.out.len() + link.flying >= bytes || link.out_frames + link.flying_frames >= frames {
            self.counters.full += 1;
            return Err(SendError::Full);
        }
        link.writer.push(&mut link.out, Kind::Message, parts);
        link.out_frames += 1;
        self.counters.frames_out += 1;
        self.counters.bytes_out += body as u64;
        self.counters.bytes_out_at[priority as usize] += body as u64;
        self.mark(id);
        Ok(())
    }

    /// Hands what waits to the kernel, unless it has something of this link already.
    fn pump(&mut self, port: &mut RingPort<'_>, id: LinkId) {
        let now = self.now;
        let Some(link) = self.get_mut(id) else { return };
        let Some(conn) = link.conn else { return };
        if link.out.is_empty() || port.is_sending(conn) {
            return;
        }
        let out = std::mem::replace(&mut link.out, std::mem::take(&mut link.spare));
        link.flying = out.len();
        link.flying_frames = std::mem::take(&mut link.out_frames);
        link.sent_at = now;
        // Refused only by a connection that is ending, which is reported.
        let _ = port.send(conn, out);
    }

    fn on_sent(&mut self, port: &mut RingPort<'_>, conn: ConnId, buf: Vec<u8>) {
        let Some(id) = self.link_of(conn) else { return };
        let link = self.get_mut(id).expect("a bound link lives");
        (link.flying, link.flying_frames) = (0, 0);
        if buf.capacity() <= KEEP_BUFFER {
            link.spare = buf;
        }
        if link.stage == Stage::Up {
            self.pump(port, id);
        }
    }
}

/// The tables.
impl Links {
    fn get(&self, id: LinkId) -> Option<&Link> {
        let slot = self.slots.get(id.index as usize).filter(|slot| slot.generation == id.generation)?;
        slot.link.as_ref()
    }

    fn get_mut(&mut self, id: LinkId) -> Option<&mut Link> {
        let slot = self.slots.get_mut(id.index as usize).filter(|slot| slot.generation == id.generation)?;
        slot.link.as_mut()
    }

    fn live(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn insert(&mut self, link: Link) -> LinkId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, link: None });
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        slot.link = Some(link);
        LinkId { index, generation: slot.generation }
    }

    fn remove(&mut self, id: LinkId) -> Option<Link> {
        let slot = self.slots.get_mut(id.index as usize).filter(|slot| slot.generation == id.generation)?;
        let link = slot.link.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(id.index);
        if link.stage == Stage::Awaiting {
            self.awaiting -= 1;
        }
        if let Some(target) = &link.target {
            self.targets.remove(target);
        }
        Some(link)
    }

    fn is_ours(&self, conn: ConnId) -> bool {
        self.conns.get(conn.index()).is_some_and(|held| held.is_some_and(|(held, _)| held == conn))
    }

    fn link_of(&self, conn: ConnId) -> Option<LinkId> {
        let (held, link) = (*self.conns.get(conn.index())?)?;
        if held == conn { link } else { None }
    }

    fn hold(&mut self, conn: ConnId, link: Option<LinkId>) {
        if self.conns.len() <= conn.index() {
            self.conns.resize(conn.index() + 1, None);
        }
        self.conns[conn.index()] = Some((conn, link));
    }

    fn bind(&mut self, conn: ConnId, id: LinkId) {
        self.hold(conn, Some(id));
        self.get_mut(id).expect("the caller has just made it").conn = Some(conn);
    }

    /// The connection has no link any more; it stays ours until the ring reports its end.
    fn let_go(&mut self, conn: ConnId) {
        if self.is_ours(conn) {
            self.hold(conn, None);
        }
    }

    fn mark(&mut self, id: LinkId) {
        if let Some(link) = self.get_mut(id)
            && !std::mem::replace(&mut link.marked, true)
        {
            self.marked.push(id);
        }
    }

    fn due(&mut self, at: u64) {
        self.deadline = Some(self.deadline.map_or(at, |deadline| deadline.min(at)));
    }

    /// A step of splitmix64.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.random;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Links { core, counters, .. } = self;
        f.debug_struct("Links").field("core", core).field("links", &self.live()).field("counters", counters).finish()
    }
}

impl Link {
    fn new(pause: u64, addr: SocketAddr, target: Option<(SocketAddr, u16)>, stage: Stage) -> Link {
        Link {
            target,
            addr,
            stage,
            until: 0,
            conn: None,
            peer: None,
            // A stranger may say no more than a greeting.
            reader: FrameReader::new(HELLO_LEN.max(REFUSE_LEN)),
            writer: FrameWriter::default(),
            out: Vec::new(),
            out_frames: 0,
            flying: 0,
            flying_frames: 0,
            spare: Vec::new(),
            marked: false,
            silent: 0,
            sent_at: 0,
            up_since: 0,
            pause,
        }
    }
}
