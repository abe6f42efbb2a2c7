//! Small names that every machine uses.
//!
//! A *node* is known by its [`NodeId`] over all its lives; `boot` numbers these lives, greater each time. A *life* is known by its
//! [`NodeNo`], which the map gives at admission and never gives again while anybody may remember it. Data is held by
//! lives, not by nodes: a process that restarts has forgotten what it held.

use std::fmt;
use std::str::FromStr;

use gridkv_engine::Millis;
use rkyv::{Archive, Deserialize, Serialize};

/// A node, over all its lives: a random number, kept in its directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub struct NodeId(pub u128);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for NodeId {
    type Err = String;

    fn from_str(text: &str) -> Result<NodeId, String> {
        let hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u128::from_str_radix(text, 16) {
            Ok(id) if hex => Ok(NodeId(id)),
            _ => Err(format!("{text:?} is not a node id of 32 hexadecimal digits")),
        }
    }
}

/// One life of a node, as the map numbers it, from 1; also the node in the versions of what it writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub struct NodeNo(pub u16);

impl fmt::Display for NodeNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The time of an input, as the driver read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds since some start, never going back: for deadlines.
    pub mono: Millis,
    /// Unix milliseconds, right or wrong: for versions and expiry.
    pub wall: Millis,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text() {
        let id = NodeId(0x1234_5678_9abc_def0);
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "12", "+2345678901234567890123456789012", "zz345678901234567890123456789012"] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad}");
        }
    }
}
