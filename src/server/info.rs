//! `INFO`: the node in Redis's sections and field names, so that the exporters and dashboards of Redis work, and one
//! section of our own with a line per core.
//!
//! Rendering sees only values ([`Host`] and [`NodeMetrics`]). A field that Redis has and this node does not measure is left
//! out, but where readers take lines apart by their whole form (`cmdstat_…`): there it is 0.
//!
//! `redis_version` is the version whose commands are spoken; `gridkv_version` is this node's own. `used_memory` counts
//! data (entries, tables, change logs), which is what `maxmemory` limits; the process as a whole is `used_memory_rss`.

use std::collections::BTreeSet;
use std::fmt::{Display, Write as _};
use std::fs;

use gridkv_engine::reply::Reply;

use super::Outcome;
use super::gather::each_core;
use super::settings::Settings;
use crate::config::format_size;
use crate::cores::CoreRc;
use crate::metrics::{CoreMetrics, NodeMetrics};

/// The version of Redis whose commands and answers are spoken.
const REDIS_VERSION: &str = "7.2.0";

/// Ticks of `/proc/self/stat` per second: part of Linux's interface, whatever the kernel counts in.
const TICKS_PER_SECOND: f64 = 100.0;

const SECONDS_PER_DAY: u64 = 24 * 60 * 60;

/// What the operating system says about this process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Process {
    pub(crate) id: u32,
    pub(crate) rss_bytes: u64,
    pub(crate) rss_peak_bytes: u64,
    pub(crate) cpu_user: f64,
    pub(crate) cpu_system: f64,
    pub(crate) cpu_user_children: f64,
    pub(crate) cpu_system_children: f64,
}

impl Process {
    /// Reads `/proc`, which is memory of the kernel and no disk. What is hidden reads as 0.
    pub(crate) fn read() -> Process {
        let file = |name: &str| fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
        Process::parse(std::process::id(), &file("status"), &file("stat"))
    }

    fn parse(id: u32, status: &str, stat: &str) -> Process {
        let kilobytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) << 10
        };
        // The second field is the program's name in parentheses, which may hold anything; the third follows it.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let seconds = |field: usize| {
            let ticks: f64 = fields.get(field - 3).and_then(|ticks| ticks.parse().ok()).unwrap_or(0.0);
            ticks / TICKS_PER_SECOND
        };
        Process {
            id,
            rss_bytes: kilobytes("VmRSS:"),
            rss_peak_bytes: kilobytes("VmHWM:"),
            cpu_user: seconds(14),
            cpu_system: seconds(15),
            cpu_user_children: seconds(16),
            cpu_system_children: seconds(17),
        }
    }
}

/// What INFO shows beside the metrics.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) settings: Settings,
    pub(crate) process: Process,
    /// Wall clock in unix microseconds.
    pub(crate) now_us: u64,
}

/// How a section is written.
type Write = fn(&mut Section<'_>, &Host, &NodeMetrics, &CoreMetrics);

/// Every section: its name, whether a plain `INFO` shows it, and its lines.
static SECTIONS: [(&str, bool, Write); 12] = [
    ("Server", true, server),
    ("Clients", true, clients),
    ("Memory", true, memory),
    ("Persistence", true, persistence),
    ("Stats", true, stats),
    ("Replication", true, replication),
    ("CPU", true, cpu),
    ("Commandstats", false, commandstats),
    ("Errorstats", true, errorstats),
    ("Cluster", true, cluster),
    ("Keyspace", true, keyspace),
    ("GridKV", true, gridkv),
];

/// `INFO [section …]`.
pub(crate) async fn info(core: &CoreRc, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let wanted = wanted(&args[1..]);
    let settings = core.state.borrow().settings.clone();
    let cores = each_core(core, |core| core.metrics()).await;
    let node = NodeMetrics { cores, uptime: settings.facts.started.elapsed() };
    let host = Host { settings, process: Process::read(), now_us: super::unix_us() };
    out.verbatim(&render(&host, &node, &wanted));
    Ok(())
}

/// Places in [`SECTIONS`] of what was asked for; unknown names ask for nothing.
fn wanted(names: &[&[u8]]) -> BTreeSet<usize> {
    let is = |name: &[u8], word: &str| name.eq_ignore_ascii_case(word.as_bytes());
    let plain: &[&[u8]] = &[b"default"];
    let names = if names.is_empty() { plain } else { names };
    let mut wanted = BTreeSet::new();
    for name in names {
        let all = is(name, "all") || is(name, "everything");
        for (place, (title, in_default, _)) in SECTIONS.iter().enumerate() {
            if all || (*in_default && is(name, "default")) || is(name, title) {
                wanted.insert(place);
            }
        }
    }
    wanted
}

/// The text of the wanted sections.
fn render(host: &Host, node: &NodeMetrics, wanted: &BTreeSet<usize>) -> String {
    let total = node.total();
    let mut text = String::new();
    for place in wanted {
        let (title, _, write) = SECTIONS[*place];
        if !text.is_empty() {
            text += "\r\n";
        }
        text += &format!("# {title}\r\n");
        write(&mut Section { text: &mut text }, host, node, &total);
    }
    text
}

/// Lines of a section.
struct Section<'a> {
    text: &'a mut String,
}

impl Section<'_> {
    fn line(&mut self, name: impl Display, value: impl Display) {
        write!(self.text, "{name}:{value}\r\n").expect("a String takes everything");
    }

    /// A number of bytes, once for machines and once for people.
    fn bytes(&mut self, name: &str, bytes: u64) {
        self.line(name, bytes);
        self.line(format_args!("{name}_human"), human(bytes));
    }
}

/// Bytes as Redis writes them for people: `1.50M`.
pub(crate) fn human(bytes: u64) -> String {
    match ["K", "M", "G", "T", "P"].iter().zip(1..).take_while(|(_, power)| bytes >= 1 << (10 * power)).last() {
        None => format!("{bytes}B"),
        Some((unit, power)) => format!("{:.2}{unit}", bytes as f64 / (1u64 << (10 * power)) as f64),
    }
}

fn server(to: &mut Section<'_>, host: &Host, node: &NodeMetrics, _: &CoreMetrics) {
    let facts = &host.settings.facts;
    let seconds = node.uptime.as_secs();
    to.line("redis_version", REDIS_VERSION);
    to.line("gridkv_version", env!("CARGO_PKG_VERSION"));
    to.line("server_name", "gridkv");
    to.line("redis_mode", if facts.in_cluster { "cluster" } else { "standalone" });
    to.line("os", std::env::consts::OS);
    to.line("arch_bits", usize::BITS);
    to.line("multiplexing_api", "io_uring");
    to.line("process_id", host.process.id);
    to.line("run_id", &facts.run_id);
    to.line("tcp_port", facts.listen.map_or(0, |addr| addr.port()));
    to.line("server_time_usec", host.now_us);
    to.line("uptime_in_seconds", seconds);
    to.line("uptime_in_days", seconds / SECONDS_PER_DAY);
    to.line("io_threads_active", u8::from(facts.cores > 1));
}

fn clients(to: &mut Section<'_>, host: &Host, _: &NodeMetrics, total: &CoreMetrics) {
    to.line("connected_clients", total.connections);
    to.line("cluster_connections", 0);
    to.line("maxclients", host.settings.maxclients);
    to.line("client_output_bytes", total.output_bytes);
    to.line("blocked_clients", 0);
}

fn memory(to: &mut Section<'_>, host: &Host, _: &NodeMetrics, total: &CoreMetrics) {
    to.bytes("used_memory", total.store.memory_bytes);
    to.bytes("used_memory_rss", host.process.rss_bytes);
    to.bytes("used_memory_rss_peak", host.process.rss_peak_bytes);
    // Readers expect a peak that is no less than the use; what is measured is the peak of the process.
    to.bytes("used_memory_peak", host.process.rss_peak_bytes.max(total.store.memory_bytes));
    to.line("used_memory_dataset", total.store.memory_bytes);
    to.bytes("maxmemory", host.settings.max_memory);
    to.line("maxmemory_policy", "noeviction");
    to.line("refused_writes", total.store.refused);
    let ratio = host.process.rss_bytes as f64 / total.store.memory_bytes.max(1) as f64;
    to.line("mem_fragmentation_ratio", format_args!("{ratio:.2}"));
}

/// In the names of Redis, whose readers know them; a snapshot here is what both of its kinds of files are.
fn persistence(to: &mut Section<'_>, _: &Host, node: &NodeMetrics, _: &CoreMetrics) {
    let disks = || node.cores.iter().map(|core| &core.disk);
    let status = |good: bool| if good { "ok" } else { "err" };
    let saving = u8::from(disks().any(|disk| disk.snapshotting));
    let kept = disks().any(|disk| disk.kept);
    let last = disks().map(|disk| disk.last_snapshot / 1000).min().unwrap_or_default();
    let saved = status(!disks().any(|disk| disk.failed));
    to.line("loading", 0);
    to.line("rdb_bgsave_in_progress", saving);
    to.line("rdb_last_save_time", last);
    to.line("rdb_last_bgsave_status", saved);
    to.line("aof_enabled", u8::from(kept));
    to.line("aof_rewrite_in_progress", saving);
    to.line("aof_last_bgrewrite_status", saved);
    // A node that cannot write its log stops.
    to.line("aof_last_write_status", "ok");
    if kept {
        to.line("aof_current_size", disks().map(|disk| disk.log.since_snapshot).sum::<u64>());
        to.line("aof_base_size", disks().map(|disk| disk.log.snapshot_bytes).sum::<u64>());
    }
}

fn stats(to: &mut Section<'_>, _: &Host, _: &NodeMetrics, total: &CoreMetrics) {
    to.line("total_connections_received", total.connections_total);
    to.line("total_commands_processed", total.operations());
    to.line("total_net_input_bytes", total.bytes_in);
    to.line("total_net_output_bytes", total.bytes_out);
    to.line("rejected_connections", total.connections_refused);
    to.line("expired_keys", total.store.expired);
    to.line("evicted_keys", total.evicted);
    to.line("keyspace_hits", total.store.hits);
    to.line("keyspace_misses", total.store.misses);
    to.line("total_error_replies", total.errors().map(|(_, count)| count).sum::<u64>());
    to.line("total_writes", total.store.writes);
    to.line("panics", total.panics);
}

fn replication(to: &mut Section<'_>, host: &Host, _: &NodeMetrics, _: &CoreMetrics) {
    to.line("role", "master");
    to.line("connected_slaves", 0);
    to.line("master_replid", &host.settings.facts.run_id);
    to.line("master_repl_offset", 0);
    to.line("repl_backlog_active", 0);
}

fn cpu(to: &mut Section<'_>, host: &Host, _: &NodeMetrics, _: &CoreMetrics) {
    let process = &host.process;
    for (name, seconds) in [
        ("used_cpu_sys", process.cpu_system),
        ("used_cpu_user", process.cpu_user),
        ("used_cpu_sys_children", process.cpu_system_children),
        ("used_cpu_user_children", process.cpu_user_children),
    ] {
        to.line(name, format_args!("{seconds:.6}"));
    }
}

/// As Redis has it; which of the times are estimates is told in `metrics/commands.rs`.
fn commandstats(to: &mut Section<'_>, _: &Host, _: &NodeMetrics, total: &CoreMetrics) {
    for (spec, called) in total.commands() {
        to.line(
            format_args!("cmdstat_{}", spec.name),
            format_args!(
                "calls={},usec={},usec_per_call={:.2},rejected_calls={},failed_calls={}",
                called.calls,
                called.usec(),
                called.usec_per_call(),
                called.rejected,
                called.failed,
            ),
        );
    }
}

fn errorstats(to: &mut Section<'_>, _: &Host, _: &NodeMetrics, total: &CoreMetrics) {
    for (kind, count) in total.errors().filter(|(_, count)| *count > 0) {
        to.line(format_args!("errorstat_{kind}"), format_args!("count={count}"));
    }
}

fn cluster(to: &mut Section<'_>, host: &Host, _: &NodeMetrics, _: &CoreMetrics) {
    to.line("cluster_enabled", u8::from(host.settings.facts.in_cluster));
}

fn keyspace(to: &mut Section<'_>, _: &Host, _: &NodeMetrics, total: &CoreMetrics) {
    let (keys, expiring) = (total.store.keys, total.store.expiring);
    if keys > 0 {
        to.line("db0", format_args!("keys={keys},expires={expiring},avg_ttl=0"));
    }
}

fn gridkv(to: &mut Section<'_>, host: &Host, node: &NodeMetrics, _: &CoreMetrics) {
    to.line("cores", node.cores.len());
    to.line("backend", &host.settings.facts.backend);
    to.line("proto_max_bulk_len", format_size(host.settings.limits.max_value as u64));
    for (core, metrics) in node.cores.iter().enumerate() {
        to.line(
            format_args!("core{core}"),
            format_args!(
                "keys={},ops={},hops={},hops_served={},batches={},sleeps={},wakes={},busy_turns={},idle_turns={},\
                 connections={},memory={}",
                metrics.store.keys,
                metrics.operations(),
                metrics.hops,
                metrics.hops_served,
                metrics.batches,
                metrics.sleeps,
                metrics.wakes,
                metrics.busy_turns,
                metrics.idle_turns,
                metrics.connections,
                metrics.store.memory_bytes,
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::server::settings::tests::settings;
    use gridkv_engine::command;
    use gridkv_engine::store::StoreStats;

    fn core(keys: u64) -> CoreMetrics {
        let mut metrics = CoreMetrics::new();
        metrics.record_command(command::lookup(b"get").unwrap(), 5);
        metrics.record_error(b"OOM no room");
        metrics.store = StoreStats { keys, expiring: 1, memory_bytes: 3 << 20, ..StoreStats::default() };
        metrics.connections = 2;
        metrics
    }

    fn text(names: &[&str]) -> String {
        let host = Host { settings: settings(), process: Process { id: 77, ..Process::default() }, now_us: 1 };
        let node = NodeMetrics { cores: vec![core(4), core(6)], uptime: Duration::from_secs(90_000) };
        let names: Vec<&[u8]> = names.iter().map(|name| name.as_bytes()).collect();
        render(&host, &node, &wanted(&names))
    }

    #[test]
    fn the_numbers_are_sums_over_cores() {
        let text = text(&["all"]);
        for line in [
            "process_id:77",
            "uptime_in_seconds:90000",
            "uptime_in_days:1",
            "tcp_port:7379",
            "connected_clients:4",
            "used_memory:6291456",
            "used_memory_human:6.00M",
            "role:master",
            "total_commands_processed:10",
            "total_error_replies:2",
            "cmdstat_get:calls=10,usec=0,usec_per_call=0.00,rejected_calls=0,failed_calls=0",
            "errorstat_OOM:count=2",
            "db0:keys=10,expires=2,avg_ttl=0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
        }
        assert_eq!(text.lines().filter(|line| line.starts_with("core") && line.contains("keys=")).count(), 2);
    }

    #[test]
    fn sections_are_chosen_by_name_and_come_once() {
        let titles = |names: &[&str]| {
            let text = text(names);
            text.lines().filter_map(|line| line.strip_prefix("# ").map(str::to_owned)).collect::<Vec<_>>()
        };
        assert_eq!(titles(&["cpu", "sentinel"]), ["CPU"]);
        assert_eq!(titles(&["commandSTATS"]), ["Commandstats"]);
        assert_eq!(titles(&["everything", "cpu"]).len(), SECTIONS.len());
        assert_eq!(titles(&[]), titles(&["default", "memory"]));
        assert!(!titles(&[]).contains(&"Commandstats".to_owned()));
        assert!(titles(&["nothing"]).is_empty());
    }

    #[test]
    fn every_line_is_a_title_a_field_or_empty() {
        let text = text(&["all"]);
        let mut names = BTreeSet::new();
        for line in text.split("\r\n").filter(|line| !line.is_empty() && !line.starts_with("# ")) {
            let (name, _) = line.split_once(':').unwrap_or_else(|| panic!("no field: {line:?}"));
            assert!(!line.contains('\n') && names.insert(name.to_owned()), "{line:?}");
        }
    }

    #[test]
    fn proc_is_read_past_any_program_name() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        let stat = "77 (a) b (c) S 1 1 1 0 -1 4194560 10 20 30 40 250 150 5 6 20 0 3 0 1000 1 1";
        let process = Process::parse(77, status, stat);
        assert_eq!((process.rss_bytes, process.rss_peak_bytes), (1 << 20, 2 << 20));
        assert_eq!((process.cpu_user, process.cpu_system), (2.5, 1.5));
        assert_eq!((process.cpu_user_children, process.cpu_system_children), (0.05, 0.06));
        assert_eq!(Process::parse(1, "", ""), Process { id: 1, ..Process::default() });
        assert!(Process::read().rss_bytes > 0);
    }

    #[test]
    fn bytes_are_written_for_people() {
        for (bytes, text) in [(0, "0B"), (1023, "1023B"), (1536, "1.50K"), (3 << 30, "3.00G")] {
            assert_eq!(human(bytes), text);
        }
    }
}
