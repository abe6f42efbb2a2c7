//! What operations a load is made of.
//!
//! | kind | what is sent | counts as |
//! |---|---|---|
//! | `get` | GET of a key that the distribution chose | read |
//! | `set` | SET of such a key | write |
//! | `insert` | SET of a key that was never written before | write |
//! | `rmw` | GET, and after its reply SET of the same key; one operation, latency over both | read-modify-write |
//! | `del` | DEL | write |
//!
//! The YCSB core mixes are such mixes with a distribution; E scans a range of ordered keys, which a hash table does not
//! have, so it is refused.

use std::fmt;
use std::str::FromStr;

use crate::distribution::Distribution;
use crate::random::Random;

/// One operation's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Get,
    Set,
    Insert,
    Rmw,
    Del,
}

impl Kind {
    pub(crate) const ALL: [Kind; 5] = [Kind::Get, Kind::Set, Kind::Insert, Kind::Rmw, Kind::Del];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Get => "get",
            Kind::Set => "set",
            Kind::Insert => "insert",
            Kind::Rmw => "rmw",
            Kind::Del => "del",
        }
    }
}

/// Kinds with weights.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mix {
    parts: Vec<(Kind, u32)>,
    total: u64,
}

impl Mix {
    pub(crate) fn new(parts: Vec<(Kind, u32)>) -> Result<Mix, String> {
        let parts: Vec<_> = parts.into_iter().filter(|p| p.1 > 0).collect();
        let total: u64 = parts.iter().map(|p| u64::from(p.1)).sum();
        if total == 0 {
            return Err("some weight must be above 0".into());
        }
        Ok(Mix { parts, total })
    }

    pub(crate) fn only(kind: Kind) -> Mix {
        Mix { parts: vec![(kind, 1)], total: 1 }
    }

    /// The next operation's kind.
    #[inline]
    pub(crate) fn next(&self, random: &mut Random) -> Kind {
        if let [(kind, _)] = self.parts[..] {
            return kind;
        }
        let mut left = random.below(self.total);
        for &(kind, weight) in &self.parts {
            if left < u64::from(weight) {
                return kind;
            }
            left -= u64::from(weight);
        }
        unreachable!("the draw lies below the sum of the weights")
    }

    pub(crate) fn has(&self, kind: Kind) -> bool {
        self.parts.iter().any(|p| p.0 == kind)
    }

    /// Whether some operation expects to find keys.
    pub(crate) fn reads(&self) -> bool {
        self.has(Kind::Get) || self.has(Kind::Rmw)
    }

    /// The YCSB core workload of that letter, with its distribution.
    pub(crate) fn ycsb(letter: &str) -> Result<(Mix, Distribution), String> {
        let zipf = Distribution::Zipf(0.99);
        let (parts, distribution) = match letter.to_ascii_lowercase().as_str() {
            "a" => (vec![(Kind::Get, 50), (Kind::Set, 50)], zipf),
            "b" => (vec![(Kind::Get, 95), (Kind::Set, 5)], zipf),
            "c" => (vec![(Kind::Get, 100)], zipf),
            "d" => (vec![(Kind::Get, 95), (Kind::Insert, 5)], Distribution::Latest(0.99)),
            "e" => {
                return Err(
                    "workload E scans ranges of ordered keys, which a hash table does not have; use a, b, c, d or f"
                        .into(),
                );
            }
            "f" => (vec![(Kind::Get, 50), (Kind::Rmw, 50)], zipf),
            _ => return Err("the YCSB core workloads are a, b, c, d and f".into()),
        };
        Ok((Mix::new(parts)?, distribution))
    }

    /// `reads:writes`.
    pub(crate) fn ratio(text: &str) -> Result<Mix, String> {
        let (reads, writes) = text.split_once(':').ok_or("a ratio reads READS:WRITES, such as 9:1")?;
        let number = |t: &str| t.parse::<u32>().map_err(|_| format!("'{t}' is no whole number"));
        Mix::new(vec![(Kind::Get, number(reads)?), (Kind::Set, number(writes)?)])
    }
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Mix, String> {
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            return Mix::ratio(text);
        }
        let parts = text
            .split(',')
            .map(|part| {
                let (name, weight) = part.split_once(['=', ':']).unwrap_or((part, "1"));
                let kind = Kind::ALL
                    .into_iter()
                    .find(|kind| kind.name() == name.trim().to_ascii_lowercase())
                    .ok_or_else(|| format!("'{name}' is none of get, set, insert, rmw, del"))?;
                Ok((kind, weight.parse().map_err(|_| format!("'{weight}' is no whole number"))?))
            })
            .collect::<Result<Vec<_>, String>>()?;
        Mix::new(parts)
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (kind, weight)) in self.parts.iter().enumerate() {
            let share = f64::from(*weight) * 100.0 / self.total as f64;
            let comma = if i > 0 { ", " } else { "" };
            match share {
                100.0 => write!(f, "{}", kind.name())?,
                _ => write!(f, "{comma}{} {} %", kind.name(), (share * 100.0).round() / 100.0)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixes_are_read() {
        assert_eq!("get".parse::<Mix>(), Ok(Mix::only(Kind::Get)));
        assert_eq!("get:90,set:10".parse::<Mix>(), Mix::ratio("90:10"));
        assert_eq!("get=90,set=10".parse::<Mix>(), Mix::ratio("90:10"));
        assert_eq!("1:0".parse(), Ok(Mix::only(Kind::Get)));
        for text in ["", "get:0", "lpush", "get:x"] {
            assert!(text.parse::<Mix>().is_err(), "{text}");
        }
        for text in ["1", "0:0", "a:b"] {
            assert!(Mix::ratio(text).is_err(), "{text}");
        }
    }

    #[test]
    fn draws_have_the_shares_of_the_mix() {
        let mix: Mix = "get:70,set:20,rmw:10".parse().unwrap();
        let mut random = Random::new(4, 4);
        let mut counts = [0u32; 5];
        for _ in 0..100_000 {
            counts[mix.next(&mut random) as usize] += 1;
        }
        for (kind, expected) in [(Kind::Get, 70_000.0), (Kind::Set, 20_000.0), (Kind::Rmw, 10_000.0)] {
            assert!((f64::from(counts[kind as usize]) / expected - 1.0).abs() < 0.05, "{counts:?}");
        }
    }

    #[test]
    fn core_workloads_are_those_of_ycsb() {
        assert!(Mix::ycsb("e").unwrap_err().contains("scans"));
        assert!(Mix::ycsb("D").unwrap().0.has(Kind::Insert));
        assert_eq!(Mix::ycsb("d").unwrap().1, Distribution::Latest(0.99));
        assert!(Mix::ycsb("f").unwrap().0.has(Kind::Rmw));
        assert!(Mix::ycsb("z").is_err());
    }
}
