//! What the files of a directory are called, and which of them still count. Pure.
//!
//! ```text
//!   000003-000002-00000-00128.log        start 3 of the node, number 2 of the core, shards 0 to 127
//!   000003-000002-00000-00128.snapshot   those shards as they were when log 2 began, or later
//! ```
//!
//! A snapshot stands for all files of its shards with a lower start or number. Cores of one start own different shards, so of each
//! shard files follow each other: the newest snapshot, then the logs from its number on, then those of later starts.

use std::ops::Range;

/// What a file is. A snapshot comes before the log that began with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Snapshot,
    Log,
}

/// The name of a file. Files of a shard are read in the order of their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Name {
    /// How often the node had been started in this directory.
    pub(crate) start: u32,
    /// Counts the logs of a core within a start, from 0.
    pub(crate) number: u32,
    pub(crate) kind: Kind,
    /// The first shard, and the one behind the last.
    pub(crate) first: u16,
    pub(crate) end: u16,
}

/// Where a file stands among those of its shards.
pub(crate) type Age = (u32, u32);

impl Name {
    pub(crate) fn age(&self) -> Age {
        (self.start, self.number)
    }

    pub(crate) fn shards(&self) -> Range<u16> {
        self.first..self.end
    }

    /// As a file is called while it is made.
    pub(crate) fn unfinished(&self) -> String {
        format!("{self}.new")
    }

    pub(crate) fn parse(name: &str) -> Option<Name> {
        let (numbers, kind) = name.split_once('.')?;
        let kind = match kind {
            "log" => Kind::Log,
            "snapshot" => Kind::Snapshot,
            _ => return None,
        };
        let mut numbers = numbers.split('-');
        let mut next = |digits| numbers.next().filter(|n| n.len() >= digits && n.bytes().all(|b| b.is_ascii_digit()));
        let (start, number) = (next(6)?.parse().ok()?, next(6)?.parse().ok()?);
        let (first, end) = (next(5)?.parse().ok()?, next(5)?.parse().ok()?);
        (numbers.next().is_none() && first < end).then_some(Name { start, number, kind, first, end })
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            Kind::Snapshot => "snapshot",
            Kind::Log => "log",
        };
        write!(f, "{:06}-{:06}-{:05}-{:05}.{kind}", self.start, self.number, self.first, self.end)
    }
}

/// Which files still count for which shards.
pub(crate) struct Newest<'a>(&'a [Name]);

impl<'a> Newest<'a> {
    pub(crate) fn new(names: &'a [Name]) -> Newest<'a> {
        Newest(names)
    }

    /// The age of the newest snapshot of a shard.
    fn of(&self, shard: u16) -> Option<Age> {
        let of_shard = self.0.iter().filter(|name| name.kind == Kind::Snapshot && name.shards().contains(&shard));
        of_shard.map(Name::age).max()
    }

    /// Whether what a file says of a shard counts.
    pub(crate) fn counts(&self, name: &Name, shard: u16) -> bool {
        match self.of(shard) {
            Some(newest) if name.kind == Kind::Snapshot => name.age() == newest,
            Some(newest) => name.age() >= newest,
            None => true,
        }
    }

    /// Whether nothing that a file says counts any more.
    pub(crate) fn is_obsolete(&self, name: &Name) -> bool {
        !name.shards().any(|shard| self.counts(name, shard))
    }

    /// Whether a log goes on from a snapshot of its own age, so that the log before it is not needed.
    pub(crate) fn has_base(&self, log: &Name) -> bool {
        self.0.contains(&Name { kind: Kind::Snapshot, ..*log })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap_or_else(|| panic!("{text}"))
    }

    #[test]
    fn names_are_read_as_they_are_written_and_sort_in_the_order_of_reading() {
        let texts = [
            "000001-000000-00000-00256.log",
            "000001-000001-00000-00256.snapshot",
            "000001-000001-00000-00256.log",
            "000002-000000-00000-00128.log",
            "1234567-000000-00000-16384.log",
        ];
        let names = texts.map(name);
        assert_eq!(names.map(|name| name.to_string()), texts);
        assert!(names.is_sorted());
        for wrong in [
            "000001-000000-00000-00256.log.new",
            "000001-000000-00000-00000.log",
            "1-0-0-256.log",
            "000001-000000-00000-00256-1.log",
            "+00001-000000-00000-00256.log",
            "LOCK",
            "",
        ] {
            assert_eq!(Name::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_snapshot_stands_for_what_is_older_of_its_shards() {
        let names = [
            name("000001-000000-00000-00256.log"),
            name("000001-000001-00000-00256.snapshot"),
            name("000001-000001-00000-00256.log"),
            name("000002-000000-00000-00128.log"),
            name("000002-000000-00128-00256.log"),
            name("000002-000001-00000-00128.snapshot"),
            name("000002-000001-00000-00128.log"),
        ];
        let newest = Newest::new(&names);
        let obsolete: Vec<_> = names.iter().map(|name| newest.is_obsolete(name)).collect();
        // The first snapshot still counts for the upper half, whose second core has made none.
        assert_eq!(obsolete, [true, false, false, true, false, false, false]);
        assert!(newest.counts(&names[1], 128) && !newest.counts(&names[1], 127));
        assert!(newest.counts(&names[2], 128) && !newest.counts(&names[2], 127));
        assert!(newest.counts(&names[6], 127) && newest.has_base(&names[6]) && !newest.has_base(&names[4]));
    }
}
