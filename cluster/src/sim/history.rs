//! What clients saw, and whether that is what they were promised.
//!
//! The checkers know nothing of the protocols. They see operations, each with the time of its call and of its end, and what
//! came out of it; no message, no map, no store.
//!
//! ```text
//!   time ──▶    set 7 ├────────┤ written at version 31
//!                                    get ├─────┤ must be 31 or newer: the floor of this key
//! ```
//!
//! The **floor** of a key is what all operations after this moment must see at least: the newest version that a quorum write
//! was acknowledged with or a quorum read returned, and *above* it once a delete that began later was acknowledged. An
//! absent key is right only when something that can have deleted it can have been newer than the floor. Versions are what
//! decides between writes, so "newer" is by version, not by time: a clock that is behind loses, and that is no violation.
//!
//! Promises that are checked: [`Rule`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use gridkv_engine::Millis;
use gridkv_engine::hlc::{Hlc, Version};

use crate::planted::Bug;

/// Unix milliseconds at the start of every world.
pub const EPOCH_MS: Millis = 1_700_000_000_000;

/// How far ahead of a replica's clock a version may be.
const MAX_DRIFT_MS: Millis = 500;

/// What a client asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Write this value.
    Set {
        /// No other operation writes it.
        value: u64,
        /// Unix milliseconds; 0 = never.
        expires_at: Millis,
    },
    /// Write a tombstone without looking.
    Erase,
    /// Delete if it is there.
    Delete,
    /// Read.
    Get,
    /// Count up by one.
    Count,
}

/// What a read returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The value.
    pub value: u64,
    /// Its version.
    pub version: Version,
    /// Its expiry; 0 = never.
    pub expires_at: Millis,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// Not done, and it never will be.
    Failed,
    /// Nobody can tell.
    Unknown,
    /// It has that version.
    Written(Version),
    /// Whether there was something.
    Deleted(bool),
    /// What was read.
    Found(Option<Seen>),
    /// The count after it.
    Counted(u64),
}

/// One operation of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// Whose.
    pub client: usize,
    /// At which node.
    pub node: usize,
    /// On which key; counters and other keys are told apart by [`Op::is_counter`].
    pub key: u64,
    /// Whether the key is a counter: nothing but counts and reads happen to it.
    pub is_counter: bool,
    /// What was asked.
    pub asked: Asked,
    /// Whether it asked for a quorum, or more.
    pub quorum: bool,
    /// When it began, in microseconds.
    pub call: u64,
    /// When it ended.
    pub end: u64,
    /// The wall clock of the node when it answered.
    pub wall: Millis,
    /// What came of it.
    pub came: Came,
}

/// All operations of a run, and what is known about its clocks.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// In any order.
    pub ops: Vec<Op>,
    /// No clock was ever further ahead of the true time.
    pub ahead_ms: Millis,
    /// Whether two read quorums meet: only then does a read see what another one saw of a write that is not acknowledged.
    pub reads_are_monotonic: bool,
    /// Clocks that are as they should be are not further ahead; `None` when a single node may acknowledge by itself.
    pub sane_ahead_ms: Option<Millis>,
}

/// A promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// What a quorum acknowledged is seen by every later quorum read, or something newer.
    Durability,
    /// Quorum reads that follow each other do not go back.
    Monotonic,
    /// What was deleted does not come back.
    Resurrection,
    /// What failed is never seen.
    FailedNeverSeen,
    /// Only what was written is read, under the key and the version it was written with.
    OneVersion,
    /// Every count is done once, and none is lost.
    Counters,
    /// Nothing is served after its time, by the clock of the node that serves it.
    Expiry,
    /// No version from the far future is acknowledged.
    Future,
    /// Replicas hold the same in the end.
    Convergence,
    /// Two nodes never hold different maps of one epoch.
    OneMap,
    /// Machines keep their invariants and never panic.
    Invariants,
    /// Once all is healed, everything works again within a minute, or two where one shard moves at a time.
    Liveness,
    /// The same seed gives the same run.
    Determinism,
}

impl Rule {
    /// The promises that a bug on purpose breaks, of which one has to be found broken. Others may be seen before it, such as a node
    /// that comes to no rest over what the bug did: that the bug's own harm is seen they do not show.
    pub fn broken_by(bug: Bug) -> &'static [Rule] {
        use Rule::*;
        match bug {
            Bug::FillingVotes
            | Bug::AnyEpoch
            | Bug::WriteNewOnly
            | Bug::HastyMove
            | Bug::HintCounts
            | Bug::OneSource
            | Bug::SameLife => &[Durability, Monotonic, Counters],
            Bug::SyncClears => &[Durability, Monotonic, Counters, Resurrection],
            Bug::NoBlockingRepair => &[Monotonic],
            Bug::ExpiredDropped | Bug::PurgeWithoutFence | Bug::NoTombstones => &[Durability, Monotonic, Resurrection],
            Bug::AgainWithNewVersion => &[OneVersion],
            Bug::AnyFuture => &[Future],
            Bug::JointUnion | Bug::VoterForgets => &[OneMap],
            Bug::FillNeverExpires => &[Expiry, Convergence],
            Bug::PageTooLate => &[Durability, Convergence],
        }
    }
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub rule: Rule,
    /// How.
    pub what: String,
    /// When it was seen, in microseconds.
    pub at: u64,
    /// The key, and whether it is a counter, if it is about one.
    pub key: Option<(u64, bool)>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.what)
    }
}

/// What later operations must see at least: a version, and whether it was deleted afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Floor {
    version: Version,
    /// Only what is newer may be seen.
    above: bool,
    /// A write, not only a read, has set it.
    written: bool,
    /// The version itself is a tombstone.
    grave: bool,
}

impl Floor {
    const NONE: Floor = Floor { version: Version::ZERO, above: false, written: false, grave: false };
}

fn violation(rule: Rule, op: &Op, what: String) -> Result<(), Violation> {
    Err(Violation { rule, what, at: op.end, key: Some((op.key, op.is_counter)) })
}

impl Op {
    fn is_read(&self) -> bool {
        matches!(self.came, Came::Found(_) | Came::Deleted(_))
    }

    /// A version of this operation is not higher than this.
    fn highest(&self, ahead_ms: Millis) -> Version {
        match self.came {
            Came::Written(version) => version,
            // A clock that has met a version in the future gives later ones than its own time.
            _ => Version { hlc: Hlc::at(EPOCH_MS + self.end / 1000 + ahead_ms + 2), node: u16::MAX },
        }
    }

    /// Whether it can have made its key absent, for a read that ended then.
    fn can_remove(&self, floor: Version, end: u64, ahead_ms: Millis) -> bool {
        let removes = match self.asked {
            Asked::Erase => true,
            Asked::Delete => self.came != Came::Deleted(false),
            Asked::Set { expires_at, .. } => expires_at != 0 && expires_at <= EPOCH_MS + end / 1000 + ahead_ms + 1,
            Asked::Get | Asked::Count => false,
        };
        removes && self.came != Came::Failed && self.call <= end && self.highest(ahead_ms) >= floor
    }

    fn describe(&self) -> String {
        let Op { client, node, key, asked, call, end, came, .. } = self;
        let quorum = if self.quorum { "quorum" } else { "one" };
        let kind = if self.is_counter { "counter" } else { "key" };
        let (call, end) = (call / 1000, end / 1000);
        format!("client {client} at node {node}, {kind} {key}, {quorum} {asked:?} {call}..{end} ms: {came:?}")
    }
}

impl History {
    /// Looks at everything.
    ///
    /// # Errors
    /// The first broken promise.
    pub fn check(&self) -> Result<(), Violation> {
        self.check_values()?;
        let mut keys: BTreeMap<(bool, u64), Vec<&Op>> = BTreeMap::new();
        self.ops.iter().for_each(|op| keys.entry((op.is_counter, op.key)).or_default().push(op));
        for ((is_counter, _), ops) in keys {
            if is_counter {
                check_counter(&ops, self.reads_are_monotonic)?;
            } else {
                self.check_key(&ops)?;
            }
        }
        Ok(())
    }

    /// What single reads may return at all.
    fn check_values(&self) -> Result<(), Violation> {
        let mut made: BTreeMap<u64, &Op> = BTreeMap::new();
        for op in &self.ops {
            if let Asked::Set { value, .. } = op.asked {
                made.insert(value, op);
            }
        }
        let mut version_of: BTreeMap<u64, Version> = BTreeMap::new();
        let mut value_of: BTreeMap<(u64, Version), u64> = BTreeMap::new();
        for op in &self.ops {
            let (value, version) = match (op.asked, op.came) {
                (Asked::Set { value, .. }, Came::Written(version)) => (value, version),
                (_, Came::Found(Some(seen))) => {
                    if seen.expires_at != 0 && op.wall >= seen.expires_at {
                        let late = op.wall - seen.expires_at;
                        return violation(Rule::Expiry, op, format!("served {late} ms late: {}", op.describe()));
                    }
                    if op.is_counter {
                        continue;
                    }
                    let Some(write) = made.get(&seen.value).filter(|write| write.key == op.key && !write.is_counter)
                    else {
                        return violation(Rule::OneVersion, op, format!("nobody wrote it: {}", op.describe()));
                    };
                    if write.came == Came::Failed {
                        let what = format!("{} saw {}", op.describe(), write.describe());
                        return violation(Rule::FailedNeverSeen, op, what);
                    }
                    let expires = matches!(write.asked, Asked::Set { expires_at, .. } if expires_at != seen.expires_at);
                    if write.call > op.end || expires {
                        return violation(Rule::OneVersion, op, format!("{} saw {}", op.describe(), write.describe()));
                    }
                    (seen.value, seen.version)
                }
                _ => continue,
            };
            let is_on_quorum = op.quorum && (self.reads_are_monotonic || matches!(op.came, Came::Written(_)));
            if let Some(sane) = self.sane_ahead_ms.filter(|_| is_on_quorum) {
                let ahead = version.hlc.millis().saturating_sub(EPOCH_MS + op.end / 1000);
                if ahead > sane + MAX_DRIFT_MS + 1 {
                    return violation(Rule::Future, op, format!("{ahead} ms ahead: {}", op.describe()));
                }
            }
            let known = *version_of.entry(value).or_insert(version);
            let holder = *value_of.entry((op.key, version)).or_insert(value);
            if known != version || holder != value {
                let what =
                    format!("value {value} has version {version:?}, and it or its version was seen with another: ");
                return violation(Rule::OneVersion, op, what + &op.describe());
            }
        }
        Ok(())
    }

    /// Durability, monotonic reads and resurrection of one key.
    fn check_key(&self, ops: &[&Op]) -> Result<(), Violation> {
        let mut removers: Vec<&Op> = ops
            .iter()
            .copied()
            .filter(|op| !matches!(op.asked, Asked::Get | Asked::Set { expires_at: 0, .. }) && op.came != Came::Failed)
            .collect();
        removers.sort_by_key(|op| std::cmp::Reverse(op.end));
        // One clock says that it is over, another one not yet.
        let expires = |op: &&Op| match (op.asked, op.came) {
            (Asked::Set { expires_at, .. }, Came::Written(version)) if expires_at != 0 => Some(version),
            (_, Came::Found(Some(seen))) if seen.expires_at != 0 => Some(seen.version),
            _ => None,
        };
        let expiring: BTreeSet<Version> = ops.iter().filter_map(expires).collect();
        let mut floor = Floor::NONE;
        let mut floors = vec![Floor::NONE; ops.len()];
        // At one time ends come after calls: such operations overlap.
        let mut events: Vec<(u64, bool, usize)> =
            (0..ops.len()).flat_map(|at| [(ops[at].call, false, at), (ops[at].end, true, at)]).collect();
        events.sort_unstable();
        for (_, is_end, at) in events {
            let op = ops[at];
            if !is_end {
                floors[at] = floor;
                continue;
            }
            if !op.quorum {
                continue;
            }
            let seen = floors[at];
            self.check_read(op, seen, &removers)?;
            let could_be_there = |other: &&Op| {
                let writes = matches!(other.asked, Asked::Set { .. }) && other.came != Came::Failed;
                writes && other.call <= op.end && other.highest(self.ahead_ms) >= seen.version
            };
            if op.came == Came::Deleted(true) && !ops.iter().any(could_be_there) {
                let what = format!("{} has deleted something, and nothing can be there", op.describe());
                return violation(Rule::Resurrection, op, what);
            }
            let next = match op.came {
                Came::Written(version) => {
                    Floor { version, above: false, written: true, grave: op.asked == Asked::Erase }
                }
                Came::Found(Some(found)) if self.reads_are_monotonic => {
                    Floor { version: found.version, above: false, written: false, grave: false }
                }
                Came::Deleted(true) => Floor { above: true, ..seen },
                // What hid it is on a quorum now, a tombstone too.
                Came::Found(None) | Came::Deleted(false)
                    if self.reads_are_monotonic && !expiring.contains(&seen.version) =>
                {
                    Floor { above: true, ..seen }
                }
                _ => continue,
            };
            floor = floor.max(next);
        }
        Ok(())
    }

    fn check_read(&self, op: &Op, floor: Floor, removers: &[&Op]) -> Result<(), Violation> {
        let behind = || match () {
            () if floor.above || floor.grave => Rule::Resurrection,
            () if floor.written => Rule::Durability,
            () => Rule::Monotonic,
        };
        match op.came {
            Came::Found(Some(seen)) => {
                let is_fine = if floor.above { seen.version > floor.version } else { seen.version >= floor.version };
                if !is_fine {
                    return violation(behind(), op, format!("{} must see {floor:?} or newer", op.describe()));
                }
            }
            Came::Found(None) | Came::Deleted(false) => {
                let is_fine = floor.version == Version::ZERO
                    || floor.above
                    || floor.grave
                    || removers.iter().any(|other| other.can_remove(floor.version, op.end, self.ahead_ms));
                if !is_fine {
                    return violation(behind(), op, format!("{} must see {floor:?}, nobody deleted it", op.describe()));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// A counter never goes back behind a count that was acknowledged, no two counts return the same, and in the end it is what was
/// counted.
fn check_counter(ops: &[&Op], reads_are_monotonic: bool) -> Result<(), Violation> {
    let value = |op: &Op| match op.came {
        Came::Counted(n) => Some(n),
        Came::Found(found) => Some(found.map_or(0, |seen| seen.value)),
        _ => None,
    };
    let mut events: Vec<(u64, bool, usize)> =
        (0..ops.len()).flat_map(|at| [(ops[at].call, false, at), (ops[at].end, true, at)]).collect();
    events.sort_unstable();
    let (mut floor, mut possible, mut acked) = (0, 0, 0);
    let mut floors = vec![(0, 0); ops.len()];
    let mut returned = BTreeSet::new();
    for (_, is_end, at) in events {
        let op = ops[at];
        if !is_end {
            floors[at] = (floor, acked);
            possible += u64::from(op.asked == Asked::Count && op.came != Came::Failed);
            continue;
        }
        let Some(n) = value(op).filter(|_| op.quorum) else { continue };
        let (seen, done) = floors[at];
        let counts = matches!(op.came, Came::Counted(_));
        let wrong = match () {
            () if counts && !returned.insert(n) => "another count returned the same",
            () if n < seen || counts && n == seen => "the counter went back",
            () if n < done => "a count is lost",
            () if n > possible => "there are more counts than were asked for",
            () => "",
        };
        if !wrong.is_empty() {
            let what =
                format!("{wrong}: {} (had been {seen}, {done} acknowledged, {possible} possible)", op.describe());
            return violation(Rule::Counters, op, what);
        }
        // A read may see a count whose outcome is unknown, and which the next orderer, who did not see it, undoes.
        let is_known = returned.last().is_some_and(|&last| last >= n);
        if counts || reads_are_monotonic && is_known {
            floor = floor.max(n);
        }
        acked += u64::from(counts);
    }
    Ok(())
}

impl History {
    /// How many operations ended so that something is promised about them.
    pub fn checked(&self) -> usize {
        self.ops
            .iter()
            .filter(|op| op.quorum && (op.is_read() || matches!(op.came, Came::Written(_) | Came::Counted(_))))
            .count()
    }
}
