//! Whole clusters of the machine, in virtual time: who finds whom, and how fast what went wrong is over.
//!
//! The times that are asserted here are those of the protocol: no clock is read, a seed gives the same run each time.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use foca::{Codec, Header, Member, Message};
use gridkv_engine::Millis;
use proptest::prelude::*;

use super::identity::{LEFT, Wire};
use super::packet::{self, Kind};
use super::rng::Seeded;
use super::{Event, Identity, Membership, Output, Settings, State};
use crate::ids::{NodeId, NodeNo, Now};

const CLUSTER: u64 = 77;

fn at(mono: Millis) -> Now {
    Now { mono, wall: 1_700_000_000_000 + mono }
}

fn id(node: usize) -> NodeId {
    NodeId(1000 + node as u128)
}

fn peer(node: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, node as u8 + 1], 7000))
}

fn identity(node: usize, boot: u64) -> Identity {
    Identity::new(id(node), boot, peer(node))
}

struct Node {
    machine: Option<Membership>,
    boot: u64,
    /// Only nodes of one side hear each other.
    side: u8,
    paused: bool,
    /// What has arrived during a pause.
    waiting: Vec<Parcel>,
    events: Vec<(Millis, Event)>,
}

/// Something under way: from, to, whether over the control link, bytes.
type Parcel = (usize, usize, bool, Vec<u8>);

/// Nodes, and a network between them that delays and loses.
struct World {
    now: Millis,
    rng: Seeded,
    nodes: Vec<Node>,
    under_way: BTreeMap<(Millis, u64), Parcel>,
    sent: u64,
    /// Datagrams lost, in a thousand.
    loss: u64,
    random_phases: bool,
}

impl World {
    /// Nodes that all know node 0 as their seed.
    fn new(nodes: usize, seed: u64) -> World {
        let node = || Node { machine: None, boot: 0, side: 0, paused: false, waiting: vec![], events: vec![] };
        World {
            now: 1000,
            rng: Seeded(seed),
            nodes: (0..nodes).map(|_| node()).collect(),
            under_way: BTreeMap::new(),
            sent: 0,
            loss: 0,
            random_phases: true,
        }
    }

    /// A cluster that has settled.
    fn settled(nodes: usize, seed: u64) -> World {
        let mut world = World::new(nodes, seed);
        world.start_all();
        world.run(10_000 + seed * 37);
        assert!(world.whole(), "seed {seed}: not settled");
        world
    }

    fn start_all(&mut self) {
        (0..self.nodes.len()).for_each(|node| self.start(node));
    }

    /// Starts a node under its next boot.
    fn start(&mut self, node: usize) {
        let boot = self.nodes[node].boot + 1;
        let seed = self.rng.below(u64::MAX);
        let settings =
            Settings { seeds: vec![peer(0), peer(1)], random_phases: self.random_phases, ..Settings::default() };
        let mut machine = Membership::new(CLUSTER, identity(node, boot), settings, seed);
        let mut out = Output::default();
        machine.join(at(self.now), [], &mut out);
        self.nodes[node].boot = boot;
        self.nodes[node].machine = Some(machine);
        self.collect(node, out);
    }

    fn kill(&mut self, node: usize) {
        self.nodes[node].machine = None;
    }

    fn collect(&mut self, from: usize, mut out: Output) {
        let mut messages: Vec<_> = out.datagrams().map(|(to, bytes)| (to, false, bytes)).collect();
        messages.extend(out.control().map(|(to, bytes)| (to, true, bytes)));
        for (to, control, bytes) in messages {
            let limit = if control { super::MAX_CONTROL } else { super::MAX_DATAGRAM };
            assert!(bytes.len() <= limit);
            let Some(to) = (0..self.nodes.len()).find(|node| peer(*node) == to) else { continue };
            if !control && self.rng.below(1000) < self.loss {
                continue;
            }
            self.sent += 1;
            let arrives = self.now + 1 + self.rng.below(2);
            self.under_way.insert((arrives, self.sent), (from, to, control, bytes));
        }
        let now = self.now;
        self.nodes[from].events.extend(out.events().map(|event| (now, event)));
    }

    /// Gives an input to a node, if it lives.
    fn input(&mut self, node: usize, give: impl FnOnce(&mut Membership, Now, &mut Output)) {
        let Some(machine) = &mut self.nodes[node].machine else { return };
        let mut out = Output::default();
        give(machine, at(self.now), &mut out);
        machine.invariants();
        self.collect(node, out);
    }

    fn deliver(&mut self, message: Parcel) {
        let (from, to, control, bytes) = message;
        if self.nodes[from].side != self.nodes[to].side {
            return;
        }
        if self.nodes[to].paused {
            self.nodes[to].waiting.push((from, to, control, bytes));
            return;
        }
        self.input(to, |machine, now, out| match control {
            true => machine.on_control(now, &bytes, out),
            false => machine.on_datagram(now, peer(from), &bytes, out),
        });
    }

    fn resume(&mut self, node: usize) {
        self.nodes[node].paused = false;
        self.input(node, Membership::on_deadline);
        for message in std::mem::take(&mut self.nodes[node].waiting) {
            self.deliver(message);
        }
    }

    /// Lets time pass.
    fn run(&mut self, millis: Millis) {
        self.run_until(millis, |_| false);
    }

    /// Lets time pass until something holds, looked at each 10 ms; how long it took, if it came about.
    fn run_until(&mut self, millis: Millis, mut done: impl FnMut(&World) -> bool) -> Option<Millis> {
        let start = self.now;
        loop {
            let awake = self.nodes.iter().filter(|node| !node.paused);
            let deadline = awake.filter_map(|node| node.machine.as_ref()?.next_deadline()).min();
            let arrival = self.under_way.first_key_value().map(|(key, _)| key.0);
            let look = self.now - self.now % 10 + 10;
            let next = look.min(deadline.unwrap_or(look)).min(arrival.unwrap_or(look)).max(self.now);
            if next >= start + millis {
                self.now = start + millis;
                return None;
            }
            self.now = next;
            while let Some(first) = self.under_way.first_entry().filter(|first| first.key().0 <= next) {
                let message = first.remove();
                self.deliver(message);
            }
            for node in 0..self.nodes.len() {
                if !self.nodes[node].paused {
                    self.input(node, Membership::on_deadline);
                }
            }
            if next == look && done(self) {
                return Some(self.now - start);
            }
        }
    }

    fn sees(&self, from: usize, to: usize) -> bool {
        self.nodes[from].machine.as_ref().is_some_and(|machine| machine.is_alive(id(to), self.nodes[to].boot))
    }

    fn living(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|node| self.nodes[*node].machine.is_some()).collect()
    }

    /// Whether every living node sees all living nodes and no other.
    fn whole(&self) -> bool {
        let living = self.living();
        living.iter().all(|from| (0..self.nodes.len()).all(|to| self.sees(*from, to) == living.contains(&to)))
    }

    fn events(&self, node: usize, since: Millis) -> Vec<Event> {
        self.nodes[node].events.iter().filter(|(at, _)| *at >= since).map(|(_, event)| *event).collect()
    }

    fn up(&self, node: usize, boot: u64) -> Event {
        Event::Up { id: id(node), boot, no: NodeNo(0), peer: peer(node) }
    }
}

fn down(node: usize, boot: u64) -> Event {
    Event::Down { id: id(node), boot }
}

#[test]
fn nodes_find_each_other_from_one_seed() {
    for nodes in [2, 3, 5] {
        for seed in 0..10 {
            let mut world = World::new(nodes, seed);
            world.start_all();
            let took = world.run_until(10_000, World::whole);
            assert!(took.is_some_and(|took| took <= 3000), "{nodes} nodes, seed {seed}: {took:?}");
        }
    }
}

#[test]
fn a_dead_node_is_known_to_all_in_time() {
    let mut times = Vec::new();
    for seed in 0..40 {
        let mut world = World::settled(5, seed);
        world.kill(3);
        let took = world.run_until(60_000, World::whole);
        times.push(took.unwrap_or_else(|| panic!("seed {seed}: never")));
        assert!((0..3).all(|node| world.events(node, 11_000 + seed * 37) == [down(3, 1)]), "seed {seed}");
    }
    times.sort_unstable();
    assert!(times[20] <= 3200 && times[39] <= 5000, "{times:?}");
}

#[test]
fn a_restart_is_a_death_and_a_birth() {
    for (seed, away) in [(1, 5), (2, 400), (3, 1700), (4, 8000)] {
        let mut world = World::settled(3, seed);
        world.kill(2);
        let before = world.now;
        world.run(away);
        world.start(2);
        let took = world.run_until(10_000, World::whole);
        assert!(took.is_some(), "seed {seed}: not whole");
        for node in [0, 1] {
            assert_eq!(world.events(node, before), [down(2, 1), world.up(2, 2)], "seed {seed}, node {node}");
            let machine = world.nodes[node].machine.as_ref().expect("it lives");
            let since = machine.down_since(id(2), 1).expect("the old life is over");
            assert!(since >= before && since <= world.now);
            assert_eq!(machine.down_since(id(2), 2), None);
        }
    }
}

#[test]
fn a_healed_partition_becomes_whole() {
    // With nodes in step, both sides bury each other and, at the first words after the heal, all take new names at once. Then nobody
    // is addressed by the name it has. The bare library stays like that in a quarter of these runs.
    let mut times = Vec::new();
    for seed in 0..60 {
        let mut world = World::new(5, seed);
        world.random_phases = false;
        world.start_all();
        world.run(10_000);
        assert!(world.whole(), "seed {seed}: not settled");
        (0..2).for_each(|node| world.nodes[node].side = 1);
        world.run(30_000);
        assert!(!world.sees(0, 2) && !world.sees(2, 0) && world.sees(0, 1), "seed {seed}: no partition");
        (0..2).for_each(|node| world.nodes[node].side = 0);
        let took = world.run_until(600_000, World::whole);
        times.push(took.unwrap_or_else(|| panic!("seed {seed}: stuck for ever")));
        let healed = world.now;
        world.run(20_000);
        assert!(world.whole() && (0..5).all(|node| world.events(node, healed + 2000).is_empty()), "seed {seed}");
        // Nobody has lost its data, so nobody may look as if.
        assert!(world.nodes.iter().all(|node| node.boot == 1));
    }
    times.sort_unstable();
    assert!(times[59] <= 15_000, "{times:?}");
}

#[test]
fn a_pause_of_four_seconds_is_survived() {
    for seed in 0..20 {
        let mut world = World::settled(5, seed);
        world.nodes[4].paused = true;
        let before = world.now;
        world.run(4000);
        world.resume(4);
        let took = world.run_until(30_000, World::whole);
        assert!(took.is_some_and(|took| took <= 5000), "seed {seed}: {took:?}");
        world.run(10_000);
        assert!(world.whole(), "seed {seed}: not for long");
        // The one that stood still buries nobody.
        let buried = world.events(4, before).into_iter().find(|event| matches!(event, Event::Down { .. }));
        assert_eq!(buried, None, "seed {seed}");
        // It was no crash: whoever saw it down sees the same life again.
        for node in 0..4 {
            let events = world.events(node, before);
            assert!(events.is_empty() || !events.contains(&world.up(4, 2)), "seed {seed}: {events:?}");
        }
    }
}

#[test]
fn a_pause_in_the_middle_of_a_probe_blames_nobody() {
    let mut machine = joined(CLUSTER);
    let mut out = Output::default();
    let mut now = 1000;
    let wake = |machine: &mut Membership, now: Millis, out: &mut Output| machine.on_deadline(at(now), out);
    let suspects =
        |machine: &Membership| machine.swim.iter_members().filter(|m| m.state() == foca::State::Suspect).count();
    while machine.probe.is_none() {
        now = machine.next_deadline().expect("it works");
        wake(&mut machine, now, &mut out);
    }
    let doubt = machine.doubt();
    wake(&mut machine, now + 4000, &mut out);
    assert_eq!(suspects(&machine), 0, "no time has passed for us");
    assert!(machine.doubt() > doubt);
    // But who stays silent while we are awake is suspected.
    for later in (4000..5000).step_by(50) {
        wake(&mut machine, now + later, &mut out);
    }
    assert_eq!(suspects(&machine), 1);
}

#[test]
fn loss_kills_nobody_where_no_third_can_help() {
    // Three nodes, one dead: the two others can ask nobody for an indirect probe. Besides, foca 2.0.0 told members whose objection it
    // had heard that they were dead, so that each suspicion ended in a change of name.
    let mut buried = Vec::new();
    for seed in 0..20 {
        let mut world = World::settled(3, seed);
        world.kill(2);
        world.run_until(10_000, World::whole).expect("a dead node is found");
        world.loss = 300;
        let before = world.now + 1;
        world.run(60_000);
        buried.extend((0..2).flat_map(|node| world.events(node, before)));
    }
    assert_eq!(buried, []);
}

#[test]
fn who_leaves_is_not_dead() {
    for seed in 0..10 {
        let mut world = World::settled(4, seed);
        let before = world.now;
        world.loss = 300;
        world.input(1, Membership::leave);
        world.nodes[1].boot = 0;
        let left = |world: &World| {
            [0, 2, 3].iter().all(|node| world.events(*node, before).last() == Some(&Event::Left { id: id(1), boot: 1 }))
        };
        let took = world.run_until(10_000, left);
        assert!(took.is_some_and(|took| took <= 1000), "seed {seed}: {took:?}");
        let line = |world: &World, node: usize| {
            let machine = world.nodes[node].machine.as_ref().expect("it lives");
            machine.members().find(|line| line.id == id(1)).map(|line| line.state)
        };
        world.loss = 0;
        world.run(20_000);
        assert!([0, 2, 3].iter().all(|node| line(&world, *node) == Some(State::Left)), "seed {seed}");
        assert_eq!(world.nodes[1].machine.as_ref().and_then(Membership::next_deadline), None);
    }
}

#[test]
fn the_smaller_side_knows_that_it_is_cut_off() {
    let mut world = World::settled(5, 3);
    for node in 0..5 {
        world.input(node, |machine, now, out| machine.on_map(now, (0..5).map(id), out));
    }
    (0..2).for_each(|node| world.nodes[node].side = 1);
    world.run(10_000);
    let isolated = |world: &World| -> Vec<bool> {
        let nodes = world.nodes.iter();
        nodes.map(|node| node.machine.as_ref().expect("all live").is_isolated()).collect()
    };
    assert_eq!(isolated(&world), [true, true, false, false, false]);
    (0..2).for_each(|node| world.nodes[node].side = 0);
    world.run_until(15_000, World::whole).expect("the heal");
    world.run(1);
    assert_eq!(isolated(&world), [false; 5]);
    let told: Vec<Event> = world.nodes[0].events.iter().map(|(_, event)| *event).collect();
    let told: Vec<&Event> = told.iter().filter(|event| matches!(event, Event::Isolated(_))).collect();
    assert_eq!(told, [&Event::Isolated(true), &Event::Isolated(false)]);
}

#[test]
fn a_second_process_with_our_id_is_noticed() {
    let mut world = World::settled(3, 1);
    let before = world.now;
    // Node 2 goes on while a copy of its directory is started elsewhere; the copy talks to node 0.
    let mut copy = identity(2, 9);
    copy.peer = SocketAddr::from(([10, 0, 0, 99], 7000));
    let mut machine = Membership::new(CLUSTER, copy, Settings::default(), 1);
    let mut out = Output::default();
    machine.join(at(world.now), [identity(0, 1)], &mut out);
    for (_, bytes) in out.datagrams() {
        world.input(0, |machine, now, out| machine.on_datagram(now, copy.peer, &bytes, out));
    }
    world.run(30_000);
    assert_eq!(world.events(2, before).first(), Some(&Event::DuplicateId { boot: 9 }));
    let told = world.events(2, before).into_iter().filter(|event| matches!(event, Event::DuplicateId { .. })).count();
    assert_eq!(told, 1, "once is enough");
}

/// A packet as another member would send it.
fn gossip(from: Identity, to: Identity, about: &[Member<Identity>]) -> Vec<u8> {
    let mut body = Vec::new();
    let header = Header { src: from, src_incarnation: 0, dst: to, message: Message::Gossip };
    Wire.encode_header(&header, &mut body).expect("a vector has room");
    body.extend(packet::write_list(about.iter()));
    body
}

fn joined(cluster: u64) -> Membership {
    let mut machine = Membership::new(cluster, identity(0, 1), Settings::default(), 7);
    machine.join(at(1000), [identity(1, 1)], &mut Output::default());
    machine
}

#[test]
fn another_cluster_and_another_version_are_refused() {
    let mut machine = joined(CLUSTER);
    let mut out = Output::default();
    let body = gossip(identity(2, 1), identity(0, 1), &[]);
    let strange = packet::frame(CLUSTER + 1, Kind::Gossip, &body);
    machine.on_datagram(at(1001), peer(2), &strange, &mut out);
    machine.on_control(at(1001), &strange, &mut out);
    let mut newer = packet::frame(CLUSTER, Kind::Gossip, &body);
    newer[2] += 1;
    machine.on_datagram(at(1001), peer(2), &newer, &mut out);
    // A list is not for datagrams.
    let list = packet::frame(CLUSTER, Kind::Ask, &packet::write_list([Member::alive(identity(2, 1))].iter()));
    machine.on_datagram(at(1001), peer(2), &list, &mut out);
    assert_eq!(out.datagrams().count() + out.control().count() + out.events().count(), 0);
    let refused = machine.refused();
    assert_eq!((refused.cluster, refused.version, refused.malformed), (2, 1, 1));
    assert!(!machine.is_alive(id(2), 1));

    machine.on_datagram(at(1001), peer(3), &packet::frame(CLUSTER, Kind::Gossip, &body), &mut out);
    assert!(machine.is_alive(id(2), 1), "the same in our cluster is heard");
    assert_eq!(machine.refused().elsewhere, 1, "and it came from elsewhere");
}

#[test]
fn strangers_without_number_are_not_all_remembered() {
    let mut machine = joined(CLUSTER);
    let mut out = Output::default();
    for round in 0..200_u64 {
        let stranger = |n| Identity { id: NodeId(u128::from(2000 + 20 * round + n)), ..identity(5, 1) };
        let about: Vec<_> = (0..20).map(|n| Member::alive(stranger(n))).collect();
        let body = gossip(identity(1, 1), identity(0, 1), &about);
        machine.on_datagram(at(1001 + round), peer(1), &packet::frame(CLUSTER, Kind::Gossip, &body), &mut out);
    }
    let kept = machine.members().count();
    assert!(kept > packet::MAX_TABLE - 20 && kept <= packet::MAX_TABLE, "{kept}");
    assert!(machine.refused().full > 0);
    machine.on_control(
        at(2000),
        &packet::frame(CLUSTER, Kind::Ask, &packet::write_list([Member::alive(identity(1, 1))].iter())),
        &mut out,
    );
    assert!(out.control().all(|(_, bytes)| bytes.len() <= super::MAX_CONTROL));
}

#[test]
fn the_last_name_is_kept_for_leaving() {
    let last = Identity { bump: LEFT - 1, ..identity(1, 1) };
    assert_eq!(foca::Identity::renew(&last), None);
    let next = foca::Identity::renew(&identity(1, 1)).expect("there are names left");
    assert_eq!((next.boot, next.bump), (1, 1));
    assert!(foca::Identity::win_addr_conflict(&next, &identity(1, 1)));
    assert!(foca::Identity::win_addr_conflict(&identity(1, 2), &next), "a new life wins over all names of the old");
}

fn any_identity() -> impl Strategy<Value = Identity> {
    let address = prop_oneof![
        any::<[u8; 4]>().prop_map(std::net::IpAddr::from),
        any::<[u8; 16]>().prop_map(std::net::IpAddr::from)
    ];
    // Few ids, ours among them, so that they meet.
    (
        1000..1006_u128,
        0..4_u64,
        prop_oneof![0..3_u16, Just(LEFT)],
        address,
        prop_oneof![Just(0), any::<u16>()],
        any::<u16>(),
    )
        .prop_map(|(node, boot, bump, ip, port, no)| Identity {
            id: NodeId(node),
            boot,
            bump,
            peer: SocketAddr::new(ip, port),
            no: NodeNo(no),
        })
}

fn any_member() -> impl Strategy<Value = Member<Identity>> {
    let state = prop_oneof![Just(foca::State::Alive), Just(foca::State::Suspect), Just(foca::State::Down)];
    (any_identity(), any::<u16>(), state).prop_map(|(id, incarnation, state)| Member::new(id, incarnation, state))
}

fn any_body() -> impl Strategy<Value = Vec<u8>> {
    let message = (0..10_u8, any_identity(), any::<u8>()).prop_map(|(kind, other, probe_number)| match kind {
        0 => Message::Ping(probe_number),
        1 => Message::Ack(probe_number),
        2 => Message::PingReq { target: other, probe_number },
        3 => Message::IndirectPing { origin: other, probe_number },
        4 => Message::IndirectAck { target: other, probe_number },
        5 => Message::ForwardedAck { origin: other, probe_number },
        6 => Message::Announce,
        7 => Message::Feed,
        8 => Message::Gossip,
        _ => Message::TurnUndead,
    });
    let about = prop::collection::vec(any_member(), 0..6);
    let to = prop_oneof![3 => Just(identity(0, 1)), 1 => any_identity()];
    (any_identity(), to, message, about, any::<bool>()).prop_map(|(src, dst, message, about, list)| {
        let mut body = Vec::new();
        if list {
            return packet::write_list(about.iter());
        }
        let bare = matches!(message, Message::Announce | Message::TurnUndead);
        let header = Header { src, src_incarnation: 3, dst, message };
        Wire.encode_header(&header, &mut body).expect("a vector has room");
        if !bare {
            body.extend(packet::write_list(about.iter()));
        }
        body
    })
}

proptest! {
    #[test]
    fn identities_survive_their_bytes(member in any_member()) {
        let mut bytes = Vec::new();
        Wire.encode_member(&member, &mut bytes).expect("a vector has room");
        let peer = member.id().peer;
        let reachable = peer.port() != 0 && !peer.ip().is_unspecified() && !peer.ip().is_multicast();
        let read = Wire.decode_member(&mut &bytes[..]);
        prop_assert_eq!(read.is_ok(), reachable && peer.ip() == peer.ip().to_canonical());
        if let Ok(read) = read {
            prop_assert_eq!(read, member);
        }
        for cut in 0..bytes.len() {
            prop_assert!(Wire.decode_member(&mut &bytes[..cut]).is_err());
        }
        let mut tight = [0; 34];
        prop_assert!(Wire.encode_member(&Member::alive(identity(1, 1)), &mut tight[..]).is_err());
    }

    #[test]
    fn nothing_that_arrives_breaks_the_machine(
        inputs in prop::collection::vec(
            (any_body(), prop::collection::vec((any::<u16>(), any::<u8>()), 0..3), 0..4_u8, 0..900_u64),
            1..40,
        ),
        noise in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut machine = joined(CLUSTER);
        let mut out = Output::default();
        let mut now = 1001;
        machine.on_datagram(at(now), peer(1), &noise, &mut out);
        machine.on_control(at(now), &noise, &mut out);
        for (mut body, flips, way, later) in inputs {
            for (place, value) in flips {
                let place = usize::from(place) % body.len();
                body[place] = value;
            }
            let kind = [Kind::Gossip, Kind::Gossip, Kind::Ask, Kind::Answer][usize::from(way)];
            let framed = packet::frame(CLUSTER, kind, &body);
            match way {
                0 => machine.on_datagram(at(now), peer(1), &framed, &mut out),
                _ => machine.on_control(at(now), &framed, &mut out),
            }
            now += later;
            machine.on_deadline(at(now), &mut out);
            machine.invariants();
            prop_assert!(machine.next_deadline().is_some_and(|next| next > now));
            prop_assert!(out.datagrams().all(|(to, bytes)| bytes.len() <= super::MAX_DATAGRAM && to.port() != 0));
            prop_assert_eq!(machine.identity().boot, 1);
        }
    }
}
