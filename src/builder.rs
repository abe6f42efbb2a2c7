//! Describing a node before it starts.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use gridkv_engine::backend::{Backend, BackendConfig, BackendError, DEFAULT_BACKEND, FILE_BACKEND};

use crate::config::{ClusterConfig, Config, CoreSet, DataConfig, Fsync};
use crate::{Error, GridKv};

/// Describes an embedded node; made by [`GridKv::builder`].
///
/// Every setting has a default: all cores the process may use, 256 shards in memory, no memory limit, no server.
///
/// ```
/// # fn main() -> Result<(), gridkv::Error> {
/// let db = gridkv::GridKv::builder().cores("1")?.max_memory(64 << 20).start()?;
/// assert_eq!(db.cores(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Builder {
    config: Config,
}

impl Builder {
    pub(crate) fn new() -> Builder {
        Builder { config: Config { listen: None, http: None, ..Config::default() } }
    }

    /// Starts from a whole configuration.
    pub fn from_config(config: Config) -> Builder {
        Builder { config }
    }

    /// The cores to run on, in the words of the node's `--cores`: `all`, a count, or a list such as `0-3,6`.
    ///
    /// # Errors
    /// [`Error::Config`] when the text is none of these.
    pub fn cores(mut self, cores: &str) -> Result<Builder, Error> {
        self.config.cores = cores.parse::<CoreSet>()?;
        Ok(self)
    }

    /// Number of shards: a power of two, 32 to 16384.
    ///
    /// # Errors
    /// [`Error::Config`] for any other number.
    pub fn shards(mut self, shards: u32) -> Result<Builder, Error> {
        self.config.shards = Config::shard_count(shards)?;
        Ok(self)
    }

    /// Storage backend, by its name in the registry.
    pub fn backend(mut self, name: &str) -> Builder {
        self.config.backend = name.to_owned();
        self
    }

    /// Adds a backend of your own to the registry and selects it.
    ///
    /// `make` is called once on each core. Run [`gridkv_engine::backend::conformance`] on it in your tests.
    pub fn custom_backend(
        mut self,
        name: &str,
        make: fn(&BackendConfig) -> Result<Box<dyn Backend>, BackendError>,
    ) -> Builder {
        self.config.registry.register(name, make);
        self.config.backend = name.to_owned();
        self
    }

    /// Keeps the data in that directory, which is this node's alone: the backend `file`, unless you chose another that is kept on disk. The
    /// next node that is started there has the data.
    pub fn data(mut self, dir: impl Into<PathBuf>, fsync: Fsync) -> Builder {
        self.config.data = Some(DataConfig { dir: dir.into(), fsync });
        if self.config.backend == DEFAULT_BACKEND {
            self.config.backend = FILE_BACKEND.to_owned();
        }
        self
    }

    /// Bytes of memory that the node's data may use; 0 means no limit. Beyond it writes fail and reads go on.
    pub fn max_memory(mut self, bytes: u64) -> Builder {
        self.config.max_memory = bytes;
        self
    }

    /// Serves RESP clients at that address too; port 0 picks one.
    pub fn listen(mut self, addr: SocketAddr) -> Builder {
        self.config.listen = Some(addr);
        self
    }

    /// Serves `/metrics`, `/healthz` and `/readyz` at that address; port 0 picks one.
    pub fn http(mut self, addr: SocketAddr) -> Builder {
        self.config.http = Some(addr);
        self
    }

    /// What the threads are called: `<name>-<core>`. Linux shows the first 15 bytes.
    pub fn thread_name(mut self, name: &str) -> Builder {
        self.config.thread_name = name.to_owned();
        self
    }

    /// How long a core without work polls before it sleeps: latency against an idle CPU.
    pub fn spin(mut self, spin: Duration) -> Builder {
        self.config.spin = spin;
        self
    }

    /// Takes part in a cluster, and listens there for its other nodes: TCP and UDP on the same port, 0 picks one. The address
    /// must be one that the others reach, else see [`Builder::advertise`].
    ///
    /// This and each of the following, down to [`Builder::dir`], makes the node one of a cluster.
    pub fn peer_listen(mut self, addr: SocketAddr) -> Builder {
        self.cluster().peer_listen = addr;
        self
    }

    /// Joins the cluster that these belong to: peer addresses, `host:port`. Without any, the node founds a cluster unless
    /// its directory remembers one.
    pub fn seeds<S: Into<String>>(mut self, seeds: impl IntoIterator<Item = S>) -> Builder {
        self.cluster().seeds = seeds.into_iter().map(Into::into).collect();
        self
    }

    /// The address that other nodes are told, where it is not the one that is listened on.
    pub fn advertise(mut self, addr: SocketAddr) -> Builder {
        self.cluster().advertise = Some(addr);
        self
    }

    /// The address that clients of Redis Cluster are told, where it is not the one that is listened on.
    pub fn advertise_client(mut self, addr: SocketAddr) -> Builder {
        self.cluster().advertise_client = Some(addr);
        self
    }

    /// Where the node stands, at most 64 bytes; copies of a shard are spread over zones.
    pub fn zone(mut self, zone: impl Into<String>) -> Builder {
        self.cluster().zone = zone.into();
        self
    }

    /// Its share of the shards relative to the others'; 100 is normal.
    pub fn weight(mut self, weight: u16) -> Builder {
        self.cluster().weight = weight;
        self
    }

    /// Copies of each shard, 1 to 7; how many of them hold a write before it is acknowledged; how many answer a read. Counts
    /// at the node that founds the cluster. Unless the two quorums add up to more than the copies, reads may miss
    /// acknowledged writes.
    pub fn replicas(mut self, copies: u8, write_quorum: u8, read_quorum: u8) -> Builder {
        let cluster = self.cluster();
        (cluster.replicas, cluster.write_quorum, cluster.read_quorum) = (copies, write_quorum, read_quorum);
        self
    }

    /// Where the node keeps its identity, its votes and the last map. Without one every start is a new node.
    pub fn dir(mut self, path: impl Into<PathBuf>) -> Builder {
        self.cluster().dir = Some(path.into());
        self
    }

    fn cluster(&mut self) -> &mut ClusterConfig {
        self.config.cluster.get_or_insert_default()
    }

    /// Starts the node.
    ///
    /// # Errors
    /// [`Error::Start`] and [`Error::Config`]: what is wrong and what to do. Nothing keeps running.
    pub fn start(self) -> Result<GridKv, Error> {
        if let Some(warning) = self.config.cluster.as_ref().and_then(ClusterConfig::warning) {
            tracing::warn!("{warning}");
        }
        crate::node::start(self.config)
    }
}
