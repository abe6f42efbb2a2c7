//! Whether this node's wall clock is right, as far as the others can tell.
//!
//! The last writer wins by the clock of the node that coordinated the write. A node whose clock is far ahead makes writes that its
//! peers refuse; one that is far behind makes writes that lose to older ones. Such a node has to notice by itself, and to leave
//! making versions to others: it is **quarantined**.
//!
//! ```text
//!   every 3 s, to each member in reach      Clock{sent} ─────▶
//!                                                       ◀───── Clock{sent, wall}     their clock, half a round trip ago
//! ```
//!
//! - An answer says by how much the two clocks differ, to half of its round trip; that half is taken off in favour of the node. What
//!   took longer than [`ROUND_TRIP_MS`] says nothing: one of the two stood still.
//! - The node is wrong when more than half of all, itself included, agree with each other to [`BOUND_MS`], and it differs from the
//!   middle of all by more than that. With two nodes, or when no such majority is there, nobody knows who is right: that is told,
//!   and nothing else.
//! - As long as a majority finds it right, the cores hear so each time that the others are asked: a wall clock may have been ahead between
//!   two looks, and what it said then must not count any more.
//! - It is right again when it differs from such a middle by less than [`AGREED_MS`]; as long as nobody can tell, it stays wrong.
//!   What is kept of a peer is how its wall clock relates to our monotonic one, so a clock that is mended is seen at once.
//!
//! Not here: what quarantine means for operations ([`crate::shards`]) and for the map ([`crate::planner`]).

use std::collections::{BTreeMap, BTreeSet};

use gridkv_engine::Millis;
use gridkv_engine::hlc::Clock;

use crate::ids::{NodeNo, Now};

/// How far clocks may be apart: as far as a version may be ahead of a replica's clock.
pub const BOUND_MS: Millis = Clock::DEFAULT_MAX_DRIFT_MS;
/// Below this a clock that was wrong is right again.
pub const AGREED_MS: Millis = BOUND_MS * 4 / 5;
/// How long an answer may take that is believed.
pub const ROUND_TRIP_MS: Millis = BOUND_MS / 2;
/// How often each member is asked.
pub(super) const ASK_MS: Millis = 3000;
/// How long an answer counts.
const FRESH_MS: Millis = 4 * ASK_MS;

/// The clock of a peer.
#[derive(Clone, Copy, Debug)]
struct Peer {
    /// Its wall clock less our monotonic one.
    ahead_of_mono: i64,
    /// How much it may be off: half of the round trip.
    error: i64,
    /// When the answer came.
    at: Millis,
    /// That it differs was told.
    told: bool,
}

impl Peer {
    /// By how much its clock is ahead of ours, at least; negative when it is behind.
    fn ahead(&self, now: Now) -> i64 {
        let ahead = self.ahead_of_mono.saturating_add(now.mono as i64).saturating_sub(now.wall as i64);
        ahead.signum() * (ahead.saturating_abs() - self.error).max(0)
    }
}

/// What a look at the clocks has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// This node was put into quarantine, or is out of it again; and by how much its clock is ahead of the others', negative
    /// when it is behind.
    pub(super) turned: Option<(bool, i64)>,
    /// What the cores have to know: whether it is quarantined, and by how much its clock is behind.
    pub(super) say: Option<(bool, Millis)>,
    /// Peers whose clocks differ from ours and that were not told yet, with how far they are ahead.
    pub(super) apart: Vec<(NodeNo, i64)>,
}

/// The clocks of the others.
#[derive(Debug, Default)]
pub(super) struct Clocks {
    peers: BTreeMap<NodeNo, Peer>,
    quarantined: bool,
    /// A majority agrees with this clock.
    right: bool,
    /// By how much this clock is behind, as the cores know it.
    behind: Millis,
    offset: Millis,
}

impl Clocks {
    /// A peer answered what was asked at `sent`, by our monotonic clock.
    pub(super) fn on_answer(&mut self, now: Now, from: NodeNo, sent: Millis, wall: Millis) {
        let Some(took) = now.mono.checked_sub(sent).filter(|&took| took <= ROUND_TRIP_MS) else { return };
        // Half a round trip ago it was `wall` there.
        let wall = i64::try_from(wall).unwrap_or(i64::MAX);
        let ahead_of_mono = wall.saturating_sub((sent + took / 2) as i64);
        let told = self.peers.get(&from).is_some_and(|peer| peer.told);
        let error = took.div_ceil(2) as i64;
        self.peers.insert(from, Peer { ahead_of_mono, error, at: now.mono, told });
    }

    /// Looks at what is known of the members in reach, of a cluster of so many.
    pub(super) fn look(&mut self, now: Now, alive: &BTreeSet<NodeNo>, members: usize) -> Found {
        self.peers.retain(|no, peer| alive.contains(no) && peer.at + FRESH_MS > now.mono);
        let mut found = Found::default();
        let offsets = || self.peers.values().map(|peer| peer.ahead(now));
        self.offset = offsets().map(i64::unsigned_abs).max().unwrap_or(0);
        let mut all: Vec<i64> = offsets().chain([0]).collect();
        all.sort_unstable();
        let middle = all[(all.len() - 1) / 2];
        let agree = all.iter().filter(|offset| offset.abs_diff(middle) <= BOUND_MS).count();
        let bound = if self.quarantined { AGREED_MS } else { BOUND_MS + 1 };
        // As long as nobody can tell, it stays as it is.
        let can_tell = agree * 2 > all.len() && (all.len() > 1 || members <= 1);
        let wrong = if can_tell { middle.unsigned_abs() >= bound } else { self.quarantined && members > 1 };
        if wrong != self.quarantined {
            self.quarantined = wrong;
            found.turned = Some((wrong, middle.saturating_neg()));
        }
        self.right = can_tell && !wrong;
        let behind = if wrong { u64::try_from(middle).unwrap_or(0) } else { 0 };
        if found.turned.is_some() || can_tell && behind.abs_diff(self.behind) > BOUND_MS / 5 {
            self.behind = behind;
            found.say = Some((wrong, behind));
        }
        for (&no, peer) in self.peers.iter_mut().filter(|_| !wrong) {
            let ahead = peer.ahead(now);
            if ahead.unsigned_abs() > BOUND_MS && !peer.told {
                peer.told = true;
                found.apart.push((no, ahead));
            } else if ahead.unsigned_abs() < AGREED_MS {
                peer.told = false;
            }
        }
        found
    }

    /// Whether this node's clock is wrong.
    pub(super) fn is_quarantined(&self) -> bool {
        self.quarantined
    }

    /// Whether a majority agrees with this node's clock.
    pub(super) fn is_right(&self) -> bool {
        self.right
    }

    /// The largest difference from a peer's clock.
    pub(super) fn offset(&self) -> Millis {
        self.offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(mono: Millis, wall: Millis) -> Now {
        Now { mono, wall }
    }

    const WALL: Millis = 1_000_000_000;

    /// What a node finds whose peers' clocks are so far ahead of its own.
    fn verdict(ahead: &[i64]) -> (bool, usize) {
        let mut clocks = Clocks::default();
        let alive = (1..=ahead.len() as u16).map(NodeNo).collect();
        for (no, ahead) in (1..).zip(ahead) {
            // It was asked 10 ms ago.
            let wall = WALL.saturating_add_signed(*ahead) - 5;
            clocks.on_answer(at(1000, WALL), NodeNo(no), 990, wall);
        }
        let found = clocks.look(at(1000, WALL), &alive, ahead.len() + 1);
        (clocks.is_quarantined(), found.apart.len())
    }

    #[test]
    fn the_one_that_differs_from_a_majority_that_agrees_is_wrong() {
        assert_eq!(verdict(&[10_000, 10_000]), (true, 0));
        assert_eq!(verdict(&[-10_000, -10_200]), (true, 0));
        assert_eq!(verdict(&[10_000, 0]), (false, 1), "the other one is wrong");
        assert_eq!(verdict(&[10_000]), (false, 1), "one of two: nobody knows which");
        assert_eq!(verdict(&[10_000, 20_000]), (false, 2), "no two agree");
        assert_eq!(verdict(&[10_000, 10_000, 0]), (false, 2), "two against two");
        assert_eq!(verdict(&[10_000, 10_000, 10_100, 0]), (true, 0), "two of five");
        assert_eq!(verdict(&[505, 505]), (false, 0), "so much may be the round trip");
        assert_eq!(verdict(&[506, 506]), (true, 0));
        assert_eq!(verdict(&[i64::MAX, i64::MAX]), (true, 0));
        assert_eq!(verdict(&[]), (false, 0));
    }

    #[test]
    fn what_stood_still_says_nothing_and_a_mended_clock_is_seen_at_once() {
        let (one, two) = (NodeNo(1), NodeNo(2));
        let alive: BTreeSet<NodeNo> = [one, two].into();
        let mut clocks = Clocks::default();
        for no in [one, two] {
            clocks.on_answer(at(10_000, WALL + 10_000), no, 1000, WALL + 1000);
        }
        assert_eq!(clocks.look(at(10_000, WALL + 10_000), &alive, 3), Found::default(), "this node stood still");
        for no in [one, two] {
            clocks.on_answer(at(10_002, WALL + 70_002), no, 10_000, WALL + 10_001);
        }
        let found = clocks.look(at(10_002, WALL + 70_002), &alive, 3);
        assert_eq!((found.turned, found.say, found.apart), (Some((true, 59_999)), Some((true, 0)), vec![]));
        assert_eq!(clocks.offset(), 59_999);
        assert_eq!(clocks.look(at(10_003, WALL + 10_453), &alive, 3), Found::default(), "nearly mended");
        assert_eq!(clocks.look(at(10_003, WALL + 10_403), &alive, 3).turned, Some((false, 399)));
        // Behind, the cores are told by how much, and again when it is set.
        for (wall, say) in [(WALL, Some((true, 10_002))), (WALL + 50, None), (WALL - 60_000, Some((true, 70_002)))] {
            assert_eq!(clocks.look(at(10_003, wall), &alive, 3).say, say);
        }
        // Answers of long ago, and of nodes that are away, count no more; who was wrong stays so until somebody can tell.
        clocks.look(at(10_003, WALL + 90_000), &alive, 3);
        assert!(clocks.is_quarantined());
        for (alive, members, expected) in [([one].into(), 3, true), ([].into(), 3, true), ([].into(), 1, false)] {
            clocks.look(at(10_004, WALL + 90_000), &alive, members);
            assert_eq!((clocks.is_quarantined(), clocks.offset() > 0), (expected, alive.len() == 1));
        }
    }
}
