//! What a node can be told before it starts: plain data, its defaults, and what makes sense.
//!
//! [`Config`] is all there is: the builder, the node's flags, its file and its environment only fill it in. Nothing here
//! looks at the machine ([`Config::validate`] judges the values alone); whether the machine can do it is asked when the
//! node starts. The words that people write (`all`, `0-3,6`, `4gb`) are parsed here, once for every way in.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use gridkv_cluster::map::{MAX_COPIES, MAX_ZONE};
pub use gridkv_engine::backend::FILE_BACKEND;
use gridkv_engine::backend::{Backend, DEFAULT_BACKEND, Registry};
use gridkv_engine::hash::ShardCount;
use gridkv_engine::record::{MAX_KEY_LEN, MAX_VALUE_LEN};
use gridkv_engine::store::StoreConfig;
use subtle::ConstantTimeEq;

use crate::error::{ConfigError, Error, StartError};

/// Everything a node can be told. Fields may be changed freely; starting checks them with [`Config::validate`].
#[derive(Clone, Debug)]
pub struct Config {
    /// Where RESP clients connect; port 0 picks a free one, `None` serves none. Default: 127.0.0.1:7379.
    pub listen: Option<SocketAddr>,
    /// Where `/metrics`, `/healthz` and `/readyz` are served; port 0 picks a free one, `None` serves none. Default:
    /// 127.0.0.1:9379.
    pub http: Option<SocketAddr>,
    /// The cores to run on. Default: all that the process may use.
    pub cores: CoreSet,
    /// Parts that the key space is cut into. Default: 256.
    pub shards: ShardCount,
    /// Seed of the key hash. Default: `None`, a new random one at each start, so that nobody can choose keys that collide.
    pub seed: Option<u64>,
    /// Storage backend, by its name in [`Config::registry`]. Default: `memory-sharded`.
    pub backend: String,
    /// Where a backend that is kept on disk, such as `file`, has its data; `None` for others. Default: `None`.
    pub data: Option<DataConfig>,
    /// The backends that there are; an embedder adds its own.
    pub registry: Registry,
    /// Bytes of memory for data, divided evenly among the cores; beyond it writes fail. Default: 0, no limit.
    pub max_memory: u64,
    /// Password that RESP clients must give (`AUTH`). Default: none is asked for.
    pub requirepass: Option<Secret>,
    /// Bounds on what clients may ask for.
    pub limits: Limits,
    /// How long a core without work polls before it sleeps. Longer means lower latency after a pause, and more of the CPU
    /// used for nothing. Default: 50 µs.
    pub spin: Duration,
    /// Writes that each shard's change log remembers. Default: 8192.
    pub change_log_entries: usize,
    /// Commands that took at least this long are kept for `SLOWLOG`; `None` keeps none. Default: 10 ms.
    pub slowlog_threshold: Option<Duration>,
    /// Commands that each core keeps for `SLOWLOG`. Default: 128.
    pub slowlog_len: usize,
    /// What the threads are called: `<name>-<core>`. Linux shows the first 15 bytes. Default: `gridkv`.
    pub thread_name: String,
    /// How this node takes part in a cluster; `None` stands alone. Default: `None`.
    pub cluster: Option<ClusterConfig>,
}

/// How data is kept on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataConfig {
    /// The directory, of this node alone; made if it is missing.
    pub dir: PathBuf,
    /// What a power failure may take.
    pub fsync: Fsync,
}

/// When what was written is synced to the disk. Whatever is chosen, a process that ends or is killed loses nothing that it has answered:
/// this is about machines that lose power, or whose kernel crashes.
///
/// ```text
///   always   before it is answered: nothing that was answered is lost
///   5s       every so often, in the background: what was answered since then may be lost (a prefix of each core's writes stays)
///   never    when the operating system sees fit, which is half a minute as a rule
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fsync {
    /// Before it is answered.
    Always,
    /// In such intervals.
    Every(Duration),
    /// By the operating system.
    Never,
}

impl Default for Fsync {
    fn default() -> Fsync {
        Fsync::Every(Duration::from_secs(5))
    }
}

/// How a node takes part in a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterConfig {
    /// Where other nodes connect: peer links over TCP and gossip over UDP, on the same port; port 0 picks a free one.
    /// Default: 127.0.0.1:7380.
    pub peer_listen: SocketAddr,
    /// The address that other nodes are told, where it is not the one that is listened on (behind NAT, or on 0.0.0.0).
    pub advertise: Option<SocketAddr>,
    /// The address that clients of Redis Cluster are told, where it is not the one that is listened on (behind NAT, or a port of a
    /// container that has another number outside).
    pub advertise_client: Option<SocketAddr>,
    /// Peer addresses of nodes of the cluster to join, `host:port`; names are looked up until the node is a member. Without any
    /// the node founds a cluster, unless its directory remembers one.
    pub seeds: Vec<String>,
    /// Where the node stands; copies of a shard are spread over zones. Default: none.
    pub zone: String,
    /// Its share of the shards relative to the others'. Default: 100.
    pub weight: u16,
    /// Copies of each shard; only the founder's word counts. Default: 3.
    pub replicas: u8,
    /// Copies that hold a write before it is acknowledged. Default: 2.
    pub write_quorum: u8,
    /// Replicas that answer a read. Default: 2.
    pub read_quorum: u8,
    /// Where the node keeps its identity, its promises as a voter and the last map. Without one every start is a new node,
    /// and one that votes takes its vote with it when it dies. Default: none.
    pub dir: Option<PathBuf>,
    /// How long an operation may take before it ends with an error. Default: 1 s.
    pub timeout: Duration,
    /// How long a node may be away before its copies are made elsewhere. Default: 30 s.
    pub replace_after: Duration,
}

impl Default for ClusterConfig {
    fn default() -> ClusterConfig {
        ClusterConfig {
            peer_listen: SocketAddr::from(([127, 0, 0, 1], 7380)),
            advertise: None,
            advertise_client: None,
            seeds: Vec::new(),
            zone: String::new(),
            weight: 100,
            replicas: 3,
            write_quorum: 2,
            read_quorum: 2,
            dir: None,
            timeout: Duration::from_secs(1),
            replace_after: Duration::from_secs(30),
        }
    }
}

/// Bounds on what a client may ask for. Each has its own error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a key. Default and most: 65 535.
    pub max_key: usize,
    /// Bytes of a value. Default and most: 512 MiB.
    pub max_value: usize,
    /// Arguments of a command, its name included. Default: 1 048 576.
    pub max_args: usize,
    /// Bytes of requests that a connection holds while they are incomplete or wait; it is closed beyond. Default: 1 GiB.
    pub query_buffer: usize,
    /// Bytes of replies that wait for a client to read them; the connection is not read from above. Default: 1 MiB.
    pub output_high_water: usize,
    /// Requests of a connection that may wait for other cores at once; the connection is not read from above. Default:
    /// 512.
    pub max_pending: usize,
    /// Commands between `MULTI` and `EXEC`. Default: 65 536.
    pub multi_queue: usize,
    /// Connections of clients, on all cores; further ones are told so and closed. Lowered at the start, with a warning, where the limit
    /// on open files does not allow as many. Default: 10 000.
    pub max_connections: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_key: MAX_KEY_LEN,
            max_value: MAX_VALUE_LEN,
            max_args: 1 << 20,
            query_buffer: 1 << 30,
            output_high_water: 1 << 20,
            max_pending: 512,
            multi_queue: 1 << 16,
            max_connections: 10_000,
        }
    }
}

/// Backends of which it is known that nothing of them is on disk.
const BUILT_IN: &[&str] = &[DEFAULT_BACKEND, "memory"];
/// Bytes that a request may need beside its longest key and value: framing, the command's name, options.
pub(crate) const REQUEST_OVERHEAD: usize = 1024;
/// The most entries a change log may be told to remember.
const MAX_CHANGE_LOG: usize = 1 << 24;

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: Some(SocketAddr::from(([127, 0, 0, 1], 7379))),
            http: Some(SocketAddr::from(([127, 0, 0, 1], 9379))),
            cores: CoreSet::All,
            shards: ShardCount::DEFAULT,
            seed: None,
            backend: DEFAULT_BACKEND.to_owned(),
            data: None,
            registry: Registry::default(),
            max_memory: 0,
            requirepass: None,
            limits: Limits::default(),
            spin: Duration::from_micros(50),
            change_log_entries: 8192,
            slowlog_threshold: Some(Duration::from_millis(10)),
            slowlog_len: 128,
            thread_name: "gridkv".to_owned(),
            cluster: None,
        }
    }
}

impl Config {
    /// Checks every setting that can be judged without looking at the machine.
    ///
    /// # Errors
    /// [`Error::Config`] about the first setting that makes no sense.
    pub fn validate(&self) -> Result<(), Error> {
        if let (Some(listen), Some(http)) = (self.listen, self.http)
            && listen == http
            && listen.port() != 0
        {
            return Err(ConfigError::new("http", format!("{http} is the address of RESP clients already"))
                .with_hint("give `listen` and `http` different ports")
                .into());
        }
        if !self.registry.names().any(|name| name == self.backend) {
            let names: Vec<&str> = self.registry.names().collect();
            return Err(ConfigError::new("backend", format!("there is no backend {:?}", self.backend))
                .with_hint(format!("known are: {}", names.join(", ")))
                .into());
        }
        self.validate_data()?;
        if (1..MIN_MEMORY).contains(&self.max_memory) {
            return Err(ConfigError::new(
                "maxmemory",
                format!("{} leaves no room for data", format_size(self.max_memory)),
            )
            .with_hint(format!("0 means no limit; otherwise at least {}", format_size(MIN_MEMORY)))
            .into());
        }
        if self.change_log_entries > MAX_CHANGE_LOG {
            return Err(ConfigError::new(
                "change_log_entries",
                format!("{} is more than {MAX_CHANGE_LOG}", self.change_log_entries),
            )
            .into());
        }
        if self.requirepass.as_ref().is_some_and(|password| password.0.is_empty()) {
            return Err(ConfigError::new("requirepass", "an empty password protects nothing")
                .with_hint("leave it out to ask for none")
                .into());
        }
        if let Some(cluster) = &self.cluster {
            cluster.validate()?;
            for (whose, addr) in [("RESP clients", self.listen), ("the pages over HTTP", self.http)] {
                let peer = cluster.peer_listen;
                if addr == Some(peer) && peer.port() != 0 {
                    return Err(ConfigError::new("peer_listen", format!("{peer} is the address of {whose} already"))
                        .with_hint("give each its own port")
                        .into());
                }
            }
        }
        self.limits.validate()
    }

    fn validate_data(&self) -> Result<(), ConfigError> {
        match &self.data {
            None if self.backend == FILE_BACKEND => {
                Err(ConfigError::new("dir", "the backend `file` needs a directory")
                    .with_hint("name one in which this node alone keeps its data"))
            }
            Some(_) if self.backend != FILE_BACKEND && BUILT_IN.contains(&self.backend.as_str()) => {
                Err(ConfigError::new("fsync", format!("the backend {:?} keeps nothing on disk", self.backend))
                    .with_hint("choose the backend `file`"))
            }
            Some(_) if self.cluster.is_some() => {
                Err(ConfigError::new("backend", "data on disk is kept by a node that stands alone, so far")
                    .with_hint("set `peer_listen` to `none`; in a cluster the other replicas keep the data"))
            }
            Some(DataConfig { fsync: Fsync::Every(interval), .. })
                if !(Duration::from_millis(100)..=Duration::from_secs(3600)).contains(interval) =>
            {
                Err(ConfigError::new("fsync", format!("{interval:?} is not within 100ms and 1h"))
                    .with_hint("for example `1s`; or `always`, or `never`"))
            }
            _ => Ok(()),
        }
    }

    /// A number of shards.
    ///
    /// # Errors
    /// [`Error::Config`] unless it is a power of two from 32 to 16384.
    pub fn shard_count(count: u32) -> Result<ShardCount, Error> {
        ShardCount::new(count).ok_or_else(|| {
            let near = count.clamp(32, 16384).next_power_of_two();
            ConfigError::new("shards", format!("{count} is no power of two from 32 to 16384"))
                .with_hint(format!("for example {near}; the number is fixed for the life of the data"))
                .into()
        })
    }

    /// A core's own instance of the backend.
    pub(crate) fn new_backend(&self, store: &StoreConfig) -> Result<Box<dyn Backend>, Error> {
        self.registry
            .make(&self.backend, &store.backend())
            .map_err(|error| StartError::Backend { name: self.backend.clone(), cause: error.to_string() }.into())
    }
}

impl ClusterConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        for seed in &self.seeds {
            let parts = seed.rsplit_once(':');
            let good = |(host, port): (&str, &str)| {
                let bracketed = host.starts_with('[') && host.ends_with(']');
                !host.is_empty() && (bracketed || !host.contains(':')) && port.parse::<u16>().is_ok_and(|port| port > 0)
            };
            if !parts.is_some_and(good) {
                return Err(ConfigError::new("seed", format!("{seed:?} is no host and port"))
                    .with_hint("write a peer address such as `node1.example:7380` or `[::1]:7380`"));
            }
        }
        if let Some(addr) = self.advertise_client.filter(|addr| addr.ip().is_unspecified() || addr.port() == 0) {
            return Err(ConfigError::new("advertise_client", format!("nobody can connect to {addr}"))
                .with_hint("name the address and the port at which clients reach this node"));
        }
        match self.advertise {
            Some(addr) if addr.ip().is_unspecified() || addr.port() == 0 => {
                return Err(ConfigError::new("advertise", format!("nobody can connect to {addr}"))
                    .with_hint("name the address and the port at which other nodes reach this one"));
            }
            None if self.peer_listen.ip().is_unspecified() => {
                let problem = format!("other nodes cannot be told to connect to {}", self.peer_listen);
                return Err(ConfigError::new("advertise", problem)
                    .with_hint("name the address at which other nodes reach this one, or listen on that one alone"));
            }
            _ => {}
        }
        if self.zone.len() > MAX_ZONE {
            return Err(ConfigError::new("zone", format!("{:?} is longer than {MAX_ZONE} bytes", self.zone)));
        }
        if self.weight == 0 {
            return Err(ConfigError::new("weight", "0 would mean no shard at all")
                .with_hint("100 is normal; to empty a node, drain it"));
        }
        if !(1..=MAX_COPIES).contains(&usize::from(self.replicas)) {
            return Err(ConfigError::new("replicas", format!("{} is not within 1 and {MAX_COPIES}", self.replicas))
                .with_hint("3 copies outlive one node, 5 outlive two"));
        }
        for (setting, quorum) in [("write_quorum", self.write_quorum), ("read_quorum", self.read_quorum)] {
            if !(1..=self.replicas).contains(&quorum) {
                let problem = format!("{quorum} is not within 1 and {}, the number of replicas", self.replicas);
                return Err(
                    ConfigError::new(setting, problem).with_hint(format!("a majority is {}", self.replicas / 2 + 1))
                );
            }
        }
        if !(Duration::from_millis(1)..=Duration::from_secs(60)).contains(&self.timeout) {
            return Err(ConfigError::new("cluster_timeout", format!("{:?} is not within 1ms and 60s", self.timeout))
                .with_hint("for example `1s`"));
        }
        if self.replace_after < Duration::from_secs(1) {
            let problem = format!("{:?} is shorter than it takes to notice that a node is away", self.replace_after);
            return Err(ConfigError::new("replace_after", problem).with_hint("at least `1s`; `30s` is the default"));
        }
        Ok(())
    }

    /// What is allowed and yet probably not wanted, as a line for the log.
    pub fn warning(&self) -> Option<String> {
        let (n, w, r) = (self.replicas, self.write_quorum, self.read_quorum);
        (u16::from(w) + u16::from(r) <= u16::from(n)).then(|| {
            format!(
                "reads may miss acknowledged writes: write_quorum {w} and read_quorum {r} of {n} replicas need not meet"
            )
        })
    }
}

impl Limits {
    fn validate(&self) -> Result<(), Error> {
        let within = |setting, value: usize, least: usize, most: usize| {
            if (least..=most).contains(&value) {
                return Ok(());
            }
            Err(ConfigError::new(setting, format!("{value} is not within {least} and {most}")))
        };
        within("max_key", self.max_key, 1, MAX_KEY_LEN)?;
        within("max_value", self.max_value, 1, MAX_VALUE_LEN)?;
        within("max_args", self.max_args, 16, i32::MAX as usize)?;
        within("output_high_water", self.output_high_water, 16 << 10, 1 << 32)?;
        within("max_pending", self.max_pending, 1, 1 << 20)?;
        within("multi_queue", self.multi_queue, 1, 1 << 24)?;
        within("max_connections", self.max_connections as usize, 1, 1 << 20)?;
        within("query_buffer", self.query_buffer, 1, u32::MAX as usize)?;
        let least = self.max_key + self.max_value + REQUEST_OVERHEAD;
        if self.query_buffer < least {
            return Err(ConfigError::new(
                "query_buffer",
                format!("{} cannot hold a SET of the longest key and value", format_size(self.query_buffer as u64)),
            )
            .with_hint(format!("use at least {least} bytes, or lower `max_value`"))
            .into());
        }
        Ok(())
    }
}

/// The least memory limit that makes sense: that every core gets a part above zero.
const MIN_MEMORY: u64 = 1 << 20;

/// A password: shown by nothing, compared in constant time by whoever checks it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a password.
    pub fn new(password: impl Into<String>) -> Secret {
        Secret(password.into())
    }

    /// Whether `given` is the password, in a time that depends on the length of `given` alone.
    pub fn matches(&self, given: &[u8]) -> bool {
        let known = self.0.as_bytes();
        // A password of another length is compared with itself, so that the length is not told by the time.
        let same_length = known.len() == given.len();
        let against = if same_length { known } else { given };
        bool::from(against.ct_eq(given)) & same_length
    }

    /// The password.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Which cores a node runs on, in the words of `--cores`.
///
/// ```text
///   all        every core the process may use       0-3,6    exactly these
///   2          the first two of them (a count)      @3, 3-3  exactly core 3
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum CoreSet {
    /// Every core the process may use.
    #[default]
    All,
    /// The first so many of them.
    Count(usize),
    /// These, by the numbers the kernel gives them; ascending, each once.
    List(Vec<usize>),
}

/// Numbers of cores beyond this are typing errors; it also bounds what a range can expand to.
const MAX_CORE: usize = 4095;

impl CoreSet {
    /// Chooses among the `allowed` cores of the `online` ones, both ascending.
    pub(crate) fn choose(&self, online: &[usize], allowed: &[usize]) -> Result<Vec<usize>, StartError> {
        match self {
            CoreSet::All => Ok(allowed.to_vec()),
            CoreSet::Count(wanted) => match allowed.get(..*wanted) {
                Some(cores) => Ok(cores.to_vec()),
                None => Err(StartError::TooFewCores {
                    wanted: *wanted,
                    available: allowed.len(),
                    allowed: format_ranges(allowed),
                }),
            },
            CoreSet::List(cores) => {
                for &core in cores {
                    if !online.contains(&core) {
                        return Err(StartError::NoSuchCore { core, online: format_ranges(online) });
                    }
                    if !allowed.contains(&core) {
                        return Err(StartError::CoreForbidden { core, allowed: format_ranges(allowed) });
                    }
                }
                Ok(cores.clone())
            }
        }
    }
}

impl FromStr for CoreSet {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<CoreSet, ConfigError> {
        let text = text.trim();
        let wrong = |problem: String| {
            ConfigError::new("cores", problem).with_hint(
                "write `all`, a count such as `2`, or a list such as `0-3,6`; one core by its number is `@3`",
            )
        };
        if text.eq_ignore_ascii_case("all") {
            return Ok(CoreSet::All);
        }
        if let Ok(count) = text.parse::<usize>() {
            return match count {
                0 => Err(wrong("a node needs at least one core".into())),
                count => Ok(CoreSet::Count(count)),
            };
        }
        let cores = parse_ranges(text.strip_prefix('@').unwrap_or(text)).map_err(wrong)?;
        Ok(CoreSet::List(cores))
    }
}

impl fmt::Display for CoreSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CoreSet::All => f.write_str("all"),
            CoreSet::Count(count) => write!(f, "{count}"),
            CoreSet::List(cores) if cores.len() == 1 => write!(f, "@{}", cores[0]),
            CoreSet::List(cores) => f.write_str(&format_ranges(cores)),
        }
    }
}

/// Parses `0-3,6` into ascending numbers, each once. The kernel writes its lists of CPUs in the same way.
pub(crate) fn parse_ranges(text: &str) -> Result<Vec<usize>, String> {
    let mut found = Vec::new();
    for part in text.split(',') {
        let number = |text: &str| {
            let number: usize = text.trim().parse().map_err(|_| format!("{:?} is no core number", text.trim()))?;
            if number > MAX_CORE { Err(format!("no machine has a core {number}")) } else { Ok(number) }
        };
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return Err(format!("the range {} runs backwards", part.trim()));
        }
        found.extend(first..=last);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// Writes ascending numbers as `0-3,6`.
pub(crate) fn format_ranges(numbers: &[usize]) -> String {
    let mut text = String::new();
    let mut rest = numbers;
    while let Some(&first) = rest.first() {
        let run = rest.iter().zip(first..).take_while(|(number, expected)| *number == expected).count();
        let separator = if text.is_empty() { "" } else { "," };
        text += &match run {
            1 => format!("{separator}{first}"),
            _ => format!("{separator}{first}-{}", first + run - 1),
        };
        rest = &rest[run..];
    }
    text
}

/// Redis's units: with a `b` they count in 1024s, without in 1000s.
const UNITS: [(&str, u64); 9] = [
    ("b", 1),
    ("k", 1000),
    ("kb", 1 << 10),
    ("m", 1000 * 1000),
    ("mb", 1 << 20),
    ("g", 1000 * 1000 * 1000),
    ("gb", 1 << 30),
    ("t", 1000 * 1000 * 1000 * 1000),
    ("tb", 1 << 40),
];

/// Parses a number of bytes in Redis's notation: `4gb`, `512mb`, `100k`, `1048576`. Case does not matter; `kb` is 1024
/// bytes and `k` is 1000.
///
/// # Errors
/// What is wrong with the text, in words.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let wrong = || format!("{text:?} is no size; write bytes, or a whole number with k, kb, m, mb, g, gb, t or tb");
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit = unit.trim().to_ascii_lowercase();
    let factor = match unit.as_str() {
        "" => 1,
        unit => UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?.1,
    };
    number.checked_mul(factor).ok_or_else(|| format!("{text:?} is more than 64 bits can count"))
}

/// Writes a number of bytes so that [`parse_size`] reads the same number: in the largest unit that fits without a rest.
pub fn format_size(bytes: u64) -> String {
    let binary = UNITS.iter().rev().filter(|(name, _)| name.len() == 2);
    match binary.clone().find(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor)) {
        Some((name, factor)) => format!("{}{name}", bytes / factor),
        None => bytes.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_make_sense() {
        Config::default().validate().unwrap();
    }

    #[test]
    fn cores_are_written_in_four_ways() {
        for (text, expected) in [
            ("all", CoreSet::All),
            (" ALL ", CoreSet::All),
            ("1", CoreSet::Count(1)),
            ("12", CoreSet::Count(12)),
            ("0-0", CoreSet::List(vec![0])),
            ("@3", CoreSet::List(vec![3])),
            ("0-3,6", CoreSet::List(vec![0, 1, 2, 3, 6])),
            ("6, 0-1,1", CoreSet::List(vec![0, 1, 6])),
        ] {
            let parsed: CoreSet = text.parse().unwrap();
            assert_eq!(parsed, expected, "{text}");
            assert_eq!(parsed.to_string().parse::<CoreSet>().unwrap(), expected, "{text} written and read again");
        }
        for text in ["", "0", "-1", "some", "3-1", "1,,2", "0-99999999999", "@", "1.5", "@all", "5000-5001"] {
            let error = text.parse::<CoreSet>().expect_err(text);
            assert_eq!(error.setting, "cores");
            assert!(error.hint.is_some());
        }
    }

    #[test]
    fn cores_are_chosen_inside_the_mask() {
        let online = [0, 1, 2, 3];
        let choose = |text: &str, allowed: &[usize]| text.parse::<CoreSet>().unwrap().choose(&online, allowed);
        assert_eq!(choose("all", &[1, 3]), Ok(vec![1, 3]));
        assert_eq!(choose("1", &[1, 3]), Ok(vec![1]));
        assert_eq!(choose("@3", &[1, 3]), Ok(vec![3]));
        assert_eq!(
            choose("3", &[1, 3]),
            Err(StartError::TooFewCores { wanted: 3, available: 2, allowed: "1,3".into() })
        );
        assert_eq!(choose("0-1", &[1, 2, 3]), Err(StartError::CoreForbidden { core: 0, allowed: "1-3".into() }));
        assert_eq!(choose("0,1999", &online), Err(StartError::NoSuchCore { core: 1999, online: "0-3".into() }));
    }

    #[test]
    fn sizes_are_read_as_redis_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("17b", 17),
            ("100k", 100_000),
            ("1kb", 1024),
            ("512mb", 512 << 20),
            ("4gb", 4 << 30),
            ("4GB", 4 << 30),
            ("4 gb", 4 << 30),
            ("2g", 2_000_000_000),
            ("1tb", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
            assert_eq!(parse_size(&format_size(bytes)), Ok(bytes), "{text} written and read again");
        }
        for text in ["", "lots", "gb", "-1", "1.5gb", "4gbs", "99999999999999999999", "99999999999tb", "4gb5"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(format_size(4 << 30), "4gb");
        assert_eq!(format_size(1500), "1500");
    }

    #[test]
    fn ranges_are_written_as_the_kernel_writes_them() {
        for text in ["0", "0-3", "0-3,6", "1,3,5", "0-1,4-5,4095"] {
            assert_eq!(format_ranges(&parse_ranges(text).unwrap()), text);
        }
        assert_eq!(format_ranges(&[]), "");
    }

    #[test]
    fn settings_that_make_no_sense_are_named() {
        type Change = fn(&mut Config);
        let changes: [(&str, Change); 9] = [
            ("http", |c| c.http = c.listen),
            ("backend", |c| c.backend = "abacus".into()),
            ("maxmemory", |c| c.max_memory = 1),
            ("requirepass", |c| c.requirepass = Some(Secret::new(""))),
            ("max_key", |c| c.limits.max_key = 1 << 16),
            ("max_value", |c| c.limits.max_value = 1 << 30),
            ("query_buffer", |c| c.limits.query_buffer = 1 << 20),
            ("max_connections", |c| c.limits.max_connections = 0),
            ("change_log_entries", |c| c.change_log_entries = usize::MAX),
        ];
        for (setting, change) in changes {
            let mut config = Config::default();
            change(&mut config);
            match config.validate() {
                Err(Error::Config(error)) => assert_eq!(error.setting, setting, "{error}"),
                other => panic!("{setting}: {other:?}"),
            }
        }
        assert!(Config::shard_count(256).is_ok());
        assert!(Config::shard_count(100).unwrap_err().hint().unwrap().contains("128"));
        assert!(Config::shard_count(u32::MAX).is_err());
    }

    #[test]
    fn a_password_is_never_printed() {
        let config = Config { requirepass: Some(Secret::new("open sesame")), ..Config::default() };
        assert!(!format!("{config:?}").contains("sesame"));
    }
}
