//! `gridkv-bench compare`: our node and others on the same core, under the same load.
//!
//! ```text
//!   for each operation and pipeline:
//!     round 1   gridkv redis memcached echo      what the machine does to one, it does to its neighbours:
//!     round 2   redis memcached echo gridkv      each round begins with another server, and figures are medians
//!     round 3   memcached echo gridkv redis      over the rounds, with the least and the greatest beside them
//! ```
//!
//! All servers run all the time on the same core and sleep while they have nothing to do; only one of them is loaded.
//!
//! memcached answers each of several pipelined `get`s with a write of its own (its clients ask for many keys in one
//! `get` instead), so its pipelined reads look worse than its pipelined writes.

use std::time::Duration;

use serde::Serialize;

use crate::child::{Recipe, Server, split_list};
use crate::failure::Failure;
use crate::fleet::{Fleet, Run, Target};
use crate::interrupt;
use crate::latency::{median, spread};
use crate::options::{DataArgs, PlaceArgs, count};
use crate::progress::Progress;
use crate::table::Table;
use crate::units;
use crate::worker::Limit;
use crate::workload::{Kind, Mix};

/// New keys that all rounds together may insert.
const MOST_INSERTS: u64 = 10_000_000_000;

/// Our node beside other servers, the same load in turn
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Others: redis, memcached, echo, or a quoted command line that holds {port}
    #[arg(long, default_value = "redis", value_name = "LIST")]
    against: String,
    #[command(flatten)]
    place: PlaceArgs,
    /// Rounds
    #[arg(long, default_value = "5", value_parser = count, value_name = "COUNT")]
    rounds: usize,
    /// Length of each measurement
    #[arg(long, default_value = "2", value_parser = units::duration, value_name = "TIME")]
    seconds: Duration,
    /// Load before each measurement
    #[arg(long, default_value = "300ms", value_parser = units::duration, value_name = "TIME")]
    warmup: Duration,
    /// Connections to each server
    #[arg(long, short, default_value = "50", value_parser = count, value_name = "COUNT")]
    connections: usize,
    /// Requests in flight per connection, one series of rounds each
    #[arg(long, default_value = "1,16,64", value_delimiter = ',', value_parser = count, value_name = "LIST")]
    pipelines: Vec<usize>,
    /// Operations, one series of rounds each; mixes are written get=95+set=5
    #[arg(long, default_value = "get,set", value_delimiter = ',', value_parser = operation, value_name = "LIST")]
    ops: Vec<Mix>,
    #[command(flatten)]
    data: DataArgs,
    /// No progress
    #[arg(long, short)]
    quiet: bool,
    /// Tell the result as JSON
    #[arg(long)]
    json: bool,
}

fn operation(text: &str) -> Result<Mix, String> {
    text.replace('+', ",").parse()
}

/// What one server did with one operation and pipeline, one figure per round.
#[derive(Clone, Debug, Default)]
struct Rounds {
    rates: Vec<f64>,
    p99_us: Vec<f64>,
    errors: u64,
}

/// One operation and pipeline, a place per server; ours is the first.
#[derive(Clone, Debug)]
struct Series {
    operation: String,
    pipeline: usize,
    servers: Vec<Rounds>,
}

#[derive(Debug, Serialize)]
struct Row {
    operation: String,
    pipeline: usize,
    server: String,
    median_per_second: f64,
    least_per_second: f64,
    greatest_per_second: f64,
    rounds: Vec<f64>,
    p99_us: f64,
    errors: u64,
    /// How many times theirs ours is; 1 for ours.
    ours_to_theirs: f64,
}

/// Figures of each server, in the order of measuring, from the rounds that were finished.
fn rows(names: &[String], series: &[Series]) -> Vec<Row> {
    let mut rows = Vec::new();
    for series in series {
        let ours = median(&series.servers[0].rates);
        for (name, rounds) in names.iter().zip(&series.servers).filter(|(_, rounds)| !rounds.rates.is_empty()) {
            let middle = median(&rounds.rates);
            let (least, greatest) = spread(&rounds.rates);
            rows.push(Row {
                operation: series.operation.clone(),
                pipeline: series.pipeline,
                server: name.clone(),
                median_per_second: middle,
                least_per_second: least,
                greatest_per_second: greatest,
                rounds: rounds.rates.clone(),
                p99_us: median(&rounds.p99_us),
                errors: rounds.errors,
                ours_to_theirs: if middle > 0.0 { ours / middle } else { 0.0 },
            });
        }
    }
    rows
}

fn text(rows: &[Row]) -> String {
    let mut table =
        Table::new(["operation", "pipeline", "server", "median", "min–max", "p99", "ours/theirs", "errors"]);
    for (at, row) in rows.iter().enumerate() {
        let first = at == 0 || (&rows[at - 1].operation, rows[at - 1].pipeline) != (&row.operation, row.pipeline);
        let (operation, pipeline) = match first {
            true => (row.operation.clone(), row.pipeline.to_string()),
            false => (String::new(), String::new()),
        };
        table.row([
            operation,
            pipeline,
            row.server.clone(),
            units::rate(row.median_per_second),
            format!("{}–{}", units::count(row.least_per_second), units::count(row.greatest_per_second)),
            units::latency(row.p99_us),
            if row.ours_to_theirs > 0.0 { units::ratio(row.ours_to_theirs) } else { "–".into() },
            if row.errors > 0 { row.errors.to_string() } else { String::new() },
        ]);
    }
    table.to_string()
}

/// Names that tell the servers apart.
fn names(recipes: &[Recipe]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for recipe in recipes {
        let same = names.iter().filter(|name| name.split('#').next() == Some(&recipe.name)).count();
        names.push(if same == 0 { recipe.name.clone() } else { format!("{}#{}", recipe.name, same + 1) });
    }
    names
}

/// A server and the connections to it. The fleet goes first.
struct Rival {
    fleet: Fleet,
    _server: Server,
}

impl Args {
    fn start(&self, recipes: &[Recipe], progress: Progress) -> Result<Vec<Rival>, Failure> {
        let inserts = if self.ops.iter().any(|mix| mix.has(Kind::Insert)) { MOST_INSERTS } else { 0 };
        let mut rivals = Vec::with_capacity(recipes.len());
        for recipe in recipes {
            let server = Server::start(recipe, &self.place.server_core.0)?;
            let mut fleet = Fleet::connect(Target {
                addrs: vec![server.addr],
                protocol: recipe.protocol,
                password: None,
                connections: self.connections,
                threads: self.place.client_core.0.len(),
                pins: self.place.client_core.0.clone(),
                requests: self.data.requests(recipe.protocol, self.data.keys + inserts)?,
                keys: self.data.keys,
                distribution: crate::distribution::Distribution::Uniform,
                check: false,
                sleeps: false,
                seed: 1,
            })?;
            fleet.load(1, progress)?;
            rivals.push(Rival { fleet, _server: server });
        }
        Ok(rivals)
    }

    fn measure(&self, names: &[String], rivals: &mut [Rival], progress: Progress) -> Result<Vec<Series>, Failure> {
        let mut all = Vec::new();
        for mix in &self.ops {
            for &pipeline in &self.pipelines {
                all.push(Series {
                    operation: mix.to_string(),
                    pipeline,
                    servers: vec![Rounds::default(); rivals.len()],
                });
                let series = all.last_mut().expect("just pushed");
                for round in 0..self.rounds {
                    for turn in 0..rivals.len() {
                        let at = (round + turn) % rivals.len();
                        let label =
                            format!("{mix}, pipeline {pipeline}, round {}/{}: {}", round + 1, self.rounds, names[at]);
                        let mut run =
                            Run { label, mix: mix.clone(), pipeline, rate: None, limit: Limit::Time(self.warmup) };
                        if !self.warmup.is_zero() {
                            rivals[at].fleet.run(&run, Progress::unless(true))?;
                        }
                        run.limit = Limit::Time(self.seconds);
                        let report = rivals[at].fleet.run(&run, progress)?;
                        if interrupt::requested() {
                            return Ok(all);
                        }
                        let rounds = &mut series.servers[at];
                        rounds.rates.push(report.rate);
                        rounds.p99_us.push(report.all().at_us(0.99));
                        rounds.errors += report.error_count();
                    }
                }
            }
        }
        Ok(all)
    }
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let mut recipes = vec![Recipe::ours(args.place.node.as_deref())?];
    for word in split_list(&args.against) {
        let command = match word.as_bytes() {
            [b'\'', inner @ .., b'\''] | [b'"', inner @ .., b'"'] => String::from_utf8_lossy(inner).into_owned(),
            _ => word,
        };
        recipes.push(Recipe::other(&command, args.place.server_core.0.len())?);
    }
    let names = names(&recipes);
    let progress = Progress::unless(args.quiet);
    let mut rivals = args.start(&recipes, progress)?;
    let series = args.measure(&names, &mut rivals, progress)?;
    drop(rivals);
    let rows = rows(&names, &series);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows).expect("figures are plain data"));
        return Ok(());
    }
    println!(
        "servers on core {:?}, generator on {:?}, {} connections, {} keys of {}, values of {}, {} rounds of {} s\n",
        args.place.server_core.0,
        args.place.client_core.0,
        args.connections,
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
    use super::*;

    fn rounds(rates: &[f64]) -> Rounds {
        Rounds { rates: rates.to_vec(), p99_us: vec![100.0; rates.len()], errors: 0 }
    }

    #[test]
    fn rows_are_medians_beside_ours() {
        let names = ["gridkv".to_owned(), "redis".to_owned()];
        let series = [Series {
            operation: "get".into(),
            pipeline: 16,
            servers: vec![rounds(&[3e6, 1e6, 2e6]), rounds(&[1e6, 0.9e6, 1.2e6])],
        }];
        let rows = rows(&names, &series);
        assert_eq!((rows[0].median_per_second, rows[0].ours_to_theirs), (2e6, 1.0));
        assert_eq!((rows[1].least_per_second, rows[1].greatest_per_second), (0.9e6, 1.2e6));
        assert_eq!(rows[1].ours_to_theirs, 2.0);
        let text = text(&rows);
        assert!(text.contains("2.00x") && text.contains("1.00 M–3.00 M"), "{text}");
        assert_eq!(text.matches("get").count(), 1, "the operation is named once:\n{text}");
    }

    #[test]
    fn what_was_not_measured_yet_is_left_out() {
        let names = ["gridkv".to_owned(), "redis".to_owned()];
        let series = [Series { operation: "get".into(), pipeline: 1, servers: vec![rounds(&[]), rounds(&[1e6])] }];
        let rows = rows(&names, &series);
        assert_eq!((rows.len(), rows[0].server.as_str(), rows[0].ours_to_theirs), (1, "redis", 0.0));
    }

    #[test]
    fn equal_names_are_numbered() {
        let recipe = |word| Recipe::other(word, 1).unwrap();
        let recipes = [recipe("sh -c {port}"), recipe("echo"), recipe("sh -c {port}")];
        assert_eq!(names(&recipes), ["sh", "echo", "sh#2"]);
    }

    #[test]
    fn mixes_are_operations_too() {
        assert_eq!(operation("get=95+set=5"), "get=95,set=5".parse());
        assert!(operation("lpush").is_err());
    }
}
