//! Where a key lives: its hash, and the shard that the hash names.
//!
//! ```text
//!   63          56 55                    ...                       16 15    8 7 6 5     0
//!  ┌──────────────┬─────────────────────────────────────────────────┬────────┬───┬───────┐
//!  │ shard        │ segment of the shard's table (as many as needed)│ tag    │   │bucket │
//!  └──────────────┴─────────────────────────────────────────────────┴────────┴───┴───────┘
//!   log2(shards) bits, 8 by default
//! ```
//!
//! The hash is xxh3-64 of the whole key under the cluster's seed. A key with a hash tag, `user:{42}:name`, takes its shard
//! bits from the tag alone, so that keys of one tag meet in one shard and can take part in one atomic command.
//!
//! **This mapping is a protocol**: nodes of a cluster, and data on disk, agree on it bit for bit. The golden vectors below
//! must never change.
//!
//! Not here: which core or node owns a shard.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::record::{ends, words_have};

/// How many shards the key space has: a power of two, fixed when a cluster is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardCount {
    log2: u8,
}

impl ShardCount {
    /// The fewest shards: 32.
    pub const MIN: ShardCount = ShardCount { log2: 5 };
    /// The most shards: 16384, Redis's number of slots.
    pub const MAX: ShardCount = ShardCount { log2: 14 };

    /// 256.
    pub const DEFAULT: ShardCount = ShardCount { log2: 8 };

    /// `None` unless `count` is a power of two from 32 to 16384.
    pub const fn new(count: u32) -> Option<ShardCount> {
        if count.is_power_of_two() && count >= 32 && count <= 16384 {
            Some(ShardCount { log2: count.trailing_zeros() as u8 })
        } else {
            None
        }
    }

    /// The number of shards.
    #[inline]
    pub const fn get(self) -> u16 {
        1 << self.log2
    }

    /// How many top bits of a hash name the shard.
    #[inline]
    pub const fn bits(self) -> u32 {
        self.log2 as u32
    }
}

impl Default for ShardCount {
    fn default() -> ShardCount {
        ShardCount::DEFAULT
    }
}

/// One shard of the key space, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardId(pub u16);

impl ShardId {
    /// As an index.
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The hash of a key, which is also its place in the order of all walks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyHash(pub u64);

impl KeyHash {
    /// The lowest place: where walks begin.
    pub const MIN: KeyHash = KeyHash(0);
    /// The highest place.
    pub const MAX: KeyHash = KeyHash(u64::MAX);

    /// The next higher place; `None` after the highest.
    #[inline]
    pub const fn next(self) -> Option<KeyHash> {
        match self.0.checked_add(1) {
            Some(next) => Some(KeyHash(next)),
            None => None,
        }
    }
}

/// The mapping of keys to hashes and shards that a whole cluster shares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keyspace {
    /// Seed of the hash. Random per cluster, so that nobody outside can choose keys that collide.
    pub seed: u64,
    /// Number of shards.
    pub shards: ShardCount,
}

impl Keyspace {
    /// The hash of `key`: of all of it, but with the shard bits of its hash tag if it has one.
    #[inline]
    pub fn locate(&self, key: &[u8]) -> KeyHash {
        let hash = xxh3_64_with_seed(key, self.seed);
        match has_brace(key) {
            false => KeyHash(hash),
            true => self.locate_tagged(key, hash),
        }
    }

    #[cold]
    #[inline(never)]
    fn locate_tagged(&self, key: &[u8], hash: u64) -> KeyHash {
        let Some(tag) = hash_tag(key) else { return KeyHash(hash) };
        let low = u64::MAX >> self.shards.bits();
        KeyHash((xxh3_64_with_seed(tag, self.seed) & !low) | (hash & low))
    }

    /// The shard of a hash.
    #[inline]
    pub const fn shard(&self, hash: KeyHash) -> ShardId {
        ShardId((hash.0 >> (64 - self.shards.bits())) as u16)
    }

    /// The lowest hash of a shard.
    #[inline]
    pub const fn first_hash(&self, shard: ShardId) -> KeyHash {
        KeyHash((shard.0 as u64) << (64 - self.shards.bits()))
    }

    /// The highest hash of a shard.
    #[inline]
    pub const fn last_hash(&self, shard: ShardId) -> KeyHash {
        KeyHash(self.first_hash(shard).0 | (u64::MAX >> self.shards.bits()))
    }
}

/// What steers a key to its shard if not all of it: the bytes between the first `{` and the next `}`, if there are any.
pub fn hash_tag(key: &[u8]) -> Option<&[u8]> {
    let open = memchr::memchr(b'{', key)?;
    let rest = &key[open + 1..];
    match memchr::memchr(b'}', rest) {
        None | Some(0) => None,
        Some(close) => Some(&rest[..close]),
    }
}

/// Whether there is a `{`: two words at once for short keys, where a call would cost more than the search.
#[inline]
fn has_brace(key: &[u8]) -> bool {
    match ends(key) {
        Some((head, tail)) if key.len() <= 16 => words_have(head, tail, b'{'),
        _ => memchr::memchr(b'{', key).is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Computed once with the reference implementation of xxHash (0.8). A failure here means that nodes of two
    /// builds would disagree about where keys live.
    #[test]
    fn golden_vectors() {
        let plain = Keyspace::default();
        let seeded = Keyspace { seed: 0x9E37_79B9_7F4A_7C15, shards: ShardCount::MAX };
        let long: Vec<u8> = (0..300).map(|i| (i % 251) as u8).collect();
        for (key, hash, hash_seeded) in GOLDEN {
            let key: &[u8] = if *key == b"<long>" { &long } else { key };
            assert_eq!(plain.locate(key).0, *hash, "{:?}", String::from_utf8_lossy(key));
            assert_eq!(seeded.locate(key).0, *hash_seeded, "{:?}", String::from_utf8_lossy(key));
        }
    }

    const GOLDEN: &[(&[u8], u64, u64)] = &[
        (b"", 0x2d06_8005_38d3_94c2, 0x602b_0e2c_d666_2c8b),
        (b"a", 0xe6c6_32b6_1e96_4e1f, 0x7b01_3ec7_3230_c3a1),
        (b"key", 0xbbea_0d63_a051_65e3, 0xae76_ebdd_9630_6996),
        (b"hello", 0x9555_e855_5c62_dcfd, 0x3746_83d7_a799_4223),
        (b"key:0000000001", 0x4787_7eae_4eed_5970, 0x1b31_0742_9c10_9638),
        (b"user:1000:profile", 0x1a84_625c_2ea2_88c9, 0xaf3e_5fa4_787a_186d),
        (b"{user1000}.following", 0xb01a_3a54_c0f4_68a5, 0x21a6_419c_f412_2d91),
        (b"foo{}{bar}", 0xc183_e667_8835_189c, 0x70a2_7944_2d48_5e06),
        (b"\x00\xff\x80", 0x2682_fcb6_5dac_5d83, 0x7598_9c8b_2d0a_746e),
        (b"xxxxxxxxxxxxxxxx", 0xdf76_ff0d_7f0d_9edf, 0x9912_0580_d09d_500a),
        (&[b'y'; 64], 0x3d6f_fb0e_f08e_dd58, 0xd2b4_b1fe_edc1_0b59),
        (&[b'z'; 129], 0x4e15_1cfc_44a9_680c, 0x801d_8e08_5202_061f),
        (b"<long>", 0xd2da_6967_cf02_1dbc, 0xdcd3_589a_b378_fc7a),
    ];

    #[test]
    fn hash_tags_follow_redis_rule() {
        for (key, tag) in [
            ("foo{bar}zap", Some("bar")),
            ("{user1000}.following", Some("user1000")),
            ("foo{}{bar}", None),
            ("foo{{bar}}zap", Some("{bar")),
            ("foo{bar}{zap}", Some("bar")),
            ("foo{bar", None),
            ("foo}bar{", None),
            ("", None),
        ] {
            assert_eq!(hash_tag(key.as_bytes()), tag.map(str::as_bytes), "{key}");
        }
    }

    #[test]
    fn keys_of_one_tag_share_a_shard_and_little_else() {
        let keyspace = Keyspace { seed: 7, shards: ShardCount::MAX };
        let (a, b) = (keyspace.locate(b"{user:1}:name"), keyspace.locate(b"orders:{user:1}"));
        assert_eq!(keyspace.shard(a), keyspace.shard(b));
        assert_eq!(keyspace.shard(a), keyspace.shard(keyspace.locate(b"user:1")));
        assert_ne!(a, b);
    }

    #[test]
    fn shard_counts_are_powers_of_two_within_bounds() {
        let valid: Vec<u32> = (0..=70_000).filter(|n| ShardCount::new(*n).is_some()).collect();
        assert_eq!(valid, [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]);
        assert_eq!(ShardCount::default().get(), 256);
        assert_eq!((ShardCount::MIN.get(), ShardCount::MAX.get()), (32, 16384));
    }

    #[test]
    fn shards_cut_the_hashes_into_contiguous_ranges() {
        let keyspace = Keyspace { seed: 0, shards: ShardCount::MIN };
        let mut expected = Some(KeyHash::MIN);
        for shard in (0..32).map(ShardId) {
            let (first, last) = (keyspace.first_hash(shard), keyspace.last_hash(shard));
            assert_eq!(Some(first), expected);
            assert_eq!((keyspace.shard(first), keyspace.shard(last)), (shard, shard));
            expected = last.next();
        }
        assert_eq!(expected, None);
    }

    proptest! {
        #[test]
        fn the_short_cut_for_braces_sees_what_memchr_sees(key in proptest::collection::vec(any::<u8>(), 0..40), at in 0usize..40, put in any::<bool>()) {
            let mut key = key;
            if put && at < key.len() {
                key[at] = b'{';
            }
            prop_assert_eq!(has_brace(&key), key.contains(&b'{'));
        }
    }
}
