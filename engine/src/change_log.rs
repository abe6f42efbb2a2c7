//! The recent changes of a shard, for readers that follow it.
//!
//! A ring of `{hash, hlc}`: sixteen bytes per write, no copy of key or value. A reader asks from a sequence number on and
//! looks the entries up by hash; whatever it finds there is at least as new as the change. The log is a cache: a reader
//! that is too slow is told so with [`Gap`] and compares digests instead. Nothing is ever lost by an overflow.

use crate::hash::KeyHash;
use crate::hlc::Hlc;

/// One change: which hash, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Hash of the key that changed.
    pub hash: KeyHash,
    /// Timestamp of the write.
    pub hlc: Hlc,
}

/// The reader fell off: changes before `first` are forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("changes before {first} are no longer in the log")]
pub struct Gap {
    /// Oldest sequence number still there.
    pub first: u64,
}

/// Entries that a log starts with.
const FIRST_ENTRIES: usize = 16;

/// Ring of the newest changes of one shard.
#[derive(Debug)]
pub struct ChangeLog {
    ring: Vec<Change>,
    bound: usize,
    next: u64,
}

impl ChangeLog {
    /// An empty log that keeps up to `bound` changes, rounded down to a power of two, one at least.
    pub fn new(bound: usize) -> ChangeLog {
        let bound = if bound.is_power_of_two() { bound } else { (bound.max(1)).next_power_of_two() / 2 };
        ChangeLog { ring: Vec::new(), bound: bound.max(1), next: 0 }
    }

    /// Adds a change. Returns by how many bytes the log grew.
    #[inline]
    pub fn push(&mut self, change: Change) -> usize {
        let at = self.next as usize & (self.bound - 1);
        self.next += 1;
        match self.ring.get_mut(at) {
            Some(oldest) => {
                *oldest = change;
                0
            }
            None => self.append(change),
        }
    }

    /// Until the bound is reached the ring is a plain vector: position and sequence number are the same.
    #[cold]
    fn append(&mut self, change: Change) -> usize {
        let before = self.ring.capacity();
        if self.ring.len() == before {
            self.ring.reserve_exact(before.max(FIRST_ENTRIES).min(self.bound - before));
        }
        self.ring.push(change);
        (self.ring.capacity() - before) * size_of::<Change>()
    }

    /// Forgets all changes and gives their memory back: every reader, also one that was up to date, gets a [`Gap`]. Returns
    /// by how many bytes the log shrank.
    pub fn forget(&mut self) -> usize {
        let freed = std::mem::take(&mut self.ring).capacity() * size_of::<Change>();
        // At a multiple of the bound, positions and sequence numbers agree again.
        self.next = (self.next / self.bound as u64 + 1) * self.bound as u64;
        freed
    }

    /// Sequence number that the next change will get; the first is 0.
    pub fn next_seq(&self) -> u64 {
        self.next
    }

    /// Changes held.
    pub fn len(&self) -> usize {
        self.ring.len()
    }

    /// Whether no change is held.
    pub fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }

    /// The changes from sequence number `from` on, oldest first.
    ///
    /// # Errors
    /// [`Gap`] when some of them are forgotten.
    pub fn read(&self, from: u64) -> Result<impl Iterator<Item = Change> + '_, Gap> {
        let first = self.next - self.ring.len() as u64;
        if from < first {
            return Err(Gap { first });
        }
        Ok((from..self.next).map(|seq| self.ring[seq as usize & (self.bound - 1)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(n: u64) -> Change {
        Change { hash: KeyHash(n), hlc: Hlc(n) }
    }

    #[test]
    fn a_reader_that_keeps_up_sees_every_change_once() {
        let mut log = ChangeLog::new(64);
        let (mut seen, mut from) = (Vec::new(), 0);
        for n in 0..1000 {
            log.push(change(n));
            if n % 50 == 0 {
                seen.extend(log.read(from).unwrap().map(|c| c.hash.0));
                from = log.next_seq();
            }
        }
        seen.extend(log.read(from).unwrap().map(|c| c.hash.0));
        assert!(seen.into_iter().eq(0..1000));
    }

    #[test]
    fn a_reader_that_fell_off_is_told_where_the_log_begins() {
        let mut log = ChangeLog::new(8192);
        for n in 0..8192 {
            log.push(change(n));
        }
        assert_eq!(log.read(0).unwrap().count(), 8192);
        log.push(change(8192));
        assert_eq!(log.read(0).err(), Some(Gap { first: 1 }));
        assert_eq!(log.read(1).unwrap().next(), Some(change(1)));
        assert_eq!(log.read(log.next_seq()).unwrap().count(), 0);
    }

    #[test]
    fn memory_is_bounded_and_reported_as_it_grows() {
        let mut log = ChangeLog::new(100);
        let grown: usize = (0..10_000).map(|n| log.push(change(n))).sum();
        assert_eq!((log.len(), grown), (64, 64 * size_of::<Change>()));
    }

    #[test]
    fn a_log_that_forgot_starts_again_for_every_reader() {
        let mut log = ChangeLog::new(8);
        for filled in [0, 3, 8, 20] {
            for n in 0..filled {
                log.push(change(n));
            }
            let followed = log.next_seq();
            log.forget();
            let first = log.next_seq();
            assert_eq!(log.read(followed).err(), Some(Gap { first }), "up to date, and told so");
            for n in 0..20 {
                log.push(change(n));
                let newest = log.read(first + n).unwrap().map(|change| change.hash.0);
                assert_eq!(newest.collect::<Vec<_>>(), [n]);
            }
            assert_eq!(log.len(), 8);
            log.forget();
        }
    }
}
