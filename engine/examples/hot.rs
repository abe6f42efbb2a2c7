//! What one core does per second with a bare store, and what an entry costs: the figures that the engine is held to.
//!
//! ```text
//! cargo run --release -p gridkv-engine --example hot                  # reads and overwrites, 100 k keys
//! cargo run --release -p gridkv-engine --example hot -- grow 10000000 # growth: rate, longest pause, bytes per entry
//! ```
//!
//! One thread, keys of 16 bytes in random order. Not here: cores, sockets, clients (`gridkv-bench` measures those).

// An example may look at the clock; the engine may not.
#![allow(clippy::disallowed_methods)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use gridkv_engine::backend::Registry;
use gridkv_engine::hash::Keyspace;
use gridkv_engine::store::{Store, StoreConfig};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const NOW: u64 = 1_800_000_000_000;
const ROUNDS: usize = 5;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| args.get(at).map_or(default, |n| n.parse().expect("a number"));
    match args.first().map_or("hot", String::as_str) {
        "hot" => hot(number(1, 100_000), number(2, 100)),
        "grow" => grow(number(1, 10_000_000), number(2, 64)),
        other => panic!("'{other}' is unknown; there are hot [keys] [value bytes], grow [keys] [value bytes]"),
    }
}

fn store() -> Store {
    let config = StoreConfig { keyspace: Keyspace { seed: 42, ..Keyspace::default() }, ..StoreConfig::default() };
    let name = std::env::var("BACKEND").unwrap_or_else(|_| "memory-sharded".to_owned());
    let backend = Registry::default().make(&name, &config.backend()).expect("the backend exists");
    Store::new(config, backend)
}

fn key(n: u64) -> [u8; 16] {
    let mut key = *b"key:000000000000";
    let mut rest = n;
    for digit in key[4..].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    key
}

/// Reads and overwrites in random order; the median of some rounds.
fn hot(keys: usize, value_len: usize) {
    let mut store = store();
    let value = vec![b'v'; value_len];
    let all: Vec<[u8; 16]> = (0..keys as u64).map(key).collect();
    for key in &all {
        store.set(store.locate(key), key, &value, 0, NOW).expect("there is no limit");
    }
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let order: Vec<[u8; 16]> = (0..keys.max(1 << 20))
        .map(|_| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            all[(random % keys as u64) as usize]
        })
        .collect();
    report("get", order.len(), || {
        let mut found = 0;
        for key in &order {
            found += usize::from(black_box(store.get(store.locate(key), key, NOW)).is_some());
        }
        assert_eq!(found, order.len());
    });
    report("get, value's first byte", order.len(), || {
        let mut sum = 0u64;
        for key in &order {
            sum += store.get(store.locate(key), key, NOW).map_or(0, |entry| u64::from(entry.value[0]));
        }
        black_box(sum);
    });
    report("get, absent", order.len(), || {
        for key in &order {
            let mut key = *key;
            key[0] = b'K';
            assert!(store.get(store.locate(&key), &key, NOW).is_none());
        }
    });
    report("set, overwriting", order.len(), || {
        for key in &order {
            black_box(store.set(store.locate(key), key, &value, 0, NOW)).expect("there is no limit");
        }
    });
    let longer = vec![b'w'; value_len + 1 + value_len / 2];
    let mut turn = false;
    report("set, of another length", order.len(), || {
        turn = !turn;
        for key in &order {
            let value = if turn { &longer } else { &value };
            black_box(store.set(store.locate(key), key, value, 0, NOW)).expect("there is no limit");
        }
    });
    println!("memory_bytes {} ({:.1} per key)", store.memory_bytes(), store.memory_bytes() as f64 / keys as f64);
}

fn report(what: &str, operations: usize, mut round: impl FnMut()) {
    let mut times: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let start = on_cpu();
            round();
            on_cpu() - start
        })
        .collect();
    times.sort();
    let median = times[ROUNDS / 2].as_secs_f64();
    println!("{what:24} {:7.2} M/s  {:6.1} ns", operations as f64 / median / 1e6, median * 1e9 / operations as f64);
}

/// Inserts from empty; looks at every single insert.
fn grow(keys: usize, value_len: usize) {
    let mut store = store();
    let value = vec![b'v'; value_len];
    let before = resident();
    let mut pauses: Vec<(Duration, usize)> = Vec::new();
    let start = Instant::now();
    let mut last = start;
    for n in 0..keys {
        let key = key(n as u64);
        store.set(store.locate(&key), &key, &value, 0, NOW).expect("there is no limit");
        let now = Instant::now();
        let took = now - last;
        last = now;
        if took > Duration::from_micros(50) {
            pauses.push((took, n));
        }
    }
    let took = start.elapsed().as_secs_f64();
    println!("{keys} inserts             {:7.2} M/s", keys as f64 / took / 1e6);
    pauses.sort_unstable_by(|a, b| b.cmp(a));
    println!("{} inserts beyond 50 us; the longest: {:?}", pauses.len(), &pauses[..pauses.len().min(8)]);
    let grown = resident() - before;
    let payload = keys * (16 + value_len);
    let over = |bytes: usize| (bytes as f64 - payload as f64) / keys as f64;
    println!("overhead per entry: {:.1} bytes by RSS, {:.1} by memory_bytes()", over(grown), over(store.memory_bytes()));
}

/// Time that this process has run so far: other processes on the core do not count.
fn on_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/schedstat").expect("this runs on Linux");
    Duration::from_nanos(stat.split_whitespace().next().and_then(|ns| ns.parse().ok()).expect("a number of ns"))
}

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("this runs on Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("the kernel says it");
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<usize>().ok()).expect("a number of kB") * 1024
}
