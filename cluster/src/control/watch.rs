//! What a new map, or a node that comes or goes, means for the data: who holds shards now that did not, and which shards are at
//! risk.
//!
//! A shard is *at risk* when too few of its complete copies are in reach to write (its writes are refused then), or only one is
//! while it has others. A shard that never had a second copy is not; the cluster has too few nodes then, which is no news.
//! One step before it a shard is degraded, which the node counts for itself.
//!
//! Pure functions of maps and of who is alive. They decide nothing; [`super::Control`] turns them into events.

use std::collections::BTreeSet;

use crate::ids::NodeNo;
use crate::map::{Map, Placement};

/// A complete copy of a shard that is elsewhere now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// The shard.
    pub shard: u16,
    /// Who has it no more; `None` where a copy was added.
    pub from: Option<NodeNo>,
    /// Who has it instead; `None` where a copy went, for its node or for good.
    pub to: Option<NodeNo>,
}

fn complete(placement: &Placement) -> impl Iterator<Item = NodeNo> {
    placement.replicas.iter().filter(|replica| !replica.filling).map(|replica| replica.node)
}

/// The complete copies that are elsewhere in `after` than in `before`, by shard; no more than copies in a map.
pub(super) fn moved(before: &Map, after: &Map) -> Vec<Moved> {
    let mut found = Vec::new();
    for (shard, (before, after)) in before.placements.iter().zip(&after.placements).enumerate() {
        if before.epoch == after.epoch {
            continue;
        }
        let only = |of: &Placement, other: &Placement| -> Vec<NodeNo> {
            complete(of).filter(|node| complete(other).all(|known| known != *node)).collect()
        };
        let (from, to) = (only(before, after), only(after, before));
        for at in 0..from.len().max(to.len()) {
            found.push(Moved { shard: shard as u16, from: from.get(at).copied(), to: to.get(at).copied() });
        }
    }
    found
}

/// How many shards are at risk; see the head of the file.
pub fn at_risk(map: &Map, alive: &BTreeSet<NodeNo>) -> usize {
    let risky = |placement: &&Placement| {
        let copies = placement.replicas.len();
        let there = complete(placement).filter(|node| alive.contains(node)).count();
        there < map.quorums.of(copies).0 || there <= 1 && copies > 1
    };
    map.placements.iter().filter(risky).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::testing::{candidate, step_all, three};
    use crate::map::{Change, Transition};

    #[test]
    fn a_copy_has_moved_when_another_node_has_all_of_it() {
        let four = three().apply(&Change::Admit(candidate(4, 1))).unwrap();
        assert_eq!(moved(&three(), &four), [], "nothing has moved to it yet");
        let both = step_all(&four, Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) });
        let read = step_all(&both, Transition::ReadNew);
        assert_eq!((moved(&four, &both), moved(&both, &read)), (vec![], vec![]), "it is under way");
        let done = step_all(&read, Transition::Finish);
        let expected = |shard| Moved { shard, from: Some(NodeNo(1)), to: Some(NodeNo(4)) };
        // Maps that were missed in between change nothing.
        assert_eq!(moved(&four, &done), (0..32).map(expected).collect::<Vec<_>>());
        // A node comes back without its memory: its copy is gone, and there again later.
        let mut gone = done.clone();
        gone.placements[7].replicas[0].filling = true;
        gone.placements[7].epoch += 1;
        let node = gone.placements[7].replicas[0].node;
        assert_eq!(moved(&done, &gone), [Moved { shard: 7, from: Some(node), to: None }]);
        let mut filled = done.clone();
        filled.placements[7].epoch += 2;
        assert_eq!(moved(&gone, &filled), [Moved { shard: 7, from: None, to: Some(node) }]);
    }

    #[test]
    fn shards_are_at_risk_below_a_write_quorum() {
        let map = three();
        let risk = |map: &Map, alive: &[u16]| at_risk(map, &alive.iter().copied().map(NodeNo).collect());
        assert_eq!((risk(&map, &[1, 2, 3]), risk(&map, &[1, 2]), risk(&map, &[1])), (0, 0, 32));
        let mut filling = map.clone();
        filling.placements[5].replicas[0].filling = true;
        assert_eq!(
            (risk(&filling, &[1, 2, 3]), risk(&filling, &[1, 2])),
            (0, 1),
            "what is being filled does not count"
        );
        let mut alone = map.clone();
        alone.placements.iter_mut().for_each(|placement| placement.replicas.truncate(1));
        assert_eq!((risk(&alone, &[1]), risk(&alone, &[])), (0, 32), "a single node is not at risk of what it is");
        let mut two = map;
        two.quorums.w = 1;
        two.placements.iter_mut().for_each(|placement| placement.replicas.truncate(2));
        assert_eq!((risk(&two, &[1, 2]), risk(&two, &[1])), (0, 32), "the last copy");
    }
}
