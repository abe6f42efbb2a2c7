//! The pure protocols of a GridKV cluster: who is there, who holds what, and how copies stay equal.
//!
//! This page is the contract of the crate. A single node needs nothing of it yet, so there is no code here, and no
//! stand-in for code: what lands here has to keep to this page from its first line.
//!
//! # What will live here
//!
//! | module | decides |
//! |---|---|
//! | `membership` | who is alive, suspect, down or left: SWIM, with a boot number for each life of a node |
//! | `map` | which nodes hold each shard: an epoch-numbered map, agreed among a few voters by CASPaxos |
//! | `placement` | where shards should be: weighted rendezvous hashing with a load bound, zones, few moves |
//! | `quorum` | when enough replicas have answered, for every level; hints and filling replicas never count |
//! | `coordinator` | one client operation from its first message to its answer, with its deadline |
//! | `repair` | making replicas equal: read repair, digests in the background, the change log as a shortcut |
//! | `hints` | writes kept for a replica that is down: bounded, replayed, forgotten with a trace |
//! | `moves` | joining, leaving, draining, restarting and replacing as one staged change of a shard's replica set |
//! | `simulator` | whole clusters of the above under loss, delay, partition, crash and skew, from one seed |
//!
//! # Purity
//!
//! Everything here sees values, `now` and a seeded generator, and gives back values. So it runs in the simulator byte for
//! byte as it runs in production.
//!
//! - No socket, no file, no thread, no clock, no source of randomness, no map with a random order of iteration.
//! - One shape for every machine: `on_<input>(&mut self, now, input, out: &mut Outbox)`, `next_deadline()` and
//!   `on_deadline(now, out)`. A machine can only add to its outbox, the driver can only drain it.
//! - Deadlines are state of the machine. Nobody hands timer events around, so none can be stale.
//! - Every machine has `invariants(&self)`, called after each input in debug builds and in the simulator.
//! - What a peer says may be wrong in any way: it is validated into another type, or refused; it never meets an assertion.
//! - Everything that a peer or a client can make grow has a bound.
//!
//! # What never lives here
//!
//! Entries and their storage (the engine), bytes and sockets (the net crate), and what ties them together (the facade).
//! The driver reads the clock, sends what the outbox holds, and comes back with what arrived.

#![forbid(unsafe_code)]

pub mod control;
pub mod coordinator;
pub mod fill;
pub mod hints;
pub mod ids;
pub mod map;
pub mod membership;
pub mod outbox;
pub mod planner;
pub mod planted;
pub mod purge;
pub mod quorum;
pub mod register;
pub mod repair;
pub mod replica;
pub mod shards;
pub mod sync;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod wire;
