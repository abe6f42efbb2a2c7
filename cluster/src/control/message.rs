//! What the control planes of two nodes say to each other: rare, small, and copied out of their bytes.
//!
//! Every message tells who sends it, in which cluster, and which map it has; so a map that is missed somewhere is noticed with
//! the next message of any kind. It goes to a peer address and is answered to the sender's peer address: a node that is not a
//! member yet is spoken to like any other.

// rkyv's derive copies the fields of enum variants without their docs.
#![allow(missing_docs)]

use std::net::SocketAddr;

use rkyv::rancor::Error as Failure;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::{NodeId, NodeNo};
use crate::map::Candidate;
use crate::register::RegisterMessage;

/// Bytes of a message, at most: the largest map fits.
pub const MAX_CONTROL: usize = 16 << 20;
/// Completed shards that one status names, at most.
pub const MAX_FILLED: usize = 16384;

/// Who sends a message.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Sender {
    /// The cluster; 0 as long as the sender does not know it.
    pub cluster: u64,
    /// Shards of that cluster, or those that the sender is built for.
    pub shards: u16,
    /// The node.
    pub id: NodeId,
    /// Which life.
    pub boot: u64,
    /// The number of that life; 0 before it is admitted.
    pub no: NodeNo,
    /// Where it is answered.
    pub peer: SocketAddr,
    /// The epoch of its map.
    pub epoch: u64,
}

/// Shows the node that issued it that whoever has it was there a moment ago. A request to be admitted may be old: it waits where a
/// process stands still, and is read when another machine has the sender's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Ticket {
    /// The life that issued it.
    pub boot: u64,
    /// When, on its monotonic clock, in milliseconds.
    pub at: u64,
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Body {
    /// Of the register, between seats.
    Register { to: NodeNo, from: NodeNo, message: RegisterMessage },
    /// Of the membership.
    Gossip(Vec<u8>),
    /// The sender wants to be admitted. With the ticket that it was sent, if it was sent one.
    Join { candidate: Candidate, ticket: Option<Ticket> },
    /// Ask again, with this ticket. To the life `boot`, which asked.
    JoinAgain { boot: u64, ticket: Ticket },
    /// The life `boot` is not admitted, for this reason; asking again does not help.
    Refused { boot: u64, why: String },
    /// The life `boot` is not admitted as long as another process with its id is there, at this address.
    Taken { boot: u64, at: SocketAddr },
    /// Send me your map.
    MapWanted,
    /// This is a map that was chosen.
    Map(Vec<u8>),
    /// What the sender has adopted as a whole, what it holds completely, and whether it leaves versions to others because its
    /// clock is wrong.
    Status { adopted: u64, filled: Vec<(u16, u64)>, quarantined: bool },
    /// What does your clock say? `sent` is the asker's and comes back.
    ClockAsked { sent: u64 },
    /// The wall clock of the sender, in unix milliseconds.
    ClockTold { sent: u64, wall: u64 },
}

/// A whole message.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Envelope {
    /// Who sends it.
    pub sender: Sender,
    /// What is said.
    pub body: Body,
}

impl Envelope {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        rkyv::to_bytes::<Failure>(self).expect("a control message is plain data").to_vec()
    }

    /// From bytes of any origin.
    ///
    /// # Errors
    /// When they are no message within its bounds.
    pub fn decode(bytes: &[u8]) -> Result<Envelope, String> {
        if bytes.len() > MAX_CONTROL {
            return Err(format!("a control message of {} bytes", bytes.len()));
        }
        let mut aligned = AlignedVec::<16>::with_capacity(bytes.len());
        aligned.extend_from_slice(bytes);
        let envelope =
            rkyv::from_bytes::<Envelope, Failure>(&aligned).map_err(|e| format!("not a control message: {e}"))?;
        match &envelope.body {
            Body::Status { filled, .. } if filled.len() > MAX_FILLED => {
                Err("a status that names too many shards".into())
            }
            _ => Ok(envelope),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn envelope(body: Body) -> Envelope {
        let peer = SocketAddr::from(([10, 0, 0, 1], 7380));
        let sender = Sender { cluster: 7, shards: 32, id: NodeId(9), boot: 3, no: NodeNo(2), peer, epoch: 12 };
        Envelope { sender, body }
    }

    #[test]
    fn messages_survive_their_bytes_and_cut_ones_do_not() {
        let bodies = [
            Body::MapWanted,
            Body::Map(vec![1, 2, 3]),
            Body::Status { adopted: 4, filled: vec![(1, 2), (3, 4)], quarantined: true },
            Body::ClockAsked { sent: 5 },
            Body::ClockTold { sent: 5, wall: 1 << 41 },
            Body::Refused { boot: 3, why: "no".into() },
            Body::JoinAgain { boot: 4, ticket: Ticket { boot: 3, at: 17 } },
        ];
        for body in bodies {
            let bytes = envelope(body.clone()).encode();
            assert_eq!(Envelope::decode(&bytes), Ok(envelope(body)));
            assert!(Envelope::decode(&bytes[..bytes.len() / 2]).is_err());
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Envelope::decode(&bytes);
        }
    }
}
