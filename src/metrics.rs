//! What a core counts, and the page that shows it.
//!
//! Each core has plain numbers in its own memory ([`CoreMetrics`]); recording is an addition, never an atomic. Whoever
//! wants to see them asks every core for a copy and holds the copies side by side ([`NodeMetrics`]). Why so:
//! `docs/decisions/0005-metrics-per-core.md`.
//!
//! [`render_prometheus`] writes them in Prometheus's text format, every family twice: `gridkv_core_…` with a `core` label,
//! and `gridkv_…` in sum, so that neither page readers nor `sum()` ever count anything double. The format is a name, labels
//! and a number per line; a client library would want live, shared metrics, which is what cores must not have, so it is
//! written here and held against the format by a test.
//!
//! Invariants: counters only rise; the sum of a histogram's buckets is its count; the set of families does not depend on
//! what clients sent (error prefixes that are not known are counted as `other`).
//!
//! Which calls are timed, and what of a command's time is an estimate: `commands`.
//!
//! Not here: the numbers of the cluster's machines (`cluster/metrics.rs`, which adds them to the same page); `INFO`, which shows the same numbers in Redis's words, and the slow log.

mod commands;

use std::fmt::{Display, Write};
use std::time::Duration;

use gridkv_engine::Millis;
use gridkv_engine::command::{self, CommandId, Spec};
use gridkv_engine::disk::LogStats;
use gridkv_engine::store::StoreStats;
use gridkv_net::mesh::CoreId;
use hdrhistogram::Histogram;

pub(crate) use commands::Watch;
pub use commands::{Called, MEAN_INTERVAL, TIME_CLASSES, Times};
use commands::{Commands, is_refusal, place};

/// Prefixes of error replies that are counted by name.
pub const ERROR_KINDS: [&str; 20] = [
    "ERR",
    "WRONGTYPE",
    "OOM",
    "CROSSSLOT",
    "NOAUTH",
    "WRONGPASS",
    "NOPERM",
    "NOPROTO",
    "EXECABORT",
    "NOSCRIPT",
    "MISCONF",
    "BUSY",
    "LOADING",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "TIMEOUT",
    "UNKNOWN",
    "OVERLOADED",
    "CLOCK",
    "other",
];

/// Latencies above this are recorded as this.
const LONGEST: Duration = Duration::from_secs(60);
/// Upper bounds of the latency buckets on the metrics page, in nanoseconds.
const LATENCY_BOUNDS: [u64; 19] = [
    1_000,
    2_000,
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    200_000_000,
    500_000_000,
    1_000_000_000,
];

/// The numbers of one core. Plain and unshared: only its core changes them; a copy may go anywhere.
#[derive(Clone, Debug)]
pub struct CoreMetrics {
    commands: Commands,
    get: usize,
    set: usize,
    delete: usize,
    exec: usize,
    errors: [u64; ERROR_KINDS.len()],
    latency: Histogram<u64>,
    latency_sum_ns: u64,
    /// Requests per batch that siblings sent here.
    pub batch_sizes: Sizes,
    /// Requests to siblings that came back answered.
    pub hops: u64,
    /// Requests of siblings served here.
    pub hops_served: u64,
    /// Requests of foreign threads served here.
    pub foreign: u64,
    /// What is kept on disk.
    pub disk: OnDisk,
    /// Batches handed to siblings, requests and replies.
    pub batches: u64,
    /// Sleeping siblings woken.
    pub wakes: u64,
    /// Turns that found something to do.
    pub busy_turns: u64,
    /// Turns that found nothing.
    pub idle_turns: u64,
    /// Times this core went to sleep.
    pub sleeps: u64,
    /// Requests that panicked.
    pub panics: u64,
    /// Connections open now.
    pub connections: u64,
    /// Connections accepted.
    pub connections_total: u64,
    /// Connections refused because their limit was reached: that of clients, or that of HTTP.
    pub connections_refused: u64,
    /// Bytes received from clients.
    pub bytes_in: u64,
    /// Bytes sent to clients.
    pub bytes_out: u64,
    /// Messages of foreign threads waiting now.
    pub inbox_depth: u64,
    /// Requests under way to siblings now.
    pub lane_depth: u64,
    /// Bytes of replies that wait for clients now.
    pub output_bytes: u64,
    /// Bytes that this core's data may use; 0 means no limit.
    pub max_memory: u64,
    /// Entries given up by the backend to stay within its memory. The in-memory backends refuse writes instead.
    pub evicted: u64,
    /// What the store counts; filled in when a copy is made.
    pub store: StoreStats,
}

impl CoreMetrics {
    /// All zero.
    pub fn new() -> CoreMetrics {
        let id = |name: &[u8]| command::lookup(name).map_or(0, |spec| usize::from(spec.id.0));
        CoreMetrics {
            commands: Commands::new(),
            get: id(b"GET"),
            set: id(b"SET"),
            delete: id(b"DEL"),
            exec: id(b"EXEC"),
            errors: [0; ERROR_KINDS.len()],
            latency: Histogram::new_with_bounds(1, LONGEST.as_nanos() as u64, 2).expect("the bounds are in order"),
            latency_sum_ns: 0,
            batch_sizes: Sizes::default(),
            hops: 0,
            hops_served: 0,
            foreign: 0,
            disk: OnDisk::default(),
            batches: 0,
            wakes: 0,
            busy_turns: 0,
            idle_turns: 0,
            sleeps: 0,
            panics: 0,
            connections: 0,
            connections_total: 0,
            connections_refused: 0,
            bytes_in: 0,
            bytes_out: 0,
            inbox_depth: 0,
            lane_depth: 0,
            output_bytes: 0,
            max_memory: 0,
            evicted: 0,
            store: StoreStats::default(),
        }
    }

    /// `count` requests called `spec`. Whether the last of them is to be timed as a sample, with `Watch::sample`.
    #[inline]
    pub fn record_command(&mut self, spec: &Spec, count: u64) -> bool {
        self.commands.count(place(spec.id), count)
    }

    /// `count` reads that were no command of a client; else as [`CoreMetrics::record_command`].
    #[inline]
    pub fn record_gets(&mut self, count: u64) -> bool {
        self.commands.count(self.get, count)
    }

    /// `count` writes that were no command of a client; else as [`CoreMetrics::record_command`].
    #[inline]
    pub fn record_sets(&mut self, count: u64) -> bool {
        self.commands.count(self.set, count)
    }

    /// `count` deletes that were no command of a client; else as [`CoreMetrics::record_command`].
    #[inline]
    pub fn record_deletes(&mut self, count: u64) -> bool {
        self.commands.count(self.delete, count)
    }

    /// What [`CoreMetrics::record_gets`] counts.
    #[inline]
    pub(crate) fn get_id(&self) -> CommandId {
        CommandId(self.get as u16)
    }

    /// What [`CoreMetrics::record_sets`] counts.
    #[inline]
    pub(crate) fn set_id(&self) -> CommandId {
        CommandId(self.set as u16)
    }

    /// What [`CoreMetrics::record_deletes`] counts.
    #[inline]
    pub(crate) fn delete_id(&self) -> CommandId {
        CommandId(self.delete as u16)
    }

    /// EXEC, which its session counts.
    #[inline]
    pub(crate) fn exec_id(&self) -> CommandId {
        CommandId(self.exec as u16)
    }

    /// Whether the next call of that command is to be timed as a sample.
    #[inline]
    pub(crate) fn is_next_due(&self, id: CommandId) -> bool {
        self.commands.is_next_due(place(id))
    }

    /// A call that was counted and timed is over, or `together` of them; how long it took.
    pub(crate) fn record_time(&mut self, id: CommandId, watch: &Watch, together: u64) -> Duration {
        self.commands.stop(place(id), watch, together)
    }

    /// A call took so long, whoever counted it.
    pub(crate) fn record_took(&mut self, id: CommandId, took: Duration) {
        self.commands.record(place(id), took, 1);
    }

    /// A request for that command was refused before it ran. Its text is counted by [`CoreMetrics::record_error`].
    pub fn record_rejected(&mut self, id: CommandId) {
        self.commands.reject(place(id));
    }

    /// A call that was counted ended with an error. Its text is counted by [`CoreMetrics::record_error`].
    pub fn record_failed(&mut self, id: CommandId) {
        self.commands.fail(place(id));
    }

    /// A call that was counted ended with the error `text`: it failed, or, when the text says that nothing at all was done, it
    /// was rejected and is no call. Whether it is one. The text itself is counted by [`CoreMetrics::record_error`].
    #[cold]
    pub fn record_end(&mut self, id: CommandId, text: &[u8]) -> bool {
        let ran = !is_refusal(prefix_of(text));
        if ran {
            self.commands.fail(place(id));
        } else {
            self.commands.take_back(place(id));
            self.commands.reject(place(id));
        }
        ran
    }

    /// A call is over that was not counted before: how long it took, and its error if that is how it ended.
    pub(crate) fn record_call(&mut self, id: CommandId, took: Duration, error: Option<&[u8]>) {
        self.commands.count(place(id), 1);
        if error.is_none_or(|text| self.record_end(id, text)) {
            self.record_took(id, took);
        }
    }

    /// A client was sent the error `text`, which begins with its prefix.
    #[cold]
    pub fn record_error(&mut self, text: &[u8]) {
        let prefix = prefix_of(text);
        let kind = ERROR_KINDS.iter().position(|kind| kind.as_bytes() == prefix).unwrap_or(ERROR_KINDS.len() - 1);
        self.errors[kind] += 1;
    }

    /// `count` requests of clients were answered, each `elapsed` after it was read.
    #[inline]
    pub fn record_latency(&mut self, elapsed: Duration, count: u64) {
        let ns = (elapsed.as_nanos() as u64).max(1);
        self.latency_sum_ns = self.latency_sum_ns.saturating_add(ns.saturating_mul(count));
        self.latency.saturating_record_n(ns, count);
    }

    /// A turn ended: whether it did something, how many batches it handed over, how many siblings it woke.
    #[inline]
    pub fn record_turn(&mut self, busy: bool, batches: u32, wakes: u32) {
        if busy {
            self.busy_turns += 1;
            self.batches += u64::from(batches);
            self.wakes += u64::from(wakes);
        } else {
            self.idle_turns += 1;
        }
    }

    /// A batch of `count` replies came from a sibling.
    #[inline]
    pub fn record_replies(&mut self, _from: CoreId, count: usize) {
        self.hops += count as u64;
    }

    /// A batch of `count` requests of a sibling is being served.
    #[inline]
    pub fn record_served(&mut self, count: usize) {
        self.hops_served += count as u64;
        self.batch_sizes.record(count as u64);
    }

    /// A batch of `count` requests of a foreign thread is being served.
    #[inline]
    pub fn record_foreign(&mut self, count: usize) {
        self.foreign += count as u64;
    }

    /// What is known of each command, those that nobody asked for left out.
    pub fn commands(&self) -> impl Iterator<Item = (&'static Spec, Called<'_>)> + '_ {
        let all = (0..self.commands.len()).map(|at| (at, self.commands.called(at)));
        let asked =
            all.filter(|(_, called)| called.calls + called.rejected + called.failed > 0 || called.times.is_some());
        asked.filter_map(|(at, called)| Some((command::by_id(CommandId(at as u16))?, called)))
    }

    /// Calls of all commands.
    pub fn operations(&self) -> u64 {
        self.commands.calls()
    }

    /// Error replies by prefix, in the order of [`ERROR_KINDS`].
    pub fn errors(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        ERROR_KINDS.into_iter().zip(self.errors)
    }

    /// Time from reading a request to having its answer, in nanoseconds.
    pub fn latency(&self) -> &Histogram<u64> {
        &self.latency
    }

    /// Sets every counter to zero; what is a state (connections, depths, data) stays.
    pub fn reset(&mut self) {
        let CoreMetrics { connections, inbox_depth, lane_depth, output_bytes, max_memory, store, .. } = *self;
        *self =
            CoreMetrics { connections, inbox_depth, lane_depth, output_bytes, max_memory, store, ..CoreMetrics::new() };
    }

    /// Adds the numbers of another core.
    pub fn add(&mut self, other: &CoreMetrics) {
        self.commands.add(&other.commands);
        for (sum, part) in self.errors.iter_mut().zip(other.errors) {
            *sum += part;
        }
        self.latency.add(&other.latency).expect("all cores use the same bounds");
        self.latency_sum_ns = self.latency_sum_ns.saturating_add(other.latency_sum_ns);
        self.batch_sizes.add(&other.batch_sizes);
        for number in &NUMBERS {
            (number.add)(self, (number.get)(other));
        }
    }
}

/// The first word of an error.
fn prefix_of(text: &[u8]) -> &[u8] {
    text.split(|&byte| byte == b' ').next().unwrap_or_default()
}

impl Default for CoreMetrics {
    fn default() -> CoreMetrics {
        CoreMetrics::new()
    }
}

/// What a core keeps on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnDisk {
    /// Whether it keeps anything.
    pub kept: bool,
    /// Its log and its snapshots.
    pub log: LogStats,
    /// A snapshot is being taken.
    pub snapshotting: bool,
    /// When the last snapshot was finished, or the node started, in unix milliseconds.
    pub last_snapshot: Millis,
    /// The last snapshot failed.
    pub failed: bool,
}

/// How often sizes occurred, in classes that double: 1, 2, 3–4, 5–8, and so on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Class `i` holds sizes up to `2^i`; the last holds everything larger as well.
    classes: [u64; SIZE_CLASSES],
    sum: u64,
}

/// Batches hold at most a few thousand requests, so the classes end at 2^15.
const SIZE_CLASSES: usize = 16;

impl Sizes {
    /// One batch of `size` requests; an empty one counts as size 1 does.
    #[inline]
    pub fn record(&mut self, size: u64) {
        let class = (u64::BITS - size.saturating_sub(1).leading_zeros()) as usize;
        self.classes[class.min(SIZE_CLASSES - 1)] += 1;
        self.sum += size;
    }

    /// How many were recorded.
    pub fn count(&self) -> u64 {
        self.classes.iter().sum()
    }

    /// Their sum.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    fn add(&mut self, other: &Sizes) {
        for (sum, part) in self.classes.iter_mut().zip(other.classes) {
            *sum += part;
        }
        self.sum += other.sum;
    }
}

/// The numbers of a node: a copy from every core, each consistent in itself, taken at slightly different moments.
#[derive(Clone, Debug)]
pub struct NodeMetrics {
    /// The cores, in order.
    pub cores: Vec<CoreMetrics>,
    /// Time since the node started.
    pub uptime: Duration,
}

impl NodeMetrics {
    /// The sum over all cores.
    pub fn total(&self) -> CoreMetrics {
        let mut total = CoreMetrics::new();
        for core in &self.cores {
            total.add(core);
        }
        total
    }

    /// Keys of the node.
    pub fn keys(&self) -> u64 {
        self.cores.iter().map(|core| core.store.keys).sum()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Counter,
    Gauge,
}

/// A number that every core has among its `T`, as the page shows it.
pub(crate) struct Number<T> {
    /// Without `gridkv_` or `gridkv_core_`.
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) help: &'static str,
    pub(crate) get: fn(&T) -> u64,
    pub(crate) add: fn(&mut T, u64),
}

macro_rules! number {
    ($kind:ident $name:literal $help:literal, $($field:tt)+) => {
        $crate::metrics::Number {
            name: $name,
            kind: $crate::metrics::Kind::$kind,
            help: $help,
            get: |metrics| metrics.$($field)+,
            add: |metrics, part| metrics.$($field)+ += part,
        }
    };
}
pub(crate) use number;

/// Every plain number: what is added up and what the page shows cannot drift apart.
static NUMBERS: [Number<CoreMetrics>; 37] = [
    number!(Gauge "keys" "Keys that can be read.", store.keys),
    number!(Gauge "expiring_keys" "Keys with an expiry.", store.expiring),
    number!(Gauge "tombstones" "Deletes remembered for replicas.", store.tombstones),
    number!(Gauge "tombstone_bytes" "Bytes used by deletes remembered for replicas.", store.tombstone_bytes),
    number!(Gauge "change_log_entries" "Writes remembered in change logs.", store.change_log),
    number!(Gauge "memory_bytes" "Bytes used by entries, tables and change logs.", store.memory_bytes),
    number!(Gauge "memory_limit_bytes" "Bytes that data may use; 0 means no limit.", max_memory),
    number!(Counter "hits_total" "Reads that found their key.", store.hits),
    number!(Counter "misses_total" "Reads that did not find their key.", store.misses),
    number!(Counter "writes_total" "Writes done, deletes included.", store.writes),
    number!(Counter "refused_writes_total" "Writes refused by the memory limit, or by a disk that is nearly full.", store.refused),
    number!(Counter "expired_keys_total" "Entries that expired.", store.expired),
    number!(Counter "evicted_keys_total" "Entries given up by the backend to stay within its memory.", evicted),
    number!(Counter "panics_total" "Requests that panicked and were answered with an error.", panics),
    number!(Gauge "connections" "Client connections open.", connections),
    number!(Counter "connections_total" "Client connections accepted.", connections_total),
    number!(Counter "connections_refused_total" "Connections refused at their limit, those of HTTP too.", connections_refused),
    number!(Counter "received_bytes_total" "Bytes received from clients.", bytes_in),
    number!(Counter "sent_bytes_total" "Bytes sent to clients.", bytes_out),
    number!(Gauge "output_bytes" "Bytes of replies that wait for clients to read them.", output_bytes),
    number!(Counter "hops_total" "Requests to sibling cores that came back answered.", hops),
    number!(Counter "hops_served_total" "Requests of sibling cores served.", hops_served),
    number!(Counter "foreign_requests_total" "Requests of threads outside the cores served.", foreign),
    number!(Counter "batches_total" "Batches handed to sibling cores.", batches),
    number!(Counter "wakes_total" "Sleeping sibling cores woken.", wakes),
    number!(Gauge "inbox_depth" "Messages of threads outside the cores that wait.", inbox_depth),
    number!(Gauge "lane_depth" "Requests under way to sibling cores.", lane_depth),
    number!(Counter "busy_turns_total" "Turns of the loop that found work.", busy_turns),
    number!(Counter "idle_turns_total" "Turns of the loop that found none.", idle_turns),
    number!(Counter "sleeps_total" "Times a core went to sleep.", sleeps),
    number!(Counter "log_written_bytes_total" "Bytes appended to the log on disk.", disk.log.written),
    number!(Counter "log_synced_bytes_total" "Of these, bytes that were synced.", disk.log.synced),
    number!(Counter "log_syncs_total" "Times the log was synced.", disk.log.syncs),
    number!(Gauge "log_since_snapshot_bytes" "Bytes of logs that a start would read.", disk.log.since_snapshot),
    number!(Counter "snapshots_total" "Snapshots finished.", disk.log.snapshots),
    number!(Counter "snapshots_failed_total" "Snapshots that failed.", disk.log.failed_snapshots),
    number!(Gauge "snapshot_bytes" "Bytes of the last snapshot.", disk.log.snapshot_bytes),
];

/// The metrics page in Prometheus's text format, version 0.0.4.
pub fn render_prometheus(node: &NodeMetrics) -> String {
    page(node).text
}

/// That page, to which more can be added.
pub(crate) fn page(node: &NodeMetrics) -> Page {
    let (cores, total) = (&node.cores, node.total());
    let mut page = Page { text: String::with_capacity(16 << 10) };
    page.family("gridkv_build_info", "gauge", "Always 1; the label says which version runs.");
    page.sample("gridkv_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    page.family("gridkv_uptime_seconds", "gauge", "Time since the node started.");
    page.sample("gridkv_uptime_seconds", &[], node.uptime.as_secs_f64());
    page.family("gridkv_cores", "gauge", "Cores that own shards.");
    page.sample("gridkv_cores", &[], node.cores.len());

    page.numbers(&NUMBERS, cores, &total);
    page.both("commands_total", "counter", "Calls by command.", cores, &total, |page, name, labels, metrics| {
        for (spec, called) in metrics.commands() {
            page.sample(name, &[labels, &[("command", spec.name)]].concat(), called.calls);
        }
    });
    let help = "Calls that ended with an error, by command.";
    page.both("commands_failed_total", "counter", help, cores, &total, |page, name, labels, metrics| {
        for (spec, called) in metrics.commands().filter(|(_, called)| called.failed > 0) {
            page.sample(name, &[labels, &[("command", spec.name)]].concat(), called.failed);
        }
    });
    let help = "Requests refused without doing anything, by command; they are no calls.";
    page.both("commands_rejected_total", "counter", help, cores, &total, |page, name, labels, metrics| {
        for (spec, called) in metrics.commands().filter(|(_, called)| called.rejected > 0) {
            page.sample(name, &[labels, &[("command", spec.name)]].concat(), called.rejected);
        }
    });
    let help = "Time that calls took, by command; of short ones some are timed for all.";
    page.both("commands_duration_seconds_total", "counter", help, cores, &total, |page, name, labels, metrics| {
        for (spec, called) in metrics.commands() {
            if let Some(times) = called.times {
                page.sample(name, &[labels, &[("command", spec.name)]].concat(), times.total().as_secs_f64());
            }
        }
    });
    page.both("errors_total", "counter", "Error replies by prefix.", cores, &total, |page, name, labels, metrics| {
        for (kind, count) in metrics.errors() {
            page.sample(name, &[labels, &[("kind", kind)]].concat(), count);
        }
    });
    let help = "Requests per batch from a sibling core.";
    page.both("batch_size", "histogram", help, cores, &total, |page, name, labels, metrics| {
        let sizes = &metrics.batch_sizes;
        let last = SIZE_CLASSES - 1;
        let classes = sizes.classes[..last].iter().enumerate().map(|(i, count)| ((1u64 << i).to_string(), *count));
        page.histogram(name, labels, classes, sizes.count(), sizes.sum() as f64);
    });
    let help = "Time from reading a client's request to having its answer.";
    page.both("request_duration_seconds", "histogram", help, cores, &total, |page, name, labels, metrics| {
        let counts = within_bounds(metrics.latency());
        let buckets = LATENCY_BOUNDS.iter().zip(counts).map(|(ns, count)| ((*ns as f64 / 1e9).to_string(), count));
        page.histogram(name, labels, buckets, metrics.latency().len(), metrics.latency_sum_ns as f64 / 1e9);
    });
    let name = "gridkv_request_duration_quantile_seconds";
    page.family(name, "gauge", "Quantiles of the time of all requests since the start, to 1 %.");
    for quantile in [0.5, 0.9, 0.99, 0.999, 1.0] {
        let ns = total.latency.value_at_quantile(quantile);
        page.sample(name, &[("quantile", &quantile.to_string())], ns as f64 / 1e9);
    }
    page
}

/// How many values lie in each of the [`LATENCY_BOUNDS`]' intervals; larger ones are left out.
fn within_bounds(latency: &Histogram<u64>) -> [u64; LATENCY_BOUNDS.len()] {
    let mut counts = [0; LATENCY_BOUNDS.len()];
    for cell in latency.iter_recorded() {
        // A cell counts where it begins, so that a bound lying inside a cell includes what is exactly on it.
        let from = latency.lowest_equivalent(cell.value_iterated_to());
        if let Some(bucket) = LATENCY_BOUNDS.iter().position(|bound| from <= *bound) {
            counts[bucket] += cell.count_since_last_iteration();
        }
    }
    counts
}

impl Kind {
    fn text(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        }
    }
}

type Labels<'a> = &'a [(&'a str, &'a str)];

/// A page under construction.
pub(crate) struct Page {
    text: String,
}

impl Page {
    /// What was written.
    pub(crate) fn text(self) -> String {
        self.text
    }

    /// Plain numbers, per core and in sum.
    pub(crate) fn numbers<T>(&mut self, numbers: &[Number<T>], cores: &[T], total: &T) {
        for number in numbers {
            self.both(number.name, number.kind.text(), number.help, cores, total, |page, name, labels, metrics| {
                page.sample(name, labels, (number.get)(metrics));
            });
        }
    }

    /// A family with one sample.
    pub(crate) fn single(&mut self, name: &str, kind: Kind, help: &str, value: impl Display) {
        self.family(name, kind.text(), help);
        self.sample(name, &[], value);
    }

    /// A family per core and one in sum.
    fn both<T>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        cores: &[T],
        total: &T,
        write: impl Fn(&mut Page, &str, Labels<'_>, &T),
    ) {
        let sum = format!("gridkv_{name}");
        self.family(&sum, kind, help);
        write(self, &sum, &[], total);
        let each = format!("gridkv_core_{name}");
        self.family(&each, kind, &format!("Per core: {help}"));
        for (core, metrics) in cores.iter().enumerate() {
            write(self, &each, &[("core", &core.to_string())], metrics);
        }
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        self.push(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl Display) {
        self.push(format_args!("{name}"));
        let mut before = '{';
        for (label, text) in labels {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            self.push(format_args!("{before}{label}=\"{text}\""));
            before = ',';
        }
        let close = if labels.is_empty() { "" } else { "}" };
        self.push(format_args!("{close} {value}\n"));
    }

    /// `buckets`: upper bound and number of values in each, ascending, the last (`+Inf`) left out.
    fn histogram(
        &mut self,
        name: &str,
        labels: Labels<'_>,
        buckets: impl Iterator<Item = (String, u64)>,
        count: u64,
        sum: f64,
    ) {
        let bucket = format!("{name}_bucket");
        let mut below = 0;
        for (bound, inside) in buckets {
            below += inside;
            self.sample(&bucket, &[labels, &[("le", &bound)]].concat(), below);
        }
        self.sample(&bucket, &[labels, &[("le", "+Inf")]].concat(), count);
        self.sample(&format!("{name}_sum"), labels, sum);
        self.sample(&format!("{name}_count"), labels, count);
    }

    fn push(&mut self, text: std::fmt::Arguments<'_>) {
        self.text.write_fmt(text).expect("a String takes everything");
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn busy_core() -> CoreMetrics {
        let mut metrics = CoreMetrics::new();
        metrics.record_command(command::lookup(b"GET").unwrap(), 7);
        metrics.record_sets(3);
        metrics.record_error(b"OOM command not allowed");
        metrics.record_error(b"STRANGE thing");
        for (us, count) in [(1, 64), (30, 2), (1_500, 1), (120_000_000, 1)] {
            metrics.record_latency(Duration::from_micros(us), count);
        }
        metrics.record_served(1);
        metrics.record_served(64);
        metrics.record_served(1_000_000);
        metrics.record_turn(true, 2, 1);
        metrics.panics += 1;
        metrics.store = StoreStats { keys: 5, memory_bytes: 1 << 40, ..StoreStats::default() };
        metrics
    }

    pub(crate) fn node() -> NodeMetrics {
        NodeMetrics { cores: vec![busy_core(), CoreMetrics::new(), busy_core()], uptime: Duration::from_millis(1500) }
    }

    /// A sample line, taken apart as the format defines it.
    #[derive(Debug)]
    pub(crate) struct Sample {
        pub(crate) name: String,
        labels: Vec<(String, String)>,
        value: f64,
    }

    fn is_name(text: &str) -> bool {
        !text.is_empty()
            && !text.starts_with(|c: char| c.is_ascii_digit())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
    }

    fn parse_sample(line: &str) -> Sample {
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line}"));
        let (name, labels) = match series.split_once('{') {
            Some((name, rest)) => (name, rest.strip_suffix('}').unwrap_or_else(|| panic!("labels end: {line}"))),
            None => (series, ""),
        };
        assert!(is_name(name), "{line}");
        let mut parsed = Vec::new();
        let mut rest = labels;
        while !rest.is_empty() {
            let (label, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("a label has a value: {line}"));
            assert!(is_name(label) && !label.contains(':'), "{line}");
            let mut text = String::new();
            let mut chars = after.char_indices();
            let end = loop {
                match chars.next().unwrap_or_else(|| panic!("the value ends: {line}")) {
                    (at, '"') => break at,
                    (_, '\\') => match chars.next().map(|(_, c)| c) {
                        Some('n') => text.push('\n'),
                        Some(c @ ('\\' | '"')) => text.push(c),
                        other => panic!("escaped {other:?}: {line}"),
                    },
                    (_, c) => text.push(c),
                }
            };
            parsed.push((label.to_owned(), text));
            rest = &after[end + 1..];
            rest = match rest.strip_prefix(',') {
                Some(more) => more,
                None if rest.is_empty() => rest,
                None => panic!("a comma between labels: {line}"),
            };
        }
        let value = value.parse().unwrap_or_else(|_| panic!("a number: {line}"));
        Sample { name: name.to_owned(), labels: parsed, value }
    }

    /// Reads a page as strictly as the format's description: families together, once each, described before their
    /// samples, no series twice, histograms that add up.
    pub(crate) fn parse_page(page: &str) -> Vec<Sample> {
        assert!(page.ends_with('\n'));
        let mut kinds: BTreeMap<String, String> = BTreeMap::new();
        let mut series = BTreeSet::new();
        let mut samples: Vec<Sample> = Vec::new();
        let mut current = String::new();
        let mut help = None;
        for line in page.lines() {
            if let Some(text) = line.strip_prefix("# HELP ") {
                let (name, text) = text.split_once(' ').expect("a name and a text");
                assert!(is_name(name) && !text.is_empty(), "{line}");
                help = Some(name.to_owned());
            } else if let Some(text) = line.strip_prefix("# TYPE ") {
                let (name, kind) = text.split_once(' ').expect("a name and a type");
                assert_eq!(help.take().as_deref(), Some(name), "HELP comes before TYPE");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "twice: {line}");
                current = name.to_owned();
            } else {
                let sample = parse_sample(line);
                let suffix = sample.name.strip_prefix(&current).unwrap_or_else(|| panic!("outside its family: {line}"));
                match kinds[&current].as_str() {
                    "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}"),
                    _ => assert!(suffix.is_empty(), "{line}"),
                }
                let mut labels = sample.labels.clone();
                labels.sort();
                assert!(series.insert((sample.name.clone(), labels)), "twice: {line}");
                samples.push(sample);
            }
        }
        for (name, _) in kinds.iter().filter(|(_, kind)| *kind == "histogram") {
            let mut before = BTreeMap::new();
            for sample in samples.iter().filter(|sample| sample.name == format!("{name}_bucket")) {
                let (le, others): (Vec<_>, Vec<_>) =
                    sample.labels.iter().cloned().partition(|(label, _)| label == "le");
                let bound: f64 = le[0].1.parse().expect("a bound");
                let (last_bound, last) = before.insert(others, (bound, sample.value)).unwrap_or((-1.0, 0.0));
                assert!(bound > last_bound && sample.value >= last, "{sample:?}");
            }
            assert!(!before.is_empty());
            for (labels, (bound, count)) in before {
                assert_eq!(bound, f64::INFINITY);
                let same = |s: &&Sample| s.name == format!("{name}_count") && s.labels == labels;
                assert_eq!(samples.iter().find(same).expect("a count").value, count);
            }
        }
        samples
    }

    pub(crate) fn value(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels: Vec<_> = labels.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let found = samples.iter().find(|sample| sample.name == name && sample.labels == labels);
        found.unwrap_or_else(|| panic!("no {name} {labels:?}")).value
    }

    #[test]
    fn refusals_of_a_cluster_are_counted_by_name() {
        use gridkv_cluster::outbox::Failure;
        let refusals = [
            Failure::NoQuorum { shard: 7, have: 1, need: 2 },
            Failure::NoOrderer { shard: 7 },
            Failure::TimedOut { shard: 7 },
            Failure::Full,
            Failure::Clock,
            Failure::Busy,
            Failure::NotAdmitted,
        ];
        let mut metrics = CoreMetrics::new();
        for refusal in refusals {
            metrics.record_error(refusal.to_string().as_bytes());
        }
        metrics.record_error(b"UNKNOWN part of the keys was written");
        let counted: Vec<_> = metrics.errors().filter(|(_, count)| *count > 0).collect();
        let expected = ["OOM", "LOADING", "CLUSTERDOWN", "TRYAGAIN", "TIMEOUT", "UNKNOWN", "OVERLOADED", "CLOCK"];
        assert_eq!(counted, expected.map(|kind| (kind, 1)));
    }

    #[test]
    fn the_page_is_valid_and_adds_up() {
        let samples = parse_page(&render_prometheus(&node()));
        let at = |name: &str, labels: &[(&str, &str)]| value(&samples, name, labels);
        assert_eq!(at("gridkv_cores", &[]), 3.0);
        assert_eq!(at("gridkv_uptime_seconds", &[]), 1.5);
        assert_eq!(at("gridkv_keys", &[]), 10.0);
        assert_eq!(at("gridkv_core_keys", &[("core", "1")]), 0.0);
        assert_eq!(at("gridkv_memory_bytes", &[]), (2u64 << 40) as f64);
        assert_eq!(at("gridkv_commands_total", &[("command", "get")]), 14.0);
        assert_eq!(at("gridkv_core_commands_total", &[("core", "2"), ("command", "set")]), 3.0);
        assert_eq!(at("gridkv_errors_total", &[("kind", "OOM")]), 2.0);
        assert_eq!(at("gridkv_errors_total", &[("kind", "other")]), 2.0);
        assert_eq!(at("gridkv_core_panics_total", &[("core", "0")]), 1.0);

        let bucket = |le: &str| at("gridkv_request_duration_seconds_bucket", &[("le", le)]);
        assert_eq!(bucket("0.000001"), 128.0, "what is exactly on a bound is below it");
        assert_eq!(bucket("0.00005"), 132.0);
        assert_eq!(bucket("0.001"), 132.0);
        assert_eq!(bucket("1"), 134.0);
        assert_eq!(bucket("+Inf"), 136.0, "what is too long is counted too");
        assert_eq!(at("gridkv_core_request_duration_seconds_count", &[("core", "0")]), 68.0);
        let sizes = |le: &str| at("gridkv_batch_size_bucket", &[("le", le)]);
        assert_eq!([sizes("1"), sizes("32"), sizes("64"), sizes("+Inf")], [2.0, 2.0, 4.0, 6.0]);
        let median = at("gridkv_request_duration_quantile_seconds", &[("quantile", "0.5")]);
        assert!((median - 1e-6).abs() < 2e-8, "{median}");
    }

    #[test]
    fn label_values_and_help_are_escaped() {
        let mut page = Page { text: String::new() };
        page.family("x_total", "counter", "two\nlines and a \\");
        page.sample("x_total", &[("a", "q\"uo\\te\n"), ("b", "")], 1.5);
        assert_eq!(
            page.text,
            "# HELP x_total two\\nlines and a \\\\\n# TYPE x_total counter\nx_total{a=\"q\\\"uo\\\\te\\n\",b=\"\"} 1.5\n"
        );
        let samples = parse_page(&page.text);
        assert_eq!(value(&samples, "x_total", &[("a", "q\"uo\\te\n"), ("b", "")]), 1.5);
    }

    #[test]
    fn a_node_without_requests_has_a_valid_page_too() {
        let node = NodeMetrics { cores: vec![CoreMetrics::new()], uptime: Duration::ZERO };
        parse_page(&render_prometheus(&node));
    }

    #[test]
    fn sizes_fall_into_classes_that_double() {
        let mut sizes = Sizes::default();
        for (size, class) in [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6), (65, 7), (u64::MAX >> 1, 15)] {
            let before = sizes.classes[class];
            sizes.record(size);
            assert_eq!(sizes.classes[class], before + 1, "{size}");
        }
    }

    #[test]
    fn a_reset_forgets_counts_and_keeps_states() {
        let mut metrics = busy_core();
        metrics.connections = 4;
        metrics.reset();
        assert_eq!((metrics.operations(), metrics.panics, metrics.latency().len()), (0, 0, 0));
        assert_eq!((metrics.connections, metrics.store.keys), (4, 5));
    }
}
