//! Clients that write, read and delete at quorum on all nodes, each on keys of its own, and note what they were told.
//!
//! A client is a thread with a connection to each node; every operation goes to a node drawn by chance, until one is
//! found that takes connections. It is sequential, so of each of its keys it knows what a read may find
//! ([`super::ledger`]). What counts is split by node, so that one side of a partition can be told from the other.
//!
//! Most keys are written again and again, which hides that a write was lost: the next one takes its place. So every fourth is
//! left alone after its first acknowledged write, or after that and one deletion ([`Habit`]); of some of these not even
//! reads, which repair what they find, come before the end.
//!
//! Each client has a counter besides, on which it increments: the one conditional command here ([`super::counter`]).
//!
//! While nodes stand still ([`Load::set_aside`]) every second client turns away from them, so that the load goes on; the others go on
//! asking them and wait, however long: what they asked is done or refused when the node goes on, with a view of before. They
//! wait because a request that nobody waits for any more is still read by the node, later than all that its client
//! did elsewhere meanwhile, and then nothing could be said about its key.
//!
//! `check` reads every key from every node at the end.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::counter::Counter;
use super::ledger::{Contradiction, Ending, Floor, Ledger};
use crate::latency::Latencies;
use crate::link::{Answer, Link};
use crate::options::count;
use crate::random::Random;
use crate::units;

/// How long a client waits for a reply before it takes the connection for dead: far more than an operation may take, where no
/// node stands still.
pub(super) const REPLY_PATIENCE: Duration = Duration::from_secs(8);
/// How long a node that takes no connection is left alone.
const AWAY: Duration = Duration::from_millis(50);
/// Of that many times that a cold key is drawn, it is written or deleted once, while that is still to be done.
const COLD_STEP: u64 = 16;
/// Of that many operations one is on the counter; of that many of these one is a read.
const COUNTS: u64 = 32;
const COUNT_READS: u64 = 4;
/// Contradictions that are told in words.
const TOLD: usize = 20;
/// An operation that took so long at a node that was set aside was with it while it stood still, which it does not from the
/// first moment on.
const HELD: Duration = Duration::from_millis(150);
/// How long one key may be refused in the last check.
const CHECK_PATIENCE: Duration = Duration::from_secs(20);

/// What clients do.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct LoadArgs {
    /// Clients, a thread each
    #[arg(long, default_value = "4", value_parser = count, value_name = "COUNT", help_heading = "Load")]
    clients: usize,
    /// Keys of each client
    #[arg(long, default_value = "500", value_parser = count, value_name = "COUNT", help_heading = "Load")]
    keys: usize,
    /// Operations per second, all clients together; 0 is as many as go
    #[arg(long, default_value = "2000", value_parser = units::number, value_name = "RATE", help_heading = "Load")]
    pub(super) rate: u64,
    /// Bytes of a value
    #[arg(long, default_value = "100", value_parser = count, value_name = "BYTES", help_heading = "Load")]
    value_size: usize,
    /// Seed of what is drawn by chance
    #[arg(long, default_value = "1", value_name = "NUMBER", help_heading = "Load")]
    pub(super) seed: u64,
}

impl LoadArgs {
    /// Clients.
    pub(super) fn clients(&self) -> usize {
        self.clients
    }
}

/// What became of operations at one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(super) struct Counts {
    pub(super) writes: u64,
    pub(super) deletes: u64,
    pub(super) reads: u64,
    pub(super) increments: u64,
    pub(super) refused: u64,
    pub(super) unknown: u64,
    /// The connection ended, or nothing came for longer than any operation may take.
    pub(super) cut: u64,
    /// Connections that were not taken. No operation began on one.
    pub(super) unreached: u64,
}

impl Counts {
    pub(super) fn done(&self) -> u64 {
        self.writes + self.deletes + self.reads + self.increments
    }

    /// The share of operations that were done; none if there were none.
    pub(super) fn share(&self) -> f64 {
        let all = self.done() + self.refused + self.unknown + self.cut;
        self.done() as f64 / all.max(1) as f64
    }

    pub(super) fn add(&mut self, other: &Counts) {
        self.writes += other.writes;
        self.deletes += other.deletes;
        self.reads += other.reads;
        self.increments += other.increments;
        self.refused += other.refused;
        self.unknown += other.unknown;
        self.cut += other.cut;
        self.unreached += other.unreached;
    }
}

/// What became of operations that were with a node while it stood still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(super) struct Held {
    pub(super) done: u64,
    pub(super) refused: u64,
    pub(super) unknown: u64,
}

/// What clients saw since they were last asked.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// By node.
    pub(super) counts: Vec<Counts>,
    /// Errors by their first word.
    pub(super) errors: BTreeMap<String, u64>,
    /// An example of each.
    pub(super) examples: BTreeMap<String, String>,
    /// How long operations took, whatever came of them, at nodes that did not stand still.
    pub(super) took: Latencies,
    /// What became of operations at nodes that stood still while these were with them; they are among the others, too, but
    /// not in `took`.
    pub(super) held: Held,
    /// Reads that contradict what was acknowledged, by kind.
    pub(super) lost: u64,
    pub(super) resurrected: u64,
    pub(super) unmade: u64,
    /// Answers of counters that contradict the increments that were acknowledged.
    pub(super) miscounted: u64,
    /// Of the cold keys, how many have had all their writes; and all of them. Known at the end only.
    pub(super) cold: (u64, u64),
    /// Contradictions in words, some of them.
    pub(super) told: Vec<String>,
}

impl Seen {
    fn new(nodes: usize) -> Seen {
        Seen { counts: vec![Counts::default(); nodes], ..Seen::default() }
    }

    /// All nodes together.
    pub(super) fn total(&self) -> Counts {
        self.without(&[])
    }

    /// All nodes but these.
    pub(super) fn without(&self, nodes: &[usize]) -> Counts {
        let mut total = Counts::default();
        self.counts.iter().enumerate().filter(|(at, _)| !nodes.contains(at)).for_each(|(_, counts)| total.add(counts));
        total
    }

    /// Seconds of the longest operation.
    pub(super) fn longest(&self) -> f64 {
        self.took.max_us() / 1e6
    }

    /// Whether nothing was contradicted.
    pub(super) fn is_clean(&self) -> bool {
        self.lost + self.resurrected + self.unmade + self.miscounted == 0
    }

    pub(super) fn add(&mut self, other: &Seen) {
        self.counts.resize(self.counts.len().max(other.counts.len()), Counts::default());
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| mine.add(theirs));
        other.errors.iter().for_each(|(kind, count)| *self.errors.entry(kind.clone()).or_default() += count);
        for (kind, example) in &other.examples {
            self.examples.entry(kind.clone()).or_insert_with(|| example.clone());
        }
        self.took.add(&other.took);
        self.held.done += other.held.done;
        self.held.refused += other.held.refused;
        self.held.unknown += other.held.unknown;
        self.lost += other.lost;
        self.resurrected += other.resurrected;
        self.unmade += other.unmade;
        self.miscounted += other.miscounted;
        self.cold = (self.cold.0 + other.cold.0, self.cold.1 + other.cold.1);
        let room = TOLD.saturating_sub(self.told.len());
        self.told.extend(other.told.iter().take(room).cloned());
    }

    fn error(&mut self, text: &str) {
        let kind = text.split_whitespace().next().unwrap_or("?").to_owned();
        self.examples.entry(kind.clone()).or_insert_with(|| text.to_owned());
        *self.errors.entry(kind).or_default() += 1;
    }

    fn contradicted(&mut self, what: Contradiction, told: impl FnOnce() -> String) {
        match what {
            Contradiction::Lost => self.lost += 1,
            Contradiction::Resurrected => self.resurrected += 1,
            Contradiction::Unmade => self.unmade += 1,
        }
        self.tell(|| format!("{what:?}: {}", told()));
    }

    fn miscounts(&mut self, what: Contradiction, told: impl FnOnce() -> String) {
        self.miscounted += 1;
        self.tell(|| format!("{what:?} increment: {}", told()));
    }

    fn tell(&mut self, told: impl FnOnce() -> String) {
        if self.told.len() < TOLD {
            self.told.push(told());
        }
    }

    /// Counts how an operation went on, and what that means for it; `held` if its node was set aside meanwhile.
    fn ended(&mut self, node: usize, took: Duration, held: bool, answer: &io::Result<Answer>) -> Ending {
        if !held {
            self.took.record(took.as_nanos() as u64, 1);
        }
        let ending = self.ending(node, answer);
        if held && took >= HELD {
            *match ending {
                Ending::Acknowledged => &mut self.held.done,
                Ending::Refused => &mut self.held.refused,
                Ending::Unknown => &mut self.held.unknown,
            } += 1;
        }
        ending
    }

    fn ending(&mut self, node: usize, answer: &io::Result<Answer>) -> Ending {
        match answer {
            Ok(Answer::Error(text)) => {
                let is_unknown = text.starts_with("UNKNOWN");
                let counts = &mut self.counts[node];
                *if is_unknown { &mut counts.unknown } else { &mut counts.refused } += 1;
                self.error(text);
                if is_unknown { Ending::Unknown } else { Ending::Refused }
            }
            Ok(_) => Ending::Acknowledged,
            Err(error) => {
                self.counts[node].cut += 1;
                let silent = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
                self.error(if silent { "(silence)" } else { "(disconnected)" });
                Ending::Unknown
            }
        }
    }

    /// `CLUSTERDOWN 12, UNKNOWN 3`.
    pub(super) fn errors_in_words(&self) -> String {
        let words: Vec<String> = self.errors.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        if words.is_empty() { "none".into() } else { words.join(", ") }
    }
}

#[derive(Debug)]
struct Shared {
    addresses: Vec<SocketAddr>,
    /// How many of them are in use: the first ones.
    used: AtomicU64,
    /// By node how often it was set aside or taken back: odd while it stands still.
    aside: Vec<AtomicU64>,
    patience: Duration,
    stop: AtomicBool,
    start: Instant,
    seen: Vec<Mutex<Seen>>,
}

/// Clients that run.
#[derive(Debug)]
pub(super) struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Client>>,
}

/// Clients that have stopped.
#[derive(Debug)]
pub(super) struct Rested {
    clients: Vec<Client>,
    nodes: usize,
}

impl Load {
    /// Starts clients on the first `used` of the nodes, which wait for each answer for `patience`.
    pub(super) fn start(args: &LoadArgs, addresses: Vec<SocketAddr>, used: usize, patience: Duration) -> Load {
        let seen = (0..args.clients).map(|_| Mutex::new(Seen::new(addresses.len()))).collect();
        let (used, stop) = (AtomicU64::new(used as u64), AtomicBool::new(false));
        let aside = addresses.iter().map(|_| AtomicU64::new(0)).collect();
        let shared = Arc::new(Shared { addresses, used, aside, patience, stop, start: Instant::now(), seen });
        let spawn = |number: usize| {
            let mut client = Client::new(number, args, shared.clone());
            std::thread::spawn(move || {
                client.run();
                client
            })
        };
        let threads = (0..args.clients).map(spawn).collect();
        Load { shared, threads }
    }

    /// Uses the first `used` of the nodes from now on.
    pub(super) fn use_nodes(&self, used: usize) {
        self.shared.used.store(used as u64, Ordering::Relaxed);
    }

    /// Has every second client turn away from a node, which will stand still.
    pub(super) fn set_aside(&self, node: usize) {
        let before = self.shared.aside[node].fetch_add(1, Ordering::Relaxed);
        assert!(!is_aside(before), "a node is set aside once");
    }

    /// Has all clients use a node again.
    pub(super) fn take_back(&self, node: usize) {
        let before = self.shared.aside[node].fetch_add(1, Ordering::Relaxed);
        assert!(is_aside(before), "who is taken back was set aside");
    }

    /// What was seen since this was last asked.
    pub(super) fn take(&self) -> Seen {
        let nodes = self.shared.addresses.len();
        let mut all = Seen::new(nodes);
        for seen in &self.shared.seen {
            let seen = std::mem::replace(&mut *seen.lock().expect("no client panics"), Seen::new(nodes));
            all.add(&seen);
        }
        all
    }

    /// Stops the clients.
    pub(super) fn stop(mut self) -> (Rested, Seen) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let threads = std::mem::take(&mut self.threads);
        let clients = threads.into_iter().map(|thread| thread.join().expect("no client panics")).collect();
        (Rested { clients, nodes: self.shared.addresses.len() }, self.take())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Rested {
    /// Reads every key from each of `nodes`, in parallel. Errors are tried again for a while; a key that still cannot be
    /// read counts as lost.
    pub(super) fn check(self, nodes: &[usize]) -> Seen {
        let check = |mut client: Client| {
            std::thread::spawn({
                let nodes = nodes.to_vec();
                move || client.check(&nodes)
            })
        };
        let threads: Vec<_> = self.clients.into_iter().map(check).collect();
        let mut all = Seen::new(self.nodes);
        threads.into_iter().for_each(|thread| all.add(&thread.join().expect("no client panics")));
        all
    }
}

#[derive(Debug)]
struct Client {
    number: usize,
    shared: Arc<Shared>,
    random: Random,
    keys: Vec<Ledger>,
    counter: Counter,
    links: Vec<Option<Link>>,
    away_until: Vec<Instant>,
    gap: Option<Duration>,
    value_size: usize,
}

enum Reached {
    Yes,
    No,
    /// It took no connection a moment ago.
    NotTried,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Read,
    Write,
    Delete,
}

/// What is done with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Habit {
    /// It is written, read and deleted all the time.
    Busy,
    /// It is written once, perhaps deleted once, and perhaps read after that.
    Cold { deleted: bool, read: bool },
}

impl Habit {
    /// Of the key with that number: of 16 in a row 4 are cold, one of each kind.
    fn of(key: usize) -> Habit {
        match key % 4 {
            3 => Habit::Cold { deleted: key / 4 % 2 == 1, read: key / 8 % 2 == 1 },
            _ => Habit::Busy,
        }
    }

    /// What to do next with a key of which this is known; nothing with one that is left alone.
    fn next(self, ledger: &Ledger, random: &mut Random) -> Option<Op> {
        match self {
            Habit::Busy => Some(match random.below(20) {
                0..10 => Op::Read,
                10..19 => Op::Write,
                _ => Op::Delete,
            }),
            Habit::Cold { deleted, read } => {
                // Not at once, so that what is left alone was written at all times of the run.
                let now = random.below(COLD_STEP) == 0;
                Habit::step(deleted, ledger).filter(|_| now).or(read.then_some(Op::Read))
            }
        }
    }

    /// What a cold key still lacks.
    fn step(deleted: bool, ledger: &Ledger) -> Option<Op> {
        match ledger.floor() {
            Floor::Never => Some(Op::Write),
            Floor::Written if deleted => Some(Op::Delete),
            Floor::Written => ledger.is_open().then_some(Op::Write),
            Floor::Deleted => ledger.is_open().then_some(Op::Delete),
        }
    }
}

impl Client {
    fn new(number: usize, args: &LoadArgs, shared: Arc<Shared>) -> Client {
        let nodes = shared.addresses.len();
        let gap = (args.rate > 0).then(|| Duration::from_secs_f64(args.clients as f64 / args.rate as f64));
        Client {
            number,
            random: Random::new(args.seed, number as u64),
            keys: vec![Ledger::new(); args.keys],
            counter: Counter::default(),
            links: (0..nodes).map(|_| None).collect(),
            away_until: vec![shared.start; nodes],
            gap,
            value_size: args.value_size,
            shared,
        }
    }

    fn key(&self, key: usize) -> Vec<u8> {
        format!("chaos:{}:{key}", self.number).into_bytes()
    }

    fn run(&mut self) {
        let mut due = Instant::now();
        while !self.shared.stop.load(Ordering::Relaxed) {
            if let Some(gap) = self.gap {
                due += gap;
                let now = Instant::now();
                match due.checked_duration_since(now) {
                    Some(early) => std::thread::sleep(early),
                    // What could not be done in time is not made up for.
                    None if now - due > Duration::from_millis(100) => due = now,
                    None => {}
                }
            }
            let Some(node) = self.any_node() else { continue };
            if self.random.below(COUNTS) == 0 {
                self.count(node);
                continue;
            }
            let (key, op) = self.draw();
            self.operate(node, key, op);
        }
    }

    /// A node drawn by chance, or the next one that takes connections.
    fn any_node(&mut self) -> Option<usize> {
        let used = self.shared.used.load(Ordering::Relaxed) as usize;
        let first = self.random.below(used as u64) as usize;
        for node in (first..used).chain(0..first) {
            if !self.waits() && is_aside(self.aside(node)) {
                continue;
            }
            match self.reach(node) {
                Reached::Yes => return Some(node),
                Reached::No => self.seen().counts[node].unreached += 1,
                Reached::NotTried => {}
            }
        }
        None
    }

    /// Whether it goes on asking nodes that stand still.
    fn waits(&self) -> bool {
        !self.number.is_multiple_of(2)
    }

    /// How often a node was set aside or taken back.
    fn aside(&self, node: usize) -> u64 {
        self.shared.aside[node].load(Ordering::Relaxed)
    }

    /// Whether a node stood still between that number and now.
    fn was_aside(&self, node: usize, before: u64) -> bool {
        is_aside(before) || before != self.aside(node)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.shared.seen[self.number].lock().expect("nobody panics with it")
    }

    /// A key and what to do with it. There always is one: the first key is a busy one.
    fn draw(&mut self) -> (usize, Op) {
        loop {
            let key = self.random.below(self.keys.len() as u64) as usize;
            if let Some(op) = Habit::of(key).next(&self.keys[key], &mut self.random) {
                return (key, op);
            }
        }
    }

    /// Whether there is a connection to a node, now at the latest.
    fn reach(&mut self, node: usize) -> Reached {
        if self.links[node].is_some() {
            return Reached::Yes;
        }
        if Instant::now() < self.away_until[node] {
            return Reached::NotTried;
        }
        self.links[node] = Link::connect(self.shared.addresses[node], self.shared.patience).ok();
        if self.links[node].is_some() {
            return Reached::Yes;
        }
        self.away_until[node] = Instant::now() + AWAY;
        Reached::No
    }

    fn operate(&mut self, node: usize, key: usize, op: Op) {
        let (name, aside) = (self.key(key), self.aside(node));
        let Some(link) = &mut self.links[node] else { return };
        let number = if matches!(op, Op::Read) { 0 } else { self.keys[key].next() };
        let start = Instant::now();
        let answer = match op {
            Op::Read => link.call(&[b"GET", &name]),
            Op::Write => link.call(&[b"SET", &name, &value(number, self.value_size)]),
            Op::Delete => link.call(&[b"DEL", &name]),
        };
        let (took, held) = (start.elapsed(), self.was_aside(node, aside));
        if answer.is_err() {
            self.links[node] = None;
        }
        let mut seen = self.shared.seen[self.number].lock().expect("nobody panics with it");
        let ledger = &mut self.keys[key];
        let time = (start - self.shared.start, start + took - self.shared.start);
        let ending = seen.ended(node, took, held, &answer);
        let what = match (op, ending) {
            (Op::Read, Ending::Acknowledged) => "read",
            (Op::Read, _) => "failed read",
            (Op::Write, Ending::Acknowledged) => "write",
            (Op::Write, Ending::Unknown) => "unknown write",
            (Op::Write, Ending::Refused) => "refused write",
            (Op::Delete, Ending::Acknowledged) => "deletion",
            (Op::Delete, Ending::Unknown) => "unknown deletion",
            (Op::Delete, Ending::Refused) => "refused deletion",
        };
        ledger.remember(what, number, node, time);
        match op {
            Op::Read => {
                if ending == Ending::Acknowledged {
                    seen.counts[node].reads += 1;
                    let found = found(answer.expect("it was answered"));
                    let result = found.map_or(Err(Contradiction::Unmade), |found| ledger.found(found));
                    if let Err(what) = result {
                        seen.contradicted(what, || told(&name, node, found, ledger));
                    }
                }
            }
            Op::Write => {
                ledger.ended(number, false, ending);
                seen.counts[node].writes += u64::from(ending == Ending::Acknowledged);
            }
            Op::Delete if ending == Ending::Acknowledged => {
                seen.counts[node].deletes += 1;
                let expected = ledger.expected();
                let existed = answer.ok().as_ref().and_then(existed);
                let result = existed.map_or(Err(Contradiction::Unmade), |existed| ledger.deleted(number, existed));
                if let Err(what) = result {
                    let what_it_says = match existed {
                        Some(true) => "a deletion found something",
                        Some(false) => "a deletion found nothing",
                        None => "a strange answer to a deletion",
                    };
                    seen.contradicted(what, || in_words(&name, node, what_it_says, &expected, ledger));
                }
            }
            Op::Delete => ledger.ended(number, true, ending),
        }
    }

    /// Increments the counter, or reads it.
    fn count(&mut self, node: usize) {
        let (name, aside) = (self.counter_key(), self.aside(node));
        let increments = self.random.below(COUNT_READS) > 0;
        let Some(link) = &mut self.links[node] else { return };
        let start = Instant::now();
        let answer = link.call(&[if increments { b"INCR" } else { b"GET" }, &name]);
        let (took, held) = (start.elapsed(), self.was_aside(node, aside));
        if answer.is_err() {
            self.links[node] = None;
        }
        let mut seen = self.shared.seen[self.number].lock().expect("nobody panics with it");
        let (ending, expected) = (seen.ended(node, took, held, &answer), self.counter.expected());
        let says = answer.ok().as_ref().and_then(counted);
        let result = match (ending, increments) {
            (Ending::Acknowledged, true) => {
                seen.counts[node].increments += 1;
                says.map_or(Err(Contradiction::Unmade), |says| self.counter.incremented(says))
            }
            (Ending::Acknowledged, false) => {
                seen.counts[node].reads += 1;
                says.map_or(Err(Contradiction::Unmade), |says| self.counter.found(says))
            }
            (_, true) => {
                self.counter.failed(ending);
                Ok(())
            }
            (_, false) => Ok(()),
        };
        if let Err(what) = result {
            let what_it_is = if increments { "an increment" } else { "a read" };
            seen.miscounts(what, || miscounted(&name, node, what_it_is, says, &expected));
        }
    }

    fn counter_key(&self) -> Vec<u8> {
        format!("chaos:{}:counter", self.number).into_bytes()
    }

    /// Reads a key at a node for the last check; nothing if it cannot be read for long.
    fn read_at_last(&mut self, node: usize, name: &[u8], seen: &mut Seen) -> Option<Answer> {
        let deadline = Instant::now() + CHECK_PATIENCE;
        loop {
            seen.counts[node].unreached += u64::from(matches!(self.reach(node), Reached::No));
            match self.links[node].as_mut().map(|link| link.call(&[b"GET", name])) {
                Some(Ok(Answer::Error(text))) => seen.error(&text),
                Some(Ok(answer)) => return Some(answer),
                Some(Err(_)) => {
                    self.links[node] = None;
                    seen.error("(disconnected)");
                }
                None => {}
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(AWAY);
        }
    }

    fn check(&mut self, nodes: &[usize]) -> Seen {
        let mut seen = Seen::new(self.shared.addresses.len());
        for (key, ledger) in self.keys.iter().enumerate() {
            if let Habit::Cold { deleted, .. } = Habit::of(key) {
                seen.cold.0 += u64::from(Habit::step(deleted, ledger).is_none());
                seen.cold.1 += 1;
            }
        }
        // Those to nodes that were killed meanwhile have ended; here every end counts.
        self.links.iter_mut().for_each(|link| *link = None);
        for &node in nodes {
            for key in 0..self.keys.len() {
                let name = self.key(key);
                let answer = self.read_at_last(node, &name, &mut seen);
                let ledger = &mut self.keys[key];
                let found = answer.and_then(found);
                match found {
                    Some(number) => {
                        seen.counts[node].reads += 1;
                        if let Err(what) = ledger.found(number) {
                            seen.contradicted(what, || told(&name, node, found, ledger));
                        }
                    }
                    None => seen.contradicted(Contradiction::Lost, || told(&name, node, None, ledger)),
                }
            }
            let name = self.counter_key();
            let says = self.read_at_last(node, &name, &mut seen).as_ref().and_then(counted);
            let result = says.map_or(Err(Contradiction::Lost), |says| self.counter.found(says));
            if let Err(what) = result {
                seen.miscounts(what, || miscounted(&name, node, "the last read", says, &self.counter.expected()));
            }
        }
        seen
    }
}

/// Whether a node that was set aside or taken back that often stands still.
fn is_aside(times: u64) -> bool {
    !times.is_multiple_of(2)
}

/// A value that says its number.
fn value(number: u64, size: usize) -> Vec<u8> {
    let mut value = format!("{number} ").into_bytes();
    value.resize(value.len().max(size), b'x');
    value
}

/// The number of a value that was found, if any; nothing when it is not one of ours.
fn found(answer: Answer) -> Option<Option<u64>> {
    match answer {
        Answer::Nothing => Some(None),
        Answer::Value(bytes) => {
            let digits = bytes.split(|&byte| byte == b' ').next()?;
            Some(Some(std::str::from_utf8(digits).ok()?.parse().ok()?))
        }
        Answer::Done | Answer::Number(_) | Answer::Error(_) => None,
    }
}

/// What a counter is, as a read or an increment says; before the first one there is none.
fn counted(answer: &Answer) -> Option<i64> {
    match answer {
        Answer::Number(number) => Some(*number),
        Answer::Value(digits) => std::str::from_utf8(digits).ok()?.parse().ok(),
        Answer::Nothing => Some(0),
        Answer::Done | Answer::Error(_) => None,
    }
}

/// Whether a deletion says that there was something.
fn existed(answer: &Answer) -> Option<bool> {
    match answer {
        Answer::Number(0) => Some(false),
        Answer::Number(1) => Some(true),
        _ => None,
    }
}

fn told(key: &[u8], node: usize, found: Option<Option<u64>>, ledger: &Ledger) -> String {
    let found = match found {
        Some(Some(number)) => number.to_string(),
        Some(None) => "nothing".into(),
        None => "no answer, or a strange one".into(),
    };
    in_words(key, node, &found, &ledger.expected(), ledger)
}

fn miscounted(key: &[u8], node: usize, what: &str, says: Option<i64>, expected: &str) -> String {
    let (key, says) = (String::from_utf8_lossy(key), says.map_or("nothing of use".into(), |says| says.to_string()));
    format!("{key} at node {node}: {what} says {says} when {expected} were acknowledged or may have been done")
}

fn in_words(key: &[u8], node: usize, found: &str, expected: &str, ledger: &Ledger) -> String {
    let key = String::from_utf8_lossy(key);
    format!("{key} at node {node}: {found} instead of {expected}; the last were: {}", ledger.past())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_say_their_number() {
        let read = |bytes: Vec<u8>| found(Answer::Value(bytes));
        assert_eq!(value(7, 10), b"7 xxxxxxxx");
        assert_eq!(read(value(7, 10)), Some(Some(7)));
        assert_eq!(read(value(1234, 1)), Some(Some(1234)));
        assert_eq!(read(b"".to_vec()), None);
        assert_eq!(found(Answer::Nothing), Some(None));
    }

    #[test]
    fn a_counter_that_contradicts_itself_is_not_clean() {
        let read = |bytes: &[u8]| counted(&Answer::Value(bytes.to_vec()));
        assert_eq!((counted(&Answer::Number(3)), read(b"12"), counted(&Answer::Nothing)), (Some(3), Some(12), Some(0)));
        assert_eq!((read(b"12 x"), counted(&Answer::Done)), (None, None));
        let (mut seen, mut all) = (Seen::new(1), Seen::new(1));
        seen.miscounts(Contradiction::Lost, || miscounted(b"c", 0, "a read", Some(4), "5"));
        all.add(&seen);
        assert!(!all.is_clean());
        assert_eq!(
            all.told,
            ["Lost increment: c at node 0: a read says 4 when 5 were acknowledged or may have been done"]
        );
    }

    #[test]
    fn a_cold_key_is_written_once_and_left_alone() {
        let mut random = Random::new(1, 1);
        for key in [3, 7, 11, 15] {
            let Habit::Cold { deleted, read } = Habit::of(key) else { panic!("{key} is cold") };
            let (mut ledger, mut done) = (Ledger::new(), Vec::new());
            for _ in 0..4000 {
                let Some(op) = Habit::of(key).next(&ledger, &mut random) else { continue };
                // The first try of each is unknown: it is made again.
                if op != Op::Read {
                    let number = ledger.next();
                    let again = done.contains(&op);
                    ledger.ended(number, op == Op::Delete, if again { Ending::Acknowledged } else { Ending::Unknown });
                }
                done.push(op);
            }
            assert_eq!(done.contains(&Op::Read), read, "key {key}");
            done.retain(|&op| op != Op::Read);
            let expected = [Op::Write, Op::Write, Op::Delete, Op::Delete];
            assert_eq!(done, expected[..if deleted { 4 } else { 2 }], "key {key}");
        }
        assert_eq!((0..16).filter(|&key| Habit::of(key) == Habit::Busy).count(), 12);
    }

    #[test]
    fn the_share_of_what_was_done_leaves_a_node_out() {
        let mut seen = Seen::new(2);
        seen.counts[0] = Counts { reads: 15, refused: 2, unknown: 2, cut: 1, unreached: 4, ..Counts::default() };
        seen.counts[1] = Counts { writes: 10, refused: 10, unreached: 1, ..Counts::default() };
        assert_eq!(seen.without(&[1]).share(), 0.75);
        assert_eq!(seen.without(&[0]).unreached, 1);
        assert_eq!(seen.without(&[0, 1]).share(), 0.0);
        assert_eq!(seen.total().share(), 0.625);
        assert_eq!(Counts::default().share(), 0.0);
    }

    #[test]
    fn what_waited_for_a_node_that_stood_still_is_told_apart() {
        let mut seen = Seen::new(1);
        let ended = |seen: &mut Seen, held, answer| seen.ended(0, Duration::from_secs(9), held, &answer);
        assert_eq!(ended(&mut seen, true, Ok(Answer::Done)), Ending::Acknowledged);
        assert_eq!(ended(&mut seen, true, Ok(Answer::Error("TIMEOUT no answer".into()))), Ending::Refused);
        assert_eq!(ended(&mut seen, true, Ok(Answer::Error("UNKNOWN outcome".into()))), Ending::Unknown);
        assert_eq!(ended(&mut seen, true, Err(io::ErrorKind::UnexpectedEof.into())), Ending::Unknown);
        let early = seen.ended(0, Duration::from_millis(10), true, &Ok(Answer::Done));
        assert_eq!(early, Ending::Acknowledged);
        assert_eq!(seen.held, Held { done: 1, refused: 1, unknown: 2 }, "not what was over before it stood still");
        assert_eq!((seen.counts[0].refused, seen.counts[0].unknown, seen.counts[0].cut), (1, 1, 1));
        assert_eq!(seen.longest(), 0.0);
        ended(&mut seen, false, Ok(Answer::Done));
        let mut all = Seen::new(1);
        all.add(&seen);
        all.add(&seen);
        assert_eq!(all.held, Held { done: 2, refused: 2, unknown: 4 });
        assert!(all.longest() >= 8.9);
    }

    /// A client that gave a node up while it stood still would have its request done later than what it did elsewhere.
    #[test]
    fn half_of_the_clients_turn_away_from_a_node_that_stands_still() {
        let listeners = [0, 1].map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
        let shared = Shared {
            addresses,
            used: AtomicU64::new(2),
            aside: vec![AtomicU64::new(0), AtomicU64::new(0)],
            patience: REPLY_PATIENCE,
            stop: AtomicBool::new(false),
            start: Instant::now(),
            seen: [(); 2].map(|()| Mutex::new(Seen::new(2))).into(),
        };
        let args = LoadArgs { clients: 2, keys: 4, rate: 0, value_size: 10, seed: 1 };
        let load = Load { shared: Arc::new(shared), threads: Vec::new() };
        let nodes = |number| {
            let mut client = Client::new(number, &args, load.shared.clone());
            (0..64).filter_map(|_| client.any_node()).collect::<std::collections::BTreeSet<_>>().len()
        };
        assert_eq!((nodes(0), nodes(1)), (2, 2));
        load.set_aside(1);
        assert_eq!((nodes(0), nodes(1)), (1, 2));
        load.take_back(1);
        assert_eq!((nodes(0), nodes(1)), (2, 2));
    }

    #[test]
    fn errors_are_counted_by_their_first_word() {
        let mut seen = Seen::new(2);
        seen.error("CLUSTERDOWN too few");
        seen.error("CLUSTERDOWN too few of others");
        let mut all = Seen::new(2);
        all.add(&seen);
        all.add(&seen);
        assert_eq!(all.errors_in_words(), "CLUSTERDOWN 4");
        assert_eq!(all.examples["CLUSTERDOWN"], "CLUSTERDOWN too few");
        assert!(all.is_clean());
    }
}
