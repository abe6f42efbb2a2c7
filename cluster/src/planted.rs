//! Bugs on purpose: what the protocols would be without one of their rules.
//!
//! A checker that has never found anything may be blind. With the feature `planted` a machine can be told to break one
//! rule, and the simulator must notice. Without the feature every question here is answered by a constant, so none of
//! this is in a node.

use gridkv_engine::Millis;
use gridkv_engine::record::Entry;
use gridkv_engine::store::{Merged, Store, StoreError};

/// A rule to be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A filling replica counts and is read: a quorum forgets.
    FillingVotes,
    /// A replica serves any shard epoch.
    AnyEpoch,
    /// A read answers before what it saw is on a quorum.
    NoBlockingRepair,
    /// An expired entry is dropped at once, without its tombstone.
    ExpiredDropped,
    /// A purge without a fence before it.
    PurgeWithoutFence,
    /// What is sent again gets a new version.
    AgainWithNewVersion,
    /// A move writes to the new set only.
    WriteNewOnly,
    /// A move is over before the old set has heard of it.
    HastyMove,
    /// A hint counts as a replica.
    HintCounts,
    /// Versions from the far future are taken.
    AnyFuture,
    /// A full sync clears what was there.
    SyncClears,
    /// One source is enough to fill a replica.
    OneSource,
    /// A restarted node keeps the place of its former life.
    SameLife,
    /// A change of voters needs the majority of the union, not of both sets.
    JointUnion,
    /// A voter forgets its promises in a restart.
    VoterForgets,
    /// Deletes leave no tombstone.
    NoTombstones,
    /// What a replica is filled with does not expire.
    FillNeverExpires,
    /// A page begins one hash late.
    PageTooLate,
}

#[cfg(any(test, feature = "planted"))]
impl Bug {
    /// All of them.
    pub const ALL: [Bug; 18] = [
        Bug::FillingVotes,
        Bug::AnyEpoch,
        Bug::NoBlockingRepair,
        Bug::ExpiredDropped,
        Bug::PurgeWithoutFence,
        Bug::AgainWithNewVersion,
        Bug::WriteNewOnly,
        Bug::HastyMove,
        Bug::HintCounts,
        Bug::AnyFuture,
        Bug::SyncClears,
        Bug::OneSource,
        Bug::SameLife,
        Bug::JointUnion,
        Bug::VoterForgets,
        Bug::NoTombstones,
        Bug::FillNeverExpires,
        Bug::PageTooLate,
    ];
}

/// Which rule is broken, if any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Planted {
    #[cfg(any(test, feature = "planted"))]
    bug: Option<Bug>,
}

impl Planted {
    /// That rule is broken.
    #[cfg(any(test, feature = "planted"))]
    pub fn with(bug: Bug) -> Planted {
        Planted { bug: Some(bug) }
    }

    /// Whether that rule is broken.
    #[inline]
    pub(crate) fn has(self, bug: Bug) -> bool {
        #[cfg(any(test, feature = "planted"))]
        return self.bug == Some(bug);
        #[cfg(not(any(test, feature = "planted")))]
        {
            let _ = bug;
            false
        }
    }
}

impl Planted {
    /// [`Store::merge`], as it would be without one of its rules.
    #[inline]
    pub(crate) fn merge(self, store: &mut Store, entry: Entry<'_>, wall: Millis) -> Result<Merged, StoreError> {
        if self.has(Bug::AnyFuture) {
            return store.merge(entry, wall.max(entry.version.hlc.millis()));
        }
        if self.has(Bug::NoTombstones) && entry.tombstone {
            let hash = store.locate(entry.key);
            if store.raw(hash, entry.key).is_some_and(|known| known.version < entry.version) {
                store.delete(hash, entry.key, wall)?;
            }
            return Ok(Merged::Applied);
        }
        store.merge(entry, wall)
    }
}
