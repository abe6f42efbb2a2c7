//! The world's part of the control planes: it carries what they want, as the driver of a node does, and watches what they decide.
//!
//! ```text
//!   datagrams, messages ──▶ network ──▶ planes of other nodes
//!   voters' states ──▶ disk, in its order ──▶ answers
//!   maps, who is alive ──▶ cores ──▶ adopted, filled, wanted ──▶ plane
//! ```
//!
//! Nothing is told by the world: who is alive, who is admitted and which map holds is for the nodes to find out. What is watched:
//! a ballot carries one value, a voter's disk never goes back, an epoch has one map, and a map that any node holds is on the disks of
//! a majority of each group of its voters.
//!
//! The world plays the operator, too: it asks for drains, and takes a node away that is empty.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use gridkv_engine::Millis;
use gridkv_engine::hash::ShardId;
use xxhash_rust::xxh3::xxh3_64;

use super::{AUTHORITY, MS, What, World};
use crate::control::{Control, Event, Output};
use crate::ids::{NodeId, NodeNo};
use crate::map::{Change, Map, Member, Standing};
use crate::membership;
use crate::register::{Ballot, slots};
use crate::sim::history::Rule;
use crate::sim::node::Core;
use crate::sim::plane::{Disk, Job, Plane, address, index_of, no_map};

/// Ballots whose votes are counted at a time.
const BALLOTS: usize = 256;
/// Nodes that a new one asks for its admission.
const SEEDS: usize = 3;
/// How long a proposal may wait and take.
const GIVEN_UP: u64 = 8_000_000;
/// How long after one machine was replaced another one may be.
const REPLACED: u64 = 8_000_000;

/// Something for or of a control plane.
#[derive(Clone, Debug)]
pub(super) enum Note {
    /// From that address; to whatever process runs there.
    Datagram(SocketAddr, Rc<Vec<u8>>),
    /// To that very process.
    Message(Rc<Vec<u8>>),
    /// A deadline.
    Timer,
    /// The oldest write is durable.
    Written,
    /// What a voter says when its disk has it.
    Said(SocketAddr, Rc<Vec<u8>>),
    /// A map for a core.
    Adopt(usize, Arc<Map>, NodeNo),
    /// Who can be reached, for a core.
    Alive(usize, BTreeSet<NodeNo>, bool),
    /// Its clock is wrong, or no more, and by how much it is behind.
    Quarantined(usize, bool, Millis),
    /// A core has adopted that epoch.
    Adopted(u64),
    /// A core holds everything of that shard.
    Filled(u16, u64),
    /// A core met that epoch.
    Wanted(u64),
}

/// What is on the disks of the voters.
#[derive(Debug, Default)]
pub(super) struct Votes {
    /// Who has accepted what.
    accepted: BTreeMap<Ballot, (Arc<Map>, BTreeSet<NodeId>)>,
    /// How far each disk has come: promise, accepted ballot.
    reached: BTreeMap<NodeId, (Ballot, Ballot)>,
    /// Epochs of the maps that majorities have accepted.
    chosen: BTreeSet<u64>,
    /// When a machine was replaced last.
    replaced_at: Option<u64>,
}

impl Votes {
    /// A voter's state is on its disk. Gives a map that is chosen by it.
    fn on_disk(&mut self, id: NodeId, bytes: &[u8]) -> Result<Option<Arc<Map>>, String> {
        let Some(state) = slots::decode_state(bytes) else { return Err("a voter's state cannot be read".into()) };
        let accepted = state.accepted.as_ref().map_or(Ballot::default(), |(ballot, _)| *ballot);
        let before = self.reached.insert(id, (state.promised, accepted)).unwrap_or_default();
        if state.promised < before.0 || accepted < before.1 {
            return Err(format!(
                "the voter {id} has forgotten {before:?}, and has {:?} now",
                (state.promised, accepted)
            ));
        }
        let Some((ballot, value)) = state.accepted else { return Ok(None) };
        if let Entry::Vacant(vacant) = self.accepted.entry(ballot) {
            let map = Map::decode(&value)?;
            vacant.insert((Arc::new(map), BTreeSet::new()));
            if self.accepted.len() > BALLOTS {
                self.accepted.pop_first();
            }
        }
        let Some((map, voters)) = self.accepted.get_mut(&ballot) else { return Ok(None) };
        if !voters.insert(id) {
            return Ok(None);
        }
        if map.encode() != value {
            return Err(format!("two values at the ballot {ballot:?}"));
        }
        let has = |seat: &&NodeNo| {
            let member = map.members.iter().rev().find(|m| m.seat == **seat);
            member.is_some_and(|m| voters.contains(&m.about.id))
        };
        let majority = |group: &[NodeNo]| group.is_empty() || group.iter().filter(has).count() > group.len() / 2;
        if !majority(&map.voters) || !majority(&map.next_voters) {
            return Ok(None);
        }
        self.chosen.insert(map.epoch);
        Ok(Some(map.clone()))
    }
}

impl World {
    pub(super) fn begin_with_planes(&mut self) {
        for node in 0..self.nodes.len() {
            // As machines are switched on one after the other.
            self.nodes[node].boot = 0;
            let after = node as u64 * self.random.within(1, 300) * MS;
            self.push(after, What::Start { node });
        }
        self.push(500 * MS, What::Operator);
    }

    pub(super) fn start_plane(&mut self, node: usize) {
        let (map, planted) = (no_map(&self.options), self.planted);
        self.nodes[node].start(&self.options, &map, planted);
        let (boot, wall) = (self.nodes[node].boot, self.nodes[node].wall(self.time));
        let seed = self.random.next();
        // The operator names nodes that are still there.
        let others = (0..self.nodes.len()).filter(|&other| other != node && !self.nodes[other].gone);
        let seeds: Vec<usize> = others.take(SEEDS).collect();
        let plane = Plane::start(&self.options, &mut self.nodes[node].disk, node, &seeds, wall, planted, seed);
        self.nodes[node].plane = Some(plane);
        self.trace.note(self.time, node, None, || format!("starts, life {boot}"));
        self.push(500 * MS, What::Sweep { node, boot });
        self.turn(node);
    }

    fn note(&mut self, node: usize, after: u64, note: Note) {
        let boot = self.nodes[node].boot;
        self.push(after, What::Plane { node, boot, note });
    }

    pub(super) fn on_note(&mut self, node: usize, boot: u64, note: Note) {
        let to_any = matches!(note, Note::Datagram(..));
        if !self.nodes[node].up || !to_any && self.nodes[node].boot != boot {
            return;
        }
        if let Note::Written = note {
            return self.written(node);
        }
        let again = note.clone();
        if !self.awake(node, || What::Plane { node, boot, note: again }) {
            return;
        }
        let time = self.time;
        let now = self.nodes[node].now(time);
        let Some(plane) = &mut self.nodes[node].plane else { return };
        match note {
            Note::Datagram(from, bytes) => {
                self.trace.hash(&[6, time, node as u64, xxh3_64(&bytes)]);
                plane.control.on_datagram(now, from, &bytes, &mut plane.out);
            }
            Note::Message(bytes) => {
                self.trace.hash(&[7, time, node as u64, xxh3_64(&bytes)]);
                plane.control.on_message(now, &bytes, &mut plane.out);
            }
            Note::Timer => {
                if plane.armed <= time {
                    plane.armed = u64::MAX;
                }
            }
            Note::Said(to, bytes) => return self.said(node, to, bytes),
            Note::Adopted(epoch) => match &mut plane.adopting {
                Some((adopting, left)) if *adopting == epoch => {
                    *left -= 1;
                    if *left == 0 {
                        plane.adopting = None;
                        plane.control.on_adopted(now, epoch);
                    }
                }
                _ => {}
            },
            Note::Filled(shard, epoch) => plane.control.on_filled(now, shard, epoch),
            Note::Wanted(epoch) => plane.control.on_wanted(epoch, &mut plane.out),
            Note::Adopt(core, map, me) => return self.adopt_as(node, core, &map, me),
            Note::Alive(core, alive, isolated) => {
                let Core { shards, store, out, .. } = &mut self.nodes[node].cores[core];
                shards.set_isolated(isolated);
                if shards.view().alive != alive {
                    shards.on_alive(now, store, alive, out);
                }
                return self.drain(node, core);
            }
            Note::Quarantined(core, quarantined, behind) => {
                let Core { shards, store, .. } = &mut self.nodes[node].cores[core];
                return shards.set_quarantined(now, store, quarantined, behind);
            }
            Note::Written => {}
        }
        self.turn(node);
    }

    /// The control plane's part of a turn.
    fn turn(&mut self, node: usize) {
        let (time, boot) = (self.time, self.nodes[node].boot);
        let now = self.nodes[node].now(time);
        loop {
            let Some(plane) = &mut self.nodes[node].plane else { return };
            while let Some(bytes) = plane.own.pop_front() {
                plane.control.on_message(now, &bytes, &mut plane.out);
            }
            if plane.control.next_deadline().is_some_and(|at| at <= now.mono) {
                plane.control.on_deadline(now, &mut plane.out);
            }
            plane.control.invariants();
            let out = std::mem::take(&mut plane.out);
            self.look_at(node);
            self.act(node, out);
            if self.nodes[node].plane.as_ref().is_none_or(|plane| plane.own.is_empty()) {
                break;
            }
        }
        let Some(plane) = &mut self.nodes[node].plane else { return };
        if let Some(deadline) = plane.control.next_deadline() {
            let at = ((deadline.max(1) - 1) * MS).max(time + MS);
            if at < plane.armed {
                plane.armed = at;
                self.push(at - time, What::Plane { node, boot, note: Note::Timer });
            }
        }
    }

    /// Does what a control plane wants.
    fn act(&mut self, node: usize, out: Output) {
        for (to, bytes) in out.datagrams {
            if let Some(index) = index_of(to).filter(|&index| index < self.nodes.len() && index != node) {
                let bytes = Rc::new(bytes);
                for at in self.network.arrivals(self.time, node, index, false).into_iter().flatten() {
                    self.note(index, at - self.time, Note::Datagram(address(node), bytes.clone()));
                }
            }
        }
        for (to, bytes) in out.messages {
            self.say(node, to, Rc::new(bytes));
        }
        for job in out.disk {
            self.write(node, Job::Voter(job));
        }
        let adopt = out.adopt;
        if let Some((map, me)) = &adopt {
            if *me != NodeNo(0) {
                self.write(node, Job::Map(map.clone()));
            }
            let cores = self.options.cores;
            if let Some(plane) = &mut self.nodes[node].plane {
                plane.adopting = Some((map.epoch, cores));
            }
        }
        for core in 0..self.options.cores {
            if let Some((map, me)) = &adopt {
                self.post(node, core, Note::Adopt(core, map.clone(), *me));
            }
            if let Some((alive, isolated)) = &out.alive {
                self.post(node, core, Note::Alive(core, alive.clone(), *isolated));
            }
            if let Some((quarantined, behind)) = out.quarantined {
                self.post(node, core, Note::Quarantined(core, quarantined, behind));
            }
        }
        for event in out.events {
            if self.trace.only().is_none() || !matches!(event, Event::Map(_) | Event::Up(_)) {
                self.trace.note(self.time, node, None, || format!("{event:?}"));
            }
            match event {
                Event::Refused(_) => {
                    // It ends with an error, and whatever watches over it starts it again.
                    self.stop(node);
                    return self.push(2_000 * MS, What::Start { node });
                }
                Event::Duplicate { .. } => {
                    self.stop(node);
                    return self.push(1_000 * MS, What::Start { node });
                }
                _ => {}
            }
        }
    }

    /// Keeps what the world knows of a node up to date, and looks at its map.
    fn look_at(&mut self, node: usize) {
        let boot = self.nodes[node].boot;
        let Some(plane) = &mut self.nodes[node].plane else { return };
        let me = plane.me();
        let fresh = plane.control.map().filter(|map| map.epoch != plane.looked).cloned();
        plane.looked = fresh.as_ref().map_or(plane.looked, |map| map.epoch);
        if self.nodes[node].no != me {
            self.nodes[node].no = me;
            self.trace.note(self.time, node, None, || format!("is number {me}"));
            if me != NodeNo(0) {
                self.lives.insert(me, (node, boot));
            }
        }
        let Some(map) = fresh else { return };
        if !self.votes.chosen.contains(&map.epoch) {
            let what = format!("n{node} has map {}, which no majority of its voters has accepted", map.epoch);
            return self.violate(Rule::OneMap, what);
        }
        self.compare(&map);
    }

    /// All maps of one epoch must be the same.
    fn compare(&mut self, map: &Arc<Map>) {
        let known = self.maps.entry(map.epoch).or_insert_with(|| map.clone());
        if !Arc::ptr_eq(known, map) && **known != **map {
            self.violate(Rule::OneMap, format!("two maps of epoch {}", map.epoch));
        }
    }

    fn say(&mut self, node: usize, to: SocketAddr, bytes: Rc<Vec<u8>>) {
        let Some(index) = index_of(to).filter(|&index| index < self.nodes.len()) else { return };
        if index == node {
            if let Some(plane) = &mut self.nodes[node].plane {
                plane.own.push_back(bytes.to_vec());
            }
        } else if self.nodes[index].up {
            for at in self.network.arrivals(self.time, node, index, false).into_iter().flatten() {
                self.note(index, at - self.time, Note::Message(bytes.clone()));
            }
        }
    }

    fn said(&mut self, node: usize, to: SocketAddr, bytes: Rc<Vec<u8>>) {
        self.say(node, to, bytes);
        self.turn(node);
    }

    fn write(&mut self, node: usize, job: Job) {
        let after = 10 + self.random.exponential(self.options.gossip.disk_us);
        let disk = &mut self.nodes[node].disk;
        disk.done_at = disk.done_at.max(self.time) + after;
        disk.queue.push_back(job);
        let after = disk.done_at - self.time;
        self.note(node, after, Note::Written);
    }

    /// The oldest write is durable, also while the process stands still.
    fn written(&mut self, node: usize) {
        let disk = &mut self.nodes[node].disk;
        let voter = match disk.queue.front() {
            Some(Job::Voter(job)) => job.voter.clone(),
            _ => None,
        };
        let (id, then) = (disk.id, disk.write());
        if let Some(bytes) = voter {
            match self.votes.on_disk(id, &bytes) {
                Err(what) => return self.violate(Rule::OneMap, what),
                Ok(Some(map)) => self.chosen(&map),
                Ok(None) => {}
            }
        }
        if let Some((to, bytes)) = then {
            let boot = self.nodes[node].boot;
            self.on_note(node, boot, Note::Said(to, Rc::new(bytes)));
        }
    }

    fn chosen(&mut self, map: &Arc<Map>) {
        self.compare(map);
        if map.epoch <= self.newest.epoch {
            return;
        }
        self.newest = map.clone();
        self.changed_at = self.time;
        self.look_for_losses(map);
        match self.trace.only() {
            Some(shard) => {
                let placement = &map.placements[usize::from(shard)];
                if placement.epoch == map.epoch {
                    self.trace.note(self.time, AUTHORITY, None, || super::set(placement));
                }
            }
            None => {
                let epoch = map.epoch;
                self.trace.note(self.time, AUTHORITY, None, || format!("map {epoch} is chosen"));
            }
        }
    }

    // --- between the plane and the cores of a node ------------------------------------------------------------------

    /// To a core, after what was posted to it before.
    fn post(&mut self, node: usize, core: usize, note: Note) {
        // A core that works on something long hears late.
        let most = if self.random.chance(100) { self.options.map_ms.max(2) } else { 2 };
        let at = self.time + self.random.within(1, most * MS);
        let Some(plane) = &mut self.nodes[node].plane else { return };
        plane.posted[core] = plane.posted[core].max(at);
        let after = plane.posted[core] - self.time;
        self.note(node, after, note);
    }

    fn adopt_as(&mut self, node: usize, core: usize, map: &Arc<Map>, me: NodeNo) {
        let time = self.time;
        self.compare(map);
        self.trace.hash(&[5, time, node as u64, map.epoch]);
        let view = self.nodes[node].cores[core].shards.view();
        let is_news = |shard: u16| {
            let known = view.map.placements[usize::from(shard)].epoch;
            view.owned.contains(&shard) && (map.placements[usize::from(shard)].epoch != known || view.me != me)
        };
        if self.trace.only().is_none_or(is_news) {
            self.trace.note(time, node, None, || format!("core {core} adopts {} as {me}", map.epoch));
        }
        let now = self.nodes[node].now(time);
        let Core { shards, store, out, .. } = &mut self.nodes[node].cores[core];
        shards.on_map(now, store, map.clone(), me, out);
        self.drain(node, core);
        let after = self.random.within(1, 200);
        self.note(node, after, Note::Adopted(map.epoch));
    }

    /// What the cores want told; nothing of it is left.
    pub(super) fn tell_plane(&mut self, node: usize, filled: Vec<(ShardId, u64)>, wanted: u64) -> Vec<(ShardId, u64)> {
        for (shard, epoch) in filled {
            let after = self.random.within(1, MS);
            self.trace.note(self.time, node, Some(shard.0), || format!("filled s{} e{epoch}", shard.0));
            self.note(node, after, Note::Filled(shard.0, epoch));
        }
        if wanted > 0 {
            let after = self.random.within(1, MS);
            self.note(node, after, Note::Wanted(wanted));
        }
        Vec::new()
    }

    // --- faults and the operator ------------------------------------------------------------------------------------

    /// Those that believe that they lead.
    fn leaders(&self) -> impl Iterator<Item = &Control> {
        let planes = self.nodes.iter().filter_map(|node| node.plane.as_ref()).map(|plane| &plane.control);
        planes.filter(|control| control.me() != NodeNo(0) && control.leader() == Some(control.me()))
    }

    /// Whether all that lead believe that a life can be reached, and have believed so for longer than it takes to give one up: it may
    /// be back, and no longer be wanted.
    pub(super) fn leaders_see(&self, no: NodeNo) -> bool {
        let lately = self.missed.get(&no).is_some_and(|&at| at + GIVEN_UP > self.time);
        !lately && self.leaders().all(|control| control.alive().contains(&no))
    }

    /// Remembers whom a leader misses.
    fn note_missed(&mut self) {
        let present: Vec<NodeNo> = self.newest.present().map(|m| m.no).collect();
        let is_missed = |no: &NodeNo| self.leaders().any(|control| !control.alive().contains(no));
        let missed: Vec<NodeNo> = present.into_iter().filter(is_missed).collect();
        self.missed.extend(missed.into_iter().map(|no| (no, self.time)));
    }

    /// A machine goes, and another one comes in its place. Its vote is lost, so this waits until no other vote is: neither of those
    /// who vote, nor of those who are to vote in a change that somebody has accepted.
    pub(super) fn replace_machine(&mut self, node: usize, down_ms: u64) -> bool {
        let map = self.newest.clone();
        let lately = self.votes.replaced_at.is_some_and(|at| at + REPLACED > self.time);
        let is_there = |id: NodeId| self.nodes.iter().any(|node| node.id == id && !node.gone);
        let seats = map.members.iter().filter(|m| map.voters.contains(&m.seat));
        let whole = map.voters.len() >= 3 && map.next_voters.is_empty() && seats.clone().all(|m| is_there(m.about.id));
        let open = self.nodes.iter().filter_map(|node| Map::decode(&node.disk.voter.accepted.as_ref()?.1).ok());
        let open: Vec<Map> = open.filter(|open| open.epoch > map.epoch).collect();
        let to_vote = |open: &Map, m: &Member| open.next_voters.contains(&m.seat) && m.standing != Standing::Lost;
        let whole =
            whole && open.iter().all(|o| o.members.iter().filter(|m| to_vote(o, m)).all(|m| is_there(m.about.id)));
        let may = self.nodes[node].up && !lately && whole && map.present().count() >= 3 && self.may_lose(node);
        if may {
            self.stop(node);
            let id = NodeId(self.nodes[node].id.0 + (1 << 16));
            self.nodes[node].id = id;
            self.nodes[node].disk = Disk::new(id);
            self.votes.replaced_at = Some(self.time);
            self.trace.note(self.time, node, None, || "the machine is replaced".into());
            self.push(down_ms * MS, What::Start { node });
        }
        may
    }

    /// A node that an operator can reach and that is a member.
    fn shell(&mut self) -> Option<usize> {
        let can = |node: &usize| self.nodes[*node].up && self.nodes[*node].paused_until <= self.time;
        let member = |node: &usize| self.nodes[*node].plane.as_ref().is_some_and(|plane| plane.me() != NodeNo(0));
        let shells: Vec<usize> = (0..self.nodes.len()).filter(can).filter(member).collect();
        (!shells.is_empty()).then(|| *self.random.pick(&shells))
    }

    fn propose(&mut self, change: Change) {
        let Some(shell) = self.shell() else { return };
        self.trace.note(self.time, shell, None, || format!("the operator asks for {change:?}"));
        let now = self.nodes[shell].now(self.time);
        let token = self.random.next();
        let Some(plane) = &mut self.nodes[shell].plane else { return };
        plane.control.propose(now, token, change, &mut plane.out);
        self.turn(shell);
    }

    pub(super) fn ask_to_drain(&mut self, node: usize) -> bool {
        let is_new = !self.draining.contains(&node);
        let staying = (0..self.nodes.len()).filter(|&other| !self.nodes[other].gone && !self.draining.contains(&other));
        if !is_new || staying.count() <= usize::from(self.options.quorums.n).max(2) {
            return false;
        }
        self.draining.push(node);
        self.propose(Change::Drain(self.nodes[node].no, true));
        true
    }

    pub(super) fn operate(&mut self) {
        self.note_missed();
        let map = self.newest.clone();
        for node in self.draining.clone() {
            let id = self.nodes[node].id;
            let Some(member) = map.life_of(id) else { continue };
            let votes = map.voters.contains(&member.seat) || map.next_voters.contains(&member.seat);
            let is_named = map.placements.iter().any(|p| p.names(member.no));
            if self.nodes[node].gone {
                self.propose(Change::Lose(member.no));
            } else if member.standing == Standing::Up {
                self.propose(Change::Drain(member.no, true));
            } else if !votes && !is_named && self.nodes[node].up && self.awake_now(node) {
                self.trace.note(self.time, node, None, || "is empty and leaves".into());
                let now = self.nodes[node].now(self.time);
                if let Some(plane) = &mut self.nodes[node].plane {
                    plane.control.leave(now, &mut plane.out);
                }
                self.turn(node);
                self.nodes[node].gone = true;
                self.stop(node);
                self.propose(Change::Lose(member.no));
            }
        }
        self.push(500 * MS, What::Operator);
    }

    fn awake_now(&self, node: usize) -> bool {
        self.nodes[node].paused_until <= self.time
    }

    // --- the end ----------------------------------------------------------------------------------------------------

    /// Why the control planes are not at rest, when a map in which all is well is chosen.
    pub(super) fn planes_unrest(&self) -> Option<String> {
        let map = &self.newest;
        if !map.next_voters.is_empty() {
            return Some("the voters are being changed".into());
        }
        let present: BTreeSet<NodeNo> = map.present().map(|m| m.no).collect();
        let lives: BTreeSet<NodeNo> = self.nodes.iter().filter(|node| !node.gone).map(|node| node.no).collect();
        if present != lives {
            return Some(format!("the map has {present:?}, and there are {lives:?}"));
        }
        let mut leaders = BTreeSet::new();
        for (index, node) in self.nodes.iter().enumerate().filter(|(_, node)| !node.gone) {
            let Some(control) = node.plane.as_ref().map(|plane| &plane.control) else {
                return Some(format!("node {index} is down"));
            };
            let known = control.map().map_or(0, |map| map.epoch);
            if known != map.epoch || node.adopted() < map.epoch {
                return Some(format!("node {index} has map {known} and adopted {} of {}", node.adopted(), map.epoch));
            }
            if *control.alive() != present || control.is_isolated() {
                return Some(format!("node {index} sees {:?} of {present:?}", control.alive()));
            }
            // What was lost before the healing may still end in a life that is missed for a moment.
            if control.members().any(|member| member.state == membership::State::Suspect) {
                return Some(format!("node {index} suspects somebody"));
            }
            let cores_see =
                node.cores.iter().all(|core| core.shards.view().alive == present && core.shards.view().me == node.no);
            if !cores_see {
                return Some(format!("the cores of node {index} see others than its plane"));
            }
            if node.cores.iter().any(|core| core.shards.view().quarantined) {
                return Some(format!("node {index} has not noticed yet that its clock is right again"));
            }
            if !node.pending.is_empty() {
                return Some(format!("node {index} has operations {:?}", node.pending));
            }
            leaders.insert(control.leader());
        }
        (leaders.len() != 1).then(|| format!("{leaders:?} lead"))
    }
}
