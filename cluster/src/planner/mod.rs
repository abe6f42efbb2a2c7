//! The planner: what should become of the map next.
//!
//! A pure function of the map and of what is known about the nodes, run by the node that leads (the lowest live voter). It proposes
//! one change at a time and looks again when the map has it. Nothing depends on who leads: two that plan at once propose steps for the
//! same shard epochs, and the map takes each only once.
//!
//! ```text
//!   voters ─▶ nodes that are lost ─▶ steps of shards, at most 1024 in one change:
//!                                      stages that can be left   (filled, read new, finish, abort)
//!                                      orderers that are down    (the next readable copy is to order; also when its clock is wrong)
//!                                      exchanges of copies       (planner::assign), at most 64 shards on the move
//!                                      orderers spread evenly    (when nothing else is to do)
//! ```
//!
//! Promises:
//! - A stage is left only when enough replicas have adopted it (`docs/protocols/moves.md` has the why). Adoption is only
//!   ever read from [`View::adopted`] and from the map itself: a life whose node runs again under a new number is over for sure
//!   and answers nobody.
//! - A node is given up only when it alone, not the network or a zone, seems to be the trouble; and much later when without its
//!   copy a shard could not be completed any more ([`MERCY`]).
//! - Data is given up only when no complete copy is left anywhere. Everything short of that waits for an operator.
//! - With a view that stays as it is, the planner comes to rest.
//!
//! Not here: agreeing on a change (the register), learning who is alive (membership), filling a replica.

pub mod assign;
pub mod rendezvous;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use gridkv_engine::Millis;

use self::assign::{Exchange, assign};
use crate::ids::NodeNo;
use crate::map::{Change, Map, Member, Placement, Stage, Standing, Step, Transition};

/// Steps in one change, at most.
pub const MAX_STEPS: usize = 1024;

/// A life that holds a copy without which another one cannot be filled is given up only after so many times
/// [`Settings::replace_after_ms`]. If it only stands still it is worth waiting for, and a node that restarts is not waited for.
pub const MERCY: Millis = 10;

/// What the planner may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// A node that was down for so long is given up. In memory, waiting for it brings nothing back: it restarts empty.
    pub replace_after_ms: Millis,
    /// Shards on the move at once.
    pub moves_at_once: usize,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { replace_after_ms: 30_000, moves_at_once: 64 }
    }
}

/// What the leading node knows of the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Lives that can be reached, this node's own among them.
    pub alive: BTreeSet<NodeNo>,
    /// The map epoch that every core of a life has adopted.
    pub adopted: BTreeMap<NodeNo, u64>,
    /// Shard, shard epoch, node: it has everything it needs to count at that epoch.
    pub filled: BTreeSet<(u16, u64, NodeNo)>,
    /// Since when a life cannot be reached.
    pub down_since: BTreeMap<NodeNo, Millis>,
    /// Lives whose clock is wrong: they order nothing, if another one can.
    pub quarantined: BTreeSet<NodeNo>,
    /// Those who were to be voters were silent lately: the voters stay as they are for a while.
    pub voters_silent: bool,
    /// This node cannot reach a majority: what it believes about the others means nothing.
    pub isolated: bool,
}

impl View {
    fn has_adopted(&self, node: NodeNo, epoch: u64) -> bool {
        self.adopted.get(&node).is_some_and(|&adopted| adopted >= epoch)
    }
}

/// See the head of the file.
#[derive(Debug, Default)]
pub struct Planner {
    settings: Settings,
    /// Exchanges found and not yet begun, most urgent first.
    exchanges: VecDeque<Exchange>,
    /// For whom they were found: members and whether each is alive. Others need other exchanges.
    found_for: Vec<(NodeNo, Standing, bool)>,
    /// The map epoch at which they were found.
    found_at: u64,
    deadline: Option<Millis>,
}

impl Planner {
    /// One that knows nothing yet.
    pub fn new(settings: Settings) -> Planner {
        Planner { settings, ..Planner::default() }
    }

    /// The next change to propose. Call it when the map or the view has changed, and at [`Planner::next_deadline`].
    pub fn plan(&mut self, now: Millis, map: &Map, view: &View) -> Option<Change> {
        self.deadline = None;
        if view.isolated {
            return None;
        }
        Some(view)
            .filter(|view| !view.voters_silent)
            .and_then(|view| voters(map, view))
            .or_else(|| self.lose(now, map, view).map(|life| Change::GiveUp { life, epoch: map.epoch }))
            .or_else(|| Some(self.steps(map, view)).filter(|steps| !steps.is_empty()).map(Change::Steps))
    }

    /// When a node will have been down for long enough to be given up.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.deadline
    }

    /// A node that is to be given up.
    fn lose(&mut self, now: Millis, map: &Map, view: &View) -> Option<NodeNo> {
        let down: Vec<&Member> =
            map.present().filter(|m| !view.alive.contains(&m.no) && view.down_since.contains_key(&m.no)).collect();
        let present = map.present().count();
        let few = if present == 3 { down.len() <= 1 } else { 3 * down.len() < present };
        let zones: BTreeSet<&str> = map.present().map(|m| m.about.zone.as_str()).collect();
        let is_zone_down = |zone: &str| {
            let of_zone = |m: &&&Member| m.about.zone == zone;
            let there = map.present().filter(|m| m.about.zone == zone).count();
            zones.len() >= 2 && there >= 2 && down.iter().filter(of_zone).count() == there
        };
        let mut over = None;
        for member in down.iter().filter(|m| few && !is_zone_down(&m.about.zone)) {
            let patience = if is_needed(map, member.no) { MERCY } else { 1 };
            let due =
                view.down_since[&member.no].saturating_add(patience.saturating_mul(self.settings.replace_after_ms));
            if due > now {
                self.deadline = Some(self.deadline.map_or(due, |at| at.min(due)));
            } else {
                over = over.or(Some(member.no));
            }
        }
        over
    }

    fn steps(&mut self, map: &Map, view: &View) -> Vec<Step> {
        let mut steps: BTreeMap<u16, Transition> = BTreeMap::new();
        for (shard, placement) in map.placements.iter().enumerate() {
            let step = leave_stage(map, view, shard as u16, placement).or_else(|| replace_orderer(view, placement));
            if let Some(transition) = step.filter(|_| steps.len() < MAX_STEPS) {
                steps.insert(shard as u16, transition);
            }
        }
        self.begin_exchanges(map, view, &mut steps);
        let is_moving = map.placements.iter().any(|p| p.stage != Stage::Normal);
        if steps.is_empty() && !is_moving {
            spread_orderers(map, view, &mut steps);
        }
        let step = |(shard, transition)| Step { shard, epoch: map.placements[usize::from(shard)].epoch, transition };
        steps.into_iter().map(step).collect()
    }

    fn begin_exchanges(&mut self, map: &Map, view: &View, steps: &mut BTreeMap<u16, Transition>) {
        let members = map.members.iter().map(|m| (m.no, m.standing, view.alive.contains(&m.no))).collect();
        let is_same = self.found_for == members;
        if is_same && (self.begin_found(map, view, steps) || self.found_at == map.epoch) {
            return;
        }
        self.exchanges = assign(map, &view.alive).into();
        (self.found_for, self.found_at) = (members, map.epoch);
        self.begin_found(map, view, steps);
    }

    /// Begins what was found, as much as may be on the move at once. False when there is nothing to begin.
    fn begin_found(&mut self, map: &Map, view: &View, steps: &mut BTreeMap<u16, Transition>) -> bool {
        let mut moving = map.placements.iter().filter(|p| p.stage != Stage::Normal).count();
        let before = steps.len();
        let mut rest = VecDeque::new();
        while let Some(exchange) = self.exchanges.pop_front() {
            let full = steps.len() >= MAX_STEPS || !exchange.is_over && moving >= self.settings.moves_at_once;
            if full || steps.contains_key(&exchange.shard) {
                rest.push_back(exchange);
                continue;
            }
            match begin(map, view, &exchange) {
                Begin::Now(transition) => {
                    steps.insert(exchange.shard, transition);
                    moving += usize::from(!exchange.is_over);
                    // Kept until the map has it: the change may not come through.
                    rest.push_back(exchange);
                }
                Begin::Later => rest.push_back(exchange),
                Begin::Never => {}
            }
        }
        self.exchanges = rest;
        steps.len() > before
    }
}

/// Whether an exchange that was found a while ago still makes sense.
enum Begin {
    Now(Transition),
    /// It waits for nodes to come back.
    Later,
    /// It is done, or the map has moved on.
    Never,
}

fn begin(map: &Map, view: &View, exchange: &Exchange) -> Begin {
    let Exchange { shard, leaving, joining, is_over } = *exchange;
    let placement = &map.placements[usize::from(shard)];
    let holds = |no| placement.replicas.iter().any(|r| r.node == no);
    if placement.stage != Stage::Normal || joining.is_some_and(holds) || leaving.is_some_and(|no| !holds(no)) {
        return Begin::Never;
    }
    if joining.is_some_and(|no| map.member(no).is_none_or(|m| m.standing == Standing::Lost)) {
        return Begin::Never;
    }
    if is_over {
        return match (leaving, joining) {
            (Some(old), Some(new)) => Begin::Now(Transition::Replace { old, new }),
            _ => Begin::Never,
        };
    }
    let copies = placement.replicas.len();
    if placement.replicas.iter().any(|r| r.filling || is_lost(map, r.node)) {
        return Begin::Never;
    }
    if leaving.is_none() && copies >= usize::from(map.quorums.n) {
        return Begin::Never;
    }
    let alive = placement.replicas.iter().filter(|r| view.alive.contains(&r.node)).count();
    if joining.is_none() {
        // Nobody is filled: what was written must be met by the reads of the smaller set as it is.
        if copies < 2 || !may_shrink(map, copies) {
            return Begin::Never;
        }
        if alive < copies {
            return Begin::Later;
        }
    } else if alive < map.quorums.sources(copies) {
        return Begin::Later;
    }
    Begin::Now(Transition::Begin { joining, leaving })
}

fn is_lost(map: &Map, no: NodeNo) -> bool {
    map.member(no).is_none_or(|m| m.standing == Standing::Lost)
}

/// Whether some shard has no more sources than a filling copy needs, this life among them: to give it up is to give up on that
/// copy, and with it on the shard.
fn is_needed(map: &Map, no: NodeNo) -> bool {
    map.placements.iter().any(|placement| {
        let set = match placement.stage {
            Stage::ReadNew => placement.new_set(),
            _ => placement.replicas.clone(),
        };
        let serving = || set.iter().filter(|r| !r.filling && !is_lost(map, r.node));
        serving().any(|r| r.node == no) && serving().count() <= map.quorums.sources(set.len())
    })
}

/// The life is over for certain, not only given up: its node runs again as another one, or another node has its address.
fn is_dead(map: &Map, no: NodeNo) -> bool {
    let follows = |other: &Member, m: &Member| {
        other.no > m.no && (other.about.id == m.about.id || other.about.peer == m.about.peer)
    };
    map.member(no).is_some_and(|m| m.standing == Standing::Lost && map.members.iter().any(|other| follows(other, m)))
}

/// Whether a life answers nobody any more at an epoch before that one.
fn is_silent(map: &Map, view: &View, no: NodeNo, epoch: u64) -> bool {
    view.has_adopted(no, epoch) || is_dead(map, no)
}

/// Whether a set can lose one copy with nobody filled instead: every write of the set of that many must be on as many of the
/// smaller set as its own writes are, else the next loss or the next filling could miss it.
fn may_shrink(map: &Map, copies: usize) -> bool {
    copies >= 2 && map.quorums.of(copies).0 > map.quorums.of(copies - 1).0
}

/// Who votes on the map: 1, 3 or 5 seats, as many as there are nodes for; those that vote already rather than others, and of the
/// others one in each zone first.
fn voters(map: &Map, view: &View) -> Option<Change> {
    if !map.next_voters.is_empty() {
        return Some(Change::VotersDone);
    }
    let up = |seat: &NodeNo| map.seated(*seat).filter(|m| m.standing == Standing::Up);
    let is_alive = |m: &Member| view.alive.contains(&m.no);
    let mut kept: Vec<&Member> = map.voters.iter().filter_map(up).collect();
    kept.sort_by_key(|m| (!is_alive(m), m.seat));
    let votes = |m: &Member| map.voters.contains(&m.seat);
    let mut others: Vec<&Member> =
        map.present().filter(|m| m.standing == Standing::Up && is_alive(m) && !votes(m)).collect();
    others.sort_by_key(|m| m.seat);
    let want = match kept.len() + others.len() {
        0 => return None,
        1 | 2 => 1,
        3 | 4 => 3,
        _ => 5,
    };
    kept.truncate(want);
    while kept.len() < want {
        let is_new_zone = |m: &&Member| kept.iter().all(|k| k.about.zone != m.about.zone);
        let at = others.iter().position(is_new_zone).unwrap_or(0);
        kept.push(others.remove(at));
    }
    let mut seats: Vec<NodeNo> = kept.iter().map(|m| m.seat).collect();
    seats.sort();
    let mut present = map.voters.clone();
    present.sort();
    (seats != present).then_some(Change::Voters(seats))
}

/// Whether a filled replica may count. Its former self may still run, given up but unaware: together with those that have not
/// adopted this epoch it must not make a quorum of reads. Sources of a fill have adopted it, which is enough where `w` and `r`
/// are majorities; for a smaller `r` more of them must.
fn may_count(map: &Map, view: &View, placement: &Placement) -> bool {
    let serving = || placement.replicas.iter().filter(|r| !r.filling && !is_lost(map, r.node));
    let adopted = serving().filter(|r| view.has_adopted(r.node, placement.epoch)).count();
    adopted >= map.quorums.blocks_reads(placement.replicas.len()).min(serving().count())
}

/// The way out of the stage that a shard is in, if it is open.
fn leave_stage(map: &Map, view: &View, shard: u16, placement: &Placement) -> Option<Transition> {
    let copies = placement.replicas.len();
    let has_filled = |node| view.filled.contains(&(shard, placement.epoch, node));
    let old = || placement.replicas.iter().filter(|r| !r.filling).map(|r| r.node);
    match placement.stage {
        Stage::Normal => {
            let filling = || placement.replicas.iter().filter(|r| r.filling).map(|r| r.node);
            if let Some(node) = filling().find(|&node| has_filled(node) && !is_lost(map, node))
                && may_count(map, view, placement)
            {
                return Some(Transition::Filled { node });
            }
            let nobody_serves = filling().count() == copies;
            (nobody_serves && filling().any(|node| view.alive.contains(&node) && !is_lost(map, node)))
                .then_some(Transition::AcceptLoss)
        }
        Stage::WriteBoth => {
            if placement.joining.is_some_and(|no| is_lost(map, no)) {
                // Turned back from ReadNew: as long as somebody may read the new set it must be written to.
                let new = placement.new_set();
                let silent = new.iter().filter(|r| is_silent(map, view, r.node, placement.epoch)).count();
                return (silent >= map.quorums.blocks_reads(new.len())).then_some(Transition::Abort);
            }
            let sources = map.quorums.sources(copies);
            let joiner_is_up =
                |no| view.alive.contains(&no) && map.member(no).is_some_and(|m| m.standing == Standing::Up);
            // A joiner that is down makes writes wait for nothing; and what cannot be filled any more never will be.
            if placement.joining.is_some_and(|no| !joiner_is_up(no))
                || old().filter(|&node| !is_lost(map, node)).count() < sources
            {
                return Some(Transition::Abort);
            }
            let adopted = old().filter(|&node| view.has_adopted(node, placement.epoch)).count();
            let is_complete = match placement.joining {
                Some(node) => has_filled(node) && view.has_adopted(node, placement.epoch),
                None => may_shrink(map, copies),
            };
            (adopted >= sources && is_complete).then_some(Transition::ReadNew)
        }
        Stage::ReadNew => {
            let silent = old().filter(|&node| is_silent(map, view, node, placement.epoch)).count();
            (silent >= map.quorums.blocks_reads(copies)).then_some(Transition::Finish)
        }
    }
}

/// When the node that orders conditional commands is down, not complete, or has a wrong clock, another one that can be read
/// takes over.
fn replace_orderer(view: &View, placement: &Placement) -> Option<Transition> {
    let can = |node| view.alive.contains(&node) && placement.is_readable(node) && !view.quarantined.contains(&node);
    if placement.orderer().is_some_and(can) {
        return None;
    }
    // The joining one takes its turn by the place of the leaver; only those of the old set can be named.
    let node = placement.replicas.iter().map(|r| r.node).find(|&node| can(node))?;
    Some(Transition::First { node })
}

/// Evens out how many shards each node orders, when some node is more than a tenth off.
fn spread_orderers(map: &Map, view: &View, steps: &mut BTreeMap<u16, Transition>) {
    let shares = assign::shares(map);
    let is_open =
        |m: &Member| m.standing == Standing::Up && view.alive.contains(&m.no) && !view.quarantined.contains(&m.no);
    let total: usize = map.members.iter().zip(&shares).filter(|(m, _)| is_open(m)).map(|(_, s)| s.ceil).sum();
    if total == 0 {
        return;
    }
    struct Orders {
        has: i64,
        /// The fair number, in 1/1024.
        fair: i64,
    }
    let shards = map.placements.len();
    let mut orders: BTreeMap<NodeNo, Orders> = map
        .members
        .iter()
        .zip(&shares)
        .filter(|(m, s)| is_open(m) && s.ceil > 0)
        .map(|(m, s)| (m.no, Orders { has: 0, fair: ((shards * s.ceil) << 10).div_ceil(total) as i64 }))
        .collect();
    for first in map.placements.iter().filter_map(Placement::orderer) {
        orders.entry(first).and_modify(|o| o.has += 1);
    }
    let has_too_many = |o: &Orders| o.has << 10 > o.fair * 11 / 10 + 1023;
    let has_too_few = |o: &Orders| (o.has + 1) << 10 <= o.fair * 9 / 10;
    for (shard, placement) in map.placements.iter().enumerate() {
        if steps.len() >= (shards / 32).clamp(8, MAX_STEPS) {
            return;
        }
        let Some(from) = placement.orderer().filter(|first| orders.contains_key(first)) else { continue };
        let can = |r: &&crate::map::Replica| !r.filling && r.node != from && orders.contains_key(&r.node);
        let others = placement.replicas.iter().filter(can).map(|r| r.node);
        let Some(to) = others.min_by_key(|no| (orders[no].has << 30) / orders[no].fair) else { continue };
        let (giver, taker) = (&orders[&from], &orders[&to]);
        // The sum of squares over shares falls with each step, so this ends.
        let is_better = (2 * taker.has + 1) * giver.fair < (2 * giver.has - 1) * taker.fair;
        if is_better && (has_too_many(giver) || has_too_few(taker)) {
            steps.insert(shard as u16, Transition::First { node: to });
            orders.entry(from).and_modify(|o| o.has -= 1);
            orders.entry(to).and_modify(|o| o.has += 1);
        }
    }
}
