//! What the machines of a core want done: messages to peers, ends of client operations, news for the control plane.
//!
//! Machines add to it, the driver drains it; neither can do the other's part. A message is written once, as the bytes
//! that travel, and may go to several peers.

use gridkv_engine::Millis;
use gridkv_engine::hash::{KeyHash, ShardId};
use gridkv_engine::hlc::Version;

use crate::ids::NodeNo;
use crate::wire::Message;

/// How much a message matters when a link is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// An answer: work that is done would be lost.
    Answer,
    /// Part of a client's operation.
    Request,
    /// Filling, repair, hints: it is tried again.
    Background,
}

/// A message to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Send {
    /// To whom.
    pub to: NodeNo,
    /// It goes to the core that owns this shard there.
    pub shard: ShardId,
    /// What happens to it when the link is full.
    pub class: Class,
    start: usize,
    end: usize,
}

/// How a client's operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The write is on as many replicas as its level asks for.
    Written {
        /// Its version.
        version: Version,
    },
    /// Whether a key was there to be deleted; if so it is deleted on as many replicas as the level asks for.
    Deleted(bool),
    /// What a read found.
    Found(Option<Value>),
    /// What a quorum holds under the keys of [`crate::shards::Operation::Prepare`], in their order.
    Ready(Vec<Found>),
    /// Everything of [`crate::shards::Operation::Commit`] is on a quorum.
    Committed,
    /// What the orderer answered to a forwarded request.
    Ordered(Vec<u8>),
    /// It was not done, and it never will be.
    Failed(Failure),
    /// Some keys of [`crate::shards::Operation::Commit`] are on a quorum, and none of the others was or will be written: why one
    /// of these was refused.
    Part(Failure),
    /// It may have been done, or may still be: too few replicas have answered in time.
    Unknown {
        /// Replicas that have it for sure.
        have: usize,
        /// Replicas that were needed.
        need: usize,
    },
}

/// A key that was read for a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its hash.
    pub hash: KeyHash,
    /// The key.
    pub key: Box<[u8]>,
    /// What is there to read.
    pub value: Option<Value>,
    /// The newest version seen, of a tombstone too.
    pub newest: Version,
    /// Made before the key was read: the version of what the command writes, if nothing newer was seen.
    pub since: Version,
}

impl Found {
    /// The version for what a command writes under this key; `None` when it takes a new one.
    ///
    /// It dates from before the key was read. If this process stands still between reading and writing, what others wrote
    /// meanwhile is newer, and what it writes on old knowledge does not replace it.
    pub fn version(&self) -> Option<Version> {
        (self.since > self.newest).then_some(self.since)
    }
}

/// What a command changed: the value that a key has now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Its hash.
    pub hash: KeyHash,
    /// The key.
    pub key: Box<[u8]>,
    /// Its value; `None` when it is gone.
    pub value: Option<Vec<u8>>,
    /// When it expires, in unix milliseconds; 0 = never.
    pub expires_at: Millis,
    /// See [`Found::version`].
    pub version: Option<Version>,
}

/// A value that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Which write made it.
    pub version: Version,
    /// When it expires, in unix milliseconds; 0 = never.
    pub expires_at: Millis,
}

/// Why an operation was not done. Nothing was changed anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Too few replicas of the shard can be reached.
    #[error("CLUSTERDOWN too few replicas of shard {shard} can be reached: {have} of {need}")]
    NoQuorum {
        /// The shard.
        shard: u16,
        /// Replicas that count and can be reached.
        have: usize,
        /// Replicas that are needed.
        need: usize,
    },
    /// The replica that orders conditional commands of the shard cannot be reached or is not ready.
    #[error(
        "TRYAGAIN the replica that orders commands of shard {shard} is not ready; another takes over within seconds"
    )]
    NoOrderer {
        /// The shard.
        shard: u16,
    },
    /// No answer in time, and no write was begun.
    #[error("TIMEOUT the replicas of shard {shard} did not answer in time; nothing was written")]
    TimedOut {
        /// The shard.
        shard: u16,
    },
    /// A replica has no memory left for it.
    #[error("OOM command not allowed when used memory > 'maxmemory'.")]
    Full,
    /// This node's clock is too far off.
    #[error(
        "CLOCK the clock of this node is too far from those of the others; nothing was written: mend its clock (NTP), or write through another node"
    )]
    Clock,
    /// Too many operations are under way.
    #[error("OVERLOADED too many operations are under way on this core; try again later")]
    Busy,
    /// The node has not been admitted to its cluster yet.
    #[error("LOADING the node is not a member of its cluster yet")]
    NotAdmitted,
}

/// What the machines want done, in order.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    sends: Vec<Send>,
    done: Vec<(u64, Outcome)>,
    filled: Vec<(ShardId, u64)>,
    wanted_epoch: u64,
}

impl Outbox {
    /// An empty one.
    pub fn new() -> Outbox {
        Outbox::default()
    }

    /// Writes one message for several peers.
    pub(crate) fn send(&mut self, to: &[NodeNo], class: Class, message: &Message<'_>) {
        if to.is_empty() {
            return;
        }
        let start = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(start, 0);
        message.write(&mut self.bytes);
        let (end, shard) = (self.bytes.len(), message.ask().shard);
        self.sends.extend(to.iter().map(|&to| Send { to, shard, class, start, end }));
    }

    /// Ends the operation of that token.
    pub(crate) fn done(&mut self, token: u64, outcome: Outcome) {
        self.done.push((token, outcome));
    }

    /// This core holds everything of the shard that it needs in that epoch.
    pub(crate) fn filled(&mut self, shard: ShardId, epoch: u64) {
        self.filled.push((shard, epoch));
    }

    /// A peer has a newer map.
    pub(crate) fn want_map(&mut self, epoch: u64) {
        self.wanted_epoch = self.wanted_epoch.max(epoch);
    }

    /// Whether there is nothing to drain.
    pub fn is_empty(&self) -> bool {
        self.sends.is_empty() && self.done.is_empty() && self.filled.is_empty() && self.wanted_epoch == 0
    }

    /// The messages, in the order in which they were written.
    pub fn sends(&self) -> impl Iterator<Item = (Send, &[u8])> {
        self.sends.iter().map(|send| (*send, &self.bytes[send.start..send.end]))
    }

    /// Takes the ends of operations, by token.
    pub fn take_done(&mut self) -> Vec<(u64, Outcome)> {
        std::mem::take(&mut self.done)
    }

    /// Takes the shards that became complete, each with its epoch.
    pub fn take_filled(&mut self) -> Vec<(ShardId, u64)> {
        std::mem::take(&mut self.filled)
    }

    /// Takes the shard epoch that a peer has and this node has not; 0 = none.
    pub fn take_wanted(&mut self) -> u64 {
        std::mem::take(&mut self.wanted_epoch)
    }

    /// Forgets the messages, once they are sent.
    pub fn clear_sends(&mut self) {
        self.sends.clear();
        if self.bytes.capacity() > KEPT {
            self.bytes = Vec::new();
        } else {
            self.bytes.clear();
        }
    }
}

/// Bytes that an emptied outbox keeps.
const KEPT: usize = 1 << 20;
