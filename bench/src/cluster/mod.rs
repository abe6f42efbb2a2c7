//! `gridkv-bench cluster`: quorum operations of a cluster on this machine, by its facade and by RESP.
//!
//! ```text
//!   facade   clients are tasks in this process  ──handle──▶  N embedded nodes in this process ◀──loopback──▶ each other
//!   RESP     connections of this process      ──loopback──▶  N processes of gridkv-node       ◀──loopback──▶ each other
//! ```
//!
//! - Clients go to the nodes in turn, each stays with its own; a node coordinates what it does not hold.
//! - Nodes, clients and connections share the cores of this machine, nobody but the nodes is bound to one, and who has
//!   nothing to do sleeps. So a rate is that of everything together, the price of a client included.
//! - Both clusters run all the time; the cases run in turn, round after round, each when its cluster is whole. Told are
//!   medians over the rounds, with the least and the greatest rate.
//! - Every value that is read is compared with the one written.
//!
//! Not here: what a cluster does while something happens to it (`chaos`), and other servers (`compare`).

#[cfg(feature = "embedded")]
mod facade;

use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};

use crate::distribution::Distribution;
use crate::failure::Failure;
use crate::fleet::{Fleet, Run, Target};
use crate::latency::{median, spread};
use crate::nodes::{NodeArgs, Nodes, loopback};
use crate::options::{DataArgs, count};
use crate::progress::Progress;
use crate::report::Report;
use crate::requests::Protocol;
use crate::table::Table;
use crate::worker::Limit;
use crate::workload::{Kind, Mix};
use crate::{interrupt, pin, units};

/// How long a cluster may take until every shard has its copies.
const WHOLE: Duration = Duration::from_secs(180);
/// Copies that a cluster can keep.
const MOST_COPIES: u8 = 7;
/// Nodes that have ports.
const MOST_NODES: usize = 9;

/// Where the figures of the Go original come from, and what they are.
const GO_BY: [&str; 2] = [
    "GridKV (Go) at edf7ca6, as it is and with two faults mended; 3 nodes in one process on two cores,",
    "N=3, R=W=2, values of 100 B, 32 clients; not measured here, see docs/PERFORMANCE.md",
];
/// Operations per second there: the least and the best.
const GO_READS: [f64; 2] = [3.4e3, 3.6e3];
const GO_WRITES: [f64; 2] = [0.8e3, 7.4e3];
/// 99 of 100 of its reads took no longer than this, in milliseconds.
const GO_READS_P99_MS: [f64; 2] = [19.0, 31.0];

/// Quorum operations of a cluster on this machine
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Nodes
    #[arg(long, default_value = "3", value_parser = count, value_name = "COUNT")]
    nodes: usize,
    /// Copies of each shard [default: 3, or as many as there are nodes]
    #[arg(long, value_name = "COUNT")]
    replicas: Option<u8>,
    /// Copies that hold a write before it is acknowledged [default: a majority]
    #[arg(long, value_name = "COUNT")]
    write_quorum: Option<u8>,
    /// Copies that answer a read [default: a majority]
    #[arg(long, value_name = "COUNT")]
    read_quorum: Option<u8>,
    /// Cores of each node; nodes share them when there are not enough
    #[arg(long, default_value = "1", value_parser = count, value_name = "COUNT")]
    cores: usize,
    /// Clients of the facade, and connections over RESP
    #[arg(long, default_value = "32", value_parser = count, value_name = "COUNT")]
    clients: usize,
    /// Threads that drive them
    #[arg(long, default_value = "1", value_parser = count, value_name = "COUNT")]
    threads: usize,
    /// How to reach the nodes
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Way::ALL, value_name = "LIST")]
    ways: Vec<Way>,
    /// Keys of a get_many or set_many of the facade
    #[arg(long, default_value = "64", value_parser = count, value_name = "COUNT")]
    group: usize,
    /// Requests in flight per RESP connection
    #[arg(long, default_value = "1,16,64", value_delimiter = ',', value_parser = count, value_name = "LIST")]
    pipelines: Vec<usize>,
    /// Rounds
    #[arg(long, default_value = "3", value_parser = count, value_name = "COUNT")]
    rounds: usize,
    /// Length of each measurement
    #[arg(long, default_value = "5", value_parser = units::duration, value_name = "TIME")]
    seconds: Duration,
    /// Load before each measurement
    #[arg(long, default_value = "300ms", value_parser = units::duration, value_name = "TIME")]
    warmup: Duration,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    each: NodeArgs,
    /// No progress
    #[arg(long, short)]
    quiet: bool,
    /// Tell the result as JSON
    #[arg(long)]
    json: bool,
}

/// How clients reach the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    #[cfg(feature = "embedded")]
    Facade,
    Resp,
}

impl Way {
    #[cfg(feature = "embedded")]
    const ALL: [Way; 2] = [Way::Facade, Way::Resp];
    #[cfg(not(feature = "embedded"))]
    const ALL: [Way; 1] = [Way::Resp];
}

/// What a cluster promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Quorums {
    replicas: u8,
    write_quorum: u8,
    read_quorum: u8,
}

/// Something to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Case {
    way: Way,
    kind: Kind,
    /// Keys of a group by the facade, requests in flight per connection by RESP.
    together: usize,
}

impl Case {
    fn name(&self) -> &'static str {
        let reads = self.kind == Kind::Get;
        match self.way {
            #[cfg(feature = "embedded")]
            Way::Facade if self.together > 1 => ["facade set_many", "facade get_many"][usize::from(reads)],
            #[cfg(feature = "embedded")]
            Way::Facade => ["facade set", "facade get"][usize::from(reads)],
            Way::Resp => ["RESP SET", "RESP GET"][usize::from(reads)],
        }
    }

    /// The best rate of the Go original with such operations.
    fn best_of_go(&self) -> f64 {
        if self.kind == Kind::Get { GO_READS[1] } else { GO_WRITES[1] }
    }
}

/// What a case gave, one figure per round.
#[derive(Clone, Debug, Default)]
struct Rounds {
    rates: Vec<f64>,
    p50_us: Vec<f64>,
    p99_us: Vec<f64>,
    /// Errors, and values that were missing or wrong.
    errors: u64,
}

impl Rounds {
    fn add(&mut self, report: &Report) {
        let latencies = report.all();
        self.rates.push(report.rate);
        self.p50_us.push(latencies.at_us(0.5));
        self.p99_us.push(latencies.at_us(0.99));
        self.errors += report.error_count() + report.misses + report.wrong;
    }
}

/// Medians over the rounds.
#[derive(Debug, Serialize)]
struct Row {
    case: &'static str,
    together: usize,
    /// Keys per second.
    median_per_second: f64,
    least_per_second: f64,
    greatest_per_second: f64,
    rounds: Vec<f64>,
    /// Of a whole group, where there is one.
    p50_us: f64,
    p99_us: f64,
    /// How many times the best rate of the Go original it is.
    times_go: f64,
    errors: u64,
}

impl Row {
    fn new(case: &Case, rounds: &Rounds) -> Row {
        let middle = median(&rounds.rates);
        let (least, greatest) = spread(&rounds.rates);
        Row {
            case: case.name(),
            together: case.together,
            median_per_second: middle,
            least_per_second: least,
            greatest_per_second: greatest,
            rounds: rounds.rates.clone(),
            p50_us: median(&rounds.p50_us),
            p99_us: median(&rounds.p99_us),
            times_go: middle / case.best_of_go(),
            errors: rounds.errors,
        }
    }
}

impl Args {
    fn quorums(&self) -> Result<Quorums, Failure> {
        let wrong = |text: String| Err(Failure::Usage(text));
        if self.nodes > MOST_NODES {
            return wrong(format!("--nodes: at most {MOST_NODES}"));
        }
        let replicas = self.replicas.unwrap_or(3.min(self.nodes as u8));
        if !(1..=MOST_COPIES).contains(&replicas) || usize::from(replicas) > self.nodes {
            let most = self.nodes.min(MOST_COPIES.into());
            return wrong(format!("--replicas: from 1 to {most}, one on each of {} node(s)", self.nodes));
        }
        let majority = replicas / 2 + 1;
        let (write_quorum, read_quorum) = (self.write_quorum.unwrap_or(majority), self.read_quorum.unwrap_or(majority));
        for (flag, quorum) in [("--write-quorum", write_quorum), ("--read-quorum", read_quorum)] {
            if !(1..=replicas).contains(&quorum) {
                return wrong(format!("{flag}: from 1 to {replicas}, the number of copies"));
            }
        }
        let cpus = pin::allowed()?.len();
        if self.cores > cpus {
            return wrong(format!("--cores: this process may use {cpus}"));
        }
        Ok(Quorums { replicas, write_quorum, read_quorum })
    }

    /// What is measured, in order.
    fn cases(&self) -> Vec<Case> {
        let mut cases: Vec<Case> = Vec::new();
        for &way in &self.ways {
            let together = match way {
                #[cfg(feature = "embedded")]
                Way::Facade => vec![1, self.group],
                Way::Resp => self.pipelines.clone(),
            };
            for together in together {
                for kind in [Kind::Get, Kind::Set] {
                    let case = Case { way, kind, together };
                    if !cases.contains(&case) {
                        cases.push(case);
                    }
                }
            }
        }
        cases
    }

    fn progress(&self) -> Progress {
        Progress::unless(self.quiet)
    }
}

/// Node processes and the connections to them. The fleet goes first.
struct Processes {
    fleet: Fleet,
    nodes: Nodes,
}

impl Processes {
    /// Founds a cluster and writes all keys.
    fn start(args: &Args, quorums: Quorums, mut nodes: Nodes) -> Result<Processes, Failure> {
        nodes.set("--replicas", quorums.replicas);
        nodes.set("--write-quorum", quorums.write_quorum);
        nodes.set("--read-quorum", quorums.read_quorum);
        let founded = nodes.found(args.nodes, WHOLE).and_then(|()| {
            let mut fleet = Fleet::connect(Target {
                addrs: nodes.clients(),
                protocol: Protocol::Resp,
                password: None,
                connections: args.clients,
                threads: args.threads,
                pins: Vec::new(),
                requests: args.data.requests(Protocol::Resp, args.data.keys)?,
                keys: args.data.keys,
                distribution: Distribution::Uniform,
                check: true,
                sleeps: true,
                seed: 1,
            })?;
            fleet.load(1, args.progress())?;
            Ok(fleet)
        });
        match founded {
            Ok(fleet) => Ok(Processes { fleet, nodes }),
            Err(failure) => {
                nodes.keep_logs();
                Err(failure)
            }
        }
    }

    fn run(&mut self, case: &Case, label: String, length: Duration, progress: Progress) -> Result<Report, Failure> {
        let mix = Mix::only(case.kind);
        let run = Run { label, mix, pipeline: case.together, rate: None, limit: Limit::Time(length) };
        let report = self.nodes.wait_until_whole(WHOLE).and_then(|_| self.fleet.run(&run, progress));
        if report.is_err() {
            self.nodes.keep_logs();
        }
        report
    }
}

/// The clusters that are measured. All that runs ends when this is dropped.
struct Clusters {
    #[cfg(feature = "embedded")]
    facade: Option<facade::Facade>,
    processes: Option<Processes>,
}

impl Clusters {
    fn start(args: &Args, quorums: Quorums) -> Result<Clusters, Failure> {
        // What cannot be started at all is found out before anything else is.
        let nodes = match args.ways.contains(&Way::Resp) {
            true => Some(Nodes::new(&args.each, loopback(args.nodes, args.cores)?)?),
            false => None,
        };
        Ok(Clusters {
            #[cfg(feature = "embedded")]
            facade: match args.ways.contains(&Way::Facade) {
                true => Some(facade::Facade::start(args, quorums)?),
                false => None,
            },
            processes: nodes.map(|nodes| Processes::start(args, quorums, nodes)).transpose()?,
        })
    }

    fn run(&mut self, case: &Case, label: String, length: Duration, progress: Progress) -> Result<Report, Failure> {
        const STARTED: &str = "the ways of all cases were started";
        match case.way {
            #[cfg(feature = "embedded")]
            Way::Facade => self.facade.as_mut().expect(STARTED).run(case, label, length, progress),
            Way::Resp => self.processes.as_mut().expect(STARTED).run(case, label, length, progress),
        }
    }
}

/// All rounds of all cases, or those that were done when somebody interrupted.
fn measure(args: &Args, cases: &[Case], clusters: &mut Clusters) -> Result<Vec<Rounds>, Failure> {
    let mut all = vec![Rounds::default(); cases.len()];
    for round in 0..args.rounds {
        for (case, rounds) in cases.iter().zip(&mut all) {
            let label = format!("round {}/{}: {} {}", round + 1, args.rounds, case.name(), case.together);
            if !args.warmup.is_zero() && !interrupt::requested() {
                clusters.run(case, String::new(), args.warmup, Progress::unless(true))?;
            }
            if interrupt::requested() {
                return Ok(all);
            }
            let report = clusters.run(case, label, args.seconds, args.progress())?;
            if !interrupt::requested() {
                rounds.add(&report);
            }
        }
    }
    Ok(all)
}

fn text(rows: &[Row]) -> String {
    let mut table = Table::new(["case", "at once", "median", "min–max", "p50", "p99", "Go's best", "errors"]);
    for row in rows {
        table.row([
            row.case.to_owned(),
            row.together.to_string(),
            units::rate(row.median_per_second),
            format!("{}–{}", units::count(row.least_per_second), units::count(row.greatest_per_second)),
            units::latency(row.p50_us),
            units::latency(row.p99_us),
            units::ratio(row.times_go),
            if row.errors > 0 { row.errors.to_string() } else { String::new() },
        ]);
    }
    let range = |[low, high]: [f64; 2]| format!("{} to {}", units::count(low), units::rate(high));
    let [low, high] = GO_READS_P99_MS;
    let notes = [
        "Rates count keys; the times of get_many and set_many are those of a whole group.".to_owned(),
        "Go's best: how many times the best rate of".to_owned(),
        GO_BY[0].to_owned(),
        GO_BY[1].to_owned(),
        format!("Reads there: {}, p99 {low} to {high} ms; writes: {}", range(GO_READS), range(GO_WRITES)),
    ];
    format!("{table}\n{}\n", notes.join("\n"))
}

fn go() -> Value {
    json!({"by": GO_BY.join(" "), "reads_per_second": GO_READS, "reads_p99_ms": GO_READS_P99_MS, "writes_per_second": GO_WRITES})
}

/// Measures and prints.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let quorums = args.quorums()?;
    let cases = args.cases();
    let mut clusters = Clusters::start(&args, quorums)?;
    let all = measure(&args, &cases, &mut clusters)?;
    drop(clusters);
    let measured = cases.iter().zip(&all).filter(|(_, rounds)| !rounds.rates.is_empty());
    let rows: Vec<Row> = measured.map(|(case, rounds)| Row::new(case, rounds)).collect();
    if args.json {
        let document = json!({
            "command": "cluster", "nodes": args.nodes, "cores_per_node": args.cores, "quorums": quorums,
            "shards": args.each.shards(), "clients": args.clients, "threads": args.threads, "keys": args.data.keys,
            "key_size": args.data.sizes.key_size.to_string(), "value_size": args.data.sizes.value_size.to_string(),
            "rounds": args.rounds, "seconds": args.seconds.as_secs_f64(), "interrupted": interrupt::requested(),
            "rows": rows, "go": go(),
        });
        println!("{document:#}");
        return Ok(());
    }
    println!(
        "{} nodes of {} core(s) each on the {} of this machine, {} copies, write quorum {}, read quorum {}\n\
         {} clients on {} thread(s), {} keys of {}, values of {}; {} round(s) of {} s, median and range\n",
        args.nodes,
        args.cores,
        pin::allowed()?.len(),
        quorums.replicas,
        quorums.write_quorum,
        quorums.read_quorum,
        args.clients,
        args.threads,
        units::count(args.data.keys as f64),
        args.data.sizes.key_size,
        args.data.sizes.value_size,
        args.rounds,
        args.seconds.as_secs_f64(),
    );
    if interrupt::requested() {
        println!("interrupted; so far:");
    }
    print!("{}", text(&rows));
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    pub(super) fn args(line: &str) -> Args {
        Line::try_parse_from(format!("cluster --quiet {line}").split_whitespace()).unwrap().args
    }

    #[test]
    fn quorums_follow_from_the_nodes_unless_named() {
        let of = |line| {
            let Quorums { replicas, write_quorum, read_quorum } = args(line).quorums()?;
            Ok::<_, Failure>((replicas, write_quorum, read_quorum))
        };
        assert_eq!(of("").unwrap(), (3, 2, 2));
        assert_eq!(of("--nodes 2").unwrap(), (2, 2, 2));
        assert_eq!(of("--nodes 5 --replicas 5 --write-quorum 4 --read-quorum 2").unwrap(), (5, 4, 2));
        for line in ["--nodes 2 --replicas 3", "--replicas 0", "--write-quorum 4", "--read-quorum 0", "--nodes 10"] {
            let failure = of(line).unwrap_err();
            assert!(matches!(failure, Failure::Usage(_)), "{line}: {failure}");
        }
        assert!(of("--cores 4096").unwrap_err().to_string().contains("--cores"));
    }

    #[test]
    fn cases_are_reads_and_writes_in_each_way() {
        let told = |line: &str| -> Vec<(&str, usize)> {
            args(line).cases().iter().map(|case| (case.name(), case.together)).collect()
        };
        assert_eq!(
            told("--ways resp --pipelines 1,1,8"),
            [("RESP GET", 1), ("RESP SET", 1), ("RESP GET", 8), ("RESP SET", 8)]
        );
        #[cfg(feature = "embedded")]
        assert_eq!(
            told("--pipelines 16")[..5],
            [("facade get", 1), ("facade set", 1), ("facade get_many", 64), ("facade set_many", 64), ("RESP GET", 16)]
        );
    }

    #[test]
    fn a_row_is_the_median_of_the_rounds_beside_the_best_of_go() {
        let mut rounds = Rounds::default();
        for (rate, us) in [(7.2e3, 100), (3.6e3, 300), (14.4e3, 200)] {
            let mut report = Report::new();
            report.record(Kind::Get, us * 1000, 10);
            (report.rate, report.misses) = (rate, 1);
            rounds.add(&report);
        }
        let row = Row::new(&Case { way: Way::Resp, kind: Kind::Get, together: 16 }, &rounds);
        assert_eq!((row.median_per_second, row.least_per_second, row.greatest_per_second), (7.2e3, 3.6e3, 14.4e3));
        assert_eq!((row.times_go, row.errors), (2.0, 3));
        assert!((row.p50_us - 200.0).abs() < 1.0 && (row.p99_us - 200.0).abs() < 1.0);
        let text = text(&[row]);
        assert!(text.contains("RESP GET") && text.contains("2.00x") && text.contains("3.40 k to 3.60 k/s"), "{text}");
        assert_eq!(Case { way: Way::Resp, kind: Kind::Set, together: 1 }.best_of_go(), 7.4e3);
        assert_eq!(go()["reads_p99_ms"][1], 31.0);
    }

    #[test]
    fn a_node_that_is_not_there_is_said_before_anything_starts() {
        let args = args("--node /nowhere/gridkv-node");
        let failure = Clusters::start(&args, args.quorums().unwrap()).err().unwrap().to_string();
        assert!(failure.contains("/nowhere/gridkv-node: there is no such program"), "{failure}");
    }
}
