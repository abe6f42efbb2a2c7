//! Replies as they come: cut into whole ones and told apart, whatever pieces the network makes of them.
//!
//! Contract: [`Replies::feed`] reports each reply exactly once, in order, when its last byte has come. The body of a bulk
//! string is collected only if it was asked for; otherwise its bytes are skipped where they lie. An aggregate (array, map,
//! set, push) counts as one reply with all it holds.
//!
//! Bound: an incomplete reply holds at most its header line (64 KiB) or, when bodies are wanted, one body.
//!
//! Not here: what a reply should have been; the worker knows what it asked.

use crate::requests::Protocol;

/// The longest header or status line.
const MAX_LINE: usize = 64 << 10;

/// One reply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply<'a> {
    /// A status such as OK.
    Simple,
    /// An error with its text.
    Error(&'a [u8]),
    /// A number, as digits.
    Integer(&'a [u8]),
    /// A value; its body when bodies are collected, empty otherwise.
    Bulk(&'a [u8]),
    Nil,
    /// An array, map, set or push with all its elements.
    Aggregate,
    /// Another scalar of RESP3: double, boolean, big number, verbatim text.
    Scalar,
}

/// The server broke the protocol: what was found instead of a reply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) String);

/// The replies of one connection.
#[derive(Debug)]
pub(crate) struct Replies {
    protocol: Protocol,
    bodies: bool,
    /// The beginning of a reply that is not whole yet.
    held: Vec<u8>,
    /// Bytes of a body still to come, when bodies are not collected; its line end included.
    skip: usize,
    /// Elements that the aggregate being read still lacks, those of aggregates inside it included; 0 outside of one.
    open: u64,
}

/// What stands at the front of some bytes.
enum Front<'a> {
    /// A whole reply or element, and its length.
    Whole(Reply<'a>, usize),
    /// An aggregate's header: its length and how many elements follow.
    Opens(usize, u64),
    /// A header whose body is not all here: its length and the body's, line end included. An error's text is never skipped.
    Body { header: usize, body: usize, error: bool },
    /// Not even the header is whole.
    Incomplete,
}

impl Replies {
    /// `bodies`: whether values are needed, to be checked.
    pub(crate) fn new(protocol: Protocol, bodies: bool) -> Replies {
        Replies { protocol, bodies, held: Vec::new(), skip: 0, open: 0 }
    }

    /// Takes what came and gives each reply that became whole to `on`.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], on: &mut impl FnMut(Reply<'_>)) -> Result<(), Malformed> {
        if self.skip > 0 {
            let now = self.skip.min(bytes.len());
            self.skip -= now;
            bytes = &bytes[now..];
            if self.skip > 0 {
                return Ok(());
            }
            self.report(Reply::Bulk(b""), on);
        }
        if self.held.is_empty() {
            let used = self.scan(bytes, on)?;
            self.held.extend_from_slice(&bytes[used..]);
        } else {
            let mut held = std::mem::take(&mut self.held);
            held.extend_from_slice(bytes);
            let used = self.scan(&held, on)?;
            held.drain(..used);
            self.held = held;
        }
        Ok(())
    }

    /// Reports every whole reply in `bytes`; returns how many bytes are done with.
    fn scan(&mut self, bytes: &[u8], on: &mut impl FnMut(Reply<'_>)) -> Result<usize, Malformed> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            // The reply to every SET.
            if rest.starts_with(b"+OK\r\n") {
                at += 5;
                self.report(Reply::Simple, on);
                continue;
            }
            let front = match self.protocol {
                Protocol::Resp => resp_front(rest)?,
                Protocol::Memcached => memcached_front(rest)?,
            };
            match front {
                Front::Whole(reply, len) => {
                    at += len;
                    self.report(reply, on);
                }
                Front::Opens(len, elements) => {
                    at += len;
                    if elements == 0 {
                        self.report(Reply::Aggregate, on);
                    } else {
                        // An aggregate inside another takes the place of one element.
                        self.open = self.open.saturating_sub(1).saturating_add(elements);
                    }
                }
                Front::Body { header, body, error } => {
                    if error || self.bodies {
                        break;
                    }
                    let here = rest.len() - header;
                    debug_assert!(here < body, "a body that is here makes a whole reply");
                    self.skip = body - here;
                    at = bytes.len();
                }
                Front::Incomplete => {
                    if rest.len() > MAX_LINE {
                        return Err(Malformed(format!("a line of more than {MAX_LINE} bytes")));
                    }
                    break;
                }
            }
        }
        Ok(at)
    }

    #[inline]
    fn report(&mut self, reply: Reply<'_>, on: &mut impl FnMut(Reply<'_>)) {
        if self.open > 0 {
            self.open -= 1;
            if self.open == 0 {
                on(Reply::Aggregate);
            }
            return;
        }
        on(reply);
    }
}

fn line(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let end = memchr::memchr(b'\n', bytes)?;
    let text = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
    Some((text, end + 1))
}

/// A length that follows a type byte; -1 is `None`.
fn length(text: &[u8]) -> Result<Option<usize>, Malformed> {
    if text == b"-1" {
        return Ok(None);
    }
    if text.is_empty() || text.len() > 18 {
        return Err(malformed(text));
    }
    text.iter()
        .try_fold(0usize, |sum, digit| digit.is_ascii_digit().then(|| sum * 10 + usize::from(digit - b'0')))
        .map(Some)
        .ok_or_else(|| malformed(text))
}

fn malformed(text: &[u8]) -> Malformed {
    Malformed(String::from_utf8_lossy(&text[..text.len().min(80)]).into_owned())
}

#[inline]
fn resp_front(bytes: &[u8]) -> Result<Front<'_>, Malformed> {
    let Some((text, header)) = short_line(bytes) else { return Ok(Front::Incomplete) };
    let rest = &text[1..];
    Ok(match text[0] {
        b'$' | b'=' | b'!' => match length(rest)? {
            None => Front::Whole(Reply::Nil, header),
            Some(len) => {
                let body = len + 2;
                let error = text[0] == b'!';
                match bytes.get(header..header + body) {
                    Some(body) if body[len..] != *b"\r\n" => return Err(malformed(&body[len..])),
                    Some(body) if error => Front::Whole(Reply::Error(&body[..len]), header + len + 2),
                    Some(body) => Front::Whole(Reply::Bulk(&body[..len]), header + len + 2),
                    None => Front::Body { header, body, error },
                }
            }
        },
        b'+' => Front::Whole(Reply::Simple, header),
        b'-' => Front::Whole(Reply::Error(rest), header),
        b':' => Front::Whole(Reply::Integer(rest), header),
        b'_' => Front::Whole(Reply::Nil, header),
        b',' | b'#' | b'(' => Front::Whole(Reply::Scalar, header),
        b'*' | b'~' | b'>' => match length(rest)? {
            None => Front::Whole(Reply::Nil, header),
            Some(len) => Front::Opens(header, len as u64),
        },
        b'%' => match length(rest)? {
            None => return Err(malformed(text)),
            Some(len) => Front::Opens(header, 2 * len as u64),
        },
        _ => return Err(malformed(text)),
    })
}

/// The first line, never empty; headers are short, so a plain loop finds their end before a vector search has begun.
#[inline]
fn short_line(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let near = bytes.len().min(12);
    let (text, len) = match bytes[..near].iter().position(|&b| b == b'\n') {
        Some(end) => (bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]), end + 1),
        None => line(bytes)?,
    };
    // An empty line is shown to the caller as what it is: no type byte.
    Some(if text.is_empty() { (b"\n", len) } else { (text, len) })
}

fn memcached_front(bytes: &[u8]) -> Result<Front<'_>, Malformed> {
    let Some((text, header)) = line(bytes) else { return Ok(Front::Incomplete) };
    if text.starts_with(b"VALUE ") {
        let len = text.split(|&b| b == b' ').nth(3).ok_or_else(|| malformed(text))?;
        let len = length(len)?.ok_or_else(|| malformed(text))?;
        let body = len + b"\r\nEND\r\n".len();
        return Ok(match bytes.get(header..header + body) {
            Some(body) if body[len..] != *b"\r\nEND\r\n" => return Err(malformed(&body[len..])),
            Some(value) => Front::Whole(Reply::Bulk(&value[..len]), header + body),
            None => Front::Body { header, body, error: false },
        });
    }
    Ok(match text {
        b"END" | b"NOT_FOUND" => Front::Whole(Reply::Nil, header),
        b"STORED" | b"DELETED" => Front::Whole(Reply::Simple, header),
        _ if text.starts_with(b"ERROR") || text.starts_with(b"CLIENT_ERROR") || text.starts_with(b"SERVER_ERROR") => {
            Front::Whole(Reply::Error(text), header)
        }
        _ => return Err(malformed(text)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is reported when the bytes come in pieces of `piece`.
    fn seen(protocol: Protocol, bodies: bool, bytes: &[u8], piece: usize) -> Result<Vec<String>, Malformed> {
        let mut replies = Replies::new(protocol, bodies);
        let mut seen = Vec::new();
        for piece in bytes.chunks(piece) {
            replies.feed(piece, &mut |reply| {
                seen.push(match reply {
                    Reply::Bulk(body) if bodies => format!("bulk {}", String::from_utf8_lossy(body)),
                    Reply::Bulk(_) => "bulk".into(),
                    Reply::Error(text) => format!("error {}", String::from_utf8_lossy(text)),
                    Reply::Integer(digits) => format!("integer {}", String::from_utf8_lossy(digits)),
                    other => format!("{other:?}"),
                });
            })?;
        }
        assert!(replies.held.is_empty() && replies.skip == 0 && replies.open == 0, "all was whole");
        Ok(seen)
    }

    #[test]
    fn replies_are_the_same_however_the_network_cuts_them() {
        let bytes = b"+OK\r\n$5\r\nhello\r\n:42\r\n$-1\r\n-ERR no such thing\r\n*2\r\n$1\r\na\r\n*1\r\n:1\r\n$0\r\n\r\n*0\r\n*-1\r\n\
            +PONG\r\n_\r\n#t\r\n,1.5\r\n%1\r\n+k\r\n*2\r\n:1\r\n:2\r\n!3\r\nERR\r\n=5\r\ntxt:a\r\n~1\r\n:1\r\n+OK\r\n";
        let expected = [
            "Simple",
            "bulk hello",
            "integer 42",
            "Nil",
            "error ERR no such thing",
            "Aggregate",
            "bulk ",
            "Aggregate",
            "Nil",
            "Simple",
            "Nil",
            "Scalar",
            "Scalar",
            "Aggregate",
            "error ERR",
            "bulk txt:a",
            "Aggregate",
            "Simple",
        ];
        for piece in 1..bytes.len() + 1 {
            assert_eq!(seen(Protocol::Resp, true, bytes, piece).unwrap(), expected, "in pieces of {piece}");
            let without: Vec<_> = expected.iter().map(|e| if e.starts_with("bulk") { "bulk" } else { e }).collect();
            assert_eq!(seen(Protocol::Resp, false, bytes, piece).unwrap(), without, "in pieces of {piece}");
        }
    }

    #[test]
    fn memcached_replies() {
        let bytes = b"VALUE key:1 0 5\r\nhello\r\nEND\r\nEND\r\nSTORED\r\nNOT_FOUND\r\nSERVER_ERROR out of memory\r\n";
        let expected = ["bulk hello", "Nil", "Simple", "Nil", "error SERVER_ERROR out of memory"];
        for piece in 1..bytes.len() + 1 {
            assert_eq!(seen(Protocol::Memcached, true, bytes, piece).unwrap(), expected);
        }
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        for bytes in
            [&b"hello\r\n"[..], b"\r\n", b"$x\r\n", b"$3\r\nabcde\r\n", b"%-1\r\n", b"$99999999999999999999\r\n"]
        {
            assert!(seen(Protocol::Resp, true, bytes, 64).is_err(), "{}", String::from_utf8_lossy(bytes));
        }
        assert!(seen(Protocol::Resp, true, &[b'+'; 200_000], 4096).is_err(), "a line without end");
    }
}
