//! The register that holds the map: one value, changed by agreement of a majority of voters.
//!
//! CASPaxos: no log and no leader. Who wants a change asks the voters for their promise and what they hold, makes the
//! next value from the newest of it, and has it accepted. Two who do so at once hinder each other and try again; what was
//! chosen is never lost, and every chosen value is made from the one chosen before.
//!
//! ```text
//!   proposer                               voters (acceptors)
//!      │ Prepare{ballot} ─────────────────────▶│ promise: nothing below this ballot any more   (to disk, then answer)
//!      │◀──────────── Promise{accepted value} ─│
//!      │   majority: the value of the highest ballot; is it known to be chosen?
//!      │     no:  have that value accepted first, then begin again
//!      │     yes: next = apply(value, change)
//!      │ Accept{ballot, next} ────────────────▶│ accept, unless a higher ballot was promised   (to disk, then answer)
//!      │◀─────────────────────────── Accepted ─│
//!      │   majority: chosen
//! ```
//!
//! **Voters are part of the value.** A [`Config`] has one group of voters, or two while they change; whatever is asked needs a
//! majority of *each* group. Neighbours in the chain share a group, so a proposer that starts from any older value is
//! led, value by value, to the newest one.
//!
//! **Only what is chosen is built upon.** CASPaxos alone may apply a change to a value that only some voter accepted. With
//! voters in the value that is wrong: of two changes of voters in a row, neither of them chosen, the second would let new
//! voters decide without the old ones. So such a value is first made chosen as it is.
//!
//! **No change is applied twice.** An accept that nobody answered may have worked. The proposer goes on only when a chosen value
//! of the same epoch tells whether it did; if the chain has gone further it says [`Outcome::Unknown`].
//!
//! Reference: Rystsov, "CASPaxos: Replicated State Machines without logs", arXiv 1802.07000; joint configurations as in
//! Ongaro, Ousterhout, "In Search of an Understandable Consensus Algorithm", USENIX ATC 2014, section 6.
//!
//! Not here: what the value means ([`Rules`], given by the caller), files ([`slots`] is only their format), links, who
//! proposes by convention.

// rkyv's derive copies the fields of enum variants without their docs.
#![allow(missing_docs)]

/// Whether a test has put that bug into a machine; never outside of tests.
macro_rules! planted {
    ($machine:expr, $plant:ident) => {{
        #[cfg(test)]
        let planted = $machine.plant == Some($crate::register::Plant::$plant);
        #[cfg(not(test))]
        let planted = false;
        planted
    }};
}

mod acceptor;
mod proposer;
pub mod slots;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;

use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::NodeNo;

pub use acceptor::{Acceptor, Answer, State};
pub use proposer::{Busy, Outcome, Output, Proposer};

/// Bytes of a value, at most.
pub const MAX_VALUE: usize = 16 << 20;
/// Voters in a group, at most. A map has 1, 3 or 5; this bounds what a peer can make a proposer ask.
pub const MAX_VOTERS: usize = 9;

/// The number of an attempt. No two attempts have the same one, so a ballot stands for at most one value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
pub struct Ballot {
    /// Higher than all the proposer has seen. 0 is no ballot.
    pub counter: u64,
    /// The seat of the node that made the attempt; 0 as long as it knows of none.
    pub node: NodeNo,
    /// Which life of which node, as a number that no other life of any node has: one that starts counts from the start again, and
    /// several may not know their seats yet.
    pub life: u64,
}

/// What proposers and voters say to each other. Answers repeat the ballot they answer.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum RegisterMessage {
    /// Promise this ballot, and say what you hold.
    Prepare { ballot: Ballot },
    /// Promised. With the value that the voter accepted last, and its ballot.
    Promise { ballot: Ballot, accepted: Option<(Ballot, Vec<u8>)> },
    /// Accept this value.
    Accept { ballot: Ballot, value: Vec<u8> },
    /// Accepted.
    Accepted { ballot: Ballot },
    /// Neither promised nor accepted, because of a promise of a higher ballot.
    Refused { ballot: Ballot, promised: Ballot },
}

/// Who votes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The voters.
    pub voters: Vec<NodeNo>,
    /// While voters change: those who will be the voters. Empty otherwise.
    pub next: Vec<NodeNo>,
}

impl Config {
    /// The groups, of each of which a majority is needed.
    fn groups(&self) -> impl Iterator<Item = &[NodeNo]> {
        [self.voters.as_slice(), self.next.as_slice()].into_iter().filter(|group| !group.is_empty())
    }

    /// Whether peers may be asked according to it: there are voters, few enough, none twice in a group.
    fn is_sound(&self) -> bool {
        let sound = |group: &[NodeNo]| {
            group.len() <= MAX_VOTERS && group.iter().enumerate().all(|(at, node)| !group[..at].contains(node))
        };
        !self.voters.is_empty() && sound(&self.voters) && sound(&self.next)
    }

    /// Whether it may come right after `before`: they share a group, so majorities of the one meet those of the other.
    fn may_follow(&self, before: &Config) -> bool {
        let same = |a: &[NodeNo], b: &[NodeNo]| a.len() == b.len() && a.iter().all(|node| b.contains(node));
        before.groups().any(|group| same(group, &self.voters))
    }
}

/// What a proposer must know of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its number in the chain: each chosen value's is one more than the one's before.
    pub epoch: u64,
    /// Who votes on what follows.
    pub config: Config,
}

/// What the bytes mean. Pure functions: the same arguments give the same answer on every node.
pub trait Rules {
    /// A wish to change the value.
    type Change;
    /// Why a change does not apply.
    type Refusal;

    /// The epoch and the voters of a value; nothing if the bytes are no value. They may come from a peer.
    fn head(&self, value: &[u8]) -> Option<Head>;

    /// The value after a change.
    ///
    /// # Errors
    /// The change does not apply to this value.
    fn apply(&self, current: &[u8], change: &Self::Change) -> Result<Vec<u8>, Self::Refusal>;
}

/// Bugs that tests put in, to see that they are found.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plant {
    /// A voter comes back with what it accepted, but without its promise.
    ForgetsPromise,
    /// A voter accepts below its promise.
    AcceptsBelowPromise,
    /// A majority of all voters together is taken for a majority of each group.
    MajorityOfUnion,
    /// While voters change, accepts are counted in the next group alone.
    AcceptsByNextOnly,
    /// A change is applied to a value that is not known to be chosen.
    BuildsOnUnchosen,
    /// A value with other voters does not make the proposer ask those.
    StaysWithOldVoters,
    /// The first value that is shown is taken, not the one of the highest ballot.
    TakesAnyValue,
    /// A read reports what it found without seeing to it that it is chosen.
    ReadsUnchosen,
    /// A change whose outcome is open is applied once more.
    AppliesAgain,
    /// A voter answers before its state is on disk.
    AnswersBeforeDisk,
}
