//! What may be changed while a node runs, and the facts of the node that never change.
//!
//! Every core has its own copy of [`Settings`], so reading one costs nothing. A change is checked against one copy, gets
//! a serial number from [`Facts`], and goes to all cores; a core takes a parameter only from a higher serial than it
//! has, so all copies end alike however changes of two clients cross on their way.
//!
//! [`PARAMETERS`] is the list of all that `CONFIG` knows. A parameter that cannot change (`port`) or that says what this
//! node does not have (`appendonly`) may be set to the value it has, which tools do that write back what they read.
//!
//! Not here: the commands (`config`), and who obeys a setting.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gridkv_engine::record::MAX_VALUE_LEN;

use crate::config::{Config, DataConfig, Fsync, Limits, Secret, parse_size};
use crate::platform;

/// What is fixed when a node starts; shared by its cores.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) started: Instant,
    /// Names this run of the node: 40 hexadecimal digits.
    pub(crate) run_id: String,
    /// Where RESP clients connect.
    pub(crate) listen: Option<SocketAddr>,
    pub(crate) cores: usize,
    /// Name of the storage backend.
    pub(crate) backend: String,
    /// Whether it takes part in a cluster.
    pub(crate) in_cluster: bool,
    /// Where and how data is kept on disk, if it is.
    pub(crate) data: Option<DataConfig>,
    serial: AtomicU64,
}

impl Facts {
    pub(crate) fn new(config: &Config, listen: Option<SocketAddr>, cores: usize) -> Facts {
        let digits: String = (0..3).map(|_| format!("{:016x}", platform::random_seed())).collect();
        Facts {
            started: Instant::now(),
            run_id: digits[..40].to_owned(),
            listen,
            cores,
            backend: config.backend.clone(),
            in_cluster: config.cluster.is_some(),
            data: config.data.clone(),
            serial: AtomicU64::new(0),
        }
    }

    /// The number of the next change of settings; higher than all before.
    pub(crate) fn next_serial(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// One core's copy of what may change while the node runs.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) requirepass: Option<Secret>,
    /// Commands that took at least this long are kept for `SLOWLOG`; `None` keeps none.
    pub(crate) slowlog_threshold: Option<Duration>,
    pub(crate) slowlog_len: usize,
    /// Commands that took at least this long are samples of `LATENCY`; `None` takes none.
    pub(crate) latency_threshold: Option<Duration>,
    /// Bytes of data of the whole node; 0 means no limit.
    pub(crate) max_memory: u64,
    /// Bounds on requests. `max_connections` stays as the node started: what [`Settings::maxclients`] can be at most.
    pub(crate) limits: Limits,
    pub(crate) maxclients: u32,
    /// Seconds after which an idle client is closed; 0 means never.
    pub(crate) timeout: u64,
    /// Whether expired keys are looked for in the background.
    pub(crate) active_expire: bool,
    pub(crate) facts: Arc<Facts>,
    serials: [u64; PARAMETERS.len()],
}

/// A change of one parameter: its place in [`PARAMETERS`] and the value as it was written.
pub(crate) type Change = (usize, String);

impl Settings {
    pub(crate) fn new(config: &Config, facts: Arc<Facts>) -> Settings {
        Settings {
            requirepass: config.requirepass.clone(),
            slowlog_threshold: config.slowlog_threshold,
            slowlog_len: config.slowlog_len,
            latency_threshold: None,
            max_memory: config.max_memory,
            maxclients: config.limits.max_connections,
            limits: config.limits.clone(),
            timeout: 0,
            active_expire: true,
            facts,
            serials: [0; PARAMETERS.len()],
        }
    }

    /// Whether a command that took that long is to be remembered; see [`super::note`].
    #[inline]
    pub(crate) fn is_slow(&self, took: Duration) -> bool {
        self.slowlog_threshold.is_some_and(|least| took >= least)
            || self.latency_threshold.is_some_and(|least| took >= least)
    }

    /// Checks changes one after the other without making them.
    ///
    /// # Errors
    /// Name of the first parameter that cannot be changed so, and why.
    pub(crate) fn check(&self, changes: &[Change]) -> Result<(), (&'static str, String)> {
        let mut tried = self.clone();
        for (place, value) in changes {
            let parameter = &PARAMETERS[*place];
            parameter.set(&mut tried, value).map_err(|why| (parameter.name, why))?;
        }
        Ok(())
    }

    /// Makes checked changes, those left out that are older than what is set.
    pub(crate) fn apply(&mut self, serial: u64, changes: &[Change]) {
        for (place, value) in changes {
            if self.serials[*place] < serial && PARAMETERS[*place].set(self, value).is_ok() {
                self.serials[*place] = serial;
            }
        }
    }

    /// The limit of one core's data.
    pub(crate) fn max_memory_of_core(&self) -> u64 {
        match self.max_memory {
            0 => 0,
            total => (total / self.facts.cores as u64).max(1),
        }
    }
}

type Set = fn(&mut Settings, &str) -> Result<(), String>;

/// Something that `CONFIG` knows.
pub(crate) struct Parameter {
    pub(crate) name: &'static str,
    pub(crate) get: fn(&Settings) -> String,
    /// `None` when it cannot be changed while the node runs.
    set: Option<Set>,
}

impl Parameter {
    fn set(&self, settings: &mut Settings, value: &str) -> Result<(), String> {
        match self.set {
            Some(set) => set(settings, value),
            None if (self.get)(settings).eq_ignore_ascii_case(value) => Ok(()),
            None => Err("can't set immutable config".to_owned()),
        }
    }
}

const fn fixed(name: &'static str, get: fn(&Settings) -> String) -> Parameter {
    Parameter { name, get, set: None }
}

const fn changeable(name: &'static str, get: fn(&Settings) -> String, set: Set) -> Parameter {
    Parameter { name, get, set: Some(set) }
}

/// The least that `proto-max-bulk-len` can be set to.
const MIN_VALUE_LIMIT: u64 = 1 << 20;

/// All that `CONFIG` knows, in the order of the alphabet.
pub(crate) static PARAMETERS: [Parameter; 21] = [
    // Redis knows one interval, of a second.
    fixed("appendfsync", |s| match s.facts.data.as_ref().map(|data| data.fsync) {
        Some(Fsync::Always) => "always".to_owned(),
        Some(Fsync::Never) => "no".to_owned(),
        Some(Fsync::Every(_)) | None => "everysec".to_owned(),
    }),
    fixed("appendonly", |s| if s.facts.data.is_some() { "yes" } else { "no" }.to_owned()),
    fixed("bind", |s| s.facts.listen.map_or(String::new(), |addr| addr.ip().to_string())),
    fixed("client-query-buffer-limit", |s| s.limits.query_buffer.to_string()),
    fixed("cluster-enabled", |_| "no".to_owned()),
    fixed("daemonize", |_| "no".to_owned()),
    fixed("databases", |_| "1".to_owned()),
    fixed("dir", |s| s.facts.data.as_ref().map_or(String::new(), |data| data.dir.display().to_string())),
    fixed("io-threads", |s| s.facts.cores.to_string()),
    changeable(
        "latency-monitor-threshold",
        |s| s.latency_threshold.map_or(0, |least| least.as_millis()).to_string(),
        |s, value| {
            let ms = number(value, 0, i64::MAX)?;
            s.latency_threshold = (ms > 0).then(|| Duration::from_millis(ms as u64));
            Ok(())
        },
    ),
    changeable(
        "maxclients",
        |s| s.maxclients.to_string(),
        |s, value| {
            let most = i64::from(s.limits.max_connections);
            let wanted = number(value, 1, i64::from(u32::MAX))?;
            if wanted > most {
                return Err(format!("this node was started for {most} clients at most"));
            }
            s.maxclients = wanted as u32;
            Ok(())
        },
    ),
    changeable(
        "maxmemory",
        |s| s.max_memory.to_string(),
        |s, value| {
            s.max_memory = parse_size(value).map_err(|_| "argument must be a memory value".to_owned())?;
            Ok(())
        },
    ),
    fixed("maxmemory-policy", |_| "noeviction".to_owned()),
    fixed("port", |s| s.facts.listen.map_or(0, |addr| addr.port()).to_string()),
    changeable(
        "proto-max-bulk-len",
        |s| s.limits.max_value.to_string(),
        |s, value| {
            let wanted = parse_size(value).map_err(|_| "argument must be a memory value".to_owned())?;
            let most = most_value(&s.limits);
            if !(MIN_VALUE_LIMIT..=most).contains(&wanted) {
                return Err(format!("argument must be between {MIN_VALUE_LIMIT} and {most} inclusive"));
            }
            s.limits.max_value = wanted as usize;
            Ok(())
        },
    ),
    fixed("replicaof", |_| String::new()),
    changeable(
        "requirepass",
        |s| s.requirepass.as_ref().map_or(String::new(), |p| String::from_utf8_lossy(p.as_bytes()).into_owned()),
        |s, value| {
            s.requirepass = (!value.is_empty()).then(|| Secret::new(value));
            Ok(())
        },
    ),
    fixed("save", |_| String::new()),
    changeable(
        "slowlog-log-slower-than",
        |s| s.slowlog_threshold.map_or("-1".to_owned(), |least| least.as_micros().to_string()),
        |s, value| {
            let us = number(value, -1, i64::MAX)?;
            s.slowlog_threshold = u64::try_from(us).ok().map(Duration::from_micros);
            Ok(())
        },
    ),
    changeable(
        "slowlog-max-len",
        |s| s.slowlog_len.to_string(),
        |s, value| {
            s.slowlog_len = number(value, 0, MAX_SLOWLOG)? as usize;
            Ok(())
        },
    ),
    changeable(
        "timeout",
        |s| s.timeout.to_string(),
        |s, value| {
            s.timeout = number(value, 0, i64::from(i32::MAX))? as u64;
            Ok(())
        },
    ),
];

/// The most entries that a slow log may be told to keep: bounds the memory that it takes.
const MAX_SLOWLOG: i64 = 1 << 20;

/// The longest value that the query buffer can hold beside a key.
fn most_value(limits: &Limits) -> u64 {
    let beside = limits.max_key + crate::config::REQUEST_OVERHEAD;
    limits.query_buffer.saturating_sub(beside).min(MAX_VALUE_LEN) as u64
}

fn number(text: &str, least: i64, most: i64) -> Result<i64, String> {
    let number: i64 = text.parse().map_err(|_| "argument couldn't be parsed into an integer".to_owned())?;
    if !(least..=most).contains(&number) {
        return Err(format!("argument must be between {least} and {most} inclusive"));
    }
    Ok(number)
}

/// The place of the parameter of that name, in any case.
pub(crate) fn find(name: &[u8]) -> Option<usize> {
    PARAMETERS.iter().position(|parameter| parameter.name.as_bytes().eq_ignore_ascii_case(name))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn settings() -> Settings {
        let config = Config::default();
        let facts = Facts::new(&config, config.listen, 4);
        Settings::new(&config, Arc::new(facts))
    }

    fn change(name: &str, value: &str) -> Change {
        (find(name.as_bytes()).unwrap_or_else(|| panic!("no {name}")), value.to_owned())
    }

    fn get(settings: &Settings, name: &str) -> String {
        (PARAMETERS[find(name.as_bytes()).unwrap()].get)(settings)
    }

    #[test]
    fn every_parameter_may_be_set_to_what_it_is() {
        let mut settings = settings();
        for (place, parameter) in PARAMETERS.iter().enumerate() {
            let before = (parameter.get)(&settings);
            let same = [(place, before.clone())];
            settings.check(&same).unwrap_or_else(|error| panic!("{error:?}"));
            settings.apply(1, &same);
            assert_eq!((parameter.get)(&settings), before, "{}", parameter.name);
        }
        assert!(PARAMETERS.is_sorted_by_key(|parameter| parameter.name));
    }

    #[test]
    fn values_that_make_no_sense_are_refused_with_the_name() {
        let settings = settings();
        for (name, value) in [
            ("maxmemory", "lots"),
            ("maxmemory", "-1"),
            ("port", "1"),
            ("databases", "16"),
            ("save", "3600 1"),
            ("appendonly", "yes"),
            ("maxclients", "0"),
            ("maxclients", "10001"),
            ("slowlog-max-len", "-1"),
            ("slowlog-log-slower-than", "-2"),
            ("timeout", "soon"),
            ("proto-max-bulk-len", "1gb"),
            ("proto-max-bulk-len", "1"),
        ] {
            let (refused, why) = settings.check(&[change("timeout", "5"), change(name, value)]).expect_err(name);
            assert_eq!(refused, name, "{why}");
        }
        assert_eq!(get(&settings, "timeout"), "0", "nothing of a refused change was made");
    }

    #[test]
    fn changes_that_cross_on_their_way_end_alike_everywhere() {
        let first = [change("maxmemory", "100mb"), change("slowlog-log-slower-than", "-1")];
        let second = [change("MAXMEMORY", "200mb"), change("requirepass", "sesame")];
        let (mut here, mut there) = (settings(), settings());
        here.apply(1, &first);
        here.apply(2, &second);
        there.apply(2, &second);
        there.apply(1, &first);
        for parameter in &PARAMETERS {
            assert_eq!((parameter.get)(&here), (parameter.get)(&there), "{}", parameter.name);
        }
        assert_eq!(here.max_memory_of_core(), 50 << 20);
        assert_eq!(here.slowlog_threshold, None);
        assert_eq!(get(&there, "requirepass"), "sesame");
    }

    #[test]
    fn a_run_has_a_name_of_forty_digits() {
        let id = settings().facts.run_id.clone();
        assert!(id.len() == 40 && id.chars().all(|c| c.is_ascii_hexdigit()), "{id}");
        assert_ne!(id, settings().facts.run_id);
    }
}
