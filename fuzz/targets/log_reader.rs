//! Records of a log or a snapshot: arbitrary bytes are read or refused, never believed, and give a store that is whole.
//!
//! The checksum of a frame is taken to be right, so these are the bytes of another version, or of an enemy. What was read and is
//! written again is the same, and a snapshot of the store, read into a second one, gives the same store.
#![no_main]

use gridkv_engine::backend::{FILE_BACKEND, Registry};
use gridkv_engine::hash::{KeyHash, Keyspace, ShardCount, ShardId};
use gridkv_engine::hlc::Hlc;
use gridkv_engine::journal::{Change, Changes};
use gridkv_engine::store::{Store, StoreConfig};
use libfuzzer_sys::fuzz_target;

const SHARDS: ShardCount = ShardCount::MIN;
/// Where a patch may begin. Beyond it only zeroes take time.
const FARTHEST: u32 = 4096;

fn new_store() -> Store {
    let keyspace = Keyspace { seed: 7, shards: SHARDS };
    let config = StoreConfig { keyspace, owned: 0..SHARDS.get(), ..StoreConfig::default() };
    let backend = Registry::default().make(FILE_BACKEND, &config.backend()).expect("it is registered");
    Store::new(config, backend)
}

fn snapshot(store: &mut Store) -> Vec<u8> {
    let mut records = Vec::new();
    for shard in 0..SHARDS.get() {
        let end = store.snapshot(ShardId(shard), KeyHash(0), usize::MAX, &mut |entry| {
            Change::Put { key: entry.key, value: entry.value, meta: entry.meta() }.write(&mut records);
        });
        assert_eq!(end, None);
    }
    records
}

fuzz_target!(|input: &[u8]| {
    let (mut store, mut again) = (new_store(), Vec::new());
    for change in Changes::new(input) {
        let Ok(change) = change else { break };
        let begin = again.len();
        change.write(&mut again);
        let mut same = Changes::new(&again[begin..]);
        assert_eq!((same.next(), same.next()), (Some(Ok(change)), None));
        match change {
            // What is of no shard of this store is left out by who reads files.
            Change::Clear { shard } if shard.0 >= SHARDS.get() => {}
            Change::Patch { at, .. } if at > FARTHEST => {}
            change => store.restore(change).expect("memory takes everything"),
        }
    }
    store.restored(Hlc::ZERO);
    store.invariants();

    let (records, mut copy) = (snapshot(&mut store), new_store());
    for change in Changes::new(&records) {
        copy.restore(change.expect("we wrote it")).expect("memory takes everything");
    }
    copy.restored(Hlc::ZERO);
    copy.invariants();
    assert_eq!((snapshot(&mut copy), copy.last_hlc()), (records, store.last_hlc()));
});
