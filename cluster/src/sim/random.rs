//! Numbers that look random and follow from a seed.
//!
//! SplitMix64 (Steele, Lea, Flood 2014): a counter and a mixer. Each part of a world has its own stream, so that dropping a
//! fault from a run changes as little of the rest as it can.

/// A stream of numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of that number under a seed.
    pub fn new(seed: u64, stream: u64) -> Random {
        let mut random = Random(seed ^ stream.wrapping_mul(0xd6e8_feb8_6659_fd93));
        random.next();
        random
    }

    /// Any number.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// Below `end`; 0 when that is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// From `low` to `high`, both included.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// From `low` to `high`, both included.
    pub fn signed(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low) as u64 + 1) as i64
    }

    /// True so many times in 1,000.
    pub fn chance(&mut self, permille: u64) -> bool {
        self.below(1000) < permille
    }

    /// Exponentially distributed, of that mean; at most twelve times the mean.
    pub fn exponential(&mut self, mean: u64) -> u64 {
        // An integer approximation of -ln(u): the number of leading zeros and the bits behind them. No floating point, so
        // the same on every machine.
        let u = self.next() | 1;
        let zeros = u64::from(u.leading_zeros());
        let part = (u << zeros << 1) >> 48;
        let log2 = (zeros << 16) + ((1 << 16) - part);
        // ln 2 is 45426 / 65536.
        let ln = (log2 * 45426) >> 16;
        ((u128::from(mean) * u128::from(ln)) >> 16).min(u128::from(mean) * 12) as u64
    }

    /// One of them.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exponential_has_about_its_mean() {
        let mut random = Random::new(1, 2);
        let sum: u64 = (0..20_000).map(|_| random.exponential(1000)).sum();
        assert!((900..1100).contains(&(sum / 20_000)), "{}", sum / 20_000);
    }
}
