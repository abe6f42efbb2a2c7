//! Finding one command in the bytes of a connection.
//!
//! A client sends commands as arrays of bulk strings (`*2\r\n$3\r\nGET\r\n$1\r\nk\r\n`) or as a line of words (`GET k\r\n`,
//! with quotes as in a shell). [`Decoder::parse`] looks at everything that has come since the end of the last command
//! and says one of three things: here is a command and these are its arguments, more bytes are needed, or these
//! bytes can never become a command.
//!
//! - **In place.** Arguments are [`Span`]s into the input. Only a line of words is copied (into [`Decoder::line`]), because
//!   quotes and escapes change its bytes.
//! - **Incremental.** The decoder remembers how far it came. When a large value arrives in a thousand pieces, the thousandth call
//!   looks at the last piece only; and [`Parsed::Incomplete`] says how many bytes make the next call worthwhile.
//! - **No allocation per command**: spans go into a vector of the caller.
//! - **Bounded.** Every announced length is checked before anything waits for it; nothing is reserved for it.
//!
//! Error texts are Redis's, because clients and test-suites match on them. One rule is stricter than Redis's: an argument must
//! be followed by `\r\n`. Redis skips those two bytes unseen, so a client that miscounts would go on with shifted bytes.
//!
//! Not here: what a command means, and what happens after an error (the session answers it and closes).

use std::fmt;

/// Where an argument lies: offset and length, from the first byte of its command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Offset of the first byte.
    pub at: u32,
    /// Number of bytes.
    pub len: u32,
}

impl Span {
    /// The argument's bytes.
    #[inline]
    pub fn of<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.at as usize..][..self.len as usize]
    }
}

/// What a command may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Arguments of one command, its name included.
    pub max_args: u32,
    /// Bytes of one argument.
    pub max_bulk: u32,
    /// Bytes of a line: a command in words, or the line of a length.
    pub max_line: u32,
}

impl Default for Limits {
    /// Redis's limits: 1 Mi arguments, 512 MiB each, lines of 64 KiB.
    fn default() -> Limits {
        Limits { max_args: 1 << 20, max_bulk: 512 << 20, max_line: 64 << 10 }
    }
}

impl Limits {
    /// What a client gets before it has said the password, as in Redis: ten arguments of 16 KiB.
    pub const STRANGER: Limits = Limits { max_args: 10, max_bulk: 16 << 10, max_line: 64 << 10 };
}

/// What was found at the beginning of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A command whose arguments lie in the input. It ends after `consumed` bytes.
    Command {
        /// Bytes of the command.
        consumed: usize,
    },
    /// A command in words; its arguments lie in [`Decoder::line`].
    Line {
        /// Bytes of the command.
        consumed: usize,
    },
    /// An empty line or an array of nothing: to be skipped without an answer.
    Nothing {
        /// Bytes to skip.
        consumed: usize,
    },
    /// No whole command yet.
    Incomplete {
        /// Length of input below which another call can find nothing new.
        need: usize,
    },
}

/// Bytes that cannot become a command. The text behind `ERR Protocol error: ` is Redis's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// The number of arguments is no number, or beyond the limit.
    MultibulkLength,
    /// More than ten arguments before authentication.
    StrangerMultibulk,
    /// The length of an argument is no number, negative or beyond the limit.
    BulkLength,
    /// An argument beyond 16 KiB before authentication.
    StrangerBulk,
    /// Something else than `$` where an argument begins.
    NoDollar(u8),
    /// An argument is not followed by `\r\n`.
    NoLineEnd,
    /// A line of words without an end.
    LongLine,
    /// A number of arguments without an end.
    LongMultibulkLine,
    /// A length of an argument without an end.
    LongBulkLine,
    /// A line of words with an open quote, or with something right behind a closing one.
    Quotes,
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ERR Protocol error: ")?;
        f.write_str(match self {
            ProtocolError::MultibulkLength => "invalid multibulk length",
            ProtocolError::StrangerMultibulk => "unauthenticated multibulk length",
            ProtocolError::BulkLength => "invalid bulk length",
            ProtocolError::StrangerBulk => "unauthenticated bulk length",
            ProtocolError::NoDollar(got) => return write!(f, "expected '$', got '{}'", char::from(*got)),
            ProtocolError::NoLineEnd => "expected CRLF after an argument",
            ProtocolError::LongLine => "too big inline request",
            ProtocolError::LongMultibulkLine => "too big mbulk count string",
            ProtocolError::LongBulkLine => "too big bulk count string",
            ProtocolError::Quotes => "unbalanced quotes in request",
        })
    }
}

impl std::error::Error for ProtocolError {}

/// The most that is believed of an announced number of arguments when room is made for their spans.
const RESERVE_SPANS: usize = 64;

/// How far the parsing of the current command has come.
///
/// Invariant: between two calls the input only grows, until a call returns something else than
/// [`Parsed::Incomplete`]; then the next call's input begins behind the consumed bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Everything before this offset has been understood, and needs no second look.
    at: usize,
    /// Bytes behind `at` that hold no line end.
    scanned: usize,
    /// Arguments still to come; 0 while the command has not begun.
    missing: u32,
    /// The length of the argument at `at`, once its own line has been read.
    bulk: Option<u32>,
    /// Words of the last [`Parsed::Line`], unquoted.
    line: Vec<u8>,
}

/// A GET or SET as clients write it, with nothing else in the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short {
    /// The key, counted from the first byte of the command.
    pub key: Span,
    /// The value of a SET.
    pub value: Option<Span>,
    /// Bytes of the command.
    pub consumed: usize,
}

/// Outcome of reading the line of a length.
enum Line {
    /// The number, if it is one, and the offset behind the line.
    Number(Option<i64>, usize),
    /// The line has no end yet.
    Open,
}

impl Decoder {
    /// A decoder at the beginning of a command.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Where the spans of the last [`Parsed::Line`] point.
    pub fn line(&self) -> &[u8] {
        &self.line
    }

    /// Forgets a command begun. (After the buffer it was in has been thrown away.)
    pub fn reset(&mut self) {
        *self = Decoder { line: std::mem::take(&mut self.line), ..Decoder::default() };
        if self.line.capacity() > 4096 {
            self.line = Vec::new();
        }
    }

    /// The GET or SET at the beginning of `input`, if there is one, whole, in the form that nearly every client writes: what
    /// [`Decoder::parse`] would say, for less work. `None` means nothing: ask [`Decoder::parse`].
    #[inline]
    pub fn short(&self, input: &[u8], limits: &Limits) -> Option<Short> {
        const GET: u64 = u64::from_le_bytes(*b"*2\r\n$3\r\n");
        const SET: u64 = u64::from_le_bytes(*b"*3\r\n$3\r\n");
        const SMALL: u64 = u64::from_le_bytes(*b"   \0\0\0\0\0");
        const NAME: u64 = 0xffff_ffff_ffff;
        let word = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
        let (head, rest) = input.split_first_chunk::<8>()?;
        let name = (word(rest.first_chunk()?) | SMALL) & NAME;
        let writes = match (word(head), name) {
            (GET, name) if name == word(b"get\r\n$\0\0") => false,
            (SET, name) if name == word(b"set\r\n$\0\0") => true,
            _ => return None,
        };
        if self.missing > 0 || self.scanned > 0 || limits.max_args < 3 {
            return None;
        }
        let (key, after) = bulk(input, 14, limits)?;
        if !writes {
            return Some(Short { key, value: None, consumed: after });
        }
        let (value, consumed) = if *input.get(after)? == b'$' { bulk(input, after + 1, limits)? } else { return None };
        Some(Short { key, value: Some(value), consumed })
    }

    /// Looks for a command at the beginning of `input`. Its arguments are left in `spans`, which the caller does not touch
    /// between calls.
    ///
    /// # Errors
    /// The input can never become a command. The decoder is of no use afterwards.
    #[inline]
    pub fn parse(&mut self, input: &[u8], limits: &Limits, spans: &mut Vec<Span>) -> Result<Parsed, ProtocolError> {
        if self.missing == 0 {
            spans.clear();
            match input.first() {
                None => return Ok(Parsed::Incomplete { need: 1 }),
                Some(b'*') => {}
                Some(_) => return self.words(input, limits, spans),
            }
            // Fewer than ten arguments: the common case, spelled out.
            if let Some(&[_, n @ b'1'..=b'9', b'\r', b'\n']) = input.first_chunk::<4>()
                && u32::from(n - b'0') <= limits.max_args
            {
                self.missing = u32::from(n - b'0');
                self.at = 4;
                self.scanned = 0;
            } else if let Some(parsed) = self.begin(input, limits, spans)? {
                return Ok(parsed);
            }
        }
        self.arguments(input, limits, spans)
    }

    /// Reads the arguments that are there.
    #[inline]
    fn arguments(&mut self, input: &[u8], limits: &Limits, spans: &mut Vec<Span>) -> Result<Parsed, ProtocolError> {
        let mut at = self.at;
        while self.missing > 0 {
            let len = match self.bulk {
                Some(len) => len,
                None => {
                    let len = match input.get(at..at + 5) {
                        Some(&[b'$', n @ b'0'..=b'9', b'\r', b'\n', _]) => {
                            self.scanned = 0;
                            at += 4;
                            u32::from(n - b'0')
                        }
                        Some(&[b'$', tens @ b'1'..=b'9', n @ b'0'..=b'9', b'\r', b'\n']) => {
                            self.scanned = 0;
                            at += 5;
                            u32::from(tens - b'0') * 10 + u32::from(n - b'0')
                        }
                        _ => {
                            self.at = at;
                            match self.bulk_line(input, limits)? {
                                Some(len) => {
                                    at = self.at;
                                    len
                                }
                                None => return Ok(Parsed::Incomplete { need: input.len() + 1 }),
                            }
                        }
                    };
                    if len > limits.max_bulk {
                        return Err(too_long(limits));
                    }
                    len
                }
            };
            let end = at + len as usize;
            let Some(&[cr, lf]) = input.get(end..end + 2) else {
                self.at = at;
                self.bulk = Some(len);
                return Ok(Parsed::Incomplete { need: end + 2 });
            };
            if (cr, lf) != (b'\r', b'\n') {
                return Err(ProtocolError::NoLineEnd);
            }
            spans.push(Span { at: at as u32, len });
            self.bulk = None;
            at = end + 2;
            self.missing -= 1;
        }
        self.at = 0;
        Ok(Parsed::Command { consumed: at })
    }

    /// Reads the line that says how many arguments follow.
    #[cold]
    fn begin(&mut self, input: &[u8], limits: &Limits, spans: &mut Vec<Span>) -> Result<Option<Parsed>, ProtocolError> {
        self.at = 1;
        let (number, next) = match self.number(input, limits, ProtocolError::LongMultibulkLine)? {
            Line::Number(number, next) => (number, next),
            Line::Open => {
                self.at = 0;
                return Ok(Some(Parsed::Incomplete { need: input.len() + 1 }));
            }
        };
        let number = number.ok_or(ProtocolError::MultibulkLength)?;
        if number <= 0 {
            self.at = 0;
            return Ok(Some(Parsed::Nothing { consumed: next }));
        }
        if number > i64::from(limits.max_args) {
            let stranger = *limits == Limits::STRANGER && number <= i64::from(i32::MAX);
            return Err(if stranger { ProtocolError::StrangerMultibulk } else { ProtocolError::MultibulkLength });
        }
        self.missing = number as u32;
        self.at = next;
        spans.reserve((number as usize).min(RESERVE_SPANS));
        Ok(None)
    }

    /// Reads the line that says how long the argument at `self.at` is, and leaves `self.at` behind it.
    fn bulk_line(&mut self, input: &[u8], limits: &Limits) -> Result<Option<u32>, ProtocolError> {
        match input.get(self.at) {
            None => return Ok(None),
            Some(b'$') => {}
            Some(&other) => return Err(ProtocolError::NoDollar(other)),
        }
        self.at += 1;
        match self.number(input, limits, ProtocolError::LongBulkLine)? {
            Line::Open => {
                self.at -= 1;
                Ok(None)
            }
            Line::Number(Some(len @ 0..), next) if len <= i64::from(u32::MAX) => {
                self.at = next;
                Ok(Some(len as u32))
            }
            Line::Number(..) => Err(ProtocolError::BulkLength),
        }
    }

    /// Reads a number up to the end of its line, from `self.at` on.
    fn number(&mut self, input: &[u8], limits: &Limits, too_long: ProtocolError) -> Result<Line, ProtocolError> {
        let from = self.at + self.scanned;
        match memchr::memchr(b'\r', &input[from..]) {
            // Too long is too long, whether the end came with the same bytes or not.
            Some(found) if self.scanned + found > limits.max_line as usize => Err(too_long),
            // The line feed must be there too, and is not looked at: as in Redis.
            Some(found) if from + found + 1 < input.len() => {
                self.scanned = 0;
                let end = from + found;
                Ok(Line::Number(decimal(&input[self.at..end]), end + 2))
            }
            Some(found) => {
                self.scanned += found;
                Ok(Line::Open)
            }
            None => {
                self.scanned = input.len() - self.at;
                if self.scanned > limits.max_line as usize { Err(too_long) } else { Ok(Line::Open) }
            }
        }
    }

    /// Reads a command in words.
    #[cold]
    fn words(&mut self, input: &[u8], limits: &Limits, spans: &mut Vec<Span>) -> Result<Parsed, ProtocolError> {
        let Some(found) = memchr::memchr(b'\n', &input[self.scanned..]) else {
            self.scanned = input.len();
            if input.len() > limits.max_line as usize {
                return Err(ProtocolError::LongLine);
            }
            return Ok(Parsed::Incomplete { need: input.len() + 1 });
        };
        let end = self.scanned + found;
        if end > limits.max_line as usize {
            return Err(ProtocolError::LongLine);
        }
        self.scanned = 0;
        let text = input[..end].strip_suffix(b"\r").unwrap_or(&input[..end]);
        self.line.clear();
        split_words(text, &mut self.line, spans)?;
        let consumed = end + 1;
        Ok(if spans.is_empty() { Parsed::Nothing { consumed } } else { Parsed::Line { consumed } })
    }
}

/// The argument whose length stands at `at`, and where the next one begins. Of lengths up to four digits.
#[inline(always)]
fn bulk(input: &[u8], at: usize, limits: &Limits) -> Option<(Span, usize)> {
    let rest = input.get(at..)?;
    let digit = |c: u8| u32::from(c.wrapping_sub(b'0'));
    let (len, line) = match *rest.first_chunk::<3>()? {
        [n @ b'0'..=b'9', b'\r', b'\n'] => (digit(n), 3),
        [a @ b'1'..=b'9', b @ b'0'..=b'9', b'\r'] if rest.get(3) == Some(&b'\n') => (digit(a) * 10 + digit(b), 4),
        [a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9'] => {
            let hundreds = digit(a) * 100 + digit(b) * 10 + digit(c);
            match *rest.get(3..6)? {
                [b'\r', b'\n', _] => (hundreds, 5),
                [d @ b'0'..=b'9', b'\r', b'\n'] => (hundreds * 10 + digit(d), 6),
                _ => return None,
            }
        }
        _ => return None,
    };
    let (from, end) = (at + line, at + line + len as usize);
    let whole = len <= limits.max_bulk && input.get(end..end + 2)? == b"\r\n";
    whole.then_some((Span { at: from as u32, len }, end + 2))
}

#[cold]
fn too_long(limits: &Limits) -> ProtocolError {
    if *limits == Limits::STRANGER { ProtocolError::StrangerBulk } else { ProtocolError::BulkLength }
}

/// A decimal number as Redis prints one: no plus sign, no zeros in front, no spaces.
fn decimal(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let plain = match digits {
        [b'0'] => digits.len() == text.len(),
        [b'1'..=b'9', ..] => digits.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    if !plain {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn is_space(c: u8) -> bool {
    matches!(c, b' ' | b'\t' | b'\r' | b'\n' | 0x0b | 0x0c)
}

/// Splits a line at spaces. `"…"` keeps spaces and knows the escapes `\n \r \t \b \a \xHH`; `'…'` keeps everything but `\'`.
fn split_words(text: &[u8], into: &mut Vec<u8>, spans: &mut Vec<Span>) -> Result<(), ProtocolError> {
    let mut rest = text;
    loop {
        while let [c, tail @ ..] = rest
            && is_space(*c)
        {
            rest = tail;
        }
        if rest.is_empty() {
            return Ok(());
        }
        let at = into.len();
        rest = word(rest, into)?;
        spans.push(Span { at: at as u32, len: (into.len() - at) as u32 });
    }
}

/// Copies one word and returns what is behind it.
fn word<'a>(mut rest: &'a [u8], into: &mut Vec<u8>) -> Result<&'a [u8], ProtocolError> {
    loop {
        rest = match rest {
            [] => return Ok(rest),
            [c, ..] if is_space(*c) => return Ok(rest),
            [b'"', tail @ ..] => return closed(double_quoted(tail, into)?),
            [b'\'', tail @ ..] => return closed(single_quoted(tail, into)?),
            [c, tail @ ..] => {
                into.push(*c);
                tail
            }
        }
    }
}

/// Behind a closing quote a word must end.
fn closed(rest: &[u8]) -> Result<&[u8], ProtocolError> {
    if rest.first().is_none_or(|c| is_space(*c)) { Ok(rest) } else { Err(ProtocolError::Quotes) }
}

fn double_quoted<'a>(mut rest: &'a [u8], into: &mut Vec<u8>) -> Result<&'a [u8], ProtocolError> {
    loop {
        rest = match rest {
            [] => return Err(ProtocolError::Quotes),
            [b'"', tail @ ..] => return Ok(tail),
            [b'\\', b'x', high, low, tail @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                let digit = |c: u8| char::from(c).to_digit(16).expect("a hexadecimal digit was matched") as u8;
                into.push(digit(*high) << 4 | digit(*low));
                tail
            }
            [b'\\', c, tail @ ..] => {
                into.push(match c {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'b' => 8,
                    b'a' => 7,
                    other => *other,
                });
                tail
            }
            [c, tail @ ..] => {
                into.push(*c);
                tail
            }
        }
    }
}

fn single_quoted<'a>(mut rest: &'a [u8], into: &mut Vec<u8>) -> Result<&'a [u8], ProtocolError> {
    loop {
        rest = match rest {
            [] => return Err(ProtocolError::Quotes),
            [b'\'', tail @ ..] => return Ok(tail),
            [b'\\', b'\'', tail @ ..] => {
                into.push(b'\'');
                tail
            }
            [c, tail @ ..] => {
                into.push(*c);
                tail
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Holds what [`Decoder::short`] said of these bytes against what the decoder says.
    fn check_short(said: Option<Short>, parsed: Parsed, spans: &[Span], input: &[u8]) {
        let Some(Short { key, value, consumed }) = said else { return };
        assert_eq!(parsed, Parsed::Command { consumed });
        let name = spans[0].of(input).to_ascii_lowercase();
        match value {
            None => assert_eq!((&name[..], &spans[1..]), (&b"get"[..], &[key][..])),
            Some(value) => assert_eq!((&name[..], &spans[1..]), (&b"set"[..], &[key, value][..])),
        }
    }

    /// A command as clients write it.
    fn written(args: &[&[u8]]) -> Vec<u8> {
        let mut wire = format!("*{}\r\n", args.len()).into_bytes();
        for arg in args {
            wire.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
            wire.extend_from_slice(arg);
            wire.extend_from_slice(b"\r\n");
        }
        wire
    }

    #[test]
    fn the_short_way_takes_gets_and_sets_of_usual_sizes_and_no_part_of_one() {
        let decoder = Decoder::new();
        let limits = Limits::default();
        for len in [0, 1, 9, 10, 16, 99, 100, 999, 1000, 9999] {
            let arg = vec![b'x'; len];
            for args in
                [vec![&b"GET"[..], &arg], vec![b"get", &arg], vec![b"SeT", b"key", &arg], vec![b"SET", &arg, b""]]
            {
                let wire = written(&args);
                let short = decoder.short(&wire, &limits).expect("a usual command");
                assert_eq!((short.key.of(&wire), short.consumed), (args[1], wire.len()));
                assert_eq!(short.value.map(|value| value.of(&wire)), args.get(2).copied());
                assert!((0..wire.len()).all(|cut| decoder.short(&wire[..cut], &limits).is_none()));
                let narrow =
                    Limits { max_bulk: args[1].len().max(args.get(2).map_or(0, |v| v.len())) as u32, ..limits };
                assert!(decoder.short(&wire, &narrow).is_some());
                if let Some(less) = narrow.max_bulk.checked_sub(1) {
                    assert_eq!(decoder.short(&wire, &Limits { max_bulk: less, ..limits }), None);
                }
            }
        }
        for args in
            [vec![&b"GET"[..]], vec![b"get", b"k", b"v"], vec![b"SET", b"k"], vec![b"DEL", b"k"], vec![b"GETX", b"k"]]
        {
            assert_eq!(decoder.short(&written(&args), &limits), None, "{args:?}");
        }
    }

    #[test]
    fn no_wrong_byte_is_taken_the_short_way() {
        for wire in [written(&[b"GET", b"key"]), written(&[b"SET", b"a key of 15 byt", b"value"])] {
            for (at, byte) in (0..wire.len()).flat_map(|at| b"19$\r\nxG ".iter().map(move |&byte| (at, byte))) {
                let mut wrong = wire.clone();
                wrong[at] = byte;
                commands(&wrong, &[], &Limits::default());
            }
        }
    }

    #[test]
    fn a_command_begun_is_never_taken_the_short_way() {
        let (mut decoder, mut spans, limits) = (Decoder::new(), Vec::new(), Limits::default());
        let wire = written(&[b"GET", b"k"]);
        for cut in 1..wire.len() {
            assert!(matches!(decoder.parse(&wire[..cut], &limits, &mut spans), Ok(Parsed::Incomplete { .. })));
            let said = decoder.short(&wire, &limits);
            let parsed = decoder.parse(&wire, &limits, &mut spans).unwrap();
            check_short(said, parsed, &spans, &wire);
            assert_eq!(parsed, Parsed::Command { consumed: wire.len() });
        }
    }

    /// Everything that a stream of bytes becomes, fed in pieces that end at `cuts`.
    fn commands(input: &[u8], cuts: &[usize], limits: &Limits) -> (Vec<Vec<Vec<u8>>>, Option<ProtocolError>) {
        let (mut decoder, mut spans) = (Decoder::new(), Vec::new());
        let (mut start, mut out, mut need) = (0, Vec::new(), 0);
        for &end in cuts.iter().chain([&input.len()]) {
            while start < end {
                let seen = &input[start..end];
                let said = decoder.short(seen, limits);
                let parsed = match decoder.parse(seen, limits, &mut spans) {
                    Err(error) => {
                        assert_eq!(said, None, "what is no command was taken the short way");
                        return (out, Some(error));
                    }
                    Ok(parsed) => parsed,
                };
                check_short(said, parsed, &spans, seen);
                let (base, consumed) = match parsed {
                    Parsed::Incomplete { need: more } => {
                        assert!(more > seen.len(), "asks for what is there");
                        need = more;
                        break;
                    }
                    Parsed::Nothing { consumed } => {
                        start += consumed;
                        continue;
                    }
                    Parsed::Command { consumed } => (seen, consumed),
                    Parsed::Line { consumed } => (decoder.line(), consumed),
                };
                assert!(seen.len() >= need, "was ready before the bytes it asked for");
                need = 0;
                out.push(spans.iter().map(|span| span.of(base).to_vec()).collect());
                start += consumed;
            }
        }
        (out, None)
    }

    fn words(list: &[&str]) -> Vec<Vec<u8>> {
        list.iter().map(|word| word.as_bytes().to_vec()).collect()
    }

    fn every_cut(input: &[u8]) -> Vec<usize> {
        (1..input.len()).collect()
    }

    /// Found by fuzzing: a length of too many digits was "too long" when its line came in pieces, "invalid" when the line came
    /// whole.
    #[test]
    fn a_length_is_too_long_however_it_is_cut() {
        let limits = Limits { max_line: 20, ..Limits::default() };
        let many = "0".repeat(21);
        for (bytes, expected) in [
            (format!("*{many}\r\n"), ProtocolError::LongMultibulkLine),
            (format!("*1\r\n${many}\r\n"), ProtocolError::LongBulkLine),
            (format!("*{}\r\n", &many[1..]), ProtocolError::MultibulkLength),
        ] {
            let bytes = bytes.as_bytes();
            assert_eq!(commands(bytes, &[], &limits), (Vec::new(), Some(expected)));
            assert_eq!(commands(bytes, &every_cut(bytes), &limits), (Vec::new(), Some(expected)));
        }
    }

    #[test]
    fn commands_are_found_whole_and_byte_by_byte() {
        let long = "x".repeat(300);
        for (bytes, expected) in [
            ("*1\r\n$4\r\nPING\r\n", vec![words(&["PING"])]),
            ("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n", vec![words(&["SET", "k", ""])]),
            (
                "*2\r\n$3\r\nGET\r\n$12\r\nkey\r\nwith\r\nx\r\nPING\r\n",
                vec![words(&["GET", "key\r\nwith\r\nx"]), words(&["PING"])],
            ),
            (&format!("*12\r\n{}", "$1\r\na\r\n".repeat(12)), vec![words(&["a"; 12])]),
            (&format!("*1\r\n$300\r\n{long}\r\n"), vec![words(&[&long])]),
            ("*0\r\n*-1\r\n\r\n\n  \r\nPING\nECHO  a\t b \r\n", vec![words(&["PING"]), words(&["ECHO", "a", "b"])]),
        ] {
            let limits = Limits::default();
            for cuts in [vec![], every_cut(bytes.as_bytes())] {
                assert_eq!(commands(bytes.as_bytes(), &cuts, &limits), (expected.clone(), None), "{bytes:?}");
            }
        }
    }

    #[test]
    fn quotes_are_understood_as_redis_does() {
        let line = b"SET \"a b\" 'c d' \"\\x41\\n\\\"\\\\\\q\\xg\" 'it\\'s\\n' \"\" a\"b\"\r\n";
        let expected = [&b"SET"[..], b"a b", b"c d", b"A\n\"\\qxg", b"it's\\n", b"", b"ab"];
        let (found, error) = commands(line, &[], &Limits::default());
        assert_eq!(error, None);
        assert_eq!(found, [expected.map(<[u8]>::to_vec)]);
    }

    #[test]
    fn malformed_bytes_have_redis_texts() {
        let plain = Limits::default();
        let endless = "a".repeat(70_000);
        for (bytes, limits, text) in [
            ("*x\r\n", plain, "invalid multibulk length"),
            ("*+1\r\n", plain, "invalid multibulk length"),
            ("*01\r\n", plain, "invalid multibulk length"),
            ("*\r\n", plain, "invalid multibulk length"),
            ("*20000000000\r\n", plain, "invalid multibulk length"),
            ("*99999999999999999999999\r\n", plain, "invalid multibulk length"),
            ("*1048577\r\n", plain, "invalid multibulk length"),
            ("*11\r\n", Limits::STRANGER, "unauthenticated multibulk length"),
            ("*1\r\n$16385\r\n", Limits::STRANGER, "unauthenticated bulk length"),
            ("*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$2000000000\r\n", plain, "invalid bulk length"),
            ("*1\r\n$-1\r\n", plain, "invalid bulk length"),
            ("*1\r\n$blabla\r\n", plain, "invalid bulk length"),
            ("*1\r\n$99999999999\r\n", plain, "invalid bulk length"),
            ("*3\r\n$3\r\nSET\r\n$1\r\nx\r\nfooz\r\n", plain, "expected '$', got 'f'"),
            ("*1\r\n$1\r\nabc", plain, "expected CRLF after an argument"),
            ("SET \"open\r\n", plain, "unbalanced quotes in request"),
            ("SET \"\"\"x\"\"\" y\r\n", plain, "unbalanced quotes in request"),
            ("SET 'open\r\n", plain, "unbalanced quotes in request"),
            (&endless, plain, "too big inline request"),
            (&format!("{endless}\r\n"), plain, "too big inline request"),
            (&format!("*{endless}"), plain, "too big mbulk count string"),
            (&format!("*1\r\n${endless}"), plain, "too big bulk count string"),
        ] {
            let cuts = if bytes.len() < 100 { every_cut(bytes.as_bytes()) } else { vec![10, 1000, 65_000] };
            for cuts in [vec![], cuts] {
                let (_, error) = commands(bytes.as_bytes(), &cuts, &limits);
                let found = error.map(|error| error.to_string());
                assert_eq!(found, Some(format!("ERR Protocol error: {text}")), "{:?}", &bytes[..bytes.len().min(40)]);
            }
        }
    }

    /// A large value that comes in small pieces is not looked at again and again: each answer asks for the whole rest.
    #[test]
    fn a_large_argument_is_waited_for_not_searched() {
        let mut input = b"*2\r\n$4\r\nECHO\r\n$1000000\r\n".to_vec();
        let whole = input.len() + 1_000_002;
        let (mut decoder, mut spans) = (Decoder::new(), Vec::new());
        for _ in 0..100 {
            let parsed = decoder.parse(&input, &Limits::default(), &mut spans);
            assert_eq!(parsed, Ok(Parsed::Incomplete { need: whole }));
            input.extend([b'*'; 10_000]);
        }
        input.extend(b"\r\n");
        assert_eq!(decoder.parse(&input, &Limits::default(), &mut spans), Ok(Parsed::Command { consumed: whole }));
        assert_eq!(spans[1].len, 1_000_000);
    }

    fn command() -> impl Strategy<Value = Vec<Vec<u8>>> {
        prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 1..14)
    }

    proptest! {
        /// Whatever the pieces, the commands are those that were sent.
        #[test]
        fn pieces_do_not_matter(sent in prop::collection::vec(command(), 1..6), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
            let mut bytes = Vec::new();
            for command in &sent {
                bytes.extend(written(&command.iter().map(Vec::as_slice).collect::<Vec<_>>()));
            }
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
            cuts.sort_unstable();
            prop_assert_eq!(commands(&bytes, &cuts, &Limits::default()), (sent, None));
        }

        /// The short way says what the decoder says, also of commands with a wrong byte somewhere.
        #[test]
        fn the_short_way_agrees(
            sent in prop::collection::vec((prop_oneof![Just("GET"), Just("set"), Just("GeT"), Just("DEL")], prop::collection::vec(0usize..130, 0..3)), 1..4),
            wrong in prop::option::of((any::<prop::sample::Index>(), prop_oneof![Just(b'0'), Just(b'\r'), Just(b'$'), any::<u8>()])),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        ) {
            let mut bytes = Vec::new();
            for (name, lens) in &sent {
                let args: Vec<Vec<u8>> = lens.iter().map(|&len| vec![b'x'; len]).collect();
                bytes.extend(written(&[&[name.as_bytes()][..], &args.iter().map(Vec::as_slice).collect::<Vec<_>>()].concat()));
            }
            if let Some((at, byte)) = wrong {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
            cuts.sort_unstable();
            for limits in [Limits::default(), Limits::STRANGER, Limits { max_args: 2, max_bulk: 60, max_line: 30 }] {
                commands(&bytes, &cuts, &limits);
            }
        }

        /// Noise is understood in the same way in one piece and in many, and hurts nobody.
        #[test]
        fn noise_is_harmless(noise in prop::collection::vec(prop_oneof![Just(b'*'), Just(b'$'), Just(b'\r'), Just(b'\n'), Just(b'1'), Just(b'"'), any::<u8>()], 0..80)) {
            let limits = Limits { max_args: 4, max_bulk: 20, max_line: 30 };
            let whole = commands(&noise, &[], &limits);
            let pieces = commands(&noise, &every_cut(&noise), &limits);
            prop_assert_eq!(whole.0, pieces.0);
        }
    }
}
