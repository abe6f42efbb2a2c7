//! `scale`: how rates grow with cores, what hops take away, and what the scalability law makes of it.
//!
//! For each number of cores a node is started and loaded, and runs the cases of [`crate::embed`]:
//!
//! ```text
//!   local     on every core, keys of that core       cores share nothing: what is lost here, the machine loses
//!   uniform   on every core, keys of any core,       (n−1)/n of the operations hop
//!             64 tasks, or reads of 64 keys at once
//! ```
//!
//! *Efficiency* is the rate over n times the rate of one core. *Per hop* is what an operation that hops takes longer of
//! all cores together: (n / X(n) − 1 / X(1)) · n / (n−1), with X the uniform rate; the machine's own loss is part of it.
//!
//! Not here: rates over sockets (`compare`), several machines.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::embed::{self, Outcome, Setup, Stage};
use crate::failure::Failure;
use crate::interrupt;
use crate::latency::median;
use crate::plot::{Series, svg};
use crate::progress::Progress;
use crate::table::Table;
use crate::units;
use crate::usl::{Limit, Usl};

/// Sweep the number of cores of a node inside this process.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The most cores [default: all that this process may use]
    #[arg(long)]
    max: Option<usize>,
    /// Keys, of 16 bytes
    #[arg(long, default_value = "100k", value_parser = units::number)]
    keys: u64,
    /// Bytes of a value
    #[arg(long, default_value_t = 100, value_name = "BYTES")]
    value_size: usize,
    /// How often each point is measured; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long each point is measured in each round
    #[arg(long, default_value = "1", value_parser = units::duration)]
    seconds: Duration,
    /// Write a chart to this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

struct Load {
    name: &'static str,
    run: fn(&Stage) -> Result<Outcome, Failure>,
}

/// The order of the loads: tables name them by place.
const LOADS: [Load; 5] = [
    Load { name: "local GET", run: embed::local_get },
    Load { name: "uniform GET, 64 tasks", run: embed::uniform_get },
    Load { name: "uniform GET, 64 at once", run: embed::uniform_get_many_64 },
    Load { name: "local SET", run: embed::local_set },
    Load { name: "uniform SET, 64 tasks", run: embed::uniform_set },
];
const LOCAL_GET: usize = 0;
const UNIFORM_GET: usize = 1;
const MANY_GET: usize = 2;
const LOCAL_SET: usize = 3;
const UNIFORM_SET: usize = 4;

/// Where [`PUBLISHED`] comes from.
const PUBLISHED_BY: &str = "GridKV (Go) README, memory-sharded backend called in process, i7-12700H (20 threads)";
/// Threads and operations per second; the last reads "10M+".
const PUBLISHED: [(usize, f64); 4] = [(1, 0.7e6), (8, 5e6), (16, 8e6), (32, 10e6)];

/// A load over all numbers of cores.
#[derive(Debug, Serialize)]
struct Curve {
    load: &'static str,
    /// (cores, operations per second).
    points: Vec<(usize, f64)>,
    law: Option<Usl>,
}

impl Curve {
    fn new(load: &'static str, points: Vec<(usize, f64)>) -> Curve {
        let law = Usl::fit(&points.iter().map(|&(n, rate)| (n as f64, rate)).collect::<Vec<_>>());
        Curve { load, points, law }
    }

    fn at(&self, cores: usize) -> Option<f64> {
        self.points.iter().find(|p| p.0 == cores).map(|p| p.1)
    }

    fn efficiency(&self, cores: usize) -> Option<f64> {
        Some(self.at(cores)? / (cores as f64 * self.at(1)?))
    }

    /// Nanoseconds of core time that a hop adds; see the file's head.
    fn per_hop(&self, cores: usize) -> Option<f64> {
        let n = cores as f64;
        (cores > 1).then_some(())?;
        Some((n / self.at(cores)? - 1.0 / self.at(1)?) * n / (n - 1.0) * 1e9)
    }
}

/// Measures and prints.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let max = match args.max {
        Some(0) => return Err(Failure::Usage("a node needs at least one core".into())),
        Some(max) => max,
        None => std::thread::available_parallelism().map_err(Failure::io("counting cores"))?.get(),
    };
    let counts = counts(max);
    let progress = Progress::new(false);
    let mut rates: Vec<Vec<Vec<f64>>> = LOADS.iter().map(|_| vec![Vec::new(); counts.len()]).collect();
    for round in 0..args.rounds {
        for (at, &cores) in counts.iter().enumerate() {
            if interrupt::requested() {
                break;
            }
            let mut phase = progress.phase(format!("round {} of {}: {cores} cores", round + 1, args.rounds));
            phase.show((round as usize * counts.len() + at) as f64 / (args.rounds as usize * counts.len()) as f64, 0);
            let setup =
                Setup { cores: cores.to_string(), keys: args.keys, value_size: args.value_size, seconds: args.seconds };
            let stage = Stage::new(setup)?;
            for (load, rates) in LOADS.iter().zip(&mut rates) {
                let outcome = (load.run)(&stage)?;
                if !interrupt::requested() {
                    rates[at].push(outcome.total());
                }
            }
            stage.close()?;
        }
    }
    let measured = |rates: &Vec<Vec<f64>>| {
        counts.iter().zip(rates).filter(|(_, r)| !r.is_empty()).map(|(&n, r)| (n, median(r))).collect()
    };
    let curves: Vec<Curve> =
        LOADS.iter().zip(&rates).map(|(load, rates)| Curve::new(load.name, measured(rates))).collect();
    if args.json {
        let document = serde_json::json!({
            "command": "scale", "keys": args.keys, "value_size": args.value_size, "rounds": args.rounds,
            "seconds": args.seconds.as_secs_f64(), "curves": curves,
            "published": { "by": PUBLISHED_BY, "points": PUBLISHED },
        });
        println!("{document:#}");
    } else {
        print!("{}", text(&args, &curves));
    }
    if let Some(path) = &args.svg {
        let chart = svg("Operations per second over cores", &curves.iter().map(series).collect::<Vec<_>>());
        std::fs::write(path, chart).map_err(Failure::io(format!("writing {}", path.display())))?;
    }
    Ok(())
}

/// Every number up to 8, then half steps of powers of two, and the most.
fn counts(max: usize) -> Vec<usize> {
    let halves = (3..).flat_map(|power| [1 << power, (1 << power) + (1 << (power - 1))]);
    let mut counts: Vec<usize> = (1..8).chain(halves.take_while(|&n| n < max)).filter(|&n| n < max).collect();
    counts.push(max);
    counts
}

fn series(curve: &Curve) -> Series {
    let most = curve.points.last().map_or(1, |p| p.0) as f64;
    let sample =
        |law: &Usl| (0..=100).map(|i| 1.0 + (most - 1.0) * f64::from(i) / 100.0).map(|n| (n, law.at(n))).collect();
    Series {
        name: curve.load.to_owned(),
        points: curve.points.iter().map(|&(n, rate)| (n as f64, rate)).collect(),
        curve: curve.law.as_ref().map(sample).unwrap_or_default(),
    }
}

fn text(args: &Args, curves: &[Curve]) -> String {
    let mut text = format!(
        "{} keys of 16 bytes, values of {}; {} rounds of {} s, medians\n\n",
        args.keys,
        args.value_size,
        args.rounds,
        args.seconds.as_secs_f64()
    );
    let rate = |curve: &Curve, n: usize| curve.at(n).map(units::rate).unwrap_or_default();
    let percent = |share: Option<f64>| share.map(|s| format!("{:.0} %", s * 100.0)).unwrap_or_default();
    let per_hop = |curve: &Curve, n| curve.per_hop(n).map(|ns| format!("{ns:.0} ns")).unwrap_or_default();
    let of_local = |uniform: &Curve, local: &Curve, n| percent(uniform.at(n).zip(local.at(n)).map(|(u, l)| u / l));

    let (local, uniform, many) = (&curves[LOCAL_GET], &curves[UNIFORM_GET], &curves[MANY_GET]);
    let mut get = Table::new([
        "GET, cores",
        "local",
        "effic.",
        "64 tasks",
        "effic.",
        "of local",
        "per hop",
        "64 at once",
        "effic.",
        "per hop",
    ]);
    for &(n, _) in &local.points {
        get.row([
            n.to_string(),
            rate(local, n),
            percent(local.efficiency(n)),
            rate(uniform, n),
            percent(uniform.efficiency(n)),
            of_local(uniform, local, n),
            per_hop(uniform, n),
            rate(many, n),
            percent(many.efficiency(n)),
            per_hop(many, n),
        ]);
    }
    text += &format!("{get}\n");
    let (local, uniform) = (&curves[LOCAL_SET], &curves[UNIFORM_SET]);
    let mut set = Table::new(["SET, cores", "local", "effic.", "64 tasks", "effic.", "of local", "per hop"]);
    for &(n, _) in &local.points {
        set.row([
            n.to_string(),
            rate(local, n),
            percent(local.efficiency(n)),
            rate(uniform, n),
            percent(uniform.efficiency(n)),
            of_local(uniform, local, n),
            per_hop(uniform, n),
        ]);
    }
    text += &format!("{set}\n");

    let mut published = Table::new(["published, threads", "rate", "speed-up", "effic."]);
    for (threads, ops) in PUBLISHED {
        let up = ops / PUBLISHED[0].1;
        published.row([threads.to_string(), units::rate(ops), units::ratio(up), percent(Some(up / threads as f64))]);
    }
    text += &format!("{published}{PUBLISHED_BY}; not measured here\n\n");

    let mut laws = Table::new(["law X(n) = λn / (1 + σ(n−1) + κn(n−1))", "λ", "σ", "κ", "limit"]);
    for curve in curves {
        if let Some(law) = &curve.law {
            laws.row([
                curve.load.to_owned(),
                units::rate(law.lambda),
                format!("{:.4}", law.sigma),
                format!("{:.6}", law.kappa),
                limit(law.limit()),
            ]);
        }
    }
    text += &laws.to_string();
    let points = curves[LOCAL_GET].points.len();
    if points < 3 {
        text += &format!("{points} numbers of cores do not tell σ from κ: κ is taken as 0\n");
    }
    text
}

fn limit(limit: Limit) -> String {
    match limit {
        Limit::Peak { workers, rate } => format!("{} at {workers:.0} cores", units::rate(rate)),
        Limit::Ceiling(rate) => format!("below {}", units::rate(rate)),
        Limit::None => "none seen".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_cores_are_dense_where_few_and_end_with_the_most() {
        assert_eq!(counts(1), [1]);
        assert_eq!(counts(3), [1, 2, 3]);
        assert_eq!(counts(8), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(counts(20), [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20]);
        assert_eq!(counts(32), [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32]);
    }

    #[test]
    fn efficiency_and_hops_follow_from_the_rates() {
        // One core takes 100 ns; on two, a local operation takes 100 ns and one that hops 300 ns of core time.
        let curve = Curve::new("x", vec![(1, 1e7), (2, 1e7)]);
        assert!((curve.efficiency(2).unwrap() - 0.5).abs() < 1e-9);
        assert!((curve.per_hop(2).unwrap() - 200.0).abs() < 1e-9);
        assert_eq!((curve.per_hop(1), curve.efficiency(3)), (None, None));
    }

    #[test]
    fn a_report_names_every_load_and_the_source_of_what_is_not_measured() {
        let args = Args {
            max: None,
            keys: 1,
            value_size: 1,
            rounds: 1,
            seconds: Duration::from_secs(1),
            svg: None,
            json: false,
        };
        let curves: Vec<Curve> =
            LOADS.iter().map(|load| Curve::new(load.name, vec![(1, 1e6), (2, 1.9e6), (4, 3.5e6)])).collect();
        let text = text(&args, &curves);
        assert!(LOADS.iter().all(|load| text.contains(load.name)) && text.contains("GridKV (Go) README"), "{text}");
        assert!(text.contains("95 %") && !text.contains("NaN"), "{text}");
    }
}
