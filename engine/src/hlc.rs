//! Versions: which of two writes of a key is the later one, for all nodes alike.
//!
//! A hybrid logical clock is the wall clock that never goes back and never stands still:
//!
//! ```text
//!   Hlc      63                                16 15          0
//!            │ unix time in milliseconds         │ counter     │
//!   Version  an Hlc, then the node that made it: a total order
//! ```
//!
//! Rules:
//! - [`Clock::tick`] is always higher than everything the clock has given or seen.
//! - [`Clock::observe`] refuses what lies further ahead of the wall clock than the allowed drift, **without moving**: one
//!   node with a broken clock must not drag all others into the future.
//!
//! Not here: reading the wall clock. `now` comes in as a number.

use crate::Millis;

/// A time of the hybrid logical clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hlc(pub u64);

const COUNTER_BITS: u32 = 16;
const MAX_MILLIS: Millis = u64::MAX >> COUNTER_BITS;

impl Hlc {
    /// Before every write.
    pub const ZERO: Hlc = Hlc(0);

    /// The first time of a millisecond.
    pub const fn at(unix_ms: Millis) -> Hlc {
        Hlc::new(unix_ms, 0)
    }

    /// Put together from its parts; milliseconds beyond 48 bits (the year 10889) are cut to the highest.
    #[inline]
    pub const fn new(millis: Millis, counter: u16) -> Hlc {
        let millis = if millis > MAX_MILLIS { MAX_MILLIS } else { millis };
        Hlc(millis << COUNTER_BITS | counter as u64)
    }

    /// The wall-clock part, in unix milliseconds.
    #[inline]
    pub const fn millis(self) -> Millis {
        self.0 >> COUNTER_BITS
    }

    /// The counter that tells apart times of one millisecond.
    #[inline]
    pub const fn counter(self) -> u16 {
        self.0 as u16
    }
}

/// When and by whom an entry was made. Of two entries of a key, the higher version wins everywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version {
    /// Compared first.
    pub hlc: Hlc,
    /// The node that made it; breaks ties.
    pub node: u16,
}

impl Version {
    /// Before every write.
    pub const ZERO: Version = Version { hlc: Hlc::ZERO, node: 0 };
    /// After every write.
    pub const MAX: Version = Version { hlc: Hlc(u64::MAX), node: u16::MAX };
}

/// A version lies further ahead of this node's wall clock than allowed. Nothing was changed; the clock of its sender is
/// wrong, or ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("version is {ahead_ms} ms ahead of this node's clock, {max_drift_ms} ms are allowed")]
pub struct TooFarAhead {
    /// How far ahead, in milliseconds.
    pub ahead_ms: u64,
    /// How far would have been accepted.
    pub max_drift_ms: u64,
}

/// The clock of one core.
#[derive(Clone, Debug)]
pub struct Clock {
    /// The highest time given or seen.
    last: Hlc,
    node: u16,
    max_drift_ms: u64,
}

impl Clock {
    /// How far ahead of the wall clock a version may be, unless said otherwise.
    pub const DEFAULT_MAX_DRIFT_MS: u64 = 500;

    /// A clock that has seen nothing yet.
    pub const fn new(node: u16, max_drift_ms: u64) -> Clock {
        Clock { last: Hlc::ZERO, node, max_drift_ms }
    }

    /// The version of a write that happens now.
    #[inline]
    pub fn tick(&mut self, now: Millis) -> Version {
        // A full counter carries into the milliseconds: 65 million writes a second before that shows, and order is kept.
        self.last = Hlc::new(now, 0).max(Hlc(self.last.0.saturating_add(1)));
        Version { hlc: self.last, node: self.node }
    }

    /// Learns of a version that another node made.
    ///
    /// # Errors
    /// [`TooFarAhead`] beyond the allowed drift; the clock is as before.
    #[inline]
    pub fn observe(&mut self, version: Version, now: Millis) -> Result<(), TooFarAhead> {
        let ahead_ms = version.hlc.millis().saturating_sub(now);
        if ahead_ms > self.max_drift_ms {
            return Err(TooFarAhead { ahead_ms, max_drift_ms: self.max_drift_ms });
        }
        self.last = self.last.max(version.hlc);
        Ok(())
    }

    /// Goes on from a time that it had in an earlier life, however far ahead that was: what was written then is there again, and what
    /// follows has to be newer.
    pub fn resume(&mut self, last: Hlc) {
        self.last = self.last.max(last);
    }

    /// The wall clock was wrong, and is right again: what it said when it was ahead no longer counts, beyond the allowed drift.
    ///
    /// Versions may come a second time only if the clock goes ahead again; what was written ahead of time stays newer until that
    /// time has come.
    pub fn settle(&mut self, now: Millis) {
        self.last = self.last.min(Hlc::new(now.saturating_add(self.max_drift_ms), 0));
    }

    /// The number of this node in versions from now on.
    pub const fn set_node(&mut self, node: u16) {
        self.node = node;
    }

    /// How far ahead of the wall clock a version may be from now on.
    pub const fn set_max_drift(&mut self, ms: u64) {
        self.max_drift_ms = ms;
    }

    /// The highest time given or seen.
    pub const fn last(&self) -> Hlc {
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn order_is_time_then_counter_then_node() {
        let v = |ms, counter, node| Version { hlc: Hlc::new(ms, counter), node };
        let rising = [v(1, 0, 9), v(1, 1, 0), v(1, 1, 1), v(2, 0, 0), v(2, u16::MAX, 0), v(3, 0, 0)];
        assert!(rising.windows(2).all(|w| w[0] < w[1]));
        assert_eq!((rising[4].hlc.millis(), rising[4].hlc.counter()), (2, u16::MAX));
    }

    #[test]
    fn a_version_from_the_far_future_is_refused_and_moves_nothing() {
        let mut clock = Clock::new(1, 500);
        let before = clock.tick(1_000);
        let far = Version { hlc: Hlc::new(1_501, 0), node: 2 };
        assert_eq!(clock.observe(far, 1_000), Err(TooFarAhead { ahead_ms: 501, max_drift_ms: 500 }));
        assert_eq!(clock.last(), before.hlc);

        let near = Version { hlc: Hlc::new(1_500, 3), node: 2 };
        assert_eq!(clock.observe(near, 1_000), Ok(()));
        assert!(clock.tick(1_000) > near);
    }

    #[test]
    fn a_full_counter_carries_over_and_the_end_of_time_does_not_overflow() {
        let mut clock = Clock::new(0, u64::MAX);
        clock.observe(Version { hlc: Hlc::new(7, u16::MAX), node: 0 }, 7).unwrap();
        assert_eq!(clock.tick(7).hlc, Hlc::new(8, 0));
        assert_eq!(clock.tick(u64::MAX).hlc, Hlc::new(MAX_MILLIS, 0));
    }

    #[test]
    fn a_clock_that_was_ahead_is_settled_and_what_others_made_is_not_forgotten() {
        let mut clock = Clock::new(1, 500);
        clock.tick(3_600_000);
        clock.settle(1000);
        assert_eq!(clock.last(), Hlc::new(1500, 0));
        clock.observe(Version { hlc: Hlc::new(1900, 7), node: 2 }, 1500).unwrap();
        clock.settle(1500);
        assert_eq!(clock.tick(1500).hlc, Hlc::new(1900, 8));
    }

    proptest! {
        #[test]
        fn ticks_rise_whatever_the_wall_clock_does(steps in proptest::collection::vec((0u64..2_000, any::<bool>(), 0u64..3_000), 1..100)) {
            let mut clock = Clock::new(1, 500);
            let mut highest = Version::ZERO;
            for (now, tick, seen) in steps {
                if tick {
                    let version = clock.tick(now);
                    prop_assert!(version > highest);
                    highest = version;
                } else {
                    let version = Version { hlc: Hlc::new(seen, 5), node: 9 };
                    let accepted = clock.observe(version, now).is_ok();
                    prop_assert_eq!(accepted, seen <= now + 500);
                    if accepted {
                        highest = highest.max(version);
                    }
                }
            }
        }
    }
}
