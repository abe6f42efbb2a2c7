//! SCAN, as far as one core can do it: its cursor, its options, and one step over the keys of one store.
//!
//! A cursor is a position in hash space, the order in which stores are walked, so it needs no state on the server and is
//! not disturbed by growth: a key that is there all the time is met at least once. The node goes from core to core and,
//! between them, passes on what is left of the step. Cursor 0 is the beginning when sent, the end when answered.
//!
//! A client's COUNT is a wish: a step looks at [`MAX_COUNT`] keys at most, however few match, so that it never holds a
//! core for long.

use super::{glob, number};
use crate::Millis;
use crate::hash::KeyHash;
use crate::store::Store;

/// Keys that a step looks at when the client does not say.
pub const DEFAULT_COUNT: usize = 10;
/// Keys that a step looks at, at most.
pub const MAX_COUNT: usize = 10_000;

const SYNTAX: &str = "ERR syntax error";

/// The options of a SCAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanOptions<'a> {
    /// Keys to look at in this step: 1 to [`MAX_COUNT`].
    pub count: usize,
    /// Only keys that match; `None` = all.
    pub pattern: Option<&'a [u8]>,
    /// Only values of some type; `None` = all.
    pub only: Option<Only>,
}

/// A type of values, as far as it matters where all values are strings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// Strings, which all values are.
    Strings,
    /// Another type: no value is.
    Others,
}

impl<'a> ScanOptions<'a> {
    /// Reads what follows the cursor: `[MATCH pattern] [COUNT count] [TYPE type]`, in any order, the last of each wins.
    ///
    /// # Errors
    /// Redis's error text.
    pub fn parse(args: &[&'a [u8]]) -> Result<ScanOptions<'a>, &'static str> {
        let mut options = ScanOptions { count: DEFAULT_COUNT, pattern: None, only: None };
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let Some(&value) = args.next() else { return Err(SYNTAX) };
            if name.eq_ignore_ascii_case(b"match") {
                options.pattern = (value != b"*").then_some(value);
            } else if name.eq_ignore_ascii_case(b"count") {
                let count = number::parse_i64(value).ok_or("ERR value is not an integer or out of range")?;
                if count < 1 {
                    return Err(SYNTAX);
                }
                options.count = usize::try_from(count).map_or(MAX_COUNT, |count| count.min(MAX_COUNT));
            } else if name.eq_ignore_ascii_case(b"type") {
                options.only = Some(if value.eq_ignore_ascii_case(b"string") { Only::Strings } else { Only::Others });
            } else {
                return Err(SYNTAX);
            }
        }
        Ok(options)
    }
}

/// The position that a client's cursor names.
///
/// # Errors
/// Redis's error text, unless it is a number from 0 to 2⁶⁴ − 1 in decimal digits.
pub fn parse_cursor(text: &[u8]) -> Result<KeyHash, &'static str> {
    let digits = text.first().is_some_and(u8::is_ascii_digit);
    let number = std::str::from_utf8(text).ok().filter(|_| digits).and_then(|text| text.parse().ok());
    number.map(KeyHash).ok_or("ERR invalid cursor")
}

/// The cursor for a position to go on from; `None` is the end.
pub fn cursor(next: Option<KeyHash>) -> u64 {
    next.map_or(0, |next| next.0)
}

/// One step: looks at about `limit` live keys of the store from `from` on, in hash order, and adds those that are asked
/// for to `keys`. The position to go on from; `None` at the end of this store.
pub fn scan_part(
    store: &mut Store,
    from: KeyHash,
    limit: usize,
    pattern: Option<&[u8]>,
    only: Option<Only>,
    now: Millis,
    keys: &mut Vec<Vec<u8>>,
) -> Option<KeyHash> {
    if only == Some(Only::Others) {
        return None;
    }
    store.scan(from, limit, now, &mut |entry| {
        if pattern.is_none_or(|pattern| glob::matches(pattern, entry.key)) {
            keys.push(entry.key.to_vec());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::Console;
    use super::*;

    #[test]
    fn options_are_read_as_in_redis() {
        let parse = |line: &'static str| {
            let args: Vec<&[u8]> = line.split(' ').filter(|arg| !arg.is_empty()).map(str::as_bytes).collect();
            ScanOptions::parse(&args)
        };
        let all = ScanOptions { count: DEFAULT_COUNT, pattern: None, only: None };
        assert_eq!(parse(""), Ok(all));
        assert_eq!(parse("MATCH *"), Ok(all));
        assert_eq!(parse("count 5 match a* COUNT 7"), Ok(ScanOptions { count: 7, pattern: Some(b"a*"), ..all }));
        assert_eq!(parse("count 9223372036854775807"), Ok(ScanOptions { count: MAX_COUNT, ..all }));
        assert_eq!(parse("type STRING"), Ok(ScanOptions { only: Some(Only::Strings), ..all }));
        assert_eq!(parse("type nope"), Ok(ScanOptions { only: Some(Only::Others), ..all }));
        for line in ["count 0", "count -1", "count", "match", "match a count", "novalues", "size 4"] {
            assert_eq!(parse(line), Err("ERR syntax error"), "{line}");
        }
        for line in ["count x", "count 99999999999999999999"] {
            assert_eq!(parse(line), Err("ERR value is not an integer or out of range"), "{line}");
        }
    }

    #[test]
    fn a_cursor_is_a_plain_number() {
        for position in [0, 1, 42 << 40, u64::MAX] {
            assert_eq!(parse_cursor(position.to_string().as_bytes()), Ok(KeyHash(position)));
            assert_eq!(cursor(Some(KeyHash(position))), position);
        }
        assert_eq!(cursor(None), 0);
        for text in ["", "x", "-1", "+1", " 1", "1 ", "1.0", "18446744073709551616", "\u{661}"] {
            assert_eq!(parse_cursor(text.as_bytes()), Err("ERR invalid cursor"), "{text}");
        }
    }

    #[test]
    fn steps_meet_every_key_once_while_the_table_grows() {
        let mut console = Console::new();
        let put = |console: &mut Console, key: &str| {
            let hash = console.store.locate(key.as_bytes());
            console.store.set(hash, key.as_bytes(), b"v", 0, console.now).unwrap();
        };
        for n in 0..1000 {
            put(&mut console, &format!("there{n}"));
        }
        let (mut keys, mut from, mut steps) = (Vec::new(), KeyHash::MIN, 0);
        loop {
            let now = console.now;
            let before = keys.len();
            let next = scan_part(&mut console.store, from, 50, Some(b"there*"), Some(Only::Strings), now, &mut keys);
            assert!(keys.len() - before <= 50, "no hashes are equal");
            let Some(next) = next else { break };
            from = next;
            steps += 1;
            for n in 0..200 {
                put(&mut console, &format!("late{steps}:{n}"));
            }
        }
        assert!(steps >= 20, "{steps}");
        assert_eq!(keys.len(), 1000, "all that were there, and none of the late ones");
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 1000);
        let none = scan_part(&mut console.store, KeyHash::MIN, 50, None, Some(Only::Others), 1, &mut keys);
        assert_eq!((none, keys.len()), (None, 1000));
    }
}
