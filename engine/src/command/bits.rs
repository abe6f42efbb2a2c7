//! Commands on single bits of a value: bit 0 is the highest one of the first byte.
//!
//! Behind its last byte a value goes on with zeros, as far as reading goes; writing there makes it longer.

use super::Context;
use super::failure::{Failure, or_error};
use super::number::parse_i64;
use super::string::range;
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
            ctx.store.edit(hash, key, offset / 8 + 1, ctx.now, &mut |value| {
                let byte = &mut value[offset / 8];
                *byte = if new { *byte | mask(offset) } else { *byte & !mask(offset) };
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
        let wanted = Range::parse(&ctx.args[2..])?;
        if wanted.start.is_some() && wanted.end.is_none() {
            return Err(Failure::SYNTAX);
        }
        let hash = ctx.store.locate(key);
        let value = ctx.store.get(hash, key, ctx.now).map_or(&[][..], |entry| entry.value);
        let count = wanted.bits(value.len()).map_or(0, |(first, last)| count(value, first, last));
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
