//! What every backend must do, checked against an ordered map.
//!
//! For the backends of this crate and for an embedder's own: call [`run`] in a test.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Backend, BackendConfig, Part};
use crate::hash::{KeyHash, Keyspace, ShardId};
use crate::hlc::{Hlc, Version};
use crate::record::{Entry, Meta};

/// What the model knows of an entry.
type Stored = (Vec<u8>, Meta);

/// Hash order, as a backend must walk.
type Model = BTreeMap<(KeyHash, Vec<u8>), Stored>;

/// A small seeded generator (splitmix64), so that a failing run can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

struct Run<'a> {
    backend: &'a mut dyn Backend,
    keyspace: Keyspace,
    owned: Range<u16>,
    model: Model,
    random: Random,
}

/// Runs `steps` random operations on an empty backend made by `make`, comparing each answer with a model.
///
/// # Panics
/// When the backend differs, saying at which step and how.
pub fn run(seed: u64, steps: usize, make: impl FnOnce(&BackendConfig) -> Box<dyn Backend>) {
    let keyspace = Keyspace { seed: 7, ..Keyspace::default() };
    let config = BackendConfig { keyspace, owned: 64..128 };
    let mut backend = make(&config);
    assert!(backend.is_empty(), "a new backend is empty");
    let idle = backend.memory_bytes();
    let mut run = Run {
        backend: &mut *backend,
        keyspace,
        owned: config.owned.clone(),
        model: Model::new(),
        random: Random(seed),
    };
    for step in 0..steps {
        run.step(step);
    }
    run.whole();
    for shard in config.owned.clone().map(ShardId) {
        run.clear(shard);
    }
    run.whole();
    assert!(run.backend.is_empty(), "cleared shard by shard, nothing is left");
    while run.backend.reclaim(100) {}
    assert!(run.backend.memory_bytes() <= idle.max(1 << 20), "clearing gives memory back");
    for step in 0..steps.min(1000) {
        run.step(step);
    }
    if run.backend.clear_all().expect("clearing succeeds") {
        run.model.clear();
    }
    run.whole();
    while run.backend.reclaim(100) {}
    run.whole();
}

impl Run<'_> {
    fn clear(&mut self, shard: ShardId) {
        self.backend.clear(shard).expect("clearing succeeds");
        let next = self.backend.visit(shard, KeyHash(0), 10, &mut |_, _| panic!("a cleared shard has entries"));
        assert_eq!(next, None);
        self.model.retain(|(hash, _), _| self.keyspace.shard(*hash) != shard);
    }

    /// A key of an owned shard, from a small set so that operations meet.
    fn key(&mut self) -> (ShardId, KeyHash, Vec<u8>) {
        loop {
            let key = format!("key:{}", self.random.below(3000)).into_bytes();
            let hash = self.keyspace.locate(&key);
            let shard = self.keyspace.shard(hash);
            if self.owned.contains(&shard.0) {
                return (shard, hash, key);
            }
        }
    }

    fn meta(&mut self) -> Meta {
        let version = Version { hlc: Hlc(self.random.next()), node: self.random.below(9) as u16 };
        let expires_at = if self.random.below(3) == 0 { 1 + self.random.below(1 << 40) } else { 0 };
        Meta { version, expires_at, tombstone: false }
    }

    fn step(&mut self, step: usize) {
        let (shard, hash, key) = self.key();
        let known = self.model.get(&(hash, key.clone())).cloned();
        match self.random.below(10) {
            0..=3 => {
                let mut meta = self.meta();
                let mut value = vec![step as u8; self.random.below(200) as usize];
                if self.random.below(8) == 0 {
                    meta.tombstone = true;
                    value.clear();
                }
                let old = self.backend.put(shard, hash, &key, &value, meta).expect("putting succeeds");
                let expected = known.map(|(value, meta)| (meta, value.len()));
                assert_eq!(old.map(|old| (old.meta, old.value_len)), expected, "step {step}: what put replaced");
                self.model.insert((hash, key.clone()), (value, meta));
            }
            4 => {
                let old = self.backend.remove(shard, hash, &key).expect("removing succeeds");
                let expected = self.model.remove(&(hash, key.clone())).map(|(value, meta)| (meta, value.len()));
                assert_eq!(old.map(|old| (old.meta, old.value_len)), expected, "step {step}: what remove removed");
            }
            5 => {
                let tombstone = known.as_ref().is_some_and(|(_, meta)| meta.tombstone);
                let meta = Meta { tombstone, ..self.meta() };
                let old = self.backend.set_meta(shard, hash, &key, meta).expect("describing succeeds");
                assert_eq!(old, known.map(|(_, meta)| meta), "step {step}: what set_meta replaced");
                if let Some((_, known)) = self.model.get_mut(&(hash, key.clone())) {
                    *known = meta;
                }
            }
            6 => {
                let len = known.as_ref().map_or(3, |(value, _)| value.len());
                let meta = self.meta();
                let exists = known.is_some_and(|(_, meta)| !meta.tombstone);
                let byte = step as u8;
                let from = self.random.below(len as u64 + 9) as usize;
                let to = from + self.random.below(9) as usize;
                let part = Part { whole: len.max(to), from, to };
                let old = self.backend.edit(shard, hash, &key, part, meta, &mut |value| value.fill(byte));
                assert!(exists || old.is_none(), "step {step}: there was nothing to edit");
                if let Some(old) = old {
                    let (value, known) = self.model.get_mut(&(hash, key.clone())).expect("it exists");
                    assert_eq!(old, *known, "step {step}: what edit replaced");
                    value.resize(part.whole, 0);
                    value[from..to].fill(byte);
                    *known = meta;
                }
                let short = Part { whole: 0, from: 0, to: 0 };
                let shorter = self.backend.edit(shard, hash, &key, short, meta, &mut |_| {});
                assert!(part.whole == 0 || shorter.is_none(), "step {step}: a value became shorter");
            }
            // Rarely, or there would never be much to clear.
            7 if self.random.below(100) == 0 => self.clear(shard),
            8 => _ = self.backend.reclaim(1),
            _ => {}
        }
        let found = self.backend.get(shard, hash, &key).map(owned);
        let expected = self.model.get(&(hash, key.clone())).map(|stored| (key, stored.clone()));
        assert_eq!(found, expected, "step {step}: what get finds");
        let mut under = Vec::new();
        self.backend.by_hash(shard, hash, &mut |entry| under.push(owned(entry)));
        assert_eq!(under, Vec::from_iter(expected), "step {step}: what lies under a hash");
    }

    /// Everything at once, and by pages of several sizes.
    fn whole(&mut self) {
        assert_eq!(self.backend.len(), self.model.len());
        for limit in [1, 7, 100, usize::MAX] {
            let mut seen = Vec::new();
            for shard in self.owned.clone().map(ShardId) {
                let mut next = Some(KeyHash(0));
                while let Some(from) = next {
                    next = self.backend.visit(shard, from, limit, &mut |hash, entry| seen.push((hash, owned(entry))));
                }
            }
            let expected: Vec<_> =
                self.model.iter().map(|((hash, key), stored)| (*hash, (key.clone(), stored.clone()))).collect();
            let mut sorted = seen.clone();
            sorted.sort_by(|a, b| (a.0, &a.1.0).cmp(&(b.0, &b.1.0)));
            assert!(seen.is_sorted_by_key(|(hash, _)| *hash), "pages of {limit}: a walk is in hash order");
            assert!(sorted == expected, "pages of {limit}: a walk sees every entry once");
        }
    }
}

fn owned(entry: Entry<'_>) -> (Vec<u8>, Stored) {
    (entry.key.to_vec(), (entry.value.to_vec(), entry.meta()))
}

#[cfg(test)]
mod tests {
    use super::super::Registry;
    use super::*;

    #[test]
    fn every_registered_backend_conforms() {
        let registry = Registry::default();
        for name in registry.names() {
            for seed in 0..if cfg!(miri) { 1 } else { 8 } {
                run(seed, if cfg!(miri) { 300 } else { 20_000 }, |config| registry.make(name, config).unwrap());
            }
        }
    }
}
