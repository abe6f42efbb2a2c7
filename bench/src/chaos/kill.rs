//! `gridkv-bench chaos kill`: nodes die one at a time and come back empty, under load.
//!
//! ```text
//!   whole ── kill -9 ──▶ every survivor sees it gone ──▶ start again, same directory ──▶ whole ── next
//!            └──── detection ────┘                       └──── time to full copies ────┘
//!                                 └──────── survivors serve as if nothing were ─────────┘
//! ```
//!
//! Now and then a second one dies while the first makes its copies again: the one that is being filled, or a source, where that
//! leaves enough to keep what was promised ([`Fills`]). It counts as hit when a survivor still sees the copying unfinished after
//! the kill.

use std::time::{Duration, Instant};

use serde_json::json;

use super::entries::Entries;
use super::fills::Fills;
use super::load::{LoadArgs, REPLY_PATIENCE, Seen};
use super::{Course, Figures, Verdict, WHOLE, counts_in_words, filled};
use crate::failure::Failure;
use crate::interrupt;
use crate::nodes::{NodeArgs, Nodes, loopback};
use crate::options::count;
use crate::random::Random;

/// How long a death may take to be seen before the run is given up.
const SEEN: Duration = Duration::from_secs(60);
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
    /// Copies of each shard
    #[arg(long, default_value = "3", value_parser = count, value_name = "COUNT")]
    replicas: usize,
    /// Of that many kills one is followed by another while copies are filled; 0 for none
    #[arg(long, default_value = "4", value_name = "COUNT")]
    in_fills: usize,
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

/// A second kill, while copies are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
struct Second {
    node: usize,
    role: Role,
    /// Whether the copying went on when it died.
    hit: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    Target,
    Source,
}

struct Kill {
    node: usize,
    /// Whether a second one was to be killed, and which was.
    tried: bool,
    second: Option<Second>,
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
    /// Who died.
    fn victims(&self) -> Vec<usize> {
        self.second.map(|second| second.node).into_iter().chain([self.node]).collect()
    }

    /// The share of operations that survivors have done.
    fn share(&self) -> f64 {
        self.served.without(&self.victims()).share()
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
    super::copies(&mut nodes, args.replicas);
    let result = kills(&args, &mut nodes);
    super::end(result, &mut nodes)
}

fn kills(args: &Args, nodes: &mut Nodes) -> Result<bool, Failure> {
    nodes.found(args.nodes, WHOLE)?;
    eprintln!("{} nodes, every shard has its copies", args.nodes);
    args.entries.write(nodes)?;
    let mut course = Course::begin(&args.load, nodes, REPLY_PATIENCE);
    let mut random = Random::new(args.load.seed, u64::MAX);
    eprintln!("before: {}", counts_in_words(&course.all));
    let mut kills: Vec<Kill> = Vec::new();
    for at in 0..args.kills {
        if interrupt::requested() {
            break;
        }
        let node = random.below(args.nodes as u64) as usize;
        let (first, last) = detection(nodes, node)?;
        let mut seen = course.load.take();
        let until = seen.without(&[node]).share();
        let back = Instant::now();
        let others = nodes.live();
        nodes.start(node, &others)?;
        let tried = args.in_fills > 0 && (at + 1).is_multiple_of(args.in_fills);
        let second = if tried { in_fill(nodes, node, &mut random)? } else { None };
        nodes.wait_until_whole(WHOLE)?;
        let whole = back.elapsed().as_secs_f64();
        let served = course.load.take();
        let after = back.elapsed().as_secs_f64();
        seen.add(&served);
        let what = "does not tell which entries it holds";
        let copies = nodes.wait(WHOLE, node, what, || args.entries.copies(nodes))?;
        let kill = Kill { node, tried, second, first, all: last, whole, seen, after, served, copies };
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
        if let Some(Second { node, role, hit }) = kill.second {
            let who = if role == Role::Target { "which was being filled" } else { "a source" };
            eprintln!("  then node {node}, {who}, {} copies were filled", if hit { "while" } else { "just after" });
        }
        let goes_on = course.goes_on(seen);
        kills.push(kill);
        if !goes_on {
            break;
        }
    }
    let (all, last) = course.end(nodes)?;
    let mut verdict = Verdict::default();
    args.entries.check(nodes, &mut verdict)?;
    Ok(tell(args, &kills, &all, &last, verdict))
}

/// Waits until `target`, which was started again, is being filled, and kills and starts again it or a source; nobody if
/// all is whole before.
fn in_fill(nodes: &mut Nodes, target: usize, random: &mut Random) -> Result<Option<Second>, Failure> {
    let others: Vec<usize> = nodes.live().into_iter().filter(|&at| at != target).collect();
    let (witness, count) = (others[0], nodes.count());
    let fills = |nodes: &Nodes, asked: usize| {
        Fills::of(&nodes.ask(asked, "SHARDS")?, &nodes.ask(asked, "MEMBERS")?, &nodes.ask(asked, "STATUS")?)
    };
    let what = "sees neither that copies are filled nor that all is whole";
    let found = nodes.wait(WHOLE, witness, what, || {
        let (life, _) = nodes.life(witness, target)?;
        let fills = fills(nodes, witness)?;
        if fills.fills(life) {
            return Some(Some((life, fills)));
        }
        nodes.health(witness)?.is_whole(count).then_some(None)
    })?;
    let Some((life, fills_then)) = found else { return Ok(None) };
    let mut sources = Vec::new();
    for &at in &others {
        let (no, _) = nodes.wait(WHOLE, witness, "does not know a source", || nodes.life(witness, at))?;
        if fills_then.is_source(no, life) && fills_then.may_die(no) {
            sources.push(at);
        }
    }
    let (node, role) = match sources.len() as u64 {
        count if count > 0 && random.below(2) == 0 => (sources[random.below(count) as usize], Role::Source),
        _ => (target, Role::Target),
    };
    nodes.kill(node);
    let left = nodes.live();
    let asked = *left.iter().find(|&&at| at != target).expect("of three nodes two others are left");
    let hit = nodes.wait(WHOLE, asked, "does not tell who is filled", || fills(nodes, asked))?.fills(life);
    nodes.start(node, &left)?;
    Ok(Some(Second { node, role, hit }))
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
    hits(&mut verdict, kills);
    filled(&mut verdict, kills.iter().map(|kill| kill.copies));
    let each = kills.iter().map(|kill| {
        json!({"node": kill.node, "in_fill": kill.second, "detected_first_s": kill.first, "detected_all_s": kill.all, "whole_s": kill.whole,
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
        // Who waits for an orderer that died a moment ago does nothing else.
        let calm = kills.iter().filter(|kill| kill.second.is_none_or(|second| second.role == Role::Target));
        let of_rate = calm.map(|kill| kill.of_rate(rate)).fold(1.0, f64::min);
        let figure = format!("{:.1} % of the rate in the worst case, of {:.0} %", of_rate * 100.0, OF_RATE * 100.0);
        verdict.check("the load goes on", of_rate >= OF_RATE, figure);
    }
    verdict.reached(kills.iter().map(|kill| kill.seen.without(&kill.victims()).unreached).sum());
}

/// Whether kills that were to hit the copying did. One is enough: how fast copies are made is not in our hand.
fn hits(verdict: &mut Verdict, kills: &[Kill]) {
    let tried = kills.iter().filter(|kill| kill.tried).count();
    let of = |role| {
        let is_it = |second: &Second| second.hit && second.role == role;
        kills.iter().filter_map(|kill| kill.second).filter(is_it).count()
    };
    let (targets, sources) = (of(Role::Target), of(Role::Source));
    let figure = format!("{} of {tried}: {targets} targets, {sources} sources", targets + sources);
    verdict.check("kills in fills", targets + sources > 0 || tried == 0, figure);
}

#[cfg(test)]
mod tests {
    use super::super::load::Counts;
    use super::*;

    /// A kill of the first of two nodes after which the load went on for a second.
    fn kill(survivor: Counts) -> Kill {
        let mut served = Seen { counts: vec![Counts::default(), survivor], ..Seen::default() };
        served.counts[0] = Counts { refused: 500, unreached: 9, ..Counts::default() };
        let (tried, second) = (false, None);
        Kill {
            node: 0,
            tried,
            second,
            first: 1.0,
            all: 2.0,
            whole: 0.5,
            seen: served.clone(),
            after: 1.0,
            served,
            copies: (15, 15),
        }
    }

    fn broken(kills: &[Kill], rate: u64) -> Vec<&'static str> {
        let mut verdict = Verdict::default();
        served(&mut verdict, rate, kills);
        verdict.bars.iter().filter(|(_, good, _)| !good).map(|(name, _, _)| *name).collect()
    }

    #[test]
    fn kills_that_were_to_hit_the_copying_did() {
        let with = |tried, second| Kill { tried, second, ..kill(Counts { reads: 100, ..Counts::default() }) };
        let judged = |kills: &[Kill]| {
            let mut verdict = Verdict::default();
            hits(&mut verdict, kills);
            (verdict.is_good(), verdict.bars[0].2.clone())
        };
        let second = |role, hit| Some(Second { node: 1, role, hit });
        assert_eq!(judged(&[with(false, None)]), (true, "0 of 0: 0 targets, 0 sources".into()));
        let (late, hit) = (second(Role::Target, false), second(Role::Source, true));
        assert_eq!(judged(&[with(true, None), with(true, late)]), (false, "0 of 2: 0 targets, 0 sources".into()));
        assert_eq!(judged(&[with(true, late), with(true, hit)]), (true, "1 of 2: 0 targets, 1 sources".into()));
    }

    #[test]
    fn a_second_one_that_died_is_no_survivor_either() {
        let mut both = kill(Counts { refused: 100, unreached: 3, ..Counts::default() });
        assert_eq!(broken(&[both], 0), ["survivors serve", "nodes reached"]);
        both = kill(Counts { refused: 100, unreached: 3, ..Counts::default() });
        both.second = Some(Second { node: 1, role: Role::Source, hit: true });
        both.served.counts.push(Counts { reads: 10, ..Counts::default() });
        // Nor is the rate asked for while an orderer has just died.
        assert!(broken(&[both], 200).is_empty());
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
