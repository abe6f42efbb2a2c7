//! `gridkv-bench chaos partition`: two of five nodes are cut off for a while, under load.
//!
//! ```text
//!   whole ── split 2 | 3 ── both sides notice ──── steady ───── heal ──▶ one cluster ──▶ whole ── next
//!            └────────── SETTLE ──────────┘                     └─ rejoined ─┘
//! ```
//!
//! A side can serve the shards of which it holds a quorum: most of them the three, some of them the two, none of them both. So in
//! the steady part each side must serve that share of the operations and refuse the others. Clients reach both sides.

use std::time::{Duration, Instant};

use serde_json::json;

use super::load::{Counts, Load, LoadArgs, REPLY_PATIENCE, Seen};
use super::network::Network;
use super::{Course, Figures, SLACK, Verdict, WHOLE, counts_in_words, quorums};
use crate::failure::Failure;
use crate::interrupt;
use crate::nodes::{NodeArgs, Nodes};
use crate::options::count;
use crate::random::Random;
use crate::units;

/// How long both sides may take to notice.
const SETTLE: Duration = Duration::from_secs(6);
/// The bars.
const REJOINED: f64 = 10.0;
const LONGEST: f64 = 2.0;

/// A minority of the nodes is cut off for a while and comes back, under load (needs root)
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Nodes
    #[arg(long, default_value = "5", value_parser = count, value_name = "COUNT")]
    nodes: usize,
    /// Splits
    #[arg(long, default_value = "10", value_parser = count, value_name = "COUNT")]
    times: usize,
    /// Length of each split
    #[arg(long = "for", default_value = "30s", value_parser = units::duration, value_name = "TIME")]
    length: Duration,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    each: NodeArgs,
    /// Tell the result as JSON
    #[arg(long)]
    json: bool,
}

/// What one side did in the steady part.
struct Side {
    nodes: Vec<usize>,
    /// Of the shards, those that it holds a quorum of.
    shards: f64,
    counts: Counts,
}

impl Side {
    /// The share of operations that were done.
    fn share(&self) -> f64 {
        self.counts.share()
    }

    fn is_as_it_should_be(&self) -> bool {
        (self.share() - self.shards).abs() <= SLACK
    }
}

struct Split {
    minority: Side,
    majority: Side,
    rejoined: f64,
    whole: f64,
    all: Seen,
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    if !(3..=9).contains(&args.nodes) {
        return Err(Failure::Usage("--nodes: from 3 to 9".into()));
    }
    if args.length < SETTLE + Duration::from_secs(2) {
        return Err(Failure::Usage("--for: at least 8 s, since both sides need some to notice".into()));
    }
    // The nodes are dropped first.
    let network = Network::new(args.nodes)?;
    let mut nodes = Nodes::new(&args.each, network.places()?)?;
    let result = splits(&args, &network, &mut nodes);
    super::end(result, &mut nodes)
}

fn splits(args: &Args, network: &Network, nodes: &mut Nodes) -> Result<bool, Failure> {
    nodes.found(args.nodes, WHOLE)?;
    eprintln!("{} nodes, every shard has its copies", args.nodes);
    let mut course = Course::begin(&args.load, nodes, REPLY_PATIENCE);
    let mut random = Random::new(args.load.seed, u64::MAX);
    let mut splits: Vec<Split> = Vec::new();
    for at in 0..args.times {
        if interrupt::requested() {
            break;
        }
        let mut order: Vec<usize> = (0..args.nodes).collect();
        random.shuffle(&mut order);
        let majority = order.split_off((args.nodes - 1) / 2);
        let split = split(args, network, nodes, &course.load, order, majority)?;
        let percent = |share: f64| format!("{:.0} %", share * 100.0);
        let of = |side: &Side| {
            format!(
                "{:?} did {} of operations with {} of shards",
                side.nodes,
                percent(side.share()),
                percent(side.shards)
            )
        };
        eprintln!(
            "split {:>2}: {}, {}; rejoined after {:.2} s, whole after {:.2} s, longest operation {:.2} s; {}",
            at + 1,
            of(&split.minority),
            of(&split.majority),
            split.rejoined,
            split.whole,
            split.all.longest(),
            counts_in_words(&split.all)
        );
        let goes_on = course.goes_on(&split.all);
        splits.push(split);
        if !goes_on {
            break;
        }
    }
    let (all, last) = course.end(nodes)?;
    Ok(tell(args, &splits, &all, &last))
}

fn split(
    args: &Args,
    network: &Network,
    nodes: &mut Nodes,
    load: &Load,
    minority: Vec<usize>,
    majority: Vec<usize>,
) -> Result<Split, Failure> {
    let share = quorums(nodes, &minority)?;
    network.split(&minority)?;
    std::thread::sleep(SETTLE);
    let mut all = load.take();
    let steady = Instant::now();
    while steady.elapsed() + SETTLE < args.length && !interrupt::requested() {
        std::thread::sleep(Duration::from_millis(100));
    }
    let seen = load.take();
    network.heal(&minority)?;
    let healed = Instant::now();
    nodes.wait_until_one_cluster(WHOLE, minority[0], "does not see one cluster again")?;
    let rejoined = healed.elapsed().as_secs_f64();
    nodes.wait_until_whole(WHOLE)?;
    let whole = healed.elapsed().as_secs_f64();
    let side = |nodes: Vec<usize>, shards: f64| {
        let mut counts = Counts::default();
        nodes.iter().for_each(|&node| counts.add(&seen.counts[node]));
        Side { nodes, shards, counts }
    };
    let (minority, majority) = (side(minority, share), side(majority, 1.0 - share));
    all.add(&seen);
    all.add(&load.take());
    Ok(Split { minority, majority, rejoined, whole, all })
}

fn tell(args: &Args, splits: &[Split], all: &Seen, last: &Seen) -> bool {
    let rejoined = Figures::of("rejoined_s", "one cluster after healing", splits, |split| split.rejoined);
    let whole = Figures::of("whole_s", "whole after healing", splits, |split| split.whole);
    let most = rejoined.most();
    let mut verdict = Verdict::default();
    verdict.check("splits made", splits.len() == args.times, format!("{} of {}", splits.len(), args.times));
    verdict.clean(all, last);
    verdict.check("one cluster again", most <= REJOINED, format!("{most:.2} s of {REJOINED} s"));
    let majority = splits.iter().filter(|split| split.majority.is_as_it_should_be()).count();
    let what = "times it did what its shards allow";
    verdict.check("majority goes on", majority == splits.len(), format!("{majority} of {} {what}", splits.len()));
    let minority = splits.iter().filter(|split| split.minority.is_as_it_should_be()).count();
    verdict.check("minority refuses", minority == splits.len(), format!("{minority} of {} {what}", splits.len()));
    let silent: u64 = all.counts.iter().map(|counts| counts.cut).sum();
    verdict.check("clear errors", silent == 0, format!("{silent} without an answer; {}", all.errors_in_words()));
    verdict.reached(all.total().unreached);
    let longest = all.longest();
    verdict.check("longest operation", longest <= LONGEST, format!("{longest:.2} s of {LONGEST} s"));
    let side =
        |side: &Side| json!({"nodes": side.nodes, "shards": side.shards, "done": side.share(), "counts": side.counts});
    let each = splits.iter().map(|split| {
        json!({"minority": side(&split.minority), "majority": side(&split.majority), "rejoined_s": split.rejoined,
               "whole_s": split.whole, "longest_s": split.all.longest(), "errors": split.all.errors})
    });
    let more = json!({"nodes": args.nodes, "splits": each.collect::<Vec<_>>()});
    super::tell(args.json, &[rejoined, whole], all, &verdict, more)
}
