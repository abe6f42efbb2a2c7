//! All threads of a load: they connect together, run jobs together, and report to the one who shows progress.
//!
//! Between jobs the threads sleep on their channel while their connections stay open, so fleets of several servers can
//! wait for their turn without taking time from each other.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::distribution::{Distribution, KeyChooser};
use crate::failure::Failure;
use crate::pace::Arrivals;
use crate::pin;
use crate::progress::Progress;
use crate::random::Random;
use crate::report::Report;
use crate::requests::{Protocol, Requests};
use crate::worker::{Done, Job, Limit, Shared, Worker};
use crate::workload::{Kind, Mix};

/// How often progress is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// Requests in flight per connection while keys are written for the first time, at least.
const LOAD_PIPELINE: usize = 32;

/// Whom to load, and with how many hands.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// One server, or the nodes of a cluster: connections go to them in turn.
    pub(crate) addrs: Vec<SocketAddr>,
    pub(crate) protocol: Protocol,
    pub(crate) password: Option<String>,
    pub(crate) connections: usize,
    pub(crate) threads: usize,
    /// Cores of the threads, in turn; empty leaves them to the scheduler.
    pub(crate) pins: Vec<usize>,
    pub(crate) requests: Requests,
    /// Keys that exist once the load is written.
    pub(crate) keys: u64,
    pub(crate) distribution: Distribution,
    pub(crate) check: bool,
    /// Sleep instead of polling while there is nothing to do, for a load on cores that the servers need too.
    pub(crate) sleeps: bool,
    pub(crate) seed: u64,
}

/// One run of all threads together.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) label: String,
    pub(crate) mix: Mix,
    pub(crate) pipeline: usize,
    /// Requests per second of all threads; `None` is a closed loop.
    pub(crate) rate: Option<(f64, Arrivals)>,
    /// A count is that of all threads.
    pub(crate) limit: Limit,
}

struct Hand {
    jobs: Sender<Job>,
    done: Arc<Done>,
    thread: Option<JoinHandle<()>>,
}

type Outcome = Result<Option<Report>, Failure>;

/// The threads. Dropping a fleet ends them.
pub(crate) struct Fleet {
    hands: Vec<Hand>,
    outcomes: Receiver<Outcome>,
    shared: Arc<Shared>,
    connections: u64,
    chooser: KeyChooser,
    random: Random,
}

impl Fleet {
    /// Starts the threads; returns when all connections stand.
    pub(crate) fn connect(target: Target) -> Result<Fleet, Failure> {
        if target.addrs.is_empty() || target.connections == 0 || target.threads == 0 {
            return Err(Failure::Usage("a load needs at least one server, one connection and one thread".into()));
        }
        let threads = target.threads.min(target.connections);
        let shared = Arc::new(Shared {
            addrs: target.addrs,
            protocol: target.protocol,
            requests: target.requests,
            password: target.password,
            check: target.check,
            sleeps: target.sleeps,
            keys: target.keys,
            newest: AtomicU64::new(target.keys),
        });
        let (tell, outcomes) = mpsc::channel();
        let mut fleet = Fleet {
            hands: Vec::with_capacity(threads),
            outcomes,
            shared,
            connections: target.connections as u64,
            chooser: KeyChooser::new(target.distribution, target.keys, 0, 1),
            random: Random::new(target.seed, 0),
        };
        let mut first = 0;
        for index in 0..threads {
            let which = first..first + share(target.connections as u64, index, threads) as usize;
            first = which.end;
            let core = (!target.pins.is_empty()).then(|| target.pins[index % target.pins.len()]);
            let (jobs, orders) = mpsc::channel();
            let done = Arc::new(Done::default());
            let (shared, tell, its_done) = (Arc::clone(&fleet.shared), tell.clone(), Arc::clone(&done));
            let thread = std::thread::Builder::new()
                .name(format!("load-{index}"))
                .spawn(move || hand(core, which, shared, its_done, &orders, &tell))
                .map_err(Failure::io("starting a thread"))?;
            fleet.hands.push(Hand { jobs, done, thread: Some(thread) });
        }
        for _ in 0..threads {
            fleet.outcomes.recv().expect("every thread says how its start went")?;
        }
        Ok(fleet)
    }

    /// Writes every key once.
    pub(crate) fn load(&mut self, pipeline: usize, progress: Progress) -> Result<Report, Failure> {
        let run = Run {
            label: format!("writing {} keys", crate::units::count(self.shared.keys as f64)),
            mix: Mix::only(Kind::Set),
            pipeline: pipeline.max(LOAD_PIPELINE),
            rate: None,
            limit: Limit::Count(self.shared.keys),
        };
        let (keys, threads) = (self.shared.keys, self.hands.len() as u64);
        let report = self
            .start(&run, progress, |thread| KeyChooser::new(Distribution::Sequential, keys, thread as u64, threads))?;
        match report.errors.first_key_value() {
            Some((prefix, count)) => Err(Failure::Refused {
                addr: self.shared.addrs[0],
                reply: format!("{prefix} (for {count} of the first {keys} writes)"),
            }),
            None => Ok(report),
        }
    }

    /// Runs, and waits for the end.
    pub(crate) fn run(&mut self, run: &Run, progress: Progress) -> Result<Report, Failure> {
        let chooser = self.chooser.clone();
        self.start(run, progress, |_| chooser.clone())
    }

    fn start(
        &mut self,
        run: &Run,
        progress: Progress,
        chooser: impl Fn(usize) -> KeyChooser,
    ) -> Result<Report, Failure> {
        let threads = self.hands.len();
        for (index, hand) in self.hands.iter().enumerate() {
            let job = Job {
                mix: run.mix.clone(),
                chooser: chooser(index),
                pipeline: run.pipeline,
                rate: run.rate.map(|(rate, arrivals)| (rate / threads as f64, arrivals)),
                limit: match run.limit {
                    Limit::Time(length) => Limit::Time(length),
                    Limit::Count(count) => Limit::Count(share(count, index, threads)),
                },
                random: Random::new(self.random.next(), index as u64),
                window: self.connections * run.pipeline as u64,
            };
            hand.done.0.store(0, Ordering::Relaxed);
            // A thread that is gone has told why, which is read below.
            let _ = hand.jobs.send(job);
        }
        let start = Instant::now();
        let mut phase = progress.phase(run.label.clone());
        let mut sum = Report::new();
        let mut missing = threads;
        while missing > 0 {
            match self.outcomes.recv_timeout(LOOK) {
                Ok(outcome) => {
                    sum.add(&outcome?.unwrap_or_else(Report::new));
                    missing -= 1;
                }
                Err(RecvTimeoutError::Timeout) => {
                    let done = self.hands.iter().map(|hand| hand.done.0.load(Ordering::Relaxed)).sum();
                    let part = match run.limit {
                        Limit::Time(length) => start.elapsed().as_secs_f64() / length.as_secs_f64().max(1e-9),
                        Limit::Count(count) => done as f64 / count.max(1) as f64,
                    };
                    phase.show(part, done);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::Usage("a thread of the load ended before its time".into()));
                }
            }
        }
        Ok(sum)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for hand in &mut self.hands {
            // Closes the channel, which is what the thread waits on.
            hand.jobs = mpsc::channel().0;
        }
        for hand in &mut self.hands {
            if let Some(thread) = hand.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

/// What one thread does. Ends after its first failure or when no more jobs can come.
fn hand(
    core: Option<usize>,
    which: Range<usize>,
    shared: Arc<Shared>,
    done: Arc<Done>,
    orders: &Receiver<Job>,
    tell: &Sender<Outcome>,
) {
    let started = core.map_or(Ok(()), |core| pin::this_thread(&[core]));
    let mut worker = match started.and_then(|()| Worker::connect(shared, done, which)) {
        Ok(worker) => worker,
        Err(failure) => return tell.send(Err(failure)).unwrap_or(()),
    };
    if tell.send(Ok(None)).is_err() {
        return;
    }
    while let Ok(job) = orders.recv() {
        let outcome = worker.run(job).map(Some);
        let last = outcome.is_err();
        if tell.send(outcome).is_err() || last {
            return;
        }
    }
}

/// The part of `whole` that falls to one of `parts`.
fn share(whole: u64, index: usize, parts: usize) -> u64 {
    let (index, parts) = (index as u64, parts as u64);
    whole / parts + u64::from(index < whole % parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Keys, Values};
    use crate::distribution::Sizes;

    #[test]
    fn connections_go_to_all_servers_in_turn() {
        let servers: Vec<_> = (0..3).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let keys = Keys::new(Sizes::Fixed(16), 1).unwrap();
        let fleet = Fleet::connect(Target {
            addrs: servers.iter().map(|server| server.local_addr().unwrap()).collect(),
            protocol: Protocol::Resp,
            password: None,
            connections: 7,
            threads: 2,
            pins: Vec::new(),
            requests: Requests::new(Protocol::Resp, keys, Values::new(Sizes::Fixed(1))),
            keys: 1,
            distribution: Distribution::Uniform,
            check: false,
            sleeps: false,
            seed: 1,
        })
        .unwrap();
        let waiting = |server: std::net::TcpListener| {
            server.set_nonblocking(true).unwrap();
            std::iter::from_fn(|| server.accept().ok()).count()
        };
        assert_eq!(servers.into_iter().map(waiting).collect::<Vec<_>>(), [3, 2, 2]);
        drop(fleet);
    }

    #[test]
    fn shares_make_the_whole() {
        for (whole, parts) in [(10, 3), (2, 3), (0, 1), (9, 9)] {
            let shares: Vec<u64> = (0..parts).map(|index| share(whole, index, parts)).collect();
            assert_eq!(shares.iter().sum::<u64>(), whole);
            assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1);
        }
    }
}
