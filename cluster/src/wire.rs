//! What nodes say to each other about shards: a fixed head and a payload, read in place.
//!
//! ```text
//!   0    8      16    24   32       40   48     50    52    53    54       56      60        64
//!   +----+------+-----+----+--------+----+------+-----+-----+-----+--------+-------+---------+ - - - +- - - - +
//!   | op | epoch| hash| hlc| expires| aux| shard| node| kind| flag| key_len|  len  | left_ms |  key  |  rest  |
//!   +----+------+-----+----+--------+----+------+-----+-----+-----+--------+-------+---------+ - - - +- - - - +
//! ```
//!
//! The head is an rkyv archive; the payload is bytes whose meaning follows from the kind. [`Message::read`] checks the whole
//! message once and lends its parts; nothing is copied. Numbers are little-endian on every machine.
//!
//! | message | asks | answered by |
//! |---|---|---|
//! | [`Message::Write`] | store this entry if it is newer | `Wrote`, `Refused` |
//! | [`Message::Read`] | what is stored under a key, or its version only | `Found`, `Refused` |
//! | [`Message::Order`] | run this command as the shard's orderer | `Ordered`, `Refused` |
//! | [`Message::Digest`] | the digest of a shard | `Digested`, `Refused` |
//! | [`Message::List`] | hashes and versions of some leaves | `Listed`, `Refused` |
//! | [`Message::Fetch`] | the entries of these hashes | `Entries`, `Refused` |
//! | [`Message::Stream`] | all entries from a place on | `Entries`, `Refused` |
//! | [`Message::Fence`] | refuse absent entries up to this version, and your digest up to it | `Digested`, `Refused` |
//! | [`Message::Purge`] | drop tombstones up to this version | `Wrote`, `Refused` |
//!
//! Every question names the shard epoch it was asked in. `op` is the asker's and comes back with the answer.
//!
//! Not here: the control plane, whose messages are rare ([`crate::control`]), and how bytes travel.

use gridkv_engine::Millis;
use gridkv_engine::digest::{Digest, LEAVES};
use gridkv_engine::hash::{KeyHash, ShardId};
use gridkv_engine::hlc::{Hlc, Version};
use gridkv_engine::record::{Entry, MAX_VALUE_LEN};
use rkyv::rancor::Error as Failure;
use rkyv::{Archive, Serialize};

/// The fixed part of a message; see the drawing above.
#[derive(Archive, Serialize, Clone, Copy, Debug, Default)]
struct Head {
    op: u64,
    epoch: u64,
    hash: u64,
    hlc: u64,
    expires: u64,
    aux: u64,
    shard: u16,
    node: u16,
    kind: u8,
    flag: u8,
    key_len: u16,
    len: u32,
    left_ms: u32,
}

/// Bytes of a head.
pub const HEAD_LEN: usize = 64;
const _: () = assert!(size_of::<ArchivedHead>() == HEAD_LEN);

/// Bytes of one item of a [`Message::Listed`].
const ITEM: usize = 24;

/// An entry that a message carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored<'a> {
    /// Hash of its key.
    pub hash: KeyHash,
    /// The entry; without its value when only the version was asked for.
    pub entry: Entry<'a>,
}

/// Why a replica did not do what it was asked. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Why {
    /// The shard epoch of the question is older than the replica's.
    Stale = 1,
    /// The shard epoch of the question is newer than what the replica has adopted.
    Behind = 2,
    /// The replica does not hold everything yet.
    Filling = 3,
    /// It holds no copy of the shard.
    NotHere = 4,
    /// Its memory is full.
    Full = 5,
    /// The version lies too far in the future: a clock is wrong.
    Ahead = 6,
    /// The entry is absent and older than what may still appear.
    BelowFloor = 7,
    /// It has too much to do.
    Busy = 8,
    /// Something failed inside.
    Broken = 9,
}

impl Why {
    fn from_u8(n: u8) -> Option<Why> {
        const ALL: [Why; 9] = [
            Why::Stale,
            Why::Behind,
            Why::Filling,
            Why::NotHere,
            Why::Full,
            Why::Ahead,
            Why::BelowFloor,
            Why::Busy,
            Why::Broken,
        ];
        ALL.into_iter().find(|why| *why as u8 == n)
    }
}

/// A key's hash and version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    /// Hash of the key.
    pub hash: KeyHash,
    /// Its version.
    pub version: Version,
}

/// Items as they travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Items<'a>(&'a [u8]);

impl<'a> Items<'a> {
    /// The items, in hash order.
    pub fn iter(self) -> impl ExactSizeIterator<Item = Item> + 'a {
        self.0.as_chunks::<ITEM>().0.iter().map(|bytes| {
            let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
            Item { hash: KeyHash(word(0)), version: Version { hlc: Hlc(word(8)), node: word(16) as u16 } }
        })
    }
}

/// Hashes as they travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashes<'a>(&'a [u8]);

impl<'a> Hashes<'a> {
    /// The hashes, in the order of the asker.
    pub fn iter(self) -> impl ExactSizeIterator<Item = KeyHash> + 'a {
        self.0.as_chunks::<8>().0.iter().map(|bytes| KeyHash(u64::from_le_bytes(*bytes)))
    }
}

/// Entries as they travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed<'a>(&'a [u8]);

/// Bytes before key and value of a packed entry: hash, hlc, expiry, value length, key length, node, tombstone, padding.
const PACKED: usize = 40;

impl<'a> Packed<'a> {
    /// The entries, up to the first that is malformed (none is, once [`Message::read`] has looked).
    pub fn iter(self) -> impl Iterator<Item = Stored<'a>> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (stored, tail) = unpack(rest)?;
            rest = tail;
            Some(stored)
        })
    }

    /// Bytes of all of them.
    pub fn bytes(self) -> usize {
        self.0.len()
    }

    fn is_whole(self) -> bool {
        let mut rest = self.0;
        while !rest.is_empty() {
            match unpack(rest) {
                Some((_, tail)) => rest = tail,
                None => return false,
            }
        }
        true
    }
}

fn unpack(bytes: &[u8]) -> Option<(Stored<'_>, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<PACKED>()?;
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    let (value_len, key_len) = ((word(24) & 0xffff_ffff) as usize, (word(24) >> 32 & 0xffff) as usize);
    let (key, rest) = rest.split_at_checked(key_len)?;
    let (value, rest) = rest.split_at_checked(value_len)?;
    let version = Version { hlc: Hlc(word(8)), node: (word(24) >> 48) as u16 };
    let entry = Entry { key, value, version, expires_at: word(16), tombstone: word(32) != 0 };
    Some((Stored { hash: KeyHash(word(0)), entry }, rest))
}

/// Adds an entry to the payload of a [`Message::Entries`].
pub fn pack(out: &mut Vec<u8>, hash: KeyHash, entry: &Entry<'_>) {
    let lens = entry.value.len() as u64 | (entry.key.len() as u64) << 32 | u64::from(entry.version.node) << 48;
    for word in [hash.0, entry.version.hlc.0, entry.expires_at, lens, u64::from(entry.tombstone)] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(entry.key);
    out.extend_from_slice(entry.value);
}

/// Adds an item to the payload of a [`Message::Listed`].
pub fn pack_item(out: &mut Vec<u8>, item: Item) {
    for word in [item.hash.0, item.version.hlc.0, u64::from(item.version.node)] {
        out.extend_from_slice(&word.to_le_bytes());
    }
}

/// A question about one shard: who asks, under which epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The asker's number for it.
    pub op: u64,
    /// The shard.
    pub shard: ShardId,
    /// The shard epoch it is asked in.
    pub epoch: u64,
    /// Milliseconds that are left for the answer; 0 = no deadline.
    pub left_ms: u32,
}

/// A message; see the table above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Store this entry if it is newer than what is there.
    Write(Ask, Stored<'a>),
    /// The replica holds that version, or a newer one.
    Wrote(Ask),
    /// What is stored under this key? With its value, or its version only.
    Read(Ask, KeyHash, &'a [u8], bool),
    /// That is stored; `None` when nothing is. The key is left out, and the value unless it was asked for.
    Found(Ask, Option<Stored<'a>>, bool),
    /// Run this request as the orderer of the shard. What the bytes mean is between the drivers.
    Order(Ask, KeyHash, &'a [u8]),
    /// What came of it.
    Ordered(Ask, &'a [u8]),
    /// Nothing was done. `Ask::epoch` is the refusing replica's.
    Refused(Ask, Why),
    /// What is your digest?
    Digest(Ask),
    /// The digest, and the floor: see [`gridkv_engine::store::Store::tombstone_floor`].
    Digested(Ask, Digest, Version),
    /// Hashes and versions of the leaves in the mask, from a place on.
    List(Ask, KeyHash, u16),
    /// They are these; go on from there, if it is not the end.
    Listed(Ask, Option<KeyHash>, Items<'a>),
    /// The entries of these hashes.
    Fetch(Ask, Hashes<'a>),
    /// All entries from a place on.
    Stream(Ask, KeyHash),
    /// Entries; go on from there, if it is not the end.
    Entries(Ask, Option<KeyHash>, Packed<'a>),
    /// What is your digest up to this version? When the flag is set: from now on refuse entries up to it unless present.
    Fence(Ask, Version, bool),
    /// Drop tombstones up to this version.
    Purge(Ask, Version),
}

/// A message that breaks the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It ends before its time, or goes on after it.
    #[error("a message of {len} bytes does not fit its own lengths")]
    Length {
        /// Bytes received.
        len: usize,
    },
    /// Nobody knows what it asks.
    #[error("unknown message kind {0}: a newer or a broken sender")]
    Kind(u8),
    /// A part of it means nothing.
    #[error("a message of kind {0} with a field that means nothing")]
    Field(u8),
}

const WHOLE: u8 = 1;
const TOMBSTONE: u8 = 2;
const PRESENT: u8 = 4;
const MORE: u8 = 8;

impl<'a> Message<'a> {
    /// Who asks what, or is answered.
    pub fn ask(&self) -> Ask {
        match *self {
            Message::Write(ask, ..)
            | Message::Wrote(ask)
            | Message::Read(ask, ..)
            | Message::Found(ask, ..)
            | Message::Order(ask, ..)
            | Message::Ordered(ask, _)
            | Message::Refused(ask, _)
            | Message::Digest(ask)
            | Message::Digested(ask, ..)
            | Message::List(ask, ..)
            | Message::Listed(ask, ..)
            | Message::Fetch(ask, _)
            | Message::Stream(ask, _)
            | Message::Entries(ask, ..)
            | Message::Fence(ask, ..)
            | Message::Purge(ask, _) => ask,
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Message::Write(..) => 1,
            Message::Wrote(_) => 2,
            Message::Read(..) => 3,
            Message::Found(..) => 4,
            Message::Order(..) => 5,
            Message::Ordered(..) => 6,
            Message::Refused(..) => 7,
            Message::Digest(_) => 8,
            Message::Digested(..) => 9,
            Message::List(..) => 10,
            Message::Listed(..) => 11,
            Message::Fetch(..) => 12,
            Message::Stream(..) => 13,
            Message::Entries(..) => 14,
            Message::Fence(..) => 15,
            Message::Purge(..) => 16,
        }
    }

    /// Appends the message to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        let ask = self.ask();
        let mut head = Head {
            op: ask.op,
            epoch: ask.epoch,
            shard: ask.shard.0,
            left_ms: ask.left_ms,
            kind: self.kind(),
            ..Head::default()
        };
        let mut digest = [0; 8 * (LEAVES + 1)];
        let (key, rest): (&[u8], &[u8]) = match *self {
            Message::Write(_, stored) => {
                head.stored(&stored);
                (stored.entry.key, stored.entry.value)
            }
            Message::Wrote(_) | Message::Digest(_) => (&[], &[]),
            Message::Read(_, hash, key, whole) => {
                (head.hash, head.flag) = (hash.0, if whole { WHOLE } else { 0 });
                (key, &[])
            }
            Message::Found(_, None, whole) => {
                head.flag = if whole { WHOLE } else { 0 };
                (&[], &[])
            }
            Message::Found(_, Some(stored), whole) => {
                head.stored(&stored);
                head.flag |= if whole { PRESENT | WHOLE } else { PRESENT };
                (&[], stored.entry.value)
            }
            Message::Order(_, hash, bytes) => {
                head.hash = hash.0;
                (&[], bytes)
            }
            Message::Ordered(_, bytes) => (&[], bytes),
            Message::Refused(_, why) => {
                head.flag = why as u8;
                (&[], &[])
            }
            Message::Digested(_, value, floor) => {
                (head.hlc, head.node) = (floor.hlc.0, floor.node);
                let words = std::iter::once(value.count).chain(value.leaves);
                digest.as_chunks_mut::<8>().0.iter_mut().zip(words).for_each(|(to, word)| *to = word.to_le_bytes());
                (&[], &digest)
            }
            Message::List(_, from, leaves) => {
                (head.hash, head.aux) = (from.0, u64::from(leaves));
                (&[], &[])
            }
            Message::Listed(_, next, items) => {
                head.next(next);
                (&[], items.0)
            }
            Message::Fetch(_, hashes) => (&[], hashes.0),
            Message::Stream(_, from) => {
                head.hash = from.0;
                (&[], &[])
            }
            Message::Entries(_, next, packed) => {
                head.next(next);
                (&[], packed.0)
            }
            Message::Fence(_, version, _) | Message::Purge(_, version) => {
                head.flag = if matches!(self, Message::Fence(.., true)) { WHOLE } else { 0 };
                (head.hlc, head.node) = (version.hlc.0, version.node);
                (&[], &[])
            }
        };
        head.key_len = key.len() as u16;
        head.len = (key.len() + rest.len()) as u32;
        out.reserve(HEAD_LEN + key.len() + rest.len());
        head.write(out);
        out.extend_from_slice(key);
        out.extend_from_slice(rest);
    }

    /// Reads a message in place.
    ///
    /// # Errors
    /// [`WireError`]; then nothing of it may be used.
    pub fn read(bytes: &'a [u8]) -> Result<Message<'a>, WireError> {
        let length = WireError::Length { len: bytes.len() };
        let (raw, payload) = bytes.split_at_checked(HEAD_LEN).ok_or(length)?;
        let head = Head::read(raw).ok_or(length)?;
        if payload.len() != head.len as usize {
            return Err(length);
        }
        let (key, rest) = payload.split_at_checked(usize::from(head.key_len)).ok_or(length)?;
        if rest.len() > MAX_VALUE_LEN {
            return Err(length);
        }
        let field = WireError::Field(head.kind);
        let ask = Ask { op: head.op, shard: ShardId(head.shard), epoch: head.epoch, left_ms: head.left_ms };
        let version = Version { hlc: Hlc(head.hlc), node: head.node };
        let tombstone = head.flag & TOMBSTONE != 0;
        let entry = Entry { key, value: rest, version, expires_at: head.expires as Millis, tombstone };
        let stored = Stored { hash: KeyHash(head.hash), entry };
        let next = (head.flag & MORE != 0).then_some(KeyHash(head.hash));
        Ok(match head.kind {
            1 if tombstone && !rest.is_empty() => return Err(field),
            1 => Message::Write(ask, stored),
            2 => Message::Wrote(ask),
            3 => Message::Read(ask, KeyHash(head.hash), key, head.flag & WHOLE != 0),
            4 => Message::Found(ask, (head.flag & PRESENT != 0).then_some(stored), head.flag & WHOLE != 0),
            5 => Message::Order(ask, KeyHash(head.hash), rest),
            6 => Message::Ordered(ask, rest),
            7 => Message::Refused(ask, Why::from_u8(head.flag).ok_or(field)?),
            8 => Message::Digest(ask),
            9 => {
                let (words, odd) = rest.as_chunks::<8>();
                if words.len() != LEAVES + 1 || !odd.is_empty() {
                    return Err(length);
                }
                let mut digest = Digest { count: u64::from_le_bytes(words[0]), ..Digest::default() };
                digest.leaves.iter_mut().zip(&words[1..]).for_each(|(leaf, word)| *leaf = u64::from_le_bytes(*word));
                Message::Digested(ask, digest, version)
            }
            10 => Message::List(ask, KeyHash(head.hash), u16::try_from(head.aux).map_err(|_| field)?),
            11 if !rest.len().is_multiple_of(ITEM) => return Err(length),
            11 => Message::Listed(ask, next, Items(rest)),
            12 if !rest.len().is_multiple_of(8) => return Err(length),
            12 => Message::Fetch(ask, Hashes(rest)),
            13 => Message::Stream(ask, KeyHash(head.hash)),
            14 if !Packed(rest).is_whole() => return Err(field),
            14 => Message::Entries(ask, next, Packed(rest)),
            15 => Message::Fence(ask, version, head.flag & WHOLE != 0),
            16 => Message::Purge(ask, version),
            kind => return Err(WireError::Kind(kind)),
        })
    }

    /// Items for a [`Message::Listed`], from what [`pack_item`] made.
    pub fn items(bytes: &[u8]) -> Items<'_> {
        debug_assert!(bytes.len().is_multiple_of(ITEM));
        Items(bytes)
    }

    /// Hashes for a [`Message::Fetch`]: eight little-endian bytes each.
    pub fn hashes(bytes: &[u8]) -> Hashes<'_> {
        debug_assert!(bytes.len().is_multiple_of(8));
        Hashes(bytes)
    }

    /// Entries for a [`Message::Entries`], from what [`pack`] made.
    pub fn packed(bytes: &[u8]) -> Packed<'_> {
        Packed(bytes)
    }
}

impl Head {
    fn stored(&mut self, stored: &Stored<'_>) {
        self.hash = stored.hash.0;
        (self.hlc, self.node) = (stored.entry.version.hlc.0, stored.entry.version.node);
        self.expires = stored.entry.expires_at;
        self.flag = if stored.entry.tombstone { TOMBSTONE } else { 0 };
    }

    fn next(&mut self, next: Option<KeyHash>) {
        if let Some(next) = next {
            (self.hash, self.flag) = (next.0, MORE);
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        // Every field is a number, so the archive is its bytes, without a serializer's buffers.
        let words = [self.op, self.epoch, self.hash, self.hlc, self.expires, self.aux];
        words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
        out.extend_from_slice(&self.shard.to_le_bytes());
        out.extend_from_slice(&self.node.to_le_bytes());
        out.extend_from_slice(&[self.kind, self.flag]);
        out.extend_from_slice(&self.key_len.to_le_bytes());
        out.extend_from_slice(&self.len.to_le_bytes());
        out.extend_from_slice(&self.left_ms.to_le_bytes());
    }

    fn read(raw: &[u8]) -> Option<Head> {
        let head = rkyv::access::<ArchivedHead, Failure>(raw).ok()?;
        Some(Head {
            op: head.op.to_native(),
            epoch: head.epoch.to_native(),
            hash: head.hash.to_native(),
            hlc: head.hlc.to_native(),
            expires: head.expires.to_native(),
            aux: head.aux.to_native(),
            shard: head.shard.to_native(),
            node: head.node.to_native(),
            kind: head.kind,
            flag: head.flag,
            key_len: head.key_len.to_native(),
            len: head.len.to_native(),
            left_ms: head.left_ms.to_native(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rkyv::util::AlignedVec;

    fn aligned(bytes: &[u8]) -> AlignedVec<16> {
        let mut copy = AlignedVec::new();
        copy.extend_from_slice(bytes);
        copy
    }

    fn all<'a>(items: &'a [u8], entries: &'a [u8]) -> Vec<Message<'a>> {
        let ask = Ask { op: 77, shard: ShardId(255), epoch: 12, left_ms: 900 };
        let version = Version { hlc: Hlc::new(5_000, 3), node: 9 };
        let entry = Entry { key: b"key", value: b"value", version, expires_at: 99, tombstone: false };
        let stored = Stored { hash: KeyHash(1 << 60), entry };
        let bare = Entry { key: b"", ..entry };
        let grave = Entry { value: b"", expires_at: 0, tombstone: true, ..entry };
        let digest = Digest { count: 3, leaves: std::array::from_fn(|i| i as u64 * 7) };
        vec![
            Message::Write(ask, stored),
            Message::Write(ask, Stored { entry: grave, ..stored }),
            Message::Wrote(ask),
            Message::Read(ask, KeyHash(4), b"key", true),
            Message::Read(ask, KeyHash(4), b"", false),
            Message::Found(ask, None, true),
            Message::Found(ask, Some(Stored { entry: bare, ..stored }), false),
            Message::Order(ask, KeyHash(8), b"INCR"),
            Message::Ordered(ask, b":1\r\n"),
            Message::Refused(ask, Why::Behind),
            Message::Digest(ask),
            Message::Digested(ask, digest, version),
            Message::List(ask, KeyHash(5), 0xf00f),
            Message::Listed(ask, Some(KeyHash(6)), Message::items(items)),
            Message::Listed(ask, None, Message::items(&[])),
            Message::Fetch(ask, Message::hashes(&[1; 16])),
            Message::Stream(ask, KeyHash(3)),
            Message::Entries(ask, Some(KeyHash(3)), Message::packed(entries)),
            Message::Fence(ask, version, true),
            Message::Fence(ask, version, false),
            Message::Purge(ask, version),
        ]
    }

    #[test]
    fn messages_come_out_as_they_went_in() {
        let version = Version { hlc: Hlc::new(5_000, 3), node: 9 };
        let (mut items, mut entries) = (Vec::new(), Vec::new());
        pack_item(&mut items, Item { hash: KeyHash(11), version });
        let entry = Entry { key: b"k", value: b"some value", version, expires_at: 1, tombstone: false };
        pack(&mut entries, KeyHash(1), &entry);
        pack(&mut entries, KeyHash(2), &Entry { value: b"", tombstone: true, ..entry });
        for message in all(&items, &entries) {
            let mut bytes = Vec::new();
            message.write(&mut bytes);
            let bytes = aligned(&bytes);
            let read = Message::read(&bytes).unwrap();
            assert_eq!(read, message);
            match read {
                Message::Listed(_, Some(_), items) => {
                    assert_eq!(items.iter().collect::<Vec<_>>(), [Item { hash: KeyHash(11), version }]);
                }
                Message::Entries(_, _, packed) => {
                    let found: Vec<_> = packed.iter().collect();
                    assert_eq!((found.len(), found[0].entry), (2, entry));
                    assert!(found[1].entry.tombstone);
                }
                _ => {}
            }
            for cut in 0..bytes.len() {
                assert!(Message::read(&aligned(&bytes[..cut])).is_err(), "{message:?} cut at {cut}");
            }
        }
    }

    proptest! {
        /// Whatever bytes arrive: they are refused, or read without leaving them.
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 64..300), kind in 0u8..18) {
            bytes[52] = kind;
            let payload = bytes.len() - HEAD_LEN;
            bytes[56..60].copy_from_slice(&(payload as u32).to_le_bytes());
            bytes[54..56].copy_from_slice(&((payload / 2) as u16).to_le_bytes());
            let bytes = aligned(&bytes);
            if let Ok(Message::Entries(_, _, packed)) = Message::read(&bytes) {
                prop_assert!(packed.iter().count() <= bytes.len());
            }
        }
    }
}
