//! Replies as bytes: one [`Writer`] for both versions of the protocol.
//!
//! A command pushes the parts of its reply ([`gridkv_engine::reply::Reply`]) and knows nothing of versions; everything in which
//! RESP2 and RESP3 differ is here:
//!
//! | part | RESP2 | RESP3 |
//! |---|---|---|
//! | null | `$-1` | `_` |
//! | null array | `*-1` | `_` |
//! | map of n pairs | `*2n` | `%n` |
//! | set of n | `*n` | `~n` |
//! | double | bulk string | `,1.5` |
//! | boolean | `:1`, `:0` | `#t`, `#f` |
//! | verbatim text | bulk string | `=len`, `txt:` in front |
//! | push | `*n` | `>n` |
//!
//! Writing only ever appends. Statuses and errors are one line: a line break inside, which could only come from
//! what a client sent, becomes a space, as in Redis.

use gridkv_engine::reply::Reply;

/// The version of the protocol that a connection speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Protocol {
    /// What every client speaks until it says HELLO 3.
    #[default]
    Resp2 = 2,
    /// With maps, sets, nulls, doubles and booleans of their own.
    Resp3 = 3,
}

impl Protocol {
    /// Its number, which also stands in frames between cores.
    #[inline]
    pub fn flag(self) -> u8 {
        self as u8
    }

    /// The protocol of that number; an unknown one reads as RESP2.
    #[inline]
    pub fn from_flag(flag: u8) -> Protocol {
        if flag == Protocol::Resp3 as u8 { Protocol::Resp3 } else { Protocol::Resp2 }
    }
}

/// Appends replies to a buffer.
#[derive(Debug)]
pub struct Writer<'a> {
    protocol: Protocol,
    out: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Appends to `out` in that version.
    #[inline]
    pub fn new(protocol: Protocol, out: &'a mut Vec<u8>) -> Writer<'a> {
        Writer { protocol, out }
    }

    /// A message that answers no request; `len` parts follow.
    pub fn push(&mut self, len: usize) {
        self.header(if self.is_resp3() { b'>' } else { b'*' }, len);
    }

    /// An error whose text is bytes.
    pub fn error_bytes(&mut self, text: &[u8]) {
        self.line(b'-', text);
    }

    #[inline]
    fn is_resp3(&self) -> bool {
        self.protocol == Protocol::Resp3
    }

    #[inline]
    fn header(&mut self, kind: u8, len: usize) {
        match len {
            0..=9 => self.out.extend_from_slice(&[kind, b'0' + len as u8, b'\r', b'\n']),
            10..=99 => {
                let (tens, ones) = ((len / 10) as u8, (len % 10) as u8);
                self.out.extend_from_slice(&[kind, b'0' + tens, b'0' + ones, b'\r', b'\n']);
            }
            _ => self.number(kind, len as i64),
        }
    }

    fn number(&mut self, kind: u8, value: i64) {
        let mut digits = itoa::Buffer::new();
        let digits = digits.format(value);
        self.out.reserve(digits.len() + 3);
        self.out.push(kind);
        self.out.extend_from_slice(digits.as_bytes());
        self.out.extend_from_slice(b"\r\n");
    }

    fn line(&mut self, kind: u8, text: &[u8]) {
        self.out.reserve(text.len() + 3);
        self.out.push(kind);
        if memchr::memchr2(b'\r', b'\n', text).is_none() {
            self.out.extend_from_slice(text);
        } else {
            self.out.extend(text.iter().map(|&c| if c == b'\r' || c == b'\n' { b' ' } else { c }));
        }
        self.out.extend_from_slice(b"\r\n");
    }
}

impl Reply for Writer<'_> {
    #[inline]
    fn simple(&mut self, text: &str) {
        self.line(b'+', text.as_bytes());
    }

    fn error(&mut self, text: &str) {
        self.line(b'-', text.as_bytes());
    }

    #[inline]
    fn integer(&mut self, value: i64) {
        match value {
            0..=9 => self.out.extend_from_slice(&[b':', b'0' + value as u8, b'\r', b'\n']),
            _ => self.number(b':', value),
        }
    }

    #[inline(always)]
    fn bulk(&mut self, value: &[u8]) {
        self.out.reserve(value.len() + 16);
        self.header(b'$', value.len());
        self.out.extend_from_slice(value);
        self.out.extend_from_slice(b"\r\n");
    }

    #[inline]
    fn null(&mut self) {
        self.out.extend_from_slice(if self.is_resp3() { b"_\r\n" } else { b"$-1\r\n" });
    }

    fn null_array(&mut self) {
        self.out.extend_from_slice(if self.is_resp3() { b"_\r\n" } else { b"*-1\r\n" });
    }

    #[inline]
    fn array(&mut self, len: usize) {
        self.header(b'*', len);
    }

    fn map(&mut self, len: usize) {
        if self.is_resp3() { self.header(b'%', len) } else { self.header(b'*', len * 2) }
    }

    fn set(&mut self, len: usize) {
        self.header(if self.is_resp3() { b'~' } else { b'*' }, len);
    }

    fn double(&mut self, value: f64) {
        let text = if value.is_nan() {
            "nan".to_owned()
        } else if value.is_infinite() {
            if value > 0.0 { "inf".to_owned() } else { "-inf".to_owned() }
        } else if value != 0.0 && !(1e-5..1e17).contains(&value.abs()) {
            format!("{value:e}")
        } else {
            value.to_string()
        };
        if self.is_resp3() { self.line(b',', text.as_bytes()) } else { self.bulk(text.as_bytes()) }
    }

    fn boolean(&mut self, value: bool) {
        self.out.extend_from_slice(match (self.is_resp3(), value) {
            (true, true) => b"#t\r\n",
            (true, false) => b"#f\r\n",
            (false, true) => b":1\r\n",
            (false, false) => b":0\r\n",
        });
    }

    fn verbatim(&mut self, text: &str) {
        if self.is_resp3() {
            self.header(b'=', text.len() + 4);
            self.out.extend_from_slice(b"txt:");
            self.out.extend_from_slice(text.as_bytes());
            self.out.extend_from_slice(b"\r\n");
        } else {
            self.bulk(text.as_bytes());
        }
    }

    #[inline]
    fn ok(&mut self) {
        self.out.extend_from_slice(b"+OK\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(write: impl Fn(&mut Writer<'_>)) -> [String; 2] {
        [Protocol::Resp2, Protocol::Resp3].map(|protocol| {
            let mut out = Vec::new();
            write(&mut Writer::new(protocol, &mut out));
            String::from_utf8(out).unwrap()
        })
    }

    #[test]
    fn parts_look_as_the_protocols_say() {
        type Write = fn(&mut Writer<'_>);
        let table: [(Write, &str, &str); 24] = [
            (|w| w.ok(), "+OK\r\n", "+OK\r\n"),
            (|w| w.simple("PONG"), "+PONG\r\n", "+PONG\r\n"),
            (|w| w.error("ERR a\r\nb"), "-ERR a  b\r\n", "-ERR a  b\r\n"),
            (|w| w.error_bytes(b"ERR x"), "-ERR x\r\n", "-ERR x\r\n"),
            (|w| w.integer(7), ":7\r\n", ":7\r\n"),
            (|w| w.integer(-1), ":-1\r\n", ":-1\r\n"),
            (|w| w.integer(i64::MIN), ":-9223372036854775808\r\n", ":-9223372036854775808\r\n"),
            (|w| w.bulk(b""), "$0\r\n\r\n", "$0\r\n\r\n"),
            (
                |w| w.bulk(&[b'x'; 42]),
                &format!("$42\r\n{}\r\n", "x".repeat(42)),
                &format!("$42\r\n{}\r\n", "x".repeat(42)),
            ),
            (
                |w| w.bulk(&[b'x'; 100]),
                &format!("$100\r\n{}\r\n", "x".repeat(100)),
                &format!("$100\r\n{}\r\n", "x".repeat(100)),
            ),
            (|w| w.null(), "$-1\r\n", "_\r\n"),
            (|w| w.null_array(), "*-1\r\n", "_\r\n"),
            (|w| w.array(3), "*3\r\n", "*3\r\n"),
            (|w| w.map(6), "*12\r\n", "%6\r\n"),
            (|w| w.set(2), "*2\r\n", "~2\r\n"),
            (|w| w.push(3), "*3\r\n", ">3\r\n"),
            (|w| w.double(1.5), "$3\r\n1.5\r\n", ",1.5\r\n"),
            (|w| w.double(3.0), "$1\r\n3\r\n", ",3\r\n"),
            (|w| w.double(1e300), "$5\r\n1e300\r\n", ",1e300\r\n"),
            (|w| w.double(f64::NEG_INFINITY), "$4\r\n-inf\r\n", ",-inf\r\n"),
            (|w| w.double(f64::NAN), "$3\r\nnan\r\n", ",nan\r\n"),
            (|w| w.boolean(true), ":1\r\n", "#t\r\n"),
            (|w| w.boolean(false), ":0\r\n", "#f\r\n"),
            (|w| w.verbatim("hi"), "$2\r\nhi\r\n", "=6\r\ntxt:hi\r\n"),
        ];
        for (write, two, three) in table {
            assert_eq!(both(write), [two, three]);
        }
    }

    #[test]
    fn protocols_survive_their_number() {
        for protocol in [Protocol::Resp2, Protocol::Resp3] {
            assert_eq!(Protocol::from_flag(protocol.flag()), protocol);
        }
        assert_eq!(Protocol::from_flag(0), Protocol::Resp2);
    }
}
