//! `DEBUG`, as far as it does no harm: what test-suites of clients ask for.
//!
//! Nothing here holds up a core: `SLEEP` makes its own client wait. Nothing reloads, crashes or corrupts.

use std::time::Duration;

use gridkv_engine::reply::Reply;
use gridkv_net::resp::{Protocol, Writer};

use super::gather::{each_core, on_core};
use super::{LONGEST_WAIT, Outcome, word};
use crate::cores::CoreRc;

/// What DEBUG HELP answers.
const HELP: &[&str] = &[
    "DEBUG <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "CHANGE-REPL-ID",
    "    Accepted; there is no replication whose id could change.",
    "OBJECT <key>",
    "    How the value of a key is kept.",
    "PROTOCOL <type>",
    "    A reply of that type: string, integer, double, null, array, set, map, attrib,",
    "    push, verbatim, true, false, bignum.",
    "SET-ACTIVE-EXPIRE <0|1>",
    "    Whether expired keys are looked for in the background.",
    "SLEEP <seconds>",
    "    Answers after that time. Only this connection waits.",
    "HELP",
    "    Prints this help.",
];

/// `DEBUG subcommand …`; `out` takes the bytes of one reply.
pub(crate) async fn debug(core: &CoreRc, protocol: Protocol, args: &[&[u8]], out: &mut Vec<u8>) -> Outcome {
    match args[1..] {
        [what] if word(what, "help") => super::help(HELP, &mut Writer::new(protocol, out)),
        [what] if word(what, "change-repl-id") => Writer::new(protocol, out).ok(),
        [what, on] if word(what, "set-active-expire") && (on == b"0" || on == b"1") => {
            let on = on == b"1";
            each_core(core, move |core| core.state.borrow_mut().settings.active_expire = on).await;
            Writer::new(protocol, out).ok();
        }
        [what, seconds] if word(what, "sleep") => {
            let seconds = std::str::from_utf8(seconds).ok().and_then(|text| text.parse().ok());
            let time = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
            let time = time.ok_or("ERR value is not a valid float")?;
            glommio::timer::sleep(time.min(LONGEST_WAIT)).await;
            Writer::new(protocol, out).ok();
        }
        [what, key] if word(what, "object") => {
            let hash = core.topology.keyspace().locate(key);
            let key = key.to_vec();
            let look = move |core: &CoreRc| {
                let state = &mut *core.state.borrow_mut();
                state.store.peek(hash, &key, state.now).map(|entry| entry.value.len())
            };
            let found = on_core(core, core.topology.owner_of(hash).index(), look).await.flatten();
            let len = found.ok_or("ERR no such key")?;
            // Where a value lies says nothing to a client and much to an attacker.
            let text = format!("Value at:0x0 refcount:1 encoding:raw serializedlength:{len} lru:0 lru_seconds_idle:0");
            Writer::new(protocol, out).simple(&text);
        }
        [what, kind] if word(what, "protocol") => return sample(protocol, kind, out),
        _ => {
            let name = String::from_utf8_lossy(args[1]);
            return Err(
                format!("ERR unknown subcommand or wrong number of arguments for '{name}'. Try DEBUG HELP.").into()
            );
        }
    }
    Ok(())
}

/// A reply of a type, the same that Redis gives.
fn sample(protocol: Protocol, kind: &[u8], out: &mut Vec<u8>) -> Outcome {
    let three = protocol == Protocol::Resp3;
    let mut reply = Writer::new(protocol, out);
    let numbers = |reply: &mut Writer<'_>| (0..3).for_each(|number| reply.integer(number));
    match kind.to_ascii_lowercase().as_slice() {
        b"string" => reply.bulk(b"Hello World"),
        b"integer" => reply.integer(12345),
        b"double" => reply.double(1.234),
        b"null" => reply.null(),
        b"array" => {
            reply.array(3);
            numbers(&mut reply);
        }
        b"set" => {
            reply.set(3);
            numbers(&mut reply);
        }
        b"map" => {
            reply.map(3);
            for key in 0..3 {
                reply.integer(key);
                reply.boolean(key == 1);
            }
        }
        b"attrib" => {
            if three {
                out.extend_from_slice(b"|1\r\n$14\r\nkey-popularity\r\n*2\r\n$7\r\nkey:123\r\n:90\r\n");
            }
            Writer::new(protocol, out).bulk(b"Some real reply following the attribute");
        }
        b"push" if !three => return Err("ERR RESP2 is not supported by this command".into()),
        b"push" => {
            reply.push(2);
            reply.bulk(b"server-cpu-usage");
            reply.integer(42);
        }
        b"verbatim" => reply.verbatim("This is a verbatim\nstring"),
        b"true" => reply.boolean(true),
        b"false" => reply.boolean(false),
        b"bignum" if three => out.extend_from_slice(b"(1234567999999999999999999999999999999\r\n"),
        b"bignum" => reply.bulk(b"1234567999999999999999999999999999999"),
        _ => {
            return Err("ERR Wrong protocol type name. Please use one of the following: \
                        string|integer|double|null|array|set|map|attrib|push|verbatim|true|false|bignum"
                .into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(kind: &str) -> [String; 2] {
        [Protocol::Resp2, Protocol::Resp3].map(|protocol| {
            let mut out = Vec::new();
            match sample(protocol, kind.as_bytes(), &mut out) {
                Ok(()) => String::from_utf8(out).unwrap(),
                Err(error) => error.to_string(),
            }
        })
    }

    #[test]
    fn replies_of_each_type_have_the_form_of_the_protocol() {
        assert_eq!(both("true"), [":1\r\n", "#t\r\n"]);
        assert_eq!(both("SET"), ["*3\r\n:0\r\n:1\r\n:2\r\n", "~3\r\n:0\r\n:1\r\n:2\r\n"]);
        let tail = "$39\r\nSome real reply following the attribute\r\n";
        let head = "|1\r\n$14\r\nkey-popularity\r\n*2\r\n$7\r\nkey:123\r\n:90\r\n";
        assert_eq!(both("attrib"), [tail.to_owned(), format!("{head}{tail}")]);
        assert!(both("push")[0].starts_with("ERR "));
        assert!(both("nothing").iter().all(|text| text.starts_with("ERR Wrong protocol type")));
    }
}
