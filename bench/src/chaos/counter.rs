//! What a counter may say that only one client increments, one increment after the other.
//!
//! ```text
//!   floor                   what the last acknowledged increment said: all of those are in, from now on
//!   floor + open            the most: each increment that is unknown may be in, now or later, once
//! ```
//!
//! A read is held against both but moves neither: what it saw of an unknown increment may be undone by one that another
//! orderer began before (docs/CONSISTENCY.md, conditional commands). A refused increment is never in.

use super::ledger::{Contradiction, Ending};

/// One counter.
#[derive(Clone, Debug, Default)]
pub(super) struct Counter {
    floor: i64,
    /// Unknown increments that no acknowledged one has counted.
    open: i64,
}

impl Counter {
    /// Notes that an increment was acknowledged, and what it says the counter is now.
    pub(super) fn incremented(&mut self, says: i64) -> Result<(), Contradiction> {
        let (least, most) = (self.floor + 1, self.floor + 1 + self.open);
        // Whatever is wrong is told once.
        self.open = (most - says).clamp(0, self.open);
        self.floor = says;
        within(says, least, most)
    }

    /// Notes that an increment was not acknowledged.
    pub(super) fn failed(&mut self, ending: Ending) {
        self.open += i64::from(ending == Ending::Unknown);
    }

    /// Holds what a read found against what may be there.
    pub(super) fn found(&self, says: i64) -> Result<(), Contradiction> {
        within(says, self.floor, self.floor + self.open)
    }

    /// For people: what the counter may be.
    pub(super) fn expected(&self) -> String {
        match self.open {
            0 => self.floor.to_string(),
            open => format!("{} to {}", self.floor, self.floor + open),
        }
    }
}

/// Too little: an acknowledged increment is lost. Too much: one was refused and done, or done twice.
fn within(says: i64, least: i64, most: i64) -> Result<(), Contradiction> {
    match says {
        _ if says < least => Err(Contradiction::Lost),
        _ if says > most => Err(Contradiction::Unmade),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acknowledged(count: i64) -> Counter {
        let mut counter = Counter::default();
        (1..=count).for_each(|says| assert_eq!(counter.incremented(says), Ok(())));
        counter
    }

    #[test]
    fn each_acknowledged_increment_is_in_once() {
        let mut counter = acknowledged(3);
        assert_eq!(counter.found(3), Ok(()));
        assert_eq!(counter.found(2), Err(Contradiction::Lost));
        assert_eq!(counter.found(4), Err(Contradiction::Unmade));
        assert_eq!(counter.clone().incremented(3), Err(Contradiction::Lost), "the same number twice");
        assert_eq!(counter.clone().incremented(5), Err(Contradiction::Unmade));
        counter.failed(Ending::Refused);
        assert_eq!(counter.found(4), Err(Contradiction::Unmade), "it was refused");
    }

    #[test]
    fn an_unknown_increment_is_in_or_not_or_comes_later() {
        let mut counter = acknowledged(3);
        counter.failed(Ending::Unknown);
        counter.failed(Ending::Unknown);
        assert_eq!(counter.expected(), "3 to 5");
        assert_eq!((counter.found(3), counter.found(5), counter.found(4)), (Ok(()), Ok(()), Ok(())));
        assert_eq!(counter.found(6), Err(Contradiction::Unmade));
        assert_eq!(counter.incremented(5), Ok(()), "one of the two is in");
        assert_eq!(counter.expected(), "5 to 6");
        assert_eq!(counter.incremented(7), Ok(()), "the other one came");
        assert_eq!(counter.incremented(9), Err(Contradiction::Unmade), "there are no more");
    }

    #[test]
    fn what_an_acknowledged_increment_said_is_not_taken_back() {
        let mut counter = acknowledged(3);
        counter.failed(Ending::Unknown);
        assert_eq!(counter.incremented(4), Ok(()));
        assert_eq!(counter.incremented(4), Err(Contradiction::Lost));
        assert_eq!(counter.incremented(3), Err(Contradiction::Lost));
        assert_eq!(counter.incremented(4), Ok(()), "it is told once");
    }
}
