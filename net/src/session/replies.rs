//! Replies in the order of their requests.
//!
//! A reply that is known at once goes straight to the output as long as nothing before it is open. Behind an open
//! one it is parked; when the open one is answered, everything up to the next open one leaves.
//!
//! ```text
//!   output ◀── [One: waits] [Ready: 3 replies] [Gather: 1 of 2 parts] [Ready] ◀── new replies
//!                 first
//! ```
//!
//! Invariant: the front slot is never `Ready`. Bound: the session stops reading its input when [`Replies::open`] or
//! [`Replies::parked`] grow too large.

use std::collections::VecDeque;

use gridkv_engine::command::Merge;
use gridkv_engine::reply::Reply;

use crate::frame::Status;
use crate::resp::{Protocol, Writer};

/// What came back for a request that was sent away.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// How `bytes` are to be understood.
    pub status: Status,
    /// The reply's number.
    pub aux: i64,
    /// The reply's bytes.
    pub bytes: &'a [u8],
}

impl Answer<'_> {
    /// Whether the client is told of an error.
    pub fn is_error(&self) -> bool {
        self.status == Status::Error || (self.status == Status::Encoded && self.bytes.first() == Some(&b'-'))
    }

    #[inline]
    fn render(&self, protocol: Protocol, out: &mut Vec<u8>) {
        let mut writer = Writer::new(protocol, out);
        match self.status {
            Status::Nil => writer.null(),
            Status::Value => writer.bulk(self.bytes),
            Status::Integer => writer.integer(self.aux),
            Status::Done => writer.ok(),
            Status::Error => writer.error_bytes(self.bytes),
            Status::Encoded => out.extend_from_slice(self.bytes),
            Status::Values => writer.error("ERR internal error: a session sends no groups, and was answered as if"),
        }
    }
}

/// A reply made of parts that several cores answer.
#[derive(Debug)]
pub(super) struct Gathering {
    merge: Merge,
    missing: u32,
    sum: i64,
    /// It is a command that writes: what became of its parts together decides which error is true.
    writes: bool,
    /// A part changed something.
    changed: bool,
    /// The error that leaves the most open, else the first, as the line that the client gets.
    error: Option<Vec<u8>>,
    /// For [`Merge::Array`]: the core that answers each key.
    order: Vec<u16>,
    /// Bytes by core, for [`Merge::Array`] and [`Merge::Concat`].
    parts: Vec<Vec<u8>>,
}

impl Gathering {
    pub(super) fn new(merge: Merge, missing: u32, cores: usize, order: Vec<u16>, writes: bool) -> Gathering {
        let parts = if matches!(merge, Merge::Array | Merge::Concat) { vec![Vec::new(); cores] } else { Vec::new() };
        Gathering { merge, missing, sum: 0, writes, changed: false, error: None, order, parts }
    }

    /// Takes the part of one core.
    pub(super) fn add(&mut self, core: usize, answer: &Answer<'_>) {
        self.missing -= 1;
        if answer.is_error() {
            let mut line = Vec::new();
            answer.render(Protocol::Resp2, &mut line);
            if self.error.as_ref().is_none_or(|known| !is_unknown(known) && is_unknown(&line)) {
                self.error = Some(line);
            }
            return;
        }
        self.sum += answer.aux;
        // A deletion that found nothing did nothing.
        self.changed |= self.writes && (self.merge != Merge::Sum || answer.aux != 0);
        if let Some(part) = self.parts.get_mut(core) {
            part.extend_from_slice(answer.bytes);
        }
    }

    /// Writes the whole reply.
    pub(super) fn finish(&self, protocol: Protocol, out: &mut Vec<u8>) {
        if let Some(error) = &self.error {
            if self.changed && !is_unknown(error) {
                // The refusal alone would say that nothing was done.
                out.push(b'-');
                out.extend_from_slice(PART_WRITTEN.as_bytes());
                out.extend_from_slice(error.strip_prefix(b"-").unwrap_or(error));
            } else {
                out.extend_from_slice(error);
            }
            return;
        }
        let mut writer = Writer::new(protocol, out);
        match self.merge {
            Merge::Sum => writer.integer(self.sum),
            Merge::Ok => writer.ok(),
            Merge::Concat => {
                writer.array(usize::try_from(self.sum).unwrap_or(0));
                self.parts.iter().for_each(|part| out.extend_from_slice(part));
            }
            Merge::Array => {
                writer.array(self.order.len());
                // Each part is an array of its own, whose elements are dealt out in the order of the keys.
                let mut rest: Vec<&[u8]> = self.parts.iter().map(|part| after_line(part)).collect();
                for &core in &self.order {
                    let part = &mut rest[usize::from(core)];
                    let (element, behind) = part.split_at(element_len(part));
                    out.extend_from_slice(element);
                    *part = behind;
                }
            }
        }
    }
}

/// What a client reads when a command over several keys was done for some and refused for others; the refusal follows.
pub const PART_WRITTEN: &str =
    "UNKNOWN part of the keys was written: read to find out which; the others were refused with ";

/// Whether an error's line leaves open what was done.
fn is_unknown(line: &[u8]) -> bool {
    line.starts_with(b"-UNKNOWN ")
}

/// What follows the first line.
fn after_line(bytes: &[u8]) -> &[u8] {
    memchr::memchr(b'\n', bytes).map_or(&[], |end| &bytes[end + 1..])
}

/// Length of the byte string or null at the beginning of an encoded array's elements.
fn element_len(bytes: &[u8]) -> usize {
    let Some(line) = memchr::memchr(b'\n', bytes).map(|end| end + 1) else { return bytes.len() };
    let digits = bytes.get(1..line.saturating_sub(2)).unwrap_or_default();
    match bytes[0] {
        b'$' if digits != b"-1" => {
            let len = digits.iter().fold(0usize, |n, digit| n * 10 + usize::from(digit - b'0'));
            (line + len + 2).min(bytes.len())
        }
        _ => line,
    }
}

#[derive(Debug)]
enum Slot {
    /// Replies that wait for those before them.
    Ready(Vec<u8>),
    /// Waits for one answer.
    One(Protocol, Loudness),
    /// Waits for several.
    Gather(Box<Gathering>, Protocol, Loudness),
}

/// Whether the client wants to read the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loudness {
    Heard,
    Quiet,
}

/// The ordered replies of one connection.
#[derive(Debug, Default)]
pub(super) struct Replies {
    slots: VecDeque<Slot>,
    /// Number of the front slot.
    first: u32,
    open: usize,
    parked: usize,
    spare: Vec<Vec<u8>>,
    scratch: Vec<u8>,
}

/// Buffers kept for reuse, and the capacity up to which one is worth keeping.
const SPARE: usize = 8;
const SPARE_BYTES: usize = 16 << 10;

impl Replies {
    /// Answers that are outstanding.
    #[inline]
    pub(super) fn open(&self) -> usize {
        self.open
    }

    /// Bytes that wait behind outstanding answers.
    #[inline]
    pub(super) fn parked(&self) -> usize {
        self.parked
    }

    /// Writes a reply that is known now.
    #[inline]
    pub(super) fn write<T>(&mut self, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        if self.slots.is_empty() { write(out) } else { self.park(write) }
    }

    fn park<T>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        if !matches!(self.slots.back(), Some(Slot::Ready(_))) {
            let buf = self.spare.pop().unwrap_or_default();
            self.slots.push_back(Slot::Ready(buf));
        }
        let Some(Slot::Ready(buf)) = self.slots.back_mut() else { unreachable!("one was pushed") };
        let before = buf.len();
        let result = write(buf);
        self.parked += buf.len() - before;
        result
    }

    /// Writes a reply that nobody reads.
    pub(super) fn drop_reply<T>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let result = write(&mut self.scratch);
        self.scratch = Vec::new();
        result
    }

    #[inline]
    fn next_number(&self) -> u32 {
        self.first.wrapping_add(self.slots.len() as u32)
    }

    /// Opens a slot for one answer; its number.
    #[inline]
    pub(super) fn wait(&mut self, protocol: Protocol, loudness: Loudness) -> u32 {
        let number = self.next_number();
        self.slots.push_back(Slot::One(protocol, loudness));
        self.open += 1;
        number
    }

    /// Opens a slot for the answers that `gathering` lacks; its number. It lacks some.
    pub(super) fn gather(&mut self, gathering: Gathering, protocol: Protocol, loudness: Loudness) -> u32 {
        let number = self.next_number();
        self.slots.push_back(Slot::Gather(Box::new(gathering), protocol, loudness));
        self.open += 1;
        number
    }

    /// Fills a slot. `index` names the part of a reply that has several. True when the reply is whole now.
    #[inline]
    pub(super) fn answer(&mut self, number: u32, index: u32, answer: &Answer<'_>, out: &mut Vec<u8>) -> bool {
        let at = number.wrapping_sub(self.first) as usize;
        let Some(slot) = self.slots.get_mut(at) else { return false };
        let mut whole = if at == 0 { std::mem::take(out) } else { self.spare.pop().unwrap_or_default() };
        let before = whole.len();
        let loudness = match slot {
            Slot::One(protocol, loudness) => {
                answer.render(*protocol, &mut whole);
                *loudness
            }
            Slot::Gather(gathering, protocol, loudness) => {
                gathering.add(index as usize, answer);
                if gathering.missing > 0 {
                    if at == 0 {
                        *out = whole;
                    } else {
                        self.spare.push(whole);
                    }
                    return false;
                }
                gathering.finish(*protocol, &mut whole);
                *loudness
            }
            Slot::Ready(_) => unreachable!("a slot is answered once"),
        };
        self.open -= 1;
        if loudness == Loudness::Quiet {
            whole.truncate(before);
        }
        if at > 0 {
            self.parked += whole.len();
            *slot = Slot::Ready(whole);
            return true;
        }
        *out = whole;
        self.slots.pop_front();
        self.first = self.first.wrapping_add(1);
        self.leave(out);
        true
    }

    /// Moves what no longer waits to the output.
    #[inline]
    fn leave(&mut self, out: &mut Vec<u8>) {
        while let Some(Slot::Ready(buf)) = self.slots.front_mut() {
            let mut buf = std::mem::take(buf);
            self.slots.pop_front();
            self.first = self.first.wrapping_add(1);
            self.parked -= buf.len();
            out.extend_from_slice(&buf);
            if self.spare.len() < SPARE && buf.capacity() <= SPARE_BYTES {
                buf.clear();
                self.spare.push(buf);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Loudness::{Heard, Quiet};

    const P: Protocol = Protocol::Resp2;

    fn integer(aux: i64) -> Answer<'static> {
        Answer { status: Status::Integer, aux, bytes: b"" }
    }

    #[test]
    fn replies_leave_in_the_order_of_requests() {
        let (mut replies, mut out) = (Replies::default(), Vec::new());
        replies.write(&mut out, |o| o.extend_from_slice(b"+a\r\n"));
        let one = replies.wait(P, Heard);
        replies.write(&mut out, |o| o.extend_from_slice(b"+b\r\n"));
        replies.write(&mut out, |o| o.extend_from_slice(b"+c\r\n"));
        let two = replies.wait(P, Heard);
        let quiet = replies.wait(P, Quiet);
        replies.write(&mut out, |o| o.extend_from_slice(b"+d\r\n"));
        assert_eq!((replies.open(), out.as_slice()), (3, &b"+a\r\n"[..]));
        assert!(replies.answer(quiet, 0, &integer(3), &mut out));
        assert!(replies.answer(two, 0, &integer(2), &mut out));
        assert_eq!(out, b"+a\r\n");
        assert!(replies.answer(one, 0, &integer(1), &mut out));
        assert_eq!(out, b"+a\r\n:1\r\n+b\r\n+c\r\n:2\r\n+d\r\n");
        assert_eq!((replies.open(), replies.parked()), (0, 0));
    }

    #[test]
    fn parts_of_an_array_are_dealt_out_in_the_order_of_the_keys() {
        let (mut replies, mut out) = (Replies::default(), Vec::new());
        let slot = replies.gather(Gathering::new(Merge::Array, 2, 2, vec![1, 0, 1], false), P, Heard);
        let part = |bytes| Answer { status: Status::Encoded, aux: 0, bytes };
        assert!(!replies.answer(slot, 1, &part(b"*2\r\n$3\r\na\nb\r\n$-1\r\n"), &mut out));
        assert!(replies.answer(slot, 0, &part(b"*1\r\n$0\r\n\r\n"), &mut out));
        assert_eq!(out, b"*3\r\n$3\r\na\nb\r\n$0\r\n\r\n$-1\r\n");
    }

    /// What a client reads of a command of two cores.
    fn merged(merge: Merge, writes: bool, first: &Answer<'_>, second: &Answer<'_>) -> String {
        let (mut replies, mut out) = (Replies::default(), Vec::new());
        let slot = replies.gather(Gathering::new(merge, 2, 2, Vec::new(), writes), P, Heard);
        assert!(!replies.answer(slot, 0, first, &mut out));
        assert!(replies.answer(slot, 1, second, &mut out));
        String::from_utf8(out).unwrap().trim_end().to_owned()
    }

    #[test]
    fn a_part_of_a_read_that_failed_is_the_whole_reply() {
        let error = Answer { status: Status::Error, aux: 0, bytes: b"CLUSTERDOWN no" };
        assert_eq!(merged(Merge::Sum, false, &error, &integer(5)), "-CLUSTERDOWN no");
        assert_eq!(merged(Merge::Sum, false, &integer(5), &error), "-CLUSTERDOWN no");
    }

    #[test]
    fn a_write_is_refused_only_when_every_part_was() {
        let done = Answer { status: Status::Encoded, aux: 0, bytes: b"+OK\r\n" };
        let down = Answer { status: Status::Error, aux: 0, bytes: b"CLUSTERDOWN no" };
        let full = Answer { status: Status::Encoded, aux: 0, bytes: b"-OOM no\r\n" };
        let open = Answer { status: Status::Error, aux: 0, bytes: b"UNKNOWN 1 of 2" };
        let refused = |with: &str| format!("-{PART_WRITTEN}{with}");
        for (merge, one, other, expected) in [
            (Merge::Ok, &down, &open, "-UNKNOWN 1 of 2"),
            (Merge::Ok, &done, &open, "-UNKNOWN 1 of 2"),
            (Merge::Ok, &down, &done, &refused("CLUSTERDOWN no")),
            (Merge::Ok, &full, &done, &refused("OOM no")),
            (Merge::Sum, &full, &integer(5), &refused("OOM no")),
            (Merge::Ok, &full, &full, "-OOM no"),
            // Nothing was there to delete, so nothing was done.
            (Merge::Sum, &down, &integer(0), "-CLUSTERDOWN no"),
        ] {
            assert_eq!(merged(merge, true, one, other), expected);
            assert_eq!(merged(merge, true, other, one), expected);
        }
        assert!(is_unknown(format!("-{PART_WRITTEN}").as_bytes()));
    }
}
