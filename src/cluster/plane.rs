//! The control plane of this node on its first core: the driver of [`Control`].
//!
//! It carries: datagrams to and from the gossip socket, control messages to and from the links of core 0, promises to the
//! disk before answers leave, maps and liveness to all cores, and what they adopted and filled back.
//!
//! Messages to an address whose link does not stand yet wait for it, a few of them and not for long: the protocol asks again. A link
//! to an address that is no member's ends when nothing was sent over it for a while.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use gridkv_cluster::control::{Control, Event, Output, Remembered, Settings, Start};
use gridkv_cluster::ids::{NodeId, NodeNo, Now};
use gridkv_cluster::map::{Candidate, Change, Map};
use gridkv_cluster::quorum::Quorums;
use gridkv_cluster::{membership, planner};
use gridkv_engine::Millis;
use gridkv_engine::store::StoreConfig;
use gridkv_net::gossip::Gossip;
use gridkv_net::peer::{Links, Priority};

use super::directory::DiskThread;
use super::metrics::Gossiped;
use super::seeds::Seeds;
use super::{CONTROL, ClusterView, post, prefix};
use crate::cores::CoreRc;
use crate::handle::unix_ms;
use crate::{Error, StartError};

/// Control messages that wait for a link: so many per address, for so long.
const WAIT_EACH: usize = 64;
const WAIT_MS: Millis = 3000;
/// Addresses that are spoken to beside those of members.
const STRANGERS: usize = 1024;
/// How long after the last message to a stranger its link is kept.
const STRANGER_MS: Millis = 30_000;
/// How long the disk's thread waits for room in the inbox of core 0.
const DELIVERY: Duration = Duration::from_secs(1);
/// Of the events for applications, those that nobody has taken yet.
pub(crate) const EVENTS: usize = 1024;

/// What a node starts its control plane with.
pub(crate) struct Opening {
    pub(crate) settings: Settings,
    pub(crate) seeds: Seeds,
    pub(crate) remembered: Remembered,
    pub(crate) disk: DiskThread,
    pub(crate) seed: u64,
    /// Told once: that the node is a member, or why it cannot be.
    pub(crate) verdict: flume::Sender<Result<(), Error>>,
    /// What happens, for applications.
    pub(crate) events: flume::Sender<Event>,
}

/// The control plane, driven.
pub(crate) struct Plane {
    control: Control,
    seeds: Seeds,
    started: Instant,
    gossip: Gossip,
    disk: DiskThread,
    /// Messages to this very node.
    own: VecDeque<Vec<u8>>,
    outgoing: Vec<(SocketAddr, Vec<u8>)>,
    /// By address: messages that wait for its link, each with the time that it came.
    waiting: BTreeMap<SocketAddr, VecDeque<(Millis, Vec<u8>)>>,
    /// When something was last said to an address.
    spoken: BTreeMap<SocketAddr, Millis>,
    /// When silent links are looked for again.
    look_at: Millis,
    /// The epoch of the map that the cores are to adopt, whether it leaves every shard to this node alone, and how many
    /// cores have not adopted it.
    adopting: Option<(u64, bool, usize)>,
    /// That map, while the cores do not have it: see [`crate::cores::flush`].
    held: Option<(Arc<Map>, NodeNo)>,
    out: Output,
    /// Something came since the last turn.
    touched: bool,
    verdict: Option<flume::Sender<Result<(), Error>>>,
    /// When the node became a member for the first time.
    admitted: Option<Instant>,
    events: flume::Sender<Event>,
    proposals: BTreeMap<u64, oneshot::Sender<Result<(), String>>>,
    next_token: u64,
}

/// The map of a node that knows none: it has the right number of shards, and nobody holds them.
pub(crate) fn no_map(store: &StoreConfig) -> Arc<Map> {
    let nobody = Candidate {
        id: NodeId(0),
        boot: 0,
        peer: SocketAddr::from(([0, 0, 0, 0], 0)),
        client: SocketAddr::from(([0, 0, 0, 0], 0)),
        cores: 1,
        zone: String::new(),
        weight: 1,
    };
    let keyspace = store.keyspace;
    let mut map = Map::create(0, keyspace.seed, keyspace.shards.get(), Quorums { n: 1, w: 1, r: 1 }, nobody);
    map.epoch = 0;
    map.placements.iter_mut().for_each(|placement| placement.epoch = 0);
    Arc::new(map)
}

impl Plane {
    pub(crate) fn new(opening: Opening, gossip: Gossip) -> Plane {
        Plane {
            control: Control::new(opening.settings, opening.remembered, opening.seed),
            seeds: opening.seeds,
            started: Instant::now(),
            gossip,
            disk: opening.disk,
            own: VecDeque::new(),
            outgoing: Vec::new(),
            waiting: BTreeMap::new(),
            spoken: BTreeMap::new(),
            look_at: 0,
            adopting: None,
            held: None,
            out: Output::default(),
            touched: true,
            verdict: Some(opening.verdict),
            admitted: None,
            events: opening.events,
            proposals: BTreeMap::new(),
            next_token: 0,
        }
    }

    fn now(&self) -> Now {
        Now { mono: self.started.elapsed().as_millis() as Millis, wall: unix_ms() }
    }

    /// Takes what the gossip socket has.
    pub(crate) fn receive(&mut self) {
        let now = self.now();
        self.touched = true;
        let Plane { gossip, control, out, .. } = self;
        gossip.receive(|from, bytes| control.on_datagram(now, from, bytes, out));
    }

    /// A control message of a peer.
    pub(crate) fn on_message(&mut self, bytes: &[u8]) {
        self.touched = true;
        let now = self.now();
        self.control.on_message(now, bytes, &mut self.out);
    }

    /// Hands control messages to the links of this core.
    pub(crate) fn send(&mut self, links: &mut Links) {
        if self.outgoing.is_empty() && self.waiting.is_empty() {
            return;
        }
        let now = self.now().mono;
        for (to, bytes) in std::mem::take(&mut self.outgoing) {
            if self.spoken.len() >= STRANGERS && !self.spoken.contains_key(&to) && !self.is_member(to) {
                continue;
            }
            self.spoken.insert(to, now);
            let queue = self.waiting.entry(to).or_default();
            // The oldest says the least by now.
            if queue.len() >= WAIT_EACH {
                queue.pop_front();
            }
            queue.push_back((now, bytes));
        }
        self.waiting.retain(|to, queue| {
            let link = links.dial(*to, 0);
            while let Some((at, bytes)) = queue.front() {
                let is_late = at + WAIT_MS < now;
                if !is_late && links.send(link, Priority::Control, &[&prefix(CONTROL), bytes]).is_err() {
                    return true;
                }
                queue.pop_front();
            }
            false
        });
        if now >= self.look_at {
            self.look_at = now + STRANGER_MS / 10;
            self.leave_strangers(links, now);
        }
    }

    /// Ends links over which nobody speaks any more.
    fn leave_strangers(&mut self, links: &mut Links, now: Millis) {
        let silent: Vec<SocketAddr> =
            self.spoken.iter().filter(|(_, at)| **at + STRANGER_MS < now).map(|(to, _)| *to).collect();
        for to in silent {
            self.spoken.remove(&to);
            if !self.is_member(to) {
                self.waiting.remove(&to);
                let link = links.dial(to, 0);
                links.hang_up(link);
            }
        }
    }

    fn is_member(&self, at: SocketAddr) -> bool {
        self.control.map().is_some_and(|map| map.present().any(|m| m.about.peer == at))
    }
}

/// A descriptor that the ring watches can be read.
pub(crate) fn readable(core: &CoreRc, event: &gridkv_net::ring::Event<'_>) {
    if let Some(plane) = &mut *core.plane.borrow_mut()
        && plane.gossip.owns(event)
    {
        plane.receive();
    }
}

/// The control plane's part of a turn. Returns whether there was anything.
pub(crate) fn turn(core: &CoreRc, look: bool) -> bool {
    let mut work = false;
    match &mut *core.plane.borrow_mut() {
        Some(plane) if look || plane.touched => plane.touched = false,
        _ => return false,
    }
    spread(core);
    loop {
        let out = {
            let mut plane = core.plane.borrow_mut();
            let Some(plane) = &mut *plane else { return work };
            let now = plane.now();
            while let Some(bytes) = plane.own.pop_front() {
                plane.control.on_message(now, &bytes, &mut plane.out);
            }
            if look && let Some(addresses) = plane.seeds.turn(now.mono, plane.control.me() == NodeNo(0)) {
                plane.control.set_seeds(now, addresses);
            }
            if plane.control.next_deadline().is_some_and(|at| at <= now.mono) {
                plane.control.on_deadline(now, &mut plane.out);
                work = true;
            }
            std::mem::take(&mut plane.out)
        };
        if !act(core, out) {
            return work;
        }
        work = true;
    }
}

/// Does what the control plane wants. Returns whether that gives it more to do at once.
fn act(core: &CoreRc, out: Output) -> bool {
    let mut guard = core.plane.borrow_mut();
    let Some(plane) = &mut *guard else { return false };
    for (to, bytes) in out.datagrams {
        plane.gossip.send(to, &bytes);
    }
    let own = plane.control.about().peer;
    for (to, bytes) in out.messages {
        match to == own {
            true => plane.own.push_back(bytes),
            false => plane.outgoing.push((to, bytes)),
        }
    }
    for job in out.disk {
        let topology = core.topology.clone();
        let then = move || {
            let Some((to, bytes)) = job.then else { return };
            let deliver = move |core: &CoreRc| {
                if let Some(plane) = &mut *core.plane.borrow_mut() {
                    plane.touched = true;
                    match to == plane.control.about().peer {
                        true => plane.own.push_back(bytes),
                        false => plane.outgoing.push((to, bytes)),
                    }
                }
                core.kick();
            };
            let note = crate::topology::Message::Run(Box::new(deliver));
            if let Err(flume::TrySendError::Full(note)) = topology.links[0].try_send(note)
                && !crate::cores::on_core()
            {
                // The disk's thread may wait a little. An answer that is dropped is asked for again.
                let _ = topology.links[0].inbox.send_timeout(note, DELIVERY);
                topology.links[0].signal.post();
            }
        };
        plane.disk.voter(job.voter, then);
    }
    for (token, end) in out.proposed {
        if let Some(to) = plane.proposals.remove(&token) {
            let _ = to.send(end);
        }
    }
    for event in &out.events {
        tell(event);
        match event {
            Event::Admitted(_) => {
                plane.admitted.get_or_insert_with(Instant::now);
                if let Some(verdict) = plane.verdict.take() {
                    let _ = verdict.send(Ok(()));
                }
            }
            Event::Refused(text) => {
                if let Some(verdict) = plane.verdict.take() {
                    let _ = verdict.send(Err(StartError::refused(text).into()));
                }
            }
            Event::Duplicate { .. } => {
                core.topology.fail("another process runs with this node's id: give each its own directory (--dir)");
            }
            _ => {}
        }
        // An application that does not listen misses events and holds nothing up.
        let _ = plane.events.try_send(event.clone());
    }
    if let Some((map, me)) = &out.adopt {
        if *me != NodeNo(0) {
            plane.disk.map(map.encode());
        }
        let alone = map.placements.iter().all(|placement| super::is_alone(placement, *me));
        plane.adopting = Some((map.epoch, alone, core.topology.cores()));
        plane.held = out.adopt;
    }
    let again = !plane.own.is_empty();
    drop(guard);
    spread(core);
    if let Some((alive, isolated)) = out.alive {
        for to in 0..core.topology.cores() {
            let alive: BTreeSet<NodeNo> = alive.clone();
            post(core, to, move |core| super::alive(core, alive, isolated));
        }
    }
    if let Some((quarantined, behind)) = out.quarantined {
        for to in 0..core.topology.cores() {
            post(core, to, move |core| super::quarantined(core, quarantined, behind));
        }
    }
    again
}

/// Gives the cores the map that they are to adopt. One that shares shards waits while the node is being emptied.
fn spread(core: &CoreRc) {
    let mut guard = core.plane.borrow_mut();
    let Some(plane) = &mut *guard else { return };
    let alone = plane.adopting.is_some_and(|(_, alone, _)| alone);
    if plane.held.is_none() || !alone && !core.topology.flushes.share() {
        return;
    }
    let Some((map, me)) = plane.held.take() else { return };
    drop(guard);
    for to in 0..core.topology.cores() {
        let map = map.clone();
        let adopt = move |core: &CoreRc| {
            super::adopt(core, &map, me);
            let epoch = map.epoch;
            post(core, 0, move |core| on_adopted(core, epoch));
        };
        post(core, to, adopt);
    }
}

/// What happens, for the log.
fn tell(event: &Event) {
    match event {
        Event::Admitted(no) => tracing::info!(number = no.0, "this node is a member of its cluster"),
        Event::Up(id) => tracing::info!(node = %id, "a node can be reached"),
        Event::Down(id) => tracing::warn!(node = %id, "a node cannot be reached"),
        Event::Left(id) => tracing::info!(node = %id, "a node has left"),
        Event::Isolated(true) => tracing::warn!("this node seems to be cut off from its cluster"),
        Event::Isolated(false) => tracing::info!("this node sees its cluster again"),
        Event::Quarantined { quarantined: true, ahead_ms } => tracing::error!(
            ahead_ms,
            "this node's clock is too far from those of the others: it coordinates no writes until the clock is mended (NTP)"
        ),
        Event::Quarantined { quarantined: false, ahead_ms } => {
            tracing::info!(ahead_ms, "this node's clock agrees with those of the others again");
        }
        Event::ClocksApart { node, ahead_ms } => {
            tracing::warn!(%node, ahead_ms, "the clock of another node is too far from this node's; one of them is wrong");
        }
        Event::Map(epoch) => tracing::debug!(epoch, "a new map"),
        Event::Moved { epoch, copies } => {
            let shards: BTreeSet<u16> = copies.iter().map(|moved| moved.shard).collect();
            tracing::info!(epoch, copies = copies.len(), shards = shards.len(), "copies of shards are elsewhere now");
        }
        Event::AtRisk(0) => tracing::info!("no shard is at risk any more"),
        Event::AtRisk(shards) => {
            tracing::warn!(
                shards,
                "data at risk: of these shards too few complete copies can be reached to write, or only one of several"
            );
        }
        Event::Refused(why) => tracing::error!(why, "the cluster does not admit this node"),
        Event::Duplicate { boot } => {
            tracing::error!(boot, "another process runs with this node's id; this one stops");
        }
        Event::Expelled => tracing::warn!("the cluster went on without this node; it comes back as a new one"),
    }
}

fn on_adopted(core: &CoreRc, epoch: u64) {
    if let Some(plane) = &mut *core.plane.borrow_mut()
        && let Some((adopting, alone, left)) = &mut plane.adopting
        && *adopting == epoch
    {
        plane.touched = true;
        *left -= 1;
        if *left == 0 {
            if *alone {
                core.topology.flushes.unshare();
            }
            plane.adopting = None;
            let now = plane.now();
            plane.control.on_adopted(now, epoch);
        }
    }
    core.kick();
}

pub(crate) fn on_filled(core: &CoreRc, shard: u16, epoch: u64) {
    if let Some(plane) = &mut *core.plane.borrow_mut() {
        plane.touched = true;
        let now = plane.now();
        plane.control.on_filled(now, shard, epoch);
    }
    core.kick();
}

pub(crate) fn on_wanted(core: &CoreRc, epoch: u64) {
    if let Some(plane) = &mut *core.plane.borrow_mut() {
        plane.touched = true;
        plane.control.on_wanted(epoch, &mut plane.out);
    }
    core.kick();
}

pub(crate) fn propose(core: &CoreRc, change: Change, to: oneshot::Sender<Result<(), String>>) {
    if let Some(plane) = &mut *core.plane.borrow_mut() {
        plane.touched = true;
        plane.next_token += 1;
        plane.proposals.insert(plane.next_token, to);
        let now = plane.now();
        plane.control.propose(now, plane.next_token, change, &mut plane.out);
    }
    core.kick();
}

/// What the control plane knows, without the cores' counters.
pub(crate) fn facts(core: &CoreRc) -> Option<ClusterView> {
    let plane = core.plane.borrow();
    let control = &plane.as_ref()?.control;
    Some(ClusterView {
        me: control.me(),
        map: control.map()?.clone(),
        alive: control.alive().clone(),
        leader: control.leader(),
        isolated: control.is_isolated(),
        quarantined: control.clock().0,
        clock_offset_ms: control.clock().1,
        disk_failed: plane.as_ref()?.disk.failed(),
        cores: Vec::new(),
    })
}

/// For how long the node has been a member.
pub(crate) fn member_for(core: &CoreRc) -> Option<Duration> {
    Some(core.plane.borrow().as_ref()?.admitted?.elapsed())
}

/// What the membership has counted.
pub(crate) fn gossiped(core: &CoreRc) -> Option<Gossiped> {
    let plane = core.plane.borrow();
    let Plane { control, gossip, .. } = plane.as_ref()?;
    let membership = control.membership()?;
    let suspects = membership.members().filter(|member| member.state == membership::State::Suspect).count();
    Some(Gossiped {
        doubt: membership.doubt(),
        suspects: suspects as u64,
        refused: membership.refused(),
        datagrams: gossip.counters(),
    })
}

/// Tells the others that this node leaves; it goes out with the last turns.
pub(crate) fn leave(core: &CoreRc) {
    if let Some(plane) = &mut *core.plane.borrow_mut() {
        plane.touched = true;
        let now = plane.now();
        plane.control.leave(now, &mut plane.out);
    }
}

/// The settings of the machines, from those of the node.
pub(crate) fn settings(config: &crate::config::ClusterConfig, start: Start, shards: u16, about: Candidate) -> Settings {
    Settings {
        start,
        shards,
        about,
        membership: membership::Settings::default(),
        planner: planner::Settings {
            replace_after_ms: config.replace_after.as_millis() as Millis,
            ..planner::Settings::default()
        },
    }
}
