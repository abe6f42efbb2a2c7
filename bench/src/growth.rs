//! `gridkv-bench growth`: what a client feels while a table grows to many times its keys.
//!
//! ```text
//!   peak     a server with the first keys, reads and writes in equal parts, closed loop; then it ends
//!   growth   the same server anew, an open loop at half of the least peak: half reads, half new keys, until it has
//!            all keys; a rehash that stops the world delays the requests that were due meanwhile, and they count
//! ```
//!
//! All servers get the same rate, so that their latencies can be compared.

use std::time::Duration;

use serde::Serialize;

use crate::child::{Recipe, Server, split_list};
use crate::distribution::Distribution;
use crate::failure::Failure;
use crate::fleet::{Fleet, Run, Target};
use crate::interrupt;
use crate::options::{DataArgs, PlaceArgs, SizeArgs, count};
use crate::pace::Arrivals;
use crate::progress::Progress;
use crate::report::{Figures, Report};
use crate::table::Table;
use crate::units;
use crate::worker::Limit;
use crate::workload::{Kind, Mix};

/// Pauses while a table grows, at a fixed rate
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Others: redis, memcached, or a quoted command line that holds {port}
    #[arg(long, default_value = "", hide_default_value = true, value_name = "LIST")]
    against: String,
    #[command(flatten)]
    place: PlaceArgs,
    /// Keys at the beginning
    #[arg(long, default_value = "1m", value_parser = count, value_name = "COUNT")]
    from: usize,
    /// Keys at the end
    #[arg(long, default_value = "10m", value_parser = count, value_name = "COUNT")]
    to: usize,
    /// Requests per second [default: half of the least peak, measured first]
    #[arg(long, short, value_parser = count, value_name = "PER SECOND")]
    rate: Option<usize>,
    /// Length of measuring the peak
    #[arg(long, default_value = "2", value_parser = units::duration, value_name = "TIME")]
    peak_seconds: Duration,
    /// Connections
    #[arg(long, short, default_value = "50", value_parser = count, value_name = "COUNT")]
    connections: usize,
    /// The most requests in flight per connection
    #[arg(long, short = 'P', default_value = "16", value_parser = count, value_name = "COUNT")]
    pipeline: usize,
    #[command(flatten)]
    sizes: SizeArgs,
    /// No progress
    #[arg(long, short)]
    quiet: bool,
    /// Tell the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Told {
    server: String,
    peak_per_second: Option<f64>,
    due_per_second: f64,
    from_keys: u64,
    to_keys: u64,
    interrupted: bool,
    #[serde(flatten)]
    figures: Figures,
}

/// What one server did.
struct Grown {
    name: String,
    peak: Option<f64>,
    report: Report,
}

fn text(rate: f64, grown: &[Grown]) -> String {
    let mut table = Table::new(["server", "operation", "rate", "p50", "p99", "p99.9", "max", "longest pause"]);
    for server in grown {
        let share = server.report.rate / server.report.operations().max(1) as f64;
        for (at, kind) in [Kind::Get, Kind::Insert].into_iter().enumerate() {
            let latencies = server.report.of(kind);
            let p = latencies.percentiles();
            let pause = server.report.longest_pause.as_secs_f64() * 1e6;
            table.row([
                if at == 0 { server.name.clone() } else { String::new() },
                kind.name().into(),
                units::rate(share * latencies.count() as f64),
                units::latency(p.p50_us),
                units::latency(p.p99_us),
                units::latency(p.p999_us),
                units::latency(p.max_us),
                if at == 0 { units::latency(pause) } else { String::new() },
            ]);
        }
    }
    let mut text = format!("{} due\n\n{table}\n", units::rate(rate));
    for server in grown {
        let own = server.report.own_pause.as_secs_f64() * 1e6;
        let peak = server.peak.map(|peak| format!("peak {}, ", units::rate(peak))).unwrap_or_default();
        text += &format!("{}: {peak}the generator itself stood still for up to {}", server.name, units::latency(own));
        if server.report.misses > 0 {
            text += &format!(", {} reads came before their key", server.report.misses);
        }
        for (prefix, count) in &server.report.errors {
            text += &format!(", {count} operations ended with {prefix}");
        }
        text.push('\n');
    }
    text
}

impl Args {
    /// A server with the first keys, and a load for it.
    fn start(&self, recipe: &Recipe, progress: Progress) -> Result<(Fleet, Server), Failure> {
        let server = Server::start(recipe, &self.place.server_core.0)?;
        let data = DataArgs { keys: self.from as u64, sizes: self.sizes.clone() };
        let mut fleet = Fleet::connect(Target {
            addrs: vec![server.addr],
            protocol: recipe.protocol,
            password: None,
            connections: self.connections,
            threads: self.place.client_core.0.len(),
            pins: self.place.client_core.0.clone(),
            // Which of the last operations are inserts is drawn, so a few more keys than asked for may come.
            requests: data.requests(recipe.protocol, 2 * self.to as u64)?,
            keys: self.from as u64,
            distribution: Distribution::Uniform,
            check: false,
            sleeps: false,
            seed: 1,
        })?;
        fleet.load(1, progress)?;
        Ok((fleet, server))
    }

    fn peak(&self, recipe: &Recipe, progress: Progress) -> Result<f64, Failure> {
        let (mut fleet, _server) = self.start(recipe, progress)?;
        let run = Run {
            label: format!("{}: peak", recipe.name),
            mix: Mix::new(vec![(Kind::Get, 1), (Kind::Set, 1)]).map_err(Failure::Usage)?,
            pipeline: self.pipeline,
            rate: None,
            limit: Limit::Time(self.peak_seconds),
        };
        Ok(fleet.run(&run, progress)?.rate)
    }

    fn grow(&self, recipe: &Recipe, rate: f64, progress: Progress) -> Result<Report, Failure> {
        let (mut fleet, _server) = self.start(recipe, progress)?;
        let run = Run {
            label: format!("{}: growing", recipe.name),
            mix: Mix::new(vec![(Kind::Get, 1), (Kind::Insert, 1)]).map_err(Failure::Usage)?,
            pipeline: self.pipeline,
            rate: Some((rate, Arrivals::Poisson)),
            limit: Limit::Count(2 * (self.to - self.from) as u64),
        };
        fleet.run(&run, progress)
    }
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    if args.from >= args.to {
        return Err(Failure::Usage("--to must be above --from".into()));
    }
    let progress = Progress::unless(args.quiet);
    let mut recipes = vec![Recipe::ours(args.place.node.as_deref())?];
    for word in split_list(&args.against) {
        recipes.push(Recipe::other(word.trim_matches(['\'', '"']), args.place.server_core.0.len())?);
    }
    let mut peaks = Vec::new();
    if args.rate.is_none() {
        for recipe in &recipes {
            peaks.push(args.peak(recipe, progress)?);
        }
    }
    let rate = match args.rate {
        Some(rate) => rate as f64,
        None => peaks.iter().copied().fold(f64::INFINITY, f64::min) / 2.0,
    };
    let mut grown = Vec::new();
    for (at, recipe) in recipes.iter().enumerate() {
        if interrupt::requested() {
            break;
        }
        let report = args.grow(recipe, rate, progress)?;
        grown.push(Grown { name: recipe.name.clone(), peak: peaks.get(at).copied(), report });
    }
    if args.json {
        let told: Vec<Told> = grown
            .iter()
            .map(|server| Told {
                server: server.name.clone(),
                peak_per_second: server.peak,
                due_per_second: rate,
                from_keys: args.from as u64,
                to_keys: args.to as u64,
                interrupted: interrupt::requested(),
                figures: server.report.figures(),
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&told).expect("figures are plain data"));
        return Ok(());
    }
    println!(
        "from {} to {} keys of {}, values of {}, {} connections, half reads, half new keys",
        units::count(args.from as f64),
        units::count(args.to as f64),
        args.sizes.key_size,
        args.sizes.value_size,
        args.connections,
    );
    if interrupt::requested() {
        println!("interrupted; so far:");
    }
    print!("{}", text(rate, &grown));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_server_has_a_row_per_operation() {
        let mut report = Report::new();
        report.record(Kind::Get, 50_000, 90);
        report.record(Kind::Insert, 70_000, 110);
        report.rate = 2000.0;
        report.longest_pause = Duration::from_millis(12);
        report.errors_by("OOM".into(), 3);
        let text = text(2000.0, &[Grown { name: "redis".into(), peak: Some(4000.0), report }]);
        for part in ["2.00 k/s due", "900/s", "1.10 k/s", "12.0 ms", "peak 4.00 k/s", "3 operations ended with OOM"] {
            assert!(text.contains(part), "no '{part}' in\n{text}");
        }
    }
}
