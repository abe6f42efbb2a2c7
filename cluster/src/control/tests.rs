//! Control planes with each other, on a network of this test's own: messages take a millisecond, unless they are cut.

use std::collections::{BTreeMap, BinaryHeap};
use std::net::SocketAddr;

use super::*;
use crate::map::Stage;
use crate::map::testing::candidate;

enum What {
    Datagram(SocketAddr, Vec<u8>),
    Message(Vec<u8>),
}

struct Arrival {
    at: Millis,
    seq: u64,
    to: SocketAddr,
    what: What,
}

impl PartialEq for Arrival {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.seq) == (other.at, other.seq)
    }
}
impl Eq for Arrival {}
impl PartialOrd for Arrival {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Arrival {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.seq).cmp(&(self.at, self.seq))
    }
}

#[derive(Default)]
struct World {
    now: Millis,
    seq: u64,
    nodes: BTreeMap<SocketAddr, Control>,
    disks: BTreeMap<NodeId, Remembered>,
    network: BinaryHeap<Arrival>,
    events: Vec<(NodeId, Event)>,
    cut: Vec<(SocketAddr, SocketAddr)>,
    /// Whose disks have failed, so that they do not vote.
    mute: BTreeSet<SocketAddr>,
    /// By how much clocks are ahead.
    ahead: BTreeMap<SocketAddr, i64>,
    /// What cores were told of their node's clock.
    quarantined: BTreeMap<SocketAddr, (bool, Millis)>,
}

const QUORUMS: Quorums = Quorums { n: 3, w: 2, r: 2 };

fn founder() -> Start {
    Start::Found { cluster: 77, seed: 5, shards: 32, quorums: QUORUMS }
}

fn seeds() -> Start {
    Start::Join(vec![candidate(1, 0).peer])
}

fn settings(start: Start, about: Candidate) -> Settings {
    let (membership, planner) = (membership::Settings::default(), planner::Settings::default());
    Settings { start, shards: 32, about, membership, planner }
}

impl World {
    fn clock(&self) -> Now {
        Now { mono: self.now, wall: 1_000_000 + self.now }
    }

    fn clock_of(&self, at: SocketAddr) -> Now {
        let Now { mono, wall } = self.clock();
        Now { mono, wall: wall.saturating_add_signed(self.ahead.get(&at).copied().unwrap_or(0)) }
    }

    fn start(&mut self, n: u16, boot: u64, start: Start) {
        self.start_as(candidate(n, boot), start);
    }

    fn start_as(&mut self, about: Candidate, start: Start) {
        let seed = about.id.0 as u64 * 1000 + about.boot;
        let settings = settings(start, about.clone());
        let remembered = self.disks.entry(about.id).or_default().clone();
        self.nodes.insert(about.peer, Control::new(settings, remembered, seed));
    }

    fn kill(&mut self, n: u16) {
        self.nodes.remove(&candidate(n, 0).peer);
    }

    fn push(&mut self, from: SocketAddr, to: SocketAddr, what: What) {
        if !self.cut.contains(&(from, to)) {
            self.seq += 1;
            self.network.push(Arrival { at: self.now + 1, seq: self.seq, to, what });
        }
    }

    /// Does what one node wants; its cores adopt and fill at once.
    fn act(&mut self, at: SocketAddr, mut out: Output) {
        for (to, bytes) in out.datagrams.drain(..) {
            self.push(at, to, What::Datagram(at, bytes));
        }
        for (to, bytes) in out.messages.drain(..) {
            self.push(at, to, What::Message(bytes));
        }
        let id = self.nodes[&at].about().id;
        if self.mute.contains(&at) {
            out.disk.clear();
        }
        for Disk { voter, then } in out.disk.drain(..) {
            if let Some(bytes) = voter {
                let disk = self.disks.get_mut(&id).unwrap();
                disk.voter = register::slots::decode_state(&bytes).unwrap();
            }
            if let Some((to, bytes)) = then {
                self.push(at, to, What::Message(bytes));
            }
        }
        self.events.extend(out.events.drain(..).map(|event| (id, event)));
        if let Some(quarantined) = out.quarantined {
            self.quarantined.insert(at, quarantined);
        }
        let now = self.clock_of(at);
        if let Some((map, me)) = out.adopt.take() {
            self.disks.get_mut(&id).unwrap().map = Some((*map).clone());
            let control = self.nodes.get_mut(&at).unwrap();
            control.on_adopted(now, map.epoch);
            for (shard, placement) in map.placements.iter().enumerate().filter(|(_, p)| p.is_filling(me)) {
                control.on_filled(now, shard as u16, placement.epoch);
            }
        }
        self.nodes[&at].invariants();
    }

    fn run_until(&mut self, deadline: Millis, mut done: impl FnMut(&World) -> bool) -> bool {
        let end = self.now + deadline;
        while self.now < end {
            if done(self) {
                return true;
            }
            let timers = self.nodes.values().filter_map(Control::next_deadline).min().unwrap_or(end);
            let arrivals = self.network.peek().map_or(end, |arrival| arrival.at);
            self.now = timers.min(arrivals).max(self.now).min(end);
            while self.network.peek().is_some_and(|arrival| arrival.at <= self.now) {
                let Arrival { to, what, .. } = self.network.pop().unwrap();
                let now = self.clock_of(to);
                let Some(control) = self.nodes.get_mut(&to) else { continue };
                let mut out = Output::default();
                match what {
                    What::Datagram(from, bytes) => control.on_datagram(now, from, &bytes, &mut out),
                    What::Message(bytes) => control.on_message(now, &bytes, &mut out),
                }
                self.act(to, out);
            }
            let due = self.nodes.iter().filter(|(_, c)| c.next_deadline().is_some_and(|at| at <= self.now));
            let due: Vec<_> = due.map(|(at, _)| *at).collect();
            for at in due {
                let mut out = Output::default();
                let now = self.clock_of(at);
                self.nodes.get_mut(&at).unwrap().on_deadline(now, &mut out);
                self.act(at, out);
            }
        }
        done(self)
    }

    /// Whether all nodes share a map in which every shard rests on `copies` replicas that serve.
    fn at_rest(&self, nodes: usize, copies: usize) -> bool {
        let mut maps = self.nodes.values().map(|control| control.map());
        let Some(Some(first)) = maps.next() else { return false };
        let same = maps.all(|map| map.is_some_and(|map| map.epoch == first.epoch));
        let alive = self.nodes.values().all(|control| control.alive().len() == nodes && control.me() != NodeNo(0));
        let full = first
            .placements
            .iter()
            .all(|p| p.stage == Stage::Normal && p.replicas.len() == copies && p.replicas.iter().all(|r| !r.filling));
        same && alive && full && first.present().count() == nodes && first.next_voters.is_empty()
    }

    fn three(&mut self) {
        self.start(1, 1, founder());
        self.start(2, 1, seeds());
        self.start(3, 1, seeds());
        assert!(self.run_until(60_000, |world| world.at_rest(3, 3)), "{:?}", self.nodes);
    }
}

#[test]
fn three_nodes_become_a_cluster_with_three_copies_and_three_voters() {
    let mut world = World::default();
    world.three();
    let map = world.nodes.values().next().unwrap().map().unwrap().clone();
    assert_eq!((map.cluster, map.voters.len()), (77, 3));
    assert!(world.now < 15_000, "it took {} ms", world.now);
}

#[test]
fn a_killed_node_comes_back_as_another_life_and_is_filled() {
    let mut world = World::default();
    world.three();
    world.kill(2);
    let gone = |world: &World| world.nodes.values().all(|control| control.alive().len() == 2);
    assert!(world.run_until(10_000, gone), "its death is noticed");
    world.start(2, 2, seeds());
    assert!(world.run_until(30_000, |world| world.at_rest(3, 3)), "{:?}", world.nodes);
    let map = world.nodes.values().next().unwrap().map().unwrap();
    let life = map.life_of(NodeId(2)).unwrap();
    assert_eq!((life.about.boot, life.seat.0 <= 3, life.no.0 > 3), (2, true, true));
}

#[test]
fn a_founder_that_restarts_finds_its_cluster_again() {
    let mut world = World::default();
    world.three();
    world.kill(1);
    assert!(world.run_until(10_000, |world| world.nodes.values().all(|control| control.alive().len() == 2)));
    world.start(1, 2, founder());
    assert!(world.run_until(30_000, |world| world.at_rest(3, 3)), "{:?}", world.nodes);
}

#[test]
fn a_dead_node_is_replaced_and_told_so_when_it_returns() {
    let mut world = World::default();
    world.three();
    world.start(4, 1, seeds());
    assert!(world.run_until(60_000, |world| world.at_rest(4, 3)));
    // Node 3 is cut off for a minute, and alive all the while.
    let cut = candidate(3, 0).peer;
    let others: Vec<_> = world.nodes.keys().copied().filter(|at| *at != cut).collect();
    world.cut = others.iter().flat_map(|&at| [(at, cut), (cut, at)]).collect();
    let replaced = |world: &World| {
        let map = world.nodes[&candidate(1, 0).peer].map().unwrap();
        map.life_of(NodeId(3)).is_none() && map.placements.iter().all(|p| p.replicas.iter().all(|r| !r.filling))
    };
    assert!(world.run_until(90_000, replaced), "the others go on without it");
    world.cut.clear();
    assert!(world.run_until(60_000, |world| world.at_rest(4, 3)), "{:?}", world.nodes);
    assert!(world.events.contains(&(NodeId(3), Event::Expelled)));
}

#[test]
fn another_cluster_and_another_shard_count_are_refused_with_a_reason() {
    let mut world = World::default();
    world.three();
    let other = Map::create(78, 0, 32, QUORUMS, candidate(9, 1));
    world.disks.insert(NodeId(9), Remembered { map: Some(other), ..Remembered::default() });
    world.start(9, 2, seeds());
    let refused = |world: &World| world.events.iter().any(|(id, e)| *id == NodeId(9) && matches!(e, Event::Refused(_)));
    assert!(world.run_until(5_000, refused));
    let Some((_, Event::Refused(text))) = world.events.iter().find(|(_, e)| matches!(e, Event::Refused(_))) else {
        unreachable!()
    };
    assert!(text.contains("cluster 000000000000004d"), "{text}");
    let map = world.nodes[&candidate(1, 0).peer].map().unwrap();
    assert!(map.life_of(NodeId(9)).is_none());
}

#[test]
fn a_second_process_with_a_nodes_id_is_refused_and_a_node_that_moved_is_not() {
    for lives in [true, false] {
        let mut world = World::default();
        world.three();
        if !lives {
            world.kill(2);
        }
        // Its directory, at another address.
        let elsewhere = Candidate { peer: candidate(8, 0).peer, ..candidate(2, 2) };
        world.start_as(elsewhere.clone(), seeds());
        let refused = |world: &World| {
            world.events.iter().any(|(_, e)| matches!(e, Event::Refused(why) if why.contains("another process")))
        };
        let admitted = |world: &World| world.nodes[&elsewhere.peer].me() != NodeNo(0);
        assert!(world.run_until(30_000, |world| refused(world) || admitted(world)), "{:?}", world.nodes);
        assert_eq!((refused(&world), admitted(&world)), (lives, !lives));
        if lives {
            assert_ne!(world.nodes[&candidate(2, 0).peer].me(), NodeNo(0), "the first goes on");
            assert!(!world.events.iter().any(|(_, e)| matches!(e, Event::Duplicate { .. } | Event::Expelled)));
        }
    }
}

#[test]
fn an_operator_drains_a_node() {
    let mut world = World::default();
    world.three();
    world.start(4, 1, seeds());
    assert!(world.run_until(60_000, |world| world.at_rest(4, 3)));
    let at = candidate(1, 0).peer;
    let no = world.nodes[&at].map().unwrap().life_of(NodeId(4)).unwrap().no;
    let mut out = Output::default();
    let now = world.clock();
    world.nodes.get_mut(&at).unwrap().propose(now, 1, Change::Drain(no, true), &mut out);
    world.act(at, out);
    let drained = |world: &World| {
        let map = world.nodes[&at].map().unwrap();
        map.placements.iter().all(|p| !p.names(no) && p.stage == Stage::Normal)
    };
    assert!(world.run_until(120_000, drained), "{:?}", world.nodes);
}

#[test]
fn seeds_that_moved_are_found_where_they_are_now() {
    let mut world = World::default();
    world.start(1, 1, founder());
    let at = candidate(2, 0).peer;
    world.start(2, 1, Start::Join(vec![candidate(9, 0).peer]));
    world.start(3, 1, Start::Join(Vec::new()));
    assert!(!world.run_until(5_000, |world| world.nodes[&at].me() != NodeNo(0)), "nobody is there");
    let now = world.clock();
    for n in [2, 3] {
        world.nodes.get_mut(&candidate(n, 0).peer).unwrap().set_seeds(now, vec![candidate(1, 0).peer]);
    }
    assert!(world.run_until(60_000, |world| world.at_rest(3, 3)), "{:?}", world.nodes);
}

#[test]
fn shards_that_move_and_shards_at_risk_are_told() {
    let mut world = World::default();
    world.three();
    let told = |world: &World| -> Vec<Event> {
        let is = |event: &&(NodeId, Event)| event.0 == NodeId(1) && !matches!(event.1, Event::Map(_) | Event::Up(_));
        world.events.iter().filter(is).map(|(_, event)| event.clone()).collect()
    };
    let added: usize =
        told(&world).iter().map(|event| if let Event::Moved { copies, .. } = event { copies.len() } else { 0 }).sum();
    assert_eq!(added, 64, "two more copies of each of 32 shards");
    assert!(!told(&world).iter().any(|event| matches!(event, Event::AtRisk(_))), "growing is no risk");
    world.events.clear();
    world.kill(2);
    world.kill(3);
    assert!(world.run_until(30_000, |world| told(world).contains(&Event::AtRisk(32))), "{:?}", world.nodes);
    world.events.clear();
    world.start(2, 2, seeds());
    world.start(3, 2, seeds());
    assert!(world.run_until(60_000, |world| told(world).contains(&Event::AtRisk(0))), "{:?}", world.events);
}

#[test]
fn a_node_whose_clock_is_wrong_is_quarantined_and_orders_nothing_until_it_is_mended() {
    for ahead in [10_000, -10_000] {
        let mut world = World::default();
        world.three();
        let at = candidate(3, 0).peer;
        let orders = |world: &World| {
            let map = world.nodes[&candidate(1, 0).peer].map().unwrap();
            let no = map.life_of(NodeId(3)).unwrap().no;
            map.placements.iter().filter(|p| p.orderer() == Some(no)).count()
        };
        assert!(world.run_until(20_000, |world| orders(world) > 5), "orderers are spread");
        assert!(world.run_until(10_000, |world| world.quarantined.len() == 3), "they are asked every few seconds");
        assert!(world.quarantined.values().all(|told| *told == (false, 0)), "that it is right is said, too");
        world.ahead.insert(at, ahead);
        assert!(world.run_until(10_000, |world| world.nodes[&at].clock().0), "it notices");
        assert!(world.run_until(10_000, |world| orders(world) == 0), "others order");
        world.run_until(10_000, |_| false);
        assert_eq!(orders(&world), 0, "it is given no more");
        let told = world.quarantined[&at];
        assert_eq!((told.0, told.1 / 100), (true, if ahead < 0 { 99 } else { 0 }), "{told:?}");
        let other = &world.nodes[&candidate(1, 0).peer];
        assert_eq!((other.clock().0, other.clock().1 / 100), (false, 99));
        let apart = |(id, event): &(NodeId, Event)| {
            matches!(event, Event::ClocksApart { node, ahead_ms }
                if (*id, *node) == (NodeId(1), NodeId(3)) && ahead_ms.signum() == i64::signum(ahead))
        };
        assert_eq!(world.events.iter().filter(|event| apart(event)).count(), 1, "told once");
        world.ahead.clear();
        assert!(world.run_until(10_000, |world| orders(world) > 5), "{:?}", world.nodes[&at].clock());
        assert_eq!(world.quarantined[&at], (false, 0));
        let of_others = |(id, event): &(NodeId, Event)| *id != NodeId(3) && matches!(event, Event::Quarantined { .. });
        assert!(!world.events.iter().any(of_others), "nobody else ever was");
        let turns: Vec<bool> = world
            .events
            .iter()
            .filter_map(|(id, event)| match event {
                Event::Quarantined { quarantined, .. } if *id == NodeId(3) => Some(*quarantined),
                _ => None,
            })
            .collect();
        assert_eq!(turns, [true, false]);
    }
}

#[test]
fn of_two_nodes_whose_clocks_differ_nobody_knows_who_is_wrong() {
    let mut world = World::default();
    world.start(1, 1, founder());
    world.start(2, 1, seeds());
    world.ahead.insert(candidate(2, 0).peer, 3_600_000);
    let told = |world: &World, no| {
        world.events.iter().any(|(id, event)| *id == NodeId(no) && matches!(event, Event::ClocksApart { .. }))
    };
    assert!(world.run_until(60_000, |world| world.at_rest(2, 2)));
    assert!(world.run_until(10_000, |world| told(world, 1) && told(world, 2)), "both say so");
    world.quarantined.clear();
    world.run_until(20_000, |_| false);
    assert!(world.quarantined.is_empty(), "neither is right, neither is wrong");
    world.ahead.clear();
    assert!(world.run_until(10_000, |world| world.quarantined.len() == 2), "now both are right");
}

#[test]
fn a_machine_that_was_replaced_has_no_vote() {
    let mut world = World::default();
    world.three();
    // Another node at the address of node 2 that knows nothing: it is asked for the promises of its predecessor.
    let at = candidate(2, 0).peer;
    let about = Candidate { id: NodeId(22), ..candidate(2, 9) };
    let settings = settings(seeds(), about);
    let mut newcomer = Control::new(settings, Remembered::default(), 5);
    let asks = &world.nodes[&candidate(1, 0).peer];
    let seat = asks.map().unwrap().life_of(NodeId(2)).unwrap().seat;
    let ballot = register::Ballot { counter: 99, node: NodeNo(1), life: 1 };
    let body = Body::Register { to: seat, from: NodeNo(1), message: RegisterMessage::Prepare { ballot } };
    let bytes = asks.envelope(body);
    let (now, mut out) = (world.clock(), Output::default());
    newcomer.on_message(now, &bytes, &mut out);
    assert!(out.disk.is_empty(), "it promises nothing");
    // Whoever has the seat answers.
    world.nodes.get_mut(&at).unwrap().on_message(now, &bytes, &mut out);
    assert!(out.disk.iter().any(|step| step.voter.is_some() && step.then.is_some()));
}

/// A node that was asked stood still for long, and meanwhile another machine came to the address of the one that had asked. Admitting
/// the first one now would end the life of the second.
#[test]
fn who_asked_long_ago_is_not_admitted() {
    let mut world = World::default();
    world.three();
    let (asked, first) = (candidate(1, 0).peer, candidate(4, 1));
    let about = first.clone();
    let settings = settings(seeds(), about);
    let (now, mut out) = (world.clock(), Output::default());
    let mut newcomer = Control::new(settings, Remembered::default(), 5);
    newcomer.on_deadline(now, &mut out);
    let (to, bytes) = out.messages.remove(0);
    assert_eq!(to, asked);
    out = Output::default();
    world.nodes.get_mut(&asked).unwrap().on_message(now, &bytes, &mut out);
    let again = |(_, bytes): &(SocketAddr, Vec<u8>)| {
        matches!(Envelope::decode(bytes), Ok(Envelope { body: Body::JoinAgain { .. }, .. })).then(|| bytes.clone())
    };
    let ticket = out.messages.iter().find_map(again).expect("a ticket");
    out = Output::default();
    newcomer.on_message(now, &ticket, &mut out);
    let late = out.messages.remove(0).1;

    world.start_as(Candidate { id: NodeId(44), ..first }, seeds());
    assert!(world.run_until(60_000, |world| world.at_rest(4, 3)), "{:?}", world.nodes);
    for bytes in [bytes, late] {
        world.push(asked, asked, What::Message(bytes));
        assert!(!world.run_until(10_000, |_| false) && world.at_rest(4, 3));
    }
    assert!(world.nodes[&asked].map().unwrap().life_of(NodeId(4)).is_none());
    assert!(!world.events.contains(&(NodeId(44), Event::Expelled)));
}

/// Nobody can tell the copy of a directory from the directory, but the life that is there already can be told.
#[test]
fn a_copy_of_a_nodes_directory_does_not_end_its_life() {
    let mut world = World::default();
    world.three();
    // It knows the map and the others, and does not hear from them at first: it proposes its own admission.
    let there = candidate(9, 0).peer;
    let members = [1, 2, 3].map(|n| candidate(n, 0).peer);
    world.cut = members.iter().map(|&at| (at, there)).collect();
    world.start_as(Candidate { peer: there, ..candidate(2, 7) }, seeds());
    assert!(!world.run_until(6_000, |_| false));
    assert!(world.nodes[&there].asked > JOIN_ALONE, "it has tried");
    world.cut.clear();
    let refused = |world: &World| {
        let told = |(id, event): &(NodeId, Event)| *id == NodeId(2) && matches!(event, Event::Refused(_));
        world.events.iter().any(told)
    };
    assert!(world.run_until(30_000, refused), "{:?}", world.nodes[&there]);
    let map = world.nodes[&candidate(1, 0).peer].map().unwrap();
    let life = map.life_of(NodeId(2)).unwrap();
    assert_eq!((life.about.boot, life.about.peer), (1, candidate(2, 0).peer));
    assert!(!world.events.contains(&(NodeId(2), Event::Expelled)));
}

/// The others still know the address of a machine that was theirs.
#[test]
fn a_node_comes_to_the_cluster_of_its_seeds_and_to_no_other() {
    let mut world = World::default();
    world.three();
    let theirs = world.nodes[&candidate(1, 0).peer].envelope(Body::MapWanted);
    let map = world.nodes[&candidate(1, 0).peer].map().unwrap().clone();
    let told = world.nodes[&candidate(1, 0).peer].envelope(Body::Map(map.encode()));
    let settings = settings(Start::Join(vec![candidate(8, 0).peer]), candidate(4, 1));
    let mut newcomer = Control::new(settings, Remembered::default(), 5);
    let (now, mut out) = (world.clock(), Output::default());
    newcomer.on_deadline(now, &mut out);
    out = Output::default();
    for bytes in [&theirs, &told] {
        newcomer.on_message(now, bytes, &mut out);
    }
    assert!(newcomer.map().is_none() && out.messages.is_empty() && newcomer.cluster == 0, "{out:?}");
}

/// Many start at once after a power cut, and propose before they know their seats.
#[test]
fn no_two_lives_make_the_same_ballot() {
    let ballot = |n: u16, boot: u64| {
        let about = candidate(n, boot);
        let map = Map::create(77, 5, 32, QUORUMS, candidate(1, 1));
        let settings = settings(seeds(), about);
        let remembered = Remembered { map: Some(map), ..Remembered::default() };
        let mut control = Control::new(settings, remembered, 1);
        let (mut wants, now) = (Vec::new(), Now { mono: 0, wall: 0 });
        control.proposer.read(now, 1000, &mut wants).unwrap();
        wants.into_iter().find_map(|want| match want {
            register::Output::Send { message: RegisterMessage::Prepare { ballot }, .. } => Some(ballot),
            _ => None,
        })
    };
    assert!(ballot(2, 9).is_some());
    assert!(ballot(2, 9) != ballot(3, 9) && ballot(2, 9) != ballot(2, 10));
}

/// Its map file is damaged, and there is nobody whom it could ask.
#[test]
fn a_lone_node_knows_its_map_from_its_vote() {
    let mut world = World::default();
    world.start(1, 1, founder());
    assert!(world.run_until(10_000, |world| world.at_rest(1, 1)));
    world.kill(1);
    world.start(1, 2, founder());
    assert!(world.run_until(60_000, |world| world.at_rest(1, 1)), "{:?}", world.nodes);
    world.kill(1);
    world.disks.get_mut(&NodeId(1)).unwrap().map = None;
    world.start(1, 3, founder());
    assert!(world.run_until(60_000, |world| world.at_rest(1, 1)), "{:?}", world.nodes);
    let map = world.nodes[&candidate(1, 0).peer].map().unwrap();
    assert_eq!((map.cluster, map.life_of(NodeId(1)).unwrap().about.boot), (77, 3));
}

/// A node counts from what is on its disk when it starts. Its life was given up, it came back as another one, and the process ended before
/// that was on disk; so it ended again, and again.
#[test]
fn no_two_processes_come_to_the_same_life() {
    let after = |boot: u64, seed: u64, named: u64| {
        let settings = settings(seeds(), candidate(4, boot));
        let mut control = Control::new(settings, Remembered::default(), seed);
        let (now, mut out) = (Now { mono: 0, wall: 0 }, Output::default());
        match named {
            0 => control.reborn(now, &mut out),
            named => {
                let first = Map::create(77, 5, 32, QUORUMS, candidate(1, 1));
                control.learn(now, first.apply(&Change::Admit(candidate(4, named))).unwrap(), &mut out);
            }
        }
        control.about().boot
    };
    assert!(after(5, 11, 0) > 5 + 1, "the next process is number 6");
    assert_ne!(after(5, 11, 0), after(6, 12, 0));
    assert!(after(5, 11, 100) > 100 + 1, "one that knows that map is number 101");
    assert_ne!(after(5, 11, 100), after(6, 12, 100));
    assert_eq!(after(5, 11, 5), 5, "that is this life");
    assert_eq!(after(5, 11, 3), 5);
}

/// The other process was seen once, and once more much later: in between it was away, and nobody knew.
#[test]
fn who_was_taken_long_ago_is_not_refused_for_good() {
    let at = candidate(8, 0).peer;
    let refused = |times: &[Millis]| {
        let mut control = Control::new(settings(seeds(), candidate(4, 1)), Remembered::default(), 5);
        let mut out = Output::default();
        times.iter().for_each(|&mono| control.on_taken(Now { mono, wall: mono }, at, &mut out));
        control.refused
    };
    assert!(!refused(&[0, 10_500]));
    assert!(!refused(&[0, 500, 10_500, 13_000]));
    assert!(refused(&[0, 3000, 6000, 9000, 10_500]));
}

/// It was reborn while its clock was an hour ahead; the clock was mended, and the process started anew.
#[test]
fn a_life_that_began_with_a_wrong_clock_can_be_followed() {
    let mut world = World::default();
    world.three();
    world.start(4, 3_600_000, seeds());
    assert!(world.run_until(60_000, |world| world.at_rest(4, 3)));
    world.kill(4);
    assert!(world.run_until(10_000, |world| world.nodes.values().all(|control| control.alive().len() == 3)));
    world.disks.insert(NodeId(4), Remembered::default());
    world.start(4, 2, seeds());
    assert!(world.run_until(60_000, |world| world.at_rest(4, 3)), "{:?}", world.nodes);
}

/// One of those who are to vote is there, and does not: its disk has failed.
#[test]
fn who_would_vote_and_is_silent_does_not_keep_the_rest_waiting() {
    let mut world = World::default();
    world.mute.insert(candidate(2, 0).peer);
    world.mute.insert(candidate(3, 0).peer);
    for (n, start) in [(1, founder()), (2, seeds()), (3, seeds())] {
        world.start(n, 1, start);
    }
    assert!(world.run_until(120_000, |world| world.at_rest(3, 3)), "{:?}", world.nodes);
    assert_eq!(world.nodes[&candidate(1, 0).peer].map().unwrap().voters.len(), 1);
}

/// It stopped before its first map was on disk, and what it voted for was never chosen. It must neither act upon it nor pass
/// it on; but it knows whom to ask, although it was started without seeds.
#[test]
fn what_a_voter_only_voted_for_is_no_map() {
    let mut world = World::default();
    world.three();
    world.kill(3);
    let chosen = world.nodes[&candidate(1, 0).peer].map().unwrap().clone();
    let voted = chosen.apply(&Change::Drain(NodeNo(1), true)).unwrap();
    let disk = world.disks.get_mut(&NodeId(3)).unwrap();
    disk.map = None;
    disk.voter.accepted = Some((register::Ballot { counter: 1, node: NodeNo(3), life: 1 }, voted.encode()));
    let (alone, others) = (candidate(3, 0).peer, [candidate(1, 0).peer, candidate(2, 0).peer]);
    world.cut = others.iter().flat_map(|&at| [(at, alone), (alone, at)]).collect();
    world.start(3, 2, founder());
    assert!(!world.run_until(10_000, |world| world.nodes[&alone].map().is_some()), "nobody has told it a map");
    assert_eq!(world.nodes[&alone].proposer.chosen(), None);
    world.cut.clear();
    assert!(world.run_until(60_000, |world| world.at_rest(3, 3)), "{:?}", world.nodes);
    let map = world.nodes[&alone].map().unwrap();
    assert!(map.cluster == 77 && map.present().all(|m| m.standing == crate::map::Standing::Up), "{map:?}");
}

/// A machine is replaced while those whom it asked to admit it are cut off. Its request must not reach the map when they are back: it
/// would take its address away from the machine that is there now.
#[test]
fn a_request_to_be_admitted_does_not_outlive_its_time() {
    let mut world = World::default();
    world.three();
    let (alone, others) = (candidate(3, 0).peer, [candidate(1, 0).peer, candidate(2, 0).peer]);
    world.cut = others.iter().flat_map(|&at| [(at, alone), (alone, at)]).collect();
    // What an operator asked of it keeps it busy, for it has no majority.
    for token in 0..5 {
        let (now, mut out) = (world.clock(), Output::default());
        let change = Change::Drain(NodeNo(2), token % 2 == 1);
        world.nodes.get_mut(&alone).unwrap().propose(now, token, change, &mut out);
        world.act(alone, out);
    }
    world.start(4, 1, Start::Join(vec![alone]));
    let joins = |waiting: &Waiting| matches!(waiting.waits, Waits::Joiner(..));
    assert!(world.run_until(10_000, |world| world.nodes[&alone].waiting.iter().any(joins)));
    world.kill(4);
    assert!(!world.run_until(5_100, |_| false));
    let elsewhere = Candidate { peer: candidate(4, 0).peer, ..candidate(5, 1) };
    world.start_as(elsewhere, Start::Join(others.to_vec()));
    let at = candidate(4, 0).peer;
    assert!(world.run_until(30_000, |world| world.nodes[&at].me() != NodeNo(0)), "the others admit its successor");
    world.cut.clear();
    let idle = |world: &World| world.nodes[&alone].waiting.is_empty() && world.nodes[&alone].proposing.is_none();
    assert!(world.run_until(60_000, |world| idle(world) && world.at_rest(4, 3)), "{:?}", world.nodes);
    let admitted = world.events.iter().filter(|(id, event)| *id == NodeId(5) && matches!(event, Event::Admitted(_)));
    assert_eq!(admitted.count(), 1, "its life goes on");
}
