//! From a name, in any case, to its row: two words, one multiplication, one probe.
//!
//! A name of up to 16 bytes becomes two words that together with its length are one-to-one with its bytes (the words
//! overlap in the middle of the name), lower-cased with word-wide arithmetic. A multiplicative hash of them picks a
//! slot of a small open-addressed index that is computed at compile time. No allocation, no loop over bytes.

use super::Spec;
use super::table::SPECS;

/// Longest name in the table, without its container.
const LONGEST: usize = 16;
const SLOTS: usize = 512;
const EMPTY: u16 = u16::MAX;

#[derive(Clone, Copy, PartialEq, Eq)]
struct Folded {
    low: u64,
    high: u64,
    len: u64,
}

static FOLDED: [Folded; SPECS.len()] = {
    let mut all = [Folded { low: 0, high: 0, len: 0 }; SPECS.len()];
    let mut at = 0;
    while at < SPECS.len() {
        if is_top(SPECS[at].name.as_bytes()) {
            all[at] = fold(SPECS[at].name.as_bytes()).expect("a name is at most 16 bytes long");
        }
        at += 1;
    }
    all
};

static INDEX: [u16; SLOTS] = {
    let mut index = [EMPTY; SLOTS];
    let mut at = 0;
    while at < SPECS.len() {
        if is_top(SPECS[at].name.as_bytes()) {
            let mut slot = FOLDED[at].slot();
            while index[slot] != EMPTY {
                slot = (slot + 1) % SLOTS;
            }
            index[slot] = at as u16;
        }
        at += 1;
    }
    index
};

/// The command of that name, in any case; subcommands are found by [`Spec::subcommand`].
#[inline]
pub fn lookup(name: &[u8]) -> Option<&'static Spec> {
    let folded = fold(name)?;
    let mut slot = folded.slot();
    loop {
        let at = INDEX[slot];
        if at == EMPTY {
            return None;
        }
        if FOLDED[usize::from(at)].same(folded) {
            return Some(&SPECS[usize::from(at)]);
        }
        slot = (slot + 1) % SLOTS;
    }
}

impl Folded {
    #[inline]
    const fn slot(self) -> usize {
        let mixed = (self.low ^ self.high.rotate_left(29) ^ self.len).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (mixed >> (64 - SLOTS.trailing_zeros())) as usize
    }

    #[inline]
    const fn same(self, other: Folded) -> bool {
        self.low == other.low && self.high == other.high && self.len == other.len
    }
}

const fn is_top(name: &[u8]) -> bool {
    let mut at = 0;
    while at < name.len() {
        if name[at] == b'|' {
            return false;
        }
        at += 1;
    }
    true
}

/// `None` for names too short or too long to be in the table.
#[inline]
const fn fold(name: &[u8]) -> Option<Folded> {
    let len = name.len();
    let (low, high) = match len {
        0 => return None,
        1..=3 => (name[0] as u64 | (name[len / 2] as u64) << 8 | (name[len - 1] as u64) << 16, 0),
        4..=7 => (four(name, 0) | four(name, len - 4) << 32, 0),
        8..=LONGEST => (four(name, 0) | four(name, 4) << 32, four(name, len - 8) | four(name, len - 4) << 32),
        _ => return None,
    };
    Some(Folded { low: lower(low), high: lower(high), len: len as u64 })
}

#[inline]
const fn four(name: &[u8], at: usize) -> u64 {
    u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]) as u64
}

/// Each of the eight bytes, if an ASCII capital, made small.
#[inline]
const fn lower(word: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let seven = word & (ONES * 0x7F);
    let from_a = seven + ONES * (0x80 - b'A' as u64);
    let beyond_z = seven + ONES * (0x7F - b'Z' as u64);
    let capital = (from_a ^ beyond_z) & !word & (ONES * 0x80);
    word | capital >> 2
}

#[cfg(test)]
mod tests {
    use super::super::all;
    use super::*;

    #[test]
    fn every_command_is_found_in_any_case_and_nothing_near_it_is() {
        for spec in all() {
            let upper = spec.name.to_ascii_uppercase();
            let mixed: String = spec
                .name
                .chars()
                .enumerate()
                .map(|(i, c)| if i % 2 == 0 { c.to_ascii_uppercase() } else { c })
                .collect();
            for name in [spec.name, &upper, &mixed] {
                assert_eq!(lookup(name.as_bytes()).map(|found| found.name), Some(spec.name));
            }
            for at in 0..spec.name.len() {
                for flip in [0x20_u8, 0x80, 0x01, 0x40] {
                    let mut near = spec.name.as_bytes().to_vec();
                    near[at] ^= flip;
                    let found = lookup(&near).map(|found| found.name.as_bytes().to_vec());
                    assert!(found.is_none() || found.is_some_and(|name| name.eq_ignore_ascii_case(&near)));
                }
            }
            assert!(lookup(format!("{}x", spec.name).as_bytes()).is_none_or(|found| found.name != spec.name));
        }
        for absent in ["", "x", "client|id", "a name of more than sixteen bytes"] {
            assert!(lookup(absent.as_bytes()).is_none(), "{absent}");
        }
    }

    #[test]
    fn folding_lowers_letters_only() {
        for byte in 0..=255_u8 {
            assert_eq!(lower(u64::from(byte)), u64::from(byte.to_ascii_lowercase()));
            assert_eq!(lower(u64::from(byte) << 56), u64::from(byte.to_ascii_lowercase()) << 56);
        }
    }
}
