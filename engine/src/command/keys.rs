//! Whole keys, whatever they hold: delete, look, rename, copy, list, clear; and what OBJECT and MEMORY say about one.
//!
//! RENAME and COPY write the target first and take the source away last, so a write that is refused (memory limit, key
//! too long) has changed nothing. At the memory limit a copy is refused and a rename is not, as in Redis; how long a name may
//! then become: [`crate::store::Store::rename`].
//!
//! Not here: times to live ([`super::expire`]), walking step by step ([`super::scan`]).

use super::failure::{Failure, or_error};
use super::{Context, glob, number};
use crate::Millis;
use crate::hash::KeyHash;
use crate::record::Entry;
use crate::reply::Reply;
use crate::store::StoreError;

const NO_SUCH_KEY: Failure = Failure::Text("ERR no such key");
const NOT_A_DB: Failure = Failure::Text("ERR value is out of range, value must between -2147483648 and 2147483647");
const NO_LFU: &str = "ERR An LFU maxmemory policy is not selected, access frequency not tracked. Please note that when \
    switching between policies at runtime LRU and LFU data will take some time to adjust.";

/// Longest value that Redis keeps together with its header; what `OBJECT ENCODING` tells.
const EMBEDDED_MAX: usize = 44;

/// Bytes of a table per key: a bucket of 64 has seven slots, two in three in use.
const TABLE_SHARE: usize = 64 * 3 / (7 * 2);

/// `DEL key...`, `UNLINK key...`
pub(super) fn del(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let mut deleted = 0;
        for key in &ctx.args[1..] {
            deleted += i64::from(ctx.store.delete(ctx.store.locate(key), key, ctx.now)?);
        }
        total(ctx, deleted);
        Ok(())
    });
}

/// `EXISTS key...`, `TOUCH key...`: a key named twice counts twice.
pub(super) fn exists(ctx: &mut Context<'_>) {
    let mut found = 0;
    for key in &ctx.args[1..] {
        found += i64::from(ctx.store.get(ctx.store.locate(key), key, ctx.now).is_some());
    }
    total(ctx, found);
}

/// `DBSIZE`
pub(super) fn dbsize(ctx: &mut Context<'_>) {
    let len = ctx.store.len() as i64;
    total(ctx, len);
}

fn total(ctx: &mut Context<'_>, sum: i64) {
    ctx.aux = sum;
    ctx.out.integer(sum);
}

/// `TYPE key`
pub(super) fn kind(ctx: &mut Context<'_>) {
    let key = ctx.args[1];
    let found = ctx.store.get(ctx.store.locate(key), key, ctx.now).is_some();
    ctx.out.simple(if found { "string" } else { "none" });
}

/// `RENAME key newkey`
pub(super) fn rename(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        move_value(ctx, true)?;
        ctx.out.ok();
        Ok(())
    });
}

/// `RENAMENX key newkey`
pub(super) fn renamenx(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let moved = move_value(ctx, false)?;
        ctx.out.integer(i64::from(moved));
        Ok(())
    });
}

/// Gives the value under the first argument the second as its key; false when that is taken and must stay.
fn move_value(ctx: &mut Context<'_>, replace: bool) -> Result<bool, Failure> {
    let (from, to) = (ctx.args[1], ctx.args[2]);
    let (from_hash, to_hash) = (ctx.store.locate(from), ctx.store.locate(to));
    if !ctx.store.exists(from_hash, from, ctx.now) {
        return Err(NO_SUCH_KEY);
    }
    if from == to {
        return Ok(replace);
    }
    if !replace && ctx.store.exists(to_hash, to, ctx.now) {
        return Ok(false);
    }
    ctx.store.rename((from_hash, from), (to_hash, to), ctx.now).map_err(Failure::from)
}

/// `COPY source destination [DB 0] [REPLACE]`
pub(super) fn copy(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let (from, to) = (ctx.args[1], ctx.args[2]);
        let replace = copy_options(&ctx.args[3..])?;
        if from == to {
            return Err(Failure::Text("ERR source and destination objects are the same"));
        }
        let (from_hash, to_hash) = (ctx.store.locate(from), ctx.store.locate(to));
        let copied =
            (replace || !ctx.store.exists(to_hash, to, ctx.now)) && copy_value(ctx, (from_hash, from), (to_hash, to))?;
        ctx.out.integer(i64::from(copied));
        Ok(())
    });
}

/// Whether what is under the destination may be replaced.
fn copy_options(options: &[&[u8]]) -> Result<bool, Failure> {
    let mut replace = false;
    let mut options = options.iter();
    while let Some(option) = options.next() {
        if option.eq_ignore_ascii_case(b"replace") {
            replace = true;
            continue;
        }
        let (true, Some(db)) = (option.eq_ignore_ascii_case(b"db"), options.next()) else {
            return Err(Failure::SYNTAX);
        };
        match i32::try_from(number::parse_i64(db).ok_or(Failure::NOT_AN_INTEGER)?) {
            Ok(0) => {}
            Ok(_) => return Err(Failure::Text("ERR DB index is out of range")),
            Err(_) => return Err(NOT_A_DB),
        }
    }
    Ok(replace)
}

/// Writes value and expiry of one key under another; false when there is nothing under the first.
fn copy_value(ctx: &mut Context<'_>, from: (KeyHash, &[u8]), to: (KeyHash, &[u8])) -> Result<bool, StoreError> {
    let Some(entry) = ctx.store.peek(from.0, from.1, ctx.now) else { return Ok(false) };
    let (value, expires_at) = (entry.value.to_vec(), entry.expires_at);
    ctx.store.set(to.0, to.1, &value, expires_at, ctx.now)?;
    Ok(true)
}

/// `KEYS pattern`: elements only, counted; see [`super::Merge::Concat`].
pub(super) fn keys(ctx: &mut Context<'_>) {
    let pattern = ctx.args[1];
    let prefix = glob::literal_prefix(pattern);
    if prefix == pattern {
        // One key at most, found without a walk, unless it is another core's.
        let hash = ctx.store.locate(pattern);
        let shard = ctx.store.keyspace().shard(hash);
        if ctx.store.owned().contains(&shard.0) && ctx.store.exists(hash, pattern, ctx.now) {
            ctx.out.bulk(pattern);
            ctx.aux = 1;
        }
        return;
    }
    let (out, found) = (&mut *ctx.out, &mut ctx.aux);
    let rest = ctx.store.scan(KeyHash::MIN, usize::MAX, ctx.now, &mut |entry| {
        if entry.key.starts_with(prefix) && glob::matches(pattern, entry.key) {
            out.bulk(entry.key);
            *found += 1;
        }
    });
    debug_assert!(rest.is_none(), "a walk without limit reaches the end");
}

/// `FLUSHDB [ASYNC | SYNC]`, `FLUSHALL [ASYNC | SYNC]`: gone for readers when it answers, either way.
pub(super) fn flush(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        match ctx.args {
            [_] => {}
            [_, mode] if mode.eq_ignore_ascii_case(b"async") || mode.eq_ignore_ascii_case(b"sync") => {}
            _ => return Err(Failure::SYNTAX),
        }
        ctx.store.clear(ctx.now)?;
        ctx.out.ok();
        Ok(())
    });
}

/// `OBJECT ENCODING key`: what Redis would say of such a value.
pub(super) fn object_encoding(ctx: &mut Context<'_>) {
    object(ctx, |entry, _, out| out.bulk(encoding(entry.value).as_bytes()));
}

fn encoding(value: &[u8]) -> &'static str {
    match number::parse_i64(value) {
        Some(_) => "int",
        None if value.len() <= EMBEDDED_MAX => "embstr",
        None => "raw",
    }
}

/// `OBJECT REFCOUNT key`
pub(super) fn object_refcount(ctx: &mut Context<'_>) {
    object(ctx, |_, _, out| out.integer(1));
}

/// `OBJECT IDLETIME key`: since the last write, for reads leave no trace.
pub(super) fn object_idletime(ctx: &mut Context<'_>) {
    object(ctx, |entry, now, out| out.integer((now.saturating_sub(entry.version.hlc.millis()) / 1000) as i64));
}

/// `OBJECT FREQ key`
pub(super) fn object_freq(ctx: &mut Context<'_>) {
    object(ctx, |_, _, out| out.error(NO_LFU));
}

/// Tells something about the value under the second argument, or null.
fn object(ctx: &mut Context<'_>, tell: fn(Entry<'_>, Millis, &mut dyn Reply)) {
    let key = ctx.args[2];
    match ctx.store.get(ctx.store.locate(key), key, ctx.now) {
        Some(entry) => tell(entry, ctx.now, ctx.out),
        None => ctx.out.null(),
    }
}

/// `MEMORY USAGE key [SAMPLES count]`: exact, so samples are not needed.
pub(super) fn memory_usage(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let key = ctx.args[2];
        let mut options = ctx.args[3..].iter();
        while let Some(option) = options.next() {
            let (true, Some(samples)) = (option.eq_ignore_ascii_case(b"samples"), options.next()) else {
                return Err(Failure::SYNTAX);
            };
            if number::parse_i64(samples).ok_or(Failure::NOT_AN_INTEGER)? < 0 {
                return Err(Failure::SYNTAX);
            }
        }
        match ctx.store.peek(ctx.store.locate(key), key, ctx.now) {
            Some(entry) => ctx.out.integer((entry.footprint() + TABLE_SHARE) as i64),
            None => ctx.out.null(),
        }
        Ok(())
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::Console;
    use crate::store::StoreConfig;

    #[test]
    fn keys_are_counted_deleted_and_typed() {
        Console::new().script(
            r#"
            dbsize => (integer) 0
            set a 1 => OK
            set b 2 => OK
            set c 3 => OK
            exists a b nope a => (integer) 3
            touch a nope => (integer) 1
            type a => string
            type nope => none
            dbsize => (integer) 3
            del a a nope => (integer) 1
            unlink b => (integer) 1
            exists a b c => (integer) 1
            flushdb never => ERR syntax error
            flushall async sync => ERR syntax error
            dbsize => (integer) 1
            flushall ASYNC => OK
            dbsize => (integer) 0
            set a 1 => OK
            flushdb => OK
            exists a => (integer) 0
            "#,
        );
    }

    #[test]
    fn what_expired_is_neither_counted_nor_copied_nor_in_the_way() {
        Console::new().script(
            r#"
            psetex {t}a 10 v => OK
            set {t}b v => OK
            wait 10
            del {t}a => (integer) 0
            psetex {t}a 10 v => OK
            wait 10
            rename {t}a {t}c => ERR no such key
            copy {t}a {t}c => (integer) 0
            renamenx {t}b {t}a => (integer) 1
            keys * => ["{t}a"]
            "#,
        );
    }

    #[test]
    fn a_renamed_or_copied_value_keeps_its_time_to_live() {
        Console::new().script(
            r#"
            rename nope nope => ERR no such key
            renamenx nope other => ERR no such key
            setex k 100 value => OK
            rename k k => OK
            renamenx k k => (integer) 0
            get k => "value"
            set other x => OK
            renamenx k other => (integer) 0
            rename k other => OK
            exists k => (integer) 0
            get other => "value"
            ttl other => (integer) 100
            set plain p => OK
            rename plain other => OK
            ttl other => (integer) -1
            renamenx other k => (integer) 1
            keys * => ["k"]

            expire k 50 => (integer) 1
            copy k k => ERR source and destination objects are the same
            copy nope nope2 => (integer) 0
            copy k c => (integer) 1
            ttl c => (integer) 50
            set k new => OK
            copy k c => (integer) 0
            get c => "p"
            copy k c DB 0 replace => (integer) 1
            get c => "new"
            ttl c => (integer) -1
            copy k d db 1 => ERR DB index is out of range
            copy k d db zero => ERR value is not an integer or out of range
            copy k d db 4294967296 => ERR value is out of range, value must between -2147483648 and 2147483647
            copy k d db => ERR syntax error
            copy k d over => ERR syntax error
            exists d => (integer) 0
            "#,
        );
    }

    #[test]
    fn a_refused_rename_loses_nothing() {
        let mut console = Console::new();
        console.run("set k value");
        console.run("set taken old");
        let long = [b"x".repeat(70_000), b"{".to_vec()].concat();
        assert!(console.run_args(&[b"rename", b"k", &long]).starts_with("ERR key is longer"));
        console.store.set_max_memory(1);
        let longer = [b"x".repeat(100), b"{".to_vec()].concat();
        assert!(console.run_args(&[b"renamenx", b"k", &longer]).starts_with("OOM "));
        assert_eq!(console.run("keys *").matches('"').count(), 4);
        assert_eq!((console.run("get k").as_str(), console.run("get taken").as_str()), ("\"value\"", "\"old\""));
    }

    #[test]
    fn at_the_memory_limit_a_rename_goes_through_and_a_copy_does_not() {
        let mut console = Console::new();
        console.run("setex k 100 value");
        console.run("set taken old");
        console.store.set_max_memory(console.store.memory_bytes() as u64);
        assert!(console.run("set k more").starts_with("OOM "));
        assert!(console.run("copy k taken replace").starts_with("OOM "));
        console.script(
            r#"
            renamenx k taken => (integer) 0
            renamenx k free => (integer) 1
            rename free taken => OK
            get taken => "value"
            ttl taken => (integer) 100
            keys * => ["taken"]
            "#,
        );
    }

    #[test]
    fn patterns_pick_keys() {
        let mut console = Console::new();
        for key in ["one", "two", "three", "th*ee", ""] {
            console.run_args(&[b"set", key.as_bytes(), b"v"]);
        }
        let mut picked = |pattern: &[u8]| {
            let reply = console.run_args(&[b"keys", pattern]);
            let mut keys: Vec<_> = reply.trim_matches(['[', ']']).split(", ").map(str::to_owned).collect();
            keys.sort();
            keys.join(" ")
        };
        assert_eq!(picked(b"t*"), r#""th*ee" "three" "two""#);
        assert_eq!(picked(b"th[^*]ee"), r#""three""#);
        assert_eq!(picked(b"th\\*ee"), r#""th*ee""#);
        assert_eq!(picked(b"one"), r#""one""#);
        assert_eq!(picked(b"on"), "");
        assert_eq!(picked(b""), r#""""#);
        assert_eq!(picked(b"*").matches(' ').count(), 4);
    }

    #[test]
    fn a_pattern_that_is_another_cores_key_finds_nothing() {
        let mut console = Console::with(StoreConfig { owned: 0..1, ..StoreConfig::default() });
        for n in 0..300 {
            assert_eq!(console.run(&format!("keys k{n}")), "[]");
        }
    }

    #[test]
    fn a_key_is_described_as_by_redis() {
        let mut console = Console::new();
        console.script(
            r#"
            object encoding nope => (nil)
            object refcount nope => (nil)
            object idletime nope => (nil)
            object freq nope => (nil)
            memory usage nope => (nil)
            set k 12345 => OK
            object encoding k => "int"
            set k -9223372036854775808 => OK
            object encoding k => "int"
            set k 9223372036854775808 => OK
            object encoding k => "embstr"
            set k 012 => OK
            object encoding k => "embstr"
            set k 12345678901234567890123456789012345678901234 => OK
            object encoding k => "embstr"
            append k 5 => (integer) 45
            object encoding k => "raw"
            object refcount k => (integer) 1
            wait 2999
            object idletime k => (integer) 2
            memory usage k samples 5 samples 0 => (integer) 77
            memory usage k samples -1 => ERR syntax error
            memory usage k samples => ERR syntax error
            memory usage k sample 1 => ERR syntax error
            memory usage k samples x => ERR value is not an integer or out of range
            "#,
        );
        assert!(console.run("object freq k").starts_with("ERR An LFU maxmemory policy is not selected, access"));
    }
}
