//! Bytes, sockets and cores of a GridKV node.
//!
//! Everything between a byte on a wire and a call into the engine: the RESP codec, the per-connection session, the
//! per-core socket ring, and the batches of frames that cores exchange. Nothing here knows an executor: the driver in
//! the facade crate calls these parts, so each can be tested, fuzzed and measured alone.
//!
//! | module | decides |
//! |---|---|
//! | [`frame`] | how a request or reply between cores is laid out, read in place |
//! | [`gossip`] | datagrams between nodes: one socket, bounded, never fatal |
//! | [`mesh`] | lanes between cores, their bounds and their back-pressure |
//! | [`peer`] | links between cores of different nodes: who may stand at the other end, frames, what a silence means |
//! | [`resp`] | the bytes of Redis's protocol: where a command ends, how a reply looks |
//! | [`ring`] | the sockets of one core: accept, receive, send, close, in one system call per turn |
//! | [`session`] | what a connection is: commands in, replies in order, transactions |
//! | [`signal`] | when a sleeping core is woken |
//! | [`sleeper`] | how a core waits, and what ends the wait |

pub mod frame;
pub mod gossip;
pub mod mesh;
pub mod peer;
pub mod resp;
pub mod ring;
pub mod session;
pub mod signal;
pub mod sleeper;
