//! What may be found under one key, from what its only writer was told.
//!
//! ```text
//!   acknowledged   it is the floor: nothing older may be found from now on
//!   unknown        it may be found, now or later, until a later write is acknowledged or a later one was found
//!   refused        it may never be found
//!   found          it is the floor from now on: quorum reads do not go back
//! ```
//!
//! A deletion reads first and says whether there was something: that is a read, too. If there was nothing it has written
//! nothing, so it is no floor: an unknown write of before may still come.
//!
//! Each write of a key has the next number, deletions too; a value says its number. The last few operations are remembered, to
//! be told when something is wrong. Not here: who asks, and whom.

use std::collections::VecDeque;
use std::time::Duration;

/// Operations that are remembered.
const REMEMBERED: usize = 6;

/// A write by its number: what it leaves under the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Write {
    number: u64,
    deletes: bool,
}

/// How a write ended for its writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Acknowledged,
    /// Neither acknowledged nor refused, or the connection ended.
    Unknown,
    Refused,
}

/// What a read contradicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contradiction {
    /// Older than what was acknowledged or read before, or gone: an acknowledged write is lost.
    Lost,
    /// The value of before a deletion that was acknowledged.
    Resurrected,
    /// A write that was refused, or that nobody made.
    Unmade,
}

/// The last write of a key that was made for sure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Floor {
    /// There is none.
    Never,
    Written,
    Deleted,
}

/// One key.
#[derive(Clone, Debug)]
pub(super) struct Ledger {
    last: u64,
    floor: Write,
    /// After the floor, in order.
    unknown: Vec<Write>,
    past: VecDeque<Past>,
}

/// An operation as it was: when it began and ended, and at which node.
#[derive(Clone, Copy, Debug)]
struct Past {
    what: &'static str,
    number: u64,
    node: usize,
    began: Duration,
    ended: Duration,
}

impl Ledger {
    /// A key that was never written.
    pub(super) fn new() -> Ledger {
        Ledger { last: 0, floor: Write { number: 0, deletes: true }, unknown: Vec::new(), past: VecDeque::new() }
    }

    /// The number of the next write.
    pub(super) fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Notes how the write `number` ended.
    pub(super) fn ended(&mut self, number: u64, deletes: bool, ending: Ending) {
        let write = Write { number, deletes };
        match ending {
            Ending::Acknowledged => {
                self.floor = write;
                self.unknown.retain(|other| other.number > number);
            }
            Ending::Unknown => self.unknown.push(write),
            Ending::Refused => {}
        }
    }

    /// Notes what a quorum read found: the number of a value, or none.
    pub(super) fn found(&mut self, found: Option<u64>) -> Result<(), Contradiction> {
        let is_it = |write: &Write| match found {
            Some(number) => !write.deletes && write.number == number,
            None => write.deletes,
        };
        if is_it(&self.floor) {
            return Ok(());
        }
        if let Some(at) = self.unknown.iter().position(is_it) {
            // Of several deletions the earliest: what is not known for sure is not held against anybody.
            self.floor = self.unknown[at];
            self.unknown.drain(..=at);
            return Ok(());
        }
        Err(match found {
            Some(number) if number > self.floor.number => Contradiction::Unmade,
            Some(_) if self.floor.deletes => Contradiction::Resurrected,
            _ => Contradiction::Lost,
        })
    }

    /// Notes that the deletion `number` was acknowledged, and whether it says that something was there. From then on
    /// nothing older may be found, whatever it contradicts, so that one mistake is told once.
    pub(super) fn deleted(&mut self, number: u64, existed: bool) -> Result<(), Contradiction> {
        if !existed {
            return self.found(None);
        }
        let possible = !self.floor.deletes || self.unknown.iter().any(|write| !write.deletes);
        let wrong = if self.floor.number > 0 { Contradiction::Resurrected } else { Contradiction::Unmade };
        self.ended(number, true, Ending::Acknowledged);
        if possible { Ok(()) } else { Err(wrong) }
    }

    /// What is there for sure if nothing is open.
    pub(super) fn floor(&self) -> Floor {
        match self.floor {
            Write { number: 0, .. } => Floor::Never,
            Write { deletes: true, .. } => Floor::Deleted,
            Write { .. } => Floor::Written,
        }
    }

    /// Whether something else than the floor may be found.
    pub(super) fn is_open(&self) -> bool {
        !self.unknown.is_empty()
    }

    /// Remembers an operation.
    pub(super) fn remember(&mut self, what: &'static str, number: u64, node: usize, time: (Duration, Duration)) {
        if self.past.len() == REMEMBERED {
            self.past.pop_front();
        }
        self.past.push_back(Past { what, number, node, began: time.0, ended: time.1 });
    }

    /// For people: the last operations.
    pub(super) fn past(&self) -> String {
        let word = |past: &Past| {
            let Past { what, number, node, began, ended } = past;
            let number = if *number > 0 { format!(" {number}") } else { String::new() };
            format!("{what}{number} at node {node} from {:.6} to {:.6} s", began.as_secs_f64(), ended.as_secs_f64())
        };
        self.past.iter().map(word).collect::<Vec<_>>().join("; ")
    }

    /// For people: what may be found.
    pub(super) fn expected(&self) -> String {
        let word = |write: &Write| match write {
            Write { number: 0, .. } => "nothing".to_owned(),
            Write { number, deletes: true } => format!("nothing (deletion {number})"),
            Write { number, .. } => format!("{number}"),
        };
        let mut text = word(&self.floor);
        for write in &self.unknown {
            text += &format!(" or {}", word(write));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(endings: &[(bool, Ending)]) -> Ledger {
        let mut ledger = Ledger::new();
        for &(deletes, ending) in endings {
            let number = ledger.next();
            ledger.ended(number, deletes, ending);
        }
        ledger
    }

    const SET: bool = false;
    const DELETE: bool = true;

    #[test]
    fn nothing_older_than_what_was_acknowledged_is_found() {
        let mut ledger = written(&[(SET, Ending::Acknowledged), (SET, Ending::Acknowledged)]);
        assert_eq!(ledger.found(Some(2)), Ok(()));
        assert_eq!(ledger.found(Some(1)), Err(Contradiction::Lost));
        assert_eq!(ledger.found(None), Err(Contradiction::Lost));
        assert_eq!(ledger.found(Some(3)), Err(Contradiction::Unmade));
    }

    #[test]
    fn an_unknown_write_is_found_or_not_but_never_taken_back() {
        let endings = [(SET, Ending::Acknowledged), (SET, Ending::Unknown), (SET, Ending::Unknown)];
        let mut ledger = written(&endings);
        assert_eq!(ledger.found(Some(1)), Ok(()));
        assert_eq!(ledger.found(Some(2)), Ok(()));
        assert_eq!(ledger.found(Some(1)), Err(Contradiction::Lost));
        assert_eq!(ledger.found(Some(3)), Ok(()), "it may come later");
        assert_eq!(ledger.found(Some(2)), Err(Contradiction::Lost));
        let mut ledger = written(&[(SET, Ending::Unknown), (SET, Ending::Acknowledged)]);
        assert_eq!(ledger.found(Some(1)), Err(Contradiction::Lost), "a later one was acknowledged");
        assert_eq!(ledger.found(Some(2)), Ok(()));
    }

    #[test]
    fn what_was_deleted_stays_deleted() {
        let mut ledger = written(&[(SET, Ending::Acknowledged), (DELETE, Ending::Acknowledged)]);
        assert_eq!(ledger.found(None), Ok(()));
        assert_eq!(ledger.found(Some(1)), Err(Contradiction::Resurrected));
        let mut ledger = written(&[(SET, Ending::Acknowledged), (DELETE, Ending::Unknown)]);
        assert_eq!(ledger.found(Some(1)), Ok(()));
        assert_eq!(ledger.found(None), Ok(()));
        assert_eq!(ledger.found(Some(1)), Err(Contradiction::Resurrected), "its deletion was seen");
    }

    #[test]
    fn a_deletion_says_what_it_found() {
        let mut ledger = written(&[(SET, Ending::Acknowledged)]);
        let number = ledger.next();
        assert_eq!(ledger.clone().deleted(number, true), Ok(()));
        assert_eq!(ledger.deleted(number, false), Err(Contradiction::Lost), "there was an acknowledged value");
        let mut ledger = written(&[(SET, Ending::Acknowledged), (DELETE, Ending::Acknowledged)]);
        let number = ledger.next();
        assert_eq!(ledger.clone().deleted(number, false), Ok(()));
        assert_eq!(ledger.deleted(number, true), Err(Contradiction::Resurrected));
        assert_eq!(ledger.found(None), Ok(()), "it is told once");
        assert_eq!(Ledger::new().deleted(1, false), Ok(()));
        assert_eq!(Ledger::new().deleted(1, true), Err(Contradiction::Unmade));
    }

    #[test]
    fn a_deletion_that_found_nothing_leaves_open_what_was_open() {
        let mut ledger = written(&[(DELETE, Ending::Acknowledged), (SET, Ending::Unknown)]);
        let number = ledger.next();
        assert_eq!(ledger.clone().deleted(number, true), Ok(()), "the unknown write was there");
        assert_eq!(ledger.deleted(number, false), Ok(()));
        assert_eq!(ledger.found(Some(2)), Ok(()), "it wrote nothing, so that one may still come");
        let mut ledger = written(&[(DELETE, Ending::Acknowledged), (SET, Ending::Unknown)]);
        let number = ledger.next();
        assert_eq!(ledger.deleted(number, true), Ok(()));
        assert_eq!(ledger.found(Some(2)), Err(Contradiction::Resurrected));
    }

    #[test]
    fn a_refused_write_is_never_found() {
        let mut ledger = written(&[(SET, Ending::Acknowledged), (SET, Ending::Refused)]);
        assert_eq!(ledger.found(Some(1)), Ok(()));
        assert_eq!(ledger.found(Some(2)), Err(Contradiction::Unmade));
        assert_eq!(Ledger::new().found(None), Ok(()));
        assert_eq!(Ledger::new().found(Some(1)), Err(Contradiction::Unmade));
    }
}
