//! Futures of this core that wait for a sibling's reply.
//!
//! A waiter is a slot; a request carries the slot's number and the reply brings it back. A future that is dropped early
//! leaves its slot behind as *abandoned*: the slot is free again when its last reply has arrived, so a late reply can
//! never reach somebody else. The number of slots is bounded by the requests the mesh lets be under way.

use std::task::{Poll, Waker};

use bytes::Bytes;
use gridkv_net::frame::{Frame, Status};

use crate::Error;
use crate::values::Values;

/// What a sibling answered to one request, owned.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: Status,
    pub(crate) aux: i64,
    pub(crate) bytes: Bytes,
}

#[derive(Debug)]
enum Slot {
    Free { next: u32 },
    One { answer: Option<Answer>, waker: Option<Waker> },
    Many { group: Group, waker: Option<Waker> },
    Abandoned { replies: u32 },
}

/// A grouped read under way.
#[derive(Debug)]
pub(crate) struct Group {
    values: Values,
    /// Values that were copied out of replies or of this core's own table: the only part of `values`.
    arena: Vec<u8>,
    /// Replies that are still to come.
    pub(crate) missing: u32,
}

/// Bytes expected of a value before one has come.
const FIRST_VALUE: usize = 64;
/// Room made for the values of a group before they come; more is made when it is needed.
const MAX_EXPECTED: usize = 64 << 10;

impl Group {
    fn new(keys: usize, value: usize) -> Group {
        let arena = Vec::with_capacity((keys * value).min(MAX_EXPECTED));
        Group { values: Values::missing(keys), arena, missing: 0 }
    }

    #[inline]
    pub(crate) fn add(&mut self, key: u32, value: &[u8]) {
        self.values.place(key as usize, 0, self.arena.len(), value.len());
        self.arena.extend_from_slice(value);
    }

    /// Takes the values of a frame with one copy of them all.
    #[inline]
    fn add_all(&mut self, frame: &Frame<'_>) {
        let from = self.arena.len();
        self.arena.extend_from_slice(frame.payload);
        for value in frame.values() {
            let (key, place) = value.expect("batches inside a node are whole");
            if let Some(place) = place {
                self.values.place(key as usize, 0, from + place.start, place.len());
            }
        }
    }

    fn fail(&mut self, key: u32, error: Error) {
        self.values.fail(key as usize, error);
    }

    pub(crate) fn into_values(mut self) -> Values {
        self.values.add_part(Bytes::from(self.arena));
        self.values
    }
}

const NONE: u32 = u32::MAX;

/// The waiting futures of one core.
#[derive(Debug)]
pub(crate) struct Waiters {
    slots: Vec<Slot>,
    free: u32,
    /// Bytes per key that the last group took.
    typical: usize,
}

impl Waiters {
    pub(crate) fn new() -> Waiters {
        Waiters { slots: Vec::new(), free: NONE, typical: FIRST_VALUE }
    }

    fn insert(&mut self, slot: Slot) -> u32 {
        if self.free == NONE {
            self.slots.push(slot);
            return self.slots.len() as u32 - 1;
        }
        let index = self.free;
        let Slot::Free { next } = self.slots[index as usize] else { unreachable!("the free list holds free slots") };
        self.free = next;
        self.slots[index as usize] = slot;
        index
    }

    fn release(&mut self, index: u32) -> Slot {
        let slot = std::mem::replace(&mut self.slots[index as usize], Slot::Free { next: self.free });
        self.free = index;
        slot
    }

    /// A slot for one reply.
    pub(crate) fn one(&mut self) -> u32 {
        self.insert(Slot::One { answer: None, waker: None })
    }

    /// A slot for a group of that many keys, none of them found yet.
    pub(crate) fn many(&mut self, keys: usize) -> u32 {
        self.insert(Slot::Many { group: Group::new(keys, self.typical), waker: None })
    }

    /// The group of a slot of [`Waiters::many`].
    pub(crate) fn group(&mut self, index: u32) -> &mut Group {
        match &mut self.slots[index as usize] {
            Slot::Many { group, .. } => group,
            _ => unreachable!("a future fills the slot it was given"),
        }
    }

    /// A reply arrived for `frame.head.slot`.
    pub(crate) fn answer(&mut self, frame: &Frame<'_>) {
        let index = frame.head.slot;
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        match slot {
            Slot::One { answer, waker } => {
                *answer = Some(Answer {
                    status: frame.status(),
                    aux: frame.head.aux,
                    bytes: Bytes::copy_from_slice(frame.payload),
                });
                if let Some(waker) = waker.take() {
                    waker.wake();
                }
            }
            Slot::Many { group, waker } => {
                match frame.status() {
                    Status::Values => group.add_all(frame),
                    Status::Value => group.add(frame.head.index, frame.payload),
                    Status::Nil => {}
                    _ => group.fail(frame.head.index, Error::from_reply(frame.payload)),
                }
                group.missing -= answers(frame);
                if group.missing == 0
                    && let Some(waker) = waker.take()
                {
                    waker.wake();
                }
            }
            Slot::Abandoned { replies } => {
                *replies -= answers(frame);
                if *replies == 0 {
                    self.release(index);
                }
            }
            Slot::Free { .. } => debug_assert!(false, "a reply for a free slot"),
        }
    }

    /// Polls a slot of [`Waiters::one`]; when ready it is free again.
    pub(crate) fn poll_one(&mut self, index: u32, current: &Waker) -> Poll<Answer> {
        let Slot::One { answer, waker } = &mut self.slots[index as usize] else {
            unreachable!("a future polls the slot it was given")
        };
        if answer.is_none() {
            keep(waker, current);
            return Poll::Pending;
        }
        match self.release(index) {
            Slot::One { answer: Some(answer), .. } => Poll::Ready(answer),
            _ => unreachable!("the slot was looked at just now"),
        }
    }

    /// Polls a slot of [`Waiters::many`]; when ready it is free again.
    pub(crate) fn poll_many(&mut self, index: u32, current: &Waker) -> Poll<Group> {
        let Slot::Many { group, waker } = &mut self.slots[index as usize] else {
            unreachable!("a future polls the slot it was given")
        };
        if group.missing > 0 {
            keep(waker, current);
            return Poll::Pending;
        }
        match self.release(index) {
            Slot::Many { group, .. } => {
                self.typical = group.arena.len().div_ceil(group.values.len().max(1));
                Poll::Ready(group)
            }
            _ => unreachable!("the slot was looked at just now"),
        }
    }

    /// The future of that slot is dropped before it was ready.
    pub(crate) fn abandon(&mut self, index: u32) {
        let replies = match &self.slots[index as usize] {
            Slot::One { answer, .. } => u32::from(answer.is_none()),
            Slot::Many { group, .. } => group.missing,
            Slot::Free { .. } | Slot::Abandoned { .. } => unreachable!("a future abandons the slot it was given, once"),
        };
        if replies == 0 {
            self.release(index);
        } else {
            self.slots[index as usize] = Slot::Abandoned { replies };
        }
    }

    /// Slots in use.
    #[cfg(test)]
    fn in_use(&self) -> usize {
        self.slots.iter().filter(|s| !matches!(s, Slot::Free { .. })).count()
    }
}

/// How many requests a frame answers.
fn answers(frame: &Frame<'_>) -> u32 {
    if frame.status() == Status::Values { frame.head.aux as u32 } else { 1 }
}

fn keep(waker: &mut Option<Waker>, current: &Waker) {
    match waker {
        Some(known) if known.will_wake(current) => {}
        _ => *waker = Some(current.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gridkv_net::frame::{Batch, Head};

    fn reply(waiters: &mut Waiters, slot: u32, index: u32, value: &[u8]) {
        let mut batch = Batch::new();
        batch.push_reply(&Head { slot, index, ..Head::default() }, Status::Value, 0, value);
        let frame = batch.frames().next().unwrap().unwrap();
        waiters.answer(&frame);
    }

    #[test]
    fn a_late_reply_never_reaches_the_next_owner_of_a_slot() {
        let mut waiters = Waiters::new();
        let first = waiters.one();
        waiters.abandon(first);
        let second = waiters.one();
        assert_ne!(first, second, "an abandoned slot is not reused while its reply is under way");
        reply(&mut waiters, first, 0, b"late");
        assert!(waiters.poll_one(second, Waker::noop()).is_pending());
        reply(&mut waiters, second, 0, b"mine");
        assert!(matches!(waiters.poll_one(second, Waker::noop()), Poll::Ready(a) if a.bytes == "mine"));
        assert_eq!(waiters.in_use(), 0);
    }

    #[test]
    fn a_group_is_ready_with_its_last_reply() {
        let mut waiters = Waiters::new();
        let slot = waiters.many(3);
        waiters.group(slot).missing = 2;
        reply(&mut waiters, slot, 2, b"c");
        assert!(waiters.poll_many(slot, Waker::noop()).is_pending());
        reply(&mut waiters, slot, 0, b"a");
        let Poll::Ready(group) = waiters.poll_many(slot, Waker::noop()) else { panic!("both replies are there") };
        let values = group.into_values();
        assert_eq!([values.get(0), values.get(1), values.get(2)], [Some(&b"a"[..]), None, Some(b"c")]);
        assert_eq!(waiters.in_use(), 0);
    }
}
