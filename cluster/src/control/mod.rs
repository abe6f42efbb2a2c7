//! The control plane of one node: who is there, which map holds, and what is to change.
//!
//! One per node, on its first core. It joins four machines and decides nothing of its own but who speaks when:
//!
//! ```text
//!   datagrams ──▶ membership ──── who is alive ────────────▶ all cores
//!                     │
//!                     ▼ view
//!                  planner ── change ──▶ proposer ──▶ voters (acceptors) of other nodes
//!                     ▲                     │ chosen
//!   status of peers ──┘                     ▼
//!                                        the map ──────────▶ all cores, all nodes, disk
//! ```
//!
//! - **Joining.** A node that was given seeds asks one after the other to propose its admission, until it sees a map that names this
//!   life. Who is asked sends a [`Ticket`] first, so that nobody is admitted who has gone meanwhile. A node without seeds founds a cluster. Either way it serves nothing before it has a chosen map that names it.
//! - **Learning.** Only chosen values are maps. Whoever had one chosen sends it to everybody; who missed it sees the epoch in
//!   the next message of any peer, and asks.
//! - **Leading.** The lowest voter that is alive plans. That is a convention which saves work, nothing depends on it: two
//!   leaders only make each other's proposals stale.
//! - **Dying.** A life that the map has given up cannot come back: [`Event::Expelled`], and the driver starts
//!   another one.
//!
//! What a voter says leaves only when what it promised is on disk: see [`Output::disk`].

pub mod clocks;
pub mod message;
#[cfg(test)]
mod tests;
pub mod watch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use gridkv_engine::Millis;
use xxhash_rust::xxh3::xxh3_64;

use crate::ids::{NodeId, NodeNo, Now};
use crate::map::{Candidate, Change, Map, Refusal};
use crate::membership::{self, Identity, Membership};
use crate::planner::{self, Planner};
use crate::planted::{Bug, Planted};
use crate::quorum::Quorums;
use crate::register::{self, Acceptor, Head, Proposer, RegisterMessage, Rules};
use clocks::Clocks;
use message::{Body, Envelope, Sender, Ticket};
use watch::Moved;

/// How a node comes to its cluster.
#[derive(Clone, Debug)]
pub enum Start {
    /// It founds one.
    Found {
        /// The number of the new cluster: random, not 0.
        cluster: u64,
        /// Seed of its key hash.
        seed: u64,
        /// Its shards.
        shards: u16,
        /// Its copies and quorums.
        quorums: Quorums,
    },
    /// It joins through one of these peer addresses.
    Join(Vec<SocketAddr>),
}

/// What a node's directory remembers of its former lives.
#[derive(Clone, Debug, Default)]
pub struct Remembered {
    /// The last map that it adopted.
    pub map: Option<Map>,
    /// What it promised as a voter.
    pub voter: register::State,
}

impl Remembered {
    /// A map of the cluster that it belongs to: the last that it adopted, or else one that it has only voted for. The latter says which
    /// cluster it is and whom to ask, but nobody may act upon it: it need not be chosen.
    pub fn known(&self) -> Option<Map> {
        let accepted = || self.voter.accepted.as_ref().and_then(|(_, value)| Map::decode(value).ok());
        self.map.clone().or_else(accepted)
    }
}

/// What a control plane starts with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How this node comes to its cluster.
    pub start: Start,
    /// Shards that this node is built for: a cluster with another number refuses it, and it the cluster.
    pub shards: u16,
    /// What is to become known of this node.
    pub about: Candidate,
    /// Times of the membership.
    pub membership: membership::Settings,
    /// What the planner may do.
    pub planner: planner::Settings,
}

/// What happened, for logs, metrics and applications.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// This life was admitted.
    Admitted(NodeNo),
    /// A node can be reached.
    Up(NodeId),
    /// A node cannot be reached any more.
    Down(NodeId),
    /// A node left on purpose.
    Left(NodeId),
    /// This node has to think that it is cut off, or no more.
    Isolated(bool),
    /// This node's clock differs from those of most others by more than is allowed, or no more: meanwhile it makes no versions.
    Quarantined {
        /// Whether it does.
        quarantined: bool,
        /// By how many milliseconds it is ahead of them; negative when it is behind.
        ahead_ms: i64,
    },
    /// The clock of another node differs from this node's by more than is allowed, and this one is not known to be wrong.
    ClocksApart {
        /// The other node.
        node: NodeId,
        /// By how many milliseconds its clock is ahead; negative when it is behind.
        ahead_ms: i64,
    },
    /// A new map was adopted.
    Map(u64),
    /// Copies of shards are complete elsewhere than in the map before.
    Moved {
        /// The map that says so.
        epoch: u64,
        /// Each of them.
        copies: Vec<Moved>,
    },
    /// So many shards are at risk now ([`watch`] says when): told when there are more than before, and with 0 when it is over.
    AtRisk(usize),
    /// The cluster refuses this node for good: why.
    Refused(String),
    /// Another process runs with this node's id.
    Duplicate {
        /// The life that the others know.
        boot: u64,
    },
    /// The cluster went on without this life; the node may come back as another.
    Expelled,
}

/// What is to be done by the driver, which drains it.
#[derive(Debug, Default)]
pub struct Output {
    /// Datagrams to peer addresses.
    pub datagrams: Vec<(SocketAddr, Vec<u8>)>,
    /// Control messages to peer addresses; they may be lost.
    pub messages: Vec<(SocketAddr, Vec<u8>)>,
    /// In this order: what must be on disk, and the messages that may leave once it is. When writing fails, neither these
    /// messages nor later ones of this list may leave.
    pub disk: VecDeque<Disk>,
    /// A map for all cores, with the number of this life in it (0 = none). [`Control::on_adopted`] tells when all have it.
    pub adopt: Option<(Arc<Map>, NodeNo)>,
    /// Who can be reached, for all cores, and whether this node has to think that it is cut off.
    pub alive: Option<(BTreeSet<NodeNo>, bool)>,
    /// Whether all cores have to leave versions to other nodes from now on, for this node's clock is wrong; and by how much it is
    /// behind. That it is right is said every few seconds.
    pub quarantined: Option<(bool, Millis)>,
    /// What happened.
    pub events: Vec<Event>,
    /// Ends of [`Control::propose`], by token: why it was refused, if it was.
    pub proposed: Vec<(u64, Result<(), String>)>,
}

/// A voter's step: first the disk, then the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The voter's state, if it has changed ([`register::slots`] has its format).
    pub voter: Option<Vec<u8>>,
    /// Who is told then.
    pub then: Option<(SocketAddr, Vec<u8>)>,
}

/// What the register's bytes mean.
#[derive(Clone, Copy, Debug, Default)]
struct Maps;

impl Rules for Maps {
    type Change = Change;
    type Refusal = Refusal;

    fn head(&self, value: &[u8]) -> Option<Head> {
        let map = Map::decode(value).ok()?;
        let config = register::Config { voters: map.voters, next: map.next_voters };
        Some(Head { epoch: map.epoch, config })
    }

    fn apply(&self, current: &[u8], change: &Change) -> Result<Vec<u8>, Refusal> {
        let map = Map::decode(current).map_err(Refusal::Invalid)?;
        map.apply(change).map(|next| next.encode())
    }
}

/// Who waits for a proposal.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Waits {
    /// A node that wants to join: its address, its id, its life.
    Joiner(SocketAddr, NodeId, u64),
    /// An operator at this node.
    Operator(u64),
    /// This node, which looks for a map that nobody heard of.
    Reading,
    /// The planner, which wants other voters.
    Voters,
    /// The planner, or nobody.
    Nobody,
}

/// A change of the map that is to be proposed when it is its turn.
#[derive(Debug)]
struct Waiting {
    change: Change,
    waits: Waits,
    /// Until when. What was right to ask for may be wrong later: a node that waited to be admitted may be gone, and another one
    /// have its address.
    until: Millis,
}

/// What a peer said of itself.
#[derive(Clone, Debug, Default)]
struct Status {
    adopted: u64,
    filled: Vec<(u16, u64)>,
    quarantined: bool,
}

/// Proposals that wait for their turn, at most.
const MAX_WAITING: usize = 256;
/// How often a node that is not a member asks.
const JOIN_MS: Millis = 500;
/// How long a ticket is good for.
const TICKET_MS: Millis = 2000;
/// Members that are asked at a time.
const JOIN_AT_ONCE: usize = 3;
/// Rounds of asking in vain, after which a node that was a member before proposes its admission itself: all others may be
/// in the same position.
const JOIN_ALONE: u32 = 3;
/// How long another process may be there with this node's id: longer than it takes to notice that a former life is gone.
const TAKEN_MS: Millis = 10_000;
/// What others said of that so long ago counts no more.
const TAKEN_APART_MS: Millis = 8 * JOIN_MS;
/// How often a node tells its status, and how soon after a change.
const STATUS_MS: Millis = 1000;
const STATUS_SOON_MS: Millis = 20;
/// How often the leader plans when nothing has changed.
const PLAN_MS: Millis = 500;
/// How late it is when it must have stood still.
const STILL_MS: Millis = 3000;
/// How soon it plans after something has.
const PLAN_SOON_MS: Millis = 10;
/// How often a peer is sent a map it lacks, at most.
const SEND_MAP_MS: Millis = 200;
/// Peers that are asked for a map that somebody must have.
const ASKED_FOR_MAP: usize = 4;
/// How often a node reads the register at most: reading must not keep it from planning.
const READ_MS: Millis = 5000;
/// How long the voters stay as they are, after those who were to be voters were silent.
const VOTERS_MS: Millis = 10_000;
/// How long a proposal may wait for its turn.
const WAIT_MS: Millis = 5000;
/// How long a proposal may take.
const PROPOSE_MS: Millis = 3000;

/// See the head of the file.
pub struct Control {
    settings: Settings,
    cluster: u64,
    /// This life's number; 0 before it is admitted.
    me: NodeNo,
    map: Option<Arc<Map>>,
    membership: Option<Membership>,
    swim: membership::Output,
    acceptor: Acceptor,
    proposer: Proposer<Maps>,
    planner: Planner,
    /// What is being proposed, and what waits.
    proposing: Option<Waits>,
    waiting: VecDeque<Waiting>,
    statuses: BTreeMap<NodeNo, Status>,
    adopted: u64,
    filled: BTreeSet<(u16, u64)>,
    alive: BTreeSet<NodeNo>,
    /// What the cores were told last.
    isolated: bool,
    /// Shards at risk.
    at_risk: usize,
    /// Since when members are out of reach.
    away_since: BTreeMap<NodeNo, Millis>,
    /// Maps sent lately, by address.
    map_sent: BTreeMap<SocketAddr, Millis>,
    next_seed: usize,
    join_at: Option<Millis>,
    /// Rounds of asking to be admitted.
    asked: u32,
    /// Since when others say that another process has this node's id, and when they said so last.
    taken: Option<(Millis, Millis)>,
    status_at: Millis,
    clocks: Clocks,
    clocks_at: Millis,
    plan_at: Millis,
    refused: bool,
    /// Whether this node led when it looked last.
    led: bool,
    /// A map may have been chosen that nobody knows.
    must_read: bool,
    /// Not before this time.
    read_at: Millis,
    /// Other voters are looked for from then on.
    voters_at: Millis,
    seed: u64,
    planted: Planted,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let epoch = self.epoch();
        f.debug_struct("Control")
            .field("me", &self.me)
            .field("epoch", &epoch)
            .field("alive", &self.alive)
            .finish_non_exhaustive()
    }
}

/// A number for a life that no other life has: see [`register::Ballot::life`].
fn life(about: &Candidate, seed: u64) -> u64 {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&about.id.0.to_le_bytes());
    bytes[16..24].copy_from_slice(&about.boot.to_le_bytes());
    bytes[24..].copy_from_slice(&seed.to_le_bytes());
    xxh3_64(&bytes)
}

/// The number of a life that follows another one within a process. It is on no disk, so the next process may count from a life
/// before it, and must not come to the same one: it would be taken for this life, whose data it does not have.
fn following(boot: u64, seed: u64) -> u64 {
    boot.saturating_add(2 + (seed & 0xf_ffff))
}

impl Control {
    /// The control plane of one life. `seed` feeds its pauses and phases, and is another one for each process.
    pub fn new(mut settings: Settings, mut remembered: Remembered, seed: u64) -> Control {
        let known = remembered.known();
        let votes_alone = |map: &&Map| {
            let seat = map.members.iter().rev().find(|m| m.about.id == settings.about.id).map(|m| m.seat);
            map.next_voters.is_empty() && seat.is_some_and(|seat| map.voters == [seat])
        };
        if remembered.map.is_none() {
            // What the only voter has accepted is chosen, or will be: the voters before it share this one as a group of its own, so
            // nothing else can be.
            remembered.map = known.as_ref().filter(votes_alone).cloned();
        }
        if let (None, Some(voted)) = (&remembered.map, &known)
            && voted.epoch > 1
        {
            // It stopped before its first map was on disk. Those in the map that it voted for know what was chosen.
            let seeds = match &settings.start {
                Start::Join(seeds) => seeds.as_slice(),
                Start::Found { .. } => &[],
            };
            let others = voted.present().map(|m| m.about.peer).filter(|peer| !seeds.contains(peer));
            settings.start = Start::Join(seeds.iter().copied().chain(others).collect());
        }
        if let Some(last) = known.as_ref().and_then(|map| map.life_of(settings.about.id)) {
            // The clock may have been ahead when the last life began. Who has a directory has such a number there already.
            settings.about.boot = settings.about.boot.max(last.about.boot + 1);
        }
        let cluster = match (&known, &settings.start) {
            (Some(map), _) => map.cluster,
            (None, Start::Found { cluster, .. }) => *cluster,
            (None, Start::Join(_)) => 0,
        };
        let hint = remembered.voter.accepted.as_ref().map(|(_, value)| value.as_slice());
        let mut proposer = Proposer::new(Maps, NodeNo(0), life(&settings.about, seed), seed, hint);
        if let Some(map) = &remembered.map {
            // It was adopted, so it was chosen.
            proposer.learn(&map.encode());
        }
        Control {
            planner: Planner::new(settings.planner),
            cluster,
            me: NodeNo(0),
            map: remembered.map.map(Arc::new),
            membership: None,
            swim: membership::Output::default(),
            acceptor: Acceptor::new(remembered.voter),
            proposer,
            proposing: None,
            waiting: VecDeque::new(),
            statuses: BTreeMap::new(),
            adopted: 0,
            filled: BTreeSet::new(),
            alive: BTreeSet::new(),
            isolated: true,
            at_risk: 0,
            away_since: BTreeMap::new(),
            map_sent: BTreeMap::new(),
            next_seed: 0,
            join_at: Some(0),
            asked: 0,
            taken: None,
            status_at: Millis::MAX,
            clocks: Clocks::default(),
            clocks_at: Millis::MAX,
            plan_at: Millis::MAX,
            refused: false,
            led: false,
            must_read: false,
            read_at: 0,
            voters_at: 0,
            seed,
            planted: Planted::default(),
            settings,
        }
    }

    /// Breaks one rule on purpose.
    #[cfg(any(test, feature = "planted"))]
    pub fn plant(&mut self, planted: Planted) {
        self.planted = planted;
        self.proposer.planted = planted;
    }

    /// The map that this node knows, adopted by all cores or not yet.
    pub fn map(&self) -> Option<&Arc<Map>> {
        self.map.as_ref()
    }

    /// The number of this life; 0 before it is admitted.
    pub fn me(&self) -> NodeNo {
        self.me
    }

    /// What this node says of itself.
    pub fn about(&self) -> &Candidate {
        &self.settings.about
    }

    /// The other nodes as the membership sees them.
    pub fn members(&self) -> impl Iterator<Item = &membership::MemberView> {
        self.membership.iter().flat_map(Membership::members)
    }

    /// The membership, once there is one.
    pub fn membership(&self) -> Option<&Membership> {
        self.membership.as_ref()
    }

    /// Lives that can be reached.
    pub fn alive(&self) -> &BTreeSet<NodeNo> {
        &self.alive
    }

    /// Who plans, as far as this node can see.
    pub fn leader(&self) -> Option<NodeNo> {
        let map = self.map.as_ref()?;
        let seats: BTreeSet<NodeNo> = map.voters.iter().copied().collect();
        seats.into_iter().filter_map(|seat| map.seated(seat)).map(|m| m.no).find(|no| self.alive.contains(no))
    }

    fn epoch(&self) -> u64 {
        self.map.as_ref().map_or(0, |map| map.epoch)
    }

    /// The seat of this node, if it ever was admitted.
    fn seat(&self) -> Option<NodeNo> {
        let map = self.map.as_ref()?;
        map.members.iter().rev().find(|m| m.about.id == self.settings.about.id).map(|m| m.seat)
    }

    fn sender(&self) -> Sender {
        let about = &self.settings.about;
        Sender {
            cluster: self.cluster,
            shards: self.settings.shards,
            id: about.id,
            boot: about.boot,
            no: self.me,
            peer: about.peer,
            epoch: self.epoch(),
        }
    }

    fn envelope(&self, body: Body) -> Vec<u8> {
        Envelope { sender: self.sender(), body }.encode()
    }

    fn send(&self, to: SocketAddr, body: Body, out: &mut Output) {
        out.messages.push((to, self.envelope(body)));
    }

    /// A datagram came.
    pub fn on_datagram(&mut self, now: Now, from: SocketAddr, bytes: &[u8], out: &mut Output) {
        if let Some(membership) = &mut self.membership {
            membership.on_datagram(now, from, bytes, &mut self.swim);
            self.after_gossip(now, out);
        }
    }

    /// A control message came, from another node or from this one. Those of other clusters are answered with a refusal or
    /// dropped.
    pub fn on_message(&mut self, now: Now, bytes: &[u8], out: &mut Output) {
        let Ok(Envelope { sender, body }) = Envelope::decode(bytes) else { return };
        if let Err(text) = self.fits(&sender) {
            // A stranger is told why; somebody who refuses us is believed below.
            if matches!(body, Body::Join { .. }) {
                self.send(sender.peer, Body::Refused { boot: sender.boot, why: text }, out);
                return;
            }
            if !matches!(body, Body::Refused { .. }) {
                return;
            }
        }
        let answers = matches!(body, Body::JoinAgain { .. } | Body::Refused { .. } | Body::Taken { .. });
        if self.cluster == 0 && !answers {
            // Its cluster is that of the node that answers it, not that of whoever still knows its address.
            return;
        }
        match body {
            Body::Register { to, from, message } => {
                // Who is no member proposes its own admission.
                if sender.no == NodeNo(0)
                    && matches!(message, RegisterMessage::Prepare { .. } | RegisterMessage::Accept { .. })
                    && let Some(at) = self.twin(sender.id, sender.peer)
                {
                    return self.send(sender.peer, Body::Taken { boot: sender.boot, at }, out);
                }
                self.on_register(now, (to, from), sender.peer, message, out);
            }
            Body::Gossip(bytes) => {
                if let Some(membership) = &mut self.membership {
                    membership.on_control(now, &bytes, &mut self.swim);
                    self.after_gossip(now, out);
                }
            }
            Body::Join { candidate, ticket } => self.on_join(now, candidate, ticket, out),
            Body::JoinAgain { boot, ticket } => {
                if boot == self.settings.about.boot && self.me == NodeNo(0) && !self.refused {
                    self.cluster = sender.cluster;
                    let candidate = self.settings.about.clone();
                    self.send(sender.peer, Body::Join { candidate, ticket: Some(ticket) }, out);
                }
            }
            Body::Refused { boot, why } => {
                if boot == self.settings.about.boot && self.me == NodeNo(0) && !self.refused {
                    self.refused = true;
                    out.events.push(Event::Refused(why));
                }
                return;
            }
            Body::Taken { boot, at } => {
                if boot == self.settings.about.boot {
                    self.on_taken(now, at, out);
                }
                return;
            }
            Body::MapWanted => self.send_map(now, sender.peer, out),
            Body::Map(bytes) => {
                if let Ok(map) = Map::decode(&bytes)
                    && (self.cluster == 0 || map.cluster == self.cluster)
                {
                    self.learn(now, map, out);
                }
            }
            Body::Status { adopted, filled, quarantined } => {
                self.on_status(now, sender.no, Status { adopted, filled, quarantined });
            }
            Body::ClockAsked { sent } => self.send(sender.peer, Body::ClockTold { sent, wall: now.wall }, out),
            Body::ClockTold { sent, wall } if self.alive.contains(&sender.no) && sender.no != self.me => {
                self.clocks.on_answer(now, sender.no, sent, wall);
                self.look_at_clocks(now, out);
            }
            Body::ClockTold { .. } => {}
        }
        // Whoever is behind is helped along.
        if sender.epoch > self.epoch() {
            self.send(sender.peer, Body::MapWanted, out);
        } else if sender.epoch < self.epoch() && sender.no != NodeNo(0) && sender.id != self.settings.about.id {
            self.send_map(now, sender.peer, out);
        }
    }

    /// Whether a sender may be of our cluster.
    fn fits(&self, sender: &Sender) -> Result<(), String> {
        if sender.cluster != 0 && self.cluster != 0 && sender.cluster != self.cluster {
            return Err(format!(
                "this node belongs to cluster {:016x}, not {:016x}: remove the directory of one of them, or correct the seeds",
                self.cluster, sender.cluster
            ));
        }
        if sender.shards != self.settings.shards {
            return Err(format!(
                "the cluster has {} shards and the node {}: start it with --shards {0}",
                self.settings.shards, sender.shards
            ));
        }
        Ok(())
    }

    fn send_map(&mut self, now: Now, to: SocketAddr, out: &mut Output) {
        let Some(map) = &self.map else { return };
        let lately = self.map_sent.get(&to).is_some_and(|&at| at + SEND_MAP_MS > now.mono);
        if !lately {
            let body = Body::Map(map.encode());
            self.map_sent.retain(|_, at| *at + SEND_MAP_MS > now.mono);
            self.map_sent.insert(to, now.mono);
            self.send(to, body, out);
        }
    }

    fn on_register(
        &mut self,
        now: Now,
        (to, from): (NodeNo, NodeNo),
        peer: SocketAddr,
        message: RegisterMessage,
        out: &mut Output,
    ) {
        match &message {
            RegisterMessage::Prepare { .. } | RegisterMessage::Accept { .. } => {
                // A founder has no map yet when it asks itself. Any other node without a seat has no vote either: a machine
                // that was replaced is asked under the name of the one before it, whose promises it does not know.
                let founds = self.map.is_none() && matches!(self.settings.start, Start::Found { .. });
                if self.seat() != Some(to) && !(founds && peer == self.settings.about.peer) {
                    return;
                }
                if let Some(answer) = self.acceptor.on_message(message) {
                    let voter = answer.persist.then(|| self.acceptor.encode_state());
                    let body = Body::Register { to: from, from: to, message: answer.reply };
                    out.disk.push_back(Disk { voter, then: Some((peer, self.envelope(body))) });
                }
            }
            _ => {
                let mut wants = Vec::new();
                self.proposer.on_message(now, from, message, &mut wants);
                self.follow(now, wants, out);
            }
        }
    }

    /// Does what the proposer wants.
    fn follow(&mut self, now: Now, wants: Vec<register::Output<Refusal>>, out: &mut Output) {
        for want in wants {
            match want {
                register::Output::Send { to, message } => {
                    let at = match &self.map {
                        Some(map) => map.members.iter().rev().find(|m| m.seat == to).map(|m| m.about.peer),
                        None => Some(self.settings.about.peer),
                    };
                    if let Some(at) = at {
                        let from = self.seat().unwrap_or(NodeNo(0));
                        self.send(at, Body::Register { to, from, message }, out);
                    }
                }
                register::Output::Learned(value) => {
                    if let Ok(map) = Map::decode(&value) {
                        let fresh = map.epoch > self.epoch();
                        self.learn(now, map, out);
                        if fresh {
                            self.spread(out);
                        }
                    }
                }
                register::Output::Done(outcome) => self.proposed(now, outcome, out),
            }
        }
    }

    /// Sends the map to every member.
    fn spread(&self, out: &mut Output) {
        let Some(map) = &self.map else { return };
        let bytes = self.envelope(Body::Map(map.encode()));
        for member in map.present().filter(|m| m.about.id != self.settings.about.id) {
            out.messages.push((member.about.peer, bytes.clone()));
        }
    }

    fn proposed(&mut self, now: Now, outcome: register::Outcome<Refusal>, out: &mut Output) {
        use register::Outcome;
        let waits = self.proposing.take().unwrap_or(Waits::Nobody);
        let failed_to_read = waits == Waits::Reading && outcome == Outcome::Unavailable;
        self.must_read |= outcome == Outcome::Unknown || failed_to_read;
        let refused = match &outcome {
            Outcome::Chosen(_) | Outcome::Exists(_) => None,
            Outcome::Refused(refusal) => Some(refusal.to_string()),
            Outcome::Illegal => Some("the change makes no valid map".into()),
            Outcome::Unavailable => Some("too few voters answer; nothing was changed".into()),
            Outcome::Unknown => Some("too few voters answer; the change may still come".into()),
        };
        match waits {
            Waits::Joiner(peer, id, boot) => match &outcome {
                // It will ask again.
                Outcome::Unavailable | Outcome::Unknown => {}
                // It is in the map already, or a former life is.
                Outcome::Refused(Refusal::Duplicate { boot: known_boot, .. }) => {
                    let known = self.map.as_ref().and_then(|map| map.life_of(id)).is_some_and(|m| m.about.peer == peer);
                    match known {
                        true => self.send_map(now, peer, out),
                        false => {
                            let why = Refusal::Duplicate { id, boot: *known_boot }.to_string();
                            self.send(peer, Body::Refused { boot, why }, out);
                        }
                    }
                }
                _ => match refused {
                    None => self.send_map(now, peer, out),
                    Some(why) => self.send(peer, Body::Refused { boot, why }, out),
                },
            },
            Waits::Operator(token) => out.proposed.push((token, refused.map_or(Ok(()), Err))),
            Waits::Voters if matches!(outcome, Outcome::Unavailable | Outcome::Unknown) => {
                // Somebody who would vote is there and is silent, as one whose disk has failed. The rest goes on.
                self.voters_at = now.mono + VOTERS_MS;
            }
            Waits::Reading | Waits::Voters | Waits::Nobody => {}
        }
        self.plan_at = self.plan_at.min(now.mono + PLAN_SOON_MS);
        self.next_proposal(now, out);
    }

    /// Looks for a map that was chosen and that nobody heard of, since whoever proposed it died or heard too little.
    fn read(&mut self, now: Now, out: &mut Output) {
        self.proposing = Some(Waits::Reading);
        let mut wants = Vec::new();
        if self.proposer.read(now, PROPOSE_MS, &mut wants).is_ok() {
            self.follow(now, wants, out);
        }
    }

    /// Proposes what waits, when the proposer is free.
    fn next_proposal(&mut self, now: Now, out: &mut Output) {
        while !self.proposer.is_busy() {
            let Some(Waiting { change, waits, until }) = self.waiting.pop_front() else { return };
            self.proposing = Some(waits);
            if until < now.mono {
                return self.proposed(now, register::Outcome::Unavailable, out);
            }
            let mut wants = Vec::new();
            if self.proposer.propose(now, change, PROPOSE_MS, &mut wants).is_ok() {
                self.follow(now, wants, out);
            }
        }
    }

    fn ask(&mut self, now: Now, change: Change, waits: Waits, out: &mut Output) {
        let known = self.waiting.iter().any(|known| known.waits == waits) || self.proposing.as_ref() == Some(&waits);
        if known && waits != Waits::Nobody {
            return;
        }
        if self.waiting.len() >= MAX_WAITING {
            if let Waits::Operator(token) = waits {
                out.proposed.push((token, Err("too many changes of the map are waiting; try again later".into())));
            }
            return;
        }
        self.waiting.push_back(Waiting { change, waits, until: now.mono + WAIT_MS });
        self.next_proposal(now, out);
    }

    /// Asks for a change of the map in an operator's name. The end comes in [`Output::proposed`].
    pub fn propose(&mut self, now: Now, token: u64, change: Change, out: &mut Output) {
        self.ask(now, change, Waits::Operator(token), out);
    }

    fn on_join(&mut self, now: Now, candidate: Candidate, ticket: Option<Ticket>, out: &mut Output) {
        let Some(map) = self.map.as_ref().filter(|_| self.me != NodeNo(0)) else { return };
        let admitted =
            map.life_of(candidate.id).is_some_and(|m| m.about.boot == candidate.boot && m.about == candidate);
        if admitted {
            return self.send_map(now, candidate.peer, out);
        }
        // A former life that is still there elsewhere is none: two processes have one id. One at the same address is gone,
        // or the newcomer could not listen there.
        if let Some(twin) = self.twin(candidate.id, candidate.peer) {
            return self.send(candidate.peer, Body::Taken { boot: candidate.boot, at: twin }, out);
        }
        let boot = self.settings.about.boot;
        let is_fresh = |at| now.mono.checked_sub(at).is_some_and(|age| age <= TICKET_MS);
        if !ticket.is_some_and(|ticket| ticket.boot == boot && is_fresh(ticket.at)) {
            let ticket = Ticket { boot, at: now.mono };
            return self.send(candidate.peer, Body::JoinAgain { boot: candidate.boot, ticket }, out);
        }
        let waits = Waits::Joiner(candidate.peer, candidate.id, candidate.boot);
        self.ask(now, Change::Admit(candidate), waits, out);
    }

    /// Where the node with that id is, if it is there and not at that address.
    fn twin(&self, id: NodeId, at: SocketAddr) -> Option<SocketAddr> {
        let twin = self.map.as_ref()?.life_of(id).filter(|m| self.alive.contains(&m.no) && m.about.peer != at);
        twin.map(|twin| twin.about.peer)
    }

    /// A member says that another process with this node's id is there. It may be a former life that nobody has missed yet.
    fn on_taken(&mut self, now: Now, at: SocketAddr, out: &mut Output) {
        if self.me != NodeNo(0) || self.refused {
            return;
        }
        // Whoever is silent in between may not see that process any more.
        let lately = self.taken.filter(|(_, last)| now.mono <= last + TAKEN_APART_MS);
        let since = lately.map_or(now.mono, |(since, _)| since);
        self.taken = Some((since, now.mono));
        self.asked = 0;
        if now.mono >= since + TAKEN_MS {
            self.refused = true;
            out.events.push(Event::Refused(format!(
                "another process with this node's id runs at {at}: stop it, or give this one a directory of its own (--dir)"
            )));
        }
    }

    /// A chosen map.
    fn learn(&mut self, now: Now, map: Map, out: &mut Output) {
        if map.placements.len() != usize::from(self.settings.shards) {
            if !self.refused {
                self.refused = true;
                let text = format!("the cluster has {} shards: start with --shards {0}", map.placements.len());
                out.events.push(Event::Refused(text));
            }
            return;
        }
        if map.epoch <= self.epoch() && self.me != NodeNo(0) {
            return;
        }
        self.proposer.learn(&map.encode());
        let about = &mut self.settings.about;
        let last = map.life_of(about.id).filter(|last| self.me == NodeNo(0) && last.about.peer == about.peer);
        if let Some(last) = last.filter(|last| last.about.boot > about.boot) {
            // Its former life began when the clock was ahead.
            about.boot = following(last.about.boot, self.seed);
        }
        let about = &self.settings.about;
        let life = map.life_of(about.id).filter(|m| m.about.boot == about.boot).map(|m| m.no);
        let (before, map) = (self.me, Arc::new(map));
        self.cluster = map.cluster;
        let last = self.map.replace(map.clone());
        self.me = life.unwrap_or(NodeNo(0));
        out.events.push(Event::Map(map.epoch));
        if let Some(last) = last.filter(|_| before != NodeNo(0)) {
            let copies = watch::moved(&last, &map);
            if !copies.is_empty() {
                out.events.push(Event::Moved { epoch: map.epoch, copies });
            }
        }
        out.adopt = Some((map.clone(), self.me));
        self.proposer.set_node(self.seat().unwrap_or(NodeNo(0)));
        match (before, self.me) {
            (NodeNo(0), NodeNo(0)) => {}
            (NodeNo(0), me) => {
                out.events.push(Event::Admitted(me));
                (self.join_at, self.refused) = (None, false);
                (self.asked, self.taken) = (0, None);
                self.start_membership(now, out);
            }
            (_, NodeNo(0)) => {
                out.events.push(Event::Expelled);
                self.reborn(now, out);
            }
            _ => {}
        }
        // Lives that are gone have nothing to say any more.
        self.statuses.retain(|no, _| map.member(*no).is_some());
        self.filled.retain(|(shard, epoch)| map.placements[usize::from(*shard)].epoch == *epoch);
        if let Some(membership) = &mut self.membership {
            membership.on_map(now, map.present().map(|m| m.about.id), &mut self.swim);
            self.after_gossip(now, out);
        }
        if self.membership.is_some() {
            self.tell_risk(out);
        }
        self.plan_at = self.plan_at.min(now.mono + PLAN_SOON_MS);
    }

    fn start_membership(&mut self, now: Now, out: &mut Output) {
        let Some(map) = self.map.clone() else { return };
        let identity = |about: &Candidate, no| Identity { no, ..Identity::new(about.id, about.boot, about.peer) };
        let mut settings = self.settings.membership.clone();
        if let Start::Join(seeds) = &self.settings.start {
            settings.seeds.clone_from(seeds);
        }
        let us = identity(&self.settings.about, self.me);
        let mut membership = Membership::new(self.cluster, us, settings, self.seed);
        let others = map.present().filter(|m| m.no != self.me).map(|m| identity(&m.about, m.no));
        membership.join(now, others, &mut self.swim);
        self.membership = Some(membership);
        (self.status_at, self.clocks_at, self.plan_at) = (now.mono, now.mono, now.mono);
        self.after_gossip(now, out);
    }

    /// This life was given up: the node comes back as another one, with nothing.
    fn reborn(&mut self, now: Now, out: &mut Output) {
        self.settings.about.boot = now.wall.max(following(self.settings.about.boot, self.seed));
        self.membership = None;
        self.adopted = 0;
        self.filled.clear();
        self.statuses.clear();
        self.alive.clear();
        self.away_since.clear();
        out.alive = Some((BTreeSet::new(), true));
        self.isolated = true;
        (self.join_at, self.status_at, self.plan_at) = (Some(now.mono), Millis::MAX, Millis::MAX);
        self.clocks_at = Millis::MAX;
    }

    /// Passes on what the membership wants, and tells the cores who is alive.
    fn after_gossip(&mut self, now: Now, out: &mut Output) {
        out.datagrams.extend(self.swim.datagrams());
        let control: Vec<_> = self.swim.control().collect();
        for (to, bytes) in control {
            self.send(to, Body::Gossip(bytes), out);
        }
        let events: Vec<_> = self.swim.events().collect();
        for event in events {
            use membership::Event as Seen;
            match event {
                Seen::Up { id, .. } => out.events.push(Event::Up(id)),
                Seen::Down { id, .. } => out.events.push(Event::Down(id)),
                Seen::Left { id, .. } => out.events.push(Event::Left(id)),
                Seen::Renamed { .. } => {}
                Seen::Isolated(isolated) => out.events.push(Event::Isolated(isolated)),
                Seen::DuplicateId { boot } if boot > self.settings.about.boot => {
                    out.events.push(Event::Duplicate { boot });
                }
                Seen::DuplicateId { .. } => {}
                Seen::Expelled => {
                    out.events.push(Event::Expelled);
                    self.me = NodeNo(0);
                    if let Some(map) = &self.map {
                        out.adopt = Some((map.clone(), NodeNo(0)));
                    }
                    return self.reborn(now, out);
                }
            }
        }
        let (Some(map), Some(membership)) = (&self.map, &self.membership) else { return };
        let is_alive = |m: &&crate::map::Member| m.no == self.me || membership.is_alive(m.about.id, m.about.boot);
        let alive: BTreeSet<NodeNo> = map.present().filter(is_alive).map(|m| m.no).collect();
        let away: Vec<NodeNo> = map.present().map(|m| m.no).filter(|no| !alive.contains(no)).collect();
        self.away_since.retain(|no, _| away.contains(no));
        for no in away {
            self.away_since.entry(no).or_insert(now.mono);
        }
        let changed = alive != self.alive;
        // Who is gone may have left a change half made.
        self.must_read |= self.led && changed;
        self.alive = alive;
        let isolated = self.is_isolated();
        if changed || isolated != self.isolated {
            self.isolated = isolated;
            out.alive = Some((self.alive.clone(), isolated));
            self.plan_at = self.plan_at.min(now.mono + PLAN_SOON_MS);
            self.status_at = self.status_at.min(now.mono + STATUS_SOON_MS);
        }
        if changed {
            self.tell_risk(out);
        }
    }

    /// Tells when more shards are at risk than before, and when none is any more.
    fn tell_risk(&mut self, out: &mut Output) {
        let Some(map) = &self.map else { return };
        let at_risk = watch::at_risk(map, &self.alive);
        if at_risk > self.at_risk || at_risk == 0 && self.at_risk > 0 {
            out.events.push(Event::AtRisk(at_risk));
        }
        self.at_risk = at_risk;
    }

    /// The seeds have these addresses now.
    pub fn set_seeds(&mut self, now: Now, addresses: Vec<SocketAddr>) {
        if let Start::Join(seeds) = &mut self.settings.start {
            *seeds = addresses;
            self.join_at = self.join_at.map(|at| at.min(now.mono));
        }
    }

    /// All cores have adopted the map of that epoch.
    pub fn on_adopted(&mut self, now: Now, epoch: u64) {
        self.adopted = self.adopted.max(epoch);
        self.status_at = self.status_at.min(now.mono + STATUS_SOON_MS);
    }

    /// A core holds everything of a shard that it needs at that shard epoch.
    pub fn on_filled(&mut self, now: Now, shard: u16, epoch: u64) {
        let fits =
            self.map.as_ref().and_then(|map| map.placements.get(usize::from(shard))).is_some_and(|p| p.epoch == epoch);
        if fits && self.me != NodeNo(0) {
            self.filled.insert((shard, epoch));
            self.status_at = self.status_at.min(now.mono + STATUS_SOON_MS);
        }
    }

    /// A core met a peer with a newer map: somebody alive has it.
    pub fn on_wanted(&mut self, epoch: u64, out: &mut Output) {
        let Some(map) = self.map.clone().filter(|_| epoch > self.epoch()) else { return };
        for member in map.present().filter(|m| m.no != self.me && self.alive.contains(&m.no)).take(ASKED_FOR_MAP) {
            self.send(member.about.peer, Body::MapWanted, out);
        }
    }

    fn on_status(&mut self, now: Now, from: NodeNo, status: Status) {
        let known = self.map.as_ref().and_then(|map| map.member(from)).is_some();
        if known {
            self.statuses.insert(from, status);
            self.plan_at = self.plan_at.min(now.mono + PLAN_SOON_MS);
        }
    }

    /// When to call [`Control::on_deadline`].
    pub fn next_deadline(&self) -> Option<Millis> {
        let own = [self.join_at, Some(self.status_at), Some(self.clocks_at), Some(self.plan_at)];
        let machines = [self.proposer.next_deadline(), self.membership.as_ref().and_then(Membership::next_deadline)];
        own.into_iter().chain(machines).flatten().filter(|&at| at != Millis::MAX).min()
    }

    /// Time has passed.
    pub fn on_deadline(&mut self, now: Now, out: &mut Output) {
        if self.proposer.next_deadline().is_some_and(|at| at <= now.mono) {
            let mut wants = Vec::new();
            self.proposer.on_deadline(now, &mut wants);
            self.follow(now, wants, out);
        }
        if let Some(membership) = &mut self.membership
            && membership.next_deadline().is_some_and(|at| at <= now.mono)
        {
            membership.on_deadline(now, &mut self.swim);
            self.after_gossip(now, out);
        }
        if self.join_at.is_some_and(|at| at <= now.mono) {
            self.join_at = Some(now.mono + JOIN_MS);
            self.join(now, out);
        }
        if self.status_at <= now.mono {
            self.status_at = now.mono + STATUS_MS;
            self.tell_status(now, out);
        }
        if self.clocks_at <= now.mono {
            self.clocks_at = now.mono + clocks::ASK_MS;
            self.ask_clocks(now, out);
        }
        if self.plan_at <= now.mono {
            if now.mono >= self.plan_at + STILL_MS {
                // This process stood still, and was not there to see whether the others were.
                self.away_since.values_mut().for_each(|since| *since = now.mono);
            }
            self.plan_at = now.mono + PLAN_MS;
            self.plan(now, out);
        }
        self.next_proposal(now, out);
    }

    /// One more attempt to be admitted.
    fn join(&mut self, now: Now, out: &mut Output) {
        if self.refused {
            return;
        }
        let about = self.settings.about.clone();
        if let (None, Start::Found { cluster, seed, shards, quorums }) = (&self.map, &self.settings.start) {
            if !self.proposer.is_busy() {
                let first = Map::create(*cluster, *seed, *shards, *quorums, about).encode();
                let mut wants = Vec::new();
                if self.proposer.create(now, first, PROPOSE_MS, &mut wants).is_ok() {
                    self.follow(now, wants, out);
                }
            }
            return;
        }
        self.asked += 1;
        if self.map.is_some() && !self.proposer.is_busy() && self.asked > JOIN_ALONE {
            // It knows voters from its former life, or from the life that was given up.
            self.ask(now, Change::Admit(about.clone()), Waits::Nobody, out);
        }
        let mut seeds = match &self.settings.start {
            Start::Join(seeds) => seeds.clone(),
            Start::Found { .. } => Vec::new(),
        };
        let known = self.map.iter().flat_map(|map| map.present()).map(|m| m.about.peer);
        for peer in known {
            if !seeds.contains(&peer) {
                seeds.push(peer);
            }
        }
        seeds.retain(|&seed| seed != about.peer);
        for _ in 0..seeds.len().min(JOIN_AT_ONCE) {
            self.next_seed = (self.next_seed + 1) % seeds.len();
            self.send(seeds[self.next_seed], Body::Join { candidate: about.clone(), ticket: None }, out);
        }
    }

    fn tell_status(&mut self, now: Now, out: &mut Output) {
        if self.me == NodeNo(0) {
            return;
        }
        let filled = self.filled.iter().copied().take(message::MAX_FILLED).collect();
        let status = Status { adopted: self.adopted, filled, quarantined: self.clocks.is_quarantined() };
        match self.leader() {
            Some(leader) if leader == self.me => self.on_status(now, leader, status),
            Some(leader) => {
                let peer = self.map.as_ref().and_then(|map| map.member(leader)).map(|m| m.about.peer);
                if let Some(peer) = peer {
                    let Status { adopted, filled, quarantined } = status;
                    self.send(peer, Body::Status { adopted, filled, quarantined }, out);
                }
            }
            None => {}
        }
    }

    /// Asks the others what their clocks say, and looks at what is known.
    fn ask_clocks(&mut self, now: Now, out: &mut Output) {
        let Some(map) = self.map.clone().filter(|_| self.me != NodeNo(0)) else { return };
        for member in map.present().filter(|m| m.no != self.me && self.alive.contains(&m.no)) {
            self.send(member.about.peer, Body::ClockAsked { sent: now.mono }, out);
        }
        self.look_at_clocks(now, out);
        if self.clocks.is_right() {
            // It may have been wrong for a moment that no look has seen.
            out.quarantined = out.quarantined.or(Some((false, 0)));
        }
    }

    fn look_at_clocks(&mut self, now: Now, out: &mut Output) {
        let Some(map) = &self.map else { return };
        let found = self.clocks.look(now, &self.alive, map.present().count());
        out.quarantined = found.say.or(out.quarantined);
        if let Some((quarantined, ahead_ms)) = found.turned {
            out.events.push(Event::Quarantined { quarantined, ahead_ms });
            self.status_at = self.status_at.min(now.mono + STATUS_SOON_MS);
        }
        for (no, ahead_ms) in found.apart {
            if let Some(member) = map.member(no) {
                out.events.push(Event::ClocksApart { node: member.about.id, ahead_ms });
            }
        }
    }

    /// Whether this node's clock is wrong, and by how many milliseconds it differs from the one of the others that differs most.
    pub fn clock(&self) -> (bool, Millis) {
        (self.clocks.is_quarantined(), self.clocks.offset())
    }

    /// Looks for the next change, if this node leads.
    fn plan(&mut self, now: Now, out: &mut Output) {
        let Some(map) = self.map.clone() else { return };
        let leads = self.me != NodeNo(0) && self.leader() == Some(self.me);
        self.must_read |= leads && !self.led;
        self.led = leads;
        if self.must_read && self.me != NodeNo(0) && !self.proposer.is_busy() && self.read_at <= now.mono {
            (self.must_read, self.read_at) = (false, now.mono + READ_MS);
            return self.read(now, out);
        }
        if !leads || self.proposer.is_busy() {
            return;
        }
        let filled = self
            .statuses
            .iter()
            .flat_map(|(&no, status)| status.filled.iter().map(move |&(shard, epoch)| (shard, epoch, no)));
        let adopted = match self.planted.has(Bug::HastyMove) {
            true => map.members.iter().map(|m| (m.no, u64::MAX)).collect(),
            false => self.statuses.iter().map(|(&no, status)| (no, status.adopted)).collect(),
        };
        let view = planner::View {
            alive: self.alive.clone(),
            adopted,
            filled: filled.collect(),
            down_since: self.away_since.clone(),
            quarantined: self.statuses.iter().filter(|(_, s)| s.quarantined).map(|(&no, _)| no).collect(),
            isolated: self.is_isolated(),
            voters_silent: self.voters_at > now.mono,
        };
        let change = self.planner.plan(now.mono, &map, &view);
        if let Some(at) = self.planner.next_deadline() {
            self.plan_at = self.plan_at.min(at.max(now.mono + PLAN_SOON_MS));
        }
        if let Some(change) = change {
            let voters = matches!(change, Change::Voters(_) | Change::VotersDone);
            self.ask(now, change, if voters { Waits::Voters } else { Waits::Nobody }, out);
        }
    }

    /// Whether this node has to think that it is the one cut off: it lost most of the map at once, or sees no majority of
    /// the voters.
    pub fn is_isolated(&self) -> bool {
        let Some(map) = &self.map else { return true };
        let seen = |group: &[NodeNo]| {
            let alive =
                group.iter().filter(|&&seat| map.seated(seat).is_some_and(|m| self.alive.contains(&m.no))).count();
            group.is_empty() || alive > group.len() / 2
        };
        self.membership.as_ref().is_none_or(Membership::is_isolated) || !seen(&map.voters) || !seen(&map.next_voters)
    }

    /// Tells the others that this node leaves.
    pub fn leave(&mut self, now: Now, out: &mut Output) {
        if let Some(membership) = &mut self.membership {
            membership.leave(now, &mut self.swim);
        }
        out.datagrams.extend(self.swim.datagrams());
        let control: Vec<_> = self.swim.control().collect();
        for (to, bytes) in control {
            self.send(to, Body::Gossip(bytes), out);
        }
    }

    /// Whether everything is within its bounds.
    pub fn invariants(&self) {
        assert!(self.waiting.len() <= MAX_WAITING, "proposals that wait are bounded");
        assert!(self.me == NodeNo(0) || self.map.as_ref().is_some_and(|map| map.member(self.me).is_some()));
        self.acceptor.invariants();
    }
}
