//! `gridkv-bench chaos kill`: nodes die one at a time and come back empty, under load.
//!
//! ```text
//!   whole ── kill -9 ──▶ every survivor sees it gone ──▶ start again, same directory ──▶ whole ── next
//!            └──── detection ────┘                       └──── time to full copies ────┘
//!                                 └──────── survivors serve as if nothing were ─────────┘
//! ```

use std::time::{Duration, Instant};

use serde_json::json;

use super::entries::Entries;
use super::load::{Load, LoadArgs, Seen};
use super::{Figures, Verdict, counts_in_words};
use crate::failure::Failure;
use crate::interrupt;
use crate::nodes::{NodeArgs, Nodes, loopback};
use crate::options::count;
use crate::random::Random;

/// How long a death may take to be seen before the run is given up, and copies to be whole again.
const SEEN: Duration = Duration::from_secs(60);
const WHOLE: Duration = Duration::from_secs(180);
/// The bars.
const DETECTION_P50: f64 = 3.2;
const DETECTION_P99: f64 = 5.0;
/// An operation's deadline, and a second.
const LONGEST: f64 = 2.0;
/// The share of operations that survivors do once they have seen a death, until all copies are there again.
const SERVED: f64 = 0.95;
/// What is done in that time, by the rate that was asked for.
const OF_RATE: f64 = 0.5;

/// Nodes are killed one at a time and started again empty, under load
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Nodes
    #[arg(long, default_value = "3", value_parser = count, value_name = "COUNT")]
    nodes: usize,
    /// Kills
    #[arg(long, default_value = "40", value_parser = count, value_name = "COUNT")]
    kills: usize,
    #[command(flatten)]
    entries: Entries,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    each: NodeArgs,
    /// Tell the result as JSON
    #[arg(long)]
    json: bool,
}

struct Kill {
    node: usize,
    first: f64,
    all: f64,
    whole: f64,
    /// From the kill until all is whole.
    seen: Seen,
    /// The part of it after the death was seen: how long, and what was done.
    after: f64,
    served: Seen,
    /// Copies of the entries when all was whole, and how many there should be.
    copies: (u64, u64),
}

impl Kill {
    /// The share of operations that survivors have done.
    fn share(&self) -> f64 {
        self.served.without(self.node).share()
    }

    /// What was done at all nodes, by what was asked for.
    fn of_rate(&self, rate: u64) -> f64 {
        self.served.total().done() as f64 / (rate as f64 * self.after).max(1.0)
    }
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    if !(3..=9).contains(&args.nodes) {
        return Err(Failure::Usage("--nodes: from 3, so that a quorum is left, to 9".into()));
    }
    let mut nodes = Nodes::new(&args.each, loopback(args.nodes, 1)?)?;
    let result = kills(&args, &mut nodes);
    super::end(result, &mut nodes)
}

fn kills(args: &Args, nodes: &mut Nodes) -> Result<bool, Failure> {
    nodes.found(args.nodes, WHOLE)?;
    eprintln!("{} nodes, every shard has its copies", args.nodes);
    args.entries.write(nodes)?;
    let load = Load::start(&args.load, nodes.clients(), args.nodes);
    let mut random = Random::new(args.load.seed, u64::MAX);
    // A second without trouble, to have something to compare with.
    std::thread::sleep(Duration::from_secs(1));
    let mut all = load.take();
    eprintln!("before: {}", counts_in_words(&all));
    let mut kills: Vec<Kill> = Vec::new();
    for at in 0..args.kills {
        if interrupt::requested() {
            break;
        }
        let node = random.below(args.nodes as u64) as usize;
        let (first, last) = detection(nodes, node)?;
        let mut seen = load.take();
        let until = seen.without(node).share();
        let back = Instant::now();
        let others = nodes.live();
        nodes.start(node, &others)?;
        nodes.wait_until_whole(WHOLE)?;
        let whole = back.elapsed().as_secs_f64();
        let served = load.take();
        let after = back.elapsed().as_secs_f64();
        seen.add(&served);
        let what = "does not tell which entries it holds";
        let copies = nodes.wait(WHOLE, node, what, || args.entries.copies(nodes))?;
        let kill = Kill { node, first, all: last, whole, seen, after, served, copies };
        let seen = &kill.seen;
        eprintln!(
            "kill {:>2}: node {node}, seen after {first:.2} s by one and {last:.2} s by all, whole {whole:.2} s after its \
             restart, survivors did {:.1} % of operations until it was seen and {:.1} % after that, longest operation \
             {:.2} s; {}",
            at + 1,
            until * 100.0,
            kill.share() * 100.0,
            seen.longest(),
            counts_in_words(seen)
        );
        all.add(seen);
        let broken = !seen.is_clean();
        seen.told.iter().for_each(|told| eprintln!("  {told}"));
        kills.push(kill);
        if broken {
            break;
        }
    }
    let (rested, rest) = load.stop();
    all.add(&rest);
    nodes.wait_until_whole(WHOLE)?;
    let last = rested.check(&nodes.live());
    let mut verdict = Verdict::default();
    args.entries.check(nodes, &mut verdict)?;
    Ok(tell(args, &kills, &all, &last, verdict))
}

/// Kills a node; how long until the first survivor and until all of them see it gone.
fn detection(nodes: &mut Nodes, node: usize) -> Result<(f64, f64), Failure> {
    let witness = (node + 1) % nodes.count();
    let what = "does not know the node that is to be killed";
    let (life, _) = nodes.wait(SEEN, witness, what, || nodes.life(witness, node))?;
    nodes.kill(node);
    let start = Instant::now();
    let mut left = nodes.live();
    let (mut first, what) = (None, format!("does not see that node {node} is gone"));
    while let Some(&asked) = left.first() {
        nodes.wait(SEEN, asked, &what, || {
            left.retain(|&at| nodes.life(at, node).is_none_or(|(no, alive)| no == life && alive));
            if left.len() < nodes.count() - 1 {
                first.get_or_insert(start.elapsed());
            }
            left.is_empty().then_some(())
        })?;
    }
    Ok((first.unwrap_or_default().as_secs_f64(), start.elapsed().as_secs_f64()))
}

fn tell(args: &Args, kills: &[Kill], all: &Seen, last: &Seen, mut verdict: Verdict) -> bool {
    let first = Figures::of("detected_first_s", "seen by the first survivor", kills, |kill| kill.first);
    let detected = Figures::of("detected_s", "seen by all survivors", kills, |kill| kill.all);
    let whole = Figures::of("whole_s", "whole after the restart", kills, |kill| kill.whole);
    let longest = Figures::of("longest_s", "longest operation", kills, |kill| kill.seen.longest());
    verdict.check("kills made", kills.len() == args.kills, format!("{} of {}", kills.len(), args.kills));
    verdict.clean(all, last);
    let (p50, p99, most) = (detected.at(0.5), detected.at(0.99), longest.most());
    verdict.check("detection p50", p50 <= DETECTION_P50, format!("{p50:.2} s of {DETECTION_P50} s"));
    verdict.check("detection p99", p99 <= DETECTION_P99, format!("{p99:.2} s of {DETECTION_P99} s"));
    verdict.check("longest operation", most <= LONGEST, format!("{most:.2} s of {LONGEST} s"));
    served(&mut verdict, args.load.rate, kills);
    filled(&mut verdict, kills);
    let each = kills.iter().map(|kill| {
        json!({"node": kill.node, "detected_first_s": kill.first, "detected_all_s": kill.all, "whole_s": kill.whole,
               "survivors_done": kill.share(), "copies": kill.copies.0, "copies_wanted": kill.copies.1, "of_rate": kill.of_rate(args.load.rate),
               "longest_s": kill.seen.longest(), "counts": kill.seen.total(), "errors": kill.seen.errors})
    });
    let more = json!({"nodes": args.nodes, "kills": each.collect::<Vec<_>>()});
    super::tell(args.json, &[first, detected, whole, longest], all, &verdict, more)
}

/// Whether survivors went on serving.
fn served(verdict: &mut Verdict, rate: u64, kills: &[Kill]) {
    let least = |figure: &dyn Fn(&Kill) -> f64| kills.iter().map(figure).fold(1.0, f64::min);
    let share = least(&Kill::share);
    let figure = format!("{:.1} % of operations in the worst case, of {:.0} %", share * 100.0, SERVED * 100.0);
    verdict.check("survivors serve", share >= SERVED, figure);
    if rate > 0 {
        let of_rate = least(&|kill| kill.of_rate(rate));
        let figure = format!("{:.1} % of the rate in the worst case, of {:.0} %", of_rate * 100.0, OF_RATE * 100.0);
        verdict.check("the load goes on", of_rate >= OF_RATE, figure);
    }
    verdict.reached(kills.iter().map(|kill| kill.seen.without(kill.node).unreached).sum());
}

/// Whether "whole" means that the copies are there.
fn filled(verdict: &mut Verdict, kills: &[Kill]) {
    let lacked: u64 = kills.iter().map(|kill| kill.copies.1.saturating_sub(kill.copies.0)).sum();
    let of: u64 = kills.iter().map(|kill| kill.copies.1).sum();
    verdict.check(
        "whole means filled",
        lacked == 0,
        format!("{lacked} of {of} copies of entries were missing, all kills together"),
    );
}

#[cfg(test)]
mod tests {
    use super::super::load::Counts;
    use super::*;

    /// A kill of the first of two nodes after which the load went on for a second.
    fn kill(survivor: Counts) -> Kill {
        let mut served = Seen { counts: vec![Counts::default(), survivor], ..Seen::default() };
        served.counts[0] = Counts { refused: 500, unreached: 9, ..Counts::default() };
        Kill { node: 0, first: 1.0, all: 2.0, whole: 0.5, seen: served.clone(), after: 1.0, served, copies: (15, 15) }
    }

    fn broken(kills: &[Kill], rate: u64) -> Vec<&'static str> {
        let mut verdict = Verdict::default();
        served(&mut verdict, rate, kills);
        verdict.bars.iter().filter(|(_, good, _)| !good).map(|(name, _, _)| *name).collect()
    }

    #[test]
    fn a_copy_that_is_missing_when_all_is_whole_is_told() {
        let with = |copies| Kill { copies, ..kill(Counts::default()) };
        let judged = |kills: &[Kill]| {
            let mut verdict = Verdict::default();
            filled(&mut verdict, kills);
            (verdict.is_good(), verdict.bars[0].2.clone())
        };
        // What is left of a copy that has moved does not make up for another that is missing.
        let (good, figure) = judged(&[with((18, 15)), with((14, 15))]);
        assert_eq!((good, &*figure), (false, "1 of 30 copies of entries were missing, all kills together"));
        assert!(judged(&[with((18, 15)), with((15, 15))]).0);
    }

    #[test]
    fn survivors_that_refuse_are_not_enough() {
        let good = || kill(Counts { reads: 96, refused: 4, ..Counts::default() });
        assert!(broken(&[good()], 190).is_empty());
        assert!(broken(&[good()], 0).is_empty());
        assert_eq!(broken(&[good()], 200), ["the load goes on"]);
        let refuses = kill(Counts { reads: 94, refused: 6, ..Counts::default() });
        assert_eq!(broken(&[good(), refuses], 100), ["survivors serve"]);
        let silent = kill(Counts::default());
        assert_eq!(broken(&[silent], 100), ["survivors serve", "the load goes on"]);
        let away = kill(Counts { reads: 100, unreached: 1, ..Counts::default() });
        assert_eq!(broken(&[away], 100), ["nodes reached"]);
    }
}
