//! Commands on single bits of a value: bit 0 is the highest one of the first byte.
//!
//! Behind its last byte a value goes on with zeros, as far as reading goes; writing there makes it longer.

use super::Context;
use super::failure::{Failure, or_error};
use super::number::parse_i64;
use super::string::{range, runs_back};
use crate::record::MAX_VALUE_LEN;

/// Place of a bit among all bits of a value.
fn offset(text: &[u8]) -> Result<usize, Failure> {
    let offset = parse_i64(text).and_then(|offset| usize::try_from(offset).ok());
    offset
        .filter(|offset| offset / 8 < MAX_VALUE_LEN)
        .ok_or(Failure::Text("ERR bit offset is not an integer or out of range"))
}

/// Bit at `offset`.
fn bit_at(value: &[u8], offset: usize) -> bool {
    value.get(offset / 8).is_some_and(|byte| byte & mask(offset) != 0)
}

fn mask(offset: usize) -> u8 {
    0x80 >> (offset % 8)
}

/// `SETBIT key offset bit`
pub(super) fn setbit(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let key = ctx.args[1];
        let offset = offset(ctx.args[2])?;
        let new = match ctx.args[3] {
            b"0" => false,
            b"1" => true,
            _ => return Err(Failure::Text("ERR bit is not an integer or out of range")),
        };
        let hash = ctx.store.locate(key);
        let entry = ctx.store.peek(hash, key, ctx.now);
        let (len, old) = entry.map_or((0, false), |entry| (entry.value.len(), bit_at(entry.value, offset)));
        if old != new || offset / 8 >= len {
            let at = offset / 8;
            ctx.store.edit(hash, key, at..at + 1, ctx.now, &mut |byte| {
                byte[0] = if new { byte[0] | mask(offset) } else { byte[0] & !mask(offset) };
            })?;
        }
        ctx.out.integer(old.into());
        Ok(())
    });
}

/// `GETBIT key offset`
pub(super) fn getbit(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let key = ctx.args[1];
        let offset = offset(ctx.args[2])?;
        let hash = ctx.store.locate(key);
        let bit = ctx.store.get(hash, key, ctx.now).is_some_and(|entry| bit_at(entry.value, offset));
        ctx.out.integer(bit.into());
        Ok(())
    });
}

/// `BITCOUNT key [start end [BYTE|BIT]]`
pub(super) fn bitcount(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let key = ctx.args[1];
        if ctx.args.len() == 3 {
            return Err(Failure::SYNTAX);
        }
        let wanted = Range::parse(&ctx.args[2..])?;
        let hash = ctx.store.locate(key);
        let value = ctx.store.get(hash, key, ctx.now).map_or(&[][..], |entry| entry.value);
        let found = if wanted.runs_back() { None } else { wanted.bits(value.len()) };
        let count = found.map_or(0, |(first, last)| count(value, first, last));
        ctx.out.integer(count as i64);
        Ok(())
    });
}

/// `BITPOS key bit [start [end [BYTE|BIT]]]`
///
/// Whoever looks for a 0 and does not say where to end finds one behind the last byte at the latest.
pub(super) fn bitpos(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let key = ctx.args[1];
        let bit = match parse_i64(ctx.args[2]).ok_or(Failure::NOT_AN_INTEGER)? {
            0 => false,
            1 => true,
            _ => return Err(Failure::Text("ERR The bit argument must be 1 or 0.")),
        };
        let wanted = Range::parse(&ctx.args[3..])?;
        let hash = ctx.store.locate(key);
        let Some(entry) = ctx.store.get(hash, key, ctx.now) else {
            ctx.out.integer(if bit { -1 } else { 0 });
            return Ok(());
        };
        let value = entry.value;
        let position = wanted.bits(value.len()).and_then(|(first, last)| {
            let behind = (!bit && wanted.end.is_none()).then_some(value.len() * 8);
            position(value, bit, first, last).or(behind)
        });
        ctx.out.integer(position.map_or(-1, |position| position as i64));
        Ok(())
    });
}

/// The part of a value that BITCOUNT and BITPOS look at.
struct Range {
    start: Option<i64>,
    end: Option<i64>,
    /// Whether `start` and `end` are places of bits, not of bytes.
    in_bits: bool,
}

impl Range {
    fn parse(args: &[&[u8]]) -> Result<Range, Failure> {
        let mut range = Range { start: None, end: None, in_bits: false };
        if args.len() > 3 {
            return Err(Failure::SYNTAX);
        }
        let integer = |text| parse_i64(text).ok_or(Failure::NOT_AN_INTEGER);
        range.start = args.first().copied().map(integer).transpose()?;
        range.end = args.get(1).copied().map(integer).transpose()?;
        if let Some(unit) = args.get(2) {
            range.in_bits = unit.eq_ignore_ascii_case(b"bit");
            if !range.in_bits && !unit.eq_ignore_ascii_case(b"byte") {
                return Err(Failure::SYNTAX);
            }
        }
        Ok(range)
    }

    fn runs_back(&self) -> bool {
        self.start.zip(self.end).is_some_and(|(start, end)| runs_back(start, end))
    }

    /// First and last bit meant in a value of `len` bytes; `None` when there is none.
    fn bits(&self, len: usize) -> Option<(usize, usize)> {
        let (start, end) = (self.start.unwrap_or(0), self.end.unwrap_or(-1));
        if self.in_bits {
            return range(len * 8, start, end);
        }
        let (first, last) = range(len, start, end)?;
        Some((first * 8, last * 8 + 7))
    }
}

/// Bits that are set from `first` to `last`.
fn count(value: &[u8], first: usize, last: usize) -> u64 {
    let bytes = &value[first / 8..=last / 8];
    let (words, rest) = bytes.as_chunks::<8>();
    let words: u64 = words.iter().map(|word| u64::from(u64::from_ne_bytes(*word).count_ones())).sum();
    let rest: u64 = rest.iter().map(|byte| u64::from(byte.count_ones())).sum();
    let before = bytes[0] & !(0xff >> (first % 8));
    let behind = bytes[bytes.len() - 1] & (0x7f >> (last % 8));
    words + rest - u64::from(before.count_ones() + behind.count_ones())
}

/// Place of the first such bit from `first` to `last`.
fn position(value: &[u8], bit: bool, first: usize, last: usize) -> Option<usize> {
    // What is looked for is now set, all else clear.
    let flip = if bit { 0 } else { 0xff };
    let found = |at: usize, byte: u8| at * 8 + byte.leading_zeros() as usize;
    let (from, to) = (first / 8, last / 8);
    let head = (value[from] ^ flip) & (0xff >> (first % 8));
    let at = if head != 0 {
        found(from, head)
    } else {
        let at = from + 1 + first_unlike(&value[from + 1..=to], flip)?;
        found(at, value[at] ^ flip)
    };
    (at <= last).then_some(at)
}

/// Place of the first byte that is not `byte`.
fn first_unlike(bytes: &[u8], byte: u8) -> Option<usize> {
    let (words, _) = bytes.as_chunks::<8>();
    let skipped = words.iter().take_while(|word| **word == [byte; 8]).count() * 8;
    bytes[skipped..].iter().position(|other| *other != byte).map(|at| skipped + at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::command::testing::Console;

    // The replies in these scripts are those of Redis 7.0.

    #[test]
    fn single_bits() {
        Console::new().script(
            r#"
            setbit k 7 1 => (integer) 0
            setbit k 7 1 => (integer) 1
            setbit k 7 0 => (integer) 1
            setbit k 17 1 => (integer) 0
            get k => "\x00\x00@"
            getbit k 17 => (integer) 1
            getbit k 16 => (integer) 0
            getbit k 1000000 => (integer) 0
            getbit absent 0 => (integer) 0
            setbit zero 20 0 => (integer) 0
            strlen zero => (integer) 3
            setbit k -1 1 => ERR bit offset is not an integer or out of range
            setbit k x 1 => ERR bit offset is not an integer or out of range
            setbit k 4294967296 1 => ERR bit offset is not an integer or out of range
            setbit k 9223372036854775807 1 => ERR bit offset is not an integer or out of range
            setbit k 1 2 => ERR bit is not an integer or out of range
            setbit k 1 -1 => ERR bit is not an integer or out of range
            setbit k 1 x => ERR bit is not an integer or out of range
            setbit k 1 "" => ERR bit is not an integer or out of range
            getbit k 4294967296 => ERR bit offset is not an integer or out of range
            getbit k -1 => ERR bit offset is not an integer or out of range
            getbit k x => ERR bit offset is not an integer or out of range
            "#,
        );
    }

    #[test]
    fn counting_bits() {
        Console::new().script(
            r#"
            set k foobar => OK
            bitcount k => (integer) 26
            bitcount k 0 0 => (integer) 4
            bitcount k 1 1 => (integer) 6
            bitcount k 1 1 byte => (integer) 6
            bitcount k 5 30 BIT => (integer) 17
            bitcount k -2 -1 => (integer) 7
            bitcount k -10 -1 bit => (integer) 5
            bitcount k 0 -100 => (integer) 4
            bitcount k -1 -2 => (integer) 0
            bitcount k 3 2 => (integer) 0
            bitcount k 100 200 => (integer) 0
            bitcount k 0 7 bit => (integer) 4
            bitcount k 9 9 bit => (integer) 1
            bitcount k 0 => ERR syntax error
            bitcount k 0 1 word => ERR syntax error
            bitcount k 0 1 bit 2 => ERR syntax error
            bitcount k a 1 => ERR value is not an integer or out of range
            bitcount k 0 b => ERR value is not an integer or out of range
            bitcount absent => (integer) 0
            bitcount absent 0 -1 => (integer) 0
            set e "" => OK
            bitcount e => (integer) 0
            bitcount e 0 -1 => (integer) 0
            "#,
        );
    }

    #[test]
    fn looking_for_a_bit() {
        Console::new().script(
            r#"
            set k "\xff\xf0\x00" => OK
            bitpos k 0 => (integer) 12
            bitpos k 1 => (integer) 0
            bitpos k 1 2 => (integer) -1
            bitpos k 0 1 => (integer) 12
            bitpos k 0 0 0 => (integer) -1
            bitpos k 1 1 1 => (integer) 8
            bitpos k 1 12 15 bit => (integer) -1
            bitpos k 0 7 15 BIT => (integer) 12
            bitpos k 1 7 15 bit => (integer) 7
            bitpos k 0 1 -1 byte => (integer) 12
            bitpos k 0 -1 => (integer) 16
            bitpos k 1 -3 -3 => (integer) 0
            bitpos k 1 5 => (integer) -1
            bitpos k 0 5 => (integer) -1
            bitpos k 0 2 1 => (integer) -1
            bitpos k 1 -9 -20 => (integer) 0
            set k "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff" => OK
            bitpos k 0 => (integer) 80
            bitpos k 0 3 => (integer) 80
            bitpos k 0 0 -1 => (integer) -1
            bitpos k 0 0 -1 bit => (integer) -1
            bitpos k 0 79 => (integer) -1
            bitpos k 0 10 => (integer) -1
            bitpos k 1 3 => (integer) 24
            bitpos k 1 77 -1 bit => (integer) 77
            set k "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" => OK
            bitpos k 1 => (integer) 87
            bitpos k 1 0 -2 => (integer) -1
            bitpos k 1 0 86 bit => (integer) -1
            bitpos k 1 0 87 bit => (integer) 87
            bitpos absent 0 => (integer) 0
            bitpos absent 1 => (integer) -1
            set e "" => OK
            bitpos e 0 => (integer) -1
            bitpos e 1 => (integer) -1
            bitpos e 0 0 => (integer) -1
            bitpos k 2 => ERR The bit argument must be 1 or 0.
            bitpos k x => ERR value is not an integer or out of range
            bitpos k 1 x => ERR value is not an integer or out of range
            bitpos k 1 0 x => ERR value is not an integer or out of range
            bitpos k 1 0 1 word => ERR syntax error
            bitpos k 1 0 1 bit 3 => ERR syntax error
            "#,
        );
    }

    /// As Redis does since 7.2.
    #[test]
    fn arguments_are_checked_for_absent_keys_too() {
        Console::new().script(
            r#"
            bitcount absent x => ERR syntax error
            bitcount absent 0 x => ERR value is not an integer or out of range
            bitpos absent 1 0 1 word => ERR syntax error
            "#,
        );
    }

    #[test]
    fn a_bit_that_is_as_asked_is_no_write() {
        let mut console = Console::new();
        console.script("setbit k 9 1 => (integer) 0");
        let hash = console.store.locate(b"k");
        let before = console.store.version(hash, b"k", 1);
        console.script("setbit k 9 1 => (integer) 1\n setbit k 10 0 => (integer) 0");
        assert_eq!(console.store.version(hash, b"k", 1), before);
    }

    proptest! {
        /// Whole bytes and words at a time give what one bit after the other would.
        #[test]
        fn counting_and_looking_agree_with_single_bits(
            filler in prop_oneof![Just(0u8), Just(0xff), any::<u8>()],
            len in 1..40usize, at in any::<usize>(), byte in any::<u8>(), ends in any::<(usize, usize)>(),
        ) {
            let mut value = vec![filler; len];
            value[at % len] = byte;
            let (a, b) = (ends.0 % (len * 8), ends.1 % (len * 8));
            let (first, last) = (a.min(b), a.max(b));
            let slow = (first..=last).filter(|&offset| bit_at(&value, offset)).count() as u64;
            prop_assert_eq!(count(&value, first, last), slow);
            for bit in [false, true] {
                let slow = (first..=last).find(|&offset| bit_at(&value, offset) == bit);
                prop_assert_eq!(position(&value, bit, first, last), slow);
            }
        }
    }
}
