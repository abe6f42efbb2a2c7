//! Who owns which shard inside this node, and how to reach the cores: fixed when the node starts, shared by all.
//!
//! Shards are dealt out in contiguous ranges, so a walk in hash order (SCAN, a snapshot) meets each core once.
//!
//! ```text
//!   shards   0 ........ 63 | 64 ....... 127 | 128 ...... 191 | 192 ...... 255
//!   cores        core 0    |     core 1     |     core 2     |     core 3
//! ```

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use futures_channel::oneshot;
use gridkv_engine::hash::{KeyHash, Keyspace, ShardCount, ShardId};
use gridkv_net::frame::Batch;
use gridkv_net::mesh::CoreId;
use gridkv_net::signal::Signal;

use crate::cores::CoreRc;
use crate::cores::flush::Flushes;

/// Messages that a core's inbox holds before foreign threads have to wait.
pub(crate) const INBOX_MESSAGES: usize = 4096;

/// What foreign threads may ask of a core. It arrives through the core's flume inbox.
pub(crate) enum Message {
    /// Requests in the frame format; every one is answered in the batch that is sent back, in order.
    Requests(Batch, ReplyTo),
    /// Code to run on the core, between two turns.
    Run(Box<dyn FnOnce(&CoreRc) + Send>),
}

/// Where a core puts the answers to a foreign thread. Dropped without any, it says that none will come.
#[derive(Debug)]
pub(crate) struct ReplyTo {
    to: oneshot::Sender<Batch>,
    /// Held by all cores that one call asked: it wakes the caller when the last one lets go, and nobody wakes it before.
    _all: Option<Arc<oneshot::Sender<()>>>,
}

impl ReplyTo {
    /// For a call that waits for one core, or, with `all`, for several.
    pub(crate) fn new(all: Option<Arc<oneshot::Sender<()>>>) -> (ReplyTo, oneshot::Receiver<Batch>) {
        let (to, pending) = oneshot::channel();
        (ReplyTo { to, _all: all }, pending)
    }

    /// Answers. Nobody waits any more if the caller's future was dropped.
    pub(crate) fn send(self, replies: Batch) {
        let _ = self.to.send(replies);
    }
}

/// The way to one core.
pub(crate) struct Link {
    pub(crate) inbox: flume::Sender<Message>,
    pub(crate) signal: Arc<Signal>,
}

impl Link {
    /// Leaves a message if there is room; otherwise gives it back.
    pub(crate) fn try_send(&self, message: Message) -> Result<(), flume::TrySendError<Message>> {
        self.inbox.try_send(message)?;
        self.signal.post();
        Ok(())
    }

    /// Leaves a message, waiting for room. False when the core is gone.
    pub(crate) async fn send(&self, message: Message) -> bool {
        match self.try_send(message) {
            Ok(()) => true,
            Err(flume::TrySendError::Disconnected(_)) => false,
            Err(flume::TrySendError::Full(message)) => {
                let sent = self.inbox.send_async(message).await.is_ok();
                self.signal.post();
                sent
            }
        }
    }
}

/// The fixed facts of a running node.
pub(crate) struct Topology {
    shards: ShardCount,
    /// Seed of the key hash. A node that joins a cluster takes over its seed before the first client can reach it.
    seed: AtomicU64,
    owners: Box<[CoreId]>,
    pub(crate) links: Box<[Link]>,
    stop: AtomicBool,
    /// See [`Topology::is_ready`].
    ready: AtomicBool,
    /// Whether the node may be emptied.
    pub(crate) flushes: Arc<Flushes>,
    /// Why the node cannot go on, if it is that which stops it.
    failure: OnceLock<&'static str>,
}

impl Topology {
    /// Tells every core to stop; only the first call does something.
    pub(crate) fn stop(&self) {
        if !self.stop.swap(true, Ordering::AcqRel) {
            for link in &self.links {
                link.signal.post();
            }
        }
    }

    /// Stops the node because it cannot go on: whoever waits for its end is told why.
    pub(crate) fn fail(&self, why: &'static str) {
        tracing::error!(why, "the node cannot go on and stops");
        // The first reason is the one.
        let _ = self.failure.set(why);
        self.stop();
    }

    /// Why the node could not go on.
    pub(crate) fn failure(&self) -> Option<&'static str> {
        self.failure.get().copied()
    }

    /// Whether the node was told to stop. Cores look when their signal was posted.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Whether `/readyz` has found this node ready once; from the start on one that stands alone.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// It is ready, and stays so.
    pub(crate) fn set_ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
    }

    pub(crate) fn new(keyspace: Keyspace, links: Box<[Link]>, clustered: bool) -> Topology {
        let shards = u32::from(keyspace.shards.get());
        let owners = (0..links.len())
            .flat_map(|core| shards_of(core, links.len(), shards).map(move |_| CoreId(core as u16)))
            .collect();
        let seed = AtomicU64::new(keyspace.seed);
        Topology {
            shards: keyspace.shards,
            seed,
            owners,
            links,
            stop: AtomicBool::new(false),
            ready: AtomicBool::new(!clustered),
            flushes: Arc::new(Flushes::new(clustered)),
            failure: OnceLock::new(),
        }
    }

    /// How keys map to shards.
    #[inline]
    pub(crate) fn keyspace(&self) -> Keyspace {
        Keyspace { seed: self.seed.load(Ordering::Relaxed), shards: self.shards }
    }

    /// Takes over the seed of the cluster that this node joins. No key was hashed yet.
    pub(crate) fn set_seed(&self, seed: u64) {
        self.seed.store(seed, Ordering::Relaxed);
    }

    /// The core that owns the shard.
    #[inline]
    pub(crate) fn owner(&self, shard: ShardId) -> CoreId {
        self.owners[shard.index()]
    }

    /// The core that owns a key of that hash.
    #[inline]
    pub(crate) fn owner_of(&self, hash: KeyHash) -> CoreId {
        self.owner(self.keyspace().shard(hash))
    }

    /// Number of cores.
    pub(crate) fn cores(&self) -> usize {
        self.links.len()
    }
}

/// The contiguous range of shards that belongs to `core` of `cores`; sizes differ by one at most.
pub(crate) fn shards_of(core: usize, cores: usize, shards: u32) -> Range<u32> {
    let cut = |i: usize| (i as u64 * u64::from(shards) / cores as u64) as u32;
    cut(core)..cut(core + 1)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    /// A way to a core that is not there.
    pub(crate) fn link() -> Link {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd can be made");
        Link { inbox: flume::bounded(1).0, signal: Arc::new(Signal::new(fd)) }
    }

    #[test]
    fn every_shard_has_one_owner_and_the_load_is_even() {
        for (cores, shards) in [(1, 32), (2, 256), (3, 256), (7, 32), (20, 256), (32, 32)] {
            let ranges: Vec<_> = (0..cores).map(|c| shards_of(c, cores, shards)).collect();
            assert_eq!(ranges[0].start, 0);
            assert_eq!(ranges[cores - 1].end, shards);
            assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
            let sizes: Vec<_> = ranges.iter().map(|r| r.len()).collect();
            assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
        }
    }
}
