//! `gridkv-bench resp`: load on one server, whoever it is, or on several that hold the same data.
//!
//! In order: connect, write every key (when the mix reads, or when asked to), warm up, measure, tell.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use serde::Serialize;

use crate::distribution::Distribution;
use crate::failure::Failure;
use crate::fleet::{Fleet, Run, Target};
use crate::interrupt;
use crate::options::{Cores, DataArgs, HandArgs, cores, count};
use crate::pace::Arrivals;
use crate::progress::Progress;
use crate::report::{Figures, Report};
use crate::requests::Protocol;
use crate::units;
use crate::worker::Limit;
use crate::workload::{Kind, Mix};

/// New keys that a run limited by time may insert; key lengths must tell them apart.
const MOST_INSERTS: u64 = 1_000_000_000;

/// Load a server that speaks RESP or memcached's text protocol
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// The server; of several, such as the nodes of a cluster, connections go to each in turn
    #[arg(long, short, default_value = "127.0.0.1:6379", value_delimiter = ',', value_name = "HOST:PORT")]
    addr: Vec<String>,
    /// What it speaks: resp or memcached
    #[arg(long, default_value = "resp")]
    protocol: Protocol,
    /// Say this password on every connection
    #[arg(long, env = "GRIDKV_PASSWORD", hide_env_values = true)]
    password: Option<String>,
    #[command(flatten)]
    hands: HandArgs,
    /// Cores of the generator's threads, such as 1 or 1-3
    #[arg(long, value_parser = cores, value_name = "CPULIST")]
    pin: Option<Cores>,
    /// Requests in flight per connection
    #[arg(long, short = 'P', default_value = "1", value_parser = count, value_name = "COUNT")]
    pipeline: usize,
    #[command(flatten)]
    data: DataArgs,
    /// Which keys: uniform, zipf(:SKEW), latest(:SKEW) [default: uniform, or that of the YCSB workload]
    #[arg(long, short)]
    distribution: Option<Distribution>,
    /// What to do: kinds out of get, set, insert, rmw and del with weights, such as get=95,set=5, or
    /// READS:WRITES, such as 9:1
    #[arg(long, short, default_value = "get=95,set=5", conflicts_with = "ycsb")]
    mix: Mix,
    /// A YCSB core workload: a, b, c, d or f
    #[arg(long, value_name = "LETTER")]
    ycsb: Option<String>,
    /// Open loop: this many requests per second whatever the server does, latency from when each was due
    #[arg(long, short, value_parser = count, value_name = "PER SECOND")]
    rate: Option<usize>,
    /// Spacing of an open loop's requests: even or poisson
    #[arg(long, default_value = "poisson", requires = "rate")]
    arrivals: Arrivals,
    /// End after this many operations
    #[arg(long, short = 'n', value_parser = count, value_name = "COUNT", conflicts_with = "seconds")]
    requests: Option<usize>,
    /// End after this time, such as 10 or 500ms [default: 10]
    #[arg(long, short, value_parser = units::duration, value_name = "TIME")]
    seconds: Option<Duration>,
    /// Load without measuring first [default: 500ms, or none with --requests]
    #[arg(long, value_parser = units::duration, value_name = "TIME")]
    warmup: Option<Duration>,
    /// Write every key once first; the default when the mix reads
    #[arg(long, conflicts_with = "no_load")]
    load: bool,
    /// Do not write the keys first
    #[arg(long)]
    no_load: bool,
    /// Compare every value read with the one written
    #[arg(long)]
    check: bool,
    /// Seed of the random choices
    #[arg(long, default_value = "1")]
    seed: u64,
    /// No progress
    #[arg(long, short)]
    quiet: bool,
    /// Tell the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Told {
    addr: String,
    protocol: String,
    connections: usize,
    threads: usize,
    pipeline: usize,
    keys: u64,
    key_size: String,
    value_size: String,
    distribution: String,
    mix: String,
    rate: Option<usize>,
    loaded_per_second: Option<f64>,
    interrupted: bool,
    #[serde(flatten)]
    figures: Figures,
}

/// A name and a port as an address.
pub(crate) fn resolve(text: &str) -> Result<SocketAddr, Failure> {
    let found = text.to_socket_addrs().map_err(Failure::io(format!("looking up {text}")))?;
    found.into_iter().next().ok_or_else(|| Failure::Usage(format!("{text} has no address")))
}

/// What was measured, and how long writing the keys took, if they were written.
struct Measured {
    report: Report,
    loaded: Option<Report>,
}

impl Args {
    fn workload(&self) -> Result<(Mix, Distribution), Failure> {
        let (mix, usual) = match &self.ycsb {
            Some(letter) => Mix::ycsb(letter).map_err(Failure::Usage)?,
            None => (self.mix.clone(), Distribution::Uniform),
        };
        if self.protocol == Protocol::Memcached && self.password.is_some() {
            return Err(Failure::Usage("the protocol of memcached has no password".into()));
        }
        Ok((mix, self.distribution.unwrap_or(usual)))
    }

    fn measure(&self, mix: &Mix, distribution: Distribution) -> Result<Measured, Failure> {
        let progress = Progress::unless(self.quiet);
        let inserts = match (mix.has(Kind::Insert), self.requests) {
            (false, _) => 0,
            (true, Some(requests)) => requests as u64,
            (true, None) => MOST_INSERTS,
        };
        let mut fleet = Fleet::connect(Target {
            addrs: self.addr.iter().map(|addr| resolve(addr)).collect::<Result<_, _>>()?,
            protocol: self.protocol,
            password: self.password.clone(),
            connections: self.hands.connections,
            threads: self.hands.threads,
            pins: self.pin.clone().unwrap_or_default().0,
            requests: self.data.requests(self.protocol, self.data.keys + inserts)?,
            keys: self.data.keys,
            distribution,
            check: self.check,
            sleeps: false,
            seed: self.seed,
        })?;
        let loads = self.load || (mix.reads() && !self.no_load);
        let loaded = if loads { Some(fleet.load(self.pipeline, progress)?) } else { None };
        let mut run = Run {
            label: "warming up".into(),
            mix: mix.clone(),
            pipeline: self.pipeline,
            rate: self.rate.map(|rate| (rate as f64, self.arrivals)),
            limit: Limit::Time(self.warmup.unwrap_or(match self.requests {
                Some(_) => Duration::ZERO,
                None => Duration::from_millis(500),
            })),
        };
        if run.limit != Limit::Time(Duration::ZERO) && !interrupt::requested() {
            fleet.run(&run, progress)?;
        }
        run.label = format!("measuring {mix}");
        run.limit = match self.requests {
            Some(requests) => Limit::Count(requests as u64),
            None => Limit::Time(self.seconds.unwrap_or(Duration::from_secs(10))),
        };
        let report = if interrupt::requested() { Report::new() } else { fleet.run(&run, progress)? };
        Ok(Measured { report, loaded })
    }
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let (mix, distribution) = args.workload()?;
    let Measured { report, loaded } = args.measure(&mix, distribution)?;
    let loaded = loaded.map(|report| report.rate);
    if args.json {
        let told = Told {
            addr: args.addr.join(","),
            protocol: args.protocol.to_string(),
            connections: args.hands.connections,
            threads: args.hands.threads,
            pipeline: args.pipeline,
            keys: args.data.keys,
            key_size: args.data.sizes.key_size.to_string(),
            value_size: args.data.sizes.value_size.to_string(),
            distribution: distribution.to_string(),
            mix: mix.to_string(),
            rate: args.rate,
            loaded_per_second: loaded,
            interrupted: interrupt::requested(),
            figures: report.figures(),
        };
        println!("{}", serde_json::to_string_pretty(&told).expect("figures are plain data"));
        return Ok(());
    }
    println!(
        "{}: {} connections, {} thread(s), pipeline {}, {} keys of {}, values of {} ({} in all), {distribution}, {mix}{}",
        args.addr.join(","),
        args.hands.connections,
        args.hands.threads,
        args.pipeline,
        units::count(args.data.keys as f64),
        args.data.sizes.key_size,
        args.data.sizes.value_size,
        units::bytes(args.data.sizes.bytes(args.data.keys)),
        args.rate.map(|rate| format!(", {} due", units::rate(rate as f64))).unwrap_or_default(),
    );
    if let Some(rate) = loaded {
        println!("the keys were written at {}", units::rate(rate));
    }
    if interrupt::requested() {
        println!("interrupted; so far:");
    }
    print!("\n{}", report.text());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use clap::Parser;

    use super::*;
    use crate::echo::Echo;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(line: &str) -> Args {
        Line::try_parse_from(format!("resp --quiet {line}").split_whitespace()).unwrap().args
    }

    /// Measures an echo server that runs meanwhile.
    fn measured(line: &str) -> Result<Measured, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        let (tell, listening) = mpsc::channel();
        let told = Arc::clone(&stop);
        let server = std::thread::spawn(move || {
            let mut echo = Echo::listen("127.0.0.1:0".parse().unwrap(), 64).unwrap();
            tell.send(echo.addr()).unwrap();
            echo.serve(&told)
        });
        let args = args(&format!("--addr {} {line}", listening.recv().unwrap()));
        let (mix, distribution) = args.workload()?;
        let measured = args.measure(&mix, distribution);
        stop.store(true, Ordering::Relaxed);
        server.join().unwrap().unwrap();
        measured
    }

    #[test]
    fn every_request_is_counted_once() {
        let Measured { report, loaded } =
            measured("--threads 2 --connections 5 --pipeline 7 --keys 1k --requests 10001 --mix get=3,set=1").unwrap();
        assert_eq!(loaded.unwrap().of(Kind::Set).count(), 1000);
        assert_eq!(report.operations(), 10_001);
        assert_eq!(report.of(Kind::Get).count() + report.of(Kind::Set).count(), 10_001);
        assert!(report.of(Kind::Get).count() > report.of(Kind::Set).count());
        assert_eq!((report.error_count(), report.misses, report.wrong), (0, 0, 0));
        assert!(report.rate > 0.0 && report.elapsed > Duration::ZERO);
    }

    #[test]
    fn an_open_loop_and_operations_of_two_halves_are_counted_too() {
        let line = "--threads 2 --connections 3 --keys 100 --requests 2000 --mix rmw=1,insert=1,del=1 --no-load";
        for pace in ["--pipeline 4", "--pipeline 4 --rate 1m", "--rate 100k --arrivals even"] {
            let Measured { report, loaded } = measured(&format!("{line} {pace}")).unwrap();
            assert!(loaded.is_none());
            let counts = [Kind::Rmw, Kind::Insert, Kind::Del].map(|kind| report.of(kind).count());
            assert_eq!(counts.iter().sum::<u64>(), 2000, "{pace}: {counts:?}");
            assert!(counts.iter().all(|&count| count > 500), "{pace}: {counts:?}");
        }
    }

    #[test]
    fn values_of_other_keys_are_found_out() {
        // The echo server answers all GETs alike, so every value is wrong.
        let report = measured("--keys 1k --requests 1000 --mix get --check").unwrap().report;
        assert_eq!((report.operations(), report.wrong), (1000, 1000));
    }

    #[test]
    fn nobody_there_is_said_plainly() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let args = args(&format!("--addr {free}"));
        let (mix, distribution) = args.workload().unwrap();
        let failure = args.measure(&mix, distribution).err().unwrap().to_string();
        assert!(failure.starts_with(&format!("cannot connect to {free}: ")), "{failure}");
    }

    #[test]
    fn a_server_that_takes_no_more_clients_is_quoted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let args = args(&format!("--addr {} --connections 1", listener.local_addr().unwrap()));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            std::io::Write::write_all(&mut stream, b"-ERR max number of clients reached\r\n").unwrap();
            // Until the client goes: the reply must not be overtaken by a reset.
            let _ = std::io::Read::read_to_end(&mut stream, &mut Vec::new());
        });
        let (mix, distribution) = args.workload().unwrap();
        let failure = args.measure(&mix, distribution).err().unwrap().to_string();
        // It may come before the first request or, as its answer, after.
        assert!(failure.contains("refused: ERR"), "{failure}");
        server.join().unwrap();
    }

    #[test]
    fn a_server_that_hangs_up_is_a_failure_not_a_panic() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let args = args(&format!("--addr {} --connections 1", listener.local_addr().unwrap()));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            std::io::Read::read_exact(&mut stream, &mut [0; 100]).unwrap();
        });
        let (mix, distribution) = args.workload().unwrap();
        let failure = args.measure(&mix, distribution).err().unwrap();
        assert!(matches!(failure, Failure::HungUp { .. }), "{failure}");
        server.join().unwrap();
    }
}
