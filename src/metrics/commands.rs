//! What a core counts and times of each command: calls, refusals, failures, time.
//!
//! A clock costs as much as a short command, so not every call is timed. A call is timed for one of two reasons:
//!
//! ```text
//!   each      it is likely to take long, or its beginning and end are known anyway      stands for itself
//!   sampled   its turn has come: one in `MEAN_INTERVAL`, the first ones all             stands for those before it that were not timed
//! ```
//!
//! The distance between two samples is drawn at random, so that no pattern of a pipeline is always or never met. It begins at 1
//! and grows with the calls: what was called a few times was timed each time.
//!
//! What a sample stands for is added when it is taken, and never estimated afterwards: so times only rise, as counters must.
//! The price is that the calls since the last sample, at most twice [`MEAN_INTERVAL`] per core, have no time yet.
//!
//! Invariants: times of a command stand for no more calls than it had, except that a core which runs what another one counted
//! (EXEC) has more times than calls, in sum not.

use std::time::{Duration, Instant};

use gridkv_engine::command::{self, CommandId};

/// Calls from one sample to the next in the mean, once a command was called often.
pub const MEAN_INTERVAL: u64 = 512;
/// Of the calls so far one in so many may go by without a sample.
const SHARE: u64 = 8;
/// Classes of times: the first up to a microsecond, each twice the one before, the last everything longer.
pub const TIME_CLASSES: usize = 26;

/// The numbers of one command on one core.
#[derive(Clone, Debug)]
struct Tally {
    calls: u64,
    /// The number of the call that is timed as a sample.
    due: u64,
}

/// What is not touched by every call.
#[derive(Clone, Debug, Default)]
struct Rare {
    rejected: u64,
    failed: u64,
    /// Made by the first time.
    times: Option<Box<Times>>,
}

/// How long the calls of a command took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Times {
    calls: u64,
    ns: u64,
    classes: [u64; TIME_CLASSES],
}

impl Times {
    /// How many calls they stand for.
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// Their sum.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.ns)
    }

    /// Microseconds and how many calls took no longer, of each class that has some.
    pub fn classes(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut below = 0;
        self.classes.iter().enumerate().filter(|(_, calls)| **calls > 0).map(move |(class, calls)| {
            below += calls;
            (1 << class, below)
        })
    }

    fn record(&mut self, ns: u64, calls: u64) {
        let class = (u64::BITS - (ns.saturating_sub(1) / 1000).leading_zeros()) as usize;
        self.classes[class.min(TIME_CLASSES - 1)] += calls;
        self.ns = self.ns.saturating_add(ns.saturating_mul(calls));
        self.calls += calls;
    }

    fn add(&mut self, other: &Times) {
        self.calls += other.calls;
        self.ns = self.ns.saturating_add(other.ns);
        for (sum, part) in self.classes.iter_mut().zip(other.classes) {
            *sum += part;
        }
    }
}

/// What is known of a command that was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Called<'a> {
    /// Calls that ran.
    pub calls: u64,
    /// Requests that were refused and did nothing; they are no calls.
    pub rejected: u64,
    /// Calls that ended with an error.
    pub failed: u64,
    /// `None` when none was timed.
    pub times: Option<&'a Times>,
}

impl Called<'_> {
    /// Microseconds of all calls that were timed or stood for.
    pub fn usec(&self) -> u64 {
        self.times.map_or(0, |times| times.ns / 1000)
    }

    /// Microseconds of a call in the mean.
    pub fn usec_per_call(&self) -> f64 {
        self.times.map_or(0.0, |times| times.ns as f64 / 1000.0 / times.calls.max(1) as f64)
    }
}

/// A call that is being timed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch {
    /// What reading the clock took, when it was tried.
    reading: Option<Duration>,
    started: Instant,
}

impl Watch {
    /// Times a call for itself.
    #[inline]
    pub(crate) fn each() -> Watch {
        Watch { reading: None, started: Instant::now() }
    }

    /// Times a call for all before it that were not timed.
    pub(crate) fn sample() -> Watch {
        let before = Instant::now();
        let started = Instant::now();
        Watch { reading: Some(started - before), started }
    }

    /// Time since the call began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

/// The numbers of all commands on one core.
#[derive(Clone, Debug)]
pub(super) struct Commands {
    tallies: Box<[Tally]>,
    rare: Box<[Rare]>,
    /// The least that reading the clock was seen to take: it is no time of the call.
    reading: Duration,
    random: u64,
}

impl Commands {
    pub(super) fn new() -> Commands {
        Commands {
            tallies: vec![Tally { calls: 0, due: 1 }; command::count()].into(),
            rare: vec![Rare::default(); command::count()].into(),
            reading: Duration::MAX,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Counts calls. Whether the last of them is to be timed as a sample.
    #[inline]
    pub(super) fn count(&mut self, at: usize, calls: u64) -> bool {
        let tally = &mut self.tallies[at];
        tally.calls += calls;
        tally.calls >= tally.due
    }

    /// Whether the next call is to be timed as a sample.
    pub(super) fn is_next_due(&self, at: usize) -> bool {
        self.tallies[at].calls + 1 >= self.tallies[at].due
    }

    /// A timed call is over; the time it took, that of reading the clock taken off.
    #[cold]
    pub(super) fn stop(&mut self, at: usize, watch: &Watch, together: u64) -> Duration {
        let took = watch.elapsed();
        if let Some(reading) = watch.reading {
            self.reading = self.reading.min(reading);
        }
        let took = if self.reading == Duration::MAX { took } else { took.saturating_sub(self.reading) };
        let calls = self.tallies[at].calls;
        let open = calls.saturating_sub(self.rare[at].times.as_ref().map_or(0, |times| times.calls));
        let each = took / u32::try_from(together.max(1)).unwrap_or(u32::MAX);
        if watch.reading.is_some() {
            self.record(at, each, open);
            let mean = (calls / SHARE).clamp(1, MEAN_INTERVAL);
            // xorshift64: its low bits are good enough to spread samples.
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            self.tallies[at].due = calls + 1 + self.random % (2 * mean - 1);
        } else {
            self.record(at, each, open.min(together));
        }
        took
    }

    /// Calls that took so long each.
    pub(super) fn record(&mut self, at: usize, took: Duration, calls: u64) {
        if calls > 0 {
            let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            self.rare[at].times.get_or_insert_default().record(ns, calls);
        }
    }

    pub(super) fn reject(&mut self, at: usize) {
        self.rare[at].rejected += 1;
    }

    pub(super) fn fail(&mut self, at: usize) {
        self.rare[at].failed += 1;
    }

    /// A call that was just counted is none. Nobody has seen it: a core's numbers are copied between two requests, and what
    /// counts a call and learns of its end later counts it then.
    pub(super) fn take_back(&mut self, at: usize) {
        self.tallies[at].calls = self.tallies[at].calls.saturating_sub(1);
    }

    pub(super) fn called(&self, at: usize) -> Called<'_> {
        let Rare { rejected, failed, times } = &self.rare[at];
        Called { calls: self.tallies[at].calls, rejected: *rejected, failed: *failed, times: times.as_deref() }
    }

    pub(super) fn len(&self) -> usize {
        self.tallies.len()
    }

    pub(super) fn calls(&self) -> u64 {
        self.tallies.iter().map(|tally| tally.calls).sum()
    }

    pub(super) fn add(&mut self, other: &Commands) {
        for (sum, part) in self.tallies.iter_mut().zip(&other.tallies) {
            sum.calls += part.calls;
        }
        for (sum, part) in self.rare.iter_mut().zip(&other.rare) {
            sum.rejected += part.rejected;
            sum.failed += part.failed;
            if let Some(times) = &part.times {
                sum.times.get_or_insert_default().add(times);
            }
        }
    }
}

/// Whether an error with that prefix says that the command did nothing at all: what Redis counts as rejected.
pub(super) fn is_refusal(prefix: &[u8]) -> bool {
    const REFUSALS: [&[u8]; 9] =
        [b"OOM", b"MISCONF", b"NOAUTH", b"CROSSSLOT", b"CLUSTERDOWN", b"TRYAGAIN", b"LOADING", b"OVERLOADED", b"CLOCK"];
    REFUSALS.contains(&prefix)
}

/// The place of a command among the numbers.
#[inline]
pub(super) fn place(id: CommandId) -> usize {
    usize::from(id.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn times_fall_into_classes_that_double() {
        let mut times = Times::default();
        for (took, class) in
            [(Duration::ZERO, 1), (US, 1), (US * 3 / 2, 2), (US * 2, 2), (US * 2049, 4096), (US * 4096, 4096)]
        {
            let mut one = Times::default();
            one.record(took.as_nanos() as u64, 7);
            assert_eq!(one.classes().collect::<Vec<_>>(), [(class, 7)], "{took:?}");
            times.add(&one);
        }
        times.record(u64::MAX, 1);
        assert_eq!(times.classes().collect::<Vec<_>>(), [(1, 14), (2, 28), (4096, 42), (1 << (TIME_CLASSES - 1), 43)]);
        assert_eq!(
            (times.calls(), times.total()),
            (43, Duration::from_nanos(u64::MAX)),
            "a sum that is too large stays so"
        );
    }

    /// However many calls there were, few of them have no time yet, and few were timed.
    #[test]
    fn samples_stand_for_all_calls_before_them() {
        const AT: usize = 3;
        let mut commands = Commands::new();
        let (mut samples, mut longest, mut last) = (0, 0, 0);
        for call in 1..=200_000u64 {
            assert_eq!(commands.is_next_due(AT), commands.count(AT, 1));
            if commands.called(AT).calls >= commands.tallies[AT].due {
                commands.stop(AT, &Watch::sample(), 1);
                samples += 1;
                longest = longest.max(call - last);
                last = call;
            }
            let timed = commands.called(AT).times.map_or(0, Times::calls);
            assert!(timed <= call && call - timed <= (call / 4).min(2 * MEAN_INTERVAL), "{timed} of {call}");
        }
        assert!((200..1000).contains(&samples), "{samples} samples");
        assert!(longest > MEAN_INTERVAL, "distances differ: the longest is {longest}");
    }

    /// A call that is timed for itself says nothing of those around it.
    #[test]
    fn a_call_timed_for_itself_stands_for_one() {
        let mut commands = Commands::new();
        commands.count(0, 100);
        commands.stop(0, &Watch::each(), 1);
        assert_eq!(commands.called(0).times.map(Times::calls), Some(1));
        commands.stop(0, &Watch::sample(), 1);
        assert_eq!(commands.called(0).times.map(Times::calls), Some(100));
        commands.stop(0, &Watch::each(), 1);
        assert_eq!(commands.called(0).times.map(Times::calls), Some(100), "no call is timed twice");
    }

    #[test]
    fn what_was_refused_is_no_call() {
        let mut commands = Commands::new();
        commands.count(1, 2);
        commands.take_back(1);
        commands.reject(1);
        commands.fail(1);
        let Called { calls, rejected, failed, times } = commands.called(1);
        assert_eq!((calls, rejected, failed, times), (1, 1, 1, None));
        assert!(is_refusal(b"OOM") && is_refusal(b"CROSSSLOT") && !is_refusal(b"UNKNOWN") && !is_refusal(b"TIMEOUT"));
    }
}
