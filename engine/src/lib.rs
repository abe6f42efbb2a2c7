//! What one core of a GridKV node owns: records, tables, commands, versions, expiry.
//!
//! **Pure**, but for [`disk`]. Nothing else here reads a clock, draws a random number, starts a thread or opens a file: `now` and randomness
//! are arguments. So a core's data can be tested by table, fuzzed and simulated byte for byte as it runs in production.
//!
//! Reading order, each a layer on the one before:
//!
//! | module | decides |
//! |---|---|
//! | [`hash`] | which shard a key belongs to, and its position in hash space |
//! | [`hlc`] | which of two writes is newer |
//! | [`record`] | how an entry lies in memory |
//! | `table` | how entries are found, and how a table grows without a pause |
//! | [`journal`] | how changes are written down |
//! | [`backend`] | where entries are stored, behind one trait |
//! | [`change_log`], [`digest`] | what followers and replicas compare |
//! | [`store`] | what a write means: version, expiry, tombstone, limit |
//! | [`disk`] | the files in which the backend `file` outlives its process |
//! | [`reply`], [`command`] | what clients may ask, as data, and what they are answered |

pub mod backend;
pub mod change_log;
pub mod command;
pub mod digest;
pub mod disk;
pub mod hash;
pub mod hlc;
pub mod journal;
pub mod record;
pub mod reply;
pub mod store;
mod table;

/// Unix time in milliseconds.
pub type Millis = u64;
