//! Concurrent maps that an application might use instead, each as its documentation says it is fastest.
//!
//! * DashMap: a read holds a shard's lock while it looks; a write changes the value in place.
//! * papaya: a read pins an epoch, once per block of keys; a write puts a new value in the old one's place, since
//!   readers may still hold it.
//!
//! Keys and values are byte strings on the heap, as a store of any keys must have them.

use std::hash::{BuildHasher, Hasher};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::stage::{BLOCK, Outcome, Seen, Stage};
use crate::failure::Failure;

pub(super) type Dash = dashmap::DashMap<Box<[u8]>, Vec<u8>, Xxh3>;
pub(super) type Papaya = papaya::HashMap<Box<[u8]>, Box<[u8]>, Xxh3>;

/// The hash that the node uses, for a map.
#[derive(Clone, Debug, Default)]
pub(super) struct Xxh3;

/// The hash so far; the next part's seed.
#[derive(Debug)]
pub(super) struct State(u64);

impl BuildHasher for Xxh3 {
    type Hasher = State;

    #[inline]
    fn build_hasher(&self) -> State {
        State(SEED)
    }
}

const SEED: u64 = 7;

impl Hasher for State {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64_with_seed(bytes, self.0);
    }

    /// The length that precedes the bytes of a slice: they are hashed with their length anyway.
    #[inline]
    fn write_usize(&mut self, _: usize) {}

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

fn dashmap(stage: &Stage) -> &Dash {
    stage.dashmap.get_or_init(|| {
        let map = Dash::with_hasher(Xxh3);
        stage.all.iter().for_each(|key| drop(map.insert(key[..].into(), stage.value.to_vec())));
        map
    })
}

fn papaya(stage: &Stage) -> &Papaya {
    stage.papaya.get_or_init(|| {
        let map = Papaya::with_hasher(Xxh3);
        let pinned = map.pin();
        for key in stage.all.iter() {
            pinned.insert(key[..].into(), stage.value[..].into());
        }
        drop(pinned);
        map
    })
}

fn pinned(stage: &Stage) -> Vec<Option<usize>> {
    stage.cpus.iter().copied().map(Some).collect()
}

pub(super) fn dashmap_get(stage: &Stage) -> Result<Outcome, Failure> {
    let map = dashmap(stage);
    stage.on_threads(&pinned(stage), |mut task| {
        let mut seen = Seen::default();
        while !task.stopped() {
            for key in task.walk.block(BLOCK) {
                seen.value(map.get(&key[..]).as_ref().map(|value| &value[..]));
            }
        }
        Ok(seen)
    })
}

pub(super) fn dashmap_set(stage: &Stage) -> Result<Outcome, Failure> {
    let map = dashmap(stage);
    stage.on_threads(&pinned(stage), |mut task| {
        let mut seen = Seen::default();
        while !task.stopped() {
            for key in task.walk.block(BLOCK) {
                match map.get_mut(&key[..]) {
                    Some(mut value) => {
                        value.clear();
                        value.extend_from_slice(&task.value);
                    }
                    None => drop(map.insert(key[..].into(), task.value.to_vec())),
                }
                seen.written();
            }
        }
        Ok(seen)
    })
}

pub(super) fn papaya_get(stage: &Stage) -> Result<Outcome, Failure> {
    let map = papaya(stage);
    stage.on_threads(&pinned(stage), |mut task| {
        let mut seen = Seen::default();
        while !task.stopped() {
            let map = map.pin();
            for key in task.walk.block(BLOCK) {
                seen.value(map.get(&key[..]).map(|value| &value[..]));
            }
        }
        Ok(seen)
    })
}

pub(super) fn papaya_set(stage: &Stage) -> Result<Outcome, Failure> {
    let map = papaya(stage);
    stage.on_threads(&pinned(stage), |mut task| {
        let mut seen = Seen::default();
        while !task.stopped() {
            let map = map.pin();
            for key in task.walk.block(BLOCK) {
                map.insert(key[..].into(), task.value[..].into());
                seen.written();
            }
        }
        Ok(seen)
    })
}
