//! A console for tests: a command line in, its reply as text out, in the notation of `redis-cli`.
//!
//! ```text
//!   OK   "bulk\x00string"   (integer) 3   (nil)   ERR syntax error   [(integer) 1, ["a", (nil)]]   {"len": (integer) 2}
//! ```
//!
//! It resolves a line as a session does and runs it on one store that owns all shards. Each line is checked for the
//! contract of a [`super::Run`]: exactly one reply, [`Context::aux`] set where a merge reads it, the store's invariants kept.
//!
//! Compiled for tests and, by the feature `testing`, for the fuzz targets; never into a node.

use std::fmt::Write;

use super::{Context, Merge, Route, resolve};
use crate::Millis;
use crate::backend::{DEFAULT_BACKEND, Registry};
use crate::reply::Reply;
use crate::store::{Store, StoreConfig};

/// A store, and the time that it is there.
#[derive(Debug)]
pub struct Console {
    /// What the commands work on.
    pub store: Store,
    /// Unix milliseconds that commands see; changed by tests only.
    pub now: Millis,
}

impl Default for Console {
    fn default() -> Console {
        Console::with(StoreConfig::default())
    }
}

impl Console {
    /// An empty store, at time 1 000 000.
    pub fn new() -> Console {
        Console::default()
    }

    /// An empty store of that configuration, at time 1 000 000.
    ///
    /// # Panics
    /// Never: the backend in memory can always be made.
    pub fn with(config: StoreConfig) -> Console {
        let backend = Registry::default().make(DEFAULT_BACKEND, &config.backend()).unwrap();
        Console { store: Store::new(config, backend), now: 1_000_000 }
    }

    /// Runs a line: words, or `"quoted \x00 strings"`.
    ///
    /// # Panics
    /// As [`Console::run_args`], and on a quote that is not closed.
    pub fn run(&mut self, line: &str) -> String {
        let words = words(line);
        self.run_args(&words.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    /// Runs a command given as arguments.
    ///
    /// # Panics
    /// When the command breaks the contract of a [`super::Run`], or does not run beside the data.
    pub fn run_args(&mut self, args: &[&[u8]]) -> String {
        let spec = match resolve(args) {
            Ok(spec) => spec,
            Err(refusal) => return refusal.text().to_owned(),
        };
        let run = spec.run.unwrap_or_else(|| panic!("{} does not run beside the data", spec.name));
        let mut transcript = Transcript::default();
        let mut context = Context { store: &mut self.store, args, now: self.now, out: &mut transcript, aux: 0 };
        run(&mut context);
        let aux = context.aux;
        self.store.invariants();
        assert!(transcript.open.is_empty(), "{}: a reply that does not end: {}", spec.name, transcript.text);
        match spec.route {
            Route::Split(Merge::Concat) | Route::Every(Merge::Concat) => {
                assert_eq!(transcript.replies as i64, aux, "{}: elements not counted", spec.name);
                return format!("[{}]", transcript.text);
            }
            Route::Split(Merge::Sum) | Route::Every(Merge::Sum) if transcript.text.starts_with("(integer)") => {
                assert_eq!(transcript.text, format!("(integer) {aux}"), "{}: aux is not the reply", spec.name);
            }
            _ => {}
        }
        assert_eq!(transcript.replies, 1, "{}: not one reply: {}", spec.name, transcript.text);
        transcript.text
    }

    /// Runs a script: lines `command => reply`, and `wait MILLIS` for time to pass. Empty lines and `#` are skipped.
    ///
    /// # Panics
    /// When a reply is another one, and as [`Console::run`].
    pub fn script(&mut self, script: &str) {
        for line in script.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some(millis) = line.strip_prefix("wait ") {
                self.now += millis.trim().parse::<Millis>().expect("a number of milliseconds");
                continue;
            }
            let (command, expected) = line.split_once("=>").unwrap_or_else(|| panic!("no reply in: {line}"));
            assert_eq!(self.run(command), expected.trim(), "{}", command.trim());
        }
    }
}

/// A receiver of replies that writes them down.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    text: String,
    /// Top-level replies begun.
    replies: usize,
    /// Composites not yet complete: parts missing, parts in all, whether of pairs, closing bracket.
    open: Vec<(usize, usize, bool, char)>,
}

impl Transcript {
    /// The text of the one reply, which must be there as a whole.
    #[cfg(test)]
    pub(super) fn finish(self) -> String {
        assert!(self.open.is_empty(), "a reply that does not end: {}", self.text);
        assert_eq!(self.replies, 1, "not one reply: {}", self.text);
        self.text
    }

    fn begin(&mut self) {
        match self.open.last_mut() {
            Some((missing, all, pairs, _)) => {
                let done = *all - *missing;
                *missing -= 1;
                if *pairs && done % 2 == 1 {
                    self.text.push_str(": ");
                } else if done > 0 {
                    self.text.push_str(", ");
                }
            }
            None => {
                if self.replies > 0 {
                    self.text.push_str(", ");
                }
                self.replies += 1;
            }
        }
    }

    fn close(&mut self) {
        while let Some(&(0, _, _, bracket)) = self.open.last() {
            self.open.pop();
            self.text.push(bracket);
        }
    }

    fn part(&mut self, text: &str) {
        self.begin();
        self.text.push_str(text);
        self.close();
    }

    fn composite(&mut self, len: usize, pairs: bool, brackets: (char, char)) {
        self.begin();
        self.text.push(brackets.0);
        let parts = if pairs { len * 2 } else { len };
        self.open.push((parts, parts, pairs, brackets.1));
        self.close();
    }
}

impl Reply for Transcript {
    fn simple(&mut self, text: &str) {
        self.part(text);
    }

    fn error(&mut self, text: &str) {
        self.part(text);
    }

    fn integer(&mut self, value: i64) {
        self.part(&format!("(integer) {value}"));
    }

    fn bulk(&mut self, value: &[u8]) {
        self.part(&quoted(value));
    }

    fn null(&mut self) {
        self.part("(nil)");
    }

    fn null_array(&mut self) {
        self.part("(nil array)");
    }

    fn array(&mut self, len: usize) {
        self.composite(len, false, ('[', ']'));
    }

    fn map(&mut self, len: usize) {
        self.composite(len, true, ('{', '}'));
    }

    fn set(&mut self, len: usize) {
        self.composite(len, false, ('~', '~'));
    }

    fn double(&mut self, value: f64) {
        self.part(&format!("(double) {value}"));
    }

    fn boolean(&mut self, value: bool) {
        self.part(if value { "(true)" } else { "(false)" });
    }

    fn verbatim(&mut self, text: &str) {
        self.part(&quoted(text.as_bytes()));
    }
}

fn quoted(value: &[u8]) -> String {
    let mut text = String::from("\"");
    for &byte in value {
        match byte {
            b'"' | b'\\' => text.extend(['\\', char::from(byte)]),
            b'\n' => text.push_str("\\n"),
            b'\r' => text.push_str("\\r"),
            b'\t' => text.push_str("\\t"),
            0x07 => text.push_str("\\a"),
            0x08 => text.push_str("\\b"),
            b' '..=b'~' => text.push(char::from(byte)),
            _ => write!(text, "\\x{byte:02x}").expect("a string takes all"),
        }
    }
    text + "\""
}

fn words(line: &str) -> Vec<Vec<u8>> {
    let mut words = Vec::new();
    let mut rest = line.trim().as_bytes().iter().copied().peekable();
    while let Some(&first) = rest.peek() {
        let mut word = Vec::new();
        if first == b' ' {
            rest.next();
            continue;
        }
        if first != b'"' {
            while let Some(byte) = rest.next_if(|&byte| byte != b' ') {
                word.push(byte);
            }
            words.push(word);
            continue;
        }
        rest.next();
        loop {
            word.push(match rest.next().expect("a closing quote") {
                b'"' => break,
                b'\\' => match rest.next().expect("something behind a backslash") {
                    b'x' => {
                        let mut digit =
                            || rest.next().and_then(|d| char::from(d).to_digit(16)).expect("two hex digits");
                        (digit() * 16 + digit()) as u8
                    }
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'a' => 0x07,
                    b'b' => 0x08,
                    other => other,
                },
                byte => byte,
            });
        }
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_as_they_are_printed() {
        let words = words(r#"set  "a b" "\x00\"\\\n" c"#);
        assert_eq!(words, [&b"set"[..], b"a b", b"\0\"\\\n", b"c"]);
        assert_eq!(quoted(&words[2]), r#""\x00\"\\\n""#);
    }

    #[test]
    fn replies_are_nested_as_they_were_announced() {
        let mut out = Transcript::default();
        out.array(2);
        out.map(1);
        out.bulk(b"k");
        out.array(0);
        out.null();
        assert_eq!((out.text.as_str(), out.replies, out.open.len()), (r#"[{"k": []}, (nil)]"#, 1, 0));
    }
}
