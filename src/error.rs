//! What can go wrong in the facade, said to whoever must act.
//!
//! * [`Error::Config`] and [`Error::Start`]: the operator. One line says what is wrong, [`Error::hint`] what to do.
//! * [`Error::KeyTooLong`], [`Error::NotOwned`], [`Error::Reply`] and the like: the caller; nothing was changed.
//! * [`Error::Unknown`], [`Error::Closed`], [`Error::Failed`] and [`Error::Panicked`] are the only ones after which a write may or may not have
//!   been done.
//!
//! An error carries texts and numbers and no `io::Error`, so that it can be cloned into every answer it concerns.

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use gridkv_engine::disk::DiskError;
use gridkv_engine::store::StoreError;
use gridkv_net::ring::RingError;

/// How a request to a node, or its start, failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting makes no sense. Nothing was started; correct the setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The node cannot run here. Nothing keeps running; see [`Error::hint`].
    #[error(transparent)]
    Start(#[from] StartError),
    /// The node has stopped. A write that was under way may have been done.
    #[error("the node has stopped")]
    Closed,
    /// The key is longer than keys can be. Nothing was changed; use a shorter key.
    #[error("the key has {len} bytes; the longest possible has {max}")]
    KeyTooLong {
        /// Bytes of the key.
        len: usize,
        /// Bytes a key may have.
        max: usize,
    },
    /// The value is longer than values can be. Nothing was changed; split the value.
    #[error("the value has {len} bytes; the longest possible has {max}")]
    ValueTooLong {
        /// Bytes of the value.
        len: usize,
        /// Bytes a value may have.
        max: usize,
    },
    /// The core that owns the key has used its memory. Nothing was changed; delete something, or raise `max_memory`.
    #[error("out of memory: the write would exceed max_memory")]
    OutOfMemory,
    /// The core was asked for a key of a sibling. Nothing was changed; ask the owner, or use an asynchronous operation.
    #[error("the key belongs to core {owner}, not to core {core}")]
    NotOwned {
        /// The core that was asked.
        core: usize,
        /// The core that owns the key.
        owner: usize,
    },
    /// The node has no such core. Nothing was done.
    #[error("there is no core {core}: this node has {cores}, counted from 0")]
    NoSuchCore {
        /// The core that was named.
        core: usize,
        /// Number of cores of the node.
        cores: usize,
    },
    /// The request, or the task that was run on a core, panicked; the core goes on. It may have changed something first.
    /// This is a bug in the node or in the task: its log has the place.
    #[error("the request panicked and was abandoned; the node goes on")]
    Panicked,
    /// The node could not go on and has stopped: told by [`crate::GridKv::close`]. A write that was under way may have been done.
    #[error("the node could not go on and has stopped: {0}")]
    Failed(&'static str),
    /// In a cluster: too few replicas answered in time, or a part of the keys was written. It may have been done, or not, or may be done
    /// yet: read to find out, in the words a RESP client would read.
    #[error("{0}")]
    Unknown(String),
    /// The request was refused, in the words a RESP client would read. Nothing was changed.
    #[error("{0}")]
    Reply(String),
}

impl Error {
    /// What to do about it, where there is something to say.
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        match self {
            Error::Config(error) => error.hint.as_deref().map(Cow::Borrowed),
            Error::Start(error) => error.hint(),
            _ => None,
        }
    }

    /// An operating system call failed while the node started.
    pub(crate) fn os(doing: &'static str, source: io::Error) -> Error {
        StartError::Os { doing, cause: source.to_string() }.into()
    }

    /// The executor of a core did not start.
    pub(crate) fn executor(core: usize, cpu: usize, cause: &str) -> Error {
        StartError::Executor { core, cpu, cause: cause.to_owned() }.into()
    }

    /// The meaning of an error reply, `bytes` being its text with prefix.
    pub(crate) fn from_reply(bytes: &[u8]) -> Error {
        if bytes.starts_with(b"OOM ") {
            Error::OutOfMemory
        } else if bytes == crate::cores::serve::PANIC_REPLY.as_bytes() {
            Error::Panicked
        } else {
            let text = String::from_utf8_lossy(bytes).into_owned();
            if bytes.starts_with(b"UNKNOWN ") { Error::Unknown(text) } else { Error::Reply(text) }
        }
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Error {
        Error::from_reply(error.to_string().as_bytes())
    }
}

/// A setting that makes no sense: which one, why, and what would.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {problem}")]
pub struct ConfigError {
    /// Name of the setting, as in the configuration file.
    pub setting: &'static str,
    /// What is wrong with its value.
    pub problem: String,
    /// What would be right.
    pub hint: Option<String>,
}

impl ConfigError {
    /// An error about `setting`.
    pub fn new(setting: &'static str, problem: impl Into<String>) -> ConfigError {
        ConfigError { setting, problem: problem.into(), hint: None }
    }

    /// The same, with advice.
    pub fn with_hint(mut self, hint: impl Into<String>) -> ConfigError {
        self.hint = Some(hint.into());
        self
    }
}

/// Why a node cannot run here. Whatever the variant: nothing keeps running.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The kernel is older than what the sockets are built on.
    #[error("this kernel ({release}) is too old: GridKV needs Linux 6.1 or newer")]
    KernelTooOld {
        /// The kernel's own name for itself.
        release: String,
    },
    /// The cluster does not admit this node, or none was found.
    #[error("the node cannot join its cluster: {why}")]
    Cluster {
        /// The reason, in words.
        why: String,
        /// What to do, where it is known.
        hint: Option<String>,
    },
    /// io_uring is forbidden to this process.
    #[error("io_uring is forbidden here ({cause})")]
    IoUringForbidden {
        /// What the kernel said.
        cause: String,
        /// Which switch is off, and how to turn it on.
        hint: String,
    },
    /// The limit on locked memory is too low.
    #[error(
        "the limit on locked memory is {} KiB and may not be raised; a core needs {} KiB", .limit / 1024, .needed / 1024
    )]
    LockedMemory {
        /// The hard limit in bytes.
        limit: u64,
        /// The least that works, in bytes.
        needed: u64,
    },
    /// The limit on open files leaves no room for the node.
    #[error(
        "the limit on open files is {limit} and may not be raised; {cores} cores and the first client need {needed}"
    )]
    OpenFiles {
        /// The hard limit.
        limit: u64,
        /// The least that works.
        needed: u64,
        /// Number of cores.
        cores: usize,
    },
    /// A core was asked for that this machine does not have, or has switched off.
    #[error("core {core} does not exist; this machine has cores {online}")]
    NoSuchCore {
        /// The core that was asked for.
        core: usize,
        /// The cores that are there, as a list of ranges.
        online: String,
    },
    /// A core was asked for that this process may not use.
    #[error("core {core} is outside of what this process may use: cores {allowed}")]
    CoreForbidden {
        /// The core that was asked for.
        core: usize,
        /// The process's CPU affinity mask, as a list of ranges.
        allowed: String,
    },
    /// More cores were asked for than this process may use.
    #[error("{wanted} cores were asked for; this process may use {available} (cores {allowed})")]
    TooFewCores {
        /// How many were asked for.
        wanted: usize,
        /// How many there are.
        available: usize,
        /// The process's CPU affinity mask, as a list of ranges.
        allowed: String,
    },
    /// There are more cores than shards, so some core would own nothing.
    #[error("{cores} cores for {shards} shards: some core would own nothing")]
    TooFewShards {
        /// Number of cores.
        cores: usize,
        /// Number of shards.
        shards: u32,
    },
    /// Somebody else listens on the address.
    #[error("cannot listen on {addr}: the address is already in use")]
    AddressInUse {
        /// The address that was asked for.
        addr: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: {cause}")]
    Listen {
        /// The address that was asked for.
        addr: SocketAddr,
        /// What the kernel said.
        cause: String,
    },
    /// The backend could not be opened.
    #[error("the backend {name:?} cannot be opened: {cause}")]
    Backend {
        /// Its name.
        name: String,
        /// What it said.
        cause: String,
    },
    /// The directory of the node cannot be used.
    #[error("{} {problem}", .path.display())]
    Directory {
        /// The directory, or the file in it.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// The data on disk cannot be read or kept.
    #[error("{problem}")]
    Data {
        /// What is wrong, and with which file.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// A core's executor did not start.
    #[error("the executor of core {core}, to be pinned to CPU {cpu}, did not start: {cause}")]
    Executor {
        /// The core, from 0.
        core: usize,
        /// The CPU.
        cpu: usize,
        /// What it said.
        cause: String,
    },
    /// A system call failed.
    #[error("{doing} failed: {cause}")]
    Os {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        cause: String,
    },
}

impl From<DiskError> for Error {
    fn from(error: DiskError) -> Error {
        StartError::Data { problem: error.to_string(), hint: error.hint() }.into()
    }
}

impl StartError {
    /// What a member said to a node that it does not admit: the reason, and behind the last colon what to do.
    pub(crate) fn refused(text: &str) -> StartError {
        let (why, hint) = text.rsplit_once(": ").map_or((text, None), |(why, hint)| (why, Some(hint.to_owned())));
        StartError::Cluster { why: why.to_owned(), hint }
    }

    /// What to do about it, where there is something to say.
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        Some(match self {
            StartError::KernelTooOld { .. } => "run it on a newer kernel; containers use that of their host".into(),
            StartError::IoUringForbidden { hint, .. } => hint.as_str().into(),
            StartError::Cluster { hint, .. } => hint.as_deref()?.into(),
            StartError::LockedMemory { needed, .. } => format!(
                "raise it: `ulimit -l {0}` as root, `LimitMEMLOCK={0}K` in a systemd unit, `--ulimit memlock={1}` for \
                 docker, or a `memlock` line in /etc/security/limits.conf",
                needed / 1024,
                needed
            )
            .into(),
            StartError::OpenFiles { needed, .. } => format!(
                "raise it: `ulimit -n {needed}`, `LimitNOFILE={needed}` in a systemd unit, or `--ulimit nofile={needed}` \
                 for docker; or use fewer cores"
            )
            .into(),
            StartError::NoSuchCore { .. } => {
                "cores are numbered from 0, as `lscpu -e` shows them; a single number given as `cores` is a count".into()
            }
            StartError::CoreForbidden { .. } => {
                "the mask comes from taskset, the container's cpuset or the service manager (`AllowedCPUs`); choose \
                 cores inside it, or widen it"
                    .into()
            }
            StartError::TooFewCores { .. } => {
                "ask for `all`; to name one core instead of a number of cores, write `@3` or `3-3`".into()
            }
            StartError::TooFewShards { .. } => "use more shards (a power of two, up to 16384) or fewer cores".into(),
            StartError::AddressInUse { addr } => {
                let port = addr.port();
                format!("`ss -ltnp 'sport = :{port}'` shows who has it; stop that process or choose another address")
                    .into()
            }
            StartError::Listen { .. } => {
                "the address must be one of this machine, and ports below 1024 need privileges".into()
            }
            StartError::Directory { hint, .. } | StartError::Data { hint, .. } => hint.as_str().into(),
            StartError::Backend { .. } | StartError::Executor { .. } | StartError::Os { .. } => return None,
        })
    }
}

impl From<RingError> for StartError {
    fn from(error: RingError) -> StartError {
        match error {
            RingError::Forbidden { why, source } => {
                StartError::IoUringForbidden { cause: source.to_string(), hint: why }
            }
            RingError::TooOld { release, .. } => StartError::KernelTooOld { release },
            RingError::AddressInUse { addr } => StartError::AddressInUse { addr },
            RingError::Listen { addr, source } => StartError::Listen { addr, cause: source.to_string() },
            other => StartError::Os { doing: "setting up the socket ring", cause: other.to_string() },
        }
    }
}

impl From<RingError> for Error {
    fn from(error: RingError) -> Error {
        Error::Start(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_gets_its_meaning_back() {
        let of = |text: &str| Error::from_reply(text.as_bytes());
        assert_eq!(of("OOM command not allowed when used memory > 'maxmemory'."), Error::OutOfMemory);
        assert_eq!(of(crate::cores::serve::PANIC_REPLY), Error::Panicked);
        let text = "ERR value is not an integer or out of range";
        assert_eq!(of(text), Error::Reply(text.into()));
        let text = "UNKNOWN 1 of 2 replicas confirmed the write in time";
        assert_eq!(of(text), Error::Unknown(text.into()));
    }

    #[test]
    fn a_node_that_is_not_admitted_is_told_what_to_do_about_it() {
        let hint = |text: &str| StartError::refused(text).hint().map(|hint| hint.into_owned());
        let error = StartError::refused("the cluster has 32 shards and the node 64: start it with --shards 32");
        assert_eq!(error.to_string(), "the node cannot join its cluster: the cluster has 32 shards and the node 64");
        assert_eq!(error.hint().as_deref(), Some("start it with --shards 32"));
        let text = "another process with this node's id runs at 10.0.0.1:7380: stop it";
        assert_eq!(hint(text).as_deref(), Some("stop it"));
        assert_eq!(hint("the cluster has 1024 members, which is the most"), None);
    }

    #[test]
    fn every_refusal_to_start_is_one_line_with_a_hint() {
        let addr = "127.0.0.1:7379".parse().unwrap();
        for error in [
            StartError::KernelTooOld { release: "5.10.0".into() },
            StartError::LockedMemory { limit: 65536, needed: 524288 },
            StartError::OpenFiles { limit: 10, needed: 100, cores: 2 },
            StartError::NoSuchCore { core: 9, online: "0-3".into() },
            StartError::CoreForbidden { core: 3, allowed: "0-1".into() },
            StartError::TooFewCores { wanted: 8, available: 2, allowed: "0-1".into() },
            StartError::TooFewShards { cores: 64, shards: 32 },
            StartError::AddressInUse { addr },
            StartError::Listen { addr, cause: "denied".into() },
        ] {
            assert!(!error.to_string().contains('\n'), "{error}");
            let hint = error.hint().unwrap_or_else(|| panic!("no hint for: {error}"));
            assert!(!hint.contains('\n') && !hint.contains("  "), "{hint}");
        }
    }
}
