//! The core mesh: batches of frames between the cores of a node.
//!
//! Between each two cores run two lanes each way, single producer and single consumer: one for requests, one for
//! replies. During a turn a core appends to one open batch per lane; [`Mesh::hand_over`] hands each over at the turn's end,
//! with one store and, only if the sibling sleeps, one wake-up. Requests may go before ([`Mesh::flush`]).
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
//! Where a core writes a log, a batch of replies may have to wait until the log is on disk up to some position: it is held, in
//! order, until then. Held replies count against the same bounds, so that a sibling is not served when too many wait. Requests
//! never wait.
//!
//! Not here: what the frames mean, what the positions are, and sleeping (see [`crate::signal`]).

use std::collections::VecDeque;
use std::sync::Arc;

use rtrb::{Consumer, Producer, RingBuffer};

use crate::frame::{Batch, Head, Kind, Status};
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
/// Bytes of replies, not handed over, after which a core stops serving a sibling for this turn.
pub const REPLIES_PER_TURN: usize = 1 << 20;
/// Empty batches kept for reuse, and the capacity up to which one is worth keeping.
const POOL_BATCHES: usize = 64;
const POOL_BYTES: usize = 256 << 10;
/// Held batches that wait for the same position become one up to this size.
const JOINED_BYTES: usize = 64 << 10;

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

/// The lane for replies, and those in front of it.
#[derive(Debug)]
struct Replies {
    lane: Lane,
    /// Batches with the positions that they wait for, which grow. They leave before the open one.
    held: VecDeque<(u64, Batch)>,
    /// Bytes of these.
    held_bytes: usize,
}

impl Replies {
    /// Bytes that have not been handed over.
    #[inline]
    fn waiting(&self) -> usize {
        self.lane.open.bytes().len() + self.held_bytes
    }

    /// The oldest one may not leave yet.
    #[inline]
    fn is_held(&self, safe: u64) -> bool {
        self.held.front().is_some_and(|(position, _)| *position > safe)
    }

    #[inline]
    fn is_gated(&self, safe: u64) -> bool {
        self.is_held(safe) && self.waiting() >= REPLIES_PER_TURN
    }

    /// Hands over what may leave. Returns the number of batches.
    #[inline]
    fn flush(&mut self, position: u64, safe: u64, pool: &mut Vec<Batch>) -> u32 {
        if self.held.is_empty() && position <= safe {
            return self.lane.flush(pool) as u32;
        }
        if position > safe && !self.lane.open.is_empty() {
            self.hold(position, pool);
        }
        let mut sent = 0;
        while !self.held.is_empty() && !self.is_held(safe) && !self.lane.ring.is_full() {
            let (_, batch) = self.held.pop_front().expect("it is not empty");
            self.held_bytes -= batch.bytes().len();
            self.lane.ring.push(batch).expect("room was seen, and there is one producer");
            sent += 1;
        }
        if self.held.is_empty() {
            sent += self.lane.flush(pool) as u32;
        }
        sent
    }

    /// Closes the open batch, which waits for `position`.
    fn hold(&mut self, position: u64, pool: &mut Vec<Batch>) {
        let open = std::mem::replace(&mut self.lane.open, pool.pop().unwrap_or_default());
        match self.held.back_mut() {
            Some((last, batch)) if *last == position && batch.bytes().len() + open.bytes().len() <= JOINED_BYTES => {
                let before = batch.bytes().len();
                join(batch, &open);
                self.held_bytes += batch.bytes().len() - before;
                recycle(pool, open);
            }
            last => {
                debug_assert!(last.is_none_or(|(last, _)| *last <= position), "positions grow");
                self.held_bytes += open.bytes().len();
                self.held.push_back((position, open));
            }
        }
    }
}

/// Appends replies to a batch of replies.
fn join(batch: &mut Batch, replies: &Batch) {
    const OURS: &str = "batches inside a node are whole";
    for frame in replies.frames() {
        let frame = frame.expect(OURS);
        if frame.status() != Status::Values {
            batch.push(frame.head, Kind::Reply, &[frame.payload]);
            continue;
        }
        for value in frame.values() {
            let (index, bytes) = value.expect(OURS);
            batch.push_value(&frame.head, index, bytes.map(|bytes| &frame.payload[bytes]));
        }
    }
}

/// Keeps a batch that was read for reuse, if few are.
#[inline]
fn recycle(pool: &mut Vec<Batch>, mut batch: Batch) {
    if pool.len() < POOL_BATCHES {
        batch.clear(POOL_BYTES);
        pool.push(batch);
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
    replies: Replies,
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
                    replies: Replies {
                        lane: Lane { open: Batch::new(), ring: replies[out].0.take().expect(once) },
                        held: VecDeque::new(),
                        held_bytes: 0,
                    },
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
        &mut self.peer(to).replies.lane.open
    }

    /// Bytes of replies to `to` that have not been handed over. With [`REPLIES_PER_TURN`] or more that core is not to be served.
    #[inline]
    pub fn waiting_replies(&self, to: CoreId) -> usize {
        self.peers[to.index()].as_ref().map_or(0, |peer| peer.replies.waiting())
    }

    /// Whether `from` is not to be served because replies to it wait for a position beyond `safe`.
    #[inline]
    pub fn is_gated(&self, from: CoreId, safe: u64) -> bool {
        self.peers[from.index()].as_ref().is_some_and(|peer| peer.replies.is_gated(safe))
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
        if peer.replies.waiting() >= MAX_OPEN_BYTES {
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
    pub fn recycle(&mut self, batch: Batch) {
        recycle(&mut self.pool, batch);
    }

    /// Hands the open requests over, before the end of a turn. Returns `(batches, wake-ups)`.
    #[inline]
    pub fn flush(&mut self) -> (u32, u32) {
        self.send(|peer, pool| peer.requests.flush(pool) as u32)
    }

    /// Hands the open requests over, and of the replies, the open ones of which wait for `position`, those that wait for nothing
    /// beyond `safe`. Returns `(batches, wake-ups)`.
    #[inline]
    pub fn hand_over(&mut self, position: u64, safe: u64) -> (u32, u32) {
        self.send(|peer, pool| peer.replies.flush(position, safe, pool) + peer.requests.flush(pool) as u32)
    }

    #[inline]
    fn send(&mut self, flush: impl Fn(&mut Peer, &mut Vec<Batch>) -> u32) -> (u32, u32) {
        let (mut batches, mut wakes) = (0, 0);
        for peer in self.peers.iter_mut().flatten() {
            let sent = flush(peer, &mut self.pool);
            if sent > 0 {
                batches += sent;
                wakes += peer.signal.wake() as u32;
            }
        }
        (batches, wakes)
    }

    /// Whether something arrived that can be taken, or something waits for room in a lane. What waits for a position beyond `safe`,
    /// and requests that cannot be served before that has left, are none: who moves the position wakes the core.
    #[inline]
    pub fn has_work(&self, safe: u64) -> bool {
        self.peers.iter().flatten().any(|p| {
            !p.incoming_replies.is_empty()
                || !p.requests.open.is_empty()
                || !p.replies.lane.open.is_empty()
                || !p.replies.held.is_empty() && !p.replies.is_held(safe)
                || !p.incoming_requests.is_empty() && !p.replies.is_gated(safe)
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
        assert_eq!(cores[0].hand_over(0, 0).0, 2);
        assert_eq!((serve(&mut cores[1]), serve(&mut cores[2])), (50, 50));
        assert_eq!((cores[1].hand_over(0, 0).0, cores[2].hand_over(0, 0).0), (1, 1));
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
                cores[me].hand_over(0, 0);
            }
        }
    }

    const ONE: CoreId = CoreId(1);
    const ZERO: CoreId = CoreId(0);

    /// Slots of the replies that have arrived at `mesh`, in order.
    fn arrived(mesh: &mut Mesh) -> Vec<u32> {
        let mut slots = Vec::new();
        while let Some((_, batch)) = mesh.next_replies() {
            slots.extend(batch.frames().map(|frame| frame.unwrap().head.slot));
            mesh.recycle(batch);
        }
        slots
    }

    /// Has core 0 ask core 1, which serves and ends its turn at `position`, with its log on disk up to `safe`.
    fn ask(cores: &mut [Mesh], slots: std::ops::Range<u32>, position: u64, safe: u64) {
        for slot in slots {
            cores[0].request(ONE, Head { slot, ..Head::default() }, Kind::Get, &[b"k"]).unwrap();
        }
        cores[0].hand_over(0, 0);
        serve(&mut cores[1]);
        cores[1].hand_over(position, safe);
    }

    #[test]
    fn replies_wait_for_their_position_and_keep_their_order() {
        let mut cores = mesh(2);
        ask(&mut cores, 0..3, 0, 0);
        assert_eq!(arrived(&mut cores[0]), [0, 1, 2]);
        ask(&mut cores, 3..5, 10, 0);
        ask(&mut cores, 5..6, 20, 0);
        ask(&mut cores, 6..7, 20, 9);
        assert!(arrived(&mut cores[0]).is_empty());
        assert_eq!(cores[1].peer(ZERO).replies.held.len(), 2, "those of one position are one batch");
        // What is said with the oldest released, and the rest not.
        ask(&mut cores, 7..8, 30, 10);
        assert_eq!(arrived(&mut cores[0]), [3, 4]);
        // The gate has opened: what comes now leaves behind what was held.
        ask(&mut cores, 8..9, 30, 30);
        assert_eq!(arrived(&mut cores[0]), [5, 6, 7, 8]);
        assert_eq!((cores[0].in_flight(), cores[1].waiting_replies(ZERO)), (0, 0));
    }

    #[test]
    fn requests_are_not_held() {
        let mut cores = mesh(2);
        let request = |mesh: &mut Mesh| mesh.request(ONE, Head::default(), Kind::Get, &[b"k"]).unwrap();
        // In the middle of a turn nobody knows yet what the replies wait for.
        request(&mut cores[0]);
        cores[0].replies(ONE).push_reply(&Head::default(), Status::Done, 0, b"");
        assert_eq!(cores[0].flush().0, 1);
        assert_eq!(serve(&mut cores[1]), 1);
        assert!(arrived(&mut cores[1]).is_empty());
        // At its end the gate is shut.
        request(&mut cores[0]);
        assert_eq!(cores[0].hand_over(1, 0).0, 1);
        assert_eq!(serve(&mut cores[1]), 1);
        assert!(arrived(&mut cores[1]).is_empty());
        cores[0].hand_over(1, 1);
        assert_eq!(arrived(&mut cores[1]), [0]);
    }

    #[test]
    fn what_is_held_is_no_work_and_what_passes_is() {
        let mut cores = mesh(2);
        ask(&mut cores, 0..1, 10, 9);
        assert!(!cores[1].has_work(9) && cores[1].has_work(10));
        cores[1].hand_over(10, 10);
        assert!(!cores[1].has_work(10));
        arrived(&mut cores[0]);

        // More batches than the lane takes: those that pass wait for room, which is work.
        for turn in 0..=LANE_BATCHES as u32 {
            ask(&mut cores, turn..turn + 1, 11 + u64::from(turn), 10);
        }
        assert!(!cores[1].has_work(10));
        let last = 11 + LANE_BATCHES as u64;
        assert_eq!(cores[1].hand_over(last, last).0, LANE_BATCHES as u32);
        assert!(cores[1].has_work(last));
        let mut slots = arrived(&mut cores[0]);
        cores[1].hand_over(last, last);
        assert!(!cores[1].has_work(last));
        slots.extend(arrived(&mut cores[0]));
        assert!(slots.into_iter().eq(0..=LANE_BATCHES as u32));
    }

    #[test]
    fn held_replies_count_against_the_bound_and_stop_the_serving() {
        let mut cores = mesh(2);
        let value = vec![7; REPLIES_PER_TURN / 4];
        let mut served = 0;
        for turn in 1..100 {
            cores[0].request(ONE, Head::default(), Kind::Get, &[b"k"]).unwrap();
            cores[0].hand_over(0, 0);
            if cores[1].waiting_replies(ZERO) < REPLIES_PER_TURN {
                let batch = cores[1].next_requests(ZERO).expect("one was sent");
                for frame in batch.frames() {
                    cores[1].replies(ZERO).push_reply(&frame.unwrap().head, Status::Value, 0, &value);
                    served += 1;
                }
            }
            cores[1].hand_over(turn, 0);
        }
        assert_eq!(served, 4);
        // Requests wait, but there is nothing to do until the gate moves.
        assert!(cores[1].is_gated(ZERO, 0) && !cores[1].has_work(0));
        assert!(!cores[1].is_gated(ZERO, 1) && cores[1].has_work(1));
        // Without the bound of a turn the one on all that is open holds.
        for _ in 0..MAX_OPEN_BYTES / value.len() {
            cores[1].replies(ZERO).push_reply(&Head::default(), Status::Value, 0, &value);
            cores[1].hand_over(100, 0);
        }
        assert!(cores[1].next_requests(ZERO).is_none());
        let before = cores[1].waiting_replies(ZERO);
        let left = cores[1].hand_over(100, 100).0 as usize;
        assert_eq!(left, LANE_BATCHES);
        assert!(cores[1].waiting_replies(ZERO) <= before - left * value.len());
        assert!(cores[1].next_requests(ZERO).is_some());
    }

    #[test]
    fn joined_replies_are_those_that_were_said() {
        let (mut first, mut second) = (Batch::new(), Batch::new());
        let head = |slot| Head { conn: 7, slot, index: 3, ..Head::default() };
        first.push_reply(&head(1), Status::Integer, -5, b"");
        first.push_value(&head(2), 0, Some(b"zero"));
        second.push_value(&head(2), 1, None);
        second.push_value(&head(2), 2, Some(b""));
        second.push_reply(&head(4), Status::Value, 0, b"value");
        let said = |batches: &[&Batch]| {
            let mut said = Vec::new();
            for frame in batches.iter().flat_map(|batch| batch.frames()).map(Result::unwrap) {
                let (head, payload) = (frame.head, frame.payload);
                if frame.status() == Status::Values {
                    for (index, bytes) in frame.values().map(Result::unwrap) {
                        said.push((head.conn, head.slot, index, 0, bytes.map(|at| payload[at].to_vec())));
                    }
                } else {
                    said.push((head.conn, head.slot, head.index, head.aux, Some(payload.to_vec())));
                }
            }
            said
        };
        let (expected, answers) = (said(&[&first, &second]), first.len() + second.len());
        join(&mut first, &second);
        assert_eq!((said(&[&first]), first.len()), (expected, answers));
    }

    /// As above, while both logs reach the disk only now and then.
    #[test]
    fn two_cores_that_flood_each_other_and_wait_for_disks_do_not_deadlock() {
        let mut cores = mesh(2);
        let goal = 3 * MAX_IN_FLIGHT as usize;
        let (mut sent, mut answered) = ([0usize; 2], [0usize; 2]);
        // A sync covers what was noted when it began, which is when the one before it passed.
        let (mut noted, mut syncing, mut safe) = ([0u64; 2], [0u64; 2], [0u64; 2]);
        let mut turns = 0u64;
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
                noted[me] += u64::from(serve(&mut cores[me]) > 0);
                if turns.is_multiple_of(3 + me as u64) {
                    (safe[me], syncing[me]) = (syncing[me], noted[me]);
                }
                cores[me].hand_over(noted[me], safe[me]);
            }
        }
    }
}
