//! Which node a shard likes best: weighted rendezvous hashing in integers.
//!
//! Each node draws a number for each shard; the shard goes to the highest. A node that comes or goes changes nothing between the others,
//! which is why moves stay few. The score is `weight / -log2(u)` with `u` in (0, 1] drawn from the shard and the node's id:
//! the chance to draw the highest is then proportional to the weight (Mosko, "Weighted rendezvous hashing", 1998 and later).
//!
//! There are no floats: every node that plans must come to the same answer, whatever its processor. The logarithm is a table of 257
//! entries, made at compile time, with straight lines between them; it is monotone and wrong by less than 2^-18.
//!
//! Not here: load bounds, zones, who may take a shard at all ([`mod@super::assign`]).

use crate::ids::NodeId;

/// Bits after the point of a logarithm.
const POINT: u32 = 32;
/// Entries of the table, as a power of two.
const TABLE_BITS: u32 = 8;

/// log2 of 1 + i/256.
const LOG: [u64; (1 << TABLE_BITS) + 1] = {
    let mut table = [0; (1 << TABLE_BITS) + 1];
    let mut i = 0;
    while i < 1 << TABLE_BITS {
        table[i] = log2_of_mantissa((1 << 62) + ((i as u64) << (62 - TABLE_BITS)));
        i += 1;
    }
    table[1 << TABLE_BITS] = 1 << POINT;
    table
};

/// log2 of `x / 2^62` for `x / 2^62` in [1, 2): square it again and again, each time it passes 2 a bit is one.
const fn log2_of_mantissa(mut x: u64) -> u64 {
    let mut log = 0;
    let mut bit = 0;
    while bit < POINT {
        let square = (x as u128 * x as u128) >> 62;
        log <<= 1;
        if square >= 1 << 63 {
            log |= 1;
            x = (square >> 1) as u64;
        } else {
            x = square as u64;
        }
        bit += 1;
    }
    log
}

/// log2 of a number that is not 0, with 32 bits after the point.
fn log2(x: u64) -> u64 {
    let whole = u64::from(63 - x.leading_zeros());
    // The bits below the highest one, at the top of a word.
    let rest = (x << x.leading_zeros()) << 1;
    let at = (rest >> (64 - TABLE_BITS)) as usize;
    let between = (rest << TABLE_BITS) >> 32;
    let line = LOG[at] + (((LOG[at + 1] - LOG[at]) * between) >> 32);
    (whole << POINT) + line
}

/// Makes every bit of the result depend on every bit of the argument (the finaliser of splitmix64).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What a node draws with: its id, mixed once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Salt(u64);

impl Salt {
    /// That of a node.
    pub fn of(id: NodeId) -> Salt {
        let (high, low) = ((id.0 >> 64) as u64, id.0 as u64);
        Salt(mix(mix(low.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ high))
    }
}

/// How much the shard likes the node: the highest is the best. Equal ones are to be told apart by the node's id.
pub fn score(shard: u16, salt: Salt, weight: u16) -> u64 {
    let drawn = mix(salt.0 ^ mix(u64::from(shard) + 1));
    // -log2 of drawn / 2^64.
    let depth = (64 << POINT) - log2(drawn.max(1));
    (u64::from(weight) << 47) / depth.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logarithm_is_one() {
        for x in [1, 2, 3, 7, 10, 1000, 123_456_789, u64::MAX / 3, u64::MAX] {
            let exact = (x as f64).log2();
            let ours = log2(x) as f64 / (1u64 << POINT) as f64;
            assert!((exact - ours).abs() < 3e-6, "log2({x}) is {exact}, not {ours}");
        }
    }

    /// A node of twice the weight is liked best by twice as many shards.
    #[test]
    fn wins_are_proportional_to_weights() {
        let weights = [50u16, 100, 100, 200, 50];
        let mut wins = [0u32; 5];
        for shard in 0..16384 {
            let best = (0..5).max_by_key(|&n| score(shard, Salt::of(NodeId(n as u128 * 7919)), weights[n])).unwrap();
            wins[best] += 1;
        }
        for (node, &won) in wins.iter().enumerate() {
            let fair = 16384 * u32::from(weights[node]) / 500;
            assert!(won.abs_diff(fair) < fair / 12, "node {node} won {won} of {fair}");
        }
    }

    /// Maps live on: a score that changes would move data for nothing.
    #[test]
    fn scores_stay_as_they_are() {
        let drawn: Vec<u64> = (0..3).map(|shard| score(shard, Salt::of(NodeId(42)), 100)).collect();
        assert_eq!(drawn, SCORES);
    }

    const SCORES: [u64; 3] = [1_144_152, 24_061_111, 2_444_733];
}
