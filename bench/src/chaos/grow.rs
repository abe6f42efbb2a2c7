//! `gridkv-bench chaos grow`: nodes join and one is drained, under load and with data.
//!
//! ```text
//!   3 nodes ── data ── join ──▶ 4 ── join ──▶ 5 ── drain ──▶ 4 hold everything
//! ```
//!
//! What is moved is what replicas have sent to fill others, as the nodes count it (`sent_bytes`). Ideal is one transfer of
//! each copy that is where it was not before, with its part of the entries ([`Entries::bytes`]).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::entries::Entries;
use super::load::{Load, LoadArgs, REPLY_PATIENCE, Seen};
use super::{Figures, Verdict, WHOLE, counts_in_words};
use crate::failure::Failure;
use crate::latency::Latencies;
use crate::link::Answer;
use crate::nodes::{NodeArgs, Nodes, loopback};
use crate::units;

/// How long the load is watched while nothing moves.
const REST: Duration = Duration::from_secs(4);
/// The bars.
const MOVED: f64 = 1.2;
const BALANCE: f64 = 1.05;
const SLOWER: f64 = 2.0;

/// Two nodes join three, and one is drained, under load
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
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

/// One change of the cluster.
struct Change {
    name: &'static str,
    seconds: f64,
    copies: usize,
    moved: u64,
    ideal: u64,
    /// While it went on.
    seen: Seen,
    /// After it, with the same nodes.
    rest: Seen,
}

impl Change {
    fn ratio(&self) -> f64 {
        self.moved as f64 / self.ideal.max(1) as f64
    }
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let mut nodes = Nodes::new(&args.each, loopback(5, 1)?)?;
    let result = changes(&args, &mut nodes);
    super::end(result, &mut nodes)
}

fn changes(args: &Args, nodes: &mut Nodes) -> Result<bool, Failure> {
    nodes.found(3, WHOLE)?;
    args.entries.write(nodes)?;
    let load = Load::start(&args.load, nodes.clients(), 3, REPLY_PATIENCE);
    std::thread::sleep(REST);
    let mut all = load.take();
    eprintln!("before: {}", counts_in_words(&all));
    let mut done = Vec::new();
    for (name, node) in [("join of a 4th", 3), ("join of a 5th", 4)] {
        done.push(change(args, nodes, &load, (name, &mut all), |nodes| {
            nodes.start(node, &[0])?;
            load.use_nodes(node + 1);
            // Before the first move is planned all is whole as well.
            nodes.wait(WHOLE, 0, "does not see the shards spread", || {
                let held = held(nodes)?;
                let (least, most) = (held.iter().min()?, held.iter().max()?);
                (held.len() == node + 1 && least * 10 >= most * 9).then_some(())
            })?;
            nodes.wait_until_whole(WHOLE).map(drop)
        })?);
    }
    let held = nodes.wait(WHOLE, 0, "does not tell its members", || held(nodes))?;
    let most = held.iter().max().copied().unwrap_or(0) as f64;
    let balance = most * held.len() as f64 / held.iter().sum::<u64>().max(1) as f64;
    done.push(change(args, nodes, &load, ("drain of the 2nd", &mut all), |nodes| drain(nodes, 1))?);
    let (rested, rest) = load.stop();
    // All changes together, and all calm times: one of them alone is too short for a p99.
    let (mut busy, mut calm) = (Latencies::new(), all.took.clone());
    for change in &done {
        busy.add(&change.seen.took);
        calm.add(&change.rest.took);
    }
    let last = rested.check(&nodes.live());
    all.add(&rest);
    done.iter().flat_map(|change| [&change.seen, &change.rest]).for_each(|seen| all.add(seen));
    let mut verdict = Verdict::default();
    verdict.clean(&all, &last);
    args.entries.check(nodes, &mut verdict)?;
    let worst = done.iter().map(Change::ratio).fold(0.0, f64::max);
    verdict.check("bytes moved", worst <= MOVED, format!("{worst:.2}x of {MOVED}x ideal"));
    let errors: u64 = all.errors.values().sum();
    verdict.check("errors of clients", errors == 0, all.errors_in_words());
    verdict.reached(all.total().unreached);
    let p99 = |busy: &Latencies| busy.at_us(0.99) / 1e3;
    let (busy, calm) = (p99(&busy), p99(&calm));
    let slower = busy / calm.max(0.001);
    let figure = format!("{busy:.2} ms, at rest {calm:.2} ms: {slower:.2}x of {SLOWER}x");
    verdict.check("p99 while they move", slower <= SLOWER, figure);
    verdict.check("max/mean shards", balance <= BALANCE, format!("{balance:.3} of {BALANCE}; {held:?}"));
    let each = done.iter().map(|change| {
        json!({"change": change.name, "seconds": change.seconds, "copies": change.copies, "moved_bytes": change.moved,
               "ideal_bytes": change.ideal, "errors": change.seen.errors,
               "longest_s": change.seen.longest(), "took": change.seen.took.percentiles(),
               "took_at_rest": change.rest.took.percentiles()})
    });
    let longest = Figures::of("longest_s", "longest operation", &done, |change| change.seen.longest());
    let more = json!({"changes": each.collect::<Vec<_>>(), "shards_per_node": held});
    Ok(super::tell(args.json, &[longest], &all, &verdict, more))
}

/// Does something and waits for its end; what was moved meanwhile. What clients saw between the last change and this one
/// is added to `all`.
fn change(
    args: &Args,
    nodes: &mut Nodes,
    load: &Load,
    (name, all): (&'static str, &mut Seen),
    act: impl FnOnce(&mut Nodes) -> Result<(), Failure>,
) -> Result<Change, Failure> {
    all.add(&load.take());
    let (before, sent) = (copies(nodes)?, sent(nodes)?);
    let start = Instant::now();
    act(nodes)?;
    let seconds = start.elapsed().as_secs_f64();
    let after = copies(nodes)?;
    let new = after.difference(&before).count();
    let ideal = new as u64 * args.entries.bytes() / u64::from(args.each.shards());
    let moved = self::sent(nodes)? - sent;
    let seen = load.take();
    std::thread::sleep(REST);
    let change = Change { name, seconds, copies: new, moved, ideal, seen, rest: load.take() };
    let ms = |seen: &Seen| seen.took.at_us(0.99) / 1e3;
    eprintln!(
        "{name}: {seconds:.2} s, {new} copies, {} moved, {:.2}x ideal, p99 {:.2} ms, at rest {:.2} ms, longest {:.2} s; {}",
        units::bytes(moved as f64),
        change.ratio(),
        ms(&change.seen),
        ms(&change.rest),
        change.seen.longest(),
        counts_in_words(&change.seen)
    );
    Ok(change)
}

fn drain(nodes: &mut Nodes, node: usize) -> Result<(), Failure> {
    let (life, _) = nodes.wait(WHOLE, 0, "does not know who is to be drained", || nodes.life(0, node))?;
    let no = life.to_string();
    nodes.wait(WHOLE, 0, "does not drain", || {
        let answer = nodes.call(0, &[b"CLUSTER", b"GRIDKV", b"DRAIN", no.as_bytes()])?;
        let told = matches!(&answer, Answer::Error(text) if text.contains("already"));
        (told || answer == Answer::Done).then_some(())
    })?;
    nodes.wait(WHOLE, 0, "does not see the drained node empty", || {
        let members = nodes.ask(0, "MEMBERS")?;
        let member = members.as_array()?.iter().find(|member| member["no"] == life)?.clone();
        let health = nodes.health(0)?;
        (member["shards"] == 0 && health.moving + health.filling == 0).then_some(())
    })
}

/// Who holds which shard, as the first node sees it: (life, shard).
fn copies(nodes: &Nodes) -> Result<BTreeSet<(u64, u64)>, Failure> {
    nodes.wait(WHOLE, 0, "does not tell its shards", || {
        let shards = nodes.ask(0, "SHARDS")?;
        let mut copies = BTreeSet::new();
        for shard in shards.as_array()? {
            let replicas = shard["replicas"].as_array()?.iter().filter_map(Value::as_u64);
            let number = shard["shard"].as_u64()?;
            copies.extend(replicas.map(|no| (no, number)));
        }
        Some(copies)
    })
}

/// Copies of each node.
fn held(nodes: &Nodes) -> Option<Vec<u64>> {
    let members = nodes.ask(0, "MEMBERS")?;
    let up = members.as_array()?.iter().filter(|member| member["standing"] == "up");
    up.map(|member| member["shards"].as_u64()).collect()
}

/// What all nodes have sent to fill others.
fn sent(nodes: &Nodes) -> Result<u64, Failure> {
    let of = |at| {
        nodes.wait(WHOLE, at, "does not tell what it has sent", || {
            nodes.ask(at, "STATUS")?["here"]["sent_bytes"].as_u64()
        })
    };
    nodes.live().into_iter().map(of).sum()
}
