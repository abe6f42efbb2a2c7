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
        pairs.iter().try_for_each(|[key, value]| ctx.store.check(key, value.len()))?;
        for (done, [key, value]) in pairs.iter().enumerate() {
            let hash = ctx.store.locate(key);
            if let Err(refused) = ctx.store.set(hash, key, value, 0, ctx.now) {
                return Err(if done == 0 { refused.into() } else { Failure::Partly(refused) });
            }
        }
        ctx.out.ok();
        Ok(())
    });
}

/// `MSETNX (key value)...`: all or none, also when the store refuses one of them.
pub(super) fn msetnx(ctx: &mut Context<'_>) {
    let Some(pairs) = pairs(ctx) else { return };
    or_error(ctx, |ctx| {
        pairs.iter().try_for_each(|[key, value]| ctx.store.check(key, value.len()))?;
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

/// `APPEND key value`
pub(super) fn append(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let (key, tail) = (ctx.args[1], ctx.args[2]);
        let hash = ctx.store.locate(key);
        let len = ctx.store.peek(hash, key, ctx.now).map_or(0, |entry| entry.value.len());
        let len = ctx.store.edit(hash, key, len..len + tail.len(), ctx.now, &mut |v| v.copy_from_slice(tail))?;
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
        let found = if runs_back(start, end) { None } else { range(value.len(), start, end) };
        ctx.out.bulk(found.map_or(&[], |(first, last)| &value[first..=last]));
        Ok(())
    });
}

/// First and last place that `start` and `end` mean among `len`; negative ones count from the end. `None` when nothing
/// lies between.
///
/// A place before the first means the first, for `end` too: so it is in Redis before 8.
pub(super) fn range(len: usize, start: i64, end: i64) -> Option<(usize, usize)> {
    let len = len as i64;
    let place = |at: i64| if at < 0 { (len + at).max(0) } else { at };
    let (first, last) = (place(start), place(end).min(len - 1));
    (first <= last).then_some((first as usize, last as usize))
}

/// Whether both count from the end and nothing lies between, wherever the first place is. GETRANGE and BITCOUNT ask
/// this, BITPOS does not.
pub(super) fn runs_back(start: i64, end: i64) -> bool {
    start < 0 && end < 0 && start > end
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
        let len = ctx.store.edit(hash, key, offset..end, ctx.now, &mut |v| v.copy_from_slice(part))?;
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
                if lens[(i - 1) * width + j] > lens[i * width + j - 1] {
                    i -= 1
                } else {
                    j -= 1
                }
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
        let named =
            [("ex", Clause::Seconds), ("px", Clause::Millis), ("exat", Clause::AtSecond), ("pxat", Clause::AtMilli)];
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::command::testing::Console;
    use crate::record::MAX_KEY_LEN;
    use crate::store::StoreConfig;

    // The replies in these scripts are those of Redis 7.0, unless said otherwise.

    #[test]
    fn set_and_its_options() {
        Console::new().script(
            r#"
            get k => (nil)
            set k v => OK
            get k => "v"
            SET k "\x00\r\n" nX => (nil)
            set k 2 xx => OK
            get k => "2"
            set k 3 GET => "2"
            set k 4 NX GET => "3"
            set k 5 get xx => "3"
            get k => "5"
            set absent x xx get => (nil)
            set absent x nx get => (nil)
            set absent y get nx => "x"
            getset k 6 => "5"
            getset new 1 => (nil)
            getdel new => "1"
            getdel new => (nil)
            set k v nx xx => ERR syntax error
            set k v xx nx => ERR syntax error
            set k v bogus => ERR syntax error
            set k v persist => ERR syntax error
            set k v ex => ERR syntax error
            set k v ex 10 px 10 => ERR syntax error
            set k v ex 10 keepttl => ERR syntax error
            set k v keepttl ex 10 => ERR syntax error
            set k v ex 10 ex 20 => OK
            ttl k => (integer) 20
            set k v ex abc => ERR value is not an integer or out of range
            set k v ex 0 => ERR invalid expire time in 'set' command
            set k v px -1 => ERR invalid expire time in 'set' command
            set k v exat 0 => ERR invalid expire time in 'set' command
            set k v pxat -5 => ERR invalid expire time in 'set' command
            set k v ex 9223372036854775807 => ERR invalid expire time in 'set' command
            set k v px 9223372036854775807 => ERR invalid expire time in 'set' command
            set k v exat 9223372036854775 => OK
            set k v exat 9223372036854776 => ERR invalid expire time in 'set' command
            get k => "v"
            "#,
        );
    }

    #[test]
    fn expiries_are_kept_set_and_dropped() {
        Console::new().script(
            r#"
            set k v EX 100 => OK
            ttl k => (integer) 100
            set k w keepttl => OK
            ttl k => (integer) 100
            incr n => (integer) 1
            set n 41 px 100000 => OK
            incr n => (integer) 42
            ttl n => (integer) 100
            incrbyfloat n 0.5 => "42.5"
            ttl n => (integer) 100
            append n 0 => (integer) 5
            ttl n => (integer) 100
            set k x => OK
            ttl k => (integer) -1
            set k v exat 1 => OK
            get k => (nil)
            set k v => OK
            set k v pxat 1 get => "v"
            exists k => (integer) 0
            setnx k 1 => (integer) 1
            setnx k 2 => (integer) 0
            setex k 100 v => OK
            ttl k => (integer) 100
            psetex k 200000 v => OK
            ttl k => (integer) 200
            setex k 0 v => ERR invalid expire time in 'setex' command
            setex k x v => ERR value is not an integer or out of range
            setex k -1 v => ERR invalid expire time in 'setex' command
            setex k 9223372036854775807 v => ERR invalid expire time in 'setex' command
            psetex k 0 v => ERR invalid expire time in 'psetex' command
            psetex k 9223372036854775807 v => ERR invalid expire time in 'psetex' command
            getex k => "v"
            ttl k => (integer) 200
            getex k persist => "v"
            ttl k => (integer) -1
            getex k EX 10 => "v"
            ttl k => (integer) 10
            getex k px 20000 => "v"
            ttl k => (integer) 20
            getex k ex 10 px 10 => ERR syntax error
            getex k ex 10 persist => ERR syntax error
            getex k keepttl => ERR syntax error
            getex k nx => ERR syntax error
            getex k ex => ERR syntax error
            getex k ex 0 => ERR invalid expire time in 'getex' command
            getex k ex x => ERR value is not an integer or out of range
            getex k px 9223372036854775807 => ERR invalid expire time in 'getex' command
            getex absent ex 0 => (nil)
            getex absent ex x => (nil)
            getex absent ex x y => ERR syntax error
            getex k exat 1 => "v"
            exists k => (integer) 0
            setex g 100 v => OK
            getset g w => "v"
            ttl g => (integer) -1
            "#,
        );
    }

    #[test]
    fn several_keys() {
        Console::new().script(
            r#"
            mset a 1 b 2 a 3 => OK
            mget a absent b a => ["3", (nil), "2", "3"]
            mset a => ERR wrong number of arguments for 'mset' command
            mset a 1 b => ERR wrong number of arguments for 'mset' command
            msetnx c 1 a 2 => (integer) 0
            exists c => (integer) 0
            msetnx c 1 d 2 c 3 => (integer) 1
            mget c d => ["3", "2"]
            msetnx c 1 d => ERR wrong number of arguments for 'msetnx' command
            "#,
        );
    }

    #[test]
    fn ranges_of_bytes() {
        Console::new().script(
            r#"
            append k ab => (integer) 2
            append k "" => (integer) 2
            append k cd => (integer) 4
            append empty "" => (integer) 0
            exists empty => (integer) 1
            strlen k => (integer) 4
            strlen absent => (integer) 0
            getrange k 0 -1 => "abcd"
            getrange k 1 2 => "bc"
            getrange k -2 -1 => "cd"
            substr k -3 -2 => "bc"
            getrange k 2 1 => ""
            getrange k -1 -2 => ""
            getrange k 0 -100 => "a"
            getrange k -100 0 => "a"
            getrange k 10 20 => ""
            getrange k 3 9223372036854775807 => "d"
            getrange k -9223372036854775808 1 => "ab"
            getrange absent 0 -1 => ""
            getrange k a 1 => ERR value is not an integer or out of range
            getrange absent 0 b => ERR value is not an integer or out of range
            setrange k 2 XY => (integer) 4
            setrange k 6 Z => (integer) 7
            get k => "abXY\x00\x00Z"
            setrange absent 0 "" => (integer) 0
            setrange absent 9 "" => (integer) 0
            exists absent => (integer) 0
            setrange absent 2 x => (integer) 3
            get absent => "\x00\x00x"
            setrange k 1 "" => (integer) 7
            setrange k -1 x => ERR offset is out of range
            setrange absent2 -1 "" => ERR offset is out of range
            setrange k x y => ERR value is not an integer or out of range
            setrange k 536870911 ab => ERR string exceeds maximum allowed size (proto-max-bulk-len)
            setrange k 9223372036854775807 ab => ERR string exceeds maximum allowed size (proto-max-bulk-len)
            setrange k 536870912 "" => (integer) 7
            strlen k => (integer) 7
            "#,
        );
    }

    #[test]
    fn values_as_numbers() {
        Console::new().script(
            r#"
            incr n => (integer) 1
            incrby n 41 => (integer) 42
            decr n => (integer) 41
            decrby n 50 => (integer) -9
            incrby n -9 => (integer) -18
            get n => "-18"
            incrby n 1.5 => ERR value is not an integer or out of range
            incrby n "" => ERR value is not an integer or out of range
            incrby n 9223372036854775808 => ERR value is not an integer or out of range
            decrby n -9223372036854775808 => ERR decrement would overflow
            decrby n -9223372036854775807 => (integer) 9223372036854775789
            set n 9223372036854775807 => OK
            incr n => ERR increment or decrement would overflow
            decr n => (integer) 9223372036854775806
            set n -9223372036854775808 => OK
            decr n => ERR increment or decrement would overflow
            incr n => (integer) -9223372036854775807
            set n " 1" => OK
            incr n => ERR value is not an integer or out of range
            set n 007 => OK
            decr n => ERR value is not an integer or out of range
            set n 99 => OK
            incr n => (integer) 100
            set n -10 => OK
            incr n => (integer) -9
            set e "" => OK
            incr e => ERR value is not an integer or out of range
            incrbyfloat f 10.5 => "10.5"
            incrbyfloat f 0.1 => "10.6"
            incrbyfloat f -5 => "5.6"
            # Redis, in binary: 5005.60000000000000009
            incrbyfloat f 5.0e3 => "5005.6"
            get f => "5005.6"
            incrbyfloat f abc => ERR value is not a valid float
            incrbyfloat f "" => ERR value is not a valid float
            incrbyfloat f nan => ERR value is not a valid float
            incrbyfloat f inf => ERR increment would produce NaN or Infinity
            incrbyfloat f " 1" => ERR value is not a valid float
            incrbyfloat e 1 => ERR value is not a valid float
            set f abc => OK
            incrbyfloat f 1 => ERR value is not a valid float
            set f 3.0 => OK
            incrbyfloat f 0 => "3"
            incr f => (integer) 4
            set f 3.10 => OK
            incr f => ERR value is not an integer or out of range
            incrbyfloat z -0 => "0"
            "#,
        );
    }

    #[test]
    fn longest_common_subsequence() {
        Console::new().script(
            r#"
            mset {k}a ohmytext {k}b mynewtext => OK
            lcs {k}a {k}b => "mytext"
            lcs {k}a {k}b len => (integer) 6
            lcs {k}a {k}b IDX => {"matches": [[[(integer) 4, (integer) 7], [(integer) 5, (integer) 8]], [[(integer) 2, (integer) 3], [(integer) 0, (integer) 1]]], "len": (integer) 6}
            lcs {k}a {k}b idx minmatchlen 4 => {"matches": [[[(integer) 4, (integer) 7], [(integer) 5, (integer) 8]]], "len": (integer) 6}
            lcs {k}a {k}b idx MINMATCHLEN 4 withmatchlen => {"matches": [[[(integer) 4, (integer) 7], [(integer) 5, (integer) 8], (integer) 4]], "len": (integer) 6}
            lcs {k}a {k}b idx minmatchlen -1 withmatchlen => {"matches": [[[(integer) 4, (integer) 7], [(integer) 5, (integer) 8], (integer) 4], [[(integer) 2, (integer) 3], [(integer) 0, (integer) 1], (integer) 2]], "len": (integer) 6}
            lcs {k}a {k}b minmatchlen 4 => "mytext"
            lcs {k}a {k}c => ""
            lcs {k}a {k}c len => (integer) 0
            lcs {k}a {k}c idx => {"matches": [], "len": (integer) 0}
            lcs {k}a {k}a idx => {"matches": [[[(integer) 0, (integer) 7], [(integer) 0, (integer) 7]]], "len": (integer) 8}
            lcs {k}a {k}b idx len => ERR If you want both the length and indexes, please just use IDX.
            lcs {k}a {k}b minmatchlen => ERR syntax error
            lcs {k}a {k}b minmatchlen x => ERR value is not an integer or out of range
            lcs {k}a {k}b what => ERR syntax error
            "#,
        );
    }

    #[test]
    fn what_expired_is_not_there_for_writes_either() {
        Console::new().script(
            r#"
            set n 10 px 100 => OK
            set a x px 100 => OK
            set s x px 100 => OK
            wait 99
            get n => "10"
            wait 1
            incr n => (integer) 1
            ttl n => (integer) -1
            append a y => (integer) 1
            set s y xx => (nil)
            set s y nx keepttl get => (nil)
            ttl s => (integer) -1
            "#,
        );
    }

    #[test]
    fn a_refused_write_is_answered_by_its_error_alone_and_changes_nothing() {
        let mut console = Console::new();
        console.script("set {t}k old => OK");
        let used = console.store.memory_bytes() as u64;
        console.store.set_max_memory(used);
        let refusal = "OOM command not allowed when used memory > 'maxmemory'.";
        for line in
            ["set {t}k v get", "getset {t}k v", "append {t}k v", "setrange {t}k 9 v", "incr {t}n", "incrbyfloat {t}n 1"]
        {
            assert_eq!(console.run(line), refusal, "{line}");
        }
        // The first of the two fits, the second does not.
        console.store.set_max_memory(used + 1);
        assert_eq!(console.run("msetnx {t}a 1 {t}b 2"), refusal);
        console.script("mget {t}k {t}a {t}b {t}n => [\"old\", (nil), (nil), (nil)]");
    }

    #[test]
    fn a_refusal_half_way_says_that_a_part_was_written() {
        let mut console = Console::new();
        console.run("set k old");
        let used = console.store.memory_bytes() as u64;
        console.store.set_max_memory(used);
        assert!(console.run("mset a 1 b 2").starts_with("OOM "));
        console.store.set_max_memory(used + 1);
        assert!(console.run("mset a 1 b 2").starts_with("UNKNOWN part of the keys was written"));
        console.script("mget a b => [\"1\", (nil)]");
    }

    #[test]
    fn an_oversized_key_is_refused_before_others_are_written() {
        let mut console = Console::new();
        let key = vec![b'k'; MAX_KEY_LEN + 1];
        for command in [&b"mset"[..], b"msetnx"] {
            assert_eq!(console.run_args(&[command, b"a", b"1", &key, b"2"]), "ERR key is longer than 65535 bytes");
        }
        console.script("get a => (nil)");
    }

    #[test]
    fn no_command_makes_a_value_longer_than_the_store_takes() {
        let mut console = Console::with(StoreConfig { max_value: 8, ..StoreConfig::default() });
        console.script("set k 12345678 => OK");
        for command in ["set k 123456789", "append k 9", "setrange k 8 9", "setbit k 64 1", "mset k 1 a 123456789"] {
            assert_eq!(
                console.run(command),
                "ERR string exceeds maximum allowed size (proto-max-bulk-len)",
                "{command}"
            );
        }
        console.script(
            "mget k a => [\"12345678\", (nil)]
            setrange k 7 9 => (integer) 8
            get k => \"12345679\"",
        );
    }

    #[test]
    fn lcs_of_what_would_hold_up_the_core_is_refused() {
        let mut console = Console::new();
        let value = vec![b'v'; 4096];
        console.run_args(&[b"mset", b"{k}a", &value, b"{k}b", &value, b"{k}c", &[b'v'; 4097]]);
        console.script(
            "lcs {k}a {k}b len => (integer) 4096
            lcs {k}a {k}c len => ERR String too long for LCS: the lengths' product is limited to 16777216",
        );
    }

    #[test]
    fn counting_in_place_changes_no_memory() {
        let mut console = Console::with(StoreConfig { change_log_entries: 1, ..StoreConfig::default() });
        console.script("set n 10 => OK");
        let used = console.store.memory_bytes();
        for n in 11..100 {
            assert_eq!(console.run("incr n"), format!("(integer) {n}"));
        }
        assert_eq!(console.store.memory_bytes(), used);
    }

    proptest! {
        /// What LCS answers is a subsequence of both values, made of the runs that IDX lists, and as long as it says.
        #[test]
        fn a_common_subsequence_is_one(a in "[ab]{0,20}", b in "[abc]{0,20}") {
            let common = Common::of(a.as_bytes(), b.as_bytes());
            let (mut at_a, mut at_b, mut len) = (a.len(), b.len(), 0);
            for run in &common.runs {
                prop_assert!(run.a + run.len <= at_a && run.b + run.len <= at_b);
                prop_assert_eq!(&a[run.a..][..run.len], &b[run.b..][..run.len]);
                (at_a, at_b, len) = (run.a, run.b, len + run.len);
            }
            prop_assert_eq!(len, common.len);
        }
    }
}
