//! Flags and ACL categories of commands: sets of bits with Redis's names, written as words in the table.
//!
//! Words are read at compile time; an unknown word does not compile.

/// Redis's command flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Flags(u32);

/// ACL categories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Categories(u32);

const FLAG_NAMES: [&str; 12] = [
    "write",
    "denyoom",
    "readonly",
    "admin",
    "noscript",
    "loading",
    "stale",
    "skip_slowlog",
    "fast",
    "no_auth",
    "no_multi",
    "allow_busy",
];

const CATEGORY_NAMES: [&str; 11] = [
    "keyspace",
    "read",
    "write",
    "string",
    "bitmap",
    "admin",
    "fast",
    "slow",
    "dangerous",
    "connection",
    "transaction",
];

impl Flags {
    /// Changes data.
    pub const WRITE: Flags = Flags::of("write");
    /// Refused when memory is full.
    pub const DENYOOM: Flags = Flags::of("denyoom");
    /// Reads data only.
    pub const READONLY: Flags = Flags::of("readonly");
    /// For operators.
    pub const ADMIN: Flags = Flags::of("admin");
    /// Takes constant or logarithmic time.
    pub const FAST: Flags = Flags::of("fast");
    /// Allowed before authentication.
    pub const NO_AUTH: Flags = Flags::of("no_auth");
    /// Not allowed in a transaction.
    pub const NO_MULTI: Flags = Flags::of("no_multi");

    /// The flags of a list of words.
    pub(super) const fn of(words: &str) -> Flags {
        Flags(bits(words, &FLAG_NAMES))
    }

    /// Whether all of `other` are set.
    #[inline]
    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Names of the set flags.
    pub fn names(self) -> impl Iterator<Item = &'static str> + Clone {
        names(self.0, &FLAG_NAMES)
    }
}

impl Categories {
    /// Those that the words name and those that follow from flags and group.
    pub(super) const fn of(words: &str, flags: Flags, group: &str) -> Categories {
        let mut all = bits(words, &CATEGORY_NAMES);
        if flags.contains(Flags::WRITE) {
            all |= bits("write", &CATEGORY_NAMES);
        }
        if flags.contains(Flags::READONLY) {
            all |= bits("read", &CATEGORY_NAMES);
        }
        if flags.contains(Flags::ADMIN) {
            all |= bits("admin dangerous", &CATEGORY_NAMES);
        }
        all |= bits(if flags.contains(Flags::FAST) { "fast" } else { "slow" }, &CATEGORY_NAMES);
        if same(group.as_bytes(), b"string") {
            all |= bits("string", &CATEGORY_NAMES);
        }
        if same(group.as_bytes(), b"bitmap") {
            all |= bits("bitmap", &CATEGORY_NAMES);
        }
        if same(group.as_bytes(), b"transactions") {
            all |= bits("transaction", &CATEGORY_NAMES);
        }
        Categories(all)
    }

    /// Whether the category of that name (without `@`, lower case) is set.
    pub fn contains(self, name: &str) -> bool {
        self.names().any(|known| known == name)
    }

    /// Names of the set categories, without `@`.
    pub fn names(self) -> impl Iterator<Item = &'static str> + Clone {
        names(self.0, &CATEGORY_NAMES)
    }
}

fn names<const N: usize>(bits: u32, of: &'static [&'static str; N]) -> impl Iterator<Item = &'static str> + Clone {
    of.iter().enumerate().filter(move |(at, _)| bits >> at & 1 == 1).map(|(_, name)| *name)
}

/// The bits of the words (separated by one space) that are in `names`.
const fn bits(words: &str, names: &[&str]) -> u32 {
    let words = words.as_bytes();
    let (mut all, mut from) = (0, 0);
    while from < words.len() {
        let mut to = from;
        while to < words.len() && words[to] != b' ' {
            to += 1;
        }
        let (_, rest) = words.split_at(from);
        let (word, _) = rest.split_at(to - from);
        let mut at = 0;
        while !same(names[at].as_bytes(), word) {
            at += 1;
            assert!(at < names.len(), "unknown word in the command table");
        }
        all |= 1 << at;
        from = to + 1;
    }
    all
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut at = 0;
    while at < a.len() {
        if a[at] != b[at] {
            return false;
        }
        at += 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_bits_and_names_again() {
        let flags = Flags::of("write fast");
        assert!(flags.contains(Flags::WRITE) && flags.contains(Flags::FAST) && !flags.contains(Flags::READONLY));
        assert_eq!(flags.names().collect::<Vec<_>>(), ["write", "fast"]);
        let categories = Categories::of("keyspace", flags, "generic");
        assert_eq!(categories.names().collect::<Vec<_>>(), ["keyspace", "write", "fast"]);
    }
}
