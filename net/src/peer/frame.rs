//! Frames between nodes: where one ends in a stream of bytes, and where its body may be read in place.
//!
//! ```text
//!   0       4       8       12      16
//!   +-------+-------+-------+-------+--------------+-----------------+
//!   | len   | kind  | seq   | check | body (len)   | zeros up to 16  |
//!   +-------+-------+-------+-------+--------------+-----------------+
//!   all integers little endian; every frame is a multiple of 16 bytes
//! ```
//!
//! Contract:
//!
//! - A body is handed out at an address that is a multiple of 16, so that archived heads can be read where they lie. It is
//!   the received memory itself when a frame came in one piece at such an address, and a copy otherwise.
//! - Memory grows as bytes arrive, never by what a head announces.
//! - `check` covers the head alone and `seq` counts the frames of a direction: a stream that has lost its step, or never
//!   was one of ours, is noticed at the next head. Bodies are protected by TCP's checksum only.
//! - After an error a reader reads no more.
//!
//! Pure: bytes in, frames out. Which kinds come when is decided in `super`.

use rkyv::util::AlignedVec;

/// Bytes of a head, and what every frame is a multiple of.
pub const ALIGN: usize = 16;
/// A reader keeps its memory from one frame to the next up to this size.
const KEEP: usize = 256 << 10;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// The dialer says who it is and whom it wants.
    Hello = 1,
    /// The answer: who is there.
    Welcome = 2,
    /// The other answer: why not.
    Refuse = 3,
    /// Nothing, to be heard.
    Ping = 4,
    /// What the owner of the link sends.
    Message = 5,
}

impl Kind {
    fn from_u32(n: u32) -> Option<Kind> {
        Some(match n {
            1 => Kind::Hello,
            2 => Kind::Welcome,
            3 => Kind::Refuse,
            4 => Kind::Ping,
            5 => Kind::Message,
            _ => return None,
        })
    }
}

/// How a peer broke the format. The link cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The head is none: another protocol, or bytes out of step.
    #[error("what came is no frame")]
    Head,
    /// A frame is missing or came twice.
    #[error("frame {found} came where frame {expected} was due")]
    Sequence {
        /// The number that was due.
        expected: u32,
        /// The number that came.
        found: u32,
    },
    /// The kind is unknown here.
    #[error("a frame of unknown kind {0}")]
    Kind(u32),
    /// More than this side takes.
    #[error("a frame of {len} bytes where {max} are the most")]
    TooLong {
        /// Bytes announced.
        len: usize,
        /// The bound of this side.
        max: usize,
    },
    /// The frame is not one of those that may come now.
    #[error("a {0:?} that was not due")]
    NotNow(Kind),
    /// A dialer spoke on before it was welcome.
    #[error("bytes before the welcome")]
    Early,
    /// The body is not what its kind says.
    #[error("a {0:?} that says nothing valid")]
    Body(Kind),
}

fn check(len: u32, kind: u32, seq: u32) -> u32 {
    let mut x = u64::from(len) << 32 | u64::from(seq);
    x = (x ^ u64::from(kind) ^ 0x6b76_6c69_6e6b_3031).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 29;
    (x.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) as u32
}

/// Bytes that a frame with such a body takes.
pub const fn frame_len(body: usize) -> usize {
    ALIGN + body.next_multiple_of(ALIGN)
}

/// Numbers the frames of one direction and appends them to a buffer.
#[derive(Clone, Debug, Default)]
pub struct FrameWriter {
    seq: u32,
}

impl FrameWriter {
    /// Appends a frame whose body is `parts` end to end.
    ///
    /// # Panics
    /// When the body has 4 GiB or more, which bounds far below exclude.
    pub fn push(&mut self, out: &mut Vec<u8>, kind: Kind, parts: &[&[u8]]) {
        const ZEROS: [u8; ALIGN] = [0; ALIGN];
        let body: usize = parts.iter().map(|part| part.len()).sum();
        let len = u32::try_from(body).expect("bodies are bounded by the configuration");
        out.reserve(frame_len(body));
        for word in [len, kind as u32, self.seq, check(len, kind as u32, self.seq)] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        for part in parts {
            out.extend_from_slice(part);
        }
        out.extend_from_slice(&ZEROS[..body.wrapping_neg() & (ALIGN - 1)]);
        self.seq = self.seq.wrapping_add(1);
    }
}

/// A validated head.
#[derive(Clone, Copy, Debug)]
struct Head {
    kind: Kind,
    len: usize,
}

/// Cuts one direction of a link into frames.
#[derive(Debug, Default)]
pub struct FrameReader {
    /// The beginning of a frame, or a whole one that was handed out by the last call.
    held: AlignedVec<16>,
    /// The head at the start of `held`, once it is complete.
    head: Option<Head>,
    /// `held` was handed out.
    taken: bool,
    seq: u32,
    max: usize,
    broken: Option<FrameError>,
}

impl FrameReader {
    /// A reader that takes bodies of up to `max` bytes.
    pub fn new(max: usize) -> FrameReader {
        FrameReader { max, ..FrameReader::default() }
    }

    /// Takes bodies of up to `max` bytes from the next head on.
    pub fn set_max(&mut self, max: usize) {
        self.max = max;
    }

    /// Goes on behind the first frame of the stream, which another reader took.
    pub(super) fn skip_one(&mut self) {
        self.seq = self.seq.wrapping_add(1);
    }

    /// Bytes of a frame that is not complete.
    pub fn held(&self) -> usize {
        if self.taken { 0 } else { self.held.len() }
    }

    /// The next frame, from what is held and from the front of `bytes`, which is cut accordingly. `None`: all of `bytes`
    /// was taken, and no frame is complete.
    ///
    /// # Errors
    /// What the peer did wrong; the same at every later call.
    pub fn next<'a, 'b: 'a>(&'a mut self, bytes: &mut &'b [u8]) -> Result<Option<(Kind, &'a [u8])>, FrameError> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        let step = self.step(bytes);
        if let Err(error) = step {
            self.broken = Some(error);
        }
        match step? {
            Found::Nothing => Ok(None),
            Found::InPlace(head, body) => Ok(Some((head.kind, body))),
            Found::Held(head) => Ok(Some((head.kind, &self.held[ALIGN..ALIGN + head.len]))),
        }
    }

    fn step<'a>(&mut self, bytes: &mut &'a [u8]) -> Result<Found<'a>, FrameError> {
        if self.taken {
            self.taken = false;
            if self.held.capacity() > KEEP {
                self.held = AlignedVec::new();
            } else {
                self.held.clear();
            }
        }
        if self.held.is_empty() && bytes.len() >= ALIGN && bytes.as_ptr().addr().is_multiple_of(ALIGN) {
            let head = self.read_head(bytes)?;
            if let Some((frame, rest)) = bytes.split_at_checked(frame_len(head.len)) {
                *bytes = rest;
                self.seq = self.seq.wrapping_add(1);
                return Ok(Found::InPlace(head, &frame[ALIGN..ALIGN + head.len]));
            }
        }
        loop {
            let whole = match self.head {
                Some(head) => frame_len(head.len),
                None => ALIGN,
            };
            let (more, rest) = bytes.split_at(bytes.len().min(whole - self.held.len()));
            self.held.extend_from_slice(more);
            *bytes = rest;
            if self.held.len() < whole {
                return Ok(Found::Nothing);
            }
            match self.head.take() {
                Some(head) => {
                    self.taken = true;
                    self.seq = self.seq.wrapping_add(1);
                    return Ok(Found::Held(head));
                }
                None => self.head = Some(self.read_head(&self.held)?),
            }
        }
    }

    fn read_head(&self, bytes: &[u8]) -> Result<Head, FrameError> {
        let word = |at: usize| {
            let word = bytes[at..].first_chunk().expect("the caller has a whole head");
            u32::from_le_bytes(*word)
        };
        let (len, kind, seq) = (word(0), word(4), word(8));
        if word(12) != check(len, kind, seq) {
            return Err(FrameError::Head);
        }
        if seq != self.seq {
            return Err(FrameError::Sequence { expected: self.seq, found: seq });
        }
        let kind = Kind::from_u32(kind).ok_or(FrameError::Kind(kind))?;
        let len = len as usize;
        if len > self.max {
            return Err(FrameError::TooLong { len, max: self.max });
        }
        Ok(Head { kind, len })
    }
}

/// Where a frame was found.
enum Found<'a> {
    Nothing,
    InPlace(Head, &'a [u8]),
    Held(Head),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drain(reader: &mut FrameReader, mut bytes: &[u8], into: &mut Vec<Vec<u8>>) -> Result<(), FrameError> {
        while let Some((kind, body)) = reader.next(&mut bytes)? {
            assert_eq!(kind, Kind::Message);
            assert!(body.as_ptr().addr().is_multiple_of(ALIGN), "bodies are read in place");
            into.push(body.to_vec());
        }
        assert!(bytes.is_empty(), "everything is taken");
        Ok(())
    }

    #[test]
    fn a_frame_in_one_aligned_piece_is_not_copied() {
        let mut out = Vec::new();
        FrameWriter::default().push(&mut out, Kind::Message, &[b"body"]);
        let mut aligned = AlignedVec::<16>::new();
        aligned.extend_from_slice(&out);
        let mut reader = FrameReader::new(100);
        let mut bytes: &[u8] = &aligned;
        let (_, body) = reader.next(&mut bytes).unwrap().unwrap();
        assert_eq!((body, body.as_ptr()), (&b"body"[..], aligned[ALIGN..].as_ptr()));
    }

    #[test]
    fn an_announced_length_takes_no_memory() {
        let mut out = Vec::new();
        FrameWriter::default().push(&mut out, Kind::Message, &[&vec![0; 8 << 20]]);
        let mut reader = FrameReader::new(64 << 20);
        assert_eq!(reader.next(&mut &out[..100]), Ok(None));
        assert!(reader.held() == 100 && reader.held.capacity() < 1000);
    }

    #[test]
    fn what_a_peer_does_wrong_is_named_and_remembered() {
        let frame = |kind: u32, len: u32, seq: u32| {
            let words = [len, kind, seq, check(len, kind, seq)];
            words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>()
        };
        let cases = [
            (b"GET / HTTP/1.1\r\n".to_vec(), FrameError::Head),
            (frame(5, 101, 0), FrameError::TooLong { len: 101, max: 100 }),
            (frame(5, 0, 1), FrameError::Sequence { expected: 0, found: 1 }),
            (frame(77, 0, 0), FrameError::Kind(77)),
        ];
        for (bytes, error) in cases {
            let mut reader = FrameReader::new(100);
            assert_eq!(reader.next(&mut &bytes[..]), Err(error));
            assert_eq!(reader.next(&mut &frame(5, 0, 0)[..]), Err(error), "it reads no more");
        }
    }

    proptest! {
        #[test]
        fn bodies_arrive_whole_and_in_order_however_the_bytes_are_split(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..100), 0..20),
            cuts in proptest::collection::vec(1usize..70, 1..20),
        ) {
            let (mut out, mut writer) = (Vec::new(), FrameWriter::default());
            for body in &bodies {
                let (left, right) = body.split_at(body.len() / 2);
                writer.push(&mut out, Kind::Message, &[left, right]);
            }
            let (mut reader, mut got, mut rest) = (FrameReader::new(100), Vec::new(), &out[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, more) = rest.split_at((*cut).min(rest.len()));
                drain(&mut reader, piece, &mut got).unwrap();
                rest = more;
            }
            prop_assert_eq!(got, bodies);
            prop_assert_eq!(reader.held(), 0);
        }

        #[test]
        fn a_changed_head_is_refused(at in 0usize..ALIGN, bit in 0u8..8) {
            let mut out = Vec::new();
            FrameWriter::default().push(&mut out, Kind::Message, &[b"some body"]);
            out[at] ^= 1 << bit;
            prop_assert!(FrameReader::new(1000).next(&mut &out[..]).is_err());
        }

        #[test]
        fn garbage_never_panics(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..10)) {
            let mut reader = FrameReader::new(1000);
            for piece in &pieces {
                let mut bytes = &piece[..];
                while let Ok(Some(_)) = reader.next(&mut bytes) {}
                prop_assert!(reader.held() <= frame_len(1000));
            }
        }
    }
}
