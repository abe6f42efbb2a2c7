//! Commands on values as wholes, as ranges of bytes, and as numbers.
//!
//! A value is a byte string always: a number is one that reads as such, and is written back as text. Where a command
//! answers what it replaces, the old value is copied first, so that a refused write is answered by its error alone.
//!
//! Not here: single bits ([`super::bits`]), times to live as such ([`super::expire`]).

use super::failure::{Failure, or_error};
use super::number::{Float, parse_i64};
use super::{Context, Refusal, lookup};
use crate::Millis;
use crate::record::{MAX_KEY_LEN, MAX_VALUE_LEN};
use crate::store::StoreError;

/// Cells of the table that LCS fills, at most: product of the values' lengths. Bounds its memory (four bytes a cell) and
/// how long it keeps the core from others.
const MAX_LCS_CELLS: usize = 16 << 20;

/// `GET key`
#[inline]
pub(super) fn get(ctx: &mut Context<'_>) {
    let key = ctx.args[1];
    let hash = ctx.store.locate(key);
    match ctx.store.get(hash, key, ctx.now) {
        Some(entry) => ctx.out.bulk(entry.value),
        None => ctx.out.null(),
    }
}

/// `SET key value [NX|XX] [GET] [EX s|PX ms|EXAT s|PXAT ms|KEEPTTL]`
pub(super) fn set(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let (key, value) = (ctx.args[1], ctx.args[2]);
        let hash = ctx.store.locate(key);
        if ctx.args.len() == 3 {
            ctx.store.set(hash, key, value, 0, ctx.now)?;
            ctx.out.ok();
            return Ok(());
        }
        let options = Options::parse(&ctx.args[3..], Of::Set)?;
        let deadline = options.lifetime.deadline(ctx.now, "set")?;
        let old = match options.get {
            true => ctx.store.get(hash, key, ctx.now),
            false => ctx.store.peek(hash, key, ctx.now),
        };
        let exists = old.is_some();
        let expires_at = match options.lifetime {
            Lifetime::Keep => old.map_or(0, |entry| entry.expires_at),
            _ => deadline.unwrap_or(0),
        };
        let wanted = options.only_if_exists.is_none_or(|wanted| wanted == exists);
        let old = old.filter(|_| options.get).map(|entry| entry.value.to_vec());
        if wanted {
            put(ctx, key, value, expires_at)?;
        }
        match (old, options.get || !wanted) {
            (Some(old), _) => ctx.out.bulk(&old),
            (None, true) => ctx.out.null(),
            (None, false) => ctx.out.ok(),
        }
        Ok(())
    });
}

/// Writes a value; one that is expired already leaves nothing.
fn put(ctx: &mut Context<'_>, key: &[u8], value: &[u8], expires_at: Millis) -> Result<(), Failure> {
    let hash = ctx.store.locate(key);
    if expires_at != 0 && expires_at <= ctx.now {
        ctx.store.delete(hash, key, ctx.now)?;
    } else {
        ctx.store.set(hash, key, value, expires_at, ctx.now)?;
    }
    Ok(())
}

/// `SETNX key value`
pub(super) fn setnx(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let (key, value) = (ctx.args[1], ctx.args[2]);
        let hash = ctx.store.locate(key);
        let absent = !ctx.store.exists(hash, key, ctx.now);
        if absent {
            ctx.store.set(hash, key, value, 0, ctx.now)?;
        }
        ctx.out.integer(absent.into());
        Ok(())
    });
}

/// `SETEX key seconds value`
pub(super) fn setex(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| set_for(ctx, Clause::Seconds, "setex"));
}

/// `PSETEX key milliseconds value`
pub(super) fn psetex(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| set_for(ctx, Clause::Millis, "psetex"));
}

fn set_for(ctx: &mut Context<'_>, clause: Clause, command: &'static str) -> Result<(), Failure> {
    let expires_at = clause.deadline(ctx.args[2], ctx.now, command)?;
    put(ctx, ctx.args[1], ctx.args[3], expires_at)?;
    ctx.out.ok();
    Ok(())
}

/// `GETSET key value`
pub(super) fn getset(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let (key, value) = (ctx.args[1], ctx.args[2]);
        let hash = ctx.store.locate(key);
        let old = ctx.store.get(hash, key, ctx.now).map(|entry| entry.value.to_vec());
        ctx.store.set(hash, key, value, 0, ctx.now)?;
        old_value(ctx, old.as_deref());
        Ok(())
    });
}

/// `GETDEL key`
pub(super) fn getdel(ctx: &mut Context<'_>) {
    or_error(ctx, get_and_delete);
}

fn get_and_delete(ctx: &mut Context<'_>) -> Result<(), Failure> {
    let key = ctx.args[1];
    let hash = ctx.store.locate(key);
    let old = ctx.store.get(hash, key, ctx.now).map(|entry| entry.value.to_vec());
    if old.is_some() {
        ctx.store.delete(hash, key, ctx.now)?;
    }
    old_value(ctx, old.as_deref());
    Ok(())
}

fn old_value(ctx: &mut Context<'_>, old: Option<&[u8]>) {
    match old {
        Some(value) => ctx.out.bulk(value),
        None => ctx.out.null(),
    }
}

/// `GETEX key [EX s|PX ms|EXAT s|PXAT ms|PERSIST]`
pub(super) fn getex(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let key = ctx.args[1];
        let hash = ctx.store.locate(key);
        let options = Options::parse(&ctx.args[2..], Of::GetEx)?;
        // As in Redis, the time is looked at only where it would be used.
        if let Some(entry) = ctx.store.peek(hash, key, ctx.now) {
            let had = entry.expires_at;
            let expires_at = match options.lifetime {
                Lifetime::Forever => 0,
                _ => options.lifetime.deadline(ctx.now, "getex")?.unwrap_or(had),
            };
            if expires_at != 0 && expires_at <= ctx.now {
                return get_and_delete(ctx);
            }
            if expires_at != had {
                ctx.store.set_expiry(hash, key, expires_at, ctx.now)?;
            }
        }
        get(ctx);
        Ok(())
    });
}

/// `MGET key...`
pub(super) fn mget(ctx: &mut Context<'_>) {
    ctx.out.array(ctx.args.len() - 1);
    for key in &ctx.args[1..] {
        let hash = ctx.store.locate(key);
        match ctx.store.get(hash, key, ctx.now) {
            Some(entry) => ctx.out.bulk(entry.value),
            None => ctx.out.null(),
        }
    }
}

/// `MSET (key value)...`
pub(super) fn mset(ctx: &mut Context<'_>) {
    let Some(pairs) = pairs(ctx) else { return };
    or_error(ctx, |ctx| {
        check_sizes(pairs)?;
        for [key, value] in pairs {
            let hash = ctx.store.locate(key);
            ctx.store.set(hash, key, value, 0, ctx.now)?;
        }
        ctx.out.ok();
        Ok(())
    });
}

/// `MSETNX (key value)...`: all or none, also when the store refuses one of them.
pub(super) fn msetnx(ctx: &mut Context<'_>) {
    let Some(pairs) = pairs(ctx) else { return };
    or_error(ctx, |ctx| {
        check_sizes(pairs)?;
        for [key, _] in pairs {
            let hash = ctx.store.locate(key);
            if ctx.store.exists(hash, key, ctx.now) {
                ctx.out.integer(0);
                return Ok(());
            }
        }
        for (done, [key, value]) in pairs.iter().enumerate() {
            let hash = ctx.store.locate(key);
            if let Err(refused) = ctx.store.set(hash, key, value, 0, ctx.now) {
                for [key, _] in &pairs[..done] {
                    let hash = ctx.store.locate(key);
                    ctx.store.delete(hash, key, ctx.now)?;
                }
                return Err(refused.into());
            }
        }
        ctx.out.integer(1);
        Ok(())
    });
}

/// The arguments as keys and values; replies when one is left over.
fn pairs<'a>(ctx: &mut Context<'a>) -> Option<&'a [[&'a [u8]; 2]]> {
    let (pairs, rest) = ctx.args[1..].as_chunks();
    if rest.is_empty() {
        return Some(pairs);
    }
    let spec = lookup(ctx.args[0]).expect("a command that runs has a row");
    ctx.out.error(Refusal::arity(spec).text());
    None
}

fn check_sizes(pairs: &[[&[u8]; 2]]) -> Result<(), StoreError> {
    for [key, value] in pairs {
        if key.len() > MAX_KEY_LEN {
            return Err(StoreError::KeyTooLong);
        }
        if value.len() > MAX_VALUE_LEN {
            return Err(StoreError::ValueTooLong);
        }
    }
    Ok(())
}

/// `APPEND key value`
pub(super) fn append(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let (key, tail) = (ctx.args[1], ctx.args[2]);
        let hash = ctx.store.locate(key);
        let len = ctx.store.peek(hash, key, ctx.now).map_or(0, |entry| entry.value.len());
        let len = ctx.store.edit(hash, key, len + tail.len(), ctx.now, &mut |v| v[len..].copy_from_slice(tail))?;
        ctx.out.integer(len as i64);
        Ok(())
    });
}

/// `STRLEN key`
pub(super) fn strlen(ctx: &mut Context<'_>) {
    let key = ctx.args[1];
    let hash = ctx.store.locate(key);
    let len = ctx.store.get(hash, key, ctx.now).map_or(0, |entry| entry.value.len());
    ctx.out.integer(len as i64);
}

/// `GETRANGE key start end`, `SUBSTR key start end`
pub(super) fn getrange(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let key = ctx.args[1];
        let (start, end) = (integer(ctx.args[2])?, integer(ctx.args[3])?);
        let hash = ctx.store.locate(key);
        let value = ctx.store.get(hash, key, ctx.now).map_or(&[][..], |entry| entry.value);
        ctx.out.bulk(range(value.len(), start, end).map_or(&[], |(first, last)| &value[first..=last]));
        Ok(())
    });
}

/// First and last place that `start` and `end` mean among `len`; negative ones count from the end. `None` when nothing
/// lies between.
///
/// An `end` before the first place means the first place: so it is in Redis before 8.
pub(super) fn range(len: usize, start: i64, end: i64) -> Option<(usize, usize)> {
    if start < 0 && end < 0 && start > end {
        return None;
    }
    let len = len as i64;
    let place = |at: i64| if at < 0 { (len + at).max(0) } else { at };
    let (first, last) = (place(start), place(end).min(len - 1));
    (first <= last).then_some((first as usize, last as usize))
}

/// `SETRANGE key offset value`
pub(super) fn setrange(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let (key, part) = (ctx.args[1], ctx.args[3]);
        let offset = integer(ctx.args[2])?;
        let offset = usize::try_from(offset).map_err(|_| Failure::Text("ERR offset is out of range"))?;
        let hash = ctx.store.locate(key);
        if part.is_empty() {
            let len = ctx.store.peek(hash, key, ctx.now).map_or(0, |entry| entry.value.len());
            ctx.out.integer(len as i64);
            return Ok(());
        }
        let end = offset.saturating_add(part.len());
        let len = ctx.store.edit(hash, key, end, ctx.now, &mut |v| v[offset..end].copy_from_slice(part))?;
        ctx.out.integer(len as i64);
        Ok(())
    });
}

/// `INCR key`
pub(super) fn incr(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| add(ctx, 1));
}

/// `DECR key`
pub(super) fn decr(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| add(ctx, -1));
}

/// `INCRBY key increment`
pub(super) fn incrby(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let by = integer(ctx.args[2])?;
        add(ctx, by)
    });
}

/// `DECRBY key decrement`
pub(super) fn decrby(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let by = integer(ctx.args[2])?.checked_neg().ok_or(Failure::Text("ERR decrement would overflow"))?;
        add(ctx, by)
    });
}

/// Adds to a number, which keeps its expiry. Allocates nothing unless the number gets longer or shorter.
fn add(ctx: &mut Context<'_>, by: i64) -> Result<(), Failure> {
    let key = ctx.args[1];
    let hash = ctx.store.locate(key);
    let (old, expires_at) = match ctx.store.peek(hash, key, ctx.now) {
        Some(entry) => (integer(entry.value)?, entry.expires_at),
        None => (0, 0),
    };
    let new = old.checked_add(by).ok_or(Failure::Text("ERR increment or decrement would overflow"))?;
    ctx.store.set(hash, key, itoa::Buffer::new().format(new).as_bytes(), expires_at, ctx.now)?;
    ctx.out.integer(new);
    Ok(())
}

/// `INCRBYFLOAT key increment`: as [`add`].
pub(super) fn incrbyfloat(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        const NO_FLOAT: Failure = Failure::Text("ERR value is not a valid float");
        let key = ctx.args[1];
        let by = Float::parse(ctx.args[2]).ok_or(NO_FLOAT)?;
        let hash = ctx.store.locate(key);
        let (old, expires_at) = match ctx.store.peek(hash, key, ctx.now) {
            Some(entry) => (Float::parse(entry.value).ok_or(NO_FLOAT)?, entry.expires_at),
            None => (Float::ZERO, 0),
        };
        let new = old.plus(by).ok_or(Failure::Text("ERR increment would produce NaN or Infinity"))?.to_string();
        ctx.store.set(hash, key, new.as_bytes(), expires_at, ctx.now)?;
        ctx.out.bulk(new.as_bytes());
        Ok(())
    });
}

/// `LCS key key [LEN] [IDX] [MINMATCHLEN len] [WITHMATCHLEN]`
pub(super) fn lcs(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let (mut len, mut idx, mut with_match_len, mut min_match_len) = (false, false, false, 0);
        let mut options = ctx.args[3..].iter();
        while let Some(option) = options.next() {
            if option.eq_ignore_ascii_case(b"len") {
                len = true;
            } else if option.eq_ignore_ascii_case(b"idx") {
                idx = true;
            } else if option.eq_ignore_ascii_case(b"withmatchlen") {
                with_match_len = true;
            } else if option.eq_ignore_ascii_case(b"minmatchlen") {
                min_match_len = integer(options.next().ok_or(Failure::SYNTAX)?)?.max(0) as usize;
            } else {
                return Err(Failure::SYNTAX);
            }
        }
        if len && idx {
            return Err(Failure::Text("ERR If you want both the length and indexes, please just use IDX."));
        }
        let (left, right) = (ctx.args[1], ctx.args[2]);
        let hash = ctx.store.locate(left);
        let a = ctx.store.get(hash, left, ctx.now).map_or(Vec::new(), |entry| entry.value.to_vec());
        let hash = ctx.store.locate(right);
        let b = ctx.store.get(hash, right, ctx.now).map_or(&[][..], |entry| entry.value);
        if a.len().saturating_mul(b.len()) > MAX_LCS_CELLS {
            return Err(Failure::Text("ERR String too long for LCS: the lengths' product is limited to 16777216"));
        }
        let common = Common::of(&a, b);
        if len {
            ctx.out.integer(common.len as i64);
            return Ok(());
        }
        if !idx {
            let bytes: Vec<u8> = common.runs.iter().rev().flat_map(|run| &a[run.a..run.a + run.len]).copied().collect();
            ctx.out.bulk(&bytes);
            return Ok(());
        }
        let shown = || common.runs.iter().filter(|run| run.len >= min_match_len);
        ctx.out.map(2);
        ctx.out.bulk(b"matches");
        ctx.out.array(shown().count());
        for run in shown() {
            ctx.out.array(if with_match_len { 3 } else { 2 });
            for from in [run.a, run.b] {
                ctx.out.array(2);
                ctx.out.integer(from as i64);
                ctx.out.integer((from + run.len - 1) as i64);
            }
            if with_match_len {
                ctx.out.integer(run.len as i64);
            }
        }
        ctx.out.bulk(b"len");
        ctx.out.integer(common.len as i64);
        Ok(())
    });
}

/// `len` bytes that are the same in both values, at `a` and at `b`.
struct Run {
    a: usize,
    b: usize,
    len: usize,
}

/// A longest common subsequence of two values.
struct Common {
    len: usize,
    /// The last first.
    runs: Vec<Run>,
}

impl Common {
    /// By the table of the lengths for all pairs of prefixes, read backwards. Of several longest ones it finds Redis's.
    fn of(a: &[u8], b: &[u8]) -> Common {
        let width = b.len() + 1;
        let mut lens = vec![0u32; (a.len() + 1) * width];
        for (i, x) in a.iter().enumerate() {
            let (above, row) = lens[i * width..(i + 2) * width].split_at_mut(width);
            for (j, y) in b.iter().enumerate() {
                row[j + 1] = if x == y { above[j] + 1 } else { above[j + 1].max(row[j]) };
            }
        }
        let (mut i, mut j) = (a.len(), b.len());
        let mut runs: Vec<Run> = Vec::new();
        while i > 0 && j > 0 {
            if a[i - 1] != b[j - 1] {
                if lens[(i - 1) * width + j] > lens[i * width + j - 1] { i -= 1 } else { j -= 1 }
                continue;
            }
            match runs.last_mut() {
                Some(run) if (run.a, run.b) == (i, j) => (run.a, run.b, run.len) = (i - 1, j - 1, run.len + 1),
                _ => runs.push(Run { a: i - 1, b: j - 1, len: 1 }),
            }
            (i, j) = (i - 1, j - 1);
        }
        Common { len: lens[lens.len() - 1] as usize, runs }
    }
}

fn integer(text: &[u8]) -> Result<i64, Failure> {
    parse_i64(text).ok_or(Failure::NOT_AN_INTEGER)
}

/// Whose options are read.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    Set,
    GetEx,
}

/// What SET and GETEX may be asked besides.
struct Options<'a> {
    only_if_exists: Option<bool>,
    get: bool,
    lifetime: Lifetime<'a>,
}

/// What becomes of a key's expiry.
#[derive(Clone, Copy)]
enum Lifetime<'a> {
    /// Nothing was said.
    Unsaid,
    /// KEEPTTL.
    Keep,
    /// PERSIST.
    Forever,
    /// Such a clause and its number.
    Until(Clause, &'a [u8]),
}

/// How an expiry is given.
#[derive(Clone, Copy, PartialEq)]
enum Clause {
    Seconds,
    Millis,
    AtSecond,
    AtMilli,
}

impl<'a> Options<'a> {
    fn parse(args: &[&'a [u8]], of: Of) -> Result<Options<'a>, Failure> {
        let mut options = Options { only_if_exists: None, get: false, lifetime: Lifetime::Unsaid };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let is = |name: &str| arg.eq_ignore_ascii_case(name.as_bytes());
            if of == Of::Set && (is("nx") || is("xx")) {
                let wanted = is("xx");
                if options.only_if_exists.is_some_and(|said| said != wanted) {
                    return Err(Failure::SYNTAX);
                }
                options.only_if_exists = Some(wanted);
            } else if of == Of::Set && is("get") {
                options.get = true;
            } else if of == Of::Set && is("keepttl") && matches!(options.lifetime, Lifetime::Unsaid | Lifetime::Keep) {
                options.lifetime = Lifetime::Keep;
            } else if of == Of::GetEx
                && is("persist")
                && matches!(options.lifetime, Lifetime::Unsaid | Lifetime::Forever)
            {
                options.lifetime = Lifetime::Forever;
            } else {
                let clause = Clause::named(arg).ok_or(Failure::SYNTAX)?;
                match options.lifetime {
                    Lifetime::Unsaid => {}
                    // The same again: the last counts.
                    Lifetime::Until(said, _) if said == clause => {}
                    _ => return Err(Failure::SYNTAX),
                }
                options.lifetime = Lifetime::Until(clause, args.next().ok_or(Failure::SYNTAX)?);
            }
        }
        Ok(options)
    }
}

impl Lifetime<'_> {
    /// When the key expires, if that was said.
    fn deadline(self, now: Millis, command: &'static str) -> Result<Option<Millis>, Failure> {
        match self {
            Lifetime::Until(clause, number) => clause.deadline(number, now, command).map(Some),
            _ => Ok(None),
        }
    }
}

impl Clause {
    fn named(name: &[u8]) -> Option<Clause> {
        let named = [
            ("ex", Clause::Seconds),
            ("px", Clause::Millis),
            ("exat", Clause::AtSecond),
            ("pxat", Clause::AtMilli),
        ];
        named.iter().find(|(known, _)| name.eq_ignore_ascii_case(known.as_bytes())).map(|&(_, clause)| clause)
    }

    /// When a key expires whose clause has that number; never 0.
    fn deadline(self, number: &[u8], now: Millis, command: &'static str) -> Result<Millis, Failure> {
        let number = integer(number)?;
        let millis = match self {
            Clause::Seconds | Clause::AtSecond => number.checked_mul(1000),
            Clause::Millis | Clause::AtMilli => Some(number),
        };
        let base = match self {
            Clause::Seconds | Clause::Millis => now as i64,
            Clause::AtSecond | Clause::AtMilli => 0,
        };
        let at = millis.filter(|&millis| millis > 0).and_then(|millis| millis.checked_add(base));
        at.map(|at| at as Millis).ok_or(Failure::ExpireTime(command))
    }
}
