//! `SCAN` and `RANDOMKEY`: the keys of all cores.
//!
//! A cursor is a position in the 64-bit space of hashes, so it needs no memory here and outlives anything; the core that
//! owns the position goes on. Shards lie on the cores in contiguous ranges: a walk meets each core once, in order. 0
//! begins a walk and ends it.
//!
//! **Promise**: a key that is there during a whole walk is returned, at least once.

use gridkv_engine::command::scan::{Only, ScanOptions, cursor, parse_cursor, scan_part};
use gridkv_engine::hash::{KeyHash, ShardId};
use gridkv_engine::reply::Reply;

use super::gather::{each_core, on_core};
use super::{Outcome, Refused};
use crate::cores::CoreRc;
use crate::platform;
use crate::topology::{Topology, shards_of};

/// A core does not answer any more.
const STOPPING: &str = "ERR this node is stopping";

/// `SCAN cursor [MATCH pattern] [COUNT count] [TYPE type]`.
///
/// One call looks at about `count` keys of a core. Where that is all that the core has left and too little was found, it
/// goes on with the next core, each at most once.
pub(crate) async fn scan(core: &CoreRc, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let from = parse_cursor(args[1])?;
    let options = ScanOptions::parse(&args[2..])?;
    let (next, keys) = match options.only {
        Some(Only::Others) => (None, Vec::new()),
        _ => step(core, from, &options).await?,
    };
    out.array(2);
    out.bulk(cursor(next).to_string().as_bytes());
    out.array(keys.len());
    for key in &keys {
        out.bulk(key);
    }
    Ok(())
}

async fn step(
    core: &CoreRc,
    from: KeyHash,
    options: &ScanOptions<'_>,
) -> Result<(Option<KeyHash>, Vec<Vec<u8>>), Refused> {
    let pattern: Option<Vec<u8>> = options.pattern.map(<[u8]>::to_vec);
    let only = options.only;
    let (mut from, mut keys) = (from, Vec::new());
    loop {
        let owner = core.topology.owner_of(from).index();
        let (pattern, left) = (pattern.clone(), options.count - keys.len());
        let look = move |core: &CoreRc| {
            let state = &mut *core.state.borrow_mut();
            let mut found = Vec::new();
            let next = scan_part(&mut state.store, from, left, pattern.as_deref(), only, state.now, &mut found);
            (next, found)
        };
        let (next, found) = on_core(core, owner, look).await.ok_or(STOPPING)?;
        keys.extend(found);
        if next.is_some() {
            return Ok((next, keys));
        }
        match first_position(&core.topology, owner + 1) {
            Some(first) if keys.len() < options.count => from = first,
            end => return Ok((end, keys)),
        }
    }
}

/// Where the keys of a core begin; `None` behind the last core.
fn first_position(topology: &Topology, core: usize) -> Option<KeyHash> {
    let shards = u32::from(topology.keyspace().shards.get());
    let range = (core < topology.cores()).then(|| shards_of(core, topology.cores(), shards))?;
    Some(topology.keyspace().first_hash(ShardId(range.start as u16)))
}

/// `RANDOMKEY`: a core by its share of the keys, then a key of that core. Keys on cores with expired keys are not quite
/// as likely as others.
pub(crate) async fn random(core: &CoreRc, out: &mut dyn Reply) -> Outcome {
    let mut weights = each_core(core, |core| core.state.borrow().store.stats().keys).await;
    // A core whose keys have all expired finds none: then another one is asked, each once.
    while let Some(chosen) = choose(&weights, platform::random_seed()) {
        let random = platform::random_seed();
        let look = move |core: &CoreRc| {
            let state = &mut *core.state.borrow_mut();
            let mut key = None;
            state.store.random(random, state.now, &mut |entry| key = Some(entry.key.to_vec()));
            key
        };
        if let Some(key) = on_core(core, chosen, look).await.flatten() {
            out.bulk(&key);
            return Ok(());
        }
        weights[chosen] = 0;
    }
    out.null();
    Ok(())
}

/// The place that `random` falls on when each has a share of its weight; `None` when there is no weight at all.
fn choose(weights: &[u64], random: u64) -> Option<usize> {
    let total: u64 = weights.iter().sum();
    let mut point = random.checked_rem(total)?;
    weights.iter().position(|&weight| {
        let here = point < weight;
        point = point.saturating_sub(weight);
        here
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use gridkv_engine::hash::Keyspace;

    #[test]
    fn a_choice_follows_the_weights() {
        let mut counts = [0; 4];
        for random in 0..60 {
            counts[choose(&[1, 0, 3, 2], random).unwrap()] += 1;
        }
        assert_eq!(counts, [10, 0, 30, 20]);
        assert_eq!(choose(&[0, 0], 7), None);
        assert_eq!(choose(&[], 7), None);
    }

    #[test]
    fn the_cores_share_all_positions_in_order() {
        for cores in [1, 2, 3, 20] {
            let links = (0..cores).map(|_| crate::topology::tests::link()).collect();
            let topology = Topology::new(Keyspace::default(), links, false);
            assert_eq!(first_position(&topology, 0), Some(KeyHash::MIN));
            assert_eq!(first_position(&topology, cores), None);
            for core in 0..cores {
                let first = first_position(&topology, core).unwrap();
                assert_eq!(topology.owner_of(first).index(), core);
                if core > 0 {
                    assert_eq!(topology.owner_of(KeyHash(first.0 - 1)).index(), core - 1);
                }
            }
        }
    }
}
