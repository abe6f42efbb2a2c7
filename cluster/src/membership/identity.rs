//! Who a member says it is, and the bytes of that in gossip packets.
//!
//! ```text
//! identity   id 16 · boot 8 · bump 2 · no 2 · family 1 (4 or 6) · address 4 or 16 · port 2          35 or 47 bytes
//! member     identity · incarnation 2 · state 1 (0 alive, 1 suspect, 2 down)
//! header     source identity · its incarnation 2 · target identity · kind 1 · [identity] · [probe number 1]
//! ```
//!
//! All numbers are big-endian. A packet is read in full here before the gossip library sees it: what is cut short, names an
//! unknown kind or an address nobody can be reached at is refused.
//!
//! `boot` numbers the lives of a node and is chosen by its process at start. `bump` numbers the names of one life: a member that was
//! wrongly held for dead comes back under the next one, with its data. The last value of `bump` is kept for the
//! name under which a node leaves on purpose, so that the others can tell leaving from dying.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::{Buf, BufMut};
use foca::{Codec, Header, Member, Message, State};

use crate::ids::{NodeId, NodeNo};

/// The `bump` of a node that has left on purpose.
pub(super) const LEFT: u16 = u16::MAX;
/// Bytes of an identity, at most.
pub(super) const MAX_IDENTITY: usize = 47;
/// Bytes of a member, at most.
pub(super) const MAX_MEMBER: usize = MAX_IDENTITY + 3;

/// A member as it names itself. Two identities of one [`NodeId`] never live at once: the greater one replaces the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The node, over all its lives.
    pub id: NodeId,
    /// Which life of the node: greater than that of every life before.
    pub boot: u64,
    /// Which name of this life, from 0.
    pub bump: u16,
    /// Where its gossip and its peer links are.
    pub peer: SocketAddr,
    /// Its number in the map; 0 as long as it was not admitted.
    pub no: NodeNo,
}

impl Identity {
    /// The first name of a life. Scope and flow label of an IPv6 address are dropped, they mean nothing to others.
    pub fn new(id: NodeId, boot: u64, peer: SocketAddr) -> Identity {
        Identity { id, boot, bump: 0, peer: SocketAddr::new(peer.ip().to_canonical(), peer.port()), no: NodeNo(0) }
    }

    /// Whether it left on purpose.
    pub(super) fn left(&self) -> bool {
        self.bump == LEFT
    }

    fn rank(&self) -> (u64, u16, NodeNo, SocketAddr) {
        (self.boot, self.bump, self.no, self.peer)
    }
}

impl foca::Identity for Identity {
    type Addr = NodeId;

    fn renew(&self) -> Option<Identity> {
        let bump = self.bump.checked_add(1).filter(|bump| *bump < LEFT)?;
        Some(Identity { bump, ..*self })
    }

    fn addr(&self) -> NodeId {
        self.id
    }

    // The number and the address only break ties, so that two nodes with one name cannot replace each other for ever.
    fn win_addr_conflict(&self, adversary: &Identity) -> bool {
        self.rank() > adversary.rank()
    }
}

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("the packet ends too early")]
    Short,
    #[error("no room is left in the packet")]
    Full,
    #[error("{0} is not a kind of address, state or message")]
    Unknown(u8),
    #[error("nobody can be reached at {0}")]
    Address(SocketAddr),
}

impl From<bytes::TryGetError> for Malformed {
    fn from(_: bytes::TryGetError) -> Malformed {
        Malformed::Short
    }
}

/// The bytes of identities, members and headers, for the gossip library and for us.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wire;

impl Wire {
    fn put_identity(identity: &Identity, buf: &mut impl BufMut) {
        buf.put_u128(identity.id.0);
        buf.put_u64(identity.boot);
        buf.put_u16(identity.bump);
        buf.put_u16(identity.no.0);
        match identity.peer.ip() {
            IpAddr::V4(address) => {
                buf.put_u8(4);
                buf.put_slice(&address.octets());
            }
            IpAddr::V6(address) => {
                buf.put_u8(6);
                buf.put_slice(&address.octets());
            }
        }
        buf.put_u16(identity.peer.port());
    }

    fn identity(buf: &mut impl Buf) -> Result<Identity, Malformed> {
        let id = NodeId(buf.try_get_u128()?);
        let boot = buf.try_get_u64()?;
        let bump = buf.try_get_u16()?;
        let no = NodeNo(buf.try_get_u16()?);
        let address = match buf.try_get_u8()? {
            4 => IpAddr::V4(Ipv4Addr::from(buf.try_get_u32()?)),
            6 => IpAddr::V6(Ipv6Addr::from(buf.try_get_u128()?)),
            other => return Err(Malformed::Unknown(other)),
        };
        let peer = SocketAddr::new(address, buf.try_get_u16()?);
        if address.is_unspecified() || address.is_multicast() || address != address.to_canonical() || peer.port() == 0 {
            return Err(Malformed::Address(peer));
        }
        Ok(Identity { id, boot, bump, peer, no })
    }

    fn size(identity: &Identity) -> usize {
        if identity.peer.is_ipv4() { MAX_IDENTITY - 12 } else { MAX_IDENTITY }
    }
}

/// Kind, the identity that comes with it, and the probe number that comes with it.
fn parts(message: &Message<Identity>) -> (u8, Option<&Identity>, Option<u8>) {
    match message {
        Message::Ping(number) => (1, None, Some(*number)),
        Message::Ack(number) => (2, None, Some(*number)),
        Message::PingReq { target, probe_number } => (3, Some(target), Some(*probe_number)),
        Message::IndirectPing { origin, probe_number } => (4, Some(origin), Some(*probe_number)),
        Message::IndirectAck { target, probe_number } => (5, Some(target), Some(*probe_number)),
        Message::ForwardedAck { origin, probe_number } => (6, Some(origin), Some(*probe_number)),
        Message::Announce => (7, None, None),
        Message::Feed => (8, None, None),
        Message::Gossip => (9, None, None),
        Message::Broadcast => (10, None, None),
        Message::TurnUndead => (11, None, None),
    }
}

impl Codec<Identity> for Wire {
    type Error = Malformed;

    fn encode_header(&mut self, header: &Header<Identity>, mut buf: impl BufMut) -> Result<(), Malformed> {
        let (kind, identity, number) = parts(&header.message);
        let size = Wire::size(&header.src) + Wire::size(&header.dst) + 3 + identity.map_or(0, Wire::size);
        if buf.remaining_mut() < size + usize::from(number.is_some()) {
            return Err(Malformed::Full);
        }
        Wire::put_identity(&header.src, &mut buf);
        buf.put_u16(header.src_incarnation);
        Wire::put_identity(&header.dst, &mut buf);
        buf.put_u8(kind);
        if let Some(identity) = identity {
            Wire::put_identity(identity, &mut buf);
        }
        if let Some(number) = number {
            buf.put_u8(number);
        }
        Ok(())
    }

    fn decode_header(&mut self, mut buf: impl Buf) -> Result<Header<Identity>, Malformed> {
        let buf = &mut buf;
        let src = Wire::identity(buf)?;
        let src_incarnation = buf.try_get_u16()?;
        let dst = Wire::identity(buf)?;
        let message = match buf.try_get_u8()? {
            1 => Message::Ping(buf.try_get_u8()?),
            2 => Message::Ack(buf.try_get_u8()?),
            3 => Message::PingReq { target: Wire::identity(buf)?, probe_number: buf.try_get_u8()? },
            4 => Message::IndirectPing { origin: Wire::identity(buf)?, probe_number: buf.try_get_u8()? },
            5 => Message::IndirectAck { target: Wire::identity(buf)?, probe_number: buf.try_get_u8()? },
            6 => Message::ForwardedAck { origin: Wire::identity(buf)?, probe_number: buf.try_get_u8()? },
            7 => Message::Announce,
            8 => Message::Feed,
            9 => Message::Gossip,
            // Kind 10, a broadcast, is never sent, so nobody may send it.
            11 => Message::TurnUndead,
            other => return Err(Malformed::Unknown(other)),
        };
        Ok(Header { src, src_incarnation, dst, message })
    }

    fn encode_member(&mut self, member: &Member<Identity>, mut buf: impl BufMut) -> Result<(), Malformed> {
        if buf.remaining_mut() < Wire::size(member.id()) + 3 {
            return Err(Malformed::Full);
        }
        Wire::put_identity(member.id(), &mut buf);
        buf.put_u16(member.incarnation());
        buf.put_u8(match member.state() {
            State::Alive => 0,
            State::Suspect => 1,
            State::Down => 2,
        });
        Ok(())
    }

    fn decode_member(&mut self, mut buf: impl Buf) -> Result<Member<Identity>, Malformed> {
        let id = Wire::identity(&mut buf)?;
        let incarnation = buf.try_get_u16()?;
        let state = match buf.try_get_u8()? {
            0 => State::Alive,
            1 => State::Suspect,
            2 => State::Down,
            other => return Err(Malformed::Unknown(other)),
        };
        Ok(Member::new(id, incarnation, state))
    }
}
