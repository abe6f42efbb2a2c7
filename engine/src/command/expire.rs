//! When keys expire: EXPIRE and its kin, TTL and its kin, PERSIST.
//!
//! A time that is not in the future deletes the key and counts as done. Times are kept as Unix milliseconds; seconds are
//! rounded to the nearest on the way out, as in Redis.

use super::failure::{Failure, or_error};
use super::{Context, number, one_line};

/// `EXPIRE key seconds [NX | XX | GT | LT]`
pub(super) fn expire(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| set(ctx, "expire", 1000, true));
}

/// `PEXPIRE key milliseconds [NX | XX | GT | LT]`
pub(super) fn pexpire(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| set(ctx, "pexpire", 1, true));
}

/// `EXPIREAT key unix-seconds [NX | XX | GT | LT]`
pub(super) fn expireat(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| set(ctx, "expireat", 1000, false));
}

/// `PEXPIREAT key unix-milliseconds [NX | XX | GT | LT]`
pub(super) fn pexpireat(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| set(ctx, "pexpireat", 1, false));
}

/// Under which condition a new expiry replaces the present one.
#[derive(Clone, Copy, Debug, Default)]
struct Condition {
    nx: bool,
    xx: bool,
    gt: bool,
    lt: bool,
}

impl Condition {
    fn parse(args: &[&[u8]]) -> Result<Condition, Failure> {
        let mut condition = Condition::default();
        for arg in args {
            match arg.to_ascii_lowercase().as_slice() {
                b"nx" => condition.nx = true,
                b"xx" => condition.xx = true,
                b"gt" => condition.gt = true,
                b"lt" => condition.lt = true,
                _ => return Err(Failure::Option(one_line(&arg[..arg.len().min(128)]).into())),
            }
        }
        let Condition { nx, xx, gt, lt } = condition;
        if nx && (xx || gt || lt) {
            return Err(Failure::Text("ERR NX and XX, GT or LT options at the same time are not compatible"));
        }
        if gt && lt {
            return Err(Failure::Text("ERR GT and LT options at the same time are not compatible"));
        }
        Ok(condition)
    }

    /// Whether `wanted` may replace `present`; none counts as later than any.
    fn allows(self, present: Option<i64>, wanted: i64) -> bool {
        !(self.nx && present.is_some()
            || self.xx && present.is_none()
            || self.gt && present.is_none_or(|present| wanted <= present)
            || self.lt && present.is_some_and(|present| wanted >= present))
    }
}

/// Sets the expiry to the second argument, in units of that many milliseconds, from now on or since 1970.
fn set(ctx: &mut Context<'_>, name: &'static str, unit: i64, from_now: bool) -> Result<(), Failure> {
    let condition = Condition::parse(&ctx.args[3..])?;
    let amount = number::parse_i64(ctx.args[2]).ok_or(Failure::NOT_AN_INTEGER)?;
    let base = if from_now { ctx.now as i64 } else { 0 };
    let when = amount.checked_mul(unit).and_then(|ms| ms.checked_add(base)).ok_or(Failure::ExpireTime(name))?;
    let key = ctx.args[1];
    let hash = ctx.store.locate(key);
    let done = match ctx.store.peek(hash, key, ctx.now) {
        None => false,
        Some(entry) if !condition.allows((entry.expires_at != 0).then_some(entry.expires_at as i64), when) => false,
        Some(_) if when <= ctx.now as i64 => ctx.store.delete(hash, key, ctx.now)?,
        Some(_) => ctx.store.set_expiry(hash, key, when as u64, ctx.now)?,
    };
    ctx.out.integer(i64::from(done));
    Ok(())
}

/// `PERSIST key`
pub(super) fn persist(ctx: &mut Context<'_>) {
    or_error(ctx, |ctx| {
        let key = ctx.args[1];
        let hash = ctx.store.locate(key);
        let done = match ctx.store.peek(hash, key, ctx.now) {
            Some(entry) if entry.expires_at != 0 => ctx.store.set_expiry(hash, key, 0, ctx.now)?,
            _ => false,
        };
        ctx.out.integer(i64::from(done));
        Ok(())
    });
}

/// `TTL key`
pub(super) fn ttl(ctx: &mut Context<'_>) {
    tell(ctx, |expires_at, now| to_seconds(expires_at - now));
}

/// `PTTL key`
pub(super) fn pttl(ctx: &mut Context<'_>) {
    tell(ctx, |expires_at, now| expires_at - now);
}

/// `EXPIRETIME key`
pub(super) fn expiretime(ctx: &mut Context<'_>) {
    tell(ctx, |expires_at, _| to_seconds(expires_at));
}

/// `PEXPIRETIME key`
pub(super) fn pexpiretime(ctx: &mut Context<'_>) {
    tell(ctx, |expires_at, _| expires_at);
}

/// Answers what `show` makes of the expiry and of now; -1 for a key without expiry, -2 for none.
fn tell(ctx: &mut Context<'_>, show: fn(i64, i64) -> i64) {
    let key = ctx.args[1];
    let hash = ctx.store.locate(key);
    let reply = match ctx.store.get(hash, key, ctx.now) {
        None => -2,
        Some(entry) if entry.expires_at == 0 => -1,
        Some(entry) => show(entry.expires_at as i64, ctx.now as i64),
    };
    ctx.out.integer(reply);
}

fn to_seconds(ms: i64) -> i64 {
    ms / 1000 + i64::from(ms % 1000 >= 500)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Console;

    #[test]
    fn keys_live_as_long_as_they_are_told_to() {
        // The console's time begins at 1 000 000.
        Console::new().script(
            r#"
            expire k 10 => (integer) 0
            ttl k => (integer) -2
            expiretime k => (integer) -2
            set k v => OK
            ttl k => (integer) -1
            pexpiretime k => (integer) -1
            persist k => (integer) 0
            expire k 10 => (integer) 1
            ttl k => (integer) 10
            pttl k => (integer) 10000
            expiretime k => (integer) 1010
            pexpiretime k => (integer) 1010000
            wait 501
            ttl k => (integer) 9
            wait 9498
            pttl k => (integer) 1
            ttl k => (integer) 0
            wait 1
            exists k => (integer) 0
            expire k 10 => (integer) 0
            persist k => (integer) 0

            set k v => OK
            pexpire k 1500 => (integer) 1
            ttl k => (integer) 2
            persist k => (integer) 1
            ttl k => (integer) -1
            expireat k 2000 => (integer) 1
            pexpiretime k => (integer) 2000000
            pexpireat k 9223372036854775807 => (integer) 1
            expiretime k => (integer) 9223372036854776
            get k => "v"
            "#,
        );
    }

    #[test]
    fn a_time_that_has_come_deletes() {
        for command in
            ["expire k 0", "expire k -1", "pexpire k -9223372036854775808", "expireat k 1000", "pexpireat k 0"]
        {
            let mut console = Console::new();
            console.run("set k v");
            assert_eq!(console.run(command), "(integer) 1", "{command}");
            assert!(console.store.is_empty(), "{command}");
        }
    }

    #[test]
    fn conditions_compare_with_the_present_expiry() {
        // None counts as for ever.
        for (present, condition, set) in [
            (None, "nx", true),
            (None, "xx", false),
            (None, "gt", false),
            (None, "lt", true),
            (None, "xx lt", false),
            (Some(99), "nx", false),
            (Some(99), "xx", true),
            (Some(99), "gt", true),
            (Some(99), "lt", false),
            (Some(100), "gt", false),
            (Some(100), "lt", false),
            (Some(101), "gt", false),
            (Some(101), "XX LT", true),
            (Some(101), "xx gt", false),
            (Some(101), "lt lt", true),
        ] {
            let mut console = Console::new();
            console.run("set k v");
            if let Some(seconds) = present {
                console.run(&format!("expire k {seconds}"));
            }
            let reply = console.run(&format!("expire k 100 {condition}"));
            assert_eq!(reply, format!("(integer) {}", i64::from(set)), "{present:?} {condition}");
            let ttl = if set { 100 } else { present.unwrap_or(-1) };
            assert_eq!(console.run("ttl k"), format!("(integer) {ttl}"), "{present:?} {condition}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_and_changes_nothing() {
        let mut console = Console::new();
        console.script(
            r#"
            set k v => OK
            expire k ten => ERR value is not an integer or out of range
            expire k 9223372036854775808 => ERR value is not an integer or out of range
            expire k 9223372036854775807 => ERR invalid expire time in 'expire' command
            expire k -9223372036854775808 => ERR invalid expire time in 'expire' command
            pexpire k 9223372036854775807 => ERR invalid expire time in 'pexpire' command
            expireat k 9223372036854776 => ERR invalid expire time in 'expireat' command
            expire nope 9223372036854775807 => ERR invalid expire time in 'expire' command
            expire k 10 nx xx => ERR NX and XX, GT or LT options at the same time are not compatible
            expire k 10 lt nx => ERR NX and XX, GT or LT options at the same time are not compatible
            expire k x gt lt => ERR GT and LT options at the same time are not compatible
            pexpire k 10 soon => ERR Unsupported option soon
            "#,
        );
        assert_eq!(console.run("ttl k"), "(integer) -1");
    }
}
