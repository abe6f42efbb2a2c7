//! When requests are due, if they are to come at a fixed rate: an open loop.
//!
//! ```text
//!   due   |    |    |    |    |    |    |        latency = reply − due, not reply − sent:
//!   sent  |    |    |              ||||          a server that stalls delays the requests that were due
//!                   └── stall ──┘                meanwhile, and they must count
//! ```
//!
//! The requests of all connections of a thread are one line: whichever connection has room takes the one that is due
//! longest. So what is late is never forgotten, and nothing needs to be stored for it.

use std::fmt;
use std::str::FromStr;

use crate::random::Random;

/// How arrivals are spaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrivals {
    /// Evenly.
    Even,
    /// As independent clients would: exponential gaps.
    Poisson,
}

impl FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Arrivals, String> {
        match text {
            "even" => Ok(Arrivals::Even),
            "poisson" => Ok(Arrivals::Poisson),
            _ => Err("expected even or poisson".into()),
        }
    }
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Arrivals::Even => "even",
            Arrivals::Poisson => "poisson",
        })
    }
}

/// The arrivals of one thread.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    gap_ns: f64,
    arrivals: Arrivals,
    next_ns: f64,
    random: Random,
}

impl Schedule {
    /// Arrivals at `rate` per second from `start_ns` on.
    pub(crate) fn new(rate: f64, arrivals: Arrivals, start_ns: u64, random: Random) -> Schedule {
        Schedule { gap_ns: 1e9 / rate, arrivals, next_ns: start_ns as f64, random }
    }

    /// When the next request is due.
    #[inline]
    pub(crate) fn next_due(&self) -> u64 {
        self.next_ns as u64
    }

    /// Takes the next request if it is due: when it was due.
    #[inline]
    pub(crate) fn take(&mut self, now_ns: u64) -> Option<u64> {
        let due = self.next_ns as u64;
        if due > now_ns {
            return None;
        }
        self.next_ns += match self.arrivals {
            Arrivals::Even => self.gap_ns,
            Arrivals::Poisson => -(1.0 - self.random.unit()).ln() * self.gap_ns,
        };
        Some(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_makes_no_request_forgotten() {
        let mut schedule = Schedule::new(1e6, Arrivals::Even, 5_000, Random::new(0, 0));
        assert_eq!(schedule.take(4_999), None);
        assert_eq!(schedule.take(5_000), Some(5_000));
        assert_eq!(schedule.take(5_500), None);
        // Nothing for 10 µs: ten requests became due, each at its own time.
        let due: Vec<u64> = std::iter::from_fn(|| schedule.take(15_000)).collect();
        assert_eq!(due, (6..=15).map(|us| us * 1000).collect::<Vec<_>>());
        assert_eq!(schedule.next_due(), 16_000);
    }

    #[test]
    fn both_spacings_have_the_rate() {
        for arrivals in [Arrivals::Even, Arrivals::Poisson] {
            let mut schedule = Schedule::new(50_000.0, arrivals, 0, Random::new(1, 2));
            let count = std::iter::from_fn(|| schedule.take(10_000_000_000)).count() as f64;
            assert!((count / 500_000.0 - 1.0).abs() < 0.01, "{arrivals}: {count}");
        }
    }
}
