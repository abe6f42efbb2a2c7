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
//! | `Reply` | status | the reply's bytes; `aux` = the reply's number |
//!
//! Reading never trusts a length: [`Frames`] validates each head and each bound, because the same decoder serves links
//! between nodes. What is *not* here: who sends a batch where (see [`crate::mesh`]), and what a command does.

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
    frames: u32,
}

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

    /// Number of frames.
    #[inline]
    pub fn len(&self) -> usize {
        self.frames as usize
    }

    /// Whether there is no frame.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// Bytes written so far, heads and padding included.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Forgets the frames and keeps the memory, unless one large batch made it larger than `keep` bytes.
    pub fn clear(&mut self, keep: usize) {
        self.frames = 0;
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
        let frames = batch.frames().try_fold(0, |count, frame| frame.map(|_| count + 1))?;
        batch.frames = frames;
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
        const ZEROS: [u8; 8] = [0; 8];
        self.bytes.extend_from_slice(&ZEROS[..len.wrapping_neg() & 7]);
        self.frames += 1;
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

    /// Status of a `Reply` frame; an unknown number reads as an error.
    #[inline]
    pub fn status(&self) -> Status {
        u8::try_from(self.head.a).ok().and_then(Status::from_u8).unwrap_or(Status::Error)
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
                prop_assert!(frame.payload_at + frame.payload.len() <= bytes.len());
            }
        }
    }
}
