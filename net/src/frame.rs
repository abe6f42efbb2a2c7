//! Frames: what one core says to another.
//!
//! A batch is one buffer of frames laid end to end. A frame is a fixed head, archived by rkyv and read in place, and a
//! payload of raw bytes behind it. Nothing is decoded into owned values on the way: the owner of a shard looks at the
//! key where the sender wrote it.
//!
//! ```text
//!   0        8        16       24     28      32     36     40    42  43     44   48
//!   +--------+--------+--------+------+-------+------+------+-----+----+------+----+---------------+-----+
//!   | conn   | hash   | aux    | slot | index | len  | a    | spec|kind| flag | -- | payload (len) | pad |
//!   +--------+--------+--------+------+-------+------+------+-----+----+------+----+---------------+-----+
//!   every frame starts at a multiple of 8; all integers little endian
//! ```
//!
//! | kind | `a` | payload |
//! |---|---|---|
//! | `Get` | - | key |
//! | `Set` | key length | key, value; `aux` = expiry in unix ms, 0 = never |
//! | `Delete` | - | key |
//! | `Command` | number of arguments | each argument: u32 length, bytes; `spec` = command, `flag` = reply dialect |
//! | `Exec` | - | a packed [`crate::session::transaction`]; `flag` = reply dialect |
//! | `Version` | - | key |
//! | `Group` | number of keys | each key to read: u64 hash, u32 index, u32 length, bytes, padding to 8 |
//! | `Reply` | status | the reply's bytes; `aux` = the reply's number |
//!
//! A group is answered by replies of status `Values`, each for some of its keys: u32 index, u32 length (all ones: nothing there),
//! bytes, padding to 8; `aux` = their number. So many keys cost one head, and their values arrive end to end.
//!
//! Reading never trusts a length: [`Frames`] validates each head and each bound, because the same decoder serves links
//! between nodes. What is *not* here: who sends a batch where (see [`crate::mesh`]), and what a command does.

use std::ops::Range;

use rkyv::rancor::{Failure, Fallible};
use rkyv::ser::{Positional, Writer};
use rkyv::util::AlignedVec;
use rkyv::{Archive, Serialize};

/// The fixed part of a frame. `rkyv` derives the archived form that travels.
#[derive(Archive, Serialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[rkyv(derive(Debug))]
pub struct Head {
    /// Who waits for the reply: a connection or a local waiter, opaque to the receiver, which sends it back.
    pub conn: u64,
    /// Hash of the key, computed once by the sender; the owner uses it to find shard and bucket.
    pub hash: u64,
    /// Kind-specific number (expiry of a `Set`, the number of a `Reply`).
    pub aux: i64,
    /// Which reply slot of `conn` this answers; sent back as it came.
    pub slot: u32,
    /// Position inside a grouped request; sent back as it came.
    pub index: u32,
    /// Bytes of payload.
    pub len: u32,
    /// Kind-specific count (key length of a `Set`, argument count of a `Command`, status of a `Reply`).
    pub a: u32,
    /// Command, for `Command` frames: index into the command table.
    pub spec: u16,
    /// A [`Kind`] as its number.
    pub kind: u8,
    /// Kind-specific flag (the reply dialect of a `Command`).
    pub flag: u8,
    /// How many replicas must answer, where other nodes hold copies: 0 as the cluster has it, 1 one, 2 all, `0x100 + k`
    /// that many.
    pub level: u32,
}

/// Size of an archived [`Head`].
pub const HEAD_LEN: usize = 48;
const _: () = assert!(size_of::<ArchivedHead>() == HEAD_LEN && HEAD_LEN.is_multiple_of(8));

/// What a frame asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Read one key.
    Get = 1,
    /// Write one key.
    Set = 2,
    /// Delete one key.
    Delete = 3,
    /// Run a command of the command table.
    Command = 4,
    /// Run a transaction of one shard.
    Exec = 5,
    /// Answer to any of the others.
    Reply = 6,
    /// The version of one key, for WATCH.
    Version = 7,
    /// Read many keys of one core.
    Group = 8,
}

impl Kind {
    fn from_u8(n: u8) -> Option<Kind> {
        Some(match n {
            1 => Kind::Get,
            2 => Kind::Set,
            3 => Kind::Delete,
            4 => Kind::Command,
            5 => Kind::Exec,
            6 => Kind::Reply,
            7 => Kind::Version,
            8 => Kind::Group,
            _ => return None,
        })
    }
}

/// How a [`Kind::Reply`] is to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// There is nothing under that key.
    Nil = 0,
    /// The payload is a value.
    Value = 1,
    /// `aux` is an integer.
    Integer = 2,
    /// Done; nothing more to say.
    Done = 3,
    /// The payload is an error text, beginning with its prefix (`ERR`, `OOM`, ...).
    Error = 4,
    /// The payload is RESP, in the dialect that was asked for.
    Encoded = 5,
    /// The payload is values of a group.
    Values = 6,
}

impl Status {
    /// The status of that number, if it is one.
    pub fn from_u8(n: u8) -> Option<Status> {
        Some(match n {
            0 => Status::Nil,
            1 => Status::Value,
            2 => Status::Integer,
            3 => Status::Done,
            4 => Status::Error,
            5 => Status::Encoded,
            6 => Status::Values,
            _ => return None,
        })
    }
}

/// A frame that breaks the format. Nothing of the batch behind it can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The buffer ends inside a head or a payload.
    #[error("frame is cut short at byte {at}")]
    Short {
        /// Offset of the frame in its batch.
        at: usize,
    },
    /// The head's kind is not one we know: a newer or a broken sender.
    #[error("unknown frame kind {kind} at byte {at}")]
    Kind {
        /// Offset of the frame in its batch.
        at: usize,
        /// The number found.
        kind: u8,
    },
    /// A length inside the payload points outside of it.
    #[error("frame at byte {at} has a length that leaves its payload")]
    Length {
        /// Offset of the frame in its batch.
        at: usize,
    },
}

/// A buffer of frames, written at the end, handed over whole.
///
/// Cleared batches keep their allocation, so a pair of cores that talk soon stops allocating.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: AlignedVec<16>,
    /// Requests or answers; a group counts as its keys.
    count: u32,
    /// The last frame, if it is a group or values and may grow.
    open: Option<Open>,
    groups: bool,
}

/// A place between two requests of a batch: the offset of a frame, and how many of its keys lie before it if it is a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Offset of the frame.
    pub at: usize,
    /// Keys of a group that are done.
    pub keys: usize,
}

/// A frame that may grow at the end of a batch: where it begins, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Open {
    at: usize,
    conn: u64,
    slot: u32,
}

/// Where the archived head has what changes as its frame grows.
const LEN_AT: usize = std::mem::offset_of!(ArchivedHead, len);
const A_AT: usize = std::mem::offset_of!(ArchivedHead, a);
const AUX_AT: usize = std::mem::offset_of!(ArchivedHead, aux);

/// The length that stands for a key without a value.
const NOTHING: u32 = u32::MAX;
/// Bytes beyond which a group or its values go on in another frame, so that no length leaves 32 bits.
const FULL_GROUP: usize = 16 << 20;
/// Bytes in front of a key of a group, and of a value.
const KEY_HEAD: usize = 16;
const VALUE_HEAD: usize = 8;

/// Lets rkyv write a head at the end of a batch.
struct Tail<'a>(&'a mut AlignedVec<16>);

impl Fallible for Tail<'_> {
    type Error = Failure;
}
impl Positional for Tail<'_> {
    #[inline]
    fn pos(&self) -> usize {
        self.0.len()
    }
}
impl Writer<Failure> for Tail<'_> {
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Makes room for that many frames with payloads of about `payload` bytes.
    pub fn reserve(&mut self, frames: usize, payload: usize) {
        self.bytes.reserve(frames * (HEAD_LEN + payload.next_multiple_of(8)));
    }

    /// Number of requests or answers: of frames, but that each key of a group counts.
    #[inline]
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there is no frame.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes written so far, heads and padding included.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Forgets the frames and keeps the memory, unless one large batch made it larger than `keep` bytes.
    pub fn clear(&mut self, keep: usize) {
        (self.count, self.open, self.groups) = (0, None, false);
        if self.bytes.capacity() > keep {
            self.bytes = AlignedVec::new();
        } else {
            self.bytes.clear();
        }
    }

    /// A batch of the frames that another node wrote.
    ///
    /// # Errors
    /// [`FrameError`] for bytes that no batch has.
    pub fn from_bytes(bytes: &[u8]) -> Result<Batch, FrameError> {
        let mut batch = Batch::new();
        batch.bytes.extend_from_slice(bytes);
        batch.count = batch.frames().try_fold(0, |count, frame| frame.map(|_| count + 1))?;
        Ok(batch)
    }

    /// Adds a frame whose payload is `parts` end to end. `head.len` is set here.
    #[inline]
    pub fn push(&mut self, mut head: Head, kind: Kind, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        head.kind = kind as u8;
        head.len = u32::try_from(len).expect("payloads are bounded by the limits on keys, values and arguments");
        self.bytes.reserve(HEAD_LEN + len + 7);
        self.write_head(&head);
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
        self.finish(len);
    }

    /// Adds a `Command` frame: the arguments of one command, its name first.
    #[inline]
    pub fn push_command(&mut self, mut head: Head, args: &[&[u8]]) {
        let len: usize = args.iter().map(|p| 4 + p.len()).sum();
        head.kind = Kind::Command as u8;
        head.a = args.len() as u32;
        head.len = u32::try_from(len).expect("payloads are bounded by the limits on keys, values and arguments");
        self.bytes.reserve(HEAD_LEN + len + 7);
        self.write_head(&head);
        for arg in args {
            self.bytes.extend_from_slice(&(arg.len() as u32).to_le_bytes());
            self.bytes.extend_from_slice(arg);
        }
        self.finish(len);
    }

    /// Adds a `Reply` to the sender of `to`.
    #[inline]
    pub fn push_reply(&mut self, to: &Head, status: Status, aux: i64, payload: &[u8]) {
        let head =
            Head { conn: to.conn, hash: 0, aux, slot: to.slot, index: to.index, a: status as u32, ..Head::default() };
        self.push(head, Kind::Reply, &[payload]);
    }

    /// Adds a key to read, at position `head.index` of what `head.conn` and `head.slot` wait for: to the group at the end if it is
    /// theirs, or else to a new one.
    #[inline]
    pub fn push_key(&mut self, head: &Head, key: &[u8]) {
        self.bytes.reserve(HEAD_LEN + KEY_HEAD + key.len() + 7);
        let at = self.grow(head, || Head { kind: Kind::Group as u8, len: 0, a: 0, ..*head });
        self.bytes.extend_from_slice(&head.hash.to_le_bytes());
        self.bytes.extend_from_slice(&(u64::from(head.index) | (key.len() as u64) << 32).to_le_bytes());
        self.bytes.extend_from_slice(key);
        self.groups = true;
        self.grown(at, A_AT, key.len());
    }

    /// Adds an answer for one key of the group of `to`.
    #[inline]
    pub fn push_value(&mut self, to: &Head, index: u32, value: Option<&[u8]>) {
        let bytes = value.unwrap_or_default();
        self.bytes.reserve(HEAD_LEN + VALUE_HEAD + bytes.len() + 7);
        let (kind, a) = (Kind::Reply as u8, Status::Values as u32);
        let at = self.grow(to, || Head { conn: to.conn, slot: to.slot, kind, a, ..Head::default() });
        let len = value.map_or(NOTHING, |value| value.len() as u32);
        self.bytes.extend_from_slice(&(u64::from(index) | u64::from(len) << 32).to_le_bytes());
        self.bytes.extend_from_slice(bytes);
        self.grown(at, AUX_AT, bytes.len());
    }

    /// Where the frame at the end begins, if it is for the same slot and not too long already; else where a new one does.
    #[inline]
    fn grow(&mut self, of: &Head, head: impl FnOnce() -> Head) -> usize {
        let at = self.bytes.len();
        match self.open {
            Some(open) if (open.conn, open.slot) == (of.conn, of.slot) && at - open.at < FULL_GROUP => open.at,
            _ => {
                self.write_head(&head());
                self.open = Some(Open { at, conn: of.conn, slot: of.slot });
                at
            }
        }
    }

    /// Ends what was added to the frame at `at`, whose last part is `len` bytes long: padding, its length, its count.
    #[inline]
    fn grown(&mut self, at: usize, count_at: usize, len: usize) {
        self.pad(len);
        self.count += 1;
        let bytes = (self.bytes.len() - at - HEAD_LEN) as u32;
        self.bytes[at + LEN_AT..][..4].copy_from_slice(&bytes.to_le_bytes());
        let count = &mut self.bytes[at + count_at..][..4];
        let next = u32::from_le_bytes(count.try_into().expect("four bytes")) + 1;
        count.copy_from_slice(&next.to_le_bytes());
    }

    /// The requests from a mark on, with a frame for each key of a group.
    pub fn flat(self, from: Mark) -> Batch {
        if !self.groups && from == Mark::default() {
            return self;
        }
        let mut flat = Batch::new();
        let mut done = from.keys;
        for frame in Frames::from(&self.bytes, from.at) {
            let frame = frame.expect("groups are made inside a node");
            if frame.kind == Kind::Group {
                for key in frame.keys(std::mem::take(&mut done)) {
                    let key = key.expect("groups are made inside a node");
                    flat.push(Head { hash: key.hash, index: key.index, a: 0, ..frame.head }, Kind::Get, &[key.bytes]);
                }
            } else {
                flat.bytes.extend_from_slice(&self.bytes[frame.at()..frame.payload_at]);
                flat.bytes.extend_from_slice(frame.payload);
                flat.finish(frame.payload.len());
            }
        }
        flat
    }

    /// Reads the frames in order.
    #[inline]
    pub fn frames(&self) -> Frames<'_> {
        Frames::new(&self.bytes)
    }

    #[inline]
    fn write_head(&mut self, head: &Head) {
        let mut tail = Tail(&mut self.bytes);
        rkyv::api::serialize_using::<Tail<'_>, Failure>(head, &mut tail).expect("a vector takes every head");
    }

    #[inline]
    fn finish(&mut self, len: usize) {
        self.pad(len);
        self.count += 1;
        self.open = None;
    }

    #[inline]
    fn pad(&mut self, len: usize) {
        const ZEROS: [u8; 8] = [0; 8];
        self.bytes.extend_from_slice(&ZEROS[..len.wrapping_neg() & 7]);
    }
}

impl AsRef<[u8]> for Batch {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// One frame, in place.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// What it asks or answers.
    pub kind: Kind,
    /// Its head, copied out (six words).
    pub head: Head,
    /// Its payload, where the sender wrote it.
    pub payload: &'a [u8],
    /// Offset of the payload in the batch.
    pub payload_at: usize,
}

impl<'a> Frame<'a> {
    /// Its own offset in the batch.
    #[inline]
    pub fn at(&self) -> usize {
        self.payload_at - HEAD_LEN
    }

    /// The arguments of a `Command` frame, into `args` (cleared first).
    ///
    /// # Errors
    /// [`FrameError::Length`] when the lengths inside do not fill the payload exactly.
    #[inline]
    pub fn args<'v>(&self, args: &'v mut Vec<&'a [u8]>) -> Result<&'v [&'a [u8]], FrameError> {
        let bad = FrameError::Length { at: self.at() };
        args.clear();
        let mut rest = self.payload;
        for _ in 0..self.head.a {
            let (len, tail) = rest.split_first_chunk::<4>().ok_or(bad)?;
            let len = u32::from_le_bytes(*len) as usize;
            if len > tail.len() {
                return Err(bad);
            }
            let (arg, tail) = tail.split_at(len);
            args.push(arg);
            rest = tail;
        }
        if rest.is_empty() { Ok(args) } else { Err(bad) }
    }

    /// Key and value of a `Set` frame.
    ///
    /// # Errors
    /// [`FrameError::Length`] when the key is longer than the payload.
    #[inline]
    pub fn key_value(&self) -> Result<(&'a [u8], &'a [u8]), FrameError> {
        self.payload.split_at_checked(self.head.a as usize).ok_or(FrameError::Length { at: self.at() })
    }

    /// The keys of a `Group`, behind the first `skip`. A length that leaves the payload ends it with [`FrameError::Length`].
    #[inline]
    pub fn keys(&self, skip: usize) -> impl Iterator<Item = Result<GroupKey<'a>, FrameError>> + use<'a> {
        let (payload, bad) = (self.payload, FrameError::Length { at: self.at() });
        Parts { payload, at: 0, head: KEY_HEAD, bad }.skip(skip).map(move |part| {
            let (head, _, bytes) = part?;
            let hash = u64::from_le_bytes(*head.first_chunk().ok_or(bad)?);
            let index = u32::from_le_bytes(*head[8..].first_chunk().ok_or(bad)?);
            Ok(GroupKey { hash, index, bytes: bytes.unwrap_or_default() })
        })
    }

    /// The answers of a `Reply` of [`Status::Values`]: the index of each key, and where in the payload its value lies. A length that
    /// leaves the payload ends it with [`FrameError::Length`].
    #[inline]
    pub fn values(&self) -> impl Iterator<Item = Result<(u32, Option<Range<usize>>), FrameError>> + use<'a> {
        let (payload, bad) = (self.payload, FrameError::Length { at: self.at() });
        Parts { payload, at: 0, head: VALUE_HEAD, bad }.map(move |part| {
            let (head, at, bytes) = part?;
            let index = u32::from_le_bytes(*head.first_chunk().ok_or(bad)?);
            Ok((index, bytes.map(|bytes| at..at + bytes.len())))
        })
    }

    /// Status of a `Reply` frame; an unknown number reads as an error.
    #[inline]
    pub fn status(&self) -> Status {
        u8::try_from(self.head.a).ok().and_then(Status::from_u8).unwrap_or(Status::Error)
    }
}

/// A key of a [`Kind::Group`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupKey<'a> {
    /// Its hash.
    pub hash: u64,
    /// Its position in what is waited for; sent back as it came.
    pub index: u32,
    /// The key, where the sender wrote it.
    pub bytes: &'a [u8],
}

/// The parts of a group or of its values: each a head whose last four bytes are a length, that many bytes, and padding.
struct Parts<'a> {
    payload: &'a [u8],
    at: usize,
    head: usize,
    bad: FrameError,
}

impl<'a> Iterator for Parts<'a> {
    /// Head, where the bytes begin, the bytes; none for the length that means nothing.
    type Item = Result<(&'a [u8], usize, Option<&'a [u8]>), FrameError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.payload.get(self.at..).filter(|rest| !rest.is_empty())?;
        let from = self.at + self.head;
        self.at = self.payload.len();
        let Some((head, rest)) = rest.split_at_checked(self.head) else { return Some(Err(self.bad)) };
        let len = u32::from_le_bytes(*head.last_chunk().expect("a head is longer than four bytes"));
        if len == NOTHING {
            self.at = from;
            return Some(Ok((head, from, None)));
        }
        let Some(bytes) = rest.get(..len as usize) else { return Some(Err(self.bad)) };
        self.at = from + (len as usize).next_multiple_of(8);
        Some(Ok((head, from, Some(bytes))))
    }
}

/// Iterator over the frames of a buffer. Stops after the first error.
#[derive(Clone, Debug)]
pub struct Frames<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Frames<'a> {
    /// Reads `bytes`, which must start at an address that is a multiple of eight (a [`Batch`] does).
    pub fn new(bytes: &'a [u8]) -> Frames<'a> {
        Frames { bytes, at: 0 }
    }

    /// Goes on behind the frames that another reading of the same bytes took.
    pub fn from(bytes: &'a [u8], position: usize) -> Frames<'a> {
        Frames { bytes, at: position }
    }

    #[inline]
    fn read(&mut self) -> Result<Frame<'a>, FrameError> {
        let at = self.at;
        self.at = self.bytes.len();
        let head_end = at + HEAD_LEN;
        let raw = self.bytes.get(at..head_end).ok_or(FrameError::Short { at })?;
        let head = rkyv::access::<ArchivedHead, Failure>(raw).map_err(|_| FrameError::Short { at })?;
        let head = Head {
            conn: head.conn.to_native(),
            hash: head.hash.to_native(),
            aux: head.aux.to_native(),
            slot: head.slot.to_native(),
            index: head.index.to_native(),
            len: head.len.to_native(),
            a: head.a.to_native(),
            spec: head.spec.to_native(),
            kind: head.kind,
            flag: head.flag,
            level: head.level.to_native(),
        };
        let kind = Kind::from_u8(head.kind).ok_or(FrameError::Kind { at, kind: head.kind })?;
        let len = head.len as usize;
        let payload = self.bytes.get(head_end..).and_then(|b| b.get(..len)).ok_or(FrameError::Short { at })?;
        let next = head_end + len + (len.wrapping_neg() & 7);
        if next > self.bytes.len() {
            return Err(FrameError::Short { at });
        }
        self.at = next;
        Ok(Frame { kind, head, payload, payload_at: head_end })
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Frame<'a>, FrameError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.bytes.len() { None } else { Some(self.read()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_come_out_as_they_went_in() {
        let mut batch = Batch::new();
        batch.push(Head { conn: 7, hash: 9, slot: 3, ..Head::default() }, Kind::Get, &[b"key"]);
        batch.push(Head { a: 3, aux: -5, ..Head::default() }, Kind::Set, &[b"key", b"value"]);
        batch.push_command(Head { spec: 11, flag: 3, ..Head::default() }, &[b"APPEND", b"k", b""]);
        let asked = batch.frames().next().unwrap().unwrap().head;
        batch.push_reply(&asked, Status::Integer, 42, b"");

        assert_eq!(batch.len(), 4);
        let frames: Vec<_> = batch.frames().map(|f| f.unwrap()).collect();
        assert_eq!((frames[0].kind, frames[0].payload, frames[0].head.conn), (Kind::Get, &b"key"[..], 7));
        assert_eq!(frames[1].key_value().unwrap(), (&b"key"[..], &b"value"[..]));
        assert_eq!(frames[1].head.aux, -5);
        let mut args = Vec::new();
        assert_eq!(frames[2].args(&mut args).unwrap(), [&b"APPEND"[..], b"k", b""]);
        assert_eq!((frames[3].status(), frames[3].head.aux, frames[3].head.slot), (Status::Integer, 42, 3));
        assert!(frames.iter().all(|f| f.payload_at % 8 == 0));
    }

    /// Keys and indices that the groups of a batch ask for.
    fn asked(batch: &Batch) -> Vec<(u64, u32, Vec<u8>)> {
        let frames = batch.frames().map(Result::unwrap).filter(|frame| frame.kind == Kind::Group);
        let keys = frames.flat_map(|frame| frame.keys(0).map(Result::unwrap));
        keys.map(|key| (key.hash, key.index, key.bytes.to_vec())).collect()
    }

    #[test]
    fn a_group_is_one_frame_until_another_slot_or_request_comes() {
        let mut batch = Batch::new();
        let head =
            |slot, index| Head { conn: 7, hash: 100 + u64::from(index), slot, index, level: 2, ..Head::default() };
        let keys: [(u32, &[u8]); 5] = [(1, b"a"), (1, b""), (1, b"sixteen bytes key"), (2, b"b"), (2, b"c")];
        for (index, (slot, key)) in keys.iter().enumerate() {
            batch.push_key(&head(*slot, index as u32), key);
        }
        batch.push(head(2, 5), Kind::Get, &[b"d"]);
        batch.push_key(&head(2, 6), b"e");
        assert_eq!(batch.len(), 7, "each key counts");
        let frames: Vec<_> = batch.frames().map(Result::unwrap).collect();
        let seen: Vec<_> = frames.iter().map(|f| (f.kind, f.head.slot, f.head.a, f.head.level)).collect();
        let group = Kind::Group;
        assert_eq!(seen, [(group, 1, 3, 2), (group, 2, 2, 2), (Kind::Get, 2, 0, 2), (group, 2, 1, 2)]);
        let second: Vec<_> = frames[0].keys(1).map(|key| key.unwrap().bytes).collect();
        assert_eq!(second, [&b""[..], b"sixteen bytes key"]);

        let middle = Mark { at: frames[0].at(), keys: 2 };
        let (whole, rest) = (asked(&batch), asked(&batch_of(&batch).flat(middle)));
        assert_eq!(whole.len(), 6);
        assert!(rest.is_empty(), "no group is left");
        let flat = batch_of(&batch).flat(middle);
        let keys: Vec<_> = flat.frames().map(|f| f.unwrap()).map(|f| (f.kind, f.head.index, f.head.hash)).collect();
        assert_eq!(keys, [2, 3, 4, 5, 6].map(|index| (Kind::Get, index, 100 + u64::from(index))));
        assert_eq!(flat.len(), 5);
    }

    fn batch_of(batch: &Batch) -> Batch {
        Batch { groups: true, ..Batch::from_bytes(batch.bytes()).unwrap() }
    }

    #[test]
    fn values_of_a_group_say_which_keys_have_none() {
        let mut batch = Batch::new();
        let to = Head { conn: 7, slot: 3, ..Head::default() };
        let values: [(u32, Option<&[u8]>); 4] = [(5, Some(b"five")), (2, None), (9, Some(b"")), (1, Some(&[7; 100]))];
        values.iter().for_each(|&(index, value)| batch.push_value(&to, index, value));
        let frames: Vec<_> = batch.frames().map(Result::unwrap).collect();
        assert_eq!((frames.len(), batch.len()), (1, 4));
        assert_eq!((frames[0].status(), frames[0].head.aux, frames[0].head.slot), (Status::Values, 4, 3));
        let payload = frames[0].payload;
        let read = frames[0].values().map(Result::unwrap).map(|(index, place)| (index, place.map(|at| &payload[at])));
        assert_eq!(read.collect::<Vec<_>>(), values);
    }

    #[test]
    fn a_long_group_goes_on_in_another_frame() {
        let mut batch = Batch::new();
        let large = vec![0; FULL_GROUP / 2];
        (0..5).for_each(|index| batch.push_value(&Head::default(), index, Some(&large)));
        let counts: Vec<_> = batch.frames().map(|frame| frame.unwrap().head.aux).collect();
        assert_eq!(counts, [2, 2, 1]);
    }

    #[test]
    fn a_cut_batch_is_refused_at_every_byte_but_frame_ends() {
        let mut batch = Batch::new();
        batch.push_command(Head::default(), &[b"SET", b"key", b"value"]);
        let whole = batch.bytes().len();
        for cut in 1..whole {
            assert!(Batch::from_bytes(&batch.bytes()[..cut]).is_err(), "cut at {cut}");
        }
        assert_eq!(Batch::from_bytes(batch.bytes()).unwrap().len(), 1);
    }

    #[test]
    fn a_cleared_batch_gives_back_what_one_huge_value_took() {
        let mut batch = Batch::new();
        batch.push(Head::default(), Kind::Get, &[&vec![0; 1 << 20]]);
        batch.clear(64 << 10);
        assert!(batch.is_empty() && batch.bytes.capacity() <= 64 << 10);
    }

    proptest! {
        /// Whatever bytes arrive, reading ends, and never outside the buffer.
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut aligned = AlignedVec::<16>::new();
            aligned.extend_from_slice(&bytes);
            let mut args = Vec::new();
            for frame in Frames::new(&aligned).map_while(Result::ok) {
                let _ = frame.args(&mut args);
                let _ = frame.key_value();
                let _ = frame.keys(0).map_while(Result::ok).count();
                for (_, place) in frame.values().map_while(Result::ok) {
                    prop_assert!(place.is_none_or(|place| place.end <= frame.payload.len()));
                }
                prop_assert!(frame.payload_at + frame.payload.len() <= bytes.len());
            }
        }
    }
}
