//! Who is there: gossip with suspicion, and the rules around it that make it settle.
//!
//! ```text
//!     datagrams ──▶ ┌────────────┐ ──▶ datagrams
//!  control link ──▶ │ Membership │ ──▶ control link: lists of members, copies of packets that must not be lost
//!          time ──▶ │   (foca)   │ ──▶ events: Up, Down, Left, Renamed, Isolated, DuplicateId, Expelled
//!                   └────────────┘     view: one line per node
//! ```
//!
//! **Decides** who is alive, suspect, down or left, as far as this node can tell. The protocol is SWIM with suspicion, from the crate
//! `foca`: each period a member probes one other; who does not answer it, nor three others on its behalf, is suspect, and
//! down if it does not object in time. Around it:
//!
//! 1. Until it is active, and after each change of its own name, a node announces itself every second to known members of any state
//!    and asks a seed for its list. Without this, members who all rename themselves when a partition heals
//!    address each other by names that are gone, and stay alone for ever.
//! 2. Every five seconds it exchanges its whole list with one known member of any state. Gossip alone has a long tail.
//! 3. Packets to a suspect, and those of an indirect probe, are also sent over the control link: of three nodes with one dead, the other
//!    two have no third to ask, and a lost datagram must not kill one of them.
//! 4. A node that has reason to doubt itself gives others more time ([`Membership::doubt`]): its timers are late, it was
//!    suspected, nobody at all was heard. A pause longer than a probe period counts as no time at all.
//! 5. A node that loses sight of half of the map at once is itself the suspect ([`Event::Isolated`]).
//! 6. Periodic work starts at random phases.
//!
//! **Promises**: a new life of a node (a greater `boot`) is always told as `Down` of the old one, if that was up, and `Up` of the new one. A
//! member that was wrongly held for dead comes back under another name of the same life, so it never looks as if it
//! had lost its data. Memory is bounded, whatever arrives.
//!
//! **Never** decides who owns data: that is the map's. Nothing here is authenticated: the cluster's number keeps strangers apart, not
//! enemies.
//!
//! Das, Gupta, Motivala, "SWIM", DSN 2002; Dadgar, Phillips, Currey, "Lifeguard", DSN-W 2018. How it is tested, and
//! all timers: `docs/protocols/membership.md`.

mod identity;
mod packet;
mod rng;
#[cfg(test)]
mod tests;
mod timers;
mod view;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::num::{NonZeroU8, NonZeroUsize};
use std::time::Duration;

use foca::{Codec, Foca, Header, Member, Message, NoCustomBroadcast, Notification, PeriodicParams, Timer};
use gridkv_engine::Millis;

use crate::ids::{NodeId, Now};

pub use identity::Identity;
use identity::Wire;
use packet::{Kind, Refusal};
use rng::Seeded;
use timers::Timers;
use view::View;
pub use view::{Event, MemberView, State};

/// Bytes of a datagram, at most.
pub const MAX_DATAGRAM: usize = packet::FRAME + packet::MAX_PACKET;
/// Bytes of a message over the control link, at most.
pub const MAX_CONTROL: usize = packet::MAX_LIST;
/// The most that a node doubts itself.
const MAX_DOUBT: u64 = 8;
/// Known members that are announced to at once, and helpers of an indirect probe.
const FAN_OUT: usize = 3;
/// Members that are told over the control link that this node leaves.
const FAREWELLS: usize = 8;

/// The times of the protocol, in milliseconds. The default finds a dead node in about three seconds and bears pauses of two.
#[derive(Clone, Debug)]
pub struct Settings {
    /// One member is probed each time.
    pub probe_period: Millis,
    /// How long an answer may take until others are asked to probe as well; less than the period.
    pub probe_rtt: Millis,
    /// How long a suspect may object, when this node does not doubt itself.
    pub suspect: Millis,
    /// How often news are passed on, while there are any.
    pub gossip: Millis,
    /// How often a random live member is asked for those that it knows.
    pub announce: Millis,
    /// How often two random dead members are tried.
    pub announce_down: Millis,
    /// How long a dead member is remembered.
    pub remember_down: Millis,
    /// How often a node that is not active announces itself.
    pub rejoin: Millis,
    /// How often lists are exchanged.
    pub exchange: Millis,
    /// How often the view is drawn anew without a reason.
    pub reread: Millis,
    /// Peer addresses of nodes that may be there.
    pub seeds: Vec<SocketAddr>,
    /// Periodic work starts at a random point of its period. Off in tests that want nodes in step.
    pub(crate) random_phases: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            probe_period: 500,
            probe_rtt: 150,
            suspect: 2000,
            gossip: 100,
            announce: 10_000,
            announce_down: 5000,
            remember_down: 24 * 60 * 60 * 1000,
            rejoin: 1000,
            exchange: 5000,
            reread: 1000,
            seeds: Vec::new(),
            random_phases: true,
        }
    }
}

impl Settings {
    /// The library's form of it, at some doubt and size of the cluster.
    fn swim(&self, doubt: u64, members: usize) -> foca::Config {
        let time = |millis: Millis| Duration::from_millis(millis.max(1));
        let every = |millis: Millis, members: usize| {
            Some(PeriodicParams { frequency: time(millis), num_members: count(members) })
        };
        // Four times the decimal logarithm of the cluster's size: how often a piece of news is passed on.
        let transmissions: u8 = match members {
            0..=30 => 6,
            31..=99 => 8,
            100..=315 => 10,
            316..=999 => 12,
            _ => 14,
        };
        foca::Config {
            probe_period: time(self.probe_period.max(2)),
            probe_rtt: time(self.probe_rtt.min(self.probe_period.max(2) - 1)),
            num_indirect_probes: count(FAN_OUT),
            max_transmissions: NonZeroU8::new(transmissions).expect("none of these is zero"),
            suspect_to_down_after: time(self.suspect * (1 + doubt)),
            remove_down_after: Some(time(self.remember_down)),
            max_packet_size: count(packet::MAX_PACKET),
            notify_down_members: true,
            periodic_announce: every(self.announce, 1),
            periodic_announce_to_down_members: every(self.announce_down, 2),
            periodic_gossip: every(self.gossip, FAN_OUT),
        }
    }
}

fn count(n: usize) -> NonZeroUsize {
    NonZeroUsize::new(n).expect("counts of members and bytes are not zero")
}

/// What the driver has to do; it only drains it.
#[derive(Debug, Default)]
pub struct Output {
    datagrams: Vec<(SocketAddr, Vec<u8>)>,
    control: Vec<(SocketAddr, Vec<u8>)>,
    events: Vec<Event>,
}

impl Output {
    /// Datagrams to send; they may be lost.
    pub fn datagrams(&mut self) -> impl Iterator<Item = (SocketAddr, Vec<u8>)> + '_ {
        self.datagrams.drain(..)
    }

    /// Messages for the control links to these peer addresses, for [`Membership::on_control`] there. They may be dropped where there is no link.
    pub fn control(&mut self) -> impl Iterator<Item = (SocketAddr, Vec<u8>)> + '_ {
        self.control.drain(..)
    }

    /// What has changed, oldest first.
    pub fn events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    fn event(&mut self, event: Event) {
        self.events.push(event);
    }
}

/// What arrived and was not used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// Not in our format.
    pub malformed: u64,
    /// In another version of it.
    pub version: u64,
    /// Of another cluster.
    pub cluster: u64,
    /// It names more members than are remembered.
    pub full: u64,
    /// The library could do nothing with it, such as our own packets.
    pub unusable: u64,
    /// Used all the same, but sent from another host than the sender says: its configured address may be wrong.
    pub elsewhere: u64,
}

type Swim = Foca<Identity, Wire, Seeded, NoCustomBroadcast>;

/// What the library wants done, until it is done.
#[derive(Default)]
struct Effects {
    sends: Vec<(Identity, Vec<u8>)>,
    timers: Vec<(Timer<Identity>, Millis)>,
    /// Whether we are active after this, where that has changed.
    active: Option<bool>,
    /// Whether periodic work was started.
    started: bool,
    /// Whether we can no longer come back.
    defunct: bool,
    /// Whether some member has changed.
    changed: bool,
}

impl foca::Runtime<Identity> for Effects {
    fn notify(&mut self, notification: Notification<'_, Identity>) {
        match notification {
            Notification::MemberUp(_) | Notification::MemberDown(_) | Notification::Rename(..) => self.changed = true,
            Notification::Active => (self.active, self.started) = (Some(true), true),
            Notification::Idle | Notification::Rejoin(_) => self.active = Some(false),
            Notification::Defunct => (self.active, self.defunct) = (Some(false), true),
        }
    }

    fn send_to(&mut self, to: Identity, data: &[u8]) {
        self.sends.push((to, data.to_vec()));
    }

    fn submit_after(&mut self, event: Timer<Identity>, after: Duration) {
        self.timers.push((event, after.as_millis() as Millis));
    }
}

/// The probe that runs.
#[derive(Debug)]
struct Probe {
    number: u8,
    target: Identity,
    /// Whether anything of anybody has arrived since.
    heard: bool,
}

/// See the head of the file.
pub struct Membership {
    cluster: u64,
    settings: Settings,
    swim: Swim,
    rng: Seeded,
    timers: Timers,
    view: View,
    joined: bool,
    left: bool,
    active: bool,
    /// Our incarnation, as our last packet had it.
    incarnation: u16,
    probe: Option<Probe>,
    doubt: u64,
    /// What the library was last configured with: doubt, and number of members.
    configured: (u64, usize),
    /// The greatest life that others were seen to know instead of ours.
    duplicate: Option<u64>,
    announce_at: Option<Millis>,
    exchange_at: Millis,
    reread_at: Millis,
    refused: Refused,
}

impl Membership {
    /// A node that knows nobody and does nothing before [`Membership::join`].
    pub fn new(cluster: u64, us: Identity, settings: Settings, seed: u64) -> Membership {
        let us = Identity { bump: us.bump, no: us.no, ..Identity::new(us.id, us.boot, us.peer) };
        Membership {
            cluster,
            swim: Foca::new(us, settings.swim(0, 1), Seeded(seed), Wire),
            rng: Seeded(!seed),
            settings,
            timers: Timers::default(),
            view: View::default(),
            joined: false,
            left: false,
            active: false,
            incarnation: 0,
            probe: None,
            doubt: 0,
            configured: (0, 1),
            duplicate: None,
            announce_at: None,
            exchange_at: 0,
            reread_at: 0,
            refused: Refused::default(),
        }
    }

    /// Our present name.
    pub fn identity(&self) -> &Identity {
        self.swim.identity()
    }

    /// Whether this node has to think that it is the one cut off.
    pub fn is_isolated(&self) -> bool {
        self.view.isolated()
    }

    /// How much this node doubts itself, 0 to 8. Suspects get one more suspect time for each.
    pub fn doubt(&self) -> u64 {
        self.doubt
    }

    /// What arrived and was not used.
    pub fn refused(&self) -> Refused {
        self.refused
    }

    /// All other nodes that are remembered, by id.
    pub fn members(&self) -> impl Iterator<Item = &MemberView> {
        self.view.members()
    }

    /// Whether this life of a node is there; suspects are.
    pub fn is_alive(&self, id: NodeId, boot: u64) -> bool {
        let us = self.identity();
        match id == us.id {
            true => us.boot == boot && !self.left,
            false => self.view.get(id).is_some_and(|line| line.boot == boot && line.state.is_up()),
        }
    }

    /// Since when (`mono` of this node) this life of a node is known to be out of reach or over; `None` if it is there, or not known.
    pub fn down_since(&self, id: NodeId, boot: u64) -> Option<Millis> {
        self.view.down_since(id, boot)
    }

    /// Starts to take part, with the members known from before and with the seeds of the settings.
    pub fn join(&mut self, now: Now, known: impl IntoIterator<Item = Identity>, out: &mut Output) {
        if self.joined {
            return;
        }
        self.joined = true;
        self.announce_at = Some(now.mono + self.rng.about(self.settings.rejoin).max(1));
        self.exchange_at = now.mono + 1 + self.rng.below(self.settings.exchange.max(1));
        self.reread_at = now.mono + 1 + self.rng.below(self.settings.reread.max(1));
        let known: Vec<_> = known.into_iter().map(Member::alive).take(packet::MAX_TABLE).collect();
        self.learn(now.mono, known, out);
        self.announce(now.mono, out);
        self.check();
    }

    /// Which nodes the map has now: what [`Event::Isolated`] is measured by.
    pub fn on_map(&mut self, now: Now, nodes: impl IntoIterator<Item = NodeId>, out: &mut Output) {
        self.view.map(self.swim.identity().id, nodes.into_iter());
        self.reread(now.mono, out);
    }

    /// Tells the others that this node leaves, and falls silent.
    pub fn leave(&mut self, now: Now, out: &mut Output) {
        if self.left {
            return;
        }
        self.left = true;
        self.rename(now.mono, Identity { bump: identity::LEFT, ..*self.identity() }, out);
        self.drive(now.mono, out, |swim, effects| swim.leave_cluster(effects));
        let up: Vec<Identity> = self.swim.iter_members().map(|member| *member.id()).collect();
        for member in self.some_of(up, FAREWELLS) {
            self.send_list(member.peer, Kind::Answer, out);
        }
        self.timers.clear();
        (self.active, self.announce_at, self.probe) = (false, None, None);
        self.check();
    }

    /// A datagram has arrived from a socket address.
    pub fn on_datagram(&mut self, now: Now, from: SocketAddr, bytes: &[u8], out: &mut Output) {
        match self.unframe(bytes) {
            Some((Kind::Gossip, body)) => self.on_packet(now.mono, Some(from), body, out),
            Some(_) => self.refused.malformed += 1,
            None => {}
        }
        self.check();
    }

    /// A message of [`Output::control`] has arrived over a control link.
    pub fn on_control(&mut self, now: Now, bytes: &[u8], out: &mut Output) {
        match self.unframe(bytes) {
            Some((Kind::Gossip, body)) => self.on_packet(now.mono, None, body, out),
            Some((kind, body)) => self.on_list(now.mono, kind, body, out),
            None => {}
        }
        self.check();
    }

    /// When this machine wants to be woken at the latest.
    pub fn next_deadline(&self) -> Option<Millis> {
        if !self.joined || self.left {
            return None;
        }
        let own = self.exchange_at.min(self.reread_at).min(self.announce_at.unwrap_or(Millis::MAX));
        Some(own.min(self.timers.next().unwrap_or(Millis::MAX)))
    }

    /// Does what is due.
    pub fn on_deadline(&mut self, now: Now, out: &mut Output) {
        let now = now.mono;
        let Some(due) = self.next_deadline().filter(|due| *due <= now) else { return };
        let late = now - due;
        if late > self.settings.probe_rtt {
            self.doubt_more();
        }
        if late > self.settings.probe_period {
            // We stood still, not the others: who owes us an answer gets the time that it had left.
            self.timers.postpone(late);
        }
        while let Some(timer) = self.timers.due(now) {
            if self.is_refuted(&timer) {
                continue;
            }
            self.drive(now, out, |swim, effects| swim.handle_timer(timer, effects));
        }
        if self.announce_at.is_some_and(|at| at <= now) {
            self.announce_at = Some(now + self.rng.about(self.settings.rejoin).max(1));
            self.announce(now, out);
        }
        if self.exchange_at <= now {
            self.exchange_at = now + self.rng.about(self.settings.exchange).max(1);
            self.exchange(out);
        }
        if self.reread_at <= now {
            self.reread_at = now + self.settings.reread.max(1);
            self.reread(now, out);
        }
        self.check();
    }

    /// Panics where this machine broke its own word.
    pub fn invariants(&self) {
        self.timers.invariants(packet::MAX_TABLE);
        self.view.invariants(self.swim.identity().id);
        assert!(self.doubt <= MAX_DOUBT);
        assert!(self.swim.iter_membership_state().len() <= packet::MAX_TABLE);
        assert!(!(self.active && self.announce_at.is_some()), "who is active does not ask to be");
        let waits = self.active || self.announce_at.is_some();
        assert!(!self.joined || self.left || waits, "who is not active asks to be");
    }

    fn check(&self) {
        if cfg!(debug_assertions) {
            self.invariants();
        }
    }

    fn unframe<'a>(&mut self, bytes: &'a [u8]) -> Option<(Kind, &'a [u8])> {
        if !self.joined || self.left {
            return None;
        }
        match packet::unframe(self.cluster, bytes) {
            Ok(found) => return Some(found),
            Err(Refusal::Malformed) => self.refused.malformed += 1,
            Err(Refusal::Version) => self.refused.version += 1,
            Err(Refusal::Cluster) => self.refused.cluster += 1,
        }
        None
    }

    fn on_packet(&mut self, now: Millis, from: Option<SocketAddr>, body: &[u8], out: &mut Output) {
        let Ok((header, members)) = packet::read_packet(body) else {
            self.refused.malformed += 1;
            return;
        };
        if from.is_some_and(|from| from.ip().to_canonical() != header.src.peer.ip()) {
            self.refused.elsewhere += 1;
        }
        self.look_for_us(std::iter::once(&header.src).chain(members.iter().map(Member::id)), out);
        if !self.has_room(std::iter::once(&header.src).chain(members.iter().map(Member::id))) {
            self.refused.full += 1;
            return;
        }
        if let Some(probe) = &mut self.probe {
            probe.heard = true;
            if header.message == Message::Ack(probe.number) && header.src == probe.target {
                self.doubt = self.doubt.saturating_sub(1);
            }
        }
        if !self.drive(now, out, |swim, effects| swim.handle_data(body, effects)) {
            self.refused.unusable += 1;
        }
    }

    fn on_list(&mut self, now: Millis, kind: Kind, body: &[u8], out: &mut Output) {
        let Ok(members) = packet::read_list(body) else {
            self.refused.malformed += 1;
            return;
        };
        let sender = *members[0].id();
        self.look_for_us(members.iter().map(Member::id), out);
        if !self.has_room(members.iter().map(Member::id)) {
            self.refused.full += 1;
            return;
        }
        self.learn(now, members, out);
        if kind == Kind::Ask && sender.id != self.identity().id {
            self.send_list(sender.peer, Kind::Answer, out);
        }
    }

    /// Whether the table can take all of these.
    fn has_room<'a>(&self, named: impl Iterator<Item = &'a Identity>) -> bool {
        let named: BTreeSet<NodeId> = named.map(|identity| identity.id).collect();
        let table = self.swim.iter_membership_state();
        let known = table.len();
        // Sure to fit, which is almost always so, and is decided without a look at the table.
        if known + named.len() <= packet::MAX_TABLE {
            return true;
        }
        let already = table.filter(|member| named.contains(&member.id().id)).count();
        known + named.len() - already <= packet::MAX_TABLE
    }

    /// Tells once if somebody else lives under our id.
    fn look_for_us<'a>(&mut self, named: impl Iterator<Item = &'a Identity>, out: &mut Output) {
        let us = *self.identity();
        let other = named
            .filter(|other| other.id == us.id && **other != us)
            .filter(|other| {
                (other.boot, other.bump) > (us.boot, us.bump) || (other.boot == us.boot && other.peer != us.peer)
            })
            .map(|other| other.boot)
            .max();
        if let Some(boot) = other.filter(|boot| self.duplicate.is_none_or(|told| *boot > told)) {
            self.duplicate = other;
            out.event(Event::DuplicateId { boot });
        }
    }

    fn learn(&mut self, now: Millis, members: Vec<Member<Identity>>, out: &mut Output) {
        self.drive(now, out, |swim, effects| swim.apply_many(members.into_iter(), true, effects));
    }

    fn rename(&mut self, now: Millis, next: Identity, out: &mut Output) {
        self.drive(now, out, |swim, effects| {
            effects.active = Some(false);
            swim.change_identity(next, effects)
        });
    }

    /// Calls the library and does what it wants done. False if it could not use its input.
    fn drive(
        &mut self,
        now: Millis,
        out: &mut Output,
        call: impl FnOnce(&mut Swim, &mut Effects) -> Result<(), foca::Error>,
    ) -> bool {
        let mut effects = Effects::default();
        let before = *self.identity();
        let used = call(&mut self.swim, &mut effects).is_ok();
        if before != *self.identity() {
            // Another name starts with its own count of objections, and without a probe.
            (self.incarnation, self.probe) = (0, None);
        }
        if let Some(active) = effects.active {
            self.active = active;
            self.announce_at = match active || self.left || !self.joined {
                true => None,
                false => Some(now + 1 + self.rng.below(self.settings.rejoin / 4 + 1)),
            };
        }
        for (timer, after) in effects.timers {
            let periodic = !matches!(
                timer,
                Timer::RemoveDown(_) | Timer::ChangeSuspectToDown { .. } | Timer::SendIndirectProbe { .. }
            );
            let after = if effects.started && periodic && self.settings.random_phases {
                1 + self.rng.below(after.max(1))
            } else {
                after.max(1)
            };
            self.timers.submit(now + after, timer);
        }
        for (to, data) in effects.sends {
            self.send(to, &data, out);
        }
        if effects.defunct && !self.left {
            out.event(Event::Expelled);
        }
        if effects.changed {
            self.reread(now, out);
        }
        self.configure();
        used
    }

    fn send(&mut self, to: Identity, data: &[u8], out: &mut Output) {
        let us = *self.identity();
        // Former names of ours are in the table too.
        if to.id == us.id {
            return;
        }
        let header: Header<Identity> = Wire.decode_header(data).expect("the library writes what we can read");
        if header.src == us {
            if header.src_incarnation > self.incarnation {
                // We were suspected and had to object.
                self.doubt_more();
            }
            self.incarnation = header.src_incarnation;
        }
        if let Message::Ping(number) = header.message {
            let unheard = self.probe.replace(Probe { number, target: to, heard: false });
            if unheard.is_some_and(|probe| !probe.heard) {
                self.doubt_more();
            }
        }
        let indirect = matches!(
            header.message,
            Message::PingReq { .. }
                | Message::IndirectPing { .. }
                | Message::IndirectAck { .. }
                | Message::ForwardedAck { .. }
        );
        let framed = packet::frame(self.cluster, Kind::Gossip, data);
        if indirect || self.is_suspect(&to) {
            out.control.push((to.peer, framed.clone()));
        }
        out.datagrams.push((to.peer, framed));
    }

    /// Whether this is the end of a suspicion that was answered. The library (2.0.0) leaves such a member alive, but tells it all the same
    /// that it is dead, and then it changes its name for nothing.
    fn is_refuted(&self, timer: &Timer<Identity>) -> bool {
        match timer {
            Timer::ChangeSuspectToDown { member_id, incarnation, .. } => {
                let suspect = Member::new(*member_id, *incarnation, foca::State::Suspect);
                !self.swim.iter_members().any(|known| *known == suspect)
            }
            _ => false,
        }
    }

    fn is_suspect(&self, member: &Identity) -> bool {
        self.swim.iter_members().any(|known| known.id() == member && known.state() == foca::State::Suspect)
    }

    fn doubt_more(&mut self) {
        self.doubt = (self.doubt + 1).min(MAX_DOUBT);
    }

    /// Tells the library what our doubt and the size of the cluster mean for it.
    fn configure(&mut self) {
        let wanted = (self.doubt, self.swim.num_members() + 1);
        if wanted != self.configured {
            self.configured = wanted;
            let config = self.settings.swim(wanted.0, wanted.1);
            self.swim.set_config(config).expect("neither the period nor the round trip ever changes");
        }
    }

    fn reread(&mut self, now: Millis, out: &mut Output) {
        let us = self.swim.identity().id;
        self.view.read(now, us, self.swim.iter_membership_state(), out);
        self.view.guard(now, 2 * self.settings.suspect, out);
    }

    /// Members of any state, without us.
    fn known(&self) -> Vec<Identity> {
        let us = self.identity().id;
        self.swim.iter_membership_state().map(|member| *member.id()).filter(|member| member.id != us).collect()
    }

    /// Seeds at which no member is known.
    fn strange_seeds(&self, known: &[Identity]) -> Vec<SocketAddr> {
        let us = self.identity().peer;
        let strange = |seed: &&SocketAddr| **seed != us && known.iter().all(|member| member.peer != **seed);
        self.settings.seeds.iter().filter(strange).copied().collect()
    }

    /// Picks at random, in random order.
    fn some_of<T>(&mut self, mut all: Vec<T>, wanted: usize) -> Vec<T> {
        for place in 0..wanted.min(all.len()) {
            let chosen = place + self.rng.below((all.len() - place) as u64) as usize;
            all.swap(place, chosen);
        }
        all.truncate(wanted);
        all
    }

    fn announce(&mut self, now: Millis, out: &mut Output) {
        let known = self.known();
        for member in self.some_of(known, FAN_OUT) {
            self.drive(now, out, |swim, effects| swim.announce(member, effects));
        }
        let us = self.identity().peer;
        let seeds = self.settings.seeds.iter().filter(|seed| **seed != us).copied().collect();
        for seed in self.some_of(seeds, 1) {
            self.send_list(seed, Kind::Ask, out);
        }
    }

    fn exchange(&mut self, out: &mut Output) {
        let known = self.known();
        let mut peers = self.strange_seeds(&known);
        peers.extend(known.iter().map(|member| member.peer));
        for peer in self.some_of(peers, 1) {
            self.send_list(peer, Kind::Ask, out);
        }
    }

    fn send_list(&self, to: SocketAddr, kind: Kind, out: &mut Output) {
        let state = if self.left { foca::State::Down } else { foca::State::Alive };
        let us = Member::new(*self.identity(), self.incarnation, state);
        let others = self.swim.iter_membership_state().filter(|member| member.id().id != us.id().id);
        let body = packet::write_list(std::iter::once(&us).chain(others));
        out.control.push((to, packet::frame(self.cluster, kind, &body)));
    }
}
