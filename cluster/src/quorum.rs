//! When enough replicas have answered.
//!
//! A write or a read of one shard is held by one or two *groups* of replicas, each with a number of answers that it
//! needs. Two groups are there while a shard moves: a write must then reach its quorum in the old and in the new set, so
//! that whichever set is read finds it.
//!
//! ```text
//!   Normal            write: w of old                read: r of old
//!   WriteBoth         write: w of old and w of new   read: r of old
//!   ReadNew           write: w of old and w of new   read: r of new
//! ```
//!
//! A filling replica of a group is written to and never counted; the number needed stays that of the whole group. So a
//! write that was acknowledged before a replica lost its memory is still met by every read: of `w` copies at most as many
//! are gone as there are filling replicas, which the reads don't count either.
//!
//! Hints never come here: only what a replica has stored counts.

use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::NodeNo;
use crate::map::{MAX_COPIES, Placement, Replica, Stage};

/// How many copies a cluster keeps, and how many answers make a quorum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Quorums {
    /// Copies of each shard, as soon as there are as many nodes.
    pub n: u8,
    /// Copies that must hold a write before it is acknowledged.
    pub w: u8,
    /// Replicas that must answer a read.
    pub r: u8,
}

impl Quorums {
    /// The quorums of a set of `n` copies. A cluster with fewer nodes than copies works with what there is: every read still
    /// meets every write, and as few answers are asked for as that allows.
    pub fn of(self, n: usize) -> (usize, usize) {
        let (mut w, mut r) = (usize::from(self.w), usize::from(self.r));
        if n >= usize::from(self.n) {
            return (w, r);
        }
        (w, r) = (w.min(n), r.min(n));
        while w > n / 2 + 1 && w + r - 1 > n {
            w -= 1;
        }
        while r > n / 2 + 1 && w + r - 1 > n {
            r -= 1;
        }
        (w, r)
    }

    /// Replicas from which a filling one must have everything: each write that was acknowledged is held by one of any that
    /// many, the filling one's former self not counted.
    pub fn sources(self, n: usize) -> usize {
        n - self.of(n).0 + 1
    }

    /// Replicas whose adoption of an epoch keeps every quorum of an older epoch from forming, for reads.
    pub fn blocks_reads(self, n: usize) -> usize {
        n - self.of(n).1 + 1
    }
}

/// How many answers an operation asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// One replica. A write survives as long as that replica; a read may be old.
    One,
    /// The cluster's `w` or `r`.
    #[default]
    Quorum,
    /// Every replica.
    All,
    /// That many.
    Exactly(u8),
}

impl Level {
    /// The same level, or the cluster's own where it would ask fewer replicas than that quorum.
    pub fn at_least(self, quorum: usize) -> Level {
        match self {
            Level::One => Level::Quorum,
            Level::Exactly(k) if usize::from(k) <= quorum => Level::Quorum,
            level => level,
        }
    }

    /// The level at which a command reads whose outcome depends on what it finds: as [`Level::at_least`], and from more than half of
    /// the replicas. Where fewer make a quorum (`w` of all, `r` of one) an orderer whose time is over would ask itself alone, and what
    /// it writes, which nobody will confirm, would lie in its own copy above what the new one has acknowledged.
    pub fn ordered(self, placement: &Placement, quorums: Quorums) -> Level {
        let n = placement.read_set().len();
        let (quorum, half) = (quorums.of(n).1, n / 2 + 1);
        match self.at_least(quorum) {
            Level::Quorum if quorum < half => Level::Exactly(half as u8),
            Level::Exactly(k) if usize::from(k) < half => Level::Exactly(half as u8),
            level => level,
        }
    }

    /// Answers that it asks for of `n` replicas, whose quorum is that many.
    pub fn need(self, quorum: usize, n: usize) -> usize {
        match self {
            Level::One => 1,
            Level::Quorum => quorum,
            Level::All => n,
            Level::Exactly(k) => usize::from(k).clamp(1, n),
        }
    }
}

/// Replicas of which a number must answer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    /// Who counts: filling replicas are left out.
    counted: Vec<NodeNo>,
    need: usize,
}

/// What an operation waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tally {
    groups: [Option<Group>; 2],
    /// Who has answered well, in order.
    answered: Vec<NodeNo>,
    /// Who will not answer.
    failed: Vec<NodeNo>,
}

/// How an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Enough have answered.
    Reached,
    /// Enough may still answer.
    Open,
    /// Too many have failed.
    Impossible,
}

fn group(set: &[Replica], need: usize) -> Group {
    Group { counted: set.iter().filter(|r| !r.filling).map(|r| r.node).collect(), need }
}

impl Tally {
    /// What a write of this shard needs.
    pub fn of_write(placement: &Placement, quorums: Quorums, level: Level) -> Tally {
        let need = |n| level.need(quorums.of(n).0, n);
        let old = group(&placement.replicas, need(placement.replicas.len()));
        let new = (placement.stage != Stage::Normal).then(|| {
            let set = placement.new_set();
            group(&set, need(set.len()))
        });
        Tally { groups: [Some(old), new], answered: Vec::new(), failed: Vec::new() }
    }

    /// Only what the new set of a move needs: a bug on purpose.
    pub(crate) fn of_new_set(self) -> Tally {
        let [old, new] = self.groups;
        Tally { groups: [new.or(old), None], ..self }
    }

    /// Filling replicas count as well: a bug on purpose.
    pub(crate) fn with_filling(mut self, placement: &Placement) -> Tally {
        let filling = placement.replicas.iter().filter(|r| r.filling).map(|r| r.node);
        for group in self.groups.iter_mut().flatten() {
            group.counted.extend(filling.clone());
        }
        self
    }

    /// What a read of this shard needs.
    pub fn of_read(placement: &Placement, quorums: Quorums, level: Level) -> Tally {
        let set = placement.read_set();
        let need = level.need(quorums.of(set.len()).1, set.len());
        Tally { groups: [Some(group(&set, need)), None], answered: Vec::new(), failed: Vec::new() }
    }

    /// A replica has done what was asked. Said twice it counts once.
    pub fn answer(&mut self, node: NodeNo) {
        if !self.answered.contains(&node) && self.answered.len() < 2 * MAX_COPIES {
            self.answered.push(node);
            self.failed.retain(|&failed| failed != node);
        }
    }

    /// A replica will not do what was asked.
    pub fn fail(&mut self, node: NodeNo) {
        if !self.answered.contains(&node) && !self.failed.contains(&node) && self.failed.len() < 2 * MAX_COPIES {
            self.failed.push(node);
        }
    }

    /// Whether that replica has answered.
    pub fn has(&self, node: NodeNo) -> bool {
        self.answered.contains(&node)
    }

    /// Whether that replica will not do what was asked.
    pub fn has_failed(&self, node: NodeNo) -> bool {
        self.failed.contains(&node)
    }

    /// Who has answered, in order.
    pub fn answered(&self) -> &[NodeNo] {
        &self.answered
    }

    /// Those whose answer would count, each once.
    pub fn counted(&self) -> Vec<NodeNo> {
        let mut all: Vec<NodeNo> = Vec::new();
        for node in self.groups.iter().flatten().flat_map(|g| &g.counted) {
            if !all.contains(node) {
                all.push(*node);
            }
        }
        all
    }

    /// The most answers that a group needs.
    pub fn need(&self) -> usize {
        self.groups.iter().flatten().map(|g| g.need).max().unwrap_or(0)
    }

    /// How it stands.
    pub fn standing(&self) -> Standing {
        let mut standing = Standing::Reached;
        for group in self.groups.iter().flatten() {
            let of = |nodes: &[NodeNo]| group.counted.iter().filter(|node| nodes.contains(node)).count();
            if of(&self.answered) >= group.need {
                continue;
            }
            if group.counted.len() - of(&self.failed) < group.need {
                return Standing::Impossible;
            }
            standing = Standing::Open;
        }
        standing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::testing::{candidate, step_all, three};
    use crate::map::{Change, Map, Transition};

    const Q: Quorums = Quorums { n: 3, w: 2, r: 2 };

    #[test]
    fn a_filling_replica_does_not_count() {
        let map = three().apply(&Change::Admit(candidate(3, 2))).unwrap();
        let mut tally = Tally::of_write(&map.placements[0], Q, Level::Quorum);
        tally.answer(NodeNo(4));
        tally.answer(NodeNo(1));
        assert_eq!(tally.standing(), Standing::Open);
        tally.fail(NodeNo(2));
        assert_eq!(tally.standing(), Standing::Impossible);
        tally.answer(NodeNo(2));
        assert_eq!(tally.standing(), Standing::Reached);
    }

    #[test]
    fn a_write_during_a_move_needs_both_sets() {
        let map = three().apply(&Change::Admit(candidate(4, 1))).unwrap();
        let map = step_all(&map, Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) });
        let mut tally = Tally::of_write(&map.placements[0], Q, Level::Quorum);
        tally.answer(NodeNo(1));
        tally.answer(NodeNo(2));
        assert_eq!(tally.standing(), Standing::Open, "old has two, new has one");
        tally.answer(NodeNo(4));
        assert_eq!(tally.standing(), Standing::Reached);
        let read = Tally::of_read(&map.placements[0], Q, Level::Quorum);
        assert_eq!(read.counted(), [NodeNo(1), NodeNo(2), NodeNo(3)]);
    }

    #[test]
    fn a_level_above_the_quorum_stays() {
        let levels = [Level::One, Level::Quorum, Level::All, Level::Exactly(1), Level::Exactly(2), Level::Exactly(3)];
        let raised = [Level::Quorum, Level::Quorum, Level::All, Level::Quorum, Level::Quorum, Level::Exactly(3)];
        assert_eq!(levels.map(|level| level.at_least(2)), raised);
    }

    #[test]
    fn an_ordered_command_asks_more_than_half() {
        let mut placement = three().placements.swap_remove(0);
        let levels = [Level::One, Level::Quorum, Level::All, Level::Exactly(1), Level::Exactly(2), Level::Exactly(3)];
        let (two, all) = (Level::Exactly(2), [Level::All, Level::Exactly(3)]);
        let one_read = Quorums { n: 4, w: 4, r: 1 };
        assert_eq!(levels.map(|l| l.ordered(&placement, one_read)), [two, two, all[0], two, two, all[1]]);
        let quorum = Level::Quorum;
        assert_eq!(levels.map(|l| l.ordered(&placement, Q)), [quorum, quorum, all[0], quorum, quorum, all[1]]);
        // Half of the set that is read: the new one, which may be larger.
        (placement.stage, placement.joining) = (Stage::WriteBoth, Some(NodeNo(4)));
        assert_eq!(quorum.ordered(&placement, one_read), two);
        placement.stage = Stage::ReadNew;
        assert_eq!(quorum.ordered(&placement, one_read), Level::Exactly(3));
        (placement.stage, placement.joining) = (Stage::Normal, None);
        placement.replicas.truncate(1);
        assert_eq!(quorum.ordered(&placement, one_read), quorum);
    }

    /// Whatever the configuration, in a set that is smaller than it should be every read meets every write.
    #[test]
    fn quorums_of_small_sets_intersect() {
        for n in 1..=7u8 {
            for (w, r) in (1..=n).flat_map(|w| (n - w + 1..=n).map(move |r| (w, r))) {
                for k in 1..=usize::from(n) {
                    let (small_w, small_r) = Quorums { n, w, r }.of(k);
                    assert!(small_w + small_r > k, "{n} {w} {r} at {k}: {small_w} {small_r}");
                    assert!((1..=k).contains(&small_w) && (1..=k).contains(&small_r), "{n} {w} {r} at {k}");
                }
            }
        }
    }

    /// Two epochs that may be in use at once: whatever was acknowledged in one is met by the reads of the other, when a
    /// node that has adopted the newer refuses the older.
    #[test]
    fn neighbouring_stages_intersect() {
        let base = three().apply(&Change::Admit(candidate(4, 1))).unwrap();
        let begun = step_all(&base, Transition::Begin { joining: Some(NodeNo(4)), leaving: Some(NodeNo(1)) });
        let both = step_all(&begun, Transition::ReadNew);
        let done = step_all(&both, Transition::Finish);
        let nodes: Vec<NodeNo> = (1..=4).map(NodeNo).collect();
        // Before a stage is left, nodes must have adopted it: see the planner. Here: writes at the newer stage, reads at
        // the older one by nodes that have not adopted the newer.
        let pairs: [(&Map, &Map, usize); 3] = [(&base, &begun, 0), (&begun, &both, 0), (&both, &done, 0)];
        for (older, newer, shard) in pairs {
            for mask in 0u32..16 {
                let adopted: Vec<NodeNo> = nodes.iter().copied().filter(|n| mask >> (n.0 - 1) & 1 == 1).collect();
                let mut write = Tally::of_write(&newer.placements[shard], Q, Level::Quorum);
                adopted.iter().for_each(|&n| write.answer(n));
                let mut read = Tally::of_read(&older.placements[shard], Q, Level::Quorum);
                nodes.iter().filter(|n| !adopted.contains(n)).for_each(|&n| read.answer(n));
                let split = write.standing() == Standing::Reached && read.standing() == Standing::Reached;
                assert!(!split, "a write among {adopted:?} is not seen by a read among the others");
            }
        }
    }
}
