//! What a shard holds, in 136 bytes: for comparing replicas without sending data.
//!
//! Each entry adds a mixed word of its hash and version to one of sixteen leaves, chosen by the hash; taking it away
//! subtracts the same word. So the digest depends on the contents alone, whatever the history, and costs a few
//! instructions per write. Different leaves say which sixteenth of the shard differs. A version names one write, so value
//! and expiry need no part in it; nor has it one that an entry expired, which each replica finds out at its own time.
//!
//! It finds differences, it does not prove equality to an adversary: sums of mixed words can be forged.

use crate::hash::KeyHash;
use crate::hlc::Version;

/// Leaves of a digest.
pub const LEAVES: usize = 16;

/// Sums over the entries of a shard, tombstones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    /// Number of entries.
    pub count: u64,
    /// One sum per sixteenth of the shard.
    pub leaves: [u64; LEAVES],
}

/// The leaf of a hash in a shard that fixes `shard_bits` bits.
#[inline]
fn leaf(hash: KeyHash, shard_bits: u32) -> usize {
    (hash.0 << shard_bits >> 60) as usize
}

#[inline]
fn word(hash: KeyHash, version: Version) -> u64 {
    // Two rounds of a 64-bit finalizer (MurmurHash3's constants) over hash and version.
    let mut x = hash.0 ^ version.hlc.0.rotate_left(32) ^ u64::from(version.node) << 17;
    x = (x ^ x >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ x >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 33
}

impl Digest {
    /// An entry came.
    #[inline]
    pub fn add(&mut self, hash: KeyHash, version: Version, shard_bits: u32) {
        self.count += 1;
        let leaf = &mut self.leaves[leaf(hash, shard_bits)];
        *leaf = leaf.wrapping_add(word(hash, version));
    }

    /// An entry went.
    #[inline]
    pub fn remove(&mut self, hash: KeyHash, version: Version, shard_bits: u32) {
        self.count -= 1;
        let leaf = &mut self.leaves[leaf(hash, shard_bits)];
        *leaf = leaf.wrapping_sub(word(hash, version));
    }

    /// An entry was replaced by one of the same hash.
    #[inline]
    pub fn replace(&mut self, hash: KeyHash, old: Version, new: Version, shard_bits: u32) {
        let leaf = &mut self.leaves[leaf(hash, shard_bits)];
        *leaf = leaf.wrapping_sub(word(hash, old)).wrapping_add(word(hash, new));
    }
}
