//! Runs the simulator over many seeds, and prints what it found; `scripts/sim` calls it.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use gridkv_cluster::planted::{Bug, Planted};
use gridkv_cluster::sim::history::Rule;
use gridkv_cluster::sim::options::{Control, Options};
use gridkv_cluster::sim::{self, Run, forged};

/// Faults that each seed has to see, at least.
const FAULTS: u64 = 12;
/// Operations of each seed about which something is promised, at least.
const CHECKED: u64 = 5;

/// Whole clusters in one thread, under virtual time, from one seed.
#[derive(Parser, Debug)]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 500)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    start: u64,
    /// Run this seed alone, and tell more.
    #[arg(long)]
    seed: Option<u64>,
    /// Simulated seconds of faults in each run.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Threads; each run has one.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Who decides on the map in every seed: `authority` or `planes`. Each seed draws it otherwise.
    #[arg(long)]
    control: Option<String>,
    /// Break this rule on purpose.
    #[arg(long)]
    bug: Option<String>,
    /// Break each rule in turn; each must be noticed.
    #[arg(long)]
    planted: bool,
    /// Seeds that a bug on purpose may take to be found.
    #[arg(long, default_value_t = 2000)]
    most: u64,
    /// Stop at the first seed that fails.
    #[arg(long)]
    first: bool,
    /// Events that a drawing shows.
    #[arg(long, default_value_t = 200)]
    shown: usize,
    /// Draw this shard alone.
    #[arg(long)]
    shard: Option<u16>,
    /// Print the last events of a failing seed even when there are many seeds.
    #[arg(short, long)]
    verbose: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // A run that panics is caught and reported; the message would only be in the way.
    std::panic::set_hook(Box::new(|_| {}));
    if let Some(seed) = args.seed {
        let planted = args.bug.as_deref().map_or(Planted::default(), |name| Planted::with(bug(name)));
        return single(seed, &args, planted);
    }
    if args.planted {
        return planted(&args);
    }
    let blind = forged::blind_spots(1000);
    blind.iter().take(5).for_each(|spot| println!("checkers: {spot}"));
    println!("checkers: 1000 wrong histories, {} blind spots", blind.len());
    let planted = args.bug.as_deref().map_or(Planted::default(), |name| Planted::with(bug(name)));
    let failed = many(&args, planted);
    match failed == 0 && blind.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn draw(seed: u64, args: &Args) -> Options {
    let options = Options::draw(seed, args.seconds);
    match args.control.as_deref() {
        None => options,
        Some("planes") if options.control == Control::Authority => options.with_planes(),
        Some("authority") if options.control == Control::Planes => options.with_authority(),
        Some("planes" | "authority") => options,
        Some(name) => {
            eprintln!("--control is authority or planes, not {name}");
            std::process::exit(2)
        }
    }
}

fn bug(name: &str) -> Bug {
    let found = Bug::ALL.into_iter().find(|bug| format!("{bug:?}").eq_ignore_ascii_case(name));
    found.unwrap_or_else(|| {
        eprintln!("there is no bug {name}; there are {:?}", Bug::ALL);
        std::process::exit(2)
    })
}

fn single(seed: u64, args: &Args, planted: Planted) -> ExitCode {
    let options = draw(seed, args);
    show(&options);
    let run = sim::run(&options, planted);
    println!("{:#?}\nrun {:016x}", run.stats, run.hash);
    if run.violation.is_none() {
        println!("seed {seed}: no violation");
        return ExitCode::SUCCESS;
    }
    explain(args, &options, planted, &run);
    ExitCode::FAILURE
}

fn show(options: &Options) {
    println!("{:?}", Options { faults: Vec::new(), ..options.clone() });
    options.faults.iter().for_each(|fault| println!("  {:>6} ms  {:?}", fault.at, fault.kind));
}

/// Makes a failure small and draws it.
fn explain(args: &Args, options: &Options, planted: Planted, run: &Run) {
    let Some(violation) = &run.violation else { return };
    println!("seed {}: {violation}", options.seed);
    let (small, runs) = sim::shrink(options, planted, violation.rule, 150);
    let again = sim::run(&small, planted);
    println!("after {runs} runs: {} of {} faults are needed", small.faults.len(), options.faults.len());
    show(&small);
    println!("{}", sim::draw(&small, planted, &again, args.shard, args.shown));
    if let Some(violation) = &again.violation {
        println!("{violation}");
    }
}

#[derive(Default)]
struct Sum {
    runs: u64,
    time: u64,
    events: u64,
    messages: u64,
    changes: u64,
    checked: u64,
    ended: [u64; 3],
    faults: BTreeMap<&'static str, u64>,
    failures: BTreeMap<&'static str, u64>,
    fewest: Option<(u64, u64)>,
    lost: u64,
    duplicated: u64,
    planes: u64,
    repeated: u64,
    settled: Vec<u64>,
    failed: Vec<(u64, String)>,
}

fn many(args: &Args, planted: Planted) -> usize {
    let begun = Instant::now();
    let (next, sum) = (AtomicU64::new(args.start), Mutex::new(Sum::default()));
    let end = args.start + args.seeds;
    std::thread::scope(|scope| {
        for _ in 0..args.threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || args.first && !sum.lock().expect("no panic").failed.is_empty() {
                        return;
                    }
                    let options = draw(seed, args);
                    let run = sim::run(&options, planted);
                    // One in twenty runs twice.
                    let differs = seed.is_multiple_of(20) && sim::run(&options, planted).hash != run.hash;
                    let mut sum = sum.lock().expect("no panic");
                    sum.planes += u64::from(options.control == Control::Planes);
                    add(&mut sum, seed, &run, differs, args.seconds);
                    if let (Some(violation), true) = (&run.violation, true) {
                        println!("seed {seed}: {violation}");
                        if args.verbose {
                            explain(args, &options, planted, &run);
                        }
                    }
                }
            });
        }
    });
    let mut sum = sum.into_inner().expect("no panic");
    sum.settled.sort_unstable();
    let hours = sum.time as f64 / 3.6e9;
    println!("{} seeds, {hours:.1} simulated hours, {:.1} s", sum.runs, begun.elapsed().as_secs_f64());
    println!("events {}, messages {}, map changes {}", sum.events, sum.messages, sum.changes);
    let [done, failed, unknown] = sum.ended;
    println!("operations: {done} done, {failed} failed, {unknown} unknown; {} checked", sum.checked);
    println!("failed because: {:?}", sum.failures);
    let (fewest, seed) = sum.fewest.unwrap_or_default();
    println!("faults: {:?}, at least {fewest} in a run (seed {seed})", sum.faults);
    println!(
        "messages lost {}, delivered twice {}; with control planes {} seeds",
        sum.lost, sum.duplicated, sum.planes
    );
    let at = |part: usize| sum.settled.get(sum.settled.len() * part / 100).copied().unwrap_or(0) as f64 / 1e6;
    println!("from healing to rest: half {:.1} s, 99 % {:.1} s", at(50), at(99));
    println!("run twice and equal: {}", sum.repeated);
    println!("violations: {}", sum.failed.len());
    sum.failed.len()
}

fn add(sum: &mut Sum, seed: u64, run: &Run, differs: bool, seconds: u64) {
    sum.runs += 1;
    sum.time += run.stats.time;
    sum.events += run.stats.events;
    sum.messages += run.stats.messages;
    sum.changes += run.stats.changes;
    sum.checked += run.stats.checked;
    sum.ended.iter_mut().zip(run.stats.ended).for_each(|(sum, n)| *sum += n);
    run.stats.failures.iter().for_each(|(name, count)| *sum.failures.entry(name).or_default() += count);
    let mut faults = 0;
    for (name, count) in &run.stats.faults {
        *sum.faults.entry(name).or_default() += count;
        faults += count;
    }
    if run.violation.is_none() {
        sum.fewest = Some(sum.fewest.map_or((faults, seed), |fewest| fewest.min((faults, seed))));
    }
    sum.lost += run.stats.lost;
    sum.duplicated += run.stats.duplicated;
    sum.settled.push(run.stats.settled);
    if let Some(violation) = &run.violation {
        sum.failed.push((seed, violation.to_string()));
    }
    // What hardly happened proves nothing.
    if run.violation.is_none() && seconds >= 60 && (faults < FAULTS || run.stats.checked < CHECKED) {
        println!("seed {seed}: only {faults} faults and {} checked operations", run.stats.checked);
        sum.failed.push((seed, "too little happened".into()));
    }
    if differs {
        println!("seed {seed}: two runs differ");
        sum.failed.push((seed, "two runs differ".into()));
    }
    sum.repeated += u64::from(seed.is_multiple_of(20) && !differs);
}

fn planted(args: &Args) -> ExitCode {
    let mut missed = 0;
    for bug in Bug::ALL {
        let begun = Instant::now();
        let next = AtomicU64::new(args.start);
        let found: Mutex<Option<(u64, String)>> = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..args.threads.max(1) {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= args.start + args.most || found.lock().expect("no panic").is_some() {
                            return;
                        }
                        // Seen where control planes adopt maps at their own pace, and hardly ever in the other worlds.
                        let options = match bug {
                            Bug::HastyMove if args.control.is_none() => draw(seed, args).with_planes(),
                            _ => draw(seed, args),
                        };
                        let run = sim::run(&options, Planted::with(bug));
                        if let Some(violation) = run.violation.filter(|v| Rule::broken_by(bug).contains(&v.rule)) {
                            let mut found = found.lock().expect("no panic");
                            if found.as_ref().is_none_or(|(known, _)| seed < *known) {
                                *found = Some((seed, violation.to_string()));
                            }
                        }
                    }
                });
            }
        });
        let name = format!("{bug:?}");
        let seconds = begun.elapsed().as_secs_f64();
        match found.into_inner().expect("no panic") {
            Some((seed, what)) => {
                let what: String = what.chars().take(90).collect();
                println!("{name:<20} found by seed {seed} in {seconds:.1} s: {what}");
            }
            None => {
                missed += 1;
                println!("{name:<20} NOT FOUND in {} seeds, {seconds:.1} s", args.most);
            }
        }
    }
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
