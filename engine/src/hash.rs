//! Where a key lives: one 64-bit hash names its shard and its place in the shard's table.
//!
//! ```text
//!   63            56 55                                   0
//!   +---------------+--------------------------------------+
//!   | shard (8 bits | directory, bucket and tag in the     |
//!   | for 256)      | shard's table                        |
//!   +---------------+--------------------------------------+
//! ```
//!
//! The hash is xxh3-64 with the cluster's seed. A key with a hash tag (`{user1}:name`, Redis's rule) takes the shard
//! bits from the tag alone, so all keys of a tag share a shard; the other bits always come from the whole key.
//! Positions in hash space are ordered as numbers; SCAN cursors and snapshots walk in that order.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Number of shards of a cluster: a power of two, 32 to 16384, fixed when the cluster is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardCount(u16);

impl ShardCount {
    /// The default, 256.
    pub const DEFAULT: ShardCount = ShardCount(256);

    /// That many shards, if the number is allowed.
    pub fn new(count: u32) -> Option<ShardCount> {
        ((32..=16384).contains(&count) && count.is_power_of_two()).then_some(ShardCount(count as u16))
    }

    /// As a number.
    #[inline]
    pub fn get(self) -> u16 {
        self.0
    }

    /// Bits of a hash that name the shard.
    #[inline]
    pub fn bits(self) -> u32 {
        self.0.trailing_zeros()
    }
}

impl Default for ShardCount {
    fn default() -> ShardCount {
        ShardCount::DEFAULT
    }
}

/// A shard, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(pub u16);

impl ShardId {
    /// As an index.
    #[inline]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Hash of a key, and a position in hash space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyHash(pub u64);

/// How keys map to shards: equal on every node of a cluster, for life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Keyspace {
    /// Seed of the hash; keeps strangers from choosing keys that collide.
    pub seed: u64,
    /// Number of shards.
    pub shards: ShardCount,
}

impl Keyspace {
    /// Hash of `key`, its hash tag respected.
    #[inline]
    pub fn locate(&self, key: &[u8]) -> KeyHash {
        let hash = xxh3_64_with_seed(key, self.seed);
        match hash_tag(key) {
            None => KeyHash(hash),
            Some(tag) => {
                let low = u64::MAX >> self.shards.bits();
                KeyHash(xxh3_64_with_seed(tag, self.seed) & !low | hash & low)
            }
        }
    }

    /// Shard of a key of that hash.
    #[inline]
    pub fn shard(&self, hash: KeyHash) -> ShardId {
        ShardId((hash.0 >> (64 - self.shards.bits())) as u16)
    }

    /// Lowest position of a shard in hash space.
    pub fn start_of(&self, shard: ShardId) -> KeyHash {
        KeyHash(u64::from(shard.0) << (64 - self.shards.bits()))
    }
}

/// The bytes between the first `{` and the next `}`, if there are any (Redis Cluster specification, "Hash tags").
#[inline]
pub fn hash_tag(key: &[u8]) -> Option<&[u8]> {
    let open = memchr::memchr(b'{', key)?;
    let rest = &key[open + 1..];
    let close = memchr::memchr(b'}', rest)?;
    (close > 0).then(|| &rest[..close])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_tags_follow_redis() {
        for (key, tag) in [
            ("plain", None),
            ("{user1}:a", Some("user1")),
            ("a{b}c{d}", Some("b")),
            ("a{}b{c}", None),
            ("a{{b}}c", Some("{b")),
            ("a{b", None),
            ("}a{", None),
        ] {
            assert_eq!(hash_tag(key.as_bytes()), tag.map(str::as_bytes), "{key}");
        }
    }

    #[test]
    fn keys_of_a_tag_share_a_shard_and_differ_otherwise() {
        let space = Keyspace::default();
        let (a, b) = (space.locate(b"{user1}:a"), space.locate(b"{user1}:b"));
        assert_eq!(space.shard(a), space.shard(b));
        assert_eq!(space.shard(a), space.shard(space.locate(b"user1")));
        assert_ne!(a, b);
    }

    #[test]
    fn shard_counts_are_powers_of_two_in_bounds() {
        for good in [32, 256, 16384] {
            assert_eq!(ShardCount::new(good).unwrap().get() as u32, good);
        }
        for bad in [0, 1, 16, 100, 255, 32768, u32::MAX] {
            assert_eq!(ShardCount::new(bad), None);
        }
    }
}
