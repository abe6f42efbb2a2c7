//! Which key an operation touches, and how long keys and values are.
//!
//! | word | keys |
//! |---|---|
//! | `uniform` | all alike |
//! | `zipf`, `zipf:0.99` | few keys get most operations; popular ones are scattered over the key space, as in YCSB |
//! | `latest`, `latest:0.99` | popular are those inserted last |
//!
//! Zipf numbers come from the closed form of Gray et al., "Quickly generating billion-record synthetic databases" (SIGMOD
//! 1994): the two most popular ranks exactly, the others by inverting a continuous approximation. A rank is scattered by
//! hashing, so two ranks may share a key, as in YCSB.
//!
//! A size depends on the key alone, not on the draw: the same key always has the same length, so that a reader knows what
//! it must find.

use std::fmt;
use std::str::FromStr;

use crate::random::{Random, reduce, scatter};
use crate::units;

/// The skew that YCSB uses when none is given.
const DEFAULT_THETA: f64 = 0.99;

/// How keys are chosen, as said on the command line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Distribution {
    Uniform,
    /// Skew in (0, 1).
    Zipf(f64),
    /// Skew in (0, 1), counted back from the newest key.
    Latest(f64),
    /// Each key once, in order; for loading.
    Sequential,
}

impl FromStr for Distribution {
    type Err = String;

    fn from_str(text: &str) -> Result<Distribution, String> {
        let (name, theta) = match text.split_once(':') {
            Some((name, theta)) => {
                let theta: f64 = theta.parse().map_err(|_| format!("'{theta}' is no number"))?;
                if !(theta > 0.0 && theta < 1.0) {
                    return Err(format!("the skew must lie between 0 and 1, not {theta}"));
                }
                (name, Some(theta))
            }
            None => (text, None),
        };
        match (name, theta) {
            ("uniform", None) => Ok(Distribution::Uniform),
            ("sequential", None) => Ok(Distribution::Sequential),
            ("zipf" | "zipfian", theta) => Ok(Distribution::Zipf(theta.unwrap_or(DEFAULT_THETA))),
            ("latest", theta) => Ok(Distribution::Latest(theta.unwrap_or(DEFAULT_THETA))),
            _ => Err("expected uniform, sequential, zipf[:SKEW] or latest[:SKEW]".into()),
        }
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Distribution::Uniform => f.write_str("uniform"),
            Distribution::Zipf(theta) => write!(f, "zipf:{theta}"),
            Distribution::Latest(theta) => write!(f, "latest:{theta}"),
            Distribution::Sequential => f.write_str("sequential"),
        }
    }
}

/// Ranks from 0, the lower the more popular.
#[derive(Clone, Debug)]
pub(crate) struct Zipf {
    count: f64,
    #[cfg(test)]
    theta: f64,
    alpha: f64,
    zeta: f64,
    eta: f64,
    /// Below this share of `zeta` the rank is 1.
    second: f64,
}

impl Zipf {
    /// Sums `count` terms once.
    ///
    /// # Panics
    /// When `theta` is not in (0, 1) or `count` is 0.
    pub(crate) fn new(count: u64, theta: f64) -> Zipf {
        assert!(theta > 0.0 && theta < 1.0 && count > 0, "the command line admits no other skew");
        let zeta_to = |n: u64| (1..=n).map(|i| (i as f64).powf(-theta)).sum::<f64>();
        let zeta = zeta_to(count);
        let alpha = 1.0 / (1.0 - theta);
        let eta = (1.0 - (2.0 / count as f64).powf(1.0 - theta)) / (1.0 - zeta_to(2) / zeta);
        Zipf {
            count: count as f64,
            #[cfg(test)]
            theta,
            alpha,
            zeta,
            eta,
            second: 1.0 + 0.5f64.powf(theta),
        }
    }

    #[inline]
    pub(crate) fn rank(&self, random: &mut Random) -> u64 {
        let u = random.unit();
        let share = u * self.zeta;
        if share < 1.0 {
            return 0;
        }
        if share < self.second {
            return 1;
        }
        let rank = self.count * (self.eta * u - self.eta + 1.0).powf(self.alpha);
        (rank as u64).min(self.count as u64 - 1)
    }

    #[cfg(test)]
    fn probability(&self, rank: u64) -> f64 {
        (rank as f64 + 1.0).powf(-self.theta) / self.zeta
    }
}

/// Draws keys for one thread.
#[derive(Clone, Debug)]
pub(crate) enum KeyChooser {
    Uniform { count: u64 },
    Scrambled { zipf: Zipf, count: u64 },
    Latest { zipf: Zipf },
    Sequential { next: u64, step: u64, count: u64 },
}

impl KeyChooser {
    /// A chooser over `count` keys for thread `thread` of `threads`.
    pub(crate) fn new(distribution: Distribution, count: u64, thread: u64, threads: u64) -> KeyChooser {
        match distribution {
            Distribution::Uniform => KeyChooser::Uniform { count },
            Distribution::Zipf(theta) => KeyChooser::Scrambled { zipf: Zipf::new(count, theta), count },
            Distribution::Latest(theta) => KeyChooser::Latest { zipf: Zipf::new(count, theta) },
            Distribution::Sequential => KeyChooser::Sequential { next: thread, step: threads, count },
        }
    }

    /// The next key; `newest` is one beyond the highest key inserted so far.
    #[inline]
    pub(crate) fn next(&mut self, random: &mut Random, newest: u64) -> u64 {
        match self {
            KeyChooser::Uniform { count } => random.below(newest.max(*count)),
            KeyChooser::Scrambled { zipf, count } => reduce(scatter(zipf.rank(random)), *count),
            KeyChooser::Latest { zipf } => (newest - 1).saturating_sub(zipf.rank(random)),
            KeyChooser::Sequential { next, step, count } => {
                let key = *next;
                *next += *step;
                if *next >= *count {
                    *next %= *step;
                }
                key
            }
        }
    }
}

/// A length that depends on the key alone.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Sizes {
    Fixed(u32),
    /// Evenly from the first to the second, both included.
    Uniform(u32, u32),
    /// Lengths with weights.
    Mixed(Vec<(u32, u32)>),
}

impl Sizes {
    /// The length for a key.
    #[inline]
    pub(crate) fn of(&self, key: u64) -> u32 {
        // Another scatter than the one that places values, so that length and content are independent.
        let draw = || scatter(!key);
        match self {
            Sizes::Fixed(size) => *size,
            Sizes::Uniform(low, high) => low + reduce(draw(), u64::from(high - low) + 1) as u32,
            Sizes::Mixed(parts) => {
                let total = parts.iter().map(|&(_, weight)| u64::from(weight)).sum();
                let mut left = reduce(draw(), total);
                for &(size, weight) in parts {
                    if left < u64::from(weight) {
                        return size;
                    }
                    left -= u64::from(weight);
                }
                unreachable!("the draw lies below the sum of the weights")
            }
        }
    }

    pub(crate) fn smallest(&self) -> u32 {
        match self {
            Sizes::Fixed(size) => *size,
            Sizes::Uniform(low, _) => *low,
            Sizes::Mixed(parts) => parts.iter().map(|p| p.0).min().expect("a mix has parts"),
        }
    }

    pub(crate) fn largest(&self) -> u32 {
        match self {
            Sizes::Fixed(size) => *size,
            Sizes::Uniform(_, high) => *high,
            Sizes::Mixed(parts) => parts.iter().map(|p| p.0).max().expect("a mix has parts"),
        }
    }

    pub(crate) fn mean(&self) -> f64 {
        match self {
            Sizes::Fixed(size) => f64::from(*size),
            Sizes::Uniform(low, high) => (f64::from(*low) + f64::from(*high)) / 2.0,
            Sizes::Mixed(parts) => {
                let total: f64 = parts.iter().map(|p| f64::from(p.1)).sum();
                parts.iter().map(|p| f64::from(p.0) * f64::from(p.1)).sum::<f64>() / total
            }
        }
    }
}

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Sizes, String> {
        let number = |t: &str| {
            let bytes = units::bytes_of(t.trim()).map_err(|_| format!("'{t}' is no number of bytes"))?;
            u32::try_from(bytes).map_err(|_| format!("'{t}' bytes are too many"))
        };
        if let Some(parts) = text.strip_prefix("mix:") {
            let parts = parts
                .split(',')
                .map(|part| {
                    let (size, weight) = part.split_once('@').ok_or("a mix reads mix:SIZE@WEIGHT,SIZE@WEIGHT,...")?;
                    Ok((number(size)?, number(weight)?))
                })
                .collect::<Result<Vec<_>, String>>()?;
            if parts.iter().all(|p| p.1 == 0) {
                return Err("some weight must be above 0".into());
            }
            return Ok(Sizes::Mixed(parts));
        }
        if let Some((low, high)) = text.strip_prefix("uniform:").unwrap_or(text).split_once('-') {
            let (low, high) = (number(low)?, number(high)?);
            return if low <= high { Ok(Sizes::Uniform(low, high)) } else { Err(format!("{low} is above {high}")) };
        }
        number(text.strip_prefix("fixed:").unwrap_or(text)).map(Sizes::Fixed)
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sizes::Fixed(size) => write!(f, "{size} B"),
            Sizes::Uniform(low, high) => write!(f, "{low}-{high} B"),
            Sizes::Mixed(parts) => {
                let parts: Vec<String> = parts.iter().map(|(size, weight)| format!("{size}@{weight}")).collect();
                write!(f, "mix of {} B", parts.join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_and_written() {
        for text in ["uniform", "sequential", "zipf:0.5", "latest:0.99"] {
            assert_eq!(text.parse::<Distribution>().unwrap().to_string(), text);
        }
        assert_eq!("zipf".parse(), Ok(Distribution::Zipf(0.99)));
        for text in ["", "zipf:1", "zipf:0", "zipf:x", "uniform:0.5", "gauss"] {
            assert!(text.parse::<Distribution>().is_err(), "{text}");
        }
        assert_eq!("64".parse(), Ok(Sizes::Fixed(64)));
        assert_eq!("fixed:64".parse(), Ok(Sizes::Fixed(64)));
        assert_eq!("uniform:1-9".parse(), Ok(Sizes::Uniform(1, 9)));
        assert_eq!("mix:64@9,1024@1".parse(), Ok(Sizes::Mixed(vec![(64, 9), (1024, 1)])));
        for text in ["", "9-1", "mix:64", "mix:1@0", "-3"] {
            assert!(text.parse::<Sizes>().is_err(), "{text}");
        }
    }

    #[test]
    fn zipf_has_its_frequencies() {
        let zipf = Zipf::new(1000, 0.99);
        let mut random = Random::new(1, 1);
        let mut counts = vec![0u32; 1000];
        let draws = 1_000_000;
        for _ in 0..draws {
            counts[zipf.rank(&mut random) as usize] += 1;
        }
        // The first two ranks are exact, the others approximate one by one and right in sum.
        for rank in [0, 1] {
            let seen = f64::from(counts[rank as usize]) / f64::from(draws);
            let expected = zipf.probability(rank);
            assert!((seen / expected - 1.0).abs() < 0.02, "rank {rank}: {seen} instead of {expected}");
        }
        for (from, to) in [(2, 10), (10, 100), (100, 1000)] {
            let seen = f64::from(counts[from..to].iter().sum::<u32>()) / f64::from(draws);
            let expected: f64 = (from..to).map(|r| zipf.probability(r as u64)).sum();
            assert!((seen / expected - 1.0).abs() < 0.15, "ranks {from}..{to}: {seen} instead of {expected}");
        }
    }

    #[test]
    fn every_chooser_stays_within_the_keys() {
        for text in ["uniform", "zipf", "zipf:0.2", "latest", "sequential"] {
            for count in [1, 2, 3, 1000] {
                let mut chooser = KeyChooser::new(text.parse().unwrap(), count, 0, 1);
                let mut random = Random::new(5, 5);
                for _ in 0..3000 {
                    assert!(chooser.next(&mut random, count) < count, "{text} of {count}");
                }
            }
        }
    }

    #[test]
    fn sequential_threads_share_all_keys_evenly() {
        let mut seen = vec![0; 10];
        for thread in 0..3 {
            let mut chooser = KeyChooser::new(Distribution::Sequential, 10, thread, 3);
            let share = (10 - thread).div_ceil(3);
            for _ in 0..share {
                seen[chooser.next(&mut Random::new(0, 0), 10) as usize] += 1;
            }
        }
        assert_eq!(seen, [1; 10]);
    }

    #[test]
    fn latest_follows_inserts() {
        let mut chooser = KeyChooser::new(Distribution::Latest(0.99), 1000, 0, 1);
        let mut random = Random::new(2, 2);
        let near = (0..1000).filter(|_| chooser.next(&mut random, 5000) > 4900).count();
        assert!(near > 500, "{near} of 1000 were among the newest 100");
    }

    #[test]
    fn sizes_have_their_mean_and_bounds() {
        for text in ["17", "10-20", "mix:10@1,100@3"] {
            let sizes: Sizes = text.parse().unwrap();
            let sum: u64 = (0..100_000).map(|key| u64::from(sizes.of(key))).sum();
            assert!((sum as f64 / 100_000.0 / sizes.mean() - 1.0).abs() < 0.02, "{text}");
            assert!((0..1000).all(|key| (sizes.smallest()..=sizes.largest()).contains(&sizes.of(key))));
        }
    }
}
