//! The map: which nodes there are, and which of them hold each shard.
//!
//! A value, numbered by its epoch. The register makes sure that all nodes agree on one map per epoch;
//! this file says what a map is and how one follows from another. Nothing here decides *when* to change it: that is
//! the planner.
//!
//! ```text
//!              Begin{joining, leaving}          ReadNew                 Finish
//!   Normal ──────────────────────▶ WriteBoth ─────────────▶ ReadNew ─────────────▶ Normal (the new set)
//!     ▲  ▲                            │ ▲                      │
//!     │  └────────── Abort ───────────┘ └──── joiner lost ─────┘
//!     └── Replace{old, new}: the slot of a life that is over gets a filling replica; Filled{node} makes it count
//! ```
//!
//! **Lives.** A node that restarts has lost its memory, so for the map it is another replica: it gets a new number. What it
//! held as its former self is a slot with a filling replica. The study behind this, of quorums that forget:
//! Michael, Ports, Sharma, Szekeres, "Recovering Shared Objects Without Stable Storage", DISC 2017; epochs do here
//! what their crash vectors do.
//!
//! Invariants, checked by [`Map::check`]: numbers grow and are never given twice; every placement names members only;
//! no node twice in a set; at most one move per shard; a placement's epoch is never beyond the map's; each change adds one to
//! the epoch.
//!
//! Not here: how many answers are needed ([`crate::quorum`]), where shards should be (the planner).

// rkyv's derive copies the fields of enum variants without their docs.
#![allow(missing_docs)]

use std::collections::BTreeSet;
use std::net::SocketAddr;

use gridkv_engine::hash::ShardId;
use rkyv::rancor::Error as Failure;
use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::{NodeId, NodeNo};
use crate::quorum::Quorums;

/// Nodes that a cluster has at most.
pub const MAX_MEMBERS: usize = 1024;
/// Copies of a shard, at most.
pub const MAX_COPIES: usize = 7;
/// Bytes of a zone's name, at most.
pub const MAX_ZONE: usize = 64;
/// The weight of a node that was given none.
pub const NORMAL_WEIGHT: u16 = 100;

/// What a node says of itself when it wants to be admitted.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Candidate {
    /// Who it is, over all its lives.
    pub id: NodeId,
    /// Which life this is: greater than that of every life before.
    pub boot: u64,
    /// Where its peers reach it: TCP links and gossip.
    pub peer: SocketAddr,
    /// Where its clients reach it.
    pub client: SocketAddr,
    /// Number of its cores; they divide the shards in contiguous ranges.
    pub cores: u16,
    /// Copies of a shard are spread over zones.
    pub zone: String,
    /// Its share of the shards, relative to the others'; 100 is normal.
    pub weight: u16,
}

/// What is to become of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Standing {
    /// It takes part.
    Up,
    /// Its shards are being moved away; it may be removed when it has none.
    Draining,
    /// This life is over: its memory is gone, or the cluster has decided to go on without it. It stays listed until nothing
    /// names it.
    Lost,
}

/// One life of a node.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Member {
    /// The number of this life.
    pub no: NodeNo,
    /// The number of this node's first life: its name as a voter, whose promises outlive a restart.
    pub seat: NodeNo,
    /// What it said of itself.
    pub about: Candidate,
    /// What is to become of it.
    pub standing: Standing,
}

/// A copy of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Replica {
    /// The life that holds it.
    pub node: NodeNo,
    /// It does not hold everything yet: it is written to, but never counted and never read.
    pub filling: bool,
}

/// How far a move has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Stage {
    /// No move.
    Normal,
    /// Written in the old and the new set, read in the old one; the joining replica is being filled.
    WriteBoth,
    /// Written in both sets, read in the new one.
    ReadNew,
}

/// Who holds a shard.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Placement {
    /// The map epoch of its last change: the *shard epoch* that every request names.
    pub epoch: u64,
    /// The old set, or the only one. The first of them orders conditional commands.
    pub replicas: Vec<Replica>,
    /// How far a move has come.
    pub stage: Stage,
    /// Who joins the set in this move.
    pub joining: Option<NodeNo>,
    /// Who leaves the set in this move.
    pub leaving: Option<NodeNo>,
    /// How often data of this shard was given up for lost.
    pub losses: u32,
}

impl Placement {
    /// The set that is read.
    pub fn read_set(&self) -> Vec<Replica> {
        if self.stage == Stage::ReadNew { self.new_set() } else { self.replicas.clone() }
    }

    /// The set after the move: the old one without who leaves, with who joins.
    pub fn new_set(&self) -> Vec<Replica> {
        let mut set = self.replicas.clone();
        match (self.leaving.and_then(|node| set.iter().position(|r| r.node == node)), self.joining) {
            // The joiner takes the leaver's place in the order.
            (Some(at), Some(node)) => set[at] = Replica { node, filling: false },
            (Some(at), None) => drop(set.remove(at)),
            (None, Some(node)) => set.push(Replica { node, filling: false }),
            (None, None) => {}
        }
        set
    }

    /// Whether `node` holds a copy, or is to hold one.
    pub fn names(&self, node: NodeNo) -> bool {
        self.joining == Some(node) || self.replicas.iter().any(|r| r.node == node)
    }

    /// Every node that must be written to, once.
    pub fn written(&self) -> impl Iterator<Item = NodeNo> + '_ {
        self.replicas.iter().map(|r| r.node).chain(self.joining)
    }

    /// Whether `node` still lacks part of the data: it is being filled as a replica or for a move.
    pub fn is_filling(&self, node: NodeNo) -> bool {
        self.stage == Stage::WriteBoth && self.joining == Some(node)
            || self.replicas.iter().any(|r| r.node == node && r.filling)
    }

    /// Whether reads may be answered by `node`.
    pub fn is_readable(&self, node: NodeNo) -> bool {
        match self.stage {
            Stage::ReadNew => self.new_set().iter().any(|r| r.node == node && !r.filling),
            _ => self.replicas.iter().any(|r| r.node == node && !r.filling),
        }
    }

    /// Who orders conditional commands, if it has everything.
    pub fn orderer(&self) -> Option<NodeNo> {
        let first = match self.stage {
            Stage::ReadNew => self.new_set().first().copied(),
            _ => self.replicas.first().copied(),
        };
        first.filter(|r| !r.filling).map(|r| r.node)
    }
}

/// The whole map.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Map {
    /// Which cluster this is: a random number, made when it was created.
    pub cluster: u64,
    /// Which map: each change adds one.
    pub epoch: u64,
    /// Seed of the key hash.
    pub seed: u64,
    /// How many copies, how many answers.
    pub quorums: Quorums,
    /// By number.
    pub members: Vec<Member>,
    /// Seats that vote on the map.
    pub voters: Vec<NodeNo>,
    /// Seats that vote too while the voters change; empty otherwise.
    pub next_voters: Vec<NodeNo>,
    /// The number of the next life.
    pub next_no: u16,
    /// By shard.
    pub placements: Vec<Placement>,
}

/// A step of one shard.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Step {
    /// Whose.
    pub shard: u16,
    /// The shard epoch it was thought out for; the step is refused at any other.
    pub epoch: u64,
    /// What.
    pub transition: Transition,
}

/// What can become of a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Transition {
    /// The slot of a life that is over, or that is given up, goes to a node that will be filled.
    Replace {
        /// Who held it.
        old: NodeNo,
        /// Who will.
        new: NodeNo,
    },
    /// A filling replica has everything.
    Filled {
        /// Which.
        node: NodeNo,
    },
    /// A move begins. Without `leaving` the set grows, without `joining` it shrinks.
    Begin {
        /// Who comes.
        joining: Option<NodeNo>,
        /// Who goes.
        leaving: Option<NodeNo>,
    },
    /// The joining replica has everything: read the new set.
    ReadNew,
    /// Nobody reads the old set any more: drop it.
    Finish,
    /// Back to the old set.
    Abort,
    /// That replica orders conditional commands from now on.
    First {
        /// Which.
        node: NodeNo,
    },
    /// What no live replica holds is given up: filling replicas count as they are, slots of lives that are over go (but the
    /// last), and a move ends where it is. So it leads out of every stage.
    AcceptLoss,
}

/// What can become of a map.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Change {
    /// Another life of a node begins.
    Admit(Candidate),
    /// A life is over, or the cluster goes on without it.
    Lose(NodeNo),
    /// As [`Change::Lose`], if the map is still the one in view of which that was right: a node that stood still for a while
    /// knows nothing of who came back since.
    GiveUp {
        /// The life.
        life: NodeNo,
        /// The epoch of that map.
        epoch: u64,
    },
    /// A node's shards are to be moved away, or may come back.
    Drain(NodeNo, bool),
    /// These seats are to vote.
    Voters(Vec<NodeNo>),
    /// The change of voters is through.
    VotersDone,
    /// Steps of shards: all of those whose epoch fits are taken.
    Steps(Vec<Step>),
}

/// Why a change does not apply. The map is as before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another life of the same node is as new or newer: two processes use one node id, or an old message came late.
    #[error("node {id} runs already with boot {boot}: stop one of the two, or give each its own directory")]
    Duplicate {
        /// The node.
        id: NodeId,
        /// The life that the map knows.
        boot: u64,
    },
    /// There is no such member.
    #[error("there is no node number {0} in the map")]
    Unknown(NodeNo),
    /// The cluster has as many members as it can.
    #[error("the cluster has {MAX_MEMBERS} members, which is the most")]
    Full,
    /// A bound or a rule of the map is broken by the change.
    #[error("{0}")]
    Invalid(String),
    /// None of it applies any more: somebody else was faster.
    #[error("the map has moved on")]
    Stale,
}

fn invalid(text: impl Into<String>) -> Refusal {
    Refusal::Invalid(text.into())
}

impl Map {
    /// The first map of a new cluster: its creator holds everything alone.
    pub fn create(cluster: u64, seed: u64, shards: u16, quorums: Quorums, creator: Candidate) -> Map {
        let no = NodeNo(1);
        let placement = Placement {
            epoch: 1,
            replicas: vec![Replica { node: no, filling: false }],
            stage: Stage::Normal,
            joining: None,
            leaving: None,
            losses: 0,
        };
        Map {
            cluster,
            epoch: 1,
            seed,
            quorums,
            members: vec![Member { no, seat: no, about: creator, standing: Standing::Up }],
            voters: vec![no],
            next_voters: Vec::new(),
            next_no: 2,
            placements: vec![placement; usize::from(shards)],
        }
    }

    /// The life of that number.
    pub fn member(&self, no: NodeNo) -> Option<&Member> {
        self.members.binary_search_by_key(&no, |m| m.no).ok().map(|at| &self.members[at])
    }

    /// The present life of a node.
    pub fn life_of(&self, id: NodeId) -> Option<&Member> {
        self.members.iter().rev().find(|m| m.about.id == id && m.standing != Standing::Lost)
    }

    /// The present life of the node that has that seat.
    pub fn seated(&self, seat: NodeNo) -> Option<&Member> {
        self.members.iter().rev().find(|m| m.seat == seat && m.standing != Standing::Lost)
    }

    /// Who holds a shard.
    pub fn placement(&self, shard: ShardId) -> &Placement {
        &self.placements[shard.index()]
    }

    /// Members that take part: up or draining.
    pub fn present(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|m| m.standing != Standing::Lost)
    }

    /// The map after a change.
    ///
    /// # Errors
    /// A [`Refusal`]; nothing else depends on who asks, so every node that applies it gets the same map.
    pub fn apply(&self, change: &Change) -> Result<Map, Refusal> {
        let mut next = self.clone();
        next.epoch += 1;
        match change {
            Change::Admit(candidate) => next.admit(candidate)?,
            Change::GiveUp { epoch, .. } if *epoch != self.epoch => return Err(Refusal::Stale),
            Change::Lose(no) | Change::GiveUp { life: no, .. } => {
                next.known(*no)?;
                next.lose(*no);
            }
            Change::Drain(no, draining) => {
                let member = next.known(*no)?;
                if member.standing == Standing::Lost {
                    return Err(invalid("this life of the node is over"));
                }
                member.standing = if *draining { Standing::Draining } else { Standing::Up };
            }
            Change::Voters(seats) => next.begin_voters(seats)?,
            Change::VotersDone => {
                if next.next_voters.is_empty() {
                    return Err(Refusal::Stale);
                }
                next.voters = std::mem::take(&mut next.next_voters);
            }
            Change::Steps(steps) => next.take_steps(steps)?,
        }
        next.forget_lost();
        debug_assert_eq!(next.check(), Ok(()));
        Ok(next)
    }

    fn known(&mut self, no: NodeNo) -> Result<&mut Member, Refusal> {
        match self.members.binary_search_by_key(&no, |m| m.no) {
            Ok(at) => Ok(&mut self.members[at]),
            Err(_) => Err(Refusal::Unknown(no)),
        }
    }

    fn admit(&mut self, candidate: &Candidate) -> Result<(), Refusal> {
        if candidate.zone.len() > MAX_ZONE || candidate.weight == 0 || candidate.cores == 0 {
            return Err(invalid("a node needs a weight and a core, and a zone of 64 bytes at most"));
        }
        let former = self.members.iter().rev().find(|m| m.about.id == candidate.id).cloned();
        if let Some(former) = &former
            && former.about.boot >= candidate.boot
        {
            return Err(Refusal::Duplicate { id: candidate.id, boot: former.about.boot });
        }
        if self.present().any(|m| m.about.id != candidate.id && m.about.peer == candidate.peer) {
            let gone = self.present().find(|m| m.about.peer == candidate.peer).map(|m| m.no);
            // Two nodes cannot listen on one address: the one that is listed there is over.
            gone.into_iter().for_each(|no| self.lose(no));
        }
        if self.members.len() >= MAX_MEMBERS {
            return Err(Refusal::Full);
        }
        let no = NodeNo(self.next_no);
        self.next_no = self.next_no.checked_add(1).ok_or(Refusal::Full)?;
        let (seat, standing) = match &former {
            Some(former) if former.standing == Standing::Draining => (former.seat, Standing::Draining),
            Some(former) => (former.seat, Standing::Up),
            None => (no, Standing::Up),
        };
        self.members.push(Member { no, seat, about: candidate.clone(), standing });
        if let Some(former) = former {
            self.lose(former.no);
            for shard in 0..self.placements.len() {
                let held = self.placements[shard].replicas.iter().any(|r| r.node == former.no);
                if held && self.placements[shard].stage == Stage::Normal {
                    self.replace(shard, former.no, no);
                }
            }
        }
        Ok(())
    }

    /// Ends a life: moves that lean on it are turned back or cut short. Slots keep naming it until they are replaced.
    fn lose(&mut self, no: NodeNo) {
        let epoch = self.epoch;
        if let Ok(member) = self.known(no) {
            member.standing = Standing::Lost;
        }
        for placement in &mut self.placements {
            if placement.joining == Some(no) && placement.stage == Stage::ReadNew {
                // Somebody may still read the new set, with this life in it if it is only given up: writes go on to both
                // until the planner aborts.
                (placement.stage, placement.epoch) = (Stage::WriteBoth, epoch);
            } else if placement.joining == Some(no) {
                placement.normal(epoch);
            } else if placement.leaving == Some(no) && placement.stage == Stage::WriteBoth {
                // The slot of the leaver goes to the joiner, which is being filled in any case.
                if let Some(joining) = placement.joining
                    && let Some(slot) = placement.replicas.iter_mut().find(|r| r.node == no)
                {
                    *slot = Replica { node: joining, filling: true };
                }
                placement.normal(epoch);
            }
        }
    }

    fn replace(&mut self, shard: usize, old: NodeNo, new: NodeNo) {
        let placement = &mut self.placements[shard];
        if let Some(slot) = placement.replicas.iter_mut().find(|r| r.node == old) {
            *slot = Replica { node: new, filling: true };
            placement.epoch = self.epoch;
        }
    }

    fn begin_voters(&mut self, seats: &[NodeNo]) -> Result<(), Refusal> {
        if !self.next_voters.is_empty() {
            return Err(invalid("the voters are being changed already"));
        }
        let distinct: BTreeSet<_> = seats.iter().collect();
        if distinct.len() != seats.len() || ![1, 3, 5].contains(&seats.len()) {
            return Err(invalid("a cluster has 1, 3 or 5 voters"));
        }
        if let Some(&seat) = seats.iter().find(|&&seat| self.seated(seat).is_none()) {
            return Err(Refusal::Unknown(seat));
        }
        if seats == self.voters {
            return Err(Refusal::Stale);
        }
        self.next_voters = seats.to_vec();
        Ok(())
    }

    fn take_steps(&mut self, steps: &[Step]) -> Result<(), Refusal> {
        let mut taken = 0;
        for step in steps {
            let Some(placement) = self.placements.get(usize::from(step.shard)) else {
                return Err(invalid(format!("there is no shard {}", step.shard)));
            };
            if placement.epoch == step.epoch {
                taken += usize::from(self.take(usize::from(step.shard), step.transition)?);
            }
        }
        if taken == 0 { Err(Refusal::Stale) } else { Ok(()) }
    }

    /// Takes one step; false when it changes nothing.
    fn take(&mut self, shard: usize, transition: Transition) -> Result<bool, Refusal> {
        let epoch = self.epoch;
        let is_present = |map: &Map, no| map.member(no).is_some_and(|m| m.standing != Standing::Lost);
        let placement = &self.placements[shard];
        match transition {
            Transition::Replace { old, new } => {
                if placement.stage != Stage::Normal || placement.names(new) || !is_present(self, new) {
                    return Err(invalid(
                        "a slot is replaced outside of moves, by a node that is there and holds no copy",
                    ));
                }
                if !placement.replicas.iter().any(|r| r.node == old) {
                    return Err(Refusal::Unknown(old));
                }
                self.replace(shard, old, new);
                return Ok(true);
            }
            Transition::Begin { joining, leaving } => {
                let all_serve = placement.replicas.iter().all(|r| !r.filling);
                if placement.stage != Stage::Normal || !all_serve {
                    return Err(invalid("a shard moves when it is at rest and complete"));
                }
                if joining.is_some_and(|no| placement.names(no) || !is_present(self, no)) {
                    return Err(invalid("who joins a set must be there and not be in it"));
                }
                if leaving.is_some_and(|no| !placement.names(no)) || joining.is_none() && leaving.is_none() {
                    return Err(invalid("who leaves a set must be in it"));
                }
                if leaving.is_none() && placement.replicas.len() >= usize::from(self.quorums.n) {
                    return Err(invalid("the shard has all its copies"));
                }
                if joining.is_none() && placement.replicas.len() < 2 {
                    return Err(invalid("the last copy of a shard stays"));
                }
            }
            _ => {}
        }
        let is_lost = |no: &NodeNo| !is_present(self, *no);
        let lost: Vec<NodeNo> = placement.written().filter(is_lost).collect();
        let placement = &mut self.placements[shard];
        match transition {
            Transition::Replace { .. } => unreachable!("done above"),
            Transition::Begin { joining, leaving } => {
                (placement.joining, placement.leaving, placement.stage) = (joining, leaving, Stage::WriteBoth);
            }
            Transition::Filled { node } => match placement.replicas.iter_mut().find(|r| r.node == node && r.filling) {
                Some(replica) => replica.filling = false,
                None => return Ok(false),
            },
            Transition::ReadNew if placement.stage == Stage::WriteBoth => placement.stage = Stage::ReadNew,
            Transition::Finish if placement.stage == Stage::ReadNew => {
                placement.replicas = placement.new_set();
                placement.normal(epoch);
            }
            Transition::Abort if placement.stage == Stage::WriteBoth => placement.normal(epoch),
            Transition::First { node } => match placement.replicas.iter().position(|r| r.node == node && !r.filling) {
                Some(at) if at > 0 => placement.replicas.swap(0, at),
                _ => return Ok(false),
            },
            Transition::AcceptLoss => {
                if placement.stage == Stage::ReadNew {
                    placement.replicas = placement.new_set();
                }
                placement.normal(epoch);
                if placement.replicas.iter().any(|r| !lost.contains(&r.node)) {
                    placement.replicas.retain(|r| !lost.contains(&r.node));
                }
                placement.replicas.iter_mut().for_each(|r| r.filling = false);
                placement.losses += 1;
            }
            Transition::ReadNew | Transition::Finish | Transition::Abort => return Err(invalid("wrong stage")),
        }
        self.placements[shard].epoch = epoch;
        Ok(true)
    }

    /// Drops the lives that are over and that nothing names any more, but for the last life of each voting node.
    fn forget_lost(&mut self) {
        let voting: Vec<NodeNo> = self.voters.iter().chain(&self.next_voters).copied().collect();
        let mut named: BTreeSet<NodeNo> = self.placements.iter().flat_map(|p| p.written()).collect();
        for &seat in &voting {
            if let Some(last) = self.members.iter().rev().find(|m| m.seat == seat) {
                named.insert(last.no);
            }
        }
        // A later life, or another node at its address, is the proof that a former one is over for certain, also when that is
        // over too.
        let is_named = |m: &&Member| named.contains(&m.no);
        let proven: Vec<(NodeId, SocketAddr)> =
            self.members.iter().filter(is_named).map(|m| (m.about.id, m.about.peer)).collect();
        for (id, peer) in proven {
            let mut later = self.members.iter().rev();
            let last = later.find(|m| m.about.id == id || m.about.peer == peer).expect("it is one of them");
            named.insert(last.no);
        }
        self.members.retain(|m| m.standing != Standing::Lost || named.contains(&m.no));
    }

    /// Looks whether the map keeps its own rules.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), String> {
        let ensure = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_string()) };
        ensure(self.members.windows(2).all(|w| w[0].no < w[1].no), "members are in order")?;
        ensure(self.members.len() <= MAX_MEMBERS, "there are not too many members")?;
        ensure(self.members.iter().all(|m| m.no.0 < self.next_no && m.no.0 > 0), "numbers were given")?;
        ensure(!self.voters.is_empty() && self.voters.len() <= 5 && self.next_voters.len() <= 5, "there are voters")?;
        ensure(self.placements.len().is_power_of_two() && self.placements.len() <= 16384, "shards are a power of two")?;
        let Quorums { n, w, r } = self.quorums;
        ensure(n >= 1 && usize::from(n) <= MAX_COPIES && (1..=n).contains(&w) && (1..=n).contains(&r), "quorums fit")?;
        for (shard, placement) in self.placements.iter().enumerate() {
            let wrong = |what: &str| Err(format!("shard {shard}: {what}"));
            let nodes: Vec<_> = placement.written().collect();
            if nodes.iter().collect::<BTreeSet<_>>().len() != nodes.len() {
                return wrong("a node is named twice");
            }
            if placement.replicas.is_empty() || placement.replicas.len() > usize::from(n) {
                return wrong("too few or too many copies");
            }
            if placement.epoch > self.epoch {
                return wrong("its epoch is ahead of the map's");
            }
            if nodes.iter().any(|&no| self.member(no).is_none()) {
                return wrong("a node is named that is no member");
            }
            let moving = placement.joining.is_some() || placement.leaving.is_some();
            if (placement.stage == Stage::Normal) == moving {
                return wrong("stage and move do not fit");
            }
            if placement.leaving.is_some_and(|no| !placement.replicas.iter().any(|r| r.node == no)) {
                return wrong("who leaves is not in the set");
            }
        }
        Ok(())
    }

    /// As bytes, for the register, for disk and for peers.
    pub fn encode(&self) -> Vec<u8> {
        rkyv::to_bytes::<Failure>(self).expect("a map is plain data").to_vec()
    }

    /// From bytes of any origin.
    ///
    /// # Errors
    /// When they are no map, or one that breaks its rules ([`Map::check`]).
    pub fn decode(bytes: &[u8]) -> Result<Map, String> {
        let mut aligned = rkyv::util::AlignedVec::<16>::with_capacity(bytes.len());
        aligned.extend_from_slice(bytes);
        let map = rkyv::from_bytes::<Map, Failure>(&aligned).map_err(|error| format!("not a map: {error}"))?;
        map.check()?;
        Ok(map)
    }
}

impl Placement {
    /// The move, if any, is over; the old set stays.
    fn normal(&mut self, epoch: u64) {
        (self.stage, self.joining, self.leaving, self.epoch) = (Stage::Normal, None, None, epoch);
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A node for tests; everything follows from its number.
    pub(crate) fn candidate(n: u16, boot: u64) -> Candidate {
        Candidate {
            id: NodeId(u128::from(n)),
            boot,
            peer: SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 7380)),
            client: SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 7379)),
            cores: 1,
            zone: String::new(),
            weight: NORMAL_WEIGHT,
        }
    }

    /// A cluster of three with every shard on all of them.
    pub(crate) fn three() -> Map {
        let quorums = Quorums { n: 3, w: 2, r: 2 };
        let mut map = Map::create(7, 0, 32, quorums, candidate(1, 1));
        for n in 2..=3 {
            map = map.apply(&Change::Admit(candidate(n, 1))).unwrap();
            for transition in
                [Transition::Begin { joining: Some(NodeNo(n)), leaving: None }, Transition::ReadNew, Transition::Finish]
            {
                map = step_all(&map, transition);
            }
        }
        map
    }

    /// The same step of every shard.
    pub(crate) fn step_all(map: &Map, transition: Transition) -> Map {
        let steps = map.placements.iter().enumerate();
        let steps = steps.map(|(shard, p)| Step { shard: shard as u16, epoch: p.epoch, transition }).collect();
        map.apply(&Change::Steps(steps)).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;

    #[test]
    fn the_proof_that_a_life_is_over_is_kept_as_long_as_something_names_it() {
        let map = three().apply(&Change::Lose(NodeNo(2))).unwrap();
        let elsewhere = Candidate { id: NodeId(9), ..candidate(2, 2) };
        let proven = map.apply(&Change::Admit(elsewhere)).unwrap();
        let gone = proven.apply(&Change::Lose(NodeNo(4))).unwrap();
        assert_eq!(gone.member(NodeNo(4)).map(|m| m.about.id), Some(NodeId(9)), "shards still name node 2");
        let other = map.apply(&Change::Admit(candidate(9, 1))).unwrap().apply(&Change::Lose(NodeNo(4))).unwrap();
        assert!(other.member(NodeNo(4)).is_none());
    }

    #[test]
    fn a_life_is_given_up_only_in_the_map_in_which_that_was_right() {
        let map = three();
        let give_up = Change::GiveUp { life: NodeNo(2), epoch: map.epoch };
        let other = map.apply(&Change::Drain(NodeNo(3), true)).unwrap();
        assert_eq!(other.apply(&give_up), Err(Refusal::Stale));
        assert_eq!(map.apply(&give_up).unwrap().member(NodeNo(2)).unwrap().standing, Standing::Lost);
    }

    #[test]
    fn a_node_that_comes_back_is_another_replica_to_be_filled() {
        let map = three();
        let next = map.apply(&Change::Admit(candidate(2, 2))).unwrap();
        let newcomer = next.life_of(NodeId(2)).unwrap();
        assert_eq!((newcomer.no, newcomer.seat), (NodeNo(4), NodeNo(2)));
        assert!(next.member(NodeNo(2)).is_none(), "nothing names its former life any more");
        for placement in &next.placements {
            assert!(placement.is_filling(NodeNo(4)) && !placement.is_readable(NodeNo(4)));
            assert_eq!((placement.epoch, placement.replicas.len()), (next.epoch, 3));
        }
        let filled = step_all(&next, Transition::Filled { node: NodeNo(4) });
        assert!(filled.placements.iter().all(|p| p.is_readable(NodeNo(4)) && p.epoch == filled.epoch));
    }

    #[test]
    fn an_older_or_equal_life_is_refused() {
        let map = three().apply(&Change::Admit(candidate(2, 5))).unwrap();
        for boot in [1, 5] {
            let refused = map.apply(&Change::Admit(candidate(2, boot))).unwrap_err();
            assert_eq!(refused, Refusal::Duplicate { id: NodeId(2), boot: 5 });
        }
    }

    #[test]
    fn a_move_goes_through_its_stages_and_no_other_way() {
        let map = three().apply(&Change::Admit(candidate(4, 1))).unwrap();
        let begun = step_all(&map, Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) });
        let placement = &begun.placements[0];
        assert!(
            placement.is_filling(NodeNo(4)) && placement.is_readable(NodeNo(1)) && !placement.is_readable(NodeNo(4))
        );
        let finish = Step { shard: 0, epoch: placement.epoch, transition: Transition::Finish };
        assert!(begun.apply(&Change::Steps(vec![finish])).is_err());
        let read_new = step_all(&begun, Transition::ReadNew);
        assert!(read_new.placements[0].is_readable(NodeNo(4)) && !read_new.placements[0].is_readable(NodeNo(1)));
        let done = step_all(&read_new, Transition::Finish);
        let nodes: Vec<_> = done.placements[0].written().map(|no| no.0).collect();
        assert_eq!(nodes, [4, 2, 3], "the joiner takes the leaver's place");
    }

    #[test]
    fn losing_either_end_of_a_move_leaves_a_shard_at_rest() {
        let map = three().apply(&Change::Admit(candidate(4, 1))).unwrap();
        let begun = step_all(&map, Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) });
        let back = begun.apply(&Change::Lose(NodeNo(4))).unwrap();
        assert_eq!(back.placements[0].written().collect::<Vec<_>>(), [NodeNo(1), NodeNo(2), NodeNo(3)]);
        let cut = begun.apply(&Change::Lose(NodeNo(1))).unwrap();
        assert!(cut.placements[0].is_filling(NodeNo(4)) && cut.placements[0].stage == Stage::Normal);
        assert!(!cut.placements[0].names(NodeNo(1)));
    }

    #[test]
    fn a_step_that_was_thought_out_for_another_epoch_is_refused() {
        let map = three();
        let step =
            Step { shard: 3, epoch: map.placements[3].epoch - 1, transition: Transition::First { node: NodeNo(2) } };
        assert_eq!(map.apply(&Change::Steps(vec![step])), Err(Refusal::Stale));
    }

    #[test]
    fn voters_change_in_two_steps() {
        let map = three();
        let joint = map.apply(&Change::Voters(vec![NodeNo(1), NodeNo(2), NodeNo(3)])).unwrap();
        assert_eq!((joint.voters.len(), joint.next_voters.len()), (1, 3));
        assert!(joint.apply(&Change::Voters(vec![NodeNo(2)])).is_err());
        let done = joint.apply(&Change::VotersDone).unwrap();
        assert_eq!((done.voters.len(), done.next_voters.len()), (3, 0));
        assert!(done.apply(&Change::Voters(vec![NodeNo(1), NodeNo(2)])).is_err());
        assert!(done.apply(&Change::Voters(vec![NodeNo(9)])).is_err());
    }

    #[test]
    fn a_map_survives_its_bytes_and_garbage_does_not() {
        let map = three();
        assert_eq!(Map::decode(&map.encode()), Ok(map.clone()));
        let bytes = map.encode();
        for cut in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            assert!(Map::decode(&bytes[..cut]).is_err());
        }
    }
}
