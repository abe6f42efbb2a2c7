//! The simulator: whole clusters in one thread, under virtual time, from one seed.
//!
//! ```text
//!   seed ─▶ options (what is bad, and how bad; every fault) ─▶ world (real machines, false network) ─▶ history ─▶ rules
//! ```
//!
//! | file | |
//! |---|---|
//! | [`options`] | what a seed draws, as data |
//! | [`world`] | the queue of events, the nodes, the faults, the clients |
//! | [`node`] | one node: its machines, its stores, its clock |
//! | [`network`] | what arrives, and when |
//! | [`authority`] | who decides on the map, where it is one holder |
//! | [`plane`] | the control plane of a node and its disk, where nodes decide together |
//! | [`history`] | what clients saw, and whether that is what they were promised |
//! | [`forged`] | wrong histories, to see that the checkers see |
//! | [`trace`] | what happened, as a number and as a drawing |
//!
//! Run it with `scripts/sim`; how to read what it prints is in `docs/SIMULATOR.md`. Not here: sockets, threads, disks.

pub mod authority;
pub mod forged;
pub mod history;
pub mod network;
pub mod node;
pub mod options;
pub mod plane;
pub mod random;
pub mod trace;
pub mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use self::history::{Rule, Violation};
use self::options::Options;
use self::trace::Trace;
use self::world::{Stats, World};
use crate::planted::Planted;

/// What came of a run.
#[derive(Debug)]
pub struct Run {
    /// The first broken promise.
    pub violation: Option<Violation>,
    /// The number that equal runs share.
    pub hash: u64,
    /// What it did.
    pub stats: Stats,
    /// The last events, when they were kept.
    pub drawing: String,
    /// The shard of the key that the violation is about.
    pub shard: Option<u16>,
}

/// Runs a world to its end.
pub fn run(options: &Options, planted: Planted) -> Run {
    run_traced(options, planted, Trace::new())
}

fn run_traced(options: &Options, planted: Planted, trace: Trace) -> Run {
    let mut world = World::new(options, planted, trace);
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    let at = world.time();
    let violation = ended.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Some(Violation { rule: Rule::Invariants, what: format!("panic: {}", text.unwrap_or_default()), at, key: None })
    });
    let shard = violation.as_ref().and_then(|violation| violation.key).map(|(key, counts)| world.shard_of(key, counts));
    let drawing = world.trace.drawing();
    Run { violation, hash: world.trace.sum(), stats: std::mem::take(&mut world.stats), drawing, shard }
}

/// Runs it once more and draws the last `shown` events before the violation, those of one shard if it is about a key or if
/// one is named.
pub fn draw(options: &Options, planted: Planted, run: &Run, shard: Option<u16>, shown: usize) -> String {
    let Some(violation) = &run.violation else { return String::new() };
    run_traced(options, planted, Trace::kept(violation.at, shard.or(run.shard), shown)).drawing
}

/// The options with as few faults and as little trouble as still break the same rule, and how many runs that took.
pub fn shrink(options: &Options, planted: Planted, rule: Rule, most: usize) -> (Options, usize) {
    let mut best = options.clone();
    let mut runs = 0;
    let mut fails = |options: &Options| {
        runs += 1;
        runs <= most && run(options, planted).violation.is_some_and(|violation| violation.rule == rule)
    };
    // Large pieces first, then single faults.
    let mut piece = best.faults.len().div_ceil(2).max(1);
    loop {
        let mut at = 0;
        while at < best.faults.len() {
            let mut fewer = best.clone();
            fewer.faults.drain(at..(at + piece).min(best.faults.len()));
            if fails(&fewer) {
                best = fewer;
            } else {
                at += piece;
            }
        }
        if piece == 1 {
            break;
        }
        piece = piece.div_ceil(2);
    }
    let simpler: [fn(&mut Options); 6] = [
        |o| o.duplicates = 0,
        |o| o.loss = 0,
        |o| o.reorder = false,
        |o| o.skew_ms = 0,
        |o| o.cores = 1,
        |o| o.clients = 1,
    ];
    for simplify in simpler {
        let mut simple = best.clone();
        simplify(&mut simple);
        if simple != best && fails(&simple) {
            best = simple;
        }
    }
    (best, runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Worlds in which nothing goes wrong, and some in which much does, keep all promises.
    #[test]
    fn a_few_seeds() {
        for seed in 1..=3 {
            let run = run(&Options::calm(seed, 30), Planted::default());
            assert_eq!(run.violation, None, "calm seed {seed}");
            assert!(run.stats.ended[0] > 20 * (run.stats.ended[1] + run.stats.ended[2]), "{:?}", run.stats);
        }
        for seed in 1..=4 {
            for options in [Options::draw(seed, 15).with_authority(), Options::draw(seed, 15).with_planes()] {
                let run = run(&options, Planted::default());
                assert_eq!(run.violation, None, "seed {seed} with {:?}", options.control);
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_run() {
        for seed in [7, 8] {
            let [first, second] = [0, 1].map(|_| run(&Options::draw(seed, 10).with_planes(), Planted::default()));
            assert_eq!((first.hash, first.stats.events), (second.hash, second.stats.events), "seed {seed}");
        }
    }
}
