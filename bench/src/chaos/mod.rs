//! `gridkv-bench chaos`: clusters of real processes under load while something happens to them.
//!
//! | command | what happens |
//! |---|---|
//! | `kill` | nodes die one at a time and come back empty |
//! | `partition` | a minority is cut off for a while |
//! | `pause` | nodes are stopped where they are and go on later |
//! | `grow` | nodes join, one is drained |
//!
//! Clients ([`load`]) note what they were told; [`ledger`] knows what a read may find after that, [`counter`] what a counter may
//! say. [`entries`] are written before and read after all. Each command ends with a [`Verdict`]: what was promised, and whether it was kept; the exit code is 1 where it was not.

mod counter;
mod entries;
mod fills;
mod grow;
mod kill;
mod ledger;
mod load;
mod network;
mod partition;
mod pause;
mod pauses;

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use self::load::{Load, LoadArgs, Seen};
use crate::failure::Failure;
use crate::nodes::Nodes;

/// How long all copies may take to be whole again before the run is given up.
const WHOLE: Duration = Duration::from_secs(180);
/// How far the share of operations that nodes do may be from the share of shards that they have a quorum of.
const SLACK: f64 = 0.05;

/// Real processes under load while something happens to them
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    Kill(kill::Args),
    Partition(partition::Args),
    Pause(pause::Args),
    Grow(grow::Args),
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    match args.what {
        What::Kill(args) => kill::run(args),
        What::Partition(args) => partition::run(args),
        What::Pause(args) => pause::run(args),
        What::Grow(args) => grow::run(args),
    }
}

/// What was promised, and whether it was kept.
#[derive(Clone, Debug, Default)]
struct Verdict {
    bars: Vec<(&'static str, bool, String)>,
    told: Vec<String>,
}

impl Verdict {
    fn check(&mut self, name: &'static str, good: bool, figure: String) {
        self.bars.push((name, good, figure));
    }

    /// No read contradicted what was acknowledged: `all` while the load ran, `last` when every key was read at the end,
    /// from a whole cluster, which had to answer at once.
    fn clean(&mut self, all: &Seen, last: &Seen) {
        let figure = |of: fn(&Seen) -> u64| format!("{} while it ran, {} at the end", of(all), of(last));
        self.check("lost writes", all.lost + last.lost == 0, figure(|seen| seen.lost));
        let resurrected = all.resurrected + last.resurrected;
        self.check("deletions undone", resurrected == 0, figure(|seen| seen.resurrected));
        self.check("refused writes found", all.unmade + last.unmade == 0, figure(|seen| seen.unmade));
        let figure = format!("{}; {} acknowledged", figure(|seen| seen.miscounted), all.total().increments);
        self.check("increments miscounted", all.miscounted + last.miscounted == 0, figure);
        self.check("acknowledged", all.total().done() > 0, format!("{}", all.total().done()));
        let unreached = last.total().unreached;
        let figure = format!("errors: {}; {unreached} connections failed", last.errors_in_words());
        self.check("whole means served", last.errors.is_empty() && unreached == 0, figure);
        let (done, cold) = last.cold;
        let figure = format!("{done} of {cold} had all their writes and were left alone");
        self.check("cold keys", done > 0 || cold == 0, figure);
        self.told.extend(all.told.iter().chain(&last.told).cloned());
    }

    /// Nodes that were up took all connections.
    fn reached(&mut self, unreached: u64) {
        self.check("nodes reached", unreached == 0, format!("{unreached} connections to nodes that were up failed"));
    }

    fn is_good(&self) -> bool {
        self.bars.iter().all(|(_, good, _)| *good)
    }

    fn json(&self) -> Value {
        self.bars.iter().map(|(name, good, figure)| json!({"bar": name, "kept": good, "figure": figure})).collect()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, good, figure) in &self.bars {
            writeln!(f, "{} {name:<22} {figure}", if *good { "kept  " } else { "BROKEN" })?;
        }
        self.told.iter().try_for_each(|told| writeln!(f, "  {told}"))
    }
}

/// The share of shards that these nodes have a quorum of.
fn quorums(nodes: &Nodes, side: &[usize]) -> Result<f64, Failure> {
    nodes.wait(WHOLE, side[0], "does not tell its shards", || {
        let numbers: Option<Vec<u64>> = side.iter().map(|&at| Some(nodes.life(side[0], at)?.0)).collect();
        let numbers = numbers?;
        let shards = nodes.ask(side[0], "SHARDS")?;
        let shards = shards.as_array()?;
        let holds = |shard: &&serde_json::Value| {
            let replicas: Vec<u64> =
                shard["replicas"].as_array().into_iter().flatten().filter_map(|r| r.as_u64()).collect();
            replicas.iter().filter(|no| numbers.contains(no)).count() * 2 > replicas.len()
        };
        Some(shards.iter().filter(holds).count() as f64 / shards.len().max(1) as f64)
    })
}

/// Whether "whole" means that the copies of entries are there: those that there were each time, and that there should be.
fn filled(verdict: &mut Verdict, copies: impl Iterator<Item = (u64, u64)>) {
    let (lacked, of) =
        copies.fold((0, 0), |(lacked, of), (held, wanted)| (lacked + wanted.saturating_sub(held), of + wanted));
    let figure = format!("{lacked} of {of} copies of entries were missing, all times together");
    verdict.check("whole means filled", lacked == 0, figure);
}

/// Gives the nodes that many copies of each shard, with majorities for quorums.
fn copies(nodes: &mut Nodes, replicas: usize) {
    nodes.set("--replicas", replicas);
    nodes.set("--write-quorum", replicas / 2 + 1);
    nodes.set("--read-quorum", replicas / 2 + 1);
}

/// Clients at work while something happens to the nodes, one time after the other.
struct Course {
    load: Load,
    /// What they have seen until now.
    all: Seen,
}

impl Course {
    /// Starts them at all nodes and gives them a second without trouble, to have something to compare with.
    fn begin(args: &LoadArgs, nodes: &Nodes, patience: Duration) -> Course {
        let load = Load::start(args, nodes.clients(), nodes.count(), patience);
        std::thread::sleep(Duration::from_secs(1));
        let all = load.take();
        Course { load, all }
    }

    /// Adds what was seen at one time, and tells what contradicted something; whether nothing did, and it may go on.
    fn goes_on(&mut self, seen: &Seen) -> bool {
        self.all.add(seen);
        seen.told.iter().for_each(|told| eprintln!("  {told}"));
        seen.is_clean()
    }

    /// Stops them, and has every key read when all is whole: what was seen while they worked, and then.
    fn end(mut self, nodes: &mut Nodes) -> Result<(Seen, Seen), Failure> {
        let (rested, rest) = self.load.stop();
        self.all.add(&rest);
        nodes.wait_until_whole(WHOLE)?;
        Ok((self.all, rested.check(&nodes.live())))
    }
}

/// How a command ends: whether all that was promised was kept. If it was not, the logs stay.
fn end(result: Result<bool, Failure>, nodes: &mut Nodes) -> Result<(), Failure> {
    if !matches!(result, Ok(true)) {
        nodes.keep_logs();
    }
    if result? { Ok(()) } else { Err(Failure::Broken) }
}

/// Seconds, one figure for each time that something happened; in order.
#[derive(Clone, Debug)]
struct Figures {
    /// What they are called in JSON, and in words.
    key: &'static str,
    name: &'static str,
    sorted: Vec<f64>,
}

impl Figures {
    fn of<T>(key: &'static str, name: &'static str, times: &[T], figure: impl FnMut(&T) -> f64) -> Figures {
        let mut sorted: Vec<f64> = times.iter().map(figure).collect();
        sorted.sort_by(f64::total_cmp);
        Figures { key, name, sorted }
    }

    /// The figure below which the share `quantile` of them lies; 0 for none.
    fn at(&self, quantile: f64) -> f64 {
        let at = (self.sorted.len() as f64 * quantile).ceil() as usize;
        self.sorted.get(at.saturating_sub(1)).copied().unwrap_or(0.0)
    }

    fn most(&self) -> f64 {
        self.at(1.0)
    }

    fn json(&self) -> Value {
        json!({"p50": self.at(0.5), "p99": self.at(0.99), "max": self.most()})
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (p50, p99, most) = (self.at(0.5), self.at(0.99), self.most());
        write!(f, "{:<28} p50 {p50:.2} s, p99 {p99:.2} s, max {most:.2} s", self.name)
    }
}

/// Tells how a run went, in words or as JSON, to which `more` adds what only this command knows; whether all was kept.
fn tell(json: bool, figures: &[Figures], all: &Seen, verdict: &Verdict, more: Value) -> bool {
    if json {
        let mut report = more;
        figures.iter().for_each(|figures| report[figures.key] = figures.json());
        report["total"] = json!(all.total());
        report["errors"] = json!(all.errors);
        report["examples"] = json!(all.examples);
        report["bars"] = verdict.json();
        println!("{report:#}");
    } else {
        figures.iter().for_each(|figures| println!("{figures}"));
        println!("all: {}", counts_in_words(all));
        all.examples.values().for_each(|example| println!("  {example}"));
        print!("{verdict}");
    }
    verdict.is_good()
}

fn counts_in_words(seen: &Seen) -> String {
    let total = seen.total();
    format!(
        "{} writes, {} deletions, {} reads, {} increments; errors: {}",
        total.writes,
        total.deletes,
        total.reads,
        total.increments,
        seen.errors_in_words()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_few_figures() {
        let of = |times: &[u32]| Figures::of("x_s", "x", times, |&time| f64::from(time));
        let figures = of(&(1..=40).rev().collect::<Vec<_>>());
        assert_eq!((figures.at(0.5), figures.at(0.99), figures.most()), (20.0, 40.0, 40.0));
        assert_eq!(figures.json(), json!({"p50": 20.0, "p99": 40.0, "max": 40.0}));
        assert_eq!(of(&[]).at(0.5), 0.0);
        assert_eq!(of(&[3]).at(0.0), 3.0);
    }

    #[test]
    fn each_thing_that_clients_saw_has_its_bar() {
        let broken = |all: fn(&mut Seen), last: fn(&mut Seen)| {
            let counts = vec![load::Counts { reads: 1, ..load::Counts::default() }];
            let mut seen = [Seen { counts: counts.clone(), ..Seen::default() }, Seen { counts, ..Seen::default() }];
            all(&mut seen[0]);
            last(&mut seen[1]);
            let mut verdict = Verdict::default();
            verdict.clean(&seen[0], &seen[1]);
            verdict.bars.iter().filter(|(_, good, _)| !good).map(|(name, _, _)| *name).collect::<Vec<_>>()
        };
        assert!(broken(|_| (), |last| last.cold = (1, 4)).is_empty());
        assert!(
            broken(|all| _ = all.errors.insert("TIMEOUT".into(), 1), |_| ()).is_empty(),
            "the load may meet errors"
        );
        assert_eq!(broken(|all| all.lost = 1, |last| last.lost = 1), ["lost writes"]);
        assert_eq!(broken(|_| (), |last| last.resurrected = 1), ["deletions undone"]);
        assert_eq!(broken(|all| all.unmade = 1, |_| ()), ["refused writes found"]);
        assert_eq!(broken(|all| all.miscounted = 1, |_| ()), ["increments miscounted"]);
        assert_eq!(broken(|_| (), |last| _ = last.errors.insert("TIMEOUT".into(), 1)), ["whole means served"]);
        assert_eq!(broken(|_| (), |last| last.counts[0].unreached = 1), ["whole means served"]);
        assert_eq!(broken(|_| (), |last| last.cold = (0, 4)), ["cold keys"]);
        assert_eq!(broken(|all| all.counts.clear(), |_| ()), ["acknowledged"]);
    }

    #[test]
    fn a_copy_that_is_missing_when_all_is_whole_is_told() {
        let judged = |copies: [(u64, u64); 2]| {
            let mut verdict = Verdict::default();
            filled(&mut verdict, copies.into_iter());
            (verdict.is_good(), verdict.bars[0].2.clone())
        };
        // What is left of a copy that has moved does not make up for another that is missing.
        let (good, figure) = judged([(18, 15), (14, 15)]);
        assert_eq!((good, &*figure), (false, "1 of 30 copies of entries were missing, all times together"));
        assert!(judged([(18, 15), (15, 15)]).0);
    }

    #[test]
    fn one_broken_bar_is_enough() {
        let mut verdict = Verdict::default();
        verdict.check("a", true, "1".into());
        assert!(verdict.is_good());
        verdict.check("b", false, "2".into());
        assert!(!verdict.is_good());
    }
}
