//! The first words on a link: who dials whom, and who answered.
//!
//! ```text
//!   0       8         10       12      14       16     18     20       22      24     32        40      48     64   80
//!   +-------+---------+--------+-------+--------+------+------+--------+-------+------+---------+-------+------+----+
//!   | magic | version | shards | cores | number | core | port | family | zeros | boot | cluster | zeros | node | ip |
//!   +-------+---------+--------+-------+--------+------+------+--------+-------+------+---------+-------+------+----+
//! ```
//!
//! A Hello and a Welcome have one shape, archived by rkyv; `core` is whom a Hello wants, and zero in a Welcome. Magic and
//! version stay where they are in all versions, so that a node of another one can be told what is wrong. A Refuse is a
//! text.
//!
//! Pure. Whether somebody is welcome is decided by the owner of the links.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rkyv::rancor::Failure;
use rkyv::{Archive, Serialize};

/// What this side speaks. Links stand only between equal versions.
pub const PROTOCOL: u16 = 1;
/// `gridlink` in ASCII.
const MAGIC: u64 = u64::from_le_bytes(*b"gridlink");
/// Bytes of a Hello and of a Welcome.
pub const HELLO_LEN: usize = 80;
/// The longest text of a Refuse.
pub const REFUSE_LEN: usize = 240;

/// Who a node is, in numbers that the owner of the links understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster it belongs to, 0 while it is joining one.
    pub cluster: u64,
    /// Its number in the cluster's map.
    pub number: u16,
    /// Its lasting id.
    pub node: u128,
    /// Which of its lives this is.
    pub boot: u64,
    /// Into how many shards it divides the keys.
    pub shards: u16,
    /// How many cores it has.
    pub cores: u16,
    /// Where it listens for links.
    pub peer: SocketAddr,
}

/// A dialer and whom it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Who dials.
    pub from: Identity,
    /// The core that it wants.
    pub core: u16,
}

/// Why first words were not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HelloError {
    /// Not ours at all.
    #[error("what came is no greeting")]
    Malformed,
    /// Another version of the protocol.
    #[error("protocol version {theirs} meets version {}", PROTOCOL)]
    Version {
        /// The peer's.
        theirs: u16,
    },
}

#[derive(Archive, Serialize)]
struct Wire {
    magic: u64,
    version: u16,
    shards: u16,
    cores: u16,
    number: u16,
    core: u16,
    port: u16,
    family: u16,
    reserved: u16,
    boot: u64,
    cluster: u64,
    reserved2: u64,
    node: u128,
    ip: [u8; 16],
}
const _: () = assert!(size_of::<ArchivedWire>() == HELLO_LEN);

impl Hello {
    /// The bytes of this Hello, or of the Welcome of `from`.
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let (family, ip) = match self.from.peer.ip() {
            IpAddr::V4(ip) => {
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&ip.octets());
                (4, bytes)
            }
            IpAddr::V6(ip) => (6, ip.octets()),
        };
        let wire = Wire {
            magic: MAGIC,
            version: PROTOCOL,
            shards: self.from.shards,
            cores: self.from.cores,
            number: self.from.number,
            core: self.core,
            port: self.from.peer.port(),
            family,
            reserved: 0,
            boot: self.from.boot,
            cluster: self.from.cluster,
            reserved2: 0,
            node: self.from.node,
            ip,
        };
        let bytes = rkyv::to_bytes::<Failure>(&wire).expect("fixed fields are always archived");
        *bytes.first_chunk().expect("the size is asserted above")
    }

    /// Reads first words, which must lie at a multiple of 16.
    ///
    /// # Errors
    /// See [`HelloError`]. A version is told apart from nonsense whatever else it changed.
    pub fn decode(bytes: &[u8]) -> Result<Hello, HelloError> {
        let prefix = bytes.first_chunk::<10>().ok_or(HelloError::Malformed)?;
        let (magic, version) = prefix.split_at(8);
        if magic != MAGIC.to_le_bytes() {
            return Err(HelloError::Malformed);
        }
        let version = u16::from_le_bytes([version[0], version[1]]);
        if version != PROTOCOL {
            return Err(HelloError::Version { theirs: version });
        }
        if bytes.len() != HELLO_LEN {
            return Err(HelloError::Malformed);
        }
        let wire = rkyv::access::<ArchivedWire, Failure>(bytes).map_err(|_| HelloError::Malformed)?;
        let ip = match (wire.family.to_native(), wire.ip) {
            (4, [a, b, c, d, ..]) => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
            (6, octets) => IpAddr::V6(Ipv6Addr::from(octets)),
            _ => return Err(HelloError::Malformed),
        };
        let from = Identity {
            cluster: wire.cluster.to_native(),
            number: wire.number.to_native(),
            node: wire.node.to_native(),
            boot: wire.boot.to_native(),
            shards: wire.shards.to_native(),
            cores: wire.cores.to_native(),
            peer: SocketAddr::new(ip, wire.port.to_native()),
        };
        if from.cores == 0 || from.shards == 0 {
            return Err(HelloError::Malformed);
        }
        Ok(Hello { from, core: wire.core.to_native() })
    }
}

/// The text of a Refuse as it may be logged: bounded, in one line.
pub(super) fn refusal(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(REFUSE_LEN)]);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rkyv::util::AlignedVec;

    fn hello(peer: &str) -> Hello {
        let peer = peer.parse().unwrap();
        let from = Identity { cluster: 7, number: 3, node: 1 << 100, boot: 9, shards: 4096, cores: 16, peer };
        Hello { from, core: 5 }
    }

    fn aligned(bytes: &[u8]) -> AlignedVec<16> {
        let mut aligned = AlignedVec::new();
        aligned.extend_from_slice(bytes);
        aligned
    }

    #[test]
    fn first_words_come_out_as_they_went_in() {
        for peer in ["10.1.2.3:7000", "[fe80::1]:7000"] {
            assert_eq!(Hello::decode(&aligned(&hello(peer).encode())), Ok(hello(peer)));
        }
    }

    #[test]
    fn another_version_is_told_apart_from_nonsense() {
        let mut bytes = aligned(&hello("10.1.2.3:1").encode());
        assert_eq!(bytes[..8], *b"gridlink");
        bytes[8] = 9;
        assert_eq!(Hello::decode(&bytes[..60]), Err(HelloError::Version { theirs: 9 }));
        bytes[0] = 0;
        assert_eq!(Hello::decode(&bytes), Err(HelloError::Malformed));
    }

    #[test]
    fn a_refusal_is_one_short_line() {
        assert_eq!(refusal(b"no\r\nway\x1b["), "no  way [");
        assert_eq!(refusal(&[b'x'; 1000]).len(), REFUSE_LEN);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_or_refused(at in 10usize..HELLO_LEN, byte: u8, cut in 0usize..=HELLO_LEN) {
            let mut bytes = aligned(&hello("10.1.2.3:1").encode());
            bytes[at] = byte;
            let _ = Hello::decode(&bytes);
            prop_assert_eq!(Hello::decode(&bytes[..cut]).is_ok() && cut < HELLO_LEN, false);
        }
    }
}
