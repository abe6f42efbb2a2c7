//! `gridkv-bench chaos pause`: nodes are stopped where they are (SIGSTOP) and go on later (SIGCONT), under load.
//!
//! ```text
//!   whole ── stop ──▶ the others see it gone ── steady ── go on ──▶ one cluster ──▶ whole ── next
//!            └─── long enough for that, or not ───────┘   └── back ──┘
//! ```
//!
//! A machine that stood still wakes with a view of before: it may believe that it orders, that writes were not done, that nothing was
//! decided without it. Which nodes, and how long: [`mod@pauses`]. Beyond `--replace-after` its life is given up, its copies are made
//! elsewhere, and it comes back as a new life. Half of the clients go on asking it and hear from it when it
//! goes on ([`Load::set_aside`]).
//!
//! Who is stopped goes on, or is killed: all nodes are at the end, whatever it is ([`Nodes`]).

use std::time::{Duration, Instant};

use serde_json::json;

use super::entries::Entries;
use super::load::{Load, LoadArgs, Seen};
use super::pauses::{self, Kind, Pause};
use super::{Course, Figures, SLACK, Verdict, WHOLE, counts_in_words, filled, quorums};
use crate::failure::Failure;
use crate::interrupt;
use crate::nodes::{NodeArgs, Nodes, loopback};
use crate::options::count;
use crate::random::Random;
use crate::units;

/// How long clients wait for a node that stands still: in any case.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between setting a node aside and stopping it, so that who turns away from it has heard its last answer.
const TURN_AWAY: Duration = Duration::from_millis(100);
const GLANCE: Duration = Duration::from_millis(20);
/// The bars.
/// Of one that stands still alone, which on a busy machine took 2.7 to 3.9 s.
const DETECTION_P50: f64 = 4.0;
const DETECTION_P99: f64 = 5.0;
const BACK: f64 = 10.0;
const LONGEST: f64 = 2.0;
/// What is done at nodes that run, by the rate that is asked of clients that turn to them.
const OF_RATE: f64 = 0.5;
/// Seconds below which shares and rates say nothing: what is left of a pause that was seen just before its end.
const COUNTED: f64 = 0.2;
const COUNTED_RATE: f64 = 1.0;

/// Nodes are stopped for a while and go on where they were, under load
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Nodes
    #[arg(long, default_value = "5", value_parser = count, value_name = "COUNT")]
    nodes: usize,
    /// Pauses
    #[arg(long, default_value = "30", value_parser = count, value_name = "COUNT")]
    times: usize,
    /// Copies of each shard
    #[arg(long, default_value = "3", value_parser = count, value_name = "COUNT")]
    replicas: usize,
    /// How long a node may be away before its copies are made elsewhere
    #[arg(long, default_value = "10s", value_parser = units::duration, value_name = "TIME")]
    replace_after: Duration,
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

/// A pause that was made.
struct Made {
    pause: Pause,
    /// Of the shards, those of which the nodes that ran hold a quorum.
    shards: f64,
    /// Seconds until all that ran saw them gone; nothing if they did not before the end.
    noticed: Option<f64>,
    /// The part after that; of a pause that nobody is to notice, all of it.
    steady: Seen,
    /// Seconds of it.
    lasted: f64,
    /// Until there was one cluster again, and until it was whole.
    back: f64,
    whole: f64,
    /// Lives that were given up.
    given_up: usize,
    all: Seen,
    /// Copies of the entries when all was whole, and how many there should be.
    copies: (u64, u64),
}

impl Made {
    /// The share of operations that nodes did that ran.
    fn share(&self) -> f64 {
        self.steady.without(&self.pause.nodes).share()
    }

    /// What they did, by what was asked for of clients that turn to them.
    fn of_rate(&self, rate: f64) -> f64 {
        self.steady.without(&self.pause.nodes).done() as f64 / (rate * self.lasted).max(1.0)
    }
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    if !(4..=9).contains(&args.nodes) {
        return Err(Failure::Usage("--nodes: from 4, so that two may stand still, to 9".into()));
    }
    let mut nodes = Nodes::new(&args.each, loopback(args.nodes, 1)?)?;
    super::copies(&mut nodes, args.replicas);
    nodes.set("--replace-after", format!("{}ms", args.replace_after.as_millis()));
    let result = pauses(&args, &mut nodes);
    super::end(result, &mut nodes)
}

fn pauses(args: &Args, nodes: &mut Nodes) -> Result<bool, Failure> {
    nodes.found(args.nodes, WHOLE)?;
    eprintln!("{} nodes, every shard has its copies", args.nodes);
    args.entries.write(nodes)?;
    let mut course = Course::begin(&args.load, nodes, PATIENCE);
    let mut random = Random::new(args.load.seed, u64::MAX);
    eprintln!("before: {}", counts_in_words(&course.all));
    let mut made: Vec<Made> = Vec::new();
    for (at, pause) in pauses::draw(args.nodes, args.times, &mut random).into_iter().enumerate() {
        if interrupt::requested() {
            break;
        }
        let one = make(args, nodes, &course.load, pause)?;
        let seen = match one.noticed {
            Some(seconds) => format!("seen after {seconds:.2} s"),
            None => "not seen".into(),
        };
        eprintln!(
            "pause {:>2}: {:?} of {:?} for {:.2} s in {}, {seen}, {} given up, the others did {:.1} % of operations with {:.0} % of \
             shards, one cluster {:.2} s and whole {:.2} s after it, longest operation {:.2} s; {}",
            at + 1,
            one.pause.kind,
            one.pause.nodes,
            one.pause.stopped().as_secs_f64(),
            one.pause.beats.len(),
            one.given_up,
            one.share() * 100.0,
            one.shards * 100.0,
            one.back,
            one.whole,
            one.all.longest(),
            counts_in_words(&one.all)
        );
        let goes_on = course.goes_on(&one.all);
        made.push(one);
        if !goes_on {
            break;
        }
    }
    let (all, last) = course.end(nodes)?;
    let mut verdict = Verdict::default();
    args.entries.check(nodes, &mut verdict)?;
    Ok(tell(args, &made, &all, &last, verdict))
}

fn make(args: &Args, nodes: &mut Nodes, load: &Load, pause: Pause) -> Result<Made, Failure> {
    let awake: Vec<usize> = nodes.live().into_iter().filter(|at| !pause.nodes.contains(at)).collect();
    let lives = lives(nodes, awake[0], &pause.nodes)?;
    let shards = quorums(nodes, &awake)?;
    pause.nodes.iter().for_each(|&node| load.set_aside(node));
    std::thread::sleep(TURN_AWAY);
    let (mut all, mut steady, mut lasted, mut noticed) = (load.take(), Seen::default(), Duration::ZERO, None);
    for beat in &pause.beats {
        pause.nodes.iter().try_for_each(|&node| nodes.stop(node))?;
        let mut start = Instant::now();
        let end = start + beat.stopped;
        if pause.kind != Kind::Short {
            noticed = until_noticed(nodes, &awake, &pause.nodes, end).then(|| start.elapsed().as_secs_f64());
            all.add(&load.take());
            start = Instant::now();
        }
        nap(end.saturating_duration_since(start));
        let seen = load.take();
        lasted += start.elapsed();
        pause.nodes.iter().try_for_each(|&node| nodes.go_on(node))?;
        all.add(&seen);
        steady.add(&seen);
        if beat != pause.beats.last().expect("there is one") {
            nap(beat.then);
            all.add(&load.take());
        }
    }
    let woken = Instant::now();
    pause.nodes.iter().for_each(|&node| load.take_back(node));
    nodes.wait_until_one_cluster(WHOLE, pause.nodes[0], "does not see one cluster again")?;
    let back = woken.elapsed().as_secs_f64();
    nodes.wait_until_whole(WHOLE)?;
    let whole = woken.elapsed().as_secs_f64();
    let what = "does not tell which entries it holds";
    let copies = nodes.wait(WHOLE, pause.nodes[0], what, || args.entries.copies(nodes))?;
    let now = self::lives(nodes, awake[0], &pause.nodes)?;
    let given_up = lives.iter().zip(&now).filter(|(before, now)| before != now).count();
    all.add(&load.take());
    let lasted = lasted.as_secs_f64();
    Ok(Made { pause, shards, noticed, steady, lasted, back, whole, given_up, all, copies })
}

/// The numbers of these nodes' lives.
fn lives(nodes: &Nodes, asked: usize, of: &[usize]) -> Result<Vec<u64>, Failure> {
    let what = "does not know the nodes that are to be stopped";
    of.iter().map(|&at| nodes.wait(WHOLE, asked, what, || nodes.life(asked, at).map(|(no, _)| no))).collect()
}

/// Waits until each of `awake` sees that none of `stopped` can be reached, or it is `end`; whether they did.
fn until_noticed(nodes: &Nodes, awake: &[usize], stopped: &[usize], end: Instant) -> bool {
    let mut left = awake.to_vec();
    while !left.is_empty() && Instant::now() < end && !interrupt::requested() {
        let reaches = |asked: usize, of: usize| nodes.life(asked, of).is_some_and(|(_, alive)| alive);
        // Who does not answer has not said that they are gone.
        left.retain(|&asked| nodes.ask(asked, "MEMBERS").is_none() || stopped.iter().any(|&node| reaches(asked, node)));
        std::thread::sleep(GLANCE);
    }
    left.is_empty()
}

/// Sleeps, unless somebody wants this to end.
fn nap(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time && !interrupt::requested() {
        std::thread::sleep(GLANCE.min(time - start.elapsed().min(time)));
    }
}

fn tell(args: &Args, made: &[Made], all: &Seen, last: &Seen, mut verdict: Verdict) -> bool {
    let alone: Vec<f64> =
        made.iter().filter(|one| one.pause.kind == Kind::Long).filter_map(|one| one.noticed).collect();
    let noticed = Figures::of("detected_s", "one alone seen by all", &alone, |&seconds| seconds);
    let back = Figures::of("rejoined_s", "one cluster after it went on", made, |one| one.back);
    let whole = Figures::of("whole_s", "whole after it went on", made, |one| one.whole);
    let longest = Figures::of("longest_s", "longest operation", made, |one| one.all.longest());
    verdict.check("pauses made", made.len() == args.times, format!("{} of {}", made.len(), args.times));
    verdict.clean(all, last);
    judge(&mut verdict, made);
    let turning = args.load.clients().div_ceil(2) as f64 / args.load.clients() as f64;
    serve(&mut verdict, args.load.rate as f64 * turning, made);
    let (p50, p99) = (noticed.at(0.5), noticed.at(0.99));
    verdict.check("detection p50", p50 <= DETECTION_P50, format!("{p50:.2} s of {DETECTION_P50} s"));
    verdict.check("detection p99", p99 <= DETECTION_P99, format!("{p99:.2} s of {DETECTION_P99} s"));
    let most = back.most();
    verdict.check("one cluster again", most <= BACK, format!("{most:.2} s of {BACK} s"));
    let most = longest.most();
    verdict.check("longest operation", most <= LONGEST, format!("{most:.2} s of {LONGEST} s where nobody stood still"));
    filled(&mut verdict, made.iter().map(|one| one.copies));
    verdict.reached(all.total().unreached);
    let silent: u64 = all.counts.iter().map(|counts| counts.cut).sum();
    verdict.check("clear errors", silent == 0, format!("{silent} without an answer; {}", all.errors_in_words()));
    let each = made.iter().map(|one| {
        json!({"kind": one.pause.kind, "nodes": one.pause.nodes, "times": one.pause.beats.len(),
               "stopped_s": one.pause.stopped().as_secs_f64(), "detected_s": one.noticed, "given_up": one.given_up,
               "shards": one.shards, "done": one.share(), "rejoined_s": one.back, "whole_s": one.whole,
               "copies": one.copies.0, "copies_wanted": one.copies.1, "longest_s": one.all.longest(),
               "held": one.all.held, "counts": one.all.total(), "errors": one.all.errors})
    });
    let more = json!({"nodes": args.nodes, "pauses": each.collect::<Vec<_>>()});
    super::tell(args.json, &[noticed, back, whole, longest], all, &verdict, more)
}

/// Whether short ones were overlooked and long ones seen, and whether clients had something with those who stood still.
fn judge(verdict: &mut Verdict, made: &[Made]) {
    let of = |kind| made.iter().filter(move |one| one.pause.kind == kind);
    let buried: usize = of(Kind::Short).map(|one| one.given_up).sum();
    let figure = format!("{buried} lives were given up in {} of them", of(Kind::Short).count());
    verdict.check("short pauses pass", buried == 0, figure);
    let long = || of(Kind::Long).chain(of(Kind::Pair));
    let (count, seen) = (long().count(), long().filter(|one| one.noticed.is_some()).count());
    let given_up: usize = long().map(|one| one.given_up).sum();
    let figure = format!("{seen} of {count} were seen, {given_up} lives given up");
    verdict.check("long pauses are seen", seen == count, figure);
    let (mut done, mut refused, mut unknown) = (0, 0, 0);
    for one in made {
        (done, refused, unknown) =
            (done + one.all.held.done, refused + one.all.held.refused, unknown + one.all.held.unknown);
    }
    let figure = format!("of what was with them {done} were done later, {refused} refused, {unknown} unknown");
    verdict.check("asked while stopped", done + refused + unknown > 0 || made.is_empty(), figure);
}

/// Whether those that ran went on serving the shards that they have a quorum of. Of a majority that stands still nothing is
/// asked but the truth.
fn serve(verdict: &mut Verdict, rate: f64, made: &[Made]) {
    let counted = || made.iter().filter(|one| one.pause.kind != Kind::Majority && one.lasted >= COUNTED);
    let good = counted().filter(|one| one.share() >= one.shards - SLACK).count();
    let least = counted().map(|one| one.share() - one.shards).fold(0.0, f64::min);
    let count = counted().count();
    let figure = format!("{good} of {count} times they did what their shards allow; {:.1} % at worst", least * 100.0);
    verdict.check("the others serve", good == count, figure);
    if rate > 0.0 {
        let alone = counted().filter(|one| one.pause.kind == Kind::Long && one.lasted >= COUNTED_RATE);
        let least = alone.map(|one| one.of_rate(rate)).fold(1.0, f64::min);
        let figure = format!("{:.1} % of the rate in the worst case, of {:.0} %", least * 100.0, OF_RATE * 100.0);
        verdict.check("the load goes on", least >= OF_RATE, figure);
    }
}

#[cfg(test)]
mod tests {
    use super::super::load::Counts;
    use super::super::pauses::Beat;
    use super::*;

    /// A pause of the first of three nodes, of which two saw it for a second.
    fn made(kind: Kind, others: Counts) -> Made {
        let stood = Counts { refused: 500, ..Counts::default() };
        let steady = Seen { counts: vec![stood, others, Counts::default()], ..Seen::default() };
        let beat = Beat { stopped: Duration::from_secs(6), then: Duration::ZERO };
        let mut all = steady.clone();
        all.held.done = 1;
        Made {
            pause: Pause { kind, nodes: vec![0], beats: vec![beat] },
            shards: 1.0,
            noticed: Some(3.0),
            steady,
            lasted: 1.0,
            back: 1.0,
            whole: 1.0,
            given_up: 0,
            all,
            copies: (15, 15),
        }
    }

    fn broken(made: &[Made]) -> Vec<&'static str> {
        let mut verdict = Verdict::default();
        judge(&mut verdict, made);
        serve(&mut verdict, 100.0, made);
        verdict.bars.iter().filter(|(_, good, _)| !good).map(|(name, _, _)| *name).collect()
    }

    #[test]
    fn who_runs_must_serve_what_it_has_a_quorum_of() {
        let all = Counts { reads: 96, refused: 4, ..Counts::default() };
        let half = Counts { reads: 60, refused: 40, ..Counts::default() };
        assert!(broken(&[made(Kind::Long, all)]).is_empty());
        assert_eq!(broken(&[made(Kind::Long, all), made(Kind::Long, half)]), ["the others serve"]);
        assert_eq!(broken(&[made(Kind::Short, half)]), ["the others serve"]);
        assert!(broken(&[Made { shards: 0.62, ..made(Kind::Pair, half) }]).is_empty());
        assert!(broken(&[made(Kind::Majority, half)]).is_empty());
        let late = Made { lasted: 0.01, ..made(Kind::Pair, Counts { refused: 1, ..Counts::default() }) };
        assert!(broken(&[late]).is_empty(), "seen just before its end");
        let slow = Counts { reads: 40, ..Counts::default() };
        assert_eq!(broken(&[made(Kind::Long, slow)]), ["the load goes on"]);
        assert!(broken(&[made(Kind::Pair, slow)]).is_empty());
    }

    #[test]
    fn a_short_pause_costs_no_life_and_a_long_one_is_seen() {
        let good = || made(Kind::Long, Counts { reads: 100, ..Counts::default() });
        let mut buried = Made { given_up: 1, ..good() };
        assert!(broken(&[buried]).is_empty());
        buried = Made { given_up: 1, ..good() };
        buried.pause.kind = Kind::Short;
        assert_eq!(broken(&[buried]), ["short pauses pass"]);
        assert_eq!(broken(&[good(), Made { noticed: None, ..good() }]), ["long pauses are seen"]);
    }

    #[test]
    fn nobody_asked_who_stood_still_and_nothing_was_tried() {
        let mut idle = made(Kind::Long, Counts { reads: 100, ..Counts::default() });
        idle.all.held = Default::default();
        assert_eq!(broken(&[idle]), ["asked while stopped"]);
    }
}
