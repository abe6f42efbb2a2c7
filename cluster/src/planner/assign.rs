//! Where copies should be: the fewest exchanges of a single copy that put a map right.
//!
//! Nothing is computed from scratch. What there is gets looked at, and each thing that is wrong asks for one exchange, in this
//! order, at most one per shard:
//!
//! ```text
//!   1 a slot of a life that is over        -> a node that takes it      (never counts against balance: copies come first)
//!   2 fewer copies than there could be     -> a node that joins
//!   3 a copy on a draining node            -> another node, or nobody when there is none
//!   4 two copies in one zone               -> a node in another zone
//!   5 a node with less than 97 % of its fair share pulls, one with more than 103 % pushes
//! ```
//!
//! Among the nodes that may take a copy the shard's favourite wins ([`super::rendezvous`]) as long as it is below its fair
//! share. Where no single exchange helps (the nodes that have too much hold nothing that those with too little could
//! take), a chain of exchanges is looked for, breadth first.
//!
//! **Fair share**: copies are dealt out in proportion to weights, but no node holds a shard twice and no zone holds more copies of
//! a shard than it must, so small zones and heavy nodes are filled to what they can hold and the rest goes to the others.
//!
//! Asked again after all of it is done, the answer is empty. Shards on the move are counted where they go and left
//! alone. Not here: in how many steps a shard moves, how many at once, and when ([`super::Planner`]).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::rendezvous::{Salt, score};
use crate::ids::NodeNo;
use crate::map::{Map, Stage, Standing};

/// Bits after the point of a share.
const POINT: u32 = 32;
/// Chains that one call looks for, at most: each costs a look at the whole map.
const CHAINS: usize = 256;

/// One exchange of a copy. Without `leaving` the set grows, without `joining` it shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Of which shard.
    pub shard: u16,
    /// Who gives its copy up.
    pub leaving: Option<NodeNo>,
    /// Who takes one.
    pub joining: Option<NodeNo>,
    /// The life that leaves is over: there is nothing to be copied from it, its slot is taken at once.
    pub is_over: bool,
}

/// How many copies a node should hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// With less it pulls.
    pub low: usize,
    /// The fair share, rounded down.
    pub floor: usize,
    /// The fair share, rounded up.
    pub ceil: usize,
    /// With more it pushes.
    pub high: usize,
}

struct Node {
    no: NodeNo,
    salt: Salt,
    weight: u16,
    zone: usize,
    standing: Standing,
    /// Up and reachable: may take copies.
    is_open: bool,
    /// The present life of the same node, of a life that is over.
    successor: Option<usize>,
}

/// What may be done with a shard.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hands {
    /// Everything.
    Free,
    /// Only slots of lives that are over may be given away: some copy is not complete.
    Replace,
    /// Nothing.
    Off,
}

struct Table {
    /// By number, so a position is an order too.
    nodes: Vec<Node>,
    /// By shard: who holds it when the moves under way are done.
    slots: Vec<Vec<usize>>,
    hands: Vec<Hands>,
    /// By node: its copies.
    counts: Vec<usize>,
    shares: Vec<Share>,
    /// Copies that each shard should have.
    copies: usize,
    /// Copies of a shard that one zone may hold.
    zone_limit: usize,
    done: Vec<Exchange>,
}

/// The exchanges that put a map right, most urgent first. Copies are given only to nodes that are up and in `alive`.
pub fn assign(map: &Map, alive: &BTreeSet<NodeNo>) -> Vec<Exchange> {
    let mut table = Table::of(map, alive);
    if table.copies == 0 {
        return Vec::new();
    }
    table.replace_lost();
    table.grow();
    table.drain();
    table.part_zones();
    table.balance();
    table.done
}

/// The fair share of each member, in the order of the map; none for those that are not up.
pub fn shares(map: &Map) -> Vec<Share> {
    Table::of(map, &BTreeSet::new()).shares
}

impl Table {
    fn of(map: &Map, alive: &BTreeSet<NodeNo>) -> Table {
        let zones: BTreeSet<&str> = map.members.iter().map(|m| m.about.zone.as_str()).collect();
        let zones: BTreeMap<&str, usize> = zones.into_iter().enumerate().map(|(at, zone)| (zone, at)).collect();
        let at = |no: NodeNo| map.members.binary_search_by_key(&no, |m| m.no).ok();
        let nodes: Vec<Node> = map
            .members
            .iter()
            .map(|m| Node {
                no: m.no,
                salt: Salt::of(m.about.id),
                weight: m.about.weight,
                zone: zones[m.about.zone.as_str()],
                standing: m.standing,
                is_open: m.standing == Standing::Up && alive.contains(&m.no),
                successor: match m.standing {
                    Standing::Lost => map
                        .life_of(m.about.id)
                        .filter(|life| life.no > m.no && alive.contains(&life.no))
                        .and_then(|life| at(life.no)),
                    _ => None,
                },
            })
            .collect();
        let mut counts = vec![0; nodes.len()];
        let mut slots = Vec::with_capacity(map.placements.len());
        let mut hands = Vec::with_capacity(map.placements.len());
        for placement in &map.placements {
            let set: Vec<usize> = placement.new_set().iter().filter_map(|r| at(r.node)).collect();
            set.iter().for_each(|&node| counts[node] += 1);
            hands.push(match placement.stage {
                Stage::Normal if placement.replicas.iter().all(|r| !r.filling) => Hands::Free,
                Stage::Normal => Hands::Replace,
                _ => Hands::Off,
            });
            slots.push(set);
        }
        let up = nodes.iter().filter(|n| n.standing == Standing::Up).count();
        let copies = up.min(usize::from(map.quorums.n));
        let mut in_zone = vec![0; zones.len()];
        nodes.iter().filter(|n| n.standing == Standing::Up).for_each(|n| in_zone[n.zone] += 1);
        // The smallest number that leaves room for all copies; 1 as long as there are enough zones.
        let room = |limit: usize| in_zone.iter().map(|&size: &usize| size.min(limit)).sum::<usize>();
        let zone_limit = (1..=copies).find(|&limit| room(limit) >= copies).unwrap_or(1);
        let shares = fair_shares(&nodes, &in_zone, slots.len(), copies, zone_limit);
        Table { nodes, slots, hands, counts, shares, copies, zone_limit, done: Vec::new() }
    }

    fn is_up(&self, node: usize) -> bool {
        self.nodes[node].standing == Standing::Up
    }

    fn is_lost(&self, node: usize) -> bool {
        self.nodes[node].standing == Standing::Lost
    }

    fn score(&self, shard: usize, node: usize) -> (u64, NodeNo) {
        let Node { salt, weight, no, .. } = self.nodes[node];
        (score(shard as u16, salt, weight), no)
    }

    /// Whether the zone of `node` has room for a copy of the shard when `leaving` is gone. Only copies that stay count.
    fn zone_has_room(&self, shard: usize, leaving: Option<usize>, node: usize) -> bool {
        let zone = self.nodes[node].zone;
        let there = |&&held: &&usize| Some(held) != leaving && self.is_up(held) && self.nodes[held].zone == zone;
        self.slots[shard].iter().filter(there).count() < self.zone_limit
    }

    fn may_take(&self, shard: usize, leaving: Option<usize>, node: usize) -> bool {
        self.nodes[node].is_open && !self.slots[shard].contains(&node) && self.zone_has_room(shard, leaving, node)
    }

    /// The shard's favourite among those that may take a copy and hold fewer than `limit`.
    fn favourite(&self, shard: usize, leaving: Option<usize>, limit: impl Fn(&Share) -> usize) -> Option<usize> {
        let fits = |&node: &usize| self.counts[node] < limit(&self.shares[node]) && self.may_take(shard, leaving, node);
        (0..self.nodes.len()).filter(fits).max_by_key(|&node| self.score(shard, node))
    }

    /// Who takes a copy that must be taken: better a node that has enough already than nobody.
    fn taker(&self, shard: usize, leaving: Option<usize>) -> Option<usize> {
        let least = || {
            let open = (0..self.nodes.len()).filter(|&node| self.may_take(shard, leaving, node));
            open.min_by(|&a, &b| self.compare_load(a, b))
        };
        // Those that would have to pull later come first, so that no copy moves twice.
        let bounds: [fn(&Share) -> usize; 3] = [|share| share.low, |share| share.ceil, |share| share.high];
        bounds.into_iter().find_map(|bound| self.favourite(shard, leaving, bound)).or_else(least)
    }

    /// As [`Table::taker`]; and better two copies in one zone than one copy.
    fn taker_of_any_zone(&self, shard: usize, leaving: Option<usize>) -> Option<usize> {
        let any = || {
            let open = |&node: &usize| self.nodes[node].is_open && !self.slots[shard].contains(&node);
            (0..self.nodes.len()).filter(open).min_by(|&a, &b| self.compare_load(a, b))
        };
        self.taker(shard, leaving).or_else(any)
    }

    /// Compares how full two nodes are, each relative to its share.
    fn compare_load(&self, a: usize, b: usize) -> std::cmp::Ordering {
        let share = |node: usize| self.shares[node].ceil.max(1);
        (self.counts[a] * share(b)).cmp(&(self.counts[b] * share(a))).then(a.cmp(&b))
    }

    fn exchange(&mut self, shard: usize, leaving: Option<usize>, joining: Option<usize>) {
        match (leaving.and_then(|node| self.slots[shard].iter().position(|&held| held == node)), joining) {
            (Some(slot), Some(node)) => self.slots[shard][slot] = node,
            (Some(slot), None) => drop(self.slots[shard].remove(slot)),
            (None, Some(node)) => self.slots[shard].push(node),
            (None, None) => return,
        }
        leaving.into_iter().for_each(|node| self.counts[node] -= 1);
        joining.into_iter().for_each(|node| self.counts[node] += 1);
        self.hands[shard] = Hands::Off;
        self.done.push(Exchange {
            shard: shard as u16,
            leaving: leaving.map(|node| self.nodes[node].no),
            joining: joining.map(|node| self.nodes[node].no),
            is_over: leaving.is_some_and(|node| self.is_lost(node)),
        });
    }

    fn replace_lost(&mut self) {
        for shard in 0..self.slots.len() {
            let Some(&lost) = self.slots[shard].iter().find(|&&node| self.is_lost(node)) else { continue };
            if self.hands[shard] != Hands::Off {
                let successor = self.nodes[lost].successor.filter(|node| !self.slots[shard].contains(node));
                let same = successor.filter(|&node| self.may_take(shard, Some(lost), node));
                let taker = same.or_else(|| self.taker_of_any_zone(shard, Some(lost))).or(successor);
                if taker.is_some() {
                    self.exchange(shard, Some(lost), taker);
                }
            }
            // Until that slot is taken nothing else is done with the shard.
            self.hands[shard] = Hands::Off;
        }
    }

    fn grow(&mut self) {
        for shard in 0..self.slots.len() {
            if self.hands[shard] == Hands::Free
                && self.slots[shard].len() < self.copies
                && let Some(node) = self.taker_of_any_zone(shard, None)
            {
                self.exchange(shard, None, Some(node));
            }
        }
    }

    fn drain(&mut self) {
        for shard in 0..self.slots.len() {
            if self.hands[shard] != Hands::Free {
                continue;
            }
            let Some(&leaving) = self.slots[shard].iter().find(|&&node| !self.is_up(node)) else { continue };
            if self.slots[shard].len() > self.copies {
                self.exchange(shard, Some(leaving), None);
            } else if let Some(node) = self.taker(shard, Some(leaving)) {
                self.exchange(shard, Some(leaving), Some(node));
            }
        }
    }

    fn part_zones(&mut self) {
        for shard in 0..self.slots.len() {
            if self.hands[shard] != Hands::Free {
                continue;
            }
            let crowded = |&node: &usize| self.is_up(node) && !self.zone_has_room(shard, Some(node), node);
            let set = self.slots[shard].iter().copied();
            let Some(leaving) = set.filter(crowded).max_by(|&a, &b| self.compare_load(a, b)) else { continue };
            if let Some(node) = self.taker(shard, Some(leaving)) {
                self.exchange(shard, Some(leaving), Some(node));
            }
        }
    }

    fn balance(&mut self) {
        let mut chains = CHAINS;
        let mut open: Vec<usize> = (0..self.nodes.len()).filter(|&node| self.nodes[node].is_open).collect();
        open.sort_by(|&a, &b| self.compare_load(a, b));
        for &node in &open {
            self.pull(node, &mut chains);
        }
        for node in (0..self.nodes.len()).filter(|&node| self.is_up(node)).collect::<Vec<_>>() {
            self.push(node, &mut chains);
        }
    }

    /// Brings a node that has too little up to its fair share, from those that have the most.
    fn pull(&mut self, node: usize, chains: &mut usize) {
        if self.counts[node] >= self.shares[node].low {
            return;
        }
        let may = |&shard: &usize| self.hands[shard] == Hands::Free && !self.slots[shard].contains(&node);
        let mut wanted: Vec<usize> = (0..self.slots.len()).filter(may).collect();
        wanted.sort_by_cached_key(|&shard| (std::cmp::Reverse(self.score(shard, node)), shard));
        // First from those that must give, then from those that can.
        let bounds: [fn(&Share) -> usize; 2] = [|share| share.high, |share| share.floor];
        for keeps in bounds {
            for &shard in &wanted {
                if self.counts[node] >= self.shares[node].floor {
                    return;
                }
                if self.hands[shard] != Hands::Free {
                    continue;
                }
                let gives = |&held: &usize| {
                    self.counts[held] > keeps(&self.shares[held]) && self.may_take(shard, Some(held), node)
                };
                let set = self.slots[shard].iter().copied();
                if let Some(donor) = set.filter(gives).max_by(|&a, &b| self.compare_load(a, b)) {
                    self.exchange(shard, Some(donor), Some(node));
                }
            }
        }
        let bounds: [fn(&Share) -> usize; 2] = [|share| share.floor, |share| share.low];
        for keeps in bounds {
            while self.counts[node] < self.shares[node].low && *chains > 0 {
                *chains -= 1;
                if !self.chain(|table, donor| table.counts[donor] > keeps(&table.shares[donor]), |_, to| to == node) {
                    break;
                }
            }
        }
    }

    /// Brings a node that has too much down to the bound.
    fn push(&mut self, node: usize, chains: &mut usize) {
        if self.counts[node] <= self.shares[node].high {
            return;
        }
        let may = |&shard: &usize| self.hands[shard] == Hands::Free && self.slots[shard].contains(&node);
        let mut held: Vec<usize> = (0..self.slots.len()).filter(may).collect();
        held.sort_by_cached_key(|&shard| (self.score(shard, node), shard));
        for shard in held {
            if self.counts[node] <= self.shares[node].high {
                return;
            }
            if let Some(to) = self.favourite(shard, Some(node), |share| share.ceil) {
                self.exchange(shard, Some(node), Some(to));
            }
        }
        let bounds: [fn(&Share) -> usize; 2] = [|share| share.ceil, |share| share.high];
        for takes in bounds {
            while self.counts[node] > self.shares[node].high && *chains > 0 {
                *chains -= 1;
                if !self.chain(|_, from| from == node, |table, to| table.counts[to] < takes(&table.shares[to])) {
                    break;
                }
            }
        }
    }

    /// Takes one copy from a node and gives one to another, over as many nodes between them as it needs. False when
    /// there is no such way.
    fn chain(&mut self, from: impl Fn(&Table, usize) -> bool, to: impl Fn(&Table, usize) -> bool) -> bool {
        let mut held = vec![Vec::new(); self.nodes.len()];
        for (shard, set) in self.slots.iter().enumerate().filter(|&(shard, _)| self.hands[shard] == Hands::Free) {
            set.iter().for_each(|&node| held[node].push(shard));
        }
        // How each node was reached: over which shard, from whom.
        let mut reached: Vec<Option<(usize, usize)>> = vec![None; self.nodes.len()];
        let mut queue: VecDeque<usize> =
            (0..self.nodes.len()).filter(|&node| self.is_up(node) && from(self, node)).collect();
        let sources: BTreeSet<usize> = queue.iter().copied().collect();
        let mut unseen: Vec<usize> =
            (0..self.nodes.len()).filter(|node| self.nodes[*node].is_open && !sources.contains(node)).collect();
        let mut end = None;
        'search: while let Some(giver) = queue.pop_front() {
            for &shard in &held[giver] {
                while let Some(at) = unseen.iter().position(|&node| self.may_take(shard, Some(giver), node)) {
                    let node = unseen.swap_remove(at);
                    reached[node] = Some((shard, giver));
                    if to(self, node) {
                        end = Some(node);
                        break 'search;
                    }
                    queue.push_back(node);
                }
            }
        }
        let Some(mut node) = end else { return false };
        let mut links = Vec::new();
        while let Some((shard, giver)) = reached[node] {
            links.push((shard, giver, node));
            node = giver;
        }
        // One exchange per shard: a chain that needs two waits until the first is done.
        if links.iter().map(|&(shard, ..)| shard).collect::<BTreeSet<_>>().len() < links.len() {
            return false;
        }
        links.into_iter().for_each(|(shard, giver, node)| self.exchange(shard, Some(giver), Some(node)));
        true
    }
}

/// Deals the copies out: in proportion to weights, as far as nodes and zones can hold them.
fn fair_shares(nodes: &[Node], in_zone: &[usize], shards: usize, copies: usize, zone_limit: usize) -> Vec<Share> {
    let node_room = (shards as u128) << POINT;
    let zone_room: Vec<u128> = in_zone.iter().map(|&size| (size.min(zone_limit) as u128) * node_room).collect();
    let take = |node: &Node, level: u128| {
        if node.standing == Standing::Up { (level * u128::from(node.weight)).min(node_room) } else { 0 }
    };
    // What a zone takes in when each of its nodes is filled to `level` per unit of weight.
    let fill = |zone: usize, level: u128| nodes.iter().filter(|n| n.zone == zone).map(|n| take(n, level)).sum::<u128>();
    let highest = |fits: &dyn Fn(u128) -> bool| {
        let (mut low, mut high) = (0, node_room + 1);
        while high - low > 1 {
            let middle = (low + high) / 2;
            if fits(middle) { low = middle } else { high = middle }
        }
        low
    };
    let total = copies as u128 * node_room;
    let all = |level| (0..in_zone.len()).map(|zone| fill(zone, level).min(zone_room[zone])).sum::<u128>();
    let level = highest(&|level| all(level) <= total);
    let levels: Vec<u128> =
        (0..in_zone.len())
            .map(|zone| {
                if fill(zone, level) <= zone_room[zone] {
                    level
                } else {
                    highest(&|l| fill(zone, l) <= zone_room[zone])
                }
            })
            .collect();
    // The level is rounded down: what that takes away must not make a whole copy.
    let slack = 1 << 20;
    let whole = |share: u128| ((share + slack) >> POINT) as usize;
    let up = |share: u128| ((share.saturating_sub(slack) + (1 << POINT) - 1) >> POINT) as usize;
    nodes
        .iter()
        .map(|node| {
            let share = take(node, levels[node.zone]);
            Share {
                low: whole(share * 97 / 100).max(whole(share).min(1)),
                floor: whole(share),
                ceil: up(share),
                high: up(share * 103 / 100).min(shards),
            }
        })
        .collect()
}
