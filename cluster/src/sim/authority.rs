//! Who decides on the map in a simulated cluster: the real planner, and in place of the register one holder of the map.
//!
//! Nodes are never asked: they report what they have adopted and filled, and reports take their time. What the planner sees is
//! therefore old, and different from what each node sees. [`MapSource`] is all that a world asks of it, so that real control
//! machines can take its place.

use std::collections::BTreeMap;
use std::sync::Arc;

use gridkv_engine::Millis;

use crate::ids::{NodeId, NodeNo};
use crate::map::{Candidate, Change, Map, Refusal, Stage};
use crate::planner::{Planner, Settings, View};
use crate::planted::{Bug, Planted};

/// What a world needs of whoever decides on the map.
pub trait MapSource {
    /// The newest map.
    fn map(&self) -> &Arc<Map>;
    /// A node wants in, or out; a refused change changes nothing.
    ///
    /// # Errors
    /// As [`Map::apply`].
    fn ask(&mut self, change: &Change) -> Result<(), Refusal>;
    /// Every core of a life has adopted the map of that epoch.
    fn on_adopted(&mut self, node: NodeNo, epoch: u64);
    /// A life holds everything of a shard that it needs in that epoch.
    fn on_filled(&mut self, shard: u16, epoch: u64, node: NodeNo);
    /// A node can be reached as that life, or not any more.
    fn on_seen(&mut self, now: Millis, node: NodeId, life: Option<NodeNo>);
    /// Whether it believes that a life can be reached.
    fn sees(&self, node: NodeNo) -> bool;
    /// Time to think. True when the map has changed.
    fn think(&mut self, now: Millis) -> bool;
}

/// See the head of the file.
#[derive(Debug)]
pub struct Authority {
    map: Arc<Map>,
    planner: Planner,
    view: View,
    seen: BTreeMap<NodeId, NodeNo>,
    planted: Planted,
    /// Changes that made a map.
    pub changes: u64,
}

impl Authority {
    /// One that starts with this map.
    pub fn new(map: Map, settings: Settings, planted: Planted) -> Authority {
        let view = View::default();
        let seen = BTreeMap::new();
        Authority { map: Arc::new(map), planner: Planner::new(settings), view, seen, planted, changes: 0 }
    }

    fn refresh(&mut self, now: Millis) {
        let Authority { map, view, seen, .. } = self;
        let is_seen = |no: &NodeNo| seen.values().any(|seen| seen == no);
        view.alive = map.present().map(|m| m.no).filter(is_seen).collect();
        view.down_since.retain(|no, _| map.member(*no).is_some() && !is_seen(no));
        for member in map.present() {
            if !is_seen(&member.no) {
                view.down_since.entry(member.no).or_insert(now);
            }
        }
        view.adopted.retain(|no, _| map.member(*no).is_some());
        view.filled.retain(|(shard, epoch, _)| map.placements[usize::from(*shard)].epoch == *epoch);
        view.isolated = 2 * view.alive.len() <= map.present().count();
    }
}

impl MapSource for Authority {
    fn map(&self) -> &Arc<Map> {
        &self.map
    }

    fn ask(&mut self, change: &Change) -> Result<(), Refusal> {
        self.map = Arc::new(self.map.apply(change)?);
        self.changes += 1;
        Ok(())
    }

    fn on_adopted(&mut self, node: NodeNo, epoch: u64) {
        let adopted = self.view.adopted.entry(node).or_default();
        *adopted = epoch.max(*adopted);
    }

    fn on_filled(&mut self, shard: u16, epoch: u64, node: NodeNo) {
        self.view.filled.insert((shard, epoch, node));
    }

    fn on_seen(&mut self, now: Millis, node: NodeId, life: Option<NodeNo>) {
        match life {
            Some(no) => drop(self.seen.insert(node, no)),
            None => drop(self.seen.remove(&node)),
        }
        self.refresh(now);
    }

    fn sees(&self, node: NodeNo) -> bool {
        self.seen.values().any(|seen| *seen == node)
    }

    fn think(&mut self, now: Millis) -> bool {
        self.refresh(now);
        if self.planted.has(Bug::HastyMove) {
            // Nobody is asked whether he has heard of it.
            self.view.adopted = self.map.members.iter().map(|m| (m.no, u64::MAX)).collect();
        }
        let Some(change) = self.planner.plan(now, &self.map, &self.view) else { return false };
        self.ask(&change).is_ok()
    }
}

/// The map of a new world: shards spread over all nodes in turn.
pub fn first_map(candidates: &[Candidate], shards: u16, seed: u64, quorums: crate::quorum::Quorums) -> Map {
    let mut map = Map::create(seed, seed, shards, quorums, candidates[0].clone());
    for candidate in &candidates[1..] {
        map = map.apply(&Change::Admit(candidate.clone())).expect("a new node is admitted");
    }
    let nodes = candidates.len();
    let copies = usize::from(quorums.n).min(nodes);
    for (shard, placement) in map.placements.iter_mut().enumerate() {
        let node = |copy| NodeNo(((shard + copy) % nodes) as u16 + 1);
        placement.replicas = (0..copies).map(|copy| crate::map::Replica { node: node(copy), filling: false }).collect();
    }
    map.check().expect("the first map keeps the rules");
    map
}

/// Whether every shard is complete and at rest.
pub fn is_whole(map: &Map) -> bool {
    let up = map.present().filter(|m| m.standing == crate::map::Standing::Up).count();
    let copies = usize::from(map.quorums.n).min(up);
    map.placements.iter().all(|p| {
        let serve = p.replicas.iter().all(|r| !r.filling && map.present().any(|m| m.no == r.node));
        p.stage == Stage::Normal && serve && p.replicas.len() >= copies
    })
}
