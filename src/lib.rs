//! GridKV: an in-memory key-value engine, thread per core, nothing shared.
//!
//! One process runs one pinned executor per core. The key space is cut into shards; each shard is owned by one core and
//! nothing else ever touches it, so the data path has no lock and no shared counter. A request for another core's shard
//! travels there in a batch of frames that is read in place.
//!
//! Three ways in:
//!
//! * [`GridKv`]: from any thread and any async runtime, or [`GridKv::blocking`];
//! * [`GridKv::on_core`]: your code beside the data, where a read is a function call;
//! * RESP clients over a socket, when [`Builder::listen`] names an address. `gridkv-node` is that and nothing more.
//!
//! ```
//! # fn main() -> Result<(), gridkv::Error> {
//! use futures_lite::future::block_on;
//! use gridkv::{GridKv, SetOptions};
//! use std::time::Duration;
//!
//! let db = GridKv::builder().cores("1")?.start()?;
//! block_on(async {
//!     db.set("user:1001", "Alice").await?;
//!     db.set_with("session:7", "token", SetOptions::new().ttl(Duration::from_secs(60)).nx()).await?;
//!     assert_eq!(db.get("user:1001").await?.unwrap(), "Alice");
//!     db.close().await
//! })
//! # }
//! ```
//!
//! The parts: [`gridkv_engine`] holds data and commands, [`gridkv_net`] bytes, sockets and lanes between cores; this
//! crate wires them to one executor per core. It is the only one that starts threads.

#![forbid(unsafe_code)]

mod builder;
pub mod cluster;
pub mod config;
mod cores;
mod error;
mod handle;
pub mod http;
pub mod metrics;
mod node;
mod platform;
mod scan;
mod server;
mod topology;
mod values;

#[cfg(feature = "fault-injection")]
mod fault;

pub use builder::Builder;
pub use bytes::Bytes;
pub use cluster::Level;
pub use config::Config;
pub use cores::CoreHandle;
pub use error::{ConfigError, Error, StartError};
pub use handle::{Blocking, GridKv, SetOptions, SetOutcome};
pub use node::Stats;
pub use scan::{Scan, ScanKeys};
pub use values::Values;

pub use gridkv_engine as engine;
