//! Which keys the requests of one connection touch that are still under way.
//!
//! A core serves what it is sent in order, so on a lone node the commands of a connection cannot overtake each other. Where a
//! core shares its shards with other nodes each request is an operation of several messages: a read may end before a
//! deletion that was sent before it. So whoever sends more than one command at once says what each touches, and a command
//! waits while one before it that it depends on is under way:
//!
//! | before | behind it | waits |
//! |---|---|---|
//! | read | read | no |
//! | blind write | blind write | no: the core gives them ascending versions |
//! | any other pair, of one key | | yes |
//!
//! A blind write is a SET that depends on nothing and answers nothing of what was there.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use gridkv_engine::hash::KeyHash;

/// What a request does with its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    Read,
    Blind,
    Write,
}

/// Requests under way that touch a key, by what they do.
#[derive(Clone, Copy, Debug, Default)]
struct Users([u32; 3]);

impl Users {
    fn forbid(self, touch: Touch) -> bool {
        let Users([reads, blinds, writes]) = self;
        match touch {
            Touch::Read => blinds + writes > 0,
            Touch::Blind => reads + writes > 0,
            Touch::Write => reads + blinds + writes > 0,
        }
    }
}

#[derive(Debug)]
struct Claim {
    keys: Keys,
    touch: Touch,
}

/// One key costs no allocation of its own.
#[derive(Debug)]
enum Keys {
    One(KeyHash),
    Many(Vec<KeyHash>),
}

impl Keys {
    fn as_slice(&self) -> &[KeyHash] {
        match self {
            Keys::One(key) => std::slice::from_ref(key),
            Keys::Many(keys) => keys,
        }
    }
}

/// The claims of a connection; bounded by the answers that it may wait for and the keys that a command may name.
#[derive(Debug, Default)]
pub(super) struct Claims {
    users: HashMap<u64, Users, BuildHasherDefault<Spread>>,
    by_slot: HashMap<u32, Claim, BuildHasherDefault<Spread>>,
}

impl Claims {
    /// Whether nothing is under way that could be overtaken.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    /// Whether a request that touches this key has to wait.
    #[inline]
    pub(super) fn forbid(&self, key: KeyHash, touch: Touch) -> bool {
        !self.is_empty() && self.users.get(&key.0).is_some_and(|users| users.forbid(touch))
    }

    /// The request of that slot is under way.
    pub(super) fn hold(&mut self, slot: u32, keys: impl IntoIterator<Item = KeyHash>, touch: Touch) {
        let mut keys = keys.into_iter();
        let Some(first) = keys.next() else { return };
        let keys = match keys.next() {
            None => Keys::One(first),
            Some(second) => Keys::Many([first, second].into_iter().chain(keys).collect()),
        };
        for key in keys.as_slice() {
            self.users.entry(key.0).or_default().0[touch as usize] += 1;
        }
        self.by_slot.insert(slot, Claim { keys, touch });
    }

    /// The request of that slot has been answered.
    #[inline]
    pub(super) fn release(&mut self, slot: u32) {
        if self.by_slot.is_empty() {
            return;
        }
        let Some(Claim { keys, touch }) = self.by_slot.remove(&slot) else { return };
        for key in keys.as_slice() {
            if let Some(users) = self.users.get_mut(&key.0) {
                users.0[touch as usize] -= 1;
                if users.0 == [0; 3] {
                    self.users.remove(&key.0);
                }
            }
        }
    }
}

/// Key hashes are spread already, by a seed that no client knows; slots only need their low bits moved up.
#[derive(Default)]
pub(super) struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(self.0 ^ u64::from(byte)));
    }

    fn write_u32(&mut self, slot: u32) {
        self.write_u64(slot.into());
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pair_waits_that_depends_on_its_order() {
        use Touch::{Blind, Read, Write};
        for (before, behind, waits) in [
            (Read, Read, false),
            (Read, Blind, true),
            (Read, Write, true),
            (Blind, Read, true),
            (Blind, Blind, false),
            (Blind, Write, true),
            (Write, Read, true),
            (Write, Blind, true),
            (Write, Write, true),
        ] {
            let mut claims = Claims::default();
            claims.hold(7, [KeyHash(1), KeyHash(2)], before);
            assert_eq!(claims.forbid(KeyHash(2), behind), waits, "{before:?} {behind:?}");
            assert!(!claims.forbid(KeyHash(3), behind), "another key");
            claims.release(7);
            assert!(!claims.forbid(KeyHash(2), behind), "it has been answered");
            assert!(claims.users.is_empty() && claims.by_slot.is_empty());
        }
    }

    #[test]
    fn a_key_is_free_when_all_that_touch_it_are_answered() {
        let mut claims = Claims::default();
        claims.hold(u32::MAX, [KeyHash(1), KeyHash(1)], Touch::Write);
        claims.hold(0, [KeyHash(1)], Touch::Read);
        claims.release(u32::MAX);
        assert!(claims.forbid(KeyHash(1), Touch::Blind) && !claims.forbid(KeyHash(1), Touch::Read));
        claims.release(5);
        claims.release(0);
        assert!(!claims.forbid(KeyHash(1), Touch::Write));
    }
}
