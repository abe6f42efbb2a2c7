//! The frame around gossip packets, and the list of members that two nodes exchange.
//!
//! ```text
//! frame   "GK" 2 · version 1 · kind 1 · cluster 8 · body
//! body    kind 1: a packet of the gossip library: header · [count 2 · members]
//!         kind 2: a list that wants one back        count 2 · members, the sender first
//!         kind 3: a list that wants none back       the same
//! ```
//!
//! Kind 1 travels as a datagram and, where loss would do harm, once more over the control link. Lists travel over
//! the control link only.

use bytes::{Buf, BufMut};
use foca::{Codec, Header, Member, Message};

use super::identity::{Identity, MAX_MEMBER, Malformed, Wire};

/// Bytes of a gossip packet without its frame, at most. With the frame, and room for a signature, within one Ethernet frame.
pub(super) const MAX_PACKET: usize = 1232;
/// Bytes of the frame.
pub(super) const FRAME: usize = 12;
/// Members that are remembered, dead ones included.
pub(super) const MAX_TABLE: usize = 2048;
/// Bytes of a framed list, at most.
pub(super) const MAX_LIST: usize = FRAME + 2 + (MAX_TABLE + 1) * MAX_MEMBER;

const MAGIC: [u8; 2] = *b"GK";
const VERSION: u8 = 1;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Gossip,
    Ask,
    Answer,
}

/// Why a frame is not for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Malformed,
    Version,
    Cluster,
}

/// Puts a frame around a body.
pub(super) fn frame(cluster: u64, kind: Kind, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FRAME + body.len());
    bytes.put_slice(&MAGIC);
    bytes.put_u8(VERSION);
    bytes.put_u8(match kind {
        Kind::Gossip => 1,
        Kind::Ask => 2,
        Kind::Answer => 3,
    });
    bytes.put_u64(cluster);
    bytes.put_slice(body);
    bytes
}

/// Takes the frame off.
pub(super) fn unframe(cluster: u64, mut bytes: &[u8]) -> Result<(Kind, &[u8]), Refusal> {
    if bytes.len() < FRAME || bytes[..2] != MAGIC {
        return Err(Refusal::Malformed);
    }
    bytes.advance(MAGIC.len());
    if bytes.get_u8() != VERSION {
        return Err(Refusal::Version);
    }
    let kind = match bytes.get_u8() {
        1 => Kind::Gossip,
        2 => Kind::Ask,
        3 => Kind::Answer,
        _ => return Err(Refusal::Malformed),
    };
    match bytes.get_u64() == cluster {
        true => Ok((kind, bytes)),
        false => Err(Refusal::Cluster),
    }
}

/// Reads a gossip packet in full, and whom it tells about.
pub(super) fn read_packet(mut body: &[u8]) -> Result<(Header<Identity>, Vec<Member<Identity>>), Malformed> {
    let header = Wire.decode_header(&mut body)?;
    // These carry nothing else; all others carry a counted list.
    let bare = matches!(header.message, Message::Announce | Message::TurnUndead);
    let members = if bare || body.is_empty() { Vec::new() } else { read_members(&mut body)? };
    if body.is_empty() { Ok((header, members)) } else { Err(Malformed::Unknown(body[0])) }
}

/// The body of a list.
pub(super) fn write_list<'a>(members: impl Iterator<Item = &'a Member<Identity>>) -> Vec<u8> {
    let mut body = vec![0, 0];
    let mut count = 0_u16;
    for member in members.take(MAX_TABLE + 1) {
        Wire.encode_member(member, &mut body).expect("a vector has room");
        count += 1;
    }
    body[..2].copy_from_slice(&count.to_be_bytes());
    body
}

/// Reads the body of a list: at least its sender.
pub(super) fn read_list(mut body: &[u8]) -> Result<Vec<Member<Identity>>, Malformed> {
    let members = read_members(&mut body)?;
    if body.is_empty() && !members.is_empty() { Ok(members) } else { Err(Malformed::Short) }
}

fn read_members(body: &mut &[u8]) -> Result<Vec<Member<Identity>>, Malformed> {
    let count = body.try_get_u16()?;
    // Nothing is reserved for a count that the bytes do not bear out.
    (0..count).map(|_| Wire.decode_member(&mut *body)).collect()
}
