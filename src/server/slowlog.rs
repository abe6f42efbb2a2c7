//! The slow log of one core: the latest commands that took too long.
//!
//! Bounded twice: by the number of entries, and each entry by what Redis shows of a command (32 arguments of 128 bytes).
//! Passwords never get in. Ids are unique in the node: a core counts in steps of the number of cores.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::time::Duration;

use gridkv_engine::Millis;
use gridkv_engine::reply::Reply;

/// Arguments shown of a command.
const MAX_ARGS: usize = 32;
/// Bytes shown of an argument.
pub(crate) const MAX_ARG_LEN: usize = 128;
/// Stands for what must not be shown.
const REDACTED: &[u8] = b"(redacted)";

/// A command that took too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slow {
    pub(crate) id: u64,
    pub(crate) at: Millis,
    pub(crate) took: Duration,
    pub(crate) args: Vec<Vec<u8>>,
    pub(crate) client_addr: String,
    pub(crate) client_name: String,
}

impl Slow {
    /// As `SLOWLOG GET` shows it.
    pub(crate) fn write(&self, out: &mut dyn Reply) {
        out.array(6);
        out.integer(self.id as i64);
        out.integer((self.at / 1000) as i64);
        out.integer(self.took.as_micros() as i64);
        out.array(self.args.len());
        for arg in &self.args {
            out.bulk(arg);
        }
        out.bulk(self.client_addr.as_bytes());
        out.bulk(self.client_name.as_bytes());
    }
}

/// A ring of slow commands, oldest first.
#[derive(Debug)]
pub(crate) struct Slowlog {
    entries: VecDeque<Slow>,
    next_id: u64,
    step: u64,
}

impl Slowlog {
    /// The log of core `core` of `cores`.
    pub(crate) fn new(core: usize, cores: usize) -> Slowlog {
        Slowlog { entries: VecDeque::new(), next_id: core as u64, step: cores as u64 }
    }

    /// Remembers a command, of which [`shown`] is kept; the oldest go beyond `most`.
    pub(crate) fn record(
        &mut self,
        now: Millis,
        took: Duration,
        shown: Vec<Vec<u8>>,
        client_addr: &str,
        client_name: &str,
        most: usize,
    ) {
        let id = self.next_id;
        self.next_id += self.step;
        self.entries.push_back(Slow {
            id,
            at: now,
            took,
            args: shown,
            client_addr: client_addr.to_owned(),
            client_name: client_name.to_owned(),
        });
        while self.entries.len() > most {
            self.entries.pop_front();
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The newest `most`.
    pub(crate) fn newest(&self, most: usize) -> Vec<Slow> {
        self.entries.iter().rev().take(most).cloned().collect()
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
    }
}

/// The newest `most` of several cores' entries, newest first.
pub(crate) fn merge(cores: Vec<Vec<Slow>>, most: usize) -> Vec<Slow> {
    let mut all: Vec<Slow> = cores.into_iter().flatten().collect();
    all.sort_by_key(|entry| Reverse((entry.at, entry.id)));
    all.truncate(most);
    all
}

/// What may be seen of a command: trimmed, without passwords.
pub(crate) fn shown(args: &[&[u8]]) -> Vec<Vec<u8>> {
    let secret = secrets(args);
    let kept = if args.len() > MAX_ARGS { MAX_ARGS - 1 } else { args.len() };
    let mut shown: Vec<Vec<u8>> = (args[..kept].iter().enumerate())
        .map(|(at, arg)| if secret(at) { REDACTED.to_vec() } else { trimmed(arg) })
        .collect();
    if kept < args.len() {
        shown.push(format!("... ({} more arguments)", args.len() - kept).into_bytes());
    }
    shown
}

fn trimmed(arg: &[u8]) -> Vec<u8> {
    if arg.len() <= MAX_ARG_LEN {
        return arg.to_vec();
    }
    let mut shown = arg[..MAX_ARG_LEN].to_vec();
    shown.extend_from_slice(format!("... ({} more bytes)", arg.len() - MAX_ARG_LEN).as_bytes());
    shown
}

/// Which arguments are passwords, or names that go with them.
fn secrets(args: &[&[u8]]) -> impl Fn(usize) -> bool {
    let is = |at: usize, word: &str| args.get(at).is_some_and(|arg| arg.eq_ignore_ascii_case(word.as_bytes()));
    let (mut from, mut one_in) = (usize::MAX, 1);
    if is(0, "auth") {
        from = 1;
    } else if is(0, "hello") {
        from = (1..args.len()).find(|&at| is(at, "auth")).map_or(usize::MAX, |at| at + 1);
    } else if is(0, "config") && is(1, "set") && (2..args.len()).step_by(2).any(|at| is(at, "requirepass")) {
        // All values of the call: a list that is out of step must not show a password as a name.
        (from, one_in) = (3, 2);
    }
    move |at| at >= from && (at - from).is_multiple_of(one_in)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(of: &Slow) -> Vec<String> {
        of.args.iter().map(|arg| String::from_utf8(arg.clone()).unwrap()).collect()
    }

    fn recorded(words: &[&[u8]]) -> Vec<String> {
        let mut log = Slowlog::new(0, 1);
        log.record(1, Duration::from_millis(20), shown(words), "127.0.0.1:1", "", 8);
        args(&log.newest(1)[0])
    }

    #[test]
    fn long_commands_are_trimmed_as_redis_trims_them() {
        let words: Vec<Vec<u8>> = (0..33).map(|i| i.to_string().into_bytes()).collect();
        let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
        assert_eq!(recorded(&words[..32]).len(), 32);
        let trimmed = recorded(&words);
        assert_eq!((trimmed.len(), trimmed[30].as_str(), trimmed[31].as_str()), (32, "30", "... (2 more arguments)"));
        let long = recorded(&[b"set", b"k", &[b'A'; 129]]);
        assert_eq!(long[2], format!("{}... (1 more bytes)", "A".repeat(128)));
    }

    #[test]
    fn passwords_never_get_in() {
        assert_eq!(recorded(&[b"AUTH", b"name", b"secret"]), ["AUTH", "(redacted)", "(redacted)"]);
        let hello = recorded(&[b"hello", b"3", b"AUTH", b"default", b"secret", b"SETNAME", b"me"]);
        assert_eq!(hello[..3], ["hello", "3", "AUTH"]);
        assert!(!hello.contains(&"secret".to_owned()));
        let config = recorded(&[b"CONFIG", b"SET", b"timeout", b"1", b"RequirePass", b"secret"]);
        assert_eq!(config, ["CONFIG", "SET", "timeout", "(redacted)", "RequirePass", "(redacted)"]);
        assert_eq!(recorded(&[b"config", b"set", b"timeout", b"1"])[3], "1");
    }

    #[test]
    fn the_oldest_go_and_ids_are_unique_in_the_node() {
        let mut logs = [Slowlog::new(0, 2), Slowlog::new(1, 2)];
        for at in 0..10u64 {
            let word = at.to_string();
            logs[(at % 2) as usize].record(at, Duration::ZERO, vec![word.into_bytes()], "", "", 3);
        }
        assert_eq!((logs[0].len(), logs[1].len()), (3, 3));
        let merged = merge(logs.iter().map(|log| log.newest(4)).collect(), 4);
        assert_eq!(merged.iter().flat_map(args).collect::<Vec<_>>(), ["9", "8", "7", "6"]);
        let mut ids: Vec<u64> = logs.iter().flat_map(|log| log.newest(9)).map(|entry| entry.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [4, 5, 6, 7, 8, 9]);
        logs[0].record(20, Duration::ZERO, Vec::new(), "", "", 0);
        assert_eq!(logs[0].len(), 0, "a length of zero keeps nothing");
    }
}
