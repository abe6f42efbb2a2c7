//! The planner over random clusters: what it ends with, how many moves that takes, and that it never leaves a stage too early.
//!
//! The rules are written here a second time, from `docs/protocols/moves.md` and not from the planner.

use proptest::prelude::*;

use super::assign::{assign, shares};
use super::*;
use crate::ids::NodeId;
use crate::map::testing::{candidate, three};
use crate::map::{Candidate, Replica};
use crate::quorum::Quorums;

const Q: Quorums = Quorums { n: 3, w: 2, r: 2 };

/// Weight and zone of a node.
type Shape = (u16, u8);

fn node(n: u16, boot: u64, (weight, zone): Shape) -> Candidate {
    Candidate { weight, zone: format!("z{zone}"), ..candidate(n, boot) }
}

fn cluster(shards: u16, quorums: Quorums, shapes: &[Shape]) -> Map {
    let first = Map::create(7, 0, shards, quorums, node(1, 1, shapes[0]));
    let others = shapes.iter().enumerate().skip(1);
    others.fold(first, |map, (at, &shape)| map.apply(&Change::Admit(node(at as u16 + 1, 1, shape))).unwrap())
}

fn all(map: &Map) -> BTreeSet<NodeNo> {
    map.present().map(|m| m.no).collect()
}

/// Takes exchanges as if moving cost nothing, until there are none; how many there were of copies that were there.
fn settle(map: &mut Map) -> usize {
    let mut moves = 0;
    for _ in 0..40 {
        let exchanges = assign(map, &all(map));
        if exchanges.is_empty() {
            return moves;
        }
        for Exchange { shard, leaving, joining, .. } in exchanges {
            let set = &mut map.placements[usize::from(shard)].replicas;
            assert!(joining.is_none_or(|no| set.iter().all(|r| r.node != no)));
            moves += usize::from(leaving.is_some());
            let joining = joining.map(|node| Replica { node, filling: false });
            match (leaving.map(|no| set.iter().position(|r| r.node == no).expect("it leaves a set it is in")), joining)
            {
                (Some(slot), Some(joining)) => set[slot] = joining,
                (Some(slot), None) => drop(set.remove(slot)),
                (None, joining) => set.extend(joining),
            }
        }
        assert_eq!(map.check(), Ok(()));
    }
    panic!("exchanges go on for ever: {:?}", assign(map, &all(map)));
}

fn loads(map: &Map) -> BTreeMap<NodeNo, usize> {
    let mut loads: BTreeMap<NodeNo, usize> = map.present().map(|m| (m.no, 0)).collect();
    map.placements.iter().flat_map(|p| &p.replicas).for_each(|r| *loads.entry(r.node).or_default() += 1);
    loads
}

/// What must hold of sets when nothing is left to do.
fn is_right(map: &Map) -> Result<(), String> {
    let up: Vec<&Member> = map.present().filter(|m| m.standing == Standing::Up).collect();
    let zones: BTreeSet<&str> = up.iter().map(|m| m.about.zone.as_str()).collect();
    let copies = up.len().min(usize::from(map.quorums.n));
    let zone_of = |r: &Replica| map.member(r.node).unwrap().about.zone.as_str();
    for (shard, placement) in map.placements.iter().enumerate() {
        let nodes: BTreeSet<NodeNo> = placement.replicas.iter().map(|r| r.node).collect();
        if nodes.len() != copies || placement.replicas.len() != copies {
            return Err(format!("shard {shard} has {nodes:?}, not {copies} copies"));
        }
        if nodes.iter().any(|no| up.iter().all(|m| m.no != *no)) {
            return Err(format!("shard {shard} lies on a node that is not up"));
        }
        let spread = placement.replicas.iter().map(zone_of).collect::<BTreeSet<_>>().len();
        if zones.len() >= copies && spread < copies {
            return Err(format!("shard {shard} has two copies in one zone: {:?}", placement.replicas));
        }
    }
    let loads = loads(map);
    for (member, share) in map.members.iter().zip(shares(map)).filter(|(m, _)| m.standing == Standing::Up) {
        if loads[&member.no] > share.high || loads[&member.no] < share.low {
            return Err(format!("node {} of {} holds {}, should {share:?}", member.no, up.len(), loads[&member.no]));
        }
    }
    Ok(())
}

fn shapes(nodes: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Vec<Shape>> {
    let weight = prop_oneof![4 => Just(100u16), 1 => Just(50), 1 => Just(200), 1 => 1u16..500];
    (1u8..7).prop_flat_map(move |zones| prop::collection::vec((weight.clone(), 0..zones), nodes.clone()))
}

fn quorums() -> impl Strategy<Value = Quorums> {
    prop_oneof![
        3 => Just(Q),
        1 => Just(Quorums { n: 1, w: 1, r: 1 }),
        1 => Just(Quorums { n: 2, w: 2, r: 1 }),
        1 => Just(Quorums { n: 5, w: 3, r: 3 }),
        1 => Just(Quorums { n: 3, w: 1, r: 3 }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Copies, zones and loads are right for any cluster, after it was created and after nodes were drained; and asked again there
    /// is nothing to do (`settle` ends on an empty answer).
    #[test]
    fn every_cluster_is_put_right(
        shapes in shapes(1..=50), quorums in quorums(), shards in 5u32..=10, drained in prop::collection::vec(1u16..50, 0..4),
    ) {
        let mut map = cluster(1 << shards, quorums, &shapes);
        settle(&mut map);
        is_right(&map).map_err(TestCaseError::fail)?;
        for no in drained.into_iter().map(NodeNo).filter(|no| usize::from(no.0) < shapes.len()) {
            map = map.apply(&Change::Drain(no, true)).unwrap();
        }
        settle(&mut map);
        is_right(&map).map_err(TestCaseError::fail)?;
    }

    /// A node that joins takes its share and nothing else moves; a node that goes gives what it has and nothing else moves.
    #[test]
    fn a_node_that_comes_or_goes_moves_its_share_only(nodes in 4usize..=30, shards in 8u32..=10) {
        let mut map = cluster(1 << shards, Q, &vec![(100, 0); nodes]);
        settle(&mut map);
        let before = map.clone();
        map = map.apply(&Change::Admit(node(99, 1, (100, 0)))).unwrap();
        let moves = settle(&mut map);
        let fair = (3 << shards) / (nodes + 1);
        prop_assert!(moves * 100 <= fair * 105, "{} moves for a share of {}", moves, fair);
        let joined = map.life_of(node(99, 1, (100, 0)).id).unwrap().no;
        prop_assert_eq!(moves, loads(&map)[&joined], "only the newcomer got anything");
        is_right(&map).map_err(TestCaseError::fail)?;

        let leaver = NodeNo(2);
        let mut map = before.apply(&Change::Drain(leaver, true)).unwrap();
        let moves = settle(&mut map);
        let had = loads(&before)[&leaver];
        prop_assert!(moves * 100 <= had * 105, "{} moves for {} copies", moves, had);
    }
}

/// With the shards of a small cluster the fullest node is within a twentieth of the mean.
#[test]
fn five_nodes_and_256_shards_are_even() {
    for nodes in 2..=5 {
        let mut map = cluster(256, Q, &[(100, 0)].repeat(nodes));
        settle(&mut map);
        let loads = loads(&map);
        let (most, sum) = (*loads.values().max().unwrap(), loads.values().sum::<usize>());
        assert!(most * nodes * 100 <= sum * 105, "{loads:?}");
    }
}

#[test]
fn shares_follow_weights_until_a_node_holds_everything() {
    let fair = |shapes: &[Shape]| shares(&cluster(1024, Q, shapes)).iter().map(|s| s.floor).collect::<Vec<_>>();
    assert_eq!(fair(&[(100, 0); 4]), [768; 4]);
    assert_eq!(fair(&[(100, 0), (100, 0), (100, 0), (200, 0), (100, 0)]), [512, 512, 512, 1024, 512]);
    assert_eq!(fair(&[(100, 0), (100, 0), (100, 0), (900, 0), (100, 0)]), [512, 512, 512, 1024, 512]);
    // Three zones: each holds one copy of everything, however many nodes share it.
    assert_eq!(fair(&[(100, 0), (100, 1), (100, 2), (100, 2)]), [1024, 1024, 512, 512]);
    // Two zones: one of them holds two copies, if it can.
    assert_eq!(fair(&[(100, 0), (100, 1), (100, 1), (100, 1)]), [1024, 682, 682, 682]);
}

/// A cluster under the planner, with nodes that do what they should, or do it late.
struct World {
    map: Map,
    planner: Planner,
    now: Millis,
    /// Nodes whose process does not run.
    down: BTreeMap<NodeNo, Millis>,
    adopted: BTreeMap<NodeNo, u64>,
    boots: u64,
    shapes: Vec<Shape>,
}

impl World {
    fn new(shards: u16, quorums: Quorums, shapes: Vec<Shape>) -> World {
        let map = Map::create(7, 0, shards, quorums, node(1, 1, shapes[0]));
        let planner = Planner::new(Settings::default());
        World { map, planner, now: 0, down: BTreeMap::new(), adopted: BTreeMap::new(), boots: 1, shapes }
    }

    fn apply(&mut self, change: &Change) {
        if let Ok(next) = self.map.apply(change) {
            assert_eq!(next.check(), Ok(()));
            self.map = next;
        }
    }

    /// The node's next life, or its first.
    fn start(&mut self, n: u16) {
        self.boots += 1;
        let shape = self.shapes[usize::from(n - 1) % self.shapes.len()];
        self.apply(&Change::Admit(node(n, self.boots, shape)));
        let map = &self.map;
        self.down.retain(|&no, _| map.member(no).is_some_and(|m| m.standing != Standing::Lost));
    }

    /// What the leader sees. Of `lazy` nodes it hears nothing new.
    fn view(&mut self, lazy: impl Fn(NodeNo) -> bool) -> View {
        let map = &self.map;
        let alive: BTreeSet<NodeNo> = map.present().map(|m| m.no).filter(|no| !self.down.contains_key(no)).collect();
        for &no in alive.iter().filter(|&&no| !lazy(no)) {
            self.adopted.insert(no, map.epoch);
        }
        let mut filled = BTreeSet::new();
        for (shard, placement) in map.placements.iter().enumerate() {
            let serves = |r: &&Replica| {
                !r.filling
                    && alive.contains(&r.node)
                    && self.adopted.get(&r.node).is_some_and(|&epoch| epoch >= placement.epoch)
            };
            let sources = placement.replicas.iter().filter(serves).count();
            if sources >= map.quorums.sources(placement.replicas.len()) {
                let filling =
                    placement.written().filter(|&no| placement.is_filling(no) && alive.contains(&no) && !lazy(no));
                filled.extend(filling.map(|no| (shard as u16, placement.epoch, no)));
            }
        }
        let (adopted, down_since) = (self.adopted.clone(), self.down.clone());
        View { alive, adopted, filled, down_since, ..View::default() }
    }

    /// One change, if there is one to make. Each is held against the rules.
    fn turn(&mut self, lazy: impl Fn(NodeNo) -> bool) -> bool {
        let view = self.view(lazy);
        let Some(change) = self.planner.plan(self.now, &self.map, &view) else { return false };
        keeps_rules(self.now, &self.map, &view, &change);
        let next = self.map.apply(&change).unwrap_or_else(|refusal| panic!("{refusal}: {change:?}"));
        assert_eq!(next.check(), Ok(()));
        self.map = next;
        true
    }

    /// Goes on until the planner has nothing to do; time passes only when it waits for it.
    fn rest(&mut self) -> usize {
        let mut changes = 0;
        loop {
            while self.turn(|_| false) {
                changes += 1;
                assert!(changes < 2000, "no rest: {:?}", self.map.placements);
            }
            match self.planner.next_deadline() {
                Some(deadline) => self.now = self.now.max(deadline),
                None => return changes,
            }
        }
    }
}

/// The rules for changes, written for this test.
fn keeps_rules(now: Millis, map: &Map, view: &View, change: &Change) {
    let standing = |no: NodeNo| map.member(no).map_or(Standing::Lost, |m| m.standing);
    let steps = match change {
        Change::Steps(steps) => steps,
        Change::GiveUp { life: no, .. } => {
            assert!(!view.alive.contains(no) && now - view.down_since[no] >= 30_000);
            // A copy that another one must be filled from is given up late.
            let is_last_help = map.placements.iter().filter(|p| p.stage != Stage::ReadNew).any(|p| {
                let serves = |r: &&Replica| !r.filling && standing(r.node) != Standing::Lost;
                let (serving, n) = (p.replicas.iter().filter(serves), p.replicas.len());
                let rest = serving.clone().filter(|r| r.node != *no).count();
                serving.count() > rest && rest + map.quorums.of(n).0 <= n
            });
            assert!(!is_last_help || now - view.down_since[no] >= 300_000, "{no} is needed");
            let down = map.present().filter(|m| view.down_since.contains_key(&m.no)).count();
            let present = map.present().count();
            assert!(down * 3 < present || down == 1 && present == 3, "{down} of {present} are down");
            return;
        }
        Change::Voters(seats) => {
            assert!([1, 3, 5].contains(&seats.len()));
            assert!(seats.iter().all(|&seat| map.seated(seat).is_some_and(|m| m.standing == Standing::Up)));
            return;
        }
        _ => return,
    };
    assert!(steps.len() <= 1024);
    let moving = |map: &Map| map.placements.iter().filter(|p| p.stage != Stage::Normal).count();
    let begun = steps.iter().filter(|s| matches!(s.transition, Transition::Begin { .. })).count();
    assert!(begun == 0 || begun + moving(map) <= 64);
    for step in steps {
        let placement = &map.placements[usize::from(step.shard)];
        assert_eq!(step.epoch, placement.epoch, "a step for another epoch is lost");
        let old: Vec<NodeNo> = placement.replicas.iter().map(|r| r.node).collect();
        let (w, r) = map.quorums.of(old.len());
        let adopted = |no: &&NodeNo| view.adopted.get(no).is_some_and(|&epoch| epoch >= placement.epoch);
        let reborn = |no: &NodeNo| {
            let id = map.member(*no).unwrap().about.id;
            standing(*no) == Standing::Lost && map.members.iter().any(|m| m.about.id == id && m.no > *no)
        };
        match step.transition {
            Transition::ReadNew => {
                // No write of an older epoch can be acknowledged any more.
                let late = old.iter().filter(|no| !adopted(no)).count();
                assert!(late < w, "{late} of {old:?} may still take a write of an older epoch");
                match placement.joining {
                    Some(joiner) => {
                        assert!(adopted(&&joiner));
                        assert!(view.filled.contains(&(step.shard, placement.epoch, joiner)));
                    }
                    None => assert!(map.quorums.of(old.len() - 1).1 + w > old.len(), "reads would miss writes"),
                }
            }
            Transition::Finish => {
                let late = old.iter().filter(|no| !adopted(no) && !reborn(no)).count();
                assert!(late < r, "{late} of {old:?} may still answer a read of the old set");
            }
            Transition::Filled { node } => {
                assert!(view.filled.contains(&(step.shard, placement.epoch, node)) && placement.is_filling(node));
                // Who was there before and those that are late must not answer a read of an older epoch together.
                let late = |r: &&Replica| !r.filling && standing(r.node) != Standing::Lost && !adopted(&&r.node);
                let late = placement.replicas.iter().filter(late).count();
                assert!(late == 0 || late + 1 < r, "{late} of {old:?} and a former life may answer");
            }
            Transition::Replace { old, new } => {
                assert!(
                    standing(old) == Standing::Lost && standing(new) != Standing::Lost && view.alive.contains(&new)
                );
            }
            Transition::Begin { joining, leaving } => {
                assert!(old.iter().all(|&no| standing(no) != Standing::Lost));
                assert!(joining.is_none_or(|no| standing(no) == Standing::Up && view.alive.contains(&no)));
                assert!(leaving.is_some() || old.len() < usize::from(map.quorums.n));
            }
            Transition::First { node } => assert!(view.alive.contains(&node) && placement.is_readable(node)),
            Transition::AcceptLoss => assert!(placement.replicas.iter().all(|r| r.filling)),
            Transition::Abort => {
                assert_eq!(placement.stage, Stage::WriteBoth);
                // A joiner that is lost here was read already: nobody may do so any more.
                if placement.joining.is_some_and(|no| standing(no) == Standing::Lost) {
                    let new: Vec<NodeNo> = placement.new_set().iter().map(|r| r.node).collect();
                    let late = new.iter().filter(|no| !adopted(no) && !reborn(no)).count();
                    assert!(
                        late < map.quorums.of(new.len()).1,
                        "{late} of {new:?} may still answer a read of the new set"
                    );
                }
            }
        }
    }
}

/// What happens to a cluster.
#[derive(Clone, Debug)]
enum Event {
    /// A node starts: for the first time, after a crash, or over itself.
    Start(u16),
    Crash(u16),
    Drain(u16, bool),
    /// An operator gives a node up.
    Remove(u16),
    Pass(Millis),
    /// The planner takes some turns, hearing nothing new of the nodes in the mask.
    Turns(u8, u16),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let n = 1u16..12;
    let event = prop_oneof![
        4 => n.clone().prop_map(Event::Start),
        2 => n.clone().prop_map(Event::Crash),
        1 => (n.clone(), any::<bool>()).prop_map(|(n, on)| Event::Drain(n, on)),
        1 => n.prop_map(Event::Remove),
        2 => (0u64..40_000).prop_map(Event::Pass),
        6 => (1u8..12, any::<u16>()).prop_map(|(turns, lazy)| Event::Turns(turns, lazy)),
    ];
    prop::collection::vec(event, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order, no rule is broken; and when every node runs at last, the cluster comes to rest with
    /// all its copies where they should be, all of them complete.
    #[test]
    fn a_cluster_comes_to_rest_from_anywhere(
        events in events(), quorums in quorums(), shards in 5u32..=8, shapes in shapes(3..=6),
    ) {
        let mut world = World::new(1 << shards, quorums, shapes);
        let life = |world: &World, n: u16| world.map.life_of(candidate(n, 1).id).map(|m| m.no);
        for event in events {
            match event {
                Event::Start(n) => world.start(n),
                Event::Crash(n) => {
                    let now = world.now;
                    if let Some(no) = life(&world, n) {
                        world.down.entry(no).or_insert(now);
                    }
                }
                Event::Drain(n, on) => {
                    life(&world, n).into_iter().for_each(|no| world.apply(&Change::Drain(no, on)));
                }
                Event::Remove(n) => {
                    if let Some(no) = life(&world, n).filter(|_| world.map.present().count() > 1) {
                        world.apply(&Change::Lose(no));
                        world.down.remove(&no);
                    }
                }
                Event::Pass(ms) => world.now += ms,
                Event::Turns(turns, lazy) => {
                    for _ in 0..turns {
                        world.turn(|no| lazy >> (no.0 % 16) & 1 == 1);
                    }
                }
            }
        }
        // Everything runs, and there is somewhere to be.
        for n in 1..=12 {
            match life(&world, n) {
                None => world.start(n),
                Some(no) if world.down.contains_key(&no) => world.start(n),
                Some(_) => {}
            }
        }
        let up: Vec<NodeNo> = world.map.present().map(|m| m.no).take(8).collect();
        up.iter().for_each(|&no| world.apply(&Change::Drain(no, false)));
        world.rest();
        // What too many losses at once have left behind is the operator's to give up.
        let stuck = |p: &Placement| p.stage != Stage::Normal || p.replicas.iter().any(|r| r.filling);
        let lost: Vec<(u16, u64)> = world.map.placements.iter().enumerate()
            .filter(|(_, p)| stuck(p)).map(|(shard, p)| (shard as u16, p.epoch)).collect();
        for &(shard, _) in &lost {
            let p = &world.map.placements[usize::from(shard)];
            let copies = p.replicas.len();
            let serving = p.replicas.iter().filter(|r| !r.filling && !is_lost(&world.map, r.node)).count();
            prop_assert!(serving < world.map.quorums.sources(copies).max(world.map.quorums.blocks_reads(copies)), "{:?}", p);
        }
        if !lost.is_empty() {
            let accept = |&(shard, epoch): &(u16, u64)| Step { shard, epoch, transition: Transition::AcceptLoss };
            world.apply(&Change::Steps(lost.iter().map(accept).collect()));
            world.rest();
        }
        is_right(&world.map).map_err(TestCaseError::fail)?;
        for placement in &world.map.placements {
            prop_assert!(placement.stage == Stage::Normal && placement.replicas.iter().all(|r| !r.filling));
        }
        prop_assert_eq!(world.map.voters.len(), 5);
    }
}

/// From one node to five: how a cluster grows in practice, and that orderers are spread in the end.
#[test]
fn a_cluster_grows_from_one_node_to_five() {
    let mut world = World::new(256, Q, vec![(100, 0)]);
    for n in 2..=5 {
        world.start(n);
        world.rest();
        assert_eq!(is_right(&world.map), Ok(()));
        let mut firsts: BTreeMap<NodeNo, usize> = BTreeMap::new();
        world.map.placements.iter().for_each(|p| *firsts.entry(p.replicas[0].node).or_default() += 1);
        let fair = 256 / usize::from(n);
        assert!(firsts.values().all(|&f| f.abs_diff(fair) * 10 <= fair + 10), "{n} nodes: {firsts:?}");
        assert_eq!(
            world.map.voters.len(),
            if n < 3 {
                1
            } else if n < 5 {
                3
            } else {
                5
            }
        );
        assert!(world.map.placements.iter().all(|p| p.losses == 0));
    }
}

#[test]
fn the_next_copy_orders_when_the_first_is_down() {
    let map = three();
    let mut world = World { map, ..World::new(32, Q, vec![(100, 0)]) };
    world.rest();
    let down = NodeNo(1);
    world.down.insert(down, 0);
    assert!(world.map.placements.iter().any(|p| p.orderer() == Some(down)));
    while world.turn(|_| false) {}
    assert!(world.map.placements.iter().all(|p| p.orderer().is_some_and(|first| first != down)));
    assert_eq!(world.planner.next_deadline(), Some(30_000));
}

/// Two of five nodes, or all nodes of a zone: rather the network than the nodes.
#[test]
fn many_nodes_down_are_not_given_up() {
    let mut world = World::new(32, Q, [(100, 0), (100, 0), (100, 1), (100, 1), (100, 2), (100, 2), (100, 2)].to_vec());
    (2..=7).for_each(|n| world.start(n));
    world.rest();
    let gives_up = |world: &mut World, down: &[u16]| {
        world.down = down.iter().map(|&n| (NodeNo(n), 0)).collect();
        world.now = 29_999;
        while world.turn(|_| false) {}
        assert!(world.map.members.iter().all(|m| m.standing == Standing::Up), "not yet");
        world.now = 30_000;
        let view = world.view(|_| false);
        let change = world.planner.plan(world.now, &world.map, &view);
        assert_eq!(world.planner.plan(world.now, &world.map, &View { isolated: true, ..view }), None);
        matches!(change, Some(Change::GiveUp { .. }))
    };
    assert!(gives_up(&mut world, &[1]));
    assert!(gives_up(&mut world, &[1, 3]));
    assert!(!gives_up(&mut world, &[1, 2]), "a zone");
    assert!(!gives_up(&mut world, &[1, 3, 5]), "three of seven");
}

/// All nodes restart at once: nothing is left, and the cluster goes on empty instead of waiting for ever.
#[test]
fn a_cluster_of_which_nothing_is_left_starts_again() {
    let mut world = World::new(32, Q, vec![(100, 0)]);
    (2..=3).for_each(|n| world.start(n));
    world.rest();
    (2..=3).for_each(|n| world.start(n));
    world.rest();
    assert!(
        world.map.placements.iter().all(|p| p.losses == 0 && p.is_filling(p.written().max().unwrap())),
        "one has it"
    );
    world.start(1);
    world.rest();
    assert_eq!(is_right(&world.map), Ok(()));
    assert!(world.map.placements.iter().all(|p| p.losses == 1 && p.replicas.iter().all(|r| !r.filling)));
}

/// One of three copies is being filled when the node of another one stands still: without that one the third alone is no
/// source, and what only the two have acknowledged would be gone. So it is waited for, and given up as soon as it is not needed.
#[test]
fn a_copy_that_another_is_filled_from_is_not_given_up() {
    let mut world = World::new(32, Q, vec![(100, 0)]);
    (2..=4).for_each(|n| world.start(n));
    world.rest();
    world.start(4);
    let filling = world.map.life_of(candidate(4, 1).id).unwrap().no;
    assert!(world.map.placements.iter().any(|p| p.is_filling(filling) && p.is_readable(NodeNo(1))));
    world.down.insert(NodeNo(1), world.now);
    world.now += 299_999;
    while world.turn(|no| no == filling) {}
    assert_eq!(world.map.member(NodeNo(1)).unwrap().standing, Standing::Up, "nothing could be filled without it");
    let mut back = world;
    back.down.clear();
    back.rest();
    assert_eq!(is_right(&back.map), Ok(()));
    assert!(back.map.placements.iter().all(|p| p.losses == 0 && p.replicas.iter().all(|r| !r.filling)));
    // Complete again: now nobody needs it.
    back.down.insert(NodeNo(1), back.now);
    back.now += 30_000;
    back.rest();
    assert!(back.map.member(NodeNo(1)).is_none_or(|m| m.standing == Standing::Lost));
    assert!(back.map.placements.iter().all(|p| p.losses == 0 && p.replicas.iter().all(|r| !r.filling)));
}

/// A machine that was replaced never comes back under its own id; the one at its address is the proof that it is over.
#[test]
fn a_life_is_over_when_another_node_has_its_address() {
    let map = three();
    let lost = map.apply(&Change::Lose(NodeNo(2))).unwrap();
    assert!(!is_dead(&lost, NodeNo(2)), "given up, and perhaps still running");
    let successor = Candidate { id: NodeId(99), ..candidate(2, 1) };
    let map = map.apply(&Change::Admit(successor)).unwrap();
    assert!(is_dead(&map, NodeNo(2)) && !is_dead(&map, NodeNo(4)));
}
