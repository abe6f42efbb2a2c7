//! The pure protocols of a GridKV cluster: who is there, who holds what, and how copies stay equal.
//!
//! Two hubs, which route and decide nothing, and the machines behind them:
//!
//! | module | decides |
//! |---|---|
//! | [`control`] | the control plane of a node: who speaks when |
//! | [`membership`] | who is alive, suspect, down or left: SWIM, with a boot number for each life of a node |
//! | [`map`] | which lives hold each shard, and how one map follows from another |
//! | [`register`] | which map holds: CASPaxos among a few voters |
//! | [`planner`] | what should change: placement by weighted rendezvous, few moves, voters, the dead |
//! | [`shards`] | the machines of a core: what goes to which |
//! | [`quorum`] | when enough replicas have answered, for every level; hints and filling replicas never count |
//! | [`coordinator`] | one client operation from its first message to its answer, with its deadline |
//! | [`replica`] | what a replica does with a question |
//! | [`fill`], [`repair`], [`purge`] | how a replica gets everything; how replicas become equal; when tombstones go |
//! | [`hints`] | writes kept for a replica that is down: bounded, replayed, forgotten with a trace |
//! | `sim` | whole clusters of the above under loss, delay, partition, crash and skew, from one seed (feature `sim`) |
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
pub mod wire;

#[cfg(any(test, feature = "sim"))]
pub mod sim;
