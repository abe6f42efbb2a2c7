//! Which nodes stand still, when, and how long: drawn by chance, known before anything runs.
//!
//! | kind | who | how long | what it is there for |
//! |---|---|---|---|
//! | short | one | 0.2–2 s, once to five times with moments between | nobody may notice; a request that was read and not answered goes on where it was |
//! | long | one | 6–15 s | declared dead, its copies missed what was written, others order for it; it does not know |
//! | pair | two at once | 9–15 s | shards with two copies there have no quorum, the others do |
//! | majority | more than half | 2–8 s | nobody has a majority; only at the very end |
//!
//! Of five in a row two are short, two long and one is a pair, in an order drawn by chance; the last of all is a majority.
//! Not here: stopping anybody ([`super::pause`]).

use std::time::Duration;

use crate::random::Random;

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    Short,
    Long,
    Pair,
    Majority,
}

/// Of those in a row.
const ROW: [Kind; 5] = [Kind::Short, Kind::Short, Kind::Long, Kind::Long, Kind::Pair];
/// Short pauses in a row of one node, at most, and what lies between two.
const BEATS: u64 = 5;
const BETWEEN: [u64; 2] = [50, 1000];

impl Kind {
    /// The shortest and the longest pause, in milliseconds. That one is away is noticed within 5 s, two on a busy machine in 7.
    fn bounds(self) -> [u64; 2] {
        match self {
            Kind::Short => [200, 2000],
            Kind::Long => [6000, 15_000],
            Kind::Pair => [9000, 15_000],
            Kind::Majority => [2000, 8000],
        }
    }

    /// How many stand still at once.
    fn count(self, nodes: usize) -> usize {
        match self {
            Kind::Short | Kind::Long => 1,
            Kind::Pair => 2,
            Kind::Majority => nodes / 2 + 1,
        }
    }
}

/// Nodes that stand still together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pause {
    pub(super) kind: Kind,
    pub(super) nodes: Vec<usize>,
    /// For how long they stand still, and run after that; the last one has no end.
    pub(super) beats: Vec<Beat>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Beat {
    pub(super) stopped: Duration,
    pub(super) then: Duration,
}

impl Pause {
    fn draw(kind: Kind, nodes: usize, random: &mut Random) -> Pause {
        let mut order: Vec<usize> = (0..nodes).collect();
        random.shuffle(&mut order);
        order.truncate(kind.count(nodes));
        let beats = if kind == Kind::Short { 1 + random.below(BEATS) } else { 1 };
        let beat = |_| Beat { stopped: between(kind.bounds(), random), then: between(BETWEEN, random) };
        Pause { kind, nodes: order, beats: (0..beats).map(beat).collect() }
    }

    /// How long they stand still, all beats together.
    pub(super) fn stopped(&self) -> Duration {
        self.beats.iter().map(|beat| beat.stopped).sum()
    }
}

/// As many pauses as asked for, of a cluster of `nodes`.
pub(super) fn draw(nodes: usize, times: usize, random: &mut Random) -> Vec<Pause> {
    let mut kinds = Vec::with_capacity(times + ROW.len());
    while kinds.len() + 1 < times {
        let mut row = ROW;
        random.shuffle(&mut row);
        kinds.extend(row);
    }
    kinds.truncate(times.saturating_sub(1));
    kinds.push(Kind::Majority);
    kinds.into_iter().map(|kind| Pause::draw(kind, nodes, random)).collect()
}

fn between([least, most]: [u64; 2], random: &mut Random) -> Duration {
    Duration::from_millis(least + random.below(most - least + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(seed: u64, nodes: usize, times: usize) -> Vec<Pause> {
        draw(nodes, times, &mut Random::new(seed, 0))
    }

    #[test]
    fn each_row_has_all_kinds_and_the_end_is_a_majority() {
        for seed in 0..50 {
            let pauses = drawn(seed, 5, 16);
            assert_eq!(pauses.len(), 16);
            for row in pauses[..15].chunks(5) {
                let count = |kind| row.iter().filter(|pause| pause.kind == kind).count();
                assert_eq!((count(Kind::Short), count(Kind::Long), count(Kind::Pair)), (2, 2, 1), "{row:?}");
            }
            assert_eq!(pauses[15].kind, Kind::Majority);
        }
        assert_eq!(drawn(1, 5, 1)[0].kind, Kind::Majority);
        assert_eq!(drawn(1, 5, 8).len(), 8);
    }

    #[test]
    fn who_stands_still_and_how_long_follows_from_the_kind() {
        let (mut most_beats, mut victims) = (0, std::collections::BTreeSet::new());
        for pause in (0..50).flat_map(|seed| drawn(seed, 5, 11)) {
            let mut nodes = pause.nodes.clone();
            nodes.sort_unstable();
            nodes.dedup();
            assert_eq!(nodes.len(), pause.kind.count(5), "{pause:?}");
            assert!(nodes.iter().all(|&node| node < 5), "{pause:?}");
            let [least, most] = pause.kind.bounds().map(Duration::from_millis);
            assert!(pause.beats.iter().all(|beat| (least..=most).contains(&beat.stopped)), "{pause:?}");
            assert!(pause.kind == Kind::Short || pause.beats.len() == 1, "{pause:?}");
            most_beats = most_beats.max(pause.beats.len());
            victims.extend(nodes);
        }
        assert_eq!((most_beats, victims.len()), (5, 5));
    }

    #[test]
    fn the_same_seed_draws_the_same_pauses() {
        assert_eq!(drawn(3, 5, 20), drawn(3, 5, 20));
        assert_ne!(drawn(3, 5, 20), drawn(4, 5, 20));
    }
}
