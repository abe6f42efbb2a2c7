//! The core mesh: batches of frames between the cores of a node.
//!
//! Between each two cores run two lanes each way, single producer and single consumer: one for requests, one for
//! replies. During a turn a core appends to one open batch per lane; [`Mesh::flush`] hands each over, at the turn's end at the latest,
//! with one store and, only if the sibling sleeps, one wake-up.
//!
//! ```text
//!            requests  [batch][batch] ──▶
//!   core 0   replies   [batch] ───────▶     core 1
//!            ◀─────────── [batch]  requests
//!            ◀──── [batch][batch]  replies
//! ```
//!
//! Why two lanes: **replies are always consumed**, because they only fill slots that wait for them. Requests are consumed
//! only while the replies they cause find room. So two cores that flood each other slow down and cannot deadlock
//! (Seastar states the rule: what waits for what between cores must form no cycle).
//!
//! Bounds: a lane holds [`LANE_BATCHES`] batches; a core has at most [`MAX_IN_FLIGHT`] requests or
//! [`MAX_OPEN_BYTES`] of them under way per sibling, and expects at most [`MAX_EXPECTED_BYTES`] of replies, judged by the
//! latest ones; beyond that [`Mesh::request`] says [`Busy`] and the caller keeps its input. A sibling is served
//! [`REPLIES_PER_TURN`] bytes of replies a turn, and not at all while its reply lane is full.
//!
//! Not here: what the frames mean, and sleeping (see [`crate::signal`]).

use std::sync::Arc;

use rtrb::{Consumer, Producer, RingBuffer};

use crate::frame::{Batch, Head, Kind};
use crate::signal::Signal;

/// One pinned executor of a node, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CoreId(pub u16);

impl CoreId {
    /// As an index.
    #[inline]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Batches that a lane holds before its producer keeps the open one.
pub const LANE_BATCHES: usize = 64;
/// Requests that one core may have under way at one sibling.
pub const MAX_IN_FLIGHT: u32 = 16 * 1024;
/// Bytes that an open batch may reach before the lane counts as full.
pub const MAX_OPEN_BYTES: usize = 16 << 20;
/// Bytes of replies that one core may expect from one sibling.
pub const MAX_EXPECTED_BYTES: usize = 64 << 20;
/// Bytes of replies after which a core stops serving a sibling for this turn.
pub const REPLIES_PER_TURN: usize = 1 << 20;
/// Empty batches kept for reuse, and the capacity up to which one is worth keeping.
const POOL_BATCHES: usize = 64;
const POOL_BYTES: usize = 256 << 10;

/// The lane to that sibling is full: keep the request and try again next turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the lane to a sibling core is full")]
pub struct Busy;

#[derive(Debug)]
struct Lane {
    open: Batch,
    ring: Producer<Batch>,
}

impl Lane {
    fn flush(&mut self, pool: &mut Vec<Batch>) -> bool {
        if self.open.is_empty() || self.ring.is_full() {
            return false;
        }
        let batch = std::mem::replace(&mut self.open, pool.pop().unwrap_or_default());
        self.ring.push(batch).expect("room was seen, and there is one producer");
        true
    }

    fn is_full(&self) -> bool {
        self.open.bytes().len() >= MAX_OPEN_BYTES
    }
}

/// What one batch of replies weighs in the average.
const REPLY_WEIGHT: usize = 4;
/// What is expected of replies before one has come.
const FIRST_REPLY_BYTES: usize = 4 << 10;
/// Requests that may be under way however large the replies are.
const FEW_IN_FLIGHT: u32 = 8;

#[derive(Debug)]
struct Peer {
    requests: Lane,
    replies: Lane,
    incoming_requests: Consumer<Batch>,
    incoming_replies: Consumer<Batch>,
    in_flight: u32,
    /// Bytes of a reply, as the latest replies were on average: what a request will cost.
    reply_bytes: usize,
    signal: Arc<Signal>,
}

impl Peer {
    #[inline]
    fn has_room(&self) -> bool {
        self.in_flight < MAX_IN_FLIGHT
            && !self.requests.is_full()
            && (self.in_flight < FEW_IN_FLIGHT || self.in_flight as usize * self.reply_bytes <= MAX_EXPECTED_BYTES)
    }

    #[inline]
    fn learn(&mut self, replies: &Batch) {
        self.in_flight = self.in_flight.saturating_sub(replies.len() as u32);
        let mean = replies.bytes().len() / replies.len().max(1);
        // Rises at once and falls slowly: too low an expectation costs memory, too high a one a little speed.
        self.reply_bytes = mean.max(self.reply_bytes - self.reply_bytes / REPLY_WEIGHT);
    }
}

/// One core's end of the mesh.
#[derive(Debug)]
pub struct Mesh {
    here: CoreId,
    peers: Vec<Option<Peer>>,
    pool: Vec<Batch>,
}

impl Mesh {
    /// The ends of a mesh between `signals.len()` cores, in core order; each goes to its core's thread.
    pub fn build(signals: &[Arc<Signal>]) -> Vec<Mesh> {
        let n = signals.len();
        let lanes = || -> Vec<_> {
            (0..n * n)
                .map(|_| {
                    let (producer, consumer) = RingBuffer::new(LANE_BATCHES);
                    (Some(producer), Some(consumer))
                })
                .collect()
        };
        let (mut requests, mut replies) = (lanes(), lanes());
        let mut meshes = Vec::with_capacity(n);
        for me in 0..n {
            let mut peers = Vec::with_capacity(n);
            for (other, signal) in signals.iter().enumerate() {
                if me == other {
                    peers.push(None);
                    continue;
                }
                let (out, back) = (me * n + other, other * n + me);
                let once = "each end is taken by one core";
                peers.push(Some(Peer {
                    requests: Lane { open: Batch::new(), ring: requests[out].0.take().expect(once) },
                    replies: Lane { open: Batch::new(), ring: replies[out].0.take().expect(once) },
                    incoming_requests: requests[back].1.take().expect(once),
                    incoming_replies: replies[back].1.take().expect(once),
                    in_flight: 0,
                    reply_bytes: FIRST_REPLY_BYTES,
                    signal: signal.clone(),
                }));
            }
            meshes.push(Mesh { here: CoreId(me as u16), peers, pool: Vec::new() });
        }
        meshes
    }

    /// The core this end belongs to.
    pub fn here(&self) -> CoreId {
        self.here
    }

    /// How many cores the node has.
    pub fn cores(&self) -> usize {
        self.peers.len()
    }

    fn peer(&mut self, core: CoreId) -> &mut Peer {
        self.peers[core.index()].as_mut().expect("a core sends nothing to itself through the mesh")
    }

    /// Whether a request to `to` would be taken.
    #[inline]
    pub fn has_room(&self, to: CoreId) -> bool {
        let peer = self.peers[to.index()].as_ref().expect("a core sends nothing to itself through the mesh");
        peer.has_room()
    }

    /// Requests to `to` that wait for the open batch to be handed over.
    #[inline]
    pub fn open_requests(&self, to: CoreId) -> usize {
        self.peers[to.index()].as_ref().map_or(0, |peer| peer.requests.open.len())
    }

    /// Appends a request to the open batch for `to`.
    ///
    /// # Errors
    /// [`Busy`] when the bounds of the lane are reached; nothing was sent.
    #[inline]
    pub fn request(&mut self, to: CoreId, head: Head, kind: Kind, parts: &[&[u8]]) -> Result<(), Busy> {
        self.open(to)?.push(head, kind, parts);
        Ok(())
    }

    /// Appends a key to read to the open batch for `to`, in one frame with the keys before it that wait in the same slot.
    ///
    /// # Errors
    /// As [`Mesh::request`].
    #[inline]
    pub fn key(&mut self, to: CoreId, head: &Head, key: &[u8]) -> Result<(), Busy> {
        self.open(to)?.push_key(head, key);
        Ok(())
    }

    /// The same for one of several small requests that go together, when there was room for the first: the bound on their
    /// number is what the caller limits them to.
    pub fn request_beyond(&mut self, to: CoreId, head: Head, kind: Kind, parts: &[&[u8]]) {
        let peer = self.peer(to);
        peer.in_flight += 1;
        peer.requests.open.push(head, kind, parts);
    }

    /// Appends a command to the open batch for `to`.
    ///
    /// # Errors
    /// As [`Mesh::request`].
    #[inline]
    pub fn command(&mut self, to: CoreId, head: Head, args: &[&[u8]]) -> Result<(), Busy> {
        self.open(to)?.push_command(head, args);
        Ok(())
    }

    #[inline]
    fn open(&mut self, to: CoreId) -> Result<&mut Batch, Busy> {
        if !self.has_room(to) {
            return Err(Busy);
        }
        let peer = self.peer(to);
        peer.in_flight += 1;
        Ok(&mut peer.requests.open)
    }

    /// The open batch of replies to `to`.
    #[inline]
    pub fn replies(&mut self, to: CoreId) -> &mut Batch {
        &mut self.peer(to).replies.open
    }

    /// Next batch of replies from any sibling. Give it back with [`Mesh::recycle`].
    #[inline]
    pub fn next_replies(&mut self) -> Option<(CoreId, Batch)> {
        for (i, peer) in self.peers.iter_mut().enumerate() {
            let Some(peer) = peer else { continue };
            if let Ok(batch) = peer.incoming_replies.pop() {
                peer.learn(&batch);
                return Some((CoreId(i as u16), batch));
            }
        }
        None
    }

    /// Next batch of requests from `from`, unless the replies to it have no room.
    #[inline]
    pub fn next_requests(&mut self, from: CoreId) -> Option<Batch> {
        let peer = self.peers[from.index()].as_mut()?;
        if peer.replies.is_full() {
            return None;
        }
        peer.incoming_requests.pop().ok()
    }

    /// An empty batch, with the memory of one that was recycled if there is one.
    pub fn spare(&mut self) -> Batch {
        self.pool.pop().unwrap_or_default()
    }

    /// Takes a batch that was read, for reuse.
    #[inline]
    pub fn recycle(&mut self, mut batch: Batch) {
        if self.pool.len() < POOL_BATCHES {
            batch.clear(POOL_BYTES);
            self.pool.push(batch);
        }
    }

    /// Hands every open batch over. Returns `(batches, wake-ups)`.
    #[inline]
    pub fn flush(&mut self) -> (u32, u32) {
        let (mut batches, mut wakes) = (0, 0);
        for peer in self.peers.iter_mut().flatten() {
            let sent = peer.replies.flush(&mut self.pool) as u32 + peer.requests.flush(&mut self.pool) as u32;
            if sent > 0 {
                batches += sent;
                wakes += peer.signal.wake() as u32;
            }
        }
        (batches, wakes)
    }

    /// Whether something arrived, or something open waits for room in a lane.
    #[inline]
    pub fn has_work(&self) -> bool {
        self.peers.iter().flatten().any(|p| {
            !p.incoming_requests.is_empty()
                || !p.incoming_replies.is_empty()
                || !p.requests.open.is_empty()
                || !p.replies.open.is_empty()
        })
    }

    /// Requests under way at all siblings.
    pub fn in_flight(&self) -> u64 {
        self.peers.iter().flatten().map(|p| u64::from(p.in_flight)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Status;
    use rustix::event::{EventfdFlags, eventfd};

    fn mesh(n: usize) -> Vec<Mesh> {
        let signals: Vec<_> =
            (0..n).map(|_| Arc::new(Signal::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap()))).collect();
        Mesh::build(&signals)
    }

    /// Serves what arrived at `mesh`, answering each request with its own slot number.
    fn serve(mesh: &mut Mesh) -> usize {
        let mut served = 0;
        for from in (0..mesh.cores() as u16).map(CoreId) {
            while let Some(batch) = mesh.next_requests(from) {
                for frame in batch.frames() {
                    let head = frame.unwrap().head;
                    mesh.replies(from).push_reply(&head, Status::Integer, i64::from(head.slot), b"");
                    served += 1;
                }
                mesh.recycle(batch);
            }
        }
        served
    }

    #[test]
    fn one_turn_costs_one_batch_per_sibling() {
        let mut cores = mesh(3);
        for slot in 0..100 {
            let to = CoreId(1 + (slot % 2) as u16);
            cores[0].request(to, Head { slot, ..Head::default() }, Kind::Get, &[b"k"]).unwrap();
        }
        assert_eq!(cores[0].flush().0, 2);
        assert_eq!((serve(&mut cores[1]), serve(&mut cores[2])), (50, 50));
        assert_eq!((cores[1].flush().0, cores[2].flush().0), (1, 1));
        let mut answers = 0;
        while let Some((_, batch)) = cores[0].next_replies() {
            answers += batch.len();
            cores[0].recycle(batch);
        }
        assert_eq!((answers, cores[0].in_flight()), (100, 0));
    }

    #[test]
    fn a_sibling_that_never_serves_stops_the_sender_and_not_more() {
        let mut cores = mesh(2);
        let mut taken = 0u32;
        while cores[0].request(CoreId(1), Head::default(), Kind::Get, &[b"k"]).is_ok() {
            taken += 1;
            cores[0].flush();
        }
        assert_eq!(taken, MAX_IN_FLIGHT);
        // Large requests are bounded by bytes: with the lane full the open batch stops growing.
        let mut cores = mesh(2);
        let large = vec![0; 1 << 20];
        let mut bytes = 0;
        while cores[0].request(CoreId(1), Head::default(), Kind::Get, &[&large]).is_ok() {
            bytes += large.len();
        }
        assert!(bytes <= MAX_OPEN_BYTES + large.len());
    }

    /// Both cores flood each other and serve only when they cannot send: everything is answered in the end.
    #[test]
    fn two_cores_that_flood_each_other_do_not_deadlock() {
        let mut cores = mesh(2);
        let goal = 3 * MAX_IN_FLIGHT as usize;
        let (mut sent, mut answered) = ([0usize; 2], [0usize; 2]);
        let mut turns = 0;
        while answered != [goal, goal] {
            turns += 1;
            assert!(turns < 100_000, "no progress: sent {sent:?}, answered {answered:?}");
            for me in 0..2 {
                let other = CoreId(1 - me as u16);
                while sent[me] < goal && cores[me].request(other, Head::default(), Kind::Get, &[b"k"]).is_ok() {
                    sent[me] += 1;
                }
                while let Some((_, batch)) = cores[me].next_replies() {
                    answered[me] += batch.len();
                    cores[me].recycle(batch);
                }
                serve(&mut cores[me]);
                cores[me].flush();
            }
        }
    }
}
