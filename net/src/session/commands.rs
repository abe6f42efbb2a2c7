//! Commands that the session answers itself: they are about the connection, not about data.

use gridkv_engine::command::{Spec, introspect, number};
use gridkv_engine::reply::Reply;

use super::replies::Loudness;
use super::{Backplane, Blame, Login, ReplyMode, Session, Step};
use crate::resp::{Protocol, Writer};

const WRONG_PASSWORD: &str = "WRONGPASS invalid username-password pair or user is disabled.";
const NOT_AN_INTEGER: &str = "ERR value is not an integer or out of range";
const SYNTAX: &str = "ERR syntax error";
/// Levels in [`crate::frame::Head::level`]; 0 is the cluster's own quorum.
const LEVEL_ONE: u32 = 1;
const LEVEL_ALL: u32 = 2;
const LEVEL_EXACTLY: u32 = 0x100;
/// What clients take for the server's version when they decide what they may use.
const REDIS_VERSION: &str = "7.2.0";

/// Whether a command is executed inside MULTI instead of being queued.
pub(super) fn runs_inside_multi(spec: &Spec) -> bool {
    matches!(spec.name, "multi" | "exec" | "discard" | "watch" | "quit" | "reset")
}

impl Session {
    pub(super) fn ok(&mut self, loudness: Loudness, out: &mut Vec<u8>) {
        self.reply(loudness, out, |out| out.extend_from_slice(b"+OK\r\n"));
    }

    fn say(&mut self, loudness: Loudness, out: &mut Vec<u8>, write: impl FnOnce(&mut Writer<'_>)) {
        let protocol = self.client.protocol;
        self.reply(loudness, out, |out| write(&mut Writer::new(protocol, out)));
    }

    /// Runs a command of [`gridkv_engine::command::Route::Session`].
    pub(super) fn own(
        &mut self,
        spec: &'static Spec,
        args: &[&[u8]],
        loudness: Loudness,
        back: &mut impl Backplane,
        out: &mut Vec<u8>,
    ) -> Step {
        self.blame = Blame::Failed(spec.id);
        // What EXEC takes is measured where it runs.
        if spec.name != "exec" {
            back.begin(spec);
        }
        let step = match spec.name {
            "watch" => self.watch(args, loudness, back, out),
            "exec" => self.exec(loudness, back, out),
            _ => Step::Done,
        };
        if step == Step::Later {
            return Step::Later;
        }
        self.perform(spec, args, loudness, back, out);
        back.count(spec, args);
        Step::Done
    }

    /// The part of it that never has to wait.
    fn perform(
        &mut self,
        spec: &'static Spec,
        args: &[&[u8]],
        loudness: Loudness,
        back: &mut impl Backplane,
        out: &mut Vec<u8>,
    ) {
        match spec.name {
            "watch" | "exec" => {}
            "ping" => match args {
                [_] => self.say(loudness, out, |w| w.simple("PONG")),
                [_, text] => self.say(loudness, out, |w| w.bulk(text)),
                _ => self.refuse("ERR wrong number of arguments for 'ping' command", loudness, back, out),
            },
            "echo" => self.say(loudness, out, |w| w.bulk(args[1])),
            "hello" => self.hello(args, loudness, back, out),
            "auth" => self.auth(args, loudness, back, out),
            "quit" => {
                self.ok(loudness, out);
                self.close();
            }
            "reset" => self.reset(back, out),
            "select" => match number::parse_i64(args[1]) {
                Some(0) => self.ok(loudness, out),
                Some(_) => self.refuse("ERR DB index is out of range", loudness, back, out),
                None => self.refuse(NOT_AN_INTEGER, loudness, back, out),
            },
            "asking" | "readonly" | "readwrite" => self.ok(loudness, out),
            "multi" => self.multi(loudness, back, out),
            "discard" => self.discard(loudness, back, out),
            "unwatch" => {
                self.watched.clear();
                self.ok(loudness, out);
            }
            "client|id" => {
                let id = self.client.id as i64;
                self.say(loudness, out, |w| w.integer(id));
            }
            "client|getname" => {
                let name = self.client.name.clone();
                self.say(loudness, out, |w| if name.is_empty() { w.null() } else { w.bulk(name.as_bytes()) });
            }
            "client|setname" => match plain_text(args[2]) {
                Some(name) => {
                    self.client.name = name;
                    self.ok(loudness, out);
                }
                None => self.refuse(
                    "ERR Client names cannot contain spaces, newlines or special characters.",
                    loudness,
                    back,
                    out,
                ),
            },
            "client|setinfo" => self.set_info(args, loudness, back, out),
            "client|reply" => self.set_reply_mode(args[2], loudness, back, out),
            "client|consistency" => self.set_level(args, loudness, back, out),
            "client|no-evict" | "client|no-touch" => {
                let on = if args[2].eq_ignore_ascii_case(b"on") {
                    true
                } else if args[2].eq_ignore_ascii_case(b"off") {
                    false
                } else {
                    return self.refuse(SYNTAX, loudness, back, out);
                };
                if spec.name == "client|no-evict" {
                    self.client.no_evict = on
                } else {
                    self.client.no_touch = on
                }
                self.ok(loudness, out);
            }
            name if name.ends_with("|help") => {
                let container = name.trim_end_matches("|help");
                self.say(loudness, out, |w| introspect::help(container, w));
            }
            name if name == "command" || name.starts_with("command|") => {
                self.say(loudness, out, |w| introspect::answer(spec, args, w));
            }
            // A container without its subcommand.
            name => {
                let text = format!("ERR wrong number of arguments for '{name}' command");
                self.refuse(&text, loudness, back, out);
            }
        }
    }

    fn hello(&mut self, args: &[&[u8]], loudness: Loudness, back: &mut impl Backplane, out: &mut Vec<u8>) {
        let mut protocol = self.client.protocol;
        let mut name = None;
        let mut login = None;
        if let Some(version) = args.get(1) {
            protocol = match number::parse_i64(version) {
                Some(2) => Protocol::Resp2,
                Some(3) => Protocol::Resp3,
                Some(_) => return self.refuse("NOPROTO unsupported protocol version", loudness, back, out),
                None => {
                    let text = "ERR Protocol version is not an integer or out of range";
                    return self.refuse(text, loudness, back, out);
                }
            };
        }
        let mut rest = args.get(2..).unwrap_or_default();
        loop {
            match rest {
                [] => break,
                [word, user, password, tail @ ..] if word.eq_ignore_ascii_case(b"auth") => {
                    login = Some((*user, *password));
                    rest = tail;
                }
                [word, text, tail @ ..] if word.eq_ignore_ascii_case(b"setname") => {
                    let Some(text) = plain_text(text) else {
                        let text = "ERR Client names cannot contain spaces, newlines or special characters.";
                        return self.refuse(text, loudness, back, out);
                    };
                    name = Some(text);
                    rest = tail;
                }
                [word, ..] => {
                    let text = format!("ERR Syntax error in HELLO option '{}'", String::from_utf8_lossy(word));
                    return self.refuse(&text, loudness, back, out);
                }
            }
        }
        if let Some((user, password)) = login
            && !self.log_in(user, password, back)
        {
            return self.refuse(WRONG_PASSWORD, loudness, back, out);
        }
        if !self.authenticated {
            let text = "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> \
                        AUTH <user> <pass> option can be used to authenticate the client and select the RESP protocol \
                        version at the same time";
            return self.refuse(text, loudness, back, out);
        }
        if let Some(name) = name {
            self.client.name = name;
        }
        self.client.protocol = protocol;
        let id = self.client.id as i64;
        let mode = if back.in_cluster() { "cluster" } else { "standalone" };
        self.say(loudness, out, |w| {
            w.map(7);
            for (field, value) in [("server", "redis"), ("version", REDIS_VERSION)] {
                w.bulk(field.as_bytes());
                w.bulk(value.as_bytes());
            }
            w.bulk(b"proto");
            w.integer(i64::from(protocol.flag()));
            w.bulk(b"id");
            w.integer(id);
            for (field, value) in [("mode", mode), ("role", "master")] {
                w.bulk(field.as_bytes());
                w.bulk(value.as_bytes());
            }
            w.bulk(b"modules");
            w.array(0);
        });
    }

    fn log_in(&mut self, user: &[u8], password: &[u8], back: &mut impl Backplane) -> bool {
        match back.login(user, password) {
            Login::Welcome | Login::NotNeeded => {
                self.authenticated = true;
                self.update_plain();
                true
            }
            Login::Refused => false,
        }
    }

    fn auth(&mut self, args: &[&[u8]], loudness: Loudness, back: &mut impl Backplane, out: &mut Vec<u8>) {
        let (user, password): (&[u8], &[u8]) = match args {
            [_, password] => {
                if !back.needs_password() {
                    let text = "ERR AUTH <password> called without any password configured for the default user. \
                                Are you sure your configuration is correct?";
                    return self.refuse(text, loudness, back, out);
                }
                (b"default", password)
            }
            [_, user, password] => (user, password),
            _ => return self.refuse(SYNTAX, loudness, back, out),
        };
        if self.log_in(user, password, back) {
            self.ok(loudness, out);
        } else {
            self.refuse(WRONG_PASSWORD, loudness, back, out);
        }
    }

    fn reset(&mut self, back: &mut impl Backplane, out: &mut Vec<u8>) {
        self.end_multi();
        self.client.protocol = Protocol::Resp2;
        self.client.name.clear();
        (self.client.no_evict, self.client.no_touch, self.client.level) = (false, false, 0);
        back.set_level(0);
        self.reply_mode = ReplyMode::On;
        self.authenticated = !back.needs_password();
        self.update_plain();
        self.say(Loudness::Heard, out, |w| w.simple("RESET"));
    }

    /// CLIENT CONSISTENCY: how many replicas answer this connection from now on; without an argument, how many do.
    fn set_level(&mut self, args: &[&[u8]], loudness: Loudness, back: &mut impl Backplane, out: &mut Vec<u8>) {
        let Some(word) = args.get(2) else {
            let level = self.client.level;
            let name = match level {
                0 => "quorum".to_owned(),
                LEVEL_ONE => "one".to_owned(),
                LEVEL_ALL => "all".to_owned(),
                exactly => (exactly & 0xff).to_string(),
            };
            return self.say(loudness, out, |w| w.bulk(name.as_bytes()));
        };
        let level = match word.to_ascii_lowercase().as_slice() {
            b"quorum" | b"default" => 0,
            b"one" => LEVEL_ONE,
            b"all" => LEVEL_ALL,
            [digit @ b'1'..=b'7'] => LEVEL_EXACTLY | u32::from(digit - b'0'),
            _ => {
                return self.refuse(
                    "ERR a level is one, quorum, all, default or a number from 1 to 7",
                    loudness,
                    back,
                    out,
                );
            }
        };
        self.client.level = level;
        back.set_level(level);
        self.ok(loudness, out);
    }

    fn set_info(&mut self, args: &[&[u8]], loudness: Loudness, back: &mut impl Backplane, out: &mut Vec<u8>) {
        let option = args[2].to_ascii_lowercase();
        let (name, field) = match option.as_slice() {
            b"lib-name" => ("lib-name", &mut self.client.lib_name),
            b"lib-ver" => ("lib-ver", &mut self.client.lib_ver),
            _ => {
                let text = format!("ERR Unrecognized option '{}'", String::from_utf8_lossy(args[2]));
                return self.refuse(&text, loudness, back, out);
            }
        };
        match plain_text(args[3]) {
            Some(text) => {
                *field = text;
                self.ok(loudness, out);
            }
            None => {
                let text = format!("ERR {name} cannot contain spaces, newlines or special characters.");
                self.refuse(&text, loudness, back, out);
            }
        }
    }

    fn set_reply_mode(&mut self, mode: &[u8], loudness: Loudness, back: &mut impl Backplane, out: &mut Vec<u8>) {
        if mode.eq_ignore_ascii_case(b"on") {
            self.reply_mode = ReplyMode::On;
            self.ok(Loudness::Heard, out);
        } else if mode.eq_ignore_ascii_case(b"off") {
            self.reply_mode = ReplyMode::Off;
        } else if mode.eq_ignore_ascii_case(b"skip") {
            if self.reply_mode != ReplyMode::Off {
                self.reply_mode = ReplyMode::SkipNext;
            }
        } else {
            self.refuse(SYNTAX, loudness, back, out);
        }
        self.update_plain();
    }
}

/// Longest name that a client may give to itself or its library.
const MAX_NAME: usize = 1024;

/// A name as Redis allows it: printable ASCII without spaces.
fn plain_text(bytes: &[u8]) -> Option<String> {
    let fits = bytes.len() <= MAX_NAME && bytes.iter().all(|c| (b'!'..=b'~').contains(c));
    if fits { String::from_utf8(bytes.to_vec()).ok() } else { None }
}
