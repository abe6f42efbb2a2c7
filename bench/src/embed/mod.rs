//! `embed`: what the engine does in the process of its application, beside concurrent maps in the same process.
//!
//! | case | what one operation is |
//! |---|---|
//! | `generator` | nothing: the loop that all cases share, around no operation |
//! | `local-get`, `local-set` | a task beside the data reads or overwrites keys of its own core, in place |
//! | `local-get-many` | the same for groups of keys, whose cache misses overlap |
//! | `bare-get`, `bare-set` | the same on a bare store of the engine: the price of the node is the difference |
//! | `uniform-get`, `uniform-set` | 64 tasks per core, each awaits one operation on any key after the other |
//! | `uniform-get-many-64`, `-256` | a task per core reads that many keys of any core at once |
//! | `line` | nothing of the node: a cache line is written on one CPU, or read on another, 64 in a row; a hop cannot be cheaper |
//! | `hop` | one read of a sibling's key, there and back, one at a time, both cores awake |
//! | `foreign-get` | a thread outside of the node reads one key after the other |
//! | `foreign-get-idle` | the same, a pause before each, so that the core sleeps when the request comes |
//! | `foreign-get-spin0` | as `foreign-get`, on a node whose cores sleep as soon as they find nothing to do |
//! | `foreign-get-many` | 2 threads outside read 64 keys at once |
//! | `dashmap-…`, `papaya-…` | as many pinned threads as cores, keys of their own, on one map that all share |
//!
//! All loops are alike: keys of 16 bytes, made ahead and laid out in the shuffled order in which they are asked for, so
//! that the generator is a walk over memory; what it costs is part of every figure, and the case `generator` tells it (2
//! to 4 ns where the order fits into a cache). A read looks at the value's length and first byte; a write overwrites with
//! a value of the same length. All maps hash with XXH3. A local write includes what a node's write includes: version,
//! change log, digest.
//!
//! The cases run in turn, round after round, so that a machine that changes its speed changes it for all; told are the
//! median over rounds and the least and greatest. Rates count wall time: what else runs on the cores takes its share.
//! *CPU* is the time that the workers' threads ran per operation, polling included, and does not depend on that.

mod lines;
mod maps;
mod node;
mod stage;

use std::time::Duration;

use serde::Serialize;

use crate::failure::Failure;
use crate::interrupt;
use crate::latency::{median, spread};
use crate::progress::Progress;
use crate::table::Table;
use crate::units;

pub(crate) use node::{local_get, local_set, uniform_get, uniform_get_many_64, uniform_set};
pub(crate) use stage::{Outcome, Setup, Stage, core_set};

/// Measure the engine inside this process, beside concurrent maps.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Cores of the node, in the words of its own --cores: all, a count, or a list such as 0-3,6
    #[arg(long, default_value = "2", value_parser = core_set)]
    cores: String,
    /// Keys, of 16 bytes
    #[arg(long, default_value = "100k", value_parser = units::number)]
    keys: u64,
    /// Bytes of a value
    #[arg(long, default_value_t = 100, value_name = "BYTES")]
    value_size: usize,
    /// How often each case runs; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long each case runs in each round
    #[arg(long, default_value = "1", value_parser = units::duration)]
    seconds: Duration,
    /// Only the case of this name, or those whose names begin so; may be given several times
    #[arg(long = "case", value_name = "NAME")]
    cases: Vec<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Something to measure.
struct Case {
    name: &'static str,
    run: fn(&Stage) -> Result<Outcome, Failure>,
    /// It needs a sibling core.
    hops: bool,
}

const fn case(name: &'static str, run: fn(&Stage) -> Result<Outcome, Failure>) -> Case {
    Case { name, run, hops: false }
}

const CASES: &[Case] = &[
    case("generator", node::generator),
    case("local-get", node::local_get),
    case("local-get-many", node::local_get_many),
    case("local-set", node::local_set),
    case("bare-get", node::bare_get),
    case("bare-set", node::bare_set),
    case("uniform-get", node::uniform_get),
    case("uniform-get-many-64", node::uniform_get_many_64),
    case("uniform-get-many-256", node::uniform_get_many_256),
    case("uniform-set", node::uniform_set),
    Case { name: "line", run: lines::line, hops: true },
    Case { name: "hop", run: node::hop, hops: true },
    case("foreign-get", node::foreign_get),
    case("foreign-get-idle", node::foreign_get_idle),
    case("foreign-get-spin0", node::foreign_get_without_spin),
    case("foreign-get-many", node::foreign_get_many),
    case("dashmap-get", maps::dashmap_get),
    case("dashmap-set", maps::dashmap_set),
    case("papaya-get", maps::papaya_get),
    case("papaya-set", maps::papaya_set),
];

/// What a case gave over the rounds.
#[derive(Debug, Serialize)]
struct Row {
    case: &'static str,
    /// Cores or threads at work.
    workers: usize,
    /// Operations per second of all of them: median, least, greatest.
    per_second: f64,
    lowest: f64,
    highest: f64,
    /// Median of the mean over workers.
    per_worker: f64,
    /// Nanoseconds that the workers' threads ran per operation, median.
    cpu_ns: f64,
    /// Where single operations were timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    latency: Option<Latency>,
}

/// Medians over rounds, the greatest for `max_us`.
#[derive(Debug, Serialize)]
struct Latency {
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
}

/// Measures and prints.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let chosen = choose(&args.cases)?;
    let setup = Setup { cores: args.cores, keys: args.keys, value_size: args.value_size, seconds: args.seconds };
    let progress = Progress::new(false);
    let stage = Stage::new(setup.clone())?;
    let skipped = |case: &Case| case.hops && stage.cores() < 2;
    let mut outcomes: Vec<Vec<Outcome>> = chosen.iter().map(|_| Vec::new()).collect();
    for round in 0..args.rounds {
        for (at, (case, outcomes)) in chosen.iter().zip(&mut outcomes).enumerate() {
            if skipped(case) || interrupt::requested() {
                continue;
            }
            let mut phase = progress.phase(format!("round {} of {}: {}", round + 1, args.rounds, case.name));
            let share = (round as usize * chosen.len() + at) as f64 / (args.rounds as usize * chosen.len()) as f64;
            phase.show(share, 0);
            let outcome = (case.run)(&stage)?;
            // What an interrupt cut short is no round.
            if !interrupt::requested() {
                outcomes.push(outcome);
            }
        }
    }
    let rows: Vec<Row> = chosen
        .iter()
        .zip(&outcomes)
        .filter(|(_, outcomes)| !outcomes.is_empty())
        .map(|(case, outcomes)| row(case.name, outcomes))
        .collect();
    if args.json {
        let document = serde_json::json!({
            "command": "embed", "cores": stage.cores(), "keys": setup.keys, "value_size": setup.value_size,
            "rounds": args.rounds, "seconds": setup.seconds.as_secs_f64(), "cases": rows,
        });
        println!("{document:#}");
    } else {
        println!(
            "{} keys of 16 bytes, values of {}; {} cores; {} rounds of {} s, median and range\n",
            setup.keys,
            setup.value_size,
            stage.cores(),
            args.rounds,
            setup.seconds.as_secs_f64()
        );
        print!("{}", table(&rows));
        chosen.iter().filter(|case| skipped(case)).for_each(|case| println!("{}: needs two cores", case.name));
    }
    stage.close()
}

/// The cases that are named, or else those whose names begin so.
fn choose(wanted: &[String]) -> Result<Vec<&'static Case>, Failure> {
    let names = || CASES.iter().map(|case| case.name);
    let means = |word: &str, name: &str| if names().any(|n| n == word) { name == word } else { name.starts_with(word) };
    if let Some(unknown) = wanted.iter().find(|word| !names().any(|name| means(word, name))) {
        let names = names().collect::<Vec<_>>().join(", ");
        return Err(Failure::Usage(format!("no case begins with '{unknown}'; there are {names}")));
    }
    Ok(CASES.iter().filter(|case| wanted.is_empty() || wanted.iter().any(|word| means(word, case.name))).collect())
}

fn row(case: &'static str, outcomes: &[Outcome]) -> Row {
    let totals: Vec<f64> = outcomes.iter().map(Outcome::total).collect();
    let workers = outcomes.iter().map(|o| o.rates.len()).max().unwrap_or(1).max(1);
    let (lowest, highest) = spread(&totals);
    let per_second = median(&totals);
    let each = |quantile: fn(&crate::latency::Latencies) -> f64| -> Vec<f64> {
        outcomes.iter().filter_map(|o| o.latencies.as_ref()).map(quantile).collect()
    };
    let latency = outcomes.iter().any(|o| o.latencies.is_some()).then(|| Latency {
        p50_us: median(&each(|l| l.at_us(0.5))),
        p99_us: median(&each(|l| l.at_us(0.99))),
        max_us: spread(&each(|l| l.max_us())).1,
    });
    let cpu_ns = median(&outcomes.iter().map(|o| o.cpu_ns).collect::<Vec<_>>());
    Row { case, workers, per_second, lowest, highest, per_worker: per_second / workers as f64, cpu_ns, latency }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(["case", "in all", "least", "greatest", "per worker", "CPU", "p50", "p99", "max"]);
    for row in rows {
        let rates = [row.per_second, row.lowest, row.highest, row.per_worker].map(units::rate);
        let mut cells = vec![row.case.to_owned()];
        cells.extend(rates);
        cells.push(nanoseconds(row.cpu_ns));
        if let Some(latency) = &row.latency {
            cells.extend([latency.p50_us, latency.p99_us, latency.max_us].map(units::latency));
        }
        table.row(cells);
    }
    table
}

/// Short times with a digit that `units` would drop.
fn nanoseconds(ns: f64) -> String {
    if ns < 100.0 { format!("{ns:.1} ns") } else { units::latency(ns / 1e3) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_the_median_of_the_rounds() {
        let outcome = |rates: [f64; 2]| Outcome { rates: rates.to_vec(), cpu_ns: rates[0], latencies: None };
        let row = row("x", &[outcome([10.0, 20.0]), outcome([1.0, 1.0]), outcome([30.0, 30.0])]);
        assert_eq!((row.per_second, row.lowest, row.highest), (30.0, 2.0, 60.0));
        assert_eq!((row.workers, row.per_worker, row.cpu_ns), (2, 15.0, 10.0));
    }

    #[test]
    fn cases_are_chosen_by_how_their_names_begin() {
        let names = |wanted: &[&str]| -> Vec<&str> {
            let wanted: Vec<String> = wanted.iter().map(|&w| w.to_owned()).collect();
            choose(&wanted).unwrap().iter().map(|case| case.name).collect()
        };
        assert_eq!(names(&["local", "hop"]), ["local-get", "local-get-many", "local-set", "hop"]);
        assert_eq!(names(&["uniform-get"]), ["uniform-get"]);
        assert_eq!(names(&["uniform-get-"]), ["uniform-get-many-64", "uniform-get-many-256"]);
        assert_eq!(names(&[]).len(), CASES.len());
        assert!(choose(&["nothing".into()]).is_err());
    }

    #[test]
    fn every_case_finds_its_keys() {
        let setup = Setup { cores: "1".into(), keys: 2000, value_size: 10, seconds: Duration::from_millis(5) };
        let stage = Stage::new(setup).unwrap();
        for case in CASES.iter().filter(|case| !case.hops) {
            let outcome = (case.run)(&stage).unwrap();
            assert!(outcome.total() > 0.0, "{}", case.name);
        }
        stage.close().unwrap();
    }
}
