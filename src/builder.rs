//! Describing a node before it starts.

use std::net::SocketAddr;
use std::time::Duration;

use gridkv_engine::backend::{Backend, BackendConfig, BackendError};

use crate::config::{Config, CoreSet};
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

    /// Starts the node.
    ///
    /// # Errors
    /// [`Error::Start`] and [`Error::Config`]: what is wrong and what to do. Nothing keeps running.
    pub fn start(self) -> Result<GridKv, Error> {
        crate::node::start(self.config)
    }
}
