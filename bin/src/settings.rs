//! What the node is told, and by whom: one table of settings, four layers.
//!
//! ```text
//!   --max-pending 100   >   GRIDKV_MAX_PENDING=100   >   max_pending = 100 in the file   >   the default
//! ```
//!
//! [`SETTINGS`] is the only list. The flags, the variables, the keys of the file, `--print-config` and the test of
//! `docs/CONFIGURATION.md` are all made from it. Every layer hands over text; one function per setting understands it, so
//! a value means the same wherever it was written. What makes sense is judged by [`gridkv::config`].
//!
//! Only the value that counts is looked at; one that a higher layer hides may be nonsense. A key that does not exist is an
//! error always.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};
use gridkv::config::{ClusterConfig, Config, DataConfig, FILE_BACKEND, Fsync, Limits, Secret, format_size, parse_size};
use gridkv::{ConfigError, Error};
use toml::Value;

use crate::admin;
use crate::logging::{self, Format};

/// What the process was asked to do.
#[derive(Debug)]
pub(crate) enum Order {
    /// Run a node.
    Run(Box<Settings>),
    /// Print this and end.
    Print(String),
    /// Ask a running node, or give it an order.
    Admin(admin::Request),
}

/// Everything the process was told.
#[derive(Debug)]
pub(crate) struct Settings {
    /// For the node itself. Its part about the cluster is put in last, from the two fields below.
    pub(crate) config: Config,
    /// Its part in a cluster, if it takes part in one.
    cluster: ClusterConfig,
    /// Whether it stands alone (`peer_listen` is `none`).
    alone: bool,
    /// What is logged.
    pub(crate) log_level: String,
    /// In which shape.
    pub(crate) log_format: Format,
    password_file: Option<String>,
    /// For a backend that is kept on disk.
    fsync: Option<Fsync>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            config: Config::default(),
            cluster: ClusterConfig::default(),
            alone: false,
            log_level: "info".to_owned(),
            log_format: Format::Text,
            password_file: None,
            fsync: None,
        }
    }
}

/// Why the process ends with an error: a line, and a line of advice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refusal {
    message: String,
    /// What to do about it.
    pub(crate) hint: Option<String>,
}

impl Refusal {
    /// A refusal without advice.
    pub(crate) fn new(message: impl Into<String>) -> Refusal {
        Refusal { message: message.into(), hint: None }
    }

    /// The same, with advice.
    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Refusal {
        self.hint = Some(hint.into());
        self
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal { message: error.to_string(), hint: error.hint().map(|hint| hint.into_owned()) }
    }
}

/// Where a value that is no default comes from; a later one beats an earlier one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    File,
    Environment,
    Flag,
}

/// One setting: its name everywhere, what people read about it, and how it is set and shown.
struct Setting {
    /// Key in the file. The flag is `--` and this with hyphens, the variable `GRIDKV_` and this in capitals.
    key: &'static str,
    /// What stands for the value in `--help`.
    value: &'static str,
    /// Heading in `--help`.
    group: &'static str,
    /// One line for `--help`.
    help: &'static str,
    /// Understands a text.
    set: fn(&mut Settings, &str) -> Result<(), ConfigError>,
    /// The value as it may be written into a file; nothing for what is not set, or secret.
    show: fn(&Settings) -> Option<Value>,
}

impl Setting {
    fn flag(&self) -> String {
        self.key.replace('_', "-")
    }

    fn variable(&self) -> String {
        format!("GRIDKV_{}", self.key.to_ascii_uppercase())
    }

    /// How to call a value of that source in an error.
    fn origin(&self, source: &Source) -> String {
        match source {
            Source::File => "file".to_owned(),
            Source::Environment => format!("environment: {}", self.variable()),
            Source::Flag => format!("flag: --{}", self.flag()),
        }
    }
}

const ADDRESSES: &str = "Addresses";
const DATA: &str = "Cores and data";
const CLUSTER: &str = "Cluster";
const ACCESS: &str = "Access";
const LIMITS: &str = "Limits on clients";
const TUNING: &str = "Tuning";
const OBSERVE: &str = "Log and slow log";

/// The one setting that may be given more than once, and as a list in the file.
const SEED: &str = "seed";

/// Every setting there is, in the order of `--help`, `--print-config` and the documentation.
const SETTINGS: &[Setting] = &[
    Setting {
        key: "listen",
        value: "ADDR",
        group: ADDRESSES,
        help: "Where Redis clients connect: address:port, or `none`; port 0 takes a free one",
        set: |s, text| put(&mut s.config.listen, address("listen", text)),
        show: |s| Some(show_address(s.config.listen)),
    },
    Setting {
        key: "http",
        value: "ADDR",
        group: ADDRESSES,
        help: "Where /metrics, /healthz and /readyz are served: address:port, or `none`",
        set: |s, text| put(&mut s.config.http, address("http", text)),
        show: |s| Some(show_address(s.config.http)),
    },
    Setting {
        key: "cores",
        value: "CORES",
        group: DATA,
        help: "CPU cores to run on: `all`, how many (`2`), which (`0-3,6`), or one by its number (`@3`)",
        set: |s, text| put(&mut s.config.cores, text.parse()),
        show: |s| Some(string(&s.config.cores)),
    },
    Setting {
        key: "shards",
        value: "COUNT",
        group: DATA,
        help: "Parts that the keys are divided into: a power of two from 32 to 16384, at least one per core",
        set: |s, text| {
            let count = number("shards", text)?;
            put(&mut s.config.shards, Config::shard_count(count).map_err(config_error))
        },
        show: |s| Some(count(s.config.shards.get() as usize)),
    },
    Setting {
        key: "backend",
        value: "NAME",
        group: DATA,
        help: "What holds the data: memory-sharded, memory, or file, which keeps it in the directory `dir` too",
        set: |s, text| put(&mut s.config.backend, Ok(text.to_owned())),
        show: |s| Some(string(&s.config.backend)),
    },
    Setting {
        key: "fsync",
        value: "WHEN",
        group: DATA,
        help: "When the backend `file` syncs: `always`, every so often (`5s`), or `never`",
        set: |s, text| put(&mut s.fsync, fsync(text).map(Some)),
        show: |s| {
            let kept = s.config.backend == FILE_BACKEND;
            s.fsync.or(kept.then(Fsync::default)).map(|fsync| string(show_fsync(fsync)))
        },
    },
    Setting {
        key: "maxmemory",
        value: "SIZE",
        group: DATA,
        help: "Memory for data, such as `4gb`; above it writes fail and reads go on; 0 is no limit",
        set: |s, text| put(&mut s.config.max_memory, size("maxmemory", text)),
        show: |s| Some(bytes(s.config.max_memory)),
    },
    Setting {
        key: "hash_seed",
        value: "SEED",
        group: DATA,
        help: "Seed of the key hash: a number, or `random` (safer); who joins a cluster takes the cluster's",
        set: |s, text| {
            let seed = if text == "random" { None } else { Some(number("hash_seed", text)?) };
            put(&mut s.config.seed, Ok(seed))
        },
        // As text: TOML's integers end at 63 bits.
        show: |s| Some(s.config.seed.map_or_else(|| string("random"), string)),
    },
    Setting {
        key: "peer_listen",
        value: "ADDR",
        group: CLUSTER,
        help: "Where other nodes connect, over TCP and UDP: address:port, or `none` to stand alone",
        set: |s, text| {
            let peer = address("peer_listen", text)?;
            s.alone = peer.is_none();
            put(&mut s.cluster.peer_listen, Ok(peer.unwrap_or(ClusterConfig::default().peer_listen)))
        },
        show: |s| Some(show_address((!s.alone).then_some(s.cluster.peer_listen))),
    },
    Setting {
        key: SEED,
        value: "HOST:PORT",
        group: CLUSTER,
        help: "Peer address of a node of the cluster to join; may be given again, or as a list with commas",
        set: |s, text| {
            let seeds = text.split(',').map(str::trim).filter(|seed| !seed.is_empty());
            put(&mut s.cluster.seeds, Ok(seeds.map(str::to_owned).collect()))
        },
        show: |s| (!s.cluster.seeds.is_empty()).then(|| string(s.cluster.seeds.join(","))),
    },
    Setting {
        key: "advertise",
        value: "ADDR",
        group: CLUSTER,
        help: "The address that other nodes are told, where it is not the one that is listened on",
        set: |s, text| put(&mut s.cluster.advertise, address("advertise", text)),
        show: |s| s.cluster.advertise.map(string),
    },
    Setting {
        key: "advertise_client",
        value: "ADDR",
        group: CLUSTER,
        help: "The address that Redis Cluster clients are told, where it is not the one that is listened on",
        set: |s, text| put(&mut s.cluster.advertise_client, address("advertise_client", text)),
        show: |s| s.cluster.advertise_client.map(string),
    },
    Setting {
        key: "dir",
        value: "PATH",
        group: CLUSTER,
        help: "Where identity, votes, the last map and data of `file` are; without it, each start is a new node",
        set: |s, text| put(&mut s.cluster.dir, Ok((!text.is_empty()).then(|| text.into()))),
        show: |s| s.cluster.dir.as_ref().map(|path| string(path.display())),
    },
    Setting {
        key: "zone",
        value: "NAME",
        group: CLUSTER,
        help: "Where the node stands, such as a rack; copies of a shard are spread over zones",
        set: |s, text| put(&mut s.cluster.zone, Ok(text.to_owned())),
        show: |s| (!s.cluster.zone.is_empty()).then(|| string(&s.cluster.zone)),
    },
    Setting {
        key: "weight",
        value: "NUMBER",
        group: CLUSTER,
        help: "Its share of the shards, relative to that of the others",
        set: |s, text| put(&mut s.cluster.weight, number("weight", text)),
        show: |s| Some(count(s.cluster.weight.into())),
    },
    Setting {
        key: "replicas",
        value: "COUNT",
        group: CLUSTER,
        help: "Copies of each shard, 1 to 7; this and the two quorums are set by the node that founds the cluster",
        set: |s, text| put(&mut s.cluster.replicas, number("replicas", text)),
        show: |s| Some(count(s.cluster.replicas.into())),
    },
    Setting {
        key: "write_quorum",
        value: "COUNT",
        group: CLUSTER,
        help: "Copies that hold a write before it is acknowledged",
        set: |s, text| put(&mut s.cluster.write_quorum, number("write_quorum", text)),
        show: |s| Some(count(s.cluster.write_quorum.into())),
    },
    Setting {
        key: "read_quorum",
        value: "COUNT",
        group: CLUSTER,
        help: "Copies that answer a read",
        set: |s, text| put(&mut s.cluster.read_quorum, number("read_quorum", text)),
        show: |s| Some(count(s.cluster.read_quorum.into())),
    },
    Setting {
        key: "cluster_timeout",
        value: "TIME",
        group: CLUSTER,
        help: "How long an operation waits for other nodes before it ends with an error",
        set: |s, text| put(&mut s.cluster.timeout, duration("cluster_timeout", text)),
        show: |s| Some(string(format_duration(s.cluster.timeout))),
    },
    Setting {
        key: "replace_after",
        value: "TIME",
        group: CLUSTER,
        help: "How long a node may be away before its copies are made elsewhere",
        set: |s, text| put(&mut s.cluster.replace_after, duration("replace_after", text)),
        show: |s| Some(string(format_duration(s.cluster.replace_after))),
    },
    Setting {
        key: "requirepass",
        value: "PASSWORD",
        group: ACCESS,
        help: "Password that clients must give (AUTH); prefer --requirepass-file, `ps` shows flags to everybody",
        set: |s, text| put(&mut s.config.requirepass, Ok(Some(Secret::new(text)))),
        show: |_| None,
    },
    Setting {
        key: "requirepass_file",
        value: "PATH",
        group: ACCESS,
        help: "File whose first line is that password",
        set: |s, text| {
            let content = fs::read_to_string(text)
                .map_err(|error| ConfigError::new("requirepass_file", format!("{text} cannot be read: {error}")))?;
            s.config.requirepass = Some(Secret::new(content.lines().next().unwrap_or_default()));
            put(&mut s.password_file, Ok(Some(text.to_owned())))
        },
        show: |s| s.password_file.as_ref().map(string),
    },
    Setting {
        key: "max_connections",
        value: "COUNT",
        group: LIMITS,
        help: "Connections at once; further ones get an error and are closed",
        set: |s, text| put(&mut s.config.limits.max_connections, number("max_connections", text)),
        show: |s| Some(count(s.config.limits.max_connections as usize)),
    },
    Setting {
        key: "max_key",
        value: "SIZE",
        group: LIMITS,
        help: "Longest key",
        set: |s, text| put(&mut s.config.limits.max_key, length("max_key", text)),
        show: |s| Some(bytes(s.config.limits.max_key as u64)),
    },
    Setting {
        key: "max_value",
        value: "SIZE",
        group: LIMITS,
        help: "Longest value",
        set: |s, text| put(&mut s.config.limits.max_value, length("max_value", text)),
        show: |s| Some(bytes(s.config.limits.max_value as u64)),
    },
    Setting {
        key: "max_args",
        value: "COUNT",
        group: LIMITS,
        help: "Most words of one command",
        set: |s, text| put(&mut s.config.limits.max_args, number("max_args", text)),
        show: |s| Some(count(s.config.limits.max_args)),
    },
    Setting {
        key: "query_buffer",
        value: "SIZE",
        group: LIMITS,
        help: "Unfinished requests held for one connection; it is closed above",
        set: |s, text| put(&mut s.config.limits.query_buffer, length("query_buffer", text)),
        show: |s| Some(bytes(s.config.limits.query_buffer as u64)),
    },
    Setting {
        key: "output_high_water",
        value: "SIZE",
        group: LIMITS,
        help: "Unread replies of one connection above which its requests have to wait",
        set: |s, text| put(&mut s.config.limits.output_high_water, length("output_high_water", text)),
        show: |s| Some(bytes(s.config.limits.output_high_water as u64)),
    },
    Setting {
        key: "max_pending",
        value: "COUNT",
        group: LIMITS,
        help: "Requests of one connection that other cores work on, above which further ones have to wait",
        set: |s, text| put(&mut s.config.limits.max_pending, number("max_pending", text)),
        show: |s| Some(count(s.config.limits.max_pending)),
    },
    Setting {
        key: "multi_queue",
        value: "COUNT",
        group: LIMITS,
        help: "Most commands between MULTI and EXEC",
        set: |s, text| put(&mut s.config.limits.multi_queue, number("multi_queue", text)),
        show: |s| Some(count(s.config.limits.multi_queue)),
    },
    Setting {
        key: "spin",
        value: "TIME",
        group: TUNING,
        help: "How long an idle core looks for work before it sleeps, such as `50us`: latency against CPU use",
        set: |s, text| put(&mut s.config.spin, duration("spin", text)),
        show: |s| Some(string(format_duration(s.config.spin))),
    },
    Setting {
        key: "change_log_entries",
        value: "COUNT",
        group: TUNING,
        help: "Writes that each shard remembers, for followers to come",
        set: |s, text| put(&mut s.config.change_log_entries, number("change_log_entries", text)),
        show: |s| Some(count(s.config.change_log_entries)),
    },
    Setting {
        key: "slowlog_threshold",
        value: "TIME",
        group: OBSERVE,
        help: "Commands that took at least this long are kept for SLOWLOG; `off` keeps none",
        set: |s, text| {
            let threshold = if text == "off" { None } else { Some(duration("slowlog_threshold", text)?) };
            put(&mut s.config.slowlog_threshold, Ok(threshold))
        },
        show: |s| Some(string(s.config.slowlog_threshold.map_or_else(|| "off".to_owned(), format_duration))),
    },
    Setting {
        key: "slowlog_len",
        value: "COUNT",
        group: OBSERVE,
        help: "Commands that each core keeps for SLOWLOG",
        set: |s, text| put(&mut s.config.slowlog_len, number("slowlog_len", text)),
        show: |s| Some(count(s.config.slowlog_len)),
    },
    Setting {
        key: "log_level",
        value: "LEVEL",
        group: OBSERVE,
        help: "What is logged: off, error, warn, info, debug, trace; or by part: `info,gridkv=debug`",
        set: |s, text| put(&mut s.log_level, logging::check_level(text)),
        show: |s| Some(string(&s.log_level)),
    },
    Setting {
        key: "log_format",
        value: "FORMAT",
        group: OBSERVE,
        help: "Shape of a line of the log, which is written to standard error: `text` or `json`",
        set: |s, text| put(&mut s.log_format, text.parse()),
        show: |s| Some(string(if s.log_format == Format::Json { "json" } else { "text" })),
    },
];

fn put<T>(place: &mut T, value: Result<T, ConfigError>) -> Result<(), ConfigError> {
    *place = value?;
    Ok(())
}

fn config_error(error: Error) -> ConfigError {
    match error {
        Error::Config(error) => error,
        other => unreachable!("the check of a setting said {other}"),
    }
}

fn address(key: &'static str, text: &str) -> Result<Option<SocketAddr>, ConfigError> {
    if text == "none" {
        return Ok(None);
    }
    let hint = "write an address and a port such as `127.0.0.1:7379` or `[::1]:7379`, or `none`";
    let wrong = || ConfigError::new(key, format!("{text:?} is no address")).with_hint(hint);
    if let Ok(address) = text.parse() {
        return Ok(Some(address));
    }
    // A name such as `localhost:7379`: asked of the system only when it looks like one.
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
    if !text.contains(':') || !text.chars().all(plain) {
        return Err(wrong());
    }
    text.to_socket_addrs().ok().and_then(|mut found| found.next()).map(Some).ok_or_else(wrong)
}

fn number<T: std::str::FromStr>(key: &'static str, text: &str) -> Result<T, ConfigError> {
    let text = text.trim();
    text.parse().map_err(|_| {
        let problem = if !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()) {
            format!("{text} is too large")
        } else {
            format!("{text:?} is no whole number")
        };
        ConfigError::new(key, problem).with_hint("write it in digits, without a sign or a unit")
    })
}

fn size(key: &'static str, text: &str) -> Result<u64, ConfigError> {
    parse_size(text).map_err(|problem| ConfigError::new(key, problem).with_hint("for example `512mb`"))
}

fn length(key: &'static str, text: &str) -> Result<usize, ConfigError> {
    let bytes = size(key, text)?;
    usize::try_from(bytes).map_err(|_| ConfigError::new(key, format!("{text} is more than this machine can address")))
}

/// Units of time, in nanoseconds, the longest first.
const UNITS: [(&str, u64); 4] = [("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1_000), ("ns", 1)];

fn duration(key: &'static str, text: &str) -> Result<Duration, ConfigError> {
    let text = text.trim();
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().replace('µ', "u");
    let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
    let nanos = factor.zip(number.parse().ok()).and_then(|(factor, number): (u64, u64)| number.checked_mul(factor));
    nanos.map(Duration::from_nanos).ok_or_else(|| {
        ConfigError::new(key, format!("{text:?} is no time"))
            .with_hint("write a whole number with ns, us, ms or s, such as `50us`")
    })
}

fn format_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    match UNITS.iter().find(|(_, factor)| nanos > 0 && nanos.is_multiple_of(u128::from(*factor))) {
        Some((unit, factor)) => format!("{}{unit}", nanos / u128::from(*factor)),
        None => "0".to_owned(),
    }
}

fn string(value: impl fmt::Display) -> Value {
    Value::String(value.to_string())
}

fn count(value: usize) -> Value {
    i64::try_from(value).map_or_else(|_| string(value), Value::Integer)
}

fn bytes(value: u64) -> Value {
    let text = format_size(value);
    text.parse().map_or_else(|_| Value::String(text), Value::Integer)
}

fn show_address(address: Option<SocketAddr>) -> Value {
    address.map_or_else(|| string("none"), string)
}

/// Never called: a field that is added to the node's configuration and forgotten here does not compile.
const _: fn(Config) = |config| {
    let Config {
        listen: _,
        http: _,
        cores: _,
        shards: _,
        seed: _,
        backend: _,
        data,
        max_memory: _,
        requirepass: _,
        limits,
        spin: _,
        change_log_entries: _,
        slowlog_threshold: _,
        slowlog_len: _,
        cluster,
        // No settings of a process: backends are linked into it, and its threads are called as it is.
        registry: _,
        thread_name: _,
    } = config;
    if let Some(DataConfig { dir: _, fsync: _ }) = data {}
    let Limits {
        max_key: _,
        max_value: _,
        max_args: _,
        query_buffer: _,
        output_high_water: _,
        max_pending: _,
        multi_queue: _,
        max_connections: _,
    } = limits;
    let Some(ClusterConfig {
        peer_listen: _,
        advertise: _,
        advertise_client: _,
        seeds: _,
        zone: _,
        weight: _,
        replicas: _,
        write_quorum: _,
        read_quorum: _,
        dir: _,
        timeout: _,
        replace_after: _,
    }) = cluster
    else {
        return;
    };
};

/// What this process was asked to do, from its command line and environment.
///
/// A command line that makes no sense ends the process with code 2, as does `--help` with 0.
pub(crate) fn from_process() -> Result<Order, Refusal> {
    let matches = command().get_matches();
    if let Some(("admin", below)) = matches.subcommand() {
        return Ok(Order::Admin(admin::request(below)));
    }
    let environment: HashMap<String, OsString> =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value))).collect();
    from(&matches, &environment)
}

/// The command line.
fn command() -> Command {
    let mut command = Command::new("gridkv-node")
        .version(env!("CARGO_PKG_VERSION"))
        .about("An in-memory key-value server that speaks Redis's protocol: one pinned thread per CPU core, nothing shared.")
        .after_help(
"Every setting can also be an environment variable (GRIDKV_MAXMEMORY=4gb) or a line of the file that \
             --config names (maxmemory = \"4gb\"). A flag beats the environment, which beats the file.\n\n\
             Stop it with Ctrl-C, SIGTERM, or the command SHUTDOWN. Unless the backend is `file`, data lives in memory only and is gone then.",
        )
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("PATH")
                .help("TOML file with settings; see docs/gridkv.example.toml [env: GRIDKV_CONFIG]")
                .help_heading("Configuration"),
        )
        .arg(
            Arg::new("print-config")
                .long("print-config")
                .action(ArgAction::SetTrue)
                .help("Print what would be in force and where each value comes from, as such a file, and end")
                .help_heading("Configuration"),
        )
        .subcommand(admin::command())
        .disable_help_subcommand(true)
        .args_conflicts_with_subcommands(true);
    let defaults = Settings::default();
    for setting in SETTINGS {
        let default = match (setting.show)(&defaults) {
            Some(value) => format!(" [default: {}]", plain(&value)),
            None => String::new(),
        };
        let mut arg = Arg::new(setting.key)
            .long(setting.flag())
            .value_name(setting.value)
            .help(format!("{}{default}", setting.help))
            .help_heading(setting.group)
            // `--requirepass -secret` is a password, not a flag.
            .allow_hyphen_values(true);
        if setting.key == "max_connections" {
            arg = arg.visible_alias("maxclients");
        }
        if setting.key == SEED {
            arg = arg.action(ArgAction::Append);
        }
        command = command.arg(arg);
    }
    command
}

/// A value without the quotes of the file.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Lays the layers over each other.
fn from(flags: &ArgMatches, environment: &HashMap<String, OsString>) -> Result<Order, Refusal> {
    let variable = |name: &str| -> Result<Option<String>, Refusal> {
        let Some(value) = environment.get(name) else { return Ok(None) };
        let text = value.to_str().ok_or_else(|| Refusal::new(format!("{name}: its value is no text (UTF-8)")))?;
        Ok(Some(text.to_owned()))
    };
    let path = match flags.get_one::<String>("config") {
        Some(path) => Some(path.clone()),
        None => variable("GRIDKV_CONFIG")?,
    };
    let file = path.map(|path| read_file(&path)).transpose()?.unwrap_or_default();

    let mut chosen: Vec<(&Setting, Source, String)> = Vec::new();
    for setting in SETTINGS {
        if let Some(texts) = flags.get_many::<String>(setting.key) {
            // One text, but for the setting that may be given again.
            let texts: Vec<&str> = texts.map(String::as_str).collect();
            chosen.push((setting, Source::Flag, texts.join(",")));
        } else if let Some(text) = variable(&setting.variable())? {
            chosen.push((setting, Source::Environment, text));
        } else if let Some(text) = file.get(setting.key) {
            chosen.push((setting, Source::File, text.clone()));
        }
    }
    one_password(&mut chosen)?;

    let mut settings = Settings::default();
    for (setting, source, text) in &chosen {
        (setting.set)(&mut settings, text).map_err(|error| Refusal {
            message: format!("{}: {} ({})", error.setting, error.problem, setting.origin(source)),
            hint: error.hint,
        })?;
    }
    if settings.alone && !settings.cluster.seeds.is_empty() {
        return Err(Refusal::new("seed: the node is to join a cluster and to stand alone (peer_listen = none)")
            .with_hint("leave one of the two out"));
    }
    settings.config.cluster = (!settings.alone).then(|| settings.cluster.clone());
    settings.config.data = data(&settings)?;
    settings.config.validate()?;
    if flags.get_flag("print-config") {
        let source = |key: &str| {
            let found = chosen.iter().find(|(setting, ..)| setting.key == key);
            found.map_or_else(|| "default".to_owned(), |(setting, source, _)| setting.origin(source))
        };
        return Ok(Order::Print(print(&settings, source)));
    }
    Ok(Order::Run(Box::new(settings)))
}

/// Where data is kept, if the backend keeps it.
fn data(settings: &Settings) -> Result<Option<DataConfig>, Refusal> {
    let (backend, fsync) = (&settings.config.backend, settings.fsync);
    if backend != FILE_BACKEND {
        return match fsync {
            None => Ok(None),
            Some(_) => Err(Refusal::new(format!("fsync: the backend {backend:?} keeps nothing on disk"))
                .with_hint("choose `backend = file`, or leave `fsync` out")),
        };
    }
    // Beside what else a node keeps in its directory.
    let dir = settings.cluster.dir.as_ref().map(|dir| dir.join("data"));
    Ok(dir.map(|dir| DataConfig { dir, fsync: fsync.unwrap_or_default() }))
}

fn fsync(text: &str) -> Result<Fsync, ConfigError> {
    match text {
        "always" => Ok(Fsync::Always),
        "never" => Ok(Fsync::Never),
        interval => {
            let interval = duration("fsync", interval);
            interval
                .map(Fsync::Every)
                .map_err(|error| error.with_hint("write `always`, `never`, or a time such as `5s`"))
        }
    }
}

fn show_fsync(fsync: Fsync) -> String {
    match fsync {
        Fsync::Always => "always".to_owned(),
        Fsync::Never => "never".to_owned(),
        Fsync::Every(interval) => format_duration(interval),
    }
}

/// A password and a file with a password are two words for one thing: the higher layer counts, one layer may say one.
fn one_password(chosen: &mut Vec<(&Setting, Source, String)>) -> Result<(), Refusal> {
    let source =
        |key: &str| chosen.iter().find(|(setting, ..)| setting.key == key).map(|(_, source, _)| source.clone());
    let (Some(word), Some(file)) = (source("requirepass"), source("requirepass_file")) else { return Ok(()) };
    if word == file {
        return Err(Refusal::new("requirepass and requirepass_file are both given").with_hint("leave one of them out"));
    }
    let loser = if word > file { "requirepass_file" } else { "requirepass" };
    chosen.retain(|(setting, ..)| setting.key != loser);
    Ok(())
}

/// The keys and values of a file, as text.
fn read_file(path: &str) -> Result<HashMap<&'static str, String>, Refusal> {
    let text = fs::read_to_string(path).map_err(|error| Refusal::new(format!("{path} cannot be read: {error}")))?;
    parse_file(path, &text)
}

fn parse_file(path: &str, text: &str) -> Result<HashMap<&'static str, String>, Refusal> {
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count()) + 1;
        Refusal::new(format!("{path}, line {line}: {}", error.message().replace('\n', ", ")))
    })?;
    let mut found = HashMap::new();
    for (key, value) in table {
        let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) else {
            return Err(Refusal::new(format!("{path}: there is no setting {key:?}")).with_hint(closest(&key)));
        };
        let text = match value {
            Value::String(text) => text,
            Value::Integer(number) => number.to_string(),
            Value::Array(list) if key == SEED && list.iter().all(Value::is_str) => {
                list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(",")
            }
            other => {
                let kind = other.type_str();
                return Err(Refusal::new(format!("{path}: {key} is written as {kind}"))
                    .with_hint("write a text in quotes, or a whole number"));
            }
        };
        found.insert(setting.key, text);
    }
    Ok(found)
}

/// The setting that was probably meant.
fn closest(key: &str) -> String {
    let wanted = key.to_ascii_lowercase().replace('-', "_");
    // Redis's word for a setting that has another name here.
    if wanted == "maxclients" {
        return "did you mean `max_connections`?".to_owned();
    }
    let near = SETTINGS.iter().map(|setting| (strsim::damerau_levenshtein(&wanted, setting.key), setting.key)).min();
    match near {
        Some((distance, name)) if distance <= 1 + name.len() / 3 => format!("did you mean `{name}`?"),
        _ => "`gridkv-node --help` lists all settings; in the file `_` stands for `-`".to_owned(),
    }
}

/// The settings as a file, with the source of each value.
fn print(settings: &Settings, source: impl Fn(&str) -> String) -> String {
    let mut lines = Vec::new();
    for setting in SETTINGS {
        let line = match (setting.show)(settings) {
            Some(value) => format!("{} = {value}", setting.key),
            None if setting.key == "requirepass" && settings.config.requirepass.is_some() => {
                format!("# {} = \"***\"", setting.key)
            }
            None => format!("# {} is not set", setting.key),
        };
        lines.push((line, source(setting.key)));
    }
    let width = lines.iter().map(|(line, _)| line.len()).max().unwrap_or(0);
    lines.iter().map(|(line, source)| format!("{line:width$}  # {source}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the process would be told by these flags and variables.
    fn order(flags: &[&str], variables: &[(&str, &str)]) -> Result<Order, Refusal> {
        let matches = command().try_get_matches_from([&["gridkv-node"], flags].concat()).expect("a good command line");
        let environment = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
        from(&matches, &environment)
    }

    fn settings(flags: &[&str], variables: &[(&str, &str)]) -> Settings {
        match order(flags, variables) {
            Ok(Order::Run(settings)) => *settings,
            other => panic!("{other:?}"),
        }
    }

    fn printed(flags: &[&str], variables: &[(&str, &str)]) -> String {
        match order(&[flags, &["--print-config"]].concat(), variables) {
            Ok(Order::Print(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    /// A file that is gone when the test ends.
    struct File(std::path::PathBuf);

    impl File {
        fn new(name: &str, text: &str) -> File {
            let path = std::env::temp_dir().join(format!("gridkv-settings-{}-{name}", std::process::id()));
            fs::write(&path, text).expect("a file in the temporary folder");
            File(path)
        }

        fn path(&self) -> &str {
            self.0.to_str().expect("a plain path")
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn document(name: &str) -> String {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/").to_owned() + name;
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    #[test]
    fn the_command_line_is_well_formed() {
        command().debug_assert();
        for setting in SETTINGS {
            assert!(setting.help.len() <= 100, "one line: {}", setting.help);
        }
    }

    #[test]
    fn a_flag_beats_the_environment_beats_the_file() {
        let file = File::new("layers", "max_args = 100\nmax_pending = 100\nmulti_queue = 100\n");
        let variables = [("GRIDKV_CONFIG", file.path()), ("GRIDKV_MAX_ARGS", "200"), ("GRIDKV_MAX_PENDING", "200")];
        let limits = settings(&["--max-args", "300"], &variables).config.limits;
        assert_eq!((limits.max_args, limits.max_pending, limits.multi_queue), (300, 200, 100));
        assert_eq!(limits.max_connections, Limits::default().max_connections);
        let text = printed(&["--max-args", "300"], &variables);
        for (key, source) in [
            ("max_args", "# flag: --max-args"),
            ("max_pending", "# environment: GRIDKV_MAX_PENDING"),
            ("multi_queue", "# file"),
            ("max_connections", "# default"),
        ] {
            let line = text.lines().find(|line| line.starts_with(key)).unwrap();
            assert!(line.ends_with(source), "{line}");
        }
    }

    /// Every setting is given a value, where possible not its default; what is printed must mean the same.
    #[test]
    fn what_is_printed_can_be_read_again() {
        let password = File::new("password", "open sesame\nsecond line\n");
        let flags: &[(&str, &str)] = &[
            ("listen", "[::1]:1"),
            ("http", "none"),
            ("cores", "0-3,6"),
            ("shards", "512"),
            ("backend", "memory"),
            ("maxmemory", "4gb"),
            ("hash_seed", "18446744073709551615"),
            ("peer_listen", "[::1]:3"),
            ("seed", "one.example:7380,[::1]:4"),
            ("advertise", "192.0.2.1:5"),
            ("advertise_client", "192.0.2.1:6"),
            ("dir", "/var/lib/grid kv"),
            ("zone", "rack 7"),
            ("weight", "250"),
            ("replicas", "5"),
            ("write_quorum", "3"),
            ("read_quorum", "4"),
            ("cluster_timeout", "2s"),
            ("replace_after", "90s"),
            ("requirepass_file", password.path()),
            ("max_connections", "17"),
            ("max_key", "1kb"),
            ("max_value", "1mb"),
            ("max_args", "1000"),
            ("query_buffer", "1500000"),
            ("output_high_water", "64kb"),
            ("max_pending", "5"),
            ("multi_queue", "6"),
            ("spin", "0"),
            ("change_log_entries", "7"),
            ("slowlog_threshold", "off"),
            ("slowlog_len", "9"),
            ("log_level", "warn,gridkv=debug"),
            ("log_format", "json"),
        ];
        // A password is never printed; what keeps data on disk has a test of its own, as it does not go with a cluster.
        for setting in SETTINGS.iter().filter(|setting| !["requirepass", "fsync"].contains(&setting.key)) {
            assert!(flags.iter().any(|(key, _)| *key == setting.key), "{} is not tried here", setting.key);
        }
        let words: Vec<String> =
            flags.iter().map(|(key, value)| format!("--{}={value}", key.replace('_', "-"))).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let first = printed(&words, &[]);
        assert_eq!(first.matches("# default").count(), 2, "only the password and fsync have their defaults: {first}");
        let file = File::new("printed", &first);
        let again = printed(&["--config", file.path()], &[]);
        assert_eq!(without_source(&first), without_source(&again));
        let config = settings(&["--config", file.path()], &[]).config;
        assert_eq!(config.requirepass, Some(Secret::new("open sesame")));
        assert_eq!(config.seed, Some(u64::MAX));
    }

    /// Of what is printed, without where each value comes from.
    fn without_source(text: &str) -> Vec<String> {
        text.lines().map(|line| line.rsplit_once("  # ").unwrap().0.trim_end().to_owned()).collect()
    }

    #[test]
    fn data_on_disk_is_told_to_a_node_that_stands_alone() {
        let alone = ["--backend", "file", "--dir", "/var/lib/grid kv", "--peer-listen", "none"];
        for (text, fsync) in [
            ("always", Fsync::Always),
            ("never", Fsync::Never),
            ("250ms", Fsync::Every(Duration::from_millis(250))),
            ("1s", Fsync::Every(Duration::from_secs(1))),
        ] {
            let first = printed(&[&alone[..], &["--fsync", text]].concat(), &[]);
            assert!(first.contains(&format!("fsync = \"{text}\"")), "{first}");
            let file = File::new("on-disk", &first);
            let again = printed(&["--config", file.path()], &[]);
            assert_eq!(without_source(&first), without_source(&again));
            let config = settings(&["--config", file.path()], &[]).config;
            assert_eq!(config.data, Some(DataConfig { dir: "/var/lib/grid kv/data".into(), fsync }));
        }
        // Not told when: what is in force is printed all the same.
        assert_eq!(settings(&alone, &[]).config.data.unwrap().fsync, Fsync::default());
        assert!(printed(&alone, &[]).contains("fsync = \"5s\""), "{}", printed(&alone, &[]));
        // In memory a directory is for the cluster's memory, and no data is in it.
        assert_eq!(settings(&["--dir", "/var/lib/gridkv"], &[]).config.data, None);
    }

    #[test]
    fn data_on_disk_that_cannot_be_is_refused() {
        for (flags, said, hint) in [
            (&["--fsync", "always"][..], "fsync: the backend \"memory-sharded\" keeps nothing", "`backend = file`"),
            (&["--backend", "memory", "--fsync", "5s", "--dir", "d"], "fsync: the backend \"memory\"", "leave `fsync`"),
            (&["--backend", "file", "--peer-listen", "none"], "dir: the backend `file` needs a directory", "name one"),
            (&["--backend", "file", "--dir", "", "--peer-listen", "none"], "dir: the backend `file` needs", "name one"),
            (
                &["--backend", "file", "--dir", "d"],
                "backend: data on disk is kept by a node that stands alone",
                "`none`",
            ),
            (&["--backend", "file", "--dir", "d", "--peer-listen", "none", "--fsync", "1ms"], "fsync: 1ms", "`always`"),
            (&["--backend", "file", "--dir", "d", "--peer-listen", "none", "--fsync", "2h"], "\"2h\"", "`never`"),
            (&["--backend", "file", "--dir", "d", "--peer-listen", "none", "--fsync", "4000s"], "fsync: 4000s", "`1s`"),
            (&["--fsync", "sometimes"], "fsync: \"sometimes\"", "`always`"),
        ] {
            let error = order(flags, &[]).expect_err(said);
            assert!(error.to_string().contains(said) && !error.to_string().contains('\n'), "{error}");
            assert!(error.hint.as_ref().is_some_and(|text| text.contains(hint)), "{error:?}");
        }
    }

    #[test]
    fn seeds_are_named_one_by_one_or_as_a_list() {
        let seeds =
            |flags: &[&str], variables: &[(&str, &str)]| settings(flags, variables).config.cluster.unwrap().seeds;
        assert_eq!(seeds(&["--seed", "a:1", "--seed", "b:2, c:3"], &[]), ["a:1", "b:2", "c:3"]);
        assert_eq!(seeds(&[], &[("GRIDKV_SEED", "a:1,b:2,")]), ["a:1", "b:2"]);
        let file = File::new("seeds", "seed = ['a:1', 'b:2']\n");
        assert_eq!(seeds(&["--config", file.path()], &[]), ["a:1", "b:2"]);
        assert_eq!(seeds(&["--config", file.path(), "--seed", "c:3"], &[]), ["c:3"]);
        assert!(parse_file("f.toml", "seed = [7380]").unwrap_err().to_string().contains("array"));
    }

    #[test]
    fn a_node_stands_alone_when_it_is_told_so() {
        assert_eq!(settings(&[], &[]).config.cluster, Some(ClusterConfig::default()));
        assert_eq!(settings(&["--peer-listen", "none", "--zone", "z"], &[]).config.cluster, None);
        assert!(printed(&["--peer-listen", "none"], &[]).contains("peer_listen = \"none\""));
        let error = order(&["--peer-listen", "none", "--seed", "a:1"], &[]).unwrap_err();
        assert!(error.to_string().contains("seed") && error.hint.is_some(), "{error:?}");
    }

    #[test]
    fn a_password_is_never_printed_and_one_layer_gives_one() {
        let text = printed(&["--requirepass", "-sesame"], &[]);
        assert!(text.contains("# requirepass = \"***\"") && !text.contains("sesame"), "{text}");
        let file = File::new("one", "from file");
        let both = ["--requirepass", "x", "--requirepass-file", file.path()];
        assert!(order(&both, &[]).unwrap_err().to_string().contains("both"));
        let config = settings(&["--requirepass-file", file.path()], &[("GRIDKV_REQUIREPASS", "variable")]).config;
        assert_eq!(config.requirepass, Some(Secret::new("from file")));
        let config = settings(&["--requirepass", "flag"], &[("GRIDKV_REQUIREPASS_FILE", "/nowhere")]).config;
        assert_eq!(config.requirepass, Some(Secret::new("flag")));
    }

    #[test]
    fn a_value_that_makes_no_sense_is_named_with_its_source() {
        for (key, value) in [
            ("listen", "not an address"),
            ("listen", "7379"),
            ("http", "127.0.0.1"),
            ("cores", "some"),
            ("shards", "100"),
            ("shards", "-1"),
            ("backend", "abacus"),
            ("maxmemory", "lots"),
            ("hash_seed", "dice"),
            ("peer_listen", "7380"),
            ("peer_listen", "127.0.0.1:7379"),
            ("seed", "one.example"),
            ("seed", "one.example:0"),
            ("advertise", "0.0.0.0:7380"),
            ("advertise_client", "[::]:7379"),
            ("weight", "0"),
            ("replicas", "8"),
            ("write_quorum", "4"),
            ("read_quorum", "0"),
            ("cluster_timeout", "0"),
            ("replace_after", "10ms"),
            ("requirepass_file", "/nonexistent/password"),
            ("max_connections", "99999999999"),
            ("spin", "50"),
            ("slowlog_threshold", "fast"),
            ("log_level", "loud"),
            ("log_format", "xml"),
        ] {
            let error = order(&[&format!("--{}={value}", key.replace('_', "-"))], &[]).expect_err(value);
            let text = error.to_string();
            assert!(text.contains(key) && text.contains(value) && !text.contains('\n'), "{text}");
            assert!(error.hint.is_some() || key == "requirepass_file", "no hint: {text}");
        }
        let error = order(&[], &[("GRIDKV_MAXMEMORY", "lots")]).unwrap_err();
        assert!(error.to_string().ends_with("(environment: GRIDKV_MAXMEMORY)"), "{error}");
    }

    #[test]
    fn a_file_with_an_unknown_word_names_the_one_that_was_meant() {
        for (text, said, hint) in [
            ("lissten = 'none'", "\"lissten\"", "`listen`"),
            ("max-key = 1", "\"max-key\"", "`max_key`"),
            ("maxclients = 1", "\"maxclients\"", "`max_connections`"),
            ("appendonly = 'yes'", "\"appendonly\"", "--help"),
            ("[server]\nlisten = 'none'", "\"server\"", ""),
            ("shards = 2.5", "shards", "whole number"),
        ] {
            let error = parse_file("f.toml", text).expect_err(text);
            assert!(error.to_string().starts_with("f.toml: ") && error.to_string().contains(said), "{error}");
            assert!(error.hint.as_ref().unwrap().contains(hint), "{error:?}");
        }
        let error = parse_file("f.toml", "shards = 64\nlisten = = 3\n").unwrap_err();
        assert!(error.to_string().starts_with("f.toml, line 2: ") && !error.to_string().contains('\n'), "{error}");
    }

    #[test]
    fn times_are_written_with_a_unit() {
        for (text, nanos) in
            [("0", 0), ("50us", 50_000), ("50 µs", 50_000), ("10ms", 10_000_000), ("1s", 1_000_000_000)]
        {
            let parsed = duration("spin", text).unwrap();
            assert_eq!(parsed, Duration::from_nanos(nanos), "{text}");
            assert_eq!(duration("spin", &format_duration(parsed)).unwrap(), parsed, "{text} written and read again");
        }
        for text in ["", "us", "50", "-1s", "1.5s", "99999999999999999999s", "99999999999s", "1h"] {
            assert!(duration("spin", text).is_err(), "{text}");
        }
    }

    /// The table of docs/CONFIGURATION.md: key, flag, variable and default of every setting, in this order.
    #[test]
    fn the_documentation_lists_exactly_the_settings_that_exist() {
        let cells = |line: &str| -> Vec<String> {
            line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
        };
        let text = document("CONFIGURATION.md");
        // Other tables of the page have fewer columns, or no flags.
        let rows = text.lines().filter(|line| line.starts_with("| `")).map(cells);
        let written: Vec<Vec<String>> =
            rows.filter(|row| row.len() >= 4 && row[1].starts_with("--")).map(|row| row[..4].to_vec()).collect();
        let defaults = Settings::default();
        let expected: Vec<Vec<String>> = SETTINGS
            .iter()
            .map(|setting| {
                let default = (setting.show)(&defaults).map_or_else(|| "not set".to_owned(), |value| plain(&value));
                vec![setting.key.to_owned(), format!("--{}", setting.flag()), setting.variable(), default]
            })
            .collect();
        assert_eq!(written, expected);
    }

    /// Every line that is commented out in the example is a setting with its default.
    #[test]
    fn the_example_file_is_whole_and_good() {
        let text = document("gridkv.example.toml");
        parse_file("gridkv.example.toml", &text).unwrap();
        let open: String = text
            .lines()
            .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line))
            .map(|line| format!("{line}\n"))
            .collect();
        let found = parse_file("gridkv.example.toml", &open).unwrap();
        let defaults = Settings::default();
        for setting in SETTINGS {
            let text = found.get(setting.key).unwrap_or_else(|| panic!("{} is missing", setting.key));
            if let Some(default) = (setting.show)(&defaults) {
                assert_eq!(*text, plain(&default), "{}", setting.key);
            }
        }
    }
}
