//! Hybrid logical clocks: versions that follow wall time and never go backwards.
//!
//! ```text
//!   63                                        16 15            0
//!   +-------------------------------------------+---------------+
//!   | unix milliseconds                         | counter       |
//!   +-------------------------------------------+---------------+
//! ```
//!
//! A tick is the wall clock's millisecond, or the last tick plus one when that is ahead. A version adds the node that
//! made it, so any two versions of a cluster differ and are ordered. (Kulkarni et al., "Logical Physical Clocks", 2014.)

/// A timestamp of a hybrid logical clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hlc(pub u64);

impl Hlc {
    /// The first tick of a millisecond.
    pub fn at(unix_ms: u64) -> Hlc {
        Hlc(unix_ms << 16)
    }

    /// Wall-clock part.
    #[inline]
    pub fn unix_ms(self) -> u64 {
        self.0 >> 16
    }
}

/// Which of two writes is newer: by time, then by node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// When.
    pub hlc: Hlc,
    /// By which node: its number in the cluster's map.
    pub node: u16,
}

/// A version from too far in the future was refused; the clock did not move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("version is {ahead_ms} ms ahead of this node's clock, {limit_ms} ms are allowed")]
pub struct TooFarAhead {
    /// How far ahead of this node's wall clock it is.
    pub ahead_ms: u64,
    /// How far is allowed.
    pub limit_ms: u64,
}

/// Drift that is allowed by default.
pub const MAX_DRIFT_MS: u64 = 500;

/// A hybrid logical clock of one core.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    last: Hlc,
    node: u16,
    max_drift_ms: u64,
}

impl Clock {
    /// A clock of that node; versions more than `max_drift_ms` ahead of the wall clock are refused.
    pub fn new(node: u16, max_drift_ms: u64) -> Clock {
        Clock { last: Hlc(0), node, max_drift_ms }
    }

    /// The next version: greater than every version made or observed before, whatever the wall clock does.
    #[inline]
    pub fn tick(&mut self, now_ms: u64) -> Version {
        self.last = Hlc::at(now_ms).max(Hlc(self.last.0 + 1));
        Version { hlc: self.last, node: self.node }
    }

    /// Takes note of a version made elsewhere, so that later ticks are greater.
    ///
    /// # Errors
    /// [`TooFarAhead`] when it lies beyond the drift bound; the clock does not move, so one broken clock cannot drag
    /// the others along.
    pub fn observe(&mut self, version: Version, now_ms: u64) -> Result<(), TooFarAhead> {
        let ahead_ms = version.hlc.unix_ms().saturating_sub(now_ms);
        if ahead_ms > self.max_drift_ms {
            return Err(TooFarAhead { ahead_ms, limit_ms: self.max_drift_ms });
        }
        self.last = self.last.max(version.hlc);
        Ok(())
    }
}
