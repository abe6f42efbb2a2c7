//! What all cases share: a node with its keys, and ways to put loops on cores and threads and stop them together.
//!
//! A loop ends when the measuring thread sets `stop`; each loop notes when it began and ended, so a late start costs
//! nothing but time.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use futures_lite::future::{block_on, poll_once};
use gridkv::config::CoreSet;
use gridkv::{CoreHandle, GridKv};
use rustix::time::{ClockId, clock_gettime};

use super::maps::{Dash, Papaya};
use crate::data::Keys;
use crate::distribution::Sizes;
use crate::failure::Failure;
use crate::latency::Latencies;
use crate::random::Random;
use crate::{interrupt, pin};

/// A key.
pub(crate) type Key = [u8; 16];

/// Keys that a loop handles before it looks whether to stop, and lets its core go on.
pub(crate) const BLOCK: usize = 1024;
/// The order of keys is the same in every run; which core owns them is not, the node's hash has a seed of its own.
const SEED: u64 = 7;
/// How often the measuring thread looks for an interrupt.
const LOOK: Duration = Duration::from_millis(50);

/// What a stage is made from.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) cores: String,
    pub(crate) keys: u64,
    pub(crate) value_size: usize,
    pub(crate) seconds: Duration,
}

/// A running node that holds all keys.
pub(crate) struct Stage {
    pub(crate) db: GridKv,
    pub(crate) setup: Setup,
    pub(crate) value: Arc<[u8]>,
    /// The CPUs that the node's cores are, for threads that stand in their place.
    pub(crate) cpus: Vec<usize>,
    /// All keys, shuffled.
    pub(crate) all: Arc<[Key]>,
    /// Those of each core, in the same order.
    pub(crate) own: Vec<Arc<[Key]>>,
    /// Rivals, filled by the first case that wants one.
    pub(super) dashmap: OnceLock<Dash>,
    pub(super) papaya: OnceLock<Papaya>,
}

/// Where one loop runs and with which keys.
pub(crate) struct Post {
    pub(crate) core: usize,
    pub(crate) task: Task,
}

/// What one loop needs.
pub(crate) struct Task {
    pub(crate) walk: Walk,
    pub(crate) value: Arc<[u8]>,
    stop: Arc<AtomicBool>,
    begun: bool,
}

impl Task {
    /// Whether to end the loop; never before its first round, however late it began.
    #[inline]
    pub(crate) fn stopped(&mut self) -> bool {
        std::mem::replace(&mut self.begun, true) && self.stop.load(Ordering::Relaxed)
    }
}

/// Keys in their order, again and again.
pub(crate) struct Walk {
    keys: Arc<[Key]>,
    at: usize,
}

impl Walk {
    /// All keys that the walk goes over.
    pub(crate) fn keys(&self) -> Arc<[Key]> {
        self.keys.clone()
    }

    /// The next keys, at most `most`, at least one.
    #[inline]
    pub(crate) fn block(&mut self, most: usize) -> &[Key] {
        let from = self.at;
        let to = (from + most).min(self.keys.len());
        self.at = if to == self.keys.len() { 0 } else { to };
        &self.keys[from..to]
    }

    #[inline]
    pub(crate) fn next(&mut self) -> &Key {
        &self.block(1)[0]
    }
}

/// What one loop did.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) done: u64,
    pub(crate) found: u64,
    /// Lengths and first bytes, so that no read is left out by the compiler.
    sum: u64,
    pub(crate) latencies: Option<Latencies>,
}

impl Seen {
    /// Notes an operation that found a value, or did not.
    #[inline]
    pub(crate) fn value(&mut self, value: Option<&[u8]>) {
        self.sum(value.map(touch));
    }

    /// Notes an operation by what [`touch`] said about its value.
    #[inline]
    pub(crate) fn sum(&mut self, touched: Option<u64>) {
        self.done += 1;
        if let Some(touched) = touched {
            self.found += 1;
            self.sum = self.sum.wrapping_add(touched);
        }
    }

    /// Notes a write.
    #[inline]
    pub(crate) fn written(&mut self) {
        self.done += 1;
        self.found += 1;
    }
}

/// Looks at a value: its length and first byte.
#[inline]
pub(crate) fn touch(value: &[u8]) -> u64 {
    value.len() as u64 + u64::from(value.first().copied().unwrap_or(0))
}

/// A loop that has ended.
struct Lap {
    worker: usize,
    seen: Seen,
    start: Moment,
    end: Moment,
}

/// A point in time, and how long the calling thread had run by then.
#[derive(Clone, Copy)]
struct Moment {
    wall: Instant,
    cpu: Duration,
}

impl Moment {
    fn now() -> Moment {
        let cpu = clock_gettime(ClockId::ThreadCPUTime);
        Moment { wall: Instant::now(), cpu: Duration::new(cpu.tv_sec as u64, cpu.tv_nsec as u32) }
    }
}

/// What a case gave in one round.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Operations per second, by core or thread.
    pub(crate) rates: Vec<f64>,
    /// Nanoseconds that the workers' threads ran per operation: what others took of their cores does not count.
    pub(crate) cpu_ns: f64,
    pub(crate) latencies: Option<Latencies>,
}

impl Outcome {
    /// Loops of one worker ran side by side on one thread; workers add up.
    fn of(laps: Vec<Lap>) -> Outcome {
        let workers = laps.iter().map(|lap| lap.worker + 1).max().unwrap_or(0);
        let mut outcome = Outcome { rates: Vec::new(), cpu_ns: 0.0, latencies: None };
        let (mut cpu, mut operations) = (Duration::ZERO, 0);
        for worker in 0..workers {
            let mine = || laps.iter().filter(move |lap| lap.worker == worker);
            let first = mine().map(|lap| lap.start).min_by_key(|moment| moment.wall);
            let last = mine().map(|lap| lap.end).max_by_key(|moment| moment.wall);
            let Some((first, last)) = first.zip(last) else { continue };
            let done: u64 = mine().map(|lap| lap.seen.done).sum();
            outcome.rates.push(done as f64 / last.wall.duration_since(first.wall).as_secs_f64().max(1e-9));
            cpu += last.cpu.saturating_sub(first.cpu);
            operations += done;
        }
        outcome.cpu_ns = cpu.as_nanos() as f64 / operations.max(1) as f64;
        for lap in laps {
            assert_eq!(lap.seen.found, lap.seen.done, "every key was written before, and nothing expires");
            std::hint::black_box(lap.seen.sum);
            if let Some(part) = lap.seen.latencies {
                outcome.latencies.get_or_insert_with(Latencies::new).add(&part);
            }
        }
        outcome
    }

    /// Operations per second of all workers.
    pub(crate) fn total(&self) -> f64 {
        self.rates.iter().sum()
    }
}

/// Checks the words for a set of cores.
pub(crate) fn core_set(text: &str) -> Result<String, String> {
    text.parse::<CoreSet>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// The CPUs that a node with these words runs on.
fn cpus(text: &str) -> Result<Vec<usize>, Failure> {
    let allowed = pin::allowed()?;
    Ok(match text.parse::<CoreSet>().map_err(gridkv::Error::from)? {
        CoreSet::All => allowed,
        CoreSet::Count(count) => allowed.into_iter().take(count).collect(),
        CoreSet::List(list) => list,
    })
}

impl Stage {
    /// Starts a node and writes all keys.
    pub(crate) fn new(setup: Setup) -> Result<Stage, Failure> {
        if setup.keys == 0 {
            return Err(Failure::Usage("there must be a key".into()));
        }
        let texts = Keys::new(Sizes::Fixed(16), setup.keys).map_err(Failure::Usage)?;
        let mut all: Vec<Key> = (0..setup.keys)
            .map(|number| {
                let mut key = [0; 16];
                texts.write(number, &mut key);
                key
            })
            .collect();
        Random::new(SEED, 0).shuffle(&mut all);
        let cpus = cpus(&setup.cores)?;
        let value: Arc<[u8]> = vec![b'v'; setup.value_size].into();
        let db = GridKv::builder().cores(&setup.cores)?.start()?;
        fill(&db, &all, &value)?;
        let mut own: Vec<Vec<Key>> = vec![Vec::new(); db.cores()];
        for key in &all {
            own[db.core_of(key)].push(*key);
        }
        if own.iter().any(Vec::is_empty) {
            return Err(Failure::Usage(format!("{} keys leave a core without any; take more", setup.keys)));
        }
        let own = own.into_iter().map(Into::into).collect();
        let (dashmap, papaya) = (OnceLock::new(), OnceLock::new());
        Ok(Stage { db, setup, value, cpus, all: all.into(), own, dashmap, papaya })
    }

    /// A node like this stage's with all its keys, but without polling.
    pub(crate) fn node_without_spin(&self) -> Result<GridKv, Failure> {
        let db = GridKv::builder().cores(&self.setup.cores)?.spin(Duration::ZERO).start()?;
        fill(&db, &self.all, &self.value)?;
        Ok(db)
    }

    pub(crate) fn cores(&self) -> usize {
        self.db.cores()
    }

    /// Stops the node.
    pub(crate) fn close(self) -> Result<(), Failure> {
        Ok(self.db.blocking().close()?)
    }

    fn task(&self, keys: &Arc<[Key]>, at: usize) -> Task {
        Task { walk: Walk { keys: keys.clone(), at }, value: self.value.clone(), stop: Arc::default(), begun: false }
    }

    /// One loop on each core, over the core's own keys.
    pub(crate) fn beside_the_data(&self) -> Vec<Post> {
        (0..self.cores()).map(|core| Post { core, task: self.task(&self.own[core], 0) }).collect()
    }

    /// `tasks` loops on each core, over all keys, each from another place.
    pub(crate) fn everywhere(&self, tasks: usize) -> Vec<Post> {
        let loops = self.cores() * tasks;
        let start = |i: usize| i * self.all.len() / loops;
        (0..loops).map(|i| Post { core: i / tasks, task: self.task(&self.all, start(i)) }).collect()
    }

    /// One loop on the first core, over the second one's keys.
    pub(crate) fn across(&self) -> Vec<Post> {
        vec![Post { core: 0, task: self.task(&self.own[1], 0) }]
    }

    /// Runs loops as tasks of the node's cores.
    pub(crate) fn on_cores<F, Fut>(&self, posts: Vec<Post>, work: F) -> Result<Outcome, Failure>
    where
        F: Fn(CoreHandle, Task) -> Fut + Copy + Send + 'static,
        Fut: Future<Output = Result<Seen, gridkv::Error>> + 'static,
    {
        let stop: Arc<AtomicBool> = Arc::default();
        let mut laps = Vec::new();
        let mut running = Vec::new();
        for Post { core: worker, mut task } in posts {
            task.stop = stop.clone();
            let mut lap = Box::pin(self.db.on_core(worker, move |core| async move {
                let start = Moment::now();
                let seen = work(core, task).await?;
                Ok::<_, gridkv::Error>(Lap { worker, seen, start, end: Moment::now() })
            }));
            // The first poll sends the task to its core.
            match block_on(poll_once(&mut lap)) {
                Some(lap) => laps.push(lap??),
                None => running.push(lap),
            }
        }
        self.pause();
        stop.store(true, Ordering::Relaxed);
        for lap in running {
            laps.push(block_on(lap)??);
        }
        Ok(Outcome::of(laps))
    }

    /// Runs loops in threads of their own: bound to a CPU, if one is given, over the keys of the core in whose place it
    /// stands; otherwise anywhere, over all keys.
    pub(crate) fn on_threads(
        &self,
        cpus: &[Option<usize>],
        work: impl Fn(Task) -> Result<Seen, gridkv::Error> + Sync,
    ) -> Result<Outcome, Failure> {
        let stop: Arc<AtomicBool> = Arc::default();
        let laps = thread::scope(|scope| {
            let threads: Vec<_> = cpus
                .iter()
                .enumerate()
                .map(|(worker, &cpu)| {
                    let mut task = match cpu {
                        Some(_) => self.task(&self.own[worker], 0),
                        None => self.task(&self.all, worker * self.all.len() / cpus.len()),
                    };
                    task.stop = stop.clone();
                    let work = &work;
                    scope.spawn(move || -> Result<Lap, Failure> {
                        if let Some(cpu) = cpu {
                            pin::this_thread(&[cpu])?;
                        }
                        let start = Moment::now();
                        let seen = work(task)?;
                        Ok(Lap { worker, seen, start, end: Moment::now() })
                    })
                })
                .collect();
            self.pause();
            stop.store(true, Ordering::Relaxed);
            let join = |thread: thread::ScopedJoinHandle<'_, _>| thread.join().expect("a loop does not panic");
            threads.into_iter().map(join).collect::<Result<Vec<Lap>, Failure>>()
        })?;
        Ok(Outcome::of(laps))
    }

    /// Waits while the loops run; an interrupt ends it early.
    fn pause(&self) {
        let until = Instant::now() + self.setup.seconds;
        while !interrupt::requested() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            thread::sleep(left.min(LOOK));
        }
    }
}

fn fill(db: &GridKv, keys: &[Key], value: &[u8]) -> Result<(), Failure> {
    for some in keys.chunks(BLOCK) {
        let pairs: Vec<(&Key, &[u8])> = some.iter().map(|key| (key, value)).collect();
        for written in db.blocking().set_many(&pairs)? {
            written?;
        }
    }
    Ok(())
}
